"""Chain-of-Experts layers (arXiv 2506.18945): the same experts run several times inside one layer, each time routed on
what the time before returned.

This file lies beside the weights and needs torch and transformers only. Legend of shapes: B batch, S sequence,
T = B·S tokens, H hidden, N experts, C passes, K the model's own experts per token, k those of one pass.

    n = norm(r);  z_0 = n;  acc = 0
    for t = 1..C:   m_t = Routed_t(z_{t-1}) + sigma_t · Shared(z_{t-1})
                    z_t = z_{t-1} + alpha_t · m_t          (needed for t < C)
                    acc = acc + beta_t · m_t
    layer output = r + acc

In paper mode alpha and beta are gone: z_t = m_t + z_{t-1} (or m_t without the inner residual), and the layer returns
z_C in place of r + acc unless the outer residual is on.
"""

import math
from typing import Any

import torch
from torch import nn
from transformers import initialization as init
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping

ROUTES = ("append", "split", "paper")


def share_conversions(model_type: str, native: str) -> None:
    """Let checkpoints of `model_type` be renamed and fused on loading as those of `native` are. Without it the experts
    of a checkpoint that stores them one by one would be left random."""
    mapping = get_checkpoint_conversion_mapping(native)
    if mapping is not None:
        register_checkpoint_conversion_mapping(model_type, mapping, overwrite=True)


class _WithBalanceLoss(torch.autograd.Function):
    """Returns its input, and adds the gradient of a balance loss that never shows in the reported loss."""

    @staticmethod
    def forward(ctx: Any, y_TH: torch.Tensor, loss: torch.Tensor) -> torch.Tensor:
        ctx.loss_dtype = loss.dtype
        return y_TH.view_as(y_TH)

    @staticmethod
    def backward(ctx: Any, grad_TH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return grad_TH, torch.ones((), dtype=ctx.loss_dtype, device=grad_TH.device)


def balance_loss(scores_TN: torch.Tensor, index_Tk: torch.Tensor, batch: int, *, per_sequence: bool) -> torch.Tensor:
    """1 at perfect balance. `per_sequence`: mean over sequences of sum_e ce·P with ce = N/(S·k)·#{e chosen} and P the
    mean score, both of one sequence; otherwise sum_e f·P over all tokens, f = N · share of the assignments."""
    tokens, experts = scores_TN.shape
    k = index_Tk.shape[1]
    rows = batch if per_sequence else 1
    chosen = torch.zeros_like(scores_TN, dtype=torch.float32).scatter_add_(
        1, index_Tk, torch.ones_like(index_Tk, dtype=torch.float32)
    )
    load = chosen.view(rows, tokens // rows, experts).sum(1) * (experts / (tokens // rows * k))
    return (load * scores_TN.float().view(rows, tokens // rows, experts).mean(1)).sum(1).mean()


class CoEBlock:
    """What makes a chain of a model's own block of experts; stands before that block's class in the list of bases.

    `coe_router` is the attribute of its router, `coe_scores` how logits become scores, `coe_pair` whether the block
    returns a pair (gpt-oss).
    """

    coe_router = "gate"
    coe_scores = "softmax"
    coe_pair = False
    kernel_layer_name = None  # a kernel that replaces the native block would leave the chain out

    def start_chain(self, config: Any) -> None:
        """Add the routers and gates of further passes to a native block whose class was just changed to this one."""
        router = getattr(self, self.coe_router)
        count, full = config.coe_iterations, router.top_k
        topk = list(config.coe_topk) if config.coe_topk else [full] * count
        if config.coe_route not in ROUTES or count < 1 or len(topk) != count or min(topk) < 1:
            raise ValueError(f"coe_route {config.coe_route!r} with coe_topk {topk} for {count} iterations is no chain")
        self.coe_count, self.coe_topk, self.coe_route = count, topk, config.coe_route
        self.coe_reselect, _, penalty = config.coe_reselect.partition(":")
        self.coe_penalty = float(penalty or 0)
        picks = config.coe_route == "split" and self.coe_reselect != "allow"
        if picks and sum(topk) > full:
            raise ValueError(f"coe_topk {topk} takes more than the {full} experts that the list has")
        self.coe_listed = [full] * count if picks else topk
        self.coe_share = config.coe_routers == "share"
        self.coe_shared = config.coe_shared
        self.coe_inner = config.coe_inner_residual
        self.coe_outer = config.coe_outer_residual or config.coe_route != "paper"
        self.coe_aux, self.coe_aux_alpha = config.coe_aux, config.coe_aux_alpha
        # The published code divides by the sum or multiplies by the scale; DeepSeek-V2's own router only multiplies.
        self.coe_normalise = config.coe_route == "paper" and getattr(config, "norm_topk_prob", False) is True
        if getattr(config, "n_shared_experts", 1) in (0, None) and hasattr(self, "shared_experts"):
            self.shared_experts = None
        if not self.coe_share and count > 1:
            self.coe_gates = nn.ModuleList([type(router)(config) for _ in range(count - 1)])
            if router.weight.device.type != "meta":
                for gate in self.coe_gates:
                    gate.load_state_dict(router.state_dict())
        for t, gate in enumerate(self.routers()):
            gate.top_k = self.coe_listed[t]
        if config.coe_gate != "none" and config.coe_route != "paper":
            width = 1 if config.coe_gate == "scalar" else config.hidden_size
            if count > 1:
                self.coe_alpha = nn.Parameter(torch.empty(count - 1, width, dtype=torch.float32))
            self.coe_beta = nn.Parameter(torch.empty(count, width, dtype=torch.float32))

    def routers(self) -> list[nn.Module]:
        """The router of each pass; the one that all share, once."""
        return [getattr(self, self.coe_router), *getattr(self, "coe_gates", ())]

    def reset_chain(self) -> None:
        """alpha and beta of a chain that computes what the native block does (section "function-preserving")."""
        if hasattr(self, "coe_alpha"):
            init.constant_(self.coe_alpha, 1.0 if self.coe_route == "append" else 0.0)
        if hasattr(self, "coe_beta"):
            start = torch.ones_like(self.coe_beta)
            if self.coe_route == "append":
                start[1:] = 0
            init.copy_(self.coe_beta, start)

    def forward(self, hidden_states: torch.Tensor) -> Any:
        batch, length, width = hidden_states.shape
        z_TH = hidden_states.reshape(-1, width)
        noise = getattr(self, "jitter_noise", 0)
        if self.training and noise > 0:
            z_TH = z_TH * torch.empty_like(z_TH).uniform_(1.0 - noise, 1.0 + noise)
        gated = hasattr(self, "coe_beta")
        acc_TH: Any = None
        taken: list[torch.Tensor] = []
        passes = self._passes()
        for group in passes:
            if len(group) > 1 and not taken and self._make_one_list(group):
                _, weights, index = getattr(self, self.coe_router)(z_TH)
                taken.append(index)
            else:
                chosen = []
                for t in group:
                    chosen.append(self.choose(t, z_TH, taken, batch))
                    taken.append(chosen[-1][1])
                weights, index = chosen[0] if len(group) == 1 else (torch.cat(c, 1) for c in zip(*chosen, strict=True))
            m_TH = self.mix(group, z_TH, index, weights)
            if self._aux is not None:
                m_TH = _WithBalanceLoss.apply(m_TH, self._aux)
            if not gated:
                z_TH = z_TH + m_TH if self.coe_inner or self.coe_route != "paper" else m_TH
                continue
            # In float32: gates in bfloat16 could not move away from 1, and 1·m + 0·m' has to be m to the bit.
            wide, t = m_TH.float(), group[-1]
            beta = self.coe_beta[t].float()
            acc_TH = beta * wide if acc_TH is None else torch.addcmul(acc_TH, beta, wide)
            if group is not passes[-1]:
                z_TH = torch.addcmul(z_TH.float(), self.coe_alpha[t].float(), wide).to(z_TH.dtype)
        out = (acc_TH.to(hidden_states.dtype) if gated else z_TH).reshape(batch, length, width)
        self._aux = None
        if not self.coe_outer:
            self._coe_out = out
        return (out, weights) if self.coe_pair else out

    _aux: torch.Tensor | None = None
    _coe_out: torch.Tensor | None = None

    def choose(
        self, t: int, z_TH: torch.Tensor, taken: list[torch.Tensor], batch: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(weights, experts), each [T, k], of pass `t`; `taken` holds what earlier passes chose."""
        router = getattr(self, self.coe_router) if t == 0 or self.coe_share else self.coe_gates[t - 1]
        if self.coe_share and router.top_k != self.coe_listed[t]:
            router.top_k = self.coe_listed[t]
        logits, weights, index = router(z_TH)
        if self.coe_normalise and weights.shape[1] > 1:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        k = self.coe_topk[t]
        if index.shape[1] > k or (taken and self.coe_route == "split" and self.coe_reselect != "allow"):
            rank = weights
            if taken:
                before = taken[0] if len(taken) == 1 else torch.cat(taken, 1)
                seen = (index.unsqueeze(-1) == before.unsqueeze(-2)).any(-1)
                if self.coe_reselect == "penalty":
                    rank = weights - self.coe_penalty * seen.to(weights.dtype)
                else:
                    rank = weights.masked_fill(seen, -math.inf)
            kept = rank.topk(k, dim=-1).indices
            weights, index = weights.gather(1, kept), index.gather(1, kept)
        self._aux = None
        if self.training and self.coe_aux in ("seq", "batch") and self.coe_aux_alpha and torch.is_grad_enabled():
            scores = logits.float().softmax(-1)
            if self.coe_scores == "sigmoid":
                scores = logits.float().sigmoid()
                scores = scores / scores.sum(-1, keepdim=True)
            loss = balance_loss(scores, index, batch, per_sequence=self.coe_aux == "seq")
            self._aux = self.coe_aux_alpha * loss
        return weights, index

    def mix(self, group: list[int], z_TH: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """m [T, H] of the passes in `group`, which read the same z: the chosen experts, and the shared ones as often as
        these passes have them."""
        m_TH = self.experts(z_TH, index, weights)
        times = {"first": float(0 in group), "every": len(group), "split": len(group) / self.coe_count}[self.coe_shared]
        if not times:
            return m_TH
        if hasattr(self, "shared_expert"):
            shared = self.shared_expert(z_TH)
            shared = torch.sigmoid(self.shared_expert_gate(z_TH)) * shared
        elif getattr(self, "shared_experts", None) is not None:
            shared = self.shared_experts(z_TH)
        else:
            return m_TH
        return m_TH + (shared if times == 1 else shared * times)

    def _passes(self) -> list[list[int]]:
        """Which passes run, and which of them at once. Every one by itself where gradients are asked for, where looking
        at alpha and beta would cost a synchronisation, or where somebody listens to the routers. Otherwise trailing
        passes at beta 0 are left out, since nothing reads them, and passes at alpha 0 read what the one before read:
        with the same beta their lists go through the experts together."""
        alone = [[t] for t in range(self.coe_count)]
        if torch.is_grad_enabled() or self.training or len(alone) == 1 or not hasattr(self, "coe_beta"):
            return alone
        if self.coe_beta.device.type != "cpu" or torch.compiler.is_compiling():
            return alone
        if any(router._forward_hooks for router in self.routers()):
            return alone
        while len(alone) > 1 and not self.coe_beta[alone[-1][0]].any():
            alone.pop()
        groups = alone[:1]
        for (t,) in alone[1:]:
            if not self.coe_alpha[t - 1].any() and torch.equal(self.coe_beta[t], self.coe_beta[t - 1]):
                groups[-1].append(t)
            else:
                groups.append([t])
        return groups

    def _make_one_list(self, group: list[int]) -> bool:
        """Whether the lists of the passes in `group`, which read the same z, together are the list of the first router:
        they share it out, and their routers are still copies."""
        if self.coe_route != "split" or self.coe_reselect != "forbid":
            return False
        if sum(self.coe_topk[t] for t in group) != self.coe_listed[0]:
            return False
        first = getattr(self, self.coe_router).state_dict()
        others = () if self.coe_share else [self.coe_gates[t - 1].state_dict() for t in group if t]
        return all(torch.equal(first[name], other[name]) for other in others for name in first)


class CoEForCausalLM:
    """What makes a chain of a model's own class; stands before it in the list of bases."""

    coe_block: type = CoEBlock
    coe_attribute = "mlp"

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        native = self.coe_block.__mro__[2]
        for number, layer in enumerate(self.model.layers):
            block = getattr(layer, self.coe_attribute)
            if type(block) is not native or (config.coe_layers is not None and number not in config.coe_layers):
                continue
            block.__class__ = self.coe_block
            block.start_chain(config)
            block.reset_chain()  # the block counts as initialised already: the library would pass it over
            if not block.coe_outer:
                layer.register_forward_hook(_without_residual(self.coe_attribute))
        self.post_init()
        if config.coe_route == "paper":
            # The published code leaves its routers as torch draws a linear layer.
            for block in self.modules():
                for gate in block.routers() if isinstance(block, CoEBlock) else ():
                    if gate.weight.device.type != "meta":
                        nn.init.kaiming_uniform_(gate.weight, a=math.sqrt(5))

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, CoEBlock):
            module.reset_chain()

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return True  # Transformers looks for a word in this file's text otherwise

    def get_correct_experts_implementation(self, requested_experts: str | None) -> str:
        chosen = super().get_correct_experts_implementation(requested_experts)
        if requested_experts is None and chosen == "grouped_mm" and not _rows_are_aligned(self.config):
            return "eager"  # torch's grouped_mm wants rows of whole 16 bytes
        return chosen


def _rows_are_aligned(config: Any) -> bool:
    """Whether rows of H and of I elements are whole 16 bytes in the narrowest dtype, two bytes."""
    inner = getattr(config, "moe_intermediate_size", None) or config.intermediate_size
    return config.hidden_size % 8 == 0 and inner % 8 == 0


def _without_residual(attribute: str) -> Any:
    """A hook that lets a decoder layer return its block's output alone, as the paper's layers do. The block's class
    stays the library's, so that wrapping by class (FSDP) and checkpointing go on as before."""

    def hook(layer: nn.Module, args: Any, output: Any) -> Any:
        block = getattr(layer, attribute)
        alone, block._coe_out = block._coe_out, None
        if hasattr(layer, "residual_multiplier"):
            alone = alone * layer.residual_multiplier
        return (alone, *output[1:]) if isinstance(output, tuple) else alone

    return hook
