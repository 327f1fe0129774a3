"""What is seen: draws a pedestrian with Pillow from identity attributes and the nuisances of one photograph."""

import math
import random
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter

from .people import Person

Point = tuple[float, float]
Colour = tuple[int, int, int]

IMAGE_HEIGHT, IMAGE_WIDTH = 384, 128
# Drawn at twice the size and reduced, for smooth edges.
_OVERSAMPLING = 2
# Keeps the arms of most figures inside a picture three times as high as wide.
_SLIMNESS = 0.92

_PALETTES: dict[str, dict[str, Colour]] = {
    "source": {
        "black": (30, 30, 34),
        "white": (244, 243, 238),
        "grey": (138, 140, 144),
        "red": (212, 34, 38),
        "orange": (244, 130, 30),
        "yellow": (246, 214, 50),
        "green": (52, 158, 70),
        "blue": (38, 88, 204),
        "purple": (122, 54, 168),
        "pink": (246, 138, 184),
        "brown": (122, 74, 38),
    },
    "target": {
        "black": (24, 22, 30),
        "white": (226, 222, 208),
        "grey": (118, 122, 132),
        "red": (172, 26, 52),
        "orange": (206, 104, 44),
        "yellow": (206, 172, 54),
        "green": (34, 106, 58),
        "blue": (44, 72, 142),
        "purple": (96, 46, 122),
        "pink": (222, 122, 150),
        "brown": (98, 64, 42),
    },
}
_HAIR_COLOURS: dict[str, Colour] = {
    "black": (26, 22, 22),
    "brown": (96, 58, 30),
    "blond": (226, 190, 104),
    "red": (176, 70, 26),
    "grey": (168, 166, 164),
}
_SKIN_TONES: tuple[Colour, ...] = ((250, 218, 190), (232, 188, 152), (198, 146, 104), (140, 94, 62), (96, 62, 42))
_DENIM: dict[str, dict[str, Colour]] = {
    "source": {"blue": (74, 110, 166), "black": (44, 44, 52), "grey": (128, 132, 142)},
    "target": {"blue": (58, 80, 118), "black": (36, 34, 44), "grey": (108, 110, 122)},
}


@dataclass(frozen=True)
class Appearance:
    """What all photographs of a person have in common: colours as RGB and proportions, fixed by the identity."""

    skin: Colour
    hair: Colour
    hat: Colour
    upper: Colour
    upper_accent: Colour
    inner: Colour
    lower: Colour
    lower_accent: Colour
    shoes: Colour
    bag: Colour
    pattern_phase: float


def sample_appearance(person: Person, domain: str, rng: random.Random) -> Appearance:
    """Chooses this person's own shade of each colour, and what captions do not speak of (skin, the inner shirt)."""
    palette = _PALETTES[domain]

    def shade(colour: Colour, spread: int = 12) -> Colour:
        light = rng.uniform(-spread, spread)
        return tuple(
            int(min(255, max(0, channel + light + rng.uniform(-spread / 2, spread / 2)))) for channel in colour
        )

    lower = _DENIM[domain][person["lower_colour"]] if person["lower"] == "jeans" else palette[person["lower_colour"]]
    upper, lower = shade(palette[person["upper_colour"]]), shade(lower)
    return Appearance(
        skin=shade(rng.choice(_SKIN_TONES), 6),
        hair=shade(_HAIR_COLOURS[person["hair_colour"]], 8),
        hat=shade(palette.get(person["hat_colour"], (0, 0, 0))),
        upper=upper,
        upper_accent=_accent(upper),
        inner=shade(rng.choice([(240, 240, 236), (206, 208, 212), (60, 62, 70)])),
        lower=lower,
        lower_accent=_accent(lower),
        shoes=shade(palette[person["shoes_colour"]]),
        bag=shade(palette.get(person["bag_colour"], (0, 0, 0))),
        pattern_phase=rng.random(),
    )


def _scaled(colour: Colour, factor: float) -> Colour:
    return tuple(int(min(255, max(0, channel * factor))) for channel in colour)


def _mixed(colour: Colour, other: Colour, share: float) -> Colour:
    return tuple(int(a + (b - a) * share) for a, b in zip(colour, other, strict=True))


def _luminance(colour: Colour) -> float:
    return 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2]


def _accent(colour: Colour) -> Colour:
    """The second colour of a pattern: clearly lighter on dark cloth, clearly darker on light cloth."""
    return _mixed(colour, (255, 255, 250), 0.72) if _luminance(colour) < 150 else _mixed(colour, (20, 20, 40), 0.62)


def _smooth(points: list[Point], steps: int = 5) -> list[Point]:
    """A closed Catmull-Rom curve through the points."""
    curve = []
    count = len(points)
    for index in range(count):
        p0, p1, p2, p3 = (points[(index + offset) % count] for offset in (-1, 0, 1, 2))
        for step in range(steps):
            t = step / steps
            curve.append(
                tuple(
                    0.5
                    * (2 * b + (c - a) * t + (2 * a - 5 * b + 4 * c - d) * t * t + (3 * b - a - 3 * c + d) * t * t * t)
                    for a, b, c, d in zip(p0, p1, p2, p3, strict=True)
                )
            )
    return curve


class _Canvas:
    """A picture with a body coordinate system: x to the right, y down, one unit is the person's height."""

    def __init__(self, image: Image.Image, centre: float, top: float, height: float):
        self.image = image
        self.draw = ImageDraw.Draw(image)
        self.centre, self.top, self.height = centre, top, height

    def pixel(self, point: Point) -> Point:
        return (self.centre + point[0] * self.height * _SLIMNESS, self.top + point[1] * self.height)

    def polygon(self, points: list[Point], colour: Colour, outline: float = 0.75) -> None:
        """Fills a polygon; the edge is drawn darker by `outline`, which keeps like-coloured parts apart."""
        pixels = [self.pixel(point) for point in points]
        self.draw.polygon(pixels, fill=colour)
        self.draw.line([*pixels, pixels[0]], fill=_scaled(colour, outline), width=max(2, round(self.height / 300)))

    def blob(self, points: list[Point], colour: Colour, outline: float = 0.75) -> None:
        self.polygon(_smooth(points), colour, outline)

    def ellipse(self, centre: Point, radius_x: float, radius_y: float, colour: Colour) -> None:
        x, y = self.pixel(centre)
        rx, ry = radius_x * self.height, radius_y * self.height
        self.draw.ellipse((x - rx, y - ry, x + rx, y + ry), fill=colour)

    def line(self, points: list[Point], colour: Colour, width: float) -> None:
        pixels = [self.pixel(point) for point in points]
        self.draw.line(pixels, fill=colour, width=max(1, round(width * self.height)), joint="curve")

    def patterned(self, points: list[Point], colour: Colour, accent: Colour, pattern: str, phase: float) -> None:
        """Fills a garment's outline with cloth of the pattern."""
        if pattern == "plain":
            self.polygon(points, colour)
            return
        pixels = [self.pixel(point) for point in points]
        left, top = (int(min(p[axis] for p in pixels)) - 1 for axis in (0, 1))
        right, bottom = (int(max(p[axis] for p in pixels)) + 2 for axis in (0, 1))
        size = (right - left, bottom - top)
        mask = Image.new("L", size, 0)
        ImageDraw.Draw(mask).polygon([(x - left, y - top) for x, y in pixels], fill=255)
        cloth = _cloth(size, colour, accent, pattern, phase, self.height)
        self.image.paste(cloth, (left, top), mask)
        self.draw.line([*pixels, pixels[0]], fill=_scaled(colour, 0.65), width=max(2, round(self.height / 300)))


def _cloth(
    size: tuple[int, int], colour: Colour, accent: Colour, pattern: str, phase: float, height: float
) -> Image.Image:
    cloth = Image.new("RGB", size, colour)
    draw = ImageDraw.Draw(cloth)
    if pattern == "striped":
        period = 0.045 * height
        y = -phase * period
        while y < size[1]:
            draw.rectangle((0, y, size[0], y + period * 0.45), fill=accent)
            y += period
    elif pattern == "checked":
        period = 0.052 * height
        middle = _mixed(colour, accent, 0.5)
        for start, stop, horizontal in ((-phase * period, size[1], True), (-phase * period, size[0], False)):
            position = start
            while position < stop:
                band = (0, position, size[0], position + period * 0.3)
                draw.rectangle(
                    band if horizontal else (band[1], 0, band[3], size[1]), fill=middle if horizontal else accent
                )
                position += period
    elif pattern == "dotted":
        period, radius = 0.042 * height, 0.0115 * height
        row = 0
        y = -phase * period
        while y < size[1] + period:
            x = period * (0.5 if row % 2 else 0.0)
            while x < size[0] + period:
                draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=accent)
                x += period
            y += period * 0.8
            row += 1
    return cloth


def _limb(points: list[Point], widths: list[float]) -> list[Point]:
    """The outline of a limb through two or three joints, `widths` being its half widths there."""
    left, right = [], []
    for index, (point, width) in enumerate(zip(points, widths, strict=True)):
        before, after = points[max(0, index - 1)], points[min(len(points) - 1, index + 1)]
        dx, dy = after[0] - before[0], after[1] - before[1]
        length = math.hypot(dx, dy) or 1.0
        normal = (-dy / length, dx / length)
        left.append((point[0] + normal[0] * width, point[1] + normal[1] * width))
        right.append((point[0] - normal[0] * width, point[1] - normal[1] * width))
    end = points[-1]
    last = points[-2]
    length = math.hypot(end[0] - last[0], end[1] - last[1]) or 1.0
    tip = (
        end[0] + (end[0] - last[0]) / length * widths[-1] * 0.4,
        end[1] + (end[1] - last[1]) / length * widths[-1] * 0.4,
    )
    return _smooth([*left, tip, *reversed(right)], steps=4)


_BUILD_WIDTH = {"slim": 0.8, "average": 1.0, "heavy": 1.32}
_LONG_SLEEVES = ("shirt", "sweater", "hoodie", "jacket", "coat")


class _Pedestrian:
    """One person in one pose; `draw` paints it from the back to the front."""

    def __init__(self, canvas: _Canvas, person: Person, appearance: Appearance, rng: random.Random):
        self.canvas, self.person, self.look = canvas, person, appearance
        self.view = rng.choices(("front", "back", "side"), (0.5, 0.28, 0.22))[0]
        self.facing = rng.choice((-1, 1))
        self.turn = rng.uniform(-0.4, 0.4) if self.view == "front" else 0.0
        self.woman = person["gender"] == "woman"
        width = _BUILD_WIDTH[person["build"]]
        self.width = width
        depth = 0.62 if self.view == "side" else 1.0
        self.shoulder = (0.098 if self.woman else 0.115) * (0.75 + 0.25 * width) * depth
        self.waist = (0.062 if self.woman else 0.08) * width * (0.8 if self.view == "side" else 1.0)
        self.hip = (0.086 if self.woman else 0.08) * (0.3 + 0.7 * width) * (0.72 if self.view == "side" else 1.0)
        self.bag_side = rng.choice((-1, 1))
        self._pose(rng)

    def _pose(self, rng: random.Random) -> None:
        stride = rng.uniform(0.06, 0.19) if self.view == "side" else rng.uniform(0.0, 0.05)
        apart = 0.2 if self.view == "side" else 0.62
        lean = rng.uniform(-0.01, 0.01)
        self.legs = []
        for side in (-1, 1):
            hip = (side * self.hip * apart * 0.75, 0.52)
            ankle = (
                side * (self.hip * apart + stride) + lean,
                0.945 - (rng.uniform(0, 0.025) if side == self.facing else 0),
            )
            bend = rng.uniform(0.0, 0.03) * (self.facing if self.view == "side" else side)
            knee = ((hip[0] + ankle[0]) / 2 + bend, 0.735)
            self.legs.append((hip, knee, ankle))
        self.arms = []
        for side in (-1, 1):
            reach = 0.3 if self.view == "side" else 0.93
            shoulder = (side * self.shoulder * reach, 0.205)
            swing = rng.uniform(-0.09, 0.09) if self.view == "side" else side * rng.uniform(0.015, 0.06)
            elbow = (shoulder[0] + swing, 0.355)
            kind = rng.random()
            if kind < 0.72:
                hand = (elbow[0] + swing * 0.3 + (self.facing * 0.03 if self.view == "side" else 0.0), 0.495)
            elif kind < 0.88:  # a hand before the belly
                hand = (elbow[0] * 0.25 + (self.facing * 0.09 if self.view == "side" else 0.0), 0.43)
            else:  # a raised hand, as with a telephone
                hand = (elbow[0] * 0.75 + (self.facing * 0.09 if self.view == "side" else side * 0.01), 0.25)
            self.arms.append((shoulder, elbow, hand))
        bag = self.person["bag"]
        if bag in ("handbag", "shopping bag"):  # the hand that carries hangs down
            side = 0 if self.bag_side < 0 else 1
            shoulder, elbow, _ = self.arms[side]
            self.arms[side] = (shoulder, elbow, (elbow[0] + 0.01 * self.bag_side, 0.5))

    def draw(self) -> None:
        near, far = (1, 0) if self.facing > 0 else (0, 1)
        if self.view == "front":
            self._hair_behind()
        if self.person["bag"] == "backpack" and self.view != "back":
            self._backpack()
        if self.view == "side":
            self._arm(far)
        for index in (far, near):
            self._leg(index)
        self._skirt_or_shorts()
        if self.view != "back":
            self._carried_bag()
        self._torso()
        for index in (near,) if self.view == "side" else (0, 1):
            self._arm(index)
        if self.view == "back":
            self._carried_bag()
        self._shoulder_bag()
        self._head()
        if self.view == "back" and self.person["bag"] == "backpack":
            self._backpack()
            if self.person["hair"] in ("long", "ponytail"):
                self._hair_down_the_back()
        self._hat()

    # -- legs and shoes

    def _leg(self, index: int) -> None:
        hip, knee, ankle = self.legs[index]
        person, look = self.person, self.look
        thick = 0.3 + 0.7 * self.width
        self.canvas.polygon(_limb([hip, knee, ankle], [0.05 * thick, 0.034 * thick, 0.022]), look.skin)
        if person["lower"] in ("trousers", "jeans"):
            narrow = person["lower"] == "jeans"
            outline = _limb(
                [hip, knee, (ankle[0], ankle[1] + 0.008)],
                [0.058 * thick, (0.037 if narrow else 0.046) * thick, 0.027 if narrow else 0.04],
            )
            self._fill(outline, "lower")
            if narrow:
                seam = _mixed(look.lower, (236, 200, 120), 0.5)
                side = 1 if index else -1
                self.canvas.line([(p[0] + side * 0.024 * thick, p[1] + 0.01) for p in (hip, knee, ankle)], seam, 0.004)
                light = _mixed(look.lower, (235, 240, 250), 0.28)
                self.canvas.ellipse((knee[0], knee[1] - 0.06), 0.015 * thick, 0.06, light)
        self._shoe(index)

    def _shoe(self, index: int) -> None:
        ankle = self.legs[index][2]
        colour, kind = self.look.shoes, self.person["shoes"]
        if self.view == "side":
            toe, heel, half = ankle[0] + self.facing * 0.075, ankle[0] - self.facing * 0.03, 0.0
        else:
            direction = 1 if index else -1
            toe, heel, half = ankle[0] + direction * 0.022, ankle[0], 0.036
        base = ankle[1] + 0.05
        if half:
            outline = [
                (heel - half * 0.75, ankle[1] + 0.004),
                (heel + half * 0.75, ankle[1] + 0.004),
                (toe + half, base),
                (toe - half, base),
            ]
        else:
            outline = [
                (heel, ankle[1]),
                (ankle[0] + self.facing * 0.028, ankle[1]),
                (toe, ankle[1] + 0.03),
                (toe, base),
                (heel, base),
            ]
        if kind == "sandals":
            self.canvas.polygon(outline, self.look.skin)
            for level in (0.016, 0.032):
                self.canvas.line(
                    [
                        (min(p[0] for p in outline) + 0.004, ankle[1] + level),
                        (max(p[0] for p in outline) - 0.004, ankle[1] + level),
                    ],
                    colour,
                    0.011,
                )
        else:
            self.canvas.polygon(outline, colour)
        if kind == "boots":
            shaft = [(ankle[0], ankle[1] - 0.1), (ankle[0], ankle[1] + 0.02)]
            self.canvas.polygon(_limb(shaft, [0.04, 0.034]), colour)
            self.canvas.line(
                [(ankle[0] - 0.036, ankle[1] - 0.095), (ankle[0] + 0.036, ankle[1] - 0.095)], _accent(colour), 0.007
            )
        sole = (250, 250, 250) if kind == "sneakers" else _scaled(colour, 0.45)
        left, right = min(p[0] for p in outline), max(p[0] for p in outline)
        self.canvas.line([(left, base), (right, base)], sole, 0.014 if kind == "sneakers" else 0.008)
        if kind == "sneakers":
            self.canvas.line(
                [((left + right) / 2 - 0.014, ankle[1] + 0.02), ((left + right) / 2 + 0.014, ankle[1] + 0.02)],
                (250, 250, 250),
                0.005,
            )
        if kind == "leather shoes":
            self.canvas.ellipse(((left + right) / 2, base - 0.02), 0.01, 0.006, _mixed(colour, (255, 255, 255), 0.5))

    def _skirt_or_shorts(self) -> None:
        kind = self.person["lower"]
        if kind == "skirt":
            flare = self.hip * 1.25 + 0.035
            left, right = self.legs[0][1][0], self.legs[1][1][0]
            bottom = (min(left - 0.03, -flare), max(right + 0.03, flare))
            outline = _smooth(
                [
                    (-self.waist, 0.455),
                    (self.waist, 0.455),
                    (self.hip * 1.12, 0.54),
                    (bottom[1], 0.7),
                    (0.0, 0.715),
                    (bottom[0], 0.7),
                    (-self.hip * 1.12, 0.54),
                ]
            )
            self._fill(outline, "lower")
        elif kind == "shorts":
            thick = 0.3 + 0.7 * self.width
            for hip, knee, _ in self.legs:
                end = (hip[0] + (knee[0] - hip[0]) * 0.85, 0.7)
                self._fill(_limb([hip, end], [0.06 * thick, 0.056 * thick]), "lower")
        if kind != "skirt":
            self._fill(
                _smooth(
                    [
                        (-self.waist, 0.46),
                        (self.waist, 0.46),
                        (self.hip * 1.06, 0.53),
                        (self.hip * 0.55, 0.585),
                        (0.0, 0.57),
                        (-self.hip * 0.55, 0.585),
                        (-self.hip * 1.06, 0.53),
                    ]
                ),
                "lower",
            )

    def _fill(self, outline: list[Point], part: str) -> None:
        look = self.look
        colour, accent = (look.upper, look.upper_accent) if part == "upper" else (look.lower, look.lower_accent)
        self.canvas.patterned(outline, colour, accent, self.person[f"{part}_pattern"], look.pattern_phase)

    # -- the upper body

    def _torso(self) -> None:
        kind, look, canvas = self.person["upper"], self.look, self.canvas
        neck = 0.03 if self.woman else 0.037
        canvas.polygon(
            [(-neck, 0.13), (neck, 0.13), (neck * 1.15, 0.19), (-neck * 1.15, 0.19)], _scaled(look.skin, 0.9)
        )
        hem = {"coat": 0.7, "jacket": 0.5, "hoodie": 0.53, "tank top": 0.49}.get(kind, 0.51)
        loose = {"coat": 0.02, "hoodie": 0.018, "jacket": 0.012, "sweater": 0.012}.get(kind, 0.0)
        shoulder = self.shoulder * (0.72 if kind == "tank top" else 1.0) + loose * 0.5
        waist, hip = self.waist + loose + 0.008, self.hip + loose
        bottom = hip * (1.22 if kind == "coat" else 1.02)
        scoop = 0.215 if kind == "tank top" else 0.185
        outline = [
            (-neck * 1.5, 0.17), (0.0, scoop), (neck * 1.5, 0.17),
            (shoulder, 0.192), (shoulder * 0.97, 0.27), (waist, 0.4), (bottom, hem - 0.015),
            (bottom * 0.97, hem), (-bottom * 0.97, hem), (-bottom, hem - 0.015), (-waist, 0.4),
            (-shoulder * 0.97, 0.27), (-shoulder, 0.192),
        ]  # fmt: skip
        self._fill(_smooth(outline, steps=3), "upper")
        front = {"front": self.turn * 0.06, "side": self.facing * self.waist * 0.75, "back": None}[self.view]
        dark, light = _scaled(look.upper, 0.62), look.upper_accent
        if kind in ("jacket", "coat") and front is not None:
            gap = 0.03 if kind == "jacket" else 0.018
            if self.view == "side":
                gap *= 0.5
            canvas.polygon(
                [
                    (front - gap * 0.6, 0.182),
                    (front + gap * 0.6, 0.182),
                    (front + gap, hem - 0.004),
                    (front - gap, hem - 0.004),
                ],
                look.inner,
            )
            for side in (-1, 1):
                canvas.polygon(
                    [(front + side * gap * 0.6, 0.178), (front + side * (gap + 0.034), 0.2), (front + side * gap, 0.3)],
                    dark,
                )
            if kind == "coat":
                for level in (0.36, 0.45, 0.54):
                    canvas.ellipse((front + gap + 0.016, level), 0.007, 0.007, light)
        elif kind == "shirt" and front is not None:
            canvas.line([(front, 0.19), (front, hem - 0.005)], dark, 0.005)
            for level in range(5):
                canvas.ellipse(
                    (front, 0.23 + 0.06 * level),
                    0.0065,
                    0.0065,
                    (250, 250, 250) if _luminance(look.upper) < 150 else (60, 60, 60),
                )
            for side in (-1, 1):
                canvas.polygon([(front, 0.192), (front + side * 0.04, 0.168), (front + side * 0.042, 0.212)], light)
        elif kind == "hoodie":
            if front is None:
                canvas.blob(
                    [(-0.06, 0.17), (0.06, 0.17), (0.05, 0.25), (0.0, 0.28), (-0.05, 0.25)], _scaled(look.upper, 0.8)
                )
            else:
                canvas.polygon(
                    [(front - 0.055, 0.4), (front + 0.055, 0.4), (front + 0.075, 0.475), (front - 0.075, 0.475)]
                    if self.view == "front"
                    else [(front * 0.2, 0.4), (front, 0.4), (front, 0.47), (front * 0.1, 0.47)],
                    _scaled(look.upper, 0.78),
                )
                for side in (-1, 1):
                    canvas.line([(front + side * 0.018, 0.2), (front + side * 0.02, 0.28)], (240, 240, 240), 0.006)
            canvas.line([(-0.058, 0.182), (0.0, 0.198), (0.058, 0.182)], _scaled(look.upper, 0.7), 0.02)
        elif kind == "sweater":
            canvas.line([(-bottom * 0.95, hem - 0.012), (bottom * 0.95, hem - 0.012)], dark, 0.02)
            canvas.line([(-neck * 1.5, 0.178), (0.0, 0.19), (neck * 1.5, 0.178)], dark, 0.018)

    def _arm(self, index: int) -> None:
        shoulder, elbow, hand = self.arms[index]
        look, kind = self.look, self.person["upper"]
        thick = 0.4 + 0.6 * self.width
        self.canvas.polygon(_limb([shoulder, elbow, hand], [0.028 * thick, 0.022 * thick, 0.016]), look.skin)
        self.canvas.ellipse((hand[0], hand[1] + 0.012), 0.019, 0.023, look.skin)
        if kind in _LONG_SLEEVES:
            bulk = 1.15 if kind in ("coat", "hoodie", "jacket") else 1.0
            cuff = (hand[0] - (hand[0] - elbow[0]) * 0.1, hand[1] - (hand[1] - elbow[1]) * 0.1)
            self._fill(
                _limb([shoulder, elbow, cuff], [0.036 * thick * bulk, 0.031 * thick * bulk, 0.026 * bulk]), "upper"
            )
            if kind in ("sweater", "hoodie"):
                self.canvas.ellipse(cuff, 0.024, 0.012, _scaled(look.upper, 0.62))
        elif kind == "t-shirt":
            middle = (shoulder[0] + (elbow[0] - shoulder[0]) * 0.62, shoulder[1] + (elbow[1] - shoulder[1]) * 0.62)
            self._fill(_limb([shoulder, middle], [0.038 * thick, 0.04 * thick]), "upper")

    # -- the head

    def _head(self) -> None:
        canvas, look = self.canvas, self.look
        if self.view == "back":
            canvas.blob(_ring((0.0, 0.075), 0.054, 0.074), look.hair)
            if self.person["hair"] == "short":
                canvas.polygon([(-0.03, 0.125), (0.03, 0.125), (0.028, 0.155), (-0.028, 0.155)], look.skin)
            else:
                self._hair_down_the_back()
            return
        offset = self.turn * 0.02
        if self.view == "side":
            face = self.facing
            canvas.blob(_ring((0.0, 0.078), 0.05, 0.072), look.skin)
            canvas.polygon([(face * 0.044, 0.072), (face * 0.064, 0.092), (face * 0.044, 0.098)], look.skin)
            canvas.ellipse((face * 0.03, 0.072), 0.006, 0.007, (30, 26, 26))
            canvas.line([(face * 0.03, 0.118), (face * 0.046, 0.116)], (150, 60, 60), 0.005)
            canvas.blob(
                [
                    (face * 0.04, 0.03),
                    (face * 0.022, 0.055),
                    (face * 0.0, 0.062),
                    (face * 0.002, 0.1),
                    (-face * 0.035, 0.125),
                    (-face * 0.058, 0.08),
                    (-face * 0.046, 0.018),
                    (0.0, -0.002),
                ],
                look.hair,
            )
            back = -face
            if self.person["hair"] == "long":
                canvas.blob(
                    [
                        (back * 0.02, 0.04),
                        (back * 0.062, 0.06),
                        (back * 0.078, 0.2),
                        (back * 0.062, 0.29),
                        (back * 0.02, 0.26),
                        (back * 0.012, 0.12),
                    ],
                    look.hair,
                )
            elif self.person["hair"] == "ponytail":
                canvas.blob(
                    [
                        (back * 0.045, 0.04),
                        (back * 0.09, 0.06),
                        (back * 0.1, 0.18),
                        (back * 0.078, 0.24),
                        (back * 0.066, 0.12),
                    ],
                    look.hair,
                )
            elif self.person["hair"] == "bun":
                canvas.blob(_ring((back * 0.062, 0.028), 0.031, 0.031), look.hair)
            return
        canvas.blob(_ring((0.0, 0.078), 0.05, 0.072), look.skin)
        for side in (-1, 1):
            canvas.ellipse((offset + side * 0.02, 0.076), 0.0075, 0.0085, (250, 250, 250))
            canvas.ellipse((offset + side * 0.02, 0.077), 0.0048, 0.0065, (34, 26, 24))
            canvas.line([(offset + side * 0.012, 0.061), (offset + side * 0.03, 0.061)], _scaled(look.hair, 0.8), 0.005)
        canvas.line([(offset, 0.08), (offset + 0.004, 0.097), (offset - 0.004, 0.099)], _scaled(look.skin, 0.75), 0.004)
        canvas.line(
            [(offset - 0.015, 0.117), (offset, 0.121), (offset + 0.015, 0.117)],
            (190, 60, 70) if self.woman else (150, 84, 74),
            0.007,
        )
        hair = self.person["hair"]
        part = self.bag_side * 0.02
        canvas.blob(
            [
                (-0.056, 0.085),
                (-0.053, 0.03),
                (-0.02, -0.004),
                (0.02, -0.004),
                (0.053, 0.03),
                (0.056, 0.085),
                (0.043, 0.058),
                (part, 0.036),
                (-0.043, 0.058),
            ],
            look.hair,
        )
        if hair == "bun":
            canvas.blob(_ring((0.0, -0.014), 0.031, 0.027), look.hair)
        elif hair == "ponytail":
            side = self.bag_side
            canvas.blob(
                [
                    (side * 0.045, 0.05),
                    (side * 0.075, 0.08),
                    (side * 0.085, 0.19),
                    (side * 0.062, 0.25),
                    (side * 0.056, 0.14),
                ],
                look.hair,
            )
        elif hair == "long":
            for side in (-1, 1):
                canvas.blob(
                    [
                        (side * 0.04, 0.035),
                        (side * 0.064, 0.07),
                        (side * 0.078, 0.2),
                        (side * 0.062, 0.275),
                        (side * 0.04, 0.24),
                        (side * 0.046, 0.12),
                    ],
                    look.hair,
                )

    def _hair_behind(self) -> None:
        if self.person["hair"] == "long":
            self.canvas.blob(
                [(-0.05, 0.02), (0.05, 0.02), (0.074, 0.15), (0.068, 0.26), (-0.068, 0.26), (-0.074, 0.15)],
                _scaled(self.look.hair, 0.8),
            )

    def _hair_down_the_back(self) -> None:
        hair, canvas, colour = self.person["hair"], self.canvas, self.look.hair
        if hair == "long":
            canvas.blob(
                [
                    (-0.05, 0.05),
                    (0.05, 0.05),
                    (0.072, 0.18),
                    (0.058, 0.31),
                    (0.0, 0.325),
                    (-0.058, 0.31),
                    (-0.072, 0.18),
                ],
                colour,
            )
        elif hair == "ponytail":
            canvas.line([(-0.014, 0.085), (0.014, 0.085)], (200, 60, 90), 0.014)
            canvas.blob(
                [(-0.014, 0.09), (0.014, 0.09), (0.03, 0.18), (0.012, 0.28), (-0.012, 0.28), (-0.03, 0.18)],
                _scaled(colour, 0.92),
            )
        elif hair == "bun":
            canvas.blob(_ring((0.0, 0.03), 0.034, 0.032), _scaled(colour, 0.92))

    def _hat(self) -> None:
        kind, colour, canvas = self.person["hat"], self.look.hat, self.canvas
        if kind == "none":
            return
        dome = [(-0.058, 0.045), (-0.05, 0.0), (-0.018, -0.024), (0.018, -0.024), (0.05, 0.0), (0.058, 0.045)]
        if kind == "beanie":
            canvas.polygon(_smooth([*dome, (0.0, 0.052)]), colour)
            canvas.polygon([(-0.061, 0.026), (0.061, 0.026), (0.061, 0.052), (-0.061, 0.052)], _scaled(colour, 0.8))
            canvas.ellipse((0.0, -0.032), 0.019, 0.017, _accent(colour))
        elif kind == "cap":
            canvas.polygon(_smooth([*dome, (0.0, 0.042)]), colour)
            if self.view == "side":
                face = self.facing
                canvas.polygon(
                    [(face * 0.03, 0.03), (face * 0.12, 0.044), (face * 0.118, 0.056), (face * 0.03, 0.05)],
                    _scaled(colour, 0.78),
                )
            elif self.view == "front":
                shift = self.turn * 0.05
                canvas.blob(
                    [
                        (-0.056 + shift, 0.04),
                        (shift, 0.03),
                        (0.056 + shift, 0.04),
                        (0.05 + shift, 0.058),
                        (shift, 0.068),
                        (-0.05 + shift, 0.058),
                    ],
                    _scaled(colour, 0.78),
                )
            else:
                canvas.ellipse((0.0, 0.035), 0.018, 0.012, _scaled(colour, 0.55))
        else:
            canvas.blob(_ring((0.0, 0.036), 0.115, 0.022), _scaled(colour, 0.88))
            canvas.polygon(
                _smooth(
                    [(-0.054, 0.034), (-0.046, -0.012), (0.0, -0.026), (0.046, -0.012), (0.054, 0.034), (0.0, 0.04)]
                ),
                colour,
            )
            canvas.line([(-0.054, 0.026), (0.0, 0.032), (0.054, 0.026)], _accent(colour), 0.012)

    # -- bags

    def _backpack(self) -> None:
        colour, canvas = self.look.bag, self.canvas
        if self.view == "back":
            w = 0.085
            canvas.blob(
                [
                    (-w, 0.22),
                    (-w * 0.7, 0.195),
                    (w * 0.7, 0.195),
                    (w, 0.22),
                    (w, 0.4),
                    (w * 0.85, 0.43),
                    (-w * 0.85, 0.43),
                    (-w, 0.4),
                ],
                colour,
            )
            canvas.polygon(
                [(-w * 0.65, 0.32), (w * 0.65, 0.32), (w * 0.65, 0.405), (-w * 0.65, 0.405)], _scaled(colour, 0.82)
            )
            canvas.line([(-w * 0.8, 0.27), (w * 0.8, 0.27)], _accent(colour), 0.006)
            canvas.line([(-0.02, 0.195), (0.0, 0.18), (0.02, 0.195)], _scaled(colour, 0.6), 0.01)
        elif self.view == "side":
            back = -self.facing
            near, far = self.shoulder * 0.6, self.shoulder * 0.6 + 0.105
            canvas.blob(
                [
                    (back * near, 0.195),
                    (back * far * 0.9, 0.205),
                    (back * far, 0.3),
                    (back * far, 0.4),
                    (back * far * 0.85, 0.43),
                    (back * near, 0.42),
                ],
                colour,
            )
            canvas.polygon(
                [
                    (back * far * 0.8, 0.32),
                    (back * (far + 0.022), 0.325),
                    (back * (far + 0.022), 0.4),
                    (back * far * 0.8, 0.41),
                ],
                _scaled(colour, 0.82),
            )
        else:
            w = self.shoulder + 0.012
            canvas.blob(
                [(-w, 0.2), (w, 0.2), (w + 0.02, 0.3), (w + 0.008, 0.43), (-w - 0.008, 0.43), (-w - 0.02, 0.3)], colour
            )

    def _straps(self) -> None:
        colour, canvas = self.look.bag, self.canvas
        if self.view == "front":
            for side in (-1, 1):
                x = side * self.shoulder * 0.62
                canvas.line([(x * 0.95, 0.185), (x * 1.05, 0.28), (x * 1.25, 0.4)], colour, 0.025)
        elif self.view == "side":
            x = self.facing * self.shoulder * 0.25
            canvas.line([(0.0, 0.188), (x, 0.25), (0.0, 0.35), (-x, 0.39)], colour, 0.022)

    def _shoulder_bag(self) -> None:
        """What hangs over a shoulder is painted over the torso: a backpack's straps, a shoulder bag."""
        if self.person["bag"] == "backpack":
            self._straps()
        if self.person["bag"] != "shoulder bag":
            return
        colour, canvas, side = self.look.bag, self.canvas, self.bag_side
        hang = side * (self.hip + 0.015)
        canvas.line(
            [(-side * self.shoulder * 0.65, 0.187), (side * self.waist * 0.9, 0.42)], _scaled(colour, 0.9), 0.017
        )
        canvas.blob([(hang - 0.058, 0.42), (hang + 0.058, 0.42), (hang + 0.062, 0.53), (hang - 0.062, 0.53)], colour)
        canvas.polygon(
            [(hang - 0.058, 0.425), (hang + 0.058, 0.425), (hang + 0.05, 0.47), (hang - 0.05, 0.47)],
            _scaled(colour, 0.82),
        )
        canvas.ellipse((hang, 0.472), 0.008, 0.008, (240, 220, 140))

    def _carried_bag(self) -> None:
        kind, colour, canvas = self.person["bag"], self.look.bag, self.canvas
        hand = self.arms[0 if self.bag_side < 0 else 1][2]
        if kind == "handbag":
            x, y = hand[0] + self.bag_side * 0.012, hand[1] + 0.062
            canvas.line(
                [(x - 0.03, y), (x - 0.02, y - 0.05), (x + 0.02, y - 0.05), (x + 0.03, y)], _scaled(colour, 0.65), 0.01
            )
            canvas.blob(
                [(x - 0.048, y - 0.002), (x + 0.048, y - 0.002), (x + 0.064, y + 0.082), (x - 0.064, y + 0.082)], colour
            )
            canvas.line([(x - 0.05, y + 0.02), (x + 0.05, y + 0.02)], _accent(colour), 0.007)
        elif kind == "shopping bag":
            x, y = hand[0] + self.bag_side * 0.012, hand[1] + 0.07
            canvas.line(
                [(x - 0.022, y), (x - 0.014, y - 0.055), (x + 0.014, y - 0.055), (x + 0.022, y)],
                _scaled(colour, 0.65),
                0.006,
            )
            canvas.polygon([(x - 0.058, y), (x + 0.058, y), (x + 0.054, y + 0.16), (x - 0.054, y + 0.16)], colour)
            canvas.ellipse((x, y + 0.08), 0.026, 0.026, _accent(colour))


def _ring(centre: Point, radius_x: float, radius_y: float) -> list[Point]:
    return [
        (centre[0] + radius_x * math.cos(angle), centre[1] + radius_y * math.sin(angle))
        for angle in (index * math.pi / 5 for index in range(10))
    ]


def _random_colour(rng: random.Random, low: int, high: int) -> Colour:
    return tuple(rng.randint(low, high) for _ in range(3))


def _background(domain: str, size: tuple[int, int], rng: random.Random) -> Image.Image:
    """A wall, a floor and clutter: panels, discs and posts in the source; shards and rails by night in the target."""
    width, height = size
    low, high = (70, 215) if domain == "source" else (35, 135)
    wall, floor = _random_colour(rng, low, high), _random_colour(rng, low, high)
    grey = sum(wall) // 3
    wall, floor = _mixed(wall, (grey,) * 3, 0.45), _mixed(floor, (grey,) * 3, 0.6)
    image = Image.new("RGB", size, wall)
    draw = ImageDraw.Draw(image)
    horizon = int(height * rng.uniform(0.55, 0.85))
    draw.rectangle((0, horizon, width, height), fill=floor)
    for _ in range(rng.randint(3, 8)):
        colour = _mixed(_random_colour(rng, low, 255 if domain == "source" else 200), wall, rng.uniform(0.0, 0.6))
        x, y = rng.uniform(-0.2, 1.0) * width, rng.uniform(-0.1, 1.0) * height
        w, h = rng.uniform(0.1, 0.5) * width, rng.uniform(0.04, 0.3) * height
        if domain == "source":
            kind = rng.random()
            if kind < 0.5:
                draw.rectangle((x, y, x + w, y + h), fill=colour)
            elif kind < 0.75:
                draw.ellipse((x, y, x + w, y + w), fill=colour)
            else:
                draw.line((x, 0, x + rng.uniform(-20, 20), height), fill=colour, width=rng.randint(3, 10))
        elif rng.random() < 0.5:
            corners = [(x + rng.uniform(-1, 1) * w, y + rng.uniform(-1, 1) * h) for _ in range(3)]
            draw.polygon(corners, fill=colour)
        else:
            draw.line((0, y, width, y + rng.uniform(-0.3, 0.3) * height), fill=colour, width=rng.randint(3, 16))
    if rng.random() < 0.5:  # paving
        for step in range(1, 5):
            y = horizon + (height - horizon) * step / 5
            draw.line((0, y, width, y), fill=_scaled(floor, 0.85), width=2)
    return image.filter(ImageFilter.BoxBlur(rng.uniform(0, 4)))


def _eased(value: float, neutral: float, nuisance: float) -> float:
    """A drawn value moved towards, or past, the one that does no harm; at 1 it is what was drawn, to the last bit."""
    return value if nuisance == 1.0 else neutral + nuisance * (value - neutral)


def _occlude(canvas: Image.Image, domain: str, rng: random.Random, nuisance: float) -> None:
    """Now and then something stands before the person: a box at the feet, a post."""
    width, height = canvas.size
    draw = ImageDraw.Draw(canvas)
    low, high = (60, 220) if domain == "source" else (30, 150)
    if rng.random() < 0.14 * nuisance:
        side = rng.choice((0.0, 0.45))
        draw.rectangle(
            (side * width, height * rng.uniform(0.78, 0.92), (side + 0.55) * width, height),
            fill=_random_colour(rng, low, high),
        )
    if rng.random() < 0.1 * nuisance:
        x = rng.uniform(0, 1) * width
        draw.rectangle((x, 0, x + 0.05 * width, height), fill=_random_colour(rng, low, high))


def _photograph(image: Image.Image, domain: str, rng: random.Random, nuisance: float) -> Image.Image:
    """Light, colour cast, blur and sensor noise of one camera."""
    target = domain == "target"
    exposure = _eased(rng.uniform(0.55, 1.08) if target else rng.uniform(0.68, 1.18), 0.95, nuisance)
    cast = [exposure * _eased(rng.uniform(0.9, 1.1), 1.0, nuisance) for _ in range(3)]
    if target:
        cast[1] *= 1.04
        cast[2] *= 0.92
    blur = _eased(rng.uniform(0.3, 2.2) if target else rng.uniform(0.0, 1.6), 0.0, nuisance)
    image = image.filter(ImageFilter.GaussianBlur(blur))
    pixels = np.asarray(image, dtype=np.float32) * np.asarray(cast, dtype=np.float32)
    # Light falls from one side.
    slope = _eased(rng.uniform(-0.3, 0.3), 0.0, nuisance)
    pixels *= np.linspace(1 - slope, 1 + slope, pixels.shape[1], dtype=np.float32)[None, :, None]
    haze = _eased(rng.uniform(0, 26) if target else rng.uniform(0, 14), 0.0, nuisance)
    pixels += haze
    generator = np.random.default_rng(rng.getrandbits(64))
    noise = generator.standard_normal(pixels.shape[:2], dtype=np.float32) * _eased(
        rng.uniform(3, 13) if target else rng.uniform(0, 5), 0.0, nuisance
    )
    pixels += noise[:, :, None]
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def draw_person(
    person: Person, appearance: Appearance, domain: str, rng: random.Random, nuisance: float = 1.0
) -> Image.Image:
    """Draws one photograph of a person.

    Args:
        person: the attributes, see `ATTRIBUTES`.
        appearance: the person's own shades, from `sample_appearance`.
        domain: `source` or `target`: background and camera.
        rng: the only source of chance: pose, side, scale, shift, occlusion, light, blur.
        nuisance: factor on how far scale, shift, light, blur and noise go, and how often something stands before.

    Returns:
        An RGB image, 384 high and 128 wide.
    """
    size = (IMAGE_WIDTH * _OVERSAMPLING, IMAGE_HEIGHT * _OVERSAMPLING)
    background = _background(domain, size, rng)
    height = size[1] * min(_eased(rng.uniform(0.76, 0.93), 0.85, nuisance), 0.97)
    centre = size[0] * (0.5 + _eased(rng.uniform(-0.09, 0.09), 0.0, nuisance))
    top = (size[1] - height) * rng.uniform(0.3, 0.8) + height * 0.02
    figure = background.copy()
    canvas = _Canvas(figure, centre, top, height)
    shadow_y = 0.995
    canvas.ellipse((0.02, shadow_y), 0.17, 0.014, _scaled(background.getpixel((size[0] // 2, size[1] - 4)), 0.6))
    _Pedestrian(canvas, person, appearance, rng).draw()
    _occlude(figure, domain, rng, nuisance)
    small, empty = (
        picture.resize((IMAGE_WIDTH, IMAGE_HEIGHT), Image.Resampling.BOX) for picture in (figure, background)
    )
    # Roundness: the figure darkens towards its edge on the side away from the light.
    silhouette = ImageChops.difference(small, empty).convert("L").point(lambda level: 255 if level > 10 else 0)
    lit = ImageChops.offset(silhouette.filter(ImageFilter.BoxBlur(5)), rng.choice((-3, 3)), -1)
    shade = lit.point(lambda level: 150 + level * 105 // 255)
    shaded = ImageChops.multiply(small, Image.merge("RGB", (shade,) * 3))
    return _photograph(Image.composite(shaded, small, silhouette), domain, rng, nuisance)
