"""Run a function on several processes that form a gloo process group, and collect what each returns."""

import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import multiprocessing

SECONDS = 300  # a hang ends the test; a busy machine must not
# All processes are forked from one that has imported what takes long, and computed nothing.
START = multiprocessing.get_context("forkserver")
START.set_forkserver_preload(["lightning.pytorch", "torch._dynamo", "hypothesis", "timm"])


def run_on_ranks(
    fn: Callable[..., Any], world_size: int, tmp_path: Path, *args: Any, seconds: float = SECONDS
) -> list[Any]:
    """Call ``fn(rank, *args)`` on ``world_size`` new processes and return their results in the order of the ranks.

    ``fn`` stands at the top level of its module, since the processes import it by name. The first error of a process
    ends all of them and is raised here with its traceback. The first call of a test run takes some seconds to start.
    """
    folder = tempfile.mkdtemp(dir=tmp_path)  # one test may call more than once
    context = multiprocessing.start_processes(
        _run, (fn, world_size, folder, args), nprocs=world_size, join=False, start_method="forkserver"
    )
    deadline = time.monotonic() + seconds
    try:
        while not context.join(timeout=max(0.0, deadline - time.monotonic())):
            if time.monotonic() >= deadline:
                raise TimeoutError(f"{fn.__qualname__} did not end on {world_size} ranks within {seconds} s")
    finally:
        for process in context.processes:
            if process.is_alive():
                process.kill()
                process.join()
    return [torch.load(Path(folder, f"{rank}.pt"), weights_only=False) for rank in range(world_size)]


@contextmanager
def counted_elements() -> Iterator[dict[str, int]]:
    """Count, in this process, the elements of the tensors that each kind of exchange is called with.

    A block that is gathered or broadcast counts once on every rank, so ``all_gather`` counts the rows of all ranks.
    """
    counts: dict[str, int] = {}

    def counted(name: str) -> Callable[..., Any]:
        exchange = getattr(dist, name)

        def call(tensors: Any, *args: Any, **kwargs: Any) -> Any:
            blocks = tensors if isinstance(tensors, list) else [tensors]
            counts[name] = counts.get(name, 0) + sum(block.numel() for block in blocks)
            return exchange(tensors, *args, **kwargs)

        return call

    with mock.patch.multiple(dist, **{name: counted(name) for name in ("all_reduce", "all_gather", "broadcast")}):
        yield counts


def _run(rank: int, fn: Callable[..., Any], world_size: int, folder: str, args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # the host's name need not resolve
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/init",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=SECONDS),
    )
    result = fn(rank, *args)
    torch.save(result, Path(folder, f"{rank}.pt"))
    dist.barrier()  # nobody leaves while others still talk
    dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # the interpreter's own end may meet a thread of gloo, and abort
