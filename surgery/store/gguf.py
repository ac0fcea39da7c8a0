"""Read-only access to GGUF files: their table of tensors, names as transformers has them, and values.

Floats that lie as transformers would have them are byte ranges like any other. Quantised blocks, and query and key
weights of the llama layout, whose rows llama.cpp interleaves, are decoded when they are read, to float32, by the `gguf`
package. What the file says of the model becomes a config. Everything is bounded by the size of the file.
"""

import hashlib
import re
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

from surgery.errors import CheckpointError, ResourceError, printable

if TYPE_CHECKING:
    import torch

_FLOATS = {0: "F32", 1: "F16", 30: "BF16"}
_FORMATS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9
# Elements and bytes of a block, by type.
_BLOCKS = {
    2: (32, 18), 3: (32, 20), 6: (32, 22), 7: (32, 24), 8: (32, 34), 10: (256, 84), 11: (256, 110), 12: (256, 144),
    13: (256, 176), 14: (256, 210),
}  # fmt: skip
# llama.cpp's names of a decoder against transformers'.
_OUTSIDE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_INSIDE = {
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm",
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip
_MODELS = {  # architecture -> (model_type, class)
    "llama": ("llama", "LlamaForCausalLM"),
    "mistral": ("mistral", "MistralForCausalLM"),
    "qwen2": ("qwen2", "Qwen2ForCausalLM"),
    "qwen3": ("qwen3", "Qwen3ForCausalLM"),
}
_CONFIG = {
    "hidden_size": "embedding_length", "intermediate_size": "feed_forward_length", "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count", "num_key_value_heads": "attention.head_count_kv",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon", "rope_theta": "rope.freq_base",
    "max_position_embeddings": "context_length", "vocab_size": "vocab_size", "head_dim": "attention.key_length",
}  # fmt: skip


class GgufTensor(NamedTuple):
    """One row of the table: the name that transformers has, the file's own, shape, type, place, and the number of heads
    whose rows are interleaved (0: none)."""

    name: str
    own: str
    shape: tuple[int, ...]
    kind: int
    offset: int
    nbytes: int
    heads: int

    @property
    def dtype(self) -> str:
        """The dtype that reading it gives."""
        return _FLOATS.get(self.kind, "F32")

    @property
    def is_range(self) -> bool:
        """Whether the file's bytes are the tensor's."""
        return self.kind in _FLOATS and not self.heads


@dataclass(frozen=True)
class Gguf:
    """A parsed header. `told` is the digest of all that the file says beside its tensors: tokenizer, template, …"""

    path: Path
    tensors: tuple[GgufTensor, ...]
    config: Mapping[str, Any]
    told: str


def read_gguf(path: Path) -> Gguf:
    """Parse the header of a GGUF file. Raises `CheckpointError` naming what is wrong."""
    try:
        size = path.stat().st_size
        with open(path, "rb") as handle:
            # The header holds the vocabulary: some megabytes. It is mapped by reads of growing size.
            data = handle.read(min(size, 1 << 26))
    except OSError as err:
        raise CheckpointError("unreadable", f"{path}: {err.strerror}", hint="check the path and its rights") from None
    try:
        return _parse(path, data, size)
    except (struct.error, IndexError, UnicodeDecodeError, OverflowError):
        _bad(path, "the header ends early or is damaged")


def _parse(path: Path, data: bytes, size: int) -> Gguf:
    if data[:4] != b"GGUF":
        _bad(path, "does not start with GGUF")
    version, count, pairs = struct.unpack_from("<IQQ", data, 4)
    if version not in (2, 3):
        _bad(path, f"GGUF version {version}; 2 and 3 are read")
    if count > size or pairs > size:
        _bad(path, "claims more tensors than it has bytes")
    reader = _Cursor(data, 24)
    metadata = {}
    for _ in range(pairs):
        key = reader.string()
        metadata[key] = reader.value(reader.number("<I"))
    told = hashlib.sha256(memoryview(data)[24 : reader.at]).hexdigest()
    kind = str(metadata.get("general.architecture", ""))
    if kind not in _MODELS:
        _bad(path, f"architecture '{printable(kind)}'; known are {', '.join(_MODELS)}")
    rows = []
    for _ in range(count):
        own = reader.string()
        dimensions = [reader.number("<Q") for _ in range(reader.number("<I"))]
        rows.append((own, tuple(reversed(dimensions)), reader.number("<I"), reader.number("<Q")))
    alignment = metadata.get("general.alignment", 32)
    start = -(-reader.at // alignment) * alignment
    heads = metadata.get(f"{kind}.attention.head_count", 0)
    shared = metadata.get(f"{kind}.attention.head_count_kv", heads)
    tensors, taken = [], set()
    for own, shape, code, offset in rows:
        nbytes = _bytes(path, own, shape, code)
        if start + offset + nbytes > size:
            _bad(path, f"'{printable(own)}' lies past the end of the file")
        name = _name(path, own)
        if name in taken:
            _bad(path, f"'{printable(own)}' stands twice")
        taken.add(name)
        # The llama layout interleaves the two halves of each head for its rotary kernel.
        turned = 0
        if kind == "llama" and name.endswith(("q_proj.weight", "q_proj.bias")):
            turned = heads
        elif kind == "llama" and name.endswith(("k_proj.weight", "k_proj.bias")):
            turned = shared
        tensors.append(GgufTensor(name, own, shape, code, start + offset, nbytes, turned))
    return Gguf(path, tuple(tensors), _config(kind, metadata, tensors), told)


def _config(kind: str, metadata: Mapping[str, Any], tensors: list[GgufTensor]) -> dict[str, Any]:
    model_type, name = _MODELS[kind]
    found = {key: metadata[f"{kind}.{own}"] for key, own in _CONFIG.items() if f"{kind}.{own}" in metadata}
    vocabulary = next((t.shape[0] for t in tensors if t.name == "model.embed_tokens.weight"), None)
    if vocabulary is not None:
        found["vocab_size"] = vocabulary
    for key, own in (("bos_token_id", "bos"), ("eos_token_id", "eos"), ("pad_token_id", "padding")):
        if f"tokenizer.ggml.{own}_token_id" in metadata:
            found[key] = metadata[f"tokenizer.ggml.{own}_token_id"]
    # The file has float32 numbers: 1e-05 comes back as 9.999999747378752e-06.
    found = {k: float(f"{v:.7g}") if isinstance(v, float) else v for k, v in found.items()}
    tied = not any(t.name == "lm_head.weight" for t in tensors)
    return {
        "architectures": [name], "model_type": model_type, **found, "hidden_act": "silu",
        "tie_word_embeddings": tied, "dtype": "float32",
    }  # fmt: skip


class GgufValues(Mapping[str, "torch.Tensor"]):
    """The tensors of a file that are not plain byte ranges, decoded when they are asked for."""

    def __init__(self, file: Gguf) -> None:
        self._file = file
        self._rows = {t.name: t for t in file.tensors}

    def __getitem__(self, name: str) -> "torch.Tensor":
        import torch

        try:
            from gguf import GGMLQuantizationType, dequantize
        except ImportError:
            raise ResourceError(
                "missing-package", f"{self._file.path}: reading GGUF needs the gguf package", hint="pip install gguf"
            ) from None
        import numpy as np

        row = self._rows[name]
        with open(self._file.path, "rb") as handle:
            handle.seek(row.offset)
            raw = np.frombuffer(bytearray(handle.read(row.nbytes)), np.uint8)
        if row.kind == 30:
            tensor = torch.from_numpy(raw).view(torch.bfloat16).reshape(row.shape)
        elif row.kind in _FLOATS:
            tensor = torch.from_numpy(raw.view(np.float32 if row.kind == 0 else np.float16)).reshape(row.shape)
        else:
            elements, size = _BLOCKS[row.kind]
            blocks = raw.reshape(*row.shape[:-1], row.shape[-1] // elements * size)
            values = dequantize(blocks, GGMLQuantizationType(row.kind))
            tensor = torch.from_numpy(np.ascontiguousarray(values, np.float32)).reshape(row.shape)
        if row.heads:
            inner = tensor.reshape(row.heads, row.shape[0] // row.heads // 2, 2, *row.shape[1:])
            tensor = inner.swapaxes(1, 2).reshape(row.shape)
        return tensor.contiguous()

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)


class _Cursor:
    """Reads values one after the other."""

    def __init__(self, data: bytes, at: int) -> None:
        self.data, self.at = data, at

    def number(self, form: str) -> Any:
        (value,) = struct.unpack_from(form, self.data, self.at)
        self.at += struct.calcsize(form)
        return value

    def string(self) -> str:
        length = self.number("<Q")
        if length > len(self.data) - self.at:
            raise IndexError
        self.at += length
        return self.data[self.at - length : self.at].decode("utf-8")

    def value(self, kind: int) -> Any:
        """One value; arrays are passed over, since nothing here needs them."""
        if kind in _FORMATS:
            return self.number(_FORMATS[kind])
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            raise IndexError
        inner, count = self.number("<I"), self.number("<Q")
        if inner in _FORMATS:
            self.at += count * struct.calcsize(_FORMATS[inner])
        else:
            for _ in range(count):
                self.value(inner)
        if self.at > len(self.data):
            raise IndexError
        return None


def _bytes(path: Path, own: str, shape: tuple[int, ...], code: int) -> int:
    count = prod(shape)
    if code in _FLOATS:
        return count * (4 if code == 0 else 2)
    if code not in _BLOCKS:
        _bad(path, f"'{printable(own)}' has type {code}, which is not read")
    elements, size = _BLOCKS[code]
    if not shape or shape[-1] % elements:
        _bad(path, f"'{printable(own)}' {list(shape)} is no whole number of blocks")
    return count // elements * size


def _name(path: Path, own: str) -> str:
    match = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)", own)
    inner = (_INSIDE if match[1] is not None else _OUTSIDE).get(match[2]) if match else None
    if match is None or inner is None:
        _bad(path, f"'{printable(own)}' has no counterpart in transformers that is known here")
    return f"model.layers.{int(match[1])}.{inner}.{match[3]}" if match[1] is not None else f"{inner}.{match[3]}"


def _bad(path: Path, what: str) -> NoReturn:
    raise CheckpointError("malformed", f"{path}: {what}", hint="convert it with llama.cpp's or transformers' tools")
