# %% [markdown]
# # Train weights that can be factorised
#
# `Classifier` is an ordinary `LightningModule`. One callback drives the weights of the network towards a quarter of
# their rank during training, another monitors their singular values. `factorize` then replaces each layer by two thin
# ones, without further training.
#
# **Claim**: with the penalty the factorised network is within two points of the original; without it more than twenty
# points are lost.

# %%
# %pip install --quiet 'lightning-plugins[lightning,plots,timm]' scikit-learn

# %%
import copy
import os
import tempfile
import warnings
from pathlib import Path
from typing import Any

import timm
import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from lightning_plugins.callbacks import SpectrumMonitor, StableRankRegularization
from lightning_plugins.compression import factorize
from lightning_plugins.plots import layer_spectra_figure

STEPS = int(os.environ.get("EXAMPLE_STEPS", "460"))  # twenty epochs; the tests set 2
LAYERS = "net.layer*"  # globs take the convolutions and linear layers among what they match
RANK = 0.25  # of the smaller side of every weight
warnings.filterwarnings("ignore", module="lightning")  # about loaders without workers, which memory does not need
settings = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_model_summary": False}


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


images, labels = map(torch.tensor, load_digits(return_X_y=True))
images = F.interpolate(images.float().view(-1, 1, 8, 8) / 8 - 1, size=(32, 32), mode="bilinear")
split = len(images) * 4 // 5
train, val = TensorDataset(images[:split], labels[:split]), TensorDataset(images[split:], labels[split:])

# %% [markdown]
# ## The lines to add
#
# The penalty is the modified stable rank: the sum of the singular values beyond the target rank, divided by that of the
# leading ones. It does not depend on the scale of a weight, so weight decay stays on. It is applied in every fourth
# step, four times as strong.


# %%
def fit(weight: float | None) -> tuple[dict[str, float], SpectrumMonitor]:
    """Accuracy as trained and factorised, and what the monitor saw."""
    seed_everything(0, verbose=False)
    monitor = SpectrumMonitor(LAYERS, every_n_steps=115, figures=False)
    callbacks = [monitor]
    if weight is not None:
        callbacks.append(StableRankRegularization(LAYERS, weight=weight, rank=RANK, every_n_steps=4))
    trainer = Trainer(max_epochs=20, max_steps=STEPS, callbacks=callbacks, **settings)
    model = Classifier()
    trainer.fit(model, DataLoader(train, 64, shuffle=True))
    small = factorize(copy.deepcopy(model), RANK, LAYERS)
    accuracies = {}
    for name, network in {"as trained": model, "factorised": small}.items():
        (metrics,) = Trainer(**settings).validate(network, DataLoader(val, 64), verbose=False)
        accuracies[name] = metrics["accuracy"]
    sizes = [sum(parameter.numel() for parameter in network.parameters()) for network in (model, small)]
    print(f"penalty {weight}: accuracy {accuracies}, parameters {sizes[0]} and {sizes[1]}")
    return accuracies, monitor


# %%
without, monitor_without = fit(None)
with_penalty, monitor_with = fit(1.0)

# %% [markdown]
# ## What changed
#
# The singular values beyond the target rank have vanished.

# %%
last = {name: spectra[max(spectra)] for name, spectra in monitor_with.spectra.items()}
show(layer_spectra_figure(last, title="Singular values with the penalty"), "stable_rank_callback")
before = {name: spectra[max(spectra)] for name, spectra in monitor_without.spectra.items()}
show(layer_spectra_figure(before, title="Singular values without it"), "stable_rank_callback_without")

# %% [markdown]
# ## The claim

# %%
if STEPS >= 460:
    assert with_penalty["as trained"] - with_penalty["factorised"] < 0.02, with_penalty
    assert without["as trained"] - without["factorised"] > 0.2, without
