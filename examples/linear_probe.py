# %% [markdown]
# # What do the layers of a network know?
#
# A small convolutional network learns to classify digits. At every validation `LayerProbe` measures how well a linear
# map can predict two properties from each of its layers: the digit, and the amount of ink in an image. No probe is
# trained, and the training is bit-identical to one without the callback.
#
# **Claim**: the digit becomes linearly readable with depth, and the ink, which the task does not need, becomes less so.

# %%
# %pip install --quiet 'lightning-plugins[lightning,plots]' scikit-learn

# %%
import os
import tempfile
import warnings
from pathlib import Path

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_plugins.callbacks import LayerProbe
from lightning_plugins.plots import probe_profile_figure

STEPS = int(os.environ.get("EXAMPLE_STEPS", "160"))  # eight epochs; the tests set 2
LAYERS = ["net.1", "net.4", "net.7", "net.8"]
warnings.filterwarnings("ignore", module="lightning")  # about loaders without workers, which memory does not need


def show(figure, name):
    """Show the figure in a notebook, and write it to a file as a script."""
    path = Path(tempfile.gettempdir()) / f"{name}.png"
    figure.savefig(path)
    print(f"figure: {path}")
    try:
        get_ipython  # noqa: B018 - there is one in notebooks
    except NameError:
        return
    from IPython.display import Image, display

    display(Image(path))


# %% [markdown]
# ## An ordinary module


# %%
class Digits(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            *(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Flatten(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10)),
        )

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.net(batch[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=3e-3)


digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
data = TensorDataset(images, torch.tensor(digits.target), torch.arange(len(images)))
train, held_out = torch.utils.data.random_split(data, [0.7, 0.3], torch.Generator().manual_seed(0))

# %% [markdown]
# ## The lines to add
#
# `targets` and `groups` are indices into the batch, or functions of it. A layer's feature map gives one row per image,
# its mean over positions. The control is the same network with its initial weights.


# %%
def ink(batch):
    return batch[0].mean(dim=(1, 2, 3))


common = {"groups": 2, "figures": False, "stages": "val"}
of_ink = LayerProbe(LAYERS, ink, controls="initial", **common)
of_digit = LayerProbe(
    LAYERS, 1, probe={"task": "classification", "num_targets": 10, "classifier": "lda"}, controls="initial", **common
)

seed_everything(0, verbose=False)
model = Digits()
settings = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_model_summary": False}
trainer = Trainer(max_steps=STEPS, max_epochs=8, callbacks=[of_ink, of_digit], enable_progress_bar=False, **settings)
trainer.fit(model, DataLoader(train, 64, shuffle=True), DataLoader(held_out, 128))

# %% [markdown]
# ## Results
#
# The same callbacks also work in a separate validation.

# %%
trainer.validate(model, DataLoader(held_out, 128), verbose=False)
for probe, score, name in ((of_digit, "held-out accuracy", "digit"), (of_ink, "held-out R²", "ink")):
    profile = {label: result.score for label, result in probe.results["val"].items()}
    title = f"How well the {name} can be read from the layers"
    show(probe_profile_figure([profile], [STEPS], score=score, title=title), f"linear_probe_{name}")
    print(name, {label: round(value, 3) for label, value in profile.items()})

# %% [markdown]
# ## The claim

# %%
if STEPS >= 160:
    accuracy = {label: float(result.accuracy) for label, result in of_digit.results["val"].items()}
    r2 = {label: float(result.r2) for label, result in of_ink.results["val"].items()}
    assert accuracy["net.8"] > accuracy["net.8@initial"] + 0.05, accuracy
    assert r2["net.8"] < r2["net.1"], r2
