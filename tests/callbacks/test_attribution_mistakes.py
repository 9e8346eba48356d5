"""Attributions evaluated inside a Trainer: what is wrong is named, in the constructor or at the first batch."""

from types import SimpleNamespace

import pytest
import torch
from captum.attr import Saliency
from lightning.pytorch.strategies import FSDPStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.nn import functional as F

from lightning_plugins.callbacks import AttributionEvaluation, BatchKeys, SampleSelection
from lightning_plugins.callbacks._attribution.refusals import check_layer
from lightning_plugins.metrics import LocalizationIoU
from tests.callbacks.test_attribution_evaluation import Net, evaluate, gradient


class Shared(Net):
    def __init__(self):
        super().__init__()
        self.net[4] = self.net[2]


class InPlace(Net):
    def __init__(self):
        super().__init__()
        self.net[2] = nn.ReLU(inplace=True)


class Functional(Net):
    def forward(self, x):
        return self.net[5:](F.relu(self.net[3](self.net[:3](x))))


class Smooth(Net):
    def __init__(self):
        super().__init__()
        self.net[2], self.net[4] = nn.Tanh(), nn.Tanh()


class OneLogit(Net):
    def __init__(self):
        super().__init__()
        self.net[7] = nn.Linear(6, 1)

    def test_step(self, batch, batch_idx):
        pass


class Pair(Net):
    def forward(self, x):
        return super().forward(x), x

    def test_step(self, batch, batch_idx):
        pass


def with_sigmoid():
    model = Net()
    model.net[2] = nn.Sigmoid()
    return model


# name: (network, arguments, what the message says)
IN_TEST = {
    "shared ReLU": (Shared, {"methods": ["guided_backprop"]}, r"a separate ReLU at every place, got \['net.2'\]"),
    "shared under DeepLIFT": (Shared, {"methods": ["deeplift"]}, "deeplift needs a separate ReLU"),
    "in-place ReLU": (InPlace, {"methods": ["guided_backprop"]}, r"\['net.2'\]; set `inplace = False` on each"),
    "ReLU as a function": (Functional, {"methods": ["guided_backprop"]}, r"1 ReLU\(s\) called as functions"),
    "no ReLU": (Smooth, {"methods": {"guided_gradcam": "net.3"}}, "changes the gradient of ReLUs, and Smooth has none"),
    "no rule": (with_sigmoid, {"methods": ["lrp"]}, "lrp has no rule for this network: .*Sigmoid"),
    "no such layer": (Net, {"methods": {"gradcam": "net.33"}}, "is not a module of Net; did you mean 'net.3'"),
    "no such network": (Net, {"network": "nett"}, "`network='nett'` is not a module of Net; did you mean 'net'"),
    "no mask in the batch": (Net, {"batch": BatchKeys(mask=5)}, "`mask=5` is not in the batch, a tuple of 3 parts"),
    "a key for a tuple": (Net, {"batch": BatchKeys(mask="mask")}, "`mask='mask'` is not in the batch"),
    "no tensor": (
        Net,
        {"batch": BatchKeys(inputs=lambda batch: 3, mask=2)},
        "`inputs` must give a tensor of the batch, got int",
    ),
    "a layer without positions": (
        Net,
        {"methods": {"gradcam": "net.7"}},
        r"`methods\['gradcam'\]\['layer'\]` must be a layer whose output has the positions .* got \[\(1, 2\)\]",
    ),
    "logits among others": (Pair, {}, "`network` must map inputs to logits .* got tuple from Pair; name the submodule"),
    "a method of NumPy": (
        Net,
        {"methods": {"mine": lambda x, target: x.detach().numpy()}},
        r"`methods\['mine'\]` must return a floating tensor, got ndarray",
    ),
    "a map too short": (
        Net,
        {"methods": {"mine": lambda x, target: x[..., 3:]}},
        r"`methods\['mine'\]` must return maps of its inputs' shape \(6, 1, 32\), .* got \(6, 1, 29\)",
    ),
    "select without bools": (
        Net,
        {"samples": SampleSelection(select=lambda p: p)},
        "`select` must return a bool for each of 6 samples, got",
    ),
}
IN_TEST_VALUES = {
    "no probabilities": (OneLogit, {}, ValueError, "`forward` gives no probabilities"),
    "a class too many": (
        Net,
        {"batch": BatchKeys(target=lambda batch: batch[1] + 5, mask=2)},
        ValueError,
        "`target` must be in 0 to 1",
    ),
    "classes as floats": (
        Net,
        {"batch": BatchKeys(target=lambda batch: batch[1].float(), mask=2)},
        TypeError,
        "`target` must be a tensor of",
    ),
    "mask of another length": (
        Net,
        {"batch": BatchKeys(mask=lambda batch: batch[2][:, :9])},
        ValueError,
        "`masks` must have the sh",
    ),
}


@pytest.mark.parametrize("name", IN_TEST)
def test_wrong_combinations_are_named(name):
    build, arguments, message = IN_TEST[name]
    with pytest.raises(MisconfigurationException, match=message):
        evaluate(**{"methods": ["saliency"], **arguments}, model=build())


@pytest.mark.parametrize("name", IN_TEST_VALUES)
def test_wrong_tensors_are_named(name):
    build, arguments, error, message = IN_TEST_VALUES[name]
    with pytest.raises(error, match=message):
        evaluate(**{"methods": ["saliency"], **arguments}, model=build())


def test_grad_cam_needs_inputs_with_positions():
    layer = nn.Linear(4, 2)
    with pytest.raises(MisconfigurationException, match=r"has the positions of the inputs, which are \(1, 4\)"):
        check_layer("gradcam", layer, layer, torch.rand(1, 4))


def test_sharded_strategies_are_refused():
    callback = AttributionEvaluation(["saliency"], batch=BatchKeys(mask=2), examples=0)
    runner = SimpleNamespace(strategy=FSDPStrategy())
    with pytest.raises(MisconfigurationException, match="supports a single device and DDP, got FSDPStrategy"):
        callback.setup(runner, Net(), "test")


ARGUMENTS = {
    "no method": ({"methods": []}, ValueError, "`methods` must have at least one method"),
    "method misspelled": ({"methods": ["salincy"]}, ValueError, "`methods` must be .* did you mean 'saliency'"),
    "a number as methods": ({"methods": 3}, TypeError, "`methods` must be names, or a mapping"),
    "a layer itself": (
        {"methods": {"gradcam": nn.ReLU()}},
        TypeError,
        r"`methods\['gradcam'\]` must be the name of a",
    ),
    "callables in a list": ({"methods": [gradient]}, TypeError, "callables go in a mapping, {'mine': function}"),
    "Captum's object": ({"methods": {"mine": Saliency(Net())}}, TypeError, "got Saliency; give its `attribute`"),
    "an option misspelled": (
        {"methods": {"integrated_gradients": {"step": 5}}},
        ValueError,
        r"`methods\['integrated_gradients'\]` has no option 'step'; did you mean 'n_steps'",
    ),
    "metrics in a list": ({"metrics": [LocalizationIoU()]}, TypeError, "or a mapping of names as in {'iou': Localiz"),
    "one metric": ({"metrics": LocalizationIoU()}, TypeError, "or a mapping of names as in {'iou': LocalizationIoU"),
    "a method without its layer": ({"methods": ["gradcam"]}, ValueError, r"`methods\['gradcam'\]` needs the name of a"),
    "a layer too many": ({"methods": {"saliency": "net.3"}}, ValueError, r"`methods\['saliency'\]` takes no layer"),
    "a number as options": ({"methods": {"saliency": 3}}, TypeError, r"`methods\['saliency'\]` must be a layer's name"),
    "no mask": ({"batch": BatchKeys()}, ValueError, "`mask` of `batch` must say where the truth is, for the `metrics`"),
    "no keys": ({"batch": 2}, TypeError, r"`batch` must be BatchKeys, such as `BatchKeys\(mask=2\)`, got 2"),
    "a number as samples": ({"samples": 0.9}, TypeError, r"`samples` must be a SampleSelection, .*, got 0.9"),
    "metric misspelled": ({"metrics": ["iuo"]}, ValueError, "`metrics` must be .* did you mean 'iou'"),
    "no metric": ({"metrics": []}, ValueError, "`metrics` must have at least one"),
    "a strange metric": (
        {"metrics": {"a": nn.ReLU()}},
        TypeError,
        r"`metrics\['a'\]` must be a metric of",
    ),
    "stage misspelled": ({"stage": "tset"}, ValueError, "`stage` must be .* did you mean 'test'"),
    "absolute misspelled": ({"absolute": "bothe"}, ValueError, "`absolute` must be .* did you mean 'both'"),
    "no forward": ({"max_forward_batch": 0}, ValueError, "`max_forward_batch` must be at least 1"),
    "negative examples": ({"examples": -1}, ValueError, "`examples` must be at least 0"),
}


@pytest.mark.parametrize(
    ("kind", "arguments", "error", "message"),
    [
        (BatchKeys, {"mask": 1.5}, TypeError, "`mask` must be a key of the batch"),
        (BatchKeys, {"mask": "nowhere.f"}, ValueError, "`mask='nowhere.f'` cannot be imported"),
        (BatchKeys, {"inputs": None}, TypeError, "`inputs` must be a key of the batch"),
        (SampleSelection, {"select": 90}, ValueError, "`select` must be in .* did you mean 0.9"),
        (SampleSelection, {"select": "label"}, ValueError, "`select='label'` must be a number, a callable or"),
        (SampleSelection, {"classes": []}, ValueError, r"`classes` must name at least one positive class, such as \[1"),
        (SampleSelection, {"classes": [-1]}, ValueError, "`classes` must be at least 0"),
        (SampleSelection, {"max_samples": 0}, ValueError, "`max_samples` must be at least 1"),
    ],
)
def test_wrong_fields_are_named(kind, arguments, error, message):
    with pytest.raises(error, match=message):
        kind(**arguments)


@pytest.mark.parametrize("name", ARGUMENTS)
def test_wrong_arguments_fail_in_the_constructor(name):
    arguments, error, message = ARGUMENTS[name]
    with pytest.raises(error, match=message):
        AttributionEvaluation(**{"methods": ["saliency"], "batch": BatchKeys(mask=2), **arguments})
