"""Selection of the samples to explain: by class, by probability, and how many."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from lightning_plugins._checks import (
    check_fraction,
    check_non_negative_int,
    check_positive_int,
)
from lightning_plugins._lightning import MisconfigurationException
from lightning_plugins.callbacks._attribution.batches import resolve_key


@dataclass(frozen=True, kw_only=True)
class SampleSelection:
    """Samples that `AttributionEvaluation` explains; all of them by default.

    In YAML a mapping, without a class path: ``samples: {select: 0.9, classes: [1]}``.

    Attributes:
        select: Those whose probability of the true class is above this number, in [0, 1], or a callable from these
            probabilities, shape ``(B,)``, to bools (or its import path); all if None.
        classes: Only samples of these classes; of all if None.
        max_samples: Maximum number of samples per rank, in order, at least 1; by default all.

    Raises:
        TypeError: If a field has the wrong type.
        ValueError: If a field is out of its range.

    Example:
        >>> SampleSelection(select=0.9, classes=[1]).classes
        (1,)
    """

    select: float | str | Callable[[Tensor], Tensor] | None = None
    classes: Sequence[int] | None = None
    max_samples: int | None = None

    def __post_init__(self) -> None:
        _ = self.rule
        if not (self.select is None or isinstance(self.select, str) or callable(self.select)):
            object.__setattr__(self, "select", check_fraction("select", self.select))
        if self.classes is not None:
            if isinstance(self.classes, str | bytes) or not isinstance(self.classes, Sequence) or not self.classes:
                raise ValueError(f"`classes` must name at least one positive class, such as [1], got {self.classes!r}")
            for number in self.classes:
                check_non_negative_int("classes", number)
            object.__setattr__(self, "classes", tuple(map(int, self.classes)))
        if self.max_samples is not None:
            object.__setattr__(self, "max_samples", check_positive_int("max_samples", self.max_samples))

    @cached_property
    def rule(self) -> Callable[[Tensor], Tensor]:
        """The function from probabilities of the true class to bools."""
        if callable(self.select) or isinstance(self.select, str):
            found = resolve_key("select", self.select)
            if not callable(found):
                raise ValueError(f"`select={self.select!r}` must be a number, a callable or its import path")
            return found
        least = -1.0 if self.select is None else check_fraction("select", self.select)
        return lambda probabilities: probabilities > least


class Selection:
    """Chooses samples, and counts them.

    Args:
        samples: The rules.
    """

    def __init__(self, samples: SampleSelection) -> None:
        self.samples = samples
        self.begin()

    def begin(self) -> None:
        """Reset the count."""
        self.chosen = self.seen = 0

    def choose(self, probabilities: Tensor, target: Tensor) -> Tensor:
        """The indices of the selected samples of a batch.

        Args:
            probabilities: Of the true class, shape ``(B,)``.
            target: The true class, shape ``(B,)``.

        Returns:
            Integers of shape ``(n,)``, rising.

        Raises:
            MisconfigurationException: If a callable does not return one bool for each sample.
        """
        self.seen += len(target)
        kept = self.samples.rule(probabilities)
        if not isinstance(kept, Tensor) or kept.dtype != torch.bool or kept.shape != target.shape:
            got = f"{kept.dtype} of shape {tuple(kept.shape)}" if isinstance(kept, Tensor) else type(kept).__name__
            raise MisconfigurationException(f"`select` must return a bool for each of {len(target)} samples, got {got}")
        if self.samples.classes is not None:
            kept = kept & torch.isin(target, torch.tensor(self.samples.classes, device=target.device))
        chosen = kept.nonzero()[:, 0]
        if self.samples.max_samples is not None:
            chosen = chosen[: self.samples.max_samples - self.chosen]
        self.chosen += len(chosen)
        return chosen
