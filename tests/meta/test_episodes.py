"""Episodes: the same for every batch size, rank and worker; shared out without overlap; resumed."""

import random
from itertools import islice
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from lightning_plugins.meta import EpisodeLoader, EpisodeSampler, Sinusoid, TaskSet

TASKS = Sinusoid(shots=2, queries=1)


def flat(batches):
    """The episodes of batches, one after the other: shape (episodes, 3)."""
    return torch.cat([torch.cat([batch[0][1], batch[1][1]], dim=1).squeeze(-1) for batch in batches])


def as_rank(rank, ranks):
    """Make `lightning_plugins` believe in other ranks."""
    return mock.patch.multiple(
        dist,
        is_initialized=lambda: True,
        get_world_size=lambda *_: ranks,
        get_rank=lambda *_: rank,
    )


@given(
    episodes=st.integers(1, 40),
    per_batch=st.integers(1, 9),
    ranks=st.integers(1, 5),
    epoch=st.integers(0, 3),
    fixed=st.booleans(),
)
def test_ranks_share_every_batch_out(episodes, per_batch, ranks, epoch, fixed):
    sizes = [per_batch] * (episodes // per_batch) + [episodes % per_batch] * (episodes % per_batch > 0)
    shares = []
    for rank in range(ranks):
        sampler = EpisodeSampler(episodes, per_batch, fixed=fixed)
        sampler.set_epoch(epoch)
        with as_rank(rank, ranks):
            least = sizes[0] if fixed else sizes[-1]
            if least < ranks:
                with pytest.raises(
                    ValueError, match=f"a task for each of the {ranks} ranks, got a batch of {least} wi"
                ):
                    len(sampler)
                return
            shares.append(list(sampler))
            assert len(sampler) == len(shares[-1])
            assert all(shares[-1])  # never an empty batch
    expected = [(0 if fixed else epoch, number) for number in range(episodes)]
    assert sorted(key for share in shares for batch in share for key in batch) == expected
    for number, size in enumerate(sizes):
        counts = [len(share[number]) if number < len(share) else 0 for share in shares]
        assert sum(counts) == size
        assert max(counts) - min(counts) <= 1
        keys = {key[1] // per_batch for share in shares if number < len(share) for key in share[number]}
        assert keys == {number}  # all ranks work at the same batch


def test_an_episode_does_not_depend_on_the_batches():
    whole = flat(EpisodeLoader(TASKS, 7, tasks_per_batch=7))
    torch.testing.assert_close(flat(EpisodeLoader(TASKS, 7, tasks_per_batch=3)), whole, rtol=0, atol=0)
    torch.testing.assert_close(flat(EpisodeLoader(TASKS, 5, tasks_per_batch=2)), whole[:5], rtol=0, atol=0)
    with as_rank(1, 2):
        torch.testing.assert_close(flat(EpisodeLoader(TASKS, 7, tasks_per_batch=7)), whole[1::2], rtol=0, atol=0)
    assert len(whole.unique(dim=0)) == 7


def test_epochs_and_seeds_differ_unless_fixed():
    loader, fixed = EpisodeLoader(TASKS, 3), EpisodeLoader(TASKS, 3, fixed=True)
    first, second = flat(loader), flat(loader)
    assert not (first == second).any()
    assert not (first == flat(EpisodeLoader(TASKS, 3, seed=1))).any()
    loader.set_epoch(0)
    torch.testing.assert_close(flat(loader), first, rtol=0, atol=0)
    torch.testing.assert_close([flat(fixed), flat(fixed)], [first, first], rtol=0, atol=0)


@pytest.mark.parametrize("workers", [0, 2])
def test_resumed_is_uninterrupted_with_workers_too(workers):
    """Workers have drawn more than was handed out: the state is about the latter."""
    expected = flat([*EpisodeLoader(TASKS, 9, 2), *mock_epoch(1)])
    for taken in (0, 1, 4, 5):
        interrupted, resumed = (EpisodeLoader(TASKS, 9, 2, num_workers=workers) for _ in range(2))
        head = list(islice(interrupted, taken))
        resumed.load_state_dict(interrupted.state_dict())
        torch.testing.assert_close(flat([*head, *resumed, *(resumed if taken < 5 else [])]), expected, rtol=0, atol=0)
        if workers and taken == 1:
            break  # starting workers takes its time


def mock_epoch(epoch):
    loader = EpisodeLoader(TASKS, 9, 2)
    loader.set_epoch(epoch)
    return loader


def test_another_epoch_begins_at_its_beginning():
    loader = EpisodeLoader(TASKS, 9, 2)
    loader.load_state_dict({"epoch": 0, "batch": 3})
    loader.set_epoch(0)  # as Lightning does on resuming
    assert len(list(loader)) == 2
    loader.load_state_dict({"epoch": 0, "batch": 3})
    loader.set_epoch(1)  # the first epoch was cut short, by `limit_train_batches` for example
    torch.testing.assert_close(flat(loader), flat(mock_epoch(1)), rtol=0, atol=0)


def test_loaders_of_three_ranks_have_every_episode_once():
    shares = []
    for rank in range(3):
        with as_rank(rank, 3):
            shares.append([flat([batch]) for batch in EpisodeLoader(TASKS, 7, 3, fixed=True)])
    assert [len(share) for share in shares] == [3, 2, 2]  # the last of seven episodes is the first rank's
    whole = flat(EpisodeLoader(TASKS, 7, 3))
    torch.testing.assert_close(torch.cat([*map(torch.cat, zip(*shares, strict=False)), shares[0][2]]), whole)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_pass_left_early_is_followed_by_the_next_epoch(workers):
    loader = EpisodeLoader(TASKS, 9, 2, num_workers=workers)
    head = list(islice(loader, 2))
    torch.testing.assert_close(flat(head), flat(mock_epoch(0))[:4], rtol=0, atol=0)
    torch.testing.assert_close(flat(loader), flat(mock_epoch(1)), rtol=0, atol=0)
    if workers:
        return
    for epoch, taken in ((2, 1), (3, 4), (4, 1)):  # again and again, also one batch before the end
        torch.testing.assert_close(
            flat(list(islice(loader, taken))), flat(mock_epoch(epoch))[: 2 * taken], rtol=0, atol=0
        )
    state = loader.state_dict()
    assert state == {"epoch": 4, "batch": 1}  # a position still: what was left early can be resumed
    resumed = EpisodeLoader(TASKS, 9, 2)
    resumed.load_state_dict(state)
    torch.testing.assert_close(flat(resumed), flat(mock_epoch(4))[2:], rtol=0, atol=0)
    torch.testing.assert_close(flat(resumed), flat(mock_epoch(5)), rtol=0, atol=0)


def test_an_epoch_that_is_set_begins_again():
    """Lightning sets it before every epoch, and again when it resumes."""
    loader = EpisodeLoader(TASKS, 9, 2)
    for _ in range(2):
        loader.set_epoch(3)
        torch.testing.assert_close(flat(list(islice(loader, 3))), flat(mock_epoch(3))[:6], rtol=0, atol=0)


class Random(TaskSet):
    """As a dataset whose transforms draw from the global generators."""

    def sample(self, tasks, generator):
        x = torch.stack([torch.rand(tasks, 2, 1), torch.tensor(np.random.rand(tasks, 2, 1))]).sum(0)  # noqa: NPY002
        return (x + random.random(), x), (x, x)


@pytest.mark.parametrize("workers", [0, 2])
def test_random_transforms_follow_from_the_episode(workers):
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    loader = EpisodeLoader(Random(), 4, 2, num_workers=workers)
    first = flat(loader)
    loader.set_epoch(0)
    torch.rand(3)
    torch.testing.assert_close(flat(loader), first, rtol=0, atol=0)
    torch.testing.assert_close(flat(EpisodeLoader(Random(), 4, 1)), first, rtol=0, atol=0)
    torch.set_rng_state(states[0])
    assert random.getstate() == states[1]
    assert np.random.get_state()[1].tolist() == states[2]  # noqa: NPY002
    list(EpisodeLoader(Random(), 4, 2, num_workers=workers))
    torch.testing.assert_close(torch.get_rng_state(), states[0], rtol=0, atol=0)


class Unequal(TaskSet):
    def sample(self, tasks, generator):
        count = int(torch.randint(1, 4, (), generator=generator))
        x = torch.randn(tasks, count, 1, generator=generator)
        return ({"x": x}, x), (x[:, :1], x[:, :1])


def test_tasks_of_different_sizes_come_as_lists():
    (support_x, support_y), (query_x, _) = next(iter(EpisodeLoader(Unequal(), 8, 8)))
    assert isinstance(support_x, list)
    assert {len(task["x"]) for task in support_x} == {len(task) for task in support_y} == {1, 2, 3}
    assert query_x.shape == (8, 1, 1)


MISTAKES = {
    "state without an epoch": (
        lambda: EpisodeLoader(TASKS, 4).load_state_dict({"batch": 0}),
        ValueError,
        "got no 'epoch'",
    ),
    "state of negative batches": (
        lambda: EpisodeLoader(TASKS, 4).load_state_dict({"epoch": 0, "batch": -3}),
        ValueError,
        "at least 0, got -3",
    ),
    "state of a fraction": (
        lambda: EpisodeLoader(TASKS, 4).load_state_dict({"epoch": 0.5, "batch": 0}),
        TypeError,
        "must be an int",
    ),
    "a dataset": (
        lambda: EpisodeLoader([(1.0, 2)], 3),
        TypeError,
        "must be a `TaskSet`, got list; `FewShot` makes one",
    ),
    "no episodes": (lambda: EpisodeLoader(TASKS, 0), ValueError, "`episodes` must be at least 1, got 0"),
    "no tasks": (lambda: EpisodeLoader(TASKS, 4, 0), ValueError, "`tasks_per_batch` must be at least 1, got 0"),
    "negative seed": (lambda: EpisodeLoader(TASKS, 4, seed=-1), ValueError, "`seed` must be at least 0, got -1"),
    "workers": (lambda: EpisodeLoader(TASKS, 4, num_workers=True), TypeError, "`num_workers` must be an int"),
    "epoch": (lambda: EpisodeLoader(TASKS, 4).set_epoch(-1), ValueError, "`epoch` must be at least 0, got -1"),
    "state": (
        lambda: EpisodeLoader(TASKS, 4).load_state_dict({"epoch": 0, "batch": 3}),
        ValueError,
        "loader with as many batches, 1, got one after 3 of them; keep `episodes` and `tasks_per_batch`",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes(name):
    call, error, message = MISTAKES[name]
    with pytest.raises(error, match=message):
        call()
