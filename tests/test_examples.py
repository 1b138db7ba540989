"""Every example runs, and is short enough to copy."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tdhook_train import ArtifactBuffer

EXAMPLES = sorted((Path(__file__).parent.parent / "examples").glob("*.py"))
MAX_LINES = 60


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_are_short(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= MAX_LINES


def test_ppo_live_probing(tmp_path: Path) -> None:
    (path,) = [path for path in EXAMPLES if path.stem == "ppo_live_probing"]
    done = subprocess.run(
        [sys.executable, str(path), "2048", str(tmp_path / "run")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    report = Path(done.stdout.splitlines()[-1])
    assert report.is_file()
    buffer = ArtifactBuffer.open(tmp_path / "run")
    assert buffer["probe"].steps.tolist() == [0, 100, 200, 300, 320]
    assert buffer["attribution"].coords["actor_network.target"] == ["loc"]
