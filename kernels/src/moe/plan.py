"""The plan of a grouped product: which row computes which pair, and which tile belongs to which expert.

Pairs (token, slot) are numbered token by token and ordered by expert, stably; rows are never padded. Nothing is read
back by the host: the table of tiles has its upper bound, and unused tiles say -1.
"""

from dataclasses import dataclass

import torch

PAIRS_PER_BLOCK = 128  # of the counting sort; the ranks inside a block come from a comparison of all its pairs


@dataclass(frozen=True)
class Plan:
    """Rows of a grouped product, all int32 on the device of the ids.

    `token_of_row`, `pair_of_row` [P]: what a row computes (rows from `expert_start[N]` on compute nothing);
    `row_of_pair` [P]: the inverse, -1 for a pair whose id is no expert; `expert_start` [N + 1]: the rows of an expert;
    `tile_expert`, `tile_row` [max tiles]: a tile's expert and first row, -1 where there is none; `num_tiles` [1].
    """

    token_of_row: torch.Tensor
    row_of_pair: torch.Tensor
    expert_start: torch.Tensor
    tile_expert: torch.Tensor
    tile_row: torch.Tensor
    num_tiles: torch.Tensor
    pair_of_row: torch.Tensor
    block_m: int

    @property
    def num_experts(self) -> int:
        return self.expert_start.numel() - 1


def max_tiles(pairs: int, num_experts: int, block_m: int) -> int:
    """No routing needs more tiles: whole ones, and one cut short for each expert that has rows at all."""
    return pairs // block_m + min(num_experts, pairs)


def build_plan(top_k_index: torch.Tensor, num_experts: int, block_m: int) -> Plan:
    """The plan of `top_k_index` [T, K] (int32 or int64) for tiles of `block_m` rows.

    Ids outside [0, num_experts) mark pairs without an expert. Kernels on CUDA, a stable sort elsewhere; both give the
    same numbers. Raises ValueError for another shape or dtype, or 2^31 pairs and more.
    """
    if top_k_index.dim() != 2:
        raise ValueError(f"top_k_index must be [tokens, k], got {tuple(top_k_index.shape)}")
    ids = top_k_index.contiguous().view(-1)
    if top_k_index.is_cuda:
        return kernel_plan(ids, num_experts, block_m, top_k=top_k_index.shape[1])
    token = torch.arange(ids.numel(), dtype=torch.int32, device=ids.device) // max(1, top_k_index.shape[1])
    return sorted_plan(ids, token, num_experts, block_m)


def sorted_plan(ids: torch.Tensor, token_of_pair: torch.Tensor, num_experts: int, block_m: int) -> Plan:
    """The plan by a stable sort of flat `ids` [P], on any device and without a sync: what the kernels do, defined."""
    _check(ids, num_experts, block_m)
    pairs, device = ids.numel(), ids.device
    expert = torch.where((ids >= 0) & (ids < num_experts), ids, num_experts)
    in_order, pair_of_row = torch.sort(expert, stable=True)
    bounds = torch.arange(num_experts + 1, device=device, dtype=in_order.dtype)
    start = torch.searchsorted(in_order, bounds).to(torch.int32)
    row = torch.arange(pairs, dtype=torch.int32, device=device)
    row_of_pair = torch.empty(pairs, dtype=torch.int32, device=device)
    row_of_pair[pair_of_row] = torch.where(in_order < num_experts, row, -1)
    tiles = (start[1:] - start[:-1] + block_m - 1) // block_m
    upto = tiles.cumsum(0)
    tile = torch.arange(max_tiles(pairs, num_experts, block_m), device=device)
    tile_expert = torch.searchsorted(upto, tile, right=True)
    known = tile_expert < num_experts
    inside = tile_expert.clamp(max=num_experts - 1)
    tile_row = start[inside] + (tile - (upto - tiles)[inside]) * block_m
    return Plan(
        token_of_row=token_of_pair[pair_of_row].to(torch.int32),
        row_of_pair=row_of_pair,
        expert_start=start,
        tile_expert=torch.where(known, tile_expert, -1).to(torch.int32),
        tile_row=torch.where(known, tile_row, -1).to(torch.int32),
        num_tiles=upto[-1:].to(torch.int32),
        pair_of_row=pair_of_row.to(torch.int32),
        block_m=block_m,
    )


def kernel_plan(
    ids: torch.Tensor,
    num_experts: int,
    block_m: int,
    *,
    top_k: int = 0,
    token_of_pair: torch.Tensor | None = None,
    counts: torch.Tensor | None = None,
    pairs_per_block: int = PAIRS_PER_BLOCK,
) -> Plan:
    """The plan by kernels from flat contiguous `ids` [P]; pair p is of token p // top_k, or as `token_of_pair` says.

    `counts` [blocks, N] of a kernel that counted already, in blocks of `pairs_per_block` pairs, saves a launch.
    """
    from .launch import triton_plan

    _check(ids, num_experts, block_m)
    pairs, device = ids.numel(), ids.device
    size = {"dtype": torch.int32, "device": device}
    tiles = max_tiles(pairs, num_experts, block_m)
    # The kernels write every entry that is ever read; without pairs nothing is launched.
    new = torch.empty if pairs else torch.zeros
    plan = Plan(
        token_of_row=new(pairs, **size),
        row_of_pair=new(pairs, **size),
        expert_start=new(num_experts + 1, **size),
        tile_expert=new(tiles, **size),
        tile_row=new(tiles, **size),
        num_tiles=new(1, **size),
        pair_of_row=new(pairs, **size),
        block_m=block_m,
    )
    if pairs:
        triton_plan(plan, ids, token_of_pair, counts, top_k=top_k, pairs_per_block=pairs_per_block)
    return plan


def _check(ids: torch.Tensor, num_experts: int, block_m: int) -> None:
    if ids.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"expert ids must be int32 or int64, got {ids.dtype}")
    if ids.numel() >= 2**31:
        raise ValueError(f"{ids.numel()} pairs of token and expert; a plan numbers fewer than 2^31")
    if num_experts < 1 or block_m < 1:
        raise ValueError(f"need at least one expert and one row a tile, got {num_experts} and {block_m}")
