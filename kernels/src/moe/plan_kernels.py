"""The plan of a grouped product on the kernels, and the entry that makes one wherever the ids lie."""

import torch

from .launch import ceil_div, power_of_two, run
from .plan import Plan, check_ids, max_tiles, sorted_plan

PAIRS_PER_BLOCK = 128  # of the counting sort; the ranks inside a block come from a comparison of all its pairs


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
    check_ids(ids, num_experts, block_m)
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
        _fill(plan, ids, token_of_pair, counts, top_k=top_k, pairs_per_block=pairs_per_block)
    return plan


def _fill(
    plan: Plan, ids: torch.Tensor, token_of_pair: torch.Tensor | None, counts: torch.Tensor | None, *,
    top_k: int, pairs_per_block: int,
) -> None:  # fmt: skip
    """Count, scan, scatter: every entry of `plan` that is ever read."""
    from .device.plan import count_pairs, scan_counts, scatter_pairs

    pairs, number = ids.numel(), plan.num_experts
    blocks = ceil_div(pairs, pairs_per_block)
    size = {"BP": power_of_two(pairs_per_block), "BE": power_of_two(number)}
    if counts is None:
        counts = torch.empty(blocks, number, dtype=torch.int32, device=ids.device)
        run(count_pairs, (blocks,), ids, counts, pairs, number, PAIRS=pairs_per_block, **size, num_warps=4)
    before = torch.empty_like(counts)
    totals = torch.empty(number, dtype=torch.int32, device=ids.device)
    run(scan_counts, (number,), counts, before, totals, blocks, number, BB=power_of_two(min(blocks, 1024)), num_warps=4)
    run(
        scatter_pairs, (blocks + number + 1,),
        ids, ids if token_of_pair is None else token_of_pair, before, totals,
        plan.token_of_row, plan.pair_of_row, plan.row_of_pair, plan.expert_start, plan.tile_expert, plan.tile_row,
        plan.num_tiles, pairs, number, blocks, plan.tile_expert.numel(),
        TOP_K=top_k, PAIRS=pairs_per_block, **size, BM=plan.block_m, BT=128, num_warps=4,
    )  # fmt: skip
