"""Is a pair any good?"""

from pyro_symeq.metrics.estimate import Estimate
from pyro_symeq.metrics.frechet import Features, FrechetDistance, frechet_distance, inception
from pyro_symeq.metrics.likelihood import LogLikelihood, log_likelihood
from pyro_symeq.metrics.mutual_information import information

__all__ = [
    "Estimate",
    "Features",
    "FrechetDistance",
    "LogLikelihood",
    "frechet_distance",
    "inception",
    "information",
    "log_likelihood",
]
