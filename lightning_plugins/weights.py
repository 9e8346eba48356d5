"""Weights of layers as matrices: the parameter of a module, the unfolding of a kernel, and the target rank."""

import math
from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Literal, NamedTuple

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_plugins._checks import check_finite_number, check_positive_int, check_text, nearest, plain_number
from lightning_plugins.computed_weights import current_weight
from lightning_plugins.selection import check_layers, select_modules

Scheme = Literal[1, 2]

_Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d
_TYPES = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.MultiheadAttention)


class WeightMatrix(NamedTuple):
    """A parameter of a module, or some of its rows, as one matrix or a stack of matrices.

    Attributes:
        label: The layer's clean dotted name; for packed attention projections with ``.q``, ``.k`` or ``.v`` appended.
        module: The module that holds the parameter.
        parameter: The parameter's name in the module.
        rows: The selected rows of the parameter; None for all.
        groups: The number of matrices, one per group of a grouped convolution.
        scheme: How a kernel unfolds; see `weight_to_matrix`.
    """

    label: str
    module: nn.Module
    parameter: str
    rows: tuple[int, int] | None = None
    groups: int = 1
    scheme: Scheme = 1

    @property
    def tensor(self) -> Tensor:
        """The full parameter, as currently stored in or computed by the module."""
        return current_weight(self.module, self.parameter)

    @property
    def is_computed(self) -> bool:
        """True if a parametrization, weight norm or pruning currently computes it from other parameters."""
        return self.parameter not in self.module._parameters

    @property
    def sources(self) -> list[nn.Parameter]:
        """The parameter itself, or the parameters it is computed from."""
        own = self.module._parameters.get(self.parameter)
        if own is not None:
            return [own]
        prefixes = (f"{self.parameter}_", f"parametrizations.{self.parameter}.")
        return [parameter for name, parameter in self.module.named_parameters() if name.startswith(prefixes)]

    def take(self, whole: Tensor) -> Tensor:
        """The matrices ``(m, n)``, or ``(groups, m, n)``, in a tensor of the parameter's shape; a view if possible."""
        part = whole if self.rows is None else whole[self.rows[0] : self.rows[1]]
        return weight_to_matrix(part, groups=self.groups, scheme=self.scheme)

    def put(self, matrix: Tensor) -> Tensor:
        """The inverse of `take`: the part of the parameter that ``matrix`` stands for, in the parameter's layout."""
        shape = list(self.tensor.shape)
        if self.rows is not None:
            shape[0] = self.rows[1] - self.rows[0]
        return matrix_to_weight(matrix, shape, groups=self.groups, scheme=self.scheme)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of `take`."""
        outputs, *others = self.tensor.shape
        outputs = (outputs if self.rows is None else self.rows[1] - self.rows[0]) // self.groups
        if self.scheme == 2 and len(others) == 3:
            inputs, high, wide = others
            matrix = (outputs * high, inputs * wide)
        else:
            matrix = (outputs, math.prod(others))
        return matrix if self.groups == 1 else (self.groups, *matrix)


def weight_to_matrix(weight: Tensor, *, groups: int = 1, scheme: Scheme = 1) -> Tensor:
    """Unfold the kernel of a linear layer or convolution into a matrix.

    Args:
        weight: Tensor of shape ``(O, I / groups, *k)``.
        groups: The groups of a convolution, each a separate matrix.
        scheme: 1 for ``O x (I * k * k)``, 2 for ``(O * k) x (I * k)``, which needs two kernel dimensions; without
            kernel dimensions they are the same.

    Returns:
        Tensor of shape ``(m, n)``, or ``(groups, m, n)`` for two groups or more.

    Example:
        >>> import torch
        >>> [tuple(weight_to_matrix(torch.zeros(8, 4, 3, 3), scheme=scheme).shape) for scheme in (1, 2)]
        [(8, 36), (24, 12)]
    """
    split: Tensor = weight.unflatten(0, (groups, -1))
    if scheme == 2 and weight.ndim == 4:
        _, outputs, inputs, high, wide = split.shape
        matrices = split.transpose(2, 3).reshape(groups, outputs * high, inputs * wide)
    else:
        matrices = split.flatten(2)
    return matrices if groups > 1 else matrices.squeeze(0)


def matrix_to_weight(matrix: Tensor, shape: Sequence[int], *, groups: int = 1, scheme: Scheme = 1) -> Tensor:
    """Fold matrices back into a kernel: the inverse of `weight_to_matrix`.

    Args:
        matrix: Tensor of shape ``(m, n)`` or ``(groups, m, n)``.
        shape: The kernel's shape, ``(O, I / groups, *k)``.
        groups: As for `weight_to_matrix`.
        scheme: As for `weight_to_matrix`.

    Returns:
        Tensor of the shape ``shape``.

    Example:
        >>> import torch
        >>> kernel = torch.arange(72.0).reshape(4, 2, 3, 3)
        >>> bool((matrix_to_weight(weight_to_matrix(kernel, scheme=2), kernel.shape, scheme=2) == kernel).all())
        True
    """
    if scheme == 2 and len(shape) == 4:
        outputs, inputs, high, wide = shape
        return matrix.reshape(outputs, high, inputs, wide).transpose(1, 2)
    return matrix.reshape(tuple(shape))


def select_weight_matrices(
    model: nn.Module, layers: str | Sequence[str], *, scheme: Scheme = 1, computed: bool = False
) -> list[WeightMatrix]:
    """Find the weight matrices of supported layers among those selected by ``layers``.

    These are linear layers, convolutions in one to three dimensions, and the projections of ``nn.MultiheadAttention``.
    A matrix with a single row or column, as in a depthwise convolution under scheme 1, has nothing to regularise and is
    skipped by globs. A parameter shared by several layers is returned once.

    Args:
        model: The model.
        layers: A dotted name, a glob, or a sequence of them.
        scheme: See `weight_to_matrix`.
        computed: Whether weights may be computed from parameters, by a parametrization.

    Returns:
        The matrices, in the model's order.

    Raises:
        ValueError: If nothing is found, a named layer has no matrix of at least two rows and columns, a weight is not
            an initialised parameter, or a convolution does not fit the scheme.
    """
    named, found, seen = set(check_layers(layers, sides=False)), [], set()
    for name, module in select_modules(model, layers, types=_TYPES).items():
        weights = _matrices_of(name, module, scheme)
        for weight in weights:
            _check_weight(weight, computed)
        kept = [weight for weight in weights if min(weight.shape[-2:]) > 1]
        if name in named and not kept:
            shapes = ", ".join(str(weight.shape) for weight in weights)
            raise ValueError(f"`layers`: {name!r} must have a matrix with two rows and columns or more, got {shapes}")
        for weight in kept:
            parameter = weight.module._parameters.get(weight.parameter)
            key = (id(weight.module), weight.parameter) if parameter is None else (id(parameter), weight.rows)
            if key not in seen:
                seen.add(key)
                found.append(weight)
    if not found:
        raise ValueError(f"`layers`: {layers!r} must match a weight with two rows and columns or more, got none")
    return found


def _matrices_of(name: str, module: nn.Module, scheme: Scheme) -> list[WeightMatrix]:
    if isinstance(module, nn.MultiheadAttention):
        if module._qkv_same_embed_dim:
            size = module.embed_dim
            return [
                WeightMatrix(f"{name}.{part}", module, "in_proj_weight", (i * size, (i + 1) * size))
                for i, part in enumerate("qkv")
            ]
        return [WeightMatrix(f"{name}.{part}", module, f"{part}_proj_weight") for part in "qkv"]
    groups = module.groups if isinstance(module, _Convolution) else 1
    return [WeightMatrix(name, module, "weight", None, groups, scheme)]


def _check_weight(weight: WeightMatrix, computed: bool) -> None:
    if not computed and weight.parameter not in weight.module._parameters:
        raise ValueError(
            f"`layers`: the {weight.parameter!r} of {weight.label!r} must be a parameter, but it is computed from "
            "others (a parametrization or weight norm), to which the gradient would have to be carried; use "
            "`StableRankMixin`, or remove it"
        )
    if is_lazy(weight.tensor):
        raise ValueError(
            f"`layers`: {weight.label!r} must have a shape, but it is lazy; run a batch through the model before `fit`"
        )
    if weight.scheme == 2 and weight.tensor.ndim not in {2, 4}:
        raise ValueError(
            f"`scheme=2` needs convolutions in two dimensions, got {type(weight.module).__name__} {weight.label!r}; "
            "pass `scheme=1`"
        )


Rank = int | float | dict[str, int] | None


class Target(NamedTuple):
    """A weight matrix and its target rank; None for the stable rank itself."""

    weight: WeightMatrix
    rank: int | None


def check_rank(rank: Rank) -> Rank:
    """Return ``rank`` if it is None, an int of at least 1, a float between 0 and 1, or a mapping to such ints.

    Raises:
        TypeError: If it is of another type.
        ValueError: If a number is out of its range.
    """
    if rank is None or (isinstance(rank, int | Integral) and not isinstance(rank, bool)):
        return rank if rank is None else check_positive_int("rank", rank)
    if isinstance(rank, Mapping):
        for name in rank:
            check_text("rank", name, "a mapping from names of layers to ranks")
        return {name: check_positive_int(f"rank[{name!r}]", number) for name, number in rank.items()}
    if not 0 < check_finite_number("rank", rank) < 1:
        hint = f"; did you mean {int(rank)}?" if rank >= 1 and float(rank).is_integer() else ""
        raise ValueError(f"`rank` must be a number of at least 1 or a fraction between 0 and 1, got {rank!r}{hint}")
    return plain_number(rank)


def check_scheme(scheme: Scheme) -> Scheme:
    """Return ``scheme`` if it is 1 or 2.

    Raises:
        ValueError: If it is not.
    """
    if isinstance(scheme, bool) or not isinstance(scheme, int | Integral) or scheme not in {1, 2}:
        raise ValueError(f"`scheme` must be 1 or 2, got {scheme!r}")
    return 1 if scheme == 1 else 2


def select_targets(
    model: nn.Module,
    layers: str | Sequence[str],
    *,
    rank: Rank = None,
    scheme: Scheme = 1,
    computed: bool = False,
) -> list[Target]:
    """Find the weight matrices of layers and the target rank of each.

    Args:
        model: The model.
        layers: See `select_weight_matrices`.
        rank: As for `check_rank`; a mapping must have exactly one rank per matrix.
        scheme: See `weight_to_matrix`.
        computed: See `select_weight_matrices`.

    Returns:
        The matrices whose sides exceed their target rank, in the model's order.

    Raises:
        ValueError: If there is none, or a mapping does not match the matrices.
    """
    weights = select_weight_matrices(model, layers, scheme=scheme, computed=computed)
    if rank is None:
        return [Target(weight, None) for weight in weights]
    if isinstance(rank, dict):
        _check_names(rank, [weight.label for weight in weights])
    targets = []
    for weight in weights:
        side = min(weight.shape[-2:])
        if isinstance(rank, dict):
            wanted = rank[weight.label]
        else:
            wanted = rank if isinstance(rank, int) else max(1, round(rank * side))
        if wanted < side:
            targets.append(Target(weight, wanted))
    if not targets:
        raise ValueError(
            f"`rank` must be below the smaller side of at least one of {len(weights)} matrices, got {rank}"
        )
    return targets


def _check_names(rank: Mapping[str, int], labels: Sequence[str]) -> None:
    for name in rank:
        if name not in labels:
            near = "".join(f"; did you mean {label!r}?" for label in nearest(name, labels, limit=1))
            raise ValueError(f"`rank` must have the names of matrices that `layers` finds, got {name!r}{near}")
    missing = [label for label in labels if label not in rank]
    if missing:
        raise ValueError(f"`rank` must have a number for every matrix that `layers` finds, got none for {missing[:5]}")
