"""A recipe from Python, run twice and then edited. Usage: python examples/recipe_api.py [OUTPUT FOLDER]"""

import sys
from pathlib import Path

import surgery

RECIPE = """\
surgery: 1
inputs: {base: dit-digits}
steps:
  half: {op: cast, from: base, with: {dtype: bfloat16, except: ["*.norm1.*"]}}
  deeper: {op: slice, from: half, with: {layers: "0-3,2-5"}}
outputs: {deeper: deeper}
"""


def main(out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    recipe = out / "recipe.yaml"
    recipe.write_text(RECIPE)

    (first,) = surgery.run(recipe, out / "deeper").values()
    print(f"made {first.path.name}: {len(first.record['tensors'])} tensors, digest {first.record['digest'][7:19]}")

    (again,) = surgery.run(recipe, out / "deeper").values()
    print(f"found again: {again.found}")

    (other,) = surgery.run(recipe, out / "mirrored", set={"deeper.layers": "0-2,2-3"}).values()
    print(f"edited: {other.taken} computed tensors taken from the first result")

    # The same as single calls; every operation is a function of the module.
    half = surgery.cast("dit-digits", dtype="bf16", except_=["*.norm1.*"], out=out / "half")
    single = surgery.slice(half.path, layers="0-3,2-5", out=out / "single")
    print(f"the same by hand: {single.record['digest'] == first.record['digest']}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "out/example-recipe"))
