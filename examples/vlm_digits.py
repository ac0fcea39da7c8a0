"""A small vision-language model and its relatives, from nothing but scikit-learn's handwritten digits (8x8 pixels).

    python examples/vlm_digits.py OUT [SEED]        about a minute and a half of one core

base  a six-layer Llama (a quarter of a million weights) that copies digits and has seen a few sums
llm   base, trained on sums of two and three digits, text alone
vlm   base with a CLIP encoder and a projector in front (LlavaForConditionalGeneration), trained to read two digits
      from two images

The llm and the vlm keep the base's embeddings and head, which a merge takes from the host: what is measured is layers.
All are ordinary folders with tokenizer and processor. OUT/questions.jsonl asks about pictures and sums that none of
them has seen: `read` (two digits from two images), `sum` (three digits as text), `image-sum` (the sum of two digits in
two images, which no model was trained on).
"""

import json
import math
import random
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from PIL import Image
from transformers import CLIPVisionConfig, LlamaConfig, LlamaForCausalLM, LlavaConfig, LlavaForConditionalGeneration

from surgery.arch.language.characters import IMAGE_ID, llava_processor

DIGITS = "0123456789"
BATCH, REPLAY = 128, 24  # rows of a step; of the vlm's, those that are text, as in instruction data
SUMS = 0.12  # share of sums in the base's text
STEPS = {"base": 250, "llm": 300, "vlm": 300}
RATES = {"base": 4e-3, "llm": 1e-3, "vlm": 2e-3}
IMAGE_TOKENS = (8 // 4) ** 2 + 1

Row = tuple[list[int], list[int]]


class Questions:
    """Draws rows of tokens and targets (-100 where nothing is to be predicted)."""

    def __init__(self, tokenizer: object, seed: int) -> None:
        from sklearn.datasets import load_digits

        self.ids = tokenizer.get_vocab()
        self.rng = random.Random(seed)
        found = load_digits()
        self.pixels = [(image * 255 / 16).astype("uint8") for image in found.images]
        self.labels = [int(y) for y in found.target]
        # What is held out is the same for every seed: the last 397 images, and 200 of the thousand sums of three.
        order = list(range(len(self.labels)))
        random.Random(7).shuffle(order)
        self.seen, self.unseen = order[:1400], order[1400:]
        sums = [(a, b, c) for a in range(10) for b in range(10) for c in range(10)]
        random.Random(7).shuffle(sums)
        self.held, self.sums = sums[:200], sums[200:]

    def row(self, question: str, answer: str, images: int = 0) -> Row:
        head = [1, *[IMAGE_ID] * (images * IMAGE_TOKENS), *(self.ids[c] for c in question), self.ids[">"]]
        tail = [*(self.ids[c] for c in answer), 2]
        return head + tail, [-100] * len(head) + tail

    def copy(self) -> Row:
        digits = "".join(self.rng.choice(DIGITS) for _ in range(self.rng.choice((2, 2, 3))))
        return self.row(f"c{digits}", digits)

    def sum(self) -> Row:
        if self.rng.random() < 0.3:
            terms: Sequence[int] = (self.rng.randrange(10), self.rng.randrange(10))
        else:
            terms = self.rng.choice(self.sums)
        return self.row("+".join(map(str, terms)) + "=", str(sum(terms)))

    def text(self, share: float, n: int) -> list[Row]:
        return [self.sum() if self.rng.random() < share else self.copy() for _ in range(n)]

    def read(self, n: int) -> tuple[list[Row], list[int]]:
        pairs = [(self.rng.choice(self.seen), self.rng.choice(self.seen)) for _ in range(n)]
        rows = [self.row("r", f"{self.labels[a]}{self.labels[b]}", images=2) for a, b in pairs]
        return rows, [image for pair in pairs for image in pair]


def padded(rows: Sequence[Row]) -> dict[str, torch.Tensor]:
    """Rows side by side, padded on the right."""
    longest = max(len(tokens) for tokens, _ in rows)
    ids = torch.tensor([tokens + [0] * (longest - len(tokens)) for tokens, _ in rows])
    labels = torch.tensor([targets + [-100] * (longest - len(targets)) for _, targets in rows])
    return {"input_ids": ids, "attention_mask": (ids != 0).long(), "labels": labels}


def train(model: torch.nn.Module, batch: Callable[[], dict[str, torch.Tensor]], steps: int, rate: float) -> None:
    optimiser = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=rate, betas=(0.9, 0.98), weight_decay=0.01
    )
    model.train()
    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = rate * min(1, (step + 1) / 20) * (0.05 + 0.95 * (1 + math.cos(math.pi * step / steps)) / 2)
        inputs = batch()
        labels = inputs.pop("labels")
        logits = model(**inputs, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
    model.eval()


def keep_vocabulary(model: LlamaForCausalLM | LlavaForConditionalGeneration) -> None:
    model.get_input_embeddings().requires_grad_(False)
    model.get_output_embeddings().requires_grad_(False)


def make(out: Path, seed: int = 0, *, shorten: int = 1, per_task: int = 200) -> None:
    """Train the three models into `out`, and write the questions. `shorten` divides the steps, for a look at the path
    alone."""
    torch.manual_seed(seed)
    processor = llava_processor(DIGITS + "+=cr", height=8, width=8, patch=4)
    data = Questions(processor.tokenizer, seed)
    config = LlamaConfig(
        vocab_size=len(processor.tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=6,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=128, tie_word_embeddings=False,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    steps = {name: max(1, n // shorten) for name, n in STEPS.items()}

    base = LlamaForCausalLM(config)
    train(base, lambda: padded(data.text(SUMS, BATCH)), steps["base"], RATES["base"])
    llm = LlamaForCausalLM(config)
    llm.load_state_dict(base.state_dict())
    keep_vocabulary(llm)
    train(llm, lambda: padded(data.text(1, BATCH)), steps["llm"], RATES["llm"])

    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4
    )
    vlm = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=vision,
            text_config=config,
            image_token_index=IMAGE_ID,
            vision_feature_layer=-1,
            vision_feature_select_strategy="full",
            tie_word_embeddings=False,
        )  # fmt: skip
    )
    vlm.model.language_model.load_state_dict(base.model.state_dict())
    vlm.lm_head.load_state_dict(base.lm_head.state_dict())
    keep_vocabulary(vlm)
    pictures = [Image.fromarray(p).convert("RGB") for p in data.pixels]
    pixels = processor.image_processor(pictures, return_tensors="pt")["pixel_values"]

    def images_and_text() -> dict[str, torch.Tensor]:
        rows, chosen = data.read(BATCH - REPLAY)
        return padded(rows + data.text(SUMS, REPLAY)) | {"pixel_values": pixels[chosen]}

    train(vlm, images_and_text, steps["vlm"], RATES["vlm"])
    for name, model, files in (
        ("base", base, processor.tokenizer),
        ("llm", llm, processor.tokenizer),
        ("vlm", vlm, processor),
    ):
        model.save_pretrained(out / name)
        files.save_pretrained(out / name)
    ask(out, data, per_task)


def ask(out: Path, data: Questions, per_task: int) -> None:
    """Write the questions and the pictures that they are about."""
    (out / "pictures").mkdir(parents=True, exist_ok=True)
    rng = random.Random(11)
    rows: list[dict[str, object]] = []
    for task, question in (("read", "r"), ("image-sum", "+")):
        for number in range(per_task):
            pair = [rng.choice(data.unseen) for _ in "ab"]
            for image in pair:
                Image.fromarray(data.pixels[image]).save(out / "pictures" / f"{image}.png")
            a, b = (data.labels[image] for image in pair)
            answer = f"{a}{b}" if task == "read" else str(a + b)
            # Read as text: 07 is not 7.
            row = {"id": f"{task}-{number}", "question": question, "answer": answer, "answer_type": "string"}
            rows.append(row | {"image": [f"pictures/{image}.png" for image in pair], "task": task})
    for number, terms in enumerate(data.held[:per_task]):
        text = "+".join(map(str, terms)) + "="
        rows.append({"id": f"sum-{number}", "question": text, "answer": sum(terms), "task": "sum"})
    (out / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    torch.set_num_threads(1)
    make(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0)
