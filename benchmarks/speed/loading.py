"""Images per second that reach the program from a prepared set of JPEG files, by the number of worker processes.

A folder of random photographs-like images (smooth noise, so that files have the size of photographs) becomes a set as
`jaxadv data prepare` makes it; batches are drawn to the end, without any step in between, and the clock begins at the
first one, when the workers are there. What a pass costs is decoding, so the figures are those of the cores; the stream
is the same whatever the number of workers. How long the first batch takes stands beside.

Usage: python benchmarks/speed/loading.py [--workers 0 1 2 4] [--images 1024] [--epochs 4] [--batch 64] [--rounds 3]
Workers need pip install 'jaxadv[grain]'.
"""

import argparse
import statistics
import sys
import tempfile
import time
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
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        heavy = photographs(Path(folder) / "raw", args.images, args.size)
        made = data.prepare(Path(folder) / "raw", "photographs", Path(folder) / "sets", size=args.size)
        source = data.tfds_source(made, "train")

        def drained(workers: int) -> tuple[float, float]:
            """Seconds to the first batch, and images per second from there."""
            begun = time.perf_counter()
            stream = data.batches(source, args.batch, seed=0, epochs=args.epochs, workers=workers)
            next(stream)
            first = time.perf_counter()
            seen = sum(len(batch["y"]) for batch in stream)
            return first - begun, seen / (time.perf_counter() - first)

        found: dict[str, list] = {str(n): [] for n in args.workers}
        for _ in range(args.rounds):
            for n in args.workers:
                found[str(n)].append(drained(n))
    rows, base = [["workers", "images/s (range)", "of the first", "seconds to the first batch"]], None
    record: dict = {"images": args.images, "size": args.size, "batch": args.batch, "bytes of a file": heavy}
    for name, pairs in found.items():
        first, speed = (statistics.median(column) for column in zip(*pairs))
        low, high = (end(speed for _, speed in pairs) for end in (min, max))
        base = base or speed
        rows.append([name, f"{speed:.0f} ({low:.0f}-{high:.0f})", f"{speed / base:.2f}", f"{first:.1f}"])
        record[name] = {"images/s": speed, "least": low, "most": high, "first": first}
    print(harness.table(rows))
    record["environment"] = harness.environment()
    print(f"stored in {harness.store('loading', record)}")


if __name__ == "__main__":
    main()
