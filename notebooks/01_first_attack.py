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
# # A first attack
#
# We train a small network on handwritten digits, look for inputs that fool it, train again against such inputs, and
# compare the two honestly. Everything runs on a laptop's CPU in under a minute; no data is downloaded.

# %%
import jax
import numpy as np

import jaxadv as ja

key = jax.random.key(0)
train, test = ja.data.load("digits"), ja.data.load("digits", "test")
x, y = test.all()
print(f"{len(train)} training and {len(test)} test images of shape {test.shape}, values in {test.bounds}")

# %% [markdown]
# ## A network, trained as usual
#
# A recipe is a function of the data that returns the arguments of `fit`. `fit` returns a state; together with the
# network's `apply` it is a *model*: a callable that turns a batch into logits, and nothing else.


# %%
def trained_by(recipe):
    """Train by a recipe and return the model."""
    state = ja.fit(key, **recipe)
    return ja.models.model(ja.train.trained(recipe["trainable"], state))


standard = trained_by(ja.recipes.standard_digits(train, epochs=15))
print(f"accuracy without an attack: {np.mean(np.asarray(ja.robust(standard(x), y))):.3f}")

# %% [markdown]
# ## The attack
#
# A *threat* says what the attacker may do: here change each pixel by at most 0.15. An *attack* looks for a point of the
# threat at which the model fails. `run` is pure; its result has one row for each image.

# %%
threat = ja.linf(0.15)
attack = ja.pgd(threat, steps=20)
result = jax.jit(attack.run)(key, standard, x, y)
print(f"accuracy under attack: {1 - np.mean(np.asarray(result.success)):.3f}")
print(f"largest change of a pixel: {np.max(np.asarray(result.size)):.3f}, allowed 0.15")

# %% [markdown]
# What does a fooling image look like? Original and attacked, side by side, in shades of text.

# %%
SHADES = np.array(list(" .:-=+*#%@"))


def show(*images):
    """Print images side by side."""
    for rows in zip(*(SHADES[np.clip((np.asarray(i)[..., 0] * 9.99).astype(int), 0, 9)] for i in images)):
        print("    ".join("".join(np.repeat(row, 2)) for row in rows))


fooled = int(np.flatnonzero(np.asarray(result.success) & np.asarray(ja.robust(standard(x), y)))[0])
pair = np.stack([x[fooled], np.asarray(result.x[fooled])])
show(*pair)
print(f"label {y[fooled]}; the network says {np.asarray(standard(pair)).argmax(-1)}")

# %% [markdown]
# ## A network trained against the attack
#
# Fast adversarial training: in each step, one gradient step from a random start makes the batch harder.

# %%
robust = trained_by(ja.recipes.fast_digits(train, epochs=25))
result = jax.jit(attack.run)(key, robust, x, y)
print(f"accuracy under attack: {1 - np.mean(np.asarray(result.success)):.3f}")

# %% [markdown]
# ## An honest evaluation
#
# One attack proves little: perhaps a better one exists. `evaluate` runs several, keeps the worst case for every image,
# checks each point again, gives intervals, and raises flags where a number should not be trusted.

# %%
for name, model in (("standard", standard), ("robust", robust)):
    report = ja.evaluate(key, model, x, y, threat, name=name, index=test.index, data=test)
    found = report.models[0]
    low, high = found.robust_interval
    print(f"{name:9} clean {found.clean_accuracy:.3f}   robust {found.robust_accuracy:.3f} ({low:.3f} to {high:.3f})")
    for flag in found.flags:
        print("  flag:", flag.name)

# %% [markdown]
# `report.save("report")` writes the same as JSON, as Markdown, and as a page with figures. The robust accuracy is an
# upper bound: no attack of this list found more, and a better one may.
