"""One convolution, several forms: the same numbers from the code path that is fast where the convolution runs.

What lives here: rewriting a single `conv_general_dilated` into an equivalent form. What does not: finding convolutions
in a function (that is `core.loop.canonical`). The forms:

| form | what it does | equal to the original |
| --- | --- | --- |
| `layout` | transposes to (N, spatial, C) x (spatial, I, O) and back | to the bit |
| `phases` | computes stride and input dilation as channels, without inserted zeros | to rounding |
| `product` | the same with one matrix product and shifted slices around it | to rounding |
| `winograd` | computes 2 x 2 outputs of a 3 x 3 kernel with 16 multiplications instead of 36 | to rounding |
| `taps` | one matrix product for each shift between input and a kernel as large as it | to rounding |

`phases` turns a convolution of stride s into one of stride 1 over s x s blocks read as channels (space to depth), and
an input-dilated one (the input gradient of a strided convolution) into one that computes its s x s output phases as
channels. `product` puts shifted slices of those blocks side by side and multiplies once; where outputs are smaller
than what is multiplied, and in input-dilated convolutions, it multiplies first and adds up shifted contributions.

`winograd` is the minimal filtering F(2 x 2, 3 x 3) of Lavin and Gray 2016, Fast algorithms for convolutional neural
networks, arXiv:1509.09308, section 4.1: sixteen matrix products on sums and differences of tiles. It serves kernels of
3 x 3 with stride one, in float32 or wider (lower precision would lose digits in the sums).

`taps` is for the gradient to a kernel, which is a convolution of inputs with a kernel as large as a feature map: few
outputs, each a sum over all positions and examples: one product for each shift of the smaller operand against the
other.

`choose` picks the form from the shapes alone, so a program is the same in every process and a resumed run repeats its
bits. The rule was found by measuring (`benchmarks/speed/convolutions.py`).
"""

import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

FORMS = ("layout", "phases", "product", "winograd", "taps")


def canonical_convolution(lhs, rhs, params: dict[str, Any], form: str | None = None):
    """Compute a convolution given by the parameters of `lax.conv_general_dilated_p` in another form.

    Args:
      lhs: the input, in whatever dimension order the parameters name.
      rhs: the kernel, likewise.
      params: the parameters of the primitive.
      form: one of `FORMS`, or None for `choose`.

    Returns:
      The output in the dimension order of the parameters.
    """
    spec = params["dimension_numbers"]
    spatial = len(spec.lhs_spec) - 2
    x = jnp.transpose(lhs, (spec.lhs_spec[0], *spec.lhs_spec[2:], spec.lhs_spec[1]))
    w = jnp.transpose(rhs, (*spec.rhs_spec[2:], spec.rhs_spec[1], spec.rhs_spec[0]))
    plain = (
        spatial == 2
        and params["feature_group_count"] == params["batch_group_count"] == 1
        and params["preferred_element_type"] in (None, x.dtype)
    )
    form = (choose(x.shape, w.shape, params) if plain else "layout") if form is None else form
    if form == "taps" and plain and _undilated(params):
        z = _taps(x, w, params)
    elif form in ("layout", "taps") or not plain or tuple(params["rhs_dilation"]) != (1, 1):
        z = _layout(x, w, params)
    elif form == "winograd":
        z = _winograd(x, w, params) if _minimal(x, w, params) else _layout(x, w, params)
    else:
        z = _phases(x, w, params, product=form == "product")
    order = (spec.out_spec[0], *spec.out_spec[2:], spec.out_spec[1])
    back = [order.index(d) for d in range(spatial + 2)]
    return jnp.transpose(z, back)


def choose(x_shape: Sequence[int], w_shape: Sequence[int], params: dict[str, Any]) -> str:
    """Choose the form of a plain two-dimensional convolution from its shapes.

    Args:
      x_shape: `[b, h, w, c]` of the input.
      w_shape: `[kh, kw, c, o]` of the kernel.
      params: the parameters of the primitive.

    Returns:
      The name of the form.
    """
    _, height, width, channels = x_shape
    kernel, outputs = w_shape[:2], w_shape[-1]
    dilation = params["lhs_dilation"]
    if _undilated(params) and max(kernel) > 1:
        to_kernel = all(k >= o for k, o in zip(kernel, _outputs(x_shape, w_shape, params)))
        if to_kernel and (max(params["rhs_dilation"]) == 1 or x_shape[0] * outputs >= 1024):
            return "taps"
    if max(params["rhs_dilation"]) > 1:
        return "layout"
    if max(dilation) > 1:
        if all(k % d == 0 for k, d in zip(kernel, dilation)):
            return "product"
        wide = height * width >= channels and outputs >= 4 and all(k > d for k, d in zip(kernel, dilation))
        return "phases" if wide else "layout"
    if max(params["window_strides"]) > 1:
        whole = all(k % s == 0 for k, s in zip(kernel, params["window_strides"]))
        return "product" if channels <= 4 or whole else "layout"
    if tuple(kernel) == (3, 3) and outputs >= 16:
        return "winograd" if channels >= 16 or channels == 1 else "product" if channels <= 4 else "layout"
    return "layout"


def _outputs(x_shape, w_shape, params) -> list[int]:
    """Height and width of the output."""
    sizes = zip(x_shape[1:3], params["lhs_dilation"], params["padding"], w_shape[:2], params["rhs_dilation"])
    spans = [(n - 1) * d + 1 + lo + hi - ((k - 1) * e + 1) for n, d, (lo, hi), k, e in sizes]
    return [span // s + 1 for span, s in zip(spans, params["window_strides"])]


def _undilated(params) -> bool:
    """Whether windows start at every position of the input, as in the gradient to a kernel."""
    return max(*params["window_strides"], *params["lhs_dilation"]) == 1


def _taps(x: Float[Array, "b h w c"], w: Float[Array, "kh kw c o"], params):
    """y[b, i] = sum_t sum_c x[b, i - low + s t, c] w[t, c], the smaller of x and w shifted against the other."""
    out, stride, low = _outputs(x.shape, w.shape, params), params["rhs_dilation"], [lo for lo, _ in params["padding"]]
    x, w = x.transpose(3, 1, 2, 0), w.transpose(2, 0, 1, 3)  # c counts examples here: they come first in memory
    windows = 2 * math.prod(out) * x.shape[-1]  # what is written for each position, in values
    slopes = math.prod(-(-n // s) for n, s in zip(out, stride)) * w.shape[-1] + math.prod(stride) * x.shape[-1]
    moved = _shifted_windows if windows < slopes else _shifted_slopes
    return moved(x, w, stride, low, out, params["precision"]).transpose(2, 0, 1, 3)


def _shifted_windows(x, w, stride, low, out, precision):
    """The windows of all outputs of a row side by side; one product for each row."""
    spans = [(k - 1) * s + 1 for k, s in zip(w.shape[1:], stride)]
    for axis, (lo, n, span) in enumerate(zip(low, out, spans)):
        x = _fit(x, axis + 1, lo, n - 1 + span)
    side = jnp.concatenate([x[:, :, j : j + spans[1] : stride[1]] for j in range(out[1])], axis=-1)
    rows = [side[:, i : i + spans[0] : stride[0]] for i in range(out[0])]
    return jnp.stack([_contracted(row, w, precision) for row in rows]).reshape(*out, -1, w.shape[-1])


def _shifted_slopes(x, w, stride, low, out, precision):
    """With i - low = s q + r, rests r are read as channels of x, and w is shifted by q: one product for each shift."""
    shifts, phases = [], []
    for axis, (s, lo, n) in enumerate(zip(stride, low, out)):
        base = lo if s > 1 else 0  # aligned, so that few shifts are needed; where s = 1 nothing has to be padded
        places = [divmod(i - lo + base, s) for i in range(n)]
        length = x.shape[axis + 1] if s == 1 else w.shape[axis + 1] + places[-1][0]
        x = _fit(x, axis + 1, base, length * s)
        shifts.append((places, length))
        phases.append(min(n, s))
    (rows, height), (columns, width) = shifts
    (sh, sw), (b, c) = stride, (x.shape[0], x.shape[-1])
    x = x.reshape(b, height, sh, width, sw, c)[:, :, : phases[0], :, : phases[1]].transpose(0, 1, 3, 2, 4, 5)
    x = x.reshape(b, height, width, -1)
    made = {}
    for p in sorted({p for p, _ in rows}):
        for q in sorted({q for q, _ in columns}):
            shifted = _fit(_fit(w, 1, p, height), 2, q, width)
            made[p, q] = _contracted(x, shifted, precision).reshape(*phases, c, -1)
    return jnp.stack([jnp.stack([made[p, q][r, t] for q, t in columns]) for p, r in rows])


def _contracted(x, w, precision):
    """[b, h, w, c] x [b, h, w, o] to [c, o]."""
    x, w = (a.reshape(-1, a.shape[-1]) for a in (x, w))
    return lax.dot_general(x, w, (((0,), (0,)), ((), ())), precision=precision)


def _minimal(x, w, params) -> bool:
    """Whether minimal filtering serves: 3 x 3, neither stride nor dilation, and digits to spare."""
    square = w.shape[:2] == (3, 3) and max(*params["window_strides"], *params["lhs_dilation"]) == 1
    return square and x.dtype == w.dtype and jnp.finfo(x.dtype).bits >= 32


def _winograd(x: Float[Array, "b h w c"], w, params):
    """Y = A' [(G k G') * (B' d B)] A over tiles d of 4 x 4 that overlap by two."""
    (b, height, width, _), channels, precision = x.shape, w.shape[-1], params["precision"]
    out = [n + lo + hi - 2 for n, (lo, hi) in zip((height, width), params["padding"])]
    tiles = [-(-n // 2) for n in out]
    for axis, ((lo, _), n) in enumerate(zip(params["padding"], tiles)):
        x = _fit(x, axis + 1, lo, 2 * n + 2)

    def spread(parts):
        return parts[0] - parts[2], parts[1] + parts[2], parts[2] - parts[1], parts[1] - parts[3]

    def filtered(k):
        return k[0], (k[0] + k[1] + k[2]) / 2, (k[0] - k[1] + k[2]) / 2, k[2]

    def gathered(parts):
        return parts[0] + parts[1] + parts[2], parts[1] - parts[2] - parts[3]

    rows = spread([x[:, i : i + 2 * tiles[0] - 1 : 2] for i in range(4)])
    pixels = [spread([r[:, :, j : j + 2 * tiles[1] - 1 : 2] for j in range(4)]) for r in rows]
    kernels = [filtered(k) for k in filtered(w)]
    products = [[_matmul(d, k, precision) for d, k in zip(*pair)] for pair in zip(pixels, kernels)]
    half = [gathered(column) for column in zip(*products)]  # [4 columns][2 rows]
    y = jnp.stack([jnp.stack(gathered(row), axis=3) for row in zip(*half)], axis=2)  # b, th, row, tw, column, o
    y = y.reshape(b, 2 * tiles[0], 2 * tiles[1], channels)
    return y[:, : out[0], : out[1]]


def _layout(x, w, params):
    names = {1: ("NWC", "WIO", "NWC"), 2: ("NHWC", "HWIO", "NHWC"), 3: ("NDHWC", "DHWIO", "NDHWC")}
    spatial = x.ndim - 2
    if spatial in names:
        numbers = lax.conv_dimension_numbers(x.shape, w.shape, names[spatial])
    else:
        last = spatial + 1
        numbers = lax.ConvDimensionNumbers(
            (0, last, *range(1, last)), (last, spatial, *range(spatial)), (0, last, *range(1, last))
        )
    return lax.conv_general_dilated(
        x,
        w,
        params["window_strides"],
        params["padding"],
        params["lhs_dilation"],
        params["rhs_dilation"],
        numbers,
        params["feature_group_count"],
        params["batch_group_count"],
        params["precision"],
        params["preferred_element_type"],
    )


def _phases(x: Float[Array, "b h w c"], w, params, *, product: bool):
    """Stride or input dilation as channels: a stride-one convolution without inserted zeros."""
    dilation, stride, padding = params["lhs_dilation"], params["window_strides"], params["padding"]
    sizes = [(n - 1) * d + 1 + lo + hi - k for n, d, (lo, hi), k in zip(x.shape[1:3], dilation, padding, w.shape[:2])]
    out = [size // s + 1 for size, s in zip(sizes, stride)]
    if max(dilation) > 1:
        if max(stride) > 1:
            return _layout(x, w, params)
        dilated = _scattered if product else _dilated
        return dilated(x, w, dilation, [lo for lo, _ in padding], out, params["precision"])
    return _strided(x, w, stride, [lo for lo, _ in padding], out, params["precision"], product)


def _strided(x, w, stride, low, out, precision, product):
    """y[o] = sum_t w[t] x[o s + t - low]: taps t = s u + r become window u over channel block r."""
    windows = []
    for axis, (s, lo, o) in enumerate(zip(stride, low, out)):
        taps = -(-w.shape[axis] // s)
        w = _fit(w, axis, 0, taps * s)
        x = _fit(x, axis + 1, lo, (o - 1 + taps) * s)
        windows.append(taps)
    (sh, sw), (b, h, v, c) = stride, x.shape
    x = x.reshape(b, h // sh, sh, v // sw, sw, c).transpose(0, 1, 3, 2, 4, 5).reshape(b, h // sh, v // sw, sh * sw * c)
    w = w.reshape(windows[0], sh, windows[1], sw, c, -1).transpose(0, 2, 1, 3, 4, 5)
    w = w.reshape(*windows, sh * sw * c, -1)
    if not product:
        return _valid(x, w, precision)
    height, width = out
    b, h, v, channels = x.shape
    if channels > w.shape[-1] and h * v <= 2 * height * width:
        # multiplied first: the outputs, which are smaller, are shifted and added
        z = _matmul(x, w.transpose(2, 0, 1, 3).reshape(channels, -1), precision).reshape(b, h, v, *windows, -1)
        parts = [z[:, i : i + height, j : j + width, i, j] for i in range(windows[0]) for j in range(windows[1])]
        return sum(parts[1:], start=parts[0])
    taps = [x[:, i : i + height, j : j + width] for i in range(windows[0]) for j in range(windows[1])]
    side = jnp.concatenate(taps, axis=-1) if len(taps) > 1 else taps[0]
    return _matmul(side, w.reshape(-1, w.shape[-1]), precision)


def _scattered(x, w, dilation, low, out, precision):
    """y[s j + t - first] += x[j] w[K - 1 - t]: every input pixel adds a window of K outputs; windows overlap."""
    (sh, sw), (b, h, v, c), o = dilation, x.shape, w.shape[-1]
    blocks = [-(-k // s) for k, s in zip(w.shape[:2], dilation)]  # a window is so many steps of s
    for axis, (n, s) in enumerate(zip(blocks, dilation)):
        w = _fit(w, axis, 0, n * s)
    w = w[::-1, ::-1].reshape(blocks[0], sh, blocks[1], sw, c, o).transpose(4, 0, 2, 1, 3, 5).reshape(c, -1)
    z = _matmul(x, w, precision).reshape(b, h, v, *blocks, sh * sw * o)
    height, width = h + blocks[0] - 1, v + blocks[1] - 1
    parts = [
        _fit(_fit(z[:, :, :, i, j], 1, i, height), 2, j, width) for i in range(blocks[0]) for j in range(blocks[1])
    ]
    y = sum(parts[1:], start=parts[0]).reshape(b, height, width, sh, sw, o)
    y = y.transpose(0, 1, 3, 2, 4, 5).reshape(b, height * sh, width * sw, o)
    for axis, (n, s, lo, size) in enumerate(zip(blocks, dilation, low, out)):
        y = _fit(y, axis + 1, lo + 1 - n * s, size)
    return y


def _dilated(x, w, dilation, low, out, precision):
    """y[s j + r] = sum_u w[t_r + s u] x[j + off_r + u], t_r = (low - r) mod s: one output channel block for each r."""
    rows, channels = dilation[0], w.shape[-1]
    for axis, (s, lo, o) in enumerate(zip(dilation, low, out)):
        starts = [(lo - r) % s for r in range(s)]
        offsets = [(r + t - lo) // s for r, t in enumerate(starts)]
        first = min(offsets)
        taps = max(off - first + -(-(w.shape[axis] - t) // s) for off, t in zip(offsets, starts))
        parts = [
            _fit(lax.slice_in_dim(w, t, None, s, axis), axis, off - first, taps) for off, t in zip(offsets, starts)
        ]
        w = jnp.stack(parts, axis=-2).reshape(*parts[0].shape[:3], -1)  # channels (r, whatever stood there)
        x = _fit(x, axis + 1, -first, -(-o // s) - 1 + taps)
    z = _valid(x, w, precision)  # channels in the order (r_w, r_h, o)
    b, h, v, _ = z.shape
    z = z.reshape(b, h, v, dilation[1], rows, channels).transpose(0, 1, 4, 2, 3, 5)
    z = z.reshape(b, h * rows, v * dilation[1], channels)
    return z[:, : out[0], : out[1]]


def _fit(a, axis: int, low: int, length: int):
    """Pad with zeros (or crop, where negative) so that `low` rows stand before and the axis has `length`."""
    high = length - a.shape[axis] - low
    config = [(0, 0, 0)] * a.ndim
    config[axis] = (low, high, 0)
    return lax.pad(a, jnp.zeros((), a.dtype), config)


def _valid(x, w, precision):
    return lax.conv_general_dilated(
        x, w, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"), precision=precision
    )


def _matmul(x, w, precision):
    """[b, h, w, c] x [c, o], without merging the batch with anything."""
    return lax.dot_general(x, w, (((3,), (0,)), ((), ())), precision=precision)
