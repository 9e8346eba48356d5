# %% [markdown]
# # Self-supervised learning with I-VNE+
#
# I-VNE+ pulls two views of an image together and keeps the representation from collapsing by raising its von Neumann
# entropy: no negatives, no teacher, no stop-gradient. Here a small encoder learns from 1437 unlabelled digits with
# I-VNE+, with SimCLR's loss and with Barlow Twins' loss; everything else is the same, and I-VNE+ has its published
# weights. A linear probe then evaluates the frozen features.
#
# **Claim**: averaged over three seeds, the probe on I-VNE+'s features is at least two points better than that on a
# random encoder's, and at most one point worse than those of SimCLR and Barlow Twins.

# %%
# %pip install --quiet 'lightning-plugins[lightning,plots]' scikit-learn

# %%
import math
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean, pstdev

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

from lightning_plugins.functional import autocorrelation_eigenvalues
from lightning_plugins.plots import spectrum_comparison_figure
from lightning_plugins.regularizers import InvarianceVNE

SHORT = "EXAMPLE_STEPS" in os.environ  # the tests set 2
STEPS = int(os.environ.get("EXAMPLE_STEPS", "200"))
SEEDS = [0] if SHORT else [0, 1, 2]
BATCH = 128


def show(figure, name):
    """Write the figure to a file, and show it in a notebook."""
    path = Path(tempfile.gettempdir()) / f"{name}.png"
    figure.savefig(path)
    print(f"figure: {path}")
    if "get_ipython" in globals():
        from IPython.display import Image, display

        display(Image(path))


# %% [markdown]
# ## Two views of a batch
#
# Rotated, scaled, sheared and shifted at random, with some noise.


# %%
def augment(images: Tensor) -> Tensor:
    n = len(images)
    angle = math.radians(20) * (2 * torch.rand(n) - 1)
    scale = 0.8 + 0.4 * torch.rand(n)
    shear = 0.3 * (2 * torch.rand(n) - 1)
    shift = 0.25 * (2 * torch.rand(n, 2) - 1)
    rows = [
        torch.stack([angle.cos() * scale, shear - angle.sin() * scale, shift[:, 0]], dim=1),
        torch.stack([angle.sin() * scale, angle.cos() * scale, shift[:, 1]], dim=1),
    ]
    grid = F.affine_grid(torch.stack(rows, dim=1), list(images.shape), align_corners=False)
    moved = F.grid_sample(images, grid, padding_mode="border", align_corners=False)
    return moved + 0.1 * torch.randn_like(moved)


# %% [markdown]
# ## Three losses on a list of views
#
# I-VNE+ comes from the package, with its defaults: the weight of the invariance is the logarithm of the batch size, the
# weight of the entropy is 1. The two others take a few lines. A temperature of 0.2 and, for Barlow Twins, 0.005 instead
# of one over the number of features were also tried and gave 96.3 and 94.5 % with all labels, no better than these.


# %%
def simclr(views: Sequence[Tensor], temperature: float = 0.5) -> Tensor:
    z = F.normalize(torch.cat(list(views)))
    similarity = (z @ z.T / temperature).fill_diagonal_(-torch.inf)
    partner = torch.arange(len(z)).roll(len(z) // 2)
    return F.cross_entropy(similarity, partner)


def barlow_twins(views: Sequence[Tensor]) -> Tensor:
    a, b = ((z - z.mean(dim=0)) / z.std(dim=0) for z in views)
    correlation = a.T @ b / len(a)
    on = torch.diagonal(correlation)
    off = correlation.square().sum() - on.square().sum()
    return (on - 1).square().sum() + off / len(correlation)


LOSSES: dict[str, Callable[[Sequence[Tensor]], Tensor]] = {
    "I-VNE+": InvarianceVNE(),
    "SimCLR": simclr,
    "Barlow Twins": barlow_twins,
}

# %% [markdown]
# ## The module


# %%
def block(channels_in: int, channels_out: int) -> nn.Sequential:
    convolution = nn.Conv2d(channels_in, channels_out, kernel_size=3, padding=1, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(channels_out), nn.ReLU(), nn.MaxPool2d(2))


class SelfSupervised(LightningModule):
    def __init__(self, loss: Callable[[Sequence[Tensor]], Tensor], lr: float = 2e-3) -> None:
        super().__init__()
        self.encoder = nn.Sequential(block(1, 16), block(16, 32), block(32, 128), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.projector = nn.Sequential(nn.Linear(128, 256), nn.BatchNorm1d(256), nn.ReLU(), nn.Linear(256, 64))
        self.loss, self.lr = loss, lr

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        images, _ = batch  # the labels are for the probe
        both = torch.cat([augment(images), augment(images)])
        return self.loss(self.projector(self.encoder(both)).chunk(2))

    def configure_optimizers(self) -> OptimizerLRScheduler:
        optimizer = torch.optim.AdamW(self.parameters(), self.lr)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.lr, total_steps=STEPS)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


# %% [markdown]
# ## Training, and a linear probe
#
# The probe is a logistic regression on standardised features, fitted to all training labels and to five per class. The
# digits are enlarged to 16 pixels; at 32 pixels, which takes three times as long, I-VNE+ reached 96.3 %, SimCLR 94.9,
# Barlow Twins 95.1 and the random encoder 93.8.

# %%
pixels, digits = map(torch.tensor, load_digits(return_X_y=True))
pixels = F.interpolate(pixels.float().view(-1, 1, 8, 8) / 8 - 1, size=(16, 16), mode="bilinear")
split = len(pixels) * 4 // 5  # the last fifth is for validation
(images, val_images), (labels, val_labels) = pixels.tensor_split([split]), digits.tensor_split([split])
train_data = TensorDataset(images, labels)
five_a_class = torch.cat([torch.nonzero(labels == digit)[:5, 0] for digit in range(10)])


def train(loss: Callable[[Sequence[Tensor]], Tensor] | None, seed: int) -> SelfSupervised:
    seed_everything(seed, verbose=False)
    model = SelfSupervised(loss or simclr)
    if loss is not None:  # otherwise the encoder stays random
        loader = DataLoader(train_data, BATCH, sampler=RandomSampler(train_data, num_samples=STEPS * BATCH))
        trainer = Trainer(
            accelerator="cpu",
            max_epochs=1,
            max_steps=STEPS,
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=False,
        )
        trainer.fit(model, loader)
    for part in (model.encoder, model.projector):
        part.eval()
    return model


@torch.no_grad()
def probe(model: SelfSupervised) -> tuple[float, float, Tensor]:
    features, val_features = model.encoder(images), model.encoder(val_images)
    spectrum = autocorrelation_eigenvalues(model.projector(val_features))
    centre, spread = features.mean(dim=0), features.std(dim=0) + 1e-6
    features, val_features = (features - centre) / spread, (val_features - centre) / spread
    scores = []
    for rows in (torch.arange(len(labels)), five_a_class):
        classifier = LogisticRegression(max_iter=300).fit(features[rows].numpy(), labels[rows].numpy())
        scores.append(float(classifier.score(val_features.numpy(), val_labels.numpy())))
    return scores[0], scores[1], spectrum


# %%
results = {
    name: [probe(train(loss, seed)) for seed in SEEDS] for name, loss in {"random encoder": None, **LOSSES}.items()
}

print(f"{'probe accuracy, %':20} {'all labels':>14} {'five a class':>14}")
for name, runs in results.items():
    columns = [[100 * run[index] for run in runs] for index in (0, 1)]
    print(f"{name:20} " + " ".join(f"{mean(column):8.1f} ± {pstdev(column):3.1f}" for column in columns))

# %% [markdown]
# The spectra of the projections, on which the losses act. I-VNE+ directly favours a flat spectrum, Barlow Twins small
# squared correlations between features, SimCLR samples that are far apart.

# %%
spectra = {name: results[name][0][2] for name in LOSSES}
show(spectrum_comparison_figure(spectra, title="Projections of the validation set"), "von_neumann_self_supervised")

# %% [markdown]
# ## The claim

# %%
if STEPS >= 200:
    accuracy = {name: mean(run[0] for run in runs) for name, runs in results.items()}
    assert accuracy["I-VNE+"] > accuracy["random encoder"] + 0.02, accuracy
    assert accuracy["I-VNE+"] > max(accuracy["SimCLR"], accuracy["Barlow Twins"]) - 0.01, accuracy
