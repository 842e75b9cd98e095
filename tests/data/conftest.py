"""Writers of small files in the formats that the sources read."""

import io
import struct

import numpy as np
import pytest


def _idx_bytes(array, code=0x08):
    return bytes([0, 0, code, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def _write_jpegs(path, images, labels):
    from PIL import Image

    files = []
    for image in images:
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "JPEG", quality=75)
        files.append(buffer.getvalue())
    offsets = np.cumsum([0] + [len(f) for f in files]).astype(np.int64)
    np.savez(path, jpeg=np.frombuffer(b"".join(files), np.uint8), offsets=offsets, labels=np.asarray(labels, np.uint8))
    return files


@pytest.fixture
def idx_bytes():
    """Function (array, type code) -> content of an IDX file."""
    return _idx_bytes


@pytest.fixture
def write_jpegs():
    """Function (path, images, labels) -> the JPEG files, after writing them as one npz."""
    return _write_jpegs
