"""Requirements of the callbacks that compress under a budget on module and Trainer, checked in ``setup``."""

from lightning_plugins._lightning import Callback, LightningModule, MisconfigurationException, Trainer
from lightning_plugins.callbacks._compression.settings import CompressionSettings
from lightning_plugins.callbacks._surgery.swap import require_operable
from lightning_plugins.callbacks._trainer.phases import require_end
from lightning_plugins.callbacks._trainer.requirements import require_known_total, require_lightning_module


def require_compression(name: str, settings: CompressionSettings, trainer: Trainer, pl_module: LightningModule) -> None:
    """Raise an error for anything a compression under a budget does not support.

    Args:
        name: That of the callback.
        settings: Its settings.
        trainer: The Trainer.
        pl_module: The module.

    Raises:
        MisconfigurationException: For manual optimization, a module without example input, a training without end where
            fractions of it are asked for, and strategies and callbacks that hold references to parameters.
    """
    require_lightning_module(name, pl_module)
    require_operable(name, trainer)
    if not pl_module.automatic_optimization:
        raise MisconfigurationException(
            f"{name} takes a step of its own with every step of the optimizer, and {type(pl_module).__name__} uses "
            "manual optimization; subclass `lightning_plugins.mixins.CompressionMixin` and call its methods"
        )
    require_end(name, trainer, settings.phase.unit)
    require_known_total(name, settings.phase.schedule, trainer)
    if pl_module.example_input_array is None and (settings.masks or settings.cost == "flops"):
        why = "`cost='flops'` counts" if settings.cost == "flops" else "the search for channels follows"
        raise MisconfigurationException(
            f"{name}: {why} a forward pass of the module's `example_input_array`, and {type(pl_module).__name__} has "
            "none; set it in the module"
        )


def require_alone(callback: Callback, trainer: Trainer, kinds: tuple[type[Callback], ...]) -> None:
    """Raise an error for a second compression in the same training.

    Args:
        callback: The callback.
        trainer: The Trainer.
        kinds: Callbacks that compress.

    Raises:
        MisconfigurationException: If the Trainer has another one.
    """
    others: list[Callback] = vars(trainer)["callbacks"]
    for other in others:
        if other is not callback and isinstance(other, kinds):
            raise MisconfigurationException(
                f"{type(callback).__name__} and {type(other).__name__} would change the same weights in one training; "
                "use one of them, or one HybridCompression for channels and ranks under one budget"
            )
