"""What this package adds to Transformers for those who have it installed."""

from contextlib import suppress


def register() -> None:
    """Let `AutoModelForCausalLM.from_pretrained` load Chain-of-Experts checkpoints without running code from their
    folders, and `experts_implementation="surgery_triton"` choose our kernels where triton is installed."""
    from surgery.arch.moe.build import register as register_models

    register_models()
    with suppress(ImportError):  # triton is there for Linux only
        from surgery.kernels.moe.adapter import register as register_kernels

        register_kernels()
