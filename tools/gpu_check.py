"""Check the package on one GPU within eight minutes, and measure its costs there; or in a small version on a CPU.

    python tools/gpu_check.py                        # all parts, into gpu_check.json
    python tools/gpu_check.py --parts syncs tables   # some
    python tools/gpu_check.py --device cpu --tiny    # what the tests run

It needs the package, torch and Lightning; items that need timm or torch-pruning are reported as "not installed". The
file is written after every item. The exit status is 1 if an item failed, or time ran out before it.
`tools/gpu_tables.py` writes the page with the tables from the file.
"""

import argparse
import datetime
import importlib
import importlib.metadata
import logging
import os
import platform
import signal
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(Path(__file__).parent), str(ROOT), str(ROOT / "benchmarks")]

import torch
from gpu_parts.recorder import OutOfTimeError, Recorder

# The parts, with their share of the eight minutes.
PARTS = {"numerics": 40, "contract": 150, "half": 60, "compiled": 100, "syncs": 60, "tables": 200}
MARGIN = 20.0  # seconds: items check the clock themselves, and the alarm is for those that take too long
DISTRIBUTIONS = ("lightning", "pytorch-lightning", "torchmetrics", "timm", "torchvision", "torch-pruning")


def about(device: str) -> dict[str, Any]:
    """Machine, versions and date of the check."""
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    for name in DISTRIBUTIONS:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    described: dict[str, Any] = {"device": platform.processor() or platform.machine(), "versions": versions}
    if device == "cuda":
        memory = torch.cuda.get_device_properties(0).total_memory / 2**30
        described |= {"device": torch.cuda.get_device_name(), "memory_gib": round(memory, 1)}
        described |= {"cuda": torch.version.cuda, "nccl": ".".join(map(str, torch.cuda.nccl.version()))}
    described["date"] = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    return described


def ring(signum: int, frame: FrameType | None) -> None:
    raise OutOfTimeError


def run_part(recorder: Recorder, name: str, seconds: float) -> None:
    """Run a part; an error outside its items, such as in its imports, becomes a separate item."""
    signal.signal(signal.SIGALRM, ring)
    with recorder.within(seconds), recorder.item(name, "part") as data:
        signal.setitimer(signal.ITIMER_REAL, max(0.1, recorder.left() + MARGIN))
        try:
            importlib.import_module(f"gpu_parts.{name}").run(recorder)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        data["items"] = len(recorder.parts.get(name, {}))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(), help="the folder for gpu_check.json")
    parser.add_argument("--parts", nargs="+", choices=tuple(PARTS), default=list(PARTS))
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--budget-s", type=float, default=480.0, help="seconds for all parts")
    parser.add_argument("--tiny", action="store_true", help="sizes of a test")
    chosen = parser.parse_args(arguments)
    if chosen.device == "cuda" and not torch.cuda.is_available():
        parser.error("`--device cuda` needs a GPU that torch can use; `--device cpu --tiny` runs the check on the CPU")
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # the host's name need not resolve
    importlib.import_module("lightning.pytorch")  # which sets the level of its logger
    for logger in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(logger).setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    chosen.out.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    recorder = Recorder(
        chosen.out / "gpu_check.json", chosen.device, chosen.tiny, began + chosen.budget_s, about(chosen.device)
    )
    for name in chosen.parts:
        run_part(recorder, name, PARTS[name] * chosen.budget_s / 480)
    recorder.about["seconds"] = round(time.monotonic() - began, 1)
    recorder.save()
    failures = recorder.failures()
    print(f"\n{len(failures)} failed" + "".join(f"\n  {failure}" for failure in failures))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
