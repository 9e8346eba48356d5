"""Dependence of a map on the learned weights: layers are randomised one after the other."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn

from lightning_plugins._checks import check_bool, check_callable, check_choice, check_instance, check_non_negative_int
from lightning_plugins.functional.attribution._ordering import spearman
from lightning_plugins.functional.attribution.positions import checked_maps
from lightning_plugins.functional.attribution.scoring import check_inputs, checked_target


def parameter_randomization(
    model: nn.Module,
    explain: Callable[[Tensor, Tensor], Tensor],
    inputs: Tensor,
    target: Tensor,
    *,
    order: Literal["cascade", "independent"] = "cascade",
    absolute: bool = False,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Compare maps of a model with those after randomising the parameters of layers.

    Each parameter of a layer is replaced by normal numbers with the same mean and standard deviation. A method whose
    maps do not change (a rank correlation near 1) explains the inputs, not the model. The weights are restored
    afterwards, even after an error.

    Args:
        model: The network that ``explain`` explains, in evaluation mode.
        explain: Maps inputs and their classes to attributions ``(B, ...)``.
        inputs: Shape ``(B, ...)``.
        target: Class of each sample, integers of shape ``(B,)``.
        order: ``"cascade"`` randomises the layers cumulatively from the last to the first, ``"independent"`` one at a
            time.
        absolute: Whether absolute values of the maps are compared.
        seed: Seed of the random parameters.

    Returns:
        For each layer with its own parameters, by name and in order of randomisation, Spearman's correlation of the two
        maps of each sample, shape ``(B,)``; NaN if one of them is constant.

    Raises:
        TypeError: If ``model`` is not a module.
        ValueError: If it has no parameters, or ``order`` is not known.

    Example:
        >>> net = nn.Sequential(nn.Linear(6, 2))
        >>> same = parameter_randomization(net, lambda x, target: x, torch.randn(2, 6), torch.tensor([0, 1]))
        >>> same["0"]  # a map that does not ask the model
        tensor([1., 1.])

    Source:
        Adebayo et al., NeurIPS 2018, https://arxiv.org/abs/1810.03292.
    """
    check_choice("order", order, ("cascade", "independent"))
    seed = check_non_negative_int("seed", seed)
    check_bool("absolute", absolute)
    check_instance("model", model, nn.Module, "a module")
    check_callable("explain", explain, "a function from inputs and classes to maps")
    check_inputs(inputs)
    checked_target(target, len(inputs))
    layers = [(name, layer) for name, layer in model.named_modules() if any(True for _ in layer.parameters(False))]
    if not layers:
        raise ValueError(f"`model` must have parameters to make random, got {type(model).__name__} without any")

    def maps() -> Tensor:
        found = checked_maps(explain(inputs, target), "explain").flatten(1)
        return found.abs() if absolute else found

    original, generator, similar = maps(), torch.Generator().manual_seed(seed), {}
    with _restored(model):
        for name, layer in reversed(layers):
            kept = [(parameter, parameter.detach().clone()) for parameter in layer.parameters(False)]
            for parameter, value in kept:
                parameter.data.copy_(_random_like(value, generator))
            similar[name] = spearman(original, maps())
            if order == "independent":
                for parameter, value in kept:
                    parameter.data.copy_(value)
    return similar


def _random_like(value: Tensor, generator: torch.Generator) -> Tensor:
    """Drawn on the CPU, so that devices agree; constant parameters, such as initial biases, get a little noise."""
    spread = value.float().std(correction=0).cpu()
    scale = torch.where(spread > 0, spread, 0.01)
    return torch.randn(value.shape, generator=generator, dtype=torch.float32) * scale + value.float().mean().cpu()


@contextmanager
def _restored(model: nn.Module) -> Iterator[None]:
    kept = [(parameter, parameter.detach().clone()) for parameter in model.parameters()]
    try:
        yield
    finally:
        for parameter, value in kept:
            parameter.data.copy_(value)
