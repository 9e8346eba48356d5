"""The mask that belongs to one call of a layer: from its arguments, those of the calls around it, or the batch."""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from lightning_plugins._checks import nearest

Mask = str | int | Callable[["LayerCall"], Tensor | None] | None


class Parameters:
    """The names of the arguments of a module's ``forward``, looked up once."""

    def __init__(self, module: nn.Module) -> None:
        parameters = inspect.signature(module.forward).parameters.values()
        self.names = tuple(p.name for p in parameters if p.kind in {p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD})

    def bound(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments of a call by name; those that were left out, and those without a name, are not there."""
        return {**dict(zip(self.names, args, strict=False)), **kwargs}


@dataclass(frozen=True)
class LayerCall:
    """One call of a layer, for a callable `mask`.

    Attributes:
        features: The layer's tensor.
        arguments: What the layer received, by the names in the signature of its ``forward``.
        around: The same of the calls around it that were under way, the innermost first.
        batch: The batch of the step; None where the step fetches it itself.
    """

    features: Any
    arguments: Mapping[str, Any]
    around: Sequence[Mapping[str, Any]] = ()
    batch: Any = None

    def __getitem__(self, name: str | int) -> Any:
        """The argument or entry of the batch of that name, the nearest call's first; None where it is None everywhere.

        Returns:
            The value.

        Raises:
            KeyError: If nothing has that name.
        """
        candidates = list(self.candidates(name))
        if not candidates:
            raise KeyError(name)
        return next((value for value in candidates if value is not None), None)

    def candidates(self, name: str | int) -> Iterator[Any]:
        """All values of that name: of the layer's call, of those around it from the inside, and in the batch."""
        if isinstance(name, str):
            given = [call[name] for call in (self.arguments, *self.around) if name in call]
            yield from given
            if any(value is None for value in given):
                return  # this call was made without a mask, whatever the batch holds for another one
        yield from _entries(self.batch, name)


def find_mask(call: LayerCall, mask: Mask, label: str) -> Tensor | None:
    """The mask of one call, true where valid (or what `pool_embeddings` reads as that).

    Args:
        call: The call.
        mask: The name or position that the user gave, or a callable.
        label: The layer, for the message.

    Returns:
        The mask; None where the call was made without one.

    Raises:
        ValueError: If nothing has the name.
        TypeError: If what has it is not a tensor.
    """
    if mask is None:
        return None
    if callable(mask):
        found = mask(call)
        if found is not None and not isinstance(found, Tensor):
            raise TypeError(f"`mask` must return a tensor or None, got {type(found).__name__}")
        return found
    candidates = list(call.candidates(mask))
    if not candidates:
        raise ValueError(_not_found(call, mask, label))
    given = [value for value in candidates if value is not None]
    if not given:
        return None
    dimensions = getattr(call.features, "ndim", 0)
    of_positions = [value for value in given if isinstance(value, Tensor) and _free_dimensions(value) < dimensions]
    for value in of_positions or given:
        if isinstance(value, Tensor):
            return _true_where_valid(value, mask)
    kinds = ", ".join(str(tuple(v.shape)) if isinstance(v, Tensor) else type(v).__name__ for v in given)
    raise TypeError(
        f"`mask={mask!r}` must be a tensor with one entry a position, samples first, got {kinds}; name the argument or "
        "entry that the model makes it from, or give a callable"
    )


def _free_dimensions(value: Tensor) -> int:
    """Dimensions but for inner ones of one entry: a mask of attention, of pairs of positions, has one too many."""
    inner = value.shape[1:-1]
    return value.ndim - sum(size == 1 for size in inner)


def _true_where_valid(value: Tensor, name: str | int) -> Tensor:
    """Invert torch's kind of mask, ``key_padding_mask``, which is true at the padding."""
    if isinstance(name, str) and name.endswith("padding_mask") and not value.is_floating_point():
        return value == 0
    return value


def _entries(batch: Any, name: str | int) -> Iterator[Any]:
    """Return the entry of a batch, or of its parts, under a name or at a position."""
    if isinstance(name, int):
        if isinstance(batch, Sequence) and not isinstance(batch, str) and -len(batch) <= name < len(batch):
            yield batch[name]
        return
    if isinstance(batch, Mapping) and name in batch:
        yield batch[name]
    elif (not isinstance(batch, Mapping | Tensor | Sequence) and hasattr(batch, name)) or (
        isinstance(batch, tuple) and name in getattr(batch, "_fields", ())
    ):
        yield getattr(batch, name)
    elif isinstance(batch, list | tuple):
        for part in batch:
            if not isinstance(part, Tensor):
                yield from _entries(part, name)


def _not_found(call: LayerCall, mask: str | int, label: str) -> str:
    if isinstance(mask, int):
        return f"`mask={mask}` must be a position in the batch, got a batch of the type {type(call.batch).__name__}"
    known = {name for arguments in (call.arguments, *call.around) for name in arguments}
    known.update(_names(call.batch))
    near = nearest(mask, sorted(known), limit=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    there = ", ".join(sorted(known)) or "none with a name"
    return (
        f"`mask={mask!r}` must be an argument that {label!r} or a module around it receives, or an entry of the batch; "
        f"got {there}{hint}"
    )


def _names(batch: Any) -> set[str]:
    if isinstance(batch, Mapping):
        return {str(name) for name in batch}
    if isinstance(batch, list | tuple):
        fields = set(getattr(batch, "_fields", ()))
        return fields.union(*(_names(part) for part in batch if not isinstance(part, Tensor)))
    own = {} if isinstance(batch, Tensor) else getattr(batch, "__dict__", {})
    return {name for name in own if not name.startswith("_")}
