"""Transfer tables on linear models, whose errors under attack and noise are known in closed form."""

import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial
from scipy import stats

from jaxadv import evaluate
from jaxadv.attacks import fgsm
from jaxadv.evaluate.intervals import clopper_pearson
from jaxadv.evaluate.markdown import table
from jaxadv.evaluate.transfers import SCHEMA, TransferTable, magnified, size, transfer_table
from jaxadv.threats import linf

KEY = jax.random.key(0)
N, D, EPS = 400, 30, 0.05


def linear(w, x):
    return (x - 0.5) @ w


def models(angle):
    """Two-class models with slopes of length one: one, itself again, one turned by an angle, one across."""
    rng = np.random.default_rng(0)
    one, across = np.linalg.qr(rng.normal(size=(D, 2)))[0].T
    slopes = {"one": one, "twin": one, "turned": np.cos(angle) * one + np.sin(angle) * across, "across": across}
    return slopes, {k: Partial(linear, jnp.asarray(np.stack([s, -s], 1) / 2, jnp.float32)) for k, s in slopes.items()}


SLOPES, MODELS = models(0.4)
X = np.random.default_rng(1).uniform(0.3, 0.7, (N, D)).astype(np.float32)
Y = np.where((X - 0.5) @ SLOPES["one"] > 0, 0, 1).astype(np.int32)
NOISE = (0.02, 0.08)


@pytest.fixture(scope="module")
def found():
    return transfer_table(KEY, MODELS, X, Y, fgsm(linf(EPS)), noise=NOISE, data="planted", seed=0)


def test_error_rates_are_those_of_the_closed_form(found):
    sign = np.where(Y == 0, 1, -1)
    want = np.empty((4, 4))
    for i, source in enumerate(SLOPES.values()):
        points = X - EPS * np.sign(source) * sign[:, None]
        for j, victim in enumerate(SLOPES.values()):
            want[i, j] = (((points - 0.5) @ victim) * sign <= 0).mean()
    np.testing.assert_allclose(found.errors(), want, atol=1 / N)
    assert found.errors()[0, 0] > 0.4 and found.errors()[0, 3] < found.errors("clean")[0, 3] + 0.2
    assert found.rows[1]["broken"] == round(want[0, 0] * N)
    for row in found.rows:
        for rate, ends in zip(row["errors"], row["intervals"]):
            assert tuple(ends) == clopper_pearson(round(rate * N), N)


def test_equal_models_are_fooled_alike_and_always(found):
    errors, fooled = found.errors(), found.fooled()
    np.testing.assert_array_equal(errors[0], errors[1])
    np.testing.assert_array_equal(errors[:, 0], errors[:, 1])
    np.testing.assert_array_equal(np.diag(fooled), 1.0)
    assert fooled[0, 1] == 1.0 and fooled[0, 3] < 0.5 < fooled[0, 2]


def test_noise_of_equal_size_does_what_the_normal_law_says(found):
    """The margin moves by a normal number whose deviation is that of one feature."""
    equal, attacked = ([r for r in found.rows if r["kind"] == kind] for kind in ("equal", "attack"))
    for one, two in zip(equal, attacked, strict=True):
        assert one["source"] == two["source"] and one["broken"] == two["broken"] and one["chances"] == two["chances"]
        assert one["size"] == pytest.approx(two["size"], rel=0.05) and two["size"] == pytest.approx(EPS, rel=0.01)
    margin = np.abs((X - 0.5) @ SLOPES["one"])
    for deviation, row in zip(NOISE, [r for r in found.rows if r["kind"] == "noise"], strict=True):
        want = stats.norm.sf(margin / deviation)
        spread = 5 * np.sqrt((want * (1 - want)).sum())
        assert abs(row["fooled"][0] - want.sum()) < spread and row["chances"][0] == N
        assert row["deviation"] == deviation and row["size"] == pytest.approx(deviation, rel=0.02)
    assert found.fooled("equal")[0, 0] < 0.6 * found.fooled()[0, 0]


def test_rows_do_not_depend_on_what_else_is_in_the_table(found):
    some = transfer_table(
        KEY, {"turned": MODELS["turned"]}, X, Y, fgsm(linf(EPS)), victims={"one": MODELS["one"]}, noise=NOISE[1:]
    )
    np.testing.assert_array_equal(some.errors(), found.errors()[2:3, :1])
    np.testing.assert_array_equal(some.fooled("equal"), found.fooled("equal")[2:3, :1])
    assert some.sources == ["turned"] and some.victims == ["one"]
    again = transfer_table(KEY, MODELS, X, Y, fgsm(linf(EPS)), noise=NOISE, data="planted", seed=0)
    assert again == found


def test_magnified_perturbations_have_one_size_and_their_own_direction():
    rng = np.random.default_rng(2)
    points = (X + 0.1 * rng.normal(size=X.shape)).astype(np.float32)
    points[3] = X[3]
    far = magnified(points, X, 0.05, (-9.0, 9.0))
    np.testing.assert_allclose(np.delete(size(far - X), 3), 0.05, rtol=1e-4)
    np.testing.assert_array_equal(far[3], X[3])
    ratio = np.delete((far - X) / np.where(points == X, 1, points - X), 3, axis=0)
    np.testing.assert_allclose(ratio, np.broadcast_to(np.median(ratio, 1, keepdims=True), ratio.shape), rtol=0.02)
    assert magnified(points, X, 5.0, (0.0, 1.0)).max() == 1.0
    two = {"one": MODELS["one"], "across": MODELS["across"]}
    larger = transfer_table(KEY, two, X, Y, fgsm(linf(EPS)), magnify=0.15, noise=(0.08, 0.08))
    kinds = ("attack", "equal", "magnified", "equal magnified")
    plain, equal, far, beside = ([r for r in larger.rows if r["kind"] == kind] for kind in kinds)
    assert [len(r) for r in (plain, equal, far, beside)] == [2] * 4 and larger.attack["magnify"] == 0.15
    np.testing.assert_allclose([r["size"] for r in far + beside], 0.15, rtol=0.02)
    np.testing.assert_allclose([r["size"] for r in plain + equal], EPS, rtol=0.02)
    for one, two in zip(plain, far):
        assert (one["broken"], one["chances"], one["source"]) == (two["broken"], two["chances"], two["source"])
    assert larger.errors("magnified")[0, 0] == 1 > larger.errors()[0, 0] > larger.errors("equal magnified")[0, 0]
    text = larger.markdown()
    assert "| made for across, magnified |" in text and "| noise of the size of those made for one, magnified |" in text
    assert larger.rows[-1]["fooled"] != larger.rows[-2]["fooled"]  # each row of noise is drawn anew


def test_points_that_are_not_allowed_count_as_not_found(kit):
    attack = kit.Planted(linf(EPS), jnp.asarray(MODELS["one"].args[0]), kind="leaves the ball")
    found = transfer_table(KEY, {"one": MODELS["one"]}, X, Y, attack, noise=())
    assert found.rows[1]["size"] == 0 and found.rows[1]["broken"] == 0
    np.testing.assert_array_equal(found.errors(), found.errors("clean"))


def test_json_and_markdown_and_files(found, tmp_path):
    tree = json.loads(found.to_json())
    assert tree["schema"] == SCHEMA and TransferTable(**{k: v for k, v in tree.items() if k != "schema"}) == found
    text = found.markdown()
    assert "| made for turned | 0.0500 |" in text and "planted, 400 examples" in text and "L∞, eps 0.05" in text
    share = found.rows[3]
    assert (
        f"({share['fooled'][0]} of {share['chances'][0]})" in text and "noise of the size of those made for one" in text
    )
    folder = found.save(tmp_path / "table")
    assert (folder / "transfers.md").read_text() == text and (folder / "transfers.json").read_text() == found.to_json()
    assert table(["a|b"], [[1]]) == ["| a\\|b |", "| --- |", "| 1 |", ""]
    assert evaluate.TransferTable is TransferTable and evaluate.transfer_table is transfer_table


def test_bad_input_is_refused():
    attack, one = fgsm(linf(EPS)), {"one": MODELS["one"]}
    usual: dict[str, Any] = {"key": KEY, "sources": one, "x": X, "y": Y, "attack": attack}
    refused: tuple[tuple[dict[str, Any], str], ...] = (
        ({"sources": {}}, "at least one source"),
        ({"noise": (-1.0,)}, "every deviation of noise"),
        ({"magnify": 0.0}, "magnify must be"),
        ({"victims": {"other": Partial(linear, jnp.ones((D, 3)))}}, "2 classes of the first"),
    )
    for change, words in refused:
        with pytest.raises(ValueError, match=words):
            transfer_table(**usual | change)
    with pytest.raises(TypeError, match="attack must be an attack"):
        transfer_table(KEY, one, X, Y, fgsm)
    found = transfer_table(KEY, one, X[:3], 1 - Y[:3], attack, noise=())
    assert np.isnan(found.fooled()).all() and "| - |" in found.markdown()  # no chances, so no rate
    with pytest.raises(ValueError, match="unknown kind of row 'noise'"):
        found.errors("noise")
