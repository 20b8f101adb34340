"""Places for the names of points in a picture: near their points, and none on another."""

from typing import Any

import numpy as np

# A box is a row of left, bottom, right and top; all lengths are in one unit.
Array = np.ndarray[Any, np.dtype[np.float64]]
_GAP = 2.0  # between two names
_DISTANCES = (6, 9, 13, 18, 24, 31, 39, 48, 60, 75, 95)
_SIDES = np.array(
    [
        (x, y)
        for x in (1, 0.5, 0, -0.5, -1)
        for y in (0, 0.5, -0.5, 1, -1)
        if max(abs(x), abs(y)) == 1
    ]
)
# What a square unit on another thing costs; a unit of distance costs 1.
_ON_NAME, _ON_POINT, _ON_LINE = 50.0, 50.0, 4.0


def place(sizes: Array, points: Array, radius: float, lines: Array, frame: Array) -> Array:
    """Return the box of each name, by its size, beside its point.

    Each name in turn takes the place that costs least given the others' places, until none moves:
    names, points, the ``lines`` between other names and their points, and what is outside of the
    ``frame`` are avoided; ``lines`` are boxes that had better stay free.
    """
    marks = np.hstack([points - radius, points + radius])
    boxes = np.hstack([points, points])  # of no size: not placed yet
    for _ in range(20):
        before = boxes.copy()
        for i in range(len(points)):
            others = np.arange(len(points)) != i
            obstacles = [marks, boxes[others] + np.multiply((-1, -1, 1, 1), _GAP), lines]
            obstacles.append(_leaders(points[others], boxes[others]).reshape(-1, 4))
            weights = np.repeat((_ON_POINT, _ON_NAME, _ON_LINE, _ON_NAME), [*map(len, obstacles)])
            tried, distance = _places(points[i], sizes[i])
            cost = overlaps(tried, np.vstack(obstacles)) @ weights + distance
            leaders = _leaders(np.repeat(points[i : i + 1], len(tried), axis=0), tried)
            crossed = overlaps(leaders.reshape(-1, 4), np.vstack([marks[others], boxes[others]]))
            cost += _ON_NAME * crossed.reshape(len(tried), -1).sum(axis=1)
            outside = sizes[i].prod() - overlaps(tried, frame[None])[:, 0]
            boxes[i] = tried[np.argmin(cost + _ON_NAME * outside)]
        if np.array_equal(before, boxes):
            break
    return boxes


def overlaps(boxes: Array, others: Array) -> Array:
    """Return the area that each box has in common with each of the others."""
    low = np.maximum(boxes[:, None, :2], others[None, :, :2])
    high = np.minimum(boxes[:, None, 2:], others[None, :, 2:])
    return np.clip(high - low, 0, None).prod(axis=2)


def nearest(points: Array, boxes: Array) -> Array:
    """Return the point of each box that is nearest to its point."""
    return np.clip(points, boxes[:, :2], boxes[:, 2:])


def _places(point: Array, size: Array) -> tuple[Array, Array]:
    """Return the boxes that are tried for one name, and their distances from the point."""
    distance = np.repeat(np.array(_DISTANCES, dtype=float), len(_SIDES))
    sides = np.tile(_SIDES, (len(_DISTANCES), 1))
    centers = point + sides * (size / 2 + distance[:, None])
    return np.hstack([centers - size / 2, centers + size / 2]), distance


def _leaders(points: Array, boxes: Array) -> Array:
    """Return small boxes along the line from each point to its name: [points, places, 4]."""
    share = np.linspace(0.25, 1, 8)[None, :, None]
    places = points[:, None] + share * (nearest(points, boxes) - points)[:, None]
    return np.concatenate([places - 0.5, places + 0.5], axis=2)
