"""Patterns over tensor names: which tensors an edit touches, and what it calls them afterwards.

A glob matches a whole name: `*` stands for any text, `{n}` for one piece between dots, and the same `{n}` twice for the
same piece. `/…/` is a regular expression, found anywhere in the name. A rule is `OLD=NEW`: in NEW, `*` and `{n}` insert
what they matched in OLD (stars in order; `{1}`, `{2}` pick one), and a regular expression has `\\1` and `\\g<name>`.
Standard library only; knows nothing of checkpoints.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache

from surgery.errors import UsageError, closest, printable

_TOKEN = re.compile(r"\*|\{([^{}]*)\}")
_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")  # a whole piece between dots


@dataclass(frozen=True)
class Rule:
    """`rename(name)` is the new name, or None where the rule does not apply. `pattern` is the part that chooses."""

    text: str
    pattern: str
    rename: Callable[[str], str | None]


def matcher(text: str) -> Callable[[str], bool]:
    """Whether a name fits the pattern `text`. Raises `UsageError` for a pattern that cannot be read."""
    if text.startswith("/"):
        if len(text) < 3 or not text.endswith("/"):
            raise UsageError("pattern", f"'{text}': a regular expression ends in /", hint="write /…/, or a glob")
        found = _regex(text[1:-1], text)
        return lambda name: found.search(name) is not None
    whole, _, _ = _glob(text)
    return lambda name: whole.fullmatch(name) is not None


def parse_rule(text: str) -> Rule:
    """Read `OLD=NEW`. Raises `UsageError` that says which side is wrong."""
    if text.startswith("/"):
        old, sign, new = text[1:].partition("/=")
        if not sign or not old:
            raise UsageError("rename", f"'{text}': not /REGEX/=NEW", hint=r"for example '/^model\.(.*)/=\1'")
        return _regex_rule(text, old, new)
    old, sign, new = text.partition("=")
    if not sign or not old or not new:
        raise UsageError("rename", f"'{text}': not OLD=NEW", hint="for example 'h.{n}.*=layers.{n}.*'")
    return _glob_rule(text, old, new)


def nearest(pattern: str, names: Iterable[str]) -> str:
    """The tail of a hint for a pattern that matched nothing: the names most like it, numbers written as {n}."""
    templates = list(dict.fromkeys(map(folded, names)))
    wanted = re.sub(r"(?<![^.])(\d+|\{\w+\})(?![^.])", "{n}", pattern.strip("/"))
    return closest(wanted, [printable(t, limit=120) for t in templates[:2000]])


@lru_cache(1 << 14)  # as for `natural`: every step of a recipe asks again
def folded(name: str) -> str:
    """The name with {n} for every piece that is a number."""
    return _NUMBER.sub("{n}", name)


def _regex_rule(text: str, old: str, new: str) -> Rule:
    found = _regex(old, text)
    try:
        # What a replacement may name is known without a match: expanding it is the only check that re offers.
        re.compile(f"{old}|").sub(new, "")
    except (re.error, IndexError) as err:
        raise UsageError(
            "rename", f"'{text}': the right side: {err}", hint=r"groups are \1, \2, \g<name>; a backslash is \\"
        ) from None
    return Rule(text, f"/{old}/", lambda name: found.sub(new, name) if found.search(name) else None)


def _glob_rule(text: str, old: str, new: str) -> Rule:
    whole, stars, captures = _glob(old)
    used = 0

    def group(token: re.Match[str]) -> str:
        nonlocal used
        label = token[1]
        if label is None or label.isdecimal():
            used = used + 1 if label is None else used
            index = used if label is None else int(label)
            if not 1 <= index <= stars:
                raise UsageError(
                    "rename", f"'{text}': the right side takes star {index} and the left has {stars}", hint="add a *"
                )
            return f"star{index}"
        if label not in captures:
            raise UsageError("rename", f"'{text}': {{{label}}} is not on the left", hint="name it there first")
        return f"piece_{label}"

    template, groups, end = "", [], 0
    for token in _TOKEN.finditer(new):
        template += new[end : token.start()].replace("%", "%%") + "%s"
        groups.append(group(token))
        end = token.end()
    template += new[end:].replace("%", "%%")

    def rename(name: str) -> str | None:
        match = whole.fullmatch(name)
        return template % (match.group(*groups) if groups else ()) if match else None

    return Rule(text, old, rename)


def _glob(text: str) -> tuple[re.Pattern[str], int, set[str]]:
    """The compiled glob, how many stars it has, and its named pieces."""
    if not text:
        raise UsageError("pattern", "an empty pattern", hint="write a name, a glob such as *.bias, or /regex/")
    source, end, stars = "", 0, 0
    captures: set[str] = set()
    for token in _TOKEN.finditer(text):
        source += re.escape(text[end : token.start()])
        end = token.end()
        label = token[1]
        if label is None:
            stars += 1
            source += f"(?P<star{stars}>.*)"
        elif not label.isidentifier() or not label.isascii():
            raise UsageError(
                "pattern", f"'{text}': {{{label}}} is no name for a piece", hint="write {n}, or * for any text"
            )
        elif label in captures:
            source += f"(?P=piece_{label})"
        else:
            captures.add(label)
            source += f"(?P<piece_{label}>[^.]+)"
    return re.compile(source + re.escape(text[end:]), re.DOTALL), stars, captures


def _regex(source: str, shown: str) -> re.Pattern[str]:
    try:
        return re.compile(source)
    except (re.error, OverflowError, RecursionError) as err:
        raise UsageError("pattern", f"'{shown}': not a regular expression: {err}", hint="dots are \\.") from None
