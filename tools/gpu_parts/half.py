"""bfloat16 and float16 with the fused AdamW: the gradient added by a callback, and the absence of overflow."""

from typing import Any

import torch
from lightning.pytorch import Callback
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor

from gpu_parts.networks import CALLBACKS, TERMS, batches, fit, names_for, weights_of, wide
from gpu_parts.recorder import Recorder

PART = "half"
BOUNDS = {"bf16-mixed": 0.05, "16-mixed": 0.02}  # relative error of the gradient added by a term


class Gradients(Callback):
    """Stores the first unscaled gradients; comes after the callback that adds to them."""

    def __init__(self, scaler: Any) -> None:
        self.scaler, self.first = scaler, dict[str, Tensor]()

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        if not self.first:
            scale = self.scaler.get_scale() if self.scaler is not None else 1.0  # a fused optimizer unscales by itself
            found = ((name, parameter.grad) for name, parameter in pl_module.named_parameters())
            self.first = {name: slope.double().cpu() / scale for name, slope in found if slope is not None}


def train(name: str | None, precision: str, device: str, steps: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The first gradients, and other results of the training."""
    settings: dict[str, Any] = {"precision": precision}
    scaler = None
    if precision != "32-true":
        scaler = torch.amp.GradScaler(device) if precision == "16-mixed" else None
        settings = {"plugins": MixedPrecision(precision, device, scaler), "precision": None}
    model, gradients = wide("fused adamw"), Gradients(scaler)
    callbacks = [gradients] if name is None else [CALLBACKS[name](), gradients]
    fit(model, batches(steps), callbacks, device, **settings)
    finite = all(bool(weight.isfinite().all()) for weight in weights_of(model).values())
    return gradients.first, {"finite": finite, "scale": None if scaler is None else scaler.get_scale()}


def share(found: dict[str, Tensor], bare: dict[str, Tensor]) -> Tensor:
    return torch.cat([(found[name] - bare[name]).flatten() for name in bare])


def run(recorder: Recorder) -> None:
    steps = 2 if recorder.tiny else 20
    for precision, bound in BOUNDS.items():
        for name in names_for(recorder.tiny):
            with recorder.item(PART, f"{precision}, fused AdamW: {name}") as data:
                recorder.require_time()
                found, told = train(name, precision, recorder.device, steps)
                data |= told
                if not told["finite"]:
                    raise ArithmeticError("a weight is not finite")
                if name not in TERMS:
                    continue
                added = share(found, train(None, precision, recorder.device, 1)[0])
                wanted = share(train(name, "32-true", "cpu", 1)[0], train(None, "32-true", "cpu", 1)[0])
                error = data["error"] = float((added - wanted).norm() / wanted.norm())
                if not error <= bound:
                    raise ArithmeticError(f"the gradient of the term is off by {error:.1e}")
