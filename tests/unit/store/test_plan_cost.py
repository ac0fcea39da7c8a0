"""What makes plans quick must not change what they say: headers, shard places, natural order, renaming."""

import json

import pytest

from surgery.arch.patterns import parse_rule
from surgery.graph.op import Keep, PartNames, Plan
from surgery.graph.shards import plan_shards
from surgery.store.header import parse_header, plan_header
from surgery.store.layout import natural
from surgery.store.tensors import TensorRef

NAMES = ["a", 'quote"d', "back\\slash", "tab\t", "é.漢", "layers.2.w", "layers.10.w", "\x7f", "\u2028"]


def test_a_header_is_what_the_general_encoder_writes() -> None:
    rows = [(name, "F32", (2, n)) for n, name in enumerate(NAMES)] + [("scalar", "BF16", ())]
    raw, places = plan_header(rows, metadata={"surgery": "k", "format": "pt", 'q"': "\n"})
    document = json.loads(raw[8:])
    again = json.dumps(document, separators=(",", ":"), ensure_ascii=False).encode()
    assert raw[8:].rstrip(b" ") == again
    assert list(document)[0] == "__metadata__" and list(document)[1:] == [name for name, _, _ in rows]
    end = max(start + size for start, size in places.values())
    header = parse_header(raw[8:], file_size=end, shown="x")
    assert {n: (header.data_start + t.start, t.stop - t.start) for n, t in header.tensors.items()} == places


def test_a_lone_surrogate_is_refused() -> None:
    with pytest.raises(ValueError):
        plan_header([("\ud800", "U8", (1,))], metadata={})


def test_shards_without_headers_lie_as_those_with_them() -> None:
    dtypes = [("U8", 1), ("F32", 4), ("BF16", 2)] * 7
    refs = [TensorRef(f"v.{n}", d, (n + 1,), f"gone{n % 2}", n, w * (n + 1)) for n, (d, w) in enumerate(dtypes)]
    entries = tuple(Keep(name=f"w{r.name}", dtype=r.dtype, shape=r.shape, ref=r) for r in refs)
    for more in ({}, {"regroup": 60}):
        plan = Plan(entries, (PartNames("", "model"),), **more)
        bare, bare_index = plan_shards(plan, key=None)
        full, full_index = plan_shards(plan, key="k")
        assert bare_index == full_index and [s.entries for s in bare] == [s.entries for s in full]
        for one, other in zip(bare, full, strict=True):
            base = len(other.file.header)
            assert one.file.size + base == other.file.size
            assert {n: (at + base, size) for n, (at, size) in one.file.places.items()} == dict(other.file.places)


def test_natural_order_whatever_stands_between_numbers() -> None:
    names = ["b.10.w", "b.2.w", "b.2x10", "b.2x9", "b.02.w", "b.2", "b"]
    assert sorted(names, key=natural) == ["b", "b.2", "b.02.w", "b.2.w", "b.2x9", "b.2x10", "b.10.w"]


def test_percent_signs_and_repeated_groups_in_a_new_name() -> None:
    rule = parse_rule("a%.{n}.*=100%.{n}.{n}.*%s")
    assert rule.rename("a%.3.w.b") == "100%.3.3.w.b%s"
    assert parse_rule("x.*=y%d").rename("x.z") == "y%d"
