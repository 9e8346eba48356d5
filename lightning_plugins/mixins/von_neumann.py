"""The von Neumann entropy term for modules that assemble their own loss."""

from typing import Any, Literal

from torch import Tensor

from lightning_plugins._checks import check_finite_number, check_text
from lightning_plugins._lightning import LightningModule
from lightning_plugins.callbacks._rows.pool import Pool, resolve_pool
from lightning_plugins.callbacks._terms.logged import log_mean, log_sum
from lightning_plugins.functional.pooling import check_layout, pool_embeddings
from lightning_plugins.mixins._packages import refuse_other_package
from lightning_plugins.regularizers.von_neumann import VonNeumannEntropy


class VNEMixin:
    """Gives a LightningModule ``self.vne_penalty(features)``, for automatic and manual optimization alike.

    It keeps nothing between steps and adds nothing to checkpoints. Under manual optimization add the penalty to the
    loss before `manual_backward`; if you accumulate batches there, scale the sum as you scale your loss.

    Example:
        >>> import torch
        >>> from lightning_plugins._lightning import LightningModule
        >>> class Model(VNEMixin, LightningModule):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.backbone, self.head = torch.nn.Linear(8, 4), torch.nn.Linear(4, 2)
        ...
        ...     def training_step(self, batch, batch_idx):
        ...         features = self.backbone(batch[0])
        ...         loss = torch.nn.functional.cross_entropy(self.head(features), batch[1])
        ...         return loss + self.vne_penalty(features, weight=0.1)
        >>> batch = torch.eye(8), torch.zeros(8, dtype=torch.long)
        >>> bool(Model().training_step(batch, 0).isfinite())
        True

    Source:
        Kim et al., CVPR 2023, https://arxiv.org/abs/2304.01434.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Raise an error for a LightningModule of the package that this process does not use."""
        super().__init_subclass__(**kwargs)
        refuse_other_package(cls, VNEMixin)

    def vne_penalty(
        self,
        features: Tensor,
        weight: float,
        *,
        pool: Pool = "mean",
        mask: Tensor | None = None,
        layout: str | None = None,
        scope: Literal["global", "local"] = "global",
        name: str | None = None,
    ) -> Tensor:
        """The term ``-weight * S`` of a batch of representations.

        Args:
            features: Floating tensor of shape ``(N, d)`` or of the ``layout``; or packed or nested sequences.
            weight: Positive to raise the entropy, negative to lower it.
            pool: How tensors of higher order become a matrix; see `lightning_plugins.callbacks.VNERegularization`.
            mask: Which positions are no padding; see `lightning_plugins.functional.pool_embeddings`.
            layout: Dimensions of a tensor of higher order, such as ``"NLC"`` or ``"NCHW"``.
            scope: ``"global"``: the entropy of the batch of all ranks together (every rank must then call this);
                ``"local"``: of this rank's own rows.
            name: If given, and a Trainer runs this module, logs ``vne/<name>/entropy`` (nats, the mean of the calls of
                this name in a batch) and ``vne/penalty`` (the sum of all terms of a batch).

        Returns:
            Scalar, in float32 for half-precision features, else in their dtype.

        Raises:
            ValueError: If an argument is out of its range or ``features`` cannot be pooled to a matrix.
            TypeError: If ``features`` is not a floating tensor.
        """
        term = VonNeumannEntropy(check_finite_number("weight", weight), scope=scope)
        entropy = term.entropy(pool_embeddings(features, resolve_pool(pool), layout=check_layout(layout), mask=mask))
        penalty = -weight * entropy
        if name is not None:
            check_text("name", name)
        if name is not None and isinstance(self, LightningModule) and self._trainer is not None:
            log_mean(self, f"vne/{name}/entropy", entropy)
            log_sum(self, "vne/penalty", penalty)
        return penalty
