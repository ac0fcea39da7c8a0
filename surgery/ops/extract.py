"""Extract: one part of a pipeline, or one tower inside a model, as a checkpoint of its own.

Inputs: one checkpoint. Changes: which tensors there are, and with a prefix their names and the config that describes
them. Every byte is kept.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from surgery.arch.carried import config_edits, kept, output_base, side_files
from surgery.errors import UsageError, closest, printable
from surgery.graph.op import Compute, Entry, Param, PartNames, Plan, PlanContext, SideFile, json_bytes
from surgery.store.checkpoint import Checkpoint
from surgery.store.tensors import Part

# Words in a prefix, and the objects of a config that describe such a tower.
_TOWERS: Mapping[str, tuple[str, ...]] = {
    "vision_config": ("vision", "visual", "vit", "image"),
    "audio_config": ("audio", "speech"),
    "text_config": ("text", "language", "llm", "lm"),
    "llm_config": ("text", "language", "llm", "lm"),
    "language_config": ("text", "language", "llm", "lm"),
}
_INHERITED = ("dtype", "torch_dtype", "tie_word_embeddings", "transformers_version")


@dataclass(frozen=True)
class Extract:
    """Take one part out of a pipeline, or one tower out of a model.

    PART is the folder of a pipeline. --prefix takes the tensors whose names start so; --strip cuts the prefix off, and
    OLD=NEW puts another in its place. A tower's own object in the config becomes its config.json.

    Examples:

      surgery extract dit-pipeline transformer -o out/transformer

      surgery extract llava --prefix model.language_model.=model. --prefix lm_head. -o out/llm
    """

    part: Annotated[str | None, Param("Part of a pipeline.", positional=True, metavar="[PART]")] = None
    prefix: Annotated[tuple[str, ...], Param("Start of the names to take, repeatable.", (), "PREFIX[=NEW]")] = ()
    strip: Annotated[bool, Param("Cut the prefixes off the names.")] = False
    config_key: Annotated[str | None, Param("Object of the config to use as config.json.", (), "KEY")] = None

    name: ClassVar[str] = "extract"
    version: ClassVar[int] = 1
    parents: ClassVar[int] = 1
    trainer: ClassVar[str | None] = None

    def plan(self, ctx: PlanContext, base: Checkpoint) -> Plan:
        """The tensors taken, under their new names, with the side files that go with them."""
        part = self._part(base)
        if self.prefix:
            return self._tower(base, part)
        if self.strip or self.config_key:
            option = "--strip" if self.strip else "--config-key"
            raise UsageError("prefix", f"{option} goes with --prefix", hint="give --prefix model.language_model.")
        if len(base.parts) == 1 and base.selected is None and not part.name:
            raise UsageError(
                "nothing-to-extract", f"{base.name}: not a pipeline, it has one part", hint="give --prefix NAME"
            )
        entries = tuple(kept(part, n, ref, into="") for n, ref in part.tensors.items())
        dropped = tuple(n for n, ref in base.tensors.items() if ref.file not in part.files)
        files = tuple(_part_files(base, part))
        return Plan(
            entries, (PartNames("", output_base(base, part)),), files, dropped, report=_report(entries, dropped)
        )

    def run(self, task: Compute, tensors: list[Any], generator: Any) -> Any:
        """Nothing is ever computed."""
        raise AssertionError(task.name)

    def describe(self, plan: Plan) -> list[str]:
        """Lines of a dry run."""
        report = plan.report
        lines = [
            f"takes    {report['tensors']:,} tensors, {report['bytes']:,} bytes; leaves {report['left']:,} tensors"
        ]
        if report.get("config"):
            lines.append(f"config   {report['config']} becomes config.json")
        return lines

    def _part(self, base: Checkpoint) -> Part:
        if self.part is not None:
            return base.part(self.part)
        if len(base.parts) > 1:
            raise UsageError("part", f"{base.name}: which part?", hint=f"one of {', '.join(base.parts)}")
        return base.part()

    def _tower(self, base: Checkpoint, part: Part) -> Plan:
        starts = [_start(text, strip=self.strip) for text in self.prefix]
        entries: list[Entry] = []
        taken: dict[str, str] = {}
        used = dict.fromkeys((old for old, _ in starts), 0)
        for name, ref in part.tensors.items():
            found = next((pair for pair in starts if name.startswith(pair[0])), None)
            if found is None:
                continue
            used[found[0]] += 1
            new = found[1] + name[len(found[0]) :]
            if not new or new in taken:
                what = f"both be called '{printable(new)}'" if new else "have no name left"
                raise UsageError(
                    "collision",
                    f"'{printable(taken.get(new, name))}' and '{printable(name)}' would {what}",
                    hint="write --prefix OLD=NEW to tell them apart",
                )
            taken[new] = name
            entries.append(kept(part, new, ref, into=""))
        for old, count in used.items():
            if not count:
                starts_known = dict.fromkeys(_stems(part.tensors))
                raise UsageError(
                    "unmatched",
                    f"{base.name}: no tensor starts with '{printable(old)}'",
                    hint=closest(old, [printable(s) for s in starts_known]),
                )
        config, key = self._config(base, part)
        inner = f"{part.name}/" if part.name else ""
        files = [f for f in _part_files(base, part) if f.relative != "config.json"]
        edits: tuple[tuple[str, Any, Any], ...] = ()
        warnings: tuple[str, ...] = ()
        if config is not None:
            files.append(SideFile("config.json", content=json_bytes(config)))
            if key is not None:
                edits = config_edits("config.json", part.config, config)
            else:
                warnings = (f"{base.name}: config.json still describes the whole model; --config-key names its object",)
        everything = set(taken.values())
        dropped = tuple(n for n, ref in base.tensors.items() if ref.file not in part.files)
        dropped += tuple(inner + n for n in part.tensors if n not in everything)
        report = {**_report(tuple(entries), dropped), "config": key}
        parts = (PartNames("", output_base(base, part)),)
        return Plan(tuple(entries), parts, tuple(files), dropped, edits, warnings, report)

    def _config(self, base: Checkpoint, part: Part) -> tuple[dict[str, Any] | None, str | None]:
        """The tower's config and the key it had; the whole model's config and None where it has none of its own."""
        if part.config is None:
            return None, None
        objects = {k: v for k, v in part.config.items() if isinstance(v, Mapping)}
        key = self.config_key
        if key is not None and key not in objects:
            raise UsageError(
                "config-key",
                f"{base.name}: its config has no object '{printable(key)}'",
                hint=closest(key, list(objects)) if objects else "leave --config-key out",
            )
        if key is None:
            pieces = self.prefix[0].partition("=")[0].split(".")
            key = next((k for k, words in _TOWERS.items() if k in objects and _mentions(pieces, words)), None)
        if key is None:
            return dict(part.config), None
        inherited = {k: part.config[k] for k in _INHERITED if k in part.config and k not in objects[key]}
        return {**objects[key], **inherited}, key


def _start(text: str, *, strip: bool) -> tuple[str, str]:
    """("model.language_model.", "model.") for OLD=NEW; without = the prefix stays, or goes with `strip`."""
    old, sign, new = text.partition("=")
    if not old:
        raise UsageError("prefix", f"--prefix '{printable(text)}': empty", hint="give the start of the names to take")
    return old, new if sign else "" if strip else old


def _mentions(pieces: list[str], words: tuple[str, ...]) -> bool:
    return any(word in piece.split("_") or piece == word for piece in pieces for word in words)


def _part_files(base: Checkpoint, part: Part) -> Iterator[SideFile]:
    """The side files of the part at the root; a diffusion model takes the description of its noise process along."""
    if not part.name:
        yield from side_files(base)
        return
    prefix = f"{part.name}/"
    for name in base.side_files:
        if name.startswith(prefix):
            yield SideFile(name.removeprefix(prefix), source=str(base.root / name))
    noise = "scheduler/scheduler_config.json"
    if part.name in ("transformer", "unet") and noise in base.side_files:
        yield SideFile("scheduler_config.json", source=str(base.root / noise))


def _stems(names: Mapping[str, Any]) -> Iterator[str]:
    """Every start of a name up to a dot, before its first number."""
    for name in names:
        pieces = name.split(".")
        for i, piece in enumerate(pieces[:-1]):
            if piece.isdecimal():
                break
            yield ".".join(pieces[: i + 1]) + "."


def _report(entries: tuple[Entry, ...], dropped: tuple[str, ...]) -> dict[str, Any]:
    return {"tensors": len(entries), "bytes": sum(e.nbytes for e in entries), "left": len(dropped)}
