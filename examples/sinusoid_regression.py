# %% [markdown]
# # Adapt to a sinusoid from five samples
#
# Every task is a sinusoid with its own amplitude and phase. MAML learns initial weights from which a few gradient steps
# on five samples fit it. Meta-SGD additionally learns a rate for every weight, approximate GAP one for every row of a
# layer's gradient, and GAP one for each of its ordered singular values.
#
# All four train on the same tasks, with one inner step, in a plain loop: `InnerLoop` is an ordinary module.
#
# **Claim**: with the same training, GAP's error on 600 new tasks is below MAML's by more than both intervals, after ten
# steps. The benchmark page on sinusoids has runs with five inner steps, and with more samples.

# %%
# %pip install --quiet 'lightning-plugins[plots]'

# %%
import math
import os
import tempfile
from pathlib import Path

import torch
from torch import nn

from lightning_plugins.meta import GAP, ApproximateGAP, Identity, InnerLoop, MetaSGD, Sinusoid
from lightning_plugins.metrics import AdaptationCurve
from lightning_plugins.plots import adaptation_figure, gains_figure

STEPS = int(os.environ.get("EXAMPLE_STEPS", "10000"))  # of the outer optimizer, 25 tasks each; the tests set 2
SHOTS, INNER_STEPS, TEST_STEPS = 5, 1, 10
torch.set_num_threads(1)  # the network is too small for more


def show(figure, name):
    """Write the figure to a file, and show it in a notebook."""
    path = Path(tempfile.gettempdir()) / f"{name}.png"
    figure.savefig(path)
    print(f"figure: {path}")
    if "get_ipython" in globals():
        from IPython.display import Image, display

        display(Image(path))


# %% [markdown]
# ## The tasks and the methods
#
# `linear=True` adds gains to linear layers. The gradient of a layer applied to five samples has rank at most five,
# which makes the decomposition small.

# %%
train_tasks, test_tasks = Sinusoid(SHOTS, queries=15), Sinusoid(SHOTS, queries=100)
METHODS = {
    "MAML": Identity(),
    "approximate GAP": ApproximateGAP(linear=True),
    "GAP": GAP(linear=True, derivative="exact", rank=SHOTS),
    "Meta-SGD": MetaSGD(),
}

# %% [markdown]
# ## Training
#
# Two learning rates, both annealed. With more inner steps, clipping the outer gradient is essential: occasionally its
# norm is a million times larger than usual, and Adam then hardly moves for a long time.


# %%
def train(preconditioner: nn.Module) -> InnerLoop:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(1, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 1))
    loop = InnerLoop(network, nn.functional.mse_loss, preconditioner, steps=INNER_STEPS, learning_rate=0.01)
    groups = [{"params": network.parameters(), "lr": 4e-3}]
    if learned := list(preconditioner.parameters()):
        groups.append({"params": learned, "lr": 2e-2})
    optimizer = torch.optim.Adam(groups)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    generator = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        episodes = loop(*train_tasks.sample(25, generator))
        optimizer.zero_grad()
        episodes.loss.backward()
        if math.isfinite(nn.utils.clip_grad_norm_(loop.parameters(), 2.0)):
            optimizer.step()
        schedule.step()
    return loop


loops = {name: train(preconditioner) for name, preconditioner in METHODS.items()}

# %% [markdown]
# ## The effect of each step
#
# The mean squared error on new tasks after every inner step, with more steps than in training. For Meta-SGD only one
# step is shown: the rates learned for one step are so large that the error diverges after it.


# %%
def curve(loop: InnerLoop, steps: int) -> tuple[torch.Tensor, torch.Tensor]:
    metric = AdaptationCurve(steps)
    losses, _ = loop.curve(*test_tasks.sample(600, torch.Generator().manual_seed(2)), steps=steps)
    metric.update(losses)
    return metric.compute()


curves = {name: curve(loop, INNER_STEPS if name == "Meta-SGD" else TEST_STEPS) for name, loop in loops.items()}
for name, (mean, half) in curves.items():
    print(f"{name:16} {mean[-1]:.3f} ± {half[-1]:.3f} after {len(mean) - 1} steps")
figure = adaptation_figure(
    curves, ylabel="mean squared error", trained_steps=INNER_STEPS, log=True, title="A sinusoid from five samples"
)
show(figure, "sinusoid_regression")

# %% [markdown]
# ## The learned gains
#
# The gains of the second layer correspond to its gradient's singular values, largest first, of which five samples give
# five. The outer layers have one singular value, so their gain acts as a learning rate.

# %%
gains = {f"layer {number}": gain[:SHOTS] for number, gain in enumerate(loops["GAP"].preconditioner.gains().values(), 1)}
show(gains_figure(gains, title="Gains that GAP learned"), "sinusoid_regression_gains")

# %% [markdown]
# ## The claim

# %%
if STEPS >= 10000:
    (maml, maml_half), (gap, gap_half) = ((mean[-1], half[-1]) for mean, half in (curves["MAML"], curves["GAP"]))
    assert gap + gap_half < maml - maml_half
