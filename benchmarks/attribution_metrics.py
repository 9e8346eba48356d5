"""Costs of the attribution metrics: against Quantus on a CPU, and what they ask of an accelerator.

    python benchmarks/attribution_metrics.py                 # localization and perturbation against Quantus 0.6
    python benchmarks/attribution_metrics.py --device cuda   # synchronisations, passes and memory of a curve

Quantus is no dependency: it is found where PYTHONPATH says. CPU time of one thread, both in turn, medians of the pairs.
"""

import argparse
import statistics
import time
import warnings
from collections.abc import Callable

import numpy as np
import torch
from _report import describe_machine, markdown_table
from torch import Tensor, nn

from lightning_plugins.functional.attribution import (
    Perturbation,
    attribution_auroc,
    attribution_localization,
    localization_iou,
    perturbation_curve,
    pointing_game,
    relevance_rank_accuracy,
    top_k_intersection,
)

SAMPLES, LENGTH = 512, 2048


def data(samples: int, length: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(samples, 1, length, generator=generator)
    maps = torch.rand(samples, 1, length, generator=generator)  # without negative numbers, which Quantus refuses
    masks = torch.zeros(samples, 1, length)
    starts = torch.randint(0, length * 3 // 4, (samples,), generator=generator).tolist()
    for row, start in enumerate(starts):
        masks[row, :, start : start + length // 4] = 1
    return x, maps, masks


def in_turn(ours: Callable[[], object], theirs: Callable[[], object], rounds: int) -> tuple[float, float, list[float]]:
    """CPU seconds of both, and the ratios of the pairs."""
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds):
        for run, kept in zip((ours, theirs), times, strict=True):
            start = time.process_time()
            run()
            kept.append(time.process_time() - start)
    ratios = sorted(b / a for a, b in zip(*times, strict=True))
    return statistics.median(times[0]), statistics.median(times[1]), ratios


def localization(rounds: int) -> None:
    import quantus

    x, maps, masks = data(SAMPLES, LENGTH)
    quiet = {"disable_warnings": True, "display_progressbar": False, "abs": False, "normalise": False}
    pairs = {
        "attribution localization": (attribution_localization, quantus.AttributionLocalisation(**quiet)),
        "rank accuracy": (relevance_rank_accuracy, quantus.RelevanceRankAccuracy(**quiet)),
        "pointing game": (pointing_game, quantus.PointingGame(**quiet)),
        "top-k intersection": (lambda a, m: top_k_intersection(a, m, 512), quantus.TopKIntersection(k=512, **quiet)),
        "AUROC": (attribution_auroc, quantus.AUC(**quiet)),
    }
    arrays = {"x_batch": x.numpy(), "a_batch": maps.numpy(), "s_batch": masks.numpy().astype(bool)}
    labels, model = np.zeros(SAMPLES, dtype=int), nn.Flatten()
    rows = []
    for name, (own, other) in pairs.items():
        ours, theirs, ratios = in_turn(
            lambda own=own: own(maps, masks),
            lambda other=other: other(model=model, y_batch=labels, batch_size=SAMPLES, device="cpu", **arrays),
            rounds,
        )
        row = [name, f"{1e3 * ours:.1f}", f"{1e3 * theirs:.0f}", f"{statistics.median(ratios):.1f}"]
        rows.append([*row, f"{ratios[0]:.1f} to {ratios[-1]:.1f}"])
    start = time.process_time()
    localization_iou(maps, masks)
    rows.append(["IoU", f"{1e3 * (time.process_time() - start):.1f}", "-", "-", "-"])
    print(f"{SAMPLES} samples of {LENGTH}; milliseconds of CPU time\n")
    print(markdown_table(["", "here", "Quantus", "times", "range"], rows))


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv1d(1, 16, 7, 2, 3), nn.ReLU(), nn.Conv1d(16, 32, 7, 2, 3), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(32, 2)).eval()


def perturbation(rounds: int) -> None:
    import quantus

    x, maps, _ = data(8, LENGTH)
    target, model = torch.zeros(8, dtype=torch.long), network()
    other = quantus.RegionPerturbation(
        patch_size=16,
        regions_evaluation=100,
        perturb_baseline="black",
        abs=False,
        normalise=False,
        disable_warnings=True,
        display_progressbar=False,
    )
    arrays = {"x_batch": x.numpy(), "a_batch": maps.numpy(), "y_batch": target.numpy()}
    how = Perturbation(patch=16, replacement="min")
    ours, theirs, ratios = in_turn(
        lambda: perturbation_curve(model, x, maps, target, perturbation=how, steps=100, max_forward_batch=8),
        lambda: other(model=model, batch_size=8, device="cpu", softmax=True, **arrays),
        rounds,
    )
    print(f"\nregion perturbation, 8 samples of {LENGTH}, 100 patches, 8 inputs in a pass: {ours:.2f} s here,")
    print(f"{theirs:.2f} s in Quantus, {statistics.median(ratios):.2f} times ({ratios[0]:.2f} to {ratios[-1]:.2f})")


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
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(describe_machine(arguments.device), "\n")
    if arguments.device == "cpu":
        localization(arguments.rounds)
        perturbation(arguments.rounds)
    else:
        on_device(arguments.device)


if __name__ == "__main__":
    main()
