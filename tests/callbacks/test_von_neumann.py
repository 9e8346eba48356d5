import copy
import functools
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from lightning_plugins.callbacks import Readout, VNERegularization
from lightning_plugins.schedules import Linear, Piecewise
from tests.models import Batches, Classifier, entropy_by_autograd, fit, make_batches, without_hooks


class ByHand(Classifier):
    """The code a user would write without the callback: the reference of every test here."""

    weight = 0.3

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        embeddings = self.backbone(batch[0])
        return self.loss(batch) - self.weight * entropy_by_autograd(embeddings)


class Recorder(Classifier):
    """Keeps what Lightning reports of every training step."""

    def on_train_start(self) -> None:
        self.reported: list[float] = []

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.reported.append(float(outputs["loss"]))


def seeded(kind: type[LightningModule], *args: Any, **kwargs: Any) -> LightningModule:
    torch.manual_seed(0)
    return kind(*args, **kwargs)


def assert_same_weights(model: nn.Module, expected: nn.Module, **tolerance: float) -> None:
    torch.testing.assert_close(dict(model.state_dict()), dict(expected.state_dict()), **tolerance)


@pytest.mark.parametrize("settings", [{}, {"accumulate_grad_batches": 2}, {"gradient_clip_val": 0.1}], ids=str)
@pytest.mark.parametrize("layers", ["backbone", "head:input", "backbone.2"])
def test_trains_like_the_term_written_by_hand(layers, settings):
    model, expected, plain = seeded(Classifier), seeded(ByHand), seeded(Classifier)
    fit(model, make_batches(), [VNERegularization(layers, weight=0.3)], **settings)
    fit(expected, make_batches(), **settings)
    fit(plain, make_batches(), **settings)
    assert_same_weights(model, expected)
    assert not torch.equal(plain.head.weight, model.head.weight)  # control: the term does something


def test_accumulated_equal_batches_are_one_big_batch():
    batches = make_batches(2)
    doubled = [tuple(torch.cat([part, part]) for part in batch) for batch in batches]
    twice = [batch for batch in batches for _ in range(2)]
    model, expected = seeded(Classifier), seeded(Classifier)
    fit(model, twice, [VNERegularization("backbone", weight=0.3)], accumulate_grad_batches=2)
    expected.loss = lambda batch: Classifier.loss(expected, batch) / 2  # its loss is a sum over the batch
    fit(expected, doubled, [VNERegularization("backbone", weight=0.3)])
    assert_same_weights(model, expected)


def test_reported_loss_holds_the_term():
    model = seeded(Recorder)
    batches = make_batches(1)
    expected = model.double().loss([batches[0][0].double(), batches[0][1]])
    expected = expected - 0.3 * entropy_by_autograd(model.backbone(batches[0][0].double()))
    fit(model, batches, [VNERegularization("backbone", weight=0.3)], max_epochs=1)
    assert model.reported == [pytest.approx(expected.item(), rel=1e-12)]


def test_weight_raises_or_lowers_the_entropy():
    embeddings = make_batches(1)[0][0].double()
    after = {}
    for weight in (-0.3, 0.0, 0.3):
        model = seeded(Classifier, lr=0.02)
        fit(model, make_batches(1), [VNERegularization("backbone", weight=weight)], max_epochs=30)
        after[weight] = entropy_by_autograd(model.backbone(embeddings)).item()
    assert after[-0.3] < after[0.0] < after[0.3]


def test_several_layers_are_summed_and_instances_add_up():
    together, apart = seeded(Classifier), seeded(Classifier)
    fit(together, make_batches(), [VNERegularization(["backbone.0", "head:input"], weight=0.2)])
    fit(apart, make_batches(), [VNERegularization("backbone.0", weight=0.2), VNERegularization("backbone", weight=0.2)])
    assert_same_weights(together, apart)


class TwoViews(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(batch) + self.loss([batch[0].flip(1), batch[1]])


class TwoViewsByHand(TwoViews):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        entropies = [entropy_by_autograd(self.backbone(view)) for view in (batch[0], batch[0].flip(1))]
        return super().training_step(batch, batch_idx) - 0.3 * sum(entropies) / 2


def test_a_layer_called_twice_gives_the_mean_of_its_entropies():
    model, expected = seeded(TwoViews), seeded(TwoViewsByHand)
    fit(model, make_batches(), [VNERegularization("backbone", weight=0.3)])
    fit(expected, make_batches())
    assert_same_weights(model, expected)


class Checkpointed(Classifier):
    reentrant = False

    def forward(self, x: Tensor) -> Tensor:
        inner = self.backbone[1], self.backbone[2]
        hidden = self.backbone[0](x)
        return self.head(checkpoint(lambda h: inner[1](inner[0](h)), hidden, use_reentrant=self.reentrant))


def test_recomputation_is_not_captured_twice():
    model, expected = seeded(Checkpointed), seeded(ByHand)
    fit(model, make_batches(), [VNERegularization("backbone.2", weight=0.3)])
    fit(expected, make_batches())
    assert_same_weights(model, expected)


def test_reentrant_checkpointing_is_named():
    model = seeded(Checkpointed)
    model.reentrant = True
    with pytest.raises(Exception, match="use_reentrant=False"):
        fit(model, make_batches(), [VNERegularization("backbone.2", weight=0.3)])


@pytest.mark.parametrize("layer", ["backbone", "head:input", "backbone.2"])
@pytest.mark.parametrize("compiled_part", ["module", "backbone", "backbone in place"])
def test_compiled_trains_like_eager_twice(compiled_part, layer):
    def compiled(model: Classifier) -> Any:
        if compiled_part == "module":
            return torch.compile(model, backend="aot_eager")
        if compiled_part == "backbone":
            model.backbone = torch.compile(model.backbone, backend="aot_eager")
        else:
            model.backbone.compile(backend="aot_eager")
        return model

    expected = seeded(ByHand)
    model = seeded(Classifier)
    passed = compiled(model)
    for _ in range(2):  # the second fit must not run graphs that were traced without hooks
        fit(passed, make_batches(), [VNERegularization(layer, weight=0.3)])
        fit(expected, make_batches())
    weights = {name.replace("_orig_mod.", ""): value for name, value in model.state_dict().items()}
    torch.testing.assert_close(weights, dict(expected.state_dict()))
    assert without_hooks(model)  # they stay between the steps of compiled code, and go at the end


class KeepsATeacher(Classifier):
    """Copies its backbone when the hooks are on already, and runs the copy in every step."""

    def on_train_start(self) -> None:
        self.teacher = copy.deepcopy(self.backbone).requires_grad_(False)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.teacher(batch[0])
        return self.loss(batch)


def test_a_copied_layer_is_not_captured():
    model, expected = seeded(KeepsATeacher), seeded(ByHand)
    fit(model, make_batches(), [VNERegularization("backbone.2", weight=0.3)])
    fit(expected, make_batches())
    del model.teacher
    assert_same_weights(model, expected)


class ReturnsADict(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        return {"loss": self.loss(batch), "kept": batch_idx}


def test_loss_in_a_dictionary():
    model, expected = seeded(ReturnsADict), seeded(ByHand)
    fit(model, make_batches(), [VNERegularization("backbone", weight=0.3)])
    fit(expected, make_batches())
    assert_same_weights(model, expected)


class SkipsOdd(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        return self.loss(batch) if batch_idx % 2 == 0 else None


def test_skipped_batches_stay_skipped():
    model, expected = seeded(SkipsOdd), seeded(ByHand)
    batches = make_batches()
    fit(model, batches, [VNERegularization("backbone", weight=0.3)])
    fit(expected, batches[::2])
    assert_same_weights(model, expected)


class ValidatesByTraining(Classifier):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.training_step(batch, batch_idx))


def test_no_term_in_validation():
    model, batch = seeded(ValidatesByTraining), make_batches(1)
    callback = VNERegularization("backbone", weight=0.3)
    trainer = fit(model, batch, [callback], max_epochs=1, validation=Batches(batch))
    bare = model.loss([batch[0][0].double(), batch[0][1]]).item()
    assert float(trainer.callback_metrics["val_loss"]) == pytest.approx(bare)


@pytest.mark.parametrize("unit", ["steps", "epochs", "fraction"])
def test_schedule_counts_steps_epochs_and_fractions(unit):
    boundary = {"steps": 4, "epochs": 1, "fraction": 0.5}[unit]
    model, half, rest = seeded(Classifier), seeded(Classifier), make_batches()
    schedule = Piecewise(boundaries=[boundary], values=[1.0, 0.0], unit=unit)
    fit(model, rest, [VNERegularization("backbone", weight=0.3, schedule=schedule)])

    class FirstEpoch(VNERegularization):
        def recording(self, pl_module: Any) -> Any:
            self.weight = 0.3 if pl_module.current_epoch == 0 else 0.0
            return super().recording(pl_module)

    fit(half, rest, [FirstEpoch("backbone", weight=0.3)])
    assert_same_weights(model, half)


def test_schedule_in_fractions_of_an_endless_training_is_refused():
    callback = VNERegularization("backbone", weight=0.3, schedule=Linear(0.0, 1.0))
    with pytest.raises(Exception, match="max_epochs=-1"):
        fit(seeded(Classifier), make_batches(), [callback], max_epochs=-1)


class EverySecondByHand(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        strength = 2 * 0.3 if self.global_step % 2 == 0 else 0.0
        return self.loss(batch) - strength * entropy_by_autograd(self.backbone(batch[0]))


def test_every_second_step_is_twice_as_strong():
    model, expected = seeded(Classifier), seeded(EverySecondByHand)
    fit(model, make_batches(), [VNERegularization("backbone", weight=0.3, every_n_steps=2)])
    fit(expected, make_batches())
    assert_same_weights(model, expected)


class QueueByHand(Classifier):
    def on_train_start(self) -> None:
        self.rows = torch.empty(0, 5, dtype=torch.float64)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        embeddings = nn.functional.normalize(self.backbone(batch[0]))
        entropy = entropy_by_autograd(torch.cat([self.rows, embeddings]))
        self.rows = torch.cat([self.rows, embeddings.detach()])[-11:]
        return self.loss(batch) - 0.3 * entropy


def test_queue_remembers_rows_without_a_gradient():
    model, expected = seeded(Classifier), seeded(QueueByHand)
    callback = VNERegularization("backbone", weight=0.3, queue_size=11)
    fit(model, make_batches(), [callback])
    fit(expected, make_batches())
    assert_same_weights(model, expected)
    torch.testing.assert_close(callback.state_dict()["queues"]["backbone"], expected.rows)


class Overflows(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 1e200 * 1e200


class TurnsNaN(Classifier):
    """Only the term sees the side branch, and every second step makes its features infinite."""

    def __init__(self) -> None:
        super().__init__()
        self.side = nn.Sequential(nn.Linear(6, 4), nn.Identity())

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.side[1] = Overflows() if batch_idx % 2 else nn.Identity()
        self.side(batch[0])
        return self.loss(batch)


def test_nonfinite_term_is_skipped_warned_of_once_and_counted():
    model = seeded(TurnsNaN)
    callback = VNERegularization("side", weight=0.3)
    with pytest.warns(UserWarning, match="left out of the loss") as caught:
        fit(model, make_batches(), [callback], log_every_n_steps=1)
    assert sum("left out of the loss" in str(warning.message) for warning in caught) == 1
    assert callback.state_dict()["skipped"] == 4
    assert all(bool(value.isfinite().all()) for value in model.state_dict().values())


def test_nonfinite_term_raises_where_asked():
    with pytest.raises(FloatingPointError, match="'side'"):
        fit(seeded(TurnsNaN), make_batches(), [VNERegularization("side", weight=0.3, on_nonfinite="raise")])


class Fails(Classifier):
    def on_train_epoch_end(self) -> None:
        raise KeyError("the user's own error")


@pytest.mark.parametrize("kind", [Classifier, Fails])
def test_module_is_untouched_afterwards(kind):
    model = seeded(Classifier)
    fit(model, make_batches())  # what Lightning itself leaves behind
    before = dict(vars(model))
    model.__class__ = kind
    callbacks = [VNERegularization("backbone", weight=0.3), VNERegularization("head:input", weight=0.1)]
    if kind is Fails:
        with pytest.raises(KeyError, match="the user's own error"):
            fit(model, make_batches(), callbacks)
    else:
        fit(model, make_batches(), callbacks)
    assert vars(model).keys() == before.keys()
    assert without_hooks(model)


def test_a_wrapper_put_on_later_survives():
    class WrapsLater(VNERegularization):
        def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
            super().on_fit_start(trainer, pl_module)
            pl_module.training_step = functools.partial(pl_module.training_step)

    model = seeded(Classifier)
    fit(model, make_batches(), [WrapsLater("backbone", weight=0.3)])
    model.trainer.state.stage = None
    batch = [make_batches(1)[0][0].double(), make_batches(1)[0][1]]
    torch.testing.assert_close(model.training_step(batch, 0), model.loss(batch))


def test_same_arguments_same_key_and_others_another():
    one, same = VNERegularization("a", weight=0.1), VNERegularization("a", weight=0.1)
    others = [
        VNERegularization("b", weight=0.1),
        VNERegularization("a", weight=0.2),
        VNERegularization("a", weight=0.1, readout=Readout(pool="tokens")),
        VNERegularization("a", weight=0.1, readout=Readout(pool=torch.flatten)),
        VNERegularization("a", weight=0.1, readout=Readout(pool=nn.Flatten())),
        VNERegularization("a", weight=0.1, schedule=Linear(0, 1)),
    ]
    assert one.state_key == same.state_key
    assert len({one.state_key, *(other.state_key for other in others)}) == 1 + len(others)


def test_a_frozen_layer_is_warned_of_once():
    model = seeded(Classifier)
    model.backbone.requires_grad_(False)
    with pytest.warns(UserWarning, match="nothing before 'backbone' is trained") as caught:
        fit(model, make_batches(), [VNERegularization("backbone", weight=0.3)])
    assert sum("is trained" in str(warning.message) for warning in caught) == 1


class CountsReads(TorchDispatchMode):
    """Counts how often a tensor's value is asked for, which on an accelerator waits for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.reads = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.reads += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default)
        return func(*args, **(kwargs or {}))


class CountsItsReads(VNERegularization):
    reads = steps = 0

    def penalty(self, pl_module: LightningModule) -> Tensor | None:
        with CountsReads() as mode:
            penalty = super().penalty(pl_module)
            torch.autograd.grad(penalty, list(pl_module.backbone.parameters()), retain_graph=True)
        self.reads += mode.reads
        self.steps += 1
        return penalty


@pytest.mark.parametrize(("on_nonfinite", "reads_per_step"), [("skip", 0), ("raise", 1)])
def test_no_value_is_read_on_the_hot_path(on_nonfinite, reads_per_step):
    callback = CountsItsReads("backbone", weight=0.3, queue_size=20, method="products", on_nonfinite=on_nonfinite)
    fit(seeded(Classifier), make_batches(), [callback], precision="32-true")
    assert callback.steps == 8
    assert callback.reads == 8 * reads_per_step


def test_logs_entropies_and_penalty():
    model, batches = seeded(Classifier), make_batches(1)
    embeddings = model.double().backbone(batches[0][0].double())
    callbacks = [VNERegularization(["backbone", "head"], weight=0.3), VNERegularization("head", weight=-0.1)]
    trainer = fit(model, batches, callbacks, max_epochs=1)
    entropy = entropy_by_autograd(embeddings).item()
    assert trainer.callback_metrics["vne/backbone/entropy"].item() == pytest.approx(entropy, rel=1e-6)
    of_head = trainer.callback_metrics["vne/head/entropy"].item()
    penalty = -0.3 * (entropy + of_head) + 0.1 * of_head
    assert trainer.callback_metrics["vne/penalty"].item() == pytest.approx(penalty, rel=1e-6)
