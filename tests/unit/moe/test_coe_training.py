"""Training after a conversion: what is trained, beside what, and what is written."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_moe import SPLIT, chained, moe_model, save_moe

import surgery
from surgery.errors import CheckpointError, NonFiniteLoss, ResourceError, UsageError
from surgery.graph.op import PlanContext
from surgery.graph.run import silent
from surgery.ops.train_coe import TrainCoe
from surgery.store.checkpoint import open_checkpoint
from surgery.train.coe.data import load_split, mean_loss
from surgery.train.coe.run import unconverted
from surgery.train.coe.stages import Stage, _Groups, free, last_state, run_stage

STAGE = Stage("weights", 3, 1e-3, 2, 1, 0.1, 0.01, 1.0, (0.9, 0.95), False, 0)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("def f(x):\n    return x + 1\n" * 150)
    return file


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(plain, split) of a family whose names on disk are not those of the module."""
    root = tmp_path_factory.mktemp("mixtral")
    base = save_moe(root / "base", "mixtral", vocab_size=256)
    return base, surgery.apply("coe", base, out=root / "coe", verify="none").path


# --- data ------------------------------------------------------------------------------------------------------------


def test_a_text_is_cut_into_windows_and_its_end_is_held_out(text: Path) -> None:
    split = load_split(str(text), length=16, held_out=10, template="", tokenizer=None, vocabulary=256)
    data = text.read_bytes()
    assert bytes(split.train.ids[0].tolist()) == data[:16]
    whole = len(data) // 16
    assert len(split.train) == whole - 10 and bytes(split.val.ids[0].tolist()) == data[(whole - 10) * 16 :][:16]


def test_rows_are_held_out_as_the_paper_draws_them(tmp_path: Path) -> None:
    import numpy as np

    rows = [{"query": f"q{i}", "response": "r" * i} for i in range(20)]
    file = tmp_path / "rows.json"
    file.write_text(json.dumps(rows))
    form = "query : {query} response : {response}"
    split = load_split(str(file), length=32, held_out=5, template=form, tokenizer=None, vocabulary=256)
    order = np.random.RandomState(42).permutation(20)
    for number, row in enumerate(order[:5]):
        wanted = form.format(**rows[row]).encode()[:32]
        assert bytes(split.val.ids[number].tolist()).rstrip(b"\0") == wanted
        assert split.val.labels[number].tolist() == [*wanted, *[-100] * (32 - len(wanted))]
    assert len(split.train) == 15
    lines = tmp_path / "rows.jsonl"
    lines.write_text("\n".join(json.dumps(r) for r in rows))
    again = load_split(str(lines), length=32, held_out=5, template=form, tokenizer=None, vocabulary=256)
    assert torch.equal(again.val.ids, split.val.ids)


@pytest.mark.parametrize(
    ("content", "form", "error"),
    [('[{"a": 1}]', "{b}", CheckpointError), ("[", "{a}", CheckpointError), ('[{"a": 1}]', "{a}", UsageError)],
)
def test_rows_that_do_not_fit(content: str, form: str, error: type[Exception], tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text(content)
    with pytest.raises(error):
        load_split(str(tmp_path / "rows.json"), length=8, held_out=1, template=form, tokenizer=None, vocabulary=256)


def test_the_mean_loss_leaves_out_padding() -> None:
    model = moe_model("qwen3_moe", vocab_size=256)
    split = load_split("stdlib", length=16, held_out=6, template="", tokenizer=None, vocabulary=256)
    with torch.no_grad():
        wanted = float(model(split.val.ids, labels=split.val.labels).loss)
    assert mean_loss(model, split.val, batch=4) == pytest.approx(wanted, rel=1e-5)


# --- stages ----------------------------------------------------------------------------------------------------------


def test_stage_a_frees_routers_of_further_passes_and_gates_alone() -> None:
    native = moe_model("qwen3_moe")
    model = chained(native, iterations=2, topk=[2, 2], **SPLIT)
    gates = Stage(**{**STAGE.__dict__, "gates_only": True})
    free(model, gates)
    assert {n.partition(".mlp.")[2] for n, p in model.named_parameters() if p.requires_grad} == {
        "coe_gates.0.weight",
        "coe_alpha",
        "coe_beta",
    }
    free(native, gates)
    assert {n.partition(".mlp.")[2] for n, p in native.named_parameters() if p.requires_grad} == {"gate.weight"}
    free(model, STAGE)
    assert all(p.requires_grad for p in model.parameters())
    native.requires_grad_(True)


def test_gates_have_no_weight_decay(tmp_path: Path) -> None:
    from transformers import TrainingArguments

    model = chained(moe_model("qwen3_moe"), iterations=2, topk=[2, 2], **SPLIT)
    arguments = TrainingArguments(output_dir=str(tmp_path), weight_decay=0.5, use_cpu=True, report_to=[])
    optimiser = _Groups(model=model, args=arguments).create_optimizer()
    decay = {id(p): g["weight_decay"] for g in optimiser.param_groups for p in g["params"]}
    assert len(decay) == len(list(model.parameters()))
    for name, tensor in model.named_parameters():
        gate = ".coe_alpha" in name or ".coe_beta" in name
        assert decay[id(tensor)] == (0.0 if gate or tensor.dim() < 2 else 0.5), name


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path: Path) -> None:
    model = moe_model("qwen3_moe", vocab_size=256)
    split = load_split("stdlib", length=8, held_out=2, template="", tokenizer=None, vocabulary=256)
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    with pytest.raises(NonFiniteLoss, match="at step 1"):
        run_stage(model, split.train, STAGE, folder=tmp_path / "s", device="cpu", report=silent, label="x")


@pytest.mark.parametrize("lora", [0, 2], ids=["all", "lora"])
@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss"])
def test_a_killed_stage_ends_with_the_bytes_of_one_that_was_not(kind: str, lora: int, tmp_path: Path) -> None:
    """Experts lie one by one on disk and fused in the module, and adapters beside routers that are trained whole: a
    state has all of it. What a killed process left half written is passed over."""
    stage = replace(STAGE, steps=8, save_every=2, lr=1e-2, lora=lora)
    split = load_split("stdlib", length=8, held_out=2, template="", tokenizer=None, vocabulary=256)

    class Killed(Exception):
        pass

    def run(name: str, kill: int = 0) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        def report(label: str, values: Any) -> None:
            if values["step"] == kill:
                raise Killed

        model = chained(moe_model(kind, vocab_size=256), iterations=2, topk=[2, 2], **SPLIT)
        model, facts = run_stage(
            model, split.train, stage, folder=tmp_path / name, device="cpu", report=report, label="x"
        )
        return {n: t.clone() for n, t in model.state_dict().items()}, facts

    whole, facts = run("whole")
    with pytest.raises(Killed):
        run("cut", kill=5)
    torn = tmp_path / "cut" / "checkpoint-6"
    torn.mkdir()
    (torn / "trainer_state.json").write_text('{"global_')
    assert last_state(tmp_path / "cut")[1] == 4
    for again in ("cut", "whole"):  # goes on at step 4; was over already
        values, its = run(again)
        assert all(torch.equal(values[n], whole[n]) for n in whole) and values.keys() == whole.keys()
        assert its == facts


@pytest.mark.parametrize("mode", ["append", "split"])
def test_a_bfloat16_chain_improves_and_its_gates_move(mode: str, text: Path, tmp_path: Path) -> None:
    """Steps of 1e-3 around 1 are lost in bfloat16, whose values are 2^-8 apart there: the gates are float32."""
    base = save_moe(tmp_path / "base", "qwen3_moe", vocab_size=256, dtype=torch.bfloat16)
    coe = surgery.apply("coe", base, out=tmp_path / "coe", mode=mode, verify="none").path
    setting = {"data": str(text), "batch": 4, "length": 32, "held_out": 8, "dtype": "bfloat16"}
    result = surgery.apply("train-coe", coe, out=tmp_path / "out", steps=12, lr=1e-3, **setting)
    loss = result.record["steps"][-1]["training"]["val_loss"]
    assert loss["end"] < loss["start"] - 0.1
    trained = open_checkpoint(result.path)
    beta = trained.read("model.layers.0.mlp.coe_beta")
    assert beta.dtype == torch.float32 and 0 < float((beta[0] - 1).abs().max()) < 0.1
    assert trained.tensors["model.layers.0.mlp.experts.0.up_proj.weight"].dtype == "BF16"
    assert all(torch.isfinite(trained.read(n)).all() for n in trained.tensors)


# --- the operation ---------------------------------------------------------------------------------------------------


def test_the_unconverted_model_is_the_base(chain: tuple[Path, Path]) -> None:
    from surgery.arch.language.load import load_model

    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        base = load_model(open_checkpoint(chain[0]))(ids).logits
        assert torch.equal(unconverted(open_checkpoint(chain[1]), dtype="float32")(ids).logits, base)


def test_the_report_has_the_unconverted_model_under_the_same_budget(
    chain: tuple[Path, Path], text: Path, tmp_path: Path
) -> None:
    from surgery.arch.language.load import load_model

    setting = {"data": str(text), "batch": 4, "length": 32, "held_out": 8, "gate_steps": 2, "steps": 4, "lr": 1e-3}
    result = surgery.apply("train-coe", chain[1], out=tmp_path / "out", **setting)
    facts = result.record["steps"][-1]["training"]
    plain = facts["baseline"]
    assert facts["val_loss"]["start"] == pytest.approx(plain["val_loss"]["start"], abs=1e-5)
    assert set(facts["val_loss"]) == {"start", "after_gates", "after_weights", "end"}
    for stage, steps in (("gates", 2), ("weights", 4)):
        mine, its = facts["stages"][stage], plain["stages"][stage]
        assert mine["steps"] == its["steps"] == steps and mine["tokens"] == its["tokens"]
    assert facts["gain"] == pytest.approx(plain["val_loss"]["end"] - facts["val_loss"]["end"])
    assert facts["val_loss"]["end"] < facts["val_loss"]["start"]
    before, after = open_checkpoint(chain[1]), open_checkpoint(result.path)
    assert {n: (r.dtype, r.shape) for n, r in before.tensors.items()} == {
        n: (r.dtype, r.shape) for n, r in after.tensors.items()
    }
    assert all(not torch.equal(before.read(n), after.read(n)) for n in before.tensors if "router" in n or "gate" in n)
    load_model(after)  # strictly
    again = surgery.apply("train-coe", chain[1], out=tmp_path / "again", **setting)
    assert again.record["digest"] == result.record["digest"]


def test_stage_a_alone_leaves_the_base_tensors_alone(chain: tuple[Path, Path], text: Path, tmp_path: Path) -> None:
    setting = {"data": str(text), "batch": 4, "length": 32, "held_out": 8, "gate_steps": 2, "gate_lr": 1e-2}
    result = surgery.apply("train-coe", chain[1], out=tmp_path / "out", **setting)
    before, after = open_checkpoint(chain[1]).tensor_digests, open_checkpoint(result.path).tensor_digests
    changed = {n for n in before if before[n] != after[n]}
    assert changed and all(".coe_" in n for n in changed)
    collapsed = surgery.apply("coe", result.path, out=tmp_path / "back", collapse=True, verify="keys")
    assert open_checkpoint(collapsed.path).digest == open_checkpoint(chain[0]).digest


def test_lora_is_folded_in(chain: tuple[Path, Path], text: Path, tmp_path: Path) -> None:
    setting = {"data": str(text), "batch": 4, "length": 32, "held_out": 8, "steps": 3, "lora": 2, "lr": 1e-2}
    result = surgery.apply("train-coe", chain[1], out=tmp_path / "out", **setting)
    before, after = open_checkpoint(chain[1]).tensor_digests, open_checkpoint(result.path).tensor_digests
    changed = {n for n in before if before[n] != after[n]}
    assert any("q_proj" in n for n in changed) and any(".coe_beta" in n for n in changed)
    assert not any(".experts." in n for n in changed)


def test_a_plain_model_is_trained_as_it_is(chain: tuple[Path, Path], text: Path, tmp_path: Path) -> None:
    result = surgery.apply("train-coe", chain[0], out=tmp_path / "o", data=str(text), steps=2, length=32, held_out=8)
    assert "baseline" not in result.record["steps"][-1]["training"]
    other = surgery.apply(
        "train-coe", chain[1], result.path, out=tmp_path / "p", data=str(text), steps=2, length=32, held_out=8
    )
    facts = other.record["steps"][-1]["training"]
    assert facts["baseline"]["val_loss"]["start"] == pytest.approx(
        result.record["steps"][-1]["training"]["val_loss"]["end"], abs=1e-5
    )


def test_a_chain_from_scratch_is_reported_beside_a_plain_model(text: Path, tmp_path: Path) -> None:
    result = surgery.apply(
        "train-coe", out=tmp_path / "o", arch="coe-tiny", baseline="deepseek-v2-tiny", data=str(text), steps=3,
        length=32, held_out=8, lr=3e-3,
    )  # fmt: skip
    facts = result.record["steps"][-1]["training"]
    assert (
        facts["val_loss"]["end"] < facts["val_loss"]["start"] and facts["baseline"]["stages"]["weights"]["steps"] == 3
    )
    from surgery.arch.language.load import load_model

    assert load_model(open_checkpoint(result.path)).config.coe_route == "paper"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({}, "nothing to train"),
        ({"steps": -1}, "--steps"),
        ({"gate_steps": 1, "lora": 4}, "stage B"),
        ({"steps": 1, "dtype": "int8"}, "--dtype"),
        ({"steps": 1, "length": 1}, "--length"),
        ({"steps": 1, "warmup": 1.0}, "--warmup"),
        ({"steps": 1, "arch": "coe-544m"}, "beside a plain model"),
        ({"steps": 1, "arch": "coe-545m"}, "unknown"),
        ({"steps": 1, "arch": "coe-tiny", "baseline": "x"}, "--baseline x"),
        ({"gate_steps": 1, "arch": "coe-tiny", "baseline": "moe-544m"}, "nothing is known yet"),
        ({"steps": 1}, "needs a model"),
        ({"steps": 1, "set_": ("a=1",)}, "belong to --arch"),
    ],
)
def test_wrong_requests_are_refused_before_anything_is_read(options: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        TrainCoe(**options).plan(PlanContext())


def test_a_launch_of_several_processes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """They would train apart and write the same output."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="in one process, and this launch has 2"):
        TrainCoe(arch="coe-tiny", baseline="qwen3-moe-tiny", steps=1).plan(PlanContext())


def test_a_large_model_is_refused_on_a_cpu(tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match="--device cuda|take days on a CPU"):
        surgery.apply("train-coe", out=tmp_path / "out", arch="coe-544m", baseline="moe-544m", steps=1)
    assert not (tmp_path / "out").exists()
