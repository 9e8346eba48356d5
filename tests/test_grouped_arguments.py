"""Callables whose settings are dataclasses: the arguments that these replace, and the same settings in YAML."""

import tempfile
import warnings
from collections.abc import Callable
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
import yaml
from jsonargparse import ArgumentError, ArgumentParser
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.cli import LightningCLI
from torch import Tensor, nn

from lightning_plugins.callbacks import (
    AttributionEvaluation,
    BatchKeys,
    CollapseAlarm,
    CollapseLimits,
    Distillation,
    MatchedOutputs,
    MutualInformationMonitor,
    Readout,
    RepresentationMonitor,
    RepresentationRegularization,
    SampleSelection,
    VNERegularization,
)
from lightning_plugins.data import EpisodeCounts, EpisodicDataModule
from lightning_plugins.functional.attribution import CurveSteps, NoiseDraws, infidelity, perturbation_curve
from lightning_plugins.meta import GAP, InnerLoop, Sinusoid, Vectorization
from lightning_plugins.metrics import Infidelity, LinearProbe, ProbeClassifier
from lightning_plugins.mixins import GAPMixin, InnerSettings, MAMLMixin
from lightning_plugins.regularizers import CodingRate
from lightning_plugins.search import Workers, tune
from tests.models import Classifier


class Case(NamedTuple):
    """A call with arguments that have become fields, and the call that says the same now."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    older: dict[str, Any]
    present: dict[str, Any]
    read: str  # the attributes to compare; where empty a tensor is returned
    by_position: tuple[Any, ...] = ()  # what the older call has besides


class MAML(MAMLMixin, LightningModule):
    pass


class GAPOfLinear(GAPMixin, LightningModule):
    def __init__(self, **settings: Any) -> None:
        super().__init__(nn.Linear(2, 1), F.mse_loss, GAP(linear=True), **settings)


MAPS = torch.arange(12.0).reshape(2, 6)


def classes_of(x: Tensor) -> Tensor:
    return torch.stack([x.sum(1), -x.square().sum(1)], 1)


def squared(trial: Any, folder: Path) -> float:
    return trial.suggest_float("x", -1, 1) ** 2


def tuned(**settings: Any) -> Any:
    return tune(squared, 2, directory=tempfile.mkdtemp(), **settings)


READ = {"pool": "last", "select": ["states", -1], "mask": "keep", "layout": "NLC"}
TERM = CodingRate()
OLDER = {
    "VNERegularization": Case(VNERegularization, ("a", 0.1), READ, {"readout": Readout(**READ)}, "state_key"),
    "RepresentationRegularization": Case(
        RepresentationRegularization, ("a", TERM), READ, {"readout": Readout(**READ)}, "state_key"
    ),
    "RepresentationMonitor": Case(RepresentationMonitor, ("a",), READ, {"readout": Readout(**READ)}, "state_key"),
    "MutualInformationMonitor": Case(
        MutualInformationMonitor, ("a",), {"pool": "cls"}, {"readout": Readout(pool="cls")}, "state_key"
    ),
    "CollapseAlarm": Case(
        CollapseAlarm,
        ("a", "rankme"),
        {"share": 0.1, "drop": 0.5, "patience": 3, "mask": "keep"},
        {"limits": CollapseLimits(minimum=2.0, share=0.1, drop=0.5, patience=3), "readout": Readout(mask="keep")},
        "state_key",
        (2.0,),
    ),
    "InnerLoop": Case(
        InnerLoop,
        (nn.Linear(2, 1), F.mse_loss),
        {"chunk_size": 2, "vectorize": False, "randomness": "same"},
        {"vectorize": Vectorization(mode=False, chunk_size=2, randomness="same")},
        "vectorize chunk_size same_draws",
    ),
    "MAMLMixin": Case(
        MAML,
        (nn.Sequential(nn.Linear(2, 1)), F.mse_loss),
        {
            "inner_steps": 2,
            "evaluation_steps": 4,
            "inner_learning_rate": 0.1,
            "rates": "learned",
            "first_order": True,
            "layers": "*",
            "vectorize": False,
            "chunk_size": 2,
            "randomness": "same",
        },
        {
            "inner": InnerSettings(
                steps=2,
                evaluation_steps=4,
                learning_rate=0.1,
                rates="learned",
                first_order=True,
                layers="*",
                vectorize=Vectorization(mode=False, chunk_size=2, randomness="same"),
            )
        },
        "inner_loop.steps evaluation_steps inner_loop.learning_rate inner_loop.per_step inner_loop.first_order "
        "inner_loop.adapted inner_loop.vectorize inner_loop.chunk_size inner_loop.same_draws learning_rate",
    ),
    "GAPMixin": Case(
        GAPOfLinear, (), {"inner_steps": 2}, {"inner": InnerSettings(steps=2)}, "inner_loop.steps evaluation_steps"
    ),
    "EpisodicDataModule": Case(
        EpisodicDataModule,
        (Sinusoid(shots=5),),
        {"episodes": 8, "val_episodes": 3, "test_episodes": 5, "tasks_per_batch": 2},
        {"episodes": EpisodeCounts(train=8, val=3, test=5, tasks_per_batch=2)},
        "episodes tasks_per_batch",
    ),
    "AttributionEvaluation": Case(
        AttributionEvaluation,
        ({"mine": F.relu},),
        {"inputs": "x", "target": "y", "mask": "m", "select": 0.9, "classes": [1], "max_samples": 3, "examples": 0},
        {
            "batch": BatchKeys(inputs="x", target="y", mask="m"),
            "samples": SampleSelection(select=0.9, classes=[1], max_samples=3),
            "examples": 0,
        },
        "state_key keys selection.samples",
    ),
    "Distillation": Case(
        Distillation,
        ("start",),
        {"outputs": "logits", "loss": "mse", "temperature": 2.0},
        {"outputs": MatchedOutputs(select="logits", loss="mse", temperature=2.0)},
        "state_key outputs distance",
    ),
    "Distillation of layers": Case(
        Distillation,
        ("start",),
        {"outputs": False, "temperature": 2.0, "layers": "a"},
        {"outputs": MatchedOutputs(select=False, temperature=2.0), "layers": "a"},
        "state_key outputs distance",
    ),
    "tune": Case(
        tuned, (), {"workers": 1, "retries": 0}, {"workers": Workers(count=1, retries=0)}, "best_value best_params"
    ),
    "perturbation_curve": Case(
        perturbation_curve,
        (classes_of, MAPS, MAPS, torch.tensor([0, 1])),
        {"steps": 2, "spread": True},
        {"steps": CurveSteps(count=2, spread=True)},
        "",
    ),
    "infidelity": Case(
        infidelity,
        (classes_of, MAPS, MAPS, torch.tensor([0, 1])),
        {"std": 0.3, "seed": 4},
        {"draws": NoiseDraws(std=0.3, seed=4)},
        "",
    ),
    "Infidelity": Case(
        Infidelity, (), {"draws": 3, "std": 0.3, "seed": 4}, {"draws": NoiseDraws(count=3, std=0.3, seed=4)}, "noise"
    ),
    "LinearProbe": Case(
        LinearProbe,
        (4, 2),
        {"task": "classification", "classifier": "lda", "reservoir": 20},
        {"task": "classification", "classifier": ProbeClassifier(kind="lda", reservoir=20)},
        "settings",
    ),
    "CollapseAlarm, minimum": Case(CollapseAlarm, ("a",), {"minimum": 2.0}, {"limits": 2.0}, "state_key"),
}


def read(made: Any, attributes: str) -> Any:
    return attrgetter(*attributes.split())(made)


@pytest.mark.parametrize("case", OLDER.values(), ids=OLDER)
def test_arguments_that_became_fields_give_the_same_with_a_warning(case: Case):
    with pytest.warns(FutureWarning, match=rf"of `({'|'.join(case.present)})` now") as caught:
        older = case.function(*case.args, *case.by_position, **case.older)
    assert {warning.filename for warning in caught if warning.category is FutureWarning} == {__file__}
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        present = case.function(*case.args, **case.present)
    if case.read:
        assert read(older, case.read) == read(present, case.read)
    else:
        torch.testing.assert_close(older, present, rtol=0, atol=0)


class Written(NamedTuple):
    """Settings in YAML, and the dataclass that they are."""

    path: str
    arguments: str
    name: str  # of the argument
    wanted: Any
    read: str = ""  # the attribute that has it, where that is another


CALLBACKS = "lightning_plugins.callbacks."
YAML = {
    "readout": Written(
        f"{CALLBACKS}VNERegularization",
        "{layers: a, weight: 0.1, readout: {pool: last, select: [states, -1], mask: keep, layout: NLC}}",
        "readout",
        Readout(**READ),
    ),
    "limits": Written(
        f"{CALLBACKS}CollapseAlarm",
        "{layers: a, limits: {share: 0.1, patience: 3}}",
        "limits",
        CollapseLimits(share=0.1, patience=3),
    ),
    "batch": Written(
        f"{CALLBACKS}AttributionEvaluation",
        "{methods: {saliency: null}, examples: 0, batch: {inputs: x, target: y, mask: 2}}",
        "batch",
        {"inputs": "x", "target": "y", "mask": 2},
        "keys",
    ),
    "samples": Written(
        f"{CALLBACKS}AttributionEvaluation",
        "{methods: {saliency: null}, metrics: [deletion], examples: 0, samples: {select: 0.9, classes: [1]}}",
        "samples",
        SampleSelection(select=0.9, classes=[1]),
        "selection.samples",
    ),
    "outputs": Written(
        f"{CALLBACKS}Distillation",
        "{outputs: {select: logits, temperature: 2.0}}",
        "outputs",
        (("logits",), 2.0, "kl"),
        "outputs distance.temperature distance.loss",
    ),
    "outputs, a list": Written(
        f"{CALLBACKS}Distillation", "{outputs: [a, 0]}", "outputs", (("a", 0), "kl"), "outputs distance.loss"
    ),
    "limits, a number": Written(
        f"{CALLBACKS}CollapseAlarm", "{layers: a, limits: 2.0}", "limits", CollapseLimits(minimum=2.0)
    ),
}


def cli(folder: Path, arguments: dict[str, Any], path: str, *more: str) -> LightningCLI:
    quiet = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    callbacks = [{"class_path": path, "init_args": arguments}]
    (folder / "config.yaml").write_text(yaml.safe_dump({"trainer": {**quiet, "callbacks": callbacks}}))
    return LightningCLI(
        Classifier, run=False, args=["--config", str(folder / "config.yaml"), *more], save_config_callback=None
    )


@pytest.mark.parametrize("case", YAML.values(), ids=YAML)
def test_a_mapping_in_yaml_is_the_dataclass(case: Written, tmp_path: Path):
    made = cli(tmp_path, yaml.safe_load(case.arguments), case.path).trainer.callbacks
    (callback,) = (one for one in made if type(one).__name__ == case.path.rpartition(".")[2])
    assert isinstance(callback, Callback)
    assert read(callback, case.read or case.name) == case.wanted


@pytest.mark.parametrize("case", YAML.values(), ids=YAML)
def test_an_unknown_field_in_yaml_is_named(case: Written, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    arguments = {**yaml.safe_load(case.arguments), case.name: {"feild": 1}}
    with pytest.raises(SystemExit):
        cli(tmp_path, arguments, case.path)
    assert "feild" in capsys.readouterr().err


@pytest.mark.parametrize("case", YAML.values(), ids=YAML)
def test_the_printed_configuration_has_no_path_of_the_dataclass(
    case: Written, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(SystemExit):
        cli(tmp_path, yaml.safe_load(case.arguments), case.path, "--print_config")
    printed = capsys.readouterr().out
    assert printed.count("class_path") == 1
    assert f"{case.name}:" in printed


class Parsed(NamedTuple):
    """Arguments of a class as a configuration file has them, and what they make."""

    kind: type
    arguments: dict[str, Any]
    name: str  # of the argument that is a dataclass
    read: str
    wanted: Any


NETWORK = {"class_path": "torch.nn.Linear", "init_args": {"in_features": 2, "out_features": 1}}
LOSS = "torch.nn.functional.mse_loss"
SET = {"class_path": "lightning_plugins.meta.Sinusoid"}
PARSED = {
    "inner": Parsed(
        MAML,
        {"network": NETWORK, "loss": LOSS, "inner": {"steps": 3, "vectorize": {"chunk_size": 2}}},
        "inner",
        "inner_loop.steps inner_loop.chunk_size evaluation_steps",
        (3, 2, 10),
    ),
    "inner with a plain value": Parsed(
        MAML,
        {"network": NETWORK, "loss": LOSS, "inner": {"vectorize": False}},
        "inner",
        "inner_loop.vectorize inner_loop.steps",
        (False, 5),
    ),
    "vectorize": Parsed(
        InnerLoop,
        {"model": NETWORK, "loss": LOSS, "vectorize": {"mode": True, "randomness": "same"}},
        "vectorize",
        "vectorize same_draws",
        (True, True),
    ),
    "episodes": Parsed(
        EpisodicDataModule,
        {"train": SET, "episodes": {"train": 8, "tasks_per_batch": 2}},
        "episodes",
        "episodes tasks_per_batch",
        ({"train": 8, "val": 200, "test": 600}, 2),
    ),
    "episodes, a number": Parsed(
        EpisodicDataModule,
        {"train": SET, "episodes": 8},
        "episodes",
        "episodes tasks_per_batch",
        ({"train": 8, "val": 200, "test": 600}, 4),
    ),
    "classifier": Parsed(
        LinearProbe,
        {"num_features": 3, "classifier": {"kind": "lda", "reservoir": 9}},
        "classifier",
        "settings.classifier settings.reservoir",
        ("lda", 9),
    ),
    "draws": Parsed(Infidelity, {"draws": {"count": 3, "std": 0.5}}, "draws", "noise", NoiseDraws(count=3, std=0.5)),
}


def parser(kind: type) -> ArgumentParser:
    made = ArgumentParser(exit_on_error=False)
    made.add_class_arguments(kind, "own")
    return made


@pytest.mark.parametrize("case", PARSED.values(), ids=PARSED)
def test_a_mapping_is_parsed_as_the_dataclass(case: Parsed):
    parsing = parser(case.kind)
    config = parsing.parse_object({"own": case.arguments})
    dumped = yaml.safe_load(parsing.dump(config))["own"][case.name]
    assert "class_path" not in str(dumped)
    assert read(parsing.instantiate_classes(config).own, case.read) == case.wanted
    with pytest.raises(ArgumentError, match="feild"):
        parsing.parse_object({"own": {**case.arguments, case.name: {"feild": 1}}})
