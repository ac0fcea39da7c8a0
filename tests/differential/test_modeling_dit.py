"""Grafted models against the stock ones of diffusers, in memory and loaded from a folder by a process without us."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tiny_dits import PIXART, slot_tensors, with_grafts

from surgery.arch.architectures import ARCHITECTURES
from surgery.arch.dit.build import build_model, model_from_state
from surgery.arch.dit.config import Dims, resolve_graft, slot_prefix
from surgery.arch.dit.modeling import SurgeryDiTTransformer2DModel
from surgery.arch.dit.operators import OPERATORS, modeling_source
from surgery.errors import CheckpointError

DIGITS = dict(ARCHITECTURES["dit-digits"].transformer)


def draw(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def copy_grafted(config: Mapping[str, Any], *entries: tuple[int, str, str]) -> tuple[torch.nn.Module, torch.nn.Module]:
    """(stock model, the same model with `entries` grafted from a copy of what they replace)."""
    stock = build_model(config, generator=draw(1))
    target = with_grafts(config, *entries)
    state, place = dict(stock.state_dict()), Dims.from_config(config).place
    for block, slot, text in entries:
        spec, args = resolve_graft(config, slot, text)
        prefix = slot_prefix(block, slot)
        old = {name: state.pop(prefix + name) for name in slot_tensors(config, block, slot)}
        plan = spec.copy_plan({name: tuple(t.shape) for name, t in old.items()}, **place, **args)
        state |= {prefix + name: source.evaluate(old, draw(2)) for name, source in plan.items()}
    return stock, model_from_state(target, state)


def denoise(model: torch.nn.Module, seed: int = 5) -> torch.Tensor:
    x_BCHW = torch.randn(3, 1, 8, 8, generator=draw(seed))
    with torch.no_grad():
        return model(x_BCHW, timestep=torch.tensor([0, 500, 999]), class_labels=torch.tensor([0, 7, 10])).sample


@pytest.mark.parametrize("blocks", [(0,), (1, 3, 5), range(6)])
def test_self_graft_with_copied_weights_gives_the_same_bits(blocks: Any) -> None:
    stock, new = copy_grafted(DIGITS, *((b, "attn", "mha") for b in blocks), *((b, "mlp", "r4") for b in blocks))
    assert torch.equal(denoise(stock), denoise(new))


def test_window_over_everything_with_copied_weights_is_the_original() -> None:
    stock, new = copy_grafted(DIGITS, *((block, "attn", "swa:w=15") for block in range(6)))
    assert (denoise(stock) - denoise(new)).abs().max() <= 1e-5


def test_wider_mlp_with_copied_weights_is_the_original() -> None:
    stock, new = copy_grafted(DIGITS, *((block, "mlp", "r6") for block in range(6)))
    assert (denoise(stock) - denoise(new)).abs().max() <= 1e-5


def test_ungrafted_model_is_diffusers_own() -> None:
    """The position table, which is no part of the state dict, is rebuilt with the same bits."""
    import diffusers

    for config in (DIGITS, PIXART, {**PIXART, "interpolation_scale": 2, "sample_size": 16}):
        fields = {name: value for name, value in config.items() if name != "_class_name"}
        ours = build_model(config)
        theirs = getattr(diffusers, config["_class_name"])(**fields)
        assert type(ours) is type(theirs) and not ours.training
        assert torch.equal(ours.pos_embed.pos_embed, theirs.pos_embed.pos_embed)
        theirs.load_state_dict(ours.state_dict(), strict=True)


def test_every_operator_runs_forward_and_backward_in_a_model() -> None:
    attention = [name for name, spec in OPERATORS.items() if "attn" in spec.slots]
    config = {**DIGITS, "num_layers": len(attention)}
    mlps = ["r3", "mlp-hyena-x", "identity-zero"]
    entries = [(block, "attn", name) for block, name in enumerate(attention)]
    entries += [(block, "mlp", name) for block, name in enumerate(mlps)]
    model = build_model(with_grafts(config, *entries)).train()
    x_BCHW = torch.randn(2, 1, 8, 8, generator=draw(1))
    model(x_BCHW, timestep=torch.tensor([1, 2]), class_labels=torch.tensor([3, 4])).sample.square().mean().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_pixart_takes_grafts_in_self_attention_only() -> None:
    model = build_model(with_grafts(PIXART, (1, "attn", "hyena-x")))
    with torch.no_grad():
        out = model(
            torch.randn(2, 4, 8, 8, generator=draw(1)),
            encoder_hidden_states=torch.randn(2, 5, 10, generator=draw(2)),
            timestep=torch.tensor([3, 900]),
            encoder_attention_mask=torch.ones(2, 5),
        ).sample
    assert out.shape == (2, 8, 8, 8) and out.isfinite().all()
    assert set(model.attn_processors) == {
        "transformer_blocks.0.attn1.processor",
        "transformer_blocks.0.attn2.processor",
        "transformer_blocks.1.attn2.processor",
    }


def test_settings_of_the_original_dit_code_reach_every_block() -> None:
    config = {**with_grafts(DIGITS), "timestep_freq_shift": 0, "norm3_eps": 1e-6}
    model = build_model(config)
    assert {block.norm1.emb.time_proj.downscale_freq_shift for block in model.transformer_blocks} == {0}
    assert {block.norm3.eps for block in model.transformer_blocks} == {1e-6}
    assert not torch.allclose(denoise(model), denoise(build_model(DIGITS)), atol=1e-3)
    assert torch.equal(denoise(build_model(with_grafts(DIGITS))), denoise(build_model(DIGITS)))


def test_the_class_itself_refuses_what_it_does_not_know() -> None:
    fields = {name: value for name, value in DIGITS.items() if name != "_class_name"}
    for entry, said in (
        ({"block": 0, "slot": "attn", "op": "linear-magic"}, "unknown operator 'linear-magic'; known: mha"),
        ({"block": 6, "slot": "attn", "op": "swa"}, "block 6 does not exist"),
        ({"block": 0, "slot": "ff", "op": "mlp"}, "slot 'ff'"),
    ):
        with torch.device("meta"), pytest.raises(ValueError, match=said):
            SurgeryDiTTransformer2DModel(**fields, surgery_grafts=[entry])


def test_our_loader_refuses_an_unknown_operator() -> None:
    config = {**with_grafts(DIGITS), "surgery_grafts": [{"block": 0, "slot": "attn", "op": "linear-magic", "args": {}}]}
    with pytest.raises(CheckpointError, match="no operator 'linear-magic'"):
        build_model(config)


# --- folders ---------------------------------------------------------------------------------------------------------


def write_model(folder: Path, config: Mapping[str, Any], seed: int, *, source: bytes | None = None) -> torch.Tensor:
    """A grafted model's folder as it is published; returns what it answers to `denoise`'s question."""
    model = build_model(config, generator=draw(seed))
    name, content = modeling_source()
    if source is not None:
        config = {**config, "auto_map": {"AutoModel": f"{name[:-11]}deadbeef.{config['_class_name']}"}}
        name, content = f"{name[:-11]}deadbeef.py", source
    folder.mkdir(parents=True)
    (folder / name).write_bytes(content)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(dict(model.state_dict()), folder / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    return denoise(model)


def fresh_process(script: str, cwd: Path, *arguments: str) -> str:
    """Run `script` where our package cannot be imported; returns what it printed."""
    environment = {
        **os.environ,
        "HF_MODULES_CACHE": str(cwd / "modules"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    environment.pop("PYTHONPATH", None)
    prelude = 'import sys; sys.modules["surgery"] = None\n'
    done = subprocess.run(
        [sys.executable, "-c", prelude + script, *arguments], cwd=cwd, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


LOADS = """
import torch
from diffusers import AutoModel, DiTTransformer2DModel, Transformer2DModel
torch.set_num_threads(1)
one, two, three, expected = sys.argv[1:]
want = torch.load(expected, weights_only=True)
x = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(5))

def answer(model):
    with torch.no_grad():
        return model(x, timestep=torch.tensor([0, 500, 999]), class_labels=torch.tensor([0, 7, 10])).sample

models = [AutoModel.from_pretrained(folder, trust_remote_code=True) for folder in (one, two, three)]
print([torch.equal(answer(model), right) for model, right in zip(models, want)])
print([type(model.transformer_blocks[1].attn1).__name__ for model in models])
for low in (True, False):
    again = AutoModel.from_pretrained(one, trust_remote_code=True, low_cpu_mem_usage=low)
    print(torch.equal(answer(again), want[0]), answer(again).isfinite().all().item())
for cls in (AutoModel, DiTTransformer2DModel, Transformer2DModel):
    try:
        cls.from_pretrained(one)
        print(cls.__name__, "loaded")
    except (ValueError, NotImplementedError) as refusal:
        print(cls.__name__, "refused", "trust_remote_code" in str(refusal), "surgery:ada_norm_zero" in str(refusal))
"""


def test_a_published_folder_loads_with_the_same_bits_and_only_with_trust(tmp_path: Path) -> None:
    """Three checkpoints in one process: two graft lists under one modeling file, and one under another file."""
    configs = [
        with_grafts(DIGITS, (1, "attn", "hyena-x"), (2, "mlp", "r3"), (4, "mlp", "mlp-hyena-x")),
        with_grafts(DIGITS, (1, "attn", "swa:w=2"), (3, "attn", "mamba2")),
        with_grafts(DIGITS, (1, "attn", "hyena-y")),
    ]
    folders = [tmp_path / name for name in ("one", "two", "three")]
    other = modeling_source()[1].replace(b"class HyenaY(", b"class Renamed(").replace(b": HyenaY,", b": Renamed,")
    answers = [
        write_model(folder, config, seed, source=other if seed == 2 else None)
        for seed, (folder, config) in enumerate(zip(folders, configs, strict=True))
    ]
    torch.save(answers, tmp_path / "expected.pt")
    printed = fresh_process(LOADS, tmp_path, *map(str, folders), str(tmp_path / "expected.pt")).splitlines()
    assert printed == [
        "[True, True, True]",
        "['HyenaX', 'SlidingWindowAttention', 'Renamed']",
        "True True",
        "True True",
        "AutoModel refused True False",
        "DiTTransformer2DModel refused False True",
        "Transformer2DModel refused False True",
    ]


PIPELINE = """
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiffusionPipeline
torch.set_num_threads(1)
folder = sys.argv[1]
AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4).save_pretrained(folder + "/vae")
DDIMScheduler().save_pretrained(folder + "/scheduler")
try:
    DiffusionPipeline.from_pretrained(folder)
    print("loaded")
except ValueError as refusal:
    print("refused", "trust_remote_code" in str(refusal))
pipe = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
pipe.set_progress_bar_config(disable=True)
print(type(pipe).__name__, type(pipe.transformer).__name__, type(pipe.transformer.transformer_blocks[1].attn1).__name__)
images = pipe([1, 2], num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="np").images
print(images.shape)
"""


def test_a_published_pipeline_loads_and_samples(tmp_path: Path) -> None:
    latent = {**DIGITS, "in_channels": 4, "out_channels": 8, "num_embeds_ada_norm": 1000, "num_layers": 2}
    config = with_grafts(latent, (1, "attn", "hyena-se"))
    folder = tmp_path / "pipe" / "transformer"
    folder.mkdir(parents=True)
    name, content = modeling_source()
    (folder / name).write_bytes(content)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(dict(build_model(config).state_dict()), folder / "diffusion_pytorch_model.safetensors")
    index = {
        "_class_name": "DiTPipeline",
        "_diffusers_version": "0.36.0",
        "scheduler": ["diffusers", "DDIMScheduler"],
        "transformer": [name.removesuffix(".py"), config["_class_name"]],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (tmp_path / "pipe" / "model_index.json").write_text(json.dumps(index))
    assert fresh_process(PIPELINE, tmp_path, str(tmp_path / "pipe")).splitlines() == [
        "refused True",
        "DiTPipeline SurgeryDiTTransformer2DModel HyenaSE",
        "(2, 8, 8, 3)",
    ]
