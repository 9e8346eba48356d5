"""The tables of the callbacks' contract on `accelerator="gpu"`: one process, two sharing the GPU, NCCL on one rank."""

import os
import sys
import tempfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from gpu_parts.networks import largest_difference, weights_of
from gpu_parts.recorder import Recorder

PART = "contract"
BOUNDS = {"64-true": 1e-6, "32-true": 2e-3}  # of the largest difference of any weight from the training on the CPU
# On an accelerator the singular vectors of weights are followed by products, on a CPU checked, or decomposed.
FOLLOWED, OF_FOLLOWED = "stable rank", 1e-3
FEW = ("vne, queue", "stable rank")
Outcome = dict[str, Any]


def settings_of(names: tuple[str, ...] | None = None) -> dict[str, Any]:
    from tests.contract_table import SETTINGS

    return {name: SETTINGS[name] for name in names or SETTINGS}


def bound_of(name: str, precision: str) -> float:
    """Bound on the difference of the weights."""
    return max(BOUNDS[precision], OF_FOLLOWED if name.startswith(FOLLOWED) else 0.0)


def runs_here(name: str) -> bool:
    """Tell whether what a row of the table needs is installed."""
    return name != "attribution evaluation" or find_spec("captum") is not None


def train(name: str, device: str, data: Any = None, **settings: Any) -> dict[str, Tensor]:
    """Weights after the training of a row of the contract's table."""
    from tests.models import fit, make_batches

    row = settings_of((name,))[name]
    model = row.make()
    accelerator = "gpu" if device == "cuda" else "cpu"
    fit(model, data or make_batches(6), row.callbacks(), accelerator=accelerator, **settings)
    return weights_of(model)


def train_compression(name: str, device: str) -> tuple[int, dict[str, Tensor]]:
    """Parameters and weights of the network delivered by a compression."""
    from tests.callbacks.budgets import BATCHES, params, seeded
    from tests.contract_compression import COMPRESSIONS
    from tests.models import fit

    row = COMPRESSIONS[name]
    model, callback = seeded(), row.callback()
    dense = params(model)
    fit(model, BATCHES, [callback], accelerator="gpu" if device == "cuda" else "cpu", max_epochs=3)
    if not callback.finished or params(model) > row.budget * dense:
        raise ArithmeticError(f"{params(model)} parameters are left of {dense}, the budget is {row.budget}")
    return params(model), weights_of(model)


def act_as_node(rank: int, ranks: int) -> None:
    """Make Lightning treat this process as the only one of its node, so that several share one GPU."""
    os.environ.update(RANK=str(rank), LOCAL_RANK="0", WORLD_SIZE=str(ranks), NODE_RANK=str(rank))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29500")  # unused: the group already exists


def on_ranks(rank: int, ranks: int, device: str, backend: str, names: tuple[str, ...] | None) -> dict[str, Outcome]:
    """Result of each row on this process: weights, or the error."""
    from lightning.pytorch.strategies import DDPStrategy

    from tests.contract_ranks import BOUNDS as ROWS_OF
    from tests.models import make_batches, shard

    if backend != "gloo":
        dist.destroy_process_group()
        init = f"file://{tempfile.mkdtemp()}/init"
        dist.init_process_group(backend, init_method=init, rank=rank, world_size=ranks)
    act_as_node(rank, ranks)
    data = make_batches(6) if ranks == 1 else shard(make_batches(6), ROWS_OF[ranks])
    found = {}
    for name in filter(runs_here, settings_of(names)):
        strategy = DDPStrategy(process_group_backend=backend)
        found[name] = train(name, device, data, strategy=strategy, num_nodes=ranks)
    return found


def compare(data: Outcome, found: dict[str, Tensor], wanted: dict[str, Tensor], bound: float) -> None:
    data["difference"] = largest_difference(found, wanted)
    if not data["difference"] <= bound:
        raise ArithmeticError(f"weights differ by {data['difference']:.1e} from the training on the CPU")


def run_ranks(recorder: Recorder, label: str, ranks: int, backend: str, names: tuple[str, ...] | None) -> None:
    from tests._processes import run_on_ranks

    results: list[dict[str, Any]] = []
    with recorder.item(PART, f"{label}: trains"), tempfile.TemporaryDirectory() as folder:
        recorder.require_time()
        arguments = (ranks, recorder.device, backend, names)
        seconds = min(120.0, recorder.left())
        results = run_on_ranks(on_ranks, ranks, Path(folder), *arguments, seconds=seconds)
    for name in results[0] if results else ():
        with recorder.item(PART, f"{label}: {name}") as data:
            wanted = train(name, "cpu")
            for found in results:
                compare(data, found[name], wanted, bound_of(name, "64-true"))


def run_one(recorder: Recorder, name: str, work: Callable[[dict[str, Any]], None]) -> None:
    with recorder.item(PART, name) as data:
        recorder.require_time()
        work(data)


def run(recorder: Recorder) -> None:
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the tables stand among the tests
    torch.backends.cuda.matmul.allow_tf32 = False
    names = FEW if recorder.tiny else None
    for precision in BOUNDS:
        for name in settings_of(names):

            def work(data: Outcome, name: str = name, precision: str = precision) -> None:
                found = train(name, recorder.device, precision=precision)
                compare(data, found, train(name, "cpu"), bound_of(name, precision))

            run_one(recorder, f"{precision}: {name}", work)
    run_ranks(recorder, "two processes, gloo", 2, "gloo", names)
    if recorder.on_gpu:
        run_ranks(recorder, "one rank, NCCL", 1, "nccl", names)
    for name in ("masks",) if recorder.tiny else ("masks", "magnitude", "ranks", "hybrid"):

        def deliver(data: Outcome, name: str = name) -> None:
            import torch_pruning  # noqa: F401 - its absence is told apart from a failure

            data["parameters"], weights = train_compression(name, recorder.device)
            data["parameters on the CPU"], wanted = train_compression(name, "cpu")
            same = weights.keys() == wanted.keys() and all(weights[k].shape == wanted[k].shape for k in wanted)
            data["difference"] = largest_difference(weights, wanted) if same else "another network"

        run_one(recorder, f"compression: {name}", deliver)
