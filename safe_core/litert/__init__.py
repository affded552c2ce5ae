"""Write sparse networks as LiteRT files, and check them in a process of their own.

`save_litert` of `safe_core.adapters.torch` and `safe_core.adapters.jax` translate a model into a
`graph.Graph` by `build.Builder`; `export.save_graph` does the rest.
"""

from .graph import UnsupportedError
from .report import LayerFormat, LiteRTReport

__all__ = ["LayerFormat", "LiteRTReport", "UnsupportedError"]
