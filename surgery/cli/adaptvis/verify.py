"""surgery adaptvis verify: is the patch of a checkpoint whole, and does it act?"""

from typing import Annotated, Any

import typer

from surgery.cli import flags, output
from surgery.cli.adaptvis.ask import encode_question, load_steerable
from surgery.cli.operation import open_source
from surgery.errors import Mismatch
from surgery.graph.machine import check_device
from surgery.store.record import undigested


def verify(
    model: flags.Ckpt,
    files_only: Annotated[
        bool, typer.Option("--files-only", help="Check the folder without running the model.")
    ] = False,
    device: flags.Device = "cpu",
    dtype: flags.Dtype = "auto",
    threads: flags.Threads = None,
    offline: flags.Offline = False,
    as_json: flags.AsJson = False,
) -> None:
    """Check that a patched checkpoint's patch is whole and acts; exit 1 when anything is wrong.

    Files against their record, code against this version's, weights against the parent's; then one question to the
    model: each alpha must change the answer, switching off must not. Code from the folder is run only if it is, byte
    for byte, what surgery adaptvis attach writes.

    Example:  surgery adaptvis verify av
    """
    from surgery.graph.lineage import verify as check_record
    from surgery.steering.explain import check_answers, check_files

    base = open_source(model, offline=offline)
    check_device(device)
    faults = check_files(base)
    faults += check_record(base) if base.lineage is not None else []
    notes = [] if base.lineage is not None else ["no surgery.json: files cannot be compared with a record"]
    unsure = len(undigested(base.lineage)) if base.lineage is not None else 0
    if unsure:
        notes.append(f"{unsure:,} tensors were never digested (--hash header): their bytes cannot be compared")
    if not files_only:
        loaded = load_steerable(base, device=device, dtype=dtype, attn=None, threads=threads)
        inputs = encode_question(loaded, "Where is the thing in the picture?", [_picture()], template=None)
        faults += check_answers(base, loaded.model, inputs)
    notes.append(
        "transformers runs the patch with trust_remote_code=True alone; without it the model answers unpatched"
    )
    if as_json:
        output.data_json({"path": str(base.path), "ok": not faults, "faults": faults, "notes": notes})
    else:
        for fault in faults:
            output.data(fault)
        if not faults:
            acted = "" if files_only else ", and each of its alphas acts"
            if acted and all(base.config["adaptvis"].get(k) in (1, None) for k in ("scale", "alpha1", "alpha2")):
                acted = "; its alphas are 1, which is the model itself"
            whole = "code and patch are" if unsure else "code, weights and patch are"
            output.data(f"ok  {base.path}  {whole} what was attached{acted}")
        for note in notes:
            output.note(f"note: {note}")
    if faults:
        raise Mismatch("patch", f"{base.name}: {len(faults)} faults, first: {faults[0]}", hint="attach the patch again")


def _picture() -> Any:
    """A drawn picture to check with: a dark square on a light ground."""
    import base64
    import io

    from PIL import Image, ImageDraw

    from surgery.evals.vqa.rows import Picture

    page = Image.new("RGB", (64, 64), (230, 230, 225))
    ImageDraw.Draw(page).rectangle((36, 8, 52, 24), fill=(40, 60, 160))
    buffer = io.BytesIO()
    page.save(buffer, format="PNG")
    return Picture("the picture to check with", text=base64.b64encode(buffer.getvalue()).decode())
