"""What a merge of HOST DONOR [BASE] was asked for, and by which method and weights each tensor is made.

An option that the method would not look at is an error: nobody should believe that it did something.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from surgery.arch.language.families import text_config
from surgery.arch.merging.card import card_base
from surgery.arch.merging.numbers.formulas import STREAMED, WITH_BASE, Formula
from surgery.arch.merging.numbers.kernels import (
    Kernel,
    check_inputs,
    check_value,
    needs_base,
    registered_names,
    spec_of,
    takes_two,
    uses_base,
)
from surgery.arch.merging.selection import check_shares, parse_alpha
from surgery.errors import UsageError, closest, printable
from surgery.store.checkpoint import Checkpoint

OWN = (*STREAMED, "swap")  # made here; every other method is mergekit's
_SUM_TO_ONE = ("linear", "slerp", "swap")
SCRATCH = 16 << 20  # bytes that a streamed tensor takes at most
_SPARSE = ("ties", "dare-linear", "dare-ties")


@dataclass(frozen=True)
class Request:
    """What was asked for; fields are those of the operation."""

    layers: str | None = None
    method: str = "linear"
    alpha: str = "0.9"
    alpha2: float | None = None
    density: float | None = None
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    vocab: str = "host"
    dtype: str | None = None
    rounding: str = "nearest"
    numerics: str = "exact"
    compat: str = "none"
    arithmetic: str = "auto"
    param: tuple[str, ...] = ()
    tower: str | None = None
    layer_map: str | None = None
    ignore_extra: bool = False
    chat_template: str | None = None
    strict: bool = False
    force: bool = False


@dataclass(frozen=True)
class Task:
    """How one tensor is made: a formula in pieces, or a kernel on whole tensors. `rows` says for each row of a
    vocabulary which row of the other inputs answers to it, -1 for one that stays the host's. `deltas` are adapters
    (index of the input, index of the first of its two factors among the refs, scale, whether weights are transposed).
    `vocabulary` is a merged tokenizer and the keys of the inputs that it aligns."""

    canonical: str
    formula: Formula | None = None
    kernel: Kernel | None = None
    rows: tuple[tuple[int, ...], ...] = field(default=(), repr=False)
    deltas: tuple[tuple[int, int, float, bool], ...] = ()
    vocabulary: tuple[Any, tuple[Any, ...]] | None = field(default=None, repr=False)


class Method:
    """A method with its weights checked: what a tensor of a layer is made by."""

    def __init__(self, request: Request, host: Checkpoint, donor: Checkpoint, base: Checkpoint | None) -> None:
        self.request, self.name = request, request.method
        self.spec: Any = None
        self.shares = parse_alpha(request.alpha)
        kernel = request.arithmetic == "kernels" or self.name not in OWN
        if request.arithmetic == "stream" and self.name not in OWN:
            raise UsageError(
                "arithmetic", f"--arithmetic stream: {self.name} is made by mergekit's kernel", hint="leave it out"
            )
        if kernel and self.name != "swap":
            self.spec = _spec(self.name)
        # One weight alone beyond 1 leaves the other below 0; two that were both given are meant.
        meant = request.force or (request.alpha2 is not None and self.name not in _SUM_TO_ONE)
        check_shares(self.shares, force=meant)
        with_base = self.name in WITH_BASE if self.spec is None else uses_base(self.spec) and not takes_two(self.spec)
        if base is not None and not with_base:
            why = ", its weights sum to one and the base cancels" if self.name in _SUM_TO_ONE else ""
            raise UsageError(
                "base",
                f"--base {base.name}: {self.name} has no base{why}",
                hint=f"leave it out, or use --method {WITH_BASE[0]}",
            )
        self._base = base is not None
        required = self.name in WITH_BASE if self.spec is None else needs_base(self.spec) and not takes_two(self.spec)
        if base is None and required:
            raise UsageError(
                "base",
                f"--method {self.name} needs --base, the model that host and donor came from",
                hint=base_hint(host, donor),
            )
        if request.alpha2 is not None and not required:
            sums = [a + request.alpha2 for a in self.shares.every]
            if any(abs(s - 1) > 1e-6 for s in sums):
                raise UsageError(
                    "alpha2",
                    f"--alpha2 {request.alpha2:g}: with --alpha {request.alpha} the weights do not sum to 1, so the "
                    "base no longer cancels",
                    hint="give --base BASE --method task-arithmetic, or leave --alpha2 out",
                )
        if self.spec is not None:
            based = self._first_is_base
            check_inputs(self.spec, 3 if base is not None else 2, given=based, among=based)
        self._check_used()
        self.shared = self._parameters()

    @property
    def _first_is_base(self) -> bool:
        """Whether a kernel takes its first input for the base: the base itself, or of two models the host."""
        return self._base or takes_two(self.spec)

    @property
    def _finds_weights(self) -> bool:
        """Whether the method has no weights to be given."""
        return self.spec is not None and not {"weight", "t"} & {p.name for p in self.spec.parameters}

    def _check_used(self) -> None:
        """Raise `UsageError` for an option that the method does not have."""
        request = self.request
        known = {p.name for p in self.spec.parameters} if self.spec is not None else None
        if request.density is not None and ("density" not in known if known is not None else self.name not in _SPARSE):
            raise UsageError(
                "density",
                f"--density {request.density:g}: {self.name} keeps every change whole",
                hint=f"leave it out; it is for {', '.join(_SPARSE)} and mergekit's della, breadcrumbs and their kin",
            )
        if self._finds_weights and request.alpha != "0.9":
            raise UsageError(
                "alpha", f"--alpha {printable(request.alpha)}: {self.name} finds its own weights", hint="leave it out"
            )
        if known is not None and request.rounding != "nearest":
            raise UsageError(
                "rounding",
                f"--rounding {request.rounding}: {self.name} is made by mergekit, which rounds to nearest",
                hint=f"it goes with {', '.join(OWN)}; --dtype float16 keeps small changes too",
            )
        if known is not None and request.numerics != "exact":
            raise UsageError(
                "numerics", f"--numerics {request.numerics}: {self.name} is made by mergekit", hint="leave it out"
            )
        if known is not None and request.compat != "none":
            raise UsageError(
                "compat",
                f"--compat {request.compat}: {self.name} is made by mergekit",
                hint=f"it goes with {', '.join(_SPARSE)}",
            )

    def _parameters(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for item in self.request.param:
            name, sign, value = item.partition("=")
            if not sign:
                raise UsageError("param", f"--param {printable(item)}: not NAME=VALUE", hint="--param epsilon=0.1")
            if self.spec is None:
                raise UsageError(
                    "param",
                    f"--param {printable(item)}: {self.name} is made here and has none of mergekit's parameters",
                    hint="--arithmetic kernels makes it by mergekit",
                )
            found[name] = check_value(self.spec, name, value)
        return found

    def weights(self, share: float) -> tuple[float, float]:
        """(host, donor)."""
        other = self.request.alpha2
        return share, 1.0 - share if other is None else other

    def task(self, canonical: str, share: float, rows: tuple[tuple[int, ...], ...]) -> Task:
        """How a tensor with this share of the host is made."""
        request = self.request
        weights = self.weights(share)
        if self.spec is None:
            ties = self.name in ("ties", "dare-ties")
            return Task(
                canonical,
                Formula(
                    "linear" if self.name == "swap" else self.name,
                    weights,
                    (request.density,) * 2 if request.density is not None else (),
                    normalize=ties if self.name in WITH_BASE else request.alpha2 is not None,
                    compat=request.compat,
                    rounding=request.rounding,
                    numerics=request.numerics,
                ),
                rows=rows,
            )
        known = {p.name: p for p in self.spec.parameters}
        shared = dict(self.shared)
        per_input: dict[str, tuple[Any, ...]] = {}
        if "weight" in known and "weight" not in shared:
            per_input["weight"] = weights
        if "density" in known and "density" not in shared and request.density is not None:
            per_input["density"] = (request.density,) * 2
        if "t" in known and "t" not in shared:
            shared["t"] = weights[1]
        kernel = Kernel(
            self.spec.name,
            tuple(sorted(shared.items())),
            tuple(sorted(per_input.items())),
            base=0 if self._first_is_base else None,
            dtype="float32",
        )
        return Task(canonical, kernel=kernel, rows=rows)

    def said(self, layers: Sequence[int], selected: Sequence[int], *, outside: bool) -> list[dict[str, Any]]:
        """The weights in words that have no direction to mix up, for the report: by layer of `selected`, and last with
        `outside` of the tensors outside layers, where these differ. `layers` are those that a gradient runs over."""
        if self._finds_weights:
            return []
        found: list[dict[str, Any]] = []
        for layer in (*selected, *((None,) if outside else ())):
            host, donor = self.weights(self.shares.at(layer, layers))
            row = {"host": round(host, 6), "donor": round(donor, 6)}
            if found and {k: found[-1][k] for k in row} == row:
                found[-1]["layers"] += [layer] if layer is not None else []
            else:
                found.append({"layers": [layer] if layer is not None else [], **row})
        return found


def _spec(method: str) -> Any:
    """mergekit's declaration of a method, or of its counterpart of one of ours."""
    name = method.replace("-", "_") if method in STREAMED else method
    known = registered_names()
    if name not in known:
        every = sorted({*OWN, *known})
        raise UsageError("method", f"--method {printable(method)}: unknown", hint=closest(method, every))
    return spec_of(name)


def base_hint(host: Checkpoint, donor: Checkpoint) -> str:
    """Where the base may be found: an ancestor that both records name, else what configs and model cards call their
    origin."""
    mine, theirs = (_ancestors(c) for c in (host, donor))
    shared = [name for digest, name in theirs.items() if digest in mine]
    if shared:
        return f"both come from {printable(shared[0])}: --base {printable(shared[0])}"
    for checkpoint in (donor, host):
        config = checkpoint.part().config or {}
        origin = config.get("_name_or_path") or text_config(config).get("_name_or_path") or card_base(checkpoint)
        if isinstance(origin, str) and origin and origin != checkpoint.name:
            return f"{checkpoint.name} says that it comes from {printable(origin)}; linear, slerp and swap need none"
    return "linear, slerp and swap need none"


def _ancestors(checkpoint: Checkpoint) -> dict[str, str]:
    """Name by digest of everything that a checkpoint was made from, nearest first."""
    record = checkpoint.lineage
    if record is None:
        return {}
    records = [record, *record.get("ancestors", {}).values()]
    return {row["digest"]: name for each in records for name, row in each.get("parents", {}).items()}
