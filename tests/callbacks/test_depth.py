"""Trainings that remove residual blocks: the choice, the budget, checkpoints, several processes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from transformers import BertConfig, BertModel

from lightning_plugins._lightning import LightningModule
from lightning_plugins.callbacks import HybridCompression, MaskScheduling
from lightning_plugins.compression import ChoiceRates, Skipped, masks_of
from lightning_plugins.mixins import CompressionMixin
from tests._killed import Killed, fork_ranks, fork_to_be_killed, run_in_nursery, saving
from tests.callbacks.budgets import in_steps, nested, params
from tests.compression.deep import Deep
from tests.contract_ranks import BOUNDS, act_as_rank
from tests.models import fit, shard

STEPS = {"warm-up": 2, "soft": 7, "hard": 11, "fine-tuned": 15}


def token_batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(12, (6, 8, 5), generator=generator)
    return [(x, (x[:, 0] + x[:, 1]) % 3) for x in ids]


class Bert(CompressionMixin, LightningModule):
    def __init__(self, layers: int = 3) -> None:
        super().__init__()
        sizes = {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 12, "max_position_embeddings": 6}
        chances = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        config = BertConfig(vocab_size=12, num_hidden_layers=layers, **sizes, **chances)
        self.bert = BertModel(config, add_pooling_layer=False)
        self.head = nn.Linear(8, 3)
        self.example_input_array = torch.zeros(2, 5, dtype=torch.int64)
        self.double()

    def forward(self, ids: Tensor) -> Tensor:
        hidden: Tensor = self.bert(input_ids=ids).last_hidden_state
        return self.head(hidden.mean(1))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = nn.functional.cross_entropy(self(batch[0]), batch[1], reduction="sum") / 8
        return loss * self.trainer.world_size

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def tiny_bert() -> Bert:
    torch.manual_seed(0)
    return Bert()


def depth(kind: Any = MaskScheduling, **settings: Any) -> Any:
    return in_steps(kind, **{"blocks": "bert.encoder.layer.*", "layers": [], "end": 9, **settings})


def skipped(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, Skipped)]


@pytest.mark.parametrize("cost", ["params", "flops"])
@pytest.mark.parametrize(
    ("kind", "layers"),
    [(MaskScheduling, []), (MaskScheduling, "bert.encoder.*"), (HybridCompression, "bert.encoder.*")],
    ids=str,
)
def test_a_bert_within_its_budget_trains_on(kind, layers, cost):
    model, seen = tiny_bert(), Seen()
    callback = depth(kind, layers=layers, cost=cost, budget=0.45)
    fit(model, token_batches(), [callback, seen], max_epochs=3)
    report = callback.report
    assert report.share <= 0.45
    assert report.after.params == params(model)
    blocks = [f"bert.encoder.layer.{number}" for number in range(3)]
    assert [name for name in blocks if report.kept[name].left == 0] == skipped(model)
    assert not any(name.startswith(f"{block}.") for block in skipped(model) for name in report.kept)
    assert {f"mask/{block}/kept" for block in blocks} <= seen.logged
    optimizer = model.optimizers(use_pl_optimizer=False)
    held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    assert list(map(id, held)) == list(map(id, model.parameters()))
    assert set(map(id, optimizer.state)) == set(map(id, held))
    assert not any(module._forward_hooks for module in model.bert.encoder.layer)


class Seen(Callback):
    """The names that were logged, and the blocks that were open after each step."""

    def __init__(self) -> None:
        self.logged: set[str] = set()

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        self.logged |= set(trainer.callback_metrics)


class Residual(LightningModule):
    """A deep network that computes its targets already, up to one planted block that does next to nothing."""

    def __init__(self, useless: int | None, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.net = Deep(blocks=4, width=8, hidden=12)
        with torch.no_grad():
            for block in self.net.blocks:
                block.down.weight.mul_(3)
            for block in self.net.blocks if useless is None else ():
                block.up.weight[4:] = block.up.bias[4:] = 0  # two thirds of its channels are idle
            if useless is not None:
                self.net.blocks[useless].down.weight.mul_(0.01)
                self.net.blocks[useless].down.bias.mul_(0.01)
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(20, 32, 4, generator=generator)
        with torch.no_grad():
            self.batches = [(one, self.net(one)) for one in x]
        self.example_input_array = torch.zeros(2, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        noise = torch.randn(batch[1].shape, generator=torch.Generator().manual_seed(batch_idx))
        return (self(batch[0]) - batch[1] - 0.1 * noise).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=1e-2)


def train_residual(useless: int | None, seed: int, **settings: Any) -> tuple[Residual, Any]:
    model = Residual(useless, seed)
    phases = {"unit": "steps", "begin": 5, "end": 35, "figures": False}
    callback = MaskScheduling(**nested({"blocks": "net.blocks.*", "cost": "params", **phases, **settings}))
    fit(model, model.batches, [callback], max_epochs=2, precision="32-true")
    return model, callback


@pytest.mark.parametrize("layers", [[], "net.blocks.*.up"], ids=str)
@pytest.mark.parametrize("useless", range(4))
def test_a_useless_block_is_the_one_that_leaves(useless, layers):
    for seed in range(2):
        model, _ = train_residual(useless, seed, layers=layers, budget=0.78)
        assert skipped(model) == [f"net.blocks.{useless}"]


def test_useful_blocks_stay_where_channels_are_idle():
    for seed in range(3):
        model, callback = train_residual(None, seed, layers="net.blocks.*.up", budget=0.5)
        assert skipped(model) == []
        assert max(block.up.out_features for block in model.net.blocks) < 12
        assert callback.report.share <= 0.5


def straight(folder: Path, **settings: Any) -> tuple[Bert, Any]:
    model, callback = tiny_bert(), depth(**settings)
    fit(model, token_batches(), [callback, saving(folder)], enable_checkpointing=True, max_epochs=3)
    return model, callback


@pytest.mark.parametrize(
    ("kind", "layers", "budget"), [(MaskScheduling, [], 0.6), (HybridCompression, "bert.encoder.*", 0.35)], ids=str
)
def test_resumed_trainings_equal_an_uninterrupted_one(kind, layers, budget, tmp_path):
    wanted, before = straight(tmp_path, kind=kind, layers=layers, budget=budget)
    assert skipped(wanted)
    for step in (1, 4, 7, 9, 11, 13, 17):
        model, callback = tiny_bert(), depth(kind, layers=layers, budget=budget)
        fit(model, token_batches(), [callback], ckpt_path=tmp_path / f"step={step}.ckpt", max_epochs=3)
        torch.testing.assert_close(dict(model.state_dict()), dict(wanted.state_dict()), rtol=0, atol=0)
        assert callback.state_dict() == before.state_dict()
    dense = Bert.load_from_checkpoint(tmp_path / "step=7.ckpt")
    assert skipped(dense) == []
    loaded = Bert.load_from_checkpoint(tmp_path / "step=18.ckpt")
    torch.testing.assert_close(dict(loaded.state_dict()), dict(wanted.state_dict()), rtol=0, atol=0)
    assert skipped(loaded) == skipped(wanted)


def train(rank: int, folder: Path, ranks: int, phase: str, what: str) -> dict[str, Any]:
    settings: dict[str, Any] = {"max_epochs": 3}
    batches: Any = token_batches()
    if ranks > 1:
        act_as_rank(rank, ranks)
        batches = shard(batches, BOUNDS[ranks])
        settings.update(strategy="ddp", devices=ranks)
    callback = depth(layers="bert.encoder.*", budget=0.35)
    callbacks: list[Callback] = [callback]
    if what == "killed":
        callbacks += [saving(folder), Killed(STEPS[phase])]
        settings["enable_checkpointing"] = True
    if what == "resumed":
        settings["ckpt_path"] = folder / f"step={STEPS[phase]}.ckpt"
    model = tiny_bert()
    fit(model, batches, callbacks, **settings)
    return {"weights": dict(model.state_dict()), "report": callback.report.to_json()}


def nursery(folder: Path) -> None:
    for ranks in (1, 2):
        fork_ranks(ranks, folder, f"straight{ranks}", train, folder, ranks, "soft", "straight")
        for phase in STEPS:
            own = folder / f"{phase}-{ranks}"
            own.mkdir()
            fork_to_be_killed(ranks, own, train, own, ranks, phase, "killed")
            fork_ranks(ranks, own, "resumed", train, own, ranks, phase, "resumed")


@pytest.mark.distributed
def test_killed_trainings_go_on_and_two_unequal_processes_equal_one(tmp_path):
    run_in_nursery(nursery, tmp_path)
    one, two = (torch.load(tmp_path / f"straight{ranks}-0.pt") for ranks in (1, 2))
    assert any(key.endswith("skipped") for key in one["weights"])
    assert one["report"] == two["report"]
    torch.testing.assert_close(two["weights"], one["weights"], rtol=1e-7, atol=1e-9)
    for phase in STEPS:
        for ranks in (1, 2):
            for rank in range(ranks):
                resumed = torch.load(tmp_path / f"{phase}-{ranks}" / f"resumed-{rank}.pt")
                wanted = torch.load(tmp_path / f"straight{ranks}-{rank}.pt")
                torch.testing.assert_close(resumed["weights"], wanted["weights"], rtol=0, atol=0)
                assert resumed["report"] == wanted["report"]


def test_accumulated_batches_choose_as_whole_ones():
    batches = token_batches()
    halves = [(x[rows], y[rows]) for x, y in batches for rows in (slice(0, 4), slice(4, 8))]
    reports = []
    for given, every in ((batches, 1), (halves, 2)):
        model, callback = tiny_bert(), depth(layers="bert.encoder.*", budget=0.6)
        model.training_step = lambda batch, i, own=model, every=every: Bert.training_step(own, batch, i) * every
        fit(model, given, [callback], max_epochs=3, accumulate_grad_batches=every)
        reports.append(callback.report)
    assert reports[0] == reports[1]


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "32-true"])
def test_other_precisions_stay_within_the_budget(precision):
    model, callback = tiny_bert().float(), depth(layers="bert.encoder.*", budget=0.5)
    fit(model, token_batches(), [callback], max_epochs=3, precision=precision)
    assert callback.report.share <= 0.5


def test_custom_steps_remove_blocks():
    torch.manual_seed(0)
    model = tiny_bert()
    found = model.attach_compression(
        budget=0.6, masks=False, ranks=False, blocks="bert.encoder.layer.*", rates=ChoiceRates(scores=0.2)
    )
    assert [tuple(score.shape) for score in found] == [(1,)] * 3
    scores = set(map(id, found))
    optimizer = torch.optim.SGD([p for p in model.parameters() if id(p) not in scores], lr=0.01)
    for progress in torch.linspace(0, 1, 12).tolist():
        model.compression_schedule(progress)
        x, y = token_batches()[0]
        nn.functional.cross_entropy(model(x), y).backward()
        model.compression_step()
        optimizer.step()
        optimizer.zero_grad()
    before = params(model) - 3
    choice = model.compress()
    assert choice.cost == params(model) <= 0.6 * before
    assert len(skipped(model)) == sum(not bool(keep.any()) for keep in choice.kept) > 0
    assert masks_of(model) is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"blocks": ""}, "`blocks` must be a module name, a glob, or a list of them, got ''"),
        ({"blocks": []}, "`blocks` must be a module name, a glob, or a list of them, got an empty list"),
        ({"blocks": None}, "`layers` must be a module name, a glob, or a list of them, got an empty list"),
        ({"criterion": "magnitude"}, "`blocks` must be None with criterion='magnitude'"),
    ],
)
def test_settings_are_checked(settings, message):
    with pytest.raises(ValueError, match=message):
        depth(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"blocks": "bert.layer.1"}, "`blocks`: no module is called 'bert.layer.1'; did you mean"),
        ({"blocks": "bert.embeddings"}, "`blocks`: 'bert.embeddings' cannot be removed: it turns shape"),
        (
            {"blocks": "bert.encoder.layer.1", "keep": "bert.encoder.layer.1.output"},
            "`keep` names 'bert.encoder.layer.1",
        ),
        (
            {"blocks": ["bert.encoder.layer.1", "bert.encoder.layer.1.attention"]},
            "lies inside of 'bert.encoder.layer.1'",
        ),
        ({"budget": 0.05}, "`budget` must be at least 0.* all blocks are removed, got 0.05"),
    ],
)
def test_mistakes_are_named_before_the_training_begins(settings, message):
    model = tiny_bert()
    with pytest.raises(ValueError, match=message):
        fit(model, token_batches(), [depth(**settings)], max_epochs=1)


@pytest.mark.slow
def test_a_compiled_module_chooses_as_a_plain_one():
    reports = []
    for compiled in (False, True):
        model, callback = tiny_bert(), depth(budget=0.6)
        given = torch.compile(model, backend="aot_eager") if compiled else model
        fit(given, token_batches(), [callback], max_epochs=3)
        reports.append(callback.report)
        assert skipped(model)
    assert reports[0] == reports[1]
