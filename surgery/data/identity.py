"""What identifies training data, without decoding it: the digest that enters the key of whatever is trained on it."""

from pathlib import Path

from surgery.errors import CheckpointError, UsageError, closest
from surgery.store import digests

KINDS = ("digits", "fashion", "folder", "npz", "latents")
"""digits and fashion stand alone; the others are followed by :PATH."""

PICTURES = (".png", ".jpg", ".jpeg")


def split_spec(spec: str) -> tuple[str, Path | None]:
    """ "npz:x.npz" as ("npz", Path("x.npz")). Raises UsageError for an unknown kind, a missing or a useless path, and a
    path that does not lead to a file, or for `folder` to a folder."""
    kind, _, path = spec.partition(":")
    if kind not in KINDS:
        raise UsageError("bad-data", f"no image data is called {spec!r}", hint=closest(kind, list(KINDS)))
    if (kind in ("digits", "fashion")) == bool(path):
        example = f"{kind}:PATH" if not path else kind
        raise UsageError("bad-data", f"{spec!r} is not a complete name of image data", hint=f"write {example}")
    if not path:
        return kind, None
    try:
        where = Path(path).expanduser()
        found = where.exists()
    except (OSError, RuntimeError):  # too long, not to be read, of a user that there is not
        where, found = Path(path), False
    if not found:
        raise UsageError("no-data", f"{path} does not exist", hint="check the path after the colon")
    if where.is_dir() != (kind == "folder"):
        wanted = "a folder" if kind == "folder" else "a file"
        raise UsageError("no-data", f"{path} is not {wanted}, as {kind}: needs", hint="check the word before the colon")
    return kind, where


def picture_files(where: Path) -> dict[str, list[Path]]:
    """The PNG and JPEG files of each class, by the name of its sub-folder: what `folder:` reads, in that order.

    Raises CheckpointError for a folder without classes, a class without pictures, and what may not be read.
    """
    try:
        classes = sorted(p for p in where.iterdir() if p.is_dir() and not p.name.startswith("."))
        found = {
            folder.name: sorted(p for p in folder.iterdir() if p.suffix.lower() in PICTURES and p.is_file())
            for folder in classes
        }
    except OSError as err:
        raise CheckpointError(
            "unreadable", f"{err.filename or where}: {err.strerror}", hint="check the path and its rights"
        ) from None
    if not found:
        raise CheckpointError(
            "no-classes",
            f"{where} has no sub-folders: one per class is expected",
            hint="put each class in a sub-folder",
        )
    for name, files in found.items():
        if not files:
            raise CheckpointError(
                "empty-class", f"{where / name} holds no PNG or JPEG file", hint="remove the folder or fill it"
            )
    return found


def data_digest(spec: str) -> str:
    """Digest of the data that `spec` names: of the file, of a folder's pictures and their classes, or of the name of a
    set that never changes. Raises UsageError for a bad `spec`, CheckpointError for what cannot be read."""
    kind, where = split_spec(spec)
    if where is None:
        return digests.canonical_digest([kind])
    try:
        if kind != "folder":
            return digests.file_digest(where)
        rows = [[name, p.name, digests.file_digest(p)] for name, files in picture_files(where).items() for p in files]
    except OSError as err:
        raise CheckpointError(
            "unreadable", f"{err.filename or where}: {err.strerror}", hint="check the path and its rights"
        ) from None
    return digests.canonical_digest(rows)
