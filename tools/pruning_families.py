"""Remove channels from one small model of every timm family, and compare the result with the prediction.

Nothing is downloaded. For each model the channel groups are found, random units of every group are masked, and the
network is shrunk. The smaller network must compute the same as the masked one, and its parameters and operations,
counted independently, must equal the budget's prediction. `--markdown` writes the table into docs/pruning.md.
"""

import argparse
import copy
import sys
import time
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
import torch_pruning
from compatibility_cases import TIMM, family, images, timm_task
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from lightning_plugins.compression import Budget, apply_masks, bake_masks, find_channel_groups, shrink
from lightning_plugins.compression.costs.layer_costs import run
from lightning_plugins.compression.networks.tracing import tensors_in

FAMILIES_WANTED, TOLERANCE, LARGEST = 30, 1e-4, 200_000_000
PAGE = Path(__file__).resolve().parents[1] / "docs" / "pruning.md"
HEAD = """# Which networks can lose channels

Written by `tools/pruning_families.py`: one small model of every family of timm {timm}, with random weights and the
dependencies found by Torch-Pruning {pruning}. A random third of the units of every group is removed. *Layers*
is the number of convolutions and linear layers that lose outputs, out of the total; *parameters* and *operations* are
those that remain, counted on the smaller network and exactly equal to the prediction of `Budget`; *difference* compares
the smaller network's outputs with those of the masked one, relative to the largest output.

Not pruned: the model's inputs and outputs, channels over which a layer or group norm computes its statistics (the
residual streams of most transformers), and channels mixed by an operation in a way that the graph does not show: every
group is verified before it is accepted.
"""


class Row(NamedTuple):
    family: str
    model: str
    groups: int = 0
    layers: str = ""
    parameters: str = ""
    operations: str = ""
    difference: str = ""
    problem: str = ""
    seconds: float = 0.0


def counted(model: nn.Module, inputs: Tensor) -> int:
    with FlopCounterMode(display=False) as counter:
        run(model, inputs)
    return counter.get_total_flops()


def settle(model: nn.Module) -> None:
    """Replace scales initialised with zeros, which would disable a whole branch."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.ndim <= 1 and not parameter.any():
            parameter.data.copy_(torch.rand(parameter.shape, generator=generator) * 0.5)


def shrunk_difference(model: nn.Module, groups: list[Any], kept: list[Tensor], inputs: Any) -> float:
    """Shrink a model, and return the relative difference of its outputs from the masked ones."""
    apply_masks(model, groups).set_kept(kept)
    expected = tensors_in(run(model, inputs))
    bake_masks(model)
    shrink(model, groups, kept)
    got = tensors_in(run(model, inputs))
    return max(float((one - other).abs().max() / one.abs().max()) for one, other in zip(expected, got, strict=True))


def try_model(name: str) -> Row:
    began = time.perf_counter()
    torch.manual_seed(0)
    model = timm_task(name).backbone.eval()
    size = sum(parameter.numel() for parameter in model.parameters())
    if size > LARGEST:
        return Row(family(name), name, problem=f"{size:,} parameters, of which several copies would not fit in memory")
    settle(model)
    inputs = images(name)[0][:2]
    search = find_channel_groups(model, inputs)
    weighted = [n for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.modules.conv._ConvNd)]
    row = Row(family(name), name, seconds=time.perf_counter() - began)
    if not search.groups:
        reasons = [reason for reason in search.refused.values() if "model's output" not in reason]
        return row._replace(problem=max(set(reasons), key=reasons.count) if reasons else "nothing but an output layer")
    groups = search.groups
    generator = torch.Generator().manual_seed(0)
    kept = [torch.randperm(group.size, generator=generator) >= max(1, group.size // 3) for group in groups]
    budgets = Budget(model, groups, target=1.0), Budget(model, groups, target=1.0, cost="flops", inputs=inputs)
    masked = copy.deepcopy(model)
    difference = shrunk_difference(masked, groups, kept, inputs)
    left = sum(parameter.numel() for parameter in masked.parameters()), counted(masked, inputs)
    wrong = [
        cost
        for cost, budget, real in zip(("parameters", "operations"), budgets, left, strict=True)
        if budget.cost(kept) != real
    ]
    problem = f"the budget's {' and '.join(wrong)} differ from the network's" if wrong else ""
    if not difference <= TOLERANCE:
        problem = f"outputs differ by {difference:.1e}"
    losing = {layer for group in groups for layer in group.layers}
    return row._replace(
        groups=len(groups),
        layers=f"{len(losing & set(weighted))} of {len(weighted)}",
        parameters=f"{left[0]:,} ({left[0] / budgets[0].dense:.0%})",
        operations=f"{left[1]:,} ({left[1] / budgets[1].dense:.0%})",
        difference=f"{difference:.0e}",
        problem=problem,
        seconds=time.perf_counter() - began,
    )


def attempt(name: str) -> Row:
    try:
        return try_model(name)
    except Exception as error:  # noqa: BLE001  # a family that cannot be traced is a row of the table, whatever it raises
        return Row(family(name), name, problem=f"{type(error).__name__}: {' '.join(str(error).split())[:110]}")


def markdown(rows: list[Row]) -> str:
    accepted, refused = [r for r in rows if not r.problem], [r for r in rows if r.problem]
    lines = [HEAD.format(timm=timm.__version__, pruning=torch_pruning.__version__)]
    lines += [f"{len({r.family for r in accepted})} families lose channels:", ""]
    lines += ["| family | model | groups | layers | parameters | operations | difference |", "|" + "---|" * 7]
    for r in accepted:
        cells = (r.family, f"`{r.model}`", str(r.groups), r.layers, r.parameters, r.operations, r.difference)
        lines.append(f"| {' | '.join(cells)} |")
    if refused:
        lines += ["", f"{len({r.family for r in refused})} families are left unchanged:", ""]
        lines += ["| family | model | reason |", "|---|---|---|"]
        lines += [f"| {r.family} | `{r.model}` | {r.problem.replace('|', '/')} |" for r in refused]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--markdown", action="store_true", help=f"write the table into {PAGE.name} as well")
    parser.add_argument("--only", default="", help="models with this in their names")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    rows = []
    for name in TIMM:
        if arguments.only in name:
            row = attempt(name)
            rows.append(row)
            cells = (row.family, row.model, str(row.groups), row.layers, row.parameters, row.operations, row.difference)
            text = " ".join(f"{cell:<{w}}" for cell, w in zip(cells, (22, 32, 4, 11, 20, 24, 6), strict=True))
            print(f"{text} {row.seconds:5.1f} s  {row.problem or 'exact'}", flush=True)
    passed = {row.family for row in rows if not row.problem}
    wrong = [row for row in rows if "differ" in row.problem]
    print(f"{len(passed)} families lose channels exactly; {len(wrong)} of {len(rows)} models are wrong")
    if arguments.markdown:
        PAGE.write_text(markdown(rows), encoding="utf-8")
    return int(bool(wrong) or len(passed) < FAMILIES_WANTED)


if __name__ == "__main__":
    sys.exit(main())
