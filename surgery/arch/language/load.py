"""A language or vision-language model from its folder, or a language model from a GGUF file: the module, and the
processor or tokenizer beside it.

The classes are those of the installed transformers, and ours for Chain-of-Experts; no code from the folder is run and
nothing is fetched. Loading is strict: a tensor that is missing, left over or of another shape is an error, where
transformers would go on with random weights. transformers is imported inside the functions, since importing it takes
seconds.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgery.arch.moe.families import chain_family
from surgery.errors import CheckpointError, ResourceError, UsageError, closest, printable, wrong_tensors
from surgery.graph.op import json_bytes
from surgery.store.checkpoint import Checkpoint

if TYPE_CHECKING:
    from torch import nn

DTYPES = {
    "bf16": "bfloat16", "bfloat16": "bfloat16", "fp16": "float16", "float16": "float16",
    "fp32": "float32", "float32": "float32", "auto": "auto",
}  # fmt: skip


@dataclass(frozen=True)
class Loaded:
    """A model in evaluation mode and what turns text and images into its inputs.

    `processor` is a transformers processor (models with images) or a tokenizer; `tokenizer` is the tokenizer of both.
    """

    model: Any
    processor: Any

    @property
    def tokenizer(self) -> Any:
        """The processor itself, or the tokenizer in it."""
        return getattr(self.processor, "tokenizer", self.processor)

    @property
    def takes_images(self) -> bool:
        """Whether the processor makes pixel values."""
        return getattr(self.processor, "image_processor", None) is not None


def is_language(base: Checkpoint) -> bool:
    """Whether the checkpoint is one of transformers' models, going by its config."""
    config = base.parts[""].config if "" in base.parts else None
    return config is not None and "_class_name" not in config and ("model_type" in config or "architectures" in config)


def load(base: Checkpoint, *, dtype: str = "auto", attn: str | None = None, device: str = "cpu") -> Loaded:
    """The model and its processor. Arguments and errors as `load_model` and `load_processor`."""
    processor = load_processor(base)  # first: a folder without one is refused before its weights are read
    return Loaded(load_model(base, dtype=dtype, attn=attn, device=device), processor)


def load_model(base: Checkpoint, *, dtype: str = "auto", attn: str | None = None, device: str = "cpu") -> "nn.Module":
    """The model of a transformers folder as a module in evaluation mode.

    dtype  float32, bfloat16, float16, or auto: what the config says, else what is stored
    attn   implementation of attention (eager, sdpa, flash_attention_2, …), transformers' choice if None

    Raises CheckpointError when weights and config do not belong together or the model is of no class that the installed
    transformers has, UsageError for an unknown dtype or attention, ResourceError when a package is missing.
    """
    if dtype not in DTYPES:
        raise UsageError("dtype", f"no dtype '{dtype}'", hint=closest(dtype, list(DTYPES)))
    kind = model_class(base)
    options: dict[str, Any] = {"dtype": DTYPES[dtype]}
    if attn is not None:
        options["attn_implementation"] = attn
    with quiet_transformers():
        try:
            model, info = kind.from_pretrained(
                *_weights(base, options),
                local_files_only=True,
                trust_remote_code=False,
                # Shapes that differ are reported with the rest instead of ending in a table on stderr.
                ignore_mismatched_sizes=True,
                output_loading_info=True,
                **options,
            )
        except ImportError as err:
            raise ResourceError(
                "missing-package",
                f"{base.name}: {first_line(err)}",
                hint="install the package, or choose other options",
            ) from err
        except (ValueError, OSError, RuntimeError, KeyError, TypeError, AttributeError) as err:
            if attn is not None and "attn" in str(err):
                raise UsageError(
                    "attention", f"{base.name}: {first_line(err)}", hint="eager works for every model"
                ) from err
            raise CheckpointError(
                "not-loadable",
                f"{base.name}: {kind.__name__} cannot be built from this folder: {first_line(err)}",
                hint="weights and config.json do not belong together, or need another version of transformers",
            ) from err
    _check(base, info)
    return model.to(device).eval()


def load_processor(base: Checkpoint) -> Any:
    """The processor of a folder (tokenizer, image processor, chat template), or the tokenizer of a text-only model.

    Raises CheckpointError when the folder has none, saying which files it lacks.
    """
    language_config(base)
    if base.layout == "gguf":
        inside = {"gguf_file": base.path.name}
        hints = ("install surgery with its extra 'gguf'", "use the model's folder instead of its GGUF file")
        return _read_processor(base, "AutoTokenizer", "the tokenizer in the file", *hints, **inside)
    here = {name for name in base.side_files if "/" not in name}
    if not here & {"tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json"}:
        raise CheckpointError(
            "no-processor",
            f"{base.name}: no tokenizer beside the weights (no tokenizer.json, tokenizer.model, vocab.json)",
            hint="copy the tokenizer and processor files of the model that it was made from into the folder",
        )
    with_images = {"preprocessor_config.json", "processor_config.json"} & here
    if _is_multimodal(base) and not with_images:
        raise CheckpointError(
            "no-processor",
            f"{base.name}: no processor beside the weights (no processor_config.json, preprocessor_config.json)",
            hint="copy the processor files of the model that it was made from into the folder",
        )
    hints = ("install it", "fetch the tokenizer and processor files again")
    return _read_processor(base, "AutoProcessor" if with_images else "AutoTokenizer", "its processor", *hints)


def tokenizer_files(base: Checkpoint) -> dict[str, bytes]:
    """The tokenizer inside a GGUF file as a folder has it, chat template included: `tokenizer.json` and
    `tokenizer_config.json`.

    Raises CheckpointError where transformers cannot read it, ResourceError without the gguf package.
    """
    from tempfile import TemporaryDirectory

    tokenizer = load_processor(base)
    with TemporaryDirectory() as folder:
        with quiet_transformers():
            tokenizer.save_pretrained(folder, save_jinja_files=False)
        config = json.loads((Path(folder) / "tokenizer_config.json").read_text("utf-8"))
        for circumstance in ("is_local", "local_files_only"):  # of this reading, not of the tokenizer
            config.pop(circumstance, None)
        whole = (Path(folder) / "tokenizer.json").read_bytes()
    return {"tokenizer.json": whole, "tokenizer_config.json": json_bytes(config)}


def _read_processor(base: Checkpoint, kind: str, what: str, if_lacking: str, if_bad: str, **more: Any) -> Any:
    """What transformers' class `kind` makes of the folder; the rest are words for errors: what it is called, and what
    to do where a package is missing or it cannot be read."""
    import transformers

    with quiet_transformers():
        try:
            auto = getattr(transformers, kind)
            return auto.from_pretrained(base.root, local_files_only=True, trust_remote_code=False, **more)
        except ImportError as err:
            raise ResourceError(
                "missing-package", f"{base.name}: {what} needs more: {first_line(err)}", hint=if_lacking
            ) from err
        except Exception as err:  # transformers raises whatever its parsers raise
            raise CheckpointError(
                "bad-processor", f"{base.name}: {what} cannot be read: {first_line(err)}", hint=if_bad
            ) from err


def _weights(base: Checkpoint, options: dict[str, Any]) -> tuple[Any]:
    """Where from_pretrained takes weights from: the folder, or for a GGUF file our reader (put into `options`)."""
    if base.layout != "gguf":
        return (base.root,)
    import transformers

    options["config"] = transformers.AutoConfig.for_model(**base.config)
    options["state_dict"] = {name: base.read(name) for name in base.tensors}
    return (None,)


def language_config(base: Checkpoint) -> Mapping[str, Any]:
    """The config of a checkpoint that is a transformers model; UsageError or CheckpointError for any other."""
    if "" not in base.parts:
        raise UsageError(
            "not-language", f"{base.name}: a pipeline, not a language model", hint=f"parts: {', '.join(base.parts)}"
        )
    config = base.config
    if not is_language(base):
        raise CheckpointError(
            "not-language",
            f"{base.name}: its config.json is not that of a transformers model",
            hint="a language or vision-language model is needed here",
        )
    return config


def _is_multimodal(base: Checkpoint) -> bool:
    return any(
        k in language_config(base) for k in ("vision_config", "vit_config", "image_token_index", "image_token_id")
    )


def model_class(base: Checkpoint) -> Any:
    """transformers' class that the config names, else the one that fits its model type. Raises CheckpointError."""
    config = language_config(base)
    if (chain := chain_family(config)) is not None:
        from surgery.arch.moe.build import model_class as chain_class

        return chain_class(chain)
    import transformers

    named = config.get("architectures") or []
    for name in named:
        found = getattr(transformers, name, None) if isinstance(name, str) and name.isidentifier() else None
        if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
            return found
    if named:
        raise CheckpointError(
            "unknown-class",
            f"{base.name}: transformers {transformers.__version__} has no class {printable(str(named[0]), limit=80)}",
            hint="code from the folder is not run; install a transformers that knows the model",
        )
    from transformers.models.auto import modeling_auto

    for table in (
        modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    ):
        names = table.get(str(config.get("model_type")))
        if names:
            return getattr(transformers, names if isinstance(names, str) else names[0])
    raise CheckpointError(
        "unknown-class",
        f"{base.name}: no model of type {printable(str(config.get('model_type')), limit=80)} that writes text",
        hint="a language or vision-language model is needed here",
    )


def _check(base: Checkpoint, info: Mapping[str, Any]) -> None:
    """Refuse a model of which a tensor is random, lost or of another shape."""
    faults = [f"'{printable(n)}' is missing" for n in sorted(info["missing_keys"])]
    faults += [f"'{printable(n)}' is not part of the model" for n in sorted(info["unexpected_keys"])]
    faults += [
        f"'{printable(n)}' is {list(have)}, the config asks for {list(want)}"
        for n, have, want in sorted(info["mismatched_keys"], key=lambda row: row[0])
    ]
    faults += [first_line(message) for message in info.get("error_msgs") or ()]
    if faults:
        raise wrong_tensors(base.name, faults)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """No bars and reports of transformers: what is wrong is said by our errors. Settings are put back."""
    from transformers.utils import logging

    before, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        if bars:
            logging.enable_progress_bar()


def first_line(err: object) -> str:
    """The first line of another library's error, printable, without its full stop."""
    lines = str(err).strip().splitlines() or [type(err).__name__]
    return printable(lines[0], limit=200).rstrip(".")
