"""Turn a layer's tensor into a matrix of embeddings: one row per sample, or per token."""

from collections.abc import Callable

from torch import Tensor


def _flatten(features: Tensor) -> Tensor:
    return features.flatten(start_dim=1)


def _mean(features: Tensor) -> Tensor:
    if features.ndim == 3:  # (N, L, d): tokens stand before channels
        return features.mean(dim=1)
    return features.flatten(start_dim=2).mean(dim=2)  # (N, d, H, W, ...): channels stand before positions


def _mean_last(features: Tensor) -> Tensor:
    return features.flatten(start_dim=1, end_dim=-2).mean(dim=1)


def _cls(features: Tensor) -> Tensor:
    if features.ndim != 3:
        raise ValueError(
            f"`pool='cls'` takes the first token of a (N, L, d) sequence, got shape {tuple(features.shape)}; "
            "use 'mean' or 'flatten' for feature maps"
        )
    return features[:, 0]


def _tokens(features: Tensor) -> Tensor:
    if features.ndim == 3:
        return features.flatten(end_dim=1)
    return features.flatten(start_dim=2).transpose(1, 2).flatten(end_dim=1)


POOLS: dict[str, Callable[[Tensor], Tensor]] = {
    "flatten": _flatten,
    "mean": _mean,
    "mean_last": _mean_last,
    "cls": _cls,
    "tokens": _tokens,
}


def pool_embeddings(features: Tensor, pool: str | Callable[..., Tensor] = "mean") -> Tensor:
    """Pool a layer's tensor to embeddings of shape ``(N, d)``.

    A matrix stays as it is under every named pool. Of higher tensors, three dimensions are read as a token sequence
    ``(N, L, d)``, four and more as a feature map ``(N, d, H, W, ...)``. Shapes do not tell feature maps with channels
    last, ``(N, H, W, ..., d)``, from these: Swin and its relatives need ``"mean_last"``.

    Args:
        features: Floating tensor of shape ``(N, d)``, ``(N, L, d)`` or ``(N, d, H, W, ...)``.
        pool: ``"mean"`` over tokens or positions, ``"mean_last"`` the same where channels are last, ``"cls"`` (the
            first token), ``"tokens"`` (every token or position is a row of its own), ``"flatten"`` (all but the first
            dimension become ``d``), or a callable that takes ``features`` and returns the matrix.

    Returns:
        Tensor of shape ``(N, d)``, or ``(N * positions, d)`` for ``"tokens"``.

    Raises:
        ValueError: If ``features`` has fewer than two dimensions, ``"cls"`` meets a feature map, or the result of a
            callable is no matrix.
        TypeError: If ``features`` (or what a callable made of it) is not a floating tensor.

    Example:
        >>> import torch
        >>> pool_embeddings(torch.ones(8, 16, 7, 7)).shape
        torch.Size([8, 16])
        >>> pool_embeddings(torch.ones(8, 50, 16), "tokens").shape
        torch.Size([400, 16])
    """
    if isinstance(pool, str):
        if not isinstance(features, Tensor) or not features.is_floating_point():
            raise TypeError(f"embeddings must be a floating tensor, got {_describe(features)}")
        if features.ndim < 2:
            raise ValueError(
                f"embeddings need at least the two dimensions (N, d), got shape {tuple(features.shape)}; "
                "choose a layer whose tensor keeps one row per sample"
            )
        return features if features.ndim == 2 else POOLS[pool](features)
    embeddings = pool(features)
    if not isinstance(embeddings, Tensor) or not embeddings.is_floating_point():
        raise TypeError(f"`pool` must return a floating tensor of shape (N, d), got {_describe(embeddings)}")
    if embeddings.ndim != 2:
        raise ValueError(f"`pool` must return a matrix of shape (N, d), got shape {tuple(embeddings.shape)}")
    return embeddings


def _describe(value: object) -> str:
    return str(value.dtype) if isinstance(value, Tensor) else type(value).__name__
