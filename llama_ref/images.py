"""Cut images into the tiles that the vision encoder takes, as Meta's image_transform.py does.

Needs Pillow: `pip install "llama-ref[vision]"`.
"""

import contextlib
import io
import warnings
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor

from llama_ref.errors import CheckpointError, RequestError
from llama_ref.files import read_limited

if TYPE_CHECKING:
    from PIL import Image

    ImageFile: TypeAlias = str | Path | bytes | Image.Image
    ImageSource: TypeAlias = "ImageFile | Tiles"  # what calls accept; Tiles are already cut

Size = tuple[int, int]  # width and height

# Formats that Pillow reads by itself: others start programs (EPS) or are containers (PDF).
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000")
FILE_LIMIT_BYTES = 256 << 20
ORIENTATION = 0x0112  # the EXIF tag; UPRIGHT: the transposition for each value that needs one
UPRIGHT = {
    2: "FLIP_LEFT_RIGHT",
    3: "ROTATE_180",
    4: "FLIP_TOP_BOTTOM",
    5: "TRANSPOSE",
    6: "ROTATE_270",
    7: "TRANSVERSE",
    8: "ROTATE_90",
}
OTHERWISE = 'pip install "llama-ref[vision]", or pip install pillow'

MEAN = (0.48145466, 0.4578275, 0.40821073)  # of the values from 0 to 1 that the encoder was trained on
STD = (0.26862954, 0.26130258, 0.27577711)


class Tiles(NamedTuple):
    """An image as the encoder takes it: float32 pixels (n, 3, S, S), n = rows · columns of `grid`."""

    pixels: Tensor
    grid: tuple[int, int]


def load_tiles(source: "ImageSource", tile: int, most_tiles: int) -> Tiles:
    """Open an image and cut it into tiles. Raises RequestError as `open_image` and `tiles_of` do."""
    return source if isinstance(source, Tiles) else tiles_of(open_image(source), tile, most_tiles)


def open_image(source: "ImageFile") -> "Image.Image":
    """An RGB image from a file's path, a file's bytes, or a Pillow image.

    Files are turned upright as their EXIF data says; Pillow images are taken as they are.
    Transparency is dropped, an animation's first frame is taken, 16 bits become 8. Raises
    RequestError if the source is not an image, or has no pixels or too many.
    """
    image_module = _pillow()
    if isinstance(source, image_module.Image):
        with _refusing_damage("the image"):  # Pillow may decode the file only now
            return _in_rgb(source, "the image")
    if isinstance(source, bytes | bytearray | memoryview):
        return _decoded(bytes(source), f"the image of {len(source):,} bytes")
    if not isinstance(source, str | Path):
        raise RequestError(f"an image is a path, bytes or a Pillow image, got {type(source).__name__}")
    if "://" in str(source) or str(source).startswith("data:"):
        raise RequestError(f"{str(source)!r:.60} is an address, expected a file: download the image first")
    try:
        data = read_limited(Path(source).expanduser(), FILE_LIMIT_BYTES, "an image")
    except (CheckpointError, ValueError, RuntimeError) as error:  # the last two: an invalid path, an unknown home directory
        raise RequestError(f"cannot read the image: {error}") from error
    return _decoded(data, str(source))


def tiles_of(image: "Image.Image", tile: int, most_tiles: int) -> Tiles:
    """Resize an RGB image to fit its best canvas of tiles, at the top left on black, and cut it.

    `tile` is a tile's side in pixels. Raises RequestError for an image that is too narrow.
    """
    canvas = best_canvas(image.size, tile, most_tiles)
    size = fitted_size(image.size, canvas, tile)
    if 0 in size:
        raise RequestError(
            f"the image has {image.width:,} × {image.height:,} pixels: it is too narrow, its short "
            f"side would have 0 pixels when the long one is resized to {max(size):,}; crop it"
        )
    image_module = _pillow()
    fitted = image if size == image.size else image.resize(size, image_module.Resampling.BILINEAR)
    filled = image_module.new("RGB", canvas)
    filled.paste(fitted)
    pixels = torch.from_numpy(np.array(filled)).permute(2, 0, 1).float() / 255  # (3, height, width)
    pixels = (pixels - _per_channel(MEAN)) / _per_channel(STD)
    grid = (canvas[1] // tile, canvas[0] // tile)
    cut = pixels.unflatten(2, (grid[1], tile)).unflatten(1, (grid[0], tile))  # (3, rows, S, columns, S)
    return Tiles(cut.permute(1, 3, 0, 2, 4).flatten(0, 1).contiguous(), grid)


def best_canvas(size: Size, tile: int, most_tiles: int) -> Size:
    """Size of the grid of tiles that enlarges an image least or, if none does, reduces it least.

    The smallest grid wins a tie.
    """

    def scale(canvas: Size) -> Fraction:
        return min(Fraction(canvas[0], size[0]), Fraction(canvas[1], size[1]))

    canvases = list(_canvases(tile, most_tiles))
    enlarging = [factor for canvas in canvases if (factor := scale(canvas)) >= 1]
    chosen = min(enlarging) if enlarging else max(map(scale, canvases))
    return min((canvas for canvas in canvases if scale(canvas) == chosen), key=lambda canvas: canvas[0] * canvas[1])


def fitted_size(size: Size, canvas: Size, tile: int) -> Size:
    """Size of an image in its canvas, proportions kept; enlarged at most to fill one tile."""
    width, height = (min(max(side, tile), limit) for side, limit in zip(size, canvas, strict=True))
    by_width, by_height = width / size[0], height / size[1]
    if by_width < by_height:
        return width, min(int(size[1] * by_width), height)
    return min(int(size[0] * by_height), width), height


def _canvases(tile: int, most_tiles: int) -> Iterator[Size]:
    for n in range(most_tiles, 0, -1):
        yield from ((tile * columns, tile * (n // columns)) for columns in range(1, n + 1) if n % columns == 0)


def _per_channel(values: tuple[float, ...]) -> Tensor:
    return torch.tensor(values)[:, None, None]


def _pillow() -> Any:
    """The module PIL.Image. Raises RequestError without Pillow."""
    try:
        from PIL import Image  # lazily: text models do not need it
    except ImportError as error:
        raise RequestError(f"images need Pillow, which cannot be imported ({error}): {OTHERWISE}") from error
    return Image


def _decoded(data: bytes, name: str) -> "Image.Image":
    """A file's content as an upright RGB image."""
    image_module = _pillow()
    image_module.init()
    formats = [each for each in FORMATS if each in image_module.OPEN]  # Pillow may be built without some
    with _refusing_damage(name), warnings.catch_warnings():
        # Warnings about large images (only too large ones raise) and odd EXIF data.
        warnings.simplefilter("ignore")
        try:
            image = image_module.open(io.BytesIO(data), formats=formats)
        except image_module.UnidentifiedImageError as error:
            known = ", ".join(formats)
            raise RequestError(f"{name} is not an image that can be read here ({known}): save it as PNG or JPEG") from error
        image.load()
        turn = UPRIGHT.get(_orientation(image))
        return _in_rgb(image if turn is None else image.transpose(image_module.Transpose[turn]), name)


def _orientation(image: "Image.Image") -> int:
    """An image's EXIF orientation; 1 (upright) if it cannot be read."""
    with contextlib.suppress(Exception):
        return int(image.getexif().get(ORIENTATION, 1))
    return 1


@contextlib.contextmanager
def _refusing_damage(name: str) -> Iterator[None]:
    """Turn any exception into RequestError: Pillow does not document its own for damaged files."""
    try:
        yield
    except RequestError:
        raise
    except _pillow().DecompressionBombError as error:
        raise RequestError(f"{name} has too many pixels ({error}): make it smaller") from error
    except Exception as error:
        raise RequestError(
            f"{name} cannot be decoded ({error}): it is damaged or incomplete; fetch or save it again"
        ) from error


def _in_rgb(image: "Image.Image", name: str) -> "Image.Image":
    if 0 in image.size:
        raise RequestError(f"{name} has {image.width} × {image.height} pixels, expected at least one")
    if image.mode == "F":
        raise RequestError(f"{name} has pixels of 32-bit floats, whose range is unknown: convert it to 8 bits per channel")
    if image.mode.startswith("I"):  # 16 bits of grey; Pillow's own conversion would make all above 255 white
        grey = np.asarray(image).astype(np.int64)
        image = _pillow().fromarray((grey if grey.max() < 256 else grey.clip(0, 65535) >> 8).astype(np.uint8))
    return image.convert("RGB")
