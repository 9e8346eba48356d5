"""When the callback augments, and when it leaves batches alone; the rest is in the contract."""

from functools import partial

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.utils.data import DataLoader

from lightning_plugins.callbacks import PointCloudAugmentation
from lightning_plugins.data import ObjectBank, RaycastScenes, SpinningSensor
from lightning_plugins.schedules import Constant
from lightning_plugins.transforms import collate_frames
from tests.models import Classifier, fit, make_batches

SENSOR = SpinningSensor(beams=16, columns=256)
SCENES = RaycastScenes(4, SENSOR, objects={"Car": 3})
BANK = ObjectBank.from_frames(RaycastScenes(4, SpinningSensor(beams=16, columns=512)))
AREA = ((-15.0, 15.0), (-15.0, 15.0))  # so near that objects have points enough


class Looks(Classifier):
    def __init__(self):
        super().__init__()
        self.seen = {"train": [], "val": []}

    def training_step(self, batch, batch_idx):
        self.seen["train"].append(int((batch["source"] >= 0).sum()))
        return self.head(torch.ones(1, 5)).sum()

    def validation_step(self, batch, batch_idx):
        self.seen["val"].append("source" in batch)


def make(**arguments):
    return PointCloudAugmentation(BANK, {"Car": 9}, grid=SENSOR.grid, area=AREA, max_points=200, **arguments)


def loader():
    return DataLoader(SCENES, 2, collate_fn=partial(collate_frames, classes=BANK.classes))


def test_in_training_only_and_fading_out():
    model = Looks()
    fit(model, loader(), [make()], validation=loader(), max_epochs=5, precision="32-true")
    assert len(model.seen["train"]) == 10
    assert all(count > 0 for count in model.seen["train"][:8])
    assert model.seen["train"][9] < 0.8 * sum(model.seen["train"][:8]) / 8
    assert not any(model.seen["val"])


def test_batches_that_stay_in_memory_are_not_changed():
    batches = [collate_frames([SCENES[0], SCENES[1]], BANK.classes)]
    before = {key: value.clone() for key, value in batches[0].items()}
    fit(Looks(), batches, [make(schedule=Constant(1.0))], precision="32-true")
    assert batches[0].keys() == before.keys()
    for key, value in before.items():
        assert torch.equal(batches[0][key], value)


def test_other_batches_are_refused():
    with pytest.raises(
        MisconfigurationException, match=r"needs batches that are dicts of \['points', .*got (tuple|list)"
    ):
        fit(Classifier(), make_batches(1), [make()])
    with pytest.raises(MisconfigurationException, match="`max_epochs=-1` has no end"):
        fit(Looks(), loader(), [make()], max_epochs=-1)


def test_a_bank_by_its_folder(tmp_path):
    BANK.save(tmp_path)
    assert len(PointCloudAugmentation(tmp_path, {"Car": 9}).bank) == len(BANK)
    assert make().state_key != make(seed=1).state_key
