"""Episodes, that is batches of few-shot tasks: the same everywhere, shared out over ranks, resumable."""

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
    """Says which episodes form which batch, and which of them are this rank's.

    Of the batch's tasks rank ``r`` of ``n`` has those with the numbers ``r``, ``r + n`` and so on: together the ranks
    have every task once, and their counts differ by one at most. In training every batch must have a task for each
    rank, where episodes are ``fixed`` all but the last one.

    Args:
        episodes: Number of episodes of an epoch, of all ranks together.
        tasks_per_batch: Number of episodes in a batch, of all ranks together; the last batch may be smaller.
        fixed: Whether every epoch has the episodes of the first, as validation and test should.

    Raises:
        TypeError: If a number is no int.
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
        self.start = 0  # the batch at which the next epoch begins: behind 0 only after a state was loaded

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that begins next.

        Args:
            epoch: Its number, from 0.
        """
        if check_non_negative_int("epoch", epoch) != self.epoch:  # the rest of another one is not wanted any more
            self.epoch, self.start = epoch, 0

    def __len__(self) -> int:
        """Number of this rank's batches in a whole epoch."""
        ranks, full, rest = world_size(), *divmod(self.episodes, self.tasks_per_batch)
        first, last = min(self.episodes, self.tasks_per_batch), rest or self.tasks_per_batch
        if (least := first if self.fixed else last) < ranks:  # a rank without a task would keep the others waiting
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

    An episode follows from the seed, the epoch and its number in it: neither the size of the batches, nor the number of
    ranks or of worker processes changes it, and random transforms of the samples follow from them, too. Under DDP the
    loader shares the tasks of a batch out by itself; Lightning adds no sampler of its own, because this is no
    ``torch.utils.data.DataLoader``. In a loop of one's own, every pass over the loader is the next epoch, also behind a
    pass that was left early; Lightning sets the epoch. The state is a position: after it was loaded, the epoch goes on
    behind the last batch that was handed out. Tasks that differ in their number of samples come as lists.

    Args:
        tasks: What to draw from.
        episodes: Number of episodes of an epoch, of all ranks together.
        tasks_per_batch: Number of episodes in a batch, of all ranks together; the last batch may be smaller.
        seed: Chooses the episodes.
        fixed: Whether every epoch has the same episodes, as validation and test should.
        num_workers: Number of processes that draw ahead; 0 draws in this one, which is faster unless images must be
            read from files.

    Raises:
        TypeError: If ``tasks`` is no `TaskSet` or a number no int.
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
        self.batch_sampler = self.sampler  # Lightning looks for both, and sets the epoch of what it finds
        workers = check_non_negative_int("num_workers", num_workers)
        self._loader = DataLoader(
            _Drawn(tasks, check_non_negative_int("seed", seed)),
            batch_sampler=self.sampler,
            collate_fn=_joined,
            num_workers=workers,
            persistent_workers=workers > 0,
            generator=torch.Generator().manual_seed(0),  # of the workers' seeds: the global one stays where it is
        )
        self._position = 0  # batches handed out in this epoch
        self._begun: int | None = None  # the epoch of a pass that has begun and not come to its end

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that begins next.

        Args:
            epoch: Its number, from 0.
        """
        self.sampler.set_epoch(epoch)
        self._begun = None

    def __len__(self) -> int:
        """Number of this rank's batches in a whole epoch."""
        return len(self.sampler)

    def __iter__(self) -> Iterator[Batch]:
        """Yield the batches of one epoch, or what a loaded state left of it."""
        if self._begun == self.sampler.epoch:  # the pass before was left early, and nobody (Lightning does) moved on
            self.sampler.set_epoch(self.sampler.epoch + 1)
        self._begun, self._position = self.sampler.epoch, self.sampler.start
        for batch in self._loader:
            self._position += 1
            if self._position == len(self):  # before the last one is handed out: not everybody asks for one more
                self._begun, self._position = None, 0
                self.sampler.set_epoch(self.sampler.epoch + 1)
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Return the position.

        Returns:
            The epoch, and the number of batches handed out in it.
        """
        return {"epoch": self.sampler.epoch, "batch": self._position}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where the state was taken.

        Args:
            state_dict: What `state_dict` returned.

        Raises:
            TypeError: If it does not hold two ints.
            ValueError: If one is missing or negative, or the epoch has fewer batches than were handed out.
        """
        if missing := [name for name in ("epoch", "batch") if name not in state_dict]:
            raise ValueError(f"`state_dict` must hold 'epoch' and 'batch', got no {missing[0]!r}")
        epoch, batch = (check_non_negative_int(f"state_dict[{n!r}]", state_dict[n]) for n in ("epoch", "batch"))
        if batch >= len(self):
            raise ValueError(
                f"`state_dict` must be that of a loader with as many batches, {len(self)}, got one behind"
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
    """Tensors with a dimension for the tasks; lists of tasks if they differ in their number of samples."""
    return tuple(
        tuple(tasks_together(parts) for parts in zip(*pairs, strict=True)) for pairs in zip(*episodes, strict=True)
    )


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed the global generators, from which random transforms draw, and set them back."""
    numpy_state, state = np.random.get_state(), random.getstate()  # noqa: NPY002 - what transforms draw from
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # of the CPU, without those of the devices
        np.random.seed(seed % 2**32)  # noqa: NPY002
        random.seed(seed)
        try:
            yield
        finally:
            np.random.set_state(numpy_state)  # noqa: NPY002
            random.setstate(state)


def _rank() -> int:
    return dist.get_rank() if is_distributed() else 0
