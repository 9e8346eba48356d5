"""Time saved by factorising a ResNet-18, compared with the FLOPs saved.

The network is factorised in several ways to several ratios (the fraction of the layers' FLOPs removed), and the dense
and all factorised networks run interleaved, so that drift of the machine's speed affects all equally. Weights are
random: only shapes matter. With one thread, CPU time is used, which other processes disturb less. The goal is that the
fraction of time saved is at least 0.6 of the fraction of FLOPs saved:
``1 - time_after / time_before >= 0.6 * (1 - operations_after / operations_before)``.

    python benchmarks/low_rank_latency.py            # 8 x 3 x 224 x 224, as many threads as there are cores
    python benchmarks/low_rank_latency.py --threads 1
"""

import argparse
import copy
import itertools
import statistics
import time
from collections.abc import Callable
from typing import Literal

import timm
import torch
from _report import describe_machine, markdown_table
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from lightning_plugins.compression import LayerCost, layer_costs
from lightning_plugins.compression.low_rank.layers import empty_low_rank_layer

PROMISE = 0.6
CHANNELS_LAST = ", channels last"


def ranks_for(costs: dict[str, LayerCost], ratio: float, multiple: int) -> dict[str, int]:
    """Ranks, the same fraction of every layer's break-even rank, that remove ``ratio`` of the cost.

    Ranks are rounded down to a multiple, if given.
    """
    dense = sum(cost.dense for cost in costs.values())
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        left = sum(cost.at(rounded(cost, middle, multiple)) for cost in costs.values())
        low, high = (middle, high) if left <= (1 - ratio) * dense else (low, middle)
    return {name: rounded(cost, low, multiple) for name, cost in costs.items() if cost.break_even >= 1}


def rounded(cost: LayerCost, fraction: float, multiple: int) -> int:
    rank = max(1, int(fraction * cost.break_even))
    return max(multiple, rank // multiple * multiple) if cost.break_even >= multiple else rank


def forms(dense: nn.Module, x: Tensor, ratios: list[float]) -> dict[str, tuple[nn.Module, Tensor]]:
    """The networks to compare, each with its input, by descriptive name."""
    found: dict[str, tuple[nn.Module, Tensor]] = {"dense": (dense, x)}
    for ratio, scheme, multiple in itertools.product(ratios, (1, 2), (1, 8, 16, 32)):
        costs = layer_costs(dense, cost="flops", inputs=x, scheme=scheme)
        name = f"{ratio:.0%}, scheme {scheme}, ranks in steps of {multiple}"
        found[name] = split(dense, ranks_for(costs, ratio, multiple), scheme), x
    last = torch.channels_last
    return found | {
        name + CHANNELS_LAST: (copy.deepcopy(model).to(memory_format=last), x.to(memory_format=last))
        for name, (model, _) in found.items()
    }


def split(dense: nn.Module, ranks: dict[str, int], scheme: Literal[1, 2]) -> nn.Module:
    """Factorise with random weights: many decompositions would take longer than the measurement."""
    small = copy.deepcopy(dense)
    for name, rank in ranks.items():
        pair = empty_low_rank_layer(small.get_submodule(name), rank, scheme=scheme)
        for parameter in pair.parameters():
            nn.init.normal_(parameter, std=0.02)
        parent, _, child = name.rpartition(".")
        setattr(small.get_submodule(parent), child, pair)
    return small


def operations(model: nn.Module, x: Tensor) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(x)
    return counter.get_total_flops()


def measure(networks: dict[str, tuple[nn.Module, Tensor]], rounds: int) -> dict[str, list[float]]:
    """Times of a forward pass in ms, all networks interleaved in every round, after a warm-up round."""
    times: dict[str, list[float]] = {name: [] for name in networks}
    with torch.inference_mode():
        for _ in range(rounds + 1):
            for name, (model, x) in networks.items():
                times[name].append(timed(lambda model=model, x=x: model(x)))
    return {name: found[1:] for name, found in times.items()}


def timed(run: Callable[[], object]) -> float:
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    begin = clock()
    run()
    return 1e3 * (clock() - begin)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet18", help="a network of timm")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--size", type=int, default=224, help="of the images, in pixels")
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.3, 0.5, 0.7])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    dense = timm.create_model(arguments.model).eval()
    x = torch.randn(arguments.batch, 3, arguments.size, arguments.size)
    networks = forms(dense, x, arguments.ratios)
    counts = {name: operations(*network) for name, network in networks.items()}
    times = measure(networks, arguments.rounds)
    rows = []
    for name, found in times.items():
        before = "dense" + CHANNELS_LAST * name.endswith(CHANNELS_LAST)
        median, base = statistics.median(found), statistics.median(times[before])
        fewer, faster = 1 - counts[name] / counts["dense"], 1 - median / base
        low, _, high = statistics.quantiles(found, n=4)
        kept = f"{faster / fewer:.2f}" if fewer else ""
        verdict = ("yes" if faster >= PROMISE * fewer else "no") if fewer else ""
        rows.append([name, f"{median:.1f}", f"{high - low:.1f}", f"{fewer:.1%}", f"{faster:.1%}", kept, verdict])
    print(f"{arguments.model}, {tuple(x.shape)}; {arguments.rounds} rounds\n{describe_machine('cpu')}\n")
    header = ["network", "ms", "spread", "fewer operations", "less time", "kept", f"kept >= {PROMISE}"]
    print(markdown_table(header, rows))


if __name__ == "__main__":
    main()
