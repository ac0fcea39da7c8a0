"""Checkpoints that `surgery graft` writes, against their source byte by byte and against plain diffusers."""

import json
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from surgery.api import load
from surgery.arch.architectures import ARCHITECTURES
from surgery.arch.dit.build import build_model

Run = Callable[..., Any]
WEIGHTS = "diffusion_pytorch_model.safetensors"


def raw(folder: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Name -> dtype, shape and bytes of every tensor, read as the format is defined: length, header, data."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        content = file.read_bytes()
        (length,) = struct.unpack("<Q", content[:8])
        header = json.loads(content[8 : 8 + length])
        header.pop("__metadata__", None)
        for name, row in header.items():
            start, stop = (8 + length + at for at in row["data_offsets"])
            found[name] = (row["dtype"], tuple(row["shape"]), content[start:stop])
    return found


def answer(model: torch.nn.Module, channels: int = 1) -> torch.Tensor:
    """What a model makes of fixed noise, timesteps and classes, the null class among them."""
    config: Any = model.config
    side, null = config.sample_size, config.num_embeds_ada_norm
    x = torch.randn(3, config.in_channels, side, side, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        return model(x, timestep=torch.tensor([0, 500, 999]), class_labels=torch.tensor([0, 7, null])).sample


# --- warm starts of the command --------------------------------------------------------------------------------------


@pytest.mark.parametrize("layers", ["all", "50%", "0,5"])
def test_a_copied_self_graft_has_the_bytes_and_the_answers_of_the_original(
    command: Run, tmp_path: Path, layers: str
) -> None:
    from surgery.store.names import resolve

    assert command("graft", "-r", "attn=mha", "--init", "copy", "-l", layers, "dit-digits", "-o", "g").code == 0
    assert raw(tmp_path / "g") == raw(resolve("dit-digits").path)
    original, grafted = load("dit-digits"), load(tmp_path / "g")
    assert type(grafted).__name__ == "SurgeryDiTTransformer2DModel"
    assert torch.equal(answer(original), answer(grafted))


@pytest.mark.parametrize("replace", ["attn=swa:w=15", "attn=swa:w=400", "mlp=r6", "mlp=mlp:r=4.5"])
def test_a_copied_operator_that_can_be_the_original_is_to_rounding(command: Run, tmp_path: Path, replace: str) -> None:
    assert command("graft", "-r", replace, "--init", "copy", "-l", "all", "dit-digits", "-o", "g").code == 0
    difference = (answer(load("dit-digits")) - answer(load(tmp_path / "g"))).abs().max()
    assert difference <= 1e-5


def test_a_window_that_does_not_see_everything_is_another_function(command: Run, tmp_path: Path) -> None:
    assert command("graft", "-r", "attn=swa:w=2", "--init", "copy", "-l", "all", "dit-digits", "-o", "g").code == 0
    assert (answer(load("dit-digits")) - answer(load(tmp_path / "g"))).abs().max() > 1e-2


# --- untouched bytes -------------------------------------------------------------------------------------------------


def _bfloat16(source: Path, target: Path) -> Path:
    shutil.copytree(source, target)
    tensors = {n: t.to(torch.bfloat16) for n, t in load_file(source / WEIGHTS).items()}
    save_file(tensors, target / WEIGHTS, metadata={"format": "pt"})
    return target


def _pickle(source: Path, target: Path) -> Path:
    shutil.copytree(source, target)
    torch.save(load_file(source / WEIGHTS), target / "diffusion_pytorch_model.bin")
    (target / WEIGHTS).unlink()
    return target


@pytest.mark.parametrize("form", ["folder", "shards", "bfloat16", "pickle"])
@pytest.mark.parametrize("init", ["random", "copy"])
def test_untouched_tensors_keep_every_byte_and_replaced_ones_are_gone(
    command: Run, tiny_dit: Path, sharded: Path, tmp_path: Path, form: str, init: str
) -> None:
    made = {"folder": lambda: tiny_dit, "shards": lambda: sharded}
    made |= {
        "bfloat16": lambda: _bfloat16(tiny_dit, tmp_path / "in"),
        "pickle": lambda: _pickle(tiny_dit, tmp_path / "in"),
    }
    source = made[form]()
    ended = command("graft", "-r", "attn=hyena@1,4", "-r", "mlp=r3@4", source, "--init", init, "-o", "g")
    assert ended.code == 0, ended.stderr
    old = raw(tiny_dit) if form == "pickle" else raw(source)
    new = raw(tmp_path / "g")
    slots = tuple(f"transformer_blocks.{place}." for place in ("1.attn1", "4.attn1", "4.ff"))
    kept = {n for n in old if not n.startswith(slots)}
    assert {n: new[n] for n in kept} == {n: old[n] for n in kept}
    assert {n for n in new if n.startswith(slots[:2])} == {
        f"{slot}{name}.{kind}"
        for slot in slots[:2]
        for name in ("in_proj", "short_filter", "out_proj")
        for kind in ("weight", "bias")
    }
    assert {n: new[n][1] for n in new if n.startswith(slots[2])} == {
        "transformer_blocks.4.ff.net.0.proj.weight": (192, 64),
        "transformer_blocks.4.ff.net.0.proj.bias": (192,),
        "transformer_blocks.4.ff.net.2.weight": (64, 192),
        "transformer_blocks.4.ff.net.2.bias": (64,),
    }
    assert {row[0] for row in new.values()} == {"BF16" if form == "bfloat16" else "F32"}
    assert answer(load(tmp_path / "g").float()).isfinite().all()


def test_copied_hyena_holds_the_old_projections_row_by_row(command: Run, tiny_dit: Path, tmp_path: Path) -> None:
    assert command("graft", "-r", "attn=hyena-se@2", tiny_dit, "--init", "copy", "-o", "g").code == 0
    old, new = raw(tiny_dit), raw(tmp_path / "g")
    slot = "transformer_blocks.2.attn1."
    for kind in ("weight", "bias"):
        assert new[f"{slot}in_proj.{kind}"][2] == b"".join(old[f"{slot}to_{x}.{kind}"][2] for x in "qkv")
        assert new[f"{slot}out_proj.{kind}"][2] == old[f"{slot}to_out.0.{kind}"][2]


def test_only_the_config_and_the_modeling_file_differ_beside_the_weights(
    command: Run, tiny_dit: Path, tmp_path: Path
) -> None:
    source = tmp_path / "in"
    shutil.copytree(tiny_dit, source)
    (source / "README.md").write_text("a card\n")
    (source / "samples").mkdir()
    (source / "samples" / "one.png").write_bytes(b"\x89PNG")
    assert command("graft", "-r", "attn=hyena", source, "-o", "g").code == 0
    for name in ("README.md", "samples/one.png", "scheduler_config.json"):
        assert (tmp_path / "g" / name).read_bytes() == (source / name).read_bytes()
    old, new = (json.loads((p / "config.json").read_text()) for p in (source, tmp_path / "g"))
    assert {k for k in new if new[k] != old.get(k)} == {"_class_name", "norm_type", "surgery_grafts", "auto_map"}
    assert set(old) <= set(new)
    again = command("graft", "-r", "attn=swa", "-l", "0", "g", "-o", "h")
    assert again.code == 0 and (tmp_path / "h" / "samples" / "one.png").is_file()


def test_cached_and_online_capture_train_the_same_operator(command: Run, tiny_dit: Path, tmp_path: Path) -> None:
    import numpy as np

    pixels = np.random.default_rng(0).integers(0, 255, (20, 8, 8, 1), dtype=np.uint8)
    np.savez(tmp_path / "few.npz", arr_0=pixels, labels=np.arange(20) % 10)
    args = ("graft", "-r", "attn=hyena@3", tiny_dit, "--data", f"npz:{tmp_path / 'few.npz'}", "--samples", "48")
    for capture in ("cache", "online"):
        assert command(*args, "--steps", "2", "--batch", "16", "--capture", capture, "-o", capture).code == 0
    one, two = (load_file(tmp_path / c / WEIGHTS) for c in ("cache", "online"))
    assert one.keys() == two.keys()
    assert all(torch.allclose(one[n], two[n], atol=1e-6) for n in one)


# --- plain diffusers -------------------------------------------------------------------------------------------------

LOADS = """
import sys
sys.modules["surgery"] = None  # our package cannot be imported here
import torch
from diffusers import AutoModel, DiffusionPipeline, DiTTransformer2DModel
torch.set_num_threads(1)
one, two, pipe, expected = sys.argv[1:]
want = torch.load(expected, weights_only=True)

def answer(model):
    side, null = model.config.sample_size, model.config.num_embeds_ada_norm
    x = torch.randn(3, model.config.in_channels, side, side, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        return model(x, timestep=torch.tensor([0, 500, 999]), class_labels=torch.tensor([0, 7, null])).sample

folders = (one, two, pipe + "/transformer")
models = [AutoModel.from_pretrained(f, trust_remote_code=True).eval() for f in folders]
print(*(torch.equal(answer(m), w) for m, w in zip(models, want)))
print(*(type(m.transformer_blocks[1].attn1).__name__ for m in models))
for kind, folder in ((AutoModel, one), (DiTTransformer2DModel, one), (DiffusionPipeline, pipe)):
    try:
        kind.from_pretrained(folder)
        print(kind.__name__, "loaded")
    except (ValueError, NotImplementedError) as refusal:
        print(kind.__name__, "refused", "trust_remote_code" in str(refusal))
loaded = DiffusionPipeline.from_pretrained(pipe, trust_remote_code=True)
loaded.set_progress_bar_config(disable=True)
print(type(loaded).__name__, torch.equal(answer(loaded.transformer.eval()), want[2]))
images = loaded([1, 2], num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="np").images
print(*images.shape)
"""


@pytest.fixture(scope="module")
def latent_pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole DiTPipeline: a latent DiT of two blocks with learned variance, a VAE, a scheduler."""
    from diffusers import AutoencoderKL, DDIMScheduler

    root = tmp_path_factory.mktemp("latent") / "pipe"
    digits = ARCHITECTURES["dit-digits"].transformer
    config = {**digits, "in_channels": 4, "out_channels": 8, "num_embeds_ada_norm": 1000, "num_layers": 2}
    (root / "transformer").mkdir(parents=True)
    (root / "transformer" / "config.json").write_text(json.dumps(config))
    model = build_model(config, generator=torch.Generator().manual_seed(1))
    save_file(dict(model.state_dict()), root / "transformer" / WEIGHTS, metadata={"format": "pt"})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4)
    vae.save_pretrained(root / "vae")
    DDIMScheduler().save_pretrained(root / "scheduler")
    index = {
        "_class_name": "DiTPipeline",
        "_diffusers_version": "0.36.0",
        "scheduler": ["diffusers", "DDIMScheduler"],
        "transformer": ["diffusers", "DiTTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (root / "model_index.json").write_text(json.dumps(index))
    return root


def test_plain_diffusers_answers_as_our_loader_does_and_only_with_trust(
    command: Run, tiny_dit: Path, latent_pipeline: Path, tmp_path: Path
) -> None:
    grafts = {
        "one": ("attn=hyena@1", "mlp=mlp-hyena-x@2", tiny_dit),
        "two": ("attn=swa:w=3@1", "mlp=r3@0", tiny_dit),
        "pipe": ("attn=hyena-y@1", "mlp=r6@0", latent_pipeline),
    }
    for name, (attn, mlp, source) in grafts.items():
        assert command("graft", "-r", attn, "-r", mlp, source, "-o", name).code == 0
    folders = [tmp_path / "one", tmp_path / "two", tmp_path / "pipe"]
    torch.save([answer(load(f)) for f in folders], tmp_path / "expected.pt")
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(
        [sys.executable, "-c", LOADS, *map(str, folders), str(tmp_path / "expected.pt")],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ended.returncode == 0, ended.stderr[-2000:]
    assert ended.stdout.splitlines() == [
        "True True True",
        "HyenaX SlidingWindowAttention HyenaY",
        "AutoModel refused True",
        "DiTTransformer2DModel refused False",
        "DiffusionPipeline refused True",
        "DiTPipeline True",
        "2 8 8 3",
    ]


def test_our_loader_runs_no_code_from_the_folder(command: Run, tiny_dit: Path, tmp_path: Path) -> None:
    assert command("graft", "-r", "attn=hyena", tiny_dit, "-o", "g").code == 0
    expected = answer(load(tmp_path / "g"))
    (module,) = (tmp_path / "g").glob("*.py")
    module.write_text("raise SystemExit('this was run')\n")
    assert torch.equal(answer(load(tmp_path / "g")), expected)


def test_a_grafted_pipeline_is_sampled_through_its_vae(command: Run, latent_pipeline: Path, tmp_path: Path) -> None:
    import numpy as np

    assert command("graft", "-r", "attn=hyena", latent_pipeline, "-o", "p").code == 0
    ended = command("sample", "p", "--n", "2", "--steps", "2", "--classes", "5,999", "-o", "s.npz")
    assert ended.code == 0, ended.stderr
    with np.load(tmp_path / "s.npz") as made:
        assert made["arr_0"].shape == (2, 8, 8, 3) and made["labels"].tolist() == [5, 999]
    lone = command("sample", "p:transformer", "--n", "2", "--steps", "2", "-o", "t.npz")
    assert lone.code == 2 and "no VAE" in lone.stderr and not (tmp_path / "t.npz").exists()
