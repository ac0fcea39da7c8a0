"""adaptvis map: where a model looks when it answers."""

from pathlib import Path
from typing import Annotated, Any

import typer

from surgery.cli import flags, output
from surgery.cli.adaptvis.ask import check_picture
from surgery.cli.adaptvis.evaluate import settings_of
from surgery.cli.evals.vqa import read_template
from surgery.cli.operation import open_source
from surgery.errors import UsageError
from surgery.graph.machine import check_device


def draw_map(
    model: flags.Ckpt,
    image: flags.Picture,
    question: Annotated[str, typer.Argument(metavar="QUESTION", help="What is asked about it.")],
    out: Annotated[Path, typer.Option("-o", "--out", metavar="FILE.png", help="The picture to draw.")],
    alpha: Annotated[
        list[float] | None, typer.Option("--alpha", help="Alpha to show; several times for several panels.")
    ] = None,
    side_by_side: Annotated[bool, typer.Option("--side-by-side", help="Beside the model as it is (alpha 1).")] = False,
    layer: Annotated[
        str | None, typer.Option("--layer", help="A layer, several (3,8-10), or all [default: one past the middle].")
    ] = None,
    head: Annotated[str, typer.Option("--head", help="mean or max over heads, or a head's number.")] = "mean",
    layers: flags.TextLayers = None,
    heads: flags.Heads = None,
    mode: Annotated[str | None, typer.Option("--mode", help="logit, mass-preserving, bias, abs, knock-out.")] = None,
    box: Annotated[
        list[str] | None, typer.Option("--box", metavar="NAME:L,T,R,B", help="Outline a thing; pixels; several times.")
    ] = None,
    scale: Annotated[str, typer.Option("--scale", help="Last colour: p99 (99th percentile) or raw (maximum).")] = "p99",
    smooth: Annotated[bool, typer.Option("--smooth", help="Interpolate between tokens.")] = False,
    npy: Annotated[
        Path | None,
        typer.Option("--npy", metavar="FILE.npy", help="Also the attention: [alphas, layers, heads, keys]."),
    ] = None,
    chat_template: flags.ChatTemplate = None,
    overwrite: flags.Overwrite = False,
    device: flags.Device = "cpu",
    dtype: flags.Dtype = "auto",
    attn: flags.SteeredAttn = None,
    threads: flags.Threads = None,
    offline: flags.Offline = False,
    as_json: flags.JsonNotPath = False,
    quiet: flags.Quiet = False,
) -> None:
    """Draw where the position that answers looks in a picture, before and after steering.

    Without --alpha a patched checkpoint shows the alpha that its policy chooses; another one 0.5 and 2 beside 1.

    Example:  surgery adaptvis map llava-scenes scenes/img/0001.png "Where is the circle in relation to the ring?"
    -o heat.png --side-by-side
    """
    output.Talk.quiet = quiet
    for flag, path, suffix in (("-o", out, ".png"), ("--npy", npy, ".npy")):
        flags.check_file(flag, path, suffix, overwrite=overwrite)
    boxes = [_box(text) for text in box or []]
    check_device(device)
    check_picture(image)
    base = open_source(model, offline=offline)
    none = {"alpha1": None, "alpha2": None, "beta": None}
    spec = settings_of(base, None, None, none, {"mode": mode, "layers": layers, "heads": heads}, knocks_out=True)
    from surgery.evals.attention.overlay import SCALES
    from surgery.steering.patch import check_alpha

    if scale not in SCALES:
        raise UsageError("scale", f"--scale {scale}: unknown", hint=" or ".join(SCALES))
    for value in alpha or []:
        check_alpha("--alpha", value, spec["patch"].mode)
    flags.use_threads(threads)
    result = _draw(
        base, image, question, out, alpha, spec, side_by_side, layer, head, boxes, scale, smooth, npy,
        (dtype, attn, device), read_template(chat_template),
    )  # fmt: skip
    if as_json:
        output.data_json(result)
        return
    for look in result["looks"]:
        output.note(
            f'{look["shown"]}: "{look["answer"]}", confidence {look["confidence"]:.3f}, on the picture '
            + ", ".join(f"{m:.0%}" for m in look["mass"])
            + " of the attention by layer"
        )
    output.data(str(out))


def _draw(
    base: Any,
    image: Path,
    question: str,
    out: Path,
    alpha: list[float] | None,
    spec: dict[str, Any],
    side_by_side: bool,
    layer: str | None,
    head: str,
    boxes: list[Any],
    scale: str,
    smooth: bool,
    npy: Path | None,
    how: tuple[str, str | None, str],
    template: str | None,
) -> dict[str, Any]:
    from surgery.arch.language.load import load
    from surgery.evals.attention import maps, overlay
    from surgery.evals.attention.geometry import pictures
    from surgery.evals.vqa.generate import encode
    from surgery.evals.vqa.prompts import check_images, render
    from surgery.evals.vqa.rows import Item, Picture
    from surgery.steering.patch import parse_range

    dtype, attn, device = how
    item = Item(str(image), question, "", (Picture(str(image), image),))
    original = item.images[0].open()
    loaded = load(base, dtype=dtype, attn=attn, device=device)
    check_images([item], loaded.takes_images, base.name)
    inputs = encode(loaded, [render(loaded.processor, item, "bare", template=template)], [item])
    where = pictures(loaded.model.config, loaded.processor, inputs, [original.size])[0]
    count = loaded.model.config.get_text_config(decoder=True).num_hidden_layers
    # The paper shows layer 17 of 32; without a choice, the layer as far up in another model.
    shown = (
        range(count)
        if layer == "all"
        else parse_range(layer, count, "layer")
        if layer
        else [round(17 / 31 * (count - 1))]
    )
    chosen = _alphas(loaded, inputs, alpha, spec, side_by_side)
    knocked = spec["patch"].mode == "knock-out"
    looks = maps.look(loaded, inputs, chosen, spec["patch"])
    names = ["without sight of it" if knocked else "as it is, alpha 1" if a == 1 else f"alpha {a:g}" for a in chosen]
    if knocked and side_by_side:
        looks, names = [*maps.look(loaded, inputs, [1.0]), *looks], ["as it is", *names]
    rows = []
    for number in shown:
        panels = []
        for look, name in zip(looks, names, strict=True):
            weights = look.heads(number, head)
            on = maps.mass(weights, where.keys)
            caption = f"layer {number}, {on:.0%} on the picture; says {look.answer[:24]!r} ({look.confidence:.2f})"
            panels.append(overlay.Panel(maps.density(where, weights, smooth=smooth), name, caption))
        rows.append(panels)
    settings = {
        "model": f"sha256:{base.digest}", "question": question, "image": image.name, "alphas": chosen, "head": head,
        "layers": list(shown), "scale": scale, "patch": spec["patch"].as_json(),
    }  # fmt: skip
    overlay.draw(original, rows, out, title=question, boxes=boxes, scale=scale, spec=settings)
    if npy is not None:
        _save(npy, looks)
    masses = [[maps.mass(look.attention[i], where.keys) for i in range(count)] for look in looks]
    told = [
        {"shown": name, "alpha": look.alpha, "answer": look.answer, "confidence": look.confidence, "mass": m}
        for look, name, m in zip(looks, names, masses, strict=True)
    ]
    return {"path": str(out), "npy": str(npy) if npy else None, **settings, "looks": told}


def _alphas(
    loaded: Any, inputs: Any, alpha: list[float] | None, spec: dict[str, Any], side_by_side: bool
) -> list[float]:
    """The alphas of the panels, each once, 1 first where it was asked for."""
    if alpha:
        found = list(alpha)
    elif spec["patch"].mode == "knock-out":
        found = [1.0]
    elif spec["policy"] is not None:
        from surgery.steering.prefill import Prefill

        with Prefill(loaded.model, inputs, spec["patch"], tokenizer=loaded.tokenizer) as run:
            found = [spec["policy"].alpha(run.confidence(spec["policy"])[0])]
    elif spec["alpha"] is not None:
        found = [spec["alpha"]]
    else:
        return [1.0, 0.5, 2.0] if side_by_side else [1.0]
    return list(dict.fromkeys([1.0, *found] if side_by_side else found))


def _save(path: Path, looks: Any) -> None:
    from io import BytesIO

    import numpy as np

    from surgery.store.writer import atomic_write

    buffer = BytesIO()
    np.save(buffer, np.stack([look.attention for look in looks]), allow_pickle=False)
    atomic_write(path, buffer.getvalue())


def _box(text: str) -> tuple[str, tuple[float, float, float, float]]:
    name, _, corners = text.rpartition(":")
    try:
        left, top, right, bottom = (float(v) for v in corners.split(","))
    except ValueError:
        left = right = top = bottom = 0.0
    if not (left < right and top < bottom):
        raise UsageError("box", f"--box {text}: not a name and four pixels", hint="--box circle:10,20,30,40")
    return name, (left, top, right, bottom)
