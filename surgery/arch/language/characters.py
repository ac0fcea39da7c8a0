"""A character-level tokenizer, and the processor of a small LLaVA around it: real files, made without a download.

They are what models that we train from nothing come with, so that such a model is a folder like any other. A prompt is
the user's text with an image's placeholder where the image stands, then `>`; the answer ends with `</s>`.
"""

from typing import Any

SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<image>")
IMAGE_ID = SPECIAL.index("<image>")

_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'user' %}<s>"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for piece in message['content'] %}"
    "{% if piece['type'] == 'image' %}<image>{% else %}{{ piece['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{% else %}>{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for piece in"
    " message['content'] %}{{ piece['text'] }}{% endfor %}{% endif %}</s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}>{% endif %}"
)


def character_tokenizer(alphabet: str, *, template: str = _TEMPLATE) -> Any:
    """A transformers tokenizer with one id a character of `alphabet` and `>`, after the five of SPECIAL;
    others are `<unk>`.

    It saves as tokenizer.json and its configs; padding is on the left, as generation in batches needs it.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    names = [*SPECIAL, *sorted({*alphabet, ">"})]
    core = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    core.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=["<image>"],
        padding_side="left",
        clean_up_tokenization_spaces=False,
        chat_template=template,
    )


def llava_processor(alphabet: str, *, height: int, width: int, patch: int, template: str = _TEMPLATE) -> Any:
    """A LlavaProcessor for images of height x width pixels, cut into patches of `patch`, with that tokenizer.

    Pixels become (value/255 - 0.5)/0.5, three channels. Images of another size are resized. It goes with a vision tower
    whose features are taken whole (`vision_feature_select_strategy="full"`), plus one class token.
    """
    from transformers import CLIPImageProcessorPil, LlavaProcessor

    size = {"height": height, "width": width}
    images = CLIPImageProcessorPil(
        size=size, do_center_crop=False, crop_size=size, image_mean=[0.5] * 3, image_std=[0.5] * 3, resample=3
    )
    return LlavaProcessor(
        image_processor=images,
        tokenizer=character_tokenizer(alphabet, template=template),
        patch_size=patch,
        vision_feature_select_strategy="full",
        num_additional_image_tokens=1,
        image_token="<image>",
        chat_template=template,
    )
