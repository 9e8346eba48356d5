"""Wrong arguments: refused in the constructor, with an error that names what to do instead."""

import math
from typing import Any

import pytest
import torch

from lightning_plugins.callbacks import VNERegularization
from lightning_plugins.mixins import VNEMixin
from tests.models import Classifier

# name: (arguments beside or in place of the right ones, error, what the message says)
ARGUMENTS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "no layer": ({"layers": []}, ValueError, r"`layers` must be .*, got an empty list; '\*' takes every layer"),
    "a number as layer": (
        {"layers": 3},
        TypeError,
        "`layers` must be a module name, .*, got int",
    ),
    "a number among layers": ({"layers": ["a", 3]}, TypeError, r"`layers` must be .*, got one with 3 \(int\) in it"),
    "wrong suffix": ({"layers": "fc:inptu"}, ValueError, "got 'fc:inptu'; did you mean 'fc:input'?"),
    "the whole model": ({"layers": ":input"}, ValueError, "got ':input', which would be the whole model"),
    "weight is NaN": ({"weight": math.nan}, ValueError, "`weight` must be finite, got nan"),
    "weight is text": ({"weight": "0.1"}, TypeError, r"`weight` must be a number, got '0.1' \(str\)"),
    "weight is a bool": ({"weight": True}, TypeError, r"`weight` must be a number, got True \(bool\)"),
    "a string as readout": (
        {"readout": "cls"},
        TypeError,
        r"`readout` must be a Readout, such as `Readout\(pool='cls'\)`, got 'cls'",
    ),
    "scope misspelled": ({"scope": "globl"}, ValueError, "`scope` must be .*, got 'globl'; did you mean 'global'?"),
    "scope is None": ({"scope": None}, TypeError, r"`scope` must be 'global' or 'local', got None \(NoneType\)"),
    "negative queue": ({"queue_size": -1}, ValueError, "`queue_size` must be at least 0, got -1"),
    "fractional queue": (
        {"queue_size": 64.0},
        TypeError,
        r"`queue_size` must be an int .* \(float\); did you mean 64?",
    ),
    "queue of one rank": (
        {"queue_size": 8, "scope": "local"},
        ValueError,
        "needs `scope='global'`, got `scope='local'`",
    ),
    "no step": ({"every_n_steps": 0}, ValueError, "`every_n_steps` must be at least 1, got 0"),
    "wrong method": ({"method": "eigh2"}, ValueError, "`method` must be .*, got 'eigh2'; did you mean 'eigh'?"),
    "on_nonfinite misspelled": (
        {"on_nonfinite": "rise"},
        ValueError,
        "`on_nonfinite` must be .* did you mean 'raise'?",
    ),
    "a number as schedule": (
        {"schedule": 0.5},
        TypeError,
        r"`schedule` must be a Schedule, got 0.5 \(float\); take one out of `lightning_plugins.schedules`",
    ),
    "a function as schedule": ({"schedule": math.sqrt}, TypeError, "`schedule` must be a Schedule, got <built-in"),
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_wrong_arguments_fail_in_the_constructor(name: str):
    arguments, error, message = ARGUMENTS[name]
    with pytest.raises(error, match=message):
        VNERegularization(**{"layers": "backbone", "weight": 0.3, **arguments})


class WithMixin(VNEMixin, Classifier):
    pass


# name: (features, arguments, error, what the message says)
PENALTIES: dict[str, tuple[Any, dict[str, Any], type[Exception], str]] = {
    "weight is NaN": (torch.eye(4), {"weight": math.nan}, ValueError, "`weight` must be finite, got nan"),
    "weight is a bool": (torch.eye(4), {"weight": False}, TypeError, r"`weight` must be a number, got False \(bool\)"),
    "scope misspelled": (torch.eye(4), {"scope": "Global"}, ValueError, "`scope` must be .* did you mean 'global'?"),
    "no tensor": ([[1.0]], {}, TypeError, "embeddings must be a floating tensor, got list"),
    "integers": (torch.ones(4, 3).long(), {}, TypeError, "embeddings must be a floating tensor, got torch.int64"),
    "one dimension": (torch.ones(4), {}, ValueError, r"embeddings need at least the two dimensions \(N, d\)"),
    "no row": (torch.ones(0, 3), {}, ValueError, r"`embeddings` must have at least one row, got none, shape \(0, 3\)"),
}


@pytest.mark.parametrize("name", PENALTIES)
def test_wrong_arguments_of_the_mixin(name: str):
    features, arguments, error, message = PENALTIES[name]
    with pytest.raises(error, match=message):
        WithMixin().vne_penalty(features, **{"weight": 0.3, **arguments})
