"""Write sparse networks as LiteRT files, and check them in a process of their own.

The front ends of `safe_core.adapters` translate models into a `graph.Graph` by `build.Builder`.
"""

from .export import Settings, check_settings, save_graph
from .graph import UnsupportedError
from .report import LayerFormat, LiteRTReport

__all__ = [
    "LayerFormat",
    "LiteRTReport",
    "Settings",
    "UnsupportedError",
    "check_settings",
    "save_graph",
]
