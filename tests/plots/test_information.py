import math

import pytest

from lightning_plugins.plots import information_figure


def test_shows_estimates_errors_truth_and_ceilings(tmp_path):
    estimates = {"all": [(1.9, 0.1), (3.8, 0.2)], "K = 8": [(1.8, math.nan), (2.7, 0.1)]}
    figure = information_figure([2.0, 4.0], estimates, ceilings={"ln 8": 3.0}, title="Gaussians")
    (axes,) = figure.axes
    truth, ceiling = axes.get_lines()[:2]
    assert list(truth.get_ydata()) == [0, 4.0]
    assert set(ceiling.get_ydata()) == {3.0}
    for container, (name, values) in zip(axes.containers, estimates.items(), strict=True):
        assert container.get_label() == name
        assert list(container[0].get_ydata()) == [value for value, _ in values]
    assert axes.get_ylabel() == "estimate [bits]"
    figure.savefig(tmp_path / "mi.png")


def test_other_axes_have_no_diagonal():
    (axes,) = information_figure([16, 64], {"a": [(1, 0), (2, 0)]}, units="nats", xlabel="K").axes
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["a"]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("K", "estimate [nats]")


def test_what_cannot_be_drawn_is_named():
    with pytest.raises(ValueError, match="`truths` and `estimates` must have at least one entry, got 0 and 0"):
        information_figure([], {})
    with pytest.raises(ValueError, match=r"`estimates\['a'\]` must have a value and an error for each of 2"):
        information_figure([1, 2], {"a": [(1, 0)]})
