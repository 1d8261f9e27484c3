"""Labelled data sets, read strictly: Fashion-MNIST by name, a folder of IDX files, or an .npz.

IDX is the format of MNIST, http://yann.lecun.com/exdb/mnist.
"""

from __future__ import annotations

import difflib
import gzip
import math
import struct
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch.utils import data as torch_data

from ..converters.errors import DataError, UsageError

Split = Literal["train", "test"]

_FASHION_MNIST = "fashion-mnist"
_FASHION_MNIST_FOLDERS = (
    Path(__file__).resolve().parent.parent / "examples" / "data" / "fashion-mnist",
    Path("examples") / "data" / "fashion-mnist",
    Path("/usr/share/datasets/fashion-mnist"),
)
_PREFIXES: Mapping[str, str] = {"train": "train", "test": "t10k"}
_IMAGES, _LABELS = 0x0803, 0x0801
_KINDS = {_IMAGES: "images", _LABELS: "labels"}


@dataclass(frozen=True, eq=False)
class Dataset(torch_data.Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """Samples and their classes, in memory.

    Attributes:
        x: float32 [N, ...]; images are [N, 1, H, W] in [0, 1].
        y: int64 [N].
        name: Which data these are, such as ``"fashion-mnist test"``, or ``"fashion-mnist
            test[:100]"`` for the first 100.
    """

    x: torch.Tensor
    y: torch.Tensor
    name: str

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, index: int | Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """One sample, or a batch for a sequence of indices."""
        return self.x[index], self.y[index]

    def loader(
        self, batch_size: int, shuffle: bool = False
    ) -> torch_data.DataLoader[tuple[torch.Tensor, torch.Tensor]]:
        """Batches x [batch_size, ...], y [batch_size]; the last one may be smaller."""
        if batch_size < 1:
            raise UsageError(f"the batch size is {batch_size}; it must be at least 1")
        order: torch_data.Sampler[int] = (
            torch_data.RandomSampler(self) if shuffle else torch_data.SequentialSampler(self)
        )
        # Indexing a whole batch at once is far faster than collating it sample by sample.
        batches = torch_data.BatchSampler(order, batch_size, drop_last=False)
        return torch_data.DataLoader(self, sampler=batches, batch_size=None)


def load(name_or_path: str | Path, *, split: Split = "test", limit: int | None = None) -> Dataset:
    """Read a data set.

    Args:
        name_or_path: ``fashion-mnist``; a folder with ``t10k-images-idx3-ubyte``,
            ``t10k-labels-idx1-ubyte`` (``train-...`` for the training split), plain or ``.gz``; or
            an ``.npz`` with integer y [N] and x [N, ...], uint8 (taken as x / 255), bool or float.
        split: ``"test"`` or ``"train"``; an .npz is a test split.
        limit: Only the first so many samples; all of them if there are fewer.

    Raises:
        UsageError: ``split`` or ``limit`` is not one of those above.
        DataError: The data are missing or malformed; says everything that is wrong with them.
    """
    if split not in _PREFIXES:
        raise UsageError(f"split is {split!r}; allowed: {', '.join(_PREFIXES)}")
    if limit is not None and limit < 1:
        raise UsageError(f"limit is {limit}; it must be at least 1, or left out for all samples")
    path = Path(name_or_path)
    if str(name_or_path) == _FASHION_MNIST:
        x, y = _read_idx_folder(_fashion_mnist_folder(split), split)
    elif path.is_dir():
        x, y = _read_idx_folder(path, split)
    elif path.is_file() and path.suffix == ".npz":
        if split == "train":
            raise DataError(
                f"{path}: an .npz is a test split, and the training split was asked for; "
                f"give {_FASHION_MNIST} or a folder of IDX files"
            )
        x, y = _read_npz(path)
    else:
        raise DataError(_unknown(str(name_or_path), path))
    name = f"{name_or_path} {split}"
    if limit is not None and limit < len(y):
        x, y, name = x[:limit], y[:limit], f"{name}[:{limit}]"
    return Dataset(_to_float(x), torch.from_numpy(y.astype(np.int64)), name)


def _unknown(given: str, path: Path) -> str:
    allowed = f"{_FASHION_MNIST}, a folder of IDX files, or an .npz file"
    if path.exists():
        return f"{given} is a file that is not an .npz; allowed: {allowed}"
    close = difflib.get_close_matches(given.lower().replace("_", "-"), [_FASHION_MNIST])
    hint = f"; did you mean {close[0]}?" if close else ""
    return f"no data set or path {given!r}; allowed: {allowed}{hint}"


def _fashion_mnist_folder(split: Split) -> Path:
    for folder in _FASHION_MNIST_FOLDERS:
        if any(folder.glob(f"{_PREFIXES[split]}-*-ubyte*")):
            return folder
    searched = dict.fromkeys(map(str, _FASHION_MNIST_FOLDERS))
    raise DataError(
        f"the {split} split of Fashion-MNIST is in none of {', '.join(searched)}; run `apt install "
        f"dataset-fashion-mnist`, or download {_PREFIXES[split]}-*.gz from "
        "https://github.com/zalandoresearch/fashion-mnist and give their folder"
    )


def _read_idx_folder(folder: Path, split: Split) -> tuple[np.ndarray[Any, Any], ...]:
    """Images [N, 1, H, W] and labels [N], uint8."""
    arrays, problems = [], []
    for magic, stem in ((_IMAGES, "images-idx3-ubyte"), (_LABELS, "labels-idx1-ubyte")):
        try:
            arrays.append(_read_idx(_find(folder, f"{_PREFIXES[split]}-{stem}"), magic))
        except DataError as error:
            problems.append(str(error))
    if problems:
        raise DataError("\n".join(problems))
    images, labels = arrays
    if len(images) != len(labels):
        raise DataError(
            f"{folder}: the {split} split has {len(images)} images and {len(labels)} labels; there "
            "must be one label an image: take both files from the same source"
        )
    return images[:, None], labels


def _find(folder: Path, name: str) -> Path:
    for path in (folder / name, folder / f"{name}.gz"):
        if path.is_file():
            return path
    below = folder / "FashionMNIST" / "raw"  # where torchvision keeps them
    hint = f"give {below}, which exists" if below.is_dir() else "give the folder that holds it"
    present = ", ".join(sorted(p.name for p in folder.glob("*ubyte*"))) or "no IDX files"
    raise DataError(f"{folder}: there is no {name} or {name}.gz; found {present}; {hint}")


def _read_idx(path: Path, magic: int) -> np.ndarray[Any, Any]:
    """The array of an IDX file of unsigned bytes, whose magic number says its rank."""
    again = "download the file again"
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path}: not a whole gzip file ({error}); {again}") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    if content[:2] == b"\x1f\x8b":
        raise DataError(f"{path}: found gzip data, expected plain IDX; name it {path.name}.gz")
    header = 4 + 4 * (magic & 0xFF)
    found = int.from_bytes(content[:4], "big")
    if len(content) >= 4 and found != magic:
        what = f" (IDX {_KINDS[found]})" if found in _KINDS else ""
        raise DataError(
            f"{path}: found magic number 0x{found:08x}{what}, expected 0x{magic:08x} (IDX "
            f"{_KINDS[magic]}); put the {_KINDS[magic]} under this name"
        )
    if len(content) < header:
        raise DataError(
            f"{path}: found {len(content)} bytes, expected an IDX header of {header}; {again}"
        )
    shape = struct.unpack_from(f">{magic & 0xFF}I", content, 4)
    if 0 in shape:
        raise DataError(f"{path}: found shape {list(shape)}, expected no empty dimension; {again}")
    if len(content) != header + math.prod(shape):
        raise DataError(
            f"{path}: found {len(content) - header} bytes of {_KINDS[magic]}, expected "
            f"{math.prod(shape)} for shape {list(shape)}; {again}"
        )
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)


def _read_npz(path: Path) -> tuple[np.ndarray[Any, Any], ...]:
    """x [N, ...] and y [N], in the file's types."""
    checks = {"x": _problems_of_x, "y": _problems_of_y}
    again = "write it with np.savez(path, x=x, y=y)"
    if not zipfile.is_zipfile(path):
        raise DataError(f"{path}: found no zip archive of arrays, which an .npz is; {again}")
    arrays, problems = {}, []
    try:
        with np.load(path, allow_pickle=False) as archive:
            there = ", ".join(archive.files) or "nothing"
            for key in checks:
                if key not in archive.files:
                    problems.append(f"{key} is missing; the file holds {there}")
                    continue
                try:
                    arrays[key] = np.asarray(archive[key])
                except (ValueError, EOFError, zlib.error, zipfile.BadZipFile) as error:
                    problems.append(f"{key} cannot be read: {error}")
    except (OSError, zipfile.BadZipFile) as error:
        raise DataError(f"{path}: not a whole .npz: {error}; {again}") from error
    for key, array in arrays.items():
        problems += checks[key](array)
    counts = [len(a) if a.ndim else 0 for a in arrays.values()]
    if len(set(counts)) > 1:
        problems.append(
            f"x has {counts[0]} samples and y {counts[1]}; there must be one y for each x"
        )
    if problems:
        raise DataError(
            "\n  ".join([f"{path}: not a data set of x [N, ...] and y [N]:", *problems])
        )
    return arrays["x"], arrays["y"]


def _problems_of_x(x: np.ndarray[Any, Any]) -> list[str]:
    problems = []
    if x.ndim < 2 or x.size == 0:
        problems.append(f"x has shape {list(x.shape)}; expected [N, ...] with N at least 1")
    if not (np.issubdtype(x.dtype, np.floating) or x.dtype in (np.uint8, np.bool_)):
        problems.append(
            f"x is {x.dtype}; expected a floating type, bool, or uint8 (taken as x / 255)"
        )
    elif bad := int(x.size - torch.isfinite(_to_float(x)).sum().item()):
        problems.append(f"x has {bad} values that are NaN or not finite in float32; remove them")
    return problems


def _problems_of_y(y: np.ndarray[Any, Any]) -> list[str]:
    problems = []
    if y.ndim != 1 or y.size == 0:
        problems.append(f"y has shape {list(y.shape)}; expected [N], the class of each sample")
    if not np.issubdtype(y.dtype, np.integer):
        problems.append(f"y is {y.dtype}; expected an integer type, the class of each sample")
    elif y.size and y.min() < 0:
        problems.append(f"y has the class {y.min()}; classes count from 0")
    return problems


def _to_float(x: np.ndarray[Any, Any]) -> torch.Tensor:
    """As float32; uint8 becomes x / 255, as torchvision's ToTensor makes it."""
    with np.errstate(over="ignore"):
        tensor = torch.from_numpy(x.astype(np.float32))
    return tensor / 255 if x.dtype == np.uint8 else tensor
