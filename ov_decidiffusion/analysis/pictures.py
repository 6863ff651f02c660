"""Grids of pictures with titles, and films."""

from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont


def picture_grid(
    pictures: Sequence[Image.Image], titles: Sequence[str] = (), columns: int | None = None, side: int = 160
) -> Image.Image:
    """Pictures side by side, each in a cell of side x side pixels with its title above.

    Args:
        pictures: pictures of any size; each is scaled to fit its cell.
        titles: one per picture, or none at all. Long ones are broken into lines.
        columns: number of pictures in a row; None puts all in one row.
        side: side of a cell in pixels.

    Returns:
        a picture with a palette of 256 colours.
    """
    if titles and len(titles) != len(pictures):
        raise ValueError(f"`titles` has {len(titles)} entries, but there are {len(pictures)} pictures.")
    font = ImageFont.load_default(12)
    wrapped = [_wrap(title, font, side - 4) for title in titles]
    header = 8 + 15 * max((text.count("\n") + 1 for text in wrapped), default=0) if titles else 0
    columns = columns or len(pictures)
    rows = -(-len(pictures) // columns)
    gap = 6
    grid = Image.new("RGB", (columns * (side + gap) - gap, rows * (side + header + gap) - gap), "white")
    draw = ImageDraw.Draw(grid)
    for i, picture in enumerate(pictures):
        x, y = i % columns * (side + gap), i // columns * (side + header + gap)
        scale = side / max(picture.size)
        width, height = (max(1, round(edge * scale)) for edge in picture.size)
        sharp = Image.Resampling.NEAREST if scale > 3 else Image.Resampling.LANCZOS
        grid.paste(picture.convert("RGB").resize((width, height), sharp), (x + (side - width) // 2, y + header))
        if titles:
            draw.multiline_text((x + 2, y + header - 4), wrapped[i], "black", font, anchor="ld", spacing=3)
    # A palette keeps the notebook small: for an RGB picture, Jupyter would store a PNG and a JPEG. Refining the
    # palette's colours keeps skies smooth.
    return grid.quantize(256, kmeans=3)


def _wrap(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) > width and lines[-1]:
            lines.append(word)
        else:
            lines[-1] = longer
    return "\n".join(lines)


def save_film(frames: Sequence[Image.Image], file: Path, height: int = 256, milliseconds: int = 160) -> None:
    """Write frames, numbered from 1, as a looping GIF that pauses on the last one."""
    sizes = [(round(frame.width * height / frame.height), height) for frame in frames]
    large = [
        frame.convert("RGB").resize(size, Image.Resampling.NEAREST) for frame, size in zip(frames, sizes, strict=True)
    ]
    for number, frame in enumerate(large, start=1):
        ImageDraw.Draw(frame).text(
            (8, 6), str(number), "white", ImageFont.load_default(20), stroke_width=2, stroke_fill="black"
        )
    file.parent.mkdir(parents=True, exist_ok=True)
    times = [milliseconds] * (len(large) - 1) + [12 * milliseconds]
    small = [frame.quantize(96) for frame in large]
    small[0].save(file, save_all=True, append_images=small[1:], duration=times, loop=0, optimize=True)
