"""Test of a case of compatibility.py: comparison of a training step without the callback and one with it."""

import math
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from compatibility_cases import Case
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_plugins.callbacks import Readout, VNERegularization
from lightning_plugins.functional.pooling import pool_embeddings

WEIGHT = 1.0


@dataclass
class Outcome:
    """Outcome of a case; ``problem`` is empty on success."""

    case: Case
    parameters: int = 0
    entropies: dict[str, float] = field(default_factory=dict)
    shapes: dict[str, tuple[int, int]] = field(default_factory=dict)
    ms: float = 0.0
    note: str = ""
    problem: str = ""


LAYOUTS = {3: "NLC", 4: "NCHW"}  # layout of the tensors of all cases except those pooled as channels last


def _pooled(tensor: Tensor, case: Case) -> Tensor:
    layout = LAYOUTS.get(tensor.ndim) if isinstance(case.pool, str) else None
    return pool_embeddings(tensor, case.pool, layout=layout)


class Witness(pl.Callback):
    """Independently records the inputs and effects of the tested callback."""

    def __init__(self, layers: Sequence[str]) -> None:
        self.layers = layers
        self.tensors: dict[str, Tensor] = {}
        self.origins: list[Any] = []  # start nodes of the autograd graph of the tensors
        self.gradients: dict[str, Tensor] = {}
        self.loss, self.ms = math.nan, 0.0

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.handles = []
        for layer in self.layers:
            name, _, side = layer.partition(":")
            hook = self._hook(name, received=side == "input")
            self.handles.append(pl_module.get_submodule(name).register_forward_hook(hook, with_kwargs=True))

    def _hook(self, name: str, *, received: bool) -> Any:
        def hook(module: Any, args: Any, kwargs: Any, output: Any) -> None:
            value = (args or tuple(kwargs.values())) if received else output
            while not isinstance(value, Tensor):
                value = value["last_hidden_state"] if hasattr(value, "last_hidden_state") else value[0]
            if name not in self.tensors:  # the first call: recomputation comes later
                self.tensors[name] = value.detach().clone()
                self.origins.append(value.grad_fn)

        return hook

    def on_train_batch_start(self, *args: Any) -> None:
        torch.manual_seed(1)  # dropout and the like: the same with and without the callback
        self._begin = time.perf_counter()

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        for name, parameter in pl_module.named_parameters():
            if parameter.grad is not None:
                self.gradients[name] = parameter.grad.clone()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *args: Any) -> None:
        self.ms = 1e3 * (time.perf_counter() - self._begin)
        self.loss = float(outputs["loss"])
        for handle in self.handles:
            handle.remove()


def train(
    build: Callable[[], pl.LightningModule], case: Case, *, plugged: bool
) -> tuple[Witness, Any, dict[str, float]]:
    """One training step from the same start; returns the witness, the module and the logged values."""
    torch.manual_seed(0)
    module, witness = build(), Witness(case.layers)
    callbacks: list[pl.Callback] = [witness]
    if plugged:
        callbacks.insert(0, VNERegularization(layers=list(case.layers), weight=WEIGHT, readout=Readout(pool=case.pool)))
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = pl.Trainer(accelerator="cpu", devices=1, max_steps=1, callbacks=callbacks, **quiet)
    trainer.fit(module, DataLoader([case.batch], batch_size=None))
    return witness, module, {name: float(value) for name, value in trainer.callback_metrics.items()}


def try_case(case: Case) -> Outcome:
    """Run a case, and report errors as its `problem`."""
    outcome = Outcome(case)
    try:
        (_check_recomputation if case.checkpointed else _check_term)(case, outcome)
    except Exception as error:  # noqa: BLE001 - whatever other people's code raises belongs into the table
        text = f"{type(error).__name__}: {error}".splitlines()[0]
        refused = case.refusal is not None and re.search(case.refusal, text) is not None
        outcome.note, outcome.problem = ("refused, as it should be", "") if refused else ("", text)
    else:
        if case.refusal is not None:
            outcome.problem = f"was not refused ({case.refusal})"
    return outcome


def _check_term(case: Case, outcome: Outcome) -> None:
    without, bare, _ = train(case.build, case, plugged=False)
    witness, module, logged = train(case.build, case, plugged=True)
    outcome.parameters, outcome.ms = sum(p.numel() for p in module.parameters()), witness.ms
    expect(math.isfinite(witness.loss), "the loss is not finite")
    for name, tensor in witness.tensors.items():
        embeddings = _pooled(tensor, case).double().numpy()
        outcome.shapes[name] = rows, dim = embeddings.shape
        outcome.entropies[name] = entropy = logged[f"vne/{name}/entropy"]
        expect(rows == case.rows, f"{name} gave {rows} rows, not {case.rows}")
        expect(-1e-5 <= entropy <= math.log(min(rows, dim)) + 1e-5, f"entropy {entropy} of {name} is out of its range")
        reference = entropy_by_numpy(embeddings)
        expect(abs(entropy - reference) < 1e-4, f"entropy of {name} is {entropy}, and {reference} by NumPy")
    penalty = -WEIGHT * sum(outcome.entropies.values())
    expect(abs(witness.loss - without.loss - penalty) < 1e-3, f"loss went from {without.loss} to {witness.loss}")
    upstream = parameters_behind(without.origins, bare)
    _check_gradients(upstream, without.gradients, witness.gradients)
    expect(fingerprint(module) == fingerprint(bare), "the module is not as it was")


def _check_gradients(upstream: set[str], without: dict[str, Tensor], plugged: dict[str, Tensor]) -> None:
    """Check that the term changes only the gradients of parameters before its layer.

    Parameters with zero gradient are ignored: they are before a normalisation, or after a zero scale.
    """
    expect(all(grad.isfinite().all() for grad in plugged.values()), "a gradient is not finite")
    changed = {name for name, grad in plugged.items() if name not in without or differs(grad, without[name])}
    beyond = sorted(changed - upstream)
    expect(not beyond, f"the term changed gradients that it should not: {beyond[:3]}")
    alive = {name for name in upstream if name in plugged and plugged[name].any()}
    # Not all of them: a layer scale makes some changes very small.
    expect(len(changed) >= 0.5 * len(alive) > 0, f"the term reached {len(changed)} of {len(alive)} parameters")


def _check_recomputation(case: Case, outcome: Outcome) -> None:
    """Check that the term and all gradients are the same with and without recomputed activations."""
    kept, module, kept_log = train(case.build, case, plugged=True)
    witness, _, logged = train(case.checkpointed, case, plugged=True)
    outcome.parameters, outcome.ms = sum(p.numel() for p in module.parameters()), witness.ms
    for name in witness.tensors:
        outcome.shapes[name] = tuple(_pooled(witness.tensors[name], case).shape)
        outcome.entropies[name] = logged[f"vne/{name}/entropy"]
        gap = abs(logged[f"vne/{name}/entropy"] - kept_log[f"vne/{name}/entropy"])
        expect(gap < 1e-5, f"recomputation changed the entropy of {name} by {gap}")
    expect(witness.gradients.keys() == kept.gradients.keys(), "recomputation changed which parameters have a gradient")
    for name, grad in kept.gradients.items():
        torch.testing.assert_close(witness.gradients[name], grad, rtol=1e-3, atol=1e-5)


def expect(holds: bool, problem: str) -> None:
    if not holds:
        raise RuntimeError(problem)


def differs(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).norm() > 1e-4 * b.norm())


def entropy_by_numpy(embeddings: np.ndarray) -> float:
    z = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
    p = np.linalg.svd(z, compute_uv=False) ** 2 / len(z)
    p = p[p > 1e-15]
    return float(-(p * np.log(p)).sum())


def parameters_behind(origins: Sequence[Any], module: nn.Module) -> set[str]:
    """Names of the parameters that tensors were computed from, by following autograd's graph from their nodes."""
    names = {parameter: name for name, parameter in module.named_parameters()}
    ahead, seen, found = list(origins), set(), set()
    while ahead:
        node = ahead.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.add(names[node.variable])
        ahead += [following for following, _ in node.next_functions]
    return found


def fingerprint(module: nn.Module) -> dict[str, Any]:
    """Attributes and hooks of a module and its submodules."""
    return {
        name: (
            sorted(vars(child)),
            len(child._forward_hooks),
            len(child._forward_pre_hooks),
            len(child._backward_hooks),
        )
        for name, child in module.named_modules()
    }
