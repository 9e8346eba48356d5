"""Older names of arguments work, and say which name is the present one."""

import inspect
import warnings

import pytest
import torch
from torch import nn

from lightning_plugins._deprecation import renamed
from lightning_plugins.compression import Budget, channel_groups, project
from lightning_plugins.mixins import CompressionMixin


@renamed(old="new", older="other")
def called(first, *, new=1, other=2):
    """Return what came."""
    return first, new, other


def test_the_older_name_is_the_present_one_with_a_warning():
    with pytest.warns(FutureWarning, match="`old` has another name: pass `new`") as caught:
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
    with pytest.warns(FutureWarning, match="`minimum` .* pass `min_channels`"):
        net.attach_compression("0", budget=0.8, inputs=torch.zeros(1, 4), ranks=False, minimum=5)
    assert net.compress().kept[0].sum() >= 5
