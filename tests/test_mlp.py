"""MLPs against their formulas, position by position: routing, its loss, and that no position depends on another."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from genossm.models import mlp
from genossm.models.mlp import GatedMLP, MixtureOfExperts


def small(experts: int = 5, per_token: int = 2, seed: int = 0) -> MixtureOfExperts:
    torch.manual_seed(seed)
    return MixtureOfExperts(6, 1.5, experts, per_token).double()


def random_input(*shape: int, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator, requires_grad=True)


def slow_swiglu(x_D: Tensor, up: Tensor, down: Tensor) -> Tensor:
    value, gate = (up @ x_D).chunk(2)
    return down @ (value * gate * torch.sigmoid(gate))


def slow_mixture(module: MixtureOfExperts, x_TD: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs and the balance loss, one position after another."""
    experts = module.experts
    outputs, probabilities, choices = [], torch.zeros(experts, dtype=torch.float64), [0] * experts
    for x_D in x_TD:
        odds = [torch.exp(row @ x_D) for row in module.router.weight]
        p = torch.stack(odds) / sum(odds)
        probabilities = probabilities + p / len(x_TD)
        chosen = sorted(range(experts), key=lambda e: -float(p[e].detach()))[: module.per_token]
        total = sum(p[e] for e in chosen) if module.per_token > 1 else 1
        outputs.append(sum(p[e] / total * slow_swiglu(x_D, module.up[e], module.down[e]) for e in chosen))
        for e in chosen:
            choices[e] += 1
    parts = [count / sum(choices) for count in choices]
    balance = experts * sum(part * p for part, p in zip(parts, probabilities, strict=True))
    return torch.stack(outputs), balance  # type: ignore[arg-type,return-value]


def test_the_gated_mlp_is_its_formula() -> None:
    torch.manual_seed(0)
    module = GatedMLP(6, 2.5).double()
    x = random_input(3, 4, 6)
    expected = [slow_swiglu(row, module.up.weight, module.down.weight) for row in x.reshape(-1, 6)]
    assert module.up.weight.shape == (30, 6)
    torch.testing.assert_close(module(x), torch.stack(expected).view(3, 4, 6), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("experts", "per_token"), [(2, 1), (5, 1), (5, 2), (5, 5), (16, 3)])
@pytest.mark.parametrize("length", [1, 2, 17])
def test_the_mixture_is_its_formula(experts: int, per_token: int, length: int) -> None:
    module, x = small(experts, per_token), random_input(2, length, 6)
    got = module(x)
    expected, balance = slow_mixture(module, x.flatten(0, 1))
    torch.testing.assert_close(got.flatten(0, 1), expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(module.balance_loss, balance, rtol=1e-10, atol=1e-10)
    wanted = [x, *module.parameters()]
    weights = random_input(2 * length, 6, seed=2).detach()
    gradients = [
        torch.autograd.grad((y * weights).sum() + 3 * loss, wanted)
        for y, loss in ((got.flatten(0, 1), module.balance_loss), (expected, balance))
    ]
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-10, atol=1e-10)
    assert gradients[0][1].any()  # the router learns, with one expert for each position too


def test_each_position_costs_its_experts_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[int] = []
    swiglu = mlp._swiglu

    def counted(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
        rows.append(len(x))
        return swiglu(x, up, down)

    monkeypatch.setattr(mlp, "_swiglu", counted)
    small(8, 2)(random_input(3, 20, 6))
    assert sum(rows) == 3 * 20 * 2 and len(rows) <= 8


def test_no_position_depends_on_another() -> None:
    module, x = small(), random_input(3, 29, 6).detach()
    whole = module(x)
    for size in (1, 7, 28):
        parts = torch.cat([module(part) for part in x.split(size, 1)], 1)
        torch.testing.assert_close(parts, whole, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(module(x[1:2]), whole[1:2], rtol=1e-12, atol=1e-12)


def test_the_balance_loss_is_one_for_even_use_and_grows_with_the_skew() -> None:
    module, x = small(4, 1), random_input(4, 64, 6)
    with torch.no_grad():
        module.router.weight.zero_()
    module(x)
    torch.testing.assert_close(module.balance_loss, torch.tensor(1.0, dtype=torch.float64))
    with torch.no_grad():
        module.router.weight[0] = 50 * torch.eye(6)[0]
    module(x.abs())  # expert 0 wins all
    assert module.balance_loss > 3.9
    module.eval()(x)
    assert module.balance_loss == 0


def test_training_on_the_balance_loss_evens_the_use() -> None:
    module, x = small(4, 1), random_input(2, 200, 6).detach() + 0.5
    with torch.no_grad():
        module.router.weight[0] += 2
    optimizer = torch.optim.Adam([module.router.weight], lr=0.05)
    module(x)
    before = float(module.balance_loss.detach())
    for _ in range(60):
        module(x)
        optimizer.zero_grad()
        module.balance_loss.backward()
        optimizer.step()
    assert before > 1.5 and module.balance_loss.detach() < 1.1


def test_recomputing_in_the_backward_pass_changes_nothing() -> None:
    module, x = small(), random_input(2, 17, 6)
    wanted = [x, *module.parameters()]

    def gradients(output: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(output.square().sum() + module.balance_loss, wanted)

    expected = gradients(module(x))
    got = gradients(checkpoint(module, x, use_reentrant=False))
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_bfloat16_is_near_float32_and_the_router_stays_in_float32() -> None:
    torch.manual_seed(0)
    module, x = MixtureOfExperts(16, 2.0, 4, 2), torch.randn(2, 65, 16)
    expected = module(x)
    with torch.autocast("cpu", torch.bfloat16):
        got = module(x)
    assert got.dtype == torch.bfloat16 and module.balance_loss.dtype == torch.float32
    assert (got - expected).abs().max() < 0.03 * expected.abs().max()
    (got.float().square().mean() + module.balance_loss).backward()
    assert all(p.grad is not None and p.grad.any() for p in module.parameters())


def test_it_can_be_copied_after_a_training_step() -> None:
    module, x = small(), random_input(1, 9, 6)
    module(x)
    copied = copy.deepcopy(module)
    assert copied.balance_loss == 0 and module.balance_loss.requires_grad
    assert torch.equal(copied(x), module(x))


def test_it_starts_as_linear_layers_do() -> None:
    torch.manual_seed(0)
    module = MixtureOfExperts(64, 2.0, 3, 1)
    assert module.up.shape == (3, 256, 64) and module.down.shape == (3, 64, 128)
    assert 0.98 / 8 < module.up.abs().max() <= 1 / 8
    assert 0.98 / 128**0.5 < module.down.abs().max() <= 1 / 128**0.5


@pytest.mark.parametrize(
    ("experts", "per_token", "ratio", "words"),
    [
        (1, 1, 2.0, "experts is 1; a mixture has at least 2"),
        (4, 0, 2.0, "experts_per_token is 0; it must be at least 1 and at most experts, which is 4"),
        (4, 5, 2.0, "experts_per_token is 5"),
        (4, 2, 0.1, "mlp_ratio 0.1 leaves an MLP of width 6 no inner width"),
    ],
)
def test_an_impossible_mixture_is_refused(experts: int, per_token: int, ratio: float, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        MixtureOfExperts(6, ratio, experts, per_token)
