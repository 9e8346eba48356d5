"""Compressions beside the rest of a training: its steps, its checkpoints, its files, and what goes wrong."""

import copy
import pickle
import warnings
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_plugins.callbacks import (
    HybridCompression,
    LowRankCompression,
    MaskScheduling,
    RankScheduling,
    SearchSettings,
    Timing,
)
from lightning_plugins.compression.budget.budgeted_network import BudgetedNetwork
from tests._killed import saving
from tests.callbacks.budgets import BATCHES, Model, in_steps, params, seeded
from tests.models import Batches, fit

KINDS = [HybridCompression, MaskScheduling, RankScheduling]
TIMING = Timing(search_at=2, factorize_at=9, unit="steps")


class Auxiliary(Model):
    """A second head that only the training step calls."""

    def __init__(self) -> None:
        super().__init__()
        self.auxiliary = nn.Linear(16, 3).double()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(batch) + nn.functional.cross_entropy(self.auxiliary(self.backbone[0](batch[0])), batch[1])


class Decoder(Model):
    """A decoder of the features, for a loss in the training step."""

    def __init__(self) -> None:
        super().__init__()
        self.decoder = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 6)).double()

    def training_step(self, batch: Any, _: Any) -> Tensor:
        return self.loss(batch) + (self.decoder(self.backbone(batch[0])) - batch[0]).square().mean()


@pytest.mark.parametrize("kind", [HybridCompression, MaskScheduling])
@pytest.mark.parametrize(("model", "group"), [(Auxiliary, "backbone.0"), (Decoder, "backbone.4")])
def test_what_the_training_step_reads_stays_whole_and_is_named(kind, model, group):
    callback, network = in_steps(kind, budget=0.8, layers="backbone.*"), seeded(model)
    with pytest.warns(UserWarning, match=f"'{group}' in training_step .*the smaller network does not run"):
        fit(network, BATCHES, [callback], max_epochs=3)
    assert callback.finished
    assert group not in callback.report.kept


def test_ranks_of_what_the_forward_pass_does_not_call_are_not_counted():
    callback = in_steps(RankScheduling, budget=0.8, cost="flops")
    with pytest.warns(UserWarning, match=r"'auxiliary' \(Linear\) are kept whole"):
        fit(seeded(Auxiliary), BATCHES, [callback], max_epochs=3)
    assert "auxiliary" not in callback.report.ranks
    with pytest.raises(ValueError, match="'auxiliary' must be called in a forward pass"):
        fit(seeded(Auxiliary), BATCHES, [in_steps(RankScheduling, layers="auxiliary", cost="flops")])


class Volumes(Model):
    def __init__(self) -> None:
        super().__init__()
        self.volumes = nn.Conv3d(4, 40, 3).double()


@pytest.mark.parametrize(
    "make",
    [lambda: in_steps(RankScheduling, budget=0.97), lambda: LowRankCompression("*", budget=0.7, search="energy")],
)
def test_layers_that_cannot_be_touched_are_named_at_the_start(make):
    with pytest.warns(UserWarning, match=r"'volumes' \(Conv3d\) are kept whole and hold 9\d% of the network's"):
        fit(seeded(Volumes), BATCHES, [make()], max_epochs=1, limit_train_batches=1, fast_dev_run=True)


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_training_with_other_rates_and_figures_is_not_compressed_again(kind, tmp_path):
    model = seeded()
    fit(model, BATCHES, [in_steps(kind, budget=0.6), saving(tmp_path)], enable_checkpointing=True, max_epochs=3)
    other, callback = seeded(), in_steps(kind, budget=0.5, figures=True)
    fit(other, BATCHES, [callback], ckpt_path=tmp_path / "step=14.ckpt", max_epochs=3, default_root_dir=tmp_path)
    assert params(other) == params(model)
    third, callback = seeded(), in_steps(kind, layers=["backbone.*"], budget=0.5)
    with pytest.warns(UserWarning, match="holds an already compressed network"):
        fit(third, BATCHES, [callback], ckpt_path=tmp_path / "step=14.ckpt", max_epochs=3)
    assert params(third) == params(model)
    assert callback.finished


def test_an_entry_under_its_old_name_is_found_and_one_of_another_version_is_named(tmp_path):
    fit(seeded(), BATCHES, [in_steps(), saving(tmp_path)], enable_checkpointing=True, max_epochs=2)
    checkpoint = torch.load(tmp_path / "step=7.ckpt", weights_only=True)
    (key,) = [key for key in checkpoint["callbacks"] if key.startswith("Hybrid")]
    entry = checkpoint["callbacks"].pop(key)
    old = key.replace("}", ", 'budget': 0.5}")
    torch.save({**checkpoint, "callbacks": {old: entry}}, tmp_path / "old.ckpt")
    callback = in_steps()
    fit(seeded(), BATCHES, [callback], ckpt_path=tmp_path / "old.ckpt", max_epochs=3)
    assert callback._record.rows[0]["step"] == 1  # it goes on from the entry's
    entry.pop("mode")
    torch.save({**checkpoint, "callbacks": {key: entry}}, tmp_path / "other.ckpt")
    with pytest.raises(MisconfigurationException, match="has no 'mode', so it was written by another version"):
        fit(seeded(), BATCHES, [in_steps()], ckpt_path=tmp_path / "other.ckpt", max_epochs=3)


@pytest.mark.parametrize("method", ["bake", "shrink", "choose"])
@pytest.mark.parametrize("kind", KINDS)
def test_an_error_in_the_surgery_is_the_one_that_is_seen(kind, method, monkeypatch):
    def fails(*_: Any) -> None:
        raise MemoryError("no memory left")

    cleaned = []

    class Later(ModelCheckpoint):
        def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
            cleaned.append(exception)

    monkeypatch.setattr(BudgetedNetwork, method, fails)
    model = seeded()
    with pytest.raises(MemoryError, match="no memory left"):
        fit(model, BATCHES, [in_steps(kind, budget=0.6), Later()], enable_checkpointing=True, max_epochs=3)
    assert len(cleaned) == 1
    assert not any((model._load_state_dict_pre_hooks, model._state_dict_hooks))
    assert not {"channel_masks", "rank_thresholds"} & set(model._modules)


@pytest.mark.parametrize("kind", KINDS)
def test_parameters_have_their_names_and_values_until_it_begins(kind):
    names = []

    class Clamped(Model):
        def on_train_batch_end(self, *_: Any) -> None:
            names.append([name for name, _ in self.named_parameters()])

    model = seeded(Clamped)
    plain = [name for name, _ in model.named_parameters()]
    fit(model, BATCHES, [in_steps(kind, budget=0.6)], max_epochs=3)
    assert names[:3] == [plain] * 3
    assert names[3] != plain


@pytest.mark.parametrize("kind", [*KINDS, LowRankCompression])
def test_checkpoints_by_a_metric_begin_anew_at_the_surgery(kind, tmp_path):
    best = ModelCheckpoint(tmp_path, monitor="val_loss", save_top_k=1)
    stop = EarlyStopping("val_loss", patience=50)
    callback = (
        LowRankCompression("backbone.*", budget=0.5, search="energy", timing=TIMING)
        if kind is LowRankCompression
        else in_steps(kind, budget=0.5)
    )
    model = seeded()
    losses = iter([0.1, 0.2, 5.0, 6.0])  # the best comes before the surgery
    model.validation_step = lambda batch, batch_idx: model.log("val_loss", torch.tensor(next(losses)))
    settings = {"validation": Batches(BATCHES[:1]), "num_sanity_val_steps": 0, "enable_checkpointing": True}
    with pytest.warns(UserWarning, match="(ModelCheckpoint|EarlyStopping) and .* compare with the small network only"):
        fit(model, BATCHES, [callback, best, stop], max_epochs=4, **settings)
    saved = torch.load(best.best_model_path, weights_only=True)["state_dict"]
    assert {name: value.shape for name, value in saved.items()} == {n: v.shape for n, v in model.state_dict().items()}


class Normed(Model):
    """A batch norm behind channels that masks close."""

    def __init__(self) -> None:
        super().__init__()
        layers = [nn.Linear(6, 32), nn.BatchNorm1d(32, momentum=0.01), nn.ReLU(), nn.Linear(32, 5)]
        self.backbone = nn.Sequential(*layers).double()


@pytest.mark.parametrize("criterion", ["learned", "magnitude"])
def test_statistics_are_those_of_the_small_network(criterion):
    x, y = (torch.cat(parts) for parts in zip(*BATCHES, strict=True))
    loader = DataLoader(TensorDataset(x, y), batch_size=8, shuffle=True)
    model = seeded(Normed)
    callback = in_steps(MaskScheduling, budget=0.4, criterion=criterion, update_every=2, begin=3, end=17)
    from lightning.pytorch import Trainer

    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "precision": "64-true"}
    Trainer(max_epochs=3, accelerator="cpu", enable_checkpointing=False, callbacks=[callback], **quiet).fit(
        model, loader
    )
    before = model.backbone[0](x)  # the surgery came behind the last step
    norm = model.backbone[1]
    torch.testing.assert_close(norm.running_mean, before.mean(0), rtol=1e-6, atol=1e-6)
    assert norm.momentum == 0.01


@pytest.mark.parametrize("kind", [MaskScheduling, LowRankCompression])
def test_statistics_of_a_resumed_training_go_on_where_they_were(kind, tmp_path):
    """Right after a surgery the n-th batch counts for 1 / n of them, also where a checkpoint lies between."""

    def callback():
        if kind is MaskScheduling:
            return in_steps(kind, layers="backbone.*")
        return LowRankCompression("backbone.*", budget=0.5, search="energy", timing=TIMING)

    def trained(**settings):
        model, compression = seeded(Normed), callback()
        return model, compression, fit(model, BATCHES, [compression], **settings)

    straight, _, _ = trained(max_steps=18, max_epochs=-1)
    _, compression, first = trained(max_steps=14, max_epochs=-1)  # the surgery is at step 12
    assert compression.finished
    first.save_checkpoint(tmp_path / "half.ckpt")
    resumed, _, _ = trained(max_steps=18, max_epochs=-1, ckpt_path=tmp_path / "half.ckpt")
    torch.testing.assert_close(dict(resumed.state_dict()), dict(straight.state_dict()), rtol=0, atol=0)
    norm = next(module for module in straight.modules() if isinstance(module, nn.BatchNorm1d))
    assert norm.momentum == 0.01


class Teaching(Model):
    def __init__(self) -> None:
        super().__init__()
        self.teacher = copy.deepcopy(self.backbone).requires_grad_(False)


class Averaging(Model):
    def __init__(self) -> None:
        super().__init__()
        self.shadow = {name: p.detach().clone() for name, p in self.named_parameters()}


class Anchored(Model):
    def __init__(self) -> None:
        super().__init__()
        self.anchors = [p.detach().clone() for p in self.backbone.parameters()]


@pytest.mark.parametrize(
    ("kind", "name"), [(Teaching, "teacher"), (Averaging, "shadow"), (Anchored, "anchors"), (Model, "")]
)
def test_tensors_that_mirror_parameters_are_named_at_the_start(kind, name):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(seeded(kind), BATCHES, [in_steps(RankScheduling, layers="backbone.*", budget=0.9)], max_epochs=1)
    found = [str(one.message) for one in caught if "mirror parameters" in str(one.message)]
    assert bool(found) == bool(name)
    assert all(f"'{name}'" in message for message in found)


@pytest.mark.parametrize("kind", [*KINDS, LowRankCompression])
def test_a_picture_that_cannot_be_written_ends_no_training(kind, tmp_path):
    (tmp_path / "compression.png").mkdir()  # a folder is in the way
    (tmp_path / "compression").write_text("")
    callback = (
        LowRankCompression("backbone.*", budget=0.5, search="energy", timing=TIMING)
        if kind is LowRankCompression
        else in_steps(kind, figures=True)
    )
    with pytest.warns(UserWarning, match="could not be written, and training continues"):
        fit(seeded(), BATCHES, [callback], max_epochs=3, default_root_dir=tmp_path)
    assert callback.finished
    assert not list(tmp_path.glob("*.part"))


def test_the_hook_on_the_module_is_not_copied():
    callback = in_steps()
    copied = pickle.loads(pickle.dumps(callback._structure))
    assert copied(seeded(), {}, "") is None


@pytest.mark.parametrize("form", ["named", "starred", "typed"])
def test_a_step_is_called_as_lightning_calls_it(form):
    class Named(Model):
        def training_step(self, batch: Any, _: int) -> Tensor:
            return self.loss(batch)

    class Starred(Model):
        def training_step(self, *arguments: Any) -> Tensor:
            assert len(arguments) == 2
            return self.loss(arguments[0])

    class Typed(Model):
        def training_step(self, batch: Any) -> Tensor:
            return self.loss(batch)

    kind = {"named": Named, "starred": Starred, "typed": Typed}[form]
    callback = LowRankCompression("*", budget=0.6, search=SearchSettings(data=BATCHES[:2]), timing=TIMING)
    fit(seeded(kind), BATCHES, [callback], max_epochs=3)
    assert callback.finished


def test_a_step_that_cannot_be_scored_is_named_at_the_start():
    class Iterating(Model):
        def training_step(self, dataloader_iter: Any) -> Tensor:
            batch, _, _ = next(dataloader_iter)
            return self.loss(batch)

    with pytest.raises(MisconfigurationException, match=r"`search\.score`: the search of ranks scores batches"):
        fit(
            seeded(Iterating),
            BATCHES,
            [LowRankCompression("*", budget=0.6, search=SearchSettings(data=BATCHES[:2]))],
            max_epochs=3,
        )


@pytest.mark.parametrize("kind", [HybridCompression, LowRankCompression])
def test_a_list_of_example_inputs_holds_the_arguments(kind):
    class TwoInputs(Model):
        def __init__(self) -> None:
            super().__init__()
            self.example_input_array = [self.example_input_array, 2.0]

        def forward(self, x: Tensor, scale: float) -> Tensor:
            return super().forward(scale * x)

        def training_step(self, batch: Any, _: Any) -> Tensor:
            return nn.functional.cross_entropy(self(batch[0], 1.0), batch[1])

    timing = Timing(search_at=2, factorize_at=6, unit="steps")
    late = {"search": SearchSettings(data=BATCHES[:2]), "timing": timing}
    callback = LowRankCompression("*", budget=0.6, **late) if kind is LowRankCompression else in_steps(kind, budget=0.8)
    fit(seeded(TwoInputs), BATCHES, [callback], max_epochs=3)
    assert callback.report.after.flops < callback.report.before.flops


def test_a_step_that_fails_in_evaluation_mode_is_named_with_the_mode():
    class Predicting(Model):
        def training_step(self, batch: Any, _: Any) -> Tensor:
            losses = {"loss": self.loss(batch)} if self.training else []  # as detection networks do
            return sum(losses.values())

    with pytest.raises(
        MisconfigurationException, match=r"of Predicting in evaluation mode, which fails .*AttributeErr"
    ):
        fit(
            seeded(Predicting),
            BATCHES,
            [LowRankCompression("*", budget=0.6, search=SearchSettings(data=BATCHES[:2]))],
            max_epochs=3,
        )
