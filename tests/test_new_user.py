"""A newcomer's four programs: short, run in seconds, and their mistakes are answered in the words of the program."""

import re
import time
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[1] / "docs" / "guide" / "first_programs.md"
FOUND = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
ENTROPY, COMPRESSION, FEW_SHOT, PROBE = FOUND
CPU_SECONDS = 120  # of processor time, imports and their first use included; other work on the machine adds nothing


def run(program: str) -> None:
    exec(compile(program, "program", "exec"), {"__name__": "program"})


@pytest.mark.parametrize(
    ("program", "printed"),
    [
        (ENTROPY, r"tensor\(\d\.\d+\) of at most"),
        (COMPRESSION, r"parameters 374 k → 185 k \(50\.5% removed\)"),
        (FEW_SHOT, r"test/accuracy"),
        (PROBE, r"encoder\.layer\.2: accuracy 0\.\d\d ± 0\.0\d"),
    ],
    ids=["entropy", "compression", "few-shot", "probe"],
)
def test_program_is_short_and_runs_in_seconds(program, printed, capsys):
    assert sum(bool(line.strip()) for line in program.splitlines()) <= 15
    began = time.process_time()
    run(program)
    assert time.process_time() - began < CPU_SECONDS
    assert re.search(printed, capsys.readouterr().out)


@pytest.mark.parametrize(
    ("program", "right", "wrong", "message"),
    [
        (ENTROPY, "weight=0.1", 'weight="much"', r"`weight` must be a number, got 'much'"),
        (ENTROPY, '("l1", weight', '("l2", weight', r"`layers`: no module is called 'l2'; did you mean 'l1'\?"),
        (ENTROPY, "weight=0.1", 'weight=0.1, readout="cls"', r"`readout` must be a Readout.* got 'cls'"),
        (COMPRESSION, "budget=0.5", "budget=50", r"`budget` must be in \[0, 1\], got 50; did you mean 0\.5\?"),
        (
            COMPRESSION,
            "equal_ratio(net, budget=0.5).ranks",
            '{"layer1.conv": 3}',
            r"called 'layer1.conv'; did you mean",
        ),
        (
            COMPRESSION,
            "(make, ",
            "(make(), ",
            r"`model` must be a class or function.*got ResNet; for an existing network",
        ),
        (FEW_SHOT, "steps=2", "steps=0", r"`steps` must be at least 1, got 0"),
        (FEW_SHOT, '("train")', '("training")', r"`split` must be .* got 'training'; did you mean 'train'\?"),
        (FEW_SHOT, "(GAPMixin, LightningModule)", "(LightningModule, GAPMixin)", r"`GAPMixin` must come before"),
        (PROBE, 'targets="label"', 'targets="labels"', r"has no 'labels'; its keys are 'input_ids', 'label'"),
        (PROBE, "encoder.layer.?", "encoder.layers.?", r"called 'encoder.layers.\?'; did you mean 'encoder.layer."),
        (PROBE, '"num_targets": 2', '"num_targets": 1', r"`num_targets` must be the number of classes, at least 2"),
    ],
    ids=lambda value: value if len(value) < 40 else "",
)
def test_mistake_is_answered_in_the_words_of_the_program(program, right, wrong, message):
    assert program.count(right) == 1
    with pytest.raises((TypeError, ValueError), match=message):
        run(program.replace(right, wrong))
