"""What every test gets: no network, caches and settings in a temporary folder, and small checkpoints made once."""

import inspect
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import pytest

_UNSET = ("HF_HUB_OFFLINE", "HF_HUB_CACHE", "HF_TOKEN", "HF_ENDPOINT", "SURGERY_DEBUG", "NO_COLOR", "SURGERY_PLUGINS")


def _block_network(event: str, args: tuple) -> None:
    """Audit hook: whatever opens a connection or looks a name up, and is not local, fails as if unplugged."""
    local = ("127.0.0.1", "::1", "localhost", None, "")
    if event == "socket.connect" and isinstance(args[1], tuple) and args[1][0] not in local:
        raise OSError("the network is blocked in tests")
    if event == "socket.getaddrinfo" and args[0] not in local:
        raise OSError("the network is blocked in tests")


def pytest_configure(config: pytest.Config) -> None:
    """Set the scene before any test module imports a library that reads the environment."""
    home = Path(tempfile.mkdtemp(prefix="surgery-tests-"))
    config.stash[_HOME] = home
    for name in _UNSET:
        os.environ.pop(name, None)
    os.environ["SURGERY_CACHE"] = str(home / "cache")
    os.environ["XDG_CACHE_HOME"] = str(home / "xdg-cache")
    os.environ["XDG_CONFIG_HOME"] = str(home / "xdg-config")
    os.environ["HF_HOME"] = str(home / "huggingface")
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    # Commands that tests start get the same hook: Python imports sitecustomize by itself.
    (home / "site").mkdir()
    source = f"import sys\n\n{inspect.getsource(_block_network)}\nsys.addaudithook(_block_network)\n"
    (home / "site" / "sitecustomize.py").write_text(source)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(home / "site"), os.environ.get("PYTHONPATH", "")]))
    sys.addaudithook(_block_network)


def pytest_unconfigure(config: pytest.Config) -> None:
    """Remove what `pytest_configure` made."""
    shutil.rmtree(config.stash[_HOME], ignore_errors=True)


_HOME = pytest.StashKey[Path]()


class Ended(NamedTuple):
    """How a command ended."""

    stdout: str
    stderr: str
    code: int


@pytest.fixture
def surgery(tmp_path: Path) -> Callable[..., Ended]:
    """Runs `python -m surgery ARGS` as a process of its own, in `tmp_path` unless `cwd` says otherwise."""

    def run(*args: str | Path, cwd: Path = tmp_path, env: Mapping[str, str] | None = None, stdin: str = "") -> Ended:
        ended = subprocess.run(
            [sys.executable, "-m", "surgery", *map(str, args)],
            cwd=cwd,
            env={**os.environ, **(env or {})},
            input=os.fsencode(stdin),
            capture_output=True,
            timeout=300,
        )
        return Ended(ended.stdout.decode("utf-8", "surrogateescape"), ended.stderr.decode(), ended.returncode)

    return run


@pytest.fixture
def command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Iterator[Callable[..., Ended]]:
    """As `surgery`, but inside the test's process: much faster, for whatever needs no process of its own."""
    from surgery.cli import output
    from surgery.cli.main import main

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.chdir(tmp_path)

    def run(*args: str | Path) -> Ended:
        monkeypatch.setattr(sys, "argv", ["surgery", *map(str, args)])
        output.Talk.quiet = output.Talk.verbose = False
        code: int | str | None = None
        try:
            main()
        except SystemExit as ended:
            code = ended.code
        captured = capfd.readouterr()
        return Ended(captured.out, captured.err, int(code or 0))

    yield run
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache: what another test made is not found, and digests are known of this one's work alone."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("SURGERY_CACHE", str(folder))
    return folder


@pytest.fixture
def one_thread() -> Iterator[None]:
    """torch computes with one thread, so that sums are made in one order."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tiny_dit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A diffusion transformer for 8×8 digits with random weights (585 thousand parameters). Read only."""
    from surgery.graph.run import run_op
    from surgery.ops.init import Init

    return run_op(Init("dit-digits"), [], tmp_path_factory.mktemp("dit") / "tiny").path


@pytest.fixture(scope="session")
def tiny_pipeline(tiny_dit: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A diffusers pipeline folder around `tiny_dit`, with a stand-in for the VAE's weights. Read only."""
    import torch
    from safetensors.torch import save_file

    root = tmp_path_factory.mktemp("pipeline") / "pipe"
    for part in ("transformer", "scheduler", "vae"):
        (root / part).mkdir(parents=True)
    for name in ("config.json", "diffusion_pytorch_model.safetensors"):
        shutil.copy(tiny_dit / name, root / "transformer")
    shutil.copy(tiny_dit / "scheduler_config.json", root / "scheduler")
    (root / "vae" / "config.json").write_text('{"_class_name": "AutoencoderKL"}\n')
    weights = {f"decoder.{i}.weight": torch.arange(6, dtype=torch.float32).reshape(2, 3) + i for i in range(3)}
    save_file(weights, root / "vae" / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    index = {
        "_class_name": "DiTPipeline",
        "_diffusers_version": "0.36.0",
        "id2label": {"0": "zero"},
        "scheduler": ["diffusers", "DDIMScheduler"],
        "transformer": ["diffusers", "DiTTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (root / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    return root


@pytest.fixture(scope="session")
def sharded(tiny_dit: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tiny_dit` in three shards with an index, as the hub's tools write it. Read only."""
    from safetensors.torch import load_file, save_file

    root = tmp_path_factory.mktemp("sharded") / "shards"
    root.mkdir()
    for name in ("config.json", "scheduler_config.json"):
        shutil.copy(tiny_dit / name, root)
    tensors = load_file(tiny_dit / "diffusion_pytorch_model.safetensors")
    names = sorted(tensors)
    weight_map: dict[str, str] = {}
    for number in range(3):
        file = f"diffusion_pytorch_model-{number + 1:05d}-of-00003.safetensors"
        chosen = {name: tensors[name] for name in names[number::3]}
        save_file(chosen, root / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(chosen, file)
    size = sum(t.numel() * t.element_size() for t in tensors.values())
    document = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (root / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(document, indent=2))
    return root


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LlamaForCausalLM of four layers with random weights and a character tokenizer. Read only."""
    from tiny_language import save_llama

    return save_llama(tmp_path_factory.mktemp("llama") / "llm", seed=1)


@pytest.fixture(scope="session")
def tiny_llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LlavaForConditionalGeneration with a tower like `tiny_llama`, with processor and chat template. Read only."""
    from tiny_language import save_llava

    return save_llava(tmp_path_factory.mktemp("llava") / "vlm")
