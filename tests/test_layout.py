"""The house's rules, read from the source: floors, border files, places where the world may be touched, dependencies.

`violations` is a function of a path and its text, so that each rule is shown to bite on a planted line.
"""

import ast
import re
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "jaxadv"

FLOORS = {  # docs/architecture.md, "Rooms and floors": a room imports only rooms on lower floors
    "core": 0,
    "losses": 1,
    "threats": 1,
    "parallel": 1,
    "data": 1,
    "corruptions": 1,
    "models": 2,
    "attacks": 3,
    "certify": 3,
    "explain": 4,
    "represent": 4,
    "continuous": 4,
    "spiking": 4,
    "privacy": 4,
    "hardware": 4,
    "train": 5,
    "evaluate": 5,
    "cli": 6,
}
BORDERS = {  # library: the only paths (regular expressions under jaxadv/) that may import it
    "flax": r"models/.*|(continuous|spiking|represent)/nets\.py|continuous/zerostable\.py",
    "diffrax": r"continuous/solve\.py",
    "orbax": r"train/checkpoint\.py",
    "tensorflow_datasets": r"data/.*",
    "array_record": r"data/.*",
    "tyro": r"cli/.*",
    "rich": r"cli/.*",
}
LATE = {
    "tensorflow_datasets",
    "array_record",
    "dp_accounting",
    "jax_privacy",
    "grain",
    "absl",
}  # imported inside functions only: the package works where they are absent
NEVER = {"tensorflow": "read records through tfds data sources", "torch": "pass arrays (models.from_torch_arrays)"}
DISTRIBUTIONS = {
    "absl": "absl-py",
    "PIL": "pillow",
    "orbax": "orbax-checkpoint",
    "tensorflow_datasets": "tensorflow-datasets",
    "yaml": "pyyaml",
}
WAITING = {  # declared, and imported by no file of the package yet
    "lineax": "arrives with diffrax; listed because influence functions and Gauss-Newton will import it directly",
    "optimistix": "arrives with diffrax; listed because root finding in attacks will import it directly",
    "chex": "named by the project's owner as part of the core stack; the tests count traces with it",
}


def sources(folder=PACKAGE):
    return sorted(folder.rglob("*.py"))


def room_of(relative: str) -> str:
    return relative.split("/")[0].removesuffix(".py")


class Reader(ast.NodeVisitor):
    """Collects what a file imports and touches, each with the functions that enclose it."""

    def __init__(self, relative: str):
        self.package = ["jaxadv", *relative.split("/")[:-1]]
        self.scopes: list[str] = []
        self.imports: list[tuple[str, bool, int]] = []  # dotted name, inside a function, line
        self.touches: list[tuple[str, int, tuple[str, ...]]] = []

    def visit_FunctionDef(self, node):
        self.scopes.append(node.name)
        self.generic_visit(node)
        self.scopes.pop()

    visit_AsyncFunctionDef = visit_FunctionDef

    def visit_Lambda(self, node):
        self.scopes.append("<lambda>")
        self.generic_visit(node)
        self.scopes.pop()

    def found(self, dotted, line):
        self.imports.append((dotted, bool(self.scopes), line))

    def visit_Import(self, node):
        for alias in node.names:
            self.found(alias.name, node.lineno)

    def visit_ImportFrom(self, node):
        base = node.module or ""
        if node.level:
            inside = self.package[: len(self.package) - node.level + 1]
            base = ".".join([*inside, *([node.module] if node.module else [])])
        for alias in node.names:
            self.found(f"{base}.{alias.name}", node.lineno)
            if (base, alias.name) in {("jax", "config"), ("os", "environ"), ("os", "getenv")}:
                self.touches.append((f"{base}.{alias.name}", node.lineno, tuple(self.scopes)))

    def visit_Call(self, node):
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        if name in {"import_module", "__import__"} and node.args and isinstance(node.args[0], ast.Constant):
            self.found(str(node.args[0].value), node.lineno)
        if isinstance(node.func, ast.Name) and name == "print":
            self.touches.append(("print", node.lineno, tuple(self.scopes)))
        self.generic_visit(node)

    def visit_Attribute(self, node):
        if isinstance(node.value, ast.Name):
            dotted = f"{node.value.id}.{node.attr}"
            if dotted in {"jax.config", "os.environ", "os.getenv", "np.random", "numpy.random", "random.random"}:
                self.touches.append((dotted, node.lineno, tuple(self.scopes)))
        self.generic_visit(node)

    def visit_Assert(self, node):
        self.touches.append(("assert", node.lineno, tuple(self.scopes)))
        self.generic_visit(node)


def read(relative: str, source: str) -> Reader:
    reader = Reader(relative)
    reader.visit(ast.parse(source))
    return reader


def violations(relative: str, source: str) -> list[str]:
    """What a file `jaxadv/<relative>` does against the rules, as sentences."""
    if relative == "__init__.py":
        return []  # the list of names stands above the floors; tests/test_public.py reads it
    found, room, reader = [], room_of(relative), read(relative, source)
    if room not in FLOORS and relative != "__main__.py":
        found.append(f"{relative}: the room {room!r} has no floor; give it one in docs/architecture.md and in FLOORS")
    floor = FLOORS.get(room, max(FLOORS.values()) + 1)
    for dotted, late, line in reader.imports:
        where, parts = f"{relative}:{line}", dotted.split(".")
        top = parts[0]
        if top == "jaxadv":
            target = parts[1] if len(parts) > 1 else ""
            if target == room or target == "__version__":
                continue
            if target not in FLOORS:
                found.append(f"{where} imports {dotted!r}; name the room: `from jaxadv.<room> import ...`")
            elif FLOORS[target] >= floor:
                found.append(f"{where} ({room}, floor {floor}) imports {target} (floor {FLOORS[target]})")
        if top in BORDERS and not re.fullmatch(BORDERS[top], relative):
            found.append(f"{where} imports {top}, which belongs to {BORDERS[top]}")
        if top in LATE and not late:
            found.append(f"{where} imports {top} at the top; import it inside the function that needs it")
        if top in NEVER:
            found.append(f"{where} imports {top}; {NEVER[top]}")
    for what, line, scopes in reader.touches:
        where = f"{relative}:{line}"
        allowed = {
            "jax.config": room == "cli",
            "os.environ": room == "cli" or (room == "data" and "root" in scopes),
            "os.getenv": room == "cli" or (room == "data" and "root" in scopes),
            "print": room == "cli",
            "np.random": True,  # generators only; see test_no_global_random_state
            "numpy.random": True,
        }
        if not allowed.get(what, False):
            found.append(f"{where} uses {what}")
    return found


@pytest.mark.parametrize("path", sources(), ids=lambda p: p.relative_to(PACKAGE).as_posix())
def test_a_file_keeps_to_its_floor_and_its_borders(path):
    assert violations(path.relative_to(PACKAGE).as_posix(), path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("relative", "source", "names"),
    [
        ("core/a.py", "from jaxadv.losses import margin", "losses"),
        ("core/a.py", "from jaxadv import threats", "threats"),
        ("losses.py", "import jaxadv.threats.balls", "threats"),  # rooms of one floor do not know each other
        ("train/a.py", "from jaxadv.evaluate import evaluate", "evaluate"),
        ("evaluate/a.py", "def f():\n    from jaxadv import train", "train"),
        ("attacks/a.py", "from ..models import nets\nfrom ..train import fit", "train"),
        ("models/a.py", "import importlib\nimportlib.import_module('jaxadv.attacks')", "attacks"),
        ("attacks/a.py", "import jaxadv as ja", "name the room"),
        ("parlor/a.py", "x = 1", "no floor"),
        ("attacks/a.py", "from flax import nnx", "flax"),
        ("spiking/cells.py", "import flax.nnx", "flax"),
        ("continuous/nets.py", "import diffrax", "diffrax"),
        ("train/trainer.py", "import orbax.checkpoint as ocp", "orbax"),
        ("evaluate/a.py", "def f():\n    import tensorflow_datasets as tfds", "tensorflow_datasets"),
        ("data/a.py", "import tensorflow_datasets as tfds", "inside the function"),
        ("data/a.py", "from array_record.python import array_record_module", "inside the function"),
        ("privacy/a.py", "import dp_accounting", "inside the function"),
        ("privacy/a.py", "from jax_privacy import auditing", "inside the function"),
        ("evaluate/a.py", "from rich.table import Table", "rich"),
        ("train/a.py", "import tyro", "tyro"),
        ("data/a.py", "def f():\n    import tensorflow as tf", "tensorflow"),
        ("models/a.py", "import torch", "torch"),
        ("core/a.py", "import jax\njax.config.update('jax_enable_x64', True)", "jax.config"),
        ("core/a.py", "from jax import config", "jax.config"),
        ("data/a.py", "import os\ndef load():\n    return os.environ['JAXADV_DATA']", "os.environ"),
        ("train/a.py", "import os\nos.getenv('HOME')", "os.getenv"),
        ("core/a.py", "def f(x):\n    assert x", "assert"),
        ("train/a.py", "print('loss')", "print"),
    ],
)
def test_each_rule_bites_on_a_planted_line(relative, source, names):
    found = violations(relative, source)
    assert len(found) == 1 and names in found[0]


@pytest.mark.parametrize(
    ("relative", "source"),
    [
        ("core/a.py", "from jaxadv.core import check\nfrom . import keys"),
        ("attacks/a.py", "from jaxadv.losses import margin\nfrom jaxadv import threats\nfrom ..core import check"),
        ("models/nets.py", "from flax import nnx"),
        ("spiking/nets.py", "from flax import nnx"),
        ("continuous/solve.py", "import diffrax"),
        ("train/checkpoint.py", "import orbax.checkpoint as ocp"),
        ("data/a.py", "def f():\n    import tensorflow_datasets as tfds"),
        ("data/a.py", "import os\ndef root():\n    return os.environ.get('JAXADV_DATA')"),
        ("evaluate/a.py", "from jaxadv import __version__"),
        ("cli/a.py", "import os, jax, tyro\nfrom jaxadv import train\nprint(os.environ)\njax.config.update('a', 1)"),
        ("__main__.py", "from jaxadv.cli import main"),
    ],
)
def test_what_the_rules_allow(relative, source):
    assert violations(relative, source) == []


GLOBAL_RANDOM = re.compile(
    r"\b(?:np|numpy)\.random\.(?!Generator|Philox|PCG64|SeedSequence|default_rng|BitGenerator)\w+"
)


def test_no_global_random_state():
    hits = [
        f"{path.relative_to(ROOT)}: {hit}"
        for path in sources()
        for hit in GLOBAL_RANDOM.findall(path.read_text(encoding="utf-8"))
    ]
    assert hits == []
    assert GLOBAL_RANDOM.findall("np.random.seed(0); numpy.random.normal(3)") and not GLOBAL_RANDOM.findall(
        "np.random.Generator(np.random.Philox(0))"
    )


def project():
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def bare(requirement: str) -> str:
    return re.match(r"[A-Za-z0-9._-]+", requirement)[0].lower().replace("_", "-")


def third_party(folder: Path) -> dict[str, set[str]]:
    """Distribution name to the files that import it."""
    own = {"jaxadv", "benchmarks", "tests", "conftest", "helpers"} | {p.stem for p in folder.glob("*.py")}
    found: dict[str, set[str]] = {}
    for path in sources(folder):
        relative = path.relative_to(folder).as_posix()
        for dotted, _, _ in read(relative, path.read_text(encoding="utf-8")).imports:
            top = dotted.split(".")[0]
            if top and top not in sys.stdlib_module_names and top not in own:
                found.setdefault(DISTRIBUTIONS.get(top, top).lower().replace("_", "-"), set()).add(relative)
    return found


def test_what_the_package_imports_is_declared_and_what_is_declared_is_imported():
    declared = {bare(r) for r in project()["dependencies"]}
    imported = third_party(PACKAGE)
    late = {DISTRIBUTIONS.get(name, name).replace("_", "-") for name in LATE}
    extra = {bare(r) for extra in ("privacy", "grain") for r in project()["optional-dependencies"][extra]}
    undeclared = {name: sorted(files) for name, files in imported.items() if name not in declared | (extra & late)}
    assert undeclared == {}, "add them to [project] dependencies, or import them no more"
    assert declared - set(imported) == set(WAITING), "declared but not imported must be listed in WAITING with a reason"


def test_what_the_tests_import_is_in_the_test_extra():
    extras = project()["optional-dependencies"]
    declared = {bare(r) for r in [*project()["dependencies"], *extras["test"], *extras["privacy"]]} | {"sklearn"}
    assert "scikit-learn" in {bare(r) for r in extras["test"]}
    undeclared = {name: sorted(files) for name, files in third_party(ROOT / "tests").items() if name not in declared}
    assert undeclared == {}


def test_constraints_pin_every_dependency_plainly():
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.+!_-]+", pin) for pin in pins)
    names = {bare(pin) for pin in pins}
    assert {bare(r) for r in project()["dependencies"]} <= names
    assert not names & {"tensorflow", "torch", "jaxadv"}
