import pytest
import torch
from torch import nn

from lightning_plugins.compression import BeamOptions, beam_search, equal_ratio, layer_costs, trade_off
from lightning_plugins.plots import rank_figure

torch.manual_seed(0)
NET = nn.Sequential(nn.Linear(12, 10), nn.ReLU(), nn.Linear(10, 8))
X = torch.randn(30, 12)
Y = NET(X).argmax(1)
FULL = {name: cost.full_rank for name, cost in layer_costs(NET).items()}


@pytest.fixture(scope="module")
def searches():
    found = beam_search(
        NET,
        [(X, Y)],
        lambda net, b: (net(b[0]).argmax(1) == b[1]).float().mean(),
        budget=0.5,
        options=BeamOptions(step=1),
    )
    return {"beam": found, "equal": equal_ratio(NET, budget=0.5), "trade-off": trade_off(NET, budget=0.4)}


def test_shows_every_rank_of_every_choice(searches):
    left = rank_figure(searches, FULL).axes[0]
    marks = {one.get_label().split(":")[0]: one.get_offsets().tolist() for one in left.collections}
    for name, search in searches.items():
        assert marks[name] == [[rank, row] for row, rank in enumerate(search.ranks.values())]
    assert [bar.get_width() for bar in left.patches] == list(FULL.values())
    assert [text.get_text() for text in left.get_yticklabels()] == ["0", "2"]
    assert "beam: 5" in " ".join(text.get_text() for text in left.get_legend().get_texts())


def test_shows_the_search_up_to_what_it_delivers(searches):
    right = rank_figure(searches, FULL).axes[1]
    trace, *others = right.lines
    found = searches["beam"]
    assert trace.get_xdata()[-1] == 1 - found.share
    assert trace.get_ydata()[-1] == found.score
    assert list(trace.get_xdata())[:-1] == [1 - level.share for level in found.trace[:-1]]
    assert [line.get_xdata()[0] for line in others] == [1 - searches[name].share for name in ("equal", "trade-off")]


def test_choices_without_a_search_and_without_full_ranks_are_drawn(searches, tmp_path):
    figure = rank_figure({"equal": searches["equal"]}, title="net")
    assert not figure.axes[0].patches
    assert [text.get_text() for text in figure.axes[1].texts] == ["no search among them"]
    figure.savefig(tmp_path / "ranks.png")
    assert (tmp_path / "ranks.png").read_bytes().startswith(b"\x89PNG")


def test_what_cannot_be_drawn_is_refused(searches):
    with pytest.raises(ValueError, match="`searches` must have at least one result"):
        rank_figure({})
    with pytest.raises(ValueError, match="same layers, got others for 'other'"):
        rank_figure({"equal": searches["equal"], "other": equal_ratio(NET, budget=0.5, layers="0")})
    with pytest.raises(ValueError, match="`full_ranks` must have the full rank of every layer, got none for '2'"):
        rank_figure(searches, {"0": 10})
