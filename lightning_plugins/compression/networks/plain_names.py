"""Names in the state dict of a module while parametrizations are on it: those it has without them."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn
from torch.nn.utils.parametrize import is_parametrized


def computed_names(model: nn.Module) -> dict[str, str]:
    """Names of parameters computed by parametrizations, with those of their originals.

    Args:
        model: The model.

    Returns:
        Names as `named_parameters` has them.
    """
    found = {}
    for name, module in model.named_modules():
        if is_parametrized(module):
            dot = f"{name}." if name else ""
            attributes: Any = module.parametrizations
            for attribute in attributes:
                found[f"{dot}{attribute}"] = f"{dot}parametrizations.{attribute}.original"
    return found


def plain_names(
    renamed: Mapping[str, str], parts: Mapping[str, nn.Module | None]
) -> tuple[Callable[..., None], Callable[..., None]]:
    """Hooks with which a model's state dict has the names of the dense model, and is loaded by them.

    Args:
        renamed: Names of the dense model's parameters, with those they have now.
        parts: Modules that the dense model does not have, by name.

    Returns:
        The hook that runs after ``state_dict``, and the one that runs before ``load_state_dict``.
    """

    def save(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
        for plain, own in renamed.items():
            state[prefix + plain] = state.pop(prefix + own)
        for key in [key for key in state if key.startswith(tuple(f"{prefix}{part}." for part in parts))]:
            del state[key]

    def load(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
        for plain, own in renamed.items():
            if prefix + plain in state:
                state[prefix + own] = state.pop(prefix + plain)
        for name, part in parts.items():
            for key, value in ({} if part is None else part.state_dict()).items():
                state.setdefault(f"{prefix}{name}.{key}", value)  # keep the selection

    return save, load
