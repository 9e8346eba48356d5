"""A callback's entry in a checkpoint: under an older name, of an older version, or missing."""

from collections.abc import Callable
from typing import Any

from lightning_plugins._lightning import Callback, MisconfigurationException, rank_zero_warn


def adopt_older_entry(callback: Callback, layers: Any, checkpoint: dict[str, Any]) -> None:
    """Give an entry its present name where the checkpoint has one of the callback's class and layers under another.

    Names held all arguments once, so that a training resumed with another learning rate was taken for a new one.

    Args:
        callback: The callback.
        layers: Its layers.
        checkpoint: The checkpoint, changed.
    """
    entries: dict[str, Any] = checkpoint.get("callbacks") or {}
    name, told = f"{type(callback).__qualname__}{{", f"'layers': {layers!r}"
    own = [key for key in entries if key.startswith(name) and told in key]
    if callback.state_key not in entries and len(own) == 1:
        entries[callback.state_key] = entries.pop(own[0])


def entry_of(name: str, state: dict[str, Any]) -> Callable[[str], Any]:
    """Return what reads a state by key.

    Args:
        name: Of the callback.
        state: Its state from a checkpoint.

    Returns:
        A function of a key, which raises `MisconfigurationException` where there is none.
    """

    def entry(key: str) -> Any:
        if key not in state:
            raise MisconfigurationException(
                f"{name}: its state in the checkpoint has no {key!r}, so it was written by another version of "
                "lightning-plugins; resume with that version, or load the weights alone (`restore_structure` and "
                "`load_state_dict`) and begin a new training"
            )
        return state[key]

    return entry


def warn_of_lost_state(name: str) -> None:
    """Say why a network is not compressed again.

    Args:
        name: Of the callback.
    """
    rank_zero_warn(
        f"{name}: the checkpoint holds an already compressed network, and no state of a {name} with these `layers`; "
        "it is not compressed further. To do so, load its weights first and call `fit` without `ckpt_path`"
    )
