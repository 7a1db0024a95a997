"""Symmetric equilibrium learning of VAEs for Pyro programs."""

from pyro_symeq.batch import Batch
from pyro_symeq.distributions import Implicit
from pyro_symeq.equilibrium import SymmetricEquilibrium
from pyro_symeq.utility import SymmetricLoss, SymmetricUtility

__version__ = "0.1.0"

__all__ = ["Batch", "Implicit", "SymmetricEquilibrium", "SymmetricLoss", "SymmetricUtility"]
