"""Gated DeltaNet (in Qwen3.5), Mamba-2 and RWKV-7 as one recurrence, in plain PyTorch.

    logits, cache = load("checkpoints/gdn")(tokens)  # tokens [B, T] -> logits [B, T, vocab]

Each head of these models keeps a matrix, its *state* S, and updates it once per token:

    S_t = A_t S_{t-1} + k_t v_tᵀ    A_t = diag(decay_t) − erase_out_t erase_in_tᵀ    o_t = S_tᵀ q_t

S is a memory. A token *writes* its value v under its key k, and *reads* what is stored under its
query q. So that S does not fill up, all of it *decays* a little with each token. And before a key
is written anew, what is stored under it is looked up (erase_inᵀ S, before the decay), and a part of
that taken out (along erase_out): the *erase*, or delta rule. The models differ in the six tensors:

    here       shape           Gated DeltaNet  Mamba-2  RWKV-7            Kimi Delta  DeltaNet-2
    q          [B, T, H, K]    q/√K            C        r                 q/√K        q/√K
    k          [B, T, H, K]    k               B        k (1 + (a−1) k_a) k           k
    v          [B, T, H, V]    β v             Δ x      v                 β v         w v
    log_decay  [B, T, H, 1|K]  log α           Δ A      log w (K of them) log α (K)   log α (K)
    erase_in   [B, T, H, K]    k               -        κ̂                 α k         α b k
    erase_out  [B, T, H, K]    α β k           -        a κ̂               β k         k

Letters are each paper's own (Mamba-2's A < 0 is a rate, no A_t; k_a, k_k are weights). The
DeltaNets' q, k and RWKV-7's κ̂ ∝ k k_k have length 1; α, β, a, b, w are in (0, 1), Δ > 0 is a step
size. Kimi Delta Attention (arXiv 2510.26692) and Gated DeltaNet-2 (2605.22791) fit, too.

The state is key first everywhere: [K, V], K = key size, V = value size. B batch, T time, H heads, D
width of the residual stream; layers and heads count from 0. The recurrence runs in fp32 whatever
the weights' dtype. (`check_...`, and `whole_ratio`, a / b, refuse wrong inputs: section 7.)
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
        printable = "".join(c if c.isprintable() else " " for c in message)  # no control characters
        super().__init__(" ".join(printable.split()))


def require(condition: bool, message: str):
    """Raise InputError with this message unless the condition holds."""
    if not condition:
        raise InputError(message)


def at_least_fp32(x: Tensor) -> Tensor:
    """Widen half precision; fp32 and fp64 stay."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


# ---- 1. The recurrence ----
# New here: a head's memory, token by token, and how a change of it is carried on.
class StepInputs(NamedTuple):
    """Hold the six tensors that drive a recurrent layer (the table above). No erase: two None."""
    q: Tensor  # [B, T, H, K]
    k: Tensor  # [B, T, H, K]
    v: Tensor  # [B, T, H, V]
    log_decay: Tensor  # [B, T, H, 1] one per head, or [B, T, H, K] per key channel
    erase_in: Tensor | None = None  # [B, T, H, K] what is stored along it is looked up,
    erase_out: Tensor | None = None  # [B, T, H, K] and taken out along this

    def times(self, start: int, stop: int | None = None) -> StepInputs:
        """Take the tokens start ≤ t < stop."""
        return self._make(None if x is None else x[:, start:stop] for x in self)

    def heads(self, which: list[int] | Tensor) -> StepInputs:
        """Take some heads, repeats allowed; the axis stays."""
        return self._make(None if x is None else x[:, :, which] for x in self)

    def rows(self, index: Tensor) -> StepInputs:
        """Take some batch rows, repeats allowed."""
        return self._make(None if x is None else x[index] for x in self)


def outer(a: Tensor, b: Tensor) -> Tensor:
    """Form a bᵀ: [..., K], [..., V] -> [..., K, V]."""
    return a.unsqueeze(-1) * b.unsqueeze(-2)


def read(S: Tensor, q: Tensor) -> Tensor:
    """Form Sᵀq: [..., K, V], [..., K] -> [..., V]."""
    return (S * q.unsqueeze(-1)).sum(-2)


def recurrence(s: StepInputs, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Run the definition, one token after the other:

        S_t = diag(decay_t) S_{t-1} − erase_out_t (erase_in_tᵀ S_{t-1}) + k_t v_tᵀ
        o_t = S_tᵀ q_t

    s: the six tensors; state: S_0 [B, H, K, V], zeros if None. Returns o [B, T, H, V] and the last
    state. Raises InputError if shapes do not fit. By hand, K = V = 2: the first token writes (6, 2)
    under the key (1, 0). The second halves all, takes out a quarter of what was under (1, 0), and
    writes (0, 5) under (0, 1):

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


def propagate(key: Tensor, s: StepInputs) -> tuple[Tensor, Tensor]:
    """Follow an edit of a head's state to all reads from then on, exactly, by K numbers a step.

    Add u_t yᵀ (key, value) to the state right after the write of token t. The recurrence is linear
    in the state, so the change stays rank 1 with the same y, and at later times r only u moves:

        u_t = key        u_r = A_r u_{r-1}        δo_r = (u_r · q_r) y

    key [B, H, K], one edit per head; s: those heads' six tensors from the edited token on (k and v
    play no part). Returns gain [B, T, H], the u_r · q_r, and the last u [B, H, K]. In the example
    of `recurrence`, an edit under (1, 0) is read whole, and by 0.5 − 0.25 of itself a token later:

    >>> tokens = lambda *rows: torch.tensor(rows)[None, :, None]
    >>> q, erase = tokens([1., 0.], [1., 1.]), tokens([1., 0.], [1., 0.])
    >>> s = StepInputs(q, q, q, tokens([1.], [0.5]).log(), erase, 0.25 * erase)
    >>> gain, u = propagate(torch.tensor([[[1., 0.]]]), s)
    >>> gain[0, :, 0].tolist(), u[0, 0].tolist()
    ([1.0, 0.25], [0.25, 0.0])
    """
    # That is the recurrence itself, from an empty state, with a value size of 1 and a single write
    # (key, 1) at the first step. (That step's own A must not act on it, and meets only zeros.)
    later = s.q.shape[1] - 1
    keys = F.pad(key[:, None], (0, 0, 0, 0, 0, later))  # [B, T, H, K], zero after the first step
    ones = torch.ones_like(keys[..., :1])  # [B, T, H, 1]
    gain, u = recurrence(s._replace(k=keys, v=ones))
    return gain[..., 0], u[..., 0]


# ---- 2. An edit of the state ----
# New here: the one way in which anything is changed. A write is replaced by two edits at one place.
class Edit(NamedTuple):
    """Add key valueᵀ to a head's state right after a token's write k vᵀ; (-k, v) undoes that."""
    layer: int
    head: int
    position: int  # from the first token ever fed, those in a cache included
    key: Tensor  # [K] or [B, K]
    value: Tensor  # [V] or [B, V]


def apply_edits(o: Tensor, state: Tensor, s: StepInputs, start: int, edits: list[Edit]):
    """Change a layer's reads o [B, T, H, V], from position start on, and its last state, by edits.
    That is all an edit does here: no q, k, v or decay of a layer depends on its own state.
    Changes are summed before o is added, so that an edit and its opposite cancel to the bit."""
    B = len(o)
    delta_o, delta_state = torch.zeros_like(o), torch.zeros_like(state)
    for position in sorted({e.position for e in edits}):
        here, t = [e for e in edits if e.position == position], position - start
        heads = torch.tensor([e.head for e in here], device=o.device)
        key = torch.stack([e.key.to(o).expand(B, -1) for e in here], 1)  # [B, E, K]
        value = torch.stack([e.value.to(o).expand(B, -1) for e in here], 1)  # [B, E, V]
        gain, u = propagate(key, s.times(t).heads(heads))  # [B, T − t, E], [B, E, K]
        moved = gain.unsqueeze(-1) * value.unsqueeze(1)  # [B, T − t, E, V]
        moved = F.pad(moved, (0, 0, 0, 0, t, 0))  # nothing before the edit
        delta_o = delta_o.index_add(2, heads, moved)
        delta_state = delta_state.index_add(1, heads, outer(u, value))
    return o + delta_o, state + delta_state


# ---- 3. Three adapters ----
# New here: where the six tensors come from, and what becomes of the reads o [B, T, H, V].
#    inputs(h, cache) -> StepInputs, rest, new cache    h [B, T, D]; rest: for the other two
#    output(o, rest) -> [B, T, D]: W_out(gate · scale · o + ...)
#    gate_and_scale(o, rest) -> both apart: gate [B, T, H, V], scale [B, T, H, 1], 1/rms or 1/std
# With the scale held fixed, the output is affine in o. A cache: a dict of tensors, at first empty.
linear = functools.partial(nn.Linear, bias=False)  # linear(n, m): x [..., n] -> W x [..., m]


def per_head(x: Tensor, heads: int) -> Tensor:
    """Split [..., heads · size] -> [..., heads, size], at least fp32."""
    return at_least_fp32(x).unflatten(-1, (heads, -1))


def causal_conv(x: Tensor, tail: Tensor | None, conv: nn.Conv1d) -> tuple[Tensor, Tensor]:
    """Return silu(Σ_i weight_i x_{t−W+1+i} + bias), W causal taps per channel, and the new tail.
    x [B, T, channels]; tail [B, W−1, channels], the inputs just before; the last tap meets x_t."""
    T, taps = x.shape[1], conv.weight[:, 0].T.contiguous()  # [W, channels]
    past = x.new_zeros(len(x), len(taps) - 1, x.shape[2]) if tail is None else tail
    padded = torch.cat([past, x], 1)  # [B, W − 1 + T, channels]
    y = padded[:, :T] * taps[0]
    for i in range(1, len(taps)):
        y.addcmul_(padded[:, i : i + T], taps[i])  # in place: the plain sum takes 25 % longer
    if conv.bias is not None:
        y = y + conv.bias
    return F.silu(y), padded[:, T:]


class RMSNorm(nn.Module):
    """x / √(mean x² + eps) · (offset + weight). Qwen3.5 has offset 1, its GatedDeltaNet 0."""
    def __init__(self, size, eps, offset=0.0):
        super().__init__()
        self.eps, self.offset = eps, offset
        self.weight = nn.Parameter(torch.full((size,), 1.0 - offset))

    def scale(self, x: Tensor) -> Tensor:
        """Return 1 / √(mean x² + eps): [..., size] -> [..., 1], at least fp32."""
        return torch.rsqrt(at_least_fp32(x).square().mean(-1, keepdim=True) + self.eps)

    def forward(self, x: Tensor) -> Tensor:
        """Norm x [..., size]; shape and dtype stay."""
        weight = self.offset + at_least_fp32(self.weight)
        return (at_least_fp32(x) * self.scale(x) * weight).to(x.dtype)


class GatedDeltaNet(nn.Module):
    """The delta rule with a decay (arXiv 2412.06464, eq. 10):

        S_t = α_t (I − β_t k_t k_tᵀ) S_{t-1} + β_t k_t v_tᵀ

    Look up what is stored under k, take a part β of it out, and put as much of v in its place.
    Multiplied out, α (I − β k kᵀ) S = α S − (α β k)(kᵀ S): erase_in is k, erase_out α β k.

    q|k|v = silu(conv(W_qkv h)), each head's q and k over √(Σx² + 1e-6); β = σ(W_b h); z = W_z h;
    α = exp(−e^{A_log} softplus(W_a h + dt_bias)). Value head j has key head ⌊j / (H / key heads)⌋.
    Differs from transformers' Qwen3_5GatedDeltaNet in form: there S decays, then is looked up.
    """
    def __init__(self, width, key_heads, value_heads, K, V, conv_width=4, eps=1e-6):
        super().__init__()
        self.key_heads, self.heads, self.K, self.V = key_heads, value_heads, K, V
        self.repeats = whole_ratio(value_heads, key_heads)
        channels = 2 * key_heads * K + value_heads * V  # of q|k|v
        self.in_proj_qkv = linear(width, channels)
        self.in_proj_z = linear(width, value_heads * V)
        self.in_proj_b = linear(width, value_heads)
        self.in_proj_a = linear(width, value_heads)
        self.conv1d = nn.Conv1d(channels, channels, conv_width, groups=channels, bias=False)
        self.A_log = nn.Parameter(torch.zeros(value_heads))
        self.dt_bias = nn.Parameter(torch.ones(value_heads))
        self.norm = RMSNorm(V, eps)
        self.out_proj = linear(value_heads * V, width)

    def unit_heads(self, x: Tensor, length: float = 1.0) -> Tensor:
        """Bring key heads to this length, and one to each value head: -> [B, T, H, K]."""
        x = per_head(x, self.key_heads)
        x = x * (torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6) * length)
        return x.repeat_interleave(self.repeats, 2)

    def inputs(self, h, cache):
        """Project h [B, T, D]: -> the six tensors, z, the conv's tail."""
        H, key_size = self.heads, self.key_heads * self.K
        qkv, tail = causal_conv(self.in_proj_qkv(h), cache.get("tail"), self.conv1d)
        q, k, v = qkv.split([key_size, key_size, H * self.V], -1)
        q, k = self.unit_heads(q, self.K**-0.5), self.unit_heads(k)
        beta = per_head(self.in_proj_b(h), H).sigmoid()  # [B, T, H, 1]
        step = F.softplus(per_head(self.in_proj_a(h), H) + per_head(self.dt_bias, H))
        log_alpha = -per_head(self.A_log, H).exp() * step  # [B, T, H, 1]
        erase_out = log_alpha.exp() * beta * k
        s = StepInputs(q, k, beta * per_head(v, H), log_alpha, erase_in=k, erase_out=erase_out)
        return s, self.in_proj_z(h), {"tail": tail}

    def gate_and_scale(self, o, z):
        """Factor RMSNorm(o) silu(z) = o · silu(z) w / rms o: gate = silu(z) w, scale = 1/rms o."""
        return F.silu(per_head(z, self.heads)) * self.norm.weight, self.norm.scale(o)

    def output(self, o, z):
        """Form W_out( gate · scale · o ): norm, then gate."""
        gate, scale = self.gate_and_scale(o, z)
        return self.out_proj((gate * scale * o).flatten(-2).to(z.dtype))


class Mamba2(nn.Module):
    """Mamba-2's layer (arXiv 2405.21060): S_t = e^{Δ_t A} S_{t-1} + B_t (Δ_t x_t)ᵀ, read by C_t.

    z|xBC|dt = W_in h; x|B|C = silu(conv(xBC)); Δ = clamp(softplus(dt + dt_bias), time_step_limit);
    A = −e^{A_log}. Nothing is erased. Heads of a group share B and C (here: key and query), and the
    paper's D x (here: skip · x) goes past the state to the output.
    Differs from transformers' Mamba2Mixer in form: Δ multiplies x; there it multiplies B.
    """
    def __init__(self, width, heads, groups, K, V, conv_width=4, eps=1e-5,
                 time_step_limit=(0.0, math.inf), bias=False, conv_bias=True):
        super().__init__()
        self.heads, self.groups, self.K, self.V = heads, groups, K, V
        self.repeats, self.time_step_limit = whole_ratio(heads, groups), time_step_limit
        channels = heads * V + 2 * groups * K  # of x|B|C
        self.in_proj = nn.Linear(width, heads * V + channels + heads, bias=bias)
        self.conv1d = nn.Conv1d(channels, channels, conv_width, groups=channels, bias=conv_bias)
        self.dt_bias = nn.Parameter(torch.ones(heads))
        self.skip = nn.Parameter(torch.ones(heads))
        self.A_log = nn.Parameter(torch.zeros(heads))
        self.norm = RMSNorm(heads * V, eps)
        self.out_proj = nn.Linear(heads * V, width, bias=bias)

    def inputs(self, h, cache):
        """Project h [B, T, D]: -> the tensors (no erase), (skip · x, z), the conv's tail."""
        H, inner, shared = self.heads, self.heads * self.V, self.groups * self.K
        z, xBC, dt = self.in_proj(h).split([inner, inner + 2 * shared, H], -1)
        xBC, tail = causal_conv(xBC, cache.get("tail"), self.conv1d)
        x, key, query = xBC.split([inner, shared, shared], -1)
        x = per_head(x, H)  # [B, T, H, V]
        key = per_head(key, self.groups).repeat_interleave(self.repeats, 2)  # [B, T, H, K]
        query = per_head(query, self.groups).repeat_interleave(self.repeats, 2)
        delta = F.softplus(per_head(dt, H) + per_head(self.dt_bias, H))
        delta = delta.clamp(*self.time_step_limit)  # [B, T, H, 1]
        A = -per_head(self.A_log, H).exp()  # [H, 1]
        s = StepInputs(query, key, delta * x, log_decay=delta * A)
        return s, (per_head(self.skip, H) * x, z), {"tail": tail}

    def gate_and_scale(self, o, rest):
        """Factor u w / rms u, u = (o + skip x) silu(z), rms by group: gate = silu(z) w, 1/rms u."""
        skipped, z = rest
        silu = F.silu(per_head(z, self.heads))
        u = ((o + skipped) * silu).unflatten(2, (self.groups, -1)).flatten(-2)  # [B, T, groups, ·]
        scale = self.norm.scale(u).repeat_interleave(self.repeats, 2)  # [B, T, H, 1]
        return silu * per_head(self.norm.weight, self.heads), scale

    def output(self, o, rest):
        """Form W_out( gate · scale · (o + skip · x) ): gate, then norm."""
        skipped, z = rest
        gate, scale = self.gate_and_scale(o, rest)
        return self.out_proj((gate * scale * (o + skipped)).flatten(-2).to(z.dtype))


def token_shift(h: Tensor, tail: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return h_{t-1} − h_t, and h's last token, the next tail. h [B, T, D], tail [B, 1, D]."""
    past = torch.zeros_like(h[:, :1]) if tail is None else tail
    return torch.cat([past, h[:, :-1]], 1) - h, h[:, -1:]


class RWKV7(nn.Module):
    """RWKV-7's time mixing (arXiv 2503.14456, §4), read by r_t:

        S_t = (diag(w_t) − (a_t κ̂_t) κ̂_tᵀ) S_{t-1} + k_t v_tᵀ

    m_c = h + (h_{t-1} − h) x_c for c in r, w, k, v, a, g; r, k, v = W m. A lora is W_2 f(W_1 m) + b
    of low rank; f is tanh for w, σ for g (without b), nothing for a and v. So log w = −e^{−1/2}
    σ(lora(m_w)), a = σ(lora(m_a)), g = lora(m_g); κ̂ = k · k_k to unit length per head, then
    k ← k (1 + (a−1) k_a). From layer 1 on v ← v + (v_first − v) σ(lora(m_v)), layer 0's v.
    Differs from fla's RWKV7Attention in form: erase_in is κ̂; its kernels take −κ̂, and add.
    """
    def __init__(self, width, heads, K, V, ranks, is_first, eps):
        super().__init__()
        self.heads, self.K, self.V, self.eps = heads, K, V, eps

        def low_rank(c, size, f, bias=True):
            return nn.Sequential(linear(width, ranks[c]), f, nn.Linear(ranks[c], size, bias=bias))

        for c in "rwkvag":
            self.register_parameter(f"x_{c}", nn.Parameter(torch.zeros(1, 1, width)))
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
        self.v_lora = None if is_first else low_rank("v", heads * V, nn.Identity())
        self.g_norm = nn.GroupNorm(heads, heads * V, eps)  # holds the weights of each head's norm

    def inputs(self, h, cache):
        """Project h [B, T, D]: -> the six tensors, (g, bonus), h's last token and v_first."""
        H, (shift, tail) = self.heads, token_shift(h, cache.get("tail"))
        r = per_head(self.r_proj(h + shift * self.x_r), H)  # [B, T, H, K]
        k = per_head(self.k_proj(h + shift * self.x_k), H)  # [B, T, H, K]
        m_v = h + shift * self.x_v
        v = per_head(self.v_proj(m_v), H)  # [B, T, H, V]
        v_first = v if self.v_lora is None else cache["v_first"]  # `Block` hands it on
        if self.v_lora is not None:
            v = v + (v_first - v) * per_head(self.v_lora(m_v), H).sigmoid()
        raw = per_head(self.w_lora(h + shift * self.x_w), H)
        log_w = -math.exp(-0.5) * raw.sigmoid()
        a = per_head(self.a_lora(h + shift * self.x_a), H).sigmoid()
        kappa = F.normalize(k * per_head(self.k_k, H), dim=-1)
        k = k * (1 + (a - 1) * per_head(self.k_a, H))
        s = StepInputs(r, k, v, log_w, erase_in=kappa, erase_out=a * kappa)
        g = self.g_lora(h + shift * self.x_g)
        bonus = (r * k * self.r_k).sum(-1, keepdim=True) * v  # [B, T, H, V]
        return s, (g, bonus), {"tail": tail, "v_first": v_first}

    def gate_and_scale(self, o, rest):
        """Factor g ((o − mean o) / std o · w + bias), a GroupNorm: gate = g w, scale = 1/std o."""
        g, _ = rest
        scale = torch.rsqrt(o.var(-1, keepdim=True, unbiased=False) + self.eps)
        return per_head(g, self.heads) * per_head(self.g_norm.weight, self.heads), scale

    def output(self, o, rest):
        """Form W_out( gate · scale · (o − mean o) + g · (bias + (Σ_K r k r_k) v) )."""
        g, bonus = rest
        gate, scale = self.gate_and_scale(o, rest)
        y = gate * scale * (o - o.mean(-1, keepdim=True))
        y = y + per_head(g, self.heads) * (per_head(self.g_norm.bias, self.heads) + bonus)
        return self.out_proj(y.flatten(-2).to(g.dtype))


# ---- 4. The model ----
# New here: blocks in a row, run from any layer and any token on, with edits.
class Stream(NamedTuple):
    """Hold what flows from layer to layer."""
    x: Tensor  # [B, T, D] the residual stream
    v_first: Tensor | None = None  # [B, T, H, V] layer 0's v, in RWKV-7 alone (after its layer 0)

    times, rows = StepInputs.times, StepInputs.rows  # the same code: they take part of each field


class Cache(NamedTuple):
    """Hold all that the past leaves behind: a dict of tensors per layer, and the tokens seen."""
    layers: tuple[dict[str, Tensor], ...]  # batch first; empty before the first token
    length: int

    def rows(self, index: Tensor) -> Cache:
        """Take some batch rows, repeats allowed."""
        layers = [{name: x[index] for name, x in layer.items()} for layer in self.layers]
        return Cache(tuple(layers), self.length)


class Block(nn.Module):
    """Add to the stream: x + mixer(norm1(x)); then x + mlp(norm2(x)), where there is an MLP."""
    def __init__(self, mixer: nn.Module, norm1: nn.Module, mlp=None, norm2=None):
        super().__init__()
        self.norm1, self.mixer, self.norm2, self.mlp = norm1, mixer, norm2, mlp
        self.recurrent = not isinstance(mixer, GatedAttention)  # Qwen3.5's attention has no state

    def inputs(self, stream: Stream, cache: dict):
        """Return a recurrent mixer's six tensors, the rest that its output needs, its new cache."""
        return self.mixer.inputs(self.norm1(stream.x), cache | {"v_first": stream.v_first})

    def forward(self, stream: Stream, cache: dict, start=0, edits=()) -> tuple[Stream, dict]:
        """Run tokens from position start on: -> the stream after the block, and its new cache."""
        if self.recurrent:
            s, rest, new = self.inputs(stream, cache)
            with torch.autocast(stream.x.device.type, enabled=False):  # the recurrence stays fp32
                o, state = recurrence_chunked(s, cache.get("state"))  # `recurrence`, but faster
                if edits:
                    o, state = apply_edits(o, state, s, start, edits)
            new["state"] = state
            y = self.mixer.output(o, rest)
        else:
            y, new = self.mixer(self.norm1(stream.x), cache)
        stream = Stream(stream.x + y, new.pop("v_first", None))  # RWKV-7 alone has one
        if self.mlp is not None:
            y, more = self.mlp(self.norm2(stream.x), cache)
            stream = stream._replace(x=stream.x + y)
            new = new | more  # RWKV-7's MLP keeps a token too, as "mlp_tail"
        return stream, new


class LanguageModel(nn.Module):
    """Embedding, blocks, norm, output map: the same for all three. Made by `build` or `load`."""
    def __init__(self, architecture: str, vocab: int, width: int, blocks: list[Block],
                 norm: nn.Module, embed_norm: nn.Module | None = None, tied: bool = True):
        super().__init__()
        self.architecture, self.vocab = architecture, vocab
        self.name, self.folder = architecture, None  # `load` sets both
        self.embedding = nn.Embedding(vocab, width)
        self.embed_norm = embed_norm or nn.Identity()
        self.layers, self.norm = nn.ModuleList(blocks), norm
        self.lm_head = None if tied else linear(width, vocab)
        self.recurrent_layers = [i for i, block in enumerate(blocks) if block.recurrent]

    @property
    def device(self) -> torch.device:
        """Return where the weights are."""
        return self.embedding.weight.device

    @property
    def unembedding(self) -> Tensor:
        """Return the output map, [vocab, D]."""
        return (self.embedding if self.lm_head is None else self.lm_head).weight

    def out_map(self, layer: int) -> Tensor:
        """Return a recurrent layer's output map by heads, [D, H, V], at least fp32."""
        mixer = self.layers[layer].mixer
        return at_least_fp32(mixer.out_proj.weight).unflatten(1, (mixer.heads, mixer.V))

    def forward(self, tokens: Tensor, cache: Cache | None = None, edits=()) -> tuple[Tensor, Cache]:
        """Read tokens [B, T] after the cache's: -> logits [B, T, vocab], new cache; inputs stay."""
        stream, cache = self.run(self.embed(tokens), cache, edits)
        return self.unembed(stream), cache

    def embed(self, tokens: Tensor) -> Stream:
        """Look tokens [B, T] up: -> the stream before layer 0."""
        return Stream(self.embed_norm(self.embedding(tokens)))

    def run(self, stream: Stream, cache: Cache | None = None, edits=(), first=0, last=None):
        """Run layers first ≤ i < last: -> the stream after them, and the cache with those renewed.
        Raises InputError if an edit is not in these tokens and layers or not of its head's size."""
        cache = cache or Cache(tuple({} for _ in self.layers), 0)
        start, stop = cache.length, cache.length + stream.x.shape[1]
        layers, which = list(cache.layers), range(len(self.layers))[first:last]
        for e in edits:
            check_edit(self, e, which, range(start, stop), len(stream.x))
        for i in which:
            here = [e for e in edits if e.layer == i]
            stream, layers[i] = self.layers[i](stream, layers[i], start, here)
        return stream, Cache(tuple(layers), stop)

    def unembed(self, stream: Stream) -> Tensor:
        """Turn the stream after the last layer into logits [B, T, vocab]."""
        return F.linear(self.norm(stream.x), self.unembedding)

    def step_inputs(self, stream: Stream, layer: int) -> StepInputs:
        """Return a recurrent layer's six tensors; stream: what enters it, the whole text."""
        return self.layers[layer].inputs(stream, {})[0]

    def generate(self, logits: Tensor, cache: Cache, n: int):
        """Say n tokens, each the most probable, after a prompt's last logits [B, vocab] and cache:
        -> the tokens [B, n] and the logits that they were chosen from, [B, n, vocab]."""
        steps = [logits]
        while len(steps) < n:
            logits, cache = self(steps[-1].argmax(-1, keepdim=True), cache)
            steps.append(logits[:, 0])
        chosen_from = torch.stack(steps, 1)
        return chosen_from.argmax(-1), chosen_from


# ==== The tutorial ends here. Below: layers without a state, chunks, checks, files, tokenizers ====
# ---- 5. The rest of a block: Qwen3.5's gated attention (every 4th layer), and the MLPs ----
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
        """Rotate x [B, heads, T, size] by its positions: channel i turns with i + rotary/2."""
        half = self.rotary // 2  # simplification: positions of text alone, no image's rows
        channel = torch.arange(half, device=x.device, dtype=torch.float32)
        position = torch.arange(start, start + x.shape[2], device=x.device)
        angle = position[:, None] * self.theta ** (-channel / half)  # [T, half]
        cos, sin = angle.cos(), angle.sin()
        a, b, rest = at_least_fp32(x).split([half, half, self.size - 2 * half], -1)
        a, b = a * cos - b * sin, b * cos + a * sin
        return torch.cat([a, b, rest], -1).to(x.dtype)

    def forward(self, h, cache):
        """Attend: h [B, T, D] -> [B, T, D], and the cache with T more keys and values."""
        q, gate = self.q_proj(h).unflatten(-1, (self.heads, 2 * self.size)).chunk(2, -1)
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
        """Map x [B, T, D] -> [B, T, D]; nothing to remember."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x)), {}


class ChannelMix(nn.Module):
    """RWKV-7's MLP: W_v relu(W_k (h + (h_{t-1} − h) x_k))², so it too looks one token back."""
    def __init__(self, width, inner):
        super().__init__()
        self.x_k = nn.Parameter(torch.zeros(width))
        self.key, self.value = linear(width, inner), linear(inner, width)

    def forward(self, x, cache):
        """Map x [B, T, D] -> [B, T, D], and the new tail."""
        shift, tail = token_shift(x, cache.get("mlp_tail"))
        inner = F.relu(self.key(x + shift * self.x_k))
        return self.value(inner.square()), {"mlp_tail": tail}


# ---- 6. The recurrence by chunks: the same results, in a few large products ----
def decayed_scores(x, log_x, ys, log_y, diagonal):
    """Score how much of what y wrote at token j is left when x looks for it at token i, for each y:

        M_ij = Σ_c x_ic exp(log_x_ic − log_y_jc) y_jc        for j ≤ i + diagonal, else 0

    x, y [..., C, K], logs [..., C, 1|K] -> a list of [..., C, C]. Only differences of logs are
    exponentiated (with decays per channel, from the chunk's middle), so that none leaves fp32.
    """
    if log_x.shape[-1] == 1:
        # tril before exp: no overflow above the diagonal; and after: no exp(0) = 1 there
        decay = (log_x - log_y.mT).tril(diagonal).exp().tril(diagonal)
        return [(x @ y.mT) * decay for y in ys]
    middle = log_y[..., log_y.shape[-2] // 2, None, :]
    x, grow = x * (log_x - middle).exp(), (middle - log_y).exp()
    return [(x @ (y * grow).mT).tril(diagonal) for y in ys]


def recurrence_chunked(s: StepInputs, state: Tensor | None = None, chunk: int | None = None):
    """Run `recurrence`, same arguments and results, by matrix products over chunks of C tokens.

    Let S be the state before a chunk, L the log decays summed from the chunk's start, and
    w_t = S_{t-1}ᵀ erase_in_t what the erase of token t finds. Unrolled inside the chunk,

        S_t = e^{L_t} S + Σ_{j≤t} e^{L_t − L_j} (k_j v_jᵀ − erase_out_j w_jᵀ)

    Put that into the definition of w: each depends on those before it, a triangular system

        (I + found_erased) w = found_writes v + e^{L_{t-1}} erase_in S    (unitriangular adds I)

    where `found` are the scores of erase_in against earlier tokens' erase_outs and keys. C is 32
    with one decay per head (below e^−100 it counts as that), 16 with one per channel (where half a
    chunk may pass e^−80, the loop takes over, slower; RWKV-7's steps are at least 0.545).
    """
    check_shapes(s, state)
    (B, T, H, K), V = s.q.shape, s.v.shape[-1]
    per_channel = s.log_decay.shape[-1] > 1
    C = min(T, chunk or (16 if per_channel else 32))
    if T == 1 or (per_channel and s.log_decay.min() * C < -160):
        return recurrence(s, state)
    N = -(-T // C)  # chunks; the last is padded with zeros: no change

    def split(x):  # [B, T, H, ·] -> [N, B·H, C, ·]
        if N * C > T:
            x = F.pad(x, (0, 0, 0, 0, 0, N * C - T))
        x = x.view(B, N, C, H, -1).permute(1, 0, 3, 2, 4)
        return x.reshape(N, B * H, C, -1).contiguous()  # one copy, or each product makes its own

    q, k, v, log_decay = map(split, (s.q, s.k, s.v, s.log_decay.clamp_min(-100)))
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


def states(s: StepInputs, state: Tensor | None = None) -> Tensor:
    """Return the state after every token, [B, T, H, K, V]: T times `recurrence`'s memory."""
    after = []
    for t in range(s.q.shape[1]):
        _, state = recurrence(s.times(t, t + 1), state)
        after.append(state)
    return torch.stack(after, 1)


# ---- 7. Checks: is it the shape that it should be? ----
def check_shapes(s: StepInputs, state: Tensor | None):
    """Raise InputError with the likely mistake if the six tensors do not fit together."""
    q, k, v, decay, *erase, S = [None if x is None else list(x.shape) for x in (*s, state)]
    require(len(q) == len(v) == 4 and min(q + v) > 0, f"q is {q}, v {v}; must be [B,T,H,K] and "
            "[B,T,H,V], none of them 0: is the text empty, or an axis missing?")
    require(k == q and v[:3] == q[:3], f"q is {q}, k {k}, v {v}; must be [B,T,H,K] twice and "
            "[B,T,H,V]: is the head axis before the time axis, are grouped keys not yet repeated?")
    require(decay in (q[:3] + [1], q), f"log_decay is {decay}; must be [B,T,H,1] or [B,T,H,K]: is "
            "the last axis missing?")
    require(erase in ([None, None], [q, q]), f"erase_in, erase_out are {erase}; must both be "
            "[B,T,H,K], or both None")
    must = [q[0], *q[2:], v[3]]
    require(S in (None, must), f"state is {S}; must be [B,H,K,V] = {must}: is it value first?")
    kinds = {x.dtype for x in (*s, state) if x is not None}
    require(kinds in ({torch.float32}, {torch.float64}), f"tensors are {kinds}; must all be "
            "float32, or all float64")


def check_cell(model: LanguageModel, layer: int, head: int):
    """Raise InputError unless the layer is recurrent and has this head."""
    recurrent, here = model.recurrent_layers, f"layer {layer} of {model.name}"
    require(layer in recurrent, f"{here} is full attention, which keeps no state, or is not there; "
            f"recurrent layers: {', '.join(map(str, recurrent))}")
    heads = model.layers[layer].mixer.heads
    require(0 <= head < heads, f"head {head}: {here} has heads 0..{heads - 1}")


def check_edit(model, e: Edit, layers: range, positions: range, B: int):
    """Raise InputError unless the edit is of these layers and positions, and of its head's size."""
    check_cell(model, e.layer, e.head)
    require(e.layer in layers and e.position in positions, f"edit at layer {e.layer}, position "
            f"{e.position}: this call runs the layers in {layers}, the positions in {positions}")
    mixer = model.layers[e.layer].mixer
    for name, x, n in (("key", e.key, mixer.K), ("value", e.value, mixer.V)):
        require(list(x.shape) in ([n], [1, n], [B, n]), f"edit with {name} {list(x.shape)}: must "
                f"be [{n}], or [{B}, {n}], one for each text; is the state [K, V], key first?")


def whole_ratio(a: int, b: int) -> int:
    """Return a / b. Raises InputError unless b divides a."""
    require(a % b == 0, f"{a} heads or channels in {b} groups: they must divide")
    return a // b


# ---- 8. Models from configs: nothing that changes the numbers is read past ----
@contextlib.contextmanager
def as_input_error(path: str, advice="is the download complete?", what="read"):
    """Turn whatever is raised at a file that is not what it should be into one InputError."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # the one place: safetensors and tokenizers raise what they like
        why = f"{type(error).__name__}: {error!s:.80}"
        raise InputError(f"{path}: cannot be {what} ({why}); {advice}") from None


def present(c: dict | None) -> dict:
    """Drop what is null in a config: as good as absent."""
    return {name: x for name, x in (c or {}).items() if x is not None}


def positive(c: dict, name: str, default=None, kind=int, most=500_000):
    """Take a positive number from a config: a size (int) or a real one (float), or InputError."""
    x = c.get(name, default)
    sound = isinstance(x, (int, kind)) and not isinstance(x, bool) and 0 < x <= most
    require(sound, f"config.json: {name} is {x!r:.40}; must be a number ({kind.__name__}) above 0, "
            f"up to {most:,}")
    return kind(x)


real = functools.partial(positive, kind=float, most=10**12)
layers_of = functools.partial(positive, name="num_hidden_layers", most=1000)
RANKS = {"w": "decay", "a": "a", "v": "v", "g": "gate"}  # RWKV-7's low ranks in configs

#: Keys that change the numbers -> the values that are implemented here; no other keys in `rope`.
#: Others change nothing: transformers reads past Codestral's norm_before_gate, mamba_ssm does not.
SILU, EITHER, ANY = ["silu", "swish"], [True, False], None
IMPLEMENTED = {
    "any": dict(quantization_config=[], quantization=[], tie_word_embeddings=EITHER),
    "gdn": dict(hidden_act=SILU, output_gate_type=SILU, attn_output_gate=[True],
                attention_bias=[False], sliding_window=[], use_sliding_window=[False]),
    "rope": dict(rope_type=["default"], type=["default"], factor=[1], rope_theta=ANY,
                 partial_rotary_factor=ANY, mrope_section=ANY, mrope_interleaved=ANY),
    "mamba2": dict(hidden_act=SILU, use_bias=EITHER, use_conv_bias=EITHER),
    "mamba_ssm": dict(layer=["Mamba2"], rmsnorm=[True], rms_norm=[True], norm_before_gate=[False],
                      D_has_hdim=[False], d_ssm=[], d_intermediate=[0], attn_layer_idx=[[]]),
    "rwkv7": dict(hidden_act=["sqrelu", "relu2"], norm_first=[True], norm_bias=[True], attn=[{}]),
}


def check_implemented(c: dict, kind: str):
    """Raise InputError for a key of a config that asks for what is not implemented here."""
    for name, x in c.items():
        values = IMPLEMENTED[kind].get(name, [] if kind == "rope" else ANY)
        require(values is ANY or x in values, f"config.json: {name} is {x!r:.40}; implemented "
                f"here: {values or 'none'}")


def build_qwen(c, D):
    """Make Qwen3.5: Gated DeltaNet, with gated attention in every 4th layer."""
    rope = present(c.get("rope_scaling")) or present(c.get("rope_parameters"))  # as transformers
    check_implemented(rope, "rope")
    c = c | rope
    eps, n = real(c, "rms_norm_eps", 1e-6), layers_of(c)
    every = positive(c, "full_attention_interval", 4)
    heads, key_heads, inner = (positive(c, name) for name in (
        "num_attention_heads", "num_key_value_heads", "intermediate_size"))
    size = positive(c, "head_dim", max(1, D // heads))
    rotary = int(size * real(c, "partial_rotary_factor", 0.25, most=1))
    require(rotary % 2 == 0, f"config.json: partial_rotary_factor rotates {rotary} channels of "
            f"{size}; they must be even")
    theta, conv_width = real(c, "rope_theta"), positive(c, "linear_conv_kernel_dim", 4, most=64)
    sizes = [positive(c, f"linear_{name}") for name in (
        "num_key_heads", "num_value_heads", "key_head_dim", "value_head_dim")]
    kinds = ("linear_attention", "full_attention")
    types = c.get("layer_types") or [kinds[i % every == 0] for i in range(1, n + 1)]
    require(len(types) == n and all(kind in kinds for kind in types),
            f"config.json: layer_types must name {n} layers, each one of {', '.join(kinds)}")
    blocks = []
    for kind in types:
        if kind == "full_attention":
            mixer = GatedAttention(D, heads, key_heads, size, rotary, theta, eps)
        else:
            mixer = GatedDeltaNet(D, *sizes, conv_width, eps)
        norm1, norm2 = RMSNorm(D, eps, 1.0), RMSNorm(D, eps, 1.0)
        blocks.append(Block(mixer, norm1, GatedMLP(D, inner), norm2))
    return blocks, RMSNorm(D, eps, 1.0)


def build_mamba2(c, D):
    """Make Mamba-2: one mixer per block, no MLP."""
    eps, limit = real(c, "layer_norm_epsilon", 1e-5), c.get("time_step_limit", (0, math.inf))
    low, high = (float(x["__float__"] if isinstance(x, dict) else x) for x in limit)
    require(0 <= low <= min(high, 1e6), f"config.json: time_step_limit is {low}, {high}; must be "
            "two steps, from 0 on, in order")
    sizes = [positive(c, name) for name in ("num_heads", "n_groups", "state_size", "head_dim")]
    sizes.append(positive(c, "conv_kernel", 4, most=64))
    biases = c.get("use_bias", False), c.get("use_conv_bias", True)
    blocks = [Block(Mamba2(D, *sizes, eps, (low, high), *biases), RMSNorm(D, eps))
              for _ in range(layers_of(c))]
    return blocks, RMSNorm(D, eps)


def build_rwkv7(c, D):
    """Make RWKV-7: time and channel mixing, LayerNorms with bias, one more after the embedding."""
    K, eps, n = positive(c, "head_dim", 64), real(c, "norm_eps", 1e-5), layers_of(c)
    value = c.get("value_dim", D)
    require(value in (D, [D] * n), f"config.json: value_dim is {value!r:.40}; implemented here: "
            f"{D} in each layer, as wide as the keys")
    ranks = {letter: positive(c, name + "_low_rank_dim") for letter, name in RANKS.items()}
    norm, inner = functools.partial(nn.LayerNorm, D, eps), positive(c, "intermediate_size", 4 * D)
    blocks = []
    for i in range(n):
        mixer = RWKV7(D, whole_ratio(D, K), K, K, ranks, i == 0, K * eps)
        blocks.append(Block(mixer, norm(), ChannelMix(D, inner), norm()))
    return blocks, norm(), norm()


BUILDERS = {"qwen3_5": ("gdn", build_qwen), "qwen3_5_text": ("gdn", build_qwen),
            "mamba2": ("mamba2", build_mamba2), "rwkv7": ("rwkv7", build_rwkv7)}


def build(config: dict) -> LanguageModel:
    """Make an untrained model of the shape that a flat config.json describes, or InputError."""
    with as_input_error("config.json", "is it this model's?"):
        c, kind = present(config), str(config.get("model_type"))
        require(kind in BUILDERS, f"model_type {kind:.40} is not supported; {', '.join(BUILDERS)} "
                "are (not Mamba-1, RWKV-4 to 6, Qwen3-Next or a mixture of experts)")
        architecture, blocks_of = BUILDERS[kind]
        check_implemented(c, "any")
        check_implemented(c, architecture)
        D, vocab = positive(c, "hidden_size"), positive(c, "vocab_size")
        tied = c.get("tie_word_embeddings", False)
        return LanguageModel(architecture, vocab, D, *blocks_of(c, D), tied=tied)


# ---- 9. Checkpoints: every layout of the hub ends here ----
#: Beginnings of names, ours and the checkpoints': the model's, and those inside a block.
HUB_NAMES = {
    "gdn": {"embedding": "model.embed_tokens", "layers": "model.layers", "norm": "model.norm",
            "norm1": "input_layernorm", "norm2": "post_attention_layernorm",
            "mixer.q_": "self_attn.q_", "mixer.k_": "self_attn.k_", "mixer.v_": "self_attn.v_",
            "mixer.o_": "self_attn.o_", "mixer": "linear_attn"},
    "mamba2": {"embedding": "backbone.embeddings", "layers": "backbone.layers", "norm1": "norm",
               "norm": "backbone.norm_f", "mixer.skip": "mixer.D"},
    "rwkv7": {"embedding": "model.embeddings", "layers": "model.layers", "norm": "model.norm",
              "embed_norm": "model.layers.0.pre_norm", "norm1": "attn_norm", "norm2": "ffn_norm",
              "mixer.w_lora": "attn.w_lora.lora", "mixer.a_lora": "attn.a_lora.lora",
              "mixer.v_lora": "attn.v_lora.lora", "mixer.g_lora": "attn.g_lora.lora",
              "mixer.out_proj": "attn.o_proj", "mixer": "attn", "mlp": "ffn"},
}
PICKLE = "a pickle, which can run code when it is opened; take a safetensors conversion"


def hub_name(architecture: str, name: str) -> str:
    """Turn our parameter's name into its name in a checkpoint."""
    table, block = HUB_NAMES[architecture], ""
    if name.startswith("layers."):
        _, i, name = name.split(".", 2)
        block = f"{table['layers']}.{i}."
    for ours in sorted(table, key=len, reverse=True):  # norm1 before norm
        if name.startswith(ours):
            return block + table[ours] + name[len(ours) :]
    return block + name


class Stored(NamedTuple):
    """Say where a tensor lies on the disk."""
    file: str
    name: str
    shape: list[int]
    part: int | None = None  # its row, where RWKV-7's six mixes are packed in one tensor

    def tensor(self, dtype: torch.dtype) -> Tensor:
        """Load the tensor, alone: its file is opened and closed, so nothing is held twice."""
        with as_input_error(self.file), safetensors.safe_open(self.file, "pt") as f:
            x = f.get_tensor(self.name)
            x = (x if self.part is None else x[self.part]).to(dtype, copy=True)
        low, high = map(float, x.aminmax())  # without the copies that isfinite makes
        require(math.isfinite(high - low), f"{self.file}: tensor {self.name} holds NaN or Inf, as "
                f"{dtype}; download the file again")
        return x


def load(name_or_path: str, device="cpu", dtype=torch.float32) -> LanguageModel:
    """Load a model from a folder or a hub id ("Qwen/Qwen3.5-0.8B"): config.json and safetensors.

    Reads Qwen3.5 (also multimodal), Mamba-2 (transformers' or mamba_ssm's names), RWKV-7 (fla's).
    Runs no code from the checkpoint; holds the weights in dtype, and one tensor more. Raises
    InputError for whatever is wrong with name, network, config or tensors.
    """
    folder = find_folder(str(name_or_path))
    config = read_json(os.path.join(folder, "config.json"))
    stored, chosen = find_tensors(folder), {}
    with as_input_error(folder, "are config.json and weights this model's?"), torch.device("meta"):
        model = build(complete_config(config, stored))  # shapes only: no memory yet
    for ours, parameter in model.named_parameters():
        theirs = hub_name(model.architecture, ours)
        require(theirs in stored, f"{folder}: tensor {theirs} is missing: an unfinished download, "
                "an MLX conversion, or other names than transformers', mamba_ssm's or fla's?")
        shape, asked = stored[theirs].shape, list(parameter.shape)
        mix = ".x_" in theirs and math.prod(shape) == math.prod(asked)  # [D] or [1, 1, D]
        require(shape == asked or mix, f"{folder}: tensor {theirs} is {shape}, config.json asks "
                f"for {asked}: not of one model, or an MLX conversion (whose norms differ, too)?")
        chosen[ours] = stored.pop(theirs)
    require(not stored, f"{folder}: unexpected tensor {min(stored, default=''):.80} ({len(stored)} "
            "in all); the known layouts have no such name")
    weights = {name: chosen[name].tensor(dtype).view(parameter.shape)
               for name, parameter in model.named_parameters()}
    model.load_state_dict(weights, assign=True)
    model.name, model.folder = str(name_or_path), folder
    return model.requires_grad_(False).eval().to(device)


def find_folder(name_or_path: str) -> str:
    """Return the folder itself, or a hub id's files, downloaded once into the hub's own cache."""
    if os.path.isdir(name_or_path):
        return name_or_path
    require(re.fullmatch(r"[\w.-]+/[\w.-]+", name_or_path), f"{name_or_path!r:.100} is neither a "
            "folder nor a hub id (owner/name), nor one of gdn, mamba2, rwkv7")
    import huggingface_hub
    wanted = ["config.json", "model*.safetensors*", "tokenizer.json", "rwkv_vocab*.txt", "*-L*H*"]
    advice = "check the name, your access and the network, or give a folder"
    with as_input_error(f"{name_or_path:.60}", advice, "fetched"):
        return huggingface_hub.snapshot_download(name_or_path, allow_patterns=wanted)


def check_file(path: str, most: float = math.inf):
    """Raise InputError unless path is a regular file of such a size, and maybe what it says."""
    require(os.path.isfile(path), f"{path}: is missing, or no file; is the download complete?")
    with as_input_error(path), open(path, "rb") as f:
        start, size = f.read(9), os.path.getsize(path)
    require(size <= most, f"{path}: has {size:,} bytes, allowed are {most:,}")
    require(start != b"version h", f"{path}: is a git-LFS pointer; fetch the file by git lfs pull")


def read_json(path: str) -> dict:
    """Read a JSON object from a file. Raises InputError."""
    check_file(path, most=10**8)
    with as_input_error(path), open(path, encoding="utf-8") as f:
        content = json.load(f)
    require(isinstance(content, dict), f"{path}: holds no JSON object; download it again")
    return content


def find_files(folder: str) -> list[str]:
    """Find a folder's safetensors files: model.safetensors, else the shards of its index."""
    index = os.path.join(folder, "model.safetensors.index.json")
    if os.path.exists(os.path.join(folder, "model.safetensors")):
        return ["model.safetensors"]  # an index beside it is an older one
    if os.path.exists(index):
        with as_input_error(index):
            names = set(read_json(index)["weight_map"].values())
            return sorted(os.path.basename(name) for name in names)  # nothing outside the folder
    pickles = [x for x in sorted(os.listdir(folder)) if re.search(r"\.(bin|pth?|ckpt)$", x)]
    why = f"{pickles[0]} is {PICKLE}" if pickles else "no model.safetensors, no index"
    raise InputError(f"{folder}: {why}, e.g. AntonV/mamba2-370m-hf or fla-hub/rwkv7-1.5B-world")


def find_tensors(folder: str) -> dict[str, Stored]:
    """Find every tensor of a folder by a uniform name; only the files' headers are read."""
    found = {}
    for file in find_files(folder):
        path = os.path.join(folder, file)
        check_file(path)
        with as_input_error(path), safetensors.safe_open(path, "pt") as f:
            for name in f.keys():
                uniform = name.replace("model.language_model.", "model.")
                uniform = uniform.replace("backbone.embedding.", "backbone.embeddings.")
                if uniform.startswith(("model.visual.", "mtp.")):  # Qwen3.5's eyes, its drafts
                    continue
                header = f.get_slice(name)
                shape, dtype = list(header.get_shape()), header.get_dtype()
                require(dtype in ("F16", "BF16", "F32", "F64"), f"{path}: tensor {name:.80} holds "
                        f"{dtype}; allowed are floating-point weights, not quantised ones")
                if uniform.endswith(".attn.x_x"):  # RWKV-7's mixes, [6, ..., D]
                    for i, c in enumerate("rwkvag"):
                        found[uniform[:-1] + c] = Stored(path, name, shape[1:], i)
                else:
                    found[uniform] = Stored(path, name, shape)
    return found


def complete_config(config: dict, stored: dict) -> dict:
    """Make a config flat, and take from the tensors what it leaves to them or says wrongly."""
    config = present(config)
    c = config | present(config.get("text_config"))
    if "ssm_cfg" in c:
        c = from_mamba_ssm(c, present(c["ssm_cfg"]), stored)
    if c.get("model_type") == "rwkv7":
        for letter, name in RANKS.items():
            layer = 1 if letter == "v" else 0  # layer 0 has no v_lora
            theirs = f"model.layers.{layer}.attn.{letter}_lora.lora.0.weight"
            c[name + "_low_rank_dim"] = stored[theirs].shape[0] if layer < layers_of(c) else 1
        c["intermediate_size"] = stored["model.layers.0.ffn.key.weight"].shape[0]
        c.setdefault("head_dim", stored["model.layers.0.attn.r_k"].shape[-1])
    own = "lm_head.weight" in stored  # counts more than what is said, as in transformers
    said = {x.get("tie_word_embeddings", c.get("tie_word_embeddings", False)) for x in (config, c)}
    require(said in ({True}, {False}) or own, f"config.json: tie_word_embeddings is {said}, and "
            "lm_head.weight is not stored; must be true or false")
    return c | dict(tie_word_embeddings=said != {False} and not own)


def from_mamba_ssm(c, ssm, stored):
    """Bring mamba_ssm's own config.json under transformers' names, with sizes from the tensors."""
    check_implemented(dict(layer="Mamba1") | c | ssm, "mamba_ssm")
    layer, D, groups = "backbone.layers.0.mixer.", c["d_model"], positive(ssm, "ngroups", 1)
    (heads,), conv = stored[layer + "dt_bias"].shape, stored[layer + "conv1d.weight"].shape
    inner = stored[layer + "out_proj.weight"].shape[1]
    V, K = whole_ratio(inner, heads), whole_ratio(conv[0] - inner, 2 * groups)
    require(ssm.get("d_state", K) == K, f"config.json: d_state is {ssm.get('d_state')!r:.40}, by "
            f"the tensors and ngroups it is {K}")
    return c | dict(
        model_type="mamba2", hidden_size=D, num_hidden_layers=c["n_layer"], num_heads=heads,
        n_groups=groups, state_size=K, head_dim=V, conv_kernel=conv[-1],
        vocab_size=stored["backbone.embeddings.weight"].shape[0], use_bias=ssm.get("bias"),
        use_conv_bias=ssm.get("conv_bias"), time_step_limit=ssm.get("dt_limit"),
        tie_word_embeddings=c.get("tie_embeddings", True))


def check_writable(path: str) -> tuple[str, int]:
    """Raise InputError unless a file can be written here: to be asked before a long work, too.
    Returns where the path leads, over links, and the permissions that the umask gives there."""
    with as_input_error(path, "give another place", "written"):
        target = os.path.realpath(path)
        new = os.path.basename(path) and not os.path.lexists(target)
        require(new or os.path.isfile(target), f"{path}: is a folder, a device or a pipe, no "
                "regular file; give another place")
        with open(f"{target}.{os.getpid()}.part", "wb") as f:
            os.remove(f.name)
            return target, os.fstat(f.fileno()).st_mode


@contextlib.contextmanager
def whole_file(path: str):
    """Give a temporary path to write to, then rename it: the file is there whole or not at all."""
    target, mode = check_writable(path)
    temporary = f"{target}.{os.getpid()}.part"
    try:
        with as_input_error(path, "give another place", "written"):
            yield temporary
            os.chmod(temporary, mode)  # safetensors alone would leave 0600
            os.replace(temporary, target)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.remove(temporary)


def save(model: LanguageModel, config: dict, folder: str, dtype=torch.float32):
    """Write config.json and model.safetensors in the hub's layout, for `load` and the hub's own.
    The weights come last: a folder left half-way holds no model (write its tokenizer before)."""
    with as_input_error(folder, "give another place", "made a folder"):
        os.makedirs(folder, exist_ok=True)
    weights = {hub_name(model.architecture, name): p.detach().cpu().to(dtype).contiguous()
               for name, p in model.named_parameters()}
    for name, x in weights.items():
        require(bool(x.isfinite().all()), f"tensor {name} holds NaN or Inf, as {dtype}: not saved")
    config = {**config, "dtype": str(dtype).removeprefix("torch.")}
    with whole_file(os.path.join(folder, "model.safetensors")) as temporary:
        safetensors.torch.save_file(weights, temporary, metadata={"format": "pt"})
        with whole_file(os.path.join(folder, "config.json")) as beside:
            with open(beside, "w", encoding="utf-8") as f:
                json.dump(config, f, indent=1)


# ---- 10. Text in and out, through the checkpoint's own tokenizer ----
class Tokenizer(NamedTuple):
    """Hold two functions, and how far the ids go."""
    encode: Callable[[str], list[int]]  # text -> ids, no special tokens added
    decode: Callable[[list[int]], str]  # ids -> text, special tokens shown
    last_id: int = 0  # the largest


def load_tokenizer(model: LanguageModel) -> Tokenizer:
    """Load the tokenizer beside the model's weights. Raises InputError if none fits."""
    require(model.folder is not None, "this model was not loaded from a folder: no tokenizer")
    with as_input_error(model.folder):
        pattern = r"tokenizer\.json|rwkv_vocab.*\.txt"
        names = [name for name in os.listdir(model.folder) if re.fullmatch(pattern, name)]
    require(names, f"{model.folder}: neither tokenizer.json nor rwkv_vocab_v20230424.txt is there")
    path = os.path.join(model.folder, max(names))  # tokenizer.json, if both are there
    check_file(path, most=10**8)
    with as_input_error(path, "download it again"):
        make = hub_tokenizer if path.endswith(".json") else world_tokenizer
        tokenizer = make(path)
        tokenizer.encode("a")[0]  # an empty vocabulary gives no token
    require(tokenizer.last_id < model.vocab, f"{path}: has ids up to {tokenizer.last_id}, the "
            f"embedding {model.vocab} rows; is it this model's tokenizer?")
    return tokenizer


def hub_tokenizer(path: str) -> Tokenizer:
    """Load a tokenizer.json, through the `tokenizers` library."""
    import tokenizers
    read_json(path)  # says what is wrong with a damaged file
    inner = tokenizers.Tokenizer.from_file(path)
    inner.no_truncation()
    inner.no_padding()  # training leaves both in the file

    def encode(text):
        with as_input_error(path, "is the text Unicode, the file whole?", "used"):
            return inner.encode(text, add_special_tokens=False).ids

    decode = functools.partial(inner.decode, skip_special_tokens=False)
    return Tokenizer(encode, decode, max(inner.get_vocab().values()))


def world_tokenizer(path: str) -> Tokenizer:
    """Load RWKV World's vocabulary: at each point of a text, the longest entry that matches.
    Each line of its file: id, Python literal, number of bytes."""
    bytes_of = {}
    with open(path, encoding="utf-8") as f:
        for line in f:
            index, rest = line.split(" ", 1)
            entry = ast.literal_eval(rest.rsplit(" ", 1)[0])
            bytes_of[int(index)] = entry.encode() if isinstance(entry, str) else b"" + entry
    id_of = {entry: index for index, entry in bytes_of.items()}
    longest = max(map(len, id_of))

    def encode(text):
        with as_input_error(path, "is the text Unicode?", "used"):
            data, ids, at = text.encode(), [], 0
        while at < len(data):
            n = min(longest, len(data) - at)
            while n > 0 and data[at : at + n] not in id_of:
                n -= 1
            require(n > 0, f"{path}: has no entry for the byte {data[at]}; download it again")
            ids.append(id_of[data[at : at + n]])
            at += n
        return ids

    def decode(ids):
        return b"".join(bytes_of.get(i, b"") for i in ids).decode(errors="replace")

    return Tokenizer(encode, decode, max(bytes_of))
