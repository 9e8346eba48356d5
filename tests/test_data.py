"""The data module in a Trainer: which tasks a training, a validation and a test see, resumed and on several ranks."""

import sys
from collections import defaultdict

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningCLI
from torch.utils.data import TensorDataset

from lightning_plugins.data import EpisodeCounts, EpisodicDataModule
from lightning_plugins.meta import FewShot, Sinusoid
from tests._processes import run_on_ranks
from tests.contract_ranks import act_as_rank

TASKS = Sinusoid(shots=1, queries=1)
LABELLED = TensorDataset(torch.arange(60.0), torch.arange(60) % 6)


class Recorder(LightningModule):
    """Learns one number, and remembers the tasks it has seen: by stage and epoch, a number for each of them."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen = defaultdict(list)

    def remember(self, stage, batch):
        (support_x, _), (query_x, _) = batch
        assert len(support_x) == len(query_x)
        self.seen[f"{stage} {self.current_epoch}"].append(support_x.flatten(1).sum(1).tolist())

    def training_step(self, batch, batch_idx):
        self.remember("train", batch)
        loss = (self.weight * batch[0][0]).mean()
        self.log("loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        self.remember("val", batch)
        self.log("val_loss", batch[0][0].mean())

    def test_step(self, batch, batch_idx):
        self.remember("test", batch)

    def predict_step(self, batch, batch_idx):
        self.remember("predict", batch)
        return batch[1][0]

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def make(**arguments):
    return EpisodicDataModule(**{"train": TASKS, "val": TASKS, "test": TASKS, "episodes": counts(), **arguments})


def counts(**numbers):
    return EpisodeCounts(**{"train": 6, "val": 3, "test": 5, "tasks_per_batch": 2, **numbers})


def trainer_of(**settings):
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    return Trainer(
        **{"accelerator": "cpu", "devices": 1, "max_epochs": 2, "enable_checkpointing": False, **quiet, **settings}
    )


def seen(data, model=None, **settings):
    model = model or Recorder()
    trainer_of(num_sanity_val_steps=0, **settings).fit(model, datamodule=data)
    return dict(model.seen)


def flat(batches):
    return [task for batch in batches for task in batch]


def test_what_a_trainer_sees():
    model, data = Recorder(), make()
    found = seen(data, model)
    assert [len(batch) for batch in found["val 0"]] == [2, 1]
    assert found["val 0"] == found["val 1"]
    trained = flat(found["train 0"] + found["train 1"])
    assert len(set(trained)) == 12  # new tasks in every epoch
    trainer = trainer_of()
    trainer.validate(model, datamodule=data, verbose=False)
    trainer.test(model, datamodule=data, verbose=False)
    outputs = trainer.predict(model, datamodule=data)
    assert [len(output) for output in outputs] == [2, 2, 1]
    tested, validated = flat(model.seen["test 0"]), flat(found["val 0"])
    assert flat(model.seen["predict 0"]) == tested
    assert len({*trained, *validated, *tested}) == 12 + 3 + 5  # though all are drawn from the same task set


def test_only_the_training_follows_the_seed_and_none_the_batches():
    found, reseeded, one_by_one = seen(make()), seen(make(seed=1)), seen(make(episodes=counts(tasks_per_batch=1)))
    assert set(flat(found["train 0"])).isdisjoint(flat(reseeded["train 0"]))
    assert found["val 0"] == reseeded["val 0"]
    for stage in found:
        assert flat(one_by_one[stage]) == flat(found[stage])


@pytest.mark.parametrize("workers", [0, 1])
def test_resumed_in_the_middle_of_an_epoch(workers, tmp_path):
    expected = seen(make(), max_epochs=3)
    saver = ModelCheckpoint(tmp_path, every_n_train_steps=4, save_top_k=-1)
    seen(make(num_workers=workers), max_steps=5, max_epochs=3, callbacks=[saver], enable_checkpointing=True)
    (path,) = tmp_path.glob("*.ckpt")
    model = Recorder()
    trainer_of(num_sanity_val_steps=0, max_epochs=3).fit(model, datamodule=make(num_workers=workers), ckpt_path=path)
    assert model.seen["train 1"] == expected["train 1"][1:]  # the first batch of three was seen before
    assert model.seen["train 2"] == expected["train 2"]


def test_an_epoch_cut_short_is_resumed_with_the_next(tmp_path):
    settings = {"max_epochs": 2, "limit_train_batches": 2}
    expected = seen(make(), **settings)
    first, second, trainer = Recorder(), Recorder(), trainer_of(max_epochs=1, limit_train_batches=2)
    trainer.fit(first, datamodule=make())
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    trainer_of(**settings).fit(second, datamodule=make(), ckpt_path=tmp_path / "one.ckpt")
    assert second.seen["train 1"] == expected["train 1"]


def test_labelled_datasets():
    data = EpisodicDataModule(
        LABELLED, test=FewShot(LABELLED, 2, 3, 4), ways=3, queries=2, episodes=counts(tasks_per_batch=5)
    )
    (support_x, support_y), (query_x, _) = next(iter(data.train_dataloader()))
    assert support_x.shape == (5, 3)  # one shot, by default
    assert query_x.shape == (5, 6)
    assert support_y.tolist() == [[0, 1, 2]] * 5
    assert next(iter(data.test_dataloader()))[1][0].shape == (5, 8)  # a task set keeps its own sizes
    assert data.val_dataloader() == []


def _on_rank(rank, ranks):
    act_as_rank(rank, ranks)
    model = Recorder()
    settings = {"devices": ranks, "strategy": "ddp"}
    found = seen(make(episodes=counts(tasks_per_batch=3)), model, **settings)
    trainer_of(**settings).test(model, datamodule=make(episodes=counts(test=7, tasks_per_batch=3)), verbose=False)
    return {**found, "test 0": model.seen["test 0"]}


@pytest.mark.distributed
def test_two_processes_share_every_batch(tmp_path):
    expected = seen(make(episodes=counts(tasks_per_batch=3)))
    tested = make(episodes=counts(test=7, tasks_per_batch=3)).test_dataloader()
    expected["test 0"] = [batch[0][0].flatten(1).sum(1).tolist() for batch in tested]
    shares = run_on_ranks(_on_rank, 2, tmp_path, 2)
    assert shares[0].keys() == expected.keys()
    for stage, batches in expected.items():
        for number, batch in enumerate(batches):
            parts = [share[stage][number] if number < len(share[stage]) else [] for share in shares]
            assert [len(part) for part in parts] == [(len(batch) + 1) // 2, len(batch) // 2]
            assert sorted(flat(parts)) == sorted(batch)


YAML = """
trainer:
  {accelerator: cpu, devices: 1, max_epochs: 1, logger: false, enable_checkpointing: false, enable_progress_bar: false,
   enable_model_summary: false, num_sanity_val_steps: 0}
data:
  train:
    class_path: lightning_plugins.meta.Sinusoid
    init_args: {shots: 1, queries: 1}
  val:
    class_path: lightning_plugins.meta.Sinusoid
    init_args: {shots: 1, queries: 1}
  test:
    class_path: lightning_plugins.meta.GlyphFewShot
    init_args: {split: test, ways: 2, characters: abcdefghijklmnopqrstuvwxyz}
  ways: null
  shots: null
  queries: null
  episodes: {train: 6, val: 3, test: 5, tasks_per_batch: 2}
  seed: 0
  num_workers: 0
"""


def test_every_argument_can_be_written_in_yaml(tmp_path, monkeypatch):
    path = tmp_path / "config.yaml"
    path.write_text(YAML)
    monkeypatch.setattr(sys, "argv", ["train.py", "fit", "--config", str(path)])
    cli = LightningCLI(Recorder, EpisodicDataModule, save_config_callback=None, seed_everything_default=0)
    found = seen(make(), max_epochs=1)
    assert dict(cli.model.seen) == found
    assert next(iter(cli.datamodule.test_dataloader()))[0][0].shape == (2, 2, 1, 28, 28)


MISTAKES = {
    "nothing": ({"train": None, "val": None, "test": None}, ValueError, "one of `train`, `val` and `test` must be"),
    "shots of a task set": ({"shots": 5}, ValueError, "`shots` is for labelled datasets, got task sets only"),
    "no dataset": ({"train": 3}, TypeError, "`train` must have `__len__` and `__getitem__`, got int"),
    "too many shots": ({"train": LABELLED, "shots": 5, "queries": 6}, ValueError, "got 5 . 6 and 0 with 10, 1 with 10"),
    "no episodes": ({"episodes": 0}, ValueError, "`episodes` must be at least 1, got 0"),
    "seed": ({"seed": -3}, ValueError, "`seed` must be at least 0, got -3"),
    "workers": ({"num_workers": -1}, ValueError, "`num_workers` must be at least 0, got -1"),
}


@pytest.mark.parametrize(
    ("name", "number", "error", "message"),
    [
        ("tasks_per_batch", 0, ValueError, "`tasks_per_batch` must be at least 1, got 0"),
        ("val", 2.5, TypeError, "`val` must be an int"),
        ("test", 0, ValueError, "`test` must be at least 1, got 0"),
    ],
)
def test_mistakes_in_counts(name, number, error, message):
    with pytest.raises(error, match=message):
        counts(**{name: number})


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes(name):
    arguments, error, message = MISTAKES[name]
    with pytest.raises(error, match=message):
        make(**arguments)


def test_a_stage_without_tasks_is_named():
    with pytest.raises(ValueError, match="`test` must be a task set or a labelled dataset, got None"):
        trainer_of().test(Recorder(), datamodule=make(test=None))
