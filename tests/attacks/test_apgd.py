"""AutoPGD against the official code step for step, closed forms on linear models, and what its docstring promises."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P
from jax.tree_util import Partial

from jaxadv import core, losses
from jaxadv.attacks import APGD, ATTACKS, apgd, apgd_ce, apgd_dlr, apgd_t
from jaxadv.attacks.apgd import dlr_or_margin, dlr_targeted_or_margin, largest_where, plan
from jaxadv.core import Targets
from jaxadv.threats import l0, l1, l2, linf, union

KEY = jax.random.key(0)
BALLS = {"linf": linf, "l2": l2, "l1": l1}
DUAL = {"linf": 1, "l2": 2, "l1": np.inf}
FIXTURE = Path(__file__).parents[1] / "fixtures" / "apgd_torch.npz"


@jax.jit
def go(attack, model, x, y):
    return attack.run(KEY, model, x, y)


def linear(w, x):
    return x.reshape(x.shape[0], -1) @ w


def problem(seed=0, n=12, b=16, low=0.4, high=0.6, classes=2):
    rng = np.random.default_rng(seed)
    w = rng.normal(size=(n, classes)).astype(np.float32)
    x = rng.uniform(low, high, (b, n)).astype(np.float32)
    return Partial(linear, jnp.asarray(w)), x, (x @ w).argmax(-1).astype(np.int32), w


def net(seed=1, n=16, k=5, rows=24, scale=2.0):
    rng = np.random.default_rng(seed)
    params = [jnp.asarray(rng.normal(size=s) / np.sqrt(s[0]) * scale, jnp.float32) for s in ((n, 20), (20, k))]
    x = jnp.asarray(rng.uniform(0.1, 0.9, (rows, n)), jnp.float32)
    return Partial(tanh, params), x, jnp.argmax(tanh(params, x), -1).astype(jnp.int32)


def tanh(params, x):
    return jnp.tanh(x @ params[0]) @ params[1]


# ----------------------------------------------------------------------------------------------------- official, by step


def cnn(params, x):
    """The fixture's network, channels-last."""
    for i in ("0", "2"):
        kernel = jnp.transpose(params[f"{i}.weight"], (2, 3, 1, 0))
        x = lax.conv_general_dilated(x, kernel, (2, 2), [(1, 1), (1, 1)], dimension_numbers=("NHWC", "HWIO", "NHWC"))
        x = jax.nn.relu(x + params[f"{i}.bias"][None, None, None])
    x = jnp.transpose(x, (0, 3, 1, 2)).reshape(x.shape[0], -1)
    x = jax.nn.relu(x @ params["5.weight"].T + params["5.bias"][None])
    return x @ params["7.weight"].T + params["7.bias"][None]


def follow(monkeypatch, attack, start, params, x, y):
    """Every point that the attack asks, from a given start, and the states between."""
    monkeypatch.setattr(APGD, "_start", lambda self, keys, threat, eps, x: start)
    monkeypatch.setattr(APGD, "_remember", lambda self, state, point, *verdict: state._replace(found=point))
    model = Partial(cnn, params)
    state = attack.init(core.example_keys(KEY, attack.name, jnp.arange(len(y))), model, x, y)
    step = jax.jit(lambda s: attack.step(s, model, x, y))
    states = []
    for _ in range(attack.max_steps):
        state = step(state)
        states.append(jax.device_get(state._replace(keys=state.step)))
    return np.stack([s.found for s in states]), states


RUNS = {
    "linf_ce": lambda eps, **s: apgd_ce(linf(eps[0]), **s),
    "l2_ce": lambda eps, **s: apgd_ce(l2(eps[1]), **s),
    "l1_ce": lambda eps, **s: apgd_ce(l1(eps[2]), **s),
    "linf_t": lambda eps, **s: apgd_t(linf(eps[0]), targets=1, **s),
    "l1_ce_large": lambda eps, **s: apgd_ce(l1(eps[2]), large_eps=True, **s),
}


@pytest.mark.parametrize("name", RUNS)
def test_every_iterate_is_the_official_one(monkeypatch, name):
    stored = np.load(FIXTURE)
    with jax.enable_x64(True):
        params = {k[2:]: jnp.asarray(stored[k], jnp.float64) for k in stored if k.startswith("w.")}
        x, y = jnp.asarray(stored["x"], jnp.float64), jnp.asarray(stored["y"])
        start = jnp.asarray(stored[f"{name}/start"])
        attack = RUNS[name](stored["eps"].tolist(), steps=int(stored["steps"]), compat="official", early=False)
        asked, states = follow(monkeypatch, attack, start, params, x, y)
        assert len(asked) == len(stored[f"{name}/loss"]) == attack.max_steps
        got = losses.cross_entropy(cnn(params, jnp.asarray(asked.reshape(-1, 8, 8, 1))), jnp.tile(y, len(asked)))
    np.testing.assert_allclose(asked[stored[f"{name}/at"]], stored[f"{name}/path"], atol=1e-5)
    np.testing.assert_allclose(states[-1].best, stored[f"{name}/best"], atol=1e-5)
    if not name.endswith("_t"):
        np.testing.assert_allclose(got.reshape(len(asked), -1), stored[f"{name}/loss"], atol=1e-4)
    lengths = np.stack([s.length for s in states])
    assert len(np.unique(lengths)) > 2  # the schedule was at work
