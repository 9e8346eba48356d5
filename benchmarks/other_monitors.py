"""RankMe during a training, here and in stable-pretraining: deviation from the definition, several processes, cost.

A linear layer gives the rows; both callbacks log RankMe in validations of the same training. The reference is RankMe of
the training rows under the weights at that validation, in float64. `RepresentationMonitor` here measures the layer in a
validation over those rows; stable-pretraining's callback measures the last rows of its queue, which training steps
fill, at the first batch of a validation, and its queue holds all of them here. Each case is a process of its own.

stable-pretraining has many requirements that this part does not need:

    pip install --no-deps --target FOLDER stable-pretraining loguru omegaconf antlr4-python3-runtime==4.9.3 \\
        hydra-core kornia kornia_rs datasets dill xxhash multiprocess pyarrow prettytable requests-cache cattrs \\
        url-normalize
    PYTHONPATH=$PWD:FOLDER python benchmarks/other_monitors.py     # docs/benchmarks/other_monitors.md
"""

import argparse
import importlib.util
import json
import logging
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from _report import describe_machine, markdown_table
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn

from lightning_plugins.callbacks import RepresentationMonitor

PAGE = Path(__file__).parents[1] / "docs" / "benchmarks" / "other_monitors.md"
PACKAGES = ("here", "stable-pretraining")
SECONDS = 120  # a case that takes longer hangs
BATCH = 50
TEXT = """# RankMe during a training, beside stable-pretraining

`python benchmarks/other_monitors.py`: {machine}; stable-pretraining {version}.

RankMe as logged, minus that of the training rows under the weights at that validation (in float64), relative to the
latter. A layer of width {width} gives {rows} rows. `RepresentationMonitor` sums Gram matrices in a validation over
these rows; stable-pretraining's `RankMe` takes the rows that training steps have put into its queue, which is long
enough for all of them.

{table}

stable-pretraining adds 1e-5 to each normalised singular value, as the paper does; here `0 log 0` is 0. Its queue holds
rows of former weights. The queue is a buffer of the module, and DDP by default copies the buffers of the first process
to the others before each forward pass: all rows of the others but those of their last batch are lost, and those of the
first count twice. It is gathered as one tensor, which needs the same number of rows on every process; it has them as
soon as it is full everywhere, and with unequal rows it never is here.

CPU seconds per epoch of {steps} training and {steps} validation batches of {batch} rows of width {wide}, less those
without a callback, the medians of {repeats} runs: {seconds}. `RepresentationMonitor` reads every
validation row, and has no queue, in memory or in checkpoints; stable-pretraining reads every training row, and a
validation's first batch starts its one decomposition. Where stable-pretraining is installed, an entry point adds its
{extra} own callbacks to every `Trainer`.

What stable-pretraining does better: it needs no validation set of the measured rows, and whole self-supervised methods,
data sets and probes come with it.
"""


class Case(NamedTuple):
    """Rows of each process, and how the training goes."""

    name: str
    sizes: tuple[int, ...]
    rate: float = 0.0
    spread: float = 0.97  # of a feature's standard deviation to that of the one before
    copied: bool = True  # whether DDP copies buffers from the first process, its default


CASES = (
    Case("one process, constant weights", (400,)),
    Case("one process, a layer collapsed to one direction", (400,), spread=0.0),
    Case("one process, weights that learn", (400,), rate=0.05),
    Case("two processes, 200 and 200 rows", (200, 200)),
    Case("the same, `broadcast_buffers=False`", (200, 200), copied=False),
    Case("two processes, 150 and 250 rows", (150, 250)),
    Case("the same with 150 and 250 rows, `broadcast_buffers=False`", (150, 250), copied=False),
)
WIDTH = 64


class Layer(LightningModule):
    """A linear layer on the rows of each process; the loss makes its first output large."""

    def __init__(self, case: Case, width: int = WIDTH, steps: int = 8) -> None:
        super().__init__()
        self.case, self.steps, self.callbacks_modules = case, steps, nn.ModuleDict()
        self.layer = nn.Linear(width, width, bias=False)
        with torch.no_grad():
            self.layer.weight.copy_(torch.eye(width))
        generator = torch.Generator().manual_seed(0)
        scale = torch.tensor(case.spread) ** torch.arange(width)
        self.rows = torch.randn(sum(case.sizes), width, generator=generator) * scale

    def mine(self) -> Tensor:
        begin = sum(self.case.sizes[: self.trainer.global_rank])
        return self.rows[begin : begin + self.case.sizes[self.trainer.global_rank]]

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        rows = self.layer(batch["x"])
        return {"loss": -rows[:, 0].square().mean(), "embedding": rows.detach()}

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.layer(batch["x"])

    def loader(self) -> Any:
        parts = self.mine().tensor_split(self.steps)  # as many on every process, whose sizes differ
        return torch.utils.data.DataLoader([{"x": part} for part in parts], batch_size=None)

    train_dataloader = val_dataloader = loader

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), self.case.rate)


def callback(package: str, rows: int, width: int = WIDTH) -> Callback:
    if package == "here":
        return RepresentationMonitor("layer", metrics=["rankme"], every_n_steps=10**6, figures=False)
    from stable_pretraining.callbacks.rankme import RankMe

    return RankMe("rankme", "embedding", rows, width)


def trainer(callbacks: list[Callback], **settings: Any) -> Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return Trainer(
        accelerator="cpu", callbacks=callbacks, use_distributed_sampler=False, num_sanity_val_steps=0,
        enable_checkpointing=False, **quiet, **settings,
    )  # fmt: skip


def exact(rows: Tensor) -> float:
    """RankMe in float64."""
    shares = torch.linalg.svdvals(rows.double())
    return float(torch.special.entr(shares / shares.sum()).sum().exp())


class Result(Callback):
    """Write what was logged and the definition's value, on the first process."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_rank == 0:
            logged = trainer.callback_metrics
            found = logged["rankme" if "rankme" in logged else "representation/val/layer/rankme"]
            with torch.no_grad():
                self.path.write_text(json.dumps([float(found), exact(pl_module.layer(pl_module.rows))]))


def run(case: Case, package: str, path: Path) -> None:
    model, processes = Layer(case), len(case.sizes)
    # A queue is as long as the rows of its process.
    watch = [callback(package, max(case.sizes)), Result(path)]
    settings: dict[str, Any] = {"max_epochs": 1}
    if processes > 1:
        settings |= {
            "devices": processes,
            "strategy": DDPStrategy(process_group_backend="gloo", broadcast_buffers=case.copied),
        }
    trainer(watch, **settings).fit(model)


def deviation(case: Case, package: str) -> str:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "found.json")
        command = [sys.executable, __file__, "--case", case.name, "--package", package, "--result", str(path)]
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
        try:
            _, errors = process.communicate(timeout=SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # its ranks too
            process.communicate()
            return "hangs"
        if not path.exists():
            names = re.findall(r"\b(\w+Error):", errors)
            return f"raises {names[-1]}" if names else "crashes"
        found, wanted = json.loads(path.read_text())
    return f"{(found - wanted) / wanted:+.1e}"


def seconds(package: str, width: int, steps: int, repeats: int) -> float:
    """CPU seconds of an epoch with the callback, less those without."""

    def epoch(callbacks: list[Callback]) -> float:
        fitting, model = trainer(callbacks, max_epochs=1), Layer(Case("", (steps * BATCH,)), width, steps)
        begin = time.process_time()
        fitting.fit(model)
        return time.process_time() - begin

    epoch([callback(package, steps * BATCH, width)])
    found = [epoch([callback(package, steps * BATCH, width)]) - epoch([]) for _ in range(repeats)]
    return statistics.median(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=[case.name for case in CASES], help="run one case, for --result")
    parser.add_argument("--package", choices=PACKAGES)
    parser.add_argument("--result", type=Path)
    parser.add_argument("--page", type=Path, default=PAGE)
    options = parser.parse_args()
    if importlib.util.find_spec("stable_pretraining") is None:
        parser.error("stable-pretraining is missing; the head of this file says how to install it")
    torch.set_num_threads(1)
    os.environ["LOGURU_LEVEL"] = "ERROR"
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    if options.case:
        run(next(case for case in CASES if case.name == options.case), options.package, options.result)
        return
    lines = []
    for case in CASES:
        lines.append([case.name, *(deviation(case, package) for package in PACKAGES)])
        print(lines[-1], flush=True)
    sizes = {"width": 512, "steps": 80, "repeats": 5}
    cost = "; ".join(f"{package} {seconds(package, **sizes):.2f}" for package in PACKAGES)
    text = TEXT.format(
        machine=describe_machine("cpu"), version=version("stable-pretraining"), width=WIDTH, rows=sum(CASES[0].sizes),
        table=markdown_table(["case", *PACKAGES], lines), steps=sizes["steps"], batch=BATCH, wide=sizes["width"],
        repeats=sizes["repeats"], seconds=cost, extra=len(trainer([]).callbacks),
    )  # fmt: skip
    options.page.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
