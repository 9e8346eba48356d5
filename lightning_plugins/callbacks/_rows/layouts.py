"""Dimensions of a layer's tensor, from the module that made it: known, or not known, never guessed."""

import re
from collections.abc import Iterable, Iterator
from typing import Literal

from torch import nn

from lightning_plugins.selection import WRAPPERS, Side

Order = Literal["NC...", "N...C", "LNC"]

_NUMBERED = re.compile(r"[A-Za-z]+([123])d$")  # Conv2d, LazyBatchNorm1d, AdaptiveAvgPool3d, timm's LayerNorm2d
_ANY_RANK = (nn.GroupNorm, nn.Upsample, nn.LocalResponseNorm, nn.PixelShuffle, nn.PixelUnshuffle, nn.ChannelShuffle)
_LAST = (nn.Linear, nn.Bilinear, nn.Embedding, nn.EmbeddingBag)
_TRANSFORMERS = (
    nn.Transformer,
    nn.TransformerEncoder,
    nn.TransformerDecoder,
    nn.TransformerEncoderLayer,
    nn.TransformerDecoderLayer,
)
_SEQUENCES = (nn.RNNBase, nn.MultiheadAttention, *_TRANSFORMERS)
_WIDTHS = (
    *("in_features", "out_features", "in_channels", "out_channels", "num_features", "num_channels"),
    *("embedding_dim", "embed_dim", "hidden_size", "input_size", "nf", "nx"),
)


class UnknownLayoutError(ValueError):
    """The layout of a tensor cannot be inferred from the module or its surroundings."""


class LayerLayout:
    """The layout of one layer's input or output, as far as it follows from the model.

    Args:
        model: The model.
        module: The layer.
        side: Of which tensor.
        element: The first step of `select`, where it is an index: which element of a tuple is meant.
    """

    def __init__(self, model: nn.Module, module: nn.Module, side: Side, element: object = None) -> None:
        self._module = _unwrapped(module)
        self._side: Side = side
        self._element = element if side == "output" else None
        self._parents = _parents(model, self._module)
        self._model = model
        self._found: dict[tuple[int, ...], Order | None] = {}

    def of(self, shape: tuple[int, ...]) -> Order | None:
        """The layout of a tensor.

        Args:
            shape: Its shape.

        Returns:
            A layout, or None where nothing is known.

        Raises:
            ValueError: If the layer was called on a single sample, without a dimension of samples.
        """
        if shape not in self._found:
            self._found[shape] = self._work_out(shape)
        return self._found[shape]

    @property
    def samples_first(self) -> bool:
        """True if nothing in the model has tokens before samples."""
        return all(_batch_first(module) for module in self._model.modules() if isinstance(module, _SEQUENCES))

    def _work_out(self, shape: tuple[int, ...]) -> Order | None:
        own = _of_module(self._module, shape, self._side, self._element)
        if isinstance(self._module, _SEQUENCES):
            return own
        if own is None and _is_neutral(self._module):
            own = self._of_neighbours(shape)
        if own is None and not _is_neutral(self._module):
            own = _of_inside(self._module, shape, selected=self._element is not None)
        if own is None and _is_neutral(self._module):
            around = (_of_inside(parent, shape) for parent in self._parents)
            own = next((found for found in around if found is not None), None)
        if own == "N...C" and len(shape) == 3:
            return self._of_tokens()
        return own

    def _of_neighbours(self, shape: tuple[int, ...]) -> Order | None:
        """Return the layout of the layers before or after a layer that keeps it, in the sequence that it is part of."""
        parent = next(iter(self._parents), None)
        if not isinstance(parent, nn.Sequential):
            return None
        children = [_unwrapped(child) for child in parent]
        at = next(i for i, child in enumerate(children) if child is self._module)
        before = _first_known(reversed(children[:at]), shape, "output")
        return before or _first_known(children[at + 1 :], shape, "input")

    def _of_tokens(self) -> Order | None:
        """Return the layout where channels are last, as around a linear layer: samples first, or tokens first."""
        for parent in self._parents:
            if isinstance(parent, _TRANSFORMERS):
                return "N...C" if _batch_first(parent) else "LNC"
        return "N...C" if self.samples_first else None


def _of_module(module: nn.Module, shape: tuple[int, ...], side: Side, element: object) -> Order | None:
    """The layout from a module's own type."""
    if isinstance(module, _SEQUENCES):
        return _of_sequence(module, shape, element)
    rank = _rank(module)
    if rank is not None:
        _require_samples(module, shape, rank + 2)
        return "NC..." if len(shape) == rank + 2 else None
    if isinstance(module, _ANY_RANK):
        return "NC..."
    if _is_last(module):
        return "N...C"
    if isinstance(module, nn.Sequential):
        children = [_unwrapped(child) for child in module]
        return _first_known(children if side == "input" else reversed(children), shape, side)
    return None


def _of_sequence(module: nn.Module, shape: tuple[int, ...], element: object) -> Order | None:
    if isinstance(module, nn.RNNBase) and element not in {None, 0}:
        return "LNC" if len(shape) == 3 else None  # the last states: layers, samples, features, whatever `batch_first`
    if isinstance(module, nn.MultiheadAttention) and element not in {None, 0}:
        return None  # attention weights
    _require_samples(module, shape, 3)
    return "N...C" if _batch_first(module) else "LNC"


def _require_samples(module: nn.Module, shape: tuple[int, ...], wanted: int) -> None:
    flat = isinstance(module, nn.BatchNorm1d) and len(shape) == 2
    if len(shape) == wanted - 1 and not flat:
        raise ValueError(
            f"{type(module).__name__} was called on one sample without a dimension of samples, its tensor has shape "
            f"{shape}; give it {wanted} dimensions, or say with `layout` what they are"
        )


def _first_known(modules: Iterable[nn.Module], shape: tuple[int, ...], side: Side) -> Order | None:
    for module in modules:
        if _is_neutral(module):
            continue
        try:
            return _of_module(module, shape, side, None) or _of_inside(module, shape)
        except ValueError:
            return None
    return None


def _of_inside(module: nn.Module, shape: tuple[int, ...], *, selected: bool = False) -> Order | None:
    """The layout from all layers inside a module: from their types, held against their widths.

    A module may turn its tensor, so types alone prove nothing: where one of the two candidates has as many entries as a
    layer inside has features, and the other has not, it must be the one that the types name too. Of several tensors of
    a module, one that was ``selected`` need not be features at all: its width must be among those inside.

    Returns:
        A layout; None where types and widths do not agree on one.
    """
    widths_of: dict[str, set[int]] = {}
    for layer in module.modules():
        rank = _rank(layer)
        if rank is not None or isinstance(layer, _ANY_RANK):
            kind = "NC..." if rank in {None, len(shape) - 2} else "other"
        elif _is_last(layer) or isinstance(layer, _SEQUENCES):
            kind = "N...C" if not isinstance(layer, _SEQUENCES) or _batch_first(layer) else "LNC"
        else:
            continue
        widths_of.setdefault(kind, set()).update(_widths(layer))
    kinds, widths = set(widths_of), set().union(*widths_of.values())
    places = {"NC...": shape[1], "N...C": shape[-1]}
    decided = [layout for layout, width in places.items() if width in widths]
    if len(decided) == 2 and len(kinds) > 1:  # a width of the one kind may be a size of the other by chance
        decided = [layout for layout in decided if places[layout] in widths_of.get(layout, ())]
    if len(kinds) == 1 and kinds <= {"NC...", "N...C"} and (decided or not selected):
        (kind,) = kinds
        return None if len(decided) == 1 and decided[0] != kind else kind  # type: ignore[return-value]  # narrowed above
    return decided[0] if len(decided) == 1 and "LNC" not in kinds else None  # type: ignore[return-value]  # as above


def _widths(layer: nn.Module) -> Iterator[int]:
    for name in _WIDTHS:
        width = getattr(layer, name, None)
        if isinstance(width, int):
            yield width
    shape = getattr(layer, "normalized_shape", None)
    if isinstance(shape, tuple) and len(shape) == 1:
        yield int(shape[0])


def _rank(module: nn.Module) -> int | None:
    """Return the number of spatial dimensions of a layer of torch's kind ``...1d``, ``...2d`` or ``...3d``."""
    kinds = type(module).__mro__
    if not any(kind.__module__.startswith("torch.nn.modules.") for kind in kinds[:-2] if kind is not nn.Module):
        return None
    found = next((match for kind in kinds if (match := _NUMBERED.match(kind.__name__))), None)
    return int(found[1]) if found else None


def _is_last(module: nn.Module) -> bool:
    shape = getattr(module, "normalized_shape", None)
    if shape is not None:
        return len(tuple(shape)) == 1
    name = type(module).__name__  # transformers' linear layer, and the norm that each of its families has for itself
    return isinstance(module, _LAST) or name == "Conv1D" or name.endswith("RMSNorm")


def _is_neutral(module: nn.Module) -> bool:
    """Return whether a layer of torch without children works element by element, or does nothing."""
    return (
        type(module).__module__.startswith("torch.nn.modules.")
        and not any(True for _ in module.children())
        and not isinstance(module, (*_SEQUENCES, *_ANY_RANK, nn.Flatten, nn.Unflatten, nn.Fold, nn.Unfold))
        and _rank(module) is None
        and not _is_last(module)
    )


def _batch_first(module: nn.Module) -> bool:
    if isinstance(module, nn.TransformerEncoder | nn.TransformerDecoder):
        return all(map(_batch_first, module.layers))
    if isinstance(module, nn.TransformerEncoderLayer | nn.TransformerDecoderLayer):
        return bool(module.self_attn.batch_first)
    return bool(getattr(module, "batch_first", True))


def _unwrapped(module: nn.Module) -> nn.Module:
    """The module inside `torch.compile` and activation checkpointing."""
    for name in WRAPPERS:
        inner = module._modules.get(name)
        if inner is not None:
            return _unwrapped(inner)
    return module


def _parents(model: nn.Module, module: nn.Module) -> list[nn.Module]:
    """The modules around ``module``, the innermost first."""
    name = next((name for name, known in model.named_modules() if known is module), "")
    parts = name.split(".")
    around = [model.get_submodule(".".join(parts[:i])) for i in range(len(parts) - 1, -1, -1)] if name else []
    return [parent for parent in around if _unwrapped(parent) is not module]
