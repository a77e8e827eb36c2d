"""WriteSAE: sparse autoencoders whose atoms are rank-1 matrices, and the test of what they stand
for.

A recurrent layer of Gated DeltaNet, Mamba-2 or RWKV-7 writes one rank-1 matrix k vᵀ per head and
token into its state (models.py). An atom of this SAE has the same shape, A_i = key_i value_iᵀ, so
it can take a write's place in the model's memory:

    rng = torch.Generator().manual_seed(0)       # each class and function is explained in its place
    sae = WriteSAE(n_atoms=1024, K=32, V=32)
    fit_alternating(sae, k, v, rng)              # k [N, K], v [N, V]: any writes, no model needed
    null = untrained(sae, k, v, rng)             # the null: random writes as atoms, no training
    cell = Cell(model, layer=1, head=0, tokens=tokens, positions=range(32, 96), rng=rng)
    table = replacement(cell, dict(atom=sae, untrained=null))

Words used throughout:
    write      k vᵀ, what one head adds to its state at one token
    atom       one matrix A_i of the dictionary, of unit norm in the SAE's coordinates (section 2)
    a          an atom's coefficient; the *dominant* atom of a write is the one with the largest.
               (A_i is an atom; A_t, with a time, is the transition of models.py.)
    firing     the dominant atom stands for the write: cosine(a A, k vᵀ) ≥ 0.71, so that at its best
               size it explains half of the write's energy ‖k vᵀ‖² or more
    coverage   the share of positions with a firing
    native     as the unmodified model has it
    effect     KL(native ‖ edited) of the next-token distribution, summed over the write's step and
               the ten after it, in nats

Order of this file: matrices as factors - the SAE - its null and its training - the engine: branches
of a run - the replacement test; then, experiments of their own: more training - firings - the
logit-change formula - steering - erasing - a population of atoms.

Reference: WriteSAE, arXiv 2605.12770 ("the paper"). States and writes are key first, [K, V].
"""

from __future__ import annotations

import functools
import json
import math
from typing import Callable, NamedTuple, Sequence

import safetensors.torch
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from models import Cache, Edit, LanguageModel, StepInputs, Stream, at_least_fp32, propagate
from models import reading, require, save_then_rename, states


# ---- 1. Matrices as factors ----------------------------------------------------------------------
class Factored(NamedTuple):
    """A matrix X = Σ_r keys_r values_rᵀ, kept as its factors: r = 1 for a write, K for a state.
    Norms and products come from products of the factors: no K x V numbers for a write."""

    keys: Tensor  # [..., r, K]
    values: Tensor  # [..., r, V]

    def rows(self, index) -> Factored:
        """Some of N matrices, at index (a slice or a tensor)."""
        return Factored(self.keys[index], self.values[index])

    def times(self, a: Tensor) -> Factored:
        """a X, one coefficient for each matrix: a [...]."""
        return Factored(self.keys, a[..., None, None] * self.values)

    def minus(self, other: Factored) -> Factored:
        """X − Y, by lining up the factors of both."""
        keys = torch.cat([self.keys, other.keys], -2)
        return Factored(keys, torch.cat([self.values, -other.values], -2))

    def matrix(self) -> Tensor:
        """X itself, [..., K, V]."""
        return self.keys.mT @ self.values


def write_of(k: Tensor, v: Tensor) -> Factored:
    """The write k vᵀ: k [..., K], v [..., V] -> r = 1."""
    return Factored(k.unsqueeze(-2), v.unsqueeze(-2))


def matrix_of(X: Tensor) -> Factored:
    """Any matrix X [..., K, V] = Σ_c unit_c X_cᵀ, with its own rows as values -> r = K."""
    unit = torch.eye(X.shape[-2]).to(X)
    return Factored(unit.expand(*X.shape[:-2], -1, -1), X)


def inner(X: Factored, Y: Factored) -> Tensor:
    """⟨X, Y⟩ = Σ_rs (keys_r · keys'_s)(values_r · values'_s) -> [...]; inner(X, X) is ‖X‖²."""
    rank = max(X.keys.shape[-2], Y.keys.shape[-2])
    if rank > X.keys.shape[-1]:  # then the matrices are the cheaper form
        return (X.matrix() * Y.matrix()).sum((-2, -1))
    products = (X.keys @ Y.keys.mT) * (X.values @ Y.values.mT)
    return products.sum((-2, -1))


def cosine(X: Factored, Y: Factored) -> Tensor:
    """⟨X, Y⟩ / ‖X‖‖Y‖, 0 where one is zero. Its square: the share of Y's energy that X explains."""
    norms = inner(X, X).sqrt() * inner(Y, Y).sqrt()
    return inner(X, Y) / norms.clamp_min(1e-30)


def leading_pair(X: Factored) -> Factored:
    """The rank-1 matrix nearest to X: its first singular value and vectors. -> r = 1"""
    if X.keys.shape[-2] == 1:
        return X
    U, size, Vh = torch.linalg.svd(X.matrix(), full_matrices=False)
    return write_of(U[..., 0], size[..., :1] * Vh[..., 0, :])


# ---- 2. The sparse autoencoder -------------------------------------------------------------------
class Bank(nn.Module):
    """n matrices of rank 1, key_i value_iᵀ; or `full`, any n matrices: the values are their rows,
    and the keys stay the K unit vectors."""

    def __init__(self, n: int, full: bool, K: int, V: int):
        super().__init__()
        self.full = full
        keys = torch.eye(K)[None] if full else torch.zeros(n, 1, K)
        self.keys = nn.Parameter(keys, requires_grad=not full)  # [n, 1, K] or [1, K, K]
        self.values = nn.Parameter(torch.zeros(n, keys.shape[1], V))  # [n, 1, V] or [n, K, V]

    def at(self, index: Tensor) -> Factored:
        """The matrices at index [...], r = 1 or K."""
        keys = self.keys.expand(len(self.values), -1, -1)
        return Factored(keys[index], self.values[index])

    def products(self, X: Factored) -> Tensor:
        """⟨E_i, X⟩ of every X [N, r, ·] with every matrix E_i of the bank -> [N, n].

        For a write and rank 1 it is (key_i · k)(value_i · v): K + V products instead of K·V.
        """
        if X.keys.shape[1] == 1 and self.keys.shape[1] == 1:
            of_keys = X.keys[:, 0] @ self.keys[:, 0].T
            of_values = X.values[:, 0] @ self.values[:, 0].T
            return of_keys * of_values
        matrices = self.values if self.full else self.keys.mT @ self.values  # [n, K, V]
        return X.matrix().flatten(1) @ matrices.flatten(1).T

    def products_by_block(self, X: Factored):
        """Yield `products` of 128 inputs after the other: they stay in the processor's cache."""
        for rows in torch.arange(len(X.keys)).split(128):
            yield self.products(X.rows(rows))

    def turned(self, to_k: Tensor, to_v: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of to_kᵀ E to_v for every matrix E."""
        if self.full:
            return self.keys, to_k.T @ self.values @ to_v
        return self.keys @ to_k, self.values @ to_v

    @torch.no_grad()
    def normalise(self):
        """Bring every matrix to unit norm."""
        E = Factored(self.keys, self.values)
        self.values /= inner(E, E).sqrt().clamp_min(1e-30)[:, None, None]

    @torch.no_grad()
    def put(self, which: Tensor, X: Factored):
        """Put matrices X at the indices `which`; in a bank of rank 1 their leading pairs, sides
        equally long."""
        if self.full:
            self.values[which] = X.matrix()
            return
        first = leading_pair(X)
        length = first.values.norm(dim=-1, keepdim=True).clamp_min(1e-30)
        ratio = first.keys.norm(dim=-1, keepdim=True) / length
        ratio = ratio.clamp_min(1e-30).sqrt()
        self.keys[which] = first.keys / ratio
        self.values[which] = first.values * ratio


ENCODERS = {"tied": None, "bilinear": False, "dense": True}  # whether its matrices are `full`
DECODERS = {"rank1": False, "flat": True}
SPARSITIES = ("topk", "pursuit")


class WriteSAE(nn.Module):
    """A sparse autoencoder over K x V matrices X (the paper's §3):

        a_i = topk(relu ⟨E_i, X⟩)        X̂ = Σ_i a_i A_i        ‖A_i‖ = 1

        encoder    E_i    tied: A_i itself: a_i is the least-squares coefficient of that atom alone
                          bilinear: e_i f_iᵀ, so a_i = e_iᵀ X f_i        dense: any matrix
        decoder    A_i    rank1: key_i value_iᵀ    flat: any matrix
        sparsity          topk: the `active` largest of each input
                          pursuit: `active` atoms one after the other, each the largest of what the
                          ones before left (matching pursuit; tied, to code with, not to train)

    The paper's five SAEs are settings: FlatSAE dense/flat, MatrixSAE dense/rank1, BilinearSAE
    bilinear/rank1, tied/rank1 and bilinear/flat. No bias: twice the input, twice the coefficients.
    But `centred`: the training inputs' mean is taken off before coding, and `decode` does not add
    it back. `scale="least-squares"` in cfg: see `Point.stand_in`.

    Coordinates. The SAE works on X' = to_kᵀ X to_v (`see`): norms, products, coding and training
    are meant there. Both are the identity, unless `set_metric` stretches directions that later
    predictions heed (`read_metric`). `encode` takes and `decode` gives matrices in the model's own
    coordinates; a firing's cosine is measured there.

    cfg travels with the weights: the settings, source (what is coded: "write" or "state"), the
    least cosine of a firing, what the caller adds. Raises InputError for settings that cannot be.
    """

    def __init__(
        self,
        n_atoms: int,
        K: int,
        V: int,
        active: int = 1,
        encoder: str = "tied",
        decoder: str = "rank1",
        sparsity: str = "topk",
        centred: bool = False,
        source: str = "write",
        cosine_min: float = 0.71,
        **cfg,
    ):
        super().__init__()
        kinds = dict(encoder=encoder, decoder=decoder, sparsity=sparsity)
        for (name, kind), allowed in zip(kinds.items(), (ENCODERS, DECODERS, SPARSITIES)):
            require(kind in allowed, f"SAE {name} {kind}: allowed are {', '.join(allowed)}")
        require(sparsity != "pursuit" or encoder == "tied", "pursuit takes a tied encoder")
        possible = isinstance(active, int) and 1 <= active <= n_atoms
        require(possible, f"{active} active atoms of {n_atoms}: allowed are 1 to {n_atoms}")
        self.cfg = dict(n_atoms=n_atoms, K=K, V=V, active=active) | kinds
        self.cfg |= dict(centred=centred, source=source, cosine_min=cosine_min) | cfg
        self.n_atoms, self.active, self.sparsity = n_atoms, active, sparsity
        self.atoms = Bank(n_atoms, DECODERS[decoder], K, V)
        self.readers = self.atoms
        if encoder != "tied":
            self.readers = Bank(n_atoms, ENCODERS[encoder], K, V)
        self.register_buffer("to_k", torch.eye(K))
        self.register_buffer("to_v", torch.eye(V))
        self.register_buffer("mean", torch.zeros(K, V) if centred else None)

    def see(self, X: Factored) -> Factored:
        """From the model's coordinates into the SAE's (and centred, if it is so set)."""
        X = Factored(X.keys @ self.to_k, X.values @ self.to_v)
        if self.mean is None:
            return X
        return X.minus(matrix_of(self.mean.expand(len(X.keys), -1, -1)))

    def assemble(self, index: Tensor, a: Tensor) -> Factored:
        """Σ a_i A_i in the SAE's coordinates: index, a [N, m] -> N matrices, of m factors each; of
        flat atoms K."""
        if self.atoms.full:
            A = self.atoms.values  # [n_atoms, K, V]
            every = a.new_zeros(len(a), self.n_atoms).scatter(1, index, a)
            return matrix_of((every @ A.flatten(1)).unflatten(1, A.shape[1:]))
        A = self.atoms.at(index).times(a)  # [N, m, 1, ·]
        return Factored(A.keys.flatten(1, 2), A.values.flatten(1, 2))

    def encode(self, X: Factored) -> tuple[Tensor, Tensor]:
        """The active atoms of each X [N, r, ·], largest coefficient first: index, a [N, active].

        a ≥ 0; 0 where an atom is not active. The first is the *dominant* atom. (Of a pursuit in the
        order of choice.)
        """
        X = self.see(X)
        if self.sparsity == "topk":
            return self.code(X, self.active)
        chosen = []
        for _ in range(self.active):
            index, a = self.code(X, 1)
            chosen.append((index, a))
            X = matrix_of(X.minus(self.assemble(index, a)).matrix())
        index, a = zip(*chosen)
        return torch.cat(index, 1), torch.cat(a, 1)

    def code(self, X: Factored, n: int) -> tuple[Tensor, Tensor]:
        """The n largest relu ⟨E_i, X⟩ in the SAE's coordinates: index, a [N, n]."""
        best = [scores.relu().topk(n) for scores in self.readers.products_by_block(X)]
        a, index = (torch.cat(parts) for parts in zip(*best))
        return index, a

    def decode(self, index: Tensor, a: Tensor) -> Factored:
        """X̂ = Σ a_i A_i: index, a [N, m] -> N matrices as factors. (A centred SAE's mean is not
        added: atoms are differences.)"""
        X = self.assemble(index, a)
        return Factored(X.keys @ self.to_k.inverse(), X.values @ self.to_v.inverse())

    def atom(self, index: Tensor, a: Tensor) -> Factored:
        """a A_i of index, a [N]. Of a flat atom the leading singular pair, which is all that a head
        can write of it (the paper's Table 6)."""
        return leading_pair(self.decode(index[:, None], a[:, None]))

    def dominant(self, X: Factored) -> tuple[Tensor, Tensor, Factored]:
        """Each X's dominant atom, its coefficient, and a A: [N], [N], N matrices."""
        index, a = self.encode(X)
        index, a = index[:, 0], a[:, 0]
        return index, a, self.atom(index, a)

    @torch.no_grad()
    def start(self, which: Tensor, X: Factored):
        """Put the atoms `which`, and their readers, at matrices X (in the SAE's coordinates)."""
        self.atoms.put(which, X)
        self.atoms.normalise()
        if self.readers is not self.atoms:
            # active atoms that overlap would sum up to too much: each reader starts with its share
            A = self.atoms.at(which)
            self.readers.put(which, Factored(A.keys, A.values / self.active))

    def save(self, path: str):
        """Write atoms and readers in the model's coordinates (fp16: three digits), and cfg."""
        tensors = dict(self.named_buffers())
        for name, bank in self.named_children():  # atoms; and readers, where they are others
            keys, values = bank.turned(self.to_k.inverse(), self.to_v.inverse())
            tensors |= {f"{name}.keys": keys.half(), f"{name}.values": values.half()}
        tensors = {name: x.detach().cpu().contiguous() for name, x in tensors.items()}
        cfg = {"cfg": json.dumps(self.cfg)}
        write = functools.partial(safetensors.torch.save_file, tensors, metadata=cfg)
        save_then_rename(write, path)

    @classmethod
    def load(cls, path: str) -> WriteSAE:
        """The SAE that `save` wrote. Raises InputError for a file that holds none."""
        advice = "is it a WriteSAE's file? Train one: python run.py train --help"
        with reading(path, advice), safetensors.safe_open(path, "pt") as f:
            tensors = {name: f.get_tensor(name).float() for name in f.keys()}
            with torch.device("meta"):  # no memory before the shapes are known to fit
                sae = cls(**json.loads(f.metadata()["cfg"]))
            if sae.readers is sae.atoms:  # one bank under two names, and both are asked for
                sides = ("keys", "values")
                tensors |= {"readers." + side: tensors["atoms." + side] for side in sides}
            sae.load_state_dict(tensors, assign=True)
            require(all(x.isfinite().all() for x in tensors.values()), f"{path}: holds NaN or Inf")
            for bank in sae.children():
                bank.keys.data, bank.values.data = bank.turned(sae.to_k, sae.to_v)
            sae.atoms.normalise()
        return sae.requires_grad_(False)


# ---- 3. The null, and training: from tensors alone, no model needed ------------------------------
def draw(X: Factored, n: int, generator: torch.Generator) -> Factored:
    """n of N matrices, drawn with replacement."""
    pick = torch.randint(len(X.keys), (n,), generator=generator)
    return X.rows(pick.to(X.keys.device))


def untrained(
    sae: WriteSAE,
    k: Tensor,
    v: Tensor,
    generator: torch.Generator,
) -> WriteSAE:
    """The null of every dictionary: as many atoms, each a write drawn at random, no training. What
    sae does better, learning added.

    Metric and number active are those of sae; tied, rank 1, it codes writes. k [N, K], v [N, V]:
    writes of the training text.
    """
    settings = dict(encoder="tied", decoder="rank1", sparsity="topk", centred=False, source="write")
    null = WriteSAE(**sae.cfg | settings).to(k.device)
    null.to_k.copy_(sae.to_k)
    null.to_v.copy_(sae.to_v)
    X = null.see(draw(write_of(k, v), sae.n_atoms, generator))
    null.start(torch.arange(sae.n_atoms), X)
    return null.requires_grad_(False)


@torch.no_grad()
def set_metric(sae: WriteSAE, M_k: Tensor, M_v: Tensor):
    """From now on sae measures ⟨X, Y⟩ = tr(M_k X M_v Yᵀ); M_k [K, K], M_v [V, V] symmetric positive
    definite. Before training: atoms that are there would change their meaning. With M = L Lᵀ that
    is the Frobenius product of L_kᵀ X L_v and L_kᵀ Y L_v: only `see`, which turns keys by L_k and
    values by L_v, `decode` and the mean of a centred SAE know of a metric."""
    sae.to_k.copy_(torch.linalg.cholesky(M_k))
    sae.to_v.copy_(torch.linalg.cholesky(M_v))


@torch.no_grad()
def fit_alternating(
    sae: WriteSAE,
    k: Tensor,
    v: Tensor,
    generator: torch.Generator,
    steps: int = 24,
    sample: int = 100_000,
    memory: float = 0.75,
    progress=iter,
) -> list[float]:
    """Code each write by one atom, with closed-form updates: k-means whose centres are rank-1.

    With one active atom, tied, the loss on a unit write is ‖X − aA‖² = 1 − a². Each step draws
    `sample` writes and
        1. gives each to the atom with the largest a = (key · x)(value · y);
        2. turns the atom's key to Σ a (value · y) x over its writes, then its value to
           Σ a (key · x) y: one round of power iteration, each side in closed form;
        3. restarts atoms that had no write for a few steps at the writes that are coded worst.
    Sums keep `memory` of what they held, so that an atom rests on more than one step's writes. The
    family: gain-shape vector quantisation, sum-of-outer-products dictionary learning.

    k [N, K], v [N, V]: writes in the model's coordinates. Trains sae (tied/rank1/topk, one active)
    in place; returns the share of energy explained, mean a², of every step. Raises InputError for
    another kind of SAE.
    """
    kind = [sae.cfg[name] for name in ("encoder", "decoder", "sparsity", "active", "centred")]
    fits = kind == ["tied", "rank1", "topk", 1, False]
    require(fits, f"an SAE {kind}: `fit_alternating` takes tied, rank1, topk, one active")
    X = sae.see(write_of(k, v))
    X = Factored(F.normalize(X.keys, dim=-1), F.normalize(X.values, dim=-1))  # r = 1
    keys = sae.atoms.keys.data[:, 0]  # a view, [n, K]
    values = sae.atoms.values.data[:, 0]  # [n, V]
    first = draw(X, sae.n_atoms, generator)
    keys[:], values[:] = first.keys[:, 0], first.values[:, 0]
    key_sum, value_sum = torch.zeros_like(keys), torch.zeros_like(values)
    count = torch.zeros(sae.n_atoms, device=k.device)  # how many recent writes each sum holds
    history = []
    for _ in progress(range(steps)):
        drawn = draw(X, sample, generator)
        x, y = drawn.keys[:, 0], drawn.values[:, 0]  # [sample, K], [sample, V]
        best = [scores.max(-1) for scores in sae.atoms.products_by_block(drawn)]  # 1.
        a, atom = (torch.cat(parts) for parts in zip(*best))
        for total in (key_sum, value_sum, count):
            total *= memory
        count.index_add_(0, atom, torch.ones_like(a))
        used = count > 0.5
        weight = a * (values[atom] * y).sum(-1)  # 2.
        key_sum.index_add_(0, atom, weight[:, None] * x)
        keys[used] = F.normalize(key_sum[used], dim=-1)
        weight = a * (keys[atom] * x).sum(-1)
        value_sum.index_add_(0, atom, weight[:, None] * y)
        values[used] = F.normalize(value_sum[used], dim=-1)
        unused = (~used).nonzero()[:sample, 0]  # 3.
        worst = a.argsort()[: len(unused)]
        keys[unused], values[unused] = x[worst], y[worst]
        for total in (key_sum, value_sum, count):
            total[unused] = 0
        history.append(a.square().mean().item())
    return history


# ---- 4. The engine: a native run, a change of one head's state, and what the predictions say then
HORIZONS = 11  # at so many steps effects are read: the write's own and the ten after it
BATCH_BYTES = 24_000_000  # of log-probabilities per branch: what a batch of passages may take

Table = dict[str, Tensor]  # named columns, one row per tested position


class Cell(NamedTuple):
    """Where an experiment looks: one head of one layer of a model, at positions of a text."""

    model: LanguageModel
    layer: int
    head: int
    tokens: Tensor  # [n, T] passages
    positions: Sequence[int]  # of each passage, increasing; ten tokens come after the last
    rng: torch.Generator | None = None  # of every random draw, where there is one
    sae: WriteSAE | None = None  # the one that is looked at
    file: Tensor | None = None  # [n] the file each passage is from: intervals draw whole files
    progress: Callable = iter  # wraps a loop, such as a progress bar


def moved_reads(change: Factored, s: StepInputs) -> Tensor:
    """How a change of a head's state moves its reads: δo_t = Σ_r (u_t · q_t) value_r, with u as in
    models.propagate from key_r on. change [N, r, ·], s [N, T, 1, ·] -> [N, T, V]"""
    each = [0] * change.keys.shape[1]  # the head once for every factor: each is an edit of its own
    gain, _ = propagate(change.keys, s.heads(each))  # [N, T, r]
    return (gain.unsqueeze(-1) * change.values.unsqueeze(1)).sum(2)


class Point(NamedTuple):
    """Where branches start: position t of P passages, and the native run over t..t+10."""

    cell: Cell
    t: int
    passage: Tensor  # [P] which passages of the text these are
    stream: Stream  # at the edited layer's input, t..t+10
    o: Tensor  # [P, 11, H, V] the layer's reads there, and
    rest: tuple[Tensor, ...]  # what else its output is made of
    s: StepInputs  # the six tensors of the edited head, H = 1, t..t+10
    cache: Cache  # of the tokens before t; only the layers from the edited one up are filled
    logp: Tensor  # [P, 11, vocab] native log-probabilities

    def rows(self, index: Tensor) -> Point:
        """Some of the P passages."""
        return self._replace(
            passage=self.passage[index],
            stream=self.stream.rows(index),
            o=self.o[index],
            rest=tuple(x[index] for x in self.rest),
            s=self.s.rows(index),
            cache=self.cache.rows(index),
            logp=self.logp[index],
        )

    def write(self) -> Factored:
        """What the head writes at t: k vᵀ of every passage."""
        return write_of(self.s.k[:, 0, 0], self.s.v[:, 0, 0])

    def state(self) -> Factored:
        """The head's state after t, of every passage."""
        before = self.cache.layers[self.cell.layer]["state"][:, self.cell.head, None]
        return matrix_of(states(self.s.times(0, 1), before)[:, 0, 0])

    def coded(self, sae: WriteSAE) -> Factored:
        """What this SAE codes: the write, or the state."""
        return self.state() if sae.cfg["source"] == "state" else self.write()

    def stand_in(self, sae: WriteSAE) -> tuple[Tensor, Tensor, Factored, Tensor]:
        """For every passage's write: the dominant atom [P], its coefficient a, a A, and the cosine
        of a A and the write. (A state's coefficient is a state's size; with scale "least-squares"
        in the SAE's cfg a A takes the size that fits the write.)"""
        X = self.write()
        index, a, A = sae.dominant(self.coded(sae))
        if sae.cfg.get("scale") == "least-squares":
            A = A.times(inner(A, X) / inner(A, A).clamp_min(1e-30))
        return index, a, A, cosine(A, X)

    def moved(self, change: Factored) -> Tensor:
        """How all heads' reads move (only this head's do), [P, 11, H, V], if change [P, r, ·] is
        added to the head's state after t."""
        head, H = self.cell.head, self.o.shape[2]
        delta_o = moved_reads(change, self.s)
        return F.pad(delta_o[:, :, None], (0, 0, head, H - head - 1))

    def onward(self, mixed: Stream) -> Tensor:
        """Logits at t..t+10 from the stream after the edited layer's mixer, [P, 11, vocab]."""
        model, layer = self.cell[:2]
        fed, _ = model.layers[layer].feed(mixed, self.cache.layers[layer])
        after, _ = model.run(fed, self.cache, first=layer + 1)
        return at_least_fp32(model.unembed(after))

    def logits(self, change: Factored) -> Tensor:
        """Logits at t..t+10 after this change, [P, 11, vocab]. Nothing runs again before t or below
        the edited layer's reads."""
        block = self.cell.model.layers[self.cell.layer]
        o = self.o + self.moved(change)
        return self.onward(block.write_out(self.stream, o, self.rest))

    def branch(self, change: Factored) -> Tensor:
        """The same as log-probabilities."""
        return self.logits(change).log_softmax(-1)


@torch.no_grad()
def points(cell: Cell, branches: int = 1):
    """Yield a Point for each position of every batch of the cell's passages.

    One native pass over a passage serves all its points. A batch holds as many passages as
    `branches` branches of BATCH_BYTES allow, and at least one: memory does not grow with n.
    Raises InputError for a cell that is none, and for a position without ten tokens after it.
    """
    model, layer, head, tokens, positions = cell[:5]
    model.check_cell(layer, head)
    block = model.layers[layer]
    fit = len(positions) and positions[0] >= 1 and positions[-1] + HORIZONS <= tokens.shape[1]
    require(
        fit,
        f"positions {list(positions[:1])}..{list(positions[-1:])} do not fit passages of "
        f"{tokens.shape[1]} tokens: they start at 1 or later, {HORIZONS - 1} come after the last",
    )
    size = max(1, BATCH_BYTES // (4 * branches * HORIZONS * model.vocab))
    batches = torch.arange(len(tokens), device=tokens.device).split(size)
    for passage, t in cell.progress([(passage, t) for passage in batches for t in positions]):
        if t == positions[0]:
            below, _ = model.run(model.embed(tokens[passage]), last=layer)  # the layer's input
            below, o, s, rest, _ = block.read(below, {})
            fed, _ = block.feed(block.write_out(below, o, rest), {})
            last, _ = model.run(fed, first=layer + 1)  # the last layer's output
            s, cache, done = s.heads([head]), None, 0
        _, cache = model.run(below.times(done, t), cache, first=layer)  # extended to t
        done, end = t, t + HORIZONS
        logp = at_least_fp32(model.unembed(last.times(t, end))).log_softmax(-1)
        yield Point(
            cell,
            t,
            passage,
            stream=below.times(t, end),
            o=o[:, t:end],
            rest=tuple(x[:, t:end] for x in rest),
            s=s.times(t, end),
            cache=cache,
            logp=logp,
        )


def stack(parts: list[Table]) -> Table:
    """Tables with the same columns under one another, on the CPU."""
    return {name: torch.cat([part[name] for part in parts]).cpu() for name in parts[0]}


def at_token(x: Tensor, token: Tensor) -> Tensor:
    """Of numbers x [..., vocab] those of a token [...] at each place. -> [...]"""
    return x.gather(-1, token.unsqueeze(-1)).squeeze(-1)


def kl_divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p ‖ q) in nats from log-probabilities [..., vocab] -> [...].

    Σ p (e^d − 1 − d) with d = log q − log p. The added Σ p (e^d − 1) = Σ q − Σ p is zero, but now
    every term is ≥ 0 and of second order in d, so that an effect of 1e-9 nats is still read in
    fp32, where Σ p (log p − log q) ends at 1e-7. (Beyond d = 60, where e^d would overflow, a term
    is q − p (1 + d).) A block of rows at a time stays in the processor's cache.
    """
    kl, vocab = [], log_p.shape[-1]
    blocks = zip(log_p.reshape(-1, vocab).split(128), log_q.reshape(-1, vocab).split(128))
    for log_p_block, log_q_block in blocks:
        p, d = log_p_block.exp(), log_q_block - log_p_block
        terms = p * (d.clamp(max=60).expm1() - d)
        far = d > 60
        if far.any():
            terms = torch.where(far, log_q_block.exp() - p * (1 + d), terms)
        kl.append(terms.sum(-1))
    return torch.cat(kl).view(log_p.shape[:-1])


@torch.inference_mode()
def collect(
    model: LanguageModel,
    tokens: Tensor,
    layer: int,
    heads: list[int],
    source: str = "write",
    skip: int = 0,
    progress=iter,
) -> list[Factored]:
    """What heads of one layer write over a text, to train on: one Factored of N matrices per head.

    tokens [n, T]; every write after the first `skip` tokens of each row, or with source "state"
    every 16th state of all (neighbours are nearly the same). One pass up to the layer serves all
    heads; it keeps 4 (K + V) bytes per write, 4 K V per state.
    """
    parts = []
    for batch in progress(tokens.split(16)):
        stream, _ = model.run(model.embed(batch), last=layer)
        s = model.step_inputs(stream, layer).heads(heads)
        if source == "write":
            X = write_of(s.k[:, skip:], s.v[:, skip:])
        else:
            X = matrix_of(states(s)[:, 15::16])
        parts.append((X.keys.flatten(0, 1), X.values.flatten(0, 1)))  # [B · T, H, r, ·]
    keys, values = (torch.cat(sides) for sides in zip(*parts))
    return [Factored(keys[:, i], values[:, i]) for i in range(len(heads))]


# ---- 5. The replacement test ---------------------------------------------------------------------
CONTROLS_EVERY = 4  # random, projected and native: at every fourth position only


@torch.inference_mode()
def replacement(cell: Cell, dictionaries: dict[str, WriteSAE], whole: bool = False) -> Table:
    """Put something else where a native write was: how far do the next eleven predictions move?

    What stands where the write X = k vᵀ stood:
        (a name)   a A         the dominant atom of that dictionary, with its coefficient
        delete     nothing
        random     a A_j       another atom of the first dictionary, same coefficient
        projected  ⟨R, X⟩ R    a random rank-1 direction at its own least-squares coefficient, which
                               is always nearer to X than nothing is (‖X − aA‖² = ‖X‖² − a² for any
                               unit A), and yet no stand-in: wins mean something above its rate
        native     X           the write itself put back: the noise floor
    and with whole=True NAME_whole: all active atoms of the dictionary together.

    `untrained` makes the dictionary that belongs beside every trained one: the null that decides.
    Returns a row per passage and position: passage, position (and file, if the cell has it); for
    each dictionary index_NAME, a_NAME and cosine_NAME (of a A and X); for each thing put in
    kl_NAME [N, 11], KL(native ‖ branch) by horizon in nats (NaN where it is not measured).
    """
    parts, positions = [], list(cell.positions)
    for p in points(cell):
        X = p.write()
        part = dict(passage=p.passage, position=torch.full_like(p.passage, p.t))
        if cell.file is not None:
            part["file"] = cell.file.to(p.passage)[p.passage]
        put_in = {}
        for name, sae in dictionaries.items():
            index, a, A, match = p.stand_in(sae)
            part |= {f"index_{name}": index, f"a_{name}": a, f"cosine_{name}": match}
            put_in[name] = A
            if whole:
                put_in[name + "_whole"] = sae.decode(*sae.encode(p.coded(sae)))
        put_in["delete"] = Factored(X.keys, 0 * X.values)
        put_in |= controls(cell, p, next(iter(dictionaries.items())), part)
        measured = positions.index(p.t) % CONTROLS_EVERY == 0
        for name, Y in put_in.items():
            kl = torch.full((len(p.passage), HORIZONS), math.nan, device=p.logp.device)
            if measured or name not in ("random", "projected", "native"):
                kl = kl_divergence(p.logp, p.branch(Y.minus(X)))
            part["kl_" + name] = kl
        parts.append(part)
    return stack(parts)


def controls(
    cell: Cell,
    p: Point,
    first: tuple[str, WriteSAE],
    part: Table,
) -> dict[str, Factored]:
    """`random`, `projected` (in tables "random direction") and `native` of `replacement` at one
    point, drawn for all n passages of the text, whatever the size of a batch."""
    name, sae = first
    X, n = p.write(), len(cell.tokens)
    draws = torch.Generator().manual_seed(cell.rng.initial_seed() + p.t)
    shift = torch.randint(1, max(2, sae.n_atoms), (n,), generator=draws)
    other = part["index_" + name] + shift.to(p.passage)[p.passage]
    random = sae.atom(other % sae.n_atoms, part["a_" + name])
    R = random_direction(X, draws, n).rows(p.passage)
    return dict(random=random, projected=R.times(inner(R, X)), native=X)


def random_direction(like: Factored, generator: torch.Generator, n: int | None = None) -> Factored:
    """A random rank-1 matrix of unit norm for each of `like` (r = 1), or n of them."""

    def unit(x: Tensor) -> Tensor:
        drawn = torch.randn(n or len(x), *x.shape[1:], generator=generator)
        return F.normalize(drawn.to(x), dim=-1)

    return Factored(unit(like.keys), unit(like.values))


# Its figures
def mean(x: Tensor) -> float:
    """The mean of numbers or of truths; NaN for none."""
    return x.double().mean().item()


def wilson(wins: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """The Wilson 95 % interval of a rate, for n independent trials; NaN for none."""
    if n == 0:
        return math.nan, math.nan
    p, z2 = wins / n, z * z
    middle = p + z2 / (2 * n)
    half = z * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    low = (middle - half) / (1 + z2 / n)
    high = (middle + half) / (1 + z2 / n)
    return max(low, 0.0), min(high, 1.0)


def cluster_bootstrap(
    values: Tensor, cluster: Tensor, generator: torch.Generator, draws: int = 1000
) -> tuple[float, float]:
    """95 % interval of the mean of values [N] when whole clusters [N] (all rows of a file, of an
    atom) are drawn again, with replacement; NaN for none."""
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


def effect(table: Table, name: str) -> Tensor:
    """kl@0..10 in nats: the KL of one condition summed over the eleven steps. [N]"""
    return table["kl_" + name].double().sum(-1)


def rates(atom: Tensor, delete: Tensor) -> dict[str, float]:
    """Of n effects each (lower is better for `atom`); NaN for none:

    win_rate            share with KL_atom < KL_delete (0.5: as good as nothing)
    recovered_pooled    1 − ΣKL_atom / ΣKL_delete (1: the write is restored, 0: as bad as nothing)
    recovered_median    the median of 1 − KL_atom / KL_delete
    """
    return dict(
        win_rate=mean(atom < delete),
        recovered_pooled=(1 - atom.sum() / delete.sum()).item(),
        recovered_median=(1 - atom / delete.clamp_min(1e-30)).median().item(),
    )


def fires(a: Tensor, match: Tensor, cosine_min: float) -> Tensor:
    """Where an atom stands for the write, by its coefficient and the cosine of both: [N] truths."""
    return (a > 0) & (match >= cosine_min)


def dictionary_figures(table: Table, name: str, cosine_min: float) -> dict:
    """One dictionary's coverage, its `rates` at firings, and (_all) over every position; with
    by_coverage the same for other thresholds, since a rate can be bought with silence; and
    failure_by_quartile, 1 − win rate by quarters of the effect of delete, weakest first."""
    atom, delete = effect(table, name), effect(table, "delete")

    def at(threshold: float) -> dict:
        here = fires(table["a_" + name], table["cosine_" + name], threshold)
        share = dict(coverage=mean(here), n_firings=int(here.sum()))
        wins = (atom < delete)[here][delete[here].argsort()]
        quarters = wins.tensor_split(4) if len(wins) >= 4 else []
        share["failure_by_quartile"] = [1 - mean(quarter) for quarter in quarters]
        return share | rates(atom[here], delete[here])

    everywhere = rates(atom, delete)
    figures = at(cosine_min) | {key + "_all": value for key, value in everywhere.items()}
    if f"kl_{name}_whole" in table:
        whole = rates(effect(table, name + "_whole"), delete)
        figures["whole_win_rate_all"] = whole["win_rate"]
        figures["whole_recovered_all"] = whole["recovered_pooled"]
    thresholds = (-1.0, 0.5, 0.6, 0.71, 0.8, 0.9)
    figures["by_coverage"] = [dict(cosine_min=c) | at(c) for c in thresholds]
    return figures


def replacement_figures(table: Table, cosine_min: float, generator: torch.Generator) -> dict:
    """The test's figures, from `replacement` of dictionaries "atom" and perhaps "untrained", on
    passages whose files are known. Rates and medians are about kl@0..10, at firings unless the name
    ends in _all.

        win_ci95_by_...      95 %, drawing whole files, or all firings of an atom, again
        per_atom_win_rate    mean over the n_atoms_often atoms with at least five firings
        strict_order_rate    share with atom < delete < random
    """
    here = fires(table["a_atom"], table["cosine_atom"], cosine_min)
    kl = {name: effect(table, name) for name in ("atom", "delete", "random", "projected", "native")}
    wins = (kl["atom"] < kl["delete"])[here]
    atoms, which, uses = table["index_atom"][here].unique(return_inverse=True, return_counts=True)
    per_atom = torch.bincount(which, wins.double(), len(atoms)) / uses
    often = uses >= 5
    control = here & kl["random"].isfinite()  # firings where the controls were measured
    ordered = (kl["atom"] < kl["delete"]) & (kl["delete"] < kl["random"])
    by_horizon = []
    for h in range(HORIZONS):
        atom, delete = (table[name][here, h].double() for name in ("kl_atom", "kl_delete"))
        by_horizon.append(dict(horizon=h) | rates(atom, delete))
    figures = dictionary_figures(table, "atom", cosine_min) | dict(
        n_positions=len(here),
        n_atoms=len(atoms),
        n_passages=len(table["passage"][here].unique()),
        win_ci95=wilson(int(wins.sum()), len(wins)),
        win_ci95_by_file=cluster_bootstrap(wins, table["file"][here], generator),
        n_atoms_often=int(often.sum()),
        n_firings_often=int(uses[often].sum()),
        per_atom_win_rate=mean(per_atom[often]),
        win_ci95_by_atom=cluster_bootstrap(wins[often[which]], which[often[which]], generator),
        strict_order_rate=mean(ordered[control]),
        projected_win_rate=mean((kl["projected"] < kl["delete"])[control]),
        median_kl={name: x[here & x.isfinite()].nanmedian().item() for name, x in kl.items()},
        by_horizon=by_horizon,
    )
    if "kl_untrained" in table:
        figures["untrained"] = untrained_figures(table, cosine_min, generator)
    return figures


def untrained_figures(table: Table, cosine_min: float, generator: torch.Generator) -> dict:
    """The null's own figures, and over all positions what learning added to it:

    win_gain_all     win rate of the trained minus the untrained one, paired; interval by file
    kl_left_all      ΣKL_trained / ΣKL_untrained (1: training added nothing, 0: all there was)
    """
    atom, delete, null = (effect(table, name) for name in ("atom", "delete", "untrained"))
    gain = (atom < delete).double() - (null < delete).double()
    return dictionary_figures(table, "untrained", cosine_min) | dict(
        win_gain_all=mean(gain),
        win_gain_all_ci95=cluster_bootstrap(gain, table["file"], generator),
        kl_left_all=(atom.sum() / null.sum()).item(),
    )


# ==== The main job ends here. Each section below is an experiment of its own on this engine ====
# ---- 6. More training: what near means, and gradients for every setting and for states -----------
def read_metric(cell: Cell, ridge: float = 0.1) -> tuple[Tensor, Tensor]:
    """How much the next eleven predictions heed each direction of a head's state: M_k, M_v.

    To second order the effect of a small change δS of the state is a quadratic form in it,

        effect = ½ ⟨δS, F δS⟩,   F = E[vec(G) vec(G)ᵀ],   G = ∂/∂S_t Σ_h log p(drawn token at t+h)

    F is the Fisher information; tokens are drawn from the model's own predictions (drawn
    independently at each step, so that products between steps vanish). It is approximated by a
    Kronecker product of its two sides, M_k ∝ E[G Gᵀ] and M_v ∝ E[Gᵀ G] (Shampoo's, without its
    square roots), each scaled to mean eigenvalue 1, and `ridge` of the identity added: what
    `set_metric` takes.

    One backward pass gives G: the gradient at a change δS = 0, as factors, whose values are its
    rows. Returns [K, K] and [V, V], symmetric positive definite.
    """
    mixer, device = cell.model.layers[cell.layer].mixer, cell.tokens.device
    K, V = mixer.K, mixer.V
    M_k = torch.zeros(K, K, device=device)
    M_v = torch.zeros(V, V, device=device)
    for p in points(cell, branches=K):
        rows = torch.zeros(len(p.passage), K, V, device=device, requires_grad=True)
        with torch.enable_grad():
            logp = p.branch(matrix_of(rows))  # [P, 11, vocab]
            chances = logp.detach().exp().flatten(0, 1).cpu()
            drawn = torch.multinomial(chances, 1, generator=cell.rng)
            drawn = drawn.to(device).view(-1, HORIZONS)
            (G,) = torch.autograd.grad(at_token(logp, drawn).sum(), rows)  # [P, K, V]
        M_k += torch.einsum("pkv,plv->kl", G, G)
        M_v += torch.einsum("pkv,pkw->vw", G, G)

    require(
        bool(M_k.any()),
        f"no prediction heeds the state of layer {cell.layer}, head {cell.head}: is the "
        "model trained?",
    )

    def mixed(M: Tensor) -> Tensor:
        scaled = M / M.diagonal().mean()
        return scaled + ridge * torch.eye(len(M), device=device)

    return mixed(M_k), mixed(M_v)


def fit_gradient(
    sae: WriteSAE,
    X: Factored,
    generator: torch.Generator,
    steps: int = 2000,
    batch: int = 1024,
    lr: float = 1e-3,
    k_aux: int = 64,
    dead_after: int = 100_000,
    resample_every: int = 400,
    progress=iter,
) -> list[float]:
    """Adam on the reconstruction error ‖X − X̂‖² of unit inputs, for every setting and source.

    An atom is dead once `dead_after` samples passed without it. The k_aux best of the dead explain
    what is left, after arXiv 2406.04093 (residual detached, weight 1/32; there scored by the input,
    here by the residual), and every `resample_every` steps but the last the dead restart at the
    inputs coded worst. No gradient goes through the choice of atoms: all scores are computed
    without, those of the chosen once more.

    X: N matrices in the model's coordinates. Trains sae in place; returns the unexplained share of
    energy of every step.
    """
    X = unit_inputs(sae, X)
    sae.start(torch.arange(sae.n_atoms), draw(X, sae.n_atoms, generator))
    optimiser = torch.optim.Adam([p for p in sae.parameters() if p.requires_grad], lr)
    silent = torch.zeros(sae.n_atoms, device=X.keys.device)  # samples since an atom was active
    history = []
    for step in progress(range(steps)):
        optimiser.param_groups[0]["lr"] = lr * schedule(step, steps)
        x = draw(X, batch, generator)
        with torch.no_grad():
            index, _ = sae.code(x, sae.active)
        a = chosen_scores(sae, index, x)
        R = x.minus(sae.assemble(index, a))
        error = inner(R, R)  # [batch]
        silent += batch
        silent[index[a > 0]] = 0
        dead = (silent > dead_after).nonzero()[:, 0]
        loss = error.mean()
        if len(dead):
            loss = loss + auxiliary_loss(sae, R, dead, k_aux) / 32
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        sae.atoms.normalise()
        if (step + 1) % resample_every == 0 and step + resample_every < steps:
            silent[restart(sae, optimiser, dead, R, error)] = 0
        history.append(error.mean().item())
    return history


@torch.no_grad()
def unit_inputs(sae: WriteSAE, X: Factored) -> Factored:
    """N matrices in the SAE's coordinates, at unit norm; a centred SAE takes their mean."""
    if sae.mean is not None:
        total = X.keys.flatten(0, 1).T @ X.values.flatten(0, 1)  # Σ over all factors, [K, V]
        sae.mean.copy_(sae.to_k.T @ total @ sae.to_v / len(X.keys))
    X = sae.see(X)
    return X.times(1 / inner(X, X).sqrt().clamp_min(1e-30))


def chosen_scores(sae: WriteSAE, index: Tensor, X: Factored) -> Tensor:
    """relu ⟨E_i, X⟩ of chosen atoms: index [N, m], X [N, r, ·] -> [N, m]. With writes and rank 1
    only these are computed, so that gradients hold no zeros for all others."""
    if X.keys.shape[1] > 1 or sae.readers.full:
        return sae.readers.products(X).gather(1, index).relu()
    E = sae.readers.at(index)  # [N, m, 1, ·]
    of_keys = (E.keys[:, :, 0] * X.keys).sum(-1)
    of_values = (E.values[:, :, 0] * X.values).sum(-1)
    return (of_keys * of_values).relu()


def schedule(step: int, steps: int) -> float:
    """The learning rate's share of its peak: up over 50 steps, along a cosine down to a tenth."""
    cosine_to_a_tenth = 0.55 + 0.45 * math.cos(math.pi * step / steps)
    return min(1, (step + 1) / 50) * cosine_to_a_tenth


def auxiliary_loss(
    sae: WriteSAE,
    R: Factored,
    dead: Tensor,
    k_aux: int,
) -> Tensor:
    """The share of the residual R's energy that the k_aux best of the dead atoms leave."""
    R = Factored(R.keys.detach(), R.values.detach())
    scores = sae.readers.products(R)[:, dead].relu()
    a, best = scores.topk(min(k_aux, len(dead)))
    left = R.minus(sae.assemble(dead[best], a))
    return inner(left, left).mean() / inner(R, R).mean().clamp_min(1e-30)


def restart(
    sae: WriteSAE,
    optimiser,
    dead: Tensor,
    R: Factored,
    error: Tensor,
) -> Tensor:
    """Put dead atoms at the residuals R of the inputs with the largest errors, and clear Adam's
    running means of them. Returns which were put there."""
    worst = error.argsort(descending=True)[: len(dead)]
    restarted = dead[: len(worst)]
    sae.start(restarted, R.rows(worst))
    for parameter, memory in optimiser.state.items():
        if len(parameter) == sae.n_atoms:
            memory["exp_avg"][restarted] = 0
            memory["exp_avg_sq"][restarted] = 0
    return restarted


# ---- 7. Firings of a cell's SAE, and what is lost without them -----------------------------------
@torch.inference_mode()
def codes(cell: Cell) -> Table:
    """How the cell's SAE codes its text: a row per token, with passage, position, token, the
    write's dominant atom (index), its coefficient a, and the cosine of a A with the write."""
    parts = []
    for passage in torch.arange(len(cell.tokens)).split(8):
        tokens = cell.tokens[passage]
        n, T = tokens.shape
        (X,) = collect(cell.model, tokens, cell.layer, [cell.head])
        index, a, A = cell.sae.dominant(X)
        part = dict(passage=passage.repeat_interleave(T), position=torch.arange(T).repeat(n))
        part |= dict(token=tokens.flatten(), index=index, a=a, cosine=cosine(A, X))
        parts.append(part)
    return stack(parts)


def some_rows(table: Table, rows: Tensor) -> Table:
    """The rows of a table at an index, or where `rows` is true."""
    return {name: x[rows.to(x.device)] for name, x in table.items()}


def firings(cell: Cell, table: Table) -> Table:
    """The rows of `codes` where an atom fires at one of the cell's positions. Raises InputError if
    there are none."""
    here = fires(table["a"], table["cosine"], cell.sae.cfg["cosine_min"])
    at = some_rows(table, here & torch.isin(table["position"], torch.tensor(cell.positions)))
    none = "no atom fires here: take more --passages or a lower --cosine-min"
    require(len(at["index"]) > 0, none)
    return at


def events(cell: Cell, at: Table):
    """Group a table's rows by position and batch: yield a Point with a passage for each row of a
    group, and their indices in the table, [n]."""
    for p in points(cell._replace(positions=at["position"].unique().tolist())):
        here = (at["position"] == p.t) & torch.isin(at["passage"], p.passage.cpu())
        which = here.nonzero()[:, 0]
        if len(which):
            yield p.rows(at["passage"][which].to(p.passage) - p.passage[0]), which


def atoms_at(cell: Cell, at: Table) -> Factored:
    """a A of every row of `codes`."""
    device = cell.tokens.device
    return cell.sae.atom(at["index"].to(device), at["a"].to(device))


@torch.inference_mode()
def taken_out(cell: Cell, at: Table, X: Factored) -> Tensor:
    """How every token's log-probability changes if X_i is taken out of the state at the i-th row of
    `at`, in nats, the mean over the write's step and the ten after it. -> [N, vocab]"""
    change = torch.zeros(len(at["passage"]), cell.model.vocab)
    for p, i in events(cell, at):
        out = X.rows(i.to(p.passage.device))
        edited = p.branch(Factored(out.keys, -out.values))
        change[i] = (edited - p.logp).mean(1).cpu().float()
    return change


# ---- 8. The logit-change formula: from the paper's three factors to the exact second order -------
RUNGS = {  # each rung -> the order in the edit's size to which it is exact (0: not even the first)
    "three factors": 0,
    "three factors, fitted": 0,
    "exact transition": 0,
    "gated": 0,
    "gated and scaled": 0,
    "direct path": 0,
    "full Jacobian": 1,
    "mean of two Jacobians": 2,
    "exact head, mean of two": 2,
}
RANKS = (1, 2, 3, 4, 5, 10, 50)  # of the tokens whose logits are predicted, at the write's step


def norm_slope(norm: nn.Module, x: Tensor) -> Tensor:
    """What a norm multiplies each channel of x by: weight / rms, a LayerNorm weight / std."""
    if isinstance(norm, nn.LayerNorm):
        variance = x.var(-1, keepdim=True, correction=0)
        return norm.weight / (variance + norm.eps).sqrt()
    return (norm.offset + norm.weight) * norm.scale(x)


def slope(f, at: Tensor) -> Tensor:
    """df/dε of a function of a number at ε = at, by forward-mode differentiation."""
    with sdpa_kernel(SDPBackend.MATH):  # the attention that can do it
        _, derivative = torch.func.jvp(f, (at,), (torch.ones_like(at),))
    return derivative


def logit_ladder(p: Point, change: Factored, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Nine predictions of how logits move at t..t+10 if `change` is added to the state after t.

    A layer's output is y = Σ_heads W_O (gate · scale · o) + what o does not reach (in RWKV-7 o less
    its mean, held fixed up to "gated and scaled"), with
        gate  = silu(z) w (Gated DeltaNet, Mamba-2), g w (RWKV-7); w: the weight of the head's norm
        scale = 1/rms or 1/std of what that norm is given (models.py, `gate_and_scale`)
    If no layer came after it, logit = ⟨W_U[token], w_f x / rms(x)⟩ with y a part of the stream x.
    With all norms' statistics held fixed both are linear in δo (`moved_reads`):

        three factors      ⟨W_U, W_O δo⟩ with u_t = decay_t u_{t-1}, no erase (the paper)
          , fitted         times one least-squares scalar per edit and token (the paper's appendix)
        exact transition   ⟨W_U, W_O δo⟩ with u_t = A_t u_{t-1}: + the erase
        gated              ⟨W_U, W_O (gate · δo)⟩: gates may be negative, they decide the sign
        gated and scaled   ⟨W_U, w_f/rms · W_O (gate · scale · δo)⟩: scales decide the size
        direct path        + how the statistics move: the first order without the later layers
        full Jacobian      + the later layers: the exact first order
        mean of two        ½ (slope at ε = 0 + slope at ε = 1): the exact second order
        exact head         the same from y on, whose change is taken as it is

    The last four are slopes of functions of ε that apply ε times the change. change [P, r, ·],
    targets [P, n] -> predicted [P, 9, 11, n] in RUNGS' order, measured [P, 11, n].
    """
    model, layer, head = p.cell[:3]
    mixer, o, rest = model.layers[layer].mixer, p.o, p.rest
    last, _ = model.run(p.stream, p.cache, first=layer)
    gate, scale = mixer.gate_and_scale(o, rest)
    gate = gate[:, :, head]  # [P, 11, V]
    scale = scale[:, :, head]  # [P, 11, 1]
    W_O = model.out_map(layer)[:, head]  # [D, V]
    W_U = at_least_fp32(model.unembedding[targets])  # [P, n, D]
    final = norm_slope(model.norm, at_least_fp32(last.x))  # [P, 11, D]
    without_erase = p.s._replace(erase_in=None, erase_out=None)
    moved = p.moved(change)  # [P, 11, H, V]
    delta_o = moved[:, :, head]  # [P, 11, V]
    rungs = {  # each [P, 11, n]
        "three factors": moved_reads(change, without_erase) @ W_O.T @ W_U.mT,
        "exact transition": delta_o @ W_O.T @ W_U.mT,
        "gated": (gate * delta_o) @ W_O.T @ W_U.mT,
        "gated and scaled": final * ((gate * scale * delta_o) @ W_O.T) @ W_U.mT,
    }
    y, y_edited = (mixer.output(x, rest) for x in (o, o + moved))
    index = targets[:, None].expand(-1, HORIZONS, -1)

    def direct(eps: Tensor) -> Tensor:  # as if no layer came after this one
        x = last.x + mixer.output(o + eps * moved, rest) - y
        return at_least_fp32(model.unembed(last._replace(x=x))).gather(-1, index)

    def full(eps: Tensor) -> Tensor:  # the model
        return p.logits(change.times(eps)).gather(-1, index)

    def exact_head(eps: Tensor) -> Tensor:  # the model from y on
        mixed = p.stream._replace(x=p.stream.x + y + eps * (y_edited - y))
        return p.onward(mixed).gather(-1, index)

    zero, one = delta_o.new_zeros(()), delta_o.new_ones(())
    measured = full(one) - full(zero)
    rungs["three factors, fitted"] = fitted(rungs["three factors"], measured)
    rungs["direct path"] = slope(direct, zero)
    rungs["full Jacobian"] = slope(full, zero)
    rungs["mean of two Jacobians"] = (rungs["full Jacobian"] + slope(full, one)) / 2
    rungs["exact head, mean of two"] = (slope(exact_head, zero) + slope(exact_head, one)) / 2
    return torch.stack([rungs[name] for name in RUNGS], 1), measured


def fitted(x: Tensor, y: Tensor) -> Tensor:
    """x times the scalar that brings it nearest to y over the steps, dimension 1 of both."""
    power = x.square().sum(1, keepdim=True)
    scalar = (x * y).sum(1, keepdim=True) / power
    return scalar.nan_to_num() * x


@torch.no_grad()
def ladder(cell: Cell, eps: float = 0.1) -> Table:
    """`logit_ladder` at every firing of the cell's SAE, for three edits: swap (a A in the write's
    place), delete (the write taken out), small (the atom with norm eps added).

    Returns a row per firing: passage, position, index (the atom), and of each edit predicted_EDIT
    [N, 9, 11, 7] and measured_EDIT [N, 11, 7], for the tokens of RANKS. Raises InputError for none.
    """
    at, parts = firings(cell, codes(cell)), []
    for p, i in events(cell, at):
        X, A = p.write(), atoms_at(cell, some_rows(at, i))
        size = inner(A, A).sqrt()
        edits = dict(swap=A.minus(X), delete=Factored(X.keys, -X.values))
        edits["small"] = A.times(eps / size)
        ranked = p.logp[:, 0].topk(max(RANKS)).indices  # [n, 50]
        targets = ranked[:, torch.tensor(RANKS) - 1]
        part = {name: at[name][i] for name in ("passage", "position", "index")}
        for name, change in edits.items():
            predicted, measured = logit_ladder(p, change, targets)
            part |= {"predicted_" + name: predicted, "measured_" + name: measured}
        parts.append(part)
    return stack(parts)


def agreement(y: Tensor, y_hat: Tensor) -> dict[str, float]:
    """How well y_hat predicts y, any shape, nothing fitted.

    r2               1 − Σ(y − ŷ)² / Σ(y − mean y)²: 1 is perfect, 0 no better than the mean
    slope            of the least-squares line y = slope · ŷ: 1 if sizes are right
    sign_agreement   share of equal signs
    """
    y, y_hat = y.double().flatten(), y_hat.double().flatten()
    left = (y - y_hat).square().sum()
    spread = (y - y.mean()).square().sum()
    line = (y * y_hat).sum() / y_hat.square().sum()
    same = y.sign() == y_hat.sign()
    fit = dict(r2=1 - left / spread, slope=line, sign_agreement=same.double().mean())
    return {name: x.item() for name, x in fit.items()}


def ladder_figures(table: Table) -> list[dict]:
    """A dict per rung: `agreement` of the swap; with _delete and _small that of the other edits."""
    rungs = []
    for i, (name, order) in enumerate(RUNGS.items()):
        rung = dict(name=name, order=order, fitted="fitted" in name)
        for edit, suffix in dict(swap="", delete="_delete", small="_small").items():
            fit = agreement(table["measured_" + edit], table["predicted_" + edit][:, i])
            rung |= {key + suffix: x for key, x in fit.items()}
        rungs.append(rung)
    return rungs


# ---- 9. Steering: edits of the memory after which a token appears --------------------------------
EDITED = 3  # positions edited: the prompt's last three
NEW = 20  # tokens decoded after them
KEY_SIDES = ("write", "read")
VALUE_SIDES = ("formula", "gated", "gradient", "ascent", "memory")
STRATA = {"in prompt": True, "absent": False}  # of targets: do they stand in the prompt?


class Prompts(NamedTuple):
    """N prompts as the unedited model reads them. Edits go to C heads at their last n positions."""

    model: LanguageModel
    heads: list[tuple[int, int]]  # the C heads, as (layer, head)
    last: Tensor  # [N, n] the last tokens
    before: Cache  # before them
    after: Cache  # after them
    logits: Tensor  # [N, vocab] of the first new token
    said: Tensor  # [N, 20] the unedited continuation
    s: StepInputs  # of the heads side by side, over the n tokens: [N, n, C, ·]
    gate: Tensor  # [N, C, V] of `gate_and_scale` (it holds the norm's weight), at the last token

    def read(
        self,
        keys: Tensor,
        values: Tensor,
        then: Tensor,
    ) -> tuple[Tensor, Cache]:
        """Read the last n tokens, key valueᵀ added to each head's state at each, and tokens `then`:
        keys [N, n, C, K], values [N, n, C, V], then [N, m] -> logits from the prompt's last token
        on, [N, 1 + m, vocab], and the cache."""
        n, edits = self.last.shape[1], []
        for t in range(n):
            for c, (layer, head) in enumerate(self.heads):
                key, value = keys[:, t, c], values[:, t, c]
                edits.append(Edit(layer, head, self.before.length + t, key, value))
        logits, cache = self.model(torch.cat([self.last, then], 1), self.before, edits)
        return at_least_fp32(logits[:, n - 1 :]), cache


@torch.no_grad()
def read_prompts(
    model: LanguageModel,
    tokens: Tensor,
    heads,
    n: int = EDITED,
) -> Prompts:
    """Read prompts [N, T] natively, for edits of these (layer, head) pairs at the last n positions.
    Raises InputError for a head that is none, and if prompts are not longer than n."""
    heads = sorted(heads)
    for head in heads:
        model.check_cell(*head)
    length = tokens.shape[1]
    require(
        length > n,
        f"the prompt has {length} tokens; its last {n} are edited, and one must "
        "stand before them: give a longer one",
    )
    last = tokens[:, -n:]
    _, before = model(tokens[:, :-n])
    logits, after = model(last, before)
    said, _ = model.generate(logits[:, -1], after, NEW)
    stream, inputs, gates = model.embed(last), [], []
    for i, block in enumerate(model.layers):
        chosen = [head for layer, head in heads if layer == i]
        if chosen:
            _, o, s, rest, _ = block.read(stream, before.layers[i])
            gate, _ = block.mixer.gate_and_scale(o, rest)
            inputs.append(s.heads(chosen))
            gates.append(gate[:, -1, chosen])
        stream, _ = model.run(stream, before, first=i, last=i + 1)
    # simplification: heads of all layers have one size, so that they can stand side by side
    s = StepInputs(*(None if x[0] is None else torch.cat(x, 2) for x in zip(*inputs)))
    first, gate = at_least_fp32(logits[:, -1]), torch.cat(gates, 1)
    return Prompts(model, heads, last, before, after, first, said, s, gate)


@torch.no_grad()
def draw_targets(
    model: LanguageModel,
    tokens: Tensor,
    each: int,
    generator,
) -> Table:
    """Up to `each` targets of rank 100-1000 for the first new token, per prompt and stratum.
    tokens [P, T] -> a row per pair: prompt, target, stratum."""
    logits, _ = model(tokens)
    order = logits[:, -1].argsort(-1, descending=True)
    allowed = order[:, 99:1000].sort(-1).values  # by rank; then in the order of the vocabulary
    rows = []
    for stratum, wanted in enumerate(STRATA.values()):
        for prompt in range(len(tokens)):
            inside = torch.isin(allowed[prompt], tokens[prompt])
            candidates = allowed[prompt][inside == wanted].tolist()
            drawn = torch.randperm(len(candidates), generator=generator)[:each]
            rows += [(prompt, candidates[i], stratum) for i in drawn.tolist()]
    prompt, target, stratum = torch.tensor(rows, device=tokens.device).view(-1, 3).T
    return dict(prompt=prompt, target=target, stratum=stratum)


def read_key(s: StepInputs) -> Tensor:
    """The unit key under which a value added at s's first token weighs most in all reads of s.

    An edit κ yᵀ moves the read at t by (u_t · q_t) y with u_t = A_t ... A_1 κ, so by a gain κ · b_t
    with b_t = A_1ᵀ ... A_tᵀ q_t. The squared gains sum to κᵀ (Σ_t b_t b_tᵀ) κ, largest at the
    leading eigenvector; its sign: Σ_t κ · b_t > 0. Propagating the K unit keys gives the b_t.
    s [N, T, C, ·] -> [N, C, K].
    """
    N, _, C, K = s.q.shape
    each = torch.arange(C, device=s.q.device).repeat_interleave(K)  # every head K times,
    unit = torch.eye(K).to(s.q).repeat(C, 1)  # with one unit key each
    gain, _ = propagate(unit.expand(N, -1, -1), s.heads(each))  # [N, T, C·K]
    b = gain.unflatten(-1, (C, K))
    heard = torch.einsum("ntck,ntcl->nckl", b, b)
    key = torch.linalg.eigh(heard).eigenvectors[..., -1]  # [N, C, K]
    total = (key * b.sum(1)).sum(-1, keepdim=True)
    return torch.where(total < 0, -key, key)


def edit_keys(s: StepInputs, side: str) -> Tensor:
    """The keys under which values are added, [N, n, C, K]: "write", the position's own, or "read",
    the `read_key` of the reads from there to the prompt's end. Each is as long as the write beside
    it is large, ‖k‖‖v‖, so that a value's length is the edit's size in native writes."""
    unit = F.normalize(s.k, dim=-1)
    if side == "read":
        n = s.q.shape[1]
        unit = torch.stack([read_key(s.times(t)) for t in range(n)], 1)
    size = s.k.norm(dim=-1) * s.v.norm(dim=-1)  # [N, n, C]
    return unit * size.unsqueeze(-1)


def sized(values: Tensor, size: float, budget: bool) -> Tensor:
    """Values [N, n, C, V] with length `size` each; or, as a budget, in proportion, the squares of a
    prompt's lengths summing to size²."""
    length = values.norm(dim=-1, keepdim=True)
    if budget:
        length = length.flatten(1).norm(dim=1)[:, None, None, None]
    return values * (size / length.clamp_min(1e-30))


def score(
    prompts: Prompts,
    keys: Tensor,
    values: Tensor,
    targets: Tensor,
    what: str,
) -> Tensor:
    """What values are to raise, [N]:

    logit     of the target for the first new token
    log_p     its log-probability there
    memory    log Σ_{i=2..20} p(unedited tokens 2 .. i−1, then the target): the log-probability that
              the edited model, its first token forced, follows the unedited continuation and
              leaves it for the target (a sum only, where that says the target itself). Without
              the tokens on the way the target is often made probable at a step never reached.
    """
    said = prompts.said if what == "memory" else prompts.said[:, :1]
    logits, _ = prompts.read(keys, values, said[:, :-1])  # [N, m, vocab], m = 20 or 1
    target = targets[:, None].expand_as(said)
    if what == "logit":
        return at_token(logits, target)[:, 0]
    log_p = logits.log_softmax(-1)
    of_target = at_token(log_p, target)
    if what == "log_p":
        return of_target[:, 0]
    of_said = at_token(log_p, said)[:, 1:]  # steps 2 to 20
    on_the_way = of_said.cumsum(1) - of_said  # tokens 2 to i − 1
    return (on_the_way + of_target[:, 1:]).logsumexp(1)


def gradient(
    prompts: Prompts,
    keys: Tensor,
    values: Tensor,
    targets: Tensor,
    what: str,
) -> Tensor:
    """d score / d values, by one backward pass. -> [N, n, C, V]"""
    with torch.enable_grad():
        values = values.detach().requires_grad_()
        total = score(prompts, keys, values, targets, what).sum()
        return torch.autograd.grad(total, values)[0]


def formula_slopes(
    prompts: Prompts,
    keys: Tensor,
    targets: Tensor,
    gated: bool,
) -> Tensor:
    """How the target's first logit rises with each value by the ladder's rungs, [N, n, C, V]:
    (u · q) W_Oᵀ W_U[target], u by the decay alone (three factors, the paper's), or
    (u · q) gate · W_Oᵀ W_U[target], u exact (gated)."""
    model, s = prompts.model, prompts.s
    if not gated:
        s = s._replace(erase_in=None, erase_out=None)
    gains = []
    for t in range(keys.shape[1]):
        gain, _ = propagate(keys[:, t], s.times(t))  # [N, n − t, C]
        gains.append(gain[:, -1])
    W_O = torch.stack([model.out_map(layer)[:, head] for layer, head in prompts.heads])  # [C, D, V]
    W_U = at_least_fp32(model.unembedding[targets])  # [N, D]
    seen = torch.einsum("nd,cdv->ncv", W_U, W_O)
    if gated:
        seen = prompts.gate * seen
    return torch.stack(gains, 1).unsqueeze(-1) * seen.unsqueeze(1)


def steering_values(
    prompts: Prompts,
    keys: Tensor,
    targets: Tensor,
    kind: str,
    size: float,
    budget: bool,
    generator,
    steps: int = 20,
) -> Tensor:
    """The values of a prompt's edits, [N, n, C, V], `sized`:

    random             the control
    formula, gated     along `formula_slopes`
    gradient           along that of the logit, all that comes after the read included
    ascent             from there `steps` times towards the gradient of log_p, by less and less
    memory             the same with the gradient of memory (`score`) throughout
    """
    zero = torch.zeros_like(prompts.s.v)
    if kind == "random":
        drawn = torch.randn(zero.shape, generator=generator)
        return sized(drawn.to(zero), size, budget)
    if kind in ("formula", "gated"):
        return sized(formula_slopes(prompts, keys, targets, kind == "gated"), size, budget)
    first, later = ("memory", "memory") if kind == "memory" else ("logit", "log_p")
    values = sized(gradient(prompts, keys, zero, targets, first), size, budget)
    if kind == "gradient":
        return values
    for i in range(steps):
        up = sized(gradient(prompts, keys, values, targets, later), 1, budget)
        uphill = sized(values, 1, budget) + (1 - i / steps) * up
        values = sized(uphill, size, budget)
    return values


def state_change(edited: Cache, native: Cache) -> Tensor:
    """‖S' − S‖ / ‖S‖ over all recurrent states together (Frobenius), [N]."""
    moved = norm = 0
    for ours, theirs in zip(edited.layers, native.layers):
        if "state" in theirs:
            change = ours["state"] - theirs["state"]  # [N, H, K, V]
            moved += change.square().sum((1, 2, 3))
            norm += theirs["state"].square().sum((1, 2, 3))
    return (moved / norm).sqrt()


def forced(model: LanguageModel, first: Tensor, cache: Cache) -> tuple[Tensor, Tensor]:
    """Force the first new token [N], decode 19 more: tokens [N, 20], the logits of the 19."""
    logits, cache = model(first[:, None], cache)
    tokens, logits = model.generate(logits[:, -1], cache, NEW - 1)
    return torch.cat([first[:, None], tokens], 1), at_least_fp32(logits)


def nats(prompts: Prompts, tokens: Tensor) -> Tensor:
    """−log p per token of continuations [N, 20] under the unedited model, [N]."""
    logits, _ = prompts.model(tokens[:, :-1], prompts.after)
    logits = torch.cat([prompts.logits[:, None], at_least_fp32(logits)], 1)
    return F.cross_entropy(logits.mT, tokens, reduction="none").mean(1)


class Steering(NamedTuple):
    """An edit: which heads, under which keys, which values, how large."""

    heads: list[tuple[int, int]]  # (layer, head)
    key: str = "read"  # one of KEY_SIDES
    value: str | None = None  # one of VALUE_SIDES, "random", or None: no edit
    size: float = 3.0  # of each edit in native writes,
    budget: bool = False  # or of all of a prompt's together
    n: int = EDITED  # at how many of the last positions


@torch.no_grad()
def steer(
    model: LanguageModel, tokens: Tensor, pairs: Table, edit: Steering, seed: int = 0
) -> Table:
    """Edit the states while the last tokens of prompts [P, T] are read, then decode 20 tokens.

    pairs: `draw_targets`. Returns a row per pair: the columns of pairs, and
        said [20]        decoded greedily
        kept [20]        the same with the first token forced back to the unedited one: if the
                         target still comes, the edit is a memory
        log_p [20]       of the target at each step of `kept` (the first before anything is forced)
        logit            of the target for the first new token
        nll              −log p of what is said under the unedited model, nats per token
        nll_forced       the same if, without an edit, the first token is forced to the target
        size             ‖S' − S‖ / ‖S‖ of all states at the prompt's end
    """
    parts, batch = [], max(1, BATCH_BYTES // (4 * NEW * model.vocab))
    rng = torch.Generator().manual_seed(seed)
    for row in torch.arange(len(pairs["target"]), device=tokens.device).split(batch):
        part = some_rows(pairs, row)
        target = part["target"]
        prompts = read_prompts(model, tokens[part["prompt"]], edit.heads, edit.n)
        logits, after = prompts.logits[:, None], prompts.after
        if edit.value is not None:
            keys = edit_keys(prompts.s, edit.key)
            how = edit.value, edit.size, edit.budget, rng
            values = steering_values(prompts, keys, target, *how)
            logits, after = prompts.read(keys, values, prompts.said[:, :0])
        said, _ = model.generate(logits[:, -1], after, NEW)
        kept, later = forced(model, prompts.said[:, 0], after)
        log_p = torch.cat([logits, later], 1).log_softmax(-1)  # [n, 20, vocab]
        without, _ = forced(model, target, prompts.after)
        part |= dict(said=said, kept=kept, size=state_change(after, prompts.after))
        part |= dict(logit=at_token(logits[:, 0], target), nll=nats(prompts, said))
        part["log_p"] = at_token(log_p, target[:, None].expand_as(kept))
        part["nll_forced"] = nats(prompts, without)
        parts.append(part)
    return stack(parts)


def appears(table: Table) -> Tensor:
    """Whether the target is among the 20 tokens (the paper's measure). [N]"""
    return (table["said"] == table["target"][:, None]).any(1)


def persists(table: Table) -> Tensor:
    """Whether it is among tokens 2 to 20 if the first is forced back to the unedited one. [N]"""
    return (table["kept"][:, 1:] == table["target"][:, None]).any(1)


def steering_figures(edited: Table, native: Table, random: Table) -> dict:
    """Figures of the same pairs with an edit, with none and with a random one.

    *_rate: share that `appears`; *_persists_rate: that `persists`; *_perplexity: of what is said,
    under the unedited model (forced: the first token forced to the target, without an edit).
    said_at [20]: how often each step of `kept` is the first that says the target.
    """
    figures = dict(n_pairs=len(edited["target"]))
    for kind, table in dict(native=native, edited=edited, random=random).items():
        figures[kind + "_rate"] = mean(appears(table))
        figures[kind + "_persists_rate"] = mean(persists(table))
        figures[kind + "_perplexity"] = table["nll"].mean().exp().item()
    kept = persists(edited)
    says = edited["kept"][kept, 1:] == edited["target"][kept, None]
    first = 1 + says.int().argmax(1)
    return figures | dict(
        forced_perplexity=edited["nll_forced"].mean().exp().item(),
        persists_rate=figures["edited_persists_rate"],
        persists_ci95=wilson(int(kept.sum()), len(kept)),
        first_step_lift_nats=(edited["log_p"] - native["log_p"])[:, 0].mean().item(),
        said_at=torch.bincount(first, minlength=NEW).tolist(),
    )


# ---- 10. Erasing: an atom taken out where it fires -----------------------------------------------
def every_second(file: Tensor) -> Tensor:
    """True for passages of every second file: there we choose, on the others we test. [P]"""
    files = file.unique()
    require(
        len(files) > 1,
        "the text is one file; what is chosen on some files is tested on others, "
        "so give a folder of them",
    )
    return torch.isin(file, files[::2])


@torch.inference_mode()
def promoted_tokens(cell: Cell, at: Table, n_atoms: int) -> tuple[Tensor, Tensor]:
    """Of these firings the atoms that fire in most files, and the token that each promotes by the
    formula alone, [n_atoms] each. No edit has a say in it: by the rung "gated" for a A

        argmax_token ⟨W_U[token], W_O (gate_t · δo_t)⟩, on the mean over firings and eleven steps
    """
    model, layer, head = cell[:3]
    file_and_atom = torch.stack([cell.file[at["passage"]], at["index"]])
    _, atom = file_and_atom.unique(dim=1)
    uses = torch.bincount(atom, minlength=cell.sae.n_atoms)
    atoms = uses.topk(min(n_atoms, int((uses > 0).sum()))).indices
    at = some_rows(at, torch.isin(at["index"], atoms))
    W_O = model.out_map(layer)[:, head]  # [D, V]
    total = W_O.new_zeros(len(uses), W_O.shape[1])  # of gate · δo, per atom
    for p, i in events(cell, at):
        part = some_rows(at, i)
        gate, _ = model.layers[layer].mixer.gate_and_scale(p.o, p.rest)
        delta_o = moved_reads(atoms_at(cell, part), p.s)  # [n, 11, V]
        moved = (gate[:, :, head] * delta_o).mean(1)
        total.index_add_(0, part["index"].to(total.device), moved)
    W_U = at_least_fp32(model.unembedding)  # [vocab, D]
    promoted = total[atoms] @ W_O.T @ W_U.T  # [n_atoms, vocab]
    return atoms, promoted.argmax(-1).cpu()


@torch.inference_mode()
def erasure(cell: Cell, n_atoms: int = 20) -> Table:
    """Does an atom promote a token? Take it out where it fires, and see whether that token falls.

    Atoms and tokens are chosen in every second file (`promoted_tokens`). In the others, at each
    firing of these atoms, a matrix of the norm ‖a A‖ is taken out of the state:
        atom         a A itself
        random       a random direction: what any matrix of this size does
        other        another atom of the dictionary
        elsewhere    a A at the same position of another passage, where the atom does not fire
    Since no edit had a say in the token, `random` is centred on zero.

    Returns a row per firing: passage, file, position, index (the atom), promoted (the token), and
    for each of the four the change of the token's log p in nats, the mean over the write's step and
    the ten after it. Raises InputError for a text of one file, and for no firings.
    """
    choosing, table = every_second(cell.file), codes(cell)
    at = firings(cell, table)
    chosen = choosing[at["passage"]]
    atoms, promoted = promoted_tokens(cell, some_rows(at, chosen), n_atoms)
    at = some_rows(at, ~chosen & torch.isin(at["index"], atoms))
    N, sae = len(at["index"]), cell.sae
    require(N > 0, "no atom fires in both halves of the files: take more --passages")
    which = (at["index"][:, None] == atoms).int().argmax(1)
    at["promoted"] = promoted[which]
    at["file"] = cell.file[at["passage"]]
    dominant = table["index"].view(len(cell.tokens), -1)[:, at["position"]]  # [passages, N]
    silent = (dominant != at["index"]) & ~choosing[:, None]
    lots = torch.rand(silent.shape, generator=cell.rng)
    A = atoms_at(cell, at)
    shift = torch.randint(1, max(2, sae.n_atoms), (N,), generator=cell.rng)
    another = (at["index"] + shift) % sae.n_atoms
    B = atoms_at(cell, at | dict(index=another))
    R = random_direction(A, cell.rng)
    out = [A, as_large_as(A, R), as_large_as(A, B), A]
    away = at | dict(passage=(lots * silent).argmax(0))
    where = stack([at, at, at, away])
    X = Factored(*(torch.cat(sides) for sides in zip(*out)))
    change = at_token(taken_out(cell, where, X), where["promoted"]).chunk(4)
    change[3][~silent.any(0)] = math.nan  # the atom fires everywhere
    return at | dict(zip(("atom", "random", "other", "elsewhere"), change))


def as_large_as(Y: Factored, X: Factored) -> Factored:
    """X, with Y's norm."""
    return X.times((inner(Y, Y) / inner(X, X)).sqrt())


def erasure_figures(table: Table, generator: torch.Generator) -> dict:
    """Figures of N firings, in nats (negative: the token falls). effect: the mean of atom minus
    random, paired; its interval draws whole files again."""
    figures = dict(n_firings=len(table["atom"]), n_files=len(table["file"].unique()))
    columns = dict(firing="atom", random="random", other_atom="other", elsewhere="elsewhere")
    for name, column in columns.items():
        x = table[column].double()
        x = x[x.isfinite()]
        figures[name + "_median"] = x.median().item()
        figures[name + "_mean"] = mean(x)
        figures[name + "_falls"] = mean(x < 0)
    gain = table["atom"] - table["random"]
    figures["effect"] = mean(gain)
    return figures | dict(effect_ci95=cluster_bootstrap(gain, table["file"], generator))


# ---- 11. A population of atoms -------------------------------------------------------------------
def token_shares(at: Table) -> tuple[Tensor, Tensor, Tensor]:
    """Of firings (`codes`) the atoms, how often each fires, and the share of its firings that are
    on its most frequent token: [n] each."""
    atoms, which, uses = at["index"].unique(return_inverse=True, return_counts=True)
    pairs, n = torch.stack([which, at["token"]]).unique(dim=1, return_counts=True)
    most = torch.zeros(len(atoms)).scatter_reduce_(0, pairs[0], n.float(), "amax")
    return atoms, uses, most / uses


def population_figures(table: Table, cosine_min: float) -> dict:
    """Of `codes`: how atoms are used, over the firings (a > 0, cosine at least cosine_min).

    often_share    share of firings by atoms that fire at least five times
    token_purity   mean over those atoms of the share of their firings on their most frequent token
    groups         `two_gaussians` of the mean cosines of atoms with the writes that they dominate,
                   firing or not, at least five: the paper's registers (the nearer) and bundles
    """
    dominant = some_rows(table, table["a"] > 0)
    at = some_rows(table, fires(table["a"], table["cosine"], cosine_min))
    atoms, uses, share = token_shares(at)
    often = uses >= 5
    _, which, n = dominant["index"].unique(return_inverse=True, return_counts=True)
    mean_cosine = torch.bincount(which, dominant["cosine"].double()) / n
    return dict(
        n_firings=int(uses.sum()),
        n_atoms=len(atoms),
        n_atoms_often=int(often.sum()),
        often_share=int(uses[often].sum()) / max(1, int(uses.sum())),
        token_purity=mean(share[often]),
        groups=two_gaussians(mean_cosine[n >= 5]),
    )


def two_gaussians(x: Tensor, steps: int = 500) -> dict:
    """Two Gaussians fitted to x [N] by expectation maximisation, from the lower and the upper half.

    Returns n, mean and deviation of both, the nearer to 1 first, and delta_bic, BIC of two minus
    BIC of one, where BIC = parameters · log N − 2 log likelihood: negative if two are worth their
    parameters. NaN for fewer than ten.
    """
    if len(x) < 10:
        unknown = [math.nan, math.nan]
        return dict(n=[0, 0], mean=unknown, deviation=unknown, delta_bic=math.nan)
    x = x.double()
    upper = (x > x.median()).double()
    share = torch.stack([upper, 1 - upper])  # [2, N] how far each x belongs to each
    for _ in range(steps):
        total = share.sum(1)
        centre = (share @ x) / total
        off = x - centre[:, None]  # [2, N]
        variance = (share * off.square()).sum(1) / total
        deviation = variance.sqrt().clamp_min(1e-3)
        prior = total / len(x)
        log_density = prior.log()[:, None] + log_normal(off, deviation[:, None])
        share = log_density.softmax(0)
    one = log_normal(x - x.mean(), x.std(correction=0)).sum()
    two = log_density.logsumexp(0).sum()
    nearer = centre.argsort(descending=True)
    return dict(
        n=total[nearer].round().int().tolist(),
        mean=centre[nearer].tolist(),
        deviation=deviation[nearer].tolist(),
        delta_bic=(5 - 2) * math.log(len(x)) - 2 * (two - one).item(),
    )


def log_normal(off: Tensor, deviation: Tensor) -> Tensor:
    """The log density of a Gaussian, off its mean."""
    constant = 0.5 * math.log(2 * math.pi)
    return -0.5 * (off / deviation).square() - deviation.log() - constant


@torch.inference_mode()
def passage_test(cell: Cell) -> Table:
    """All firings of a passage at once: bits per token (over the tokens after the first position)
    of the unmodified model (native), with their writes deleted, with their atoms in the writes'
    places, and with random rank-1 matrices of the writes' norms there. -> a row per passage."""
    model, layer, head = cell[:3]
    parts, positions = [], list(cell.positions)
    fit = 10 * BATCH_BYTES // (4 * cell.tokens.shape[1] * model.vocab)  # whole passages' logits
    for tokens in cell.progress(cell.tokens.split(max(1, min(16, fit)))):
        n, T = tokens.shape
        (X,) = collect(model, tokens, layer, [head])
        _, a, A = cell.sae.dominant(X)
        firing = fires(a, cosine(A, X), cell.sae.cfg["cosine_min"])
        R = random_direction(X, cell.rng).times(inner(X, X).sqrt())
        part = dict(firings=firing.view(n, T)[:, positions].sum(1))
        nothing = Factored(X.keys, 0 * X.values)
        for name, Y in dict(native=X, delete=nothing, atom=A, random=R).items():
            change = Y.minus(X).times(firing)  # nothing where no atom fires
            keys, values = (x.unflatten(0, (n, T)) for x in change)  # [n, T, r, ·]
            edits = []
            for t in positions if name != "native" else []:
                for r in range(keys.shape[2]):
                    edits.append(Edit(layer, head, t, keys[:, t, r], values[:, t, r]))
            logits, _ = model(tokens, edits=edits)
            predicted = logits[:, positions[0] : -1]
            nll = F.cross_entropy(predicted.mT, tokens[:, positions[0] + 1 :], reduction="none")
            part["bits_" + name] = nll.mean(1) / math.log(2)
        parts.append(part)
    return stack(parts)
