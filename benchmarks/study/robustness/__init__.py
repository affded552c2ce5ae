"""Measure robustness: common corruptions, and attacks by projected gradient ascent (PGD).

>>> attack = PGD("linf", radius=1 / 255)
>>> attack.steps, attack.step_size == attack.radius / 4
(10, True)

`safe_core.study.robustness.torch` and `safe_core.study.robustness.jax` attack models.
`masking_report` checks for masked gradients, which make an attack look weaker than it is.
"""

from .corruptions import CORRUPTIONS, corrupt
from .masking import MaskingReport, masking_report
from .pgd import PGD

__all__ = ["CORRUPTIONS", "PGD", "MaskingReport", "corrupt", "masking_report"]
