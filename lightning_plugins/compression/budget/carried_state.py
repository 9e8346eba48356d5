"""Remove what was not chosen, and carry an optimizer's state of a weight over to the parameters that replace it."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from lightning_plugins.compression.budget.budget import Projection
from lightning_plugins.compression.channels.group import ChannelGroup
from lightning_plugins.compression.channels.shrink import shrink
from lightning_plugins.compression.low_rank.decomposition import InputMoments
from lightning_plugins.compression.low_rank.factorize import factorize
from lightning_plugins.compression.low_rank.splittable import select_layers
from lightning_plugins.compression.low_rank.transposed import is_transposed
from lightning_plugins.compression.networks.replacements import Replacement, Replacements
from lightning_plugins.weights import Scheme, matrix_to_weight, weight_to_matrix


def remove_chosen(model: nn.Module, groups: list[ChannelGroup], choice: Projection) -> Replacements:
    """Remove closed units and blocks, and singular values, from a baked model.

    Args:
        model: The model, changed in place.
        groups: Its groups of channels and blocks.
        choice: What stays.

    Returns:
        The replacements of each removed parameter; none for those of a block.
    """
    before = dict(model.named_parameters(remove_duplicate=False))
    cut: dict[nn.Parameter, Any] = {}
    slices = shrink(model, groups, choice.kept) if groups else {}
    for name, cuts in slices.items():
        if name in before:  # and is no buffer
            cut[before[name]] = [sliced_replacement(model.get_parameter(name), dict(cuts))]
    left = {id(parameter) for parameter in model.parameters()}
    gone = closed_blocks(groups, choice)
    for name, parameter in before.items():
        if name.startswith(gone) and id(parameter) not in left:
            cut.setdefault(parameter, [])
    ranks = {name: rank for name, rank in choice.ranks.items() if not name.startswith(gone)}
    return chained(cut, split_layers(model, ranks, scheme=1) if ranks else {})


def closed_blocks(groups: Iterable[ChannelGroup], choice: Projection) -> tuple[str, ...]:
    """The prefixes of the names of all that stands in blocks that do not stay.

    Args:
        groups: Groups of channels and blocks.
        choice: What stays.

    Returns:
        Names that end in a dot.
    """
    pairs = zip(groups, choice.kept, strict=True)
    return tuple(f"{group.block}." for group, keep in pairs if group.block and not keep.any())


def split_layers(
    model: nn.Module, ranks: Mapping[str, int], *, scheme: Scheme, calibration: InputMoments | None = None
) -> Replacements:
    """Factorise layers of a model that is being trained, in place.

    Args:
        model: The model.
        ranks: Ranks by layer name; a layer that would not become smaller stays as it is.
        scheme: How a kernel is unfolded.
        calibration: As for `factorize`.

    Returns:
        The replacements of the parameters of the layers that were removed.
    """
    chosen = {id(layer) for layer in select_layers(model, list(ranks), scheme=scheme, transposed=True).values()}
    places = [(name, m) for name, m in model.named_modules(remove_duplicate=False) if id(m) in chosen]
    factorize(model, ranks, scheme=scheme, calibration=calibration)
    replacements: dict[nn.Parameter, Sequence[Replacement]] = {}
    for name, dense in places:
        factors = model.get_submodule(name)
        if isinstance(factors, nn.Sequential):
            replacements.update(low_rank_replacements(dense, factors, scheme=scheme))
    return replacements


def low_rank_replacements(dense: nn.Module, factors: nn.Sequential, *, scheme: Scheme) -> Replacements:
    """Return the replacements of a linear layer's or convolution's parameters when it is factorised.

    With ``W = B A`` the gradients of the factors are ``B.T G`` and ``G A.T``, and so are the averages of gradients
    while the factors stand still. Averages of squares are those of independent entries: ``(B * B).T V`` and
    ``V (A * A).T``.

    Args:
        dense: The layer that was taken out.
        factors: The two layers, the one with ``A`` first.
        scheme: How the kernel was unfolded.

    Returns:
        The replacements of the weight and of the bias.
    """
    first, second = (factors.get_parameter(f"{number}.weight") for number in (0, 1))

    def unfold(weight: Tensor) -> Tensor:
        return weight_to_matrix(weight, scheme=scheme)

    def of_dense(state: Tensor) -> Tensor:
        return state.T if is_transposed(dense) else unfold(state)

    def for_first(state: Tensor, squared: bool) -> Tensor:
        other = unfold(second.detach()).to(state.dtype)
        return matrix_to_weight(_power(other, squared).mT @ of_dense(state), first.shape, scheme=scheme)

    def for_second(state: Tensor, squared: bool) -> Tensor:
        other = unfold(first.detach()).to(state.dtype)
        return matrix_to_weight(of_dense(state) @ _power(other, squared).mT, second.shape, scheme=scheme)

    replacements = {dense.get_parameter("weight"): [Replacement(first, for_first), Replacement(second, for_second)]}
    for name, bias in factors[1].named_parameters():
        if name == "bias" and bias is not dense.get_parameter("bias"):
            replacements[dense.get_parameter("bias")] = [
                Replacement(bias, lambda state, squared: state, entrywise=True)
            ]
    return replacements


def sliced_replacement(parameter: nn.Parameter, kept: Mapping[int, Tensor]) -> Replacement:
    """Return the replacement of a parameter of which only some rows, columns or channels were kept.

    Args:
        parameter: The new, smaller parameter.
        kept: For each sliced dimension the kept indices, in the new order.

    Returns:
        The replacement.
    """

    def carry(state: Tensor, squared: bool) -> Tensor:
        for dimension, index in kept.items():
            state = state.index_select(dimension, index.to(state.device))
        return state

    return Replacement(parameter, carry, entrywise=True)


def chained(first: Replacements, then: Replacements) -> Replacements:
    """Combine the replacements of two changes of which the second may remove parameters that the first made.

    Args:
        first: The replacements after the first change.
        then: Those after the second.

    Returns:
        The replacements after both.
    """
    made = {replacement.parameter for replacements in first.values() for replacement in replacements}
    found = {old: replacements for old, replacements in then.items() if old not in made}
    for old, replacements in first.items():
        found[old] = [after for replacement in replacements for after in _after(replacement, then)]
    return found


def _after(replacement: Replacement, then: Replacements) -> list[Replacement]:
    def through(last: Replacement) -> Replacement:
        return Replacement(
            last.parameter,
            lambda state, squared: last.carry(replacement.carry(state, squared), squared),
            entrywise=last.entrywise and replacement.entrywise,
        )

    return [through(last) for last in then[replacement.parameter]] if replacement.parameter in then else [replacement]


def _power(matrix: Tensor, squared: bool) -> Tensor:
    return matrix.square() if squared else matrix
