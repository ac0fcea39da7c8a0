"""What a model's text says about where something is: the strict reading, and the reference's substring rule.

AdaptVis' own code counts an answer as right when the gold word is a substring of it, so "on the left side" is right for
"on", and "lemon" too; on answers of one word the two agree, on long ones they differ widely.
"""

import re
from collections.abc import Sequence

_SIDE = r"(?:[ -]+(?:hand[ ]+)?(?:side|edge|part|half))?(?:[ ]+(?:of|to|from))?"
_ARTICLE = r"(?:[ ]+(?:the|a|an|this|that|its))?"


def parse_answer(text: str, options: Sequence[str], reference: str = "") -> str | None:
    """The option that `text` gives, None when it gives none or several.

    First the relation that is tied to the `reference` object is looked for: "<relation> [side] [of] [the] <object>".
    Without one, an answer counts when exactly one of the options occurs in it as a whole word; "on" is no answer
    beside left or right ("on the left").
    """
    plain = " ".join(text.lower().split())
    named = {option.lower(): option for option in options}
    words = "|".join(sorted((re.escape(o) for o in named), key=len, reverse=True))
    if reference:
        thing = re.escape(" ".join(reference.lower().split()))
        tied = {m[1] for m in re.finditer(rf"\b({words})\b{_SIDE}{_ARTICLE}[ ]+{thing}\b", plain)}
        if len(tied) == 1:
            return named[tied.pop()]
        if tied:
            return None
    found = set(re.findall(rf"\b({words})\b", plain))
    if found & {"left", "right"}:
        found.discard("on")
    return named[found.pop()] if len(found) == 1 else None


def matches_reference(text: str, gold: str) -> bool:
    """The rule of AdaptVis' code: the gold answer is a substring of the text, whatever the case; wrong when the gold
    answer is "on" and the text says "front"."""
    plain, gold = text.lower(), gold.lower()
    return gold in plain and not (gold == "on" and "front" in plain)
