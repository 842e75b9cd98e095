"""Sources from arrays and files: exact round trips, an independent hash, and what malformed input is told."""

import gzip
import hashlib
import io
import struct

import numpy as np
import pytest

from jaxadv import data


def tiny(n=12, classes=3, seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (n, 4, 5, 1), np.uint8), (np.arange(n) % classes).astype(np.int64)


# --- Source ----------------------------------------------------------------------------------------------------------


def test_bytes_become_floats_in_the_unit_interval():
    x, y = tiny()
    source = data.arrays(x, y, name="tiny", class_names=("a", "b", "c"), credit="me")
    assert isinstance(source, data.Source) and len(source) == 12
    assert (source.name, source.split, source.classes, source.shape, source.bounds) == (
        "tiny",
        "",
        3,
        (4, 5, 1),
        (0.0, 1.0),
    )
    assert (source.class_names, source.credit, source.title) == (("a", "b", "c"), "me", "tiny")
    got_x, got_y = source.all()
    assert got_x.dtype == np.float32 and got_y.dtype == np.int32
    np.testing.assert_array_equal(np.rint(got_x * 255).astype(np.uint8), x)
    np.testing.assert_allclose(got_x, x / 255.0, rtol=1e-7)
    np.testing.assert_array_equal(got_y, y)
    np.testing.assert_array_equal(source.y, y)
    assert "store" not in repr(source)


@pytest.mark.parametrize(
    "indices, rows",
    [
        ([3, 0, 3], [3, 0, 3]),
        (np.array([5]), [5]),
        (5, [5]),
        (slice(2, 9, 3), [2, 5, 8]),
        (slice(-2, None), [10, 11]),
        (np.arange(12) % 5 == 0, [0, 5, 10]),
        ([], []),
    ],
)
def test_positions(indices, rows):
    x, y = tiny()
    got = data.arrays(x, y)[indices]
    np.testing.assert_array_equal(got["x"], x[rows].astype(np.float32) / np.float32(255))
    np.testing.assert_array_equal(got["y"], y[rows])
    assert got["x"].dtype == np.float32 and got["y"].dtype == np.int32


@pytest.mark.parametrize("indices", [[-1], [12], [0.5], [[0, 1]], [True, False]])
def test_positions_that_would_silently_wrap_are_refused(indices):
    with pytest.raises(IndexError, match="positions must"):
        data.arrays(*tiny())[indices]


def test_what_is_read_belongs_to_the_reader():
    source = data.arrays(np.full((3, 2), 0.5), [0, 1, 0])
    source.all()[0][:] = 9
    source[[0, 1]]["x"][:] = 9
    assert (source.all()[0] == 0.5).all()


def test_subsets_keep_the_identity_of_examples():
    x, y = tiny()
    source = data.arrays(x, y).subset([7, 2, 9, 4])
    again = source.subset([2, 0]).take(1)
    assert source.index.tolist() == [7, 2, 9, 4] and again.index.tolist() == [9]
    np.testing.assert_array_equal(again.all()[0], data.arrays(x, y)[[9]]["x"])
    assert source.y.tolist() == y[[7, 2, 9, 4]].tolist() and source.y.dtype == np.int32


def test_empty_or_too_large_selections_are_refused():
    source = data.arrays(*tiny())
    with pytest.raises(ValueError, match="at least one"):
        source.subset([])
    for n in (0, 13):
        with pytest.raises(ValueError, match="n must"):
            source.take(n)
        with pytest.raises(ValueError, match="n must"):
            data.evaluation_subset(source, n)


def test_the_fingerprint_is_the_stated_hash_of_what_a_model_sees():
    x, y = tiny()
    source = data.arrays(x, y)
    values = (x.astype(np.float32) / np.float32(255)).astype("<f4")
    text = repr((12, 4, 5, 1)).encode() + values.tobytes() + y.astype("<i4").tobytes()
    assert source.fingerprint == hashlib.sha256(text).hexdigest()[:16]
    assert data.arrays(values, y.astype(np.uint8)).fingerprint == source.fingerprint  # floats of the same content
    assert source.subset(np.arange(12)).fingerprint == source.fingerprint
    other = x.copy()
    other[3, 1, 1, 0] ^= 1
    changed = [data.arrays(other, y), data.arrays(x, (y + 1) % 3), source.take(11), source.subset(np.arange(12)[::-1])]
    assert len({source.fingerprint, *(s.fingerprint for s in changed)}) == 5


def test_the_fingerprint_does_not_depend_on_chunks():
    x = np.linspace(0, 1, 3000, dtype=np.float32)[:, None]
    text = repr((3000, 1)).encode() + x.tobytes() + np.zeros(3000, "<i4").tobytes()
    assert data.arrays(x, np.zeros(3000, int)).fingerprint == hashlib.sha256(text).hexdigest()[:16]


def test_the_evaluation_subset_is_nested_balanced_and_fixed():
    y = np.repeat(np.arange(4), [5, 40, 40, 15])
    source = data.arrays(np.linspace(0, 1, 100)[:, None], y).subset(np.arange(100)[::-1])
    big = data.evaluation_subset(source, 80)
    for n in (1, 8, 20, 50):
        part = data.evaluation_subset(source, n)
        assert part.index.tolist() == big.index[:n].tolist()
    assert np.bincount(big.y).tolist() == [5, 30, 30, 15]
    assert np.bincount(data.evaluation_subset(source, 20).y).tolist() == [5, 5, 5, 5]
    np.testing.assert_array_equal(big.all()[0][:, 0], np.linspace(0, 1, 100, dtype=np.float32)[big.index])
    assert data.evaluation_subset(source, 80, seed=1).index.tolist() != big.index.tolist()


def test_divide_is_a_partition_with_balanced_validation():
    source = data.arrays(np.linspace(0, 1, 200)[:, None], np.arange(200) % 4)
    train, held = data.divide(source, "train"), data.divide(source, "validation")
    assert (train.split, held.split, len(train), len(held)) == ("train", "validation", 180, 20)
    assert sorted([*train.index, *held.index]) == list(range(200))
    assert np.bincount(held.y).tolist() == [5] * 4
    assert (np.diff(train.index) > 0).all() and (np.diff(held.index) > 0).all()
    assert len(data.divide(source, "test")) == len(data.divide(source, "train+validation")) == 200
    big = data.arrays(np.zeros((60_000, 1)), np.arange(60_000) % 10)
    assert (len(data.divide(big, "train")), len(data.divide(big, "validation"))) == (55_000, 5_000)
    with pytest.raises(ValueError, match="at least 2"):
        data.divide(source.take(1), "train")
    with pytest.raises(ValueError, match="unknown split 'tset'"):
        data.divide(source, "tset")
    assert set(data.SPLITS) == {"train", "validation", "test", "train+validation"}


# --- arrays ----------------------------------------------------------------------------------------------------------


def test_floats_outside_the_unit_interval_need_bounds():
    x, y = np.linspace(-1, 2.1, 6)[:, None], np.arange(6) % 2
    with pytest.raises(ValueError, match="bounds must be given.*-1 to 2.1"):
        data.arrays(x, y)
    source = data.arrays(x, y, bounds=(-1, 2.1))
    assert source.bounds == (-1.0, float(np.float32(2.1)))
    assert source.all()[0].max() <= source.bounds[1]
    np.testing.assert_array_equal(source.all()[0], x.astype(np.float32))
    with pytest.raises(ValueError, match="within bounds"):
        data.arrays(x, y, bounds=(-1, 2))
    with pytest.raises(ValueError, match="within bounds"):
        data.arrays(*tiny(), bounds=(0, 0.5))


IMAGES, LABELS = tiny()


@pytest.mark.parametrize(
    "x, y, error, says",
    [
        (IMAGES[:0], LABELS[:0], ValueError, "at least one example"),
        (np.zeros((0, 3)), LABELS[:0], ValueError, "at least one example"),
        (IMAGES[..., 0], LABELS, ValueError, r"x\[..., None\]"),
        (IMAGES.astype(int), LABELS, TypeError, "floating point"),
        (np.full((12, 2), np.nan), LABELS, ValueError, "finite"),
        (np.zeros(12), LABELS, ValueError, "batch of shape"),
        (IMAGES, np.eye(3)[LABELS], ValueError, "argmax"),
        (IMAGES, LABELS.astype(float), TypeError, "integer labels"),
        (IMAGES, LABELS[:11], ValueError, "each of the 12"),
        (IMAGES, LABELS - 1, ValueError, "-1"),
    ],
)
def test_malformed_arrays_are_refused(x, y, error, says):
    with pytest.raises(error, match=says):
        data.arrays(x, y)


def test_malformed_settings_are_refused():
    with pytest.raises(ValueError, match=r"\[0, 2\)"):
        data.arrays(*tiny(), classes=2)
    with pytest.raises(ValueError, match="classes"):
        data.arrays(*tiny(classes=1), classes=1)
    with pytest.raises(ValueError, match="scale"):
        data.arrays(*tiny(), scale=0.0)
    for bounds in [(1, 0), (0, np.inf), (0, 0.5, 1)]:
        with pytest.raises(ValueError, match="lowest < highest"):
            data.arrays(*tiny(), bounds=bounds)
    assert data.arrays(*tiny(classes=1)).classes == 2


# --- IDX -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "code, dtype", [(0x08, "u1"), (0x09, "i1"), (0x0B, ">i2"), (0x0C, ">i4"), (0x0D, ">f4"), (0x0E, ">f8")]
)
@pytest.mark.parametrize("zipped", [False, True])
def test_idx_round_trip(tmp_path, idx_bytes, code, dtype, zipped):
    array = np.arange(24).reshape(2, 3, 4).astype(dtype)
    content = idx_bytes(array, code)
    (tmp_path / "f").write_bytes(gzip.compress(content) if zipped else content)
    got = data.read_idx(tmp_path / "f")
    np.testing.assert_array_equal(got, array)
    assert got.dtype.isnative and got.dtype.itemsize == array.dtype.itemsize


GOOD = b"\0\0\x08\x03" + struct.pack(">3I", 2, 3, 4) + bytes(range(24))


@pytest.mark.parametrize(
    "content, says",
    [
        (b"", "an empty file"),
        (b"<html>not found</html>", "Another format"),
        (b"\0\0\x07\x03" + GOOD[4:], "00 00 07 03"),
        (b"\0\0\x08\x00", "number of axes"),
        (GOOD[:10], "header"),
        (GOOD[:-1], "24 bytes.*got 23"),
        (GOOD + b"\0", "24 bytes.*got 25"),
        (gzip.compress(GOOD, mtime=0)[:-9], "gzip"),
        (b"\x1f\x8b" + b"rubbish", "gzip"),
    ],
    ids=["empty", "another format", "type", "axes", "header", "short", "long", "cut gzip", "broken gzip"],
)
def test_malformed_idx_is_refused(tmp_path, content, says):
    (tmp_path / "f").write_bytes(content)
    with pytest.raises(ValueError, match=says):
        data.read_idx(tmp_path / "f")


def test_idx_pairs(tmp_path, idx_bytes):
    x, y = tiny()
    (tmp_path / "x").write_bytes(idx_bytes(x[..., 0]))
    (tmp_path / "y").write_bytes(idx_bytes(y.astype(np.uint8)))
    source = data.idx(tmp_path / "x", tmp_path / "y", name="pair")
    assert source.shape == (4, 5, 1) and source.fingerprint == data.arrays(x, y).fingerprint
    with pytest.raises(ValueError, match="exchanged"):
        data.idx(tmp_path / "y", tmp_path / "x")
    (tmp_path / "short").write_bytes(idx_bytes(y[:-1].astype(np.uint8)))
    with pytest.raises(ValueError, match="each of the 12"):
        data.idx(tmp_path / "x", tmp_path / "short")


# --- npz -------------------------------------------------------------------------------------------------------------


def test_npz_round_trip(tmp_path):
    x, y = tiny()
    np.savez(tmp_path / "mine.npz", x=x, y=y)
    source = data.npz(tmp_path / "mine.npz")
    assert source.name == "mine" and source.fingerprint == data.arrays(x, y).fingerprint


def test_npz_may_carry_bounds_classes_and_credit(tmp_path):
    np.savez(tmp_path / "f.npz", x=np.array([[-2.0], [3.0]]), y=[0, 1], bounds=[-2, 3], classes=5, credit="them")
    source = data.npz(tmp_path / "f.npz")
    assert (source.bounds, source.classes, source.credit) == ((-2.0, 3.0), 5, "them")
    assert data.npz(tmp_path / "f.npz", bounds=(-4, 4), classes=7, name="g").bounds == (-4.0, 4.0)


def test_malformed_npz_is_refused(tmp_path):
    x, y = tiny()
    np.savez(tmp_path / "a.npz", x_train=x, y_train=y)
    with pytest.raises(ValueError, match="must hold the arrays x, y; got x_train, y_train. One split per file"):
        data.npz(tmp_path / "a.npz")
    np.savez(tmp_path / "b.npz", x=x, y=np.array([object()] * 12))
    (tmp_path / "c.npz").write_bytes(b"PK rubbish")
    whole = (tmp_path / "a.npz").read_bytes()
    (tmp_path / "d.npz").write_bytes(whole[: len(whole) // 2])
    with open(tmp_path / "e.npz", "wb") as file:
        np.save(file, x)
    for name in "bcde":
        with pytest.raises(ValueError, match="cannot be read"):
            data.npz(tmp_path / f"{name}.npz")
    with pytest.raises(FileNotFoundError, match="no such file"):
        data.npz(tmp_path / "absent.npz")


# --- JPEG copies -----------------------------------------------------------------------------------------------------


def test_jpegs_are_decoded_as_pillow_does(tmp_path, write_jpegs):
    from PIL import Image

    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (6, 16, 16, 3), np.uint8)
    files = write_jpegs(tmp_path / "j.npz", images, [0, 1, 2, 0, 1, 2])
    expected = np.stack([np.asarray(Image.open(io.BytesIO(f))) for f in files])
    source = data.jpegs(tmp_path / "j.npz")
    assert (source.shape, source.classes, source.y.tolist()) == ((16, 16, 3), 3, [0, 1, 2, 0, 1, 2])
    np.testing.assert_array_equal(source[[4, 1, 4]]["x"], expected[[4, 1, 4]].astype(np.float32) / np.float32(255))
    assert source.store.done.tolist() == [False, True, False, False, True, False]  # decoded when asked for, once
    assert source[[]]["x"].shape == (0, 16, 16, 3)
    assert source.fingerprint == data.arrays(expected, source.y).fingerprint
    source.store.blob = source.store.blob[:0]  # nothing left to decode from
    np.testing.assert_array_equal(source.all()[0], expected.astype(np.float32) / np.float32(255))


def test_malformed_jpegs_are_refused(tmp_path, write_jpegs):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (3, 16, 16, 3), np.uint8)
    write_jpegs(tmp_path / "j.npz", images, [0, 1, 2])
    with np.load(tmp_path / "j.npz") as stored:
        good = dict(stored)
    for change in (
        {"offsets": good["offsets"][:-1]},
        {"offsets": good["offsets"] + 1},
        {"jpeg": good["jpeg"][:-5]},
        {"offsets": good["offsets"].astype(float)},
    ):
        np.savez(tmp_path / "bad.npz", **(good | change))
        with pytest.raises(ValueError, match="must hold offsets"):
            data.jpegs(tmp_path / "bad.npz")
    np.savez(tmp_path / "bad.npz", jpeg=good["jpeg"], offsets=good["offsets"])
    with pytest.raises(ValueError, match="jpeg, offsets, labels"):
        data.jpegs(tmp_path / "bad.npz")
    with pytest.raises(ValueError, match=r"\[0, 2\)"):
        data.jpegs(tmp_path / "j.npz", classes=2)
    broken = good["jpeg"].copy()
    broken[good["offsets"][1] : good["offsets"][2]] = 7
    np.savez(tmp_path / "bad.npz", **(good | {"jpeg": broken}))
    source = data.jpegs(tmp_path / "bad.npz")
    source[[0, 2]]
    with pytest.raises(ValueError, match="image 1 of .*bad.npz must be a whole JPEG"):
        source.all()


def test_jpegs_of_different_sizes_are_refused(tmp_path, write_jpegs):
    a, b = np.zeros((16, 16, 3), np.uint8), np.zeros((8, 16, 3), np.uint8)
    write_jpegs(tmp_path / "j.npz", [a, b], [0, 1])
    with pytest.raises(ValueError, match="one size"):
        data.jpegs(tmp_path / "j.npz").all()
