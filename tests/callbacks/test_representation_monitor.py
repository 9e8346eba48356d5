import os
import sys
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lightning_plugins import metrics, plots
from lightning_plugins.callbacks import Readout
from lightning_plugins.callbacks._monitors import figures, history
from lightning_plugins.callbacks.representation_monitor import RepresentationMonitor
from lightning_plugins.functional import autocorrelation_eigenvalues
from tests._processes import run_on_ranks
from tests.models import Batches, Classifier, fit, make_batches, shard

BY_NAME = {
    "entropy": metrics.VonNeumannEntropy,
    "effective_rank": metrics.EffectiveRank,
    "isotropy": metrics.Isotropy,
    "correlation_gap": metrics.CorrelationGap,
    "rankme": metrics.RankMe,
    "uniformity": metrics.Uniformity,
}
DEFAULT = [name for name in BY_NAME if name != "uniformity"]


class Recorder(Classifier):
    """Keeps the embeddings of every step, by itself and without hooks."""

    def __init__(self, **settings: Any) -> None:
        torch.manual_seed(0)
        super().__init__(**settings)
        self.seen: dict[str, list[tuple[int, Tensor]]] = {"train": [], "val": []}

    def keep(self, stage: str, x: Tensor) -> None:
        hidden = torch.tanh(torch.nn.functional.linear(x, self.backbone[0].weight, self.backbone[0].bias))
        rows = torch.nn.functional.linear(hidden, self.backbone[2].weight, self.backbone[2].bias)
        self.seen[stage].append((self.global_step, rows.detach().clone()))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.keep("train", batch[0])
        return self.loss(batch)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        if not self.trainer.sanity_checking:
            self.keep("val", batch[0])
        self.loss(batch)

    def rows(self, stage: str, *, first: int = 0, every: int = 1) -> Tensor:
        return torch.cat([rows for step, rows in self.seen[stage] if step >= first and step % every == 0])


def expected(rows: Tensor, names: Any = DEFAULT) -> dict[str, Tensor]:
    built = {name: BY_NAME[name](rows.shape[1]) for name in names}
    return {name: metric(rows).double() for name, metric in built.items()}


def logged(trainer: Trainer, stage: str, layer: str = "head") -> dict[str, Tensor]:
    start = f"representation/{stage}/{layer}/"
    found = {name: value.double() for name, value in trainer.callback_metrics.items() if name.startswith(start)}
    return {name.removeprefix(start): value for name, value in found.items()}


def watch(layers: Any = "head:input", **settings: Any) -> RepresentationMonitor:
    return RepresentationMonitor(layers, **{"every_n_steps": 1, "figures": False, **settings})


@pytest.mark.parametrize("names", [DEFAULT, ["uniformity"], ["rankme", "entropy"]], ids=str)
def test_logs_what_all_rows_of_the_epoch_say(names):
    model = Recorder()
    trainer = fit(model, make_batches(), [watch(metrics=names)], validation=Batches(make_batches(3, seed=1)))
    torch.testing.assert_close(logged(trainer, "train"), expected(model.rows("train", first=4), names))
    torch.testing.assert_close(logged(trainer, "val"), expected(model.rows("val", first=8), names))
    assert set(logged(trainer, "val")) == set(names)


def test_training_measures_every_nth_optimizer_step_whole():
    model = Recorder()
    trainer = fit(model, make_batches(8), [watch(every_n_steps=3)], accumulate_grad_batches=2, max_epochs=1)
    rows = model.rows("train", every=3)
    assert len(rows) == 4 * 8  # steps 0 and 3, two batches each
    torch.testing.assert_close(logged(trainer, "train"), expected(rows))


def test_remembers_the_spectrum_of_every_epoch():
    model, monitor = Recorder(), watch()
    fit(model, make_batches(), [monitor], validation=Batches(make_batches(3, seed=1)), max_epochs=3)
    assert list(monitor.spectra["val"]["head"]) == list(monitor.spectra["train"]["head"]) == [4, 8, 12]
    spectrum = autocorrelation_eigenvalues(model.rows("val", first=12)).float()
    torch.testing.assert_close(monitor.spectra["val"]["head"][12], spectrum)


def test_max_spectra_keeps_the_first_the_latest_and_even_steps():
    monitor = watch(max_spectra=4)
    for step in range(0, 110, 10):
        monitor._history.remember("val", "head", step, torch.ones(2))
    kept = sorted(monitor.spectra["val"]["head"])
    assert (len(kept), kept[0], kept[-1]) == (4, 0, 100)
    assert max(b - a for a, b in pairwise(kept)) <= 60
    monitor._history.remember("val", "head", 120, torch.ones(1))  # the layer became narrower
    assert list(monitor.spectra["val"]["head"]) == [120]


def test_several_layers_sides_and_monitors():
    monitors = [watch(["head", "head:input", "backbone.0"], metrics=["entropy"]), watch("backbone", metrics=["rankme"])]
    trainer = fit(Recorder(), make_batches(), monitors)
    names = {name for name in trainer.callback_metrics if name.startswith("representation")}
    assert names == {
        "representation/train/head.output/entropy",
        "representation/train/head.input/entropy",
        "representation/train/backbone.0/entropy",
        "representation/train/backbone/rankme",
    }
    torch.testing.assert_close(logged(trainer, "train", "backbone")["rankme"], expected(_last(trainer))["rankme"])


def _last(trainer: Trainer) -> Tensor:
    return trainer.lightning_module.rows("train", first=4)


class Images(Classifier):
    """Its first layer gives a feature map."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv1d(1, 3, 2)

    def loss(self, batch: Any) -> Tensor:
        self.map = self.conv(batch[0][:, None])[..., None]
        self.again = self.tail(self.map)
        return super().loss(batch) + self.again.mean()

    def tail(self, x: Tensor) -> Tensor:
        return x

    def on_train_start(self) -> None:
        self.tail = torch.nn.Identity()


def by_mean(features: Tensor) -> Tensor:
    return features.mean(dim=2)


def test_pools_feature_maps_with_a_callable_too():
    model = Images()
    trainer = fit(model, make_batches(1), [watch("conv", readout=Readout(pool=by_mean))], max_epochs=1)
    rows = model.map.detach().mean(dim=(2, 3))
    torch.testing.assert_close(logged(trainer, "train", "conv"), expected(rows))


class WorksInPlace(Recorder):
    """The first layer's output is overwritten by what comes after it; it is also recomputed in the backward."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone[1] = torch.nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(checkpoint(self.backbone, x, use_reentrant=False))

    def keep(self, stage: str, x: Tensor) -> None:
        rows = torch.nn.functional.linear(x, self.backbone[0].weight, self.backbone[0].bias)
        self.seen[stage].append((self.global_step, rows.detach().clone()))


def test_rows_are_those_the_layer_gave_whatever_happens_to_its_tensor_later():
    model = WorksInPlace()
    monitor = watch("backbone.0", readout=Readout(pool="flatten"))
    trainer = fit(model, make_batches(), [monitor], validation=Batches(make_batches(2, seed=1)), max_epochs=1)
    for stage in ("train", "val"):
        torch.testing.assert_close(logged(trainer, stage, "backbone.0"), expected(model.rows(stage)))


class TrainsTwoViews(Recorder):
    """Calls the layer twice in training and never in validation."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        views = [batch, [batch[0].flip(1), batch[1]]]
        for view in views:
            self.keep("train", view[0])
        return sum(self.loss(view) for view in views)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.backbone(batch[0])


def test_all_calls_count_and_a_stage_may_have_none():
    model = TrainsTwoViews()
    trainer = fit(model, make_batches(2), [watch()], validation=Batches(make_batches(1)), max_epochs=1)
    torch.testing.assert_close(logged(trainer, "train"), expected(model.rows("train")))
    assert logged(trainer, "val") == {}


class ByHand(Recorder):
    """Optimizes by itself, so that its training step returns nothing."""

    automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        self.keep("train", batch[0])
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        optimizer.step()


def test_manual_optimization_is_watched_too():
    model = ByHand()
    trainer = fit(model, make_batches(), [watch()], max_epochs=1)
    torch.testing.assert_close(logged(trainer, "train"), expected(model.rows("train")))


def test_training_is_the_same_with_and_without():
    class Draws(Recorder):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return super().training_step(batch, batch_idx) * torch.rand(())

    def run(*callbacks: Callback) -> tuple[dict[str, Tensor], Tensor]:
        model = Draws()
        fit(model, make_batches(), callbacks, validation=Batches(make_batches(2, seed=1)))
        return dict(model.state_dict()), torch.get_rng_state()

    torch.testing.assert_close(run(watch(figures=True, metrics=list(BY_NAME))), run(), rtol=0, atol=0)


class Fails(Recorder):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        raise KeyError("the user's own error")


@pytest.mark.parametrize("kind", [Recorder, Fails])
def test_module_is_untouched_afterwards(kind):
    model = kind()
    before = set(vars(model))
    if kind is Fails:
        with pytest.raises(KeyError, match="the user's own error"):
            fit(model, make_batches(), [watch()], validation=Batches(make_batches(1)))
    else:
        fit(model, make_batches(), [watch()], validation=Batches(make_batches(1)))
    assert set(vars(model)) - before <= {"_trainer", "_hparams"}  # which Lightning adds
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_sanity_check_leaves_no_trace(tmp_path):
    class Stops(Callback):
        def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            self.metrics = dict(trainer.callback_metrics)
            self.state = trainer.callbacks[0].state_dict()
            self.files = [path for path in tmp_path.rglob("*") if path.is_file()]

    monitor, stops = watch(figures=True), Stops()
    model = Recorder()
    validation = Batches(make_batches(3, seed=1))
    trainer = fit(model, make_batches(), [monitor, stops], validation=validation, max_epochs=1, num_sanity_val_steps=2)
    assert (stops.metrics, stops.files) == ({}, [])
    assert stops.state == {"spectra": {"train": {}, "val": {}}, "sums": {"train": {}, "val": {}}, "epoch": 0}
    torch.testing.assert_close(logged(trainer, "val"), expected(model.rows("val")))


def test_fast_dev_run_and_an_endless_training(tmp_path):
    fit(Recorder(), make_batches(), [watch(figures=True)], validation=Batches(make_batches(1)), fast_dev_run=True)
    assert not list(tmp_path.rglob("*.png"))
    trainer = fit(Recorder(), make_batches(), [watch()], max_epochs=-1, max_steps=6)
    assert set(logged(trainer, "train")) == set(DEFAULT)


def test_validate_alone_logs_and_draws(tmp_path):
    model, monitor = Recorder(), watch(figures=True)
    trainer = Trainer(accelerator="cpu", logger=False, callbacks=[monitor], enable_progress_bar=False)
    trainer.validate(model, Batches(make_batches(3)), verbose=False)
    torch.testing.assert_close(logged(trainer, "val"), expected(model.rows("val")))
    assert len(list(tmp_path.rglob("representation/val/head/spectrum.png"))) == 1
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_two_validation_loaders_are_kept_apart():
    class Two(Recorder):
        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            super().validation_step(batch, batch_idx)

    model = Two()
    loaders = [Batches(make_batches(2, seed=1)), Batches(make_batches(1, seed=2))]
    trainer = fit(model, make_batches(1), [watch()], validation=loaders, max_epochs=1)
    rows = model.rows("val")
    torch.testing.assert_close(logged(trainer, "val_0"), expected(rows[:16]))
    torch.testing.assert_close(logged(trainer, "val_1"), expected(rows[16:]))


class SavesAt(Callback):
    """Saves a checkpoint at one step, in the hook named."""

    def __init__(self, path: Any, step: int, hook: str = "on_train_batch_end") -> None:
        def save(trainer: Trainer, *args: Any) -> None:
            if trainer.global_step == step and not trainer.sanity_checking:
                trainer.save_checkpoint(path)

        setattr(self, hook, save)


@pytest.mark.parametrize(
    ("step", "hook"),
    [
        (2, "on_train_batch_end"),
        (4, "on_train_batch_end"),  # of the epoch's last batch: Lightning then leaves out the validation
        (4, "on_validation_end"),  # where ModelCheckpoint saves
        (4, "on_train_epoch_end"),
        (6, "on_train_batch_end"),
    ],
)
def test_resume_equals_uninterrupted(tmp_path, step, hook):
    def run(**settings: Any) -> tuple[RepresentationMonitor, Trainer]:
        monitor = watch(metrics=list(BY_NAME))
        callbacks = [monitor, SavesAt(tmp_path / "half.ckpt", step, hook)] if "ckpt_path" not in settings else [monitor]
        validation = Batches(make_batches(2, seed=1))
        model = Recorder().double()  # from the start: Lightning restores weights before it casts a module
        return monitor, fit(model, make_batches(), callbacks, validation=validation, max_epochs=3, **settings)

    straight, straight_trainer = run()
    saved = torch.load(tmp_path / "half.ckpt", weights_only=True)["callbacks"][straight.state_key]
    assert bool(saved["sums"]["train"]) == (hook != "on_train_epoch_end")  # control: there is something to go on from
    resumed, resumed_trainer = run(ckpt_path=tmp_path / "half.ckpt")
    if (step, hook) == (4, "on_train_batch_end"):
        del straight.spectra["val"]["head"][4]
    torch.testing.assert_close(resumed.state_dict(), straight.state_dict(), rtol=0, atol=0)
    assert [*resumed.spectra["train"]["head"]] == [4, 8, 12]
    for stage in ("train", "val"):
        torch.testing.assert_close(logged(resumed_trainer, stage), logged(straight_trainer, stage), rtol=0, atol=0)


def test_state_of_a_checkpoint_not_yet_taken_over_is_not_lost():
    monitor, other = watch(), watch()
    monitor._statistics["train"].update("head", torch.ones(2, 3))
    other.load_state_dict(monitor.state_dict())
    torch.testing.assert_close(other.state_dict(), monitor.state_dict())


def test_a_new_training_forgets_and_a_continued_one_remembers():
    monitor = watch()
    trainer = fit(Recorder(), make_batches(), [monitor], max_epochs=2)
    trainer.fit_loop.max_epochs = 3
    trainer.fit(trainer.lightning_module, Batches(make_batches()))
    assert list(monitor.spectra["train"]["head"]) == [4, 8, 12]
    fit(Recorder(), make_batches(2), [monitor], max_epochs=1)
    assert list(monitor.spectra["train"]["head"]) == [2]


def _distributed(rank: int, bounds: list[int], batches: Any, validation: Any, folder: str) -> dict[str, Any]:
    os.environ.update(LOCAL_RANK=str(rank), RANK=str(rank), WORLD_SIZE="2", NODE_RANK="0")
    os.chdir(folder)

    def run(**settings: Any) -> tuple[RepresentationMonitor, Trainer]:
        monitor = watch(metrics=list(BY_NAME), figures=True)
        saves = [] if "ckpt_path" in settings else [SavesAt(f"{folder}/half.ckpt", 6)]
        settings = {"strategy": "ddp", "devices": 2, "max_epochs": 2, **settings}
        own = Batches(shard(validation, bounds))
        model = Recorder().double()
        return monitor, fit(model, shard(batches, bounds), [monitor, *saves], validation=own, **settings)

    results = {}
    for name, settings in {"straight": {}, "resumed": {"ckpt_path": f"{folder}/half.ckpt"}}.items():
        monitor, trainer = run(**settings)
        results[name] = {stage: logged(trainer, stage) for stage in ("train", "val")} | {"spectra": monitor.spectra}
    return results


@pytest.mark.distributed
def test_two_unequal_ranks_equal_one_process_also_after_a_resume(tmp_path):
    batches, validation = make_batches(), make_batches(3, seed=1)
    ranks = run_on_ranks(_distributed, 2, tmp_path, [0, 3, 8], batches, validation, str(tmp_path))
    monitor = watch(metrics=list(BY_NAME))
    # Ranks average gradients, and the model's loss is a sum over the batch
    model = Recorder(lr=0.05).double()
    trainer = fit(model, batches, [monitor], validation=Batches(validation))
    alone = {stage: logged(trainer, stage) for stage in ("train", "val")} | {"spectra": monitor.spectra}
    for rank in ranks:
        torch.testing.assert_close(rank["straight"], alone, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(rank["resumed"], rank["straight"], rtol=1e-6, atol=1e-6)
    assert len(list(tmp_path.glob("representation/*/head/spectrum.png"))) == 2


class Unsized:
    """A loader that does not know its length, so that Lightning lets one rank have no batch."""

    def __init__(self, batches: Any) -> None:
        self.batches = batches

    def __iter__(self) -> Any:
        return iter(self.batches)


def _lonely(rank: int, batches: Any) -> dict[str, Any]:
    os.environ.update(LOCAL_RANK=str(rank), RANK=str(rank), WORLD_SIZE="2", NODE_RANK="0")
    monitor = watch(metrics=list(BY_NAME))
    trainer = Trainer(
        accelerator="cpu", strategy="ddp", devices=2, logger=False, callbacks=[monitor], enable_progress_bar=False
    )
    trainer.validate(Recorder(), Unsized(batches if rank == 0 else []), verbose=False)
    return logged(trainer, "val")


@pytest.mark.distributed
def test_a_rank_without_a_batch_takes_part(tmp_path):
    batches, model = make_batches(2), Recorder()
    with torch.no_grad():
        rows = model.backbone(torch.cat([x for x, _ in batches]))
    for values in run_on_ranks(_lonely, 2, tmp_path, batches):
        torch.testing.assert_close(values, expected(rows, BY_NAME), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["tensorboard", "csv", "several", "none"])
def testfigures_reach_the_loggers(tmp_path, kind):
    loggers = {
        "tensorboard": [TensorBoardLogger(tmp_path, name="tb")],
        "csv": [CSVLogger(tmp_path, name="csv")],
        "several": [CSVLogger(tmp_path, name="csv"), TensorBoardLogger(tmp_path, name="tb")],
        "none": False,
    }[kind]
    validation = Batches(make_batches(2, seed=1))
    fit(Recorder(), make_batches(), [watch(figures=True)], validation=validation, logger=loggers)
    places = {"csv": "csv/version_0", "several": "csv/version_0", "none": "."}
    for stage in ("train", "val"):
        if kind in places:
            picture = tmp_path / places[kind] / "representation" / stage / "head" / "spectrum.png"
            assert picture.read_bytes().startswith(b"\x89PNG")
    if kind in {"tensorboard", "several"}:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        events = EventAccumulator(str(tmp_path / "tb" / "version_0")).Reload()
        assert set(events.Tags()["images"]) == {f"representation/{stage}/head/spectrum" for stage in ("train", "val")}
        assert "representation/val/head/entropy" in events.Tags()["scalars"]
        assert events.Images("representation/val/head/spectrum")[-1].step == 8
    assert len(list(tmp_path.rglob("*.png"))) == (2 if kind in places else 0)


def test_wandb_gets_an_image(tmp_path):
    logger = WandbLogger(save_dir=tmp_path, project="test", offline=True)
    fit(Recorder(), make_batches(1), [watch(figures=True)], logger=logger, max_epochs=1)
    logger.experiment.finish()
    pictures = list(tmp_path.glob("wandb/offline-run-*/files/media/images/representation/train/head/spectrum_*.png"))
    assert len(pictures) == 1
    assert not list(tmp_path.glob("representation"))


def test_drawing_takes_a_small_share_but_the_last_figure_is_always_drawn(monkeypatch):
    drawn, clock = [], [0.0]
    monkeypatch.setattr(figures, "hand_to_loggers", lambda trainer, tag, figure: drawn.append(clock[0]))
    monkeypatch.setattr(figures.time, "monotonic", lambda: clock[0])

    def slow(spectra: Any, steps: Any, title: str) -> Any:
        clock[0] += 1.0
        return plots.spectrum_figure(spectra, steps, title=title)

    class Passes(Callback):
        def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            clock[0] += 8.0

    monkeypatch.setattr(history, "spectrum_figure", slow)
    fit(Recorder(), make_batches(1), [watch(figures=True), Passes()], max_epochs=5)
    assert drawn == [9.0, 34.0, 43.0]  # the first, one when 20 s have passed, and at the end


def test_withoutfigures_nothing_is_drawn(tmp_path):
    fit(Recorder(), make_batches(1), [watch()], max_epochs=1)
    assert not list(tmp_path.rglob("*.png"))


CONFIG = """
trainer:
  accelerator: cpu
  max_epochs: 1
  logger: false
  enable_checkpointing: false
  enable_progress_bar: false
  callbacks:
    - class_path: lightning_plugins.callbacks.representation_monitor.RepresentationMonitor
      init_args:
        layers: ["head:input", "backbone.*"]
        readout: {pool: tests.callbacks.test_representation_monitor.by_mean}
        every_n_steps: 5
        metrics: [entropy, uniformity]
        figures: false
        max_spectra: 8
    - class_path: lightning_plugins.callbacks.representation_monitor.RepresentationMonitor
      init_args:
        layers: head
"""


def test_can_be_written_in_yaml(tmp_path):
    from lightning.pytorch.cli import LightningCLI

    (tmp_path / "config.yaml").write_text(CONFIG)
    cli = LightningCLI(
        Classifier, run=False, args=["--config", str(tmp_path / "config.yaml")], save_config_callback=None
    )
    first, second = [one for one in cli.trainer.callbacks if isinstance(one, RepresentationMonitor)]
    assert (first.layers, first.metrics, first.max_spectra) == (
        ("head:input", "backbone.*"),
        ("entropy", "uniformity"),
        8,
    )
    assert (second.layers, second.every_n_steps, second.figures) == (("head",), 50, True)
    assert first.state_key != second.state_key


def test_features_that_change_their_number_are_named():
    class Grows(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.side(torch.ones(4, 3 + batch_idx))
            return super().training_step(batch, batch_idx)

    model = Grows()
    model.side = torch.nn.Identity()
    with pytest.warns(UserWarning, match="'side' gave embeddings of 3 features and now 4"):
        trainer = fit(model, make_batches(2), [watch("side")])
    assert trainer.callback_metrics["representation/train/side/left_out"] == 1


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: watch([]), ValueError, "`layers` must be a module name"),
        (lambda: watch(3), TypeError, "`layers` must be a module name"),
        (lambda: watch(every_n_steps=0), ValueError, "`every_n_steps` must be at least 1, got 0"),
        (lambda: watch(metrics=["entrpy"]), ValueError, "`metrics` must be 'entropy'.*did you mean 'entropy'"),
        (lambda: watch(metrics=[3]), TypeError, "`metrics` must be"),
        (lambda: watch(max_spectra=0), ValueError, "`max_spectra` must be at least 1"),
        (lambda: watch(readout={"pool": "max"}), TypeError, r"`readout` must be a Readout, such as .*got \{\'pool\'"),
        (lambda: fit(Recorder(), make_batches(1), [watch("haed")]), ValueError, "haed"),
    ],
)
def test_bad_arguments_are_named(build, error, message):
    with pytest.raises(error, match=message):
        build()


def test_missing_matplotlib_is_said_at_once(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"lightning-plugins\[plots\]"):
        watch(figures=True)


def test_unsupported_strategy_is_refused():
    with pytest.raises(MisconfigurationException, match="RepresentationMonitor supports"):
        watch().setup(SimpleNamespace(strategy=object()), Recorder(), "fit")
