"""N-way K-shot tasks: what they consist of, where labels come from, and mistakes."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import ConcatDataset, Dataset, Subset, TensorDataset

from lightning_plugins.meta import FewShot


class Listed(Dataset):
    """Sample i is i; counts what is loaded."""

    def __init__(self, hidden, **attributes):
        self.hidden = hidden
        self.loaded = 0
        vars(self).update(attributes)

    def __len__(self):
        return len(self.hidden)

    def __getitem__(self, index):
        self.loaded += 1
        return float(index), self.hidden[index]


def draw(tasks, count=1, seed=0):
    return tasks.sample(count, torch.Generator().manual_seed(seed))


@given(data=st.data(), shots=st.integers(1, 3), queries=st.integers(1, 4), seed=st.integers(0, 2**40))
def test_tasks_have_n_classes_and_distinct_samples(data, shots, queries, seed):
    extra = data.draw(st.lists(st.integers(0, 5), min_size=2, max_size=7))
    ways = data.draw(st.integers(2, len(extra)))
    labels = [name for name, more in zip("abcdefg", extra, strict=False) for _ in range(shots + queries + more)]
    labels = data.draw(st.permutations(labels))
    (support_x, support_y), (query_x, query_y) = draw(FewShot(Listed(labels), ways, shots, queries), 3, seed)
    assert support_x.shape == support_y.shape == (3, ways * shots)
    assert query_x.shape == query_y.shape == (3, ways * queries)
    for task in range(3):
        x = torch.cat([support_x[task], query_x[task]]).int().tolist()
        assert len(set(x)) == len(x)  # support and query are disjoint, too
        y = torch.cat([support_y[task], query_y[task]]).tolist()
        meaning = {(label, labels[index]) for label, index in zip(y, x, strict=True)}
        assert len(meaning) == ways  # a label stands for one class, the same in support and query
        assert {label for label, _ in meaning} == set(range(ways))
        assert support_y[task].bincount().tolist() == [shots] * ways
        assert query_y[task].bincount().tolist() == [queries] * ways


def test_the_generator_decides_and_labels_are_shuffled():
    tasks = FewShot(Listed([0, 1] * 4), ways=2, shots=1, queries=2)
    torch.testing.assert_close(draw(tasks, 4, seed=3), draw(tasks, 4, seed=3), rtol=0, atol=0)
    (x, _), _ = draw(tasks, 50)
    first = x[:, 0].int().remainder(2).float().mean()  # the class that has label 0
    assert 0.25 < first < 0.75
    assert x.unique().tolist() == list(range(8))  # every sample is drawn some time


def test_the_order_of_the_dataset_does_not_choose_the_classes():
    there, back = (FewShot(Listed(labels), 2, 1, 1) for labels in (list("aabbcc"), list("ccbbaa")))
    for seed in range(5):
        (forward, _), _ = draw(there, seed=seed)
        (reverse, _), _ = draw(back, seed=seed)
        assert ["aabbcc"[int(i)] for i in forward[0]] == ["ccbbaa"[int(i)] for i in reverse[0]]


LABELS = [0, 0, 1, 1, 2, 2]
SOURCES = {
    "targets": Listed(LABELS, targets=LABELS),
    "targets, tensor": Listed(LABELS, targets=torch.tensor(LABELS)),
    "labels, numpy": Listed(LABELS, labels=np.array(LABELS)),
    "strings": Listed(list("aabbcc"), labels=tuple("aabbcc")),
    "subset": Subset(Listed([9, *LABELS], targets=[9, *LABELS]), [1, 2, 3, 4, 5, 6]),
    "subset of a subset": Subset(Subset(Listed([9, *LABELS], targets=[9, *LABELS]), range(1, 7)), range(6)),
    "concatenated": ConcatDataset([Listed(LABELS[:3], targets=LABELS[:3]), Listed(LABELS[3:], targets=LABELS[3:])]),
}


@pytest.mark.parametrize("name", SOURCES)
def test_labels_are_found_without_loading(name):
    dataset = SOURCES[name]
    tasks = FewShot(dataset, ways=3, shots=1, queries=1)
    inner = dataset
    while not isinstance(inner, Listed):
        inner = inner.datasets[0] if isinstance(inner, ConcatDataset) else inner.dataset
    assert inner.loaded == 0
    assert [members.tolist() for members in tasks.members] == [[0, 1], [2, 3], [4, 5]]


def test_labels_are_loaded_where_nothing_else_says_them():
    dataset = Listed([torch.tensor(label) for label in LABELS])
    assert len(FewShot(dataset, 3, 1, 1).members) == 3
    assert dataset.loaded == 6
    assert len(FewShot(ConcatDataset([dataset]), 3, 1, 1).members) == 3


def test_tensor_dataset_and_classes():
    images = torch.arange(6.0).view(6, 1, 1, 1).expand(-1, 3, 2, 2)
    tasks = FewShot(TensorDataset(images, torch.tensor(LABELS)), 2, 1, 1, classes=[2, 0])
    (support_x, _), (query_x, _) = draw(tasks, 9)
    assert support_x.shape == query_x.shape == (9, 2, 3, 2, 2)
    assert support_x.unique().tolist() == [0.0, 1.0, 4.0, 5.0]


class Picture:
    """An image that is no tensor."""


MISTAKES = {
    "no dataset": (lambda: FewShot(iter([1])), TypeError, "must have `__len__` and `__getitem__`, got list_iter"),
    "no pairs": (lambda: FewShot([1.0, 2.0]), TypeError, r"`dataset` must give pairs \(input, label\), got float at 0"),
    "triples": (lambda: FewShot([(1.0, 2, 3)]), TypeError, "got 3 things at 0"),
    "label vector": (lambda: FewShot([(1.0, torch.zeros(3))]), ValueError, r"one label per sample, got shape \(3,\)"),
    "labels of another dataset": (
        lambda: FewShot(Listed(LABELS, targets=[1])),
        ValueError,
        "`dataset` must have a label per sample, 6, got 1",
    ),
    "one way": (lambda: FewShot(Listed(LABELS), 1), ValueError, "`ways` must be at least 2, got 1"),
    "too many ways": (lambda: FewShot(Listed(LABELS), 4, 1, 1), ValueError, "number of classes, 3, got 4"),
    "no shot": (lambda: FewShot(Listed(LABELS), 2, 0), ValueError, "`shots` must be at least 1, got 0"),
    "fractional queries": (lambda: FewShot(Listed(LABELS), 2, 1, 1.5), TypeError, "`queries` must be an int"),
    "small classes": (
        lambda: FewShot(Listed([*LABELS, 2], classes=["cat", "dog", "owl"], targets=[*LABELS, 2]), 2, 1, 2),
        ValueError,
        r"at most the size of every class, got 1 \+ 2 and cat with 2, dog with 2; leave out classes with `classes`",
    ),
    "small class without name": (lambda: FewShot(Listed(list("aaab")), 2, 1, 1), ValueError, "1 . 1 and 'b' with 1"),
    "unknown class": (
        lambda: FewShot(Listed(LABELS), 2, 1, 1, classes=[0, 7]),
        ValueError,
        r"`classes` must be labels of `dataset`, it has no sample of \[7\]",
    ),
    "pictures": (
        lambda: draw(FewShot([(Picture(), label) for label in LABELS], 2, 1, 1)),
        TypeError,
        "`dataset` must give tensors, got Picture; give it a transform such as torchvision's `ToTensor",
    ),
    "unequal shapes": (
        lambda: draw(FewShot([(torch.zeros(i), label) for i, label in enumerate(LABELS)], 3, 1, 1)),
        ValueError,
        r"`dataset` must give inputs of one shape, got \[\(\d,\), .*; resize them",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes(name):
    call, error, message = MISTAKES[name]
    with pytest.raises(error, match=message):
        call()
