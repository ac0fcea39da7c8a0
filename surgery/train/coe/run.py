"""Train a Chain-of-Experts and, with the same budget, the model that it was converted from.

Both see the same sequences in the same order for as many steps; the report has both, always. A chain's unconverted
model is taken out of it (the base tensors are all there), unless a second checkpoint is given.
"""

import shutil
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from surgery.arch.language.load import load_model, load_processor, quiet_transformers
from surgery.arch.moe.build import model_class
from surgery.arch.moe.carrying import base_config
from surgery.arch.moe.families import COE, FAMILIES, chain_family
from surgery.arch.moe.layouts import MODELS, set_fields
from surgery.errors import ResourceError
from surgery.graph.op import Plan, TrainContext, TrainResult
from surgery.store.checkpoint import Checkpoint, open_checkpoint
from surgery.store.names import open_named
from surgery.train.coe.data import Split, load_split, mean_loss
from surgery.train.coe.stages import Stage, run_stage

if TYPE_CHECKING:
    from surgery.ops.train_coe import TrainCoe

SLOW_ON_A_CPU = 100_000_000  # parameters


class _Saved(Mapping[str, Any]):
    """Tensors of a folder that Transformers wrote, by the names of the plan; read when they are asked for."""

    def __init__(self, folder: Path, wanted: list[str]) -> None:
        self._checkpoint, self._wanted = open_checkpoint(folder), wanted

    def __getitem__(self, name: str) -> Any:
        for known in (name, name.replace(".block_sparse_moe.coe_", ".mlp.coe_")):
            if known in self._checkpoint.tensors:
                return self._checkpoint.read(known)
        raise KeyError(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._wanted)

    def __len__(self) -> int:
        return len(self._wanted)


def train(op: "TrainCoe", ctx: TrainContext, plan: Plan, *parents: Checkpoint) -> TrainResult:
    """The training half of `train coe`: the unconverted model first, then the chain.

    Raises `ResourceError` for a large model on a CPU, `NonFiniteLoss`, and the errors of the data.
    """
    with quiet_transformers():
        return _train(op, ctx, plan, *parents)


def _train(op: "TrainCoe", ctx: TrainContext, plan: Plan, *parents: Checkpoint) -> TrainResult:
    parameters = plan.report["parameters"]
    if ctx.device == "cpu" and parameters > SLOW_ON_A_CPU and not op.slow:
        raise ResourceError(
            "no-device",
            f"{parameters:,} parameters take days on a CPU",
            hint="pass --device cuda on a machine with a GPU, or --slow to do it all the same",
        )
    fields = {k: v for k, v in (op.config() or {}).items()} if op.arch else None
    split = _data(op, parents, fields)
    record: dict[str, Any] = {
        "data": split.digest,
        "sequences": {"train": len(split.train), "held_out": len(split.val)},
    }
    plain = _baseline(op, ctx, parents, fields)
    if plain is not None:
        _, record["baseline"] = _run(op, ctx, plain, split, "baseline")
        del plain
    model, own = _run(op, ctx, _model(op, ctx, parents, fields), split, "chain" if plan.report["chain"] else "model")
    record |= own
    if "baseline" in record:
        record["gain"] = record["baseline"]["val_loss"]["end"] - record["val_loss"]["end"]
    folder = ctx.scratch / "saved"
    shutil.rmtree(folder, ignore_errors=True)
    fused = bool(parents) and plan.report["fused"]
    model.save_pretrained(folder, save_original_format=not fused, max_shard_size="2GB")
    return TrainResult(_Saved(folder, [e.full_name for e in plan.entries]), record)


def _run(op: "TrainCoe", ctx: TrainContext, model: Any, split: Split, label: str) -> tuple[Any, dict[str, Any]]:
    """Both stages of one model; losses on what is held out before, between and after."""
    model = model.to(ctx.device)
    stage_a, stage_b = stages(op, ctx)
    batch = max(1, op.batch)
    losses = {"start": mean_loss(model, split.val, batch=batch)}
    kept: dict[str, Any] = {}
    for stage in (stage_a, stage_b):
        folder = ctx.scratch / f"{label}-{stage.name}"
        model, kept[stage.name] = run_stage(
            model,
            split.train,
            stage,
            folder=folder,
            device=ctx.device,
            report=ctx.report,
            label=f"{label} {stage.name}",
        )
        if stage.steps:
            losses[f"after_{stage.name}"] = mean_loss(model, split.val, batch=batch)
    losses["end"] = list(losses.values())[-1]
    return model, {"val_loss": losses, "stages": kept}


def stages(op: "TrainCoe", ctx: TrainContext) -> tuple[Stage, Stage]:
    """Stage A and B as the options say."""
    stage_a = Stage(
        name="gates",
        steps=op.gate_steps,
        lr=op.gate_lr,
        batch=op.batch,
        accumulate=op.accumulate,
        warmup=op.warmup,
        decay=0.0,
        clip=op.clip,
        betas=(0.9, op.beta2),
        autocast=ctx.device != "cpu" and op.dtype == "float32",
        seed=ctx.seed,
        gates_only=True,
        save_every=op.save_every,
    )
    stage_b = replace(stage_a, name="weights", steps=op.steps, lr=op.lr, decay=op.decay, gates_only=False, lora=op.lora)
    return stage_a, stage_b


def _data(op: "TrainCoe", parents: tuple[Checkpoint, ...], fields: Mapping[str, Any] | None) -> Split:
    source = open_named(op.tokenizer) if op.tokenizer else parents[0] if parents else None
    files = source.side_files if source is not None else ()
    there = any(n in files for n in ("tokenizer.json", "tokenizer.model", "vocab.json"))
    tokenizer = load_processor(source) if there and source is not None else None
    vocabulary = fields["vocab_size"] if fields is not None else parents[0].config["vocab_size"]
    return load_split(
        op.data,
        length=op.length,
        held_out=op.held_out,
        template=op.format_,
        tokenizer=tokenizer,
        vocabulary=vocabulary,
    )


def _model(op: "TrainCoe", ctx: TrainContext, parents: tuple[Checkpoint, ...], fields: Mapping[str, Any] | None) -> Any:
    if fields is not None:
        return from_scratch(fields, seed=ctx.seed)
    return load_model(parents[0], dtype=op.dtype)


def _baseline(
    op: "TrainCoe", ctx: TrainContext, parents: tuple[Checkpoint, ...], fields: Mapping[str, Any] | None
) -> Any | None:
    """The unconverted model; None where what is trained is no chain."""
    if fields is not None:
        name = op.baseline
        return from_scratch(set_fields(MODELS[name], ()), seed=ctx.seed) if name is not None else None
    if len(parents) > 1:
        return load_model(parents[1], dtype=op.dtype)
    family = chain_family(parents[0].config)
    return None if family is None else unconverted(parents[0], dtype=op.dtype)


def from_scratch(config: Mapping[str, Any], *, seed: int) -> Any:
    """A model of the config with random weights."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    fields = {k: v for k, v in config.items() if k not in ("model_type", "architectures", "auto_map")}
    kind = config["model_type"]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if kind.startswith(COE):
            made = model_class(FAMILIES[kind.removeprefix(COE)])
            return made(made.config_class(**fields))
        return AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**fields))


def unconverted(chain: Checkpoint, *, dtype: str) -> Any:
    """The plain model that lies inside a chain: its base tensors under its base config."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    plain, _ = base_config(chain, chain.config)
    config = CONFIG_MAPPING[plain["model_type"]](**{k: v for k, v in plain.items() if k != "model_type"})
    whole = load_model(chain, dtype=dtype)
    state = {n: t for n, t in whole.state_dict().items() if ".coe_" not in n}
    model = AutoModelForCausalLM.from_config(config, dtype=next(whole.parameters()).dtype)
    model.load_state_dict(state, strict=True)
    return model.eval()
