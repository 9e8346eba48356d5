"""Hooks of callbacks do not hinder a copy, a pickle, a script or another process during training."""

import copy
import io
import pickle
import subprocess
import sys
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_plugins.callbacks import Readout, RepresentationMonitor, VNERegularization
from tests.models import Classifier, fit, make_batches, without_hooks

LAYERS = ["backbone", "head:input"]


def callbacks() -> list[Callback]:
    return [
        VNERegularization(LAYERS, weight=0.3, readout=Readout(mask=lambda call: None)),
        RepresentationMonitor(LAYERS, every_n_steps=1, figures=False),
    ]


def saved(model: nn.Module) -> bytes:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    return buffer.getvalue()


class Tries(Callback):
    """Does something with the module at every place where a user might."""

    def __init__(self, act: Any) -> None:
        self.act, self.results = act, []

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.results.append(self.act(pl_module))

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.results.append(self.act(pl_module))

    def on_before_zero_grad(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.results.append(self.act(pl_module))

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self.results.append(self.act(pl_module))


@pytest.mark.parametrize(
    "act",
    [
        saved,
        pickle.dumps,
        copy.deepcopy,
        lambda model: saved(model.backbone),
        lambda model: copy.deepcopy(model.backbone),
        copy.copy,
        lambda model: torch.jit.trace(model.double().eval(), torch.zeros(1, 6, dtype=torch.float64)) and model.train(),
    ],
    ids=["torch.save", "pickle", "deepcopy", "save a layer", "copy a layer", "shallow", "trace"],
)
def test_a_module_can_be_copied_and_pickled_at_any_time(act: Any):
    tries = Tries(act)
    fit(Classifier(), make_batches(2), [*callbacks(), tries], max_epochs=1)
    assert len(tries.results) >= 5
    for result in tries.results:
        if isinstance(result, bytes):
            buffer = io.BytesIO(result)
            result = torch.load(buffer, weights_only=False) if result[:2] == b"PK" else pickle.loads(result)
        assert without_hooks(result)


def test_to_torchscript_during_training():
    tries = Tries(lambda model: torch.jit.script(model.backbone))
    fit(Classifier(), make_batches(1), [*callbacks(), tries], max_epochs=1)
    torch.testing.assert_close(tries.results[-1](torch.ones(1, 6).double()).shape, torch.Size([1, 5]))


class CopiesInside(Classifier):
    """Makes its teacher when it first needs one, in the middle of a step."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        if not hasattr(self, "teacher"):
            self.pickled = saved(self.backbone)
            self.teacher = [copy.deepcopy(self)]  # in a list: not a submodule
        self.teacher[0].backbone(batch[0])
        return loss


def test_a_copy_made_inside_a_step_loses_the_hooks_when_it_runs(tmp_path: Any):
    model, expected = CopiesInside(), CopiesInside()
    expected.load_state_dict(model.state_dict())
    fit(model, make_batches(2), callbacks(), max_epochs=1)
    (teacher,) = model.teacher
    assert without_hooks(teacher.backbone)
    assert without_hooks(model)
    assert vars(teacher).get("training_step", teacher.training_step).__self__ is teacher
    assert without_hooks(pickle.loads(pickle.dumps(teacher)).backbone)
    (tmp_path / "backbone.pt").write_bytes(model.pickled)
    code = (
        "import sys, torch; sys.modules['lightning_plugins'] = None\n"
        f"net = torch.load({str(tmp_path / 'backbone.pt')!r}, weights_only=False)\n"
        "print(tuple(net(torch.ones(1, 6).double()).shape))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "(1, 5)"  # in a process that does not have this package


class Collates(Classifier):
    """Hands its loader a method of its own, which a worker process that is spawned has to unpickle."""

    def collate(self, samples: Any) -> Any:
        return [torch.stack(part) for part in zip(*samples, strict=True)]

    def train_dataloader(self) -> Any:
        data = TensorDataset(*make_batches(1)[0])
        return DataLoader(
            data, batch_size=4, collate_fn=self.collate, num_workers=1, multiprocessing_context="forkserver"
        )


def test_a_loader_with_a_bound_collate_function_starts_its_workers():
    from lightning.pytorch import Trainer

    model = Collates().double()
    model.loss = lambda batch: Classifier.loss(model, [batch[0].double(), batch[1]])
    del model.loss  # a lambda on the module could not be pickled by anyone
    trainer = Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, precision="64-true", callbacks=callbacks(),
    )  # fmt: skip
    trainer.fit(model)
    assert trainer.global_step == 2
