"""Trainings in forked processes that are killed at a step, for tests of what resumes from their checkpoints."""

import os
import signal
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from tests._processes import START

SECONDS = 300


class Killed(Callback):
    """Ends the process where a step would begin, as a scheduler of jobs does: nothing runs thereafter."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def saving(folder: Path | str, *, every: int = 1) -> ModelCheckpoint:
    """Writes ``step=<number>.ckpt`` every so many steps."""
    return ModelCheckpoint(folder, filename="{step}", every_n_train_steps=every, save_top_k=-1)


def run_in_nursery(nursery: Callable[[Path], None], folder: Path, seconds: float = SECONDS) -> None:
    """Call ``nursery(folder)``, which forks trainings, in a process that has imported everything and computed nothing.

    Raises:
        TimeoutError: If it did not end.
        RuntimeError: If it failed; its traceback stands in the output.
    """
    process = START.Process(target=_prepared, args=(nursery, folder))
    process.start()
    process.join(timeout=seconds)
    alive = process.is_alive()
    process.kill()
    if alive:
        raise TimeoutError(f"the trainings did not end within {seconds} s")
    if process.exitcode:
        raise RuntimeError(f"the trainings failed with {process.exitcode}")


def fork_ranks(ranks: int, folder: Path, name: str, train: Callable[..., Any], *args: Any) -> None:
    """Call ``train(rank, *args)`` on forked ranks, and keep what it returns in ``<name>-<rank>.pt``.

    Raises:
        RuntimeError: If one of them failed.
    """
    if any(ends := _ends(ranks, folder, name, train, args)):
        raise RuntimeError(f"{name} in {folder.name} ended with {ends}")


def fork_to_be_killed(ranks: int, folder: Path, train: Callable[..., Any], *args: Any) -> None:
    """Call ``train(rank, *args)`` on forked ranks, which are to be killed.

    Raises:
        RuntimeError: If one of them ended in another way.
    """
    ends = _ends(ranks, folder, "killed", train, args)
    if not all(os.WIFSIGNALED(end) and os.WTERMSIG(end) == signal.SIGKILL for end in ends):
        raise RuntimeError(f"{folder.name} was not killed but ended with {ends}")


def _prepared(nursery: Callable[[Path], None], folder: Path) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    nursery(folder)


def _ends(ranks: int, folder: Path, name: str, train: Callable[..., Any], args: tuple[Any, ...]) -> list[int]:
    """Exit status of each process, as ``waitpid`` tells it."""
    children = []
    for rank in range(ranks):
        child = os.fork()
        if child == 0:
            os._exit(_run(rank, ranks, folder, name, train, args))
        children.append(child)
    return [os.waitpid(child, 0)[1] for child in children]


def _run(rank: int, ranks: int, folder: Path, name: str, train: Callable[..., Any], args: tuple[Any, ...]) -> int:
    torch.set_num_threads(1)  # makes the thread pool anew; threads of a checkpoint would race for the fork's broken one
    try:
        if ranks > 1:
            init = f"file://{folder}/init-{name}"
            dist.init_process_group("gloo", init, rank=rank, world_size=ranks, timeout=timedelta(seconds=SECONDS))
        torch.save(train(rank, *args), folder / f"{name}-{rank}.pt")
        if ranks > 1:
            dist.barrier()
    except BaseException:  # noqa: BLE001 - a forked process must not go on into the code of its parent
        traceback.print_exc()
        return 1
    return 0
