# %% [markdown]
# # Which tile of the mosaic?
#
# Digits are pasted into a two by two mosaic: one tile is a 3 or an 8, the three others are irrelevant digits. The
# network must classify 3 or 8; its explanation should point only at that tile.
#
# **Claim**: gradient methods, including Grad-CAM, place more of their attribution on the correct tile than a random
# map's quarter.

# %%
# %pip install --quiet 'lightning-plugins[lightning,plots,attribution]' scikit-learn

# %%
import os
import tempfile
import warnings
from pathlib import Path

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_plugins.callbacks import AttributionEvaluation, BatchKeys, SampleSelection
from lightning_plugins.data import mosaics
from lightning_plugins.plots import attribution_figure

STEPS = int(os.environ.get("EXAMPLE_STEPS", "400"))  # the tests set 2
warnings.filterwarnings("ignore", module="lightning")


def show(figure, name):
    """Write the figure, and show it in a notebook."""
    path = Path(tempfile.gettempdir()) / f"{name}.png"
    figure.savefig(path)
    print(f"figure: {path}")
    if "get_ipython" in globals():
        from IPython.display import Image, display

        display(Image(path))


# %%
seed_everything(0, verbose=False)
digits = load_digits()
images, labels = torch.tensor(digits.images).float()[:, None] / 16, torch.tensor(digits.target)
half = len(images) // 2
train = mosaics(images[:half], labels[:half], 2000, classes=(3, 8), seed=0)
test = mosaics(images[half:], labels[half:], 200, classes=(3, 8), seed=1)


# %%
class Reader(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        layers = [
            layer
            for a, b, stride in ((1, 24, 1), (24, 32, 2), (32, 48, 1))
            for layer in (nn.Conv2d(a, b, 3, stride, 1, bias=False), nn.BatchNorm2d(b), nn.ReLU())
        ]
        self.features = nn.Sequential(*layers)
        self.head = nn.Sequential(nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(48, 2))

    def forward(self, x):
        return self.head(self.features(x))

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def test_step(self, batch, batch_idx):
        self.log("accuracy", (self(batch[0]).argmax(1) == batch[1]).float().mean(), batch_size=len(batch[0]))

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


quiet = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_model_summary": False,
    "enable_progress_bar": False,
}
model = Reader()
Trainer(max_steps=STEPS, max_epochs=-1, **quiet).fit(
    model, DataLoader(TensorDataset(*train), batch_size=64, shuffle=True)
)

# %% [markdown]
# ## The evaluation

# %%
evaluation = AttributionEvaluation(
    {"saliency": None, "input_x_gradient": None, "guided_backprop": None, "gradcam": "features.8"},
    batch=BatchKeys(mask=2),
    metrics=["attribution_localization", "pointing_game", "iou", "auroc"],
    samples=SampleSelection(select=0.9 if STEPS >= 400 else None),
    absolute="abs",
    examples=0,
)
(logged,) = Trainer(callbacks=[evaluation], **quiet).test(
    model, DataLoader(TensorDataset(*test), batch_size=100), verbose=False
)
print(f"accuracy {logged['accuracy']:.3f}; {evaluation.report.samples} mosaics explained")
for method, row in evaluation.report.scores.items():
    print(f"{method:24} " + "  ".join(f"{name} {cell['score']:.3f}" for name, cell in row.items()))

# %% [markdown]
# ## One mosaic

# %%
inputs = test.images[:1].clone().requires_grad_()
gradient = torch.autograd.grad(model.eval()(inputs)[0, int(test.labels[0])], inputs)[0]
maps = {"gradient": gradient[0], "input x gradient": (gradient * inputs.detach())[0]}
show(attribution_figure(test.images[0], maps, mask=test.masks[0]), "attribution_mosaic")

# %%
if STEPS >= 400:
    shares = {name: row["attribution_localization"]["score"] for name, row in evaluation.report.scores.items()}
    assert all(value > shares["random"] for name, value in shares.items() if name != "random")
