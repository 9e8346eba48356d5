"""Rows for a probe: which positions of a layer's tensor, and the targets and groups that belong to them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_plugins._checks import check_choice
from lightning_plugins.callbacks._probes.batches import Entry, check_entry, entry_name, first_input, read_entry
from lightning_plugins.functional.folds import hash_rows
from lightning_plugins.functional.pooling import pool_embeddings

Positions = Literal["tokens", "cls", "mean"] | str | Callable[[Tensor, Any], Tensor]
POSITIONS = ("tokens", "cls", "mean")


@dataclass(frozen=True)
class BatchRows:
    """Rows of every layer in one batch.

    Attributes:
        batch: The batch.
        mask: Boolean ``(N, L)``, or None.
        targets: One entry per row.
        groups: One integer per row.
    """

    batch: Any
    mask: Tensor | None
    targets: Tensor
    groups: Tensor


class RowSelection:
    """Rows of layers' tensors with targets and groups.

    Args:
        targets: Key, position, callable of the batch, or the import path of one.
        groups: The same; None tells samples apart by the contents of the batch's first tensor.
        mask: The same, of a boolean or 0/1 tensor of shape ``(N, L)``; None takes all positions.
        positions: ``"tokens"``, ``"cls"``, ``"mean"``, or a callable of the layer's tensor and the batch that gives the
            rows (or its import path).

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If a name is unknown.
    """

    def __init__(self, targets: Entry, groups: Entry | None, mask: Entry | None, positions: Positions) -> None:
        self.targets = check_entry("targets", targets)
        self.groups = None if groups is None else check_entry("groups", groups)
        self.mask = None if mask is None else check_entry("mask", mask)
        if isinstance(positions, str) and "." not in positions:
            check_choice("positions", positions, POSITIONS)
        elif isinstance(positions, int):
            raise TypeError(f"`positions` must be 'tokens', 'cls', 'mean' or a callable, got {positions!r}")
        else:
            positions = check_entry("positions", positions)  # type: ignore[assignment, arg-type]  # a function of two
        self.positions = positions
        if mask is not None and positions == "cls":
            raise ValueError(
                "`mask` chooses among tokens, and `positions='cls'` takes the first; leave out one of them"
            )

    @property
    def name(self) -> str:
        """A name for state keys."""
        return ", ".join(map(entry_name, (self.targets, self.groups, self.mask, self.positions)))

    def of_batch(self, batch: Any) -> BatchRows:
        """Read targets, groups and mask.

        Returns:
            What they say of the rows.

        Raises:
            ValueError: If an entry is missing, or of a shape that does not fit.
        """
        targets = read_entry("targets", self.targets, batch)
        mask = None if self.mask is None else read_entry("mask", self.mask, batch)
        if mask is not None and mask.ndim != 2:
            raise ValueError(f"`mask` must have shape (N, L), one entry per token, got {tuple(mask.shape)}")
        mask = None if mask is None else mask.bool()
        own = hash_rows(first_input(batch)) if self.groups is None else read_entry("groups", self.groups, batch)
        if own.is_floating_point():
            raise ValueError(f"`groups` must be integers, got {own.dtype}; number the groups, or hash their names")
        if self.positions == "tokens":
            return BatchRows(batch, mask, targets, own)  # spread over tokens where the layer's tensor tells how many
        if len(targets) != len(own):
            raise ValueError(f"`groups` must have one entry per target, {len(targets)}, got {len(own)}")
        return BatchRows(batch, mask, targets, own)

    def pick(self, features: Tensor, of: BatchRows) -> tuple[Tensor, Tensor, Tensor]:
        """Rows of one layer, with their targets and groups.

        Args:
            features: What the layer gave, ``(N, d)``, ``(N, L, d)`` or ``(N, d, H, W)``.
            of: What the batch says.

        Returns:
            Features ``(R, d)``, targets ``(R, ...)`` and groups ``(R,)``.

        Raises:
            ValueError: If the shapes do not fit each other.
        """
        if callable(self.positions):
            rows = self.positions(features, of.batch)
        elif self.positions == "cls":
            rows = pool_embeddings(features, "cls", layout="N...C") if features.ndim > 2 else features
        elif self.positions == "mean":
            rows = _masked_mean(features, of.mask)
        else:
            return self._tokens(features, of)
        if rows.ndim != 2 or len(rows) != len(of.targets):
            raise ValueError(
                f"`positions`: {len(of.targets)} targets need as many rows of shape (N, d), got {tuple(rows.shape)}"
            )
        return rows, of.targets, of.groups

    def _tokens(self, features: Tensor, of: BatchRows) -> tuple[Tensor, Tensor, Tensor]:
        if features.ndim < 3:
            raise ValueError(
                f"`positions='tokens'` takes (N, L, d) sequences or feature maps, got {tuple(features.shape)}; choose "
                "'mean' for a layer with one row per sample"
            )
        sequence = features if features.ndim == 3 else features.flatten(start_dim=2).transpose(1, 2)
        shape = sequence.shape[:2]
        targets, groups = (_spread(name, v, shape) for name, v in (("targets", of.targets), ("groups", of.groups)))
        if of.mask is None:
            return sequence.flatten(end_dim=1), targets.flatten(end_dim=1), groups.flatten()
        if of.mask.shape != shape:
            raise ValueError(
                f"`mask` must have shape {tuple(shape)}, as the layer's tokens, got {tuple(of.mask.shape)}"
            )
        return sequence[of.mask], targets[of.mask], groups[of.mask]


def _spread(name: str, values: Tensor, shape: torch.Size) -> Tensor:
    """One entry per token, from one per token or one per sample."""
    if values.shape[:2] == shape:
        return values
    if len(values) != shape[0] or (name == "groups" and values.ndim > 1):
        raise ValueError(
            f"`{name}` must have one entry per token, {tuple(shape)}, or per sample, {shape[:1][0]}, got "
            f"{tuple(values.shape)}"
        )
    return values[:, None].expand(*shape, *values.shape[1:])


def _masked_mean(features: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None or features.ndim != 3:
        return pool_embeddings(features, "mean", layout="NLC" if features.ndim == 3 else "NC...")
    if mask.shape != features.shape[:2]:
        raise ValueError(f"`mask` must have shape {tuple(features.shape[:2])}, got {tuple(mask.shape)}")
    weights = mask.to(features.dtype)
    total = torch.einsum("nl,nld->nd", weights, features.nan_to_num())  # padding may hold anything
    return total / weights.sum(dim=1, keepdim=True).clamp_min(1.0)
