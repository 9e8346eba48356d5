"""Inverse document frequency of words from their document frequencies."""

from typing import Literal

from torch import Tensor

from lightning_plugins._checks import check_choice, check_positive_int
from lightning_plugins.functional.tensors import check_real

Variant = Literal["bm25", "smooth", "plain"]
VARIANTS: tuple[Variant, ...] = ("bm25", "smooth", "plain")


def inverse_document_frequency(document_frequency: Tensor, num_documents: int, *, variant: Variant = "bm25") -> Tensor:
    """Weight words by inverse document frequency.

    With ``N`` documents, of which ``df`` contain the word, ``"bm25"`` is ``ln((N - df + 0.5) / (df + 0.5) + 1)``, which
    is positive even for words in every document; ``"smooth"`` is ``ln((N + 1) / (df + 1)) + 1``; ``"plain"`` is
    ``ln(N / df)``, infinite for a word in no document.

    Args:
        document_frequency: Tensor of any shape and number dtype, with values in ``[0, num_documents]``.
        num_documents: ``N``, at least 1.
        variant: One of the above.

    Returns:
        float64 tensor of the same shape, in nats.

    Raises:
        ValueError: If a frequency is out of its range, ``num_documents`` is less than 1, or the variant is unknown.

    Example:
        >>> import torch
        >>> inverse_document_frequency(torch.tensor([1, 9]), 9)
        tensor([1.8971, 0.0513], dtype=torch.float64)

    Source:
        Robertson and Zaragoza, 2009, with the 1 inside the logarithm that keeps it positive, as in Lucene; used as a
        probing target as in Choi et al., https://arxiv.org/abs/2202.12191 (our reading: the paper's variant is
        not stated where we could read it).
    """
    check_choice("variant", variant, VARIANTS)
    check_positive_int("num_documents", num_documents)
    check_real("document_frequency", document_frequency)
    df = document_frequency.double()
    if not bool(((df >= 0) & (df <= num_documents)).all()):
        raise ValueError(
            f"`document_frequency` must lie between 0 and `num_documents`={num_documents}, got values from "
            f"{df.min().item():g} to {df.max().item():g}; count a word once per document"
        )
    if variant == "bm25":
        return ((num_documents - df + 0.5) / (df + 0.5)).log1p()
    if variant == "smooth":
        return ((num_documents + 1) / (df + 1)).log() + 1
    return (num_documents / df).log()
