"""The catalog: data sets by name, the folder they lie in, and prepared tfds sets.

What lives here: `load`, the built-in digits, MNIST, the CIFAR-10 JPEG copies, tfds folders. What does not: the source
type and the file formats (`sources.py`), order and batches (`pipeline.py`). The network is never used and TensorFlow
is never imported: a tfds folder is read through its random-access door only.

The digits (`digits.npz`): test set of "Optical Recognition of Handwritten Digits", E. Alpaydin and C. Kaynak, UCI
Machine Learning Repository, 1998, https://doi.org/10.24432/C50P49, license CC BY 4.0
(https://creativecommons.org/licenses/by/4.0/), 1797 images of 8 x 8 pixels with values 0 to 16, unchanged, in the
order of scikit-learn's `load_digits`. That order has no official training part, so 'test' is the first 360 of
`balanced_order(labels, seed=0)` (36 of each class), the rest trains.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxadv.core import check
from jaxadv.data.pipeline import balanced_order
from jaxadv.data.sources import SPLITS, Source, arrays, divide, float_bounds, idx, jpegs, npz, read_npz

_CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_DIGITS = tuple("0123456789")
_DIGITS_TEST = 360
_CHUNK = 1024  # records per read while scanning labels


def digits(split: str = "train") -> Source:
    """Return the built-in handwritten digits: 8 x 8 pixels, ten classes, 1294 / 143 / 360 examples.

    Args:
      split: 'train', 'validation', 'test' or 'train+validation' (the module docstring states the rule).

    Returns:
      A `Source` with values k/16 in [0, 1].

    References:
      Alpaydin and Kaynak 1998, Optical Recognition of Handwritten Digits, doi:10.24432/C50P49, CC BY 4.0.
    """
    check.choice("split", split, SPLITS)
    stored = read_npz(Path(__file__).with_name("digits.npz"), ("x", "y", "credit"), "Install the package again.")
    whole = arrays(
        stored["x"][..., None],
        stored["y"],
        name="digits",
        classes=10,
        scale=16.0,
        class_names=_DIGITS,
        title="Handwritten digits (8 x 8)",
        credit=str(stored["credit"]),
    )
    chosen = np.zeros(len(whole), bool)
    chosen[balanced_order(whole.y, 0)[:_DIGITS_TEST]] = True
    return divide(whole.subset(chosen if split == "test" else ~chosen), split)


# --- files under a root folder ---------------------------------------------------------------------------------------


def root(folder: str | os.PathLike[str] | None = None) -> Path | None:
    """Return the folder of real data: the given one, else the environment variable JAXADV_DATA, else None.

    This is the one place of the library outside the command line that reads the environment.

    Args:
      folder: a folder, or None to ask the environment.

    Returns:
      The path (not checked), or None if neither says.
    """
    folder = folder if folder is not None else os.environ.get("JAXADV_DATA")
    return Path(folder) if folder else None


def _find(base: Path | None, name: str, files: Sequence[str]) -> Path:
    """Return the first of some files that exists, or say what was looked for and where."""
    if base is not None:
        for file in files:
            if (base / name / file).is_file():
                return base / name / file
    where = f"no such file in {base / name}" if base is not None else "no data folder"
    raise FileNotFoundError(
        f"the data set {name!r} needs the file {name}/{' or '.join(files)}; got {where}. "
        f"Set JAXADV_DATA (or pass --data on the command line, root= in Python) to the folder that holds {name}/. "
        "The set 'digits' is built in and works without."
    )


def _mnist(split: str, base: Path | None) -> Source:
    part = "t10k" if split == "test" else "train"
    files = [
        _find(base, "mnist", [f"{part}-{kind}-ubyte.gz", f"{part}-{kind}-ubyte"])
        for kind in ("images-idx3", "labels-idx1")
    ]
    credit = "Y. LeCun, C. Cortes and C. J. C. Burges, The MNIST database of handwritten digits, 1998."
    return divide(idx(*files, name="mnist", classes=10, class_names=_DIGITS, title="MNIST", credit=credit), split)


def _cifar10_jpeg(split: str, base: Path | None) -> Source:
    file = _find(base, "cifar10_jpeg", ["test.npz" if split == "test" else "train.npz"])
    credit = (
        "A. Krizhevsky, Learning multiple layers of features from tiny images, 2009. Lossy JPEG copies, order shuffled."
    )
    title = "CIFAR-10 (JPEG copies)"
    return divide(jpegs(file, name="cifar10_jpeg", classes=10, class_names=_CIFAR10, title=title, credit=credit), split)


SOURCES = {"digits": lambda split, base: digits(split), "mnist": _mnist, "cifar10_jpeg": _cifar10_jpeg}


def load(name: str | os.PathLike[str], split: str = "train", root: str | os.PathLike[str] | None = None) -> Source:
    """Load a data set by name.

    Args:
      name: 'digits' (built in), 'mnist' or 'cifar10_jpeg' (files under `root`), the path of an `.npz` file with `x`
        and `y`, or 'tfds:NAME' for a prepared tfds folder (see `tfds_source`). An npz file holds one split and cannot
        say which: asked for as 'test' or 'train+validation' it is returned whole, as 'train' or 'validation' it is
        divided by the usual rule. Use one file for training and another for testing.
      split: 'train', 'validation', 'test' or 'train+validation'.
      root: the folder of real data; default the environment variable JAXADV_DATA.

    Returns:
      A `Source`.

    Raises:
      FileNotFoundError: if the files are not there; the message says which were looked for, and where.
      ValueError: if the name or the split is unknown, or a file is malformed.

    >>> source = load("digits", "test")
    >>> len(source), source.shape, source.classes
    (360, (8, 8, 1), 10)
    """
    check.choice("split", split, SPLITS)
    text = os.fspath(name)
    base = _root(root)
    if text.endswith(".npz"):
        return divide(npz(text), split)
    if text.startswith("tfds:"):
        return tfds_source(text.removeprefix("tfds:"), split, data_dir=base)
    check.choice("data set", text, [*SOURCES, "tfds:NAME", "FILE.npz"])
    return SOURCES[text](split, base)


_root = root  # `load` has an argument of this name


# --- tfds, read without TensorFlow -----------------------------------------------------------------------------------


def _fetch(source: Any, rows: Any, where: str) -> Any:
    """Records of a data source, or a refusal that says where they lie."""
    try:
        records = source.__getitems__([int(row) for row in rows])
        if any(value is None for record in records for value in record.values()):
            raise ValueError("a record is empty")  # what a file that was cut short under an open reader gives
        return records
    except Exception as error:  # array_record, decoders and the file system raise many kinds
        raise ValueError(
            f"the files of {where} must be whole; reading records {rows[0]} to {rows[-1]} failed: "
            f"{' '.join(str(error).split())[:200]}. Cut short? Prepare the set again, or fetch it again."
        ) from error


class _Records:
    """Rows of a tfds random-access data source."""

    scale = 255.0

    def __init__(self, rows: Any, names: tuple[str, str], classes: int, bounds: tuple[float, float], where: str):
        self.rows, self.classes, self.bounds, self.where = rows, classes, bounds, where
        self.x, self.y = names
        self.shape = np.asarray(_fetch(rows, [0], where)[0][self.x]).shape
        self._labels: np.ndarray | None = None

    def read(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        if not len(rows):
            return np.zeros((0, *self.shape), np.float32), np.zeros(0, np.int32)
        records = _fetch(self.rows, rows, self.where)
        images = [np.asarray(record[self.x]) for record in records]
        if len({image.shape for image in images}) > 1:
            raise ValueError(
                f"the examples of {self.where} must all have one shape; "
                f"got {sorted({image.shape for image in images})}. "
                "Resize them when the set is prepared."
            )
        x, y = np.stack(images), np.asarray([int(record[self.y]) for record in records], np.int32)
        check.labels(y, classes=self.classes, name=f"feature {self.y!r} of {self.where}")  # -1 marks unlabeled records
        if x.dtype != np.uint8:
            x = x.astype(np.float32)
            check.inputs(x, self.bounds, f"feature {self.x!r} of {self.where}")
        return x, y

    def labels(self) -> np.ndarray:
        if self._labels is None:  # one scan, only where a balanced selection asks for it
            n = len(self.rows)
            parts = [self.read(np.arange(i, min(i + _CHUNK, n)))[1] for i in range(0, n, _CHUNK)]
            self._labels = np.concatenate(parts)
        return self._labels


def _tfds() -> Any:
    try:
        import array_record  # noqa: F401
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise ImportError(
            f"reading tfds data sets needs the packages tensorflow-datasets and array_record; got: {error}. "
            "On Linux: pip install tensorflow-datasets array_record. Elsewhere array_record does not exist: "
            "save the arrays x and y as an .npz file."
        ) from error
    return tfds


def prepared_by(raw: Any, name: str, out: Path) -> Path:
    """Write raw data as an array_record set in the layout of tfds.

    Args:
      raw: a `prepare.Raw`.
      name: of the set.
      out: the folder of prepared sets.

    Returns:
      The folder of the set.

    Raises:
      ImportError: if tensorflow-datasets or array_record is missing.
    """
    tfds = _tfds()
    base: Any = tfds.core.GeneratorBasedBuilder

    class Prepared(base, skip_registration=True):  # pyright: ignore
        __module__ = "prepared"  # tfds looks up files beside dotted modules
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            image = tfds.features.Tensor(shape=raw.shape, dtype=raw.dtype)
            if raw.encoded:
                image = tfds.features.Image(shape=raw.shape, encoding_format="jpeg")
            features = {"image": image, "label": tfds.features.ClassLabel(names=list(raw.classes))}
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features), supervised_keys=("image", "label")
            )

        def _split_generators(self, manager):
            return {split: self._generate_examples(split) for split in raw.splits}

        def _generate_examples(self, split):
            for key, image, label in raw.splits[split]():
                yield key, {"image": image, "label": label}

    Prepared.name = name
    builder = Prepared(data_dir=str(out), file_format="array_record")
    builder.download_and_prepare()
    return Path(builder.data_dir)


def tfds_source(
    name: str | os.PathLike[str],
    split: str = "train",
    *,
    data_dir: str | os.PathLike[str] | None = None,
    bounds: Sequence[Any] | None = None,
) -> Source:
    """Make a source of a tfds data set that was prepared as array_record, read by random access and without TensorFlow.

    Args:
      name: a prepared folder (with `dataset_info.json`), or a name under `data_dir`: 'NAME', 'NAME/CONFIG',
        'NAME/1.0.0'. Of several versions the newest is taken.
      split: 'train', 'validation', 'test' or 'train+validation'. Where the set has no validation split of its own,
        train is divided by the usual rule, which reads every label once.
      data_dir: where prepared sets lie; default `~/tensorflow_datasets`.
      bounds: lowest and highest value an input may take, for features that are floats outside [0, 1].

    Returns:
      A `Source`; records are read when asked for.

    Raises:
      ImportError: if tensorflow-datasets or array_record is missing (array_record exists for Linux only).
      FileNotFoundError: if there is no prepared folder.
      ValueError: if the split is missing, the files are not array_record, or features are not one input and one class
        label.
    """
    check.choice("split", split, SPLITS)
    tfds = _tfds()
    folder = _prepared(os.fspath(name), Path(data_dir) if data_dir else Path.home() / "tensorflow_datasets")
    builder: Any = tfds.builder_from_directory(folder)
    known = set(builder.info.splits)
    own = "validation" in known
    part = split if own or split == "test" else "train"
    missing = [piece for piece in part.split("+") if piece not in known]
    if missing:
        raise ValueError(
            f"{folder} must have the split {missing[0]!r}; got {', '.join(sorted(known)) or 'none'}. "
            "Prepare it, or ask for another."
        )
    x, y = _tfds_features(builder.info, folder)
    try:
        rows = builder.as_data_source(split=part)
    except NotImplementedError as error:
        raise ValueError(
            f"{folder} must be prepared as array_record; got {builder.info.file_format}. "
            "Prepare it again with file_format='array_record'."
        ) from error
    label, feature = builder.info.features[y], builder.info.features[x]
    limits = float_bounds((0.0, 1.0) if bounds is None else bounds)
    if len(rows) == 0:
        raise ValueError(f"{folder} must hold at least one example in {part!r}; got none.")
    store = _Records(rows, (x, y), int(label.num_classes), limits, str(folder))
    first = np.asarray(_fetch(rows, [0], str(folder))[0][x])
    if first.dtype != np.uint8 and not np.issubdtype(first.dtype, np.floating):
        raise ValueError(
            f"feature {x!r} of {folder} must be bytes or floats; got {feature.np_dtype}. Prepare it as uint8."
        )
    source = Source(
        name=f"tfds:{builder.info.name}",
        split=split,
        classes=int(label.num_classes),
        shape=store.shape,
        bounds=limits,
        index=np.arange(len(rows), dtype=np.int32),
        store=store,
        class_names=tuple(label.names),
        title=str(builder.info.full_name),
        credit=str(builder.info.citation or ""),
    )
    return source if own else divide(source, split)


def _prepared(name: str, data_dir: Path) -> Path:
    """Find a prepared folder by its path or its name."""
    info = "dataset_info.json"
    for folder in (Path(name), data_dir / name.replace(":", "/")):
        if (folder / info).is_file():
            return folder
        versions = [file.parent for file in folder.glob(f"*/{info}")]
        if versions:
            return max(versions, key=lambda v: [int(part) if part.isdigit() else -1 for part in v.name.split(".")])
    configs = sorted({file.parent.parent.name for file in (data_dir / name).glob(f"*/*/{info}")})
    hint = (
        f"Name one of its configurations: {', '.join(f'{name}/{c}' for c in configs)}."
        if configs
        else ("Prepare the set with file_format='array_record', or point to the folder that holds it.")
    )
    raise FileNotFoundError(f"a prepared tfds set must hold {info}; got none in {name} or {data_dir / name}. {hint}")


def _tfds_features(info: Any, folder: Path) -> tuple[str, str]:
    """Return the names of the input and of the class label."""
    kinds = {key: type(feature).__name__ for key, feature in info.features.items()}
    labels = [key for key, kind in kinds.items() if kind == "ClassLabel"]
    inputs = [key for key, kind in kinds.items() if kind in ("Image", "Tensor") and len(info.features[key].shape) >= 1]
    keys = info.supervised_keys
    if keys and len(keys) == 2 and keys[0] in inputs and keys[1] in labels:
        return keys[0], keys[1]
    if len(labels) != 1 or len(inputs) != 1:
        raise ValueError(
            f"{folder} must have one input (Image or Tensor) and one ClassLabel, or name them as supervised_keys; "
            f"got {kinds}. "
            "Prepare a set with these two features, or build the arrays yourself and use data.arrays."
        )
    return inputs[0], labels[0]
