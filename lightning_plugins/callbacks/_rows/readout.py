"""From a layer's tensor to rows: selection of the tensor, its layout, valid positions, and pooling."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from lightning_plugins._checks import check_instance
from lightning_plugins.callbacks._rows.layouts import LayerLayout, UnknownLayoutError
from lightning_plugins.callbacks._rows.masks import LayerCall, Mask, find_mask
from lightning_plugins.callbacks._rows.pool import Pool, callable_name, resolve_callable, resolve_pool
from lightning_plugins.callbacks._rows.select import Select, Step, check_select
from lightning_plugins.functional.pooling import check_layout, pool_embeddings
from lightning_plugins.selection import TensorRef


@dataclass(frozen=True, kw_only=True)
class Readout:
    """Rules by which the tensors of layers become rows: one embedding per sample, or per token.

    In YAML a mapping, without a class path: ``readout: {pool: cls, mask: attention_mask}``.

    Attributes:
        pool: How a feature map or token sequence becomes a matrix of embeddings: ``"mean"`` or ``"max"`` over the valid
            positions, ``"first"`` or ``"last"`` of them, ``"cls"`` (the first position), ``"tokens"`` (every valid
            position is a row), ``"flatten"``, or a callable from the layer's tensor (and the mask, if one is named) to
            a tensor of shape ``(N, d)``; also its import path, or its ``class_path`` and ``init_args``.
        select: Which tensor of a nested output (or input): an index, a key, an attribute, or a list of them from the
            outside in, as ``["hidden_states", -1]``. By default the first one, of a transformers output
            ``last_hidden_state``.
        mask: Which positions are no padding: the name of an argument that the layer, or a module around it, receives in
            the same call, or of an entry of the batch (an int: its position), or a callable from the
            `lightning_plugins.callbacks.LayerCall` to the mask, or its import path; see
            `lightning_plugins.functional.pool_embeddings`. A name that ends in ``padding_mask`` is, as in torch, true
            at the padding. Packed and nested sequences need none.
        layout: What the dimensions of the tensor are, one letter each, as ``"NLC"``; needed where the module does not
            tell.

    Raises:
        ValueError: If a field is out of its range.
        TypeError: If a field is of the wrong type.

    Example:
        >>> Readout(pool="last", mask="attention_mask").masked
        True
    """

    pool: Pool = "mean"
    select: Select = None
    mask: Mask | Mapping[str, Any] = None
    layout: str | None = None

    def __post_init__(self) -> None:
        check_layout(self.layout)
        _ = self.path, self._pool, self._mask

    @cached_property
    def path(self) -> tuple[Step, ...] | None:
        """The steps that lead to the tensor; None for the first one."""
        return check_select(self.select)

    @cached_property
    def _pool(self) -> Any:
        return resolve_pool(self.pool)

    @cached_property
    def _mask(self) -> Any:
        return check_mask(self.mask)

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


def check_readout(readout: Readout) -> Readout:
    """Return ``readout`` if it is one.

    Raises:
        TypeError: If it is of another type.
    """
    return check_instance("readout", readout, Readout, "a Readout, such as `Readout(pool='cls')`")
