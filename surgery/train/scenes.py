"""Train a small LLaVA to answer where things are in drawn scenes.

Every step draws new scenes. A sequence is one picture and several questions with their answers, as a conversation; the
loss is cross-entropy on the answers, and a smaller one that lets every image position name the thing on its patch. The
first part of training asks about single objects only: the relation of two is learnt from there.

A run is a pure function of (settings, seed): killed and resumed it ends in the same bits.
"""

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from surgery.arch.tiny_llava import END, IMAGE, PAD, TinyLlava, normalise
from surgery.data.spatial.scenes import Placed, Question, SceneSettings, ask, draw, place
from surgery.errors import NonFiniteLoss
from surgery.graph.op import Plan, TrainContext, TrainResult
from surgery.train.optim import weights_digest
from surgery.train.state import TrainingState

if TYPE_CHECKING:
    from surgery.ops.train_scenes import TrainScenes

Report = Callable[[str, Mapping[str, float]], None]
_COVERED = 0.15  # share of a patch that a thing must cover to be named there
_IGNORE = -100
_HELD_OUT = 1_000_000  # steps from here on are never trained on


@dataclass(frozen=True)
class SceneTraining:
    """How to train. `single` is the first share of the steps that asks about one object only, `mixed` the share of such
    questions afterwards, `patches` the weight of the loss on image positions, `val_every` and `save_every` the steps
    between measurements on held-out scenes and between resumable states, 0 for none."""

    steps: int
    batch: int = 20
    lr: float = 1.5e-3
    warmup: int = 100
    turns: int = 4
    single: float = 0.35
    mixed: float = 0.4
    patches: float = 0.3
    clip: float = 1.0
    seed: int = 0
    val_every: int = 0
    save_every: int = 0


class Batch(NamedTuple):
    """Token ids [B, S], pixels [B, 3, P, P], and what each position should say next [B, S] and is [B, S], -100 where
    nothing is asked."""

    ids: Tensor
    pixels: Tensor
    answers: Tensor
    patches: Tensor


def rate(step: int, *, peak: float, steps: int, warmup: int) -> float:
    """Linear warm-up, flat until 70 %, then linear to 2 % of the peak."""
    start = 0.7 * steps
    fall = 1.0 if step < start else 1.0 - 0.98 * (step - start) / max(1.0, steps - start)
    return peak * min(1.0, (step + 1) / max(1, warmup)) * fall


def make_batch(step: int, model: TinyLlava, scene: SceneSettings, s: SceneTraining) -> Batch:
    """The scenes and conversations of one step."""
    single = 1.0 if step < s.single * s.steps else s.mixed
    rows = []
    for i in range(s.batch):
        generator = np.random.default_rng([s.seed, step, i])
        rows.append(_conversation(generator, model, scene, s.turns, single))
    longest = max(len(ids) for ids, _, _, _ in rows)
    ids = torch.full((s.batch, longest), PAD)
    answers = torch.full((s.batch, longest), _IGNORE)
    patches = torch.full((s.batch, longest), _IGNORE)
    for i, (tokens, targets, named, _) in enumerate(rows):
        ids[i, : len(tokens)] = torch.tensor(tokens)
        answers[i, : len(tokens)] = torch.tensor(targets)
        patches[i, : len(named)] = torch.tensor(named)
    pixels = torch.from_numpy(np.stack([picture for *_, picture in rows]))
    return Batch(ids, normalise(pixels.float()), answers, patches)


def _conversation(
    generator: np.random.Generator, model: TinyLlava, scene: SceneSettings, turns: int, single: float
) -> tuple[list[int], list[int], list[int], Any]:
    """(token ids, target of each position, thing on each image position, picture) of one scene."""
    word = {token: i for i, token in enumerate(model.vocabulary)}
    while True:
        objects = place(generator, scene)
        alone = [q for a in objects if (q := ask(a, None, scene.size))]
        pairs = [q for a in objects for b in objects if a is not b and (q := ask(a, b, scene.size))]
        if alone and pairs:
            break
    ids = [IMAGE] * model.grid**2
    targets = [_IGNORE] * len(ids)
    for _ in range(turns):
        pool = alone if generator.random() < single else pairs
        question: Question = pool[int(generator.integers(len(pool)))]
        asked = [word[w] for w in question.text.lower().rstrip("?").split()]
        answer = word[question.answer]
        ids += [*asked, answer, END]
        targets += [_IGNORE] * (len(asked) - 1) + [answer, END, _IGNORE]
    return ids, targets, _things(objects, model, scene, word), draw(objects, scene, generator)


def _things(objects: tuple[Placed, ...], model: TinyLlava, scene: SceneSettings, word: Mapping[str, int]) -> list[int]:
    """Per patch the word of the thing that covers most of it, "nothing" where none covers enough."""
    side = scene.size / model.grid
    starts = np.arange(model.grid) * side
    best = np.full((model.grid, model.grid), _COVERED)
    named = np.full((model.grid, model.grid), word["nothing"])
    for thing in objects:
        left, top, right, bottom = thing.box
        along_x = np.clip(np.minimum(right, starts + side) - np.maximum(left, starts), 0, None)
        along_y = np.clip(np.minimum(bottom, starts + side) - np.maximum(top, starts), 0, None)
        covered = along_y[:, None] * along_x[None, :] / side**2
        named = np.where(covered > best, word[thing.name], named)
        best = np.maximum(best, covered)
    return [int(v) for v in named.reshape(-1)]


def fresh_model(kind: TinyLlava, *, seed: int) -> nn.Module:
    """A `LlavaForConditionalGeneration` with random weights from `seed`; the tower's positions start as sines of where
    the patch lies, which the first steps would otherwise be spent on."""
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: nn.Module = LlavaForConditionalGeneration(LlavaConfig(**kind.config()))
    table = model.get_parameter("model.vision_tower.embeddings.position_embedding.weight")
    width = table.shape[1]
    place_G = (torch.arange(kind.grid) + 0.5) / kind.grid
    frequency = math.pi * 2.0 ** torch.arange(width // 4)[:, None].clamp(max=4) / 2
    waves = torch.cat([torch.sin(frequency * place_G), torch.cos(frequency * place_G)]).T  # [grid, width / 2]
    rows, columns = waves[:, None].expand(-1, kind.grid, -1), waves[None].expand(kind.grid, -1, -1)
    with torch.no_grad():
        table[1:] = 0.35 * torch.cat([rows, columns], -1).reshape(kind.grid**2, -1)
    return model


def train_scenes(
    model: nn.Module,
    kind: TinyLlava,
    scene: SceneSettings,
    s: SceneTraining,
    *,
    report: Report = lambda event, numbers: None,
    resume_folder: Path | None = None,
) -> list[dict[str, float]]:
    """Train `model` in place and leave it in eval mode; returns the curve: step, loss, patch loss, and where they were
    measured the accuracies on held-out scenes, `one` and `two` objects.

    Raises NonFiniteLoss (the last good state stays in `resume_folder`), OutputError, CheckpointError as the state does.
    """
    device = next(model.parameters()).device
    named = list(model.named_parameters())
    optimiser = torch.optim.AdamW(model.parameters(), lr=s.lr, weight_decay=0.01)
    history: list[dict[str, float]] = []
    state = TrainingState(resume_folder, _run_key(model, kind, scene, s)) if resume_folder is not None else None
    start = state.load(named, optimiser, history) if state is not None else 0
    model.train()
    for step in range(start, s.steps):
        if state is not None and s.save_every and step % s.save_every == 0 and step > start:
            state.save(step, named, optimiser, history, [])
        for group in optimiser.param_groups:
            group["lr"] = rate(step, peak=s.lr, steps=s.steps, warmup=s.warmup)
        batch = make_batch(step, kind, scene, s)
        logits = model(input_ids=batch.ids.to(device), pixel_values=batch.pixels.to(device)).logits.flatten(0, 1)
        answer = functional.cross_entropy(logits, batch.answers.flatten().to(device))
        patch = functional.cross_entropy(logits, batch.patches.flatten().to(device))
        loss = answer + s.patches * patch
        if not math.isfinite(float(loss.detach())):
            raise NonFiniteLoss(
                "non-finite-loss", f"the loss became {loss.item()} at step {step}", hint="use a smaller lr"
            )
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), s.clip)
        optimiser.step()
        done = step + 1
        numbers = {"step": float(done), "loss": float(answer.detach()), "patches": float(patch.detach())}
        if s.val_every and (done % s.val_every == 0 or done == s.steps):
            numbers |= {"one": held_out(model, kind, scene, s, 1.0), "two": held_out(model, kind, scene, s, 0.0)}
            history.append(numbers)
        report("scenes", {"steps": s.steps, **numbers})
    model.eval()
    return history


@torch.no_grad()
def held_out(
    model: nn.Module, kind: TinyLlava, scene: SceneSettings, s: SceneTraining, single: float, *, n: int = 400
) -> float:
    """Share of `n` questions about scenes outside training whose likeliest next word is the answer; about one object
    (`single` 1) or two (0). Each is the first question about its picture, as models are asked later."""
    was = model.training
    model.eval()
    device = next(model.parameters()).device
    asked = replace(s, turns=1, single=0.0, mixed=single, batch=min(100, n))
    right = total = 0
    for k in range(-(-n // asked.batch)):
        batch = make_batch(_HELD_OUT + k, kind, scene, asked)
        logits = model(input_ids=batch.ids.to(device), pixel_values=batch.pixels.to(device)).logits.cpu()
        answers = (batch.answers != _IGNORE) & (batch.answers != END)
        right += int((logits[answers].argmax(-1) == batch.answers[answers]).sum())
        total += int(answers.sum())
    model.train(was)
    return right / total


def train(op: "TrainScenes", ctx: TrainContext, plan: Plan) -> TrainResult:
    """The training half of `train scenes`; records the curve and the held-out accuracies."""
    kind = op.architecture()
    scene = op.scene()
    names = ("steps", "batch", "lr", "warmup", "turns", "single", "mixed", "patches", "clip", "val_every")
    settings = SceneTraining(
        **{name: getattr(op, name) for name in names}, seed=ctx.seed, save_every=max(1, op.steps // 10)
    )
    model = fresh_model(kind, seed=ctx.seed).to(ctx.device)
    curve = train_scenes(model, kind, scene, settings, report=ctx.report, resume_folder=ctx.scratch / "train")
    record = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "accuracy": {
            "one": held_out(model, kind, scene, settings, 1.0, n=op.held_out),
            "two": held_out(model, kind, scene, settings, 0.0, n=op.held_out),
        },
        "curve": curve,
    }
    state = {_published(n): p.detach().cpu().clone() for n, p in model.named_parameters()}
    return TrainResult(state, record)


def _published(name: str) -> str:
    """What a parameter of the module is called in published checkpoints."""
    for ours, theirs in (
        ("model.language_model.", "language_model.model."),
        ("model.vision_tower.", "vision_tower.vision_model."),
        ("model.multi_modal_projector.", "multi_modal_projector."),
    ):
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    return name


def _run_key(model: nn.Module, kind: TinyLlava, scene: SceneSettings, s: SceneTraining) -> str:
    """Digest of everything that decides the result."""
    described = {k: v for k, v in asdict(s).items() if k != "save_every"}
    text = json.dumps([described, asdict(scene), asdict(kind), weights_digest(model)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
