"""surgery: edit pretrained checkpoints, and know afterwards what was done.

Importing this package imports nothing heavy. The public calls are loaded on first use:

    surgery.open("dit-digits")        a checkpoint: names, shapes, digests, lazy reads
    surgery.load("out/g")             the model itself, edited modules rebuilt without running code from the folder
    surgery.load_processor("out/vlm") what turns text and images into its inputs, for models of transformers
    surgery.apply("graft", ...)       an operation, as the command of that name
    surgery.cast("llama", ...)        the same: every operation is a function of this module
    surgery.run("recipe.yaml")        a recipe: only what is needed and not at hand is made
    surgery.OPERATORS                 the operators that a graft can put in
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_PUBLIC = {
    "open": "surgery.api:open",
    "load": "surgery.api:load",
    "load_processor": "surgery.api:load_processor",
    "apply": "surgery.api:apply",
    "run": "surgery.api:run",
    "OPERATORS": "surgery.arch.dit.operators:OPERATORS",
    "SurgeryError": "surgery.errors:SurgeryError",
}
__all__ = ["OPERATORS", "SurgeryError", "__version__", "apply", "load", "load_processor", "open", "run"]

if TYPE_CHECKING:
    from surgery.api import apply, load, load_processor, open, run
    from surgery.arch.dit.operators import OPERATORS
    from surgery.errors import SurgeryError


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name not in _PUBLIC:
        if name.startswith("_"):
            raise AttributeError(f"module 'surgery' has no attribute '{name}'")
        return import_module("surgery.api").operation(name)
    module, _, attribute = _PUBLIC[name].partition(":")
    return getattr(import_module(module), attribute)
