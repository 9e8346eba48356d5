import math
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from lightning_plugins.callbacks import CalibrationRecorder, SearchSettings
from lightning_plugins.compression import Calibration, factorize, output_energy
from tests.callbacks.low_rank import Model as Base
from tests.callbacks.low_rank import assert_same, in_steps, seeded
from tests.models import Batches, fit, make_batches

BATCHES = [(x.double(), y) for x, y in make_batches(6)]


class Model(Base):
    """In float64 from the start: Lightning restores weights before it converts them."""

    def __init__(self) -> None:
        super().__init__()
        self.double()


def moments_by_hand(every: int = 1) -> Calibration:
    """Of a network that does not change."""
    model = seeded(Model)
    chosen = [batch for index, batch in enumerate(BATCHES) if index % every == 0]
    return Calibration(model, effort=None).record(chosen, forward=lambda model, batch: model(batch[0]))


class Still(Model):
    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.0)


def assert_same_moments(found: Calibration | None, expected: Calibration, times: int = 1) -> None:
    assert found is not None
    for name in expected.layers:
        assert found.moment(name).rows == times * expected.moment(name).rows
        torch.testing.assert_close(found.moment(name).total, times * expected.moment(name).total)


@pytest.mark.parametrize("every", [1, 2])
def test_records_what_the_training_steps_see(every: int):
    recorder = CalibrationRecorder(effort=None, every_n_steps=every)
    model = seeded(Still)
    fit(model, BATCHES, [recorder], max_epochs=2)
    assert_same_moments(recorder.calibration, moments_by_hand(every=every), times=2)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_records_from_a_step_on():
    recorder = CalibrationRecorder(effort=None, start=6)
    fit(seeded(Still), BATCHES, [recorder], max_epochs=2)
    assert_same_moments(recorder.calibration, moments_by_hand())


def test_the_training_does_not_notice():
    plain, recorded = seeded(Model), seeded(Model)
    fit(plain, BATCHES, max_epochs=1)
    fit(recorded, BATCHES, [CalibrationRecorder()], max_epochs=1)
    assert_same(recorded, plain, rtol=0, atol=0)


def test_recomputation_in_the_backward_pass_is_not_seen():
    class Checkpointed(Still):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(checkpoint(self.backbone, x.requires_grad_(), use_reentrant=False))

    recorder = CalibrationRecorder(effort=None)
    fit(seeded(Checkpointed), BATCHES, [recorder], max_epochs=1)
    assert_same_moments(recorder.calibration, moments_by_hand())


def test_resumes_with_the_moments_it_had(tmp_path: Any):
    whole = CalibrationRecorder()
    fit(seeded(Model), Batches(BATCHES), [whole], max_epochs=2)
    first = fit(seeded(Model), Batches(BATCHES), [CalibrationRecorder()], max_epochs=1)
    first.save_checkpoint(tmp_path / "half.ckpt")
    resumed = CalibrationRecorder()
    fit(seeded(Model), Batches(BATCHES), [resumed], max_epochs=2, ckpt_path=tmp_path / "half.ckpt")
    assert resumed.calibration is not None
    assert whole.calibration is not None
    for name in whole.calibration.layers:
        torch.testing.assert_close(
            resumed.calibration.moment(name).total, whole.calibration.moment(name).total, rtol=0, atol=0
        )


def test_lets_go_after_an_error():
    class Fails(Model):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self(batch[0])
            raise RuntimeError("stop")

    model = seeded(Fails)
    with pytest.raises(RuntimeError, match="stop"):
        fit(model, BATCHES, [CalibrationRecorder()], max_epochs=1)
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("search", ["output_energy", "trade_off", "energy", "beam", "equal_ratio"])
def test_low_rank_compression_truncates_by_the_outputs(search: str):
    compression = in_steps(
        weight=0, method=search, calibration={"effort": None}, search_at=0, factorize_at=12, data=BATCHES
    )
    model = seeded(Still)
    fit(model, BATCHES, [compression], max_epochs=2)
    expected = seeded(Model)
    calibration = moments_by_hand()
    if search == "output_energy":
        assert compression.found == output_energy(expected, calibration, budget=0.7).ranks
    assert_same(model, factorize(expected, compression.found, calibration=calibration), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda: CalibrationRecorder(every_n_steps=0), ValueError, "`every_n_steps`"),
        (lambda: CalibrationRecorder(start=-1), ValueError, "`start`"),
        (lambda: CalibrationRecorder(mask=3), TypeError, "`mask` must be"),
        (lambda: CalibrationRecorder(damping=math.nan), ValueError, "`damping` must be"),
        (lambda: CalibrationRecorder(effort=-1), ValueError, "`effort` must be"),
        (lambda: CalibrationRecorder([]), ValueError, "`layers` must be"),
        (lambda: SearchSettings(calibration="yes"), TypeError, "`calibration` must be a bool, or a dict"),
        (lambda: SearchSettings(calibration={"maks": "m"}), ValueError, "got 'maks'; did you mean 'mask'"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_mistakes_are_named(call: Any, kind: type[Exception], message: str):
    with pytest.raises(kind, match=message):
        call()
