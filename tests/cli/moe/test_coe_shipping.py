"""A converted checkpoint in the hands of somebody without this package: a process that cannot import it."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_moe import save_moe

Run = Callable[..., Any]

# `import surgery` fails in these processes, as where it is not installed.
STRANGER = """
import sys
sys.modules["surgery"] = None
import torch
torch.set_num_threads(1)
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging
logging.set_verbosity_error()
ids = torch.arange(3, 23).reshape(2, 10)
load = lambda name, **more: AutoModelForCausalLM.from_pretrained(name, trust_remote_code=True, **more)
"""


def stranger(code: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(cwd / "hf"), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-c", STRANGER + code], cwd=cwd, env=env, capture_output=True, text=True, timeout=300
    )


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`moe` and its conversions, of a family with experts one by one on disk and of one with a renamed block."""
    import surgery

    root = tmp_path_factory.mktemp("shipping")
    for kind in ("qwen3_moe", "mixtral"):
        base = save_moe(root / kind, kind)
        surgery.apply("coe", base, out=root / f"{kind}-coe", mode="append", verify="none")
    return root


def test_it_loads_with_trust_generates_saves_and_takes_an_adapter(place: Path) -> None:
    done = stranger(
        """
for kind in ("qwen3_moe", "mixtral"):
    base = AutoModelForCausalLM.from_pretrained(kind).eval()
    model, info = load(kind + "-coe", output_loading_info=True)
    model.eval()
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"], info
    assert type(model).__name__.startswith("CoE") and model.config.model_type == "coe_" + kind
    assert model.config._experts_implementation == "grouped_mm"
    assert torch.equal(model(ids).logits, base(ids).logits)
    options = dict(max_new_tokens=8, do_sample=False, pad_token_id=0)
    assert torch.equal(model.generate(ids, **options), base.generate(ids, **options))
    assert torch.equal(model.generate(ids, use_cache=False, **options), base.generate(ids, **options))
    with torch.no_grad():
        block = model.model.layers[0].mlp
        block.coe_beta[1] = 0.25
        block.coe_gates[0].weight.mul_(-1)
    before = model(ids).logits
    model.save_pretrained(kind + "-saved")
    again, info = load(kind + "-saved", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    assert torch.equal(again.eval()(ids).logits, before)
    half = load(kind + "-saved", dtype=torch.bfloat16)
    assert half.model.layers[0].mlp.coe_beta.dtype == torch.float32 and half.lm_head.weight.dtype == torch.bfloat16
    assert torch.isfinite(half(ids).logits).all()

from peft import LoraConfig, get_peft_model
from peft import PeftModel
lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], modules_to_save=["coe_gates.0"])
adapted = get_peft_model(load("qwen3_moe-coe"), lora)
names = [n for n, p in adapted.named_parameters() if p.requires_grad]
assert any("lora_A" in n for n in names) and any("coe_gates" in n for n in names), names
loss = adapted(ids, labels=ids).loss
loss.backward()
with torch.no_grad():
    for n, p in adapted.named_parameters():
        if "lora_B" in n:
            p.normal_(std=0.1)
adapted.save_pretrained("adapter")
back = PeftModel.from_pretrained(load("qwen3_moe-coe"), "adapter")
assert torch.allclose(back.eval()(ids).logits, adapted.eval()(ids).logits, atol=1e-6)
print("all well")
""",
        place,
    )
    assert done.returncode == 0 and done.stdout.endswith("all well\n"), done.stderr[-3000:]
    saved = place / "qwen3_moe-saved"
    assert {"coe_chain.py", "configuration_coe.py", "modeling_coe_qwen3_moe.py"} <= {p.name for p in saved.iterdir()}
    # A model that was saved by Transformers can still be made plain again.
    import surgery

    back = surgery.apply("coe", saved, out=place / "back", collapse=True, verify="keys").path
    assert json.loads((back / "config.json").read_text())["model_type"] == "qwen3_moe"


def test_it_does_not_load_without_trust(place: Path) -> None:
    done = stranger('AutoModelForCausalLM.from_pretrained("qwen3_moe-coe", trust_remote_code=False)', place)
    assert done.returncode != 0 and "trust_remote_code" in done.stderr


def test_whoever_has_the_toolkit_needs_no_trust(place: Path) -> None:
    code = """
import torch, surgery.hf
from transformers import AutoModelForCausalLM
surgery.hf.register()
surgery.hf.register()
model, info = AutoModelForCausalLM.from_pretrained("mixtral-coe", output_loading_info=True)
assert not info["missing_keys"] and not info["unexpected_keys"], info
assert type(model).__module__ == "surgery.arch.moe.carried.modeling_coe_mixtral"
model.save_pretrained("resaved")
"""
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=place, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    done = stranger('AutoModelForCausalLM.from_pretrained("resaved", trust_remote_code=True); print("well")', place)
    assert done.stdout.endswith("well\n"), done.stderr[-3000:]


def test_the_carried_files_import_torch_and_transformers_only() -> None:
    import ast

    from surgery.arch.moe import carried

    folder = Path(carried.__file__).parent
    for file in folder.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [str(node.module)]
            top = {n.split(".")[0] for n in names}
            assert top <= {"torch", "transformers", "dataclasses", "math", "typing"}, (file.name, top)


def test_the_loader_of_the_toolkit_knows_them(place: Path) -> None:
    from surgery.arch.language.load import load_model
    from surgery.store.checkpoint import open_checkpoint

    model = load_model(open_checkpoint(place / "qwen3_moe-coe"))
    assert type(model).__name__ == "CoEQwen3MoeForCausalLM"


@pytest.mark.slow
def test_trl_trains_it_in_two_processes_without_the_toolkit(place: Path) -> None:
    """TRL on accelerate under torchrun: every tensor moves, both processes end with the same ones, and what is saved
    loads again, whole."""
    script = place / "sft.py"
    script.write_text(
        STRANGER
        + """
from datasets import Dataset
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer
words = {f"w{i}": i for i in range(64)}
tokenizer = PreTrainedTokenizerFast(
    tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w0")), unk_token="w0", eos_token="w1", pad_token="w2"
)
rows = [[3 + (7 * i + j * j) % 60 for j in range(16)] for i in range(16)]
model = load("qwen3_moe-coe")
start = {n: p.detach().clone() for n, p in model.named_parameters()}
options = SFTConfig(
    output_dir="sft", max_steps=4, per_device_train_batch_size=2, learning_rate=1e-2, use_cpu=True, bf16=False,
    report_to=[], save_strategy="no", gradient_checkpointing=False, disable_tqdm=True,
)
data = Dataset.from_list([{"input_ids": r, "labels": r} for r in rows])
trainer = SFTTrainer(model=model, args=options, train_dataset=data, processing_class=tokenizer)
trainer.train()
assert trainer.args.world_size == 2
still = [n for n, p in model.named_parameters() if torch.equal(p, start[n])]
assert not still, still
sums = torch.tensor([float(p.detach().double().sum()) for p in model.parameters()], dtype=torch.float64)
both = trainer.accelerator.gather(sums[None])
assert torch.equal(both[0], both[1])
trainer.save_model("sft")
trainer.accelerator.wait_for_everyone()
again, info = load("sft", output_loading_info=True)
assert not info["missing_keys"] and not info["unexpected_keys"], info
state = again.state_dict()
assert all(torch.equal(state[n], p) for n, p in model.named_parameters())
"""
    )
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(place / "hf"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", str(script)]
    done = subprocess.run(command, cwd=place, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
