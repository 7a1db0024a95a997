"""Is a pair any good?"""

from pyro_symeq.metrics.mutual_information import information

__all__ = ["information"]
