"""The demo's rows, commands and claims, without training."""

import shlex
from pathlib import Path

from surgery.cli import demo
from surgery.evals.ordering import estimate


def test_every_printed_command_parses_into_the_operation_that_was_run() -> None:
    import typer.main

    from surgery.cli.main import app

    root = typer.main.get_command(app)
    for row in [r for r in (*demo._FULL, *demo._SHORT) if r.op]:
        words = shlex.split(row.command("dit-digits", Path("out/x"), 3))
        assert words[0] == "surgery" and words[-2:] == ["-o", "out/x"]
        group = root
        rest = words[1:]
        while hasattr(group, "list_commands"):
            group = group.get_command(None, rest[0])
            rest = rest[1:]
        context = group.make_context(row.op, rest)
        given = {k: list(v) if isinstance(v, list | tuple) else v for k, v in context.params.items()}
        assert {k: given[k] for k in row.params} == dict(row.params)
        assert given["seed"] == 3


def test_the_claims_are_the_papers_order_of_the_rows_that_are_there() -> None:
    claims = demo._claims([row.label for row in demo._FULL])
    assert ("original", "self 100%: stage 1+2") in claims
    assert ("hyena-x 100%: stage 1", "hyena-x 100%: random") in claims
    assert ("hyena-x 50%: stage 1+2", "hyena-x 100%: stage 1+2") in claims
    assert len(claims) == 11
    assert len(demo._claims([row.label for row in demo._SHORT])) == 4


def test_a_control_row_is_part_of_both_tables() -> None:
    for rows in (demo._FULL, demo._SHORT):
        assert any(row.op == "train-diffusion" for row in rows)


def test_overlapping_intervals_leave_a_claim_open() -> None:
    from surgery.evals.ordering import check_order

    rows = {"a": estimate([1.0, 1.1, 0.9]), "b": estimate([1.05, 1.2, 0.95]), "c": estimate([5.0, 5.1, 4.9])}
    assert check_order(rows, "a", "b")["overlap"]
    assert "open" in check_order(rows, "a", "b")["text"]
    far = check_order(rows, "a", "c")
    assert far["holds"] and not far["overlap"] and far["seeds"] == 3
    assert not check_order(rows, "c", "a")["holds"]
