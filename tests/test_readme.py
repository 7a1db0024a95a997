"""The program in the README, as a user would copy it."""

import re
import subprocess
import sys
from pathlib import Path

README = Path(__file__).parent.parent / "README.md"


def test_the_program_of_the_readme_learns(tmp_path):
    (program,) = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    file = tmp_path / "program.py"
    file.write_text(program)
    command = [sys.executable, "-W", "error", file]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    numbers = [float(n) for n in re.findall(r"decoder (-?[\d.]+)", result.stdout)]
    assert len(numbers) == 5
    # A row has log p(z) = -8 log 2 = -5.5, and pixels that are known from z add nothing; a decoder
    # that ignores z pays for the entropy of 20 pixels, about 12 nats.
    assert numbers[-1] > max(-10, numbers[0])
