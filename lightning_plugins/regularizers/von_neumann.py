"""The von Neumann entropy of a representation as a loss term, exact for batches split over ranks."""

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from lightning_plugins._checks import check_choice, check_finite_number
from lightning_plugins.distributed import gather_rows, is_distributed, share_gradient, sum_over_ranks
from lightning_plugins.functional.entropy import Method, matrix_entropy, uses_products, von_neumann_entropy
from lightning_plugins.functional.spectrum import exact, full_precision, normalize_rows, smaller_gram
from lightning_plugins.functional.tensors import check_floating
from lightning_plugins.regularizers.agreement import agreed_counts, refusals_are_told

Scope = Literal["global", "local"]


class VonNeumannEntropy(nn.Module):
    """Loss term ``-weight * S`` with ``S`` the von Neumann entropy, in nats, of a batch of embeddings.

    With ``Z`` the rows scaled to unit length, ``S`` is the entropy of the eigenvalues of ``Z.T @ Z / N``. It is
    computed in float32, in float64 for float64 embeddings, with autocast off.

    Under ``scope="global"`` the rows of all ranks form one batch. All ranks must call the module, in the same order,
    and all receive the same value; a rank may have no rows as long as another one has. The gradients are those of data
    parallelism: averaged over the ranks, as DDP and FSDP do, they equal the gradient of one process that sees the whole
    batch. The backward pass exchanges only one number. Across ranks, double backward (``create_graph=True``) raises
    `RuntimeError`; with one rank, or ``scope="local"``, it works.

    Args:
        weight: Positive to raise the entropy, negative to lower it; the authors advise at least 32 rows and an absolute
            value far below 0.5.
        scope: ``"global"`` for the batch of all ranks together, ``"local"`` for this rank's own rows. The entropy is
            concave, so the global one is at least the mean of the local ones: they are different losses.
        method: How the spectrum is computed; see `lightning_plugins.functional.matrix_entropy`.

    Raises:
        TypeError: If ``weight`` is not a number, ``scope`` or ``method`` not a string.
        ValueError: If ``weight`` is not finite, ``scope`` or ``method`` unknown.

    Example:
        >>> VonNeumannEntropy(0.1)(torch.eye(4))  # four equal eigenvalues: -0.1 * log(4)
        tensor(-0.1386)

    Source:
        Kim et al., CVPR 2023, https://arxiv.org/abs/2304.01434. The scope over ranks is ours.
    """

    def __init__(self, weight: float = 1.0, *, scope: Scope = "global", method: Method = "auto") -> None:
        super().__init__()
        self.weight = check_finite_number("weight", weight)
        self.scope = check_choice("scope", scope, get_args(Scope))
        check_choice("method", method, get_args(Method))
        self.method: Method = method

    calls = 1  # number of batches combined in a step, which all ranks must agree on

    def forward(self, embeddings: Tensor) -> Tensor:
        """Return ``-weight * S``.

        Args:
            embeddings: As for `entropy`.

        Returns:
            Scalar.
        """
        return -self.weight * self.entropy(embeddings)

    def entropy(self, embeddings: Tensor, remembered: Tensor | None = None) -> Tensor:
        """Return the entropy ``S`` itself.

        Args:
            embeddings: Floating tensor of shape ``(N, d)``, of the same ``d`` and dtype on all ranks.
            remembered: Further rows, shape ``(q, d)``, of any norm, included in the spectrum without a gradient; the
                same on all ranks under ``scope="global"``.

        Returns:
            Scalar in ``[0, log(min(N, d))]``, with ``N`` the number of all rows: float32 for float16 and bfloat16
            embeddings, else in their dtype.

        Raises:
            TypeError: If a tensor is not a real floating one.
            ValueError: If a tensor does not have the shape described, or no rank has a row.
        """
        counts = self._counts(embeddings, remembered)
        if len(counts) == 1 and remembered is None:  # one node of the graph
            return von_neumann_entropy(embeddings, method=self.method)
        rows, memory = _both(embeddings, remembered, counts)
        return entropy_over_ranks(rows, counts, memory=memory, method=self.method)

    def entropy_with_rows(self, embeddings: Tensor, remembered: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the entropy ``S`` and the rows it was computed from, for a queue.

        Args:
            embeddings: As for `entropy`.
            remembered: As for `entropy`.

        Returns:
            The entropy, and all rows, detached and of unit length: the remembered ones first, then those of each rank
            in the order of the ranks, so that the newest are last. Under ``scope="global"`` all ranks get the same.
        """
        counts = self._counts(embeddings, remembered)
        rows, memory = _both(embeddings, remembered, counts)
        blocks = gather_rows(rows, counts) if len(counts) > 1 else [rows]
        every_row = torch.cat([memory, *blocks]).detach()
        return _entropy_of_rows(blocks, memory, self.method), every_row

    def with_rows(self, embeddings: Tensor, remembered: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the term ``-weight * S`` and the rows it was computed from, like other terms of embeddings.

        Args:
            embeddings: As for `entropy`.
            remembered: As for `entropy`.

        Returns:
            The term, and the rows as `entropy_with_rows` gives them; without ``remembered`` the embeddings' own.
        """
        entropy, rows = self.entropy_with_rows(embeddings, remembered)
        return -self.weight * entropy, rows

    def extra_repr(self) -> str:
        """Show the settings."""
        return f"weight={self.weight}, scope={self.scope!r}, method={self.method!r}"

    def _counts(self, embeddings: Tensor, remembered: Tensor | None) -> list[int]:
        """Check the arguments; the row counts of the ranks that take part."""
        with refusals_are_told(self.scope):
            check_matrix("embeddings", embeddings)
            if remembered is not None:
                check_matrix("remembered", remembered)
                if remembered.shape[1] != embeddings.shape[1]:
                    raise ValueError(
                        f"`remembered` must have {embeddings.shape[1]} columns as `embeddings` has, "
                        f"got shape {tuple(remembered.shape)}"
                    )
        return row_counts("embeddings", embeddings, self.scope, self.calls)


def row_counts(name: str, embeddings: Tensor, scope: str, calls: int = 1) -> list[int]:
    """Return the row counts of the ranks that form one batch: all ranks under ``"global"``, else only this one.

    Args:
        name: The argument's name, for the message.
        embeddings: Tensor of shape ``(N, d)``.
        scope: ``"global"`` or ``"local"``.
        calls: As for `agreed_counts`.

    Returns:
        One number for each rank that takes part.

    Raises:
        ValueError: If there is no row in the batch; raised on all ranks, so that none is left waiting.
    """
    together = scope == "global" and is_distributed()
    counts = agreed_counts(name, embeddings, calls) if together else [len(embeddings)]
    if not sum(counts):
        where = " on any rank" if together else ""
        raise ValueError(f"`{name}` must have at least one row, got none{where}, shape {tuple(embeddings.shape)}")
    return counts


def unit_rows(embeddings: Tensor, counts: Sequence[int]) -> Tensor:
    """Scale the rows to unit length, ready for an exchange between the ranks that ``counts`` stands for.

    Args:
        embeddings: Floating tensor of shape ``(N, d)``.
        counts: As `row_counts` returns them.

    Returns:
        Tensor of shape ``(N, d)``, in float32 or float64.
    """
    if len(counts) > 1 and not len(embeddings) and torch.is_grad_enabled() and not embeddings.requires_grad:
        # Created manually on a rank without data. The other ranks' backward passes wait for this rank's.
        embeddings = embeddings.detach().requires_grad_()
    return normalize_rows(embeddings)


def entropy_over_ranks(rows: Tensor, counts: Sequence[int], *, memory: Tensor, method: Method) -> Tensor:
    """Entropy of the rows of all ranks, exchanged in the form that takes fewer bytes.

    Args:
        rows: This rank's rows, of unit length, shape ``(N, d)``, from `unit_rows`.
        counts: As `row_counts` returns them.
        memory: Further rows, of unit length, shape ``(q, d)``, the same on all ranks and without a gradient.
        method: As for `lightning_plugins.functional.matrix_entropy`.

    Returns:
        Scalar.
    """
    if len(counts) == 1:
        return _entropy_of_rows([rows], memory, method)
    if exchange_form(sum(counts), rows.shape[1], rows.element_size()) == "rows":
        return _entropy_of_rows(gather_rows(rows, counts), memory, method)
    return _entropy_of_matrix(rows, sum(counts), memory, method)


def exchange_form(rows: int, dim: int, size: int = 8) -> Literal["rows", "matrix"]:
    """Choose what to exchange between ranks: the form that takes fewer bytes.

    On each of ``W`` ranks, gathering the rows in a ring moves ``rows * dim * (W - 1) / W`` elements, and all-reducing
    the matrix, in float64, ``2 * dim * dim * (W - 1) / W``, since every part goes round twice.

    Args:
        rows: Number of rows of all ranks.
        dim: Number of columns.
        size: Bytes of an element of the rows.

    Returns:
        ``"rows"`` or ``"matrix"``.

    Example:
        >>> exchange_form(rows=256, dim=512), exchange_form(rows=4096, dim=512)
        ('rows', 'matrix')
    """
    return "rows" if rows * size <= 2 * dim * 8 else "matrix"


def check_matrix(name: str, tensor: Tensor) -> None:
    """Raise an error unless the tensor is a real floating matrix.

    Args:
        name: The argument's name, for the message.
        tensor: The argument.

    Raises:
        ValueError: If the tensor does not have two dimensions, or has no columns.
    """
    check_floating(name, tensor)
    if tensor.ndim != 2 or not tensor.shape[1]:
        raise ValueError(f"`{name}` must have shape (N, d) with at least one column, got {tuple(tensor.shape)}")


def _both(embeddings: Tensor, remembered: Tensor | None, counts: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Own rows and remembered rows, both of unit length."""
    rows = unit_rows(embeddings, counts)
    memory = rows.new_empty((0, rows.shape[1])) if remembered is None else remembered.detach()
    return rows, normalize_rows(memory).to(rows)


def _entropy_of_rows(blocks: Sequence[Tensor], memory: Tensor, method: Method) -> Tensor:
    with full_precision(memory):
        rows = torch.cat([*blocks, memory])
        entropy = matrix_entropy(smaller_gram(_for_method(rows, method)), method=method).to(rows.dtype)
    return share_gradient(entropy) if len(blocks) > 1 else entropy


def _for_method(rows: Tensor, method: Method) -> Tensor:
    """The rows in the precision of the spectrum: float32 is accurate enough for the matrix products."""
    return rows if uses_products(rows, min(rows.shape), method) else normalize_rows(exact(rows))


def _entropy_of_matrix(rows: Tensor, count: int, memory: Tensor, method: Method) -> Tensor:
    with full_precision(rows):
        # The entropy's gradient is symmetric, so the derivative through one factor is half of the total, and the
        # backward pass takes one product instead of two. The difference is zero and only carries that derivative: the
        # value is the exchanged total, the same on all ranks.
        precise = normalize_rows(exact(rows))
        own = precise.detach().mT @ precise
        total = sum_over_ranks(own.detach()) + exact(memory).mT @ exact(memory) + 2 * (own - own.detach())
        total = total / (count + len(memory))
        if uses_products(rows, rows.shape[1], method):
            total = total.to(rows.dtype)
        entropy = matrix_entropy(total, method=method).to(rows.dtype)
    # Rank r's rows now have the derivative g_r * dS/dZ_r of only their own rank's loss, but S is part of the loss of
    # every rank k, with gradient g_k. Sharing makes it sum(g_k) * dS/dZ_r. Where data parallelism then averages the
    # gradients of the weights w over the W ranks, and all g_k are g, sum_r(W * g * dS/dZ_r * dZ_r/dw) / W is the
    # gradient of one process with all the rows.
    return share_gradient(entropy)
