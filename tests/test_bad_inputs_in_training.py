"""Wrong models, layers and Trainers: refused in `setup` or at the first step, naming what to do instead."""

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import FSDPStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_plugins.callbacks import Readout, VNERegularization
from lightning_plugins.schedules import Linear, Warmup
from tests.models import Classifier, fit, make_batches

BATCHES = make_batches(2)


def two_dimensions_more(features: Tensor) -> Tensor:
    return features[:, :, None]


def no_tensor(features: Tensor) -> float:
    return 0.5


class Odd(Classifier):
    """Runs one more layer, to no avail for the loss."""

    def __init__(self, odd: nn.Module) -> None:
        super().__init__()
        self.before, self.odd = nn.Linear(6, 6), odd
        self.unused = nn.Linear(2, 2)
        self.several = nn.ModuleList([nn.Linear(2, 2)])

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.odd(self.before(batch[0]))
        return self.loss(batch)


class Computes(nn.Module):
    def __init__(self, function: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(x)


class Manual(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


class Reentrant(Classifier):
    def forward(self, x: Tensor) -> Tensor:
        hidden = self.backbone[0](x)
        return self.head(checkpoint(self.backbone[2], self.backbone[1](hidden), use_reentrant=True))


class ChangesInPlace(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.backbone[1] = nn.ReLU(inplace=True)


class Frozen(Classifier):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            features = self.backbone(x)
        return self.head(features)


def odd(function: Callable[[Tensor], Any]) -> Callable[[], LightningModule]:
    return lambda: Odd(Computes(function))


def vne(layers: Any = "odd", **arguments: Any) -> Callable[[], list[Callback]]:
    return lambda: [VNERegularization(layers, weight=0.3, **arguments)]


# name: (model, callbacks, settings of the Trainer, error, what the message says)
Fit = tuple[Callable[[], LightningModule], Callable[[], list[Callback]], dict[str, Any], type[Exception], str]
FITS: dict[str, Fit] = {
    "unknown layer": (
        Classifier,
        vne("bakbone"),
        {},
        ValueError,
        "`layers`: no module is called 'bakbone'; did you mean 'backbone'",
    ),
    "a glob that matches nothing": (Classifier, vne("encoder.*"), {}, ValueError, r"no module is called 'encoder.\*'"),
    "a list of layers": (odd(torch.abs), vne("several"), {}, ValueError, "'several' must match modules that a forward"),
    "a layer that does not run": (
        odd(torch.abs),
        vne("unused"),
        {},
        MisconfigurationException,
        "'unused' was not called in this step. Name a layer that every step calls",
    ),
    "no tensor": (odd(str), vne(), {}, TypeError, "`layers`: 'odd' gave str, not a tensor; name a layer that returns"),
    "nothing": (odd(lambda x: None), vne(), {}, TypeError, "`layers`: 'odd' gave NoneType, not a tensor"),
    "integer features": (
        odd(lambda x: x.round().long()),
        vne(),
        {},
        TypeError,
        "`layers`: 'odd': embeddings must be a floating tensor, got torch.int64",
    ),
    "complex features": (
        odd(torch.fft.fft),
        vne(),
        {},
        TypeError,
        "'odd': embeddings must be a floating tensor, got torch.complex",
    ),
    "one dimension": (
        odd(lambda x: x.sum(1)),
        vne(),
        {},
        ValueError,
        r"'odd': embeddings need at least the two dimensions \(N, d\), got shape \(8,\); choose a layer whose tensor",
    ),
    "no row": (odd(lambda x: x[:0]), vne(), {}, ValueError, "'odd': `embeddings` must have at least one row, got none"),
    "no column": (
        odd(lambda x: x[:, :0]),
        vne(),
        {},
        ValueError,
        r"'odd': `embeddings` must have shape \(N, d\) with at",
    ),
    "cls of a feature map": (
        odd(lambda x: x[:, :, None, None]),
        vne(readout=Readout(pool="cls", layout="NCHW")),
        {},
        ValueError,
        "`pool='cls'` takes one token of a sequence, got shape .*; use 'mean' or 'flatten' for feature maps",
    ),
    "a pool that gives no matrix": (
        Classifier,
        vne("backbone", readout=Readout(pool=two_dimensions_more)),
        {},
        ValueError,
        r"'backbone': `pool` must return a matrix of shape \(N, d\), got shape \(8, 5, 1\)",
    ),
    "a pool that gives no tensor": (
        Classifier,
        vne("backbone", readout=Readout(pool=no_tensor)),
        {},
        TypeError,
        "`pool` must return a floating tensor of shape .*, got float",
    ),
    "features of changing width": (
        lambda: Odd(Computes(iter_widths())),
        vne(queue_size=4),
        {},
        ValueError,
        "'odd': `remembered` must have 3 columns",
    ),
    "NaN where that shall raise": (
        odd(lambda x: x * math.nan),
        vne(on_nonfinite="raise"),
        {},
        FloatingPointError,
        "the term of layer 'odd' is nan; look for NaN or Inf in its tensor, or pass `on_nonfinite='skip'`",
    ),
    "manual optimization": (
        Manual,
        vne("backbone"),
        {},
        MisconfigurationException,
        "uses manual optimization; subclass `lightning_plugins.mixins.VNEMixin` and add its penalty in your step",
    ),
    "fractions of an endless training": (
        Classifier,
        vne("backbone", schedule=Warmup(0.1)),
        {"max_epochs": -1},
        MisconfigurationException,
        "counts in fractions of training, but `max_epochs=-1` has no end; pass `unit='steps'` or `unit='epochs'`",
    ),
    "reentrant checkpointing": (
        Reentrant,
        vne("backbone.2"),
        {},
        MisconfigurationException,
        "'backbone.2' ran under `torch.no_grad.*pass `use_reentrant=False`",
    ),
    "a layer without a gradient": (
        Frozen,
        vne("backbone"),
        {},
        MisconfigurationException,
        "no gradient can flow from its tensor.* name a layer that is",
    ),
    "a tensor changed in place": (
        ChangesInPlace,
        vne("backbone.0"),
        {},
        MisconfigurationException,
        "the tensor of 'backbone.0' was changed in place",
    ),
    "the same callback twice": (
        Classifier,
        lambda: 2 * vne("backbone")(),
        {},
        RuntimeError,
        "Found more than one stateful callback of type `VNERegularization`",
    ),
}


def iter_widths() -> Callable[[Tensor], Tensor]:
    widths = iter([4, 3])
    return lambda x: x[:, : next(widths)]


@pytest.mark.parametrize("name", FITS)
def test_wrong_combinations_fail_in_training(name: str):
    model, callbacks, settings, error, message = FITS[name]
    with pytest.raises(error, match=message):
        fit(model(), BATCHES, callbacks(), **settings)


def test_unsupported_strategy():
    trainer: Any = SimpleNamespace(strategy=object.__new__(FSDPStrategy))  # on a CPU no Trainer would make one
    with pytest.raises(
        MisconfigurationException, match="supports a single device, DDP and FSDP2, got FSDPStrategy; pass"
    ):
        VNERegularization("backbone", weight=0.3).setup(trainer, Classifier(), "fit")


def other_package(base: type) -> Any:
    """A module of the package `pytorch_lightning`, or of any other."""

    class Model(base):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = nn.Linear(6, 3)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.backbone(batch[0]).sum()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    return Model()


def test_trainer_and_module_of_pytorch_lightning():
    import pytorch_lightning

    old = pytorch_lightning.__version__.startswith("2.5")  # its Trainer is the first to see the callback
    message = "Expected a parent" if old else r"comes from `pytorch_lightning`; .* change the imports to"
    with pytest.raises(ValueError if old else MisconfigurationException, match=message):
        pytorch_lightning.Trainer(
            accelerator="cpu",
            devices=1,
            max_epochs=1,
            logger=False,
            enable_checkpointing=False,
            callbacks=vne("backbone")(),
        ).fit(other_package(pytorch_lightning.LightningModule), BATCHES)


def test_module_of_pytorch_lightning():
    import pytorch_lightning

    module = other_package(pytorch_lightning.LightningModule)
    with pytest.raises(MisconfigurationException, match=r"works with modules of `lightning\.pytorch`, got Model whose"):
        VNERegularization("backbone", weight=0.3).setup(Trainer(accelerator="cpu", logger=False), module, "fit")
    with pytest.raises(TypeError, match="must be a `LightningModule`"):  # Lightning itself is the first to see it
        fit(module, BATCHES, vne("backbone")())


def test_a_schedule_that_needs_no_total_is_not_refused():
    """The control of the refusal of fractions: counting in steps an endless training is fine."""
    callbacks = vne("backbone", schedule=Linear(0, 1, until=3, unit="steps"))()
    trainer = fit(Classifier(), BATCHES, callbacks, max_epochs=-1, max_steps=4)
    assert trainer.global_step == 4
