"""The contract with `pytorch_lightning`, shortened: a program for a process that has imported that package alone.

It prints a JSON object of the names of all checks, each with the traceback of its failure, or null.
"""

import json
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytorch_lightning
import torch
from pytorch_lightning.cli import LightningCLI
from torch import Tensor

from lightning_plugins import _lightning
from lightning_plugins.callbacks import VNERegularization
from lightning_plugins.mixins import CompressionMixin, StableRankMixin, VNEMixin
from tests.callbacks.budgets import BATCHES as BUDGET_BATCHES
from tests.callbacks.budgets import params, seeded
from tests.contract_by_hand import Model
from tests.contract_compression import COMPRESSIONS
from tests.contract_table import SETTINGS
from tests.mixins.few_shot import Few, FewGAP, make_tasks
from tests.models import Batches, Classifier, fit, make_batches

BATCHES = make_batches(6)
IN_YAML = ("vne, all at once", "stable rank, tail", "spectrum monitor")
RESUMED = ("vne, queue", "stable rank, followed")


class WithMixins(VNEMixin, StableRankMixin, Classifier):
    """Both terms in the module's own step."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        features = self.backbone(batch[0])
        loss = self.loss(batch) + self.vne_penalty(features, 0.3, name="features")
        return loss + self.stable_rank_penalty("head", 0.1, log=True)


class Compressed(CompressionMixin, Classifier):
    """Loads checkpoints of networks that were made smaller."""


class FromYaml(Model):
    """Brings its own batches."""

    def __init__(self, width: int = 5, views: int = 1, hidden: int = 8) -> None:
        super().__init__(width=width, views=views, hidden=hidden)

    def train_dataloader(self) -> Batches:
        return Batches(BATCHES)


def the_package() -> None:
    assert _lightning.PACKAGE == "pytorch_lightning"
    assert "lightning.pytorch" not in sys.modules
    assert issubclass(Classifier, pytorch_lightning.LightningModule)
    assert issubclass(VNERegularization, pytorch_lightning.Callback)


def trains_as_by_hand(name: str) -> None:
    setting = SETTINGS[name]
    model, reference = setting.make(), setting.reference()
    trainer = fit(model, BATCHES, setting.callbacks())
    fit(reference, BATCHES)
    tolerance = setting.tolerance or {"rtol": 1e-6, "atol": 1e-6}
    torch.testing.assert_close(dict(model.state_dict()), dict(reference.state_dict()), **tolerance)
    assert set(setting.logged) <= set(trainer.callback_metrics)


def resumes(name: str) -> None:
    setting, path = SETTINGS[name], f"{tempfile.mkdtemp()}/resumed.ckpt"
    straight, begun, resumed = (setting.make().double() for _ in range(3))
    fit(straight, BATCHES, setting.callbacks(), max_epochs=2)
    fit(begun, BATCHES, setting.callbacks(), max_epochs=1).save_checkpoint(path)
    fit(resumed, BATCHES, setting.callbacks(), max_epochs=2, ckpt_path=path)
    torch.testing.assert_close(dict(resumed.state_dict()), dict(straight.state_dict()), rtol=0, atol=0)


def is_read_from_yaml(name: str) -> None:
    setting, folder = SETTINGS[name], Path(tempfile.mkdtemp())
    quiet = "".join(
        f"  {option}: false\n"
        for option in ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    )
    callbacks = "".join(f"    {line}\n" for line in setting.yaml.strip().splitlines())
    model = "".join(f"  {option}: {value}\n" for option, value in setting.model.items())
    (folder / "config.yaml").write_text(
        "seed_everything: 0\ntrainer:\n  accelerator: cpu\n  devices: 1\n  max_epochs: 2\n  precision: 64-true\n"
        f"{quiet}  callbacks:\n{callbacks}" + (f"model:\n{model}" if model else "")
    )
    cli = LightningCLI(FromYaml, save_config_callback=None, args=["fit", "--config", str(folder / "config.yaml")])
    expected = setting.make()
    fit(expected, BATCHES, setting.callbacks())
    torch.testing.assert_close(dict(cli.model.state_dict()), dict(expected.state_dict()))


def compresses() -> None:
    row, model = COMPRESSIONS["hybrid"], seeded()
    callback, dense = row.callback(), params(model)
    fit(model, BUDGET_BATCHES, [callback], max_epochs=3)
    assert callback.finished
    assert params(model) <= row.budget * dense


def mixins_add_their_terms() -> None:
    torch.manual_seed(0)
    trainer = fit(WithMixins(), BATCHES)
    wanted = {"vne/features/entropy", "vne/penalty", "stable_rank/head", "stable_rank/penalty"}
    assert wanted <= set(trainer.callback_metrics)


def compression_mixin_loads() -> None:
    from lightning_plugins.compression import factorize

    model = Compressed()
    small = factorize(Compressed(), {"backbone.0": 2})
    model.on_load_checkpoint({"state_dict": small.state_dict()})
    model.load_state_dict(small.state_dict())


def learns_from_tasks(kind: Callable[[], Any]) -> None:
    model = kind()
    before = model.inner_loop.model[0].weight.detach().clone()
    fit(model, make_tasks(2), max_epochs=1, precision="32-true")
    after = model.inner_loop.model[0].weight
    assert after.isfinite().all()
    assert not torch.equal(after, before)


def checks() -> Iterator[tuple[str, Callable[[], None]]]:
    yield "the package", the_package
    for name in SETTINGS:
        yield name, lambda name=name: trains_as_by_hand(name)
    for name in RESUMED:
        yield f"{name}, resumed", lambda name=name: resumes(name)
    for name in IN_YAML:
        yield f"{name}, from YAML", lambda name=name: is_read_from_yaml(name)
    yield "compression", compresses
    yield "mixins", mixins_add_their_terms
    yield "compression mixin", compression_mixin_loads
    yield "MAML", lambda: learns_from_tasks(Few)
    yield "GAP", lambda: learns_from_tasks(FewGAP)


def main() -> None:
    found: dict[str, str | None] = {}
    for name, check in checks():
        try:
            check()
            found[name] = None
        except Exception:  # noqa: BLE001  # it is handed on
            found[name] = traceback.format_exc()
    sys.stdout.write(f"{json.dumps(found)}\n")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main()
