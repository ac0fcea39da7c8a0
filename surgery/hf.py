"""What this package adds to Transformers for those who have it installed."""


def register() -> None:
    """Let `AutoModelForCausalLM.from_pretrained` load Chain-of-Experts checkpoints without running code from their
    folders. Our experts implementation "surgery_triton" is registered too."""
    from surgery.arch.moe.build import register as register_models
    from surgery.kernels.moe import register as register_experts

    register_models()
    register_experts()
