"""The loop: what it returns, records, judges and refuses; one compilation; collapse; interruption."""

import json
import multiprocessing
import signal
import sys
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxadv import attacks, data, parallel, threats, train
from jaxadv.train import driver, trainer


def arguments(kit, **more):
    threat = threats.linf(0.1)
    source = kit.blobs(96)
    given = dict(
        trainable=kit.mlp(),
        objective=train.standard(),
        optimizer=optax.sgd(0.1),
        data=source,
        steps=12,
        batch_size=16,
        attack=attacks.pgd(threat, steps=2),
        validation=kit.blobs(40, seed=1),
        log_every=5,
    )
    return given | more


def by_event(lines, event):
    return [line for line in lines if line["event"] == event]


def test_fit_is_its_step_in_a_loop(kit, key):
    """The order of the data, the keys and the means in the report, repeated by hand."""
    lines = []
    given = arguments(kit, attack=None, validation=None, objective=train.fgsm_rs(threats.linf(0.1)))
    got = train.fit(key, **given, callbacks=[lambda step, state, line: lines.append(line)])

    step = jax.jit(train.make_step(given["trainable"].apply, given["objective"], given["optimizer"]))
    state = trainer.init(key, given["trainable"], given["optimizer"])
    seed = int(jax.random.bits(trainer.purpose(key, "order"), dtype=jnp.uint32))
    losses = []
    for batch, _ in zip(data.batches(given["data"], 16, seed=seed), range(12)):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    assert kit.same_bits(got, state) and int(got.step) == 12
    assert [line["step"] for line in lines] == [5, 10, 12]
    np.testing.assert_allclose(
        [line["loss"] for line in lines], [np.mean(losses[a:b]) for a, b in [(0, 5), (5, 10), (10, 12)]]
    )
    again = train.fit(jax.random.key(1), **given)
    assert not kit.same_bits(got.params, again.params)


def test_the_step_is_compiled_once(kit, key):
    traces = []

    def counted(apply, params, state, batch, key):
        traces.append(1)
        return train.standard()(apply, params, state, batch, key)

    train.fit(key, **arguments(kit, objective=counted, steps=20, attack=None, validation=None))
    assert len(traces) == 1


def test_a_slow_reader_is_told_from_a_slow_step(kit, key, monkeypatch):
    """The report says how long the loop waited for rows; the weights do not depend on it."""
    given, lines = arguments(kit, attack=None, validation=None, log_every=6), []
    fast = train.fit(key, **given)
    read = data.Source.__getitem__

    def slow(self, rows):
        time.sleep(0.1)
        return read(self, rows)

    monkeypatch.setattr(data.Source, "__getitem__", slow)
    late = train.fit(key, **given, callbacks=[lambda step, state, line: lines.append(line)])
    assert kit.same_bits(late, fast)
    last = lines[-1]  # six steps of nothing but waiting, up to what was read ahead
    assert 0.2 < last["waiting"] <= last["seconds"] and last["waiting"] > 0.5 * last["seconds"]


def test_a_rematerialized_network_learns_the_same(kit, key):
    given = arguments(kit, steps=3, trainable=kit.mlp("batch"), attack=None, validation=None)
    once, again = train.fit(key, **given), train.fit(key, **given, remat=True)
    for a, b in zip(kit.leaves(once), kit.leaves(again), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_the_network_that_was_given_stays_alive(kit, key):
    given = arguments(kit, ema=0.9)
    before = kit.leaves(given["trainable"].params)
    train.fit(key, **given)
    for a, b in zip(before, kit.leaves(given["trainable"].params)):
        np.testing.assert_array_equal(a, b)


def test_validation_judges_fixed_examples_and_the_best_weights_come_back(kit, key):
    lines, kept = [], {}

    def watch(step, state, line):
        lines.append(line)
        kept[step] = parallel.replicate(state)

    given = arguments(kit, keep="best", validate_every=3, optimizer=optax.sgd(3.0), ema=0.5, batch_size=16)
    got = train.fit(key, **given, callbacks=[watch])
    found = by_event(lines, "validation")
    assert [line["step"] for line in found] == [3, 6, 9, 12]
    best = max(found, key=lambda line: (line["robust"], -line["step"]))
    assert int(got.step) == best["step"] and [line["step"] for line in found if line["best"]][-1] == best["step"]
    for line in found:  # the average is what is judged, with all 40 examples counted once
        state, (x, y) = kept[line["step"]], given["validation"].all()
        logits = given["trainable"].apply(state.ema, state.state, x)[0]
        assert line["clean"] == pytest.approx(np.mean(np.argmax(logits, -1) == y)) and line["robust"] <= line["clean"]


def test_best_is_the_first_of_the_most_robust_not_of_the_most_accurate(kit, key, monkeypatch):
    planted = iter([(0.7, 0.2), (0.8, 0.5), (0.9, 0.5), (1.0, 0.1)])
    monkeypatch.setattr(driver._Loop, "_judge", lambda *a, **k: dict(zip(("clean", "robust"), next(planted))))
    got = train.fit(key, **arguments(kit, keep="best", validate_every=3))
    assert int(got.step) == 6


@pytest.mark.parametrize(("action", "ends_at"), [("stop", 6), ("warn", 12), ("restore", 12)])
def test_a_collapse_is_recorded_and_answered(kit, key, monkeypatch, action, ends_at):
    """The verdicts are planted: .9, then .1 at step 6; whatever the weights are."""
    planted = iter([0.9, 0.1, 0.85, 0.9])
    monkeypatch.setattr(driver._Loop, "_judge", lambda *a, **k: {"clean": 1.0, "robust": next(planted)})
    states, lines = {}, []

    def watch(step, state, line):
        lines.append(line)
        states.setdefault(step, parallel.replicate(state))

    collapse = train.Collapse(attacks.pgd(threats.linf(0.1), steps=1), every=3, action=action)
    got = train.fit(
        key, **arguments(kit, attack=None, validation=None, log_every=1, collapse=collapse), callbacks=[watch]
    )
    assert lines[-1]["step"] == ends_at
    assert [line["collapsed"] for line in by_event(lines, "check")][:2] == [False, True]
    fell = by_event(lines, "collapse")
    if action == "warn":
        assert fell == [] and int(got.step) == 12
        return
    assert [(line["step"], line["before"], line["robust"]) for line in fell] == [(6, 0.9, 0.1)]
    if action == "stop":
        assert kit.same_bits(got, states[3])
    else:  # step 7 starts from the weights of step 3
        assert int(got.step) == 12
        seed = int(jax.random.bits(trainer.purpose(key, "order"), dtype=jnp.uint32))
        batch = next(data.batches(kit.blobs(96), 16, seed=seed, start=6))
        step = jax.jit(train.make_step(kit.mlp().apply, train.standard(), optax.sgd(0.1)))
        assert kit.same_bits(step(states[3]._replace(step=jnp.int32(6)), batch)[0].params, states[7].params)


def test_a_loss_that_is_not_finite_is_an_error_that_names_the_step(kit, key):
    with pytest.raises(FloatingPointError, match="at step [0-9]+ it became (nan|inf).*Lower the learning rate"):
        train.fit(key, **arguments(kit, optimizer=optax.sgd(1e30), attack=None, validation=None))


def test_ctrl_c_saves_and_says_where(kit, key, tmp_path):
    def press(step, state, line):
        if step == 5:
            signal.raise_signal(signal.SIGINT)

    given = arguments(kit)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(train.Interrupted, match="interrupted at step 5.*resume=True") as caught:
        train.fit(key, **given, checkpoint=tmp_path / "run", callbacks=[press])
    assert caught.value.step == 5 and caught.value.folder == tmp_path / "run"
    assert signal.getsignal(signal.SIGINT) is before
    resumed = train.fit(key, **given, checkpoint=tmp_path / "run", resume=True)
    whole = train.fit(key, **given, checkpoint=tmp_path / "whole")
    assert kit.same_bits(resumed, whole)
    files = [train.read_metrics(tmp_path / name / "metrics.jsonl") for name in ("run", "whole")]
    assert kit.quiet(files[0]) == kit.quiet(files[1])


def test_an_interrupt_of_a_callback_or_without_a_folder(kit, key, tmp_path):
    def press(step, state, line):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train.fit(key, **arguments(kit, callbacks=[press]))
    with pytest.raises(train.Interrupted, match="step 1 "):
        train.fit(key, **arguments(kit, validate_every=1, callbacks=[press]), checkpoint=tmp_path)


def test_training_works_in_another_thread(kit, key, tmp_path):
    box = []
    thread = threading.Thread(target=lambda: box.append(train.fit(key, **arguments(kit), checkpoint=tmp_path / "t")))
    thread.start()
    thread.join()
    assert kit.same_bits(box[0], train.fit(key, **arguments(kit)))


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"steps": 0}, ValueError, "steps must be a whole number of at least 1"),
        ({"batch_size": 97}, ValueError, "batch_size must be at most the 96 training examples; got 97"),
        ({"attack": None}, ValueError, "got no attack. Pass attack="),
        ({"validation": None}, ValueError, "got no validation. Pass validation="),
        ({"validation": None, "attack": None, "keep": "best"}, ValueError, "keep='best' needs validation"),
        ({"keep": "beast"}, ValueError, "Did you mean 'best'"),
        ({"precision": "bf16"}, ValueError, "Known: bfloat16, float32"),
        ({"how": "jot"}, ValueError, "Did you mean 'jit'"),
        ({"save_every": 0}, ValueError, "save_every must be a whole number"),
        ({"data": []}, ValueError, "data must hold at least one example"),
    ],
)
def test_impossible_settings_are_refused_before_anything_runs(kit, key, change, error, words):
    with pytest.raises(error, match=words):
        train.fit(key, **arguments(kit, **change))


def test_a_bad_collapse_is_refused(kit, key):
    attack = attacks.pgd(threats.linf(0.1), steps=1)
    for collapse, words in [
        (train.Collapse(attack, every=0), "collapse.every"),
        (train.Collapse(attack, every=1, action="stpo"), "Did you mean 'stop'"),
        (train.Collapse(attack, every=1, threshold=0.0), "collapse.threshold"),
    ]:
        with pytest.raises(ValueError, match=words):
            train.fit(key, **arguments(kit, collapse=collapse))


def test_metrics_are_lines_of_json(kit, key, tmp_path):
    train.fit(key, **arguments(kit), checkpoint=tmp_path)
    text = (tmp_path / "metrics.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    assert lines == train.read_metrics(tmp_path / "metrics.jsonl") and {line["event"] for line in lines} == {
        "train",
        "validation",
    }


@pytest.mark.slow
def test_a_worker_that_is_killed_ends_training_with_a_word_and_resuming_gives_the_same_bits(kit, key, tmp_path):
    given = arguments(kit, attack=None, validation=None, steps=40, save_every=2)  # more than are read ahead

    def kill(step, state, line):
        for worker in multiprocessing.active_children():
            worker.kill()
            worker.join()

    with pytest.raises(RuntimeError, match="Worker process was terminated unexpectedly with exit code -9"):
        train.fit(key, **given, checkpoint=tmp_path, workers=2, callbacks=[kill])
    assert not multiprocessing.active_children()
    resumed = train.fit(key, **given, checkpoint=tmp_path, workers=1, resume=True)
    assert kit.same_bits(resumed, train.fit(key, **given))


def test_workers_without_grain_are_refused_before_anything_is_written(kit, key, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "grain", None)
    with pytest.raises(ImportError, match=r"workers=2 needs the package grain.*pip install 'jaxadv\[grain\]'"):
        train.fit(key, **arguments(kit, workers=2), checkpoint=tmp_path / "run")
    assert not (tmp_path / "run").exists()
