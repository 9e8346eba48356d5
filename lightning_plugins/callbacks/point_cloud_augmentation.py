"""Whole-body augmentation of point clouds in training only, on a schedule that fades out."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning_plugins._checks import check_finite_number
from lightning_plugins._lightning import Callback, LightningModule, MisconfigurationException, Trainer
from lightning_plugins.callbacks._trainer.logged import on_device
from lightning_plugins.callbacks._trainer.progress import training_progress
from lightning_plugins.callbacks._trainer.requirements import require_known_total, require_lightning_module
from lightning_plugins.data.object_bank import ObjectBank
from lightning_plugins.functional.range_image import RangeGrid
from lightning_plugins.schedules import Linear, Schedule
from lightning_plugins.transforms.batch import KEYS, BatchAugmentation
from lightning_plugins.transforms.whole_body import check_targets


class PointCloudAugmentation(Callback):
    """Insert whole objects into the batches of a training, fewer and fewer towards its end.

    Batches are dictionaries as `lightning_plugins.transforms.collate_frames` makes them. Before each training step the
    batch's ``points``, ``mask``, ``boxes`` and ``labels`` are replaced by augmented ones, on its device, and ``source``
    is added; validation, test and prediction see their batches as they are. What is inserted depends on the seed, the
    optimizer step and the sample, so a resumed training and one on more processes see the same.

    Args:
        bank: The objects, or the folder of a saved bank.
        targets: How many objects of each class a frame is filled up to, where the schedule is 1.
        schedule: The share of the targets, cut to [0, 1]; by default 1, and a linear fade-out to 0 over the last fifth.
        grid: The sensor's cells; by default about those of 64 beams and 2,048 azimuths.
        area: Ranges of x and of y for new places, metres.
        pool_size: Largest number of completed objects per class.
        max_points: Largest number of points of an object.
        seed: Of all random numbers.

    Raises:
        ValueError: If a number is out of range, or a class is not in the bank.
        TypeError: If an argument is of the wrong type.
        FileNotFoundError: If the folder holds no bank.

    Logs ``point_cloud/share``, the schedule's value.

    Example:
        >>> from lightning_plugins.data import RaycastScenes
        >>> scenes = RaycastScenes(3)
        >>> bank = ObjectBank.from_frames(scenes)
        >>> callback = PointCloudAugmentation(bank, {"Car": 10}, grid=scenes.sensor.grid)

    Source:
        Shin et al., AAAI 2023, https://arxiv.org/abs/2303.12743; the schedule is our own.
    """

    def __init__(
        self,
        bank: ObjectBank | str | os.PathLike[str],
        targets: dict[str, int],
        *,
        schedule: Schedule | None = None,
        grid: RangeGrid | None = None,
        area: Sequence[Sequence[float]] = ((5.0, 65.0), (-35.0, 35.0)),
        pool_size: int = 256,
        max_points: int = 1024,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if schedule is not None and not isinstance(schedule, Schedule):
            raise TypeError(
                f"`schedule` must be a Schedule, got {schedule!r} ({type(schedule).__name__}); take one out of "
                "`lightning_plugins.schedules`"
            )
        if isinstance(bank, str | os.PathLike) and not Path(bank, "bank.json").is_file():
            raise FileNotFoundError(f"`bank` must be a folder that `ObjectBank.save` wrote, got {os.fspath(bank)!r}")
        self.bank = ObjectBank.load(bank) if isinstance(bank, str | os.PathLike) else bank
        self.schedule = schedule or Linear(1.0, 0.0, begin=0.8)
        self.augmentation = BatchAugmentation(
            self.bank, targets, grid=grid, area=area, pool_size=pool_size, max_points=max_points, seed=seed
        )
        self.targets = check_targets(self.bank, targets)

    @property
    def state_key(self) -> str:
        """Unique for every seed and targets."""
        return self._generate_state_key(targets=self.targets, seed=self.augmentation.seed)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check the module and the schedule."""
        if stage == "fit":
            require_lightning_module(type(self).__name__, pl_module)
            require_known_total(type(self).__name__, self.schedule, trainer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Replace the batch by the augmented one."""
        if not isinstance(batch, dict) or any(key not in batch for key in KEYS):
            found = sorted(map(str, batch)) if isinstance(batch, Mapping) else type(batch).__name__
            raise MisconfigurationException(
                f"{type(self).__name__} needs batches that are dicts of {list(KEYS)}, got {found}; pass "
                "`collate_fn=partial(lightning_plugins.transforms.collate_frames, classes=bank.classes)` to the loader"
            )
        value = self.schedule(training_progress(trainer, with_totals=self.schedule.needs_total))
        share = min(max(check_finite_number("schedule", value), 0.0), 1.0)
        batch.update(self.augmentation(batch, share=share, step=trainer.global_step))
        pl_module.log("point_cloud/share", on_device(share, pl_module), batch_size=len(batch["points"]))
