"""The weights that a callback works on, looked up when they are used: others may replace or reparametrise them."""

from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

from torch import nn

from lightning_plugins._lightning import LightningModule, rank_zero_info, rank_zero_warn
from lightning_plugins.selection import module_at, select_modules
from lightning_plugins.weights import WeightMatrix

Found = TypeVar("Found")


class WeightsInUse(Generic[Found]):
    """Weights found in a module; the search is repeated once their layers have been replaced.

    Args:
        name: The callback's name, for messages.
        layers: As for `select_modules`.
        find: Finds it, from the module and names of layers; raises ValueError where there is nothing.
        weight_of: The weight of each thing found.
    """

    def __init__(
        self,
        name: str,
        layers: Sequence[str],
        find: Callable[[nn.Module, Sequence[str]], list[Found]],
        weight_of: Callable[[Found], WeightMatrix],
    ) -> None:
        self._name, self._layers = name, tuple(layers)
        self._find, self._weight_of = find, weight_of
        self._found: list[Found] = []
        self._places: list[tuple[str, nn.Module]] = []

    def __bool__(self) -> bool:
        return bool(self._found)

    def find(self, pl_module: nn.Module) -> list[Found]:
        """Look for the weights.

        Returns:
            What was found.

        Raises:
            ValueError: If there is nothing.
        """
        self._keep(pl_module, self._find(pl_module, self._layers))
        return self._found

    def now(self, pl_module: nn.Module) -> list[Found]:
        """Return the weights in the layers that the module has now.

        For a layer that became a sequence, such as a factorised one, the layers in it are used. Where nothing is left,
        a warning says so once.

        Returns:
            What is there, possibly nothing.
        """
        if all(module_at(pl_module, name) is module for name, module in self._places):
            return self._found
        modules = dict(pl_module.named_modules())
        layers = [
            name if not isinstance(modules.get(name), nn.Sequential) else f"{name}.*"
            for name in self._layers
            if name in modules or any(sign in name for sign in "*?[")
        ]
        try:
            found = self._find(pl_module, layers)
        except (TypeError, ValueError) as error:  # such as a layer of rank one, which became two vectors
            found = []
            rank_zero_warn(f"{self._name}: no weight is left to work on, since layers were replaced: {error}")
        self._keep(pl_module, found)
        return found

    def forget(self) -> None:
        """Let go of the module."""
        self._found, self._places = [], []

    def tell(self, pl_module: LightningModule) -> None:
        """Say which weights were taken, and which were passed over though their layers match."""
        weights = [self._weight_of(each) for each in self._found]
        held = {id(parameter) for weight in weights for parameter in weight.sources}
        over = [
            f"{name} ({type(module).__name__})"
            for name, module in select_modules(pl_module, self._layers).items()
            if any(p.ndim > 1 and id(p) not in held for p in module.parameters(recurse=False) if _has_shape(p))
        ]
        taken = ", ".join(weight.label for weight in weights)
        rest = f"; passed over, though they match and have weights: {_few(over)}" if over else ""
        rank_zero_info(f"{self._name}: works on {len(weights)} weights ({_few(taken.split(', '))}){rest}")

    def _keep(self, pl_module: nn.Module, found: list[Found]) -> None:
        names = {id(module): name for name, module in pl_module.named_modules()}
        modules = {id(m): m for m in (self._weight_of(each).module for each in found)}
        self._found = found
        self._places = [(names[key], module) for key, module in modules.items() if key in names]


def _has_shape(parameter: nn.Parameter) -> bool:
    return not nn.parameter.is_lazy(parameter)


def _few(names: Sequence[str]) -> str:
    return ", ".join(names) if len(names) <= 12 else f"{', '.join(names[:10])}, … and {len(names) - 10} more"
