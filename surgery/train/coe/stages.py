"""The two stages of training after a conversion, on Transformers' trainer (which runs on accelerate).

Stage A: routers of further passes and the gates alpha and beta only; of a plain model its routers, so that both have
the same number of steps. Stage B: all weights, or LoRA on the linear layers with routers and gates free. Gates have no
weight decay.
"""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from surgery.errors import NonFiniteLoss, ResourceError
from surgery.train.coe.data import Sequences

Report = Callable[[str, Mapping[str, float]], None]


@dataclass(frozen=True)
class Stage:
    """Steps of one stage and how they are taken; `lora` is a rank, 0 for all weights."""

    name: str
    steps: int
    lr: float
    batch: int
    accumulate: int
    warmup: float  # share of the steps
    decay: float
    clip: float
    betas: tuple[float, float]
    autocast: bool
    seed: int
    gates_only: bool = False
    lora: int = 0
    save_every: int = 0


TRAINED = "trained.safetensors"


class _Groups(Trainer):
    """Transformers' trainer with gates, norms and biases out of the weight decay, and states of its own.

    The library's states are in the names of a checkpoint: it fuses experts when it loads a model, but not when it goes
    on with a run, and of a model with adapters it keeps the adapters alone. Here a state holds every tensor that is
    trained, by its name in the module.
    """

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        from safetensors.torch import save_file

        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        trained = {n: t.detach().contiguous() for n, t in self.model.named_parameters() if t.requires_grad}
        save_file(trained, str(folder / TRAINED))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        restore(self.model if model is None else model, Path(resume_from_checkpoint))

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        if self.optimizer is None:
            groups: dict[bool, list[torch.nn.Parameter]] = {True: [], False: []}
            for name, tensor in self.model.named_parameters():
                if tensor.requires_grad:
                    groups[tensor.dim() > 1 and ".coe_alpha" not in name and ".coe_beta" not in name].append(tensor)
            rows = [
                {"params": p, "weight_decay": self.args.weight_decay if decays else 0.0} for decays, p in groups.items()
            ]
            betas = (self.args.adam_beta1, self.args.adam_beta2)
            self.optimizer = torch.optim.AdamW(
                [r for r in rows if r["params"]], lr=self.args.learning_rate, betas=betas
            )
        return self.optimizer


class _Watch(TrainerCallback):
    """Passes progress on, keeps the curve, and ends a run whose loss is not finite."""

    def __init__(self, stage: Stage, report: Report, label: str) -> None:
        self.stage, self.report, self.label = stage, report, label
        self.curve: list[tuple[int, float]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if not logs or "loss" not in logs:
            return
        loss = float(logs["loss"])
        if not math.isfinite(loss) or not math.isfinite(float(logs.get("grad_norm", 0.0))):
            raise NonFiniteLoss(
                "non-finite-loss",
                f"{self.label}: the loss became {loss} at step {state.global_step}",
                hint="a lower lr",
            )
        self.curve.append((state.global_step, loss))
        self.report(self.label, {"step": state.global_step, "steps": self.stage.steps, "loss": loss})


def free(model: Any, stage: Stage) -> int:
    """Set which tensors are trained; returns how many numbers those are."""
    chain = hasattr(model.config, "coe_iterations")
    total = 0
    for name, tensor in model.named_parameters():
        own = ".coe_" in name if chain else _is_router(name)
        tensor.requires_grad_(own if stage.gates_only else True)
        total += tensor.numel() if tensor.requires_grad else 0
    return total


def restore(model: Any, state: Path) -> None:
    """Give every tensor that is trained its value in `state`, bit for bit; all of them have to be there."""
    from safetensors.torch import load_file

    found = load_file(str(state / TRAINED))
    mine = {n: t for n, t in model.named_parameters() if t.requires_grad}
    if found.keys() != mine.keys():
        raise RuntimeError(f"{state}: holds other tensors than are trained: {sorted(found.keys() ^ mine.keys())[:3]}")
    with torch.no_grad():
        for name, tensor in mine.items():
            tensor.copy_(found[name])


def last_state(folder: Path) -> tuple[Path | None, int, list[dict[str, Any]]]:
    """(newest whole state under `folder`, its step, what was logged up to it). A state's json is written last, so one
    that a killed process left unfinished has none that can be read."""
    for place in sorted(folder.glob("checkpoint-*"), key=lambda p: -int(p.name.rpartition("-")[2])):
        try:
            state = json.loads((place / "trainer_state.json").read_text())
        except (OSError, ValueError):
            continue
        return place, int(state["global_step"]), list(state["log_history"])
    return None, 0, []


def _is_router(name: str) -> bool:
    return name.endswith((".gate.weight", ".router.weight", ".router.bias")) and ".experts." not in name


def run_stage(
    model: Any, data: Sequences, stage: Stage, *, folder: Path, device: str, report: Report, label: str
) -> tuple[Any, dict[str, Any]]:
    """Train `model` and return it (LoRA folded in) with what was done. A killed run goes on from `folder`.

    Raises `NonFiniteLoss`, and `ResourceError` when accelerate or peft is missing.
    """
    if not stage.steps:
        return model, {"steps": 0}
    trained = free(model, stage)
    if stage.lora and not stage.gates_only:
        model, trained = _adapted(model, stage.lora, seed=stage.seed)
    try:
        arguments = TrainingArguments(
            output_dir=str(folder),
            max_steps=stage.steps,
            per_device_train_batch_size=stage.batch,
            gradient_accumulation_steps=stage.accumulate,
            learning_rate=stage.lr,
            lr_scheduler_type="constant_with_warmup",
            warmup_steps=math.ceil(stage.warmup * stage.steps),
            weight_decay=stage.decay,
            adam_beta1=stage.betas[0],
            adam_beta2=stage.betas[1],
            max_grad_norm=stage.clip,
            bf16=stage.autocast,
            logging_steps=max(1, stage.steps // 50),
            logging_nan_inf_filter=False,
            save_strategy="steps" if 0 < stage.save_every < stage.steps else "no",
            save_steps=stage.save_every or 500,
            save_total_limit=1,
            report_to=[],
            disable_tqdm=True,
            use_cpu=device == "cpu",
            seed=stage.seed,
            data_seed=stage.seed,
            dataloader_pin_memory=False,
            remove_unused_columns=False,
        )
    except ImportError as err:
        raise ResourceError(
            "missing-package", f"training needs accelerate: {str(err).splitlines()[0]}", hint="install the extra train"
        ) from err
    watch = _Watch(stage, report, label)
    trainer = _Groups(model=model, args=arguments, train_dataset=data, callbacks=[watch])
    from transformers import PrinterCallback

    trainer.remove_callback(PrinterCallback)
    last, step, logged = last_state(folder)
    watch.curve += [(int(row["step"]), float(row["loss"])) for row in logged if "loss" in row]
    if last is not None and step >= stage.steps:
        restore(model, last)  # this stage was over; the trainer would take one more step
    else:
        trainer.train(resume_from_checkpoint=str(last) if last is not None else None)
    if stage.lora and not stage.gates_only:
        model = model.merge_and_unload()
    tokens = stage.steps * stage.batch * stage.accumulate * data.ids.shape[1]
    return model, {"steps": stage.steps, "lr": stage.lr, "trained": trained, "tokens": tokens, "curve": watch.curve}


def _adapted(model: Any, rank: int, *, seed: int) -> tuple[Any, int]:
    """The model with LoRA on its linear layers, routers and gates free beside it."""
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as err:
        raise ResourceError("missing-package", "--lora needs peft", hint="install the extra train") from err
    torch.manual_seed(seed)
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", exclude_modules=["lm_head"])
    wrapped = get_peft_model(model, config)
    for name, tensor in wrapped.named_parameters():
        if ".coe_" in name or _is_router(name):
            tensor.requires_grad_(True)
    return wrapped, sum(p.numel() for p in wrapped.parameters() if p.requires_grad)
