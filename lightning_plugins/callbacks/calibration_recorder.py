"""Second moments of what layers receive, recorded while a training runs."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

from torch import Tensor

from lightning_plugins._checks import check_non_negative_int, check_positive_int, plain_number
from lightning_plugins._lightning import Callback, LightningModule, Trainer
from lightning_plugins.callbacks._trainer.requirements import require_lightning_module, require_same_on_ranks
from lightning_plugins.compression.calibration.calibration import Calibration
from lightning_plugins.compression.calibration.masking import check_mask
from lightning_plugins.compression.calibration.storage import check_options
from lightning_plugins.selection import check_layers


class CalibrationRecorder(Callback):
    """Record a `lightning_plugins.compression.Calibration` from the batches that a network is trained on.

    No further pass over the data is needed. The moments are those of the training: of weights that still change, with
    dropout and augmentation; so record late, with ``start``. A resumed run continues with its previous moments.

    Args:
        layers: As for `Calibration`.
        mask: As for `Calibration`; it gets the batch of the training step.
        damping: As for `Calibration`.
        effort: As for `Calibration`.
        start: The optimizer step from which on batches are recorded.
        every_n_steps: Only every n-th batch is recorded.

    Raises:
        ValueError: If an argument is out of its range.
        TypeError: If an argument is of a wrong type.

    Attributes:
        calibration: The calibration, once a training has begun.

    Example:
        >>> recorder = CalibrationRecorder("encoder.*", mask="attention_mask", every_n_steps=10)
        >>> recorder.every_n_steps
        10
    """

    def __init__(
        self,
        layers: str | list[str] = "*",
        *,
        mask: str | Callable[[Any], Tensor] | None = None,
        damping: float = 1e-2,
        effort: float | None = 0.25,
        start: int = 0,
        every_n_steps: int = 1,
    ) -> None:
        super().__init__()
        self.layers: Sequence[str] = check_layers(layers, sides=False)
        check_options(damping, effort)
        limit = None if effort is None else plain_number(effort)
        self._options: dict[str, Any] = {"mask": check_mask(mask), "damping": plain_number(damping), "effort": limit}
        self.start = check_non_negative_int("start", start)
        self.every_n_steps = check_positive_int("every_n_steps", every_n_steps)
        self.calibration: Calibration | None = None
        self._saved: dict[str, Any] | None = None
        self._open = ExitStack()

    @property
    def state_key(self) -> str:
        """Unique for every different instance, so that several keep their own entries in a checkpoint."""
        options = {"damping": self._options["damping"], "effort": self._options["effort"]}
        return self._generate_state_key(layers=self.layers, start=self.start, every=self.every_n_steps, **options)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check the module."""
        require_lightning_module(type(self).__name__, pl_module)
        if stage == "fit":
            require_same_on_ranks(type(self).__name__, (), self.state_key)
            self._saved = None  # a checkpoint's state comes after this hook

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the layers."""
        self.calibration = Calibration(pl_module, self.layers, **self._options)
        if self._saved is not None:
            self.calibration.load_state_dict(self._saved)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Begin to record if it is time."""
        if self.calibration is not None and trainer.global_step >= self.start and batch_idx % self.every_n_steps == 0:
            self._open.enter_context(self.calibration.recording(batch))

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """End the record: the backward pass may run layers once more, under activation checkpointing."""
        self._open.close()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """End the record where there was no backward pass."""
        self._open.close()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Add up what all processes have recorded."""
        if self.calibration is not None:
            self.calibration.gather()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Let go of the module: ``teardown`` does not run after an exception."""
        self._open.close()

    def state_dict(self) -> dict[str, Any]:
        """The moments; all processes call."""
        return {} if self.calibration is None else self.calibration.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with a checkpoint's moments."""
        self._saved = state_dict or None
