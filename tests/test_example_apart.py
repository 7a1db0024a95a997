"""The example of players in processes of their own: a short run, and a return."""

import re
import subprocess
import sys

import pytest

from pyro_symeq.store import serve
from tests.processes import ENVIRONMENT, EXAMPLES, command


@pytest.fixture
def address():
    store, port = serve("127.0.0.1", 0)
    yield f"127.0.0.1:{port}"
    del store


def test_two_players_run_and_one_returns(address, tmp_path):
    options = ["--data", "digits", "--steps", "3", "--out", tmp_path, "--store", address]
    processes = [
        subprocess.Popen(
            command("apart.py", "--player", name, *options),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=ENVIRONMENT,
        )
        for name in ("low", "high")
    ]
    for name, process in zip(("low", "high"), processes, strict=True):
        out, problems = process.communicate(timeout=300)
        assert process.returncode == 0, problems
        for how in ("alone", "with exchange"):
            for whose in ("its own", "never had"):
                pattern = rf"^{name}, {how}: log p = -\d+\.\d nats of real digits, {whose}$"
                assert re.search(pattern, out, re.MULTILINE), out
        assert (tmp_path / f"apart-digits-{name}.pt").exists()
    options[3] = "4"
    program = [sys.executable, EXAMPLES / "apart.py", "--device", "cpu", "--player", "low"]
    late = subprocess.run(
        [*program, "--resume", "--timeout", "0.1", *options],
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
        check=False,
    )
    assert late.returncode == 0, late.stderr
    assert "In step 3, 'low' lacks dreams of others: 'high' gave no answer" in late.stderr
