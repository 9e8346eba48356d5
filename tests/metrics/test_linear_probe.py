import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import Ridge, RidgeCV
from sklearn.metrics import r2_score
from sklearn.model_selection import GridSearchCV, PredefinedSplit, cross_val_predict
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from lightning_plugins.functional import assign_folds
from lightning_plugins.metrics import LinearProbe, NearestNeighbourProbe, ProbeClassifier
from tests._processes import run_on_ranks

LAMBDAS = [0.1, 1.0, 10.0, 100.0, 1000.0]


def problem(n=120, d=6, *, kind="plain", dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=generator, dtype=torch.float64)
    if kind == "ill":  # scales over eight decades, nearly equal columns, far from the origin
        x = x * torch.logspace(-4, 4, d, dtype=torch.float64)
        x[:, 1] = x[:, 0] + 1e-7 * x[:, 1]
        x = x + 10.0
    y = x[:, :2].sum(1, keepdim=True) / x[:, :2].sum(1).std() + torch.randn(n, 2, generator=generator).double() + 3
    return x.to(dtype), y.to(dtype), torch.arange(n) // 3


def filled(x, y, groups, *, batch=17, **settings):
    probe = LinearProbe(x.shape[1], y.shape[1] if y.ndim > 1 else 1, lambdas=LAMBDAS, **settings)
    for rows in torch.arange(len(x)).split(batch):
        probe.update(x[rows], y[rows], groups[rows])
    return probe


def nested(x, y, folds):
    """Predictions of each fold by scikit-learn, the penalty chosen inside, and the penalties."""
    model = make_pipeline(StandardScaler(), Ridge(solver="svd"))
    predictions, chosen = np.zeros(len(y)), []
    for fold in np.unique(folds):
        train = folds != fold
        search = GridSearchCV(
            model, {"ridge__alpha": LAMBDAS}, cv=PredefinedSplit(folds[train]), scoring="neg_mean_squared_error"
        ).fit(x[train], y[train])
        predictions[~train] = search.predict(x[~train])
        chosen.append(search.best_params_["ridge__alpha"])
    return predictions, chosen


@pytest.mark.parametrize("kind", ["plain", "ill"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-8), (torch.float32, 1e-4)], ids=["64", "32"])
def test_equals_scikit_learn_with_the_same_folds(kind, dtype, tolerance):
    x, y, groups = problem(kind=kind, dtype=dtype)
    result = filled(x, y, groups).compute()
    folds = assign_folds(groups, 5).numpy()
    x, y = x.double().numpy(), y.double().numpy()
    for target in range(2):
        predictions, chosen = nested(x, y[:, target], folds)
        assert result.best_lambda[:, target].tolist() == chosen
        error = np.sqrt(((y[:, target] - predictions) ** 2).mean())
        np.testing.assert_allclose(result.r2[target], r2_score(y[:, target], predictions), atol=tolerance)
        np.testing.assert_allclose(result.rmse[target], error, rtol=tolerance)
        by_fold = [r2_score(y[folds == f, target], predictions[folds == f]) for f in range(5)]
        np.testing.assert_allclose(result.r2_folds[:, target], by_fold, atol=tolerance)


def test_refit_is_that_of_ridge_cv():
    x, y, groups = problem()
    x = (x - x.mean(0)) / x.std(0, correction=0)  # the probe's own scaling then does nothing on all rows
    result = filled(x, y, groups).compute()
    for target in range(2):
        model = make_pipeline(StandardScaler(), Ridge(solver="svd"))
        cv = PredefinedSplit(assign_folds(groups, 5).numpy())
        search = GridSearchCV(model, {"ridge__alpha": LAMBDAS}, cv=cv, scoring="neg_mean_squared_error")
        alpha = search.fit(x.numpy(), y[:, target].numpy()).best_params_["ridge__alpha"]
        expected = RidgeCV(alphas=[alpha], cv=cv).fit(x.numpy(), y[:, target].numpy())
        np.testing.assert_allclose(result.weights[:, target], expected.coef_, atol=1e-8)
        np.testing.assert_allclose(result.intercept[target], expected.intercept_, atol=1e-8)


def test_weights_predict_from_features_as_they_are():
    x, _, groups = problem()
    y = x @ torch.ones(6, 1).double() + 7
    result = filled(x + 100, y, groups).compute()
    expected = torch.tensor(
        Ridge(alpha=0.1).fit(StandardScaler().fit_transform(x), y).predict(StandardScaler().fit_transform(x))
    )
    torch.testing.assert_close(((x + 100) @ result.weights + result.intercept).flatten(), expected.flatten())


@pytest.mark.parametrize("weight", ["token", "group"])
@given(seed=st.integers(0, 2**31), batch=st.integers(1, 130))
@settings(max_examples=8)
def test_order_and_size_of_batches_do_not_matter(weight, seed, batch):
    x, y, groups = problem(d=3)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    one = filled(x, y, groups, batch=len(x), weight=weight).compute()
    other = filled(x[order], y[order], groups[order], batch=batch, weight=weight).compute()
    torch.testing.assert_close(one[1:], other[1:], rtol=1e-9, atol=1e-9, equal_nan=True)


def test_group_weighting_is_a_probe_of_means():
    x, y, groups = problem(d=3)
    means = [torch.stack([v[groups == g].mean(0) for g in groups.unique()]) for v in (x, y)]
    result = filled(x, y, groups, weight="group").compute()
    expected = filled(*means, groups.unique(), weight="token").compute()
    assert (result.weight, int(result.rows), int(expected.rows)) == ("group", 40, 40)
    torch.testing.assert_close(result[1:], expected[1:], equal_nan=True)


def test_tables_of_groups_are_compacted():
    x, y, groups = problem(n=30_000, d=2)
    probe = filled(x, y, groups % 50, batch=1000, weight="group")
    assert sum(len(block) for block in probe.kept) < 10_000 * 7
    means = filled(x, y, groups % 50, batch=30_000, weight="group").compute()
    torch.testing.assert_close(probe.compute()[1:], means[1:], equal_nan=True)


def test_a_probe_that_memorises_groups_is_found_out():
    """Features that name the group: the rows of a group that is not held out would be predicted."""
    groups = torch.arange(400) % 40
    x, y = torch.eye(40).double()[groups], torch.randn(40).double()[groups]
    leaking = filled(x, y, torch.arange(400)).compute()
    honest = filled(x, y, groups).compute()
    assert leaking.r2 > 0.9
    assert honest.r2 < 0.1


def test_random_targets_have_no_r2_and_selectivity_is_not_raised_by_it():
    x, y, groups = problem(d=30)
    result = filled(x, y, groups, controls=50).compute()
    assert -1.0 < result.control_r2 < 0.0
    torch.testing.assert_close(result.selectivity, result.r2)
    assert filled(x, y, groups, controls=0).compute().control_r2.isnan()


def test_code_lengths_tell_signal_from_noise():
    x, _, groups = problem(n=3000)
    noise = torch.randn(3000, 1).double()
    lengths = [filled(x, y, groups).compute() for y in (noise, x[:, :1] + 0.1 * noise)]
    null = 0.5 * math.log(2 * math.pi * math.e)
    assert abs(lengths[0].description_length - null) < 0.02  # nothing to be gained
    assert lengths[1].description_length < null - 1.0
    gaussian = -0.5 * math.log(2 * math.pi * math.e * 0.01)
    assert abs(lengths[1].evidence - gaussian) < 0.03  # a code of noise of standard deviation 0.1


def classes(n=600, d=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(3, (n,), generator=generator)
    return torch.randn(n, d, generator=generator).double() + 1.5 * torch.eye(d).double()[y] + 4, y


def classified(x, y, *, grouped=True, **settings):
    probe = LinearProbe(x.shape[1], 3, task="classification", **settings)
    for rows in torch.arange(len(x)).split(70):
        probe.update(x[rows], y[rows], rows if grouped else None)
    return probe.compute()


def held_out_accuracy(model, x, y):
    folds = PredefinedSplit(assign_folds(torch.arange(len(x)), 5).numpy())
    return (cross_val_predict(model, x.numpy(), y.numpy(), cv=folds) == y.numpy()).mean()


def test_lda_is_that_of_scikit_learn():
    x, y = classes()
    found = classified(x, y, classifier="lda", lambdas=[0.0])
    assert found.accuracy == held_out_accuracy(LinearDiscriminantAnalysis(solver="lsqr"), x, y)
    assert 0.25 < found.control_accuracy < 0.42
    assert found.evaluated == 600


@pytest.mark.parametrize("classifier", ["ridge", "softmax"])
def test_classifiers_are_about_as_good(classifier):
    x, y = classes()
    assert abs(classified(x, y, classifier=classifier).accuracy - classified(x, y, classifier="lda").accuracy) < 0.03


def test_ridge_classifier_is_that_of_one_hot_targets():
    x, y = classes()
    model = make_pipeline(StandardScaler(), Ridge(alpha=10.0, solver="svd"))
    folds = PredefinedSplit(assign_folds(torch.arange(600), 5).numpy())
    scores = cross_val_predict(model, x.numpy(), np.eye(3)[y.numpy()], cv=folds)
    found = classified(x, y, lambdas=[10.0])
    assert found.accuracy == (scores.argmax(1) == y.numpy()).mean()


@pytest.mark.parametrize("grouped", [True, False])
def test_reservoir_is_a_sample_that_does_not_depend_on_order(grouped):
    x, y = classes(n=3000)
    whole, part = classified(x, y), classified(x, y, grouped=grouped, classifier=ProbeClassifier(reservoir=500))
    order = torch.randperm(3000)
    probe = LinearProbe(5, 3, task="classification", classifier=ProbeClassifier(reservoir=500))
    for rows in order.split(70):
        probe.update(x[rows], y[rows], rows if grouped else None)
    assert part.evaluated == 500
    assert probe.compute().accuracy == part.accuracy
    assert abs(part.accuracy - whole.accuracy) < 4 * part.accuracy_error


def test_a_class_with_one_member_is_no_obstacle():
    x, y = classes()
    y[y == 2] = 0
    y[7] = 2
    for classifier in ("ridge", "lda", "softmax"):
        found = classified(x, y, classifier=classifier)
        assert 0.6 < found.accuracy <= 1


SETTINGS = {
    "token": {"weight": "token"},
    "group": {"weight": "group"},
    "classes": {"task": "classification", "classifier": ProbeClassifier(reservoir=50)},
    "classes by group": {"task": "classification", "weight": "group"},
}
BOUNDS = {2: [0, 37, 120], 3: [0, 0, 40, 120]}  # of three processes one has no rows


def with_part(rank, world_size):
    results = {}
    for name, own in SETTINGS.items():
        x, y, groups = problem(seed=4)
        rows = slice(BOUNDS[world_size][rank], BOUNDS[world_size][rank + 1])
        if "task" in own:
            y = (y[:, 0] > 3).long()
            probe = LinearProbe(6, 2, lambdas=LAMBDAS, **own)
        else:
            probe = LinearProbe(6, 2, lambdas=LAMBDAS, **own)
        probe.update(x[rows] + 5, y[rows], groups[rows])
        results[name] = tuple(probe.compute())
    neighbours = NearestNeighbourProbe(6, 2, k=5)
    neighbours.update(x[rows], y[rows], groups[rows])
    return results, tuple(neighbours.compute())


@pytest.mark.distributed
@pytest.mark.parametrize("world_size", [2, 3])
def test_unequal_processes_equal_one(world_size, tmp_path):
    BOUNDS[1] = [0, 120]
    expected = with_part(0, 1)
    for found in run_on_ranks(with_part, world_size, tmp_path, world_size):
        for name, result in found[0].items():
            torch.testing.assert_close(result[1:], expected[0][name][1:], rtol=1e-9, atol=1e-9, equal_nan=True)
        torch.testing.assert_close(found[1], expected[1])


def test_forward_and_reset():
    x, y, groups = problem(d=3)
    probe = LinearProbe(3, 2, lambdas=LAMBDAS)
    first = probe(x[:60], y[:60], groups[:60])
    probe(x[60:], y[60:], groups[60:])
    torch.testing.assert_close(probe.compute()[1:], filled(x, y, groups).compute()[1:], equal_nan=True)
    torch.testing.assert_close(first[1:], filled(x[:60], y[:60], groups[:60]).compute()[1:], equal_nan=True)
    probe.reset()
    probe.update(x, y, groups)
    assert int(probe.compute().rows) == 120


def test_nearest_neighbours_are_those_of_scikit_learn():
    x, y = classes(n=300)
    x = x - 4
    probe = NearestNeighbourProbe(5, 3, k=1)
    for rows in torch.arange(300).split(77):
        probe.update(x[rows], y[rows], rows)
    z = torch.nn.functional.normalize(x).numpy()
    right = [
        KNeighborsClassifier(1).fit(np.delete(z, i, 0), np.delete(y.numpy(), i)).predict(z[i : i + 1])[0] == y[i]
        for i in range(300)
    ]
    found = probe.compute()
    assert found.accuracy.item() == pytest.approx(np.mean(right))
    weighted = NearestNeighbourProbe(5, 3, k=300, temperature=0.1)
    weighted.update(x, y, torch.arange(300))
    votes = np.exp((z @ z.T) / 0.1)
    np.fill_diagonal(votes, 0.0)
    expected = ((votes @ np.eye(3)[y.numpy()]).argmax(1) == y.numpy()).mean()
    assert weighted.compute().accuracy.item() == pytest.approx(expected)


STREAM = """
import resource, sys, torch
from lightning_plugins.metrics import LinearProbe
rows, width = int(sys.argv[1]), int(sys.argv[2])
probe, peak = LinearProbe(width, controls=1), []
for start in range(0, rows, 4096):
    x = torch.randn(min(4096, rows - start), width)
    probe.update(x, x[:, 0] + torch.randn(len(x)), torch.arange(start, start + len(x)) // 7)
    peak.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
assert int(probe.moments[:-1, 0, 0].sum()) == rows
print(peak[min(8, len(peak) - 1)], peak[-1], sum(t.numel() * 8 for t in [probe.moments]), float(probe.compute().r2))
"""


def stream(rows, width):
    done = subprocess.run(
        [sys.executable, "-c", STREAM, str(rows), str(width)],
        env={"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=True,
    )
    return [float(number) for number in done.stdout.split()]


def test_memory_does_not_grow():
    early, late, held, r2 = stream(120_000, 64)
    assert held == 8 * 6 * 67**2  # five folds and the shift; 64 features, a target, a control and the count
    assert late - early < 20_000  # KiB; the rows would be 30 MB in float32
    assert abs(r2 - 0.5) < 0.01


@pytest.mark.slow
def test_a_million_tokens_of_width_768_in_constant_memory():
    early, late, _, r2 = stream(1_000_000, 768)
    assert late - early < 60_000  # KiB; the rows would be 3 GB
    assert abs(r2 - 0.5) < 0.01
