"""Overhead of each term and of the alarm in a training step.

A term of representations is timed on the input of a ResNet-18's last layer (32 x 512), forward and backward; a term of
weights on all weights of the network, as its callback adds it; the alarm as one measurement. All are interleaved in one
process, so that drift of the machine's speed affects all equally. Times are CPU times (wall-clock times on a GPU).

    python benchmarks/terms.py                   # ResNet-18, 32 x 3 x 224 x 224, one thread
    python benchmarks/terms.py --device cuda
    python benchmarks/terms.py --write           # the table for the documentation
"""

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import timm
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from lightning_plugins.callbacks._monitors.collapse import CollapseMeasure
from lightning_plugins.callbacks._terms.given_term import value_and_gradient
from lightning_plugins.functional.subspace import top_singular_subspace
from lightning_plugins.regularizers import (
    CodingRate,
    Decorrelation,
    ModifiedStableRank,
    NuclearNorm,
    RenyiEntropy,
    SIGReg,
    SoftOrthogonality,
    SpectralNorm,
    SpreadOut,
    StableRank,
    VICRegCovariance,
    VICRegVariance,
    VonNeumannEntropy,
)
from lightning_plugins.weights import select_weight_matrices

TABLE = Path(__file__).parent.parent / "docs" / "benchmarks" / "terms.md"
ROWS, WIDTH = 32, 512
NOTES = """All are interleaved in one process and timed by the processor; the machine may be shared. Soft orthogonality
decomposes nothing, but needs two products of each weight with a Gram matrix: {orthogonality:.1f} GFLOPs beside the
step's {step:.0f}, counted by torch, or {share:.1%}. Terms of all weights are cheaper by `every_n_steps=n`, n times."""
OF_EMBEDDINGS: dict[str, nn.Module] = {
    "VonNeumannEntropy (eigendecomposition)": VonNeumannEntropy(),
    "RenyiEntropy": RenyiEntropy(),
    "CodingRate (Cholesky)": CodingRate(),
    "VICRegVariance": VICRegVariance(),
    "VICRegCovariance": VICRegCovariance(),
    "SIGReg, 256 directions": SIGReg(),
    "SpreadOut": SpreadOut(),
    "Decorrelation": Decorrelation(),
}
OF_WEIGHTS: dict[str, nn.Module] = {
    "SoftOrthogonality": SoftOrthogonality(),
    "SpectralNorm (eigendecomposition)": SpectralNorm(),
    "NuclearNorm (eigendecomposition)": NuclearNorm(),
    "StableRank (eigendecomposition)": StableRank(),
    "ModifiedStableRank (eigendecomposition)": ModifiedStableRank(1.0, rank=8),
}


def candidates(model: nn.Module, device: str) -> dict[str, Callable[[], object]]:
    """Return the terms that are timed, by their names in the table."""
    torch.manual_seed(0)
    rows = torch.randn(ROWS, WIDTH, device=device).relu()
    weights = [weight.take(weight.tensor.detach()) for weight in select_weight_matrices(model, "*")]
    alarm = CollapseMeasure("effective_rank")
    starts = [top_singular_subspace(weight, min(8, *weight.shape[-2:])).start for weight in weights]

    def embedded(term: nn.Module) -> Tensor:
        leaf = rows.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(term(leaf), leaf)
        return gradient

    def measured() -> object:
        alarm.add("layer", [rows], rows.device)
        return alarm.values(["layer"], rows.device)

    def capped() -> None:
        for index, weight in enumerate(weights):
            found = top_singular_subspace(weight, starts[index].shape[-1], start=starts[index], leading=1)
            starts[index] = found.start

    timed: dict[str, Callable[[], object]] = {
        name: (lambda term=term: embedded(term)) for name, term in OF_EMBEDDINGS.items()
    }
    for name, term in OF_WEIGHTS.items():
        timed[f"{name}, all weights"] = lambda term=term: [value_and_gradient(term, weight) for weight in weights]
    timed["SpectralNormCap, all weights"] = capped
    timed["CollapseAlarm, one measurement"] = measured
    return timed


def operations(step: Callable[[], None], model: nn.Module) -> dict[str, float]:
    """GFLOPs of a step and of soft orthogonality of all weights, and their quotient."""
    term = SoftOrthogonality()
    weights = [weight.take(weight.tensor.detach()) for weight in select_weight_matrices(model, "*")]
    counts = {}
    for name, run in (("step", step), ("orthogonality", lambda: [value_and_gradient(term, one) for one in weights])):
        with FlopCounterMode(display=False) as counter:
            run()
        counts[name] = counter.get_total_flops() / 1e9
    return {**counts, "share": counts["orthogonality"] / counts["step"]}


def now(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--steps", type=int, default=5, help="counted rounds")
    parser.add_argument("--size", type=int, default=224, help="pixels a side")
    parser.add_argument("--write", action="store_true", help="write the table into docs/benchmarks")
    settings = parser.parse_args()
    if settings.device == "cpu":
        torch.set_num_threads(1)  # or the time of threads that wait counts too
    model = timm.create_model("resnet18", num_classes=1000).to(settings.device)
    images = torch.randn(ROWS, 3, settings.size, settings.size, device=settings.device)
    labels = torch.randint(1000, (ROWS,), device=settings.device)

    def step() -> None:
        nn.functional.cross_entropy(model(images), labels).backward()

    timed = {"step": step, **candidates(model, settings.device)}
    seconds: dict[str, list[float]] = {name: [] for name in timed}
    for index in range(settings.steps + 1):
        for name, run in timed.items():
            start = now(settings.device)
            run()
            if index:  # the first round warms up
                seconds[name].append(now(settings.device) - start)
    medians = {name: statistics.median(each) for name, each in seconds.items()}
    whole = medians.pop("step")
    where = f"one thread of {platform.machine()}" if settings.device == "cpu" else torch.cuda.get_device_name()
    lines = [
        f"ResNet-18, {ROWS} x 3 x {settings.size} x {settings.size}, float32, {where}, torch {torch.__version__}: a "
        "step (forward and backward)",
        f"takes {1e3 * whole:.0f} ms. Medians of {settings.steps} rounds; terms of embeddings on {ROWS} x {WIDTH}.",
        "",
        "| term | ms | share of a step |",
        "|---|---|---|",
        *(f"| {name} | {1e3 * median:.2f} | {median / whole:.2%} |" for name, median in medians.items()),
        "",
        NOTES.format(**operations(step, model)),
    ]
    print("\n".join(lines))
    if settings.write:
        TABLE.write_text("# Cost of terms and of the alarm\n\n" + "\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
