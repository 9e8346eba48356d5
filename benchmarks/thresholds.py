"""Overhead of masks on channels and thresholds on singular values in a training step.

One network is trained in all forms interleaved, step by step, so that drift of the machine's speed affects all equally,
and weights change between the steps of a form. A step is a forward and a backward pass, and the gradient of the soft
ranks with respect to scores and thresholds, as for a penalty in a custom loop; `hybrid_compression.py` measures the
step of the callbacks. Times are CPU times (wall-clock times on a GPU). Steps have one of four positions in the period
of their form's decompositions; for each position the minimum is used, since other load only adds to a time, and a
form's time is the mean over the positions.

    python benchmarks/thresholds.py                    # ResNet-18, 32 x 3 x 224 x 224, one thread
    python benchmarks/thresholds.py --batch 4          # a trial run; the shares are those of small batches, too high
    python benchmarks/thresholds.py --device cuda      # ResNet-50, 256 x 3 x 224 x 224, bfloat16
    python benchmarks/thresholds.py --exactness        # where a small training ends
"""

import argparse
import time
from collections.abc import Callable

import timm
import torch
from _report import describe_machine, markdown_table
from torch import Tensor, nn

from lightning_plugins.compression import apply_masks, apply_thresholds, channel_groups, masks_of, thresholds_of

FORMS = {"bare": None, "masks": 0, "k = 1": 1, "k = 2": 2, "k = 4": 4}
NAMES = {
    "bare": "bare",
    "masks": "masks",
    "k = 1": "masks and thresholds, decomposed at every step",
    "k = 2": "masks and thresholds, at every second",
    "k = 4": "masks and thresholds, at every fourth",
}
INIT = 0.1
RATE = 0.01


def make(form: str, name: str, device: str) -> nn.Module:
    torch.manual_seed(0)
    net: nn.Module = timm.create_model(name, num_classes=1000)
    every = FORMS[form]
    if every is not None:
        apply_masks(net, channel_groups(net, torch.zeros(1, 3, 64, 64)))
    if every:
        apply_thresholds(net, init=INIT, refresh_every=every)
    return net.to(device)


def step(net: nn.Module, images: Tensor, labels: Tensor, now: Callable[[], float]) -> float:
    """The seconds of forward and backward; then the weights change."""
    for parameter in net.parameters():
        parameter.grad = None
    start = now()
    with torch.autocast("cuda", torch.bfloat16, enabled=images.is_cuda):
        loss = nn.functional.cross_entropy(net(images), labels)
    thresholds = thresholds_of(net)
    loss.backward()
    masks = masks_of(net)
    if masks is not None and thresholds is not None:
        ranks = torch.stack(list(thresholds.soft_ranks().values())).sum()
        learned = [*masks.scores, *thresholds.values]
        for parameter, slope in zip(learned, torch.autograd.grad(ranks, learned, allow_unused=True), strict=True):
            if slope is not None:
                parameter.grad = slope * 1e-4 + parameter.grad
    seconds = now() - start
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.grad is not None:
                parameter.sub_(parameter.grad, alpha=RATE)
    if thresholds is not None:
        thresholds.clamp_()
    return seconds


def end_of_training(every: int, seed: int, rate: float) -> tuple[Tensor, float, int, float]:
    """Result of 200 steps of a low-rank regression: weight, threshold, rank and loss."""
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(24, 16, bias=False)).double()
    images, left, right = (torch.randn(n, 24, dtype=torch.float64) for n in (64, 3, 3))
    target = images @ left.T @ right[:, :16] / 24
    thresholds = apply_thresholds(net, init=0.3, beta=3.0, refresh_every=every)
    optimizer, loss = torch.optim.SGD(net.parameters(), lr=rate), target.square().mean()
    for _ in range(200):
        optimizer.zero_grad()
        loss = (net(images) - target).square().mean()
        (loss + 1e-3 * thresholds.soft_ranks()["0"]).backward()
        optimizer.step()
        thresholds.clamp_()
    rank = thresholds.hard_ranks()["0"]  # decomposes: the weight is that of the present threshold
    weight: Tensor = net[0].weight  # type: ignore[assignment]  # of a layer that has one
    return weight.detach(), thresholds.values[0].item(), rank, loss.item()


def print_exactness() -> None:
    rows = []
    for rate in (0.02, 0.05, 0.1):
        exact = [end_of_training(1, seed, rate) for seed in range(5)]
        for every in (1, 2, 4):
            found = [end_of_training(every, seed, rate) for seed in range(5)]
            away = [float(torch.dist(a[0], b[0]) / b[0].norm()) for a, b in zip(found, exact, strict=True)]
            means = [sum(run[i] for run in found) / len(found) for i in (1, 2, 3)]
            rows.append(
                [
                    f"{rate}",
                    f"{every}",
                    *(f"{x:.2%}" for x in (sum(away) / len(away), max(away))),
                    *(f"{x:.4g}" for x in means),
                ]
            )
    print(f"{describe_machine('cpu')}\n")
    print("a 16 x 24 weight after 200 steps of SGD, 5 seeds: its distance from that of k = 1, and means\n")
    print(markdown_table(["learning rate", "k", "distance", "largest", "threshold", "rank", "loss"], rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--batch", type=int, help="images per step; 32, or 256 on a GPU")
    parser.add_argument("--rounds", type=int, default=12, help="counted steps of every form; a multiple of 4")
    parser.add_argument("--exactness", action="store_true")
    settings = parser.parse_args()
    if settings.exactness:
        print_exactness()
        return
    on_gpu = settings.device == "cuda"
    if not on_gpu:
        torch.set_num_threads(1)  # or the time of threads that wait counts too

    def now() -> float:
        if on_gpu:
            torch.cuda.synchronize()
        return time.perf_counter() if on_gpu else time.process_time()

    name, batch = ("resnet50", 256) if on_gpu else ("resnet18", 32)
    batch = settings.batch or batch
    images = torch.randn(batch, 3, 224, 224, device=settings.device)
    labels = torch.randint(1000, (batch,), device=settings.device)
    nets = {form: make(form, name, settings.device) for form in FORMS}
    seconds: dict[str, list[float]] = {form: [] for form in FORMS}
    for net in nets.values():
        step(net, images[:2], labels[:2], now)  # decomposes: the period begins anew below
    for _ in range(settings.rounds):
        for form, net in nets.items():
            seconds[form].append(step(net, images, labels, now))

    mean = {form: sum(min(times[place::4]) for place in range(4)) / 4 for form, times in seconds.items()}
    rows = []
    for form, time_of_step in mean.items():
        shares = "" if form == "bare" else f"{time_of_step / mean['bare'] - 1:.1%}"
        rows.append([NAMES[form], f"{1e3 * time_of_step:.0f}", shares])
    print(f"{describe_machine(settings.device)}\n")
    print(f"{name}, {batch} x 3 x 224 x 224, forward and backward, {settings.rounds} steps\n")
    print(markdown_table(["step", "ms", "more than bare"], rows))


if __name__ == "__main__":
    main()
