"""Setting of every test: one thread, no network, a fixed seed, and an empty working directory."""

import os

# Before torch is imported, and inherited by the processes that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ["HF_HUB_OFFLINE"] = "1"

import hypothesis
import pytest
import torch
from lightning.pytorch import callbacks

# No deadline: the first call of a torch operation loads libraries. No database: it would lie in the working directory.
hypothesis.settings.register_profile("project", deadline=None, database=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("project")

# Lightning 2.5 has no averages of weights during training.
collect_ignore = ["callbacks/test_choice_averages.py", "callbacks/test_surgery_averages.py"]
if hasattr(callbacks, "EMAWeightAveraging"):
    collect_ignore.clear()


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _empty_working_directory(tmp_path, monkeypatch):
    """Loggers and checkpoints that a test gave no directory must not land in the checkout."""
    monkeypatch.chdir(tmp_path)
