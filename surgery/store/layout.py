"""Find the parts of a checkpoint on disk: which files hold tensors, which lie beside them.

Recognised: a Hugging Face folder (one file or an index with shards), a single `.safetensors` file, a diffusers pipeline
folder, and torch pickles (`.bin`, `.pt`, `.pth`). No tensor is read, nothing beyond the standard library is imported;
paths that come out of a file's content never leave its folder.
"""

import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from surgery.errors import CheckpointError, printable

MAX_JSON = 100_000_000  # bytes; an index or config larger than this is refused before it is read
BASES = ("diffusion_pytorch_model", "model", "adapter_model", "pytorch_model")
LINEAGE_FILE = "surgery.json"
REPORT_FILE = "report.json"  # of an evaluation, where a checkpoint has its weights
_PICKLES = (".bin", ".pt", ".pth")
_WEIGHTS = (*_PICKLES, ".safetensors", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx")
_MAX_SIDE_FILES = 100_000
_NUMBERS = re.compile("[0-9]+")


@dataclass(frozen=True)
class PartLayout:
    """One sub-model, in the folder of its own name below the root ("" is the root); `files` hold its tensors."""

    name: str
    base: str  # stem of the weight files: "model", "diffusion_pytorch_model", …
    files: tuple[str, ...]  # relative to the root
    pickle: bool
    weight_map: dict[str, str] | None  # tensor name -> file relative to the part's folder, when an index says so
    index: str | None
    config: str | None  # relative to the root


@dataclass(frozen=True)
class Layout:
    """`kind` is one of "hf", "file", "gguf", "pipeline", "report". `side_files` are the other files, relative to the
    root; `ignored` are weights in forms or variants that were not chosen (they would be stale beside an edited output).
    """

    kind: str
    root: Path
    parts: tuple[PartLayout, ...]
    side_files: tuple[str, ...]
    ignored: tuple[str, ...]


def find_layout(path: Path) -> Layout:
    """Recognise what lies at `path`. Raises `CheckpointError` naming what is missing or contradictory."""
    try:
        return _find_layout(path)
    except OSError as err:
        raise CheckpointError(
            "unreadable", f"{err.filename or path}: {err.strerror}", hint="check the path and its rights"
        ) from None


def _find_layout(path: Path) -> Layout:
    if not path.exists():
        raise CheckpointError("missing", f"{path}: no such file or folder", hint="check the path")
    if path.is_file():
        return _file(path)
    if not path.is_dir():
        raise CheckpointError("unknown-layout", f"{path}: neither a file nor a folder", hint="name the folder")
    if (path / "model_index.json").is_file():
        return _pipeline(path)
    part = _part(path, name="")
    if part is None and (path / REPORT_FILE).is_file() and (path / LINEAGE_FILE).is_file():
        return Layout("report", path, (), *_other_files(path, ()))
    if part is None:
        raise CheckpointError(
            "no-weights",
            f"{path}: no checkpoint: neither model.safetensors, diffusion_pytorch_model.safetensors, an index of "
            "shards, a .bin file nor a model_index.json",
            hint="name the folder that holds the weights, or a .safetensors file itself",
        )
    return Layout("hf", path, (part,), *_other_files(path, (part,)))


def read_json(path: Path) -> Any:
    """Parse a JSON file of bounded size; raises `CheckpointError` naming the file."""
    try:
        if path.stat().st_size > MAX_JSON:
            raise CheckpointError(
                "malformed", f"{path}: larger than {MAX_JSON} bytes", hint="this is no JSON side file"
            )
        return json.loads(path.read_bytes())
    except OSError as err:
        raise CheckpointError("unreadable", f"{path}: {err.strerror}", hint="check the path and its rights") from None
    except (ValueError, RecursionError) as err:
        raise CheckpointError(
            "malformed",
            f"{path}: not JSON ({printable(str(err), limit=80)})",
            hint="the file is damaged; fetch it again",
        ) from None


@lru_cache(1 << 14)  # every step of a recipe asks again, and models of one family have the same names
def natural(name: str) -> tuple[str, str]:
    """Sort key that puts `layers.2` before `layers.10`. Only ASCII digits count, and no number is too long for it."""
    # A number sorts before text, a short one before a long one; "1" and "01" are different names all the same.
    return ".".join(map(_sortable, name.split("."))), name


@lru_cache(4096)  # a hundred thousand names are made of few pieces
def _sortable(piece: str) -> str:
    return _NUMBERS.sub(_sortable_number, piece)


def _sortable_number(match: re.Match[str]) -> str:
    digits = match[0].lstrip("0")
    return f"\0{chr(min(len(digits), 0x10FFFF))}{digits}"


def safe_relative(name: object) -> bool:
    """Whether `name` is a file name that stays inside the folder it is joined to, by POSIX and Windows rules."""
    if not isinstance(name, str) or not name or "\0" in name:
        return False
    for pure in (PurePosixPath(name), PureWindowsPath(name)):
        if not pure.parts or pure.is_absolute() or pure.drive or pure.root or ".." in pure.parts:
            return False
    return True


def _file(path: Path) -> Layout:
    if path.suffix == ".safetensors":
        part = PartLayout("", path.stem, (path.name,), False, None, None, None)
    elif path.suffix in _PICKLES:
        part = PartLayout("", path.stem, (path.name,), True, None, None, None)
    elif path.suffix == ".gguf":
        part = PartLayout("", path.stem, (path.name,), False, None, None, None)
        return Layout("gguf", path.parent, (part,), (), ())
    elif path.name.endswith(".index.json"):
        raise CheckpointError("not-weights", f"{path} is an index", hint=f"name its folder instead: {path.parent}")
    else:
        raise CheckpointError(
            "unknown-layout",
            f"{path}: not a file of tensors that we read",
            hint="readable: .safetensors, .gguf, .bin, .pt, .pth, or a folder with weights",
        )
    return Layout("file", path.parent, (part,), (), ())


def _pipeline(root: Path) -> Layout:
    index = read_json(root / "model_index.json")
    if not isinstance(index, dict):
        raise CheckpointError(
            "malformed", f"{root / 'model_index.json'}: not a JSON object", hint="not a pipeline folder"
        )
    parts = []
    for name in sorted(k for k, v in index.items() if not k.startswith("_") and isinstance(v, list)):
        if not safe_relative(name) or "/" in name or "\\" in name:
            raise CheckpointError(
                "unsafe-path",
                f"{root / 'model_index.json'}: part '{printable(name)}' is no folder name",
                hint="edit the file",
            )
        if (root / name / "config.json").is_file():
            part = _part(root / name, name=name)
            if part is not None:
                parts.append(part)
    if not parts:
        raise CheckpointError(
            "no-weights", f"{root}: a pipeline folder without weights in any part", hint="fetch it again"
        )
    return Layout("pipeline", root, tuple(parts), *_other_files(root, tuple(parts)))


def _part(folder: Path, *, name: str) -> PartLayout | None:
    prefix = f"{name}/" if name else ""
    names = sorted(entry.name for entry in os.scandir(folder) if entry.is_file())
    single = [
        n for n in names if n.endswith(".safetensors") and _base_of(n[: -len(".safetensors")]) and "-of-" not in n
    ]
    index = [n for n in names if _is_index(n, "safetensors")]
    pickle = False
    if not single and not index:
        pickle = True
        single = [n for n in names if n.endswith(_PICKLES) and _base_of(n.rsplit(".", 1)[0]) and "-of-" not in n]
        index = [n for n in names if _is_index(n, "bin")]
    if len(single) + len(index) > 1:
        plain = [n for n in [*single, *index] if n.split(".")[0] in BASES and n.count(".") == (1 if n in single else 3)]
        if len(plain) != 1 or len({n.split(".")[0] for n in [*single, *index]}) > 1:
            raise CheckpointError(
                "ambiguous",
                f"{folder}: several sets of weights side by side: {', '.join(map(printable, [*single, *index]))}",
                hint="loaders disagree about which one counts: remove or move away all but one",
            )
        single, index = [n for n in single if n in plain], [n for n in index if n in plain]
    config = f"{prefix}config.json" if (folder / "config.json").is_file() else None
    if index:
        weight_map = _weight_map(folder / index[0], ".bin" if pickle else ".safetensors")
        files = sorted(set(weight_map.values()), key=natural)
        for file in files:
            if not (folder / file).is_file():
                raise CheckpointError(
                    "missing-shard", f"{folder / file}: named by {index[0]} and not there", hint="fetch the shard"
                )
        paths = tuple(prefix + file for file in files)
        return PartLayout(name, _output_base(index[0]), paths, pickle, weight_map, prefix + index[0], config)
    if single:
        return PartLayout(name, _output_base(single[0]), (prefix + single[0],), pickle, None, None, config)
    return None


def _output_base(file: str) -> str:
    """The stem under which an output's weights are looked for: transformers reads pytorch_model.bin, but only
    model.safetensors."""
    stem = file.split(".")[0]
    return "model" if stem == "pytorch_model" else stem


def _is_index(name: str, form: str) -> bool:
    """`model.safetensors.index.json`, or with a variant `model.safetensors.index.fp16.json`."""
    return re.fullmatch(rf".+\.{re.escape(form)}\.index(\.[\w-]+)?\.json", name) is not None


def _base_of(stem: str) -> bool:
    return stem.split(".")[0] in BASES


def _weight_map(path: Path, extension: str) -> dict[str, str]:
    document = read_json(path)
    weight_map = document.get("weight_map") if isinstance(document, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(
            "malformed", f"{path}: weight_map is not an object of names", hint="fetch the index again"
        )
    for tensor, file in weight_map.items():
        if not safe_relative(file):
            raise CheckpointError(
                "unsafe-path",
                f"{path}: '{printable(tensor)}' is said to be in {printable(str(file))}, outside the folder",
                hint="an index may only name files beside it; do not use this checkpoint",
            )
        if not file.endswith(extension):
            raise CheckpointError(
                "inconsistent",
                f"{path}: '{printable(tensor)}' is said to be in {printable(file)}, no {extension} file",
                hint="the index is damaged; fetch it again",
            )
    return weight_map


def _other_files(root: Path, parts: tuple[PartLayout, ...]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    taken = {name for part in parts for name in (*part.files, part.index)} | {LINEAGE_FILE}
    side: list[str] = []
    ignored: list[str] = []
    for name in _walk(root):
        if name in taken:
            continue
        stale = name.endswith(_WEIGHTS) or (name.endswith(".json") and ".index." in name.rsplit("/", 1)[-1])
        (ignored if stale else side).append(name)
        if len(side) > _MAX_SIDE_FILES:
            raise CheckpointError(
                "unknown-layout", f"{root}: more than {_MAX_SIDE_FILES} files", hint="name the checkpoint itself"
            )
    return tuple(side), tuple(ignored)


def _walk(root: Path, prefix: str = "") -> Iterator[str]:
    for entry in sorted(os.scandir(root / prefix), key=lambda e: e.name):
        relative = f"{prefix}{entry.name}"
        if entry.name.startswith("."):
            continue  # .git, .cache and our own working folders are not part of a checkpoint
        if entry.is_dir(follow_symlinks=False):
            yield from _walk(root, f"{relative}/")
        elif entry.is_file():
            yield relative
