"""Time of an inner loop, compared with a plain one like the published GAP code, and with other packages.

All variants of a workload run interleaved, so that drift of the machine's speed affects all equally; ratios are medians
over the rounds. Times are CPU times, and wall-clock times on a GPU. The plain loop processes one task after the other,
and decomposes every kernel's gradient with `torch.linalg.svd`. Those of learn2learn, higher and torchopt that are not
installed are skipped and listed.

    python benchmarks/inner_loop.py                  # a few minutes, one thread
    python benchmarks/inner_loop.py --device cuda
"""

import argparse
import copy
import importlib.util
import statistics
import time
from collections.abc import Callable, Sequence
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from _report import describe_machine, markdown_table
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from lightning_plugins.meta import GAP, InnerLoop, Sinusoid, Vectorization

STEPS, RATE = 5, 0.01
OTHERS = ("learn2learn", "higher", "torchopt")
Batch = tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]
Form = Callable[[], Tensor]


def conv4(channels: int, size: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs in (3, channels, channels, channels):
        layers += [nn.Conv2d(inputs, channels, 3, padding=1), nn.BatchNorm2d(channels, track_running_stats=False)]
        layers += [nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels * (size // 16) ** 2, 5))


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(1, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 1))


def images(tasks: int, size: int, device: str) -> Batch:
    """5-way 1-shot, 15 queries per class."""
    generator = torch.Generator().manual_seed(0)

    def part(shots: int) -> tuple[Tensor, Tensor]:
        pixels = torch.randn(tasks, 5 * shots, 3, size, size, generator=generator)
        return pixels.to(device), torch.arange(5).repeat(tasks, shots).to(device)

    return part(1), part(15)


def in_channels_last(model: nn.Module, batch: Batch) -> tuple[nn.Module, Batch]:
    """A copy of the network and the images in the memory format that is fastest for convolutions on a CPU."""

    def turned(x: Tensor) -> Tensor:
        return x.flatten(0, 1).contiguous(memory_format=torch.channels_last).unflatten(0, x.shape[:2])

    (support_x, support_y), (query_x, query_y) = batch
    other = copy.deepcopy(model).to(memory_format=torch.channels_last)
    return other, ((turned(support_x), support_y), (turned(query_x), query_y))


def plain(model: nn.Module, loss: Callable[..., Tensor], batch: Batch, gains: dict[str, nn.Parameter]) -> Tensor:
    """Task by task, with the decomposition of every gradient that has gains."""
    (support_x, support_y), (query_x, query_y) = batch
    total = torch.zeros((), device=support_x.device)
    for task in range(len(support_x)):
        parameters: dict[str, Tensor] = dict(model.named_parameters())
        for _ in range(STEPS):
            value = loss(functional_call(model, parameters, (support_x[task],)), support_y[task])
            gradients = torch.autograd.grad(value, list(parameters.values()), create_graph=True)
            parameters = {
                name: parameter - RATE * published_update(gradient, gains.get(name))
                for (name, parameter), gradient in zip(parameters.items(), gradients, strict=True)
            }
        total = total + loss(functional_call(model, parameters, (query_x[task],)), query_y[task])
    return total / len(support_x)


def published_update(gradient: Tensor, raw: nn.Parameter | None) -> Tensor:
    if raw is None:
        return gradient
    matrix = gradient.flatten(1)
    left = torch.linalg.svd(matrix.detach(), full_matrices=False)[0]
    return (left @ torch.diag(F.softplus(raw, beta=2)) @ left.T @ matrix).reshape(gradient.shape)


def new_gains(model: nn.Module, least: int) -> dict[str, nn.Parameter]:
    """For parameters of so many dimensions at least."""
    return {
        name: nn.Parameter(parameter.new_full((min(parameter.flatten(1).shape),), 0.928))
        for name, parameter in model.named_parameters()
        if parameter.ndim >= least
    }


def plain_form(model: nn.Module, loss: Callable[..., Tensor], batch: Batch, gains: dict[str, nn.Parameter]) -> Form:
    def run() -> Tensor:
        value = plain(model, loss, batch, gains)
        value.backward()
        return value.detach()

    return run


def loop_form(model: nn.Module, loss: Callable[..., Tensor], batch: Batch, **settings: Any) -> Form:
    loop = InnerLoop(model, loss, steps=STEPS, learning_rate=RATE, **settings)

    def run() -> Tensor:
        value = loop(*batch).loss
        value.backward()
        return value.detach()

    return run


def learn2learn_form(model: nn.Module, batch: Batch) -> Form:
    import learn2learn

    maml = learn2learn.algorithms.MAML(model, lr=RATE)

    def run() -> Tensor:
        total = torch.zeros((), device=batch[0][0].device)
        for x, y, query_x, query_y in zip(*batch[0], *batch[1], strict=True):
            clone = maml.clone()
            for _ in range(STEPS):
                clone.adapt(F.cross_entropy(clone(x), y))
            total = total + F.cross_entropy(clone(query_x), query_y) / len(batch[0][0])
        total.backward()
        return total.detach()

    return run


def higher_form(model: nn.Module, batch: Batch) -> Form:
    import higher

    def run() -> Tensor:
        values = []
        for x, y, query_x, query_y in zip(*batch[0], *batch[1], strict=True):
            optimizer = torch.optim.SGD(model.parameters(), RATE)
            with higher.innerloop_ctx(model, optimizer, copy_initial_weights=False) as (changed, steps):
                for _ in range(STEPS):
                    steps.step(F.cross_entropy(changed(x), y))
                value = F.cross_entropy(changed(query_x), query_y) / len(batch[0][0])
                value.backward()
            values.append(value.detach())
        return torch.stack(values).sum()

    return run


def torchopt_form(model: nn.Module, batch: Batch) -> Form:
    import torchopt

    optimizer = torchopt.MetaSGD(model, lr=RATE)

    def run() -> Tensor:
        total = torch.zeros((), device=batch[0][0].device)
        start = torchopt.extract_state_dict(model, by="reference"), torchopt.extract_state_dict(optimizer)
        for x, y, query_x, query_y in zip(*batch[0], *batch[1], strict=True):
            for _ in range(STEPS):
                optimizer.step(F.cross_entropy(model(x), y))
            total = total + F.cross_entropy(model(query_x), query_y) / len(batch[0][0])
            torchopt.recover_state_dict(model, start[0])
            torchopt.recover_state_dict(optimizer, start[1])
        total.backward()
        return total.detach()

    return run


def measure(forms: dict[str, Form], turns: int, device: str) -> list[list[str]]:
    """Seconds of each form, and the time of the first one relative to it."""
    seconds: dict[str, list[float]] = {name: [] for name in forms}
    values = {name: form().item() for name, form in forms.items()}  # warms up as well
    first = next(iter(forms))
    for name, value in values.items():
        if abs(value - values[first]) > 1e-3 * abs(values[first]):
            raise RuntimeError(f"{name} computes {value}, {first} {values[first]}: that is other work")
    for _ in range(turns):
        for name, form in forms.items():
            start = now(device)
            form()
            seconds[name].append(now(device) - start)
    lines = []
    for name, taken in seconds.items():
        ratios = [reference / own for reference, own in zip(seconds[first], taken, strict=True)]
        lines.append([name, f"{1e3 * statistics.median(taken):.1f}", f"{statistics.median(ratios):.2f}"])
    return lines


def now(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def report(title: str, forms: dict[str, Form], turns: int, device: str) -> None:
    print(f"\n## {title}\n")
    lines = measure(forms, turns, device)
    print(markdown_table(["", "ms", f"{next(iter(forms))} / this"], lines), flush=True)


def peak(tasks: int, chunk: int | None, device: str) -> float:
    """Increase of memory in MiB, in a separate process."""
    model, batch = conv4(32, 28).to(device), images(tasks, 28, device)
    small = tuple(tuple(tensor[:1] for tensor in pair) for pair in batch)
    loop_form(model, F.cross_entropy, small)()  # type: ignore[arg-type] # the same shape of tuples
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        loop_form(model, F.cross_entropy, batch, vectorize=Vectorization(chunk_size=chunk))()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    Path("/proc/self/clear_refs").write_text("5")  # reset the peak
    before = resident("VmRSS")
    loop_form(model, F.cross_entropy, batch, vectorize=Vectorization(chunk_size=chunk))()
    return resident("VmHWM") - before


def resident(key: str) -> float:
    """Current (VmRSS) or peak (VmHWM) memory in MiB, on Linux."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1]) / 2**10


def report_memory(device: str) -> None:
    print("\n## Peak memory, vectorised MAML, 4-conv network at 28 x 28\n")
    lines = []
    for tasks, chunk in ((8, None), (8, 4), (8, 2), (4, None), (2, None)):
        with get_context("spawn").Pool(1) as pool:
            lines.append([f"{tasks} tasks, {f'chunks of {chunk}' if chunk else 'all at once'}"])
            lines[-1].append(f"{pool.apply(peak, (tasks, chunk, device)):.0f}")
    print(markdown_table(["", "MiB"], lines), flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--channels", type=int, default=64, help="of the network at 84 x 84")
    chosen = parser.parse_args(arguments)
    device, turns = chosen.device, chosen.turns
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print(describe_machine(device))

    model = mlp().to(device)
    generator = torch.Generator(device).manual_seed(0)
    batch = Sinusoid(5, 15).sample(25, generator)
    forms = {"plain loop": plain_form(model, F.mse_loss, batch, new_gains(model, 2))}
    forms["vectorised"] = loop_form(model, F.mse_loss, batch, preconditioner=GAP(linear=True))
    forms["vectorised, rank=5"] = loop_form(model, F.mse_loss, batch, preconditioner=GAP(linear=True, rank=5))
    report("GAP, sinusoid network, 25 tasks", forms, turns, device)

    model, batch = conv4(chosen.channels, 84).to(device), images(4, 84, device)
    forms = {"plain loop": plain_form(model, F.cross_entropy, batch, new_gains(model, 4))}
    if device == "cpu":
        one = Vectorization(mode=False, chunk_size=1)
        forms["task by task"] = loop_form(model, F.cross_entropy, batch, preconditioner=GAP(), vectorize=one)
        other, turned = in_channels_last(model, batch)
        forms["plain loop, channels last"] = plain_form(other, F.cross_entropy, turned, new_gains(other, 4))
        last = loop_form(other, F.cross_entropy, turned, preconditioner=GAP(), vectorize=one)
        forms["task by task, channels last"] = last
    else:
        forms["vectorised"] = loop_form(model, F.cross_entropy, batch, preconditioner=GAP())
    report(
        f"GAP, 4-conv network with {chosen.channels} channels at 84 x 84, 4 tasks", forms, max(2, turns // 3), device
    )

    model, batch = conv4(32, 28).to(device), images(4, 28, device)
    forms = {"vectorised": loop_form(model, F.cross_entropy, batch)}
    forms["task by task"] = loop_form(model, F.cross_entropy, batch, vectorize=False)
    other, turned = in_channels_last(model, batch)
    forms["task by task, channels last"] = loop_form(other, F.cross_entropy, turned, vectorize=False)
    forms["plain loop"] = plain_form(model, F.cross_entropy, batch, {})
    forms["plain loop, channels last"] = plain_form(other, F.cross_entropy, turned, {})
    makers = {"learn2learn": learn2learn_form, "higher": higher_form, "torchopt": torchopt_form}
    forms |= {name: makers[name](model, batch) for name in OTHERS if importlib.util.find_spec(name)}
    report("Second-order MAML, 4-conv network with 32 channels at 28 x 28, 4 tasks", forms, turns, device)
    if missing := [name for name in OTHERS if name not in forms]:
        print(f"\nNot installed here: {', '.join(missing)}.")

    report_memory(device)


if __name__ == "__main__":
    main()
