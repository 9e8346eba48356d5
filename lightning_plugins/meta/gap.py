"""Learned gains on the singular values of inner gradients: GAP, exact and approximate."""

import math
from collections.abc import Iterator, Mapping
from typing import NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_plugins._arguments import check_arguments
from lightning_plugins._checks import check_choice, check_positive_int
from lightning_plugins.functional.preconditioning import Derivative, gap_precondition
from lightning_plugins.meta.preconditioners import Preconditioner, few, key

_INITIAL = 0.928  # after the softplus below: gains of 1.0006
_BETA = 2.0
_PACKED = ("in_proj_weight", "qkv.weight")  # of `nn.MultiheadAttention` and of timm's attention
_PARTS = ("query", "key", "value")


class _Matrix(NamedTuple):
    """A matrix with its own gains: a parameter, or some of its rows."""

    label: str
    parameter: str
    part: int  # of `parts` equal ones
    parts: int


def _matrices(name: str, parameter: Tensor) -> Iterator[_Matrix]:
    """One matrix; for a packed attention projection three, which only share their memory."""
    if parameter.ndim == 2 and name.endswith(_PACKED) and parameter.shape[0] % len(_PARTS) == 0:
        for part, which in enumerate(_PARTS):
            yield _Matrix(f"{name}:{which}", name, part, len(_PARTS))
    else:
        yield _Matrix(name, name, 0, 1)


class _Gains(Preconditioner):
    """Learned positive gains of matrices; layers of equal shape are preconditioned together."""

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
        self._groups: dict[tuple[int, int], list[_Matrix]] = {}

    def initialise(self, parameters: Mapping[str, Tensor], steps: int) -> None:
        """Create the gains, initially about 1, of the parameters that have them.

        Args:
            parameters: The adapted parameters by dotted name.
            steps: Number of inner steps in training.

        Raises:
            ValueError: If no parameter would have gains.
        """
        check_arguments(type(self).initialise, locals())
        for name, parameter in parameters.items():
            if parameter.ndim < 2 or (parameter.ndim == 2 and not self.linear):
                continue
            for matrix in _matrices(name, parameter):
                rows, columns = parameter.shape[0] // matrix.parts, math.prod(parameter.shape[1:])
                self._groups.setdefault((rows, columns), []).append(matrix)
                shape = (steps, min(rows, columns)) if self.per_step else (min(rows, columns),)
                self.raw[key(matrix.label)] = nn.Parameter(parameter.new_full(shape, _INITIAL))
        if not self._groups:
            hint = "" if self.linear else "; `linear=True` gives them to the weights of linear layers"
            raise ValueError(
                f"`parameters`: {type(self).__name__}: none of {few(parameters)} is a convolution's kernel{hint}"
            )

    def gains(self, step: int = 0) -> dict[str, Tensor]:
        """Return the gains by the parameters' dotted names.

        Args:
            step: The inner step, from 0, for gains per step; beyond the last training step, the last gains are used.

        Returns:
            For every parameter that has them, a tensor ``(min(out, in * height * width),)`` of positive gains: the
            first belongs to the largest singular value, or to the first row or column under `ApproximateGAP`.
        """
        gains = {}
        for matrices in self._groups.values():
            for matrix in matrices:
                raw = self.raw[key(matrix.label)]
                raw = raw[min(step, len(raw) - 1)] if self.per_step else raw
                gains[matrix.label] = F.softplus(raw, beta=_BETA)
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
        found: dict[str, list[Tensor]] = {}
        for shape, matrices in self._groups.items():
            parts = [gradients[m.parameter].chunk(m.parts)[m.part].reshape(shape) for m in matrices]
            together = gap_precondition(
                torch.stack(parts),
                torch.stack([gains[matrix.label] for matrix in matrices]),
                approximate=self.approximate,
                derivative=self.derivative,
                rank=self.rank,
            )
            for matrix, update in zip(matrices, together.unbind(), strict=True):
                found.setdefault(matrix.parameter, []).append(update)
        for name, rows in found.items():
            gradient = gradients[name]
            update = rows[0] if len(rows) == 1 else torch.cat(rows)
            updates[name] = update.reshape(gradient.shape).to(gradient.dtype)
        return updates


class GAP(_Gains):
    """Multiplies the ordered singular values of a layer's gradient by learned gains: GAP.

    A kernel of three or more dimensions is treated as the matrix ``(out, in * height * width)``. Biases and the
    parameters of norms use the plain gradient, and so do weights of linear layers, as in the published code, unless
    ``linear``. The packed projection of attention (``in_proj_weight``, timm's ``qkv.weight``) is then treated as three
    matrices, with the gains ``name:query``, ``name:key`` and ``name:value``: our reading. The gains start at
    1.0006, so close to MAML, and are shared by all tasks. They are the only parameters of this module, so they can have
    a separate learning rate.

    Args:
        linear: Whether two-dimensional parameters, as ``(out, in)``, have gains too: our reading of the method
            for linear networks.
        per_step: Whether every inner step has separate gains; the paper uses one set for all.
        derivative: ``"constant"``, as published, or ``"exact"``: see `lightning_plugins.functional.gap_precondition`.
        rank: An upper bound on the rank of the gradients, if known, which speeds up small networks: for linear layers
            called once per forward pass it is at most the number of support samples. See
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

    There is no decomposition. Everything else is as in `GAP`.

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
