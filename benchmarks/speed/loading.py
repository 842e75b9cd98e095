"""Images per second that reach the program from a prepared set of JPEG files, by the number of worker processes.

A folder of random photographs-like images (smooth noise, so that files have the size of photographs) becomes a set as
`jaxadv data prepare` makes it; batches are drawn to the end, without any step in between. What a pass of one set costs
is decoding, so the figures are those of the cores; the stream is the same whatever the number of workers.

Usage: python benchmarks/speed/loading.py [--workers 0 1 2 4] [--images 1024] [--size 256] [--batch 64] [--rounds 3]
Workers need pip install 'jaxadv[grain]'.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from jaxadv import data

sys.path.insert(0, str(Path(__file__).parent))
import harness


def photographs(folder: Path, n: int, size: int) -> float:
    """Write images in folders of classes as ImageNet comes, and return the mean size of a file in bytes."""
    rng = np.random.default_rng(0)
    for part, count in (("train", n), ("val", 1)):
        for i in range(count):
            coarse = Image.fromarray(rng.integers(0, 256, (size // 8, size // 8, 3), np.uint8))
            image = np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC), np.int16)
            image = np.clip(image + rng.normal(0, 6, image.shape), 0, 255).astype(np.uint8)
            path = folder / part / f"n{i % 10:08d}" / f"{part}_{i}.JPEG"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(path, quality=90)
    return float(np.mean([path.stat().st_size for path in (folder / "train").rglob("*.JPEG")]))


def main() -> None:
    """Make the set, measure, print the table, store the record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workers", nargs="+", type=int, default=[0, 1, 2, 4])
    parser.add_argument("--images", type=int, default=1024)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        heavy = photographs(Path(folder) / "raw", args.images, args.size)
        made = data.prepare(Path(folder) / "raw", "photographs", Path(folder) / "sets", size=args.size)
        source = data.tfds_source(made, "train")

        def drained(workers: int) -> int:
            return sum(len(batch["y"]) for batch in data.batches(source, args.batch, seed=0, epochs=1, workers=workers))

        assert drained(0) == args.images // args.batch * args.batch
        sides = {str(n): (lambda n=n: drained(n)) for n in args.workers}
        times = harness.side_by_side(sides, args.rounds)
    rows = [["workers", "images/s (range)", "of none"]]
    base = times[str(args.workers[0])]["median"]
    for name, t in times.items():
        speed, low, high = (args.images / t[what] for what in ("median", "most", "least"))
        rows.append([name, f"{speed:.0f} ({low:.0f}-{high:.0f})", f"{base / t['median']:.2f}"])
    print(harness.table(rows))
    record = {"images": args.images, "size": args.size, "batch": args.batch, "bytes of a file": heavy, "times": times}
    record["environment"] = harness.environment()
    print(f"stored in {harness.store('loading', record)}")


if __name__ == "__main__":
    main()
