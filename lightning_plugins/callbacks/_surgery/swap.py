"""The one place that swaps parameters of a module while a Trainer trains them.

Optimizers keep their groups, and each group its settings and its identity, to which schedulers refer. The state of a
parameter is carried over to its replacements, and DDP is wrapped again. An optimizer's state is saved by position, so
the parameters are put into the order of a fresh ``configure_optimizers``: otherwise a resumed training, whose module
has the new structure from the start, would give moments to the wrong parameters.
"""

import copy
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import nn
from torch.optim import ASGD, LBFGS, Optimizer

from lightning_plugins._lightning import (
    DDPStrategy,
    DeepSpeedStrategy,
    LightningModule,
    MisconfigurationException,
    ModelParallelStrategy,
    MultiProcessingLauncher,
    SingleDeviceStrategy,
    Trainer,
    callbacks,
    isolate_rng,
    rank_zero_warn,
)
from lightning_plugins.callbacks._surgery.rewrapping import compile_anew, wrap_anew
from lightning_plugins.callbacks._surgery.sharding import change_whole
from lightning_plugins.compression.networks.replacements import Replacement, Replacements
from lightning_plugins.compression.networks.sharded import is_sharded

# What optimizers remember of each entry of a parameter: averages of gradients, which map linearly, averages of their
# squares, magnitudes, and other values of the parameter itself. Nothing is assumed of any other name.
_LINEAR = {"exp_avg", "momentum_buffer", "grad_avg", "prev"}
_SQUARES = {"exp_avg_sq", "max_exp_avg_sq", "sum", "square_avg", "acc_delta"}
_MAGNITUDES = {"exp_inf", "step_size"}
_VALUES = {"AdamWScheduleFree": {"z"}, "SGDScheduleFree": {"z"}, "RAdamScheduleFree": {"z"}}

# They hold copies of the parameters, or their names or masks.
_REFUSED = {
    "StochasticWeightAveraging": "averages parameters that would no longer be there; use `WeightAveraging`",
    "BaseFinetuning": "keeps the names of parameters that would no longer be there; set `requires_grad` in your module",
    "ModelPruning": "keeps masks of parameters that would no longer be there; use one of the two",
}


Seen = TypeVar("Seen")
_Groups = list[list[nn.Parameter]]


def require_operable(name: str, trainer: Trainer, *, whole: bool = False) -> None:
    """Raise an error for strategies and callbacks that hold references to parameters; for ``setup``.

    Args:
        name: Of the callback that replaces parameters.
        trainer: The Trainer.
        whole: Whether FSDP2 is accepted, for a callback that looks at whole parameters only.

    Raises:
        MisconfigurationException: For any strategy but a single device and DDP in processes that a script starts, and
            for callbacks that keep copies, names or masks of parameters. Averages by ``WeightAveraging`` follow.
    """
    strategy = trainer.strategy
    kinds = (SingleDeviceStrategy, DDPStrategy, *((ModelParallelStrategy,) if whole else ()))
    if isinstance(strategy, DeepSpeedStrategy) or not isinstance(strategy, kinds):  # which is a DDPStrategy, too
        raise MisconfigurationException(
            f"{name} replaces parameters, which are sharded under {type(strategy).__name__}; pass `strategy='ddp'` or "
            "`devices=1`, or compress the trained module with `lightning_plugins.compression`"
        )
    if isinstance(strategy.launcher, MultiProcessingLauncher):
        raise MisconfigurationException(
            f"{name} changes the module, and processes that are spawned or forked hand weights back to a module in "
            "which nothing was changed; pass `strategy='ddp'` and run a script"
        )
    for other, reason in _REFUSED.items():
        kind = getattr(callbacks, other)
        found = next((c for c in trainer.callbacks if isinstance(c, kind)), None)  # type: ignore[attr-defined]  # a connector of the Trainer sets `callbacks`
        if found is not None:
            raise MisconfigurationException(
                f"{name} replaces parameters during training, and {type(found).__name__} {reason}"
            )


def require_operable_optimizers(name: str, trainer: Trainer) -> None:
    """Raise an error for optimizers whose state is not per parameter; for ``on_fit_start``.

    Raises:
        MisconfigurationException: For LBFGS, ASGD and optimizers that shard their state over processes.
    """
    for optimizer in trainer.optimizers:
        if isinstance(optimizer, LBFGS | ASGD) or hasattr(optimizer, "consolidate_state_dict"):
            raise MisconfigurationException(
                f"{name} replaces parameters and carries the optimizer's state over, which is not possible for "
                f"{type(optimizer).__name__}; use SGD, AdamW or another optimizer with moments per parameter"
            )


def operate(trainer: Trainer, pl_module: LightningModule, change: Callable[[], Replacements]) -> None:
    """Change a module that is being trained, at an epoch's boundary; all processes call.

    Args:
        trainer: The Trainer inside of its `fit`.
        pl_module: Its module.
        change: Swaps layers of the module in place and returns the replacements of each removed parameter, an empty
            list for one without. New parameters must be contiguous: a checkpoint keeps no memory layout. It finds whole
            parameters where FSDP2 shards them.

    Raises:
        RuntimeError: If ``change`` returns no replacements for a parameter that it removed.
    """

    def checked() -> Replacements:
        return _with_all_named(pl_module, change)

    replacements = change_whole(pl_module, checked) if is_sharded(pl_module) else checked()
    wrap_anew(trainer, pl_module)  # before states are carried: DDP sends the parameters of the first process to all
    fresh = _fresh_optimizers(pl_module)
    if fresh is not None and len(fresh) != len(trainer.optimizers):
        fresh = None
    for index, optimizer in enumerate(trainer.optimizers):
        own = None if fresh is None else fresh[index]
        fits = _replace(optimizer, replacements, own)
        _carry(optimizer, replacements, own)
        if not fits:
            rank_zero_warn(
                "`configure_optimizers` of the changed module does not give the parameter groups of this training "
                f"({type(optimizer).__name__}), so checkpoints from here on cannot be resumed with the optimizer's "
                "state; let it collect parameters without asking for layers by name"
            )
    compile_anew(pl_module)


def look_at_whole(trainer: Trainer, pl_module: LightningModule, look: Callable[[], Seen]) -> Seen:
    """Look at a network that is being trained, whole where FSDP2 shards it, between two steps; all processes call.

    Args:
        trainer: The Trainer inside of its `fit`.
        pl_module: Its module.
        look: Looks, and changes nothing.

    Returns:
        What ``look`` returned.
    """
    if not is_sharded(pl_module):
        return look()
    seen: list[Seen] = []

    def change() -> Replacements:
        seen.append(look())
        return {}

    operate(trainer, pl_module, change)
    return seen[0]


def _with_all_named(pl_module: LightningModule, change: Callable[[], Replacements]) -> Replacements:
    before = dict(pl_module.named_parameters())
    replacements = change()
    present = {id(parameter) for parameter in pl_module.parameters()}
    lost = [
        name for name, parameter in before.items() if id(parameter) not in present and parameter not in replacements
    ]
    if lost:
        raise RuntimeError(f"parameters were removed without naming their replacements: {lost[:5]}")
    return replacements


def _fresh_optimizers(pl_module: LightningModule) -> list[Optimizer] | None:
    """Return the optimizers with which a resumed training would begin; None if the module cannot tell."""
    attributes = dict(vars(pl_module))
    try:
        with isolate_rng():
            return _optimizers_in(pl_module.configure_optimizers())
    except Exception:  # noqa: BLE001 - the user's code, which may ask for a layer that is gone: the caller warns
        return None
    finally:  # a module may remember the optimizer or scheduler that it makes
        vars(pl_module).clear()
        vars(pl_module).update(attributes)


def _optimizers_in(configured: Any) -> list[Optimizer]:
    """The optimizers in any of the forms that ``configure_optimizers`` may return."""
    if isinstance(configured, Optimizer):
        return [configured]
    if isinstance(configured, Mapping):
        return _optimizers_in(configured.get("optimizer"))
    if isinstance(configured, list | tuple):
        return [optimizer for entry in configured for optimizer in _optimizers_in(entry)]
    return []


def _replace(optimizer: Optimizer, replacements: Replacements, fresh: Optimizer | None) -> bool:
    """Put the replacements into the groups; tells whether the groups are those of a fresh optimizer."""
    # Groups added by a callback come after those of `configure_optimizers` and keep their order.
    live = optimizer.param_groups
    groups: _Groups = [[new for old in group["params"] for new in _successors(old, replacements)] for group in live]
    names = [
        [name for pair in zip(*_named(group), strict=True) for name in _names(*pair, replacements)] for group in live
    ]
    wanted = [] if fresh is None else fresh.param_groups
    told = Counter(id(parameter) for group in wanted for parameter in group["params"])
    fits = len(wanted) <= len(groups) and told == Counter(id(p) for group in groups[: len(wanted)] for p in group)
    fits = fits and fresh is not None
    if fits:
        for number, group in enumerate(wanted):
            groups[number] = list(group["params"])
            names[number] = list(group.get("param_names", []))
    for group, parameters, called in zip(live, groups, names, strict=True):
        group["params"][:] = parameters
        if "param_names" in group:
            group["param_names"][:] = called
    return fits


def _successors(old: nn.Parameter, replacements: Replacements) -> list[nn.Parameter]:
    return [replacement.parameter for replacement in replacements[old]] if old in replacements else [old]


def _named(group: dict[str, Any]) -> tuple[list[nn.Parameter], list[str]]:
    return (group["params"], group["param_names"]) if "param_names" in group else ([], [])


def _names(old: nn.Parameter, name: str, replacements: Replacements) -> list[str]:
    return [f"{name}.{number}" for number in range(len(replacements[old]))] if old in replacements else [name]


def _carry(optimizer: Optimizer, replacements: Replacements, fresh: Optimizer | None) -> None:
    afresh, names = 0, set[str]()
    values = _VALUES.get(type(optimizer).__name__, set())
    initial = {} if fresh is None else fresh.state  # some optimizers have a state from the start
    for old, parts in replacements.items():
        state = optimizer.state.pop(old, None)
        if not state:
            continue
        if unknown := _unknown(optimizer, state, old, picked=all(replacement.entrywise for replacement in parts)):
            afresh += 1
            names |= unknown
            for replacement in parts:
                if replacement.parameter in initial:
                    optimizer.state[replacement.parameter] = copy.deepcopy(initial[replacement.parameter])
            continue
        for replacement in parts:
            optimizer.state[replacement.parameter] = {
                key: _carried(key, value, replacement, is_value=key in values) for key, value in state.items()
            }
    if afresh:
        rank_zero_warn(
            f"{type(optimizer).__name__} starts afresh for the parameters that replaced {afresh} others: it "
            f"is not known how to transfer its {', '.join(sorted(names))} to parameters of other shapes"
        )


def _unknown(optimizer: Optimizer, state: Mapping[str, Any], old: nn.Parameter, *, picked: bool) -> set[str]:
    """Names of unknown entries of an optimizer's state, such as Adafactor's sums."""
    known = _LINEAR | _SQUARES | _MAGNITUDES | _VALUES.get(type(optimizer).__name__, set())
    return {
        key
        for key, value in state.items()
        if not isinstance(value, int | float | None)
        and not (
            torch.is_tensor(value) and (value.ndim == 0 or (value.shape == old.shape and (picked or key in known)))
        )
    }


@torch.no_grad()
def _carried(key: str, value: Any, replacement: Replacement, *, is_value: bool) -> Any:
    if not torch.is_tensor(value):
        return value
    if (
        is_value and not replacement.entrywise
    ):  # no factors with this product are known: continue from the parameter itself
        return replacement.parameter.detach().clone()
    if value.ndim == 0:  # a count of steps, of which each parameter has its own
        return value.clone()
    wide = value if value.dtype == torch.float64 else value.float()
    if key in _SQUARES:
        wide = replacement.carry(wide, True)
    elif key in _MAGNITUDES:
        wide = replacement.carry(wide.square(), True).sqrt()
    else:
        wide = replacement.carry(wide, False)
    return wide.to(value.dtype).clone(memory_format=torch.contiguous_format)
