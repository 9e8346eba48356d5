"""`torch.compile`, with and without CUDA graphs, and a manually captured graph."""

import gc
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gpu_parts.networks import CALLBACKS, batches, fit, largest_difference, weights_of, wide
from gpu_parts.recorder import Recorder
from lightning_plugins.functional import polar_factor, von_neumann_entropy
from lightning_plugins.regularizers import VonNeumannEntropy

PART = "compiled"
BOUND = 2e-3  # of the largest difference of any weight after a few steps
FORMS: dict[str, dict[str, Any]] = {
    "torch.compile": {"backend": "inductor"},
    "reduce-overhead": {"mode": "reduce-overhead"},
}
ON_CPU: dict[str, dict[str, Any]] = {"aot_eager": {"backend": "aot_eager"}}
# A compression attaches masks when training begins, after the compiler has seen the module.
NAMES = ("vne", "vne, queue", "stable rank, p=2", "stable rank, p=1", "representation monitor", "masks", "hybrid")


def train(name: str, device: str, form: dict[str, Any] | None, steps: int) -> dict[str, Tensor]:
    torch._dynamo.reset()
    model: Any = wide()
    fit(model if form is None else torch.compile(model, **form), batches(steps), [CALLBACKS[name]()], device)
    return weights_of(model)


def graphed(make: Callable[[Tensor], Tensor], *, smooth: bool) -> float:
    """Distance between value, and gradient if ``smooth``, of a replayed graph and those computed eagerly."""
    gc.collect()  # a graph that is freed while another is captured spoils it
    fixed = torch.randn(256, 128, device="cuda", requires_grad=smooth)
    replayed = torch.cuda.make_graphed_callables(make, (fixed,))
    errors = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        fresh = torch.randn(256, 128, device="cuda", requires_grad=smooth)
        found, wanted = replayed(fresh), make(fresh)
        errors.append(float(torch.dist(found, wanted) / wanted.norm()))
        if not smooth:
            continue
        slopes = [torch.autograd.grad(value.sum(), fresh)[0] for value in (found, wanted)]
        errors.append(float(torch.dist(*slopes) / slopes[1].norm()))
    return max(errors)


def run(recorder: Recorder) -> None:
    forms, names = (FORMS, NAMES) if recorder.on_gpu else (ON_CPU, NAMES[1:2])
    for label, form in forms.items():
        for name in names:
            with recorder.item(PART, f"{label}: {name}") as data:
                recorder.require_time()
                found, wanted = (train(name, recorder.device, each, 6) for each in (form, None))
                data["difference"] = largest_difference(found, wanted)
                if not data["difference"] <= BOUND:
                    raise ArithmeticError(f"weights differ by {data['difference']:.1e} from the eager training")
    if not recorder.on_gpu:
        return
    functions: dict[str, Callable[[Tensor], Tensor]] = {
        "von_neumann_entropy": lambda z: von_neumann_entropy(z, method="products"),
        "VonNeumannEntropy": VonNeumannEntropy(0.1, method="products"),
        "polar_factor": lambda w: polar_factor(w, method="products"),
    }
    for name, function in functions.items():
        with recorder.item(PART, f"captured graph: {name}") as data:
            recorder.require_time()
            # The gradient of the polar factor decomposes the matrix, which waits for the host.
            data["error"] = graphed(function, smooth=name != "polar_factor")
            if not data["error"] <= 1e-4:
                raise ArithmeticError(f"a replay is off by {data['error']:.1e}")
