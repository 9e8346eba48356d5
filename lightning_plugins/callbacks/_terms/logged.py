"""Log what callbacks and mixins measure: names that do not collide, penalties that add up over all that log them."""

from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor

from lightning_plugins._lightning import LightningModule, Trainer, is_param_in_hook_signature
from lightning_plugins.callbacks._trainer.logged import on_device

_owners: WeakKeyDictionary[Any, dict[str, int]] = WeakKeyDictionary()  # by module, the names that are taken
_sums: WeakKeyDictionary[Any, dict[str, tuple[Any, Any, int]]] = WeakKeyDictionary()  # by module and name


def log_value(pl_module: LightningModule, name: str, value: Any, **arguments: Any) -> None:
    """Log as `LightningModule.log` does, also where the step fetches its batches itself.

    Lightning then cannot infer the batch size and asks for it; the values logged here are not means over samples.
    """
    training = pl_module.trainer.training
    if training and is_param_in_hook_signature(pl_module.training_step, "dataloader_iter", explicit=True):
        arguments["batch_size"] = 1
    pl_module.log(name, on_device(value, pl_module), **arguments)


def log_equal(pl_module: LightningModule, name: str, value: Any) -> None:
    """Log a value that is the same on all processes; the largest of equal numbers is exactly that number."""
    log_value(pl_module, name, value, sync_dist=True, reduce_fx="max")


def log_sum(pl_module: LightningModule, name: str, value: Tensor) -> None:
    """Log the sum of all values that were handed over under this name in the current batch."""
    log_value(pl_module, name, _total(pl_module, name, value)[0])


def log_mean(pl_module: LightningModule, name: str, value: Tensor) -> None:
    """Log the mean of all values that were handed over under this name in the current batch."""
    total, count = _total(pl_module, name, value)
    log_value(pl_module, name, total / count)


def claim_names(pl_module: LightningModule, owner: object, names: Sequence[tuple[str, str]]) -> list[str]:
    """Take names to log under, so that no two callbacks log different things under one.

    Args:
        pl_module: The module.
        owner: The callback; what it holds itself it may take again.
        names: For each thing the name that is wanted, and the one to go by where another callback has that.

    Returns:
        The names: those wanted if they are free, else the other ones, with a number behind them if these are taken too.
    """
    taken = _owners.setdefault(pl_module, {})
    claimed: list[str] = []
    for wanted, other in names:
        candidates = [wanted, other, *(f"{other}.{i}" for i in range(2, len(taken) + 3))]
        name = next(c for c in candidates if taken.get(c, id(owner)) == id(owner) and c not in claimed)
        taken[name] = id(owner)
        claimed.append(name)
    return claimed


def release_names(pl_module: LightningModule, owner: object) -> None:
    """Give back the names of a callback."""
    taken = _owners.get(pl_module, {})
    for name in [name for name, holder in taken.items() if holder == id(owner)]:
        del taken[name]


def _total(pl_module: LightningModule, name: str, value: Tensor) -> tuple[Any, int]:
    sums = _sums.setdefault(pl_module, {})
    batch, value = _batch(pl_module.trainer), value.detach()
    known, total, count = sums.get(name, (None, 0, 0))
    sums[name] = (batch, total + value, count + 1) if known == batch else (batch, value, 1)
    return sums[name][1:]


def _batch(trainer: Trainer) -> tuple[Any, ...]:
    """Return a value that tells one batch from another."""
    if trainer.training:
        loop: Any = trainer.fit_loop.epoch_loop
    else:
        loop = trainer.validate_loop if trainer.state.fn == "validate" else trainer.test_loop
        loop = trainer.fit_loop.epoch_loop.val_loop if trainer.state.fn == "fit" else loop
    return trainer.state.stage, loop.batch_progress.total.ready
