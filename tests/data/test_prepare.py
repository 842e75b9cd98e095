"""Raw files become array_record sets; what is read back is what was there, in any order and by any process."""

import io

import numpy as np
import pytest

from jaxadv import data
from jaxadv.cli import main
from jaxadv.data.prepare import SUFFIXES, Raw, raw, read_cifar

pytest.importorskip("array_record", reason="array_record exists for Linux only")


def sorted_rows(source):
    """Examples in an order of their own, because tfds stores in one of its own."""
    x, y = source.all()
    order = np.lexsort((*x.reshape(len(x), -1).T, y))
    return x[order], y[order]


def same_content(one, other):
    for a, b in zip(sorted_rows(one), sorted_rows(other), strict=True):
        np.testing.assert_array_equal(a, b)
    assert (one.classes, one.shape, one.bounds) == (other.classes, other.shape, other.bounds)


def pixels(n, shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, *shape), np.uint8), np.arange(n, dtype=np.uint8) % 3


def test_idx_files_by_the_command_line(tmp_path, idx_bytes, capsys):
    folder = tmp_path / "raw"
    folder.mkdir()
    for n, word in ((12, "train"), (6, "t10k")):
        x, y = pixels(n, (5, 4), n)
        (folder / f"{word}-images-idx3-ubyte").write_bytes(idx_bytes(x))
        (folder / f"{word}-labels-idx1-ubyte").write_bytes(idx_bytes(y))
    words = ["data", "prepare", str(folder), "--name", "small", "--out", str(tmp_path / "sets")]
    assert main(words) == 0
    assert "train: 12 examples of shape (5, 4, 1) in 3 classes" in capsys.readouterr().out
    made = data.load("tfds:small", "test", root=tmp_path / "sets")
    same_content(made, data.idx(folder / "t10k-images-idx3-ubyte", folder / "t10k-labels-idx1-ubyte"))
    assert main(words) == 2 and "must not exist yet" in capsys.readouterr().err


def test_arrays_of_floats_keep_their_values(tmp_path):
    x = np.random.default_rng(0).normal(size=(8, 3)).astype(np.float32)
    np.savez(tmp_path / "train.npz", x=x, y=np.arange(8) % 2, bounds=[-9, 9])
    made = data.tfds_source(data.prepare(tmp_path, "floats", tmp_path / "sets"), "train+validation", bounds=(-9, 9))
    same_content(made, data.npz(tmp_path / "train.npz"))


def test_cifar_binaries(tmp_path):
    x, y = pixels(4, (32, 32, 3))
    planes = x.transpose(0, 3, 1, 2).reshape(4, -1)  # the format: one byte of label, then red, green, blue
    (tmp_path / "data_batch_1.bin").write_bytes(np.c_[y[:, None], planes].tobytes())
    (tmp_path / "test_batch.bin").write_bytes(np.c_[y[:2, None], planes[:2]].tobytes())
    got = read_cifar(tmp_path / "data_batch_1.bin", labels=1)
    np.testing.assert_array_equal(got[0], x)
    np.testing.assert_array_equal(got[1], y)
    found = raw(tmp_path)
    assert isinstance(found, Raw) and found.shape == (32, 32, 3) and len(found.classes) == 10
    rows = list(found.splits["test"]())
    np.testing.assert_array_equal(rows[1][1], x[1])
    assert [label for _, _, label in rows] == [0, 1]
    fine = np.c_[7 * np.ones((2, 1), np.uint8), [[41], [99]], planes[:2]].astype(np.uint8)
    (tmp_path / "train.bin").write_bytes(fine.tobytes())
    assert read_cifar(tmp_path / "train.bin", labels=2)[1].tolist() == [41, 99]
    (tmp_path / "train.bin").write_bytes(fine.tobytes()[:-1])
    with pytest.raises(ValueError, match="whole records of 3074 bytes.*Truncated"):
        read_cifar(tmp_path / "train.bin", labels=2)


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """Images of many sizes and kinds in folders of classes, as ImageNet comes, and the set made of them."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("photographs")
    for part, n in (("train", 12), ("val", 6)):
        for i in range(n):
            path = folder / part / f"n{i % 3:08d}" / f"{part}_{i}{('.JPEG', '.png')[i % 2]}"
            path.parent.mkdir(parents=True, exist_ok=True)
            shade = np.full((40 + 7 * i, 50, 3), 20 * (i % 3) + 10 * (part == "val"), np.uint8)
            Image.fromarray(shade).save(path)
    return folder, data.prepare(folder, "photographs", folder / "sets", size=32)


def test_folders_of_images_become_one_size(photographs):
    _, made = photographs
    train, held = (data.tfds_source(made, split) for split in ("train", "validation"))
    assert (len(train), len(held), train.shape, train.classes) == (12, 6, (32, 32, 3), 3)
    assert train.class_names == ("n00000000", "n00000001", "n00000002") and ".jpeg" in SUFFIXES
    for source, more in ((train, 0), (held, 10)):
        x, y = source.all()
        np.testing.assert_allclose(x[:, 0, 0, 0] * 255, 20 * y + more, atol=2)


def test_a_stream_of_a_set_resumes_anywhere_and_is_shared_by_processes(photographs):
    """Records are read when their batch is due, only those of the process: the multiset and order are global."""
    source = data.tfds_source(photographs[1], "train")
    stream = data.batches(source, 4, seed=3, epochs=3)
    every = list(stream)
    again = list(data.batches(source, 4, seed=3, epochs=3, start=5))
    assert len(every) == 9 and len(again) == 4
    for one, other in zip(every[5:], again):
        np.testing.assert_array_equal(one["x"], other["x"])
        np.testing.assert_array_equal(one["index"], other["index"])
    halves = [list(data.batches(source, 4, seed=3, epochs=3, process=(i, 2))) for i in (0, 1)]
    for whole, *parts in zip(every, *halves):
        np.testing.assert_array_equal(whole["x"], np.concatenate([part["x"] for part in parts]))


def test_a_file_that_was_cut_short_is_named(photographs, tmp_path):
    import shutil

    folder = tmp_path / "photographs" / "1.0.0"
    shutil.copytree(photographs[1], folder)
    (file,) = folder.glob("*-train.array_record*")
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(ValueError, match="must be whole.*(Cut short|Truncated)"):
        data.tfds_source(folder, "train").all()


def test_what_cannot_be_prepared_is_refused(photographs, tmp_path):
    from PIL import Image

    folder, _ = photographs
    with pytest.raises(ValueError, match="must have the shape"):
        data.prepare(folder, "sizes", tmp_path / "sets")
    with pytest.raises(ValueError, match="name must be lower-case"):
        data.prepare(folder, "Big-Name", tmp_path / "sets")
    with pytest.raises(FileNotFoundError, match="must hold IDX files"):
        raw(tmp_path)
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(buffer, "JPEG")
    for name in ("a", "b"):
        (tmp_path / "train" / name).mkdir(parents=True)
        (tmp_path / "train" / name / "x.jpg").write_bytes(buffer.getvalue())
    assert next(raw(tmp_path).splits["train"]())[1] == buffer.getvalue()  # a file that fits is kept to the bit
    (tmp_path / "train" / "b" / "x.jpg").write_bytes(buffer.getvalue()[:300])
    with pytest.raises(ValueError, match="b/x.jpg must be a whole image.*Truncated"):
        list(raw(tmp_path).splits["train"]())
