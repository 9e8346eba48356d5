import pytest

from lightning_plugins.plots import arms_figure, regret_figure

ROWS = [
    {"number": 2, "value": 3.0, "arms": ["gp+ei", "forest+pi"], "mutated": True},
    {"number": 3, "value": 2.0, "arms": ["gp+pi", "gp+ei"], "mutated": False},
    {"number": 4, "value": 2.5, "arms": ["gp+ucb", "gp+ei"], "mutated": True},
    {"number": 5, "value": None, "arms": ["gp+ei", "gp+ucb"], "mutated": True},
]


def test_lines_are_medians_and_bands_the_middle_half():
    axes = regret_figure({"a": [[5, 4, 1], [5, 2, 1], [5, 3, 1]], "b": [[1, 1, 1]]}).axes[0]
    assert list(axes.lines[0].get_ydata()) == [5, 3, 1]
    assert list(axes.lines[0].get_xdata()) == [1, 2, 3]
    assert axes.get_yscale() == "log"
    band = axes.collections[0].get_paths()[0].vertices
    assert band[:, 1].min() == 1
    assert {2.5, 3.5} <= set(band[:, 1])


def test_a_regret_of_zero_keeps_the_axis_linear():
    assert regret_figure({"a": [[1.0, 0.0]]}).axes[0].get_yscale() == "linear"


def test_bars_count_trials_and_improvements():
    axes = arms_figure(ROWS).axes[0]
    labels = [text.get_text() for text in axes.get_xticklabels()]
    heights = [patch.get_height() for patch in axes.patches]
    assert labels == ["forest+pi", "gp+ei", "gp+ucb", "as ranked", "mutated"]
    assert heights == [1, 2, 1, 1, 3, 1, 1, 0, 1, 1]
    highest = arms_figure(ROWS, direction="maximize").axes[0]
    assert [patch.get_height() for patch in highest.patches][5:] == [1, 0, 0, 0, 1]


@pytest.mark.parametrize(
    ("methods", "match"),
    [
        ({}, "`methods` must have at least one"),
        ({"a": []}, r"`methods\['a'\]` must have searches of one length"),
        ({"a": [[1.0], [1.0, 2.0]]}, r"must have searches of one length, got \[1, 2\]"),
        ({"a": [[float("nan")]]}, r"`methods\['a'\]` must have finite numbers"),
    ],
)
def test_bad_arguments_are_named(methods, match):
    with pytest.raises(ValueError, match=match):
        regret_figure(methods)


def test_no_trials_no_figure():
    with pytest.raises(ValueError, match="`origins` must have at least one trial"):
        arms_figure([])
