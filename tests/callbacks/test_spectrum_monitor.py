import os
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.loggers.logger import DummyLogger
from torch import Tensor, nn
from torch.nn.utils.parametrizations import orthogonal, spectral_norm

from lightning_plugins import plots
from lightning_plugins.callbacks import LowRankCompression, SpectrumMonitor, Timing, spectrum_monitor
from lightning_plugins.callbacks._monitors import figures
from lightning_plugins.functional.weight_spectrum import power_law_tail
from tests._processes import run_on_ranks
from tests.models import Batches, Classifier, fit, make_batches, shard


class Recorder(Classifier):
    """Keeps its weights after every optimizer step, by itself."""

    def __init__(self, **settings: Any) -> None:
        torch.manual_seed(0)
        super().__init__(**settings)
        self.seen: dict[int, dict[str, Tensor]] = {}

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.seen.setdefault(self.global_step, {name: value.clone() for name, value in self.state_dict().items()})
        return self.loss(batch)

    def values(self, layer: str, step: int) -> Tensor:
        return torch.linalg.svdvals(self.seen[step][f"{layer}.weight"].flatten(1).double())


class Keeps(DummyLogger):
    """Keeps what it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.metrics: dict[int, dict[str, float]] = {}

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        watched = {name: value for name, value in metrics.items() if name.startswith("spectrum/")}
        if watched and step is not None:
            assert step not in self.metrics
            self.metrics[step] = watched


def watch(layers: Any = "head", **settings: Any) -> SpectrumMonitor:
    return SpectrumMonitor(layers, **{"every_n_steps": 1, "figures": False, **settings})


def expected(values: Tensor, layer: str = "head") -> dict[str, float]:
    shares = values / values.sum()
    numbers = {
        "stable_rank": values.square().sum() / values[0] ** 2,
        "effective_rank": (-(shares * shares.log()).sum()).exp(),
        "spectral_norm": values[0],
        "tail_exponent": power_law_tail(torch.as_tensor(values).double().square()).item(),
    }
    return {f"spectrum/{layer}/{name}": float(number) for name, number in numbers.items()}


def test_logs_what_the_weights_say_before_the_first_and_after_every_nth_step():
    model, logger = Recorder(), Keeps()
    trainer = fit(model, make_batches(7), [watch(every_n_steps=3)], logger=logger, log_every_n_steps=50)
    assert list(logger.metrics) == [0, 3, 6, 9, 12]
    for step, metrics in logger.metrics.items():
        torch.testing.assert_close(metrics, expected(model.values("head", step)))
    found = {name: float(value) for name, value in trainer.callback_metrics.items()}
    torch.testing.assert_close(found, logger.metrics[12])


def test_remembers_the_singular_values():
    model, monitor = Recorder(), watch(["head", "backbone.*"], every_n_steps=2, max_spectra=3)
    fit(model, make_batches(5), [monitor])
    assert list(monitor.spectra) == ["backbone.0", "backbone.2", "head"]
    for layer, kept in monitor.spectra.items():
        assert len(kept) == 3
        assert {0, 10} <= set(kept)
        torch.testing.assert_close(kept[0], model.values(layer, 0).float())


def test_accumulated_batches_are_one_step():
    model, logger = Recorder(), Keeps()
    fit(model, make_batches(8), [watch(every_n_steps=2)], logger=logger, accumulate_grad_batches=2)
    assert list(logger.metrics) == [0, 2, 4, 6, 8]
    torch.testing.assert_close(logger.metrics[2], expected(model.values("head", 2)))


class TwoOptimizers(Recorder):
    """Every batch is two steps for Lightning's count."""

    automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        loss = super().training_step(batch, batch_idx)
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in self.optimizers():
            optimizer.step()

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(part.parameters(), lr=self.lr) for part in (self.backbone, self.head)]


def test_manual_optimization_with_two_optimizers():
    model, logger = TwoOptimizers(), Keeps()
    fit(model, make_batches(5), [watch(every_n_steps=3)], logger=logger, max_epochs=1)
    assert list(logger.metrics) == [0, 3]  # batches, of which each is a step of both
    torch.testing.assert_close(logger.metrics[3], expected(model.values("head", 6)))


class Grouped(Recorder):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 6, 3, groups=2)
        self.attention = nn.MultiheadAttention(4, 2)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return super().training_step(batch, batch_idx) + self.conv.weight.sum()


@pytest.mark.parametrize("scheme", [1, 2])
def test_grouped_convolutions_and_attention(scheme):
    model, monitor = Grouped(), watch("*", scheme=scheme)
    fit(model, make_batches(1), [monitor], max_epochs=1)
    attention = {f"attention.{part}" for part in ("q", "k", "v", "out_proj")}
    assert set(monitor.spectra) == {"conv", "backbone.0", "backbone.2", "head"} | attention
    kernel = model.seen[0]["conv.weight"].double()
    dense = torch.zeros(6, 4, 3, 3, dtype=torch.float64)
    dense[:3, :2], dense[3:, 2:] = kernel[:3], kernel[3:]
    matrix = dense.flatten(1) if scheme == 1 else dense.transpose(1, 2).reshape(18, 12)
    torch.testing.assert_close(monitor.spectra["conv"][0].double(), torch.linalg.svdvals(matrix))


class Parametrized(Recorder):
    def __init__(self) -> None:
        super().__init__()
        spectral_norm(self.head)
        orthogonal(self.backbone[0])
        self.after: list[Tensor] = []

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        with torch.no_grad():
            self.eval()
            self.after.append(torch.linalg.svdvals(self.head.weight.double()))
            self.train()


def test_parametrized_weights_are_looked_at_without_a_change():
    """In training, spectral normalisation takes a step of its power iteration whenever the weight is computed."""
    watched, alone, monitor = Parametrized(), Parametrized(), watch(["head", "backbone.0"])
    fit(watched, make_batches(3), [monitor])
    fit(alone, make_batches(3))
    torch.testing.assert_close(dict(watched.state_dict()), dict(alone.state_dict()), rtol=0, atol=0)
    torch.testing.assert_close(monitor.spectra["head"][3], alone.after[2].float())
    torch.testing.assert_close(monitor.spectra["backbone.0"][2], torch.ones(6))
    assert watched.head.parametrizations.weight[0].training


class Replaces(Callback):
    """Puts two layers in the place of one, as a factorisation does."""

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.current_epoch == 1:
            pl_module.head = nn.Sequential(nn.Linear(5, 2, bias=False), nn.Linear(2, 3)).double()


@pytest.mark.parametrize("layers", ["head", "*"])
def test_layers_replaced_in_training_are_found(layers):
    monitor = watch(layers)
    fit(Recorder(), make_batches(2), [monitor, Replaces()])
    assert list(monitor.spectra["head"]) == [0, 1, 2]
    assert list(monitor.spectra["head.0"]) == list(monitor.spectra["head.1"]) == [3, 4]


@pytest.mark.parametrize("layers", ["backbone.0", "head", "*"])
def test_layers_split_by_a_compression_are_found(layers):
    ranks = {"backbone.0": 2, "head": 1}
    timing = Timing(unit="steps", search_at=0, factorize_at=2)
    splits = LowRankCompression("*", ranks=ranks, timing=timing, figures=False)
    model, monitor = Recorder(), watch(layers)
    said = pytest.warns(UserWarning, match="no weight is left to work on") if layers == "head" else nullcontext()
    with said:
        fit(model, make_batches(2), [splits, monitor] if layers == "*" else [monitor, splits])
    expected = {} if layers == "head" else {"backbone.0.0": [3, 4], "backbone.0.1": [3, 4]}
    expected |= {name: [0, 1, 2] for name in ranks if layers in (name, "*")}  # two vectors have no spectrum
    expected |= {"backbone.2": [0, 1, 2, 3, 4]} if layers == "*" else {}
    assert {name: list(spectra) for name, spectra in monitor.spectra.items()} == expected
    for name in (name for name, steps in expected.items() if 4 in steps):
        values = torch.linalg.svdvals(model.get_submodule(name).weight.detach().double()).float()
        torch.testing.assert_close(monitor.spectra[name][4], values)


def test_a_weight_that_is_not_finite_is_logged_and_not_drawn(tmp_path):
    class Breaks(Recorder):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return super().training_step(batch, batch_idx) * (torch.nan if batch_idx == 1 else 1)

    logger, monitor = Keeps(), watch(figures=True)
    fit(Breaks(), make_batches(3), [monitor], logger=logger, max_epochs=1)
    assert list(monitor.spectra["head"]) == [0, 1]
    assert all(value != value for value in logger.metrics[2].values())
    assert len(list(tmp_path.rglob("spectrum/head.png"))) == 1


class SavesAt(Callback):
    """Saves a checkpoint at one step."""

    def __init__(self, path: Any, step: int) -> None:
        self.path, self.step = path, step

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


@pytest.mark.parametrize("saves_first", [True, False])
@pytest.mark.parametrize("step", [2, 3, 4])
def test_resume_equals_uninterrupted(tmp_path, step, saves_first):
    path = tmp_path / "half.ckpt"
    straight, saves, straight_log = watch(every_n_steps=2), SavesAt(path, step), Keeps()
    callbacks = [saves, straight] if saves_first else [straight, saves]
    fit(Recorder().double(), make_batches(), callbacks, logger=straight_log)
    torch.load(path, weights_only=True)
    resumed, log = watch(every_n_steps=2), Keeps()
    fit(Recorder().double(), make_batches(), [resumed], logger=log, ckpt_path=path)
    torch.testing.assert_close(resumed.state_dict(), straight.state_dict(), rtol=0, atol=0)
    assert log.metrics == {at: straight_log.metrics[at] for at in log.metrics}
    assert list(log.metrics) == [at for at in (2, 4, 6, 8) if at > step or (saves_first and at == step)]


def test_a_new_training_forgets_and_a_continued_one_remembers():
    monitor = watch(every_n_steps=4)
    trainer = fit(Recorder(), make_batches(), [monitor], max_epochs=2)
    trainer.fit_loop.max_epochs = 3
    trainer.fit(trainer.lightning_module, Batches(make_batches()))
    assert list(monitor.spectra["head"]) == [0, 4, 8, 12]
    fit(Recorder(), make_batches(2), [monitor], max_epochs=1)
    assert list(monitor.spectra["head"]) == [0]


def _distributed(rank: int, folder: str) -> Any:
    os.environ.update(LOCAL_RANK=str(rank), RANK=str(rank), WORLD_SIZE="2", NODE_RANK="0")
    os.chdir(folder)
    decomposed = []
    compute = spectrum_monitor.weight_singular_values

    def counted(matrix: Tensor) -> Tensor:
        decomposed.append(tuple(matrix.shape))
        return compute(matrix)

    spectrum_monitor.weight_singular_values = counted
    monitor, logger = watch("*", figures=True), Keeps()
    model = Recorder().double()
    fit(model, shard(make_batches(2), [0, 3, 8]), [monitor], strategy="ddp", devices=2, max_epochs=1, logger=logger)
    return monitor.spectra, decomposed, logger.metrics


@pytest.mark.distributed
def test_ranks_share_the_layers_and_agree(tmp_path):
    ranks = run_on_ranks(_distributed, 2, tmp_path, str(tmp_path))
    (spectra, first, metrics), (others, second, _) = ranks
    torch.testing.assert_close(spectra, others, rtol=0, atol=0)
    assert (len(first), len(second)) == (3 * 1, 3 * 2)  # at three looks: the largest of three layers, and the others
    assert list(metrics) == [0, 1, 2]
    alone = watch("*")
    fit(Recorder().double(), make_batches(2), [alone], max_epochs=1)
    torch.testing.assert_close(spectra["head"][0], alone.spectra["head"][0])
    assert len(list(tmp_path.rglob("spectrum/*.png"))) == 3


@pytest.mark.parametrize("kind", ["tensorboard", "csv", "none"])
def test_figures_and_numbers_reach_the_loggers(tmp_path, kind):
    loggers = {"tensorboard": TensorBoardLogger(tmp_path, name="tb"), "csv": CSVLogger(tmp_path, name="csv")}
    fit(Recorder(), make_batches(2), [watch(figures=True)], logger=loggers.get(kind, False))
    if kind == "tensorboard":
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        events = EventAccumulator(str(tmp_path / "tb" / "version_0")).Reload()
        assert events.Tags()["images"] == ["spectrum/head"]
        assert [event.step for event in events.Scalars("spectrum/head/stable_rank")] == [0, 1, 2, 3, 4]
    else:
        place = tmp_path / ("csv/version_0" if kind == "csv" else ".")
        assert (place / "spectrum" / "head.png").read_bytes().startswith(b"\x89PNG")
    if kind == "csv":
        header = (tmp_path / "csv" / "version_0" / "metrics.csv").read_text().splitlines()[0]
        assert "spectrum/head/effective_rank" in header


def test_wandb_gets_an_image_and_the_numbers(tmp_path):
    logger = WandbLogger(save_dir=tmp_path, project="test", offline=True)
    fit(Recorder(), make_batches(1), [watch(figures=True)], logger=logger, max_epochs=1)
    assert logger.experiment.summary["spectrum/head/spectral_norm"] > 0
    logger.experiment.finish()
    assert len(list(tmp_path.glob("wandb/offline-run-*/files/media/images/spectrum/head_*.png"))) == 1


def test_fast_dev_run_leaves_no_trace(tmp_path):
    fit(Recorder(), make_batches(), [watch(figures=True)], fast_dev_run=True)
    assert not list(tmp_path.rglob("*.png"))


def test_drawing_takes_a_small_share_but_the_last_figure_is_always_drawn(monkeypatch):
    drawn, clock = [], [0.0]
    monkeypatch.setattr(figures, "hand_to_loggers", lambda trainer, tag, figure: drawn.append(clock[0]))
    monkeypatch.setattr(figures.time, "monotonic", lambda: clock[0])

    def slow(spectra: Any, steps: Any, title: str) -> Any:
        clock[0] += 1.0
        return plots.weight_spectrum_figure(spectra, steps, title=title)

    class Passes(Callback):
        def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            clock[0] += 8.0

    monkeypatch.setattr(spectrum_monitor, "weight_spectrum_figure", slow)
    fit(Recorder(), make_batches(1), [watch(figures=True), Passes()], max_epochs=5)
    assert drawn == [9.0, 34.0, 43.0]  # the first, one when 20 s have passed, and at the end


def test_decomposes_at_looks_alone(monkeypatch):
    looks, compute = [], spectrum_monitor.weight_singular_values
    monkeypatch.setattr(
        spectrum_monitor, "weight_singular_values", lambda matrix: (looks.append(1), compute(matrix))[1]
    )
    fit(Recorder(), make_batches(9), [watch(every_n_steps=5)], max_epochs=2)
    assert len(looks) == 4  # at the steps 0, 5, 10 and 15


# name: (arguments beside or in place of the right ones, error, what the message says)
ARGUMENTS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "no layer": ({"layers": []}, ValueError, r"`layers` must be .*, got an empty list; '\*' takes every layer"),
    "a number as layer": ({"layers": 3}, TypeError, "`layers` must be a module name, .*, got int"),
    "a side": ({"layers": "head:input"}, ValueError, "`layers` takes the weights of a layer here, not its input"),
    "no step": ({"every_n_steps": 0}, ValueError, "`every_n_steps` must be at least 1, got 0"),
    "half a step": ({"every_n_steps": 10.0}, TypeError, "`every_n_steps` must be an int .* did you mean 10?"),
    "scheme": ({"scheme": 3}, ValueError, "`scheme` must be 1 or 2, got 3"),
    "figures": ({"figures": "no"}, TypeError, "`figures` must be True or False, got 'no'"),
    "max_spectra": ({"max_spectra": 0}, ValueError, "`max_spectra` must be at least 1, got 0"),
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_wrong_arguments_fail_in_the_constructor(name):
    arguments, error, message = ARGUMENTS[name]
    with pytest.raises(error, match=message):
        SpectrumMonitor(**{"layers": "head", **arguments})


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ("haed", "did you mean 'head'"),
        ("backbone.1", "must match modules of the types .*Linear.*, got Tanh"),
        ("backbone", "must match modules of the types .*Linear.*, got Sequential"),
    ],
)
def test_layers_without_weights_are_named(layers, message):
    with pytest.raises(ValueError, match=message):
        fit(Recorder(), make_batches(1), [watch(layers)])


def test_missing_matplotlib_names_the_extra(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"lightning-plugins\[plots\]"):
        SpectrumMonitor("head")
    SpectrumMonitor("head", figures=False)
