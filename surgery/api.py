"""The public Python calls, behind the lazy names of the package."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from surgery.errors import UsageError
from surgery.graph.op import build_op, check_parents
from surgery.graph.run import RunOptions, RunResult, run_op
from surgery.ops.table import OPS, load_op
from surgery.steps import load_step
from surgery.store.checkpoint import Checkpoint
from surgery.store.names import open_named

__all__ = ["apply", "load", "load_processor", "open", "operation", "run"]


def open(name: str | Path, *, offline: bool = False) -> Checkpoint:
    """Open a checkpoint by path, alias or hub id, reading headers and configs only."""
    return open_named(str(name), offline=offline)


def load(name: str | Path | Checkpoint, *, dtype: str = "auto", attn: str | None = None, device: str = "cpu") -> Any:
    """The model of a checkpoint as a torch module in evaluation mode: a diffusion transformer with its grafted
    operators in place, or a language or vision-language model of transformers.

    `dtype`, `attn` (implementation of attention: eager, sdpa, ...) and `device` are those of
    `arch.language.load.load_model`; a diffusion transformer comes as it is stored. No code from the folder is run:
    operators are looked up in this package, model classes in transformers, an unknown one is refused.
    """
    from surgery.arch.language.load import is_language, load_model

    base = name if isinstance(name, Checkpoint) else open(name)
    if is_language(base):
        return load_model(base, dtype=dtype, attn=attn, device=device)
    if (dtype, attn) != ("auto", None):
        raise UsageError(
            "load", f"{base.name}: dtype and attn are for language models", hint="call .to(dtype) on what load returns"
        )
    from surgery.arch.dit.checkpoints import load_model as load_transformer

    return load_transformer(base).to(device)


def load_processor(name: str | Path | Checkpoint) -> Any:
    """What turns text and images into inputs of `load(name)`: the processor or tokenizer in a transformers folder."""
    from surgery.arch.language.load import load_processor as load_files

    return load_files(name if isinstance(name, Checkpoint) else open(name))


def apply(
    op: str,
    *parents: str | Path | Checkpoint,
    out: str | Path | None = None,
    options: RunOptions | None = None,
    **params: Any,
) -> RunResult:
    """Apply the operation called `op`, as the command of that name does.

        surgery.apply("graft", "dit-digits", replace=["attn=hyena"], data="digits", out="out/hyena")

    Raises the errors of the operation, and `UsageError` for a wrong number of parents or an unknown parameter.
    """
    kind = load_op(op)
    check_parents(kind, len(parents))
    opened = [p if isinstance(p, Checkpoint) else open(p) for p in parents]
    return run_op(build_op(kind, params), opened, Path(out) if out is not None else None, options=options)


def operation(name: str) -> Callable[..., RunResult]:
    """The operation called `name` as a function: `surgery.cast("dit-digits", dtype="bf16", out="half")`. An underscore
    stands for a hyphen. Raises `AttributeError` for a name that is none."""
    op = name.replace("_", "-")
    if op not in OPS:
        raise AttributeError(f"module 'surgery' has no attribute '{name}'")
    call = partial(apply, op)
    call.__doc__ = load_op(op).__doc__
    return call


def run(
    recipe: str | Path,
    out: str | Path | None = None,
    *,
    set: Mapping[str, Any] | None = None,
    options: RunOptions | None = None,
    warn: Callable[[str], None] = lambda text: None,
) -> dict[str, RunResult]:
    """Carry out a recipe file, ours or mergekit's, as `surgery run` does; returns the results of its outputs by name.

        surgery.run("recipes/edits.yaml", out="out/deeper", set={"deeper.layers": "0-4,1-5"})

    `set` is what --set is on the command line. Raises the errors of the recipe and of its operations.
    """
    from surgery.graph.recipes.recipe_file import read_recipe
    from surgery.graph.recipes.schedule import run_recipe

    changes = [f"{key}={value}" for key, value in (set or {}).items()]
    read = read_recipe(Path(recipe), changes=changes)
    options = options or RunOptions()
    place = Path(out) if out is not None else None
    return run_recipe(read, load_step, partial(open_named, offline=options.offline), place, options=options, warn=warn)
