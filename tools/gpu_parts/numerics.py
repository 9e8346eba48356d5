"""Every function in float32, TF32 and bfloat16 on the device, against float64 on the CPU of the same rounded inputs."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gpu_parts import further_cases
from gpu_parts.case import Case, at_least_float, matrix, rows
from gpu_parts.recorder import Recorder
from lightning_plugins import functional

PART = "numerics"
# Relative errors, in the Frobenius norm, of value and gradient. Spectra are computed in float32 whatever the inputs
# are; the gradient of bfloat16 inputs is rounded to bfloat16.
BOUNDS = {"float32": (1e-3, 6e-3), "tf32": (5e-3, 3e-2), "bfloat16": (5e-3, 2e-2)}


def gram() -> tuple[Tensor]:
    (z,) = rows(256, 64)()
    product = z.T @ z
    return (product / product.trace(),)


def cases() -> dict[str, Case]:
    """All cases, by a name with the settings."""
    f = functional
    found: dict[str, Case] = {}
    for name, shape in {"": (96, 64), ", few rows": (48, 80), ", large": (512, 384)}.items():
        for method in ("auto", "eigh", "products"):
            found[f"von_neumann_entropy, {method}{name}"] = Case(
                "von_neumann_entropy", rows(*shape), lambda z, method=method: f.von_neumann_entropy(z, method=method)
            )
    for method in ("eigh", "products"):
        call = lambda c, method=method: f.matrix_entropy((c + c.mT) / 2, method=method)  # noqa: E731
        found[f"matrix_entropy, {method}"] = Case("matrix_entropy", gram, call)
    for order in (0.5, 2.0):
        call = lambda z, order=order: f.renyi_entropy(z, order)  # noqa: E731
        found[f"renyi_entropy, order {order}"] = Case("renyi_entropy", rows(96, 64), call)
    for of in ("eigenvalues", "singular_values"):
        call = lambda z, of=of: f.effective_rank(z, of)  # noqa: E731
        found[f"effective_rank of {of}"] = Case("effective_rank", rows(96, 64), call)
    found["diagonal_entropy"] = Case("diagonal_entropy", rows(96, 64), f.diagonal_entropy)
    found["normalize_rows"] = Case("normalize_rows", rows(96, 64), f.normalize_rows)
    found["autocorrelation_eigenvalues"] = Case(
        "autocorrelation_eigenvalues", rows(96, 64), f.autocorrelation_eigenvalues, smooth=False
    )
    found |= _of_weights() | further_cases.of_embeddings()
    return found | _without_rows()


def _without_rows() -> dict[str, Case]:
    """Functions of anything but a single matrix of rows or weights."""
    found = _of_masks() | _of_probes() | _of_integers()
    return found | further_cases.of_distillation() | further_cases.of_information() | further_cases.of_clouds()


def _of_weights() -> dict[str, Case]:
    f = functional
    found = {"stable_rank": Case("stable_rank", matrix(96, 64), f.stable_rank)}
    for p in (1, 2):
        call = lambda w, p=p: f.modified_stable_rank(w, 8, p)  # noqa: E731
        found[f"modified_stable_rank, p={p}"] = Case("modified_stable_rank", matrix(64, 96), call)
    found["nuclear_norm"] = Case("nuclear_norm", matrix(64, 96), f.nuclear_norm)
    for method in ("eigh", "products"):
        call = lambda w, method=method: f.polar_factor(w, method=method)  # noqa: E731
        found[f"polar_factor, {method}"] = Case("polar_factor", matrix(64, 96), call)
    call = lambda w: f.singular_value_threshold(w, 0.05)  # noqa: E731
    found["singular_value_threshold"] = Case("singular_value_threshold", matrix(96, 64), call)
    subspace = lambda w: f.top_singular_subspace(w, 8).values  # noqa: E731
    found["top_singular_subspace"] = Case("top_singular_subspace", matrix(96, 64), subspace, smooth=False)
    gains = lambda: (*matrix(32, 48)(), torch.linspace(0.8, 1.2, 32, dtype=torch.float64))  # noqa: E731
    for approximate in (False, True):
        call = lambda g, m, flag=approximate: f.gap_precondition(g, m, approximate=flag)  # noqa: E731
        found[f"gap_precondition, approximate={approximate}"] = Case("gap_precondition", gains, call)
    return found


def _of_masks() -> dict[str, Case]:
    f = functional
    scores = lambda: (torch.linspace(-2.05, 2.0, 64, dtype=torch.float64),)  # noqa: E731
    names = ("annealed_sigmoid", "straight_through", "hard_concrete_open")
    found = {name: Case(name, scores, getattr(f, name)) for name in names}
    noisy = lambda: (*scores(), torch.linspace(0.1, 0.9, 64, dtype=torch.float64))  # noqa: E731
    found["hard_concrete"] = Case("hard_concrete", noisy, lambda s, noise: f.hard_concrete(s, noise.detach()))
    return found


def _of_probes() -> dict[str, Case]:
    f = functional

    def problem() -> tuple[Tensor, ...]:
        (x,) = rows(128, 16)()
        y = x @ torch.linspace(-1, 1, 32, dtype=torch.float64).reshape(16, 2) + 0.1 * torch.randn(128, 2).double()
        return x, y

    def path(x: Tensor, y: Tensor) -> Tensor:
        x, y = at_least_float(x), at_least_float(y)
        return f.ridge_path(x.mT @ x, x.mT @ y, torch.logspace(-1, 2, 4, device=x.device).to(x))

    def evidence(x: Tensor, y: Tensor) -> Tensor:
        x, y = x.double(), y.double()  # the sums are the caller's: in TF32 they would not be those of these rows
        values, vectors = torch.linalg.eigh(x.mT @ x)
        return f.log_evidence(values, vectors.mT @ (x.mT @ y), (y * y).sum(0), len(x)).log_evidence

    def scores(x: Tensor, y: Tensor) -> Tensor:
        p, y = at_least_float(x)[:, :2], at_least_float(y)
        squares = (y.sum(0), (y * y).sum(0), p.sum(0), (p * p).sum(0), (y * p).sum(0))
        return f.probe_scores(f.HeldOutSums(torch.tensor(len(y), device=y.device), *squares)).pearson

    attention = lambda: (torch.rand(4, 3, 17, 17, dtype=torch.float64), torch.rand(4, 17, dtype=torch.float64))  # noqa: E731
    return {
        "ridge_path": Case("ridge_path", problem, path, smooth=False),
        "log_evidence": Case("log_evidence", problem, evidence, smooth=False),
        "probe_scores": Case("probe_scores", problem, scores, smooth=False),
        "cls_attention_correlation": Case(
            "cls_attention_correlation", attention, f.cls_attention_correlation, smooth=False
        ),
    }


def _of_integers() -> dict[str, Case]:
    """Cases with integers as input or output: the device must give exactly the CPU's."""
    f = functional
    device = lambda: (torch.zeros(1, dtype=torch.float64),)  # noqa: E731

    def integers(x: Tensor, stop: int = 96) -> Tensor:
        return torch.arange(stop, device=x.device)

    calls: dict[str, Callable[[Tensor], Tensor]] = {
        "assign_folds": lambda x: f.assign_folds(integers(x), 5),
        "group_normal": lambda x: f.group_normal(integers(x)),
        "hash_groups": lambda x: f.hash_groups(integers(x)),
        "hash_rows": lambda x: f.hash_rows(integers(x).reshape(-1, 4)),
        "inverse_document_frequency": lambda x: f.inverse_document_frequency(integers(x), 200),
        "spans_to_mask": lambda x: f.spans_to_mask(integers(x, 8).reshape(4, 2), 96),
        "beat_spans": lambda x: f.beat_spans(10 * integers(x, 8) + 5, integers(x, 8) % 1, 96)[0],
    }
    return {name: Case(name, device, call, smooth=False) for name, call in calls.items()}


# Named tuples used as inputs and outputs by the functions of `_of_probes`.
CONTAINERS = ("Evidence", "HeldOutSums", "ProbeScores")

DEGENERATE: dict[str, Callable[[], Tensor]] = {
    "zeros": lambda: torch.zeros(64, 48),
    "constant": lambda: torch.ones(64, 48),
    "one row": lambda: torch.randn(1, 48).expand(64, 48).clone(),
    "low rank, dead columns": lambda: torch.cat([torch.randn(64, 3) @ torch.randn(3, 40), torch.zeros(64, 8)], 1),
}


def evaluate(case: Case, inputs: tuple[Tensor, ...]) -> tuple[Tensor, list[Tensor]]:
    """Value and gradients, in float64 on the CPU."""
    leaves = [x.detach().clone().requires_grad_(case.smooth) for x in inputs]
    value = case.call(*leaves)
    if not case.smooth:
        return value.detach().cpu().double(), []
    direction = torch.linspace(-1, 1.5, value.numel()).reshape(value.shape).to(value)
    slopes = torch.autograd.grad((value * direction).sum(), leaves, allow_unused=True)
    return value.detach().cpu().double(), [slope.cpu().double() for slope in slopes if slope is not None]


def away(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm().clamp_min(1e-12))


def check(case: Case, device: str, bounds: dict[str, tuple[float, float]] = BOUNDS) -> dict[str, Any]:
    """The errors of each precision; raises an error if one is too large."""
    torch.manual_seed(0)
    inputs, data, problems = case.inputs(), {}, []
    for name, (of_value, of_slope) in bounds.items():
        dtype = torch.bfloat16 if name == "bfloat16" else torch.float32
        rounded = tuple(x.to(dtype) for x in inputs)
        value, slopes = evaluate(case, tuple(x.double() for x in rounded))
        torch.backends.cuda.matmul.allow_tf32 = name == "tf32"
        try:
            found, found_slopes = evaluate(case, tuple(x.to(device) for x in rounded))
        finally:
            torch.backends.cuda.matmul.allow_tf32 = False
        errors = [away(found, value), max([0.0, *map(away, found_slopes, slopes)])]
        data[name] = errors
        if not (errors[0] <= of_value and errors[1] <= of_slope):  # NaN fails too
            problems.append(f"{name}: value off by {errors[0]:.1e}, gradient by {errors[1]:.1e}")
    return {"errors": data, "problems": problems}


def check_degenerate(case: Case, device: str) -> None:
    for name, make in DEGENERATE.items():
        torch.manual_seed(0)
        inputs = (make().to(device), *(x.float().to(device) for x in case.inputs()[1:]))
        if len(inputs) > 1:
            inputs = (inputs[0][:32], inputs[1])
        value, slopes = evaluate(case, inputs)
        if not (value.isfinite().all() and all(slope.isfinite().all() for slope in slopes)):
            raise ArithmeticError(f"{name}: not finite")


def run(recorder: Recorder) -> None:
    table = cases()
    if (
        missing := set(functional.__all__)
        - {case.function for case in table.values()}
        - {*CONTAINERS, *further_cases.ON_THE_HOST}
    ):
        with recorder.item(PART, "coverage"):
            raise LookupError(f"no case for {sorted(missing)}: add one to {__name__}")
    for name, case in table.items():
        with recorder.item(PART, name) as data:
            recorder.require_time()
            data |= check(case, recorder.device)
            if case.function not in {"matrix_entropy", *_without_rows()}:
                check_degenerate(case, recorder.device)
            if data["problems"]:
                raise ArithmeticError("; ".join(data["problems"]))
