import os
import signal

import pyro
import pytest
import torch
from hypothesis import settings

# The same examples in each run, however long the first of them takes; at night, many new ones.
settings.register_profile("tests", deadline=None, derandomize=True, max_examples=200)
settings.register_profile("nightly", deadline=None, max_examples=800, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "tests"))

# A shell that runs tests in the background lets them, and what they start, ignore Ctrl-C.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@pytest.fixture(params=DEVICES)
def device(request):
    return torch.device(request.param)


@pytest.fixture
def default_device(device):
    """Whatever names no device is made on one."""
    with device:
        yield device


@pytest.fixture
def fresh_compiler():
    """What a test compiles counts towards no limit of the compiler in others."""
    yield
    torch.compiler.reset()


@pytest.fixture(autouse=True)
def fresh_pyro():
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    with pyro.validation_enabled(True):
        yield
    torch.set_default_dtype(dtype)
