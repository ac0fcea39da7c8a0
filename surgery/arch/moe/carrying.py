"""What travels with a converted checkpoint: its config, the base's config, and the modeling files.

Standard library only; the files are copied as text from `carried/`, never imported here.
"""

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from surgery.arch.moe.families import COE, Family
from surgery.store.checkpoint import Checkpoint
from surgery.store.layout import read_json

BASE_CONFIG = "coe_base_config.json"  # config.json of the base to the byte, so that collapsing is exact
_SHARED_FILES = ("coe_chain.py", "configuration_coe.py")
_REPLACED = ("model_type", "architectures", "auto_map")


def coe_config(config: Mapping[str, Any], family: Family, knobs: Mapping[str, Any]) -> dict[str, Any]:
    """The base's config under another model type, with the classes of the carried files and the knobs of the chain."""
    own = {
        "model_type": family.coe_type,
        "architectures": [family.model_class],
        "auto_map": {
            "AutoConfig": f"configuration_coe.{family.config_class}",
            "AutoModelForCausalLM": f"{family.module}.{family.model_class}",
        },
    }
    return {**config, **own, **knobs}


def base_config(base: Checkpoint, config: Mapping[str, Any]) -> tuple[dict[str, Any], bool]:
    """The plain model's config, and whether it is to the letter the one that lies beside the weights: it is not when
    the converted model's config was edited since, as another library's saving does."""
    plain = {k: v for k, v in config.items() if not k.startswith(COE) and k not in _REPLACED}
    file = base.root / BASE_CONFIG
    if file.is_file():
        original = read_json(file)
        if isinstance(original, dict):
            if {k: v for k, v in original.items() if k not in _REPLACED} == plain:
                return original, True
            before = {k: original[k] for k in _REPLACED if k in original}
            return {**plain, **before}, False
    from surgery.arch.moe.families import FAMILIES

    kind = str(config["model_type"]).removeprefix(COE)
    stem = FAMILIES[kind].stem if kind in FAMILIES else ""
    return {**plain, "model_type": kind, "architectures": [f"{stem}ForCausalLM"]}, False


def carried_files(family: Family) -> dict[str, bytes]:
    """File name -> content of everything that Transformers needs to load a converted model of the family."""
    return {name: _source(name) for name in (*_SHARED_FILES, f"{family.module}.py")}


def is_carried(name: str) -> bool:
    """Whether a side file is one of those that a conversion adds."""
    return name in (*_SHARED_FILES, BASE_CONFIG) or (name.startswith("modeling_coe_") and name.endswith(".py"))


@cache
def _source(name: str) -> bytes:
    return (Path(__file__).parent / "carried" / name).read_bytes()
