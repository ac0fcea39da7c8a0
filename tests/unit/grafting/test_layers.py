"""The `--layers` language: every form, and every way to get it wrong."""

import pytest

from surgery.arch.layers import parse_layers
from surgery.errors import UsageError


def test_all_is_every_block() -> None:
    assert parse_layers("all", 4) == (0, 1, 2, 3)
    assert parse_layers("100%", 4) == (0, 1, 2, 3)


def test_half_is_the_odd_blocks() -> None:
    assert parse_layers("50%", 28) == tuple(range(1, 28, 2))


def test_three_quarters_leaves_every_fourth_block() -> None:
    chosen = parse_layers("75%", 28)
    assert len(chosen) == 21
    assert set(range(28)) - set(chosen) == {0, 4, 8, 12, 16, 20, 24}


def test_shares_are_nested() -> None:
    quarter, half, three, every = (set(parse_layers(f"{share}%", 28)) for share in (25, 50, 75, 100))
    assert quarter < half < three < every
    assert len(quarter) == 7


def test_list_takes_inclusive_ranges_in_any_order() -> None:
    assert parse_layers("8-12,1, 3", 28) == (1, 3, 8, 9, 10, 11, 12)
    assert parse_layers("8,10,12,14,16,18,20-27", 28) == (8, 10, 12, 14, 16, 18, *range(20, 28))


def test_deep_is_the_last_blocks() -> None:
    assert parse_layers("deep:2", 6) == (4, 5)


def test_local_chooses_by_score_and_breaks_ties_by_index() -> None:
    scores = [0.2, 0.2, 0.42, 0.26, 0.27, 0.25]
    assert parse_layers("top-local:3", 6, scores=scores) == (2, 3, 4)
    assert parse_layers("low-local:1", 6, scores=scores) == (0,)
    assert parse_layers("low-local:3", 6, scores=scores) == (0, 1, 5)


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("40%", "only 25%, 50%, 75%"),
        ("28", "block 28 does not exist"),
        ("20-28", "block 28 does not exist"),
        ("1,3,3", "block 3 is named twice"),
        ("1-5,4", "block 4 is named twice"),
        ("5-3", "runs backwards"),
        ("", "select none"),
        ("1,,2", "is not a block"),
        ("odd", "'odd' is not a block"),
        ("-1", "'-1' is not a block"),
        ("1.5", "'1.5' is not a block"),
        ("deep:0", "from 1 to 28"),
        ("deep:29", "from 1 to 28"),
        ("deep:x", "from 1 to 28"),
        ("top-local:5", "needs the locality score"),
    ],
)
def test_bad_specs_are_usage_errors(spec: str, said: str) -> None:
    with pytest.raises(UsageError, match=said) as caught:
        parse_layers(spec, 28)
    assert caught.value.code == "usage.bad-layers"
    assert caught.value.hint


def test_out_of_range_names_the_valid_range() -> None:
    with pytest.raises(UsageError) as caught:
        parse_layers("7", 6)
    assert "0-5" in caught.value.hint


def test_scores_must_cover_every_block() -> None:
    with pytest.raises(UsageError, match="6 finite locality scores"):
        parse_layers("top-local:2", 6, scores=[0.1, 0.2])
    with pytest.raises(UsageError, match="finite"):
        parse_layers("top-local:1", 2, scores=[0.1, float("nan")])


def test_half_of_one_block_is_an_empty_selection() -> None:
    with pytest.raises(UsageError, match="select none of the model's 1 blocks"):
        parse_layers("50%", 1)
