"""Learn from a teacher: a frozen copy of the network as it was, another checkpoint, or another network."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_plugins._checks import check_finite_number, check_positive_number, check_text
from lightning_plugins._grouping import Group, grouped
from lightning_plugins._lightning import Callback, LightningModule, MisconfigurationException, Trainer
from lightning_plugins.callbacks._rows.compiled import is_compiled
from lightning_plugins.callbacks._rows.masks import LayerCall, Mask, Parameters, find_mask
from lightning_plugins.callbacks._rows.network_calls import NetworkCall, NetworkCalls, layer_pairs
from lightning_plugins.callbacks._rows.pool import callable_name
from lightning_plugins.callbacks._rows.readout import check_mask
from lightning_plugins.callbacks._rows.select import Select, check_select, selected
from lightning_plugins.callbacks._terms.distances import Distance, MatchedOutputs
from lightning_plugins.callbacks._terms.logged import claim_names, log_value, release_names
from lightning_plugins.callbacks._terms.projections import Projections
from lightning_plugins.callbacks._terms.teachers import START, check_teacher, make_teacher
from lightning_plugins.callbacks._terms.training_step import WrappedStep, join_training_step
from lightning_plugins.callbacks._trainer.progress import training_progress
from lightning_plugins.callbacks._trainer.requirements import (
    makes_layers_late,
    require_automatic_optimization,
    require_known_total,
    require_lightning_module,
    require_same_on_ranks,
    require_supported_strategy,
)
from lightning_plugins.schedules import Schedule


class Distillation(Callback):
    r"""Keep a network close to a teacher while it is trained or compressed.

    The module, or the part of it that ``network`` names, is called in ``training_step`` as ever; the teacher is called
    with the same arguments, in evaluation mode and without gradients. Added to the loss is ``weight`` times the sum of
    the mean distance of the outputs and, for each pair of ``layers``, that of their tensors. The means go over the
    valid positions of all processes together. The term is part of what ``training_step`` returns, so that logged
    losses, accumulation, loss scaling, clipping and DDP see it.

    The teacher is no part of the module: no optimizer, DDP or checkpoint's weights hold it. A copy that was made at the
    start is stored as this callback's state, so that a resumed training has the same teacher.

    Where a student's layer is narrower than its teacher's, a linear map from the one to the other is learnt along with
    the module, by an optimizer of its own, and discarded at the end.

    Args:
        teacher: ``"start"``: the network as it is when `fit` begins, before anything compresses it (put this callback
            first). The path of a checkpoint of the network (``.ckpt``, ``.pt``, ``.pth``, ``.safetensors``). The import
            path of a function that returns a network which takes the same arguments. Or such a network.
        outputs: Location of the tensor to match in the network's output: a key, attribute or index, such as
            ``"logits"``, or a list of them; None for the first tensor, False for none. Or
            `lightning_plugins.callbacks.MatchedOutputs`, which also has the loss and its temperature. Layers always
            have the mean squared error.
        layers: Layers whose tensors are to match: names within ``network``, or a mapping from those of the student
            to those of the teacher.
        network: Name of the module that is called in the step, as ``"model"``; empty for the `LightningModule` itself.
        weight: Factor on the sum.
        mask: Which positions are no padding: the name of an argument of ``network`` or of an entry of the batch, such
            as ``"attention_mask"``; as for `lightning_plugins.callbacks.VNERegularization`.
        layout: The dimensions of tensors that are not ``"NC"``, ``"NLC"`` or ``"NCHW"``, one letter each.
        schedule: Factor on ``weight`` as a function of training progress (`lightning_plugins.schedules`).
        projection_rate: The learning rate of the linear maps (Adam).

    Raises:
        ValueError: If an argument is out of its range.
        TypeError: If an argument is of the wrong type.

    Logs ``distillation/outputs`` and ``distillation/<layer>``, the distances, and ``distillation/penalty``, what was
    added to the loss.

    Example:
        >>> outputs = MatchedOutputs(select="logits", temperature=2.0)
        >>> callback = Distillation("start", network="model", outputs=outputs, mask="attention_mask")
        >>> callback.weight
        1.0

    Source:
        Hinton et al., 2015, https://arxiv.org/abs/1503.02531; layers: Romero et al., https://arxiv.org/abs/1412.6550,
        whose maps are trained first and alone. Ours: means over valid positions of all processes, the resumed teacher.
    """

    method = "distillation"

    @grouped(outputs=Group(MatchedOutputs, main="select"))
    def __init__(
        self,
        teacher: str | nn.Module = START,
        *,
        outputs: Select | Literal[False] | MatchedOutputs = None,
        layers: str | Sequence[str] | Mapping[str, str] = (),
        network: str = "",
        weight: float = 1.0,
        mask: Mask | dict[str, Any] = None,
        layout: str | None = None,
        schedule: Schedule | None = None,
        projection_rate: float = 1e-3,
    ) -> None:
        super().__init__()
        self.teacher = check_teacher(teacher)
        if not isinstance(outputs, MatchedOutputs):
            outputs = MatchedOutputs(select=False if outputs is False else check_select(outputs, "outputs"))
        self.outputs = outputs.path
        self.layers = layer_pairs(layers)
        if self.outputs is False and not self.layers:
            raise ValueError("`layers` must name a layer where `outputs=False`, or there is nothing to match, got none")
        self.network = check_text("network", network, "the name of a module")
        self.distance = Distance(outputs.loss, outputs.temperature, layout)
        self.weight = check_finite_number("weight", weight)
        self._mask: Mask = check_mask(mask)
        if schedule is not None and not isinstance(schedule, Schedule):
            raise TypeError(f"`schedule` must be a Schedule, got {schedule!r} ({type(schedule).__name__})")
        self.schedule = schedule
        self._projections = Projections(check_positive_number("projection_rate", projection_rate))
        self._own: nn.Module | None = None  # the teacher
        self._saved: dict[str, Any] | None = None  # of a checkpoint, until there is a teacher to load it into
        self._calls: tuple[NetworkCalls, NetworkCalls] | None = None
        self._step: WrappedStep | None = None
        self._parameters: Parameters
        self._names: dict[str, str] = {}

    @property
    def state_key(self) -> str:
        """Unique for every different instance, so that several keep their own entries in a checkpoint."""
        teacher = (
            type(self.teacher).__qualname__ if isinstance(self.teacher, nn.Module) else callable_name(self.teacher)
        )
        return self._generate_state_key(
            teacher=teacher, outputs=self.outputs, layers=self.layers, network=self.network, loss=self.distance.loss
        )

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check the module and the Trainer, copy the network, and join the training step."""
        if stage != "fit":
            return
        name = type(self).__name__
        require_lightning_module(name, pl_module)
        require_automatic_optimization(name, pl_module, mixin="DistillationMixin")
        require_supported_strategy(name, trainer)
        rates = self.weight, self.schedule, self._projections.rate
        require_same_on_ranks(name, (), f"{self.state_key} {vars(self.distance)} {rates}")
        require_known_total(name, self.schedule, trainer)
        if trainer.global_step == 0:  # a new training; a checkpoint's state comes after this hook
            self._own, self._saved = None, None
            self._projections = Projections(self._projections.rate)
        self._step = join_training_step(pl_module, self)
        if not makes_layers_late(pl_module):
            self._prepare(pl_module)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Copy a network that the module's ``setup`` or ``configure_model`` has just made; go where the module is."""
        own = self._prepare(pl_module)
        trainer.precision_plugin.convert_module(own)
        mine, theirs = next(pl_module.parameters(), None), next(own.parameters(), None)
        if mine is not None and theirs is not None:
            own.to(mine.device, mine.dtype if self.teacher != START else theirs.dtype)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave the module as it was."""
        for calls in self._calls or ():
            calls.detach()
        if self._step is not None:
            self._step.leave(self)
        self._calls = self._step = None
        release_names(pl_module, self)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave the module as it was: ``teardown`` does not run after an exception."""
        self.teardown(trainer, pl_module, stage="fit")

    def recording(self, pl_module: LightningModule) -> AbstractContextManager[None]:
        """Record the network's calls (for the wrapper of the training step)."""
        if self._own is None:
            return nullcontext()
        if self._saved is not None:
            self._restore(self._saved, self._own)
        return self._both(pl_module, self._own)[0].recording()

    def penalty(self, pl_module: LightningModule) -> Tensor | None:
        """The distance from the teacher at this step (for the wrapper of the training step)."""
        if self._own is None or self._calls is None:
            return None
        found: dict[str, list[Tensor]] = {}
        batch = self._step.batch if self._step is not None else None
        for call in self._calls[0].take():
            for label, distance in self._distances(call, self._taught(call, self._own), batch).items():
                found.setdefault(label, []).append(distance)
        means = {label: torch.stack(distances).mean() for label, distances in found.items()}
        for label, mean in means.items():
            log_value(pl_module, self._names[label], mean.detach())
        return self.weight * self._factor(pl_module.trainer) * torch.stack(list(means.values())).sum()

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        """Let the linear maps take their step."""
        self._projections.step(trainer)

    def state_dict(self) -> dict[str, Any]:
        """The teacher, if it is a copy made at the start, and the linear maps."""
        if self._own is None or self._saved is not None:
            return dict(self._saved or {})
        kept = {name: tensor.clone() for name, tensor in self._own.state_dict().items()}
        return {"teacher": kept if self.teacher == START else None, "projections": self._projections.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with a checkpoint's teacher and maps."""
        self._saved = state_dict

    def _prepare(self, pl_module: LightningModule) -> nn.Module:
        if self._own is None:
            self._own = make_teacher(self.teacher, self._student(pl_module))
        self._both(pl_module, self._own)
        labels = [*([] if self.outputs is False else ["outputs"]), *self.layers]
        wanted = [(f"{self.method}/{label}", f"{self.method}/{self.network}.{label}") for label in labels]
        self._names = dict(zip(labels, claim_names(pl_module, self, wanted), strict=True))
        return self._own

    def _restore(self, state: dict[str, Any], teacher: nn.Module) -> None:
        self._saved = None
        if state.get("teacher") is not None:
            try:
                teacher.load_state_dict(state["teacher"])
            except RuntimeError as error:
                raise MisconfigurationException(
                    "the checkpoint's teacher has another structure than the network has when `fit` begins; resume "
                    f"from the module as its constructor makes it: {error}"
                ) from error
        if state:
            self._projections.load_state_dict(state["projections"])

    def _student(self, pl_module: LightningModule) -> nn.Module:
        try:
            found: nn.Module = pl_module.get_submodule(self.network)
        except AttributeError as error:
            raise MisconfigurationException(
                f"`network` must name a module that is called in the step: {error}"
            ) from error
        return found

    def _both(self, pl_module: LightningModule, teacher: nn.Module) -> tuple[NetworkCalls, NetworkCalls]:
        """The recorders of both networks; recreated after a surgery has replaced layers of the student."""
        student = self._student(pl_module)
        if self._calls is None or not self._calls[0].fits(student):
            for calls in self._calls or ():
                calls.detach()
            self._parameters = Parameters(student)
            compiled, taught = is_compiled(pl_module), list(dict.fromkeys(self.layers.values()))
            self._calls = (
                NetworkCalls(student, list(self.layers), role="student", needs_gradient=True, compiled=compiled),
                NetworkCalls(teacher, taught, role="teacher", needs_gradient=False),
            )
        return self._calls

    def _taught(self, call: NetworkCall, teacher: nn.Module) -> NetworkCall:
        """Return the teacher's outputs for the same arguments."""
        recorder = self._calls[1]  # type: ignore[index]  # the student's calls have just been taken
        with torch.no_grad(), recorder.recording():
            teacher(*call.args, **call.kwargs)
        return recorder.take()[0]

    def _distances(self, student: NetworkCall, teacher: NetworkCall, batch: Any) -> dict[str, Tensor]:
        found = {}
        arguments = self._parameters.bound(student.args, student.kwargs)
        if self.outputs is not False:
            one, other = (
                selected(call.output, self.outputs, self.network or "the network") for call in (student, teacher)
            )
            found["outputs"] = self._compared("outputs", self.distance, (one, other), (arguments, batch))
        between = Distance("mse", 1.0, self.distance.layout)
        for label, name in self.layers.items():
            pair = student.layers[label], teacher.layers[name]
            found[label] = self._compared(label, between, pair, (arguments, batch))
        return found

    def _compared(self, label: str, distance: Distance, pair: tuple[Any, Any], given: tuple[Any, Any]) -> Tensor:
        arguments, batch = given
        try:
            mask = find_mask(LayerCall(pair[0], arguments, (), batch), self._mask, label)
            mine, valid = distance.places("student", pair[0], mask)
            theirs, _ = distance.places("teacher", pair[1], None)
            if mine.shape[:2] != theirs.shape[:2]:
                raise ValueError(f"the teacher gives {tuple(pair[1].shape)}, the student {tuple(pair[0].shape)}")
            if label != "outputs" and (mine.shape[-1] != theirs.shape[-1] or label in self._projections.weights):
                mine = self._projections(label, mine, theirs.shape[-1])
            return distance(mine, theirs, valid)
        except (TypeError, ValueError) as error:
            raise type(error)(f"`{'outputs' if label == 'outputs' else 'layers'}`: {label!r}: {error}") from error

    def _factor(self, trainer: Trainer) -> float:
        if self.schedule is None:
            return 1.0
        return self.schedule(training_progress(trainer, with_totals=self.schedule.needs_total))
