"""The engine of one machine: threads that take work in order as long as it fits the memory budget.

An engine is a callable with the signature of `run_jobs`. It carries out every job once, in any order and anywhere, and
calls `finished` in the calling thread; results do not depend on the engine or the number of workers.
"""

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from queue import SimpleQueue
from typing import Protocol

from surgery.graph.engine.budget import return_freed_memory
from surgery.graph.engine.work import Job, Resources, Unit, carry_out, uses_torch

Finished = Callable[[Job, dict[str, str]], None]
_Told = tuple[Job, dict[str, str], BaseException | None]
_FEW = 4
_SMALL = 64 << 10  # bytes
_LARGE = 1 << 20  # bytes; while some of these go to disk, more of them may be made
_LAG = 256 << 20  # bytes that may be done and not yet told of


class Engine(Protocol):
    """What carries out jobs. On an error or an interrupt it admits nothing more, lets what runs come to its end, tells
    of it by `finished`, and raises."""

    def __call__(self, jobs: Sequence[Job], finished: Finished, *, resources: Resources) -> None: ...


def run_jobs(jobs: Sequence[Job], finished: Finished, *, resources: Resources) -> None:
    """Carry out `jobs` in their order, large ones first. A job starts when its peak fits what is left of the budget, or
    when nothing else runs: one that is larger than the whole budget runs alone."""
    if not jobs:
        return
    workers = min(max(1, resources.workers), len(jobs))
    state = _State(_large_first(jobs, workers), resources)
    threads = [threading.Thread(target=state.work, name=f"worker-{n}", daemon=True) for n in range(workers)]
    with _computing(resources.threads, needed=any(map(uses_torch, jobs))):
        for thread in threads:
            thread.start()
        waiting = len(jobs)
        failure: BaseException | None = None
        told: deque[_Told] = deque()
        try:
            while waiting and failure is None:
                told.extend(state.take())
                while told:
                    job, result, fault = told.popleft()
                    waiting -= 1
                    failure = failure or fault
                    if fault is None:
                        finished(job, result)
        except BaseException as err:
            failure = err
        if failure is not None:
            state.stop()
            for thread in threads:
                thread.join()
            for job, result, fault in (*told, *state.rest()):
                if fault is None:
                    finished(job, result)
            raise failure
        for thread in threads:
            thread.join()


def _large_first(jobs: Sequence[Job], workers: int) -> Sequence[Job]:
    """A tensor that takes long to make (embeddings, a head at the end of the file) must not be the last that starts,
    or the other workers stand by; all else stays in the order of the files."""
    if workers == 1:
        return jobs
    limit = max(_LARGE, sum(job.nbytes for job in jobs) / (8 * workers))
    return sorted(jobs, key=lambda job: not (isinstance(job, Unit) and job.nbytes > limit))


class _State:
    """What the workers share."""

    def __init__(self, jobs: Sequence[Job], resources: Resources) -> None:
        self._pending = deque(jobs)
        self._budget, self._pickles = resources.budget, resources.pickles
        self._used = self._running = self._untold = self._untold_bytes = 0
        self._workers = max(1, resources.workers)
        self._turn = threading.Condition()
        self._results: SimpleQueue[_Told] = SimpleQueue()

    def take(self) -> list[_Told]:
        """What has come to an end, at least one."""
        told = [self._results.get(), *self.rest()]
        with self._turn:
            self._untold -= len(told)
            self._untold_bytes -= sum(job.nbytes for job, _, _ in told)
            self._turn.notify_all()
        return told

    def rest(self) -> list[_Told]:
        """What has come to an end by now."""
        return [self._results.get_nowait() for _ in range(self._results.qsize())]

    def stop(self) -> None:
        """Admit nothing more."""
        with self._turn:
            self._pending.clear()
            self._turn.notify_all()

    def work(self) -> None:
        """A worker's life: wait for room, carry out, tell."""
        while True:
            with self._turn:
                while self._pending and not self._may_start(self._pending[0].peak):
                    self._turn.wait()
                if not self._pending:
                    return
                batch, peak = self._next()
                self._used += peak
                self._running += 1
                self._untold += len(batch)
                self._untold_bytes += sum(job.nbytes for job in batch)
            for job in batch:
                try:
                    self._results.put((job, carry_out(job, self._pickles), None))
                except BaseException as err:
                    self._results.put((job, {}, err))
                    break
            with self._turn:
                self._used -= peak
                self._running -= 1
                self._turn.notify_all()

    def _next(self) -> tuple[list[Job], int]:
        """The next job, or a few small ones to be done one after the other: taking turns costs more than they do."""
        batch = [self._pending.popleft()]
        peak = batch[0].peak
        while self._pending and len(batch) < _FEW and max(peak, self._pending[0].peak) <= _SMALL:
            batch.append(self._pending.popleft())
            peak = max(peak, batch[-1].peak)
        return batch, peak

    def _may_start(self, peak: int) -> bool:
        large = _LARGE * self._untold <= self._untold_bytes < _LAG
        if self._untold >= 2 * self._workers and not large:
            return False  # a crash must not cost more than a few tensors that nobody has noted yet
        return self._running == 0 or self._budget is None or self._used + peak <= self._budget


@contextmanager
def _computing(threads: int, *, needed: bool) -> Iterator[None]:
    """Each computation has the same number of threads whatever the number of workers: sums depend on it."""
    if not needed:
        yield
        return
    import torch

    return_freed_memory()
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
