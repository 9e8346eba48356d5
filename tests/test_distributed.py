"""Exchanges between ranks give what one process would compute, and nothing changes without a process group."""

import math
import re
import time
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import multiprocessing

from lightning_plugins import distributed
from lightning_plugins.distributed import (
    full_tensor,
    gather_row_counts,
    gather_rows,
    is_distributed,
    share_gradient,
    share_out,
    sum_over_ranks,
    world_size,
)
from tests._processes import counted_elements, run_on_ranks

DIM = 3


def _rows(rank, n, dtype=torch.float64):
    return torch.randn(n, DIM, generator=torch.Generator().manual_seed(rank), dtype=dtype)


def _loss(total, rank):
    """A loss of its own on each rank, with a second derivative."""
    return (rank + 1) * total.pow(3).sum()


def _sum(rank):
    x = _rows(rank, 2).requires_grad_()
    total = sum_over_ranks(x)
    (gradient,) = torch.autograd.grad(_loss(total, rank), x, create_graph=True)
    (second,) = torch.autograd.grad(gradient.square().sum(), x)
    expanded = sum_over_ranks(torch.ones(1, requires_grad=True).expand(4))
    return {"total": total.detach(), "first": gradient.detach(), "second": second, "expanded": expanded.detach()}


def _share(rank):
    x = torch.tensor([2.0, 3.0], requires_grad=True)
    value = share_gradient(x)
    value.backward(torch.tensor([1.0 + rank, 10.0]))
    once = share_gradient(x).square().sum()
    try:
        torch.autograd.grad(once, x, create_graph=True)
        refusal = ""
    except RuntimeError as error:
        refusal = str(error)
    return {"value": value.detach(), "gradient": x.grad, "refusal": refusal}


def _gather(rank, sizes):
    results = []
    for counts in sizes:
        leaf = _rows(rank, counts[rank]).requires_grad_()
        x = leaf.exp()  # whose backward needs it unchanged
        with counted_elements() as exchanged:
            known = gather_row_counts(len(x))
            before = dict(exchanged)
            blocks = gather_rows(x, known)
        torch.cat(blocks).sum().backward()
        moved = {name: n - before.get(name, 0) for name, n in exchanged.items() if n != before.get(name, 0)}
        others = [block for source, block in enumerate(blocks) if source != rank]
        results.append(
            {
                "counts": known,
                "moved": moved,
                "rows": torch.cat(blocks).detach(),
                "own": blocks[rank] is x,
                "detached": not any(block.requires_grad for block in others),
                "gradient": leaf.grad,
            }
        )
    return results


def _wrong_rows(rank):
    found = []
    for counts in ([2], [5] * world_size()):
        try:
            gather_rows(torch.zeros(2, DIM), counts)
        except ValueError as error:
            found.append(str(error))
    return found


def _count_without_a_cpu_backend(rank):
    made = []
    new_group = dist.new_group

    def counting(*args, **kwargs):
        made.append(kwargs)
        return new_group(*args, **kwargs)

    with mock.patch.multiple(dist, get_backend_config=lambda: "cuda:nccl", new_group=counting):
        counts = [gather_row_counts(rank + offset) for offset in (1, 2)]
    return {"counts": counts, "made": made, "kept": len(distributed._cpu_groups)}


def _shard(rank):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    whole = torch.arange(10.0).reshape(5, 2).requires_grad_()  # 5 rows: unequal shards
    sharded = distribute_tensor(whole.detach(), init_device_mesh("cpu", (world_size(),)), [Shard(0)]).requires_grad_()
    full = full_tensor(sharded)
    full.square().sum().backward()
    return {"full": full.detach(), "gradient": sharded.grad.full_tensor()}


def _everything(rank, sizes):
    return {
        "group": (is_distributed(), world_size()),
        "sum": _sum(rank),
        "share": _share(rank),
        "gather": _gather(rank, sizes),
        "wrong": _wrong_rows(rank),
        "counts": _count_without_a_cpu_backend(rank),
        "shard": _shard(rank),
    }


SIZES = {
    2: [(2, 2), (1, 5), (0, 3), (0, 0)],
    3: [(4, 4, 4), (1, 7, 2), (0, 5, 0)],
}


@pytest.fixture(scope="module", params=[2, 3])
def ranks(request, tmp_path_factory):
    return run_on_ranks(_everything, request.param, tmp_path_factory.mktemp("ranks"), SIZES[request.param])


@pytest.mark.distributed
def test_the_group_is_seen(ranks):
    assert [result["group"] for result in ranks] == [(True, len(ranks))] * len(ranks)


@pytest.mark.distributed
def test_a_sum_over_ranks_has_the_derivatives_of_one_process(ranks):
    leaves = [_rows(rank, 2).requires_grad_() for rank in range(len(ranks))]
    total = sum(leaves)
    loss = sum(_loss(total, rank) for rank in range(len(ranks)))
    first = torch.autograd.grad(loss, leaves, create_graph=True)
    second = torch.autograd.grad(sum(gradient.square().sum() for gradient in first), leaves)
    for rank, result in enumerate(ranks):
        torch.testing.assert_close(result["sum"]["total"], total.detach())
        torch.testing.assert_close(result["sum"]["first"], first[rank].detach())
        torch.testing.assert_close(result["sum"]["second"], second[rank])
        torch.testing.assert_close(result["sum"]["expanded"], torch.full((4,), float(len(ranks))))


@pytest.mark.distributed
def test_a_shared_gradient_is_the_sum_over_ranks_and_has_no_second_derivative(ranks):
    n = len(ranks)
    for result in ranks:
        torch.testing.assert_close(result["share"]["value"], torch.tensor([2.0, 3.0]))
        torch.testing.assert_close(result["share"]["gradient"], torch.tensor([n * (n + 1) / 2, 10.0 * n]))
        assert "no second derivative" in result["share"]["refusal"]


@pytest.mark.distributed
def test_rows_of_unequal_ranks_arrive_in_order_without_padding(ranks):
    for case, counts in enumerate(SIZES[len(ranks)]):
        shards = [_rows(rank, n).exp() for rank, n in enumerate(counts)]
        whole = torch.cat(shards)
        for rank, result in enumerate(ranks):
            gathered = result["gather"][case]
            assert gathered["counts"] == list(counts)
            torch.testing.assert_close(gathered["rows"], whole, rtol=0, atol=0)
            assert gathered["own"]
            assert gathered["detached"]
            torch.testing.assert_close(gathered["gradient"], shards[rank])
            assert sum(gathered["moved"].values()) == sum(counts) * DIM


@pytest.mark.distributed
def test_counts_that_do_not_fit_are_refused(ranks):
    for rank, result in enumerate(ranks):
        short, wrong = result["wrong"]
        assert f"`counts` must have one entry for each of {len(ranks)} ranks, got [2]" in short
        assert f"`x` must have counts[{rank}] = 5 rows on rank {rank}, got shape (2, 3)" in wrong


@pytest.mark.distributed
def test_counts_take_a_gloo_group_made_once_where_the_default_has_no_cpu_backend(ranks):
    for result in ranks:
        n = len(ranks)
        assert result["counts"]["counts"] == [list(range(1, n + 1)), list(range(2, n + 2))]
        assert result["counts"]["made"] == [{"backend": "gloo"}]
        assert result["counts"]["kept"] == 1


@pytest.mark.distributed
def test_a_sharded_tensor_is_assembled_with_its_gradient(ranks):
    whole = torch.arange(10.0).reshape(5, 2)
    for result in ranks:
        torch.testing.assert_close(result["shard"]["full"], whole)
        torch.testing.assert_close(result["shard"]["gradient"], 2 * whole)


@mock.patch.object(dist, "get_backend_config", return_value="cuda:nccl")
def _second_group(rank, path, _):
    first = gather_row_counts(rank)
    dist.destroy_process_group()
    alone = gather_row_counts(rank)
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    return [first, alone, gather_row_counts(rank), len(distributed._cpu_groups)]


@pytest.mark.distributed
def test_a_second_process_group_after_the_first_is_served_too(tmp_path):
    results = run_on_ranks(_second_group, 2, tmp_path, tmp_path / "again")
    assert results == [[[0, 1], [0], [0, 1], 1], [[0, 1], [1], [0, 1], 1]]


def _fail(rank):
    if rank == 1:
        raise KeyError("a child's error")
    dist.barrier()  # would wait for ever


def _sleep(rank):
    time.sleep(60)


@pytest.mark.distributed
def test_a_process_error_is_shown_and_ends_the_others(tmp_path):
    with pytest.raises(multiprocessing.ProcessRaisedException, match='KeyError: "a child\'s error"'):
        run_on_ranks(_fail, 2, tmp_path)


@pytest.mark.distributed
def test_processes_have_a_time_limit(tmp_path):
    with pytest.raises(TimeoutError, match=r"_sleep did not end on 1 ranks within 0\.1 s"):
        run_on_ranks(_sleep, 1, tmp_path, seconds=0.1)


@pytest.fixture(params=[True, False], ids=["available", "unavailable"])
def alone(request, monkeypatch):
    """One process, with a torch that was built with and without its distributed part."""
    if not request.param:
        monkeypatch.setattr(dist, "is_available", lambda: False)
        monkeypatch.delattr(dist, "is_initialized")


@pytest.mark.usefixtures("alone")
def test_nothing_changes_without_a_process_group():
    x = _rows(0, 4).requires_grad_()
    assert not is_distributed()
    assert world_size() == 1
    assert sum_over_ranks(x) is x
    assert share_gradient(x) is x
    assert gather_row_counts(4) == [4]
    (block,) = gather_rows(x, [4])
    assert block is x
    assert full_tensor(x) is x


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: gather_row_counts(-1), ValueError, "`n` must be at least 0, got -1"),
        (lambda: gather_row_counts(2.0), TypeError, r"`n` must be an int of at least 0, got 2.0 \(float\)"),
        (lambda: gather_rows(torch.zeros(2, 3), [3]), ValueError, r"`x` must have counts\[0\] = 3 rows on rank 0"),
        (lambda: gather_rows(torch.tensor(1.0), [1]), ValueError, r"got shape \(\)"),
        (lambda: gather_rows(torch.zeros(2, 3), [1, 1]), ValueError, r"one entry for each of 1 ranks, got \[1, 1\]"),
        (lambda: share_out([1], 0), ValueError, "`world_size` must be at least 1, got 0"),
        (lambda: share_out([1, -2], 2), ValueError, re.escape("`costs[1]` must be at least 0, got -2")),
        (lambda: share_out([math.nan], 2), ValueError, re.escape("`costs[0]` must be finite, got nan")),
        (lambda: share_out(["a"], 2), TypeError, re.escape("`costs[0]` must be a number, got 'a' (str)")),
    ],
)
def test_wrong_arguments_are_named(call, error, match):
    with pytest.raises(error, match=match):
        call()


@pytest.mark.parametrize(
    ("costs", "ranks", "owners"),
    [
        ([], 3, []),
        ([5], 3, [0]),
        ([1, 1, 1, 1], 2, [0, 1, 0, 1]),
        ([3, 3, 2, 2, 2], 2, [0, 1, 0, 1, 0]),
        ([0, 0, 7], 2, [1, 1, 0]),
        ([1.5, 4], 1, [0, 0]),
    ],
)
def test_share_out_by_hand(costs, ranks, owners):
    assert share_out(costs, ranks) == owners


@given(costs=st.lists(st.integers(0, 10**6), max_size=40), ranks=st.integers(1, 8))
def test_share_out_is_balanced(costs, ranks):
    owners = share_out(costs, ranks)
    loads = [sum(cost for cost, owner in zip(costs, owners, strict=True) if owner == rank) for rank in range(ranks)]
    assert len(owners) == len(costs)
    assert all(0 <= owner < ranks for owner in owners)
    # the last item that the busiest rank received went to the then idlest one
    assert max(loads) <= sum(costs) / ranks + max(costs, default=0)
