"""How far a Trainer has come, in the terms that schedules understand."""

import math

from lightning_plugins._lightning import Trainer
from lightning_plugins.schedules import Progress


def training_progress(trainer: Trainer, *, with_totals: bool) -> Progress:
    """The progress at the current batch.

    Args:
        trainer: A Trainer inside `fit`.
        with_totals: Whether to ask for the totals. Lightning refuses to estimate them under an accumulation that
            changes between epochs, so they are asked for only where a schedule needs them.

    Returns:
        Optimizer steps done, epochs done (the current one as a fraction), and the totals, None where unknown.
    """
    batches = trainer.num_training_batches
    within_epoch = trainer.fit_loop.epoch_loop.batch_idx / batches if math.isfinite(batches) and batches else 0.0
    total_steps = trainer.estimated_stepping_batches if with_totals else -1  # -1 or inf: unknown
    return Progress(
        step=trainer.global_step,
        epoch=trainer.current_epoch + max(within_epoch, 0.0),
        total_steps=int(total_steps) if math.isfinite(total_steps) and total_steps > 0 else None,
        total_epochs=trainer.max_epochs if with_totals and trainer.max_epochs != -1 else None,
    )
