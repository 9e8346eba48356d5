"""Replace the layers of a model by their low-rank forms."""

from collections.abc import Mapping, Sequence
from typing import TypeVar

from torch import nn

from lightning_plugins._checks import check_bool, check_positive_int
from lightning_plugins.compression.low_rank.decomposition import InputMoments
from lightning_plugins.compression.low_rank.layers import full_rank, low_rank_layer, matrix_shape
from lightning_plugins.compression.low_rank.splittable import Layer, replace_modules, select_layers
from lightning_plugins.compression.networks.arguments import check_moments
from lightning_plugins.compression.networks.pretrained import warn_when_saved
from lightning_plugins.selection import select_modules
from lightning_plugins.weights import Scheme

Ranks = float | int | Mapping[str, int]
M = TypeVar("M", bound=nn.Module)


def factorize(
    model: M,
    ranks: Ranks,
    layers: str | Sequence[str] = "*",
    only_if_smaller: bool = True,
    *,
    scheme: Scheme = 1,
    calibration: InputMoments | None = None,
) -> M:
    """Replace layers by low-rank forms of themselves, in place: plain sequences of two layers.

    A layer keeps its name: ``net.fc`` becomes ``net.fc.0`` and ``net.fc.1``. A layer used at several places of the
    model is split once and replaced at all of them. Either all layers are replaced, or, if something is wrong with one,
    none.

    Globs skip layers that cannot be split: embeddings, grouped and transposed convolutions, subclasses with a forward
    pass of their own, lazy layers, weights that are computed (parametrizations, weight norm) or shared with another
    module, layers with hooks, layers that are low-rank pairs already, and layers whose weight other code reads (the
    projections of `nn.MultiheadAttention`). A layer that is named exactly and cannot be split is an error.

    Args:
        model: The model; a module that holds the layers, not a layer itself.
        ranks: A float in ``(0, 1]`` is a fraction of each layer's full rank, rounded to the nearest and at least 1; an
            int is the rank of every layer, or the full rank where that is less; a mapping gives layers their ranks by
            name, and leaves others as they are.
        layers: A dotted name, a glob over dotted names, or a sequence of them.
        only_if_smaller: Whether a layer stays as it is where its low-rank form would have no fewer weights.
        scheme: How a kernel becomes a matrix; see `low_rank_layer`.
        calibration: What the layers receive, such as a `Calibration` of this model: the error of each layer's output is
            minimised then, and not that of its weight.

    Returns:
        ``model``.

    Raises:
        TypeError: If ranks are of another kind.
        ValueError: If a rank is out of its range, no layer can be split, a layer that is named cannot be split, a
            weight is not finite, or ``calibration`` knows nothing of a layer.

    Example:
        >>> factorize(nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 1)), 0.25)
        Sequential(
          (0): Sequential(
            (0): Linear(in_features=8, out_features=2, bias=False)
            (1): Linear(in_features=2, out_features=6, bias=True)
          )
          (1): ReLU()
          (2): Linear(in_features=6, out_features=1, bias=True)
        )
    """
    check_bool("only_if_smaller", only_if_smaller)
    check_moments(calibration)
    replacements: dict[nn.Module, nn.Sequential] = {}
    for name, (layer, rank) in _chosen(model, ranks, layers, scheme).items():
        smaller = rank * sum(matrix_shape(layer, scheme=scheme)) < layer.weight.numel()
        if smaller or not only_if_smaller:
            moment = None if calibration is None else calibration.moment(name)
            try:
                replacements[layer] = low_rank_layer(layer, rank, scheme=scheme, moment=moment)
            except ValueError as error:
                raise ValueError(f"`layers`: {name!r} cannot be split: {error}") from error
    replace_modules(model, replacements)
    warn_when_saved(model)
    return model


def _chosen(
    model: nn.Module, ranks: Ranks, layers: str | Sequence[str], scheme: Scheme
) -> dict[str, tuple[Layer, int]]:
    """Layers and their ranks, by name."""
    if isinstance(ranks, Mapping):
        return _by_name(model, ranks, layers, scheme)
    if isinstance(ranks, bool) or not isinstance(ranks, int | float):
        raise TypeError(
            "`ranks` must be a fraction of the full rank, an int, or a mapping from layer names to ints, got "
            f"{ranks!r} ({type(ranks).__name__})"
        )
    if isinstance(ranks, int):
        check_positive_int("ranks", ranks)
    elif not 0 < ranks <= 1:  # written so that NaN fails too
        hint = f"; did you mean the int {int(ranks)}?" if ranks > 1 and ranks == int(ranks) else ""
        raise ValueError(f"`ranks` must be in (0, 1] as a fraction of the full rank, got {ranks!r}{hint}")
    chosen = {}
    for name, layer in select_layers(model, layers, scheme=scheme, transposed=True).items():
        full = full_rank(layer, scheme=scheme)
        rank = min(ranks, full) if isinstance(ranks, int) else max(1, int(ranks * full + 0.5))
        chosen[name] = (layer, rank)
    return chosen


def _by_name(
    model: nn.Module, ranks: Mapping[str, int], layers: str | Sequence[str], scheme: Scheme
) -> dict[str, tuple[Layer, int]]:
    _check_mapping(ranks)
    if not ranks:
        return {}
    found = {
        id(layer): (name, layer)
        for name, layer in select_layers(model, list(ranks), scheme=scheme, transposed=True).items()
    }
    allowed = (
        set(found)
        if layers == "*"
        else {id(at) for at in select_layers(model, layers, scheme=scheme, transposed=True).values()}
    )
    chosen: dict[str, tuple[Layer, int]] = {}
    for name, rank in ranks.items():
        ((_, module),) = select_modules(model, name).items()
        if id(module) not in allowed:
            raise ValueError(f"`ranks` names {name!r}, which `layers={layers!r}` does not match")
        clean, layer = found[id(module)]  # a shared layer under its first name
        full = full_rank(layer, scheme=scheme)
        if rank > full:
            raise ValueError(f"`ranks[{name!r}]` must be from 1 to {full}, the layer's full rank, got {rank}")
        if chosen.setdefault(clean, (layer, rank))[1] != rank:
            raise ValueError(
                f"`ranks` must give a shared layer one rank, got {chosen[clean][1]} and {rank} for {name!r}"
            )
    return chosen


def _check_mapping(ranks: Mapping[str, int]) -> None:
    for name, rank in ranks.items():
        if not isinstance(name, str):
            raise TypeError(f"`ranks` must map names of layers to ints, got the name {name!r} ({type(name).__name__})")
        if "*" in name:
            raise ValueError(f"`ranks` must name layers exactly, got the glob {name!r}; pass `layers={name!r}` instead")
        check_positive_int(f"ranks[{name!r}]", rank)
