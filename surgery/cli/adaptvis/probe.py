"""probe attention: which heads carry an answer, and what rules of steering do to it."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from surgery.cli import flags, output
from surgery.cli.evals.vqa import read_template
from surgery.cli.operation import open_source
from surgery.errors import UsageError
from surgery.graph.machine import check_device


def probe_attention(
    model: flags.Ckpt,
    data: flags.Questions,
    by: Annotated[str, typer.Option("--by", help="head or layer: what is steered at a time.")] = "head",
    alpha: Annotated[float, typer.Option("--alpha", help="Its alpha.")] = 2.0,
    mode: flags.Mode = "logit",
    rules: Annotated[
        Path | None, typer.Option("--rules", metavar="FILE.json", help="Measure these rules instead of profiling.")
    ] = None,
    out: Annotated[Path | None, typer.Option("-o", "--out", metavar="FILE.json", help="Keep the report.")] = None,
    plot: Annotated[Path | None, typer.Option("--plot", metavar="FILE.png", help="Also draw layers x heads.")] = None,
    best: Annotated[
        Path | None, typer.Option("--best", metavar="FILE.json", help="Also a rule that steers the --top heads.")
    ] = None,
    top: Annotated[int, typer.Option("--top", min=1, help="How many heads to list, and to put into --best.")] = 8,
    limit: flags.FirstQuestions = None,
    batch: flags.BatchOfQuestions = 8,
    max_new_tokens: flags.LongestAnswer = 20,
    chat_template: flags.ChatTemplate = None,
    seed: flags.BootstrapSeed = 0,
    overwrite: flags.Overwrite = False,
    device: flags.Device = "cpu",
    dtype: flags.Dtype = "auto",
    attn: flags.SteeredAttn = None,
    threads: flags.Threads = None,
    offline: flags.Offline = False,
    as_json: flags.AsJson = False,
    quiet: flags.Quiet = False,
    verbose: flags.Verbose = False,
) -> None:
    """Which heads carry the answer: steer one at a time and see how the right answer's probability moves.

    Example:  surgery probe attention llava-scenes scenes/val.jsonl --plot heads.png --best rule.json

    Rules as data (knock-out, spans of text, fixed alphas):  surgery probe attention llava-scenes scenes/val.jsonl
    --rules rule.json
    """
    from surgery.data.spatial.items import read_items
    from surgery.steering.patch import Patch, check_alpha, read_patches

    output.Talk.quiet, output.Talk.verbose = quiet, verbose
    for flag, path, suffix in (("-o", out, ".json"), ("--plot", plot, ".png"), ("--best", best, ".json")):
        flags.check_file(flag, path, suffix, overwrite=overwrite)
    if by not in ("head", "layer"):
        raise UsageError("by", f"--by {by}: unknown", hint="head or layer")
    if rules is not None and (plot or best):
        raise UsageError("rules", "--rules measures rules; --plot and --best belong to a profile", hint="leave one out")
    check_alpha("--alpha", alpha, mode)
    patch = Patch(mode=mode)
    chosen = read_patches(rules) if rules is not None else ()
    check_device(device)
    base = open_source(model, offline=offline)
    items = read_items(data, limit=limit)
    template = read_template(chat_template)
    flags.use_threads(threads)
    from surgery.arch.language.load import load
    from surgery.evals.attention.profile import measure_rules, profile
    from surgery.evals.spatial.evaluate import Asking

    asking = Asking(template=template, max_new_tokens=max_new_tokens, batch=batch)
    loaded = load(base, dtype=dtype, attn=attn, device=device)
    with output.Progress() as report:
        if chosen:
            found = measure_rules(loaded, items, asking, chosen, seed=seed, report=report)
        else:
            found = profile(loaded, items, asking, alpha=alpha, patch=patch, by=by, report=report)
    result = {"model": model, "digest": f"sha256:{base.digest}", "data": str(data), **found}
    _write(result, out, plot, best, top)
    if as_json:
        output.data_json(result)
    elif chosen:
        _show_rules(result)
    else:
        _show_profile(result, top)


def _write(result: dict[str, Any], out: Path | None, plot: Path | None, best: Path | None, top: int) -> None:
    from surgery.store.writer import atomic_write

    if out is not None:
        atomic_write(out, (json.dumps(result, indent=2) + "\n").encode())
        output.note(f"report: {out}")
    if plot is not None:
        from surgery.evals.attention.charts import heads

        heads(result, plot, title=f"{result['model']}, {result['n']} questions")
        output.note(f"chart: {plot}")
    if best is not None:
        from surgery.evals.attention.profile import best_heads

        named = best_heads(result, top)
        where = (
            {"heads": named} if result["by"] == "head" else {"layers": ",".join(p.split(":")[0] for p in named.split())}
        )
        rule = {"mode": result["mode"], **where} | ({"alpha": result["alpha"]} if result["mode"] != "knock-out" else {})
        atomic_write(best, (json.dumps(rule, indent=2) + "\n").encode())
        output.note(f"rule: {best}")


def _show_profile(result: dict[str, Any], top: int) -> None:
    how = "knocked out" if result["mode"] == "knock-out" else f"steered by {result['alpha']:g} ({result['mode']})"
    output.data(
        f"{result['n']} questions; the right answer has probability {result['before']:.4f}; {how} one at a time:\n"
    )
    header = ["layer", *(["head"] if result["by"] == "head" else []), "moves it by", "on average", "standard error"]
    rows = []
    for layer, head in result["ranked"][:top]:
        row = [str(layer), *([str(head)] if result["by"] == "head" else [])]
        row += [f"{result['moved'][layer][head]:.4f}", f"{result['change'][layer][head]:+.4f}"]
        rows.append([*row, f"{result['error'][layer][head]:.4f}"])
    output.table(header, rows)


def _show_rules(result: dict[str, Any]) -> None:
    rows = []
    for name in ("before", "after"):
        side = result[name]
        rows.append((name, f"{side['accuracy']:.4f}", output.interval(side["interval"]), f"{side['p']:.4f}"))
    output.table(("rules", "accuracy", "95 %", "p of the right answer"), rows)
    gained, change = result["gain"], result["change_interval"]
    low, high = gained["interval"]
    output.data(
        f"\naccuracy {gained['difference']:+.4f} [{low:+.3f}, {high:+.3f}], p {gained['p']:.2g} (McNemar); probability "
        f"{result['change']:+.4f} [{change[0]:+.4f}, {change[1]:+.4f}]"
    )
    if not gained["reliable"]:
        output.note("note: no reliable gain or loss of accuracy")
