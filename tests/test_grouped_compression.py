"""Arguments of compressions that became fields of dataclasses: older names in Python, nested mappings in YAML."""

import io
import sys
import warnings
from collections.abc import Callable
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from jsonargparse import ArgumentParser
from lightning.pytorch.cli import LightningCLI
from torch import nn

from lightning_plugins.callbacks import (
    HybridCompression,
    LowRankCompression,
    MaskScheduling,
    Penalty,
    Phase,
    RankScheduling,
    SearchSettings,
    Timing,
)
from lightning_plugins.compression import BeamOptions, ChoiceRates, Limits, beam_search
from lightning_plugins.mixins import CompressionMixin
from lightning_plugins.schedules import Cubic
from tests.models import Classifier


class Net(CompressionMixin, nn.Sequential):
    """Four layers in two."""


def attached(**arguments: Any) -> Any:
    """Settings of a network in which channels are chosen by hand."""
    net = Net(nn.Linear(4, 12), nn.ReLU(), nn.Linear(12, 2))
    net.attach_compression("0", budget=0.9, inputs=torch.zeros(1, 4), ranks=False, **arguments)
    return vars(net)["_compression"][0].settings


def searched(layers: str, **arguments: Any) -> Any:
    """Search ranks of random weights."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 12), nn.ReLU(), nn.Linear(12, 8))
    return beam_search(net, [torch.ones(3, 4)], lambda n, x: n(x).tanh().mean(), budget=0.7, layers=layers, **arguments)


def everything_of(callback: LowRankCompression) -> dict[str, Any]:
    """All that a callback keeps, but what differs between equal ones."""
    kept = ("layers", "figures", "weight", "scheme", "cost", "budget", "search_at", "factorize_at", "unit")
    return {name: vars(callback)[name] for name in (*kept, "_settings", "_source")}


SCHEDULE = Cubic(0.0, 1.0, begin=2, until=9, unit="steps")
PHASE = {"begin": 2, "end": 9, "unit": "steps", "schedule": SCHEDULE}
# The callable, older arguments, arguments, and their settings
OLDER: dict[str, tuple[Callable[..., Any], dict[str, Any], dict[str, Any], Callable[[Any], Any]]] = {
    "hybrid": (
        HybridCompression,
        {**PHASE, "keep": "head", "min_channels": 2, "multiple_of": 4, "learning_rate": 0.1, "beta_max": 50}
        | {"threshold_learning_rate": 0.01, "refresh_every": 3},
        {
            "phase": Phase(**PHASE),
            "limits": Limits(keep="head", min_size=2, multiple_of=4),
            "rates": ChoiceRates(scores=0.1, thresholds=0.01, beta_max=50, refresh_every=3),
        },
        lambda made: made.settings,
    ),
    "masks": (
        MaskScheduling,
        {"end": 0.5, "min_channels": 2, "learning_rate": 0.1, "beta_max": 50, "update_every": 3},
        {
            "phase": Phase(end=0.5),
            "limits": Limits(min_size=2),
            "rates": ChoiceRates(scores=0.1, beta_max=50, update_every=3),
        },
        lambda made: made.settings,
    ),
    "ranks": (
        RankScheduling,
        {"end": 0.5, "min_rank": 2, "keep": ["head"], "threshold_learning_rate": 0.01, "refresh_every": 3},
        {
            "phase": Phase(end=0.5),
            "limits": Limits(min_size=2, keep=["head"]),
            "rates": ChoiceRates(thresholds=0.01, refresh_every=3),
        },
        lambda made: made.settings,
    ),
    "low rank": (
        LowRankCompression,
        {"weight": 0.3, "p": 2, "schedule": SCHEDULE, "every_n_steps": 4, "on_nonfinite": "raise"}
        | {"search_options": {"width": 2}, "score": "accuracy", "search_data": "held_out", "search_batches": 3}
        | {"search_at": 2, "factorize_at": None, "unit": "steps"},
        {
            "penalty": Penalty(weight=0.3, p=2, schedule=SCHEDULE, every_n_steps=4, on_nonfinite="raise"),
            "search": SearchSettings(options={"width": 2}, score="accuracy", data="held_out", batches=3),
            "timing": Timing(search_at=2, factorize_at=None, unit="steps"),
        },
        everything_of,
    ),
    "low rank, another search": (
        LowRankCompression,
        {"search": "output_energy", "search_options": {"relative": True}, "calibration": {"mask": "m"}, "weight": 0},
        {
            "search": SearchSettings(method="output_energy", options={"relative": True}, calibration={"mask": "m"}),
            "penalty": 0,
        },
        everything_of,
    ),
    "beam search": (
        searched,
        {"width": 1, "step": 2, "bounds": (-9, 9), "reuse_activations": False},
        {"options": BeamOptions(width=1, step=2, bounds=(-9, 9), reuse_activations=False)},
        lambda made: made,
    ),
    "by hand": (
        lambda _, **arguments: attached(**arguments),
        {"min_channels": 2, "multiple_of": 4},
        {"limits": Limits(min_size=2, multiple_of=4)},
        lambda made: made,
    ),
}


@pytest.mark.parametrize("name", OLDER)
def test_older_arguments_make_the_same_with_a_warning(name):
    kind, older, present, settings = OLDER[name]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        expected = kind("*", **present)
    with pytest.warns(FutureWarning, match=r"are fields of `.*` now: pass `.*\(.*\)`|is a field of") as caught:
        made = kind("*", **older)
    assert settings(made) == settings(expected)
    assert len(caught) == len(present)  # one for each dataclass
    assert {warning.filename for warning in caught} == {__file__}


@pytest.mark.parametrize(
    ("kind", "older"),
    [
        (MaskScheduling, "refresh_every"),
        (HybridCompression, "update_every"),
        (RankScheduling, "beta_max"),
        (LowRankCompression, "method"),
    ],
)
def test_fields_that_were_no_arguments_have_no_older_name(kind, older):
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{older}'"):
        kind("*", **{older: 3})


def test_two_older_names_of_one_argument_are_refused():
    with pytest.raises(TypeError, match="`min_channels` and `minimum` are older names of one argument, got both"):
        attached(minimum=2, min_channels=3)


# The callback, and in YAML its dataclass, one that is wrong, and what the message has.
NESTED = {
    "phase": (HybridCompression, "{end: 0.5}", "{ende: 0.5}", "ende", lambda made: made.settings.phase, Phase(end=0.5)),
    "limits": (
        RankScheduling,
        "{keep: [head], min_size: 2}",
        "{min_channels: 2}",
        "min_channels",
        lambda made: made.settings.limits,
        Limits(keep=["head"], min_size=2),
    ),
    "rates": (
        MaskScheduling,
        "{scores: 0.1, update_every: 3}",
        "{learning_rate: 0.1}",
        "learning_rate",
        lambda made: made.settings.rates,
        ChoiceRates(scores=0.1, update_every=3),
    ),
    "search": (
        LowRankCompression,
        "{score: accuracy, options: {width: 2}, calibration: true}",
        "{search_data: held_out}",
        "search_data",
        lambda made: made._source.search,
        SearchSettings(score="accuracy", options={"width": 2}, calibration=True),
    ),
    "penalty": (
        LowRankCompression,
        "{weight: 0.3, on_nonfinite: raise}",
        "{strength: 0.3}",
        "strength",
        lambda made: {name: made._settings[name] for name in ("weight", "every_n_steps", "on_nonfinite")},
        {"weight": 0.3, "every_n_steps": 1, "on_nonfinite": "raise"},
    ),
    "timing": (
        LowRankCompression,
        "{search_at: 2, factorize_at: 5, unit: epochs}",
        "{begin: 2}",
        "begin",
        lambda made: Timing(search_at=made.search_at, factorize_at=made.factorize_at, unit=made.unit),
        Timing(search_at=2, factorize_at=5, unit="epochs"),
    ),
}


@pytest.fixture
def build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., LightningCLI]:
    """Let LightningCLI read one argument of a callback."""
    return partial(built, tmp_path, monkeypatch)


def built(
    folder: Path, monkeypatch: pytest.MonkeyPatch, kind: type, argument: str, value: str, *more: str
) -> LightningCLI:
    path = folder / "config.yaml"
    callback = {"class_path": f"lightning_plugins.callbacks.{kind.__name__}"}
    callback["init_args"] = {"layers": "*", argument: yaml.safe_load(value)}
    path.write_text(yaml.safe_dump({"trainer": {"accelerator": "cpu", "logger": False, "callbacks": [callback]}}))
    monkeypatch.setattr(sys, "argv", ["train.py", "--config", str(path), *more])
    return LightningCLI(Classifier, run=False, seed_everything_default=False, save_config_callback=None)


@pytest.mark.parametrize("argument", NESTED)
def test_yaml_writes_a_dataclass_as_a_mapping(argument, build, capsys):
    kind, value, wrong, named, read, expected = NESTED[argument]
    assert read(build(kind, argument, value).trainer.callbacks[0]) == expected
    with pytest.raises(SystemExit):
        build(kind, argument, wrong)
    assert named in capsys.readouterr().err


@pytest.mark.parametrize("argument", NESTED)
def test_a_printed_configuration_has_no_class_path_of_a_dataclass(argument, build):
    kind, value, *_ = NESTED[argument]
    with redirect_stdout(io.StringIO()) as printed, pytest.raises(SystemExit):
        build(kind, argument, value, "--print_config")
    assert "lightning_plugins.callbacks." in printed.getvalue()
    (callback,) = yaml.safe_load(printed.getvalue())["trainer"]["callbacks"]
    assert "class_path" not in yaml.safe_dump(callback["init_args"])
    assert yaml.safe_load(value).items() <= callback["init_args"][argument].items()


@pytest.mark.parametrize(("argument", "value", "kept"), [("search", "energy", "energy"), ("penalty", "0.3", 0.3)])
def test_a_plain_value_stands_for_the_main_field(argument, value, kept, build):
    callback = build(LowRankCompression, argument, value).trainer.callbacks[0]
    assert {"search": callback._source.search.method, "penalty": callback.weight}[argument] == kept


def test_options_of_a_beam_search_are_a_mapping(capsys):
    parser = ArgumentParser(prog="search")
    parser.add_argument("--options", type=BeamOptions)
    made = parser.instantiate(parser.parse_object({"options": {"width": 2, "bounds": [0, 1]}})).options
    assert made == BeamOptions(width=2, bounds=(0, 1))
    with pytest.raises(SystemExit):
        parser.parse_object({"options": {"widht": 2}})
    assert "widht" in capsys.readouterr().err
    assert "class_path" not in parser.dump(parser.get_defaults())


def test_older_positions_of_a_compression_of_ranks_are_those_of_the_callers_line():
    with pytest.warns(FutureWarning) as caught:
        made = LowRankCompression("*", 0.8, 0.5, search_options={"width": 2})
    assert (made.budget, made.weight, made._source.search.options) == (0.2, 0.5, {"width": 2})
    assert {warning.filename for warning in caught} == {__file__}
