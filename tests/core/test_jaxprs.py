"""Counting the products of a program."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from jaxadv.core.jaxprs import products


def count(fn, *shapes):
    return products(jax.make_jaxpr(fn)(*(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)).jaxpr)


def test_products_are_counted_by_their_sizes():
    assert count(lambda a, b: a @ b, (2, 3), (3, 5)) == 30
    assert count(lambda a, b: jnp.einsum("bij,bjk->bik", a, b), (4, 2, 3), (4, 3, 5)) == 120

    def conv(x, kernel, groups=1):
        numbers = ("NHWC", "HWIO", "NHWC")
        return lax.conv_general_dilated(
            x, kernel, (2, 2), "SAME", dimension_numbers=numbers, feature_group_count=groups
        )

    for fn in (conv, *(jax.grad(lambda x, kernel: conv(x, kernel).sum(), i) for i in (0, 1))):
        assert count(fn, (1, 8, 8, 4), (3, 3, 4, 6)) == 4 * 4 * 6 * 9 * 4  # a gradient costs a forward pass
    assert count(lambda x, k: conv(x, k, 2), (1, 8, 8, 4), (3, 3, 2, 6)) == 4 * 4 * 6 * 9 * 2


def test_loops_count_as_often_as_they_run_and_what_nobody_needs_not_at_all():
    square = (3, 3)
    assert count(lambda a: lax.fori_loop(0, 7, lambda i, b: a @ b, a), square) == 7 * 27
    assert count(lambda a: lax.cond(a[0, 0] > 0, lambda b: b @ b @ b, lambda b: b @ b, a), square) == 2 * 27
    assert count(jax.jit(lambda a: {"asked": a @ a, "more": a @ a @ a}), square) == 3 * 27
    assert count(lambda a: jax.jit(lambda b: (b @ b, (b + 1) @ b @ b))(a)[0], square) == 27
    kept = jax.checkpoint(lambda b: jnp.sin(b @ b))  # computed again for the gradient
    assert count(jax.grad(lambda a: jnp.sum(kept(a))), square) == 3 * 27
    assert count(jax.value_and_grad(lambda a: jnp.sum(kept(a))), square) == 4 * 27

    def until(a):
        return lax.while_loop(lambda b: b[0, 0] < 9, lambda b: b @ b, a)

    with pytest.raises(ValueError, match="runs until a condition holds"):
        count(until, square)
    assert count(lambda a: lax.while_loop(lambda b: b[0, 0] < 9, lambda b: b + 1, a), square) == 0
