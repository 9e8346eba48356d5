"""Progress of a Trainer in the terms that schedules understand."""

import math

from lightning_plugins._lightning import Trainer
from lightning_plugins.schedules import Progress, Schedule


def steps_done(trainer: Trainer) -> int:
    """Training steps done, on the axis on which Lightning's loggers count.

    ``trainer.global_step`` is the number of steps of all optimizers together. That is the same under automatic
    optimization; under manual optimization two optimizers step in each batch, or one in every fourth, and only batches
    are a unit in which the length of a training is known too.

    Returns:
        Optimizer steps, or batches under manual optimization.
    """
    if trainer.lightning_module.automatic_optimization:
        return trainer.global_step
    return int(vars(trainer.fit_loop.epoch_loop.batch_progress.total)["processed"])


def training_progress(trainer: Trainer, *, with_totals: bool) -> Progress:
    """The progress at the current batch.

    Args:
        trainer: A Trainer inside `fit`.
        with_totals: Whether to ask for the totals. Lightning refuses to estimate them under an accumulation that
            changes between epochs, so they are asked for only where a schedule needs them.

    Returns:
        Steps done, epochs done (the current one as a fraction), and the totals, None where unknown.
    """
    batches = trainer.num_training_batches
    within_epoch = trainer.fit_loop.epoch_loop.batch_idx / batches if math.isfinite(batches) and batches else 0.0
    progress = Progress(
        step=steps_done(trainer),
        epoch=trainer.current_epoch + max(within_epoch, 0.0),
        total_epochs=trainer.max_epochs if with_totals and trainer.max_epochs != -1 else None,
    )
    if not with_totals:
        return progress
    if not trainer.lightning_module.automatic_optimization:
        return progress._replace(fraction=_fraction_of_batches(trainer, progress))
    total_steps = trainer.estimated_stepping_batches  # -1 or inf: unknown
    known = math.isfinite(total_steps) and total_steps > 0
    return progress._replace(total_steps=int(total_steps) if known else None)


def _fraction_of_batches(trainer: Trainer, progress: Progress) -> float | None:
    """The part done of a training with manual optimization, which ends at whichever limit comes first."""
    parts = []
    total = trainer.num_training_batches * (trainer.max_epochs or 0)
    if math.isfinite(total) and total > 0:
        parts.append(progress.step / total)
    if trainer.max_steps != -1:  # counts the steps of all optimizers, as `global_step` does
        parts.append(trainer.global_step / max(trainer.max_steps, 1))
    return max(parts, default=None)


def check_schedule(schedule: Schedule | None) -> Schedule | None:
    """Return ``schedule`` if it is a Schedule or None.

    Raises:
        TypeError: If it is something else.
    """
    if schedule is not None and not isinstance(schedule, Schedule):
        raise TypeError(
            f"`schedule` must be a Schedule, got {schedule!r} ({type(schedule).__name__}); take one out of "
            "`lightning_plugins.schedules`, where a number is `Constant(number)`, or subclass Schedule"
        )
    return schedule
