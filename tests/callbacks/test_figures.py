"""Figures reach every logger in the way its client documents; the clients that are no dependency stand in here."""

import inspect
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import matplotlib as mpl
import pytest
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CometLogger, CSVLogger, MLFlowLogger, TensorBoardLogger
from matplotlib.figure import Figure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_plugins.callbacks._monitors.figures import hand_to_loggers

mpl.use("Agg")
TAG = "spectrum/layer 1:input"


class MLflowClient:
    """The signature of `mlflow.MlflowClient.log_figure`."""

    def __init__(self) -> None:
        self.got: list[Any] = []

    def log_figure(self, run_id: str, figure: Figure, artifact_file: str, *, save_kwargs: Any = None) -> None:
        self.got.append((run_id, figure, artifact_file))


class CometExperiment:
    """The signature of `comet_ml.CometExperiment.log_figure`."""

    def __init__(self) -> None:
        self.got: list[Any] = []

    def log_figure(
        self,
        figure_name: str | None = None,
        figure: Any = None,
        overwrite: bool = False,
        step: int | None = None,
    ) -> None:
        self.got.append((figure_name, figure, step))


class MLflow(MLFlowLogger):
    def __init__(self) -> None:
        self.client = MLflowClient()

    experiment = property(lambda self: self.client)
    run_id = property(lambda self: "run")


class Comet(CometLogger):
    def __init__(self) -> None:
        self.client = CometExperiment()

    experiment = property(lambda self: self.client)


def trainer(*loggers: Any, root: Path) -> Trainer:
    return SimpleNamespace(loggers=list(loggers), default_root_dir=str(root), fast_dev_run=False)


@pytest.fixture
def figure():
    drawn = Figure()
    drawn.subplots().plot([1, 2])
    return drawn


@pytest.fixture(autouse=True)
def seven_steps(monkeypatch):
    monkeypatch.setattr("lightning_plugins.callbacks._monitors.figures.steps_done", lambda trainer: 7)


def test_mlflow_gets_an_artifact_for_every_step(figure, tmp_path):
    logger = MLflow()
    hand_to_loggers(trainer(logger, root=tmp_path), TAG, figure)
    assert logger.client.got == [("run", figure, "spectrum/layer_1_input/00000007.png")]
    assert not list(tmp_path.rglob("*.png"))


def test_comet_gets_the_figure_under_its_tag_and_step(figure, tmp_path):
    logger = Comet()
    hand_to_loggers(trainer(logger, root=tmp_path), TAG, figure)
    assert logger.client.got == [(TAG, figure, 7)]
    assert not list(tmp_path.rglob("*.png"))


def test_tensorboard_gets_an_image(figure, tmp_path):
    logger = TensorBoardLogger(tmp_path)
    hand_to_loggers(trainer(logger, root=tmp_path), TAG, figure)
    logger.experiment.flush()
    events = EventAccumulator(logger.log_dir).Reload()
    assert [event.step for event in events.Images(TAG)] == [7]


@pytest.mark.parametrize("csv", [True, False], ids=["csv", "none"])
def test_without_a_place_for_images_a_file_is_written(csv, figure, tmp_path):
    logger = CSVLogger(tmp_path / "logs")
    hand_to_loggers(trainer(*[logger] * csv, root=tmp_path), TAG, figure)
    folder = Path(logger.log_dir) if csv else tmp_path
    assert (folder / "spectrum" / "layer_1_input.png").stat().st_size > 1000


def test_several_loggers_all_get_it(figure, tmp_path):
    mlflow, comet = MLflow(), Comet()
    hand_to_loggers(trainer(mlflow, comet, root=tmp_path), TAG, figure)
    assert len(mlflow.client.got) == len(comet.client.got) == 1


def test_stand_ins_have_what_lightning_calls_by_that_name():
    assert isinstance(inspect.getattr_static(MLFlowLogger, "run_id"), property)
    assert isinstance(inspect.getattr_static(MLFlowLogger, "experiment"), property)
    assert isinstance(inspect.getattr_static(CometLogger, "experiment"), property)
