"""What a model with changed weights is worth: the share of right answers, or the likelihood of the right ones.

Both give one number an item, so that two states of a model are compared item by item. Likelihoods go on from cached
hidden states: what enters layer l does not depend on the weights of layer l and above, so it is computed once.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch

from surgery.arch.language.load import Loaded
from surgery.errors import UsageError, closest
from surgery.evals.layers.weights import tower_of
from surgery.evals.records import Records
from surgery.evals.vqa.evaluate import judged
from surgery.evals.vqa.generate import Scored, answer_nll, batches, generate, with_answers
from surgery.evals.vqa.prompts import check_images, render
from surgery.evals.vqa.rows import Item

METRICS = {"acc": "share of right answers", "nll": "-log p of the right answer, in nats"}
Note = Callable[[str], None]


class Kept:
    """Results of earlier measurements by name, and where new ones are put: in memory, or in a file of records too."""

    def __init__(self, records: Records | None = None) -> None:
        self._records = records
        rows = records.done.values() if records is not None else ()
        self._done: dict[str, list[float]] = {str(r["id"]): list(r["values"]) for r in rows}

    def get(self, name: str, values: Callable[[], list[float]]) -> list[float]:
        """What was measured under this name; measured now if nothing was."""
        if name not in self._done:
            self._done[name] = values()
            if self._records is not None:
                self._records.append({"id": name, "values": self._done[name]})
        return self._done[name]

    def __contains__(self, name: str) -> bool:
        return name in self._done


class Measure(Protocol):
    """One number an item, of the model's present weights."""

    def start(self, layer: int) -> None:
        """Say that from here on only weights of `layer` and above (and the final norm) are changed. The weights must be
        those of the start; a layer below an earlier one starts anew."""

    def values(self) -> list[float]:
        """The metric of every item, in their order."""


def measure(
    loaded: Loaded,
    items: Sequence[Item],
    metric: str,
    *,
    prompt: str = "direct",
    template: str | None = None,
    batch: int = 8,
    max_new_tokens: int = 64,
    name: str = "the model",
    note: Note | None = None,
) -> Measure:
    """The measure called `metric` ("acc" or "nll") of a model on items. Raises UsageError for another name."""
    if metric not in METRICS:
        raise UsageError("metric", f"no metric '{metric}'", hint=closest(metric, list(METRICS)))
    check_images(items, loaded.takes_images, name)
    prompts = [render(loaded.processor, item, prompt, template=template) for item in items]
    if metric == "acc":
        return Accuracy(loaded, items, prompts, batch, max_new_tokens)
    return Likelihood(loaded, scored(loaded, items, prompts, batch), note=note)


def scored(loaded: Loaded, items: Sequence[Item], prompts: Sequence[str], size: int) -> list[tuple[list[int], Scored]]:
    """Batches of items with their right answers, each with the places of its items."""
    return [
        (chosen, with_answers(loaded, [prompts[i] for i in chosen], [items[i] for i in chosen]))
        for chosen in batches(items, prompts, size)
    ]


class Accuracy:
    """1 for every item that is answered right, else 0."""

    def __init__(
        self, loaded: Loaded, items: Sequence[Item], prompts: Sequence[str], batch: int, max_new_tokens: int
    ) -> None:
        self._loaded, self._items, self._prompts = loaded, items, prompts
        self._batches, self._longest = list(batches(items, prompts, batch)), max_new_tokens

    def start(self, layer: int) -> None:
        """Generation always begins at the bottom."""

    def values(self) -> list[float]:
        """1 or 0 for every item, in their order."""
        out = [0.0] * len(self._items)
        for chosen in self._batches:
            asked = [self._items[i] for i in chosen]
            made = generate(self._loaded, [self._prompts[i] for i in chosen], asked, max_new_tokens=self._longest)
            for place, item, answer in zip(chosen, asked, made, strict=True):
                out[place] = float(judged(item, answer.text)["correct"])
        return out


class Likelihood:
    """-log p of each right answer in nats, over batches made by `scored`.

    `cached` says whether hidden states are reused. They are not when running the layers one by one does not give what
    the model itself gives (models that add something between layers); `note` is told then.
    """

    def __init__(
        self,
        loaded: Loaded,
        batches: Sequence[tuple[list[int], Scored]],
        *,
        cached: bool = True,
        note: Note | None = None,
    ) -> None:
        self._loaded, self._tower = loaded, tower_of(loaded.model)
        self._places = [places for places, _ in batches]
        self._inputs = [batch for _, batch in batches]
        self._count = sum(len(places) for places in self._places)
        self.cached = cached and self._restart()
        if cached and not self.cached and note is not None:
            note("this model's layers do not run one by one; each measurement is a whole forward pass")

    def start(self, layer: int) -> None:
        """Get ready for measurements in which `layer` is the lowest that is changed: those below run once."""
        if not self.cached:
            return
        if layer < self._position:
            self._restart()
        with torch.no_grad():
            for _ in range(layer - self._position):
                for number, state in enumerate(self._hidden):
                    self._hidden[number] = self._layer(self._position, number, state)
                self._position += 1

    def values(self) -> list[float]:
        """Nats for every item, in their order."""
        out = [0.0] * self._count
        for number, (chosen, batch) in enumerate(zip(self._places, self._inputs, strict=True)):
            found = self._from_cache(number, batch) if self.cached else answer_nll(self._loaded, batch)
            for place, value in zip(chosen, found, strict=True):
                out[place] = value
        return out

    @torch.no_grad()
    def _restart(self) -> bool:
        """Run every batch once and keep what enters layer 0 and what each layer is called with; False if running the
        layers one by one would not give the same."""
        self._position = 0
        self._hidden: list[torch.Tensor] = []
        self._calls: list[list[Mapping[str, Any]]] = []
        for number, batch in enumerate(self._inputs):
            first, calls, logits = self._run(batch)
            self._hidden.append(first)
            self._calls.append(calls)
            with_images = "pixel_values" in batch.inputs
            known = any(("pixel_values" in b.inputs) == with_images for b in self._inputs[:number])
            if not known and not self._agrees(number, batch, logits):
                return False
        return True

    def _run(self, batch: Scored) -> tuple[torch.Tensor, list[Mapping[str, Any]], torch.Tensor]:
        """One whole forward pass: (input of layer 0, keyword arguments of every layer, logits at the answers)."""
        entered: list[torch.Tensor] = []
        calls: list[Mapping[str, Any]] = []

        def seen(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if not calls:
                entered.append(args[0] if args else kwargs["hidden_states"])
            calls.append({k: v for k, v in kwargs.items() if k != "hidden_states"})

        hooks = [layer.register_forward_pre_hook(seen, with_kwargs=True) for layer in self._tower.layers]
        try:
            logits = self._loaded.model(**batch.inputs, use_cache=False).logits
        finally:
            for hook in hooks:
                hook.remove()
        return entered[0], calls, logits[batch.rows, batch.columns]

    def _agrees(self, number: int, batch: Scored, logits: torch.Tensor) -> bool:
        if len(self._calls[number]) != len(self._tower.layers):
            return False
        try:
            mine = self._logits(number, batch)
        except (AttributeError, TypeError, RuntimeError):
            return False
        tolerance = 1e-4 if logits.dtype == torch.float32 else 2e-2
        return torch.allclose(mine.float(), logits.float(), rtol=tolerance, atol=tolerance)

    @torch.no_grad()
    def _from_cache(self, number: int, batch: Scored) -> list[float]:
        return batch.total(self._logits(number, batch)).tolist()

    def _logits(self, number: int, batch: Scored) -> torch.Tensor:
        """Logits [n, vocabulary] at the answers, from the cached state upwards."""
        state = self._hidden[number]
        for layer in range(self._position, len(self._tower.layers)):
            state = self._layer(layer, number, state)
        last = self._final_norm()(state)[batch.rows, batch.columns]
        return self._loaded.model.get_output_embeddings()(last)

    def _layer(self, layer: int, number: int, state: torch.Tensor) -> torch.Tensor:
        made = self._tower.layers[layer](state, **self._calls[number][layer])
        return made[0] if isinstance(made, tuple) else made

    def _final_norm(self) -> Any:
        decoder = self._tower.decoder
        return next(getattr(decoder, n) for n in ("norm", "final_layernorm", "embedding_norm") if hasattr(decoder, n))
