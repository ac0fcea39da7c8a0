"""Steer what a small vision-language model looks at, from Python: alphas, rules as data, profiles.

Usage: python examples/steer_attention.py [OUTPUT FOLDER]
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch

import surgery
from surgery.data.spatial.items import read_items
from surgery.data.spatial.make import make_scenes
from surgery.evals.spatial.evaluate import encode_items
from surgery.steering.generate import Policy
from surgery.steering.patch import PRESETS, Patch, patch_from
from surgery.steering.prefill import Prefill
from surgery.steering.profile import profile
from surgery.steering.session import generate, steer


def main(out: Path) -> None:
    torch.set_num_threads(1)
    make_scenes(out / "scenes", groups=8, val=0.5, seed=5)
    items = read_items(out / "scenes/val.jsonl")[:8]
    model, processor = surgery.load("llava-scenes"), surgery.load_processor("llava-scenes")
    from surgery.arch.language.load import Loaded

    inputs = encode_items(Loaded(model, processor), items)

    # Many alphas from one run of the prompts: each costs one decoding step.
    with Prefill(model, inputs) as run:
        for alpha in (0.0, 0.5, 1.0, 2.0):
            print(f"alpha {alpha:g}: {words(processor, run.steered(alpha))}")
        # The same for any other rule.
        hidden = run.steered(None, PRESETS["knock-out"])
        print(f"image knocked out: {words(processor, hidden)}")
        print(f"runs: {run.passes}")

    # Adaptive generation, as a patched checkpoint does it; confidence and alpha come with the answer.
    _, outcome = generate(model, inputs, Policy(0.5, 1.5, beta=0.8), max_new_tokens=2, do_sample=False)
    print("alphas chosen:", [f"{a:g}" for a in outcome.alpha])

    # What the last row looks at, before and after; nothing is left behind on the model.
    rule = Patch(layers="0-1", mode="mass-preserving")
    with torch.no_grad(), steer(model, rule, alpha=0.3, inputs=inputs, trace=True) as seen:
        model(**inputs)
    image = inputs["input_ids"] == model.config.image_token_id
    for plain in (True, False):
        weights = seen.attention(0, plain=plain)[0].mean(0)[image[0]]
        print(f"layer 0, {'unsteered' if plain else 'steered'}: largest share of one image token {weights.max():.3f}")

    # Which heads carry the answer? The result is a rule again, as data.
    found = profile(model, [inputs], alpha=0.0)
    best = found.best(2)
    (out / "rules.json").write_text(json.dumps(best.as_json()))
    again = patch_from(json.loads((out / "rules.json").read_text()))
    assert again == best
    print(f"heads that matter most: {best.heads}")

    # PASTA: in every row, everything but a phrase of the question is weighted down.
    phrase = items[0].question.split()[-1]
    pasta = patch_from({"preset": "pasta", "text": [phrase], "heads": best.heads})
    first: dict[str, Any] = encode_items(Loaded(model, processor), items[:1])
    with torch.no_grad(), steer(model, pasta, inputs=first, tokenizer=processor.tokenizer) as run_on_text:
        model(**first)
    print(f"attention held to '{phrase}' in {run_on_text.calls} layers")


def words(processor: Any, logits: torch.Tensor) -> str:
    return " ".join(processor.tokenizer.decode([i]) for i in logits.argmax(-1).tolist())


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "out/example-steer"))
