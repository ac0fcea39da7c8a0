"""AdaptVis: let a checkpoint carry an attention patch (arXiv 2503.01773).

Inputs: one image-text-to-text checkpoint. Changes: `adaptvis` in config.json, the folder custom_generate/ with the code
that transformers runs for it, a section of the README. Every weight file is taken over byte for byte.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

from surgery.arch.carried import config_edits, indexes, keep_all, part_names
from surgery.errors import CheckpointError, UsageError, closest
from surgery.graph.op import Compute, Param, Plan, PlanContext, SideFile, json_bytes
from surgery.steering.carried import CODE_FILES, code_digest, code_files, readme, spec_line, text_sizes
from surgery.steering.patch import CONFIDENCES, KEYS_OF, Patch, check_alpha, heads_text, layers_text
from surgery.store import digests
from surgery.store.checkpoint import Checkpoint
from surgery.store.layout import read_json

_TUNED = (
    "alpha1", "alpha2", "beta", "scale", "mode", "layers", "heads", "rows", "steps", "image_keys", "confidence",
    "confidence_decimals", "tau",
)  # fmt: skip
_DEFAULTS: Mapping[str, Any] = {
    "mode": "logit", "layers": None, "heads": None, "rows": "last", "steps": "first", "image_keys": "id",
    "confidence": "max-prob", "confidence_decimals": None, "tau": None,
}  # fmt: skip


@dataclass(frozen=True)
class AdaptVis:
    """Attach an attention patch to an image-text-to-text checkpoint; its weights stay as they are, byte for byte.

    When the answer starts, the last prompt position's attention to the image is scaled: by alpha1 where the first
    token's probability is below beta, else by alpha2 (AdaptVis), or by one --scale for every sample (ScalingVis). Good
    numbers depend on model and task: there is no default, surgery adaptvis tune finds them.

    Examples:

      surgery adaptvis attach llava-scenes -o av --from t.json

      surgery adaptvis attach ./llava-1.5-7b -o av --alpha1 0.5 --alpha2 1.5 --beta 0.4 --layers 0-31

    Users of transformers load the result with trust_remote_code=True; without it the model answers unpatched.
    """

    from_: Annotated[str | None, Param("Take the numbers that surgery adaptvis tune wrote.", (), "TUNE.json")] = None
    alpha1: Annotated[float | None, Param("Alpha where the confidence is below --beta.")] = None
    alpha2: Annotated[float | None, Param("Alpha where it is not.")] = None
    beta: Annotated[float | None, Param("Threshold of the confidence, 0 to 1.01 (above 1: always alpha1).")] = None
    scale: Annotated[float | None, Param("One alpha for every sample (ScalingVis), in place of the three.")] = None
    layers: Annotated[str | None, Param("Text layers to steer [default: all].", ("-l",), "0-31")] = None
    heads: Annotated[str | None, Param('Heads to steer, "8:3,7 9:1" [default: all].', (), "L:H,..")] = None
    mode: Annotated[str | None, Param("logit (the paper's), mass-preserving, bias or abs.")] = None
    rows: Annotated[str | None, Param("Steered positions: last, last:N or after-image.")] = None
    steps: Annotated[str | None, Param("first: the prompt alone; all: every decoded token too.")] = None
    image_keys: Annotated[str | None, Param("Image positions: id, span or id+video.")] = None
    confidence: Annotated[str | None, Param("max-prob (the paper's), margin or entropy.")] = None
    confidence_decimals: Annotated[int | None, Param("Round the confidence first; the reference code uses 2.")] = None
    tau: Annotated[float | None, Param("Blend the alphas around beta with this width.")] = None
    compose: Annotated[bool, Param("Multiply --scale into the patch that the checkpoint carries already.")] = False

    name: ClassVar[str] = "adaptvis-attach"
    version: ClassVar[int] = 1
    parents: ClassVar[int] = 1
    trainer: ClassVar[str | None] = None

    def plan(self, ctx: PlanContext, base: Checkpoint) -> Plan:
        """Every tensor kept in its file; config, code and README written."""
        config = base.config
        layers, heads = text_sizes(base)
        if "custom_generate/generate.py" in base.side_files and "adaptvis" not in config:
            raise CheckpointError(
                "own-generate",
                f"{base.name}: has a custom_generate/generate.py of its own, which the patch would replace",
                hint="a checkpoint has one way to generate: remove that folder from a copy first",
            )
        tuned = self._tuned()
        spec, warnings = self._spec(base, tuned, layers, heads)
        part = base.part()
        assert part.config_file is not None
        edited = {**config, "adaptvis": spec}
        page = base.root / "README.md"
        before = page.read_text(encoding="utf-8", errors="replace") if "README.md" in base.side_files else ""
        written = {part.config_file: json_bytes(edited), "README.md": readme(before, spec).encode()}
        written |= {f"custom_generate/{name}": source for name, source in code_files().items()}
        files = [SideFile(n, source=str(base.root / n)) for n in base.side_files if n not in written]
        files += [SideFile(n, content=c) for n, c in written.items()]
        files += indexes(base) if base.layout != "pickle" else ()
        inputs = {"code": code_digest()} | ({"from": digests.file_digest(Path(self.from_))} if self.from_ else {})
        report = {
            "family": config.get("model_type"),
            "text": {"layers": layers, "heads": heads},
            "image_token": config.get("image_token_id", config.get("image_token_index")),
            "spec": spec,
            "replaces": config.get("adaptvis"),
            "tensors": sum(len(p.tensors) for p in base.parts.values()),
        }
        return Plan(
            tuple(keep_all(base)),
            part_names(base),
            tuple(files),
            config_edits=config_edits(part.config_file, dict(config), edited),
            warnings=tuple(warnings),
            report=report,
            inputs=inputs,
            mirror=base if base.layout != "pickle" else None,
        )

    def run(self, task: Compute, tensors: list[Any], generator: Any) -> Any:
        """Nothing is ever computed."""
        raise AssertionError(task.name)

    def describe(self, plan: Plan) -> list[str]:
        """Lines of a dry run."""
        r = plan.report
        sizes = " x ".join(str(v or "?") for v in (r["text"]["layers"], r["text"]["heads"]))
        return [
            f"family   {r['family']}, text layers x heads {sizes}, image token {r['image_token']}",
            f"patch    {spec_line(r['spec'])}",
            *([f"replaces {spec_line(r['replaces'])}"] if r["replaces"] else []),
            f"weights  {r['tensors']:,} tensors unchanged",
            f"files    config.json, README.md, {', '.join(f'custom_generate/{n}' for n in CODE_FILES)}",
            "load     from_pretrained(OUT, trust_remote_code=True).generate(...); without it: unpatched",
        ]

    def announce(self, plan: Plan) -> list[str]:
        """What is said before the work starts: the same."""
        return self.describe(plan)

    def _tuned(self) -> dict[str, Any]:
        """What the file of --from says, explicit options on top."""
        values: dict[str, Any] = {}
        if self.from_ is not None:
            try:
                found = read_json(Path(self.from_))
            except CheckpointError as err:
                raise UsageError("tune", err.message, hint="name a file that surgery adaptvis tune wrote") from None
            if not isinstance(found, dict) or "surgery_tune" not in found:
                raise UsageError(
                    "tune",
                    f"{self.from_}: not the result of a tuning",
                    hint="surgery adaptvis tune CKPT DATA -o t.json",
                )
            values = {k: v for k, v in found.items() if k in (*_TUNED, "tuned_on")}
        own = {k: getattr(self, k) for k in _TUNED if getattr(self, k) is not None}
        if "scale" in own:
            values = {k: v for k, v in values.items() if k not in ("alpha1", "alpha2", "beta")}
        return values | own

    def _spec(
        self, base: Checkpoint, values: dict[str, Any], layers: int | None, heads: int | None
    ) -> tuple[dict[str, Any], list[str]]:
        """The stored patch, checked, and what to warn about."""
        old = base.config.get("adaptvis")
        if self.compose:
            values = self._composed(base, old, values)
        adaptive = [k for k in ("alpha1", "alpha2", "beta") if values.get(k) is not None]
        if values.get("scale") is not None and adaptive:
            raise UsageError("patch", f"--scale and --{adaptive[0]} exclude each other", hint="give one of the two")
        if values.get("scale") is None and len(adaptive) < 3:
            raise UsageError(
                "patch",
                "no patch is given: --alpha1, --alpha2 and --beta belong together",
                hint="surgery adaptvis tune finds them (--from t.json), or give --scale for one alpha",
            )
        spec: dict[str, Any] = {"version": 1} | {
            k: values.get(k) if values.get(k) is not None else d for k, d in _DEFAULTS.items()
        }
        spec |= {k: values[k] for k in ("scale", *adaptive) if values.get(k) is not None}
        patch = Patch(
            mode=spec["mode"],
            layers=layers_text(spec["layers"]),
            heads=heads_text(spec["heads"]),
            rows=spec["rows"],
            steps=spec["steps"],
        )
        if spec["mode"] == "knock-out":
            raise UsageError("mode", "mode knock-out has no alpha to adapt", hint="surgery probe attention knocks out")
        for key in ("scale", "alpha1", "alpha2"):
            if key in spec:
                spec[key] = check_alpha(f"--{key}", spec[key], spec["mode"])
        if "beta" in spec and not (isinstance(spec["beta"], int | float) and 0 <= spec["beta"] <= 1.01):
            raise UsageError(
                "beta", f"--beta {spec['beta']}: not in [0, 1.01]", hint="it is compared with a probability"
            )
        for key, known in (
            ("image_keys", tuple(KEYS_OF)),
            ("confidence", tuple(c for c in CONFIDENCES if c != "option-prob")),
        ):
            if spec[key] not in known:
                raise UsageError(
                    key.replace("_", "-"), f"{key} '{spec[key]}': unknown", hint=closest(str(spec[key]), list(known))
                )
        if spec["tau"] is not None and not (math.isfinite(spec["tau"]) and spec["tau"] > 0):
            raise UsageError("tau", f"--tau {spec['tau']}: not above 0", hint="leave it out for a hard threshold")
        if spec["confidence_decimals"] is not None and not 0 <= spec["confidence_decimals"] <= 12:
            raise UsageError(
                "decimals", f"--confidence-decimals {spec['confidence_decimals']}: out of range", hint="0 to 12"
            )
        if (patch.layers and layers is None) or (patch.heads and None in (layers, heads)):
            raise CheckpointError(
                "unknown-sizes",
                f"{base.name}: the config does not say how many layers and heads its text model has",
                hint="leave out --layers and --heads",
            )
        chosen, picked = patch.chosen_layers(layers or 0), patch.chosen_heads(layers or 0, heads or 0)
        spec["layers"] = None if chosen is None else list(chosen)
        spec["heads"] = None if picked is None else {str(n): list(row) for n, row in picked.items()}
        spec["tuned_on"] = values.get("tuned_on")
        return spec, _notes(base, spec)

    def _composed(self, base: Checkpoint, old: Any, values: Mapping[str, Any]) -> dict[str, Any]:
        """The patch that is there, all its alphas multiplied."""
        if not isinstance(old, dict):
            raise UsageError("compose", f"{base.name}: carries no patch to compose with", hint="leave out --compose")
        if set(values) - {"scale"} or "scale" not in values or old.get("mode", "logit") != "logit":
            raise UsageError(
                "compose", "--compose multiplies one --scale into a patch of mode logit", hint="--compose --scale 0.5"
            )
        factor = check_alpha("--scale", values["scale"])
        out = {k: v for k, v in old.items() if k not in ("version", "tuned_on")}
        for key in ("scale", "alpha1", "alpha2"):
            if out.get(key) is not None:
                product = float(out[key]) * factor
                out[key] = 1.0 if math.isclose(product, 1.0, rel_tol=1e-9) else product
        return out


def _notes(base: Checkpoint, spec: Mapping[str, Any]) -> list[str]:
    notes = []
    if 0.0 in [spec.get(k) for k in ("scale", "alpha1", "alpha2")]:
        notes.append("alpha 0 makes all image positions weigh the same; it does not hide the image (knock-out)")
    if spec.get("alpha1", 0.5) > 1 or spec.get("alpha2", 1.5) < 1:
        notes.append(
            "alpha1 above 1 or alpha2 below 1: unsure samples are sharpened or sure ones smoothed; taken as given"
        )
    tuned = spec.get("tuned_on") or {}
    if tuned.get("model") and tuned["model"] != f"sha256:{base.digest}":
        notes.append("tuned on a model of other weights: thresholds seldom carry over; tune on this one")
    return notes
