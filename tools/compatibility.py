"""Try VNERegularization on networks written by others: timm, transformers, and Lightning's own demonstrations.

Nothing is downloaded. For each network one training step without the callback and one with it are compared; the table
says what passed. `--markdown` writes it into docs/compatibility.md.
"""

import argparse
import logging
import math
import re
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import timm
import torch
import transformers
from compatibility_cases import (
    Case,
    demo_cases,
    inner_cases,
    recomputing_cases,
    recomputing_transformers_cases,
    timm_cases,
    transformers_cases,
)
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_plugins.callbacks import VNERegularization
from lightning_plugins.functional.pooling import pool_embeddings

WEIGHT = 1.0
FAMILIES_WANTED = 40
PAGE = Path(__file__).resolve().parents[1] / "docs" / "compatibility.md"
BEGIN, END = "<!-- written by tools/compatibility.py: begin -->", "<!-- end -->"


@dataclass
class Outcome:
    """What came of a case; ``problem`` is empty if all was as it should be."""

    case: Case
    parameters: int = 0
    entropies: dict[str, float] = field(default_factory=dict)
    shapes: dict[str, tuple[int, int]] = field(default_factory=dict)
    ms: float = 0.0
    note: str = ""
    problem: str = ""


class Witness(pl.Callback):
    """Notes, by means of its own, what the callback under test sees and does."""

    def __init__(self, layers: Sequence[str]) -> None:
        self.layers = layers
        self.tensors: dict[str, Tensor] = {}
        self.origins: list[Any] = []  # where autograd's graph begins that leads back from the tensors
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
    """One training step from the same start; the witness, the module afterwards, and what was logged."""
    torch.manual_seed(0)
    module, witness = build(), Witness(case.layers)
    callbacks: list[pl.Callback] = [witness]
    if plugged:
        callbacks.insert(0, VNERegularization(layers=list(case.layers), weight=WEIGHT, pool=case.pool))
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
    """Run a case, and turn what goes wrong into its `problem`."""
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
        embeddings = pool_embeddings(tensor, case.pool).double().numpy()
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
    """The term changes the gradients of what stands before its layer, and no others.

    Parameters with a gradient of zero do not count: they stand before a normalisation, or behind a scale of zero.
    """
    expect(all(grad.isfinite().all() for grad in plugged.values()), "a gradient is not finite")
    changed = {name for name, grad in plugged.items() if name not in without or differs(grad, without[name])}
    beyond = sorted(changed - upstream)
    expect(not beyond, f"the term changed gradients that it should not: {beyond[:3]}")
    alive = {name for name in upstream if name in plugged and plugged[name].any()}
    # Not all of them: a layer scale makes some changes very small.
    expect(len(changed) >= 0.5 * len(alive) > 0, f"the term reached {len(changed)} of {len(alive)} parameters")


def _check_recomputation(case: Case, outcome: Outcome) -> None:
    """With and without recomputed activations the term and all gradients are the same."""
    kept, module, kept_log = train(case.build, case, plugged=True)
    witness, _, logged = train(case.checkpointed, case, plugged=True)
    outcome.parameters, outcome.ms = sum(p.numel() for p in module.parameters()), witness.ms
    for name in witness.tensors:
        outcome.shapes[name] = tuple(pool_embeddings(witness.tensors[name], case.pool).shape)
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
    """Attributes and hooks of a module and all below it."""
    return {
        name: (
            sorted(vars(child)),
            len(child._forward_hooks),
            len(child._forward_pre_hooks),
            len(child._backward_hooks),
        )
        for name, child in module.named_modules()
    }


def all_cases() -> list[Case]:
    return [
        *timm_cases(),
        *inner_cases(),
        *transformers_cases(),
        *demo_cases(),
        *recomputing_cases(),
        *recomputing_transformers_cases(),
    ]


def cells(outcome: Outcome) -> dict[str, str]:
    """An outcome as a row of the table."""
    case = outcome.case
    pool = case.pool if isinstance(case.pool, str) else case.pool.__name__
    return {
        "family": case.family,
        "model": case.model,
        "layers": ", ".join(case.layers),
        "pool": pool,
        "recomputed": ("reentrant" if case.reentrant else "not reentrant") if case.checkpointed else "",
        "parameters": f"{outcome.parameters:,}" if outcome.parameters else "",
        "rows x d": ", ".join(f"{rows} x {dim}" for rows, dim in outcome.shapes.values()),
        "entropy": ", ".join(f"{entropy:.2f}" for entropy in outcome.entropies.values()),
        "ms": f"{outcome.ms:.0f}" if outcome.ms else "",
        "result": outcome.problem or outcome.note or "passed",
    }


def columns(outcomes: Sequence[Outcome]) -> list[str]:
    """The columns in which a group has something to say."""
    rows = [cells(outcome) for outcome in outcomes]
    return [name for name in rows[0] if any(row[name] for row in rows)]


def markdown(outcomes: Sequence[Outcome]) -> str:
    """Tables by group, without the times, which are another machine's tomorrow."""
    lines = [f"timm {timm.__version__}, transformers {transformers.__version__}, Lightning {pl.__version__}."]
    for group in dict.fromkeys(outcome.case.group for outcome in outcomes):
        members = [outcome for outcome in outcomes if outcome.case.group == group]
        names = [name for name in columns(members) if name != "ms"]
        lines += ["", f"### {group[0].upper()}{group[1:]}", "", f"| {' | '.join(names)} |", "|" + "---|" * len(names)]
        for outcome in members:
            row = cells(outcome)
            row.update({name: f"`{row[name]}`" for name in ("model", "layers", "pool")})
            lines.append(f"| {' | '.join(row[name] for name in names)} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--markdown", action="store_true", help=f"write the table into {PAGE.name} as well")
    write = parser.parse_args().markdown
    torch.set_num_threads(1)
    quieten()
    outcomes = []
    for case in all_cases():
        outcomes.append(try_case(case))
        row = cells(outcomes[-1])
        widths = zip(row.values(), (24, 32, 44, 8, 13, 12, 12, 10, 6, 0), strict=True)
        print(" ".join(f"{text:<{width}}" for text, width in widths).rstrip(), flush=True)
    passed = {outcome.case.family for outcome in outcomes if outcome.case.group == "timm" and not outcome.problem}
    failed = [outcome for outcome in outcomes if outcome.problem]
    untried = set(timm.list_modules()) - {outcome.case.family for outcome in outcomes}
    print(f"{len(passed)} families of timm passed; {len(failed)} of {len(outcomes)} cases failed")
    if untried:
        print(f"families of timm that were not tried: {', '.join(sorted(untried))}")
    if write:
        head, rest = PAGE.read_text(encoding="utf-8").split(BEGIN)
        PAGE.write_text(f"{head}{BEGIN}\n{markdown(outcomes)}\n{END}{rest.split(END)[1]}", encoding="utf-8")
    return int(bool(failed) or len(passed) < FAMILIES_WANTED)


def quieten() -> None:
    """Hide what Lightning and the networks say about settings that are meant as they are."""
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    transformers.logging.set_verbosity_error()


if __name__ == "__main__":
    sys.exit(main())
