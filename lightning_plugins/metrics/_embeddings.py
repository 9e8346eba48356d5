"""Checks of the matrices that metrics are updated with."""

from torch import Tensor


def check_embeddings(name: str, embeddings: Tensor, num_features: int | None = None) -> Tensor:
    """Return ``embeddings`` if it is a floating tensor of shape ``(N, num_features)``.

    Args:
        name: The argument's name, for the message.
        embeddings: The argument's value; no row at all is allowed.
        num_features: The wanted number of columns; None takes any.

    Returns:
        ``embeddings``, unchanged.

    Raises:
        TypeError: If it is not a floating tensor.
        ValueError: If it has another shape.
    """
    if not isinstance(embeddings, Tensor) or not embeddings.is_floating_point():
        kind = str(embeddings.dtype) if isinstance(embeddings, Tensor) else type(embeddings).__name__
        raise TypeError(f"`{name}` must be a floating tensor, got {kind}; convert it with `.float()`")
    wanted = "d" if num_features is None else str(num_features)
    if embeddings.ndim != 2 or (num_features is not None and embeddings.shape[1] != num_features):
        hint = "; pool or flatten it to one row per sample" if embeddings.ndim > 2 else ""
        raise ValueError(f"`{name}` must have shape (N, {wanted}), got {tuple(embeddings.shape)}{hint}")
    return embeddings
