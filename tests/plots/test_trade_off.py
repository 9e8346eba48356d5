import pytest

from lightning_plugins.plots import trade_off_figure

METHODS = {"a": {0.8: [0.5, 0.7], 0.4: [0.9]}, "b": {0.4: [0.8]}}


def draw(methods, **arguments):
    return trade_off_figure(methods, xlabel="removed", ylabel="accuracy", **arguments)


def test_lines_go_through_the_means_and_dots_are_the_runs():
    axes = draw(METHODS).axes[0]
    first, second = axes.lines
    assert list(first.get_xdata()) == [0.4, 0.8]
    assert list(first.get_ydata()) == pytest.approx([0.9, 0.6])
    assert list(second.get_ydata()) == pytest.approx([0.8])
    assert [tuple(dot) for dot in axes.collections[0].get_offsets()] == [(0.4, 0.9), (0.8, 0.5), (0.8, 0.7)]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("removed", "accuracy")


def test_reference_is_a_dashed_line_with_its_name():
    axes = draw(METHODS, reference=("dense", 0.95)).axes[0]
    assert list(axes.lines[-1].get_ydata()) == [0.95, 0.95]
    assert [text.get_text() for text in axes.texts] == ["dense: 0.950"]


@pytest.mark.parametrize(
    ("methods", "message"),
    [
        ({}, "`methods` must have at least one method"),
        ({"a": {}}, r"`methods\['a'\]` must have at least one size"),
        ({"a": {0.5: []}}, r"`methods\['a'\]` must have finite scores"),
        ({"a": {0.5: [float("nan")]}}, r"`methods\['a'\]` must have finite scores"),
    ],
)
def test_bad_arguments_are_named(methods, message):
    with pytest.raises(ValueError, match=message):
        draw(methods)
