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
formula - steering - erasing.

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
    return max((middle - half) / (1 + z2 / n), 0.0), min((middle + half) / (1 + z2 / n), 1.0)


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
    simpson = lambda f, at, direction: (2 * mean_of_two(f, at, direction)
                                        + 4 * jvp(f, at + direction / 2, direction)) / 6

    edits = lambda size: [Edit(layer, head, p.t, key, size * value)
                          for key, value in zip(change.keys.unbind(1), change.values.unbind(1))]
    logits = lambda size: pick(model.unembed(model.run(p.stream, p.cache, edits(size), first=layer)[0]))
    zero, one = change.values.new_zeros(1), change.values.new_ones(1)
    measured = logits(one) - logits(zero)

    read = lambda s: sum(propagate(e.key.unsqueeze(1), s)[0] * e.value.unsqueeze(1)
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


# ---------------------------------------------------------------------------------------------------------------------
# 7. Steering: edits of the cache that make a token appear
# ---------------------------------------------------------------------------------------------------------------------
EDITED = 3                                       # positions edited: the prompt's last three
NEW = 20                                         # tokens decoded after them
KEY_SIDES = ("write", "read")
VALUE_SIDES = ("formula", "gradient", "ascent")
#: (prompt, target) pairs by the target's rank for the first new token, and by whether it stands in the prompt:
#: name -> lowest rank, highest rank (None: the last), in the prompt
STRATA = {"100-1000": (100, 1000, True), "rarer": (1001, None, True), "frequent": (2, 99, True),
          "absent": (100, 1000, False)}


class Prompts(NamedTuple):
    """N prompts as the unedited model reads them. Edits go to their last n positions."""
    last: Tensor                     # [N, n] the tokens there
    cache: Cache                     # before those tokens
    after: Cache                     # after them
    logits: Tensor                   # [N, vocab] of the first new token
    steps: dict[int, StepInputs]     # of each recurrent layer, over the n positions, all heads

    def rows(self, index: Tensor) -> Prompts:
        """These prompts, in this order, repeats allowed. index [m]."""
        return Prompts(self.last[index], self.cache.rows(index), self.after.rows(index), self.logits[index],
                       {layer: StepInputs(*(None if x is None else x[index] for x in s))
                        for layer, s in self.steps.items()})


@torch.no_grad()
def read_prompts(model: LanguageModel, tokens: Tensor, n: int = EDITED) -> Prompts:
    """Read prompts [N, T] natively, and remember what an edit of their last n positions needs."""
    N, T = tokens.shape
    if T < n:
        raise InputError(f"the prompt has {T} tokens, its last {n} are edited: give a longer one")
    last, cache = tokens[:, T - n:], model(tokens[:, :T - n])[1] if T > n else model.empty_cache(N)
    logits, after = model(last, cache)
    stream, steps = model.embed(last), {}
    for i, block in enumerate(model.layers):
        if block.recurrent:
            steps[i] = model.step_inputs(stream, i, cache)
        stream, _ = model.run(stream, cache, first=i, last=i + 1)
    return Prompts(last, cache, after, wide(logits[:, -1]), steps)


class Pairs(NamedTuple):
    """What is asked for, one row per pair."""
    prompt: Tensor      # [N] which prompt
    target: Tensor      # [N] the token that is to appear after it
    stratum: Tensor     # [N] index into STRATA


def draw_targets(logits: Tensor, tokens: Tensor, each: int, generator: torch.Generator) -> Pairs:
    """Up to `each` targets per prompt and stratum, drawn evenly and without repeats.

    logits [P, vocab] of the first new token, tokens [P, T] the prompts.
    """
    rank = logits.argsort(-1, descending=True).argsort(-1) + 1
    inside = torch.zeros_like(rank, dtype=torch.bool).scatter(1, tokens, True)
    pairs = []
    for j, (low, high, in_prompt) in enumerate(STRATA.values()):
        allowed = (rank >= low) & (rank <= (high or rank.shape[1])) & (inside == in_prompt)
        for i, row in enumerate(allowed.cpu()):
            candidates = row.nonzero().squeeze(-1)
            pick = candidates[torch.randperm(len(candidates), generator=generator)[:each]]
            pairs += [(i, target, j) for target in pick.tolist()]
    return Pairs(*torch.tensor(pairs, dtype=torch.long, device=logits.device).view(-1, 3).T)


class Site(NamedTuple):
    """Where one layer is edited: n positions of E of its heads, in N prompts. An edit is key valueᵀ.

    Keys are as long as the write that stands there is large (Frobenius, ‖k‖‖v‖), so that the length of a value is the
    edit's *magnitude*: how many times as large as that write it is.
    """
    layer: int
    heads: list[int]
    key: Tensor      # [N, n, E, K]
    gain: Tensor     # [N, n, E] how far a value of length 1 moves the read of the prompt's last token

    def rows(self, index: Tensor) -> Site:
        """The site in these prompts, in this order, repeats allowed. index [m]."""
        return self._replace(key=self.key[index], gain=self.gain[index])


def read_key(s: StepInputs) -> Tensor:
    """The unit key under which a value added at s's first token is weighed most by all the reads of s. [N, E, K]

    An edit κ yᵀ at t moves the read at s ≥ t by (u_s · q_s) y with u_s = A_s ... A_{t+1} κ (models.propagate). So its
    gain is linear in κ: κ · b_s with b_s = A_{t+1}ᵀ ... A_sᵀ q_s. The squared gains sum to κᵀ (Σ_s b_s b_sᵀ) κ, largest
    at the leading eigenvector. The b_s come from propagating the K unit keys; with one read left, κ is its query. The
    sign is the one that makes the sum of the gains positive.
    """
    N, _, E, K = s.q.shape
    each = torch.arange(E, device=s.q.device).repeat_interleave(K)                        # every head K times,
    unit = torch.eye(K).to(s.q).repeat(E, 1).expand(N, -1, -1)                            # with one unit key each
    b = propagate(unit, s.slice(slice(None), each))[0].unflatten(-1, (E, K))              # [N, T, E, K]
    key = torch.linalg.eigh(torch.einsum("ntek,ntel->nekl", b, b))[1][..., -1]
    return key * torch.where((key * b.sum(1)).sum(-1, keepdim=True) < 0, -1.0, 1.0)


@torch.no_grad()
def edit_sites(model: LanguageModel, prompts: Prompts, cells: list[tuple[int, int]], key: str = "write") -> list[Site]:
    """The sites of the (layer, head) cells, one per layer.

    key "write": edits are filed under the key that their position itself writes with. "read": under the one that the
    reads from there to the prompt's end, which make the next token, weigh most (`read_key`).
    """
    sites = []
    for layer in sorted({layer for layer, _ in cells}):
        heads = [h for i, h in cells if i == layer]
        for head in heads:
            model.check_cell(layer, head)
        s = prompts.steps[layer].slice(slice(None), heads)
        later = [s.slice(slice(t, None)) for t in range(s.q.shape[1])]
        unit = F.normalize(s.k, dim=-1) if key == "write" else torch.stack([read_key(x) for x in later], 1)
        keys = unit * (s.k.norm(dim=-1) * s.v.norm(dim=-1)).unsqueeze(-1)
        gain = torch.stack([propagate(k, x)[0][:, -1] for k, x in zip(keys.unbind(1), later)], 1)
        sites.append(Site(layer, heads, keys, gain))
    return sites


def edits_at(sites: list[Site], values: list[Tensor], start: int) -> list[Edit]:
    """The edits key valueᵀ of all sites, the first position at `start`. values: [N, n, E, V] per site."""
    return [Edit(site.layer, head, start + t, key, value) for site, y in zip(sites, values)
            for t, (keys, ys) in enumerate(zip(site.key.unbind(1), y.unbind(1)))
            for head, key, value in zip(site.heads, keys.unbind(1), ys.unbind(1))]


def sized(values: list[Tensor], magnitude: float, shared: bool = False) -> list[Tensor]:
    """The same values with each of length `magnitude`; or, if it is shared, with all lengths of a prompt's edits
    in proportion and their squares summing to magnitude². values: [N, n, E, V] per site."""
    if not shared:
        return [magnitude * F.normalize(y, dim=-1) for y in values]
    total = sum(y.square().sum((1, 2, 3)) for y in values).sqrt().clamp_min(1e-30)
    return [y * (magnitude / total)[:, None, None, None] for y in values]


def gradient(model: LanguageModel, prompts: Prompts, sites: list[Site], targets: Tensor,
             values: list[Tensor] | None = None, score=lambda logits: logits) -> list[Tensor]:
    """∂ score(logits)[target] / ∂ value of every edit, at the prompt's end: exact, from one backward pass.
    targets [N]; values: where it is taken, default zero (no edit yet). [N, n, E, V] per site."""
    zeros = lambda site: site.key.new_zeros(*site.gain.shape, model.layers[site.layer].mixer.V)
    with torch.enable_grad():
        values = [y.detach().requires_grad_() for y in values or map(zeros, sites)]
        logits, _ = model(prompts.last, prompts.cache, edits_at(sites, values, prompts.cache.length))
        chosen = score(wide(logits[:, -1])).gather(-1, targets[:, None])
        return list(torch.autograd.grad(chosen.sum(), values))


def slopes(model: LanguageModel, prompts: Prompts, sites: list[Site], targets: Tensor, kind: str) -> list[Tensor]:
    """How the target's logit at the prompt's end rises with each edit's value, to first order: [N, n, E, V] per site.

    "formula": gain · W_Oᵀ W_U[target], rung 3 of `logit_ladder` (the paper's three factors, the transition exact): what
        the head's slice W_O of the output map and the output embedding W_U see of the read.
    "gradient": rung 5, all that comes after the read included.
    """
    if kind == "gradient":
        return gradient(model, prompts, sites, targets)
    W_U = wide((model.embedding if model.head is None else model.head).weight[targets])                 # [N, D]
    W_O = lambda site: wide(model.layers[site.layer].mixer.out_weight[:, site.heads])                   # [D, E, V]
    return [site.gain.unsqueeze(-1) * torch.einsum("nd,dev->nev", W_U, W_O(site)).unsqueeze(1) for site in sites]


def ascent(model: LanguageModel, prompts: Prompts, sites: list[Site], targets: Tensor, directions: list[Tensor],
           magnitude: float, shared: bool = False, steps: int = 20) -> list[Tensor]:
    """Values of the same size (`sized`) that raise log p(target) further: from `directions`, each step turns them
    towards the unit gradient, by less and less, and brings them back to size."""
    values = sized(directions, magnitude, shared)
    for i in range(steps):
        up = gradient(model, prompts, sites, targets, values, score=lambda logits: logits.log_softmax(-1))
        turned = [y + (1 - i / steps) * g for y, g in zip(sized(values, 1, shared), sized(up, 1, shared))]
        values = sized(turned, magnitude, shared)
    return values


def steering_values(model: LanguageModel, prompts: Prompts, sites: list[Site], targets: Tensor, kind: str,
                    magnitude: float, shared: bool = False, generator: torch.Generator | None = None) -> list[Tensor]:
    """The values of the edits of these sites, of this size (`sized`): along the slopes of the "formula" or the
    "gradient", by "ascent", or in a "random" direction, the control."""
    if kind == "random":
        V = lambda site: model.layers[site.layer].mixer.V
        return sized([torch.randn(*site.gain.shape, V(site), generator=generator).to(site.gain) for site in sites],
                     magnitude, shared)
    slope = slopes(model, prompts, sites, targets, "formula" if kind == "formula" else "gradient")
    return (ascent(model, prompts, sites, targets, slope, magnitude, shared) if kind == "ascent" else
            sized(slope, magnitude, shared))


def best_writes(sites: list[Site], slope: list[Tensor], n: int) -> list[Site]:
    """The same sites, but only the n edits of each prompt with the largest slopes keep their key;
    those of the others become zero."""
    lift = torch.cat([g.norm(dim=-1).flatten(1) for g in slope], 1)                             # [N, all edits]
    chosen = torch.zeros_like(lift).scatter(1, lift.topk(min(n, lift.shape[1])).indices, 1.0)
    parts = chosen.split([site.gain[0].numel() for site in sites], 1)
    return [site._replace(key=site.key * part.view_as(site.gain).unsqueeze(-1)) for site, part in zip(sites, parts)]


class Continuation(NamedTuple):
    """What the model says after a prompt, one row per (prompt, target)."""
    tokens: Tensor      # [N, 20] decoded greedily
    count: Tensor       # [N] how often the target is among them
    rank: Tensor        # [N, 20] the target's rank for each of them, 1 = most probable
    log_p: Tensor       # [N, 20] its log-probability there, in nats
    kl: Tensor          # [N] KL(unedited ‖ edited) per token of an unrelated text that is read instead
    nll: Tensor         # [N] −log p of the decoded tokens under the unedited model, nats per token
    size: Tensor        # [N] √Σ‖edit‖² / √Σ‖S‖²: all edits against all states of the unedited cache (Frobenius)


@torch.no_grad()
def steer(model: LanguageModel, prompts: Prompts, pairs: Pairs, unrelated: Tensor, cells=(), key: str = "write",
          value: str | None = None, magnitude: float = 0.0, shared: bool = False, writes: int | None = None,
          generator: torch.Generator | None = None) -> Continuation:
    """Add edits to the cache while the prompts' last tokens are read, then decode.

    cells: the (layer, head) pairs that are edited, at each of the prompts' last n positions. key: see `edit_sites`.
    value: see `steering_values`; None leaves the cache as it is. magnitude, shared: see `sized`. writes: only so many
    of the edits, the best to first order. unrelated [P, U]: another text for each prompt, which is read in place of a
    continuation to see what else the edit changes.
    Raises InputError for a cell that is none, an unknown side, a magnitude that is negative or not finite.
    """
    if key not in KEY_SIDES or value not in (None, "random", *VALUE_SIDES):
        raise InputError(f"key side {key!r}, value side {value!r}: allowed are {', '.join(KEY_SIDES)}, and "
                         f"{', '.join(VALUE_SIDES)}, random")
    if not 0 <= magnitude < math.inf:
        raise InputError(f"magnitude {magnitude}: allowed are finite numbers from 0")
    all_sites, parts = edit_sites(model, prompts, cells, key), []
    batch = max(1, 30_000_000 // ((NEW + unrelated.shape[1]) * model.vocab))           # some 120 MB of logits at once
    for part in torch.arange(len(pairs.target), device=model.device).split(batch):
        row, target = pairs.prompt[part], pairs.target[part]
        native, sites = prompts.rows(row), [site.rows(row) for site in all_sites]
        if writes is not None:
            sites = best_writes(sites, slopes(model, native, sites, target, "gradient"), writes)
        values = (steering_values(model, native, sites, target, value, magnitude, shared, generator) if value else [])

        logits, after = model(native.last, native.cache, edits_at(sites, values, native.cache.length))
        tokens, logits = model.generate(logits[:, -1], after, NEW)
        log_p = wide(logits).log_softmax(-1)                                                            # [n, 20, vocab]
        log_p_target = log_p.gather(-1, target[:, None, None].expand(-1, NEW, -1))
        each, of_row = row.unique(return_inverse=True)                  # unedited, the other text is one per prompt
        quiet = wide(model(unrelated[each], prompts.after.rows(each))[0]).log_softmax(-1)[of_row]   # [n, U, vocab]
        moved = wide(model(unrelated[row], after)[0]).log_softmax(-1)
        # [n, 20, vocab] what the unedited model would have said at each step of the edited continuation
        judge = torch.cat([native.logits[:, None], wide(model(tokens[:, :-1], native.after)[0])], 1)
        edited = sum((site.key.square().sum(-1) * y.square().sum(-1)).sum((1, 2)) for site, y in zip(sites, values))
        states = sum(native.after.layers[i]["state"].square().sum((1, 2, 3)) for i in native.steps)
        parts.append(Continuation(
            tokens, count=(tokens == target[:, None]).sum(-1), rank=(log_p > log_p_target).sum(-1) + 1,
            log_p=log_p_target[..., 0], kl=kl_divergence(quiet, moved).mean(-1),
            nll=F.cross_entropy(judge.transpose(1, 2), tokens, reduction="none").mean(-1),
            size=(edited / states).sqrt()))
    return Continuation(*(torch.cat(column).cpu() for column in zip(*parts)))


def rate_ci95(wins: Tensor, cluster: Tensor, generator: torch.Generator) -> tuple[float, float]:
    """The 95 % interval of a rate: whole clusters drawn again, and no narrower than Wilson's, which has a width at 0
    and 100 % too. wins, cluster [N]."""
    low, high = zip(cluster_bootstrap(wins, cluster, generator), wilson(int(wins.sum()), len(wins)))
    return min(low), max(high)


def steering_summary(edited: Continuation, native: Continuation, random: Continuation, prompt: Tensor,
                     generator: torch.Generator) -> dict:
    """Figures of one kind of edit over N pairs. prompt [N]: the 95 % intervals draw whole prompts again.

    *_rate: share of continuations that hold the target: edited, native (unedited), random (values of a random
    direction, the same keys and norms). rank_improved: share of ranks that fell. median_rank_shift: rank before minus
    after. first_step_lift_nats: mean rise of log p(target) for the first new token. occurrences: mean count of the
    target in 20 tokens. kl_unrelated: mean KL per token of unrelated later text. perplexity: exp of the mean nll of
    the continuation under the unedited model.
    """
    figures = dict(n_pairs=len(prompt), n_prompts=len(prompt.unique()))
    for name, c in dict(native=native, edited=edited, random=random).items():
        holds = c.count > 0
        figures[f"{name}_rate"] = holds.double().mean().item()
        figures[f"{name}_ci95"] = rate_ci95(holds, prompt, generator)
        figures[f"{name}_perplexity"] = c.nll.mean().exp().item()
        if name != "native":
            figures[f"{name}_kl_unrelated"] = c.kl.mean().item()
    shift = (native.rank - edited.rank)[:, 0].double()
    return figures | dict(
        rank_improved=(shift > 0).double().mean().item(), median_rank_shift=shift.median().item(),
        median_rank=edited.rank[:, 0].median().item(),
        first_step_lift_nats=(edited.log_p - native.log_p)[:, 0].mean().item(),
        random_lift_nats=(random.log_p - native.log_p)[:, 0].mean().item(),
        occurrences=edited.count.double().mean().item())


@torch.no_grad()
def sign_test(model: LanguageModel, prompts: Prompts, sites: list[Site], targets: Tensor, kind: str):
    """Predicted and measured change of the target's logit when edits of the natural size (magnitude 1) along the
    slopes are added, and when they are subtracted: both [2N], in nats."""
    slope = slopes(model, prompts, sites, targets, kind)
    values = sized(slope, 1.0)
    predicted = sum((g * y).sum((1, 2, 3)) for g, y in zip(slope, values))
    logit = lambda edits: wide(model(prompts.last, prompts.cache, edits)[0][:, -1]).gather(-1, targets[:, None])[:, 0]
    native, start = logit(()), prompts.cache.length
    measured = [logit(edits_at(sites, [sign * y for y in values], start)) - native for sign in (1, -1)]
    return torch.cat([predicted, -predicted]), torch.cat(measured)


# ---------------------------------------------------------------------------------------------------------------------
# 8. Erasing: the same edit with the other sign, an atom's write taken out
# ---------------------------------------------------------------------------------------------------------------------
@torch.no_grad()
def taken_out(model: LanguageModel, tokens: Tensor, layer: int, head: int, passage: Tensor, position: Tensor,
              X: Factored, progress=iter):
    """Take the matrix X_i out of the head's state right after the write at passage_i, position_i, for N events.

    tokens [P, T]; passage, position [N]; X with r = 1. Yields (events, change) position by position: indices [n], and
    log p(edited) − log p(native) for every token, the mean over the write's step and the ten after it, [n, vocab].
    """
    batch = max(1, 60_000_000 // (tokens.shape[1] * model.vocab))
    for start in range(0, len(tokens), batch):
        inside = (passage >= start) & (passage < start + batch)
        if not inside.any():
            continue
        for p in points(model, tokens[start:start + batch], layer, head, position[inside].unique().tolist(), progress):
            events = (inside & (position == p.t)).nonzero().squeeze(-1)
            row, out = passage[events] - start, X.rows(events)
            edit = Edit(layer, head, p.t, -out.keys[:, 0], out.values[:, 0])
            after, _ = model.run(p.stream.slice(slice(None), row), p.cache.rows(row), [edit], first=layer)
            change = wide(model.unembed(after)).log_softmax(-1) - p.logits[row].log_softmax(-1)
            yield events, change.mean(1)


@torch.no_grad()
def dominant(model: LanguageModel, sae: WriteSAE, tokens: Tensor, layer: int, head: int,
             cosine_min: float) -> tuple[Factored, Tensor, Tensor, Tensor]:
    """Over a text [P, T]: the head's writes (r = 1, [P, T, ·]), the dominant atom of each, its coefficient, and whether
    it fires there (coefficient > 0, cosine at least cosine_min), [P, T] each."""
    stream, _ = model.run(model.embed(tokens), last=layer)
    s = model.step_inputs(stream, layer).slice(slice(None), slice(head, head + 1))
    W = write_of(*(x[:, :, 0] for x in native_write(s, sae.cfg.get("write", "value"))))
    a, atom = (x.view(tokens.shape) for x in best_atom(sae, Factored(*(x.flatten(0, 1) for x in W))))
    return W, atom, a, (a > 0) & (cosine(write_of(sae.key_dir[atom], sae.value_dir[atom]), W) >= cosine_min)


class Erased(NamedTuple):
    """One row per firing in the test passages: changes of the promoted token's log-probability, mean over eleven steps,
    in nats."""
    atom: Tensor          # [N] index into the tested atoms
    passage: Tensor       # [N]
    firing: Tensor        # [N] a A taken out where the atom fires
    elsewhere: Tensor     # [N] the same a A taken out at a random position where the atom does not fire
    own_share: Tensor     # [N] taken out there: only as much of A as that position's write holds, max(⟨A, k vᵀ⟩, 0)


@torch.no_grad()
def erasure(model: LanguageModel, sae: WriteSAE, tokens: Tensor, layer: int, head: int, positions: range,
            generator: torch.Generator, cosine_min: float = 0.71, n_atoms: int = 20, most: int = 75,
            progress=iter) -> tuple[Tensor, Tensor, Erased]:
    """Does an atom promote a token? Take it out and see.

    On the even passages: the n_atoms that fire most, and for each the token whose log-probability falls most, on the
    mean over up to `most` of its firings, when a A is taken out of the state. On the odd passages: how that token's
    log-probability changes then, and at as many positions where the atom does not fire.

    tokens [P, T]; positions: where writes are looked at. Returns atoms [n_atoms], their tokens [n_atoms], and the
    changes. Raises InputError where no atom fires in both halves.
    """
    even, odd = tokens[::2], tokens[1::2]
    chosen_in, tested_in = (dominant(model, sae, half, layer, head, cosine_min) for half in (even, odd))
    looked_at = torch.zeros(tokens.shape[1], dtype=torch.bool, device=tokens.device)                        # [T]
    looked_at[positions] = True
    count = lambda half: torch.bincount(half[1][half[3] & looked_at], minlength=sae.n_atoms)                # [n_atoms]
    firings = count(chosen_in) * (count(tested_in) > 0)
    atoms = firings.topk(min(n_atoms, int((firings > 0).sum()))).indices
    if len(atoms) == 0:
        raise InputError("no atom fires in both halves of the passages: take more --passages or a lower --cosine-min")

    def draw(mask: Tensor, n: int) -> Tensor:                 # up to n places [·, 2] where mask: (passage, position)
        places = (mask & looked_at).nonzero()
        return places[torch.randperm(len(places), generator=generator)[:n].to(places.device)]

    def firings_of(half) -> tuple[Tensor, Tensor, Tensor]:                        # place [N, 2], index of the atom, a
        _, atom, a, fires = half
        places = [draw(fires & (atom == i), most) for i in atoms]
        place, which = torch.cat(places), torch.cat([torch.full((len(x),), j) for j, x in enumerate(places)])
        return place, which.to(place.device), a[place[:, 0], place[:, 1]]

    out = lambda which, size: write_of(size[:, None] * sae.key_dir[atoms[which]], sae.value_dir[atoms[which]])

    place, which, size = firings_of(chosen_in)
    change = torch.zeros(len(atoms), model.vocab, device=tokens.device)           # summed over each atom's firings
    for events, moved in taken_out(model, even, layer, head, *place.T, out(which, size), progress):
        change.index_add_(0, which[events], moved.float())
    promoted = (change / torch.bincount(which, minlength=len(atoms))[:, None]).argmin(-1)

    place, which, size = firings_of(tested_in)
    W, atom, _, _ = tested_in
    other = torch.cat([draw(atom != i, int((which == j).sum())) for j, i in enumerate(atoms)])
    share = inner(out(which, torch.ones_like(size)), sae.measured(W.rows(tuple(other.T)))).relu()
    places, sizes = torch.cat([place, other, other]), torch.cat([size, size, share])
    moved_by = torch.zeros(len(places), device=tokens.device)
    for events, moved in taken_out(model, odd, layer, head, *places.T, out(which.repeat(3), sizes), progress):
        moved_by[events] = moved.gather(-1, promoted[which.repeat(3)[events], None])[:, 0].float()
    return atoms.cpu(), promoted.cpu(), Erased(which.cpu(), place[:, 0].cpu(), *moved_by.cpu().chunk(3))


def sign_flip(difference: Tensor, cluster: Tensor, generator: torch.Generator, draws: int = 10_000) -> float:
    """Two-sided p of paired differences [N] under the null that signs are arbitrary: the share of draws, each turning
    the signs of whole clusters [N] (passages) at random, whose |mean| is at least the observed one."""
    _, group = cluster.unique(return_inverse=True)
    total = torch.zeros(int(group.max()) + 1, dtype=torch.float64).index_add_(0, group, difference.double())
    signs = torch.randint(2, (draws, len(total)), generator=generator).double() * 2 - 1
    return (1 + ((signs @ total).abs() >= total.sum().abs() * (1 - 1e-12)).sum().item()) / (draws + 1)


def erasure_summary(erased: Erased, generator: torch.Generator) -> dict:
    """Figures of N firings, in nats (negative: the token loses). p: `sign_flip` over passages, of the firings against
    the same matrix taken out elsewhere, and of the firings alone."""
    figures = dict(n_firings=len(erased.firing), n_passages=len(erased.passage.unique()))
    for name in ("firing", "elsewhere", "own_share"):
        x = getattr(erased, name).double()
        figures |= {f"{name}_median": x.median().item(), f"{name}_mean": x.mean().item(),
                    f"{name}_falls": (x < 0).double().mean().item()}
    return figures | dict(
        mean_ci95=cluster_bootstrap(erased.firing, erased.passage, generator),
        p_paired=sign_flip(erased.firing - erased.elsewhere, erased.passage, generator),
        p_firing=sign_flip(erased.firing, erased.passage, generator))
