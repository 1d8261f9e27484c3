"""Data sets: what is read, and what is said of everything that cannot be."""

import gzip
import hashlib
import re
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from spikeport.converters.errors import DataError, UsageError
from spikeport.deploy import data

SHIPPED = Path(__file__).parents[2] / "examples" / "data" / "fashion-mnist"
IMAGES, LABELS = "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">I{array.ndim}I", 0x0800 | array.ndim, *array.shape) + array.tobytes()


PIXELS = np.arange(3 * 28 * 28, dtype=np.uint32).astype(np.uint8).reshape(3, 28, 28)
CLASSES = np.array([7, 0, 9], dtype=np.uint8)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / IMAGES).write_bytes(idx(PIXELS))
    (tmp_path / f"{LABELS}.gz").write_bytes(gzip.compress(idx(CLASSES)))
    return tmp_path


def error(source: Path | str, **options) -> str:
    with pytest.raises(DataError) as caught:
        data.load(source, **options)
    return str(caught.value)


def test_shipped_files_are_the_originals():
    table = dict(re.findall(r"`(t10k\S+)` \| `(\w{64})`", (SHIPPED / "README.md").read_text()))
    files = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in SHIPPED.glob("*.gz")}
    assert files == table
    assert len(files) == 2


def test_fashion_mnist_by_name(monkeypatch):
    monkeypatch.chdir(SHIPPED.parents[2])
    test = data.load("fashion-mnist")
    assert test.name == "fashion-mnist test"
    assert (test.x.shape, test.x.dtype) == ((10_000, 1, 28, 28), torch.float32)
    assert (test.x.min(), test.x.max()) == (0, 1)
    assert (test.y.dtype, test.y.bincount().tolist()) == (torch.int64, [1000] * 10)
    # An ankle boot, a pullover, two pairs of trousers.
    assert test.y[:4].tolist() == [9, 2, 1, 1]


def test_folder_plain_and_gzipped(folder):
    test = data.load(folder)
    assert torch.equal(test.x, torch.from_numpy(PIXELS).float()[:, None] / 255)
    assert test.y.tolist() == [7, 0, 9]
    assert test.name == f"{folder} test"


def test_training_split(folder):
    for name in (IMAGES, f"{LABELS}.gz"):
        (folder / name).rename(folder / name.replace("t10k", "train"))
    assert len(data.load(folder, split="train")) == 3
    assert "there is no t10k-images-idx3-ubyte or" in error(folder)


def test_limit(folder):
    two = data.load(folder, limit=2)
    assert (len(two), two.x.shape, two.name) == (2, (2, 1, 28, 28), f"{folder} test[:2]")
    all_of_them = data.load(folder, limit=4)
    assert (len(all_of_them), all_of_them.name) == (3, f"{folder} test")


@pytest.mark.parametrize("limit", [0, -1])
def test_limit_below_one(folder, limit):
    with pytest.raises(UsageError, match=f"limit is {limit}; it must be at least 1"):
        data.load(folder, limit=limit)


def test_unknown_split(folder):
    with pytest.raises(UsageError, match="split is 'val'; allowed: train, test"):
        data.load(folder, split="val")


def test_items_and_batches(folder):
    test = data.load(folder)
    x, y = test[2]
    assert (x.shape, y.item()) == ((1, 28, 28), 9)
    batches = list(test.loader(2))
    assert [b[1].tolist() for b in batches] == [[7, 0], [9]]
    assert torch.equal(torch.cat([b[0] for b in batches]), test.x)
    torch.manual_seed(0)
    orders = [
        [(x[0, 0, 0].item(), y.item()) for x, y in zip(*batch, strict=True)]
        for _ in range(20)
        for batch in test.loader(3, shuffle=True)
    ]
    assert len({tuple(o) for o in orders}) > 1
    pairs = sorted(zip(test.x[:, 0, 0, 0].tolist(), test.y.tolist(), strict=True))
    assert all(sorted(o) == pairs for o in orders)
    with pytest.raises(UsageError, match="batch size is 0"):
        test.loader(0)


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        (IMAGES, b"", "found 0 bytes, expected an IDX header of 16"),
        (IMAGES, idx(PIXELS)[:10], "found 10 bytes, expected an IDX header of 16"),
        (IMAGES, idx(PIXELS)[:-1], r"found 2351 bytes of images, expected 2352 for shape \[3, 28"),
        (IMAGES, idx(PIXELS) + b"\0", "found 2353 bytes of images, expected 2352"),
        (
            IMAGES,
            idx(CLASSES),
            r"found magic number 0x00000801 \(IDX labels\), expected 0x00000803",
        ),
        (IMAGES, idx(PIXELS.astype(">i2")).replace(b"\x08", b"\x0b", 1), "0x00000b03, expected 0x"),
        (IMAGES, idx(PIXELS[:0]), r"found shape \[0, 28, 28\], expected no empty dimension"),
        (IMAGES, gzip.compress(idx(PIXELS), mtime=0), f"found gzip data, .*; name it {IMAGES}.gz"),
        (f"{LABELS}.gz", gzip.compress(idx(CLASSES), mtime=0)[:-9], "not a whole gzip file"),
        (f"{LABELS}.gz", idx(CLASSES), "not a whole gzip file"),
        (
            f"{LABELS}.gz",
            gzip.compress(idx(CLASSES), mtime=0)[:-8] + bytes(8),
            "not a whole gzip .*CRC",
        ),
        (
            f"{LABELS}.gz",
            gzip.compress(idx(PIXELS), mtime=0),
            r"\(IDX images\), .*; put the labels under",
        ),
        (f"{LABELS}.gz", gzip.compress(idx(CLASSES[:2]), mtime=0), "has 3 images and 2 labels"),
    ],
)
def test_malformed_idx(folder, file, content, said):
    (folder / file).write_bytes(content)
    message = error(folder)
    assert re.search(said, message)
    assert str(folder) in message


def test_malformed_idx_says_everything(folder):
    (folder / IMAGES).write_bytes(b"")
    (folder / f"{LABELS}.gz").unlink()
    first, second = error(folder).splitlines()
    assert "found 0 bytes" in first
    assert "no t10k-labels-idx1-ubyte or t10k-labels-idx1-ubyte.gz; found t10k-images" in second


def test_torchvision_root_is_recognised(folder):
    below = folder / "FashionMNIST" / "raw"
    below.mkdir(parents=True)
    for name in (IMAGES, f"{LABELS}.gz"):
        (folder / name).rename(below / name)
    assert f"give {below}, which exists" in error(folder)
    assert len(data.load(below)) == 3


def test_unknown_name(tmp_path):
    assert "did you mean fashion-mnist?" in error("FashionMNIST")
    message = error(tmp_path / "nowhere")
    assert "allowed: fashion-mnist, a folder of IDX files, or an .npz" in message
    assert "did you mean" not in message
    (tmp_path / "x.csv").write_text("1,2")
    assert "is a file that is not an .npz" in error(tmp_path / "x.csv")


def test_missing_fashion_mnist_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "_FASHION_MNIST_FOLDERS", (tmp_path / "a", tmp_path / "b"))
    message = error("fashion-mnist", split="train")
    assert f"is in none of {tmp_path / 'a'}, {tmp_path / 'b'}" in message
    assert "apt install dataset-fashion-mnist" in message
    assert "train-*.gz from https://github.com/zalandoresearch/fashion-mnist" in message


@pytest.mark.parametrize(
    ("x", "expected"),
    [
        (np.array([[0, 51, 255]] * 2, np.uint8), [[0, 0.2, 1]] * 2),
        (np.array([[-3.5, 300]] * 2, np.float64), [[-3.5, 300]] * 2),
        (np.array([[0.5, 1]] * 2, np.float16), [[0.5, 1]] * 2),
        (np.array([[True, False]] * 2), [[1, 0]] * 2),
    ],
)
def test_npz(tmp_path, x, expected):
    np.savez(tmp_path / "a.npz", x=x, y=np.array([4, 2], np.int32), more=1)
    test = data.load(tmp_path / "a.npz")
    assert (test.x.dtype, test.y.dtype) == (torch.float32, torch.int64)
    assert test.y.tolist() == [4, 2]
    assert torch.equal(test.x, torch.tensor(expected))


X, Y = np.zeros((3, 1, 2, 2)), np.zeros(3, int)


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        (
            {"images": X, "labels": Y},
            ["x is missing; the file holds images, labels", "y is missing"],
        ),
        ({}, ["x is missing; the file holds nothing"]),
        ({"x": X, "y": Y[:2]}, ["x has 3 samples and y 2"]),
        (
            {"x": X + np.array([[1, np.nan], [1, np.inf]]), "y": Y},
            ["x has 6 values that are NaN or not fin"],
        ),
        ({"x": X + 1e300, "y": Y}, ["x has 12 values that are NaN or not finite in float32"]),
        ({"x": X.astype(int), "y": Y}, ["x is int64; expected a floating type, bool, or uint8"]),
        ({"x": X.astype(str), "y": Y.astype(str)}, ["x is <U", "y is <U"]),
        (
            {"x": X.astype(complex), "y": Y + 0.5},
            ["x is complex128", "y is float64; expected an int"],
        ),
        ({"x": X.astype(object), "y": Y}, ["x cannot be read: Object arrays cannot be loaded"]),
        ({"x": X[:0], "y": Y[:0]}, ["x has shape [0, 1, 2, 2]", "y has shape [0]"]),
        ({"x": 1.0, "y": 1}, ["x has shape []; expected [N, ...]", "y has shape []; expected [N]"]),
        ({"x": X, "y": np.eye(3, dtype=int)}, ["y has shape [3, 3]; expected [N]"]),
        ({"x": X, "y": Y - 1}, ["y has the class -1"]),
    ],
)
def test_malformed_npz_says_everything(tmp_path, arrays, said):
    np.savez(tmp_path / "a.npz", **arrays)
    message = error(tmp_path / "a.npz")
    assert message.startswith(str(tmp_path / "a.npz"))
    for part in said:
        assert part in message


def test_npz_that_is_none(tmp_path):
    path = tmp_path / "a.npz"
    np.savez_compressed(path, x=np.random.default_rng(0).normal(size=(9, 99)), y=np.zeros(9, int))
    whole = path.read_bytes()
    path.write_bytes(whole[:500])
    assert "found no zip archive of arrays" in error(path)
    path.write_bytes(whole[:200] + bytes([whole[200] ^ 255]) + whole[201:])
    assert "x cannot be read" in error(path)
    with path.open("wb") as file:
        np.save(file, X)
    assert "found no zip archive of arrays" in error(path)


def test_npz_is_no_training_split(tmp_path):
    np.savez(tmp_path / "a.npz", x=X, y=Y)
    assert "an .npz is a test split" in error(tmp_path / "a.npz", split="train")
