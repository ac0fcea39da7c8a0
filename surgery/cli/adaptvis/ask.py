"""surgery adaptvis ask: one question about a picture, steered; and what loading a model to be steered takes."""

from pathlib import Path
from typing import Annotated, Any

import typer

from surgery.cli import flags, output
from surgery.cli.operation import open_source
from surgery.errors import CheckpointError, UsageError
from surgery.graph.machine import check_device


def ask(
    model: flags.Ckpt,
    image: flags.Picture,
    question: Annotated[str, typer.Argument(metavar="QUESTION", help="What to ask about it.")],
    alpha: Annotated[
        float | None, typer.Option("--alpha", help="One alpha (ScalingVis); 1 is the model itself.")
    ] = None,
    alpha1: Annotated[
        float | None, typer.Option("--alpha1", help="Alpha where the confidence is below --beta.")
    ] = None,
    alpha2: Annotated[float | None, typer.Option("--alpha2", help="Alpha where it is not.")] = None,
    beta: flags.Beta = None,
    layers: flags.TextLayers = None,
    heads: flags.Heads = None,
    mode: flags.Mode = "logit",
    rules: Annotated[
        Path | None, typer.Option("--rules", metavar="FILE.json", help="Steering rules as data, with their own alphas.")
    ] = None,
    explain: Annotated[bool, typer.Option("--explain", help="Also say what steering did: tokens, attention.")] = False,
    max_new_tokens: flags.LongestAnswer = 100,
    chat_template: flags.ChatTemplate = None,
    device: flags.Device = "cpu",
    dtype: flags.Dtype = "auto",
    attn: flags.SteeredAttn = None,
    threads: flags.Threads = None,
    offline: flags.Offline = False,
    as_json: flags.AsJson = False,
    quiet: flags.Quiet = False,
) -> None:
    """Ask one question about a picture, steered: by numbers given here, by rules, or by the checkpoint's own patch.

    Examples:

      surgery adaptvis ask llava-scenes scene.png "Where is the red square?" --alpha 0.5 --explain

      surgery adaptvis ask av scene.png "Where is the red square?"

      surgery adaptvis ask llava-scenes scene.png "Where is the red square?" --rules rules.json
    """
    output.Talk.quiet = quiet
    check_device(device)
    base = open_source(model, offline=offline)
    numbers = {"alpha1": alpha1, "alpha2": alpha2, "beta": beta}
    _check_numbers(alpha, numbers, rules)
    check_picture(image)
    template = _template(chat_template)
    from surgery.steering.patch import Patch, check_alpha, read_patches

    patches = read_patches(rules) if rules is not None else (Patch(mode=mode, layers=layers, heads=heads),)
    for name, value in {"--alpha": alpha, "--alpha1": alpha1, "--alpha2": alpha2}.items():
        if value is not None:
            check_alpha(name, value, mode)
    loaded = load_steerable(base, device=device, dtype=dtype, attn=attn, threads=threads)
    from surgery.evals.vqa.rows import Picture

    inputs = encode_question(loaded, question, [Picture(str(image), image)], template=template)
    result = _answer(base, loaded, inputs, patches, alpha, numbers, max_new_tokens, ruled=rules is not None)
    if explain:
        from surgery.steering.explain import explain as what_happened

        used = None if rules is not None else result["alpha"]
        result |= what_happened(loaded.model, inputs, used, result.pop("patches"), tokenizer=loaded.tokenizer)
    result.pop("patches", None)
    if as_json:
        output.data_json(result)
        return
    output.data(result["answer"])
    said = f"confidence {result['confidence']:.3f}, " if result["confidence"] is not None else ""
    output.note(f"{said}{result['how']}")
    if explain:
        _show(result)


def check_picture(image: Path) -> None:
    """Before a model is loaded for it. Raises CheckpointError where there is no such file."""
    if not image.is_file():
        raise CheckpointError("no-image", f"{image}: no such file", hint="name a picture, for instance a PNG or JPEG")


def _check_numbers(alpha: float | None, numbers: dict[str, float | None], rules: Path | None) -> None:
    given = [k for k, v in numbers.items() if v is not None]
    if (alpha is not None) + bool(given) + (rules is not None) > 1:
        raise UsageError(
            "alpha", "--alpha, --alpha1/--alpha2/--beta and --rules exclude each other", hint="give one kind"
        )
    if given and len(given) < 3:
        raise UsageError(
            "alpha", f"--{given[0]} alone is no policy", hint="--alpha1, --alpha2 and --beta belong together"
        )
    beta = numbers["beta"]
    if beta is not None and not 0 <= beta <= 1.01:
        raise UsageError("beta", f"--beta {beta}: not in [0, 1.01]", hint="it is compared with a probability")


def _answer(
    base: Any,
    loaded: Any,
    inputs: Any,
    patches: Any,
    alpha: float | None,
    numbers: dict[str, float | None],
    tokens: int,
    *,
    ruled: bool,
) -> dict[str, Any]:
    """The answer, the confidence, the alpha, and in words how it came about."""
    from surgery.steering.carried import carried_faults, spec_line
    from surgery.steering.explain import patch_of
    from surgery.steering.generate import Policy
    from surgery.steering.patch import stored_rule
    from surgery.steering.session import generate, steer

    how = {"max_new_tokens": tokens, "do_sample": False}
    model = loaded.model
    confidence, used, words = None, alpha, f"alpha {alpha}"
    if ruled:
        with steer(model, patches, inputs=inputs, tokenizer=loaded.tokenizer):
            out = type(model).generate(model, **inputs, **how)
        words = f"steered by {len(patches)} rules"
    elif alpha is None and numbers["beta"] is None and not isinstance(base.config.get("adaptvis"), dict):
        out = type(model).generate(model, **inputs, **how)
        used, words = 1.0, "unsteered: the checkpoint carries no patch, and no --alpha was given"
    else:
        if alpha is not None:
            policy = Policy(alpha, alpha, 0.0)
        elif numbers["beta"] is not None:
            policy = Policy(**numbers)  # type: ignore[arg-type]
        else:
            for fault in carried_faults(base):
                output.warn(fault)
            policy = patch_of(base)[1]
            patches = (stored_rule(base.config["adaptvis"]),)
            words = f"the checkpoint's patch: {spec_line(base.config['adaptvis'])}"
        out, outcome = generate(model, inputs, policy, patches[0], tokenizer=loaded.tokenizer, **how)
        used = outcome.alpha[0]
        confidence = outcome.confidence[0] if outcome.confidence else None
        words += f" -> alpha {used:g}" if confidence is not None else ""
    text = loaded.tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
    return {"answer": text, "confidence": confidence, "alpha": used, "how": words, "patches": patches}


def _show(result: dict[str, Any]) -> None:
    for name, words in (("before", "unsteered"), ("after", "as used")):
        row = "  ".join(f"{token!r} {p:.3f}" for token, p in result["first"][name])
        output.data(f"first token, {words:9}  {row}")
    rows = [[r["layer"], f"{r['before']:.3f}", f"{r['after']:.3f}"] for r in result["mass"]]
    output.table(["layer", "attention to the steered keys, unsteered", "as used"], rows)
    output.data(f"these keys are {100 * result['share']:.0f} % of the prompt")


def _template(name: str | None) -> str | None:
    if name is None or name == "none":
        return name
    try:
        return Path(name).read_text(encoding="utf-8")
    except OSError as err:
        raise UsageError("chat-template", f"{name}: {err.strerror}", hint="name a file, or none") from None


def load_steerable(base: Any, *, device: str, dtype: str, attn: str | None, threads: int | None) -> Any:
    """The model with its processor, one whose attention has image keys. Raises as the loader does."""

    from surgery.arch.language.load import load
    from surgery.steering.carried import text_sizes

    flags.use_threads(threads)
    text_sizes(base)  # what cannot be steered is refused before its weights are read
    return load(base, dtype=dtype, attn=attn, device=device)


def encode_question(loaded: Any, question: str, pictures: list[Any], *, template: str | None) -> Any:
    """The model's inputs for one question about pictures, through its processor and chat template."""
    from surgery.evals.vqa.generate import encode
    from surgery.evals.vqa.prompts import render
    from surgery.evals.vqa.rows import Item

    item = Item("question", question, "", tuple(pictures))
    return encode(loaded, [render(loaded.processor, item, "bare", template=template)], [item])
