"""Watch the singular values of weights during training."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from lightning_plugins._checks import check_positive_int
from lightning_plugins._lightning import Callback, LightningModule, Trainer
from lightning_plugins.callbacks._monitors.figures import PendingFigures, require_figures
from lightning_plugins.callbacks._monitors.history import SpectrumHistory
from lightning_plugins.callbacks._terms.logged import claim_names, log_value, release_names
from lightning_plugins.callbacks._terms.weight_gradients import shared_out
from lightning_plugins.callbacks._terms.weights_in_use import WeightsInUse
from lightning_plugins.callbacks._trainer.progress import steps_done
from lightning_plugins.callbacks._trainer.requirements import (
    makes_layers_late,
    require_lightning_module,
    require_same_on_ranks,
    require_supported_strategy,
)
from lightning_plugins.computed_weights import parametrizations_at_rest
from lightning_plugins.functional.weight_spectrum import spectrum_dtype, summarize_spectrum, weight_singular_values
from lightning_plugins.plots import weight_spectrum_figure
from lightning_plugins.selection import check_layers
from lightning_plugins.weights import WeightMatrix, check_scheme, select_weight_matrices

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_KEPT = "weights"  # the one stage of the history


class SpectrumMonitor(Callback):
    """Log and plot the singular values of selected weights, without affecting training.

    The weights are measured before the first optimizer step and after every n-th, however many batches are accumulated.
    At each measurement the layers are divided among the ranks: each is decomposed by one of them, in float64, and the
    results are exchanged; a sharded weight (FSDP2) is temporarily assembled.

    For each layer ``spectrum/<layer>/stable_rank`` (sum of the squared singular values over the largest square),
    ``spectrum/<layer>/effective_rank`` (Roy and Vetterli's: ``exp`` of the entropy of the singular values divided by
    their sum) and ``spectrum/<layer>/spectral_norm`` (the largest) reach the loggers at each look, at the number of
    steps done, whatever the Trainer's `log_every_n_steps`; other callbacks find them in ``trainer.callback_metrics``.

    A figure ``spectrum/<layer>`` shows the spectra over the training steps. TensorBoard and Weights & Biases get it as
    an image, for any other logger, or none, it is a PNG file in the logger's directory or the Trainer's
    `default_root_dir`. One process draws, at the end of epochs as long as that takes less than a twentieth of the time,
    and at the end.

    A layer that another callback puts in place of a chosen one is found by its name; where that is a sequence, as of a
    factorised layer, the layers in it are looked at from then on.

    Args:
        layers: Dotted name of a layer, a glob over names, or several of them. Among the matches of a glob the linear
            layers, the convolutions and the projections of ``nn.MultiheadAttention`` are taken. Of a grouped
            convolution the singular values of all groups stand together, as those of a block-diagonal matrix. A weight
            that is computed by a parametrization is looked at as it is computed.
        every_n_steps: The weights are measured after every n-th optimizer step.
        scheme: How a convolution's kernel becomes a matrix: 1 for ``O x (I * k * k)``, 2 for ``(O * k) x (I * k)``.
        figures: Whether to draw; needs matplotlib.
        max_spectra: So many spectra per layer are remembered, and saved in checkpoints: the first, the latest and,
            between them, steps as evenly spaced as can be.

    Raises:
        ValueError: If an argument is out of its range.
        TypeError: If an argument is of the wrong type.
        ImportError: If ``figures`` are wanted and matplotlib is missing.

    Example:
        >>> monitor = SpectrumMonitor(layers="backbone.*", every_n_steps=100)
        >>> monitor.every_n_steps
        100

    Source:
        Roy and Vetterli, EUSIPCO 2007, for the effective rank.
    """

    def __init__(
        self,
        layers: str | list[str],
        *,
        every_n_steps: int = 100,
        scheme: Literal[1, 2] = 1,
        figures: bool = True,
        max_spectra: int = 32,
    ) -> None:
        super().__init__()
        self.layers = check_layers(layers, sides=False)
        self.every_n_steps = check_positive_int("every_n_steps", every_n_steps)
        self.scheme: Literal[1, 2] = check_scheme(scheme)
        self.max_spectra = check_positive_int("max_spectra", max_spectra)
        self.figures = require_figures(figures)
        self._history = SpectrumHistory(self.max_spectra, (_KEPT,))
        self._next_look = 0  # optimizer steps
        self._in_use = WeightsInUse(type(self).__name__, self.layers, self._select, lambda weight: weight)
        self._names: dict[str, str] = {}  # logged name by layer
        self._drawing = PendingFigures(self._figure if figures else None)

    @property
    def spectra(self) -> dict[str, dict[int, Tensor]]:
        """The remembered singular values by layer and training step, as in ``spectra["backbone.fc"][100]``.

        Each is a float32 tensor of shape ``(min(m, n),)`` on the CPU, largest first.
        """
        return self._history.kept[_KEPT]

    @property
    def state_key(self) -> str:
        """Unique for every different instance, so that several keep their own entries in a checkpoint."""
        return self._generate_state_key(layers=self.layers, every_n_steps=self.every_n_steps, scheme=self.scheme)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check the module and the Trainer, and find the weights."""
        if stage != "fit":
            return
        require_lightning_module(type(self).__name__, pl_module)
        require_supported_strategy(type(self).__name__, trainer)
        if trainer.global_step == 0:  # a new training; a checkpoint's state comes after this hook
            self._history.clear()
            self._next_look = 0
        if not makes_layers_late(pl_module):
            self._find(pl_module)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the weights where the module has only now made them."""
        if not self._in_use:
            self._find(pl_module)
        with parametrizations_at_rest(pl_module):  # a shape may have to be computed
            names = [f"{weight.label} {tuple(weight.shape)}" for weight in self._in_use.now(pl_module)]
        require_same_on_ranks(type(self).__name__, names, self.state_key)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Look at the weights before the first step."""
        self._look_if_due(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Look at the weights after every n-th step."""
        self._look_if_due(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw if there is time for it."""
        self._drawing.draw_if_time(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw new data since the last figures."""
        self._drawing.draw(trainer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let go of the module, to which nothing was done."""
        self._in_use.forget()
        release_names(pl_module, self)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Let go of the module: ``teardown`` does not run after an exception."""
        self.teardown(trainer, pl_module, stage="fit")

    def state_dict(self) -> dict[str, Any]:
        """The remembered spectra, and the step of the next look."""
        return {"spectra": self._history.state(), "next_look": self._next_look}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint's spectra."""
        self._history.load_state(state_dict["spectra"])
        self._next_look = state_dict["next_look"]

    def _find(self, pl_module: LightningModule) -> None:
        self._in_use.find(pl_module)
        self._in_use.tell(pl_module)

    def _select(self, model: nn.Module, layers: Sequence[str]) -> list[WeightMatrix]:
        with parametrizations_at_rest(model):
            return select_weight_matrices(model, layers, scheme=self.scheme, computed=True)

    def _look_if_due(self, trainer: Trainer, pl_module: LightningModule) -> None:
        step = steps_done(trainer)
        if step < self._next_look:
            return
        self._next_look = (step // self.every_n_steps + 1) * self.every_n_steps
        weights = self._in_use.now(pl_module)
        if not weights:
            return
        names = claim_names(pl_module, self, [(f"spectrum/{weight.label}",) * 2 for weight in weights])
        self._names = {weight.label: name for weight, name in zip(weights, names, strict=True)}
        logged: dict[str, float] = {}
        for label, values in self._singular_values(pl_module, weights).items():
            for name, number in summarize_spectrum(values)._asdict().items():
                logged[f"{self._names[label]}/{name}"] = number
            if torch.isfinite(values).all():
                self._history.remember(_KEPT, label, step, values.float())
                self._drawing.add(label)
        for name, number in logged.items():  # a logger would leave out all but each `log_every_n_steps`-th step
            log_value(pl_module, name, number, logger=False)
        for logger in trainer.loggers:
            logger.log_metrics(logged, step=step)

    @torch.no_grad()
    def _singular_values(self, pl_module: LightningModule, weights: list[WeightMatrix]) -> dict[str, Tensor]:
        """The singular values of each layer on the CPU, with a single synchronisation."""
        with parametrizations_at_rest(pl_module), torch.inference_mode(False):
            found = shared_out(
                weights,
                lambda _, matrix: (weight_singular_values(matrix),),
                lambda _, matrix: (
                    matrix.new_empty((*matrix.shape[:-2], min(matrix.shape[-2:])), dtype=spectrum_dtype(matrix)),
                ),
            )
        flat = [values.flatten().sort(descending=True).values for (values,) in found]  # of all groups
        parts = torch.cat(flat).cpu().split([len(values) for values in flat])
        return {weight.label: values for weight, values in zip(weights, parts, strict=True)}

    def _figure(self, label: str) -> "tuple[str, Figure]":
        steps, spectra = self._history.sorted_by_step(_KEPT, label)
        return self._names.get(label, f"spectrum/{label}"), weight_spectrum_figure(spectra, steps, title=label)
