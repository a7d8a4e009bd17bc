"""Decoding: every mode, every damage, and the same pixels whichever way they come."""

import io
import struct
import time
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

from skin_lesion.data.images import MAX_PIXELS, ImageError, decode, load_square, read_picture, to_square

SHARED = Path(__file__).parents[2] / "shared" / "data"


def picture(width=96, height=64):
    y, x = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([255 * x // width, 255 * y // height, 0 * x + 90], 2).astype(np.uint8))


def encoded(im, format="PNG", **kw):
    out = io.BytesIO()
    im.save(out, format, **kw)
    return out.getvalue()


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width, height, rows=b"", extra=b""):
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
        + extra
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


def bmp(width, height):
    return b"BM" + struct.pack("<IHHIIiiHHIIiiII", 54, 0, 0, 54, 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0)


RGB = np.asarray(picture())


@pytest.mark.parametrize("mode", ["RGB", "L", "1", "P", "RGBA", "LA", "I;16"])
def test_png_modes(mode):
    im = {
        "I;16": lambda: Image.fromarray(np.asarray(picture().convert("L")).astype(np.uint16) * 257),
        "P": lambda: picture().quantize(256),
    }.get(mode, lambda: picture().convert(mode))()
    img = decode(encoded(im))
    assert img.shape == (64, 96, 3) and img.dtype == np.uint8 and img.flags.c_contiguous
    expected = (
        RGB
        if mode in ("RGB", "RGBA", "P")
        else np.asarray(picture().convert("1" if mode == "1" else "L").convert("RGB"))
    )
    assert np.abs(img.astype(int) - expected).max() <= (16 if mode == "P" else 0)


@pytest.mark.parametrize("mode", ["RGB", "L", "1", "P"])
def test_bmp_modes(mode):
    im = picture().quantize(256) if mode == "P" else picture().convert(mode)
    expected = RGB if mode == "P" else np.asarray(im.convert("RGB"))
    assert np.abs(decode(encoded(im, "BMP")).astype(int) - expected).max() <= (16 if mode == "P" else 0)


def test_size_and_format_are_those_of_the_file():
    exif = Image.Exif()
    exif[274] = 6
    read = read_picture(encoded(picture(1200, 800), "JPEG", exif=exif), square=64)
    assert (read.size, read.format) == ((800, 1200), "JPEG") and 128 <= read.pixels.shape[1] < 800


def scanner_profile(gamma, space=b"RGB "):
    """sRGB's own profile under another name, with another tone curve."""
    data = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    for k in range(struct.unpack(">I", data[128:132])[0]):
        tag, offset, _ = struct.unpack(">4sII", data[132 + 12 * k : 144 + 12 * k])
        if tag in (b"rTRC", b"gTRC", b"bTRC"):
            data[offset : offset + 14] = struct.pack(">4sIIH", b"curv", 0, 1, round(gamma * 256))
    data[16:20] = space
    return bytes(data).replace("sRGB".encode("utf-16-be"), "Scan".encode("utf-16-be")).replace(b"sRGB", b"Scan")


@pytest.mark.parametrize(("format", "mode"), [("PNG", "RGB"), ("PNG", "RGBA"), ("PNG", "P"), ("JPEG", "RGB")])
def test_colour_profiles_are_converted_to_srgb(format, mode):
    grey = Image.new("RGB", (64, 64), (128, 128, 128))
    grey = grey.quantize(8) if mode == "P" else grey.convert(mode)
    linear = decode(encoded(grey, format, icc_profile=scanner_profile(1.0)))[5, 5]
    assert np.abs(linear.astype(int) - 188).max() <= 3  # linear 0.5 is 188 in sRGB
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert np.abs(decode(encoded(grey, format, icc_profile=srgb))[5, 5].astype(int) - 128).max() <= 1


@pytest.mark.parametrize("icc", [b"nonsense", scanner_profile(1.0)[:300], scanner_profile(1.0, b"CMYK"), b"\0" * 5000])
def test_a_profile_that_cannot_be_used_does_not_cost_the_picture(icc):
    assert (decode(encoded(picture(), icc_profile=icc)) == RGB).all()


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK", "YCbCr"])
def test_jpeg_modes(mode):
    img = decode(encoded(picture().convert(mode), "JPEG", quality=95))
    expected = np.asarray(picture().convert("L").convert("RGB")) if mode == "L" else RGB
    assert np.abs(img.astype(int) - expected).mean() < 3


def test_sixteen_bit_grey_uses_its_whole_range():
    im = Image.fromarray(np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16))
    img = decode(encoded(im))
    assert (img.min(), img.max()) == (0, 255) and len(np.unique(img)) == 256


def test_transparent_parts_are_white_whatever_colour_hides_beneath():
    a = np.dstack([RGB, np.full((64, 96), 255, np.uint8)])
    a[:, :48] = (250, 0, 0, 0)
    img = decode(encoded(Image.fromarray(a)))
    assert (img[:, :48] == 255).all() and (img[:, 48:] == RGB[:, 48:]).all()
    palette = picture().quantize(8)
    corner = palette.getpixel((0, 0))
    assert (decode(encoded(palette, transparency=corner))[0, 0] == 255).all()


@pytest.mark.parametrize("orientation", range(0, 10))
def test_exif_orientation(orientation):
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = picture().transpose(undo[orientation]) if orientation in undo else picture()
    exif = Image.Exif()
    exif[274] = orientation
    assert (decode(encoded(stored, exif=exif)) == RGB).all()


def test_damaged_exif_does_not_cost_the_picture():
    data = encoded(picture(), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\x7f")
    assert decode(data).shape == (64, 96, 3)


JPEG = encoded(picture(640, 480), "JPEG", quality=90)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "the file is empty"),
        (b"just words", "not an image"),
        (b"\0" * 5000, "not an image"),
        (b"<html>404</html>", "HTML"),
        (b"\0" * 128 + b"DICM" + b"\0" * 99, "DICOM"),
        (encoded(picture(), "GIF"), "the file is GIF; it must be a JPEG, PNG or BMP"),
        (encoded(picture(), "GIF", save_all=True, append_images=[picture().rotate(9)]), "GIF"),
        (encoded(picture(), "TIFF"), "TIFF"),
        (encoded(picture(), "BMP")[:500], "damaged or truncated"),
        (encoded(picture(), "BMP")[:20], "damaged"),
        (bmp(40_000, 40_000), "more than 50,000,000 pixels"),
        (encoded(picture(), "WEBP"), "WebP"),
        (encoded(picture(), save_all=True, append_images=[picture().rotate(90)]), "an animation of 2 frames"),
        (JPEG[:2], "not an image"),
        (JPEG[:100], "damaged"),
        (JPEG[: len(JPEG) // 2], "damaged or truncated"),
        (JPEG[:-300], "damaged or truncated"),
        (encoded(picture())[:-200], "damaged or truncated"),
        (encoded(picture(15, 400)), "15 x 400 pixels; each side must have 16"),
        (png(10_000, 10_000), r"10000 x 10000 are more than 50,000,000 pixels"),
        (png(60_000, 60_000), "more than 50,000,000 pixels"),
        (png(64, 64, b"\0" * 100), "damaged or truncated"),
        (
            png(64, 64, b"\0" * 65 * 64, chunk(b"zTXt", b"x\0\0" + zlib.compress(b"0" * 80_000_000))),
            "damaged or truncated",
        ),
    ],
)
def test_refusals(data, reason):
    with pytest.raises(ImageError, match=reason):
        decode(data)


def test_a_bomb_costs_neither_memory_nor_time():
    bomb = png(49_999, 49_999, b"\0" * 20_000_000)
    tracemalloc.start()
    started = time.process_time()
    with pytest.raises(ImageError):
        load_square(bomb, 128)
    assert time.process_time() - started < 0.5 and tracemalloc.get_traced_memory()[1] < 5_000_000
    tracemalloc.stop()
    assert 49_999**2 > MAX_PIXELS


def test_pillows_globals_are_left_alone():
    from PIL import ImageFile

    assert ImageFile.LOAD_TRUNCATED_IMAGES is False and Image.MAX_IMAGE_PIXELS == 89478485


def test_files_are_named_in_the_message(tmp_path):
    (tmp_path / "lesion_7.jpg").write_bytes(JPEG[:500])
    with pytest.raises(ImageError, match="lesion_7.jpg: the file is damaged"):
        load_square(tmp_path / "lesion_7.jpg", 64)
    with pytest.raises(ImageError, match="gone.jpg: no such file"):
        decode(tmp_path / "gone.jpg")
    with pytest.raises(ImageError, match="damaged or truncated"):
        decode(tmp_path)  # a folder


def test_whatever_the_damage_only_image_errors_come_out():
    rng = np.random.default_rng(0)
    files = [
        encoded(picture(640, 480), "JPEG", quality=90, icc_profile=scanner_profile(2.8)),
        encoded(picture(), icc_profile=scanner_profile(2.8)),
        encoded(picture(), "BMP"),
        encoded(picture().convert("CMYK"), "JPEG"),
    ]
    refused = 0
    for k in range(600):
        data = bytearray(files[k % 4])
        for at in rng.integers(0, min(len(data), 900 if k % 2 else len(data)), rng.integers(1, 12)):
            data[at] = rng.integers(256)
        if k % 5 == 0:
            data = data[: rng.integers(len(data))]
        try:
            assert load_square(bytes(data), 32).shape == (32, 32, 3)
        except ImageError:
            refused += 1
    assert 100 < refused < 600


# The square


@pytest.mark.parametrize("shape", [(64, 96), (96, 64), (64, 64), (65, 97), (33, 400)])
@pytest.mark.parametrize("size", [16, 64, 128])
def test_square_shape_and_mean(shape, size):
    img = np.asarray(picture(*shape[::-1]))
    out = to_square(img, size)
    assert out.shape == (size, size, 3) and out.dtype == np.uint8 and out.flags.c_contiguous
    side = min(shape)
    top, left = (shape[0] - side) // 2, (shape[1] - side) // 2
    assert np.allclose(out.mean((0, 1)), img[top : top + side, left : left + side].mean((0, 1)), atol=2)


def test_square_averages_areas_exactly():
    img = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    blocks = img.reshape(16, 4, 16, 4, 3).mean((1, 3))
    assert np.abs(to_square(img, 16) - blocks).max() <= 0.51


def test_square_of_its_own_size_is_the_image():
    assert (to_square(RGB, 64) == RGB[:, 16:80]).all()


@pytest.mark.parametrize("size", [64, 128, 224])
def test_reduced_decoding_keeps_twice_the_pixels_and_the_picture(size):
    y, x = np.mgrid[:1200, :1600]
    im = Image.fromarray(
        (np.stack([np.sin(x / 40), np.cos(y / 30), np.sin((x + y) / 50)], 2) * 100 + 128).astype(np.uint8)
    )
    data = encoded(im, "JPEG", quality=92)
    fast = decode(data, square=size)
    assert 2 * size <= min(fast.shape[:2]) < 1200
    assert np.abs(to_square(fast, size).astype(int) - to_square(decode(data), size)).mean() < 1


def test_bytes_and_file_give_the_same_pixels(tmp_path):
    (tmp_path / "a.jpg").write_bytes(JPEG)
    a, b, c = load_square(JPEG, 100), load_square(tmp_path / "a.jpg", 100), load_square(str(tmp_path / "a.jpg"), 100)
    assert (a == b).all() and (a == c).all()


def test_real_images():
    files = sorted((SHARED / "ham10000").glob("*/ISIC_*.jpg"))[::500]
    if not files:
        pytest.skip(f"the real images are not here ({SHARED})")
    squares = np.stack([load_square(f, 128) for f in files])
    assert squares.shape == (len(files), 128, 128, 3) and 60 < squares.mean() < 230
