"""A pretrained sentence encoder compressed and trained against itself: ranks, channels and blocks, Torch-Pruning.

Encoder, texts and metrics are those of `minilm.py`. Every method has the same number of steps of the same batches, in
which `Distillation` compares the last hidden states with those of the dense encoder; no label is used.

- ``low rank``: ranks by the error of the outputs and calibrated truncation before the first step.
- ``BSR``: `LowRankCompression` with ranks from a beam search, the penalty in the first half of the steps.
- ``DF``: `MaskScheduling` of heads, hidden units of the perceptrons, and whole layers, in the first half of the steps.
- ``Torch-Pruning``: heads and hidden units by magnitude, the same fraction in each layer, before the first step.

Results are added to a JSON file; a run continues where the last one ended.

    python benchmarks/minilm_trained.py            # what is missing
    python benchmarks/minilm_trained.py --time     # then times, and docs/benchmarks/minilm_trained.md
    python benchmarks/minilm_trained.py --report   # the page from what is stored
"""

import argparse
import copy
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _docstrings import training_texts
from _report import describe_machine, markdown_table
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from minilm import LAYERS, Encoder, calibrated, in_turn, measure, pooled
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from lightning_plugins.callbacks import Distillation, LowRankCompression, MaskScheduling, Penalty, Phase, Timing
from lightning_plugins.compression import BeamOptions, beam_search, factorize, output_energy, quantize

PAGE = Path(__file__).parents[1] / "docs" / "benchmarks" / "minilm_trained.md"
PICTURE = PAGE.parents[1] / "images" / "minilm_trained.png"
RATE, BATCH, LENGTH, CALIBRATION = 5e-4, 32, 96, 1024
LEFT = (0.8, 0.6, 0.5, 0.4)
WIDTH, STEP = 2, 0.04  # of the beam search
WEIGHTS = {"BSR": 0.01, "BSR, weight 1": 1.0}  # of the penalty; 1, the default, outweighs the distillation
TEXT = """# Compressing a sentence encoder with training

`python benchmarks/minilm_trained.py`: {machine}.

all-MiniLM-L6-v2 at shares of the weights of its encoder, after {steps} steps of {batch} docstring paragraphs in which
`Distillation` compares the last hidden states with those of the dense encoder; no label is used, and one training was
run for each row. *low rank*: ranks by the error of the outputs, calibrated truncation, then all steps. *BSR*: ranks by
a beam search of width {width} for the agreement of embeddings with the dense ones; in the first half of the steps the
modified stable rank (of weight {weight}) drives weights to these ranks, then they are truncated. *DF*: heads, hidden
units of the perceptrons and whole layers, chosen by learned masks in the first half of the steps. *Torch-Pruning*:
heads and hidden units by magnitude, the same fraction in each layer, then all steps. DF's budget counts biases and
norms too, so that of the weights a little more or less than the budget may be left. One training each does not rank
methods that are close.

MRR is the mean over {sets} sets of 150 paragraphs to retrieve, from other packages than the texts to train with, with
weights in float32 and in int8. MB are those of the state dict, embeddings included; minutes are CPU time of
compression and training on one thread.

{table}

![MRR over the weights left](../images/minilm_trained.png)

Time of 8 paragraphs: the least CPU time of 20 passes, all encoders in turn, on one thread of {timing_machine}.

{times}
"""


class Student(LightningModule):
    """The encoder; what it is trained for comes from callbacks alone."""

    def __init__(self, encoder: Encoder, model: nn.Module, steps: int) -> None:
        super().__init__()
        self.model, self.steps = model, steps
        self.example_input_array = next(encoder.batches(["An example.", "Another one."]))

    def forward(self, **batch: Tensor) -> Tensor:
        return pooled(self.model, batch)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return 0.0 * self(**batch).sum()

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), RATE, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=self.steps)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


def training_batches(encoder: Encoder, steps: int, seed: int) -> list[dict[str, Tensor]]:
    """Batches of paragraphs of about equal length, which need little padding."""
    draw = random.Random(seed)
    texts = [draw.choice(training_texts())[: 4 * LENGTH] for _ in range(steps * BATCH)]
    batches: list[dict[str, Tensor]] = []
    for start in range(0, len(texts), 8 * BATCH):
        batches += encoder.batches(sorted(texts[start : start + 8 * BATCH], key=len), size=BATCH)
    draw.shuffle(batches)
    return batches


def weights(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.encoder.parameters() if parameter.ndim == 2)


def low_rank(encoder: Encoder, left: float) -> nn.Module:
    calibration, _ = calibrated(encoder, CALIBRATION)
    ranks = output_energy(encoder.dense, calibration, budget=left, layers=LAYERS, relative=True).ranks
    return factorize(copy.deepcopy(encoder.dense), ranks, calibration=calibration)


def torch_pruning(encoder: Encoder, left: float) -> nn.Module:
    """The largest network within the budget, with one fraction of heads and hidden units in all layers."""
    import torch_pruning as tp

    def pruned(fraction: float) -> nn.Module:
        model = copy.deepcopy(encoder.dense)
        attention = [layer.attention.self for layer in model.encoder.layer]
        residual = [
            dense for layer in model.encoder.layer for dense in (layer.attention.output.dense, layer.output.dense)
        ]
        pruner = tp.pruner.BasePruner(
            model,
            next(encoder.batches(["An example.", "Another one."])),
            importance=tp.importance.MagnitudeImportance(p=2),
            pruning_ratio=fraction,
            num_heads={part: one.num_attention_heads for one in attention for part in (one.query, one.key, one.value)},
            prune_num_heads=True,
            prune_head_dims=False,
            head_pruning_ratio=fraction,
            ignored_layers=[*residual, model.pooler, model.embeddings],
            output_transform=lambda output: output.last_hidden_state.sum(),
        )
        pruner.step()
        for one in attention:
            one.num_attention_heads = one.query.out_features // one.attention_head_size
            one.all_head_size = one.query.out_features
        return model

    fractions = [step / 48 for step in range(1, 44)]  # heads go by twelfths, hidden units in finer steps
    return next(model for model in map(pruned, fractions) if weights(model) <= left * weights(encoder.dense))


def searched_ranks(encoder: Encoder, left: float) -> dict[str, int]:
    """Ranks by a beam search; few short texts suffice to compare candidates."""
    texts = [text[:120] for text in training_texts()[:24]]
    wanted = encoder.embed(encoder.dense, texts)
    batch = next(encoder.batches(texts))

    def score(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return (pooled(model, batch) * wanted).sum(1).mean()

    return dict(
        beam_search(
            encoder.dense, [batch], score, budget=left, layers=LAYERS, options=BeamOptions(width=WIDTH, step=STEP)
        ).ranks
    )


def bsr(encoder: Encoder, left: float, weight: float) -> Callback:
    ranks = {f"model.{name}": rank for name, rank in searched_ranks(encoder, left).items()}
    return LowRankCompression(
        "model.encoder.*",
        ranks=ranks,
        penalty=Penalty(weight=weight, every_n_steps=2),
        timing=Timing(search_at=0.0, factorize_at=0.5),
        figures=False,
    )


def choosing(student: Student, left: float) -> Callback:
    """The callback of DF, whose budget is a share of the whole network."""
    every = sum(parameter.numel() for parameter in student.parameters())
    return MaskScheduling(
        "model.encoder.*",
        budget=1 - (1 - left) * weights(student.model) / every,
        cost="params",
        blocks="model.encoder.layer.*",
        phase=Phase(begin=0.0, end=0.5),
        figures=False,
    )


BEFORE: dict[str, Callable[[Encoder, float], nn.Module]] = {"low rank": low_rank, "Torch-Pruning": torch_pruning}
METHODS = ("low rank", "BSR", "DF", "Torch-Pruning")


def trained(encoder: Encoder, method: str, left: float, steps: int) -> tuple[nn.Module, float]:
    """The small encoder, and the minutes of CPU time that it took."""
    seed_everything(0, verbose=False)
    batches = training_batches(encoder, steps, seed=0)
    begin = time.process_time()
    model = BEFORE[method](encoder, left) if method in BEFORE else copy.deepcopy(encoder.dense)
    student = Student(encoder, model, steps)
    teacher = Distillation(
        encoder.dense, outputs="last_hidden_state", network="model", mask="attention_mask", weight=1.0
    )
    callbacks: list[Callback] = [teacher]
    if method == "DF":
        callbacks.append(choosing(student, left))
    elif method in WEIGHTS:
        callbacks.append(bsr(encoder, left, WEIGHTS[method]))
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_model_summary", "enable_progress_bar"), False)
    # Short epochs, since a surgery waits for the next one.
    epoch = max(1, steps // 10)
    trainer = Trainer(
        accelerator="cpu", max_steps=steps, max_epochs=-1, limit_train_batches=epoch, callbacks=callbacks, **quiet
    )
    trainer.fit(student, torch.utils.data.DataLoader(batches, batch_size=None, shuffle=True))
    return student.model.eval(), (time.process_time() - begin) / 60


def timed(encoder: Encoder, folder: Path) -> dict[str, list[float]]:
    """Gigaoperations and the least CPU milliseconds of the dense encoder and of all saved ones, interleaved."""
    models = {"dense | 1": encoder.dense}
    models |= {path.stem: torch.load(path, weights_only=False) for path in sorted(folder.glob("*.pt"))}
    batch = next(encoder.batches(training_texts()[:8], size=8))
    times, found = in_turn(encoder, models), {}
    for key, model in models.items():
        with FlopCounterMode(display=False) as counter, torch.inference_mode():
            model(**batch)
        found[key] = [counter.get_total_flops() / 1e9, times[key]]
    return found


def run(settings: argparse.Namespace) -> dict[str, Any]:
    stored = json.loads(settings.output.read_text()) if settings.output.exists() else {"rows": {}}
    rows, encoder, dense = stored["rows"], Encoder(), []
    settings.models.mkdir(parents=True, exist_ok=True)
    found = measure(encoder, encoder.dense, settings.sets, dense)
    rows.setdefault("dense | 1", {**found, "left": 1.0})
    for left in settings.left:
        for method in settings.methods:
            key = f"{method} | {left}"
            if key in rows:
                continue
            model, minutes = trained(encoder, method, left, settings.steps)
            torch.save(model, settings.models / f"{key}.pt")
            row = {"minutes": minutes, "left": weights(model) / weights(encoder.dense)}
            row |= measure(encoder, model, settings.sets, dense)
            row["int8"] = measure(encoder, quantize(model), settings.sets, dense)
            rows[key] = row
            stored |= {"machine": describe_machine("cpu"), "steps": settings.steps}
            print(key, {name: row[name] for name in ("minutes", "left", "mrr")}, flush=True)
            settings.output.write_text(json.dumps(stored, indent=1) + "\n")
    return stored


def page(stored: dict[str, Any]) -> str:
    """The page with the table."""

    def mean(found: dict[str, Any], name: str) -> float:
        return statistics.mean(found[name])

    dense = mean(stored["rows"]["dense | 1"], "mrr")
    lines = []
    for key, found in sorted(stored["rows"].items(), key=lambda row: -float(row[0].partition(" | ")[2])):
        method, _, left = key.partition(" | ")
        mrr, small = mean(found, "mrr"), found.get("int8")
        line = [method, f"{float(left):.0%}", f"{found['left']:.1%}", f"{mrr:.3f}", f"{mrr / dense:.1%}"]
        line += [f"{mean(found, 'spearman'):.3f}", f"{mean(small, 'mrr'):.3f}" if small else ""]
        line += [f"{found['bytes'] / 1e6:.1f}", f"{small['bytes'] / 1e6:.1f}" if small else ""]
        line += [f"{found['minutes']:.1f}" if small else ""]
        lines.append(line)
    header = ["method", "budget", "weights left", "MRR", "of dense", "Spearman", "MRR, int8", "MB", "MB, int8"]
    sets = len(stored["rows"]["dense | 1"]["mrr"])
    table = markdown_table([*header, "minutes"], lines)
    return TEXT.format(
        **stored, sets=sets, batch=BATCH, width=WIDTH, weight=WEIGHTS["BSR"], table=table, times=times(stored["timing"])
    )


def times(found: dict[str, list[float]]) -> str:
    """The table of operations and times; the last column is what of the saved operations is saved in time."""
    lines = []
    whole, slow = found["dense | 1"]
    for key, (count, spent) in sorted(found.items(), key=lambda row: -float(row[0].partition(" | ")[2])):
        method, _, left = key.partition(" | ")
        cells = [method, f"{float(left):.0%}", f"{count:.1f}", f"{count / whole:.1%}", f"{spent:.0f}"]
        kept = f"{(1 - spent / slow) / (1 - count / whole):.2f}" if key != "dense | 1" else ""
        lines.append([*cells, f"{spent / slow:.1%}", kept])
    return markdown_table(
        ["method", "budget", "GFLOP", "of dense", "ms", "of dense", "saved of what FLOPs save"], lines
    )


def figure(stored: dict[str, Any], path: Path) -> None:
    """MRR over the weights left, in float32 and int8."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    picture, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    rows = [(key.partition(" | ")[0], found) for key, found in stored["rows"].items() if "int8" in found]
    for place, method in enumerate(METHODS):
        mine = sorted((found for name, found in rows if name == method), key=lambda found: found["left"])
        left = [found["left"] for found in mine]
        axes.plot(left, [statistics.mean(found["mrr"]) for found in mine], f"C{place}o-", label=method)
        axes.plot(left, [statistics.mean(found["int8"]["mrr"]) for found in mine], f"C{place}x:")
    axes.axhline(statistics.mean(stored["rows"]["dense | 1"]["mrr"]), color="black", linestyle=":", label="dense")
    axes.set(xlabel="share of the encoder's weights (dotted: in int8)", ylabel="mean reciprocal rank")
    axes.legend()
    picture.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--left", type=float, nargs="+", default=LEFT, help="shares of the encoder's weights to keep")
    parser.add_argument("--methods", nargs="+", default=METHODS, choices={*METHODS, *WEIGHTS})
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--sets", type=int, default=5, help="how many sets of paragraphs")
    parser.add_argument("--output", type=Path, default=PAGE.with_suffix(".json"))
    parser.add_argument(
        "--models",
        type=Path,
        default=Path(tempfile.gettempdir(), "minilm_trained"),
        help="folder of the trained encoders",
    )
    parser.add_argument("--time", action="store_true", help="time the encoders in that folder, on a quiet machine")
    parser.add_argument("--report", action="store_true", help="write the page of what was measured before")
    settings = parser.parse_args()
    stored = json.loads(settings.output.read_text()) if settings.report or settings.time else run(settings)
    if settings.time:
        torch.set_num_threads(1)
        stored["timing"], stored["timing_machine"] = timed(Encoder(), settings.models), describe_machine("cpu")
        settings.output.write_text(json.dumps(stored, indent=1) + "\n")
    if "timing" not in stored:
        return
    text = page(stored)
    print(text)
    settings.output.with_suffix(".md").write_text(text, encoding="utf-8")
    figure(stored, PICTURE)


if __name__ == "__main__":
    main()
