"""What the PNG and the page show alike: which points, which front, and where labels find room."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torchchat_core.measure.comparing import Comparison, Row, shortened

LABEL_LENGTH = 26  # characters
LOG_FROM = 5.0  # largest over smallest value from which an axis is logarithmic
DISTANCES = (4, 12, 22, 34, 48, 64, 82, 102, 124)  # pixels between a point and its label, nearest first
FRONT_SENTENCE = "on the Pareto front of bytes, mean KL divergence and decoding speed: no other row is better in one " \
                 "of them and worse in none"


@dataclass(frozen=True, kw_only=True)
class Point:
    """One row in one panel."""

    name: str
    label: str
    x: float  # bytes
    y: float
    size: float  # decoding speed as a share of the fastest row's
    on_front: bool


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One quantity over the size of the weights."""

    title: str
    points: tuple[Point, ...]
    logarithmic: bool
    at_zero: tuple[str, ...] = ()  # names of rows that a logarithmic axis cannot show

    @property
    def staircase(self) -> list[Point]:
        """The points that no other one beats in both quantities of the panel, smallest first."""
        best: list[Point] = []
        for point in sorted(self.points, key=lambda point: (point.x, point.y)):
            if not best or point.y < best[-1].y:
                best.append(point)
        return best


def panels(comparison: Comparison) -> tuple[Panel, Panel]:
    """Perplexity and mean KL divergence, each over the size; rows whose divergence is zero are named beside it."""
    perplexities = [row.perplexity.perplexity for row in comparison.rows]
    apart = [row for row in comparison.rows if row.divergence.mean_kl > 0]
    same = tuple(shortened(row.label, LABEL_LENGTH) for row in comparison.rows if row not in apart)
    return (
        Panel(title="Perplexity", points=tuple(_point(row, row.perplexity.perplexity, comparison)
                                               for row in comparison.rows),
              logarithmic=max(perplexities) > LOG_FROM * min(perplexities)),
        Panel(title="Mean KL divergence, nats", points=tuple(_point(row, row.divergence.mean_kl, comparison)
                                                             for row in apart), logarithmic=True, at_zero=same),
    )


def _point(row: Row, y: float, comparison: Comparison) -> Point:
    fastest = max(each.rates.decode.median for each in comparison.rows)
    return Point(name=row.label, label=shortened(row.label, LABEL_LENGTH), x=row.bytes, y=y,
                 size=row.rates.decode.median / fastest, on_front=row in comparison.front)


# ---- axes ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Axis:
    """A range of values, with room at both ends, and where its marks are."""

    low: float
    high: float
    logarithmic: bool = False

    @classmethod
    def around(cls, values: Sequence[float], logarithmic: bool = False) -> Axis:
        """That holds all the values; a range of one value, or of none, gets a width of its own."""
        if logarithmic:
            low, high = min(values, default=1e-4), max(values, default=1.0)
            room = (high / low) ** 0.1 if high > low * 1.01 else 2.0
            return cls(low=low / room, high=high * room, logarithmic=True)
        low, high = min(values, default=0.0), max(values, default=1.0)
        room = 0.1 * (high - low) if high > low else 0.1 * abs(high) or 1.0
        return cls(low=low - room, high=high + room)

    def share(self, value: float) -> float:
        """Where the value lies between the ends, 0 to 1."""
        if self.logarithmic:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)

    @property
    def ticks(self) -> list[float]:
        """Round values within the range, three to about eight of them."""
        if self.logarithmic:
            found = self._powers((1,))
            found = found if len(found) > 2 else self._powers((1, 2, 5))
            if len(found) > 2:
                return found[:: math.ceil(len(found) / 8)]
        rough = (self.high - self.low) / 7
        unit = 10.0 ** math.floor(math.log10(rough))
        step = unit * next(each for each in (1, 2, 5, 10) if each * unit >= rough)
        first = math.ceil(self.low / step)
        return [index * step for index in range(first, math.floor(self.high / step) + 1)]

    def _powers(self, factors: Sequence[int]) -> list[float]:
        exponents = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        return [value for exponent in exponents for factor in factors
                if self.low <= (value := factor * 10.0**exponent) <= self.high]


# ---- labels -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Box:
    """A rectangle in pixels; y grows downwards."""

    left: float
    top: float
    width: float
    height: float

    def overlaps(self, other: Box) -> bool:
        return self.left < other.left + other.width and other.left < self.left + self.width \
            and self.top < other.top + other.height and other.top < self.top + self.height

    def within(self, other: Box) -> bool:
        return other.left <= self.left and self.left + self.width <= other.left + other.width \
            and other.top <= self.top and self.top + self.height <= other.top + other.height


def place_labels(circles: Sequence[tuple[float, float, float]], widths: Sequence[float], height: float, room: Box
                 ) -> list[Box]:
    """A place for the label of each circle (x, y, radius): as near as there is room without covering anything.

    Where there is none, the label stands at the right of its circle all the same.
    """
    taken = [Box(x - radius, y - radius, 2 * radius, 2 * radius) for x, y, radius in circles]
    places = []
    for (x, y, radius), width in zip(circles, widths, strict=True):
        wanted = [Box(x + dx, y + dy, width, height) for distance in DISTANCES
                  for dx, dy in _offsets(radius + distance, width, height)]
        free = (box for box in wanted if box.within(room) and not any(box.overlaps(other) for other in taken))
        places.append(next(free, wanted[0]))
        taken.append(places[-1])
    return places


def _offsets(distance: float, width: float, height: float) -> list[tuple[float, float]]:
    """From a circle's centre to a label's upper left corner: right, left, above, below, and the corners."""
    slant = 0.7 * distance
    return [(distance, -height / 2), (-distance - width, -height / 2), (-width / 2, -distance - height),
            (-width / 2, distance), (slant, -slant - height), (slant, slant), (-slant - width, -slant - height),
            (-slant - width, slant)]
