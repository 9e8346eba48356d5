"""Few-shot classification of glyphs with the entropy of the adapted features in the outer loss of MAML."""

import torch
from glyph_few_shot import conv4
from lightning.pytorch import LightningModule, seed_everything
from torch.nn import functional as F

from lightning_plugins.callbacks import VNERegularization
from lightning_plugins.meta import EpisodeLoader, GlyphFewShot
from lightning_plugins.mixins import InnerSettings, MAMLMixin
from representation_parts.part import Part, Run, quiet_trainer

STEPS, TASKS = 200, 4
WAYS, SHOTS, TRAINING_QUERIES, QUERIES = 5, 1, 5, 15
TEST_TASKS = 300


class FewShot(MAMLMixin, LightningModule):
    def __init__(self) -> None:
        super().__init__(
            conv4(),
            F.cross_entropy,
            inner=InnerSettings(steps=3, evaluation_steps=5, learning_rate=0.1),
            learning_rate=2e-3,
            features="13:input",
        )


def run(one: Run) -> dict[str, float]:
    seed_everything(one.seed, verbose=False)
    model = FewShot()
    tasks = GlyphFewShot("train", WAYS, SHOTS, TRAINING_QUERIES)
    callbacks = [VNERegularization("query_features", one.knob)] if one.knob else []
    quiet_trainer(STEPS, callbacks).fit(model, EpisodeLoader(tasks, STEPS * TASKS, TASKS, seed=one.seed))
    right = []
    for support, query in EpisodeLoader(GlyphFewShot("test", WAYS, SHOTS, QUERIES), TEST_TASKS, 20, fixed=True):
        with torch.no_grad():
            outputs = model.inner_loop(support, query, steps=5).outputs
        right.append((outputs.argmax(2) == query[1]).float().mean())
    return {"accuracy": 100 * float(torch.stack(right).mean())}


PART = Part(
    title="Few-shot classification",
    text=f"""One example of each of five characters, MAML on four convolutions, {STEPS} batches of {TASKS} tasks, tested
on {TEST_TASKS} tasks of other characters, the same for all. The term stands on the last layer's input, on the query
samples after the inner steps, in the outer loss. No weight is chosen: all are shown.""",
    groups=("glyphs, 5 ways, 1 shot",),
    methods={
        "no term": (0.0,),
        **{f"VNE, weight {weight:g}": (weight,) for weight in (0.1, 0.3, -0.1)},
    },
    reference="no term",
    seeds=5,
    score="accuracy",
    higher=True,
    columns={"accuracy": "test accuracy in %"},
    run=run,
)
