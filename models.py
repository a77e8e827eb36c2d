"""Gated DeltaNet (in Qwen3.5), Mamba-2 and RWKV-7 as one recurrence, in plain PyTorch.

    logits, cache = load("checkpoints/gdn")(tokens)          # tokens [B, T] -> logits [B, T, vocab]

Each head of these models keeps a matrix, its *state* S, and updates it once per token:

    S_t = A_t S_{t-1} + k_t v_tᵀ        A_t = diag(decay_t) − erase_out_t erase_in_tᵀ        o_t = S_tᵀ q_t

Read it as a memory. The token *writes* the value v under the key k, and *reads* what is stored under
the query q. To keep the memory from filling up, something has to go: the *decay* forgets everything a
little, and the *erase* looks up what is stored under one key (erase_inᵀ S) and takes it, or part of
it, out along another (erase_out), so that the key can be written anew.

The state is key first everywhere in this project: S is [K, V] (K = key size, V = value size), written
by the rank-1 matrix k vᵀ, read by Sᵀq. Only `load` knows other layouts. The three models differ in how
they make the six tensors from their input:

    role       here        shape            Gated DeltaNet     Mamba-2           RWKV-7
    query      q           [B, T, H, K]     q/√K, unit norm    C                 r
    key        k           [B, T, H, K]     k, unit norm       B                 k (1 + (a−1) k_a)
    value      v           [B, T, H, V]     β v                Δ x               v
    decay      log_decay   [B, T, H, 1|K]   log α, per head    Δ A, per head     log w, per key channel
    erase      erase_in    [B, T, H, K]     k                  -                 κ̂  (unit norm)
               erase_out   [B, T, H, K]     α β k              -                 a κ̂

    α and β (0 to 1) are how much Gated DeltaNet keeps and how much it overwrites; Δ > 0 is Mamba-2's
    step size and A < 0 its decay rate; a (0 to 1) is RWKV-7's in-context learning rate, k_a a learned
    vector, κ̂ the direction that it erases along. B batch, T time, H heads, D width of the residual
    stream. Layers and heads count from 0. `decay` and `log_decay` are two names for two things. The
    recurrence runs in fp32 whatever the dtype of the weights.

References: Gated DeltaNet arXiv 2412.06464; Mamba-2 arXiv 2405.21060; RWKV-7 arXiv 2503.14456. The
tests hold each model against the official implementations (transformers; rwkv) to 2e-4 in the logits.

Order of this file: the recurrence - an edit of the state - the three adapters - attention and MLPs -
the model - loading.
"""
from __future__ import annotations

import ast
import json
import math
import os
import re
from typing import Callable, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor


class InputError(ValueError):
    """Something the user can mend: one line that says what was got, what is allowed, what to do."""


def at_least_fp32(x: Tensor) -> Tensor:
    """Half precision is widened, fp32 and fp64 stay."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


# --------------------------------------------------------------------------------------------------
# 1. The recurrence
# --------------------------------------------------------------------------------------------------
class StepInputs(NamedTuple):
    """The six tensors that drive one recurrent layer (the table above). No erase: both are None."""
    q: Tensor                         # [B, T, H, K]
    k: Tensor                         # [B, T, H, K]
    v: Tensor                         # [B, T, H, V]
    log_decay: Tensor                 # [B, T, H, 1] one per head, or [B, T, H, K] one per key channel
    erase_in: Tensor | None = None    # [B, T, H, K] the direction whose content is looked up, and
    erase_out: Tensor | None = None   # [B, T, H, K] the direction that it is subtracted from

    def times(self, start: int, stop: int | None = None) -> StepInputs:
        """The tokens start ≤ t < stop."""
        return StepInputs(*(None if x is None else x[:, start:stop] for x in self))

    def heads(self, which) -> StepInputs:
        """Some heads: a list of numbers or an index tensor, repeats allowed; the axis stays."""
        return StepInputs(*(None if x is None else x[:, :, which] for x in self))

    def rows(self, index: Tensor) -> StepInputs:
        """Some batch rows, repeats allowed."""
        return StepInputs(*(None if x is None else x[index] for x in self))


def check_shapes(s: StepInputs, state: Tensor | None):
    """Raise ValueError with the likely mistake if the six tensors do not fit together."""
    B, T, H, K = s.q.shape
    V = s.v.shape[-1]
    if s.k.shape != s.q.shape or s.v.shape[:3] != (B, T, H):
        raise ValueError(
            f"q {tuple(s.q.shape)}, k {tuple(s.k.shape)} and v {tuple(s.v.shape)} must be [B,T,H,K], "
            "[B,T,H,K] and [B,T,H,V]: is the head axis before the time axis, or are grouped keys not "
            "yet repeated?")
    if s.log_decay.shape not in ((B, T, H, 1), (B, T, H, K)):
        raise ValueError(f"log_decay is {tuple(s.log_decay.shape)}, allowed are [B,T,H,1] and "
                         "[B,T,H,K]: is the last axis missing?")
    if state is not None and state.shape != (B, H, K, V):
        raise ValueError(f"state is {tuple(state.shape)}, must be [B,H,K,V] = {(B, H, K, V)}: is it "
                         "value first?")


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
    state [B, H, K, V]. Two tokens of one head with K = 2 and V = 1, which halves its state, and then
    takes out what it finds under its new key:

    >>> tokens = lambda *rows: torch.tensor(rows)[None, :, None]             # [T, ·] -> [1, T, 1, ·]
    >>> s = StepInputs(q=tokens([1., 0.], [1., 1.]), k=tokens([1., 0.], [0., 1.]), v=tokens([6.], [5.]),
    ...                log_decay=tokens([0.], [math.log(0.5)]),
    ...                erase_in=tokens([1., 0.], [1., 0.]), erase_out=tokens([0.5, 0.], [0.25, 0.]))
    >>> o, S = recurrence(s)
    >>> S[0, 0].tolist()                      # 0.5 · 6 − 0.25 · 6 = 1.5 is left under the first key
    [[1.5], [5.0]]
    >>> o[0, :, 0].tolist()                   # the first token reads 6, the second 1.5 + 5
    [[6.0], [6.5]]
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
    """The state after every token, S_1 .. S_T: [B, T, H, K, V]. (T times the memory of `recurrence`,
    whose steps these are.)"""
    all_states = []
    for t in range(s.q.shape[1]):
        _, state = recurrence(s.times(t, t + 1), state)
        all_states.append(state)
    return torch.stack(all_states, 1)


def propagate(key: Tensor, s: StepInputs) -> tuple[Tensor, Tensor]:
    """What an edit of one head's state does to its later reads, exactly, for K numbers a step.

    Add u_t yᵀ to the state right after the write of token t. The recurrence is linear in the state, so
    the change stays rank 1 with the same y, and only u moves:

        u_t = key        u_s = A_s u_{s-1}        δo_s = (u_s · q_s) y

    That is the recurrence itself with a value size of 1, driven by the single write (key, 1) at its
    first step. (The first step's own transition does no harm: it meets an empty state.) Replacement,
    the logit formula, steering and erasing all stand on this function.

    key [B, H, K], one edit per head; s: the six tensors of those heads, from the edited token on.
    Returns gain [B, T, H], the u_s · q_s, and the last u [B, H, K]. In the example of `recurrence`, an
    edit under the key (1, 0) is read whole at once, and by a quarter (0.5 − 0.25) a token later:

    >>> tokens = lambda *rows: torch.tensor(rows)[None, :, None]
    >>> s = StepInputs(q=tokens([1., 0.], [1., 1.]), k=tokens([1., 0.], [0., 1.]), v=tokens([6.], [5.]),
    ...                log_decay=tokens([0.], [math.log(0.5)]),
    ...                erase_in=tokens([1., 0.], [1., 0.]), erase_out=tokens([0.5, 0.], [0.25, 0.]))
    >>> gain, u = propagate(torch.tensor([[[1., 0.]]]), s)
    >>> gain[0, :, 0].tolist(), u[0, 0].tolist()
    ([1.0, 0.25], [0.25, 0.0])
    """
    later = s.q.shape[1] - 1
    keys = F.pad(key[:, None], (0, 0, 0, 0, 0, later))                      # [B, T, H, K], 0 after t
    ones = F.pad(torch.ones_like(key[:, None, :, :1]), (0, 0, 0, 0, 0, later))        # [B, T, H, 1]
    gain, u = recurrence(s._replace(k=keys, v=ones))
    return gain[..., 0], u[..., 0]


def decayed_scores(x: Tensor, log_x: Tensor, ys: list[Tensor], log_y: Tensor, mask: Tensor) -> list[Tensor]:
    """For each y: M_ij = Σ_c x_ic exp(log_x_ic − log_y_jc) y_jc where mask_ij, else 0: how much of what y
    put down at token j is left when x looks for it at token i.

    x, y [..., C, K], logs [..., C, 1|K], mask [C, C] -> [..., C, C]. Only differences of logs are
    exponentiated. One decay per head: it leaves the sum, exact for any decay. One per channel: both
    sides are measured from the middle of the chunk (C ≤ 16 and a decay ≥ 0.545 stay inside fp32).
    """
    if log_x.shape[-1] == 1:
        decay = (log_x - log_y.mT).masked_fill(~mask, -math.inf).exp()
        return [(x @ y.mT) * decay for y in ys]
    middle = log_y[..., log_y.shape[-2] // 2, None, :]
    x, grow = x * (log_x - middle).exp(), (middle - log_y).exp()
    return [(x @ (y * grow).mT).masked_fill(~mask, 0) for y in ys]


def recurrence_chunked(s: StepInputs, state: Tensor | None = None,
                       chunk: int | None = None) -> tuple[Tensor, Tensor]:
    """The same result as `recurrence`, by matrix products over chunks of C tokens.

    Let S be the state before the chunk, L the log decays summed from the chunk's start, and
    w_t = S_{t-1}ᵀ erase_in_t what the erase of token t looks up. Unrolled inside the chunk,

        S_t = e^{L_t} S + Σ_{j≤t} e^{L_t − L_j} (k_j v_jᵀ − erase_out_j w_jᵀ)

    Put that into the definition of w: each w depends on the w before it, a triangular system

        (I + M) w = found v + e^{L_{t-1}} erase_in S

    with M what erase_in finds of earlier erase_outs, `found` what it finds of earlier writes. All else
    is a product. chunk: tokens per chunk, by default 32 with one decay per head, 16 with one per
    channel. Arguments and results as for `recurrence`.
    """
    if s.q.shape[1] == 1:
        return recurrence(s, state)                                    # one token is the definition
    check_shapes(s, state)
    B, T, H, K = s.q.shape
    V = s.v.shape[-1]
    C = min(T, chunk or (32 if s.log_decay.shape[-1] == 1 else 16))
    N = -(-T // C)                       # chunks; the last is padded with zeros, which change nothing

    def split(x: Tensor) -> Tensor:                                    # -> [N, B, H, C, ·]
        x = F.pad(x, (0, 0, 0, 0, 0, N * C - T))
        return x.view(B, N, C, H, -1).permute(1, 0, 3, 2, 4).contiguous()

    q, k, v, log_decay = split(s.q), split(s.k), split(s.v), split(s.log_decay)
    L = log_decay.cumsum(-2)                           # [N, B, H, C, 1|K] up to and with each token
    end = L[..., -1:, :]                               # [N, B, H, 1, 1|K] over the whole chunk
    upto = torch.ones(C, C, dtype=torch.bool, device=q.device).tril()
    q_start = q * L.exp()                              # reads, of the chunk's first state
    k_end = k * (end - L).exp()                        # writes, as the chunk's last state has them
    if s.erase_in is None:
        seen, = decayed_scores(q, L, [k], L, upto)     # [N, B, H, C, C] of write j by read i
    else:
        erase_in, erase_out = split(s.erase_in), split(s.erase_out)
        seen, seen_erased = decayed_scores(q, L, [k, erase_out], L, upto)
        before = L - log_decay
        found, M = decayed_scores(erase_in, before, [k, erase_out], L, upto.tril(-1))
        found = found @ v                                                      # [N, B, H, C, V]
        in_start, out_end = erase_in * before.exp(), erase_out * (end - L).exp()
    o = seen @ v                                       # [N, B, H, C, V] what the chunk's writes give
    S = v.new_zeros(B, H, K, V) if state is None else state
    outputs = []
    for n in range(N):                                 # only this is sequential
        o_n = o[n] + q_start[n] @ S
        S_n = end[n].mT.exp() * S + k_end[n].mT @ v[n]
        if s.erase_in is not None:
            w = torch.linalg.solve_triangular(M[n], found[n] + in_start[n] @ S, upper=False,
                                              unitriangular=True)              # [B, H, C, V]
            o_n = o_n - seen_erased[n] @ w
            S_n = S_n - out_end[n].mT @ w
        outputs.append(o_n)
        S = S_n
    o = torch.stack(outputs).permute(1, 0, 3, 2, 4).reshape(B, N * C, H, V)
    return o[:, :T], S


# --------------------------------------------------------------------------------------------------
# 2. An edit of the state
# --------------------------------------------------------------------------------------------------
class Edit(NamedTuple):
    """Add key valueᵀ to a head's state right after the write of one token. To take the native write
    out: Edit(..., -k, v)."""
    layer: int
    head: int
    position: int      # from the first token ever fed (so with a cache: from the cache's start)
    key: Tensor        # [K] or [B, K]
    value: Tensor      # [V] or [B, V]


def apply_edits(o: Tensor, state: Tensor, s: StepInputs, start: int, edits: list[Edit]):
    """Add the edits of one layer to its reads o [B, T, H, V] and to its last state [B, H, K, V].

    start: the position of o's first token. All E edits of one position are followed at once. The sum of
    all changes comes first, so that an edit and its opposite cancel to the bit.
    """
    B = len(o)
    delta_o, delta_state = torch.zeros_like(o), torch.zeros_like(state)
    for position in sorted({e.position for e in edits}):
        here, t = [e for e in edits if e.position == position], position - start
        heads = torch.tensor([e.head for e in here], device=o.device)
        key = torch.stack([e.key.expand(B, -1) for e in here], 1).to(o.dtype)             # [B, E, K]
        value = torch.stack([e.value.expand(B, -1) for e in here], 1).to(o.dtype)         # [B, E, V]
        gain, u = propagate(key, s.times(t).heads(heads))                  # [B, T − t, E], [B, E, K]
        moved = gain.unsqueeze(-1) * value.unsqueeze(1)                         # [B, T − t, E, V]
        moved = F.pad(moved, (0, 0, 0, 0, t, 0))                           # nothing before the edit
        delta_o = delta_o.index_add(2, heads, moved)
        delta_state = delta_state.index_add(1, heads, outer(u, value))
    return o + delta_o, state + delta_state


# --------------------------------------------------------------------------------------------------
# 3. Three adapters: from a layer's input to the six tensors, and from the reads o to its output
#
#    inputs(h, cache, v_first) -> StepInputs, rest, cache      h [B, T, D]; rest: what `output` needs
#    gate_and_scale(o, s, rest) -> gate [B, T, H, V], scale [B, T, H, 1]
#    output(o, s, rest) -> [B, T, D] = W_out(gate · scale · o + ...)            o [B, T, H, V]
#
#    Each normalises what it read: `scale` is that norm's 1/rms, the one thing here that is not linear
#    in o. A cache is a dict; before the first token it is empty, and its tensors count as zeros.
# --------------------------------------------------------------------------------------------------
def causal_conv(x: Tensor, tail: Tensor | None, conv: nn.Conv1d) -> tuple[Tensor, Tensor]:
    """silu of a causal depthwise convolution of width W: y_t = Σ_i weight_i x_{t−W+1+i} (+ bias).

    x [B, T, C]; tail [B, W−1, C], the inputs just before x. The last tap meets the current token.
    Returns y and the new tail.
    """
    T, W = x.shape[1], conv.weight.shape[-1]
    if tail is None:
        tail = x.new_zeros(len(x), W - 1, x.shape[2])
    padded = torch.cat([tail, x], 1)
    y = padded[:, :T] * conv.weight[:, 0, 0]
    for i in range(1, W):
        y = torch.addcmul(y, padded[:, i:i + T], conv.weight[:, 0, i])
    if conv.bias is not None:
        y = y + conv.bias
    return F.silu(y), padded[:, T:]


def depthwise(channels: int, width: int, bias: bool) -> nn.Conv1d:
    """The holder of a depthwise convolution's weights; `causal_conv` does the work."""
    return nn.Conv1d(channels, channels, width, groups=channels, bias=bias)


class RMSNorm(nn.Module):
    """x / √(mean x² + eps) · (offset + weight). Qwen3.5 stores weights around 0 (offset 1), the others
    around 1."""

    def __init__(self, size: int, eps: float, offset: float = 0.0):
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
    """Qwen3.5's linear-attention layer (arXiv 2412.06464, eq. 10):

        S_t = α_t (I − β_t k_t k_tᵀ) S_{t-1} + β_t k_t v_tᵀ

    Of what is stored under k a part β is taken out, and as much of v put there instead (the delta
    rule). Multiplied out, α (I − β k kᵀ) S = α S − (α β k)(kᵀ S): so erase_in is k, erase_out α β k.

    q|k|v = silu(conv(W_qkv h)), each head's q and k to unit length; β = σ(W_b h);
    α = exp(−e^{A_log} softplus(W_a h + dt_bias)). Value head j reads with key head
    ⌊j / (value heads / key heads)⌋. Output: W_out( o/rms(o) · w · silu(z) ), z = W_z h.
    """

    def __init__(self, width: int, key_heads: int, value_heads: int, K: int, V: int,
                 conv_width: int = 4, eps: float = 1e-6):
        super().__init__()
        self.key_heads, self.heads, self.K, self.V = key_heads, value_heads, K, V
        self.channels = 2 * key_heads * K + value_heads * V
        self.in_proj_qkv = nn.Linear(width, self.channels, bias=False)
        self.in_proj_z = nn.Linear(width, value_heads * V, bias=False)
        self.in_proj_b = nn.Linear(width, value_heads, bias=False)
        self.in_proj_a = nn.Linear(width, value_heads, bias=False)
        self.conv1d = depthwise(self.channels, conv_width, bias=False)
        self.A_log = nn.Parameter(torch.zeros(value_heads))
        self.dt_bias = nn.Parameter(torch.ones(value_heads))
        self.norm = RMSNorm(V, eps)
        self.out_proj = nn.Linear(value_heads * V, width, bias=False)

    def unit_heads(self, x: Tensor) -> Tensor:
        """[B, T, key_heads · K] -> unit vectors [B, T, H, K], each key head repeated for its values."""
        x = x.unflatten(-1, (self.key_heads, self.K))
        x = x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)
        return x.repeat_interleave(self.heads // self.key_heads, 2)

    def inputs(self, h: Tensor, cache: dict, v_first: Tensor | None = None):
        """h [B, T, D] -> the six tensors, z, the cache's new conv tail."""
        qkv, tail = causal_conv(self.in_proj_qkv(h), cache.get("tail"), self.conv1d)
        key_size = self.key_heads * self.K
        q, k, v = at_least_fp32(qkv).split([key_size, key_size, self.heads * self.V], -1)
        q, k = self.unit_heads(q) * self.K ** -0.5, self.unit_heads(k)
        v = v.unflatten(-1, (self.heads, self.V))
        beta = at_least_fp32(self.in_proj_b(h)).sigmoid().unsqueeze(-1)              # [B, T, H, 1]
        step = F.softplus(at_least_fp32(self.in_proj_a(h)) + at_least_fp32(self.dt_bias))
        log_alpha = (-at_least_fp32(self.A_log).exp() * step).unsqueeze(-1)          # [B, T, H, 1]
        s = StepInputs(q, k, beta * v, log_alpha, erase_in=k, erase_out=log_alpha.exp() * beta * k)
        return s, self.in_proj_z(h), {"tail": tail}

    def gate_and_scale(self, o: Tensor, s: StepInputs, z: Tensor) -> tuple[Tensor, Tensor]:
        """gate = silu(z) w, scale = 1/rms(o)."""
        gate = F.silu(at_least_fp32(z).view(o.shape)) * at_least_fp32(self.norm.weight)
        return gate, self.norm.scale(o)

    def output(self, o: Tensor, s: StepInputs, z: Tensor) -> Tensor:
        """W_out( gate · scale · o ): norm, then gate."""
        gate, scale = self.gate_and_scale(o, s, z)
        return self.out_proj((gate * scale * o).flatten(-2).to(z.dtype))


class Mamba2(nn.Module):
    """Mamba-2's layer (arXiv 2405.21060): S_t = e^{Δ_t A} S_{t-1} + B_t (Δ_t x_t)ᵀ, read by C_t. Nothing
    is erased.

    z|xBC|dt = W_in h; x|B|C = silu(conv(xBC)); Δ = clamp(softplus(dt + dt_bias), time_step_limit);
    A = −e^{A_log}. Heads of a group share B and C. Output: W_out( u/rms_group(u) · w ) with
    u = (o + D x) · silu(z): gate, then norm.
    """

    def __init__(self, width: int, heads: int, groups: int, K: int, V: int, conv_width: int = 4,
                 eps: float = 1e-5, time_step_limit: tuple[float, float] = (0.0, math.inf),
                 bias: bool = False, conv_bias: bool = True):
        super().__init__()
        self.heads, self.groups, self.K, self.V = heads, groups, K, V
        self.time_step_limit = time_step_limit
        self.channels = heads * V + 2 * groups * K
        self.in_proj = nn.Linear(width, heads * V + self.channels + heads, bias=bias)
        self.conv1d = depthwise(self.channels, conv_width, bias=conv_bias)
        self.dt_bias = nn.Parameter(torch.ones(heads))
        self.A_log = nn.Parameter(torch.zeros(heads))
        self.D = nn.Parameter(torch.ones(heads))
        self.norm = RMSNorm(heads * V, eps)
        self.out_proj = nn.Linear(heads * V, width, bias=bias)

    def per_head(self, x: Tensor) -> Tensor:
        """[B, T, groups · K] -> [B, T, H, K], each group repeated for its heads."""
        return x.unflatten(-1, (self.groups, self.K)).repeat_interleave(self.heads // self.groups, 2)

    def inputs(self, h: Tensor, cache: dict, v_first: Tensor | None = None):
        """h [B, T, D] -> the six tensors (no erase), (x, z), the cache's new conv tail."""
        inner, group = self.heads * self.V, self.groups * self.K
        z, xBC, dt = self.in_proj(h).split([inner, self.channels, self.heads], -1)
        xBC, tail = causal_conv(xBC, cache.get("tail"), self.conv1d)
        x, B, C = at_least_fp32(xBC).split([inner, group, group], -1)
        x = x.unflatten(-1, (self.heads, self.V))
        delta = F.softplus(at_least_fp32(dt) + at_least_fp32(self.dt_bias))
        delta = delta.clamp(*self.time_step_limit).unsqueeze(-1)                     # [B, T, H, 1]
        A = -at_least_fp32(self.A_log).exp().unsqueeze(-1)                                  # [H, 1]
        s = StepInputs(self.per_head(C), self.per_head(B), delta * x, delta * A)
        return s, (x, z), {"tail": tail}

    def gate_and_scale(self, o: Tensor, s: StepInputs, rest: tuple) -> tuple[Tensor, Tensor]:
        """gate = silu(z) w, scale = 1/rms over the head's group of (o + D x) silu(z)."""
        x, z = rest
        silu = F.silu(at_least_fp32(z).view(o.shape))
        gate = silu * at_least_fp32(self.norm.weight).view(self.heads, self.V)
        gated = (o + at_least_fp32(self.D).unsqueeze(-1) * x) * silu
        scale = self.norm.scale(gated.flatten(-2).unflatten(-1, (self.groups, -1)))  # [B, T, groups, 1]
        return gate, scale.repeat_interleave(self.heads // self.groups, 2)

    def output(self, o: Tensor, s: StepInputs, rest: tuple) -> Tensor:
        """W_out( gate · scale · (o + D x) )."""
        x, z = rest
        gate, scale = self.gate_and_scale(o, s, rest)
        y = gate * scale * (o + at_least_fp32(self.D).unsqueeze(-1) * x)
        return self.out_proj(y.flatten(-2).to(z.dtype))


def token_shift(h: Tensor, tail: Tensor | None) -> tuple[Tensor, Tensor]:
    """h_{t-1} − h_t, and h's last token, the next tail. h [B, T, D], tail [B, 1, D]."""
    if tail is None:
        tail = torch.zeros_like(h[:, :1])
    return torch.cat([tail, h[:, :-1]], 1) - h, h[:, -1:]


def low_rank(width: int, rank: int, out: int, f: nn.Module, bias: bool = True) -> nn.Sequential:
    """W2 f(W1 x) + bias with a narrow middle: RWKV-7's "LoRA" maps."""
    return nn.Sequential(nn.Linear(width, rank, bias=False), f, nn.Linear(rank, out, bias=bias))


class RWKV7(nn.Module):
    """RWKV-7's time mixing (arXiv 2503.14456, §4):

        S_t = (diag(w_t) − (a_t κ̂_t) κ̂_tᵀ) S_{t-1} + k_t v_tᵀ, read by r

    m_c = h + (h_{t-1} − h) x_c for c in r, w, k, v, a, g, each through its own map;
    log w = −e^{−1/2} σ(lora(m_w)); a = σ(lora(m_a)); κ̂ = k · k_k to unit length per head (the raw k);
    then k ← k (1 + (a−1) k_a). From layer 1 on v moves towards layer 0's v, "v_first".
    Output: W_out( g · (GroupNorm(o) + (Σ_K r k r_k) v) ).
    """

    def __init__(self, width: int, heads: int, K: int, V: int, ranks: dict[str, int], first: bool,
                 eps: float):
        super().__init__()
        self.heads, self.K, self.V, self.eps = heads, K, V, eps
        for c in "rwkvag":
            self.register_parameter(f"x_{c}", nn.Parameter(torch.zeros(width)))
        self.k_k = nn.Parameter(torch.ones(heads * K))
        self.k_a = nn.Parameter(torch.ones(heads * K))
        self.r_k = nn.Parameter(torch.zeros(heads, K))
        self.r_proj = nn.Linear(width, heads * K, bias=False)
        self.k_proj = nn.Linear(width, heads * K, bias=False)
        self.v_proj = nn.Linear(width, heads * V, bias=False)
        self.out_proj = nn.Linear(heads * V, width, bias=False)
        self.w_lora = low_rank(width, ranks["w"], heads * K, nn.Tanh())
        self.a_lora = low_rank(width, ranks["a"], heads * K, nn.Identity())
        self.g_lora = low_rank(width, ranks["g"], heads * V, nn.Sigmoid(), bias=False)
        self.v_lora = None if first else low_rank(width, ranks["v"], heads * V, nn.Identity())
        self.g_norm = nn.GroupNorm(heads, heads * V, eps=eps)           # holds the norm's weight, bias

    def per_head(self, x: Tensor) -> Tensor:
        """[..., H · size] -> [..., H, size], at least fp32."""
        return at_least_fp32(x).unflatten(-1, (self.heads, -1))

    def inputs(self, h: Tensor, cache: dict, v_first: Tensor | None = None):
        """h [B, T, D], v_first [B, T, H, V] (None in layer 0, which makes it) -> the six tensors, the
        gate g, the new tail."""
        shift, tail = token_shift(h, cache.get("tail"))
        r = self.per_head(self.r_proj(h + shift * self.x_r))                          # [B, T, H, K]
        k = self.per_head(self.k_proj(h + shift * self.x_k))                          # [B, T, H, K]
        m_v = h + shift * self.x_v
        v = self.per_head(self.v_proj(m_v))                                           # [B, T, H, V]
        if self.v_lora is not None:
            v = v + (v_first - v) * self.per_head(self.v_lora(m_v)).sigmoid()
        log_w = -math.exp(-0.5) * self.per_head(self.w_lora(h + shift * self.x_w)).sigmoid()
        a = self.per_head(self.a_lora(h + shift * self.x_a)).sigmoid()
        kappa = F.normalize(k * self.per_head(self.k_k), dim=-1)
        k = k * (1 + (a - 1) * self.per_head(self.k_a))
        s = StepInputs(r, k, v, log_w, erase_in=kappa, erase_out=a * kappa)
        return s, self.g_lora(h + shift * self.x_g), {"tail": tail}

    def gate_and_scale(self, o: Tensor, s: StepInputs, g: Tensor) -> tuple[Tensor, Tensor]:
        """gate = g w, scale = 1/std(o)."""
        variance = o.var(-1, keepdim=True, unbiased=False)
        gate = self.per_head(g) * self.per_head(self.g_norm.weight)
        return gate, torch.rsqrt(variance + self.eps)

    def output(self, o: Tensor, s: StepInputs, g: Tensor) -> Tensor:
        """W_out( gate · scale · (o − mean o) + g · (bias + (Σ_K r k r_k) v) )."""
        gate, scale = self.gate_and_scale(o, s, g)
        bonus = (s.q * s.k * at_least_fp32(self.r_k)).sum(-1, keepdim=True) * s.v
        y = gate * scale * (o - o.mean(-1, keepdim=True))
        y = y + self.per_head(g) * (self.per_head(self.g_norm.bias) + bonus)
        return self.out_proj(y.flatten(-2).to(g.dtype))


# --------------------------------------------------------------------------------------------------
# 4. The rest of a block: Qwen3.5's gated attention (every 4th layer), and the MLPs
# --------------------------------------------------------------------------------------------------
class GatedAttention(nn.Module):
    """Qwen3.5's full attention: grouped keys, RMSNorm on q and k, partial rotary positions, a sigmoid
    gate on the result. Not recurrent: no state to edit, and its cache grows with the text."""

    def __init__(self, width: int, heads: int, key_heads: int, size: int, rotary: int, theta: float,
                 eps: float = 1e-6):
        super().__init__()
        self.heads, self.key_heads, self.size = heads, key_heads, size
        self.rotary, self.theta = rotary, theta
        self.q_proj = nn.Linear(width, 2 * heads * size, bias=False)       # per head: [query | gate]
        self.k_proj = nn.Linear(width, key_heads * size, bias=False)
        self.v_proj = nn.Linear(width, key_heads * size, bias=False)
        self.o_proj = nn.Linear(heads * size, width, bias=False)
        self.q_norm = RMSNorm(size, eps, offset=1.0)
        self.k_norm = RMSNorm(size, eps, offset=1.0)

    def rotate(self, x: Tensor, start: int) -> Tensor:
        """Rotary positions on the first `rotary` channels of x [B, heads, T, size]: channel i turns
        with channel i + rotary/2."""
        T, half = x.shape[2], self.rotary // 2
        channel = torch.arange(half, device=x.device, dtype=torch.float32)
        position = torch.arange(start, start + T, device=x.device)
        angle = position[:, None] * self.theta ** (-channel / half)                      # [T, half]
        a, b, rest = at_least_fp32(x).split([half, half, self.size - self.rotary], -1)
        cos, sin = angle.cos(), angle.sin()
        return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], -1).to(x.dtype)

    def forward(self, h: Tensor, cache: dict) -> tuple[Tensor, dict]:
        """h [B, T, D] -> the layer's output [B, T, D], and the cache with T more keys and values
        [B, key_heads, start + T, size]."""
        T, start = h.shape[1], cache["keys"].shape[2] if cache else 0
        q, gate = self.q_proj(h).unflatten(-1, (self.heads, 2 * self.size)).chunk(2, -1)
        k = self.k_proj(h).unflatten(-1, (self.key_heads, self.size)).transpose(1, 2)
        v = self.v_proj(h).unflatten(-1, (self.key_heads, self.size)).transpose(1, 2)
        q = self.rotate(self.q_norm(q.transpose(1, 2)), start)                  # [B, heads, T, size]
        k = self.rotate(self.k_norm(k), start)
        if cache:
            k, v = torch.cat([cache["keys"], k], 2), torch.cat([cache["values"], v], 2)
        group = self.heads // self.key_heads
        mask = None
        if start > 0:                                            # token t sees the tokens s ≤ start + t
            mask = torch.ones(T, start + T, dtype=torch.bool, device=h.device).tril(start)
        y = F.scaled_dot_product_attention(q, k.repeat_interleave(group, 1), v.repeat_interleave(group, 1),
                                           attn_mask=mask, is_causal=start == 0)
        y = y.transpose(1, 2).flatten(2)                                          # [B, T, heads · size]
        return self.o_proj(y * gate.flatten(2).sigmoid()), {"keys": k, "values": v}


class GatedMLP(nn.Module):
    """Qwen3.5: W_down( silu(W_gate x) · W_up x )."""

    def __init__(self, width: int, inner: int):
        super().__init__()
        self.gate_proj = nn.Linear(width, inner, bias=False)
        self.up_proj = nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor, cache: dict) -> tuple[Tensor, dict]:
        """x [B, T, D] -> [B, T, D]; nothing to remember."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x)), {}


class ChannelMix(nn.Module):
    """RWKV-7's MLP: W_v relu(W_k (h + (h_{t-1} − h) x_k))², so it too looks one token back."""

    def __init__(self, width: int, inner: int):
        super().__init__()
        self.x_k = nn.Parameter(torch.zeros(width))
        self.key = nn.Linear(width, inner, bias=False)
        self.value = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor, cache: dict) -> tuple[Tensor, dict]:
        """x [B, T, D] -> [B, T, D] and the new tail."""
        shift, tail = token_shift(x, cache.get("mlp_tail"))
        return self.value(F.relu(self.key(x + shift * self.x_k)).square()), {"mlp_tail": tail}


# --------------------------------------------------------------------------------------------------
# 5. The model
# --------------------------------------------------------------------------------------------------
class Stream(NamedTuple):
    """What flows from layer to layer."""
    x: Tensor                          # [B, T, D] the residual stream
    v_first: Tensor | None = None      # [B, T, H, V] layer 0's v, in RWKV-7 alone (after its layer 0)

    def times(self, start: int, stop: int | None = None) -> Stream:
        """The tokens start ≤ t < stop."""
        return Stream(*(None if x is None else x[:, start:stop] for x in self))

    def rows(self, index: Tensor) -> Stream:
        """Some batch rows, repeats allowed."""
        return Stream(*(None if x is None else x[index] for x in self))


class Cache(NamedTuple):
    """All that the past leaves behind: a dict of tensors per layer, batch first (empty before the first
    token), and the number of tokens seen."""
    layers: tuple[dict[str, Tensor], ...]
    length: int

    def rows(self, index: Tensor) -> Cache:
        """Some batch rows, repeats allowed."""
        layers = [{name: x[index] for name, x in layer.items()} for layer in self.layers]
        return Cache(tuple(layers), self.length)


class Block(nn.Module):
    """x + mixer(norm1(x)), then x + mlp(norm2(x)) where there is an MLP."""

    def __init__(self, mixer: nn.Module, norm1: nn.Module, mlp: nn.Module | None = None,
                 norm2: nn.Module | None = None):
        super().__init__()
        self.norm1, self.mixer, self.norm2, self.mlp = norm1, mixer, norm2, mlp

    @property
    def recurrent(self) -> bool:
        """Whether the mixer has a state."""
        return not isinstance(self.mixer, GatedAttention)

    def mix(self, stream: Stream, cache: dict, start: int = 0, edits=()) -> tuple[Stream, dict]:
        """The first half, over T tokens from position start on; and the mixer's new cache. (Two halves,
        because the logit formula has to stand between them.)"""
        x, v_first = stream
        if not self.recurrent:
            y, new = self.mixer(self.norm1(x), cache)
            return Stream(x + y, v_first), new
        s, rest, new = self.mixer.inputs(self.norm1(x), cache, v_first)
        with torch.autocast(x.device.type, enabled=False):             # fp32, also where training is not
            o, state = recurrence_chunked(s, cache.get("state"))
        if edits:
            o, state = apply_edits(o, state, s, start, edits)
        if isinstance(self.mixer, RWKV7) and v_first is None:
            v_first = s.v
        return Stream(x + self.mixer.output(o, s, rest), v_first), new | {"state": state}

    def feed(self, stream: Stream, cache: dict) -> tuple[Stream, dict]:
        """The second half, and the MLP's new cache."""
        if self.mlp is None:
            return stream, {}
        y, new = self.mlp(self.norm2(stream.x), cache)
        return stream._replace(x=stream.x + y), new

    def forward(self, stream: Stream, cache: dict, start: int = 0, edits=()) -> tuple[Stream, dict]:
        """Both halves: the stream after this layer, and its new cache."""
        stream, new = self.mix(stream, cache, start, edits)
        stream, more = self.feed(stream, cache)
        return stream, new | more


class LanguageModel(nn.Module):
    """Embedding, blocks, norm, head: the same for the three architectures. Made by `build` or `load`."""

    def __init__(self, architecture: str, vocab: int, width: int, blocks: list[Block], norm: nn.Module,
                 embed_norm: nn.Module | None = None, tied: bool = True):
        super().__init__()
        self.architecture, self.vocab = architecture, vocab
        self.name, self.folder = architecture, None              # `load` knows better
        self.embedding = nn.Embedding(vocab, width)
        self.embed_norm = embed_norm
        self.layers = nn.ModuleList(blocks)
        self.norm = norm
        self.head = None if tied else nn.Linear(width, vocab, bias=False)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.embedding.weight.device

    @property
    def recurrent_layers(self) -> list[int]:
        """The layers that keep a state, counted from 0."""
        return [i for i, block in enumerate(self.layers) if block.recurrent]

    @property
    def unembedding(self) -> Tensor:
        """The output map, [vocab, D]."""
        return (self.embedding if self.head is None else self.head).weight

    def out_map(self, layer: int) -> Tensor:
        """A recurrent layer's output map by heads, [D, H, V], at least fp32."""
        mixer = self.layers[layer].mixer
        return at_least_fp32(mixer.out_proj.weight).unflatten(1, (mixer.heads, mixer.V))

    def forward(self, tokens: Tensor, cache: Cache | None = None, edits=()) -> tuple[Tensor, Cache]:
        """tokens [B, T] (after those in cache) -> logits [B, T, vocab] and the new cache. Nothing passed
        in is changed."""
        stream, cache = self.run(self.embed(tokens), cache, edits)
        return self.unembed(stream), cache

    def embed(self, tokens: Tensor) -> Stream:
        """tokens [B, T] -> the stream before layer 0."""
        x = self.embedding(tokens)
        return Stream(x if self.embed_norm is None else self.embed_norm(x))

    def run(self, stream: Stream, cache: Cache | None = None, edits=(), first: int = 0,
            last: int | None = None) -> tuple[Stream, Cache]:
        """Layers first ≤ i < last, from the stream at the input of layer `first`: the stream after them,
        and the cache, of which only those layers are read and renewed.

        Raises InputError if an edit is not among these tokens and layers, or not of its head's size.
        """
        cache = cache or self.empty_cache()
        start, T = cache.length, stream.x.shape[1]
        last = len(self.layers) if last is None else last
        for e in edits:
            self.check_cell(e.layer, e.head)
            mixer = self.layers[e.layer].mixer
            if not (first <= e.layer < last and start <= e.position < start + T):
                raise InputError(
                    f"edit at layer {e.layer}, position {e.position}: this call runs layers "
                    f"{first}..{last - 1} over positions {start}..{start + T - 1}")
            if (e.key.shape[-1], e.value.shape[-1]) != (mixer.K, mixer.V):
                raise InputError(
                    f"edit with key [{e.key.shape[-1]}] and value [{e.value.shape[-1]}]: the head's "
                    f"state is [K, V] = [{mixer.K}, {mixer.V}], key first")
        layers = list(cache.layers)
        for i in range(first, last):
            here = [e for e in edits if e.layer == i]
            stream, layers[i] = self.layers[i](stream, layers[i], start, here)
        return stream, Cache(tuple(layers), start + T)

    def unembed(self, stream: Stream) -> Tensor:
        """The stream after the last layer -> logits [B, T, vocab]."""
        return F.linear(self.norm(stream.x), self.unembedding)

    def step_inputs(self, stream: Stream, layer: int, cache: Cache | None = None) -> StepInputs:
        """The six tensors of a recurrent layer, from the stream at its input."""
        block, cache = self.layers[layer], cache or self.empty_cache()
        return block.mixer.inputs(block.norm1(stream.x), cache.layers[layer], stream.v_first)[0]

    def empty_cache(self) -> Cache:
        """The cache before the first token."""
        return Cache(tuple({} for _ in self.layers), 0)

    def check_cell(self, layer: int, head: int):
        """Raise InputError unless layer is recurrent and has this head."""
        if layer not in self.recurrent_layers:
            kind = f"not one of 0..{len(self.layers) - 1}"
            if 0 <= layer < len(self.layers):
                kind = "full attention, it keeps no state"
            raise InputError(f"layer {layer} of {self.name} is {kind}; recurrent layers: "
                             f"{', '.join(map(str, self.recurrent_layers))}")
        heads = self.layers[layer].mixer.heads
        if not 0 <= head < heads:
            raise InputError(f"head {head} of {self.name}: layer {layer} has heads 0..{heads - 1}")

    def generate(self, logits: Tensor, cache: Cache, n: int) -> tuple[Tensor, Tensor]:
        """n tokens, each the most probable next one, from the last logits [B, vocab] and the cache:

            logits, cache = model(prompt, edits=edits)
            tokens, logits = model.generate(logits[:, -1], cache, 20)

        Returns tokens [B, n] and the logits that they were chosen from, [B, n, vocab].
        """
        tokens, chosen_from = [], []
        for i in range(n):
            if i > 0:
                logits, cache = self(tokens[-1], cache)
                logits = logits[:, -1]
            chosen_from.append(logits)
            tokens.append(logits.argmax(-1, keepdim=True))
        return torch.cat(tokens, 1), torch.stack(chosen_from, 1)


# ==================================================================================================
# The tutorial ends here. Below is file handling: configs, checkpoints, tokenizers.
# ==================================================================================================
UNSUPPORTED = {"qwen3_next": "Qwen3-Next packs its projections (in_proj_qkvz) otherwise",
               "mamba": "this is Mamba-1, whose state is not written by rank-1 matrices per head",
               "rwkv": "this is RWKV-4", "rwkv5": "this is RWKV-5", "rwkv6": "this is RWKV-6"}


def require(condition: bool, message: str):
    """Raise InputError with this message unless the condition holds."""
    if not condition:
        raise InputError(message)


def size(c: dict, name: str, default: int | None = None, most: int = 10_000_000) -> int:
    """A whole number from the config. Raises InputError if it is missing or not one."""
    x = c.get(name, default)
    require(isinstance(x, int) and not isinstance(x, bool) and 1 <= x <= most,
            f"config.json: {name} is {x!r:.40}, allowed are whole numbers from 1 to {most:,}; is it this "
            "model's config.json?")
    return x


def real(c: dict, name: str, default: float | None = None) -> float:
    """A positive number from the config. Raises InputError if it is missing or not one."""
    x = c.get(name, default)
    require(isinstance(x, (int, float)) and not isinstance(x, bool) and 0 < x < 1e12,
            f"config.json: {name} is {x!r:.40}, allowed are positive numbers; is it this model's "
            "config.json?")
    return float(x)


def build(config: dict) -> LanguageModel:
    """An untrained model of the shape that a config.json describes. Raises InputError for a model_type
    or a size that is none."""
    kind = config.get("model_type", "mamba2" if "ssm_cfg" in config else None)
    kind = {"qwen3_5": "qwen3_5_text", "rwkv7_fla": "rwkv7"}.get(str(kind), str(kind))
    builders = {"qwen3_5_text": build_qwen, "mamba2": build_mamba2, "rwkv7": build_rwkv7}
    require(kind in builders, f"model_type {kind:.40} is not supported"
            + (f" ({UNSUPPORTED[kind]})" if kind in UNSUPPORTED else "")
            + "; supported: qwen3_5 (Gated DeltaNet), mamba2, rwkv7")
    text = config.get("text_config", config)
    require(isinstance(text, dict), "config.json: text_config is no object; download it again")
    return builders[kind](text, config)


def build_qwen(c: dict, outer: dict) -> LanguageModel:
    """Qwen3.5: Gated DeltaNet, with gated attention in every 4th layer. c: the text model's config,
    outer: the file's."""
    D, eps, n = size(c, "hidden_size"), real(c, "rms_norm_eps", 1e-6), size(c, "num_hidden_layers", most=1000)
    every = size(c, "full_attention_interval", 4)
    types = c.get("layer_types") or [
        "full_attention" if (i + 1) % every == 0 else "linear_attention" for i in range(n)]
    known = {"full_attention", "linear_attention"}
    require(isinstance(types, list) and len(types) == n and all(t in known for t in map(str, types)),
            f"config.json: layer_types must name {n} layers, each one of {', '.join(sorted(known))}")
    heads, key_heads = size(c, "num_attention_heads"), size(c, "num_key_value_heads")
    head_dim = size(c, "head_dim", max(1, D // heads))
    rope = c.get("rope_parameters") if isinstance(c.get("rope_parameters"), dict) else c
    factor = real(rope, "partial_rotary_factor", c.get("partial_rotary_factor", 0.25))
    rotary, theta = int(head_dim * factor), real(rope, "rope_theta", 10_000_000)
    require(heads % key_heads == 0 and 0 < rotary <= head_dim and rotary % 2 == 0,
            f"config.json: {heads} query heads over {key_heads} key heads, {rotary} rotary channels of "
            f"{head_dim}: heads must divide, and the channels be even and no more than there are")
    linear = [size(c, "linear_" + name) for name in
              ("num_key_heads", "num_value_heads", "key_head_dim", "value_head_dim")]
    require(linear[1] % linear[0] == 0, f"config.json: {linear[1]} linear value heads over {linear[0]} "
            "key heads: they must divide")

    def block(kind: str) -> Block:
        mixer = (GatedAttention(D, heads, key_heads, head_dim, rotary, theta, eps)
                 if kind == "full_attention" else
                 GatedDeltaNet(D, *linear, size(c, "linear_conv_kernel_dim", 4, 64), eps))
        mlp = GatedMLP(D, size(c, "intermediate_size"))
        return Block(mixer, RMSNorm(D, eps, 1.0), mlp, RMSNorm(D, eps, 1.0))

    tied = outer.get("tie_word_embeddings", c.get("tie_word_embeddings", False))
    blocks = [block(kind) for kind in types]
    return LanguageModel("gdn", size(c, "vocab_size"), D, blocks, RMSNorm(D, eps, 1.0), tied=bool(tied))


def build_mamba2(c: dict, _) -> LanguageModel:
    """Mamba-2: one mixer per block, no MLP."""
    D, eps = size(c, "hidden_size"), real(c, "layer_norm_epsilon", 1e-5)
    heads, groups = size(c, "num_heads"), size(c, "n_groups")
    require(heads % groups == 0, f"config.json: {heads} heads in {groups} groups: they must divide")
    limit = c.get("time_step_limit", [0.0, math.inf])
    try:
        low, high = [float(x["__float__"] if isinstance(x, dict) else x) for x in limit]
    except (TypeError, ValueError, KeyError):
        raise InputError(f"config.json: time_step_limit is {limit!r:.40}, allowed is [low, high]") from None

    def block() -> Block:
        mixer = Mamba2(D, heads, groups, size(c, "state_size"), size(c, "head_dim"),
                       size(c, "conv_kernel", 4, 64), eps, (low, high), bool(c.get("use_bias", False)),
                       bool(c.get("use_conv_bias", True)))
        return Block(mixer, RMSNorm(D, eps))

    blocks = [block() for _ in range(size(c, "num_hidden_layers", most=1000))]
    tied = bool(c.get("tie_word_embeddings", False))
    return LanguageModel("mamba2", size(c, "vocab_size"), D, blocks, RMSNorm(D, eps), tied=tied)


def build_rwkv7(c: dict, _) -> LanguageModel:
    """RWKV-7: time mixing and channel mixing, LayerNorms with bias, one more after the embedding."""
    D, K, eps = size(c, "hidden_size"), size(c, "head_dim"), real(c, "norm_eps", 1e-5)
    require(D % K == 0, f"config.json: hidden_size {D} is no multiple of head_dim {K}")
    ranks = {name[0]: size(c, name + "_low_rank_dim") for name in ("decay", "a", "v", "gate")}
    ranks = dict(w=ranks["d"], a=ranks["a"], v=ranks["v"], g=ranks["g"])
    inner = size(c, "intermediate_size", 4 * D)
    blocks = []
    for i in range(size(c, "num_hidden_layers", most=1000)):
        mixer = RWKV7(D, D // K, K, K, ranks, i == 0, K * eps)
        blocks.append(Block(mixer, nn.LayerNorm(D, eps), ChannelMix(D, inner), nn.LayerNorm(D, eps)))
    tied = bool(c.get("tie_word_embeddings", False))
    return LanguageModel("rwkv7", size(c, "vocab_size"), D, blocks, nn.LayerNorm(D, eps),
                         nn.LayerNorm(D, eps), tied=tied)


# --------------------------------------------------------------------------------------------------
# 6. Loading: every layout of the hub ends here
# --------------------------------------------------------------------------------------------------
#: Our names -> the checkpoints': a table of beginnings for the model, one for the inside of a block.
HUB_NAMES = {
    "gdn": ({"embedding": "model.embed_tokens", "norm": "model.norm", "head": "lm_head",
             "layers": "model.layers"},
            {"norm1": "input_layernorm", "norm2": "post_attention_layernorm", "mixer": "linear_attn",
             "attention": "self_attn"}),
    "mamba2": ({"embedding": "backbone.embeddings", "norm": "backbone.norm_f", "head": "lm_head",
                "layers": "backbone.layers"}, {"norm1": "norm"}),
    "rwkv7": ({"embedding": "model.embeddings", "embed_norm": "model.layers.0.pre_norm",
               "norm": "model.norm", "head": "lm_head", "layers": "model.layers"},
              {"norm1": "attn_norm", "norm2": "ffn_norm", "mlp": "ffn", "mixer.out_proj": "attn.o_proj",
               **{f"mixer.{c}_lora": f"attn.{c}_lora.lora" for c in "wavg"}, "mixer": "attn"})}
SKIPPED = ("model.visual.", "mtp.")       # Qwen3.5's image encoder and its multi-token predictor


def renamed(name: str, table: dict[str, str]) -> str:
    """A dotted name with its beginning exchanged, by the first row of the table that fits."""
    for ours, theirs in table.items():
        if name.startswith(ours + "."):
            return theirs + name[len(ours):]
    return name


def hub_name(model: LanguageModel, name: str) -> str:
    """Our parameter's name -> its name in a checkpoint."""
    around, inside = HUB_NAMES[model.architecture]
    if not name.startswith("layers."):
        return renamed(name, around)
    _, i, rest = name.split(".", 2)
    if not model.layers[int(i)].recurrent:
        rest = rest.replace("mixer.", "attention.")
    return f"{around['layers']}.{i}.{renamed(rest, inside)}"


class Stored(NamedTuple):
    """Where a tensor lies on the disk."""
    file: str
    name: str
    shape: list[int]
    part: int | None = None       # RWKV-7's six mixes may be packed in one tensor: which row is meant

    def read(self, dtype: torch.dtype) -> Tensor:
        """The tensor, alone: its file is opened for it, so that no more than one is held twice."""
        from safetensors import safe_open
        with safe_open(self.file, "pt") as f:
            x = f.get_tensor(self.name)
            return (x if self.part is None else x[self.part].reshape(-1)).to(dtype, copy=True)


def load(name_or_path: str, device: str | torch.device = "cpu",
         dtype: torch.dtype = torch.float32) -> LanguageModel:
    """A model from a folder or a hub id ("Qwen/Qwen3.5-0.8B"): config.json and safetensors.

    Reads Qwen3.5 (also the multimodal layout), Mamba-2 (transformers' and mamba_ssm's names) and RWKV-7
    (fla's names). dtype: of the weights; the recurrence is fp32 always. Memory: the weights in dtype,
    and one tensor more. Runs no code from the checkpoint. Raises InputError, one line, for whatever is
    wrong with name, network, config or tensors.
    """
    folder = find_folder(str(name_or_path))
    config = read_json(os.path.join(folder, "config.json"))
    stored = find_tensors(folder)
    try:
        config = complete_config(config, stored)
    except KeyError as missing:
        raise InputError(f"{folder}: tensor {missing} is missing; is this a complete "
                         f"{config.get('model_type')!r:.40} checkpoint?") from None
    with torch.device("meta"):               # shapes only, held against the files' before any is read
        model = build(config)
    chosen = {}
    for ours, parameter in model.named_parameters():
        theirs = hub_name(model, ours)
        require(theirs in stored, f"{folder}: tensor {theirs} is missing; is the download complete, is "
                "config.json this model's?")
        shape = stored[theirs].shape
        plain = [n for n in shape if n > 1] == [n for n in parameter.shape if n > 1]       # x_r [1, 1, D]
        require(plain, f"{folder}: tensor {theirs} is {shape}, config.json asks for {list(parameter.shape)}")
        chosen[ours] = stored.pop(theirs)
    if model.head is None:
        stored.pop("lm_head.weight", None)
    require(not stored, f"{folder}: unexpected tensor {min(stored, default='')} ({len(stored)} in all); the "
            "known layouts have no such name")
    weights = {}
    for ours, parameter in model.named_parameters():
        tensor = chosen[ours].read(dtype).view(parameter.shape)
        require(bool(tensor.isfinite().all()), f"{folder}: tensor {hub_name(model, ours)} holds NaN or Inf "
                f"(as {str(dtype)[6:]}); download the file again")
        weights[ours] = tensor
    model.load_state_dict(weights, assign=True)
    model.name, model.folder = str(name_or_path), folder
    return model.requires_grad_(False).eval().to(device)


def find_folder(name_or_path: str) -> str:
    """The folder itself, or a hub id's files, downloaded once into the hub's own cache."""
    if os.path.isdir(name_or_path):
        return name_or_path
    require(re.fullmatch(r"[\w.-]+/[\w.-]+", name_or_path) is not None,
            f"{name_or_path!r:.100} is neither a folder nor a hub id (owner/name), nor one of gdn, mamba2, "
            "rwkv7")
    import huggingface_hub
    import huggingface_hub.errors as hub_errors
    wanted = ["config.json", "*.safetensors", "model.safetensors.index.json", "tokenizer.json",
              "rwkv_vocab*.txt"]
    try:
        return huggingface_hub.snapshot_download(name_or_path, allow_patterns=wanted)
    except (hub_errors.HfHubHTTPError, hub_errors.LocalEntryNotFoundError, hub_errors.HFValidationError,
            OSError) as error:
        raise InputError(f"{name_or_path:.60} could not be fetched from the hub ({type(error).__name__}); "
                         "check the name, your access and the network, or give a local folder") from None


def read_json(path: str) -> dict:
    """A JSON object from a file. Raises InputError."""
    try:
        with open(path, encoding="utf-8") as f:
            text = f.read()
        result = json.loads(text)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); give a folder or a hub id with "
                         "config.json and safetensors") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: no JSON ({str(error).splitlines()[0]:.60}); download it again") from None
    require(isinstance(result, dict), f"{path}: holds no JSON object; download it again")
    return result


def check_content(path: str):
    """Raise InputError if a .safetensors file is plainly something else."""
    try:
        with open(path, "rb") as f:
            start = f.read(200)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); is the download complete?") from None
    header = start[4:8] == bytes(4)             # safetensors begin with a length of 8 bytes, below 4 GB
    require(header or not start.startswith((b"PK\x03\x04", b"\x80")), f"{path}: is a pickle, which can run code when "
            "it is opened; take a safetensors conversion of the model")
    require(not start.startswith(b"version https://git-lfs"), f"{path}: is a git-LFS pointer, not the "
            "file; fetch it with git lfs pull")
    require(not start.lstrip().startswith(b"<"), f"{path}: is a web page, not the file; download it again")


def find_tensors(folder: str) -> dict[str, Stored]:
    """Every tensor of a folder's safetensors files (model.safetensors, or the shards of its index), by
    a uniform name. Only the files' headers are read."""
    from safetensors import SafetensorError, safe_open
    files = ["model.safetensors"]
    index = os.path.join(folder, "model.safetensors.index.json")
    if os.path.exists(index):
        files = read_json(index).get("weight_map")
        require(isinstance(files, dict) and files and all(isinstance(f, str) for f in files.values()),
                f"{index}: no weight_map from tensor names to files; download it again")
        files = sorted(set(files.values()))
    elif not os.path.exists(os.path.join(folder, files[0])):
        pickles = [f for f in sorted(os.listdir(folder)) if f.endswith((".bin", ".pth", ".pt", ".ckpt"))]
        why = "no model.safetensors, no index"
        if pickles:
            why = f"{pickles[0]} is a pickle, which can run code when it is opened"
        raise InputError(f"{folder}: {why}; take a safetensors conversion, such as AntonV/mamba2-370m-hf "
                         "or fla-hub/rwkv7-1.5B-world")
    stored = {}
    for file in files:
        require(os.path.basename(file) == file, f"{index}: names {file!r:.60}, a file outside the folder; "
                "allowed are the names of files beside it")
        path = os.path.join(folder, file)
        check_content(path)
        try:
            with safe_open(path, "pt") as f:
                for name in f.keys():
                    add_stored(stored, path, name, f.get_slice(name))
        except (OSError, SafetensorError) as error:
            raise InputError(f"{path}: cannot be read ({str(error).splitlines()[0]:.80}); is the download "
                             "complete?") from None
    return stored


def add_stored(stored: dict[str, Stored], path: str, name: str, header):
    """Note one tensor under its uniform name: one prefix for Qwen's text model, transformers' name of
    Mamba-2's embedding, RWKV-7's six mixes apart."""
    uniform = name.replace("model.language_model.", "model.")
    uniform = uniform.replace("backbone.embedding.", "backbone.embeddings.")
    if uniform.startswith(SKIPPED):
        return
    shape, dtype = list(header.get_shape()), header.get_dtype()
    require(dtype in ("F16", "BF16", "F32", "F64"), f"{path}: tensor {name:.80} holds {dtype}; allowed are "
            "floating-point weights, not quantised ones")
    require(uniform not in stored, f"{path}: tensor {name:.80} stands in two files; download them again")
    stored[uniform] = Stored(path, name, shape)
    if uniform.endswith(".attn.x_x"):
        del stored[uniform]
        for i, c in enumerate("rwkvag"):
            stored[uniform[:-1] + c] = Stored(path, name, shape[-1:], i)


def complete_config(config: dict, stored: dict[str, Stored]) -> dict:
    """Fill in what a config.json leaves to the tensors' shapes: whether the head is tied, mamba_ssm's
    sizes, RWKV-7's ranks. KeyError names a tensor that is missing."""
    text = config.get("text_config", config)
    require(isinstance(text, dict), "config.json: text_config is no object; download it again")
    text, config = dict(text), dict(config)
    if "lm_head.weight" not in stored:
        text["tie_word_embeddings"] = config["tie_word_embeddings"] = True
    if "ssm_cfg" in config:                                                   # mamba_ssm's config.json
        ssm = config["ssm_cfg"] if isinstance(config["ssm_cfg"], dict) else {}
        layer, groups = "backbone.layers.0.mixer.", size(ssm, "ngroups", 1)
        inner = stored[layer + "out_proj.weight"].shape[-1]
        heads, conv = stored[layer + "dt_bias"].shape[-1], stored[layer + "conv1d.weight"].shape
        text = dict(model_type="mamba2", hidden_size=config.get("d_model"), num_heads=heads,
                    num_hidden_layers=config.get("n_layer"), head_dim=inner // max(1, heads),
                    n_groups=groups, vocab_size=stored["backbone.embeddings.weight"].shape[0],
                    state_size=(conv[0] - inner) // (2 * groups), conv_kernel=conv[-1],
                    tie_word_embeddings="lm_head.weight" not in stored or config.get("tie_embeddings", True))
        config = {}
    if str(config.get("model_type")).startswith("rwkv7"):
        require(not config.get("attn"), "RWKV-7 with attention layers (config.json: attn) is not supported; "
                "take a pure RWKV-7 checkpoint")
        several = text.get("num_hidden_layers") != 1
        for name, c, layer in (("decay", "w", 0), ("a", "a", 0), ("gate", "g", 0), ("v", "v", int(several))):
            tensor = f"model.layers.{layer}.attn.{c}_lora.lora.0.weight"
            text[name + "_low_rank_dim"] = stored[tensor].shape[0] if c != "v" or several else 1
        text["head_dim"] = text.get("head_dim") or 64
        text["intermediate_size"] = stored["model.layers.0.ffn.key.weight"].shape[0]
    kind = config.get("model_type", text.get("model_type"))
    return {**config, "text_config": text, "model_type": kind}


def save_then_rename(write: Callable, path: str):
    """Call write(temporary path), then rename: a file is there whole or not at all. The temporary name
    is this process's own, so that two runs do not meet. Raises InputError where it cannot be written."""
    temporary = f"{path}.{os.getpid()}.part"
    try:
        write(temporary)
        os.replace(temporary, path)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror}); give a place that can") from None
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


def write_text(path: str, text: str):
    """Write a text file whole or not at all."""
    def write(temporary: str):
        with open(temporary, "w", encoding="utf-8") as f:
            f.write(text)
    save_then_rename(write, path)


def save(model: LanguageModel, config: dict, folder: str, dtype: torch.dtype = torch.float32):
    """Write config.json and model.safetensors in the hub's layout: `load` and transformers open it."""
    from safetensors.torch import save_file
    os.makedirs(folder, exist_ok=True)
    weights = {hub_name(model, name): p.detach().cpu().to(dtype).contiguous()
               for name, p in model.named_parameters()}
    save_then_rename(lambda path: save_file(weights, path, metadata={"format": "pt"}),
                     os.path.join(folder, "model.safetensors"))
    config = {**config, "dtype": str(dtype).removeprefix("torch.")}
    write_text(os.path.join(folder, "config.json"), json.dumps(config, indent=1))


# --------------------------------------------------------------------------------------------------
# 7. Text in and out, through the checkpoint's own tokenizer
# --------------------------------------------------------------------------------------------------
class Tokenizer(NamedTuple):
    """Two functions."""
    encode: Callable[[str], list[int]]      # text -> ids, no special tokens added
    decode: Callable[[list[int]], str]      # ids -> text, special tokens shown


def load_tokenizer(model: LanguageModel) -> Tokenizer:
    """The tokenizer beside the model's weights. Raises InputError if there is none that fits."""
    require(model.folder is not None, "this model was not loaded from a folder, so it has no tokenizer")
    path = os.path.join(model.folder, "tokenizer.json")
    worlds = sorted(f for f in os.listdir(model.folder) if re.fullmatch(r"rwkv_vocab.*\.txt", f))
    if os.path.exists(path):
        read_json(path)                                      # says what is wrong with a damaged file
        import tokenizers
        try:
            inner = tokenizers.Tokenizer.from_file(path)
        except Exception as error:                           # the library raises nothing narrower
            raise InputError(f"{path}: no tokenizer ({str(error):.80}); download it again") from None
        most = max(inner.get_vocab().values(), default=-1)
        tokenizer = Tokenizer(lambda text: inner.encode(text, add_special_tokens=False).ids,
                              lambda ids: inner.decode(ids, skip_special_tokens=False))
    else:
        require(bool(worlds), f"{model.folder}: neither tokenizer.json nor rwkv_vocab_v20230424.txt; put the "
                "model's tokenizer there")
        path = os.path.join(model.folder, worlds[-1])
        tokenizer, most = world_tokenizer(path)
    require(0 <= most < model.vocab, f"{path}: ids up to {most}, the embedding has {model.vocab} rows; is it "
            "this model's tokenizer?")
    require(bool(tokenizer.encode("a")), f"{path}: gives no token for a letter; download it again")
    return tokenizer


def world_tokenizer(path: str) -> tuple[Tokenizer, int]:
    """RWKV World's vocabulary, and its largest id: at each point the longest entry that matches. Each
    line of its file: id, Python literal, number of bytes."""
    bytes_of = {}
    try:
        with open(path, encoding="utf-8") as f:
            for line in f:
                index, rest = line.split(" ", 1)
                entry = ast.literal_eval(rest.rsplit(" ", 1)[0])
                bytes_of[int(index)] = entry.encode() if isinstance(entry, str) else bytes(entry)
    except (OSError, ValueError, SyntaxError, TypeError) as error:
        raise InputError(f"{path}: no RWKV World vocabulary ({str(error):.60}); download it again") from None
    id_of = {entry: index for index, entry in bytes_of.items()}
    longest = max(map(len, id_of), default=0)

    def encode(text: str) -> list[int]:
        data, ids, at = text.encode(), [], 0
        while at < len(data):
            n = min(longest, len(data) - at)
            while n > 0 and data[at:at + n] not in id_of:
                n -= 1
            require(n > 0, f"{path}: has no entry for the byte {data[at]}; download it again")
            ids.append(id_of[data[at:at + n]])
            at += n
        return ids

    def decode(ids: list[int]) -> str:
        return b"".join(bytes_of.get(i, b"") for i in ids).decode(errors="replace")

    return Tokenizer(encode, decode), max(bytes_of, default=-1)
