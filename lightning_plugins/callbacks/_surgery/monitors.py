"""Values of the network before surgery that callbacks remember and would compare with those after it."""

import math

import torch

from lightning_plugins._lightning import Trainer, callbacks, rank_zero_warn


def forget_best(name: str, trainer: Trainer) -> None:
    """Reset the best score of checkpoints and early stopping, which is that of the dense network.

    Otherwise the small network, which is seldom better immediately, would never be saved. Existing files are kept.

    Args:
        name: Of the callback that changed the network.
        trainer: The Trainer.
    """
    found = []
    for callback in vars(trainer)["callbacks"]:
        if isinstance(callback, callbacks.ModelCheckpoint) and callback.monitor is not None:
            callback.best_k_models = {}
            callback.kth_best_model_path = callback.best_model_path = ""
            callback.best_model_score = callback.current_score = None
            callback.kth_value = torch.tensor(math.inf if callback.mode == "min" else -math.inf)
            callback._last_global_step_saved = 0
            found.append("ModelCheckpoint")
        if isinstance(callback, callbacks.EarlyStopping):
            callback.wait_count = 0
            callback.best_score = torch.tensor(math.inf if callback.mode == "min" else -math.inf)
            found.append("EarlyStopping")
    if found:
        rank_zero_warn(
            f"{name}: {' and '.join(dict.fromkeys(found))} compare with the small network only from here on; what was "
            "saved before is the dense network"
        )


def warn_if_unsaved(name: str, trainer: Trainer) -> None:
    """Warn if all checkpoints are of the dense network, after a training that made it small.

    Args:
        name: Of the callback that changed the network.
        trainer: The Trainer.
    """
    saving = [c for c in vars(trainer)["callbacks"] if isinstance(c, callbacks.ModelCheckpoint)]
    monitoring = [callback for callback in saving if callback.monitor is not None and callback.save_top_k != 0]
    if saving and len(monitoring) == len(saving) and not any(callback.best_k_models for callback in saving):
        rank_zero_warn(
            f"{name}: no checkpoint of the small network was written, because the metric was not evaluated after the "
            "surgery; call `trainer.save_checkpoint(...)`, or let the surgery come before the last epoch"
        )
