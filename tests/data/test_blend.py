"""Blends: the exact share in every batch, passes of each part, resuming, and what is refused."""

import itertools

import numpy as np
import pytest

from jaxadv import data

REAL, MADE = 20, 47


def plain(n, seed=0, **about):
    """A source whose pixels tell which source and example they are of."""
    x = (np.arange(n, dtype=np.float32)[:, None, None, None] + 100 * seed) / 1000
    return data.arrays(x, (np.arange(n) + seed) % 3, classes=3, name=f"s{seed}", **about)


@pytest.fixture(scope="module")
def both():
    """Real ones without a few, so that positions and indices differ, and generated ones."""
    return data.blend(plain(REAL + 3).subset(np.arange(3, REAL + 3)), plain(MADE, 1), share=0.3)


def taken(stream, n):
    return list(itertools.islice(stream, n))


def test_a_blend_is_the_source_of_all_examples(both):
    assert isinstance(both, data.Blend) and len(both) == REAL + MADE and both.since == REAL + 3
    assert both.index.tolist() == [*range(3, 23), *range(23, 23 + MADE)]
    x, y = both.all()
    np.testing.assert_allclose(x.ravel() * 1000, [*range(3, 23), *range(100, 100 + MADE)], atol=1e-3)
    assert y.tolist() == both.y.tolist() == [*(i % 3 for i in range(3, 23)), *((i + 1) % 3 for i in range(MADE))]
    assert (both.shape, both.classes, both.bounds, both.share) == ((1, 1, 1), 3, (0.0, 1.0), 0.3)
    part = both.subset([0, -1 + len(both)])
    assert part.index.tolist() == [3, 22 + MADE] and part.share == 0.3 and part[1]["x"].item() == np.float32(0.146)


@pytest.mark.parametrize("size", [2, 7, 10])
def test_every_batch_holds_the_share_to_the_row_and_every_pass_each_example_once(both, size):
    rows = {2: 1, 7: 2, 10: 3}[size]  # round(0.3 b), at least one
    seen = taken(data.batches(both, size, seed=5), 60)
    assert all((b["index"] < both.since).sum() == rows and b["mask"].all() for b in seen)
    assert all(np.array_equal(both[np.searchsorted(both.index, b["index"])]["x"], b["x"]) for b in seen)
    for first, each, every in ((True, rows, REAL), (False, size - rows, MADE)):
        one = [i for b in seen for i in b["index"][(b["index"] < both.since) == first]]
        whole = every // each * each  # a last batch that is not full is left out
        for start in range(0, len(one) - whole + 1, whole):
            assert len(set(one[start : start + whole])) == whole
    places = np.concatenate([np.flatnonzero(b["index"] < both.since) for b in seen])
    assert set(places.tolist()) == set(range(size))  # anywhere in a batch: shards and parts have both


def test_a_stream_is_a_function_of_seed_and_step(both):
    whole = taken(data.batches(both, 10, seed=1), 30)
    late = taken(data.batches(both, 10, seed=1, start=17), 13)
    other = taken(data.batches(both, 10, seed=2), 30)
    for a, b in zip(whole[17:], late, strict=True):
        assert all(np.array_equal(a[k], b[k]) for k in a)
    assert any(not np.array_equal(a["index"], b["index"]) for a, b in zip(whole, other))
    halves = [taken(data.batches(both, 10, seed=1, process=(i, 2)), 3) for i in range(2)]
    for step, batch in enumerate(whole[:3]):
        np.testing.assert_array_equal(np.concatenate([h[step]["index"] for h in halves]), batch["index"])
    assert len(list(data.batches(both, 10, seed=1, epochs=2))) == 2 * (REAL // 3)
    still = taken(data.batches(both, 10, seed=1, shuffle=False), 2)
    assert still[1]["index"].tolist() == [6, 7, 8, *range(30, 37)]


def test_an_ordinary_source_is_visited_as_ever():
    source = plain(11)
    got = [b["index"] for b in taken(data.batches(source, 4, seed=3), 4)]
    want = [*data.order(11, 3, 0)[:8], *data.order(11, 3, 1)[:8]]
    assert np.concatenate(got).tolist() == [int(i) for i in want]


def test_the_share_belongs_to_the_fingerprint(both):
    again, other = (data.blend(plain(REAL), plain(MADE, 1), share=s) for s in (0.3, 0.4))
    same = data.blend(plain(REAL), plain(MADE, 1), share=0.3)
    assert again.fingerprint == same.fingerprint != other.fingerprint and len(again.fingerprint) == 16


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda b: data.blend(plain(4), plain(4), share=0.0), "share must lie between 0 and 1; got 0.0"),
        (lambda b: data.blend(plain(4), plain(4), share=1.0), "share must lie between 0 and 1"),
        (lambda b: data.blend(plain(4), data.load("digits")), r"the same shape; got \(1, 1, 1\) of 's0'"),
        (lambda b: data.blend(plain(4), data.arrays(np.zeros((4, 1, 1, 1)), np.arange(4))), "same classes; got 3"),
        (lambda b: data.blend(plain(4), plain(4, bounds=(0, 2))), "the same bounds"),
        (lambda b: data.blend(b, plain(4)), "two plain sources"),
        (lambda b: data.batches(b, 70, seed=0), "got 20 examples of the first for 21 of 70 rows"),
        (lambda b: data.batches(b, 1, seed=0), "batch_size must be a whole number of at least 2"),
        (lambda b: data.batches(b.take(5), 4, seed=0), "got 0 examples of the second for 3 of 4 rows"),
        (lambda b: data.batches(b, 10, seed=0, drop_last=False), "drop_last must be True for a blend"),
    ],
)
def test_what_does_not_fit_is_refused(both, build, words):
    with pytest.raises(ValueError, match=words):
        build(both)
