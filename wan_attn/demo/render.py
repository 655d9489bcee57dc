# SPDX-License-Identifier: Apache-2.0
"""render.py - frames to a video file, and to one picture of both runs and their difference."""

from __future__ import annotations

import importlib
import math
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

Frames = NDArray[np.float32]  # [frames, height, width, 3], 0..1

ROWS = 4  # frames shown in the picture
PANEL_WIDTHS = 320, 480  # frames are enlarged or shrunk to between these
GAP, BAND = 8, 30  # pixels between panels, and for a line of text
PAPER, INK = (255, 255, 255), (40, 40, 40)
SHARE_VISIBLE = 99.9  # percentile of the difference that amplification brings near white


def write_video(frames: Frames, folder: Path, fps: int) -> Path:
    """Writes video.mp4 with imageio-ffmpeg, else video.gif; removes an earlier run's other file."""
    pixels = _to_bytes(frames)
    mp4, gif = folder / "video.mp4", folder / "video.gif"
    try:
        _write_mp4(pixels, mp4, fps)
    except (
        ImportError,
        RuntimeError,
        OSError,
    ):  # not installed; no ffmpeg for this platform; ffmpeg fails
        mp4.unlink(missing_ok=True)
        _write_gif(pixels, gif, fps)
        return gif
    gif.unlink(missing_ok=True)
    return mp4


def _write_mp4(pixels: NDArray[np.uint8], path: Path, fps: int) -> None:
    ffmpeg = importlib.import_module("imageio_ffmpeg")
    height, width = pixels.shape[1:3]
    writer = ffmpeg.write_frames(
        str(path), (width, height), fps=fps, codec="libx264", quality=8, macro_block_size=2
    )
    writer.send(None)
    for frame in pixels:
        writer.send(np.ascontiguousarray(frame))
    writer.close()


def _write_gif(pixels: NDArray[np.uint8], path: Path, fps: int) -> None:
    first, *rest = (Image.fromarray(frame) for frame in pixels)
    first.save(path, save_all=True, append_images=rest, duration=round(1000 / fps), loop=0)


def amplification(stock: Frames, ours: Frames) -> float:
    """A round number that makes the difference visible; 0 if there is none."""
    gap = np.abs(ours - stock)
    if not gap.any():
        return 0.0
    visible = float(np.percentile(gap, SHARE_VISIBLE)) or float(gap.max())
    exact = max(1.0, 0.9 / visible)
    power = 10.0 ** math.floor(math.log10(exact))
    return power * max(step for step in (1, 2, 5) if step * power <= exact)


def write_sheet(stock: Frames, ours: Frames, titles: tuple[str, str], path: Path) -> float:
    """The picture; returns how much the difference in it is amplified."""
    factor = amplification(stock, ours)
    gap = np.clip(np.abs(ours - stock) * factor, 0, 1)
    shown = sorted({round(i) for i in np.linspace(0, len(stock) - 1, min(ROWS, len(stock)))})
    difference = f"difference x {factor:,.0f}" if factor else "difference: none"
    width = int(np.clip(stock.shape[2], *PANEL_WIDTHS))
    height = round(stock.shape[1] * width / stock.shape[2])
    sheet = Image.new(
        "RGB",
        (3 * width + 4 * GAP, BAND + len(shown) * (BAND + height) + GAP),
        PAPER,
    )
    draw, large, small = ImageDraw.Draw(sheet), _font(17), _font(13)
    for column, (title, frames) in enumerate(
        zip((*titles, difference), (stock, ours, gap), strict=True)
    ):
        x = GAP + column * (width + GAP)
        draw.text((x, 8), title, INK, font=large)
        for row, index in enumerate(shown):
            y = BAND + row * (BAND + height)
            if column == 0:
                draw.text((x, y + 8), f"frame {index + 1} of {len(stock)}", INK, font=small)
            panel = Image.fromarray(_to_bytes(frames[index]))
            sheet.paste(panel.resize((width, height), Image.Resampling.LANCZOS), (x, y + BAND))
    sheet.save(path)
    return factor


def _to_bytes(frames: Frames) -> NDArray[np.uint8]:
    scaled: NDArray[np.float32] = np.clip(np.nan_to_num(frames), 0, 1) * 255
    pixels: NDArray[np.uint8] = scaled.round().astype(np.uint8)
    return pixels


def _font(size: int) -> Any:
    try:
        return ImageFont.load_default(size)
    except TypeError:  # Pillow before 10.1: one size only
        return ImageFont.load_default()
