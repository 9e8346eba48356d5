"""Bounds on the mutual information from a matrix of critic scores.

In a matrix of shape ``(K, K)`` row ``i`` holds the scores of anchor ``x_i`` with all candidates ``y_j``; positive pairs
are on the diagonal. All values are in nats: divide by ``ln 2`` for bits. Half-precision scores are converted to
float32.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_plugins._checks import check_fraction, is_number, shown
from lightning_plugins.functional.tensors import check_floating, check_shape


def infonce_bound(scores: Tensor) -> Tensor:
    """Compute the InfoNCE lower bound, ``ln K + mean(f_ii - logsumexp_j f_ij)``.

    Its expectation is at most the mutual information for every critic, and its value at most ``ln K`` for every matrix:
    near that limit it reflects that K is small rather than the information in the representation.

    Args:
        scores: Floating tensor of shape ``(K, K)``, ``K >= 2``.

    Returns:
        Scalar in nats, at most ``ln K``; ``ln K`` minus it is the contrastive loss.

    Raises:
        TypeError: If ``scores`` is not a floating tensor.
        ValueError: If it is not square or has fewer than two rows.

    Example:
        >>> infonce_bound(torch.tensor([[20.0, 0.0], [0.0, 20.0]]))  # no more than ln 2 with two pairs
        tensor(0.6931)

    Source:
        van den Oord et al., 2018, https://arxiv.org/abs/1807.03748.
    """
    f = _checked(scores)
    return math.log(len(f)) + (f.diagonal() - f.logsumexp(dim=1)).mean()


def donsker_varadhan_bound(scores: Tensor) -> Tensor:
    """Compute the Donsker-Varadhan bound, ``mean f_ii - ln mean_{i != j} exp(f_ij)``.

    It is a lower bound with the true partition function. With a batch mean the logarithm is biased downwards, so the
    value can exceed the mutual information, and ``ln K``.

    Args:
        scores: Floating tensor of shape ``(K, K)``, ``K >= 2``.

    Returns:
        Scalar in nats; adding a constant to all scores does not change it.

    Raises:
        TypeError: If ``scores`` is not a floating tensor.
        ValueError: If it is not square or has fewer than two rows.

    Example:
        >>> donsker_varadhan_bound(torch.tensor([[2.0, 1.0], [1.0, 2.0]]))
        tensor(1.)

    Source:
        Belghazi et al., ICML 2018, https://arxiv.org/abs/1801.04062, for its use as an estimator.
    """
    f = _checked(scores)
    return f.diagonal().mean() - _log_mean_exp_off_diagonal(f)


def nwj_bound(scores: Tensor) -> Tensor:
    """Compute the Nguyen-Wainwright-Jordan bound, ``1 + mean(f_ii - 1) - mean_{i != j} exp(f_ij - 1)``.

    Its expectation is at most the mutual information for every critic; its variance grows exponentially with it.

    Args:
        scores: Floating tensor of shape ``(K, K)``, ``K >= 2``. Optimal is ``1 +`` the logarithm of the density ratio.

    Returns:
        Scalar in nats.

    Raises:
        TypeError: If ``scores`` is not a floating tensor.
        ValueError: If it is not square or has fewer than two rows.

    Example:
        >>> nwj_bound(torch.ones(3, 3))  # the best critic of independent pairs
        tensor(0.)

    Source:
        Nguyen et al., 2010, https://arxiv.org/abs/0809.0853; the form of Poole et al., ICML 2019,
        https://arxiv.org/abs/1905.06922.
    """
    f = _checked(scores)
    return f.diagonal().mean() - (_log_mean_exp_off_diagonal(f) - 1).exp()


def js_bound(scores: Tensor) -> Tensor:
    """Compute the value of `nwj_bound` with the gradient of the Jensen-Shannon bound, which is stable to train with.

    The critic optimal for this gradient is the log density ratio, one less than the optimum for the value: after
    training, ``nwj_bound(scores + 1)`` is tighter and equally valid.

    Args:
        scores: Floating tensor of shape ``(K, K)``, ``K >= 2``.

    Returns:
        Scalar in nats, to be maximised.

    Raises:
        TypeError: If ``scores`` is not a floating tensor.
        ValueError: If it is not square or has fewer than two rows.

    Example:
        >>> js_bound(torch.ones(3, 3)) == nwj_bound(torch.ones(3, 3))
        tensor(True)

    Source:
        Poole et al., ICML 2019, https://arxiv.org/abs/1905.06922.
    """
    f = _checked(scores)
    return _with_gradient_of(_jensen_shannon(f), value=nwj_bound(f))


def mine_loss(scores: Tensor, log_average: Tensor | None = None, *, decay: float = 0.9) -> tuple[Tensor, Tensor]:
    """Compute MINE's loss: minus `donsker_varadhan_bound`, with a moving average of the partition in the gradient.

    Args:
        scores: Floating tensor of shape ``(K, K)``, ``K >= 2``.
        log_average: Logarithm of the moving average, as the last call returned it; None in the first step.
        decay: Weight of the old average in the new one, in ``[0, 1]``.

    Returns:
        The loss, a scalar in nats to be minimised, and the logarithm of the new moving average for the next step.

    Raises:
        TypeError: If ``scores`` is not a floating tensor, or ``decay`` not a number.
        ValueError: If ``scores`` is not square or has fewer than two rows, or ``decay`` is outside ``[0, 1]``.

    Example:
        >>> loss, log_average = mine_loss(torch.tensor([[2.0, 1.0], [1.0, 2.0]]))
        >>> loss, log_average
        (tensor(-1.), tensor(1.))

    Source:
        Belghazi et al., ICML 2018, https://arxiv.org/abs/1801.04062. In common code the average never accumulates,
        because it returns the batch's own mean; here it is the average.
    """
    check_fraction("decay", decay)
    f = _checked(scores)
    if log_average is not None:
        check_floating("log_average", log_average)
        check_shape("log_average", log_average, ())
    now = _log_mean_exp_off_diagonal(f)
    average = now.detach()
    if log_average is not None and decay > 0:
        old = log_average.detach().to(average) + math.log(decay)
        average = torch.logaddexp(old, average + math.log1p(-decay)) if decay < 1 else log_average.detach().to(average)
    positive = f.diagonal().mean()
    return _with_gradient_of((now - average).exp() - positive, value=now - positive), average


def smile_bound(scores: Tensor, clip: float = 5.0) -> Tensor:
    """Compute SMILE's estimate: `donsker_varadhan_bound` with scores clipped in the partition term only.

    The gradient is that of the Jensen-Shannon bound. It is not a bound: a smaller ``clip`` lowers the variance, but the
    value can exceed the mutual information by more.

    Args:
        scores: Floating tensor of shape ``(K, K)``, ``K >= 2``.
        clip: The scores off the diagonal are clipped to ``[-clip, clip]``; positive, ``inf`` clips nothing.

    Returns:
        Scalar in nats, to be maximised.

    Raises:
        TypeError: If ``scores`` is not a floating tensor.
        ValueError: If it is not square or has fewer than two rows, or ``clip`` is not positive.

    Example:
        >>> smile_bound(torch.tensor([[2.0, 9.0], [9.0, 2.0]]), clip=1.0)
        tensor(1.)

    Source:
        Song and Ermon, ICLR 2020, https://arxiv.org/abs/1910.06222.
    """
    check_clip(clip)
    clip = float(clip)
    f = _checked(scores)
    limit = clip if clip <= torch.finfo(f.dtype).max else math.inf
    value = f.diagonal().mean() - _log_mean_exp_off_diagonal(f.clamp(-limit, limit))
    return _with_gradient_of(_jensen_shannon(f), value=value)


def check_clip(clip: float) -> None:
    """Raise an error for an invalid clip; infinity disables clipping.

    Raises:
        TypeError: If it is not a number.
        ValueError: If it is not above 0.
    """
    if not is_number(clip):
        raise TypeError(f"`clip` must be a number above 0, got {shown(clip)}")
    if not clip > 0:  # written so that NaN fails too
        raise ValueError(f"`clip` must be positive, got {clip!r}; `math.inf` clips nothing")


def _jensen_shannon(f: Tensor) -> Tensor:
    off = F.softplus(f).sum() - F.softplus(f.diagonal()).sum()
    return -F.softplus(-f.diagonal()).mean() - off / (len(f) * (len(f) - 1))


def _with_gradient_of(surrogate: Tensor, *, value: Tensor) -> Tensor:
    return surrogate - surrogate.detach() + value.detach()


def _log_mean_exp_off_diagonal(f: Tensor) -> Tensor:
    own = torch.eye(len(f), dtype=torch.bool, device=f.device)
    return f.masked_fill(own, -torch.inf).flatten().logsumexp(dim=0) - math.log(len(f) * (len(f) - 1))


def _checked(scores: Tensor) -> Tensor:
    check_floating("scores", scores)
    if scores.ndim != 2 or scores.shape[0] != scores.shape[1] or len(scores) < 2:
        raise ValueError(
            f"`scores` must have shape (K, K) with K >= 2, a row for each anchor, got {tuple(scores.shape)}; with "
            "K = 1 there is nothing to tell the pair from"
        )
    return scores.float() if scores.dtype in {torch.float16, torch.bfloat16} else scores
