"""adaptvis eval: where things are, by several ways of decoding."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from surgery.cli import flags, output
from surgery.cli.evals.vqa import read_template
from surgery.cli.operation import open_source
from surgery.errors import UsageError, closest
from surgery.graph.files import files_digest
from surgery.graph.machine import check_device

_MATCH = ("strict", "reference", "both")


def evaluate(
    model: flags.Ckpt,
    data: flags.Questions,
    method: Annotated[
        list[str] | None, typer.Option("--method", help="base, scaling, adapt, vcd, dola; several, by commas.")
    ] = None,
    alpha: Annotated[float | None, typer.Option("--alpha", help="Alpha of scaling.")] = None,
    alpha1: Annotated[float | None, typer.Option("--alpha1", help="Alpha of adapt below --beta.")] = None,
    alpha2: Annotated[float | None, typer.Option("--alpha2", help="Alpha of adapt from --beta on.")] = None,
    beta: flags.Beta = None,
    tuned: Annotated[
        Path | None, typer.Option("--from", metavar="TUNE.json", help="Take the numbers that adaptvis tune wrote.")
    ] = None,
    layers: flags.TextLayers = None,
    heads: flags.Heads = None,
    mode: Annotated[str | None, typer.Option("--mode", help="logit, mass-preserving, bias or abs.")] = None,
    confidence: Annotated[
        str | None, typer.Option("--confidence", help="max-prob, option-prob, margin or entropy.")
    ] = None,
    confidence_decimals: Annotated[
        int | None, typer.Option("--confidence-decimals", min=0, help="Round it first; the reference code uses 2.")
    ] = None,
    match: Annotated[str, typer.Option("--match", help="How answers are read: strict, reference or both.")] = "strict",
    answer: flags.Answer = "generate",
    out: Annotated[
        Path | None, typer.Option("-o", "--out", metavar="FILE.jsonl", help="Keep a record of every item.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the records of -o.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the records of -o.")] = False,
    limit: flags.FirstQuestions = None,
    batch: flags.BatchOfQuestions = 8,
    max_new_tokens: flags.LongestAnswer = 20,
    chat_template: flags.ChatTemplate = None,
    rms_norm_eps: Annotated[
        float | None, typer.Option("--rms-norm-eps", help="Another epsilon of the norms; the reference uses 1e-6.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Seed of the noise of vcd.")] = 0,
    endpoint: Annotated[
        str | None, typer.Option("--endpoint", metavar="URL", help="Ask a server for CKPT instead; base alone.")
    ] = None,
    device: flags.Device = "cpu",
    dtype: flags.Dtype = "auto",
    attn: flags.SteeredAttn = None,
    threads: flags.Threads = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be asked, and how; run nothing.")] = False,
    offline: Annotated[bool, typer.Option("--offline", help="Never ask the network for CKPT.")] = False,
    as_json: flags.AsJson = False,
    quiet: flags.Quiet = False,
    verbose: flags.Verbose = False,
) -> None:
    """Ask where things are, plainly and steered, and compare: accuracy, pairs and sets, confidence, gains.

    Numbers of scaling and adapt come from options, from --from, or from the patch that the checkpoint carries.

    Example:  surgery adaptvis eval av scenes/test.jsonl --method base,scaling,adapt

    A server:  surgery adaptvis eval my-vlm scenes/test.jsonl --endpoint http://localhost:8000/v1 -o out/served.jsonl
    """
    from surgery.data.spatial.items import read_items

    output.Talk.quiet, output.Talk.verbose = quiet, verbose
    if match not in _MATCH:
        raise UsageError("match", f"--match {match}: unknown", hint=closest(match, list(_MATCH)))
    flags.check_records("-o", out, resume=resume)
    check_device(device)
    base = None if endpoint else open_source(model, offline=offline)
    numbers = {"alpha1": alpha1, "alpha2": alpha2, "beta": beta}
    given = {"mode": mode, "layers": layers, "heads": heads}
    spec = settings_of(base, tuned, alpha, numbers, given, confidence, confidence_decimals)
    from surgery.evals.spatial.evaluate import Asking
    from surgery.evals.spatial.evaluate import evaluate as ask_all

    asking = Asking(
        methods=_methods(method),
        **spec,
        answer=answer,
        template=read_template(chat_template),
        max_new_tokens=max_new_tokens,
        batch=batch,
        seed=seed,
    )
    items = read_items(data, limit=limit)
    if dry_run:
        shown = {"items": len(items), "pictures": len({i.images for i in items}), **asking.settings()}
        output.data_json(shown) if as_json else output.table(("setting", "value"), list(shown.items()))
        return
    flags.use_threads(threads)
    what = {"endpoint": model} if base is None else {"digest": f"sha256:{base.digest}", "dtype": dtype}
    if base is not None:
        what["config"] = files_digest(base)
    if rms_norm_eps is not None:
        what["rms_norm_eps"] = str(rms_norm_eps)
    with (
        _answerer(base, model, endpoint, asking, dtype, attn, device, rms_norm_eps) as ask,
        output.Progress() as report,
    ):
        records = ask_all(ask, items, asking, out=out, model=what, resume=resume, overwrite=overwrite, report=report)
    result = {"model": model, **what, "data": str(data), "records": str(out) if out else None, **asking.settings()}
    result |= _judged(records, match, asking)
    if as_json:
        output.data_json(result)
    else:
        _show(result, match)
    if out is not None:
        output.note(f"records: {out}")


def settings_of(
    base: Any,
    tuned: Path | None,
    alpha: float | None,
    numbers: Mapping[str, float | None],
    given: Mapping[str, str | None],
    confidence: str | None = None,
    decimals: int | None = None,
    *,
    knocks_out: bool = False,
) -> dict[str, Any]:
    """`alpha`, `policy` and `patch` of an evaluation: options first, then the file of a tuning, then what the
    checkpoint carries. Raises UsageError for numbers that do not belong together or are out of range."""
    from surgery.steering.generate import Policy
    from surgery.steering.patch import KEYS_OF, PAPER, Patch, check_alpha, heads_text, layers_text

    stored = _tuned(tuned) if tuned is not None else _carried(base)
    missing = [k for k, v in numbers.items() if v is None]
    if missing and len(missing) < 3:
        raise UsageError("policy", f"--{missing[0]} is missing", hint="--alpha1, --alpha2 and --beta belong together")
    if beta_wrong := numbers["beta"] is not None and not 0 <= numbers["beta"] <= 1.01:
        assert beta_wrong
        raise UsageError(
            "beta", f"--beta {numbers['beta']}: not in [0, 1.01]", hint="it is compared with a probability"
        )
    values = dict(numbers) if not missing else {k: stored.get(k) for k in numbers}
    patch = Patch(
        mode=given["mode"] or stored.get("mode") or PAPER.mode,
        layers=given["layers"] or layers_text(stored.get("layers")),
        heads=given["heads"] or heads_text(stored.get("heads")),
        rows=stored.get("rows") or PAPER.rows,
        steps=stored.get("steps") or PAPER.steps,
        keys=KEYS_OF.get(str(stored.get("image_keys")), "image"),
    )
    if patch.mode == "knock-out" and not knocks_out:
        raise UsageError("mode", "mode knock-out has no alpha", hint="logit, mass-preserving, bias or abs")
    how = {"confidence": confidence or stored.get("confidence") or "max-prob"}
    how["decimals"] = decimals if decimals is not None else stored.get("confidence_decimals")
    if alpha is None:
        alpha = stored.get("scale", _tuned_scale(stored))
    policy = None
    if None not in values.values():
        checked = {k: check_alpha(f"--{k}", values[k], patch.mode) for k in ("alpha1", "alpha2")}
        policy = Policy(**checked, beta=float(values["beta"]), tau=stored.get("tau"), **how)  # type: ignore[arg-type]
    if alpha is not None:
        alpha = check_alpha("--alpha", alpha, patch.mode)
    return {"alpha": alpha, "policy": policy, "patch": patch}


def _tuned(path: Path) -> dict[str, Any]:
    from surgery.errors import CheckpointError
    from surgery.store.layout import read_json

    try:
        found = read_json(path)
    except CheckpointError as err:
        raise UsageError("tune", err.message, hint="name a file that surgery adaptvis tune wrote") from None
    if not isinstance(found, dict) or "surgery_tune" not in found:
        raise UsageError(
            "tune", f"{path}: not the result of a tuning", hint="surgery adaptvis tune CKPT DATA -o t.json"
        )
    return found


def _tuned_scale(stored: Mapping[str, Any]) -> Any:
    """The best single alpha that a tuning found, as it or the checkpoint keeps it."""
    for where in (stored, stored.get("tuned_on") or {}):
        found = where.get("scaling")
        if isinstance(found, Mapping) and found.get("alpha") is not None:
            return found["alpha"]
    return None


def _methods(given: list[str] | None) -> tuple[str, ...]:
    return tuple(m.strip() for text in given or ["base"] for m in text.split(",") if m.strip())


class _answerer:
    """What answers the questions: the checkpoint, loaded, or a server."""

    def __init__(self, base: Any, name: str, url: str | None, asking: Any, *how: Any) -> None:
        self._base, self._name, self._url, self._asking, self._how = base, name, url, asking, how
        self._undo: Any = None

    def __enter__(self) -> Any:
        if self._url is not None:
            from surgery.evals.spatial.endpoint import ask_endpoint, client

            server = client(self._url, key=os.environ.get("OPENAI_API_KEY"))
            return lambda items: ask_endpoint(server, self._name, items, self._asking)
        from surgery.arch.language.load import load
        from surgery.evals.spatial.evaluate import local, rms_norm_eps

        dtype, attn, device, eps = self._how
        loaded = load(self._base, dtype=dtype, attn=attn, device=device)
        self._undo = rms_norm_eps(loaded.model, eps)
        self._undo.__enter__()
        return local(loaded, self._asking)

    def __exit__(self, *_: object) -> None:
        if self._undo is not None:
            self._undo.__exit__(None, None, None)


def _judged(records: Any, match: str, asking: Any) -> dict[str, Any]:
    from surgery.evals.spatial.report import report

    beta = asking.policy.beta if asking.policy is not None and "adapt" in asking.methods else None
    result = report(records, rule="reference" if match == "reference" else "strict", beta=beta)
    if match == "both":
        result["reference"] = report(records, rule="reference", beta=beta)["methods"]
    return result


def _show(result: Mapping[str, Any], match: str) -> None:
    methods = result["methods"]
    first = next(iter(methods.values()))
    many = first["pairs"] or first["sets"]
    header = ["method", "accuracy", "95 %", "balanced", *(["pairs", "sets"] if many else []), "unclear"]
    header += ["vs base", "95 %", "p"] if len(methods) > 1 else []
    rows = []
    for name, m in methods.items():
        row = [name, f"{m['accuracy']:.4f}", output.interval(m["interval"]), f"{m['balanced']:.3f}"]
        row += [output.share(m["pair_accuracy"]), output.share(m["set_accuracy"])] if many else []
        row.append(f"{m['unparsable']:.1%}")
        if len(methods) > 1:
            g = m.get("gain")
            row += [f"{g['difference']:+.4f}", output.change(g["interval"]), f"{g['p']:.2g}"] if g else ["", "", ""]
        rows.append(row)
    output.table(header, rows)
    if match == "both":
        output.data("")
        reference = result["reference"]
        both = [(n, f"{methods[n]['accuracy']:.4f}", f"{m['accuracy']:.4f}", f"{m['agree']:.1%}")
                for n, m in reference.items()]  # fmt: skip
        output.table(("method", "strict", "reference", "alike"), both)
    output.data("")
    known = first["confidence"] is not None
    lines = [("questions", f"{result['n']:,}; the commonest answer is right for {first['majority']:.1%}")]
    if many:
        lines.append(("complete", f"{first['pairs']} pairs, {first['sets']} sets"))
    if known:
        low = next((f"; below beta {m['low']:.1%}" for m in methods.values() if "low" in m), "")
        lines.append(("confidence", f"mean {first['confidence']:.3f}{low}; calibration error {first['ece']:.3f}"))
        sure = "n/a, all alike" if first["auroc"] is None else f"{first['auroc']:.3f}"
        lines.append(("AUROC", f"{sure} (confidence of the plain pass tells right from wrong)"))
    if result["seconds"]:
        lines.append(("time", f"{result['seconds']:.3f} s a question, all methods together"))
    for name, text in lines:
        output.data(f"{name:<11} {text}")
    for name, m in methods.items():
        output.data(f"\n{name}: what was said, by the right answer")
        table = m["confusion"]
        columns = list(next(iter(table.values())))
        output.table(("right answer", *columns, "recall"),
                     [(gold, *row.values(), f"{m['recall'][gold]:.1%}") for gold, row in table.items()])  # fmt: skip
    _advise(methods)


def _carried(base: Any) -> dict[str, Any]:
    """The patch that the checkpoint carries, read as the other commands read it."""
    if base is None or not base.config.get("adaptvis"):
        return {}
    from surgery.steering.explain import patch_of

    patch_of(base)
    return dict(base.config["adaptvis"])


def _advise(methods: Mapping[str, Any]) -> None:
    """Said on stderr: no more than the intervals allow."""
    for name, m in methods.items():
        if "gain" in m and not m["gain"]["reliable"]:
            output.note(f"note: {name}: no reliable gain or loss (95 % {output.change(m['gain']['interval'])})")
        elif "gain" in m and m["gain"]["difference"] < 0:
            output.warn(f"{name}: worse than the plain model (95 % {output.change(m['gain']['interval'])})")
    for name, m in methods.items():
        if m["unparsable"] > 0.05:
            output.warn(f"{name}: {m['unparsable']:.0%} of the answers are unclear; they count as wrong")
