"""Positive pairs whose shared information is known or bounded: of the same class, and over a noisy channel."""

import math
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler, get_worker_info

from lightning_plugins._arguments import check_arguments
from lightning_plugins._checks import check_fraction, check_int, check_non_negative_int, check_positive_int
from lightning_plugins.distributed import world_size
from lightning_plugins.functional.class_information import binary_symmetric_channel_information, check_distribution
from lightning_plugins.functional.tensors import check_dims


class Samples(Protocol):
    """A map-style data set."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Any: ...


class SameClassPairs(Dataset[tuple[Any, Any, int]]):
    """Pairs of two different samples of the same class.

    With X and Y independent given the class, ``I(X; Y) <= H(C)``, with equality if both show their class. Index ``i``
    gives sample ``i`` with a random partner, so that class frequencies are those of the data; an index ``(i, j)`` from
    a `SameClassPairSampler` gives these two samples. Other pairs of the same class in a batch are legitimate
    candidates: do not remove them.

    Args:
        dataset: Samples, as tensors or anything that ``DataLoader`` collates; of pairs ``(sample, label)`` the first is
            used.
        targets: Class of each sample, integers from 0.
        generator: Draws the partners, with a separate seed per ``DataLoader`` worker; None for torch's generator.

    Raises:
        TypeError: If ``targets`` are not integers.
        ValueError: If there is not one target for each sample, or a class has one member.

    Attributes:
        class_probabilities: How often each class is drawn, shape ``(C,)``, float64.

    Example:
        >>> pairs = SameClassPairs(torch.arange(6), [0, 0, 1, 1, 1, 1])
        >>> pairs[0]
        (tensor(0), tensor(1), 0)
        >>> pairs.class_probabilities
        tensor([0.3333, 0.6667], dtype=torch.float64)

    Source:
        Lee et al., https://arxiv.org/abs/2308.15704; the sampling of the follow-up, https://arxiv.org/abs/2410.10924.
    """

    def __init__(
        self, dataset: Samples, targets: Sequence[int] | Tensor, generator: torch.Generator | None = None
    ) -> None:
        check_arguments(SameClassPairs.__init__, locals())
        self.dataset = _sized(dataset)
        self.targets = _classes(targets, len(dataset))
        self._members = _members(self.targets)
        counts = torch.bincount(self.targets).double()
        self.class_probabilities = counts / counts.sum()
        self.generator = generator
        self._worker: tuple[int, torch.Generator] | None = None

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int | tuple[int, int]) -> tuple[Any, Any, int]:
        if isinstance(index, tuple):
            if len(index) != 2:
                raise IndexError(f"`index` must be one number or two, got {index!r}")
            first, second = (check_int("index", number) for number in index)
            if not 0 <= min(first, second) <= max(first, second) < len(self):
                raise IndexError(f"`index` must be two of {len(self)} samples, got {index!r}")
        else:
            if not -len(self) <= check_int("index", index) < len(self):
                raise IndexError(f"`index` must be one of {len(self)} pairs, got {index}")
            first = index % len(self)
            second = _other(self._members[int(self.targets[first])], first, self._generator())
        return _sample(self.dataset, first), _sample(self.dataset, second), int(self.targets[first])

    def __getstate__(self) -> dict[str, Any]:  # a generator is sent to a spawned worker as its state
        state = {**vars(self), "_worker": None}
        state["generator"] = None if self.generator is None else self.generator.get_state()
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        if state["generator"] is not None:
            self.generator = torch.Generator()
            self.generator.set_state(state["generator"])

    def _generator(self) -> torch.Generator | None:
        info = get_worker_info()
        if self.generator is None or info is None:
            return self.generator
        if self._worker is None or self._worker[0] != info.seed:  # all workers inherit the same state
            own = torch.Generator().manual_seed((self.generator.initial_seed() + info.seed) % 2**63)
            self._worker = info.seed, own
        return self._worker[1]


class SameClassPairSampler(Sampler[tuple[int, int]]):
    """Draw classes and two different samples of each, for `SameClassPairs`.

    Every process draws its own share with its own seed; pass the loader to the Trainer with
    ``use_distributed_sampler=False``. Each epoch has new pairs, determined by `set_epoch`, which the Trainer calls: an
    epoch of a resumed run has the same pairs.

    Args:
        targets: Class of each sample, integers from 0.
        num_pairs: Pairs per epoch, over all processes.
        class_probabilities: Probability of each class, shape ``(C,)``; None for the class frequencies.
        seed: Seed of the draws.

    Raises:
        TypeError: If ``targets`` are not integers or a number is not an int.
        ValueError: If a number is out of its range, a class has one member, or ``class_probabilities`` is not a
            distribution over the classes with members.

    Attributes:
        class_probabilities: How often each class is drawn, shape ``(C,)``, float64.

    Example:
        >>> sampler = SameClassPairSampler([0, 0, 1, 1], num_pairs=3, class_probabilities=torch.tensor([1.0, 0.0]))
        >>> sorted(list(sampler)[0])
        [0, 1]

    Source:
        Lee et al., https://arxiv.org/abs/2308.15704.
    """

    def __init__(
        self,
        targets: Sequence[int] | Tensor,
        num_pairs: int,
        *,
        class_probabilities: Tensor | None = None,
        seed: int = 0,
    ) -> None:
        check_arguments(SameClassPairSampler.__init__, locals())
        classes = _classes(targets)
        self._members = _members(classes)
        self.num_pairs = check_positive_int("num_pairs", num_pairs)
        self.seed = check_non_negative_int("seed", seed)
        counts = torch.bincount(classes)
        p = counts / counts.sum() if class_probabilities is None else class_probabilities
        self.class_probabilities = check_distribution("class_probabilities", p)
        if len(self.class_probabilities) != len(counts) or bool((self.class_probabilities[counts == 0] > 0).any()):
            raise ValueError(
                f"`class_probabilities` must have an entry for each of {len(counts)} classes, 0 for one without "
                f"members, got shape {tuple(self.class_probabilities.shape)}"
            )
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Set the next epoch.

        Args:
            epoch: Its number.
        """
        self.epoch = epoch

    def __len__(self) -> int:
        return math.ceil(self.num_pairs / world_size())

    def __iter__(self) -> Iterator[tuple[int, int]]:
        rank = torch.distributed.get_rank() if world_size() > 1 else 0
        generator = _seeded(self.seed, self.epoch, rank)
        drawn = torch.multinomial(self.class_probabilities, len(self), replacement=True, generator=generator)
        for label in drawn.tolist():
            members = self._members[label]
            first = int(members[int(torch.randint(len(members), (), generator=generator))])
            yield first, _other(members, first, generator)


class BinaryChannelPairs(Dataset[tuple[Tensor, Tensor, Tensor]]):
    """Pairs whose shared information is the capacity of a binary symmetric channel.

    Fair bits determine the classes of the parts of ``x``; for ``y`` each bit is flipped with probability ``crossover``.
    If the samples reveal their class, ``I(X; Y) = sources * (ln 2 - H(crossover))``, `information`; otherwise it is
    less. The same index always gives the same pair.

    Args:
        dataset: Samples, tensors of one shape; of pairs ``(sample, label)`` the first is used.
        targets: Class of each sample, 0 or 1.
        sources: Number of bits, and of parts of ``x`` and of ``y``.
        crossover: Probability of a flip, in ``[0, 0.5]``.
        num_pairs: Length of the data set.
        seed: Seed of the draws.

    Raises:
        TypeError: If ``targets`` are not integers or a number is of the wrong type.
        ValueError: If there are not two classes of at least two members, or a number is out of its range.

    Attributes:
        information: In nats.

    Example:
        >>> pairs = BinaryChannelPairs(torch.randn(8, 4), [0, 1] * 4, sources=3, crossover=0.0, num_pairs=5)
        >>> x, y, bits = pairs[0]
        >>> x.shape, bits.shape, round(pairs.information / math.log(2), 6)  # bits
        (torch.Size([3, 4]), torch.Size([3]), 3.0)

    Source:
        The formula and the sampling of https://arxiv.org/abs/2410.10924.
    """

    def __init__(
        self,
        dataset: Samples,
        targets: Sequence[int] | Tensor,
        *,
        sources: int,
        crossover: float,
        num_pairs: int,
        seed: int = 0,
    ) -> None:
        check_arguments(BinaryChannelPairs.__init__, locals())
        self.dataset = _sized(dataset)
        classes = _classes(targets, len(dataset))
        self._members = _members(classes)
        if sorted(self._members) != [0, 1]:
            raise ValueError(f"`targets` must be 0 and 1, a class for each value of a bit, got {sorted(self._members)}")
        self.sources = check_positive_int("sources", sources)
        if check_fraction("crossover", crossover) > 0.5:
            raise ValueError(f"`crossover` must be in [0, 0.5], got {crossover!r}; did you mean {1 - crossover:.6g}?")
        self.crossover = crossover
        self.num_pairs = check_positive_int("num_pairs", num_pairs)
        self.seed = check_non_negative_int("seed", seed)
        self.information = binary_symmetric_channel_information(sources, crossover)

    def __len__(self) -> int:
        return self.num_pairs

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        if not -len(self) <= check_int("index", index) < len(self):
            raise IndexError(f"`index` must be a pair of {len(self)}, got {index}")
        generator = _seeded(self.seed, index % len(self), 0)
        bits = torch.randint(2, (self.sources,), generator=generator)
        received = bits ^ (torch.rand(self.sources, generator=generator) < self.crossover).long()
        parts: tuple[list[Tensor], list[Tensor]] = ([], [])
        for sent, got in zip(bits.tolist(), received.tolist(), strict=True):
            first = int(self._members[sent][int(torch.randint(len(self._members[sent]), (), generator=generator))])
            second = _other(self._members[got], first, generator)
            for side, number in zip(parts, (first, second), strict=True):
                side.append(torch.as_tensor(_sample(self.dataset, number)))
        return torch.stack(parts[0]), torch.stack(parts[1]), bits


def _classes(targets: Sequence[int] | Tensor, count: int | None = None) -> Tensor:
    classes = torch.as_tensor(targets).cpu()
    if classes.is_floating_point() or classes.dtype == torch.bool or classes.ndim != 1:
        raise TypeError(
            f"`targets` must be integers of shape (N,), got {classes.dtype} of shape {tuple(classes.shape)}"
        )
    if len(classes) == 0 or (count is not None and len(classes) != count):
        raise ValueError(f"`targets` must have one class for each of {count or 'the'} samples, got {len(classes)}")
    if int(classes.min()) < 0:
        raise ValueError(f"`targets` must be at least 0, got {int(classes.min())}")
    return classes.long()


def _members(classes: Tensor) -> dict[int, Tensor]:
    members = {label: (classes == label).nonzero().flatten() for label in classes.unique().tolist()}
    if alone := [label for label, own in members.items() if len(own) == 1]:
        raise ValueError(f"`targets` must have no class with one member, class {alone[0]} has one: it has no partner")
    return members


def _sized(dataset: Samples) -> Samples:
    if isinstance(dataset, Tensor):
        check_dims("dataset", dataset, 1, "(N, ...)")
    return dataset


def _other(members: Tensor, first: int, generator: torch.Generator | None) -> int:
    """A member that is not ``first``, which need not be a member itself."""
    others = members[members != first]
    return int(others[int(torch.randint(len(others), (), generator=generator))])


def _sample(dataset: Samples, index: int) -> Any:
    sample = dataset[index]
    return sample[0] if isinstance(sample, tuple | list) else sample


def _seeded(*numbers: int) -> torch.Generator:
    seed = 0
    for number in numbers:
        seed = (seed * 6364136223846793005 + int(number) + 1442695040888963407) % 2**63
    return torch.Generator().manual_seed(seed)
