import sys
import threading

import pytest
import torch

from lightning_plugins.plots import spectrum_comparison_figure, spectrum_figure

SPECTRA = [torch.tensor([0.1, 0.9, 0.0]), torch.tensor([0.5, 0.3, 0.2])]


def _lines(axes):
    return [line.get_ydata() for line in axes.lines]


def test_shows_every_spectrum_largest_first_and_the_latest_twice():
    left = spectrum_figure(SPECTRA, steps=[0, 100]).axes[0]
    first, second, again, flat = _lines(left)
    assert list(first) == pytest.approx([0.9, 0.1])  # a logarithmic axis has no zero
    assert list(second) == list(again) == pytest.approx([0.5, 0.3, 0.2])
    assert list(flat) == pytest.approx([1 / 3, 1 / 3])
    assert left.get_yscale() == "log"


def test_shows_the_entropy_over_the_steps():
    right = spectrum_figure(SPECTRA, steps=[0, 100]).axes[1]
    entropy, bound = right.lines
    expected = [-sum(p * torch.tensor(p).log().item() for p in row) for row in ([0.9, 0.1], [0.5, 0.3, 0.2])]
    assert list(entropy.get_xdata()) == [0, 100]
    assert list(entropy.get_ydata()) == pytest.approx(expected)
    assert bound.get_ydata()[0] == pytest.approx(torch.tensor(3.0).log().item())


def test_colours_follow_the_steps():
    figure = spectrum_figure(SPECTRA, steps=[0, 100])
    assert [axes.get_ylabel() for axes in figure.axes] == [
        "eigenvalue of the autocorrelation",
        "von Neumann entropy (nats)",
        "training step",
    ]
    first, second, again, _ = figure.axes[0].lines
    assert first.get_color() != second.get_color() == again.get_color()


@pytest.mark.parametrize(
    ("spectra", "steps"),
    [
        ([torch.ones(1)], [5]),
        ([torch.tensor([1.0, 0.0])], [0]),
        ([torch.zeros(3)], [0]),
        ([torch.rand(4).bfloat16()] * 2, [7, 7]),
        ([torch.rand(4).requires_grad_()] * 40, range(40)),
    ],
    ids=["one number", "rank one", "all zero", "one step twice", "many"],
)
def test_unusual_spectra_are_drawn_and_written(spectra, steps, tmp_path):
    figure = spectrum_figure(spectra, list(steps), title="layer")
    figure.savefig(tmp_path / "spectrum.png")
    assert (tmp_path / "spectrum.png").read_bytes().startswith(b"\x89PNG")


def test_only_a_point_alone_is_marked():
    one, two, *_ = spectrum_comparison_figure({"one": torch.tensor([1.0, 0.0]), "two": torch.ones(2)}).axes[0].lines
    assert (len(one.get_xdata()), one.get_marker()) == (1, "o")
    assert (len(two.get_xdata()), two.get_marker()) == (2, "None")


def test_comparison_names_runs_and_effective_ranks():
    figure = spectrum_comparison_figure(
        {"without": torch.tensor([1.0, 0.0]), "with": torch.full((4,), 0.25)}, title="after training"
    )
    (axes,) = figure.axes
    assert [text.get_text() for text in axes.get_legend().get_texts()] == [
        "without: effective rank 1.0",
        "with: effective rank 4.0",
    ]
    assert {text.get_text() for text in axes.texts} == {"flat: 1/2", "flat: 1/4"}


def test_pyplot_and_its_figures_are_left_alone(tmp_path):
    from matplotlib import pyplot

    errors = []

    def draw():
        try:
            spectrum_figure(SPECTRA, steps=[0, 1]).savefig(tmp_path / "thread.png")
        except Exception as error:  # noqa: BLE001  # a thread's error does not reach pytest by itself
            errors.append(error)

    thread = threading.Thread(target=draw)
    thread.start()
    thread.join()
    assert errors == []
    assert (tmp_path / "thread.png").exists()
    assert pyplot.get_fignums() == []


def test_missing_matplotlib_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"lightning-plugins\[plots\]"):
        spectrum_figure(SPECTRA, steps=[0, 1])


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda: spectrum_figure([], []), "`spectra` must have at least one"),
        (lambda: spectrum_figure(SPECTRA, [1]), "`steps` must have one step per spectrum, 2, got 1"),
        (lambda: spectrum_figure([torch.ones(2), torch.ones(3)], [0, 1]), r"the same length, got \[2, 3\]"),
        (lambda: spectrum_figure([torch.eye(2)], [0]), r"`spectra\[0\]` must be finite.*shape \(2, 2\)"),
        (lambda: spectrum_figure([torch.tensor([1.0, torch.nan])], [0]), r"`spectra\[0\]` must be finite"),
        (lambda: spectrum_comparison_figure({}), "`spectra` must have at least one"),
        (lambda: spectrum_comparison_figure({"a": torch.ones(())}), r"`spectra\['a'\]` must be finite"),
    ],
)
def test_bad_arguments_are_named(draw, message):
    with pytest.raises(ValueError, match=message):
        draw()


def test_one_step_needs_no_bar_of_colours():
    axes = len(spectrum_figure(SPECTRA, steps=[0, 100]).axes)
    assert len(spectrum_figure(SPECTRA[:1], steps=[100]).axes) == axes - 1
