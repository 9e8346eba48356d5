"""Episodes, that is batches of few-shot tasks: reproducible, distributed over ranks, resumable."""

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, Dataset, Sampler

from lightning_plugins._checks import check_non_negative_int, check_positive_int
from lightning_plugins.distributed import is_distributed, world_size
from lightning_plugins.meta.loop.structure import tasks_together
from lightning_plugins.meta.task_sets.base import Batch, TaskSet

Key = tuple[int, int]  # the epoch, and the episode's number in it


class EpisodeSampler(Sampler[list[Key]]):
    """Determines which episodes form each batch, and which of them belong to this rank.

    Rank ``r`` of ``n`` gets the tasks ``r``, ``r + n`` and so on of a batch: together the ranks have every task once,
    and their counts differ by at most one. In training every batch must have a task for each rank; with ``fixed``
    episodes all but the last one must.

    Args:
        episodes: Number of episodes per epoch, of all ranks together.
        tasks_per_batch: Number of episodes in a batch, of all ranks together; the last batch may be smaller.
        fixed: Whether every epoch repeats the episodes of the first, as validation and test should.

    Raises:
        TypeError: If a number is not an int.
        ValueError: If one is less than 1.

    Example:
        >>> list(EpisodeSampler(episodes=5, tasks_per_batch=2))
        [[(0, 0), (0, 1)], [(0, 2), (0, 3)], [(0, 4)]]
    """

    def __init__(self, episodes: int, tasks_per_batch: int, *, fixed: bool = False) -> None:
        self.episodes = check_positive_int("episodes", episodes)
        self.tasks_per_batch = check_positive_int("tasks_per_batch", tasks_per_batch)
        self.fixed = fixed
        self.epoch = 0
        self.start = 0  # batch at which the next epoch starts: nonzero only after loading a state

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that begins next.

        Args:
            epoch: Its number, from 0.
        """
        if check_non_negative_int("epoch", epoch) != self.epoch:  # discard the rest of another epoch
            self.epoch, self.start = epoch, 0

    def __len__(self) -> int:
        """Number of this rank's batches in a whole epoch."""
        ranks, full, rest = world_size(), *divmod(self.episodes, self.tasks_per_batch)
        first, last = min(self.episodes, self.tasks_per_batch), rest or self.tasks_per_batch
        if (least := first if self.fixed else last) < ranks:  # a rank without a task would block the others
            raise ValueError(
                f"`tasks_per_batch` must leave a task for each of the {ranks} ranks, got a batch of {least} with"
                f" `tasks_per_batch={self.tasks_per_batch}` and `episodes={self.episodes}`"
            )
        rank = _rank()
        return full * (self.tasks_per_batch > rank) + (rest > rank)

    def __iter__(self) -> Iterator[list[Key]]:
        start, self.start = self.start, 0
        epoch = 0 if self.fixed else self.epoch
        for batch in range(start, len(self)):
            first = batch * self.tasks_per_batch
            behind = min(first + self.tasks_per_batch, self.episodes)
            yield [(epoch, number) for number in range(first + _rank(), behind, world_size())]


class EpisodeLoader:
    """Loads batches of episodes ``((support_x, support_y), (query_x, query_y))`` of shapes ``(tasks, samples, ...)``.

    An episode is determined by the seed, the epoch and its index: it does not depend on the batch size or the number of
    ranks or worker processes, and random transforms of the samples are determined in the same way. Under DDP the loader
    distributes the tasks of a batch itself; Lightning adds no sampler, because this is not a
    ``torch.utils.data.DataLoader``. In your own loop every pass over the loader is the next epoch, even after an
    incomplete pass; under Lightning the Trainer sets the epoch. The state is a position: after loading it, the epoch
    continues after the last batch returned. Tasks that differ in their number of samples are returned as lists.

    Args:
        tasks: The source of tasks.
        episodes: Number of episodes per epoch, of all ranks together.
        tasks_per_batch: Number of episodes in a batch, of all ranks together; the last batch may be smaller.
        seed: Seed of the episodes.
        fixed: Whether every epoch has the same episodes, as validation and test should.
        num_workers: Number of worker processes; 0 draws in this process, which is faster unless images must be read
            from files.

    Raises:
        TypeError: If ``tasks`` is not a `TaskSet` or a number not an int.
        ValueError: If a number is out of range.

    Example:
        >>> from lightning_plugins.meta import Sinusoid
        >>> loader = EpisodeLoader(Sinusoid(shots=5), episodes=100, tasks_per_batch=25)
        >>> len(loader)
        4
        >>> support, query = next(iter(loader))
        >>> support[0].shape, query[0].shape
        (torch.Size([25, 5, 1]), torch.Size([25, 10, 1]))
    """

    def __init__(
        self,
        tasks: TaskSet,
        episodes: int,
        tasks_per_batch: int = 4,
        *,
        seed: int = 0,
        fixed: bool = False,
        num_workers: int = 0,
    ) -> None:
        if not isinstance(tasks, TaskSet):
            raise TypeError(
                f"`tasks` must be a `TaskSet`, got {type(tasks).__name__}; `FewShot` makes one of a labelled dataset"
            )
        self.sampler = EpisodeSampler(episodes, tasks_per_batch, fixed=fixed)
        self.batch_sampler = self.sampler  # Lightning looks for both and sets the epoch
        workers = check_non_negative_int("num_workers", num_workers)
        self._loader = DataLoader(
            _Drawn(tasks, check_non_negative_int("seed", seed)),
            batch_sampler=self.sampler,
            collate_fn=_joined,
            num_workers=workers,
            persistent_workers=workers > 0,
            generator=torch.Generator().manual_seed(0),  # for the workers' seeds: leaves the global generator unchanged
        )
        self._position = 0  # batches returned in this epoch
        self._begun: int | None = None  # epoch of an unfinished pass

    def set_epoch(self, epoch: int) -> None:
        """Set the next epoch.

        Args:
            epoch: Its number, from 0.
        """
        self.sampler.set_epoch(epoch)
        self._begun = None

    def __len__(self) -> int:
        """Number of this rank's batches in a whole epoch."""
        return len(self.sampler)

    def __iter__(self) -> Iterator[Batch]:
        """Yield the batches of one epoch, or the rest of it after loading a state."""
        if self._begun == self.sampler.epoch:  # the previous pass was incomplete and the epoch not advanced
            self.sampler.set_epoch(self.sampler.epoch + 1)
        self._begun, self._position = self.sampler.epoch, self.sampler.start
        for batch in self._loader:
            self._position += 1
            if self._position == len(self):  # before the last batch is returned: the caller may not ask for another
                self._begun, self._position = None, 0
                self.sampler.set_epoch(self.sampler.epoch + 1)
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Return the position.

        Returns:
            The epoch, and the number of batches returned in it.
        """
        return {"epoch": self.sampler.epoch, "batch": self._position}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a saved state.

        Args:
            state_dict: What `state_dict` returned.

        Raises:
            TypeError: If it does not hold two ints.
            ValueError: If one is missing or negative, or the epoch has fewer batches than were returned.
        """
        if missing := [name for name in ("epoch", "batch") if name not in state_dict]:
            raise ValueError(f"`state_dict` must hold 'epoch' and 'batch', got no {missing[0]!r}")
        epoch, batch = (check_non_negative_int(f"state_dict[{n!r}]", state_dict[n]) for n in ("epoch", "batch"))
        if batch >= len(self):
            raise ValueError(
                f"`state_dict` must be that of a loader with as many batches, {len(self)}, got one after"
                f" {batch} of them; keep `episodes` and `tasks_per_batch`, or load no state"
            )
        self.set_epoch(epoch)
        self.sampler.start = self._position = batch


class _Drawn(Dataset[Batch]):
    """The episodes by key, each a batch of one task."""

    def __init__(self, tasks: TaskSet, seed: int) -> None:
        self.tasks, self.seed = tasks, seed

    def __getitem__(self, key: Key) -> Batch:
        seed = int.from_bytes(hashlib.blake2b(repr((self.seed, *key)).encode(), digest_size=8).digest())
        with _seeded(seed):
            return self.tasks.sample(1, torch.Generator().manual_seed(seed))


def _joined(episodes: list[Batch]) -> Any:
    """Stack tasks into tensors; lists of tasks if they differ in their number of samples."""
    return tuple(
        tuple(tasks_together(parts) for parts in zip(*pairs, strict=True)) for pairs in zip(*episodes, strict=True)
    )


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed the global generators, which random transforms use, and restore them afterwards."""
    numpy_state, state = np.random.get_state(), random.getstate()  # noqa: NPY002 - what transforms draw from
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # CPU only, not the devices
        np.random.seed(seed % 2**32)  # noqa: NPY002
        random.seed(seed)
        try:
            yield
        finally:
            np.random.set_state(numpy_state)  # noqa: NPY002
            random.setstate(state)


def _rank() -> int:
    return dist.get_rank() if is_distributed() else 0
