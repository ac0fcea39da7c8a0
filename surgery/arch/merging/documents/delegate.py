"""A whole merge by mergekit's own run (`--arithmetic mergekit`), for models of one architecture.

mergekit writes into a folder of its own; what came out is held against the plan, which is made from the models'
headers, tensor by tensor, and goes through our writer, so that the result has our files, digests and record. Models
of different layouts are never handed over: mergekit leaves out what it does not know, without a word.
"""

import contextlib
import io
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgery.arch.carried import FLOATS
from surgery.errors import CheckpointError, SurgeryError, UsageError, printable
from surgery.graph.op import Plan, TrainContext, Trained, TrainResult
from surgery.store.checkpoint import Checkpoint, open_checkpoint

if TYPE_CHECKING:
    import torch


def check_models(given: Mapping[str, Any], parents: Sequence[Checkpoint]) -> None:
    """Raise `UsageError` for what a document asks beyond mergekit and for models that it cannot read, and
    `CheckpointError` for models of several architectures."""
    for option in ("tokenizer", "tokenizer_source", "surgery"):
        if given.get(option) is not None:
            raise UsageError(
                "arithmetic",
                f"--arithmetic mergekit: {option} of the document is carried out here",
                hint="leave --arithmetic out",
            )
    for parent in parents:
        if parent.layout in ("gguf", "file"):
            raise UsageError(
                "arithmetic",
                f"--arithmetic mergekit: {parent.name} is a single file, and mergekit reads folders",
                hint="leave --arithmetic out",
            )
    kinds = {p.name: _class(p) for p in parents if "adapter_config.json" not in {f.name for f in _files(p)}}
    if len(set(kinds.values())) > 1:
        raise layouts_differ(", ".join(f"{printable(n)} {k}" for n, k in kinds.items()))


def handed_over(plan: Plan) -> Plan:
    """`plan` with every tensor made by mergekit."""
    entries = [Trained(name=e.name, dtype=e.dtype, shape=e.shape) for e in plan.entries]
    report = {
        **plan.report,
        "merged": {"tensors": len(entries), "bytes": sum(e.nbytes for e in entries)},
        "copied": {"tensors": 0, "bytes": 0},
    }
    return replace(plan, entries=tuple(entries), report=report)


def layouts_differ(what: str) -> CheckpointError:
    """The error for models that mergekit would merge in silence, and wrongly."""
    return CheckpointError(
        "incompatible",
        f"--arithmetic mergekit: the models differ in layout: {what}",
        hint="mergekit would leave tensors out without a word; leave --arithmetic out",
    )


def _class(checkpoint: Checkpoint) -> str:
    config = checkpoint.part().config or {}
    found = config.get("architectures")
    return str(found[0]) if isinstance(found, list) and found else str(config.get("model_type"))


def _files(checkpoint: Checkpoint) -> list[Path]:
    return list(checkpoint.root.iterdir()) if checkpoint.root.is_dir() else []


def train(op: Any, ctx: TrainContext, plan: Plan, *parents: Checkpoint) -> TrainResult:
    """Run mergekit and check what it wrote: the key set, shapes, dtypes and byte count of the plan.

    Raises `SurgeryError` with mergekit's own words where it fails, `CheckpointError` where it wrote something else.
    """
    from importlib.metadata import version

    document = json.loads(op.config)
    out = ctx.scratch / "mergekit"
    shutil.rmtree(out, ignore_errors=True)  # of a run that was killed: mergekit begins anew
    _run(_named(document, [str(p.root) for p in parents]), out, ctx)
    made = open_checkpoint(out)
    _check(plan, made)
    return TrainResult(_Tensors(made), {"mergekit": version("mergekit")})


def _named(value: Any, paths: Sequence[str]) -> Any:
    """The document with paths in the place of numbers."""

    def model(at: Any) -> str:
        return f"{paths[at[0]]}+{paths[at[1]]}" if isinstance(at, list) else paths[at]

    if isinstance(value, dict):
        return {k: model(v) if k in ("model", "base_model") else _named(v, paths) for k, v in value.items()}
    return [_named(v, paths) for v in value] if isinstance(value, list) else value


def _run(document: dict[str, Any], out: Path, ctx: TrainContext) -> None:
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    options = MergeOptions(
        random_seed=ctx.seed, copy_tokenizer=False, write_model_card=False, quiet=True, num_threads=ctx.threads,
        device=ctx.device, lora_merge_cache=str(ctx.scratch / "mergekit-loras"),
    )  # fmt: skip
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            run_merge(MergeConfiguration.model_validate(document), str(out), options)
    except OSError:
        raise
    except Exception as err:  # of any kind: its own, pydantic's, torch's
        first = printable(str(err).strip().split("\n")[0] or type(err).__name__)
        raise SurgeryError(
            "merge", f"mergekit could not merge: {first}", hint="leave --arithmetic out to merge it here"
        ) from err


def _check(plan: Plan, made: Checkpoint) -> None:
    planned = {e.name: e for e in plan.entries}
    lacking, strange = sorted(planned.keys() - made.tensors.keys()), sorted(made.tensors.keys() - planned.keys())
    if lacking or strange:
        said = [f"without '{printable(lacking[0])}'"] if lacking else []
        said += [f"with '{printable(strange[0])}', which is no name of the models'"] if strange else []
        raise CheckpointError(
            "incompatible",
            f"mergekit wrote {len(made.tensors)} tensors of {len(planned)}, {' and '.join(said)}",
            hint="leave --arithmetic out to merge it here",
        )
    names = {v: k for k, v in FLOATS.items()}
    for name, entry in planned.items():
        ref = made.tensors[name]
        if ref.shape != entry.shape or ref.dtype != entry.dtype or ref.nbytes != entry.nbytes:
            raise CheckpointError(
                "incompatible",
                f"mergekit wrote '{printable(name)}' as {ref.dtype}{list(ref.shape)}, {ref.nbytes:,} bytes; it should "
                f"be {entry.dtype}{list(entry.shape)}",
                hint=f"out_dtype: {names.get(entry.dtype, 'bfloat16')} in the document",
            )


class _Tensors(Mapping[str, "torch.Tensor"]):
    """The tensors of a checkpoint by name, read when they are asked for."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint

    def __getitem__(self, name: str) -> "torch.Tensor":
        return self._checkpoint.read_ref(self._checkpoint.tensors[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._checkpoint.tensors)

    def __len__(self) -> int:
        return len(self._checkpoint.tensors)
