"""Information of features about classes: a calibrated probe, and the estimate from its posteriors."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_plugins._arguments import check_arguments
from lightning_plugins._checks import check_positive_int, shown
from lightning_plugins.functional.class_information import class_entropy
from lightning_plugins.functional.tensors import check_dims, check_floating, check_integers
from lightning_plugins.information.fitting import check_pairs, shuffled_rows

_RIDGES = (1e-5, 1e-3, 1e-1)
_CALIBRATION = 0.3


@dataclass(frozen=True)
class ClassProbe:
    """A linear classifier with a temperature fitted on rows not used for its weights.

    Attributes:
        weight: Shape ``(C, d)``, for standardised features.
        bias: Shape ``(C,)``.
        shift: Mean of the features, shape ``(d,)``.
        scale: Their deviation, shape ``(d,)``.
        temperature: Divisor of the logits.
    """

    weight: Tensor
    bias: Tensor
    shift: Tensor
    scale: Tensor
    temperature: float

    def log_posteriors(self, features: Tensor) -> Tensor:
        """Compute the log probabilities of the classes.

        Args:
            features: Shape ``(N, d)``.

        Returns:
            Shape ``(N, C)``, in float64.
        """
        logits = ((features.detach().double() - self.shift) / self.scale) @ self.weight.T + self.bias
        return F.log_softmax(logits / self.temperature, dim=1)


def fit_class_probe(features: Tensor, labels: Tensor, *, num_classes: int | None = None, seed: int = 0) -> ClassProbe:
    """Fit softmax regression, choosing weight decay and temperature on three tenths of the rows.

    Args:
        features: Floating tensor of shape ``(N, d)``.
        labels: Integers from 0, shape ``(N,)``; every class that occurs at least twice.
        num_classes: C; by default the largest label plus one.
        seed: Seed of the split, which depends on the rows' values but not on their order.

    Returns:
        The probe.

    Raises:
        TypeError: If ``labels`` are not integers.
        ValueError: If shapes do not fit, or a class has one member.

    Example:
        >>> x = torch.randn(300, 2, generator=torch.Generator().manual_seed(0))
        >>> probe = fit_class_probe(x, (x[:, 0] > 0).long())
        >>> probe.log_posteriors(torch.tensor([[2.0, 0.0]])).argmax().item()
        1
    """
    check_arguments(fit_class_probe, locals())
    check_floating("features", features)
    if num_classes is not None:
        check_positive_int("num_classes", num_classes)
    if features.ndim != 2 or not bool(features.isfinite().all()):
        raise ValueError(f"`features` must be finite with shape (N, d), got {shown(features)}")
    counts = count_classes("labels", labels, len(features), num_classes)
    check_pairs(features, features, fewest=4)
    if bool((counts == 1).any()):
        raise ValueError(
            f"`labels` must have no class with one member, class {int((counts == 1).nonzero()[0])} has one: there is "
            "none to validate it with"
        )
    with torch.inference_mode(False), torch.enable_grad():
        x, labels = features.detach().clone().double(), labels.detach().clone().long().to(features.device)
        held, train = shuffled_rows(features, features, seed).tensor_split([round(len(x) * _CALIBRATION)])
        shift, spread = x[train].mean(dim=0), x[train].std(dim=0)
        scale = torch.where(spread > 0, spread, torch.ones_like(spread))
        z = (x - shift) / scale
        probes = []
        for ridge in _RIDGES:
            weight, bias = _softmax_regression(z[train], labels[train], len(counts), ridge)
            temperature, loss = _calibrated(z[held] @ weight.T + bias, labels[held])
            probes.append((loss, ClassProbe(weight, bias, shift, scale, temperature)))
    return min(probes, key=lambda pair: pair[0])[1]


def class_information(probe: ClassProbe, features: Tensor, labels: Tensor) -> float:
    """Estimate the information of features about their class: the class entropy minus the cross-entropy of a probe.

    A lower estimate of ``I(C; X)``, since another probe may extract more. Uses the label frequencies of the given rows.

    Args:
        probe: A probe fitted on other rows.
        features: Shape ``(N, d)``.
        labels: Shape ``(N,)``.

    Returns:
        The information in nats, at most the class entropy; negative for a probe worse than the class frequencies.

    Raises:
        TypeError: If ``labels`` are not integers.
        ValueError: If shapes do not fit.

    Example:
        >>> x = torch.randn(600, 2, generator=torch.Generator().manual_seed(0))
        >>> labels = (x[:, 0] > 0).long()
        >>> class_information(fit_class_probe(x[:400], labels[:400]), x[400:], labels[400:]) > 0.5
        True
    """
    check_arguments(class_information, locals())
    check_dims("features", features, 1, "(N, d)")
    counts = count_classes("labels", labels, len(features), len(probe.bias))
    cross_entropy = F.nll_loss(probe.log_posteriors(features), labels.long().to(features.device))
    return float(class_entropy(counts / counts.sum())) - float(cross_entropy)


def count_classes(name: str, labels: Tensor, rows: int, num_classes: int | None = None) -> Tensor:
    """Count the members of each class.

    Args:
        name: The argument's name, for the message.
        labels: Integers from 0.
        rows: Required number of labels.
        num_classes: Number of classes; by default the largest label plus one.

    Returns:
        Shape ``(C,)``, float64.

    Raises:
        TypeError: If ``labels`` are not integers.
        ValueError: If there are not ``rows`` of them, or one is out of its range.
    """
    if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.is_complex():
        kind = str(labels.dtype) if isinstance(labels, Tensor) else type(labels).__name__
        raise TypeError(f"`{name}` must be a tensor of integers, one class a row, got {kind}")
    check_integers(name, labels, "a tensor of integers")
    if labels.shape != (rows,) or rows == 0:
        raise ValueError(f"`{name}` must have shape ({rows},), a label a row, got {tuple(labels.shape)}")
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or (num_classes is not None and high >= num_classes):
        raise ValueError(f"`{name}` must be in [0, {num_classes or 'C'}), got {low if low < 0 else high}")
    return torch.bincount(labels.long().flatten(), minlength=num_classes or 0).double()


def _softmax_regression(x: Tensor, labels: Tensor, classes: int, ridge: float) -> tuple[Tensor, Tensor]:
    weight = torch.zeros(classes, x.shape[1], dtype=x.dtype, device=x.device, requires_grad=True)
    bias = torch.zeros(classes, dtype=x.dtype, device=x.device, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(x @ weight.T + bias, labels) + ridge * weight.square().sum() / 2
        loss.backward()
        return loss

    optimizer.step(closure)
    return weight.detach(), bias.detach()


def _calibrated(logits: Tensor, labels: Tensor) -> tuple[float, float]:
    """The temperature with the smallest cross-entropy, and that cross-entropy."""
    low, high = math.log(0.02), math.log(50.0)
    loss, middle = math.inf, 0.0
    for _ in range(4):  # refine between the neighbours of the best
        grid = torch.linspace(low, high, 25, dtype=logits.dtype)
        losses = [float(F.cross_entropy(logits / t, labels)) for t in grid.exp().tolist()]
        at = min(range(len(losses)), key=lambda i: losses[i])
        loss, middle = losses[at], float(grid[at])
        low, high = float(grid[max(at - 1, 0)]), float(grid[min(at + 1, 24)])
    return math.exp(middle), loss
