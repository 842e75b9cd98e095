"""Where examples come from: plain arrays, IDX and npz files, JPEG copies.

What lives here: `Source` (random access to examples as float32 in the data's range), its makers, a blend of two, the
splits, and fixed evaluation subsets. What does not: data sets by name and tfds folders (`catalog.py`), batching and
order (`pipeline.py`), generated data (`synthetic.py`), augmentation.

Splits follow one rule. 'test' is the official test set. The official training set is divided, once and for all, into
'train' and 'validation': the latter is the first `min(5000, n // 10)` (at least one) of `balanced_order(labels,
seed=1)`. A training run may look at 'validation' as often as it likes, at 'test' never. 'train+validation' is the
whole official training set. An index is always the row of the official file, whatever the split, so that an example
keeps its random keys.
"""

import dataclasses
import functools
import gzip
import hashlib
import io
import math
import os
import struct
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from jaxtyping import Float32, Int32

from jaxadv.core import check
from jaxadv.data.pipeline import as_floats, balanced_order

SPLITS = ("train", "validation", "test", "train+validation")

_CHUNK = 1024  # rows per read while hashing or scanning labels


# --- stores: raw rows behind one small door --------------------------------------------------------------------------


class _Store(Protocol):
    """Rows in the order of the official file, as stored (bytes or float32)."""

    scale: float

    def read(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]: ...

    def labels(self) -> np.ndarray: ...


class _Arrays:
    """Rows of two arrays in memory."""

    def __init__(self, x: np.ndarray, y: np.ndarray, scale: float):
        self.x, self.y, self.scale = x, y, scale

    def read(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return self.x[rows], self.y[rows]

    def labels(self) -> np.ndarray:
        return self.y


class _Jpegs:
    """JPEG files one after another in one array, decoded when first read and kept as bytes of pixels."""

    scale = 255.0

    def __init__(self, blob: np.ndarray, offsets: np.ndarray, y: np.ndarray, where: str):
        self.blob, self.offsets, self.y, self.where = blob, offsets, y, where
        self.pixels: np.ndarray | None = None
        self.done = np.zeros(len(y), bool)

    def decode(self, row: int) -> np.ndarray:
        from PIL import Image

        file = self.blob[self.offsets[row] : self.offsets[row + 1]].tobytes()
        try:
            with Image.open(io.BytesIO(file)) as image:
                return np.asarray(image.convert("RGB"))
        except (OSError, SyntaxError) as error:
            raise ValueError(
                f"image {row} of {self.where} must be a whole JPEG file; got {len(file)} bytes that cannot be decoded "
                f"({error}). A damaged or truncated copy? Fetch the file again."
            ) from error

    def read(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        for row in rows[~self.done[rows]].tolist():
            image = self.decode(row)
            if self.pixels is None:
                self.pixels = np.zeros(
                    (len(self.y), *image.shape), np.uint8
                )  # the system lends pages as they are written
            if image.shape != self.pixels.shape[1:]:
                raise ValueError(
                    f"the images of {self.where} must all have one size; got {image.shape} at row {row} after "
                    f"{self.pixels.shape[1:]}. Resize them before packing."
                )
            self.pixels[row] = image
            self.done[row] = True  # after the pixels: two threads may do the same work, never half of it
        if self.pixels is None:
            self.pixels = np.zeros((len(self.y), *self.decode(0).shape), np.uint8)
        return self.pixels[rows], self.y[rows]

    def labels(self) -> np.ndarray:
        return self.y


# --- the source ------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class Source:
    """A finite set of labeled examples with random access. Make one with `load`, `arrays` or another maker.

    `source[positions]` gives `{"x": float32 [k, *shape], "y": int32 [k]}`; positions are integers in [0, len(source)),
    a slice or a boolean mask [n]. Bytes become `bytes / 255` (digits: `/ 16`). A single integer gives a batch of one.

    Attributes:
      name: short name, as `load` takes it.
      split: which split, or "" where there is none.
      classes: number of classes.
      shape: shape of one example, (h, w, c) for images.
      bounds: lowest and highest value an input may take.
      index: int32 [n], row of each example in the official file (its identity: random keys derive from it).
      class_names: names of the classes, or empty.
      title: how to call the data in reports.
      credit: whom to credit, and the license, where known.
      store: the raw rows (private).
    """

    name: str
    split: str
    classes: int
    shape: tuple[int, ...]
    bounds: tuple[float, float]
    index: Int32[np.ndarray, "n"] = dataclasses.field(repr=False)
    store: Any = dataclasses.field(repr=False)
    class_names: tuple[str, ...] = dataclasses.field(default=(), repr=False)
    title: str = dataclasses.field(default="", repr=False)
    credit: str = dataclasses.field(default="", repr=False)

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, indices: Any) -> dict[str, np.ndarray]:
        return as_floats(self._kept(self.index[_positions(indices, len(self))]))

    def stored(self, indices: Any) -> dict[str, np.ndarray]:
        """Return rows as they are kept: in a quarter of the memory, where that is bytes.

        Args:
          indices: positions, as `source[positions]` takes them.

        Returns:
          `x` uint8 `[k, *shape]` with `scale` float32 `[]` beside it, or `x` float32; and `y` int32 `[k]`. A subclass
          that reads in a way of its own gives what it reads.
        """
        if type(self).__getitem__ is not Source.__getitem__:
            return self[indices]
        return self._kept(self.index[_positions(indices, len(self))])

    def _kept(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        x, y = self.store.read(rows)
        return {"x": x, "y": y} | ({"scale": np.asarray(self.store.scale, np.float32)} if x.dtype == np.uint8 else {})

    def _read(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        batch = as_floats(self._kept(rows))
        return batch["x"], batch["y"]

    def all(self) -> tuple[Float32[np.ndarray, "n ..."], Int32[np.ndarray, "n"]]:
        """Return every example, (x, y). Decoded images stay in memory as bytes; the arrays are the caller's own."""
        return self._read(self.index)

    @functools.cached_property
    def y(self) -> Int32[np.ndarray, "n"]:
        """All labels, without decoding images where the file allows it."""
        return self.store.labels()[self.index]

    @functools.cached_property
    def fingerprint(self) -> str:
        """First 16 hexadecimal digits of the SHA-256 of shape, values (little-endian float32) and labels, in order.

        Equal for equal content, whatever file or type it came from; computed when first asked for.
        """
        digest = hashlib.sha256(repr((len(self), *self.shape)).encode())
        labels = []
        for start in range(0, len(self), _CHUNK):
            x, y = self._read(self.index[start : start + _CHUNK])
            digest.update(np.ascontiguousarray(x, "<f4").tobytes())
            labels.append(y)
        digest.update(np.concatenate(labels).astype("<i4").tobytes())
        return digest.hexdigest()[:16]

    def subset(self, indices: Any) -> "Source":
        """Return the source of the examples at these positions, in this order. Their `index` stays what it was.

        Args:
          indices: positions in this source: integers [k], a slice, or a boolean mask [n].

        Returns:
          A source that shares the rows with this one.

        Raises:
          ValueError: if nothing is selected.
          IndexError: if a position is out of range.
        """
        positions = _positions(indices, len(self))
        if not len(positions):
            raise ValueError(
                f"a subset must hold at least one example; got an empty selection of the {len(self)} of {self.name!r}."
            )
        return dataclasses.replace(self, index=self.index[positions])

    def take(self, n: int) -> "Source":
        """Return the first `n` examples.

        Args:
          n: how many, from 1 to `len(self)`.

        Returns:
          A source.

        Raises:
          ValueError: if there are fewer.
        """
        _enough(self, n)
        return self.subset(slice(n))


def _positions(indices: Any, n: int) -> np.ndarray:
    """Turn a slice, a mask or integers into positions [k], refusing what would silently wrap around."""
    if isinstance(indices, slice):
        return np.arange(n)[indices]
    given = np.atleast_1d(np.asarray(indices))
    if given.ndim == 1 and given.dtype == bool and len(given) == n:
        return np.flatnonzero(given)
    if given.ndim != 1 or (given.size and not np.issubdtype(given.dtype, np.integer)):
        raise IndexError(
            f"positions must be integers [k], a slice or a boolean mask [{n}]; got {given.dtype}{list(given.shape)}. "
            "Pass a one-dimensional list of positions."
        )
    if given.size and (given.min() < 0 or given.max() >= n):
        raise IndexError(
            f"positions must lie in [0, {n}); got {given.min()} to {given.max()}. "
            "Padding (-1)? Drop it by the batch's mask. Dataset indices? Look them up in source.index."
        )
    return given.astype(np.int64)


def _enough(source: Source, n: int) -> None:
    check.whole("n", n)
    if n > len(source):
        raise ValueError(
            f"n must be at most the number of examples; got n={n} for {len(source)} examples of {source.name!r}."
        )


def float_bounds(bounds: Sequence[Any]) -> tuple[float, float]:
    """Return (lowest, highest) as float32 numbers, with which float32 data will be compared.

    Args:
      bounds: lowest and highest value.

    Returns:
      The two, rounded to float32.

    Raises:
      ValueError: if they are not two finite numbers in rising order.
    """
    values = [float(np.float32(b)) for b in bounds]
    if len(values) != 2 or not (math.isfinite(values[0]) and math.isfinite(values[1]) and values[0] < values[1]):
        raise ValueError(f"bounds must be (lowest, highest), finite and lowest < highest; got {tuple(bounds)}.")
    return values[0], values[1]


# --- two sources in one ----------------------------------------------------------------------------------------------


class _Both:
    """Rows of one source, and after them, from `since` on, those of another; bytes where both keep them alike."""

    def __init__(self, first: Source, second: Source, since: int):
        self.first, self.second, self.since = first, second, since
        self.scale = first.store.scale

    def read(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        later = rows >= self.since
        parts = [(~later, self.first._kept(rows[~later])), (later, self.second._kept(rows[later] - self.since))]
        if any(part.get("scale") != self.scale for _, part in parts):
            parts = [(where, as_floats(part)) for where, part in parts]
        x, y = np.empty((len(rows), *self.first.shape), parts[0][1]["x"].dtype), np.empty(len(rows), np.int32)
        for where, part in parts:
            x[where], y[where] = part["x"], part["y"]
        return x, y

    def labels(self) -> np.ndarray:
        return np.concatenate([self.first.store.labels()[: self.since], self.second.store.labels()])


@dataclasses.dataclass(frozen=True, eq=False)
class Blend(Source):
    """Two sources of which every batch holds a fixed share; built by `blend`. As a `Source`, all rows of both.

    Attributes:
      share: of the first source in a batch.
      since: index from which on rows are of the second source; their own index there is `index - since`.
    """

    share: float = 0.5
    since: int = 0

    def parts(self, batch_size: int) -> tuple[tuple[np.ndarray, int], tuple[np.ndarray, int]]:
        """Return for both sources the positions of its examples and the number of its rows in a batch.

        Args:
          batch_size: rows of the global batch, at least 2.

        Returns:
          Pairs (positions, rows). The first source has `round(share * batch_size)` rows; both have at least one.

        Raises:
          ValueError: if a source has fewer examples than a batch needs.
        """
        check.whole("batch_size", batch_size, least=2)
        rows = min(max(1, round(self.share * batch_size)), batch_size - 1)
        later = self.index >= self.since
        first, second = (np.flatnonzero(where).astype(np.int32) for where in (~later, later))
        for which, positions, needed in (("first", first, rows), ("second", second, batch_size - rows)):
            if len(positions) < needed:
                raise ValueError(
                    f"each source of a blend must fill its share of a batch; got {len(positions)} examples of the "
                    f"{which} for {needed} of {batch_size} rows. Use a smaller batch, or another share."
                )
        return (first, rows), (second, batch_size - rows)

    @functools.cached_property
    def fingerprint(self) -> str:
        """As of a `Source`, of the content of both and of the share."""
        content = Source.fingerprint.func(self)
        return hashlib.sha256(repr((content, float(self.share), self.since)).encode()).hexdigest()[:16]


def blend(first: Source, second: Source, *, share: float = 0.3) -> Blend:
    """Put two sources together so that every batch holds a fixed share of each, as training with generated data does.

    `batches` visits each source in passes of its own, so one that is twenty times larger is not repeated as often.

    Args:
      first: for example the real data.
      second: for example generated ones; other labels, shapes or bounds are refused.
      share: of the first in a batch, in (0, 1).

    Returns:
      A source of all examples, those of `first` first. Indices of `second` are moved beyond those of `first`, from the
      attribute `since` on, so that every example keeps random keys of its own.

    Raises:
      ValueError: if the share is none, the two do not fit together, or one is a blend or reads in a way of its own.

    References:
      Rebuffi et al. 2021, Fixing data augmentation to improve adversarial robustness, arXiv:2103.01946: 30 % real, 70 %
      generated. The authors shuffle within a buffer; here a pass visits every example, but for a last incomplete batch.
    """
    if not 0 < share < 1:
        raise ValueError(
            f"share must lie between 0 and 1; got {share}. It is that of the first source: 0.3 is usual with generated "
            "data, and without any there is nothing to blend."
        )
    for source in (first, second):
        if isinstance(source, Blend):
            raise ValueError(f"a blend must be made of two plain sources; got the blend {source.name!r}. Join arrays.")
        if type(source).__getitem__ is not Source.__getitem__:
            raise ValueError(
                f"a blend reads rows as they are kept; got a {type(source).__name__}, which reads in a way of its own. "
                "Blend what it gives: rows = source[np.arange(len(source))], then data.arrays(rows['x'], rows['y'])."
            )
    fixes = {"shape": "Resize the images of one.", "classes": "Pass classes=, if a class is absent from one."}
    for what, fix in (fixes | {"bounds": "Bring both to one range."}).items():
        one, two = getattr(first, what), getattr(second, what)
        if one != two:
            raise ValueError(
                f"sources of a blend must have the same {what}; got {one} of {first.name!r} and {two} of "
                f"{second.name!r}. {fix}"
            )
    since = int(first.index.max()) + 1
    return Blend(
        name=f"{first.name}+{second.name}",
        split=first.split,
        classes=first.classes,
        shape=first.shape,
        bounds=first.bounds,
        index=np.concatenate([first.index, second.index + np.int32(since)]).astype(np.int32),
        store=_Both(first, second, since),
        class_names=first.class_names,
        title=f"{first.title or first.name} and {second.title or second.name}",
        credit="; ".join(c for c in (first.credit, second.credit) if c),
        share=float(share),
        since=since,
    )


# --- makers ----------------------------------------------------------------------------------------------------------


def arrays(
    x: Any,
    y: Any,
    *,
    name: str = "arrays",
    classes: int | None = None,
    bounds: Sequence[Any] | None = None,
    scale: float = 255.0,
    class_names: Sequence[str] = (),
    title: str = "",
    credit: str = "",
) -> Source:
    """Make a source of two arrays. They are not copied where their type already fits.

    Args:
      x: `[n, ...]` floats in the data's range, or bytes (uint8) `[n, h, w, c]`, which become `x / scale` in [0, 1].
      y: integer labels [n] in [0, classes).
      name: short name for reports.
      classes: number of classes; default the largest label + 1 (at least 2).
      bounds: lowest and highest value an input may take. Default [0, 1], which the values must then respect.
      scale: divisor of bytes.
      class_names: names of the classes, if known.
      title: how to call the data in reports; default `name`.
      credit: whom to credit.

    Returns:
      A `Source` with `index` 0 .. n-1.

    Raises:
      ValueError: on an empty set, values that are not finite or outside the bounds, or labels that do not fit.
      TypeError: on integers other than bytes, or labels that are not integers.

    | case | result |
    | --- | --- |
    | uint8 `[n, h, w]` | `ValueError`: add the channel axis |
    | floats outside [0, 1], no bounds given | `ValueError`: give bounds |
    | one-hot labels | `ValueError`: pass argmax |
    | float64 | stored as float32 |
    """
    x, y = np.asarray(x), np.asarray(y)
    if x.dtype == np.uint8:
        if x.ndim != 4:
            raise ValueError(
                f"x of bytes must be images [n, h, w, c]; got uint8{list(x.shape)}. Gray images? Pass x[..., None]. "
                "Other data? Pass floats in the range of the data."
            )
        check.positive("scale", scale)
        limits = float_bounds((0.0, 1.0) if bounds is None else bounds)
        if len(x) == 0:
            raise ValueError(f"x must hold at least one example; got uint8{list(x.shape)}. An empty selection?")
        check.inputs(np.asarray([[x.min(), x.max()]], np.float32) / np.float32(scale), limits)
    else:
        check.inputs(x)
        if bounds is None and (x.min() < 0 or x.max() > 1):
            raise ValueError(
                f"bounds must be given for floats outside [0, 1]; "
                f"got values from {float(x.min()):g} to {float(x.max()):g}. "
                "Bytes kept as floats? Pass x / 255. Normalized data? Undo it: normalization belongs inside the model. "
                "Otherwise pass bounds=(lowest, highest)."
            )
        limits = float_bounds((0.0, 1.0) if bounds is None else bounds)
        x = x.astype(np.float32, copy=False)
        check.inputs(x, limits)
    check.labels(y, len(x))
    count = max(2, int(y.max()) + 1) if classes is None else classes
    check.whole("classes", count, least=2)
    check.labels(y, len(x), count)
    return Source(
        name=name,
        split="",
        classes=int(count),
        shape=x.shape[1:],
        bounds=limits,
        index=np.arange(len(x), dtype=np.int32),
        store=_Arrays(x, y.astype(np.int32), float(scale)),
        class_names=tuple(class_names),
        title=title or name,
        credit=credit,
    )


_IDX = {0x08: "u1", 0x09: "i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}


def read_idx(path: str | os.PathLike[str]) -> np.ndarray:
    """Read one IDX file, the format of MNIST, plain or compressed with gzip.

    Args:
      path: the file.

    Returns:
      The array, in the machine's byte order.

    Raises:
      ValueError: if it is not an IDX file, or is shorter or longer than its header says.

    References:
      LeCun, Cortes and Burges 1998, The MNIST database of handwritten digits (the format is described at its end).
    """
    data = Path(path).read_bytes()
    if data[:2] == b"\x1f\x8b":
        try:
            data = gzip.decompress(data)
        except (EOFError, OSError, zlib.error) as error:
            raise ValueError(
                f"{path} must be a whole gzip file; got a damaged one ({error}). Fetch it again."
            ) from error
    if len(data) < 4 or data[:2] != b"\0\0" or data[2] not in _IDX or data[3] == 0:
        raise ValueError(
            f"{path} must be an IDX file (it starts with 00 00, a type from 08 to 0e and the number of axes); "
            f"got {data[:4].hex(' ') or 'an empty file'}. Another format, or an error page saved under this name?"
        )
    dtype, start = np.dtype(_IDX[data[2]]), 4 + 4 * data[3]
    sizes = struct.unpack(f">{data[3]}I", data[4:start]) if len(data) >= start else None
    if sizes is None or len(data) - start != math.prod(sizes) * dtype.itemsize:
        want = "a header" if sizes is None else f"{math.prod(sizes) * dtype.itemsize} bytes for the shape {list(sizes)}"
        raise ValueError(
            f"{path} must hold {want} of {start} + data bytes; got {len(data)} bytes in all. Truncated? Fetch it again."
            if sizes is None
            else f"{path} must hold {want}; got {len(data) - start}. Truncated or appended to? Fetch it again."
        )
    return np.frombuffer(data, dtype, offset=start).reshape(sizes).astype(dtype.newbyteorder("="))


def idx(images: str | os.PathLike[str], labels: str | os.PathLike[str], *, name: str = "idx", **about: Any) -> Source:
    """Make a source of a pair of IDX files: bytes [n, h, w] and labels [n].

    Args:
      images: the file of images.
      labels: the file of labels.
      name: short name for reports.
      **about: `classes`, `class_names`, `title` and `credit` of `arrays`.

    Returns:
      A `Source` of shape (h, w, 1).

    Raises:
      ValueError: if a file is malformed, the two are exchanged, or they differ in length.
    """
    x, y = read_idx(images), read_idx(labels)
    if x.dtype != np.uint8 or x.ndim != 3:
        raise ValueError(
            f"{images} must hold images, uint8 [n, h, w]; got {x.dtype}{list(x.shape)}. Images and labels exchanged?"
        )
    return arrays(x[..., None], y, name=name, **about)


def npz(
    path: str | os.PathLike[str],
    *,
    classes: int | None = None,
    bounds: Sequence[Any] | None = None,
    name: str | None = None,
) -> Source:
    """Make a source of an npz file with the arrays `x` and `y`. One file holds one split.

    Args:
      path: the file. It may also hold `bounds` (two numbers), `classes` (one number) and `credit` (text).
      classes: number of classes; overrides the file.
      bounds: lowest and highest value an input may take; overrides the file. Needed for floats outside [0, 1].
      name: short name for reports; default the file's name without ending.

    Returns:
      A `Source`.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if it cannot be read, lacks x or y, or they do not fit (see `arrays`).
    """
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"{file} must be an npz file with arrays x and y; got no such file. Check the path.")
    stored = read_npz(
        file, ("x", "y"), "One split per file: save x_train and y_train as x and y of a file of their own."
    )
    if bounds is None and "bounds" in stored:
        bounds = stored["bounds"].ravel().tolist()
    if classes is None and "classes" in stored:
        classes = int(stored["classes"])
    credit = str(stored["credit"]) if "credit" in stored else ""
    return arrays(stored["x"], stored["y"], name=name or file.stem, classes=classes, bounds=bounds, credit=credit)


def read_npz(file: Path, needed: tuple[str, ...], hint: str) -> dict[str, np.ndarray]:
    """Return all arrays of an npz file.

    Args:
      file: the file.
      needed: arrays that must be there.
      hint: what to do if one is not.

    Returns:
      Name to array.

    Raises:
      ValueError: if the file cannot be read, holds pickled objects, or lacks an array.
    """
    try:
        with zipfile.ZipFile(file), np.load(file, allow_pickle=False) as stored:
            found = {name: stored[name] for name in stored.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(
            f"{file} must be an npz file of plain arrays; got one that cannot be read ({error}). "
            "Save it with numpy.savez_compressed, without object arrays."
        ) from error
    missing = [name for name in needed if name not in found]
    if missing:
        raise ValueError(
            f"{file} must hold the arrays {', '.join(needed)}; got {', '.join(sorted(found)) or 'none'}. {hint}"
        )
    return found


def jpegs(path: str | os.PathLike[str], *, name: str = "jpegs", **about: Any) -> Source:
    """Make a source of an npz file of JPEG images of one size: `jpeg`, `offsets` and `labels`.

    Args:
      path: the file: `jpeg` (uint8, all JPEG files one after another), `offsets` (integers [n + 1]), `labels`
        (integers [n]).
      name: short name for reports.
      **about: `classes` (default the largest label + 1), `class_names`, `title`, `credit`.

    Returns:
      A `Source` of shape (h, w, 3). An image is decoded when first read and kept in memory as bytes of pixels.

    Raises:
      ValueError: if the three arrays do not fit together, or (on reading) if an image cannot be decoded.
    """
    file = Path(path)
    stored = read_npz(file, ("jpeg", "offsets", "labels"), "Images as one array? Save it as x, with labels as y.")
    blob, offsets, y = stored["jpeg"], stored["offsets"], stored["labels"]
    check.labels(y, name="labels")
    fits = offsets.shape == (len(y) + 1,) and np.issubdtype(offsets.dtype, np.integer) and len(y) > 0
    if not fits or offsets[0] != 0 or offsets[-1] != blob.size or np.any(np.diff(offsets) <= 0):
        raise ValueError(
            f"{file} must hold offsets that rise from 0 to the {blob.size} bytes of jpeg, one more than the "
            f"{len(y)} labels; got {offsets.dtype}{list(offsets.shape)}. A damaged copy? Fetch it again."
        )
    classes = int(about.pop("classes", max(2, int(y.max()) + 1)))
    check.labels(y, classes=classes, name="labels")
    store = _Jpegs(blob, offsets, y.astype(np.int32), str(file))
    return Source(
        name=name,
        split="",
        classes=classes,
        shape=store.decode(0).shape,
        bounds=(0.0, 1.0),
        index=np.arange(len(y), dtype=np.int32),
        store=store,
        **about,
    )


def divide(source: Source, split: str) -> Source:
    """Cut a split out of an official set by the rule that the module docstring states.

    Args:
      source: the whole official training set, or for 'test' the official test set.
      split: 'train' or 'validation' for a part; 'test' or 'train+validation' for the whole.

    Returns:
      A `Source` that bears the name of the split, in the order of the file.

    Raises:
      ValueError: if the split is unknown, or there are fewer than two examples to divide.
    """
    check.choice("split", split, SPLITS)
    if split in ("train", "validation"):
        if len(source) < 2:
            raise ValueError(
                f"{source.name!r} must hold at least 2 examples to be divided; got {len(source)}. "
                "Ask for 'train+validation'."
            )
        held = np.zeros(len(source), bool)
        held[balanced_order(source.y, 1)[: min(5000, max(1, len(source) // 10))]] = True
        source = source.subset(held if split == "validation" else ~held)
    return dataclasses.replace(source, split=split)


def evaluation_subset(source: Source, n: int, seed: int = 0) -> Source:
    """Return a fixed subset for evaluation, class-balanced as far as possible and nested in `n`.

    The subset is the first `n` of `balanced_order(source.y, seed)`, so 100 examples are a prefix of 1000. Each keeps
    its `index`, and with it its random keys: an attack on the subset finds what it finds on the whole set.

    Args:
      source: where to select from.
      n: how many examples, at most `len(source)`.
      seed: which of the fixed subsets; published figures use 0.

    Returns:
      A `Source` of `n` examples.

    Raises:
      ValueError: if `n` is more than there are.
    """
    _enough(source, n)
    return source.subset(balanced_order(source.y, seed)[:n])
