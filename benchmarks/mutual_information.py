"""Estimates of mutual information against the truth: Gaussians, channels of digits and sentences, closed forms.

Run it with the parts wanted, ``python benchmarks/mutual_information.py gaussian digits sentences tasks``. Every
result goes into ``mutual_information.json`` beside this file and is not computed again; ``--page`` writes the page of
what is there. The part ``torch-mist`` needs that package: ``pip install --no-deps torch-mist`` and what it imports,
since its metadata asks for a NumPy below 2.
"""

import argparse
import json
import math
import textwrap
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from _report import describe_machine, markdown_table
from mutual_information_channel import DOMAINS, channel
from mutual_information_tasks import tasks
from torch import Tensor, nn

from lightning_plugins.functional import infonce_bound
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

RESULTS = Path(__file__).with_suffix(".json")
PAGE = Path(__file__).parents[1] / "docs" / "benchmarks" / "mutual_information.md"
BITS = (10, 8, 6, 4, 2)
PARTS = ("gaussian", *DOMAINS, "tasks")
OTHERS = ("K = 8192", "K = 64", "SMILE-5", "plug-in", "class seen", "accuracy")


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


def torch_mist_infonce(name: str, seed: int) -> dict[str, float]:
    """InfoNCE with a separable critic from torch-mist, by its own training with early stopping, on the same pairs."""
    from torch_mist.utils import estimate_mi

    one = tasks()[name]
    x, y = (part.float() for part in one.sample(5000, torch.Generator().manual_seed(seed)))
    x, y = ((part - part.mean(0)) / part.std(0) for part in (x, y))
    torch.manual_seed(seed)
    value, _ = estimate_mi(
        (x[:3000], y[:3000]),
        "infonce",
        test_data=(x[3000:], y[3000:]),
        critic_type="separable",
        hidden_dims=[128, 128],
        batch_size=256,
        evaluation_batch_size=2000,
        max_iterations=1500,
        verbose=False,
    )
    return {"truth": one.information, "torch-mist": float(value)}


def jobs(part: str, seeds: int) -> Iterator[tuple[str, Any]]:
    if part == "gaussian":
        for bits in BITS:
            for seed in range(seeds):
                yield f"gaussian/{bits}/{seed}", lambda seed=seed, bits=bits: gaussian(seed, bits)
    elif part == "tasks":
        for seed in range(seeds):
            for name in tasks():
                yield f"tasks/{name}/{seed}", lambda name=name, seed=seed: task(name, seed)
    elif part == "torch-mist":
        for seed in range(seeds):
            for name in tasks():
                yield f"torch-mist/{name}/{seed}", lambda name=name, seed=seed: torch_mist_infonce(name, seed)
    else:
        for seed in range(seeds):
            for bits in BITS:
                yield f"{part}/{bits}/{seed}", lambda seed=seed, bits=bits: channel(part, bits, seed)


def grouped(results: dict[str, Any]) -> dict[str, dict[str, list[dict[str, float]]]]:
    """Results by part and by level or distribution, in the order of the seeds."""
    found: dict[str, dict[str, list[dict[str, float]]]] = defaultdict(lambda: defaultdict(list))
    for key, entry in results.items():
        part, name, _ = key.rsplit("/", 2)
        found[part][name].append(entry)
    return found


def levels_table(levels: dict[str, list[dict[str, float]]]) -> str:
    """The bound at each level of bits, its spread over seeds, and what else the part measures."""
    others = [key for key in OTHERS if key in next(iter(levels.values()))[0]]
    rows = []
    for name, entries in sorted(levels.items(), key=lambda item: int(item[0])):
        values = [entry["all"] for entry in entries]
        above = sum(entry["all"] - entry["standard error"] > int(name) for entry in entries)
        rows.append(
            [
                name,
                str(len(values)),
                f"{mean(values):.2f}",
                f"{stdev(values):.2f}" if len(values) > 1 else "",
                str(above),
            ]
            + [f"{mean(entry[key] for entry in entries):.2f}" for key in others]
            + [f"{mean(entry['seconds'] for entry in entries):.0f}"]
        )
    header = ["true bits", "seeds", "bound on unseen pairs", "sd over seeds", "above the truth by > 1 s.e."]
    return markdown_table([*header, *others, "CPU s"], rows)


def tasks_table(found: dict[str, list[dict[str, float]]], mist: dict[str, list[dict[str, float]]]) -> str:
    """Means over seeds, and the mean absolute error over distributions and seeds."""
    names = ("separable", "CCA", "KSG", "InfoNCE", *(["torch-mist"] if mist else []))
    rows, errors = [], defaultdict(list)
    for name, entries in found.items():
        cells = []
        for key in names:
            runs = mist[name] if key == "torch-mist" else entries
            errors[key].extend(abs(run[key] - run["truth"]) for run in runs)
            cells.append(f"{mean(run[key] for run in runs):.3f}")
        rows.append([name, str(len(entries)), f"{entries[0]['truth']:.3f}", *cells])
    rows.append(["mean absolute error", "", "", *(f"{mean(errors[key]):.3f}" for key in names)])
    return markdown_table(["distribution", "seeds", "truth", *names], rows)


def page(results: dict[str, Any], machine: str) -> str:
    found = grouped(results)
    parts = [INTRODUCTION, machine]
    for part in PARTS:
        if found[part]:
            table = tasks_table(found[part], found["torch-mist"]) if part == "tasks" else levels_table(found[part])
            text = TEXTS[part] + (MIST if part == "tasks" and found["torch-mist"] else "")
            text = textwrap.fill(" ".join(text.split()), 120, break_on_hyphens=False)
            parts += [f"## {TITLES[part]}", text, table]
    return "\n\n".join(parts) + "\n"


INTRODUCTION = """# Estimates of mutual information against the truth

Written by `benchmarks/mutual_information.py`. Critics are evaluated on pairs that they have not seen, with all of
them as candidates (InfoNCE), so that the values are lower bounds up to sampling; `K = 64` is the same critic in
batches of 64, as the bound of a training is measured, with its ceiling of 6 bits. Times are those of a busy machine."""
TITLES = {
    "gaussian": "Gaussians",
    "digits": "Digits behind a noisy channel",
    "sentences": "Sentences behind a noisy channel",
    "tasks": "Twenty distributions in closed form",
}
MIST = " `torch-mist` is its separable InfoNCE with its own early stopping."
_CHANNEL = """Each side of a pair has ten parts whose classes are ten bits, before and after a binary symmetric
channel. The critic is the density ratio of the posteriors of a logistic probe of single parts, fitted on other
samples. The plug-in is the mean of that logarithm over the pairs, which is no bound; `class seen` is the probe's
information about a single class in bits, one less its cross-entropy on unseen samples: below 1, the true bits are
more than the samples show."""
TEXTS = {
    "gaussian": "Ten independent pairs of correlated features, 150,000 pairs, of which 120,000 are unseen candidates.",
    "digits": f"Handwritten digits 0 and 1. {_CHANNEL}",
    "sentences": f"Paragraphs of Wikipedia and of docstrings, embedded by all-MiniLM-L6-v2. {_CHANNEL}",
    "tasks": """Nats, 5,000 pairs, after the list of the benchmark of Czyż et al. `separable` is this package's
estimate, with the critic fitted on 3,000 of them and evaluated on the others, as is InfoNCE from random weights
(1,000 steps of 256). CCA and KSG see all 5,000.""",
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("parts", nargs="*", help=", ".join(PARTS) + ", torch-mist")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--page", action="store_true", help="only write the page of what is stored")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    stored = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    results = stored.setdefault("results", {})
    for part in [] if arguments.page else arguments.parts or PARTS:
        for key, job in jobs(part, arguments.seeds):
            if key not in results:
                start = time.process_time()
                results[key] = {**job(), "seconds": round(time.process_time() - start, 2)}
                stored["machine"] = describe_machine("cpu")
                RESULTS.write_text(json.dumps(stored, indent=1) + "\n")
                print(key, results[key], flush=True)
    text = page(results, stored["machine"])
    print(text)
    if arguments.page:
        PAGE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
