"""The stable rank of weights as a term for modules that assemble their own loss."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_plugins._checks import check_bool, check_finite_number
from lightning_plugins._lightning import LightningModule
from lightning_plugins.callbacks._terms.logged import log_sum, log_value
from lightning_plugins.distributed import full_tensor
from lightning_plugins.functional.stable_rank import check_power, modified_stable_rank, stable_rank
from lightning_plugins.mixins._packages import refuse_other_package
from lightning_plugins.weights import check_rank, check_scheme, select_targets


class StableRankMixin:
    """Gives a LightningModule ``self.stable_rank_penalty(layers, weight)``, an ordinary term of a loss.

    It uses autograd, so it also supports weights computed by a parametrization, and can be differentiated twice. Every
    call decomposes each weight; `lightning_plugins.callbacks.StableRankRegularization`, which adds a closed-form
    gradient, is cheaper where it applies. If you accumulate batches, add it to the loss of each: it is then divided as
    your loss is.

    Example:
        >>> from lightning_plugins._lightning import LightningModule
        >>> class Model(StableRankMixin, LightningModule):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.backbone, self.head = torch.nn.Linear(8, 4), torch.nn.Linear(4, 2)
        ...
        ...     def training_step(self, batch, batch_idx):
        ...         loss = self.head(self.backbone(batch)).square().mean()
        ...         return loss + self.stable_rank_penalty("backbone", weight=0.1, rank=2)
        >>> bool(Model().training_step(torch.eye(8), 0).isfinite())
        True

    Source:
        Our reading of Eo et al., https://arxiv.org/abs/2111.15179.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Refuse a LightningModule of the package that this process does not use."""
        super().__init_subclass__(**kwargs)
        refuse_other_package(cls, StableRankMixin)

    def stable_rank_penalty(
        self,
        layers: str | Sequence[str],
        weight: float,
        *,
        rank: int | float | dict[str, int] | None = None,
        p: Literal[1, 2] = 1,
        scheme: Literal[1, 2] = 1,
        log: bool = False,
    ) -> Tensor:
        """The sum over layers of ``weight`` times the stable rank, or the modified stable rank if ``rank`` is given.

        Args:
            layers: As for `lightning_plugins.callbacks.StableRankRegularization`, like all arguments but ``log``.
            weight: Positive to lower the term's measure, negative to raise it.
            rank: The target rank.
            p: With ``rank``: 1 drives the singular values beyond it to zero, 2 lowers them.
            scheme: How a convolution's kernel becomes a matrix.
            log: Whether to log ``stable_rank/<layer>`` and ``stable_rank/penalty`` to the Trainer that runs the module.

        Returns:
            Scalar, in float32 for half-precision weights, else in their dtype.

        Raises:
            ValueError: If an argument is out of its range.
            TypeError: If an argument is of the wrong type, or this class is no ``nn.Module``.
        """
        check_finite_number("weight", weight)
        check_bool("log", log)
        if not isinstance(self, nn.Module):
            raise TypeError(f"`StableRankMixin` must be mixed into a LightningModule, got {type(self).__name__}")
        check_power(p)
        check_scheme(scheme)
        targets = select_targets(self, layers, rank=check_rank(rank), scheme=scheme, computed=True)
        values = {}
        for matrix, target in targets:
            whole = matrix.take(full_tensor(matrix.tensor))
            value = stable_rank(whole) if target is None else modified_stable_rank(whole, target, p)
            values[matrix.label] = value.sum()  # over the groups of a convolution
        penalty: Tensor = weight * torch.stack(list(values.values())).sum()
        if log and isinstance(self, LightningModule) and self._trainer is not None:
            for label, value in values.items():
                log_value(self, f"stable_rank/{label}", value.detach())
            log_sum(self, "stable_rank/penalty", penalty)
        return penalty
