"""WriteSAE: sparse autoencoders whose atoms are rank-1 matrices,
and the test whether an atom can stand for a real write.

A recurrent layer of Gated DeltaNet, Mamba-2 or RWKV-7 writes one rank-1 matrix k vᵀ per head and token (models.py). An
atom of this SAE has the same shape, A_i = key_dir_i value_dir_iᵀ, so it can take a write's place in the model's memory:

    rng = torch.Generator().manual_seed(0)
    sae = WriteSAE(n_atoms=1024, K=32, V=32)
    fit_alternating(sae, k, v, rng)                         # k [N, K], v [N, V]: any writes, no model needed
    records = replacement(model, sae, tokens, layer=1, head=0, positions=range(32, 96, 4), generator=rng)
    figures = summary(records, cosine_min=0.71, generator=rng)

Order of this file: matrices as factors - the SAE - its training - the replacement test - its figures - the logit-change
formula.

Reference: WriteSAE, arXiv 2605.12770 ("the paper"). States and writes are key first, [K, V], as in models.py.
"""
from __future__ import annotations

import json
import math
import os
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from models import (Cache, Edit, InputError, LanguageModel, StepInputs, Stream, propagate, recurrence_chunked, states,
                    wide)


# ---------------------------------------------------------------------------------------------------------------------
# 1. Matrices as factors
# ---------------------------------------------------------------------------------------------------------------------
class Factored(NamedTuple):
    """A matrix X = Σ_r keys_r values_rᵀ, kept as its factors:
    r = 1 for a write, K for a whole state, 1 + k for an SAE's residual.

    Norms and products of writes never form K x V numbers: they come from products of the factors.
    """
    keys: Tensor       # [..., r, K]
    values: Tensor     # [..., r, V]

    def rows(self, index) -> Factored:
        """Some of N matrices: keys [N, r, K] and values [N, r, V] at index (a slice or a tensor)."""
        return Factored(self.keys[index], self.values[index])

    def minus(self, other: Factored) -> Factored:
        """X − Y, by lining up the factors of both."""
        return Factored(torch.cat([self.keys, other.keys], -2), torch.cat([self.values, -other.values], -2))

    def matrix(self) -> Tensor:
        """X itself, [..., K, V]."""
        return self.keys.mT @ self.values


def write_of(k: Tensor, v: Tensor) -> Factored:
    """The write k vᵀ: k [..., K], v [..., V] -> r = 1."""
    return Factored(k.unsqueeze(-2), v.unsqueeze(-2))


def matrix_of(X: Tensor) -> Factored:
    """Any matrix X [..., K, V] = Σ_c unit_c X_cᵀ -> r = K."""
    return Factored(torch.eye(X.shape[-2], device=X.device, dtype=X.dtype).expand(*X.shape[:-1], X.shape[-2]), X)


def inner(X: Factored, Y: Factored) -> Tensor:
    """⟨X, Y⟩ = Σ_rs (keys_r · keys'_s)(values_r · values'_s), so inner(X, X) = ‖X‖², the squared Frobenius norm.
    -> [...]"""
    return ((X.keys @ Y.keys.mT) * (X.values @ Y.values.mT)).sum((-2, -1))


def cosine(X: Factored, Y: Factored) -> Tensor:
    """⟨X, Y⟩ / ‖X‖‖Y‖, 0 where one is zero. -> [...]"""
    return inner(X, Y) / (inner(X, X) * inner(Y, Y)).sqrt().clamp_min(1e-30)


def main_direction(X: Factored, steps: int = 4) -> tuple[Tensor, Tensor]:
    """Unit vectors (key, value) near X's leading singular pair, by power iteration; exact for a write.
    -> [..., K], [..., V]"""
    value = X.values.sum(-2)
    for _ in range(steps):
        key = F.normalize((X.keys * (X.values @ value.unsqueeze(-1))).sum(-2), dim=-1)
        value = F.normalize((X.values * (X.keys @ key.unsqueeze(-1))).sum(-2), dim=-1)
    return key, value


# ---------------------------------------------------------------------------------------------------------------------
# 2. The sparse autoencoder
# ---------------------------------------------------------------------------------------------------------------------
class WriteSAE(nn.Module):
    """A sparse autoencoder over K x V matrices X whose atoms are rank-1 matrices of unit norm (the paper's §3):

        A_i = key_dir_i value_dir_iᵀ         a = TopK_k(relu(e_iᵀ X f_i))         X̂ = Σ_i a_i A_i

    encoder "tied": (e_i, f_i) = (key_dir_i, value_dir_i), so a_i = ⟨A_i, X⟩, the atom's own least-squares coefficient.
    encoder "bilinear": e_i and f_i are weights of their own (the paper's BilinearSAE).
    There is no bias, so the SAE is homogeneous: twice the input, twice the coefficients.

    Norms and products are ⟨X, Y⟩ = tr(M_k X M_v Yᵀ). The two metrics are identities (Frobenius) unless `set_metric` is
    given others, such as `read_metric`'s, which weigh a direction of the state by how much the model's predictions heed
    it.

    On a write X = k vᵀ a score is ⟨e_i, k⟩⟨f_i, v⟩: K + V products instead of K·V. cfg (model, cell, source, metrics,
    ...) is saved with the weights; `WriteSAE.load(path)` needs nothing else. Raises InputError for an unknown encoder.
    """

    def __init__(self, n_atoms: int, K: int, V: int, k: int = 1, encoder: str = "tied", **cfg):
        super().__init__()
        if encoder not in ("tied", "bilinear"):
            raise InputError(f"encoder {encoder!r}: allowed are tied, bilinear")
        if not 1 <= k <= n_atoms:
            raise InputError(f"k = {k} active atoms of {n_atoms}: allowed is 1..{n_atoms}")
        self.cfg = dict(n_atoms=n_atoms, K=K, V=V, k=k, encoder=encoder, **cfg)
        self.n_atoms, self.k, self.encoder = n_atoms, k, encoder
        self.register_buffer("metric_k", torch.eye(K))
        self.register_buffer("metric_v", torch.eye(V))
        self.key_dir = nn.Parameter(torch.full((n_atoms, K), K ** -0.5))
        self.value_dir = nn.Parameter(torch.full((n_atoms, V), V ** -0.5))
        if encoder == "bilinear":
            self.enc_key = nn.Parameter(self.key_dir.detach().clone())
            self.enc_value = nn.Parameter(self.value_dir.detach().clone())

    @torch.no_grad()
    def set_metric(self, metric_k: Tensor, metric_v: Tensor):
        """Measure in these metrics from now on: symmetric positive definite, [K, K] and [V, V].
        Atoms are normalised anew."""
        self.metric_k.copy_(metric_k)
        self.metric_v.copy_(metric_v)
        self.normalise()

    def unit(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """k [..., K] and v [..., V], each brought to unit length in its metric: √(kᵀ M_k k) = 1."""
        length = lambda x, M: ((x @ M) * x).sum(-1, keepdim=True).clamp_min(1e-30).sqrt()
        return k / length(k, self.metric_k), v / length(v, self.metric_v)

    def measured(self, X: Factored) -> Factored:
        """M_k X M_v, so that inner(X, measured(Y)) is ⟨X, Y⟩ in the metrics."""
        return Factored(X.keys @ self.metric_k, X.values @ self.metric_v)

    @torch.no_grad()
    def place(self, which: Tensor, X: Factored):
        """Put the atoms `which` (indices) at the main directions of the matrices X, one each, unit norm,
        encoder included."""
        self.key_dir[which], self.value_dir[which] = self.unit(*main_direction(X))
        if self.encoder == "bilinear":   # k atoms that overlap would sum up to k times X: let each start with its share
            self.enc_key[which], self.enc_value[which] = self.key_dir[which] / self.k, self.value_dir[which]

    @torch.no_grad()
    def normalise(self):
        """Bring every atom back to unit norm."""
        key_dir, value_dir = self.unit(self.key_dir, self.value_dir)
        self.key_dir.copy_(key_dir)
        self.value_dir.copy_(value_dir)

    def scores(self, X: Factored) -> Tensor:
        """⟨e_i f_iᵀ, X⟩ for every atom: for a write ⟨e_i, k⟩⟨f_i, v⟩; with many factors X itself is the cheaper form.
        -> [..., n_atoms]"""
        e, f = (self.key_dir, self.value_dir) if self.encoder == "tied" else (self.enc_key, self.enc_value)
        X = self.measured(X)
        if X.keys.shape[-2] == 1:
            return ((X.keys @ e.T) * (X.values @ f.T)).squeeze(-2)
        return X.matrix().flatten(-2) @ (e.unsqueeze(-1) * f.unsqueeze(-2)).flatten(-2).T

    def encode(self, X: Factored) -> tuple[Tensor, Tensor]:
        """The active atoms, largest coefficient first: index [..., k], a [..., k] ≥ 0.
        The first one is the *dominant* atom."""
        a, index = self.scores(X).topk(self.k)
        return index, a.relu()

    def decode(self, index: Tensor, a: Tensor) -> Factored:
        """X̂ = Σ a_i A_i over the active atoms: index, a [..., k] -> r = k."""
        return Factored(self.key_dir[index], a.unsqueeze(-1) * self.value_dir[index])

    def residual(self, X: Factored, index: Tensor, a: Tensor) -> Factored:
        """X − X̂ -> r + k factors. Its `energy` is the loss: ‖X‖² − 2 Σ a_i ⟨A_i, X⟩ + Σ_ij a_i a_j ⟨A_i, A_j⟩."""
        return X.minus(self.decode(index, a))

    def energy(self, X: Factored) -> Tensor:
        """‖X‖² in the metrics. -> [...]"""
        return inner(X, self.measured(X))

    def forward(self, X: Factored) -> tuple[Factored, Tensor, Tensor]:
        """The residual X − X̂, and the active atoms with their coefficients."""
        index, a = self.encode(X)
        return self.residual(X, index, a), index, a

    def save(self, path: str):
        """Directions (fp16: three digits), metrics and cfg, in one safetensors file."""
        from safetensors.torch import save_file
        tensors = {name: x.detach().cpu().contiguous() for name, x in self.state_dict().items()}
        save_file({name: x if name.startswith("metric") else x.half() for name, x in tensors.items()}, path + ".part",
                  metadata={"cfg": json.dumps(self.cfg)})
        os.replace(path + ".part", path)

    @classmethod
    def load(cls, path: str) -> WriteSAE:
        """The SAE that `save` wrote. Raises InputError for a file that holds none."""
        from safetensors import SafetensorError, safe_open
        try:
            with safe_open(path, "pt") as f:
                sae = cls(**json.loads(f.metadata()["cfg"]))
                sae.load_state_dict({name: f.get_tensor(name).float() for name in f.keys()})
        except (OSError, SafetensorError, KeyError, TypeError, RuntimeError) as error:
            raise InputError(f"{path} holds no WriteSAE ({error}); train one: python run.py train --help") from None
        sae.normalise()
        return sae.requires_grad_(False)


# ---------------------------------------------------------------------------------------------------------------------
# 3. Training
# ---------------------------------------------------------------------------------------------------------------------
def best_atom(sae: WriteSAE, X: Factored, rows: int = 128) -> tuple[Tensor, Tensor]:
    """Each input's largest score and the atom that has it, [N] and [N], computed a block of rows at a time."""
    blocks = [sae.scores(X.rows(slice(i, i + rows))).max(-1) for i in range(0, len(X.keys), rows)]
    return torch.cat([b.values for b in blocks]), torch.cat([b.indices for b in blocks])


@torch.no_grad()
def fit_alternating(sae: WriteSAE, k: Tensor, v: Tensor, generator: torch.Generator, steps: int = 24,
                    sample: int = 100_000, memory: float = 0.75, progress=iter) -> list[float]:
    """Code each write by one atom, with closed-form updates: k-means whose centres are rank-1 directions.

    With one active atom, tied, the SAE's loss on a unit-norm write is ‖X − aA‖² = 1 − a².
    So each step draws `sample` writes and
        1. assigns each to the atom with the largest a = ⟨key_dir, k⟩⟨value_dir, v⟩ (products in the SAE's metrics);
        2. turns key_dir to Σ a ⟨value_dir, v⟩ k over the atom's writes, then value_dir to Σ a ⟨key_dir, k⟩ v: one
           round of power iteration, each side in closed form with the other held. The sums keep `memory` of what they
           held before, so that an atom rests on more writes than one step's;
        3. restarts atoms without a write at the writes that are coded worst.
    The family is known as gain-shape vector quantisation, and as sum-of-outer-products dictionary learning.

    k [N, K], v [N, V]. Trains sae (tied encoder) in place; returns the share of energy explained, mean a², of every
    step.
    """
    draw = lambda n: torch.randint(len(k), (n,), generator=generator).to(k.device)
    first = draw(sae.n_atoms)
    sae.place(torch.arange(sae.n_atoms), write_of(k[first], v[first]))
    key_sum, value_sum, count = (torch.zeros_like(sae.key_dir), torch.zeros_like(sae.value_dir),
                                 torch.zeros_like(sae.key_dir[:, :1]))
    history = []
    for _ in progress(range(steps)):
        pick = draw(sample)
        x, y = sae.unit(k[pick], v[pick])
        a, atom = best_atom(sae, write_of(x, y))
        gather = lambda total, rows: total.mul_(memory).index_add_(0, atom, rows)
        used = gather(count, torch.ones_like(a[:, None])).squeeze(-1) > 0.5
        weight = a * ((y @ sae.metric_v) * sae.value_dir[atom]).sum(-1)
        sae.key_dir[used] = gather(key_sum, weight[:, None] * x)[used]
        sae.normalise()
        weight = a * ((x @ sae.metric_k) * sae.key_dir[atom]).sum(-1)
        sae.value_dir[used] = gather(value_sum, weight[:, None] * y)[used]
        sae.normalise()
        unused = (~used).nonzero().squeeze(-1)
        worst = a.argsort()[:len(unused)]
        sae.place(unused, write_of(x[worst], y[worst]))
        for total in (key_sum, value_sum, count):
            total[unused] = 0
        history.append(a.square().mean().item())
    return history


def fit_gradient(sae: WriteSAE, X: Factored, generator: torch.Generator, steps: int = 2000, batch: int = 1024,
                 lr: float = 1e-3, dead_after: int = 100_000, k_aux: int = 64, progress=iter) -> list[float]:
    """Adam on the reconstruction error ‖X − X̂‖² / mean ‖X‖², for any k, encoder and source.

    An atom is dead once `dead_after` samples passed without it. Dead atoms get the auxiliary loss of arXiv 2406.04093:
    the k_aux best of them explain the residual, at 1/32 of the weight; four times in a run the dead restart at badly
    coded inputs.
    X: N matrices as factors. Trains sae in place; returns the unexplained share of energy (FVU without a mean) per
    step.
    """
    draw = lambda n: X.rows(torch.randint(len(X.keys), (n,), generator=generator).to(X.keys.device))
    sae.place(torch.arange(sae.n_atoms), draw(sae.n_atoms))
    sae.requires_grad_(True)
    optimiser = torch.optim.Adam(sae.parameters(), lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda i: min(1, (i + 1) / 50) * (0.1 + 0.9 * (1 - i / steps)))
    silent = torch.zeros(sae.n_atoms, device=X.keys.device)
    history = []
    for step in progress(range(steps)):
        x = draw(batch)
        energy = sae.energy(x).mean()
        R, index, a = sae(x)
        loss = fvu = sae.energy(R).mean() / energy
        silent += batch
        silent[index[a > 0]] = 0
        dead = (silent > dead_after).nonzero().squeeze(-1)
        if len(dead):
            score, best = sae.scores(R)[:, dead].topk(min(k_aux, len(dead)))
            R2 = sae.residual(R, dead[best], score.relu())
            loss = loss + sae.energy(R2).mean() / energy / 32
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        sae.normalise()
        if len(dead) and (step + 1) % max(1, steps // 5) == 0 and step + 1 < steps:
            R = Factored(*(side.detach() for side in R))
            worst = sae.energy(R).argsort(descending=True)[:len(dead)]
            sae.place(dead[:len(worst)], R.rows(worst))
            silent[dead[:len(worst)]] = 0
        history.append(fvu.item())
    sae.requires_grad_(False)
    return history


# ---------------------------------------------------------------------------------------------------------------------
# 4. The replacement test
# ---------------------------------------------------------------------------------------------------------------------
HORIZONS = 11     # effects are read at the write's own step and ten after it
# what stands in the state where the native write stood
CONDITIONS = ("atom", "delete", "random", "projected", "native")


def native_write(s: StepInputs, definition: str = "value", state: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The two factors of what each token writes: k [B, T, H, K] and v [B, T, H, V].
    state: before s's first token, None for zeros.

    "value": k vᵀ as in the recurrence (in Gated DeltaNet β k vᵀ).
    "delta": all that the token adds to the decayed state,
        k vᵀ − erase_out (S_{t-1}ᵀ erase_in)ᵀ
    which is rank 1 where erase_out is a multiple of k: in Gated DeltaNet (k times β(v − α S_{t-1}ᵀ k)), and trivially
    in Mamba-2.
    Raises InputError for "delta" in RWKV-7, where it has rank 2.
    """
    if definition not in ("value", "delta"):
        raise InputError(f"write {definition!r}: allowed are value, delta")
    if definition == "value" or s.erase_in is None:
        return s.k, s.v
    multiple = (s.erase_out * s.k).sum(-1, keepdim=True) / s.k.square().sum(-1, keepdim=True)
    if not torch.allclose(multiple * s.k, s.erase_out, atol=1e-4):
        raise InputError("write delta: this model erases along another direction than it writes (RWKV-7), "
                         "so the change has rank 2; take --write value")
    ahead = F.pad(s.erase_in[:, 1:], (0, 0, 0, 0, 0, 1))            # what token t+1 looks up, read at the end of step t
    found, _ = recurrence_chunked(s._replace(q=ahead), state)
    before = (torch.zeros_like(found[:, :1]) if state is None else
              torch.einsum("bhkv,bhk->bhv", state, s.erase_in[:, 0])[:, None])
    return s.k, s.v - multiple * torch.cat([before, found[:, :-1]], 1)


@torch.inference_mode()
def collect(model: LanguageModel, tokens: Tensor, layer: int, head: int, write: str = "value", source: str = "write",
            progress=iter, every: int = 16) -> Factored:
    """What a head writes over a text, to train on: all its native writes,
    or with source "state" every 16th of its states.

    tokens [n, T], run in batches of 16 up to the layer and no further. Returns N matrices as factors.
    """
    parts = []
    for batch in progress(tokens.split(16)):
        stream, _ = model.run(model.embed(batch), last=layer)
        s = model.step_inputs(stream, layer).slice(slice(None), slice(head, head + 1))
        if source == "write":
            k, v = native_write(s, write)
            parts.append(write_of(k.flatten(0, 2), v.flatten(0, 2)))
        else:
            parts.append(matrix_of(states(s)[:, every - 1::every].flatten(0, 2)))      # neighbours are nearly the same
    return Factored(*(torch.cat(side).clone() for side in zip(*parts)))


class Point(NamedTuple):
    """Where branches start: one position t of every passage of a batch, the window t..t+10, and what came before."""
    t: int
    stream: Stream          # at the edited layer's input, over the window
    cache: Cache            # native, up to the token before t; only the layers from the edited one up are filled
    s: StepInputs           # the six tensors of the edited head, H = 1, over the window
    state: Tensor           # [P, 1, K, V] of that head before t
    logits: Tensor          # [P, 11, vocab] native, from the whole passage in one pass

    def write(self, definition: str) -> Factored:
        """The native write at t (`native_write`), P of them."""
        return write_of(*(x[:, 0, 0] for x in native_write(self.s.slice(slice(0, 1)), definition, self.state)))

    def states(self) -> Tensor:
        """The head's native states after t..t+10, [P, 11, K, V]."""
        return states(self.s, self.state)[:, :, 0]

    def state_difference(self, change: Factored) -> Tensor:
        """‖δS_s‖ / ‖S_s‖ at s = t..t+10 if `change` is added to S_t: δS_s = A_s ... A_{t+1} δS_t. [P, 11]"""
        moved = [change.matrix()[:, None, None]]
        if self.s.q.shape[1] > 1:
            later = self.s.slice(slice(1, None))
            moved.append(states(later._replace(k=torch.zeros_like(later.k)), moved[0][:, 0]))
        return torch.cat(moved, 1)[:, :, 0].norm(dim=(-2, -1)) / self.states().norm(dim=(-2, -1))


def points(model: LanguageModel, tokens: Tensor, layer: int, head: int, positions, progress=iter):
    """Yield a Point for each of the increasing positions. One native pass below the edited layer serves them all.

    tokens [P, T]. Raises InputError for a cell that is none, and for a position without ten tokens after it.
    """
    model.check_cell(layer, head)
    P, T = tokens.shape
    positions = list(positions)
    if not positions or positions[0] < 1 or positions[-1] + HORIZONS > T:
        raise InputError(f"positions {positions[:1]}..{positions[-1:]} do not fit passages of {T} tokens: "
                         f"the last needs {HORIZONS - 1} after it")
    with torch.no_grad():
        stream, _ = model.run(model.embed(tokens), last=layer)
        s = model.step_inputs(stream, layer).slice(slice(None), slice(head, head + 1))
        logits = wide(model.unembed(model.run(stream, first=layer)[0]))
    cache, done = model.empty_cache(P), 0
    for t in progress(positions):
        with torch.no_grad():
            _, cache = model.run(stream.slice(slice(done, t)), cache, first=layer)
        done, window = t, slice(t, t + HORIZONS)
        yield Point(t, stream.slice(window), cache, s.slice(window), cache.layers[layer]["state"][:, head:head + 1],
                    logits[:, window])


def read_metric(model: LanguageModel, tokens: Tensor, layer: int, head: int, positions, generator: torch.Generator,
                ridge: float = 0.1, progress=iter) -> tuple[Tensor, Tensor]:
    """How much the model's next eleven predictions heed each direction of a head's state: M_k [K, K] and M_v [V, V].

    To second order the headline of the replacement test is a quadratic form in the change δS of the state,

        KL@0..10 = ½ ⟨δS, F δS⟩,    F = E[G Gᵀ] over vec(G),    G = ∂/∂S_t Σ_h log p(sampled token at t+h)     [K, V]

    F is the Fisher information. It is approximated by a Kronecker product (as in K-FAC and Shampoo): M_k ∝ E[G Gᵀ] over
    the keys' side, M_v ∝ E[Gᵀ G] over the values', each scaled to mean eigenvalue 1 and mixed with `ridge` of the
    identity. G comes from one backward pass: K edits at t with the unit keys and zero values, whose gradients are the
    rows of G.
    """
    K, V, P = model.layers[layer].mixer.K, model.layers[layer].mixer.V, len(tokens)
    M_k, M_v = torch.zeros(K, K, device=tokens.device), torch.zeros(V, V, device=tokens.device)
    for p in points(model, tokens, layer, head, positions, progress):
        rows = torch.zeros(K, P, V, device=tokens.device, requires_grad=True)
        edits = [Edit(layer, head, p.t, key, row) for key, row in zip(torch.eye(K, device=tokens.device), rows)]
        logp = model.unembed(model.run(p.stream, p.cache, edits, first=layer)[0]).float().log_softmax(-1)
        drawn = torch.multinomial(logp.detach().exp().flatten(0, 1).cpu(), 1, generator=generator).to(
            logp.device).view(P, HORIZONS, 1)
        G, = torch.autograd.grad(logp.gather(-1, drawn).sum(), rows)                # [K, P, V]
        M_k += torch.einsum("kpv,lpv->kl", G, G)
        M_v += torch.einsum("kpv,kpw->vw", G, G)
    mix = lambda M: M / M.diagonal().mean() + ridge * torch.eye(len(M), device=M.device)
    return mix(M_k), mix(M_v)


class Records(NamedTuple):
    """One row per tested position, N rows in all. KL in nats, per condition (in CONDITIONS' order) and horizon."""
    passage: Tensor             # [N]
    position: Tensor            # [N]
    atom: Tensor                # [N] the dominant atom
    coefficient: Tensor         # [N] its coefficient a, before --scale
    # [N] between the atom and the native write (Frobenius): its square is the share of energy explained
    cosine: Tensor
    cosine_read: Tensor         # [N] the same in the SAE's metrics
    kl: Tensor                  # [N, 5, 11] KL(base ‖ patched)
    kl_reverse: Tensor          # [N, 2, 11] KL(patched ‖ base), of atom and delete
    state_difference: Tensor    # [N, 11] ‖S_patched − S‖ / ‖S‖ of the edited head, the atom in the write's place


def replacements(sae: WriteSAE, k: Tensor, v: Tensor, atom: Tensor, a: Tensor, scale: str, generator: torch.Generator):
    """What each condition puts where the native write k vᵀ was: factors [5, N, K] and [5, N, V], in CONDITIONS' order.

    atom       a A               a: the activation, or by `scale` the write's norm, or the least-squares ⟨A, k vᵀ⟩
    delete     nothing
    random     a A_j             another atom of the dictionary, same coefficient
    projected  ⟨R, k vᵀ⟩ R       a random rank-1 direction R at its own least-squares coefficient: always nearer to
                                 the write than nothing is, and yet no stand-in for it; a win rate means something
                                 only above this one's
    native     k vᵀ              the write itself put back: the noise floor
    k [N, K], v [N, V], atom [N], a [N].
    """
    key, value = sae.key_dir[atom], sae.value_dir[atom]
    W, A = write_of(k, v), write_of(key, value)
    if scale not in ("activation", "norm", "least-squares"):
        raise InputError(f"scale {scale!r}: allowed are activation, norm, least-squares")
    if scale != "activation":
        a = (inner(W, W) / inner(A, A)).sqrt() if scale == "norm" else inner(W, A) / inner(A, A)
    a = a.unsqueeze(-1)
    other = (atom + torch.randint(1, sae.n_atoms, atom.shape, generator=generator).to(atom.device)) % sae.n_atoms
    direction = lambda x: F.normalize(torch.randn(x.shape, generator=generator), dim=-1).to(x)
    r, s = direction(k), direction(v)
    projected = ((r * k).sum(-1) * (s * v).sum(-1)).unsqueeze(-1)
    return (torch.stack([key, k, sae.key_dir[other], r, k]),
            torch.stack([a * value, 0 * v, a * sae.value_dir[other], projected * s, v]))


def kl_divergence(p: Tensor, q: Tensor) -> Tensor:
    """KL(p ‖ q) in nats from log-probabilities [..., vocab] -> [...].

    Σ p (e^d − 1 − d) with d = log q − log p. The added Σ p (e^d − 1) = Σ q − Σ p is zero, but now every term is ≥ 0 and
    of second order in d, so that an effect of 1e-9 nats is still read in fp32, where Σ p (log p − log q) ends at 1e-7.
    """
    d = q - p
    return (p.exp() * (d.expm1() - d)).sum(-1)


@torch.inference_mode()
def replacement(model: LanguageModel, sae: WriteSAE, tokens: Tensor, layer: int, head: int, positions,
                generator: torch.Generator, write: str = "value", source: str = "write", scale: str = "activation",
                progress=iter) -> Records:
    """Put an atom where a native write was, and see how far the model's predictions move over the next ten tokens.

    At each position t of `positions` (increasing, at least one, ten tokens left after the last) and in every passage:
        the SAE codes the write of (layer, head), or with source "state" the state after it; its dominant atom is A,
            with a > 0;
        for each condition a branch runs t..t+10 with the state's write exchanged: S_t − k vᵀ + replacement;
        KL(base ‖ branch) at each of the eleven steps.
    The exchange is two rank-1 edits (models.Edit), so a branch needs only the layers from `layer` up, the tokens from t
    on, and the native cache before t (`points`); the five branches of all passages run as one batch.

    tokens [P, T]. Returns P x len(positions) rows. Raises InputError for a cell that is none, or text that is too
    short.
    """
    P = len(tokens)
    # the branches' passages, one condition after the other
    every = torch.arange(P, device=tokens.device).repeat(len(CONDITIONS))
    rows = []
    for p in points(model, tokens, layer, head, positions, progress):
        W = p.write(write)
        k_t, v_t = W.keys[:, 0], W.values[:, 0]                                 # [P, K], [P, V]
        index, a = sae.encode(W if source == "write" else matrix_of(p.states()[:, 0]))
        atom, a = index[:, 0], a[:, 0]
        keys, values = replacements(sae, k_t, v_t, atom, a, scale, generator)   # [5, P, K], [5, P, V]

        edits = [Edit(layer, head, p.t, -k_t[every], v_t[every]),
                 Edit(layer, head, p.t, keys.flatten(0, 1), values.flatten(0, 1))]
        after, _ = model.run(p.stream.slice(slice(None), every), p.cache.rows(every), edits, first=layer)
        patched = model.unembed(after).float().log_softmax(-1).unflatten(0, (len(CONDITIONS), P))   # [5, P, 11, vocab]
        base = p.logits.log_softmax(-1).expand_as(patched)

        A = write_of(keys[0], values[0])
        rows.append(Records(
            passage=torch.arange(P), position=torch.full((P,), p.t), atom=atom.cpu(), coefficient=a.cpu(),
            cosine=cosine(A, W).cpu(),
            cosine_read=(inner(A, sae.measured(W)) / (sae.energy(A) * sae.energy(W)).sqrt().clamp_min(1e-30)).cpu(),
            kl=kl_divergence(base, patched).transpose(0, 1).cpu(),
            kl_reverse=kl_divergence(patched[:2], base[:2]).transpose(0, 1).cpu(),
            state_difference=p.state_difference(A.minus(W)).cpu()))
    return Records(*map(torch.cat, zip(*rows)))


# ---------------------------------------------------------------------------------------------------------------------
# 5. Its figures
# ---------------------------------------------------------------------------------------------------------------------
def wilson(wins: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """The Wilson 95 % interval of a rate, for n independent trials."""
    if n == 0:
        return math.nan, math.nan
    p, z2 = wins / n, z * z
    middle, half = p + z2 / (2 * n), z * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    return (middle - half) / (1 + z2 / n), (middle + half) / (1 + z2 / n)


def cluster_bootstrap(values: Tensor, cluster: Tensor, generator: torch.Generator,
                      draws: int = 1000) -> tuple[float, float]:
    """95 % interval of the mean of values [N] when whole clusters [N] (all firings of an atom,
    of a passage) are drawn again."""
    if len(values) == 0:
        return math.nan, math.nan
    _, group = cluster.unique(return_inverse=True)
    n = int(group.max()) + 1
    total = torch.zeros(n).index_add_(0, group, values.float())
    count = torch.bincount(group, minlength=n).float()
    pick = torch.randint(n, (draws, n), generator=generator)
    means = total[pick].sum(1) / count[pick].sum(1)
    low, high = means.quantile(torch.tensor([0.025, 0.975])).tolist()
    return low, high


def effect(records: Records, condition: str) -> Tensor:
    """kl@0..10: a condition's KL(base ‖ patched), summed over the write's step and the ten after it, in nats. [N]"""
    return records.kl[:, CONDITIONS.index(condition)].double().sum(-1)


def rates(atom: Tensor, delete: Tensor) -> dict[str, float]:
    """Of one effect (lower is better for `atom`), n rows each:

    win_rate: share of rows with KL_atom < KL_delete (0.5 = the atom is as good as nothing).
    recovered_pooled: 1 − ΣKL_atom / ΣKL_delete (1 = the write is restored, 0 = no better than nothing, < 0 = worse).
    recovered_median: the median of 1 − KL_atom / KL_delete.
    """
    if len(atom) == 0:
        return dict(win_rate=math.nan, recovered_pooled=math.nan, recovered_median=math.nan)
    return dict(win_rate=(atom < delete).double().mean().item(),
                recovered_pooled=(1 - atom.sum() / delete.sum()).item(),
                recovered_median=(1 - atom / delete.clamp_min(1e-30)).median().item())


def summary(records: Records, cosine_min: float, generator: torch.Generator) -> dict:
    """The test's figures. A firing is a row where the atom has a > 0 and a cosine of at least
    cosine_min with the write.

    Unless a name says otherwise they are about kl@0..10 at firings; "_all" is over every row, firing or not. coverage:
    the share of rows with a firing; a rate can be bought with silence, so by_coverage shows the curve
    (by_coverage_read: in the SAE's metrics).
    """
    fires = (records.coefficient > 0) & (records.cosine >= cosine_min)
    at = Records(*(x[fires] for x in records))
    kl = {name: effect(at, name) for name in CONDITIONS}
    wins = kl["atom"] < kl["delete"]
    every = rates(effect(records, "atom"), effect(records, "delete"))
    n = len(wins)
    atoms, group = at.atom.unique(return_inverse=True)
    per_atom = torch.zeros(len(atoms)).index_add_(0, group, wins.float()) / torch.bincount(group, minlength=len(atoms))
    quartile = (kl["delete"].argsort().argsort() * 4).div(max(n, 1), rounding_mode="floor")
    reverse = at.kl_reverse.double().sum(-1)
    horizon = lambda h: rates(at.kl[:, 0, h].double(), at.kl[:, 1, h].double())

    def by_coverage(threshold: float, cosine: Tensor) -> dict:
        chosen = (records.coefficient > 0) & (cosine >= threshold)
        r = rates(effect(records, "atom")[chosen], effect(records, "delete")[chosen])
        return dict(cosine_min=threshold, coverage=chosen.double().mean().item(), win_rate=r["win_rate"],
                    recovered_pooled=r["recovered_pooled"])

    return dict(
        n_positions=len(fires), n_firings=n, n_atoms=len(atoms), n_passages=len(at.passage.unique()),
        coverage=fires.double().mean().item(), **rates(kl["atom"], kl["delete"]), win_ci95=wilson(int(wins.sum()), n),
        win_ci95_by_atom=cluster_bootstrap(wins, at.atom, generator),
        win_ci95_by_passage=cluster_bootstrap(wins, at.passage, generator), per_atom_win_rate=per_atom.mean().item(),
        strict_order_rate=(wins & (kl["delete"] < kl["random"])).double().mean().item(),
        median_kl={name: x.median().item() if n else math.nan for name, x in kl.items()},
        projected_win_rate=(kl["projected"] < kl["delete"]).double().mean().item(),
        projected_recovered=rates(kl["projected"], kl["delete"])["recovered_pooled"],
        win_rate_reverse_kl=(reverse[:, 0] < reverse[:, 1]).double().mean().item(),
        win_rate_all=every["win_rate"], recovered_pooled_all=every["recovered_pooled"],
        recovered_median_all=every["recovered_median"],
        by_horizon=[dict(horizon=h, win_rate=horizon(h)["win_rate"], recovered_pooled=horizon(h)["recovered_pooled"],
                         state_difference=at.state_difference[:, h].mean().item()) for h in range(HORIZONS)],
        by_coverage=[by_coverage(c, records.cosine) for c in (-1.0, 0.3, 0.4, 0.5, 0.6, 0.71, 0.8, 0.9)],
        by_coverage_read=[by_coverage(c, records.cosine_read) for c in (-1.0, 0.5, 0.6, 0.71, 0.8, 0.9, 0.95)],
        failure_by_quartile=[(~wins[quartile == i]).double().mean().item() for i in range(4)])


# ---------------------------------------------------------------------------------------------------------------------
# 6. The logit-change formula: a ladder from the paper's three factors to the exact second order
# ---------------------------------------------------------------------------------------------------------------------
#: each rung's name, and the order in the edit's size to which it is exact (0: not even to the first)
RUNGS = (("three factors", 0), ("three factors, fitted", 0), ("exact transition", 0), ("direct path", 0),
         ("full Jacobian", 1), ("mean of two Jacobians", 2), ("exact head, mean of two", 2), ("exact head, Simpson", 4))


def logit_ladder(model: LanguageModel, p: Point, layer: int, head: int, change: Factored, targets: Tensor):
    """Eight predictions of how an edit of one head's state at t moves logits at t..t+10, and the measured change.

    The edit adds δS = Σ_r keys_r values_rᵀ, so the head's read moves by δo_s = Σ_r (u_s · q_s) values_r
    (models.propagate).

    1 three factors       u_s = (Π decay) keys: gates alone, no erase; logit = ⟨W_U[tok], W_O δo⟩: no norm, no gate
                          (the paper)
    2   ..., fitted       1 times one least-squares scalar per edit and token, over the eleven steps
                          (the paper's appendix)
    3 exact transition    u_s = A_s u_{s-1}: what the erase term is worth
    4 direct path         + the Jacobians of the head's norm and gate and of the final norm: what they are worth
    5 full Jacobian       d/dε logit(S + ε δS) at ε = 0: + the path through the later layers        exact to first order
    6 mean of two         ½ (d/dε at 0 + d/dε at 1), the trapezoid rule for ∫ d/dε from 0 to 1     exact to second order
    7 exact head          the change of the layer's output taken as it is, 6 for all that comes after it: a norm is
                          far from linear where a write is most of what it normalises
    8 exact head, Simpson the same with three Jacobians, at 0, ½ and 1: what is left is beyond second order

    change: keys [P, r, K], values [P, r, V]; targets [P, n] token ids. Returns predictions [8, P, 11, n], the
    measured change [P, 11, n], and the cosine [P, 11] of the layer's output with and without the edit.
    """
    block, cache = model.layers[layer], p.cache.layers[layer]
    pick = lambda logits: wide(logits).gather(-1, targets[:, None].expand(-1, HORIZONS, -1))
    jvp = lambda f, at, direction: torch.func.jvp(f, (at,), (direction,))[1]                        # f'(at) · direction
    mean_of_two = lambda f, at, direction: (jvp(f, at, direction) + jvp(f, at + direction, direction)) / 2
    simpson = lambda f, at, direction: (2 * mean_of_two(f, at, direction) + 4 * jvp(f, at + direction / 2, direction)) / 6

    edits = lambda size: [Edit(layer, head, p.t, key, size * value)
                          for key, value in zip(change.keys.unbind(1), change.values.unbind(1))]
    logits = lambda size: pick(model.unembed(model.run(p.stream, p.cache, edits(size), first=layer)[0]))
    zero, one = change.values.new_zeros(1), change.values.new_ones(1)
    measured = logits(one) - logits(zero)

    read = lambda s: sum(propagate(e.key, s)[0].unsqueeze(-1) * e.value.unsqueeze(1)
                         for e in edits(1.0))                                                            # δo [P, 11, V]
    W_O = block.mixer.out_weight[:, head]                                                                # [D, V]
    W_U = (model.embedding if model.head is None else model.head).weight[targets]                        # [P, n, D]
    linear = lambda delta_o: torch.einsum("pnd,dv,ptv->ptn", wide(W_U), wide(W_O), delta_o)
    three_factors = linear(read(p.s._replace(erase_in=None, erase_out=None)))
    fit = (three_factors * measured).sum(1, keepdim=True) / three_factors.square().sum(1, keepdim=True).clamp_min(1e-30)
    exact_transition = linear(read(p.s))

    s, rest, _ = block.mixer.inputs(block.norm1(p.stream.x), cache, p.stream.v_first)                    # all heads
    o, _ = recurrence_chunked(s, cache["state"])
    # [P, 11, H, V]
    delta_o = read(p.s).unsqueeze(2) * F.one_hot(torch.tensor(head), block.mixer.heads).to(o).unsqueeze(-1)
    output = lambda o: block.mixer.output(o, s, rest)
    last = model.run(p.stream, p.cache, first=layer)[0]
    direct_path = jvp(lambda x: pick(model.unembed(last._replace(x=x))), last.x, jvp(output, o, delta_o))

    above = lambda x: model.run(block.feed(Stream(x, p.stream.v_first), cache)[0], p.cache, first=layer + 1)[0]
    exact_head = lambda rule: rule(lambda x: pick(model.unembed(above(x))), p.stream.x + output(o),
                                   output(o + delta_o) - output(o))

    return (torch.stack([three_factors, fit * three_factors, exact_transition, direct_path, jvp(logits, zero, one),
                         mean_of_two(logits, zero, one), exact_head(mean_of_two), exact_head(simpson)]),
            measured, F.cosine_similarity(output(o), output(o + delta_o), dim=-1))


class Ladder(NamedTuple):
    """One row per firing, N in all; n tokens each. Logit changes in nats."""
    passage: Tensor          # [N]
    atom: Tensor             # [N]
    predicted: Tensor        # [N, 8, 11, n] one per rung
    measured: Tensor         # [N, 11, n]
    output_cosine: Tensor    # [N, 11] between the layer's output with and without the edit
    state_difference: Tensor # [N, 11] ‖δS‖ / ‖S‖ of the edited head


RANKS = (1, 2, 3, 4, 5, 10, 50)      # the tokens whose logits are predicted, by their rank at the write's own step


@torch.no_grad()
def ladder(model: LanguageModel, sae: WriteSAE, tokens: Tensor, layer: int, head: int, positions,
           change: str | float = "swap", cosine_min: float = 0.71, progress=iter) -> Ladder:
    """logit_ladder at every firing. change: "delete" takes the write out, "swap" puts a A in its place,
    a number ε adds ε A/‖A‖ to it."""
    rows = []
    for p in points(model, tokens, layer, head, positions, progress):
        W = p.write(sae.cfg.get("write", "value"))
        index, a = sae.encode(W if sae.cfg.get("source", "write") == "write" else matrix_of(p.states()[:, 0]))
        index, a = index[:, :1], a[:, :1]
        A, A_1 = sae.decode(index, a), sae.decode(index, torch.ones_like(a))
        if change == "delete":
            edit = Factored(-W.keys, W.values)
        elif change == "swap":
            edit = A.minus(W)
        else:
            edit = A_1._replace(values=A_1.values * (change / inner(A_1, A_1).sqrt())[:, None, None])
        fires = ((a[:, 0] > 0) & (cosine(A, W) >= cosine_min)).cpu()
        targets = p.logits[:, 0].topk(max(RANKS)).indices[:, torch.tensor(RANKS) - 1]
        predicted, measured, output_cosine = logit_ladder(model, p, layer, head, edit, targets)
        rows.append(Ladder(*(x.cpu()[fires] for x in (
            torch.arange(len(tokens)), index[:, 0], predicted.transpose(0, 1), measured, output_cosine,
            p.state_difference(edit)))))
    return Ladder(*map(torch.cat, zip(*rows)))


def agreement(y: Tensor, y_hat: Tensor) -> dict[str, float]:
    """How well y_hat predicts y, any shape, nothing fitted.

    r2: 1 − Σ(y − ŷ)² / Σ(y − mean y)², about the line y = ŷ (1 is perfect, 0 no better than the mean, negative worse).
    slope: of the least-squares line y = slope·ŷ (1 if sizes are right). pearson: correlation.
    sign_agreement: share of equal signs.
    """
    y, y_hat = y.double().flatten(), y_hat.double().flatten()
    if len(y) < 2:
        return dict(r2=math.nan, slope=math.nan, pearson=math.nan, sign_agreement=math.nan)
    r2 = 1 - (y - y_hat).square().sum() / (y - y.mean()).square().sum()
    return dict(r2=r2.item(), slope=((y * y_hat).sum() / y_hat.square().sum()).item(),
                pearson=torch.corrcoef(torch.stack([y, y_hat]))[0, 1].item(),
                sign_agreement=(y.sign() == y_hat.sign()).double().mean().item())


def ladder_summary(swap: Ladder, delete: Ladder, sizes: dict[float, Ladder], training: Ladder) -> list[dict]:
    """A dict per rung: `agreement` of the swap at natural size, and R² for other edits, atoms, horizons,
    ranks and texts.

    swap, delete, training: ladders of those edits (training: swap, on training text); sizes: of an added atom, by its
    norm. r2_per_atom: each atom's R² over its firings, tokens and steps; the median and the quartiles, as the
    paper gives them.
    """
    def r2(ladder: Ladder, rung: int, rows=slice(None), horizon=slice(None), rank=slice(None)) -> float:
        part = lambda x: x[rows][:, horizon][..., rank]                      # [N, 11, n] -> some of it
        return agreement(part(ladder.measured), part(ladder.predicted[:, rung]))["r2"]

    atoms, rungs = swap.atom.unique(), []
    for i, (name, order) in enumerate(RUNGS):
        per_atom = torch.tensor([r2(swap, i, rows=swap.atom == atom) for atom in atoms])
        low, median, high = (per_atom.nanquantile(torch.tensor([0.25, 0.5, 0.75])).tolist() if len(atoms) else
                             [math.nan] * 3)
        rungs.append(dict(
            name=name, order=order, fitted="fitted" in name, **agreement(swap.measured, swap.predicted[:, i]),
            r2_delete=r2(delete, i), r2_small=r2(sizes[0.1], i),
            r2_by_size={str(size): r2(x, i) for size, x in sizes.items()},
            r2_training_text=r2(training, i), r2_per_atom=dict(median=median, low=low, high=high, n_atoms=len(atoms)),
            by_horizon=[r2(swap, i, horizon=h) for h in range(HORIZONS)],
            by_rank={str(rank): r2(swap, i, rank=j) for j, rank in enumerate(RANKS)}))
    return rungs
