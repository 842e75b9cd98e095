"""One frozen dataclass for each command: its arguments, their defaults, and where the defaults come from.

What lives here: names, types, defaults and help texts; tyro makes the command line of them, PyYAML the file that
`--config` reads and `--print-config` writes (`parsing.py`). What does not: any work (`commands.py`, `training.py`).
Importing this file loads no jax.

Numbers that people write as fractions (`--eps 8/255`) stay text here, so that a written configuration says what was
typed.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

Topic = Literal["all", "attacks", "threats", "recipes", "models", "data", "protocols"]
"""What `jaxadv list` can list."""

PUBLISHED_EPS: dict[tuple[str, str], str] = {
    ("digits", "linf"): "0.15",  # ours: the small images have no published budget
    ("mnist", "linf"): "0.3",  # Madry et al. 2018
    ("mnist", "l2"): "2.0",  # Rony et al. 2019 and others
    ("cifar10_jpeg", "linf"): "8/255",  # RobustBench
    ("cifar10_jpeg", "l2"): "0.5",  # RobustBench
}
"""Budget by data set and norm where none is given; elsewhere `--eps` is required."""


@dataclass(frozen=True, kw_only=True)
class Common:
    """What every command takes."""

    config: Path | None = None
    """Read arguments from this YAML file (as --print-config writes it); the command line overrides it."""

    print_config: bool = False
    """Print the resolved arguments as YAML and exit."""

    traceback: bool = False
    """Show the full Python traceback of an error."""


@dataclass(frozen=True, kw_only=True)
class Machine(Common):
    """What every command that computes takes."""

    data_root: Path | None = None
    """Folder of real data (holds mnist/, cifar10_jpeg/, ...); overrides the environment variable JAXADV_DATA."""

    devices: int | None = None
    """Use this many devices, of all processes together; on a machine without accelerators the CPU is split into so
    many."""

    distributed: str = "off"
    """How several processes find each other: 'off'; 'auto' where the cluster tells (Cloud TPU, Slurm, Open MPI,
    Kubernetes); or ADDRESS:PORT,N,I: the coordinator, how many there are, and which this one is, from 0. All run the
    same command; the first one writes and prints."""

    cache: Path | None = None
    """Folder in which compiled programs are kept for the next run; default the environment variable JAXADV_CACHE, else
    none."""

    seed: int = 0
    """Seed of everything random."""


@dataclass(frozen=True, kw_only=True)
class Demo(Machine):
    """Train a standard and a robust network on the built-in digits, attack both, write a report."""

    out: Path = Path("demo")
    """Folder for report.json, report.html, report.md and the two networks (standard/, robust/)."""

    eps: str = PUBLISHED_EPS["digits", "linf"]
    """Linf budget of training and evaluation, in units of the pixels (0 to 1)."""

    epochs: int | None = None
    """Passes over the training data; default that of the recipes standard_digits and pgd_digits."""

    n: int | None = None
    """Evaluate on so many test images; default all 360."""


@dataclass(frozen=True, kw_only=True)
class Train(Machine):
    """Train a network by a published recipe; interruptible and resumable.

    The default is FGSM with random start on MNIST, Wong, Rice and Kolter 2020 (Fast is better than free, "
    "arXiv:2001.03994).
    """

    recipe: str = "fast_mnist"
    """Name of a recipe (`jaxadv list recipes`)."""

    data: str | None = None
    """A data set (`jaxadv list data`) or an .npz file with x and y; default the one that the recipe is named after."""

    out: Path
    """The run folder: config.json, metrics.jsonl, train.log, checkpoints/, model.safetensors."""

    eps: str | None = None
    """Budget of the adversary, a number or a fraction (8/255); default that of the recipe."""

    epochs: int | None = None
    """Passes over the training data; default that of the recipe."""

    batch_size: int | None = None
    """Examples in a step, over all devices; default that of the recipe."""

    epsilon: str | None = None
    """Privacy budget of a private recipe (dp_...), e.g. 8; default that of the recipe."""

    delta: str | None = None
    """Delta of the privacy budget, below one over the number of examples; default that of the recipe."""

    keep: Literal["best", "last"] | None = None
    """Which weights become model.safetensors: the best by robust accuracy on validation data, or the last; default the
    recipe's."""

    validate_every: int | None = None
    """Steps between two validations; default that of the recipe, else ten in a run."""

    save_every: int | None = None
    """Steps between two checkpoints; default ten in a run."""

    how: Literal["jit", "shard_map", "pmap", "vmap", "explicit"] = "jit"
    """How a step runs on several devices; the numbers are the same."""

    precision: Literal["float32", "bfloat16"] | None = None
    """Precision inside the network, weights stay float32; default that of the recipe."""

    fsdp: bool = False
    """Keep a share of each large parameter on every device instead of all of it, for networks that do not fit."""

    set: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """Any other argument of the recipe, of its network or of training, as KEY=VALUE, once for each: --set width=32
    --set ema=0.999 --set remat=true --set depths=[2,2,2,2]. Values are numbers, fractions, true, false, none, lists and
    names; extra=DATA is a data set of generated examples."""

    resume: bool = False
    """Continue the run in --out from its newest checkpoint that can be read, with its stored arguments."""


@dataclass(frozen=True, kw_only=True)
class Evaluate(Machine):
    """Measure clean and robust accuracy of a model, with intervals, red flags and a report.

    The default protocol is `standard`; the default budget is that of the run, else the published one of the "
    "data set and norm.
    """

    model: tyro.conf.Positional[str]
    """MODEL: a run folder, a .safetensors file, or package.module:callable that returns a model."""

    data: str | None = None
    """A data set or an .npz file with x and y; default the one that a run folder was trained on."""

    split: Literal["test", "validation", "train", "train+validation"] = "test"
    """Part of the data."""

    n: int | None = 1000
    """Number of examples (a fixed, class-balanced choice); all where there are fewer."""

    norm: str = "linf"
    """Threat (`jaxadv list threats`)."""

    eps: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """Budget, a number or a fraction (8/255). The headline belongs to the first; several form the security curve."""

    attacks: str | None = None
    """Attacks by name, joined by commas (pgd,fgsm), in the place of the protocol."""

    protocol: str | None = None
    """A fixed suite of attacks (`jaxadv list protocols`); default standard, which is AutoAttack."""

    restarts: int | None = None
    """Runs of each attack with new random starts; default that of the protocol, 1 with --attacks."""

    targeted: str | None = None
    """Targeted evaluation: next, random, least_likely, or the number of a class (whose examples are left out)."""

    name: str | None = None
    """The model's name in the report; default that of its file or folder."""

    batch_size: int = 500
    """Examples of a forward pass outside the attacks."""

    slots: int | None = None
    """Examples attacked at once on each device; default chosen from the device's memory."""

    search_dtype: Literal["bfloat16"] | None = None
    """Let the attacks follow the model in bfloat16; verdicts stay in float32."""

    surrogate: str | None = None
    """Another MODEL whose gradients an attack `transfer` follows, after the others."""

    diagnose: bool = False
    """Also run the diagnosis of the evaluation itself (randomness, masked gradients, sanity checks)."""

    card: bool = False
    """Also measure the card of common corruptions, geometry, occlusion and shape (images in [0, 1]); card.json in
    --out."""

    measure: bool = False
    """Also time the model, for the overhead of each attack in the report's timing."""

    out: Path = Path("evaluation")
    """Folder for report.json, report.html, report.md, adversarial.npz, and the journal of finished examples."""

    resume: bool = False
    """Go on with the evaluation in --out that was stopped; repeat its other arguments."""

    save_adv: Path | None = None
    """Also write x, x_adv, y, index, success, size to this .npz file."""


@dataclass(frozen=True, kw_only=True)
class Attack(Machine):
    """Run one attack, print what it did, and save the adversarial examples.

    The default is PGD with 40 steps from a random start, Madry et al. 2018 (arXiv:1706.06083).
    """

    model: tyro.conf.Positional[str]
    """MODEL: a run folder, a .safetensors file, or package.module:callable that returns a model."""

    data: str | None = None
    """A data set or an .npz file with x and y; default the one that a run folder was trained on."""

    split: Literal["test", "validation", "train", "train+validation"] = "test"
    """Part of the data."""

    n: int | None = 1000
    """Number of examples (a fixed, class-balanced choice); all where there are fewer."""

    attack: str = "pgd"
    """Name of an attack (`jaxadv list attacks`)."""

    norm: str = "linf"
    """Threat (`jaxadv list threats`)."""

    eps: str | None = None
    """Budget, a number or a fraction (8/255); default that of the run, else the published one."""

    steps: int | None = None
    """Steps; default that of the attack."""

    step_size: str | None = None
    """Length of a step in units of eps' norm, a number or a fraction; default that of the attack."""

    restarts: int = 1
    """Runs with new random starts; the worst case of each example is kept."""

    targeted: str | None = None
    """Targeted attack: next, random, least_likely, or the number of a class (whose examples are left out)."""

    batch_size: int = 500
    """Examples of a forward pass outside the attack."""

    slots: int | None = None
    """Examples attacked at once; default chosen from the device's memory."""

    save_adv: Path | None = None
    """Write x, x_adv, y, index, success, size to this .npz file."""


@dataclass(frozen=True, kw_only=True)
class Report(Common):
    """Show stored reports as one page; several are compared."""

    reports: tyro.conf.Positional[tuple[Path, ...]] = field(default=())
    """Files report.json, or folders that hold one."""

    out: Path | None = None
    """The page, page.html or page.md; without it a table is printed."""

    robustbench: Path | None = None
    """Also write the entries of a RobustBench leaderboard, one for each model, to this .json file."""


@dataclass(frozen=True, kw_only=True)
class VerifyReport(Machine):
    """Check every adversarial example of a stored report again, from the disk.

    Each must be float32, inside bounds and budget, and misclassified by the model. Exit code 1 if one is not.
    """

    report: tyro.conf.Positional[Path]
    """The folder of a report (with adversarial.npz), or its report.json."""

    model: str | None = None
    """MODEL, as for evaluate; default the one that `jaxadv evaluate` wrote down beside the report."""

    batch_size: int = 500
    """Examples of a forward pass."""


@dataclass(frozen=True, kw_only=True)
class Privacy(Machine):
    """Count what a private run costs, find the noise or the steps of a budget, or audit the private step.

    The defaults are those of dp-accounting's users: privacy loss distributions, delta 1e-5.
    """

    action: tyro.conf.Positional[Literal["epsilon", "calibrate", "audit"]] = "epsilon"
    """epsilon of a run; calibrate the noise (with --steps) or the steps (with --noise-multiplier); audit one step."""

    n: int | None = None
    """Number of training examples."""

    batch_size: int | None = None
    """Expected examples in a step; each takes part by a coin of its own (Poisson)."""

    steps: int | None = None
    """Number of steps."""

    noise_multiplier: str | None = None
    """Standard deviation of the noise over the clip norm; audit takes 1 if none is given."""

    epsilon: str | None = None
    """The budget, for calibrate."""

    delta: str = "1e-5"
    """Delta of the budget, below one over the number of examples."""

    rows: int | None = None
    """Rows of a batch in memory, where larger samples are truncated; default enough for all but 1 in 10^25."""

    accountant: Literal["pld", "rdp"] = "pld"
    """Privacy loss distributions, or Renyi divergences (as most papers)."""

    trials: int = 20_000
    """Runs of the audit with, and without, the canary."""


@dataclass(frozen=True, kw_only=True)
class List(Common):
    """List attacks, threats, recipes, models, data sets and protocols."""

    what: tyro.conf.Positional[Topic] = "all"
    """What to list."""


@dataclass(frozen=True, kw_only=True)
class Claims(Common):
    """List, run or tabulate the experiments behind each method (needs a source checkout)."""

    action: tyro.conf.Positional[Literal["list", "run", "table"]] = "list"
    """list the claims, run one, or write RESULTS.md from the stored results."""

    name: tyro.conf.Positional[str | None] = None
    """Which claim to run."""

    root: Path = Path(".")
    """Folder of the source checkout, the one that holds benchmarks/."""

    smoke: bool = False
    """One step only: does it run?"""


@dataclass(frozen=True, kw_only=True)
class Data(Common):
    """Make an array_record set of raw files: IDX, .npz, CIFAR binaries, or folders train/CLASS/FILE of images."""

    action: tyro.conf.Positional[Literal["prepare"]]
    """prepare: write the set; --data tfds:NAME with --data-root reads it."""

    raw: tyro.conf.Positional[Path]
    """Folder of the raw files."""

    name: str
    """Name of the set: lower-case letters, digits, underscores."""

    out: Path
    """Folder of prepared sets; the set lies in OUT/NAME."""

    size: int | None = None
    """Side that images of a folder are brought to: the shorter side is scaled, the middle is cut out."""


@dataclass(frozen=True, kw_only=True)
class Bench(Common):
    """List or run the speed comparisons (needs a source checkout)."""

    action: tyro.conf.Positional[Literal["list", "run"]] = "list"
    """list the benchmarks or run one."""

    name: tyro.conf.Positional[str | None] = None
    """Which benchmark to run."""

    root: Path = Path(".")
    """Folder of the source checkout, the one that holds benchmarks/."""


COMMANDS: dict[str, type[Common]] = {
    "demo": Demo,
    "train": Train,
    "evaluate": Evaluate,
    "attack": Attack,
    "report": Report,
    "verify-report": VerifyReport,
    "privacy": Privacy,
    "list": List,
    "data": Data,
    "claims": Claims,
    "bench": Bench,
}
"""Name of a command to its arguments."""
