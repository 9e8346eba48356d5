"""The structure of a checkpoint, given to a module before its weights are loaded."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from lightning_plugins.callbacks._surgery.averages import renew_averages, shapes_of
from lightning_plugins.compression.structure.restore_structure import restore_structure


class StructureHook:
    """Run before a state dict is loaded: Lightning restores the module before callbacks know anything.

    Attributes:
        made_small: Whether a state dict of a smaller network has come since this was last set to False.
    """

    def __init__(self) -> None:
        self.made_small = False

    def __call__(self, module: Any, state_dict: dict[str, Tensor], prefix: str, *_: Any) -> None:
        """Give the module the structure of the state dict, unless masks and thresholds are on it."""
        if "channel_masks" in module._modules or "rank_thresholds" in module._modules:
            return
        own = {name.removeprefix(prefix): value for name, value in state_dict.items() if name.startswith(prefix)}
        before = shapes_of(module)
        restore_structure(module, own, strict=False)  # names that are missing or too many are for `load_state_dict`
        self.made_small = self.made_small or shapes_of(module) != before
        if module._trainer is not None:  # an average's part of the checkpoint is read next
            renew_averages(module._trainer, module)

    def note(self) -> None:
        """Remember that the structure of a smaller network has come in another way."""
        self.made_small = True

    def __reduce__(self) -> tuple[Callable[[], Callable[..., None]], tuple[()]]:
        """Copies and pickles of the module do not belong to the callback."""
        return _nothing, ()


def _pass(*_: Any) -> None:
    """Do nothing."""


def _nothing() -> Callable[..., None]:
    return _pass
