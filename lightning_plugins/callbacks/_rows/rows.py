"""The rows of a layer: selection of the tensor, its layout, valid positions, and pooling."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from lightning_plugins.callbacks._rows.layouts import LayerLayout, UnknownLayoutError
from lightning_plugins.callbacks._rows.masks import LayerCall, Mask, find_mask
from lightning_plugins.callbacks._rows.pool import Pool, callable_name, resolve_callable, resolve_pool
from lightning_plugins.callbacks._rows.select import Select, Step, check_select
from lightning_plugins.functional.pooling import check_layout, pool_embeddings
from lightning_plugins.selection import TensorRef


@dataclass(frozen=True)
class Rows:
    """Settings by which tensors of layers become rows, checked in the constructor.

    Args:
        pool: A name out of `lightning_plugins.functional.pooling.POOLS`, a callable, its import path, or a mapping with
            ``class_path`` and ``init_args``.
        select: Location of the tensor in the layer's output: an index, a key, an attribute, or a list of them.
        mask: The name of an argument or entry of the batch, the position of an entry, or a callable or its import path.
        layout: As for `pool_embeddings`; None takes it from the module.

    Raises:
        ValueError: If an argument is out of its range.
        TypeError: If an argument is of the wrong type.
    """

    pool: Pool = "mean"
    select: Select = None
    mask: Mask | Mapping[str, Any] = None
    layout: str | None = None
    path: tuple[Step, ...] | None = field(init=False, repr=False)
    _pool: Any = field(init=False, repr=False)
    _mask: Any = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", check_select(self.select))
        object.__setattr__(self, "_pool", resolve_pool(self.pool))
        object.__setattr__(self, "_mask", check_mask(self.mask))
        check_layout(self.layout)

    @property
    def masked(self) -> bool:
        """True if there is a mask to look for."""
        return self._mask is not None

    def key(self) -> dict[str, str]:
        """The settings for a state key: the pool, and what else is not as by default."""
        others = {"select": self.path, "mask": self.mask, "layout": self.layout}
        named = {
            name: callable_name(value) if callable(value) or isinstance(value, Mapping) else str(value)
            for name, value in others.items()
            if value is not None
        }
        return {"pool": callable_name(self.pool), **named}

    def layout_of(self, model: nn.Module, reference: TensorRef) -> LayerLayout:
        """Return the layout of one layer's tensor as far as it follows from the model."""
        return LayerLayout(model, reference.module, reference.side, self.path[0] if self.path else None)

    def of(self, call: LayerCall, known: LayerLayout | None, label: str) -> Tensor:
        """The embeddings of one call of a layer.

        Args:
            call: The call.
            known: What the model tells of the layout; None if there is no model.
            label: The layer, for the message.

        Returns:
            Tensor of shape ``(N, d)``.

        Raises:
            ValueError: If the layout is not known, or anything does not fit; naming the layer.
            TypeError: If something is not a tensor.
        """
        try:
            features, layout = call.features, self.layout
            framed = isinstance(features, Tensor) and not features.is_nested
            if isinstance(self._pool, str) and framed and layout is None and known is not None and features.ndim > 1:
                layout = self._known_layout(features, known)
            mask = find_mask(call, self._mask, label) if self._mask is not None else None
            if not framed and isinstance(self._pool, str):
                mask = None  # such sequences hold no padding
            return pool_embeddings(features, self._pool, layout=layout, mask=mask)
        except (TypeError, ValueError) as error:
            text = str(error).removeprefix("`features`: ")  # the layer named by the user
            raise type(error)(f"`layers`: {label!r}: {text}") from error

    def _known_layout(self, features: Tensor | PackedSequence, known: LayerLayout) -> str | None:
        shape = tuple(features.shape)  # type: ignore[union-attr]  # a tensor
        layout = known.of(shape)
        if len(shape) == 2:
            return None
        if layout is None and (self._pool not in {"mean_last", "flatten"} or not known.samples_first):
            raise UnknownLayoutError(
                f"the dimensions of its tensor of shape {shape} cannot be inferred from the module; name them with "
                "`layout`, such as 'NLC' (tokens), 'NCL', 'LNC' (tokens before samples), 'NCHW' or 'NHWC'"
            )
        return layout


def check_mask(mask: Mask | Mapping[str, Any]) -> Mask:
    """Return ``mask`` if it names one, or the callable that it is or names.

    Raises:
        ValueError: If it is an empty name, or nothing can be imported from it.
        TypeError: If it is of another kind.
    """
    if mask is None or (isinstance(mask, int) and not isinstance(mask, bool)):
        return mask
    if isinstance(mask, str) and "." not in mask:
        if not mask:
            raise ValueError("`mask` must be the name of an argument or entry of the batch, got ''")
        return mask
    if isinstance(mask, bool | Tensor):
        raise TypeError(
            f"`mask` must be the name of an argument or entry of the batch, its position, or a callable, got "
            f"{type(mask).__name__}"
        )
    return resolve_callable("mask", mask, "the name of an argument or entry of the batch, its position")
