"""Operations of other packages: entry points of the group "surgery.ops", each a class of the shape of `graph.op.Op`.

    [project.entry-points."surgery.ops"]
    clamp = "surgery_clamp:Clamp"

Listing them reads metadata and imports nothing. SURGERY_PLUGINS names the ones to use, apart by commas; empty turns all
off. A plug-in cannot take the name of an operation of ours: ours is found first. Lineage and keys of results name the
distribution and its version.
"""

import os
from dataclasses import dataclass
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from surgery.errors import ResourceError, UsageError, printable

GROUP = "surgery.ops"
_NEEDED = ("name", "version", "parents", "trainer", "plan", "run")


@dataclass(frozen=True)
class Plugin:
    """An entry point, and the distribution and version that it comes from ("surgery-clamp 0.1")."""

    point: EntryPoint
    origin: str


def plugin_ops() -> dict[str, Plugin]:
    """The plug-ins that may be used, by name."""
    chosen = os.environ.get("SURGERY_PLUGINS")
    names = None if chosen is None else {name.strip() for name in chosen.split(",")}
    return {name: point for name, point in _installed().items() if names is None or name in names}


@cache
def _installed() -> dict[str, Plugin]:
    found: dict[str, Plugin] = {}
    points = (
        (p, f"{p.dist.name} {p.dist.version}" if p.dist else "an unknown package") for p in entry_points(group=GROUP)
    )
    for point, origin in sorted(points, key=lambda pair: (pair[0].name, pair[1])):
        other = found.setdefault(point.name, Plugin(point, origin)).origin
        if other != origin:
            what = f"{other} and {origin} both bring an operation '{printable(point.name)}'"
            raise UsageError("plugins", what, hint="uninstall one of them")
    return found


def load_plugin(name: str) -> Any:
    """The class of a plug-in, with `plugin` set to where it comes from. Raises `ResourceError` where it cannot be
    imported, `UsageError` where it is no operation or goes by another name."""
    found = plugin_ops()[name]
    called = f"plug-in '{printable(name)}' of {found.origin}"
    try:
        kind = found.point.load()
    except Exception as err:
        what = f"{called}: {type(err).__name__}: {printable(str(err))}"
        raise ResourceError("plugin", what, hint="reinstall it, or leave it out: SURGERY_PLUGINS=") from None
    lacking = [word for word in _NEEDED if not hasattr(kind, word)]
    if lacking or kind.name != name:
        fault = f"has no {lacking[0]}" if lacking else f"calls itself '{printable(str(kind.name))}'"
        raise UsageError("plugin", f"{called} {fault}", hint="see examples/plugin in the sources")
    kind.plugin = found.origin
    return kind
