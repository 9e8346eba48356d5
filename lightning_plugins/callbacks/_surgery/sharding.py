"""FSDP2 during a surgery: the network is whole in every process, and sharded again by the module's own method."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_plugins._lightning import LightningModule, MisconfigurationException, ModelParallelStrategy, Trainer
from lightning_plugins.callbacks._surgery.averages import averages_of, shapes_of
from lightning_plugins.callbacks._trainer.requirements import require_supported_strategy
from lightning_plugins.compression.networks.replacements import Replacement, Replacements
from lightning_plugins.compression.networks.sharded import (
    class_before_sharding,
    is_group,
    is_sharded,
    make_whole,
    whole_copy,
)
from lightning_plugins.compression.structure.restore_structure import restore_structure
from lightning_plugins.distributed import full_tensor

_METHOD = "configure_sharding"


def require_sharding(name: str, trainer: Trainer, pl_module: LightningModule) -> None:
    """Raise an error for a sharded network that could not be sharded again after a surgery; for ``setup``.

    Args:
        name: Of the callback that replaces parameters.
        trainer: The Trainer.
        pl_module: The module.

    Raises:
        MisconfigurationException: If the module has no method that shards it, or a weight average would be needed of
            sharded weights.
    """
    if not isinstance(trainer.strategy, ModelParallelStrategy):
        return
    _require_method(name, pl_module)
    require_supported_strategy(name, trainer)
    if averages_of(trainer):
        raise MisconfigurationException(
            f"{name}: Lightning's averages of weights do not work with ModelParallelStrategy; leave them out, or pass "
            "`strategy='ddp'`"
        )


def shard_again(pl_module: Any) -> dict[nn.Parameter, nn.Parameter]:
    """Shard a whole network by its own method; all processes call.

    Returns:
        The parameters of now by the whole ones.
    """
    before = dict(pl_module.named_parameters())
    for parameter in before.values():
        dist.broadcast(parameter.detach(), 0)
    pl_module.configure_sharding()
    after = dict(pl_module.named_parameters())
    return {parameter: after[name] for name, parameter in before.items()}


def change_whole(pl_module: LightningModule, change: Callable[[], Replacements]) -> Replacements:
    """Change a sharded network as a whole one; all processes call.

    Args:
        pl_module: The module.
        change: Swaps layers of the module in place, and returns the replacements of whole parameters.

    Returns:
        Replacements of all sharded parameters.
    """
    wholes = make_whole(pl_module)
    replacements = change()
    sharded = shard_again(pl_module)
    found: dict[nn.Parameter, list[Replacement]] = {}
    for old, whole in wholes.items():
        parts = replacements.get(whole, [Replacement(whole, _as_it_is, entrywise=True)])
        found[old] = [_Sharded(part, sharded[part.parameter]).replacement() for part in parts]
    return found


@dataclass(frozen=True)
class _Sharded:
    """A replacement of whole tensors, for sharded ones."""

    whole: Replacement
    parameter: nn.Parameter

    def replacement(self) -> Replacement:
        return Replacement(self.parameter, self.carry, self.whole.entrywise)

    def carry(self, state: Tensor, squares: bool) -> Tensor:
        from torch.distributed.tensor import distribute_tensor  # imported late: it takes a good part of a second

        carried = self.whole.carry(full_tensor(state), squares).contiguous()
        placed: Any = self.parameter
        if not hasattr(placed, "full_tensor"):
            return carried
        return distribute_tensor(carried, placed.device_mesh, placed.placements)


def _as_it_is(state: Tensor, squares: bool) -> Tensor:
    return state


def require_shards_inside(name: str, pl_module: LightningModule) -> None:
    """Raise an error for a module that is sharded itself, which cannot be replaced; once it is configured.

    Raises:
        MisconfigurationException: If ``fully_shard`` was applied to the module and not to modules in it.
    """
    if is_group(pl_module):
        raise MisconfigurationException(
            f"{name} replaces sharded modules, but not the LightningModule; call `fully_shard` in `{_METHOD}` on "
            f"modules of {class_before_sharding(pl_module).__name__}, not on itself"
        )


def whole_network(pl_module: LightningModule) -> LightningModule:
    """Return the module, or where FSDP2 shards it a whole copy to look at; all processes call."""
    whole: LightningModule = whole_copy(pl_module) if is_sharded(pl_module) else pl_module
    return whole


class SavedStructure:
    """Gives a sharded network the structure of a checkpoint right before Lightning reads it.

    Lightning reads a checkpoint of sharded parameters by the names and shapes of the present ones, through its
    strategy, before any callback is told of it.

    Args:
        name: Of the callback that replaces parameters.
        trainer: The Trainer.
        pl_module: The module.
        adopted: Called when the network has become another.
    """

    def __init__(self, name: str, trainer: Trainer, pl_module: LightningModule, adopted: Callable[[], None]) -> None:
        self._name, self._trainer, self._module, self._adopted = name, trainer, pl_module, adopted
        self._load = trainer.strategy.load_checkpoint
        vars(trainer.strategy)["load_checkpoint"] = self._load_checkpoint

    def remove(self) -> None:
        """Leave the strategy as it was."""
        vars(self._trainer.strategy).pop("load_checkpoint", None)

    def _load_checkpoint(self, checkpoint_path: Any, **options: Any) -> dict[str, Any]:  # none in Lightning 2.5
        path = Path(self._trainer.strategy.broadcast(checkpoint_path))
        if is_sharded(self._module) and path.exists():  # otherwise Lightning says so
            saved, present = _saved_shapes(path, options.get("weights_only")), shapes_of(self._module)
            if any(saved.get(name) != shape for name, shape in present.items()):
                self._adopt(saved)
        return self._load(checkpoint_path, **options)

    def _adopt(self, saved: dict[str, tuple[int, ...]]) -> None:
        _require_method(self._name, self._module)
        make_whole(self._module)
        tensors = {name: torch.empty(shape, device="meta") for name, shape in saved.items()}
        restore_structure(self._module, tensors, strict=False)  # names that are missing are for Lightning to report
        shard_again(self._module)
        if self._trainer.optimizers:
            self._trainer.strategy.setup_optimizers(self._trainer)
        self._adopted()


def _saved_shapes(path: Path, weights_only: bool | None) -> dict[str, tuple[int, ...]]:
    """The shapes in a distributed checkpoint, or in a file of whole weights, by name."""
    if path.is_file():
        weights = torch.load(path, mmap=True, map_location="cpu", weights_only=weights_only)["state_dict"]
        return {name: tuple(value.shape) for name, value in weights.items()}
    # Imported late: it takes a good part of a second.
    from torch.distributed.checkpoint.filesystem import FileSystemReader

    entries = FileSystemReader(path).read_metadata().state_dict_metadata
    prefix = "state_dict."
    return {
        name.removeprefix(prefix): tuple(entry.size)
        for name, entry in entries.items()
        if name.startswith(prefix) and hasattr(entry, "size")
    }


def _require_method(name: str, pl_module: LightningModule) -> None:
    if not callable(getattr(pl_module, _METHOD, None)):
        raise MisconfigurationException(
            f"{name} replaces layers, which have to be sharded again; move the calls of `fully_shard` from "
            f"`configure_model` of {type(pl_module).__name__} to a method `{_METHOD}(self)`, and call it there"
        )
