"""Promises of every metric of a summed Gram matrix."""

import math
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_plugins.functional import (
    autocorrelation_eigenvalues,
    diagonal_entropy,
    effective_rank,
    renyi_entropy,
    von_neumann_entropy,
)
from lightning_plugins.metrics import CorrelationGap, EffectiveRank, Isotropy, RankMe, VonNeumannEntropy
from lightning_plugins.metrics.gram import GramStatistics
from tests._processes import run_on_ranks

METRICS = [VonNeumannEntropy, EffectiveRank, RankMe, Isotropy, CorrelationGap]
BY_FUNCTION = {
    VonNeumannEntropy: von_neumann_entropy,
    EffectiveRank: lambda h: effective_rank(h, of="eigenvalues"),
    RankMe: lambda h: effective_rank(h, of="singular_values"),
    Isotropy: lambda h: renyi_entropy(h, order=2.0).exp() / h.shape[1],
    CorrelationGap: lambda h: diagonal_entropy(h) - von_neumann_entropy(h),
}
SHAPES = [(1, 5), (3, 7), (5, 5), (40, 6)]
every_metric = pytest.mark.parametrize("kind", METRICS, ids=lambda kind: kind.__name__)


def _rows(n, d, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(n, d, generator=generator, dtype=torch.float64) * torch.linspace(0.1, 3.0, d).double()
    return rows.to(dtype)


def _value(kind, *batches):
    metric = kind(batches[0].shape[1])
    for batch in batches:
        metric.update(batch)
    return metric.compute()


@every_metric
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_function_of_the_concatenated_rows(kind, shape):
    rows = _rows(*shape)
    torch.testing.assert_close(_value(kind, *rows.split(2)), BY_FUNCTION[kind](rows), rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("kind", [kind for kind in METRICS if kind is not Isotropy])  # which leaves zero rows out
def test_counts_all_zero_rows_as_the_function_does(kind):
    rows = torch.cat([_rows(6, 4), torch.zeros(3, 4)])
    torch.testing.assert_close(_value(kind, rows), BY_FUNCTION[kind](rows))


@every_metric
@given(sizes=st.lists(st.integers(0, 7), min_size=1, max_size=6), d=st.integers(1, 6), seed=st.integers(0, 2**31))
def test_no_split_into_batches_changes_the_value(kind, sizes, d, seed):
    rows = _rows(sum(sizes) + 1, d, seed)
    expected = _value(kind, rows)
    torch.testing.assert_close(_value(kind, *rows.split([*sizes, 1])), expected, rtol=1e-7, atol=1e-8)


@every_metric
@given(n=st.integers(1, 9), d=st.integers(1, 9), seed=st.integers(0, 2**31))
def test_stays_in_its_range(kind, n, d, seed):
    rows = _rows(n, d, seed)
    low, high = {
        VonNeumannEntropy: (0.0, math.log(min(n, d))),
        EffectiveRank: (1.0, min(n, d)),
        RankMe: (1.0, min(n, d)),
        Isotropy: (1 / d, 1.0),
        CorrelationGap: (0.0, math.log(d)),
    }[kind]
    assert low - 1e-6 <= float(_value(kind, rows)) <= high + 1e-6


@every_metric
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_takes_any_precision_also_under_autocast(kind, dtype):
    rows = _rows(20, 4, dtype=dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = _value(kind, rows)
    assert value.dtype == torch.float64
    torch.testing.assert_close(value, _value(kind, rows.double()), rtol=1e-6, atol=1e-6)


@every_metric
def test_degenerate_rows_give_finite_values(kind):
    for rows in (torch.zeros(3, 4), torch.ones(5, 4), torch.eye(4)[:1], 1e-30 * torch.randn(6, 4)):
        assert torch.isfinite(_value(kind, rows))


@every_metric
def test_no_rows_and_rows_that_are_not_finite_are_nan(kind):
    metric = kind(3)
    with pytest.warns(UserWarning, match="before the ``update`` method"):
        assert metric.compute().isnan()
    assert _value(kind, torch.empty(0, 3)).isnan()
    assert _value(kind, torch.eye(3), torch.tensor([[1.0, math.nan, 0.0]])).isnan()
    assert _value(kind, torch.eye(3), torch.tensor([[1.0, math.inf, 0.0]])).isnan()


@every_metric
def test_forward_gives_the_batch_and_keeps_the_sum(kind):
    rows = _rows(9, 4)
    metric = kind(4)
    metric.update(rows[:4])
    torch.testing.assert_close(metric(rows[4:]), _value(kind, rows[4:]))
    torch.testing.assert_close(metric.compute(), _value(kind, rows))


@every_metric
def test_reset_forgets_and_copies_remember(kind):
    metric = kind(4)
    metric.update(_rows(9, 4))
    copy = pickle.loads(pickle.dumps(metric))
    torch.testing.assert_close(copy.compute(), metric.compute(), rtol=0, atol=0)
    metric.reset()
    metric.update(_rows(5, 4, seed=1))
    torch.testing.assert_close(metric.compute(), _value(kind, _rows(5, 4, seed=1)), rtol=0, atol=0)


@every_metric
def test_state_dict_holds_the_sums_where_asked(kind):
    metric, restored = kind(4), kind(4)
    assert metric.state_dict() == {}  # as every torchmetrics metric: a monitor does not change a model's checkpoint
    for one in (metric, restored):
        one.persistent(True)
    metric.update(_rows(9, 4))
    restored.load_state_dict(metric.state_dict())
    for one in (metric, restored):
        one.update(_rows(3, 4, seed=2))
    torch.testing.assert_close(restored.compute(), metric.compute(), rtol=0, atol=0)


@every_metric
def test_sums_survive_inference_mode_and_carry_no_gradient(kind):
    rows = _rows(8, 4).requires_grad_()
    metric = kind(4)
    with torch.inference_mode():
        metric.update(rows[:3])
    metric.update(rows[3:])
    assert not metric.summed.requires_grad
    torch.testing.assert_close(metric.compute(), _value(kind, rows))


def test_casting_a_model_leaves_the_sums_in_double_precision():
    model = torch.nn.ModuleDict({"metric": RankMe(4)}).half()
    assert model["metric"].summed.dtype == torch.float64


@every_metric
def test_devices_without_float64_get_float32_sums(kind):
    def to_device(tensor):  # what moving to MPS does
        if tensor.dtype == torch.float64:
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype")
        return tensor.clone()

    metric = kind(4)._apply(to_device)
    metric.update(_rows(9, 4))
    assert (metric.summed.dtype, metric.count.dtype) == (torch.float32, torch.int64)
    torch.testing.assert_close(metric.compute(), _value(kind, _rows(9, 4)).float(), rtol=1e-3, atol=1e-4)
    metric.reset()
    assert metric.summed.dtype == torch.float32


@every_metric
@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda kind: kind(0), ValueError, "`num_features` must be at least 1, got 0"),
        (lambda kind: kind(4.0), TypeError, "`num_features` must be an int.*did you mean 4"),
        (
            lambda kind: kind(4).update(torch.ones(3, 5)),
            ValueError,
            r"`embeddings` must have shape \(N, 4\), got \(3, 5",
        ),
        (lambda kind: kind(4).update(torch.ones(4)), ValueError, r"must have shape \(N, 4\), got \(4,\)"),
        (lambda kind: kind(4).update(torch.ones(3, 4, 2)), ValueError, "pool or flatten it"),
        (lambda kind: kind(4).update(torch.ones(3, 4).long()), TypeError, r"floating tensor, got torch.int64.*\.float"),
        (lambda kind: kind(4).update([[1.0] * 4]), TypeError, "`embeddings` must be a floating tensor, got list"),
    ],
)
def test_bad_arguments_are_named(kind, build, error, message):
    with pytest.raises(error, match=message):
        build(kind)


def test_spectrum_is_that_of_the_function_padded_with_zeros():
    rows = _rows(3, 7)
    unit = torch.nn.functional.normalize(rows)
    spectrum = GramStatistics(unit.T @ unit, torch.tensor(3)).eigenvalues
    torch.testing.assert_close(spectrum[:3], autocorrelation_eigenvalues(rows))
    torch.testing.assert_close(spectrum[3:], torch.zeros(4).double(), rtol=0, atol=0)


def _ranks(rank, shards):
    values = {}
    for kind in METRICS:
        metric = kind(4)
        for batch in shards[rank]:
            metric.update(batch)
        own = metric.summed.clone()
        values[kind.__name__] = metric.compute()
        torch.testing.assert_close(metric.summed, own, rtol=0, atol=0)  # each rank goes on from its own sums
    return values


@pytest.mark.distributed
def test_two_unequal_ranks_equal_one_process(tmp_path):
    rows = _rows(11, 4)
    shards = [[rows[:2], rows[2:3], rows[3:8]], [rows[8:]]]
    expected = {kind.__name__: _value(kind, rows) for kind in METRICS}
    for values in run_on_ranks(_ranks, 2, tmp_path, shards):
        torch.testing.assert_close(values, expected)
    for values in run_on_ranks(_ranks, 2, tmp_path, [[rows], [rows[:0]]]):  # a rank without rows
        torch.testing.assert_close(values, expected)
