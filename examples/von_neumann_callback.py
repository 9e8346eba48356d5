# %% [markdown]
# # Add the von Neumann entropy to a training you already have
#
# `Classifier` and `Digits` (in `digits.py`) are an ordinary `LightningModule` and `LightningDataModule`. Neither is
# changed here: one callback raises the entropy of the representation, another measures it.
#
# **Claim**: with `weight=0.1` the entropy of the validation features is at least 0.3 nats higher than without, and the
# accuracy is within two points of what it was.

# %%
import os
import warnings

from digits import Classifier, Digits, show
from lightning.pytorch import Trainer, seed_everything

from lightning_plugins.callbacks import RepresentationMonitor, VNERegularization
from lightning_plugins.plots import spectrum_comparison_figure

STEPS = int(os.environ.get("EXAMPLE_STEPS", "230"))  # ten epochs; the tests set 2
warnings.filterwarnings("ignore", module="lightning")  # about loaders without workers, which memory does not need
settings = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_model_summary": False}

# %% [markdown]
# ## The lines to add
#
# `layers` names the layer; `:input` takes what it receives, here the 96 features that the classifier sees. The monitor
# works without the term too, and it stands alone in the first of the two runs.


# %%
def fit(weight: float | None) -> tuple[dict[str, float], RepresentationMonitor]:
    seed_everything(0, verbose=False)
    monitor = RepresentationMonitor(layers="net.fc:input", figures=False)
    callbacks = [monitor]
    if weight is not None:
        callbacks.append(VNERegularization(layers="net.fc:input", weight=weight))
    trainer = Trainer(max_epochs=10, max_steps=STEPS, callbacks=callbacks, **settings)
    model, data = Classifier(), Digits()
    trainer.fit(model, data.train_dataloader())
    (metrics,) = trainer.validate(model, data.val_dataloader(), verbose=False)
    return metrics, monitor


# %%
without, monitor_without = fit(None)
with_vne, monitor_with = fit(0.1)

# %% [markdown]
# ## What changed
#
# The monitor has logged these, over the whole validation set and exact to rounding however it is cut into batches.

# %%
for name in sorted(without):
    print(f"{name:45} {without[name]:8.3f} without {with_vne[name]:8.3f} with")

# %% [markdown]
# The term lifts the small eigenvalues most: the smaller an eigenvalue, the steeper the entropy.

# %%
spectra = {
    "without": monitor_without.spectra["val"]["net.fc"][STEPS],
    "with VNE": monitor_with.spectra["val"]["net.fc"][STEPS],
}
show(spectrum_comparison_figure(spectra, title="Validation features"), "von_neumann_callback")

# %% [markdown]
# ## Images of your own
#
# The same two callbacks on a folder with `train/<class>/*.png` and `val/<class>/*.png`: set `EXAMPLE_IMAGES` to it.

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
