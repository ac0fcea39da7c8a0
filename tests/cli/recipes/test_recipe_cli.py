"""`surgery run`: outputs are found again, a fault names file, line and the nearest word."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from surgery.graph.recipes.recipe import build_steps
from surgery.graph.recipes.recipe_file import read_recipe
from surgery.steps import load_step
from surgery.store.checkpoint import open_checkpoint

Run = Callable[..., Any]

GRAFT = """\
surgery: 1
seed: 3
inputs: {base: BASE}
steps:
  first:
    op: graft
    from: base
    with: {replace: [attn=hyena@1], init: random}
  second:
    op: graft
    from: first
    with:
      replace: mlp=r3
      layers: 0
outputs: {second: out/g}
"""


def written(folder: Path, text: str, base: object = "dit-digits") -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text.replace("BASE", str(base)))
    return path


# --- running ---------------------------------------------------------------------------------------------------------


def test_steps_run_in_order_and_only_outputs_are_left(command: Run, tiny_dit: Path, tmp_path: Path) -> None:
    path = written(tmp_path, GRAFT, tiny_dit)
    ended = command("run", path)
    assert (ended.code, ended.stdout) == (0, "out/g\n"), ended.stderr
    assert "step 'first': the graft is not repaired yet" in ended.stderr
    assert {p.name for p in tmp_path.iterdir()} == {"recipe.yaml", "out"}
    listed = json.loads((tmp_path / "out/g/config.json").read_text())["surgery_grafts"]
    assert [(e["block"], e["slot"]) for e in listed] == [(0, "mlp"), (1, "attn")]
    log = json.loads(command("log", "out/g", "--json").stdout)
    assert log["steps"][-1]["seed"] == 3 and log["steps"][-1]["parents"] == ["first"]
    assert any(a["steps"][-1]["params"].get("replace") == ["attn=hyena@1"] for a in log["ancestors"].values())
    assert command("verify", "out/g").code == 0


def test_a_second_run_finds_everything_done(command: Run, tiny_dit: Path, tmp_path: Path) -> None:
    path = written(tmp_path, GRAFT, tiny_dit)
    first = json.loads(command("run", path, "--json").stdout)["second"]
    before = (tmp_path / "out/g/surgery.json").stat().st_mtime_ns
    again = command("run", path, "--json")
    second = json.loads(again.stdout)["second"]
    assert (first["found"], second["found"]) == (False, True) and first["digest"] == second["digest"]
    assert (tmp_path / "out/g/surgery.json").stat().st_mtime_ns == before
    assert "warning" not in again.stderr


def test_a_recipe_equals_its_commands_by_hand(command: Run, tiny_dit: Path, tmp_path: Path) -> None:
    assert command("run", written(tmp_path, GRAFT, tiny_dit)).code == 0
    by_hand = ("--init", "random", "--seed", "3")
    assert command("graft", "-r", "attn=hyena@1", *by_hand, tiny_dit, "-o", "a").code == 0
    assert command("graft", "-r", "mlp=r3", "-l", "0", "--seed", "3", "a", "-o", "b").code == 0
    assert open_checkpoint(tmp_path / "b").digest == open_checkpoint(tmp_path / "out/g").digest


def test_another_seed_or_recipe_does_not_replace_an_output_unasked(
    command: Run, tiny_dit: Path, tmp_path: Path
) -> None:
    path = written(tmp_path, GRAFT, tiny_dit)
    assert command("run", path).code == 0
    written(tmp_path, GRAFT.replace("seed: 3", "seed: 4"), tiny_dit)
    ended = command("run", path)
    assert ended.code == 4 and ended.stderr.splitlines()[-2].startswith("error[output.exists]: out/g")
    assert command("run", path, "--overwrite").code == 0
    assert command("run", path, "-o", "elsewhere").stdout == "elsewhere\n"


def test_several_outputs_go_below_the_folder_that_is_asked_for(command: Run, tiny_dit: Path, tmp_path: Path) -> None:
    text = GRAFT.replace("outputs: {second: out/g}", "outputs: {second: out/g, first: out/f}")
    ended = command("run", written(tmp_path, text, tiny_dit), "-o", "x")
    assert sorted(ended.stdout.split()) == ["x/first", "x/second"], ended.stderr
    assert {p.name for p in (tmp_path / "x").iterdir()} == {"first", "second"}


def test_without_outputs_the_last_step_is_left_under_its_default_name(
    command: Run, tiny_dit: Path, tmp_path: Path
) -> None:
    text = GRAFT.replace("outputs: {second: out/g}\n", "")
    ended = command("run", written(tmp_path, text, tiny_dit))
    assert ended.code == 0 and ended.stdout.startswith("first-graft-")
    assert (tmp_path / ended.stdout.strip() / "surgery.json").is_file()


def test_a_dry_run_plans_what_it_can_and_writes_nothing(command: Run, tiny_dit: Path, tmp_path: Path) -> None:
    path = written(tmp_path, GRAFT, tiny_dit)
    ended = command("run", path, "--dry-run")
    assert ended.code == 0 and {p.name for p in tmp_path.iterdir()} == {"recipe.yaml"}
    assert "step 'first': graft from base" in ended.stdout and "hyena-x" in ended.stdout
    assert "step 'second': graft from first  ->  out/g\n  to be made  ('first' is made first)" in ended.stdout
    rows = json.loads(command("run", path, "--dry-run", "--json").stdout)["steps"]
    assert [(r["name"], r["op"], r["from"], r["state"]) for r in rows] == [
        ("first", "graft", ["base"], "run"),
        ("second", "graft", ["first"], "run"),
    ]
    assert all(set(r["plan"]) == {"entries", "params", "flops", "bytes", "warnings"} for r in rows)
    assert command("plan", path).stdout == ended.stdout


def test_an_input_can_come_through_a_pipe(surgery: Run, tiny_dit: Path, tmp_path: Path) -> None:
    ended = surgery("run", written(tmp_path, GRAFT, "'-'"), stdin=f"{tiny_dit}\n")
    assert (ended.code, ended.stdout) == (0, "out/g\n"), ended.stderr


# --- values ----------------------------------------------------------------------------------------------------------


def steps_of(tmp_path: Path, params: str) -> Any:
    text = f"surgery: 1\ninputs: {{base: x}}\nsteps:\n  a: {{op: graft, from: base, with: {params}}}\n"
    return build_steps(read_recipe(written(tmp_path, text)), load_step)["a"]


@pytest.mark.parametrize(
    ("params", "field", "value"),
    [
        ("{replace: attn=hyena}", "replace", ("attn=hyena",)),
        ("{replace: [attn=hyena, mlp=r3]}", "replace", ("attn=hyena", "mlp=r3")),
        ("{replace: a, lr: 1e-4}", "lr", 1e-4),
        ("{replace: a, lr: 1}", "lr", 1.0),
        ("{replace: a, layers: 3}", "layers", "3"),
        ("{replace: a, layers: 50%}", "layers", "50%"),
        ("{replace: a, samples: null}", "samples", None),
        ("{replace: a, gate_weighted: true}", "gate_weighted", True),
    ],
)
def test_yaml_values_become_what_the_parameter_is(tmp_path: Path, params: str, field: str, value: Any) -> None:
    got = getattr(steps_of(tmp_path, params), field)
    assert got == value and type(got) is type(value)


# --- faults ----------------------------------------------------------------------------------------------------------

HEAD = "surgery: 1\ninputs: {base: BASE}\nsteps:\n"
STEP = "  a: {op: graft, from: base, with: {replace: [attn=hyena]}}\n"

FAULTS: dict[str, tuple[str, int, str, str]] = {
    "empty": ("", 1, "a recipe is a mapping", "surgery: 1"),
    "a list": ("- a\n", 1, "a recipe is a mapping", "surgery: 1"),
    "no format": ("steps:\n" + STEP, 1, "must be 'surgery: 1'", "format"),
    "another format": ("# x\nsurgery: 2\nsteps:\n" + STEP, 2, "must be 'surgery: 1'", "format"),
    "no steps": ("surgery: 1\n", 1, "no steps", "step"),
    "unknown key": (HEAD + STEP + "output: {a: x}\n", 5, "unknown key 'output'", "'outputs'"),
    "unknown key of a step": (HEAD + "  a:\n    op: graft\n    form: base\n", 6, "unknown key 'form'", "'from'"),
    "unknown operation": (HEAD + "  a: {op: grft, from: base}\n", 4, "no operation 'grft'", "'graft'"),
    "no operation": (HEAD + "  a: {from: base}\n", 4, "step 'a' has no op", "op: graft"),
    "operation that is no name": (HEAD + "  a: {op: 3, from: base}\n", 4, "op is no name", "op: graft"),
    "unknown parameter": (
        HEAD + "  a:\n    op: graft\n    from: base\n    with:\n      replace: attn=hyena\n      sampels: 3\n",
        9,
        "no parameter 'sampels'",
        "'samples'",
    ),
    "missing parameter": (HEAD + "  a: {op: graft, from: base}\n", 4, "replace must be given", "help"),
    "a word for a number": (
        HEAD + "  a:\n    op: graft\n    from: base\n    with:\n      replace: attn=hyena\n      steps: many\n",
        9,
        "steps must be a whole number, not 'many'",
        "graft --help",
    ),
    "a number for a truth": (
        HEAD + "  a: {op: graft, from: base, with: {replace: x, gate_weighted: 1}}\n",
        4,
        "gate_weighted must be true or false",
        "graft --help",
    ),
    "a mapping for a list": (
        HEAD + "  a: {op: graft, from: base, with: {replace: {attn: hyena}}}\n",
        4,
        "replace must be a list, each a word",
        "graft --help",
    ),
    "a fraction for a count": (
        HEAD + "  a: {op: graft, from: base, with: {replace: x, steps: 2.5}}\n",
        4,
        "steps must be a whole number, not 2.5",
        "graft --help",
    ),
    "unknown source": (HEAD + "  a: {op: graft, from: bse}\n", 4, "reads 'bse'", "'base'"),
    "too many sources": (
        HEAD + "  a: {op: graft, from: [base, base], with: {replace: x}}\n",
        4,
        "takes 1 checkpoints, not 2",
        "from",
    ),
    "source that is no name": (HEAD + "  a: {op: graft, from: {base: 1}}\n", 4, "from is a name", "recipes/"),
    "output of no step": (HEAD + STEP + "outputs:\n  b: x\n", 6, "output 'b' is no step", "a"),
    "two outputs in one place": (
        HEAD + STEP + STEP.replace("  a:", "  b:") + "outputs:\n  a: x\n  b: x\n",
        7,
        "two outputs are called x",
        "folder",
    ),
    "an output that is no path": (HEAD + STEP + "outputs:\n  a: 3\n", 6, "must be a name or a path", "quotes"),
    "an input that is no name": ("surgery: 1\ninputs:\n  base: 3\nsteps:\n" + STEP, 3, "must be a name", "quotes"),
    "inputs that are a list": ("surgery: 1\ninputs: [a]\nsteps:\n" + STEP, 2, "inputs must map names", "recipes/"),
    "a name twice": (HEAD + STEP.replace("  a:", "  base:"), 4, "'base' is an input and a step", "another name"),
    "a key twice": (HEAD + STEP + STEP, 5, "'a' stands twice", "keep one"),
    "a parameter twice": (
        HEAD + "  a:\n    op: graft\n    from: base\n    with:\n      lr: 1\n      lr: 2\n",
        9,
        "'lr' stands twice",
        "keep one",
    ),
    "a circle": (
        HEAD + "  a: {op: graft, from: b, with: {replace: x}}\n  b: {op: graft, from: a, with: {replace: x}}\n",
        4,
        "steps in a circle",
        "itself",
    ),
    "a step that reads itself": (HEAD + "  a: {op: graft, from: a}\n", 4, "steps in a circle: a -> a", "itself"),
    "a seed that is no number": ("surgery: 1\nseed: x\nsteps:\n" + STEP, 2, "seed must be a whole number", "seed: 0"),
    "a negative seed": (HEAD + "  a:\n    op: graft\n    seed: -1\n", 6, "seed must be a whole number", "seed: 0"),
    "a tab": ("surgery: 1\nsteps:\n\ta: 3\n", 3, "not YAML", "indentation"),
    "an open bracket": ("surgery: 1\nsteps: {a: [\n", 3, "not YAML", "indentation"),
    "a date that is none": ("surgery: 1\nseed: 2020-13-45\n", 1, "not YAML", "indentation"),
    "a key that is a list": ("surgery: 1\n? [a]\n: b\n", 2, "a key is a list", "words"),
    "an alias to itself": ("surgery: 1\nsteps: &x\n  a: *x\n", 3, "step 'a' has no op", "op: graft"),
    "brackets without end": ("[" * 2000, 1, "not YAML", "indentation"),
}


@pytest.mark.parametrize("case", FAULTS)
def test_a_fault_names_file_line_and_what_to_do(command: Run, tiny_dit: Path, tmp_path: Path, case: str) -> None:
    text, line, said, hint = FAULTS[case]
    path = written(tmp_path, text, tiny_dit)
    ended = command("run", "recipe.yaml", "-o", "x")
    assert ended.code == 2, ended.stderr
    error, advice = ended.stderr.splitlines()
    assert error.startswith(f"error[usage.recipe]: recipe.yaml:{line}: ") and said in error, error
    assert advice.startswith("hint: ") and hint in advice, advice
    assert ended.stdout == "" and {p.name for p in tmp_path.iterdir()} == {path.name}


def test_a_bad_later_step_is_found_before_the_first_one_runs(command: Run, tiny_dit: Path, tmp_path: Path) -> None:
    ended = command("run", written(tmp_path, GRAFT.replace("layers: 0", "layer: 0"), tiny_dit))
    assert ended.code == 2 and "recipe.yaml:14: " in ended.stderr and "'layers'" in ended.stderr
    assert {p.name for p in tmp_path.iterdir()} == {"recipe.yaml"}


def test_a_recipe_that_cannot_be_read_is_one_line(command: Run, tmp_path: Path) -> None:
    (tmp_path / "latin.yaml").write_bytes(b"surgery: \xff\n")
    for name in ("gone.yaml", ".", "latin.yaml"):
        ended = command("run", name)
        assert ended.code == 3 and ended.stderr.count("\n") == 2
        assert ended.stderr.startswith("error[checkpoint.unreadable]")


def test_faults_of_an_operation_keep_their_own_words(command: Run, tiny_dit: Path, tmp_path: Path) -> None:
    ended = command("run", written(tmp_path, GRAFT.replace("hyena@1", "hyenna@1"), tiny_dit))
    assert ended.code == 2 and "there is no operator 'hyenna'" in ended.stderr and "'hyena'" in ended.stderr
    gone = command("run", written(tmp_path, GRAFT, "nowhere"))
    assert gone.code == 3 and "nowhere" in gone.stderr
    assert command("run", written(tmp_path, GRAFT, tiny_dit), "--device", "gpu").code == 2
    assert {p.name for p in tmp_path.iterdir()} == {"recipe.yaml"}
