"""What ``python -m pyro_symeq`` tells, and that the package's metadata can be read for it."""

import platform
import subprocess
import sys
from importlib import metadata
from types import SimpleNamespace

import pyro
import pytest
import torch
from packaging.requirements import Requirement

import pyro_symeq
from pyro_symeq.__main__ import REQUIREMENT, devices, extras, lack, versions


@pytest.fixture
def installed(monkeypatch):
    """Puts requirements and versions of packages in the place of what is installed."""

    def install(requires, **found):
        def version(name):
            if name not in found:
                raise metadata.PackageNotFoundError(name)
            return found[name]

        monkeypatch.setattr(metadata, "requires", lambda name: requires)
        monkeypatch.setattr(metadata, "version", version)

    return install


def test_the_module_runs_as_a_program():
    command = [sys.executable, "-W", "error", "-m", "pyro_symeq"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    for text in "Versions", pyro_symeq.__version__, "Devices", "threads", "Extras", "metrics":
        assert text in result.stdout


def test_versions_are_those_in_use():
    told = dict(versions())
    assert told["Python"].startswith(platform.python_version())
    assert told["torch"] == torch.__version__
    assert told["pyro-ppl"] == pyro.__version__


def test_all_devices_are_told(monkeypatch):
    gpus = [SimpleNamespace(name="Small", total_memory=8 * 2**30)]
    gpus += [SimpleNamespace(name="Large", total_memory=80 * 2**30)]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(gpus))
    monkeypatch.setattr(torch.cuda, "get_device_properties", gpus.__getitem__)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    told = dict(devices())
    assert told["CPU"] == f"{torch.get_num_threads()} threads"
    assert told["CUDA 0"] == "Small, 8 GiB"
    assert told["CUDA 1"] == "Large, 80 GiB"
    assert told["MPS"] == "there"


@pytest.mark.parametrize(
    ("built", "expected"), [("13.0", "none"), (None, "none: this torch is built without it")]
)
def test_a_machine_without_a_gpu(built, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", built)
    assert dict(devices())["CUDA"] == expected


def test_each_extra_tells_what_it_lacks(installed):
    requires = [
        "torch>=2.6",
        'one; extra == "few"',
        'two>=1.9; extra == "few"',
        'one; extra == "many"',
        'two>=1.9,<3; extra == "many"',
        'three.x; extra == "many"',
    ]
    installed(requires, one="0.1", two="1.10")
    assert dict(extras()) == {
        "few": "complete",
        "many": 'lacks three.x. Run: pip install "pyro_symeq[many]"',
    }
    installed(requires, two="1.8.2")
    assert dict(extras()) == {
        "few": 'lacks one, two>=1.9 (1.8.2 is here). Run: pip install "pyro_symeq[few]"',
        "many": "lacks one, two>=1.9,<3 (1.8.2 is here), three.x. "
        'Run: pip install "pyro_symeq[many]"',
    }


@pytest.mark.parametrize("version", ["0.9", "1.0rc1", "1.0", "1.2.3+cpu", "1.10"])
@pytest.mark.parametrize("bounds", ["", "<1.2", "<=1.0", "==1.0", "!=1.0", ">=1.2", ">1.0,<2"])
def test_bounds_hold_as_for_pip(bounds, version, installed):
    installed([], package=version)
    is_as_required = Requirement("package" + bounds).specifier.contains(version, prereleases=True)
    assert lack("package", bounds) == (
        [] if is_as_required else [f"package{bounds} ({version} is here)"]
    )


def test_every_extra_of_the_metadata_is_read():
    lines = [line for line in metadata.requires("pyro_symeq") if "extra" in line]
    assert lines
    for line in lines:
        name, bounds, extra = REQUIREMENT.fullmatch(line).groups()
        assert Requirement(f'{name}{bounds}; extra == "{extra}"') == Requirement(line)


def test_a_package_that_is_not_installed(monkeypatch):
    def missing(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "requires", missing)
    assert dict(extras()) == {
        "unknown": "pyro_symeq is not installed here. Run: pip install . in its folder."
    }
