"""Requirements of callbacks on module and Trainer, checked in ``setup``, and on all processes together."""

import re
import zlib
from collections.abc import Sequence

import torch.distributed as dist

from lightning_plugins._lightning import (
    PACKAGE,
    Callback,
    DDPStrategy,
    DeepSpeedStrategy,
    LightningModule,
    MisconfigurationException,
    ModelParallelStrategy,
    SingleDeviceStrategy,
    Trainer,
    advice,
    is_overridden,
    other_package,
)
from lightning_plugins.distributed import gather_integers
from lightning_plugins.schedules import Schedule


def require_lightning_module(name: str, pl_module: object) -> None:
    """Raise an error for a module of another package than the one this process uses.

    Raises:
        MisconfigurationException: For example for a module that subclasses `pytorch_lightning.LightningModule` where
            `lightning.pytorch` is used.
    """
    if not isinstance(pl_module, LightningModule):
        origin = other_package(type(pl_module))
        raise MisconfigurationException(
            f"{name} works with modules of `{PACKAGE}`, got {type(pl_module).__name__}"
            + (f" whose LightningModule comes from `{origin}`" if origin else "")
            + f"; {advice()}"
        )


def require_same_on_ranks(name: str, labels: Sequence[str], arguments: str) -> None:
    """Raise an error, on all ranks, for layers and arguments that differ between ranks; a collective call.

    Tensors of other layers would be taken for each other's. Other numbers, such as a weight of the term, would give an
    average that nobody asked for, or ranks whose parameters drift apart.

    Args:
        name: The callback's.
        labels: The layers in their order, where they are known by now.
        arguments: The others in words, such as the callback's state key. Addresses of objects do not count.

    Raises:
        MisconfigurationException: Naming this rank's layers or arguments, and the ranks that have others.
    """
    words = "\n".join(labels), re.sub(r" at 0x[0-9a-f]+", "", arguments)
    found = gather_integers([zlib.crc32(text.encode()) for text in words])
    rules = (
        ("`layers` must choose the same layers in the same order", ", ".join(labels[:8])),
        ("arguments must be the same", arguments),
    )
    for index, (rule, own) in enumerate(rules):
        others = [str(rank) for rank, sums in enumerate(found) if sums[index] != zlib.crc32(words[index].encode())]
        if others:
            raise MisconfigurationException(
                f"{name}: {rule} on every rank, got {own} on rank {dist.get_rank()} and others on rank "
                f"{', '.join(others)}"
            )


def agreed_widths(labels: Sequence[str], widths: Sequence[int]) -> list[int]:
    """Learn how many features layers have of which only other ranks have seen rows; all ranks must ask together.

    Args:
        labels: All layers, the same on every rank.
        widths: How many features this rank has seen of each, 0 for a layer without rows.

    Returns:
        The number of each layer, 0 where no rank has seen rows.

    Raises:
        ValueError: If ranks have seen different numbers; raised on all ranks.
    """
    found = gather_integers(widths)
    agreed = [max(column) for column in zip(*found, strict=True)]
    for place, label in enumerate(labels):
        if {row[place] for row in found} - {0, agreed[place]}:
            seen = ", ".join(f"{row[place]} on rank {rank}" for rank, row in enumerate(found))
            raise ValueError(f"`layers`: {label!r} must have as many features on every rank, got {seen}")
    return agreed


def require_supported_strategy(name: str, trainer: Trainer) -> None:
    """Raise an error for strategies with which terms of activations have not been verified.

    Raises:
        MisconfigurationException: For any but single-device, DDP and data-parallel FSDP2 training.
    """
    strategy = trainer.strategy
    if isinstance(strategy, ModelParallelStrategy):
        parallel = strategy.device_mesh["tensor_parallel"].size()
        if parallel > 1:
            raise MisconfigurationException(
                f"{name} supports ModelParallelStrategy for data parallelism (FSDP2) only, got "
                f"`tensor_parallel_size={parallel}`; pass `tensor_parallel_size=1`"
            )
    elif isinstance(strategy, DeepSpeedStrategy) or not isinstance(strategy, SingleDeviceStrategy | DDPStrategy):
        raise MisconfigurationException(
            f"{name} supports a single device, DDP and FSDP2, got {type(strategy).__name__}; pass `strategy='ddp'`, "
            "or ModelParallelStrategy with `fully_shard` in `configure_model`"
        )


def require_supported(callback: Callback, trainer: Trainer, pl_module: object, further: str = "") -> None:
    """Check module and strategy, and arguments that must agree between ranks; for ``setup``.

    Args:
        callback: The callback, whose state key tells its arguments.
        trainer: The Trainer.
        pl_module: The module.
        further: Arguments that are not in the state key and have to be the same on all ranks, in words.

    Raises:
        MisconfigurationException: As `require_lightning_module`, `require_supported_strategy` and
            `require_same_on_ranks` do.
    """
    name = type(callback).__name__
    require_lightning_module(name, pl_module)
    require_supported_strategy(name, trainer)
    require_same_on_ranks(name, (), f"{callback.state_key} {further}".strip())


def require_automatic_optimization(name: str, pl_module: LightningModule, mixin: str) -> None:
    """Raise an error for manual optimization, where ``training_step`` returns no loss.

    Raises:
        MisconfigurationException: Naming the mixin that is the way to go there.
    """
    if not pl_module.automatic_optimization:
        raise MisconfigurationException(
            f"{name} adds its term to the loss that `training_step` returns, and {type(pl_module).__name__} uses "
            f"manual optimization; subclass `lightning_plugins.mixins.{mixin}` and add its penalty in your step"
        )


def require_known_total(name: str, schedule: Schedule | None, trainer: Trainer) -> None:
    """Raise an error for schedules in fractions of training without a known end.

    Raises:
        MisconfigurationException: If ``schedule`` needs a total and the Trainer has none.
    """
    if schedule is not None and schedule.needs_total and trainer.max_epochs == -1 and trainer.max_steps == -1:
        raise MisconfigurationException(
            f"{name}: `schedule={schedule!r}` counts in fractions of training, but `max_epochs=-1` has no end; "
            "pass `unit='steps'` or `unit='epochs'`, or give the Trainer `max_steps` or `max_epochs`"
        )


def makes_layers_late(pl_module: LightningModule) -> bool:
    """Tell whether the module may have layers that are not there yet when callbacks are set up.

    Returns:
        Whether it has a ``setup`` or ``configure_model`` of its own. Lightning calls both between the callbacks'
        ``setup`` and ``on_fit_start``.
    """
    return is_overridden("setup", pl_module) or is_overridden("configure_model", pl_module)
