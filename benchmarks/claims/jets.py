"""Claim: shifts of jet features that no histogram shows mislead a tagger, and training on such shifts mends it.

There are no jets here; a generator with the traits that the paper's inputs have, and whose truth is known, stands in.
Three classes (light, c, b); sixteen correlated real quantities and four counts. Six quantities and two counts describe
a secondary vertex and are missing where none was found, more often in light jets; missing entries hold one value below
all others. Means, correlations and rates are drawn once, from a fixed seed; jets are drawn anew for each seed.

Attacks are those of the paper, in standardized units: one signed step, and PGD beside it; counts and missing entries
stay as they are. The measure is the area under the ROC curve (AUC) of b against light and of c against b. Shifts of
the same size with random signs are the baseline. The classifier that knows the generator (the ratio of likelihoods) is
attacked in the same way: what it loses is no fault of training. Whether a shift is small is measured, too: by the
largest Kolmogorov-Smirnov distance between a feature's values before and after. The claim falls if the attack costs
little, if random shifts cost as much, or if a histogram would show it; its second half falls if training on attacked
jets costs more on clean ones than it saves.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import Partial
from scipy import stats

import jaxadv as ja
from jaxadv.train import schedules

CLAIM = {
    "sentence": "Shifts of the inputs that are too small to be seen in any feature make a jet tagger much worse, and "
    "training on shifted jets mends it at little loss on clean ones.",
    "source": "Stein et al. 2022, Improving robustness of jet tagging algorithms with adversarial training, "
    "arXiv:2203.13890",
    "tier": "digits",
    "seeds": (0, 1, 2),
    "minutes": 3,
    "settings": {
        "eps": 0.05,
        "attack_steps": 10,
        "widths": (100, 100, 100, 100, 100),
        "train": 30_000,
        "test": 10_000,
        "epochs": 10,
        "batch": 256,
        "rate": 1e-3,
    },
    "smoke": {"attack_steps": 1, "widths": (4,), "train": 64, "test": 60, "epochs": 1, "batch": 16},
}
REAL, COUNTS, VERTEX = 16, 4, 6  # quantities, counts, and the last quantities, which describe a vertex
ABSENT = -9.0  # what stands for a missing quantity or count
MISSING = np.array([0.35, 0.2, 0.05])  # how often light, c and b jets have no vertex
AT_VERTEX = np.r_[np.zeros(REAL - VERTEX, bool), np.ones(VERTEX, bool), np.arange(COUNTS) >= COUNTS // 2]
WHOLE = np.arange(REAL + COUNTS) >= REAL
PAIRS = {"b against light": (2, 0), "c against b": (1, 2)}
"""Name to the class that is looked for, and the one it is to be told from."""


def truth() -> dict[str, np.ndarray]:
    """Return what the generator knows: means `[3, 16]`, covariance `[16, 16]`, rates of the counts `[3, 4]`."""
    rng = np.random.default_rng(0)
    toward, aside = 0.15 * rng.normal(size=(2, REAL))
    factors = rng.normal(size=(REAL, 3))
    covariance = 2 * np.eye(REAL) + factors @ factors.T
    deviations = np.sqrt(np.diag(covariance))
    rates = rng.uniform(1, 4, COUNTS) * np.array([[1.0], [1.2], [1.5]])
    means = np.stack([-toward, aside - 0.2 * toward, toward])
    return {"means": means, "covariance": covariance / np.outer(deviations, deviations), "rates": rates}


def jets(rng: np.random.Generator, n: int, known: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Draw jets in physical units, `[n, 20]`, and their classes."""
    y = rng.integers(0, 3, n)
    real = known["means"][y] + rng.multivariate_normal(np.zeros(REAL), known["covariance"], n)
    values = np.concatenate([real, rng.poisson(known["rates"][y])], axis=1)
    return np.where((rng.uniform(size=n) < MISSING[y])[:, None] & AT_VERTEX, ABSENT, values), y


def likelihoods(known, shift, scale, default, x):
    """The log-likelihood of each class, up to what the classes share: the best that a tagger can do."""
    found = x[:, REAL - 1] != default[REAL - 1]
    values = x * scale + shift
    away = values[:, None, :REAL] - known["means"]
    first = away[..., : REAL - VERTEX]
    whole = jnp.einsum("bki,ij,bkj->bk", away, known["precision"], away)
    part = jnp.einsum("bki,ij,bkj->bk", first, known["precision without vertex"], first)
    counted = values[:, None, REAL:] * jnp.log(known["rates"]) - known["rates"]
    counted = jnp.sum(jnp.where(jnp.asarray(~AT_VERTEX[REAL:]) | found[:, None, None], counted, 0), axis=-1)
    vertex = jnp.where(found[:, None], jnp.log1p(-jnp.asarray(MISSING)), jnp.log(jnp.asarray(MISSING)))
    return counted + vertex - jnp.where(found[:, None], whole, part) / 2


def best_tagger(known: dict[str, np.ndarray], shift, scale, default) -> Partial:
    """Return the model of the likelihoods for jets in standardized units."""
    known = known | {
        "precision": np.linalg.inv(known["covariance"]),
        "precision without vertex": np.linalg.inv(known["covariance"][: REAL - VERTEX, : REAL - VERTEX]),
    }
    arrays = (known, shift, scale, np.nan_to_num(default))
    return Partial(likelihoods, *jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), arrays))


def area(logits: np.ndarray, y: np.ndarray, pair: tuple[int, int]) -> float:
    """Return the area under the ROC curve of one class against another, in percent (Mann and Whitney)."""
    wanted, other = pair
    score = logits[:, wanted] - logits[:, other]
    ranks = stats.rankdata(np.concatenate([score[y == wanted], score[y == other]]))
    n, m = np.sum(y == wanted), np.sum(y == other)
    return 100 * float((ranks[:n].sum() - n * (n + 1) / 2) / (n * m))


def distance(a: np.ndarray, b: np.ndarray) -> float:
    """Return the largest difference of two empirical distribution functions (Kolmogorov and Smirnov)."""
    at = np.sort(np.concatenate([a, b]))
    shares = (np.searchsorted(np.sort(v), at, side="right") / len(v) for v in (a, b))
    return float(np.max(np.abs(np.subtract(*shares))))


def run(settings: dict[str, Any], seeds: tuple[int, ...], smoke: bool) -> dict[str, list[float]]:
    """Draw, train, attack; AUC in percent."""
    known, eps, batch = truth(), settings["eps"], settings["batch"]
    numbers: dict[str, list[float]] = {}

    def note(measure, value):
        numbers.setdefault(measure, []).append(float(value))

    for seed in seeds:
        rng = np.random.default_rng(1000 + seed)
        (values, labels), (shown, y) = (jets(rng, settings[split], known) for split in ("train", "test"))
        seen = np.where(values == ABSENT, np.nan, values)
        shift, scale = np.nanmean(seen, 0), np.nanstd(seen, 0)
        default = np.where(AT_VERTEX, ((ABSENT - shift) / scale).astype(np.float32), np.nan)
        x, clean = (((v - shift) / scale).astype(np.float32) for v in (values, shown))
        bounds = (-50.0, 50.0)
        threat = ja.threats.tabular(ja.linf(eps, bounds), whole=WHOLE, default=default)
        data = ja.data.arrays(x, labels.astype(np.int32), name="jets", classes=3, bounds=bounds)
        steps = 1 if smoke else settings["epochs"] * ja.data.steps_per_epoch(len(x), batch)
        optimizer = optax.adam(schedules.triangular(settings["rate"], steps, peak=0.2))
        start = ja.models.create("mlp", jax.random.key(seed), shape=(x.shape[1],), classes=3, widths=settings["widths"])
        models = {"likelihoods": best_tagger(known, shift, scale, default)}
        for arm, objective in {"network": ja.train.standard(), "trained on shifts": ja.train.fgsm_at(threat)}.items():
            state = ja.fit(jax.random.key(seed), start, objective, optimizer, data, steps=steps, batch_size=batch)
            models[arm] = ja.models.model(ja.train.trained(start, state))

        cross_entropy = ja.losses.minus_cross_entropy
        attacks = {
            "one step": ja.fgsm(threat, keep="last"),
            "PGD": ja.pgd(threat, steps=settings["attack_steps"], criterion=cross_entropy),
        }
        go = jax.jit(lambda attack, key, model, x, y: attack.run(key, model, x, y).x)
        ask = jax.jit(lambda model, x: model(x))
        moves = eps * rng.choice([-1.0, 1.0], clean.shape).astype(np.float32)
        random = np.asarray(jax.jit(threat.project)(clean + moves, clean))
        for arm, model in models.items():
            points = {"clean": clean, "random shift": random}
            for name, attack in attacks.items():
                points[name] = np.asarray(go(attack, jax.random.key(seed), model, clean, y.astype(np.int32)))
            for name, point in points.items():
                logits = np.asarray(ask(model, point))
                for pair, classes in PAIRS.items():
                    note(f"{arm}, {name}: {pair}, AUC %", area(logits, y, classes))
            if arm == "network":
                seen = [distance(a[a != d], b[a != d]) for a, b, d in zip(clean.T, points["PGD"].T, default)]
                still = WHOLE | (clean == default)
                note("largest distance of a feature's distributions, %", 100 * max(seen))
                note("moved entries that are counts or missing", np.sum((points["PGD"] != clean) & still))
    return numbers


def verdict(numbers: dict[str, list[float]]) -> tuple[str, str]:
    """Judge PGD on b against light: a point or more, five times a random shift, unseen; half mended for half a point.

    The shift hurts if it costs the network an AUC of a point or more and five times what a random one costs, in each
    seed, at a distance of distributions below 5 %. It is mended if training on shifts takes away half of that cost or
    more and costs half a point or less on clean jets, in the mean.
    """

    def of(arm, name):
        return np.asarray(numbers[f"{arm}, {name}: b against light, AUC %"])

    lost = {arm: of(arm, "clean") - of(arm, "PGD") for arm in ("likelihoods", "network", "trained on shifts")}
    luck = of("network", "clean") - of("network", "random shift")
    seen = float(np.max(numbers["largest distance of a feature's distributions, %"]))
    hurts = bool(np.all(lost["network"] >= 1) and np.all(lost["network"] >= 5 * luck) and seen < 5)
    price = float(np.mean(of("network", "clean") - of("trained on shifts", "clean")))
    mended = bool(lost["trained on shifts"].mean() <= lost["network"].mean() / 2 and price <= 0.5)
    word = "holds" if hurts and mended else "holds in part" if hurts else "does not hold here"
    return word, (
        f"PGD costs the network {lost['network'].mean():.1f} points of the AUC of b against light "
        f"({of('network', 'clean').mean():.1f} %), a random shift {luck.mean():.2f}; features' distributions differ by "
        f"{seen:.1f} % at most; trained on shifts it loses {lost['trained on shifts'].mean():.1f}, and "
        f"{price:.2f} on clean jets; the ratio of likelihoods ({of('likelihoods', 'clean').mean():.1f} %) loses "
        f"{lost['likelihoods'].mean():.1f}"
    )
