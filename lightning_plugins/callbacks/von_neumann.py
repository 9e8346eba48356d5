"""The von Neumann entropy term as a callback for training loops that already exist."""

from typing import Literal

from torch import Tensor

from lightning_plugins._checks import check_choice
from lightning_plugins._grouping import grouped
from lightning_plugins._lightning import rank_zero_warn
from lightning_plugins.callbacks._rows.readout import Readout
from lightning_plugins.callbacks.representation_regularization import RepresentationRegularization
from lightning_plugins.regularizers.von_neumann import VonNeumannEntropy
from lightning_plugins.schedules import Schedule


class VNERegularization(RepresentationRegularization):
    r"""Raise or lower the von Neumann entropy of layers' representations during training.

    Adds ``-weight * S`` to the loss of every training step, where ``S``, in nats, is the entropy of the spectrum of the
    batch's autocorrelation matrix (`lightning_plugins.functional.von_neumann_entropy`). The term is part of what
    ``training_step`` returns: logged losses, gradient accumulation, loss scaling, clipping and DDP all see it.

    Several layers give one term each, and the terms are summed. A layer that a step calls several times (two views of
    a batch) gives the mean of its entropies.

    Args:
        layers: Dotted name of a layer, a glob over names, or several of them; ``"backbone.fc:input"`` selects its
            input, ``"backbone.fc"`` its output. The authors use the input of the last linear layer.
        weight: Positive to raise the entropy, negative to lower it; the authors advise an absolute value far
            below 0.5.
        readout: How a layer's tensor becomes rows, as ``Readout(pool="cls", mask="attention_mask")``; see
            `lightning_plugins.callbacks.Readout`.
        scope: ``"global"``: the entropy of the batch of all ranks together; ``"local"``: of each rank's own rows.
        queue_size: This many rows of earlier batches are remembered and join the spectrum, for batches too small to
            show it (fewer than about 32 rows). No gradient flows through them, so that N rows with a queue of Q want
            about (N + Q) / N times the ``weight``; they are saved in checkpoints.
        schedule: Factor on ``weight`` as a function of training progress (`lightning_plugins.schedules`).
        every_n_steps: Only every n-th optimizer step carries the term, then n times as strong.
        method: How the spectrum is computed; see `lightning_plugins.functional.von_neumann_entropy`.
        on_nonfinite: ``"skip"`` leaves out a term that is NaN or infinite, with one warning and a count in the log:
            nothing is added to the loss, and zeros flow back into the layer (which cannot undo a NaN that the layer
            multiplies them with); ``"raise"`` raises `FloatingPointError`, which costs a synchronisation with the
            device at every step.

    Raises:
        ValueError: If an argument is out of its range.
        TypeError: If an argument is of the wrong type.

    Logs ``vne/<layer>/entropy`` (nats) and ``vne/penalty`` (the sum of the terms of all such callbacks) at every step
    that carries the term, and ``vne/skipped`` once a term had to be left out.

    Under accumulation every batch has an entropy of its own, as it has a loss of its own; `queue_size` is the way to
    let batches see each other.

    Example:
        >>> from lightning_plugins.schedules import Warmup
        >>> callback = VNERegularization(layers="backbone.fc:input", weight=0.1, queue_size=256)
        >>> callback.weight
        0.1

    Source:
        Kim et al., CVPR 2023, https://arxiv.org/abs/2304.01434. `scope="global"`, `queue_size` and `schedule` are ours.
    """

    @grouped(readout=Readout)
    def __init__(
        self,
        layers: str | list[str],
        weight: float,
        *,
        readout: Readout = Readout(),
        scope: Literal["global", "local"] = "global",
        queue_size: int = 0,
        schedule: Schedule | None = None,
        every_n_steps: int = 1,
        method: Literal["auto", "eigh", "products"] = "auto",
        on_nonfinite: Literal["skip", "raise"] = "skip",
    ) -> None:
        self.scope = check_choice("scope", scope, ("global", "local"))
        super().__init__(
            layers,
            VonNeumannEntropy(scope=scope, method=method),
            weight,
            name="vne",
            readout=readout,
            queue_size=queue_size,
            schedule=schedule,
            every_n_steps=every_n_steps,
            on_nonfinite=on_nonfinite,
        )
        if abs(self.weight) >= 1:
            rank_zero_warn(
                f"`weight={self.weight}` is large: the authors advise an absolute value far below 0.5, beyond which "
                "the term flattens the spectrum of whatever the batch holds; start at 0.05 to 0.1"
            )

    @property
    def state_key(self) -> str:
        """Unique for every different instance, so that several keep their own entries in a checkpoint."""
        return self._generate_state_key(
            layers=self.layers,
            weight=self.weight,
            **self.readout.key(),
            scope=self.scope,
            queue_size=self.queue_size,
            schedule=repr(self.schedule),
            every_n_steps=self.every_n_steps,
        )

    _of_single = (
        "`layers`: {label!r} gave one row, whose entropy is always 0, so the term has no effect in such a step; "
        "make batches of about 32 rows or more, or remember earlier ones with `queue_size`"
    )

    def _name_of(self, label: str) -> str:
        return f"vne/{label}/entropy"

    def _shown(self, value: Tensor) -> Tensor:
        return -value  # the entropy, where the term is to be lowered
