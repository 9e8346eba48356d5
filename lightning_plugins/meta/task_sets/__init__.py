"""Sets of few-shot tasks: the interface, and tasks from labelled images, font glyphs and sinusoids."""

from lightning_plugins.meta.task_sets.base import Batch, Split, TaskSet, check_ways

__all__ = ["Batch", "Split", "TaskSet", "check_ways"]
