# %% [markdown]
# # Train weights that can be cut down
#
# `Classifier` and `Digits` (in `digits.py`) are an ordinary `LightningModule` and `LightningDataModule`. One callback
# presses the weights of the network towards a quarter of their rank while it trains, another watches their singular
# values. `factorize` then replaces each layer by two thin ones, with no training after it.
#
# **Claim**: with the penalty the factorised network is within two points of the one before; without it more than
# twenty are lost.

# %%
import copy
import os
import warnings

from digits import Classifier, Digits, show
from lightning.pytorch import Trainer, seed_everything

from lightning_plugins.callbacks import SpectrumMonitor, StableRankRegularization
from lightning_plugins.compression import factorize
from lightning_plugins.plots import layer_spectra_figure

STEPS = int(os.environ.get("EXAMPLE_STEPS", "460"))  # twenty epochs; the tests set 2
LAYERS = "net.layer*"  # globs take the convolutions and linear layers among what they match
RANK = 0.25  # of the smaller side of every weight
warnings.filterwarnings("ignore", module="lightning")  # about loaders without workers, which memory does not need
settings = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_model_summary": False}

# %% [markdown]
# ## The lines to add
#
# The penalty is the modified stable rank: the sum of the singular values behind the rank, divided by that of those
# before it. It does not depend on the scale of a weight, so weight decay stays on. Every fourth step carries it, four
# times as strong.


# %%
def fit(weight: float | None) -> tuple[dict[str, float], SpectrumMonitor]:
    """Accuracy as trained and factorised, and what the monitor saw."""
    seed_everything(0, verbose=False)
    monitor = SpectrumMonitor(LAYERS, every_n_steps=115, figures=False)
    callbacks = [monitor]
    if weight is not None:
        callbacks.append(StableRankRegularization(LAYERS, weight=weight, rank=RANK, every_n_steps=4))
    trainer = Trainer(max_epochs=20, max_steps=STEPS, callbacks=callbacks, **settings)
    model, data = Classifier(), Digits()
    trainer.fit(model, data.train_dataloader())
    small = factorize(copy.deepcopy(model), RANK, LAYERS)
    accuracies = {}
    for name, network in {"as trained": model, "factorised": small}.items():
        (metrics,) = Trainer(**settings).validate(network, data.val_dataloader(), verbose=False)
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
# The singular values behind the rank are gone.

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
