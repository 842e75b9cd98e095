"""Every refusal names the argument, says what was got and what to do."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxadv.core import check

X = np.full((4, 3), 0.5, np.float32)
ONE = np.eye(3, dtype=np.float32)
CASES = {
    "one_hot": (lambda: check.labels(ONE), ValueError, r"^y must .*got float32\[3, 3\].*argmax\(-1\)"),
    "scalar": (lambda: check.labels(np.int32(1)), ValueError, r"^y must .*got int32\[\].*Pass"),
    "float": (lambda: check.labels(np.zeros(3)), TypeError, r"^y must .*got float64\[3\].*astype"),
    "bool": (lambda: check.labels(np.zeros(3, bool)), TypeError, r"^y must .*got bool\[3\].*astype"),
    "length": (lambda: check.labels(np.zeros(3, int), 4), ValueError, r"^y must .*4 examples; got int64\[3\]\. Slice"),
    "high": (lambda: check.labels(np.array([0, 3]), 2, 3), ValueError, r"^y must .*\[0, 3\).*got labels 0 to 3.*start"),
    "low": (lambda: check.labels(np.array([-1, 2]), 2, 3), ValueError, r"^y must .*got labels -1 to 2"),
    "named": (lambda: check.labels(ONE, name="target"), ValueError, r"^target must .*Pass target\.argmax"),
    "single": (lambda: check.inputs(X[0]), ValueError, r"^x must .*got float32\[3\].*Pass x\[None\]"),
    "empty": (lambda: check.inputs(X[:0]), ValueError, r"^x must hold at least one .*got float32\[0, 3\].*empty"),
    "bytes": (lambda: check.inputs(np.zeros((2, 2), np.uint8)), TypeError, r"^x must .*got uint8\[2, 2\].*/ 255"),
    "nan": (lambda: check.inputs(X * np.nan), ValueError, r"^x must be finite; got .*nan.*Remove"),
    "inf": (lambda: check.inputs(X / np.float32([1, 1, 1e-45])), ValueError, r"^x must be finite; got .*inf"),
    "above": (lambda: check.inputs(X * 3, (0.0, 1.0)), ValueError, r"^x must .*\[0, 1\]; got .* 1\.5 to 1\.5.*Pass"),
    "below": (lambda: check.inputs(X - 1, (0, np.ones(3))), ValueError, r"^x must .*got .*-0\.5"),
    "flat": (
        lambda: check.logits(np.zeros(3)),
        ValueError,
        r"^the model's output must .*\[b, k\].*float64\[3\]. Return",
    ),
    "pair": (lambda: check.logits((X, X)), ValueError, r"logits of shape .*got tuple. Return the logits alone"),
    "one_class": (lambda: check.logits(X[:, :1]), ValueError, r"k >= 2; got float32\[4, 1\].*stack"),
    "rows": (lambda: check.logits(X, 5), ValueError, r"\[5, k\].*got float32\[4, 3\]"),
    "numbers": (lambda: check.logits(X.astype(int)), ValueError, r"floating-point logits; got int64\[4, 3\]. Return"),
    "zero": (lambda: check.positive("eps", 0.0, "Do this."), ValueError, r"^eps must .*got 0\.0\. Do this\."),
    "minus": (lambda: check.positive("eps", -1), ValueError, r"^eps must be finite and greater than 0; got -1"),
    "not_a_number": (lambda: check.positive("eps", float("nan")), ValueError, r"^eps must .*got nan"),
    "endless": (lambda: check.positive("eps", np.inf), ValueError, r"^eps must .*got inf"),
    "some": (lambda: check.positive("eps", np.array([1, 0])), ValueError, r"^eps must .*got \[1 0\]"),
    "none": (lambda: check.positive("eps", np.array([])), ValueError, r"^eps must"),
    "under": (
        lambda: check.not_negative("beta", -1e-9, "0 is off."),
        ValueError,
        r"^beta must .*got -1e-09\. 0 is off\.",
    ),
    "no_number": (lambda: check.not_negative("beta", float("nan")), ValueError, r"^beta must be finite and at least 0"),
    "without_end": (lambda: check.not_negative("beta", np.array([0, np.inf])), ValueError, r"^beta must"),
    "part": (lambda: check.whole("steps", 1.0), ValueError, r"^steps must .*at least 1; got 1\.0\. Pass int"),
    "yes": (lambda: check.whole("steps", True), ValueError, r"^steps must .*got True"),
    "few": (lambda: check.whole("steps", 0), ValueError, r"^steps must .*got 0"),
    "typo": (
        lambda: check.choice("attack", "pdg", {"pgd": 1, "fgsm": 2}),
        ValueError,
        r"attack 'pdg'.*mean 'pgd'.*fgsm",
    ),
    "strange": (lambda: check.choice("attack", 7, ("pgd",)), ValueError, r"unknown attack 7. Known: pgd"),
}


@pytest.mark.parametrize("case", CASES)
def test_refusals(case):
    call, kind, message = CASES[case]
    with np.errstate(all="ignore"), pytest.raises(kind, match=message):
        call()


def test_what_is_right_passes():
    check.labels([0, 2, 1], 3, 3)
    check.labels(jnp.asarray([0, 2, 1]), 3, 3)
    check.labels(np.array([], int), 0, 3)
    check.inputs(X, (np.zeros(3), np.float32(0.5)))
    check.inputs(jnp.asarray(X, jnp.bfloat16), (0.0, 1.0))
    check.inputs(X)
    check.logits(X, 4)
    check.logits(jnp.asarray(X, jnp.bfloat16))
    check.positive("eps", np.array([1e-30, 3]))
    check.not_negative("beta", np.array([0, 3]))
    check.whole("n", np.int64(0), least=0)
    assert check.choice("thing", "a", {"a": 5}) == 5 and check.choice("thing", "a", ["a", "b"]) == "a"
    assert check.concrete(3).shape == () and check.concrete(jnp.ones(2)).tolist() == [1, 1]


def test_traced_values_pass_but_traced_shapes_do_not():
    def inner(x, y, eps):
        assert check.concrete(x) is None
        check.inputs(x, (0.0, 1.0))
        check.labels(y, 4, 3)
        check.positive("eps", eps)
        with pytest.raises(ValueError, match="at least one example"):
            check.inputs(x[:0])
        return x

    jax.jit(inner)(X * 9, np.array([0, 9, 9, 9]), -1.0)
