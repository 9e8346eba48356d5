import math
import pickle

import pytest
import torch
from torch.utils.data import DataLoader

from lightning_plugins.data import BinaryChannelPairs, SameClassPairs, SameClassPairSampler
from lightning_plugins.functional import binary_symmetric_channel_information
from tests._processes import run_on_ranks

TARGETS = [0, 0, 1, 1, 1, 2, 2, 2, 2, 2]


def test_partners_are_others_of_the_class_and_all_of_them():
    pairs = SameClassPairs(torch.arange(10), TARGETS, torch.Generator().manual_seed(0))
    seen = {index: set() for index in range(10)}
    for _ in range(60):
        for index in range(10):
            x, y, label = pairs[index]
            assert (int(x), label) == (index, TARGETS[index])
            seen[index].add(int(y))
    for index, others in seen.items():
        assert others == {j for j, label in enumerate(TARGETS) if label == TARGETS[index]} - {index}
    torch.testing.assert_close(pairs.class_probabilities, torch.tensor([0.2, 0.3, 0.5]).double())


def test_generator_repeats_and_workers_differ():
    def partners(workers):
        pairs = SameClassPairs(torch.arange(40), [0] * 40, torch.Generator().manual_seed(3))
        loader = DataLoader(pairs, batch_size=10, num_workers=workers, generator=torch.Generator().manual_seed(0))
        return [int(y) for _, y, _ in loader for y in y]

    assert partners(0) == partners(0)
    assert partners(2) == partners(2)
    first, second = partners(2)[:10], partners(2)[10:20]  # of two workers
    assert [y - i for i, y in enumerate(first)] != [y - 10 - i for i, y in enumerate(second)]


def test_pickled_pairs_go_on_alike():
    pairs = SameClassPairs(torch.arange(10), TARGETS, torch.Generator().manual_seed(0))
    copy = pickle.loads(pickle.dumps(pairs))
    assert [int(pairs[9][1]) for _ in range(20)] == [int(copy[9][1]) for _ in range(20)]


def test_sampler_draws_classes_as_told():
    p = torch.tensor([0.6, 0.4, 0.0])
    sampler = SameClassPairSampler(TARGETS, 3000, class_probabilities=p, seed=1)
    drawn = list(sampler)
    assert len(drawn) == len(sampler) == 3000
    assert all(i != j and TARGETS[i] == TARGETS[j] for i, j in drawn)
    share = sum(TARGETS[i] == 0 for i, _ in drawn) / 3000
    assert share == pytest.approx(0.6, abs=4 * math.sqrt(0.24 / 3000))
    assert list(sampler) == drawn
    sampler.set_epoch(1)
    assert list(sampler) != drawn
    pairs = SameClassPairs(torch.arange(10), TARGETS)
    x, y, label = next(iter(DataLoader(pairs, batch_size=7, sampler=sampler)))
    assert x.shape == y.shape == label.shape == (7,)


def _drawn(rank):
    return list(SameClassPairSampler(TARGETS, 21, seed=1))


@pytest.mark.distributed
def test_processes_draw_their_own_shares(tmp_path):
    first, second = run_on_ranks(_drawn, 2, tmp_path)
    assert len(first) == len(second) == 11
    assert first != second


def test_channel_flips_as_often_as_told():
    """Samples that are their class: the bits can be read off both sides."""
    data = torch.tensor([0.0, 1.0] * 20)
    pairs = BinaryChannelPairs(data, [0, 1] * 20, sources=5, crossover=0.2, num_pairs=2000, seed=2)
    x, y, bits = (torch.stack(part) for part in zip(*(pairs[i] for i in range(2000)), strict=True))
    assert torch.equal(x.long(), bits)
    assert float(bits.double().mean()) == pytest.approx(0.5, abs=0.02)
    flipped = (x != y).double()
    assert float(flipped.mean()) == pytest.approx(0.2, abs=4 * math.sqrt(0.16 / 10_000))
    p = float(flipped.mean())
    plug_in = binary_symmetric_channel_information(5, p)
    assert plug_in == pytest.approx(pairs.information, rel=0.1)
    assert all(torch.equal(one, other) for one, other in zip(pairs[7], pairs[7], strict=True))


SAMPLES = torch.zeros(4)
BAD = {
    "one member": (lambda: SameClassPairs(torch.zeros(3), [0, 0, 1]), ValueError, "class 1 has one: it has no partner"),
    "one member, drawn": (lambda: SameClassPairSampler([0, 0, 4], 3), ValueError, "class 4 has one"),
    "fewer targets": (lambda: SameClassPairs(SAMPLES, [0, 0]), ValueError, "one class for each of 4 samples, got 2"),
    "real targets": (lambda: SameClassPairs(SAMPLES, [0.0] * 4), TypeError, "`targets` must be of type Sequence"),
    "negative target": (lambda: SameClassPairs(SAMPLES, [-1, -1, 0, 0]), ValueError, "`targets` must be at least 0"),
    "no pair": (lambda: SameClassPairSampler([0, 0], 0), ValueError, "`num_pairs` must be at least 1"),
    "missing class": (
        lambda: SameClassPairSampler([0, 0], 2, class_probabilities=torch.tensor([0.5, 0.5])),
        ValueError,
        "`class_probabilities` must have an entry for each of 1 classes",
    ),
    "three classes": (
        lambda: BinaryChannelPairs(torch.zeros(6), [0, 0, 1, 1, 2, 2], sources=1, crossover=0.1, num_pairs=1),
        ValueError,
        "`targets` must be 0 and 1",
    ),
    "crossover": (
        lambda: BinaryChannelPairs(SAMPLES, [0, 0, 1, 1], sources=1, crossover=0.9, num_pairs=1),
        ValueError,
        r"`crossover` must be in \[0, 0.5\], got 0.9; did you mean 0.1",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_are_named(case):
    call, error, message = BAD[case]
    with pytest.raises(error, match=message):
        call()
