"""The command that looks at routers: probe routing."""

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from surgery.cli import flags, output
from surgery.cli.operation import open_source
from surgery.errors import OutputError
from surgery.graph.machine import check_device


def probe_routing(
    model: flags.Model,
    text: Annotated[
        str, typer.Option("--text", metavar="FILE", help="UTF-8 text; stdlib: sources of Python's standard library.")
    ] = "stdlib",
    tokens: Annotated[int, typer.Option("--tokens", min=16, help="So many tokens from its start.")] = 4096,
    length: Annotated[int, typer.Option("--length", min=2, help="Tokens of one sequence.")] = 256,
    out: Annotated[
        Path | None, typer.Option("-o", "--out", metavar="DIR", help="Write CSV files and heat maps there.")
    ] = None,
    pictures: Annotated[bool, typer.Option("--pictures/--no-pictures", help="Draw heat maps beside the CSV.")] = True,
    dtype: Annotated[
        str, typer.Option("--dtype", help="float32, bfloat16, float16, auto [default: float32 on a CPU].")
    ] = "",
    device: flags.Device = "cpu",
    threads: flags.Threads = None,
    overwrite: flags.Overwrite = False,
    offline: flags.Offline = False,
    as_json: flags.AsJson = False,
    quiet: flags.Quiet = False,
    verbose: flags.Verbose = False,
) -> None:
    """Which experts the routers of a mixture or a Chain-of-Experts choose, in every layer and pass.

    Columns: cv and max_vio (0 when all experts are used alike), entropy (1 then), the mean share of a token's first
    expert, how often a pass takes again what the one before took, the size of what it adds, and of its gates.

    Example:  surgery probe routing coe -o out/routing
    """
    output.Talk.quiet, output.Talk.verbose = quiet, verbose
    check_device(device)
    if out is not None and out.exists() and any(out.iterdir() if out.is_dir() else [out]) and not overwrite:
        raise OutputError("exists", f"{out}: is already there", hint="name another -o, or pass --overwrite")
    from surgery.data.text import read_text, token_ids

    written = read_text(text)
    base = open_source(model, offline=offline)
    import torch

    from surgery.arch.language.load import load_model, load_processor
    from surgery.evals.routing.record import record_routing
    from surgery.evals.routing.report import COLUMNS, table, write_report

    torch.set_num_threads(threads or os.cpu_count() or 1)
    # bfloat16 is several times slower on a CPU without instructions for it.
    loaded: Any = load_model(base, dtype=dtype or ("float32" if device == "cpu" else "auto"), device=device)
    tokenizer = None
    if any(n in base.side_files for n in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        tokenizer = load_processor(base)
    else:
        output.note(f"{base.name}: no tokenizer beside the weights: the text's bytes are its tokens")
    ids = token_ids(written[: tokens * 8], tokenizer, loaded.config.vocab_size)[:tokens]
    with output.Progress() as report:
        rows = record_routing(loaded, ids, length=min(length, max(2, len(ids))), report=report)
    files = write_report(rows, out, pictures=pictures) if out is not None else []
    shown = table(rows)
    if as_json:
        output.data_json({"model": str(base.path), "text": text, "rows": shown, "files": [str(f) for f in files]})
        return
    columns = [c for c in COLUMNS if c != "tokens" and any(row[c] is not None for row in shown)]
    cells = [[r["layer"], r["iteration"], *("" if r[c] is None else r[c] for c in columns)] for r in shown]
    output.table(["layer", "pass", *columns], cells)
    for file in files:
        output.note(f"wrote {file}")
