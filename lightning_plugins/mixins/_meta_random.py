"""State of the random generators in checkpoints, so that random draws continue after resuming."""

import random
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from lightning_plugins._lightning import LightningModule
from lightning_plugins.distributed import is_distributed, world_size

_KEY = "meta_random_states"


class RandomStates:
    """Saves the generators of every rank, and restores those of this rank once when resuming.

    Lightning does not save them. Loaders are set up between the start of training and its first batch, and may use the
    same generators: states saved between two epochs are restored before that, states saved within an epoch after it.
    """

    def __init__(self) -> None:
        self._waiting: dict[str, Any] | None = None

    def save(self, module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add the states to a checkpoint; a collective call, as saving one is."""
        if module._trainer is None:
            return
        own = _states(module.device)
        states: list[Any] = [own]
        if is_distributed():
            states = [None] * world_size()
            dist.all_gather_object(states, own)
        checkpoint[_KEY] = states

    def load(self, module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keep this rank's states from a checkpoint if training resumes from it with the same number of ranks."""
        states = checkpoint.get(_KEY)
        if module._trainer is None or not states or len(states) != world_size():
            return
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        within = progress["current"]["ready"] > 0 and not progress["is_last_batch"]
        self._waiting = {**states[module.global_rank], "within": within}

    def restore(self, module: LightningModule, *, between_epochs: bool) -> None:
        """Restore the generators at the point that matches the saved state."""
        if self._waiting is not None and self._waiting["within"] is not between_epochs:
            states, self._waiting = self._waiting, None
            _set(states, module.device)


def _states(device: torch.device) -> dict[str, Any]:
    kind, keys, *rest = np.random.get_state()  # noqa: NPY002 - the generator that transforms draw from
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        "numpy": [str(kind), torch.from_numpy(np.array(keys, dtype=np.int64)), *map(float, rest)],
        "python": list(random.getstate()),
    }


def _set(states: dict[str, Any], device: torch.device) -> None:
    torch.set_rng_state(states["torch"].cpu())
    if states["cuda"] is not None and device.type == "cuda":
        torch.cuda.set_rng_state(states["cuda"].cpu(), device)
    kind, keys, position, has_gauss, gauss = states["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), int(position), int(has_gauss), gauss))  # noqa: NPY002
    version, internal, following = states["python"]
    random.setstate((version, tuple(internal), following))
