"""The metrics file and the description of settings."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxadv import attacks, threats, train
from jaxadv.train import record, schedules


def test_lines_of_later_steps_are_dropped_and_a_cut_line_is_forgotten(tmp_path):
    path = tmp_path / "m.jsonl"
    log = record.Metrics(path)
    for step in range(1, 6):
        log.write({"step": step, "loss": np.float32(0.5), "bad": float("nan"), "n": jnp.int32(3)})
    log.close()
    with open(path, "a") as file:
        file.write('{"step": 2, "lo')
    log = record.Metrics(path, 3)
    log.write({"step": 4, "loss": 1})
    log.close()
    lines = train.read_metrics(path)
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert lines[0] == {"step": 1, "loss": 0.5, "bad": None, "n": 3} and lines[-1] == {"step": 4, "loss": 1}
    record.Metrics(None).write({"step": 1})  # no file: nothing happens


def test_equal_settings_have_equal_descriptions_and_no_addresses():
    def settings(eps=0.1, rate=0.01, peak=0.4):
        attack = attacks.pgd(threats.linf(eps), steps=3)
        optimizer = optax.chain(optax.add_decayed_weights(1e-4), optax.adam(schedules.triangular(rate, 10, peak=peak)))
        return record.describe({"objective": train.pgd_at(attack), "optimizer": optimizer, "augment": train.crop(4)})

    assert settings() == settings() and "0x" not in json.dumps(settings())
    assert record.differences(settings(), settings()) == []
    assert any("eps" in line and "0.1 -> 0.2" in line for line in record.differences(settings(), settings(eps=0.2)))
    assert record.differences(settings(), settings(rate=0.02)) and record.differences(settings(), settings(peak=0.5))


def test_arrays_keys_and_odd_values_are_described_by_content():
    one = record.describe({"a": np.arange(3), "k": jax.random.key(1), "f": functools.partial(max, 3), "none": None})
    two = record.describe({"a": np.arange(3) + 1, "k": jax.random.key(2), "f": functools.partial(max, 3), "none": None})
    assert sorted(line.split(":")[0] for line in record.differences(one, two)) == ["a", "k"]
    knot: list = []
    knot.append(knot)
    assert record.describe({"knot": knot})["knot.0"] == "list"
    many = record.differences({str(i): 0 for i in range(9)}, {str(i): 1 for i in range(9)})
    assert len(many) == 7 and many[-1] == "and 3 more"
    assert record.plain({"x": np.float64("inf"), 3: (1, [np.int8(2)])}) == {"x": None, "3": [1, [2]]}
