# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Adaptive attacks
#
# A defense that resists a standard attack may be robust, or it may only hide: round the input, draw random numbers,
# reject what looks odd. An *adaptive* attack is told of the defense and goes around it. Three planted defenses, each
# around the same undefended network; PGD finds little, and the adapted attack finds what was there all along.

# %%
import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

import jaxadv as ja
from jaxadv import attacks, losses

key = jax.random.key(0)
train, test = ja.data.load("digits"), ja.data.load("digits", "test")
x, y = (v[:120] for v in test.all())
recipe = ja.recipes.standard_digits(train, epochs=10)
trained = ja.train.trained(recipe["trainable"], ja.fit(key, **recipe))
network = ja.models.model(trained)
threat = ja.linf(0.15)
attack = ja.pgd(threat, steps=20)
clean = np.asarray(ja.robust(network(x), y))
open_door = jax.jit(attack.run)(key, network, x, y)
print(f"no defense: clean {clean.mean():.2f}, under PGD {1 - np.mean(np.asarray(open_door.success)):.2f}")

# %% [markdown]
# ## Preprocessing without gradients
#
# The input is rounded to eight levels. Rounding is flat, so that the gradient is zero everywhere, and PGD stands still:
# the flag `zero_gradient` says so. **BPDA** keeps the forward pass as it is and lets gradients pass as if rounding were
# not there.


# %%
def rounded(x):
    """The defense: eight levels of gray."""
    return jnp.round(x * 7) / 7


defended = attacks.preprocessed(network, rounded)
plain = jax.jit(attack.run)(key, defended, x, y)
adapted = jax.jit(attack.run)(key, attacks.bpda(network, rounded), x, y)
print(f"rounding: under PGD {1 - np.mean(np.asarray(plain.success)):.2f}")
print(f"  dead gradients in {np.mean(np.asarray(plain.flags['zero_gradient'])):.0%} of the images")
first = 1 - np.mean(np.asarray(adapted.success))
print(f"  with BPDA {first:.2f}")

# %% [markdown]
# ## Random choices
#
# Before the network looks, the image is drowned in noise of its own at each query, and rounded as well. A gradient at
# one draw tells little of the next. **EOT** descends the mean loss over draws; around BPDA, since parts compose. What
# was found is judged by draws that the attack has never seen: `survival` is the share of them at which the model holds.


# %%
def drowned(x, *, keys):
    """The defense: strong noise, then rounding."""
    noise = jax.vmap(lambda k: jax.random.normal(k, x.shape[1:]))(keys)
    return rounded(x + 0.3 * noise)


def drowned_only(x, *, keys):
    """What gradients may pass."""
    noise = jax.vmap(lambda k: jax.random.normal(k, x.shape[1:]))(keys)
    return x + 0.3 * noise


def held(model, points):
    """Accuracy over fresh draws."""
    return float(jnp.mean(ja.attacks.survival(jax.random.key(7), model, points, y, samples=50)))


random = attacks.preprocessed(network, drowned)
once = attacks.eot(random, key, samples=1)
plain = jax.jit(attack.run)(key, once, x, y)
many = attacks.eot(attacks.bpda(network, drowned, drowned_only), key, samples=8)
adapted = jax.jit(attack.run)(key, many, x, y)
second = held(random, adapted.x)
print(f"noise: clean {held(random, x):.2f}, under PGD {held(random, plain.x):.2f}, with EOT and BPDA {second:.2f}")

# %% [markdown]
# ## A detector
#
# A detector looks at the features of the last layer: how far is the nearest example of training that belongs to the
# class predicted? It rejects what lies farther than nineteen in twenty clean images, and catches half of what PGD
# finds. `rejecting` makes the alarm one more class, so that the margin loss has to beat it, too; `sweep` aims at every
# wrong class in turn. Success means fooled **and** not rejected.

# %%
features = ja.models.features(trained, at="dense2:in")
nearest = attacks.matched(features, *train.all(), classes=10)


def oddity(parts, x):
    """The detector: distance of the features to the nearest example of the predicted class."""
    network, nearest = parts
    said = jax.nn.one_hot(jnp.argmax(network(x), axis=-1), 10)
    return -jnp.sum(said * nearest(x), axis=-1)


detector = Partial(oddity, (network, nearest))
threshold = float(jnp.quantile(detector(x), 0.95))
guarded = attacks.rejecting(network, detector, threshold=threshold, factor=1 / threshold)


def defended_accuracy(points):
    """What is classified as its label, or rejected."""
    said = np.asarray(guarded(points)).argmax(-1)
    return np.mean((said == y) | (said == 10))


margin = ja.pgd(threat, steps=40, loss=losses.margin)
adapted = jax.jit(lambda x, y: attacks.sweep(margin, key, guarded, x, y, classes=10))(x, y)
third = defended_accuracy(adapted.x)
print(f"detector: right or rejected under PGD {defended_accuracy(open_door.x):.2f}, when the attack knows {third:.2f}")

# %% [markdown]
# Three defenses, none of them robust: each number of the adapted attack is near that of the undefended network, or
# below. The parts compose, so that a defense of several is met by the composition of their cures; and where no cure is
# at hand, attacks that need no gradients (`square`, `hopskipjump`) and attacks on another model (`transfer`) show
# whether there is something to be found.

# %%
assert max(first, second, third) < 0.5 * clean.mean()
