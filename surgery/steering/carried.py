"""What a patched checkpoint carries beside its weights: code, a section of its README, a value in its config.

Standard library only. The code is that of attention.py and generate.py here, byte for byte, so that what a folder
carries can be compared with what this package knows before anything of it is run.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from surgery.errors import CheckpointError
from surgery.graph.lineage import ranges
from surgery.store import digests
from surgery.store.checkpoint import Checkpoint

CODE_FILES = ("generate.py", "attention.py", "requirements.txt")
_REQUIREMENTS = b"transformers>=5.23\n"
_BEGIN, _END = "<!-- surgery:adaptvis -->", "<!-- /surgery:adaptvis -->"


def code_files() -> dict[str, bytes]:
    """Content of custom_generate/ by name."""
    here = Path(__file__).parent
    return {n: _REQUIREMENTS if n == "requirements.txt" else (here / n).read_bytes() for n in CODE_FILES}


def code_digest() -> str:
    """What identifies the code that this package would write."""
    from hashlib import sha256

    return digests.canonical_digest({n: sha256(source).hexdigest() for n, source in code_files().items()})


def carried_faults(base: Checkpoint) -> list[str]:
    """What is wrong with the patch that a folder claims to carry; empty when config and code belong together.

    Raises CheckpointError when it claims none.
    """
    if not isinstance(base.config.get("adaptvis"), Mapping):
        raise CheckpointError(
            "no-patch", f"{base.name}: carries no patch (no 'adaptvis' in config.json)", hint="surgery adaptvis attach"
        )
    faults = []
    for name, source in code_files().items():
        path = base.root / "custom_generate" / name
        if not path.is_file():
            # save_pretrained keeps the config and drops the code.
            faults.append(f"custom_generate/{name}: missing, so the patch in config.json does nothing; attach it again")
        elif path.read_bytes() != source:
            faults.append(f"custom_generate/{name}: is not this version's code; attach it again, or read it before use")
    return faults


def text_sizes(base: Checkpoint) -> tuple[int | None, int | None]:
    """(layers, heads) of the text model, None for what config and names do not say.

    Raises CheckpointError for checkpoints whose attention has no image keys to steer.
    """
    config = base.config
    text = config.get("text_config") if isinstance(config.get("text_config"), Mapping) else {}
    if config.get("model_type") == "mllama" or text.get("cross_attention_layers"):
        raise CheckpointError(
            "cross-attention",
            f"{base.name}: images enter {config.get('model_type')} by cross-attention: no image keys to steer",
            hint="choose a model that puts image tokens into its prompt",
        )
    if "image_token_id" not in config and "image_token_index" not in config:
        raise CheckpointError(
            "no-image-token",
            f"{base.name}: no image token id in config.json: not an image-text-to-text checkpoint",
            hint="LLaVA, Qwen-VL, SmolVLM, InternVL, Gemma 3, PaliGemma and their like can be patched",
        )
    layers, heads = (text.get(k, config.get(k)) for k in ("num_hidden_layers", "num_attention_heads"))
    if not isinstance(layers, int):
        numbers = [
            int(m[1])
            for n in base.tensors
            if (m := re.search(r"(?:language|text)_model\.(?:\w+\.)*layers\.(\d{1,4})\.", n))
        ]
        layers = max(numbers) + 1 if numbers else None
    return layers, heads if isinstance(heads, int) else None


def spec_line(spec: Mapping[str, Any]) -> str:
    """The stored patch in one line, for people."""
    if spec.get("scale") is not None:
        how = f"alpha {spec['scale']:g} for every sample"
    else:
        measure = spec.get("confidence", "max-prob")
        how = f"alpha {spec['alpha1']:g} where {measure} < {spec['beta']:g}, else {spec['alpha2']:g}"
    layers, heads = spec.get("layers"), spec.get("heads")
    where = "all layers" if layers is None else f"layers {ranges(layers)}"
    if heads is not None:
        where += ", heads " + " ".join(f"{layer}:{','.join(map(str, row))}" for layer, row in heads.items())
    mode, rows, steps = (spec.get(k, d) for k, d in (("mode", "logit"), ("rows", "last"), ("steps", "first")))
    return f"{how}; mode {mode}, {where}, rows {rows}, steps {steps}"


def readme(before: str, spec: Mapping[str, Any]) -> str:
    """The README with our section, which replaces an earlier one."""
    rest = re.sub(rf"\n*{re.escape(_BEGIN)}.*?{re.escape(_END)}\n*", "\n", before, flags=re.DOTALL).rstrip()
    section = f"""{_BEGIN}
## Attention patch (AdaptVis)

This checkpoint carries a change of how it generates; its weights are those of the model it was made from. When the
answer starts, the attention of the last prompt position to the image is scaled (arXiv 2503.01773):
{spec_line(spec)}.

    model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
    model.generate(**inputs)                        # patched
    model.generate(**inputs, adaptvis=False)        # as the original
    model.generate(**inputs, adaptvis_beta=0.3)     # another value for one call

The code is in `custom_generate/` (torch and transformers alone). Without `trust_remote_code=True` the checkpoint loads
unpatched, and says nothing. `save_pretrained` does not copy that folder: a saved copy is unpatched. Other engines
(vLLM, TGI, llama.cpp, ONNX) do not run the patch. Batches must be padded on the left.
{_END}
"""
    return f"{rest}\n\n{section}" if rest else section
