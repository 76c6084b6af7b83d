import gzip
import struct

import numpy as np
import pytest

from saccade.datasets import IDXData, read_idx
from saccade.errors import ConfigError, DataError


def idx_bytes(array, code=8):
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, code, array.ndim, *array.shape) + array.tobytes()


def write_pair(folder, prefix, count, compress=True):
    """Write images whose pixels equal their label."""
    folder.mkdir(parents=True, exist_ok=True)
    labels = (np.arange(count) % 3).astype(np.uint8)
    images = np.broadcast_to(labels[:, None, None] * 80, (count, 5, 4)).astype(np.uint8)
    for name, array in (("images-idx3", images), ("labels-idx1", labels)):
        content = idx_bytes(array)
        path = folder / f"{prefix}-{name}-ubyte{'.gz' if compress else ''}"
        path.write_bytes(gzip.compress(content) if compress else content)


@pytest.fixture
def root(tmp_path):
    write_pair(tmp_path, "train", 12)
    write_pair(tmp_path, "t10k", 6)
    return tmp_path


@pytest.mark.parametrize(("code", "dtype"), [(0x08, "u1"), (0x09, "i1"), (0x0B, ">i2"), (0x0C, ">i4"), (0x0D, ">f4")])
@pytest.mark.parametrize("compress", [False, True])
def test_round_trip(tmp_path, code, dtype, compress):
    array = np.arange(24).reshape(2, 3, 4).astype(dtype)
    content = idx_bytes(array, code)
    (tmp_path / "x").write_bytes(gzip.compress(content) if compress else content)
    got = read_idx(tmp_path / "x")
    assert got.dtype == np.dtype(dtype)
    np.testing.assert_array_equal(got, array)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\x89PNG....", "expected magic 2051"),
        (b"", "expected magic 2051"),
        (b"\0\0\x08\x03\0\0\0\x01", "cut off within its header"),
        (idx_bytes(np.zeros((2, 3), np.uint8))[:-1], r"holds 5 bytes of data, expected 6 for shape \(2, 3\)"),
        (idx_bytes(np.zeros((2, 3), np.uint8)) + b"!", "holds 7 bytes of data, expected 6"),
        (gzip.compress(idx_bytes(np.zeros(99, np.uint8)), mtime=0)[:-9], "damaged gzip"),
    ],
)
def test_damaged_file_is_explained(tmp_path, content, message):
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_idx(tmp_path / "x")


def test_missing_files(tmp_path):
    with pytest.raises(ConfigError, match="does not exist"):
        read_idx(tmp_path / "x")
    with pytest.raises(ConfigError, match="has no train-images-idx3-ubyte"):
        IDXData(str(tmp_path)).samples("train")
    with pytest.raises(ConfigError, match=r"--data\.root"):
        IDXData().samples("train")


def test_splits_and_pixels(root):
    data = IDXData(str(root), img_size=8, num_workers=0)
    assert data.class_names == ["0", "1", "2"]
    assert [len(data.samples(split)) for split in ("train", "val", "test", "predict")] == [12, 6, 6, 6]
    sample = data.samples("val")[2]
    assert (sample.id, sample.target) == ("t10k/00002", 2)
    image = sample.load()
    assert (image.mode, image.size, image.getpixel((0, 0))) == ("RGB", (4, 5), (160, 160, 160))


def test_validation_can_be_held_out_of_training(root):
    data = IDXData(str(root), val_fraction=0.25)
    assert [len(data.samples(split)) for split in ("train", "val", "test")] == [9, 3, 6]


@pytest.mark.parametrize("place", ["FashionMNIST/raw", "raw"])
def test_torchvision_layout(tmp_path, place):
    write_pair(tmp_path / place, "train", 3, compress=False)
    assert len(IDXData(str(tmp_path)).samples("train")) == 3


def test_labels_must_fit(root):
    with pytest.raises(DataError, match="label 2 but only 2 class names"):
        IDXData(str(root), class_names=["a", "b"]).samples("train")
    (root / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx_bytes(np.zeros(5, np.uint8))))
    with pytest.raises(DataError, match="12 images but labels of shape"):
        IDXData(str(root)).samples("train")


def test_fashion_mnist_as_distributed(data_root):
    data = IDXData(str(data_root / "images" / "fashion_mnist"))
    assert data.class_counts == [54] * 10
    assert len(data.samples("val")) == 180
    assert data.samples("train")[0].load().size == (28, 28)
