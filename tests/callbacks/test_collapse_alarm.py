"""The alarm measures what the metrics do, acts at the right step, on all processes together."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_plugins.callbacks import CollapseAlarm, CollapseLimits, RepresentationCollapseError
from lightning_plugins.callbacks.collapse_alarm import Collapse
from lightning_plugins.metrics import EffectiveRank, FeatureStableRank, RankMe, VonNeumannEntropy
from tests._killed import saving
from tests._processes import run_on_ranks
from tests.contract_by_hand import Model
from tests.contract_ranks import BOUNDS, act_as_rank
from tests.models import fit, make_batches, shard

BATCHES = make_batches(6)


class Collapses(Model):
    """From step 6 on its features shrink to one direction."""

    def forward(self, x: Tensor) -> Tensor:
        features = self.backbone[:2](x)
        if self.global_step >= 6:
            features = features * 1e-4 + 1.0
        return self.head(self.backbone[2](features))


def trained(alarm: CollapseAlarm, kind: type[Model] = Collapses, batches: Any = BATCHES, **settings: Any) -> Any:
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return fit(kind(), batches, [alarm], **settings)


def alarm_on(**arguments: Any) -> CollapseAlarm:
    return CollapseAlarm("backbone.2:input", **{"every_n_steps": 1, **arguments})


@pytest.mark.parametrize(
    ("metric", "kind"),
    [
        ("effective_rank", EffectiveRank),
        ("entropy", VonNeumannEntropy),
        ("rankme", RankMe),
        ("stable_rank", FeatureStableRank),
    ],
)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_value_is_that_of_the_metric_over_the_batches_of_a_step(metric: str, kind: Any, accumulate: int):
    values: list[float] = []

    class Looks(CollapseAlarm):
        def _judge(self, found: dict[str, float], *rest: Any) -> Any:
            values.extend(found.values())
            return super()._judge(found, *rest)

    torch.manual_seed(0)
    model = Model()
    rows = [model.backbone[:2](x) for x, _ in BATCHES[:accumulate]]
    trained(Looks("backbone.1", metric, -1e9, every_n_steps=1), Model, accumulate_grad_batches=accumulate)
    expected = kind(8)
    for each in rows:
        expected.update(each)
    torch.testing.assert_close(values[0], float(expected.compute()), rtol=1e-5, atol=0)
    assert len(values) == 12 // accumulate


def test_it_comes_after_so_many_measurements_in_a_row():
    alarm = alarm_on(limits=CollapseLimits(minimum=1.5, patience=3))
    trained(alarm)
    (found,) = alarm.alarms
    assert found.step == 9  # the batches of steps 6, 7 and 8 are too low
    assert found.value < 1.5 == found.limit


def test_limits_relative_to_the_width_and_to_the_best():
    relative, dropped, quiet = (
        alarm_on(limits=CollapseLimits(**limits))
        for limits in ({"share": 0.2}, {"drop": 0.5}, {"share": 0.1, "drop": 0.99, "minimum": 0.5})
    )
    for alarm in (relative, dropped, quiet):
        trained(alarm)
    assert [len(alarm.alarms) for alarm in (relative, dropped, quiet)] == [1, 1, 0]
    assert relative.alarms[0].limit == pytest.approx(0.2 * 8)
    assert relative.alarms[0].step == dropped.alarms[0].step == 7


def test_it_warns_and_rings_again_only_after_a_recovery():
    alarm = alarm_on(limits=2.0)
    values = iter([1.0, 1.0, 3.0, 1.0])
    found = [len(alarm._judge({"a": value}, {"a": 8}, step)) for step, value in enumerate(values)]
    assert found == [1, 0, 0, 1]
    with pytest.warns(UserWarning, match="'backbone.2' may have collapsed: its effective_rank is 1.* at step 7"):
        fit(Collapses(), BATCHES, [alarm_on(limits=1.5)])


def test_what_is_not_a_number_is_too_low():
    alarm = alarm_on(limits=-1e9)
    assert alarm._judge({"a": float("nan")}, {"a": 8}, 3)[0].layer == "a"


def test_stop_ends_the_training():
    assert trained(alarm_on(limits=1.5, action="stop")).global_step == 7


def test_raise_ends_it_with_an_error():
    with pytest.raises(RepresentationCollapseError, match=r"below 1\.5"):
        trained(alarm_on(limits=1.5, action="raise"))


def test_checkpoint_saves_and_goes_on(tmp_path: Path):
    alarm = alarm_on(limits=1.5, action="checkpoint", dirpath=str(tmp_path))
    assert trained(alarm).global_step == 12
    (path,) = tmp_path.iterdir()
    assert path.name == "collapse-backbone.2-step=7.ckpt"
    assert torch.load(path, weights_only=True)["global_step"] == 7


def test_a_queue_lets_small_batches_see_each_other():
    small = [(x[:2], y[:2]) for x, y in BATCHES]
    alone, together = alarm_on(limits=2.5), alarm_on(limits=2.5, queue_size=8)
    trained(alone, Model, small)
    trained(together, Model, small)
    assert alone.alarms  # two rows have a rank of two at most
    assert together._below["backbone.2"] == 0
    assert together.state_dict()["queues"]["backbone.2"].shape == (8, 8)


def test_resumed_exactly(tmp_path: Path):
    def fresh() -> CollapseAlarm:
        return alarm_on(limits=CollapseLimits(minimum=1.5, patience=4), queue_size=4)

    straight, resumed = fresh(), fresh()
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit(Collapses().double(), BATCHES, [straight, saving(tmp_path, every=8)], enable_checkpointing=True)
        fit(Collapses().double(), BATCHES, [resumed], ckpt_path=tmp_path / "step=8.ckpt")
    assert resumed.alarms == straight.alarms != []
    torch.testing.assert_close(resumed.state_dict(), straight.state_dict(), rtol=0, atol=0)


def on_rank(rank: int, folder: Path) -> list[Any]:
    act_as_rank(rank, 2)
    mine, found = shard(BATCHES, BOUNDS[2]), []
    for arguments in ({}, {"queue_size": 12}, {"action": "stop"}, {"action": "checkpoint", "dirpath": str(folder)}):
        alarm = alarm_on(limits=CollapseLimits(minimum=1.5, patience=2), **arguments)
        trainer = trained(alarm, batches=mine, strategy="ddp", devices=2)
        found.append((trainer.global_step, alarm.state_dict()))
    try:
        trained(alarm_on(limits=1.5, action="raise"), batches=mine, strategy="ddp", devices=2)
    except RepresentationCollapseError as error:
        found.append(str(error))
    return found


@pytest.mark.distributed
def test_unequal_processes_equal_one_and_act_together(tmp_path: Path):
    ranks = run_on_ranks(on_rank, 2, tmp_path, tmp_path)
    torch.testing.assert_close(ranks[0][:4], ranks[1][:4], rtol=0, atol=0)
    assert ranks[0][4] == ranks[1][4]
    for index, arguments in enumerate(({}, {"queue_size": 12}, {"action": "stop"})):
        alarm = alarm_on(limits=CollapseLimits(minimum=1.5, patience=2), **arguments)
        trainer = trained(alarm)
        step, state = ranks[0][index]
        assert step == trainer.global_step
        assert alarm.alarms
        torch.testing.assert_close(state, alarm.state_dict(), rtol=1e-6, atol=1e-6)


def test_a_second_training_begins_anew():
    alarm = alarm_on(limits=1.5)
    trained(alarm)
    trained(alarm, Model)
    assert alarm.alarms == []


def test_an_alarm_shows_itself():
    assert repr(Collapse("a", 3, 1.0, 2.0)) == "Collapse(layer='a', step=3, value=1.0, limit=2.0)"


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({}, ValueError, r"`limits` must say what is too low, got none; try `limits=CollapseLimits\(share=0.1\)`"),
        ({"limits": "2"}, TypeError, "`limits` must be a number, got '2'"),
        ({"limits": float("nan")}, ValueError, "`limits` must be finite, got nan"),
        ({"metric": "efective_rank", "limits": 1}, ValueError, r"did you mean 'effective_rank'\?"),
        (
            {"limits": CollapseLimits(share=0.1), "metric": "entropy"},
            ValueError,
            "`share` is of the most that a rank could be",
        ),
        ({"limits": 1, "action": "halt"}, ValueError, "`action` must be .* got 'halt'"),
        ({"limits": 1, "every_n_steps": 0}, ValueError, "`every_n_steps` must be at least 1"),
        ({"limits": 1, "queue_size": -1}, ValueError, "`queue_size` must be at least 0"),
        ({"limits": 1, "readout": "mean"}, TypeError, "`readout` must be a Readout"),
    ],
)
def test_wrong_arguments_are_named(arguments: dict[str, Any], error: type[Exception], match: str):
    with pytest.raises(error, match=match):
        CollapseAlarm("backbone", **arguments)


@pytest.mark.parametrize(
    ("fields", "error", "match"),
    [
        ({}, ValueError, "`minimum`, `share` or `drop` must say what is too low, got none; try `share=0.1`"),
        ({"share": 10}, ValueError, r"`share` must be in \[0, 1\], got 10; did you mean 0.1\?"),
        ({"drop": -0.1}, ValueError, r"`drop` must be in \[0, 1\], got -0.1"),
        ({"minimum": float("nan")}, ValueError, "`minimum` must be finite, got nan"),
        ({"minimum": "2"}, TypeError, "`minimum` must be a number, got '2'"),
        ({"minimum": 1, "patience": 0}, ValueError, "`patience` must be at least 1, got 0"),
    ],
)
def test_wrong_limits_are_named(fields: dict[str, Any], error: type[Exception], match: str):
    with pytest.raises(error, match=match):
        CollapseLimits(**fields)
