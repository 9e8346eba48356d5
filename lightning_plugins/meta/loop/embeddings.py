"""Embeddings with torch's gradient under ``vmap`` too."""

import torch
import torch.nn.functional as F
from torch import Tensor


def embedding(
    input: Tensor,  # noqa: A002 - the name that callers may use
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    """Look up rows; ``padding_idx`` and ``scale_grad_by_freq`` apply to first and second derivatives.

    ``vmap`` ignores both, and torch's second derivative ignores ``scale_grad_by_freq``. Gradients are dense. Rows
    longer than ``max_norm`` are rescaled on lookup, with torch's gradient, but not in the weight itself, which belongs
    to the model.

    Returns:
        The rows, shape ``(*input.shape, columns)``.
    """
    rows = F.embedding(input, weight)
    if max_norm is not None:
        lengths = torch.linalg.vector_norm(rows.detach(), norm_type, dim=-1, keepdim=True)
        factors = torch.where(lengths > max_norm, max_norm / (lengths + 1e-7), 1.0)  # as in torch
        rows = rows + (rows * (factors - 1)).detach()
    if padding_idx is not None:
        padding = padding_idx % weight.shape[0]
        rows = torch.where((input == padding).unsqueeze(-1), rows.detach(), rows)
    if scale_grad_by_freq:
        flat = input.reshape(-1).long()
        counts = weight.new_zeros(weight.shape[0]).scatter_add(0, flat, torch.ones_like(flat, dtype=weight.dtype))
        counts = counts.gather(0, flat).reshape(input.shape).unsqueeze(-1)
        constant = rows.detach()
        rows = constant + (rows - constant) / counts
    return rows
