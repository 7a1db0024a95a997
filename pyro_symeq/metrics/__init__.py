"""Is a pair any good?"""

from pyro_symeq.metrics.consistency import consistency
from pyro_symeq.metrics.estimate import Estimate
from pyro_symeq.metrics.exploitability import exploitability
from pyro_symeq.metrics.frechet import Features, FrechetDistance, frechet_distance, inception
from pyro_symeq.metrics.likelihood import LogLikelihood, log_likelihood
from pyro_symeq.metrics.mutual_information import (
    DreamedInformation,
    dreamed_information,
    information,
)
from pyro_symeq.metrics.two_samples import two_sample_accuracy

__all__ = [
    "DreamedInformation",
    "Estimate",
    "Features",
    "FrechetDistance",
    "LogLikelihood",
    "consistency",
    "dreamed_information",
    "exploitability",
    "frechet_distance",
    "inception",
    "information",
    "log_likelihood",
    "two_sample_accuracy",
]
