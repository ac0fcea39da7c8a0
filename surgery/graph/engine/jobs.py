"""From planned files to jobs: ranges that move as they are, in batches, and tensors that are made one by one."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from surgery.graph.engine.work import Copy, Job, Joined, Made, Source, Unit, is_range, peak_of, place_of
from surgery.graph.op import Entry
from surgery.graph.shards import Shard
from surgery.store.tensors import TensorRef
from surgery.store.writer import PlannedFile

_BATCH = 256 << 20  # bytes that one job moves, so that a killed run loses little
_BATCH_TENSORS = 4096
_WHOLE = 1 << 30  # an untouched file up to this size moves at once, which a file system may do without copying

Owner = tuple[PlannedFile, Entry]


@dataclass(frozen=True)
class Jobs:
    """The work, in the order in which it reads; `owners` are the output tensors of each job, `trained` what is in
    memory already: the trainer's results, and what the plan gives."""

    jobs: tuple[Job, ...]
    owners: Mapping[int, tuple[Owner, ...]]
    trained: tuple[Owner, ...]


def plan_jobs(
    shards: Iterable[Shard],
    sources: Mapping[str, Source | None],
    folder: str,
    done: Mapping[str, str | None],
    *,
    hashing: bool = True,
) -> Jobs:
    """Jobs for every tensor that is not in `done` ("file\\0tensor"). `sources` are by full name; files lie in
    `folder`. A tensor that stands in several places is made once. Without `hashing` no job digests anything."""
    jobs: list[Job] = []
    owners: dict[int, tuple[Owner, ...]] = {}
    made: dict[int, list[Owner]] = {}
    trained: list[Owner] = []
    for shard in shards:
        moved: list[tuple[Entry, Source]] = []
        for entry in shard.entries:
            if f"{shard.file.relative}\0{entry.name}" in done:
                continue
            source = sources[entry.full_name]
            if source is None:
                trained.append((shard.file, entry))
            elif is_range(source):
                moved.append((entry, source))
            elif isinstance(source, Made):
                made.setdefault(id(source), []).append((shard.file, entry))
            else:
                unit = _unit(source, [(shard.file, entry)], folder, hashing)
                jobs.append(unit)
                owners[id(unit)] = ((shard.file, entry),)
        whole = bool(moved) and len(moved) == len(shard.entries) and shard.file.size <= _WHOLE
        for copy, entries in _copies(shard.file, moved, folder, whole=whole, hashing=hashing):
            jobs.append(copy)
            owners[id(copy)] = tuple((shard.file, e) for e in entries)
    for places in made.values():
        source = sources[places[0][1].full_name]
        assert source is not None
        unit = _unit(source, places, folder, hashing)
        jobs.append(unit)
        owners[id(unit)] = tuple(places)
    return Jobs(tuple(sorted(jobs, key=lambda job: job.place)), owners, tuple(trained))


def _unit(source: Source, places: Sequence[Owner], folder: str, hashing: bool) -> Unit:
    file, entry = places[0]
    return Unit(
        name=entry.full_name,
        source=source,
        dtype=entry.dtype,
        shape=entry.shape,
        nbytes=file.places[entry.name][1],
        targets=tuple((f"{folder}/{f.relative}", f.places[e.name][0]) for f, e in places),
        peak=peak_of(source),
        place=place_of(source),
        hashed=hashing,
    )


def _copies(
    file: PlannedFile, moved: list[tuple[Entry, Source]], folder: str, *, whole: bool, hashing: bool
) -> Iterable[tuple[Copy, list[Entry]]]:
    """Range copies of one file in batches, neighbours in source and target joined into one range."""
    spans: list[list[int]] = []  # [index of the source file, source start, target start, count]
    names: list[str] = []
    numbers: dict[str, int] = {}
    hashed: list[tuple[str, Joined]] = []
    entries: list[Entry] = []
    size = 0

    def batch() -> tuple[Copy, list[Entry]]:
        if whole and len(spans) == 1 and spans[0][1] == spans[0][2] and file.taken_from == names[spans[0][0]]:
            spans[0][1:] = [0, 0, file.size]  # its header too: a copy of the whole file
        ranges = tuple((names[n], begin, at, count) for n, begin, at, count in spans)
        place = (ranges[0][0], ranges[0][1]) if ranges else ("", 0)
        return Copy(entries[0].full_name, f"{folder}/{file.relative}", ranges, tuple(hashed), place=place), entries

    for entry, source in sorted(moved, key=lambda pair: file.places[pair[0].name][0]):
        if entries and not whole and (size >= _BATCH or len(entries) >= _BATCH_TENSORS):
            yield batch()
            spans, hashed, entries, size = [], [], [], 0
        at, count = file.places[entry.name]
        size += count
        entries.append(entry)
        if isinstance(source, Joined):
            if hashing:
                hashed.append((entry.full_name, source))
            pieces = source.pieces
        else:
            pieces = ((source, 0, count),)
        for ref, start, stop in pieces:
            assert isinstance(ref, TensorRef)
            number = numbers.get(ref.file)
            if number is None:
                number = numbers[ref.file] = len(names)
                names.append(ref.file)
            begin, length = ref.offset + start, stop - start
            last = spans[-1] if spans else None
            if last and last[0] == number and last[1] + last[3] == begin and last[2] + last[3] == at:
                last[3] += length
            elif length:
                spans.append([number, begin, at, length])
            at += length
    if entries:
        yield batch()
