"""Common corruptions: noise, blurs, weather and digital artifacts at five severities, batched and keyed.

`CORRUPTIONS[name](key, x, severity)` is a pure function of a batch of images in [0, 1]; `corrupt` takes bytes too.
The door and the type are in `base.py`, the corruptions in `common.py` and `weather.py`, their published settings in
`tables.py`, the parts they are made of (blurs, warps, JPEG) in `image.py` and `jpeg.py`. What does not live here:
errors of models under corruption (`evaluate.card`).

References:
  Hendrycks and Dietterich 2019, Benchmarking neural network robustness to common corruptions and perturbations,
  arXiv:1903.12261.
"""

from typing import Any

import numpy as np

from jaxadv.core import check
from jaxadv.corruptions import image as image
from jaxadv.corruptions.base import SEVERITIES as SEVERITIES
from jaxadv.corruptions.base import Corruption as Corruption
from jaxadv.corruptions.base import as_bytes as as_bytes
from jaxadv.corruptions.common import COMMON
from jaxadv.corruptions.image import affine_warp as affine_warp
from jaxadv.corruptions.jpeg import jpeg as jpeg
from jaxadv.corruptions.jpeg import quantization as quantization
from jaxadv.corruptions.tables import BENCHMARK as BENCHMARK
from jaxadv.corruptions.tables import EXTRA as EXTRA
from jaxadv.corruptions.tables import TABLES as TABLES
from jaxadv.corruptions.weather import WEATHER

CORRUPTIONS: dict[str, Corruption] = {name: (COMMON | WEATHER)[name] for name in TABLES}
"""Name to corruption: the fifteen of the benchmark, then the four extra ones."""


def corrupt(key: Any, x: Any, name: str, severity: Any, *, index: Any = None, table: str | None = None) -> Any:
    """Corrupt a batch by the name of a corruption.

    Args:
      key: a typed key.
      x: `[b, h, w, c]`: real numbers in [0, 1], or uint8.
      name: a key of `CORRUPTIONS`.
      severity: 1 to 5, a number or one for each image.
      index: int `[b]` dataset indices, from which the random keys come; defaults to `arange(b)`.
      table: `small` (CIFAR-C) or `large` (ImageNet-C); default by size.

    Returns:
      float32 in [0, 1], or uint8 (cut as the published files were) where `x` is.

    Raises:
      ValueError: on an unknown name, inputs of another shape or range, another severity.
      TypeError: on integers that are not uint8.
    """
    corruption = check.choice("corruption", name, CORRUPTIONS)
    if getattr(x, "dtype", None) != np.uint8:
        return corruption(key, x, severity, index=index, table=table)
    return as_bytes(corruption(key, np.asarray(x, np.float32) / 255, severity, index=index, table=table))
