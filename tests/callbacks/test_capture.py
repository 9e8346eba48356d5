import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_plugins.callbacks._rows.capture import LayerRows as LayerCapture


class _AddsInPlace(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 3), nn.Linear(3, 3)

    def forward(self, x):
        x = self.first(x)
        x += 1
        return self.last(x)


def record(model, layers, *, needs_gradient=True):
    capture = LayerCapture(model, layers, needs_gradient=needs_gradient)
    capture.attach()
    with capture.recording():
        model(torch.ones(2, 4))
    return capture


@pytest.mark.parametrize(
    ("model", "layer"),
    [
        (nn.Sequential(nn.Linear(4, 3), nn.ReLU(inplace=True)), "0"),
        (nn.Sequential(nn.Linear(4, 3), nn.ReLU(inplace=True)), "1:input"),
        (_AddsInPlace(), "first"),
    ],
)
def test_a_tensor_that_was_changed_in_place_is_refused(model, layer):
    capture = record(model, layer)
    with pytest.raises(MisconfigurationException, match=f"'{layer.partition(':')[0]}' was changed in place"):
        capture.take()


@pytest.mark.parametrize("inplace", [True, False])
def test_what_changes_in_place_can_itself_be_captured(inplace):
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(inplace=inplace), nn.Linear(3, 3))
    taken = record(model, ["1", "2:input"]).take()
    expected = model[0](torch.ones(2, 4)).relu()
    for tensors in taken.values():
        torch.testing.assert_close(tensors, [expected])


@pytest.mark.parametrize("transform", [torch.vmap, lambda fn: torch.func.grad(lambda x: fn(x).sum())])
@pytest.mark.parametrize("needs_gradient", [True, False])
def test_tensors_inside_a_transform_are_refused(transform, needs_gradient):
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh())
    capture = LayerCapture(model, "0", needs_gradient=needs_gradient)
    capture.attach()
    transform(model)(torch.ones(2, 4))  # not recorded
    with (
        capture.recording(),
        pytest.raises(MisconfigurationException, match=r"'0' ran inside a transform.*`features='0'`.*'query_features'"),
    ):
        transform(model)(torch.ones(2, 4))


def test_an_earlier_step_does_not_count():
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(inplace=True), nn.Linear(3, 3))
    capture = record(model, "0")
    model[1] = nn.Identity()
    with capture.recording():
        expected = model[0](torch.ones(2, 4))
    torch.testing.assert_close(capture.take(), {"0": [expected]})


def test_tensors_of_inference_mode_do_not_say_whether_they_were_changed():
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU())
    with torch.inference_mode():
        taken = record(model, "0", needs_gradient=False).take()
    torch.testing.assert_close(taken, {"0": [model[0](torch.ones(2, 4)).detach()]})


@pytest.mark.parametrize("layer", ["0", "2:input"])
def test_nothing_is_kept_outside_of_a_recording(layer):
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3))
    capture = record(model, layer)
    model(torch.zeros(2, 4))  # a validation, or what activation checkpointing computes again in the backward pass
    expected = model[0](torch.ones(2, 4))
    (taken,) = capture.take().values()
    torch.testing.assert_close(taken, [expected if layer == "0" else expected.tanh()])
    with pytest.raises(MisconfigurationException, match="was not called in this step"):
        capture.take()  # a second time


def test_no_hook_is_left_behind():
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 3))
    record(model, ["0:input", "1"]).detach()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model)
