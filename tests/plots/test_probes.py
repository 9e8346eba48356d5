import math

import pytest
import torch

from lightning_plugins.plots import attention_heat_map_figure, probe_profile_figure


def test_profile_shows_layers_steps_and_controls():
    profiles = [{"a": 0.1, "b": 0.2}, {"a": 0.5, "b": 0.6, "a@initial": 0.0, "b@initial": -9.0, "projection": 0.3}]
    axes = probe_profile_figure(profiles, [0, 10], score="accuracy", title="t").axes[0]
    assert [list(line.get_ydata()) for line in axes.lines[:3]] == [[0.1, 0.2], [0.5, 0.6], [0.0, -9.0]]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == [
        "as it began",
        "random projection of the input",
    ]
    assert axes.get_ylim()[0] == -0.25  # a control far below does not squash the rest
    assert axes.get_ylabel() == "accuracy"


def test_long_names_are_cut_and_missing_scores_left_out():
    profiles = [{"encoder.layer.0.attention": math.nan, "b": 0.2}]
    axes = probe_profile_figure(profiles, [0]).axes[0]
    assert axes.get_xticklabels()[0].get_text() == "…r.0.attention"
    assert list(axes.lines[0].get_ydata()) == [0.2]


def test_many_layers_make_the_figure_wider():
    few, many = (
        probe_profile_figure([{f"layer.{i}": 0.5 for i in range(count)}], [0]).get_figwidth() for count in (2, 40)
    )
    assert few > 6
    assert many > 40 / 2  # half an inch for each name


def test_heat_map_writes_its_numbers():
    figure = attention_heat_map_figure(torch.tensor([[0.5, -0.25, math.nan]]), property_name="IDF")
    assert [text.get_text() for text in figure.axes[0].texts][:2] == [".50", "-.25"]
    assert figure.axes[1].get_ylabel() == "rank correlation with IDF"


def test_refusals():
    with pytest.raises(ValueError, match=r"`profiles` must have one entry per step, got 1 and 2 `steps`"):
        probe_profile_figure([{"a": 0.1}], [0, 1])
    with pytest.raises(ValueError, match="`profiles` must have at least one layer"):
        probe_profile_figure([{"projection": 0.1}], [0])
    with pytest.raises(ValueError, match=r"`correlations` must have shape \(layers, heads\), got \(3,\)"):
        attention_heat_map_figure(torch.ones(3))
