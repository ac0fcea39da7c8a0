"""From what a model wrote to an answer, and from an answer to right or wrong. Rules alone: no judge, and nothing that a
model wrote is ever run as code.

Looked at in this order: the last \\boxed{…}; what follows the last "answer is", "answer:" or "answer ="; else, by type,
the last option letter, the last number, the last list or the last line (of "The … is X" the X). What no rule finds is
unparsed, which counts as wrong and is reported.
"""

import re
from decimal import Decimal

from surgery.evals.vqa.rows import LETTERS, Item

_MARK = re.compile(
    r"(?:\banswer(?:\s+is|\s*:|\s*=)|\banswer\s+(?:would|must|should)\s+be)\s*:?\s*(.*)", re.IGNORECASE | re.DOTALL
)
_NUMBER = re.compile(r"(?<![\w.])[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+)?(?:[eE][-+]?\d{1,3})?(?!\w)")
_FRACTION = re.compile(r"(?<![\w./])([-+]?\d{1,12})\s*/\s*(\d{1,12})(?![\w/]|\.\d)")
_LATEX_FRACTION = re.compile(r"([-+]?)\\[dt]?frac\s*\{\s*([-+]?\d{1,12})\s*\}\s*\{\s*(\d{1,12})\s*\}")
_UNICODE = str.maketrans({"−": "-", "–": "-", "，": ",", "：": ":", "（": "(", "）": ")", "．": "."})
_LONGEST = 20_000  # characters of a response that are looked at, from its end


def extract(item: Item, response: str) -> str | None:
    """The answer in `response`, as text in the form of the item's type; None if no rule finds one.

    A letter for choices, digits for numbers, a list in brackets, else plain text.
    """
    text = response.translate(_UNICODE)[-_LONGEST:].strip()
    if not text:
        return None
    spans = [s for s in (_boxed(text), _marked(text)) if s]
    if item.answer_type == "choice":
        tries = [_choice(span, item.choices, sure=True) for span in spans]
        return next((t for t in [*tries, _choice(text, item.choices, sure=False)] if t), None)
    if item.answer_type in ("integer", "float"):
        found = next((n for s in [*spans, text] if (n := _last_number(s)) is not None), None)
        return None if found is None else _plain(found)
    if item.answer_type == "list":
        return next((found for s in [*spans, text] if (found := _last_list(s))), None)
    return next((clean for s in [*spans, _said(_last_line(text))] if (clean := _clean(s))), None)


def is_right(item: Item, extracted: str | None) -> bool:
    """Whether `extracted` answers the item: the same letter, the same whole number, a float within half a unit of the
    last decimal that counts (10^-precision / 2), lists element by element, texts without regard to case, spaces,
    a leading article and closing punctuation."""
    if extracted is None:
        return False
    if item.answer_type == "choice":
        return extracted == item.answer
    if item.answer_type in ("integer", "float"):
        mine, right = _last_number(extracted), _last_number(item.answer)
        if mine is None or right is None:
            return False
        return mine == right if item.answer_type == "integer" else _near(mine, right, item.precision or 0)
    if item.answer_type == "list":
        ours, theirs = _elements(extracted), _elements(item.answer)
        return len(ours) == len(theirs) and all(_same(a, b) for a, b in zip(ours, theirs, strict=True))
    return _same(extracted, item.answer)


def _boxed(text: str) -> str | None:
    """What stands in the last \\boxed{…} whose braces close; one pass, however many there are."""
    begins = {m.end() for m in re.finditer(r"\\boxed\{", text)}
    open_braces: list[int] = []
    found: tuple[int, int] | None = None
    for brace in re.finditer(r"[{}]", text) if begins else ():
        if brace[0] == "{":
            open_braces.append(brace.end())
        elif open_braces and (begin := open_braces.pop()) in begins and (found is None or begin > found[0]):
            found = begin, brace.start()
    return re.sub(r"^\\text\s*\{(.*)\}$", r"\1", text[found[0] : found[1]].strip()) if found else None


def _marked(text: str) -> str | None:
    """The rest of the sentence after the last "answer is"."""
    starts = [m.start() for m in re.finditer(r"\banswer\b", text, re.IGNORECASE)]
    for start in reversed(starts):
        if (match := _MARK.match(text, start)) and match[1].strip():
            line = match[1].strip().split("\n")[0]
            return re.split(r"(?<=[^\d\s])\.\s|(?<=\d)\.\s", line)[0].strip(" *$")
    return None


def _choice(text: str, choices: tuple[str, ...], *, sure: bool) -> str | None:
    """A letter. `sure`: the text is known to be the answer, so that a bare letter counts wherever it stands first."""
    letters = LETTERS[: len(choices)]
    bare = text.strip(" \n\t*$.:()[]\"'")
    if len(bare) == 1 and bare.upper() in letters:
        return bare.upper()
    for number, choice in enumerate(choices):
        if _same(bare, choice):
            return letters[number]
    options = f"[{letters}]"
    lead = re.match(rf"\W*(?:option|choice)?\s*\(?({options})\b(?=[).:,\s]|$)(?!')", text, re.IGNORECASE if sure else 0)
    # "A dog" begins with an article: a leading letter needs its mark, unless the text is known to be the answer.
    if lead and (sure or re.match(rf"\W*\(?{options}\s*[).:,]", text)) and not _article(text, lead):
        return lead[1].upper()
    marked = re.findall(rf"\(({options})\)|\b(?:option|choice)\s+({options})\b|\\text\{{\(?({options})\)?\}}", text)
    if marked:
        return next(g for g in marked[-1] if g)
    named = [n for n, c in enumerate(choices) if c.strip() and _contains(text, c)]
    if len(named) == 1:
        return letters[named[0]]
    alone = re.findall(rf"(?<![\w'])({options})(?![\w'])", text)
    alone = [a for a in alone if a not in "AI"] or ([] if not sure else alone)
    return alone[-1] if alone else None


def _article(text: str, lead: re.Match[str]) -> bool:
    """Whether a leading A is the first word of a phrase."""
    return lead[1].upper() == "A" and re.match(r"\s+[a-z]", text[lead.end() :]) is not None


def _contains(text: str, choice: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(choice.strip())}(?!\w)", text, re.IGNORECASE) is not None


def _last_number(text: str) -> Decimal | None:
    """The last number of a text: 1,234  -3.5  2e-4  3/4  \\frac{3}{4}."""
    text = _LATEX_FRACTION.sub(lambda m: f" {m[1]}{m[2]}/{m[3]} ", text.translate(_UNICODE).replace("\\,", ""))
    last: tuple[int, Decimal] | None = None
    taken = []
    for match in _FRACTION.finditer(text):
        if int(match[2]):
            last = (match.start(), Decimal(int(match[1])) / Decimal(int(match[2])))
            taken.append(match.span())
    for match in _NUMBER.finditer(text):
        digits = match[0].replace(",", "")
        inside = any(a <= match.start() < b for a, b in taken)
        if (
            not inside
            and any(c.isdigit() for c in digits)
            and len(digits) <= 64
            and (not last or match.start() > last[0])
        ):
            last = (match.start(), Decimal(digits))
    return last[1] if last else None


def _near(mine: Decimal, right: Decimal, precision: int) -> bool:
    return abs(mine - right) <= Decimal(10) ** -precision / 2


def _plain(number: Decimal) -> str:
    """Digits without an exponent where that is short."""
    if number == number.to_integral_value() and abs(number) < Decimal(10) ** 30:
        return str(int(number))
    return str(number.normalize())


def _last_list(text: str) -> str | None:
    found = re.findall(r"\[[^\[\]]*\]|\([^()]*,[^()]*\)", text)
    return f"[{found[-1][1:-1].strip()}]" if found else None


def _elements(text: str) -> list[str]:
    inner = text.strip().removeprefix("[").removesuffix("]").strip()
    return [piece.strip(" \"'") for piece in inner.split(",")] if inner else []


def _last_line(text: str) -> str:
    return text.strip().split("\n")[-1]


def _said(line: str) -> str:
    """What a sentence such as "The capital of France is Paris." says; another line as it is."""
    match = re.fullmatch(
        r"(?:so|and|thus)?\W*(?:the|it|this|that|there|these|those|they)\b.*\b(?:is|are|was|were)\s+(.+)", line, re.I
    )
    return match[1] if match else line


def _clean(text: str) -> str:
    return text.strip().strip("*$\"'` ").rstrip(".!;, ").strip()


def _same(one: str, two: str) -> bool:
    """Equal as words, or as numbers."""
    words = [re.sub(r"^(?:an?|the) (?=.)", "", " ".join(_clean(t).casefold().split())) for t in (one, two)]
    if words[0] == words[1]:
        return True
    numbers = [_only_number(w) for w in words]
    return numbers[0] is not None and numbers[0] == numbers[1]


def _only_number(text: str) -> Decimal | None:
    """The number that a text is; none for 07, which is a code and not 7."""
    plain = re.fullmatch(r"(?!0\d)[-+]?[\d,]*\.?\d+([eE][-+]?\d{1,3})?|[-+]?\d+\s*/\s*\d+", text)
    return _last_number(text) if plain else None
