"""Scenes of simple shapes, drawn from a seed: objects on a pale ground whose places in the picture are known.

The small counterpart of photographs of two things: each noun has one shape and one colour, positions are random, and
where one object lies relative to another follows from the coordinates. `draw` makes the picture, `ask` the questions.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from surgery.errors import UsageError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

NOUNS = ("square", "circle", "triangle", "diamond", "cross", "ring")
"""What a scene can hold; each has its own shape and colour."""

COLOURS = ((31, 98, 196), (206, 47, 44), (34, 139, 58), (232, 160, 12), (128, 60, 168), (0, 158, 168))
"""RGB of each noun."""

PLACES = ("left", "right", "top", "bottom")
"""Answers about one object in the picture."""

RELATIONS = ("left", "right", "above", "below")
"""Answers about one object relative to another."""

WORDS = (
    *NOUNS, *dict.fromkeys((*PLACES, *RELATIONS)),
    "where", "is", "in", "the", "a", "an", "to", "of", "and", "or", "with", "relation", "picture", "photo", "answer",
    "there", "yes", "no", "nothing",
)  # fmt: skip
"""All words that questions and answers about scenes are made of, and "nothing" for empty ground."""

GROUND = 235
MARGIN = 1.25  # a question is asked when the larger distance is this many times the smaller


@dataclass(frozen=True)
class SceneSettings:
    """How scenes look: side of the picture in pixels, fewest and most objects, smallest and largest half side of an
    object in pixels, and the standard deviation of the noise on every pixel (of 255)."""

    size: int = 96
    objects: tuple[int, int] = (2, 4)
    radius: tuple[float, float] = (7.5, 12.0)
    noise: float = 10.0

    def __post_init__(self) -> None:
        few, most = self.objects
        small, large = self.radius
        if not 16 <= self.size <= 2048:
            raise UsageError("scene", f"pictures of {self.size} pixels", hint="16 to 2048")
        if not 1 <= few <= most <= len(NOUNS):
            raise UsageError("scene", f"{few} to {most} objects in a scene", hint=f"1 to {len(NOUNS)}, fewest first")
        if not 1 <= small <= large <= self.size / 6:
            raise UsageError(
                "scene", f"objects of half side {small:g} to {large:g}", hint=f"1 to {self.size / 6:g}, smallest first"
            )
        if not 0 <= self.noise <= 255:
            raise UsageError("scene", f"noise of standard deviation {self.noise:g}", hint="0 to 255")


@dataclass(frozen=True)
class Placed:
    """One object: index of its noun, centre and half side in pixels (x to the right, y down)."""

    noun: int
    x: float
    y: float
    radius: float

    @property
    def name(self) -> str:
        """The noun."""
        return NOUNS[self.noun]

    @property
    def box(self) -> tuple[float, float, float, float]:
        """Left, top, right, bottom in pixels."""
        return (self.x - self.radius, self.y - self.radius, self.x + self.radius, self.y + self.radius)


@dataclass(frozen=True)
class Question:
    """A question about a scene, its answer, and what is asked about (`other` None: about the picture)."""

    text: str
    answer: str
    options: tuple[str, ...]
    subject: Placed
    other: Placed | None


def place(generator: "np.random.Generator", settings: SceneSettings, first: Sequence[int] = ()) -> tuple[Placed, ...]:
    """Objects of distinct nouns at random places that do not overlap and lie whole in the picture; those of the nouns
    `first` (indices) are there in any case, in that order."""
    count = max(len(first), int(generator.integers(settings.objects[0], settings.objects[1] + 1)))
    others = [int(n) for n in generator.permutation(len(NOUNS)) if n not in first]
    nouns = [*first, *others][:count]
    while True:
        placed: list[Placed] = []
        for noun in nouns:
            radius = float(generator.uniform(*settings.radius))
            for _ in range(50):
                x, y = (float(v) for v in generator.uniform(radius, settings.size - radius, 2))
                if all(max(abs(x - p.x), abs(y - p.y)) >= radius + p.radius + 1 for p in placed):
                    placed.append(Placed(noun, x, y, radius))
                    break
        if len(placed) == count:
            return tuple(placed)


def relation(dx: float, dy: float) -> str | None:
    """The side on which (dx, dy) lies, "left" "right" "above" "below"; None when neither axis clearly wins."""
    if max(abs(dx), abs(dy)) < MARGIN * min(abs(dx), abs(dy)):
        return None
    if abs(dx) > abs(dy):
        return "left" if dx < 0 else "right"
    return "above" if dy < 0 else "below"


def ask(subject: Placed, other: Placed | None, size: int) -> Question | None:
    """The question about `subject` relative to `other`, or to the middle of the picture; None when it lies across.

    The answer is the side of the larger distance between centres. The last word of the question is the thing itself:
    the row that answers, and that attention steering acts on, is then one that has to look.
    """
    if other is not None:
        side = relation(subject.x - other.x, subject.y - other.y)
        text = f"Where is the {subject.name} in relation to the {other.name}?"
        return None if side is None else Question(text, side, RELATIONS, subject, other)
    side = relation(subject.x - size / 2, subject.y - size / 2)
    text = f"Where in the picture is the {subject.name}?"
    name = {"above": "top", "below": "bottom"}.get(side or "", side)
    return None if name is None else Question(text, name, PLACES, subject, None)


def draw(objects: Sequence[Placed], settings: SceneSettings, generator: "np.random.Generator") -> "NDArray[np.uint8]":
    """The picture, uint8 [size, size, 3]: smooth edges, then noise from `generator`."""
    import numpy as np

    size = settings.size
    picture = np.full((size, size, 3), float(GROUND), dtype=np.float32)
    for thing in objects:
        left, top = (max(0, int(v) - 1) for v in thing.box[:2])
        right, bottom = (min(size, int(v) + 3) for v in thing.box[2:])
        y, x = np.mgrid[top:bottom, left:right].astype(np.float32) + np.float32(0.5)
        inside = np.clip(0.5 - _SHAPES[thing.noun](x - thing.x, y - thing.y, thing.radius), 0, 1)[..., None]
        part = picture[top:bottom, left:right]
        part += inside * (np.array(COLOURS[thing.noun], dtype=np.float32) - part)
    if settings.noise:
        picture += generator.standard_normal(picture.shape, dtype=np.float32) * np.float32(settings.noise)
    return np.clip(np.rint(picture), 0, 255).astype(np.uint8)


# Distances in pixels to the edge of each shape, negative inside, for points relative to its centre.
_Grid = "NDArray[np.float32]"


def _square(x: _Grid, y: _Grid, r: float) -> _Grid:
    import numpy as np

    return np.maximum(np.abs(x), np.abs(y)) - 0.9 * r


def _circle(x: _Grid, y: _Grid, r: float) -> _Grid:
    import numpy as np

    return np.hypot(x, y) - r


def _triangle(x: _Grid, y: _Grid, r: float) -> _Grid:
    import numpy as np

    return np.maximum(y - r, 0.894 * np.abs(x) - 0.447 * (y + r))


def _diamond(x: _Grid, y: _Grid, r: float) -> _Grid:
    import numpy as np

    return 0.707 * (np.abs(x) + np.abs(y) - r)


def _cross(x: _Grid, y: _Grid, r: float) -> _Grid:
    import numpy as np

    far, near = np.maximum(np.abs(x), np.abs(y)), np.minimum(np.abs(x), np.abs(y))
    return np.maximum(far - r, near - 0.38 * r)


def _ring(x: _Grid, y: _Grid, r: float) -> _Grid:
    import numpy as np

    return np.abs(np.hypot(x, y) - 0.72 * r) - 0.28 * r


_SHAPES: tuple[Callable[..., "NDArray[np.float32]"], ...] = (_square, _circle, _triangle, _diamond, _cross, _ring)
