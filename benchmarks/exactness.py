"""Losses over several processes, here and in lightly: deviation of the gradient from that of one process.

A linear map is trained by each loss: once by one process on all rows, and once by two processes with half of the rows
each, or with 5 and 11 of 16, whose gradients are averaged as DDP does. Every loss is compared with itself, so that
conventions of its formula do not matter. lightly's losses need two views; their invariance, a mean over each process's
rows in any implementation, is disabled by its weight where there is one.

    pip install --no-deps lightly lightly_utils
    python benchmarks/exactness.py               # the table
    python benchmarks/exactness.py --write       # and docs/benchmarks/exactness.md
"""

import argparse
import importlib.metadata
import importlib.util
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from _report import describe_machine, markdown_table
from torch import Tensor, multiprocessing, nn

from lightning_plugins import regularizers

PAGE = Path(__file__).parents[1] / "docs" / "benchmarks" / "exactness.md"
ROWS, FEATURES, WIDTH = 16, 6, 4
SECONDS = 90  # a process group that waits longer for a rank hangs
Loss = Callable[[Tensor, Tensor], Tensor]


def of_term(make: Callable[[], nn.Module]) -> Callable[[], Loss]:
    def term() -> Loss:
        made = make()
        return lambda first, _: made(first)

    return term


def lightly(name: str, **settings: float) -> Callable[[], Loss]:
    def make() -> Loss:
        from lightly import loss

        made = getattr(loss, name)(gather_distributed=True, **settings)
        if name == "LeJEPALoss":
            return lambda first, second: made(local_proj=first[None], global_proj=torch.stack([first, second]))
        return made

    return make


LOSSES: dict[str, Callable[[], Loss]] = {
    "here: VonNeumannEntropy": of_term(regularizers.VonNeumannEntropy),
    "here: RenyiEntropy (FroSSL)": of_term(regularizers.RenyiEntropy),
    "here: CodingRate": of_term(regularizers.CodingRate),
    "here: VICRegVariance": of_term(regularizers.VICRegVariance),
    "here: VICRegCovariance": of_term(regularizers.VICRegCovariance),
    "here: Decorrelation": of_term(regularizers.Decorrelation),
    "here: SIGReg": of_term(regularizers.SIGReg),
    "here: SpreadOut": of_term(regularizers.SpreadOut),
    "lightly: VICRegLoss": lightly("VICRegLoss", lambda_param=0.0),
    "lightly: BarlowTwinsLoss": lightly("BarlowTwinsLoss"),
    "lightly: LeJEPALoss": lightly("LeJEPALoss", lambda_param=1.0),
}


def data() -> tuple[Tensor, Tensor, Tensor]:
    """Two views of all rows, and the map; each rank takes its rows of them."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(ROWS, FEATURES, generator=generator, dtype=torch.float64)
    other = x + 0.3 * torch.randn(ROWS, FEATURES, generator=generator, dtype=torch.float64)
    return x, other, 0.3 * torch.randn(FEATURES, WIDTH, generator=generator, dtype=torch.float64)


def gradient(name: str, rows: slice) -> Tensor:
    x, other, weight = data()
    weight.requires_grad_()
    torch.manual_seed(0)  # of directions that a loss draws
    loss = LOSSES[name]()
    (slope,) = torch.autograd.grad(loss(x[rows] @ weight, other[rows] @ weight), weight)
    return slope


def on_a_rank(rank: int, name: str, sizes: tuple[int, int], folder: str) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder}/init"
    wait = timedelta(seconds=SECONDS)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2, timeout=wait)
    begin = sum(sizes[:rank])
    slope = gradient(name, slice(begin, begin + sizes[rank]))
    dist.all_reduce(slope)
    torch.save(slope / 2, Path(folder, f"{rank}.pt"))
    dist.destroy_process_group()


def error(name: str, sizes: tuple[int, int]) -> str:
    """The relative error of the averaged gradient, or that there is none."""
    with tempfile.TemporaryDirectory() as folder:
        context = multiprocessing.start_processes(
            on_a_rank, (name, sizes, folder), nprocs=2, join=False, start_method="spawn"
        )
        deadline = time.monotonic() + SECONDS
        try:
            while not context.join(timeout=max(0.0, deadline - time.monotonic())):
                if time.monotonic() >= deadline:
                    return "hangs"
        except multiprocessing.ProcessRaisedException as raised:
            return f"raises {str(raised).strip().splitlines()[-1].partition(':')[0].rpartition('.')[2]}"
        except multiprocessing.ProcessExitedException:
            return "crashes"
        finally:
            for process in context.processes:
                if process.is_alive():
                    process.kill()
                    process.join()
        found = torch.load(Path(folder, "0.pt"))
    wanted = gradient(name, slice(None))
    return f"{float((found - wanted).norm() / wanted.norm()):.0e}"


TEXT = """# Gradients over several processes, here and in lightly

`python benchmarks/exactness.py --write`: {machine}; lightly {version}.

Distance between the gradient of two processes, averaged as in DDP, and that of one process on all rows, relative to its
norm, in float64. Every loss is compared with itself. lightly's losses have `gather_distributed=True`.

{table}

Batches of unequal sizes result from the last batch of an epoch, padded text and samplers without `drop_last`. lightly's
Barlow Twins loss standardises the rows of each process separately, so on two processes it is a different loss than on
one. Its LeJEPA loss is as exact as the terms here.

What lightly does better: its losses are complete two-view losses that include the invariance, and there are many more.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--losses", nargs="+", default=list(LOSSES))
    options = parser.parse_args()
    if importlib.util.find_spec("lightly") is None and any(name.startswith("lightly") for name in options.losses):
        parser.error("lightly is missing; install it, or name the others by `--losses`")
    lines = []
    for name in options.losses:
        lines.append((name, error(name, (8, 8)), error(name, (5, 11))))
        print(*lines[-1], flush=True)
    table = markdown_table(("loss", "8 and 8 rows", "5 and 11 rows"), lines)
    if options.write:
        version = importlib.metadata.version("lightly")
        PAGE.write_text(TEXT.format(machine=describe_machine("cpu"), version=version, table=table))


if __name__ == "__main__":
    main()
