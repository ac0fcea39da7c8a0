"""Chain-of-Experts models as torch modules, from this package's copy of the files that travel with them.

transformers is imported at the top: import this file where a model is needed, not to plan.
"""

from importlib import import_module
from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM

from surgery.arch.moe.families import FAMILIES, Family


def model_class(family: Family) -> Any:
    """The class of converted models of a family; its config class is `model_class(...).config_class`."""
    module = import_module(f"surgery.arch.moe.carried.{family.module}")
    return getattr(module, family.model_class)


def register() -> None:
    """Let Transformers' Auto classes know every converted family, so that no code from a folder is needed."""
    for family in FAMILIES.values():
        kind = model_class(family)
        AutoConfig.register(family.coe_type, kind.config_class, exist_ok=True)
        AutoModelForCausalLM.register(kind.config_class, kind, exist_ok=True)
        # Saving puts the modeling files beside the weights again, for readers without this package.
        kind.config_class.register_for_auto_class()
        kind.register_for_auto_class("AutoModelForCausalLM")
