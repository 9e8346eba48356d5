"""Figures of attributions show the maps, the truth and the curves."""

import pytest
import torch

from lightning_plugins.plots import attribution_figure, degradation_figure


def test_a_signal_has_a_row_for_each_map_and_its_spans_shaded():
    mask = torch.zeros(50)
    mask[10:20] = mask[30:50] = 1
    maps = {"a": torch.randn(2, 50), "b": torch.zeros(50)}
    figure = attribution_figure(torch.randn(1, 50), maps, mask=mask, title="One")
    assert [axes.get_ylabel() for axes in figure.axes] == ["a", "b"]
    spans = [patch.get_bbox().intervalx.tolist() for patch in figure.axes[0].patches]
    assert spans == [[10, 20], [30, 50]]
    colours = figure.axes[0].collections[0].get_array()
    torch.testing.assert_close(torch.as_tensor(colours), maps["a"].sum(0)[:-1].double())


def test_an_image_stands_beside_its_maps():
    figure = attribution_figure(torch.rand(3, 6, 8), {"a": torch.randn(6, 8)}, mask=torch.ones(1, 6, 8).triu())
    assert [axes.get_title() for axes in figure.axes] == ["input", "a"]


def test_a_picture_is_as_wide_beside_four_maps_as_beside_one():
    maps = {name: torch.randn(6, 8) for name in "abcd"}
    one, four = (attribution_figure(torch.rand(3, 6, 8), {name: maps[name] for name in n}) for n in ("a", "abcd"))
    assert four.get_figwidth() / 5 == pytest.approx(one.get_figwidth() / 2)


def test_curves_give_the_area_between_them():
    curves = {"a": (torch.tensor([[1.0, 0.8, 0.0], [1.0, 0.6, 0.0]]), torch.tensor([[1.0, 0.1, 0.0]] * 2))}
    figure = degradation_figure(curves)
    assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()] == ["a: +0.20"]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: attribution_figure(torch.rand(9), {}), "`maps` must have at least one"),
        (lambda: attribution_figure(torch.rand(9), {"a": torch.rand(8)}), r"`maps\['a'\]` must have the positions"),
        (lambda: attribution_figure(torch.rand(1, 1, 2, 9), {"a": torch.rand(9)}), "`inputs` must be a signal"),
        (lambda: degradation_figure({}), "`curves` must have at least one"),
        (lambda: degradation_figure({"a": (torch.rand(3), torch.rand(4))}), r"`curves\['a'\]` must be of one shape"),
    ],
)
def test_bad_inputs_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
