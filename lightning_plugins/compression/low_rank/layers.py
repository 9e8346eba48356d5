"""Low-rank layers: a linear layer or convolution as a plain sequence of two smaller ones.

The weight's truncated singular value decomposition ``U S V^T`` is split evenly: the first layer has ``sqrt(S) V^T``,
the second ``U sqrt(S)`` and the bias. Both are layers of torch, so they run, export and quantise as any others.
"""

from typing import Any

import torch
from torch import Tensor, nn

from lightning_plugins._checks import check_instance, check_positive_int
from lightning_plugins.compression.low_rank.decomposition import Decomposition, InputMoment, decompose
from lightning_plugins.compression.low_rank.splittable import Layer, reason_against
from lightning_plugins.compression.low_rank.transposed import as_linear, is_transposed, stored_weight
from lightning_plugins.weights import Scheme, check_scheme, weight_to_matrix


def low_rank_layer(layer: Layer, rank: int, *, scheme: Scheme = 1, moment: InputMoment | None = None) -> nn.Sequential:
    """Split a layer in two, of which the first has ``rank`` outputs: the best approximation of that rank.

    - A linear layer becomes ``in -> rank`` and ``rank -> out``.
    - A convolution becomes under scheme 1 a ``k x k`` kernel ``in -> rank`` and a ``1 x 1`` kernel ``rank -> out``.
    - Under scheme 2 it becomes a ``1 x k`` kernel ``in -> rank`` and a ``k x 1`` kernel ``rank -> out``.
    - The transposed ``Conv1D`` of Hugging Face's transformers becomes two linear layers.

    Stride, padding, padding mode and dilation go to the kernel they belong to, so at full rank the sequence computes
    what the layer computes, up to rounding.

    Args:
        layer: A linear layer, or a convolution in one or two dimensions without groups. It is not changed.
        rank: The rank, from 1 to the smaller side of the weight's matrix (see `full_rank`).
        scheme: How a kernel becomes a matrix: 1 for ``out x (in * k * k)``, 2 for ``(out * k) x (in * k)``, which needs
            two dimensions.
        moment: The second moment of the layer's inputs: the optimal approximation is then that of its outputs and not
            of its weight.

    Returns:
        A sequence of two layers on the layer's device, in its dtype, mode and ``requires_grad``, with parameters of
        their own, contiguous in memory.

    Raises:
        TypeError: If ``layer`` is of another kind, or ``rank`` no int.
        ValueError: If the layer cannot be split (groups, a forward pass of its own, a computed or lazy weight), its
            weight is not finite, the rank is out of its range, or the moment of another size.

    Example:
        >>> low_rank_layer(nn.Conv2d(16, 32, 3, stride=2, padding=1), 4)
        Sequential(
          (0): Conv2d(16, 4, kernel_size=(3, 3), stride=(2, 2), padding=(1, 1), bias=False)
          (1): Conv2d(4, 32, kernel_size=(1, 1), stride=(1, 1))
        )

    Source:
        Schemes: Idelbayev and Carreira-Perpinan, CVPR 2020. The even split is the usual one; our reading for BSR
        (Eo et al., 2023, https://arxiv.org/abs/2111.15179).
    """
    values = [*factors(layer, rank, scheme=scheme, moment=moment), *([] if layer.bias is None else [layer.bias])]
    sequence = empty_low_rank_layer(layer, rank, scheme=scheme)
    with torch.no_grad():
        for parameter, value in zip(sequence.parameters(), values, strict=True):
            parameter.copy_(value)  # into fresh parameters: the factors are views of the SVD's, and not contiguous
    return sequence


def factors(layer: Layer, rank: int, *, scheme: Scheme = 1, moment: InputMoment | None = None) -> tuple[Tensor, Tensor]:
    """The weights of the two layers that `low_rank_layer` makes.

    Args:
        layer: As for `low_rank_layer`.
        rank: As for `low_rank_layer`.
        scheme: As for `low_rank_layer`.
        moment: As for `low_rank_layer`.

    Returns:
        The first and the second weight, in float32, or float64 for a weight in float64; no gradient flows.

    Raises:
        TypeError: As `low_rank_layer`.
        ValueError: As `low_rank_layer`.

    Example:
        >>> [tuple(weight.shape) for weight in factors(nn.Conv2d(4, 8, 3), 2, scheme=2)]
        [(2, 4, 1, 3), (8, 2, 3, 1)]
    """
    _check(layer, rank, scheme)
    if moment is not None:
        check_instance("moment", moment, InputMoment, "an InputMoment")
    weight = as_linear(layer).weight
    U, V = Decomposition(weight, moment, scheme=scheme).factors(rank)
    shape = weight.shape
    if scheme == 2 and len(shape) == 4:
        outputs, inputs, high, wide = shape
        return V.reshape(rank, inputs, 1, wide), U.reshape(outputs, high, rank, 1).transpose(1, 2)
    return V.reshape(rank, *shape[1:]), U.reshape(-1, rank, *(1 for _ in shape[2:]))


def dense_weight(first: nn.Module, second: nn.Module) -> Tensor:
    """The weight of the single layer equivalent to a pair from `low_rank_layer`.

    Args:
        first: The pair's first layer.
        second: The pair's second layer, of the same kind.

    Returns:
        Tensor of shape ``(O, I, *k)``, with a gradient for both weights.

    Raises:
        ValueError: If the two weights do not fit together.

    Example:
        >>> layer = nn.Conv2d(3, 4, 3)
        >>> torch.testing.assert_close(dense_weight(*low_rank_layer(layer, 4)), layer.weight)
    """
    A, B = (getattr(layer, "weight", None) for layer in (first, second))
    if not isinstance(A, Tensor) or not isinstance(B, Tensor) or A.ndim != B.ndim or A.shape[0] != B.shape[1]:
        shapes = [tuple(weight.shape) if isinstance(weight, Tensor) else weight for weight in (A, B)]
        raise ValueError(f"`first` and `second` must have weights (rank, in, ...) and (out, rank, ...), got {shapes}")
    if any(a != 1 and b != 1 for a, b in zip(A.shape[2:], B.shape[2:], strict=True)):
        raise ValueError(
            "`first` and `second` must have a kernel of size 1 in every dimension in which the other has a larger one, "
            f"got kernels {tuple(A.shape[2:])} and {tuple(B.shape[2:])}"
        )
    # In each dimension of the kernel one of the two has size 1, so the product broadcasts.
    with torch.autocast(A.device.type, enabled=False):
        return torch.einsum("or...,ri...->oi...", B, A).contiguous()


def truncated(layer: Layer, rank: int, scheme: Scheme = 1) -> Tensor:
    """The layer's weight truncated to a rank, as in its low-rank form.

    Args:
        layer: As for `low_rank_layer`.
        rank: As for `low_rank_layer`.
        scheme: As for `low_rank_layer`.

    Returns:
        Tensor of the weight's shape and dtype; no gradient flows.

    Raises:
        TypeError: As `low_rank_layer`.
        ValueError: As `low_rank_layer`.

    Example:
        >>> int(torch.linalg.matrix_rank(truncated(nn.Linear(6, 5), 2)))
        2
    """
    _check(layer, rank, scheme)
    U, S, Vh = decompose(as_linear(layer).weight, scheme=scheme)
    with torch.autocast(U.device.type, enabled=False):
        matrix = (U[:, :rank] * S[:rank]) @ Vh[:rank]
    return stored_weight(layer, matrix, scheme=scheme).to(layer.weight.dtype).contiguous()


def full_rank(layer: Layer, *, scheme: Scheme = 1) -> int:
    """The largest rank that the layer's weight can have: the smaller side of its matrix.

    Args:
        layer: A linear layer or convolution.
        scheme: As for `low_rank_layer`.

    Returns:
        The rank.

    Example:
        >>> full_rank(nn.Conv2d(3, 64, 7)), full_rank(nn.Conv2d(3, 64, 7), scheme=2)
        (64, 21)
    """
    return min(matrix_shape(layer, scheme=scheme))


def matrix_shape(layer: Layer, *, scheme: Scheme = 1) -> tuple[int, int]:
    """Rows and columns of the layer's weight as a matrix.

    Args:
        layer: A linear layer or convolution.
        scheme: As for `low_rank_layer`.

    Returns:
        The two sizes.

    Example:
        >>> matrix_shape(nn.Conv2d(3, 64, 7), scheme=2)
        (448, 21)
    """
    shape = as_linear(layer).weight.shape
    rows, columns = weight_to_matrix(torch.empty(shape, device="meta"), scheme=scheme).shape
    return rows, columns


def empty_low_rank_layer(layer: Layer, rank: int, *, scheme: Scheme = 1, bias: bool | None = None) -> nn.Sequential:
    """The sequence that `low_rank_layer` returns, before the weights are computed: its parameters hold anything.

    Args:
        layer: As for `low_rank_layer`; only its shape and settings count.
        rank: As for `low_rank_layer`.
        scheme: As for `low_rank_layer`.
        bias: Whether the second layer has a bias; by default as in the layer.

    Returns:
        A sequence of two layers.

    Example:
        >>> empty_low_rank_layer(nn.Linear(6, 5), 2)
        Sequential(
          (0): Linear(in_features=6, out_features=2, bias=False)
          (1): Linear(in_features=2, out_features=5, bias=True)
        )
    """
    layer = as_linear(layer)
    # On the meta device first: no time and no random numbers go into an initialisation.
    one: dict[str, Any] = {"bias": False, "device": "meta"}
    other: dict[str, Any] = {"bias": layer.bias is not None if bias is None else bias, "device": "meta"}
    if isinstance(layer, nn.Linear):
        sequence = nn.Sequential(
            nn.Linear(layer.in_features, rank, **one), nn.Linear(rank, layer.out_features, **other)
        )
    else:
        kind = nn.Conv1d if isinstance(layer, nn.Conv1d) else nn.Conv2d
        mine, others = _split_settings(layer, scheme)
        sequence = nn.Sequential(
            kind(layer.in_channels, rank, **mine, **one), kind(rank, layer.out_channels, **others, **other)
        )
    sequence.to(layer.weight.dtype).to_empty(device=layer.weight.device).train(layer.training)
    for name, parameter in sequence.named_parameters():
        like = layer.bias if name == "1.bias" and layer.bias is not None else layer.weight
        parameter.requires_grad_(like.requires_grad)
    return sequence


def _split_settings(layer: nn.Conv1d | nn.Conv2d, scheme: Scheme) -> tuple[dict[str, Any], dict[str, Any]]:
    """The two convolutions' kernel, stride, padding, dilation and padding mode."""
    settings = {"kernel_size": layer.kernel_size, "stride": layer.stride, "dilation": layer.dilation}
    rest = {"padding": layer.padding, "padding_mode": layer.padding_mode}
    if scheme == 1 or isinstance(layer, nn.Conv1d) or layer.kernel_size[0] == 1:
        # Of a kernel with one row both schemes are the same; one form for both, so that weights tell it.
        return {**settings, **rest}, {"kernel_size": 1}
    neutral = {"kernel_size": 1, "stride": 1, "dilation": 1, "padding": 0}
    if not isinstance(layer.padding, str):  # "same" and "valid" mean the right thing for each of the two kernels
        settings["padding"] = layer.padding
    wide = {name: (neutral[name], value[1]) for name, value in settings.items()}
    high = {name: (value[0], neutral[name]) for name, value in settings.items()}
    return {**rest, **wide}, {**rest, **high}


def _check(layer: Layer, rank: int, scheme: Scheme) -> None:
    check_scheme(scheme)
    if not isinstance(layer, nn.Linear | nn.Conv1d | nn.Conv2d) and not is_transposed(layer):
        raise TypeError(f"`layer` must be a Linear, Conv1d or Conv2d, but it {reason_against(layer)}")
    if reason := reason_against(layer, scheme=scheme):
        raise ValueError(f"`layer` must be one that can be split, but it {reason}")
    check_positive_int("rank", rank)
    full = full_rank(layer, scheme=scheme)
    if rank > full:
        raise ValueError(f"`rank` must be from 1 to {full}, the full rank, got {rank}")
    if layer.weight.is_meta:
        raise ValueError("`layer` must have a weight with values, got one on the meta device")
    if not bool(layer.weight.isfinite().all()):
        raise ValueError("`layer` must have a finite weight, got NaN or infinity in it")
