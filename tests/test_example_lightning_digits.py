"""The script for PyTorch Lightning runs, and leaves a checkpoint and curves."""

import re
import subprocess
import sys

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.processes import ENVIRONMENT, EXAMPLES

SCRIPT = EXAMPLES / "lightning_digits.py"


def test_it_is_short():
    assert len(SCRIPT.read_text().splitlines()) <= 40


@pytest.mark.slow
def test_it_shows_progress_and_leaves_a_checkpoint_and_curves(tmp_path):
    result = subprocess.run(
        [sys.executable, SCRIPT, "--epochs", "2"],
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
        cwd=tmp_path,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    for name in "train/decoder", "val/encoder":  # the bar that Lightning has with rich, or without
        assert re.search(rf"{name}[=:]\s*-\d", result.stdout)
    (checkpoint,) = tmp_path.glob("out/lightning/version_0/checkpoints/*.ckpt")
    assert torch.load(checkpoint, weights_only=True)["global_step"] in (5, 10)
    curves = EventAccumulator(str(tmp_path / "out/lightning/version_0"))
    curves.Reload()
    assert set(curves.Tags()["scalars"]) >= {
        "train/decoder",
        "train/encoder",
        "val/decoder",
        "val/encoder",
        "lr-TurnsOptimizer/decoder",
    }
    assert [point.step for point in curves.Scalars("val/loss")] == [4, 9]
