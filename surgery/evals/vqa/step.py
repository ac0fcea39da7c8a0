"""The step eval-vqa: questions to a checkpoint, scored by rules."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

from surgery.errors import UsageError, closest
from surgery.graph.evaluation import Evaluation, Found
from surgery.graph.op import Param, PlanContext, SideFile, TrainContext
from surgery.store.checkpoint import Checkpoint

PROMPTS = ("direct", "cot", "bare")
_RECORDS = "records.jsonl"


@dataclass(frozen=True)
class EvalVqa(Evaluation):
    """Ask a vision-language model questions and score its answers, as surgery eval vqa does.

    The records of every item lie beside the report, for surgery eval compare; the step's seed draws the items.
    """

    data: Annotated[str, Param("Questions: .jsonl, .json, or a benchmark's .tsv.")]
    prompt: Annotated[str, Param("direct (the answer alone), cot (reasons first), bare (as in the data).")] = "direct"
    group_by: Annotated[tuple[str, ...], Param("Also by the values of these fields.")] = ()
    limit: Annotated[int | None, Param("So many items, drawn by the seed.")] = None
    batch: Annotated[int, Param("Items at a time.")] = 8
    max_new_tokens: Annotated[int, Param("Longest answer.")] = 1024
    dtype: Annotated[str, Param("auto, float32, bfloat16, float16.")] = "auto"
    attn: Annotated[str | None, Param("Implementation of attention: eager, sdpa, ….")] = None

    name: ClassVar[str] = "eval-vqa"
    version: ClassVar[int] = 1

    def inputs(self, ctx: PlanContext, *parents: Checkpoint) -> Mapping[str, str]:
        """The digest of the questions, their pictures included."""
        from surgery.evals.records import fingerprint
        from surgery.evals.vqa.evaluate import RULES, asked

        if self.prompt not in PROMPTS:
            hint = closest(self.prompt, list(PROMPTS))
            raise UsageError("eval-vqa", f"there is no prompt '{self.prompt}'", hint=hint)
        for name in ("batch", "max_new_tokens", "limit"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError("eval-vqa", f"{name} must be at least 1", hint=f"{name}: 8")
        items = self._items(ctx.seed)
        known = sorted({key for item in items for key in item.groups})
        for field in self.group_by:
            if field not in known:
                hint = closest(field, known) if known else "the data has no fields to group by"
                raise UsageError("group", f"no item has a field '{field}'", hint=hint)
        return {"data": fingerprint([[item.id, asked(item), dict(item.groups)] for item in items]), "rules": str(RULES)}

    def evaluate(self, ctx: TrainContext, *parents: Checkpoint) -> Found:
        """The summary of `evaluate`; its records are kept, and an interrupted run goes on with them."""
        from surgery.evals.vqa.evaluate import evaluate, summary

        file = ctx.scratch / _RECORDS
        records = evaluate(
            parents[0],
            self._items(ctx.seed),
            out=file,
            prompt=self.prompt,
            batch=self.batch,
            max_new_tokens=self.max_new_tokens,
            dtype=self.dtype,
            attn=self.attn,
            device=ctx.device,
            resume=file.exists(),
            report=ctx.report,
        )
        numbers = {"model": parents[0].digest_text, "prompt": self.prompt, **summary(records, self.group_by)}
        return Found(numbers, (SideFile(_RECORDS, source=str(file)),))

    def _items(self, seed: int) -> list[Any]:
        from surgery.evals.vqa.rows import read_items

        return read_items(Path(self.data), limit=self.limit, seed=seed)
