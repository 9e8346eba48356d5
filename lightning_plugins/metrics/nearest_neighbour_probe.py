"""Classify rows by their nearest neighbours from other groups, exact over batches and processes."""

from typing import NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_plugins._checks import check_finite_number, check_positive_int
from lightning_plugins.functional.folds import hash_rows
from lightning_plugins.functional.spectrum import full_precision, normalize_rows
from lightning_plugins.functional.tensors import check_real
from lightning_plugins.metrics._embeddings import check_embeddings

_CHUNK = 1024  # rows compared with all others in one block


class NearestNeighbourResult(NamedTuple):
    """Results of classification by nearest neighbours.

    Attributes:
        accuracy: Fraction of rows whose neighbours vote for their class.
        standard_error: Binomial, treating rows as independent.
        rows: Number of rows.
    """

    accuracy: Tensor
    standard_error: Tensor
    rows: Tensor


class NearestNeighbourProbe(Metric):
    """Accuracy of a weighted vote of the ``k`` nearest neighbours by cosine, excluding the row's own group.

    Every row is classified by all rows outside its group (leave-one-group-out), so no split is needed. A neighbour
    votes with ``exp(cosine / temperature)``. All rows are stored: ``4 * N * (d + 3)`` bytes, gathered from all
    processes at the end, and compared in blocks of 1024 rows.

    Args:
        num_features: Number of columns ``d`` of the features.
        num_classes: Number of classes.
        k: Number of neighbours.
        temperature: Temperature of the votes, positive.

    Raises:
        ValueError: If an argument is out of its range.
        TypeError: If an argument is of the wrong type.

    Example:
        >>> probe = NearestNeighbourProbe(num_features=2, num_classes=2, k=1)
        >>> x = torch.tensor([[1.0, 0.1], [1.0, 0.2], [0.1, 1.0], [0.2, 1.0]])
        >>> probe.update(x, torch.tensor([0, 0, 1, 1]))
        >>> probe.compute().accuracy
        tensor(1.)

    Source:
        Wu et al., CVPR 2018, https://arxiv.org/abs/1805.01978, with their weights and temperature of 0.07.
    """

    is_differentiable = False
    full_state_update = False
    higher_is_better = None

    kept: list[Tensor]

    def __init__(self, num_features: int, num_classes: int, *, k: int = 20, temperature: float = 0.07) -> None:
        super().__init__()
        self.num_features = check_positive_int("num_features", num_features)
        if check_positive_int("num_classes", num_classes) < 2:
            raise ValueError(f"`num_classes` must be at least 2, got {num_classes}")
        self.num_classes = num_classes
        self.k = check_positive_int("k", k)
        if check_finite_number("temperature", temperature) <= 0:
            raise ValueError(f"`temperature` must be positive, got {temperature!r}")
        self.temperature = temperature
        self.set_dtype(torch.float32)  # of the tensor sent by a process without rows
        # flat rows [features, class, group], the group's 64 bits in two columns
        self.add_state("kept", [], dist_reduce_fx="cat")

    def update(self, features: Tensor, targets: Tensor, groups: Tensor | None = None) -> None:
        """Keep the rows of one batch.

        Args:
            features: Floating tensor of shape ``(N, num_features)``.
            targets: Classes, integers of shape ``(N,)``.
            groups: Integers of shape ``(N,)``; by default every row is a separate group, equal rows one group.

        Raises:
            TypeError: If an argument is of the wrong type.
            ValueError: If it has another shape, or a class is out of range.
        """
        rows = check_embeddings("features", features, self.num_features).detach()
        check_real("targets", targets)
        if targets.is_floating_point() or targets.shape != (len(rows),):
            raise ValueError(
                f"`targets` must be classes: integers of shape ({len(rows)},), got {targets.dtype} of shape "
                f"{tuple(targets.shape)}"
            )
        if len(rows) and not bool(((targets >= 0) & (targets < self.num_classes)).all()):
            raise ValueError(f"`targets` must be classes below `num_classes`={self.num_classes}, got another")
        if groups is None:
            groups = hash_rows(features)
        check_real("groups", groups)
        if groups.shape != targets.shape or groups.is_floating_point():
            raise ValueError(f"`groups` must be integers of shape ({len(rows)},), got {tuple(groups.shape)}")
        bits = groups.long().contiguous().view(torch.float32).view(len(rows), 2)
        self.kept.append(torch.cat([normalize_rows(rows.float()), targets[:, None].float(), bits], dim=1).flatten())

    def compute(self) -> NearestNeighbourResult:
        """Vote over the rows of all batches and processes.

        Returns:
            Accuracy, its standard error and the number of rows.

        Raises:
            ValueError: If there are fewer than two groups, or a feature is not finite.
        """
        blocks = [self.kept] if isinstance(self.kept, Tensor) else self.kept
        table = torch.cat([*blocks, torch.empty(0, device=self.device)]).view(-1, self.num_features + 3)
        x, classes = table[:, :-3].contiguous(), table[:, -3].long()
        groups = table[:, -2:].contiguous().view(torch.int64).flatten()
        if len(groups.unique()) < 2:
            raise ValueError(f"`groups` must be at least two, got {len(groups.unique())} in {len(x)} rows")
        if not bool(torch.isfinite(x).all()):
            raise ValueError("`features` must be finite, got NaN or infinity")
        correct = torch.zeros((), dtype=torch.long, device=x.device)
        votes = torch.nn.functional.one_hot(classes, self.num_classes).float()
        for start in range(0, len(x), _CHUNK):
            own = slice(start, start + _CHUNK)
            with full_precision(x):
                cosine = x[own] @ x.T
            cosine = cosine.masked_fill(groups[own, None] == groups, -torch.inf)
            near, place = cosine.topk(min(self.k, len(x)), dim=1)
            weight = ((near - near[:, :1]) / self.temperature).exp()  # 0 for rows of the same group
            counted = (weight[..., None] * votes[place]).sum(dim=1)
            correct = correct + (counted.argmax(dim=1) == classes[own]).sum()
        accuracy = correct / len(x)
        return NearestNeighbourResult(accuracy, (accuracy * (1 - accuracy) / len(x)).sqrt(), torch.tensor(len(x)))
