"""Ask a model where things are, by several ways of decoding at once, and keep what it said item by item.

One run of a batch of prompts serves `base`, `scaling` and `adapt`: they share its cache, and differ by one decoding
step (see surgery.steering.prefill). Records can be resumed, and never mix two settings.
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from surgery.arch.language.load import Loaded
from surgery.data.spatial.items import Item, items_digest
from surgery.errors import UsageError, closest
from surgery.evals.records import Records
from surgery.evals.spatial.answers import matches_reference, parse_answer
from surgery.evals.vqa.generate import encode
from surgery.evals.vqa.prompts import check_images, render
from surgery.evals.vqa.rows import Item as Question
from surgery.evals.vqa.rows import Picture
from surgery.steering.generate import Policy
from surgery.steering.patch import PAPER, Patch

METHODS = ("base", "scaling", "adapt", "vcd", "dola")
ANSWERS = ("generate", "closed-set")
Report = Callable[[str, Mapping[str, float]], None]
Row = dict[str, Any]


@dataclass(frozen=True)
class Asking:
    """How to ask. `alpha` is that of `scaling`, `policy` that of `adapt`, `patch` the rows, keys, layers and heads of
    both. `answer` is "generate" (the text is read) or "closed-set" (the likeliest option). `seed` is that of VCD's
    noise."""

    methods: tuple[str, ...] = ("base",)
    alpha: float | None = None
    policy: Policy | None = None
    patch: Patch = PAPER
    answer: str = "generate"
    template: str | None = None
    max_new_tokens: int = 20
    batch: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        for name in self.methods:
            if name not in METHODS:
                raise UsageError("method", f"no method '{name}'", hint=closest(name, list(METHODS)))
        if not self.methods or len(set(self.methods)) < len(self.methods):
            raise UsageError("method", "name each method once", hint="--method base,scaling,adapt")
        if self.answer not in ANSWERS:
            raise UsageError("answer", f"--answer {self.answer}: unknown", hint=" or ".join(ANSWERS))
        if "scaling" in self.methods and self.alpha is None:
            raise UsageError(
                "no-alpha", "method scaling needs an alpha", hint="give --alpha, or --from a file of adaptvis tune"
            )
        if "adapt" in self.methods and self.policy is None:
            raise UsageError(
                "no-policy",
                "method adapt needs two alphas and a threshold",
                hint="give --alpha1 --alpha2 --beta, --from a file of adaptvis tune, or a checkpoint that carries them",
            )
        if self.max_new_tokens < 1 or self.batch < 1:
            raise UsageError("bad-setting", "at least one token and one sample a batch", hint="see --help")

    def settings(self) -> dict[str, Any]:
        """What decides the answers, as JSON values; the size of batches only turns last bits."""
        kept = {"answer": self.answer, "template": self.template, "max_new_tokens": self.max_new_tokens}
        kept |= {"patch": self.patch.as_json(), "methods": list(self.methods)}
        kept |= {"alpha": self.alpha} if "scaling" in self.methods else {}
        kept |= {"policy": asdict(self.policy)} if "adapt" in self.methods and self.policy else {}
        return kept | ({"seed": self.seed} if "vcd" in self.methods else {})


def evaluate(
    answer: Callable[[Sequence[Item]], Iterable[Row]],
    items: Sequence[Item],
    asking: Asking,
    *,
    out: Path | None = None,
    model: Mapping[str, Any] | None = None,
    resume: bool = False,
    overwrite: bool = False,
    report: Report = lambda event, numbers: None,
) -> list[Row]:
    """One record an item, in the order of `items`: `id`, `gold`, `group`, `confidence` of the unsteered first token,
    `seconds` a sample, and `answers` {method: text, said, right, reference, alpha}.

    `answer` asks a number of items: `local(loaded, asking)`, or an endpoint. With `out` records are also written as
    they come; `model` says there what was asked. Raises as Records and `answer` do.
    """
    done: dict[str, Mapping[str, Any]] = {}
    with ExitStack() as stack:
        records = None
        if out is not None:
            settings = {**asking.settings(), "data": items_digest(items), "model": dict(model or {})}
            records = stack.enter_context(Records(out, "adaptvis", settings, resume=resume, overwrite=overwrite))
            done = dict(records.done)
        todo = [item for item in items if item.id not in done]
        right = dict.fromkeys(asking.methods[:3], 0)
        for finished, row in enumerate(answer(todo), 1):
            done[row["id"]] = row
            if records is not None:
                records.append(row)
            for method in right:
                right[method] += row["answers"][method]["right"]
            shown = {m: count / finished for m, count in right.items()}
            report("questions", {"done": finished, "n": len(todo), **shown})
    return [dict(done[item.id]) for item in items]


def local(loaded: Loaded, asking: Asking) -> Callable[[Sequence[Item]], Iterator[Row]]:
    """Asks a loaded model, in batches."""

    def answer(items: Sequence[Item]) -> Iterator[Row]:
        for start in range(0, len(items), asking.batch):
            yield from ask(loaded, items[start : start + asking.batch], asking)

    return answer


def ask(loaded: Loaded, items: Sequence[Item], asking: Asking) -> list[Row]:
    """The records of one batch."""
    from surgery.evals.spatial import contrast
    from surgery.steering.prefill import Prefill

    began = time.perf_counter()
    inputs = encode_items(loaded, items, template=asking.template)
    options = [[spellings(loaded.tokenizer, o) for o in item.options] for item in items]
    answers: list[dict[str, Row]] = [{} for _ in items]
    stop = stop_tokens(loaded)
    with Prefill(loaded.model, inputs, asking.patch, tokenizer=loaded.tokenizer) as run:
        policy = asking.policy or Policy(1.0, 1.0, 0.0)
        sure = run.confidence(over_options(policy, options))
        for method in asking.methods:
            if method in ("base", "scaling", "adapt"):
                alphas = [asking.alpha if method == "scaling" else policy.alpha(c) for c in sure]
                alphas = [1.0] * len(items) if method == "base" else alphas
                logits = run.steered([float(a) for a in alphas])  # type: ignore[arg-type]
                if asking.answer == "generate":
                    said = run.answer(logits, tokens=asking.max_new_tokens, stop=stop)
                    rows = [read_answer(loaded, item, ids) for item, ids in zip(items, said, strict=True)]
                else:
                    rows = choose(run.option_scores(logits, [flat(o) for o in options]), options, items)
            else:
                alphas = [None] * len(items)
                how = contrast.vcd(loaded.model, inputs, run, seed=asking.seed) if method == "vcd" else None
                with how or contrast.dola(loaded.model, inputs) as contrasted:
                    if asking.answer == "generate":
                        said = contrasted.answer(tokens=asking.max_new_tokens, stop=stop)
                        rows = [read_answer(loaded, item, ids) for item, ids in zip(items, said, strict=True)]
                    else:
                        rows = choose(
                            _first_token_scores(run.logits, contrasted.logits, options, method), options, items
                        )
            for into, row, alpha in zip(answers, rows, alphas, strict=True):
                into[method] = row | {"alpha": alpha}
    seconds = (time.perf_counter() - began) / len(items)
    return [
        {"id": item.id, "gold": item.answer, "group": grouped(item), "options": list(item.options)}
        | {"confidence": c, "seconds": round(seconds, 4), "answers": row}
        for item, c, row in zip(items, sure, answers, strict=True)
    ]


def encode_items(loaded: Loaded, items: Sequence[Item], *, template: str | None = None) -> dict[str, Any]:
    """The model's inputs for the questions of items, as they stand, in its chat template or another."""
    asked = [Question(i.id, i.question, i.answer, tuple(Picture(i.id, p) for p in i.images)) for i in items]
    check_images(asked, loaded.takes_images, "the model")
    prompts = [render(loaded.processor, question, "bare", template=template) for question in asked]
    return encode(loaded, prompts, asked)


def stop_tokens(loaded: Loaded) -> list[int]:
    """Tokens that end an answer."""
    ends = loaded.model.generation_config.eos_token_id
    ends = ends if ends is not None else loaded.tokenizer.eos_token_id
    return list(ends) if isinstance(ends, list | tuple) else [] if ends is None else [int(ends)]


def grouped(item: Item) -> str:
    """What a question is judged together with: its group, for the same pair of things."""
    return "|".join((item.group, item.subject, item.object)) if item.group else ""


def judge(item: Item, text: str) -> Row:
    """What a text says, by both rules."""
    said = parse_answer(text, item.options, item.object)
    return {
        "text": text,
        "said": said,
        "right": said == item.answer,
        "reference": matches_reference(text, item.answer),
    }


def read_answer(loaded: Loaded, item: Item, ids: Sequence[int]) -> Row:
    """What answer tokens say, by both rules."""
    return judge(item, loaded.tokenizer.decode(ids, skip_special_tokens=True).strip())


def spellings(tokenizer: Any, option: str) -> list[list[int]]:
    """The ways in which a model may write an option: as given and capitalised, each once."""
    found: list[list[int]] = []
    for text in (option, option[:1].upper() + option[1:]):
        ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
        if ids and ids not in found:
            found.append(ids)
    if not found:
        raise UsageError("options", f"option '{option}' has no tokens", hint="check the data and the tokenizer")
    return found


def flat(options: Sequence[Sequence[list[int]]]) -> list[list[int]]:
    """All spellings of a sample's options, one after the other."""
    return [ids for spelled in options for ids in spelled]


def choose(scores: Sequence[Sequence[float]], options: Sequence[Any], items: Sequence[Item]) -> list[Row]:
    """The option whose best spelling is likeliest; the earlier one of equals."""
    rows = []
    for listed, spelled, item in zip(scores, options, items, strict=True):
        rest = iter(listed)
        best = [max(next(rest) for _ in ways) for ways in spelled]
        said = item.options[max(range(len(best)), key=lambda i: (best[i], -i))]
        right = said == item.answer
        rows.append({"text": said, "said": said, "right": right, "reference": right})
    return rows


def _first_token_scores(plain: Any, logits: Any, options: Sequence[Any], method: str) -> list[list[float]]:
    from surgery.evals.spatial import contrast

    if any(len(ids) > 1 for listed in options for ids in flat(listed)):
        raise UsageError(
            "options",
            f"closed-set answers of {method} need options of one token each",
            hint="use --answer generate, or leave the method out",
        )
    rows = []
    for i, listed in enumerate(options):
        ids = [ways[0] for ways in flat(listed)]
        # What the plain model finds implausible among the options is left out: contrasts blow up there.
        likely = contrast.plausible(plain[i : i + 1, ids])[0].tolist()
        rows.append([float(logits[i, t]) if keep else -math.inf for t, keep in zip(ids, likely, strict=True)])
    return rows


def over_options(policy: Policy, options: Sequence[Sequence[list[list[int]]]]) -> Policy:
    """The policy with the first tokens of the options, for confidences that are taken over them."""
    if policy.confidence != "option-prob" or policy.options is not None:
        return policy
    return replace(policy, options=tuple(sorted({ids[0] for listed in options for ids in flat(listed)})))


@contextmanager
def rms_norm_eps(model: Any, value: float | None) -> Iterator[None]:
    """Another epsilon in every RMS norm of the text model, inside the block. The reference code of AdaptVis runs LLaVA
    with 1e-6 in place of the checkpoint's 1e-5, which moves its results."""
    norms = [m for m in model.get_decoder().modules() if hasattr(m, "variance_epsilon")] if value is not None else []
    if value is not None and (not norms or not value > 0):
        raise UsageError("rms-norm-eps", f"--rms-norm-eps {value:g} cannot be set", hint="for Llama-like text models")
    before = [m.variance_epsilon for m in norms]
    for m in norms:
        m.variance_epsilon = value
    try:
        yield
    finally:
        for m, own in zip(norms, before, strict=True):
            m.variance_epsilon = own
