# %% [markdown]
# # Add the von Neumann entropy to an existing training
#
# `Classifier` is an ordinary `LightningModule`. It is not modified: one callback raises the entropy of the
# representation, another measures it.
#
# **Claim**: with `weight=0.1` the entropy of the validation features is at least 0.3 nats higher than without, and the
# accuracy is within two points.

# %%
# %pip install --quiet 'lightning-plugins[lightning,plots,timm]' scikit-learn

# %%
import os
import tempfile
import warnings
from pathlib import Path

import timm
import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from lightning_plugins.callbacks import RepresentationMonitor, VNERegularization
from lightning_plugins.plots import spectrum_comparison_figure

STEPS = int(os.environ.get("EXAMPLE_STEPS", "230"))  # ten epochs; the tests set 2
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
    def __init__(self, name: str = "test_resnet", channels: int = 1, classes: int = 10, lr: float = 4e-3) -> None:
        super().__init__()
        self.net = timm.create_model(name, in_chans=channels, num_classes=classes)
        self.accuracy = MulticlassAccuracy(classes, average="micro")
        self.lr = lr

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
# `layers` selects the layer; `:input` its input, here the 96 features passed to the classifier. The monitor also works
# without the term, as in the first of the two runs.


# %%
def fit(weight: float | None) -> tuple[dict[str, float], RepresentationMonitor]:
    seed_everything(0, verbose=False)
    monitor = RepresentationMonitor(layers="net.fc:input", figures=False)
    callbacks = [monitor]
    if weight is not None:
        callbacks.append(VNERegularization(layers="net.fc:input", weight=weight))
    trainer = Trainer(max_epochs=10, max_steps=STEPS, callbacks=callbacks, **settings)
    model = Classifier()
    trainer.fit(model, DataLoader(train, 64, shuffle=True))
    (metrics,) = trainer.validate(model, DataLoader(val, 64), verbose=False)
    return metrics, monitor


# %%
without, monitor_without = fit(None)
with_vne, monitor_with = fit(0.1)

# %% [markdown]
# ## What changed
#
# The monitor logged these values over the whole validation set; up to rounding they do not depend on the batches.

# %%
for name in sorted(without):
    print(f"{name:45} {without[name]:8.3f} without {with_vne[name]:8.3f} with")

# %% [markdown]
# The term raises the small eigenvalues most: the smaller an eigenvalue, the steeper the entropy.

# %%
spectra = {
    "without": monitor_without.spectra["val"]["net.fc"][STEPS],
    "with VNE": monitor_with.spectra["val"]["net.fc"][STEPS],
}
show(spectrum_comparison_figure(spectra, title="Validation features"), "von_neumann_callback")

# %% [markdown]
# ## Your own images
#
# The same two callbacks on a folder with `train/<class>/*.png` and `val/<class>/*.png`: set `EXAMPLE_IMAGES` to its
# path.

# %%
FOLDER = os.environ.get("EXAMPLE_IMAGES")

if FOLDER is not None:
    from torch.utils.data import DataLoader
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import Compose, Resize, ToTensor

    prepare = Compose([Resize((64, 64)), ToTensor()])
    train, val = (ImageFolder(os.path.join(FOLDER, part), prepare) for part in ("train", "val"))
    trainer = Trainer(
        max_epochs=10,
        max_steps=STEPS,
        callbacks=[
            VNERegularization(layers="net.fc:input", weight=0.1),
            RepresentationMonitor(layers="net.fc:input", figures=False),
        ],
        **settings,
    )
    model = Classifier("resnet18", channels=3, classes=len(train.classes))
    trainer.fit(model, DataLoader(train, batch_size=32, shuffle=True))
    trainer.validate(model, DataLoader(val, batch_size=32))

# %% [markdown]
# ## The claim

# %%
if STEPS >= 230:
    gain = with_vne["representation/val/net.fc/entropy"] - without["representation/val/net.fc/entropy"]
    assert gain > 0.3, gain
    assert abs(with_vne["accuracy"] - without["accuracy"]) < 0.02
