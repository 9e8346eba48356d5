import sys

import pytest
import torch

from lightning_plugins.functional.weight_spectrum import summarize_spectrum, weight_singular_values
from lightning_plugins.plots import layer_spectra_figure, weight_spectrum_figure

SPECTRA = [torch.tensor([1.0, 3.0, 0.0]), torch.tensor([2.0, 2.0, 1.0])]


def test_shows_every_spectrum_largest_first_and_the_latest_twice():
    left = weight_spectrum_figure(SPECTRA, steps=[0, 100]).axes[0]
    first, second, again = [list(line.get_ydata()) for line in left.lines]
    assert first == [3.0, 1.0]  # a logarithmic axis has no zero
    assert second == again == [2.0, 2.0, 1.0]
    assert left.get_yscale() == "log"


def test_shows_ranks_and_norm_over_the_steps():
    figure = weight_spectrum_figure(SPECTRA, steps=[0, 100])
    ranks, norm = figure.axes[1:3]
    effective, stable = ranks.lines
    assert [text.get_text() for text in ranks.get_legend().get_texts()] == ["effective rank", "stable rank"]
    shares = [torch.tensor([3.0, 1.0]).double() / 4, torch.tensor([2.0, 2.0, 1.0]).double() / 5]
    assert list(effective.get_ydata()) == pytest.approx([float((-(q * q.log()).sum()).exp()) for q in shares])
    assert list(stable.get_ydata()) == pytest.approx([10 / 9, 9 / 4])
    assert list(norm.lines[0].get_ydata()) == [3.0, 2.0]
    assert list(norm.lines[0].get_xdata()) == list(stable.get_xdata()) == [0, 100]


def test_shows_the_layers_of_a_network():
    figure = layer_spectra_figure({"fc": SPECTRA[0], "zero": torch.zeros(4), "conv": SPECTRA[1]}, title="net")
    left, right = figure.axes
    assert [text.get_text() for text in left.get_yticklabels()] == ["fc", "zero", "conv"]
    effective, stable = left.containers
    assert [bar.get_width() for bar in stable] == pytest.approx([10 / 27, 1 / 4, 3 / 4])
    assert all(wide.get_width() >= narrow.get_width() for wide, narrow in zip(effective, stable, strict=True))
    assert list(right.lines[0].get_ydata()) == pytest.approx([1.0, 1 / 3])
    assert list(right.lines[0].get_xdata()) == pytest.approx([1 / 3, 2 / 3])


@pytest.mark.parametrize(
    ("spectra", "steps"),
    [
        ([torch.ones(1)], [5]),
        ([torch.zeros(3)], [0]),
        ([torch.rand(4).bfloat16()] * 2, [7, 7]),
        ([torch.rand(4).requires_grad_(), torch.rand(6)], [0, 3]),
    ],
    ids=["one number", "all zero", "one step twice", "another width"],
)
def test_unusual_spectra_are_drawn_and_written(spectra, steps, tmp_path):
    weight_spectrum_figure(spectra, steps, title="layer").savefig(tmp_path / "weight.png")
    layer_spectra_figure(dict(zip("ab", spectra, strict=False))).savefig(tmp_path / "layers.png")
    for name in ("weight", "layers"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("shape", [(5, 9), (9, 5), (3, 4, 7)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_singular_values_are_those_of_an_svd(shape, dtype):
    weight = (torch.randn(shape) * 1e12).to(dtype)
    weight[..., :1] = 0
    torch.testing.assert_close(weight_singular_values(weight), torch.linalg.svdvals(weight.double()))


def test_singular_values_of_unusual_matrices():
    torch.testing.assert_close(weight_singular_values(torch.zeros(2, 3)), torch.zeros(2).double())
    rank_one = weight_singular_values(torch.ones(40, 30))
    torch.testing.assert_close(rank_one, torch.tensor([1200.0**0.5] + [0.0] * 29).double())
    assert rank_one.count_nonzero() == 1
    assert weight_singular_values(torch.tensor([[1.0, torch.nan]])).isnan().all()


def test_sums_up_zeros_and_what_is_not_finite():
    assert summarize_spectrum(torch.zeros(3))[:3] == (1.0, 1.0, 0.0)
    assert all(number != number for number in summarize_spectrum(torch.tensor([torch.nan, torch.nan])))


def test_missing_matplotlib_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"lightning-plugins\[plots\]"):
        weight_spectrum_figure(SPECTRA, steps=[0, 1])


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda: weight_spectrum_figure([], []), "`spectra` must have at least one spectrum"),
        (lambda: weight_spectrum_figure(SPECTRA, [1]), "`steps` must have one step per spectrum, 2, got 1"),
        (lambda: weight_spectrum_figure([torch.eye(2)], [0]), r"`spectra\[0\]` must be finite.*shape \(2, 2\)"),
        (lambda: weight_spectrum_figure([torch.tensor([1.0, torch.nan])], [0]), r"`spectra\[0\]` must be finite"),
        (lambda: layer_spectra_figure({}), "`spectra` must have at least one layer"),
        (lambda: layer_spectra_figure({"a": torch.ones(0)}), r"`spectra\['a'\]` must be finite"),
    ],
)
def test_bad_arguments_are_named(draw, message):
    with pytest.raises(ValueError, match=message):
        draw()
