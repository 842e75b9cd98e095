"""The command `privacy`: what a private run costs, what a budget allows, and an audit of the private step.

What lives here: from a configuration to calls of the room `privacy`, the secret key of a private run, and what is
printed. What does not: any accounting.
"""

import json
import secrets
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxadv import privacy
from jaxadv.cli.configs import Privacy
from jaxadv.cli.errors import FLAGGED, OK, UsageError
from jaxadv.cli.parsing import fraction
from jaxadv.cli.progress import say
from jaxadv.privacy import accounting, audit

SECRET = "secret.key"
"""File in a run folder with the secret of its samples and noise: 16 hexadecimal digits."""


def run_privacy(config: Privacy) -> int:
    """Answer a question about privacy.

    Args:
      config: the arguments.

    Returns:
      The exit code; 1 if an audit refutes the claim.

    Raises:
      UsageError: if an argument that the question needs is missing.
    """
    return {"epsilon": _epsilon, "calibrate": _calibrate, "audit": _audit}[config.action](config)


def _needed(config: Privacy, *names: str) -> None:
    for name in names:
        if getattr(config, name) is None:
            raise UsageError(
                f"jaxadv privacy {config.action} needs --{name.replace('_', '-')}. For example: jaxadv privacy epsilon "
                "--n 60000 --batch-size 256 --steps 14000 --noise-multiplier 1.1"
            )


def _number(config: Privacy, name: str) -> Any:
    value = getattr(config, name)
    return None if value is None else fraction(value, name)


def _plan(config: Privacy, steps: int, **given: Any) -> privacy.Plan:
    size, n = config.batch_size or 0, config.n or 0
    settings = {"rows": config.rows, "accountant": config.accountant, "delta": _number(config, "delta")}
    return privacy.plan(n, size=size, steps=steps, **settings, **given)


def _told(plan: privacy.Plan, steps: int) -> None:
    spent, cut = plan.spent(steps), "truncated " if getattr(plan.sampler, "truncated", False) else ""
    say(
        f"epsilon {spent:.4g} at delta {plan.delta:g}: {steps} steps, {plan.size:g} of {plan.sampler.n} examples "
        f"expected in each ({cut}Poisson samples), noise multiplier "
        f"{plan.noise_multiplier:.5g}; neighbors: {plan.relation.replace('_', ' ')}; accountant: {plan.accountant}."
    )


def _epsilon(config: Privacy) -> int:
    _needed(config, "n", "batch_size", "steps", "noise_multiplier")
    steps = config.steps or 0
    _told(_plan(config, steps, noise_multiplier=_number(config, "noise_multiplier")), steps)
    return OK


def _calibrate(config: Privacy) -> int:
    _needed(config, "n", "batch_size", "epsilon")
    if (config.steps is None) == (config.noise_multiplier is None):
        raise UsageError(
            "jaxadv privacy calibrate needs either --steps, to find noise, or --noise-multiplier, to find steps."
        )
    epsilon, noise = _number(config, "epsilon"), _number(config, "noise_multiplier")
    steps = config.steps
    if steps is None:
        plan = _plan(config, 1, noise_multiplier=noise)
        steps = plan.affordable(epsilon)
        if steps == 0:
            raise UsageError(f"no step keeps epsilon {epsilon:g} with noise multiplier {noise:g}. Add noise.")
    else:
        plan = _plan(config, steps, epsilon=epsilon)
    _told(plan, steps)
    return OK


def _audit(config: Privacy) -> int:
    from jaxadv.train.private import one_step

    noise = 1.0 if config.noise_multiplier is None else _number(config, "noise_multiplier")
    delta = _number(config, "delta")
    claimed = accounting.epsilon(accounting.gaussian_event(noise), delta, accountant="pld")
    release, canary = one_step(noise)
    found = audit.white_box(
        jax.random.key(config.seed), release, canary, claimed=claimed, delta=delta, trials=config.trials
    )
    verdict = "REFUTES the claim" if found.leaks else "does not refute the claim"
    say(
        f"One private step with noise multiplier {noise:g} claims epsilon {claimed:.4g} at delta {delta:g}. "
        f"{found.trials} runs with and without a canary bound it from below by {found.epsilon:.4g} "
        f"({100 * found.confidence:g} % confidence): the audit {verdict}."
    )
    return FLAGGED if found.leaks else OK


def secret_key(out: Path) -> Any:
    """Return the key of a private run: secret, drawn by the system, kept in its folder so that it can be resumed.

    A seed that others know would let them compute the noise, and take it off.

    Args:
      out: the run folder.

    Returns:
      A typed key.

    Raises:
      UsageError: in several processes, or if the file is damaged.
    """
    if jax.process_count() > 1:
        raise UsageError("private training on the command line runs in one process. Call train.fit with a secret key.")
    path = out / SECRET
    if not path.exists():
        path.touch(mode=0o600)
        path.write_text(secrets.token_hex(8), encoding="ascii")
    try:
        words = np.frombuffer(bytes.fromhex(path.read_text(encoding="ascii")), np.uint32)
        return jax.random.wrap_key_data(jnp.asarray(words), impl="threefry2x32")
    except (ValueError, TypeError):
        raise UsageError(
            f"{path} must hold 16 hexadecimal digits; it is damaged. Begin anew in another folder."
        ) from None


def spent_words(out: Path) -> str:
    """Say what a private run spent.

    Args:
      out: the run folder.

    Returns:
      One sentence.
    """
    ledger = json.loads((out / "privacy.json").read_text(encoding="utf-8"))
    if ledger["epsilon"] is None:
        return f"No epsilon can be stated: {ledger['unsupported']}."
    return (
        f"Private: epsilon {ledger['epsilon']:.4g} at delta {ledger['delta']:g} ({ledger['accountant']}, neighbors: "
        f"{ledger['relation'].replace('_', ' ')}) for the weights; all else in {out} is private data."
    )
