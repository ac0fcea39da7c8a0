"""Commands about questions: eval vqa, eval compare."""

import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from surgery.cli import flags, output
from surgery.cli.operation import open_source
from surgery.errors import CheckpointError, SurgeryError, UsageError
from surgery.graph.machine import check_device


def eval_vqa(
    model: flags.Model,
    data: Annotated[
        Path | None, typer.Option("--data", metavar="FILE", help="Questions: .jsonl, .json, or a benchmark's .tsv.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "-o", "--out", metavar="FILE.jsonl", help="Keep a record of every item, for resuming and comparing."
        ),
    ] = None,
    prompt: Annotated[
        str, typer.Option("--prompt", help="direct (the answer alone), cot (reasons first), bare (as in the data).")
    ] = "direct",
    chat_template: flags.ChatTemplate = None,
    group_by: flags.GroupsBy = None,
    limit: flags.DrawnItems = None,
    seed: Annotated[int, typer.Option("--seed", help="Which items --limit draws.")] = 0,
    batch: flags.BatchOfItems = 8,
    max_new_tokens: flags.LongestAnswer = 1024,
    dtype: flags.Dtype = "auto",
    attn: flags.Attn = None,
    device: flags.Device = "cpu",
    threads: flags.Threads = None,
    backend: Annotated[str, typer.Option("--backend", help="local, lmms-eval or vlmevalkit.")] = "local",
    tasks: Annotated[
        str | None, typer.Option("--tasks", metavar="LIST", help="The other harness's own names of data sets.")
    ] = None,
    checkout: Annotated[Path | None, typer.Option("--checkout", metavar="DIR", help="A clone of VLMEvalKit.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the first prompt, or the other harness's command.")
    ] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the records in --out.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file at --out.")] = False,
    offline: flags.Offline = False,
    as_json: flags.AsJson = False,
    quiet: flags.Quiet = False,
    verbose: flags.Verbose = False,
) -> None:
    """Ask a vision-language model questions and score its answers by rules, without a judge.

    Example:  surgery eval vqa ./vlm --data questions.jsonl --prompt cot --group-by category -o out/vlm.jsonl

    Elsewhere:  surgery eval vqa ./vlm --backend lmms-eval --tasks mathvista_testmini_cot --dry-run
    """
    output.Talk.quiet, output.Talk.verbose = quiet, verbose
    base = open_source(model, offline=offline)
    if backend != "local":
        for option, value in (("--data", data), ("--group-by", group_by), ("--resume", resume or None)):
            if value is not None:
                raise UsageError(
                    option.removeprefix("--"), f"{option} is for the local runner", hint=f"{backend} has its own data"
                )
        _elsewhere(backend, base, tasks, out, batch, limit, device, checkout, dry_run=dry_run, as_json=as_json)
        return
    if data is None:
        raise UsageError("data", "no questions", hint="name a .jsonl or .tsv file with --data")
    if tasks is not None or checkout is not None:
        raise UsageError("tasks", "--tasks and --checkout are for other harnesses", hint="add --backend lmms-eval")
    flags.check_records("-o", out, resume=resume)
    check_device(device)
    template = read_template(chat_template)
    from surgery.evals.vqa.evaluate import evaluate, summary
    from surgery.evals.vqa.rows import read_items

    items = read_items(data, limit=limit, seed=seed)
    fields = group_by or []
    check_groups(items, fields)
    if dry_run:
        _show_items(base, items, prompt, template, as_json=as_json)
        return
    flags.use_threads(threads)
    with output.Progress() as report:
        records = evaluate(
            base,
            items,
            out=out,
            prompt=prompt,
            template=template,
            batch=batch,
            max_new_tokens=max_new_tokens,
            dtype=dtype,
            attn=attn,
            device=device,
            resume=resume,
            overwrite=overwrite,
            report=report,
        )
    result = summary(records, fields)
    if as_json:
        settings = {"model": base.name, "digest": f"sha256:{base.digest}", "data": str(data), "prompt": prompt}
        output.data_json({**settings, "records": str(out) if out else None, **result})
        return
    header = ("group", "n", "accuracy", "95 %", "unparsed", "cut off", "tokens")
    output.table(header, [_row(*pair) for pair in _groups(result)])
    if result["unparsed"] > 0.05:
        output.warn(
            f"{result['unparsed']:.0%} of the responses hold no answer that the rules find; they count as wrong"
        )
    if result["cut"] > 0.05:
        output.warn(f"{result['cut']:.0%} of the responses were cut off; see --max-new-tokens")
    if out is not None:
        output.note(f"records: {out}")


def compare(
    a: Annotated[Path, typer.Argument(metavar="A.jsonl", help="Records made by surgery eval vqa.")],
    b: Annotated[Path, typer.Argument(metavar="B.jsonl", help="Records of another model on the same data.")],
    group_by: flags.GroupsBy = None,
    flips: Annotated[int, typer.Option("--flips", min=0, help="How many flipped items to list.")] = 10,
    seed: Annotated[int, typer.Option("--seed", help="Of the bootstrap.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object, with every flip.")] = False,
    quiet: flags.Quiet = False,
) -> None:
    """Compare two evaluations item by item: difference, exact p of McNemar's test, intervals, what flipped.

    Example:  surgery eval compare out/vlm.jsonl out/merged.jsonl --group-by category
    """
    from surgery.evals.compare import compare_files

    output.Talk.quiet = quiet
    result = compare_files(a, b, group_by=group_by or [], seed=seed)
    if as_json:
        output.data_json(result)
        return
    header = ("group", "n", "A", "B", "B - A", "95 % bootstrap", "95 % score", "lost", "gained", "p")
    output.table(header, [_pair_row(*pair) for pair in _groups(result)])
    for note in result["notes"]:
        output.warn(note)
    shown = result["flips"][:flips]
    if shown:
        output.data("")
        rows = [(f["id"], f["now"], *(_short(f[key]) for key in ("a", "b", "answer"))) for f in shown]
        output.table(("flipped", "now", "A said", "B said", "answer"), rows)
    if len(result["flips"]) > len(shown):
        output.note(f"{len(result['flips']) - len(shown)} more flips; see --flips or --json")


def _short(text: str | None) -> str:
    """The beginning of an answer, which may be very long; --json has all of it."""
    return "-" if not text else text if len(text) <= 60 else text[:59] + "…"


def read_template(name: str | None) -> str | None:
    """The text of a chat template: None for the model's own, "none" for doing without."""
    if name in (None, "none"):
        return name
    try:
        return Path(name).read_text("utf-8")  # type: ignore[arg-type]
    except (OSError, UnicodeDecodeError) as err:
        reason = getattr(err, "strerror", None) or "not UTF-8 text"
        raise CheckpointError("unreadable", f"{name}: {reason}", hint="name a .jinja file, or none") from None


def check_groups(items: list[Any], fields: list[str]) -> None:
    """Refuse a field that no item has, before any work."""
    from surgery.errors import closest

    known = sorted({key for item in items for key in item.groups})
    for field in fields:
        if field not in known:
            hint = closest(field, known) if known else "the data has no fields to group by"
            raise UsageError("group", f"no item has a field '{field}'", hint=hint)


def _groups(result: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    pairs = [("all", result)]
    for field, values in result.get("groups", {}).items():
        pairs += [(f"{field}={value}", numbers) for value, numbers in values.items()]
    return pairs


def _row(name: str, found: dict[str, Any]) -> tuple[Any, ...]:
    low, high = found["interval"]
    shares = (f"{found['unparsed']:.1%}", f"{found['cut']:.1%}", f"{found['tokens']:.1f}")
    return (name, found["n"], f"{found['accuracy']:.4f}", f"[{low:.3f}, {high:.3f}]", *shares)


def _pair_row(name: str, found: dict[str, Any]) -> tuple[Any, ...]:
    intervals = [f"[{low:+.3f}, {high:+.3f}]" for low, high in (found["interval"], found["score_interval"])]
    scores = (f"{found['a']:.4f}", f"{found['b']:.4f}", f"{found['difference']:+.4f}")
    return (name, found["n"], *scores, *intervals, found["lost"], found["gained"], f"{found['p']:.3g}")


def _show_items(base: Any, items: list[Any], prompt: str, template: str | None, *, as_json: bool) -> None:
    from surgery.arch.language.load import load_processor
    from surgery.evals.vqa.prompts import check_images, render

    processor = load_processor(base)
    check_images(items, getattr(processor, "image_processor", None) is not None, base.name)
    kinds = {kind: sum(i.answer_type == kind for i in items) for kind in sorted({i.answer_type for i in items})}
    first = render(processor, items[0], prompt, template=template)
    if as_json:
        output.data_json({"items": len(items), "answer_types": kinds, "first": items[0].id, "prompt": first})
        return
    output.data(f"items    {len(items):,}: " + ", ".join(f"{n:,} {kind}" for kind, n in kinds.items()))
    output.data(f"images   {sum(len(i.images) for i in items):,}")
    output.data(f"prompt   of item {items[0].id}, as the model reads it:\n{first}")


def _elsewhere(
    backend: str,
    base: Any,
    tasks: str | None,
    out: Path | None,
    batch: int,
    limit: int | None,
    device: str,
    checkout: Path | None,
    *,
    dry_run: bool,
    as_json: bool,
) -> None:
    from surgery.evals.vqa.delegates import delegate, run_delegate

    names = [t.strip() for t in (tasks or "").split(",") if t.strip()]
    folder = out or Path("out") / backend
    plan = delegate(backend, base, names, folder, batch=batch, limit=limit, device=device, checkout=checkout)
    if as_json and dry_run:
        files = {str(path): text for path, text in plan.files.items()}
        rows = {"command": list(plan.command), "files": files, "installed": plan.installed, "needs": list(plan.needs)}
        output.data_json(rows | {"install": plan.install})
        return
    for need in plan.needs:
        output.note(f"needs {need}")
    if dry_run:
        for path, text in plan.files.items():
            output.data(f"# {path}\n{text}".rstrip())
        output.data(shlex.join(plan.command))
        if not plan.installed:
            output.note(f"not installed here: {plan.install}")
        return
    status = run_delegate(plan)
    if status != 0:
        raise SurgeryError("harness", f"{backend} ended with status {status}", hint="its own messages stand above")
    output.data(str(folder))
