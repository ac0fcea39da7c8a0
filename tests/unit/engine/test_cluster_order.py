"""In which order steps of a recipe go out to a cluster. The cluster here is one in name: it does a step
when it is asked for the result; the tests of `tests/cluster` have a real one."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from surgery.graph.engine.cluster import Cluster
from surgery.graph.engine.local import Finished, run_jobs
from surgery.graph.engine.work import Job, Resources
from surgery.graph.recipes.recipe_file import read_recipe
from surgery.graph.recipes.schedule import run_recipe
from surgery.graph.run import RunOptions
from surgery.ops.table import load_op
from surgery.store.names import open_named


class Late(Cluster):
    """Does what was handed over when a result is asked for, and keeps `events`: what was handed over, done here, done
    there."""

    def __init__(self, events: list[str]) -> None:
        self.events = events

    def __call__(self, jobs: Sequence[Job], finished: Finished, *, resources: Resources) -> None:
        self.events.append("work here")
        run_jobs(jobs, finished, resources=resources)

    def start(self, work: Callable[..., Any], *args: Any, processors: int, memory: int, environment: Any) -> Any:
        return lambda: work(*args)

    def wait(self, handles: Sequence[Any], *, at_once: bool = False) -> list[Any]:
        return [] if at_once else [handles[0]]

    def result(self, handle: Any) -> Any:
        self.events.append("result")
        return handle()

    def check(self, paths: Sequence[Path]) -> None:
        """Every machine is this one."""

    def cancel(self, handles: Sequence[Any]) -> None:
        assert handles == []


@pytest.fixture
def run(
    tmp_path: Path, tiny_dit: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[list[str], dict[str, str]]]:
    """Runs steps and outputs; returns the events, and digests by output."""
    monkeypatch.chdir(tmp_path)

    def run(steps: str, *outputs: str, cluster: bool = True) -> tuple[list[str], dict[str, str]]:
        monkeypatch.setenv("SURGERY_CACHE", str(tmp_path_factory.mktemp("cache")))
        places = ", ".join(f"{name}: {name}" for name in outputs)
        (tmp_path / "r.yaml").write_text(
            f"surgery: 1\ninputs: {{m: {tiny_dit}}}\nsteps:\n{steps}\noutputs: {{{places}}}\n"
        )
        events: list[str] = []
        results = run_recipe(
            read_recipe(tmp_path / "r.yaml"),
            load_op,
            open_named,
            tmp_path_factory.mktemp("out") / "o",
            options=RunOptions(),
            notice=lambda step, plan: events.append(step.name),
            engine=Late(events) if cluster else run_jobs,
        )
        return events, {name: result.record["digest"] for name, result in results.items()}

    return run


# `deep` is made on the way, so `half` is done here; `other` waits for nobody.
STEPS = """  deep: {op: slice, from: m, with: {layers: '0-1,0-3'}}
  half: {op: cast, from: deep, with: {dtype: bf16}}
  other: {op: cast, from: m, with: {dtype: fp16}}
  more: {op: scale, from: other, with: {by: 2, only: ['*attn1*']}, cache: true}
  last: {op: cast, from: more, with: {dtype: fp32}}"""
OUTPUTS = ("half", "other", "last")


def test_a_step_that_is_done_here_holds_up_no_later_one(run: Callable[..., Any]) -> None:
    events, digests = run(STEPS, *OUTPUTS)
    assert events[:3] == ["other", "half", "work here"]
    assert digests == run(STEPS, *OUTPUTS, cluster=False)[1]


def test_a_step_that_is_alone_goes_out_tensor_by_tensor(run: Callable[..., Any]) -> None:
    events, _ = run(STEPS, "last")
    assert events == ["more", "work here", "last", "work here"]


def test_several_steps_go_out_together(run: Callable[..., Any]) -> None:
    several = "\n".join(f"  s{n}: {{op: scale, from: m, with: {{by: {n}, only: ['*norm*']}}}}" for n in (2, 3, 4))
    events, digests = run(several, "s2", "s3", "s4")
    assert events == ["s2", "s3", "s4", "result", "result", "result"] and len(set(digests.values())) == 3
