"""Bytes exchanged by the callbacks and their time on 1, 2, 4 and 8 processes, compared with the count on paper.

    python benchmarks/scaling.py              # measures what docs/benchmarks/scaling.json lacks, and shows the page
    python benchmarks/scaling.py --again      # measures everything
    python benchmarks/scaling.py --page docs/benchmarks/scaling.md      # only writes the page of what is stored

The counted bytes are those received over the TCP connections of a process according to the kernel (gloo's, on one
machine), between the starts of two steps, minus those of the same training without the callback.
"""

import argparse
import itertools
import json
import os
import socket
import statistics
import struct
import sys
import tempfile
import time
import warnings
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, multiprocessing

sys.path.insert(0, str(Path(__file__).resolve().parent))
from _report import describe_machine
from _scaling_cases import CASES, Layers, Unit, data_of
from _scaling_exchanges import BATCHES, PLAIN, Kind, Size
from _scaling_page import page

STORE = Path(__file__).resolve().parents[1] / "docs" / "benchmarks" / "scaling.json"
LINKED = STORE.with_name("two_machines.json")
PROCESSES = (1, 2, 4, 8)
WARM_UP = 3  # DDP rebuilds its buckets in the second step
RECEIVED = 128  # `tcpi_bytes_received` in Linux's `struct tcp_info`
REPEATS = 20


class Module(LightningModule):
    """Trains the layers with a mean square loss."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.net = Layers(size.width, size.depth)
        self.example_input_array = torch.zeros(2, size.width)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self(batch[0]).square().mean()

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self(batch[0])

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
        except OSError:  # closed meanwhile, or not connected
            continue
        total += struct.unpack_from("Q", info, RECEIVED)[0]
    return total


class Counts(Callback):
    """Counts before steps, after all work of earlier steps has finished, and around the ends of epochs.

    It is placed before the measured callback.
    """

    def __init__(self) -> None:
        self.bytes: list[int] = []
        self.wall: list[float] = []
        self.processor: list[float] = []
        self.at: dict[str, int] = {}

    def _mark(self, name: str) -> None:
        dist.barrier()
        self.at[name] = received()

    def on_train_batch_start(self, *_: Any) -> None:
        dist.barrier()
        self.bytes.append(received())
        self.wall.append(time.perf_counter())
        self.processor.append(time.process_time())

    def on_train_epoch_end(self, *_: Any) -> None:
        self._mark("epoch begins")

    def on_train_end(self, *_: Any) -> None:
        self._mark("epoch ends")

    def on_validation_epoch_end(self, *_: Any) -> None:
        self._mark("validation begins")

    def on_validation_end(self, *_: Any) -> None:
        self._mark("validation ends")


def train(size: Size, unit: Unit, callbacks: list[Callback], *, nodes: int = 1) -> dict[str, float]:
    """Bytes received by this process per unit; seconds of the fastest step, and CPU seconds per step."""
    count = Counts()
    fit(size, [count, *callbacks], data_of(size), nodes=nodes, validates=unit == "validation")
    extra = count.bytes[-1] - count.bytes[WARM_UP - 1] if unit == "step" else None
    steps = BATCHES - WARM_UP
    wall = min(after - before for before, after in itertools.pairwise(count.wall[WARM_UP - 1 :]))
    processor = (count.processor[-1] - count.processor[WARM_UP - 1]) / steps
    each = count.at[f"{unit} ends"] - count.at[f"{unit} begins"] if extra is None else extra / steps
    return {"bytes": each, "wall": wall, "processor": processor}


def fit(size: Size, callbacks: list[Callback], data: Any, *, nodes: int = 1, validates: bool = False) -> Module:
    """A training run, with validation if it ``validates``."""
    torch.manual_seed(0)
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = Trainer(
        accelerator="cpu",
        devices=size.processes // nodes,
        num_nodes=nodes,
        strategy="ddp",
        max_epochs=1,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        callbacks=callbacks,
        **quiet,
    )
    module, loader = Module(size), torch.utils.data.DataLoader(data, batch_size=None)
    trainer.fit(module, loader, loader if validates else None)
    return module


def plain_exchanges(processes: int) -> dict[str, float]:
    """Bytes received by a process for an exchange without a callback."""
    found = {}
    for name, (kind, items) in PLAIN.items():
        own, at = torch.zeros(items), []
        for repeats in (0, REPEATS):
            dist.barrier()
            before = received()
            for _ in range(repeats):
                exchange(kind, own, processes)
            dist.barrier()
            at.append(received() - before)
        found[name] = mean((at[1] - at[0]) / REPEATS, processes)
    return found


def exchange(kind: Kind, own: Tensor, processes: int) -> None:
    if kind == "reduce":
        dist.all_reduce(own)
    elif kind == "gather":
        dist.all_gather([torch.empty_like(own) for _ in range(processes)], own)
    else:
        dist.broadcast(own, 0)


def mean(value: float, processes: int) -> float:
    every: list[Any] = [None] * processes
    dist.all_gather_object(every, value)
    return statistics.fmean(every)


def work(rank: int, processes: int, folder: str) -> None:
    """All cases, on one of the processes."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(processes), NODE_RANK="0")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29500", GLOO_SOCKET_IFNAME="lo")
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/init", rank=rank, world_size=processes, timeout=timedelta(seconds=600)
    )
    found: list[dict[str, Any]] = []
    bare: dict[tuple[Size, Unit], dict[str, float]] = {}
    for name, case in CASES.items():
        for shape in case.sizes:
            size = Size(*shape, processes)
            if (size, case.unit) not in bare:
                bare[size, case.unit] = train(size, case.unit, [])
            without, with_it = bare[size, case.unit], train(size, case.unit, [case.make(size)])
            extra = {key: mean(with_it[key] - without[key], processes) for key in without}
            step = mean(without["wall"], processes)
            found.append({"case": name, "size": asdict(size), **extra, "step": step})
    plain = plain_exchanges(processes)
    if rank == 0:
        about = describe_machine("cpu")
        Path(folder, "found.json").write_text(json.dumps({"about": about, "plain": plain, "measured": found}))
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # interpreter shutdown may collide with a gloo thread


def run(processes: list[int], again: bool) -> None:
    """Measure missing cases; results are stored after each number of processes."""
    multiprocessing.get_context("forkserver").set_forkserver_preload(
        ["lightning.pytorch", "lightning_plugins.callbacks"]
    )
    for count in processes:
        report = load()
        if str(count) in report and not again:
            continue
        with tempfile.TemporaryDirectory() as folder:
            multiprocessing.start_processes(work, (count, folder), nprocs=count, start_method="forkserver")
            report[str(count)] = json.loads(Path(folder, "found.json").read_text())
        STORE.write_text(json.dumps(dict(sorted(report.items(), key=lambda item: int(item[0]))), indent=1) + "\n")


def load() -> dict[str, Any]:
    return json.loads(STORE.read_text()) if STORE.exists() else {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--processes", type=int, nargs="+", default=list(PROCESSES))
    parser.add_argument("--again", action="store_true", help="also what is stored")
    parser.add_argument("--page", type=Path, help="only write the page of what is stored to this file")
    arguments = parser.parse_args()
    if arguments.page is not None:
        arguments.page.write_text(page(load(), json.loads(LINKED.read_text())))
        return
    run(arguments.processes, arguments.again)
    print(page(load(), json.loads(LINKED.read_text())))


if __name__ == "__main__":
    main()
