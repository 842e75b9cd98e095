"""From raw files to array_record sets: once, without TensorFlow and without the network.

What lives here: what is recognized in a folder of raw files (`raw`: IDX, npz, CIFAR binaries, folders of images), and
`prepare`, which writes it as a tfds set that `load('tfds:NAME')`, `tfds.data_source` and grain read by random access.
What does not: reading prepared sets (`catalog.py`).

| in the folder | splits | stored as |
| --- | --- | --- |
| `train-images-idx3-ubyte[.gz]` and its three companions | train, test | pixels |
| `train.npz`, `validation.npz`, `test.npz` with `x` and `y` | those that are there | pixels, or float32 |
| `data_batch_*.bin` and `test_batch.bin` (CIFAR-10) | train, test | pixels |
| `train.bin` and `test.bin` (CIFAR-100, fine labels) | train, test | pixels |
| `train/CLASS/*`, `val/CLASS/*` (or `validation`), `test/CLASS/*` | those that are there | JPEG files of one size |
"""

import io
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxadv.core import check
from jaxadv.data.catalog import prepared_by
from jaxadv.data.sources import Source, arrays, idx, npz

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")
"""Endings of the files that a folder of images may hold."""

_PARTS = {"train": ("train",), "validation": ("validation", "val"), "test": ("test",)}
_CHUNK = 512


class Raw(NamedTuple):
    """Raw data of a set.

    Attributes:
      splits: split to a function that yields `(key, image, label)`; the image is an array, or bytes of a JPEG file.
      shape: of every example.
      dtype: uint8, or float32 in the range of the data.
      encoded: whether images are JPEG files.
      classes: names of the classes.
    """

    splits: Mapping[str, Callable[[], Iterator[tuple[str, Any, int]]]]
    shape: tuple[int, ...]
    dtype: Any
    encoded: bool
    classes: tuple[str, ...]


def _rows(source: Source) -> Callable[[], Iterator[tuple[str, Any, int]]]:
    def read():
        for start in range(0, len(source), _CHUNK):
            index = source.index[start : start + _CHUNK]
            x, y = source.store.read(index)
            yield from ((f"{i:09d}", image, int(label)) for i, image, label in zip(index, x, y))

    return read


def _of_sources(splits: Mapping[str, Source]) -> Raw:
    """Raw data of sources that lie in memory."""
    first = next(iter(splits.values()))
    classes = max(source.classes for source in splits.values())
    names = first.class_names or tuple(str(i) for i in range(classes))
    return Raw(
        splits={split: _rows(source) for split, source in splits.items()},
        shape=first.shape,
        dtype=first.store.read(first.index[:1])[0].dtype,
        encoded=False,
        classes=names,
    )


def _idx(folder: Path) -> Raw | None:
    def pair(word: str) -> Source | None:
        found = [sorted(folder.glob(f"{word}-{kind}-ubyte*")) for kind in ("images-idx3", "labels-idx1")]
        return idx(found[0][0], found[1][0]) if all(found) else None

    splits = {split: pair(word) for split, word in (("train", "train"), ("test", "t10k"))}
    splits = {split: source for split, source in splits.items() if source is not None}
    return _of_sources(splits) if splits else None


def _npz(folder: Path) -> Raw | None:
    splits = {split: npz(folder / f"{split}.npz") for split in _PARTS if (folder / f"{split}.npz").is_file()}
    return _of_sources(splits) if splits else None


def read_cifar(path: Path, *, labels: int) -> tuple[np.ndarray, np.ndarray]:
    """Read one file of the binary version of CIFAR.

    Args:
      path: the file: records of `labels` bytes and 3,072 bytes of pixels, channel after channel.
      labels: bytes of labels in a record: 1 in CIFAR-10, 2 in CIFAR-100 (coarse, fine); the last one counts.

    Returns:
      uint8 `[n, 32, 32, 3]` and int32 `[n]`.

    Raises:
      ValueError: if the file does not hold whole records.

    References:
      Krizhevsky 2009, Learning multiple layers of features from tiny images.
    """
    data, record = np.fromfile(path, np.uint8), labels + 3072
    if not data.size or data.size % record:
        raise ValueError(
            f"{path} must hold whole records of {record} bytes; got {data.size} bytes. Truncated? Fetch it again."
        )
    table = data.reshape(-1, record)
    images = table[:, labels:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return np.ascontiguousarray(images), table[:, labels - 1].astype(np.int32)


def _cifar(folder: Path) -> Raw | None:
    kinds = [(1, "data_batch_*.bin", "test_batch.bin", "batches.meta.txt")]
    kinds += [(2, "train.bin", "test.bin", "fine_label_names.txt")]
    for labels, train, test, meta in kinds:
        files = {"train": sorted(folder.glob(train)), "test": sorted(folder.glob(test))}
        if not all(files.values()):
            continue
        names = (folder / meta).read_text().split() if (folder / meta).is_file() else []
        classes = {1: 10, 2: 100}[labels]
        splits = {}
        for split, paths in files.items():
            parts = [read_cifar(path, labels=labels) for path in paths]
            x, y = (np.concatenate(column) for column in zip(*parts))
            given: dict[str, Any] = {"class_names": tuple(names)} if len(names) == classes else {}
            splits[split] = arrays(x, y, classes=classes, name="cifar", **given)
        return _of_sources(splits)
    return None


def _image(path: Path, size: int | None) -> tuple[bytes, tuple[int, ...]]:
    """A JPEG file of one size: the middle of the image, its shorter side brought to the size."""
    from PIL import Image

    content = path.read_bytes()
    try:
        with Image.open(io.BytesIO(content)) as image:
            fits = size is None or image.size == (size, size)
            edge = size or 0
            if fits and image.format == "JPEG" and image.mode == "RGB":
                image.load()  # refuses a file that was cut short
                return content, (image.height, image.width, 3)
            image = image.convert("RGB")
            if not fits:
                side = min(image.size)
                left, top = (image.width - side) // 2, (image.height - side) // 2
                image = image.resize(
                    (edge, edge), Image.Resampling.BICUBIC, (left, top, left + side, top + side), reducing_gap=3
                )
            buffer = io.BytesIO()
            image.save(buffer, "JPEG", quality=95, subsampling=0)
            return buffer.getvalue(), (image.height, image.width, 3)
    except (OSError, SyntaxError) as error:
        raise ValueError(
            f"{path} must be a whole image; got {len(content)} bytes that cannot be decoded ({error}). "
            "Truncated? Fetch it again, or remove it."
        ) from error


def _folders(folder: Path, size: int | None) -> Raw | None:
    parts = {split: next((folder / w for w in words if (folder / w).is_dir()), None) for split, words in _PARTS.items()}
    parts = {split: part for split, part in parts.items() if part is not None}
    if not parts:
        return None
    classes = sorted({p.name for part in parts.values() for p in part.iterdir() if p.is_dir()})
    if len(classes) < 2:
        raise ValueError(f"{folder} must hold images of at least two classes, as train/CLASS/FILE; got {classes}.")
    files = {
        split: [
            (path, classes.index(path.parent.name))
            for path in sorted(part.glob("*/*"))
            if path.suffix.lower() in SUFFIXES
        ]
        for split, part in parts.items()
    }
    for split, found in files.items():
        if not found:
            raise ValueError(f"{parts[split]} must hold images ({', '.join(SUFFIXES)}); got none.")
    shape = _image(next(iter(files.values()))[0][0], size)[1]

    def read(found):
        def go():
            for path, label in found:
                content, own = _image(path, size)
                if own != shape:
                    raise ValueError(f"{path} must have the shape {shape} of the others; got {own}. Pass size=.")
                yield f"{path.parent.name}/{path.name}", content, label

        return go

    return Raw({s: read(found) for s, found in files.items()}, shape, np.dtype(np.uint8), True, tuple(classes))


def raw(folder: Path, *, size: int | None = None) -> Raw:
    """Recognize the raw files of a folder.

    Args:
      folder: see the table of the module.
      size: side that images of a folder of images are brought to: the shorter side is scaled, the middle is cut out.
        None leaves them, and they must all have one shape.

    Returns:
      The raw data; images are read when asked for.

    Raises:
      FileNotFoundError: if nothing is recognized.
      ValueError: if a file is malformed or cut short.
    """
    for found in (_idx(folder), _npz(folder), _cifar(folder), _folders(folder, size)):
        if found is not None:
            return found
    raise FileNotFoundError(
        f"{folder} must hold IDX files, train.npz and test.npz, CIFAR binaries, or folders train/CLASS and test/CLASS; "
        f"got {sorted(p.name for p in folder.iterdir())[:8] if folder.is_dir() else 'no such folder'}."
    )


def prepare(folder: Any, name: str, out: Any, *, size: int | None = None) -> Path:
    """Write raw files as an array_record set.

    Args:
      folder: of raw files, see `raw`.
      name: of the set: lower-case letters, digits and underscores, beginning with a letter.
      out: the folder of prepared sets; the set lies in `out/NAME/1.0.0`.
      size: see `raw`.

    Returns:
      The folder of the set; `load('tfds:NAME', root=out)` reads it.

    Raises:
      ImportError: if tensorflow-datasets or array_record is missing.
      FileExistsError: if there is such a set.
      FileNotFoundError: if no raw files are recognized.
      ValueError: if a name or a file does not fit.
    """
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise ValueError(f"name must be lower-case letters, digits and underscores, a letter first; got {name!r}.")
    if size is not None:
        check.whole("size", size)
    if (Path(out) / name).exists():
        raise FileExistsError(f"{Path(out) / name} must not exist yet; got a set. Remove it, or choose another name.")
    return prepared_by(raw(Path(folder), size=size), name, Path(out))
