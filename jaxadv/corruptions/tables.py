"""The settings of the corruptions as published: five severities each, for small images and for large ones.

What lives here: numbers. `small` is CIFAR-C's (32 pixels), `large` is ImageNet-C's (224 pixels); one row for each
severity. What does not: what the numbers mean (the docstrings in `common.py` and `weather.py` say it).

References:
  Hendrycks and Dietterich 2019, Benchmarking neural network robustness to common corruptions and perturbations,
  arXiv:1903.12261; the numbers are those of the code that made the files (make_cifar_c.py, make_imagenet_c.py).
"""

Rows = tuple[tuple[float, ...], ...]


def _column(*values: float) -> Rows:
    return tuple((value,) for value in values)


TABLES: dict[str, dict[str, Rows]] = {
    "gaussian_noise": {"small": _column(0.04, 0.06, 0.08, 0.09, 0.1), "large": _column(0.08, 0.12, 0.18, 0.26, 0.38)},
    "shot_noise": {"small": _column(500, 250, 100, 75, 50), "large": _column(60, 25, 12, 5, 3)},
    "impulse_noise": {"small": _column(0.01, 0.02, 0.03, 0.05, 0.07), "large": _column(0.03, 0.06, 0.09, 0.17, 0.27)},
    "defocus_blur": {
        "small": ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1)),
        "large": ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5)),
    },
    "glass_blur": {
        "small": ((0.05, 1, 1), (0.25, 1, 1), (0.4, 1, 1), (0.25, 1, 2), (0.4, 1, 2)),
        "large": ((0.7, 1, 2), (0.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2)),
    },
    "motion_blur": {
        "small": ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5)),
        "large": ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15)),
    },
    "zoom_blur": {  # the factors are arange(1, end, step)
        "small": ((1.06, 0.01), (1.11, 0.01), (1.16, 0.01), (1.21, 0.01), (1.26, 0.01)),
        "large": ((1.11, 0.01), (1.16, 0.01), (1.21, 0.02), (1.26, 0.02), (1.31, 0.03)),
    },
    "snow": {
        "small": (
            (0.1, 0.2, 1, 0.6, 8, 3, 0.95),
            (0.1, 0.2, 1, 0.5, 10, 4, 0.9),
            (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
            (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85),
            (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8),
        ),
        "large": (
            (0.1, 0.3, 3, 0.5, 10, 4, 0.8),
            (0.2, 0.3, 2, 0.5, 12, 4, 0.7),
            (0.55, 0.3, 4, 0.9, 12, 8, 0.7),
            (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65),
            (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55),
        ),
    },
    "frost": {
        "small": ((1, 0.2), (1, 0.3), (0.9, 0.4), (0.85, 0.4), (0.75, 0.45)),
        "large": ((1, 0.4), (0.8, 0.6), (0.7, 0.7), (0.65, 0.7), (0.6, 0.75)),
    },
    "fog": {
        "small": ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75)),
        "large": ((1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4)),
    },
    "brightness": {"small": _column(0.05, 0.1, 0.15, 0.2, 0.3), "large": _column(0.1, 0.2, 0.3, 0.4, 0.5)},
    "contrast": {"small": _column(0.75, 0.5, 0.4, 0.3, 0.15), "large": _column(0.4, 0.3, 0.2, 0.1, 0.05)},
    "elastic_transform": {  # shares of the size; 244 / 224 of it for large images, a slip that the files were made with
        "small": ((0, 0, 0.08), (0.05, 0.2, 0.07), (0.08, 0.06, 0.06), (0.1, 0.04, 0.05), (0.1, 0.03, 0.03)),
        "large": ((2, 0.7, 0.1), (2, 0.08, 0.2), (0.05, 0.01, 0.02), (0.07, 0.01, 0.02), (0.12, 0.01, 0.02)),
    },
    "pixelate": {"small": _column(0.95, 0.9, 0.85, 0.75, 0.65), "large": _column(0.6, 0.5, 0.4, 0.3, 0.25)},
    "jpeg_compression": {"small": _column(80, 65, 58, 50, 40), "large": _column(25, 18, 15, 10, 7)},
    "speckle_noise": {"small": _column(0.06, 0.1, 0.12, 0.16, 0.2), "large": _column(0.15, 0.2, 0.35, 0.45, 0.6)},
    "gaussian_blur": {"small": _column(0.4, 0.6, 0.7, 0.8, 1), "large": _column(1, 2, 3, 4, 6)},
    "spatter": {
        "small": (
            (0.62, 0.1, 0.7, 0.7, 0.5, 0),
            (0.65, 0.1, 0.8, 0.7, 0.5, 0),
            (0.65, 0.3, 1, 0.69, 0.5, 0),
            (0.65, 0.1, 0.7, 0.69, 0.6, 1),
            (0.65, 0.1, 0.5, 0.68, 0.6, 1),
        ),
        "large": (
            (0.65, 0.3, 4, 0.69, 0.6, 0),
            (0.65, 0.3, 3, 0.68, 0.6, 0),
            (0.65, 0.3, 2, 0.68, 0.5, 0),
            (0.65, 0.3, 1, 0.65, 1.5, 1),
            (0.67, 0.4, 1, 0.65, 1.5, 1),
        ),
    },
    "saturate": {
        "small": ((0.3, 0), (0.1, 0), (1.5, 0), (2, 0.1), (2.5, 0.2)),
        "large": ((0.3, 0), (0.1, 0), (2, 0), (5, 0.1), (20, 0.2)),
    },
}
"""Type to `small` and `large`, each five rows of numbers."""

BENCHMARK = tuple(TABLES)[:15]
"""The fifteen types that CIFAR-C and ImageNet-C are made of, over which errors are averaged."""

EXTRA = tuple(TABLES)[15:]
"""The four types that are kept for validation."""
