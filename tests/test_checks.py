"""Every check passes what is allowed through unchanged and names what is not."""

import math
import sys

import pytest
import torch

from lightning_plugins._checks import (
    check_choice,
    check_finite_number,
    check_fraction,
    check_non_negative_int,
    check_positive_int,
    nearest,
)


@pytest.mark.parametrize(
    ("check", "value"),
    [
        (check_finite_number, -3),
        (check_finite_number, 0.0),
        (check_finite_number, sys.float_info.max),
        (check_fraction, 0),
        (check_fraction, 1),
        (check_fraction, 0.25),
        (check_positive_int, 1),
        (check_positive_int, 2**62),
        (check_non_negative_int, 0),
    ],
)
def test_an_allowed_value_comes_back_unchanged(check, value):
    assert check("a", value) is value


@pytest.mark.parametrize(
    ("check", "value", "error", "match"),
    [
        (check_finite_number, math.nan, ValueError, r"`a` must be finite, got nan"),
        (check_finite_number, -math.inf, ValueError, r"`a` must be finite, got -inf"),
        (check_finite_number, True, TypeError, r"`a` must be a number, got True \(bool\)"),
        (check_finite_number, "0.1", TypeError, r"`a` must be a number, got '0\.1' \(str\)"),
        (check_finite_number, None, TypeError, r"`a` must be a number, got None \(NoneType\)"),
        (check_finite_number, torch.zeros(99, 99), TypeError, r"`a` must be a number, got .{57}\.\.\. \(Tensor\)"),
        (check_fraction, -0.1, ValueError, r"`a` must be in \[0, 1\], got -0\.1$"),
        (check_fraction, math.nan, ValueError, r"`a` must be in \[0, 1\], got nan$"),
        (check_fraction, math.inf, ValueError, r"`a` must be in \[0, 1\], got inf$"),
        (check_fraction, 80, ValueError, r"got 80; did you mean 0\.8\?"),
        (check_fraction, 1.5, ValueError, r"got 1\.5$"),  # no percentage that anybody would mean
        (check_fraction, False, TypeError, r"`a` must be a number in \[0, 1\], got False \(bool\)"),
        (check_positive_int, 0, ValueError, r"`a` must be at least 1, got 0"),
        (check_positive_int, -2, ValueError, r"`a` must be at least 1, got -2"),
        (check_positive_int, True, TypeError, r"`a` must be an int of at least 1, got True \(bool\)$"),
        (check_positive_int, 2.0, TypeError, r"got 2\.0 \(float\); did you mean 2\?"),
        (check_positive_int, math.inf, TypeError, r"got inf \(float\)$"),
        (check_positive_int, 2.5, TypeError, r"got 2\.5 \(float\)$"),
        (check_non_negative_int, -1, ValueError, r"`a` must be at least 0, got -1"),
        (check_non_negative_int, None, TypeError, r"`a` must be an int of at least 0, got None"),
    ],
)
def test_a_wrong_value_is_named_with_the_rule(check, value, error, match):
    with pytest.raises(error, match=match):
        check("a", value)


def test_a_choice_comes_back_unchanged():
    assert check_choice("unit", "steps", ("steps", "epochs")) == "steps"


@pytest.mark.parametrize(
    ("value", "error", "match"),
    [
        ("epoch", ValueError, r"`unit` must be 'steps', 'epochs' or 'fraction', got 'epoch'; did you mean 'epochs'\?"),
        ("STEPS", ValueError, r"got 'STEPS'; did you mean 'steps'\?"),
        ("", ValueError, r"`unit` must be 'steps', 'epochs' or 'fraction', got ''$"),
        ("xyz", ValueError, r"got 'xyz'$"),
        (None, TypeError, r"`unit` must be 'steps', 'epochs' or 'fraction', got None \(NoneType\)"),
        (["steps"], TypeError, r"got \['steps'\] \(list\)"),
    ],
)
def test_a_wrong_choice_is_answered_with_the_nearest(value, error, match):
    with pytest.raises(error, match=match):
        check_choice("unit", value, ("steps", "epochs", "fraction"))


def test_a_single_choice_is_listed_without_or():
    with pytest.raises(ValueError, match=r"`unit` must be 'steps', got 'a'"):
        check_choice("unit", "a", ["steps"])


def test_nearest_is_ordered_limited_and_may_be_empty():
    assert nearest("layer1.conv", ["head", "layer2.conv", "layer1.conv1"]) == ["layer1.conv1", "layer2.conv"]
    assert nearest("layer1.conv", ["layer2.conv", "layer1.conv1"], limit=1) == ["layer1.conv1"]
    assert nearest("q", ["head"]) == []
    assert nearest("a", []) == []
