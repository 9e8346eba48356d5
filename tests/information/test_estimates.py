import math

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_plugins.functional import class_entropy, infonce_ceiling
from lightning_plugins.information import (
    CriticSettings,
    EstimateSettings,
    class_information,
    estimate,
    estimate_information,
    fit_class_probe,
)

START = CriticSettings(max_steps=0, test=0.6)


def correlated(n, d, bits, seed=0):
    rho = math.sqrt(1 - 2 ** (-2 * bits / d))
    x, noise = torch.randn(2, n, d, generator=torch.Generator().manual_seed(seed)).unbind()
    return x, rho * x + math.sqrt(1 - rho**2) * noise


def same_class(n, seed=0, noise=0.1, p=(0.5, 0.3, 0.2)):
    generator = torch.Generator().manual_seed(seed)
    c = torch.multinomial(torch.tensor(p), n, replacement=True, generator=generator)
    centres = torch.eye(len(p)) * 3
    x, y = (centres[c] + noise * torch.randn(n, len(p), generator=generator) for _ in range(2))
    return x, y, c


def test_gaussian_bound_is_near_the_truth_and_below_it():
    x, y = correlated(8000, 4, bits=4.0)
    found = estimate_information(x, y, settings=EstimateSettings(fit=START, units="bits"))
    assert found.units == "bits"
    assert 3.7 < found.estimate < 4.0 + 2 * found.standard_error
    assert 0.0 < found.standard_error < 0.1
    assert found.num_candidates == 4800
    assert found.ceiling == pytest.approx(math.log2(4800))
    assert found.entropy is found.class_information is found.class_ceiling is found.consistency is None
    few = estimate_information(x, x.clone(), settings=EstimateSettings(fit=START, units="bits", num_candidates=2))
    assert few.estimate < few.ceiling == 1.0  # more is shared, and K lets less through
    assert "near its ceiling" in str(few)
    assert "near its ceiling" not in str(found)


def test_classes_bound_what_same_class_pairs_share():
    p = torch.tensor([0.5, 0.3, 0.2])
    x, y, c = same_class(3000)
    found = estimate_information(x, y, labels=c, settings=EstimateSettings(fit=CriticSettings(max_steps=200)))
    entropy = float(class_entropy(p))
    assert found.entropy == pytest.approx(entropy, abs=0.03)
    assert found.class_information == pytest.approx(found.entropy, abs=0.02)  # the classes are told apart
    assert found.class_posterior == pytest.approx(found.entropy, abs=0.03)
    assert found.class_ceiling == pytest.approx(infonce_ceiling(found.num_candidates, p), abs=0.03)
    assert entropy - 0.1 < found.estimate < found.class_ceiling + 3 * found.standard_error


def test_classes_that_cannot_be_told_apart_leave_no_information():
    x, y, c = same_class(2000, noise=50.0)
    found = estimate_information(x, y, labels=c, settings=EstimateSettings(fit=START))
    assert abs(found.estimate) < 0.1
    assert found.class_information < 0.05
    assert abs(found.class_posterior) < 0.05


def test_held_out_pairs_are_used_and_bits_are_nats_over_ln_2():
    x, y, c = same_class(600)
    unseen = same_class(400, seed=1)
    nats, bits = (
        estimate_information(x, y, labels=c, held_out=unseen, settings=EstimateSettings(fit=START, units=units))
        for units in ("nats", "bits")
    )
    assert nats.num_candidates == 400
    for name in ("estimate", "standard_error", "ceiling", "class_ceiling", "entropy", "class_information"):
        assert getattr(bits, name) * math.log(2) == pytest.approx(getattr(nats, name))
    assert bits.class_posterior * math.log(2) == pytest.approx(nats.class_posterior)
    assert bits.num_candidates == nats.num_candidates


def test_consistency():
    x, y = correlated(6000, 1, bits=1.0)
    found = estimate_information(x, y, settings=EstimateSettings(fit=START, consistency=True))
    assert found.consistency["shuffled"] == pytest.approx(0.0, abs=0.02)
    assert found.consistency["function of y"] == pytest.approx(1.0, abs=0.05)
    assert found.consistency["two copies"] == pytest.approx(2.0, abs=0.15)


def test_probe_is_calibrated():
    """Overlapping classes on a line, whose posterior is known: a logistic function."""
    generator = torch.Generator().manual_seed(0)
    c = torch.randint(2, (6000,), generator=generator)
    x = (2.0 * c - 1)[:, None] + torch.randn(6000, 1, generator=generator)
    probe = fit_class_probe(x[:3000], c[:3000])
    grid = torch.linspace(-2, 2, 9)[:, None]
    torch.testing.assert_close(
        probe.log_posteriors(grid).exp()[:, 1], torch.sigmoid(2 * grid[:, 0]).double(), atol=0.04, rtol=0
    )
    truth = math.log(2) + float(nn.functional.logsigmoid((2.0 * c - 1) * 2 * x[:, 0])[3000:].mean())
    assert class_information(probe, x[3000:], c[3000:]) == pytest.approx(truth, abs=0.01)


def test_encoder_is_frozen_and_left_as_it_was():
    x, y, c = same_class(200)
    encoder = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))
    encoder[1].eval()
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    loader = DataLoader(TensorDataset(x, y, c), batch_size=64)
    results = [estimate(encoder, loader, held_out=loader, settings=EstimateSettings(fit=START)) for _ in range(2)]
    assert results[0] == results[1]
    assert results[0].entropy is not None
    torch.testing.assert_close(dict(encoder.state_dict()), before, rtol=0, atol=0)
    assert [module.training for module in encoder] == [True, False, True]


X, Y, C = same_class(40)
BAD = {
    "bound": (lambda: EstimateSettings(bound="nce"), ValueError, "`bound` must be 'infonce'.*, got 'nce'"),
    "critic": (lambda: EstimateSettings(critic="joined"), ValueError, "did you mean 'joint'"),
    "fit": (lambda: EstimateSettings(fit={"lr": 1}), TypeError, "`fit` must be CriticSettings, got dict"),
    "K = 1": (lambda: EstimateSettings(num_candidates=1), ValueError, "`num_candidates` must be at least 2"),
    "clip": (lambda: EstimateSettings(clip=-1.0), ValueError, "`clip` must be positive"),
    "more candidates than pairs": (
        lambda: estimate_information(X, Y, settings=EstimateSettings(num_candidates=999, fit=START)),
        ValueError,
        r"`num_candidates` must be in \[2, 24\]",
    ),
    "real labels": (
        lambda: estimate_information(X, Y, labels=C.float()),
        TypeError,
        "`labels` must be a tensor of int",
    ),
    "fewer labels": (lambda: estimate_information(X, Y, labels=C[:3]), ValueError, r"`labels` must have shape \(40,\)"),
    "nothing left": (
        lambda: estimate_information(X, Y, settings=EstimateSettings(fit=CriticSettings(test=0.0))),
        ValueError,
        "`settings.fit.test` must be positive without `held_out`",
    ),
    "one member": (
        lambda: fit_class_probe(X[:6], torch.tensor([0, 0, 1, 1, 1, 2])),
        ValueError,
        "no class with one member, class 2 has one",
    ),
    "no batch": (lambda: estimate(nn.Identity(), []), ValueError, "`dataloader` must give at least one batch"),
    "tensor batches": (lambda: estimate(nn.Identity(), [X]), TypeError, r"must give \(x, y\) or .*, got Tensor"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_are_named(case):
    call, error, message = BAD[case]
    with pytest.raises(error, match=message):
        call()
