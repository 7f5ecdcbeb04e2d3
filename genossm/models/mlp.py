"""What stands between mixers: a gated MLP, or a mixture of them of which each position takes a few.

Letters: D width, I inner width, E experts, K experts of a position, T positions (batch and length together).
"""

from __future__ import annotations

import math
from copy import deepcopy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class GatedMLP(nn.Module):
    """SwiGLU (Shazeer 2020).

    Args:
        width: D.
        ratio: I / D, rounded down.
    """

    def __init__(self, width: int, ratio: float) -> None:
        super().__init__()
        inner = inner_width(width, ratio)
        self.up = nn.Linear(width, 2 * inner, bias=False)
        self.down = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return _swiglu(x, self.up.weight, self.down.weight)


class MixtureOfExperts(nn.Module):
    """Each position goes through the K gated MLPs that a router finds most probable (Shazeer et al. 2017, section 2.1).

        p = softmax(W x),   y = sum over the K largest p_e of g_e MLP_e(x),   g_e = p_e / (sum of the K)   for K > 1,

    and g_e = p_e for K = 1, where the quotient would give the router no gradient (Fedus et al. 2022, Switch,
    section 2). An expert takes as many positions as choose it: with a capacity, what a position gets would depend on
    the others, and on how a sequence is cut. The router is in float32 (float64 in float64).

    Positions are sorted by expert, so that each expert is one matrix product; their numbers go to the host.

    Args:
        width: D.
        ratio: I / D of each expert, rounded down.
        experts: E.
        per_token: K.

    Attributes:
        balance_loss: of the last forward in training, E sum over e of f_e P_e, where f_e is the part of the choices
            that fell on e and P_e the mean of p_e (Switch, equations 4 to 6, without the weight): 1 where the experts
            are used alike. Zero after one in evaluation.
    """

    balance_loss: Tensor

    def __init__(self, width: int, ratio: float, experts: int, per_token: int) -> None:
        super().__init__()
        check_experts(experts, per_token)
        inner = inner_width(width, ratio)
        self.experts, self.per_token = experts, per_token
        self.router = nn.Linear(width, experts, bias=False)
        self.up = nn.Parameter(torch.empty(experts, 2 * inner, width))
        self.down = nn.Parameter(torch.empty(experts, width, inner))
        for weight in (self.up, self.down):  # as nn.Linear
            bound = 1 / math.sqrt(weight.shape[-1])
            nn.init.uniform_(weight, -bound, bound)
        self.balance_loss = torch.zeros(())

    def forward(self, x: Tensor) -> Tensor:
        x_TD = x.reshape(-1, x.shape[-1])
        with torch.autocast(x.device.type, enabled=False):
            dtype = torch.promote_types(self.router.weight.dtype, torch.float32)
            p_TE = F.linear(x_TD.to(dtype), self.router.weight.to(dtype)).softmax(-1)
        gate_TK, chosen_TK = p_TE.topk(self.per_token, dim=-1)
        if self.per_token > 1:
            gate_TK = gate_TK / gate_TK.sum(-1, keepdim=True)
        choices_E = torch.bincount(chosen_TK.flatten(), minlength=self.experts)
        self.balance_loss = self._balance(p_TE, choices_E) if self.training else p_TE.new_zeros(())

        order = chosen_TK.flatten().argsort(stable=True)
        groups = torch.split(x_TD[order // self.per_token], choices_E.tolist())
        up, down = self.up, self.down  # read once: tied ones are made whenever they are read
        sorted_outputs = torch.cat(
            [_swiglu(group, up[e], down[e]) for e, group in enumerate(groups) if len(group)]
        )
        y_TKD = torch.unflatten(sorted_outputs[order.argsort()], 0, (-1, self.per_token))
        y_TD = torch.einsum("tkd,tk->td", y_TKD, gate_TK.to(y_TKD.dtype))
        return y_TD.view_as(x)

    def _balance(self, p_TE: Tensor, choices_E: Tensor) -> Tensor:
        return self.experts * (choices_E.to(p_TE.dtype) / choices_E.sum() * p_TE.mean(0)).sum()

    def __getstate__(self) -> dict[str, Any]:
        """Without the loss's graph, which copies and pickles of the module could not take."""
        return {**self.__dict__, "balance_loss": torch.zeros(())}

    def __deepcopy__(self, memo: dict[int, Any]) -> MixtureOfExperts:
        """As by default; `torch.nn.utils.parametrize` would not take the state above."""
        copied = memo[id(self)] = self.__new__(type(self))
        copied.__dict__ = deepcopy(MixtureOfExperts.__getstate__(self), memo)
        return copied


def inner_width(width: int, ratio: float) -> int:
    """The inner width of an MLP; a ValueError where there is none left."""
    inner = int(width * ratio)
    if inner < 1:
        raise ValueError(
            f"mlp_ratio {ratio} leaves an MLP of width {width} no inner width; it must be at least 1"
        )
    return inner


def check_experts(experts: int, per_token: int) -> None:
    """A ValueError for numbers of experts that there cannot be."""
    if experts < 2:
        raise ValueError(f"experts is {experts}; a mixture has at least 2")
    if not 1 <= per_token <= experts:
        raise ValueError(
            f"experts_per_token is {per_token}; it must be at least 1 and at most experts, which is {experts}"
        )


def _swiglu(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    value, gate = F.linear(x, up).chunk(2, dim=-1)
    return F.linear(value * F.silu(gate), down)
