"""A person in one pose: the view, the proportions and the joints that all parts of the drawing share."""

import random

from .appearance import Appearance
from .canvas import Canvas
from .people import Person
from .shapes import Point, limb_outline

Joints = tuple[Point, Point, Point]
"""Hip, knee and ankle of a leg, or shoulder, elbow and hand of an arm."""

_BUILD_WIDTH = {"slim": 0.8, "average": 1.0, "heavy": 1.32}


class Figure:
    """A person in one pose on a canvas.

    All lengths are in heights of the person; x is 0 on the body's middle axis. Left and right are those of the picture.

    Args:
        canvas: the canvas to draw on.
        person: the attributes, see `ATTRIBUTES`.
        appearance: the person's colours.
        rng: the only source of randomness: view, side, pose.

    Attributes:
        view: `front`, `back` or `side`.
        facing: -1 if the person looks to the left in a side view, 1 if to the right.
        turn: how far the face is turned in a front view, from -0.4 to 0.4.
        bag_side: -1 if a bag hangs on the left, 1 if on the right.
        build: factor on all widths, 1 for an average build.
        shoulder, waist, hip: half of the body's width there.
        legs, arms: the joints of the left and of the right limb.
    """

    def __init__(self, canvas: Canvas, person: Person, appearance: Appearance, rng: random.Random):
        self.canvas, self.person, self.look = canvas, person, appearance
        # The order of the random draws in this class must stay: another order gives other pictures for the same seed.
        self.view = rng.choices(("front", "back", "side"), (0.5, 0.28, 0.22))[0]
        self.facing = rng.choice((-1, 1))
        self.turn = rng.uniform(-0.4, 0.4) if self.view == "front" else 0.0
        self.is_woman = person["gender"] == "woman"
        from_side = self.view == "side"
        build = _BUILD_WIDTH[person["build"]]
        self.build = build
        self.shoulder = (0.098 if self.is_woman else 0.115) * (0.75 + 0.25 * build) * (0.62 if from_side else 1.0)
        self.waist = (0.062 if self.is_woman else 0.08) * build * (0.8 if from_side else 1.0)
        self.hip = (0.086 if self.is_woman else 0.08) * (0.3 + 0.7 * build) * (0.72 if from_side else 1.0)
        self.bag_side = rng.choice((-1, 1))
        self.legs = self._place_legs(rng)
        self.arms = [self._place_arm(side, rng) for side in (-1, 1)]
        if person["bag"] in ("handbag", "shopping bag"):
            # The hand that carries the bag hangs down.
            shoulder, elbow, _ = self.arms[self.bag_arm]
            self.arms[self.bag_arm] = (shoulder, elbow, (elbow[0] + 0.01 * self.bag_side, 0.5))

    @property
    def bag_arm(self) -> int:
        """Index in `arms` of the arm that carries a bag."""
        return 0 if self.bag_side < 0 else 1

    @property
    def middle_of_front(self) -> float | None:
        """x of the middle of the chest, where a jacket is open or a shirt has its buttons; `None` from the back."""
        if self.view == "back":
            return None
        return self.turn * 0.06 if self.view == "front" else self.facing * self.waist * 0.75

    def limb(self, joints: list[Point], half_widths: list[float], part: str) -> None:
        """Fills the part of a garment that covers a limb; the arguments are those of `limb_outline` and `cloth`."""
        self.cloth(limb_outline(joints, half_widths), part)

    def cloth(self, outline: list[Point], part: str) -> None:
        """Fills an outline with the cloth of the `upper` or the `lower` garment."""
        look = self.look
        colour, accent = (look.upper, look.upper_accent) if part == "upper" else (look.lower, look.lower_accent)
        self.canvas.garment(outline, colour, accent, self.person[f"{part}_pattern"], look.pattern_phase)

    def _place_legs(self, rng: random.Random) -> list[Joints]:
        from_side = self.view == "side"
        stride = rng.uniform(0.06, 0.19) if from_side else rng.uniform(0.0, 0.05)
        apart = 0.2 if from_side else 0.62
        lean = rng.uniform(-0.01, 0.01)
        legs = []
        for side in (-1, 1):
            hip = (side * self.hip * apart * 0.75, 0.52)
            lift = rng.uniform(0, 0.025) if side == self.facing else 0
            ankle = (side * (self.hip * apart + stride) + lean, 0.945 - lift)
            bend = rng.uniform(0.0, 0.03) * (self.facing if from_side else side)
            knee = ((hip[0] + ankle[0]) / 2 + bend, 0.735)
            legs.append((hip, knee, ankle))
        return legs

    def _place_arm(self, side: int, rng: random.Random) -> Joints:
        from_side = self.view == "side"
        shoulder = (side * self.shoulder * (0.3 if from_side else 0.93), 0.205)
        swing = rng.uniform(-0.09, 0.09) if from_side else side * rng.uniform(0.015, 0.06)
        elbow = (shoulder[0] + swing, 0.355)
        kind = rng.random()
        if kind < 0.72:
            hand = (elbow[0] + swing * 0.3 + (self.facing * 0.03 if from_side else 0.0), 0.495)
        elif kind < 0.88:
            # The hand is in front of the belly.
            hand = (elbow[0] * 0.25 + (self.facing * 0.09 if from_side else 0.0), 0.43)
        else:
            # The hand is raised, as if it held a telephone.
            hand = (elbow[0] * 0.75 + (self.facing * 0.09 if from_side else side * 0.01), 0.25)
        return shoulder, elbow, hand
