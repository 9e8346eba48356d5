# %% [markdown]
# # From a training loop to a smaller network
#
# One callback compresses a network to a given size: it trains, searches a rank for every layer, regularizes the weights
# towards these ranks, splits each layer into two thin ones, and fine-tunes, all within one `trainer.fit`. Here it is
# applied to a small ResNet and a small vision transformer from timm, on the digits of scikit-learn. `Classifier` is an
# ordinary, unmodified `LightningModule`.
#
# **Claim**: with 80 % of the weights of its layers removed, the ResNet is within three points of the dense one.

# %%
# %pip install --quiet 'lightning-plugins[lightning,plots,timm]' scikit-learn

# %%
import os
import statistics
import tempfile
import warnings
from pathlib import Path
from typing import Any

import timm
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from lightning_plugins.callbacks import LowRankCompression, Penalty, SearchSettings, Timing
from lightning_plugins.compression import compression_report, equal_ratio, factorize, restore_structure
from lightning_plugins.plots import trade_off_figure

STEPS = int(os.environ.get("EXAMPLE_STEPS", "460"))  # twenty epochs; the tests set 2
BUDGETS = (0.4, 0.2) if STEPS >= 460 else (0.4,)
SEARCH = {"width": 2, "step": 0.05 if STEPS >= 460 else 0.4, "bounds": (0, 1)}  # accuracies lie between 0 and 1
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
some = val[:1][0]

# %% [markdown]
# ## The lines to add
#
# `budget` is the fraction of the layers' weights to keep. The search maximises `score`; without it, it minimises the
# loss of the module's training step.


# %%
def accuracy(model: Classifier, batch: list[Tensor]) -> Tensor:
    inputs, labels = batch
    return (model.net(inputs).argmax(1) == labels).float().mean()


def bsr(layers: str, budget: float) -> LowRankCompression:
    return LowRankCompression(
        layers,
        budget=budget,
        search=SearchSettings(options=SEARCH, score=accuracy, batches=2),
        penalty=Penalty(weight=1.0, every_n_steps=4),
        timing=Timing(search_at=0.3, factorize_at=0.7),
        figures=False,
    )


def energy_threshold(layers: str, budget: float) -> LowRankCompression:
    timing = Timing(search_at=0.7, factorize_at=0.7)
    return LowRankCompression(layers, budget=budget, search="energy", penalty=0, timing=timing, figures=False)


# %%
def measure(model: Classifier) -> float:
    (metrics,) = Trainer(**settings, enable_progress_bar=False).validate(model, DataLoader(val, 64), verbose=False)
    return metrics["accuracy"]


def fit(build, *callbacks: Callback) -> Classifier:
    seed_everything(0, verbose=False)
    model = build()
    trainer = Trainer(max_epochs=20, max_steps=STEPS, callbacks=list(callbacks), **settings)
    trainer.fit(model, DataLoader(train, 64, shuffle=True))
    return model


def compare(build, layers: str) -> dict[str, dict[float, list[float]]]:
    """Accuracy of the dense network, and of those compressed in three ways."""
    dense = fit(build)
    found: dict[str, dict[float, list[float]]] = {"BSR": {}, "energy threshold": {}, "truncation alone": {}}
    for budget in BUDGETS:
        copied = build()
        copied.load_state_dict(dense.state_dict())
        factorize(copied, equal_ratio(copied, budget=budget, layers=layers).ranks)
        found["truncation alone"][budget] = [measure(copied)]
        for name, make in {"BSR": bsr, "energy threshold": energy_threshold}.items():
            found[name][budget] = [measure(fit(build, make(layers, budget)))]
    found["dense"] = {1.0: [measure(dense)]}
    print({name: {budget: round(scores[0], 3) for budget, scores in points.items()} for name, points in found.items()})
    return found


def draw(found: dict[str, dict[float, list[float]]], title: str):
    methods = {name: points for name, points in found.items() if name != "dense"}
    dense = statistics.mean(found["dense"][1.0])
    labels = {"xlabel": "share of the weights that is left", "ylabel": "validation accuracy"}
    return trade_off_figure(methods, reference=("dense", dense), title=title, **labels)


# %% [markdown]
# ## A ResNet

# %%
resnet = compare(Classifier, "net.layer*")
show(draw(resnet, "ResNet on the digits"), "low_rank_compression_resnet")


# %% [markdown]
# ## A vision transformer


# %%
def small_vit() -> Classifier:
    shape = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 3, "num_heads": 4}
    return Classifier("vit_tiny_patch16_224", lr=2e-3, **shape)


vit = compare(small_vit, "net.blocks.*")
show(draw(vit, "Vision transformer on the digits"), "low_rank_compression_vit")

# %% [markdown]
# ## The small network
#
# It consists of plain layers. `compression_report` compares its size and latency with the dense one;
# `restore_structure` gives a fresh network the structure of a state dict, so only the weights need to be saved.

# %%
model = fit(Classifier, bsr("net.layer*", BUDGETS[-1]))
print(compression_report(Classifier().net, model.net, some, latency=STEPS >= 460))

again = restore_structure(Classifier(), model.state_dict())
again.load_state_dict(model.state_dict())
torch.testing.assert_close(again.eval().net(some), model.eval().net(some))

# %% [markdown]
# ## The claim

# %%
if STEPS >= 460:
    assert resnet["BSR"][0.8][0] > resnet["dense"][0.0][0] - 0.03, resnet
