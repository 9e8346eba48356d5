# %% [markdown]
# # Search this suite's own knobs
#
# Should the entropy of a representation be raised or lowered, at which layer, and how strongly? B2EA tunes three
# parameters of `VNERegularization` and the learning rate on few labelled digits, with early termination of unpromising
# runs.
#
# **Claim**: from ranges over three powers of ten, the search result is within a point of a learning rate tuned without
# the term. It does not show that the term helps here: on these digits the learning rate is what matters.

# %%
# %pip install --quiet 'lightning-plugins[lightning,search,plots,cli]'

# %%
import os
import tempfile
import warnings
from pathlib import Path

import optuna
import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from rich.console import Console
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_plugins.callbacks import EarlyTermination, VNERegularization
from lightning_plugins.plots import arms_figure, regret_figure
from lightning_plugins.search import B2EASampler, TercetPruner, origins, tune

STEPS = int(os.environ.get("EXAMPLE_STEPS", "24"))  # trials; the tests set 2
EPOCHS = 12 if STEPS > 2 else 2
warnings.filterwarnings("ignore")
optuna.logging.set_verbosity(optuna.logging.WARNING)

# %% [markdown]
# ## An ordinary module and data: 200 labelled digits


# %%
class Net(LightningModule):
    def __init__(self, lr: float) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU())
        self.fc = nn.Linear(64, 10)
        self.lr = lr

    def forward(self, x):
        return self.fc(self.body(x))

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val_accuracy", (self(batch[0]).argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=self.lr)


digits = load_digits()
order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(0))
x, y = torch.tensor(digits.data[order] / 16, dtype=torch.float32), torch.tensor(digits.target[order])
train, val = TensorDataset(x[:200], y[:200]), TensorDataset(x[200:800], y[200:800])


def fit(lr: float, callbacks: list, folder: Path) -> float:
    trainer = Trainer(
        max_epochs=EPOCHS,
        accelerator="cpu",
        logger=False,
        callbacks=callbacks,
        default_root_dir=folder,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Net(lr), DataLoader(train, 40, shuffle=True), DataLoader(val, 600))
    return float(trainer.callback_metrics["val_accuracy"])


# %% [markdown]
# ## The search


# %%
def objective(trial: optuna.Trial, folder: Path) -> float:
    lr = trial.suggest_float("lr", 1e-4, 1e-1, log=True)
    layer = trial.suggest_categorical("layer", ["body.1", "body.3", "fc"])
    weight = trial.suggest_categorical("sign", [-1, 1]) * trial.suggest_float("strength", 1e-3, 0.5, log=True)
    early = EarlyTermination("val_accuracy", trial=trial)
    accuracy = fit(lr, [VNERegularization(layer, weight), early], folder)
    early.raise_if_ended()
    return accuracy


folder = Path(tempfile.mkdtemp())
result = tune(
    objective,
    STEPS,
    directory=folder / "search",
    direction="maximize",
    sampler=B2EASampler(seed=0),
    pruner=TercetPruner(EPOCHS),
)
Console(width=120).print(result.table(8))

# %%
seed_everything(0, verbose=False)
bare = max(fit(lr, [], folder) for lr in (1e-3, 3e-3, 1e-2, 3e-2)[: 4 if STEPS > 2 else 1])
print(f"without the term, the best of four learning rates: {bare:.3f}; found: {result.best_value:.3f}")

# %%
complete = [trial.value for trial in result.study.trials if trial.value is not None]
best_so_far = torch.tensor(complete).cummax(0).values
figures = {"search_error.png": regret_figure({"B2EA": [(1 - best_so_far).tolist()]}, ylabel="error of the best so far")}
if rows := origins(result.study):
    figures["search_arms.png"] = arms_figure(rows, direction="maximize")
for name, figure in figures.items():
    figure.savefig(folder / name)
    print(f"figure: {folder / name}")

# %%
assert STEPS < 24 or result.best_value >= bare - 0.01  # the claim
