"""Estimates of mutual information against the truth: Gaussians, a channel of digits, and distributions in closed form.

Run it with the parts wanted, ``python benchmarks/mutual_information.py gaussian tasks channel``. Every result goes into
``mutual_information.json`` beside this file and is not computed again; ``--table`` prints what is there.
"""

import argparse
import json
import math
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from _report import describe_machine, markdown_table
from mutual_information_tasks import tasks
from sklearn.datasets import load_digits
from torch import Tensor, nn

from lightning_plugins.data import BinaryChannelPairs
from lightning_plugins.functional import binary_symmetric_channel_crossover, infonce_bound
from lightning_plugins.functional.pair_scores import candidate_bound
from lightning_plugins.information import (
    CriticSettings,
    EstimateSettings,
    cca_information,
    estimate_information,
    evaluate_critic,
    fit_critic,
    ksg_information,
)
from lightning_plugins.information.estimates import embed_pairs

RESULTS = Path(__file__).with_suffix(".json")
BITS = (10, 8, 6, 4, 2)


def gaussian(seed: int, bits: int) -> dict[str, float]:
    """Ten independent pairs of correlated features; 150,000 pairs, of which 120,000 are unseen candidates."""
    g = torch.Generator().manual_seed(1000 * seed + bits)
    rho = math.sqrt(1 - 2 ** (-2 * bits / 10))
    x, noise = torch.randn(2, 150_000, 10, generator=g).unbind()
    y = rho * x + math.sqrt(1 - rho**2) * noise
    fit = CriticSettings(validation=0.05, test=0.8, max_steps=0, seed=seed)
    fitted = fit_critic(x, y, "bilinear", settings=fit)  # the separable critic's networks add nothing here
    unseen = x[fitted.test_rows], y[fitted.test_rows]
    found = {}
    for name, bound, k, rows, anchors in (
        ("all", "infonce", None, 120_000, 8192),
        ("K = 8192", "infonce", 8192, 8192, 2048),
        ("K = 64", "infonce", 64, 2048, 64),
        ("SMILE-5", "smile", None, 8192, 2048),
    ):
        settings = EstimateSettings(fit=fit, bound=bound, num_candidates=k, max_anchors=anchors, units="bits")
        result = evaluate_critic(fitted, *(part[:rows] for part in unseen), settings=settings)
        found[name] = result.estimate
        if name == "all":
            found["standard error"] = result.standard_error
    return found


def task(name: str, seed: int) -> dict[str, float]:
    """5,000 pairs; the critic is evaluated on the 2,000 that it has not seen, the others see all."""
    one = tasks()[name]
    x, y = (part.float() for part in one.sample(5000, torch.Generator().manual_seed(seed)))
    fit = CriticSettings(validation=0.1, test=0.4, max_steps=1500, seed=seed)
    ours = estimate_information(x, y, settings=EstimateSettings(fit=fit))
    scaled = [(part - part.mean(0)) / part.std(0) for part in (x, y)]
    return {
        "truth": one.information,
        "separable": ours.estimate,
        "CCA": cca_information(x, y),
        "KSG": ksg_information(*scaled, neighbours=10),
        "InfoNCE": plain_infonce(*scaled, seed),
    }


def plain_infonce(x: Tensor, y: Tensor, seed: int) -> float:
    """The usual recipe: two networks from random weights, 1,000 steps of 256 pairs, the last state, unseen pairs."""
    torch.manual_seed(seed)
    nets = [
        nn.Sequential(nn.Linear(d, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 32))
        for d in (x.shape[1], y.shape[1])
    ]
    optimizer = torch.optim.Adam([p for net in nets for p in net.parameters()], 5e-4)
    for _ in range(1000):
        rows = torch.randint(3000, (256,))
        loss = -infonce_bound(nets[0](x[rows]) @ nets[1](y[rows]).T)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        encoded = [net(part[3000:]) for net, part in zip(nets, (x, y), strict=True)]
        return candidate_bound(*encoded, lambda one, other: one @ other.T).value


def channel(seed: int, bits: int) -> dict[str, float]:
    """Ten digits 0 or 1 a side through a channel; critic and estimate on pairs of different images.

    The encoder is frozen: eight principal components of the images that the critic may see.
    """
    digits = load_digits(n_class=2)
    images, labels = torch.as_tensor(digits.data).float() / 16, torch.as_tensor(digits.target)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    parts = order.tensor_split([len(order) // 2])
    centre = images[parts[0]].mean(0)
    basis = torch.linalg.svd(images[parts[0]] - centre, full_matrices=False).Vh[:8]
    crossover = binary_symmetric_channel_crossover(10, bits * math.log(2))
    pairs = [
        BinaryChannelPairs(images[part], labels[part], sources=10, crossover=crossover, num_pairs=n, seed=seed + 7)
        for part, n in zip(parts, (12_000, 12_000), strict=True)
    ]
    loaders = [torch.utils.data.DataLoader(part, batch_size=1000) for part in pairs]
    sides = [embed_pairs(lambda view: (view - centre) @ basis.T, loader) for loader in loaders]
    fit = CriticSettings(validation=0.1, test=0.0, max_steps=1500, seed=seed)
    fitted = fit_critic(*sides[0][:2], settings=fit)
    settings = EstimateSettings(fit=fit, max_anchors=4096, units="bits")
    result = evaluate_critic(fitted, *sides[1][:2], settings=settings)
    in_batch = evaluate_critic(
        fitted,
        *(side[:4096] for side in sides[1][:2]),
        settings=EstimateSettings(fit=fit, num_candidates=64, units="bits"),
    )
    return {"all": result.estimate, "standard error": result.standard_error, "K = 64": in_batch.estimate}


def jobs(part: str, seeds: int) -> Iterator[tuple[str, Any]]:
    if part == "gaussian":
        for bits in BITS:
            for seed in range(seeds):
                yield f"gaussian/{bits}/{seed}", lambda seed=seed, bits=bits: gaussian(seed, bits)
    elif part == "tasks":
        for seed in range(seeds):
            for name in tasks():
                yield f"tasks/{name}/{seed}", lambda name=name, seed=seed: task(name, seed)
    else:
        for seed in range(seeds):
            for bits in BITS:
                yield f"channel/{bits}/{seed}", lambda seed=seed, bits=bits: channel(seed, bits)


def tables(results: dict[str, Any]) -> Iterator[str]:
    grouped: dict[str, dict[str, list[dict[str, float]]]] = defaultdict(lambda: defaultdict(list))
    for key, entry in results.items():
        part, name, _ = key.rsplit("/", 2)
        grouped[part][name].append(entry)
    for part in ("gaussian", "channel"):
        rows = []
        for name, entries in sorted(grouped[part].items(), key=lambda item: int(item[0])):
            values = [entry["all"] for entry in entries]
            above = sum(entry["all"] - entry["standard error"] > int(name) for entry in entries)
            others = [key for key in ("K = 8192", "K = 64", "SMILE-5") if key in entries[0]]
            spread = f"{stdev(values):.2f}" if len(values) > 1 else ""
            rows.append(
                [name, str(len(values)), f"{mean(values):.2f}", spread, str(above)]
                + [f"{mean(entry[key] for entry in entries):.2f}" for key in others]
            )
        if rows:
            others = [key for key in ("K = 8192", "K = 64", "SMILE-5") if key in next(iter(grouped[part].values()))[0]]
            header = ["true bits", "seeds", "bound on unseen pairs", "sd over seeds", "above the truth by > 1 s.e."]
            yield f"{part}\n\n{markdown_table(header + others, rows)}"
    if grouped["tasks"]:
        names = ("separable", "CCA", "KSG", "InfoNCE")
        rows, errors = [], defaultdict(list)
        for name, entries in grouped["tasks"].items():
            for key in names:
                errors[key].extend(abs(entry[key] - entry["truth"]) for entry in entries)
            found = [f"{mean(entry[key] for entry in entries):.3f}" for key in names]
            rows.append([name, str(len(entries)), f"{entries[0]['truth']:.3f}", *found])
        rows.append(["mean absolute error", "", "", *(f"{mean(errors[key]):.3f}" for key in names)])
        yield f"tasks\n\n{markdown_table(['distribution', 'seeds', 'truth', *names], rows)}"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("parts", nargs="*", help="gaussian, tasks, channel")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--table", action="store_true", help="only print what is stored")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for part in [] if arguments.table else arguments.parts or ["gaussian", "tasks", "channel"]:
        for key, job in jobs(part, arguments.seeds):
            if key not in results:
                start = time.process_time()
                results[key] = {**job(), "seconds": round(time.process_time() - start, 2)}
                RESULTS.write_text(json.dumps(results, indent=1) + "\n")
                print(key, results[key], flush=True)
    print(describe_machine("cpu"), *tables(results), sep="\n\n")


if __name__ == "__main__":
    main()
