"""The engine of several machines: the same jobs as Ray tasks, each placed by the processors, GPUs and memory it needs.

No tensor travels: a task holds names of files and ranges, reads and writes them on a file system that all machines
share, and answers with digests. A worker that dies takes nothing with it but its task, which another does again: a job
writes the same bytes to the same place however often it is done. ray is imported when an engine is made.
"""

import os
import secrets
import socket
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import Any

from surgery import __version__
from surgery.errors import ResourceError, SurgeryError, UsageError, closest, printable
from surgery.graph.engine.local import Engine, Finished, run_jobs
from surgery.graph.engine.work import Job, Resources, Unit, carry_out, leaves, uses_torch

RETRIES = 3  # of a task whose worker died
_AHEAD = 4  # tasks handed over for each processor: enough that none waits, few enough that an interrupt ends soon
_SMALL = 4 << 20  # bytes; jobs up to this peak share a task, since handing one over costs a millisecond
_FEW = 64


class Cluster:
    """An engine (see `engine.local.Engine`) on the Ray cluster at `address`; "auto" is the one of this machine.

    `gpus` is what each job holds of a GPU's time, for operations that compute on one. Raises `ResourceError` where ray
    is not installed, no cluster answers, or its machines have other versions than this one.
    """

    def __init__(self, address: str = "auto", *, gpus: float = 0.0) -> None:
        try:
            import ray
        except ImportError:
            raise ResourceError(
                "no-ray", "--engine ray needs the package ray", hint="pip install 'surgery[ray]'"
            ) from None
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        if not ray.is_initialized():
            try:
                _knock(address)
                ray.init(address=address, log_to_driver=False, configure_logging=False)
            except (OSError, ValueError, RuntimeError) as err:
                first = printable(str(err).strip().split("\n")[0])
                hint = "start one: ray start --head, and on other machines ray start --address HOST:6379"
                raise ResourceError("no-cluster", f"no Ray cluster at {address}: {first}", hint=hint) from None
        self._ray: Any = ray
        self._gpus = gpus
        self._alike: set[str] = set()

    def __call__(self, jobs: Sequence[Job], finished: Finished, *, resources: Resources) -> None:
        """Carry out `jobs` on the cluster. What only this process holds, tensors of pickles, is done here."""
        here = [job for job in jobs if _held_here(job)]
        there = [job for job in jobs if not _held_here(job)]
        if there:
            self._check_nodes([path for job in there for path in _folders(job)])
        try:
            self._run(there, finished, resources)
        except self._ray.exceptions.RayError as err:
            raise _lost(err) from None
        run_jobs(here, finished, resources=resources)

    def start(self, work: Callable[..., Any], *args: Any, processors: int, memory: int, environment: Any) -> Any:
        """Hand over a whole step, as `work(*args)`; returns what `wait` and `result` take."""
        task = self._ray.remote(_whole).options(
            num_cpus=min(processors, self._largest("CPU", 1)),
            num_gpus=self._gpus,
            memory=min(memory, self._largest("memory", memory)),
            max_retries=RETRIES,
        )
        return task.remote(os.getcwd(), environment, work, args)

    def wait(self, handles: Sequence[Any], *, at_once: bool = False) -> list[Any]:
        """Those that have come to an end: at least one, unless the answer is wanted `at_once`."""
        every = {"num_returns": len(handles), "timeout": 0} if at_once else {"num_returns": 1}
        done, _ = self._ray.wait(list(handles), **every)
        return list(done)

    def result(self, handle: Any) -> Any:
        """What a step returned, or its error."""
        try:
            value, fault = self._ray.get(handle)
        except self._ray.exceptions.RayError as err:
            raise _lost(err) from None
        if fault is not None:
            raise fault
        return value

    def check(self, paths: Sequence[Path]) -> None:
        """Refuse a cluster one of whose machines has other versions, or does not see what is to be read or written."""
        self._check_nodes([str(p) for p in paths])

    def cancel(self, handles: Sequence[Any]) -> None:
        """Stop steps that are still at work."""
        for handle in handles:
            self._ray.cancel(handle, force=True)

    def _run(self, jobs: Sequence[Job], finished: Finished, resources: Resources) -> None:
        ray = self._ray
        most = self._largest("memory", 0)
        task = ray.remote(_several)
        processors = int(ray.cluster_resources().get("CPU", 1))
        limit = max(2, _AHEAD * max(1, processors // max(1, resources.threads)))
        waiting = deque(_batches(jobs))
        running: dict[Any, list[Job]] = {}
        failure: BaseException | None = None
        try:
            while running or (waiting and failure is None):
                while waiting and failure is None and len(running) < limit:
                    batch = waiting.popleft()
                    need = max(job.peak for job in batch)
                    options = task.options(
                        num_cpus=min(resources.threads, self._largest("CPU", 1)),
                        num_gpus=self._gpus,
                        memory=min(need, most) or None,
                        max_retries=RETRIES,
                    )
                    running[options.remote(os.getcwd(), resources.threads, batch)] = batch
                for handle in ray.wait(list(running), num_returns=1)[0]:
                    batch = running.pop(handle)
                    results, fault = ray.get(handle)
                    for job, result in zip(batch, results, strict=False):
                        finished(job, result)
                    failure = failure or fault
        except BaseException:
            self.cancel(list(running))
            raise
        if failure is not None:
            raise failure

    def _largest(self, resource: str, default: int) -> int:
        """The most of a resource that one machine of the cluster has."""
        found = [int(n["Resources"].get(resource, 0)) for n in self._ray.nodes() if n["Alive"]]
        return max([n for n in found if n > 0], default=default)

    def _check_nodes(self, paths: Sequence[str]) -> None:
        """Every machine has our versions and sees the files of the work: probed once for each folder."""
        folders = sorted({os.path.dirname(os.path.abspath(p)) for p in paths} - self._alike)
        if not folders:
            return
        ray = self._ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        with _marked(folders) as marks:
            probes = {}
            for node in ray.nodes():
                if node["Alive"] and node["Resources"].get("CPU", 0) > 0:
                    strategy = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
                    task = ray.remote(_probe).options(num_cpus=0, scheduling_strategy=strategy)
                    probes[node["NodeManagerHostname"] or node["NodeID"]] = task.remote(marks)
            for host, probe in probes.items():
                versions, unseen = ray.get(probe)
                other = {n: v for n, v in versions.items() if v != _versions()[n]}
                if other:
                    words = ", ".join(f"{n} {v or 'missing'} (here {_versions()[n]})" for n, v in other.items())
                    raise ResourceError(
                        "other-versions",
                        f"{host}: {words}",
                        hint="install the same on every machine: bytes depend on it",
                    )
                if unseen:
                    raise ResourceError(
                        "not-shared",
                        f"{host} does not see {unseen[0]}",
                        hint="work on a file system that all machines share",
                    )
        self._alike.update(folders)


def _knock(address: str) -> None:
    """Raise OSError where nothing listens at HOST:PORT: ray itself would try for minutes."""
    host, sign, port = address.rpartition(":")
    if sign and port.isdecimal() and "/" not in host:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()


def engine_named(name: str, *, device: str = "cpu") -> Engine:
    """The engine that users call `name`: "local", or "ray" for the cluster of RAY_ADDRESS, else of this machine."""
    if name == "local":
        return run_jobs
    if name != "ray":
        raise UsageError("engine", f"--engine {printable(name)}: unknown", hint=closest(name, ["local", "ray"]))
    return Cluster(os.environ.get("RAY_ADDRESS", "auto"), gpus=0.0 if device == "cpu" else 1.0)


def _batches(jobs: Sequence[Job]) -> Iterator[list[Job]]:
    """Jobs in their order; neighbours that are small go together."""
    batch: list[Job] = []
    for job in jobs:
        small = job.peak <= _SMALL and isinstance(job, Unit)
        if batch and (not small or len(batch) >= _FEW):
            yield batch
            batch = []
        batch.append(job)
        if not small:
            yield batch
            batch = []
    if batch:
        yield batch


def _held_here(job: Job) -> bool:
    return isinstance(job, Unit) and any(ref.offset < 0 for ref in leaves(job.source))


def _folders(job: Job) -> list[str]:
    """Files whose folders the job needs to see."""
    if isinstance(job, Unit):
        return [*(path for path, _ in job.targets), *(ref.file for ref in leaves(job.source))]
    return [job.target, *(span[0] for span in job.spans)]


@contextmanager
def _marked(folders: Sequence[str]) -> Iterator[dict[str, str]]:
    """A token to be looked for: a file of its own where we may write, else the size of what lies there."""
    token = secrets.token_hex(8)
    marks = {}
    try:
        for folder in folders:
            path = os.path.join(folder, f".surgery-probe-{token}")
            try:
                Path(path).touch(exist_ok=False)
                marks[folder] = path
            except OSError:
                marks[folder] = folder
        yield marks
    finally:
        for folder, path in marks.items():
            if path != folder:
                Path(path).unlink(missing_ok=True)


def _versions() -> dict[str, str]:
    found = {"surgery": __version__}
    for package in ("torch",):
        try:
            found[package] = installed_version(package)
        except PackageNotFoundError:
            found[package] = ""
    return found


def _probe(marks: Mapping[str, str]) -> tuple[dict[str, str], list[str]]:
    """On a worker: its versions, and the folders that it does not see."""
    return _versions(), [folder for folder, path in marks.items() if not os.path.exists(path)]


def _several(folder: str, threads: int, jobs: Sequence[Job]) -> tuple[list[dict[str, str]], BaseException | None]:
    """On a worker: carry out jobs one after the other; returns what was done, and the error that ended it."""
    results: list[dict[str, str]] = []
    try:
        os.chdir(folder)
        if any(map(uses_torch, jobs)):
            import torch

            torch.set_num_threads(threads)
        for job in jobs:
            results.append(carry_out(job, {}))
    except (SurgeryError, OSError) as err:
        return results, err
    except Exception as err:
        return results, _foreign(err)
    return results, None


def _whole(folder: str, environment: Mapping[str, str], work: Callable[..., Any], args: Sequence[Any]) -> Any:
    """On a worker: a whole step; returns its value, or its error."""
    try:
        os.chdir(folder)
        os.environ.update(environment)
        return work(*args), None
    except (SurgeryError, OSError) as err:
        return None, err
    except Exception as err:
        return None, _foreign(err)


def _foreign(err: Exception) -> SurgeryError:
    return SurgeryError(
        "failed", f"{type(err).__name__}: {printable(str(err))}", hint="run it with --engine local to see where"
    )


def _lost(err: Exception) -> ResourceError:
    """An error of the cluster itself, after its retries."""
    first = printable(str(err).strip().split("\n")[0] or type(err).__name__)
    return ResourceError(
        "worker-lost",
        f"the cluster gave up on a task after {RETRIES} more tries: {first}",
        hint="see ray status; --resume goes on with what is done",
    )
