"""Eleven attribution methods on electrocardiograms, scored against the positions of premature ventricular beats.

A ResNet with 1 x 7 kernels learns to classify windows with premature ventricular contractions; then every method
explains confidently classified windows, raw and absolute. Two splits: by patient, and every third window.

    python benchmarks/ecg_attribution.py --records FOLDER        # real records, `.npz` or WFDB's
    python benchmarks/ecg_attribution.py                         # generated ones

Results of every run are stored in a JSON file and reused, so that an interrupted study can be continued.
"""

import argparse
import json
import statistics
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from _report import describe_machine, markdown_table
from lightning.pytorch import LightningModule, Trainer, seed_everything
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_plugins.callbacks import AttributionEvaluation, BatchKeys, SampleSelection
from lightning_plugins.data import ECGRecord, ECGWindows, ecg_windows, read_ecg_folder, synthetic_ecg
from lightning_plugins.metrics import (
    AttributionAUROC,
    AttributionLocalization,
    DegradationScore,
    FaithfulnessCorrelation,
    LocalizationIoU,
    PointingGame,
    RegionPerturbation,
    RelevanceRankAccuracy,
)

TEST_PATIENTS = ("200", "105", "114")
LENGTH = 1024  # samples of 1/180 s
PATCHES = LENGTH // 16  # curves replace one after the other, up to the last
SETS = 100  # of positions, for faithfulness
ATTRIBUTION = "MIT-BIH Arrhythmia Database, PhysioNet, Open Data Commons Attribution License 1.0, Moody and Mark 2001"


class Block(nn.Module):
    """Two convolutions with a shortcut; every ReLU and sum is a module, which methods that hook them need."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv1d(inputs, outputs, 7, stride, 3, bias=False), nn.BatchNorm1d(outputs)
        self.conv2, self.norm2 = nn.Conv1d(outputs, outputs, 7, 1, 3, bias=False), nn.BatchNorm1d(outputs)
        self.shortcut = nn.Sequential(nn.Conv1d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm1d(outputs))
        self.relu1, self.relu2, self.add = nn.ReLU(), nn.ReLU(), Add()

    def forward(self, x: Tensor) -> Tensor:
        inner = self.norm2(self.conv2(self.relu1(self.norm1(self.conv1(x)))))
        return self.relu2(self.add(inner, self.shortcut(x)))


class Add(nn.Module):
    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return a + b


class ECGClassifier(LightningModule):
    def __init__(self, widths: Sequence[int] = (16, 24, 32, 48), lr: float = 2e-3, steps: int = 400) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv1d(1, widths[0], 7, 2, 3, bias=False), nn.BatchNorm1d(widths[0]), nn.ReLU())
        pairs = zip((widths[0], *widths), widths, strict=False)
        self.blocks = nn.Sequential(*(Block(a, b, 1 if n == 0 else 2) for n, (a, b) in enumerate(pairs)))
        self.pool, self.flatten, self.head = nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(widths[-1], 2)
        self.lr, self.steps = lr, steps

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.flatten(self.pool(self.blocks(self.stem(x)))))

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        x, y, _ = batch
        x = x * (1 + 0.1 * torch.randn(len(x), 1, 1, device=x.device)) + 0.03 * torch.randn_like(x)
        return nn.functional.cross_entropy(self(x), y)

    def test_step(self, batch: Sequence[Tensor], batch_idx: int) -> None:
        x, y, _ = batch
        self.log("accuracy", (self(x).argmax(1) == y).float().mean(), batch_size=len(x))

    def configure_optimizers(self) -> dict[str, object]:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.lr, total_steps=self.steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def load(folder: str | None) -> list[ECGRecord]:
    if folder is None:
        return [synthetic_ecg(600, abnormal=0.08, seed=seed) for seed in range(6)]
    return [record.coarser(2) for record in read_ecg_folder(folder)]


def split(records: list[ECGRecord], by: str) -> tuple[ECGWindows, ECGWindows]:
    if by == "patient":
        names = TEST_PATIENTS if any(record.name in TEST_PATIENTS for record in records) else ("synthetic 0",)
        apart = [[record for record in records if (record.name in names) is test] for test in (False, True)]
        return ecg_windows(apart[0], LENGTH), ecg_windows(apart[1], LENGTH)
    windows = ecg_windows(records, LENGTH)
    third = torch.arange(len(windows.labels)) % 3 == 2
    return ECGWindows(*(part[~third] for part in windows)), ECGWindows(*(part[third] for part in windows))


def evaluation(train: ECGWindows, samples: int, draws: int) -> AttributionEvaluation:
    layer = {"layer": "blocks.3"}
    background = train.signals[train.labels == 0]
    chosen = background[torch.linspace(0, len(background) - 1, 8).long()]
    methods = {
        "saliency": None,
        "integrated_gradients": {"n_steps": 32},
        "input_x_gradient": None,
        "guided_backprop": None,
        "lrp": None,
        "lime": {"n_samples": draws},
        "kernel_shap": {"n_samples": draws},
        "deeplift": None,
        "deeplift_shap": {"baselines": chosen},
        "gradcam": layer,
        "guided_gradcam": layer,
    }
    metrics = {
        "IoU": LocalizationIoU(),
        "rank acc.": RelevanceRankAccuracy(),
        "pointing": PointingGame(),
        "attr. loc.": AttributionLocalization(),
        "AUROC": AttributionAUROC(),
        "degradation": DegradationScore(steps=PATCHES, baseline=False),
        "AOPC MoRF": RegionPerturbation(steps=PATCHES, baseline=False),
        "AOPC LeRF": RegionPerturbation(order="least", steps=PATCHES, baseline=False),
        "faithfulness": FaithfulnessCorrelation(draws=SETS),
    }
    return AttributionEvaluation(
        methods,
        batch=BatchKeys(mask=2),
        metrics=metrics,
        samples=SampleSelection(select=0.9, classes=[1], max_samples=samples),
        examples=0,
    )


def run(records: list[ECGRecord], by: str, seed: int, arguments: argparse.Namespace) -> dict[str, object]:
    seed_everything(seed, verbose=False)
    train, test = split(records, by)
    model = ECGClassifier(steps=arguments.steps)
    quiet = {
        "accelerator": arguments.device,
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    weights = 1 / train.labels.bincount(minlength=2)[train.labels].double()
    sampler = torch.utils.data.WeightedRandomSampler(weights, arguments.steps * 64)
    trainer = Trainer(max_steps=arguments.steps, **quiet)
    trainer.fit(model, DataLoader(TensorDataset(*train), batch_size=64, sampler=sampler))
    # In an order of its own, so that the first sure windows come from all patients.
    order = torch.randperm(len(test.labels), generator=torch.Generator().manual_seed(0))
    loader = DataLoader(TensorDataset(*(part[order] for part in test)), batch_size=128)
    callback = evaluation(train, arguments.samples, arguments.draws)
    (logged,) = Trainer(callbacks=[callback], **quiet).test(model, loader, verbose=False)
    report = json.loads(callback.report.to_json())
    share = test.masks[test.labels == 1].float().mean().item()
    return {
        "where": describe_machine("cuda" if arguments.device in {"gpu", "cuda"} else "cpu"),
        "accuracy": logged["accuracy"],
        "majority": max(test.labels.float().mean().item(), 1 - test.labels.float().mean().item()),
        "mask share": share,
        "samples": report["samples"],
        "scores": {row: {name: cell["score"] for name, cell in own.items()} for row, own in report["scores"].items()},
    }


def show(by: str, results: list[dict[str, object]]) -> str:
    """Mean over the seeds, and their standard deviation in brackets."""
    names = list(results[0]["scores"]["random"])

    def cell(row: str, name: str) -> str:
        values = [own for result in results if (own := result["scores"][row][name]) is not None]
        if not values:
            return "-"
        spread = f" ({statistics.stdev(values):.3f})" if len(values) > 1 else ""
        return f"{statistics.mean(values):.3f}{spread}"

    rows = [[row, *(cell(row, name) for name in names)] for row in results[0]["scores"]]
    facts = ", ".join(
        f"{name} {' / '.join(f'{result[name]:.3g}' for result in results)}"
        for name in ("accuracy", "majority", "mask share", "samples")
    )
    return f"split by {by}, {len(results)} seeds: {facts}\n\n{markdown_table(['method', *names], rows)}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", help="folder of records; generated ones if left out")
    parser.add_argument("--json", type=Path, default=Path("ecg_attribution.json"), help="where results are kept")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=500, help="optimizer steps of a training")
    parser.add_argument("--samples", type=int, default=64, help="windows that are explained")
    parser.add_argument("--draws", type=int, default=200, help="samples that LIME and KernelSHAP draw for a window")
    parser.add_argument("--device", default="cpu", help="accelerator of the Trainer")
    parser.add_argument("--splits", nargs="+", default=["patient", "window"], choices=["patient", "window"])
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", module="lightning")
    kept = json.loads(arguments.json.read_text()) if arguments.json.exists() else {}
    records = load(arguments.records)
    settings = f"steps={arguments.steps} samples={arguments.samples} draws={arguments.draws}"
    settings += f" points={PATCHES} sets={SETS}"
    for seed in arguments.seeds:
        for by in arguments.splits:
            key = f"{by} {seed} {settings}"
            if key not in kept:
                kept[key] = run(records, by, seed, arguments)
                arguments.json.write_text(json.dumps(kept, indent=1))
            print(key, kept[key]["where"], flush=True)
    for by in arguments.splits:
        print(show(by, [kept[f"{by} {seed} {settings}"] for seed in arguments.seeds]))
    print(f"Data: {ATTRIBUTION if arguments.records else 'generated'}")


if __name__ == "__main__":
    main()
