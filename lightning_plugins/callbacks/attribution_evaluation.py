"""Evaluate attribution methods on the samples of a validation or test."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchmetrics import Metric

from lightning_plugins._checks import (
    check_choice,
    check_instance,
    check_non_negative_int,
    check_positive_int,
    check_text,
)
from lightning_plugins._grouping import grouped
from lightning_plugins._lightning import (
    Callback,
    DDPStrategy,
    DeepSpeedStrategy,
    LightningModule,
    MisconfigurationException,
    SingleDeviceStrategy,
    Trainer,
    rank_zero_warn,
)
from lightning_plugins.callbacks._attribution.batches import BatchKeys, Key, key_name, take
from lightning_plugins.callbacks._attribution.examples import Examples
from lightning_plugins.callbacks._attribution.methods import build_method
from lightning_plugins.callbacks._attribution.refusals import check_layer, check_logits, check_network
from lightning_plugins.callbacks._attribution.report import AttributionReport
from lightning_plugins.callbacks._attribution.scoreboard import DEFAULT_METRICS, RANDOM, Scoreboard, checked_metrics
from lightning_plugins.callbacks._attribution.selection import SampleSelection, Selection
from lightning_plugins.callbacks._attribution.settings import Methods, check_methods, find_network, method_calls, named
from lightning_plugins.callbacks._attribution.untouched import untouched
from lightning_plugins.callbacks._monitors.figures import hand_to_loggers
from lightning_plugins.callbacks._trainer.requirements import require_lightning_module, require_same_on_ranks
from lightning_plugins.distributed import is_distributed
from lightning_plugins.functional.attribution.scoring import MAX_FORWARD_BATCH, Explain, checked_target, class_scores
from lightning_plugins.metrics.attribution.localization import LocalizationMetric
from lightning_plugins.plots import require_matplotlib

if TYPE_CHECKING:
    from lightning_plugins.plots.attribution import Curves

Stage = Literal["validate", "test"]
Absolute = Literal["raw", "abs", "both"]
STAGES: tuple[Stage, ...] = ("validate", "test")
FORMS: dict[str, tuple[str, ...]] = {"raw": ("raw",), "abs": ("abs",), "both": ("raw", "abs")}


class AttributionEvaluation(Callback):
    """Explain selected samples of every batch with several methods and score the maps, without changing the model.

    The scores of all ranks and batches are summed exactly. Logged through ``pl_module.log``:
    ``attribution/<method>[/abs]/<metric>``, and ``attribution/random/<metric>`` for random maps; `report`, None
    until the stage has run, has them beside the random baseline and the skill, as a table and as JSON. Figures go to
    the logger, or to files without one that takes images: ``attribution/degradation``, the curves, and
    ``attribution/example_<n>``, maps over inputs. Gradients of inputs are taken outside of inference mode and within
    the Trainer's precision.

    Args:
        methods: Names of Captum's methods (extra ``attribution``), or a mapping from names to what they are made with:
            the name of the layer for ``"gradcam"`` and ``"guided_gradcam"``; options of Captum's ``attribute``, a
            mapping, in which ``"layer"`` names the layer and ``"method"`` Captum's where the name is one's own; or a
            callable from inputs and classes to attributions.
        batch: Where inputs, true classes and masks are in the batch, as ``BatchKeys(mask=2)``; see
            `lightning_plugins.callbacks.BatchKeys`.
        metrics: Names out of ``"iou"``, ``"rank_accuracy"``, ``"pointing_game"``, ``"attribution_localization"``,
            ``"auroc"``, ``"degradation"``, ``"region_perturbation"``, ``"deletion"``, ``"insertion"``,
            ``"faithfulness_correlation"``, ``"infidelity"`` and ``"sensitivity"``, or a mapping from names to metrics
            out of `lightning_plugins.metrics`.
        stage: ``"test"`` or ``"validate"``; sanity checks are left out.
        network: Name of the submodule that maps inputs to logits; the LightningModule itself if None.
        samples: Which samples, as ``SampleSelection(select=0.9, classes=[1])``; see
            `lightning_plugins.callbacks.SampleSelection`. All by default.
        absolute: ``"raw"`` maps, ``"abs"`` for absolute values, or ``"both"``.
        max_forward_batch: The largest number of inputs, copies of samples among them, in one forward pass.
        examples: Number of samples of the first rank whose maps are drawn, in addition to the curves; 0 draws nothing,
            else matplotlib is needed.

    Raises:
        ValueError: If an argument is out of its range.
        TypeError: If an argument is of the wrong type.
        ImportError: If a method is named and Captum is missing, or ``examples`` are wanted without matplotlib.

    Example:
        >>> keys = BatchKeys(inputs="x", target="y", mask="m")
        >>> evaluation = AttributionEvaluation(["saliency"], batch=keys, examples=0)
        >>> evaluation.forms
        ('raw', 'abs')
    """

    @grouped(batch=BatchKeys, samples=SampleSelection)
    def __init__(
        self,
        methods: Methods,
        *,
        batch: BatchKeys = BatchKeys(),
        metrics: Sequence[str] | Mapping[str, Metric] = DEFAULT_METRICS,
        stage: Stage = "test",
        network: str | None = None,
        samples: SampleSelection = SampleSelection(),
        absolute: Absolute = "both",
        max_forward_batch: int = MAX_FORWARD_BATCH,
        examples: int = 3,
    ) -> None:
        super().__init__()
        self.methods = check_methods(methods)
        check_instance("batch", batch, BatchKeys, "BatchKeys, such as `BatchKeys(mask=2)`")
        self.keys: dict[str, Key] = batch.resolved()
        self.stage = check_choice("stage", stage, STAGES)
        self.network = None if network is None else check_text("network", network, "the name of a module")
        self.selection = Selection(
            check_instance(
                "samples", samples, SampleSelection, "a SampleSelection, such as `SampleSelection(select=0.9)`"
            )
        )
        self.forms = FORMS[check_choice("absolute", absolute, FORMS)]
        self.max_forward_batch = check_positive_int("max_forward_batch", max_forward_batch)
        self.metrics = checked_metrics(metrics, self.max_forward_batch)
        if "mask" not in self.keys and any(isinstance(metric, LocalizationMetric) for metric in self.metrics.values()):
            names = [name for name, metric in self.metrics.items() if isinstance(metric, LocalizationMetric)]
            raise ValueError(f"`mask` of `batch` must say where the truth is, for the `metrics` {names}, got None")
        self.examples = check_non_negative_int("examples", examples)
        if examples:
            require_matplotlib()
        self.report: AttributionReport | None = None
        self._board = Scoreboard(list(self.methods), self.forms, self.metrics)
        self._explain: dict[str, Explain] = {}
        self._checked = False
        self._kept = Examples(0)

    @property
    def state_key(self) -> str:
        """Unique for every different instance, so that several keep their own entries in a checkpoint."""
        return self._generate_state_key(
            methods=tuple(self.methods), stage=self.stage, keys=tuple(key_name(key) for key in self.keys.values())
        )

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check the strategy, the network and the layers that methods need."""
        require_lightning_module(type(self).__name__, pl_module)
        strategy = trainer.strategy
        if isinstance(strategy, DeepSpeedStrategy) or not isinstance(strategy, SingleDeviceStrategy | DDPStrategy):
            raise MisconfigurationException(
                f"AttributionEvaluation supports a single device and DDP, got {type(strategy).__name__}; pass "
                "`strategy='ddp'`, for example for the trained checkpoint: gradients of inputs and hooks need whole "
                "parameters"
            )
        require_same_on_ranks(type(self).__name__, (), self.state_key)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin a validation."""
        if self.stage == "validate" and not trainer.sanity_checking:
            self._begin(pl_module)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin a test."""
        if self.stage == "test":
            self._begin(pl_module)

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *_: Any
    ) -> None:
        """Explain and score the chosen samples of a batch."""
        if self.stage == "validate" and not trainer.sanity_checking:
            self._evaluate(trainer, pl_module, batch)

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *_: Any
    ) -> None:
        """Explain and score the chosen samples of a batch."""
        if self.stage == "test":
            self._evaluate(trainer, pl_module, batch)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the whole validation."""
        if self.stage == "validate" and not trainer.sanity_checking:
            self._summarize(trainer, pl_module)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the whole test."""
        if self.stage == "test":
            self._summarize(trainer, pl_module)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let go of the network."""
        self._explain = {}
        self._kept = Examples(0)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Let go of the network: ``teardown`` does not run after an exception."""
        self.teardown(trainer, pl_module, stage="test")

    def _begin(self, pl_module: LightningModule) -> None:
        network = find_network(pl_module, self.network)
        with torch.inference_mode(False):  # sums made in inference mode could not be added to outside
            self._board.to(pl_module.device)
        calls = method_calls(self.methods, network, limit=self.max_forward_batch)
        self._explain = {
            name: build_method(*call) if isinstance(call, tuple) else named(name, call) for name, call in calls.items()
        }
        self._captum = {name: call for name, call in calls.items() if isinstance(call, tuple)}
        self._checked = False
        self._kept = Examples(self.examples)
        self.selection.begin()

    def _evaluate(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> None:
        network = find_network(pl_module, self.network)
        with untouched(network), trainer.precision_plugin.forward_context():
            taken = {name: take(name, key, batch).detach().clone() for name, key in self.keys.items()}
            inputs, target, masks = taken["inputs"], taken["target"], taken.get("mask")
            checked_target(target, len(inputs))
            self._check(network, inputs)
            chosen = self.selection.choose(self._probabilities(network, inputs, target), target)
            if not len(chosen):
                return
            inputs, target = inputs[chosen], target[chosen]
            masks = masks[chosen] if masks is not None else None
            maps = {
                name: self._board.update(name, network, explain, inputs, target, masks)
                for name, explain in {**self._explain, RANDOM: _none}.items()
            }
            if trainer.is_global_zero:
                self._kept.add(inputs, maps, masks)

    def _check(self, network: nn.Module, inputs: Tensor) -> None:
        if not self._checked and len(inputs):
            check_logits(network, inputs[:1])
            for name, (method, call) in self._captum.items():
                check_network(method, network, inputs[:1])
                if call.layer is not None:
                    check_layer(name, network, call.layer, inputs[:1])
            self._checked = True

    def _probabilities(self, network: nn.Module, inputs: Tensor, target: Tensor) -> Tensor:
        parts = zip(inputs.split(self.max_forward_batch), target.split(self.max_forward_batch), strict=True)
        return torch.cat([class_scores(network, *part, output="probability") for part in parts])

    def _summarize(self, trainer: Trainer, pl_module: LightningModule) -> None:
        counts = torch.tensor([self.selection.chosen, self.selection.seen], device=pl_module.device)
        if is_distributed():
            dist.all_reduce(counts)
        samples, seen = counts.tolist()
        with torch.inference_mode(False):
            self.report = self._board.report(samples, seen)
        if not samples:
            rules = self.selection.samples
            rank_zero_warn(
                f"AttributionEvaluation: none of {seen} samples was chosen by `classes={rules.classes}` and"
                f" `select={rules.select}`, so there is no score; lower `select`, or train the model further"
            )
        for method, row in self.report.scores.items():
            for name, cell in row.items():
                # all ranks have the same value, and the largest of equal numbers is exactly that number
                value = torch.tensor(cell["score"], device=pl_module.device)
                pl_module.log(f"attribution/{method}/{name}", value, sync_dist=True, reduce_fx="max")
        if self.examples and samples and trainer.is_global_zero:
            self._draw(trainer, self.report)

    def _draw(self, trainer: Trainer, report: AttributionReport) -> None:
        from lightning_plugins.plots.attribution import attribution_figure, degradation_figure

        curves: Curves = {
            method: (torch.tensor(pair["least"]), torch.tensor(pair["most"])) for method, pair in report.curves.items()
        }
        if curves and any(bool(torch.isfinite(least).any()) for least, _ in curves.values()):
            hand_to_loggers(trainer, "attribution/degradation", degradation_figure(curves))
        for number, (signal, maps, mask) in enumerate(self._kept.kept):
            figure = attribution_figure(signal, maps, mask=mask, title=f"Example {number + 1}")
            hand_to_loggers(trainer, f"attribution/example_{number + 1}", figure)


def _none(inputs: Tensor, target: Tensor) -> Tensor:
    return inputs  # the scoreboard draws random maps itself
