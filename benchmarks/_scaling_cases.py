"""The callbacks measured by `scaling.py`, with their exchanges on paper."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from _scaling_exchanges import (
    BATCHES,
    Exchanges,
    Size,
    of_alarm,
    of_alarm_queue,
    of_both,
    of_cap,
    of_distance,
    of_gradients,
    of_maps,
    of_masks,
    of_monitor,
    of_pairs,
    of_probe,
    of_ranks,
    of_rows,
    of_spectrum,
    of_stable_rank,
    of_vne,
)
from lightning.pytorch import Callback
from torch import Tensor, nn

from lightning_plugins.callbacks import (
    CollapseAlarm,
    Distillation,
    HybridCompression,
    LayerProbe,
    LowRankCompression,
    MaskScheduling,
    MutualInformationMonitor,
    Phase,
    RankScheduling,
    RepresentationMonitor,
    RepresentationRegularization,
    SpectralNormCap,
    SpectrumMonitor,
    StableRankRegularization,
    Timing,
    VNERegularization,
    WeightRegularization,
)
from lightning_plugins.information import CriticSettings, EstimateSettings
from lightning_plugins.regularizers import Decorrelation, SoftOrthogonality

RANKS = 8  # of the split that `LowRankCompression` regularizes for

Unit = Literal["step", "epoch", "validation"]


class Layers(nn.Sequential):
    """A number of square layers with activations in between."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        for index in range(depth):
            self.add_module(f"layer{index}", nn.Linear(width, width, bias=False))
            self.add_module(f"between{index}", nn.Tanh())


class Wide(nn.Module):
    """A teacher whose layers have twice as many features."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        for index in range(depth):
            self.add_module(f"layer{index}", nn.Linear(width, 2 * width))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.children():
            x = layer(x)[:, : x.shape[1]]
        return x


LAYERS = "net.layer*"


def distil_layers(size: Size) -> Callback:
    names = [f"layer{index}" for index in range(size.depth)]
    return Distillation(Wide(size.width, size.depth), network="net", outputs=False, layers=names)


def compress(kind: type[Callback], **settings: Any) -> Callable[[Size], Callback]:
    """Settings that keep the selection phase active during all measured steps."""
    phase = Phase(begin=0, end=1000, unit="steps")
    return lambda _: kind(LAYERS, 0.5, cost="params", phase=phase, figures=False, **settings)


def low_rank(size: Size) -> Callback:
    ranks = {f"net.layer{index}": RANKS for index in range(size.depth)}
    timing = Timing(search_at=0, factorize_at=None, unit="steps")
    return LowRankCompression(LAYERS, penalty=0.01, ranks=ranks, timing=timing, figures=False)


@dataclass(frozen=True)
class Case:
    """A callback with its exchanges.

    Attributes:
        make: Makes it.
        exchanges: Its exchanges per unit.
        unit: What "each time" is.
        sizes: Rows, width and depth that it is measured at.
    """

    make: Callable[[Size], Callback]
    exchanges: Callable[[Size], Exchanges]
    unit: Unit
    sizes: tuple[tuple[int, int, int], ...]


def mutual_information(_: Size) -> Callback:
    settings = EstimateSettings(critic="bilinear", fit=CriticSettings(max_steps=0))
    return MutualInformationMonitor(LAYERS, pairs="halves", max_pairs=64, settings=settings)


CASES = {
    "VNERegularization": Case(
        lambda _: VNERegularization(LAYERS, 0.1),
        of_vne,
        "step",
        ((128, 64, 2), (512, 64, 2), (16, 64, 2), (16, 256, 2), (128, 64, 6)),
    ),
    "VNERegularization, queue": Case(
        lambda _: VNERegularization(LAYERS, 0.1, queue_size=256), of_rows, "step", ((64, 128, 2),)
    ),
    "RepresentationRegularization": Case(
        lambda _: RepresentationRegularization(LAYERS, Decorrelation()), of_rows, "step", ((64, 64, 2), (16, 256, 2))
    ),
    "StableRankRegularization": Case(
        lambda _: StableRankRegularization(LAYERS, 0.01), of_stable_rank, "step", ((16, 128, 8), (16, 256, 3))
    ),
    "WeightRegularization": Case(
        lambda _: WeightRegularization(LAYERS, SoftOrthogonality(), 0.01),
        of_gradients,
        "step",
        ((16, 64, 8), (16, 128, 3)),
    ),
    "SpectralNormCap": Case(lambda _: SpectralNormCap(LAYERS, 1.0), of_cap, "step", ((16, 256, 8),)),
    "LowRankCompression, behind its search": Case(low_rank, of_gradients, "step", ((16, 128, 4),)),
    "MaskScheduling": Case(compress(MaskScheduling), of_masks, "step", ((16, 128, 4),)),
    "RankScheduling": Case(compress(RankScheduling), of_ranks, "step", ((16, 64, 4),)),
    "HybridCompression": Case(compress(HybridCompression), of_both, "step", ((16, 64, 4),)),
    "Distillation, outputs": Case(lambda _: Distillation(network="net"), of_distance, "step", ((16, 64, 2),)),
    "Distillation, layers of another width": Case(distil_layers, of_maps, "step", ((16, 128, 2),)),
    "CollapseAlarm": Case(
        lambda _: CollapseAlarm(LAYERS, limits=0.1, every_n_steps=1), of_alarm, "step", ((64, 64, 2), (64, 64, 6))
    ),
    "CollapseAlarm, queue": Case(
        lambda _: CollapseAlarm(LAYERS, limits=0.1, every_n_steps=1, queue_size=64),
        of_alarm_queue,
        "step",
        ((64, 64, 2),),
    ),
    "SpectrumMonitor": Case(
        lambda _: SpectrumMonitor(LAYERS, every_n_steps=1, figures=False), of_spectrum, "step", ((16, 256, 8),)
    ),
    "RepresentationMonitor": Case(
        lambda _: RepresentationMonitor(LAYERS, every_n_steps=1, metrics=["entropy"], figures=False),
        of_monitor,
        "epoch",
        ((16, 128, 2), (64, 256, 2)),
    ),
    "LayerProbe": Case(
        lambda _: LayerProbe(LAYERS, 1, stages=["train"], figures=False), of_probe, "epoch", ((64, 64, 2),)
    ),
    "MutualInformationMonitor": Case(mutual_information, of_pairs, "validation", ((64, 64, 2),)),
}
# Callbacks that exchange nothing in a training step, or occasionally a few numbers.
REST = {
    "AttributionEvaluation": "a few numbers per method and metric at the end of a validation",
    "EarlyTermination": "the decision, a few bytes, at the end of a validation",
    "CalibrationRecorder": "the moments of each layer at the end of training, like the matrices of `CollapseAlarm`",
    "PointCloudAugmentation": "nothing",
    "LowRankCompression, MaskScheduling, RankScheduling, HybridCompression": "once: the search's evaluations, one "
    "number each, or the choice",
}


def data_of(size: Size) -> list[tuple[Tensor, Tensor]]:
    """The batches of this process."""
    return [(torch.randn(size.rows, size.width), torch.randn(size.rows)) for _ in range(BATCHES)]
