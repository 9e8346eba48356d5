import pytest

from lightning_plugins.plots import choice_figure

ROWS = [
    {"step": step, "share": 1 - step / 10, "kept": {"stem": 1 - step / 8, "mid": 1.0}, "ranks": {"fc": 8.0 - step}}
    for step in range(5)
]


def test_shows_cost_masks_and_ranks_over_time():
    cost, masks, ranks = [axes for axes in choice_figure(ROWS, 0.4, title="half").axes if axes.get_xlabel()]
    assert list(cost.lines[0].get_ydata()) == [row["share"] for row in ROWS]
    assert set(cost.lines[1].get_ydata()) == {0.4}
    assert [text.get_text() for text in masks.get_yticklabels()] == ["stem", "mid"]
    assert masks.collections[0].get_array().ravel().tolist() == pytest.approx(
        [*(1 - s / 8 for s in range(5)), *[1] * 5]
    )
    assert ranks.collections[0].get_array().ravel().tolist() == pytest.approx([1 - s / 8 for s in range(5)])


def test_leaves_out_what_was_not_chosen():
    rows = [{**row, "kept": {}} for row in ROWS]
    labels = [axes.get_ylabel() for axes in choice_figure(rows, 0.4).axes if axes.get_xlabel()]
    assert labels == ["share of the cost", "rank"]


def test_nothing_to_draw_is_named():
    with pytest.raises(ValueError, match="`rows` must have at least one entry"):
        choice_figure([], 0.4)
