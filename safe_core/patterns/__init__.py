"""Sparsity patterns define which sets of weights may be zero.

A pattern defines the units that are kept or zeroed whole (entries, groups, blocks, channels)
and the pools in which units compete. It is a frozen dataclass that holds no arrays and
depends on no framework. To add one, derive from `Pattern` or `FractionPattern` and export it
here.
"""

from .base import FractionPattern, Pattern, Units
from .block import Block
from .by_name import ByName
from .channel import Channel
from .distribution import erdos_renyi_kernel
from .fixed_zeros import FixedZeros
from .nm import NM
from .outliers import outlier_weighed
from .parsing import as_pattern
from .unstructured import Unstructured

__all__ = [
    "NM",
    "Block",
    "ByName",
    "Channel",
    "FixedZeros",
    "FractionPattern",
    "Pattern",
    "Units",
    "Unstructured",
    "as_pattern",
    "erdos_renyi_kernel",
    "outlier_weighed",
]
