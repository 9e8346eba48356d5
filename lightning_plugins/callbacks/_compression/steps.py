"""Uses of channels in a module's steps that its forward pass does not show: auxiliary heads, decoders, losses."""

import copy
from typing import Any

from torch import nn

from lightning_plugins._lightning import LightningModule, Trainer, is_overridden, isolate_rng
from lightning_plugins.callbacks._compression.rank_search import step_arguments, without_log
from lightning_plugins.compression.channels.group import ChannelGroup
from lightning_plugins.compression.channels.verify import tried
from lightning_plugins.compression.networks.evaluation import evaluation
from lightning_plugins.compression.networks.parametrizations import plain_copy

_STEPS = ("training_step", "validation_step", "test_step", "predict_step")


class StepTrial:
    """Runs the steps of a copy of a module on one batch, to find the groups of channels that they do not need.

    Args:
        trainer: The Trainer inside of its `fit`.
        pl_module: Its module.
        batch: A batch of the training, on its device.

    Attributes:
        steps: The names of the steps that run on it.
    """

    def __init__(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> None:
        self.trainer, self.batch = trainer, batch
        self.model = plain_copy(pl_module)
        self.steps = tuple(name for name in _STEPS if is_overridden(name, pl_module) and self._runs(name))

    def refused(self, groups: list[ChannelGroup]) -> dict[str, str]:
        """Return the groups that the steps need.

        Args:
            groups: Groups that the forward pass does not need.

        Returns:
            Reasons by the names of groups.
        """
        if not self.steps:
            return {}
        _, failed = tried(self.model, groups, self.batch, self._run)
        return {group.name: f"in {' or '.join(self.steps)} {reason}" for group, reason in failed}

    def _runs(self, step: str) -> bool:
        try:
            self._call(copy.deepcopy(self.model), step, copy.deepcopy(self.batch))
        except Exception:  # noqa: BLE001 - the user's code, on a batch that may be another step's: it is not followed
            return False
        return True

    def _run(self, model: nn.Module, batch: Any) -> list[Any]:
        return [self._call(model, step, batch) for step in self.steps]

    def _call(self, model: Any, step: str, batch: Any) -> Any:
        vars(model).pop("training_step", None)  # what other callbacks wrap around it belongs to the module itself
        model._trainer = self.trainer
        method = getattr(type(model), step)
        try:
            with isolate_rng(), evaluation(model), without_log(model):
                return method(model, *step_arguments(method, batch))
        finally:
            model._trainer = None
