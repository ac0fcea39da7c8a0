"""A chain of experts in plain torch against its equations written out."""

import pytest
import torch
from surgery.kernels import moe
from surgery.kernels.moe import reference
from surgery.kernels.moe.experts import Experts


def draw(*sizes: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(seed + sum(sizes)))


N, H, WIDTH = 6, 8, 12
POOL = Experts(draw(N, 2 * WIDTH, H) / 3, draw(N, H, WIDTH) / 3)


def routers(c: int, *, same: bool = False) -> list[moe.Router]:
    return [moe.Router(draw(N, H, seed=0 if same else s)) for s in range(c)]


def mixture(z: torch.Tensor, router: moe.Router, k: int, normalize: bool = False) -> torch.Tensor:
    return reference.loop(z, *moe.route(z @ router.weight.T, k, normalize=normalize)[::-1], POOL)


@pytest.mark.parametrize("backend", ["loop", "grouped_mm"])
def test_one_iteration_is_a_mixture(backend: str) -> None:
    n = draw(9, H)
    got = moe.coe_layer(n, routers(1), POOL, None, torch.ones(1, 1), moe.Chain((3,)), backend=backend)
    assert torch.allclose(got, mixture(n, routers(1)[0], 3), atol=1e-5)


def test_appended_iterations_change_no_bit() -> None:
    n = draw(9, H)
    cfg, beta = moe.Chain((3, 3, 3), normalize=True), torch.zeros(3, H)
    beta[0] = 1
    got = moe.coe_layer(n, routers(3, same=True), POOL, torch.ones(2, H), beta, cfg, backend="loop")
    assert torch.equal(got, mixture(n, routers(1)[0], 3, True))


@pytest.mark.parametrize("topk", [(2, 2), (2, 1, 1), (1, 1, 1, 1)])
def test_split_iterations_are_the_mixture(topk: tuple[int, ...]) -> None:
    n, c = draw(9, H), len(topk)
    cfg = moe.Chain(topk, base_k=4, normalize=True, reselect="forbid")
    got = moe.coe_layer(n, routers(c, same=True), POOL, torch.zeros(c - 1, 1), torch.ones(c, 1), cfg, backend="loop")
    wanted = mixture(n, routers(1)[0], 4, True)
    assert (got - wanted).abs().max() <= 1e-5 * wanted.abs().max()


def test_the_papers_equations() -> None:
    """x_t = MoE_t(x_{t-1}) + x_{t-1}, own routers, no outer residual: all gates one, kappa one."""
    n = x = draw(9, H)
    for router in routers(3):
        x = x + mixture(x, router, 2)
    cfg = moe.Chain((2, 2, 2), kappa=1.0)
    got = moe.coe_layer(n, routers(3), POOL, torch.ones(2, 1), torch.ones(3, 1), cfg, backend="loop")
    assert torch.allclose(got, x, atol=1e-5)


def test_without_an_inner_residual() -> None:
    n = x = draw(9, H)
    for router in routers(2):
        x = mixture(x, router, 2)
    beta = torch.tensor([[0.0], [1.0]])
    got = moe.coe_layer(n, routers(2), POOL, torch.ones(1, 1), beta, moe.Chain((2, 2), rho=0.0), backend="loop")
    assert torch.allclose(got, x, atol=1e-5)


def test_shared_experts_in_the_pool_equal_one_wide_mlp() -> None:
    """n MLPs of width I that every token goes through are one of width n * I."""
    n = draw(9, H)
    extra = Experts(draw(2, 2 * WIDTH, H) / 3, draw(2, H, WIDTH, seed=5) / 3)
    pool = Experts(
        torch.cat([POOL.gate_up_proj, extra.gate_up_proj]), torch.cat([POOL.down_proj, extra.down_proj]), num_shared=2
    )
    gate = torch.cat([w[:WIDTH] for w in extra.gate_up_proj])
    up = torch.cat([w[WIDTH:] for w in extra.gate_up_proj])

    def mlp(z: torch.Tensor) -> torch.Tensor:
        return (torch.nn.functional.silu(z @ gate.T) * (z @ up.T)) @ torch.cat(list(extra.down_proj), dim=1).T

    cfg = moe.Chain((2, 1), sigma=(1.0, 0.5))
    args = (torch.ones(1, H), draw(2, H), cfg)
    inside = moe.coe_layer(n, routers(2), pool, *args, backend="loop")
    outside = moe.coe_layer(n, routers(2), POOL, *args, backend="loop", shared=mlp)
    assert torch.allclose(inside, outside, atol=1e-5)


def test_which_gradients_are_awake_at_the_start() -> None:
    """Appended: the second router and alpha sleep until beta has moved. Split: all are awake."""
    for cfg, alpha, beta, awake in (
        (moe.Chain((2, 2)), torch.ones(1, H), torch.tensor([[1.0], [0.0]]), False),
        (moe.Chain((2, 2), base_k=4, reselect="forbid"), torch.zeros(1, H), torch.ones(2, 1), True),
    ):
        second = draw(N, H).requires_grad_()
        leaves = [second, alpha.requires_grad_(), beta.requires_grad_()]
        out = moe.coe_layer(
            draw(9, H), [moe.Router(draw(N, H)), moe.Router(second)], POOL, alpha, beta, cfg, backend="loop"
        )
        of_router, of_alpha, of_beta = torch.autograd.grad((out * draw(9, H, seed=1)).sum(), leaves)
        assert bool(of_router.abs().sum() > 0) == awake and bool(of_alpha.abs().sum() > 0) == awake
        assert of_beta[1].abs().sum() > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n": draw(9, 5)}, r"n must be \[tokens, 8\]"),
        ({"routers": routers(1)}, "1 routers for 2 iterations"),
        ({"routers": [moe.Router(draw(5, H))] * 2}, r"router 0 has weight \(5, 8\), not \(6, 8\)"),
        ({"alpha": torch.ones(2, H)}, r"alpha must be \[1, 8\] or \[1, 1\], got \(2, 8\)"),
        ({"beta": torch.ones(2, 3)}, r"beta must be \[2, 8\]"),
        ({"alpha": None}, "got none"),
    ],
)
def test_what_does_not_fit_is_named(change: dict, message: str) -> None:
    good = {"n": draw(9, H), "routers": routers(2), "alpha": torch.ones(1, H), "beta": torch.ones(2, H)}
    with pytest.raises(ValueError, match=message):
        moe.coe_layer(**{**good, **change}, experts=POOL, cfg=moe.Chain((2, 2)))


@pytest.mark.parametrize(
    "kwargs", [{"topk": ()}, {"topk": (2, 0)}, {"topk": (2,), "reselect": "never"}, {"topk": (2,), "sigma": (1.0, 1.0)}]
)
def test_impossible_chains_are_refused(kwargs: dict) -> None:
    with pytest.raises(ValueError):
        moe.Chain(**kwargs)
