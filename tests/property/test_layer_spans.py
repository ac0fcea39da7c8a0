"""The language of --layers against a model of it: a set of numbers, built item by item in the plainest way."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from surgery.arch.layers import parse_spans
from surgery.errors import UsageError

numbers = st.integers(0, 33)
signed = st.integers(-34, 34)
items = st.one_of(
    st.tuples(st.just("one"), numbers),
    st.tuples(st.just("span"), st.none() | numbers, st.none() | numbers),
    st.tuples(st.just("slice"), st.none() | signed, st.none() | signed, st.none() | st.integers(0, 5)),
)


def written(item: tuple) -> str:
    kind, *values = item
    text = ["" if v is None else str(v) for v in values]
    if kind == "one":
        return text[0]
    return f"{text[0]}-{text[1]}" if kind == "span" else ":".join(text if text[2] else text[:2])


def meant(item: tuple, count: int) -> set[int] | None:
    """The layers of one item; None where it is refused: out of range, backwards, empty, without any number."""
    kind, *values = item
    if kind == "one":
        return {values[0]} if values[0] < count else None
    if kind == "span":
        if values == [None, None]:
            return None
        first = 0 if values[0] is None else values[0]
        last = count - 1 if values[1] is None else values[1]
        return {n for n in range(count) if first <= n <= last} if first <= last < count else None
    first, stop, step = values
    if step == 0 or (first is not None and not -count <= first < count):
        return None
    if stop is not None and not -count <= stop <= count:
        return None
    first = 0 if first is None else first + count if first < 0 else first
    stop = count if stop is None else stop + count if stop < 0 else stop
    return {n for n in range(count) if first <= n < stop and (n - first) % (step or 1) == 0} or None


@given(st.lists(items, min_size=1, max_size=4), st.integers(1, 32), st.sampled_from([",", ", ", " ,"]))
def test_specs_mean_what_the_set_model_says(chosen: list[tuple], count: int, comma: str) -> None:
    spec = comma.join(map(written, chosen))
    sets = [meant(item, count) for item in chosen]
    if any(s is None for s in sets):
        with pytest.raises(UsageError):
            parse_spans(spec, count)
    else:
        assert parse_spans(spec, count) == tuple(sorted(set().union(*[s for s in sets if s is not None])))
