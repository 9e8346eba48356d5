"""Costs of the package on the device, compared with published formulas and relative to a step of a ResNet-50."""

import copy
import gc
import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from gpu_parts.recorder import Recorder
from gpu_parts.turns import InTurns
from lightning_plugins.callbacks import StableRankRegularization, VNERegularization
from lightning_plugins.functional import von_neumann_entropy
from lightning_plugins.meta import GAP

PART = "tables"
SIDES = (256, 512, 1024, 2048, 4096)
GOALS = {"vne_ratio": 10.0, "vne_share": 0.01, "penalty_share": 0.02, "choice_share": 0.10, "gap_ratio": 5.0}


def clock(device: str) -> float:
    """Seconds: wall-clock time after synchronisation on a GPU, otherwise CPU time."""
    if device == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def entropy_row(n: int, d: int, device: str, seconds: float) -> dict[str, Any]:
    """The published formula compared with ours, forward and backward, interleaved."""
    from von_neumann import peak_bytes, published, step

    torch.manual_seed(0)
    embeddings = torch.randn(n, d, device=device, requires_grad=True)
    taken: dict[Callable[[Tensor], Tensor], list[float]] = {published: [], von_neumann_entropy: []}
    step(von_neumann_entropy, embeddings)
    step(published, embeddings)
    stop = time.perf_counter() + seconds
    while len(taken[published]) < 2 or (time.perf_counter() < stop and len(taken[published]) < 101):
        for formula, values in taken.items():
            start = clock(device)
            step(formula, embeddings)
            values.append(clock(device) - start)
    ours, theirs = taken[von_neumann_entropy], taken[published]
    row = {"n": n, "d": d, "pairs": len(ours), "published_ms": 1e3 * statistics.median(theirs)}
    row |= {"ours_ms": 1e3 * statistics.median(ours), "ours_quartiles_ms": quartiles(ours)}
    row["ratio"] = statistics.median(a / b for a, b in zip(theirs, ours, strict=True))
    if device == "cuda":
        row |= {"published_mib": peak_bytes(published, embeddings) / 2**20}
        row |= {"ours_mib": peak_bytes(von_neumann_entropy, embeddings) / 2**20}
        row["graph_ms"] = graphed_ms(embeddings)
    return row


def graphed_ms(embeddings: Tensor) -> float:
    """Median milliseconds of our entropy, forward and backward, as two captured CUDA graphs."""
    from von_neumann import step

    gc.collect()  # a graph that is freed while another is captured spoils it
    replayed = torch.cuda.make_graphed_callables(von_neumann_entropy, (embeddings.detach().clone().requires_grad_(),))
    taken = []
    for _ in range(21):
        start = clock("cuda")
        step(replayed, embeddings)
        taken.append(clock("cuda") - start)
    return 1e3 * statistics.median(taken[1:])


def quartiles(values: list[float]) -> list[float]:
    low, _, high = statistics.quantiles(values, n=4) if len(values) > 1 else (values[0],) * 3
    return [1e3 * low, 1e3 * high]


class Small(nn.Module):
    """Replaces the ResNet in a test."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU())
        self.fc = nn.Linear(16, 1000)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.body(x).mean((2, 3)))


def network(recorder: Recorder) -> nn.Module:
    """A ResNet-50, of timm or of torchvision."""
    torch.manual_seed(0)
    if recorder.tiny:
        return Small()
    try:
        import timm
    except ModuleNotFoundError:
        import torchvision

        return torchvision.models.resnet50()
    return timm.create_model("resnet50", num_classes=1000)


def images(recorder: Recorder) -> tuple[Tensor, Tensor]:
    """256 of them in channels_last."""
    batch, size = (8, 12) if recorder.tiny else (256, 224)
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(batch, 3, size, size, generator=generator).to(recorder.device)
    return pixels.to(memory_format=torch.channels_last), torch.randint(1000, (batch,), device=recorder.device)


class Classifier(LightningModule):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net.to(memory_format=torch.channels_last)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4)


class Repeats:
    """A loader that repeats the same batch, already on the device."""

    def __init__(self, batch: tuple[Tensor, Tensor], times: int) -> None:
        self.batch, self.times = batch, times

    def __len__(self) -> int:
        return self.times

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return itertools.repeat(self.batch, self.times)


def shares(found: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    """Median and quartiles of each form, and its overhead over the bare step."""
    bare = statistics.median(found["bare"])
    rows = {}
    for name, values in found.items():
        low, middle, high = statistics.quantiles(values, n=4)
        rows[name] = {"ms": middle, "low_ms": low, "high_ms": high, "share": middle / bare - 1, "steps": len(values)}
    return rows


def in_turns(
    recorder: Recorder, forms: dict[str, Callback | None], further: Sequence[Callback] = ()
) -> dict[str, dict[str, float]]:
    """Times of whole steps of a training in which the forms take turns."""
    turns = InTurns(forms, recorder.device)
    rounds, leave_out = (3, 1) if recorder.tiny else (18, 3)
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = Trainer(
        accelerator="gpu" if recorder.on_gpu else "cpu",
        devices=1,
        precision="bf16-mixed",
        max_epochs=1,
        callbacks=[turns, *further],
        **quiet,  # type: ignore[arg-type]  # all of them take a bool
    )
    trainer.fit(Classifier(network(recorder)), Repeats(images(recorder), len(forms) * rounds))
    return shares(turns.milliseconds(leave_out))


def penalties(recorder: Recorder) -> dict[str, Any]:
    """The entropy in one training, and the stable rank terms in another, each in its own steps."""
    # A step behind one in which the host lags would take longer through no fault of its own.
    alone: dict[str, Callback | None] = {"entropy of the last features": None, "bare": None}
    entropy = VNERegularization("net.fc:input", weight=0.1, every_n_steps=len(alone), method="products")
    rows = in_turns(recorder, alone, [entropy])
    weight = 1e-4
    forms: dict[str, Callback | None] = {
        "bare": None,
        "stable rank": StableRankRegularization("*", weight),
        "p=2, a tenth of the rank": StableRankRegularization("*", weight, rank=0.1, p=2),
        "p=2, a quarter of the rank": StableRankRegularization("*", weight, rank=0.25, p=2),
        "p=1, a quarter of the rank": StableRankRegularization("*", weight, rank=0.25, p=1),
    }
    return {"bare, beside the entropy": rows.pop("bare"), **rows, **in_turns(recorder, forms)}


def choices(recorder: Recorder) -> dict[str, Any]:
    """Masks on channels, and masks and thresholds, decomposed at every step and at every fourth."""
    from hybrid_compression import Form

    net = network(recorder).to(recorder.device, memory_format=torch.channels_last)
    pixels, labels = images(recorder)
    kinds: dict[str, tuple[bool | None, int]] = {
        "bare": (None, 1),
        "masks": (False, 1),
        "masks and thresholds, every step": (True, 1),
        "masks and thresholds, every fourth": (True, 4),
    }
    forms = {name: Form(copy.deepcopy(net), ranks, pixels[:1], 0.4, every) for name, (ranks, every) in kinds.items()}
    rounds, leave_out, steps = (2, 1, 4) if recorder.tiny else (10, 3, 4)
    seconds: dict[str, list[float]] = {name: [] for name in forms}
    for _ in range(leave_out + rounds):
        for name, form in forms.items():
            recorder.require_time()
            start = clock(recorder.device)
            for _ in range(steps):  # as in a training, in which no step waits for the one before
                form.step(pixels, labels, time.perf_counter)
            seconds[name].append((clock(recorder.device) - start) / steps)
    return shares({name: [1e3 * x for x in values[leave_out:]] for name, values in seconds.items()})


def adaptation(recorder: Recorder) -> dict[str, Any]:
    """GAP, five steps on four tasks of 84 x 84, compared with the plain loop."""
    from inner_loop import conv4, loop_form, measure, new_gains, plain_form
    from inner_loop import images as tasks_of

    channels, size, tasks = (2, 16, 1) if recorder.tiny else (64, 84, 4)
    torch.backends.cudnn.allow_tf32 = False  # both loops must compute the same to a thousandth
    try:
        torch.manual_seed(0)
        model, batch = conv4(channels, size).to(recorder.device), tasks_of(tasks, size, recorder.device)
        loss = nn.functional.cross_entropy
        forms = {"plain loop": plain_form(model, loss, batch, new_gains(model, 4))}
        forms["GAP"] = loop_form(model, loss, batch, preconditioner=GAP())
        lines = measure(forms, 1 if recorder.tiny else 4, recorder.device)
        rows = {name: {"ms": float(ms), "ratio": float(ratio)} for name, ms, ratio in lines}
        if recorder.on_gpu:
            for name, form in forms.items():
                before = torch.cuda.memory_allocated()
                torch.cuda.reset_peak_memory_stats()
                form()
                rows[name]["peak_mib"] = (torch.cuda.max_memory_allocated() - before) / 2**20
    finally:
        torch.backends.cudnn.allow_tf32 = True
    return rows


def entropies(recorder: Recorder, shapes: list[tuple[int, int]]) -> None:
    for n, d in shapes:
        with recorder.item(PART, f"entropy, {n} x {d}") as data:
            recorder.require_time()
            data |= entropy_row(n, d, recorder.device, 0.05 if recorder.tiny else 0.5)


def run(recorder: Recorder) -> None:
    """Small matrices first and the largest last, where the published formula takes seconds per call."""
    sides = (16, 32) if recorder.tiny else SIDES
    shapes = sorted(itertools.product(sides, sides), key=lambda shape: (min(shape), shape))
    small = [shape for shape in shapes if min(shape) < 2048]
    entropies(recorder, small)
    for name, work in {"adaptation": adaptation, "penalties": penalties, "choices": choices}.items():
        with recorder.item(PART, name) as data:
            recorder.require_time()
            data["rows"] = work(recorder)
    entropies(recorder, [shape for shape in shapes if shape not in small])
