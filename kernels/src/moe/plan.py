"""The plan of a grouped product: which row computes which pair, and which tile belongs to which expert.

Pairs (token, slot) are numbered token by token and ordered by expert, stably; rows are never padded. Nothing is read
back by the host: the table of tiles has its upper bound, and unused tiles say -1.
"""

from dataclasses import dataclass

import torch


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
        """How many experts rows are sorted by."""
        return self.expert_start.numel() - 1


def max_tiles(pairs: int, num_experts: int, block_m: int) -> int:
    """No routing needs more tiles: whole ones, and one cut short for each expert that has rows at all."""
    return pairs // block_m + min(num_experts, pairs)


def sorted_plan(ids: torch.Tensor, token_of_pair: torch.Tensor, num_experts: int, block_m: int) -> Plan:
    """The plan by a stable sort of flat `ids` [P], on any device and without a sync: what the kernels do, defined."""
    check_ids(ids, num_experts, block_m)
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


def check_ids(ids: torch.Tensor, num_experts: int, block_m: int) -> None:
    """Raises ValueError for ids, or a number of them, that no plan can hold."""
    if ids.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"expert ids must be int32 or int64, got {ids.dtype}")
    if ids.numel() >= 2**31:
        raise ValueError(f"{ids.numel()} pairs of token and expert; a plan numbers fewer than 2^31")
    if num_experts < 1 or block_m < 1:
        raise ValueError(f"need at least one expert and one row a tile, got {num_experts} and {block_m}")
