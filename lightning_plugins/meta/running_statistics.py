"""Batch norms with separate running statistics for every inner step."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_plugins._arguments import check_arguments
from lightning_plugins._checks import check_positive_int
from lightning_plugins.distributed import sum_over_ranks

Model = TypeVar("Model", bound=nn.Module)


class PerStepBatchNorm(nn.Module):
    """A batch norm with separate running statistics for every number of inner steps taken.

    In training mode it normalises by the current batch without side effects: inside ``vmap`` and ``grad`` buffers
    cannot be written. `InnerLoop` collects the batch statistics and updates the norms after the call. In evaluation
    mode it normalises by the running statistics of the step (for steps beyond the last, of the last one); outside an
    inner loop by those of unadapted parameters.

    Args:
        norm: The batch norm whose parameters, settings and running statistics are taken over.
        steps: Number of inner steps in training.

    Raises:
        TypeError: If ``norm`` is not a batch norm, or ``steps`` not an int.
        ValueError: If ``steps`` is less than 1.

    Example:
        >>> PerStepBatchNorm(nn.BatchNorm2d(4), steps=5).running_mean.shape  # before the first, ..., after the last
        torch.Size([6, 4])

    Source:
        Our reading of Antoniou, Edwards and Storkey, ICLR 2019, https://arxiv.org/abs/1810.09502: the statistics
        are those of the parameters that the batches, support and query, ran with.
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(self, norm: nn.Module, steps: int) -> None:
        super().__init__()
        if not isinstance(norm, _BatchNorm) or isinstance(norm, nn.SyncBatchNorm):
            raise TypeError(f"`norm` must be a BatchNorm1d, 2d or 3d, got {type(norm).__name__}")
        check_positive_int("steps", steps)
        self.num_features, self.eps, self.momentum = norm.num_features, norm.eps, norm.momentum
        self.weight, self.bias = norm.weight, norm.bias
        like = torch.empty(norm.num_features) if norm.weight is None else norm.weight.detach()
        mean = torch.zeros_like(like) if norm.running_mean is None else norm.running_mean
        var = torch.ones_like(like) if norm.running_var is None else norm.running_var
        self.register_buffer("running_mean", mean.repeat(steps + 1, 1))
        self.register_buffer("running_var", var.repeat(steps + 1, 1))
        self.register_buffer("num_batches_tracked", torch.zeros(steps + 1, dtype=torch.long, device=mean.device))
        self.train(norm.training)
        self.row = 0  # number of inner steps taken by the current parameters
        self.report: Callable[[Tensor, Tensor], None] | None = None  # collects means and variances for an inner loop

    @property
    def steps(self) -> int:
        """Number of inner steps with separate statistics."""
        return len(self.running_mean) - 1

    def forward(self, x: Tensor) -> Tensor:
        """Normalise every channel.

        Args:
            x: Shape ``(samples, channels, ...)``.

        Returns:
            Tensor of the same shape and dtype.

        Raises:
            ValueError: If ``x`` has another number of channels.
        """
        if x.ndim < 2 or x.shape[1] != self.num_features:
            raise ValueError(f"`x` must have shape (samples, {self.num_features}, ...), got {tuple(x.shape)}")
        wide = x if x.dtype == torch.float64 else x.float()
        if self.training:  # elementary operations: under `vmap(grad(...))` torch's norms lack second derivatives
            dims = [0, *range(2, x.ndim)]
            mean = wide.mean(dims)
            centred = wide - self._by_channel(mean, x)
            variance = centred.square().mean(dims)
            if self.report is not None:
                count = x.numel() // self.num_features
                self.report(mean, variance * (count / max(count - 1, 1)))
        else:
            row = min(self.row, self.steps)
            centred = wide - self._by_channel(self.running_mean[row], x)
            variance = self.running_var[row]
        normalized = centred * self._by_channel((variance + self.eps).rsqrt(), x)
        if self.weight is not None:
            normalized = normalized * self._by_channel(self.weight, x)
        if self.bias is not None:
            normalized = normalized + self._by_channel(self.bias, x)
        return normalized.to(x.dtype)

    def update(self, row: int, mean: Tensor, variance: Tensor) -> None:
        """Move the running statistics of parameters after ``row`` inner steps towards those of a batch of tasks.

        Args:
            row: Number of inner steps.
            mean: Means of the channels, shape ``(channels,)``.
            variance: Their unbiased variances.
        """
        with torch.no_grad():
            self.num_batches_tracked[row] += 1
            factor = 1 / self.num_batches_tracked[row] if self.momentum is None else self.momentum
            for running, new in ((self.running_mean[row], mean), (self.running_var[row], variance)):
                running += factor * (new.to(running.dtype) - running)

    def extra_repr(self) -> str:
        """The settings, as ``print`` shows them."""
        return f"{self.num_features}, steps={self.steps}, eps={self.eps}, momentum={self.momentum}"

    def _by_channel(self, channels: Tensor, x: Tensor) -> Tensor:
        return channels.reshape(-1, *[1] * (x.ndim - 2))


def use_per_step_statistics(model: Model, steps: int) -> Model:
    """Give batch norms separate running statistics for every inner step, for use in evaluation.

    In evaluation the statistics then come from training: query samples are not normalised by each other, unlike with
    `use_batch_statistics`. In training the statistics of the current batch are used, and every call of an `InnerLoop`
    in training mode moves the running statistics towards their mean over the tasks of all ranks. They do not depend on
    the number of processes, nor on whether tasks are vectorised, looped or chunked.

    Args:
        model: The model, changed in place: its batch norms are replaced, under the same names, and keep their
            parameters. A state dict then has running statistics of shape ``(steps + 1, channels)``.
        steps: Number of inner steps in training.

    Returns:
        ``model``; the new norm if it is a batch norm itself.

    Raises:
        TypeError: If ``steps`` is not an int.
        ValueError: If ``steps`` is less than 1, or there is no batch norm.

    Example:
        >>> network = use_per_step_statistics(nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)), steps=5)
        >>> network[1]
        PerStepBatchNorm(4, steps=5, eps=1e-05, momentum=0.1)

    Source:
        As for `PerStepBatchNorm`.
    """
    check_arguments(use_per_step_statistics, locals())
    check_positive_int("steps", steps)
    found: dict[nn.Module, PerStepBatchNorm] = {}
    for module in model.modules():
        if isinstance(module, _BatchNorm) and not isinstance(module, nn.SyncBatchNorm):
            found[module] = PerStepBatchNorm(module, steps)
    if not found:
        raise ValueError(f"`model` must have batch norms, got a {type(model).__name__} without")
    for parent in list(model.modules()):
        for name, child in parent._modules.items():  # a norm may have two names
            if child in found:
                setattr(parent, name, found[child])
    return found.get(model, model)  # type: ignore[return-value]  # a norm alone is replaced as a whole


class Statistics:
    """Statistics of a model's per-step norms in an inner loop, passed out of ``vmap`` and ``grad``.

    Args:
        model: The model.
        collect: Whether to collect statistics; otherwise only the step is set.
    """

    def __init__(self, model: nn.Module, *, collect: bool) -> None:
        self.norms = [module for module in model.modules() if isinstance(module, PerStepBatchNorm)]
        self.collect = collect and any(norm.training for norm in self.norms)
        self._places: list[tuple[PerStepBatchNorm, int]] = []  # of every pair of tensors that a task returns

    def begin_task(self) -> None:
        """Reset the positions recorded for the previous task; they are the same for all tasks."""
        self._places.clear()

    @contextmanager
    def of_step(self, row: int) -> Iterator[list[Tensor]]:
        """Set the step of the norms, and yield their statistics in this context, means and variances alternating."""
        seen: list[Tensor] = []

        def reporter(norm: PerStepBatchNorm) -> Callable[[Tensor, Tensor], None]:
            def report(mean: Tensor, variance: Tensor) -> None:
                seen.extend((mean, variance))
                self._places.append((norm, row))

            return report

        for norm in self.norms:
            if self.collect and row > norm.steps:
                raise ValueError(
                    f"`steps` must in training be at most the {norm.steps} of `use_per_step_statistics`, got {row}"
                )
            norm.row, norm.report = row, reporter(norm) if self.collect else None
        try:
            yield seen
        finally:
            for norm in self.norms:
                norm.row, norm.report = 0, None

    def update(self, seen: Sequence[Tensor]) -> None:
        """Update the norms with the statistics of all tasks; a collective call with several ranks.

        Args:
            seen: Means and variances alternating, with a first dimension for the tasks.
        """
        if not self.collect or not seen:
            return
        totals: dict[tuple[PerStepBatchNorm, int], list[Tensor]] = {}
        for place, mean, variance in zip(self._places, seen[::2], seen[1::2], strict=True):
            one = torch.ones_like(mean[:, :1])
            totals.setdefault(place, []).append(torch.cat([mean, variance, one], dim=1).detach().sum(0))
        sums = [torch.stack(parts).sum(0) for parts in totals.values()]
        with torch.no_grad():
            shared = sum_over_ranks(torch.cat(sums)).split([len(part) for part in sums])
        for (norm, row), total in zip(totals, shared, strict=True):
            mean, variance = (total[:-1] / total[-1]).chunk(2)
            norm.update(row, mean, variance)
