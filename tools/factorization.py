"""Factorise one small model of every timm family that can be built offline, and transformers from configurations.

Nothing is downloaded. The table shows the results; `--markdown` writes it into docs/factorization.md. Model names as
arguments restrict the test to these models.

    python tools/factorization.py --markdown
"""

import argparse
import copy
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
import transformers
from compatibility_cases import TIMM, family, images, timm_task
from compatibility_others import transformers_batch, transformers_task
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lightning_plugins.compression import factorize, restore_structure

FAMILIES_WANTED = 40
SAME = 1e-9  # of the largest output, in float64: at full rank only rounding may differ
EXPORTED = 1e-4  # of the largest output, in float32: the exported program may order its sums differently
MOVED = 1e-5  # of the largest output: halving the ranks must have a visible effect
ROWS = 2
TUPLE = {"return_dict": False}
TRANSFORMERS = {
    "Bert": TUPLE,
    "ViT": TUPLE,
    "GPT2": TUPLE | {"use_cache": False},
    "Llama": TUPLE | {"use_cache": False},
}
PAGE = Path(__file__).resolve().parents[1] / "docs" / "factorization.md"
BEGIN, END = "<!-- written by tools/factorization.py: begin -->", "<!-- end -->"


@dataclass
class Outcome:
    """Outcome of a model; ``problem`` is empty on success."""

    family: str
    model: str
    layers: int = 0
    split: int = 0
    full: float = 0.0
    ratio: float = 0.0
    export: str = ""
    seconds: float = 0.0
    problem: str = ""


def try_model(
    kind: str, name: str, build: Callable[[], nn.Module], inputs: Any, change: Callable[[nn.Module], Any] | None = None
) -> Outcome:
    """Factorise a model, and report errors as its `problem`; `change` damages it, for the tests."""
    outcome, begin = Outcome(kind, name), time.perf_counter()
    try:
        _check_full_rank(build, inputs, outcome, change)
        _check_half_rank(build, inputs, outcome, change)
    except Exception as error:  # noqa: BLE001 - whatever other people's code raises belongs into the table
        outcome.problem = f"{type(error).__name__}: {error}".splitlines()[0]
    outcome.seconds = time.perf_counter() - begin
    return outcome


def _check_full_rank(build: Callable[[], nn.Module], inputs: Any, outcome: Outcome, change: Any) -> None:
    dense = made(build, 0, inputs).double()
    given = _doubled(inputs)
    expected = run(dense, given)
    whole = factorize(dense, 1.0, only_if_smaller=False)
    (change or (lambda model: None))(whole)
    outcome.full = difference(run(whole, given), expected)
    expect(outcome.full <= SAME, f"at full rank outputs differ by {outcome.full:.1e} of the largest")


def _check_half_rank(build: Callable[[], nn.Module], inputs: Any, outcome: Outcome, change: Any) -> None:
    small = made(build, 0, inputs)
    weights, outcome.layers = count(small)
    whole = run(small, inputs)
    expect(all(bool(part.isfinite().all()) for part in whole), "the dense model's own output is not finite in float32")
    factorize(small, 0.5, only_if_smaller=False)
    left, now = count(small)
    outcome.split, outcome.ratio = now - outcome.layers, left / weights
    expected = run(small, inputs)
    expect(all(bool(part.isfinite().all()) for part in expected), "at half of the ranks the output is not finite")
    moved = difference(expected, whole)
    expect(
        moved > MOVED, f"at half of the ranks outputs differ by {moved:.1e} of the largest only: layers count nothing"
    )
    state = copy.deepcopy(small.state_dict())
    fresh = made(build, 1, inputs)
    (change or (lambda model: None))(fresh)
    restore_structure(fresh, state).load_state_dict(state, strict=True)
    again = difference(run(fresh, inputs), expected)
    expect(again == 0, f"reloaded, outputs differ by {again:.1e} of the largest")
    program = _exported(small, inputs)
    if program is None:
        outcome.export = "neither is the dense model" if _exported(made(build, 0, inputs), inputs) is None else ""
        expect(outcome.export != "", "it cannot be exported, and the dense model can")
        return
    gap = difference(run(program, inputs), expected)
    outcome.export = "yes"
    expect(gap <= EXPORTED, f"exported, outputs differ by {gap:.1e} of the largest")


@torch.no_grad()
def made(build: Callable[[], nn.Module], seed: int, inputs: Any) -> nn.Module:
    """A model in evaluation mode in which all layers are effective: initialisations that disable layers are
    replaced."""
    torch.manual_seed(seed)
    model = build().eval()
    for name, parameter in model.named_parameters():
        if not name.endswith("bias") and parameter.abs().max() < 1e-3:  # branch scales, which start at almost 0
            parameter.uniform_(0.5, 1.0)
    norms = [module for module in model.modules() if getattr(module, "running_mean", None) is not None]
    for norm in norms:  # without fitting statistics, signals vanish through many layers
        norm.momentum = None
        norm.train()
    run(model, inputs)
    return model.eval()


@torch.no_grad()
def run(model: Any, inputs: Any) -> list[Tensor]:
    torch.manual_seed(0)  # layers that draw random numbers in evaluation draw the same ones
    output = model(**inputs) if isinstance(inputs, dict) else model(inputs)
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]


def difference(outputs: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest difference, as a fraction of the largest expected output."""
    expect(len(outputs) == len(expected) > 0, f"{len(outputs)} outputs, not {len(expected)}")
    scale = max(float(part.abs().max()) for part in expected)
    expect(scale > 0, "all outputs are zero")
    return max(float((a - b).abs().max()) for a, b in zip(outputs, expected, strict=True)) / scale


def count(model: nn.Module) -> tuple[int, int]:
    """Parameters, and linear layers and convolutions."""
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d)
    return sum(p.numel() for p in model.parameters()), sum(isinstance(module, kinds) for module in model.modules())


def expect(holds: bool, problem: str) -> None:
    if not holds:
        raise RuntimeError(problem)


def _exported(model: nn.Module, inputs: Any) -> Any:
    args, kwargs = ((), inputs) if isinstance(inputs, dict) else ((inputs,), {})
    try:
        return torch.export.export(model, args, kwargs).module()
    except Exception:  # noqa: BLE001 - it is the question whether it can be
        return None


def _doubled(inputs: Any) -> Any:
    if isinstance(inputs, dict):
        return {name: _doubled(value) for name, value in inputs.items()}
    return inputs.double() if isinstance(inputs, Tensor) and inputs.is_floating_point() else inputs


def models() -> list[tuple[str, str, Callable[[], nn.Module], Any]]:
    """Family, name, constructor and inputs, by family; transformers at the end."""
    found = [(family(name), name, lambda name=name: timm_task(name).backbone, images(name)[0][:ROWS]) for name in TIMM]
    others = [
        (
            "transformers",
            name,
            lambda name=name: transformers_task(name).backbone,
            {key: value[:ROWS] for key, value in transformers_batch(name)[0].items()} | TRANSFORMERS[name],
        )
        for name in TRANSFORMERS
    ]
    return [*sorted(found, key=lambda case: case[0]), *others]


def markdown(outcomes: Sequence[Outcome]) -> str:
    """The table, without the times, which depend on the machine."""
    header = ["family", "model", "layers", "split", "full rank", "parameters", "exported", "result"]
    lines = [
        f"torch {torch.__version__}, timm {timm.__version__}, transformers {transformers.__version__}; "
        f"{summary(outcomes)}.",
        "",
        f"| {' | '.join(header)} |",
        "|---|---|---:|---:|---:|---:|---|---|",
    ]
    for one in outcomes:
        cells = [one.family, f"`{one.model}`", str(one.layers), str(one.split), f"{one.full:.0e}", f"{one.ratio:.0%}"]
        lines.append(f"| {' | '.join([*cells, one.export, one.problem or 'passed'])} |")
    return "\n".join(lines)


def summary(outcomes: Sequence[Outcome]) -> str:
    failed = [outcome for outcome in outcomes if outcome.problem]
    return f"{len(passed(outcomes))} families of timm passed, {len(failed)} of {len(outcomes)} models failed"


def passed(outcomes: Sequence[Outcome]) -> set[str]:
    return {one.family for one in outcomes if one.model in TIMM and not one.problem}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", help="try these only; all if left out")
    parser.add_argument("--markdown", action="store_true", help=f"write the table into {PAGE.name} as well")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    outcomes = []
    for case in models():
        if not arguments.models or case[1] in arguments.models:
            one = try_model(*case)
            outcomes.append(one)
            print(
                f"{one.family:<26}{one.model:<34}{one.split:>4} of {one.layers:<4}{one.full:>8.0e}{one.ratio:>6.0%}"
                f"{one.seconds:>7.1f} s  {one.problem or 'passed'}{', not exported' * (one.export != 'yes')}",
                flush=True,
            )
    print(summary(outcomes))
    if arguments.markdown:
        head, rest = PAGE.read_text(encoding="utf-8").split(BEGIN)
        PAGE.write_text(f"{head}{BEGIN}\n{markdown(outcomes)}\n{END}{rest.split(END)[1]}", encoding="utf-8")
    wanted = 1 if arguments.models else FAMILIES_WANTED
    return int(any(one.problem for one in outcomes) or len(passed(outcomes)) < wanted)


if __name__ == "__main__":
    sys.exit(main())
