"""Gated DeltaNet (in Qwen3.5), Mamba-2 and RWKV-7 as one recurrence, in plain PyTorch.

    logits, cache = load("checkpoints/gdn")(tokens)  # tokens [B, T] -> logits [B, T, vocab]

Each head of these models keeps a matrix, its *state* S, and updates it once per token:

    S_t = A_t S_{t-1} + k_t v_tᵀ    A_t = diag(decay_t) − erase_out_t erase_in_tᵀ    o_t = S_tᵀ q_t

S is a memory. A token *writes* its value v under its key k, and *reads* what is stored under its
query q. So that S does not fill up, all of it *decays* a little with each token. And before a key
is written anew, what is stored under it is looked up (erase_inᵀ S) and a part of that taken out
(along erase_out): the *erase*, or delta rule. The models differ in how they make the six tensors
from their input h. Gated DeltaNet: α (how much is kept) and β (how much is written anew), both in
(0, 1). Mamba-2: a step size Δ > 0, a decay rate A < 0; its key is called B, its query C, its value
is Δ x (B, C and x are projections of h). RWKV-7: the query is called r, the decay w; a unit vector
κ̂ to erase along, at a rate a in (0, 1) per key channel; k_a is learned.

    role     here        shape            Gated DeltaNet    Mamba-2          RWKV-7
    query    q           [B, T, H, K]     q/√K, q unit      C                r
    key      k           [B, T, H, K]     k, unit norm      B                k (1 + (a−1) k_a)
    value    v           [B, T, H, V]     β v               Δ x              v
    decay    log_decay   [B, T, H, 1|K]   log α, per head   Δ A, per head    log w, per key channel
    erase    erase_in    [B, T, H, K]     k                 -                κ̂  (unit norm)
             erase_out   [B, T, H, K]     α β k             -                a κ̂

The state is key first everywhere: [K, V], K = key size, V = value size. B batch, T time, H heads, D
width of the residual stream; layers and heads count from 0. The recurrence runs in fp32 whatever
the weights' dtype. Tests hold the logits to 2e-4 of the official code's (transformers; rwkv).
(`check_...` and `whole_ratio` say what is wrong with an input; skip them, they stand in section 7.)
Papers: Gated DeltaNet arXiv 2412.06464; Mamba-2 arXiv 2405.21060; RWKV-7 arXiv 2503.14456.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import json
import math
import os
import re
from typing import Callable, NamedTuple

import safetensors.torch
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor


class InputError(ValueError):
    """Something the user can mend: one line that says what was got, what is allowed, what to do."""
    def __init__(self, message: str):
        super().__init__(" ".join(message.split()))


def require(condition: bool, message: str):
    """Raise InputError with this message unless the condition holds."""
    if not condition:
        raise InputError(message)


def at_least_fp32(x: Tensor) -> Tensor:
    """Half precision is widened, fp32 and fp64 stay."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


# ---- 1. The recurrence ----
class StepInputs(NamedTuple):
    """The six tensors that drive a recurrent layer (the table above). No erase: both are None."""
    q: Tensor  # [B, T, H, K]
    k: Tensor  # [B, T, H, K]
    v: Tensor  # [B, T, H, V]
    log_decay: Tensor  # [B, T, H, 1] one per head, or [B, T, H, K] per key channel
    erase_in: Tensor | None = None  # [B, T, H, K] what is stored along it is looked up,
    erase_out: Tensor | None = None  # [B, T, H, K] and taken out along this

    def times(self, start: int, stop: int | None = None) -> StepInputs:
        """The tokens start ≤ t < stop."""
        return self._make(None if x is None else x[:, start:stop] for x in self)

    def heads(self, which: list[int] | Tensor) -> StepInputs:
        """Some heads, repeats allowed; the axis stays."""
        return self._make(None if x is None else x[:, :, which] for x in self)

    def rows(self, index: Tensor) -> StepInputs:
        """Some batch rows, repeats allowed."""
        return self._make(None if x is None else x[index] for x in self)


def outer(a: Tensor, b: Tensor) -> Tensor:
    """a bᵀ: [..., K], [..., V] -> [..., K, V]"""
    return a.unsqueeze(-1) * b.unsqueeze(-2)


def read(S: Tensor, q: Tensor) -> Tensor:
    """Sᵀq: [..., K, V], [..., K] -> [..., V]"""
    return (S * q.unsqueeze(-1)).sum(-2)


def recurrence(s: StepInputs, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The definition, one token after the other:

        S_t = diag(decay_t) S_{t-1} − erase_out_t (erase_in_tᵀ S_{t-1}) + k_t v_tᵀ
        o_t = S_tᵀ q_t

    s: the six tensors; state: S_0 [B, H, K, V], zeros if None. Returns o [B, T, H, V] and the last
    state. Raises InputError if shapes do not fit. By hand, K = V = 2: the first token writes (6, 2)
    under the key (1, 0). The second halves all, takes half of the rest out under (1, 0), and writes
    (0, 5) under (0, 1):

    >>> tokens = lambda *rows: torch.tensor(rows)[None, :, None]         # [T, ·] -> [1, T, 1, ·]
    >>> q, k, v = tokens([1., 0.], [1., 1.]), tokens([1., 0.], [0., 1.]), tokens([6., 2.], [0., 5.])
    >>> erase = tokens([1., 0.], [1., 0.])
    >>> s = StepInputs(q, k, v, tokens([1.], [0.5]).log(), erase, 0.25 * erase)
    >>> o, S = recurrence(s)
    >>> S[0, 0].tolist()                     # 0.5 · 6 − 0.25 · 6 = 1.5; 0.5 · 2 − 0.25 · 2 = 0.5
    [[1.5, 0.5], [0.0, 5.0]]
    >>> o[0, :, 0].tolist()                  # read under (1, 0), then under (1, 1)
    [[6.0, 2.0], [1.5, 5.5]]
    """
    check_shapes(s, state)
    B, T, H, K = s.q.shape
    S = s.v.new_zeros(B, H, K, s.v.shape[-1]) if state is None else state
    o = []
    for t in range(T):
        new = s.log_decay[:, t].exp().unsqueeze(-1) * S
        if s.erase_in is not None:
            new = new - outer(s.erase_out[:, t], read(S, s.erase_in[:, t]))
        S = new + outer(s.k[:, t], s.v[:, t])
        o.append(read(S, s.q[:, t]))
    return torch.stack(o, 1), S


def states(s: StepInputs, state: Tensor | None = None) -> Tensor:
    """The state after every token, [B, T, H, K, V] (T times the memory of `recurrence`)."""
    all_states = []
    for t in range(s.q.shape[1]):
        _, state = recurrence(s.times(t, t + 1), state)
        all_states.append(state)
    return torch.stack(all_states, 1)


def propagate(key: Tensor, s: StepInputs) -> tuple[Tensor, Tensor]:
    """What an edit of a head's state does to its later reads, exactly, for K numbers a step.

    Add u_t yᵀ to the state right after the write of token t. The recurrence is linear in the state,
    so the change stays rank 1 with the same y, and only u moves:

        u_t = key        u_s = A_s u_{s-1}        δo_s = (u_s · q_s) y

    That is the recurrence itself with a value size of 1, driven by the single write (key, 1) at its
    first step (whose own transition does no harm: it meets an empty state).

    key [B, H, K], one edit per head; s: those heads' six tensors from the edited token on (k and v
    play no part). Returns gain [B, T, H], the u_s · q_s, and the last u [B, H, K]. In the example
    of `recurrence`, an edit under (1, 0) is read whole, and by 0.5 − 0.25 of itself a token later:

    >>> tokens = lambda *rows: torch.tensor(rows)[None, :, None]
    >>> q, erase = tokens([1., 0.], [1., 1.]), tokens([1., 0.], [1., 0.])
    >>> s = StepInputs(q, q, q, tokens([1.], [0.5]).log(), erase, 0.25 * erase)
    >>> gain, u = propagate(torch.tensor([[[1., 0.]]]), s)
    >>> gain[0, :, 0].tolist(), u[0, 0].tolist()
    ([1.0, 0.25], [0.25, 0.0])
    """
    later = s.q.shape[1] - 1
    keys = F.pad(key[:, None], (0, 0, 0, 0, 0, later))  # [B, T, H, K], zero after the first step
    ones = torch.ones_like(keys[..., :1])  # [B, T, H, 1]
    gain, u = recurrence(s._replace(k=keys, v=ones))
    return gain[..., 0], u[..., 0]


# ---- 2. An edit of the state ----
class Edit(NamedTuple):
    """Add key valueᵀ to a head's state right after a token's write; (-k, v) takes it out."""
    layer: int
    head: int
    position: int  # from the first token ever fed (so with a cache: from the cache's start)
    key: Tensor  # [K] or [B, K]
    value: Tensor  # [V] or [B, V]


def apply_edits(o: Tensor, state: Tensor, s: StepInputs, start: int, edits: list[Edit]):
    """A layer's reads o [B, T, H, V], from position start on, and its last state, with these edits.
    The sum of all changes comes first, so that an edit and its opposite cancel to the bit."""
    B = len(o)
    delta_o, delta_state = torch.zeros_like(o), torch.zeros_like(state)
    for position in sorted({e.position for e in edits}):
        here, t = [e for e in edits if e.position == position], position - start
        heads = torch.tensor([e.head for e in here], device=o.device)
        key = torch.stack([e.key.expand(B, -1) for e in here], 1).to(o.dtype)  # [B, E, K]
        value = torch.stack([e.value.expand(B, -1) for e in here], 1).to(o.dtype)  # [B, E, V]
        gain, u = propagate(key, s.times(t).heads(heads))  # [B, T − t, E], [B, E, K]
        moved = gain.unsqueeze(-1) * value.unsqueeze(1)  # [B, T − t, E, V]
        moved = F.pad(moved, (0, 0, 0, 0, t, 0))  # nothing before the edit
        delta_o = delta_o.index_add(2, heads, moved)
        delta_state = delta_state.index_add(1, heads, outer(u, value))
    return o + delta_o, state + delta_state


# ---- 3. Three adapters: from a layer's input to the six tensors, from the reads o to its output
#
#    inputs(h, cache, v_first) -> StepInputs, rest, cache    h [B, T, D]; rest: a tuple for `output`
#    gate_and_scale(o, rest) -> gate [B, T, H, V], scale [B, T, H, 1]          o [B, T, H, V]
#    output(o, rest) -> [B, T, D]: W_out(gate · scale · o + ...), scale a norm's 1/rms or 1/std
#
# v_first: layer 0's values, for RWKV-7 alone. With the scale held fixed, the output is affine in o.
# A cache: a dict of tensors, at first empty.
linear = functools.partial(nn.Linear, bias=False)  # linear(n, m): x [..., n] -> W x [..., m]


def per_head(x: Tensor, heads: int) -> Tensor:
    """[..., heads · size] -> [..., heads, size], at least fp32."""
    return at_least_fp32(x).unflatten(-1, (heads, -1))


def causal_conv(x: Tensor, tail: Tensor | None, conv: nn.Conv1d) -> tuple[Tensor, Tensor]:
    """silu(Σ_i weight_i x_{t−W+1+i} + bias), a causal depthwise convolution of W taps.

    x [B, T, C]; tail [B, W−1, C], the inputs just before x; the last tap meets the current token.
    Returns it [B, T, C], and the new tail. (Faster than conv(x), which wants [B, C, T].)
    """
    T, taps = x.shape[1], conv.weight[:, 0].T.contiguous()  # [W, C]
    past = x.new_zeros(len(x), len(taps) - 1, x.shape[2]) if tail is None else tail
    padded = torch.cat([past, x], 1)  # [B, W − 1 + T, C]
    y = padded[:, :T] * taps[0]
    for i in range(1, len(taps)):
        y.addcmul_(padded[:, i : i + T], taps[i])
    if conv.bias is not None:
        y = y + conv.bias
    return F.silu(y), padded[:, T:]


class RMSNorm(nn.Module):
    """x / √(mean x² + eps) · (offset + weight). Qwen3.5 stores weights around 0 (offset 1)."""
    def __init__(self, size, eps, offset=0.0):
        super().__init__()
        self.eps, self.offset = eps, offset
        self.weight = nn.Parameter(torch.full((size,), 1.0 - offset))

    def scale(self, x: Tensor) -> Tensor:
        """1 / √(mean x² + eps): [..., size] -> [..., 1], at least fp32."""
        return torch.rsqrt(at_least_fp32(x).square().mean(-1, keepdim=True) + self.eps)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., size] -> the same shape and dtype."""
        weight = self.offset + at_least_fp32(self.weight)
        return (at_least_fp32(x) * self.scale(x) * weight).to(x.dtype)


class GatedDeltaNet(nn.Module):
    """The delta rule with a decay (arXiv 2412.06464, eq. 10):

        S_t = α_t (I − β_t k_t k_tᵀ) S_{t-1} + β_t k_t v_tᵀ

    Look up what is stored under k, take a part β of it out, and put as much of v in its place.
    Multiplied out, α (I − β k kᵀ) S = α S − (α β k)(kᵀ S): erase_in is k, erase_out α β k.

    q|k|v = silu(conv(W_qkv h)), each head's q and k over √(Σx² + 1e-6); β = σ(W_b h); z = W_z h;
    α = exp(−e^{A_log} softplus(W_a h + dt_bias)). Value head j has key head ⌊j / (H / key heads)⌋.
    """
    def __init__(self, width, key_heads, value_heads, K, V, conv_width=4, eps=1e-6):
        super().__init__()
        self.key_heads, self.heads, self.K, self.V = key_heads, value_heads, K, V
        self.repeats = whole_ratio(value_heads, key_heads)
        C = 2 * key_heads * K + value_heads * V  # channels of q|k|v
        self.in_proj_qkv = linear(width, C)
        self.in_proj_z = linear(width, value_heads * V)
        self.in_proj_b = linear(width, value_heads)
        self.in_proj_a = linear(width, value_heads)
        self.conv1d = nn.Conv1d(C, C, conv_width, groups=C, bias=False)
        self.A_log = nn.Parameter(torch.zeros(value_heads))
        self.dt_bias = nn.Parameter(torch.ones(value_heads))
        self.norm = RMSNorm(V, eps)
        self.out_proj = linear(value_heads * V, width)

    def unit_heads(self, x: Tensor, length: float = 1.0) -> Tensor:
        """[B, T, key_heads · K] -> [B, T, H, K] of this length, a key head for each value head."""
        x = per_head(x, self.key_heads)
        x = x * (torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6) * length)
        return x.repeat_interleave(self.repeats, 2)

    def inputs(self, h, cache, v_first=None):
        """h [B, T, D] -> the six tensors, (z,), the cache's new conv tail."""
        qkv, tail = causal_conv(self.in_proj_qkv(h), cache.get("tail"), self.conv1d)
        key_size = self.key_heads * self.K
        q, k, v = qkv.split([key_size, key_size, self.heads * self.V], -1)
        q = self.unit_heads(q, self.K**-0.5)
        k = self.unit_heads(k)
        v = per_head(v, self.heads)
        beta = per_head(self.in_proj_b(h), self.heads).sigmoid()  # [B, T, H, 1]
        step = per_head(self.in_proj_a(h), self.heads) + self.dt_bias.unsqueeze(-1)
        A = per_head(self.A_log, self.heads).exp()  # [H, 1]
        log_alpha = -A * F.softplus(step)  # [B, T, H, 1]
        erase_out = log_alpha.exp() * beta * k
        s = StepInputs(q, k, beta * v, log_alpha, erase_in=k, erase_out=erase_out)
        return s, (self.in_proj_z(h),), {"tail": tail}

    def gate_and_scale(self, o, rest):
        """RMSNorm(o) silu(z) = o / rms(o) · w · silu(z): gate = silu(z) w, scale = 1/rms(o)."""
        (z,) = rest
        gate = F.silu(per_head(z, self.heads)) * self.norm.weight
        return gate, self.norm.scale(o)

    def output(self, o, rest):
        """W_out( gate · scale · o ): norm, then gate."""
        (z,) = rest
        gate, scale = self.gate_and_scale(o, rest)
        return self.out_proj((gate * scale * o).flatten(-2).to(z.dtype))


class Mamba2(nn.Module):
    """Mamba-2's layer (arXiv 2405.21060): S_t = e^{Δ_t A} S_{t-1} + B_t (Δ_t x_t)ᵀ, read by C_t.

    z|xBC|dt = W_in h; x|B|C = silu(conv(xBC)); Δ = clamp(softplus(dt + dt_bias), time_step_limit);
    A = −e^{A_log}. Nothing is erased. Heads of a group share B and C.
    """
    def __init__(self, width, heads, groups, K, V, conv_width=4, eps=1e-5,
                 time_step_limit=(0.0, math.inf), bias=False, conv_bias=True):
        super().__init__()
        self.heads, self.groups, self.K, self.V = heads, groups, K, V
        self.repeats, self.time_step_limit = whole_ratio(heads, groups), time_step_limit
        C = heads * V + 2 * groups * K  # channels of x|B|C (not the query C)
        self.in_proj = nn.Linear(width, heads * V + C + heads, bias=bias)
        self.conv1d = nn.Conv1d(C, C, conv_width, groups=C, bias=conv_bias)
        self.dt_bias = nn.Parameter(torch.ones(heads))
        self.D = nn.Parameter(torch.ones(heads))  # what x adds past the state (not the width D)
        self.A_log = nn.Parameter(torch.zeros(heads))
        self.norm = RMSNorm(heads * V, eps)
        self.out_proj = nn.Linear(heads * V, width, bias=bias)

    def inputs(self, h, cache, v_first=None):
        """h [B, T, D] -> the six tensors (no erase), (D x, z), the cache's new conv tail."""
        inner, group = self.heads * self.V, self.groups * self.K
        z, xBC, dt = self.in_proj(h).split([inner, inner + 2 * group, self.heads], -1)
        xBC, tail = causal_conv(xBC, cache.get("tail"), self.conv1d)
        x, B, C = xBC.split([inner, group, group], -1)
        x = per_head(x, self.heads)  # [B, T, H, V]
        B = per_head(B, self.groups).repeat_interleave(self.repeats, 2)  # [B, T, H, K]
        C = per_head(C, self.groups).repeat_interleave(self.repeats, 2)  # [B, T, H, K]
        delta = F.softplus(per_head(dt, self.heads) + self.dt_bias.unsqueeze(-1))
        delta = delta.clamp(*self.time_step_limit)  # [B, T, H, 1]
        A = -per_head(self.A_log, self.heads).exp()  # [H, 1]
        s = StepInputs(q=C, k=B, v=delta * x, log_decay=delta * A)
        return s, (self.D.unsqueeze(-1) * x, z), {"tail": tail}

    def gate_and_scale(self, o, rest):
        """For u = (o + D x) silu(z): gate = silu(z) w, scale = 1 / rms of u over a group."""
        Dx, z = rest
        silu = F.silu(per_head(z, self.heads))
        u = ((o + Dx) * silu).unflatten(2, (self.groups, -1)).flatten(-2)  # [B, T, groups, ·]
        scale = self.norm.scale(u).repeat_interleave(self.repeats, 2)  # [B, T, H, 1]
        return silu * per_head(self.norm.weight, self.heads), scale

    def output(self, o, rest):
        """W_out( gate · scale · (o + D x) ): gate, then norm."""
        Dx, z = rest
        gate, scale = self.gate_and_scale(o, rest)
        return self.out_proj((gate * scale * (o + Dx)).flatten(-2).to(z.dtype))


def token_shift(h: Tensor, tail: Tensor | None) -> tuple[Tensor, Tensor]:
    """h_{t-1} − h_t, and h's last token, the next tail. h [B, T, D], tail [B, 1, D]."""
    past = torch.zeros_like(h[:, :1]) if tail is None else tail
    return torch.cat([past, h[:, :-1]], 1) - h, h[:, -1:]


class RWKV7(nn.Module):
    """RWKV-7's time mixing (arXiv 2503.14456, §4), read by r_t:

        S_t = (diag(w_t) − (a_t κ̂_t) κ̂_tᵀ) S_{t-1} + k_t v_tᵀ

    m_c = h + (h_{t-1} − h) x_c for c in r, w, k, v, a, g; r, k, v = W m. A lora is W_2 f(W_1 m) + b
    of low rank: log w = −e^{−1/2} σ(lora(m_w)), its f tanh; a = σ(lora(m_a)); κ̂ = k · k_k to unit
    length per head; then k ← k (1 + (a−1) k_a). From layer 1 on v ← v + (v_first − v) σ(lora(m_v)),
    v_first the v of layer 0. The output is gated by g = lora(m_g), its f σ.
    """
    def __init__(self, width, heads, K, V, ranks: dict[str, int], first: bool, eps):
        super().__init__()
        self.heads, self.K, self.V, self.eps = heads, K, V, eps

        def low_rank(c, size, f, bias=True):
            return nn.Sequential(linear(width, ranks[c]), f, nn.Linear(ranks[c], size, bias=bias))

        for c in "rwkvag":
            self.register_parameter(f"x_{c}", nn.Parameter(torch.zeros(width)))
        self.k_k = nn.Parameter(torch.ones(heads * K))
        self.k_a = nn.Parameter(torch.ones(heads * K))
        self.r_k = nn.Parameter(torch.zeros(heads, K))
        self.r_proj = linear(width, heads * K)
        self.k_proj = linear(width, heads * K)
        self.v_proj = linear(width, heads * V)
        self.out_proj = linear(heads * V, width)
        self.w_lora = low_rank("w", heads * K, nn.Tanh())
        self.a_lora = low_rank("a", heads * K, nn.Identity())
        self.g_lora = low_rank("g", heads * V, nn.Sigmoid(), bias=False)
        self.v_lora = None if first else low_rank("v", heads * V, nn.Identity())
        self.g_norm = nn.GroupNorm(heads, heads * V, eps)  # holds the weights of each head's norm

    def inputs(self, h, cache, v_first=None):
        """h [B, T, D], v_first [B, T, H, V] (None in layer 0) -> the six, (g, bonus), the tail."""
        H, (shift, tail) = self.heads, token_shift(h, cache.get("tail"))
        r = per_head(self.r_proj(h + shift * self.x_r), H)  # [B, T, H, K]
        k = per_head(self.k_proj(h + shift * self.x_k), H)  # [B, T, H, K]
        m_v = h + shift * self.x_v
        v = per_head(self.v_proj(m_v), H)  # [B, T, H, V]
        if self.v_lora is not None:
            v = v + (v_first - v) * per_head(self.v_lora(m_v), H).sigmoid()
        raw = per_head(self.w_lora(h + shift * self.x_w), H)
        log_w = -math.exp(-0.5) * raw.sigmoid()
        a = per_head(self.a_lora(h + shift * self.x_a), H).sigmoid()
        kappa = F.normalize(k * per_head(self.k_k, H), dim=-1)
        k = k * (1 + (a - 1) * per_head(self.k_a, H))
        s = StepInputs(r, k, v, log_w, erase_in=kappa, erase_out=a * kappa)
        bonus = (r * k * self.r_k).sum(-1, keepdim=True) * v  # [B, T, H, V]
        return s, (self.g_lora(h + shift * self.x_g), bonus), {"tail": tail}

    def gate_and_scale(self, o, rest):
        """g GroupNorm(o) = g ((o − mean o) / std(o) · w + bias): gate = g w, scale = 1/std(o)."""
        g, _ = rest
        scale = torch.rsqrt(o.var(-1, keepdim=True, unbiased=False) + self.eps)
        return per_head(g, self.heads) * per_head(self.g_norm.weight, self.heads), scale

    def output(self, o, rest):
        """W_out( gate · scale · (o − mean o) + g · (bias + (Σ_K r k r_k) v) )."""
        g, bonus = rest
        gate, scale = self.gate_and_scale(o, rest)
        y = gate * scale * (o - o.mean(-1, keepdim=True))
        y = y + per_head(g, self.heads) * (per_head(self.g_norm.bias, self.heads) + bonus)
        return self.out_proj(y.flatten(-2).to(g.dtype))


# ---- 4. The rest of a block: Qwen3.5's gated attention (every 4th layer), and the MLPs ----
class GatedAttention(nn.Module):
    """Qwen3.5's attention: grouped keys, RMSNorm on q and k, rotary positions on a part of each
    head, a sigmoid gate on the result. No state to edit; its cache grows with the text."""
    def __init__(self, width, heads, key_heads, size, rotary, theta, eps=1e-6):
        super().__init__()
        whole_ratio(heads, key_heads)  # or they cannot share keys
        self.heads, self.key_heads, self.size = heads, key_heads, size
        self.rotary, self.theta = rotary, theta
        self.q_proj = linear(width, 2 * heads * size)  # per head: [query | gate]
        self.k_proj = linear(width, key_heads * size)
        self.v_proj = linear(width, key_heads * size)
        self.o_proj = linear(heads * size, width)
        self.q_norm = RMSNorm(size, eps, offset=1.0)
        self.k_norm = RMSNorm(size, eps, offset=1.0)

    def rotate(self, x: Tensor, start: int) -> Tensor:
        """Rotary positions on x [B, heads, T, size]: channel i turns with i + rotary/2."""
        half = self.rotary // 2  # simplification: positions of text alone, no image's rows
        channel = torch.arange(half, device=x.device, dtype=torch.float32)
        position = torch.arange(start, start + x.shape[2], device=x.device)
        angle = position[:, None] * self.theta ** (-channel / half)  # [T, half]
        cos, sin = angle.cos(), angle.sin()
        a, b, rest = at_least_fp32(x).split([half, half, self.size - 2 * half], -1)
        a, b = a * cos - b * sin, b * cos + a * sin
        return torch.cat([a, b, rest], -1).to(x.dtype)

    def forward(self, h, cache):
        """h [B, T, D] -> the layer's output [B, T, D], the cache with T more keys and values."""
        q = self.q_proj(h).unflatten(-1, (self.heads, 2 * self.size))
        q, gate = q.chunk(2, -1)
        k = self.k_proj(h).unflatten(-1, (self.key_heads, self.size)).transpose(1, 2)
        v = self.v_proj(h).unflatten(-1, (self.key_heads, self.size)).transpose(1, 2)
        start = cache["keys"].shape[2] if cache else 0
        q = self.rotate(self.q_norm(q.transpose(1, 2)), start)  # [B, heads, T, size]
        k = self.rotate(self.k_norm(k), start)
        mask = None
        if cache:  # token t sees s ≤ start + t
            k = torch.cat([cache["keys"], k], 2)
            v = torch.cat([cache["values"], v], 2)
            seen = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=h.device)
            mask = seen.tril(start)
        y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, enable_gqa=True)
        y = y.transpose(1, 2).flatten(2)  # [B, T, heads · size]
        return self.o_proj(y * gate.flatten(2).sigmoid()), {"keys": k, "values": v}


class GatedMLP(nn.Module):
    """Qwen3.5: W_down( silu(W_gate x) · W_up x )."""
    def __init__(self, width, inner):
        super().__init__()
        self.gate_proj = linear(width, inner)
        self.up_proj = linear(width, inner)
        self.down_proj = linear(inner, width)

    def forward(self, x, cache):
        """x [B, T, D] -> [B, T, D]; nothing to remember."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x)), {}


class ChannelMix(nn.Module):
    """RWKV-7's MLP: W_v relu(W_k (h + (h_{t-1} − h) x_k))², so it too looks one token back."""
    def __init__(self, width, inner):
        super().__init__()
        self.x_k = nn.Parameter(torch.zeros(width))
        self.key, self.value = linear(width, inner), linear(inner, width)

    def forward(self, x, cache):
        """x [B, T, D] -> [B, T, D] and the new tail."""
        shift, tail = token_shift(x, cache.get("mlp_tail"))
        inner = F.relu(self.key(x + shift * self.x_k))
        return self.value(inner.square()), {"mlp_tail": tail}


# ---- 5. The model ----
class Stream(NamedTuple):
    """What flows from layer to layer."""
    x: Tensor  # [B, T, D] the residual stream
    v_first: Tensor | None = None  # [B, T, H, V] layer 0's v, in RWKV-7 alone (after its layer 0)

    times, rows = StepInputs.times, StepInputs.rows  # of both tensors, as there


class Cache(NamedTuple):
    """All that the past leaves behind: a dict of tensors per layer, and the tokens seen."""
    layers: tuple[dict[str, Tensor], ...]  # batch first; empty before the first token
    length: int

    def rows(self, index: Tensor) -> Cache:
        """Some batch rows, repeats allowed."""
        layers = [{name: x[index] for name, x in layer.items()} for layer in self.layers]
        return Cache(tuple(layers), self.length)


class Block(nn.Module):
    """`mix`: x + mixer(norm1(x)); then `feed`: x + mlp(norm2(x)), where there is an MLP.

    A recurrent mixer has two halves, `read` and `write_out`: an edit of the state stands between.
    """
    def __init__(self, mixer: nn.Module, norm1: nn.Module, mlp=None, norm2=None):
        super().__init__()
        self.norm1, self.mixer, self.norm2, self.mlp = norm1, mixer, norm2, mlp
        self.recurrent = not isinstance(mixer, GatedAttention)  # whether it has a state

    def read(self, stream: Stream, cache: dict):
        """Up to the reads: the stream (RWKV-7's layer 0 adds v_first), o [B, T, H, V], the six
        tensors, the rest that `write_out` needs, and the mixer's new cache."""
        s, rest, new = self.mixer.inputs(self.norm1(stream.x), cache, stream.v_first)
        with torch.autocast(stream.x.device.type, enabled=False):  # the recurrence stays fp32
            o, state = recurrence_chunked(s, cache.get("state"))  # `recurrence`, faster: section 6
        if isinstance(self.mixer, RWKV7) and stream.v_first is None:
            stream = stream._replace(v_first=s.v)
        return stream, o, s, rest, new | {"state": state}

    def write_out(self, stream: Stream, o: Tensor, rest: tuple) -> Stream:
        """From the reads on: the stream after the mixer."""
        return stream._replace(x=stream.x + self.mixer.output(o, rest))

    def mix(self, stream: Stream, cache: dict, start=0, edits=()) -> tuple[Stream, dict]:
        """The first half, over tokens from position start on, and the mixer's new cache."""
        if not self.recurrent:
            y, new = self.mixer(self.norm1(stream.x), cache)
            return stream._replace(x=stream.x + y), new
        stream, o, s, rest, new = self.read(stream, cache)
        if edits:
            o, new["state"] = apply_edits(o, new["state"], s, start, edits)
        return self.write_out(stream, o, rest), new

    def feed(self, stream: Stream, cache: dict) -> tuple[Stream, dict]:
        """The second half, and the MLP's new cache."""
        if self.mlp is None:
            return stream, {}
        y, new = self.mlp(self.norm2(stream.x), cache)
        return stream._replace(x=stream.x + y), new


class LanguageModel(nn.Module):
    """Embedding, blocks, norm, head: the same for all three. Made by `build` or `load`."""
    def __init__(self, architecture: str, vocab: int, width: int, blocks: list[Block],
                 norm: nn.Module, embed_norm: nn.Module | None = None, tied: bool = True):
        super().__init__()
        self.architecture, self.vocab = architecture, vocab
        self.name, self.folder = architecture, None  # `load` knows better
        self.embedding, self.embed_norm = nn.Embedding(vocab, width), embed_norm
        self.layers, self.norm = nn.ModuleList(blocks), norm
        self.lm_head = None if tied else linear(width, vocab)
        self.recurrent_layers = [i for i, block in enumerate(blocks) if block.recurrent]

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.embedding.weight.device

    @property
    def unembedding(self) -> Tensor:
        """The output map, [vocab, D]."""
        return (self.embedding if self.lm_head is None else self.lm_head).weight

    def out_map(self, layer: int) -> Tensor:
        """A recurrent layer's output map by heads, [D, H, V], at least fp32."""
        mixer = self.layers[layer].mixer
        return at_least_fp32(mixer.out_proj.weight).unflatten(1, (mixer.heads, mixer.V))

    def forward(self, tokens: Tensor, cache: Cache | None = None, edits=()) -> tuple[Tensor, Cache]:
        """tokens [B, T] after those in cache -> logits [B, T, vocab], new cache; inputs stay."""
        stream, cache = self.run(self.embed(tokens), cache, edits)
        return self.unembed(stream), cache

    def embed(self, tokens: Tensor) -> Stream:
        """tokens [B, T] -> the stream before layer 0."""
        x = self.embedding(tokens)
        return Stream(x if self.embed_norm is None else self.embed_norm(x))

    def run(self, stream: Stream, cache: Cache | None = None, edits=(), first=0, last=None):
        """Layers first ≤ i < last: the stream after them, and the cache with those layers renewed.
        Raises InputError if an edit is not in these tokens and layers or not of its head's size."""
        cache = cache or self.empty_cache()
        start, stop = cache.length, cache.length + stream.x.shape[1]
        layers, which = list(cache.layers), range(len(self.layers))[first:last]
        for e in edits:
            check_edit(self, e, which, range(start, stop))
        for i in which:
            here = [e for e in edits if e.layer == i]
            stream, mixed = self.layers[i].mix(stream, layers[i], start, here)
            stream, fed = self.layers[i].feed(stream, layers[i])
            layers[i] = mixed | fed
        return stream, Cache(tuple(layers), stop)

    def unembed(self, stream: Stream) -> Tensor:
        """The stream after the last layer -> logits [B, T, vocab]."""
        return F.linear(self.norm(stream.x), self.unembedding)

    def step_inputs(self, stream: Stream, layer: int) -> StepInputs:
        """The six tensors of a recurrent layer, from the stream of a whole text at its input."""
        block = self.layers[layer]
        s, _, _ = block.mixer.inputs(block.norm1(stream.x), {}, stream.v_first)
        return s

    def empty_cache(self) -> Cache:
        """The cache before the first token."""
        return Cache(tuple({} for _ in self.layers), 0)

    def check_cell(self, layer: int, head: int):
        """Raise InputError unless layer is recurrent and has this head."""
        n, recurrent = len(self.layers), self.recurrent_layers
        here = f"layer {layer} of {self.name}"
        what = "full attention, it keeps no state" if 0 <= layer < n else f"not one of 0..{n - 1}"
        names = ", ".join(map(str, recurrent))
        require(layer in recurrent, f"{here} is {what}; recurrent layers: {names}")
        heads = self.layers[layer].mixer.heads
        require(0 <= head < heads, f"head {head}: {here} has heads 0..{heads - 1}")

    def generate(self, logits: Tensor, cache: Cache, n: int):
        """n tokens, each the most probable next one, after a prompt's last logits [B, vocab] and
        cache. Returns tokens [B, n] and the logits that they were chosen from, [B, n, vocab]."""
        tokens, chosen_from = [logits.argmax(-1)], [logits]
        while len(tokens) < n:
            logits, cache = self(tokens[-1][:, None], cache)
            tokens.append(logits[:, 0].argmax(-1))
            chosen_from.append(logits[:, 0])
        return torch.stack(tokens, 1), torch.stack(chosen_from, 1)


# ==== The tutorial ends here. Below: the recurrence by chunks, checks, checkpoints, tokenizers ====
# ---- 6. The recurrence by chunks: the same results, in a few large products ----
def decayed_scores(x, log_x, ys: list[Tensor], log_y, diagonal: int) -> list[Tensor]:
    """How much of what y wrote at token j is left when x looks for it at token i, for each y:

        M_ij = Σ_c x_ic exp(log_x_ic − log_y_jc) y_jc        for j ≤ i + diagonal, else 0

    x, y [..., C, K], logs [..., C, 1|K] -> [..., C, C]. Only differences of logs are exponentiated.
    One decay per head leaves the sum. One per channel: both sides are measured from the middle of
    the chunk; C ≤ 16 and RWKV-7's decay, at least exp(−e^{−1/2}) = 0.545 a step, stay far inside
    fp32.
    """
    if log_x.shape[-1] == 1:
        # tril before exp: no overflow above the diagonal; and after: no exp(0) = 1 there
        decay = (log_x - log_y.mT).tril(diagonal).exp().tril(diagonal)
        return [(x @ y.mT) * decay for y in ys]
    middle = log_y[..., log_y.shape[-2] // 2, None, :]
    x, grow = x * (log_x - middle).exp(), (middle - log_y).exp()
    return [(x @ (y * grow).mT).tril(diagonal) for y in ys]


def recurrence_chunked(s: StepInputs, state: Tensor | None = None, chunk: int | None = None):
    """`recurrence`, same arguments and results, by matrix products over chunks of C tokens (with a
    decay per channel: one of at least 0.545 a step, see `decayed_scores`).

    Let S be the state before a chunk, L the log decays summed from the chunk's start, and
    w_t = S_{t-1}ᵀ erase_in_t what the erase of token t finds. Unrolled inside the chunk,

        S_t = e^{L_t} S + Σ_{j≤t} e^{L_t − L_j} (k_j v_jᵀ − erase_out_j w_jᵀ)

    Put that into the definition of w: each depends on those before it, a triangular system

        (I + found_erased) w = found_writes v + e^{L_{t-1}} erase_in S    (unitriangular adds I)

    where `found` are the scores of erase_in against earlier tokens' erase_outs and keys. All else
    is a product. chunk: C, by default 32 with one decay per head, 16 with one per channel.
    """
    if s.q.shape[1] == 1:
        return recurrence(s, state)  # one token is the definition
    check_shapes(s, state)
    (B, T, H, K), V = s.q.shape, s.v.shape[-1]
    C = min(T, chunk or (32 if s.log_decay.shape[-1] == 1 else 16))
    N = -(-T // C)  # chunks; the last is padded with zeros: no change

    def split(x: Tensor) -> Tensor:  # [B, T, H, ·] -> [N, B·H, C, ·]
        if N * C > T:
            x = F.pad(x, (0, 0, 0, 0, 0, N * C - T))
        x = x.view(B, N, C, H, -1).permute(1, 0, 3, 2, 4)
        return x.reshape(N, B * H, C, -1).contiguous()  # one copy, or each product makes its own

    q, k = split(s.q), split(s.k)
    v, log_decay = split(s.v), split(s.log_decay)
    L = log_decay.cumsum(-2)  # [N, B·H, C, 1|K] with each token
    end = L[:, :, -1:]  # [N, B·H, 1, 1|K] over the chunk
    q_start = q * L.exp()  # as the chunk's first state is read
    k_end = k * (end - L).exp()  # as its last state holds them
    if s.erase_in is None:
        (read_writes,) = decayed_scores(q, L, [k], L, 0)  # [N, B·H, C, C] of write j by query i
    else:
        erase_in, erase_out = split(s.erase_in), split(s.erase_out)
        before = L - log_decay  # without each token
        read_writes, read_erased = decayed_scores(q, L, [k, erase_out], L, 0)
        found_writes, found_erased = decayed_scores(erase_in, before, [k, erase_out], L, -1)
        found = found_writes @ v  # [N, B·H, C, V]
        in_start = erase_in * before.exp()
        out_end = erase_out * (end - L).exp()
    S = v.new_zeros(B * H, K, V) if state is None else state.reshape(B * H, K, V)
    decay, o = end.mT.exp(), read_writes @ v
    outputs, add = [], torch.baddbmm  # add(a, b, c) is a + b @ c
    for n in range(N):
        o_n = add(o[n], q_start[n], S)  # [B·H, C, V]
        S_n = (decay[n] * S).baddbmm_(k_end[n].mT, v[n])  # [B·H, K, V]
        if s.erase_in is not None:
            rhs = add(found[n], in_start[n], S)
            w = torch.linalg.solve_triangular(found_erased[n], rhs, upper=False, unitriangular=True)
            o_n = add(o_n, read_erased[n], w, alpha=-1)
            S_n = S_n.baddbmm_(out_end[n].mT, w, alpha=-1)
        outputs.append(o_n)
        S = S_n
    o = torch.stack(outputs).view(N, B, H, C, V).permute(1, 0, 3, 2, 4)
    return o.reshape(B, N * C, H, V)[:, :T], S.view(B, H, K, V)


# ---- 7. Checks: is it the shape that it should be? ----
def check_shapes(s: StepInputs, state: Tensor | None):
    """Raise InputError with the likely mistake if the six tensors do not fit together."""
    (B, T, H, K), V = s.q.shape, s.v.shape[-1]
    q, k, v, decay = (list(x.shape) for x in s[:4])
    got = [B, H, K, V] if state is None else list(state.shape)
    require(k == q and v == [B, T, H, V], f"q is {q}, k {k}, v {v}; must be [B,T,H,K], "
            "[B,T,H,K], [B,T,H,V]: is the head axis before the time axis, or are grouped keys not "
            "yet repeated?")
    require(decay in ([B, T, H, 1], q), f"log_decay is {decay}; must be [B,T,H,1] or [B,T,H,K]: is "
            "the last axis missing?")
    erase = [None if x is None else list(x.shape) for x in s[4:]]
    require(erase in ([None, None], [q, q]), f"erase_in, erase_out are {erase}; must both be "
            "[B,T,H,K], or both None")
    require(got == [B, H, K, V], f"state is {got}; must be [B,H,K,V] = {[B, H, K, V]}: is it value "
            "first?")


def check_edit(model: LanguageModel, e: Edit, layers: range, positions: range):
    """Raise InputError unless the edit is of these layers and positions, and of its head's size."""
    model.check_cell(e.layer, e.head)
    mixer = model.layers[e.layer].mixer
    K, V = e.key.shape[-1], e.value.shape[-1]
    where = f"layers {layers.start}..{layers.stop - 1} over positions {positions.start}.."
    require(e.layer in layers and e.position in positions, f"edit at layer {e.layer}, position "
            f"{e.position}: this call runs {where}{positions.stop - 1}")
    require((K, V) == (mixer.K, mixer.V), f"edit with key [{K}] and value [{V}]: the head's state "
            f"is [K, V] = [{mixer.K}, {mixer.V}], key first")


def whole_ratio(a: int, b: int) -> int:
    """a / b. Raises InputError unless b divides a."""
    require(a % b == 0, f"{a} heads or channels in {b} groups: they must divide")
    return a // b


# ---- 8. Models from configs: what comes from outside passes through `reading` and `number` ----
@contextlib.contextmanager
def reading(path: str, advice: str = "is the download complete?"):
    """Whatever a parser raises at a file that is not what it should be, as one InputError."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # the one place: safetensors and tokenizers raise what they like
        why = f"{type(error).__name__}: {error!s:.80}"
        raise InputError(f"{path}: cannot be read ({why}); {advice}") from None


def number(c: dict, name: str, default=None, kind: type = int, most: float = 500_000):
    """A positive number of a config: a size (int) or a real one (float). Raises InputError."""
    x = c.get(name, default)
    sound = isinstance(x, (int, kind)) and not isinstance(x, bool) and 0 < x <= most
    require(sound, f"config.json: {name} is {x!r:.40}; allowed are {kind.__name__}s above 0, up to "
            f"{most:,}; is it this model's config.json?")
    return kind(x)


def numbers(c: dict, *names: str) -> list[int]:
    """Several sizes of a config."""
    return [number(c, name) for name in names]


real = functools.partial(number, kind=float, most=10**12)
layers_of = functools.partial(number, name="num_hidden_layers", most=1000)


def build_qwen(c: dict, D: int) -> tuple:
    """Qwen3.5: Gated DeltaNet, with gated attention in every 4th layer."""
    eps, n = real(c, "rms_norm_eps", 1e-6), layers_of(c)
    every = number(c, "full_attention_interval", 4)
    heads, key_heads, inner = numbers(
        c, "num_attention_heads", "num_key_value_heads", "intermediate_size")
    size, rope = number(c, "head_dim", max(1, D // heads)), c.get("rope_parameters") or c
    require(rope.get("rope_type", "default") == "default", "config.json: only rope_type default")
    part = real(rope, "partial_rotary_factor", c.get("partial_rotary_factor", 0.25), most=1)
    theta, conv_width = real(rope, "rope_theta"), number(c, "linear_conv_kernel_dim", 4, most=64)
    linear_sizes = numbers(c, "linear_num_key_heads", "linear_num_value_heads",
                           "linear_key_head_dim", "linear_value_head_dim")
    kinds = ("linear_attention", "full_attention")
    types = c.get("layer_types") or [kinds[i % every == 0] for i in range(1, n + 1)]
    require(len(types) == n and all(kind in kinds for kind in types),
            f"config.json: layer_types must name {n} layers, each one of {', '.join(kinds)}")
    blocks = []
    for kind in types:
        if kind == "full_attention":
            mixer = GatedAttention(D, heads, key_heads, size, int(size * part), theta, eps)
        else:
            mixer = GatedDeltaNet(D, *linear_sizes, conv_width, eps)
        norm1, norm2 = RMSNorm(D, eps, 1.0), RMSNorm(D, eps, 1.0)
        blocks.append(Block(mixer, norm1, GatedMLP(D, inner), norm2))
    return blocks, RMSNorm(D, eps, 1.0)


def build_mamba2(c: dict, D: int) -> tuple:
    """Mamba-2: one mixer per block, no MLP."""
    eps, limit = real(c, "layer_norm_epsilon", 1e-5), c.get("time_step_limit", (0.0, math.inf))
    low, high = (float(x["__float__"] if isinstance(x, dict) else x) for x in limit)
    require(0 <= low <= high, f"config.json: time_step_limit is {low}, {high}, not ordered")
    sizes = numbers(c, "num_heads", "n_groups", "state_size", "head_dim")
    sizes.append(number(c, "conv_kernel", 4, most=64))
    biases = bool(c.get("use_bias", False)), bool(c.get("use_conv_bias", True))
    blocks = [Block(Mamba2(D, *sizes, eps, (low, high), *biases), RMSNorm(D, eps))
              for _ in range(layers_of(c))]
    return blocks, RMSNorm(D, eps)


RANKS = {"w": "decay", "a": "a", "v": "v", "g": "gate"}  # RWKV-7's low ranks in configs


def build_rwkv7(c: dict, D: int) -> tuple:
    """RWKV-7: time and channel mixing, LayerNorms with bias, one more after the embedding."""
    K, eps = number(c, "head_dim", 64), real(c, "norm_eps", 1e-5)
    require(not c.get("attn"), "config.json: attn asks for attention layers; take a pure RWKV-7")
    ranks = {letter: number(c, name + "_low_rank_dim") for letter, name in RANKS.items()}
    norm, inner = functools.partial(nn.LayerNorm, D, eps), number(c, "intermediate_size", 4 * D)
    blocks = []
    for i in range(layers_of(c)):
        mixer = RWKV7(D, whole_ratio(D, K), K, K, ranks, i == 0, K * eps)
        blocks.append(Block(mixer, norm(), ChannelMix(D, inner), norm()))
    return blocks, norm(), norm()


BUILDERS = {"qwen3_5": ("gdn", build_qwen), "qwen3_5_text": ("gdn", build_qwen),
            "mamba2": ("mamba2", build_mamba2), "rwkv7": ("rwkv7", build_rwkv7)}
OTHERS = {"qwen3_next": "Qwen3-Next, whose projections are packed", "rwkv": "RWKV-4",
          "mamba": "Mamba-1, which has no heads", "rwkv5": "RWKV-5", "rwkv6": "RWKV-6"}


def build(config: dict) -> LanguageModel:
    """An untrained model of the shape that a flat config.json describes. Raises InputError."""
    kind = str(config.get("model_type"))
    what = OTHERS.get(kind, "unknown")
    require(kind in BUILDERS,
            f"model_type {kind:.40} is not supported ({what}); supported: {', '.join(BUILDERS)}")
    architecture, blocks_of = BUILDERS[kind]
    with reading("config.json", "is it this model's?"):
        D, vocab = numbers(config, "hidden_size", "vocab_size")
        tied = config.get("tie_word_embeddings", False)
        return LanguageModel(architecture, vocab, D, *blocks_of(config, D), tied=tied)


# ---- 9. Checkpoints: every layout of the hub ends here ----
#: Beginnings of names, ours and the checkpoints': the model's, and those inside a block.
HUB_NAMES = {
    "gdn": {
        "embedding": "model.embed_tokens", "layers": "model.layers",
        "norm1": "input_layernorm", "norm2": "post_attention_layernorm", "norm": "model.norm",
        "mixer.q_": "self_attn.q_", "mixer.k_": "self_attn.k_", "mixer.v_": "self_attn.v_",
        "mixer.o_": "self_attn.o_", "mixer": "linear_attn",
    },
    "mamba2": {
        "embedding": "backbone.embeddings", "layers": "backbone.layers",
        "norm1": "norm", "norm": "backbone.norm_f",
    },
    "rwkv7": {
        "embedding": "model.embeddings", "layers": "model.layers",
        "embed_norm": "model.layers.0.pre_norm", "norm1": "attn_norm", "norm2": "ffn_norm",
        "norm": "model.norm", "mlp": "ffn", "mixer.out_proj": "attn.o_proj",
        "mixer.w_lora": "attn.w_lora.lora", "mixer.a_lora": "attn.a_lora.lora",
        "mixer.v_lora": "attn.v_lora.lora", "mixer.g_lora": "attn.g_lora.lora", "mixer": "attn",
    },
}
PICKLE = "a pickle, which can run code when it is opened; take a safetensors conversion"
SIGNS = {b"\x80": PICKLE, b"PK\x03\x04": PICKLE, b"<": "a web page; download the file itself",
         b"version https://git-lfs": "a git-LFS pointer, not the file; fetch it with git lfs pull"}


def hub_name(architecture: str, name: str) -> str:
    """Our parameter's name -> its name in a checkpoint."""
    table, block = HUB_NAMES[architecture], ""
    if name.startswith("layers."):
        _, i, name = name.split(".", 2)
        block = f"{table['layers']}.{i}."
    for ours, theirs in table.items():
        if name.startswith(ours):
            return block + theirs + name[len(ours) :]
    return block + name


class Stored(NamedTuple):
    """Where a tensor lies on the disk."""
    file: str
    name: str
    shape: list[int]
    part: int | None = None  # its row, where RWKV-7's six mixes are packed in one tensor

    def read(self, dtype: torch.dtype) -> Tensor:
        """The tensor, alone: its file is opened for it and closed, so nothing is held twice."""
        with reading(self.file), safetensors.safe_open(self.file, "pt") as f:
            x = f.get_tensor(self.name)
            x = (x if self.part is None else x[self.part]).to(dtype, copy=True)
        low, high = map(float, x.aminmax())  # without the copies that isfinite makes
        require(math.isfinite(high - low), f"{self.file}: tensor {self.name} holds NaN or Inf, as "
                f"{dtype}; download the file again")
        return x


def load(name_or_path: str, device: str | torch.device = "cpu",
         dtype: torch.dtype = torch.float32) -> LanguageModel:
    """A model from a folder or a hub id ("Qwen/Qwen3.5-0.8B"): config.json and safetensors.

    Reads Qwen3.5 (also the multimodal layout), Mamba-2 (transformers' and mamba_ssm's names) and
    RWKV-7 (fla's). dtype: of the weights; the recurrence is fp32 always. Memory: the weights in
    dtype, and one tensor more. Runs no code from the checkpoint. Raises InputError, one line, for
    whatever is wrong with name, network, config or tensors.
    """
    folder = find_folder(str(name_or_path))
    config = read_json(os.path.join(folder, "config.json"))
    stored, chosen = find_tensors(folder), {}
    with reading(folder, "are config.json and weights this model's?"), torch.device("meta"):
        model = build(complete_config(config, stored))  # shapes only: no memory yet
    for ours, parameter in model.named_parameters():
        theirs = hub_name(model.architecture, ours)
        require(theirs in stored, f"{folder}: tensor {theirs} is missing; download it again")
        shape, asked = stored[theirs].shape, list(parameter.shape)
        fits = [n for n in shape if n > 1] == [n for n in asked if n > 1]  # x_r may be [1, 1, D]
        require(fits, f"{folder}: tensor {theirs} is {shape}, config.json asks for {asked}")
        chosen[ours] = stored.pop(theirs)
    if model.lm_head is None:
        stored.pop("lm_head.weight", None)
    require(not stored, f"{folder}: unexpected tensor {min(stored, default='')} ({len(stored)} in "
            "all); the known layouts have no such name")
    weights = {name: chosen[name].read(dtype).view(parameter.shape)
               for name, parameter in model.named_parameters()}
    model.load_state_dict(weights, assign=True)
    model.name, model.folder = str(name_or_path), folder
    return model.requires_grad_(False).eval().to(device)


def find_folder(name_or_path: str) -> str:
    """The folder itself, or a hub id's files, downloaded once into the hub's own cache."""
    if os.path.isdir(name_or_path):
        return name_or_path
    require(re.fullmatch(r"[\w.-]+/[\w.-]+", name_or_path), f"{name_or_path!r:.100} is neither a "
            "folder nor a hub id (owner/name), nor one of gdn, mamba2, rwkv7")
    import huggingface_hub

    wanted = ["config.json", "model*.safetensors", "model.safetensors.index.json",
              "tokenizer.json", "rwkv_vocab*.txt", "sae*.safetensors"]
    try:
        return huggingface_hub.snapshot_download(name_or_path, allow_patterns=wanted)
    except Exception as error:  # the hub's library, its network library or the disk
        why = f"{type(error).__name__:.30}"
        raise InputError(f"{name_or_path:.60} could not be fetched ({why}); check the name, your "
                         "access and the network, or give a folder") from None


def check_file(path: str):
    """Raise InputError unless path is a file that may be what its name says."""
    require(os.path.isfile(path), f"{path}: is missing, or no file; is the download complete?")
    with reading(path), open(path, "rb") as f:
        start = f.read(100)
    if start[4:8] != bytes(4):  # safetensors begin with a length in 8 bytes, far below 4 GB
        for sign, what in SIGNS.items():
            require(not start.startswith(sign), f"{path}: is {what}")


def read_json(path: str) -> dict:
    """A JSON object from a file. Raises InputError."""
    check_file(path)
    require(os.path.getsize(path) < 10**8, f"{path}: has over 100 MB, too much for a config")
    with reading(path), open(path, encoding="utf-8") as f:
        content = json.load(f)
    require(isinstance(content, dict), f"{path}: holds no JSON object; download it again")
    return content


def find_files(folder: str) -> list[str]:
    """A folder's safetensors files: model.safetensors, or the shards of its index."""
    index = os.path.join(folder, "model.safetensors.index.json")
    if os.path.exists(index):
        with reading(index):
            files = set(read_json(index)["weight_map"].values())
            sound = all(re.fullmatch(r"[\w.-]+\.safetensors", file) for file in files)
        require(files and sound, f"{index}: names what is no safetensors file beside it, maybe one "
                "outside the folder; download it again")
        return sorted(files)
    if not os.path.exists(os.path.join(folder, "model.safetensors")):
        endings = (".bin", ".pth", ".pt", ".ckpt")
        pickles = [file for file in sorted(os.listdir(folder)) if file.endswith(endings)]
        why = f"{pickles[0]} is {PICKLE}" if pickles else "no model.safetensors, no index"
        raise InputError(f"{folder}: {why}, e.g. AntonV/mamba2-370m-hf or fla-hub/rwkv7-1.5B-world")
    return ["model.safetensors"]


def find_tensors(folder: str) -> dict[str, Stored]:
    """Every tensor of a folder's safetensors files by a uniform name; only headers are read."""
    found = {}
    for file in find_files(folder):
        path = os.path.join(folder, file)
        check_file(path)
        with reading(path), safetensors.safe_open(path, "pt") as f:
            for name in f.keys():
                uniform = name.replace("model.language_model.", "model.")
                uniform = uniform.replace("backbone.embedding.", "backbone.embeddings.")
                if uniform.startswith(("model.visual.", "mtp.")):  # Qwen3.5's eyes, its drafts
                    continue
                header = f.get_slice(name)
                shape, dtype = list(header.get_shape()), header.get_dtype()
                require(dtype in ("F16", "BF16", "F32", "F64"), f"{path}: tensor {name:.80} holds "
                        f"{dtype}; allowed are floating-point weights, not quantised ones")
                require(uniform not in found, f"{path}: {name:.80} stands twice; download it again")
                if uniform.endswith(".attn.x_x"):  # RWKV-7's mixes, [6, ..., D]
                    for i, c in enumerate("rwkvag"):
                        found[uniform[:-1] + c] = Stored(path, name, shape[1:], i)
                else:
                    found[uniform] = Stored(path, name, shape)
    return found


def complete_config(config: dict, stored: dict[str, Stored]) -> dict:
    """A flat config, with what it leaves to the tensors' shapes: whether the head is tied,
    mamba_ssm's sizes, RWKV-7's ranks."""
    c = {**config, **config.get("text_config", {})}
    if "ssm_cfg" in c:  # mamba_ssm's config.json
        layer, ssm = "backbone.layers.0.mixer.", c["ssm_cfg"]
        require(ssm.get("layer") == "Mamba2", f"config.json: ssm_cfg is of {OTHERS['mamba']}")
        inner, groups = stored[layer + "out_proj.weight"].shape[1], number(ssm, "ngroups", 1)
        (heads,), conv = stored[layer + "dt_bias"].shape, stored[layer + "conv1d.weight"].shape
        c |= dict(model_type="mamba2", hidden_size=c["d_model"], num_hidden_layers=c["n_layer"],
                  num_heads=heads, head_dim=inner // heads, n_groups=groups, conv_kernel=conv[-1],
                  state_size=(conv[0] - inner) // (2 * groups),
                  vocab_size=stored["backbone.embeddings.weight"].shape[0])
        config = dict(tie_word_embeddings=c.get("tie_embeddings", True))
    if c.get("model_type") == "rwkv7":
        for letter, name in RANKS.items():
            layer = 1 if letter == "v" else 0  # layer 0 has no v_lora
            theirs = f"model.layers.{layer}.attn.{letter}_lora.lora.0.weight"
            c[name + "_low_rank_dim"] = stored[theirs].shape[0] if layer < layers_of(c) else 1
        c["intermediate_size"] = stored["model.layers.0.ffn.key.weight"].shape[0]
    tied = config.get("tie_word_embeddings", c.get("tie_word_embeddings", False))
    return c | dict(tie_word_embeddings=tied or "lm_head.weight" not in stored)


def save_then_rename(write: Callable[[str], None], path: str):
    """Call write(a temporary path of this process), then rename: the file is there whole or not at
    all. Raises InputError where it cannot be written."""
    temporary = f"{path}.{os.getpid()}.part"
    try:
        write(temporary)
        os.replace(temporary, path)
    except (OSError, RuntimeError, safetensors.SafetensorError) as error:  # a full disk is any
        why = getattr(error, "strerror", None) or str(error)
        raise InputError(f"{path}: cannot be written ({why:.80}); give another place") from None
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


def make_folder(path: str):
    """The folder, if it is not there yet. Raises InputError where it cannot be made."""
    try:
        os.makedirs(path, exist_ok=True)
    except OSError as error:
        raise InputError(f"{path}: no folder can be made there ({error.strerror}); give another "
                         "place") from None


def write_text(path: str, text: str):
    """Write a text file whole or not at all."""

    def write(temporary: str):
        with open(temporary, "w", encoding="utf-8") as f:
            f.write(text)

    save_then_rename(write, path)


def save(model: LanguageModel, config: dict, folder: str, dtype: torch.dtype = torch.float32):
    """Write config.json and model.safetensors in the hub's layout, for `load` and transformers."""
    make_folder(folder)
    weights = {hub_name(model.architecture, name): p.detach().cpu().to(dtype).contiguous()
               for name, p in model.named_parameters()}
    write = functools.partial(safetensors.torch.save_file, weights, metadata={"format": "pt"})
    save_then_rename(write, os.path.join(folder, "model.safetensors"))
    config = {**config, "dtype": str(dtype).removeprefix("torch.")}
    write_text(os.path.join(folder, "config.json"), json.dumps(config, indent=1))


# ---- 10. Text in and out, through the checkpoint's own tokenizer ----
class Tokenizer(NamedTuple):
    """Two functions."""
    encode: Callable[[str], list[int]]  # text -> ids, no special tokens added
    decode: Callable[[list[int]], str]  # ids -> text, special tokens shown


def load_tokenizer(model: LanguageModel) -> Tokenizer:
    """The tokenizer beside the model's weights. Raises InputError if there is none that fits."""
    require(model.folder is not None, "this model was not loaded from a folder: no tokenizer")
    pattern = r"tokenizer\.json|rwkv_vocab.*\.txt"
    names = sorted(name for name in os.listdir(model.folder) if re.fullmatch(pattern, name))
    require(names, f"{model.folder}: neither tokenizer.json nor rwkv_vocab_v20230424.txt; put the "
            "model's tokenizer there")
    path = os.path.join(model.folder, names[-1])  # tokenizer.json, if both are there
    check_file(path)
    with reading(path, "download it again"):
        make = hub_tokenizer if path.endswith(".json") else world_tokenizer
        tokenizer, most = make(path)
        sound = len(tokenizer.encode("a")) > 0
    require(most < model.vocab, f"{path}: has ids up to {most}, the embedding {model.vocab} rows; "
            "is it this model's tokenizer?")
    require(sound, f"{path}: gives no token for a letter; download it again")
    return tokenizer


def hub_tokenizer(path: str) -> tuple[Tokenizer, int]:
    """A tokenizer.json, through the `tokenizers` library, and its largest id."""
    import tokenizers

    read_json(path)  # says what is wrong with a damaged file
    inner = tokenizers.Tokenizer.from_file(path)

    def encode(text: str) -> list[int]:
        with reading(path, "download it again"):  # a damaged one may fail at some texts only
            return inner.encode(text, add_special_tokens=False).ids

    def decode(ids: list[int]) -> str:
        return inner.decode(ids, skip_special_tokens=False)

    return Tokenizer(encode, decode), max(inner.get_vocab().values())


def world_tokenizer(path: str) -> tuple[Tokenizer, int]:
    """RWKV World's vocabulary, and its largest id: at each point the longest entry that matches.
    Each line of its file: id, Python literal, number of bytes."""
    bytes_of = {}
    with open(path, encoding="utf-8") as f:
        for line in f:
            index, rest = line.split(" ", 1)
            entry = ast.literal_eval(rest.rsplit(" ", 1)[0])
            bytes_of[int(index)] = entry.encode() if isinstance(entry, str) else b"" + entry
    id_of = {entry: index for index, entry in bytes_of.items()}
    longest = max(map(len, id_of))

    def encode(text: str) -> list[int]:
        data, ids, at = text.encode(), [], 0
        while at < len(data):
            n = min(longest, len(data) - at)
            while n > 0 and data[at : at + n] not in id_of:
                n -= 1
            require(n > 0, f"{path}: has no entry for the byte {data[at]}; download it again")
            ids.append(id_of[data[at : at + n]])
            at += n
        return ids

    def decode(ids: list[int]) -> str:
        return b"".join(bytes_of.get(i, b"") for i in ids).decode(errors="replace")

    return Tokenizer(encode, decode), max(bytes_of)
