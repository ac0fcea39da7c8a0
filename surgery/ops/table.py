"""The operations by name, as "module:class", imported on first use. An operation is its file and one line here;
those of other packages come by their entry points (`graph.plugins`)."""

from collections.abc import Mapping
from typing import Any

from surgery.errors import UsageError, closest, printable
from surgery.graph.op import load_attribute
from surgery.graph.plugins import load_plugin, plugin_ops

OPS: Mapping[str, str] = {
    "init": "surgery.ops.init:Init",
    "coe": "surgery.ops.coe:Coe",
    "graft": "surgery.ops.graft:Graft",
    "merge": "surgery.ops.merge:Merge",
    "lora-extract": "surgery.ops.lora_extract:LoraExtract",
    "lora-apply": "surgery.ops.lora_apply:LoraApply",
    "cast": "surgery.ops.cast:Cast",
    "rename": "surgery.ops.rename:Rename",
    "slice": "surgery.ops.slice:Slice",
    "extract": "surgery.ops.extract:Extract",
    "reshard": "surgery.ops.reshard:Reshard",
    "scale": "surgery.ops.scale:Scale",
    "adaptvis-attach": "surgery.ops.adaptvis:AdaptVis",
    "train-coe": "surgery.ops.train_coe:TrainCoe",
    "train-diffusion": "surgery.ops.train_diffusion:TrainDiffusion",
    "train-classifier": "surgery.ops.train_classifier:TrainClassifier",
    "train-scenes": "surgery.ops.train_scenes:TrainScenes",
}


def load_op(name: str) -> Any:
    """The class of the operation `name`, ours or a plug-in's; a `UsageError` with the nearest names otherwise."""
    if name in OPS:
        return load_attribute(OPS[name])
    known = plugin_ops()
    if name not in known:
        raise UsageError("unknown-op", f"no operation '{printable(name)}'", hint=closest(name, [*OPS, *known]))
    return load_plugin(name)
