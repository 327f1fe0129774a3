"""Outlines as lists of points: smooth curves, ellipses and limbs."""

import math

Point = tuple[float, float]
"""x to the right and y down."""


def _interpolate(before: float, start: float, end: float, after: float, t: float) -> float:
    """One coordinate of a Catmull-Rom curve between `start` (`t` 0) and `end` (`t` 1)."""
    a, b, c, d = before, start, end, after
    return 0.5 * (2 * b + (c - a) * t + (2 * a - 5 * b + 4 * c - d) * t * t + (3 * b - a - 3 * c + d) * t * t * t)


def smooth_curve(points: list[Point], steps: int = 5) -> list[Point]:
    """Returns a closed Catmull-Rom curve through the points, with `steps` points from each one to the next."""
    curve = []
    count = len(points)
    for index in range(count):
        p0, p1, p2, p3 = (points[(index + offset) % count] for offset in (-1, 0, 1, 2))
        for step in range(steps):
            t = step / steps
            x = _interpolate(p0[0], p1[0], p2[0], p3[0], t)
            y = _interpolate(p0[1], p1[1], p2[1], p3[1], t)
            curve.append((x, y))
    return curve


def ellipse_points(centre: Point, radius_x: float, radius_y: float) -> list[Point]:
    """Returns ten points on an ellipse."""
    return [
        (centre[0] + radius_x * math.cos(angle), centre[1] + radius_y * math.sin(angle))
        for angle in (index * math.pi / 5 for index in range(10))
    ]


def limb_outline(joints: list[Point], half_widths: list[float]) -> list[Point]:
    """Returns the smooth outline of a limb.

    Args:
        joints: two or three points along the limb.
        half_widths: half of the limb's width at each joint.
    """
    left, right = [], []
    for index, (joint, width) in enumerate(zip(joints, half_widths, strict=True)):
        before, after = joints[max(0, index - 1)], joints[min(len(joints) - 1, index + 1)]
        dx, dy = after[0] - before[0], after[1] - before[1]
        length = math.hypot(dx, dy) or 1.0
        normal = (-dy / length, dx / length)
        left.append((joint[0] + normal[0] * width, joint[1] + normal[1] * width))
        right.append((joint[0] - normal[0] * width, joint[1] - normal[1] * width))
    last, end = joints[-2:]
    length = math.hypot(end[0] - last[0], end[1] - last[1]) or 1.0
    tip = (
        end[0] + (end[0] - last[0]) / length * half_widths[-1] * 0.4,
        end[1] + (end[1] - last[1]) / length * half_widths[-1] * 0.4,
    )
    return smooth_curve([*left, tip, *reversed(right)], steps=4)
