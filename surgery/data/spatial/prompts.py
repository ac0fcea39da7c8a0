"""From questions and pictures to a model's inputs, by its own processor and chat template."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgery.errors import CheckpointError, ResourceError, UsageError, printable

if TYPE_CHECKING:
    from PIL.Image import Image

    from surgery.data.spatial.items import Item


def open_image(path: Path) -> "Image":
    """The picture as RGB. Raises CheckpointError when it cannot be read, ResourceError without Pillow."""
    try:
        from PIL import Image
    except ImportError:
        raise ResourceError("missing-package", "pictures need Pillow", hint="install surgery[images]") from None
    try:
        with Image.open(path) as picture:
            return picture.convert("RGB")
    except FileNotFoundError:
        raise UsageError("no-image", f"{path} does not exist", hint="check the path of the picture") from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as err:
        raise CheckpointError("bad-image", f"{path}: {printable(str(err))}", hint="name a PNG or JPEG file") from None


def prompt_text(processor: Any, question: str, images: int, template: str | None = None) -> str:
    """The prompt of one question about `images` pictures, before images are expanded to their tokens.

    `template` stands in for the chat template: text with {question}, and the model's image placeholder where the
    pictures go, as in "<image>\\nUSER: {question}\\nASSISTANT:". Raises UsageError when there is neither.
    """
    if template is not None:
        if "{question}" not in template:
            raise UsageError(
                "template", f"--template {printable(template)}: no {{question}} in it", hint="'<image>\\n{question}'"
            )
        return template.replace("\\n", "\n").replace("{question}", question)
    if not getattr(processor, "chat_template", None):
        raise UsageError(
            "no-template",
            "the checkpoint has no chat template",
            hint="give --template '<image>\\nUSER: {question}\\nASSISTANT:', with the model's own image placeholder",
        )
    content = [{"type": "image"} for _ in range(images)] + [{"type": "text", "text": question}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    return str(text)


def encode(
    processor: Any, asked: Sequence[tuple[Sequence["Image"], str]], *, template: str | None = None
) -> dict[str, Any]:
    """Inputs of a batch of (pictures, question): ids padded on the left, attention mask, pixels, as the model takes
    them. Raises UsageError when prompts and pictures do not fit each other, and like `prompt_text`."""
    texts = [prompt_text(processor, question, len(images), template) for images, question in asked]
    images = [list(pictures) for pictures, _ in asked]
    processor.tokenizer.padding_side = "left"
    if processor.tokenizer.pad_token is None:
        processor.tokenizer.pad_token = processor.tokenizer.eos_token
    # Templates write the start of the text themselves where a model has one; a second one would change the model.
    start = processor.tokenizer.bos_token
    special = not (start and texts[0].startswith(start))
    try:
        batch = processor(
            images=images, text=texts, padding=len(texts) > 1, add_special_tokens=special, return_tensors="pt"
        )
    except (ValueError, IndexError, TypeError) as err:
        raise UsageError(
            "prompt",
            f"the processor cannot put pictures and prompt together: {printable(str(err))}",
            hint="the prompt needs one image placeholder for each picture",
        ) from err
    return dict(batch)


def encode_items(processor: Any, items: Sequence["Item"], *, template: str | None = None) -> dict[str, Any]:
    """`encode` of the pictures and questions of items."""
    return encode(processor, [([open_image(p) for p in i.images], i.question) for i in items], template=template)
