"""Half of a pretrained sentence encoder's weights, trained against the dense one: retrieval, agreement, time.

The encoder, the texts and the metrics are those of `minilm.py`: texts to train with and texts to retrieve come from
different packages. The encoder is factorised with ranks chosen from its activations, and `Distillation` trains it so
that the hidden states of every layer are those of the dense encoder. No label is used. Results are added to a JSON
file; a run continues where the last one ended.

    python benchmarks/minilm_distillation.py            # what is missing, then docs/benchmarks/minilm_distillation.md
    python benchmarks/minilm_distillation.py --report   # the page from what is stored
"""

import argparse
import copy
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from _docstrings import training_texts
from _report import describe_machine, markdown_table
from lightning.pytorch import LightningModule, Trainer, seed_everything
from minilm import LAYERS, Encoder, calibrated, measure, pooled
from torch import Tensor, nn

from lightning_plugins.callbacks import Distillation
from lightning_plugins.compression import factorize, output_energy

ROOT = Path(__file__).parents[1]
STORE = ROOT / "docs" / "benchmarks" / "minilm_distillation.json"
BLOCKS = [f"encoder.layer.{number}" for number in range(6)]
RATE, BATCH = 5e-4, 32


class Student(LightningModule):
    """The small encoder; what it is trained for comes from the callback alone."""

    def __init__(self, model: nn.Module, steps: int) -> None:
        super().__init__()
        self.model, self.steps = model, steps

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return 0.0 * pooled(self.model, batch).sum()

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), RATE, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=self.steps)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


def halved(encoder: Encoder, left: float, texts: int) -> nn.Module:
    """The encoder with a share of its weights, before any training."""
    calibration, _ = calibrated(encoder, texts)
    ranks = output_energy(encoder.dense, calibration, budget=left, layers=LAYERS, relative=True).ranks
    return factorize(copy.deepcopy(encoder.dense), ranks, calibration=calibration)


def distilled(encoder: Encoder, small: nn.Module, steps: int, seed: int) -> tuple[nn.Module, float]:
    """The trained encoder, and the minutes that it took."""
    seed_everything(seed, verbose=False)
    texts = training_texts()
    order = torch.randperm(len(texts)).repeat(-(-steps * BATCH // len(texts)))[: steps * BATCH].tolist()
    batches = list(encoder.batches([texts[place] for place in order], size=BATCH))
    student = Student(copy.deepcopy(small), steps)
    teacher = Distillation(
        encoder.dense, outputs=False, layers=BLOCKS, network="model", mask="attention_mask", weight=1.0
    )
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_model_summary"), False)
    trainer = Trainer(accelerator="cpu", max_steps=steps, max_epochs=-1, callbacks=[teacher], **quiet)
    begin = time.perf_counter()
    trainer.fit(student, torch.utils.data.DataLoader(batches, batch_size=None))
    return student.model.eval(), (time.perf_counter() - begin) / 60


def run(settings: argparse.Namespace) -> dict[str, Any]:
    stored = json.loads(STORE.read_text()) if STORE.exists() else {"results": {}}
    results, encoder, dense = stored["results"], Encoder(), []
    found = measure(encoder, encoder.dense, settings.sets, dense)
    results.setdefault("dense", found)
    for left in settings.left:
        names = [f"{left:.0%}, no training", *(f"{left:.0%}, seed {seed}" for seed in range(settings.seeds))]
        if all(name in results for name in names):
            continue
        small = halved(encoder, left, 1024)
        results.setdefault(names[0], measure(encoder, small, settings.sets, dense))
        for seed, name in enumerate(names[1:]):
            if name not in results:
                model, minutes = distilled(encoder, small, settings.steps, seed)
                results[name] = {**measure(encoder, model, settings.sets, dense), "minutes": minutes}
            stored["machine"], stored["steps"] = describe_machine("cpu"), settings.steps
            settings.output.write_text(json.dumps(stored, indent=1) + "\n")
    return stored


def page(stored: dict[str, Any]) -> str:
    """The page with the table."""
    dense = statistics.mean(stored["results"]["dense"]["mrr"])
    rows = []
    for name, found in stored["results"].items():
        mrr, minutes = statistics.mean(found["mrr"]), found.get("minutes")
        row = [name, f"{mrr:.3f}", f"{mrr / dense:.1%}", f"{statistics.mean(found['spearman']):.3f}"]
        row += [f"{found['bytes'] / 1e6:.1f}", f"{minutes:.1f}" if minutes else ""]
        rows.append(row)
    header = ["weights of the encoder", "MRR", "of dense", "Spearman", "MB", "minutes of training"]
    return TEXT.format(**stored, sets=len(found["mrr"])) + markdown_table(header, rows) + "\n"


TEXT = """# Half of a sentence encoder by distillation

`python benchmarks/minilm_distillation.py`: {machine}.

all-MiniLM-L6-v2, its linear layers factorised with ranks chosen from the activations on 1,024 paragraphs, then trained
for {steps} steps of 32 paragraphs so that the hidden states of each layer are those of the dense encoder
(`callbacks.Distillation`). No label is used. Texts to train with are docstrings of other packages than those of the
{sets} sets of 150 paragraphs to retrieve. MB are those of the state dict, embeddings included.
Minutes are those of a machine with other work; [time per batch](minilm_trained.md) is in another table.

"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--left", type=float, nargs="+", default=[0.5], help="shares of the encoder's weights to keep")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--sets", type=int, default=5, help="how many sets of paragraphs")
    parser.add_argument("--output", type=Path, default=STORE)
    parser.add_argument("--report", action="store_true", help="write the page of what was measured before")
    settings = parser.parse_args()
    text = page(json.loads(STORE.read_text()) if settings.report else run(settings))
    print(text)
    if settings.report or settings.output == STORE:
        STORE.with_suffix(".md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
