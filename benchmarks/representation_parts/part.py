"""A part of the study, and a Trainer that keeps quiet."""

from collections.abc import Callable
from typing import Any, NamedTuple

from lightning.pytorch import Callback, Trainer


class Run(NamedTuple):
    """One training.

    Attributes:
        group: Data set and batch size; a table each.
        method: What is added to the loss.
        knob: Its weight, or what else is searched for.
        seed: Of the initial network, the batches and the views.
        search: Whether the knob is being chosen: then scores are those of the validation samples.
    """

    group: str
    method: str
    knob: float
    seed: int
    search: bool


class Part(NamedTuple):
    """One question.

    Attributes:
        title: Heading of its section.
        text: What is trained and measured.
        groups: One table each.
        methods: The knobs that are tried for each method.
        reference: The method that others are compared with, seed by seed.
        seeds: How many trainings stand in a row.
        score: What runs are chosen and compared by.
        higher: Whether more of it is better.
        columns: Headings of the results, by key.
        run: The training.
    """

    title: str
    text: str
    groups: tuple[str, ...]
    methods: dict[str, tuple[float, ...]]
    reference: str
    seeds: int
    score: str
    higher: bool
    columns: dict[str, str]
    run: Callable[[Run], dict[str, float]]


def quiet_trainer(steps: int, callbacks: list[Callback] | None = None, **settings: Any) -> Trainer:
    """A Trainer on the CPU without files, bars and tables."""
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    more = {"accelerator": "cpu", "devices": 1, "enable_model_summary": False, "max_epochs": -1}
    return Trainer(max_steps=steps, callbacks=callbacks, **quiet, **more, **settings)
