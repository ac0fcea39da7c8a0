"""surgery adaptvis tune: alphas and threshold for a model and a task, with what they are worth on held-out items."""

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer

from surgery.cli import flags, output
from surgery.cli.adaptvis.ask import load_steerable
from surgery.cli.evals.vqa import read_template
from surgery.cli.operation import open_source
from surgery.errors import UsageError, closest
from surgery.graph.files import files_digest
from surgery.graph.machine import check_device

_MATCH = {"strict": "right", "reference": "reference"}
_NEXT = "surgery adaptvis attach {model} --from {out} -o OUT"


def tune(
    model: flags.Ckpt,
    data: flags.Questions,
    out: Annotated[Path, typer.Option("-o", "--out", metavar="TUNE.json", help="Where the numbers go.")],
    alphas: Annotated[str, typer.Option("--alphas", help="The grid; 1 (the plain model) must be in it.")] = (
        "0.5,0.8,1,1.2,1.5,2"
    ),
    val_fraction: Annotated[
        float | None,
        typer.Option(
            "--val-fraction",
            help="Share of the groups to tune on, the rest being held out [default: the items' own splits, else 0.2].",
        ),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Which groups are tuned on; folds; the bootstrap.")] = 1,
    objective: Annotated[
        str, typer.Option("--objective", help="accuracy, balanced (mean recall), or groups (whole groups right).")
    ] = "accuracy",
    folds: Annotated[int, typer.Option("--folds", min=2, help="Folds of the cross-fitted accuracy.")] = 5,
    layers: flags.TextLayers = None,
    heads: flags.Heads = None,
    mode: Annotated[str, typer.Option("--mode", help="logit, mass-preserving, bias or abs.")] = "logit",
    rows: Annotated[str, typer.Option("--rows", help="Steered positions: last, last:N or after-image.")] = "last",
    steps: Annotated[str, typer.Option("--steps", help="first: the prompt alone; all: every decoded token.")] = "first",
    image_keys: Annotated[str, typer.Option("--image-keys", help="Image positions: id, span or id+video.")] = "id",
    confidence: Annotated[
        str, typer.Option("--confidence", help="max-prob, option-prob, margin or entropy.")
    ] = "max-prob",
    confidence_decimals: Annotated[
        int | None, typer.Option("--confidence-decimals", min=0, max=12, help="Round it; the reference code uses 2.")
    ] = None,
    match: Annotated[str, typer.Option("--match", help="How answers are read: strict or reference.")] = "strict",
    answer: flags.Answer = "generate",
    max_new_tokens: flags.LongestAnswer = 20,
    limit: flags.FirstQuestions = None,
    batch: flags.BatchOfQuestions = 8,
    chat_template: flags.ChatTemplate = None,
    records: Annotated[
        Path | None, typer.Option("--records", metavar="FILE.jsonl", help="Keep every answer, to go on from.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the records of --records.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace -o and --records.")] = False,
    device: flags.Device = "cpu",
    dtype: flags.Dtype = "auto",
    attn: flags.SteeredAttn = None,
    threads: flags.Threads = None,
    offline: flags.Offline = False,
    as_json: flags.AsJson = False,
    quiet: flags.Quiet = False,
    verbose: flags.Verbose = False,
) -> None:
    """Find alpha1, alpha2 and beta for a model and a task, and say what they are worth on held-out items.

    Every item is answered under every alpha from one run of its prompt; then all pairs of alphas and all thresholds are
    tried, exactly. The plain model and single alphas are among them: on the items tuned on, nothing is lost, and only
    the held-out gain counts. Its 95 % interval is printed; where it holds 0, there is no reliable gain.

    Example:  surgery adaptvis tune llava-scenes scenes/val.jsonl -o t.json

    Then:  surgery adaptvis attach llava-scenes --from t.json -o av
    """
    from surgery.data.spatial.items import items_digest, read_items

    output.Talk.quiet, output.Talk.verbose = quiet, verbose
    if match not in _MATCH:
        raise UsageError("match", f"--match {match}: unknown", hint=closest(match, list(_MATCH)))
    flags.check_file("-o", out, ".json", overwrite=overwrite)
    flags.check_records("--records", records, resume=resume)
    check_device(device)
    values = _grid(alphas, mode)
    base = open_source(model, offline=offline)
    from surgery.steering.patch import CONFIDENCES, KEYS_OF, Patch

    if image_keys not in KEYS_OF:
        raise UsageError("image-keys", f"--image-keys {image_keys}: unknown", hint=closest(image_keys, list(KEYS_OF)))
    patch = Patch(mode=mode, layers=layers, heads=heads, rows=rows, steps=steps, keys=KEYS_OF[image_keys])
    if confidence not in CONFIDENCES:
        raise UsageError(
            "confidence", f"--confidence {confidence}: unknown", hint=closest(confidence, list(CONFIDENCES))
        )
    items = read_items(data, limit=limit)
    from surgery.evals.spatial.tuning import OBJECTIVES

    if objective not in OBJECTIVES:
        raise UsageError("objective", f"--objective {objective}: unknown", hint=closest(objective, list(OBJECTIVES)))
    parts = _parts(items, val_fraction, seed)
    loaded = load_steerable(base, device=device, dtype=dtype, attn=attn, threads=threads)
    from surgery.evals.spatial.evaluate import Asking, evaluate
    from surgery.evals.spatial.grid import grid, trials
    from surgery.evals.spatial.tuning import report as weigh
    from surgery.steering.generate import Policy
    from surgery.steering.session import refusals, rule_of

    with refusals():
        rule = rule_of(loaded.model, patch)
    policy = Policy(1.0, 1.0, 0.0, confidence=confidence, decimals=confidence_decimals)
    asking = Asking(
        patch=patch, answer=answer, template=read_template(chat_template), max_new_tokens=max_new_tokens, batch=batch
    )
    what = {"digest": f"sha256:{base.digest}", "config": files_digest(base), "dtype": dtype, "alphas": values}
    what |= {"confidence": confidence, "confidence_decimals": confidence_decimals}
    with output.Progress() as report:
        rows = evaluate(
            grid(loaded, asking, values, policy), items, asking,
            out=records, model=what, resume=resume, overwrite=overwrite, report=report,
        )  # fmt: skip
    by_id = {r["id"]: r for r in rows}
    val, test = (trials([by_id[i.id] for i in part], values, _MATCH[match]) for part in parts)
    found = weigh(val, test, values, objective=objective, folds=folds, seed=seed)
    layered = None if rule.layers is None else list(rule.layers)
    headed = None if rule.heads is None else {str(n): list(h) for n, h in rule.heads.items()}
    result: dict[str, Any] = {"surgery_tune": 1, "alpha1": found["alpha1"], "alpha2": found["alpha2"]}
    result |= {"beta": found["beta"], "mode": mode, "layers": layered, "heads": headed, "rows": patch.rows}
    result |= {"steps": patch.steps, "image_keys": image_keys, "confidence": confidence}
    result |= {"confidence_decimals": confidence_decimals, "tau": None, "scaling": {"alpha": found["scaling"]}}
    result["tuned_on"] = {
        "model": f"sha256:{base.digest}",
        "data": f"sha256:{items_digest(items)}",
        "validation": [i.id for i in parts[0]] if val_fraction is not None else len(parts[0]),
        "test": len(parts[1]),
        "seed": seed,
        "objective": objective,
        "answer": answer,
        "match": match,
        "dtype": str(loaded.model.dtype).removeprefix("torch."),
        "scaling": {"alpha": found["scaling"]},
        "verdict": found["verdict"],
        "versions": {name: version(name) for name in ("torch", "transformers")},
    }
    result["report"] = {k: v for k, v in found.items() if k not in ("alpha1", "alpha2", "beta", "scaling")}
    _write(out, result)
    _show(found, model, out)
    if confidence == "option-prob":
        output.note("note: option-prob needs the options of a question: eval can use it, a checkpoint cannot carry it")
    if as_json:
        output.data_json({"path": str(out), **result})
    else:
        output.data(str(out))


def _grid(text: str, mode: str) -> list[float]:
    from surgery.evals.spatial.tuning import check_alphas
    from surgery.steering.patch import check_alpha

    try:
        values = [float(piece) for piece in text.split(",")]
    except ValueError:
        raise UsageError("alphas", f"--alphas {text}: not a list of numbers", hint="--alphas 0.5,1,1.5") from None
    check_alphas(values)
    return [check_alpha("--alphas", v, mode) for v in values]


def _parts(items: Sequence[Any], fraction: float | None, seed: int) -> tuple[Sequence[Any], Sequence[Any]]:
    """Items to tune on, and held-out ones: by a share of the groups, or as the items themselves say."""
    from surgery.data.spatial.items import split_groups

    splits = {i.split for i in items}
    if fraction is None and "" not in splits:
        val = [i for i in items if i.split == "val"] if len(splits) > 1 else list(items)
        test = [i for i in items if i.split == "test"] if len(splits) > 1 else []
        if not val:
            raise UsageError("split", "no item is in the split 'val'", hint="give --val-fraction 0.2")
        return val, test
    return split_groups(items, val=0.2 if fraction is None else fraction, seed=seed)


def _write(out: Path, result: Mapping[str, Any]) -> None:
    import json

    from surgery.store.writer import atomic_write

    atomic_write(out, (json.dumps(result, indent=1) + "\n").encode())


def _show(found: Mapping[str, Any], model: str, out: Path) -> None:
    """The table and the verdict, on stderr: the result is the file."""
    rows = []
    for method, words in (("base", "plain"), ("scaling", f"alpha {found['scaling']:g}"), ("adapt", _words(found))):
        row = [method, words]
        for part in ("validation", "test"):
            figures = found[part]
            own = figures[method] if figures else None
            row += [f"{own['accuracy']:.4f}", output.interval(own["interval"])] if own else ["", ""]
        row.append(f"{found['cross_fit'][method]:.4f}" if "cross_fit" in found else "")
        rows.append(row)
    header = ["method", "numbers", "validation", "95 %", "held out", "95 %", "cross-fitted"]
    output.table(header, rows, to_stderr=True)
    shown = found["test"] or found["validation"]
    output.note(f"the commonest answer is right for {shown['majority']:.1%} of {shown['n']} items")
    if found["test"]:
        gain = found["test"]["adapt_gain"]
        words = f"held-out gain over the plain model {gain['mean']:+.4f}, 95 % {output.change(gain['interval'])}"
        output.note(f"{found['verdict']}: {words} ({gain['won']} won, {gain['lost']} lost)")
    else:
        output.note("all items were tuned on; the cross-fitted figures are the honest ones here")
        if "cross_fit" in found:
            gain = found["cross_fit"]["gain"]
            output.note(f"cross-fitted gain {gain['mean']:+.4f}, 95 % {output.change(gain['interval'])}")
    if found.get("cross_fit", {}).get("gain", {}).get("mean", 1.0) <= 0:
        output.note(
            "tuned without an item, no policy is better on it than the plain model: leaving it unpatched is best"
        )
    output.note(f"next: {_NEXT.format(model=model, out=out)}")


def _words(found: Mapping[str, Any]) -> str:
    return f"{found['alpha1']:g} below {found['beta']:.3f}, else {found['alpha2']:g}"
