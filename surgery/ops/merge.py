"""Merge: a text model into a vision-language model's language tower, or any models as a mergekit file says.

Papers: Bring Reason to Vision (arXiv 2505.05464), Model Soups (2203.05482), Task Arithmetic (2212.04089), TIES
(2306.01708), DARE (2311.03099); other methods are mergekit's. Inputs: host, donor and, for task vectors, their base; or
with `config` the models that it numbers. Changes: the selected tensors of the tower, nothing else.
"""

from collections.abc import Iterator
from dataclasses import MISSING, dataclass, fields
from typing import Annotated, Any, ClassVar

from surgery.arch.carried import FLOATS, SHORT_FLOATS
from surgery.errors import UsageError, closest, printable
from surgery.graph.op import Compute, Param, Plan, PlanContext
from surgery.store.checkpoint import Checkpoint

_TIES = ("ties", "dare-linear", "dare-ties")
_IN_DOCUMENT = {
    "method": "merge_method: NAME", "alpha": "parameters: {weight: …} of each model", "dtype": "out_dtype: NAME",
    "density": "parameters: {density: …}", "param": "parameters: {NAME: VALUE}", "chat_template": "chat_template: NAME",
}  # fmt: skip
_WITH_CONFIG = ("config", "arithmetic", "strict", "force")  # all else a document says itself
_WORDS = {
    "vocab": ("host", "overlap", "by-token"),
    "rounding": ("nearest", "stochastic"),
    "numerics": ("exact", "fast"),
    "compat": ("none", "paper"),
    "arithmetic": ("auto", "stream", "kernels", "mergekit"),
}


@dataclass(frozen=True)
class Merge:
    """Merge the text model DONOR into the language tower of HOST.

    Without options: 0.9 of the host and 0.1 of the donor in every decoder layer and the final norm; embeddings, head,
    projector and vision encoder stay the host's, byte for byte. --layers 12-28 includes both ends, 12:28 stops before
    28. Methods: linear, swap, slerp, task-arithmetic, ties, dare-linear, dare-ties (in pieces, any size of model), and
    every method that mergekit registers. A mergekit YAML file is merged by --config. Each model may have a LoRA adapter
    behind it, MODEL+ADAPTER.

    Examples:

      surgery merge vlm llm --layers 12-28 -o out

      surgery merge vlm llm+adapter --layers 12-28 -o out

      surgery merge vlm llm --base base --method ties --density 0.2 -o out

      surgery merge --config recipe.yml -o out
    """

    layers: Annotated[str | None, Param("Layers to merge: 12-28, 12:28, 6-, 0,2-3 [default: all, and the final norm].",
                                        ("-l",), "SPEC")] = None  # fmt: skip
    method: Annotated[str, Param("linear, swap, slerp, task-arithmetic, ties, dare-linear, dare-ties, or mergekit's.",
                                 ("-m",), "NAME")] = "linear"  # fmt: skip
    alpha: Annotated[str | None, Param("Share of the host: 0.9, a gradient 1.0,0.9,0.7 over the layers, or @FILE "
                                       "[default: 0.9; swap: 0].", (), "SHARE")] = None  # fmt: skip
    alpha2: Annotated[float | None, Param("Weight of the donor [default: 1 - alpha].")] = None
    density: Annotated[float | None, Param("Share of each task vector that is kept [default: 0.2 for ties, dare].")] = (
        None
    )
    include: Annotated[tuple[str, ...], Param("Also merge: attn, mlp, norms, final-norm, embed, head or a pattern.",
                                              (), "WHAT")] = ()  # fmt: skip
    exclude: Annotated[tuple[str, ...], Param("Leave out, in the same words; repeatable.", (), "WHAT")] = ()
    vocab: Annotated[str, Param("Embeddings and head: host, overlap (equal ids), by-token (equal tokens).")] = "host"
    dtype: Annotated[str | None, Param("Store floats as bfloat16, float16, float32 [default: as the host].")] = None
    rounding: Annotated[str, Param("nearest, or stochastic: unbiased where bfloat16 swallows small changes.")] = (
        "nearest"
    )
    numerics: Annotated[str, Param("exact, or fast: torch.lerp in linear merges, whose last digits differ from one "
                                   "processor to another.")] = "exact"  # fmt: skip
    compat: Annotated[str, Param("paper: the reference code's TIES and its DARE, which does not rescale.")] = "none"
    arithmetic: Annotated[str, Param("auto, stream (ours, in pieces), kernels (mergekit's, a tensor at a time), "
                                     "mergekit (its whole run, of a --config).")] = "auto"  # fmt: skip
    param: Annotated[tuple[str, ...], Param("Parameter of a mergekit method, repeatable.", (), "NAME=VALUE")] = ()
    tower: Annotated[str | None, Param("Prefix of the host's tower, where several fit.", (), "PREFIX")] = None
    layer_map: Annotated[str | None, Param("Pair layers by hand: 0:0,2:1, or a JSON file of them.", (),
                                           "HOST:DONOR,...")] = None  # fmt: skip
    ignore_extra: Annotated[bool, Param("Leave out tensors of the layers that only the donor has.")] = False
    chat_template: Annotated[str | None, Param("host, donor, or a file [default: host].", (), "WHICH")] = None
    strict: Annotated[bool, Param("Stop at warnings of the preflight.")] = False
    force: Annotated[bool, Param("Merge models that do not fit or look unrelated, and alpha outside [0, 1].")] = False
    config: Annotated[str | None, Param("A mergekit document as JSON with numbers for models.", (), "JSON")] = None

    name: ClassVar[str] = "merge"
    version: ClassVar[int] = 2
    parents: ClassVar[tuple[int, int | None]] = (1, None)
    parent_names: ClassVar[tuple[str, ...]] = ("HOST",)

    def __post_init__(self) -> None:
        from surgery.arch.merging.selection import resolve_alpha

        if self.config is not None:
            self._check_document()
        method = self.method
        self._set("method", method.replace("_", "-") if method in ("task_arithmetic",) else method)
        self._set("alpha", resolve_alpha(("0" if method == "swap" else "0.9") if self.alpha is None else self.alpha))
        if method == "swap" and self.alpha not in ("0", "0.0"):
            raise UsageError("alpha", "swap takes the donor's tensors whole", hint="--method linear --alpha blends")
        if self.layer_map is not None:
            from surgery.arch.language.towers import resolve_layer_map

            self._set("layer_map", resolve_layer_map(self.layer_map))
        if self.density is None and method in _TIES:
            self._set("density", 0.2)
        if self.density is not None and not 0 < self.density <= 1:
            raise UsageError("density", f"--density {self.density:g}: not in (0, 1]", hint="0.2 keeps a fifth")
        if self.dtype is not None:
            dtype = SHORT_FLOATS.get(self.dtype, self.dtype)
            if dtype not in FLOATS:
                raise UsageError("dtype", f"--dtype {printable(dtype)}: unknown", hint=closest(dtype, list(FLOATS)))
            self._set("dtype", dtype)
        for option, known in _WORDS.items():
            value = getattr(self, option)
            if value not in known:
                raise UsageError(option, f"--{option} {printable(value)}: unknown", hint=closest(value, list(known)))
        if self.numerics == "fast" and (self.method not in ("linear", "swap") or self.rounding != "nearest"):
            raise UsageError(
                "numerics",
                "--numerics fast is of linear merges that round to the nearest",
                hint="leave it out; other methods have one way",
            )

    @property
    def with_torch(self) -> bool:
        """Whether `stream` computes with torch, not with numpy alone."""
        return self.numerics == "fast"

    @property
    def trainer(self) -> str | None:
        """What makes all tensors together: mergekit's own run, where it was asked for."""
        return "surgery.arch.merging.documents.delegate:train" if self.arithmetic == "mergekit" else None

    def _check_document(self) -> None:
        """Refuse options that a document would silently have the better of."""
        for option in fields(self):
            plain = option.default if option.default is not MISSING else None
            given = getattr(self, option.name)
            same = given == plain or not (given or plain) or (option.name, given) == ("alpha", "0.9")
            if option.name in _WITH_CONFIG or same:
                continue
            shown = option.name.replace("_", "-")
            own = {"layers", "include", "exclude"}
            where = (
                "surgery: {host: MODEL, " + option.name + ": …}"
                if option.name in own
                else _IN_DOCUMENT.get(option.name, "its models, parameters and dtype")
            )
            raise UsageError(shown, f"--{shown} does not go with --config", hint=f"write it in the file: {where}")

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def plan(self, ctx: PlanContext, *parents: Checkpoint) -> Plan:
        """Every tensor of the output: merged, or the host's."""
        from surgery.arch.merging.attached import models_and_adapters
        from surgery.arch.merging.pair import Request, plan_pair

        if self.config is not None:
            from surgery.arch.merging.documents.document import plan_document

            return plan_document(self.config, parents, arithmetic=self.arithmetic, strict=self.strict, force=self.force)
        models, adapters = models_and_adapters(parents)
        if not 2 <= len(models) <= 3:
            raise UsageError(
                "parents",
                f"merge takes HOST DONOR and perhaps --base, not {len(models)} models",
                hint="more models are merged by a mergekit file: surgery merge --config FILE",
            )
        if self.arithmetic == "mergekit":
            raise UsageError(
                "arithmetic",
                "--arithmetic mergekit runs a mergekit file; HOST DONOR are merged here, tower by tower",
                hint="surgery merge --config FILE --arithmetic mergekit; kernels are mergekit's too",
            )
        host, donor, *base = models
        values = {f.name: getattr(self, f.name) for f in fields(Request)}
        return plan_pair(Request(**values), host, donor, base[0] if base else None, adapters)

    def stream(self, task: Compute, readers: list[Any], seed: int) -> Iterator[memoryview]:
        """A tensor of one of our formulas, in pieces."""
        from surgery.arch.merging.tasks import stream_task

        return stream_task(task, readers, seed)

    def run(self, task: Compute, tensors: list[Any], generator: Any) -> Any:
        """A tensor by a method of mergekit, whole."""
        from surgery.arch.merging.tasks import run_task

        return run_task(task, tensors, generator)

    def tensor_params(self, task: Compute) -> list[Any] | None:
        """What one tensor depends on beside its inputs."""
        from surgery.arch.merging.tasks import task_params

        return task_params(task)

    def measure(self, plan: Plan, seed: int, *parents: Checkpoint) -> dict[str, Any]:
        """Per layer: how far host and donor are apart, and how much of the change arrives after rounding."""
        from surgery.arch.merging.tasks import measure_plan

        measured = measure_plan(self, plan, seed, parents)
        said = {k: plan.report[k] for k in ("prefix", "found_by", "weights") if k in plan.report}
        return measured | ({"resolved": {**said, "layers": plan.report["layers"]["selected"]}} if said else {})

    def announce(self, plan: Plan) -> list[str]:
        """Said before the work starts."""
        return self.describe(plan)

    def remarks(self, measured: dict[str, Any]) -> list[str]:
        """Warnings that follow from what was measured."""
        little = measured.get("little", [])
        if not little:
            return []
        from surgery.arch.merging.card import spans

        where = spans([n for n in little if isinstance(n, int)])
        shown = f"layers {where}" if where else "the tensors outside layers"
        remedy = "--dtype float16 or --rounding stochastic" if self.config is None else "out_dtype: float16"
        return [
            f"less than 80 % of the intended change arrives in {shown}: it is smaller than the steps of the stored "
            f"dtype; {remedy} keeps it"
        ]

    def describe(self, plan: Plan) -> list[str]:
        """Lines of a dry run."""
        from surgery.arch.merging.card import spans, weighed

        report = plan.report
        if "host" not in report:
            lines = [f"method   {report['method']}", *(f"model    {name}" for name in report["models"])]
            if "into" in report:
                chosen = spans(report["into"]["layers"]) or "none"
                lines.append(f"into     {report['into']['name']}, its language tower, layers {chosen}")
            return lines
        layers = report["layers"]
        by_class = "" if report["found_by"] == "names" else "  (names left it open: found by building the class)"
        host, donor = (
            report[role]["name"] + (f"+{report['adapters'][role]}" if role in report.get("adapters", {}) else "")
            for role in ("host", "donor")
        )
        lines = [
            f"host     {host}  {report['host']['class'] or ''}  tower {report['prefix']}{by_class}",
            f"donor    {donor}  {report['donor']['class'] or ''}",
            f"method   {report['method']}",
            f"layers   {spans(layers['selected']) or 'none'}  ({len(layers['selected'])} of {layers['of']})",
        ]
        lines += [
            f"weights  {weighed(row)}: host {row['host']:g} / donor {row['donor']:g}" for row in report["weights"]
        ]
        merged, copied = report["merged"], report["copied"]
        lines.append(f"merged   {merged['tensors']:,} tensors, {merged['bytes']:,} bytes")
        lines.append(f"copied   {copied['tensors']:,} tensors, {copied['bytes']:,} bytes")
        return lines
