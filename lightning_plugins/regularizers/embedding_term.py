"""Base class of terms of a batch of embeddings: rows of all processes, a queue of earlier rows, and a weight."""

from abc import ABC, abstractmethod
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from lightning_plugins._checks import check_bool, check_choice, check_finite_number
from lightning_plugins.distributed import gather_rows, is_distributed, share_gradient
from lightning_plugins.functional.spectrum import at_least_float32, full_precision
from lightning_plugins.functional.tensors import check_floating
from lightning_plugins.functional.variance_covariance import centre_rows
from lightning_plugins.regularizers.agreement import agreed_counts, refusals_are_told

Scope = Literal["global", "local"]


class EmbeddingTerm(nn.Module, ABC):
    """Base class of loss terms of a batch of embeddings: a subclass only implements `measure`.

    The term is ``weight * measure(rows)``, to be minimised, computed in float32, in float64 for float64 embeddings,
    with autocast off.

    Under ``scope="global"`` the rows of all processes form one batch. All processes must call the module, in the same
    order, and all receive the same value; a process may have no rows as long as another one has. The rows are
    exchanged, and in the backward pass one number. The gradients are those of data parallelism: averaged over the
    processes, as DDP and FSDP do, they equal the gradient of one process that sees the whole batch. Across processes,
    double backward (``create_graph=True``) raises `RuntimeError`; with one process, or ``scope="local"``, it works.

    Args:
        weight: Factor on the measure; positive to lower it, negative to raise it.
        centred: Whether the mean of all rows is subtracted before they are measured.
        scope: ``"global"`` for the batch of all processes together, ``"local"`` for this process's own rows.

    Raises:
        TypeError: If ``weight`` is not a number, ``centred`` no bool or ``scope`` not a string.
        ValueError: If ``weight`` is not finite or ``scope`` unknown.

    Example:
        >>> class MeanSquare(EmbeddingTerm):
        ...     def measure(self, rows):
        ...         return rows.square().mean()
        >>> MeanSquare(weight=0.5)(torch.ones(4, 3))
        tensor(0.5000)
    """

    def __init__(self, weight: float = 1.0, *, centred: bool = False, scope: Scope = "global") -> None:
        super().__init__()
        self.weight = check_finite_number("weight", weight)
        self.centred = check_bool("centred", centred)
        self.scope = check_choice("scope", scope, get_args(Scope))

    calls = 1  # number of batches combined in a step, which all processes must agree on

    @abstractmethod
    def measure(self, rows: Tensor) -> Tensor:
        """Return the scalar to minimise, from the rows of all processes and of the queue.

        Args:
            rows: Tensor of shape ``(N, d)``, float32 or float64, with ``N >= 1``, centred if requested.

        Returns:
            Scalar.
        """

    def forward(self, embeddings: Tensor, remembered: Tensor | None = None) -> Tensor:
        """Return ``weight * measure``.

        Args:
            embeddings: Floating tensor of shape ``(N, d)``, of the same ``d`` and dtype on all processes.
            remembered: Further rows, shape ``(q, d)``, of earlier batches, added to the batch without a gradient; the
                same on all processes under ``scope="global"``.

        Returns:
            Scalar: float32 for float16 and bfloat16 embeddings, else in their dtype.

        Raises:
            TypeError: If a tensor is not a real floating one.
            ValueError: If a tensor does not have the shape described, or no process has a row.
        """
        return self.with_rows(embeddings, remembered)[0]

    def with_rows(self, embeddings: Tensor, remembered: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the term and the rows it was computed from, for a queue.

        Args:
            embeddings: As for `forward`.
            remembered: As for `forward`.

        Returns:
            The term, and all rows, detached and unchanged: the remembered ones first, then those of each process in the
            order of the processes, so that the newest are last. Under ``scope="global"`` all processes get the same.

        Raises:
            ValueError: If a tensor does not have the shape described, or no process has a row.
        """
        with refusals_are_told(self.scope):
            check_rows("embeddings", embeddings)
            if remembered is not None:
                check_rows("remembered", remembered)
                if remembered.shape[1] != embeddings.shape[1]:
                    raise ValueError(
                        f"`remembered` must have {embeddings.shape[1]} columns as `embeddings` has, got shape "
                        f"{tuple(remembered.shape)}"
                    )
        together = self.scope == "global" and is_distributed()
        counts = agreed_counts("embeddings", embeddings, self.calls) if together else [len(embeddings)]
        if not sum(counts):
            where = " on any process" if together else ""
            raise ValueError(f"`embeddings` must have at least one row, got none{where}")
        rows = at_least_float32(embeddings)
        if together and not len(rows) and torch.is_grad_enabled() and not rows.requires_grad:
            # Created manually on a process without data. The other processes' backward passes wait for this one's.
            rows = rows.detach().requires_grad_()
        blocks = gather_rows(rows, counts) if together else [rows]
        if remembered is not None:
            blocks = [remembered.detach().to(rows), *blocks]
        everything = torch.cat(blocks)
        with full_precision(everything):
            value = self.weight * self.measure(centre_rows(everything) if self.centred else everything)
        return (share_gradient(value) if together else value), everything.detach()

    def extra_repr(self) -> str:
        """Show the settings."""
        return f"weight={self.weight}, centred={self.centred}, scope={self.scope!r}"


def check_rows(name: str, tensor: Tensor) -> None:
    """Raise an error unless the tensor is a real floating matrix with columns.

    Args:
        name: The argument's name, for the message.
        tensor: The argument.

    Raises:
        ValueError: If the tensor does not have two dimensions, or has no columns.
    """
    check_floating(name, tensor)
    if tensor.ndim != 2 or not tensor.shape[1]:
        raise ValueError(f"`{name}` must have shape (N, d) with at least one column, got {tuple(tensor.shape)}")
