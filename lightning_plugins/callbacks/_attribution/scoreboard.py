"""The metrics of all methods, raw and absolute, updated side by side."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_plugins._checks import check_names
from lightning_plugins.callbacks._attribution.report import AttributionReport
from lightning_plugins.functional.attribution import random_attributions
from lightning_plugins.functional.attribution.scoring import Explain, Forward
from lightning_plugins.metrics.attribution import (
    AttributionAUROC,
    AttributionLocalization,
    DegradationScore,
    FaithfulnessCorrelation,
    Infidelity,
    LocalizationIoU,
    PointingGame,
    RegionPerturbation,
    RelevanceRankAccuracy,
    Sensitivity,
)
from lightning_plugins.metrics.attribution.base import skill_of
from lightning_plugins.metrics.attribution.localization import LocalizationMetric

# Random maps have a row of their own, so that the metrics need not measure them again for each method.
METRICS: dict[str, Callable[[int], Metric]] = {
    "iou": lambda limit: LocalizationIoU(),
    "rank_accuracy": lambda limit: RelevanceRankAccuracy(),
    "pointing_game": lambda limit: PointingGame(),
    "attribution_localization": lambda limit: AttributionLocalization(),
    "auroc": lambda limit: AttributionAUROC(),
    "degradation": lambda limit: DegradationScore(baseline=False, max_forward_batch=limit),
    "region_perturbation": lambda limit: RegionPerturbation(baseline=False, max_forward_batch=limit),
    "deletion": lambda limit: RegionPerturbation("deletion", baseline=False, max_forward_batch=limit),
    "insertion": lambda limit: RegionPerturbation("insertion", baseline=False, max_forward_batch=limit),
    "faithfulness_correlation": lambda limit: FaithfulnessCorrelation(max_forward_batch=limit),
    "infidelity": lambda limit: Infidelity(max_forward_batch=limit),
    "sensitivity": lambda limit: Sensitivity(max_forward_batch=limit),
}
DEFAULT_METRICS = ("iou", "rank_accuracy", "pointing_game", "attribution_localization", "auroc", "degradation")
_MEASURED = (DegradationScore, RegionPerturbation)  # whose random baseline is the row of the random maps
RANDOM = "random"


class Scoreboard:
    """One metric for each method, form and name.

    Args:
        methods: Names of the methods.
        forms: ``"raw"``, ``"abs"`` or both.
        metrics: Prototypes by name, of which every method gets copies.
    """

    def __init__(self, methods: Sequence[str], forms: Sequence[str], metrics: Mapping[str, Metric]) -> None:
        rows = [method if form == "raw" else f"{method}/abs" for method in methods for form in forms]
        self.metrics = {row: {name: one.clone() for name, one in metrics.items()} for row in [*rows, RANDOM]}
        self.forms = tuple(forms)

    def to(self, device: torch.device) -> None:
        """Move all sums to a device and reset them."""
        for row in self.metrics.values():
            for metric in row.values():
                metric.to(device)
                metric.reset()
                metric._update_count = 1  # a rank may choose no sample, and is not to be warned of it

    def update(
        self, method: str, forward: Forward, explain: Explain, inputs: Tensor, target: Tensor, masks: Tensor | None
    ) -> Tensor:
        """Explain samples and score the maps.

        Args:
            method: Its name, or `RANDOM`.
            forward: Maps inputs to logits.
            explain: The method.
            inputs: Chosen samples.
            target: Their classes.
            masks: Their truth; None if no metric needs it.

        Returns:
            The maps as the method gave them.
        """
        maps = random_attributions(inputs) if method == RANDOM else explain(inputs, target)
        forms = ("raw",) if method == RANDOM else self.forms
        for form in forms:
            own, row = (maps, method) if form == "raw" else (maps.abs(), f"{method}/abs")
            for metric in self.metrics[row].values():
                if isinstance(metric, LocalizationMetric):
                    if masks is not None:
                        metric.update(own, masks, target)
                elif isinstance(metric, Sensitivity):
                    metric.update(_formed(random_explain if method == RANDOM else explain, form), inputs, target)
                else:
                    metric.update(forward, inputs, own, target)
        return maps

    def report(self, samples: int, seen: int) -> AttributionReport:
        """Compute everything over all ranks, which must all ask at the same time."""
        found = {row: {name: one.compute() for name, one in own.items()} for row, own in self.metrics.items()}
        scores: dict[str, dict[str, dict[str, float]]] = {}
        curves = {}
        for row, own in found.items():
            scores[row] = {}
            for name, result in own.items():
                metric = self.metrics[row][name]
                if isinstance(metric, _MEASURED):
                    random = found[RANDOM][name].score
                    best = metric.best if isinstance(metric, RegionPerturbation) else metric.best_score
                    result = result._replace(random=random, skill=skill_of(result.score, random, best))
                scores[row][name] = {key: _mean(value) for key, value in result._asdict().items()}
        for row, own in self.metrics.items():
            for metric in own.values():
                if isinstance(metric, DegradationScore):
                    with metric.sync_context():
                        least, most = metric.scaled_curves().tolist()
                    curves[row] = {"least": least, "most": most}
        return AttributionReport(scores, samples, seen, curves)


def checked_metrics(metrics: Sequence[str] | Mapping[str, Metric], limit: int) -> dict[str, Metric]:
    """Return the prototypes by name.

    Args:
        metrics: Names from `METRICS`, or metrics of `lightning_plugins.metrics` by custom name.
        limit: The largest number of inputs in one forward pass, for those by name.

    Returns:
        Metrics by name.

    Raises:
        TypeError: If something among them is no such metric.
        ValueError: If there is none, or a name is not known.
    """
    if isinstance(metrics, Mapping):
        found = dict(metrics)
    else:
        if any(isinstance(name, Metric) for name in (metrics if isinstance(metrics, list | tuple) else [metrics])):
            raise TypeError("`metrics` must be names, or a mapping of names as in {'iou': LocalizationIoU()}")
        found = {name: METRICS[name](limit) for name in check_names("metrics", metrics, METRICS)}
    if not found:
        raise ValueError(f"`metrics` must have at least one metric, got none; there are {', '.join(METRICS)}")
    kinds = tuple({type(make(1)) for make in METRICS.values()})
    for name, metric in found.items():
        if not isinstance(metric, kinds):
            raise TypeError(
                f"`metrics[{name!r}]` must be a metric of attributions out of `lightning_plugins.metrics`, got"
                f" {type(metric).__name__}"
            )
    return found


def random_explain(inputs: Tensor, target: Tensor) -> Tensor:
    """Random maps, as a method."""
    return random_attributions(inputs)


def _formed(explain: Explain, form: str) -> Explain:
    return explain if form == "raw" else lambda inputs, target: explain(inputs, target).abs()


def _mean(value: Tensor) -> float:
    """Metrics by class appear as their mean over the classes that have a score."""
    return float(value.double().nanmean() if value.ndim else value)
