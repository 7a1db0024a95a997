"""What a report of a bug should tell: ``python -m pyro_symeq``.

Prints the versions, the devices, and for each extra of the package what is missing for it.
"""

import operator
import platform
import re
from collections.abc import Iterator
from importlib import metadata

import numpy
import pyro
import torch
from torch.torch_version import TorchVersion

import pyro_symeq

Row = tuple[str, str]

# A line of the metadata, such as: arviz>=0.17; extra == "diagnostics"
REQUIREMENT = re.compile(r'(?P<name>[\w.-]+)(?P<bounds>[^;]*); extra == "(?P<extra>[\w-]+)"')
BOUND = re.compile(r"([<>=!]=?)([^,]+)")
HOLDS = {
    "<": operator.lt,
    "<=": operator.le,
    "==": operator.eq,
    "!=": operator.ne,
    ">=": operator.ge,
    ">": operator.gt,
}


def main() -> None:
    """Prints all there is to tell."""
    for title, rows in ("Versions", versions()), ("Devices", devices()), ("Extras", extras()):
        print(title)
        for name, text in rows:
            print(f"  {name:<12} {text}")


def versions() -> Iterator[Row]:
    """The versions of the library and of what it runs on."""
    yield "pyro_symeq", pyro_symeq.__version__
    yield "Python", f"{platform.python_version()}, {platform.system()} {platform.machine()}"
    yield "torch", str(torch.__version__)
    yield "pyro-ppl", pyro.__version__
    yield "numpy", numpy.__version__


def devices() -> Iterator[Row]:
    """Where tensors can live."""
    yield "CPU", f"{torch.get_num_threads()} threads"
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            device = torch.cuda.get_device_properties(index)
            yield f"CUDA {index}", f"{device.name}, {device.total_memory / 2**30:.0f} GiB"
    else:
        yield "CUDA", "none" if torch.version.cuda else "none: this torch is built without it"
    yield "MPS", "there" if torch.backends.mps.is_available() else "none"


def extras() -> Iterator[Row]:
    """Each extra with what it lacks and the line that installs it."""
    try:
        lines = metadata.requires("pyro_symeq") or []
    except metadata.PackageNotFoundError:
        yield "unknown", "pyro_symeq is not installed here. Run: pip install . in its folder."
        return
    lacks: dict[str, list[str]] = {}
    for requirement in filter(None, map(REQUIREMENT.fullmatch, lines)):
        missing = lacks.setdefault(requirement["extra"], [])
        missing += lack(requirement["name"], requirement["bounds"])
    for extra, missing in lacks.items():
        line = f'lacks {", ".join(missing)}. Run: pip install "pyro_symeq[{extra}]"'
        yield extra, line if missing else "complete"


def lack(name: str, bounds: str) -> list[str]:
    """What keeps a package from being as required, if anything does."""
    try:
        version = TorchVersion(metadata.version(name))
    except metadata.PackageNotFoundError:
        return [name + bounds]
    if all(HOLDS[sign](version, bound) for sign, bound in BOUND.findall(bounds)):
        return []
    return [f"{name}{bounds} ({version} is here)"]


if __name__ == "__main__":
    main()
