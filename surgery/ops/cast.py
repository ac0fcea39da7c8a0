"""Cast: floating-point tensors in another precision.

Inputs: one checkpoint of any kind. Changes: the bytes of float tensors that have another dtype, and the dtype that the
config names. Integers, booleans and FP8 are never touched: an FP8 weight means nothing without its scale.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from surgery.arch.carried import FLOATS, SHORT_FLOATS, config_edits, full_name, kept, part_names, side_files, with_dtype
from surgery.arch.patterns import matcher, nearest
from surgery.errors import CheckpointError, UsageError, closest, printable
from surgery.graph.op import Compute, Entry, Param, Plan, PlanContext
from surgery.store.checkpoint import Checkpoint
from surgery.store.header import nbytes_of
from surgery.store.tensors import Part

_LARGEST = {"F64": 1024, "F32": 128, "BF16": 128, "F16": 16}  # exponents: values below 2**n are finite
_SMALL = ("F8", "F6", "F4")
_QUANTIZED = ("quantization_config", "compression_config", "quant_method")


@dataclass(frozen=True)
class Cast:
    """Store the floating-point tensors of a checkpoint in another precision.

    Patterns are names with * (any text) and {n} (one piece), or /regex/. Integer, boolean and FP8 tensors stay as they
    are. A finite value that the new precision cannot hold is an error, not an infinity.

    Examples:

      surgery cast dit-digits --dtype bf16 -o out/half

      surgery cast llama --dtype fp16 --except '*norm*' --shard-size 2GB -o out/llama-16
    """

    dtype: Annotated[str, Param(f"{', '.join(FLOATS)}; fp32, fp16, bf16 for short.")]
    only: Annotated[tuple[str, ...], Param("Cast these tensors alone, repeatable.", (), "PATTERN")] = ()
    except_: Annotated[tuple[str, ...], Param("Leave these tensors as they are, repeatable.", (), "PATTERN")] = ()

    name: ClassVar[str] = "cast"
    version: ClassVar[int] = 1
    parents: ClassVar[int] = 1
    trainer: ClassVar[str | None] = None
    row_wise: ClassVar[bool] = True

    def __post_init__(self) -> None:
        # One name for one dtype: `--dtype bf16` and `--dtype bfloat16` are the same work and the same node.
        name = SHORT_FLOATS.get(self.dtype, self.dtype)
        if name not in FLOATS:
            fp8 = "fp8" in name or "float8" in name
            raise UsageError(
                "dtype",
                f"--dtype {printable(self.dtype)}: " + ("FP8 needs scales beside the weights" if fp8 else "unknown"),
                hint=closest(name, [*FLOATS, *SHORT_FLOATS]),
            )
        object.__setattr__(self, "dtype", name)

    def plan(self, ctx: PlanContext, base: Checkpoint) -> Plan:
        """Every tensor kept or computed, and the dtype keys of the configs."""
        chosen = self._chosen(base)
        target = FLOATS[self.dtype]
        entries: list[Entry] = []
        edited: dict[str, Any] = {}
        edits: tuple[tuple[str, Any, Any], ...] = ()
        counts: dict[str, int] = {}
        for part in base.parts.values():
            after: dict[str, int] = {}
            changed = False
            for name, ref in part.tensors.items():
                cast = full_name(part, name) in chosen and ref.dtype != target
                dtype = target if cast else ref.dtype
                if cast:
                    changed = True
                    counts[ref.dtype] = counts.get(ref.dtype, 0) + 1
                    # What run() compares: absolute values of one side, and three tensors of truths.
                    scratch = max(ref.nbytes, nbytes_of(dtype, ref.shape)) + 3 * nbytes_of("BOOL", ref.shape)
                    entries.append(
                        Compute(
                            part=part.name,
                            name=name,
                            dtype=dtype,
                            shape=ref.shape,
                            how=dtype,
                            refs=(ref,),
                            scratch=scratch,
                        )
                    )
                else:
                    entries.append(kept(part, name, ref))
                if dtype in _LARGEST:
                    after[dtype] = after.get(dtype, 0) + nbytes_of("F32", ref.shape)
            # Loaders take the key for the whole model, so it follows the precision that most of the weights now have.
            if changed and part.config is not None and part.config_file and max(after, key=after.__getitem__) == target:
                config = with_dtype(part.config, self.dtype)
                if config != part.config:
                    edited[part.config_file] = config
                    edits += config_edits(part.config_file, part.config, config)
        report = {"dtype": self.dtype, "cast": counts, "config": [[p, old, new] for p, old, new in edits]}
        return Plan(
            tuple(entries),
            part_names(base),
            side_files(base, edited),
            config_edits=edits,
            warnings=tuple(_warnings(base, counts, self.dtype)),
            report=report,
        )

    def run(self, task: Compute, tensors: list[Any], generator: Any) -> Any:
        """Round to nearest, ties to even. Raises `CheckpointError` where a finite value would become infinite."""
        from surgery.store.dtypes import torch_dtype

        (tensor,) = tensors
        value = tensor.to(torch_dtype(task.dtype))
        narrower = _LARGEST[task.dtype] < _LARGEST[task.refs[0].dtype] or task.dtype == "BF16"
        if narrower and tensor.numel() and bool((value.isinf() & tensor.isfinite()).any()):
            most = float(tensor[tensor.isfinite()].abs().max())
            raise CheckpointError(
                "overflow",
                f"'{printable(task.full_name)}' has values up to {most:.3g}, beyond {self.dtype}",
                hint="cast to bfloat16 or float32, or leave the tensor out with --except",
            )
        return value

    def tensor_params(self, task: Compute) -> list[str]:
        """What a cast tensor depends on beside its input: its dtype, which is part of it."""
        return []

    def describe(self, plan: Plan) -> list[str]:
        """Lines of a dry run."""
        lines = [f"cast     {n:,} {source} -> {FLOATS[self.dtype]}" for source, n in plan.report["cast"].items()]
        return lines + [f"config   {path}: {old} -> {new}" for path, old, new in plan.report["config"]]

    def _chosen(self, base: Checkpoint) -> set[str]:
        """Full names of the float tensors that the patterns ask for. Raises for a pattern without any."""
        for part in base.parts.values():
            method = _quantized(part)
            if method is not None:
                raise CheckpointError(
                    "quantized",
                    f"{base.name}: the weights are quantised ({printable(method)}); a weight and its scale mean "
                    "something only together",
                    hint="cast the model that it was quantised from",
                )
        floats = [full_name(part, n) for part in base.parts.values() for n in _floats(part)]
        found: list[set[str]] = []
        for option, patterns in (("only", self.only), ("except", self.except_)):
            names: set[str] = set()
            for pattern in patterns:
                fits = matcher(pattern)
                matched = {name for name in floats if fits(name)}
                if not matched:
                    raise UsageError(
                        "unmatched",
                        f"--{option} '{printable(pattern)}': no float tensor of {base.name} has such a name",
                        hint=nearest(pattern, floats),
                    )
                names |= matched
            found.append(names)
        only, left_out = found
        return (only if self.only else set(floats)) - left_out


def _floats(part: Part) -> Iterator[str]:
    """Tensors that may be cast: floats, but the scales beside a weight of 8 bits or less, which belong to it."""
    small = {n.rpartition(".")[0] for n, ref in part.tensors.items() if ref.dtype.startswith(_SMALL)}
    for name, ref in part.tensors.items():
        module, _, last = name.rpartition(".")
        if ref.dtype in _LARGEST and not (module in small and "scale" in last):
            yield name


def _quantized(part: Part) -> str | None:
    """How the config says that the part is quantised, if it does."""
    for config in _objects(part.config or {}):
        for key in _QUANTIZED:
            value = config.get(key)
            if value:
                return str(value.get("quant_method", key) if isinstance(value, Mapping) else value)
    return None


def _objects(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    yield config
    for value in config.values():
        if isinstance(value, Mapping):
            yield from _objects(value)


def _warnings(base: Checkpoint, counts: Mapping[str, int], dtype: str) -> Iterator[str]:
    if not counts:
        yield f"{base.name}: every float tensor asked for is {dtype} already; the output is a copy"
    fp8 = sum(ref.dtype.startswith(_SMALL) for ref in base.tensors.values())
    if fp8:
        yield f"{base.name}: {fp8:,} FP8 or smaller tensors and their scales stay as they are"
