"""How flat the loss is around a network: curvature, sharpness and landscape.

A network that was found by a method that seeks flatness should show it: in the largest
eigenvalues and the trace of the Hessian, in the rise of the loss within a ball, and in its
values along lines and planes. The functions here take lists of arrays of any library and
products with the Hessian, the loss or its gradient as callables; arrays stay on their
device, to which no vector is sent. ``loss_surface`` in `safe_core.adapters.torch.flatness` and
`safe_core.adapters.jax.flatness` makes these callables of a loss, and a `LossSurface` of them.
Figures are drawn by `safe_core.flatness.figures`, which needs matplotlib.

Examples
--------
>>> import numpy
>>> curvature = numpy.asarray([4.0, 1.0, -1.0])
>>> x, product = [numpy.zeros(3)], lambda v: [curvature * v[0]]
>>> round(eigenvalues(product, x).values[0], 6), trace(product, x).value
(4.0, 4.0)
"""

from .ascent import Sharpness, sharpness
from .landscape import Landscape, filter_direction, landscape
from .spectrum import Eigenvalues, Trace, eigenvalues, trace
from .surface import Loss, LossSurface

__all__ = [
    "Eigenvalues",
    "Landscape",
    "Loss",
    "LossSurface",
    "Sharpness",
    "Trace",
    "eigenvalues",
    "filter_direction",
    "landscape",
    "sharpness",
    "trace",
]
