"""Running statistics of monitored layers, and metrics computed from them."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_plugins.callbacks._trainer.requirements import agreed_widths
from lightning_plugins.distributed import is_distributed
from lightning_plugins.metrics import (
    AlphaReQ,
    CorrelationGap,
    EffectiveRank,
    FeatureStableRank,
    Isotropy,
    RankMe,
    Uniformity,
    VonNeumannEntropy,
)
from lightning_plugins.metrics.gram import GramMetric

_OF_UNIT_ROWS: dict[str, type[GramMetric]] = {
    "entropy": VonNeumannEntropy,
    "effective_rank": EffectiveRank,
    "isotropy": Isotropy,
    "correlation_gap": CorrelationGap,
}
_OF_ROWS_AS_THEY_COME: dict[str, type[GramMetric]] = {"rankme": RankMe, "stable_rank": FeatureStableRank}
METRICS = (*_OF_UNIT_ROWS, *_OF_ROWS_AS_THEY_COME, "alpha_req", "uniformity")

State = dict[str, dict[str, dict[str, Tensor]]]  # layer, metric, name of the metric's state


class LayerSummary(NamedTuple):
    """Metrics and spectrum of one layer over the rows of all batches and processes.

    Attributes:
        values: One scalar per asked metric.
        spectrum: Eigenvalues of the autocorrelation matrix, shape ``(d,)``, largest first; NaN if a row was not finite.
    """

    values: dict[str, Tensor]
    spectrum: Tensor


class LayerStatistics:
    """The sums of several layers: one Gram matrix serves all metrics that rest on it.

    Sums from a checkpoint are added on the one rank that is told to take them.

    Args:
        metrics: Names out of ``METRICS``.
    """

    def __init__(self, metrics: Sequence[str]) -> None:
        self._metrics = tuple(metrics)
        self._layers: dict[str, dict[str, Metric]] = {}

    def update(self, label: str, embeddings: Tensor) -> None:
        """Add rows of one layer, a ``(N, d)`` tensor; without synchronising the device.

        Raises:
            ValueError: If the layer's earlier rows had another ``d``.
        """
        if label not in self._layers:
            self._layers[label] = self._new(embeddings.shape[-1], embeddings.device)
        width = cast(GramMetric, self._layers[label]["unit"]).num_features
        if embeddings.shape[-1] != width:
            raise ValueError(
                f"`layers`: {label!r} gave embeddings of {width} features and now {embeddings.shape[-1]}; choose a "
                "`pool` whose number of features does not depend on the size of the input, such as 'mean'"
            )
        for metric in self._layers[label].values():
            metric.update(embeddings)

    def summaries(self, labels: Sequence[str], device: torch.device) -> dict[str, LayerSummary]:
        """Read the sums over all ranks, which must all ask at the same time.

        Args:
            labels: All layers, in the same order on every rank.
            device: Where this rank's tensors are.

        Returns:
            A summary of each layer of which any rank has seen rows.
        """
        self._join(labels, device)
        return {label: self._summary(self._layers[label]) for label in labels if label in self._layers}

    def state(self) -> State:
        """The sums of this rank."""
        return {label: {key: _state(metric) for key, metric in own.items()} for label, own in self._layers.items()}

    def state_of_all_ranks(self, labels: Sequence[str], device: torch.device) -> State:
        """The sums over all ranks, which must all ask at the same time; see `summaries`."""
        self._join(labels, device)
        return {
            label: {key: _synced_state(metric) for key, metric in self._layers[label].items()}
            for label in labels
            if label in self._layers
        }

    def load_state(self, state: Mapping[str, Mapping[str, Mapping[str, Tensor]]], device: torch.device) -> None:
        """Go on from the sums in ``state``."""
        self._layers.clear()
        for label, states in state.items():
            self._layers[label] = own = self._new(len(states["unit"]["gram"]), device)
            for key, metric in own.items():
                for name, value in states[key].items():
                    held = getattr(metric, name)
                    setattr(metric, name, [value.to(device)] if isinstance(held, list) else value.to(held))

    def reset(self) -> None:
        """Forget all rows."""
        self._layers.clear()

    def _new(self, num_features: int, device: torch.device) -> dict[str, Metric]:
        own: dict[str, Metric] = {"unit": VonNeumannEntropy(num_features)}  # of which the spectrum is read too
        if _OF_ROWS_AS_THEY_COME.keys() & set(self._metrics):
            own["raw"] = RankMe(num_features)
        if "alpha_req" in self._metrics:
            own["centred"] = AlphaReQ(num_features)
        if "uniformity" in self._metrics:
            own["rows"] = Uniformity(num_features)
        for metric in own.values():
            metric.to(device)
            metric.update(torch.empty(0, num_features, device=device))  # a rank may have no others
        return own

    def _join(self, labels: Sequence[str], device: torch.device) -> None:
        """Let this rank take part in the sums of layers whose rows only others have seen."""
        if not is_distributed():
            return
        own = [
            cast(GramMetric, self._layers[label]["unit"]).num_features if label in self._layers else 0
            for label in labels
        ]
        for label, width in zip(labels, agreed_widths(labels, own), strict=True):
            if width and label not in self._layers:
                self._layers[label] = self._new(width, device)

    def _summary(self, own: Mapping[str, Metric]) -> LayerSummary:
        unit = cast(GramMetric, own["unit"]).statistics()
        values = {}
        for name in self._metrics:
            if name in _OF_UNIT_ROWS:
                values[name] = unit.or_nan(_OF_UNIT_ROWS[name].from_statistics(unit))
            elif name in _OF_ROWS_AS_THEY_COME:
                raw = cast(GramMetric, own["raw"]).statistics()
                values[name] = raw.or_nan(_OF_ROWS_AS_THEY_COME[name].from_statistics(raw))
            else:
                values[name] = own["centred" if name == "alpha_req" else "rows"].compute()
        return LayerSummary(values, unit.or_nan(unit.eigenvalues))


def _state(metric: Metric) -> dict[str, Tensor]:
    held = metric.metric_state
    return {name: torch.cat(value) if isinstance(value, list) else value for name, value in held.items()}


def _synced_state(metric: Metric) -> dict[str, Tensor]:
    with metric.sync_context():
        return _state(metric)
