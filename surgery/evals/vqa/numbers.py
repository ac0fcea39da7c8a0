"""Numbers in what a model wrote: 1,234  -3.5 cm  2e-4  3 1/2  \\frac{3}{4}  2\\sqrt{3}  1.2 \\times 10^3  seven.

A small parser of our own computes closed forms; nothing is handed to eval, nor to a library that does. Values are
decimals of 28 digits. What stands after a number is a unit and not part of it: 10 m^2 is 10.
"""

import re
from collections.abc import Callable
from decimal import Context, Decimal, DecimalException, InvalidOperation, Overflow

UNICODE = str.maketrans(
    {"−": "-", "–": "-", "，": ",", "：": ":", "（": "(", "）": ")", "．": ".", "’": "'", "“": '"', "”": '"', "【": "[",
     "】": "]"}
)  # fmt: skip
_CONTEXT = Context(prec=28, Emax=9999, Emin=-9999, traps=[InvalidOperation, Overflow])
_PI = Decimal("3.141592653589793238462643383")
_DEEPEST, _MOST = 20, 2000  # nested groups, and groups looked at in one text
_LONGEST = 64  # digits of a number
_DIGITS = re.compile(r"\d{1,3}(?:,\d{3})+(?!\d|,\d)(?:\.\d+)?|(?:\d+(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d{1,3}(?!\d))?")
_START = re.compile(
    r"(?<![\w.^_\\])(?:(?<![)\]}])[-+](?=\.?\d| ?(?:sqrt|frac|pi)(?![a-z]))|(?=\.?\d|(?:sqrt|frac|pi)(?![a-z])))"
)
_MIXED = re.compile(r" {1,2}(\d{1,9})/(\d{1,9})(?![\d/])")
_UNIT = re.compile(
    r"(?:[mcdknu]?m|km|in|ft|yd|mi|[mk]?g|lbs?|oz|t|[mun]?s|secs?|mins?|hrs?|h|[kMG]?Hz|[km]?V|m?A|k?W|k?J|k?N|k?Pa|K|C|F"
    r"|m?[lL]|px|pt|deg|rad|kph|mph|k?mol|e?V)(?:2|3)?(?![A-Za-z0-9])"
)
_NAMED = re.compile(r"\s*\\?[A-Za-z]\w{0,12}(?:_?\{\w{1,8}\})?\s*(?:=|≈)\s*")
_NEARLY = re.compile(r"\s*(?:approximately|approx\.?|about|around|roughly|exactly|only|just|~|≈|[$€£¥])\s*", re.I)
_WORDS = {
    "zero": 0, "one": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9,
    "ten": 10, "eleven": 11, "twelve": 12, "thirteen": 13, "fourteen": 14, "fifteen": 15, "sixteen": 16,
    "seventeen": 17, "eighteen": 18, "nineteen": 19, "twenty": 20, "thirty": 30, "forty": 40, "fifty": 50,
    "sixty": 60, "seventy": 70, "eighty": 80, "ninety": 90,
}  # fmt: skip
_SCALES = {"hundred": 100, "thousand": 1_000, "million": 1_000_000, "billion": 1_000_000_000}
_SCALE = re.compile(r"\s?(hundred|thousand|million|billion)\b", re.IGNORECASE)
_TENS = "|".join(w for w, n in _WORDS.items() if n >= 20)
_ONES = "|".join(w for w, n in _WORDS.items() if 0 < n < 10)
_WORD = re.compile(
    rf"\b(?:({_TENS})[- ]({_ONES})|({'|'.join(_WORDS)}))\b(?!\s+(?:hundred|thousand|million|billion))", re.IGNORECASE
)

_REWRITES = tuple(
    (re.compile(pattern), into)
    for pattern, into in (
        (r"(?<=\d)(?:\\[,!;: ]|\{,\}|[\u00a0\u2009\u202f])(?=\d{3}(?!\d))", ","),
        (r"\\[,!;: ]|\\q?quad(?![a-zA-Z])|[\u00a0\u2009\u202f~]", " "),
        (r"\\(?:left|right|displaystyle)(?![a-zA-Z])", ""),
        (r"\\(?:text|mathrm|mathbf|textbf|textit|mathit|mbox)\s*\{([^{}]*)\}", r" \1 "),
        (r"\^\s*\{?\s*\\circ\s*\}?|\\degree|°", " "),
        (r"\\[dtc]?frac(?![a-zA-Z])\s*(\d)\s*(\d)", r" frac{\1}{\2}"),
        (r"\\[dtc]?frac(?![a-zA-Z])", " frac"),
        (r"\\sqrt(?![a-zA-Z])|√", " sqrt"),
        (r"\\pi(?![a-zA-Z])|π", " pi "),
        (r"\\(?:cdot|times)(?![a-zA-Z])|[×·]|(?<=\d)\s*[xX](?=\s*10\s*\^)", "*"),
        (r"\\div(?![a-zA-Z])|÷", "/"),
        (r"\\approx(?![a-zA-Z])", "="),
        (r"\\([%$])", r"\1"),
    )
)


def value_of(span: str) -> Decimal | None:
    """The number that a short text, known to be an answer, begins with: `x = 2\\sqrt{3}`, `12 cm`, `12 because …`. None
    where it begins with none, or goes on as a calculation or a list does."""
    text = _plain(span).strip(" .$*`\n")
    if len(text) > 300:
        return None
    if named := _NAMED.match(text):
        text = text[named.end() :]
    while nearly := _NEARLY.match(text):
        if not nearly.end():
            break
        text = text[nearly.end() :]
    if re.fullmatch(r"[-+]?\d{1,3}(?: \d{3})+", text):
        return Decimal(text.replace(" ", ""))
    parser = _Parser(text)
    value = parser.sum()
    if value is None:
        return None
    rest = text[parser.at :]
    if rest[:1].isalpha() and not _UNIT.match(rest) and not rest.startswith(("pi", "sqrt", "frac")):
        return None
    goes_on = r"\s*(?:[=*/^]|[-+:,;.]\s*[-+]?[\d(.]|(?:times|plus|minus|multiplied|divided|over)\b)|\.?\d"
    return None if re.match(goes_on, rest) else _scaled(value, rest)


def last_number(text: str) -> Decimal | None:
    """The last number of a text; where it holds no digits, the only one that is a word (three, twenty-one)."""
    text = _plain(text)
    found: Decimal | None = None
    at, groups = 0, _MOST
    while match := _START.search(text, at):
        parser = _Parser(text, match.start(), groups)
        value = parser.product()
        groups = parser.groups
        at = max(parser.at, match.end() + 1)
        after = text[parser.at : parser.at + 12]
        ends = not re.match(r"\w", after) or _UNIT.match(after)
        if value is not None and ends:
            found = _scaled(value, after)
    if found is None and not re.search(r"\d", text):
        named = {n for m in _WORD.finditer(text) if (n := _word(m)) != 1 or m[0] == text.strip(" .*")}
        found = Decimal(named.pop()) if len(named) == 1 else None
    return found


def only_number(text: str) -> Decimal | None:
    """The number that a text is, with nothing beside it; none for 07, which is a code and not 7."""
    text = _plain(text).strip(" $")
    if re.match(r"[-+]?0\d", text):
        return None
    if word := _WORD.fullmatch(text):
        return Decimal(_word(word))
    parser = _Parser(text)
    value = parser.sum()
    return value if value is not None and not text[parser.at :].strip() else None


def same_number(one: Decimal, two: Decimal) -> bool:
    """Equal to 20 digits: roots are not exact."""
    return one == two or abs(one - two) <= max(abs(one), abs(two)) * Decimal("1e-20")


def _plain(text: str) -> str:
    text = text.translate(UNICODE)
    if "x" in text or "X" in text:
        text = re.sub(r"(?<=\d) ?[xX] ?(?=\d)", "*", text)  # 3 x 4
    if not text.isascii() or any(c in text for c in "\\~^{"):
        for pattern, into in _REWRITES:
            text = pattern.sub(into, text)
    # The power of a unit or a variable is no part of the number.
    return re.sub(r"(?<=[A-Za-z])(?<!pi)\s?\^\s*[{(]?\s*-?\d{1,2}\s*[})]?", "", text)


def _scaled(value: Decimal, rest: str) -> Decimal:
    """5 million is 5,000,000."""
    scale = _SCALE.match(rest)
    return value * _SCALES[scale[1].lower()] if scale else value


def _word(match: re.Match[str]) -> int:
    tens, ones, alone = (g.lower() if g else "" for g in match.groups())
    return _WORDS[alone] if alone else _WORDS[tens] + _WORDS[ones]


class _Parser:
    """Reads as much of an expression as there is from `at` on; `at` is where it ended."""

    def __init__(self, text: str, at: int = 0, groups: int = _MOST) -> None:
        self.text, self.at = text, at
        self.groups = groups  # how many more may be looked at
        self._depth = 0

    def sum(self) -> Decimal | None:
        """a + b - c"""
        return self._chain("+-", self.product)

    def product(self) -> Decimal | None:
        """a * b / c"""
        return self._chain("*/", self._atom)

    def _chain(self, operators: str, part: Callable[[], Decimal | None]) -> Decimal | None:
        value = part()
        while value is not None:
            before = self.at
            sign = self._take(operators)
            other = part() if sign else None
            made = _combined(sign, value, other) if sign and other is not None else None
            if made is None:
                self.at = before
                break
            value = made
        return value

    def _atom(self, *, raised: bool = True) -> Decimal | None:
        """A signed number, function or group, with its power: -2^2 is -4."""
        before = self.at
        sign = self._take("-+")
        value = self._unsigned()
        if value is None:
            self.at = before
            return None
        value = self._raised(value) if raised else value
        return -value if sign == "-" else value

    def _raised(self, value: Decimal) -> Decimal:
        before = self.at
        if self._take("^"):
            exponent = self._atom(raised=False)
            made = _combined("^", value, exponent) if exponent is not None else None
            if made is not None:
                return made
        self.at = before
        return value

    def _unsigned(self) -> Decimal | None:
        self._space()
        digits = _DIGITS.match(self.text, self.at)
        if digits is None:
            return self._function() if self._peek() not in "({" else self._group()
        if len(digits[0]) > _LONGEST:
            return None
        value = Decimal(digits[0].replace(",", ""))
        self.at = digits.end()
        if (mixed := _MIXED.match(self.text, self.at)) and digits[0].isdigit() and int(mixed[1]) < int(mixed[2]):
            self.at = mixed.end()
            return value + Decimal(mixed[1]) / Decimal(mixed[2])
        before = self.at
        self._space()
        whole = digits[0].isdigit() and re.match(r"frac\s*\{\d{1,9}\}\s*\{\d{1,9}\}", self.text[self.at : self.at + 40])
        factor = self._function()
        if factor is None:
            self.at = before
            return value
        factor = self._raised(factor)
        return value + factor if whole else _CONTEXT.multiply(value, factor)

    def _function(self) -> Decimal | None:
        """frac{a}{b}, sqrt{a}, sqrt[n]{a} or pi."""
        text, before = self.text, self.at
        made: Decimal | None = None
        if text.startswith("frac", self.at):
            self.at += 4
            over, under = self._group(), self._group()
            made = _combined("/", over, under) if over is not None and under is not None else None
        elif text.startswith("sqrt", self.at):
            self.at += 4
            root = re.compile(r"\s*\[(\d)\]").match(text, self.at)
            self.at = root.end() if root else self.at
            inner = self._group()
            if inner is None and root is None:
                self._space()
                digits = re.compile(r"\d{1,9}").match(text, self.at)
                inner, self.at = (Decimal(digits[0]), digits.end()) if digits else (None, self.at)
            made = None if inner is None or inner < 0 else _root(inner, int(root[1]) if root else 2)
        elif re.match(r"pi(?![A-Za-z])", text[self.at : self.at + 3]):
            self.at += 2
            return _PI
        if made is None:
            self.at = before
        return made

    def _group(self) -> Decimal | None:
        """A sum in parentheses or braces."""
        before = self.at
        close = {"(": ")", "{": "}"}.get(self._take("({"))
        value = None
        if close is not None and self._depth < _DEEPEST and self.groups > 0:
            self._depth += 1
            self.groups -= 1
            value = self.sum()
            self._depth -= 1
            if not self._take(close):
                value = None
        if value is None:
            self.at = before
        return value

    def _space(self) -> None:
        while self._peek() == " ":
            self.at += 1

    def _peek(self) -> str:
        return self.text[self.at : self.at + 1] or "\0"

    def _take(self, one_of: str) -> str:
        """The next character if it is one of these; else nothing moves."""
        before = self.at
        self._space()
        found = self._peek()
        if found in one_of:
            self.at += 1
            return found
        self.at = before
        return ""


def _combined(sign: str, one: Decimal, two: Decimal) -> Decimal | None:
    """One step of arithmetic; None where it has no value or too large a one."""
    try:
        if sign == "/":
            return _CONTEXT.divide(one, two) if two else None
        if sign == "^":
            small = abs(two) <= 999 and (one > 0 or (two == two.to_integral_value() and (one or two > 0)))
            return _CONTEXT.power(one, two) if small else None
        return {"+": _CONTEXT.add, "-": _CONTEXT.subtract, "*": _CONTEXT.multiply}[sign](one, two)
    except DecimalException:
        return None


def _root(value: Decimal, degree: int) -> Decimal | None:
    if degree == 2:
        return _CONTEXT.sqrt(value)
    return _combined("^", value, _CONTEXT.divide(Decimal(1), Decimal(degree))) if degree and value else None
