"""The kernels under transformers' experts interface: selected by name, and what happens where they cannot serve."""

import subprocess
import sys
import warnings

import pytest
import torch
from surgery.kernels import moe
from surgery.kernels.moe import adapter
from surgery.kernels.moe.routed import compute


def tiny(family: str, **more: object):
    """A block of experts of a family, with random weights."""
    if family == "gpt_oss":
        from transformers import GptOssConfig
        from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts as Kind

        config = GptOssConfig(hidden_size=32, intermediate_size=24, num_local_experts=5, **more)
    else:
        from transformers import Qwen3MoeConfig
        from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts as Kind

        config = Qwen3MoeConfig(**{"hidden_size": 32, "moe_intermediate_size": 24, "num_experts": 5, **more})
    config._experts_implementation = "eager"
    module = Kind(config)
    for p in module.parameters():
        p.data = torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())) / 3
    return module


def tokens(n: int = 5, hidden: int = 32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    index = torch.stack([torch.randperm(n, generator=generator)[:2] for _ in range(12)])
    return torch.randn(12, hidden, generator=generator), index, torch.rand(12, 2, generator=generator)


@pytest.fixture(autouse=True)
def _forget_warnings() -> None:
    adapter._warned.clear()


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_a_module_is_read_as_what_it_computes(family: str) -> None:
    """Layout, biases and gate: the definition with what the adapter read is the module's own forward."""
    module = tiny(family)
    experts, reason = adapter._experts(module)
    assert reason == "" and experts is not None
    got = compute("loop")(*tokens(), experts)
    assert torch.allclose(got, module(*tokens()), atol=1e-5)


def test_gpt_oss_limits_are_read_from_the_module() -> None:
    experts, _ = adapter._experts(tiny("gpt_oss", swiglu_limit=3.0, swiglu_alpha=1.5))
    assert (experts.limit, experts.slope, experts.activation) == (3.0, 1.5, "swiglu_oai")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_model_selects_it_by_name_and_back() -> None:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    assert moe.register() == moe.register() == "surgery_triton"
    config = Qwen3MoeConfig(
        hidden_size=32, intermediate_size=32, moe_intermediate_size=16, num_experts=4, num_experts_per_tok=2,
        num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, head_dim=16, vocab_size=64,
    )  # fmt: skip
    model = Qwen3MoeForCausalLM(config).eval()
    ids = torch.arange(10)[None]
    with torch.no_grad():
        native = model(ids).logits
        model.set_experts_implementation("surgery_triton")
        with pytest.warns(UserWarning, match="surgery_triton: there is no CUDA device; using grouped_mm"):
            ours = model(ids).logits
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # it is said once
            model.generate(ids, max_new_tokens=2, do_sample=False)
        model.set_experts_implementation("grouped_mm")
        assert torch.equal(ours, native) and torch.equal(model(ids).logits, native)
    with pytest.raises(ValueError):
        model.set_experts_implementation("surgery_cutlass")


def test_what_the_kernels_do_not_know_goes_elsewhere_with_the_reason() -> None:
    module = tiny("qwen3_moe")
    wanted = module(*tokens())
    for name, value, reason in (
        ("act_fn", torch.nn.GELU(), "none of the gates"),
        ("has_post_expert_norm", True, "end in a norm"),
        ("has_gate", False, "no gate"),
    ):
        other = tiny("qwen3_moe")
        setattr(other, name, value)
        experts, why = adapter._experts(other)
        assert experts is None and reason in why
    with pytest.warns(UserWarning, match="using grouped_mm"):
        got = adapter.experts_forward(module, *tokens())
    assert torch.allclose(got, wanted, atol=1e-5)


def test_rows_that_grouped_mm_refuses_go_to_the_module_itself() -> None:
    """transformers does not ask whether rows are whole 16 bytes; torch raises."""
    module = tiny("qwen3_moe", hidden_size=30, moe_intermediate_size=18)
    with pytest.warns(UserWarning, match="using the module's own forward"):
        got = adapter.experts_forward(module, *tokens(hidden=30))
    assert torch.equal(got, module(*tokens(hidden=30)))


def test_experts_of_other_tensors_are_refused() -> None:
    module = tiny("qwen3_moe")
    module.gate_up_proj = torch.nn.Parameter(module.gate_up_proj.data.to(torch.float64))
    experts, reason = adapter._experts(module)
    assert experts is None and "one dtype" in reason


def test_importing_the_kernels_imports_neither_triton_nor_transformers() -> None:
    """Nothing touches a GPU or a library that is not needed yet."""
    names = "('triton', 'transformers', 'numpy')"
    found = [
        subprocess.run(
            [sys.executable, "-c", f"import sys, {module}; print([m for m in {names} if m in sys.modules])"],
            capture_output=True, text=True, check=True,
        ).stdout
        for module in ("surgery.kernels.moe", "torch")
    ]  # fmt: skip
    assert found[0] == found[1] and "transformers" not in found[0]


def test_registering_models_registers_the_kernels() -> None:
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    import surgery.hf

    surgery.hf.register()
    assert ALL_EXPERTS_FUNCTIONS["surgery_triton"] is adapter.experts_forward
