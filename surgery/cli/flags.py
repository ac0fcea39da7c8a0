"""Options that several commands have, each said once, and what is made of their values.

Typer reads them from each command's signature; a command with another meaning of a flag declares its own.
"""

import os
from pathlib import Path
from typing import Annotated

import typer

from surgery.errors import OutputError, UsageError

_NAMED = "Folder, alias, hub id, or - for a path on standard input."
Model = Annotated[str, typer.Argument(metavar="MODEL", help=_NAMED)]
Ckpt = Annotated[str, typer.Argument(metavar="CKPT", help=_NAMED)]
Questions = Annotated[Path, typer.Argument(metavar="DATA.jsonl", help="Questions, as adaptvis data makes them.")]
Picture = Annotated[Path, typer.Argument(metavar="IMAGE", help="A picture.")]

# How a model is loaded and asked.
Device = Annotated[str, typer.Option("--device", help="cpu, cuda, cuda:0, mps.")]
Dtype = Annotated[str, typer.Option("--dtype", help="auto, float32, bfloat16, float16.")]
Attn = Annotated[str | None, typer.Option("--attn", help="Implementation of attention: eager, sdpa, ….")]
SteeredAttn = Annotated[str | None, typer.Option("--attn", help="Attention: sdpa or eager.")]
Threads = Annotated[int | None, typer.Option("--threads", min=1, help="Threads [default: all cores].")]
ChatTemplate = Annotated[
    str | None, typer.Option("--chat-template", metavar="FILE", help="Another chat template, or none.")
]
LongestAnswer = Annotated[int, typer.Option("--max-new-tokens", min=1, help="Longest answer.")]
FirstQuestions = Annotated[int | None, typer.Option("--limit", min=1, help="The first so many questions.")]
GroupsBy = Annotated[
    list[str] | None,
    typer.Option("--group-by", metavar="FIELD", help="Also by the values of a field; several times."),
]
DrawnItems = Annotated[int | None, typer.Option("--limit", min=1, help="So many items, drawn by --seed.")]
BatchOfQuestions = Annotated[int, typer.Option("--batch", min=1, help="Questions at a time.")]
BatchOfItems = Annotated[int, typer.Option("--batch", "--batch-size", min=1, help="Items at a time.")]
BootstrapSeed = Annotated[int, typer.Option("--seed", min=0, help="Of the bootstrap.")]

# What is steered.
TextLayers = Annotated[str | None, typer.Option("-l", "--layers", metavar="0-31", help="Text layers to steer.")]
Heads = Annotated[str | None, typer.Option("--heads", metavar="L:H,..", help="Heads to steer, 8:3,7 9:1.")]
Mode = Annotated[str, typer.Option("--mode", help="logit, mass-preserving, bias, abs or knock-out.")]
Beta = Annotated[float | None, typer.Option("--beta", help="Threshold of the confidence.")]
Answer = Annotated[str, typer.Option("--answer", help="generate (read the text) or closed-set.")]

# What goes out.
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace files that are there.")]
Offline = Annotated[bool, typer.Option("--offline", help="Never ask the network.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
JsonNotPath = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of the path.")]
Quiet = Annotated[bool, typer.Option("-q", "--quiet", help="No talk on stderr.")]
Verbose = Annotated[bool, typer.Option("-v", "--verbose", help="More talk on stderr.")]
Dot = Annotated[bool, typer.Option("--dot", help="Print the graph in the language of Graphviz.")]
Svg = Annotated[Path | None, typer.Option("--svg", metavar="FILE", help="Draw the graph as a picture.")]


def check_file(flag: str, path: Path | None, suffix: str, *, overwrite: bool) -> None:
    """Refuse a file to write, if one is named, before the work for it starts: another kind, one that is there and was
    not to be replaced, a folder that cannot be written to."""
    if path is None:
        return
    if path.suffix != suffix:
        what = f"{flag} {path}: this is written as {suffix}"
        raise UsageError("out", what, hint=f"{flag} {path.stem or 'out'}{suffix}")
    if os.path.lexists(path) and not (overwrite and path.is_file()):
        raise OutputError("exists", f"{path}: is already there", hint="name another file, or pass --overwrite")
    folder = next(p for p in path.absolute().parents if os.path.lexists(p))
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        raise OutputError("not-writable", f"{path}: cannot write in {folder}", hint="check the folder and its rights")


def check_records(flag: str, path: Path | None, *, resume: bool) -> None:
    """Refuse another kind of file for records, and --resume without one. That the file is there is for the records."""
    if path is not None and path.suffix != ".jsonl":
        what = f"{flag} {path}: records are written as .jsonl"
        raise UsageError("out", what, hint=f"{flag} {path.stem or 'records'}.jsonl")
    if resume and path is None:
        raise UsageError("resume", "--resume needs the file to go on with", hint=f"name it with {flag}")


def use_threads(threads: int | None) -> None:
    """Let torch compute with so many threads; None leaves it alone and imports nothing."""
    if threads:
        import torch

        torch.set_num_threads(threads)
