"""Write the page of the measurements of `scaling.py`."""

import statistics
from collections.abc import Iterator
from typing import Any, NamedTuple

from _report import markdown_table
from _scaling_cases import CASES, REST
from _scaling_exchanges import HEADER, PLAIN, SINGLE, Exchange, Size
from two_machines import RATES, SHAPES, link

EXTRAPOLATED = (8, 64, 1024)
FAR = (32, 512, 4)  # rows, width and layers of what is extrapolated
RATE = 10e9 / 8  # bytes per second of the network that is assumed
LATENCY = 20e-6  # seconds of a message on it


class Counted(NamedTuple):
    """A measured and an expected number of bytes."""

    case: str
    size: Size
    counted: float
    payload: float
    headers: float

    @property
    def ratio(self) -> float:
        return self.counted / (self.payload + self.headers)


def compared(report: dict[str, Any]) -> Iterator[Counted]:
    """Every measurement over two processes or more, in the order of the cases."""
    for name, case in CASES.items():
        for found in report.values():
            for line in found["measured"]:
                size = Size(**line["size"])
                if line["case"] == name and size.processes > 1:
                    exchanges, ranks = case.exchanges(size), size.processes
                    payload = sum(exchange.received(ranks) for exchange in exchanges)
                    yield Counted(name, size, line["bytes"], payload, sum(one.headers(ranks) for one in exchanges))


def page(report: dict[str, Any], linked: dict[str, Any]) -> str:
    """The page, from the JSON of this script and of `two_machines.py`."""
    counted = list(compared(report))
    rows = [
        (
            line.case,
            *map(str, (line.size.rows, line.size.width, line.size.depth, line.size.processes)),
            *map(kilobytes, (line.counted, line.payload, line.headers)),
            f"{line.ratio:.3f}",
        )
        for line in counted
    ]
    header = ("callback", "rows", "width", "layers", "processes", "counted, kB", "on paper, kB", "headers, kB", "ratio")
    machines = "\n".join(
        f"- {count} process{'es' * (count != '1')}: {found['about']}" for count, found in report.items()
    )
    return PAGE.format(
        machines=machines,
        counted=markdown_table(header, rows),
        worst=f"{100 * max((abs(line.ratio - 1) for line in counted), default=0.0):.0f}",
        wall=times(report, "wall"),
        processor=times(report, "processor"),
        far=far(),
        link="\n".join(link(RATES[0])),
        linked_on=linked["about"],
        linked=linked_table(linked["rates"]),
        exchanges="\n".join(
            f"- **{name}**, each {case.unit}. {case.exchanges.__doc__}" for name, case in CASES.items()
        ),
        rest="\n".join(f"- {name}: {text}." for name, text in REST.items()),
        plain=plain_table(report),
        header=HEADER,
        rate=f"{RATE * 8 / 1e9:.0f}",
        latency=f"{LATENCY * 1e6:.0f}",
        sizes=f"{FAR[0]} rows on each process, {FAR[2]} layers of width {FAR[1]}",
    )


def times(report: dict[str, Any], of: str) -> str:
    """Milliseconds that a callback adds to a step."""
    found: dict[tuple[Any, ...], dict[str, str]] = {}
    for processes, part in report.items():
        for line in part["measured"]:
            size = line["size"]
            if CASES[line["case"]].unit == "step":
                key = line["case"], size["rows"], size["width"], size["depth"]
                beside = f" ({1e3 * line['step']:.1f})" if of == "wall" else ""
                found.setdefault(key, {})[processes] = f"{1e3 * line[of]:.1f}{beside}"
    rows = [
        (name, *map(str, key[1:]), *(cells[count] for count in report))
        for name in CASES
        for key, cells in found.items()
        if key[0] == name
    ]
    columns = (f"{count} process{'es' * (count != '1')}, ms" for count in report)
    return markdown_table(("callback", "rows", "width", "layers", *columns), rows)


def plain_table(report: dict[str, Any]) -> str:
    """Exchanges without callbacks: counted, and on paper with their headers."""
    rows = []
    for count, found in report.items():
        ranks = int(count)
        for name, counted in found["plain"].items() if ranks > 1 else ():
            one = Exchange(*PLAIN[name], SINGLE)
            rows.append((name, count, f"{counted:,.0f}", f"{one.received(ranks) + one.headers(ranks):,.0f}"))
    return markdown_table(("float32 numbers of each process", "processes", "counted, bytes", "on paper, bytes"), rows)


def linked_table(rates: dict[str, list[dict[str, Any]]]) -> str:
    """Bytes and time over a link of a limited rate; means over both machines."""
    rows = []
    for rate, found in rates.items():
        for name in found[0]:
            parts = {
                key: [statistics.fmean(one[name][of][key] for one in found) for of in ("bare", "with")]
                for key in ("bytes", "wall", "processor")
            }
            added = {key: pair[1] - pair[0] for key, pair in parts.items()}
            exchanges = CASES[name].exchanges(Size(*SHAPES[name], 2))
            paper = sum(one.received(2) + one.headers(2) for one in exchanges)
            rows.append(
                (
                    name,
                    rate,
                    *(f"{number / 1e3:,.0f}" for number in (added["bytes"], paper)),
                    f"{1e3 * paper * 8 / (float(rate) * 1e6):.0f}",
                    *(f"{1e3 * number:.0f}" for number in (added["wall"], added["processor"], parts["wall"][0])),
                )
            )
    ends = ("by rate, ms", "measured, ms", "of the processor, ms", "step without, ms")
    return markdown_table(("callback", "Mbit/s", "counted, kB", "on paper, kB", *ends), rows)


def far() -> str:
    """Megabytes, and the least time on a network, from the count on paper."""
    rows = []
    for name, case in CASES.items():
        found = {ranks: case.exchanges(Size(*FAR, ranks)) for ranks in EXTRAPOLATED}
        bytes_ = {ranks: sum(one.received(ranks) for one in exchanges) for ranks, exchanges in found.items()}
        last = EXTRAPOLATED[-1]
        messages = sum(one.count * messages_of(one, last) for one in found[last])
        rows.append(
            (
                name,
                case.unit,
                *(f"{bytes_[ranks] / 1e6:,.3f}" for ranks in EXTRAPOLATED),
                f"{1e3 * bytes_[last] / RATE:,.1f}",
                f"{1e3 * messages * LATENCY:,.1f}",
            )
        )
    columns = (f"{ranks} processes, MB" for ranks in EXTRAPOLATED)
    ends = (f"{EXTRAPOLATED[-1]}: by rate, ms", "by latency, ms")
    return markdown_table(("callback", "each", *columns, *ends), rows)


def messages_of(exchange: Exchange, processes: int) -> int:
    """Sequential messages: rings go round once or twice, a send to all uses a tree."""
    rounds = {"reduce": 2 * (processes - 1), "gather": processes - 1, "send": (processes - 1).bit_length()}
    return rounds[exchange.kind]


def kilobytes(value: float) -> str:
    return f"{value / 1e3:,.2f}"


PAGE = """# Communication cost of the callbacks

<!-- written by `benchmarks/scaling.py`; do not edit -->

The number of bytes a process receives because of a callback, in addition to the data-parallel exchange for the same
model: on paper, counted, and extrapolated. Counted by the kernel for gloo's TCP connections between processes on one
machine; means over the processes.

{machines}

## On paper

There are three operations, assumed to use the algorithms that move the fewest bytes: for a tensor of `b` bytes, a
process receives `2 b (W - 1) / W` bytes if it is *summed* over `W` processes (a ring, twice round), `b (W - 1)` if it
is *gathered*, and `b` on all processes but one if it is *sent* to all, so `b (W - 1) / W` on average. Numbers are
float32 unless stated otherwise, integers have 8 bytes.

{exchanges}

Not measured:

{rest}

In addition gloo sends headers, {header} bytes per message: it splits the blocks of rings in two, so a sum takes
`4 (W - 1)` messages (fewer if there are fewer numbers than pieces), a gather `2 (W - 1)`, a send one.

{plain}

## Counted

*Headers* are those of all exchanges; *ratio* is the counted number over the sum of both. The largest deviation is
{worst} %.

{counted}

## Times

Milliseconds that the callback adds to a training step in wall-clock time: the fastest of nine steps, and in brackets
the fastest step without it. **The machine has two cores, shared with other work.** With 4 and 8 processes several share
a core, so these columns say nothing about a network, and differences of a few milliseconds are noise.

{wall}

In CPU time: the mean over nine steps and over the processes. The decompositions of weights are divided among the
processes, so `SpectrumMonitor` and `LowRankCompression` cost each process less the more there are; terms of rows are
computed on all processes, over more rows, with more messages.

{processor}

## Two emulated machines

Two network namespaces, each with its own addresses, joined by a link whose rate is limited in both directions, and one
process in each: `Trainer(num_nodes=2, devices=1, strategy="ddp")`, which finds the other machine through `MASTER_ADDR`.
Measured by `python benchmarks/two_machines.py` (root, and `ip` and `tc` of iproute2): {linked_on}.

*By rate* is the time that the bytes on paper take at the link's rate, *measured* is the time the callback adds to the
fastest of nine steps, followed by the CPU time it adds. **Two cores served both machines and much other work**, and a
sixth of a second of CPU time took a second of wall-clock time: the bytes are exact, but the times only show that it
works, not what a link costs. Latency is not limited here.

{linked}

To reproduce it with your own script that trains with `num_nodes=2`:

```bash
{link}
export MASTER_ADDR=10.77.0.1 MASTER_PORT=29500 GLOO_SOCKET_IFNAME=eth0
NODE_RANK=0 ip netns exec left python train.py &
NODE_RANK=1 ip netns exec right python train.py
ip netns delete left
ip netns delete right
```

## Extrapolated

From the count on paper, for {sizes}. Assumptions:

- the algorithms stay the same: flat rings and trees over all processes, not following the levels of a network;
- all processes have the same number of rows; headers are not included;
- *by rate* is the time for the bytes at {rate} Gbit/s, *by latency* the time for the sequential messages at
  {latency} microseconds each. Neither is measured, nothing overlaps, and computation is not included.

The number of bytes a process receives is bounded, whatever the number of processes, if matrices are summed (`2 b`) or
sent (`b`); `VNERegularization` gathers rows only as long as that is less. It grows with the number of processes if
matrices are gathered (`RepresentationMonitor`, `LayerProbe`), and for the other terms of rows and for queues, whose
rows every process needs. A ring's latency always grows with the number of processes.

{far}
"""
