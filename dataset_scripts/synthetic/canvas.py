"""A picture to draw a person on, and the patterns of cloth."""

from collections.abc import Iterator

from PIL import Image, ImageDraw

from .colours import Colour, mix_colours, scale_colour
from .shapes import Point, smooth_curve

# Factor on all x coordinates. It keeps the arms of most figures inside a picture that is three times as high as wide.
_SLIMNESS = 0.92


class Canvas:
    """Draws shapes in the coordinates of a body: x to the right, y down, one unit is the height of the person.

    Args:
        image: the picture to draw on, RGB.
        centre: x of the body's middle axis, in pixels.
        top: y of the body's top, in pixels.
        height: height of the person, in pixels.
    """

    def __init__(self, image: Image.Image, centre: float, top: float, height: float):
        self.image = image
        self.draw = ImageDraw.Draw(image)
        self.centre, self.top, self.height = centre, top, height

    def to_pixels(self, points: list[Point]) -> list[Point]:
        return [(self.centre + x * self.height * _SLIMNESS, self.top + y * self.height) for x, y in points]

    def polygon(self, points: list[Point], colour: Colour) -> None:
        """Fills a polygon. Its edge is drawn darker, so that neighbouring parts of the same colour differ."""
        pixels = self.to_pixels(points)
        self.draw.polygon(pixels, fill=colour)
        self._draw_edge(pixels, scale_colour(colour, 0.75))

    def blob(self, points: list[Point], colour: Colour) -> None:
        """Fills the smooth curve through the points."""
        self.polygon(smooth_curve(points), colour)

    def ellipse(self, centre: Point, radius_x: float, radius_y: float, colour: Colour) -> None:
        """Fills an ellipse. Both radii are in heights of the person; `radius_x` is not made slimmer."""
        ((x, y),) = self.to_pixels([centre])
        rx, ry = radius_x * self.height, radius_y * self.height
        self.draw.ellipse((x - rx, y - ry, x + rx, y + ry), fill=colour)

    def line(self, points: list[Point], colour: Colour, width: float) -> None:
        self.draw.line(self.to_pixels(points), fill=colour, width=max(1, round(width * self.height)), joint="curve")

    def garment(self, points: list[Point], colour: Colour, accent: Colour, pattern: str, phase: float) -> None:
        """Fills the outline of a garment with cloth.

        Args:
            points: the outline.
            colour: of the cloth.
            accent: the second colour of the pattern.
            pattern: a value of `ATTRIBUTES["upper_pattern"]`.
            phase: where the pattern starts, as a fraction of its period.
        """
        if pattern == "plain":
            self.polygon(points, colour)
            return
        pixels = self.to_pixels(points)
        left, top = (int(min(pixel[axis] for pixel in pixels)) - 1 for axis in (0, 1))
        right, bottom = (int(max(pixel[axis] for pixel in pixels)) + 2 for axis in (0, 1))
        size = (right - left, bottom - top)
        mask = Image.new("L", size, 0)
        ImageDraw.Draw(mask).polygon([(x - left, y - top) for x, y in pixels], fill=255)
        cloth = _draw_cloth(size, colour, accent, pattern, phase, self.height)
        self.image.paste(cloth, (left, top), mask)
        self._draw_edge(pixels, scale_colour(colour, 0.65))

    def _draw_edge(self, pixels: list[Point], colour: Colour) -> None:
        self.draw.line([*pixels, pixels[0]], fill=colour, width=max(2, round(self.height / 300)))


def _draw_cloth(
    size: tuple[int, int], colour: Colour, accent: Colour, pattern: str, phase: float, height: float
) -> Image.Image:
    """A rectangle of cloth; `size` (width, height) and `height`, that of the person, are in pixels."""
    cloth = Image.new("RGB", size, colour)
    draw = ImageDraw.Draw(cloth)
    if pattern == "striped":
        for start, end in _bands(size[1], 0.045 * height, 0.45, phase):
            draw.rectangle((0, start, size[0], end), fill=accent)
    elif pattern == "checked":
        middle = mix_colours(colour, accent, 0.5)
        for start, end in _bands(size[1], 0.052 * height, 0.3, phase):
            draw.rectangle((0, start, size[0], end), fill=middle)
        for start, end in _bands(size[0], 0.052 * height, 0.3, phase):
            draw.rectangle((start, 0, end, size[1]), fill=accent)
    elif pattern == "dotted":
        _draw_dots(draw, size, accent, phase, height)
    return cloth


def _bands(length: int, period: float, thickness: float, phase: float) -> Iterator[tuple[float, float]]:
    """Start and end of each band across a cloth, in pixels; `thickness` and `phase` are fractions of the period."""
    start = -phase * period
    while start < length:
        yield start, start + period * thickness
        start += period


def _draw_dots(draw: ImageDraw.ImageDraw, size: tuple[int, int], colour: Colour, phase: float, height: float) -> None:
    period, radius = 0.042 * height, 0.0115 * height
    row = 0
    y = -phase * period
    while y < size[1] + period:
        # Every second row is shifted by half a period.
        x = period * (0.5 if row % 2 else 0.0)
        while x < size[0] + period:
            draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)
            x += period
        y += period * 0.8
        row += 1
