import itertools

import jax
import numpy as np
import pytest
from scipy import stats

from jaxadv import data
from jaxadv.privacy import Shuffled, poisson, sampling
from jaxadv.privacy.sampling import TAIL, Poisson, batches, seed_of


def source(n=40):
    rng = np.random.default_rng(0)
    held = data.arrays(rng.uniform(0, 1, (n + 3, 2, 2, 1)).astype(np.float32), np.arange(n + 3) % 2, classes=2)
    return held.subset(np.arange(n + 3) >= 3)  # positions and dataset indices differ


def drawn(sampler, steps, seed=7):
    """Who takes part, bool [steps, n]."""
    out = np.zeros((steps, sampler.n), bool)
    for step in range(steps):
        out[step, sampler.positions(seed, step)] = True
    return out


def test_coins_are_fair_and_independent():
    sampler, steps = poisson(30, 6), 4000
    took = drawn(sampler, steps)
    low, high = stats.binom.ppf([1e-6, 1 - 1e-6], steps, 0.2)
    assert ((took.sum(0) >= low) & (took.sum(0) <= high)).all()
    sizes = np.bincount(took.sum(1), minlength=31)[:31]
    expected = steps * stats.binom.pmf(np.arange(31), 30, 0.2)
    kept = expected > 5
    assert stats.chisquare(sizes[kept], expected[kept] * sizes[kept].sum() / expected[kept].sum()).pvalue > 1e-4
    correlation = np.corrcoef(took.T) - np.eye(30)
    assert abs(correlation).max() < 5 / np.sqrt(steps)
    following = np.corrcoef(took[:-1].ravel(), took[1:].ravel())[0, 1]
    assert abs(following) < 5 / np.sqrt(steps * 30)


def test_a_step_is_a_function_of_seed_and_step_alone():
    sampler = poisson(100, rate=0.3)
    first = [sampler.positions(5, t).tolist() for t in range(6)]
    assert first == [sampler.positions(5, t).tolist() for t in range(6)]
    assert len({tuple(p) for p in first}) == 6 and first[0] != sampler.positions(6, 0).tolist()
    assert all(p == sorted(p) for p in first)
    assert seed_of(jax.random.key(3)) == seed_of(jax.random.key(3)) != seed_of(jax.random.key(4))


def test_rows_hold_every_sample_but_the_rarest():
    for n, size in [(60_000, 256), (1437, 128), (12, 4)]:
        sampler = poisson(n, size)
        assert sampler.overflow <= TAIL and not sampler.truncated and sampler.size == pytest.approx(size)
        if sampler.rows < n:
            assert stats.binom.sf(sampler.rows - 3, n, sampler.rate) > TAIL  # and not many more than that
    assert poisson(12, 12).rows == 12 and poisson(12, 12).positions(0, 0).tolist() == list(range(12))
    assert poisson(1437, 128, multiple=16).rows % 16 == 0


def test_truncation_keeps_a_uniform_subset():
    sampler, steps = poisson(20, 10, rows=8), 4000
    assert sampler.truncated and sampler.overflow == pytest.approx(stats.binom.sf(8, 20, 0.5))
    took = drawn(sampler, steps)
    assert took.sum(1).max() == 8
    share = np.minimum(np.arange(21), 8) @ stats.binom.pmf(np.arange(21), 20, 0.5) / 20
    assert abs(took.mean(0) - share).max() < 5 * np.sqrt(share * (1 - share) / steps)


def test_groups_take_turns():
    sampler = poisson(10, 2, cycle=3)
    assert sampler.rate == pytest.approx(0.6) and sampler.group == 4 and sampler.size == pytest.approx(2)
    for step in range(30):
        assert (sampler.positions(1, step) % 3 == step % 3).all()
    assert abs(drawn(sampler, 3000).mean() - 0.2) < 0.01


def test_batches_have_one_shape_masks_and_dataset_indices():
    held, sampler = source(), poisson(40, 4)
    taken = list(itertools.islice(batches(sampler, held, 9), 12))
    assert {b["x"].shape for b in taken} == {(sampler.rows, 2, 2, 1)}
    for step, batch in enumerate(taken):
        places = sampler.positions(9, step)
        assert batch["mask"].sum() == len(places) and (batch["index"][~batch["mask"]] == -1).all()
        np.testing.assert_array_equal(batch["index"][batch["mask"]], held.index[places])
        np.testing.assert_array_equal(batch["x"][batch["mask"]], held[places]["x"])


def test_the_stream_goes_on_by_a_number_and_parts_by_processes():
    held, sampler = source(), poisson(40, 4, multiple=2)
    whole = list(itertools.islice(batches(sampler, held, 9, prefetch=0), 6))
    later = list(itertools.islice(batches(sampler, held, 9, start=4), 2))
    np.testing.assert_array_equal(later[1]["index"], whole[5]["index"])
    parts = [next(batches(sampler, held, 9, start=4, process=(i, 2), place=lambda b: b["index"])) for i in (0, 1)]
    np.testing.assert_array_equal(np.concatenate(parts), whole[4]["index"])


def test_an_empty_sample_is_a_batch_of_padding():
    sampler = Poisson(40, 1e-9, 4)
    batch = next(batches(sampler, source(), 1, prefetch=0))
    assert not batch["mask"].any() and batch["x"].shape == (4, 2, 2, 1)


def test_shuffled_batches_pass_over_the_data():
    sampler = Shuffled(12, 4)
    epoch = np.concatenate([sampler.positions(3, t) for t in range(3)])
    assert sorted(epoch) == list(range(12)) and sampler.rows == 4 and sampler.cycle == 1
    assert epoch.tolist() != np.concatenate([sampler.positions(3, t) for t in range(3, 6)]).tolist()


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: poisson(10), "exactly one of size and rate"),
        (lambda: poisson(10, 2, rate=0.2), "exactly one of size and rate"),
        (lambda: poisson(10, 11), "sampling rate must lie"),
        (lambda: poisson(10, 6, cycle=2), "sampling rate must lie"),
        (lambda: poisson(0, 1), "n must be a whole number"),
        (lambda: poisson(10, 2, rows=0), "rows must be a whole number"),
        (lambda: batches(poisson(39, 2), source(), 0), "sampler must be for the 40 examples"),
    ],
)
def test_refusals(call, match):
    with pytest.raises(ValueError, match=match):
        call()
    assert sampling.TAIL < 1e-20
