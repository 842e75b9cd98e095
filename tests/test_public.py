"""The public names: they resolve, say what they are, and cost nothing until they are used."""

import ast
import inspect
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import jaxadv as ja

ROOT = Path(__file__).resolve().parent.parent
HEAVY = (
    "flax",
    "orbax",
    "diffrax",
    "tensorflow_datasets",
    "tensorflow",
    "torch",
    "tyro",
    "rich",
    "PIL",
    "array_record",
)


def alone(code: str) -> str:
    """Run code in a fresh interpreter at the root, without this run's import hook."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("name", [n for n in ja.__all__ if n != "__version__"])
def test_a_public_name_resolves_and_has_a_docstring(name):
    thing = getattr(ja, name)
    assert name in dir(ja)
    doc = thing.__doc__ if inspect.ismodule(thing) else inspect.getdoc(thing)
    assert doc and len(doc.split("\n")[0]) > 20


def test_the_names_of_the_front_page_are_public():
    rooms = "attacks certify core corruptions data evaluate losses models parallel privacy threats train recipes"
    names = "best_of fgsm fit from_nnx l0 l1 l2 linf pgd pure union"
    assert set(f"{rooms} {names}".split()) <= set(ja.__all__)


def test_names_come_from_their_rooms():
    assert ja.pgd is ja.attacks.pgd
    assert ja.linf is ja.threats.linf
    assert ja.fit is ja.train.fit
    assert ja.recipes.RECIPES["fast_mnist"] is ja.recipes.fast_mnist
    assert callable(ja.evaluate) and inspect.ismodule(ja.evaluate)


def test_the_names_that_type_checkers_see_are_the_names_that_exist():
    tree = ast.parse(Path(ja.__file__).read_text(encoding="utf-8"))
    block = next(n for n in tree.body if isinstance(n, ast.If) and getattr(n.test, "id", "") == "TYPE_CHECKING")
    seen = {alias.asname for node in block.body for alias in node.names}
    assert seen == set(ja.__all__) - {"__version__"}


def test_an_unknown_name_is_refused_with_the_known_ones():
    with pytest.raises(AttributeError, match=r"no public name 'pdg'.*pgd"):
        ja.pdg  # noqa: B018


def test_import_loads_nothing_heavy_and_initializes_no_backend():
    code = f"""
import sys
import jaxadv
print(sorted(m for m in {HEAVY!r} if m in sys.modules))
for name in ('core', 'losses', 'threats', 'attacks'):
    getattr(jaxadv, name)
print(sorted(m for m in {HEAVY!r} if m in sys.modules))
from jax._src import xla_bridge
print(xla_bridge.backends_are_initialized())
"""
    assert alone(code).split("\n") == ["[]", "[]", "False"]


def test_no_room_imports_tensorflow_and_none_initializes_a_backend():
    rooms = [n for n in ja.__all__ if inspect.ismodule(getattr(ja, n))]
    code = f"""
import sys
import jaxadv
for name in {rooms!r}:
    getattr(jaxadv, name)
print(sorted(m for m in ('tensorflow', 'tensorflow_datasets', 'torch', 'array_record', 'tyro') if m in sys.modules))
from jax._src import xla_bridge
print(xla_bridge.backends_are_initialized())
"""
    assert alone(code).split("\n") == ["[]", "False"]


def test_one_version_everywhere():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert ja.__version__ == project["version"]
    assert f"version: {ja.__version__}\n" in citation


def test_the_package_is_marked_as_typed():
    assert (Path(ja.__file__).parent / "py.typed").is_file()
