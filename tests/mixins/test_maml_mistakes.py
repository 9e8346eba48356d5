"""Mistakes that the meta-learning mixins refuse, and their messages."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torchmetrics import MeanSquaredError

from lightning_plugins.meta import GAP, MetaSGD, Vectorization
from lightning_plugins.mixins import GAPMixin, InnerSettings, MAMLMixin
from tests.mixins.few_shot import Few, FewGAP, make_tasks


class MAML(MAMLMixin, LightningModule):
    pass


class WithGains(GAPMixin, LightningModule):
    pass


class NoLightning(MAMLMixin, nn.Module):
    pass


class Halves(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Linear(2, 1), nn.Linear(2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.used(x)


def behind() -> None:
    class Behind(LightningModule, MAMLMixin):
        pass


def gap_behind() -> None:
    class Behind(LightningModule, GAPMixin):
        pass


def frozen() -> nn.Module:
    return nn.Linear(2, 1).requires_grad_(False)


def maml(network: Any = None, loss: Any = F.mse_loss, *arguments: Any, **settings: Any) -> MAML:
    return MAML(nn.Linear(2, 1) if network is None else network, loss, *arguments, **settings)


def train(network: Any = None, loss: Any = F.mse_loss, batch: Any = None) -> None:
    maml(network, loss).training_step(BATCH if batch is None else batch, 0)


BATCH = make_tasks(1)[0]
(X, Y), (QUERY_X, QUERY_Y) = BATCH
ONE_TASK = (X[0], Y[0]), (QUERY_X[0], QUERY_Y[0])
FEWER = (X, Y), (QUERY_X[:2], QUERY_Y[:2])
LABELLED = (X, Y[..., 0]), (QUERY_X, QUERY_Y[..., 0])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (MAML, TypeError, "missing 2 required positional arguments: 'network' and 'loss'"),
        (lambda: MAML(nn.Linear(2, 1)), TypeError, "missing 1 required positional argument: 'loss'"),
        (lambda: maml("net"), TypeError, "`network` must be a torch module, got str"),
        (lambda: maml(nn.Linear), TypeError, "`network` must be a torch module, got the class Linear; make one"),
        (lambda: maml(frozen()), ValueError, "must have parameters that require a gradient"),
        (lambda: maml(loss="mse"), TypeError, "`loss` must be a function of outputs and targets, got str"),
        (lambda: maml(None, F.mse_loss, MetaSGD), TypeError, r"got MetaSGD; did you mean `MetaSGD\(\)`"),
        (lambda: maml(inner=InnerSettings(steps=0)), ValueError, "`steps` must be at least 1, got 0"),
        (lambda: InnerSettings(learning_rate="0.01"), TypeError, "`learning_rate` must be a number, got '0.01'"),
        (lambda: maml(inner={"steps": 2}), TypeError, r"`inner` must be InnerSettings, such as .*got \{'steps': 2\}"),
        (lambda: InnerSettings(evaluation_steps=-1), ValueError, "`evaluation_steps` must be at least 0, got -1"),
        (lambda: InnerSettings(evaluation_steps=2.0), TypeError, "`evaluation_steps` must be an int.*did you mean 2"),
        (lambda: maml(learning_rate=-1e-3), ValueError, "`learning_rate` must be at least 0, got -0.001"),
        (lambda: maml(preconditioner_learning_rate=float("nan")), ValueError, "`preconditioner_learning_rate` must be"),
        (lambda: maml(step_weights=[1.0]), ValueError, "`step_weights` must have one number per step, 5, got 1"),
        (lambda: maml(inner=InnerSettings(layers="hed")), ValueError, "no module is called 'hed'"),
        (lambda: InnerSettings(rates="lerned"), ValueError, "`rates`.*did you mean 'learned'"),
        (lambda: Few(features="5"), ValueError, "no module is called '5'"),
        (lambda: Few(features="*"), ValueError, "`features` must name one module"),
        (
            lambda: Few(features="3", inner={"vectorize": Vectorization(chunk_size=2)}),
            ValueError,
            "`chunk_size` must be None where `features` is given",
        ),
        (lambda: Few().adapt_and_measure_features(BATCH), ValueError, "`features` must be given to the constructor"),
        (lambda: maml(metrics=[MeanSquaredError()]), TypeError, "`metrics` must be a dictionary.*got list"),
        (lambda: maml(metrics={"mse": F.mse_loss}), TypeError, r"`metrics\['mse'\]` must be a torchmetrics Metric"),
        (behind, TypeError, r"must come before LightningModule, as in `class Behind\(MAMLMixin, LightningModule\)`"),
        (gap_behind, TypeError, r"`GAPMixin` must come before.*`class Behind\(GAPMixin, LightningModule\)`"),
        (lambda: NoLightning(nn.Linear(2, 1), F.mse_loss), TypeError, "into a LightningModule.*got NoLightning"),
        (lambda: FewGAP(MetaSGD()), TypeError, r"`GAP\(linear=True\)`, got MetaSGD; MAMLMixin takes any"),
        (lambda: FewGAP(GAP), TypeError, "must be a GAP or ApproximateGAP.*got GAP"),
        (lambda: WithGains(nn.Linear(2, 1), F.mse_loss), ValueError, "GAP: none of.*`linear=True`"),
        (lambda: train(batch=X), TypeError, r"`batch` must be a pair \(\(support_x, support_y\).*got Tensor"),
        (lambda: train(batch=(X, Y, QUERY_X, QUERY_Y)), TypeError, "`batch` must be a pair.*got 4 things"),
        (lambda: train(batch=(X, QUERY_X)), TypeError, r"`support` must be a pair \(inputs, targets\).*got Tensor"),
        (lambda: train(batch=ONE_TASK), ValueError, r"`support`.*\(tasks, samples, ...\).*unsqueeze"),
        (lambda: train(batch=FEWER), ValueError, "`query` must have as many tasks as `support`, 5, got 2"),
        (lambda: train(loss=nn.MSELoss(reduction="none")), ValueError, r"`loss` must return a scalar.*\(6, 1\)"),
        (lambda: train(Halves()), ValueError, "does not on 'unused.weight', 'unused.bias'; name the layers"),
        (lambda: train(nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 1))), ValueError, "use_per_step_statistics"),
        (lambda: train(nn.Sequential(nn.SyncBatchNorm(2))), ValueError, "SyncBatchNorm.*`sync_batchnorm=True`"),
        (lambda: train(nn.Linear(3, 1)), RuntimeError, r"`model` was given the inputs of one task.*\(6, 2\)"),
        (
            lambda: train(nn.Linear(2, 3), F.cross_entropy, LABELLED),
            RuntimeError,
            r"`loss` was given one task's outputs, torch.float32 of shape \(6, 3\), and targets, torch.float32",
        ),
        (lambda: maml().predict_step((X, Y, QUERY_X), 0), TypeError, "`batch` must be a pair"),
        (lambda: maml().predict_step((BATCH[0], "x"), 0), TypeError, "`batch` must be.*for prediction.*got str"),
        (lambda: maml().predict_step((BATCH[0], QUERY_X[:2]), 0), ValueError, "`inputs` must have the 5 tasks"),
    ],
)  # fmt: skip
def test_mistakes_are_named(call: Any, error: type[Exception], message: str):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize(
    ("kind", "message"),
    [(ModelParallelStrategy, "adapts whole parameters"), (FSDPStrategy, "supports a single device")],
)
@pytest.mark.parametrize("early", [True, False])
def test_strategies_that_split_parameters_are_refused(early: bool, kind: Any, message: str):
    """In `setup`, and at the first step where a class of one's own replaces it."""
    model = Few()
    model._trainer = SimpleNamespace(strategy=kind.__new__(kind))
    with pytest.raises(MisconfigurationException, match=message):
        model.setup("fit") if early else model.adapt_and_measure(BATCH)


def test_gains_of_another_preconditioner_are_refused():
    model = FewGAP()
    model.inner_loop.preconditioner = MetaSGD()
    with pytest.raises(TypeError, match=r"`inner_loop.preconditioner` must be GAP or ApproximateGAP, got MetaSGD"):
        model.gains()
