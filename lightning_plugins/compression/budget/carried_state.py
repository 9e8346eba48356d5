"""Carry an optimizer's state of a weight over to the parameters that replace it."""

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from lightning_plugins.compression.low_rank.decomposition import InputMoments
from lightning_plugins.compression.low_rank.factorize import factorize
from lightning_plugins.compression.low_rank.splittable import select_layers
from lightning_plugins.compression.low_rank.transposed import is_transposed
from lightning_plugins.compression.networks.replacements import Heir, Heirs
from lightning_plugins.weights import Scheme, matrix_to_weight, weight_to_matrix


def split_layers(
    model: nn.Module, ranks: Mapping[str, int], *, scheme: Scheme, calibration: InputMoments | None = None
) -> Heirs:
    """Factorise layers of a model that is being trained, in place.

    Args:
        model: The model.
        ranks: Ranks by layer name; a layer that would not become smaller stays as it is.
        scheme: How a kernel is unfolded.
        calibration: As for `factorize`.

    Returns:
        The heirs of the parameters of the layers that were taken out.
    """
    chosen = {id(layer) for layer in select_layers(model, list(ranks), scheme=scheme, transposed=True).values()}
    places = [(name, m) for name, m in model.named_modules(remove_duplicate=False) if id(m) in chosen]
    factorize(model, ranks, scheme=scheme, calibration=calibration)
    heirs: dict[nn.Parameter, Sequence[Heir]] = {}
    for name, dense in places:
        factors = model.get_submodule(name)
        if isinstance(factors, nn.Sequential):
            heirs.update(low_rank_heirs(dense, factors, scheme=scheme))
    return heirs


def low_rank_heirs(dense: nn.Module, factors: nn.Sequential, *, scheme: Scheme) -> Heirs:
    """The heirs of a linear layer's or convolution's parameters where two layers take its place.

    With ``W = B A`` the gradients of the factors are ``B.T G`` and ``G A.T``, and so are the averages of gradients
    while the factors stand still. Averages of squares are those of independent entries: ``(B * B).T V`` and
    ``V (A * A).T``.

    Args:
        dense: The layer that was taken out.
        factors: The two layers, the one with ``A`` first.
        scheme: How the kernel was unfolded.

    Returns:
        The heirs of the weight and of the bias.
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

    heirs = {dense.get_parameter("weight"): [Heir(first, for_first), Heir(second, for_second)]}
    for name, bias in factors[1].named_parameters():
        if name == "bias" and bias is not dense.get_parameter("bias"):
            heirs[dense.get_parameter("bias")] = [Heir(bias, lambda state, squared: state, entrywise=True)]
    return heirs


def sliced_heir(parameter: nn.Parameter, kept: Mapping[int, Tensor]) -> Heir:
    """The heir of a parameter of which only some rows, columns or channels were kept.

    Args:
        parameter: The new, smaller parameter.
        kept: For each dimension that was cut the indices that are left, in the new order.

    Returns:
        The heir.
    """

    def carry(state: Tensor, squared: bool) -> Tensor:
        for dimension, index in kept.items():
            state = state.index_select(dimension, index.to(state.device))
        return state

    return Heir(parameter, carry, entrywise=True)


def chained(first: Heirs, then: Heirs) -> Heirs:
    """The heirs after two changes of which the second may remove what the first has made.

    Args:
        first: The heirs after the first change.
        then: Those after the second.

    Returns:
        The heirs after both.
    """
    made = {heir.parameter for heirs in first.values() for heir in heirs}
    found = {old: heirs for old, heirs in then.items() if old not in made}
    for old, heirs in first.items():
        found[old] = [after for heir in heirs for after in _after(heir, then)]
    return found


def _after(heir: Heir, then: Heirs) -> list[Heir]:
    def through(last: Heir) -> Heir:
        return Heir(
            last.parameter,
            lambda state, squared: last.carry(heir.carry(state, squared), squared),
            entrywise=last.entrywise and heir.entrywise,
        )

    return [through(last) for last in then[heir.parameter]] if heir.parameter in then else [heir]


def _power(matrix: Tensor, squared: bool) -> Tensor:
    return matrix.square() if squared else matrix
