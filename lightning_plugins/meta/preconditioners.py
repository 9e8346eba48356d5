"""What an inner loop does to a gradient before it follows it: nothing, learned rates, or learned gains."""

import math
from collections.abc import Iterable, Mapping
from typing import get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_plugins._checks import check_choice, check_finite_number, check_positive_int
from lightning_plugins.functional.preconditioning import Derivative, gap_precondition

_INITIAL = 0.928  # through the softplus below: gains of 1.0006
_BETA = 2.0


class Preconditioner(nn.Module):
    """Base class: turns gradients into the updates that `InnerLoop` multiplies by its learning rate and subtracts.

    What it learns are its own parameters. It is called inside of ``torch.func.vmap``, once for all tasks: tensors have
    the shapes of the parameters, without a task dimension, and no value may be read from them.

    Example:
        >>> class Scaled(Preconditioner):
        ...     def initialise(self, parameters, steps):
        ...         self.scale = nn.Parameter(torch.ones(steps))
        ...     def forward(self, gradients, step):
        ...         return {name: self.scale[step] * gradient for name, gradient in gradients.items()}
        >>> scaled = Scaled()
        >>> scaled.initialise({"weight": torch.zeros(2)}, steps=3)
        >>> scaled({"weight": torch.tensor([1.0, 2.0])}, 0)["weight"]
        tensor([1., 2.], grad_fn=<MulBackward0>)
    """

    initialised = False  # by an `InnerLoop`, whose parameters' shapes and number of steps it has from then on

    def initialise(self, parameters: Mapping[str, Tensor], steps: int) -> None:
        """Create what is learned; `InnerLoop` calls it once. By default there is nothing.

        Args:
            parameters: The adapted parameters by dotted name.
            steps: Number of inner steps in training.
        """

    def forward(self, gradients: dict[str, Tensor], step: int) -> dict[str, Tensor]:
        """Return an update for each gradient, of the same name and shape.

        Args:
            gradients: Gradients of the support loss by dotted name.
            step: The inner step, from 0; it can exceed those of training.

        Returns:
            Updates by the same names.

        Raises:
            NotImplementedError: By this base class.
        """
        raise NotImplementedError(f"{type(self).__name__} must define `forward(gradients, step)`")


class Identity(Preconditioner):
    """Follows the gradient itself: MAML.

    Source:
        Finn, Abbeel and Levine, ICML 2017, https://arxiv.org/abs/1703.03400.

    Example:
        >>> Identity()({"weight": torch.tensor([1.0, 2.0])}, 0)
        {'weight': tensor([1., 2.])}
    """

    def forward(self, gradients: dict[str, Tensor], step: int) -> dict[str, Tensor]:
        """Return the gradients.

        Args:
            gradients: Gradients by dotted name.
            step: Has no effect.

        Returns:
            The same.
        """
        return gradients


class MetaSGD(Preconditioner):
    """Multiplies every entry of a gradient by a learned factor of its own, shared by tasks and steps: Meta-SGD.

    An entry's rate is the factor times the inner loop's learning rate. For the published parametrisation, in which the
    rates themselves are learned, set the loop's ``learning_rate`` to 1 and ``initial`` to the wanted rate; an optimizer
    such as Adam then changes them relatively faster.

    Args:
        initial: What the factors start from.

    Raises:
        TypeError: If ``initial`` is not a number.
        ValueError: If ``initial`` is not finite.

    Example:
        >>> meta_sgd = MetaSGD()
        >>> meta_sgd.initialise({"weight": torch.zeros(2)}, steps=5)
        >>> meta_sgd({"weight": torch.tensor([1.0, 2.0])}, 0)["weight"]
        tensor([1., 2.], grad_fn=<MulBackward0>)

    Source:
        Li et al., 2017, https://arxiv.org/abs/1707.09835.
    """

    def __init__(self, initial: float = 1.0) -> None:
        super().__init__()
        self.initial = check_finite_number("initial", initial)
        self.factors = nn.ParameterDict()

    def initialise(self, parameters: Mapping[str, Tensor], steps: int) -> None:
        """Create the factors.

        Args:
            parameters: The adapted parameters by dotted name.
            steps: Has no effect.
        """
        for name, parameter in parameters.items():
            self.factors[key(name)] = nn.Parameter(torch.full_like(parameter, self.initial))

    def forward(self, gradients: dict[str, Tensor], step: int) -> dict[str, Tensor]:
        """Multiply the gradients by the factors.

        Args:
            gradients: Gradients by dotted name.
            step: Has no effect.

        Returns:
            Updates by the same names.
        """
        return {name: self.factors[key(name)] * gradient for name, gradient in gradients.items()}


class _Gains(Preconditioner):
    """Learned positive gains of matrices; layers of one shape are preconditioned together."""

    def __init__(
        self, *, linear: bool, per_step: bool, approximate: bool, derivative: Derivative, rank: int | None = None
    ) -> None:
        super().__init__()
        self.linear = linear
        self.per_step = per_step
        self.approximate = approximate
        self.derivative = derivative
        self.rank = rank
        self.raw = nn.ParameterDict()  # the gains before the softplus
        self._groups: dict[tuple[int, int], list[str]] = {}

    def initialise(self, parameters: Mapping[str, Tensor], steps: int) -> None:
        """Create the gains, near 1, of the parameters that have them.

        Args:
            parameters: The adapted parameters by dotted name.
            steps: Number of inner steps in training.

        Raises:
            ValueError: If no parameter would have gains.
        """
        for name, parameter in parameters.items():
            if parameter.ndim >= 3 or (parameter.ndim == 2 and self.linear):
                rows, columns = parameter.shape[0], math.prod(parameter.shape[1:])
                self._groups.setdefault((rows, columns), []).append(name)
                shape = (steps, min(rows, columns)) if self.per_step else (min(rows, columns),)
                self.raw[key(name)] = nn.Parameter(parameter.new_full(shape, _INITIAL))
        if not self._groups:
            hint = "" if self.linear else "; `linear=True` gives them to the weights of linear layers"
            raise ValueError(f"{type(self).__name__}: none of {few(parameters)} is a convolution's kernel{hint}")

    def gains(self, step: int = 0) -> dict[str, Tensor]:
        """Return the gains by the parameters' dotted names.

        Args:
            step: The inner step, from 0, for gains per step; behind the last step of training, that one's are taken.

        Returns:
            For every parameter that has them, a tensor ``(min(out, in * height * width),)`` of positive gains: the
            first belongs to the largest singular value, or to the first row or column under `ApproximateGAP`.
        """
        gains = {}
        for names in self._groups.values():
            for name in names:
                raw = self.raw[key(name)]
                gains[name] = F.softplus(raw[min(step, len(raw) - 1)] if self.per_step else raw, beta=_BETA)
        return gains

    def forward(self, gradients: dict[str, Tensor], step: int) -> dict[str, Tensor]:
        """Precondition the gradients.

        Args:
            gradients: Gradients by dotted name.
            step: The inner step, from 0.

        Returns:
            Updates by the same names; those of parameters without gains are the gradients.
        """
        gains, updates = self.gains(step), dict(gradients)
        for shape, names in self._groups.items():
            together = gap_precondition(
                torch.stack([gradients[name].reshape(shape) for name in names]),
                torch.stack([gains[name] for name in names]),
                approximate=self.approximate,
                derivative=self.derivative,
                rank=self.rank,
            )
            for name, update in zip(names, together.unbind(), strict=True):
                updates[name] = update.reshape(gradients[name].shape).to(gradients[name].dtype)
        return updates


class GAP(_Gains):
    """Multiplies the singular values of a layer's gradient by learned gains, in their order: GAP.

    A kernel of three or more dimensions counts as the matrix ``(out, in * height * width)``. Biases and the parameters
    of norms take the plain gradient, and so do weights of linear layers, as in the published code, unless ``linear``.
    The gains start at 1.0006, hence next to MAML, and are shared by all tasks. They can be given a learning rate of
    their own: they are the only parameters of this module.

    Args:
        linear: Whether two-dimensional parameters, as ``(out, in)``, have gains too: our reading of how the method goes
            with networks of linear layers.
        per_step: Whether every inner step has gains of its own; published is one set for all.
        derivative: ``"constant"``, published, or ``"exact"``: see `lightning_plugins.functional.gap_precondition`.
        rank: An upper bound on the rank of the gradients, if you know one, which makes small networks faster: linear
            layers that are called once per forward pass have no more than there are support samples. See
            `lightning_plugins.functional.gap_precondition`.

    Raises:
        TypeError: If ``derivative`` is not a string or ``rank`` no int.
        ValueError: If ``derivative`` is unknown or ``rank`` less than 1.

    Example:
        >>> gap = GAP()
        >>> gap.initialise({"conv.weight": torch.zeros(2, 3, 3, 3), "conv.bias": torch.zeros(2)}, steps=5)
        >>> gap.gains()
        {'conv.weight': tensor([1.0006, 1.0006], grad_fn=<SoftplusBackward0>)}

    Source:
        Kang et al., CVPR 2023, https://arxiv.org/abs/2304.01552.
    """

    def __init__(
        self,
        *,
        linear: bool = False,
        per_step: bool = False,
        derivative: Derivative = "constant",
        rank: int | None = None,
    ) -> None:
        check_choice("derivative", derivative, get_args(Derivative))
        if rank is not None:
            check_positive_int("rank", rank)
        super().__init__(linear=linear, per_step=per_step, approximate=False, derivative=derivative, rank=rank)


class ApproximateGAP(_Gains):
    """Multiplies the rows of a layer's gradient, or its columns if these are fewer, by learned gains: approximate GAP.

    There is no decomposition. All else is as in `GAP`.

    Args:
        linear: As for `GAP`.
        per_step: As for `GAP`.

    Example:
        >>> gap = ApproximateGAP(linear=True)
        >>> gap.initialise({"weight": torch.zeros(2, 3)}, steps=5)
        >>> gap({"weight": torch.ones(2, 3)}, 0)["weight"].detach()
        tensor([[1.0006, 1.0006, 1.0006],
                [1.0006, 1.0006, 1.0006]])

    Source:
        Kang et al., CVPR 2023, https://arxiv.org/abs/2304.01552.
    """

    def __init__(self, *, linear: bool = False, per_step: bool = False) -> None:
        super().__init__(linear=linear, per_step=per_step, approximate=True, derivative="constant")


def key(name: str) -> str:
    """A dotted name as a key of a ``ParameterDict``, which takes no dots."""
    return name.replace(".", "/")


def few(names: Iterable[str]) -> str:
    """The first of many names."""
    listed = list(names)
    return ", ".join(map(repr, listed[:5])) + (f", … ({len(listed)} in all)" if len(listed) > 5 else "")
