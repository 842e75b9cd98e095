"""A private run as one object: who takes part, how much each may change, how much noise hides it, what that costs.

What lives here: `Plan`, which binds sampler, clip, noise and accountant, so that none of them can be stated apart from
the others, and `plan`, which builds one from a budget. What does not: the parts themselves, and training
(`train.fit(..., private=plan)`).

**What the number covers.** The released parameters, against somebody who knows everything but the seed and one example.
Metrics, norms, losses, checkpoints and the seed are private data. Choices made by looking at the training data (rates,
networks, when to stop) are not counted.

**Steps that are taken twice.** After a crash, steps since the last checkpoint are taken again. With the same program on
the same devices they have the same sample, the same noise and the same bits: nothing new is released, and nothing is
counted. Where rounding may differ (other devices, another executor, another version of jax), the two answers share
their noise, and their difference is not covered by it: every step that may have been taken before is then counted
twice.
"""

import dataclasses
import math
from collections.abc import Callable, Generator
from typing import Any

import optax

from jaxadv.core import check
from jaxadv.privacy import accounting, sampling
from jaxadv.privacy.clipping import clipped_grads
from jaxadv.privacy.noise import Gaussian
from jaxadv.privacy.sampling import Poisson, Shuffled

_SHARE = 1e-6
"""Share of delta that is set aside for samples that overflow a batch."""


class BudgetError(ValueError):
    """A step would spend more than the budget."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a private run samples, clips, adds noise and counts; built by `plan`.

    Attributes:
      sampler: `Poisson`; or `Shuffled`, for which no epsilon is known.
      clip_norm: bound of the norm of what one example contributes.
      noise_multiplier: standard deviation of the noise over the sensitivity.
      delta: see `accounting.epsilon`.
      epsilon: the budget, or None for none.
      rescale: see `clipped_grads`.
      views: augmented copies of an example over which its loss is averaged before the clip.
      accountant: one of `accounting.ACCOUNTANTS`.
      relation: one of `accounting.RELATIONS`.
      noise: `Gaussian()`, `banded(...)`, or any optax transformation that adds noise to the mean of a batch; what that
        costs is not known here.
    """

    sampler: Poisson | Shuffled
    clip_norm: float
    noise_multiplier: float
    delta: float
    epsilon: float | None = None
    rescale: bool = False
    views: int = 1
    accountant: str = "pld"
    relation: str = "add_or_remove_one"
    noise: Any = Gaussian()

    def __post_init__(self):
        _check(self)

    @property
    def rows(self) -> int:
        """Rows of every batch, padding included."""
        return self.sampler.rows

    @property
    def size(self) -> float:
        """Expected number of examples in a step, which sums are divided by: it is public, the number drawn is not."""
        return self.sampler.size

    @property
    def sensitivity(self) -> float:
        """Largest norm that one example adds to the sum, as the clip states it.

        It is that of one example more or less: for neighbors `'replace_one'` the accountant doubles it itself.
        """
        return float(self.clipped(_no_loss).sensitivity("add_or_remove_one"))

    @property
    def std(self) -> float:
        """Standard deviation of the noise on the **sum** of clipped gradients."""
        return self.noise_multiplier * self.sensitivity

    @property
    def unsupported(self) -> str | None:
        """Why no epsilon can be stated, or None if it can."""
        if isinstance(self.sampler, Shuffled):
            return "batches of a shuffled order are no Poisson samples, and no accountant knows what they cost"
        if isinstance(self.noise, optax.GradientTransformation):
            return "the cost of a noise stage of your own is not known here"
        return None

    def clipped(self, loss_fn: Callable) -> Callable:
        """Return the clipped sum of this plan.

        Args:
          loss_fn: `loss_fn(params, example, key) -> scalar`, for one example.

        Returns:
          `f(params, batch, mask, keys, axis_name) -> (grads, aux)`, see `clipped_grads`.
        """
        return clipped_grads(loss_fn, clip_norm=self.clip_norm, rescale=self.rescale)

    def stage(self, key) -> optax.GradientTransformation:
        """Return the noise stage for means (sums over `size`), to stand first in a chain of optax transformations.

        Args:
          key: of the noise of this run, secret.

        Returns:
          The transformation.
        """
        return self.noise if isinstance(self.noise, optax.GradientTransformation) else self._made(key)

    def _made(self, key) -> optax.GradientTransformation:
        return self.noise(self.std / self.size, key)

    def batches(
        self, source: Any, key, *, start: int = 0, process: tuple[int, int] = (0, 1), workers: int = 0
    ) -> Generator[dict[str, Any], None, None]:
        """Stream the batches of this plan.

        Args:
          source: the data that the plan was made for.
          key: of the samples of this run, secret.
          start: step to begin at.
          process: see `sampling.batches`.
          workers: see `sampling.batches`.

        Returns:
          Batches without end.
        """
        seed = sampling.seed_of(key)
        return sampling.batches(self.sampler, source, seed, start=start, process=process, workers=workers)

    def event(self) -> Any:
        """Describe one step (one round of all groups, for a sampler with a cycle) in the words of dp-accounting.

        Returns:
          A `DpEvent`.

        Raises:
          ValueError: if no epsilon can be stated; see `unsupported`.
        """
        return accounting.gaussian_event(self.noise_multiplier, **_drawn(self._counted()))

    def _counted(self) -> Poisson:
        """The sampler, if what it draws can be counted."""
        if not isinstance(self.sampler, Poisson) or self.unsupported:
            raise ValueError(f"epsilon must come from a supported plan; {self.unsupported}. Sample by `poisson`.")
        return self.sampler

    def spent(self, steps: int) -> float:
        """Return the epsilon of so many steps.

        Args:
          steps: number of steps taken; one that was taken twice counts twice.

        Returns:
          Epsilon at this plan's delta; infinity where it is so large that samples which do not fit into the rows, one
          in 10^25, would cost more than their share of delta.

        Raises:
          ValueError: if no epsilon can be stated.
          ImportError: without the extra `privacy`.
        """
        sampler = self._counted()
        slack = 0.0 if sampler.truncated or sampler.overflow == 0 else _SHARE
        found = accounting.epsilon(
            self.event(),
            self.delta * (1 - slack),
            steps=-(-steps // sampler.cycle),
            accountant=self.accountant,
            relation=self.relation,
        )
        lost = steps * sampler.overflow * (1 + math.exp(min(found, 700)))
        return math.inf if slack and lost > slack * self.delta else found

    def affordable(self, epsilon: float) -> int:
        """Return the most steps that keep a budget.

        Args:
          epsilon: the budget.

        Returns:
          The number of steps; 0 if not even one fits.

        Raises:
          ValueError: if no epsilon can be stated.
        """
        rounds = accounting.calibrate_steps(
            epsilon,
            self.delta * (1 - _SHARE),
            noise_multiplier=self.noise_multiplier,
            accountant=self.accountant,
            relation=self.relation,
            **_drawn(self._counted()),
        )
        return rounds * self.sampler.cycle

    def admit(self, steps: int) -> None:
        """Refuse to go on if so many steps would spend more than the budget. To be called before they are taken.

        Args:
          steps: number of steps after which the run would stand.

        Raises:
          BudgetError: if their epsilon is above the budget.
          ValueError: if there is a budget and no epsilon can be stated.
        """
        if self.epsilon is None:
            return
        spent = self.spent(steps)
        if spent > self.epsilon:
            raise BudgetError(
                f"a private run must stay within its budget of epsilon {self.epsilon:g} at delta {self.delta:g}; "
                f"{steps} steps would spend {spent:.4g}. Take fewer steps, add noise (noise_multiplier "
                f"{self.noise_multiplier:g}), or raise the budget."
            )

    def ledger(self, steps: int) -> dict[str, Any]:
        """State what so many steps have spent, and under which assumptions.

        Args:
          steps: number of steps taken; one that was taken twice counts twice.

        Returns:
          Plain values; `epsilon` is None where it cannot be stated, and `unsupported` says why.
        """
        spent = None if self.unsupported else self.spent(steps)
        event = None if self.unsupported else str(self.event())
        return {
            "epsilon": spent,
            "delta": self.delta,
            "counted_steps": steps,
            "budget": self.epsilon,
            "unsupported": self.unsupported,
            "accountant": self.accountant,
            "relation": self.relation,
            "event": event,
            "cycle": self.sampler.cycle,
            "noise_multiplier": self.noise_multiplier,
            "clip_norm": self.clip_norm,
        }


def _no_loss(params, example, key):
    """Stands for a loss where only the clip is asked."""
    del params, example, key
    return 0.0


def _drawn(sampler: Poisson) -> dict[str, Any]:
    """What the accountant needs to know of a sampler."""
    return {"rate": sampler.rate} | ({"n": sampler.group, "rows": sampler.rows} if sampler.truncated else {})


def _check(plan: Plan) -> None:
    check.choice("accountant", plan.accountant, accounting.ACCOUNTANTS)
    check.choice("relation", plan.relation, accounting.RELATIONS)
    check.whole("views", plan.views)
    if not 0 < plan.clip_norm < math.inf:
        raise ValueError(f"clip_norm must be finite and greater than 0; got {plan.clip_norm}. 1.0 is usual.")
    if not 0 <= plan.noise_multiplier < math.inf:
        raise ValueError(f"noise_multiplier must be finite and at least 0; got {plan.noise_multiplier}. 1.0 is usual.")
    n = plan.sampler.n
    if not 0 < plan.delta < 1 / n:
        raise ValueError(
            f"delta must lie between 0 and 1/n = {1 / n:.3g} for {n} examples; got {plan.delta:g}. At 1/n a mechanism "
            "that publishes one example at random would pass. 1e-5 is usual for tens of thousands of examples."
        )
    if plan.epsilon is not None:
        check.positive("epsilon", plan.epsilon, "None sets no budget.")
        if plan.unsupported:
            raise ValueError(f"a budget must be countable; got epsilon={plan.epsilon:g}, but {plan.unsupported}.")
    bands = getattr(plan.noise, "bands", 1)
    if bands > plan.sampler.cycle:
        raise ValueError(
            f"noise with {bands} bands must have a sampler with a cycle of at least {bands}; got "
            f"{plan.sampler.cycle}. Pass cycle={bands} to poisson."
        )
    if isinstance(plan.sampler, Poisson) and plan.sampler.truncated and plan.unsupported is None:
        if (plan.accountant, plan.relation) != ("pld", "replace_special"):
            raise ValueError(
                "truncated samples must be counted by accountant='pld' with relation='replace_special'; got "
                f"{plan.accountant!r} and {plan.relation!r}. Or leave rows out, so that nothing is truncated."
            )


def plan(
    n: int,
    *,
    size: float,
    steps: int,
    delta: float,
    epsilon: float | None = None,
    noise_multiplier: float | None = None,
    clip_norm: float = 1.0,
    rescale: bool = False,
    views: int = 1,
    rows: int | None = None,
    multiple: int = 1,
    accountant: str = "pld",
    relation: str | None = None,
    noise: Any = None,
) -> Plan:
    """Plan a private run: from a budget to its noise, or from the noise to what it costs.

    | given | result |
    | --- | --- |
    | `epsilon` | the least noise with which `steps` steps keep the budget |
    | `noise_multiplier` | a run without a budget; its epsilon is stated all the same |
    | both | that noise; training refuses steps beyond the budget |

    Args:
      n: number of training examples.
      size: expected examples in a step.
      steps: number of steps that the noise is calibrated for.
      delta: below 1/n.
      epsilon: the budget.
      noise_multiplier: see `Plan`.
      clip_norm: see `Plan`.
      rescale: see `Plan`.
      views: see `Plan`.
      rows: see `sampling.poisson`.
      multiple: see `sampling.poisson`.
      accountant: see `Plan`.
      relation: see `Plan`; None is add or remove one, or for truncated samples replace by a row that does not count.
      noise: see `Plan`; None is independent. Correlated noise sets the cycle of the sampler.

    Returns:
      The plan.

    Raises:
      ValueError: if a setting cannot be, or neither budget nor noise is given.
      ImportError: without the extra `privacy`, if noise is to be found from a budget.

    >>> made = plan(50_000, size=4096, steps=2468, delta=1e-5, noise_multiplier=3.0)
    >>> round(made.spent(2468), 2)
    6.53
    """
    noise = Gaussian() if noise is None else noise
    sampler = sampling.poisson(n, size, rows=rows, multiple=multiple, cycle=getattr(noise, "bands", 1))
    if relation is None:
        relation = "replace_special" if sampler.truncated else "add_or_remove_one"
    if epsilon is None and noise_multiplier is None:
        raise ValueError("a plan must have a budget or noise; got no epsilon and no noise_multiplier. Pass epsilon=8.")
    settings: dict[str, Any] = {"rescale": rescale, "views": views, "accountant": accountant, "relation": relation}
    if noise_multiplier is not None:
        return Plan(sampler, clip_norm, noise_multiplier, delta, epsilon, noise=noise, **settings)
    Plan(sampler, clip_norm, 1.0, delta, epsilon, noise=noise, **settings)  # refuse before searching
    multiplier = accounting.calibrate_noise(
        epsilon,  # pyright: ignore[reportArgumentType]
        delta * (1 - _SHARE),
        steps=-(-steps // sampler.cycle),
        accountant=accountant,
        relation=relation,
        **_drawn(sampler),
    )
    return Plan(sampler, clip_norm, multiplier, delta, epsilon, noise=noise, **settings)
