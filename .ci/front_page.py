"""Run the example of the front page as printed, and judge what it made: `python .ci/front_page.py README.md`."""

import re
import sys
from pathlib import Path


def main(page: Path) -> None:
    """Run the one Python block; stop unless its report is of a network that is robust to some degree."""
    (block,) = re.findall(r"^```python\n(.*?)^```$", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    names: dict = {"__name__": "front_page"}
    exec(compile(block, str(page), "exec"), names)
    model = names["report"].models[0]
    print(f"front page: {model.n} examples, clean {model.clean_accuracy:.3f}, robust {model.robust_accuracy:.3f}")
    if not (model.n == 100 and 0.3 < model.robust_accuracy <= model.clean_accuracy <= 1 and model.clean_accuracy > 0.8):
        raise SystemExit("the example of the front page no longer shows what it must")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
