"""Costs of the attribution metrics: compared with Quantus on a CPU, and on an accelerator.

    python benchmarks/attribution_metrics.py                 # localization and perturbation against Quantus 0.6
    python benchmarks/attribution_metrics.py --page          # docs/benchmarks/attribution_metrics.md from the last run
    python benchmarks/attribution_metrics.py --device cuda   # synchronisations, passes and memory of a curve

Quantus is not a dependency: put it on PYTHONPATH. CPU time of one thread, both interleaved; the minimum over several
rounds, since other load on the machine can only add to it.
"""

import argparse
import json
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from _report import describe_machine, markdown_table
from torch import Tensor, nn

from lightning_plugins.functional.attribution import (
    Perturbation,
    attribution_auroc,
    attribution_localization,
    perturbation_curve,
    pointing_game,
    relevance_rank_accuracy,
    top_k_intersection,
)

SAMPLES, LENGTH, PERTURBED = 512, 2048, 8
DOCS = Path(__file__).parents[1] / "docs" / "benchmarks"
QUIET: dict[str, object] = {"disable_warnings": True, "display_progressbar": False, "abs": False, "normalise": False}


def data(samples: int, length: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(samples, 1, length, generator=generator)
    maps = torch.rand(samples, 1, length, generator=generator)  # without negative numbers, which Quantus rejects
    masks = torch.zeros(samples, 1, length)
    starts = torch.randint(0, length * 3 // 4, (samples,), generator=generator).tolist()
    for row, start in enumerate(starts):
        masks[row, :, start : start + length // 4] = 1
    return x, maps, masks


def in_turn(ours: Callable[[], object], theirs: Callable[[], object], rounds: int) -> dict[str, float]:
    """Least CPU seconds of both, their ratio, and the smallest ratio of a pair."""
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds):
        for run, kept in zip((ours, theirs), times, strict=True):
            start = time.process_time()
            run()
            kept.append(time.process_time() - start)
    pairs = min(b / a for a, b in zip(*times, strict=True))
    here, there = min(times[0]), min(times[1])
    return {"here": here, "quantus": there, "times": there / here, "least of the pairs": pairs}


def localization(rounds: int) -> dict[str, dict[str, float]]:
    import quantus

    x, maps, masks = data(SAMPLES, LENGTH)
    pairs = {
        "attribution localization": (attribution_localization, quantus.AttributionLocalisation(**QUIET)),
        "rank accuracy": (relevance_rank_accuracy, quantus.RelevanceRankAccuracy(**QUIET)),
        "pointing game": (pointing_game, quantus.PointingGame(**QUIET)),
        "top-k intersection": (lambda a, m: top_k_intersection(a, m, 512), quantus.TopKIntersection(k=512, **QUIET)),
        "AUROC": (attribution_auroc, quantus.AUC(**QUIET)),
    }
    arrays = {"x_batch": x.numpy(), "a_batch": maps.numpy(), "s_batch": masks.numpy().astype(bool)}
    labels, model = np.zeros(SAMPLES, dtype=int), nn.Flatten()
    return {
        name: in_turn(
            lambda own=own: own(maps, masks),
            lambda other=other: other(model=model, y_batch=labels, batch_size=SAMPLES, device="cpu", **arrays),
            rounds,
        )
        for name, (own, other) in pairs.items()
    }


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv1d(1, 16, 7, 2, 3), nn.ReLU(), nn.Conv1d(16, 32, 7, 2, 3), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(32, 2)).eval()


def perturbation(rounds: int) -> dict[str, float]:
    import quantus

    x, maps, _ = data(PERTURBED, LENGTH)
    target, model = torch.zeros(PERTURBED, dtype=torch.long), network()
    other = quantus.RegionPerturbation(patch_size=16, regions_evaluation=100, perturb_baseline="black", **QUIET)
    arrays = {"x_batch": x.numpy(), "a_batch": maps.numpy(), "y_batch": target.numpy()}
    settings = {"perturbation": Perturbation(16, "min"), "steps": 100, "max_forward_batch": PERTURBED}

    def ours() -> object:
        return perturbation_curve(model, x, maps, target, **settings)

    def theirs() -> object:
        return other(model=model, batch_size=PERTURBED, device="cpu", softmax=True, **arrays)

    return {**in_turn(ours, theirs, rounds), "passes here": passes(model, ours), "passes there": passes(model, theirs)}


def passes(model: nn.Module, run: Callable[[], object]) -> int:
    """Count the calls of a model."""
    seen: list[int] = []
    handle = model.register_forward_hook(lambda module, inputs, output: seen.append(len(inputs[0])))
    run()
    handle.remove()
    return len(seen)


def page(found: dict[str, object]) -> str:
    """The page of the documentation."""
    rows = [
        [name, f"{1e3 * row['here']:.0f}", f"{1e3 * row['quantus']:.0f}", *ratios(row)]
        for name, row in found["localization"].items()
    ]
    curve = found["region perturbation"]
    times = f"{1e3 * curve['here']:.0f}", f"{1e3 * curve['quantus']:.0f}"
    rows.append(["region perturbation", *times, *ratios(curve)])
    table = markdown_table(["", "here, ms", "Quantus, ms", "times", "least of the pairs"], rows)
    return f"""# Attribution metrics against Quantus

`python benchmarks/attribution_metrics.py` writes this page and [its numbers](attribution_metrics.json):
{found["where"]}; Quantus {found["version"]}.

CPU time of one thread on a shared machine, with both packages interleaved: the minimum of {found["rounds"]} rounds, its
ratio, and the smallest ratio within a round. Localization: {SAMPLES} maps of {LENGTH:,} positions. Region perturbation:
{PERTURBED} signals of {LENGTH:,} samples, 100 windows of 16, both with {PERTURBED} inputs in a forward pass.

{table}

Forward passes dominate region perturbation: {curve["passes here"]} here, {curve["passes there"]} in Quantus.
"""


def ratios(row: dict[str, float]) -> list[str]:
    return [f"{row['times']:.1f}", f"{row['least of the pairs']:.1f}"]


def on_device(device: str) -> None:
    x, maps, _ = data(64, LENGTH)
    target, model = torch.zeros(64, dtype=torch.long), network().to(device)
    where = {"inputs": x.to(device), "attributions": maps.to(device), "target": target.to(device)}
    passes = 0

    def forward(inputs: Tensor) -> Tensor:
        nonlocal passes
        passes += 1
        return model(inputs)

    rows = []
    for steps, limit in ((16, 256), (64, 256), (128, 256), (128, 1024), (128, 8192)):
        for sequential in (False, True):
            how = Perturbation(replacement="linear", sequential=sequential)
            settings = {"perturbation": how, "steps": steps, "max_forward_batch": limit, **where}
            perturbation_curve(forward, **settings)  # warm-up
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            held, passes = torch.cuda.memory_allocated(), 0
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                torch.cuda.set_sync_debug_mode("warn")
                curve = perturbation_curve(forward, **settings)
                torch.cuda.set_sync_debug_mode("default")
            waits = sum("synchroniz" in str(one.message) for one in caught)
            peak = (torch.cuda.max_memory_allocated() - held) / 2**20
            start = time.perf_counter()
            perturbation_curve(forward, **settings)
            torch.cuda.synchronize()
            took = 1e3 * (time.perf_counter() - start)
            same = perturbation_curve(model.cpu(), x, maps, target, perturbation=how, steps=steps)
            model.to(device)
            away = float((curve.cpu() - same).abs().max())
            kind = "sequential" if sequential else "at once"
            rows.append([f"{steps} steps, {kind}", *map(str, (limit, passes, waits)), f"{peak:.0f}", f"{took:.1f}"])
            rows[-1].append(f"{away:.0e}")
    print(f"64 samples of {LENGTH} in windows of 16, replaced by lines\n")
    header = ["", "limit", "passes", "waits for the device", "MiB at most", "ms", "away from the CPU"]
    print(markdown_table(header, rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--page", action="store_true", help="write the page from the stored numbers alone")
    parser.add_argument("--out", type=Path, default=DOCS / "attribution_metrics.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.device != "cpu":
        print(describe_machine(arguments.device), "\n")
        on_device(arguments.device)
        return
    if not arguments.page:
        import quantus

        where = describe_machine("cpu").rpartition("; commit")[0]
        found = {"where": where, "version": quantus.__version__, "rounds": arguments.rounds}
        found["localization"] = localization(arguments.rounds)
        found["region perturbation"] = perturbation(arguments.rounds)
        arguments.out.write_text(json.dumps(found, indent=1) + "\n")
    text = page(json.loads(arguments.out.read_text()))
    arguments.out.with_suffix(".md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
