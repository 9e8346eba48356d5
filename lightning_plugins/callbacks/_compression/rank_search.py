"""The search of ranks in the middle of a training: its data, its score, and how the training is shielded from it."""

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import islice
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader
from torchmetrics import Metric

from lightning_plugins._checks import nearest
from lightning_plugins._lightning import (
    LightningModule,
    MisconfigurationException,
    Trainer,
    is_param_in_hook_signature,
    isolate_rng,
)
from lightning_plugins.compression.networks.evaluation import evaluation
from lightning_plugins.compression.rank_search.beam_search import BeamOptions, beam_search
from lightning_plugins.compression.rank_search.output_energy import output_energy
from lightning_plugins.compression.rank_search.problem import RankSearch, SearchLevel
from lightning_plugins.compression.rank_search.selection import energy_threshold, equal_ratio, trade_off
from lightning_plugins.distributed import is_distributed

Score = Callable[[Any, Any], Any]

_METHODS: dict[str, Callable[..., RankSearch]] = {
    "equal_ratio": equal_ratio,
    "energy": energy_threshold,
    "trade_off": trade_off,
    "output_energy": output_energy,
}
SEARCHES = ("beam", *_METHODS)
BEAM_OPTIONS = ("width", "step", "bounds", "reuse_activations", "state_file")


def check_search_options(search: str, options: dict[str, Any] | None) -> dict[str, Any]:
    """Return the options, after checking that the search knows their names.

    Raises:
        TypeError: If they are no dict, or an option is of the wrong type.
        ValueError: If an option is unknown to the search, or out of its range.
    """
    if options is not None and not isinstance(options, dict):
        raise TypeError(f"`options` must be a dict, got {options!r}")
    known = {"beam": BEAM_OPTIONS, "output_energy": ("relative",)}.get(search, ())
    for name in options or {}:
        if name not in known:
            near = "".join(f"; did you mean {other!r}?" for other in nearest(str(name), known, limit=1))
            takes = f"takes {', '.join(known)}" if known else "takes none"
            raise ValueError(f"`options`: {search!r} {takes}, got {name!r}{near}")
    if search == "beam":
        BeamOptions(**(options or {}))  # which checks them
    return dict(options or {})


def search_ranks(
    trainer: Trainer, pl_module: LightningModule, search: str, batches: Sequence[Any], score: Score, **options: Any
) -> RankSearch:
    """Run a search without an effect on the training; all processes call, and get the same answer.

    Args:
        trainer: The Trainer.
        pl_module: Its module.
        search: One of `SEARCHES`.
        batches: What is scored; only the beam search looks at them.
        score: As for `beam_search`.
        **options: Keyword arguments of the search.

    Returns:
        What the search found.
    """
    if search != "beam":
        return _METHODS[search](pl_module, **options)
    with unnoticed(trainer, pl_module):
        own = {name: options.pop(name) for name in (*BEAM_OPTIONS, "calibration") if name in options}
        return beam_search(pl_module, batches, score, options=BeamOptions(**own, progress=_show(trainer)), **options)


@contextmanager
def unnoticed(trainer: Trainer, pl_module: LightningModule) -> Iterator[None]:
    """Run the module in the precision of the training, without an effect on the training."""
    with isolate_rng(), same_buffers(pl_module), kept_metrics(pl_module), trainer.precision_plugin.forward_context():
        yield


def search_data(trainer: Trainer, pl_module: LightningModule, source: Any) -> Iterable[Any]:
    """The batches to search with, not yet moved to the device.

    Args:
        trainer: A Trainer whose training data is set up.
        pl_module: Its module.
        source: Batches, the name of a method of the module or datamodule that returns some, or None for the training
            data without shuffling.

    Returns:
        An iterable of batches, the same on every process.

    Raises:
        MisconfigurationException: If there is no such method, or the training data has no order of its own.
    """
    if isinstance(source, str):
        owner = next((o for o in (trainer.datamodule, pl_module) if callable(getattr(o, source, None))), None)  # type: ignore[attr-defined]  # a connector of the Trainer sets `datamodule`
        if owner is None:
            raise MisconfigurationException(
                f"`search.data` must be batches, or the name of a method of {type(pl_module).__name__} or the "
                f"datamodule that returns them, such as 'val_dataloader'; got {source!r}"
            )
        batches: Iterable[Any] = getattr(owner, source)()
        return batches
    if source is not None:
        given: Iterable[Any] = source
        return given
    loader = trainer.train_dataloader
    if not isinstance(loader, DataLoader) or loader.batch_size is None or not hasattr(loader.dataset, "__getitem__"):
        raise MisconfigurationException(
            "`search.data` must be given where the training data is not one `DataLoader` with a batch size over a "
            f"dataset with indices, got {type(loader).__name__}; pass batches, or the name of a method such as "
            "'val_dataloader'"
        )
    return DataLoader(loader.dataset, batch_size=loader.batch_size, shuffle=False, collate_fn=loader.collate_fn)


def load_batches(trainer: Trainer, pl_module: LightningModule, source: Iterable[Any], count: int) -> list[Any]:
    """Load the first ``count`` batches, onto the device and in the precision of the training.

    Returns:
        The batches.

    Raises:
        MisconfigurationException: If there is none.
    """
    with isolate_rng():  # a loader draws a seed when it is asked for batches
        batches = list(islice(source, count))
    if not batches:
        raise MisconfigurationException("`search.data` must have at least one batch, got none")
    prepared = []
    for batch in batches:
        moved = pl_module.on_before_batch_transfer(trainer.precision_plugin.convert_input(batch), 0)
        prepared.append(trainer.strategy.batch_to_device(moved, dataloader_idx=0))
    return prepared


def score_function(pl_module: LightningModule, score: str | Score | None) -> Score:
    """Return the function of module and batch that `beam_search` calls for scores.

    Args:
        pl_module: The module.
        score: The name of a method that takes a batch, a function of module and batch, or None for the negative loss
            of the training step.

    Returns:
        A function of module and batch.

    Raises:
        MisconfigurationException: If there is no such method, or no loss to be had from the training step.
    """
    name = type(pl_module).__name__
    if isinstance(score, str):
        if not callable(getattr(pl_module, score, None)):
            near = "".join(f"; did you mean {other!r}?" for other in nearest(score, dir(pl_module), limit=1))
            raise MisconfigurationException(
                f"`search.score` must be the name of a method of {name}, got {score!r}{near}"
            )
        return lambda model, batch: getattr(model, score)(batch)
    if score is not None:
        return score
    if not pl_module.automatic_optimization:
        raise MisconfigurationException(
            f"`search.score` must be given with manual optimization, where the training step of {name} returns no "
            "loss: the name of a method that takes a batch and returns a mean, or a sum and a count; the higher the "
            "better"
        )
    return _negative_loss


def try_score(trainer: Trainer, pl_module: LightningModule, batch: Any, score: str | Score | None) -> None:
    """Score a batch as the search will, without an effect on the training; all processes call.

    Args:
        trainer: The Trainer.
        pl_module: Its module.
        batch: A batch, on the device of the training.
        score: As for `score_function`.

    Raises:
        MisconfigurationException: If the score cannot be computed.
    """
    quiet = isolate_rng(), same_buffers(pl_module), kept_metrics(pl_module), evaluation(pl_module)
    with ExitStack() as stack:
        for context in (*quiet, trainer.precision_plugin.forward_context()):
            stack.enter_context(context)
        try:
            score_function(pl_module, score)(pl_module, batch)
        except MisconfigurationException:
            raise
        except Exception as error:
            what = repr(score) if isinstance(score, str) else "the training step" if score is None else "the function"
            raise MisconfigurationException(
                f"`search.score`: the search of ranks scores batches of `search.data` with {what} of "
                f"{type(pl_module).__name__} in evaluation mode, which fails on the first one ({type(error).__name__}: "
                f"{error}); pass the name of a method that takes a batch, or a function of module and batch"
            ) from error


def _negative_loss(pl_module: Any, batch: Any) -> Tensor:
    step = type(pl_module).training_step  # its own, without the terms that other callbacks add on all processes at once
    with without_log(pl_module):
        output = step(pl_module, *step_arguments(step, batch))
    loss = output.get("loss") if isinstance(output, dict) else output
    if not isinstance(loss, Tensor):
        raise MisconfigurationException(
            f"`search.score` must be given where the training step returns no loss, got {type(output).__name__}"
        )
    return -loss.detach()


def step_arguments(step: Callable[..., Any], batch: Any) -> tuple[Any, ...]:
    """The arguments of a step of a module by Lightning's own rule: the batch, and an index if the step takes one.

    Args:
        step: The step, a function or a bound method.
        batch: The batch.

    Returns:
        Positional arguments; the index is 0.
    """
    return (batch, 0) if is_param_in_hook_signature(step, "batch_idx", min_args=2) else (batch,)


@contextmanager
def without_log(pl_module: LightningModule) -> Iterator[None]:
    """Let a module's ``log`` and ``log_dict`` do nothing for a while."""
    own = {name: vars(pl_module).get(name) for name in ("log", "log_dict")}
    vars(pl_module).update(dict.fromkeys(own, lambda *args, **kwargs: None))
    try:
        yield
    finally:
        for name, value in own.items():
            del vars(pl_module)[name]
            if value is not None:
                vars(pl_module)[name] = value


@contextmanager
def kept_metrics(pl_module: LightningModule) -> Iterator[None]:
    """Restore the module's metrics, which scoring a step may have updated."""
    metrics = [module for module in pl_module.modules() if isinstance(module, Metric)]
    states = [copy.deepcopy(metric.metric_state) for metric in metrics]
    try:
        yield
    finally:
        for metric, state in zip(metrics, states, strict=True):
            for name, value in state.items():
                setattr(metric, name, value)


@contextmanager
def same_buffers(pl_module: LightningModule) -> Iterator[None]:
    """Use the first process's buffers on all for a while: statistics of batches differ, and so would scores."""
    if not is_distributed():
        yield
        return
    buffers = list(pl_module.buffers())
    own = [buffer.clone() for buffer in buffers]
    for buffer in buffers:
        dist.broadcast(buffer, 0)
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in zip(buffers, own, strict=True):
                buffer.copy_(value)


def _show(trainer: Trainer) -> Callable[[SearchLevel], None] | None:
    bar = trainer.progress_bar_callback
    if bar is None or not trainer.is_global_zero:
        return None

    def show(level: SearchLevel) -> None:
        bar.print(f"rank search: {level.share:.3f} left, budget {level.budget:.3f}, score {level.score:.4f}")

    return show
