"""How a question is put: its wording, and the model's own chat template around it."""

from collections.abc import Sequence
from typing import Any

from surgery.errors import CheckpointError, UsageError, closest, printable
from surgery.evals.vqa.rows import LETTERS, Item

STYLES = {
    "direct": "ask for the answer alone",
    "cot": "ask for reasoning first, then the answer",
    "bare": "the question as it stands in the data",
}
_ENDINGS = {
    "choice": ("Answer with the letter of the right option alone.", "the letter of the right option"),
    "integer": ("Answer with a whole number alone.", "a whole number"),
    "float": ("Answer with a number alone, with {p} decimals.", "a number with {p} decimals"),
    "list": ("Answer with a list in brackets alone, such as [1, 2, 3].", "a list in brackets"),
    "string": ("Answer with a word or a short phrase alone.", "a word or a short phrase"),
}


def wording(item: Item, style: str) -> str:
    """The text of the question in a style of STYLES. A style that asks for the answer alone works against a model that
    was taught to reason first, so the style is part of every result. Raises UsageError for an unknown style."""
    if style not in STYLES:
        raise UsageError("prompt", f"no prompt style '{style}'", hint=closest(style, list(STYLES)))
    lines = [item.question]
    if item.choices and style != "bare":
        lines += [f"({LETTERS[i]}) {choice}" for i, choice in enumerate(item.choices)]
    alone, last = (text.format(p=item.precision) for text in _ENDINGS[item.answer_type])
    if style == "direct":
        lines.append(alone)
    elif style == "cot":
        lines.append(f'Think step by step. End with "The answer is" and {last}.')
    return "\n".join(lines)


def render(processor: Any, item: Item, style: str, *, template: str | None = None) -> str:
    """The prompt as the model reads it, up to where its answer begins; images stand where `<image>` does, else first.

    `template` replaces the processor's chat template; "none" does without one. Raises CheckpointError when there is no
    template, UsageError when the text names another number of images than the item has.
    """
    text = wording(item, style)
    pieces = text.split("<image>")
    if len(pieces) > 1 and len(pieces) - 1 != len(item.images):
        raise UsageError(
            "image-count",
            f"item '{printable(item.id)}': the question names {len(pieces) - 1} images and has {len(item.images)}",
            hint="write <image> once for each image, or not at all",
        )
    content: list[dict[str, str]] = []
    if len(pieces) == 1:
        content = [*({"type": "image"} for _ in item.images), {"type": "text", "text": text}]
    else:
        for number, piece in enumerate(pieces):
            content += [{"type": "image"}] if number else []
            content += [{"type": "text", "text": piece}] if piece else []
    if template == "none":
        mark = getattr(processor, "image_token", "")
        return "".join(mark if c["type"] == "image" else c["text"] for c in content)
    if template is None and not getattr(processor, "chat_template", None):
        raise CheckpointError(
            "no-template",
            "the model's processor has no chat template",
            hint="give one with --chat-template FILE.jinja, or --chat-template none to prompt without",
        )
    options = {} if template is None else {"chat_template": template}
    takes_images = getattr(processor, "image_processor", None) is not None
    # Templates of text-only models want plain text.
    said: Any = content if takes_images else text
    return str(
        processor.apply_chat_template(
            [{"role": "user", "content": said}], add_generation_prompt=True, tokenize=False, **options
        )
    )


def check_images(items: Sequence[Item], takes_images: bool, name: str) -> None:
    """Refuse questions about images for a model that takes none."""
    first = next((item for item in items if item.images), None)
    if first is not None and not takes_images:
        raise UsageError(
            "no-images",
            f"{name}: takes no images, and item '{printable(first.id)}' has one",
            hint="name a vision-language model",
        )
