"""Symmetric equilibrium learning of VAEs for Pyro programs."""

from pyro_symeq.batch import Batch
from pyro_symeq.distributions import Implicit
from pyro_symeq.equilibrium import SymmetricEquilibrium
from pyro_symeq.game import Game, Player
from pyro_symeq.loss import GameLoss, SymmetricLoss
from pyro_symeq.play import Play
from pyro_symeq.utility import SymmetricUtility

__version__ = "0.1.0"

__all__ = [
    "Batch",
    "Game",
    "GameLoss",
    "Implicit",
    "Play",
    "Player",
    "SymmetricEquilibrium",
    "SymmetricLoss",
    "SymmetricUtility",
]
