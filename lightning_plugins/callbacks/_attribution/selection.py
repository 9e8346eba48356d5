"""Selection of the samples to explain: by class, by probability, and how many."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lightning_plugins._checks import check_fraction, check_non_negative_int, check_positive_int
from lightning_plugins._lightning import MisconfigurationException
from lightning_plugins.callbacks._attribution.batches import resolve_key


class Selection:
    """Chooses samples, and counts them.

    Args:
        select: Minimum probability of the true class, or a callable from these to bools, or its import path.
        classes: The classes whose samples are taken.
        max_samples: Maximum number of samples.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If one is out of its range.
    """

    def __init__(
        self,
        select: float | str | Callable[[Tensor], Tensor] | None,
        classes: Sequence[int] | None,
        max_samples: int | None,
    ) -> None:
        self.select = select
        if callable(select) or isinstance(select, str):
            found = resolve_key("select", select)
            if not callable(found):
                raise ValueError(f"`select={select!r}` must be a number, a callable or its import path")
            self._rule: Callable[[Tensor], Tensor] = found
        else:
            least = -1.0 if select is None else check_fraction("select", select)
            self._rule = lambda probabilities: probabilities > least
        if classes is not None:
            if isinstance(classes, str | bytes) or not isinstance(classes, Sequence) or not classes:
                raise ValueError(f"`classes` must name at least one positive class, such as [1], got {classes!r}")
            for number in classes:
                check_non_negative_int("classes", number)
        self.classes = None if classes is None else tuple(classes)
        self.max_samples = None if max_samples is None else check_positive_int("max_samples", max_samples)
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
        kept = self._rule(probabilities)
        if not isinstance(kept, Tensor) or kept.dtype != torch.bool or kept.shape != target.shape:
            got = f"{kept.dtype} of shape {tuple(kept.shape)}" if isinstance(kept, Tensor) else type(kept).__name__
            raise MisconfigurationException(f"`select` must return a bool for each of {len(target)} samples, got {got}")
        if self.classes is not None:
            kept = kept & torch.isin(target, torch.tensor(self.classes, device=target.device))
        chosen = kept.nonzero()[:, 0]
        if self.max_samples is not None:
            chosen = chosen[: self.max_samples - self.chosen]
        self.chosen += len(chosen)
        return chosen
