"""Older names of arguments work, and say which name is the present one."""

import inspect
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from lightning_plugins._deprecation import Replaced, renamed, share_left
from lightning_plugins.callbacks import LowRankCompression
from lightning_plugins.compression import (
    Budget,
    beam_search,
    channel_groups,
    energy_threshold,
    equal_ratio,
    output_energy,
    project,
    trade_off,
)
from lightning_plugins.mixins import CompressionMixin


@renamed(old="new", older="other")
def called(first, *, new=1, other=2):
    """Return what came."""
    return first, new, other


def test_the_older_name_is_the_present_one_with_a_warning():
    with pytest.warns(FutureWarning, match="`old` was renamed: pass `new`") as caught:
        assert called(0, old=5) == (0, 5, 2)
    assert caught[0].filename == __file__  # the line of the call
    with pytest.warns(FutureWarning, match="`older` .* pass `other`"):
        assert called(0, new=3, older=4) == (0, 3, 4)


def test_present_names_warn_of_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert called(1, new=2) == (1, 2, 2)


def test_both_names_are_refused():
    with pytest.raises(TypeError, match="`old` is the older name of `new`; pass `new` alone, got both"):
        called(0, old=1, new=2)


def test_other_names_are_refused_as_ever():
    with pytest.raises(TypeError, match="'oldest'"):
        called(0, oldest=1)


def test_the_signature_has_the_present_names_alone():
    assert list(inspect.signature(called).parameters) == ["first", "new", "other"]
    assert called.__doc__ == "Return what came."


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))


def test_project():
    net = network()
    budget = Budget(net, channel_groups(net, torch.zeros(1, 4)), target=0.8)
    kept, scores = [torch.ones(8).bool()], [torch.arange(8.0)]
    wanted = project(budget, kept, scores, min_channels=3, multiple_of=3)
    with pytest.warns(FutureWarning, match="`(minimum|multiple)`") as caught:
        found = project(budget, kept, scores, minimum=3, multiple=3)
    assert len(caught) == 2
    assert torch.equal(found.kept[0], wanted.kept[0])
    assert found.cost == wanted.cost


def test_attach_compression():
    class Net(CompressionMixin, nn.Sequential):
        pass

    net = Net(*network())
    with pytest.warns(FutureWarning, match=r"`minimum` is a field .* pass `limits=Limits\(min_size=5\)`"):
        net.attach_compression("0", budget=0.8, inputs=torch.zeros(1, 4), ranks=False, minimum=5)
    assert net.compress().kept[0].sum() >= 5


@renamed(listed=True, positional=("removed", "other"), removed=Replaced("left", share_left))
def listed(first, *, left=0.4, other=2):
    """Return what came."""
    return first, left, other


def test_a_listed_name_is_in_the_signature_and_is_nothing_by_default():
    assert list(inspect.signature(listed).parameters) == ["first", "left", "other", "removed"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert listed(0, left=0.3, removed=None) == (0, 0.3, 2)
    with pytest.warns(FutureWarning, match=r"`removed` was renamed: pass `left=0\.1`"):
        assert listed(0, left=0.4, removed=0.9) == (0, 0.1, 2)  # a command line passes the default of `left` too
    with pytest.raises(TypeError, match="`removed` is the older name of `left`; pass `left` alone, got both"):
        listed(0, left=0.3, removed=0.9)


def test_what_was_once_taken_by_position():
    with pytest.warns(FutureWarning) as caught:
        assert listed(0, 0.8, 5) == (0, 0.2, 5)
    texts = [str(warning.message).split(":")[0] for warning in caught]
    assert texts == ["`removed` is given by position", "`other` is given by position", "`removed` was renamed"]
    with pytest.warns(FutureWarning), pytest.raises(TypeError, match="multiple values for argument 'other'"):
        listed(0, 0.8, 5, other=1)
    with pytest.raises(TypeError, match="positional"):
        listed(0, 1, 2, 3)


@pytest.mark.parametrize(("removed", "left"), [(0.9, 0.1), (0.3, 0.7), (0.55, 0.45), (1 / 3, 2 / 3), (60, -59), (1, 0)])
def test_a_removed_fraction_is_the_complement_of_its_digits(removed, left):
    assert share_left(removed) == pytest.approx(left, abs=1e-15)
    assert share_left(np.float64(removed)) == share_left(removed)


@pytest.mark.parametrize("wrong", ["half", None, True, float("inf")])
def test_what_is_no_fraction_is_left_to_the_check_of_the_argument(wrong):
    assert share_left(wrong) is wrong


SEARCHES = {
    "equal_ratio": equal_ratio,
    "energy_threshold": energy_threshold,
    "trade_off": trade_off,
    "output_energy": output_energy,
    "beam_search": lambda net, **share: beam_search(
        net, [torch.ones(2, 4)], lambda n, x: -n(x).square().mean(), **share
    ),
}


@pytest.mark.parametrize("name", SEARCHES)
def test_searches_of_ranks_take_removed_fractions(name):
    net, search = network(), SEARCHES[name]
    wanted = search(net, budget=0.7)
    with pytest.warns(FutureWarning, match=r"`ratio` was renamed: pass `budget=0\.7`"):
        found = search(net, ratio=0.3)
    assert found == wanted
    assert found.share <= 0.7
    with pytest.warns(FutureWarning, match="`ratio`, the removed fraction.* `share` is the share that is left"):
        assert found.ratio == pytest.approx(1 - found.share)
    with pytest.raises(TypeError, match="`ratio` is the older name of `budget`"):
        search(net, ratio=0.3, budget=0.7)
    with pytest.warns(FutureWarning), pytest.raises(ValueError, match=r"`budget` must .*got -59\.0"):
        search(net, ratio=60)


def test_levels_of_a_search_have_removed_fractions():
    level = SEARCHES["beam_search"](network(), budget=0.7).trace[-1]
    with pytest.warns(FutureWarning, match="`target`"):
        assert level.target == pytest.approx(0.3)
    with pytest.warns(FutureWarning, match="`ratio`"):
        assert level.ratio == pytest.approx(1 - level.share)


def test_low_rank_compression():
    with pytest.warns(FutureWarning, match=r"`ratio` was renamed: pass `budget=0\.2`"):
        callback = LowRankCompression("*", ratio=0.8, penalty=0.5)
    with pytest.warns(FutureWarning):
        by_position = LowRankCompression("*", 0.8, 0.5)
    assert (callback.budget, callback.weight) == (by_position.budget, by_position.weight) == (0.2, 0.5)
    with pytest.warns(FutureWarning, match="`ratio`, the removed fraction"):
        assert callback.ratio == 0.8
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert LowRankCompression("*").budget == 0.4
