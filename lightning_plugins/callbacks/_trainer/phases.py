"""Phases of training: positions in steps, epochs or fractions, and whether they have been reached."""

from dataclasses import dataclass
from itertools import pairwise

from lightning_plugins._checks import check_choice, plain_number
from lightning_plugins._lightning import MisconfigurationException, Trainer
from lightning_plugins.callbacks._trainer.progress import training_progress
from lightning_plugins.schedules import UNITS, Piecewise, Schedule, Unit, check_position


@dataclass(frozen=True, kw_only=True)
class Phase:
    """A part of training, and progress in it.

    Attributes:
        begin: When it begins, in ``unit``, at least 0; fractions are at most 1.
        end: When it ends, in ``unit``, after ``begin``.
        unit: ``"fraction"`` of training, ``"steps"`` of the optimizer, or ``"epochs"``.
        schedule: Progress in the phase, from 0 to 1, as a function of training progress
            (`lightning_plugins.schedules`); by default that of the callback, from ``begin`` to ``end``.

    Raises:
        ValueError: If a field is out of its range.
        TypeError: If a field is of the wrong type.

    Example:
        >>> Phase(end=0.5)
        Phase(begin=0.1, end=0.5, unit='fraction', schedule=None)
    """

    begin: float = 0.1
    end: float = 0.7
    unit: Unit = "fraction"
    schedule: Schedule | None = None

    def __post_init__(self) -> None:
        if self.schedule is not None and not isinstance(self.schedule, Schedule):
            raise TypeError(
                f"`schedule` must be a Schedule from 0 to 1 such as `Linear(0.0, 1.0, begin=0.1, until=0.7)`, or None, "
                f"got {self.schedule!r}"
            )
        check_phases(self.unit, begin=self.begin, end=self.end)
        if self.begin == self.end:
            raise ValueError(f"`end` must be after `begin`, or nothing is chosen, got {self.end!r} for both")
        for name in ("begin", "end"):
            object.__setattr__(self, name, plain_number(getattr(self, name)))


def check_phases(unit: Unit, **positions: float) -> None:
    """Check the positions of phases that follow each other.

    Args:
        unit: ``"steps"``, ``"epochs"`` or ``"fraction"``.
        **positions: The positions by the names of their arguments, in the order of the phases.

    Raises:
        TypeError: If a position is not a number.
        ValueError: If a position is out of its range, or before the one of an earlier phase.
    """
    check_choice("unit", unit, UNITS)
    for name, at in positions.items():
        check_position(name, at, unit)
    for earlier, later in pairwise(positions):
        if positions[earlier] > positions[later]:
            raise ValueError(
                f"`{later}` must not be before `{earlier}`, got {earlier}={positions[earlier]!r}, "
                f"{later}={positions[later]!r}"
            )


def require_end(name: str, trainer: Trainer, unit: Unit) -> None:
    """Raise an error for fractions of training without a known end; for ``setup``.

    Raises:
        MisconfigurationException: If there is none.
    """
    if unit == "fraction" and trainer.max_epochs == -1 and trainer.max_steps == -1:
        raise MisconfigurationException(
            f"{name}: `unit='fraction'` counts in fractions of training, but `max_epochs=-1` has no end; pass "
            "`unit='steps'` or `unit='epochs'`, or give the Trainer `max_steps` or `max_epochs`"
        )


def epochs_done(trainer: Trainer) -> int:
    """Epochs whose batches have all been trained on."""
    return int(vars(trainer.fit_loop.epoch_progress.current)["processed"])


def in_epoch(trainer: Trainer) -> bool:
    """Return whether, in ``on_train_epoch_start``, batches of the epoch have been trained on already.

    Lightning calls that hook in the middle of an epoch where a resumed training is resumed once more. The batch
    progress, which a checkpoint restores, tells; in a sound call it still is that of the complete epoch before.

    Returns:
        Whether they have.
    """
    progress = trainer.fit_loop.epoch_loop.batch_progress
    return progress.current.ready > 0 and not progress.is_last_batch


def is_last_epoch(trainer: Trainer) -> bool:
    """Return whether, in ``on_train_epoch_end``, no other epoch follows, as far as the limits of the Trainer tell."""
    steps_over = trainer.max_steps != -1 and trainer.global_step >= trainer.max_steps
    return steps_over or (trainer.max_epochs is not None and 0 <= trainer.max_epochs <= epochs_done(trainer))


def reached(trainer: Trainer, at: float, unit: Unit, *, between_epochs: bool = False) -> bool:
    """Tell whether training has reached a position.

    Args:
        trainer: A Trainer inside `fit`.
        at: The position.
        unit: Its unit.
        between_epochs: Whether no batch of the current epoch has begun yet, or all have ended.

    Returns:
        Whether the optimizer steps done, or the epochs, are as many or more.
    """
    progress = training_progress(trainer, with_totals=unit == "fraction")
    if between_epochs:  # the loop still counts the batches of the epoch before
        progress = progress._replace(epoch=float(epochs_done(trainer)))
    return Piecewise([at], [0.0, 1.0], unit=unit)(progress) == 1.0
