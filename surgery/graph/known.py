"""What a run knows of the files that it reads: digests of their tensors, and that nobody changed them meanwhile."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from surgery.errors import CheckpointError
from surgery.store import digests
from surgery.store.checkpoint import Checkpoint
from surgery.store.tensors import TensorRef

Digests = Mapping[str, Mapping[str, str]]  # sha256 by file and name of the tensor


@dataclass(frozen=True)
class Known:
    """`sure` digests were made from the bytes; `claimed` ones are what records say, which is good enough to be said
    again, and for nothing else."""

    sure: dict[str, dict[str, str]]
    claimed: Digests

    def of(self, ref: TensorRef) -> str | None:
        """The digest of a tensor, whoever says so."""
        return self.sure.get(ref.file, {}).get(ref.name) or self.claimed.get(ref.file, {}).get(ref.name)

    def is_claimed(self, ref: TensorRef) -> bool:
        """Whether nobody hashed it here."""
        return ref.name in self.claimed.get(ref.file, {})


def known_digests(checkpoints: Iterable[Checkpoint], *, hashing: bool) -> Known:
    """The digests of the parents' tensors; with `hashing` every one is there, and made where it has to be."""
    sure: dict[str, dict[str, str]] = {}
    claimed: dict[str, dict[str, str]] = {}
    for checkpoint in checkpoints:
        shas = checkpoint.tensor_digests if hashing else checkpoint.unhashed.known
        told = {} if hashing else checkpoint.unhashed.claimed
        for full_name, ref in checkpoint.tensors.items():
            if full_name in shas:
                sure.setdefault(ref.file, {})[ref.name] = shas[full_name]
            elif full_name in told:
                claimed.setdefault(ref.file, {})[ref.name] = told[full_name]
    return Known(sure, claimed)


def identities(checkpoints: Iterable[Checkpoint]) -> dict[str, tuple[int, int, int, int]]:
    """What the weight files are known by. Raises `CheckpointError`."""
    try:
        return {file: digests.identity(file) for c in checkpoints for p in c.parts.values() for file in p.files}
    except OSError as err:
        raise CheckpointError(
            "unreadable", f"{err.filename}: {err.strerror}", hint="it was there a moment ago"
        ) from None


def check_unchanged(before: Mapping[str, tuple[int, int, int, int]]) -> None:
    """Refuse to publish what was made from a file that somebody changed meanwhile."""
    for file, identity in before.items():
        try:
            same = digests.identity(file) == identity
        except OSError:
            same = False
        if not same:
            raise CheckpointError(
                "changed-parent", f"{file}: changed while it was read", hint="run the command again, without --resume"
            )
