"""Store what the published code makes of four small images, for the parity test of the corruptions.

Runs the functions of `make_cifar_c.py` (of the repository hendrycks/robustness, given as a checkout) as they stand, on
NumPy, SciPy, scikit-image, OpenCV, Pillow and ImageMagick (through Wand); jaxadv is not imported. Before each call the
global generator of NumPy is seeded with `1000 severity + image`, so that the test can draw the same numbers. Stored:
the images; of each type, severity and image every third pixel in both directions (as 16-bit shares of one, real
numbers before they are cut to bytes) and the mean absolute change of all pixels; the tables of settings of both sizes.
Frost is stored as its change alone, since its photographs are not ours.

Usage: python benchmarks/parity/corruptions.py CHECKOUT tests/fixtures/corruptions_reference.npz
"""

import ast
import ctypes
import os
import sys
from io import BytesIO
from pathlib import Path
from typing import Any
from unittest import mock

import cv2
import numpy as np
import skimage
from PIL import Image
from scipy import ndimage
from skimage import color, filters, util
from wand.api import library
from wand.image import Image as WandImage

TYPES = (
    "gaussian_noise shot_noise impulse_noise defocus_blur glass_blur motion_blur zoom_blur snow frost fog brightness "
    "contrast elastic_transform pixelate jpeg_compression speckle_noise gaussian_blur spatter saturate"
).split()
STATISTICS_ONLY = ("shot_noise", "impulse_noise", "frost")
FILES = {"small": "make_cifar_c.py", "large": "make_imagenet_c.py"}
SIZES = {"small": 32, "large": 244}


def images() -> np.ndarray:
    """Four images of 32 x 32 with slopes, edges, stripes and grain."""
    random = np.random.RandomState(0)
    row, column = np.mgrid[:32, :32] / 31
    made = []
    for i in range(4):
        base = np.stack([0.5 + 0.3 * np.sin(3 * row * (i + 1) + c) * np.cos(2 * column + i * c) for c in range(3)], -1)
        base[(row - 0.5) ** 2 + (column - 0.3 - 0.1 * i) ** 2 < 0.05] += np.asarray([0.3, -0.2, 0.1 * i])
        base[(8 * column).astype(int) % 4 == i] *= 0.6
        made.append(base + 0.03 * random.normal(size=base.shape))
    return np.uint8(255 * np.clip(made, 0, 1))


def gaussian(image: np.ndarray, sigma: float, multichannel: bool = False, **options: Any) -> np.ndarray:
    """`skimage.filters.gaussian` under its former argument."""
    return filters.gaussian(image, sigma=sigma, channel_axis=-1 if multichannel else None, **options)


def functions(path: Path) -> tuple[dict[str, Any], dict[str, ast.FunctionDef]]:
    """The functions and classes of a published script, without what it does on import."""
    tree = ast.parse(path.read_text())
    kept: list[ast.stmt] = [node for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    kept = [node for node in kept if getattr(node, "name", "") != "DistortImageFolder"]
    library.MagickMotionBlurImage.argtypes = (ctypes.c_void_p, *[ctypes.c_double] * 3)
    names: dict[str, Any] = {
        "np": np, "sk": skimage, "cv2": cv2, "gaussian": gaussian, "BytesIO": BytesIO, "PILImage": Image,
        "WandImage": WandImage, "wandlibrary": library, "scizoom": ndimage.zoom,
        "map_coordinates": ndimage.map_coordinates,
    }  # fmt: skip
    skimage.util, skimage.color = util, color
    exec(compile(ast.Module(kept, []), str(path), "exec"), names)
    return names, {node.name: node for node in kept if isinstance(node, ast.FunctionDef)}


def settings(node: ast.FunctionDef, name: str, size: int) -> np.ndarray:
    """The five rows of settings that a function chooses from."""
    chosen = next(
        n.value.value
        for n in ast.walk(node)
        if isinstance(n, ast.Assign) and isinstance(n.value, ast.Subscript) and getattr(n.targets[0], "id", "") == "c"
    )
    rows = eval(compile(ast.Expression(chosen), "settings", "eval"), {"np": np, "IMSIZE": size})
    if name == "zoom_blur":
        return np.asarray([(len(row), row[-1], row[1] - row[0]) for row in rows])
    rows = np.asarray(rows, np.float64).reshape(5, -1)
    return rows / size if name == "elastic_transform" else rows


def main(checkout: str, path: str) -> None:
    """Run everything and write the fixture."""
    folder = Path(checkout) / "ImageNet-C" / "create_c"
    x = images()
    stored: dict[str, np.ndarray] = {"x": x}
    made = {size: functions(folder / file) for size, file in FILES.items()}
    for size, (_, nodes) in made.items():
        stored |= {f"table.{size}.{name}": settings(nodes[name], name, SIZES[size]) for name in TYPES}
    names, path_of_fixture = made["small"][0], Path(path).resolve()
    os.chdir(folder)  # the photographs of frost are found there
    with (
        mock.patch.object(np, "float_", np.float64, create=True),
        mock.patch.object(np, "fromstring", np.frombuffer),
        np.errstate(invalid="ignore"),
    ):
        for name in TYPES:
            out = np.zeros((5, 4, 32, 32, 3))
            for severity in range(1, 6):
                for i, image in enumerate(x):
                    np.random.seed(1000 * severity + i)
                    out[severity - 1, i] = np.asarray(names[name](Image.fromarray(image), severity)) / 255
            stored[f"change.{name}"] = np.abs(out - x[None] / 255).mean((2, 3, 4))
            if name not in STATISTICS_ONLY:
                stored[name] = np.round(65535 * np.clip(out[:, :, ::3, ::3], 0, 1)).astype(np.uint16)
            print(f"{name:18s} mean change by severity {stored[f'change.{name}'].mean(1).round(4)}")
    np.savez_compressed(path_of_fixture, **stored)  # pyright: ignore[reportArgumentType]
    print(f"{path_of_fixture}: {path_of_fixture.stat().st_size} bytes")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
