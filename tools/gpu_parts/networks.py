"""A network wide enough for the code paths used on a GPU, and callbacks with settings that use them."""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from lightning_plugins.callbacks import (
    CalibrationRecorder,
    CollapseAlarm,
    Distillation,
    HybridCompression,
    LayerProbe,
    LowRankCompression,
    MaskScheduling,
    MatchedOutputs,
    Penalty,
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
from lightning_plugins.compression import ChoiceRates
from lightning_plugins.regularizers import CodingRate, SoftOrthogonality

WIDTH, CLASSES, ROWS = 128, 10, 96
LATER = {
    "cost": "params",
    "phase": Phase(begin=1, end=10_000, unit="steps"),
    "figures": False,
}  # the selection phase is active in every step
EVERY_FOURTH, EVERY_OTHER = ChoiceRates(refresh_every=4), ChoiceRates(update_every=2)
RANKS = {"backbone.0": 16, "backbone.2": 16}

CALLBACKS: dict[str, Callable[[], Callback]] = {
    "vne": lambda: VNERegularization("backbone", 0.3, method="products"),
    "vne, queue": lambda: VNERegularization("backbone", 0.3, queue_size=128, method="products"),
    "stable rank": lambda: StableRankRegularization("backbone*", 0.01),
    "stable rank, p=2": lambda: StableRankRegularization("backbone*", 0.01, rank=16, p=2),
    "stable rank, p=1": lambda: StableRankRegularization("backbone*", 0.01, rank=16, p=1),
    "coding rate": lambda: RepresentationRegularization("backbone", CodingRate(), weight=0.01),
    "soft orthogonality": lambda: WeightRegularization("backbone*", SoftOrthogonality(), weight=0.01),
    "spectral norm cap": lambda: SpectralNormCap("backbone*", 2.0),
    "distillation": lambda: Distillation(outputs=MatchedOutputs(temperature=2.0), weight=1.0),
    "collapse alarm": lambda: CollapseAlarm("backbone", limits=1.1, every_n_steps=10_000),
    "representation monitor": lambda: RepresentationMonitor("backbone", every_n_steps=1, figures=False),
    "spectrum monitor": lambda: SpectrumMonitor("*", every_n_steps=10_000, figures=False),
    "layer probe": lambda: LayerProbe("backbone.1", 1, stages=["train"], controls=["projection"], figures=False),
    "calibration": lambda: CalibrationRecorder("backbone*"),
    "low-rank compression": lambda: LowRankCompression(
        "backbone*", penalty=Penalty(weight=0.01, p=2), ranks=RANKS, timing=Timing(search_at=0, factorize_at=None)
    ),
    "masks": lambda: MaskScheduling("*", 0.5, **LATER),
    "masks by magnitude": lambda: MaskScheduling("*", 0.5, criterion="magnitude", rates=EVERY_OTHER, **LATER),
    "ranks": lambda: RankScheduling("*", 0.5, **LATER),
    "ranks, every fourth": lambda: RankScheduling("*", 0.5, rates=EVERY_FOURTH, **LATER),
    "hybrid": lambda: HybridCompression("*", 0.5, **LATER),
    "hybrid, every fourth": lambda: HybridCompression("*", 0.5, rates=EVERY_FOURTH, **LATER),
}
# Callbacks without a part in a training step, with the reason.
NOT_IN_A_STEP = {
    "AttributionEvaluation": "explains batches of a validation or test, outside of training steps",
    "EarlyTermination": "decides on the CPU, once an epoch, from a metric that is logged",
    "LayerCall": "what a mask is made from; no callback",
    **dict.fromkeys(("BatchKeys", "SampleSelection"), "an argument of `AttributionEvaluation`"),
    **dict.fromkeys(("Penalty", "SearchSettings", "Timing"), "an argument of `LowRankCompression`"),
    "CollapseLimits": "an argument of `CollapseAlarm`",
    "MatchedOutputs": "an argument of `Distillation`",
    "Phase": "an argument of the callbacks that choose channels and ranks",
    "Readout": "an argument of the callbacks that read representations",
    "MutualInformationMonitor": "adds up the loss of a contrastive module; it fits its critic after a validation",
    "PointCloudAugmentation": "changes batches of point clouds, with the functions that `numerics` goes through",
    "RepresentationCollapseError": "an error",
    "probe_layers": "a loop of its own over batches, with what `LayerProbe` does to each",
}
# Callbacks that differ from bare training in ways other than the gradient of a term.
TERMS = ("vne", "stable rank", "stable rank, p=2", "stable rank, p=1", "coding rate", "soft orthogonality")
FEW = ("vne, queue", "stable rank, p=2", "representation monitor", "hybrid")  # enough for a test of the check itself


def names_for(tiny: bool) -> tuple[str, ...]:
    """The callbacks tested by a part."""
    return FEW if tiny else tuple(CALLBACKS)


class Wide(LightningModule):
    """Two hidden layers of 128 units."""

    def __init__(self, optimizer: str = "sgd") -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(64, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH), nn.Tanh())
        self.head = nn.Linear(WIDTH, CLASSES)
        self.example_input_array = torch.zeros(2, 64)
        self.optimizer = optimizer

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(x))

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        if self.optimizer == "fused adamw":
            return torch.optim.AdamW(self.parameters(), lr=1e-3, fused=True)
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


def batches(count: int) -> list[tuple[Tensor, Tensor]]:
    """Batches, the first of which do not depend on their number."""
    found = []
    for seed in range(count):
        generator = torch.Generator().manual_seed(seed)
        labels = torch.randint(CLASSES, (ROWS,), generator=generator)
        found.append((torch.randn(ROWS, 64, generator=generator), labels))
    return found


def wide(optimizer: str = "sgd") -> Wide:
    torch.manual_seed(0)
    return Wide(optimizer)


def fit(model: Any, data: Sequence[Any], callbacks: Sequence[Callback], device: str, **settings: Any) -> Trainer:
    """Train once through the batches, without output."""
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    accelerator = "gpu" if device == "cuda" else "cpu"
    trainer = Trainer(
        **{"accelerator": accelerator, "devices": 1, "max_epochs": 1, **quiet, **settings}, callbacks=list(callbacks)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "nothing was removed": training ends before the selection
        trainer.fit(model, torch.utils.data.DataLoader(list(data), batch_size=None))
    return trainer


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """On the CPU, by plain names."""
    return {name.replace("_orig_mod.", ""): value.detach().cpu() for name, value in model.state_dict().items()}


def largest_difference(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """The largest absolute difference of any weight; raises an error if names or shapes differ."""
    if found.keys() != wanted.keys():
        raise LookupError(f"other weights: {sorted(found.keys() ^ wanted.keys())}")
    return max(float((found[name].double() - wanted[name].double()).abs().max()) for name in wanted)
