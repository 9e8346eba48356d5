"""Which rank each weight matrix of a model is pressed to."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from torch import nn

from lightning_plugins._checks import check_finite_number, check_positive_int, nearest
from lightning_plugins.regularizers._weight_matrices import Scheme, WeightMatrix, select_weight_matrices

Rank = int | float | dict[str, int] | None


class Target(NamedTuple):
    """A weight matrix and the rank it is pressed to; None for the stable rank itself."""

    weight: WeightMatrix
    rank: int | None


def check_rank(rank: Rank) -> Rank:
    """Return ``rank`` if it is None, an int of at least 1, a float between 0 and 1, or a mapping to such ints.

    Raises:
        TypeError: If it is something else.
        ValueError: If a number is out of its range.
    """
    if rank is None or (isinstance(rank, int) and not isinstance(rank, bool)):
        return rank if rank is None else check_positive_int("rank", rank)
    if isinstance(rank, Mapping):
        for name, number in rank.items():
            check_positive_int(f"rank[{name!r}]", number)
        return dict(rank)
    if not 0 < check_finite_number("rank", rank) < 1:
        hint = f"; did you mean {int(rank)}?" if rank >= 1 and float(rank).is_integer() else ""
        raise ValueError(f"`rank` must be a number of at least 1 or a fraction between 0 and 1, got {rank!r}{hint}")
    return rank


def check_scheme(scheme: Scheme) -> Scheme:
    """Return ``scheme`` if it is 1 or 2.

    Raises:
        ValueError: If it is not.
    """
    if isinstance(scheme, bool) or scheme not in {1, 2}:
        raise ValueError(f"`scheme` must be 1 or 2, got {scheme!r}")
    return scheme


def select_targets(
    model: nn.Module,
    layers: str | Sequence[str],
    *,
    rank: Rank = None,
    scheme: Scheme = 1,
    computed: bool = False,
) -> list[Target]:
    """Find the weight matrices of layers and the rank that each is pressed to.

    Args:
        model: The model.
        layers: See `select_weight_matrices`.
        rank: As `check_rank` takes it; a mapping has a rank for each matrix and no others.
        scheme: See `weight_to_matrix`.
        computed: See `select_weight_matrices`.

    Returns:
        The matrices that are larger than their rank, in the model's order.

    Raises:
        ValueError: If there is none, or a mapping does not fit the matrices.
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
