"""Bodies of requests: pictures and arrays that are answered, a bomb, damaged ones, and bytes that need not be HTTP."""

import base64
import io
import json
import socket
import struct
import zlib

import numpy as np
from PIL import Image


def picture(colour=(170, 120, 110), size=(60, 45), format="PNG", seed=1, **options):
    """A file of coloured noise: sharp enough to be answered."""
    blocks = (
        np.random.default_rng(seed).normal(colour, 60, (size[1] // 3, size[0] // 3, 3)).clip(0, 255).astype(np.uint8)
    )
    out = io.BytesIO()
    Image.fromarray(np.kron(blocks, np.ones((3, 3, 1), np.uint8))).save(out, format, **options)
    return out.getvalue()


def array(shape=(2, 40, 50, 3), dtype=np.uint8):
    out = io.BytesIO()
    np.save(out, np.random.default_rng(1).integers(0, 255, shape).astype(dtype))
    return out.getvalue()


PNG, JPEG, BMP = picture(), picture(format="JPEG", quality=95), picture(format="BMP")
B64 = base64.b64encode(PNG).decode()


def raw(server, data, end=True):
    """What comes back for bytes that need not be HTTP."""
    host, port = server.address.split(":")
    with socket.create_connection((host, int(port)), timeout=5) as connection:
        try:
            connection.sendall(data)
            if end:
                connection.shutdown(socket.SHUT_WR)
            return b"".join(iter(lambda: connection.recv(65536), b"")) if end else connection.recv(65536)
        except (ConnectionError, TimeoutError):
            return b""


BOMB = b"\x89PNG\r\n\x1a\n" + b"".join(
    struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d))
    for k, d in [
        (b"IHDR", struct.pack(">IIBBBBB", 40_000, 40_000, 8, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(bytes(4_000_000))),
        (b"IEND", b""),
    ]
)


def damaged(rng):
    """A body that was one of ours, with bytes changed, cut or doubled, under a type that it may not have."""
    whole = rng.choice(
        [(PNG, "image/png"), (JPEG, "image/jpeg"), (BMP, "image/bmp"), (array(), "application/x-npy")]
        + [(json.dumps({"images": [{"image": B64, "age": 4}]}).encode(), "application/json")]
        + [(json.dumps({"image": B64}).encode() + b"\n", "application/jsonlines")]
    )
    body, kind = bytearray(whole[0]), whole[1]
    for _ in range(rng.randint(1, 12)):
        at = rng.randrange(len(body)) if rng.random() < 0.5 else rng.randrange(min(len(body), 150))
        body[at] = rng.randrange(256)
    if rng.random() < 0.3:
        del body[rng.randrange(len(body)) :]
    if rng.random() < 0.1:
        body *= 3
    if rng.random() < 0.15:
        kind = rng.choice(["image/png", "application/json", "application/x-npy", "a/b", "", "application/jsonlines"])
    return bytes(body), kind
