"""Claim (its half about attacks): deep denoisers are fragile.

MNIST with Gaussian noise. A residual convolutional denoiser is trained blind, on noise of any deviation up to a bound,
as DnCNN is. At a fixed deviation it is shown: the noise itself; noise of less deviation with ObsAtk's perturbation on
top, which has no mean and brings the deviation back to the first; and the same with a random perturbation that has no
mean and the same size. The control is a linear filter, the best 5 x 5 one in the least squares, attacked itself in the
same way: what it loses to its attacker is what any denoiser loses. The claim falls if an attacked image is denoised
about as well as a randomly perturbed one, and in part if the filter is as fragile. What the filter makes of the images
that were made for the network says whether they are spoiled or the network is fooled. The claim's other half, that
hybrid adversarial training mends it, is not judged here.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.tree_util import Partial

import jaxadv as ja
from jaxadv.train import schedules

CLAIM = {
    "sentence": "Deep denoisers are fragile: a small perturbation without a mean, found by gradients, costs far more "
    "quality than a random one of its size.",
    "source": "Yan, Zhang, Feng, Sugiyama and Tan 2022, Towards adversarially robust deep image denoising, sec. 3, "
    "arXiv:2201.04397",
    "tier": "mnist",
    "seeds": (0, 1, 2),
    "minutes": 6,
    "settings": {
        "data": "mnist",
        "train": 2000,
        "sigma": 25,
        "rho": 5,
        "sigma_max": 50,
        "attack_steps": 5,
        "depth": 5,
        "width": 16,
        "steps": 600,
        "batch": 32,
        "rate": 3e-3,
        "test": 200,
    },
    "smoke": {"data": "digits", "train": 100, "attack_steps": 1, "depth": 2, "width": 2, "steps": 1, "test": 10},
}
SIDE = 5
"""Of the linear filter."""
FITTED = 300
"""Training images that its 26 numbers are fitted on."""


def convolved(x, kernel):
    """Correlate images `[b, h, w, c]` with a kernel, zeros around."""
    return lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def denoised(params, x):
    """Subtract what a plain convolutional network takes for noise."""
    noise = x
    for number, (kernel, bias) in enumerate(params):
        noise = convolved(noise, kernel) + bias
        noise = jax.nn.relu(noise) if number < len(params) - 1 else noise
    return x - noise


def filtered(kernel, x):
    """Let a linear filter and a constant answer; the constant is the last entry of the kernel."""
    return convolved(x, kernel[:-1].reshape(SIDE, SIDE, 1, 1)) + kernel[-1]


def network(key, depth: int, width: int) -> ja.core.Trainable:
    """Return a denoiser of some 3 x 3 convolutions with fresh weights."""
    sizes = [1, *[width] * (depth - 1), 1]
    keys = jax.random.split(key, depth)
    scales = [np.sqrt(2 / (9 * a)) for a in sizes[:-1]]
    kernels = [s * jax.random.normal(k, (3, 3, a, b)) for k, s, a, b in zip(keys, scales, sizes, sizes[1:])]
    params = [(kernel, jnp.zeros(kernel.shape[-1])) for kernel in kernels]
    return ja.core.Trainable(lambda params, state, x, **_: (denoised(params, x), state), params, {})


def restoring(apply, params, state, batch, key, *, most):
    """Squared error of what is made of images with noise, the deviation of each drawn up to `most`."""

    def noisy(key, x):
        first, second = jax.random.split(key)
        return x + jax.random.uniform(first, maxval=most) * jax.random.normal(second, x.shape)

    x = batch["x"]
    given = jnp.clip(jax.vmap(noisy)(ja.core.example_keys(key, "noise", batch["index"]), x), 0, 1)
    made, state = apply(params, state, given)
    return jnp.sum((made - x) ** 2, (1, 2, 3)), (state, {})


def best_filter(given: np.ndarray, clean: np.ndarray) -> np.ndarray:
    """Return the linear filter with the least squared error, `[SIDE^2 + 1]`."""
    around = np.pad(given[..., 0], ((0, 0), *[(SIDE // 2, SIDE // 2)] * 2))
    windows = np.lib.stride_tricks.sliding_window_view(around, (SIDE, SIDE), (1, 2)).reshape(-1, SIDE**2)
    windows = np.concatenate([windows, np.ones((len(windows), 1))], axis=1)
    return np.linalg.lstsq(windows, clean.reshape(-1), rcond=None)[0].astype(np.float32)


def run(settings: dict[str, Any], seeds: tuple[int, ...], smoke: bool) -> dict[str, list[float]]:
    """Train, attack and denoise; mean peak signal-to-noise ratio over the test images, in dB."""
    sigma, rho = (settings[name] / 255 for name in ("sigma", "rho"))
    train, test = (
        ja.data.evaluation_subset(ja.data.load(settings["data"], split), settings[split]) for split in ("train", "test")
    )
    x, clean = train.all()[0], test.all()[0]
    threat = ja.threats.zero_mean(rho * float(np.sqrt(clean[0].size)))
    attack = ja.attacks.obs_atk(threat, steps=settings["attack_steps"])
    objective = Partial(restoring, most=settings["sigma_max"] / 255)
    steps, batch = settings["steps"], settings["batch"]
    optimizer = optax.adam(schedules.triangular(settings["rate"], steps, peak=0.2))
    ask = jax.jit(lambda model, given: model(given))
    go = jax.jit(lambda key, model, given: attack.run(key, ja.attacks.flattened(model), given, clean).x)
    onto = jax.jit(threat.project)
    numbers: dict[str, list[float]] = {}
    for seed in seeds:
        rng = np.random.default_rng(seed)
        drawn = rng.normal(size=clean.shape).astype(np.float32)
        full, less = (np.clip(clean + deviation * drawn, 0, 1) for deviation in (sigma, sigma - rho))
        start = network(jax.random.key(seed), settings["depth"], settings["width"])
        state = ja.fit(jax.random.key(seed), start, objective, optimizer, train, steps=steps, batch_size=batch)
        few = x[:FITTED]
        seen = np.clip(few + (sigma - rho) * rng.normal(size=few.shape), 0, 1)
        models = {"network": Partial(denoised, state.params), "filter": Partial(filtered, best_filter(seen, few))}
        shown = {"noise": full, "less noise": less, "random": onto(less + 2 * rho * rng.normal(size=less.shape), less)}
        shown |= {f"attack on the {name}": go(jax.random.key(seed), model, less) for name, model in models.items()}
        for name, model in models.items():
            made = {what: np.asarray(ask(model, np.asarray(given, np.float32))) for what, given in shown.items()}
            for what, image in made.items():
                numbers.setdefault(f"{name}: {what}, dB", []).append(_quality(image, clean))
            for what in ("random", f"attack on the {name}"):
                gain = _far(made[what], made["less noise"]) / _far(shown[what], less)
                numbers.setdefault(f"{name}: moved by {what}, by its size", []).append(float(gain.mean()))
        numbers.setdefault("without denoising: noise, dB", []).append(_quality(full, clean))
    return numbers


def _far(image: Any, other: Any) -> np.ndarray:
    return np.linalg.norm((np.asarray(image) - other).reshape(len(other), -1), axis=1)


def _quality(image: np.ndarray, clean: np.ndarray) -> float:
    """The mean peak signal-to-noise ratio of images in [0, 1]."""
    return float(np.mean(-10 * np.log10(np.mean((np.clip(image, 0, 1) - clean) ** 2, axis=(1, 2, 3)))))


def verdict(numbers: dict[str, list[float]]) -> tuple[str, str]:
    """Judge what the attack costs beside a random perturbation: 1 dB or more, and more than the filter, each seed."""
    mean = {key: float(np.mean(values)) for key, values in numbers.items()}
    lost = {
        name: np.subtract(numbers[f"{name}: random, dB"], numbers[f"{name}: attack on the {name}, dB"])
        for name in ("network", "filter")
    }
    fragile, more = bool(np.all(lost["network"] >= 1)), bool(np.all(lost["network"] > lost["filter"]))
    word = "holds" if fragile and more else "holds in part" if fragile else "does not hold here"
    return word, (
        f"the attack costs the network {lost['network'].mean():.2f} dB beside a random perturbation of its size, and a "
        f"linear filter {lost['filter'].mean():.2f} dB (they move what is made by "
        f"{mean['network: moved by attack on the network, by its size']:.2f} and "
        f"{mean['filter: moved by attack on the filter, by its size']:.2f} of their size, a random one by "
        f"{mean['network: moved by random, by its size']:.2f}); network on noise {mean['network: noise, dB']:.1f} dB "
        f"({mean['without denoising: noise, dB']:.1f} undenoised), attacked "
        f"{mean['network: attack on the network, dB']:.1f} dB; the filter makes "
        f"{mean['filter: attack on the network, dB']:.1f} dB of the images made for the network "
        f"({mean['filter: random, dB']:.1f} of random ones)"
    )
