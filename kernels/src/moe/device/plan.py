"""Which pair of token and expert is computed in which row: a stable counting sort in three launches.

Pairs are numbered token by token. Rows follow the expert, and within an expert the pair, so the same routing gives the
same rows every time. Only integers are counted; nothing is read back by the host.
"""

import triton
import triton.language as tl


@triton.jit
def count_pairs(ids, counts, num_pairs, num_experts, PAIRS: tl.constexpr, BP: tl.constexpr, BE: tl.constexpr):
    """counts[block, expert]: how many of the block's pairs chose it. Ids outside [0, experts) are not counted."""
    block = tl.program_id(0)
    lane = tl.arange(0, BP)
    pair = block * PAIRS + lane
    chosen = tl.load(ids + pair, mask=(lane < PAIRS) & (pair < num_pairs), other=-1).to(tl.int32)
    valid = (chosen >= 0) & (chosen < num_experts)
    found = tl.histogram(tl.where(valid, chosen, 0), BE, mask=valid)
    experts = tl.arange(0, BE)
    tl.store(counts + block.to(tl.int64) * num_experts + experts, found, mask=experts < num_experts)


@triton.jit
def scan_counts(counts, before, totals, num_blocks, num_experts, BB: tl.constexpr):
    """before[block, expert]: pairs of the expert in earlier blocks; totals[expert]: in all. One program an expert."""
    expert = tl.program_id(0)
    running = tl.zeros((), tl.int32)
    for start in range(0, num_blocks, BB):
        block = start + tl.arange(0, BB)
        inside = block < num_blocks
        place = block.to(tl.int64) * num_experts + expert
        here = tl.load(counts + place, mask=inside, other=0)
        upto = tl.cumsum(here, axis=0)
        tl.store(before + place, running + upto - here, mask=inside)
        running += tl.sum(here, axis=0)
    tl.store(totals + expert, running)


@triton.jit
def scatter_pairs(
    ids, token_of_pair, before, totals,
    token_of_row, pair_of_row, row_of_pair, expert_start, tile_expert, tile_row, num_tiles,
    num_pairs, num_experts, num_blocks, max_tiles,
    TOP_K: tl.constexpr, PAIRS: tl.constexpr, BP: tl.constexpr, BE: tl.constexpr, BM: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """Programs below `num_blocks` place pairs in rows; the next `num_experts` write the tiles of an expert; the last
    one closes the table: starts, the number of tiles, and -1 in every tile that is not used.

    TOP_K > 0: pair p belongs to token p // TOP_K; 0: `token_of_pair` says. Ids outside the experts get row -1.
    """
    pid = tl.program_id(0)
    experts = tl.arange(0, BE)
    total = tl.load(totals + experts, mask=experts < num_experts, other=0)
    first_row = tl.cumsum(total, axis=0) - total
    if pid < num_blocks:
        lane = tl.arange(0, BP)
        pair = pid * PAIRS + lane
        inside = (lane < PAIRS) & (pair < num_pairs)
        chosen = tl.load(ids + pair, mask=inside, other=-1).to(tl.int32)
        valid = inside & (chosen >= 0) & (chosen < num_experts)
        expert = tl.where(valid, chosen, -1)
        same_before = (expert[:, None] == expert[None, :]) & (lane[None, :] < lane[:, None])
        rank = tl.sum(same_before.to(tl.int32), axis=1)
        start = tl.sum(tl.where(expert[:, None] == experts[None, :], first_row[None, :], 0), axis=1)
        earlier = tl.load(before + pid.to(tl.int64) * num_experts + expert, mask=valid, other=0)
        row = start + earlier + rank
        if TOP_K > 0:
            token = pair // TOP_K
        else:
            token = tl.load(token_of_pair + pair, mask=inside, other=0)
        tl.store(token_of_row + row, token, mask=valid)
        tl.store(pair_of_row + row, pair, mask=valid)
        tl.store(row_of_pair + pair, tl.where(valid, row, -1), mask=inside)
    else:
        tiles = (total + BM - 1) // BM
        first_tile = tl.cumsum(tiles, axis=0) - tiles
        used = tl.sum(tiles, axis=0)
        step = tl.arange(0, BT)
        only = pid - num_blocks
        if only < num_experts:
            mine = experts == only
            count = tl.sum(tl.where(mine, tiles, 0), axis=0)
            tile0 = tl.sum(tl.where(mine, first_tile, 0), axis=0)
            row0 = tl.sum(tl.where(mine, first_row, 0), axis=0)
            for at in range(0, count, BT):
                inside = at + step < count
                tl.store(tile_expert + tile0 + at + step, tl.zeros([BT], tl.int32) + only, mask=inside)
                tl.store(tile_row + tile0 + at + step, row0 + (at + step) * BM, mask=inside)
        else:
            tl.store(expert_start + experts, first_row, mask=experts < num_experts)
            tl.store(expert_start + num_experts, tl.sum(total, axis=0))
            tl.store(num_tiles, used)
            for at in range(used, max_tiles, BT):
                inside = at + step < max_tiles
                tl.store(tile_expert + at + step, tl.full([BT], -1, tl.int32), mask=inside)
                tl.store(tile_row + at + step, tl.full([BT], -1, tl.int32), mask=inside)
