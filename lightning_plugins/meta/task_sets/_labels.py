"""The labels of a dataset, if possible without loading its samples."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from lightning_plugins.functional.tensors import check_dims, check_tensor

NAMES = ("targets", "labels", "_labels", "y")


def labels_of(dataset: Any) -> list[Any]:
    """One label per sample, from an attribute of the dataset or from its samples."""
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        raise TypeError(f"`dataset` must have `__len__` and `__getitem__`, got {type(dataset).__name__}")
    if isinstance(dataset, Mapping | str | bytes):
        raise TypeError(f"`dataset` must have samples by their numbers, got {type(dataset).__name__}")
    if isinstance(dataset, Tensor):
        check_tensor("dataset", dataset)
        check_dims("dataset", dataset, 1, "(N, ...)")
    found = _known_labels(dataset)
    if found is None:
        found = [_label_of(dataset[index], index) for index in range(len(dataset))]
    if len(found) != len(dataset):
        raise ValueError(f"`dataset` must have a label per sample, {len(dataset)}, got {len(found)}")
    return found


def names_of(dataset: Any, labels: Sequence[Any]) -> dict[Any, str]:
    """Return names of the labels for messages: the dataset's own if it has them."""
    while hasattr(dataset, "dataset"):  # a Subset
        dataset = dataset.dataset
    classes = getattr(dataset, "classes", ())
    names = dict(enumerate(map(str, classes))) if isinstance(classes, list | tuple) else {}
    return {label: names.get(label, repr(label)) for label in labels}


def _known_labels(dataset: Any) -> list[Any] | None:
    if hasattr(dataset, "dataset") and hasattr(dataset, "indices"):  # a Subset
        inner = _known_labels(dataset.dataset)
        return None if inner is None else [inner[index] for index in dataset.indices]
    if hasattr(dataset, "datasets"):  # a ConcatDataset
        parts = [_known_labels(part) for part in dataset.datasets]
        return None if None in parts else [label for part in parts if part is not None for label in part]
    if isinstance(getattr(dataset, "tensors", None), tuple):  # a TensorDataset
        return _as_list(dataset.tensors[-1])
    return next((_as_list(getattr(dataset, name)) for name in NAMES if _is_list(getattr(dataset, name, None))), None)


def _is_list(value: Any) -> bool:
    return hasattr(value, "tolist") or (isinstance(value, Sequence) and not isinstance(value, str))


def _as_list(labels: Any) -> list[Any]:
    values = labels.tolist() if hasattr(labels, "tolist") else list(labels)
    return [value.item() if hasattr(value, "item") else value for value in values]


def _label_of(sample: Any, index: int) -> Any:
    if not isinstance(sample, tuple | list) or len(sample) != 2:
        shown = f"{len(sample)} things" if isinstance(sample, tuple | list) else type(sample).__name__
        raise TypeError(f"`dataset` must give pairs (input, label), got {shown} at {index}")
    label = sample[1]
    if isinstance(label, Tensor) and label.numel() != 1:
        raise ValueError(f"`dataset` must give one label per sample, got shape {tuple(label.shape)} at {index}")
    return label.item() if hasattr(label, "item") else label
