"""Symmetric equilibrium learning of VAEs for Pyro programs."""

from pyro_symeq import metrics
from pyro_symeq.batch import Batch
from pyro_symeq.conditional_game import conditional_game
from pyro_symeq.conditionals import Conditionals
from pyro_symeq.data_exchange import data_exchange_game
from pyro_symeq.diagnostics import Diagnostics
from pyro_symeq.distributions import Implicit
from pyro_symeq.dream_exchange import DreamExchange
from pyro_symeq.equilibrium import SymmetricEquilibrium
from pyro_symeq.game import Game
from pyro_symeq.limiting import LimitingDistribution
from pyro_symeq.loader import TensorLoader
from pyro_symeq.loss import GameLoss, SymmetricLoss
from pyro_symeq.marginals import Completion, Marginal
from pyro_symeq.play import Play
from pyro_symeq.player import Player
from pyro_symeq.utility import SymmetricUtility

__version__ = "0.1.0"

__all__ = [
    "Batch",
    "Completion",
    "Conditionals",
    "Diagnostics",
    "DreamExchange",
    "Game",
    "GameLoss",
    "Implicit",
    "LimitingDistribution",
    "Marginal",
    "Play",
    "Player",
    "SymmetricEquilibrium",
    "SymmetricLoss",
    "SymmetricUtility",
    "TensorLoader",
    "conditional_game",
    "data_exchange_game",
    "metrics",
]
