"""Penalties that lower the rank of weights, here and torchao's pruning-aware training (PAT): time, values, accuracy.

Three parts. PAT's proximal map of the nuclear norm on a weight beside `singular_value_threshold`, in float64. The CPU
time that each adds to an optimizer step for all weights of a ResNet-18. And digits, classified by a perceptron whose
weights are truncated after training without penalty, with one here, and with PAT's, to the same ranks and without
further training; strengths are chosen by the truncated network's accuracy on a seed that is not reported.

    python benchmarks/other_penalties.py     # docs/benchmarks/other_penalties.md
"""

import argparse
import copy
import logging
import statistics
import time
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from _report import describe_machine, markdown_table, mean_and_interval
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from torchao.prototype.pat.group import SVDGrouper
from torchao.prototype.pat.optim import ProxNuclearNorm, PruneOptimizer

from lightning_plugins.callbacks import LowRankCompression, StableRankRegularization, Timing, WeightRegularization
from lightning_plugins.compression import equal_ratio, factorize
from lightning_plugins.functional import singular_value_threshold
from lightning_plugins.regularizers import NuclearNorm

PAGE = Path(__file__).parents[1] / "docs" / "benchmarks" / "other_penalties.md"
BUDGETS = (0.15, 0.08)
LAYERS = ("0", "2")  # of the perceptron; its last layer has ten rows and stays
EPOCHS, TRAIN, BATCH = 40, 600, 100
QUIET = dict.fromkeys(("logger", "enable_checkpointing", "enable_model_summary", "enable_progress_bar"), False)
TEXT = """# Penalties on the rank of weights, beside torchao's PAT

`python benchmarks/other_penalties.py`: {machine}; torchao {version}.

**Values.** PAT's proximal map of the nuclear norm and `singular_value_threshold` differ by {distance:.0e} of the norm
of the weight, in float64 at a threshold amid the singular values.

**Time** of an optimizer step that is added to plain SGD, for all weights of a ResNet-18; a step of 32 images of 224
times 224 pixels takes {step:.1f} CPU seconds. Medians of {repeats}. PAT can apply its map at every n-th step
(`prox_freq`), the callbacks here theirs (`every_n_steps`); neither does so here.

{times}

**Accuracy of the truncated network.** Perceptron 64-256-256-10 on digits, {train} training images, {epochs} epochs; the
weights of its first two layers are truncated to equal shares, without further training, but for `LowRankCompression`,
which truncates them after half of the training. Each strength is the best of its grid for the truncated network on a
further seed. Intervals are 95 % over {seeds} training seeds; differences are paired by seed.

{accuracies}

PAT's constraint on the rank projects each weight at every step, so its networks lose nothing when truncated. Its rows
are those of manual optimization. Lightning's automatic optimization passes the forward and backward pass to the
optimizer as a closure, which PAT's wrapper calls after it has put the weights without projection back: nothing is then
trained for the projection ("automatic optimization").

What PAT does better: penalties for sparsity, of elements, channels, filters and heads, beside those for the rank;
constraints that are met exactly; groups of parameters with options of their own. It works outside Lightning.
"""


class Perceptron(LightningModule):
    """A classifier of the digits; `wrap` makes its optimizer another."""

    def __init__(self, wrap: Callable[[nn.Module], Any] | None = None, automatic: bool = True) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10)
        )  # fmt: skip
        self.wrap = wrap

        self.automatic_optimization = automatic

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self.net(batch[0]), batch[1])
        if not self.automatic_optimization:
            optimizer = self.optimizers(use_pl_optimizer=False)
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
        return loss

    def configure_optimizers(self) -> Any:
        return self.wrap(self.net) if self.wrap else sgd(self.net.parameters())


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=1e-4)


def matrices(net: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in net.parameters() if parameter.ndim > 1]


def with_pat(net: nn.Module, groups: list[dict[str, Any]], strength: float) -> PruneOptimizer:
    """SGD in which each group has one of PAT's maps of singular values."""
    taken = {id(one) for group in groups for one in group["params"]}
    others = [parameter for parameter in net.parameters() if id(parameter) not in taken]
    return PruneOptimizer(sgd([*groups, {"params": others}]), reg_lambda=strength)


def pat_nuclear(net: nn.Module, weights: list[nn.Parameter], strength: float) -> PruneOptimizer:
    group = {"params": weights, "prox_type": "ProxNuclearNorm", "group_type": "SVDGrouper"}
    return with_pat(net, [group], strength)


def pat_rank(net: nn.Module, ranks: dict[str, int]) -> PruneOptimizer:
    groups = []
    for name, rank in ranks.items():
        weight = net.get_submodule(name).weight
        share = 1 - rank / min(weight.shape)
        kind = {"prox_type": "MinRankConstraint", "group_type": "SVDGrouper", "min_sparsity": share}
        groups.append({"params": [weight], **kind})
    return with_pat(net, groups, 0.0)


class Method(NamedTuple):
    """A penalty: its callback here or its optimizer of PAT, the strengths to choose from, and who calls the step."""

    callback: Callable[[dict[str, int], float], Callback] | None
    optimizer: Callable[[nn.Module, dict[str, int], float], Any] | None
    strengths: tuple[float, ...]
    automatic: bool = True


METHODS = {
    "no penalty": Method(None, None, (0.0,)),
    "here: `StableRankRegularization`, p=1": Method(
        lambda ranks, strength: StableRankRegularization(list(ranks), weight=strength, rank=ranks, p=1), None,
        (0.1, 0.3, 1.0, 3.0, 10.0),
    ),
    "here: `NuclearNorm`": Method(
        lambda ranks, strength: WeightRegularization(list(ranks), NuclearNorm(), weight=strength), None,
        (3e-3, 1e-2, 3e-2, 0.1, 0.3),
    ),
    "here: `LowRankCompression`": Method(
        lambda ranks, strength: LowRankCompression(
            list(ranks), ranks=ranks, penalty=strength, timing=Timing(search_at=0.0, factorize_at=0.5), figures=False
        ),
        None,
        (0.0, 0.1, 1.0, 10.0),
    ),
    "PAT: `ProxNuclearNorm`": Method(
        None,
        lambda net, ranks, strength: pat_nuclear(net, [net.get_submodule(name).weight for name in ranks], strength),
        (3e-3, 1e-2, 3e-2, 0.1, 0.2),
        automatic=False,
    ),
    "PAT: `MinRankConstraint`": Method(
        None, lambda net, ranks, strength: pat_rank(net, ranks), (0.0,), automatic=False
    ),
    "PAT: the same, automatic optimization": Method(
        None, lambda net, ranks, strength: pat_rank(net, ranks), (0.0,)
    ),
}  # fmt: skip


def digits(seed: int) -> tuple[TensorDataset, TensorDataset]:
    images, labels = map(torch.tensor, load_digits(return_X_y=True))
    images = images.float() / 8 - 1
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    train, test = (TensorDataset(images[part], labels[part]) for part in (order[:TRAIN], order[TRAIN:]))
    return train, test


def accuracy(net: nn.Module, test: TensorDataset) -> float:
    images, labels = test.tensors
    with torch.no_grad():
        return 100 * float((net(images).argmax(1) == labels).float().mean())


def trained(method: Method, strength: float, budget: float, seed: int) -> tuple[float, float]:
    """Accuracy in percent before and after truncation."""
    train, test = digits(seed)
    seed_everything(seed, verbose=False)
    model = Perceptron(automatic=method.automatic)
    ranks = dict(equal_ratio(model.net, budget=budget, layers=LAYERS).ranks)
    if method.optimizer is not None:
        make = method.optimizer
        model.wrap = lambda net: make(net, ranks, strength)
    layers = {f"net.{name}": rank for name, rank in ranks.items()}
    callbacks = [method.callback(layers, strength)] if method.callback else []
    trainer = Trainer(accelerator="cpu", max_epochs=EPOCHS, callbacks=callbacks, **QUIET)
    trainer.fit(model, DataLoader(train, BATCH, shuffle=True))
    whole = all(isinstance(model.net.get_submodule(name), nn.Linear) for name in ranks)
    small = factorize(copy.deepcopy(model.net), ranks) if whole else model.net  # it may be small already
    return accuracy(model.net, test), accuracy(small, test)


def accuracies(seeds: int) -> str:
    rows = []
    for budget in BUDGETS:
        found, whole, chosen = {}, {}, {}
        for name, method in METHODS.items():
            scores = {strength: trained(method, strength, budget, 0)[1] for strength in method.strengths}
            chosen[name] = max(scores, key=lambda strength: scores[strength])
            pairs = [trained(method, chosen[name], budget, seed) for seed in range(1, seeds + 1)]
            whole[name], found[name] = [list(values) for values in zip(*pairs, strict=True)]
            print(budget, name, scores, pairs, flush=True)
        ours = found["here: `LowRankCompression`"]
        for name, scores in found.items():
            differences = [mine - score for mine, score in zip(ours, scores, strict=True)]
            lead = "" if scores is ours else mean_and_interval(differences, 1)
            row = [name, f"{budget:g}", f"{chosen[name]:g}" if len(METHODS[name].strengths) > 1 else ""]
            rows.append([*row, mean_and_interval(whole[name], 1), mean_and_interval(scores, 1), lead])
    header = ["training", "weights left", "strength", "accuracy before", "after truncation", "low rank minus it"]
    return markdown_table(header, rows)


def distance() -> float:
    weight = torch.randn(48, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    threshold = float(torch.linalg.svdvals(weight).median())
    found = nn.Parameter(weight.clone())
    with torch.no_grad(), SVDGrouper(found) as grouper:
        ProxNuclearNorm(threshold).apply_(grouper.p, 1.0)
    return float((found - singular_value_threshold(weight, threshold)).norm() / weight.norm())


class OfOptimizerStep(Callback):
    """CPU seconds from the end of the backward pass to the next batch."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.begin = time.process_time()

    def on_train_batch_end(self, *_: Any) -> None:
        self.seconds.append(time.process_time() - self.begin)


class ResNet(Perceptron):
    """The same with a ResNet-18 on noise of little resolution, since only the optimizer's step is timed."""

    def __init__(self, wrap: Callable[[nn.Module], Any] | None) -> None:
        super().__init__(wrap)
        self.net = timm.create_model("resnet18")


def step_seconds() -> float:
    """CPU seconds of forward and backward."""
    net, images = timm.create_model("resnet18"), torch.randn(32, 3, 224, 224)
    seconds = []
    for _ in range(3):
        begin = time.process_time()
        net(images).logsumexp(1).sum().backward()
        seconds.append(time.process_time() - begin)
    return min(seconds)


def times(repeats: int) -> str:
    forms: dict[str, tuple[list[Callback], Callable[[nn.Module], Any] | None]] = {
        "SGD alone": ([], None),
        "here: `StableRankRegularization`": ([StableRankRegularization("*", weight=1e-3)], None),
        "here: the same, p=2, a quarter of the rank": (
            [StableRankRegularization("*", weight=1e-3, rank=0.25, p=2)],
            None,
        ),
        "here: the same, p=1": ([StableRankRegularization("*", weight=1e-3, rank=0.25, p=1)], None),
        "here: `NuclearNorm`": ([WeightRegularization("*", NuclearNorm(), weight=1e-4)], None),
        "PAT: `ProxNuclearNorm`": ([], lambda net: pat_nuclear(net, matrices(net), 1e-4)),
    }
    images, labels = torch.randn(2, 3, 64, 64), torch.randint(1000, (2,))
    found = {}
    for name, (callbacks, wrap) in forms.items():
        timer = OfOptimizerStep()
        trainer = Trainer(accelerator="cpu", max_epochs=1, callbacks=[timer, *callbacks], **QUIET)
        trainer.fit(ResNet(wrap), DataLoader([(images, labels)] * (repeats + 3), batch_size=None))
        found[name] = statistics.median(timer.seconds[3:])
        print(name, found[name], flush=True)
    plain = found.pop("SGD alone")
    return markdown_table(
        ["term on all weights", "CPU seconds"], [[name, f"{one - plain:.2f}"] for name, one in found.items()]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=7, help="timed optimizer steps")
    parser.add_argument("--page", type=Path, default=PAGE)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    text = TEXT.format(
        machine=describe_machine("cpu"), version=version("torchao"), distance=distance(), step=step_seconds(),
        repeats=options.repeats, times=times(options.repeats), accuracies=accuracies(options.seeds), train=TRAIN,
        epochs=EPOCHS, seeds=options.seeds,
    )  # fmt: skip
    options.page.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
