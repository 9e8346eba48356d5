# %% [markdown]
# # Does the explanation point at the beat?
#
# A small network learns to detect premature ventricular beats in an electrocardiogram. The positions of these beats are
# known, so attribution maps can be scored: do they coincide with the beat, and does the prediction change when the
# attributed parts are removed?
#
# **Claim**: Grad-CAM maps overlap with the beat at least one and a half times as much as random maps, and guided
# Grad-CAM places at least one and a half times as much of its attribution there. Plain gradients need not be better
# than random.

# %%
# %pip install --quiet 'lightning-plugins[lightning,plots,attribution]'

# %%
import os
import tempfile
import warnings
from itertools import pairwise
from pathlib import Path

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_plugins.callbacks import AttributionEvaluation, BatchKeys, SampleSelection
from lightning_plugins.data import ecg_windows, read_ecg_folder, synthetic_ecg
from lightning_plugins.metrics import AttributionLocalization, DegradationScore, LocalizationIoU, PointingGame
from lightning_plugins.plots import attribution_figure, degradation_figure

STEPS = int(os.environ.get("EXAMPLE_STEPS", "150"))  # the tests set 2
FOLDER = os.environ.get("EXAMPLE_ECG")  # of real records, `.npz` or WFDB's; generated ones without
warnings.filterwarnings("ignore", module="lightning")


def show(figure, name):
    """Write the figure, and show it in a notebook."""
    path = Path(tempfile.gettempdir()) / f"{name}.png"
    figure.savefig(path)
    print(f"figure: {path}")
    if "get_ipython" in globals():
        from IPython.display import Image, display

        display(Image(path))


# %% [markdown]
# ## The data
#
# Each window has its class, 1 if it contains a premature ventricular beat, and the mask of these beats' spans, bounded
# by the midpoints between neighbouring R peaks. The generated signals are sums of Gaussians, one per wave; in an
# abnormal beat the P wave is missing, the QRS complex is wide and the T wave inverted.

# %%
seed_everything(0, verbose=False)
if FOLDER is None:
    records = [synthetic_ecg(240, abnormal=0.06, noise=0.05, seed=seed) for seed in range(8)]
else:
    records = [record.coarser(2) for record in read_ecg_folder(FOLDER)]
train, test = ecg_windows(records[:-2], 512), ecg_windows(records[-2:], 512)
print(f"{len(train.labels)} windows to learn from, {float(train.labels.float().mean()):.0%} with such a beat")


# %% [markdown]
# ## The network
#
# Every ReLU is a separate module: methods that register hooks on them, such as guided backpropagation, need this, and
# the callback raises an error otherwise.


# %%
class Detector(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        widths = [1, 16, 24, 32]
        layers = [
            layer
            for a, b in pairwise(widths)
            for layer in (nn.Conv1d(a, b, 7, 2, 3, bias=False), nn.BatchNorm1d(b), nn.ReLU())
        ]
        self.features = nn.Sequential(*layers)
        self.head = nn.Sequential(nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(32, 2))

    def forward(self, x):
        return self.head(self.features(x))

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def test_step(self, batch, batch_idx):
        self.log("accuracy", (self(batch[0]).argmax(1) == batch[1]).float().mean(), batch_size=len(batch[0]))

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


quiet = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_model_summary": False}
model = Detector()
trainer = Trainer(max_steps=STEPS, max_epochs=-1, enable_progress_bar=False, **quiet)
trainer.fit(model, DataLoader(TensorDataset(*train), batch_size=32, shuffle=True))

# %% [markdown]
# ## One callback, six methods
#
# They explain the windows of class 1 that the network classifies confidently. `BatchKeys(mask=2)` says that the ground
# truth is the third entry of a batch.

# %%
metrics = {
    "IoU": LocalizationIoU(),
    "pointing": PointingGame(),
    "localization": AttributionLocalization(),
    "degradation": DegradationScore(steps=16, baseline=False),
}
methods = {
    "saliency": None,
    "input_x_gradient": None,
    "integrated_gradients": {"n_steps": 20},
    "guided_backprop": None,
    "gradcam": "features.6",
    "guided_gradcam": "features.6",
}
evaluation = AttributionEvaluation(
    methods,
    batch=BatchKeys(mask=2),
    metrics=metrics,
    samples=SampleSelection(select=0.9 if STEPS >= 150 else None, classes=[1], max_samples=24 if STEPS >= 150 else 2),
    absolute="abs",
    examples=0,
)
(logged,) = Trainer(callbacks=[evaluation], enable_progress_bar=False, **quiet).test(
    model, DataLoader(TensorDataset(*test), batch_size=64), verbose=False
)
report = evaluation.report
print(f"accuracy {logged['accuracy']:.3f}; {report.samples} windows explained")
for method, row in report.scores.items():
    cells = "  ".join(f"{name} {cell['score']:+.3f} (skill {cell['skill']:+.2f})" for name, cell in row.items())
    print(f"{method:26} {cells}")

# %% [markdown]
# ## Curves
#
# Solid: the most relevant windows of 16 samples are replaced first, and the probability should fall immediately.
# Dashed: the least relevant ones first, and it should stay high.

# %%
curves = {
    name: (torch.tensor(pair["least"]), torch.tensor(pair["most"]))
    for name, pair in report.curves.items()
    if torch.tensor(pair["least"]).isfinite().all()
}
show(degradation_figure(curves, title="Degradation of absolute maps"), "attribution_ecg_curves")

# %% [markdown]
# ## Maps over a signal
#
# The true spans are shaded.

# %%
number = int((test.labels == 1).nonzero()[0])
x, target = test.signals[number : number + 1], test.labels[number : number + 1]
inputs = x.clone().requires_grad_()
gradient = torch.autograd.grad(model.eval()(inputs)[0, 1], inputs)[0]
maps = {"|gradient|": gradient[0].abs(), "input x gradient": (gradient * x)[0]}
show(attribution_figure(x[0], maps, mask=test.masks[number], title="One window"), "attribution_ecg_maps")

# %%
if STEPS >= 150 and FOLDER is None:
    scores = report.scores
    assert scores["gradcam/abs"]["IoU"]["score"] > 1.5 * scores["random"]["IoU"]["score"]
    assert scores["guided_gradcam/abs"]["localization"]["score"] > 1.5 * scores["random"]["localization"]["score"]
