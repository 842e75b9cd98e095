"""Data sets by name: scikit-learn's copy, known facts about the real files, and a tfds set prepared on the spot."""

import gzip
import pathlib
import subprocess
import sys
import textwrap

import numpy as np
import pytest

from jaxadv import data

# --- digits ----------------------------------------------------------------------------------------------------------


def test_digits_equal_scikit_learns_copy():
    datasets = pytest.importorskip("sklearn.datasets")
    theirs = datasets.load_digits()
    parts = [data.digits("train+validation"), data.digits("test")]
    index = np.concatenate([p.index for p in parts])
    assert sorted(index) == list(range(1797))
    x, y = (np.concatenate(pair) for pair in zip(*(p.all() for p in parts), strict=True))
    np.testing.assert_array_equal(x[..., 0] * 16, theirs.images[index])
    np.testing.assert_array_equal(y, theirs.target[index])


def test_digits_splits():
    train, held, test, whole = (data.load("digits", s) for s in ("train", "validation", "test", "train+validation"))
    assert [len(s) for s in (train, held, test, whole)] == [1294, 143, 360, 1437]
    assert sorted([*train.index, *held.index]) == sorted(whole.index)
    assert not set(test.index) & set(whole.index)
    assert np.bincount(test.y).tolist() == [36] * 10
    assert set(np.bincount(held.y)) == {14, 15}
    assert [s.split for s in (train, held, test, whole)] == ["train", "validation", "test", "train+validation"]
    assert (train.shape, train.classes, train.bounds, train.name) == ((8, 8, 1), 10, (0.0, 1.0), "digits")
    assert train.all()[0].max() == 1.0 and data.digits().split == "train"


def test_digits_are_pinned_and_credited():
    assert data.load("digits", "test").fingerprint == "358fe0edc7854bb5"
    assert data.load("digits", "train+validation").fingerprint == "658ae52721fc14cd"
    assert data.load("digits", "test").index[:5].tolist() == [0, 2, 9, 11, 20]
    credit = data.load("digits").credit
    for word in ("Alpaydin", "Kaynak", "UCI", "CC BY 4.0"):
        assert word in credit and word in data.catalog.__doc__


# --- names and folders -----------------------------------------------------------------------------------------------


def test_unknown_names_are_answered_with_the_nearest():
    with pytest.raises(ValueError, match="unknown data set 'minst'. Did you mean 'mnist'.*FILE.npz"):
        data.load("minst")
    with pytest.raises(ValueError, match="unknown split 'valid'. Did you mean 'validation'"):
        data.load("digits", "valid")
    assert set(data.SOURCES) == {"digits", "mnist", "cifar10_jpeg"}


def test_root_reads_the_environment_only_when_asked_for_nothing(monkeypatch, tmp_path):
    monkeypatch.setenv("JAXADV_DATA", "somewhere")
    assert str(data.root()) == "somewhere" and data.root(tmp_path) == tmp_path
    monkeypatch.delenv("JAXADV_DATA")
    assert data.root() is None


@pytest.mark.parametrize("name, file", [("mnist", "t10k-images-idx3-ubyte.gz"), ("cifar10_jpeg", "test.npz")])
def test_missing_files_are_named(monkeypatch, tmp_path, name, file):
    monkeypatch.delenv("JAXADV_DATA", raising=False)
    for root in (None, tmp_path):
        with pytest.raises(FileNotFoundError) as caught:
            data.load(name, "test", root=root)
        said = str(caught.value)
        assert all(part in said for part in (f"{name}/{file}", "JAXADV_DATA", "--data", "'digits'"))
        assert "no data folder" in said if root is None else str(tmp_path / name) in said


@pytest.fixture
def miniature(tmp_path, idx_bytes, write_jpegs):
    """A folder in the layout of the real one, with 40 + 10 random images."""
    rng = np.random.default_rng(0)
    (tmp_path / "mnist").mkdir()
    (tmp_path / "cifar10_jpeg").mkdir()
    for part, file, n in (("train", "train", 40), ("t10k", "test", 10)):
        y = (np.arange(n) % 10).astype(np.uint8)
        images, labels = rng.integers(0, 256, (n, 28, 28), np.uint8), y
        packed = gzip.compress(idx_bytes(images))
        (tmp_path / "mnist" / f"{part}-images-idx3-ubyte.gz").write_bytes(packed)
        (tmp_path / "mnist" / f"{part}-labels-idx1-ubyte").write_bytes(idx_bytes(labels))  # unpacked works too
        write_jpegs(tmp_path / "cifar10_jpeg" / f"{file}.npz", rng.integers(0, 256, (n, 32, 32, 3), np.uint8), y)
    return tmp_path


@pytest.mark.parametrize("name, shape", [("mnist", (28, 28, 1)), ("cifar10_jpeg", (32, 32, 3))])
def test_file_sets_in_miniature(miniature, monkeypatch, name, shape):
    monkeypatch.setenv("JAXADV_DATA", str(miniature))
    sizes = {split: len(data.load(name, split)) for split in data.SPLITS}
    assert sizes == {"train": 36, "validation": 4, "test": 10, "train+validation": 40}
    train, held = data.load(name, "train"), data.load(name, "validation", root=miniature)
    assert sorted([*train.index, *held.index]) == list(range(40))
    assert (train.shape, train.classes, len(train.class_names), train.name) == (shape, 10, 10, name)
    batch = next(data.batches(train, 8, seed=0))
    assert batch["x"].shape == (8, *shape) and (batch["y"] == batch["index"] % 10).all()
    assert train.credit and ("JPEG copies" in train.title) == (name == "cifar10_jpeg")


def test_npz_by_path(tmp_path):
    x, y = np.zeros((30, 2, 2, 1), np.uint8), np.arange(30) % 3
    np.savez(tmp_path / "mine.npz", x=x, y=y)
    sizes = {split: len(data.load(tmp_path / "mine.npz", split)) for split in data.SPLITS}
    assert sizes == {"train": 27, "validation": 3, "test": 30, "train+validation": 30}
    assert data.load(str(tmp_path / "mine.npz"), "test").name == "mine"


# --- the real files (only where JAXADV_DATA is set) ------------------------------------------------------------------


def test_real_mnist(data_root):
    whole, test = data.load("mnist", "train+validation", root=data_root), data.load("mnist", "test", root=data_root)
    assert (len(whole), len(test)) == (60_000, 10_000)
    assert whole.y[:10].tolist() == [5, 0, 4, 1, 9, 2, 1, 3, 1, 4]
    assert np.bincount(whole.y).tolist() == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert np.bincount(test.y).tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    np.testing.assert_allclose(float(whole.all()[0].mean(dtype=np.float64)), 0.1306604, atol=1e-6)  # the known mean
    held = data.load("mnist", "validation", root=data_root)
    assert len(held) == 5000 and np.bincount(held.y).tolist() == [500] * 10
    assert len(data.load("mnist", "train", root=data_root)) == 55_000
    assert data.evaluation_subset(test, 1000).fingerprint == "cb0500eda7aec02c"


def test_real_cifar10_copies(data_root):
    test = data.load("cifar10_jpeg", "test", root=data_root)
    assert len(test) == 10_000 and np.bincount(test.y).tolist() == [1000] * 10
    some = data.evaluation_subset(test, 100)
    assert np.bincount(some.y).tolist() == [10] * 10
    assert some.fingerprint == "eda09b3d606e9a49"
    assert test.store.done.sum() == 100


@pytest.mark.slow
def test_real_cifar10_means(data_root):
    whole = data.load("cifar10_jpeg", "train+validation", root=data_root)
    assert len(whole) == 50_000 and np.bincount(whole.y).tolist() == [5000] * 10
    x, _ = whole.subset(np.arange(0, 50_000, 5)).all()
    # the known channel means and deviations of CIFAR-10; means of 10,000 images deviate by 0.0012, lossy copies too
    np.testing.assert_allclose(x.mean((0, 1, 2), dtype=np.float64), [0.49140, 0.48216, 0.44653], atol=4e-3)
    np.testing.assert_allclose(x.std((0, 1, 2), dtype=np.float64), [0.24703, 0.24349, 0.26159], atol=4e-3)


# --- tfds without TensorFlow -----------------------------------------------------------------------------------------


def content(split):
    """Images that tell their label, and labels."""
    n, shift = {"train": (30, 0), "validation": (5, 60), "test": (9, 100)}[split]
    y = np.arange(n) % 3
    return np.arange(n, dtype=np.uint8)[:, None, None, None] * np.ones((1, 4, 4, 1), np.uint8) + np.uint8(shift), y


def prepare(tmp_path, *, feature="tensor", splits=("train", "test"), label_shift=0):
    """Write a small array_record set and return its folder."""
    tfds = pytest.importorskip("tensorflow_datasets", reason="tfds is not installed here")
    pytest.importorskip("array_record", reason="array_record exists for Linux only")
    kinds = {
        "tensor": lambda: tfds.features.Tensor(shape=(4, 4, 1), dtype=np.uint8),
        "float": lambda: tfds.features.Tensor(shape=(4, 4, 1), dtype=np.float32),
        "int": lambda: tfds.features.Tensor(shape=(4, 4, 1), dtype=np.int32),
        "image": lambda: tfds.features.Image(shape=(4, 4, 1), encoding_format="png"),
    }

    class Tiny(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        __module__ = "tiny"  # a dotted module makes tfds 4.9.10 import importlib_resources, which it does not declare
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            label = tfds.features.ClassLabel(names=["a", "b", "c"])
            features = {"image": kinds[feature](), "label": label}
            if label_shift == "two":
                features["other"] = tfds.features.ClassLabel(names=["d", "e", "f"])
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

        def _split_generators(self, manager):
            return {split: self._generate_examples(split) for split in splits}

        def _generate_examples(self, split):
            for i, (image, label) in enumerate(zip(*content(split), strict=True)):
                if feature == "image":
                    image = encoded(image)
                elif feature == "float":
                    image = image.astype(np.float32) / 10 - 1
                elif feature == "int":
                    image = image.astype(np.int32)
                row = {"image": image, "label": -1 if label_shift == -1 else int(label)}
                yield i, row | ({"other": 0} if label_shift == "two" else {})

    builder = Tiny(data_dir=str(tmp_path), file_format="array_record")
    builder.download_and_prepare()
    return pathlib.Path(builder.data_dir)


def encoded(image):
    import io

    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image[..., 0]).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def offline(monkeypatch):
    """No socket can be opened."""
    import socket

    def refuse(*args, **kwargs):
        raise AssertionError("the network was asked for")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.mark.parametrize("feature", ["tensor", "image"])
def test_tfds_without_tensorflow(tmp_path, offline, feature):
    folder = prepare(tmp_path, feature=feature)
    whole, test = data.tfds_source(folder, "train+validation"), data.load("tfds:tiny", "test", root=tmp_path)
    assert (len(whole), len(test), whole.classes, whole.shape) == (30, 9, 3, (4, 4, 1))
    assert whole.class_names == ("a", "b", "c") and whole.name == test.name == "tfds:tiny"
    for source, split in ((whole, "train"), (test, "test")):
        x, y = source.all()
        images, labels = content(split)
        place = np.argsort(np.rint(x[:, 0, 0, 0] * 255))  # tfds stores in an order of its own
        np.testing.assert_array_equal(x[place], images.astype(np.float32) / np.float32(255))
        np.testing.assert_array_equal(y[place], labels)
        np.testing.assert_array_equal(source.y, y)
        np.testing.assert_array_equal(source[[4, 0]]["x"], x[[4, 0]])
        assert x.dtype == np.float32 and y.dtype == np.int32
        assert source.fingerprint == data.arrays(x, y).fingerprint
    assert whole[[]]["x"].shape == (0, 4, 4, 1)
    train, held = (
        data.load("tfds:tiny", "train", root=tmp_path),
        data.load("tfds:tiny/1.0.0", "validation", root=tmp_path),
    )
    assert sorted([*train.index, *held.index]) == list(range(30)) and np.bincount(held.y).tolist() == [1, 1, 1]
    assert sorted(i for b in data.batches(train, 9, seed=0, epochs=1) for i in b["index"]) == train.index.tolist()
    assert "tensorflow" not in sys.modules


def test_tfds_with_a_validation_split_of_its_own(tmp_path, offline):
    folder = prepare(tmp_path, splits=("train", "validation", "test"))
    sizes = {split: len(data.tfds_source(folder, split)) for split in data.SPLITS}
    assert sizes == {"train": 30, "validation": 5, "test": 9, "train+validation": 35}


def test_tfds_floats_need_bounds(tmp_path, offline):
    folder = prepare(tmp_path, feature="float")
    source = data.tfds_source(folder, "train+validation", bounds=(-1, 2))
    assert source.bounds == (-1.0, 2.0) and sorted(source.all()[0][:, 0, 0, 0]) == pytest.approx(np.arange(30) / 10 - 1)
    with pytest.raises(ValueError, match="within bounds"):
        data.tfds_source(folder, "train+validation").all()


@pytest.mark.parametrize(
    "made, split, says",
    [
        ({"splits": ("train",)}, "test", "must have the split 'test'; got train"),
        ({"feature": "int"}, "test", "bytes or floats; got int32"),
        ({"label_shift": "two"}, "test", "supervised_keys"),
        ({"label_shift": -1}, "train", "-1"),
    ],
)
def test_tfds_sets_that_do_not_fit_are_refused(tmp_path, made, split, says):
    folder = prepare(tmp_path, **made)
    with pytest.raises(ValueError, match=says):
        data.tfds_source(folder, split).all()


def test_a_tfds_set_that_is_not_array_record_is_refused(tmp_path):
    folder = prepare(tmp_path)
    info = folder / "dataset_info.json"
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    with pytest.raises(ValueError, match="prepared as array_record"):
        data.tfds_source(folder, "test")


def test_tfds_folders_that_are_not_there(tmp_path):
    pytest.importorskip("array_record")
    with pytest.raises(FileNotFoundError, match="dataset_info.json; got none in absent"):
        data.tfds_source("absent", data_dir=tmp_path)
    for config in ("one", "two"):
        (tmp_path / "many" / config / "1.0.0").mkdir(parents=True)
        (tmp_path / "many" / config / "1.0.0" / "dataset_info.json").touch()
    with pytest.raises(FileNotFoundError, match="many/one, many/two"):
        data.tfds_source("many", data_dir=tmp_path)


def test_of_several_versions_the_newest_is_read(tmp_path):
    folder = prepare(tmp_path)
    for version in ("1.9.0", "1.10.0"):
        other = tmp_path / "tiny" / version
        other.mkdir()
        for file in folder.iterdir():
            (other / file.name).write_bytes(file.read_bytes().replace(b"1.0.0", version.encode()))
    assert data.tfds_source("tiny", "test", data_dir=tmp_path).title.endswith("1.10.0")


@pytest.mark.parametrize(
    "hidden", [("tensorflow_datasets",), ("array_record",), ("tensorflow_datasets", "array_record")]
)
def test_everything_else_works_where_tfds_or_array_record_is_absent(monkeypatch, tmp_path, hidden):
    for name in hidden:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match="tensorflow-datasets and array_record.*npz"):
        data.tfds_source("tiny", data_dir=tmp_path)
    with pytest.raises(ImportError, match="Linux"):
        data.load("tfds:tiny", root=tmp_path)
    np.savez(tmp_path / "f.npz", x=np.zeros((4, 2, 2, 1), np.uint8), y=[0, 1, 0, 1])
    assert len(data.load("digits")) == 1294 and len(data.load(tmp_path / "f.npz", "test")) == 4
    assert next(data.batches(data.arrays(np.zeros((4, 2)), [0, 1, 0, 1]), 2, seed=0))["x"].shape == (2, 2)


def test_importing_data_is_light():
    """In a fresh process: no tfds, no Pillow, no backend, also after the digits were read."""
    program = """
        import sys
        from jaxadv import data
        len(data.load("digits"))
        heavy = {"tensorflow", "tensorflow_datasets", "array_record", "PIL", "sklearn"} & set(sys.modules)
        from jax._src import xla_bridge
        assert not heavy, heavy
        assert not xla_bridge.backends_are_initialized()
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(program)], check=True, timeout=120)
