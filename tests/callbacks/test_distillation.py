"""Learning from a teacher: the terms, the teacher itself, masks, linear maps, and compression at the same time."""

import copy
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as drawn
from hypothesis import strategies as st
from lightning.pytorch import LightningModule
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_plugins.callbacks import Distillation, MatchedOutputs
from lightning_plugins.functional import cosine_error, feature_error, soft_target_divergence
from lightning_plugins.mixins import DistillationMixin
from tests._killed import Killed, fork_ranks, fork_to_be_killed, run_in_nursery, saving
from tests.callbacks import budgets, low_rank
from tests.contract_compression import COMPRESSIONS
from tests.contract_ranks import BOUNDS, act_as_rank
from tests.models import Batches, Classifier, fit, make_batches, shard

BATCHES = [(x.double(), y) for x, y in make_batches(6)]


def softmax(x: Any) -> Any:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_divergence_matches_numpy(temperature):
    student, teacher = np.random.default_rng(0).normal(size=(2, 5, 7))
    p, q = softmax(teacher / temperature), softmax(student / temperature)
    expected = temperature**2 * (p * (np.log(p) - np.log(q))).sum(-1)
    found = soft_target_divergence(torch.tensor(student), torch.tensor(teacher), temperature=temperature)
    torch.testing.assert_close(found, torch.tensor(expected))


@drawn(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**31), scale=st.floats(0.01, 30))
def test_distances_are_zero_at_the_teacher_and_nowhere_negative(seed, scale):
    one, other = scale * torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    for distance in (soft_target_divergence, feature_error, cosine_error):
        assert float(distance(one, other).min()) >= -1e-9
        torch.testing.assert_close(distance(one, one), torch.zeros(4, dtype=torch.float64), rtol=0, atol=1e-9)


def test_gradients_by_finite_differences_and_degenerate_rows():
    one, other = torch.randn(2, 3, 4, dtype=torch.float64)
    for distance in (soft_target_divergence, feature_error, cosine_error):
        assert torch.autograd.gradcheck(lambda x, d=distance: d(x, other), one.clone().requires_grad_())
    ruled_out = torch.tensor([[0.0, -torch.inf]])
    assert soft_target_divergence(torch.zeros(1, 2), ruled_out).isfinite().all()
    zeros = torch.zeros(2, 3, requires_grad=True)
    cosine_error(zeros, torch.ones(2, 3)).sum().backward()
    assert zeros.grad.isfinite().all()
    with pytest.raises(ValueError, match=r"of shape \(2, 3\), got \(2, 4\)"):
        feature_error(torch.zeros(2, 3), torch.zeros(2, 4))
    with pytest.raises(ValueError, match="`temperature` must be finite, got nan"):
        soft_target_divergence(one, other, temperature=float("nan"))


class Model(Classifier):
    def __init__(self, **arguments: Any) -> None:
        super().__init__(lr=0.05, **arguments)
        self.double()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(batch) * self.trainer.world_size


def seeded(kind: Any = Model, **arguments: Any) -> Any:
    torch.manual_seed(0)
    return kind(**arguments)


def wide_teacher() -> nn.Module:
    """Takes what `Classifier` takes; twice as wide inside."""
    torch.manual_seed(5)
    net = nn.Sequential(nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 10)), nn.Linear(10, 3))
    return net.double()


def other_teacher() -> nn.Module:
    torch.manual_seed(9)
    return Model()


PATH = "tests.callbacks.test_distillation"


def test_the_teacher_stays_as_it_was_and_is_in_nothing_of_the_module():
    model, callback = seeded(), Distillation(outputs=MatchedOutputs(temperature=2.0))
    before = copy.deepcopy(dict(model.state_dict()))
    trainer = fit(model, BATCHES, [callback])
    torch.testing.assert_close(callback.state_dict()["teacher"], before, rtol=0, atol=0)
    assert not any(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    held = {id(p) for optimizer in trainer.optimizers for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(parameter) for parameter in model.parameters()}
    assert len(list(model.modules())) == len(list(seeded().modules()))


def test_a_strong_term_pulls_to_the_teacher(tmp_path):
    torch.save({"state_dict": other_teacher().state_dict()}, tmp_path / "teacher.ckpt")
    distances = []
    for teacher in (None, str(tmp_path / "teacher.ckpt"), f"{PATH}.other_teacher", other_teacher()):
        model = seeded()
        callbacks = [] if teacher is None else [Distillation(teacher, outputs=MatchedOutputs(loss="mse"), weight=20.0)]
        fit(model, BATCHES, callbacks, max_epochs=6)
        x = BATCHES[0][0]
        distances.append(float((model(x) - other_teacher()(x)).square().mean()))
    assert max(distances[1:]) < 0.3 * distances[0]
    assert distances[1] == distances[2] == distances[3]


class Padded(LightningModule):
    """Tokens with padding, and a network that is called with a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Tokens()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.net(batch["x"], keep=batch["keep"])["scores"].square().mean() * 0

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor, keep: Tensor) -> dict[str, Tensor]:
        return {"other": x, "scores": self.second(self.first(x).tanh())}


def penalty_of(padding: float) -> Any:
    keep = torch.tensor([[1, 1, 0], [1, 0, 0]])
    x = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    x = torch.where(keep[..., None] > 0, x, padding)
    torch.manual_seed(0)
    teacher, model = Tokens(), Padded()
    callback = Distillation(teacher, network="net", outputs="scores", layers="first", mask="keep")
    trainer = fit(model, [{"x": x, "keep": keep}], [callback], max_epochs=1, precision="32-true")
    torch.manual_seed(0)
    teacher, net = Tokens(), Padded().net
    rows = [(net, teacher), (net.first, teacher.first)]
    valid = keep.bool()
    one, other = (m(x[valid], None)["scores"].detach().double().numpy() for m in rows[0])
    p, q = softmax(other), softmax(one)
    expected = (p * np.log(p / q)).sum(-1).mean()
    first = (rows[1][0](x[valid]) - rows[1][1](x[valid])).square().mean()
    metrics = trainer.callback_metrics
    torch.testing.assert_close(metrics["distillation/outputs"].double(), torch.tensor(expected), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(metrics["distillation/first"], first.detach())
    return metrics["distillation/penalty"], dict(model.state_dict())


def test_padding_counts_for_nothing():
    (one, weights), (other, others) = penalty_of(0.0), penalty_of(99.0)
    torch.testing.assert_close(one, other, rtol=0, atol=0)
    torch.testing.assert_close(weights, others)


def test_linear_maps_learn_beside_the_module():
    model = seeded()
    callback = Distillation(
        f"{PATH}.wide_teacher", outputs=False, layers={"backbone": "0"}, weight=1.0, projection_rate=0.05
    )
    first = fit(model, BATCHES, [callback], max_epochs=1, max_steps=1).callback_metrics["distillation/backbone"]
    (start,) = callback.state_dict()["projections"]["weights"].values()
    model, trainer = seeded(), None
    trainer = fit(model, BATCHES, [callback], max_epochs=20)
    (weight,) = callback.state_dict()["projections"]["weights"].values()
    assert weight.shape == (10, 5)
    assert not torch.equal(weight, start)
    assert float(trainer.callback_metrics["distillation/backbone"]) < 0.5 * float(first)
    assert list(model.state_dict()) == list(seeded().state_dict())
    assert len(list(model.parameters())) == len(trainer.optimizers[0].param_groups[0]["params"])


def maps() -> Distillation:
    return Distillation(f"{PATH}.wide_teacher", layers={"backbone": "0"}, weight=2.0, projection_rate=0.05)


@pytest.mark.parametrize("step", [2, 5, 9])
def test_linear_maps_resume_bit_for_bit(tmp_path, step):
    straight, states = seeded(), maps()
    fit(straight, Batches(BATCHES), [states, saving(tmp_path)], enable_checkpointing=True)
    model, callback = seeded(), maps()
    fit(model, Batches(BATCHES), [callback], ckpt_path=tmp_path / f"step={step}.ckpt")
    torch.testing.assert_close(dict(model.state_dict()), dict(straight.state_dict()), rtol=0, atol=0)
    torch.testing.assert_close(callback.state_dict(), states.state_dict(), rtol=0, atol=0)


class Job(NamedTuple):
    """One training, killed at a step."""

    kind: str
    ranks: int = 1
    accumulate: int = 1
    step: int = 7


JOBS = [
    Job("low rank", step=7),
    Job("low rank", step=15),
    Job("low rank", ranks=2, step=15),
    Job("low rank", accumulate=2, step=7),
    Job("hybrid", step=7),
    Job("hybrid", step=15),
    Job("hybrid", ranks=2, step=15),
    Job("maps", ranks=2),
    Job("maps", accumulate=2, step=4),
]


class OverRanks(budgets.Model):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(batch) * self.trainer.world_size


class LowRank(low_rank.Model):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(batch) * self.trainer.world_size

    def score(self, batch: Any) -> Tensor:
        return -self.loss(batch)


def build(kind: str) -> tuple[Any, list[Any]]:
    if kind == "maps":
        return seeded(), [maps()]
    learning = Distillation(outputs=MatchedOutputs(temperature=2.0), weight=3.0, layers="backbone")
    if kind == "low rank":
        return seeded(LowRank).double(), [learning, low_rank.in_steps(data=BATCHES[:2])]
    return seeded(OverRanks), [learning, budgets.in_steps(end=9)]


def train(rank: int, job: Job, folder: Path, what: str = "straight") -> dict[str, Any]:
    batches, more = BATCHES, []
    arguments: dict[str, Any] = {"max_epochs": 3 * job.accumulate, "accumulate_grad_batches": job.accumulate}
    if job.ranks > 1:
        act_as_rank(rank, job.ranks)
        batches = shard(BATCHES, BOUNDS[job.ranks])
        arguments.update(strategy="ddp", devices=job.ranks)
    if what == "killed":
        more = [saving(folder), Killed(job.step)]
        arguments["enable_checkpointing"] = True
    if what == "resumed":
        arguments["ckpt_path"] = folder / f"step={job.step}.ckpt"
    model, callbacks = build(job.kind)
    fit(model, Batches(batches), [*callbacks, *more], **arguments)
    learning = next(callback for callback in callbacks if isinstance(callback, Distillation))
    return {"weights": dict(model.state_dict()), "learning": learning.state_dict()}


def nursery(folder: Path) -> None:
    for number, job in enumerate(JOBS):
        own = folder / str(number)
        own.mkdir()
        fork_to_be_killed(job.ranks, own, train, job, own, "killed")
        fork_ranks(job.ranks, own, "straight", train, job, own)
        fork_ranks(job.ranks, own, "resumed", train, job, own, "resumed")


@pytest.mark.distributed
def test_compression_with_a_teacher_survives_sigkill_on_unequal_ranks(tmp_path):
    run_in_nursery(nursery, tmp_path, seconds=600)
    for number, job in enumerate(JOBS):
        alone = train(0, job._replace(ranks=1), tmp_path)
        dense = sum(p.numel() for p in build(job.kind)[0].parameters())
        small = sum(tensor.numel() for tensor in alone["weights"].values())
        assert (small < dense) == (job.kind != "maps")  # control: it was compressed
        for rank in range(job.ranks):
            own = tmp_path / str(number)
            resumed, straight = (torch.load(own / f"{name}-{rank}.pt") for name in ("resumed", "straight"))
            torch.testing.assert_close(resumed, straight, rtol=0, atol=0, msg=lambda text, j=job: f"{j}: {text}")
            near = COMPRESSIONS["hybrid"].tolerance if job.kind == "hybrid" else {"rtol": 1e-7, "atol": 1e-9}
            torch.testing.assert_close(straight, alone, **near, msg=lambda text, j=job: f"{j}: {text}")


def test_a_scaled_loss_gives_the_maps_the_same_gradient():
    found = {}
    half = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**12))
    for precision, plugins in (("32-true", []), ("16-mixed", [half])):
        model, callback = seeded().float(), maps()
        fit(
            model,
            make_batches(6),
            [callback],
            max_epochs=1,
            precision="32-true" if not plugins else None,
            plugins=plugins,
        )
        found[precision] = callback.state_dict()["projections"]["weights"]["backbone"].float()
    torch.testing.assert_close(found["16-mixed"], found["32-true"], rtol=0, atol=1e-2)
    assert float((found["16-mixed"] - maps_at_start()).abs().max()) > 0.1


def maps_at_start() -> Tensor:
    return torch.randn((10, 5), generator=torch.Generator().manual_seed(0)) / 5**0.5


class ByHand(DistillationMixin, Model):
    """Manual optimization."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.attach_teacher(nn.Sequential(self.backbone, self.head))

    def training_step(self, batch: Any, batch_idx: int) -> None:
        logits = self(batch[0])
        loss = self.loss(batch)
        loss = loss + self.distillation_penalty(
            logits, self.teach(batch[0]), temperature=2.0, weight=3.0, name="logits"
        )
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()


def test_the_mixin_is_the_callback_by_hand_and_resumes(tmp_path):
    by_hand, model = seeded(ByHand), seeded()
    trainer = fit(by_hand, Batches(BATCHES), [saving(tmp_path)], enable_checkpointing=True)
    fit(model, BATCHES, [Distillation(outputs=MatchedOutputs(temperature=2.0), weight=3.0)])
    torch.testing.assert_close(dict(by_hand.state_dict()), dict(model.state_dict()))
    assert "distillation/logits" in trainer.callback_metrics
    resumed = seeded(ByHand)
    resumed.attach_teacher(nn.Sequential(nn.Linear(6, 3), nn.Identity()))
    resumed.attach_teacher("start", nn.Sequential(resumed.backbone, resumed.head))
    with torch.no_grad():
        for parameter in resumed.parameters():
            parameter.add_(1)  # the teacher and the weights come out of the checkpoint
    fit(resumed, Batches(BATCHES), ckpt_path=tmp_path / "step=5.ckpt")
    torch.testing.assert_close(dict(resumed.state_dict()), dict(by_hand.state_dict()), rtol=0, atol=0)
    with pytest.raises(RuntimeError, match="`attach_teacher` must be called first"):
        Unattached().teach(1)
    with pytest.raises(ValueError, match="`network` must be given with `teacher='start'`"):
        Unattached().attach_teacher("start")


class Unattached(DistillationMixin, nn.Module):
    pass


WRONG = {
    "teacher": ({"teacher": 3}, TypeError, "`teacher` must be 'start', the path"),
    "no file": ({"teacher": "nowhere.ckpt"}, ValueError, "there is no file 'nowhere.ckpt'"),
    "no import": ({"teacher": "nowhere.at_all"}, ValueError, "`teacher='nowhere.at_all'` cannot be imported"),
    "nothing": ({"outputs": False}, ValueError, "`layers` must name a layer where `outputs=False`"),
    "outputs": ({"outputs": 1.5}, TypeError, "`outputs` must be"),
    "layers": ({"layers": 3}, TypeError, "`layers` must be names of layers, or a mapping .* got int"),
    "layers in": ({"layers": [3]}, TypeError, "`layers` must be names of layers"),
    "glob": ({"layers": "net.*"}, ValueError, "without globs and sides, got 'net.*'"),
    "side": ({"layers": {"a": "b:input"}}, ValueError, "without globs and sides, got 'b:input'"),
    "network": ({"network": None}, TypeError, "`network` must be the name of a module, got None"),
    "weight": ({"weight": "1"}, TypeError, "`weight` must be a number"),
    "rate": ({"projection_rate": -1.0}, ValueError, "`projection_rate` must be above 0, got -1.0"),
    "mask": ({"mask": True}, TypeError, "`mask` must be the name"),
    "layout": ({"layout": "xyz"}, ValueError, "`layout` must have one capital letter"),
    "schedule": ({"schedule": 0.5}, TypeError, "`schedule` must be a Schedule, got 0.5"),
}


@pytest.mark.parametrize(("arguments", "kind", "message"), WRONG.values(), ids=WRONG)
def test_wrong_arguments_are_named(arguments, kind, message):
    with pytest.raises(kind, match=message):
        Distillation(**arguments)


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"loss": "ce"}, ValueError, "`loss` must be 'kl', 'mse' or 'cosine', got 'ce'"),
        ({"temperature": 0}, ValueError, "`temperature` must be above 0, got 0"),
        ({"select": 1.5}, TypeError, "`select` must be"),
    ],
)
def test_wrong_fields_of_outputs_are_named(arguments, kind, message):
    with pytest.raises(kind, match=message):
        MatchedOutputs(**arguments)


def narrow_head() -> nn.Module:
    return nn.Linear(6, 2).double()


def no_network() -> int:
    return 3


IN_TRAINING = {
    "no such network": ({"network": "net"}, MisconfigurationException, "`network` must name a module"),
    "not called": ({"network": "unused"}, MisconfigurationException, "was not called with gradients in this step"),
    "no such layer": ({"layers": "backbon"}, ValueError, "the student Model has no 'backbon'"),
    "teacher's layer": ({"layers": {"head": "heads"}}, ValueError, "the teacher Model has no 'heads'"),
    "other outputs": ({"teacher": f"{PATH}.narrow_head"}, ValueError, r"`outputs`: .* of shape \(8, 1, 3\)"),
    "no network made": ({"teacher": f"{PATH}.no_network"}, TypeError, "must return a torch.nn.Module, got int"),
    "no such output": ({"outputs": "logits"}, ValueError, r"`select=\['logits'\]` must lead into"),
    "no such mask": ({"mask": "keep"}, ValueError, "`mask='keep'` must be an argument"),
    "mask of another shape": ({"mask": 1}, ValueError, r"`mask` must have one entry for each of 8 rows"),
}


class WithMask(Model):
    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Linear(2, 2)


@pytest.mark.parametrize(("arguments", "kind", "message"), IN_TRAINING.values(), ids=IN_TRAINING)
def test_what_does_not_fit_is_named_in_training(arguments, kind, message):
    batches = [(x, y[:5]) for x, y in BATCHES] if arguments.get("mask") == 1 else BATCHES
    model = seeded(Short if arguments.get("mask") == 1 else WithMask)
    message = message.replace("Model", "WithMask")
    with pytest.raises(kind, match=message):
        fit(model, batches, [Distillation(**arguments)])


class Short(Model):
    def loss(self, batch: Any) -> Tensor:
        return self(batch[0]).square().sum()


def test_a_bad_checkpoint_of_a_teacher_is_named(tmp_path):
    (tmp_path / "text.pt").write_text("no")
    torch.save({"state_dict": {"other.weight": torch.zeros(2)}}, tmp_path / "other.ckpt")
    for name, message in (("text.pt", "cannot be read as a checkpoint"), ("other.ckpt", "a checkpoint of the network")):
        with pytest.raises(ValueError, match=message):
            fit(seeded(), BATCHES, [Distillation(tmp_path / name)])
