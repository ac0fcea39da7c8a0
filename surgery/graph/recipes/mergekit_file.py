"""mergekit's YAML, read into steps of ours.

    merge_method: linear
    models:
      - {model: ./vlm, parameters: {weight: 0.9}}
      - {model: ./llm, parameters: {weight: [0.0, 0.1, 0.2]}}
    dtype: bfloat16

Every document becomes a step `merge`: its sources are the models in the order of their first appearance, its `config`
is the document in canonical JSON with each model replaced by the index of its source (`[model, adapter]` for
`model+lora`), so that equal work on equal checkpoints has equal keys wherever they lie. A file may hold several
documents; one with `name` can be a model of another, as in mergekit-multi. Unknown keys, which mergekit passes over in
silence, are faults. Our block `surgery: {host, layers, include, exclude, vocab}` may stand beside mergekit's keys.

mergekit itself is not imported: what a method is and which parameters it has is known where the merge is planned.
"""

from collections.abc import Mapping
from math import isfinite
from pathlib import Path
from typing import Any

from surgery.errors import closest, printable
from surgery.graph.recipes.documents import Lines, fault, load_documents, read_text
from surgery.graph.recipes.recipe import Recipe, Step, in_order
from surgery.store.digests import canonical
from surgery.store.names import model_and_adapter

OPERATION = "merge"
UNNAMED = "merged"  # what the step of a document without a name is called
_TOP = (
    "merge_method", "models", "slices", "modules", "base_model", "dtype", "out_dtype", "tokenizer_source", "tokenizer",
    "chat_template", "parameters", "name", "surgery",
)  # fmt: skip
_FORMS = ("models", "slices", "modules")
_MODEL = ("model", "parameters")
_SOURCE = ("model", "layer_range", "parameters")
_SLICE = ("sources", "base_model", "parameters", "residual_weight")
_MODULE = ("slices", "models", "parameters")
_TOKENIZER = ("source", "tokens", "pad_to_multiple_of")
_TOKEN = ("source", "force")
_CONDITION = ("filter", "value")
_OURS = ("host", "layers", "include", "exclude", "vocab")
_DTYPES = ("bfloat16", "float16", "float32", "float64")


def is_mergekit(document: Any) -> bool:
    """Whether a YAML document is mergekit's and not a recipe of ours."""
    return isinstance(document, Mapping) and "merge_method" in document


def read_mergekit(path: Path, *, seed: int = 0) -> Recipe:
    """The recipe that a mergekit file means. Raises `UsageError` naming the line, `CheckpointError` if unreadable."""
    return parse_mergekit(read_text(path), path, seed=seed)


def parse_mergekit(text: str, path: Path, *, seed: int = 0) -> Recipe:
    """As `read_mergekit`, for a text; `path` is for messages."""
    documents = [(d, lines) for d, lines in load_documents(text, path, several=True) if d is not None]
    if not documents:
        raise fault(path, 1, "an empty file", hint="start with merge_method: linear")
    for document, _ in documents:
        if not is_mergekit(document):
            raise fault(path, 1, "no merge_method", hint="start with merge_method: linear")
    names = [_name(document, lines, path) for document, lines in documents]
    for name in names:
        if names.count(name) > 1:
            what = f"two documents are called '{name}'" if name != UNNAMED else "two documents have no name"
            raise fault(path, 1, what, hint="give each its own name: NAME")
    steps = [_Reader(path, lines, seed).step(d, name) for (d, lines), name in zip(documents, names, strict=True)]
    inputs = {s: s for step in steps for s in step.sources if s not in names}

    ordered = in_order({step.name: step for step in steps}, path)
    used = {source for step in steps for source in step.sources}
    final = UNNAMED if UNNAMED in names else next((n for n in reversed(names) if n not in used), names[-1])
    return Recipe(path, inputs, ordered, {final: ""})


def _name(document: Mapping[str, Any], lines: Lines, path: Path) -> str:
    name = document.get("name", UNNAMED)
    if not isinstance(name, str) or not name:
        raise fault(path, lines.get(("name",), 1), "name must be a word", hint="name: NAME")
    return name


class _Reader:
    """Reads one document; collects its models on the way."""

    def __init__(self, path: Path, lines: Lines, seed: int) -> None:
        self.path, self.lines, self.seed = path, lines, seed
        self.sources: list[str] = []

    def step(self, document: Mapping[str, Any], name: str) -> Step:
        """The whole document as a step. Models are numbered in the order in which they stand in the file."""
        self._keys(document, _TOP, ())
        forms = [f for f in _FORMS if document.get(f)]
        if len(forms) != 1:
            found = " and ".join(forms) if forms else "none of them"
            raise self._fault((), f"exactly one of {', '.join(_FORMS)} is needed, and there is {found}", "keep one")
        if document.get("tokenizer") and document.get("tokenizer_source"):
            raise self._fault(("tokenizer_source",), "tokenizer and tokenizer_source say the same", "keep one")
        config: dict[str, Any] = {}
        for key, value in document.items():
            if key != "name" and value is not None:
                config[key] = self._value(key, value)
        params = {"config": canonical(config).decode()}
        return Step(name, OPERATION, tuple(self.sources), params, self.seed, self._line(("merge_method",)))

    def _value(self, key: str, value: Any) -> Any:
        at = (key,)
        if key == "base_model":
            return self._model(value, at)
        if key == "models":
            return [self._entry(m, (*at, i), _MODEL) for i, m in enumerate(self._list(value, at))]
        if key == "slices":
            return [self._slice(s, (*at, i)) for i, s in enumerate(self._list(value, at))]
        if key == "modules":
            return {name: self._module(m, (*at, name)) for name, m in self._mapping(value, at).items()}
        if key == "parameters":
            return self._parameters(value, at)
        if key in ("dtype", "out_dtype"):
            return self._dtype(value, at)
        if key == "tokenizer_source":
            return self._tokenizer_source(value, at)
        if key == "tokenizer":
            return self._tokenizer(value, at)
        if key == "surgery":
            return self._ours(value, at)
        if not isinstance(value, str):
            raise self._fault(at, f"{key} must be a word", f"{key}: NAME")
        return value

    def _entry(self, value: Any, at: tuple[Any, ...], known: tuple[str, ...]) -> dict[str, Any]:
        """A model with its parameters, in a slice also with its layers."""
        body = self._mapping(value, at)
        self._keys(body, known, at)
        if "model" not in body:
            raise self._fault(at, "an entry without a model", "model: PATH")
        entry: dict[str, Any] = {"model": self._model(body["model"], (*at, "model"))}
        if "layer_range" in known:
            entry["layer_range"] = self._range(body.get("layer_range"), (*at, "layer_range"))
        if body.get("parameters") is not None:
            entry["parameters"] = self._parameters(body["parameters"], (*at, "parameters"))
        return entry

    def _range(self, value: Any, at: tuple[Any, ...]) -> list[int]:
        ints = isinstance(value, list) and len(value) == 2 and all(type(n) is int for n in value)
        if not ints or not 0 <= value[0] < value[1]:
            shown = printable(repr(value), limit=60)
            raise self._fault(at, f"layer_range {shown} is no [first, end)", "layer_range: [0, 16] are layers 0 to 15")
        return list(value)

    def _slice(self, value: Any, at: tuple[Any, ...]) -> dict[str, Any]:
        body = self._mapping(value, at)
        self._keys(body, _SLICE, at)
        sources = self._list(body.get("sources"), (*at, "sources"))
        made: dict[str, Any] = {
            "sources": [self._entry(s, (*at, "sources", i), _SOURCE) for i, s in enumerate(sources)]
        }
        lengths = {s["layer_range"][1] - s["layer_range"][0] for s in made["sources"]}
        if len(lengths) != 1:
            raise self._fault(at, "the sources of a slice must have equally many layers", "check each layer_range")
        if body.get("residual_weight") is not None:
            raise self._fault((*at, "residual_weight"), "residual_weight has no meaning in mergekit", "leave it out")
        if body.get("base_model") is not None:
            made["base_model"] = self._model(body["base_model"], (*at, "base_model"))
        if body.get("parameters") is not None:
            made["parameters"] = self._parameters(body["parameters"], (*at, "parameters"))
        return made

    def _module(self, value: Any, at: tuple[Any, ...]) -> dict[str, Any]:
        body = self._mapping(value, at)
        self._keys(body, _MODULE, at)
        if bool(body.get("slices")) == bool(body.get("models")):
            raise self._fault(at, "a module has either slices or models", "keep one")
        made: dict[str, Any] = {}
        for key, item in body.items():
            if item is not None:
                if key == "slices":
                    made[key] = [self._slice(s, (*at, key, i)) for i, s in enumerate(self._list(item, (*at, key)))]
                elif key == "models":
                    listed = enumerate(self._list(item, (*at, key)))
                    made[key] = [self._entry(m, (*at, key, i), _MODEL) for i, m in listed]
                else:
                    made[key] = self._parameters(item, (*at, key))
        return made

    def _parameters(self, value: Any, at: tuple[Any, ...]) -> dict[str, Any]:
        return {name: self._setting(v, (*at, name)) for name, v in self._mapping(value, at).items() if v is not None}

    def _setting(self, value: Any, at: tuple[Any, ...]) -> Any:
        """A scalar, a list of scalars (a gradient), or conditions {filter, value}."""
        if isinstance(value, float) and not isfinite(value):
            raise self._fault(at, f"{self._called(at)} is {value}", "a finite number")
        if isinstance(value, bool | int | float | str):
            return value
        if isinstance(value, Mapping):
            return [self._condition(value, at)]
        if isinstance(value, list):  # an empty one says nothing: the next scope is asked
            if all(isinstance(v, bool | int | float | str) for v in value):
                return [self._setting(v, at) for v in value]
            if all(isinstance(v, Mapping) for v in value):
                return [self._condition(v, (*at, i)) for i, v in enumerate(value)]
        shown = printable(repr(value), limit=60)
        hint = "write 0.5, [0.0, 0.5, 1.0], or a list of {filter: NAME, value: 0.5}"
        raise self._fault(at, f"{at[-1]} is {shown}", hint)

    def _condition(self, value: Any, at: tuple[Any, ...]) -> dict[str, Any]:
        body = self._mapping(value, at)
        self._keys(body, _CONDITION, at)
        if "value" not in body:
            raise self._fault(at, "a condition without a value", "value: 0.5")
        made = {"value": self._setting(body["value"], (*at, "value"))}
        if body.get("filter") is not None:
            made["filter"] = str(body["filter"])
        return made

    def _dtype(self, value: Any, at: tuple[Any, ...]) -> str:
        name = str(value).removeprefix("torch.")
        if name not in _DTYPES:
            raise self._fault(at, f"{at[-1]} is {printable(str(value))}", closest(name, list(_DTYPES)))
        return name

    def _tokenizer_source(self, value: Any, at: tuple[Any, ...]) -> Any:
        return value if value in ("union", "base") else self._model(value, at)

    def _tokenizer(self, value: Any, at: tuple[Any, ...]) -> dict[str, Any]:
        body = self._mapping(value, at)
        self._keys(body, _TOKENIZER, at)
        made: dict[str, Any] = {"source": self._tokenizer_source(body.get("source", "union"), (*at, "source"))}
        if body.get("tokens") is not None:
            tokens = self._mapping(body["tokens"], (*at, "tokens"))
            made["tokens"] = {str(t): self._token(b, (*at, "tokens", t)) for t, b in tokens.items()}
        multiple = body.get("pad_to_multiple_of")
        if multiple is not None:
            if type(multiple) is not int or multiple < 1:
                raise self._fault((*at, "pad_to_multiple_of"), "pad_to_multiple_of must be 1 or more", "for example 64")
            made["pad_to_multiple_of"] = multiple
        return made

    def _token(self, value: Any, at: tuple[Any, ...]) -> dict[str, Any]:
        body = self._mapping(value, at)
        self._keys(body, _TOKEN, at)
        made: dict[str, Any] = {"force": bool(body.get("force", False))}
        source, here = body.get("source"), (*at, "source")
        if isinstance(source, Mapping) and "kind" in source:
            made["source"] = self._embedding(source, here)
        elif source is not None:
            made["source"] = self._model(source, here)
        return made

    def _embedding(self, source: Mapping[str, Any], at: tuple[Any, ...]) -> dict[str, Any]:
        """Where a token's row comes from: nowhere (zero), or a token of a model by its text or number."""
        kind = source["kind"]
        if kind not in ("zero", "model_token"):
            raise self._fault(at, f"kind is {printable(repr(kind), limit=40)}", "kind: zero or kind: model_token")
        if kind == "zero":
            self._keys(source, ("kind",), at)
            return {"kind": "zero"}
        self._keys(source, ("kind", "model", "token", "token_id"), at)
        given = {k: source[k] for k in ("token", "token_id") if source.get(k) is not None}
        if len(given) != 1:
            raise self._fault(at, "model_token needs the token: one of token and token_id", "token: '<|im_end|>'")
        number = given.get("token_id")
        if number is not None and (type(number) is not int or number < 0):
            raise self._fault(at, f"token_id is {printable(repr(number), limit=40)}", "token_id: 151645")
        if "token" in given:
            given["token"] = str(given["token"])
        return {"kind": kind, "model": self._model(source.get("model"), (*at, "model")), **given}

    def _ours(self, value: Any, at: tuple[Any, ...]) -> dict[str, Any]:
        body = self._mapping(value, at)
        self._keys(body, _OURS, at)
        made = {k: v for k, v in body.items() if v is not None}
        if "host" in made:
            made["host"] = self._model(made["host"], (*at, "host"))
        if "layers" in made:
            listed = made["layers"] if isinstance(made["layers"], list) else [made["layers"]]
            made["layers"] = ",".join(map(str, listed))
        for key in ("include", "exclude"):
            if key in made:
                listed = made[key] if isinstance(made[key], list) else [made[key]]
                if not all(isinstance(v, str) for v in listed):
                    raise self._fault((*at, key), f"{key} is a list of groups or patterns", f"{key}: [norms]")
                made[key] = listed
        return made

    def _model(self, value: Any, at: tuple[Any, ...]) -> int | list[int]:
        """The index of a model, or [model, adapter]. A revision stays a part of the name, as our own names have it."""
        if isinstance(value, Mapping):
            self._keys(value, ("model", "lora", "path", "revision", "override_architecture"), at)
            model = value if "path" in value else value.get("model")
            lora = value.get("lora")
            texts = [_path(v) for v in (model, lora) if v is not None]
        elif isinstance(value, str) and value:
            texts = model_and_adapter(value)
        else:
            raise self._fault(at, f"a model is a path or a name, not {printable(repr(value), limit=60)}", "model: PATH")
        if not 1 <= len(texts) <= 2 or not all(texts):
            raise self._fault(at, f"'{printable(str(value))}' is no model", "write MODEL or MODEL+ADAPTER")
        indexes = []
        for text in texts:
            if text not in self.sources:
                self.sources.append(text)
            indexes.append(self.sources.index(text))
        return indexes[0] if len(indexes) == 1 else indexes

    def _keys(self, body: Mapping[str, Any], known: tuple[str, ...], at: tuple[Any, ...]) -> None:
        for key in body:
            if key not in known:
                raise self._fault((*at, key), f"unknown key '{printable(str(key))}'", closest(str(key), list(known)))

    def _mapping(self, value: Any, at: tuple[Any, ...]) -> Mapping[str, Any]:
        if not isinstance(value, Mapping) or not all(isinstance(k, str) for k in value):
            raise self._fault(at, f"{self._called(at)} must map names to values", "see recipes/vlm-merge/")
        return value

    def _list(self, value: Any, at: tuple[Any, ...]) -> list[Any]:
        if not isinstance(value, list) or not value:
            raise self._fault(at, f"{at[-1]} must be a list with at least one item", "see recipes/vlm-merge/")
        return value

    def _called(self, at: tuple[Any, ...]) -> str:
        """What stands at a place: its key, or which item of a list it is."""
        return f"item {at[-1] + 1} of {at[-2]}" if isinstance(at[-1], int) else str(at[-1])

    def _line(self, at: tuple[Any, ...]) -> int:
        return next((self.lines[at[:n]] for n in range(len(at), 0, -1) if at[:n] in self.lines), 1)

    def _fault(self, at: tuple[Any, ...], what: str, hint: str) -> Exception:
        return fault(self.path, self._line(at), what, hint=hint)


def _path(value: Any) -> str:
    if isinstance(value, Mapping):
        revision = value.get("revision")
        return f"{value.get('path', '')}@{revision}" if revision else str(value.get("path", ""))
    return str(value)
