"""How experts are used: measures of load and of how one pass follows another. Pure functions on tensors of choices.

Legend: T tokens, N experts, k experts of a token in one pass, S_t the set that pass t chose for a token.
"""

import math
from typing import Any

import torch


def load(index_Tk: torch.Tensor, experts: int) -> torch.Tensor:
    """f [N]: the share of all assignments that each expert has; 1/N each at perfect balance."""
    counts = torch.bincount(index_Tk.reshape(-1), minlength=experts).double()
    return counts / max(1, index_Tk.numel())


def balance(f_N: torch.Tensor) -> dict[str, float]:
    """Of a load: cv = std/mean; max_vio = N·max f − 1; entropy, as a share of log N (1 at perfect balance)."""
    n = len(f_N)
    present = f_N[f_N > 0]
    entropy = float(-(present * present.log()).sum()) / math.log(n) if n > 1 else 1.0
    mean = float(f_N.mean())
    return {
        "cv": float(f_N.std(unbiased=False)) / mean if mean else 0.0,
        "max_vio": n * float(f_N.max()) - 1,
        "entropy": entropy,
    }


def members(index_Tk: torch.Tensor, experts: int) -> torch.Tensor:
    """[T, N], 1 where an expert is in the token's set."""
    return torch.zeros(len(index_Tk), experts, dtype=torch.float32).scatter_(1, index_Tk, 1.0)


def co_activation(first_Tk: torch.Tensor, second_Tk: torch.Tensor, experts: int) -> torch.Tensor:
    """M [N, N]: M[i, j] tokens have i in S_t and j in S_{t+1}."""
    return members(first_Tk, experts).T @ members(second_Tk, experts)


def reselection(first_Tk: torch.Tensor, second_Tk: torch.Tensor, experts: int) -> float:
    """mean over tokens of |S_t ∩ S_{t+1}| / k, with k of the later pass."""
    both = (members(first_Tk, experts) * members(second_Tk, experts)).sum(1)
    return float(both.mean()) / max(1, second_Tk.shape[1])


def norm_ratio(m_TH: Any, n_TH: Any) -> float:
    """mean over tokens of ||m|| / ||n||."""
    return float((m_TH.float().norm(dim=-1) / n_TH.float().norm(dim=-1).clamp_min(1e-12)).mean())
