"""Mutual information in closed form: of classes, of a binary symmetric channel, of Gaussians; all in nats."""

import math

import torch
from torch import Tensor

from lightning_plugins._checks import check_finite_number, check_fraction, check_positive_int
from lightning_plugins.functional.spectrum import at_least_float32
from lightning_plugins.functional.tensors import check_floating, check_real


def class_entropy(probabilities: Tensor) -> Tensor:
    """Compute the entropy of classes, an upper bound on the information that same-class pairs share.

    Args:
        probabilities: Shape ``(C,)``, non-negative with sum 1: probability with which the *sampler* draws each class.

    Returns:
        Scalar in nats, in ``[0, ln C]``, in float64.

    Raises:
        ValueError: If ``probabilities`` is not a distribution over at least one class.

    Example:
        >>> round(class_entropy(torch.full((10,), 0.1)).item(), 4)  # ln 10
        2.3026
    """
    p = check_distribution("probabilities", probabilities)
    entropy: Tensor = -torch.special.xlogy(p, p).sum()
    return entropy


def infonce_ceiling(k: int, class_probabilities: Tensor | None = None) -> float:
    """Compute the maximum expected value of InfoNCE with K candidates.

    Without classes it is ``ln K``. With same-class pairs the candidates of the anchor's own class cannot be
    distinguished from its partner, and the optimal critic reaches ``E[ln K - ln n]``, ``n = 1 + Binomial(K - 1, p_c)``.

    Args:
        k: Number of candidates per anchor, including its partner; at least 2.
        class_probabilities: Shape ``(C,)``: probability of each class; None for pairs without classes.

    Returns:
        The ceiling in nats.

    Raises:
        TypeError: If ``k`` is not an int.
        ValueError: If ``k`` is less than 2, or ``class_probabilities`` is not a distribution.

    Example:
        >>> round(infonce_ceiling(64, torch.full((10,), 0.1)), 3), round(infonce_ceiling(64), 3)
        (2.23, 4.159)

    Source:
        Derived; the sampling is that of Lee et al., https://arxiv.org/abs/2308.15704.
    """
    if check_positive_int("k", k) < 2:
        raise ValueError("`k` must be at least 2, got 1: with a single candidate there is nothing to tell it from")
    if class_probabilities is None:
        return math.log(k)
    p = check_distribution("class_probabilities", class_probabilities)
    others = torch.arange(k, dtype=torch.float64)
    log_choose = math.lgamma(k) - torch.lgamma(others + 1) - torch.lgamma(k - others)
    expected = 0.0
    for probability in p[p > 0].tolist():
        if probability == 1.0:
            expected += math.log(k)
            continue
        log_mass = log_choose + others * math.log(probability) + (k - 1 - others) * math.log1p(-probability)
        expected += probability * float((log_mass.exp() * (others + 1).log()).sum())
    return math.log(k) - expected


def binary_symmetric_channel_information(sources: int, crossover: float) -> float:
    """Compute the information that fair bits retain if each is flipped with a given probability.

    Args:
        sources: Number of bits, each sent once.
        crossover: Probability of a flip, in ``[0, 1]``.

    Returns:
        ``sources * (ln 2 - H(crossover))`` in nats; divide by ``ln 2`` for bits.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If ``sources`` is less than 1 or ``crossover`` outside ``[0, 1]``.

    Example:
        >>> round(binary_symmetric_channel_information(10, 0.146) / math.log(2), 2)  # bits
        4.0
    """
    check_positive_int("sources", sources)
    p = check_fraction("crossover", crossover)
    entropy = -sum(q * math.log(q) for q in (p, 1 - p) if q > 0)
    return sources * (math.log(2) - entropy)


def binary_symmetric_channel_crossover(sources: int, information: float) -> float:
    """Find the crossover at which a binary symmetric channel retains the given information, by bisection.

    Args:
        sources: Number of bits.
        information: Information in nats, in ``[0, sources * ln 2]``.

    Returns:
        The crossover in ``[0, 0.5]``, to the last digit of a float.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If ``sources`` is less than 1 or ``information`` more than the bits can carry.

    Example:
        >>> [round(binary_symmetric_channel_crossover(10, bits * math.log(2)), 3) for bits in (2, 4, 6, 8, 10)]
        [0.243, 0.146, 0.079, 0.031, 0.0]
    """
    most = check_positive_int("sources", sources) * math.log(2)
    if not 0 <= check_finite_number("information", information) <= most * (1 + 1e-12):
        raise ValueError(
            f"`information` must be in [0, {most:.4f}] nats, what {sources} bits can carry, got {information!r}; "
            "bits times ln 2 are nats"
        )
    low, high = 0.0, 0.5  # the information decreases from one to the other
    for _ in range(100):
        middle = (low + high) / 2
        if binary_symmetric_channel_information(sources, middle) > information:
            low = middle
        else:
            high = middle
    return high if high > 1e-16 else 0.0


def class_posterior_scores(log_p_x: Tensor, log_p_y: Tensor, prior: Tensor) -> Tensor:
    """Compute the log density ratio of all pairs, for same-class pairs with known posteriors.

    With X and Y independent given the class, ``r(x, y) = sum_c p(c|x) p(c|y) / p(c)``. Used as scores in `nwj_bound` or
    `infonce_bound` it gives a valid bound even for wrong posteriors.

    Args:
        log_p_x: Logarithms of the classes' posteriors given each ``x``, shape ``(N, C)``.
        log_p_y: The same given each ``y``, shape ``(M, C)``.
        prior: Shape ``(C,)``, positive with the sum 1: how often the sampler draws each class.

    Returns:
        Shape ``(N, M)``, in nats.

    Raises:
        ValueError: If the shapes do not fit, a row is not normalised, or ``prior`` is not a positive distribution.

    Example:
        >>> certain = torch.tensor([[1.0, 0.0], [0.0, 1.0]]).log()
        >>> class_posterior_scores(certain, certain, torch.tensor([0.5, 0.5]))
        tensor([[0.6931,   -inf],
                [  -inf, 0.6931]])

    Source:
        Derived from the sampling of Lee et al., https://arxiv.org/abs/2308.15704.
    """
    log_prior = _checked_posteriors(log_p_x, log_p_y, prior)
    return torch.logsumexp(log_p_x[:, None] + (log_p_y - log_prior)[None], dim=2)


def class_posterior_information(log_p_x: Tensor, log_p_y: Tensor, prior: Tensor) -> Tensor:
    """Estimate the mutual information of same-class pairs from posteriors, ``mean ln sum_c p(c|x) p(c|y) / p(c)``.

    It has no upper limit and low variance, but is not a bound: with uncalibrated posteriors it can err in either
    direction.

    Args:
        log_p_x: Logarithms of the classes' posteriors given each ``x``, shape ``(N, C)``.
        log_p_y: The same given its partner ``y``, shape ``(N, C)``.
        prior: Shape ``(C,)``, positive with the sum 1: how often the sampler draws each class.

    Returns:
        Scalar in nats.

    Raises:
        ValueError: If the shapes do not fit, a row is not normalised, ``prior`` is not a positive distribution, or the
            mean of the posteriors is far from it, which means that they are not calibrated.

    Example:
        >>> certain = torch.tensor([[1.0, 0.0], [0.0, 1.0]]).log()
        >>> class_posterior_information(certain, certain, torch.tensor([0.5, 0.5]))  # the entropy of two classes
        tensor(0.6931)

    Source:
        Derived from the sampling of Lee et al., https://arxiv.org/abs/2308.15704.
    """
    log_prior = _checked_posteriors(log_p_x, log_p_y, prior)
    if log_p_x.shape != log_p_y.shape:
        raise ValueError(
            f"`log_p_y` must have the shape of `log_p_x`, {tuple(log_p_x.shape)}, got {tuple(log_p_y.shape)}"
        )
    for name, log_p in (("log_p_x", log_p_x), ("log_p_y", log_p_y)):
        distance = 0.5 * float((log_p.exp().mean(dim=0) - log_prior.exp()).abs().sum())
        if distance > 0.1 + math.sqrt(log_p.shape[1] / len(log_p)):  # deviation explained by sampling
            raise ValueError(
                f"`{name}` must be calibrated posteriors: their mean is {distance:.2f} (total variation) away from "
                "`prior`; calibrate the temperature on held-out rows, and give the prior of the sampler"
            )
    return torch.logsumexp(log_p_x + log_p_y - log_prior, dim=1).mean()


def gaussian_information(covariance: Tensor, x_features: int | None = None) -> Tensor:
    """Compute the mutual information of two jointly Gaussian vectors, ``-0.5 * sum ln(1 - rho_k**2)``.

    ``rho_k`` are the canonical correlations. For other distributions it is the value of a Gaussian with the same
    covariance.

    Args:
        covariance: Symmetric positive definite, shape ``(d, d)``: covariance of the concatenated vectors ``(x, y)``.
        x_features: Number of features of ``x``; by default half of ``d``.

    Returns:
        Scalar in nats, at least 0.

    Raises:
        TypeError: If ``x_features`` is not an int.
        ValueError: If ``covariance`` is not square, ``x_features`` not in ``[1, d - 1]``, or a block not positive
            definite.

    Example:
        >>> gaussian_information(torch.tensor([[1.0, 0.8], [0.8, 1.0]]))  # -0.5 * ln(1 - 0.64)
        tensor(0.5108)
    """
    check_floating("covariance", covariance)
    covariance = at_least_float32(covariance)
    if not bool(covariance.isfinite().all()):
        raise ValueError("`covariance` must be finite, got NaN or infinity")
    if covariance.ndim != 2 or covariance.shape[0] != covariance.shape[1] or len(covariance) < 2:
        raise ValueError(f"`covariance` must have shape (d, d) with d >= 2, got {tuple(covariance.shape)}")
    d = len(covariance)
    split = d // 2 if x_features is None else check_positive_int("x_features", x_features)
    if split >= d or (x_features is None and d % 2):
        raise ValueError(f"`x_features` must be in [1, {d - 1}] for a covariance of {d} features, got {x_features!r}")
    factors = []
    for name, block in (("x", covariance[:split, :split]), ("y", covariance[split:, split:])):
        factor, info = torch.linalg.cholesky_ex(block)
        if bool(info != 0):
            raise ValueError(
                f"`covariance` must be positive definite, the block of {name} is not; leave out constant or repeated "
                "features, or add a little to the diagonal"
            )
        factors.append(factor)
    half = torch.linalg.solve_triangular(factors[0], covariance[:split, split:], upper=False)
    whitened = torch.linalg.solve_triangular(factors[1], half.mT, upper=False)
    rho = torch.linalg.svdvals(whitened)
    return -0.5 * torch.log1p(-rho.square().clamp(max=1.0)).sum()


def check_distribution(name: str, p: Tensor) -> Tensor:
    """Return ``p`` in float64 if it is a distribution.

    Args:
        name: The argument's name, for the message.
        p: Shape ``(C,)``.

    Returns:
        The probabilities, normalised to sum exactly to 1.

    Raises:
        TypeError: If it is not a tensor of probabilities.
        ValueError: If ``p`` has another shape, a negative entry or another sum.
    """
    check_real(name, p, "a tensor of shape (C,), non-negative with the sum 1")
    ok = isinstance(p, Tensor) and p.ndim == 1 and len(p) > 0
    if not ok or not bool((p >= 0).all()) or abs(float(p.double().sum()) - 1) > 1e-4:
        shown = tuple(p.shape) if isinstance(p, Tensor) else type(p).__name__
        raise ValueError(
            f"`{name}` must be a tensor of shape (C,), non-negative with the sum 1, got {shown}"
            + (f" with the sum {float(p.double().sum()):.4g}; divide counts by their sum" if ok else "")
        )
    p = p.detach().double()
    return p / p.sum()


def _checked_posteriors(log_p_x: Tensor, log_p_y: Tensor, prior: Tensor) -> Tensor:
    p = check_distribution("prior", prior)
    if bool((p == 0).any()):
        raise ValueError("`prior` must be positive for every class, got 0; leave out classes that are never drawn")
    for name, log_p in (("log_p_x", log_p_x), ("log_p_y", log_p_y)):
        check_floating(name, log_p)
        if log_p.ndim != 2 or log_p.shape[1] != len(p) or len(log_p) == 0:
            raise ValueError(
                f"`{name}` must have shape (N, {len(p)}), a column for each class, got {tuple(log_p.shape)}"
            )
        if float(log_p.logsumexp(dim=1).abs().max()) > 1e-3:
            raise ValueError(f"`{name}` must be logarithms of probabilities; pass logits through `log_softmax` first")
    return p.log().to(log_p_x)
