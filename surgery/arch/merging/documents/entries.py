"""The entries of a mergekit document: what makes each tensor, with which parameters and in which dtype."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from hashlib import sha256
from typing import Any

from surgery.arch.carried import FLOATS
from surgery.arch.language.towers import EMBED, HEAD
from surgery.arch.merging.adapters import Adapter
from surgery.arch.merging.documents.rows import Key, Row
from surgery.arch.merging.documents.settings import Document, find
from surgery.arch.merging.documents.vocabularies import Vocabulary
from surgery.arch.merging.numbers.formulas import Formula
from surgery.arch.merging.numbers.kernels import Kernel, check_inputs, is_random, spec_of
from surgery.arch.merging.pair import SCRATCH, Task
from surgery.errors import CheckpointError, UsageError, closest, printable
from surgery.graph.op import Compute, Entry, Keep
from surgery.graph.planned import Planned
from surgery.store.checkpoint import Checkpoint
from surgery.store.header import nbytes_of
from surgery.store.reader import open_reader
from surgery.store.tensors import TensorRef

# The methods that are made in pieces, with their parameters.
_STREAMED = {"linear": ("weight", "normalize"), "slerp": ("t",), "passthrough": ("scale",)}
_WIDTH = {"BF16": 8, "F16": 11, "F32": 24, "F64": 53}  # bits of precision
_EXACT = {("BF16", "F32"), ("F16", "F32"), ("BF16", "F64"), ("F16", "F64"), ("F32", "F64")}  # nothing is rounded


class EntryMaker:
    """Turns rows of a document into entries: what is kept, made in pieces, or made by mergekit's kernel."""

    def __init__(
        self,
        document: Document,
        parents: Sequence[Checkpoint],
        adapters: Mapping[Key, Adapter],
        vocabulary: Vocabulary | None,
        arithmetic: str,
    ) -> None:
        self.document, self.parents, self.adapters = document, parents, adapters
        self.vocabulary = vocabulary
        self.streams = arithmetic != "kernels" and document.method in _STREAMED
        if arithmetic == "stream" and not self.streams:
            raise UsageError(
                "arithmetic",
                f"{document.method} of a document is made by mergekit's kernel",
                hint="leave --arithmetic out",
            )
        # Importing the declaration costs what torch costs: not for the methods whose parameters are known here.
        self.spec = None if document.method in _STREAMED and self.streams else spec_of(document.method)
        for part in document.slices:
            keys = [s.key for s in part.sources]
            if self.spec is not None:
                check_inputs(self.spec, len(keys), given=part.base is not None, among=part.base in keys)
            elif document.method == "slerp" and (len(keys) != 2 or part.base not in keys):
                raise UsageError(
                    "models", "slerp takes exactly two models, one of them the base_model", hint="base_model: MODEL"
                )
            elif document.method == "passthrough" and len(keys) != 1:
                raise UsageError("models", "passthrough takes one model a slice", hint="linear blends several")

    def unknown_parameters(self) -> list[str]:
        """Warnings about settings that the method does not have; mergekit passes over them in silence."""
        document = self.document
        known = _STREAMED.get(document.method) or [p.name for p in spec_of(document.method).parameters]
        scopes = [document.module, document.top]
        for part in document.slices:
            scopes += [part.parameters, *(s.parameters for s in part.sources)]
        named = dict.fromkeys(name for scope in scopes for name in scope or ())
        return [
            f"{document.method} has no parameter '{printable(name)}', which changes nothing ({closest(name, [*known])})"
            for name in named
            if name not in known
        ]

    def entries(self, rows: Sequence[Row], first: Key) -> Iterator[Entry]:
        """An entry for every row."""
        for row in rows:
            yield self._entry(row, first)

    def _entry(self, row: Row, first: Key) -> Entry:
        own = row.inputs.get(first) or next(iter(row.inputs.values()))
        dtypes = [ref.dtype for ref in row.inputs.values()]
        if any(d not in _WIDTH for d in dtypes):
            self._check_equal(row)
            return Keep(name=row.name, dtype=own.dtype, shape=own.shape, ref=own, parent=self._parent(row, own))
        vocabulary = self.vocabulary if self.vocabulary and row.canonical in (EMBED, HEAD) else None
        if vocabulary is None and len({ref.shape for ref in row.inputs.values()}) != 1:
            shown = ", ".join(f"{self.parents[k[0]].name} {list(r.shape)}" for k, r in row.inputs.items())
            hint = (
                "tokenizer: {source: base} aligns vocabularies"
                if row.canonical in (EMBED, HEAD)
                else "the models must be of one size"
            )
            raise CheckpointError("incompatible", f"'{printable(row.name)}': {shown}", hint=hint)
        work = FLOATS[self.document.dtype] if self.document.dtype else _promoted(dtypes)
        out = FLOATS[self.document.out_dtype] if self.document.out_dtype else work
        touched = any(k in self.adapters and self.adapters[k].touches(r.name) for k, r in row.inputs.items())
        exact = all(d == work or (d, work) in _EXACT for d in dtypes) and (out == work or (out, work) in _EXACT)
        if self.streams and exact and vocabulary is None:
            formula, keys = self._formula(row)
            if formula.weights == (1.0,) and not touched and dtypes[0] == out:
                ref = row.inputs[keys[0]]
                return Keep(name=row.name, dtype=out, shape=ref.shape, ref=ref, parent=keys[0][0])
            return self._compute(row, keys, out, Task(row.canonical, formula), streamed=True)
        keys = list(row.inputs)
        return self._compute(row, keys, out, self._kernel(row, keys, work), streamed=False, vocabulary=vocabulary)

    def _check_equal(self, row: Row) -> None:
        """Whole numbers have no average: they must be the same in all models, as mergekit wants them."""
        refs = [(self.parents[k[0]], r) for k, r in row.inputs.items()]
        same = len({(r.dtype, r.shape) for _, r in refs}) == 1
        if same and len(refs) > 1 and not any(isinstance(p, Planned) for p, _ in refs):
            same = len({_content(p, r) for p, r in refs}) == 1
        if not same:
            shown = ", ".join(f"{self.parents[k[0]].name} {r.dtype}" for k, r in row.inputs.items())
            raise CheckpointError(
                "incompatible",
                f"'{printable(row.name)}' is not the same in all models and no float to merge: {shown}",
                hint="merge the models that they were quantised from",
            )

    def _parent(self, row: Row, ref: TensorRef) -> int:
        return next(k[0] for k, r in row.inputs.items() if r is ref)

    def _compute(
        self,
        row: Row,
        keys: Sequence[Key],
        out: str,
        task: Task,
        *,
        streamed: bool,
        vocabulary: Vocabulary | None = None,
    ) -> Compute:
        refs = [row.inputs[k] for k in keys]
        sources = [k[0] for k in keys]
        shape = refs[0].shape
        deltas = []
        for index, key in enumerate(keys):
            adapter = self.adapters.get(key)
            if adapter is not None and adapter.touches(refs[index].name):
                assert key[1] is not None
                a, b = adapter.factors(refs[index].name)
                deltas.append((index, len(refs), adapter.scale_of(refs[index].name), adapter.transposed))
                refs += [a, b]
                sources += [key[1], key[1]]
        if vocabulary is not None:
            shape = (vocabulary.rows, *shape[1:])
            task = replace(task, vocabulary=(vocabulary, tuple(keys)))
        if deltas:
            task = replace(task, deltas=tuple(deltas))
        # Sorting magnitudes takes 64-bit places beside copies in float32: TIES of two was measured at six of these.
        held = sum(nbytes_of("F32", r.shape) for r in refs) + 6 * nbytes_of("F32", shape)
        return Compute(
            name=row.name, dtype=out, shape=shape, how=task, refs=tuple(refs), sources=tuple(sources),
            streamed=streamed, scratch=SCRATCH if streamed else held,
            random=not streamed and is_random(self.document.method),
        )  # fmt: skip

    def _formula(self, row: Row) -> tuple[Formula, list[Key]]:
        method, part = self.document.method, row.part
        keys = [s.key for s in part.sources]
        if method == "linear":
            weights = [self._own("weight", row, k, _number, required=True) for k in keys]
            normalize = self._shared("normalize", row, _flag)
            total = sum(weights)
            if normalize is not False and not total:
                raise UsageError(
                    "weight", f"linear: the weights of '{printable(row.name)}' sum to zero", hint="normalize: false"
                )
            return Formula("linear", tuple(weights), normalize=normalize is not False), keys
        if method == "slerp":
            t = self._shared("t", row, _number, required=True)
            ordered = [part.base, *(k for k in keys if k != part.base)]
            return Formula("slerp", (1 - t, t)), [k for k in ordered if k is not None]
        scale = self._own("scale", row, keys[0], _number)
        return Formula("linear", (1.0 if scale is None else scale,), normalize=False), keys

    def _kernel(self, row: Row, keys: Sequence[Key], work: str) -> Task:
        spec = self.spec or spec_of(self.document.method)
        base = row.part.base
        others = [k for k in keys if k != base]
        shared: list[tuple[str, Any]] = []
        per_input: list[tuple[str, tuple[Any, ...]]] = []
        for parameter in spec.parameters:
            scope = str(parameter.scope.value)
            where = keys if scope == "input" else others
            if scope == "shared":
                value = self._shared(parameter.name, row, parameter.validate, required=parameter.required)
                if value is not None:
                    shared.append((parameter.name, value))
                continue
            values = [self._own(parameter.name, row, k, parameter.validate, required=parameter.required) for k in where]
            if any(v is not None for v in values):
                filled = [parameter.default if v is None else v for v in values]
                per_input.append((parameter.name, tuple(filled)))
        position = list(keys).index(base) if base is not None and base in keys else None
        names = {v: k for k, v in FLOATS.items()}
        return Task(row.canonical, kernel=Kernel(spec.name, tuple(shared), tuple(per_input), position, names[work]))

    def _own(self, name: str, row: Row, key: Key, validate: Any, *, required: bool = False) -> Any:
        return self._found(name, row, key, row.inputs[key].name, validate, required)

    def _shared(self, name: str, row: Row, validate: Any, *, required: bool = False) -> Any:
        return self._found(name, row, None, row.name, validate, required)

    def _found(self, name: str, row: Row, key: Key | None, tensor: str, validate: Any, required: bool) -> Any:
        try:
            value = find(name, self.document.scopes(row.part, key), tensor, row.t, validate)
        except (ValueError, TypeError):
            raise UsageError(
                "parameter",
                f"{self.document.method}: {name} of '{printable(tensor)}' has a wrong type",
                hint="see its value",
            ) from None
        if value is None and required:
            whose = f" of {self.parents[key[0]].name}" if key is not None else ""
            raise UsageError(
                "parameter",
                f"{self.document.method} needs {name}{whose}, for '{printable(tensor)}'",
                hint=f"parameters: {{{name}: 0.5}}",
            )
        return value


def _content(model: Checkpoint, ref: TensorRef) -> bytes:
    """sha256 of a tensor's bytes."""
    data = bytearray(ref.nbytes)
    with open_reader(model, ref) as reader:
        reader.into(memoryview(data), 0)
    return sha256(data).digest()


def _number(value: Any) -> float:
    if isinstance(value, bool):
        raise TypeError(value)
    return float(value)


_FLAGS = {"true": True, "t": True, "yes": True, "y": True, "on": True, "1": True} | {
    word: False for word in ("false", "f", "no", "n", "off", "0")
}


def _flag(value: Any) -> bool:
    """A truth value in any of the spellings that mergekit takes."""
    word = str(value).lower()
    if word not in _FLAGS:
        raise TypeError(value)
    return _FLAGS[word]


def _promoted(dtypes: Sequence[str]) -> str:
    kinds = set(dtypes)
    if len(kinds) == 1:
        return dtypes[0]
    return "F64" if "F64" in kinds else "F32"  # of bfloat16 and float16 too
