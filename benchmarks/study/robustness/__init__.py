"""Robustness of a trained network: common corruptions, and attacks by projected gradients.

>>> attack = PGD("linf", radius=1 / 255)
>>> attack.steps, attack.step_size == attack.radius / 4
(10, True)

Attackers for a model are in `safe_core.study.robustness.torch` and
`safe_core.study.robustness.jax`; `masking_report` says whether their figures can be trusted.
"""

from .corruptions import CORRUPTIONS, corrupt
from .masking import MaskingReport, masking_report
from .pgd import PGD

__all__ = ["CORRUPTIONS", "PGD", "MaskingReport", "corrupt", "masking_report"]
