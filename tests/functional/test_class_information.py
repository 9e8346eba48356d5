import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_plugins.functional import (
    binary_symmetric_channel_crossover,
    binary_symmetric_channel_information,
    class_entropy,
    class_posterior_information,
    class_posterior_scores,
    gaussian_information,
    infonce_bound,
    infonce_ceiling,
)

TEN = torch.full((10,), 0.1, dtype=torch.float64)


@pytest.mark.parametrize(
    ("k", "classes", "ceiling"),
    [(16, 10, 1.972), (256, 10, 2.285), (1024, 10, 2.298), (256, 100, 4.390), (4096, 100, 4.593)],
)
def test_ceiling_of_balanced_classes(k, classes, ceiling):
    assert infonce_ceiling(k, torch.full((classes,), 1 / classes)) == pytest.approx(ceiling, abs=1.1e-3)


def test_ceiling_by_simulation_with_the_ideal_critic():
    """Unbalanced classes; the ideal critic knows them: -ln p_c for the same class, minus infinity for others."""
    p, k = torch.tensor([0.5, 0.3, 0.2]), 32
    generator = torch.Generator().manual_seed(0)
    values = []
    for _ in range(4000):
        c = torch.multinomial(p, k, replacement=True, generator=generator)
        scores = torch.where(c[:, None] == c, -p[c].log()[:, None], -torch.inf)
        values.append(infonce_bound(scores))
    values = torch.stack(values)
    error = float(values.std() / math.sqrt(len(values)))
    assert float(values.mean()) == pytest.approx(infonce_ceiling(k, p), abs=4 * error)
    assert infonce_ceiling(k, p) < float(class_entropy(p)) < infonce_ceiling(k)


@given(counts=st.lists(st.integers(1, 50), min_size=1, max_size=6), k=st.integers(2, 300))
def test_ceiling_rises_with_k_to_the_entropy(counts, k):
    p = torch.tensor(counts, dtype=torch.float64) / sum(counts)
    ceiling, entropy = infonce_ceiling(k, p), float(class_entropy(p))
    assert -1e-9 <= ceiling <= min(entropy, math.log(k)) + 1e-9
    assert ceiling <= infonce_ceiling(k + 1, p) + 1e-9
    assert infonce_ceiling(20_000, p) == pytest.approx(entropy, abs=0.02)


@given(sources=st.integers(1, 20), crossover=st.floats(0, 0.5))
def test_channel_and_its_inverse(sources, crossover):
    information = binary_symmetric_channel_information(sources, crossover)
    found = binary_symmetric_channel_crossover(sources, max(information, 0.0))
    assert binary_symmetric_channel_information(sources, found) == pytest.approx(information, abs=1e-12)
    assert binary_symmetric_channel_information(sources, 1 - crossover) == pytest.approx(information)


def test_channel_of_published_crossovers_in_bits():
    bits = [binary_symmetric_channel_information(10, p) / math.log(2) for p in (0.243, 0.146, 0.079, 0.031, 0.0)]
    assert bits == pytest.approx([2, 4, 6, 8, 10], abs=0.02)


def test_posteriors_by_enumeration():
    """A discrete joint distribution with X and Y independent given the class: the ratio equals p(x, y) / p(x) p(y)."""
    prior = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    x_given_c, y_given_c = torch.rand(2, 3, 4, generator=generator, dtype=torch.float64).softmax(dim=2).unbind()
    joint = (prior[:, None, None] * x_given_c[:, :, None] * y_given_c[:, None]).sum(0)
    p_x, p_y = joint.sum(1), joint.sum(0)
    log_x, log_y = ((prior[:, None] * given_c / p).T.log() for given_c, p in ((x_given_c, p_x), (y_given_c, p_y)))
    scores = class_posterior_scores(log_x, log_y, prior)
    torch.testing.assert_close(scores, (joint / p_x[:, None] / p_y).log())
    counts = (joint * 20_000).round().long().flatten()
    rows = torch.arange(16).repeat_interleave(counts)
    found = class_posterior_information(log_x[rows // 4], log_y[rows % 4], prior)
    torch.testing.assert_close(found, (joint * scores).sum(), rtol=1e-3, atol=1e-4)


def test_certain_posteriors_give_the_entropy():
    c = torch.arange(1000) % 10
    certain = torch.full((1000, 10), -torch.inf).scatter(1, c[:, None], 0.0)
    torch.testing.assert_close(class_posterior_information(certain, certain, TEN).double(), class_entropy(TEN))


def test_gaussian_by_determinants():
    a = torch.randn(7, 20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    s = a @ a.T / 20
    expected = (s[:3, :3].logdet() + s[3:, 3:].logdet() - s.logdet()) / 2
    torch.testing.assert_close(gaussian_information(s, 3), expected)
    scale = torch.diag(torch.rand(7, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + 0.1)
    torch.testing.assert_close(gaussian_information(scale @ s @ scale, 3), expected)


HALF = torch.tensor([[0.5, 0.5]]).log()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: infonce_ceiling(1), ValueError, "`k` must be at least 2, got 1"),
        (lambda: infonce_ceiling(2.0), TypeError, "`k` must be an int .* did you mean 2"),
        (lambda: infonce_ceiling(8, torch.tensor([3.0, 5.0])), ValueError, "sum 8; divide counts by their sum"),
        (lambda: class_entropy(torch.tensor([1.5, -0.5])), ValueError, "`probabilities` must be .* non-negative"),
        (lambda: binary_symmetric_channel_information(0, 0.1), ValueError, "`sources` must be at least 1"),
        (lambda: binary_symmetric_channel_information(4, 1.5), ValueError, r"`crossover` must be in \[0, 1\]"),
        (lambda: binary_symmetric_channel_crossover(2, 2.0), ValueError, "bits times ln 2 are nats"),
        (
            lambda: class_posterior_information(torch.tensor([[2.0, 1.0]]), HALF, torch.tensor([0.5, 0.5])),
            ValueError,
            "`log_p_x` must be logarithms of probabilities; pass logits through `log_softmax`",
        ),
        (
            lambda: class_posterior_information(HALF.expand(500, 2), HALF.expand(500, 2), torch.tensor([0.9, 0.1])),
            ValueError,
            "`log_p_x` must be calibrated posteriors: their mean is 0.40",
        ),
        (lambda: class_posterior_scores(HALF, HALF, TEN), ValueError, r"`log_p_x` must have shape \(N, 10\)"),
        (lambda: class_posterior_scores(HALF, HALF, torch.tensor([1.0, 0.0])), ValueError, "`prior` must be positive"),
        (lambda: gaussian_information(torch.ones(2, 3)), ValueError, r"`covariance` must have shape \(d, d\)"),
        (lambda: gaussian_information(torch.eye(3)), ValueError, r"`x_features` must be in \[1, 2\]"),
        (
            lambda: gaussian_information(torch.ones(4, 4)),
            ValueError,
            "must be positive definite, the block of x is not",
        ),
    ],
)
def test_bad_arguments_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
