"""Load digits, MNIST, CIFAR-10, CIFAR-100 and CIFAR-10-C from local files, in NumPy batches.

Nothing is downloaded. Images are uint8 of shape (n, height, width, channels).

>>> digits = load("digits")
>>> digits.train.images.shape, digits.train.labels.shape, digits.classes
((1257, 8, 8, 1), (1257,), 10)
>>> inputs, labels = next(batches(digits.train, 64, seed=0, epoch=0))
>>> digits.normalisation(inputs).shape
(64, 8, 8, 1)
"""

from .batches import augmented, batches, channels_first
from .cifar_c import CORRUPTIONS, load_cifar_10_c
from .datasets import Dataset, Normalisation, Split, load
from .splits import pixels

__all__ = [
    "CORRUPTIONS",
    "Dataset",
    "Normalisation",
    "Split",
    "augmented",
    "batches",
    "channels_first",
    "load",
    "load_cifar_10_c",
    "pixels",
]
