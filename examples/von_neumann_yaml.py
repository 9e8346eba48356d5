# %% [markdown]
# # The same training from a YAML file
#
# Every argument of the callbacks, schedules included, can be written in the file of a `LightningCLI`. In a project of
# your own the file is all that changes: `python main.py fit --config von_neumann_yaml.yaml`.
#
# **Claim**: the file and the same callbacks written in Python train the same weights, bit for bit.

# %%
import os
import warnings
from pathlib import Path

import torch
from digits import Classifier, Digits
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.cli import LightningCLI

from lightning_plugins.callbacks import RepresentationMonitor, VNERegularization
from lightning_plugins.schedules import Warmup

STEPS = int(os.environ.get("EXAMPLE_STEPS", "138"))  # six epochs; the tests set 2
warnings.filterwarnings("ignore", module="lightning")  # about loaders without workers, which memory does not need
here = Path(__file__).parent if "__file__" in globals() else Path()
config = here / "von_neumann_yaml.yaml"

# %%
print(config.read_text())

# %% [markdown]
# ## From the file
#
# `args` stands for what would be typed after `python main.py`; what stands after `--config` overrides the file.

# %%
arguments = ["fit", f"--config={config}", f"--trainer.max_steps={STEPS}"]
cli = LightningCLI(Classifier, Digits, args=arguments, save_config_callback=None)

# %% [markdown]
# ## In Python

# %%
seed_everything(0)
callbacks = [
    VNERegularization(layers="net.fc:input", weight=0.1, schedule=Warmup(0.2, unit="fraction")),
    RepresentationMonitor(layers=["net.fc:input"], figures=False),
]
trainer = Trainer(
    accelerator="cpu",
    max_epochs=6,
    max_steps=STEPS,
    callbacks=callbacks,
    logger=False,
    enable_checkpointing=False,
    enable_model_summary=False,
)
model = Classifier(name="test_resnet", lr=2e-3)
trainer.fit(model, datamodule=Digits(batch_size=64))

# %%
for name, value in sorted(cli.trainer.callback_metrics.items()):
    print(f"{name:45} {value:8.3f} file {trainer.callback_metrics[name]:8.3f} Python")

# %% [markdown]
# ## The claim

# %%
from_file = cli.model.state_dict()
assert all(torch.equal(value, from_file[name]) for name, value in model.state_dict().items())
