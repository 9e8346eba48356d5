"""Functions of singular values: soft thresholding and the polar factor, with closed-form gradients."""

from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.autograd import Function

from lightning_plugins._checks import check_choice, check_finite_number
from lightning_plugins.functional.derivatives import last_derivative
from lightning_plugins.functional.gram_svd import check_matrices, gram_svd, unit_scale
from lightning_plugins.functional.spectrum import at_least_float32, full_precision, widened_matrices
from lightning_plugins.functional.tensors import check_floating, check_leading

PolarMethod = Literal["auto", "eigh", "products"]

# Coefficients of odd polynomials of degree five. Each is the best one on the interval onto which those before it map
# [1e-3, 1] (float32) or [1e-4, 1] (float64), scaled so that it maps onto an interval around 1; the last one is that of
# Newton and Schulz, which exceeds 1 nowhere. They raise these values to 1, but not yet rounding errors. No interval
# reaches below a fiftieth of its upper end, so that smaller values are not left behind.
_LAST = (15 / 8, -10 / 8, 3 / 8)
_POLYNOMIALS = {
    torch.float32: (
        (8.319686, -23.85945, 17.531445),
        (4.122734, -2.980572, 0.5521),
        (3.961614, -2.940291, 0.559129),
        (3.310438, -2.482536, 0.509375),
        (2.293776, -1.662728, 0.41814),
        (1.890615, -1.267243, 0.376728),
        _LAST,
    ),
    torch.float64: (
        (8.35095, -23.949112, 17.597327),
        (4.171685, -2.993421, 0.550336),
        (4.154229, -2.988809, 0.550947),
        (4.083359, -2.970429, 0.553636),
        (3.785759, -2.829115, 0.548743),
        (2.906464, -2.173714, 0.474554),
        (2.041458, -1.424641, 0.392849),
        (1.876273, -1.251414, 0.375141),
        _LAST,
    ),
}
_PRODUCTS_FROM = 64  # on an accelerator, where an eigendecomposition launches thousands of small kernels


def singular_value_threshold(weight: Tensor, threshold: Tensor | float) -> Tensor:
    """Reduce every singular value by ``threshold``, those below it to exactly zero: ``U @ diag(max(s - t, 0)) @ V.T``.

    The rank of the result is the number of singular values above the threshold. The gradient, with respect to the
    weight and to the threshold, is a closed form in divided differences of the map: it is finite for equal and for
    vanishing singular values. One eigendecomposition of the smaller Gram matrix is used for forward and backward.

    Accuracy: within about ``30 * eps`` of the largest singular value, or ``sqrt(eps)`` of it (3e-4 in float32) if the
    threshold separates singular values smaller than that.

    Args:
        weight: Floating tensor of shape ``(..., m, n)`` with ``m, n >= 1``.
        threshold: A number, or a tensor that broadcasts to shape ``(...)``, in the unit of the singular values; a
            negative entry of a tensor counts as 0.

    Returns:
        Tensor of the shape of ``weight``: float32 for float16 and bfloat16 input, else the input's dtype. NaN for a
        matrix with a non-finite value. It can be differentiated once; a second time raises `RuntimeError`.

    Raises:
        TypeError: If ``weight`` is not a real floating tensor or ``threshold`` neither a number nor such a tensor.
        ValueError: If ``weight`` does not have the shape described, or ``threshold`` is a negative or infinite number.

    Example:
        >>> singular_value_threshold(torch.diag(torch.tensor([3.0, 1.0])), 2.0)
        tensor([[1., 0.],
                [0., 0.]])

    Source:
        The proximal map of the nuclear norm: Cai, Candès and Shen, SIAM J. Optim. 2010,
        https://arxiv.org/abs/0810.3286. The form of the gradient is ours.
    """
    check_matrices("weight", weight)
    if isinstance(threshold, Tensor):
        check_floating("threshold", threshold)
        check_leading("threshold", threshold.shape, "weight", weight.shape[:-2])
    elif check_finite_number("threshold", threshold) < 0:
        raise ValueError(f"`threshold` must be at least 0, got {threshold!r}")
    with full_precision(weight):
        matrix = at_least_float32(weight)
        threshold = torch.as_tensor(threshold, dtype=matrix.dtype, device=matrix.device).clamp_min(0)
        wide, turned = _wide(matrix)
        lowered: Tensor = _Threshold.apply(wide, threshold.expand(matrix.shape[:-2]))[0]
    return lowered.mT if turned else lowered


def polar_factor(weight: Tensor, *, method: PolarMethod = "auto") -> Tensor:
    """The partial isometry ``U @ V.T`` over the non-zero singular values: the gradient of the nuclear norm.

    Args:
        weight: Floating tensor of shape ``(..., m, n)`` with ``m, n >= 1``.
        method: ``"eigh"`` decomposes the smaller Gram matrix: singular values below ``sqrt(8 * eps)`` of the largest
            (1e-3 in float32, 4e-8 in float64) count as zero, and a direction whose singular value is a fraction ``x``
            of the largest is exact within about ``eps / x ** 2``. ``"products"`` iterates matrix products: within 2e-3
            for singular values above 1e-3 of the Frobenius norm (1e-4 in float64); smaller ones are raised to at most
            4e3 times (5e4 times) their ratio to that norm, so zero stays zero. ``"auto"`` uses products on an
            accelerator from a smaller side of 64 on, else the decomposition.

    Returns:
        Tensor of the shape of ``weight``, with singular values in ``[0, 1]``: float32 for float16 and bfloat16 input,
        else the input's dtype. NaN for a matrix with a non-finite value. It can be differentiated once; a second time
        raises `RuntimeError`. The derivative always uses the decomposition.

    Raises:
        TypeError: If ``weight`` is not a real floating tensor or ``method`` not a string.
        ValueError: If ``weight`` does not have the shape described, or ``method`` is unknown.

    Example:
        >>> polar_factor(torch.diag(torch.tensor([3.0, -2.0, 0.0])))
        tensor([[ 1.,  0.,  0.],
                [ 0., -1.,  0.],
                [ 0.,  0.,  0.]])

    Source:
        For the products, Amsel, Persson, Musco and Gower, https://arxiv.org/abs/2505.16932.
    """
    check_matrices("weight", weight)
    check_choice("method", method, get_args(PolarMethod))
    with full_precision(weight):
        wide, turned = _wide(widened_matrices(weight))
        if method == "auto":
            method = "products" if wide.is_cuda and wide.shape[-2] >= _PRODUCTS_FROM else "eigh"
        factor: Tensor = _Polar.apply(wide, method == "products")
    return factor.mT if turned else factor


def _wide(matrix: Tensor) -> tuple[Tensor, bool]:
    """The matrices with at most as many rows as columns, and whether they were transposed."""
    turned = matrix.shape[-2] > matrix.shape[-1]
    return (matrix.mT if turned else matrix), turned


def _mapped_gradient(
    grad: Tensor, decomposition: tuple[Tensor, Tensor, Tensor], mapped: Tensor, slope: Tensor, ratio: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradient of ``U @ diag(f(s)) @ V.T``, and the diagonal of ``P = U.T @ grad @ V``.

    The symmetric part of ``P`` is weighted by ``(f_i - f_j) / (s_i - s_j)``, the skew part by
    ``(f_i + f_j) / (s_i + s_j)``, and the part outside the span of ``V`` by ``f / s``. No division by differences of
    squares is needed.

    Args:
        grad: Gradient of the result, ``(..., m, n)``.
        decomposition: ``U``, ``s`` and ``V.T`` as `gram_svd` gives them.
        mapped: ``f(s)``.
        slope: ``f'(s)``, for equal singular values.
        ratio: ``f(s) / s``, with its limit where ``s`` is zero.

    Returns:
        Tensors of shapes ``(..., m, n)`` and ``(..., m)``.
    """
    left, values, right = decomposition
    inside = left.mT @ grad
    projected = inside @ right.mT
    one, other = values[..., None], values[..., None, :]
    gap, total = one - other, one + other
    equal = gap.abs() <= 1e-6 * total  # the quotient would be rounding error; also covers both being zero
    gamma = (mapped[..., None] - mapped[..., None, :]) / torch.where(equal, 1, gap)
    gamma = torch.where(equal, (slope[..., None] + slope[..., None, :]) / 2, gamma)
    omega = (mapped[..., None] + mapped[..., None, :]) / total.masked_fill(total == 0, torch.inf)
    core = (gamma + omega) / 2 * projected + (gamma - omega) / 2 * projected.mT
    outside = ratio[..., None] * (inside - projected @ right)
    return left @ (core @ right + outside), projected.diagonal(dim1=-2, dim2=-1)


class _Threshold(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(matrix: Tensor, threshold: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        left, values, _, right, poison = gram_svd(matrix)
        lowered = (values - threshold[..., None]).clamp_min(0)
        return left @ (lowered[..., None] * right) + poison[..., None, None], left, values, right

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: tuple[Tensor, ...]) -> None:
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs, *output[1:])

    @staticmethod
    @last_derivative
    def backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, Tensor | None]:
        if grad is None:
            return None, None
        _, threshold, left, values, right = ctx.saved_tensors
        with full_precision(left):
            lowered = (values - threshold[..., None]).clamp_min(0)
            kept = (lowered > 0).to(values.dtype)
            ratio = lowered / values.masked_fill(values == 0, torch.inf)
            grad_matrix, diagonal = _mapped_gradient(grad, (left, values, right), lowered, kept, ratio)
            return grad_matrix, -(diagonal * kept).sum(-1)


class _Polar(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(matrix: Tensor, products: bool) -> Tensor:
        if products:
            return _polar_by_products(matrix)
        left, kept, _, right, poison = _polar_parts(matrix)
        return left @ (kept[..., None] * right) + poison

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, bool], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0])

    @staticmethod
    @last_derivative
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (matrix,) = ctx.saved_tensors
        with full_precision(matrix):
            left, kept, values, right, _ = _polar_parts(matrix)
            ratio = kept / values.masked_fill(kept == 0, torch.inf)
            right, values = right * kept[..., None], values * kept
            gradient, _ = _mapped_gradient(grad, (left, values, right), kept, torch.zeros_like(kept), ratio)
            return gradient, None


def _polar_parts(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``U``, the mask of non-zero singular values, the values, ``V.T``, and 0 or NaN."""
    left, values, _, right, poison = gram_svd(matrix)
    least = (8 * torch.finfo(values.dtype).eps) ** 0.5 * values.amax(-1, keepdim=True)
    return left, (values > least).to(values.dtype), values, right, poison[..., None, None]


def raise_to_one(matrix: Tensor) -> Tensor:
    """Raise the singular values to 1 by products alone.

    Args:
        matrix: Float32 or float64 tensor of shape ``(b, m, n)`` with Frobenius norms of at most 1.

    Returns:
        Tensor of the same shape; see `polar_factor` for the accuracy.

    Example:
        >>> raise_to_one(torch.diag(torch.tensor([0.8, 0.1]))[None]).round(decimals=3)
        tensor([[[1., 0.],
                 [0., 1.]]])
    """
    wide = matrix.shape[-2] <= matrix.shape[-1]
    for of_itself, of_cube, of_fifth in _POLYNOMIALS[matrix.dtype]:
        gram = matrix @ matrix.mT if wide else matrix.mT @ matrix
        middle = torch.baddbmm(gram, gram, gram, beta=of_cube, alpha=of_fifth)
        left, right = (middle, matrix) if wide else (matrix, middle)
        matrix = torch.baddbmm(matrix, left, right, beta=of_itself)
    return matrix


def _polar_by_products(matrix: Tensor) -> Tensor:
    factor: Tensor = unit_scale(matrix)[0]
    length: Tensor = torch.linalg.matrix_norm(factor, keepdim=True)
    factor = factor / length.masked_fill(length == 0, 1)
    return raise_to_one(factor.reshape(-1, *matrix.shape[-2:])).reshape(matrix.shape)
