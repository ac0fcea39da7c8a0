"""What steering costs: a LLaVA of the real classes with random weights, 576 image tokens and 40 of text, one thread.

Ratios of CPU time within one process, the medians of interleaved runs: steered against plain generation of 16 tokens,
a grid of six alphas against one plain pass, the idle patch against the untouched backend. Image encodings are counted.
"""

import statistics
import time
from collections.abc import Callable

import torch
from measure import finish, row
from transformers import LlavaConfig, LlavaForConditionalGeneration

from surgery.steering.attention import backend
from surgery.steering.generate import Policy
from surgery.steering.prefill import Prefill
from surgery.steering.session import generate, steer

RUNS = 7
ALPHAS = (0.5, 0.8, 1.0, 1.2, 1.5, 2.0)


def build() -> tuple[LlavaForConditionalGeneration, dict[str, torch.Tensor]]:
    """The model, and a prompt of 616 tokens about one picture of 336×336."""
    torch.manual_seed(0)
    text = {"model_type": "llama", "vocab_size": 4000, "hidden_size": 512, "intermediate_size": 1408}
    text |= {
        "num_hidden_layers": 6,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "max_position_embeddings": 1024,
    }
    vision = {"model_type": "clip_vision_model", "hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4}
    vision |= {"num_attention_heads": 4, "image_size": 336, "patch_size": 14}
    model = LlavaForConditionalGeneration(LlavaConfig(text_config=text, vision_config=vision, image_token_index=3999))
    model = model.eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    words = torch.randint(1, 3000, (40,)).tolist()
    ids = torch.tensor([[*words[:10], *[3999] * 576, *words[10:]]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": torch.randn(1, 3, 336, 336)}
    return model, inputs


def seconds(works: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Median CPU seconds of each, run in turn so that a slow moment of the machine falls on all alike."""
    found: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(RUNS + 1):
        for name, work in works.items():
            started = time.process_time()
            work()
            if turn:
                found[name].append(time.process_time() - started)
    return {name: statistics.median(values) for name, values in found.items()}


def main() -> None:
    torch.set_num_threads(1)
    model, inputs = build()
    how = {"max_new_tokens": 16, "do_sample": False}
    adaptive = Policy(0.5, 1.5, beta=0.0)  # always steered: the dearest case
    encoded: list[int] = []
    model.model.vision_tower.register_forward_hook(lambda *_: encoded.append(1))

    def plain(tokens: int) -> object:
        with torch.no_grad():
            return model.generate(**inputs, **{**how, "max_new_tokens": tokens})

    def steered() -> object:
        with torch.no_grad():
            return generate(model, inputs, adaptive, **how)

    def scaled() -> object:
        with torch.no_grad(), steer(model, alpha=0.5, inputs=inputs):
            return model.generate(**inputs, **how)

    def grid(tokens: int) -> None:
        with Prefill(model, inputs) as prefill:
            for alpha in ALPHAS:
                logits = prefill.steered(alpha)
                if tokens == 1:
                    prefill.option_scores(logits, [[[5], [6], [7], [8]]])
                else:
                    prefill.answer(logits, tokens=tokens)

    def forward() -> object:
        with torch.no_grad():
            return model(**inputs, logits_to_keep=1)

    def idle() -> object:
        model.set_attn_implementation({"text_config": backend("sdpa")})
        try:
            return forward()
        finally:
            model.set_attn_implementation({"text_config": "sdpa"})

    def at_one() -> object:
        with steer(model, alpha=1.0, inputs=inputs):
            return forward()

    steered()
    once = encoded.count(1)
    cost = seconds(
        {
            "plain": lambda: plain(16), "steered": steered, "scaled": scaled, "plain 1": lambda: plain(1),
            "grid 1": lambda: grid(1), "plain 4": lambda: plain(4), "grid 4": lambda: grid(4),
            "forward": forward, "idle": idle, "at one": at_one,
        }
    )  # fmt: skip
    note = f"plain {cost['plain']:.3f} CPU s; 616 tokens of prompt, 16 new ones; medians of {RUNS}"
    finish(
        "adaptvis",
        [
            row("adaptive generate / plain generate", cost["steered"] / cost["plain"], "x", 1.10, note),
            row("one alpha, steered generate / plain generate", cost["scaled"] / cost["plain"], "x", 1.10),
            row("image encodings of an adaptive generate", once, "", 1),
            row(
                "six alphas, options of one token / one plain pass", cost["grid 1"] / cost["plain 1"], "x", 2.0,
                f"plain pass {cost['plain 1']:.3f} CPU s",
            ),
            row(
                "six alphas, answers of 4 tokens / one plain answer", cost["grid 4"] / cost["plain 4"], "x", 2.0,
                f"plain answer {cost['plain 4']:.3f} CPU s",
            ),
            row("idle patch / untouched backend", cost["idle"] / cost["forward"], "x", 1.03),
            row("alpha 1 / untouched backend", cost["at one"] / cost["forward"], "x", 1.03),
        ],
    )  # fmt: skip


if __name__ == "__main__":
    main()
