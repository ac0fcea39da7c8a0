"""Slice: keep, drop and repeat numbered blocks.

Dropping blocks prunes a model's depth, repeating them scales it up (as SOLAR does, arXiv 2312.15166); either way the
result wants training. Inputs: one checkpoint of any family whose names number its blocks. Changes: names of the blocks'
tensors, and what the config says about their number. Every byte is kept.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Annotated, Any, ClassVar

from surgery.arch.blocks import BlockList, DepthEdit, block_lists, edit_depth, find_blocks, split_block
from surgery.arch.carried import config_edits, full_name, keep_all, kept, part_names, side_files
from surgery.arch.layers import parse_sequence
from surgery.errors import UsageError
from surgery.graph.op import Compute, Entry, Param, Plan, PlanContext
from surgery.store.checkpoint import Checkpoint
from surgery.store.tensors import Part, TensorRef


@dataclass(frozen=True)
class Slice:
    """Keep the blocks of a model that --layers lists, in that order; a block may stand twice.

    Gaps prune the depth, repeats scale it up. Ranges include both ends. The config's depth follows, as do its lists
    with one value a block and the operators of a grafted model.

    Examples:

      surgery slice dit-xl-2 --layers 0-10,14-27 -o out/shorter

      surgery slice llama --layers 0-23,8-31 -o out/deeper

      surgery slice llava --prefix model.language_model.layers. --layers 0-15 --dry-run
    """

    layers: Annotated[str, Param("Blocks to keep, in order: 0-10,14-27.", ("-l",), "LIST")]
    prefix: Annotated[str | None, Param("Which blocks, where a model has several lists: model.layers.", (), "NAME")] = (
        None
    )
    depth_key: Annotated[str | None, Param("Config key that counts the blocks, where it is not found.", (), "KEY")] = (
        None
    )

    name: ClassVar[str] = "slice"
    version: ClassVar[int] = 1
    parents: ClassVar[int] = 1
    trainer: ClassVar[str | None] = None

    def plan(self, ctx: PlanContext, base: Checkpoint) -> Plan:
        """Every kept block's tensors under their new numbers, everything else as it is."""
        part, blocks = self._blocks(base)
        order = parse_sequence(self.layers, blocks.count)
        inside: dict[int, list[tuple[str, TensorRef]]] = {n: [] for n in range(blocks.count)}
        entries: list[Entry] = list(keep_all(base, but=part))
        for name, ref in part.tensors.items():
            found = split_block(name, blocks.prefix)
            if found is None:
                entries.append(kept(part, name, ref))
            else:
                inside[found[0]].append((found[1], ref))
        for new, old in enumerate(order):
            entries += [kept(part, f"{blocks.prefix}{new}.{rest}", ref) for rest, ref in inside[old]]
        edit = self._config(base, part, blocks, order)
        edited: dict[str, Any] = {}
        edits: tuple[tuple[str, Any, Any], ...] = ()
        if edit is not None and part.config_file is not None:
            edited[part.config_file] = edit.config
            edits = config_edits(part.config_file, part.config, edit.config)
        dropped = [full_name(part, ref.name) for n in range(blocks.count) if n not in order for _, ref in inside[n]]
        report = {
            "prefix": full_name(part, blocks.prefix),
            "blocks": {"before": blocks.count, "after": len(order)},
            "order": list(order),
            "depth_keys": list(edit.keys) if edit else [],
            "parameters": {"before": _parameters(base), "after": sum(_elements(e.shape) for e in entries)},
        }
        return Plan(
            tuple(entries),
            part_names(base),
            side_files(base, edited),
            dropped=tuple(dropped),
            config_edits=edits,
            warnings=_warnings(base, edit),
            report=report,
        )

    def run(self, task: Compute, tensors: list[Any], generator: Any) -> Any:
        """Nothing is ever computed."""
        raise AssertionError(task.name)

    def describe(self, plan: Plan) -> list[str]:
        """Lines of a dry run."""
        report = plan.report
        lines = [f"blocks     {report['prefix']}  {report['blocks']['before']:,} -> {report['blocks']['after']:,}"]
        lines.append(f"order      {_runs(report['order'])}")
        lines.append(f"parameters {report['parameters']['before']:,} -> {report['parameters']['after']:,}")
        return lines + [f"config     {path}: {_short(old)} -> {_short(new)}" for path, old, new in plan.config_edits]

    def _blocks(self, base: Checkpoint) -> tuple[Part, BlockList]:
        """The list of blocks meant, and the part it is in; `--prefix part/…` names one inside a pipeline."""
        parts, prefix = list(base.parts.values()), self.prefix
        if len(parts) > 1:
            named, slash, rest = (prefix or "").partition("/")
            if slash and named in base.parts:
                parts, prefix = [base.parts[named]], rest or None
            elif prefix is None and "transformer" in base.parts:
                parts = [base.parts["transformer"]]  # what a pipeline of diffusers is about
            elif prefix is not None:
                wanted = prefix.removesuffix(".") + "."
                parts = [p for p in parts if any(split_block(n, wanted) for n in p.tensors)] or parts
        if len(parts) > 1:
            lists = [f"{p.name}/{b.prefix} ({b.count})" for p in parts for b in block_lists(p.tensors)]
            raise UsageError(
                "prefix",
                f"{base.name}: several lists of blocks: {', '.join(lists[:12])}",
                hint="choose one with --prefix",
            )
        where = f"{base.name}:{parts[0].name}" if len(base.parts) > 1 else base.name
        return parts[0], find_blocks(list(parts[0].tensors), prefix, where=where)

    def _config(self, base: Checkpoint, part: Part, blocks: BlockList, order: Sequence[int]) -> DepthEdit | None:
        if part.config is None:
            if self.depth_key is not None:
                raise UsageError("depth-key", f"{base.name}: no config.json beside the weights", hint="name the folder")
            return None
        others = block_lists(part.tensors)
        where = f"{base.name}: {part.config_file}"
        return edit_depth(part.config, blocks, order, others=others, key=self.depth_key, where=where)


def _warnings(base: Checkpoint, edit: DepthEdit | None) -> tuple[str, ...]:
    if edit is None:
        return (f"{base.name}: no config.json beside the weights; set the number of blocks where the model is built",)
    return edit.warnings


def _parameters(base: Checkpoint) -> int:
    return sum(_elements(ref.shape) for ref in base.tensors.values())


def _elements(shape: Sequence[int]) -> int:
    return prod(shape)


def _runs(order: Sequence[int]) -> str:
    """0-10,14-27 for the numbers in that order."""
    runs: list[list[int]] = []
    for number in order:
        if runs and runs[-1][1] + 1 == number:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def _short(value: Any) -> str:
    text = str(dict(value) if isinstance(value, Mapping) else value)
    return text if len(text) <= 60 else text[:59] + "…"
