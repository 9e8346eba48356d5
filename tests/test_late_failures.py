"""Constructors refuse what would only fail in training, and take NumPy's numbers for numbers."""

import warnings
from collections.abc import Callable
from dataclasses import is_dataclass
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from torch import nn

from lightning_plugins._arguments import fits
from lightning_plugins.callbacks import (
    AttributionEvaluation,
    HybridCompression,
    LayerProbe,
    LowRankCompression,
    MaskScheduling,
    Phase,
    RankScheduling,
    RepresentationMonitor,
    SearchSettings,
    SpectrumMonitor,
    StableRankRegularization,
    Timing,
    VNERegularization,
    WeightRegularization,
)
from lightning_plugins.mixins import CompressionMixin, InnerSettings, MAMLMixin, StableRankMixin
from lightning_plugins.regularizers import StableRank
from tests.fuzzing import WRONG, Recorded, call, copied, is_named, is_record, parameters, public, recorded

NAMES = {name: value for name, value in public().items() if name.startswith(("callbacks.", "mixins."))}
BUILT = {name: value for name, value in NAMES.items() if isinstance(value, type) and not is_record(value)}
# What an annotation does not say: the signatures are also those of the command line, which has no functions.
FUNCTIONS = {("callbacks.Distillation", "teacher"), ("callbacks.RepresentationRegularization", "term")}
FUNCTIONS |= {("callbacks.WeightRegularization", "term")}


class Few(MAMLMixin, LightningModule):
    def __init__(self, **arguments: Any) -> None:
        super().__init__(nn.Linear(2, 2), nn.functional.mse_loss, **arguments)


class Small(CompressionMixin, StableRankMixin, nn.Sequential):
    pass


def small() -> Any:
    return Small(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))


@cache
def calls(name: str) -> dict[str, Recorded]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return recorded(BUILT[name])


@pytest.mark.parametrize("name", BUILT)
def test_constructors_refuse_what_their_annotations_do_not_say(name: str):
    """All arguments of all callbacks and mixins, with everything that is of another type."""
    accepted = []
    for known in calls(name).values():
        for parameter in parameters(known):
            for label, make in WRONG.items():
                value = make()
                if fits(value, parameter.annotation):
                    continue
                if callable(value) and (name, parameter.name) in FUNCTIONS:
                    continue
                given = {key: copied(one) for key, one in known.arguments.items()} | {parameter.name: value}
                try:
                    call(known, given)
                except Exception as error:
                    if not is_named(error, known.signature.parameters):
                        raise
                else:
                    accepted.append(f"{parameter.name}: {label}")
    assert accepted == []


def numbers_of(known: Recorded) -> dict[str, Any]:
    """The example's numbers as NumPy's."""
    kinds = {int: np.int64, float: np.float32}
    return {
        name: kinds[type(value)](value) if type(value) in kinds and float(np.float32(value)) == value else value
        for name, value in known.arguments.items()
    }


def held(value: Any) -> list[Any]:
    """List all that an object keeps, settings of settings included."""
    inside = vars(value).values() if is_dataclass(value) or isinstance(value, Callback) else ()
    return [value, *(part for one in inside for part in held(one))]


@pytest.mark.parametrize("name", [name for name in BUILT if name.startswith("callbacks.")])
def test_numpys_numbers_are_numbers_and_kept_as_pythons(name: str):
    known = calls(name)["__init__"]
    taken, wanted = call(known, numbers_of(known)), call(known, known.arguments)
    assert not [value for value in held(taken) if isinstance(value, np.generic)]
    assert getattr(taken, "state_key", taken) == getattr(wanted, "state_key", wanted)  # or a dataclass


LATE: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "a name as schedule": (lambda: VNERegularization("a", 0.1, schedule="cosine"), TypeError, "`schedule` must be a"),
    "a number as schedule": (
        lambda: HybridCompression("*", budget=0.5, phase=Phase(schedule=0.5)),
        TypeError,
        "`schedule` must be a Schedule",
    ),
    "a number as data": (
        lambda: LowRankCompression("*", search=SearchSettings(data=5)),
        TypeError,
        "`data` must be",
    ),
    "no time of the search": (
        lambda: LowRankCompression("*", timing=Timing(search_at=None)),
        TypeError,
        r"`search_at` must be a number in \[0, 1\], got None",
    ),
    "no begin": (
        lambda: MaskScheduling("*", budget=0.5, phase=Phase(begin=None)),
        TypeError,
        r"`begin` must be .*, got None",
    ),
    "no end": (
        lambda: RankScheduling("*", budget=0.5, phase=Phase(end=None)),
        TypeError,
        r"`end` must be .*, got None",
    ),
    "NaN as begin": (
        lambda: RankScheduling("*", budget=0.5, phase=Phase(begin=float("nan"))),
        ValueError,
        "`begin` must be",
    ),
    "a rank of no layer": (
        lambda: StableRankRegularization("a", 0.1, rank={0: 1}),
        TypeError,
        r"`rank` must be a mapping from names of layers to ranks, got 0 \(int\)",
    ),
    "a flag as text": (lambda: Few(inner=InnerSettings(first_order="False")), TypeError, "`first_order` must be"),
    "a flag as text, of figures": (lambda: SpectrumMonitor("a", figures="False"), TypeError, "`figures` must be True"),
    "a list of metrics": (lambda: Few(metrics=[]), TypeError, "`metrics` must be a dict"),
    "no metric": (lambda: RepresentationMonitor("a", metrics=[]), ValueError, "`metrics` must have at least one"),
    "no metric, of maps": (
        lambda: AttributionEvaluation("integrated_gradients", metrics=[]),
        ValueError,
        "`metrics` must have at least one",
    ),
    "no stage": (lambda: LayerProbe("a", targets=1, stages=[]), ValueError, "`stages` must name at least one"),
    "a scheme that is none": (
        lambda: WeightRegularization("a", StableRank(), 0.1, scheme=3),
        ValueError,
        "`scheme` must be 1 or 2, got 3",
    ),
    "a list as scheme": (lambda: SpectrumMonitor("a", scheme=[1]), ValueError, "`scheme` must be 1 or 2"),
    "a scheme of the mixin": (lambda: small().stable_rank_penalty("0", 1, scheme=3), ValueError, "`scheme` must be"),
    "a flag of the mixin": (
        lambda: small().attach_compression("0", budget=0.5, inputs=torch.zeros(1, 8), masks="no"),
        TypeError,
        "`masks` must be True or False",
    ),
}


@pytest.mark.parametrize("name", LATE)
def test_what_failed_in_training_fails_in_the_constructor(name: str):
    make, error, message = LATE[name]
    with pytest.raises(error, match=message):
        make()


def test_a_literal_of_numbers_takes_numpys():
    assert SpectrumMonitor("a", scheme=np.int64(2)).scheme == 2
