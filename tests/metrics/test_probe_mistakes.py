"""Wrong arguments and rows that allow no probe: each is named."""

import math
from typing import Any

import pytest
import torch

from lightning_plugins.callbacks import LayerProbe, probe_layers
from lightning_plugins.metrics import LinearProbe, NearestNeighbourProbe, ProbeClassifier

X = torch.randn(60, 4, generator=torch.Generator().manual_seed(0))
Y, GROUPS = X[:, 0] + 1, torch.arange(60)

# name: (arguments beside the number of features, error, what the message says)
ARGUMENTS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "no feature": ({"num_features": 0}, ValueError, "`num_features` must be at least 1, got 0"),
    "targets as text": ({"num_targets": "2"}, TypeError, r"`num_targets` must be an int .* got '2' \(str\)"),
    "task misspelled": ({"task": "regresion"}, ValueError, "`task` must be .*; did you mean 'regression'?"),
    "weight misspelled": ({"weight": "groups"}, ValueError, "`weight` must be .*; did you mean 'group'?"),
    "two folds": ({"folds": 2}, ValueError, "`folds` must be at least 3, one to report and two to choose"),
    "one class (K = 1)": (
        {"task": "classification"},
        ValueError,
        "`num_targets` must be the number of classes, at least 2, for classification, got 1",
    ),
    "negative controls": ({"controls": -1}, ValueError, "`controls` must be at least 0, got -1"),
    "one penalty": ({"lambdas": 1.0}, TypeError, r"`lambdas` must be a sequence .* did you mean \[1.0\]?"),
    "no penalty": ({"lambdas": []}, ValueError, "`lambdas` must have at least one penalty"),
    "negative penalty": ({"lambdas": [-1.0]}, ValueError, "`lambdas` must be at least 0, got -1.0"),
    "penalty is NaN": ({"lambdas": [math.nan]}, ValueError, "`lambdas` must be finite, got nan"),
    "classifier misspelled": ({"classifier": "ldaa"}, ValueError, "`classifier` must be .*; did you mean 'lda'?"),
    "negative seed": ({"seed": -1}, ValueError, "`seed` must be at least 0, got -1"),
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_wrong_arguments_fail_in_the_constructor(name: str):
    arguments, error, message = ARGUMENTS[name]
    with pytest.raises(error, match=message):
        LinearProbe(**{"num_features": 4, **arguments})


@pytest.mark.parametrize(
    ("fields", "message"),
    [({"reservoir": 0}, "`reservoir` must be at least 1, got 0"), ({"kind": "rigde"}, "`kind`.*did you mean 'ridge'")],
)
def test_wrong_fields_of_the_classifier_are_named(fields: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        ProbeClassifier(**fields)


# name: (features, targets, groups, error, what the message says)
ROWS: dict[str, tuple[Any, Any, Any, type[Exception], str]] = {
    "width that changes": (X[:, :3], Y, GROUPS, ValueError, r"`features` must have shape \(N, 4\), got \(60, 3\)"),
    "integers": (X.long(), Y, GROUPS, TypeError, "`features` must be a floating tensor, got torch.int64"),
    "too few targets": (X, Y[1:], GROUPS, ValueError, r"`targets` must have shape \(60, 1\)"),
    "targets as a list": (X, [1.0], GROUPS, TypeError, "`targets` must be a tensor, got list"),
    "too few groups": (X, Y, GROUPS[1:], ValueError, r"`groups` must have shape \(60,\)"),
    "groups that are numbers": (X, Y, Y, TypeError, "`groups` must be an integer tensor, got torch.float32"),
    "one group": (
        X,
        Y,
        GROUPS * 0,
        ValueError,
        "`groups` must fill at least 3 of `folds`=5, got 1: .* rows of too few",
    ),
    "constant target": (X, Y * 0 + 7, GROUPS, ValueError, "`targets` must vary, got one value throughout in column 0"),
    "NaN feature": (X.masked_fill(X > 2, math.nan), Y, GROUPS, ValueError, "`features` must be finite, got NaN"),
    "infinite target": (X, Y.masked_fill(Y > 2, math.inf), GROUPS, ValueError, "`targets` must be finite, got NaN or"),
    "no rows": (X[:0], Y[:0], GROUPS[:0], ValueError, "`features` must have rows, got none"),
}


@pytest.mark.parametrize("weight", ["token", "group"])
@pytest.mark.parametrize("name", ROWS)
def test_rows_that_allow_no_probe_are_named(name: str, weight: str):
    features, targets, groups, error, message = ROWS[name]
    probe = LinearProbe(4, weight=weight)
    with pytest.raises(error, match=message):  # noqa: PT012 - either of the two, whichever can know
        probe.update(features, targets, groups)
        probe.compute()


def test_more_outputs_than_rows():
    probe = LinearProbe(4, 61)
    probe.update(X, torch.randn(60, 61), GROUPS)
    with pytest.raises(
        ValueError, match="`targets` must have no more columns than there are rows, got 61 columns and 60"
    ):
        probe.compute()


def test_classes():
    probe = LinearProbe(4, 3, task="classification")
    with pytest.raises(
        ValueError, match=r"`targets` must be classes: integers .* for numbers pass `task='regression'`"
    ):
        probe.update(X, Y, GROUPS)
    with pytest.raises(ValueError, match="`targets` must be classes below `num_targets`=3, got values from 0 to 3"):
        probe.update(X, GROUPS % 4, GROUPS)
    probe.update(X, GROUPS * 0, GROUPS)
    with pytest.raises(ValueError, match="`targets` must be of at least two classes, got one"):
        probe.compute()


def test_nearest_neighbours():
    with pytest.raises(ValueError, match="`num_classes` must be at least 2, got 1"):
        NearestNeighbourProbe(4, 1)
    with pytest.raises(ValueError, match=r"`temperature` must be positive, got 0\.0"):
        NearestNeighbourProbe(4, 2, temperature=0.0)
    probe = NearestNeighbourProbe(4, 2)
    with pytest.raises(ValueError, match="`targets` must be classes below `num_classes`=2"):
        probe.update(X, GROUPS, GROUPS)
    probe.update(X, GROUPS % 2, GROUPS * 0)
    with pytest.raises(ValueError, match="`groups` must be at least two, got 1 in 60 rows"):
        probe.compute()


# name: (arguments beside layers and targets, error, what the message says)
CALLBACKS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "targets as a list": ({"targets": [1]}, TypeError, "`targets` must be a key of the batch, a position .*, got list"),
    "a path to nowhere": ({"groups": "nowhere.f"}, ValueError, "`groups='nowhere.f'` cannot be imported"),
    "a path to a number": ({"mask": "math.pi"}, ValueError, "`mask='math.pi'` names float, which cannot be called"),
    "positions misspelled": ({"positions": "token"}, ValueError, "`positions` must be .*; did you mean 'tokens'?"),
    "positions as a number": ({"positions": 0}, TypeError, "`positions` must be 'tokens', 'cls', 'mean' or a callable"),
    "a mask of the CLS token": ({"positions": "cls", "mask": "m"}, ValueError, "`mask` chooses among tokens"),
    "stage misspelled": ({"stages": "vall"}, ValueError, "`stages` must be .*; did you mean 'val'?"),
    "no stage": ({"stages": []}, ValueError, "`stages` must name at least one"),
    "control misspelled": ({"controls": ["intial"]}, ValueError, "`controls` must be .*; did you mean 'initial'?"),
    "unknown option": ({"probe": {"fold": 5}}, TypeError, "`probe`: LinearProbe got an unexpected keyword .*'fold'"),
    "width given": ({"probe": {"num_features": 5}}, ValueError, "`probe` must leave out 'num_features'"),
    "options as a list": ({"probe": [5]}, TypeError, "`probe` must map arguments of LinearProbe"),
    "figures as text": ({"figures": "no"}, TypeError, "`figures` must be True or False"),
}


@pytest.mark.parametrize("name", CALLBACKS)
def test_wrong_arguments_of_the_callback(name: str):
    arguments, error, message = CALLBACKS[name]
    with pytest.raises(error, match=message):
        LayerProbe(**{"layers": "net", "targets": "y", **arguments})


NET = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2))
# name: (batch, arguments, error, what the message says)
BATCHES: dict[str, tuple[Any, dict[str, Any], type[Exception], str]] = {
    "no such key": (
        {"input": X},
        {"targets": "y"},
        ValueError,
        "`targets`: the batch, a dict, has no 'y'; its keys are",
    ),
    "no such place": ((X, Y), {"targets": 2}, ValueError, "`targets`: the batch, a tuple, has no 2; it has 2 entries"),
    "a key of a tuple": ((X, Y), {"targets": "y"}, ValueError, "`targets`: .* it is not a mapping: give a position"),
    "tokens of a matrix": ((X, Y), {"positions": "tokens"}, ValueError, "`positions='tokens'` takes .* choose 'mean'"),
    "a mask of one dimension": ((X, Y, Y), {"mask": 2}, ValueError, r"`mask` must have shape \(N, L\)"),
    "floating groups": ((X, Y, Y), {"groups": 2}, ValueError, "`groups` must be integers, got torch.float32"),
    "other number of groups": (
        (X, Y, GROUPS[1:]),
        {"groups": 2},
        ValueError,
        "`groups` must have one entry per target",
    ),
    "other number of targets": ((X, Y[1:], GROUPS[1:]), {"groups": 2}, ValueError, "59 targets need as many rows"),
    "unknown layer": ((X, Y), {"layers": "3"}, ValueError, "`layers`: no module is called '3'"),
}


@pytest.mark.parametrize("name", BATCHES)
def test_batches_that_do_not_fit_are_named(name: str):
    batch, arguments, error, message = BATCHES[name]
    forward = (lambda model, batch: model(X)) if isinstance(batch, dict) else None
    with pytest.raises(error, match=message):
        probe_layers(NET, [batch], **{"layers": "0", "targets": 1, "forward": forward, **arguments})
