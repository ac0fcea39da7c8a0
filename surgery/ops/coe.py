"""Coe: turn a mixture of experts into a Chain-of-Experts, and back.

Paper: Chain-of-Experts, arXiv 2506.18945; `split` and `append` keep the pretrained function. Inputs: one checkpoint of
a known family. Changes: a few tensors are added (routers of further passes, gates), the config gets another model type,
and modeling files lie beside the weights. No tensor of the base changes, and its files are taken whole.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Annotated, Any, ClassVar

from surgery.arch.carried import config_edits, kept, part_names, side_files
from surgery.arch.layers import parse_layers
from surgery.arch.moe.carrying import BASE_CONFIG, base_config, carried_files, coe_config, is_carried
from surgery.arch.moe.chain import MODES, Chain, check_word, costs, describe_chain, parse_topk, share_out
from surgery.arch.moe.families import COE, ExpertLayer, Experts, find_experts
from surgery.arch.moe.noise import noise_of, noisy
from surgery.errors import CheckpointError, UsageError
from surgery.graph.op import Compute, Entry, Given, Keep, Param, Plan, PlanContext, SideFile, json_bytes
from surgery.store.checkpoint import Checkpoint
from surgery.store.tensors import Part

_ADDED = (".coe_gates.", ".coe_alpha", ".coe_beta")


@dataclass(frozen=True)
class Coe:
    """Run the experts of each layer several times, each time routed on what they returned (Chain-of-Experts).

    Examples:

      surgery coe moe -C 2 -o coe                  # as much computation as before, the same function

      surgery coe moe -C 2 --mode append -o coe    # twice the routed computation, the same function to the bit

      surgery coe coe --collapse -o back           # the plain model again

    split shares out the model's own list of K experts among the passes; append runs the whole list again, at weight
    zero until trained; identity is one pass; paper is the published architecture, which a pretrained model does not
    survive. Untouched files are copied whole (or linked, --link hard); what is added lies in one file.
    """

    iterations: Annotated[int, Param("C, passes through the experts of a layer.", ("-C",))] = 2
    mode: Annotated[str | None, Param("split, append, identity or paper [default: split; append when K < C].")] = None
    topk_per_iter: Annotated[str | None, Param("Experts of each pass: 4,4 [default: K shared out].", (), "LIST")] = None
    routers: Annotated[str, Param("Routers of further passes: copy, noise:0.01 (of their spread), share.")] = "copy"
    gate: Annotated[str, Param("Gates alpha and beta: vector (one number a channel) or scalar.")] = "vector"
    shared: Annotated[
        str | None, Param("Shared experts: in the first pass, in every one, or split [default: first in split].")
    ] = None
    reselect: Annotated[
        str | None, Param("May a pass take an expert again: forbid, allow, penalty:L [default: forbid in split].")
    ] = None
    layers: Annotated[str, Param("Layers to convert: all, or 0-26.", ("-l",))] = "all"
    aux: Annotated[str, Param("Balance loss in training: native (the model's own), seq, batch, none.")] = "native"
    aux_alpha: Annotated[float, Param("Weight of the balance loss seq or batch.")] = 0.001
    inner_residual: Annotated[bool, Param("Paper mode: each pass adds to what it read.")] = True
    outer_residual: Annotated[bool, Param("Paper mode: the layer keeps its residual.")] = False
    verify: Annotated[
        str, Param("none, keys (names, shapes, files), logits (load both and compare) [auto: logits when it fits].")
    ] = "auto"
    collapse: Annotated[bool, Param("Take a converted model back to the plain one.")] = False
    i_know_it_changes_the_model: Annotated[bool, Param("Needed for --mode paper on trained weights.")] = False
    from_scratch: Annotated[bool, Param("The weights are random: --mode paper loses nothing.")] = False

    name: ClassVar[str] = "coe"
    version: ClassVar[int] = 1
    parents: ClassVar[int] = 1
    trainer: ClassVar[str | None] = None

    def plan(self, ctx: PlanContext, base: Checkpoint) -> Plan:
        """Every tensor of the base as it is, and the added ones; nothing is computed but noise that is asked for."""
        check_word("--verify", self.verify, ("auto", "none", "keys", "logits"))
        part = base.part()
        if part.config is None:
            raise CheckpointError(
                "no-config", f"{base.name}: no config.json beside the weights", hint="name the folder"
            )
        if self.collapse:
            return self._collapsed(base, part, part.config)
        experts = find_experts(part.config, part.tensors, base.name)
        chain = self._chain(base, experts)
        chosen = [e for e in experts.layers if chain.layers is None or e.number in chain.layers]
        added = self._added(part, experts, chain, chosen)
        clash = next((e.name for e in added if e.name in part.tensors), None)
        if clash is not None:
            raise CheckpointError("already-coe", f"{base.name}: has a '{clash}' already", hint="use the plain model")
        entries = [kept(part, n, ref) for n, ref in part.tensors.items()]
        config = coe_config(part.config, experts.family, chain.knobs())
        files = side_files(base, {"config.json": config})
        files += (SideFile(BASE_CONFIG, source=str(base.root / "config.json")),)
        files += tuple(SideFile(n, content=c) for n, c in carried_files(experts.family).items())
        report = {
            "family": experts.family.model_type,
            "layers": {"converted": len(chosen), "experts": len(experts.layers), "total": experts.depth},
            "experts": experts.count,
            "topk": experts.topk,
            "chain": {**chain.__dict__, "topk": list(chain.topk), "layers": [e.number for e in chosen]},
            "added": {"tensors": len(added), "bytes": sum(e.nbytes for e in added)},
            "parameters": sum(prod(e.shape) for e in (*entries, *added)),
            "costs": costs(chain, experts.count, experts.topk),
            "function": chain.function(has_shared=experts.shared),
        }
        return Plan(
            (*entries, *added),
            part_names(base),
            files,
            config_edits=config_edits("config.json", part.config, config),
            warnings=_warnings(base, chain, has_shared=experts.shared),
            report=report,
            new_file="model-coe",
        )

    def run(self, task: Compute, tensors: list[Any], generator: Any) -> Any:
        """A router's weight with noise of `how` times its own standard deviation."""
        return noisy(tensors[0], task.how, generator)

    def tensor_params(self, task: Compute) -> list[float]:
        """What a noisy router depends on beside its origin and its draw: how much noise."""
        return [task.how]

    def check(self, folder: Path, plan: Plan, parents: list[Checkpoint], report: Any) -> dict[str, Any]:
        """What --verify asks for, on the finished folder (section 3: no missing and no unexpected keys)."""
        if self.verify == "none":
            return {}
        from surgery.arch.moe.verifying import check_keys, check_logits, fits_in_memory

        facts = check_keys(folder, plan)
        asked = self.verify == "logits" or (self.verify == "auto" and fits_in_memory(parents[0]))
        if not asked:
            return facts
        return facts | check_logits(parents[0], folder, expected=plan.report["function"], collapse=self.collapse)

    def describe(self, plan: Plan) -> list[str]:
        """Lines of a dry run."""
        if self.collapse:
            return [f"collapse   {len(plan.dropped):,} added tensors dropped", f"function   {plan.report['function']}"]
        return describe_chain(plan.report)

    def summary(self, facts: Mapping[str, Any]) -> list[str]:
        """What the verification found, for the reader of a finished run."""
        return [f"function: {facts['function']}"] if "function" in facts else ["verified: names, shapes and files"]

    def _chain(self, base: Checkpoint, experts: Experts) -> Chain:
        """The options after defaults, checked against the model."""
        where, k = base.name, experts.topk
        if self.iterations < 1 or self.iterations > 64:
            raise UsageError("iterations", f"-C {self.iterations}: out of range", hint="1 to 64")
        mode = self.mode or ("append" if k < self.iterations else "split")
        check_word("--mode", mode, MODES)
        if mode == "identity" and self.iterations not in (1, 2):
            raise UsageError("iterations", f"--mode identity is one pass, not {self.iterations}", hint="leave out -C")
        count = 1 if mode == "identity" else self.iterations
        if mode == "split" and k < count:
            raise UsageError("too-few-experts", f"{where}: K={k} cannot be split in {count}", hint="use --mode append")
        topk = self._topk(mode, k, count, experts.count)
        if mode == "paper" and not (self.i_know_it_changes_the_model or self.from_scratch):
            raise UsageError(
                "not-preserving",
                f"{where}: --mode paper is not function-preserving: a trained model has to be trained again",
                hint="take split or append, or pass --i-know-it-changes-the-model or --from-scratch",
            )
        if not 0 <= self.aux_alpha < 10:
            raise UsageError("bad-option", f"--aux-alpha {self.aux_alpha}: out of range", hint="0.001 is usual")
        routers = check_word("--routers", self.routers, ("copy", "share", "noise:"))
        noise_of(routers)
        return Chain(
            mode=mode,
            iterations=count,
            topk=topk,
            reselect=check_word(
                "--reselect",
                self.reselect or ("forbid" if mode == "split" else "allow"),
                ("forbid", "allow", "penalty:"),
            ),
            routers=routers,
            gate=check_word("--gate", self.gate, ("vector", "scalar")),
            shared=check_word(
                "--shared", self.shared or ("first" if mode == "split" else "every"), ("first", "every", "split")
            ),
            aux=check_word("--aux", self.aux, ("native", "seq", "batch", "none")),
            aux_alpha=self.aux_alpha,
            inner=self.inner_residual,
            outer=self.outer_residual if mode == "paper" else True,
            layers=self._layers(where, experts),
        )

    def _topk(self, mode: str, k: int, count: int, n: int) -> tuple[int, ...]:
        if self.topk_per_iter is None:
            return (k,) * count if mode in ("append", "identity") or k < count else share_out(k, count)
        topk = parse_topk(self.topk_per_iter)
        said = f"--topk-per-iter {self.topk_per_iter}"
        if len(topk) != count:
            raise UsageError("topk", f"{said}: {len(topk)} numbers for {count} passes", hint="one for each pass")
        if mode == "split" and sum(topk) != k:
            raise UsageError("topk", f"{said}: sums to {sum(topk)}, and the model takes K={k}", hint=f"sum to {k}")
        if mode in ("append", "identity") and topk[0] != k:
            raise UsageError(
                "topk", f"{said}: the first pass of append is the model's own, K={k}", hint=f"begin with {k}"
            )
        if max(topk) > n:
            raise UsageError("topk", f"{said}: the model has {n} experts", hint=f"at most {n} a pass")
        return topk

    def _layers(self, where: str, experts: Experts) -> tuple[int, ...] | None:
        if self.layers == "all":
            return None
        have = [e.number for e in experts.layers]
        chosen = parse_layers(self.layers, experts.depth)
        lacking = [n for n in chosen if n not in have]
        if lacking:
            raise UsageError(
                "layers", f"{where}: layer {lacking[0]} has no experts", hint=f"layers with experts: {have}"
            )
        return tuple(chosen)

    def _added(self, part: Part, experts: Experts, chain: Chain, chosen: list[ExpertLayer]) -> list[Entry]:
        from array import array
        from sys import byteorder

        constants: list[tuple[str, tuple[int, int], bytes]] = []
        for name, (shape, first, rest) in chain.gates(experts.width).items():
            rows = array("f", [first] * shape[1] + [rest] * (shape[1] * (shape[0] - 1)))
            if byteorder == "big":
                rows.byteswap()
            constants.append((name, shape, rows.tobytes()))  # the same object for all layers
        entries: list[Entry] = []
        noise = noise_of(chain.routers)
        for layer in chosen:
            if chain.routers != "share":
                for number in range(chain.iterations - 1):
                    for own, ref in layer.router.items():
                        where = {
                            "part": part.name,
                            "name": f"{layer.prefix}.coe_gates.{number}.{own}",
                            "dtype": ref.dtype,
                            "shape": ref.shape,
                        }
                        if noise and own == "weight":
                            entries.append(Compute(**where, how=noise, refs=(ref,), random=True))
                        else:
                            entries.append(Keep(**where, ref=ref))
            entries += [
                Given(part=part.name, name=f"{layer.prefix}.{n}", dtype="F32", shape=s, data=data)
                for n, s, data in constants
            ]
        return entries

    def _collapsed(self, base: Checkpoint, part: Part, config: Mapping[str, Any]) -> Plan:
        """The base tensors, the base config, and none of what travelled along."""
        kind = config.get("model_type")
        if not isinstance(kind, str) or not kind.startswith(COE):
            raise UsageError(
                "not-coe", f"{base.name}: not a Chain-of-Experts checkpoint ({kind})", hint="nothing to undo"
            )
        entries = [kept(part, n, ref) for n, ref in part.tensors.items() if not any(a in n for a in _ADDED)]
        dropped = tuple(n for n in part.tensors if any(a in n for a in _ADDED))
        plain, original = base_config(base, config)
        files = [f for f in side_files(base) if not is_carried(f.relative) and f.relative != "config.json"]
        files.append(
            SideFile("config.json", source=str(base.root / BASE_CONFIG))
            if original
            else SideFile("config.json", content=json_bytes(plain))
        )
        exact = _at_its_start(base, part, config)
        kept_function = ("rounding" if config.get("coe_route") == "split" else "bit-exact") if exact else "changed"
        lost = "its layers compute something else" if config.get("coe_route") == "paper" else "its gates were trained"
        warnings = () if exact else (f"{base.name}: {lost}; the plain model is not what it was before",)
        return Plan(
            tuple(entries),
            part_names(base),
            tuple(files),
            dropped=dropped,
            config_edits=config_edits("config.json", config, plain),
            warnings=warnings,
            report={"family": kind.removeprefix(COE), "function": kept_function},
            new_file="",
        )


def _warnings(base: Checkpoint, chain: Chain, *, has_shared: bool) -> tuple[str, ...]:
    if chain.mode == "paper":
        return (f"{base.name}: paper mode is not function-preserving; the model has to be trained",)
    if chain.function(has_shared=has_shared) == "changed":
        why = f"--shared {chain.shared}, --reselect {chain.reselect}, --routers {chain.routers}"
        return (f"{base.name}: --mode {chain.mode} does not keep the function with {why}",)
    return ()


def _at_its_start(base: Checkpoint, part: Part, config: Mapping[str, Any]) -> bool:
    """Whether the first pass alone makes the output, or all passes read the same: collapsing keeps the function."""
    route = config.get("coe_route")
    if route == "paper":
        return False
    name = ".coe_alpha" if route == "split" else ".coe_beta"
    for full, ref in part.tensors.items():
        if full.endswith(name):
            # beta has to be (1, 0, …, 0); alpha has to be 0.
            row = ref.nbytes // ref.shape[0] if route != "split" and ref.shape[0] else 0
            data = b"".join(bytes(piece) for piece in base.chunks(ref))
            if any(data[row:]) or (row and data[:row] != b"\0\0\x80\x3f" * (row // 4)):
                return False
        if route == "split" and full.endswith(".coe_beta"):
            data = b"".join(bytes(piece) for piece in base.chunks(ref))
            if data != b"\0\0\x80\x3f" * (len(data) // 4):
                return False
    return True
