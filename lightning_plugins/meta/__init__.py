"""Meta-learning: inner loops over tasks, and what they do to a gradient before they follow it."""

from lightning_plugins.meta.batch_statistics import use_batch_statistics
from lightning_plugins.meta.inner_loop import Episodes, InnerLoop
from lightning_plugins.meta.preconditioners import GAP, ApproximateGAP, Identity, MetaSGD, Preconditioner

__all__ = [
    "GAP",
    "ApproximateGAP",
    "Episodes",
    "Identity",
    "InnerLoop",
    "MetaSGD",
    "Preconditioner",
    "use_batch_statistics",
]
