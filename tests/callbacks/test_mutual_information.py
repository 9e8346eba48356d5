import math
import os
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_plugins.callbacks import MutualInformationMonitor
from lightning_plugins.functional import infonce_bound, infonce_ceiling
from lightning_plugins.information import CriticSettings, EstimateSettings, estimate_information
from tests._processes import run_on_ranks
from tests.models import Batches, fit

SETTINGS = EstimateSettings(fit=CriticSettings(max_steps=5, check_every=5, width=8, test=0.5), units="bits")


class Contrastive(LightningModule):
    """Two views through one encoder; the loss is InfoNCE's, of the batch."""

    def __init__(self, *, scale: float = 1.0) -> None:
        super().__init__()
        self.encoder = nn.Linear(4, 3)
        self.scale, self.losses = scale, []

    def loss(self, batch: Any) -> torch.Tensor:
        x, y = self.encoder(batch[0]), self.encoder(batch[1])
        scores = self.scale * x @ y.T
        return math.log(len(x)) - infonce_bound(scores)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = self.loss(batch)
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.loss(batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05)


class OneCall(Contrastive):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.encoder(torch.cat(batch[:2]))


def batches(count: int = 4, size: int = 16, seed: int = 0, noise: float = 0.1) -> list[list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(count):
        labels = torch.arange(size) % 3
        centre = 2 * torch.eye(4)[labels]
        x, y = (centre + noise * torch.randn(size, 4, generator=generator) for _ in range(2))
        made.append([x, y, labels])
    return made


def model(kind: type[Contrastive] = Contrastive, **arguments: Any) -> Contrastive:
    torch.manual_seed(0)
    return kind(**arguments)


def run(monitor: MutualInformationMonitor, module: Contrastive | None = None, **settings: Any) -> Any:
    module = model() if module is None else module
    settings = {"validation": Batches(batches(seed=1)), "max_epochs": 1, "precision": "32-true", **settings}
    return fit(module, batches(), [monitor], **settings)


@pytest.mark.parametrize(("kind", "pairs"), [(Contrastive, "calls"), (OneCall, "halves")])
def test_logs_what_the_function_says_of_the_frozen_features(kind: type[Contrastive], pairs: Any):
    monitor = MutualInformationMonitor("encoder", pairs=pairs, labels=2, settings=SETTINGS)
    module = model(kind)
    logged = run(monitor, module).callback_metrics
    parts = [torch.cat(part) for part in zip(*batches(seed=1), strict=True)]
    with torch.no_grad():
        x, y = module.encoder(parts[0]), module.encoder(parts[1])
    expected = estimate_information(x, y, labels=parts[2], settings=SETTINGS)
    assert logged["mi/encoder/estimate"] == pytest.approx(expected.estimate, rel=1e-4)
    assert logged["mi/encoder/entropy"] == pytest.approx(expected.entropy)
    assert logged["mi/encoder/class_information"] == pytest.approx(expected.class_information, rel=1e-4)
    assert logged["mi/encoder/ceiling"] == pytest.approx(min(expected.ceiling, expected.class_ceiling))
    assert monitor.estimates["encoder"].units == "bits"
    assert set(logged) == {f"mi/encoder/{name}" for name in (
        "estimate", "standard_error", "ceiling", "entropy", "class_information")}  # fmt: skip


def test_training_is_untouched_bit_for_bit():
    plain, watched = model(), model()
    fit(plain, batches(), validation=Batches(batches(seed=1)), precision="32-true")
    torch.manual_seed(3)
    state = torch.random.get_rng_state()
    monitor = MutualInformationMonitor("encoder", loss_candidates=16, settings=SETTINGS)
    run(monitor, watched, max_epochs=2, num_sanity_val_steps=2)
    torch.testing.assert_close(dict(watched.state_dict()), dict(plain.state_dict()), rtol=0, atol=0)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not watched.encoder._forward_hooks


@pytest.mark.parametrize("accumulate", [1, 2])
def test_says_how_near_the_loss_stands_to_its_ceiling(accumulate: int):
    monitor = MutualInformationMonitor("encoder", labels=2, loss_candidates=16, settings=SETTINGS)
    module = model()
    logged = run(monitor, module, accumulate_grad_batches=accumulate).callback_metrics
    bound = (math.log(16) - sum(module.losses) / len(module.losses)) / math.log(2)
    shares = torch.bincount(torch.cat([batch[2] for batch in batches(seed=1)])).double()
    ceiling = infonce_ceiling(16, shares / shares.sum()) / math.log(2)
    assert logged["mi/loss/bound"] == pytest.approx(bound, rel=1e-5)
    assert logged["mi/loss/ceiling"] == pytest.approx(ceiling)
    assert logged["mi/loss/share"] == pytest.approx(bound / ceiling, rel=1e-5)


class Solved(Contrastive):
    """A loss of zero: all partners are found."""

    def loss(self, batch: Any) -> torch.Tensor:
        return 1e-6 * super().loss(batch)


def test_warns_once_at_the_ceiling():
    monitor = MutualInformationMonitor("encoder", loss_candidates=16, settings=SETTINGS)
    with pytest.warns(UserWarning, match="the contrastive loss stands at 100% of its ceiling") as caught:
        run(monitor, model(Solved), max_epochs=2)
    assert sum("of its ceiling" in str(warning.message) for warning in caught) == 1


def test_every_n_epochs_validate_alone_and_too_few_pairs():
    seen: list[int] = []

    class Seen(MutualInformationMonitor):
        def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            super().on_validation_epoch_end(trainer, pl_module)
            seen.append(len(self.estimates))
            self.estimates = {}

    monitor = Seen("encoder", every_n_epochs=2, settings=SETTINGS)
    trainer = run(monitor, max_epochs=3)
    assert seen == [0, 1, 0, 1]  # of the sanity check, and of three epochs
    metrics = trainer.validate(model(), Batches(batches(seed=1)), verbose=False)[0]
    assert "mi/encoder/estimate" in metrics
    few = trainer.validate(model(), Batches(batches(1, size=5)), verbose=False)[0]
    assert math.isnan(few["mi/encoder/estimate"])


def test_losses_survive_a_checkpoint():
    monitor, other = (MutualInformationMonitor("encoder", loss_candidates=16, settings=SETTINGS) for _ in range(2))
    run(monitor, validation=None)
    assert monitor.state_dict()["loss"][1] == 4
    other.load_state_dict(monitor.state_dict())
    torch.testing.assert_close(other.state_dict()["loss"], monitor.state_dict()["loss"])


def _rank(rank: int, bounds: list[int]) -> dict[str, float]:
    os.environ.update(LOCAL_RANK=str(rank), RANK=str(rank), WORLD_SIZE=str(len(bounds) - 1), NODE_RANK="0")
    rows = slice(bounds[rank], bounds[rank + 1])
    own = Batches([[part[rows] for part in batch] for batch in batches(seed=1)])
    monitor = MutualInformationMonitor("encoder", labels=2, settings=SETTINGS)
    settings = {"strategy": "ddp", "devices": len(bounds) - 1, "use_distributed_sampler": False, "precision": "64-true"}
    trainer = fit(model(), [], [monitor], max_epochs=0, **settings)
    return trainer.validate(model(), own, verbose=False)[0]


@pytest.mark.distributed
def test_unequal_processes_equal_one(tmp_path):
    # Pairs are split by what they hold: a rounding of float32, other for every size of a batch, may give another split.
    monitor = MutualInformationMonitor("encoder", labels=2, settings=SETTINGS)
    trainer = fit(model(), [], [monitor], max_epochs=0, precision="64-true")
    expected = trainer.validate(model(), Batches(batches(seed=1)), verbose=False)[0]
    for bounds in ([0, 3, 16], [0, 2, 9, 16]):
        for found in run_on_ranks(_rank, len(bounds) - 1, tmp_path, bounds):
            assert found == pytest.approx(expected, rel=1e-3)


BAD = {
    "pairs": ({"pairs": "call"}, ValueError, "`pairs` must be .* did you mean 'calls'"),
    "labels": ({"labels": 1.0}, TypeError, "`labels` must be an index or a key of the batch, or None, got float"),
    "K = 1": ({"loss_candidates": 1}, ValueError, "`loss_candidates` must be at least 2.* always 0"),
    "epochs": ({"every_n_epochs": 0}, ValueError, "`every_n_epochs` must be at least 1"),
    "max_pairs": ({"max_pairs": 0}, ValueError, "`max_pairs` must be at least 1"),
    "settings": ({"settings": "bits"}, TypeError, "`settings` must be EstimateSettings or None, got str"),
    "no layer": ({"layers": []}, ValueError, "`layers` must be"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_are_named(case: str):
    arguments, error, message = BAD[case]
    with pytest.raises(error, match=message):
        MutualInformationMonitor(**{"layers": "encoder", **arguments})


@pytest.mark.parametrize(
    ("arguments", "kind", "error", "message"),
    [
        ({"labels": 7}, Contrastive, MisconfigurationException, "`labels=7` is not in a validation batch"),
        ({"labels": 0}, Contrastive, MisconfigurationException, "`labels=0` must be a tensor of integers"),
        ({}, OneCall, ValueError, "`pairs='calls'` needs two calls of layer 'encoder'.*`pairs='halves'`"),
    ],
)
def test_bad_batches_are_named(arguments: Any, kind: type[Contrastive], error: type[Exception], message: str):
    with pytest.raises(error, match=message):
        run(MutualInformationMonitor("encoder", settings=SETTINGS, **arguments), model(kind), num_sanity_val_steps=0)


def test_manual_optimization_has_no_loss_to_read():
    module = model()
    module.automatic_optimization = False
    with pytest.raises(MisconfigurationException, match="`loss_candidates` reads the loss"):
        run(MutualInformationMonitor("encoder", loss_candidates=16), module)
