"""Where the language towers of two checkpoints lie: told by their names, and where these leave it open by their class.

Names are enough for every known family and cost nothing. Asking a class (`exact`) means importing transformers, so it
happens only when no prefix or more than one fits; how it was found is part of the answer.
"""

from collections.abc import Mapping
from dataclasses import replace

from surgery.arch.language.families import family_of
from surgery.arch.language.towers import (
    EMBED,
    NoTower,
    OtherNames,
    SeveralTowers,
    Shapes,
    Tower,
    TowerMap,
    Unclear,
    find_towers,
    language_tower,
    match_towers,
    named_tower,
    shapes_of,
    towers,
)
from surgery.errors import CheckpointError, ResourceError, SurgeryError, UsageError
from surgery.store.checkpoint import Checkpoint


def locate_towers(
    host: Checkpoint,
    donor: Checkpoint,
    *,
    prefix: str | None = None,
    layer_map: Mapping[int, int] | None = None,
    ignore_extra: bool = False,
) -> TowerMap:
    """Map the host's language tower to the donor's layers. Arguments and errors as `towers.find_towers`."""
    mine, theirs = shapes_of(host.tensors), shapes_of(donor.tensors)
    names = {"host_name": host.name, "donor_name": donor.name}
    try:
        return find_towers(mine, theirs, prefix=prefix, layer_map=layer_map, ignore_extra=ignore_extra, **names)
    except Unclear as err:
        if isinstance(err, OtherNames) and _familiar(host, mine) and _familiar(donor, theirs):
            raise  # both towers are known to have their own names: the models differ
        unclear = err
    try:
        own, by_class = _tower(host, mine, prefix)
        other, _ = _tower(donor, theirs, None)
    except (CheckpointError, ResourceError, UsageError) as err:
        raise _with_reason(unclear, err) from None
    found = match_towers([own], other, mine, theirs, layer_map=layer_map, ignore_extra=ignore_extra, **names)
    return replace(found, by_class=by_class)


def locate_tower(checkpoint: Checkpoint) -> Tower:
    """The language tower of one checkpoint. Raises what `towers.language_tower` does."""
    shapes = shapes_of(checkpoint.tensors)
    try:
        return language_tower(shapes, where=checkpoint.name)
    except Unclear as err:
        unclear = err
    try:
        return _tower(checkpoint, shapes, None)[0]
    except (CheckpointError, ResourceError, UsageError) as err:
        raise _with_reason(unclear, err) from None


def _familiar(checkpoint: Checkpoint, shapes: Shapes) -> bool:
    """Whether the names are those of a family of the table, or of a text model."""
    family = family_of(checkpoint.part().config)
    known = family.towers if family is not None else ("model.",)
    return any(tower.prefix in known and EMBED in tower.names for tower in towers(shapes))


def _tower(checkpoint: Checkpoint, shapes: Shapes, prefix: str | None) -> tuple[Tower, str]:
    """The tower and the name of the class that told it; "" where `prefix` did, or names do because no class can."""
    if prefix is not None:
        return named_tower(towers(shapes), prefix, checkpoint.name), ""
    if checkpoint.part().config is None:
        reason: SurgeryError = CheckpointError("no-config", f"{checkpoint.name} has no config.json")
    else:
        from surgery.arch.language.exact import class_tower

        try:
            return class_tower(checkpoint)
        except (CheckpointError, ResourceError) as err:
            reason = err
    try:
        return language_tower(shapes, where=checkpoint.name), ""
    except (NoTower, SeveralTowers):
        raise reason from None


def _with_reason(unclear: Unclear, reason: SurgeryError) -> SurgeryError:
    """What names left open, with the reason why no class could tell."""
    assert isinstance(unclear, SurgeryError)
    code = unclear.code.partition(".")[2]
    hint = "; ".join(filter(None, (unclear.hint, f"its class could not be asked: {reason.message}")))
    return type(unclear)(code, unclear.message, hint=hint)
