"""Corruptions in images per second: one batched program against a loop over images with NumPy, SciPy and Pillow.

The loop does to each image what the published code does, with the same libraries; types that it needs more for (OpenCV,
ImageMagick) are left out. Both get the same images and severity 3 of the table that suits the size.

Usage: python benchmarks/speed/corruptions.py [--size 32] [--images 256] [--rounds 5] [--types jpeg_compression ...]
"""

import argparse
import io
import sys
from pathlib import Path

import jax
import numpy as np
from PIL import Image
from scipy import ndimage

from jaxadv import corruptions
from jaxadv.corruptions.base import settings

sys.path.insert(0, str(Path(__file__).parent))
import harness

SEVERITY = 3


def zoomed(x, factor):
    """The middle of an image, enlarged to its size."""
    n = len(x)
    kept = int(np.ceil(n / factor))
    first = (n - kept) // 2
    large = ndimage.zoom(x[first : first + kept, first : first + kept], (factor, factor, 1), order=1)
    cut = (len(large) - n) // 2
    return large[cut : cut + n, cut : cut + n]


def pictures(x):
    """An image as Pillow takes it."""
    return Image.fromarray(np.uint8(255 * x))


def through_jpeg(x, quality):
    """Compress and decompress."""
    file = io.BytesIO()
    pictures(x).save(file, "JPEG", quality=int(quality))
    return np.asarray(Image.open(file)) / 255


def through_boxes(x, share):
    """Shrink and enlarge."""
    n = len(x)
    small = pictures(x).resize((int(n * share), int(n * share)), Image.Resampling.BOX)
    return np.asarray(small.resize((n, n), Image.Resampling.BOX)) / 255


def zoom_blur(x, end, step):
    """Average enlargements."""
    factors = np.arange(1, end, step)
    return (x + sum(zoomed(x, f) for f in factors)) / (len(factors) + 1)


def loops(random):
    """Type to a function of one image and the row of settings."""
    return {
        "gaussian_noise": lambda x, c: x + random.normal(size=x.shape, scale=c),
        "shot_noise": lambda x, c: random.poisson(x * c) / c,
        "gaussian_blur": lambda x, c: ndimage.gaussian_filter(x, (c, c, 0), mode="nearest"),
        "zoom_blur": zoom_blur,
        "contrast": lambda x, c: (x - x.mean((0, 1))) * c + x.mean((0, 1)),
        "pixelate": through_boxes,
        "jpeg_compression": through_jpeg,
    }


def main() -> None:
    """Measure, print the table, store the record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--types", nargs="*", default=())
    parser.add_argument("--store", action="store_true", help="write results/corruptions_SIZE.json")
    args = parser.parse_args()
    random = np.random.default_rng(0)
    row, column = np.mgrid[: args.size, : args.size] / args.size
    wave = 0.5 + 0.4 * np.sin(6 * row[..., None] + np.arange(3)) * np.cos(5 * column[..., None])
    x = np.clip(wave + 0.05 * random.normal(size=(args.images, *wave.shape)), 0, 1).astype(np.float32)
    rows, record = [["type", "ours, images/s", "loop, images/s", "ratio"]], {}
    for name, loop in loops(random).items():
        if args.types and name not in args.types:
            continue
        setting = settings(name, x.shape, None)[SEVERITY - 1]
        run = jax.jit(lambda key, x, severity, name=name: corruptions.CORRUPTIONS[name](key, x, severity))
        found = harness.side_by_side(
            {
                "ours": lambda run=run: run(jax.random.key(0), x, SEVERITY).block_until_ready(),
                "loop": lambda loop=loop, setting=setting: [np.clip(loop(image, *setting), 0, 1) for image in x],
            },
            args.rounds,
        )
        speed = {who: args.images / times["median"] for who, times in found.items()}
        record[name] = found
        ratio = speed["ours"] / speed["loop"]
        rows.append([name, f"{speed['ours']:.0f}", f"{speed['loop']:.0f}", f"{ratio:.2f}"])
    print(harness.table(rows))
    if args.store:
        told = {"size": args.size, "images": args.images, "severity": SEVERITY, "environment": harness.environment()}
        print(harness.store(f"corruptions_{args.size}", told | {"seconds": record}))


if __name__ == "__main__":
    main()
