"""From what a model wrote to an answer, and from an answer to right or wrong. Rules alone: no judge, and nothing that a
model wrote is ever run as code.

Looked at in this order: the last \\boxed{…}; the last <answer>…</answer>; what follows the last "answer is", "answer:"
or "answer ="; else, by type, the last option letter, the last number, the last list or the last line (of "The … is X"
the X). What stands in <think>…</think> counts only where nothing follows it. What no rule finds is unparsed, which
counts as wrong and is reported.
"""

import re
from decimal import Context, Decimal

from surgery.evals.vqa.numbers import UNICODE, last_number, only_number, same_number, value_of
from surgery.evals.vqa.rows import LETTERS, Item

_MARK = re.compile(
    r"(?:\banswer(?:\s+is|\s*:|\s*=)|\banswer\s+(?:would|must|should)\s+be|答案\s*(?:是|为|:))\s*:?\s*(.*)",
    re.IGNORECASE | re.DOTALL,
)
# A period behind one of these, or behind a lone capital, does not end a sentence.
_ABBREVIATION = re.compile(r"(?:^|[\s(])(?:St|Mr|Mrs|Ms|Dr|Prof|Mt|No|Jr|Sr|vs|approx|ca|e\.g|i\.e|[A-Z])$")
_LONGEST = 20_000  # characters of a response that are looked at, from its end


def extract(item: Item, response: str) -> str | None:
    """The answer in `response`, as text in the form of the item's type; None if no rule finds one.

    A letter for choices, digits for numbers, a list in brackets, else plain text.
    """
    text = _after_thoughts(response.translate(UNICODE)[-_LONGEST:]).strip()
    if not text:
        return None
    spans = [s for s in (_boxed(text), _tagged(text), _marked(text)) if s]
    if item.answer_type == "choice":
        tries = [_choice(span, item.choices, sure=True) for span in spans]
        return next((t for t in [*tries, _choice(text, item.choices, sure=False)] if t), None)
    if item.answer_type in ("integer", "float"):
        found = next((n for s in [*spans, text] if (n := _number(s, known=s in spans)) is not None), None)
        return None if found is None else _plain(found)
    if item.answer_type == "list":
        return next((found for s in [*spans, text] if (found := _list(s, known=s in spans))), None)
    if item.answer.casefold() in ("yes", "no") and (plain := re.match(r"\W*(yes|no)\b(?!\s+\w)", text, re.I)):
        return plain[1]
    last = _last_line(text)
    if not spans and (mark := _MARK.search(last)) and not mark[1].strip(" *$"):
        return None  # cut off before the answer came
    return next((clean for s in [*spans, _said(last)] if (clean := _clean(s))), None)


def is_right(item: Item, extracted: str | None) -> bool:
    """Whether `extracted` answers the item: the same letter or an equal choice, the same whole number, a float within
    half a unit of the last decimal that counts (10^-precision / 2), lists element by element, texts without regard to
    case, spaces, a leading article and closing punctuation, or as equal numbers (1/2 and \\frac{1}{2})."""
    if extracted is None:
        return False
    if item.answer_type == "choice":
        said, right = (LETTERS.find(letter) for letter in (extracted, item.answer))
        known = -1 < said < len(item.choices) and -1 < right < len(item.choices)
        return extracted == item.answer or (known and item.choices[said] == item.choices[right])
    if item.answer_type in ("integer", "float"):
        mine, right = (_number(t, known=True) for t in (extracted, item.answer))
        if mine is None or right is None:
            return False
        return same_number(mine, right) if item.answer_type == "integer" else _near(mine, right, item.precision or 0)
    if item.answer_type == "list":
        return _same_list(extracted, item.answer)
    return _same(extracted, item.answer)


def _after_thoughts(text: str) -> str:
    """What follows a model's thoughts, or all where nothing does."""
    _, closed, rest = text.rpartition("</think>")
    return rest if closed and rest.strip() else text


def _number(text: str, *, known: bool) -> Decimal | None:
    """The number of a text; of one `known` to be the answer, the one that it begins with."""
    found = value_of(text) if known else None
    return last_number(text) if found is None else found


def _tagged(text: str) -> str | None:
    """What stands in the last <answer>…</answer>."""
    end = text.lower().rfind("</answer>")
    start = text.lower().rfind("<answer>", 0, max(end, 0))
    return text[start + 8 : end].strip(" *$\n") if 0 <= start < end else None


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
    starts = [m.start() for m in re.finditer(r"\banswer\b|答案", text, re.IGNORECASE)]
    for start in reversed(starts):
        if (match := _MARK.match(text, start)) and match[1].strip(" *$\n"):
            return _sentence(match[1].strip(" *$\n").split("\n")[0]).strip(" *$")
    return None


def _sentence(line: str) -> str:
    """A line up to the first period that ends a sentence."""
    for stop in re.finditer(r"\.(?=\s)", line):
        if not _ABBREVIATION.search(line[max(0, stop.start() - 8) : stop.start()]):
            return line[: stop.start()]
    return line


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
    began = [n for n, c in enumerate(choices) if _begins(text, c)]
    if len(began) == 1:
        return letters[began[0]]
    named = [n for n, c in enumerate(choices) if c.strip() and _contains(text, c)]
    if len(named) == 1:
        return letters[named[0]]
    alone = re.findall(rf"(?<![A-Za-z0-9_'])({options})(?![A-Za-z0-9_'])", text)
    alone = [a for a in alone if a not in "AI"] or ([] if not sure else alone)
    return alone[-1] if alone else None


def _article(text: str, lead: re.Match[str]) -> bool:
    """Whether a leading A is the first word of a phrase."""
    return lead[1].upper() == "A" and re.match(r"\s+[a-z]", text[lead.end() :]) is not None


def _begins(text: str, choice: str) -> bool:
    """Whether a text is this choice and then a pause: "Yes, there is no dog"."""
    return (
        re.match(rf"\W*{re.escape(choice.strip())}(?:[,.;:!]|\n|$)", text, re.I) is not None
        if choice.strip()
        else False
    )


def _contains(text: str, choice: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(choice.strip())}(?!\w)", text, re.IGNORECASE) is not None


def _near(mine: Decimal, right: Decimal, precision: int) -> bool:
    return abs(mine - right) <= Decimal(10) ** -precision / 2


def _plain(number: Decimal) -> str:
    """Digits without an exponent where that is short; of a root or a fraction 15."""
    if number == number.to_integral_value() and abs(number) < Decimal(10) ** 30:
        return str(int(number))
    return str((Context(prec=15).plus(number) if len(number.as_tuple().digits) > 20 else number).normalize())


def _list(text: str, *, known: bool) -> str | None:
    """The last list of a text, in brackets; of one `known` to be the answer the first, with or without brackets."""
    found = _bracketed(text)
    if found:
        return f"[{found[0 if known else -1]}]"
    bare = text.strip(" .$*`\n").removeprefix("\\{").removesuffix("\\}").strip()
    pieces = [p.strip() for p in re.split(r",|;|\band\b|&", bare)]
    pieces = [p for p in pieces if p]
    if len(pieces) < 2 or "\n" in bare or any(len(p.split()) > (4 if known else 2) for p in pieces):
        return None
    return f"[{', '.join(pieces)}]"


def _bracketed(text: str) -> list[str]:
    """What stands in each outermost pair of brackets: [1, 2], and with a comma (1, 2) and {1, 2}."""
    text = text.replace("\\{", "{").replace("\\}", "}").replace("\\left", "").replace("\\right", "")
    found: list[str] = []
    opened: list[tuple[str, int]] = []
    for bracket in re.finditer(r"[\[\](){}]", text):
        if bracket[0] in "[({":
            opened.append((bracket[0], bracket.end()))
        elif opened and "[({"["])}".index(bracket[0])] == opened[-1][0]:
            kind, start = opened.pop()
            inner = text[start : bracket.start()].strip()
            if not opened and (kind == "[" or "," in inner):
                found.append(inner)
        else:
            opened.clear()
    return found


def _same_list(one: str, two: str) -> bool:
    ours, theirs = _elements(one), _elements(two)
    if len(ours) != len(theirs):
        return False
    return all(
        _same_list(a, b) if a[:1] in ("[", "(") and b[:1] in ("[", "(") else _same(a.strip("\"'"), b.strip("\"'"))
        for a, b in zip(ours, theirs, strict=True)
    )


def _elements(text: str) -> list[str]:
    """The pieces of a list between its outermost commas."""
    inner = text.strip()
    inner = inner[1:-1].strip() if inner[:1] in ("[", "(") and inner[-1:] in ("]", ")") else inner
    pieces, depth = [""], 0
    for character in inner:
        depth += (character in "[(") - (character in "])")
        if character == "," and depth == 0:
            pieces.append("")
        else:
            pieces[-1] += character
    return [p.strip() for p in pieces] if inner else []


def _last_line(text: str) -> str:
    return text.strip().split("\n")[-1]


def _said(line: str) -> str:
    """What a sentence such as "The capital of France is Paris." or "I think it's Paris" says; another line as it is."""
    line = re.sub(r"^(?:i (?:think|believe|would say)(?: that)?|so|and|thus)\b\W*", "", line, flags=re.IGNORECASE)
    match = re.fullmatch(
        r"\W*(?:(?:it|that|this|there)'s|(?:the|it|this|that|there|these|those|they)\b.*\b(?:is|are|was|were))\s+(.+)",
        line,
        re.IGNORECASE,
    )
    return match[1] if match else line


def _clean(text: str) -> str:
    return text.strip().strip("*$\"'` ").rstrip(".!;, ").strip()


def _same(one: str, two: str) -> bool:
    """Equal as words, or as numbers."""
    words = [re.sub(r"^(?:an?|the) (?=.)", "", " ".join(_clean(t).casefold().split())) for t in (one, two)]
    closed = [re.sub(r"(?<=\d)\s+(?=[a-z%°])", "", w) for w in words]  # 5 cm and 5cm
    if words[0] == words[1] or closed[0] == closed[1]:
        return True
    numbers = [only_number(t) for t in (_clean(one), _clean(two))]
    return numbers[0] is not None and numbers[1] is not None and same_number(*numbers)
