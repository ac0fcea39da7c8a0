"""Every method that mergekit registers, one tensor at a time: `mergekit.merge_methods` is the library for these.

What a method takes (its parameters, whether it has a base, how many inputs) is read from its own declaration. Importing
that costs what torch costs, so nothing of mergekit is imported until a method of this kind is asked for.
"""

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from surgery.errors import ResourceError, SurgeryError, UsageError, closest, printable

if TYPE_CHECKING:
    import torch

# dare and della draw from torch's global generator: one such tensor at a time, with its own seed.
_GLOBAL_GENERATOR = threading.Lock()


@dataclass(frozen=True)
class Kernel:
    """One tensor's merge by a method of mergekit. `shared` and `per_input` are (name, value) pairs, the latter's values
    in the order of the inputs, for parameters that skip the base without it. `base` is the index of the base among the
    inputs. `dtype` is that of the arithmetic, None for what the inputs promote to."""

    method: str
    shared: tuple[tuple[str, Any], ...] = ()
    per_input: tuple[tuple[str, tuple[Any, ...]], ...] = ()
    base: int | None = None
    dtype: str | None = None


def spec_of(method: str) -> Any:
    """mergekit's declaration of a method. Raises `UsageError` with the nearest names for an unknown one."""
    known = _registered()
    if method not in known:
        raise UsageError(
            "method", f"no merge method is called '{printable(method)}'", hint=closest(method, sorted(known))
        )
    return known[method].spec


def registered_names() -> frozenset[str]:
    """The names of mergekit's methods."""
    return frozenset(_registered())


def _registered() -> Mapping[str, Any]:
    try:
        from mergekit import merge_methods
    except ImportError:
        raise ResourceError(
            "missing-package", "this merge method comes from mergekit", hint="pip install mergekit"
        ) from None
    return {m.spec.name: m for m in _methods(merge_methods)}


def _methods(module: Any) -> Sequence[Any]:
    found = module.registered_methods()
    return list(found.values()) if isinstance(found, Mapping) else list(found)


def needs_base(spec: Any) -> bool:
    """Whether a method must be given the model that its inputs came from (or, of two inputs, which is the first)."""
    return str(spec.contract.base.value) == "required"


def check_inputs(spec: Any, count: int, *, given: bool, among: bool) -> None:
    """Raise `UsageError` unless the method takes `count` inputs, base included: `given` says whether the document has a
    base_model, `among` whether it is one of the inputs."""
    contract = spec.contract
    if needs_base(spec) and not given:
        raise UsageError("base", f"{spec.name} needs a base_model", hint="base_model: MODEL")
    if uses_base(spec) and given and not among:
        raise UsageError(
            "base",
            f"{spec.name}: the base_model is not among the sources of a slice",
            hint="add {model: BASE, layer_range: [first, end]} to the sources of each slice",
        )
    based = among and uses_base(spec)
    limits = (
        (count, contract.min_inputs, contract.max_inputs, "models, the base among them" if based else "models"),
        (count - based, contract.min_non_base, contract.max_non_base, "models beside the base"),
    )
    for have, least, most, what in limits:
        if (least is not None and have < least) or (most is not None and have > most):
            wanted = (
                f"exactly {least}"
                if least == most
                else f"at least {least}"
                if have < (least or 0)
                else f"at most {most}"
            )
            raise UsageError(
                "models",
                f"{spec.name} takes {wanted} {what}, not {have}",
                hint="a mergekit file names as many models as a method takes",
            )


def takes_two(spec: Any) -> bool:
    """Whether a method is between exactly two inputs, one of which counts as the base."""
    return spec.contract.max_inputs == 2


def uses_base(spec: Any) -> bool:
    """Whether a base makes any difference to the method."""
    return str(spec.contract.base.value) not in ("ignored", "forbidden")


def is_random(method: str) -> bool:
    """Whether the method draws random numbers."""
    return method.startswith(("dare", "della"))


def check_value(spec: Any, name: str, value: Any) -> Any:
    """A parameter's value in the type that the method declares. Raises `UsageError`."""
    known = {p.name: p for p in spec.parameters}
    if name not in known:
        raise UsageError(
            "parameter", f"{spec.name} has no parameter '{printable(name)}'", hint=closest(name, sorted(known))
        )
    try:
        return known[name].validate(value)
    except Exception:  # pydantic's error; its text speaks of its own types
        shown = printable(str(value), limit=60)
        kind = getattr(known[name].value_type, "__name__", "another type")
        raise UsageError("parameter", f"{spec.name}: {name} is '{shown}'", hint=f"it is a {kind}") from None


def merge(
    kernel: Kernel, tensors: "Sequence[torch.Tensor]", *, out_dtype: "torch.dtype", seed: int, name: str
) -> "torch.Tensor":
    """The merged tensor, by `mergekit.merge_methods.merge_tensors`. Equal seeds give equal bits."""
    import torch
    from mergekit.merge_methods import merge_tensors

    parameters: dict[str, Any] = {n: v for n, v in kernel.shared}
    parameters |= {n: list(values) for n, values in kernel.per_input}
    dtype = getattr(torch, kernel.dtype) if kernel.dtype else None

    def call() -> Any:
        return merge_tensors(
            list(tensors),
            kernel.method,
            parameters=parameters,
            base_index=kernel.base,
            name=name,
            dtype=dtype,
            out_dtype=out_dtype,
        )

    try:
        if not is_random(kernel.method):
            return call()
        with _GLOBAL_GENERATOR, torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return call()
    except (ValueError, TypeError) as err:  # what a method says of its parameters
        raise UsageError("parameter", _failed(kernel, name, err), hint="check its parameters") from None
    except RuntimeError as err:
        raise SurgeryError("merge", _failed(kernel, name, err), hint="check its parameters") from None


def _failed(kernel: Kernel, name: str, err: Exception) -> str:
    first = printable(str(err).strip().split("\n")[0])
    return f"{kernel.method} could not make '{printable(name)}': {first}"
