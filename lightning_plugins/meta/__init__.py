"""Meta-learning: inner loops over tasks, and preconditioners of their gradients."""

from lightning_plugins.meta.batch_statistics import use_batch_statistics
from lightning_plugins.meta.episodes import EpisodeLoader, EpisodeSampler
from lightning_plugins.meta.gap import GAP, ApproximateGAP
from lightning_plugins.meta.inner_loop import InnerLoop
from lightning_plugins.meta.loop.episode import Episodes
from lightning_plugins.meta.loop.form import Vectorization
from lightning_plugins.meta.preconditioners import Identity, MetaSGD, Preconditioner
from lightning_plugins.meta.running_statistics import PerStepBatchNorm, use_per_step_statistics
from lightning_plugins.meta.task_sets.base import TaskSet
from lightning_plugins.meta.task_sets.cars import Cars
from lightning_plugins.meta.task_sets.cub import CUB
from lightning_plugins.meta.task_sets.few_shot import FewShot
from lightning_plugins.meta.task_sets.glyphs import GlyphFewShot
from lightning_plugins.meta.task_sets.mini_imagenet import MiniImageNet
from lightning_plugins.meta.task_sets.sinusoid import Sinusoid
from lightning_plugins.meta.task_sets.tiered_imagenet import TieredImageNet

__all__ = [
    "CUB",
    "GAP",
    "ApproximateGAP",
    "Cars",
    "EpisodeLoader",
    "EpisodeSampler",
    "Episodes",
    "FewShot",
    "GlyphFewShot",
    "Identity",
    "InnerLoop",
    "MetaSGD",
    "MiniImageNet",
    "PerStepBatchNorm",
    "Preconditioner",
    "Sinusoid",
    "TaskSet",
    "TieredImageNet",
    "Vectorization",
    "use_batch_statistics",
    "use_per_step_statistics",
]
