"""The settings in which every public callback keeps the contract, one row each, with what a user would write instead.

A later callback adds its rows here; the tests named ``test_contract*`` run over all of them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lightning_plugins._lightning import Callback  # the contract runs with both packages
from lightning_plugins.callbacks import (
    AttributionEvaluation,
    BatchKeys,
    CollapseAlarm,
    CollapseLimits,
    Distillation,
    EarlyTermination,
    LayerCall,
    LayerProbe,
    MatchedOutputs,
    MutualInformationMonitor,
    PointCloudAugmentation,
    Readout,
    RepresentationMonitor,
    RepresentationRegularization,
    SpectralNormCap,
    SpectrumMonitor,
    StableRankRegularization,
    VNERegularization,
    WeightRegularization,
)
from lightning_plugins.information import CriticSettings, EstimateSettings
from lightning_plugins.regularizers import CodingRate, SoftOrthogonality
from lightning_plugins.schedules import Linear
from tests.contract_by_hand import (
    BANK_FOLDER,
    CLOUDS,
    ByHand,
    CappedByHand,
    CloudsByHand,
    DistilledByHand,
    EmbeddingsByHand,
    MeanSquare,
    Model,
    WeightsByHand,
    tiny_bank,
)


@dataclass(frozen=True)
class Setting:
    """One row.

    Attributes:
        callbacks: Makes the callbacks; called once for every Trainer.
        by_hand: What to hand to `kind` to get the same training without them; None if they only look on.
        kind: The model that has their terms written out.
        tolerance: How near to it the training comes, where that is not as near as rounding errors.
        model: Arguments of the model.
        logged: The names they log, all of them.
        yaml: The same callbacks as LightningCLI reads them.
        sharded: Whether they work on sharded parameters; else `setup` refuses them.
        any_strategy: Whether they touch no parameter, no activation and no gradient, so that no strategy is refused.
    """

    callbacks: Callable[[], list[Callback]]
    by_hand: dict[str, Any] | None
    logged: tuple[str, ...]
    yaml: str
    model: dict[str, Any] = field(default_factory=dict)
    kind: type[Model] = ByHand
    tolerance: dict[str, float] = field(default_factory=dict)
    sharded: bool = True
    any_strategy: bool = False

    def make(self, kind: type[Model] = Model, **arguments: Any) -> Model:
        """The model that the callbacks are put on."""
        torch.manual_seed(0)
        return kind(**{**self.model, **arguments})

    def reference(self, **arguments: Any) -> Model:
        """The model, of the same weights, that needs no callbacks."""
        if self.by_hand is None:
            return self.make(**arguments)
        return self.make(self.kind, **self.by_hand, **arguments)

    @property
    def remembers(self) -> bool:
        """True if a batch is seen together with earlier ones."""
        return bool(self.by_hand and self.by_hand.get("queue_size"))


def assert_close(case: str, found: Any, wanted: Any, **tolerance: float) -> None:
    """For tests that go through many cases: the message begins with the name of the case."""
    torch.testing.assert_close(found, wanted, **tolerance, msg=lambda text: f"{case}: {text}")


def first_half(batch: Sequence[Tensor]) -> Tensor:
    """A truth: the first half of the features."""
    return torch.arange(batch[0].shape[1]).expand_as(batch[0]) < batch[0].shape[1] // 2


def unmasked(call: LayerCall) -> None:
    """A mask, named by its import path, that leaves everything in."""


def total(features: Tensor) -> Tensor:
    """A pool that is named by its import path."""
    return features.flatten(start_dim=1)


SETTINGS = {
    # 8 rows: of three columns ranks exchange the matrix, of twenty the rows
    "vne": Setting(
        lambda: [VNERegularization("head:input", weight=0.3)],
        by_hand={},
        model={"width": 3},
        logged=("vne/head/entropy", "vne/penalty"),
        yaml="""
- class_path: lightning_plugins.callbacks.VNERegularization
  init_args:
    layers: "head:input"
    weight: 0.3
    readout: {select: input, mask: tests.contract_table.unmasked, layout: NC}
""",
    ),
    "vne, more columns than rows": Setting(
        lambda: [VNERegularization("backbone", weight=-0.2, readout=Readout(pool=total))],
        by_hand={"weight": -0.2},
        model={"width": 20},
        logged=("vne/backbone/entropy", "vne/penalty"),
        yaml="""
- class_path: lightning_plugins.callbacks.VNERegularization
  init_args: {layers: backbone, weight: -0.2, readout: {pool: tests.contract_table.total}}
""",
    ),
    "vne, queue": Setting(
        lambda: [VNERegularization("backbone", weight=0.3, queue_size=11)],
        by_hand={"queue_size": 11},
        logged=("vne/backbone/entropy", "vne/penalty"),
        yaml="""
- class_path: lightning_plugins.callbacks.VNERegularization
  init_args: {layers: backbone, weight: 0.3, queue_size: 11, scope: global, method: eigh, on_nonfinite: raise}
""",
    ),
    "vne, schedule": Setting(
        lambda: [VNERegularization("backbone", weight=0.3, schedule=Linear(0.0, 1.0, begin=1, until=6, unit="steps"))],
        by_hand={"factor": lambda step, end: min(max((step - 1) / 5, 0.0), 1.0)},
        logged=("vne/backbone/entropy", "vne/penalty"),
        yaml="""
- class_path: lightning_plugins.callbacks.VNERegularization
  init_args:
    layers: backbone
    weight: 0.3
    schedule:
      class_path: lightning_plugins.schedules.Linear
      init_args: {start: 0.0, end: 1.0, begin: 1, until: 6, unit: steps}
""",
    ),
    "vne, several layers": Setting(
        lambda: [VNERegularization(["backbone.1", "head:input"], weight=0.1)],
        by_hand={"layers": ("first", "head"), "weight": 0.1},
        logged=("vne/backbone.1/entropy", "vne/head/entropy", "vne/penalty"),
        yaml="""
- class_path: lightning_plugins.callbacks.VNERegularization
  init_args: {layers: ["backbone.1", "head:input"], weight: 0.1, readout: {pool: flatten, layout: NC}}
""",
    ),
    "vne, all at once": Setting(
        lambda: [
            VNERegularization("backbone", 0.1, queue_size=11, every_n_steps=2, schedule=Linear(1, 0.5, until=0.5)),
        ],
        by_hand={
            "weight": 0.1,
            "queue_size": 11,
            "every_n_steps": 2,
            "factor": lambda step, end: max(1 - step / end, 0.5),
        },
        model={"views": 2},
        logged=("vne/backbone/entropy", "vne/penalty"),
        yaml="""
- class_path: lightning_plugins.callbacks.VNERegularization
  init_args:
    layers: backbone
    weight: 0.1
    queue_size: 11
    every_n_steps: 2
    schedule: {class_path: lightning_plugins.schedules.Linear, init_args: {start: 1, end: 0.5, until: 0.5}}
""",
    ),
    "vne twice": Setting(
        lambda: [VNERegularization("backbone.1", weight=0.1), VNERegularization("backbone", weight=0.1)],
        by_hand={"layers": ("first", "head"), "weight": 0.1},
        logged=("vne/backbone.1/entropy", "vne/backbone/entropy", "vne/penalty"),
        yaml="""
- class_path: lightning_plugins.callbacks.VNERegularization
  init_args: {layers: backbone.1, weight: 0.1}
- class_path: lightning_plugins.callbacks.VNERegularization
  init_args: {layers: backbone, weight: 0.1}
""",
    ),
    "monitor": Setting(
        lambda: [
            RepresentationMonitor(
                ["backbone.1", "head:input"], every_n_steps=1, metrics=["entropy", "uniformity"], figures=False
            )
        ],
        by_hand=None,
        logged=tuple(
            f"representation/train/{layer}/{metric}"
            for layer in ("backbone.1", "head")
            for metric in ("entropy", "uniformity")
        ),
        yaml="""
- class_path: lightning_plugins.callbacks.RepresentationMonitor
  init_args:
    layers: ["backbone.1", "head:input"]
    every_n_steps: 1
    metrics: [entropy, uniformity]
    readout: {pool: tests.contract_table.total, mask: tests.contract_table.unmasked, layout: NC}
    figures: true
    max_spectra: 4
""",
    ),
    "vne and monitor": Setting(
        lambda: [
            RepresentationMonitor("backbone", every_n_steps=2, metrics=["rankme"], figures=False),
            VNERegularization("backbone", weight=0.3),
        ],
        by_hand={},
        logged=("vne/backbone/entropy", "vne/penalty", "representation/train/backbone/rankme"),
        yaml="""
- class_path: lightning_plugins.callbacks.RepresentationMonitor
  init_args: {layers: backbone, every_n_steps: 2, metrics: [rankme], figures: false}
- class_path: lightning_plugins.callbacks.VNERegularization
  init_args: {layers: backbone, weight: 0.3}
""",
    ),
    "stable rank": Setting(
        lambda: [StableRankRegularization("*", weight=0.3)],
        by_hand={},
        kind=WeightsByHand,
        logged=("stable_rank/backbone.0", "stable_rank/backbone.2", "stable_rank/head", "stable_rank/penalty"),
        yaml="""
- class_path: lightning_plugins.callbacks.StableRankRegularization
  init_args: {layers: "*", weight: 0.3, scheme: 1, on_nonfinite: raise}
""",
    ),
    "stable rank, tail": Setting(
        lambda: [StableRankRegularization(["backbone.0", "head"], weight=0.2, rank=2)],
        by_hand={"layers": ("backbone.0", "head"), "weight": 0.2, "rank": 2},
        kind=WeightsByHand,
        logged=("stable_rank/backbone.0", "stable_rank/head", "stable_rank/penalty"),
        yaml="""
- class_path: lightning_plugins.callbacks.StableRankRegularization
  init_args: {layers: [backbone.0, head], weight: 0.2, rank: {backbone.0: 2, head: 2}}
""",
    ),
    # A weight large enough to follow its leading singular vectors from step to step.
    "stable rank, followed": Setting(
        lambda: [StableRankRegularization("backbone.2", weight=0.05, rank=2, p=2)],
        by_hand={"layers": ("backbone.2",), "weight": 0.05, "rank": 2, "p": 2},
        kind=WeightsByHand,
        model={"hidden": 24, "width": 20},
        tolerance={"rtol": 1e-3, "atol": 5e-4},
        logged=("stable_rank/backbone.2", "stable_rank/penalty"),
        yaml="""
- class_path: lightning_plugins.callbacks.StableRankRegularization
  init_args: {layers: backbone.2, weight: 0.05, rank: 2, p: 2}
""",
    ),
    "stable rank, all at once": Setting(
        lambda: [
            StableRankRegularization("*", 0.1, rank=2, every_n_steps=3, schedule=Linear(1, 0.5, until=0.5)),
            VNERegularization("backbone", weight=0.0),
        ],
        by_hand={
            "weight": 0.1,
            "rank": 2,
            "every_n_steps": 3,
            "factor": lambda step, end: max(1 - step / end, 0.5),
        },
        kind=WeightsByHand,
        model={"views": 2},
        logged=(
            *(f"stable_rank/{name}" for name in ("backbone.0", "backbone.2", "head", "penalty")),
            *(f"vne/{name}" for name in ("backbone/entropy", "penalty")),
        ),
        yaml="""
- class_path: lightning_plugins.callbacks.StableRankRegularization
  init_args:
    layers: "*"
    weight: 0.1
    rank: 2
    every_n_steps: 3
    schedule: {class_path: lightning_plugins.schedules.Linear, init_args: {start: 1, end: 0.5, until: 0.5}}
- class_path: lightning_plugins.callbacks.VNERegularization
  init_args: {layers: backbone, weight: 0.0}
""",
    ),
    "representation": Setting(
        lambda: [RepresentationRegularization("head:input", CodingRate(), weight=0.15)],
        by_hand={},
        kind=EmbeddingsByHand,
        logged=("coding_rate/head", "coding_rate/penalty"),
        yaml="""
- class_path: lightning_plugins.callbacks.RepresentationRegularization
  init_args:
    layers: head:input
    term: {class_path: lightning_plugins.regularizers.CodingRate, init_args: {distortion: 0.5}}
    weight: 0.15
    readout: {layout: NC}
""",
    ),
    "representation, all at once": Setting(
        lambda: [
            RepresentationRegularization(
                "backbone",
                MeanSquare(2.0),
                weight=0.3,
                name="own",
                queue_size=11,
                every_n_steps=2,
                schedule=Linear(1, 0.5, until=0.5),
            )
        ],
        by_hand={
            "term": lambda rows: 2 * rows.square().mean(),
            "weight": -0.3,
            "queue_size": 11,
            "every_n_steps": 2,
            "factor": lambda step, end: max(1 - step / end, 0.5),
        },
        kind=EmbeddingsByHand,
        model={"views": 2},
        logged=("own/backbone", "own/penalty"),
        yaml="""
- class_path: lightning_plugins.callbacks.RepresentationRegularization
  init_args:
    layers: backbone
    term: {class_path: tests.contract_by_hand.MeanSquare, init_args: {factor: 2.0}}
    weight: 0.3
    name: own
    readout: {pool: mean}
    queue_size: 11
    every_n_steps: 2
    schedule: {class_path: lightning_plugins.schedules.Linear, init_args: {start: 1, end: 0.5, until: 0.5}}
    on_nonfinite: raise
""",
    ),
    "weight term": Setting(
        lambda: [WeightRegularization("*", SoftOrthogonality(), weight=0.1)],
        by_hand={
            "weight": 0.1,
            "term": lambda w: ((torch.linalg.svdvals(w.double()) ** 2 - 1) ** 2).sum(),
        },
        kind=WeightsByHand,
        logged=tuple(f"soft_orthogonality/{name}" for name in ("backbone.0", "backbone.2", "head", "penalty")),
        yaml="""
- class_path: lightning_plugins.callbacks.WeightRegularization
  init_args:
    layers: "*"
    term: {class_path: lightning_plugins.regularizers.SoftOrthogonality, init_args: {weight: 1.0}}
    weight: 0.1
    scheme: 1
    on_nonfinite: raise
""",
    ),
    "weight term, all at once": Setting(
        lambda: [
            WeightRegularization(
                ["backbone.0", "head"],
                MeanSquare(2.0),
                weight=3.0,
                name="own",
                every_n_steps=3,
                schedule=Linear(1, 0.5, until=0.5),
            )
        ],
        by_hand={
            "layers": ("backbone.0", "head"),
            "weight": 3.0,
            "term": lambda w: 2 * w.double().square().mean(),
            "every_n_steps": 3,
            "factor": lambda step, end: max(1 - step / end, 0.5),
        },
        kind=WeightsByHand,
        logged=("own/backbone.0", "own/head", "own/penalty"),
        yaml="""
- class_path: lightning_plugins.callbacks.WeightRegularization
  init_args:
    layers: [backbone.0, head]
    term: {class_path: tests.contract_by_hand.MeanSquare, init_args: {factor: 2.0}}
    weight: 3.0
    name: own
    every_n_steps: 3
    schedule: {class_path: lightning_plugins.schedules.Linear, init_args: {start: 1, end: 0.5, until: 0.5}}
""",
    ),
    "spectral norm cap": Setting(
        lambda: [SpectralNormCap("*", 0.5)],
        by_hand={},
        kind=CappedByHand,
        logged=tuple(f"spectral_norm_cap/{name}" for name in ("backbone.0", "backbone.2", "head")),
        yaml="""
- class_path: lightning_plugins.callbacks.SpectralNormCap
  init_args: {layers: "*", maximum: 0.5, of: weight, scheme: 1, every_n_steps: 1}
""",
    ),
    "collapse alarm": Setting(
        lambda: [
            CollapseAlarm(
                ["backbone.1", "head:input"], limits=CollapseLimits(share=0.1, minimum=1.5, patience=2), every_n_steps=2
            ),
            CollapseAlarm("backbone", "rankme", CollapseLimits(drop=0.9), queue_size=11, every_n_steps=3),
        ],
        by_hand=None,
        logged=("collapse/backbone.1/effective_rank", "collapse/head/effective_rank", "collapse/backbone/rankme"),
        yaml="""
- class_path: lightning_plugins.callbacks.CollapseAlarm
  init_args:
    layers: [backbone.1, "head:input"]
    metric: effective_rank
    limits: {share: 0.1, minimum: 1.5, patience: 2}
    every_n_steps: 2
    action: warn
    readout: {layout: NC}
    dirpath: .
- class_path: lightning_plugins.callbacks.CollapseAlarm
  init_args: {layers: backbone, metric: rankme, limits: {drop: 0.9}, queue_size: 11, every_n_steps: 3}
""",
    ),
    "spectrum monitor": Setting(
        lambda: [SpectrumMonitor("*", every_n_steps=2, figures=False)],
        by_hand=None,
        logged=tuple(
            f"spectrum/{layer}/{number}"
            for layer in ("backbone.0", "backbone.2", "head")
            for number in ("stable_rank", "effective_rank", "spectral_norm", "tail_exponent")
        ),
        yaml="""
- class_path: lightning_plugins.callbacks.SpectrumMonitor
  init_args: {layers: [backbone.0, backbone.2, head], every_n_steps: 2, scheme: 1, figures: false, max_spectra: 32}
""",
    ),
    "mutual information": Setting(
        lambda: [
            MutualInformationMonitor(
                "backbone",
                pairs="halves",
                loss_candidates=8,
                settings=EstimateSettings(critic="bilinear", fit=CriticSettings(max_steps=0)),
            )
        ],
        by_hand=None,
        logged=(),  # at the end of validations only
        yaml="""
- class_path: lightning_plugins.callbacks.MutualInformationMonitor
  init_args:
    layers: backbone
    readout: {pool: tests.contract_table.total}
    pairs: halves
    labels: 1
    loss_candidates: 8
    every_n_epochs: 2
    max_pairs: 64
    settings:
      class_path: lightning_plugins.information.EstimateSettings
      init_args: {critic: bilinear, units: bits, fit: {max_steps: 0}}
""",
    ),
    "early termination": Setting(
        lambda: [EarlyTermination("val_loss", history="curves.jsonl", total=1000)],
        by_hand=None,
        logged=(),
        any_strategy=True,
        yaml="""
- class_path: lightning_plugins.callbacks.EarlyTermination
  init_args:
    monitor: val_loss
    trial: null
    history: curves.jsonl
    total: 1000
    rule: {class_path: lightning_plugins.search.TercetRule, init_args: {fractions: [0.5], quantiles: [0.2], mode: max}}
""",
    ),
    "layer probe": Setting(
        lambda: [
            LayerProbe(["backbone.1", "head:input"], 1, stages=["train", "val"], figures=False),
        ],
        by_hand=None,
        logged=tuple(
            f"probe/train/{layer}/{number}"
            for layer in ("backbone.1", "head")
            for number in (
                *("r2", "selectivity", "pearson", "rmse", "v_information"),
                *("evidence", "description_length", "control_r2"),
            )
        ),
        yaml="""
- class_path: lightning_plugins.callbacks.LayerProbe
  init_args:
    layers: ["backbone.1", "head:input"]
    targets: 1
    groups: null
    mask: null
    positions: mean
    probe: {folds: 4, weight: group}
    stages: [train, val]
    controls: [projection]
    figures: false
""",
    ),
    "layer probe of classes": Setting(
        lambda: [
            LayerProbe(
                "backbone.1",
                1,
                stages=["train"],
                probe={"task": "classification", "num_targets": 3, "reservoir": 20},
                controls=["projection"],
                figures=False,
            ),
        ],
        by_hand=None,
        logged=tuple(
            f"probe/train/{layer}/{number}"
            for layer in ("backbone.1", "projection")
            for number in ("accuracy", "selectivity", "control_accuracy")
        ),
        yaml="""
- class_path: lightning_plugins.callbacks.LayerProbe
  init_args:
    layers: backbone.1
    targets: 1
    probe: {task: classification, num_targets: 3, reservoir: 20}
    stages: [train]
    controls: [projection]
    figures: false
""",
    ),
    "attribution evaluation": Setting(
        lambda: [
            AttributionEvaluation(
                ["saliency"], batch=BatchKeys(mask=first_half), metrics=["iou"], stage="validate", examples=0
            ),
        ],
        by_hand=None,
        logged=(),  # in validation alone
        sharded=False,
        yaml="""
- class_path: lightning_plugins.callbacks.AttributionEvaluation
  init_args:
    methods: {saliency: null}
    batch: {inputs: 0, target: 1, mask: tests.contract_table.first_half}
    metrics: [iou]
    stage: validate
    network: null
    samples: {select: 0.1, classes: [0, 1, 2], max_samples: 20}
    absolute: both
    max_forward_batch: 64
    examples: 0
""",
    ),
    "distillation": Setting(
        lambda: [Distillation(outputs=MatchedOutputs(temperature=2.0), weight=30.0)],
        by_hand={"temperature": 2.0, "weight": 30.0},
        kind=DistilledByHand,
        logged=("distillation/outputs", "distillation/penalty"),
        yaml="""
- class_path: lightning_plugins.callbacks.Distillation
  init_args: {teacher: start, outputs: {temperature: 2.0, loss: kl}, weight: 30.0}
""",
    ),
    "distillation, layers": Setting(
        lambda: [
            Distillation(
                layers=["backbone.1"],
                outputs=MatchedOutputs(temperature=2.0),
                weight=30.0,
                schedule=Linear(1, 0.5, until=0.5),
            )
        ],
        by_hand={
            "layers": (1,),
            "temperature": 2.0,
            "weight": 30.0,
            "factor": lambda step, end: max(1 - step / end, 0.5),
        },
        kind=DistilledByHand,
        logged=tuple(f"distillation/{name}" for name in ("outputs", "backbone.1", "penalty")),
        yaml="""
- class_path: lightning_plugins.callbacks.Distillation
  init_args:
    teacher: start
    outputs: {select: null, temperature: 2.0}
    layers: {backbone.1: backbone.1}
    network: ""
    weight: 30.0
    mask: null
    layout: null
    projection_rate: 0.001
    schedule: {class_path: lightning_plugins.schedules.Linear, init_args: {start: 1, end: 0.5, until: 0.5}}
""",
    ),
    "point cloud augmentation": Setting(
        lambda: [
            PointCloudAugmentation(
                tiny_bank(), schedule=Linear(1.0, 0.0, begin=2, until=7, unit="steps"), pool_size=4, **CLOUDS
            )
        ],
        by_hand={},
        kind=CloudsByHand,
        model={"clouds": True},
        logged=("point_cloud/share",),
        any_strategy=True,
        yaml=f"""
- class_path: lightning_plugins.callbacks.PointCloudAugmentation
  init_args:
    bank: {BANK_FOLDER.name}
    targets: {{Car: 3}}
    schedule:
      class_path: lightning_plugins.schedules.Linear
      init_args: {{start: 1.0, end: 0.0, begin: 2, until: 7, unit: steps}}
    grid: {{rows: 8, columns: 64, lowest: -0.4, highest: 0.4}}
    area: [[5.0, 20.0], [-9.0, 9.0]]
    pool_size: 4
    max_points: 50
    seed: 3
""",
    ),
}
