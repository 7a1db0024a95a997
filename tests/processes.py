"""Example programs run as a user runs them, where no network can be reached; full disks."""

import os
import resource
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

EXAMPLES = Path(__file__).parent.parent / "examples"
ENVIRONMENT = os.environ | {
    "http_proxy": "http://127.0.0.1:9",
    "https_proxy": "http://127.0.0.1:9",
}


def command(program, *options):
    """Runs an example with warnings as errors."""
    return [sys.executable, "-W", "error", EXAMPLES / program, "--device", "cpu", *options]


def run_example(program, *options):
    """Runs an example to its end."""
    return subprocess.run(
        command(program, *options), capture_output=True, text=True, env=ENVIRONMENT, check=False
    )


@contextmanager
def little_space(num_bytes):
    """Files can't grow beyond so many bytes, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
