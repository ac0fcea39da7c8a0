"""Independent training jobs in forked processes, one thread each.

Forked, as a data loader's workers are: a job sees the parent's modules and mapped recordings without copying them.
Results go through files that the job writes; only progress, errors and the end travel through the pipe.
"""

import contextlib
import os
import signal
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from multiprocessing import connection, get_all_start_methods, get_context
from typing import Any

import torch

from surgery.errors import ResourceError, SurgeryError

Tell = Callable[[str, Mapping[str, float]], None]
Job = Callable[[Tell], None]


def run_jobs(
    jobs: Sequence[Job],
    *,
    workers: int,
    may_fork: bool = True,
    report: Callable[[int, str, Mapping[str, float]], None] | None = None,
) -> None:
    """Run all jobs, at most `workers` at a time, each on one thread; returns when all are done.

    With one worker, or where forking is impossible or unsafe (an accelerator is in use), they run here one after the
    other, also on one thread where `may_fork`, so that results are the same bits. A job's own error is raised here and
    ends the others; a job that dies without one is a ResourceError. Interrupting the parent ends the jobs at once.
    """
    may_fork = may_fork and not torch.accelerator.is_available() and "fork" in get_all_start_methods()
    if may_fork and workers > 1 and len(jobs) > 1:
        _run_forked(jobs, workers, report)
        return
    threads = torch.get_num_threads()
    if may_fork:
        torch.set_num_threads(1)
    try:
        for index, job in enumerate(jobs):

            def tell(event: str, numbers: Mapping[str, float], index: int = index) -> None:
                if report is not None:
                    report(index, event, numbers)

            job(tell)
    finally:
        torch.set_num_threads(threads)


def _run_forked(
    jobs: Sequence[Job], workers: int, report: Callable[[int, str, Mapping[str, float]], None] | None
) -> None:
    context = get_context("fork")
    waiting = list(range(len(jobs)))
    running: dict[Any, tuple[int, Any]] = {}
    try:
        while waiting or running:
            while waiting and len(running) < workers:
                index = waiting.pop(0)
                receiver, sender = context.Pipe(duplex=False)
                process = context.Process(target=_child, args=(jobs[index], sender, os.getpid()), daemon=True)
                with warnings.catch_warnings():
                    # Python warns about forking beside other threads; the child uses none of them.
                    warnings.simplefilter("ignore", DeprecationWarning)
                    process.start()
                sender.close()
                running[receiver] = (index, process)
            ended_or_telling: list[Any] = list(connection.wait(list(running)))
            for ready in ended_or_telling:
                index, process = running[ready]
                try:
                    kind, *payload = ready.recv()
                except (EOFError, OSError) as error:
                    process.join()
                    raise ResourceError(
                        "worker-died",
                        f"a training process ended without a word, exit status {process.exitcode}",
                        hint="it may have run out of memory: use fewer workers or a smaller batch",
                    ) from error
                if kind == "progress":
                    if report is not None:
                        report(index, *payload)
                elif kind == "error":
                    raise payload[0]
                else:
                    process.join()
                    ready.close()
                    del running[ready]
    finally:
        for _, process in running.values():
            process.kill()
        for receiver, (_, process) in running.items():
            process.join()
            receiver.close()


def _child(job: Job, sender: Any, parent: int) -> None:
    # Ctrl-C reaches the whole process group; the parent alone acts on it, and kills what runs.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _die_with_parent()
    torch.set_num_threads(1)

    def tell(event: str, numbers: Mapping[str, float]) -> None:
        if os.getppid() != parent:
            os._exit(1)  # the parent was killed and cannot end us any more
        sender.send(("progress", event, dict(numbers)))

    try:
        job(tell)
        sender.send(("done",))
    except SurgeryError as error:
        sender.send(("error", error))
    except BaseException:
        with contextlib.suppress(OSError):
            sender.send(("error", RuntimeError("a training process failed:\n" + traceback.format_exc())))


def _die_with_parent() -> None:
    """Ask Linux to kill this process when its parent is gone, however that happened; elsewhere `tell` notices later."""
    import ctypes
    import sys

    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # 1 is PR_SET_PDEATHSIG
