"""Batches that grain's worker processes make are those of this process, and they end with the stream."""

import dataclasses
import functools
import gc
import multiprocessing
import os
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxadv import data, privacy
from jaxadv.data.pipeline import Reader, stream

pytestmark = pytest.mark.slow


def same(some, others):
    """As many batches, of equal arrays of equal types."""
    some, others = list(some), list(others)
    assert len(some) == len(others) > 0
    for one, other in zip(some, others, strict=True):
        assert one.keys() == other.keys()
        for name, value in one.items():
            np.testing.assert_array_equal(value, other[name])
            assert type(other[name]) is np.ndarray and other[name].dtype == value.dtype


def workers():
    return [child for child in multiprocessing.active_children() if "grain" in child.name]


def shared():
    """Blocks of shared memory, where the system shows them."""
    return {path.name for path in Path("/dev/shm").glob("psm_*")}


@pytest.mark.parametrize("count, prefetch", [(1, 0), (2, 2)])
def test_workers_make_the_same_stream_from_any_step(count, prefetch):
    source = data.load("digits")
    read = functools.partial(data.batches, source, 200, seed=3, epochs=2, drop_last=False, process=(1, 2))
    before = shared()
    gc.disable()
    same(read(start=3), read(start=3, workers=count, prefetch=prefetch))
    deadline = time.monotonic() + 10
    while shared() - before and time.monotonic() < deadline:  # a thread unlinks
        time.sleep(0.05)
    gc.enable()
    assert not workers() and not shared() - before


def test_bytes_travel_as_bytes():
    """A quarter of the memory between processes; floats, and sources without bytes, travel as they are."""
    digits = data.load("digits")
    reader = Reader(digits, lambda step: np.arange(step, step + 4), 6, (0, 2))
    kept = reader.stored(5)
    assert kept["x"].dtype == np.uint8 and kept["x"].shape == (3, 8, 8, 1) and kept["scale"] == 16
    np.testing.assert_array_equal(reader(5)["x"], kept["x"] / np.float32(16))
    assert list(reader(5)) == ["x", "y", "index", "mask"] and "scale" not in digits[:2]

    class Dark(type(digits)):
        def __getitem__(self, indices):
            return super().__getitem__(indices) | {"x": np.zeros((len(indices), 8, 8, 1), np.float32)}

    dark = Dark(**{field.name: getattr(digits, field.name) for field in dataclasses.fields(digits)})
    assert Reader(dark, lambda step: np.arange(2), 2).stored(0)["x"].dtype == np.float32
    with pytest.raises(ValueError, match="got a Dark, which reads in a way of its own"):
        data.blend(dark, digits)
    floats = data.arrays(digits[:9]["x"], digits.y[:9], classes=10)
    assert Reader(floats, lambda step: np.arange(2), 2).stored(0)["x"].dtype == np.float32

    few = digits.subset(slice(9, 30))
    for one, kind in ((floats, np.float32), (digits.subset(slice(0, 9)), np.uint8)):
        both = data.blend(one, few, share=0.5)
        kept = Reader(both, lambda step: np.asarray([0, 12, 3]), 3)
        assert kept.stored(0)["x"].dtype == kind
        np.testing.assert_array_equal(kept(0)["x"], digits[[0, 12, 3]]["x"])


def test_blends_samples_and_records_can_be_read_by_workers(tmp_path):
    digits = data.load("digits")
    both = data.blend(digits.subset(slice(0, 40)), digits.subset(slice(40, 200)), share=0.5)
    same(data.batches(both, 10, seed=1, epochs=2), data.batches(both, 10, seed=1, epochs=2, workers=1))

    plan = privacy.plan(64, size=16, steps=4, delta=1e-3, noise_multiplier=1.0)
    few = digits.subset(slice(0, 64))
    mine, theirs = (plan.batches(few, jax.random.key(2), workers=n) for n in (0, 1))
    same([next(mine) for _ in range(4)], [next(theirs) for _ in range(4)])
    theirs.close()

    if sys.platform == "linux":  # elsewhere array_record does not exist
        np.savez(tmp_path / "train.npz", x=np.arange(48, dtype=np.uint8).reshape(12, 2, 2, 1), y=np.arange(12) % 2)
        made = data.tfds_source(data.prepare(tmp_path, "small", tmp_path / "sets"), "train+validation")
        same(data.batches(made, 4, seed=0, epochs=3), data.batches(made, 4, seed=0, epochs=3, workers=1))


def test_what_was_made_is_placed_here_and_ends_at_an_error_or_a_close():
    def read(step):
        if step == 5:
            raise RuntimeError("cannot read 5")
        return {"x": np.full(3, step), "by": np.asarray(os.getpid())}

    def place(batch):
        return batch | {"placed by": os.getpid()}

    got = stream(read, 2, None, 2, workers=2, place=place)
    first, second, third = (next(got) for _ in range(3))
    assert [int(b["x"][0]) for b in (first, second, third)] == [2, 3, 4]
    assert {b["placed by"] for b in (first, second, third)} == {os.getpid()}
    assert first["by"] == third["by"] != second["by"] and os.getpid() not in {int(first["by"]), int(second["by"])}
    with pytest.raises(RuntimeError, match="cannot read 5"):
        next(got)
    assert not workers()
    endless = stream(read, 6, None, 2, workers=2)
    next(endless)
    assert len(workers()) == 2
    endless.close()
    assert not workers()
