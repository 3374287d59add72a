"""Films of episodes: every camera side by side, with the sentence, the step and how it ended."""

from __future__ import annotations

import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

VIEW = 240  # pixels a camera in the film
BAR = 44
FRAMES_A_SECOND = 20
HOLD_SECONDS = 1.2  # the last picture stays, with the verdict

_INK, _MUTED, _GROUND = (238, 240, 244), (160, 168, 180), (22, 26, 33)
_VERDICTS = {True: ("done", (74, 201, 126)), False: ("not done", (240, 113, 103))}


class Film:
    """The pictures of one episode, kept in memory until it has ended; `turned` are those that come upside down."""

    def __init__(self, turned: bool = False) -> None:
        self._turned = turned
        self._pictures: list[tuple[Image.Image, int]] = []

    def add(self, images: dict[str, NDArray[np.uint8]], step: int) -> None:
        """Add the cameras' images uint8 (H, W, 3) as they were after `step` steps."""
        sheet = Image.new("RGB", (VIEW * len(images), VIEW))
        for index, image in enumerate(images.values()):
            upright = image[::-1, ::-1] if self._turned else image
            sheet.paste(Image.fromarray(upright).resize((VIEW, VIEW), Image.Resampling.BICUBIC), (VIEW * index, 0))
        self._pictures.append((sheet, step))

    def encode(self, instruction: str, success: bool) -> bytes:
        """The film as H.264 in MP4, with the sentence, the step and, at the end, the verdict written below."""
        frames = [_frame(picture, instruction, step, None) for picture, step in self._pictures]
        picture, step = self._pictures[-1]
        return _encode(frames + [_frame(picture, instruction, step, success)] * round(HOLD_SECONDS * FRAMES_A_SECOND))


def _frame(picture: Image.Image, instruction: str, step: int, verdict: bool | None) -> NDArray[np.uint8]:
    frame = Image.new("RGB", (picture.width, VIEW + BAR), _GROUND)
    frame.paste(picture, (0, 0))
    draw = ImageDraw.Draw(frame)
    font = _fitting(instruction, picture.width - 16)
    draw.text((8, VIEW + 4), instruction, _INK, font)
    draw.text((8, VIEW + 24), f"step {step}", _MUTED, ImageFont.load_default(13))
    if verdict is not None:
        word, colour = _VERDICTS[verdict]
        draw.text((picture.width - 8, VIEW + 24), word, colour, ImageFont.load_default(14), anchor="ra")
    return np.asarray(frame)


def _fitting(text: str, width: int) -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    """The largest font in which `text` is at most `width` pixels wide."""
    for size in range(16, 8, -1):
        font = ImageFont.load_default(size)
        if font.getlength(text) <= width:
            return font
    return font


def _encode(frames: list[NDArray[np.uint8]]) -> bytes:
    import av

    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("libx264", FRAMES_A_SECOND, {"crf": "27", "preset": "medium", "threads": "1"})
        stream.height, stream.width, _ = frames[0].shape
        stream.pix_fmt = "yuv420p"
        for pixels in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode(None))
    return buffer.getvalue()
