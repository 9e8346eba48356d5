"""Watch how much the representations of two views share, and how close a contrastive loss is to its ceiling."""

import math
from contextlib import ExitStack
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_plugins._checks import check_choice, check_positive_int
from lightning_plugins._grouping import Group, grouped
from lightning_plugins._lightning import Callback, LightningModule, MisconfigurationException, Trainer, rank_zero_warn
from lightning_plugins.callbacks._monitors.pairs import EpochPairs
from lightning_plugins.callbacks._rows.pooled_capture import ObservedRows
from lightning_plugins.callbacks._rows.readout import Readout, check_readout
from lightning_plugins.callbacks._terms.logged import log_equal
from lightning_plugins.callbacks._trainer.requirements import (
    makes_layers_late,
    require_supported,
)
from lightning_plugins.distributed import is_distributed, world_size
from lightning_plugins.functional.class_information import infonce_ceiling
from lightning_plugins.information import (
    CriticSettings,
    EstimateSettings,
    MutualInformationEstimate,
    estimate_information,
)
from lightning_plugins.selection import check_layers

_NEAR = 0.95  # of the ceiling


class MutualInformationMonitor(Callback):
    """Estimate, at the end of validations, the mutual information of two views' representations; change no training.

    A critic is fitted to a part of the validation's pairs, on features as they are, and evaluated on the rest with all
    of it as candidates. All processes gather the pairs and fit the same critic; the result does not depend on how the
    rows were split. Random numbers of the training are not touched.

    Logged through ``pl_module.log``, for each layer: ``mi/<layer>/estimate``, ``/standard_error`` and ``/ceiling``
    (the lower of ``ln K`` and that of same-class pairs), with ``labels`` also ``/entropy`` and ``/class_information``.
    With ``loss_candidates``, also of the training loss since the last validation: ``mi/loss/bound``, ``ln K`` less the
    mean loss, a diagnostic of the training and no estimate; ``mi/loss/ceiling``; and ``mi/loss/share`` of the two,
    with a warning, once, above 0.95: the loss then says that its K is small. Fewer than eight pairs give NaN.

    Args:
        layers: Dotted name of a layer, a glob over names, or several of them; ``"backbone.fc:input"`` takes what the
            layer receives.
        readout: How a layer's tensor becomes rows, as ``Readout(pool="cls", mask="attention_mask")``; see
            `lightning_plugins.callbacks.Readout`.
        pairs: ``"calls"``: a validation step calls each layer twice, once a view; ``"halves"``: once, with the first
            views in the first half of the rows and their partners, in the same order, in the second.
        labels: Where the batch has the classes of the pairs, an index or a key, if pairs are of the same class; a row
            for each pair, or for each view. None for other pairs.
        loss_candidates: K of the contrastive loss that ``training_step`` returns, the partner included; None for losses
            other than InfoNCE. Count the rows of this process alone if the loss does not gather.
        every_n_epochs: In `fit`, the validations of every n-th epoch.
        max_pairs: Maximum number of pairs, a random sample.
        settings: Critic, bound, candidates and units; None for the defaults with 500 steps.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If an argument is out of its range.

    Example:
        >>> monitor = MutualInformationMonitor("backbone", pairs="calls", loss_candidates=64)
        >>> monitor.settings.fit.max_steps
        500
    """

    @grouped(readout=Group(Readout, new=("select", "mask", "layout")))
    def __init__(
        self,
        layers: str | list[str],
        *,
        readout: Readout = Readout(),
        pairs: Literal["calls", "halves"] = "calls",
        labels: int | str | None = None,
        loss_candidates: int | None = None,
        every_n_epochs: int = 1,
        max_pairs: int = 8192,
        settings: EstimateSettings | None = None,
    ) -> None:
        super().__init__()
        self.layers = check_layers(layers, sides=True)
        self.readout = check_readout(readout)
        self.pool = readout.pool
        self.pairs = check_choice("pairs", pairs, ("calls", "halves"))
        if labels is not None and (isinstance(labels, bool) or not isinstance(labels, int | str)):
            raise TypeError(f"`labels` must be an index or a key of the batch, or None, got {type(labels).__name__}")
        self.labels = labels
        if loss_candidates is not None and check_positive_int("loss_candidates", loss_candidates) < 2:
            raise ValueError("`loss_candidates` must be at least 2, got 1: with K = 1 the loss is always 0")
        self.loss_candidates = None if loss_candidates is None else int(loss_candidates)
        self.every_n_epochs = check_positive_int("every_n_epochs", every_n_epochs)
        self.max_pairs = check_positive_int("max_pairs", max_pairs)
        if settings is not None and not isinstance(settings, EstimateSettings):
            raise TypeError(f"`settings` must be EstimateSettings or None, got {type(settings).__name__}")
        self.settings = settings or EstimateSettings(fit=CriticSettings(max_steps=500))
        self.estimates: dict[str, MutualInformationEstimate] = {}  # of the last validation
        self._collected = EpochPairs(self.pairs)
        self._loss: Tensor | None = None  # sum and number of losses since the last validation, shape (2,)
        self._warned = False
        self._capture: ObservedRows | None = None
        self._recording = ExitStack()

    @property
    def state_key(self) -> str:
        """Unique for every different instance, so that several keep their own entries in a checkpoint."""
        return self._generate_state_key(layers=self.layers, **self.readout.key(), pairs=self.pairs)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check the module and the Trainer and register the hooks.

        Raises:
            MisconfigurationException: If the loss is wanted of a module that returns none.
        """
        if stage not in {"fit", "validate"}:
            return
        require_supported(self, trainer, pl_module, f"{self.max_pairs} {self.every_n_epochs} {self.labels}")
        if stage == "fit" and self.loss_candidates is not None and not pl_module.automatic_optimization:
            raise MisconfigurationException(
                f"{type(self).__name__}: `loss_candidates` reads the loss that `training_step` returns, and "
                f"{type(pl_module).__name__} uses manual optimization; leave it out"
            )
        if stage == "fit" and trainer.global_step == 0:
            self._loss, self._warned = None, False
        if not makes_layers_late(pl_module):
            self._attach(pl_module)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Register the hooks of layers that the module's ``setup`` or ``configure_model`` has just made."""
        if self._capture is None:
            self._attach(pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Move the losses of a checkpoint to the device; every process continues from their mean."""
        if self._loss is not None:
            self._loss = self._loss.to(pl_module.device)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Add the batch's loss, without waiting for the device."""
        if self.loss_candidates is None or outputs is None:
            return
        loss = outputs["loss"].detach() * trainer.accumulate_grad_batches  # Lightning has divided it
        pair = torch.stack([loss.float(), torch.ones((), dtype=torch.float32, device=loss.device)])
        self._loss = pair if self._loss is None else self._loss + pair

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Register the hooks of layers that were made late."""
        if self._capture is None:
            self._attach(pl_module)

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, *args: Any, **kwargs: Any
    ) -> None:
        """Record the layers' tensors, if this validation is measured."""
        if self._capture is not None and self._measures(trainer):
            self._recording.enter_context(self._capture.recording(batch))

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep the batch's pairs."""
        self._recording.close()
        if self._capture is not None and self._measures(trainer):
            with torch.inference_mode(False):
                labels = None if self.labels is None else self._labels_of(batch)
                for label, calls in self._capture.take().items():
                    self._collected.add(label, calls, labels)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Fit, evaluate and log."""
        if self._capture is None or not self._measures(trainer):
            return
        self.estimates = {}
        probabilities = None
        for label in self._capture.labels:
            pairs = self._collected.gather(label, pl_module.device, self.max_pairs)
            if pairs is None:
                continue
            x, y, labels = pairs
            if len(x) >= 8:
                found = estimate_information(x, y, labels=labels, settings=self.settings)
                self.estimates[label] = found
            else:
                found = _too_few(len(x), self.settings)
            self._log(pl_module, f"mi/{label}", _logged(found))
            if labels is not None and len(labels):
                counts = torch.bincount(labels).double().cpu()
                probabilities = counts / counts.sum()
        self._collected.clear()
        if self._loss is not None and trainer.state.fn == "fit":
            self._log_loss(pl_module, probabilities)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave the module as it was."""
        self._recording.close()
        if self._capture is not None:
            self._capture.detach()
        self._capture = None
        self._collected.clear()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave the module as it was: ``teardown`` does not run after an exception."""
        self.teardown(trainer, pl_module, stage="fit")

    def state_dict(self) -> dict[str, Any]:
        """The losses since the last validation."""
        return {"loss": self._loss, "warned": self._warned}

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Save the mean of all processes' losses, where `state_dict` knows those of its own."""
        if is_distributed() and self.loss_candidates is not None:
            checkpoint["callbacks"][self.state_key] = {**self.state_dict(), "loss": self._mean_loss(pl_module)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self._loss, self._warned = state_dict["loss"], state_dict["warned"]

    def _attach(self, pl_module: LightningModule) -> None:
        self._capture = ObservedRows(pl_module, self.layers, self.readout)
        self._capture.attach()

    def _measures(self, trainer: Trainer) -> bool:
        return not trainer.sanity_checking and (
            trainer.state.fn != "fit" or trainer.current_epoch % self.every_n_epochs == 0
        )

    def _labels_of(self, batch: Any) -> Tensor:
        try:
            labels = batch[self.labels]
        except (KeyError, IndexError, TypeError) as error:
            raise MisconfigurationException(
                f"{type(self).__name__}: `labels={self.labels!r}` is not in a validation batch of type "
                f"{type(batch).__name__}; give the index or the key of the classes"
            ) from error
        if not isinstance(labels, Tensor) or labels.is_floating_point():
            raise MisconfigurationException(
                f"{type(self).__name__}: `labels={self.labels!r}` must be a tensor of integers in the batch, got "
                f"{type(labels).__name__}"
            )
        return labels

    def _mean_loss(self, pl_module: LightningModule) -> Tensor:
        """Sum and number of losses, each as its mean over the processes."""
        own = torch.zeros(2, dtype=torch.float32, device=pl_module.device) if self._loss is None else self._loss.clone()
        if is_distributed():
            torch.distributed.all_reduce(own)
            own /= world_size()
        return own

    def _log_loss(self, pl_module: LightningModule, probabilities: Tensor | None) -> None:
        total, count = self._mean_loss(pl_module).tolist()
        self._loss = None
        if self.loss_candidates is None or count == 0:
            return
        unit = math.log(2) if self.settings.units == "bits" else 1.0
        bound = (math.log(self.loss_candidates) - total / count) / unit
        ceiling = infonce_ceiling(self.loss_candidates, probabilities) / unit
        share = bound / ceiling
        self._log(pl_module, "mi/loss", {"bound": bound, "ceiling": ceiling, "share": share})
        if share > _NEAR and not self._warned:
            self._warned = True
            rank_zero_warn(
                f"the contrastive loss stands at {share:.0%} of its ceiling ({bound:.2f} of {ceiling:.2f} "
                f"{self.settings.units} with K = {self.loss_candidates}): it can say little more about the "
                "representation; compare `mi/<layer>/estimate`, or train with more candidates"
            )

    def _log(self, pl_module: LightningModule, name: str, values: dict[str, float]) -> None:
        for key, value in values.items():
            log_equal(pl_module, f"{name}/{key}", value)


def _logged(found: MutualInformationEstimate) -> dict[str, float]:
    values: dict[str, float | None] = {
        "estimate": found.estimate,
        "standard_error": found.standard_error,
        "ceiling": min(found.ceiling, math.inf if found.class_ceiling is None else found.class_ceiling),
        "entropy": found.entropy,
        "class_information": found.class_information,
    }
    return {name: value for name, value in values.items() if value is not None}


def _too_few(pairs: int, settings: EstimateSettings) -> MutualInformationEstimate:
    return MutualInformationEstimate(
        math.nan, math.nan, settings.units, settings.bound, pairs, math.nan, self_normalization=math.nan
    )
