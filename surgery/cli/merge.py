"""The command that merges: HOST DONOR with --base, or a mergekit file."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import typer

from surgery.cli.operation import COMMON_DEFAULTS, command_function, run_options
from surgery.errors import UsageError, printable
from surgery.store.names import model_and_adapter, open_named

_ARITHMETIC = ("auto", "stream", "kernels", "mergekit")
# numpy's threads for matrix products have nothing to do here, and starting them costs half of importing it.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")


def _sources(values: dict[str, Any], common: Mapping[str, Any]) -> list[str] | None:
    """The checkpoints in the order in which the operation takes them; the file's document becomes its `config`."""
    if common["engine"] in _ARITHMETIC:
        raise UsageError(
            "engine",
            f"--engine {common['engine']} is --arithmetic {common['engine']} here",
            hint="--engine says where the work is done: local or ray",
        )
    named, base, file = list(values.pop("models", None) or ()), values.pop("base"), values.pop("config")
    if file is None:
        if len(named) != 2:
            raise UsageError(
                "models",
                f"merge takes HOST and DONOR, and {len(named)} {'was' if len(named) == 1 else 'were'} named",
                hint="surgery merge HOST DONOR; more models: surgery merge --config FILE",
            )
        models = [*named, base] if base is not None else named
        return [piece for model in models for piece in _with_adapter(model, offline=common["offline"])]
    if named or base is not None:
        raise UsageError("models", "--config names the models itself", hint="leave HOST, DONOR and --base out")
    from surgery.graph.recipes.mergekit_file import read_mergekit

    recipe = read_mergekit(file, seed=common["seed"])
    if len(recipe.steps) == 1:
        values["config"] = recipe.steps[0].params["config"]
        return list(recipe.steps[0].sources)
    if values.get("arithmetic", "auto") != "auto":
        raise UsageError(
            "arithmetic", f"{file} holds several documents; --arithmetic is for one", hint="merge them one by one"
        )
    from surgery.graph.op import build_op
    from surgery.ops.merge import Merge

    build_op(Merge, {**values, "config": recipe.steps[0].params["config"]})  # refuses options that a file says itself
    _several(recipe, common)
    return None


def _with_adapter(typed: str, *, offline: bool) -> list[str]:
    """A model, or a model and its adapter: MODEL+ADAPTER. Raises `UsageError` where one stands for the other."""
    from surgery.arch.merging.adapters import CONFIG, is_adapter

    names = model_and_adapter(typed)
    if len(names) > 2 or not all(names):
        raise UsageError(
            "models",
            f"{printable(typed)}: no model, and no model with one adapter",
            hint="MODEL or MODEL+ADAPTER; surgery lora apply MODEL ADAPTER merges one after the other",
        )
    if (Path(names[0]) / CONFIG).is_file():
        raise UsageError("models", f"{printable(names[0])}: an adapter, no model", hint=f"MODEL+{printable(names[0])}")
    if len(names) == 2 and not is_adapter(open_named(names[1], offline=offline)):
        raise UsageError(
            "models",
            f"{printable(names[1])}: no adapter, there is no {CONFIG} beside the weights",
            hint="more than two models are merged by a mergekit file: surgery merge --config FILE",
        )
    return names


def _several(recipe: Any, common: Mapping[str, Any]) -> None:
    """A file of several documents: each is a step, and what is only a step is not kept."""
    from surgery.cli.graph.recipe import print_plans, run_and_report

    if common["emit_recipe"]:
        from surgery.cli.emitted import print_recipe

        print_recipe(recipe, common, COMMON_DEFAULTS)
        return
    options = run_options(common)
    if common["dry_run"]:
        print_plans([(recipe, common["out"])], options, as_json=common["as_json"])
    else:
        run_and_report(recipe, common["out"], options, as_json=common["as_json"])


merge = command_function(
    "merge",
    "Merge models.",
    own={
        "models": (
            list[str] | None,
            typer.Argument(
                metavar="[HOST DONOR]",
                help="The model whose tower is merged into, and the text model. Folder, file, alias or hub id, or "
                "MODEL+ADAPTER.",
                show_default=False,
            ),
            None,
        ),
        "base": (
            str | None,
            typer.Option("--base", metavar="MODEL", help="What both came from, for task vectors."),
            None,
        ),
        "config": (
            Path | None,
            typer.Option("-c", "--config", metavar="FILE", help="A mergekit YAML file instead of HOST DONOR."),
            None,
        ),
        "workers": (
            int,
            typer.Option(
                "--workers",
                "-j",
                "--jobs",
                min=0,
                show_default=False,
                help="Tensors in work at once [default: the cores, at most 4].",
            ),
            0,
        ),
    },
    sources_of=_sources,
)
