"""Transfer tables: what examples that were made for one model do to others, beside noise of the same size.

What lives here: `transfer_table`, from models and an attack to a `TransferTable`, with its JSON and markdown. What does
not: attacks that are meant to transfer (`attacks.transferable`), and the attack on one model through a surrogate
(`attacks.transfer`). Models that differ by architecture, by seed, or by the set they were trained on are all one table:
give them telling names.

| row | points | chances of a victim to be fooled |
| --- | --- | --- |
| `clean` | the examples | all it gets right |
| `attack` | what the attack found on the source; the example where that is not allowed | right, and the source broken |
| `equal` | Gaussian noise of the size of each of those perturbations | the same examples |
| `magnified` | those perturbations, all brought to one size | the same examples |
| `equal magnified` | Gaussian noise of that size | the same examples |
| `noise` | Gaussian noise of a stated deviation | all it gets right |

Every model is asked through the forward pass of verdicts: float32, matrix precision "highest"; logits that are not
finite are errors.
"""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxadv.core import Attack, as_callable, atomic_write, check, edges, example_keys, feasible
from jaxadv.evaluate.inputs import check_model, data_entry, problem_of, versions
from jaxadv.evaluate.intervals import share
from jaxadv.evaluate.markdown import data_words, interval, percent, table, threat_words
from jaxadv.evaluate.protocols import describe
from jaxadv.evaluate.report import dumps
from jaxadv.evaluate.slots import drain
from jaxadv.evaluate.verdict import host, logits_of

SCHEMA = "jaxadv.transfers/1"
"""Name and version of the JSON form."""


@dataclasses.dataclass(frozen=True)
class TransferTable:
    """What was found about all pairs of a source and a victim.

    Attributes:
      versions: version of `jaxadv`, `jax`, `numpy`, `python`.
      device: kind of the device that computed.
      seed: the seed the caller stated, or None.
      key: words of the random key.
      data: `name`, `split`, `n`, `shape`, `classes`, `fingerprint`.
      attack: `name`, `settings`, `threat` and `magnify` (the size of magnified perturbations, or None).
      sources: names of the models that examples were made for.
      victims: names of the models that were asked.
      rows: one entry for each set of points: `kind` (see the module), `source` or None, `deviation` or None, `size`
        (mean root mean square of the perturbations), `broken` (examples on which the source fell, or None), and for
        each victim `errors` (share of all examples) with `intervals`, `fooled` and `chances` (counts).
      statements: sentences that a reader of the numbers must know.
    """

    versions: dict[str, str]
    device: str
    seed: int | None
    key: list[int]
    data: dict[str, Any]
    attack: dict[str, Any]
    sources: list[str]
    victims: list[str]
    rows: list[dict[str, Any]]
    statements: list[str]

    def errors(self, kind: str = "attack") -> np.ndarray:
        """Return error rates.

        Args:
          kind: of the rows.

        Returns:
          float64 `[rows of the kind, victims]`; the rows are the sources where the kind has one for each.
        """
        return np.asarray([row["errors"] for row in self._of(kind)])

    def fooled(self, kind: str = "attack") -> np.ndarray:
        """Return which share of its chances fooled each victim.

        Args:
          kind: of the rows.

        Returns:
          float64 `[rows of the kind, victims]`; NaN where there was no chance.
        """
        pairs = [[_rate(f, c) for f, c in zip(row["fooled"], row["chances"])] for row in self._of(kind)]
        return np.asarray([[np.nan if rate is None else rate for rate in row] for row in pairs])

    def _of(self, kind: str) -> list[dict[str, Any]]:
        found = [row for row in self.rows if row["kind"] == kind]
        check.choice("kind of row", kind, {row["kind"] for row in self.rows})
        return found

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form as plain dicts and lists."""
        return {"schema": SCHEMA} | dataclasses.asdict(self)

    def to_json(self) -> str:
        """Return strict JSON, ending in a newline."""
        return dumps(self.to_dict())

    def markdown(self) -> str:
        """Return two tables, error rates and what fooled, with the sentences to read them by."""
        threat = threat_words(self.attack["threat"])
        out = ["# Transfer table", "", f"Data: {data_words(self.data)}.", ""]
        out += [f"Attack: {self.attack['name']}; {threat}.", "", "## Error rates", ""]
        head = ["points", "mean size (RMS)", *self.victims]
        cells = [
            [_words(row), f"{row['size']:.4f}"]
            + [f"{percent(e)} {interval(ends)}" for e, ends in zip(row["errors"], row["intervals"])]
            for row in self.rows
        ]
        out += [*table(head, cells), "## Fooled, of those with a chance", ""]
        cells = []
        for row in self.rows[1:]:
            rates = [(_rate(f, c), f, c) for f, c in zip(row["fooled"], row["chances"])]
            cells.append([_words(row)] + ["-" if r is None else f"{percent(r)} ({f} of {c})" for r, f, c in rates])
        out += [*table(["points", *self.victims], cells), "## How to read this", ""]
        out += [f"- {words}" for words in self.statements]
        told = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        seed = "not stated" if self.seed is None else self.seed
        out += ["", f"Seed {seed}, key {self.key}; {told}; {self.device}; data fingerprint {self.data['fingerprint']}."]
        return "\n".join(out) + "\n"

    def save(self, folder: str | os.PathLike) -> Path:
        """Write `transfers.json` and `transfers.md`, each whole or not at all.

        Args:
          folder: made if missing.

        Returns:
          The folder.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in (("transfers.json", self.to_json()), ("transfers.md", self.markdown())):
            atomic_write(folder / name, lambda file, text=text: file.write(text.encode()))
        return folder


def _rate(fooled: int, chances: int) -> float | None:
    return fooled / chances if chances else None


def _words(row: Mapping[str, Any]) -> str:
    """What a row is called."""
    if row["source"] is None:
        return "clean" if row["kind"] == "clean" else f"noise {row['deviation']:g}"
    made = f"made for {row['source']}" + (", magnified" if "magnified" in row["kind"] else "")
    return f"noise of the size of those {made}" if "equal" in row["kind"] else made


def _wide(value: np.ndarray, x: np.ndarray) -> np.ndarray:
    """One value for each row, over its features."""
    return value.reshape(value.shape + (1,) * (x.ndim - 1))


def size(move: np.ndarray) -> np.ndarray:
    """Return the root mean square of perturbations, as the first paper on them measured distortion.

    Args:
      move: `[n, ...]`.

    Returns:
      float64 `[n]`.
    """
    return np.sqrt(np.mean(move.astype(np.float64).reshape(len(move), -1) ** 2, axis=-1))


def magnified(points: np.ndarray, x: np.ndarray, to: float, bounds: Any) -> np.ndarray:
    """Lengthen or shorten perturbations to one size, then clip them to the bounds.

    Args:
      points: float32 `[n, ...]`.
      x: float32 `[n, ...]` the examples; those that equal their points stay as they are.
      to: root mean square of the perturbations before they are clipped.
      bounds: lowest and highest value.

    Returns:
      float32 `[n, ...]`.
    """
    move = points.astype(np.float64) - x
    now = size(move)
    factor = np.where(now > 0, to / np.where(now > 0, now, 1), 1)
    return np.clip(x + _wide(factor, move) * move, *edges(bounds, x, np)).astype(np.float32)


@jax.jit
def _normal(key, x, index, number):
    keys = jax.vmap(lambda k: jax.random.fold_in(k, number))(example_keys(key, "transfer noise", index))
    return jax.vmap(lambda k: jax.random.normal(k, x.shape[1:], jnp.float32))(keys)


def transfer_table(
    key: Any,
    sources: Mapping[str, Any],
    x: Any,
    y: Any,
    attack: Any,
    *,
    victims: Mapping[str, Any] | None = None,
    magnify: float | None = None,
    noise: Sequence[float] = (0.1, 0.3),
    index: Any = None,
    batch_size: int = 500,
    slots: int | None = None,
    data: Any = "",
    seed: int | None = None,
) -> TransferTable:
    """Make examples for each source, and ask every victim about them and about noise of the same size.

    Args:
      key: a typed key; the same key gives the same table.
      sources: name to model, logits `[b, k]` from a batch: the models that examples are made for.
      x: float `[n, ...]` examples within the threat's bounds.
      y: int `[n]` labels.
      attack: the attack that makes the examples; with a minimum-norm attack and a large budget almost all of them
        succeed on their source.
      victims: name to model; the sources by default.
      magnify: ask about perturbations brought to this root mean square, too, whatever the budget.
      noise: standard deviations of rows of plain noise.
      index: int `[n]` dataset indices, from which random numbers come; `arange(n)` by default.
      batch_size: rows of a forward pass.
      slots: rows that the attack works on at once; None chooses.
      data: name of the data, or a source with `name` and `split`.
      seed: the seed to state.

    Returns:
      The table.

    Raises:
      ValueError: without models, or on impossible values.
      TypeError: on an untyped key, another thing than an attack, or wrong dtypes.

    References:
      Szegedy et al. 2014, Intriguing properties of neural networks, sec. 4.2 (tables 2 to 4), arXiv:1312.6199. Their
      printed formula for magnified examples contradicts the deviation of 0.1 they state; the stated one holds here.
    """
    victims = sources if victims is None else victims
    if not sources or not victims:
        raise ValueError("a transfer table needs at least one source and one victim; got none. Pass {'name': model}.")
    if not isinstance(attack, Attack):
        raise TypeError(f"attack must be an attack; got {type(attack).__name__}. Build it: attacks.pgd(threat).")
    for deviation in noise:
        check.positive("every deviation of noise", deviation, "The first row of the table is without noise.")
    if magnify is not None:
        check.positive("magnify", magnify, "None leaves perturbations as they are.")
    threat, made = attack.threat, {name: as_callable(model) for name, model in sources.items()}
    asked = {name: as_callable(model) for name, model in victims.items()}
    problem, classes = problem_of(key, next(iter(made.values())), x, y, threat, index, batch_size)
    for model in [*made.values(), *asked.values()]:
        if check_model(model, problem.x[: problem.batch]) != classes:
            raise ValueError(f"all models must have the {classes} classes of the first. Trained on other data?")
    examples, labels = problem.x, problem.y

    def wrong(model, points):
        logits = logits_of(model, points, problem.batch)
        return ~np.isfinite(logits).all(-1) | (logits.argmax(-1) != labels)

    def clipped(move):
        return np.clip(examples + move, *edges(threat.bounds, examples, np)).astype(np.float32)

    right = [~wrong(model, examples) for model in asked.values()]

    def row(kind, points, among=None, source=None, deviation=None):
        """An entry; `among`: bool `[n]`, the examples that count as chances where the victim is right."""
        lost = [wrong(model, points) for model in asked.values()]
        shares = [share(int(w.sum()), len(labels)) for w in lost]
        chances = [r if among is None else r & among for r in right]
        return {
            "kind": kind,
            "source": source,
            "deviation": deviation,
            "size": float(size(points - examples).mean()),
            "broken": None if among is None else int(among.sum()),
            "errors": [value for value, _ in shares],
            "intervals": [list(ends) for _, ends in shares],
            "fooled": [int((w & c).sum()) for w, c in zip(lost, chances)],
            "chances": [int(c.sum()) for c in chances],
        }

    entries: dict[str, list] = {kind: [] for kind in ("attack", "equal", "magnified", "equal magnified", "noise")}
    draw = np.asarray(_normal(key, examples, problem.index, 0))
    for name, model in made.items():
        found = examples.copy()
        for at, result in drain(attack, key, model, examples, labels, slots=slots, index=problem.index):
            found[at] = result.x
        found = np.where(_wide(feasible(host(threat), found, examples), found), found, examples)
        broken, points = wrong(model, found), {"attack": found}
        if magnify is not None:
            points["magnified"] = magnified(found, examples, magnify, threat.bounds)
        for kind, beside in (("attack", "equal"), ("magnified", "equal magnified"))[: len(points)]:
            entries[kind].append(row(kind, points[kind], broken, source=name))
            scale = size(points[kind] - examples) / size(draw)
            entries[beside].append(row(beside, clipped(_wide(scale, draw) * draw), broken, source=name))
    for number, deviation in enumerate(noise):
        draw = np.asarray(_normal(key, examples, problem.index, number + 1))
        entries["noise"].append(row("noise", clipped(deviation * draw), deviation=float(deviation)))
    budget = np.asarray(threat.eps, np.float64)
    return TransferTable(
        versions=versions(),
        device=jax.devices()[0].device_kind,
        seed=seed,
        key=np.asarray(jax.random.key_data(key)).ravel().tolist(),
        data=data_entry(data, problem, classes),
        attack={
            "name": attack.name,
            "settings": describe(attack),
            "threat": {
                "norm": threat.norm,
                "eps": budget.tolist(),
                "bounds": [np.asarray(b).tolist() for b in threat.bounds],
            },
            "magnify": None if magnify is None else float(magnify),
        },
        sources=list(made),
        victims=list(asked),
        rows=[row("clean", examples), *(entry for kind in entries.values() for entry in kind)],
        statements=[
            "Error rates are shares of all examples, those that a victim gets wrong without any attack included; "
            "intervals are 95 % Clopper-Pearson.",
            "Fooled: of the examples that the victim gets right without an attack and that broke the source. Noise of "
            "equal size is counted on the same examples; noise is clipped to the bounds, so it is a little smaller.",
            "Whether the source broke is judged before perturbations are magnified, and points outside the budget "
            "count as not found.",
        ],
    )
