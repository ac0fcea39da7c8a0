"""What is declared of an operator that a graft can use: arguments, tensors, cost, fresh values, warm start.

`OperatorSpec` is the frame and `operators.py` the list of operators. Standard library only; torch is imported by
`build` and where the sources draw.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from surgery.arch.sources import Fresh, Same, Shape, Source
from surgery.errors import UsageError, closest

if TYPE_CHECKING:
    import torch
    from torch import nn


@dataclass(frozen=True)
class Param:
    """One argument of an operator. `low` is the least value allowed; a float must lie above it. `high` is the most: no
    model has a use for more, and sizes made from it still fit a file."""

    kind: type
    default: int | float | bool | str | None
    help: str
    low: float = -math.inf
    high: float = 1_000_000
    choices: tuple[str, ...] = ()


@dataclass(frozen=True)
class Place:
    """The block that an operator goes into: width, heads, tokens."""

    dim: int
    heads: int
    n_tokens: int


Args = Mapping[str, Any]
Layout = dict[str, Fresh]


def _no_check(at: Place, args: Args) -> None:
    """Any width, number of heads and of tokens will do."""


@dataclass(frozen=True)
class OperatorSpec:
    """What is known of one operator without building it.

    `auto_init` is the better start before distillation ("copy" or "random"); `version` rises when a trained operator of
    the same name and arguments would compute something else.
    """

    name: str
    slots: tuple[str, ...]
    summary: str
    layout_of: Callable[[Place, Args], Layout]
    cost_of: Callable[[Place, Args], tuple[int, int]]
    warm_of: Callable[[Place, Args, Layout, Mapping[str, Shape], Sequence[int] | None], dict[str, Source]]
    params_of: Mapping[str, Param] = field(default_factory=dict)
    check: Callable[[Place, Args], None] = _no_check
    auto_init: str = "random"
    version: int = 1

    def resolve(self, args: Args) -> dict[str, Any]:
        """All arguments with defaults filled in and numbers in one canonical form (3, never 3.0; text is parsed).

        Raises UsageError for an unknown name, a wrong type and a value out of bounds.
        """
        for name in args:
            if name not in self.params_of:
                known = list(self.params_of)
                hint = closest(name, known) if known else f"{self.name} takes no arguments"
                raise UsageError("bad-operator", f"operator {self.name!r} has no argument {name!r}", hint=hint)
        return {
            name: _value(self.name, name, param, args[name]) if name in args else param.default
            for name, param in self.params_of.items()
        }

    def layout(self, *, dim: int, heads: int, n_tokens: int, **args: Any) -> Layout:
        """Relative tensor name -> fresh value, as the operator's constructor would draw it."""
        at, full = self._place(dim, heads, n_tokens, args)
        return self.layout_of(at, full)

    def tensors(self, *, dim: int, heads: int, n_tokens: int, **args: Any) -> dict[str, Shape]:
        """Relative tensor name -> shape. Raises UsageError where the operator does not fit the block."""
        layout = self.layout(dim=dim, heads=heads, n_tokens=n_tokens, **args)
        return {name: value.shape for name, value in layout.items()}

    def params(self, *, dim: int, heads: int, n_tokens: int, **args: Any) -> int:
        """Number of parameters."""
        return sum(math.prod(shape) for shape in self.tensors(dim=dim, heads=heads, n_tokens=n_tokens, **args).values())

    def flops(self, *, dim: int, heads: int, n_tokens: int, **args: Any) -> tuple[int, int]:
        """(core, features) FLOPs of one block for one sample; see the head of the file for what counts."""
        at, full = self._place(dim, heads, n_tokens, args)
        return self.cost_of(at, full)

    def build(
        self, *, dim: int, heads: int, n_tokens: int, generator: "torch.Generator | None" = None, **args: Any
    ) -> "nn.Module":
        """The module, float32, every tensor drawn in the order of the layout; torch's global state is not used.

        Without a generator the seed is 0. Under `torch.device("meta")` nothing is drawn.
        """
        import torch

        from surgery.arch.dit import modeling

        at, full = self._place(dim, heads, n_tokens, args)
        device = torch.get_default_device()
        with torch.device("meta"):
            module = modeling.OPERATORS[self.name](dim, heads, n_tokens, **full)
        if device.type == "meta":
            return module
        draw = generator if generator is not None else torch.Generator().manual_seed(0)
        state = {name: value.evaluate({}, draw).to(device) for name, value in self.layout_of(at, full).items()}
        module.load_state_dict(state, strict=True, assign=True)
        return module

    def copy_plan(
        self,
        source_tensors: Mapping[str, Shape],
        *,
        dim: int,
        heads: int,
        n_tokens: int,
        source_op: tuple[str, Args] | None = None,
        units: Sequence[int] | None = None,
        **args: Any,
    ) -> dict[str, Source]:
        """Relative tensor name -> where its values come from when the start is copied from the replaced operator.

        `source_tensors` are the replaced operator's names (relative) and shapes, `source_op` its name and arguments
        where it is itself a graft, `units` the hidden units to keep (mlp only; default the first). Tensors without
        counterpart keep their fresh value, whose `note` says so. The same operator with the same arguments is copied
        whole.
        """
        at, full = self._place(dim, heads, n_tokens, args)
        layout = self.layout_of(at, full)
        old = {name: tuple(shape) for name, shape in source_tensors.items()}
        if units is not None and self.name != "mlp":
            raise UsageError("bad-units", f"operator {self.name!r} has no hidden units to choose from")
        if source_op is not None:
            same = source_op[0] == self.name and self.resolve(source_op[1]) == full
            if same and units is None and {name: value.shape for name, value in layout.items()} == old:
                return {name: Same(name) for name in layout}
        return self.warm_of(at, full, layout, old, units)

    def _place(self, dim: int, heads: int, n_tokens: int, args: Args) -> tuple[Place, dict[str, Any]]:
        at, full = Place(dim, heads, n_tokens), self.resolve(args)
        self.check(at, full)
        return at, full


def _value(op: str, name: str, param: Param, value: object) -> Any:
    """`value` as the type of `param`, or UsageError."""
    if value is None and param.default is None:
        return None
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "a word"}
    bound = f" of at least {param.low:g}" if param.kind is int else f" above {param.low:g}"
    expected = words[param.kind] + (bound if math.isfinite(param.low) else "")
    if param.choices:
        expected = "one of " + ", ".join(param.choices)
    parsed: Any = None
    if param.kind is bool:
        parsed = {"true": True, "false": False}.get(str(value).lower())
    elif param.kind is str:
        parsed = value if isinstance(value, str) else None
    elif not isinstance(value, bool) and isinstance(value, int | float | str):
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        if math.isfinite(number):
            parsed = int(number) if number == int(number) else number
    fits = parsed is not None and (not param.choices or parsed in param.choices)
    if fits and param.kind is int:
        fits = isinstance(parsed, int) and parsed >= param.low
    elif fits and param.kind is float:
        fits = parsed > param.low
    if fits and param.kind in (int, float) and parsed > param.high:
        fits, expected = False, f"at most {param.high:,.0f}"
    if not fits:
        raise UsageError(
            "bad-operator", f"operator {op!r}: {name} must be {expected}, not {value!r}", hint=f"{name}: {param.help}"
        )
    return parsed
