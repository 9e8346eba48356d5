"""Few-shot tasks for a `Trainer`: the loaders of a LightningDataModule."""

import hashlib

from lightning_plugins._checks import check_non_negative_int, check_positive_int
from lightning_plugins._grouping import Group, grouped
from lightning_plugins._lightning import LightningDataModule
from lightning_plugins.data._episode_counts import EpisodeCounts
from lightning_plugins.meta import EpisodeLoader, FewShot, TaskSet
from lightning_plugins.meta.task_sets.few_shot import LabelledDataset

_GROUP = Group(EpisodeCounts, older={"val_episodes": "val", "test_episodes": "test"}, main="train")


class EpisodicDataModule(LightningDataModule):
    """Batches of few-shot tasks for training, validation, test and prediction.

    A batch is ``((support_x, support_y), (query_x, query_y))`` of shapes ``(tasks, samples, ...)``. Training has new
    tasks in every epoch; validation and test always have the same tasks, whatever ``seed`` and size of batches, so
    that methods can be compared on them. Prediction uses the test tasks. Under DDP each batch is divided among the
    ranks, and an interrupted run resumes after the last batch it has seen.

    Args:
        train: Source of training tasks: a task set, or a labelled dataset, which is wrapped in `FewShot`.
        val: Likewise, for validation; with other classes than for training.
        test: Likewise, for test and prediction.
        ways: Number of classes in a task of a labelled dataset, 5 by default; a task set has its own.
        shots: Number of support samples of each class, 1 by default; a task set has its own.
        queries: Number of query samples of each class, 15 by default; a task set has its own.
        episodes: Number of tasks in a training epoch, of all ranks together; or `EpisodeCounts`, with those of the
            other stages and of a batch.
        seed: Seed of the training tasks.
        num_workers: Number of worker processes; 0 draws tasks in this process.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If a number is out of range, a dataset is too small for such tasks, no source is given, or ``ways``,
            ``shots`` or ``queries`` are given without a dataset.

    Example:
        >>> from lightning_plugins.meta import Sinusoid
        >>> counts = EpisodeCounts(tasks_per_batch=25)
        >>> data = EpisodicDataModule(Sinusoid(shots=5), test=Sinusoid(shots=5), episodes=counts)
        >>> len(data.train_dataloader()), len(data.test_dataloader())
        (40, 24)
    """

    @grouped(episodes=_GROUP)
    def __init__(
        self,
        train: TaskSet | LabelledDataset | None = None,
        val: TaskSet | LabelledDataset | None = None,
        test: TaskSet | LabelledDataset | None = None,
        *,
        ways: int | None = None,
        shots: int | None = None,
        queries: int | None = None,
        episodes: int | EpisodeCounts = EpisodeCounts(),
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        sources = {"train": train, "val": val, "test": test}
        sizes = {"ways": ways, "shots": shots, "queries": queries}
        given = {name: number for name, number in sizes.items() if number is not None}
        if not any(source is not None for source in sources.values()):
            raise ValueError("one of `train`, `val` and `test` must be a task set or a labelled dataset, got none")
        if given and all(source is None or isinstance(source, TaskSet) for source in sources.values()):
            raise ValueError(
                f"`{next(iter(given))}` is for labelled datasets, got task sets only; give it to these instead"
            )
        self.tasks = {
            stage: source if isinstance(source, TaskSet) else _few_shot(stage, source, **given)
            for stage, source in sources.items()
            if source is not None
        }
        if not isinstance(episodes, EpisodeCounts):
            episodes = EpisodeCounts(train=check_positive_int("episodes", episodes))
        self.tasks_per_batch = episodes.tasks_per_batch
        self.episodes = {"train": episodes.train, "val": episodes.val, "test": episodes.test}
        self.seed = check_non_negative_int("seed", seed)
        self.num_workers = check_non_negative_int("num_workers", num_workers)

    def train_dataloader(self) -> EpisodeLoader:
        """Return the training loader.

        Returns:
            New tasks in every epoch.
        """
        return self._loader("train", self.seed, fixed=False)

    def val_dataloader(self) -> EpisodeLoader | list[EpisodeLoader]:
        """Return the validation loader.

        Returns:
            Always the same tasks; an empty list without validation tasks.
        """
        return self._loader("val", 0, fixed=True) if "val" in self.tasks else []

    def test_dataloader(self) -> EpisodeLoader:
        """Return the test loader.

        Returns:
            Always the same tasks.
        """
        return self._loader("test", 0, fixed=True)

    def predict_dataloader(self) -> EpisodeLoader:
        """Return the prediction loader.

        Returns:
            The tasks of the test.
        """
        return self.test_dataloader()

    def _loader(self, stage: str, seed: int, *, fixed: bool) -> EpisodeLoader:
        if stage not in self.tasks:
            raise ValueError(f"`{stage}` must be a task set or a labelled dataset, got None")
        # One task set may be used for all stages, which must not see each other's tasks.
        own = int.from_bytes(hashlib.blake2b(f"{stage} {seed}".encode(), digest_size=7).digest())
        return EpisodeLoader(
            self.tasks[stage],
            self.episodes[stage],
            self.tasks_per_batch,
            seed=own,
            fixed=fixed,
            num_workers=self.num_workers,
        )


def _few_shot(name: str, dataset: LabelledDataset, ways: int = 5, shots: int = 1, queries: int = 15) -> FewShot:
    try:
        return FewShot(dataset, ways, shots, queries)
    except (TypeError, ValueError) as error:
        raise type(error)(str(error).replace("`dataset`", f"`{name}`")) from None
