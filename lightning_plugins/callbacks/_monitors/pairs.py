"""The pairs of a validation, layer by layer."""

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_plugins.distributed import gather_row_counts, gather_rows, is_distributed
from lightning_plugins.functional.pair_scores import row_keys


class EpochPairs:
    """Embeddings of two views, kept over the batches of an epoch and gathered from all processes.

    Args:
        pairs: ``"calls"`` if each view is a call of the layer, ``"halves"`` if both are halves of one.
    """

    def __init__(self, pairs: str) -> None:
        self._pairs = pairs
        self._rows: dict[str, list[Tensor]] = {}  # x, y and, in a last column, the label
        self._labelled = False

    def clear(self) -> None:
        """Forget all pairs."""
        self._rows.clear()
        self._labelled = False

    def add(self, label: str, calls: list[Tensor], labels: Tensor | None) -> None:
        """Keep the pairs of a batch.

        Args:
            label: The layer's.
            calls: Embeddings of each of its calls, shape ``(N, d)``.
            labels: Classes of the pairs or of the views, or None.

        Raises:
            ValueError: If the calls are not those that ``pairs`` says, or the labels are too many or too few.
        """
        if self._pairs == "calls":
            if len(calls) != 2 or calls[0].shape != calls[1].shape:
                raise ValueError(
                    f"`pairs='calls'` needs two calls of layer {label!r} with as many rows in a validation step, got "
                    f"shapes {[tuple(call.shape) for call in calls]}; if one call sees both views, "
                    "`pairs='halves'`"
                )
            x, y = calls
        else:
            rows = torch.cat(calls)
            half = len(rows) // 2
            x, y = rows[:half], rows[half : 2 * half]
        columns = [x.float(), y.float()]
        if labels is not None:
            if len(labels) not in {len(x), 2 * len(x), 2 * len(x) + (len(y) > 0)}:
                raise ValueError(
                    f"`labels` must have a row for each of {len(x)} pairs of layer {label!r}, or for each view, got "
                    f"{len(labels)}"
                )
            columns.append(labels[: len(x), None].to(x.device).float())
            self._labelled = True
        self._rows.setdefault(label, []).append(torch.cat(columns, dim=1))

    def gather(self, label: str, device: torch.device, max_pairs: int) -> tuple[Tensor, Tensor, Tensor | None] | None:
        """Return a random sample of all processes' pairs, in an order that depends on their values alone.

        All processes must ask for the same layers in the same order.

        Args:
            label: The layer's.
            device: Where this process's tensors are.
            max_pairs: How many at most.

        Returns:
            Both views' embeddings and the labels or None; None for a layer of which no process has rows.
        """
        own = (
            torch.cat(self._rows[label])
            if label in self._rows
            else torch.empty(0, 0, dtype=torch.float32, device=device)
        )
        labelled = self._labelled
        if is_distributed():
            width = torch.tensor([own.shape[1], int(labelled)], device=device)
            dist.all_reduce(width, op=dist.ReduceOp.MAX)
            columns, any_labels = width.tolist()
            labelled = bool(any_labels)
            own = own if own.shape[1] else own.new_empty(0, columns)
            own = torch.cat(gather_rows(own, gather_row_counts(len(own))))
        if not own.shape[1]:
            return None
        d = (own.shape[1] - labelled) // 2
        x, y = own[:, :d], own[:, d : 2 * d]
        chosen = row_keys(x, y).argsort()[:max_pairs]
        return x[chosen], y[chosen], own[chosen, -1].long() if labelled else None
