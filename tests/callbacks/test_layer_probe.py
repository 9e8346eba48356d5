import copy
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_plugins.callbacks import LayerProbe, probe_layers
from lightning_plugins.functional import hash_rows
from lightning_plugins.metrics import LinearProbe
from tests._killed import saving
from tests._processes import run_on_ranks
from tests.contract_ranks import act_as_rank
from tests.models import Batches, Classifier, fit, make_batches

BATCHES = make_batches(8)
HELD_OUT = make_batches(6, seed=1)


def watch(layers: Any = ("backbone.1", "head:input"), targets: Any = 1, **settings: Any) -> LayerProbe:
    return LayerProbe(layers, targets, **{"figures": False, "stages": ["train", "val"], **settings})


def make(**settings: Any) -> Classifier:
    torch.manual_seed(0)
    return Classifier(**settings)


def test_validation_gives_the_probe_of_all_its_rows():
    model, probe = make(), watch(groups=lambda batch: batch[1] * 100 + (batch[0][:, 0] * 10).long())
    trainer = fit(model, BATCHES, [probe], validation=Batches(HELD_OUT))
    own = LinearProbe(5)
    for x, y in HELD_OUT:
        own.update(model.backbone(x.double()).detach(), y, y * 100 + (x[:, 0].double() * 10).long())
    wanted = own.compute()
    torch.testing.assert_close(probe.results["val"]["head"][1:], wanted[1:], equal_nan=True)
    for name, value in wanted.headline().items():
        torch.testing.assert_close(trainer.callback_metrics[f"probe/val/head/{name}"], value.float())
    assert list(probe.profiles["val"]) == list(probe.profiles["train"]) == [8, 16]
    assert probe.profiles["val"][16]["head"] == wanted.r2.item()


def test_training_rows_are_those_of_the_epoch():
    model, probe = make(lr=0.0), watch()  # weights that stay: all rows of the epoch come from the same network
    fit(model, BATCHES, [probe])
    rows = [(model.backbone(x.double()).detach(), y) for x, y in BATCHES]
    own = LinearProbe(5)
    for (x, _), (features, y) in zip(BATCHES, rows, strict=True):
        own.update(features, y, hash_rows(x))
    torch.testing.assert_close(probe.results["train"]["head"][1:], own.compute()[1:], equal_nan=True)


def test_the_training_is_the_same_bit_for_bit_and_its_checkpoint_holds_nothing_more():
    plain, model = make(), make()
    fit(plain, BATCHES, validation=Batches(HELD_OUT))
    fit(model, BATCHES, [watch(controls=["projection"])], validation=Batches(HELD_OUT))
    torch.testing.assert_close(dict(model.state_dict()), dict(plain.state_dict()), rtol=0, atol=0)


class Dropping(Classifier):
    """Uses random numbers in its steps, which controls must not take away."""

    def __init__(self, rate: float = 0.3) -> None:
        torch.manual_seed(0)
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 8), nn.Dropout(rate), nn.Tanh(), nn.Linear(8, 3))
        del self.backbone, self.head

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


def test_initial_network_and_projection_are_controls():
    plain, model = Dropping(), Dropping()
    initial = copy.deepcopy(model.net).double().eval()
    probe = watch(["net.0", "net.2"], controls=["initial", "projection"])
    torch.manual_seed(1)
    fit(plain, BATCHES, validation=Batches(HELD_OUT))
    torch.manual_seed(1)
    trainer = fit(model, BATCHES, [probe], validation=Batches(HELD_OUT))
    torch.testing.assert_close(dict(model.state_dict()), dict(plain.state_dict()), rtol=0, atol=0)
    wanted = probe_layers(initial, [(x.double(), y) for x, y in HELD_OUT], ["0", "2"], 1)
    for name in ("0", "2"):
        torch.testing.assert_close(probe.results["val"][f"net.{name}@initial"][1:], wanted[name][1:], equal_nan=True)
    assert probe.results["val"]["net.2"].r2 != probe.results["val"]["net.2@initial"].r2
    assert "probe/val/projection/r2" in trainer.callback_metrics
    assert probe.results["val"]["projection"].weights.shape[0] == 8
    assert not model.net._forward_pre_hooks


def test_initial_weights_outlive_a_resume(tmp_path):
    straight, resumed = watch(["net.2"], controls=["initial"]), watch(["net.2"], controls=["initial"])
    fit(
        Dropping(0.0).double(),
        BATCHES,
        [straight, saving(tmp_path, every=5)],
        enable_checkpointing=True,
        validation=Batches(HELD_OUT),
    )
    other = Dropping(0.0).double()
    nn.init.ones_(other.net[0].weight)  # what it is made with is not what the training began with
    fit(other, BATCHES, [resumed], ckpt_path=tmp_path / "step=5.ckpt", validation=Batches(HELD_OUT))
    key = "net.2@initial"
    for stage in ("train", "val"):
        torch.testing.assert_close(
            resumed.results[stage][key][1:], straight.results[stage][key][1:], equal_nan=True, rtol=0, atol=0
        )
    assert resumed.profiles == straight.profiles


def test_classification_and_test_stage():
    model, probe = make(), watch(stages="test", probe={"task": "classification", "num_targets": 3, "classifier": "lda"})
    settings = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    model.test_step = lambda batch, batch_idx: model.loss(batch)
    trainer = Trainer(**settings, callbacks=[probe], enable_checkpointing=False)
    (logged,) = trainer.test(model, Batches(HELD_OUT), verbose=False)
    assert 0 <= logged["probe/test/head/accuracy"] <= 1
    assert probe.results["test"]["head"].evaluated == 48


class Tokens(LightningModule):
    """A layer that keeps sequences, one that gives a tuple, and one for feature maps."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(30, 6)
        self.net = nn.Linear(6, 4)

    def forward(self, ids: Tensor) -> Tensor:
        return self.net(self.embed(ids))

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self(batch["ids"])


def sequences(count: int = 5, rows: int = 9, length: int = 7) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(30, (count, rows, length), generator=generator)
    mask = torch.rand(count, rows, length, generator=generator) < 0.7
    mask[..., 0] = True
    return [
        {"ids": i, "mask": m, "value": i.float().sin(), "text": i[:, 0].float()} for i, m in zip(ids, mask, strict=True)
    ]


def as_rows(model: Tokens, batch: dict[str, Tensor], positions: str) -> tuple[Tensor, Tensor, Tensor]:
    features = model(batch["ids"]).detach()
    if positions == "tokens":
        return features[batch["mask"]], batch["value"][batch["mask"]], batch["ids"][batch["mask"]]
    if positions == "cls":
        return features[:, 0], batch["text"], batch["ids"][:, 0]
    means = [row[kept].mean(0) for row, kept in zip(features, batch["mask"], strict=True)]
    return torch.stack(means), batch["text"], batch["ids"][:, 0]


@pytest.mark.parametrize("positions", ["tokens", "cls", "mean"])
def test_positions(positions):
    torch.manual_seed(0)
    model, own = Tokens(), LinearProbe(4)
    for batch in sequences():
        own.update(*as_rows(model, batch, positions))
    settings = {
        "targets": "value" if positions == "tokens" else "text",
        "groups": "ids" if positions == "tokens" else lambda batch: batch["ids"][:, 0],
        "mask": None if positions == "cls" else "mask",
        "positions": positions,
    }
    found = probe_layers(model, sequences(), "net", **settings)
    torch.testing.assert_close(found["net"][1:], own.compute()[1:], rtol=1e-5, atol=1e-5, equal_nan=True)


def test_a_target_of_the_text_is_spread_over_its_tokens():
    torch.manual_seed(0)
    model, own = Tokens(), LinearProbe(4)
    for batch in sequences():
        spread = batch["text"][:, None].expand_as(batch["ids"])
        own.update(model(batch["ids"])[batch["mask"]], spread[batch["mask"]], batch["ids"][batch["mask"]])
    found = probe_layers(model, sequences(), "net", "text", groups="ids", mask="mask", positions="tokens")
    torch.testing.assert_close(found["net"][1:], own.compute()[1:], rtol=1e-5, atol=1e-5, equal_nan=True)


def test_positions_by_a_function():
    found = probe_layers(
        Tokens(), sequences(), "net", "text", positions=lambda features, batch: features.flatten(1)[:, :12]
    )
    assert found["net"].weights.shape == (12, 1)


def test_loader_without_a_trainer_leaves_the_model_as_it_was():
    model = Dropping()
    model.net[1].eval()
    modes, random = [m.training for m in model.modules()], torch.get_rng_state()
    probe_layers(model, BATCHES, "net.0", 1)
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random)
    assert not model.net[0]._forward_hooks


def test_too_few_rows_warn_and_log_nothing():
    probe = watch(probe={"folds": 5})
    two = [(BATCHES[0][0][:2], BATCHES[0][1][:2])]
    with pytest.warns(UserWarning, match="the probe of 'head' was not fitted: `groups` must fill at least 3"):
        trainer = fit(make(), BATCHES, [probe], validation=Batches(two), max_epochs=1)
    assert not any(name.startswith("probe/val") for name in trainer.callback_metrics)
    assert any(name.startswith("probe/train") for name in trainer.callback_metrics)


def test_draws_the_profile(tmp_path):
    probe = watch(figures=True, stages="val")
    fit(make(), BATCHES, [probe], validation=Batches(HELD_OUT), default_root_dir=tmp_path)
    assert (tmp_path / "probe" / "val" / "profile.png").stat().st_size > 5000


def validated(rank: int, world_size: int) -> dict[str, Any]:
    bounds = {1: [0, 8], 2: [0, 3, 8]}[world_size]
    rows = slice(bounds[rank], bounds[rank + 1])
    mine = [[tuple(v[rows] for v in batch) for batch in batches] for batches in (BATCHES, HELD_OUT)]
    settings = {}
    if world_size > 1:
        act_as_rank(rank, world_size)
        settings = {"strategy": "ddp", "devices": world_size}
    probes = [
        watch(["net.0", "net.2"], controls=["initial"], probe={"weight": "group"}),
        watch(["net.2"], probe={"task": "classification", "num_targets": 3, "reservoir": 20}),
    ]
    model = Dropping(0.0)  # masks would differ between processes
    trainer = fit(model, mine[0], probes, validation=Batches(mine[1]), max_epochs=1, **settings)
    return {"profiles": [probe.profiles for probe in probes], "logged": dict(trainer.callback_metrics)}


@pytest.mark.distributed
def test_unequal_processes_validate_like_one(tmp_path):
    wanted = validated(0, 1)["profiles"]
    for found in run_on_ranks(validated, 2, tmp_path, 2):
        for own, one in zip(found["profiles"], wanted, strict=True):
            torch.testing.assert_close(own["val"], one["val"], rtol=0.2, atol=0.2)  # DDP averages another loss
            assert list(own["train"]) == list(one["train"])
    probe_only = run_on_ranks(untrained, 2, tmp_path, 2)
    for found in probe_only:
        torch.testing.assert_close(found, untrained(0, 1), rtol=1e-9, atol=1e-9)


def untrained(rank: int, world_size: int) -> dict[str, float]:
    """Without training there is nothing but the probe in which processes could differ."""
    bounds = {1: [0, 8], 2: [0, 3, 8]}[world_size]
    rows = slice(bounds[rank], bounds[rank + 1])
    mine = [tuple(v[rows].double() for v in batch) for batch in HELD_OUT]
    found = probe_layers(Dropping().double(), mine, ["net.0", "net.2"], 1, probe={"weight": "group"})
    return {label: float(result.r2) for label, result in found.items()}


def test_network_that_is_not_one_child_has_no_initial_copy():
    with pytest.raises(MisconfigurationException, match=r"`controls`: 'initial' runs the child .* 'backbone', 'head'"):
        fit(make(), BATCHES, [watch(["backbone", "head"], controls="initial")])


def test_initial_weights_must_be_known():
    settings = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(
        **settings, callbacks=[watch("net.0", stages="val", controls="initial")], enable_checkpointing=False
    )
    with pytest.raises(MisconfigurationException, match="`controls`: 'initial' needs the weights"):
        trainer.validate(Dropping(), Batches(HELD_OUT), verbose=False)
