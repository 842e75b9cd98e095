"""Order, arithmetic, padding, prefetch: against a second Philox, exhaustive recounts and identities."""

import gc
import threading
import time

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxadv import data


def small(n, classes=3):
    """A source whose pixels tell the index of the example."""
    x = np.arange(n, dtype=np.float32)[:, None, None, None] / np.float32(n)
    return data.arrays(x, np.arange(n) % classes, classes=classes)


def readers():
    return [t for t in threading.enumerate() if t.name.startswith("jaxadv-batches")]


def philox(counter, key):
    """Philox-4x64-10 of Salmon et al. 2011 in plain integers."""
    word = 2**64
    (a, b, c, d), (k, m) = counter, key
    for _ in range(10):
        first, second = 0xD2E7470EE14C6C93 * a, 0xCA5A826395121157 * c
        a, b, c, d = (second // word) ^ b ^ k, second % word, (first // word) ^ d ^ m, first % word
        k, m = (k + 0x9E3779B97F4A7C15) % word, (m + 0xBB67AE8584CAA73B) % word
    return [a, b, c, d]


@pytest.mark.parametrize("seed, epoch", [(0, 0), (1, 0), (0, 1), (2**64 - 1, 7)])
def test_order_sorts_the_words_of_an_independent_philox(seed, epoch):
    words = [w for block in range(1, 11) for w in philox((block, 0, 0, 0), (seed, epoch))][:37]
    assert data.order(37, seed, epoch).tolist() == sorted(range(37), key=words.__getitem__)


def test_the_second_philox_agrees_with_the_authors_known_answer():
    full = 2**64 - 1
    expected = [0x87B092C3013FE90B, 0x438C3C67BE8D0224, 0x9CC7D7C69CD777B6, 0xA09CAEBF594F0BA0]
    assert philox((full,) * 4, (full,) * 2) == expected


def test_order_is_pinned():
    assert data.order(8, 0, 0).tolist() == [0, 2, 1, 5, 4, 3, 6, 7]
    assert data.order(8, 1, 2).tolist() == [4, 2, 0, 6, 1, 5, 7, 3]
    assert data.order(8, 0, 0).dtype == np.int32


def test_order_is_a_uniform_permutation():
    firsts = np.stack([data.order(5, 3, epoch) for epoch in range(4000)])
    assert (np.sort(firsts, axis=1) == np.arange(5)).all()
    for place in range(5):  # chi-square with 4 degrees of freedom; 23.5 is its 1e-4 quantile
        counts = np.bincount(firsts[:, place], minlength=5)
        assert ((counts - 800) ** 2 / 800).sum() < 23.5


@pytest.mark.parametrize("bad", [(0, 0, 0), (5, -1, 0), (5, 0, -1), (5, 2**64, 0)])
def test_order_refuses_what_is_no_count(bad):
    with pytest.raises(ValueError, match="must"):
        data.order(*bad)


@given(st.lists(st.integers(0, 4), min_size=1, max_size=40), st.integers(0, 5))
@settings(deadline=None, max_examples=50)
def test_every_prefix_of_the_balanced_order_is_balanced(labels, seed):
    y = np.array(labels)
    chosen = data.balanced_order(y, seed)
    assert sorted(chosen.tolist()) == list(range(len(y)))
    total = np.bincount(y, minlength=5)
    for n in range(1, len(y) + 1):
        seen = np.bincount(y[chosen[:n]], minlength=5)
        open_classes = seen[seen < total]
        if len(open_classes):
            assert seen.max() - open_classes.min() <= 1


@pytest.mark.parametrize("n, b, dropped, padded", [(10, 3, 3, 4), (9, 3, 3, 3), (3, 3, 1, 1), (1, 1, 1, 1)])
def test_steps_per_epoch(n, b, dropped, padded):
    assert data.steps_per_epoch(n, b) == dropped
    assert data.steps_per_epoch(n, b, drop_last=False) == padded


def test_an_epoch_without_a_batch_is_refused():
    with pytest.raises(ValueError, match="drop_last=False"):
        data.steps_per_epoch(3, 4)
    assert data.steps_per_epoch(3, 4, drop_last=False) == 1


def test_epoch_and_step():
    assert [data.epoch_and_step(t, 3) for t in (0, 2, 3, 7)] == [(0, 0), (0, 2), (1, 0), (2, 1)]


def test_process_rows_tile_the_batch():
    rows = [data.process_rows(12, (i, 4)) for i in range(4)]
    assert np.concatenate([np.arange(12)[r] for r in rows]).tolist() == list(range(12))
    with pytest.raises(ValueError, match="multiple"):
        data.process_rows(10, (0, 4))
    with pytest.raises(ValueError, match="0 <= i < n"):
        data.process_rows(12, (4, 4))


def test_make_batch_pads_with_ordinary_values():
    source = small(5).subset([4, 3, 2])
    batch = data.make_batch(source, [1, -1, 0], 5)
    assert batch["index"].tolist() == [3, -1, 4, -1, -1]
    assert batch["mask"].tolist() == [True, False, True, False, False]
    np.testing.assert_allclose(batch["x"].ravel() * 5, [3, 4, 4, 4, 4], rtol=1e-6)
    assert batch["y"].tolist() == [0, 1, 1, 1, 1]
    assert [batch[k].dtype for k in ("x", "y", "index", "mask")] == [np.float32, np.int32, np.int32, np.bool_]


def test_make_batch_may_be_empty_as_a_poisson_draw_may():
    batch = data.make_batch(small(5), [], 2)
    assert not batch["mask"].any() and (batch["index"] == -1).all() and np.isfinite(batch["x"]).all()


@pytest.mark.parametrize(
    "positions, size, error", [([0, 1], 1, ValueError), ([5], 1, IndexError), ([-2], 1, IndexError)]
)
def test_make_batch_refuses(positions, size, error):
    with pytest.raises(error, match="got"):
        data.make_batch(small(5), positions, size)


def test_make_batch_refuses_floats():
    with pytest.raises(ValueError, match="integers"):
        data.make_batch(small(5), [0.0])


def test_an_epoch_visits_each_example_once_in_the_stated_order():
    source = small(23)
    seen = [b["index"] for b in data.batches(source, 5, seed=7, epochs=2, drop_last=False)]
    assert len(seen) == 10
    for epoch in range(2):
        flat = np.concatenate(seen[5 * epoch : 5 * epoch + 5])
        assert flat[:23].tolist() == data.order(23, 7, epoch).tolist() and flat[23:].tolist() == [-1, -1]


def test_rows_belong_together():
    source = small(23)
    for b in data.batches(source, 5, seed=1, epochs=1):
        np.testing.assert_array_equal(b["x"], source[b["index"]]["x"])
        np.testing.assert_array_equal(b["y"], b["index"] % 3)
        assert b["mask"].all()


def test_unshuffled_is_the_sources_order():
    source = small(9).subset([8, 1, 6, 3])
    assert [b["index"].tolist() for b in data.batches(source, 2, seed=0, epochs=2, shuffle=False)] == [
        [8, 1],
        [6, 3],
    ] * 2


@given(
    n=st.integers(1, 20),
    b=st.integers(1, 6),
    start=st.integers(0, 12),
    processes=st.sampled_from([1, 2, 3]),
    drop_last=st.booleans(),
    prefetch=st.sampled_from([0, 1, 2, 5]),
)
@settings(deadline=None, max_examples=60)
def test_resume_processes_and_prefetch_do_not_change_the_stream(n, b, start, processes, drop_last, prefetch):
    b *= processes
    if drop_last and b > n:
        return
    source = small(n)
    whole = list(data.batches(source, b, seed=4, epochs=3, drop_last=drop_last, prefetch=0))
    shares = [
        list(
            data.batches(
                source, b, seed=4, epochs=3, start=start, drop_last=drop_last, process=(i, processes), prefetch=prefetch
            )
        )
        for i in range(processes)
    ]
    assert all(len(share) == max(0, len(whole) - start) for share in shares)
    for t, batch in enumerate(whole[start:]):
        for key in batch:
            np.testing.assert_array_equal(np.concatenate([share[t][key] for share in shares]), batch[key])
    assert not readers()


def test_without_epochs_the_stream_has_no_end():
    stream = data.batches(small(4), 2, seed=0)
    seen = [next(stream)["index"] for _ in range(10)]
    assert np.concatenate(seen[8:]).tolist() == data.order(4, 0, 4).tolist()
    stream.close()
    resumed = data.batches(small(4), 2, seed=0, start=7)
    assert [next(resumed)["index"].tolist() for _ in range(3)] == [index.tolist() for index in seen[7:]]
    resumed.close()


@pytest.mark.parametrize(
    "bad",
    [
        {"batch_size": 0},
        {"batch_size": 9},
        {"start": -1},
        {"epochs": -1},
        {"seed": -1},
        {"process": (2, 2)},
        {"prefetch": -1},
    ],
)
def test_settings_are_refused_at_once(bad):
    with pytest.raises(ValueError, match="must"):
        data.batches(small(4), **({"batch_size": 2, "seed": 0} | bad))


class Slow:
    """A source that dawdles, and fails when it is asked for example `bad`."""

    def __init__(self, n, bad=None, wait=0.0):
        self.inner, self.index, self.bad, self.wait = small(n), np.arange(n, dtype=np.int32), bad, wait

    def __len__(self):
        return len(self.inner)

    def __getitem__(self, indices):
        time.sleep(self.wait * np.random.default_rng(int(np.sum(indices))).random())
        if self.bad in indices:
            raise RuntimeError(f"cannot read {self.bad}")
        return self.inner[indices]


def test_any_readable_works_and_timing_does_not_matter():
    assert isinstance(Slow(3), data.Readable) and isinstance(small(3), data.Readable)
    fast = [b["index"].tolist() for b in data.batches(small(20), 2, seed=5, epochs=1)]
    assert [b["index"].tolist() for b in data.batches(Slow(20, wait=0.01), 2, seed=5, epochs=1)] == fast


@pytest.mark.parametrize("prefetch", [0, 1, 3])
def test_an_error_appears_at_its_step_and_the_thread_ends(prefetch):
    stream = data.batches(Slow(8, bad=4), 2, seed=0, shuffle=False, prefetch=prefetch)
    assert next(stream)["index"].tolist() == [0, 1]
    assert next(stream)["index"].tolist() == [2, 3]
    with pytest.raises(RuntimeError, match="cannot read 4"):
        next(stream)
    with pytest.raises(StopIteration):
        next(stream)
    assert not readers()


def test_reading_runs_ahead_but_not_farther_than_asked():
    asked = []

    def place(batch):
        asked.append(batch["index"][0])
        return batch

    stream = data.batches(small(20), 1, seed=0, shuffle=False, prefetch=2, place=place)
    next(stream)
    deadline = time.monotonic() + 5
    while len(asked) < 3 and time.monotonic() < deadline:
        time.sleep(0.001)
    time.sleep(0.02)
    assert asked == [0, 1, 2]
    stream.close()


@pytest.mark.parametrize("how", ["close", "end", "collect", "never started"])
def test_no_thread_is_left_behind(how):
    stream = data.batches(small(4), 2, seed=0, epochs=2 if how == "end" else None)
    if how != "never started":
        next(stream)
        assert readers()
    if how == "close":
        stream.close()
    elif how == "end":
        assert len(list(stream)) == 3
    else:
        del stream
        gc.collect()
    assert not readers()


def test_a_stream_may_be_collected_inside_its_own_thread():
    """As happens when the garbage collector runs there; waiting for itself would be an error."""
    go, closed = threading.Event(), []

    def place(batch):
        if batch["index"][0] == 2:
            go.wait(5)
            try:
                stream.close()
                closed.append("quietly")
            except RuntimeError as error:
                closed.append(error)
        return batch

    stream = data.batches(small(8), 1, seed=0, shuffle=False, place=place)
    next(stream)
    own = readers()
    go.set()
    for thread in own:
        thread.join(5)
    assert closed == ["quietly"] and not readers()


def test_place_runs_on_every_batch():
    batch = next(data.batches(small(4), 4, seed=0, epochs=1, place=jax.device_put))
    assert all(isinstance(leaf, jax.Array) for leaf in batch.values())
    assert batch["x"].shape == (4, 1, 1, 1)
