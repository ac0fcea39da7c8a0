"""Choosing experts, and the plan that orders what was chosen."""

import pytest
import torch
from surgery.kernels import moe
from surgery.kernels.moe.plan import max_tiles


def draw(*sizes: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(seed + sum(sizes)))


def by_expert(weights: torch.Tensor, index: torch.Tensor, n: int) -> torch.Tensor:
    """[T, N], so that the order of slots does not matter."""
    return torch.zeros(len(index), n, dtype=weights.dtype).scatter(1, index.long(), weights)


def test_softmax_and_normalised_weights_are_those_of_qwen3() -> None:
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

    for norm in (False, True):
        config = Qwen3MoeConfig(hidden_size=16, num_experts=8, num_experts_per_tok=3, norm_topk_prob=norm)
        native = Qwen3MoeTopKRouter(config)
        native.weight.data = draw(8, 16)
        logits, weights, index = native(draw(20, 16))
        got = moe.route(draw(20, 16) @ native.weight.T, 3, "softmax", norm)
        assert torch.allclose(by_expert(*got, 8), by_expert(weights, index, 8), atol=1e-6)


def test_groups_bias_and_scale_are_those_of_deepseek_v3() -> None:
    from transformers import DeepseekV3Config
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE

    config = DeepseekV3Config(
        hidden_size=16, n_routed_experts=12, num_experts_per_tok=4, n_group=4, topk_group=2, norm_topk_prob=True,
        routed_scaling_factor=2.5, n_shared_experts=1, moe_intermediate_size=8,
    )  # fmt: skip
    block = DeepseekV3MoE(config)
    block.gate.weight.data = draw(12, 16) / 4
    block.gate.e_score_correction_bias.data = draw(12) / 3
    _, weights, index = block.gate(draw(30, 16))
    got = moe.route(
        draw(30, 16) @ block.gate.weight.T, 4, "sigmoid", True, 2.5, block.gate.e_score_correction_bias, (4, 2)
    )
    assert torch.allclose(by_expert(*got, 12), by_expert(weights, index, 12), atol=1e-6)


def test_softmax_over_the_chosen_is_that_of_gpt_oss() -> None:
    from transformers import GptOssConfig
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssTopKRouter

    native = GptOssTopKRouter(GptOssConfig(hidden_size=16, num_local_experts=8, num_experts_per_tok=3))
    native.weight.data, native.bias.data = draw(8, 16), draw(8)
    _, weights, index = native(draw(20, 16))
    got = moe.route(draw(20, 16) @ native.weight.T + native.bias, 3, "topk_softmax")
    assert torch.allclose(by_expert(*got, 8), by_expert(weights, index, 8), atol=1e-6)


@pytest.mark.parametrize("topk", [(4, 4), (3, 3, 2), (2, 2, 2, 1, 1)])
def test_iterations_part_the_choice_of_one_router(topk: tuple[int, ...]) -> None:
    """Equal routers and used experts forbidden: together exactly the K experts, with the weights they had."""
    logits = draw(40, 16)
    used = torch.zeros(40, 0, dtype=torch.int64)
    total = torch.zeros(40, 16)
    for k in topk:
        weights, index = moe.route(logits, k, normalize=True, used=used, base_k=8)
        assert not (index[:, :, None] == used[:, None, :]).any()
        assert (weights[:, :-1] >= weights[:, 1:]).all()
        used, total = torch.cat([used, index], 1), total + by_expert(weights, index, 16)
    assert torch.allclose(total, by_expert(*moe.route(logits, 8, normalize=True), 16), atol=1e-7)


def test_routers_that_went_apart_still_find_enough() -> None:
    used = moe.route(draw(50, 10, seed=1), 3)[1]
    weights, index = moe.route(draw(50, 10, seed=2), 2, used=used, base_k=5)
    assert torch.isfinite(weights).all() and not (index[:, :, None] == used[:, None, :]).any()


def test_a_penalty_goes_from_allowing_to_forbidding() -> None:
    logits, used = draw(50, 10), moe.route(draw(50, 10), 3)[1]
    same = lambda a, b: all(torch.equal(x, y) for x, y in zip(a, b, strict=True))  # noqa: E731
    assert same(moe.route(logits, 2, base_k=5, used=used, penalty=0.0), moe.route(logits, 2, base_k=5))
    assert same(moe.route(logits, 2, base_k=5, used=used, penalty=9.0), moe.route(logits, 2, base_k=5, used=used))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"k": 0}, "k=0"),
        ({"k": 9}, "experts=8"),
        ({"k": 2, "scoring": "hash"}, "'hash' is none of"),
        ({"k": 2, "groups": (3, 1)}, "8 experts do not form 3 groups"),
        ({"k": 3, "base_k": 4, "used": torch.zeros(5, 2, dtype=torch.int64)}, "fewer than k=3"),
    ],
)
def test_impossible_choices_are_refused(kwargs: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        moe.route(draw(5, 8), **kwargs)


SHAPES = [(0, 2, 3), (1, 1, 1), (7, 3, 3), (40, 1, 9), (33, 4, 5), (64, 2, 64)]


@pytest.mark.parametrize("kind", [torch.int32, torch.int64])
@pytest.mark.parametrize(("t", "k", "n"), SHAPES)
def test_a_plan_covers_every_row_once(t: int, k: int, n: int, kind: torch.dtype) -> None:
    index = torch.randint(-1, n + 1, (t, k), generator=torch.Generator().manual_seed(t)).to(kind)
    plan = moe.build_plan(index, n, 16)
    flat, start = index.view(-1), plan.expert_start.tolist()
    valid = (flat >= 0) & (flat < n)
    counts = torch.bincount(flat[valid].long(), minlength=n).tolist()
    assert [b - a for a, b in zip(start, start[1:], strict=False)] == counts and start[0] == 0
    rows = plan.row_of_pair[valid].tolist()
    assert sorted(rows) == list(range(start[-1])) and (plan.row_of_pair[~valid] == -1).all()
    for pair in valid.nonzero().squeeze(1).tolist():
        row = int(plan.row_of_pair[pair])
        assert int(plan.pair_of_row[row]) == pair and int(plan.token_of_row[row]) == pair // k
        assert start[int(flat[pair])] <= row < start[int(flat[pair]) + 1]
    for e in range(n):  # stable: in the order of the pairs
        mine = plan.pair_of_row[start[e] : start[e + 1]].tolist()
        assert mine == sorted(mine)
    used = int(plan.num_tiles)
    assert (plan.tile_expert[used:] == -1).all() and len(plan.tile_expert) == max_tiles(t * k, n, 16) >= used
    covered = []
    for e, row in zip(plan.tile_expert[:used].tolist(), plan.tile_row[:used].tolist(), strict=True):
        covered += range(row, min(row + 16, start[e + 1]))
        assert row < start[e + 1]
    assert covered == list(range(start[-1]))


def test_all_tokens_on_one_expert_and_the_same_expert_twice() -> None:
    plan = moe.build_plan(torch.full((20, 2), 3), 5, 16)
    assert plan.expert_start.tolist() == [0, 0, 0, 0, 40, 40] and plan.tile_expert[:3].tolist() == [3, 3, 3]


@pytest.mark.parametrize("index", [torch.zeros(4), torch.zeros(4, 2), torch.zeros(2, 2, 2, dtype=torch.int64)])
def test_a_plan_is_made_of_ids(index: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="top_k_index must be|expert ids must be"):
        moe.build_plan(index, 4, 16)
