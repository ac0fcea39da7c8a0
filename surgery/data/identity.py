"""What identifies training data, without decoding it: the digest that enters the key of whatever is trained on it."""

from pathlib import Path

from surgery.errors import UsageError, closest
from surgery.store import digests

KINDS = ("digits", "fashion", "folder", "npz", "latents")
"""digits and fashion stand alone; the others are followed by :PATH."""


def split_spec(spec: str) -> tuple[str, Path | None]:
    """ "npz:x.npz" as ("npz", Path("x.npz")). Raises UsageError for an unknown kind, a missing or a useless path."""
    kind, _, path = spec.partition(":")
    if kind not in KINDS:
        raise UsageError("bad-data", f"no image data is called {spec!r}", hint=closest(kind, list(KINDS)))
    if (kind in ("digits", "fashion")) == bool(path):
        example = f"{kind}:PATH" if not path else kind
        raise UsageError("bad-data", f"{spec!r} is not a complete name of image data", hint=f"write {example}")
    where = Path(path).expanduser() if path else None
    if where is not None and not where.exists():
        raise UsageError("no-data", f"{path} does not exist", hint="check the path after the colon")
    return kind, where


def data_digest(spec: str) -> str:
    """Digest of the data that `spec` names: of the file, of all files of a folder, or of the name of a set that never
    changes. Raises UsageError for a bad `spec`."""
    kind, where = split_spec(spec)
    if where is None:
        return digests.canonical_digest([kind])
    if where.is_file():
        return digests.file_digest(where)
    files = sorted(p for p in where.rglob("*") if p.is_file())
    return digests.canonical_digest([[str(p.relative_to(where)), digests.file_digest(p)] for p in files])
