"""Watch the spectra of layers' representations during training and validation."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_plugins._checks import check_names, check_positive_int
from lightning_plugins._grouping import grouped
from lightning_plugins._lightning import Callback, LightningModule, Trainer, TrainerFn
from lightning_plugins.callbacks._monitors.figures import PendingFigures, require_figures
from lightning_plugins.callbacks._monitors.history import SpectrumHistory
from lightning_plugins.callbacks._monitors.loaders import loader_stages
from lightning_plugins.callbacks._monitors.statistics import METRICS, LayerStatistics
from lightning_plugins.callbacks._rows.pooled_capture import ObservedRows
from lightning_plugins.callbacks._rows.readout import Readout, check_readout
from lightning_plugins.callbacks._terms.logged import claim_names, log_equal, log_value, release_names
from lightning_plugins.callbacks._terms.training_step import WrappedStep, join_training_step
from lightning_plugins.callbacks._trainer.progress import steps_done
from lightning_plugins.callbacks._trainer.requirements import (
    makes_layers_late,
    require_supported,
)
from lightning_plugins.selection import check_layers

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STAGES = ("train", "val")  # of several validation loaders each has a stage of its own, as `val_0`; so has `test`


class RepresentationMonitor(Callback):
    """Log and draw the spectra of layers' representations; nothing in the training changes.

    In validation every batch counts, in training the batches of every n-th optimizer step. Only Gram matrices are
    summed on the way, on the device and without waiting for it; at the end of the epoch the sums of all processes give
    the metrics, however the rows were split, and the eigenvalue spectrum of the epoch. A layer that is called several
    times in a step gives the rows of all calls. Training rows come from weights that change meanwhile.

    Logged through ``pl_module.log``, for each layer: ``representation/<train|val>/<layer>/<metric>``, and a figure
    ``representation/<train|val>/<layer>/spectrum`` that shows the spectra over the training steps. TensorBoard and
    Weights & Biases get it as an image, other loggers a PNG file in their directory or the `default_root_dir`. Figures
    are drawn on process zero, at the end of epochs as long as that takes less than a twentieth of the time, and at the
    end; also by ``trainer.validate()`` and ``trainer.test()``. Loaders are kept apart, as ``val_0`` and ``val_1``.

    Args:
        layers: Dotted name of a layer, a glob over names, or several of them; ``"backbone.fc:input"`` selects its
            input, ``"backbone.fc"`` its output. A layer that a stage never calls is left out there.
        readout: How a layer's tensor becomes rows, as ``Readout(pool="cls", mask="attention_mask")``; see
            `lightning_plugins.callbacks.Readout`.
        every_n_steps: In training, the batches of every n-th optimizer step are measured.
        metrics: Out of ``"entropy"``, ``"effective_rank"``, ``"isotropy"``, ``"correlation_gap"``, ``"rankme"``,
            ``"stable_rank"``, ``"alpha_req"`` and ``"uniformity"``; see `lightning_plugins.metrics`. The last one keeps
            all rows and compares all pairs.
        figures: Whether to draw; needs matplotlib.
        max_spectra: Number of spectra kept per layer and stage: the first, the latest and, between them, even steps.

    Raises:
        ValueError: If an argument is out of its range.
        TypeError: If an argument is of the wrong type.
        ImportError: If ``figures`` are wanted and matplotlib is missing.

    Example:
        >>> monitor = RepresentationMonitor(layers="backbone.fc:input", every_n_steps=10, metrics=["entropy", "rankme"])
        >>> monitor.metrics
        ('entropy', 'rankme')
    """

    method = "representation"

    @grouped(readout=Readout)
    def __init__(
        self,
        layers: str | list[str],
        *,
        readout: Readout = Readout(),
        every_n_steps: int = 50,
        metrics: Sequence[str] = ("entropy", "effective_rank", "isotropy", "correlation_gap", "rankme"),
        figures: bool = True,
        max_spectra: int = 32,
    ) -> None:
        super().__init__()
        self.layers = check_layers(layers, sides=True)
        self.readout = check_readout(readout)
        self.pool = readout.pool
        self.every_n_steps = check_positive_int("every_n_steps", every_n_steps)
        self.metrics = check_names("metrics", metrics, METRICS)
        if not self.metrics:
            raise ValueError(f"`metrics` must have at least one metric, got none; there are {', '.join(METRICS)}")
        self.max_spectra = check_positive_int("max_spectra", max_spectra)
        self.figures = require_figures(figures)
        self._history = SpectrumHistory(self.max_spectra, STAGES)
        self._statistics = {stage: LayerStatistics(self.metrics) for stage in STAGES}
        self._loader = ""  # the stage of the batch under way, out of training
        self._epoch: int | None = None  # of the training sums
        self._restored: dict[str, Any] | None = None  # sums from a checkpoint, until the devices are known
        self._capture: ObservedRows | None = None
        self._names: dict[str, str] = {}  # logged name by layer
        self._step: WrappedStep | None = None
        self._recording = ExitStack()  # of the validation batch under way
        self._drawing = PendingFigures(self._figure if figures else None)

    @property
    def spectra(self) -> dict[str, dict[str, dict[int, Tensor]]]:
        """The remembered eigenvalues by stage, layer and training step, as in ``spectra["val"]["backbone.fc"][100]``.

        Each is a float32 tensor of shape ``(d,)`` on the CPU, largest first.
        """
        return self._history.kept

    @property
    def state_key(self) -> str:
        """Unique for every different instance, so that several keep their own entries in a checkpoint."""
        return self._generate_state_key(
            layers=self.layers, **self.readout.key(), every_n_steps=self.every_n_steps, metrics=self.metrics
        )

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check the module and the Trainer, register the hooks and join the training step."""
        if stage not in {"fit", "validate", "test"}:
            return
        require_supported(self, trainer, pl_module)
        for statistics in self._statistics.values():  # of a broken-off run; a checkpoint's come after this hook
            statistics.reset()
        if stage == "fit":
            if trainer.global_step == 0:  # a new training
                self._history.clear()
                self._epoch = None
            self._step = join_training_step(pl_module, self)
        if not makes_layers_late(pl_module):
            self._attach(pl_module)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Register the hooks of layers that the module's ``setup`` or ``configure_model`` has just made."""
        if self._capture is None:
            self._attach(pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let one process take over the sums of a checkpoint, which are those of all.

        Resumed between an epoch's last batch and its end, Lightning calls no hook for that end; this does it.
        """
        if self._restored is not None:
            if trainer.is_global_zero:
                for stage, sums in self._restored.items():
                    self._of(stage).load_state(sums, pl_module.device)
            self._restored = None
            if self._epoch != trainer.current_epoch:
                self._summarize("train", trainer, pl_module, log=False)
        self._epoch = trainer.current_epoch

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remember which epoch the sums belong to."""
        self._epoch = trainer.current_epoch

    @contextmanager
    def recording(self, pl_module: LightningModule) -> Iterator[None]:
        """Measure this training step if it is its turn (for the wrapper of the training step)."""
        if self._capture is None or steps_done(pl_module.trainer) % self.every_n_steps:
            yield
            return
        with self._capture.recording(self._step.batch if self._step is not None else None):
            yield
        self._add("train")

    def penalty(self, pl_module: LightningModule) -> None:
        """Nothing is added to the loss (for the wrapper of the training step)."""

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the epoch's measured steps."""
        self._summarize("train", trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw new data since the last figures."""
        self._drawing.draw(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Register the hooks of layers that the module's ``setup`` or ``configure_model`` has just made."""
        for stage in loader_stages(trainer):
            self._of(stage)  # on every process, also on one whose loaders are empty
        if self._capture is None:
            self._attach(pl_module)

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Record the layers' tensors, except in a sanity check."""
        if self._capture is not None and not trainer.sanity_checking:
            self._loader = loader_stages(trainer)[dataloader_idx]
            self._recording.enter_context(self._capture.recording(batch))

    def on_validation_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        """Add this batch's rows to the sums of its loader."""
        self._recording.close()
        if not trainer.sanity_checking:
            self._add(self._loader)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the whole validation, each loader for itself."""
        for stage in () if trainer.sanity_checking else loader_stages(trainer):
            self._summarize(stage, trainer, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw what ``trainer.validate()`` or ``trainer.test()`` has found."""
        if trainer.state.fn in {TrainerFn.VALIDATING, TrainerFn.TESTING}:
            self._drawing.draw(trainer)

    # `trainer.test()` measures like a validation.
    on_test_start = on_validation_start
    on_test_batch_start = on_validation_batch_start
    on_test_batch_end = on_validation_batch_end
    on_test_epoch_end = on_validation_epoch_end
    on_test_end = on_validation_end

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave the module as it was."""
        self._recording.close()
        if self._capture is not None:
            self._capture.detach()
        if self._step is not None:
            self._step.leave(self)
        self._capture = self._step = None
        release_names(pl_module, self)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave the module as it was: ``teardown`` does not run after an exception."""
        self.teardown(trainer, pl_module, stage="fit")

    def state_dict(self) -> dict[str, Any]:
        """The remembered spectra and the sums of epochs under way."""
        sums = {stage: statistics.state() for stage, statistics in self._statistics.items()}
        return self._state_with(self._restored if self._restored is not None else sums)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Save the sums of all ranks, where `state_dict` knows those of its own."""
        if trainer.world_size > 1 and self._capture is not None and self._restored is None:
            labels, device = self._capture.labels, pl_module.device
            sums = {stage: own.state_of_all_ranks(labels, device) for stage, own in self._statistics.items()}
            checkpoint["callbacks"][self.state_key] = self._state_with(sums)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint's spectra and sums."""
        self._history.load_state(state_dict["spectra"])
        self._restored, self._epoch = state_dict["sums"], state_dict["epoch"]

    def _state_with(self, sums: Mapping[Any, Any]) -> dict[str, Any]:
        return {"spectra": self._history.state(), "sums": dict(sums), "epoch": self._epoch}

    def _attach(self, pl_module: LightningModule) -> None:
        self._capture = ObservedRows(pl_module, self.layers, self.readout)
        self._capture.attach()
        names = [tuple(f"representation/{name}" for name in pair) for pair in self._capture.log_names]
        claimed = claim_names(pl_module, self, [(wanted, other) for wanted, other in names])
        self._names = dict(zip(self._capture.labels, (n.removeprefix("representation/") for n in claimed), strict=True))

    def _of(self, stage: str) -> LayerStatistics:
        return self._statistics.setdefault(stage, LayerStatistics(self.metrics))

    @torch.no_grad()
    def _add(self, stage: str) -> None:
        if self._capture is None:
            return
        with torch.inference_mode(False):  # sums made in validation's inference mode could not be saved and added to
            for label, embeddings in self._capture.take().items():
                for rows in embeddings:
                    try:
                        self._of(stage).update(label, rows)
                    except (TypeError, ValueError) as error:
                        self._capture.leave_out(label, error)

    @torch.no_grad()
    def _summarize(self, stage: str, trainer: Trainer, pl_module: LightningModule, *, log: bool = True) -> None:
        if self._capture is None:
            return
        with torch.inference_mode(False):
            summaries = self._of(stage).summaries(self._capture.labels, pl_module.device)
        self._of(stage).reset()
        for label in self._capture.left_out if log else ():
            log_value(pl_module, f"representation/{stage}/{self._names[label]}/left_out", 1.0)
        for label, (values, spectrum) in summaries.items():
            for name, value in values.items() if log else ():
                log_equal(pl_module, f"representation/{stage}/{self._names[label]}/{name}", value)
            if torch.isfinite(spectrum).all():
                self._history.remember(stage, label, steps_done(trainer), spectrum.float().cpu())
                self._drawing.add((stage, label))
        self._drawing.draw_if_time(trainer)

    def _figure(self, key: tuple[str, str]) -> "tuple[str, Figure]":
        return f"representation/{key[0]}/{self._names[key[1]]}/spectrum", self._history.figure(*key)
