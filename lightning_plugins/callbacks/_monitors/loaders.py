"""The stages of a monitor out of training: one for each loader of a validation or test."""

from lightning_plugins._lightning import Trainer, TrainerFn

_SHOWN = {"train": "training", "val": "validation", "test": "testing"}


def loader_stages(trainer: Trainer) -> list[str]:
    """Name the stage of each loader of the validation or test under way.

    Returns:
        ``val`` (or ``test``), or ``val_0``, ``val_1`` and so on where there are several loaders.
    """
    testing = trainer.state.fn == TrainerFn.TESTING
    name, number = ("test", trainer.num_test_batches) if testing else ("val", trainer.num_val_batches)
    return [name] if len(number) < 2 else [f"{name}_{index}" for index in range(len(number))]


def shown_stage(stage: str) -> str:
    """A stage for the title of a figure, as in ``validation 1``."""
    name, _, index = stage.partition("_")
    return f"{_SHOWN[name]} {index}".strip()
