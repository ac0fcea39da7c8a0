"""One cluster for all tests of this folder; its workers see the plug-ins that are put into `plugins`."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

HERE = Path(__file__).resolve().parent


class Shop(NamedTuple):
    """The address of the cluster, and the environment in which commands find it and the plug-in."""

    address: str
    environment: dict[str, str]


@pytest.fixture(scope="session")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shop]:
    """A running cluster of two workers with one processor each."""
    pytest.importorskip("ray", reason="the extra ray is not installed")
    plugins = tmp_path_factory.mktemp("plugins")
    (plugins / "killed_once.py").write_text((HERE / "killed_once.py").read_text())
    metadata = plugins / "killed_once-0.1.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: killed-once\nVersion: 0.1\n")
    (metadata / "entry_points.txt").write_text("[surgery.ops]\nkilled-once = killed_once:KilledOnce\n")
    # The hook that blocks the network is left out: the parts of a cluster talk over this machine's own address.
    environment = {**os.environ, "PYTHONPATH": str(plugins), "SURGERY_PLUGINS": "killed-once"}
    command = [sys.executable, str(HERE / "two_workers.py")]
    log = (plugins / "cluster.log").open("w+")
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, env=environment
    ) as cluster:
        assert cluster.stdin is not None and cluster.stdout is not None
        address = cluster.stdout.readline().strip()
        log.seek(0)
        assert ":" in address, log.read()[-2000:]
        yield Shop(address, {**environment, "RAY_ADDRESS": address})
        cluster.stdin.close()


@pytest.fixture()
def on_cluster(shop: Shop, tmp_path: Path) -> Callable[..., "subprocess.CompletedProcess[str]"]:
    """Run a command line in a folder of its own, where the cluster is the one that --engine ray finds."""

    def run(*words: str, ok: bool = True, **more: str) -> "subprocess.CompletedProcess[str]":
        ended = subprocess.run(
            [sys.executable, "-m", "surgery", *words],
            cwd=tmp_path,
            env={**shop.environment, **more},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert not ok or ended.returncode == 0, ended.stderr[-2000:]
        return ended

    return run
