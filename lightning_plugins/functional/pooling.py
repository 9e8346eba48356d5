"""Turn a layer's tensor into a matrix of embeddings: one row per sample, or per token."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence

from lightning_plugins._checks import check_callable
from lightning_plugins.functional.tensors import check_floating, check_real

_SINGLE_POSITION = ("cls", "first", "last")
POOLS = ("mean", "max", *_SINGLE_POSITION, "tokens", "flatten", "mean_last")


def pool_embeddings(
    features: Tensor | PackedSequence,
    pool: str | Callable[..., Tensor] = "mean",
    *,
    layout: str | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Pool a layer's tensor to embeddings of shape ``(N, d)``.

    A matrix is unchanged by every named pool. For tensors of higher order ``layout`` gives the meaning of the
    dimensions: ``N`` stands for samples, ``C`` for channels, any other letter for positions. Packed and nested
    sequences define their layout and padding themselves.

    Args:
        features: Floating tensor of shape ``(N, d)`` or of the ``layout``; or a packed sequence, or a nested tensor of
            ``(L, d)`` sequences.
        pool: Over the valid positions of a sample: ``"mean"``, ``"max"``, ``"first"`` or ``"last"``. ``"cls"`` uses the
            first position, valid or not, ``"tokens"`` every valid position as a separate row, ``"flatten"`` all
            dimensions of a sample as ``d``, with zeros at invalid positions. ``"mean_last"`` is the mean with samples
            first and channels last. Or a callable that takes ``features``, and ``mask`` if there is one, and returns
            the matrix.
        layout: One letter per dimension, such as ``"NLC"`` for tokens, ``"LNC"`` for tokens before samples, ``"NCL"``
            for the output of ``nn.Conv1d``, ``"NCHW"`` or ``"NHWC"``; ``...`` stands for any number of positions.
            Required from three dimensions on, except for ``"flatten"`` without a mask, where the samples are first.
        mask: The valid positions. Bool or integer of the shape of ``layout`` without its ``C``, samples first, true
            where valid; a float mask is one to be added to attention scores, 0 where valid, if it holds no positive
            number; an integer tensor of shape ``(N,)`` holds the samples' lengths; a bool one selects whole samples.

    Returns:
        Tensor of shape ``(N, d)``, or ``(number of valid positions, d)`` for ``"tokens"``. A sample without a valid
        position is a row of zeros, which does not contribute to the spectra here.

    Raises:
        ValueError: If ``features`` has fewer than two dimensions, the layout is missing or does not fit, the mask does
            not fit, ``pool`` is unknown, needs a sequence but gets a map, or returns no matrix.
        TypeError: If ``features`` (or what a callable made of it) is not a floating tensor.

    Example:
        >>> import torch
        >>> pool_embeddings(torch.ones(8, 16, 7, 7), layout="NCHW").shape
        torch.Size([8, 16])
        >>> tokens, mask = torch.tensor([[[1.0], [3.0], [99.0]]]), torch.tensor([[1, 1, 0]])
        >>> pool_embeddings(tokens, layout="NLC", mask=mask)
        tensor([[2.]])
    """
    if not isinstance(pool, str):
        check_callable("pool", pool, f"one of {', '.join(map(repr, POOLS))} or a callable")
        return _check_matrix(pool(features) if mask is None else pool(features, mask))
    if pool not in POOLS:
        raise ValueError(f"`pool` must be one of {', '.join(map(repr, POOLS))}, got {pool!r}")
    if isinstance(features, PackedSequence) or (isinstance(features, Tensor) and features.is_nested):
        features, mask = _padded(features)
        layout = "NLC"
    check_layout(layout)
    if not isinstance(features, Tensor) or not features.is_floating_point():
        raise TypeError(f"`features`: embeddings must be a floating tensor, got {_describe(features)}")
    check_floating("features", features)
    if mask is not None:
        check_real("mask", mask)
    if features.ndim < 2:
        raise ValueError(
            f"`features`: embeddings need at least the two dimensions (N, d), got shape {tuple(features.shape)}; "
            "choose a layer whose tensor keeps one row per sample"
        )
    if features.ndim == 2:
        return features if mask is None else features[_of_rows(mask, len(features))]
    if pool == "flatten" and mask is None:
        samples = 0 if layout is None else layout_axes(layout, features.ndim)[0]
        return features.movedim(samples, 0).flatten(start_dim=1)
    if pool == "mean_last" and not (layout or "").endswith("C"):
        layout = "N...C"
    return _pool_positions(features, pool, layout, mask)


def check_layout(layout: str | None) -> str | None:
    """Return ``layout`` if it is None or a valid layout.

    Raises:
        TypeError: If it is not a string.
        ValueError: If it does not contain ``N`` and ``C`` once each, repeats a letter, or contains other characters.
    """
    if layout is None:
        return None
    if not isinstance(layout, str):
        raise TypeError(f"`layout` must be a string such as 'NLC' or 'NCHW', got {layout!r} ({type(layout).__name__})")
    letters = layout.replace("...", "", 1)
    if (
        not letters.isalpha()
        or not letters.isupper()
        or len(set(letters)) < len(letters)
        or not {"N", "C"} <= {*letters}
    ):
        raise ValueError(
            "`layout` must have one capital letter a dimension, 'N' for the samples and 'C' for the channels among "
            f"them, such as 'NLC', 'NCL', 'LNC', 'NCHW', 'NHWC' or 'N...C', got {layout!r}"
        )
    return layout


def layout_axes(layout: str, ndim: int) -> tuple[int, int]:
    """The positions of the sample and channel dimensions in a tensor with ``ndim`` dimensions.

    Returns:
        Their positions.

    Raises:
        ValueError: If the layout has another number of dimensions.

    Example:
        >>> layout_axes("N...C", 4)
        (0, 3)
    """
    before, dots, behind = layout.partition("...")
    count = len(before) + len(behind)
    if count > ndim or (not dots and count != ndim):
        raise ValueError(f"`layout={layout!r}` must fit the tensor, which has {ndim} dimensions")
    letters = before + "." * (ndim - count) + behind
    return letters.index("N"), letters.index("C")


def padding_of_lengths(lengths: Tensor, positions: int) -> Tensor:
    """The mask, ``(N, positions)`` and true where valid, of sequences of the given lengths."""
    return torch.arange(positions, device=lengths.device) < lengths[:, None]


def _pool_positions(features: Tensor, pool: str, layout: str | None, mask: Tensor | None) -> Tensor:
    if layout is None:
        raise ValueError(
            f"`layout` must name the {features.ndim} dimensions of a tensor of shape {tuple(features.shape)}, "
            "which cannot be inferred: such as 'NLC' (tokens), 'NCL' (as of Conv1d), 'LNC', 'NCHW' or 'NHWC'"
        )
    samples, channels = layout_axes(layout, features.ndim)
    ordered = features.movedim((samples, channels), (0, -1))  # (N, *positions, C)
    places, sequence = ordered.shape[1:-1], ordered.flatten(1, -2)
    if pool in _SINGLE_POSITION and len(places) > 1:
        raise ValueError(
            f"`pool={pool!r}` takes one token of a sequence, got shape {tuple(features.shape)} with {len(places)} "
            "dimensions of positions; use 'mean' or 'flatten' for feature maps"
        )
    valid = None if mask is None else _of_positions(mask, len(sequence), places)
    if pool == "cls":
        return sequence[:, 0]
    if pool == "tokens":
        return sequence.flatten(0, 1) if valid is None else sequence[valid]
    if valid is None:
        return _unmasked(sequence, pool)
    if pool == "flatten":
        return torch.where(valid[..., None], sequence, 0).flatten(1)
    if pool == "max":
        largest = torch.where(valid[..., None], sequence, -torch.inf).amax(1)
        return torch.where(valid.any(1)[:, None], largest, 0)
    if pool in {"first", "last"}:
        valid_first = valid if pool == "first" else valid.flip(1)
        index = valid_first.to(torch.uint8).argmax(1)
        index = index if pool == "first" else valid.shape[1] - 1 - index
        chosen = sequence.gather(1, index[:, None, None].expand(-1, 1, sequence.shape[2]))[:, 0]
        return torch.where(valid.any(1)[:, None], chosen, 0)
    wide = sequence.float() if sequence.dtype in (torch.float16, torch.bfloat16) else sequence
    total = torch.where(valid[..., None], wide, 0).sum(1)  # `where`, so that NaN in the padding does not spread
    return total / valid.sum(1, keepdim=True).clamp_min(1)


def _unmasked(sequence: Tensor, pool: str) -> Tensor:
    if pool == "max":
        return sequence.amax(1)
    if pool in {"first", "last"}:
        return sequence[:, 0 if pool == "first" else -1]
    return sequence.mean(1)


def _of_rows(mask: Tensor, rows: int) -> Tensor:
    """The rows of a matrix that a mask selects; any further dimension must be one position."""
    valid = _truth(mask)
    if valid.numel() != rows or (valid.ndim and len(valid) != rows):
        raise ValueError(
            f"`mask` must have one entry for each of {rows} rows of a matrix (N, d), got shape {tuple(mask.shape)}; "
            "name a layer whose tensor still has its positions, or leave `mask` out where they are pooled already"
        )
    return valid.flatten()


def _of_positions(mask: Tensor, samples: int, places: tuple[int, ...]) -> Tensor:
    """The mask with shape ``(N, all positions)``."""
    count = 1
    for size in places:
        count *= size
    shape = tuple(mask.shape)
    if shape == (samples,):
        if mask.dtype == torch.bool:
            return mask[:, None].expand(-1, count)
        if len(places) == 1 and not mask.is_floating_point():
            return padding_of_lengths(mask, count)
    squeezed = tuple(size for size in shape[1:-1] if size != 1) + shape[-1:]
    fits = (shape[:1], shape[1:]) == ((samples,), places) or (shape[:1] == (samples,) and squeezed == places)
    if not fits and not (shape[:2] == (samples, 1) and shape[2:] == places):
        raise ValueError(
            f"`mask` must have the samples and positions of the layer's tensor, {(samples, *places)}, got {shape}; "
            "name an argument or entry of that shape, or give a callable that makes one"
        )
    return _truth(mask).reshape(samples, count)


def _truth(mask: Tensor) -> Tensor:
    if not mask.is_floating_point():
        return mask != 0
    positive = mask > 0
    return torch.where(positive.any(), positive, mask == 0)  # no positive number: an additive mask, where 0 is valid


def _padded(features: Any) -> tuple[Tensor, Tensor]:
    """A packed sequence or nested tensor as ``(N, L, d)``, and its mask."""
    if isinstance(features, PackedSequence):
        padded, lengths = pad_packed_sequence(features, batch_first=True)
        return padded, padding_of_lengths(lengths.to(padded.device), padded.shape[1])
    parts = features.unbind()
    if not all(part.ndim == 2 for part in parts):
        raise ValueError(
            f"`features`: a nested tensor must hold sequences of shape (L, d), got {features.ndim} dimensions"
        )
    padded = torch.nn.utils.rnn.pad_sequence(parts, batch_first=True)
    return padded, padding_of_lengths(
        torch.tensor([len(part) for part in parts], device=padded.device), padded.shape[1]
    )


def _check_matrix(embeddings: Any) -> Tensor:
    if not isinstance(embeddings, Tensor) or not embeddings.is_floating_point():
        raise TypeError(f"`pool` must return a floating tensor of shape (N, d), got {_describe(embeddings)}")
    if embeddings.ndim != 2:
        raise ValueError(f"`pool` must return a matrix of shape (N, d), got shape {tuple(embeddings.shape)}")
    return embeddings


def _describe(value: object) -> str:
    return str(value.dtype) if isinstance(value, Tensor) else type(value).__name__
