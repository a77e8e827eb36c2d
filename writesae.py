"""WriteSAE: dictionaries whose atoms are rank-1 matrices, and the test of what they stand for.

A recurrent head of Gated DeltaNet, Mamba-2 or RWKV-7 adds one matrix k vᵀ to its state at each
token (models.py). Learn a few typical such matrices, put one where a real one was, and measure how
far the model's predictions move. The core of it, for one head of one layer:

    k, v = collect(model, tokens, layer=1, heads=[0])  # k [n, T, 1, K], v [n, T, 1, V]
    sae = fit(k[1:, :, 0].flatten(0, 1), v[1:, :, 0].flatten(0, 1), 2048, rng)
    k, v = k[:1, 40, 0], v[:1, 40, 0]  # what head 0 writes at token 40 of the first text
    key, value = sae(k, v)  # the stand-in: a times the nearest atom
    effect(model, tokens[:1], 40, [Edit(1, 0, 40, -k, v), Edit(1, 0, 40, key, value)])  # nats

Six words are used throughout:
    write      k vᵀ, what a head adds to its state at a token, kept as its two sides: k [K], v [V]
    atom       A_i = key_i value_iᵀ, one of the n matrices of a dictionary
    a          a write's coefficient at its nearest atom: k vᵀ ≈ a A_i (A_t of models.py is another)
    stand-in   the matrix that is put in a write's place: a A_i, or whatever else is tested
    near       X is near Y if ⟨X − Y, X − Y⟩ is small; a *metric* says what ⟨ , ⟩ counts
    effect     KL(native ‖ edited) of the next-token predictions, summed over the write's own step
               and the ten after it, in nats; native is the unmodified model

`python run.py replace` puts seven stand-ins in the same places: nothing, a random direction, the
nearest of n random writes (`untrained`) and of n learned atoms (`fit`), each near as numbers and
near as later reads see it, and a random matrix exactly as near as that last atom. Three of them say
what it finds. Random writes leave less of the effect by reads: near has to be what later reads use.
Learned atoms leave less again: learning buys nearness. And the matrix as near leaves as little: a
stand-in is as good as it is near, whatever it is. "The paper" is WriteSAE, arXiv 2605.12770.
"""

from __future__ import annotations

import json
from typing import Callable, NamedTuple

import safetensors.torch
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from models import Cache, Edit, LanguageModel, StepInputs, as_input_error, at_least_fp32
from models import check_cell, check_file, outer, propagate, recurrence, require, whole_file

progress: Callable = iter  # wraps long loops; run.py puts a progress bar here


# ---- 1. The dictionary ----
# New here: atoms, how a write's is found, two ways to get them. (Section 5 has the input checks.)
def unit(x, M):
    """Scale vectors x [..., D] to length 1 as the metric M [D, D] measures it: xᵀ M x = 1."""
    return x / ((x @ M) * x).sum(-1, keepdim=True).sqrt().clamp_min(1e-30)


def nearest(x, y, keys, values):
    """Find each write's largest product (key_i · x)(value_i · y): the index i and the product, [N]
    each. x, y [N, ·], keys, values [n, ·]; no K x V matrix is formed."""
    index = torch.empty(len(x), dtype=torch.long, device=x.device)
    a = x.new_empty(len(x))
    for start in range(0, len(x), 128):  # so few stay in the processor's cache
        rows = slice(start, start + 128)
        every_a = (x[rows] @ keys.T) * (y[rows] @ values.T)  # [128, n]
        a[rows], index[rows] = every_a.max(-1)
    return index, a


class WriteSAE(nn.Module):
    """A sparse autoencoder of writes: n matrices of rank 1, one of them active at a time.

        A_i = key_i value_iᵀ      a_i = ⟨A_i, k vᵀ⟩      i = argmax a      k vᵀ ≈ a_i A_i

    The metric says what ⟨ , ⟩ means: ⟨X, Y⟩ = tr(M_k X M_v Yᵀ). With M = identity it is the sum of
    all products of entries: near as numbers. Of rank-1 matrices it is a product of scalar products,

        a_i = (find_key_i · k)(find_value_i · v)    find_key = M_k key    find_value = M_v value

    As ⟨A_i, A_i⟩ = 1, a_i brings a A_i nearest to the write X, and leaves ⟨X, X⟩ − a_i². Atoms are
    only added (a < 0 counts as 0), so the one with the largest a is the nearest.

    key [n, K], value [n, V]: brought to length 1 in the metric; M_k [K, K], M_v [V, V]: None is the
    identity; about: a dict of notes that travels with a file. Raises InputError if they do not fit.
    Two atoms, (3, 4) (1, 0)ᵀ / 5 and (1, 0) (0, 1)ᵀ; the write (3, 4) (2, 9)ᵀ has a = 10 and 27:

    >>> sae = WriteSAE(torch.tensor([[3., 4.], [1., 0.]]), torch.eye(2))
    >>> sae.encode(torch.tensor([[3., 4.]]), torch.tensor([[2., 9.]]))
    (tensor([1]), tensor([27.]))
    """
    def __init__(self, key, value, M_k=None, M_v=None, about=None):
        super().__init__()
        key, value = as_writes(key, value)
        M_k, M_v = metric_or_identity(key, M_k), metric_or_identity(value, M_v)
        key, value = unit(key, M_k), unit(value, M_v)
        tensors = dict(key=key, value=value, M_k=M_k, M_v=M_v)
        tensors |= dict(find_key=key @ M_k, find_value=value @ M_v)
        for name, x in tensors.items():
            self.register_buffer(name, x)
        self.about = about or {}

    def encode(self, k, v):
        """Choose each write's atom: k [..., K], v [..., V] -> index [...], a [...] (a is ≥ 0)."""
        k, v = as_writes(k, v, self.key.shape[1], self.value.shape[1])
        k, v, shape = k.to(self.key), v.to(self.key), k.shape[:-1]
        index, a = nearest(k.flatten(0, -2), v.flatten(0, -2), self.find_key, self.find_value)
        return index.view(shape), a.relu().view(shape)

    def decode(self, index, a):
        """Build a A: index, a [N] -> its sides, key (a included) [N, K] and value [N, V]."""
        return a[..., None] * self.key[index], self.value[index]

    def forward(self, k, v):
        """Build what stands in for each write: k [N, K], v [N, V] -> the same shapes."""
        return self.decode(*self.encode(k, v))

    def save(self, path: str):
        """Write it to a safetensors file. Raises InputError."""
        save_sae(self, path)

    @staticmethod
    def load(path: str) -> WriteSAE:
        """Read what `save` wrote. Raises InputError for a file that holds no such SAE."""
        return load_sae(path)


def untrained(k, v, n, rng, M_k=None, M_v=None) -> WriteSAE:
    """Take n different writes k [N, K], v [N, V] as atoms, learn nothing: the null, what learning
    has to beat. Raises InputError for n > N."""
    k, v = as_writes(k, v)
    require(1 <= n <= len(k), f"{n} atoms from {len(k)} writes: allowed are 1 to {len(k)}")
    drawn = torch.randperm(len(k), generator=rng)[:n].to(k.device)
    return WriteSAE(k[drawn], v[drawn], M_k, M_v)


@torch.no_grad()
def fit(k, v, n, rng, M_k=None, M_v=None, steps=12, sample=None, memory=0.75) -> WriteSAE:
    """Learn n atoms: k-means whose centres are rank-1 matrices. Each step draws writes x yᵀ and

        1. gives each to its nearest atom, with a = ⟨A_i, x yᵀ⟩;
        2. moves the atom's key to Σ a ⟨value_i, y⟩ x over its writes (least squares), then its
           value, with the new key, to Σ a ⟨key_i, x⟩ y, both brought back to unit length;
        3. starts atoms anew whose count is 0.5 or less, at this step's writes with the smallest a.

    Sums and counts keep `memory` of what they held, so that an atom rests on more than one step's
    writes. All writes count alike: they are brought to unit length first. k [N, K], v [N, V]: any
    writes; sample: how many a step, by default max(30,000, 8 n). First the atoms are drawn, by
    torch.randint(N, (n,), generator=rng), then each step's writes in the same way. Raises
    InputError for what are no writes, and for n > N.
    """
    k, v = as_writes(k, v)
    require(1 <= n <= len(k), f"{n} atoms from {len(k)} writes: allowed are 1 to {len(k)}")
    M_k, M_v = metric_or_identity(k, M_k), metric_or_identity(v, M_v)
    k, v, sample = unit(k, M_k), unit(v, M_v), sample or max(30_000, 8 * n)
    drawn = torch.randint(len(k), (n,), generator=rng)
    key, value, count = k[drawn], v[drawn], k.new_zeros(n)
    key_sum, value_sum = torch.zeros_like(key), torch.zeros_like(value)
    for _ in progress(range(steps)):
        drawn = torch.randint(len(k), (sample,), generator=rng)
        x, y = k[drawn], v[drawn]
        x_seen, y_seen = x @ M_k, y @ M_v  # the metric on this side: ⟨key, x⟩ = key · x_seen
        index, a = nearest(x_seen, y_seen, key, value)  # 1.
        for held in (key_sum, value_sum, count):
            held *= memory
        count.index_add_(0, index, torch.ones_like(a))
        used = count > 0.5
        weight = a * (value[index] * y_seen).sum(-1)  # 2.
        key_sum.index_add_(0, index, weight[:, None] * x)
        key[used] = unit(key_sum[used], M_k)
        weight = a * (key[index] * x_seen).sum(-1)
        value_sum.index_add_(0, index, weight[:, None] * y)
        value[used] = unit(value_sum[used], M_v)
        unused = (~used).nonzero()[:sample, 0]  # 3.
        worst = a.argsort()[: len(unused)]
        key[unused], value[unused] = x[worst], y[worst]
        for held in (key_sum, value_sum, count):
            held[unused] = 0
    return WriteSAE(key, value, M_k, M_v)


# ---- 2. The test, at one position ----
# New here: how far the predictions move if something else stands in the state.
LATER = 11  # predictions that an effect sums over: the write's own step and the ten after it


def kl_divergence(log_p, log_q):
    """Return KL(p ‖ q) in nats, from log-probabilities [..., vocab] -> [...].

    In fp32 Σ p (log p − log q) loses effects below 1e-7 to rounding; this still sees 1e-9.
    """
    # Σ p (e^d − 1 − d) with d = log q − log p: the added Σ p (e^d − 1) = Σ q − Σ p is zero, but now
    # every term is ≥ 0 and of second order in d. (From d = 1 on as q − p − p d: e^d may overflow.)
    shape, vocab = log_p.shape[:-1], log_p.shape[-1]
    log_p, log_q = log_p.reshape(-1, vocab), log_q.reshape(-1, vocab)
    kl = log_p.new_empty(len(log_p))
    for start in range(0, len(kl), 128):
        rows = slice(start, start + 128)
        p, q, d = log_p[rows].exp(), log_q[rows].exp(), log_q[rows] - log_p[rows]
        terms = torch.where(d < 1, p * (d.expm1() - d), q - p - p * d)
        kl[rows] = terms.sum(-1)
    return kl.view(shape)


@torch.no_grad()
def effect(model, tokens, t, edits):
    """Measure how far edits at token t move the next eleven predictions: tokens [B, T] -> [B].

        Σ KL(native ‖ edited) of the next-token distribution at t, t + 1, ..., t + 10, in nats

    To replace a write, two edits: Edit(layer, head, t, -k, v) takes it out, Edit(layer, head, t,
    key, value) puts the stand-in there. Raises InputError if not ten tokens come after t.
    """
    require(t + LATER <= tokens.shape[1], f"position {t} of {tokens.shape[1]} tokens: "
            f"{LATER - 1} must come after it")
    steps = slice(t, t + LATER)
    native = at_least_fp32(model(tokens)[0][:, steps]).log_softmax(-1)
    edited = at_least_fp32(model(tokens, edits=edits)[0][:, steps]).log_softmax(-1)
    return kl_divergence(native, edited).sum(-1)


# ---- 3. The same over a text ----
# New here: what lies below the layer runs once, the rest once without edits, and for each position
# eleven tokens from the layer up, where each stand-in of each passage is a row of one batch.
@torch.inference_mode()
def collect(model, tokens, layer, heads):
    """Collect what heads of a layer write: tokens [n, T] -> k [n, T, H, K], v [n, T, H, V], on the
    CPU. One pass up to the layer serves all heads."""
    k, v = [], []
    for batch in progress(tokens.split(16)):
        stream, _ = model.run(model.embed(batch), last=layer)
        s = model.step_inputs(stream, layer).heads(heads)
        k.append(s.k.cpu())
        v.append(s.v.cpu())
    return torch.cat(k), torch.cat(v)


@torch.no_grad()
def native_run(model, layer, tokens, positions):
    """Run passages [B, T], and stop at each position t for runs with edits to start there.

    Yields t, the stream that enters the layer at t..t+10, the cache of all before t (the layer's
    and those above it), and the native log-probabilities [B, 11, vocab]. Positions increase. Raises
    InputError if one has not a token before it (for the cache) and ten after it.
    """
    low, high = min(positions), max(positions)
    require(low >= 1 and high + LATER <= tokens.shape[1], f"positions {low}..{high} do not fit "
            f"{tokens.shape[1]} tokens: one comes before the first, {LATER - 1} after the last")
    stream, _ = model.run(model.embed(tokens), last=layer)
    after, _ = model.run(stream, first=layer)  # for the predictions; once more below, for caches
    cache, done = None, 0
    for t in positions:
        _, cache = model.run(stream.times(done, t), cache, first=layer)
        done = t
        native = at_least_fp32(model.unembed(after.times(t, t + LATER))).log_softmax(-1)
        yield t, stream.times(t, t + LATER), cache, native


def onward(model, layer, stream, cache, edits):
    """Run on from a point of `native_run`, with edits -> log-probabilities [B, 11, vocab]."""
    stream, _ = model.run(stream, cache, edits, first=layer)
    return at_least_fp32(model.unembed(stream)).log_softmax(-1)


@torch.inference_mode()
def replacement(model, layer, head, tokens, positions, stand_ins: dict) -> dict:
    """Put stand-ins where a head's writes were, one at a time, everywhere in a text.

    tokens [n, T]; positions: P of each passage, increasing; stand_ins: name -> key [n, P, K],
    value [n, P, V], or for sums of m matrices [n, P, m, K] and [n, P, m, V]. Returns name -> effect
    [n, P], as `effect` of the edits gives it.
    """
    check_cell(model, layer, head)
    keys = torch.stack([key for key, _ in stand_ins.values()]).to(tokens.device)  # [C, n, P, K]
    values = torch.stack([value for _, value in stand_ins.values()]).to(tokens.device)
    effects = torch.zeros(keys.shape[:3])  # [C, n, P]
    for passage in progress(passages_at_once(model, tokens, len(keys))):
        points = native_run(model, layer, tokens[passage], positions)
        for i, (t, stream, cache, native) in enumerate(points):
            s, _, _ = model.layers[layer].inputs(stream, cache.layers[layer])
            # stand-in 0 of each passage, then stand-in 1 of each, ...
            row = torch.arange(len(passage), device=tokens.device).repeat(len(keys))
            k, v = s.k[row, 0, head], s.v[row, 0, head]  # what is written at t
            key = keys[:, passage, i].reshape(len(row), -1, k.shape[1])  # [rows, 1 or m, K]
            value = values[:, passage, i].reshape(len(row), -1, v.shape[1])
            swap = [Edit(layer, head, t, -k, v)]
            swap += [Edit(layer, head, t, *pair) for pair in zip(key.unbind(1), value.unbind(1))]
            edited = onward(model, layer, stream.rows(row), cache.rows(row), swap)
            for c, log_q in enumerate(edited.split(len(passage))):
                effects[c, passage, i] = kl_divergence(native, log_q).sum(-1).cpu()
    return dict(zip(stand_ins, effects))


# ---- 4. What near should mean ----
# New here: a metric learned from the model, and a control: does anything but nearness count?
def read_metric(model, layer, head, tokens, positions, rng, ridge=0.1):
    """Learn which directions of the state later predictions use: M_k [K, K], M_v [V, V].

        M_k ∝ E[G Gᵀ]    M_v ∝ E[Gᵀ G]    G = ∂/∂S_t Σ log p(drawn token) at t, ..., t + 10

    To second order a small change X of the state has the effect ½ E[(Σ_ij G_ij X_ij)²], the Fisher
    information (drawn tokens' scores have mean 0: steps do not mix). The metric takes it to be ∝
    tr(M_k X M_v Xᵀ), as if E[G_ik G_jl] = M_k,ij M_v,kl. G is the gradient of K edits of size zero,
    one under each unit key; tokens are drawn from the model's own predictions. Mean eigenvalue 1,
    and a ridge on top, so that no direction is free.
    """
    check_cell(model, layer, head)
    K, V = model.layers[layer].mixer.K, model.layers[layer].mixer.V
    unit_key, M_k, M_v = torch.eye(K, device=tokens.device), 0, 0
    uniform = torch.rand(len(tokens), len(positions), LATER, 1, generator=rng).to(tokens.device)
    for passage in progress(passages_at_once(model, tokens, rows=4)):  # for gradients
        points = native_run(model, layer, tokens[passage], positions)
        for i, (t, stream, cache, native) in enumerate(points):
            X = torch.zeros(len(passage), K, V, device=tokens.device, requires_grad=True)
            edits = [Edit(layer, head, t, unit_key[c], X[:, c]) for c in range(K)]
            with torch.enable_grad():
                log_p = onward(model, layer, stream, cache, edits)
            below = native.exp().cumsum(-1) < uniform[passage, i]
            drawn = below.sum(-1, keepdim=True).clamp_max(model.vocab - 1)  # by its probability
            (G,) = torch.autograd.grad(log_p.gather(-1, drawn).sum(), X)
            M_k = M_k + torch.einsum("bkv,blv->kl", G, G)
            M_v = M_v + torch.einsum("bkv,bkw->vw", G, G)
    for M in (M_k, M_v):
        M /= M.diagonal().mean().clamp_min(1e-30)
        M.diagonal().add_(ridge)
    return M_k, M_v


def as_near(k, v, key, value, M_k, M_v, rng):
    """Make a random matrix exactly as near to each write k vᵀ as the stand-in key valueᵀ is: if it
    does as well, the stand-in is no more than near. Each side has the same length, and the same
    angle to the write's, as the metric [D, D] measures them, in a random direction."""
    def turned(x, like, M):
        e = unit(x, M)
        along = ((like @ M) * e).sum(-1, keepdim=True)
        across = (((like @ M) * like).sum(-1, keepdim=True) - along.square()).clamp_min(0).sqrt()
        z = torch.randn(x.shape, generator=rng).to(x)
        z = z @ torch.linalg.inv(torch.linalg.cholesky(M))  # of covariance M⁻¹: in M all alike
        z = z - ((z @ M) * e).sum(-1, keepdim=True) * e
        return along * e + across * unit(z, M)

    return turned(k, key, M_k), turned(v, value, M_v)


# ==== The main job ends here. Below: its figures, then experiments, each of its own ====
# ---- 5. Files, batches, and checks of what comes from outside ----
BATCH_BYTES = 60_000_000  # of log-probabilities: how much of a text runs at once


def passages_at_once(model, tokens, rows):
    """Split the indices 0..n−1 of passages into batches: `rows` times as many fit BATCH_BYTES."""
    at_once = max(1, BATCH_BYTES // (4 * LATER * model.vocab * rows))
    return torch.arange(len(tokens), device=tokens.device).split(at_once)


def as_writes(k, v, K=None, V=None):
    """Look at writes from outside: k [..., K], v [..., V], torch or NumPy, of any float type.

    Returns them as tensors, at least fp32. Raises InputError for whatever are no writes.
    """
    k = torch.as_tensor(k).detach()
    v = torch.as_tensor(v).detach()
    floats = k.is_floating_point() and v.is_floating_point()
    require(floats, f"writes are of {k.dtype}, {v.dtype}; allowed are floating-point numbers")
    shapes = f"k is {list(k.shape)}, v {list(v.shape)}"
    paired = k.dim() >= 2 and k.shape[:-1] == v.shape[:-1]
    require(paired and min(*k.shape, *v.shape) > 0,
            f"{shapes}; must be [N, K] and [N, V]: a key and a value for each of N writes, N > 0")
    fits = K in (None, k.shape[-1]) and V in (None, v.shape[-1])
    require(fits, f"{shapes}; this dictionary has K = {K}, V = {V}: are k and v exchanged?")
    finite = k.isfinite().all(-1) & v.isfinite().all(-1)
    bad = (~finite).nonzero()
    require(len(bad) == 0, f"{len(bad)} of {finite.numel()} writes hold NaN or Inf, the first "
            f"is {bad[:1].tolist()}; leave them out")
    return at_least_fp32(k), at_least_fp32(v)


def metric_or_identity(x, M):
    """Return a metric [D, D] for vectors x [n, D], the identity if M is None, or InputError."""
    D = x.shape[-1]
    if M is None:
        return torch.eye(D).to(x)
    M = torch.as_tensor(M).detach().to(x)
    finite = bool(M.isfinite().all())
    require(finite and list(M.shape) == [D, D],
            f"a metric of shape {list(M.shape)} for vectors of size {D}; must be finite, [D, D]")
    return M


def save_sae(sae: WriteSAE, path: str):
    """Write key, value, M_k, M_v and about to a safetensors file, whole or not at all."""
    names = ("key", "value", "M_k", "M_v")
    tensors = {name: getattr(sae, name).cpu().contiguous() for name in names}
    require(all(x.isfinite().all() for x in tensors.values()),
            f"{path}: not written, this SAE holds NaN or Inf")
    with whole_file(path) as temporary:
        about = {"about": json.dumps(sae.about)}
        safetensors.torch.save_file(tensors, temporary, metadata=about)


def load_sae(path: str) -> WriteSAE:
    """Read what `save_sae` wrote; all that can be wrong with it is an InputError."""
    check_file(path)
    with as_input_error(path, "give a file that `save` wrote"):
        with safetensors.safe_open(path, "pt") as f:
            tensors = {name: f.get_tensor(name) for name in f.keys()}
            notes = (f.metadata() or {}).get("about", "{}")
        old = "atoms.keys" in tensors
        require(not old, f"{path}: is an SAE of version 2 of this project; train it anew")
        return WriteSAE(**tensors, about=dict(json.loads(notes)))


# ---- 6. Figures of a test ----
# New here: what is made of effects. Intervals redraw whole files: passages of one are alike.
COVERED = 0.71  # a stand-in of at least this cosine covers a write: it explains half its energy


def cosine(key, value, k, v):
    """Return the cosine of the matrices key valueᵀ and k vᵀ, as numbers: [..., K], ... -> [...]."""
    def of_vectors(x, y):
        x = F.normalize(x, dim=-1, eps=1e-30)
        y = F.normalize(y, dim=-1, eps=1e-30)
        return (x * y).sum(-1)

    return of_vectors(key, k) * of_vectors(value, v)


def random_direction(k, v, rng):
    """Make ⟨R, k vᵀ⟩ R for random rank-1 matrices R of unit norm: far from every write, but at the
    size that brings it nearest, so that it too is nearer than nothing."""
    unit_key = F.normalize(torch.randn(k.shape, generator=rng).to(k), dim=-1)
    unit_value = F.normalize(torch.randn(v.shape, generator=rng).to(v), dim=-1)
    key = (k * unit_key).sum(-1, keepdim=True) * unit_key
    value = (v * unit_value).sum(-1, keepdim=True) * unit_value
    return key, value


def bootstrap(x, y, file, rng, draws=1000) -> list[float] | None:
    """Return the 95 % interval of Σx / Σy, drawing whole files again; None for fewer than ten.

    x, y [n, ...] belong to n passages, file [n] says which file each is from. (The mean of x, and
    of a rate: y of ones.)
    """
    names, of_file = file.cpu().unique(return_inverse=True)
    if len(names) < 10:
        return None
    x_of_passage = x.double().view(len(x), -1).sum(1)
    y_of_passage = y.double().view(len(y), -1).sum(1)
    x_of_file, y_of_file = torch.zeros(2, len(names), dtype=torch.float64)
    x_of_file.index_add_(0, of_file, x_of_passage)
    y_of_file.index_add_(0, of_file, y_of_passage)
    drawn = torch.randint(len(names), (draws, len(names)), generator=rng)
    ratio = x_of_file[drawn].sum(1) / y_of_file[drawn].sum(1)
    ends = torch.tensor([0.025, 0.975], dtype=torch.float64)
    return ratio.nan_to_num().quantile(ends).tolist()


def mean(x) -> float:
    """Return the mean, NaN of nothing."""
    return x.double().mean().item()


def left_figures(effect, nothing, match, file, rng) -> dict:
    """Compare a stand-in's effects with those of nothing in the write's place, [n, P] both.

    won       share of positions where the stand-in's effect is smaller
    left      Σ effect / Σ effect of nothing, with its interval by file; 0 is perfect
    typical   the median of that ratio by position (Σ rests on a few dozen of them)
    covered   share of positions where `match`, the cosine of stand-in and write, is 0.71 or more
    """
    left = effect.sum() / nothing.sum()
    left_ci95 = bootstrap(effect, nothing, file, rng)
    ratio = effect / nothing.clamp_min(1e-30)
    return dict(won=mean(effect < nothing), left=left.item(), left_ci95=left_ci95,
                typical=ratio.median().item(), covered=mean(match >= COVERED))


def firing_figures(effects, at, at_untrained, index, another) -> dict:
    """Give the paper's figures: of positions where an atom fires, at [n, P], that is: covers.

    win_rate (and of untrained atoms at their own firings), per_atom_win_rate: its mean over atoms,
    strict_order_rate: share of effects in the order atom < nothing < another atom at the same
    coefficient (effects `another` [n, p], of every 4th position), failure_by_quartile of the effect
    of nothing. index [n, P]: which atom.
    """
    nothing = effects["nothing"]
    won = effects["learned by reads"] < nothing
    untrained_won = effects["random writes by reads"] < nothing
    won_firings = won[at]
    _, which, uses = index[at].unique(return_inverse=True, return_counts=True)
    wins = torch.zeros(len(uses))
    wins.index_add_(0, which, won_firings.float())
    below_another = nothing[:, ::4] < another
    ordered = won[:, ::4] & below_another
    failures = []
    weakest_first = nothing[at].argsort()
    for quarter in weakest_first.tensor_split(4):
        failures.append(1 - mean(won_firings[quarter]))
    return dict(n=int(at.sum()), win_rate=mean(won_firings), per_atom_win_rate=mean(wins / uses),
                win_rate_untrained=mean(untrained_won[at_untrained]),
                strict_order_rate=mean(ordered[at[:, ::4]]),
                failure_by_quartile=failures)


# ---- 7. Other dictionaries, for comparison ----
# New here: several atoms for a write, a dictionary for each side, no dictionary at all. A stand-in
# of m atoms is a sum of them: key [..., m, K] and value [..., m, V].
@torch.no_grad()
def pursuit(sae: WriteSAE, k, v, m: int):
    """Code writes by m atoms each, signed and refitted (orthogonal matching pursuit).

        Repeat m times: take the atom with the largest |⟨A_i, what is left⟩|; then all a anew, so
        that k vᵀ ≈ Σ a_j A_j is as near as it can be: Σ_l ⟨A_j, A_l⟩ a_l = ⟨A_j, k vᵀ⟩.

    k [..., K], v [..., V] -> index, a [..., m], for `decode`. With m = 1 that is `encode`, but a
    may be negative. Keeps all ⟨A_j, A_l⟩ [n, n]. Raises InputError for m > n.
    """
    n = len(sae.key)
    require(1 <= m <= n, f"{m} atoms for a write, of {n}: allowed are 1 to {n}")
    gram = (sae.key @ sae.find_key.T) * (sae.value @ sae.find_value.T)  # ⟨A_j, A_l⟩, [n, n]
    ridge = 1e-6 * torch.eye(m).to(gram)  # two atoms may be the same
    indices, coefficients = [], []
    k_blocks = k.flatten(0, -2).split(256)
    v_blocks = v.flatten(0, -2).split(256)
    for x, y in zip(k_blocks, v_blocks):
        scores = (x @ sae.find_key.T) * (y @ sae.find_value.T)  # ⟨A_i, write⟩, [256, n]
        left = scores
        index = torch.empty(len(x), 0, dtype=torch.long, device=x.device)
        for j in range(1, m + 1):
            size = left.abs().scatter(1, index, -1)  # none twice
            best = size.argmax(1, keepdim=True)
            index = torch.cat([index, best], 1)
            chosen = gram[index[:, :, None], index[:, None]]  # [256, j, j]
            a = torch.linalg.solve(chosen + ridge[:j, :j], scores.gather(1, index))
            said = F.embedding_bag(index, gram, per_sample_weights=a, mode="sum")
            left = scores - said  # ⟨A_i, write − Σ a_j A_j⟩
        indices.append(index)
        coefficients.append(a)
    N = k.shape[:-1]
    return torch.cat(indices).view(*N, m), torch.cat(coefficients).view(*N, m)


def pulled(x, y_seen, key, value, find_value, a):
    """Return where writes pull the keys of their atoms: a_j (x yᵀ − Σ_{l≠j} a_l A_l) find_value_j.

    x [N, K], y_seen = M_v y [N, V]; of each write's m atoms: key [N, m, K], value, find_value
    [N, m, V], a [N, m] -> [N, m, K]. (With key and value exchanged: the pull on values.)
    """
    along = (value @ y_seen[..., None]) * x[:, None]  # x yᵀ find_value_j, [N, m, K]
    products = find_value @ value.mT  # ⟨value_j, value_l⟩, [N, m, m]
    own = torch.diag_embed(products.diagonal(dim1=1, dim2=2))
    a = a[..., None]  # [N, m, 1]
    others = (products - own) @ (a * key)  # Σ_{l≠j} a_l A_l find_value_j
    return a * (along - others)


@torch.no_grad()
def fit_pursuit(k, v, n: int, m: int, rng, M_k=None, M_v=None, steps: int = 12,
                sample: int = 15_000, memory: float = 0.75) -> WriteSAE:
    """Learn n atoms that stand for a write m at a time: K-SVD with atoms of rank 1.

    As `fit`, but each write is coded by `pursuit`, and an atom's key moves to Σ of what its writes
    are beyond their other atoms (`pulled`), then its value, with the new key. Atoms that had no
    write for a while start anew at the writes of which most is left. Arguments are as `fit` has
    them; a vector dictionary is the case V = 1.
    """
    sae = untrained(k, v, n, rng, M_k, M_v)
    M_k, M_v = sae.M_k, sae.M_v
    k, v = as_writes(k, v)
    k, v = unit(k, M_k), unit(v, M_v)
    key, value = sae.key.clone(), sae.value.clone()
    key_sum, value_sum = torch.zeros_like(key), torch.zeros_like(value)
    count = k.new_zeros(n)
    for _ in progress(range(steps)):
        drawn = torch.randint(len(k), (sample,), generator=rng)
        x, y = k[drawn], v[drawn]
        x_seen, y_seen = x @ M_k, y @ M_v
        index, a = pursuit(sae, x, y, m)  # [sample, m]
        key_score = (x_seen[:, None] * key[index]).sum(-1)
        value_score = (y_seen[:, None] * value[index]).sum(-1)
        score = key_score * value_score  # ⟨A_j, write⟩
        explained = (a * score).sum(-1)
        for held in (key_sum, value_sum, count):
            held *= memory
        flat = index.flatten()
        count.index_add_(0, flat, torch.ones_like(a).flatten())
        used = count > 0.5
        pull = pulled(x, y_seen, key[index], value[index], sae.find_value[index], a)
        key_sum.index_add_(0, flat, pull.flatten(0, 1))
        key[used] = unit(key_sum[used], M_k)
        find_key = key @ M_k
        pull = pulled(y, x_seen, value[index], key[index], find_key[index], a)
        value_sum.index_add_(0, flat, pull.flatten(0, 1))
        value[used] = unit(value_sum[used], M_v)
        unused = (~used).nonzero()[:sample, 0]
        worst = explained.argsort()[: len(unused)]
        key[unused], value[unused] = x[worst], y[worst]
        for held in (key_sum, value_sum, count):
            held[unused] = 0
        sae = WriteSAE(key, value, M_k, M_v)
    return sae


def by_norm(k, v, rng, M_k, M_v):
    """Draw as many writes as there are, each with a probability in proportion to its norm."""
    key_norm = ((k @ M_k) * k).sum(-1).sqrt()
    value_norm = ((v @ M_v) * v).sum(-1).sqrt()
    norm = (key_norm * value_norm).clamp_min(1e-30)
    drawn = torch.multinomial(norm, len(k), replacement=True, generator=rng)
    return k[drawn], v[drawn]


def two_vector_saes(k, v, n: int, rng, M_k=None, M_v=None) -> Callable:
    """Learn n keys and n values apart, signed: k-means on directions, as `fit_pursuit` does it with
    vectors, which are writes whose other side is the number 1.

    Returns what builds stand-ins, k [..., K], v [..., V] -> the same shapes.
    """
    one = k.new_ones(len(k), 1)
    key_sae = fit_pursuit(k, one, n, 1, rng, M_k)
    value_sae = fit_pursuit(v, one, n, 1, rng, M_v)

    def side(sae, x):
        ones = torch.ones_like(x[..., :1])
        index, a = pursuit(sae, x, ones, 1)
        vectors, _ = sae.decode(index, a)  # [..., 1, K]
        return vectors[..., 0, :]

    def stand_in(k, v):
        return side(key_sae, k), side(value_sae, v)

    return stand_in


def leading_pair(X):
    """Return the matrix of rank 1 nearest to each X [..., K, V]: key, size included, and value."""
    U, S, W = torch.linalg.svd(X, full_matrices=False)
    return U[..., 0] * S[..., :1], W[..., 0, :]


def contexts(tokens, order: int):
    """Number the last `order` tokens (0, 1 or 2) at each place of windows [n, T], in the same way
    for all windows; −1 where there are not so many."""
    T = tokens.shape[1]
    number = torch.zeros_like(tokens)
    for lag in range(order):
        number[:, lag:] += tokens[:, : T - lag] << 31 * lag
    number[:, : max(0, order - 1)] = -1
    return number


def mean_after(k, v, context, wanted, otherwise=0):
    """Average the writes that have the same context: k [N, K], v [N, V], context [N].

    wanted [M]: contexts that are asked for -> the mean write after each, [M, K, V]. After a context
    that no write has it is `otherwise`, which is such means after fewer tokens.
    """
    names, row_of = wanted.unique(return_inverse=True)
    row = torch.searchsorted(names, context).clamp_max(len(names) - 1)
    found = (names[row] == context) & (context >= 0)
    total = k.new_zeros(len(names), k.shape[1], v.shape[1])
    for i in found.nonzero()[:, 0].split(4096):
        total.index_add_(0, row[i], outer(k[i], v[i]))
    count = row[found].bincount(minlength=len(names))[:, None, None]
    mean_of = total / count.clamp_min(1)
    return torch.where(count[row_of] > 0, mean_of[row_of], otherwise)


def inner(A, B, M_k=None, M_v=None):
    """Return ⟨Σ A_j, Σ B_l⟩ in a metric: A, B are key [..., m, K], value [..., m, V] -> [...]."""
    key_A, value_A = A
    key_B, value_B = B
    if M_k is not None:
        key_A = key_A @ M_k
    if M_v is not None:
        value_A = value_A @ M_v
    keys = key_A @ key_B.mT  # [..., m, m]
    values = value_A @ value_B.mT
    return (keys * values).sum((-2, -1))


def nearness(stand_in, write, M_k=None, M_v=None):
    """Compare stand-ins with their writes in a metric: key [..., m, K], value [..., m, V] of both.

    Returns their cosine, and the share of a write's energy that is left: 0 is perfect,

        ‖write − stand-in‖² / ‖write‖²
    """
    both = inner(stand_in, write, M_k, M_v)
    own = inner(stand_in, stand_in, M_k, M_v)
    energy = inner(write, write, M_k, M_v)
    cosine = both / (own * energy).sqrt().clamp_min(1e-30)
    left = energy - 2 * both + own
    return cosine, left / energy.clamp_min(1e-30)


def worth(sizes, figures, figure) -> float | None:
    """Say how many atoms a curve needs to reach a figure: the first crossing, interpolated in the
    logarithm of sizes, which increase. None where it does not get there."""
    for i in range(len(sizes) - 1):
        y, next_y = figures[i], figures[i + 1]
        if y != next_y and min(y, next_y) <= figure <= max(y, next_y):
            share = (figure - y) / (next_y - y)
            return sizes[i] * (sizes[i + 1] / sizes[i]) ** share
    return None


# ---- 8. Formula: how does an edit move the logits? ----
# New here: a ladder of predictions, each rung one factor more; and what a fitted scalar hides.
RUNGS = ("three factors", "+ erase", "+ gate", "+ scales", "direct path", "full Jacobian",
         "mean of two Jacobians")
FITTED = ("three factors, fitted over sizes", "random numbers, fitted over sizes")
RANKS = (1, 2, 3, 4, 5, 10, 50)  # of the tokens whose logits are predicted, at the write's step
SIZES = (0.1, 0.3, 1.0, 3.0)  # of an added atom, in norms of a typical write


def three_edits(k, v, key, value):
    """Make three edits of each write k vᵀ [n, P, ·] with its atom key valueᵀ: the atom added, at
    norm 0.1; put in the write's place; the write taken out. Returns what goes, and what comes, each
    a key [3, n, P, K] and a value [3, n, P, V]."""
    unit_key = F.normalize(key, dim=-1)
    small = 0.1 * unit_key / value.norm(dim=-1, keepdim=True)
    goes = torch.stack([0 * k, -k, -k])
    comes = torch.stack([small, key, 0 * key])
    return (goes, torch.stack([v, v, v])), (comes, torch.stack([value, value, value]))


def norm_slope(norm: nn.Module, x: Tensor) -> Tensor:
    """Return what a norm multiplies each channel of x by: its weight / rms, or weight / std."""
    if isinstance(norm, nn.LayerNorm):
        variance = x.var(-1, keepdim=True, correction=0)
        return norm.weight / (variance + norm.eps).sqrt()
    return (norm.offset + norm.weight) * norm.scale(x)


def moved_reads(s: StepInputs, edits: list[Edit]) -> Tensor:
    """Sum what edits at the first token of s do to a head's reads, exactly: -> δo [B, T, V].
    s: that head's six tensors, [B, T, 1, ·]; each edit has a key [B, K] and a value [B, V]."""
    delta_o = 0
    for e in edits:
        gain, _ = propagate(e.key[:, None], s)  # [B, T, 1]
        delta_o = delta_o + gain * e.value[:, None]
    return delta_o


def logit_ladder(model, stream, cache, edits, token, jacobians=True) -> tuple[Tensor, Tensor]:
    """Predict in seven ways how edits move some tokens' logits, at their own step and later ones.

    The mixer's output is W_O(gate · scale · o) + what no edit reaches, with scale 1/rms or 1/std of
    its norm. Were this the last layer, logit = ⟨W_U[token], w x / rms(x)⟩, with w the final norm's
    weight, x the stream. The reads move by exactly δo (`moved_reads`), so a logit's first order is

        three factors          ⟨W_U, W_O δo⟩, the erase left out: decay, query and output. Repaired:
                               the paper's Eq. 1 has no W_O, and its sizes do not match
        + erase                ⟨W_U, W_O δo⟩
        + gate                 ⟨W_U, W_O(gate · δo)⟩: gates may be negative, they decide the sign
        + scales               ⟨W_U, w/rms · W_O(gate · scale · δo)⟩: scales decide the size
        direct path            + how rms and scale move: all but the later layers
        full Jacobian          + the later layers: the exact first order, the slope at ε = 0 of the
                               model with ε times the edits
        mean of two Jacobians  ½ slope at ε = 0 + ½ slope at ε = 1: exact to second order

    stream, cache: of `native_run`; edits: at one head, the first token, keys [B, K]; token [B, n].
    Returns predicted [7, B, T, n], as RUNGS (without Jacobians [1, ...]), and measured [B, T, n].
    """
    layer, head = edits[0].layer, edits[0].head
    block, past = model.layers[layer], cache.layers[layer]
    mixer = block.mixer
    W_O = model.out_map(layer)[:, head]  # [D, V]
    W_U = at_least_fp32(model.unembedding[token])  # [B, n, D]
    s, rest, _ = block.inputs(stream, past)
    this = s.heads([head])
    delta_o = moved_reads(this._replace(erase_in=None, erase_out=None), edits)  # [B, T, V]
    rungs = [delta_o @ W_O.T @ W_U.mT]
    after, _ = model.run(stream, cache, first=layer)

    def logits(x: Tensor) -> Tensor:
        return at_least_fp32(model.norm(x)) @ W_U.mT

    if not jacobians:
        edited, _ = model.run(stream, cache, edits, first=layer)
        return torch.stack(rungs), logits(edited.x) - logits(after.x)
    delta_o = moved_reads(this, edits)
    o, _ = recurrence(s, past["state"])  # [B, T, H, V]
    gate, scale = mixer.gate_and_scale(o, rest)
    gate, scale = gate[:, :, head], scale[:, :, head]  # [B, T, V], [B, T, 1]
    final = norm_slope(model.norm, at_least_fp32(after.x))  # [B, T, D]
    rungs.append(delta_o @ W_O.T @ W_U.mT)
    rungs.append((gate * delta_o) @ W_O.T @ W_U.mT)
    moved = (gate * scale * delta_o) @ W_O.T  # [B, T, D]
    rungs.append((final * moved) @ W_U.mT)
    of_all_heads = F.pad(delta_o[:, :, None], (0, 0, head, mixer.heads - head - 1))

    def direct(eps: Tensor) -> Tensor:  # as if no layer came after this one
        moved = mixer.output(o + eps * of_all_heads, rest) - mixer.output(o, rest)
        return logits(after.x + moved)

    def full(eps: Tensor) -> Tensor:  # the model
        scaled = [e._replace(key=eps * e.key) for e in edits]
        edited, _ = model.run(stream, cache, scaled, first=layer)
        return logits(edited.x)

    zero, one = delta_o.new_zeros(()), delta_o.new_ones(())
    with sdpa_kernel(SDPBackend.MATH):  # the attention that forward differentiation can do
        _, direct_slope = torch.func.jvp(direct, (zero,), (one,))
        native, slope_at_0 = torch.func.jvp(full, (zero,), (one,))
        edited, slope_at_1 = torch.func.jvp(full, (one,), (one,))
    rungs += [direct_slope, slope_at_0, (slope_at_0 + slope_at_1) / 2]
    return torch.stack(rungs), edited - native


@torch.no_grad()
def ladder_over_text(model, layer, head, tokens, positions, sides, where, ranks=RANKS, steps=LATER,
                     jacobians=True):
    """Run `logit_ladder` for E edits at N places of a text, those where `where` [n, P] is true.
    tokens [n, T]; positions: P of each passage; sides: of each matrix that makes up an edit, a key
    [E, n, P, K] and a value [E, n, P, V]; ranks: of the tokens, at the write's step, from 1 on.
    Returns predicted [7 or 1, E, N, steps, ranks] and measured [E, N, steps, ranks].
    """
    E = len(sides[0][0])
    predicted, measured = [], []
    rows = max(6, E // 2)
    for passage in progress(passages_at_once(model, tokens, rows)):
        points = native_run(model, layer, tokens[passage], positions)
        for i, (t, stream, cache, native) in enumerate(points):
            here = where[passage.cpu(), i].to(tokens.device)
            (row,) = here.nonzero(as_tuple=True)
            if len(row) == 0:
                continue
            chosen = passage[row].cpu()
            edits = []
            for key, value in sides:  # all E of them at once: E · len(row) rows
                key = key[:, chosen, i].flatten(0, 1).to(tokens.device)
                value = value[:, chosen, i].flatten(0, 1).to(tokens.device)
                edits.append(Edit(layer, head, t, key, value))
            best = native[row, 0].topk(max(ranks)).indices
            columns = [rank - 1 for rank in ranks]
            token = best[:, columns].repeat(E, 1)
            row = row.repeat(E)
            stream = stream.times(0, steps).rows(row)
            cache = cache.rows(row)
            y_hat, y = logit_ladder(model, stream, cache, edits, token, jacobians)
            predicted.append(y_hat.unflatten(1, (E, -1)).cpu())
            measured.append(y.unflatten(0, (E, -1)).cpu())
    return torch.cat(predicted, 2), torch.cat(measured, 1)


def fitted_over_sizes(x: Tensor, y: Tensor) -> Tensor:
    """Scale x by the number c that brings it nearest to y over the sizes ε, both [atoms, 4, n]: one
    c for each atom and passage (and so token), as in the paper's appendix. What does that test?

        x = ε f, for any f, has c = Σ ε f y_ε / Σ ε² f², so that its fit is c x = ε Σ ε y_ε / Σ ε²

    f is gone: random numbers fit as well. What is tested is how linear the model is in ε.
    """
    c = (x * y).sum(1, keepdim=True) / x.square().sum(1, keepdim=True)
    return c.nan_to_num() * x


def agreement(y: Tensor, y_hat: Tensor) -> tuple[float, float, float]:
    """Say how well y_hat predicts y, of one shape, with nothing fitted: R² = 1 − Σ(y − ŷ)² /
    Σ(y − mean y)², 1 if perfect, 0 if no better than the mean; the slope of the least-squares line
    y = slope · ŷ, 1 if sizes are right; the share of equal signs."""
    y, y_hat = y.double(), y_hat.double()
    left = (y - y_hat).square().sum()
    spread = (y - y.mean()).square().sum()
    r2 = 1 - left / spread
    slope = (y * y_hat).sum() / y_hat.square().sum()
    same_sign = y.sign() == y_hat.sign()
    return r2.item(), slope.item(), mean(same_sign)


# ---- 9. Steering: edits of the memory after which a token is said ----
# New here: a key that coming reads weigh most; values found by ascent; an edited input beside it.
EDITED = 3  # the prompt's last positions: all edits are made there
FORCED = (1, 4, 8, 12)  # so many new tokens are forced to be what the unedited model says,
DECODED = 12  # then so many are decoded: is the target among them?
STATE_SIZES = (0.125, 0.25, 0.5, 1.0)  # of a state's edits, in native writes
INPUT_SIZES = (0.25, 0.5, 1.0, 2.0)  # of vectors added to the input, in norms of the embedding


class Prompts(NamedTuple):
    """Hold N prompts as the unedited model reads them, and how it goes on."""
    last: Tensor  # [N, 3] their last tokens
    before: Cache
    after: Cache
    logits: Tensor  # [N, 3, vocab] of the last tokens
    said: Tensor  # [N, 23] the unedited continuation


@torch.no_grad()
def read_prompts(model: LanguageModel, tokens: Tensor) -> Prompts:
    """Read prompts [N, T]. Raises InputError unless they are longer than what is edited."""
    T = tokens.shape[1]
    require(T > EDITED, f"the prompt has {T} tokens: give a longer one, of more than {EDITED}")
    last = tokens[:, -EDITED:]
    _, before = model(tokens[:, :-EDITED])
    logits, after = model(last, before)
    length = max(FORCED) + DECODED - 1
    said, _ = model.generate(logits[:, -1], after, length)
    return Prompts(last, before, after, logits, said)


@torch.no_grad()
def draw_targets(model: LanguageModel, tokens: Tensor, rng) -> Tensor:
    """Draw a target that stands in each prompt of tokens [n, T], and one that does not, from the
    tokens of rank 100 to 1000 for the first new one -> prompt, target, stratum, [3, pairs]."""
    pairs = []
    for prompt, text in enumerate(tokens):
        logits, _ = model(text[None])
        ranked = logits[0, -1].argsort(descending=True)
        allowed, _ = ranked[99:1000].sort()
        present = torch.isin(allowed, text)
        for stratum, candidates in enumerate([allowed[present], allowed[~present]]):
            order = torch.randperm(len(candidates), generator=rng)
            for i in order[:1]:  # none if none is there
                pairs.append((prompt, candidates[i].item(), stratum))
    return torch.tensor(pairs, device=tokens.device).view(-1, 3).T


def read_key(s: StepInputs) -> Tensor:
    """Find the unit key under which a value added at s's first token weighs most in all reads of s:
    s [N, T, C, ·] -> [N, C, K].

    An edit κ yᵀ moves the read at t by (u_t · q_t) y with u_t = A_t ... A_1 κ, so by a gain κ · b_t
    with b_t = A_1ᵀ ... A_tᵀ q_t (b_0 = q_0: the edit comes after the first token's own A). The
    squared gains are to sum to the most, and of both signs κ has the one with Σ_t κ · b_t > 0.
    """
    # They sum to κᵀ (Σ_t b_t b_tᵀ) κ, which is largest at the leading eigenvector. `propagate` of
    # the K unit keys gives all entries of the b_t.
    N, _, C, K = s.q.shape
    each = torch.arange(C, device=s.q.device).repeat_interleave(K)  # every head K times,
    unit_keys = torch.eye(K).to(s.q).repeat(C, 1)  # with one unit key each
    gain, _ = propagate(unit_keys.expand(N, -1, -1), s.heads(each))  # [N, T, C · K]
    b = gain.unflatten(-1, (C, K))
    squared = torch.einsum("ntck,ntcl->nckl", b, b)
    key = torch.linalg.eigh(squared).eigenvectors[..., -1]  # a column; eigenvalues ascend
    total = (key * b.sum(1)).sum(-1, keepdim=True)
    return torch.where(total < 0, -key, key)


def keys_and_formula(model: LanguageModel, p: Prompts, target: Tensor, heads):
    """Find keys [N, 3, C, K] of edits in C heads, (layer, head) in order of layers, and values by
    formula [N, 3, C, V]. A key is the read key of the reads from there to the prompt's end, of the
    native write's length ‖k‖‖v‖, so that a value of length 1 makes an edit of one native write. The
    value is (u · q) gate · W_Oᵀ W_U[target], with u, q and gate at the end: the slope of the
    target's logit by three factors and the gate."""
    keys, formula = [], []
    W_U = at_least_fp32(model.unembedding[target])  # [N, D]
    stream = model.embed(p.last)
    for layer, block in enumerate(model.layers):
        chosen = [head for i, head in heads if i == layer]
        if chosen:
            s, rest, _ = block.inputs(stream, p.before.layers[layer])
            gate, _ = block.mixer.gate_and_scale(s.v, rest)  # no gate depends on the reads
            W_O = model.out_map(layer)[:, chosen]  # [D, C, V]
            out = gate[:, -1, chosen] * torch.einsum("nd,dcv->ncv", W_U, W_O)
            s = s.heads(chosen)
            size = s.k.norm(dim=-1, keepdim=True) * s.v.norm(dim=-1, keepdim=True)
            key, value = [], []
            for t in range(EDITED):
                reads = s.times(t)
                key.append(size[:, t] * read_key(reads))  # [N, C, K]
                gain, _ = propagate(key[t], reads)  # [N, 3 − t, C]
                value.append(gain[:, -1, :, None] * out)
            keys.append(torch.stack(key, 1))
            formula.append(torch.stack(value, 1))
        stream, _ = model.run(stream, p.before, first=layer, last=layer + 1)
    return torch.cat(keys, 2), torch.cat(formula, 2)


def read_edited(model: LanguageModel, p: Prompts, then: Tensor, x: Tensor, heads=None, keys=None):
    """Read the last three tokens and `then` [N, m] with values x [N, 3, C, V] under keys
    [N, 3, C, K]; without heads, with x [N, 3, D], in norms of the embedding, added to the stream
    before layer 0. Returns logits from the prompt's last token on, and the cache."""
    tokens = torch.cat([p.last, then], 1)
    stream = model.embed(tokens)
    edits = []
    if heads is None:
        length = stream.x.norm(dim=-1, keepdim=True)
        added = F.pad(x, (0, 0, 0, then.shape[1])) * length
        stream = stream._replace(x=stream.x + added.to(stream.x))
    else:
        for t in range(EDITED):
            position = p.before.length + t
            for c, (layer, head) in enumerate(heads):
                edits.append(Edit(layer, head, position, keys[:, t, c], x[:, t, c]))
    stream, cache = model.run(stream, p.before, edits)
    logits = model.unembed(stream.times(EDITED - 1))
    return at_least_fp32(logits), cache


def log_chance(logits: Tensor, said: Tensor, target: Tensor) -> Tensor:
    """Return the log-probability that the target [N] is said after n new tokens were forced,

        log Σ_i p(unedited tokens n + 1, ..., i − 1, then the target)      i = n + 1, ..., n + 12

    mean over n = 1, 4, 8, 12. logits [N, 24, vocab] from the prompt's last token on; said [N, 23].
    """
    log_p = logits.log_softmax(-1)
    row = torch.arange(len(target))
    of_target = log_p[row, :, target]  # [N, 24]
    of_said = log_p[:, :-1].gather(-1, said[..., None])[..., 0]
    before = F.pad(of_said.cumsum(1), (1, 0))  # [N, 24] of all unedited tokens before each
    chances = []
    for n in FORCED:
        end = n + DECODED
        on_the_way = before[:, n:end] - before[:, n : n + 1]
        at_each = on_the_way + of_target[:, n:end]  # [N, 12]
        chances.append(at_each.logsumexp(1))
    return sum(chances) / len(chances)


def sized(x: Tensor, size: float) -> Tensor:
    """Scale each prompt's vectors x [N, ..., D] together, to the root mean square length `size`."""
    mean_square = x.square().sum(-1).flatten(1).mean(1)
    length = mean_square.sqrt().clamp_min(1e-30)  # so zeros stay
    return torch.einsum("n,n...->n...", size / length, x)


def ascend(model, p: Prompts, target: Tensor, like: Tensor, size: float, *where, steps=20):
    """Climb `log_chance` from x = 0 on, in steps along its gradient that get shorter, x brought to
    `size` after each. like: x's shape; where: heads and keys, as `read_edited` takes them."""
    x = torch.zeros_like(like)
    for i in range(steps):
        x.requires_grad_()
        with torch.enable_grad():
            logits, _ = read_edited(model, p, p.said, x, *where)
            chance = log_chance(logits, p.said, target)
            (up,) = torch.autograd.grad(chance.sum(), x)
        step = 1 - i / steps
        x = sized(x.detach(), 1) + step * sized(up, 1)
        x = sized(x, size)
    return x


def outcome(model: LanguageModel, p: Prompts, target: Tensor, logits, cache) -> dict[str, Tensor]:
    """Go on from the prompts' last logits [N, ·, vocab] and a cache, and look for the target [N]:
    persists [N, 4], is it among the 12 tokens decoded after 1, 4, 8, 12 unedited ones were forced?
    appears [N], is it among 20 decoded freely (the paper's measure)? nats [N], per token of the 12
    after one, under the unedited model; change [N], ‖S' − S‖ / ‖S‖ of all states."""
    free, _ = model.generate(logits[:, -1], cache, 20)
    target = target[:, None]
    appears = (free == target).any(1)
    persists = []
    for n in FORCED:
        later, after = model(p.said[:, :n], cache)
        tokens, _ = model.generate(later[:, -1], after, DECODED)
        persists.append((tokens == target).any(1))
        if n == 1:
            read = torch.cat([p.said[:, :1], tokens[:, :-1]], 1)
            judged, _ = model(read, p.after)
            judged = at_least_fp32(judged).mT  # [N, vocab, 12]
            nats = F.cross_entropy(judged, tokens, reduction="none").mean(1)
    native, edited = [], []
    for i in model.recurrent_layers:
        native.append(p.after.layers[i]["state"].flatten(1))
        edited.append(cache.layers[i]["state"].flatten(1))
    S = torch.cat(native, 1)
    moved = torch.cat(edited, 1) - S
    change = moved.norm(dim=1) / S.norm(dim=1)
    return dict(persists=torch.stack(persists, 1), nats=nats, appears=appears, change=change)


@torch.no_grad()
def steer(model: LanguageModel, tokens: Tensor, target: Tensor, heads, rng) -> dict:
    """Do all that may make targets [N] be said after prompts [N, T]: (kind, size) -> `outcome`.
    none: no edit.  read again: the target is read after the prompt, before anything is said.
    random, formula, memory: state edits, their values drawn, by formula, by `ascend`.  memory
    states alone: memory's states, all else unedited.  residual: by `ascend`, an input."""
    heads = sorted(heads)
    first_layer, _ = heads[0]
    V = model.layers[first_layer].mixer.V
    noise = torch.randn(len(target), EDITED, len(heads), V, generator=rng).to(tokens.device)
    found = {}
    for row in progress(passages_at_once(model, tokens, rows=4)):
        p = read_prompts(model, tokens[row])
        goal = target[row]
        nothing = tokens[row, :0]
        keys, formula = keys_and_formula(model, p, goal, heads)
        ends = {("none", None): (p.logits, p.after)}  # last logits and cache of each way
        ends["read again", None] = model(goal[:, None], p.after)
        for size in STATE_SIZES:
            memory = ascend(model, p, goal, noise[row], size, heads, keys)
            values = dict(random=noise[row], formula=formula, memory=memory)
            for kind, x in values.items():
                x = sized(x, size)
                ends[kind, size] = read_edited(model, p, nothing, x, heads, keys)
            _, edited = ends["memory", size]
            layers = [dict(layer) for layer in p.after.layers]
            for i in model.recurrent_layers:
                layers[i]["state"] = edited.layers[i]["state"]
            alone = p.after._replace(layers=tuple(layers))
            ends["memory states alone", size] = p.logits, alone
        embedding = at_least_fp32(model.embed(p.last).x)
        for size in INPUT_SIZES:
            x = ascend(model, p, goal, embedding, size)
            ends["residual", size] = read_edited(model, p, nothing, x)
        for way, (logits, cache) in ends.items():
            result = outcome(model, p, goal, logits, cache)
            found.setdefault(way, []).append(result)
    for way, parts in found.items():
        found[way] = {}
        for name in parts[0]:
            found[way][name] = torch.cat([part[name] for part in parts]).cpu()
    return found


def steering_figures(found: dict[str, Tensor], file: Tensor, rng) -> dict:
    """Sum up an `outcome` of n pairs, file [n] of their prompts: rates, and what they cost."""
    persists = []
    for forced, hit in zip(FORCED, found["persists"].T):  # [n] each
        ci95 = bootstrap(hit, torch.ones_like(hit), file, rng)
        persists.append(dict(forced=forced, rate=mean(hit), ci95=ci95))
    return dict(n_pairs=len(file), persists=persists,
                appears_rate=mean(found["appears"]),
                perplexity=found["nats"].mean().exp().item(),
                states_change=mean(found["change"]))


# ---- 10. Atoms: what single ones stand for ----
# New here: where an atom fires, which token it promotes, and edits that put that to the test.
class Firings(NamedTuple):
    """Hold places in a text and the atom to look at there, a row each."""
    passage: Tensor  # [E]
    position: Tensor  # [E]
    atom: Tensor  # [E]
    a: Tensor  # [E] its coefficient

    rows = StepInputs.rows  # some of them


def firings(sae: WriteSAE, k, v) -> Firings:
    """Find where atoms fire, that is, cover a write: k [n, T, K], v [n, T, V] -> [E] firings."""
    k, v = as_writes(k, v)
    index, a = sae.encode(k, v)
    key, value = sae.decode(index, a)
    fires = cosine(key, value, k, v) >= COVERED  # [n, T]
    passage, position = fires.nonzero().T
    return Firings(passage, position, index[fires], a[fires])


def describe(sae: WriteSAE, k, v, tokens: Tensor, decode: Callable, atoms=12, file=None):
    """Describe atoms by where they fire, in any text; no model is needed.

    k [n, T, K], v [n, T, V]: what is written at tokens [n, T]; decode: a list of tokens -> text;
    atoms: a list of them, or how many of the most used; file [n]: the file that each row is from
    (default: each its own). Returns a list of dicts: atom, n_firings, n_files, its most frequent
    token and that one's share of its firings, and contexts: five from different files, with the
    token at which it fires in ⟦ ⟧. Raises InputError for an atom that never fires.
    """
    at = firings(sae, k, v)
    if file is None:
        file = torch.arange(len(tokens))
    if isinstance(atoms, int):
        uses = at.atom.bincount()
        n_used = int((uses > 0).sum())
        atoms = uses.topk(min(atoms, n_used)).indices.tolist()
    found = []
    for atom in atoms:
        here = at.rows(at.atom == atom)
        n_firings = len(here.a)
        require(n_firings > 0, f"atom {atom} never fires in this text; take more of it")
        token, uses = tokens[here.passage, here.position].unique(return_counts=True)
        contexts = {}
        for passage, t in zip(here.passage.tolist(), here.position.tolist()):
            text = tokens[passage].tolist()
            before = decode(text[max(0, t - 12) : t])
            after = decode(text[t + 1 : t + 7])
            context = before + "⟦" + decode([text[t]]) + "⟧" + after
            contexts.setdefault(int(file[passage]), context)  # the first of each file
        most_frequent = int(token[uses.argmax()])
        found.append(dict(atom=atom, n_firings=n_firings, n_files=len(contexts),
                          token=decode([most_frequent]),
                          token_share=int(uses.max()) / n_firings,
                          contexts=list(contexts.values())[:5]))
    return found


def population(at: Firings, tokens: Tensor) -> tuple[float, float]:
    """Of the atoms with five firings or more, return their share of all firings, and the mean share
    of one's firings that are on its most frequent token."""
    token = tokens[at.passage, at.position].cpu()
    pairs = torch.stack([at.atom, token])
    (atom, _), n = pairs.unique(dim=1, return_counts=True)  # n: how often an atom is on a token
    uses = at.atom.bincount()
    most = torch.zeros(len(uses))
    most.scatter_reduce_(0, atom, n.float(), "amax")
    often = uses >= 5
    share = int(uses[often].sum()) / max(1, len(at.a))
    return share, mean(most[often] / uses[often])


def runs_to(model: LanguageModel, layer: int, tokens: Tensor, at: Firings):
    """Run up to each of these places. Yields which of them [e], all at one position, and what
    `native_run` yields there."""
    for t in at.position.unique().tolist():
        here = (at.position == t).nonzero()[:, 0]
        for batch in passages_at_once(model, here, 1):
            which = here[batch]
            passages = tokens[at.passage[which], : t + LATER]
            for point in native_run(model, layer, passages, [t]):
                yield which, *point


@torch.inference_mode()
def promoted_tokens(model: LanguageModel, layer: int, head: int, tokens: Tensor, sae: WriteSAE,
                    at: Firings) -> Tensor:
    """Name the token that each of the n atoms promotes, [n], by the gated formula alone:

        argmax over tokens ⟨W_U[token], W_O(gate_s · δo_s)⟩, mean over firings and eleven steps s
    """
    block = model.layers[layer]
    W_O = model.out_map(layer)[:, head]  # [D, V]
    W_U = at_least_fp32(model.unembedding)  # [vocab, D]
    total = W_O.new_zeros(len(sae.key), W_O.shape[1])
    for which, t, stream, cache, _ in runs_to(model, layer, tokens, at):
        s, rest, _ = block.inputs(stream, cache.layers[layer])
        gate, _ = block.mixer.gate_and_scale(s.v, rest)  # any v will do: it plays no part in gates
        atom = at.atom[which]
        key, value = sae.decode(atom, at.a[which])
        key = key[:, None].to(s.k)
        value = value[:, None].to(s.v)
        gain, _ = propagate(key, s.heads([head]))  # [e, 11, 1]
        moved = gate[:, :, head] * gain * value  # [e, 11, V]
        total.index_add_(0, atom.to(total.device), moved.sum(1))
    logits = total @ W_O.T @ W_U.T
    return logits.argmax(-1).cpu()  # a sum has the argmax of its mean


@torch.inference_mode()
def token_change(model: LanguageModel, layer: int, head: int, tokens: Tensor, at: Firings,
                 token: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Measure how log p(token) changes, [E], if key valueᵀ is added to the state right after the
    write at each place: in nats, mean over the write's step and the ten after it.
    token [E], key [E, K] (-key takes out), value [E, V]."""
    change = torch.zeros(len(token))
    for which, t, stream, cache, native in runs_to(model, layer, tokens, at):
        edit = Edit(layer, head, t, key[which].to(native), value[which].to(native))
        edited = onward(model, layer, stream, cache, [edit])
        moved = (edited - native).mean(1).cpu()  # [e, vocab]
        change[which] = moved.gather(1, token[which][:, None])[:, 0]
    return change
