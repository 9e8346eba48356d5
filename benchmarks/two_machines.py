"""Two emulated machines: two network namespaces joined by a link of limited rate, with a Trainer of `num_nodes=2`.

    python benchmarks/two_machines.py                    # measures, for the page of `scaling.py`; needs root and `ip`
    python benchmarks/two_machines.py --without-link     # the same training on the loopback, which needs neither

Each namespace has its own interfaces and addresses, so that the two processes find each other as two machines do: by
`MASTER_ADDR` and over the one link there is. Nothing is left of them in the end.
"""

import argparse
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

SCRIPT = Path(__file__).resolve()
STORE = SCRIPT.parents[1] / "docs" / "benchmarks" / "two_machines.json"
RATES = (100, 20)  # Mbit/s
MACHINES = ("left", "right")
ADDRESSES = ("10.77.0.1", "10.77.0.2")
CASES = ("WeightRegularization", "VNERegularization")
SHAPES = {"WeightRegularization": (16, 256, 4), "VNERegularization": (256, 256, 4)}  # rows, width, layers
STEPS = 5  # of the training whose outcome is compared
SECONDS = 300


def link(rate: int, names: tuple[str, ...] = MACHINES) -> list[str]:
    """Commands that make two machines and the link between them."""
    left, right = names
    ends = ((left, ADDRESSES[0]), (right, ADDRESSES[1]))
    return [
        *(f"ip netns add {name}" for name in names),
        f"ip link add eth0 netns {left} type veth peer name eth0 netns {right}",
        *(f"ip -n {name} addr add {address}/24 dev eth0" for name, address in ends),
        *(f"ip -n {name} link set {device} up" for name in names for device in ("lo", "eth0")),
        *(f"tc -n {name} qdisc add dev eth0 root tbf rate {rate}mbit burst 64kb latency 200ms" for name in names),
    ]


def obstacle() -> str:
    """Why this machine cannot make such a link; nothing if it can."""
    if missing := [program for program in ("ip", "tc") if shutil.which(program) is None]:
        return f"{' and '.join(missing)} must be installed (iproute2)"
    name = f"try{os.getpid()}"
    tried = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, check=False)
    if tried.returncode != 0:
        return f"`ip netns add` must be allowed, as it is to root: {tried.stderr.strip()}"
    subprocess.run(["ip", "netns", "delete", name], check=True)
    return ""


@contextmanager
def machines(rate: int) -> Iterator[tuple[str, str]]:
    """Two linked namespaces, by name."""
    names = f"{MACHINES[0]}{os.getpid()}", f"{MACHINES[1]}{os.getpid()}"
    try:
        for command in link(rate, names):
            subprocess.run(command.split(), check=True)
        yield names
    finally:
        for name in names:  # the link goes with them
            subprocess.run(["ip", "netns", "delete", name], check=False)


def train_on(names: tuple[str, ...], arguments: list[str]) -> list[dict[str, Any]]:
    """The results of two processes, each started in its namespace as on its own machine.

    Raises:
        RuntimeError: If one of them failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        started = []
        for rank in range(2):
            inside = ["ip", "netns", "exec", names[rank]] if names else []
            own = {
                "NODE_RANK": str(rank),
                "MASTER_ADDR": ADDRESSES[0] if names else "127.0.0.1",
                "MASTER_PORT": "29500" if names else arguments[0],
                "GLOO_SOCKET_IFNAME": "eth0" if names else "lo",
            }
            command = [*inside, sys.executable, str(SCRIPT), "--work", f"{folder}/{rank}.json", *arguments[1:]]
            started.append(subprocess.Popen(command, env={**os.environ, **own}))
        try:
            ends = [process.wait(SECONDS) for process in started]
        finally:
            for process in started:
                process.kill()
        if any(ends):
            raise RuntimeError(f"the two processes ended with {ends}")
        return [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(2)]


def work(path: Path, cases: list[str]) -> None:
    """One of the two machines: bytes and seconds of each case, and how far the weights are from one process's."""
    sys.path.insert(0, str(SCRIPT.parent))
    import torch
    from _scaling_cases import CASES as MADE
    from _scaling_exchanges import Size
    from scaling import train

    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    for name in cases:
        size = Size(*SHAPES[name], 2)
        bare, with_it = (train(size, "step", made, nodes=2) for made in ([], [MADE[name].make(size)]))
        found[name] = {"bare": bare, "with": with_it, "weights": outcome(size, name, int(os.environ["NODE_RANK"]))}
    path.write_text(json.dumps(found))
    sys.stdout.flush()
    os._exit(0)  # the interpreter's own end may meet a thread of gloo


def outcome(size: Any, name: str, rank: int | None) -> list[float]:
    """A number that depends on all entries, for each layer, after a training on the rows of a rank, or of all."""
    sys.path.insert(0, str(SCRIPT.parent))
    import torch
    from _scaling_cases import CASES as MADE
    from scaling import fit

    shape = STEPS, 2, size.rows, size.width
    rows = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    mine = rows.flatten(1, 2) if rank is None else rows[:, rank]
    module = fit(size, [MADE[name].make(size)], [(batch,) for batch in mine], nodes=1 if rank is None else 2)
    weights = [parameter.detach().double() for parameter in module.parameters()]
    return [float((weight * torch.arange(weight.numel()).view_as(weight).cos()).sum()) for weight in weights]


def measure(rates: list[int], cases: list[str]) -> dict[str, Any]:
    from _report import describe_machine

    found = {}
    for rate in rates:
        with machines(rate) as names:
            found[str(rate)] = train_on(names, ["", *cases])
    return {"about": describe_machine("cpu"), "rates": found}


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--without-link", action="store_true")
    parser.add_argument("--rates", type=int, nargs="+", default=list(RATES), metavar="MBIT")
    parser.add_argument("--store", type=Path, default=STORE)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("cases", nargs="*", choices=[*CASES, []])
    arguments = parser.parse_args()
    if arguments.work is not None:
        work(arguments.work, arguments.cases)
    elif arguments.without_link:
        print(json.dumps(train_on((), [free_port(), *(arguments.cases or CASES)])))
    elif reason := obstacle():
        parser.error(f"two machines cannot be made here: {reason}; pass `--without-link` for the loopback")
    else:
        arguments.store.write_text(json.dumps(measure(arguments.rates, arguments.cases or [*CASES]), indent=1) + "\n")


if __name__ == "__main__":
    main()
