"""Questions to a model, answers to a file of records, records to a summary with intervals."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from surgery.errors import UsageError, closest
from surgery.evals.intervals import wilson
from surgery.evals.records import Records, fingerprint
from surgery.evals.vqa.answers import extract, is_right
from surgery.evals.vqa.prompts import check_images, render
from surgery.evals.vqa.rows import Item, values_of
from surgery.graph.files import files_digest
from surgery.store.checkpoint import Checkpoint

Report = Callable[[str, Mapping[str, float]], None]
KIND = "vqa"
RULES = 2  # of extraction and scoring; goes up when they give other results, so that records are never mixed


def evaluate(
    base: Checkpoint,
    items: Sequence[Item],
    *,
    out: Path | None = None,
    prompt: str = "direct",
    template: str | None = None,
    batch: int = 8,
    max_new_tokens: int = 1024,
    dtype: str = "auto",
    attn: str | None = None,
    device: str = "cpu",
    resume: bool = False,
    overwrite: bool = False,
    report: Report | None = None,
) -> list[dict[str, Any]]:
    """A record of every item in their order: response, extracted answer, right or wrong, tokens, groups.

    With `out` each batch is written as it is done, and `resume` goes on with a file of the same settings. The model is
    loaded only if something is left to ask. Raises as the loader, the processor and `Records` do.
    """
    settings = {
        "model": f"sha256:{base.digest}",
        "config": files_digest(base),
        "prompt": prompt,
        "chat_template": None if template is None else fingerprint(template),
        "max_new_tokens": max_new_tokens,
        "dtype": dtype,
        "attn": attn,
        "rules": RULES,
    }
    records = Records(out, KIND, settings, resume=resume, overwrite=overwrite) if out is not None else None
    try:
        done: dict[str, Mapping[str, Any]] = dict(records.done) if records else {}
        todo = [item for item in items if item.id not in done]
        _check_same(items, done)
        if todo:
            _ask(base, todo, done, records, prompt, template, batch, max_new_tokens, (dtype, attn, device), report)
    finally:
        if records is not None:
            records.close()
    return [dict(done[item.id]) for item in items]


def _ask(
    base: Checkpoint,
    todo: Sequence[Item],
    done: dict[str, Mapping[str, Any]],
    records: Records | None,
    prompt: str,
    template: str | None,
    batch: int,
    max_new_tokens: int,
    options: tuple[str, str | None, str],
    report: Report | None,
) -> None:
    from surgery.arch.language.load import load
    from surgery.evals.vqa.generate import batches, generate

    dtype, attn, device = options
    loaded = load(base, dtype=dtype, attn=attn, device=device)
    check_images(todo, loaded.takes_images, base.name)
    prompts = [render(loaded.processor, item, prompt, template=template) for item in todo]
    finished = 0
    for chosen in batches(todo, prompts, batch):
        together = [todo[i] for i in chosen]
        answers = generate(loaded, [prompts[i] for i in chosen], together, max_new_tokens=max_new_tokens)
        for place, item, answer in zip(chosen, together, answers, strict=True):
            row = judged(item, answer.text) | {
                "tokens": answer.tokens,
                "cut": not answer.ended,
                "asked": asked(item),
                "prompt": fingerprint(prompts[place]),
            }
            done[item.id] = row
            if records is not None:
                records.append(row)
        finished += len(chosen)
        if report is not None:
            right = sum(bool(r["correct"]) for r in done.values())
            report("answers", {"done": finished, "n": len(todo), "accuracy": right / len(done)})


def judged(item: Item, response: str) -> dict[str, Any]:
    """The record of one response: what was extracted from it, and whether that is right."""
    extracted = extract(item, response)
    return {
        "id": item.id,
        "response": response,
        "extracted": extracted,
        "answer": item.answer,
        "correct": is_right(item, extracted),
        "groups": dict(item.groups),
    }


def summary(records: Sequence[Mapping[str, Any]], group_by: Sequence[str] = ()) -> dict[str, Any]:
    """Accuracy with its 95 % Wilson interval, the shares of unparsed and of cut-off responses, and the mean number of
    tokens; the same for each value of each field in `group_by`. Raises UsageError for a field that no record has."""
    out = _numbers(records)
    if group_by:
        out["groups"] = {f: {v: _numbers(rows) for v, rows in split(records, f).items()} for f in group_by}
    return out


def split(records: Sequence[Mapping[str, Any]], field: str) -> dict[str, list[Mapping[str, Any]]]:
    """Records by the values of a field, in sorted order, one with a list under each; those without it under "-"."""
    known = sorted({key for row in records for key in row.get("groups", {})})
    if field not in known:
        raise UsageError("group", f"no item has a field '{field}'", hint=closest(field, known) if known else "")
    found: dict[str, list[Mapping[str, Any]]] = {}
    for row in records:
        for value in values_of(row.get("groups", {}), field):
            found.setdefault(value, []).append(row)
    return dict(sorted(found.items()))


def _numbers(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    n, right = len(records), sum(bool(r["correct"]) for r in records)
    return {
        "n": n,
        "correct": right,
        "accuracy": right / n if n else 0.0,
        "interval": list(wilson(right, n)),
        "unparsed": sum(r["extracted"] is None for r in records) / n if n else 0.0,
        "cut": sum(bool(r.get("cut")) for r in records) / n if n else 0.0,
        "tokens": sum(r.get("tokens", 0) for r in records) / n if n else 0.0,
    }


def asked(item: Item) -> str:
    """Fingerprint of everything about an item that its result depends on, pictures included."""
    pictures = [fingerprint(p.content().hex()) for p in item.images]
    return fingerprint([item.question, item.answer, item.choices, item.answer_type, item.precision, pictures])


def _check_same(items: Sequence[Item], done: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuse records of other questions under the same ids."""
    for item in items:
        if item.id in done and done[item.id].get("asked") != asked(item):
            raise UsageError(
                "other-data",
                f"item '{item.id}' was another question when its record was made",
                hint="name another file, or replace it with --overwrite",
            )
