"""Gated DeltaNet (in Qwen3.5), Mamba-2 and RWKV-7 as one recurrence, in plain PyTorch.

    logits, cache = load("checkpoints/gdn")(tokens)          # tokens [B, T] -> logits [B, T, vocab]

Each head of these three models keeps a matrix, its *state* S, and updates it once per token:

    S_t = A_t S_{t-1} + k_t v_tᵀ        A_t = diag(decay_t) − erase_out_t erase_in_tᵀ        o_t = S_tᵀ q_t

The state is key first everywhere in this project: S is [K, V] (K = key size, V = value size), written by the rank-1
matrix k vᵀ, read by Sᵀq. Only `load` knows other layouts. The three models differ in how they make the six tensors:

    role       here        shape            Gated DeltaNet     Mamba-2           RWKV-7
    query      q           [B, T, H, K]     q/√K, unit norm    C                 r
    key        k           [B, T, H, K]     k, unit norm       B                 k (1 + (a−1) k_a)
    value      v           [B, T, H, V]     β v                Δ x               v
    decay      log_decay   [B, T, H, 1|K]   log α, per head    Δ A, per head     log w, per key channel
    erase      erase_in    [B, T, H, K]     k                  -                 κ̂  (unit norm)
               erase_out   [B, T, H, K]     α β k              -                 a κ̂

    B batch, T time, H heads, D width of the residual stream. Layers and heads count from 0. `decay` and `log_decay` are
    two names for two things. The recurrence runs in fp32 whatever the dtype of the weights.

References: Gated DeltaNet arXiv 2412.06464; Mamba-2 arXiv 2405.21060; RWKV-7 arXiv 2503.14456. The tests hold each
model against the official implementations (transformers; rwkv) to 2e-4 in the logits.

Order of this file: the recurrence - an edit of the state - the three adapters - attention and MLPs - the model -
loading.
"""
from __future__ import annotations

import ast
import json
import math
import os
import re
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor


class InputError(ValueError):
    """Something the user can mend: the message says what was got, what is allowed and what to do, in one line."""


def wide(x: Tensor) -> Tensor:
    """fp32 at least: half precision is widened, fp32 and fp64 stay."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


# ---------------------------------------------------------------------------------------------------------------------
# 1. The recurrence
# ---------------------------------------------------------------------------------------------------------------------
class StepInputs(NamedTuple):
    """The six tensors that drive one recurrent layer (the table above).
    The erase pair is None where nothing is erased."""
    q: Tensor                         # [B, T, H, K]
    k: Tensor                         # [B, T, H, K]
    v: Tensor                         # [B, T, H, V]
    log_decay: Tensor                 # [B, T, H, 1] one per head, or [B, T, H, K] one per key channel
    erase_in: Tensor | None = None    # [B, T, H, K] the direction whose content is looked up, and
    erase_out: Tensor | None = None   # [B, T, H, K] the direction it is subtracted from

    def slice(self, times: slice, heads: slice = slice(None)) -> StepInputs:
        """The same tensors at some times and heads."""
        return StepInputs(*(None if x is None else x[:, times, heads] for x in self))


def check_shapes(s: StepInputs, state: Tensor | None):
    """Raise ValueError with the likely mistake if the six tensors do not fit together."""
    B, T, H, K = s.q.shape
    V = s.v.shape[-1]
    if s.k.shape != s.q.shape or s.v.shape[:3] != (B, T, H):
        raise ValueError(f"q {tuple(s.q.shape)}, k {tuple(s.k.shape)} and v {tuple(s.v.shape)} must be "
                         "[B,T,H,K], [B,T,H,K] and [B,T,H,V]: is the head axis before the time axis, or are grouped "
                         "keys not yet repeated?")
    if s.log_decay.shape not in ((B, T, H, 1), (B, T, H, K)):
        raise ValueError(f"log_decay is {tuple(s.log_decay.shape)}, allowed are [B,T,H,1] and [B,T,H,K]: "
                         "is the last axis missing?")
    if state is not None and state.shape != (B, H, K, V):
        raise ValueError(f"state is {tuple(state.shape)}, must be [B,H,K,V] = {(B, H, K, V)}: is it value first?")


def recurrence(s: StepInputs, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The definition, one token after the other:

        S_t = diag(decay_t) S_{t-1} − erase_out_t (erase_in_tᵀ S_{t-1}) + k_t v_tᵀ
        o_t = S_tᵀ q_t

    s: the six tensors; state: S_0 [B, H, K, V], zeros if None. Returns o [B, T, H, V] and the last state [B, H, K, V].
    """
    check_shapes(s, state)
    B, T, H, K = s.q.shape
    S = s.v.new_zeros(B, H, K, s.v.shape[-1]) if state is None else state
    outer = lambda a, b: a.unsqueeze(-1) * b.unsqueeze(-2)        # [B,H,K], [B,H,V] -> [B,H,K,V]
    read = lambda S, a: (S * a.unsqueeze(-1)).sum(-2)             # Sᵀa: [B,H,K,V], [B,H,K] -> [B,H,V]
    o = []
    for t in range(T):
        new = s.log_decay[:, t].exp().unsqueeze(-1) * S + outer(s.k[:, t], s.v[:, t])
        if s.erase_in is not None:
            new = new - outer(s.erase_out[:, t], read(S, s.erase_in[:, t]))
        S = new
        o.append(read(S, s.q[:, t]))
    return torch.stack(o, 1), S


def states(s: StepInputs, state: Tensor | None = None) -> Tensor:
    """The state after every token, S_1 .. S_T: [B, T, H, K, V].
    (T times the memory of `recurrence`, whose steps these are.)"""
    all_states = []
    for t in range(s.q.shape[1]):
        _, state = recurrence(s.slice(slice(t, t + 1)), state)
        all_states.append(state)
    return torch.stack(all_states, 1)


def decayed_scores(x: Tensor, log_x: Tensor, y: Tensor, log_y: Tensor, mask: Tensor) -> Tensor:
    """M_ij = Σ_c x_ic exp(log_x_ic − log_y_jc) y_jc where mask_ij, else 0.
    x, y [..., C, K], logs [..., C, 1|K] -> [..., C, C].

    Only differences of logs are exponentiated. One decay per head: the factor leaves the sum, exact for any decay. One
    per channel: both sides are measured from the middle of the chunk (C ≤ 16 and a decay ≥ 0.545 stay far inside fp32).
    """
    if log_x.shape[-1] == 1:
        return (x @ y.mT) * (log_x - log_y.mT).masked_fill(~mask, -math.inf).exp()
    middle = log_y[..., log_y.shape[-2] // 2, None, :]
    return ((x * (log_x - middle).exp()) @ (y * (middle - log_y).exp()).mT).masked_fill(~mask, 0)


def recurrence_chunked(s: StepInputs, state: Tensor | None = None, chunk: int | None = None) -> tuple[Tensor, Tensor]:
    """The same result as `recurrence`, by matrix products over chunks of C tokens.

    Write w_t = S_{t-1}ᵀ erase_in_t for what the erase looks up at t, and L for the log decays summed from the chunk's
    start. Unrolled inside a chunk that starts from state S,

        S_t = e^{L_t} S + Σ_{j≤t} e^{L_t − L_j} (k_j v_jᵀ − erase_out_j w_jᵀ)

    so w solves a triangular system, (I + M) w = [erase_in·k] v + [e^{L} erase_in] S, with M the decayed scores of
    erase_in against erase_out, and w = w1 + w2 S is affine in S. Then so is all else: a whole chunk is one step of the
    same recurrence,

        o = o1 + o2 S        S ← S2 S + S1

    with S2 [K, K] the product of its transitions and S1 [K, V] its writes. Only that last line is sequential. Arguments
    and results as for `recurrence`; chunk: tokens per chunk, default 32 with one decay per head, 16 with one per
    channel.
    """
    if s.q.shape[1] == 1:
        return recurrence(s, state)                                         # one token is the definition
    check_shapes(s, state)
    B, T, H, K = s.q.shape
    V = s.v.shape[-1]
    C = min(T, chunk or (32 if s.log_decay.shape[-1] == 1 else 16))
    N = -(-T // C)                                   # number of chunks; the last is padded, and zeros change nothing
    split = lambda x: F.pad(x, (0, 0, 0, 0, 0, N * C - T)).view(B, N, C, H, -1).permute(1, 0, 3, 2, 4)
    q, k, v, log_decay = map(split, s[:4])                                  # [N, B, H, C, ·]
    L = log_decay.cumsum(-2)                                                # up to and with each token
    before = L - log_decay                                                  # up to the token before
    end = L[..., -1:, :]                                                    # the whole chunk
    upto = torch.ones(C, C, dtype=torch.bool, device=q.device).tril()       # j ≤ i

    from_k = decayed_scores(q, L, k, L, upto)                               # o without erase: from this chunk's writes,
    o1, o2 = from_k @ v, q * L.exp()                                        # and from the state before it
    to_end = k * (end - L).exp()
    S1 = to_end.mT @ v
    S2 = torch.diag_embed(end.squeeze(-2).exp().expand(N, B, H, K))
    if s.erase_in is not None:
        erase_in, erase_out = split(s.erase_in), split(s.erase_out)
        strictly = upto.tril(-1)                                            # j < i
        M = decayed_scores(erase_in, before, erase_out, L, strictly)
        found = decayed_scores(erase_in, before, k, L, strictly) @ v
        w = torch.linalg.solve_triangular(M, torch.cat([found, erase_in * before.exp()], -1), upper=False,
                                          unitriangular=True)
        w1, w2 = w.split([V, K], -1)
        from_erase = decayed_scores(q, L, erase_out, L, upto)
        o1, o2 = o1 - from_erase @ w1, o2 - from_erase @ w2
        to_end = erase_out * (end - L).exp()
        S1, S2 = S1 - to_end.mT @ w1, S2 - to_end.mT @ w2

    S = v.new_zeros(B, H, K, V) if state is None else state
    starts = []                                                             # the state before each chunk
    for n in range(N):
        starts.append(S)
        S = S2[n] @ S + S1[n]
    o = o1 + o2 @ torch.stack(starts)                                       # [N, B, H, C, V]
    return o.permute(1, 0, 3, 2, 4).reshape(B, N * C, H, V)[:, :T], S


# ---------------------------------------------------------------------------------------------------------------------
# 2. An edit of the state
# ---------------------------------------------------------------------------------------------------------------------
class Edit(NamedTuple):
    """Add key valueᵀ to a head's state right after the write of one token.
    Deleting the native write is Edit(…, -k, v)."""
    layer: int
    head: int
    position: int      # absolute, counted from the first token ever fed (so with a cache: from the cache's start)
    key: Tensor        # [K] or [B, K]
    value: Tensor      # [V] or [B, V]


def propagate(key: Tensor, s: StepInputs) -> tuple[Tensor, Tensor]:
    """What an edit of one head's state does to its later reads, exactly, for the price of K numbers per step.

    Let δS_t = u_t yᵀ. The recurrence is linear in the state, so the edit stays rank 1 with the same y and only u moves:

        u_t = key        u_s = A_s u_{s-1}        δo_s = (u_s · q_s) y

    This is the recurrence itself with a value size of 1, driven by the single write (key, 1) at the first step.
    Replacement, the logit formula and steering all stand on this function.

    key [B, H, K], one edit per head; s: the six tensors of those heads, from the edited token on. Returns gain
    [B, T, H], the u_s · q_s, and the last u [B, H, K].
    """
    T = s.q.shape[1]
    impulse = lambda x: F.pad(x[:, None], (0, 0, 0, 0, 0, T - 1))     # [B, H, ·] -> [B, T, H, ·], zero after step 0
    gain, u = recurrence(s._replace(k=impulse(key), v=impulse(torch.ones_like(key[..., :1]))))
    return gain[..., 0], u[..., 0]


def apply_edits(o: Tensor, state: Tensor, s: StepInputs, start: int, edits: list[Edit]) -> tuple[Tensor, Tensor]:
    """Add the edits of one layer to its reads o [B, T, H, V] and its last state [B, H, K, V];
    start: position of o's first token. All E edits of one position are followed at once."""
    B = len(o)
    delta_o, delta_state = torch.zeros_like(o), torch.zeros_like(state)
    for position in sorted({e.position for e in edits}):
        here, t = [e for e in edits if e.position == position], position - start
        heads = torch.tensor([e.head for e in here], device=o.device)
        key = torch.stack([e.key.expand(B, -1) for e in here], 1)                         # [B, E, K]
        value = torch.stack([e.value.expand(B, -1) for e in here], 1)                     # [B, E, V]
        gain, u = propagate(key, s.slice(slice(t, None), heads))
        moved = F.pad(gain.unsqueeze(-1) * value.unsqueeze(1), (0, 0, 0, 0, t, 0))        # nothing before the edit
        delta_o = delta_o.index_add(2, heads, moved)   # the sum comes first: an edit and its opposite cancel to the bit
        delta_state = delta_state.index_add(1, heads, u.unsqueeze(-1) * value.unsqueeze(-2))
    return o + delta_o, state + delta_state


# ---------------------------------------------------------------------------------------------------------------------
# 3. Three adapters: from a layer's input to the six tensors, and from the reads o to the layer's output
#
#    inputs(h, cache, v_first) -> StepInputs, rest, cache       h [B, T, D]; rest: what `output` needs besides o
#    output(o, s, rest) -> [B, T, D]                            o [B, T, H, V]
# ---------------------------------------------------------------------------------------------------------------------
def causal_conv(x: Tensor, tail: Tensor, weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """silu of a causal depthwise convolution: y_t = Σ_i weight_i x_{t-W+1+i}; the last tap meets the current token.

    x [B, T, C], tail [B, W-1, C] the inputs just before x, weight [C, 1, W] as PyTorch's Conv1d. Returns y and the new
    tail.
    """
    T, W = x.shape[1], weight.shape[-1]
    padded = torch.cat([tail, x], 1)
    y = sum(padded[:, i:i + T] * weight[:, 0, i] for i in range(W))
    return F.silu(y if bias is None else y + bias), padded[:, T:]


class RMSNorm(nn.Module):
    """x / √(mean x² + eps) · (offset + weight). Qwen3.5 stores its weights around 0 (offset 1), the others around 1."""

    def __init__(self, size: int, eps: float, offset: float = 0.0):
        super().__init__()
        self.eps, self.offset = eps, offset
        self.weight = nn.Parameter(torch.full((size,), 1.0 - offset))

    def forward(self, x: Tensor) -> Tensor:
        """x [..., size] -> the same shape and dtype."""
        y = wide(x) * torch.rsqrt(wide(x).square().mean(-1, keepdim=True) + self.eps)
        return (y * (self.offset + wide(self.weight))).to(x.dtype)


class ConvWeights(nn.Module):
    """Only the parameters of a depthwise convolution, under the names that checkpoints use;
    `causal_conv` does the work."""

    def __init__(self, channels: int, width: int, bias: bool):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(channels, 1, width))
        self.bias = nn.Parameter(torch.zeros(channels)) if bias else None


class GatedDeltaNet(nn.Module):
    """Qwen3.5's linear-attention layer (arXiv 2412.06464, eq. 10): S_t = α_t (I − β_t k_t k_tᵀ) S_{t-1} + β_t k_t v_tᵀ.

    q|k|v = silu(conv(W_qkv h)), each head's q and k to unit length; β = σ(W_b h); α = exp(−e^{A_log} softplus(W_a h +
    dt_bias)). Output: RMSNorm over each head, then times silu(z), then W_out.
    Value head j reads with key head ⌊j / (value/key heads)⌋.
    """

    def __init__(self, width: int, key_heads: int, value_heads: int, K: int, V: int, conv_width: int = 4,
                 eps: float = 1e-6):
        super().__init__()
        self.key_heads, self.heads, self.K, self.V = key_heads, value_heads, K, V
        self.channels = 2 * key_heads * K + value_heads * V
        self.in_proj_qkv = nn.Linear(width, self.channels, bias=False)
        self.in_proj_z = nn.Linear(width, value_heads * V, bias=False)
        self.in_proj_b = nn.Linear(width, value_heads, bias=False)
        self.in_proj_a = nn.Linear(width, value_heads, bias=False)
        self.conv1d = ConvWeights(self.channels, conv_width, bias=False)
        self.A_log = nn.Parameter(torch.zeros(value_heads))
        self.dt_bias = nn.Parameter(torch.ones(value_heads))
        self.norm = RMSNorm(V, eps)
        self.out_proj = nn.Linear(value_heads * V, width, bias=False)

    @property
    def out_weight(self) -> Tensor:
        """The output map by heads, [D, H, V]."""
        return self.out_proj.weight.unflatten(1, (self.heads, self.V))

    def empty_cache(self, B: int, like: Tensor) -> dict[str, Tensor]:
        """The cache before the first token."""
        return {"state": like.new_zeros(B, self.heads, self.K, self.V, dtype=wide(like[:0]).dtype),
                "tail": like.new_zeros(B, self.conv1d.weight.shape[-1] - 1, self.channels)}

    def inputs(self, h: Tensor, cache: dict, v_first: Tensor | None = None):
        """h [B, T, D] -> the six tensors, z, the cache's new conv tail."""
        B, T, _ = h.shape
        qkv, tail = causal_conv(self.in_proj_qkv(h), cache["tail"], self.conv1d.weight)
        key_size = self.key_heads * self.K
        q, k, v = wide(qkv).split([key_size, key_size, self.heads * self.V], -1)
        unit = lambda x: x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)
        per_head = lambda x: unit(x.view(B, T, self.key_heads, self.K)).repeat_interleave(
            self.heads // self.key_heads, 2)
        q, k, v = per_head(q) * self.K ** -0.5, per_head(k), v.view(B, T, self.heads, self.V)
        beta = wide(self.in_proj_b(h)).sigmoid().unsqueeze(-1)                                  # [B, T, H, 1]
        log_alpha = -wide(self.A_log).exp() * F.softplus(wide(self.in_proj_a(h)) + wide(self.dt_bias))
        log_alpha = log_alpha.unsqueeze(-1)
        s = StepInputs(q, k, beta * v, log_alpha, erase_in=k, erase_out=log_alpha.exp() * beta * k)
        return s, self.in_proj_z(h), {"tail": tail}

    def output(self, o: Tensor, s: StepInputs, z: Tensor) -> Tensor:
        """W_out( RMSNorm(o) · silu(z) ): norm, then gate."""
        y = self.norm(o) * F.silu(wide(z).view(o.shape))
        return self.out_proj(y.flatten(-2).to(z.dtype))


class Mamba2(nn.Module):
    """Mamba-2's layer (arXiv 2405.21060): S_t = e^{Δ_t A} S_{t-1} + B_t (Δ_t x_t)ᵀ, read by C_t. Nothing is erased.

    z|xBC|dt = W_in h; x|B|C = silu(conv(xBC)); Δ = clamp(softplus(dt + dt_bias), time_step_limit); A = −e^{A_log}.
    Output: o + D x, times silu(z), then RMSNorm over each group, then W_out. Heads of a group share B and C.
    """

    def __init__(self, width: int, heads: int, groups: int, K: int, V: int, conv_width: int = 4, eps: float = 1e-5,
                 time_step_limit: tuple[float, float] = (0.0, math.inf), bias: bool = False, conv_bias: bool = True):
        super().__init__()
        self.heads, self.groups, self.K, self.V, self.time_step_limit = heads, groups, K, V, time_step_limit
        self.channels = heads * V + 2 * groups * K
        self.in_proj = nn.Linear(width, heads * V + self.channels + heads, bias=bias)
        self.conv1d = ConvWeights(self.channels, conv_width, bias=conv_bias)
        self.dt_bias = nn.Parameter(torch.ones(heads))
        self.A_log = nn.Parameter(torch.zeros(heads))
        self.D = nn.Parameter(torch.ones(heads))
        self.norm = RMSNorm(heads * V, eps)
        self.out_proj = nn.Linear(heads * V, width, bias=bias)

    @property
    def out_weight(self) -> Tensor:
        """The output map by heads, [D, H, V]."""
        return self.out_proj.weight.unflatten(1, (self.heads, self.V))

    def empty_cache(self, B: int, like: Tensor) -> dict[str, Tensor]:
        """The cache before the first token."""
        return {"state": like.new_zeros(B, self.heads, self.K, self.V, dtype=wide(like[:0]).dtype),
                "tail": like.new_zeros(B, self.conv1d.weight.shape[-1] - 1, self.channels)}

    def inputs(self, h: Tensor, cache: dict, v_first: Tensor | None = None):
        """h [B, T, D] -> the six tensors (no erase), (x, z), the cache's new conv tail."""
        B, T, _ = h.shape
        z, xBC, dt = self.in_proj(h).split([self.heads * self.V, self.channels, self.heads], -1)
        xBC, tail = causal_conv(xBC, cache["tail"], self.conv1d.weight, self.conv1d.bias)
        x, key, query = wide(xBC).split([self.heads * self.V, self.groups * self.K, self.groups * self.K], -1)
        x = x.view(B, T, self.heads, self.V)
        per_head = lambda y: y.view(B, T, self.groups, self.K).repeat_interleave(self.heads // self.groups, 2)
        step = F.softplus(wide(dt) + wide(self.dt_bias)).clamp(*self.time_step_limit).unsqueeze(-1)   # Δ [B, T, H, 1]
        s = StepInputs(per_head(query), per_head(key), step * x, -step * wide(self.A_log).exp().unsqueeze(-1))
        return s, (x, z), {"tail": tail}

    def output(self, o: Tensor, s: StepInputs, rest: tuple[Tensor, Tensor]) -> Tensor:
        """W_out( RMSNorm_group((o + D x) · silu(z)) · w ): gate, then norm."""
        x, z = rest
        y = (o + wide(self.D).unsqueeze(-1) * x).flatten(-2) * F.silu(wide(z))                # [B, T, H·V]
        grouped = y.unflatten(-1, (self.groups, -1))
        y = grouped * torch.rsqrt(grouped.square().mean(-1, keepdim=True) + self.norm.eps)
        return self.out_proj((y.flatten(-2) * wide(self.norm.weight)).to(z.dtype))


class LowRank(nn.Module):
    """W2 f(W1 x) + bias with a narrow middle: RWKV-7's "LoRA" maps. Submodules are numbered as in the checkpoints."""

    def __init__(self, width: int, rank: int, out: int, f: nn.Module, bias: bool = True):
        super().__init__()
        self.lora = nn.Sequential(nn.Linear(width, rank, bias=False), f, nn.Linear(rank, out, bias=bias))

    def forward(self, x: Tensor) -> Tensor:
        """x [..., width] -> [..., out]."""
        return self.lora(x)


def token_shift(h: Tensor, tail: Tensor) -> tuple[Tensor, Tensor]:
    """h_{t-1} − h_t, and h's last token, which is the next tail. h [B, T, D], tail [B, 1, D]."""
    return torch.cat([tail, h[:, :-1]], 1) - h, h[:, -1:]


class RWKV7(nn.Module):
    """RWKV-7's time mixing (arXiv 2503.14456, §4): S_t = (diag(w) − (a κ̂) κ̂ᵀ) S_{t-1} + k vᵀ, read by r.

    m_c = h + (h_{t-1} − h) x_c for c in r, w, k, v, a, g, each through its own map; log w = −e^{−1/2} σ(lora(m_w));
    a = σ(lora(m_a)); κ̂ = k·k_k to unit length per head (the raw k); then k ← k (1 + (a−1) k_a).
    From layer 1 on v moves towards layer 0's v, "v_first". Output: GroupNorm(o), plus (Σ r k r_k) v, times g, then W_o.
    """

    def __init__(self, width: int, heads: int, K: int, V: int, ranks: dict[str, int], first: bool, eps: float):
        super().__init__()
        self.heads, self.K, self.V, self.eps = heads, K, V, eps
        for c in "rwkvag":
            setattr(self, f"x_{c}", nn.Parameter(torch.zeros(width)))
        self.k_k = nn.Parameter(torch.ones(heads * K))
        self.k_a = nn.Parameter(torch.ones(heads * K))
        self.r_k = nn.Parameter(torch.zeros(heads, K))
        self.r_proj = nn.Linear(width, heads * K, bias=False)
        self.k_proj = nn.Linear(width, heads * K, bias=False)
        self.v_proj = nn.Linear(width, heads * V, bias=False)
        self.o_proj = nn.Linear(heads * V, width, bias=False)
        self.w_lora = LowRank(width, ranks["w"], heads * K, nn.Tanh())
        self.a_lora = LowRank(width, ranks["a"], heads * K, nn.Identity())
        self.g_lora = LowRank(width, ranks["g"], heads * V, nn.Sigmoid(), bias=False)
        self.v_lora = None if first else LowRank(width, ranks["v"], heads * V, nn.Identity())
        self.g_norm = nn.GroupNorm(heads, heads * V, eps=eps)

    @property
    def out_weight(self) -> Tensor:
        """The output map by heads, [D, H, V]."""
        return self.o_proj.weight.unflatten(1, (self.heads, self.V))

    def empty_cache(self, B: int, like: Tensor) -> dict[str, Tensor]:
        """The cache before the first token."""
        return {"state": like.new_zeros(B, self.heads, self.K, self.V, dtype=wide(like[:0]).dtype),
                "tail": like.new_zeros(B, 1, self.x_r.numel())}

    def inputs(self, h: Tensor, cache: dict, v_first: Tensor | None):
        """h [B, T, D], v_first [B, T, H, V] (None in layer 0, which makes it) -> the six tensors, the gate g,
        the new tail."""
        B, T, _ = h.shape
        shift, tail = token_shift(h, cache["tail"])
        m_r, m_w, m_k, m_v, m_a, m_g = (h + shift * getattr(self, f"x_{c}") for c in "rwkvag")
        keys = lambda x: wide(x).view(B, T, self.heads, self.K)
        values = lambda x: wide(x).view(B, T, self.heads, self.V)
        r, k, v = keys(self.r_proj(m_r)), keys(self.k_proj(m_k)), values(self.v_proj(m_v))
        log_w = -math.exp(-0.5) * keys(self.w_lora(m_w)).sigmoid()
        a = keys(self.a_lora(m_a)).sigmoid()
        if self.v_lora is not None:
            v = v + (v_first - v) * values(self.v_lora(m_v)).sigmoid()
        kappa = F.normalize(k * wide(self.k_k).view(self.heads, self.K), dim=-1)
        k = k * (1 + (a - 1) * wide(self.k_a).view(self.heads, self.K))
        s = StepInputs(r, k, v, log_w, erase_in=kappa, erase_out=a * kappa)
        return s, self.g_lora(m_g), {"tail": tail}

    def output(self, o: Tensor, s: StepInputs, g: Tensor) -> Tensor:
        """W_o( (GroupNorm(o) + (Σ_K r k r_k) v) · g )."""
        mean, var = o.mean(-1, keepdim=True), o.var(-1, keepdim=True, unbiased=False)
        y = ((o - mean) * torch.rsqrt(var + self.eps)).flatten(-2)
        y = y * wide(self.g_norm.weight) + wide(self.g_norm.bias)
        bonus = (s.q * s.k * wide(self.r_k)).sum(-1, keepdim=True) * s.v
        return self.o_proj(((y + bonus.flatten(-2)) * wide(g)).to(g.dtype))


# ---------------------------------------------------------------------------------------------------------------------
# 4. The rest of a block: Qwen3.5's gated attention (every 4th layer), and the MLPs
# ---------------------------------------------------------------------------------------------------------------------
class GatedAttention(nn.Module):
    """Qwen3.5's full-attention layer: grouped keys, RMSNorm on q and k, partial rotary positions,
    a sigmoid gate on the result.

    Not recurrent: it has no state to edit, and its cache grows with the text.
    """

    def __init__(self, width: int, heads: int, key_heads: int, size: int, rotary: int, theta: float, eps: float = 1e-6):
        super().__init__()
        self.heads, self.key_heads, self.size, self.rotary, self.theta = heads, key_heads, size, rotary, theta
        self.q_proj = nn.Linear(width, 2 * heads * size, bias=False)       # per head: [query | gate]
        self.k_proj = nn.Linear(width, key_heads * size, bias=False)
        self.v_proj = nn.Linear(width, key_heads * size, bias=False)
        self.o_proj = nn.Linear(heads * size, width, bias=False)
        self.q_norm = RMSNorm(size, eps, offset=1.0)
        self.k_norm = RMSNorm(size, eps, offset=1.0)

    def empty_cache(self, B: int, like: Tensor) -> dict[str, Tensor]:
        """The cache before the first token: keys and values [B, 0, key_heads, size]."""
        nothing = like.new_zeros(B, 0, self.key_heads, self.size)
        return {"keys": nothing, "values": nothing}

    def rotate(self, x: Tensor, start: int) -> Tensor:
        """Rotary positions on the first `rotary` channels of x [B, T, heads, size]:
        channel i turns with channel i + rotary/2."""
        T, half = x.shape[1], self.rotary // 2
        frequency = self.theta ** (-torch.arange(half, device=x.device, dtype=torch.float32) / half)
        angle = torch.arange(start, start + T, device=x.device)[:, None, None] * frequency       # [T, 1, half]
        a, b, rest = wide(x).split([half, half, self.size - self.rotary], -1)
        cos, sin = angle.cos(), angle.sin()
        return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], -1).to(x.dtype)

    def forward(self, h: Tensor, cache: dict) -> tuple[Tensor, dict]:
        """h [B, T, D] -> the layer's output [B, T, D] and the cache with T more keys and values."""
        B, T, _ = h.shape
        start = cache["keys"].shape[1]
        q, gate = self.q_proj(h).view(B, T, self.heads, 2 * self.size).chunk(2, -1)
        q = self.rotate(self.q_norm(q), start)
        k = self.rotate(self.k_norm(self.k_proj(h).view(B, T, self.key_heads, self.size)), start)
        k = torch.cat([cache["keys"], k], 1)
        v = torch.cat([cache["values"], self.v_proj(h).view(B, T, self.key_heads, self.size)], 1)
        q = q.unflatten(2, (self.key_heads, -1))                                          # heads as groups of key heads
        scores = wide(torch.einsum("btgrd,bsgd->bgrts", q, k)) * self.size ** -0.5
        past = torch.ones(T, start + T, dtype=torch.bool, device=h.device).tril(start)    # s ≤ start + t
        weights = scores.masked_fill(~past, -math.inf).softmax(-1).to(v.dtype)
        y = torch.einsum("bgrts,bsgd->btgrd", weights, v).flatten(2)                      # [B, T, heads · size]
        return self.o_proj(y * gate.flatten(2).sigmoid()), {"keys": k, "values": v}


class GatedMLP(nn.Module):
    """Qwen3.5: W_down( silu(W_gate x) · W_up x )."""

    def __init__(self, width: int, inner: int):
        super().__init__()
        self.gate_proj = nn.Linear(width, inner, bias=False)
        self.up_proj = nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)

    def empty_cache(self, B: int, like: Tensor) -> dict[str, Tensor]:
        """Nothing to remember."""
        return {}

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

    def empty_cache(self, B: int, like: Tensor) -> dict[str, Tensor]:
        """The token before the first one."""
        return {"mlp_tail": like.new_zeros(B, 1, self.x_k.numel())}

    def forward(self, x: Tensor, cache: dict) -> tuple[Tensor, dict]:
        """x [B, T, D] -> [B, T, D] and the new tail."""
        shift, tail = token_shift(x, cache["mlp_tail"])
        return self.value(F.relu(self.key(x + shift * self.x_k)).square()), {"mlp_tail": tail}


# ---------------------------------------------------------------------------------------------------------------------
# 5. The model
# ---------------------------------------------------------------------------------------------------------------------
class Stream(NamedTuple):
    """What flows from layer to layer."""
    x: Tensor                          # [B, T, D] the residual stream
    v_first: Tensor | None = None      # [B, T, H, V] layer 0's v, in RWKV-7 alone (after its layer 0)

    def slice(self, times: slice, rows: Tensor | slice = slice(None)) -> Stream:
        """The same stream at some times of some batch rows."""
        return Stream(*(None if x is None else x[rows, times] for x in self))


class Cache(NamedTuple):
    """All that the past leaves behind: one dict of tensors per layer, batch first, and the number of tokens seen."""
    layers: tuple[dict[str, Tensor], ...]
    length: int

    def rows(self, index: Tensor) -> Cache:
        """The cache of these batch rows, in this order, repeats allowed. index [n]."""
        return Cache(tuple({name: x[index] for name, x in layer.items()} for layer in self.layers), self.length)


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

    def empty_cache(self, B: int, like: Tensor) -> dict[str, Tensor]:
        """The cache before the first token."""
        return self.mixer.empty_cache(B, like) | (self.mlp.empty_cache(B, like) if self.mlp is not None else {})

    def mix(self, stream: Stream, cache: dict, start: int = 0, edits: list[Edit] = ()) -> tuple[Stream, dict]:
        """The first half, x + mixer(norm1(x)), over T tokens, the first at position start;
        and the mixer's new cache."""
        x, v_first = stream
        h = self.norm1(x)
        if not self.recurrent:
            y, new = self.mixer(h, cache)
            return Stream(x + y, v_first), new
        s, rest, new = self.mixer.inputs(h, cache, v_first)
        with torch.autocast(x.device.type, enabled=False):                         # fp32, also where training is not
            o, state = recurrence_chunked(s, cache["state"])
        if edits:
            o, state = apply_edits(o, state, s, start, edits)
        if isinstance(self.mixer, RWKV7) and v_first is None:
            v_first = s.v
        return Stream(x + self.mixer.output(o, s, rest), v_first), new | {"state": state}

    def feed(self, stream: Stream, cache: dict) -> tuple[Stream, dict]:
        """The second half, x + mlp(norm2(x)), and the MLP's new cache."""
        if self.mlp is None:
            return stream, {}
        y, new = self.mlp(self.norm2(stream.x), cache)
        return stream._replace(x=stream.x + y), new

    def forward(self, stream: Stream, cache: dict, start: int = 0, edits: list[Edit] = ()) -> tuple[Stream, dict]:
        """Both halves: the stream after this layer, and its new cache."""
        stream, new = self.mix(stream, cache, start, edits)
        stream, more = self.feed(stream, cache)
        return stream, new | more


class LanguageModel(nn.Module):
    """Embedding, blocks, norm, head: the same for the three architectures. Made by `build` or `load`."""

    def __init__(self, architecture: str, vocab: int, width: int, blocks: list[Block], norm: nn.Module,
                 embed_norm: nn.Module | None = None, tied: bool = True):
        super().__init__()
        self.architecture, self.vocab, self.name, self.tokenizer = architecture, vocab, architecture, None
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

    def forward(self, tokens: Tensor, cache: Cache | None = None, edits=()) -> tuple[Tensor, Cache]:
        """tokens [B, T] (after those in cache) -> logits [B, T, vocab] and the new cache.
        Nothing passed in is changed."""
        stream, cache = self.run(self.embed(tokens), cache, edits)
        return self.unembed(stream), cache

    def generate(self, logits: Tensor, cache: Cache, n: int) -> tuple[Tensor, Tensor]:
        """n tokens, each the most probable next one: from the last logits [B, vocab] and the cache they came with.

            logits, cache = model(prompt, edits=edits)
            tokens, logits = model.generate(logits[:, -1], cache, 20)

        Returns tokens [B, n] and the logits they were chosen from, [B, n, vocab]. The cache passed in is not changed.
        """
        tokens, chosen_from = [], []
        for i in range(n):
            if i:
                logits, cache = self(tokens[-1], cache)
                logits = logits[:, -1]
            chosen_from.append(logits)
            tokens.append(logits.argmax(-1, keepdim=True))
        return torch.cat(tokens, 1), torch.stack(chosen_from, 1)

    def embed(self, tokens: Tensor) -> Stream:
        """tokens [B, T] -> the stream before layer 0."""
        x = self.embedding(tokens)
        return Stream(x if self.embed_norm is None else self.embed_norm(x))

    def run(self, stream: Stream, cache: Cache | None = None, edits=(), first: int = 0, last: int | None = None):
        """Layers first ≤ i < last, from the stream at the input of layer `first`.
        Returns the stream after them, the cache.

        Only those layers' caches are read and renewed. Raises ValueError if an edit falls outside these tokens or
        layers.
        """
        B, T, _ = stream.x.shape
        last = len(self.layers) if last is None else last
        cache = cache or self.empty_cache(B)
        for e in edits:
            self.check_edit(e, cache.length, T, first, last)
        layers = list(cache.layers)
        for i in range(first, last):
            stream, layers[i] = self.layers[i](stream, layers[i], cache.length, [e for e in edits if e.layer == i])
        return stream, Cache(tuple(layers), cache.length + T)

    def unembed(self, stream: Stream) -> Tensor:
        """The stream after the last layer -> logits [B, T, vocab]."""
        return F.linear(self.norm(stream.x), (self.embedding if self.head is None else self.head).weight)

    def step_inputs(self, stream: Stream, layer: int, cache: Cache | None = None) -> StepInputs:
        """The six tensors of a recurrent layer, from the stream at its input."""
        block = self.layers[layer]
        cache = cache or self.empty_cache(stream.x.shape[0])
        return block.mixer.inputs(block.norm1(stream.x), cache.layers[layer], stream.v_first)[0]

    def empty_cache(self, B: int) -> Cache:
        """The cache before the first token, for a batch of B."""
        return Cache(tuple(block.empty_cache(B, self.embedding.weight) for block in self.layers), 0)

    def check_cell(self, layer: int, head: int):
        """Raise ValueError unless layer is recurrent and has this head."""
        if layer not in self.recurrent_layers:
            kind = ("full attention, it keeps no state" if 0 <= layer < len(self.layers) else
                    f"not one of 0..{len(self.layers) - 1}")
            raise InputError(f"layer {layer} of {self.name} is {kind}; recurrent layers: "
                             f"{', '.join(map(str, self.recurrent_layers))}")
        heads = self.layers[layer].mixer.heads
        if not 0 <= head < heads:
            raise InputError(f"head {head} of {self.name}: layer {layer} has heads 0..{heads - 1}")

    def check_edit(self, e: Edit, start: int, T: int, first: int, last: int):
        """Raise ValueError unless the edit's cell exists and its position is among the T tokens from start."""
        self.check_cell(e.layer, e.head)
        mixer = self.layers[e.layer].mixer
        if not (first <= e.layer < last and start <= e.position < start + T):
            raise InputError(f"edit at layer {e.layer}, position {e.position}: this call runs layers "
                             f"{first}..{last - 1} over positions {start}..{start + T - 1}")
        if e.key.shape[-1] != mixer.K or e.value.shape[-1] != mixer.V:
            raise InputError(f"edit with key [{e.key.shape[-1]}] and value [{e.value.shape[-1]}]: the head's state is "
                             f"[K, V] = [{mixer.K}, {mixer.V}], key first")


def build(config: dict) -> LanguageModel:
    """An untrained model of the shape that a config.json describes (its weights are zeros and noise
    until they are loaded)."""
    kind = config.get("model_type", "mamba2" if "ssm_cfg" in config else None)
    kind = {"qwen3_5": "qwen3_5_text", "rwkv7_fla": "rwkv7"}.get(kind, kind)
    builders = {"qwen3_5_text": build_qwen, "mamba2": build_mamba2, "rwkv7": build_rwkv7}
    if kind not in builders:
        raise InputError(f"model_type {kind!r} is not supported; supported: qwen3_5 (Gated DeltaNet), mamba2, rwkv7")
    return builders[kind](config.get("text_config", config), config)


def build_qwen(c: dict, outer: dict) -> LanguageModel:
    """Qwen3.5: Gated DeltaNet, with gated attention in every 4th layer.
    c: the text model's config, outer: the file's."""
    D, eps = c["hidden_size"], c.get("rms_norm_eps", 1e-6)
    n, every = c["num_hidden_layers"], c.get("full_attention_interval", 4)
    types = c.get("layer_types") or ["linear_attention" if (i + 1) % every else "full_attention" for i in range(n)]
    rope = c.get("rope_parameters") or c
    size = c.get("head_dim") or D // c["num_attention_heads"]
    rotary = int(size * rope.get("partial_rotary_factor", c.get("partial_rotary_factor", 0.25)))

    def block(kind: str) -> Block:
        if kind == "full_attention":
            mixer = GatedAttention(D, c["num_attention_heads"], c["num_key_value_heads"], size, rotary,
                                   rope["rope_theta"], eps)
        else:
            mixer = GatedDeltaNet(D, c["linear_num_key_heads"], c["linear_num_value_heads"], c["linear_key_head_dim"],
                                  c["linear_value_head_dim"], c.get("linear_conv_kernel_dim", 4), eps)
        return Block(mixer, RMSNorm(D, eps, 1.0), GatedMLP(D, c["intermediate_size"]), RMSNorm(D, eps, 1.0))

    tied = outer.get("tie_word_embeddings", c.get("tie_word_embeddings", False))
    return LanguageModel("gdn", c["vocab_size"], D, [block(kind) for kind in types], RMSNorm(D, eps, 1.0), tied=tied)


def build_mamba2(c: dict, _) -> LanguageModel:
    """Mamba-2: one mixer per block, no MLP."""
    D, eps = c["hidden_size"], c.get("layer_norm_epsilon", 1e-5)
    limit = [float(x["__float__"]) if isinstance(x, dict) else float(x)
             for x in c.get("time_step_limit", (0.0, math.inf))]
    mixer = lambda: Mamba2(D, c["num_heads"], c["n_groups"], c["state_size"], c["head_dim"],
                           c.get("conv_kernel", 4), eps,
                           tuple(limit), c.get("use_bias", False), c.get("use_conv_bias", True))
    blocks = [Block(mixer(), RMSNorm(D, eps)) for _ in range(c["num_hidden_layers"])]
    return LanguageModel("mamba2", c["vocab_size"], D, blocks, RMSNorm(D, eps),
                         tied=c.get("tie_word_embeddings", False))


def build_rwkv7(c: dict, _) -> LanguageModel:
    """RWKV-7: time mixing and channel mixing, LayerNorms with bias, one more of them after the embedding."""
    D, K, eps = c["hidden_size"], c["head_dim"], c.get("norm_eps", 1e-5)
    ranks = {"w": c["decay_low_rank_dim"], "a": c["a_low_rank_dim"], "v": c["v_low_rank_dim"],
             "g": c["gate_low_rank_dim"]}
    norm = lambda: nn.LayerNorm(D, eps)
    inner = c.get("intermediate_size") or int(D * c.get("hidden_ratio", 4))
    blocks = [Block(RWKV7(D, D // K, K, K, ranks, i == 0, K * eps), norm(), ChannelMix(D, inner), norm())
              for i in range(c["num_hidden_layers"])]
    return LanguageModel("rwkv7", c["vocab_size"], D, blocks, norm(), norm(), tied=c.get("tie_word_embeddings", False))


# ---------------------------------------------------------------------------------------------------------------------
# 6. Loading: every layout of the hub ends here
# ---------------------------------------------------------------------------------------------------------------------
#: From our parameter names to the checkpoints', applied in this order. Below a mixer or an MLP the names are the same.
HUB_NAMES = {
    "gdn": [(r"^embedding", "model.embed_tokens"), (r"^norm", "model.norm"), (r"^head", "lm_head"),
            (r"^layers", "model.layers"), (r"\.norm1\.", ".input_layernorm."),
            (r"\.norm2\.", ".post_attention_layernorm."),
            (r"\.mixer\.(?=[qkvo]_)", ".self_attn."), (r"\.mixer\.", ".linear_attn.")],
    "mamba2": [(r"^embedding", "backbone.embeddings"), (r"^norm", "backbone.norm_f"), (r"^head", "lm_head"),
               (r"^layers", "backbone.layers"), (r"\.norm1\.", ".norm.")],
    "rwkv7": [(r"^embedding", "model.embeddings"), (r"^embed_norm", "model.layers.0.pre_norm"),
              (r"^norm", "model.norm"), (r"^head", "lm_head"), (r"^layers", "model.layers"),
              (r"\.norm1\.", ".attn_norm."), (r"\.norm2\.", ".ffn_norm."), (r"\.mixer\.", ".attn."),
              (r"\.mlp\.", ".ffn.")],
}
SKIPPED = ("model.visual.", "mtp.")       # Qwen3.5's image encoder and its multi-token predictor


def hub_name(architecture: str, name: str) -> str:
    """Our parameter's name -> its name in a checkpoint."""
    for pattern, theirs in HUB_NAMES[architecture]:
        name = re.sub(pattern, theirs, name)
    return name


def load(name_or_path: str, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> LanguageModel:
    """A model from a folder or a hub id ("Qwen/Qwen3.5-0.8B"): config.json and safetensors, no third-party model code.

    Reads Qwen3.5 (also the multimodal layout), Mamba-2 (transformers' and mamba_ssm's names) and RWKV-7 (fla's names).
    dtype: of the weights; the recurrence is fp32 always. Raises InputError for a missing network, file or tensor, an
    unexpected or wrongly shaped one, NaN or Inf in one, and for pickled weights.
    """
    folder = find_folder(name_or_path)
    try:
        with open(os.path.join(folder, "config.json"), encoding="utf-8") as f:
            config = json.load(f)
    except (OSError, json.JSONDecodeError) as error:
        raise InputError(f"{name_or_path}: no readable config.json ({error}); "
                         "give a folder or hub id that has one") from None
    tensors = read_tensors(folder, dtype)
    try:
        config = complete_config(config, tensors)
        with torch.device("meta"):              # shapes only: the file's tensors are then taken as they are, not copied
            model = build(config)
    except KeyError as missing:
        raise InputError(f"{folder}: config.json or the weights lack {missing}; "
                         f"is this a {config.get('model_type')} checkpoint?") from None
    weights = {}
    for ours, parameter in model.named_parameters():
        theirs = hub_name(model.architecture, ours)
        if theirs not in tensors:
            raise InputError(f"{folder}: tensor {theirs} is missing; "
                             "is the download complete, is config.json this model's?")
        tensor = tensors.pop(theirs)
        if tensor.shape != parameter.shape and tensor.squeeze().shape != parameter.shape:   # fla keeps x_r as [1, 1, D]
            raise InputError(f"{folder}: tensor {theirs} is {list(tensor.shape)}, config.json asks for "
                             f"{list(parameter.shape)}")
        if not tensor.isfinite().all():
            raise InputError(f"{folder}: tensor {theirs} holds NaN or Inf; download the file again")
        weights[ours] = tensor.reshape(parameter.shape)
    if model.head is None:
        tensors.pop("lm_head.weight", None)
    if tensors:
        raise InputError(f"{folder}: unexpected tensor {min(tensors)} ({len(tensors)} in all); the three known layouts "
                         "have no such name")
    model.load_state_dict(weights, assign=True)
    model.name, model.folder = str(name_or_path), folder
    return model.requires_grad_(False).eval().to(device)


def find_folder(name_or_path: str) -> str:
    """The folder itself, or a hub id's files, downloaded once into the hub's own cache."""
    if os.path.isdir(name_or_path):
        return name_or_path
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(name_or_path)):
        raise InputError(f"{name_or_path!r} is neither a folder nor a hub id (owner/name), "
                         "nor one of gdn, mamba2, rwkv7")
    import huggingface_hub
    import huggingface_hub.errors as hub_errors
    try:
        return huggingface_hub.snapshot_download(name_or_path,
                                                 allow_patterns=["*.json", "*.safetensors", "rwkv_vocab*.txt"])
    except (hub_errors.HfHubHTTPError, hub_errors.LocalEntryNotFoundError, hub_errors.HFValidationError,
            OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"{name_or_path} is no folder here and could not be fetched from the hub "
                         f"({type(error).__name__}: {reason[:120]}); check the name and the network, "
                         "or give a local folder") from None


def read_tensors(folder: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """Every tensor of a folder's safetensors files (model.safetensors, or the shards of its index),
    names made uniform."""
    from safetensors import SafetensorError, safe_open
    index, single = os.path.join(folder, "model.safetensors.index.json"), os.path.join(folder, "model.safetensors")
    if os.path.exists(index):
        with open(index, encoding="utf-8") as f:
            files = sorted(set(json.load(f)["weight_map"].values()))
    elif os.path.exists(single):
        files = ["model.safetensors"]
    else:
        pickles = [name for name in sorted(os.listdir(folder)) if name.endswith((".bin", ".pth", ".pt", ".ckpt"))]
        why = (f"{pickles[0]} is a pickle, which can run code when it is opened" if pickles else
               "no model.safetensors, no index")
        raise InputError(f"{folder}: {why}; take a safetensors conversion, such as AntonV/mamba2-370m-hf or "
                         "fla-hub/rwkv7-1.5B-world")
    tensors = {}
    for file in files:
        try:
            with safe_open(os.path.join(folder, file), "pt") as f:
                for name in f.keys():
                    uniform = name.replace("model.language_model.", "model.").replace(
                        "backbone.embedding.", "backbone.embeddings.")
                    if uniform.startswith(SKIPPED):
                        continue
                    if uniform.endswith(".attn.x_x"):                         # RWKV-7's six mixes packed as [6, ..., D]
                        packed = f.get_tensor(name).to(dtype)
                        tensors |= {uniform[:-1] + c: packed[i].reshape(-1) for i, c in enumerate("rwkvag")}
                    else:
                        tensors[uniform] = f.get_tensor(name).to(dtype)
        except (OSError, SafetensorError) as error:
            raise InputError(f"{os.path.join(folder, file)}: cannot be read ({error}); "
                             "is the download complete?") from None
    return tensors


def complete_config(config: dict, tensors: dict[str, Tensor]) -> dict:
    """Fill in what a config.json leaves to the tensors' shapes:
    mamba_ssm's sizes, RWKV-7's ranks, whether the head is tied."""
    shape = lambda name: tensors[name].shape
    text = dict(config.get("text_config", config))
    if "lm_head.weight" not in tensors:
        text["tie_word_embeddings"] = config["tie_word_embeddings"] = True
    if "ssm_cfg" in config:                                                         # mamba_ssm's config.json
        layer = "backbone.layers.0.mixer."
        inner, heads, groups = (shape(layer + "out_proj.weight")[1], shape(layer + "dt_bias")[0],
                                config["ssm_cfg"].get("ngroups", 1))
        text = dict(model_type="mamba2", hidden_size=config["d_model"], num_hidden_layers=config["n_layer"],
                    num_heads=heads,
                    head_dim=inner // heads, n_groups=groups, vocab_size=shape("backbone.embeddings.weight")[0],
                    state_size=(shape(layer + "conv1d.weight")[0] - inner) // (2 * groups),
                    conv_kernel=shape(layer + "conv1d.weight")[-1],
                    tie_word_embeddings="lm_head.weight" not in tensors or config.get("tie_embeddings", True))
        config = {}
    if str(config.get("model_type")).startswith("rwkv7"):
        if config.get("attn"):
            raise InputError("RWKV-7 with attention layers (config.json: attn) is not supported; "
                             "take a pure RWKV-7 checkpoint")
        rank = lambda c, layer: shape(f"model.layers.{layer}.attn.{c}_lora.lora.0.weight")[0]
        text |= dict(decay_low_rank_dim=rank("w", 0), a_low_rank_dim=rank("a", 0), gate_low_rank_dim=rank("g", 0),
                     v_low_rank_dim=rank("v", 1) if text["num_hidden_layers"] > 1 else 1,
                     head_dim=text.get("head_dim") or 64, intermediate_size=shape("model.layers.0.ffn.key.weight")[0])
    return {**config, "text_config": text, "model_type": config.get("model_type", text.get("model_type"))}


def save(model: LanguageModel, config: dict, folder: str, dtype: torch.dtype = torch.float32):
    """Write config.json and model.safetensors in the hub's layout, so that `load` and transformers open the folder."""
    from safetensors.torch import save_file
    os.makedirs(folder, exist_ok=True)
    weights = {hub_name(model.architecture, name): p.detach().cpu().to(dtype).contiguous()
               for name, p in model.named_parameters()}
    path = os.path.join(folder, "model.safetensors")
    save_file(weights, path + ".part", metadata={"format": "pt"})
    os.replace(path + ".part", path)
    with open(os.path.join(folder, "config.json"), "w", encoding="utf-8") as f:
        json.dump({**config, "dtype": str(dtype).removeprefix("torch.")}, f, indent=1)


# ---------------------------------------------------------------------------------------------------------------------
# 7. Text in and out, through the checkpoint's own tokenizer
# ---------------------------------------------------------------------------------------------------------------------
class WorldTokenizer:
    """RWKV World's vocabulary: at each point the longest entry that matches.
    Each line of its file: id, Python literal, bytes."""

    def __init__(self, path: str):
        self.bytes_of = {}
        with open(path, encoding="utf-8") as f:
            for line in f:
                index, rest = line.split(" ", 1)
                literal = ast.literal_eval(rest.rsplit(" ", 1)[0])
                self.bytes_of[int(index)] = literal.encode() if isinstance(literal, str) else literal
        self.id_of = {entry: index for index, entry in self.bytes_of.items()}
        self.longest = max(map(len, self.id_of))

    def encode(self, text: str) -> list[int]:
        """Text -> ids."""
        data, ids, at = text.encode(), [], 0
        while at < len(data):
            size = next(n for n in range(min(self.longest, len(data) - at), 0, -1) if data[at:at + n] in self.id_of)
            ids.append(self.id_of[data[at:at + size]])
            at += size
        return ids

    def decode(self, ids: list[int]) -> str:
        """Ids -> text; a character cut in two becomes U+FFFD."""
        return b"".join(self.bytes_of.get(i, b"") for i in ids).decode(errors="replace")


class HubTokenizer:
    """A tokenizer.json, through the `tokenizers` library, with no special tokens added."""

    def __init__(self, path: str):
        from tokenizers import Tokenizer
        self.tokenizer = Tokenizer.from_file(path)

    def encode(self, text: str) -> list[int]:
        """Text -> ids."""
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        """Ids -> text, special tokens shown."""
        return self.tokenizer.decode(ids, skip_special_tokens=False)


def load_tokenizer(model: LanguageModel) -> HubTokenizer | WorldTokenizer:
    """The tokenizer beside the model's weights. Raises InputError if its folder has none that is known."""
    path = os.path.join(model.folder, "tokenizer.json")
    if os.path.exists(path):
        return HubTokenizer(path)
    worlds = sorted(name for name in os.listdir(model.folder) if name.startswith("rwkv_vocab")
                    and name.endswith(".txt"))
    if worlds:
        return WorldTokenizer(os.path.join(model.folder, worlds[-1]))
    raise InputError(f"{model.folder}: neither tokenizer.json nor rwkv_vocab_v20230424.txt; "
                     "put the model's tokenizer there")
