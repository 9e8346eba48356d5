"""Several validation loaders are kept apart, and `trainer.test` measures too."""

from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch import Tensor

from lightning_plugins.callbacks import RepresentationMonitor
from lightning_plugins.metrics import AlphaReQ, EffectiveRank, FeatureStableRank
from tests.models import Batches, Classifier, fit, make_batches

BATCHES = make_batches(4)
OTHERS = [(x[:, :1].expand(-1, 6).contiguous(), y) for x, y in make_batches(3, seed=5)]
KINDS = {"effective_rank": EffectiveRank, "stable_rank": FeatureStableRank, "alpha_req": AlphaReQ}


class Tested(Classifier):
    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self(batch[0])

    test_step = validation_step


def monitor() -> RepresentationMonitor:
    return RepresentationMonitor("head:input", metrics=list(KINDS), figures=False)


def expected(model: Classifier, batches: Any) -> dict[str, float]:
    values = {}
    with torch.no_grad():
        rows: Tensor = torch.cat([model.backbone(x.to(model.head.weight.dtype)) for x, _ in batches])
    for name, kind in KINDS.items():
        metric = kind(5)
        metric.update(rows)
        values[name] = float(metric.compute())
    return values


def assert_logged(trainer: Trainer, stage: str, wanted: dict[str, float]) -> None:
    for name, value in wanted.items():
        found = float(trainer.callback_metrics[f"representation/{stage}/head/{name}"])
        assert found == pytest.approx(value, rel=1e-5)


def test_loaders_are_kept_apart_in_fit():
    torch.manual_seed(0)
    model, watching = Tested(), monitor()
    trainer = fit(model, BATCHES, [watching], validation=[Batches(BATCHES), Batches(OTHERS)], max_epochs=1)
    assert_logged(trainer, "val_0", expected(model, BATCHES))
    assert_logged(trainer, "val_1", expected(model, OTHERS))
    assert not any("/val/" in name for name in trainer.callback_metrics)
    assert set(watching.spectra) == {"train", "val", "val_0", "val_1"}


@pytest.mark.parametrize("loaders", [1, 2])
def test_a_test_is_measured(loaders: int):
    torch.manual_seed(0)
    model = Tested()
    trainer = Trainer(accelerator="cpu", devices=1, logger=False, enable_progress_bar=False, callbacks=[monitor()])
    given = [Batches(BATCHES), Batches(OTHERS)][:loaders]
    trainer.test(model, given if loaders > 1 else given[0], verbose=False)
    for index, batches in enumerate((BATCHES, OTHERS)[:loaders]):
        assert_logged(trainer, "test" if loaders == 1 else f"test_{index}", expected(model, batches))
    assert "training_step" not in vars(model)
