"""Names that every doctest finds in place, and no parameters of others."""

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch


@pytest.fixture(autouse=True)
def _doctest_names(doctest_namespace: dict[str, Any]) -> None:
    pyro.clear_param_store()
    doctest_namespace.update(torch=torch, pyro=pyro, dist=dist)
