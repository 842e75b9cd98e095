"""What the documents say is run: code blocks, commands, links, doctests and the notebook's text form."""

import ast
import doctest
import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "benchmarks").rglob("*.md")])


def blocks(page: str, language: str) -> list[str]:
    """The fenced blocks of one language, in order."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)


def run(page: str) -> dict:
    """Run all Python blocks of a page, one after the other, in one namespace."""
    names: dict = {"__name__": page}
    for number, block in enumerate(blocks(page, "python"), 1):
        exec(compile(block, f"{page}, block {number}", "exec"), names)
    return names


def test_the_skeleton_attack_and_its_test_run_as_printed():
    names = run("CONTRIBUTING.md")
    tests = [thing for name, thing in names.items() if name.startswith("test_")]
    assert len(tests) == 1
    tests[0]()


def test_the_skeleton_attack_serves_like_every_other():
    import jax
    import jax.numpy as jnp
    import numpy as np

    import jaxadv as ja
    from jaxadv.core import serve

    noise = run("CONTRIBUTING.md")["noise"]
    model = ja.pure(lambda w, x: x @ w, jnp.array([[1.0, -1.0], [0.5, 0.0]]))
    x = jax.random.uniform(jax.random.key(1), (7, 2))
    y = jnp.zeros(7, jnp.int32)
    attack = noise(ja.linf(0.2), steps=6)
    whole, served = attack.run(jax.random.key(0), model, x, y), serve(attack, jax.random.key(0), model, x, y, slots=3)
    np.testing.assert_array_equal(whole.x, served.x)
    np.testing.assert_array_equal(whole.success, served.success)


def test_the_front_page_example_is_short_and_ci_runs_it_from_the_wheel():
    (block,) = blocks("README.md", "python")
    compile(block, "README.md", "exec")
    assert len(block.strip().split("\n")) <= 16
    ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert '"$work/bare/bin/python" "$root/.ci/front_page.py" "$root/README.md"' in ci


def test_the_commands_of_the_front_page_are_the_ones_that_ci_runs():
    commands = "\n".join(blocks("README.md", "sh"))
    ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert 'pip install ".[test]"\npytest\n' in commands and "in_311 pytest |" in ci and '".[test]"' in ci
    assert "pip install .\njaxadv demo --out demo\n" in commands and 'jaxadv" demo --out demo' in ci


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_links_inside_the_project_lead_somewhere(page):
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    targets = [t for t in re.findall(r"\]\(([^)\s]+)\)", text) if not re.match(r"[a-z]+:|#", t)]
    assert [t for t in targets if not (page.parent / t.split("#")[0]).exists()] == []


def test_the_floors_in_the_text_are_the_floors_in_the_test():
    layout = ast.parse((ROOT / "tests" / "test_layout.py").read_text(encoding="utf-8"))
    node = next(n for n in layout.body if isinstance(n, ast.Assign) and getattr(n.targets[0], "id", "") == "FLOORS")
    floors = ast.literal_eval(node.value)
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d) \| `(\w+)(?:/|\.py)` \|", text, flags=re.MULTILINE)
    assert {room: int(floor) for floor, room in rows} == floors


def modules_with_examples():
    files = sorted((ROOT / "jaxadv").rglob("*.py"))
    return [p.relative_to(ROOT).with_suffix("") for p in files if re.search(r"^\s*>>> ", p.read_text("utf-8"), re.M)]


@pytest.mark.parametrize("path", modules_with_examples(), ids=lambda p: p.as_posix())
def test_examples_in_docstrings_print_what_they_say(path):
    module = importlib.import_module(".".join(p for p in path.parts if p != "__init__"))
    outcome = doctest.testmod(module, optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    assert outcome.attempted > 0 and outcome.failed == 0


@pytest.mark.parametrize("path", sorted((ROOT / "notebooks").iterdir()), ids=lambda p: p.name)
def test_a_notebook_is_kept_as_text_that_opens_in_jupyter(path):
    if path.suffix == ".ipynb" or path.name.startswith("."):
        return  # made from the text, and ignored by git; CI executes the text
    text = path.read_text(encoding="utf-8")
    assert path.suffix == ".py" and "formats: ipynb,py:percent" in text and "name: python3" in text
    assert text.count("\n# %% [markdown]\n") >= 2 and text.count("\n# %%\n") >= 2
    compile(text, path.name, "exec")
