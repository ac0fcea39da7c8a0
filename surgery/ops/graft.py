"""Graft: replace operators of a pretrained diffusion transformer, then repair the model.

Paper: Grafting, arXiv 2506.05340, sections 3 and 4. Inputs: one checkpoint (DiT or PixArt, plain or already grafted,
alone or inside a pipeline). Changes: the tensors of the replaced operators; with `finetune_steps`, all of them. The
config records the graft list; a modeling file beside the weights lets plain diffusers load the result.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil, isfinite, prod
from typing import Annotated, Any, ClassVar

from surgery.arch.dit import config as dit
from surgery.arch.dit.checkpoints import check_tensors, scheduler_config, scheduler_file, transformer_part
from surgery.arch.dit.grafts import flops, flops_report, parse_replacements
from surgery.arch.dit.operators import OPERATORS, modeling_source
from surgery.arch.sources import Source, byte_ranges
from surgery.data.identity import data_digest
from surgery.errors import UsageError, closest
from surgery.graph.op import (
    Bytes,
    Compute,
    Entry,
    Keep,
    Param,
    PartNames,
    Plan,
    PlanContext,
    SideFile,
    Trained,
    json_bytes,
)
from surgery.store.checkpoint import Checkpoint
from surgery.store.layout import read_json
from surgery.store.tensors import Part, TensorRef

_INITS = ("auto", "random", "copy", "distill")
_CAPTURES = ("auto", "cache", "online")
_FINETUNE_LOSSES = ("diffusion", "distill", "both")
_REGRESSION_LOSS = re.compile(r"auto|l1|l2|huber(:(\d+\.?\d*|\.\d+)(e[+-]?\d+)?)?")
_STEM = "diffusion_pytorch_model"  # of weight files that diffusers finds beside a config
SMALL_MODEL = 20_000_000  # parameters; below this "auto" takes the small settings

# What stage 1 and 2 use when an option is not given. "paper": sections 3.2 and 4.1 of the paper. "small": settings
# that were measured on the digits model, where the paper's 25 000 steps an operator would be hours.
PRESETS: Mapping[str, Mapping[str, Any]] = {
    "paper": {
        "samples": 8000,
        "steps": 25_000,
        "batch": 64,
        "lr": 1e-4,
        "finetune_batch": 256,
        "finetune_lr": 1e-4,
        "warmup": 1000,
        "ema": 0.9999,
    },
    "small": {
        "samples": 1536,
        "steps": 250,
        "batch": 64,
        "lr": 2e-3,
        "finetune_batch": 64,
        "finetune_lr": 3e-4,
        "warmup": 20,
        "ema": 0.99,
    },
}


@dataclass(frozen=True)
class Graft:
    """Replace attention or MLPs of a diffusion transformer by other operators and repair the model.

    Examples:
      surgery graft --replace attn=hyena dit-digits --data digits --finetune-steps 200 -o out/hyena
      surgery graft -r attn=swa:w=8@50% -r mlp=r3@all dit-xl-2 --dry-run

    Stage 1 trains every new operator to return what the old one did (needs --data); stage 2 finetunes the whole model
    with its own loss (--finetune-steps). At 256 tokens and below this is a study of architecture, not a speed-up: the
    projections dominate there.

    Operators of attn: mha, swa:w=4, hyena-se, hyena-x (hyena), hyena-y (k=4, k_inner=4, bidirectional=true),
    mamba2, identity-zero. Of mlp: mlp:r=3 (r3), mlp-hyena-x:r=2, identity-zero.
    """

    replace: Annotated[
        tuple[str, ...],
        Param(
            "What by what, repeatable: attn=hyena, mlp=r3, attn=swa:w=8@1,3,8-12.", ("-r",), "SLOT=OP[:k=v,…][@LAYERS]"
        ),
    ]
    layers: Annotated[str, Param("Blocks to change: all, 25%, 50% (odd blocks), 75%, 1,3,8-12, deep:n.", ("-l",))] = (
        "50%"
    )
    init: Annotated[
        str,
        Param(
            "random; copy (warm start from the old weights); distill (stage 1 from a random start, needs --data); "
            "auto: stage 1 with --data, else none, from the start that measures better."
        ),
    ] = "auto"
    data: Annotated[str | None, Param("Images to train on: digits, fashion, folder:PATH, npz:PATH, latents:PATH.")] = (
        None
    )
    preset: Annotated[str, Param("Settings not given: paper, small, or auto (small below 20 M parameters).")] = "auto"
    samples: Annotated[int | None, Param("Stage 1: recorded samples.")] = None
    epochs: Annotated[int | None, Param("Stage 1: passes over the recorded samples.")] = None
    steps: Annotated[int | None, Param("Stage 1: steps of each operator, instead of epochs.")] = None
    batch: Annotated[int | None, Param("Stage 1: batch.")] = None
    lr: Annotated[float | None, Param("Stage 1: peak learning rate.")] = None
    loss: Annotated[str, Param("Stage 1: auto (attention l1, MLP l2), l1, l2, huber[:delta].")] = "auto"
    capture: Annotated[str, Param("Stage 1: cache (record once), online, or auto (by size).")] = "auto"
    gate_weighted: Annotated[bool, Param("Stage 1: weight the error by the block's gate.")] = False
    finetune_steps: Annotated[int, Param("Stage 2: steps; 0 leaves it out.")] = 0
    finetune_batch: Annotated[int | None, Param("Stage 2: batch.")] = None
    finetune_lr: Annotated[float | None, Param("Stage 2: learning rate after warm-up.")] = None
    finetune_loss: Annotated[str, Param("Stage 2: diffusion, distill (outputs of the original model) or both.")] = (
        "diffusion"
    )
    warmup: Annotated[int | None, Param("Stage 2: warm-up steps.")] = None
    ema: Annotated[
        float | None, Param("Stage 2: decay of the weight average that is kept, warmed up on short runs.")
    ] = None
    label_dropout: Annotated[float, Param("Stage 2: share of samples trained without their label.")] = 0.1

    name: ClassVar[str] = "graft"
    version: ClassVar[int] = 1
    parents: ClassVar[int] = 1
    trainer: ClassVar[str | None] = "surgery.train.grafting.graft:train"

    def plan(self, ctx: PlanContext, base: Checkpoint) -> Plan:
        """Kept and new tensors from headers and config alone (paper section 3; costs as in its Tab. 4)."""
        part, config = transformer_part(base)
        kind = dit.family(config, base.name)
        self._check_values(ctx.seed)
        new = parse_replacements(self.replace, self.layers, config)
        self._check_data(base, kind)
        check_tensors(base, part, config)
        old = dit.grafts(config, base.name)
        edited = dit.grafted_config(config, new)
        entries, dropped = self._entries(base, part, new, old, dit.Dims.from_config(config))
        report = {
            "entries": [e.as_json() for e in new],
            "params": {
                "before": sum(prod(ref.shape) for ref in part.tensors.values()),
                "after": sum(prod(e.shape) for e in entries if e.part == part.name),
            },
            "flops": flops_report(config, old, dit.grafts(edited), sorted({e.slot for e in new})),
        }
        files, edits = self._files(base, part, edited)
        inputs = {"data": data_digest(self.data)} if self.data is not None else {}
        # Whatever the source was called, diffusers looks for its own name beside the config that is written.
        names = tuple(PartNames(p.name, _STEM if p is part else p.base) for p in base.parts.values())
        return Plan(tuple(entries), names, files, tuple(dropped), edits, self._warnings(new), report, inputs)

    def run(self, task: Compute, tensors: list[Any], generator: Any) -> Any:
        """One new tensor: drawn, or made from the old operator's."""
        source: Source = task.how
        return source.evaluate(dict(zip(source.sources, tensors, strict=True)), generator)

    def settings(self, parameters: int) -> dict[str, Any]:
        """All training settings of a model of so many parameters, after presets."""
        small = parameters < SMALL_MODEL
        preset = PRESETS[("small" if small else "paper") if self.preset == "auto" else self.preset]
        own = {name: value if (value := getattr(self, name)) is not None else preset[name] for name in preset}
        if self.epochs is not None and self.steps is None:
            own["steps"] = self.epochs * ceil(own["samples"] / own["batch"])
        if self.warmup is None and self.finetune_steps:
            own["warmup"] = min(own["warmup"], max(1, self.finetune_steps // 10))
        return own

    @property
    def distils(self) -> bool:
        """Whether stage 1 runs."""
        return self.init == "distill" or (self.init == "auto" and self.data is not None)

    def describe(self, plan: Plan) -> list[str]:
        """Lines of a dry run."""
        report = plan.report
        lines = [f"{'block':>5}  slot  operator"]
        for e in report["entries"]:
            args = ",".join(f"{k}={str(v).lower()}" for k, v in e["args"].items())
            lines.append(f"{e['block']:>5}  {e['slot']:4}  {e['op']}" + (f":{args}" if args else ""))
        params = report["params"]
        lines.append(f"parameters     {params['before']:>18,} -> {params['after']:>18,}   {_percent(params)}")
        for kind in ("core", "features"):
            pair = report["flops"][kind]
            lines.append(
                f"FLOPs {kind:8} {pair['before']:>18,} -> {pair['after']:>18,}   {_percent(pair)}   (touched slots)"
            )
        lines += self._stage_lines(self.settings(params["before"]))
        edited = next(f.content for f in plan.files if f.content is not None and f.relative.endswith("config.json"))
        config = json.loads(edited)
        # Amdahl: what is not replaced costs as much as before.
        after = sum(flops(config, dit.grafts(config), dit.SLOT_MODULES).values())
        saved = sum(pair["before"] - pair["after"] for pair in report["flops"].values())
        if saved > 0 and after:
            lines.append(f"bound    by FLOPs of self-attention and MLPs at most {1 + saved / after:.3f}x faster")
        n_tokens = dit.Dims.from_config(config).n_tokens
        if n_tokens < 1024:
            lines.append(f"note     at {n_tokens} tokens the projections dominate; expect no speed-up")
        return lines

    def _stage_lines(self, settings: Mapping[str, Any]) -> list[str]:
        s = settings
        lines = []
        if self.distils:
            samples, steps, batch = s["samples"], s["steps"], s["batch"]
            lines.append(
                f"stage 1  {samples:,} samples, {steps:,} steps an operator, batch {batch}, learning rate {s['lr']:g}"
            )
        if self.finetune_steps:
            lines.append(
                f"stage 2  {self.finetune_steps:,} steps, batch {s['finetune_batch']}, learning rate "
                f"{s['finetune_lr']:g} after {s['warmup']:,}, average {s['ema']:g}"
            )
        return lines

    def summary(self, training: Mapping[str, Any]) -> list[str]:
        """What the training came to, for the reader of a finished run."""
        lines = [
            f"block {row['block']:>2} {row['slot']:4} {row['op']}: relative error {row['curve'][0]['rel_err']:.3f} at "
            f"the start, {row['rel_err']:.3f} after stage 1 (step {row['best_step']:,.0f})"
            for row in training.get("stage1", [])
        ]
        if "val_loss" in training:
            now, before = training["val_loss"], training["val_loss_original"]
            lines.append(f"held-out diffusion loss {now:.4f}; the original's is {before:.4f}")
        return lines

    def _check_values(self, seed: int) -> None:
        """Words and numbers, those of stages that do not run too: a typing error is never passed over."""
        for name, known in (
            ("init", _INITS),
            ("preset", ("auto", *PRESETS)),
            ("capture", _CAPTURES),
            ("finetune_loss", _FINETUNE_LOSSES),
        ):
            value = getattr(self, name)
            if value not in known:
                raise UsageError("bad-option", f"{_flag(name)} {value}: unknown", hint=closest(value, list(known)))
        if _REGRESSION_LOSS.fullmatch(self.loss) is None or not float(self.loss.partition(":")[2] or 1) > 0:
            raise UsageError("bad-option", f"--loss {self.loss}: unknown", hint="auto, l1, l2, huber or huber:DELTA")
        ranges = {
            "1 or more": (("samples", "epochs", "steps", "batch", "finetune_batch"), lambda v: v >= 1),
            "0 or more": (("finetune_steps", "warmup"), lambda v: v >= 0),
            "above 0": (("lr", "finetune_lr"), lambda v: isfinite(v) and v > 0),
            "from 0 to below 1": (("ema",), lambda v: 0 <= v < 1),
            "from 0 to 1": (("label_dropout",), lambda v: 0 <= v <= 1),
        }
        for words, (names, fits) in ranges.items():
            for name in names:
                value = getattr(self, name)
                if value is not None and not fits(value):
                    raise UsageError(
                        "bad-option", f"{_flag(name)} {value}: out of range", hint=f"give a number {words}"
                    )
        if seed < 0:
            raise UsageError("bad-option", f"--seed {seed}: out of range", hint="give a number 0 or more")
        if self.epochs is not None and self.steps is not None:
            raise UsageError(
                "bad-option", "--epochs and --steps both say how long stage 1 is", hint="give one of the two"
            )

    def _check_data(self, base: Checkpoint, kind: dit.Family) -> None:
        if not self.distils and not self.finetune_steps:
            if self.data is not None:
                raise UsageError(
                    "data-unused",
                    f"--data {self.data} has no use: --init {self.init} leaves out stage 1, and no --finetune-steps",
                    hint="leave out --data, or add --finetune-steps, or take --init distill",
                )
            return
        if self.data is None:
            what = "--init distill" if self.init == "distill" else "--finetune-steps"
            raise UsageError(
                "no-data",
                f"{what} needs images to train on",
                hint="add --data digits, folder:PATH, npz:PATH or latents:PATH",
            )
        if kind.name == "pixart":
            raise UsageError(
                "text-model",
                f"{base.name}: training needs text states, which --data does not hold",
                hint="graft with --init copy or random, and train with your own pipeline",
            )
        scheduler_config(base)

    def _warnings(self, new: list[dit.Graft]) -> tuple[str, ...]:
        # What has no weights cannot be distilled; only stage 2 makes up for it.
        left = [e for e in new if not self.distils or e.op == "identity-zero"]
        starts = sorted({f"{e.op}: {self._init_of(e)}" for e in left if (e.op, self._init_of(e)) != ("mha", "copy")})
        if self.finetune_steps or not starts:
            return ()
        return (
            f"the graft is not repaired yet ({', '.join(starts)} start): --data distils it, --finetune-steps finetunes",
        )

    def _init_of(self, entry: dit.Graft) -> str:
        return OPERATORS[entry.op].auto_init if self.init == "auto" else self.init

    def _entries(
        self, base: Checkpoint, part: Part, new: list[dit.Graft], old: tuple[dit.Graft, ...], dims: dit.Dims
    ) -> tuple[list[Entry], list[str]]:
        before = {(e.block, e.slot): (e.op, e.args) for e in old}
        owner = {dit.slot_prefix(e.block, e.slot): e for e in new}
        replaced: dict[str, dict[str, TensorRef]] = {prefix: {} for prefix in owner}
        entries: list[Entry] = []
        for name, ref in part.tensors.items():
            prefix = ".".join(name.split(".")[:3]) + "."
            if prefix in owner:
                replaced[prefix][name.removeprefix(prefix)] = ref
            elif self.finetune_steps:
                entries.append(Trained(part=part.name, name=name, dtype=ref.dtype, shape=ref.shape))
            else:
                entries.append(Keep(part=part.name, name=name, dtype=ref.dtype, shape=ref.shape, ref=ref))
        default = next(iter(part.tensors.values())).dtype
        for prefix, entry in owner.items():
            refs = replaced[prefix]
            dtype = next((ref.dtype for ref in refs.values()), default)
            shapes = OPERATORS[entry.op].tensors(**dims.place, **entry.args)
            if self.distils or self.finetune_steps:
                entries += [Trained(part=part.name, name=prefix + n, dtype=dtype, shape=s) for n, s in shapes.items()]
                continue
            starts = self.starts(
                entry, {n: ref.shape for n, ref in refs.items()}, before.get((entry.block, entry.slot)), dims
            )
            entries += [_entry(part.name, prefix + n, dtype, shapes[n], starts[n], refs) for n in shapes]
        for other in base.parts.values():
            if other is not part:
                entries += [
                    Keep(part=other.name, name=n, dtype=r.dtype, shape=r.shape, ref=r) for n, r in other.tensors.items()
                ]
        written = {e.name for e in entries if e.part == part.name}
        lead = f"{part.name}/" if part.name else ""
        return entries, [lead + name for name in part.tensors if name not in written]

    def starts(
        self,
        entry: dit.Graft,
        shapes: Mapping[str, tuple[int, ...]],
        before: tuple[str, Mapping[str, Any]] | None,
        dims: dit.Dims,
    ) -> Mapping[str, Source]:
        """Where each tensor of a new operator starts: drawn, or taken from the operator it replaces."""
        spec = OPERATORS[entry.op]
        if self._init_of(entry) != "copy":
            return spec.layout(**dims.place, **entry.args)
        return spec.copy_plan(shapes, source_op=before, **dims.place, **entry.args)

    def _files(
        self, base: Checkpoint, part: Part, edited: Mapping[str, Any]
    ) -> tuple[tuple[SideFile, ...], tuple[tuple[str, Any, Any], ...]]:
        assert part.config is not None and part.config_file is not None
        file_name, source = modeling_source()
        lead = f"{part.name}/" if part.name else ""
        edits = [
            (f"{part.config_file}:{k}", part.config.get(k), v) for k, v in edited.items() if part.config.get(k) != v
        ]
        written = {part.config_file: json_bytes(edited), lead + file_name: source}
        if part.name:
            index = read_json(base.root / "model_index.json")
            value = [file_name.removesuffix(".py"), edited["_class_name"]]
            edits.append((f"model_index.json:{part.name}", index.get(part.name), value))
            written["model_index.json"] = json_bytes({**index, part.name: value})
        stale = f"{lead}modeling_surgery_dit_"
        kept = [n for n in base.side_files if n not in written and not n.startswith(stale)]
        files = [SideFile(n, source=str(base.root / n)) for n in kept]
        noise = scheduler_file(base)
        if noise is not None and not {noise.name, f"scheduler/{noise.name}"} & {*base.side_files}:
            # One part taken out of a pipeline: without its noise process it could be neither sampled nor trained.
            files.append(SideFile(noise.name, source=str(noise)))
        files += [SideFile(n, content=c) for n, c in written.items()]
        return tuple(files), tuple(edits)


def _entry(
    part: str, name: str, dtype: str, shape: tuple[int, ...], source: Any, refs: Mapping[str, TensorRef]
) -> Entry:
    ranges = byte_ranges(source)
    used = [refs[n] for n in source.sources]
    if ranges is not None and all(refs[n].offset >= 0 and refs[n].dtype == dtype for n, _, _ in ranges):
        if len(ranges) == 1 and refs[ranges[0][0]].shape == shape:
            return Keep(part=part, name=name, dtype=dtype, shape=shape, ref=refs[ranges[0][0]])
        pieces = []
        for source_name, start, stop in ranges:
            ref = refs[source_name]
            row = ref.nbytes // ref.shape[0]
            pieces.append((ref, start * row, ref.nbytes if stop is None else stop * row))
        return Bytes(part=part, name=name, dtype=dtype, shape=shape, pieces=tuple(pieces))
    return Compute(part=part, name=name, dtype=dtype, shape=shape, how=source, refs=tuple(used), random=source.random)


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _percent(pair: Mapping[str, int]) -> str:
    return f"{100 * (pair['after'] - pair['before']) / pair['before']:+.2f} %" if pair["before"] else "-"
