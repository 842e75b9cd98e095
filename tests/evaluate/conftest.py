"""Problems with known answers and attacks that misbehave, handed out as the fixture `kit`."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

from jaxadv import core, evaluate, threats


def affine(w, b, x):
    return x.reshape(x.shape[0], -1) @ w + b[None]


def linear(n=300, d=6, seed=0, wrong=20):
    """A two-class linear model far from the bounds, its examples, and the exact l_inf distance of each to the boundary.

    `wrong` examples carry the other label (distance 0). Distances keep clear of the budgets 0.01, 0.02, 0.04.
    """
    rng = np.random.default_rng(seed)
    w = rng.normal(size=(d, 2)).astype(np.float32)
    b = -(w.sum(0) * 0.5).astype(np.float32)
    x = rng.uniform(0.3, 0.7, size=(4 * n, d)).astype(np.float32)
    z = x.astype(np.float64) @ w + b
    y = z.argmax(-1).astype(np.int32)
    slope = np.abs(w[:, 1].astype(np.float64) - w[:, 0]).sum()
    far = np.abs(z[:, 1] - z[:, 0]) / slope
    clear = np.flatnonzero(np.min([np.abs(far - e) for e in (0.0, 0.01, 0.02, 0.04)], axis=0) > 1e-4)[:n]
    x, y, far = x[clear], y[clear], far[clear]
    y[:wrong], far[:wrong] = 1 - y[:wrong], 0.0
    return SimpleNamespace(model=Partial(affine, w, b), x=x, y=y, far=far, w=w, b=b)


@core.pytree
class Planted(core.Attack):
    """An attack that misbehaves in a stated way."""

    threat: core.Threat
    w: jax.Array
    name: str = core.static(default="planted")
    kind: str = core.static(default="honest")
    max_steps: int = core.static(default=1)
    early: bool = core.static(default=False)

    def init(self, keys, model, x, y):
        lucky = jax.vmap(lambda k: jax.random.bernoulli(k, 0.3))(keys)
        return x, jnp.zeros(x.shape[:1], jnp.int32), lucky

    def step(self, state, model, x, y):
        return state[0], state[1] + 1, state[2]

    def done(self, state):
        return state[1] >= 1

    def result(self, state, model, x, y):
        toward = jnp.sign(self.w[:, 1] - self.w[:, 0])[None] * (1 - 2 * core.label_of(y)[:, None])
        claim = jnp.ones(x.shape[:1], bool)
        if self.kind == "leaves the ball":
            point = jnp.clip(x + 20 * self.threat.eps * toward, 0, 1)
        elif self.kind == "leaves the box":
            point = x.at[:, 0].set(1.0 + 1e-3)
        elif self.kind == "returns NaN":
            point = jnp.full_like(x, jnp.nan)
        elif self.kind == "lies":
            point = x
        elif self.kind == "finds nothing":
            point, claim = x, ~claim
        elif self.kind == "is lucky":
            best = self.threat.project(x + self.threat.eps * toward, x)
            point = jnp.where(state[2][:, None], best, x)
            claim = ~core.robust(model(point), y)
        else:
            point = self.threat.project(x + self.threat.eps * toward, x)
            claim = ~core.robust(model(point), y)
        none = jnp.zeros(x.shape[:1], bool)
        count = jnp.ones(x.shape[:1], jnp.int32)
        flags = {"nonfinite": none, "zero_gradient": none, "infeasible": none}
        size = jnp.zeros(x.shape[:1])
        return core.Result(point, size, claim, size, count, count, flags)


def image_report(names=("plain", "twin"), n=30, **settings):
    """A report about small images, with pictures and a curve."""
    rng = np.random.default_rng(1)
    x = rng.uniform(0.2, 0.8, size=(n, 5, 4, 1)).astype(np.float32)
    found = []
    for i, name in enumerate(names):
        w = np.random.default_rng(7 + i).normal(size=(20, 3)).astype(np.float32)
        model = Partial(affine, w, -(0.5 * w.sum(0)))
        y = np.asarray(Partial(affine, *found[0].parts)(x) if found else model(x)).argmax(-1).astype(np.int32)
        report = evaluate(
            jax.random.key(0), model, x, y, threats.linf(8 / 255), name=name, attacks="quick", eps_curve=(0.01, 0.1),
            data={"name": "noise", "split": "test"}, seed=0, batch_size=16, **settings,
        )  # fmt: skip
        found.append(SimpleNamespace(report=report, parts=(w, -(0.5 * w.sum(0)))))
    return evaluate.merge(*(f.report for f in found))


@pytest.fixture(scope="session")
def pictures():
    """One report about two models on small images; shared, never changed."""
    return image_report()


@pytest.fixture(scope="session")
def kit():
    """The builders of this file."""
    return SimpleNamespace(affine=affine, linear=linear, Planted=Planted, image_report=image_report)
