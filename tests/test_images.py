"""Image files are opened, rejected or converted as documented."""

import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from llama_ref.errors import RequestError
from llama_ref.images import Tiles, best_canvas, fitted_size, load_tiles, open_image, tiles_of
from vision_folders import noise


def encoded(image: Image.Image, form: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def test_a_path_bytes_and_a_pillow_image_are_the_same_image(tmp_path):
    image = noise(40, 30)
    image.save(tmp_path / "noise.png")
    expected = np.asarray(image)
    for source in (str(tmp_path / "noise.png"), tmp_path / "noise.png", encoded(image), image):
        assert np.array_equal(np.asarray(open_image(source)), expected)


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM"])
def test_formats(form):
    opened = open_image(encoded(Image.new("RGB", (20, 10), (200, 30, 30)), form))
    assert (opened.mode, opened.size) == ("RGB", (20, 10))
    assert np.abs(np.asarray(opened).astype(int) - (200, 30, 30)).max() <= 6


def test_modes_become_rgb():
    assert open_image(noise(9, 9).convert("CMYK")).mode == "RGB"
    half_clear = Image.new("RGBA", (2, 2), (10, 20, 30, 0))
    assert open_image(half_clear).getpixel((0, 0)) == (10, 20, 30)  # transparency is dropped
    assert open_image(Image.new("1", (2, 2), 1)).getpixel((0, 0)) == (255, 255, 255)
    assert open_image(Image.new("P", (2, 2))).mode == "RGB"


def test_sixteen_bits_become_eight():
    grey = np.array([[0, 256, 0x8000, 0xFFFF]], dtype=np.uint16)
    opened = open_image(encoded(Image.fromarray(grey)))
    assert np.asarray(opened)[0, :, 0].tolist() == [0, 1, 128, 255]


def test_an_animations_first_frame_is_taken():
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue", "green")]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert open_image(data).getpixel((0, 0)) == (255, 0, 0)


def test_files_are_turned_upright_and_images_taken_as_they_are():
    image = noise(30, 20)
    exif = image.getexif()
    exif[0x0112] = 6  # to be rotated by 90 degrees
    turned = open_image(encoded(image, exif=exif))
    assert turned.size == (20, 30)
    assert np.array_equal(np.asarray(turned), np.rot90(np.asarray(image), -1))
    assert open_image(image).size == (30, 20)


def test_what_else_exif_data_says_does_not_matter():
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "abc"
    odd = encoded(noise(30, 20), "JPEG", exif=exif).replace(b"\x01\x0f\x00\x02", b"\x01\x01\x00\x02")
    assert open_image(odd).size == (20, 30)


def test_a_pillow_image_that_cannot_be_read_is_refused_too(tmp_path):
    (tmp_path / "cut.png").write_bytes(encoded(noise(50, 50))[:2000])
    with Image.open(tmp_path / "cut.png") as lazy, pytest.raises(RequestError, match="the image cannot be decoded"):
        open_image(lazy)
    with pytest.raises(RequestError, match="the image cannot be decoded"):
        open_image(lazy)  # closed


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few bytes whose header claims this many pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n(/tmp/written) (w) file\n%%EOF\n"


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "is not an image that can be read here"),
        (b"<html><body>404</body></html>", "save it as PNG or JPEG"),
        (POSTSCRIPT, "is not an image that can be read here"),
        (encoded(noise(50, 50))[:2000], "it is damaged or incomplete"),
        (encoded(noise(50, 50), "JPEG")[:600], "it is damaged or incomplete"),
        (bomb(100_000, 100_000), "too many pixels"),
        (bomb(1000, 1000), "it is damaged or incomplete"),
    ],
)
def test_what_is_no_image_is_refused(data, says, tmp_path):
    with pytest.raises(RequestError, match=says):
        open_image(data)
    (tmp_path / "file.png").write_bytes(data)
    with pytest.raises(RequestError, match=r"file\.png"):
        open_image(tmp_path / "file.png")


def test_damage_anywhere_is_refused_or_read():
    """Any file content raises our error or none."""
    random = np.random.default_rng(0)
    forms = ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", *(["AVIF"] if "AVIF" in Image.SAVE else [])]
    wholes = [encoded(noise(20, 20), form) for form in forms]
    for whole in wholes:
        for _ in range(60):
            damaged = bytearray(whole)
            for place in random.integers(0, len(whole), 3):
                damaged[place] = random.integers(256)
            try:
                opened = open_image(bytes(damaged[: random.integers(1, len(whole) + 1)]))
            except RequestError:
                continue
            assert opened.mode == "RGB"


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("nowhere.png", "cannot read the image: .*nowhere.png"),
        (".", "cannot read the image"),
        ("a\0b", "cannot read the image"),
        ("https://example.org/cat.jpg", "download the image first"),
        (7, "an image is a path, bytes or a Pillow image, got int"),
        (None, "got NoneType"),
        (Image.new("RGB", (0, 5)), "has 0 × 5 pixels"),
        (Image.new("F", (5, 5)), "32-bit floats"),
    ],
)
def test_other_sources_are_refused(source, says):
    with pytest.raises(RequestError, match=says):
        open_image(source)


def test_a_pipe_without_a_writer_does_not_hang(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(RequestError, match="cannot read the image"):
        open_image(tmp_path / "pipe")


@pytest.mark.parametrize(
    ("size", "grid", "fitted"),
    [
        ((224, 224), (1, 1), (560, 560)),
        ((561, 560), (1, 2), (561, 560)),
        ((640, 480), (1, 2), (640, 480)),
        ((600, 600), (2, 2), (600, 600)),
        ((300, 800), (2, 1), (300, 800)),
        ((1920, 1080), (2, 2), (1120, 630)),
        ((4000, 3000), (2, 2), (1120, 840)),
        ((2000, 1000), (1, 2), (1120, 560)),
        ((100, 5000), (4, 1), (44, 2240)),
    ],
)
def test_the_canvas_of_common_sizes(size, grid, fitted):
    canvas = best_canvas(size, 560, 4)
    assert (canvas[1] // 560, canvas[0] // 560) == grid
    assert fitted_size(size, canvas, 560) == fitted


def test_tiles_are_cut_row_by_row_from_black():
    image = Image.new("RGB", (60, 30), (255, 255, 255))
    tiles = tiles_of(image, 56, 4)
    assert tiles.grid == (1, 2) and tiles.pixels.shape == (2, 3, 56, 56)
    white, black = tiles.pixels[0, :, 0, 0], tiles.pixels[1, :, -1, -1]
    assert torch.allclose(white, torch.tensor([1.9303, 2.0749, 2.1459]), atol=1e-4)
    assert torch.allclose(black, torch.tensor([-1.79226, -1.75210, -1.48022]), atol=1e-4)


def test_too_narrow_an_image_is_refused():
    with pytest.raises(RequestError, match=r"1 × 5,000 pixels: it is too narrow, .* resized to 2,240"):
        load_tiles(Image.new("RGB", (1, 5000)), 560, 4)


def test_tiles_pass_through():
    tiles = Tiles(torch.zeros(1, 3, 14, 14), (1, 1))
    assert load_tiles(tiles, 14, 4) is tiles


def test_without_pillow_the_error_says_what_to_install(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(RequestError, match=r'pip install "llama-ref\[vision\]"'):
        open_image(Path("photo.png"))
