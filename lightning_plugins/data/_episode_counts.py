"""Numbers of few-shot tasks."""

from dataclasses import dataclass, fields

from lightning_plugins._checks import check_positive_int


@dataclass(frozen=True, kw_only=True)
class EpisodeCounts:
    """Numbers of few-shot tasks of an `EpisodicDataModule`, of all ranks together, at least 1 each.

    In YAML a mapping, without a class path: ``episodes: {train: 2000, tasks_per_batch: 2}``.

    Attributes:
        train: Number of tasks in a training epoch.
        val: Number of validation tasks.
        test: Number of test tasks.
        tasks_per_batch: Number of tasks in a batch.

    Raises:
        TypeError: If a field is not an int.
        ValueError: If a field is below 1.

    Example:
        >>> EpisodeCounts(train=2000, tasks_per_batch=2).test
        600
    """

    train: int = 1000
    val: int = 200
    test: int = 600
    tasks_per_batch: int = 4

    def __post_init__(self) -> None:
        for field in fields(self):
            object.__setattr__(self, field.name, check_positive_int(field.name, getattr(self, field.name)))
