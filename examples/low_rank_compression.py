# %% [markdown]
# # From a training loop to a smaller network
#
# One callback takes a network to the size you name: it trains, searches a rank for every layer, presses the weights to
# these ranks, splits each layer into two thin ones, and fine-tunes, all within one `trainer.fit`. Here it is put on a
# small ResNet and a small vision transformer of timm, on the digits of scikit-learn. `Classifier` and `Digits` (in
# `digits.py`) are ordinary Lightning classes that know nothing of it.
#
# **Claim**: with 80 % of the weights of its layers removed, the ResNet is within three points of the dense one.

# %%
import os
import statistics
import warnings

import torch
from digits import Classifier, Digits, show
from lightning.pytorch import Callback, Trainer, seed_everything
from torch import Tensor

from lightning_plugins.callbacks import LowRankCompression
from lightning_plugins.compression import compression_report, equal_ratio, factorize, restore_structure
from lightning_plugins.plots import trade_off_figure

STEPS = int(os.environ.get("EXAMPLE_STEPS", "460"))  # twenty epochs; the tests set 2
RATIOS = (0.6, 0.8) if STEPS >= 460 else (0.6,)
SEARCH = {"width": 2, "step": 0.05 if STEPS >= 460 else 0.4, "bounds": (0, 1)}  # accuracies lie between 0 and 1
warnings.filterwarnings("ignore", module="lightning")  # about loaders without workers, which memory does not need
settings = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_model_summary": False}
images = Digits().val[:1][0]

# %% [markdown]
# ## The lines to add
#
# `ratio` is the fraction of the layers' weights to remove. The search raises what `score` returns; without it, it
# lowers the loss of the module's own training step.


# %%
def accuracy(model: Classifier, batch: list[Tensor]) -> Tensor:
    inputs, labels = batch
    return (model.net(inputs).argmax(1) == labels).float().mean()


def bsr(layers: str, ratio: float) -> LowRankCompression:
    search = {"score": accuracy, "search_options": SEARCH, "search_batches": 2}
    times = {"search_at": 0.3, "factorize_at": 0.7}
    return LowRankCompression(layers, ratio, weight=1.0, every_n_steps=4, figures=False, **search, **times)


def energy_threshold(layers: str, ratio: float) -> LowRankCompression:
    times = {"search_at": 0.7, "factorize_at": 0.7}
    return LowRankCompression(layers, ratio, weight=0, search="energy", figures=False, **times)


# %%
def measure(model: Classifier) -> float:
    (metrics,) = Trainer(**settings, enable_progress_bar=False).validate(
        model, Digits().val_dataloader(), verbose=False
    )
    return metrics["accuracy"]


def fit(build, *callbacks: Callback) -> Classifier:
    seed_everything(0, verbose=False)
    model = build()
    trainer = Trainer(max_epochs=20, max_steps=STEPS, callbacks=list(callbacks), **settings)
    trainer.fit(model, Digits().train_dataloader())
    return model


def compare(build, layers: str) -> dict[str, dict[float, list[float]]]:
    """Accuracy of the dense network, and of those compressed in three ways."""
    dense = fit(build)
    found: dict[str, dict[float, list[float]]] = {"BSR": {}, "energy threshold": {}, "truncation alone": {}}
    for ratio in RATIOS:
        copied = build()
        copied.load_state_dict(dense.state_dict())
        factorize(copied, equal_ratio(copied, ratio=ratio, layers=layers).ranks)
        found["truncation alone"][ratio] = [measure(copied)]
        for name, make in {"BSR": bsr, "energy threshold": energy_threshold}.items():
            found[name][ratio] = [measure(fit(build, make(layers, ratio)))]
    found["dense"] = {0.0: [measure(dense)]}
    print({name: {ratio: round(scores[0], 3) for ratio, scores in points.items()} for name, points in found.items()})
    return found


def draw(found: dict[str, dict[float, list[float]]], title: str):
    methods = {name: points for name, points in found.items() if name != "dense"}
    dense = statistics.mean(found["dense"][0.0])
    labels = {"xlabel": "weights removed", "ylabel": "validation accuracy"}
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
# It is made of plain layers. `compression_report` counts and times it beside the dense one; `restore_structure` gives a
# fresh network the structure that a state dict was saved with, so nothing but the weights needs to be kept.

# %%
model = fit(Classifier, bsr("net.layer*", RATIOS[-1]))
print(compression_report(Classifier().net, model.net, images, latency=STEPS >= 460))

again = restore_structure(Classifier(), model.state_dict())
again.load_state_dict(model.state_dict())
torch.testing.assert_close(again.eval().net(images), model.eval().net(images))

# %% [markdown]
# ## The claim

# %%
if STEPS >= 460:
    assert resnet["BSR"][0.8][0] > resnet["dense"][0.0][0] - 0.03, resnet
