"""The record beside the weights: what it holds, and what its digest and a node's key are of."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from math import inf, nan
from pathlib import Path
from typing import Annotated, Any, ClassVar

import pytest
import torch
from graft_runs import OP, WEIGHTS, faults, flip, graft, record_of

from surgery.errors import UsageError
from surgery.graph.lineage import encode, ranges, verify
from surgery.graph.op import Param, PartNames, Plan, PlanContext, SideFile, Trained, TrainResult, build_op
from surgery.graph.run import RunOptions, run_op
from surgery.ops.cast import Cast
from surgery.ops.graft import Graft
from surgery.ops.merge import Merge
from surgery.store.checkpoint import open_checkpoint

UNHASHED = ("created", "environment", "measured")


def test_the_record_has_the_fields_of_the_format(child: Path) -> None:
    record = record_of(child)
    assert record["surgery"] == 1 and record["record"].startswith("sha256:")
    assert record.keys() >= {
        "digest", "created", "output", "steps", "parents", "changes", "dropped", "config_edits", "tensors", "ancestors",
        "environment",
    }  # fmt: skip
    (step,) = record["steps"]
    assert step.keys() >= {"op", "version", "params", "seed", "parents", "key"}
    assert (step["op"], step["params"]["replace"], step["parents"]) == ("graft", ["mlp=r3"], ["tiny"])


def test_the_digest_is_that_of_the_content(child: Path) -> None:
    assert record_of(child)["digest"] == f"sha256:{open_checkpoint(child).digest}"


def test_every_file_is_listed_and_no_other(child: Path) -> None:
    listed = {row["path"]: row["size"] for row in record_of(child)["output"]["files"]}
    on_disk = {f.name: f.stat().st_size for f in child.iterdir() if f.name != "surgery.json"}
    assert listed == on_disk


def test_every_tensor_is_listed_with_the_digest_of_its_bytes(child: Path) -> None:
    checkpoint, listed = open_checkpoint(child), record_of(child)["tensors"]
    assert listed.keys() == checkpoint.tensors.keys()
    for name, row in listed.items():
        ref = checkpoint.tensors[name]
        assert row == {"sha256": checkpoint.hash_tensor(ref), "dtype": ref.dtype, "shape": list(ref.shape)}


def test_changes_say_how_each_group_came_to_be(child: Path) -> None:
    changes = {row["tensors"]: row for row in record_of(child)["changes"]}
    assert changes["proj_out_1.bias"] == {"tensors": "proj_out_1.bias", "count": 1, "how": "keep", "from": ["tiny"]}
    assert changes["transformer_blocks.{0-5}.attn1.to_q.bias"]["count"] == 6
    new = changes["transformer_blocks.{1,3}.ff.net.0.proj.weight"]
    assert (new["how"], new["count"], new["from"]) == ("compute", 2, [])
    assert sum(row["count"] for row in changes.values()) == len(record_of(child)["tensors"])


def test_ranges_of_blocks_are_short() -> None:
    assert ranges([3, 1, 8, 9, 10, 12, 12]) == "1,3,8-10,12"


def test_config_edits_say_what_was_and_what_is(child: Path) -> None:
    edits = {path: (old, new) for path, old, new in record_of(child)["config_edits"]}
    assert edits["config.json:_class_name"] == ("DiTTransformer2DModel", "SurgeryDiTTransformer2DModel")


def test_a_parent_is_recorded_with_its_digest_and_its_record(child: Path, tiny_dit: Path) -> None:
    parent = record_of(child)["parents"]["tiny"]
    assert parent["digest"] == f"sha256:{open_checkpoint(tiny_dit).digest}"
    assert parent["lineage"] == record_of(tiny_dit)["record"]


def test_all_ancestors_travel_along(child: Path, tiny_dit: Path, tmp_path: Path) -> None:
    grandchild = run_op(Graft(replace=("attn=swa:w=4",), init="random"), [open_checkpoint(child)], tmp_path / "g").path
    found = record_of(grandchild)["ancestors"]
    assert found.keys() == {record_of(child)["record"], record_of(tiny_dit)["record"]}
    own = {record_of(path)["record"]: record_of(path) for path in (child, tiny_dit)}
    assert all({**ancestor, "ancestors": own[digest]["ancestors"]} == own[digest] for digest, ancestor in found.items())


def test_a_parent_from_elsewhere_is_a_root(tiny_dit: Path, tmp_path: Path) -> None:
    source = shutil.copytree(tiny_dit, tmp_path / "source")
    (source / "surgery.json").unlink()
    record = graft(source, tmp_path / "out").record
    assert record["parents"]["source"]["lineage"] is None and record["ancestors"] == {}


def test_the_repository_and_commit_of_a_hub_parent_are_recorded(tiny_dit: Path, tmp_path: Path) -> None:
    from dataclasses import replace

    parent = replace(open_checkpoint(tiny_dit, name="org/name"), origin={"name": "org/name", "commit": "0" * 40})
    record = run_op(OP, [parent], tmp_path / "out").record
    assert record["parents"]["name"] | {"name": "org/name", "commit": "0" * 40} == record["parents"]["name"]


def test_a_part_of_a_produced_pipeline_has_its_history(pipeline_child: Path, tmp_path: Path) -> None:
    part = open_checkpoint(pipeline_child, part="transformer")
    op = Graft(replace=("attn=swa:w=4",), init="random")
    record = run_op(op, [part], tmp_path / "out").record
    (parent,) = record["parents"].values()
    assert parent["part"] == "transformer" and parent["lineage"] == record_of(pipeline_child)["record"]


# What the record's digest is of


def digest_of(record: dict[str, Any], *, whole_ancestors: bool = False) -> str:
    """The record's digest, written down a second time; with `whole_ancestors` as it was at first."""
    from hashlib import sha256

    def rest(own: dict[str, Any]) -> dict[str, Any]:
        parents = {n: {k: v for k, v in row.items() if k != "source"} for n, row in own["parents"].items()}
        return {k: v for k, v in own.items() if k not in UNHASHED} | {"parents": parents}

    ancestors = record["ancestors"]
    told = ancestors if whole_ancestors else {n: rest(own) for n, own in ancestors.items()}
    hashed = {k: v for k, v in rest(record).items() if k != "record"} | {"ancestors": told}
    text = json.dumps(hashed, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return "sha256:" + sha256(text.encode()).hexdigest()


def test_the_record_s_digest_is_that_of_the_file_without_itself_time_and_environment(child: Path) -> None:
    assert record_of(child)["ancestors"] and record_of(child)["record"] == digest_of(record_of(child))


def test_the_same_work_elsewhere_at_another_time_has_the_same_record(
    tiny_dit: Path, child: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = shutil.copytree(tiny_dit, tmp_path / "deep" / "tiny")
    monkeypatch.setattr("surgery.graph.lineage.time.strftime", lambda *_: "1999-01-01T00:00:00Z")
    monkeypatch.setattr("surgery.graph.machine.platform.python_version", lambda: "9.9")
    monkeypatch.chdir(source.parent)
    again = graft(Path("tiny"), Path("other"), workers=1, threads=2).record
    first = record_of(child)
    assert again["created"] != first["created"] and again["environment"] != first["environment"]
    assert again["record"] == first["record"] and again["steps"][0]["key"] == first["steps"][0]["key"]


def test_the_same_work_in_two_steps_has_the_same_record_whenever_and_wherever_each_was_done(
    tiny_llava: Path, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def twice(place: Path, lead: str, **options: Any) -> list[dict[str, Any]]:
        """Merge, then cast what was merged, below `place`."""
        shutil.copytree(tiny_llava, place / "vlm")
        shutil.copytree(tiny_llama, place / "llm")
        models = [open_checkpoint(place / n, name=lead + n) for n in ("vlm", "llm")]
        how = RunOptions(**options)
        merged = run_op(Merge(force=True), models, place / "merged", options=how)
        result = run_op(Cast("float16"), [open_checkpoint(merged.path)], place / "out", options=how)
        return [merged.record, result.record]

    first = twice(tmp_path / "here", "", workers=2)
    monkeypatch.setattr("surgery.graph.lineage.time.strftime", lambda *_: "1999-01-01T00:00:00Z")
    monkeypatch.setattr("surgery.graph.machine.platform.python_version", lambda: "9.9")
    monkeypatch.setattr("surgery.graph.machine._processor", lambda: "another")
    monkeypatch.setattr(Merge, "measure", lambda *_: {"layers": [{"layer": 0, "cosine": 0.1}]})
    second = twice(tmp_path / "there", "./", workers=1, threads=2)
    for one, two in zip(first, second, strict=True):
        assert all(one[k] != two[k] for k in ("created", "environment")) and one["record"] == two["record"]
    for one, two in zip(first[1]["ancestors"].items(), second[1]["ancestors"].items(), strict=True):
        assert one[0] == two[0] and all(one[1][k] != two[1][k] for k in ("created", "environment", "measured"))
    assert faults(tmp_path / "here" / "out") == faults(tmp_path / "there" / "out") == []


def test_a_record_of_the_first_rule_holds_and_is_still_checked(child: Path, tmp_path: Path) -> None:
    older = shutil.copytree(child, tmp_path / "older")
    record = record_of(older)
    record["record"] = digest_of(record, whole_ancestors=True)
    assert record["record"] != digest_of(record)
    (older / "surgery.json").write_bytes(encode(record))
    assert faults(older) == []
    (ancestor,) = record["ancestors"].values()
    for change in ({"created": "1999-01-01T00:00:00Z"}, {"digest": "sha256:" + "0" * 64}):
        altered = record | {"ancestors": {ancestor["record"]: ancestor | change}}
        (older / "surgery.json").write_bytes(encode(altered))
        assert faults(older) == ["surgery.json: the record was altered"]
    (older / "surgery.json").write_bytes(encode(record))
    grandchild = run_op(Graft(replace=("attn=swa:w=4",), init="random"), [open_checkpoint(older)], tmp_path / "g")
    assert grandchild.record["ancestors"].keys() == {record["record"], ancestor["record"]}
    assert faults(grandchild.path) == []


def test_a_change_of_an_ancestor_s_work_is_found(copy: Path) -> None:
    record = record_of(copy)
    (ancestor,) = record["ancestors"].values()
    ancestor["steps"][0]["seed"] = 5
    (copy / "surgery.json").write_bytes(encode(record))
    assert faults(copy) == ["surgery.json: the record was altered"]


def test_a_parent_named_by_a_dot_is_recorded_by_its_folder_s_name(
    tiny_dit: Path, child: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tiny_dit)
    assert graft(Path("."), tmp_path / "out").record["record"] == record_of(child)["record"]


@pytest.mark.parametrize(
    "change",
    [lambda: {"seed": 1}, lambda: {"op": Graft(replace=("mlp=r3",), layers="1", init="random")}],
    ids=["seed", "layers"],
)
def test_other_work_has_another_key(tiny_dit: Path, child: Path, tmp_path: Path, change: Callable[[], Any]) -> None:
    choice = {"seed": 0, "op": OP} | change()
    record = run_op(
        choice["op"], [open_checkpoint(tiny_dit)], tmp_path / "out", options=RunOptions(seed=choice["seed"])
    ).record
    assert record["steps"][0]["key"] != record_of(child)["steps"][0]["key"]


@pytest.mark.parametrize("what", ["a bit of a tensor", "the config"])
def test_another_parent_gives_another_key(tiny_dit: Path, child: Path, tmp_path: Path, what: str) -> None:
    source = shutil.copytree(tiny_dit, tmp_path / "tiny")
    if what == "the config":
        config = json.loads((source / "scheduler_config.json").read_text()) | {"steps_offset": 1}
        (source / "scheduler_config.json").write_text(json.dumps(config))
    else:
        flip(source / WEIGHTS, -1)
    assert graft(source, tmp_path / "out").record["steps"][0]["key"] != record_of(child)["steps"][0]["key"]


@dataclass(frozen=True)
class Odd:
    """An operation whose training says odd things."""

    rate: Annotated[float, Param("A number.")] = 1.0

    name: ClassVar[str] = "odd"
    version: ClassVar[int] = 1
    parents: ClassVar[int] = 0
    trainer: ClassVar[str | None] = f"{__name__}:train_oddly"

    def plan(self, ctx: PlanContext) -> Plan:
        files = (SideFile("config.json", content=b"{}"),)
        edits = (("config.json:limit", None, (0.0, inf)),)
        return Plan(
            (Trained(name="t.{}.\x1b", dtype="F32", shape=(2,)),), (PartNames("", "model"),), files, config_edits=edits
        )

    def run(self, task: Any, tensors: Any, generator: Any) -> Any:
        raise AssertionError


def train_oddly(op: Odd, ctx: Any, plan: Plan) -> TrainResult:
    """The trainer of `Odd`."""
    return TrainResult({"t.{}.\x1b": torch.zeros(2)}, {"loss": nan, 10: 0.1, 9: (1, -inf)})


def test_numbers_that_json_lacks_do_not_spoil_a_record(tmp_path: Path) -> None:
    path = run_op(Odd(), [], tmp_path / "out").path

    def fail(text: str) -> None:
        raise AssertionError(f"{text} is not JSON")

    record = json.loads((path / "surgery.json").read_bytes(), parse_constant=fail)
    assert record["steps"][0]["training"] == {"loss": "nan", "10": 0.1, "9": [1, "-inf"]}
    assert verify(open_checkpoint(path)) == []


@pytest.mark.parametrize("value", [nan, inf])
def test_a_parameter_that_is_no_finite_number_is_refused(value: float) -> None:
    with pytest.raises(UsageError, match="rate is"):
        build_op(Odd, {"rate": value})


def test_the_file_is_laid_out_one_tensor_a_line(child: Path) -> None:
    text = (child / "surgery.json").read_text()
    record = record_of(child)
    assert encode(record).decode() == text
    assert sum(line.startswith('  "transformer_blocks.') for line in text.splitlines()) == sum(
        n.startswith("transformer_blocks.") for n in record["tensors"]
    )
