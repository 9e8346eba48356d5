"""Time of the beam search over ranks compared with the naive search, at an equal result.

    python benchmarks/beam_search.py            # a small ResNet trained on the digits
    python benchmarks/beam_search.py --steps    # also the effect of the step size on score and time

The naive search creates the children of every beam member, including duplicates; decomposes the weights of each child's
layers, and runs the network on all batches. Both searches keep the same children, which is checked.
"""

import argparse
import sys
import time
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import torch
from _report import describe_machine, markdown_table
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from digits import Classifier, Digits

from lightning_plugins.compression import BeamOptions, RankSearch, beam_search, layer_costs, score_ranks, truncated
from lightning_plugins.compression.rank_search.selection import energy_threshold, equal_ratio, trade_off

Batch = tuple[Tensor, Tensor]
Ranks = tuple[int, ...]


def train(epochs: int, held_out: int) -> tuple[nn.Module, list[Batch], Batch]:
    """The network, trained without the last part of the training data; that part in batches; the validation data."""
    torch.manual_seed(0)
    data, net = Digits(), Classifier().net
    images, labels = data.train.tensors
    fit, kept = (images[:-held_out], labels[:-held_out]), (images[-held_out:], labels[-held_out:])
    steps = epochs * (len(fit[0]) // 64)
    optimizer = torch.optim.AdamW(net.parameters(), 4e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    for _ in range(epochs):
        for rows in torch.randperm(len(fit[0]))[: len(fit[0]) // 64 * 64].split(64):
            optimizer.zero_grad()
            F.cross_entropy(net(fit[0][rows]), fit[1][rows]).backward()
            optimizer.step()
            schedule.step()
    return net.eval(), list(zip(kept[0].split(32), kept[1].split(32), strict=True)), data.val.tensors


def hits(net: nn.Module, batch: Batch) -> tuple[Tensor, int]:
    images, labels = batch
    return (net(images).argmax(1) == labels).sum(), len(labels)


class Naive:
    """The straightforward search, with the same selection rules."""

    def __init__(self, net: nn.Module, batches: list[Batch], ratio: float, width: int, step: float) -> None:
        self.net, self.batches, self.ratio, self.width = net, batches, ratio, width
        self.costs = layer_costs(net)
        self.dense = sum(cost.dense for cost in self.costs.values())
        self.steps = [max(1, round(step * self.dense / cost.per_rank)) for cost in self.costs.values()]
        self.energy = [
            torch.linalg.svdvals(net.get_submodule(n).weight.detach().flatten(1)).double().square() for n in self.costs
        ]
        self.evaluations = 0
        self.decomposing = 0.0

    def removed(self, ranks: Ranks) -> float:
        return (self.dense - sum(c.at(r) for c, r in zip(self.costs.values(), ranks, strict=True))) / self.dense

    @torch.no_grad()
    def evaluate(self, ranks: Ranks) -> float:
        self.evaluations += 1
        begin = time.process_time()
        copy = deepcopy(self.net)
        for name, rank in zip(self.costs, ranks, strict=True):
            layer = copy.get_submodule(name)
            if rank < min(layer.weight.flatten(1).shape):
                layer.weight.copy_(truncated(layer, rank))
        self.decomposing += time.process_time() - begin
        return sum(int(hits(copy, batch)[0]) for batch in self.batches) / sum(len(y) for _, y in self.batches)

    def order(self, one: tuple[Ranks, float]) -> tuple[float, float, Ranks]:
        lost = sum(float(e[rank:].sum() / e.sum()) for e, rank in zip(self.energy, one[0], strict=True))
        return -one[1], round(lost, 9), one[0]

    def child(self, parent: Ranks, layer: int) -> Ranks:
        lowest = max(parent[layer] - self.steps[layer], 1)
        for rank in range(parent[layer] - 1, lowest, -1):
            if self.removed(child := (*parent[:layer], rank, *parent[layer + 1 :])) >= self.ratio:
                return child
        return (*parent[:layer], lowest, *parent[layer + 1 :])

    def search(self) -> tuple[Ranks, float]:
        start = tuple(cost.break_even or cost.full_rank for cost in self.costs.values())
        beam, finished = [(start, self.evaluate(start))], {}
        while beam:
            scored = {}
            for parent, _ in beam:
                for layer, (rank, cost) in enumerate(zip(parent, self.costs.values(), strict=True)):
                    if 1 < rank <= cost.break_even:
                        child = self.child(parent, layer)
                        scored[child] = self.evaluate(child)
            finished |= {ranks: score for ranks, score in scored.items() if self.removed(ranks) >= self.ratio}
            beam = sorted((one for one in scored.items() if one[0] not in finished), key=self.order)[: self.width]
        return min(finished.items(), key=self.order)


def timed(search: Callable[[], Any]) -> tuple[float, Any]:
    begin = time.process_time()
    result = search()
    return time.process_time() - begin, result


def evaluation_seconds(net: nn.Module, batches: list[Batch]) -> float:
    """One evaluation of the network on all batches, median of five."""
    with torch.no_grad():
        return sorted(timed(lambda: [hits(net, batch) for batch in batches])[0] for _ in range(5))[2]


def compare(net: nn.Module, batches: list[Batch], ratio: float, width: int, step: float) -> None:
    one = evaluation_seconds(net, batches)
    rows, results = [], []
    variants: dict[str, dict[str, Any]] = {
        "one decomposition, no child twice": {"reuse_activations": False},
        "and activations reused": {},
        "and hopeless children given up": {"bounds": (0, 1)},
    }
    for name, options in variants.items():
        of_this = BeamOptions(width=width, step=step, **options)
        seconds, found = timed(
            lambda of_this=of_this: beam_search(net, batches, hits, budget=1 - ratio, options=of_this)
        )
        results.append(found)
        rows.append((name, seconds, found.evaluations))
    naive = Naive(net, batches, ratio, width, step)
    seconds, (ranks, score) = timed(naive.search)
    rows.insert(0, ("naive", seconds, naive.evaluations))
    for found in results:
        assert (tuple(found.ranks.values()), found.score) == (ranks, score), (found, ranks, score)
    header = ["search", "seconds", "children scored", "evaluations' worth", "times faster"]
    table = [
        [name, f"{taken:.1f}", str(count), f"{taken / one:.0f}", f"{seconds / taken:.1f}"]
        for name, taken, count in rows
    ]
    found = results[-1]
    print(f"ratio {ratio}, width {width}, step {step}, {len(naive.costs)} layers, {len(batches)} batches of 32:")
    print(f"one evaluation takes {one * 1e3:.0f} ms; the naive search decomposes for {naive.decomposing:.1f} s.\n")
    print(markdown_table(header, table))
    given_up = sum(level.abandoned for level in found.trace)
    print(
        f"\nEqual result: score {score:.4f}, removed {1 - found.share:.4f}; "
        f"given up {given_up} of {found.evaluations}.\n"
    )


def compare_steps(net: nn.Module, batches: list[Batch], validation: Batch) -> None:
    rows = []

    def add(name: str, ratio: float, select: Callable[[], RankSearch]) -> None:
        seconds, found = timed(select)
        scores = [score_ranks(net, found.ranks, data, hits) for data in (batches, [validation])]
        rows.append(
            [name, str(ratio), f"{1 - found.share:.4f}", *(f"{score:.4f}" for score in scores), f"{seconds:.1f}"]
        )

    for ratio in (0.3, 0.5):
        for step in (2, 8, 0.02, 0.05):
            settings = {"budget": 1 - ratio, "step": step, "bounds": (0, 1), "width": 2}
            add(f"beam, step {step}", ratio, partial(beam_search, net, batches, hits, **settings))
        for rule in (equal_ratio, energy_threshold, trade_off):
            add(rule.__name__, ratio, partial(rule, net, budget=1 - ratio))
    print(markdown_table(["selection", "ratio", "removed", "held-out score", "validation score", "seconds"], rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ratio", type=float, default=0.4)
    parser.add_argument("--width", type=int, default=3)
    parser.add_argument("--step", type=float, default=0.1)
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--held-out", type=int, default=480)
    parser.add_argument("--steps", action="store_true", help="also compare sizes of steps, and the baselines")
    options = parser.parse_args()
    torch.set_num_threads(1)  # CPU times; the processor may be shared
    print(f"{describe_machine('cpu')}.\n", flush=True)
    net, batches, validation = train(options.epochs, options.held_out)
    dense = score_ranks(net, {"fc": 10}, [validation], hits)
    print(f"test_resnet on the digits, dense: validation score {dense:.4f}.\n", flush=True)
    compare(net, batches, options.ratio, options.width, options.step)
    if options.steps:
        compare_steps(net, batches, validation)


if __name__ == "__main__":
    main()
