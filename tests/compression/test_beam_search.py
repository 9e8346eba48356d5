import itertools
import json
import math
import os
import random
import signal
import sys
from copy import deepcopy
from dataclasses import fields

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_plugins.compression import BeamOptions, beam_search, factorize, layer_costs, rich_progress, score_ranks
from tests._processes import START, run_on_ranks


class Net(nn.Module):
    """A residual branch with work in place, a shared layer, and dropout that evaluation switches off."""

    def __init__(self, width=8, classes=4):
        super().__init__()
        self.stem = nn.Linear(6, width)
        self.one, self.two = nn.Linear(width, width), nn.Linear(width, width)
        self.norm, self.act, self.drop = nn.BatchNorm1d(width), nn.ReLU(inplace=True), nn.Dropout(0.5)
        self.head = nn.Linear(width, classes)

    def forward(self, x):
        x = self.act(self.stem(x))
        y = self.norm(self.one(x))
        y += self.two(x)
        return self.head(self.drop(self.two(self.act(y))))


def make_net(seed=0, **sizes):
    torch.manual_seed(seed)
    net = Net(**sizes).double()
    for layer in (net.stem, net.one, net.two, net.head):  # strong weights, so that the classes are about as frequent
        nn.init.normal_(layer.weight)
        nn.init.zeros_(layer.bias)
    return net


def make_batches(net, count=5, seed=1):
    """Rows with the labels that the network itself gives most of them; the last batch is smaller."""
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randn(4 if index == count - 1 else 9, 6, generator=generator).double() for index in range(count)]
    net.eval()
    with torch.no_grad():
        labels = [torch.where(torch.rand(len(x), generator=generator) < 0.9, net(x).argmax(1), 0) for x in rows]
    net.train()
    return list(zip(rows, labels, strict=True))


def hits(net, batch):
    x, y = batch
    return (net(x).argmax(1) == y).sum(), len(y)


def likelihood(net, batch):
    return -nn.functional.cross_entropy(net(batch[0]), batch[1])


def naive_search(net, batches, score, budget, width, steps):
    """Every child on a copy of its own, with decompositions of its own and all batches."""
    costs = layer_costs(net)
    dense = sum(cost.dense for cost in costs.values())

    def decomposed(name):
        return torch.linalg.svd(net.get_submodule(name).weight.detach(), full_matrices=False)

    def share(ranks):
        return sum(cost.at(rank) for cost, rank in zip(costs.values(), ranks, strict=True)) / dense

    def evaluate(ranks):
        copy = deepcopy(net).eval()
        for name, rank in zip(costs, ranks, strict=True):
            U, S, Vh = decomposed(name)
            copy.get_submodule(name).weight.data = (U[:, :rank] * S[:rank]) @ Vh[:rank]
        with torch.no_grad():
            values = [value if isinstance(value := score(copy, batch), tuple) else (value, 1) for batch in batches]
        return sum(float(total) for total, _ in values) / sum(int(count) for _, count in values)

    def order(one):
        energies = [decomposed(name)[1].square() for name in costs]
        lost = math.fsum(float(e[rank:].sum() / e.sum()) for e, rank in zip(energies, one[0], strict=True))
        return -one[1], round(lost, 12), one[0]

    start = tuple(cost.break_even for cost in costs.values())
    beam, finished, beams = [(start, evaluate(start))], {}, []
    while beam:
        beams.append(beam)
        children = set()
        for parent, _ in beam:
            for layer, rank in enumerate(parent):
                for lower in range(rank - 1, max(rank - steps[layer], 1) - 1, -1):  # smallest step that reaches it
                    child = (*parent[:layer], lower, *parent[layer + 1 :])
                    if share(child) <= budget or lower == max(rank - steps[layer], 1):
                        children.add(child)
                        break
        scored = {child: evaluate(child) for child in children}
        finished |= {child: score for child, score in scored.items() if share(child) <= budget}
        beam = sorted(((c, s) for c, s in scored.items() if share(c) > budget), key=order)[:width]
    ranks, best = min(finished.items(), key=order)
    return dict(zip(costs, ranks, strict=True)), best, share(ranks), beams


@pytest.mark.parametrize("width", [1, 3])
@pytest.mark.parametrize(
    ("score", "bounds"),
    [(hits, None), (hits, (0, 1)), (likelihood, None), (likelihood, (-90.0, 0))],
    ids=["accuracy", "bounded accuracy", "likelihood", "bounded likelihood"],
)
@pytest.mark.parametrize("seed", [0, 1])
def test_finds_what_the_naive_search_finds(score, bounds, width, seed):
    net = make_net(seed)
    batches = make_batches(net)
    found = beam_search(net, batches, score, budget=0.4, options=BeamOptions(width=width, step=1, bounds=bounds))
    ranks, best, share, beams = naive_search(net, batches, score, 0.4, width, steps=[1] * 4)
    assert found.ranks == ranks
    assert found.score == best
    assert found.share == share
    assert [[tuple(one) for one in level.beam] for level in found.trace[:-1]] == beams
    assert found.trace[-1].beam == ()


def test_steps_may_be_large_and_measured_in_cost():
    net = make_net(width=16)
    batches = make_batches(net)
    steps = [max(1, round(0.1 * 704 / cost.per_rank)) for cost in layer_costs(net).values()]
    assert steps == [3, 2, 2, 4]
    found = beam_search(net, batches, likelihood, budget=0.3, options=BeamOptions(width=2, step=0.1))
    ranks, best, share, _ = naive_search(net, batches, likelihood, 0.3, 2, steps)
    assert (found.ranks, found.score, found.share) == (ranks, best, share)


def test_giving_children_up_saves_batches_and_changes_nothing():
    net = make_net(width=12)
    batches = make_batches(net, count=20)
    calls = []

    def counting(net, batch):
        calls.append(1)
        return hits(net, batch)

    whole = beam_search(net, batches, counting, budget=0.4, options=BeamOptions(step=1, width=2))
    all_calls = len(calls)
    calls.clear()
    raced = beam_search(net, batches, counting, budget=0.4, options=BeamOptions(step=1, width=2, bounds=(0, 1)))
    assert raced[:4] == whole[:4]
    assert sum(level.abandoned for level in raced.trace) > 0.2 * raced.evaluations
    assert len(calls) < 0.8 * all_calls
    assert all_calls == 20 * whole.evaluations


def test_no_rank_vector_is_scored_twice():
    net = make_net()
    batches = make_batches(net, count=1)
    seen = []

    def remember(net, batch):
        seen.append(tuple(layer.weight.clone() for layer in (net.stem, net.one, net.two, net.head)))
        return hits(net, batch)

    found = beam_search(net, batches, remember, budget=0.3, options=BeamOptions(step=1, width=6))
    distinct = {tuple(weight.numpy().tobytes() for weight in weights) for weights in seen}
    assert len(distinct) == found.evaluations == len(seen)
    assert found.evaluations < 0.8 * sum(4 * len(level.beam) for level in found.trace)  # two orders of two steps


def test_one_decomposition_per_layer(monkeypatch):
    net = make_net()
    batches = make_batches(net)
    real, calls = torch.linalg.svd, []
    monkeypatch.setattr(torch.linalg, "svd", lambda *a, **k: calls.append(1) or real(*a, **k))
    beam_search(net, batches, hits, budget=0.4, options=BeamOptions(step=1))
    assert len(calls) == 4


def test_activations_are_reused_and_need_not_be():
    net = make_net()
    batches = make_batches(net)
    counts = {"stem": 0, "head": 0}
    real = nn.functional.linear

    def linear(x, weight, bias=None):
        owner = next((name for name in counts if net.get_submodule(name).bias is bias), None)
        if owner:
            counts[owner] += 1
        return real(x, weight, bias)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.functional, "linear", linear)
        with_reuse = beam_search(net, batches, hits, budget=0.4, options=BeamOptions(step=1))
        assert counts["head"] == 5 * with_reuse.evaluations
        assert counts["stem"] < 0.6 * counts["head"]
        counts.update(stem=0, head=0)
        without = beam_search(net, batches, hits, budget=0.4, options=BeamOptions(step=1, reuse_activations=False))
        assert counts["stem"] == counts["head"] == 5 * without.evaluations
    assert with_reuse == without


def test_the_network_and_the_generators_are_left_as_they_were():
    net = make_net()
    net.one.eval()
    loader = DataLoader(TensorDataset(*map(torch.cat, zip(*make_batches(net), strict=True))), 8)
    net.one.eval()
    pointers = {name: p.data_ptr() for name, p in net.named_parameters()}
    before, modes = deepcopy(net.state_dict()), [module.training for module in net.modules()]
    assert len(set(modes)) == 2
    attributes = {name: set(vars(module)) for name, module in net.named_modules()}
    for stop in (None, ValueError, KeyboardInterrupt):
        calls = itertools.count()

        def score(net, batch, stop=stop, calls=calls):
            if stop is not None and next(calls) == 30:
                raise stop("in the middle")
            return hits(net, batch)

        random.seed(0)
        torch.manual_seed(3)
        state = torch.get_rng_state()
        if stop is None:
            beam_search(net, loader, score, budget=0.4, options=BeamOptions(step=1))
        else:
            with pytest.raises(stop, match="in the middle"):
                beam_search(net, loader, score, budget=0.4, options=BeamOptions(step=1))
        assert torch.equal(torch.get_rng_state(), state)
        assert [module.training for module in net.modules()] == modes
        assert {name: p.data_ptr() for name, p in net.named_parameters()} == pointers
        assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
        assert {name: set(vars(module)) for name, module in net.named_modules()} == attributes


@settings(max_examples=15, deadline=None)
@given(
    budget=st.floats(0.28, 0.95),
    width=st.integers(1, 3),
    step=st.one_of(st.integers(1, 4), st.floats(0.01, 0.3)),
    seed=st.integers(0, 9),
)
def test_delivered_ranks_meet_the_budget_by_as_little_as_they_can(budget, width, step, seed):
    net = make_net(seed)
    found = beam_search(
        net, make_batches(net, count=1), hits, budget=budget, options=BeamOptions(width=width, step=step)
    )
    costs = layer_costs(net)
    dense = sum(cost.dense for cost in costs.values())

    def share(ranks):
        return sum(cost.at(ranks[name]) for name, cost in costs.items()) / dense

    assert found.share == share(found.ranks) <= budget
    start = {name: cost.break_even for name, cost in costs.items()}
    if found.ranks != start:  # one rank more in the layer that was lowered last would be too much
        raised = [{**found.ranks, name: rank + 1} for name, rank in found.ranks.items() if rank < start[name]]
        assert any(share(ranks) > budget for ranks in raised)
    shares = [share(dict(zip(costs, one.ranks, strict=True))) for level in found.trace for one in level.beam[:1]]
    assert shares == sorted(shares, reverse=True)
    assert all(1 <= rank <= start[name] for name, rank in found.ranks.items())


@pytest.mark.parametrize("seed", range(4))
def test_a_beam_of_full_width_is_exhaustive(seed):
    net = nn.Sequential(nn.Linear(7, 8), nn.Tanh(), nn.Linear(8, 7), nn.Tanh(), nn.Linear(7, 6)).double()
    torch.manual_seed(seed)
    for layer in net[::2]:
        nn.init.normal_(layer.weight)
    batches = [(x, net(x).argmax(1)) for x in torch.randn(2, 20, 7).double()]
    costs = layer_costs(net)
    start = [cost.break_even for cost in costs.values()]
    dense = sum(cost.dense for cost in costs.values())

    def meets(ranks):
        return sum(c.at(r) for c, r in zip(costs.values(), ranks, strict=True)) / dense <= 0.6

    reached = [
        ranks
        for ranks in itertools.product(*(range(1, rank + 1) for rank in start))
        if meets(ranks)
        and any(not meets((*ranks[:i], ranks[i] + 1, *ranks[i + 1 :])) for i in range(3) if ranks[i] < start[i])
    ]
    best = max(score_ranks(net, dict(zip(costs, ranks, strict=True)), batches, likelihood) for ranks in reached)
    found = beam_search(net, batches, likelihood, budget=0.6, options=BeamOptions(step=1, width=1000))
    assert len(reached) > 3
    assert found.score == best


def test_the_factorised_network_scores_what_was_promised():
    net = make_net(width=16)
    batches = make_batches(net)
    found = beam_search(net, batches, hits, budget=0.5)
    assert score_ranks(net, found.ranks, batches, hits) == found.score
    before = sum(layer.weight.numel() for layer in (net.stem, net.one, net.two, net.head))
    factorize(net, found.ranks).eval()
    after = sum(p.numel() for name, p in net.named_parameters() if name.endswith("weight") and "norm" not in name)
    assert after / before == pytest.approx(found.share)
    with torch.no_grad():
        assert sum(int(hits(net, batch)[0]) for batch in batches) / 40 == found.score


def test_a_budget_that_break_even_ranks_meet_ends_at_once():
    net = make_net()
    found = beam_search(net, make_batches(net), hits, budget=0.99)
    assert found.ranks == {name: cost.break_even for name, cost in layer_costs(net).items()}
    assert [level.number for level in found.trace] == [0]


def test_layers_that_cannot_become_cheaper_stay_dense():
    net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1)).double()
    batches = [torch.randn(5, 6).double()]
    found = beam_search(net, batches, lambda net, x: -net(x).square().mean(), budget=0.7)
    assert found.ranks["1" if "1" in found.ranks else "2"] == 1  # its full rank
    assert found.share <= 0.7


def test_flops_are_a_cost():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(2, 8, 3), nn.ReLU(inplace=True), nn.Conv2d(8, 8, 3, stride=2), nn.Flatten(), nn.Linear(32, 8)
    )
    batches = [torch.randn(4, 2, 7, 7)]

    def score(net, x):
        return -net(x).square().mean()

    found = beam_search(net, batches, score, budget=0.5, cost="flops", inputs=batches[0], options=BeamOptions(step=1))
    costs = layer_costs(net, cost="flops", inputs=batches[0])
    dense = sum(cost.dense for cost in costs.values())
    assert found.share == sum(cost.at(found.ranks[name]) for name, cost in costs.items()) / dense <= 0.5
    second = beam_search(net, batches, score, budget=0.5, layers=["0", "2"], scheme=2, options=BeamOptions(step=0.05))
    assert set(second.ranks) == {"0", "2"}


def test_a_batch_with_a_number_for_a_score_counts_like_any_other():
    net = make_net()
    batches = make_batches(net)
    found = beam_search(
        net, batches, lambda net, batch: float(likelihood(net, batch)), budget=0.7, options=BeamOptions(step=2)
    )
    assert found == beam_search(net, batches, likelihood, budget=0.7, options=BeamOptions(step=2))


def test_progress_is_told_of_every_level():
    net = make_net()
    levels = []
    found = beam_search(net, make_batches(net), hits, budget=0.4, options=BeamOptions(step=1, progress=levels.append))
    assert tuple(levels) == found.trace
    assert [level.number for level in levels] == list(range(len(levels)))
    assert levels[-1].score == found.score


def test_rich_draws_a_bar(capsys):
    net = make_net()
    with rich_progress() as progress:
        beam_search(net, make_batches(net), hits, budget=0.4, options=BeamOptions(step=1, progress=progress))
    assert "budget 0.400, score" in capsys.readouterr().out


def test_rich_is_asked_for(monkeypatch):
    monkeypatch.setitem(sys.modules, "rich.progress", None)
    with pytest.raises(ImportError, match=r"lightning-plugins\[cli\]"), rich_progress():
        pass


def test_a_stopped_search_goes_on_where_it_was(tmp_path):
    net = make_net()
    batches = make_batches(net)
    settings = {"step": 1, "width": 3, "bounds": (0, 1)}
    whole = beam_search(net, batches, hits, budget=0.4, options=BeamOptions(**settings))
    file = tmp_path / "new" / "search.json"
    for stop in (0, 2, 3, len(whole.trace) - 2):  # levels after which the search is stopped

        def interrupt(level, stop=stop):
            if level.number == stop:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            beam_search(
                net, batches, hits, budget=0.4, options=BeamOptions(**settings, state_file=file, progress=interrupt)
            )
        assert json.loads(file.read_text())["levels"][-1]["number"] == stop
    new = []
    options = BeamOptions(**settings, state_file=file, progress=new.append)
    assert beam_search(net, batches, hits, budget=0.4, options=options) == whole
    assert [level.number for level in new] == [len(whole.trace) - 1]
    assert [path.name for path in file.parent.iterdir()] == ["search.json"]

    def never(net, batch):
        raise AssertionError

    options = BeamOptions(**settings, state_file=str(file))
    assert beam_search(net, batches, never, budget=0.4, options=options) == whole  # it is all there


def test_a_file_with_removed_fractions_is_read(tmp_path):
    """As older versions wrote it."""
    net = make_net()
    settings = {"step": 1, "width": 3, "bounds": (0, 1)}
    file, levels = tmp_path / "search.json", []
    whole = beam_search(net, make_batches(net), hits, budget=0.4, options=BeamOptions(**settings, state_file=file))
    content = json.loads(file.read_text())
    content["format"] = 1
    del content["search"]["budget"]
    content["search"]["ratio"] = 0.6
    for level in content["levels"]:
        del level["budget"]
        level["target"], level["ratio"] = 0.6, 1 - level.pop("share")
    file.write_text(json.dumps(content))
    options = BeamOptions(**settings, state_file=file, progress=levels.append)
    found = beam_search(net, make_batches(net), hits, budget=0.4, options=options)
    assert (found.ranks, found.score, found.evaluations, levels) == (whole.ranks, whole.score, whole.evaluations, [])
    for one, other in zip(found.trace, whole.trace, strict=True):
        assert one._replace(share=other.share) == other
        assert one.share == pytest.approx(other.share)


def _search_until_killed(file):
    def fatal(net, batch):
        if file.exists() and len(json.loads(file.read_text())["levels"]) > 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return hits(net, batch)

    net = make_net()
    beam_search(
        net, make_batches(net), fatal, budget=0.4, options=BeamOptions(step=1, width=3, bounds=(0, 1), state_file=file)
    )


def test_a_killed_search_goes_on_where_it_was(tmp_path):
    file = tmp_path / "search.json"
    process = START.Process(target=_search_until_killed, args=(file,))
    process.start()
    process.join(timeout=120)
    assert process.exitcode == -signal.SIGKILL
    net = make_net()
    batches = make_batches(net)
    levels = []
    found = beam_search(
        net,
        batches,
        hits,
        budget=0.4,
        options=BeamOptions(step=1, width=3, bounds=(0, 1), state_file=file, progress=levels.append),
    )
    assert found == beam_search(net, batches, hits, budget=0.4, options=BeamOptions(step=1, width=3, bounds=(0, 1)))
    assert 0 < len(levels) < len(found.trace) - 2


def _on_a_rank(rank, folder):
    results = []
    for width, score, bounds in ((3, hits, (0, 1)), (2, likelihood, None)):
        net = make_net()
        batches = make_batches(net)
        calls = []

        def counting(net, batch, score=score, calls=calls):
            calls.append(1)
            return score(net, batch)

        file = f"{folder}/{score.__name__}.json"
        options = BeamOptions(step=1, width=width, bounds=bounds, state_file=file)
        found = beam_search(net, batches, counting, budget=0.4, options=options)
        again = beam_search(net, batches, counting, budget=0.4, options=options)
        results.append((found, again == found, len(calls)))
    net = make_net()
    batches = make_batches(net, seed=1 + rank)
    message = ""
    try:
        beam_search(net, batches, hits, budget=0.4)
    except ValueError as error:
        message = str(error)
    return results, message, dist.get_world_size()


@pytest.mark.distributed
def test_two_processes_share_the_children_and_find_the_same(tmp_path):
    (first, message, _), (second, other, _) = run_on_ranks(_on_a_rank, 2, tmp_path, str(tmp_path))
    net = make_net()
    batches = make_batches(net)
    one = beam_search(net, batches, hits, budget=0.4, options=BeamOptions(step=1, width=3, bounds=(0, 1)))
    two = beam_search(net, batches, likelihood, budget=0.4, options=BeamOptions(step=1, width=2))
    for results in (first, second):
        assert results[0][0][:4] == one[:4]  # what is given up depends on who scores it
        assert results[1][0] == two
        assert all(same for _, same, _ in results)
    calls = [results[1][2] for results in (first, second)]
    assert max(calls) < 0.75 * 5 * two.evaluations
    assert "`batches` must be the same on every process" in message
    assert "`batches` must be the same on every process" in other


class Fewer:
    """Loses a batch at every pass."""

    def __init__(self, batches):
        self.batches = list(batches)

    def __iter__(self):
        yield from self.batches
        self.batches.pop()


NET = make_net()
BATCHES = make_batches(NET)


def searched(**given):
    """Search, with options among the arguments."""
    own = {field.name: given.pop(field.name) for field in fields(BeamOptions) if field.name in given}
    return beam_search(**{"options": BeamOptions(**own), **given})


GOOD = {"model": NET, "batches": BATCHES, "score": hits, "budget": 0.5}
POISONED = make_net()
POISONED.two.weight.data[0, 0] = torch.nan
UNCALLED = make_net()
UNCALLED.spare = nn.Linear(9, 9).double()
BAD = {
    "no model": ({"model": lambda x: x}, TypeError, "`model` must be a torch.nn.Module, got function"),
    "budget is text": ({"budget": "half"}, TypeError, "`budget` must be a number"),
    "budget is percent": ({"budget": 60}, ValueError, r"`budget` must be in \[0, 1\], got 60; did you mean 0.6"),
    "budget 0": ({"budget": 0}, ValueError, "`budget` must be more than 0 and less than 1, got 0"),
    "budget 1": ({"budget": 1.0}, ValueError, "`budget` must be more than 0"),
    "budget NaN": ({"budget": math.nan}, ValueError, "`budget` must be in"),
    "impossible": ({"budget": 0.1}, ValueError, "`budget` must be at least 0.278846 for these 4 layers, .* got 0.1"),
    "no such layer": ({"layers": "heads"}, ValueError, "did you mean 'head'"),
    "a layer without matrix": ({"layers": "norm"}, ValueError, "'norm' must be a layer that can be split"),
    "unknown cost": ({"cost": "flop"}, ValueError, "did you mean 'flops'"),
    "flops of nothing": ({"cost": "flops"}, (ValueError, TypeError), "`inputs`"),
    "options are a dict": (
        {"options": {}},
        TypeError,
        r"`options` must be a BeamOptions, such as BeamOptions\(width=4",
    ),
    "width 0": ({"width": 0}, ValueError, "`width` must be at least 1, got 0"),
    "half a width": ({"width": 2.0}, TypeError, "`width` must be an int"),
    "step 0": ({"step": 0}, ValueError, "`step` must be at least 1, got 0"),
    "step 0.0": ({"step": 0.0}, ValueError, r"`step` must be a fraction of the cost in \(0, 1\), or an int"),
    "step 3.0": ({"step": 3.0}, ValueError, "did you mean 3"),
    "step is text": ({"step": "3"}, TypeError, "`step` must be an int"),
    "score is no function": ({"score": 0.5}, TypeError, r"`score` must be callable, got 0.5 \(float\)"),
    "progress is no function": ({"progress": True}, TypeError, r"`progress` must be callable, got True \(bool\)"),
    "batches is a number": ({"batches": 3}, TypeError, "`batches` must be a DataLoader"),
    "no batches": ({"batches": []}, ValueError, "`batches` must give at least one batch, got none"),
    "generator": ({"batches": (b for b in BATCHES)}, ValueError, "got a generator, which is exhausted .* pass a list"),
    "shuffled": ({"batches": DataLoader([1, 2], shuffle=True)}, ValueError, "shuffles; set `shuffle=False`"),
    "fewer batches": (
        {"batches": Fewer(BATCHES)},
        ValueError,
        "at every pass, got 4 after 5 at the first",
    ),
    "score of several": ({"score": lambda n, b: torch.ones(3)}, ValueError, r"one number per batch.*\(3,\)"),
    "score of three": ({"score": lambda n, b: (1, 2, 3)}, ValueError, r"pair \(sum, count\), got a tuple of 3"),
    "score is text": ({"score": lambda n, b: "good"}, TypeError, "must return a number.* got str"),
    "score is None": ({"score": lambda n, b: None}, TypeError, "must return a number.* got NoneType"),
    "nothing counted": ({"score": lambda n, b: (n(b[0]).sum(), 0)}, ValueError, "must count something"),
    "NaN score": ({"score": lambda n, b: n(b[0]).sum() * math.nan}, ValueError, "`score` must be finite, got nan"),
    "one bound": ({"bounds": 1}, TypeError, "`bounds` must be the least and the largest score"),
    "bounds upside down": ({"bounds": (1, 0)}, ValueError, r"`bounds` must be .* got \(1, 0\)"),
    "bounds too narrow": ({"bounds": (0, 0.1)}, ValueError, "`bounds` must hold every score"),
    "poisoned weight": ({"model": POISONED}, ValueError, "weight of 'two' must be finite"),
    "uncalled": ({"model": UNCALLED}, ValueError, "'spare' must be called when `score` runs the model"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_are_named(case):
    change, error, message = BAD[case]
    with pytest.raises(error, match=message):
        searched(**{"step": 1, **GOOD, **change})


def test_a_count_that_depends_on_the_network_has_no_bounds():
    counts = itertools.count(1)
    with pytest.raises(ValueError, match="must count the same for every network"):
        beam_search(
            NET, BATCHES, lambda n, b: (n(b[0]).sum() * 0, next(counts)), budget=0.5, options=BeamOptions(bounds=(0, 1))
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"budget": 0.45}, "its budget is another; delete it"),
        ({"width": 2, "step": 2}, "its width, steps are another"),
        ({"model": make_net(5)}, "its weights is another"),
    ],
    ids=["budget", "width and step", "weights"],
)
def test_a_file_of_another_search_is_refused(change, message, tmp_path):
    file = tmp_path / "search.json"
    beam_search(**GOOD, options=BeamOptions(step=1, state_file=file))
    with pytest.raises(ValueError, match=message):
        searched(**{"step": 1, **GOOD, **change, "state_file": file})


@pytest.mark.parametrize("text", ["{", "[]", '{"format": 9}', "\x00\xff"])
def test_a_file_that_is_no_search_is_refused(text, tmp_path):
    file = tmp_path / "search.json"
    file.write_text(text)
    with pytest.raises(ValueError, match=r"`state_file`: .*search.json' must be"):
        beam_search(**GOOD, options=BeamOptions(state_file=file))
