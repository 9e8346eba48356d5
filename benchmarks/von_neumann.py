"""Time of the von Neumann entropy, forward and backward, against the published formula.

    python benchmarks/von_neumann.py                  # the CPU
    python benchmarks/von_neumann.py --device cuda    # also checks that the matrix products never wait for the host
    python benchmarks/von_neumann.py --quick          # four shapes

Both formulas run in turns, so that what else the machine does falls on both; the ratio is the median over the pairs.
"""

import argparse
import math
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from _report import describe_machine
from torch import Tensor

from lightning_plugins.functional import von_neumann_entropy

ROWS, COLUMNS = (64, 256, 1024, 4096), (128, 512, 1024, 2048)
QUICK = [(64, 128), (64, 512), (256, 128), (256, 512)]


def published(embeddings: Tensor) -> Tensor:
    rows = F.normalize(embeddings, dim=1)
    values = torch.svd(rows / math.sqrt(len(rows)))[1].square()
    return -(values * values.log()).nansum()


def step(entropy: Callable[[Tensor], Tensor], embeddings: Tensor) -> None:
    embeddings.grad = None
    entropy(embeddings).backward()


def seconds(entropy: Callable[[Tensor], Tensor], embeddings: Tensor) -> float:
    if embeddings.is_cuda:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        step(entropy, embeddings)
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3
    begin_time = time.perf_counter()
    step(entropy, embeddings)
    return time.perf_counter() - begin_time


def time_pairs(ours: Callable[[Tensor], Tensor], embeddings: Tensor, budget: float) -> tuple[float, float, float, int]:
    """Median seconds of the published formula and of ours, median ratio, and number of pairs."""
    step(ours, embeddings)
    step(published, embeddings)
    pairs: list[tuple[float, float]] = []
    stop = time.perf_counter() + budget
    while len(pairs) < 3 or (time.perf_counter() < stop and len(pairs) < 301):
        order = (published, ours) if len(pairs) % 2 else (ours, published)
        taken = {formula: seconds(formula, embeddings) for formula in order}
        pairs.append((taken[published], taken[ours]))
    old, new = zip(*pairs, strict=True)
    ratio = statistics.median(a / b for a, b in pairs)
    return statistics.median(old), statistics.median(new), ratio, len(pairs)


def indispensable_seconds(embeddings: Tensor) -> float:
    """Median seconds of what no exact method on a CPU does without.

    That is ``eigh`` of the smaller Gram matrix and two products: of the rows with themselves, for that matrix, and with
    its logarithm, for the gradient.
    """
    rows = F.normalize(embeddings.detach(), dim=1)
    wide = rows if len(rows) <= rows.shape[1] else rows.T
    taken = []
    for _ in range(4):
        begin = time.perf_counter()
        matrix = wide @ wide.T
        torch.linalg.eigh(matrix)
        matrix @ wide
        if matrix.is_cuda:
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - begin)
    return statistics.median(taken[1:])


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def peak_bytes(entropy: Callable[[Tensor], Tensor], embeddings: Tensor) -> int:
    """Most memory held during one step beyond what was held before it."""
    if embeddings.is_cuda:
        step(entropy, embeddings)
        embeddings.grad = None
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step(entropy, embeddings)
        return torch.cuda.max_memory_allocated() - before
    step(entropy, embeddings[:4].detach().requires_grad_())  # loads the libraries
    before, peak, done = resident_bytes(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.is_set():
            peak = max(peak, resident_bytes())
            time.sleep(2e-4)

    watcher = threading.Thread(target=watch)
    watcher.start()
    step(entropy, embeddings)
    done.set()
    watcher.join()
    return max(peak, resident_bytes()) - before


def peak_in_fresh_process(name: str, n: int, d: int) -> int:
    """On the CPU: the allocator of a used process holds memory back, which would hide a peak."""
    command = [sys.executable, __file__, "--peak", name, str(n), str(d)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def check_no_synchronisation(n: int, d: int) -> None:
    embeddings = torch.randn(n, d, device="cuda", requires_grad=True)
    step(lambda h: von_neumann_entropy(h, method="products"), embeddings)
    torch.cuda.set_sync_debug_mode("error")
    step(lambda h: von_neumann_entropy(h, method="products"), embeddings)
    torch.cuda.set_sync_debug_mode("default")
    print("products: no synchronisation with the host in forward and backward")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--method", default="auto", choices=("auto", "eigh", "products"))
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--seconds", type=float, default=3.0, help="time for each shape")
    parser.add_argument("--peak", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    ours = lambda h: von_neumann_entropy(h, method=arguments.method)  # noqa: E731  # one expression, used as a value
    if arguments.peak:
        name, n, d = arguments.peak
        embeddings = torch.randn(int(n), int(d), requires_grad=True)
        print(peak_bytes({"published": published, "ours": ours}[name], embeddings))
        return
    torch.manual_seed(0)
    print(f"{describe_machine(arguments.device)}; method {arguments.method}")
    if arguments.device == "cuda":
        check_no_synchronisation(1024, 512)
    print("|    N |    d | published ms | ours ms | ratio | eigh and products ms | pairs | published MiB | ours MiB |")
    print("| ---: | ---: | -----------: | ------: | ----: | -------------------: | ----: | ------------: | -------: |")
    ratios, bounds = [], []
    for n, d in QUICK if arguments.quick else [(n, d) for n in ROWS for d in COLUMNS]:
        embeddings = torch.randn(n, d, device=arguments.device, requires_grad=True)
        old, new, ratio, pairs = time_pairs(ours, embeddings, arguments.seconds)
        if arguments.device == "cuda":
            peaks = [peak_bytes(formula, embeddings) / 2**20 for formula in (published, ours)]
        else:
            peaks = [peak_in_fresh_process(name, n, d) / 2**20 for name in ("published", "ours")]
        ratios.append(ratio)
        least = indispensable_seconds(embeddings)
        bounds.append(old / least)
        print(
            f"| {n:4} | {d:4} | {1e3 * old:12.2f} | {1e3 * new:7.2f} | {ratio:5.2f} | {1e3 * least:20.2f} | {pairs:5}"
            f" | {peaks[0]:13.1f} | {peaks[1]:8.1f} |",
            flush=True,
        )
    print(f"least {min(ratios):.2f}, geometric mean {statistics.geometric_mean(ratios):.2f}")
    least, mean = min(bounds), statistics.geometric_mean(bounds)
    print(f"published / (eigh and products): least {least:.2f}, geometric mean {mean:.2f}")


if __name__ == "__main__":
    main()
