"""Every public term of a loss as a callback: like the term written in the step, in YAML, over processes, resumed."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from torch import Tensor, nn

from lightning_plugins.callbacks import RepresentationRegularization, WeightRegularization
from tests._killed import saving
from tests._processes import run_on_ranks
from tests.contract_by_hand import Model
from tests.contract_ranks import BOUNDS, act_as_rank
from tests.contract_table import Setting
from tests.models import fit, make_batches, shard
from tests.regularizers.terms import ARGUMENTS, EMBEDDING_TERMS, WEIGHT_TERMS, make
from tests.test_contract_yaml import run_cli

BATCHES = make_batches(6)
WEIGHT = 0.05
TERMS = [*EMBEDDING_TERMS, *WEIGHT_TERMS]
every_term = pytest.mark.parametrize("name", TERMS)


def callback(name: str) -> Callback:
    kind: Any = RepresentationRegularization if name in EMBEDDING_TERMS else WeightRegularization
    return kind("backbone" if name in EMBEDDING_TERMS else ["backbone.0", "backbone.2"], make(name), WEIGHT)


def as_yaml(name: str) -> str:
    kind = "RepresentationRegularization" if name in EMBEDDING_TERMS else "WeightRegularization"
    layers = "backbone" if name in EMBEDDING_TERMS else "[backbone.0, backbone.2]"
    arguments = ", ".join(f"{key}: {str(value).lower()}" for key, value in ARGUMENTS.get(name, {}).items())
    term = f"{{class_path: lightning_plugins.regularizers.{name}, init_args: {{{arguments}}}}}"
    return f"""
- class_path: lightning_plugins.callbacks.{kind}
  init_args: {{layers: {layers}, term: {term}, weight: {WEIGHT}}}
"""


class ByHand(Model):
    """The term written out in the step."""

    def __init__(self, name: str, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.name, self.term = name, make(name)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        if self.name in EMBEDDING_TERMS:
            return loss + WEIGHT * self.term(self.backbone(batch[0]))
        return loss + WEIGHT * sum(self.term(self.backbone[i].weight) for i in (0, 2))


def seeded(kind: Any = Model, *arguments: Any, **more: Any) -> Any:
    torch.manual_seed(0)
    return kind(*arguments, **more)


@every_term
def test_trains_like_the_term_written_by_hand(name: str):
    model, expected, plain = seeded(), seeded(ByHand, name), seeded()
    trainer = fit(model, BATCHES, [callback(name)])
    fit(expected, BATCHES)
    fit(plain, BATCHES)
    torch.testing.assert_close(dict(model.state_dict()), dict(expected.state_dict()))
    differences = [(a - b).abs().max() for a, b in zip(model.parameters(), plain.parameters(), strict=True)]
    assert max(differences) > 1e-4
    assert sum("penalty" in key for key in trainer.callback_metrics) == 1


@every_term
def test_yaml(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    expected = seeded()
    fit(expected, BATCHES, [callback(name)])
    monkeypatch.setattr(sys, "argv", ["train.py"])
    cli = run_cli(Setting(lambda: [callback(name)], None, (), as_yaml(name)), tmp_path, monkeypatch)
    torch.testing.assert_close(dict(cli.model.state_dict()), dict(expected.state_dict()))


@every_term
def test_resume_equals_uninterrupted(name: str, tmp_path: Path):
    straight, resumed = seeded(optimizer="adamw").double(), seeded(optimizer="adamw").double()
    fit(straight, BATCHES, [callback(name), saving(tmp_path, every=4)], enable_checkpointing=True)
    fit(resumed, BATCHES, [callback(name)], ckpt_path=tmp_path / "step=4.ckpt")
    torch.testing.assert_close(dict(resumed.state_dict()), dict(straight.state_dict()), rtol=0, atol=0)


def train_on_rank(rank: int) -> list[dict[str, Tensor]]:
    act_as_rank(rank, 2)
    mine, found = shard(BATCHES, BOUNDS[2]), []
    for name in TERMS:
        model = seeded()
        fit(model, mine, [callback(name)], strategy="ddp", devices=2, max_epochs=1)
        found.append(dict(model.state_dict()))
    return found


@pytest.mark.distributed
def test_unequal_processes_equal_one(tmp_path: Path):
    ranks = run_on_ranks(train_on_rank, 2, tmp_path)
    for index, name in enumerate(TERMS):
        expected = seeded()
        fit(expected, BATCHES, [callback(name)], max_epochs=1)
        for found in ranks:
            torch.testing.assert_close(
                found[index], dict(expected.state_dict()), rtol=1e-6, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}"
            )


def test_sigreg_draws_other_directions_at_each_step():
    kind = ARGUMENTS["SIGReg"]
    drawn, fixed = seeded(), seeded()
    fit(drawn, BATCHES, [RepresentationRegularization("backbone", make("SIGReg", resample=True), WEIGHT)])
    fit(fixed, BATCHES, [RepresentationRegularization("backbone", make("SIGReg"), WEIGHT)])
    assert kind["resample"] is False
    assert not torch.equal(drawn.head.weight, fixed.head.weight)


class Gradient:
    """A term of weights that is no module."""

    def value_and_gradient(self, matrix: Tensor) -> tuple[Tensor, Tensor]:
        return matrix.square().sum((-2, -1)) / 2, matrix


def test_any_object_with_a_gradient_is_a_term():
    model, expected = seeded(), seeded()
    term = WeightRegularization("backbone.0", Gradient(), WEIGHT)
    assert "0x" not in term.state_key
    trainer = fit(model, BATCHES[:1], [term], max_epochs=1)
    fit(expected, BATCHES[:1], max_epochs=1)
    shrunk = expected.backbone[0].weight - expected.lr * WEIGHT * seeded().backbone[0].weight.double()
    torch.testing.assert_close(model.backbone[0].weight, shrunk)
    assert "gradient/backbone.0" in trainer.callback_metrics


class WrongShape(nn.Module):
    def value_and_gradient(self, matrix: Tensor) -> tuple[Tensor, Tensor]:
        return matrix.sum(), matrix[:1]


BAD = {
    "a class": (lambda: WeightRegularization("a", nn.Identity), TypeError, "got the class Identity; make one, as `I"),
    "text": (
        lambda: WeightRegularization("a", "SpectralNrom"),
        TypeError,
        r"got 'SpectralNrom' \(str\); did you mean `SpectralNorm\(\)`",
    ),
    "a number": (
        lambda: RepresentationRegularization("a", 0.3),
        TypeError,
        r"`term` must be a module such as `CodingR",
    ),
    "no name": (
        lambda: RepresentationRegularization("a", make("SIGReg"), name=""),
        ValueError,
        "`name` must be a word without '/'",
    ),
    "a name with a slash": (
        lambda: WeightRegularization("a", make("NuclearNorm"), name="a/b"),
        ValueError,
        "got 'a/b'",
    ),
    "a number as name": (lambda: WeightRegularization("a", make("NuclearNorm"), name=3), TypeError, "`name` must be a"),
    "weight is NaN": (
        lambda: WeightRegularization("a", make("NuclearNorm"), float("nan")),
        ValueError,
        "`weight` must be finite",
    ),
    "a side": (lambda: WeightRegularization("a:input", make("NuclearNorm")), ValueError, "`layers`"),
    "queue of one process": (
        lambda: RepresentationRegularization("a", make("CodingRate", scope="local"), queue_size=8),
        ValueError,
        "needs `scope='global'`",
    ),
    "schedule": (
        lambda: WeightRegularization("a", make("NuclearNorm"), schedule=1.0),
        TypeError,
        "`schedule` must be a Schedule",
    ),
    "scheme": (lambda: WeightRegularization("a", make("NuclearNorm"), scheme=3), ValueError, "`scheme` must be 1 or 2"),
    "no step": (
        lambda: RepresentationRegularization("a", make("SIGReg"), every_n_steps=0),
        ValueError,
        "`every_n_steps` must be at least 1",
    ),
    "not a scalar": (
        lambda: fit(seeded(), BATCHES, [RepresentationRegularization("backbone", nn.Identity())]),
        ValueError,
        r"`term` must return a scalar tensor, got shape \(8, 5\)",
    ),
    "no tensor": (
        lambda: fit(seeded(), BATCHES, [RepresentationRegularization("backbone", lambda rows: 0.5)]),
        ValueError,
        "`term` must return a scalar tensor, got float",
    ),
    "a gradient of another shape": (
        lambda: fit(seeded(), BATCHES, [WeightRegularization("head", WrongShape())]),
        ValueError,
        r"`term` must give a gradient of the shape of the weight, \(3, 5\), got \(1, 5\)",
    ),
    "a term of weights that gives no tensor": (
        lambda: fit(seeded(), BATCHES, [WeightRegularization("head", lambda matrix: 0.5)]),
        TypeError,
        "`term` must return a tensor, got float",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_wrong_arguments_are_named(case: str):
    call, error, match = BAD[case]
    with pytest.raises(error, match=match):
        call()
