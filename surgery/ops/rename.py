"""Rename: other names for the same tensors.

Inputs: one checkpoint of any kind. Changes: names only; every byte is kept and moves as a range.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from surgery.arch.carried import full_name, kept, part_names, side_files
from surgery.arch.patterns import folded, nearest, parse_rule
from surgery.errors import UsageError, printable
from surgery.graph.op import Compute, Entry, Param, Plan, PlanContext
from surgery.store.checkpoint import Checkpoint
from surgery.store.header import is_unicode


@dataclass(frozen=True)
class Rename:
    r"""Rename tensors by patterns; no byte of them changes.

    In OLD, * stands for any text and {n} for one piece between dots; NEW inserts them again. /REGEX/=NEW replaces what
    the expression finds, with \1 for its groups. The first rule that fits a tensor names it, so two names can be
    swapped. Two tensors of one name, and a rule that fits nothing, are errors.

    Examples:

      surgery rename gpt2 -r 'h.{n}.*=transformer.h.{n}.*' -o out/renamed

      surgery rename old -r '/\.gamma$/=.weight' -r '/\.beta$/=.bias' --dry-run
    """

    rule: Annotated[tuple[str, ...], Param("What becomes what, repeatable.", ("-r",), "OLD=NEW")]

    name: ClassVar[str] = "rename"
    version: ClassVar[int] = 1
    parents: ClassVar[int] = 1
    trainer: ClassVar[str | None] = None

    def plan(self, ctx: PlanContext, base: Checkpoint) -> Plan:
        """Every tensor kept, under its new name."""
        if not self.rule:
            raise UsageError("rename", "no rule", hint="give -r OLD=NEW")
        rules = [parse_rule(text) for text in self.rule]
        used = dict.fromkeys(self.rule, 0)
        entries: list[Entry] = []
        moved: dict[str, str] = {}
        for part in base.parts.values():
            prefix = full_name(part, "")  # of every name in the part
            taken: dict[str, str] = {}
            for name, ref in part.tensors.items():
                new = old = prefix + name
                for rule in rules:
                    found = rule.rename(old)
                    if found is not None:
                        used[rule.text] += 1
                        new = found
                        break
                if new != old:
                    moved[old] = new
                inner = _checked(new, old, prefix)
                if inner in taken:
                    raise UsageError(
                        "collision",
                        f"'{printable(taken[inner])}' and '{printable(old)}' would both be called '{printable(new)}'",
                        hint="make the patterns tell them apart",
                    )
                taken[inner] = old
                entries.append(kept(part, inner, ref))
        for rule in rules:
            if not used[rule.text]:
                raise UsageError(
                    "unmatched",
                    f"'{printable(rule.text)}' fits no tensor of {base.name}"
                    + (" that the rules before it leave" if len(rules) > 1 else ""),
                    hint=nearest(rule.pattern, base.tensors),
                )
        report = {"renamed": len(moved), "tensors": len(entries), "groups": _groups(moved)}
        return Plan(tuple(entries), part_names(base), side_files(base), warnings=_warnings(base, moved), report=report)

    def run(self, task: Compute, tensors: list[Any], generator: Any) -> Any:
        """Nothing is ever computed."""
        raise AssertionError(task.name)

    def describe(self, plan: Plan) -> list[str]:
        """Lines of a dry run."""
        rows = [f"{g['count']:>6}  {g['old']} -> {g['new']}" for g in plan.report["groups"][:40]]
        more = len(plan.report["groups"]) - 40
        return rows + ([f"        and {more:,} more patterns"] if more > 0 else [])


def _checked(new: str, old: str, prefix: str) -> str:
    """The name inside the part, refused where no such name can be stored."""
    inner = new.removeprefix(prefix)
    if prefix and not new.startswith(prefix):
        raise UsageError(
            "other-part",
            f"'{printable(old)}' would become '{printable(new)}', outside its part",
            hint=f"names of this part start with {prefix}",
        )
    if not inner or inner == "__metadata__" or not is_unicode(inner):
        raise UsageError("bad-name", f"'{printable(old)}' would become '{printable(new)}', which is no name")
    return inner


def _groups(moved: Mapping[str, str]) -> list[dict[str, Any]]:
    """What was renamed, with numbers in names folded."""
    groups: dict[tuple[str, str], int] = {}
    for old, new in moved.items():
        pair = (folded(old), folded(new))
        groups[pair] = groups.get(pair, 0) + 1
    return [{"old": printable(old), "new": printable(new), "count": n} for (old, new), n in groups.items()]


def _warnings(base: Checkpoint, moved: Mapping[str, str]) -> tuple[str, ...]:
    if not moved or all(part.config is None for part in base.parts.values()):
        return ()
    return ("config.json is carried over as it is: a loader finds the tensors only if its class has these names",)
