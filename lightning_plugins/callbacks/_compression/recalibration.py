"""Norm statistics recomputed on training data, if no training follows that would update them."""

from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
from torch.utils.data import DataLoader

from lightning_plugins._lightning import LightningModule, Trainer, isolate_rng
from lightning_plugins.callbacks._compression.rank_search import kept_metrics, step_arguments, without_log
from lightning_plugins.compression.networks.norm_statistics import norms_with_statistics, recalibrate

_BATCHES = 16


def recalibrate_norms(trainer: Trainer, pl_module: LightningModule) -> None:
    """Run training steps without gradients, so that batch norms have the statistics of the network as it is.

    The batches are the same on every process and in a resumed training. Nothing is done where the training
    data is not one `DataLoader` over a dataset with indices.

    Args:
        trainer: The Trainer inside of its `fit`.
        pl_module: Its module.
    """
    loader = trainer.train_dataloader
    indexed = (
        isinstance(loader, DataLoader) and loader.batch_size is not None and hasattr(loader.dataset, "__getitem__")
    )
    if not indexed or not norms_with_statistics(pl_module):
        return
    step = type(pl_module).training_step

    def run(batch: Any) -> None:
        step(pl_module, *step_arguments(step, batch))

    with isolate_rng(), kept_metrics(pl_module), without_log(pl_module), trainer.precision_plugin.forward_context():
        torch.manual_seed(0)
        recalibrate(pl_module, run, _drawn(trainer, pl_module, loader))


def _drawn(trainer: Trainer, pl_module: LightningModule, loader: Any) -> Iterator[Any]:
    order = torch.randperm(len(loader.dataset))[: _BATCHES * loader.batch_size].tolist()
    batches = DataLoader(
        loader.dataset, loader.batch_size, sampler=order, collate_fn=loader.collate_fn, drop_last=loader.drop_last
    )
    for batch in islice(batches, _BATCHES):
        moved = pl_module.on_before_batch_transfer(trainer.precision_plugin.convert_input(batch), 0)
        yield trainer.strategy.batch_to_device(moved, dataloader_idx=0)
