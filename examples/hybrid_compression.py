# %% [markdown]
# # Filters and ranks under one budget
#
# One callback compresses a network to a fraction of its FLOPs: masks on channels and thresholds on singular values are
# learned during training, closed channels are removed, low-rank layers are split in two, and the small network is
# fine-tuned, all within one `trainer.fit`. Here three timm networks are compressed on the digits of scikit-learn: a
# small ResNet, a MobileNet and a vision transformer. `Classifier` is an ordinary, unmodified `LightningModule`.
#
# **Claim**: at 0.4 of the FLOPs the ResNet is within three points of the dense one.

# %%
# %pip install --quiet 'lightning-plugins[lightning,plots,pruning,timm]' scikit-learn

# %%
import os
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

from lightning_plugins.callbacks import HybridCompression, MaskScheduling, RankScheduling
from lightning_plugins.compression import ChoiceRates, Limits, compression_report, restore_structure
from lightning_plugins.plots import trade_off_figure

STEPS = int(os.environ.get("EXAMPLE_STEPS", "460"))  # twenty epochs; the tests set 2
BUDGETS = (0.6, 0.4, 0.2) if STEPS >= 460 else (0.6,)
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
some = val[:64][0]

# %% [markdown]
# ## The lines to add
#
# `budget` is the share of the operations of a forward pass that may be left, and the network that is delivered is
# within it, always. `multiple_of=4` keeps the numbers of channels and ranks even enough for the processor.
# `MaskScheduling` chooses channels alone, by learned masks or by the norms of their weights, and `RankScheduling` ranks
# alone.

# %%
limits = Limits(multiple_of=4)
fast = ChoiceRates(refresh_every=4)  # steps between two decompositions of the weights
often = ChoiceRates(update_every=max(1, STEPS // 40))
METHODS = {
    "hybrid": lambda budget: HybridCompression("net.*", budget, limits=limits, rates=fast),
    "filters only": lambda budget: MaskScheduling("net.*", budget, limits=limits),
    "ranks only": lambda budget: RankScheduling("net.*", budget, limits=limits, rates=fast),
    "magnitude": lambda budget: MaskScheduling("net.*", budget, limits=limits, criterion="magnitude", rates=often),
}


# %%
def fit(build, *callbacks: Callback) -> Classifier:
    seed_everything(0, verbose=False)
    model = build()
    trainer = Trainer(max_epochs=20, max_steps=STEPS, callbacks=list(callbacks), **settings)
    trainer.fit(model, DataLoader(train, 64, shuffle=True))
    return model


def measure(dense: Classifier, model: Classifier) -> tuple[float, float, float]:
    """Accuracy, milliseconds of a forward pass of 64 some, and the share of the operations that is left."""
    trainer = Trainer(**settings, enable_progress_bar=False)
    (metrics,) = trainer.validate(model, DataLoader(val, 64), verbose=False)
    report = compression_report(dense.net.eval(), model.net.eval(), some)
    return metrics["accuracy"], report.after.latency.median_ms, report.after.flops / report.before.flops


def compare(name: str, build, methods: tuple[str, ...] = tuple(METHODS)):
    """Train a network dense and with every method at every budget; accuracies, and a figure of them against time."""
    dense = fit(build)
    accuracy, milliseconds, _ = measure(dense, dense)
    print(f"{name:<20} {'dense':<14} budget 1.0: {1:.3f} left, {milliseconds:6.2f} ms, accuracy {accuracy:.3f}")
    scores, points = {"dense": {1.0: accuracy}}, {}
    for method in methods:
        scores[method], points[method] = {}, {}
        for budget in BUDGETS:
            found, took, left = measure(dense, fit(build, METHODS[method](budget)))
            print(f"{name:<20} {method:<14} budget {budget}: {left:.3f} left, {took:6.2f} ms, accuracy {found:.3f}")
            assert left <= budget
            scores[method][budget] = found
            points[method][took] = [found]
    labels = {"xlabel": "milliseconds for 64 images", "ylabel": "validation accuracy"}
    title = f"{name} on the digits; dense: {milliseconds:.1f} ms"
    return scores, trade_off_figure(points, reference=("dense", accuracy), title=title, **labels)


# %% [markdown]
# ## A ResNet
#
# Look at both axes: removing filters saves time directly. Thin layers save FLOPs, but hardly any time in a network with
# so few channels, where kernel launches and memory dominate; wide layers on larger images do better (see the card).

# %%
resnet, figure = compare("ResNet", Classifier)
show(figure, "hybrid_compression_resnet")


# %% [markdown]
# ## A MobileNet
#
# Its depthwise convolutions share their channels with the neighbouring pointwise ones, and are pruned together with
# them.


# %%
def mobilenet() -> Classifier:
    return Classifier("mobilenetv3_small_050", lr=2e-3)


_, figure = compare("MobileNet", mobilenet)
show(figure, "hybrid_compression_mobilenet")


# %% [markdown]
# ## A vision transformer
#
# Attention heads and hidden units of the MLPs are removed; the residual stream is not pruned, and ranks do the rest.


# %%
def small_vit() -> Classifier:
    shape = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 3, "num_heads": 4}
    return Classifier("vit_tiny_patch16_224", lr=2e-3, **shape)


_, figure = compare("Vision transformer", small_vit, ("hybrid", "magnitude") if STEPS >= 460 else ("hybrid",))
show(figure, "hybrid_compression_vit")

# %% [markdown]
# ## The small network
#
# It consists of plain layers. The report shows what is left of every layer; `restore_structure` gives a fresh network
# the structure of a state dict, so only the weights need to be saved.

# %%
callback = METHODS["hybrid"](BUDGETS[-1])
model = fit(Classifier, callback)
print(callback.report)

again = restore_structure(Classifier(), model.state_dict())
again.load_state_dict(model.state_dict())
torch.testing.assert_close(again.eval().net(some), model.eval().net(some))

# %% [markdown]
# ## The claim

# %%
if STEPS >= 460:
    assert resnet["hybrid"][0.4] > resnet["dense"][1.0] - 0.03, resnet
