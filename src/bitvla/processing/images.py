"""A camera's image -> the network's pixels. The same function in training (with a random crop) and on the robot."""

from __future__ import annotations

import io
import math
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from bitvla.config import Camera, ImageProcessing, VisionConfig
from bitvla.errors import BitvlaError

_RESAMPLING = {"lanczos": Image.Resampling.LANCZOS, "bicubic": Image.Resampling.BICUBIC}


def read_image(source: Path | bytes, name: str = "the image") -> NDArray[np.uint8]:
    """The image in a file, or in its bytes: uint8 (height, width, 3), RGB, turned as its EXIF data say.

    BitvlaError, with the path or the `name` of the bytes, where there is none.
    """
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as picture:
            return np.asarray(_eight_bits(ImageOps.exif_transpose(picture)).convert("RGB"))
    except Exception as error:  # each format's decoder has its own errors
        place = source if isinstance(source, Path) else name
        unknown = isinstance(error, UnidentifiedImageError)  # which names an object, or the file again
        reason = "its format is not known" if unknown else getattr(error, "strerror", None) or error
        raise BitvlaError(f"{place} cannot be read as an image: {reason}") from None


def _eight_bits(picture: Image.Image) -> Image.Image:
    """Of 16-bit greys the upper eight bits, as Pillow takes them of 16-bit colours; its `convert` cuts off at 255.

    ValueError for values of 32 bits, which have no range.
    """
    if picture.mode in ("I", "F"):
        raise ValueError(f"its values have 32 bits (mode {picture.mode}); save it with 8 or 16")
    if picture.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
    return picture


def check_image(image: object, camera: Camera) -> NDArray[np.uint8]:
    """Return `image` if it is what `camera` must deliver: uint8 (height, width, 3). Otherwise BitvlaError."""
    if not isinstance(image, np.ndarray):
        raise BitvlaError(f"image '{camera.name}' is a {type(image).__name__}, not a NumPy array")
    if image.dtype != np.uint8:
        raise BitvlaError(f"image '{camera.name}' has dtype {image.dtype}; the policy needs uint8 values 0..255")
    if image.shape != (camera.height, camera.width, 3):
        raise BitvlaError(
            f"image '{camera.name}' has shape {image.shape}; the policy was trained on "
            f"({camera.height}, {camera.width}, 3): height, width, RGB"
        )
    return image


def crop_resized(
    image: NDArray[np.uint8],
    processing: ImageProcessing,
    size: int,
    offset: tuple[float, float] = (0.5, 0.5),
) -> NDArray[np.uint8]:
    """The uint8 part of the image chain: (H, W, 3) -> (size, size, 3).

    `offset` places the crop: (0.5, 0.5) is the centre (deployment), training draws both in [0, 1].
    """
    if processing.rotate180:
        image = image[::-1, ::-1]
    picture = Image.fromarray(np.ascontiguousarray(image))
    if processing.jpeg_quality is not None:
        buffer = io.BytesIO()
        picture.save(buffer, "JPEG", quality=processing.jpeg_quality)
        picture = Image.open(buffer)
    if processing.rounding == "tensorflow":
        return _crop_resized_in_float(np.asarray(picture, dtype=np.float32), processing, size, offset)
    if processing.resize != "none":
        picture = picture.resize((size, size), _RESAMPLING[processing.resize])
    box = _crop_box(picture.width, picture.height, processing.crop_area, offset)
    return np.asarray(picture.resize((size, size), Image.Resampling.BILINEAR, box=box))


def _crop_box(width: int, height: int, area: float, offset: tuple[float, float]) -> tuple[float, float, float, float]:
    """Left, top, right, bottom of the crop in pixels. Its ends need not be whole numbers."""
    side = math.sqrt(area)
    left, top = width * (1 - side) * offset[0], height * (1 - side) * offset[1]
    return left, top, left + width * side, top + height * side


def _crop_resized_in_float(
    values: NDArray[np.float32], processing: ImageProcessing, size: int, offset: tuple[float, float]
) -> NDArray[np.uint8]:
    """The same chain as TensorFlow computes it: `tf.image.resize`, `crop_and_resize`, `convert_image_dtype`.

    The sample points of `crop_and_resize`, which lie on the corners of its box, are those of Pillow for this box.
    """
    if processing.resize != "none":
        values = np.clip(np.rint(_resized(values, size, _RESAMPLING[processing.resize])), 0, 255)
    box = _crop_box(values.shape[1], values.shape[0], processing.crop_area, offset)
    cropped = _resized(values, size, Image.Resampling.BILINEAR, box)
    return (cropped * np.float32(255.5 / 255)).astype(np.uint8)


def _resized(
    values: NDArray[np.float32],
    size: int,
    method: Image.Resampling,
    box: tuple[float, float, float, float] | None = None,
) -> NDArray[np.float32]:
    """Resize float (H, W, 3), or the `box` of it, to (size, size, 3), antialiased, without rounding."""
    channels = [Image.fromarray(np.ascontiguousarray(values[..., channel])) for channel in range(3)]
    return np.stack([np.asarray(channel.resize((size, size), method, box=box)) for channel in channels], axis=-1)


def image_patches(image: NDArray[np.uint8], processing: ImageProcessing, vision: VisionConfig) -> NDArray[np.float32]:
    """The whole chain: uint8 (H, W, 3) -> the rows of the patch embedding (patches, 3 * patch_size**2)."""
    pixels = to_pixels(crop_resized(image, processing, vision.image_size), processing)
    return to_patches(pixels, vision.patch_size)


def to_pixels(image: NDArray[np.uint8], processing: ImageProcessing) -> NDArray[np.float32]:
    """The float part of the image chain: uint8 (..., H, W, 3) -> float32 of the same shape, about [-1, 1]."""
    scale = np.float32(1 / (255 * processing.std))
    return image.astype(np.float32) * scale - np.float32(processing.mean / processing.std)


def to_patches(pixels: NDArray[np.float32], patch_size: int) -> NDArray[np.float32]:
    """Cut (size, size, 3) into the rows of the patch embedding: (patches, 3 * patch_size**2), channel first."""
    grid = pixels.shape[0] // patch_size
    cells = pixels.reshape(grid, patch_size, grid, patch_size, 3).transpose(0, 2, 4, 1, 3)
    return np.ascontiguousarray(cells.reshape(grid * grid, 3 * patch_size * patch_size))
