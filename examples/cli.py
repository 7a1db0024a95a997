"""What the example programs have in common for their users: options, and errors without traces."""

import argparse
import math
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Settings = TypeVar("Settings", bound="DataclassInstance")

EXTRAS = {"tensorboard": "tensorboard"}

__all__ = [
    "add_data_root",
    "add_precision",
    "amount",
    "begun",
    "count",
    "device",
    "ended_cleanly",
    "parser",
    "part",
    "seed",
    "share",
]


def parser(
    description: str, data: Iterable[str], what: str = "the data set"
) -> argparse.ArgumentParser:
    """Makes a parser of the options that every program has.

    Args:
        description: What the program does.
        data: The names of the data sets, the default first.
        what: What those names say of the data.
    """
    names = tuple(data)
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument(
        "--data", choices=names, default=names[0], help=f"{what} (default: %(default)s)"
    )
    add_data_root(parser)
    parser.add_argument(
        "--device",
        type=device,
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="where to compute (default: %(default)s)",
    )
    parser.add_argument(
        "--seed", type=seed, default=0, help="of parameters and draws (default: 0)"
    )
    parser.add_argument("--steps", type=count, help="how many (default: as in the settings)")
    parser.add_argument(
        "--out", type=Path, default=Path("out"), help="the folder for results (default: out)"
    )
    return parser


def add_data_root(parser: argparse.ArgumentParser) -> None:
    """Adds the option that names the folder of the data."""
    parser.add_argument(
        "--data-root",
        type=Path,
        default=Path(os.environ.get("PYRO_SYMEQ_DATA", "data")),
        help="the folder of the data sets (default: $PYRO_SYMEQ_DATA, or data)",
    )


def add_precision(parser: argparse.ArgumentParser) -> None:
    """Adds the option that lets networks compute in bfloat16."""
    parser.add_argument(
        "--bfloat16", action="store_true", help="let networks compute in bfloat16, on a GPU say"
    )


def device(name: str) -> torch.device:
    """Reads a device that can be used."""
    try:
        device = torch.device(name)
        torch.zeros((), device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise argparse.ArgumentTypeError(f"can't use device {name!r}: {reason}") from error
    return device


def count(text: str) -> int:
    """Reads a number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a number of at least 1, got {text!r}")
    return int(text)


def seed(text: str) -> int:
    """Reads a number that NumPy and PyTorch take as a seed."""
    if not text.isdecimal() or int(text) >= 2**32:
        raise argparse.ArgumentTypeError(f"expected a number from 0 to 2**32 - 1, got {text!r}")
    return int(text)


def amount(text: str) -> float:
    """Reads a finite number of at least 0."""
    if not 0 <= (value := _number(text)) < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number of at least 0, got {text!r}")
    return value


def share(text: str) -> float:
    """Reads a number above 0 and at most 1."""
    if not 0 < (value := _number(text)) <= 1:
        raise argparse.ArgumentTypeError(f"expected a number above 0 and at most 1, got {text!r}")
    return value


def part(text: str) -> float:
    """Reads a number from 0 to 1."""
    if not 0 <= (value := _number(text)) <= 1:
        raise argparse.ArgumentTypeError(f"expected a number from 0 to 1, got {text!r}")
    return value


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def begun(options: argparse.Namespace, settings: Settings) -> Settings:
    """Makes the folder for results; returns the settings with as many steps as were asked for.

    Args:
        options: The options that every program has.
        settings: A dataclass with a field ``steps``.
    """
    options.out.mkdir(parents=True, exist_ok=True)
    return settings if options.steps is None else replace(settings, steps=options.steps)


@contextmanager
def ended_cleanly(program: str, *errors: type[Exception]) -> Iterator[None]:
    """Ends the program with a message, and no trace, where the user can help it.

    Args:
        program: Stands before the message.
        errors: What ends the program, besides a missing package, a file that can't be used and an
            interrupt.
    """
    expected: tuple[type[Exception], ...] = (OSError, *errors)
    try:
        yield
    except ModuleNotFoundError as error:
        extra = EXTRAS.get(error.name or "", "examples")
        message = f'there is no {error.name} here. Run: pip install "pyro_symeq[{extra}]"'
        raise SystemExit(f"{program}: {message}") from error
    except expected as error:
        raise SystemExit(f"{program}: {error}") from error
    except KeyboardInterrupt as error:
        raise SystemExit(f"{program}: interrupted") from error
