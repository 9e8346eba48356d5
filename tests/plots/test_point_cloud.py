import torch

from lightning_plugins.plots import point_cloud_figure


def test_hidden_and_inserted_points_have_their_colours():
    points = torch.arange(15.0).reshape(5, 3)
    box = torch.tensor([[1.0, 2.0, 0.0, 4.0, 2.0, 2.0, 0.5]])
    after = {
        "points": torch.cat([points[:3], points[:2] + 0.5]).numpy(),
        "boxes": box.numpy(),
        "source": torch.tensor([-1, -1, -1, 4, 4]).numpy(),
    }
    figure = point_cloud_figure({"points": points, "boxes": box[:0]}, after, title="t")
    counts = [[len(group.get_offsets()) for group in axes.collections] for axes in figure.axes]
    assert counts == [[3, 2], [3, 2], [3, 2], [3, 2]]
    assert [len(axes.lines) for axes in figure.axes[:2]] == [0, 1]
    colours = {tuple(group.get_facecolor()[0][:3]) for axes in figure.axes for group in axes.collections}
    assert len(colours) == 3
    assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()] == ["frame", "hidden or replaced"]
