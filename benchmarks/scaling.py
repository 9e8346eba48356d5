"""Bytes that the callbacks exchange, counted over 1, 2, 4 and 8 processes, against what the formulas say.

    python benchmarks/scaling.py run docs/benchmarks/scaling.json
    python benchmarks/scaling.py page docs/benchmarks/scaling.json docs/benchmarks/scaling.md

Counted is what the kernel says was received over the TCP connections of a process (gloo's, on one machine), between the
starts of two steps, less what the same training without the callback receives. The formulas know algorithms, not
headers, so small exchanges are larger than they say.
"""

import argparse
import json
import math
import os
import socket
import statistics
import struct
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, multiprocessing, nn

sys.path.insert(0, str(Path(__file__).resolve().parent))
from _report import describe_machine, markdown_table

from lightning_plugins.callbacks import (
    RepresentationMonitor,
    SpectrumMonitor,
    StableRankRegularization,
    VNERegularization,
)
from lightning_plugins.distributed import share_out
from lightning_plugins.regularizers.von_neumann import exchange_form

PROCESSES = (1, 2, 4, 8)
EXTRAPOLATED = (64, 1024)
FLOAT = 4
WARM_UP, STEPS = 3, 4  # DDP arranges its buckets anew in the second step
RECEIVED = 128  # `tcpi_bytes_received` in Linux's `struct tcp_info`


@dataclass(frozen=True)
class Size:
    """Sizes on which the exchanges depend.

    Attributes:
        rows: Rows of a process.
        width: Width of every layer.
        depth: Number of layers.
        processes: Number of processes.
    """

    rows: int
    width: int
    depth: int
    processes: int


def of_matrix(size: Size) -> float:
    """An all-reduced Gram matrix: each part goes round the ring twice."""
    return 2 * size.width**2 * FLOAT * (size.processes - 1) / size.processes


def of_rows(size: Size) -> float:
    """Gathered rows: a process receives those of all others."""
    return (size.processes - 1) * size.rows * size.width * FLOAT


def of_vne(size: Size) -> float:
    """For each layer the matrix or the rows, whichever moves fewer bytes."""
    form = exchange_form(size.rows * size.processes, size.width)
    return size.depth * (of_rows(size) if form == "rows" else of_matrix(size))


def of_queue(size: Size) -> float:
    """For each layer the rows, which are remembered."""
    return size.depth * of_rows(size)


def of_stable_rank(size: Size) -> float:
    """Each layer's gradient comes from the one process that computed it; the mean over processes."""
    whole = size.width**2 * FLOAT
    owners = share_out([size.width**3] * size.depth, size.processes)
    return statistics.fmean(whole * (size.depth - owners.count(rank)) for rank in range(size.processes))


def of_spectrum(size: Size) -> float:
    """Each layer's singular values, in the same way."""
    owners = share_out([size.width**3] * size.depth, size.processes)
    return statistics.fmean(size.width * FLOAT * (size.depth - owners.count(rank)) for rank in range(size.processes))


def of_monitor(size: Size) -> float:
    """For each layer the Gram matrices of all other processes, in float64, once an epoch."""
    return (size.processes - 1) * size.depth * size.width**2 * 8


@dataclass(frozen=True)
class Case:
    """A callback with its formula.

    Attributes:
        make: Makes it.
        formula: Bytes that a process receives each time.
        unit: What "each time" is.
        sizes: The sizes it is measured at, without the number of processes.
    """

    make: Callable[[], Callback]
    formula: Callable[[Size], float]
    unit: str
    sizes: tuple[tuple[int, int, int], ...]


CASES = {
    "VNERegularization": Case(
        lambda: VNERegularization("layers.*", 0.1),
        of_vne,
        "step",
        ((128, 64, 2), (512, 128, 2), (16, 256, 2), (128, 64, 6)),
    ),
    "VNERegularization, queue": Case(
        lambda: VNERegularization("layers.*", 0.1, queue_size=256), of_queue, "step", ((64, 128, 2),)
    ),
    "StableRankRegularization": Case(
        lambda: StableRankRegularization("layers.*", 0.01), of_stable_rank, "step", ((16, 128, 8), (16, 256, 3))
    ),
    "SpectrumMonitor": Case(
        lambda: SpectrumMonitor("layers.*", every_n_steps=1, figures=False), of_spectrum, "look", ((16, 256, 8),)
    ),
    "RepresentationMonitor": Case(
        lambda: RepresentationMonitor("layers.*", every_n_steps=1, metrics=["entropy"], figures=False),
        of_monitor,
        "epoch",
        ((16, 128, 2), (64, 256, 2)),
    ),
}
# Callbacks whose state is the same on every process without an exchange, or that exchange some numbers now and then.
REST = {
    "MaskScheduling, RankScheduling, HybridCompression": "each step the gradients of the scores and thresholds: one "
    "number for each channel and each singular value; once, at the end, the choice",
    "LowRankCompression": "as StableRankRegularization while it regularizes; once the search's evaluations, one number "
    "for each",
    "LayerProbe": "at the end of an epoch the sums of each layer, as RepresentationMonitor",
    "AttributionEvaluation": "at the end of an epoch some numbers for each method and metric",
    "EarlyTermination": "at the end of an epoch the decision, some bytes",
    "CalibrationRecorder": "nothing in a step",
}


class Layers(LightningModule):
    """As many square layers as wanted."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(depth))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        for layer in self.layers:
            batch = layer(batch).tanh()
        return batch.square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-3)


def received() -> int:
    """Bytes received over all TCP connections of this process."""
    total = 0
    for entry in os.listdir("/proc/self/fd"):
        try:
            if not os.readlink(f"/proc/self/fd/{entry}").startswith("socket:"):
                continue
            with socket.socket(fileno=os.dup(int(entry))) as copy:
                if copy.type != socket.SOCK_STREAM or copy.family not in {socket.AF_INET, socket.AF_INET6}:
                    continue
                info = copy.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
        except OSError:  # closed meanwhile, or none that listens
            continue
        total += struct.unpack_from("Q", info, RECEIVED)[0]
    return total


class Counts(Callback):
    """Counts before steps, when all that belongs to the steps before has been waited for, and at the end of epochs."""

    def __init__(self) -> None:
        self.at_steps: list[int] = []
        self.before_epoch_end = self.after = 0

    def on_train_batch_start(self, *_: Any) -> None:
        dist.barrier()
        self.at_steps.append(received())

    def on_train_epoch_end(self, *_: Any) -> None:
        dist.barrier()
        self.before_epoch_end = received()

    def on_train_end(self, *_: Any) -> None:
        dist.barrier()
        self.after = received()


def train(size: Size, callbacks: list[Callback]) -> dict[str, float]:
    """Bytes that this process receives for a step, and at the end of the epoch."""
    torch.manual_seed(0)
    counts = Counts()
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = Trainer(
        accelerator="cpu",
        devices=size.processes,
        strategy="ddp",
        max_epochs=1,
        use_distributed_sampler=False,
        callbacks=[counts, *callbacks],
        **quiet,
    )
    data = torch.utils.data.DataLoader([torch.randn(size.rows, size.width)] * (WARM_UP + STEPS), batch_size=None)
    trainer.fit(Layers(size.width, size.depth), data)
    at = counts.at_steps
    return {"step": (at[-1] - at[WARM_UP - 1]) / STEPS, "epoch": counts.after - counts.before_epoch_end}


def work(rank: int, processes: int, folder: str) -> None:
    """All cases, on one of the processes."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(processes), NODE_RANK="0")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29500", GLOO_SOCKET_IFNAME="lo")
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/init", rank=rank, world_size=processes, timeout=timedelta(seconds=600)
    )
    found = []
    for name, case in CASES.items():
        for shape in case.sizes:
            size = Size(*shape, processes)
            key = "epoch" if case.unit == "epoch" else "step"
            extra = train(size, [case.make()])[key] - train(size, [])[key]
            every: list[Any] = [None] * processes
            dist.all_gather_object(every, extra)
            found.append({"case": name, "size": asdict(size), "bytes": statistics.fmean(every)})
    if rank == 0:
        Path(folder, "found.json").write_text(json.dumps(found))
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # the interpreter's own end may meet a thread of gloo


def run(path: Path, processes: tuple[int, ...]) -> None:
    """Count, and write the JSON; more processes are added to what is there."""
    report = json.loads(path.read_text()) if path.exists() else {"counted": []}
    for count in processes:
        with tempfile.TemporaryDirectory() as folder:
            if count > 1:
                multiprocessing.start_processes(work, (count, folder), nprocs=count, start_method="spawn")
                new = json.loads(Path(folder, "found.json").read_text())
            else:  # without other processes there is no connection
                new = [
                    {"case": name, "size": asdict(Size(*shape, 1)), "bytes": 0.0}
                    for name, case in CASES.items()
                    for shape in case.sizes
                ]
        kept = [line for line in report["counted"] if line["size"]["processes"] != count]
        report = {"about": describe_machine("cpu"), "counted": [*kept, *new]}
        path.write_text(json.dumps(report, indent=1) + "\n")


def kilobytes(value: float) -> str:
    return f"{value / 1e3:,.1f}"


def page(report: dict[str, Any]) -> str:
    """The page, from the JSON."""
    lines, worst = [], 0.0
    for line in sorted(report["counted"], key=lambda line: list(CASES).index(line["case"])):
        size = Size(**line["size"])
        if size.processes == 1:
            continue
        said = CASES[line["case"]].formula(size)
        ratio = line["bytes"] / said
        worst = max(worst, abs(ratio - 1))
        numbers = (size.rows, size.width, size.depth, size.processes)
        lines.append((line["case"], *map(str, numbers), kilobytes(line["bytes"]), kilobytes(said), f"{ratio:.3f}"))
    header = ("callback", "rows", "width", "layers", "processes", "counted, kB", "formula, kB", "ratio")
    far = [
        (name, case.unit, *(kilobytes(case.formula(Size(32, 512, 4, ranks)) / 1e3) for ranks in (8, *EXTRAPOLATED)))
        for name, case in CASES.items()
    ]
    rest = "\n".join(f"- {name}: {text}." for name, text in REST.items())
    return PAGE.format(
        about=report["about"],
        counted=markdown_table(header, lines),
        worst=math.ceil(100 * worst),
        far=markdown_table(("callback", "each", *(f"{n} processes, MB" for n in (8, *EXTRAPOLATED))), far),
        formulas="\n".join(f"- **{name}**, each {case.unit}. {case.formula.__doc__}" for name, case in CASES.items()),
        rest=rest,
    )


PAGE = """# What the callbacks exchange

<!-- written by `benchmarks/scaling.py`; do not edit -->

How many bytes a process receives for a callback, on top of what data parallelism exchanges for the same model. Counted
by the kernel for gloo's connections between processes of one machine; the mean over the processes. {about}.

No times are given: the machine was busy with other work, and processes that share two cores say nothing of a network.

## The formulas

Of `W` processes, float32 unless said otherwise:

{formulas}

Beside these each term of `VNERegularization` exchanges three integers and one number of each process, which are left
out.

Not counted here, for what they exchange is small or the same:

{rest}

## Counted

The largest deviation from the formula is {worst} %.

{counted}

## Extrapolated

By the formulas, for 32 rows on each process, four layers of width 512. What is assumed: the algorithms stay the same
(rings for what is reduced and gathered; each byte that is broadcast arrives once), all processes have as many rows, and
nothing is shared out over the levels of a network. The bytes that a process receives are bounded in the number of
processes wherever matrices are reduced (`2 d^2`) or broadcast (`d^2` a layer), since rows are gathered only as long as
that is cheaper; they grow with it where Gram matrices are gathered (`RepresentationMonitor`, `LayerProbe`) and for a
queue, whose rows every process remembers. What a ring takes in *time* grows with the number of processes by its latency
even where the bytes do not.

{far}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("do", choices=("run", "page"))
    parser.add_argument("json", type=Path)
    parser.add_argument("page", type=Path, nargs="?")
    parser.add_argument("--processes", type=int, nargs="+", default=PROCESSES)
    arguments = parser.parse_args()
    if arguments.do == "run":
        run(arguments.json, tuple(arguments.processes))
    else:
        text = page(json.loads(arguments.json.read_text()))
        arguments.page.write_text(text)


if __name__ == "__main__":
    main()
