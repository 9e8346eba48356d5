import pytest
import torch
from matplotlib.colors import to_hex

from lightning_plugins.metrics import AdaptationCurve
from lightning_plugins.plots import adaptation_figure, gains_figure
from lightning_plugins.plots.style import COLOURS


def curve(*values):
    metric = AdaptationCurve(steps=len(values) - 1)
    metric.update(torch.tensor([[value - 1 for value in values], [value + 1 for value in values]]).double())
    return metric.compute()


def test_draws_a_line_with_its_interval_for_every_method():
    figure = adaptation_figure(
        {"MAML": curve(9.0, 5.0, 4.0), "GAP": curve(9.0, 3.0)},
        ylabel="mean squared error", trained_steps=1, title="Sinusoids",
    )  # fmt: skip
    (axes,) = figure.axes
    first, second, trained = axes.get_lines()
    torch.testing.assert_close(torch.tensor(first.get_xydata()), torch.tensor([[0, 9.0], [1, 5], [2, 4]]).double())
    assert [to_hex(line.get_color()).upper() for line in (first, second)] == list(COLOURS[:2])
    assert list(trained.get_xdata()) == [1, 1]
    half = 1.96
    band = axes.collections[0].get_paths()[0].get_extents()
    low, high = band.get_points().tolist()
    expected = torch.tensor([[0, 4 - half], [2, 9 + half]]).double()
    torch.testing.assert_close(torch.tensor([low, high]).double(), expected)
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["MAML: 4 ± 1.96", "GAP: 3 ± 1.96"]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("inner steps", "mean squared error")
    figure.canvas.draw()


def test_without_an_interval_and_on_a_logarithmic_axis():
    figure = adaptation_figure({"one": (torch.tensor([2.0]), torch.tensor([torch.nan]))}, log=True)
    (axes,) = figure.axes
    assert axes.get_yscale() == "log"
    assert axes.get_lines()[0].get_marker() == "o"
    assert axes.get_legend().get_texts()[0].get_text() == "one: 2"


def test_draws_gains_shared_by_steps_and_gains_of_every_step():
    gains = {"conv": torch.tensor([0.5, 1.5]), "head": torch.tensor([[1.0, 2.0, 3.0], [2.0, 3.0, 4.0]])}
    (axes,) = gains_figure(gains).axes
    reference, conv, one, two = axes.get_lines()
    assert list(reference.get_ydata()) == [1.0, 1.0]
    assert [list(line.get_ydata()) for line in (conv, one, two)] == [[0.5, 1.5], [1, 2, 3], [2, 3, 4]]
    assert list(one.get_xdata()) == [1, 2, 3]
    assert one.get_color() == two.get_color() != conv.get_color()
    assert one.get_alpha() < two.get_alpha()
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels == ["conv", "head, step 1", "head, step 2"]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: adaptation_figure({}), ValueError, "`curves` must have at least one"),
        (lambda: adaptation_figure({"a": torch.ones(3)}), TypeError, r"`curves\['a'\]` must be of type tuple"),
        (lambda: adaptation_figure({"a": (torch.ones(3), torch.ones(2))}), ValueError, r"got shapes \(3,\) and \(2,\)"),
        (lambda: adaptation_figure({"a": (torch.ones(1) / 0, torch.ones(1))}), ValueError, "must be a finite mean"),
        (lambda: gains_figure({}), ValueError, "`gains` must have at least one layer"),
        (lambda: gains_figure({"a": torch.ones(1, 2, 3)}), ValueError, r"`gains\['a'\]`.*got shape \(1, 2, 3\)"),
        (lambda: gains_figure({"a": torch.full((2,), torch.nan)}), ValueError, "must be finite"),
    ],
)
def test_bad_arguments_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
