"""Overhead of selecting channels and ranks under a budget in a training step, and time saved by the smaller network.

The network is trained bare, with masks, and with masks and thresholds, interleaved step by step, so that drift of the
machine's speed affects all equally. A step is the forward and backward pass and the update of scores and thresholds, as
in the callbacks. Times are CPU times (wall-clock times on a GPU). Then the delivered network is timed and compared with
the dense one, in evaluation mode, batch 8.

    python benchmarks/hybrid_compression.py                    # ResNet-18, 32 x 3 x 224 x 224, one thread
    python benchmarks/hybrid_compression.py --batch 4          # a trial run; overheads of small batches are too high
    python benchmarks/hybrid_compression.py --device cuda      # ResNet-50, 256 x 3 x 224 x 224, bfloat16
"""

import argparse
import copy
import time
from collections.abc import Callable

import timm
import torch
from _report import describe_machine, markdown_table
from torch import Tensor, nn

from lightning_plugins.compression import compression_report
from lightning_plugins.compression.budget.budgeted_network import BudgetedNetwork
from lightning_plugins.compression.budget.choice_optimizer import ChoiceOptimizer
from lightning_plugins.compression.budget.filling import ChoiceRates, ChoiceSettings

RATE = 0.01


class Form:
    """A network in one of the forms, and its step."""

    def __init__(self, net: nn.Module, ranks: bool | None, inputs: Tensor, budget: float, every: int) -> None:
        self.net, self.seconds = net, list[float]()
        self.network: BudgetedNetwork | None = None
        if ranks is not None:
            rates = ChoiceRates(refresh_every=every if ranks else 1)
            settings = ChoiceSettings(budget=budget, cost="flops", masks=True, ranks=ranks, rates=rates)
            self.network = BudgetedNetwork(net, settings, inputs=inputs)
            self.network.begin()
            self.network.be_soft(10.0)
            self.optimizer = ChoiceOptimizer(self.network.kinds())

    def step(self, images: Tensor, labels: Tensor, now: Callable[[], float]) -> None:
        """Time forward, backward and the choice; then the weights change."""
        for parameter in self.net.parameters():
            parameter.grad = None
        start = now()
        with torch.autocast("cuda", torch.bfloat16, enabled=images.is_cuda):
            loss = nn.functional.cross_entropy(self.net(images), labels)
        loss.backward()
        if self.network is not None:
            spectra = self.network.spectra()
            self.optimizer.step([0.005, 0.001][: len(self.network.kinds())])
            self.network.shift.settle(spectra, done=0.7)
        self.seconds.append(now() - start)
        with torch.no_grad():
            moved = [parameter for parameter in self.net.parameters() if parameter.grad is not None]
            torch._foreach_add_(moved, [parameter.grad for parameter in moved], alpha=-RATE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--batch", type=int, help="images per step; 32, or 256 on a GPU")
    parser.add_argument("--rounds", type=int, default=6, help="counted steps of every form; a multiple of --every")
    parser.add_argument("--every", type=int, default=1, help="decompose weights once in so many steps")
    parser.add_argument("--budget", type=float, default=0.4)
    settings = parser.parse_args()
    on_gpu = settings.device == "cuda"
    if not on_gpu:
        torch.set_num_threads(1)  # or the time of threads that wait counts too

    def now() -> float:
        if on_gpu:
            torch.cuda.synchronize()
            return time.perf_counter()
        return time.process_time()

    name, batch = ("resnet50", 256) if on_gpu else ("resnet18", 32)
    batch = settings.batch or batch
    torch.manual_seed(0)
    dense = timm.create_model(name, num_classes=1000).to(settings.device)
    example = torch.zeros(1, 3, 224, 224, device=settings.device)
    kinds = {"bare": None, "masks": False, "masks and thresholds": True}
    forms = {
        label: Form(copy.deepcopy(dense), ranks, example, settings.budget, settings.every)
        for label, ranks in kinds.items()
    }
    images = torch.randn(batch, 3, 224, 224, device=settings.device)
    labels = torch.randint(1000, (batch,), device=settings.device)
    warm_up = 2 * settings.every
    for _ in range(warm_up + settings.rounds):
        for form in forms.values():
            form.step(images, labels, now)
    sums = {label: sum(form.seconds[warm_up:]) / settings.rounds for label, form in forms.items()}
    print(describe_machine(settings.device))
    print(
        f"{name}, {batch} x 3 x 224 x 224, {settings.rounds} rounds, weights decomposed every {settings.every} steps\n"
    )
    rows = [[label, f"{1e3 * mean:.0f}", f"{100 * (mean / sums['bare'] - 1):+.1f} %"] for label, mean in sums.items()]
    print(markdown_table(("step", "ms", "beside bare"), rows))
    deliver(forms["masks and thresholds"], dense, settings)


def follow_budget(network: BudgetedNetwork, steps: int = 60) -> None:
    """Make a choice by the norms of weights and singular values alone."""
    network.begin()
    for step in range(1, steps + 1):
        network.be_soft(100.0 ** (step / steps))
        network.shift.settle(network.spectra(), min(step / (0.9 * steps), 1.0))


def deliver(form: Form, dense: nn.Module, settings: argparse.Namespace) -> None:
    """Time the network that is within the budget beside the dense one."""
    network = form.network
    if network is None:
        raise RuntimeError("a bare network delivers nothing")
    follow_budget(network)
    network.multiple = 8
    choice = network.choose()
    network.bake(choice)
    network.shrink(choice)
    flops = 1 - choice.cost / network.budget.dense
    print(f"\nDelivered within a budget of {settings.budget:.0%} of the operations: {1 - flops:.1%} are left.\n")
    rows = []
    for name, memory_format in {"usual": torch.contiguous_format, "channels_last": torch.channels_last}.items():
        inputs = torch.randn(8, 3, 224, 224, device=settings.device).to(memory_format=memory_format)
        nets = [net.eval().to(memory_format=memory_format) for net in (dense, form.net)]
        report = compression_report(nets[0], nets[1], inputs)
        before, after = report.before.latency, report.after.latency
        if before is None or after is None:
            raise RuntimeError("no latency was measured")
        gain = (1 - after.median_ms / before.median_ms) / flops
        rows.append([name, f"{before.median_ms:.1f}", f"{after.median_ms:.1f}", f"{gain:.2f}"])
    print(markdown_table(("memory format", "ms dense", "ms delivered", "gain in time / in operations"), rows))


if __name__ == "__main__":
    main()
