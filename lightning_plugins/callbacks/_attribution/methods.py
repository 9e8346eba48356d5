"""Captum's methods by name, as functions from inputs and classes to attributions of the same positions."""

import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from lightning_plugins._checks import check_choice
from lightning_plugins._lightning import MisconfigurationException
from lightning_plugins.functional.attribution.random import random_normal, sample_keys
from lightning_plugins.functional.attribution.replacement import Patches
from lightning_plugins.functional.attribution.scoring import Explain

WITH_LAYER = ("gradcam", "guided_gradcam")


@dataclass(frozen=True)
class Call:
    """Arguments from which a method is built.

    Attributes:
        network: Maps inputs to logits.
        layer: The module of Grad-CAM, None for others.
        options: Handed on to Captum's ``attribute``.
        limit: The largest number of inputs in one forward pass.
        seed: Of the methods that draw samples.
    """

    network: nn.Module
    layer: nn.Module | None
    options: Mapping[str, Any]
    limit: int
    seed: int


def require_captum() -> ModuleType:
    """Return the module of Captum's methods.

    Raises:
        ImportError: If Captum is missing.
    """
    try:
        import captum.attr
    except ImportError as error:
        raise ImportError(
            "methods by name are Captum's; run `pip install 'lightning-plugins[attribution]'`, or give callables"
        ) from error
    module: ModuleType = captum.attr
    return module


def build_method(name: str, call: Call) -> Explain:
    """Make the method of this name.

    Args:
        name: One of `METHODS`.
        call: Its network and settings.

    Returns:
        A function from inputs ``(n, ...)`` and classes ``(n,)`` to attributions, signed where the method is; of the
        inputs' shape, or with one channel.
    """
    make = METHODS[check_choice("methods", name, METHODS)]
    attr, step = require_captum(), max(1, call.limit // _COPIES.get(name, 1))

    def explain(inputs: Tensor, target: Tensor) -> Tensor:
        parts = []
        for x, classes in zip(inputs.split(step), target.split(step), strict=True):
            with _quiet():
                parts.append(make(attr, call, x.detach().clone().requires_grad_(), classes).detach())
        return torch.cat(parts)

    return explain


def known_options(name: str) -> set[str]:
    """The options of a method: those of Captum's ``attribute``, and our own.

    Args:
        name: One of `METHODS`.

    Returns:
        Their names.
    """
    parameters = inspect.signature(getattr(require_captum(), _CLASSES[name]).attribute).parameters
    own = {"method", *(("layer",) if name in WITH_LAYER else ()), *_OWN_OPTIONS.get(name, ())}
    return {*parameters, *own} - {"self", "inputs", "target", "return_convergence_delta"}


def _saliency(attr: ModuleType, call: Call, x: Tensor, target: Tensor) -> Any:
    # Captum takes absolute values by default; here the caller says which of both is evaluated.
    return attr.Saliency(_logits(call)).attribute(x, target=target, **{"abs": False, **call.options})


def _input_x_gradient(attr: ModuleType, call: Call, x: Tensor, target: Tensor) -> Any:
    return attr.InputXGradient(_logits(call)).attribute(x, target=target, **call.options)


def _integrated_gradients(attr: ModuleType, call: Call, x: Tensor, target: Tensor) -> Any:
    options = {"n_steps": 50, "internal_batch_size": max(call.limit, len(x)), **call.options}
    return attr.IntegratedGradients(_logits(call)).attribute(x, target=target, **options)


def _guided_backprop(attr: ModuleType, call: Call, x: Tensor, target: Tensor) -> Any:
    return attr.GuidedBackprop(call.network).attribute(x, target=target, **call.options)


def _deeplift(attr: ModuleType, call: Call, x: Tensor, target: Tensor) -> Any:
    return attr.DeepLift(call.network).attribute(x, target=target, **call.options)


def _deeplift_shap(attr: ModuleType, call: Call, x: Tensor, target: Tensor) -> Any:
    options = dict(call.options)
    if "baselines" not in options:  # unit noise, for inputs that were standardised
        keys = torch.arange(_COPIES["deeplift_shap"], device=x.device)
        options["baselines"] = random_normal(keys, x[0].numel(), seed=call.seed).reshape(-1, *x.shape[1:]).to(x)
    options["baselines"] = options["baselines"].to(x)
    return attr.DeepLiftShap(call.network).attribute(x, target=target, **options)


def _lrp(attr: ModuleType, call: Call, x: Tensor, target: Tensor) -> Any:
    from captum.attr._core.lrp import SUPPORTED_LAYERS_WITH_RULES, SUPPORTED_NON_LINEAR_LAYERS
    from captum.attr._utils.lrp_rules import EpsilonRule

    activations = {kind for kind in vars(nn.modules.activation).values() if isinstance(kind, type)}
    for module in call.network.modules():
        known = type(module) in {*SUPPORTED_LAYERS_WITH_RULES, *SUPPORTED_NON_LINEAR_LAYERS}
        if (
            not known
            and not list(module.children())
            and type(module) not in activations
            and not hasattr(module, "rule")
        ):
            module.rule = EpsilonRule()  # as Captum takes it for the two-dimensional sisters of these layers
    try:
        return attr.LRP(call.network).attribute(x, target=target, **call.options)
    except TypeError as error:
        raise MisconfigurationException(f"lrp has no rule for this network: {error}") from error


def _lime(attr: ModuleType, call: Call, x: Tensor, target: Tensor) -> Any:
    return _sampled(attr.Lime, call, x, target)


def _kernel_shap(attr: ModuleType, call: Call, x: Tensor, target: Tensor) -> Any:
    return _sampled(attr.KernelShap, call, x, target)


def _gradcam(attr: ModuleType, call: Call, x: Tensor, target: Tensor) -> Any:
    options = {"relu_attributions": True, **call.options}
    maps = attr.LayerGradCam(_logits_of(call.network), call.layer).attribute(x, target=target, **options)
    return attr.LayerAttribution.interpolate(maps, tuple(x.shape[2:]), _interpolation(x))


def _guided_gradcam(attr: ModuleType, call: Call, x: Tensor, target: Tensor) -> Any:
    options = {"interpolate_mode": _interpolation(x), **call.options}
    return attr.GuidedGradCam(call.network, call.layer).attribute(x, target=target, **options)


def _sampled(kind: Any, call: Call, x: Tensor, target: Tensor) -> Tensor:
    """LIME and KernelSHAP look at one sample at a time, with random numbers that belong to it."""
    # The regressions are at least in float32, whatever a Trainer has made the default of new tensors: KernelSHAP's
    # weights of a million are infinite in half precision.
    usual = torch.get_default_dtype()

    def forward(copies: Tensor) -> Tensor:
        with _new_tensors_in(usual):
            return _logits(call)(copies.to(x.dtype))

    options = {"n_samples": 200, "perturbations_per_eval": call.limit, **call.options}
    patch = options.pop("patch", 16)
    if "feature_mask" not in options:
        options["feature_mask"] = Patches(tuple(x.shape[2:] or x.shape[1:]), patch, x.device).ids[
            (None,) * (1 + (x.ndim > 2))
        ]
    wide = x if x.dtype == torch.float64 else x.float()
    method, parts = kind(forward), []
    for sample, label, key in zip(wide.split(1), target.split(1), sample_keys(x).tolist(), strict=True):
        with torch.random.fork_rng(devices=[x.device] if x.is_cuda else []):
            torch.manual_seed((key + call.seed) % 2**63)
            with _new_tensors_in(wide.dtype):
                parts.append(method.attribute(sample, target=label, **options).detach())
    return torch.cat(parts)


# Captum carries no types: each returns a tensor
METHODS: dict[str, Callable[[ModuleType, Call, Tensor, Tensor], Any]] = {
    "saliency": _saliency,
    "integrated_gradients": _integrated_gradients,
    "input_x_gradient": _input_x_gradient,
    "guided_backprop": _guided_backprop,
    "lrp": _lrp,
    "lime": _lime,
    "kernel_shap": _kernel_shap,
    "deeplift": _deeplift,
    "deeplift_shap": _deeplift_shap,
    "gradcam": _gradcam,
    "guided_gradcam": _guided_gradcam,
}
_CLASSES = {
    "saliency": "Saliency",
    "integrated_gradients": "IntegratedGradients",
    "input_x_gradient": "InputXGradient",
    "guided_backprop": "GuidedBackprop",
    "lrp": "LRP",
    "lime": "Lime",
    "kernel_shap": "KernelShap",
    "deeplift": "DeepLift",
    "deeplift_shap": "DeepLiftShap",
    "gradcam": "LayerGradCam",
    "guided_gradcam": "GuidedGradCam",
}
_OWN_OPTIONS = {"lime": ("patch", "seed"), "kernel_shap": ("patch", "seed"), "deeplift_shap": ("seed",)}
_COPIES = {"deeplift": 2, "deeplift_shap": 8}  # inputs that a method makes of one


def _logits(call: Call) -> Callable[[Tensor], Tensor]:
    return _logits_of(call.network)


def _logits_of(network: nn.Module) -> Callable[[Tensor], Tensor]:
    """In float32, which scikit-learn's regressions need, also where the network answers in half precision."""

    def forward(x: Tensor) -> Tensor:
        logits: Tensor = network(x)
        return logits if logits.dtype == torch.float64 else logits.float()

    return forward


def _interpolation(x: Tensor) -> str:
    return {3: "linear", 4: "bilinear", 5: "trilinear"}[x.ndim]


@contextmanager
def _new_tensors_in(dtype: torch.dtype) -> Iterator[None]:
    usual = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(usual)


@contextmanager
def _quiet() -> Iterator[None]:
    """Captum warns of the hooks that it takes off again, and of tensors that it lets take gradients."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Setting (forward, )?backward hooks", category=UserWarning)
        warnings.filterwarnings("ignore", message="Setting forward", category=UserWarning)
        warnings.filterwarnings("ignore", message="Input Tensor", category=UserWarning)
        yield
