# %% [markdown]
# # The same training from a YAML file
#
# Every argument of the callbacks, including schedules, can be set in the file of a `LightningCLI`. In your own project
# only the file changes: `python main.py fit --config config.yaml`.
#
# **Claim**: the file and the same callbacks in Python give bit-identical weights.

# %%
# %pip install --quiet 'lightning-plugins[lightning,cli,plots,timm]' scikit-learn

# %%
import os
import tempfile
import warnings
from pathlib import Path
from typing import Any

import timm
import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer, seed_everything
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from lightning_plugins.callbacks import RepresentationMonitor, VNERegularization
from lightning_plugins.plots import spectrum_comparison_figure
from lightning_plugins.schedules import Warmup

STEPS = int(os.environ.get("EXAMPLE_STEPS", "138"))  # six epochs; the tests set 2
warnings.filterwarnings("ignore", module="lightning")  # about loaders without workers, which memory does not need


def show(figure, name):
    """Write the figure to a file, and show it in a notebook."""
    path = Path(tempfile.gettempdir()) / f"{name}.png"
    figure.savefig(path)
    print(f"figure: {path}")
    if "get_ipython" in globals():
        from IPython.display import Image, display

        display(Image(path))


# %% [markdown]
# ## An ordinary module, and its data
# A small timm network, and the 1797 digits shipped with scikit-learn, enlarged; the last fifth is for validation.
# Neither depends on this package.


# %%
class Classifier(LightningModule):
    def __init__(self, name: str = "test_resnet", lr: float = 4e-3, **settings: Any) -> None:
        super().__init__()
        self.net = timm.create_model(name, in_chans=1, num_classes=10, **settings)
        self.accuracy = MulticlassAccuracy(10, average="micro")
        self.lr = lr
        self.example_input_array = torch.zeros(1, 1, 32, 32)  # with which operations are counted

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.accuracy(self(batch[0]), batch[1])
        self.log("accuracy", self.accuracy)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        optimizer = torch.optim.AdamW(self.parameters(), self.lr)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.lr, total_steps=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Digits(LightningDataModule):
    def __init__(self, batch_size: int = 64) -> None:
        super().__init__()
        images, labels = map(torch.tensor, load_digits(return_X_y=True))
        images = F.interpolate(images.float().view(-1, 1, 8, 8) / 8 - 1, size=(32, 32), mode="bilinear")
        split = len(images) * 4 // 5
        self.train = TensorDataset(images[:split], labels[:split])
        self.val = TensorDataset(images[split:], labels[split:])
        self.batch_size = batch_size

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.train, self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.val, self.batch_size)


# %% [markdown]
# ## The file

# %%
config = Path(tempfile.mkdtemp()) / "config.yaml"
config.write_text("""
seed_everything: 0
model:
  name: test_resnet
  lr: 2.0e-3
data:
  batch_size: 64
trainer:
  accelerator: cpu
  max_epochs: 6
  logger: false
  enable_checkpointing: false
  enable_model_summary: false
  callbacks:
    - class_path: lightning_plugins.callbacks.VNERegularization
      init_args:
        layers: net.fc:input
        weight: 0.1
        schedule: # no term at first, then a rise to the full weight over the first fifth of the training
          class_path: lightning_plugins.schedules.Warmup
          init_args:
            duration: 0.2
            unit: fraction
    - class_path: lightning_plugins.callbacks.RepresentationMonitor
      init_args:
        layers: [net.fc:input]
        figures: false
""")

# %% [markdown]
# ## From the file
#
# `args` are the arguments that would follow `python main.py`; arguments after `--config` override the file.

# %%
arguments = ["fit", f"--config={config}", f"--trainer.max_steps={STEPS}"]
cli = LightningCLI(Classifier, Digits, args=arguments, save_config_callback=None)

# %% [markdown]
# ## In Python

# %%
seed_everything(0)
callbacks = [
    VNERegularization(layers="net.fc:input", weight=0.1, schedule=Warmup(0.2, unit="fraction")),
    RepresentationMonitor(layers=["net.fc:input"], figures=False),
]
trainer = Trainer(
    accelerator="cpu",
    max_epochs=6,
    max_steps=STEPS,
    callbacks=callbacks,
    logger=False,
    enable_checkpointing=False,
    enable_model_summary=False,
)
model = Classifier(name="test_resnet", lr=2e-3)
trainer.fit(model, datamodule=Digits(batch_size=64))

# %%
for name, value in sorted(cli.trainer.callback_metrics.items()):
    print(f"{name:45} {value:8.3f} file {trainer.callback_metrics[name]:8.3f} Python")

# %% [markdown]
# The spectrum of the features in the last epoch from both monitors: the lines coincide.

# %%
monitors = {"file": cli.trainer.callbacks, "Python": trainer.callbacks}
spectra = {
    name: next(reversed(monitor.spectra["train"]["net.fc"].values()))
    for name, callbacks in monitors.items()
    for monitor in callbacks
    if isinstance(monitor, RepresentationMonitor)
}
show(spectrum_comparison_figure(spectra, title="Features of the last epoch"), "von_neumann_yaml")

# %% [markdown]
# ## The claim

# %%
from_file = cli.model.state_dict()
assert all(torch.equal(value, from_file[name]) for name, value in model.state_dict().items())
