"""Measure how flat the loss is around a network: curvature, sharpness and landscape.

The functions compute the largest eigenvalues and the trace of the Hessian, the spread of the
Hessians of batches, the rise of the loss within a ball, and the loss along lines and planes. They
take lists of arrays of any library, and callables for Hessian-vector products, the loss or its
gradient. All vectors stay on the device of the arrays. ``loss_surface`` in
`safe_core.adapters.torch.flatness` and `safe_core.adapters.jax.flatness` makes a `LossSurface`,
which supplies these callables.
`safe_core.flatness.figures` draws figures and needs matplotlib.

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
from .moments import Moment, hessian_moment
from .spectrum import Eigenvalues, Trace, eigenvalues, trace
from .surface import Loss, LossSurface

__all__ = [
    "Eigenvalues",
    "Landscape",
    "Loss",
    "LossSurface",
    "Moment",
    "Sharpness",
    "Trace",
    "eigenvalues",
    "filter_direction",
    "hessian_moment",
    "landscape",
    "sharpness",
    "trace",
]
