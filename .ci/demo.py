"""Fail unless the report of the demo is whole and tells its two networks apart: `python .ci/demo.py FOLDER`."""

import json
import sys
from pathlib import Path

KEYS = "name n clean_accuracy clean_interval robust_accuracy robust_interval threat attacks flags".split()


def main(folder: Path) -> None:
    """Read `report.json` and `report.html` and stop at what is missing or not as it must be."""
    models = json.loads((folder / "report.json").read_text(encoding="utf-8"))["models"]
    if len(models) != 2 or any(key not in model for model in models for key in KEYS):
        raise SystemExit(f"report.json must have two models with the keys {', '.join(KEYS)}")
    if "<svg" not in (folder / "report.html").read_text(encoding="utf-8"):
        raise SystemExit("report.html must have figures")
    standard, robust = models
    holds = {
        "360 examples each": standard["n"] == robust["n"] == 360,
        "both classify clean images": standard["clean_accuracy"] > 0.95 and robust["clean_accuracy"] > 0.9,
        "standard training is not robust": standard["robust_accuracy"] < 0.2,
        "adversarial training is": robust["robust_accuracy"] > 0.5,
        "their intervals are apart": standard["robust_interval"][1] < robust["robust_interval"][0],
        "no error is flagged": not [f for m in models for f in m["flags"] if f["severity"] == "error"],
    }
    if missed := [what for what, held in holds.items() if not held]:
        raise SystemExit(f"the demo no longer shows what it must: {'; '.join(missed)}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
