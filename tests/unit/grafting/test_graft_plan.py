"""The plan of `graft`: entries, counts, FLOPs, bytes, files and refusals, from headers and configs alone."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from surgery.arch.architectures import ARCHITECTURES
from surgery.arch.dit.config import tensor_shapes
from surgery.arch.dit.operators import modeling_source
from surgery.errors import CheckpointError, SurgeryError, UsageError
from surgery.graph.op import Bytes, Compute, Keep, Plan, PlanContext, Trained
from surgery.ops.graft import PRESETS, Graft
from surgery.store.checkpoint import Checkpoint, open_checkpoint
from surgery.store.header import plan_header

XL = ARCHITECTURES["dit-xl-2"]
ATTENTION, MLP = 5_313_024, 10_622_592  # parameters of one block's attention and MLP in DiT-XL/2


def hollow(folder: Path, name: str) -> Path:
    """The folder of a known architecture whose weights are a header and a hole: no byte of data is there."""
    known = ARCHITECTURES[name]
    folder.mkdir(parents=True)
    rows = [(n, "F32", s) for n, s in tensor_shapes(known.transformer).items()]
    header, places = plan_header(rows, metadata={"format": "pt"})
    with open(folder / "diffusion_pytorch_model.safetensors", "wb") as handle:
        handle.write(header)
        handle.truncate(len(header) + sum(count for _, count in places.values()))
    (folder / "config.json").write_text(json.dumps(known.transformer))
    (folder / "scheduler_config.json").write_text(json.dumps(known.scheduler))
    return folder


@pytest.fixture(scope="module")
def xl(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """DiT-XL/2 in full size and without data."""
    return open_checkpoint(hollow(tmp_path_factory.mktemp("xl") / "dit-xl-2", "dit-xl-2"))


@pytest.fixture(scope="module")
def dit(tiny_dit: Path) -> Checkpoint:
    return open_checkpoint(tiny_dit)


def plan(base: Checkpoint, *replace: str, seed: int = 0, **fields: Any) -> Plan:
    return Graft(replace=replace, **fields).plan(PlanContext(seed=seed), base)


def change(pair: dict[str, int], unit: int | None = None) -> float:
    """Percent of what stood before, or of `unit`."""
    return 100 * (pair["after"] - pair["before"]) / (unit or pair["before"])


# --- full size -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("replace", "totals"),
    [
        ("attn=hyena-se", (750_149_024, 750_310_304, 750_471_584)),
        ("attn=hyena-x", (750_068_384, 750_189_344, 750_310_304)),
        ("attn=hyena-y", (749_907_104, 749_947_424, 749_987_744)),
        ("attn=mamba2", (791_516_224, 812_361_104, 833_205_984)),
        ("attn=swa", (749_826_464,) * 3),
        ("mlp=r3", (712_651_424, 694_063_904, 675_476_384)),
        ("mlp=r6", (824_176_544, 861_351_584, 898_526_624)),
    ],
)
def test_parameters_of_the_full_size_model(xl: Checkpoint, replace: str, totals: tuple[int, ...]) -> None:
    for layers, total in zip(("50%", "75%", "all"), totals, strict=True):
        report = plan(xl, replace, layers=layers, init="random").report
        assert report["params"] == {"before": 749_826_464, "after": total}


@pytest.mark.parametrize(
    ("replace", "unit", "core", "features", "params"),
    [
        ("attn=hyena-se", ATTENTION, (-49.52, -74.27), (0.13, 0.20), (0.22, 0.33)),
        ("attn=hyena-x", ATTENTION, (-49.90, -74.85), (0.13, 0.20), (0.16, 0.24)),
        ("attn=hyena-y", ATTENTION, (-49.52, -74.27), (0, 0), (0.05, 0.08)),
        ("attn=swa", ATTENTION, (-48.24, -72.36), (0, 0), (0, 0)),
        ("mlp=r3", MLP, (-12.5, -18.75), None, (-12.5, -18.75)),
        ("mlp=r6", MLP, (25, 37.5), None, (25, 37.5)),
    ],
)
def test_published_deltas_come_out_of_the_plan(
    xl: Checkpoint, replace: str, unit: int, core: tuple, features: tuple | None, params: tuple
) -> None:
    """Grafting, arXiv 2506.05340, Tab. 4, to the two digits printed there."""
    for i, layers in enumerate(("50%", "75%")):
        report = plan(xl, replace, layers=layers, init="random").report
        assert change(report["flops"]["core"]) == pytest.approx(core[i], abs=0.011)
        if features is None:
            assert report["flops"]["features"] == {"before": 0, "after": 0}
        else:
            assert change(report["flops"]["features"]) == pytest.approx(features[i], abs=0.006)
        assert change(report["params"], 28 * unit) == pytest.approx(params[i], abs=0.006)


def test_bytes_of_the_full_size_graft_are_the_tensors(xl: Checkpoint) -> None:
    made = plan(xl, "attn=hyena:k=4", init="random")
    new, old = 14 * 4 * 5_330_304, 14 * 4 * ATTENTION
    assert made.bytes_report() == {"kept": 4 * 749_826_464 - old, "written": new}
    assert len(made.dropped) == 14 * 8


def test_the_full_size_model_takes_the_papers_settings(xl: Checkpoint, dit: Checkpoint) -> None:
    assert Graft(replace=("attn=hyena",)).settings(749_826_464) == PRESETS["paper"]
    lines = "\n".join(Graft(replace=("attn=mha",), data="digits").describe(plan(dit, "attn=mha", data="digits")))
    assert "1,536 samples, 250 steps an operator" in lines


# --- what the report is made of --------------------------------------------------------------------------------------


def test_the_report_has_the_documented_keys_and_no_more(dit: Checkpoint) -> None:
    report = plan(dit, "attn=hyena", "mlp=r3@0", data="digits", finetune_steps=5).report
    assert list(report) == ["entries", "params", "flops"]
    assert set(report["flops"]) == {"core", "features"}
    assert all(set(report["flops"][k]) == {"before", "after"} for k in report["flops"])
    assert all(set(entry) == {"block", "slot", "op", "args"} for entry in report["entries"])
    json.dumps(dict(report))


def test_entries_are_by_block_with_complete_arguments_and_resolved_names(dit: Checkpoint) -> None:
    entries = plan(dit, "mlp=r3@0,2", "attn=hyena@50%").report["entries"]
    assert [(e["block"], e["slot"], e["op"]) for e in entries] == [
        (0, "mlp", "mlp"),
        (1, "attn", "hyena-x"),
        (2, "mlp", "mlp"),
        (3, "attn", "hyena-x"),
        (5, "attn", "hyena-x"),
    ]
    assert entries[0]["args"] == {"r": 3, "activation": "gelu-approximate"}
    assert entries[1]["args"] == {"k": 4, "bidirectional": False}


def test_flops_count_the_touched_slots_and_what_was_grafted_before(dit: Checkpoint) -> None:
    attn, mlp, both = (
        plan(dit, *r, layers="all").report["flops"] for r in (["attn=swa:w=1"], ["mlp=r3"], ["attn=swa:w=1", "mlp=r3"])
    )
    for kind in ("core", "features"):
        for when in ("before", "after"):
            assert both[kind][when] == attn[kind][when] + mlp[kind][when]
    assert attn["core"]["after"] * 16 == attn["core"]["before"] * 3  # three of sixteen keys are visible


def test_a_dry_run_for_people_has_a_line_for_every_entry_and_no_python_words(dit: Checkpoint) -> None:
    op = Graft(replace=("attn=hyena",))
    lines = op.describe(plan(dit, "attn=hyena"))
    assert sum("hyena-x:k=4,bidirectional=false" in line for line in lines) == 3
    assert any("at 16 tokens the projections dominate" in line for line in lines)
    assert "True" not in "".join(lines) and "False" not in "".join(lines)


# --- where tensors come from -----------------------------------------------------------------------------------------


def test_only_the_replaced_tensors_are_dropped_and_all_others_are_kept(dit: Checkpoint) -> None:
    made = plan(dit, "attn=hyena@1", init="random")
    kept = {e.name: e for e in made.entries if isinstance(e, Keep)}
    new = {e.name for e in made.entries if isinstance(e, Compute)}
    assert set(made.dropped) == {n for n in dit.tensors if n.startswith("transformer_blocks.1.attn1.")}
    assert set(kept) == set(dit.tensors) - set(made.dropped)
    assert all(kept[n].ref == dit.tensors[n] for n in kept)
    assert {n.rsplit(".", 2)[1] for n in new} == {"in_proj", "out_proj", "short_filter"}


def test_copied_attention_is_kept_bytes_and_copied_projections_are_laid_together(dit: Checkpoint) -> None:
    assert {type(e) for e in plan(dit, "attn=mha", layers="all", init="copy").entries} == {Keep}
    made = {e.name: e for e in plan(dit, "attn=hyena-y@1", init="copy").entries}
    joined = made["transformer_blocks.1.attn1.in_proj.weight"]
    assert isinstance(joined, Bytes)
    assert [ref.name for ref, _, _ in joined.pieces] == [f"transformer_blocks.1.attn1.to_{x}.weight" for x in "qkv"]
    assert sum(stop - start for _, start, stop in joined.pieces) == joined.nbytes
    assert isinstance(made["transformer_blocks.1.attn1.out_proj.weight"], Keep)


def test_stage_1_trains_the_new_tensors_and_stage_2_all_of_the_transformer(dit: Checkpoint) -> None:
    one = plan(dit, "attn=hyena@1", data="digits")
    trained = {e.name for e in one.entries if isinstance(e, Trained)}
    assert all(n.startswith("transformer_blocks.1.attn1.") for n in trained) and len(trained) == 6
    two = plan(dit, "attn=hyena@1", data="digits", finetune_steps=5)
    assert {type(e) for e in two.entries} == {Trained}


def test_the_other_parts_of_a_pipeline_are_kept(tiny_pipeline: Path) -> None:
    made = plan(open_checkpoint(tiny_pipeline), "attn=hyena", data="digits", finetune_steps=5)
    assert {type(e) for e in made.entries if e.part == "vae"} == {Keep}
    assert {type(e) for e in made.entries if e.part == "transformer"} == {Trained}


def test_every_file_of_the_source_is_carried_and_the_config_says_what_changed(tiny_pipeline: Path) -> None:
    made = plan(open_checkpoint(tiny_pipeline), "attn=hyena@3")
    files = {f.relative: f for f in made.files}
    name, source = modeling_source()
    assert files[f"transformer/{name}"].content == source
    assert set(files) == {
        "model_index.json",
        "scheduler/scheduler_config.json",
        "transformer/config.json",
        f"transformer/{name}",
        "vae/config.json",
    }
    index = json.loads(files["model_index.json"].content or b"")
    assert index["transformer"] == [name.removesuffix(".py"), "SurgeryDiTTransformer2DModel"]
    assert index["vae"] == ["diffusers", "AutoencoderKL"] and index["id2label"] == {"0": "zero"}
    config = json.loads(files["transformer/config.json"].content or b"")
    assert config["_class_name"] == "SurgeryDiTTransformer2DModel"
    assert config["norm_type"] == "surgery:ada_norm_zero"
    assert config["surgery_grafts"] == [
        {"block": 3, "slot": "attn", "op": "hyena-x", "args": {"k": 4, "bidirectional": False}}
    ]
    edited = [path for path, _, _ in made.config_edits]
    assert {p.split(":")[0] for p in edited} == {"transformer/config.json", "model_index.json"}


def test_a_pipeline_of_torch_pickles_gets_its_index_edited_too(tiny_pipeline: Path, tmp_path: Path) -> None:
    import shutil

    import torch
    from safetensors.torch import load_file

    pipe = tmp_path / "pipe"
    shutil.copytree(tiny_pipeline, pipe)
    weights = pipe / "transformer" / "diffusion_pytorch_model.safetensors"
    torch.save(load_file(weights), weights.with_suffix(".bin"))
    weights.unlink()
    made = plan(open_checkpoint(pipe), "attn=hyena")
    index = json.loads(next(f.content for f in made.files if f.relative == "model_index.json") or b"")
    assert index["transformer"][1] == "SurgeryDiTTransformer2DModel"


def test_one_part_of_a_pipeline_takes_its_noise_process_along(tiny_pipeline: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tiny_pipeline / "transformer")
    for base in (open_checkpoint(tiny_pipeline, part="transformer"), open_checkpoint(Path("."))):
        files = {f.relative: f for f in plan(base, "attn=hyena").files}
        carried = files["scheduler_config.json"].source
        assert carried is not None
        assert Path(carried).read_text() == (tiny_pipeline / "scheduler" / "scheduler_config.json").read_text()
        assert "model_index.json" not in files


def test_weights_get_the_name_that_diffusers_looks_for(tiny_dit: Path, tmp_path: Path) -> None:
    for file in ("config.json", "scheduler_config.json"):
        (tmp_path / file).write_bytes((tiny_dit / file).read_bytes())
    os.link(tiny_dit / "diffusion_pytorch_model.safetensors", tmp_path / "model.safetensors")
    assert plan(open_checkpoint(tmp_path), "attn=hyena").parts[0].base == "diffusion_pytorch_model"


# --- inits and warnings ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "warned"),
    [
        ({}, "hyena-x: random start"),
        ({"init": "copy"}, "hyena-x: copy start"),
        ({"data": "digits"}, ""),
        ({"data": "digits", "finetune_steps": 3}, ""),
        ({"init": "random", "data": "digits", "finetune_steps": 3}, ""),
    ],
)
def test_an_unrepaired_graft_is_loud(dit: Checkpoint, fields: dict[str, Any], warned: str) -> None:
    warnings = plan(dit, "attn=hyena", **fields).warnings
    assert (warned in warnings[0]) if warned else warnings == ()


def test_a_self_graft_with_the_old_weights_needs_no_repair(dit: Checkpoint) -> None:
    assert plan(dit, "attn=mha", init="copy").warnings == ()


def test_what_has_no_weights_is_not_repaired_by_stage_1(dit: Checkpoint) -> None:
    assert plan(dit, "attn=identity-zero", data="digits").warnings
    assert not plan(dit, "attn=identity-zero", data="digits", finetune_steps=2).warnings


def test_short_finetuning_warms_up_for_a_tenth() -> None:
    small = Graft(replace=("attn=mha",), finetune_steps=50).settings(1000)
    assert small["warmup"] == 5
    assert Graft(replace=("attn=mha",), finetune_steps=50, warmup=40).settings(1000)["warmup"] == 40


def test_epochs_count_in_passes_over_the_samples() -> None:
    op = Graft(replace=("attn=mha",), epochs=3, samples=100, batch=64)
    assert op.settings(1000)["steps"] == 6


def test_the_data_is_part_of_the_work_s_identity(dit: Checkpoint) -> None:
    assert list(plan(dit, "attn=mha", data="digits").inputs) == ["data"]
    assert plan(dit, "attn=mha").inputs == {}


# --- refusals --------------------------------------------------------------------------------------------------------

BAD_FIELDS: list[dict[str, Any]] = [
    {"init": "warm"},
    {"preset": "huge"},
    {"loss": "l7"},
    {"loss": "huber:"},
    {"loss": "huber:0"},
    {"loss": "huber:-1"},
    {"loss": "huber:nan"},
    {"loss": "l1:2"},
    {"capture": "disk"},
    {"finetune_loss": "mse"},
    {"samples": 0},
    {"epochs": 0},
    {"steps": 0},
    {"steps": 5, "epochs": 5},
    {"batch": -1},
    {"lr": 0.0},
    {"lr": -1e-3},
    {"lr": float("nan")},
    {"lr": float("inf")},
    {"finetune_steps": -1},
    {"finetune_batch": 0},
    {"finetune_lr": -1.0},
    {"warmup": -1},
    {"ema": 1.0},
    {"ema": -0.1},
    {"ema": float("nan")},
    {"label_dropout": 1.5},
    {"label_dropout": float("nan")},
    {"seed": -1},
]


@pytest.mark.parametrize("fields", BAD_FIELDS, ids=str)
def test_values_out_of_range_are_refused_before_any_work(dit: Checkpoint, fields: dict[str, Any]) -> None:
    for rest in ({}, {"data": "digits"}, {"data": "digits", "init": "random", "finetune_steps": 3}):
        with pytest.raises(UsageError) as caught:
            plan(dit, "attn=hyena", **{**rest, **fields})
        assert caught.value.hint
        assert any(f"--{name.replace('_', '-')}" in caught.value.message for name in fields)


@pytest.mark.parametrize("loss", ["auto", "l1", "l2", "huber", "huber:1", "huber:0.5", "huber:.5", "huber:2e-1"])
def test_a_loss_that_the_plan_takes_is_one_that_training_knows(dit: Checkpoint, loss: str) -> None:
    from surgery.train.grafting.student import DistillSettings

    plan(dit, "attn=hyena", loss=loss, data="digits")
    DistillSettings(loss=loss)


@pytest.mark.parametrize(
    "replace",
    [
        ("attn=hyena@",),
        ("attn=hyena@ ",),
        ("=hyena",),
        ("attn=",),
        ("attn",),
        ("",),
        (),
        ("attn=hyena@1", "attn=swa@0-2"),
    ],
)
def test_malformed_replacements_are_refused(dit: Checkpoint, replace: tuple[str, ...]) -> None:
    with pytest.raises(UsageError) as caught:
        plan(dit, *replace)
    assert caught.value.hint


@pytest.mark.parametrize("init", ["random", "copy"])
def test_data_that_nothing_uses_is_refused(dit: Checkpoint, init: str) -> None:
    with pytest.raises(UsageError, match="--data digits has no use"):
        plan(dit, "attn=hyena", init=init, data="digits")


@pytest.mark.parametrize("fields", [{"init": "distill"}, {"finetune_steps": 5}])
def test_training_without_data_is_refused(dit: Checkpoint, fields: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="needs images") as caught:
        plan(dit, "attn=hyena", **fields)
    assert caught.value.code == "usage.no-data"


def test_training_without_a_noise_process_is_refused(tiny_dit: Path, tmp_path: Path) -> None:
    for file in ("config.json", "diffusion_pytorch_model.safetensors"):
        os.link(tiny_dit / file, tmp_path / file)
    lone = open_checkpoint(tmp_path)
    plan(lone, "attn=hyena")
    with pytest.raises(CheckpointError, match="no scheduler_config.json"):
        plan(lone, "attn=hyena", data="digits")


def test_a_text_model_takes_grafts_but_no_training(tmp_path: Path) -> None:
    pixart = open_checkpoint(hollow(tmp_path / "pixart", "pixart-sigma"))
    made = plan(pixart, "attn=hyena", layers="8,10,12,14,16,18,20-27", init="random")
    assert len(made.report["entries"]) == 14
    assert not any("attn2" in n for n in made.dropped)
    with pytest.raises(UsageError, match="text states"):
        plan(pixart, "attn=hyena", data="digits")


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        ({"_class_name": "UNet2DModel"}, "neither a DiT nor a PixArt"),
        ({"_class_name": None}, "names no model class"),
        ({"num_layers": 7}, "transformer_blocks.6"),
        ({"num_layers": 5}, "not expected"),
        ({"num_embeds_ada_norm": 11}, "the config asks for"),
        ({"surgery_grafts": [{"block": 1, "slot": "attn", "op": "mystery", "args": {}}]}, "no operator 'mystery'"),
    ],
)
def test_a_config_that_does_not_fit_the_weights_is_a_checkpoint_error(
    tiny_dit: Path, tmp_path: Path, edit: dict[str, Any], said: str
) -> None:
    os.link(tiny_dit / "diffusion_pytorch_model.safetensors", tmp_path / "diffusion_pytorch_model.safetensors")
    config = json.loads((tiny_dit / "config.json").read_text()) | edit
    (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    with pytest.raises(SurgeryError, match=said) as caught:
        plan(open_checkpoint(tmp_path), "attn=hyena")
    assert isinstance(caught.value, CheckpointError) and caught.value.hint


def test_weights_without_a_config_are_a_checkpoint_error(tiny_dit: Path) -> None:
    file = open_checkpoint(tiny_dit / "diffusion_pytorch_model.safetensors")
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        plan(file, "attn=hyena")
