# %% [markdown]
# # Adapting a vision transformer to characters it has never seen
#
# A small vision transformer must distinguish five unknown characters from five examples of each. Across many such tasks
# MAML learns initial weights from which a few gradient steps suffice. Its gradient passes through these steps, which
# needs second derivatives that fused attention kernels do not have: inner steps therefore compute attention with
# elementary operations, automatically.
#
# Three runs with the same budget: all weights adapt; only low-rank adapters do, while the rest of the network learns
# across tasks; and all weights adapt with the gradient preconditioned by GAP.
#
# The characters come from the fonts shipped with matplotlib: nothing is downloaded.
#
# **Claim**: with `layers="*adapter"` only the adapters change in inner steps, and yet every weight learns across tasks.
# The accuracies are printed, without and with adaptation; such short training does not rank the methods.

# %%
# %pip install --quiet 'lightning-plugins[lightning,plots]'

# %%
import os
import tempfile
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer, seed_everything
from torch import Tensor, nn

from lightning_plugins.data import EpisodeCounts, EpisodicDataModule
from lightning_plugins.meta import GAP, GlyphFewShot
from lightning_plugins.metrics import AdaptationCurve, FewShotAccuracy, FewShotAccuracyInterval
from lightning_plugins.mixins import InnerSettings, MAMLMixin
from lightning_plugins.plots import adaptation_figure

STEPS = int(os.environ.get("EXAMPLE_STEPS", "150"))  # batches of four tasks; the tests set 2
SHORT = STEPS < 150
warnings.filterwarnings("ignore", module="lightning")  # about loaders without workers, which memory does not need


def show(figure, name):
    """Write the figure to a file, and show it in a notebook."""
    path = Path(tempfile.gettempdir()) / f"{name}.png"
    figure.savefig(path)
    print(f"figure: {path}")
    if "get_ipython" in globals():
        from IPython.display import Image, display

        display(Image(path))


# %% [markdown]
# ## The network
#
# Sixteen patches of 7 x 7 pixels, two attention blocks. A layer with an adapter adds the output of a product of two
# thin matrices; the second one starts at zero. (With `peft` the layers are those created by `get_peft_model`.)


# %%
class Adapted(nn.Linear):
    def __init__(self, inputs: int, outputs: int, rank: int = 4) -> None:
        super().__init__(inputs, outputs)
        self.adapter = nn.Sequential(nn.Linear(inputs, rank, bias=False), nn.Linear(rank, outputs, bias=False))
        nn.init.zeros_(self.adapter[1].weight)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.adapter(x)


class Block(nn.Module):
    def __init__(self, width: int, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = Adapted(width, 3 * width), Adapted(width, width)
        self.mlp = nn.Sequential(Adapted(width, 2 * width), nn.GELU(), Adapted(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(self.before(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(query, key, value)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.mlp(self.between(x))


class SmallViT(nn.Module):
    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.patches = nn.Linear(49, width)
        self.places = nn.Parameter(0.02 * torch.randn(16, width))
        self.blocks = nn.Sequential(Block(width), Block(width), nn.LayerNorm(width))
        self.head = Adapted(width, 5)

    def forward(self, images: Tensor) -> Tensor:
        patches = images.unfold(-2, 7, 7).unfold(-2, 7, 7).flatten(1, 3).flatten(2)
        return self.head(self.blocks(self.patches(patches) + self.places).mean(1))


# %% [markdown]
# ## Tasks and training
#
# `layers` selects the layers to adapt. Everything that requires a gradient learns across tasks, whether it adapts or
# not.

# %%
data = EpisodicDataModule(
    GlyphFewShot("train", ways=5, shots=5, queries=5),
    test=GlyphFewShot("test", ways=5, shots=5, queries=10),
    episodes=EpisodeCounts(train=4 * STEPS, test=8 if SHORT else 200, tasks_per_batch=4),
)
METHODS = {
    "all weights": {},
    "adapters": {"layers": "*adapter"},
    "all weights, GAP": {"preconditioner": GAP(linear=True), "preconditioner_learning_rate": 1e-2},
}


class FewShot(MAMLMixin, LightningModule):
    def __init__(self, layers=None, **settings) -> None:
        super().__init__(
            SmallViT(),
            F.cross_entropy,
            inner=InnerSettings(steps=3, evaluation_steps=5, learning_rate=0.1, layers=layers),
            learning_rate=2e-3,
            metrics={"accuracy": FewShotAccuracy(), "interval": FewShotAccuracyInterval()},
            **settings,
        )


models: dict[str, FewShot] = {}
starts: dict[str, dict[str, Tensor]] = {}
for name, settings in METHODS.items():
    seed_everything(0, verbose=False)
    models[name] = model = FewShot(**settings)
    starts[name] = {key: value.clone() for key, value in model.network.state_dict().items()}
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = Trainer(accelerator="cpu", max_epochs=1, enable_model_summary=False, gradient_clip_val=2.0, **quiet)
    trainer.fit(model, datamodule=data)
    accuracies = []
    for steps in (0, 5):
        model.evaluation_steps = steps
        (found,) = trainer.test(model, datamodule=data, verbose=False)
        accuracies.append(found["test/accuracy"])
    print(f"{name:18} {len(model.inner_loop.adapted):3} tensors adapt: accuracy without steps"
          f" {100 * accuracies[0]:.1f} %, after five {100 * accuracies[1]:.1f} %")  # fmt: skip

# %% [markdown]
# ## The effect of each step
#
# The accuracy on the query samples after every inner step, over test tasks; training used three.


# %%
@torch.no_grad()
def curve(model: LightningModule, steps: int = 8) -> tuple[Tensor, Tensor]:
    metric = AdaptationCurve(steps)
    for number, (support, query) in enumerate(data.test_dataloader()):
        if number == (2 if SHORT else 25):
            break
        _, outputs = model.inner_loop.curve(support, query, steps=steps)
        metric.update((outputs.argmax(-1) == query[1].unsqueeze(1)).double().mean(-1))
    return metric.compute()


curves = {name: curve(model) for name, model in models.items()}
show(adaptation_figure(curves, ylabel="accuracy", trained_steps=3, title="Five characters"), "adapt_vit_glyphs")

# %% [markdown]
# ## The claim
#
# The gradient of the query loss also reaches weights that do not adapt.

# %%
model, start = models["adapters"], starts["adapters"]
assert all("adapter" in name for name in model.inner_loop.adapted)
moved = [name for name, weight in model.network.state_dict().items() if not torch.equal(weight, start[name])]
print(f"{len(model.inner_loop.adapted)} tensors adapt, {len(moved)} of {len(start)} learned from task to task")
assert len(moved) == len(start)
