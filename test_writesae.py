"""What models.py, writesae.py and run.py promise, as tests. CPU only, no network; every shape has
K ≠ V, because square heads hide transposed ones.

First the tests of the assignments (`python run.py assignment --list`): they need torch, numpy,
safetensors, pytest and hypothesis alone, and name the mistake where they know it.
"""

import math
import os

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}  # before imports

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings, strategies as st
from torch.testing import assert_close

import models
import writesae
from models import Edit, Mamba2, StepInputs, propagate, recurrence
from writesae import read_key

settings.register_profile("here", derandomize=True, deadline=None, max_examples=25,
                          suppress_health_check=list(HealthCheck))
settings.load_profile("here")
torch.set_num_threads(1)  # everything here is tiny: a second thread only waits
ARCHITECTURES = ("gdn", "mamba2", "rwkv7")
EACH_KIND = pytest.mark.parametrize("kind", ARCHITECTURES)
KIND, SEED, SIZE = st.sampled_from(ARCHITECTURES), st.integers(0, 99), st.integers(1, 9)


def rng(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_steps(kind: str, seed: int, B=2, T=20, H=3, K=6, V=4) -> StepInputs:
    """Six tensors as the architecture `kind` makes them."""
    g = rng(seed)
    q, k, unit = (torch.randn(B, T, H, K, generator=g) for _ in range(3))
    v = torch.randn(B, T, H, V, generator=g)
    unit = F.normalize(unit, dim=-1)
    share = torch.rand(B, T, H, 1, generator=g)
    shares = torch.rand(B, T, H, K, generator=g)
    log_decay = -20 * torch.rand(B, T, H, 1, generator=g) ** 4  # from no decay to e^-20
    if kind == "mamba2":
        return StepInputs(q, k, v, log_decay)
    if kind == "gdn":
        erase_out = log_decay.exp() * share * unit
        return StepInputs(q, unit, share * v, log_decay, unit, erase_out)
    log_decay = -math.exp(-0.5) * torch.rand(B, T, H, K, generator=g)
    return StepInputs(q, k, v, log_decay, unit, shares * unit)


def shake(model: torch.nn.Module, seed: int):
    """Random weights that leave no part of the model idle."""
    g = rng(seed)
    for p in model.requires_grad_(False).parameters():
        size = 0.3 if p.dim() in (1, 3) else 0.6 * p.shape[-1] ** -0.5
        p += size * torch.randn(p.shape, generator=g)
    return model


def close(a: torch.Tensor, b: torch.Tensor, hint: str, atol=1e-4):
    """Equal up to rounding; if not, PyTorch's message and a guess at the mistake."""
    bound = atol * max(1.0, b.abs().max().item())
    assert_close(a, b, atol=bound, rtol=1e-4, msg=lambda message: f"{message}\n{hint}")


# ---- 1. Assignments: `recurrence`, `propagate`, `mamba2_inputs` ----
def written(result, returns: str):
    """A function's result; if its body was emptied, what it should return."""
    if result is None:
        pytest.fail(f"not written yet? It returns {returns}", pytrace=False)
    return result


def grade(got, restate, hints: dict):
    """Compare what was got with `restate("")`, a dict. If it differs, say which of the mistakes
    {name: hint} gives what was got, by `restate(name)`."""

    def wrong(mistake: str) -> list[str]:
        expected = restate(mistake).items()
        return [f"{name}, of shape {list(y.shape)}" for x, (name, y) in zip(got, expected)
                if x.shape != y.shape or not np.allclose(x, y, atol=1e-4)]

    if wrong(""):
        known = [hint for mistake, hint in hints.items() if not wrong(mistake)]
        other = f"not right: {'; '.join(wrong(''))}; no mistake that is known here gives that"
        pytest.fail([*known, other][0], pytrace=False)


def numpy_recurrence(s: StepInputs, S, mistake="") -> dict:
    """Restate the definition in float64 NumPy, or with one of the mistakes below."""
    q, k, v, log_decay, look, out = (x if x is None else x.double().numpy() for x in s)
    decay = (log_decay if mistake == "exp" else np.exp(log_decay))[..., None]
    if mistake == "swapped":
        look, out = out, look
    if S is None or mistake == "start":
        S = np.zeros((len(q), *q.shape[2:], v.shape[-1]))
    S, o = np.asarray(S, float), []
    for t in range(q.shape[1]):
        write = k[:, t, :, :, None] * v[:, t, :, None]
        late = mistake in ("late", "late decay")
        old = S + write if late else S
        new = decay[:, t] * old
        if look is not None and mistake != "erase":
            seen = {"decayed": new, "late decay": S}.get(mistake, old)
            found = np.einsum("bhk,bhkv->bhv", look[:, t], seen)
            new = new - out[:, t, :, :, None] * found[:, :, None]
        old, S = S, new if late else new + write
        o.append(np.einsum("bhkv,bhk->bhv", old if mistake == "read" else S, q[:, t]))
    return dict(o=np.stack(o, 1), state=S)


LOOK_UP = "are erase_in and erase_out exchanged? Look up along erase_in, take out along erase_out"
RECURRENCE = {
    "exp": "is log_decay used as it is? The decay is its exponential",
    "late": "is the write decayed and erased, too? A_t acts on the old state, then k vᵀ is added",
    "late decay": "is the write decayed, too? The decay acts on the old state alone",
    "decayed": "is the erase looked up in the decayed state? erase_inᵀ S reads it as it was before",
    "erase": "is something erased at all? − erase_out (erase_inᵀ S)",
    "swapped": LOOK_UP,
    "read": "is q read before the write? o_t reads the state after this token's write",
    "start": "is the start state ignored? It begins from `state`, and from zeros if that is None",
}


@pytest.mark.parametrize("seed", [0, 1])
@EACH_KIND
def test_recurrence_is_its_definition(kind, seed):
    """One decay per head or per key channel, with and without an erase and a start state."""
    s = random_steps(kind, seed)
    state = torch.randn(2, 3, 6, 4, generator=rng(seed)) if seed else None
    got = written(recurrence(s, state), "the reads o [B, T, H, V], the last state [B, H, K, V]")
    grade(got, lambda mistake: numpy_recurrence(s, state, mistake), RECURRENCE)
    assert torch.equal(recurrence(s, state)[0], got[0]), "is an input changed in place?"


def numpy_propagate(key, s: StepInputs, mistake="") -> dict:
    """Restate u_s = A_s u_{s-1} and its reads in float64 NumPy, or with one of the mistakes."""
    q, _, _, log_decay, look, out = (x if x is None else x.double().numpy() for x in s)
    if mistake == "swapped":
        look, out = out, look
    u, gain = np.asarray(key, float), []
    for t in range(q.shape[1]):
        before = u
        if t > 0 or mistake == "own":
            moved = u if mistake == "decay" else np.exp(log_decay[:, t]) * u
            if look is not None and mistake != "erase":
                seen = moved if mistake == "decayed" else u
                moved = moved - out[:, t] * (look[:, t] * seen).sum(-1, keepdims=True)
            u = moved
        gain.append(((before if mistake == "late" else u) * q[:, t]).sum(-1))
    return dict(gain=np.stack(gain, 1), u=u)


PROPAGATE = {
    "own": "does u go through the first token's own transition? It is added after that: u_t = key",
    "erase": "is nothing erased from u? A_s is diag(decay) − erase_out erase_inᵀ, for u as for S",
    "decay": "does u decay?",
    "swapped": LOOK_UP,
    "decayed": "is the erase looked up in the decayed u? erase_inᵀ u reads u as it was",
    "late": "is u read before it has moved? q_s reads u_s, not u_{s-1}",
}


@EACH_KIND
def test_propagate_follows_an_edit_through_each_transition(kind, monkeypatch):
    def finished(s, state=None):  # in case that `recurrence` is not written yet
        return tuple(torch.tensor(x).float() for x in numpy_recurrence(s, state).values())

    monkeypatch.setattr(models, "recurrence", finished)
    s, key = random_steps(kind, 0, T=9), torch.randn(2, 3, 6, generator=rng(0))
    got = written(propagate(key, s), "the gain of each read [B, T, H] and the last u [B, H, K]")
    grade(got, lambda mistake: numpy_propagate(key, s, mistake), PROPAGATE)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def silu(x):
    return x * sigmoid(x)


def numpy_conv(x, p: dict, mistake=""):
    """Restate silu of the causal convolution of x [T, channels]."""
    taps, T = p["conv1d.weight"][:, 0], len(x)
    taps = taps[:, ::-1] if mistake == "taps" else taps
    padded = np.concatenate([np.zeros((3, x.shape[1])), x])
    y = sum(padded[i : i + T] * taps[:, i] for i in range(4))
    return silu(y + p.get("conv1d.bias", 0))


def by_heads(x, heads: int):
    return x.reshape(len(x), heads, -1)


def mamba2_steps(p: dict, h, m: Mamba2, mistake="") -> dict:
    """Restate Mamba-2's tensors for one text h [T, D] in float64 NumPy, all [T, H, ·]."""
    inner, shared = m.heads * m.V, m.groups * m.K
    z, xBC, dt = np.split(h @ p["in_proj.weight"].T, [inner, 2 * (inner + shared)], 1)
    x, B, C = np.split(numpy_conv(xBC, p, mistake), [inner, inner + shared], 1)
    head = np.arange(m.heads)
    group = head % m.groups if mistake == "tiled" else head // (m.heads // m.groups)
    B = by_heads(B, m.groups)[:, group]
    C = by_heads(C, m.groups)[:, group]
    x = by_heads(x, m.heads)
    delta = dt if mistake == "bias" else dt + p["dt_bias"]
    delta = delta if mistake == "softplus" else np.logaddexp(0, delta)
    delta = delta if mistake == "clamp" else np.clip(delta, *m.time_step_limit)
    delta = delta[:, :, None]
    sign = 1 if mistake == "sign" else -1
    A = sign * np.exp(p["A_log"])[:, None]
    q, k = (B, C) if mistake == "exchanged" else (C, B)
    k, v = (delta * k, x) if mistake == "key" else (k, delta * x)
    log_decay = np.exp(delta * A) if mistake == "exp" else delta * A
    skipped = p["skip"][:, None] * x
    return dict(q=q, k=k, v=v, log_decay=log_decay, skipped=skipped, z=z)


MAMBA2 = {
    "exchanged": "are B and C exchanged? B is the key, C the query",
    "key": "does Δ multiply B? Here it belongs to the value: v = Δ x",
    "bias": "is dt_bias added before softplus?",
    "softplus": "is Δ = softplus(dt + dt_bias), or only the sum?",
    "clamp": "is Δ kept inside time_step_limit?",
    "sign": "has A its minus sign? A = −exp(A_log): states decay, they do not grow",
    "exp": "is log_decay the decay itself? It is its logarithm, Δ A",
    "tiled": "do neighbouring heads share a group? Head h uses group ⌊h / (heads / groups)⌋",
    "taps": "does the convolution's last tap meet the current token?",
}


def test_mamba2_inputs_are_their_equations():
    mixer = shake(Mamba2(32, 6, 2, 5, 4, time_step_limit=(0.4, 1.2)), 0)
    h = torch.randn(1, 9, 32, generator=rng(0))
    returns = "the six tensors, (skip · x [B, T, H, V], z) and {'tail': the convolution's tail}"
    s, rest, _ = written(mixer.inputs(h, {}), returns)
    p = {name: x.double().numpy() for name, x in mixer.named_parameters()}
    got = [x[0].numpy() for x in (*s[:4], *rest)]
    grade(got, lambda mistake: mamba2_steps(p, h[0].double().numpy(), mixer, mistake), MAMBA2)
    assert s.erase_in is None and s.erase_out is None, "Mamba-2 erases nothing: both are None"
    first, _, tail = mixer.inputs(h[:, :4], {})
    second, _, _ = mixer.inputs(h[:, 4:], tail)
    for a, b, whole in zip(first[:4], second, s):
        close(torch.cat([a, b], 1), whole, "read in two parts: is the tail handed on?")


# ---- 2. Assignments: `encode`, `kl_divergence`, `effect`, `fit`, `bootstrap` ----
def random_metric(D: int, seed: int) -> torch.Tensor:
    R = torch.randn(D, D, generator=rng(seed)) / D**0.5
    return R @ R.T + 0.1 * torch.eye(D)


def judge(got, results: dict):
    """Grade what was got by results {"": the right one, hint: what that mistake gives}."""
    grade(got, results.get, {hint: hint for hint in results if hint})


@pytest.mark.parametrize("metric", [False, True])
def test_encode_finds_the_nearest_atom_and_its_coefficient(metric):
    """60 writes; where no atom is along a write, a is 0."""
    g = rng(1)
    M_k, M_v = (random_metric(5, 0), random_metric(3, 1)) if metric else (None, None)
    key, value = torch.randn(3, 5, generator=g), torch.randn(3, 3, generator=g)
    sae = writesae.WriteSAE(key, value, M_k, M_v)
    k, v = 2 * torch.randn(60, 5, generator=g), torch.randn(60, 3, generator=g)
    got = written(sae.encode(k, v), "each write's atom, index [N], and its coefficient a [N]")

    def best(M_k, M_v, least=0.0) -> dict:
        atoms = np.einsum("kl,nl,nw,wv->nkv", M_k, sae.key, sae.value, M_v)
        scores = np.einsum("nkv,mk,mv->mn", atoms, k, v)
        return dict(index=scores.argmax(1), a=scores.max(1).clip(least))

    judge(got, {
        "": best(sae.M_k, sae.M_v),
        "are writes met by key and value? It takes find_key and find_value: the metric":
            best(np.eye(5), np.eye(3)),
        "is the metric applied once more? find_key holds it already":
            best(sae.M_k @ sae.M_k, sae.M_v @ sae.M_v),
        "may a be negative? It is at least 0: did you forget the relu?":
            best(sae.M_k, sae.M_v, least=-np.inf),
    })
    assert got[0].dtype == torch.int64 and (got[1] == 0).any() and (got[1] > 0).any()
    index, a = sae.encode(k.view(10, 6, 5), v.view(10, 6, 3))
    assert index.shape == a.shape == (10, 6), "any axes may stand in place of N"
    assert torch.equal(index.flatten(), got[0]), "is the order of writes kept?"


def test_kl_divergence_by_hand():
    """p = (1/2, 1/3, 1/6) and q = (1/4, 1/4, 1/2): ½ log 2 + ⅓ log 4/3 − ⅙ log 3 = 0.25936."""
    p = torch.tensor([[[1 / 2, 1 / 3, 1 / 6]], [[0.2, 0.7, 0.1]]])  # [2, 1, 3]
    q = torch.tensor([[[1 / 4, 1 / 4, 1 / 2]], [[0.6, 0.3, 0.1]]])
    got = written(writesae.kl_divergence(p.log(), q.log()), "KL(p ‖ q), [...] from [..., vocab]")
    log_ratio = (p / q).log().numpy()
    judge([got], {
        "": dict(kl=(p.numpy() * log_ratio).sum(-1)),
        "are p and q exchanged? Terms are weighed by p, the first":
            dict(kl=-(q.numpy() * log_ratio).sum(-1)),
        "are terms weighed by log p? By p, its exponential":
            dict(kl=(p.log().numpy() * log_ratio).sum(-1)),
        "is it the mean over the vocabulary? It is the sum":
            dict(kl=(p.numpy() * log_ratio).mean(-1)),
    })
    assert got[0, 0].item() == pytest.approx(0.25936, abs=1e-4)


def test_kl_divergence_is_right_where_it_is_tiny_and_where_q_is_far():
    log_p = torch.randn(300, 500, generator=rng(0)).log_softmax(-1)
    log_q = (log_p + 1e-4 * torch.randn(300, 500, generator=rng(1))).log_softmax(-1)
    got = written(writesae.kl_divergence(log_p, log_q), "KL(p ‖ q)").double()
    p, q = (x.double().softmax(-1) for x in (log_p, log_q))
    if not torch.allclose(got, (p * (p / q).log()).sum(-1), rtol=0.05, atol=1e-10):  # 5e-9 nats
        pytest.fail("effects of 1e-9 nats are lost in rounding: terms of first order cancel in the "
                    "sum; add Σ q − Σ p, which is zero, to each: terms of second order in "
                    "d = log q − log p", pytrace=False)
    far = torch.tensor([[-200.0, 0.0], [-0.7, -0.7]]), torch.tensor([[0.0, -9.0], [-0.7, -99.0]])
    got = writesae.kl_divergence(*far)
    assert got.isfinite().all(), "e^d overflows at d = 88, where p is tiny and q is not"
    right = [1 * 9 + 1 * (math.exp(-9) - 1) + 1, 0.4966 * 98.3 - 0.4966]  # Σ p log p/q + Σ q − Σ p
    torch.testing.assert_close(got, torch.tensor(right), atol=0.01, rtol=0.01)


class Toy:
    """A model of no weights: edits move the logits from their position on, ever less."""
    def __call__(self, tokens, cache=None, edits=()):
        B, T = tokens.shape
        logits = 2 * torch.randn(50, T, 7, generator=rng(0))[tokens[:, 0]]  # by the first token
        for e in edits:
            for s in range(e.position, T):
                moved = (e.key.sum() * e.value).repeat(2)[:7]
                logits[:, s] += moved.roll(s) * 0.9 ** (s - e.position)
        return logits, None


def test_effect_sums_eleven_steps_of_each_text(monkeypatch):
    """A model without weights, and KL by its plain formula: nothing else needs to be written."""
    def plain_kl(log_p, log_q):
        return (log_p.exp() * (log_p - log_q)).sum(-1)

    monkeypatch.setattr(writesae, "kl_divergence", plain_kl)
    tokens, t = torch.tensor([[3] * 40, [8] * 40]), 17
    edits = [Edit(0, 0, t, torch.tensor([1.0, -0.4]), torch.tensor([0.3, -1.0, 0.6, 2.0]))]
    got = written(writesae.effect(Toy(), tokens, t, edits), "nats, [B]")
    native = Toy()(tokens)[0].log_softmax(-1)
    edited = Toy()(tokens, edits=edits)[0].log_softmax(-1)
    kl = plain_kl(native, edited).numpy()  # [B, T]
    judge([got], {
        "": dict(effect=kl[:, t : t + 11].sum(1)),
        "do the steps begin at t + 1? The write's own step counts: t, ..., t + 10":
            dict(effect=kl[:, t + 1 : t + 12].sum(1)),
        "are it ten steps? The write's own and the ten after it are eleven":
            dict(effect=kl[:, t : t + 10].sum(1)),
        "is it KL(edited ‖ native)? KL(native ‖ edited)":
            dict(effect=plain_kl(edited, native).numpy()[:, t : t + 11].sum(1)),
    })
    assert (writesae.effect(Toy(), tokens, t, []) == 0).all(), "no edit, no effect"


# What `fit` makes of seven writes: of its atoms' keys 1 · first + 2 · second + 4 · third + ...,
# then of their values; and what each mistake makes of them.
FIT_K = [[2, 0, 3], [1, -2, -2], [-3, -2, -2], [-2, -1, -2], [2, 0, -2], [1, -1, -2], [-3, -1, 3]]
FIT_V = [[0, -3], [-3, 0], [-2, -1], [1, -3], [2, 1], [0, -1], [0, -3]]
FIT_M_K, FIT_M_V = [[2, 0.5, 0], [0.5, 1, 0.2], [0, 0.2, 3]], [[1, 0.3], [0.3, 4]]
OLD_KEYS = "are the values' sums formed with the old keys? The new ones"
FIT_ONE_STEP = {
    "": (0.2513, 0.3805, 0.8900, -0.0362, -0.9993),
    "are writes brought to unit length first?": (0.3784, 0.2712, 0.8850, -0.0085, -1.0000),
    OLD_KEYS: (0.2513, 0.3805, 0.8900, -0.0171, -0.9999),
    "is the weight a missing? Σ a ⟨value, y⟩ x": (-0.7562, -0.5697, -0.3218, -0.5069, -0.8620),
}
FIT_METRIC = {
    "": (0.0906, 0.2277, 0.5361, -0.1864, -0.4775),
    OLD_KEYS: (0.0906, 0.2277, 0.5361, -0.1825, -0.4781),
    "is the metric used in training? ⟨key, x⟩ = keyᵀ M_k x":
        (0.1482, 0.2243, 0.5246, -0.0180, -0.4986),
    "is only the length measured by the metric? ⟨key, x⟩ = keyᵀ M_k x":
        (0.1834, 0.2359, 0.5117, -0.1242, -0.4869),
    "is unit length xᵀ M_k x = 1 there?": (0.0538, 0.2127, 0.5450, -0.0523, -0.4954),
}
FIT_FOUR_STEPS = {
    "": (-2.6568, -1.8242, 0.0760, -1.9324, -5.5023),
    OLD_KEYS: (-4.1593, -2.3198, 0.5431, -2.3698, -5.8520),
    "do sums forget all that they held? They keep `memory` of it":
        (-2.3780, -1.2368, 1.2179, 0.0000, -7.0000),
    "is an atom started anew after one step without a write? Its count has a memory, too: "
    "anew at 0.5 or less": (-2.1722, -1.3882, 2.0412, -1.8978, -6.5211),
    "are they started at the writes with the largest a? The smallest":
        (-2.5385, -1.5601, -1.0803, -3.2231, -2.7034),
}
FIT_EIGHT_STEPS = {
    "": (-3.8250, -3.3189, -7.0855, 4.3187, -7.6950),
    OLD_KEYS: (-6.7611, -3.3112, -3.8408, 0.4715, -9.8406),
    "do atoms that start anew keep their old sums or count? Both are 0 then":
        (3.3821, -4.1304, -8.7086, 2.9653, -8.0186),
}


@pytest.mark.parametrize("n, how, metric, stored", [
    (1, dict(steps=1, sample=6), (None, None), FIT_ONE_STEP),
    (1, dict(steps=1, sample=6), (FIT_M_K, FIT_M_V), FIT_METRIC),
    (3, dict(steps=4, sample=3), (None, None), FIT_FOUR_STEPS),
    (4, dict(steps=8, sample=1), (None, None), FIT_EIGHT_STEPS),
], ids=["one step", "metric", "four steps", "eight steps"])
def test_fit_of_seven_writes(monkeypatch, n, how, metric, stored):
    """Draws go through the writes in order: atoms begin as the first n, a step takes the next."""
    drawn = [0]

    def in_order(*args, **kwargs):
        first, drawn[0] = drawn[0], drawn[0] + math.prod(args[-1])
        return torch.arange(first, drawn[0]) % 7

    monkeypatch.setattr(torch, "randint", in_order)
    k, v, *M = (None if x is None else torch.tensor(x) * 1.0 for x in (FIT_K, FIT_V, *metric))
    sae = written(writesae.fit(k, v, n, rng(0), *M, **how), "a WriteSAE of the learned atoms")
    weight = torch.tensor([1.0, 2, 4, 8])[:n]
    got = torch.cat([weight @ sae.key, weight @ sae.value]).round(decimals=4)
    judge([got], {hint: dict(atoms=np.array(sums)) for hint, sums in stored.items()})


def test_fit_finds_planted_atoms_and_explains_more_with_each_step():
    """Noisy copies of 24 matrices, and three times as many atoms."""
    g = rng(0)
    planted = [F.normalize(torch.randn(24, D, generator=g), dim=-1) for D in (12, 9)]
    which, size = torch.randint(24, (6000,), generator=g), 0.5 + torch.rand(6000, 1, generator=g)
    k, v = (x[which] + 0.03 * torch.randn(6000, x.shape[1], generator=g) for x in planted)
    explained = []
    for steps in (1, 3, 30):
        sae = written(writesae.fit(size * k, v, 72, rng(0), steps=steps, sample=3000), "a WriteSAE")
        scores = (F.normalize(k, dim=-1) @ sae.key.T) * (F.normalize(v, dim=-1) @ sae.value.T)
        explained.append(scores.amax(1).square().mean().item())
    assert explained == sorted(explained), "the share of energy explained must rise with the steps"
    found = ((planted[0] @ sae.key.T) * (planted[1] @ sae.value.T)).amax(1) > 0.98
    assert found.float().mean() >= 0.95, "do atoms that have no writes start anew?"


def test_bootstrap_draws_whole_files_again():
    """Twelve files of one to eight passages, two numbers a passage; alike within a file."""
    g = rng(3)
    passages = torch.tensor([1, 5, 2, 7, 3, 1, 4, 8, 2, 6, 1, 3])
    file = torch.arange(12).repeat_interleave(passages) * 5
    level = 1 + 3 * torch.rand(60, generator=g)
    x = level[file, None] * (1 + 0.1 * torch.randn(len(file), 2, generator=g))
    y = (1 + 2 * torch.rand(60, generator=g))[file, None].repeat(1, 2)
    got = written(writesae.bootstrap(x, y, file, rng(0), draws=20_000), "[low, high], or None")
    x_of, y_of = (np.bincount(file, z.sum(1))[::5] for z in (x, y))  # of each file
    drawn = np.random.default_rng(0).integers(12, size=(20_000, 12))
    one = np.random.default_rng(0).integers(len(file), size=(20_000, len(file)))  # of passages
    ratio = x_of[drawn].sum(1) / y_of[drawn].sum(1)
    right = np.quantile(ratio, [0.025, 0.975])
    unit = 0.06 * (right[1] - right[0]) * 1e4  # `grade` compares to 1e-4

    def interval(ratio, ends=(0.025, 0.975)) -> dict:
        return dict(interval=np.quantile(ratio, ends) / unit)

    judge([np.array(got) / unit], {
        "": interval(ratio),
        "are passages drawn again, not whole files? Passages of one file are alike":
            interval(x.sum(1).numpy()[one].sum(1) / y.sum(1).numpy()[one].sum(1)),
        "is it the mean of the files' ratios? Σx / Σy of all that was drawn":
            interval((x_of / y_of)[drawn].mean(1)),
        "is it the 90 % interval? Its ends are at 2.5 and 97.5 %": interval(ratio, (0.05, 0.95)),
    })
    few = file < 45  # nine files
    assert writesae.bootstrap(x[few], y[few], file[few], rng(0)) is None, "nine files: None"
    again = [writesae.bootstrap(x, y, file, rng(seed)) for seed in (1, 1, 2)]
    assert again[0] == again[1] != again[2], "are files drawn by rng, and by nothing else?"


# ---- 3. Assignments: `read_key` ----
def gains_of(u, s: StepInputs):
    """What `propagate` returns, step by step; u may have more axes in front."""
    gains = [(u * s.q[:, 0]).sum(-1)]
    for t in range(1, s.q.shape[1]):
        decayed = s.log_decay[:, t].exp() * u
        if s.erase_in is not None:
            decayed -= s.erase_out[:, t] * (s.erase_in[:, t] * u).sum(-1, keepdim=True)
        u = decayed
        gains.append((u * s.q[:, t]).sum(-1))
    return torch.stack(gains, -2), u  # [..., T, H]


def test_read_key_by_hand(monkeypatch):
    """Reads −(3, 4, 0)/5 at once, and (8, −6, 0)/5 after a decay of ¼: b_1 = (4, −3, 0)/10, half as
    long and at a right angle. So −(3, 4, 0)/5 weighs most, and (0, 0, 1) nothing."""
    monkeypatch.setattr(writesae, "propagate", gains_of)
    q = torch.tensor([[-0.6, -0.8, 0.0], [1.6, -1.2, 0.0]])[None, :, None]
    s = StepInputs(q, q, q[..., :2], torch.tensor([0.01, 0.25]).log().view(1, 2, 1, 1))
    key = read_key(s)
    assert key is not None and key.shape == (1, 1, 3), "a unit key for each head, [N, C, K]"
    wrong = {"the vector of the smallest eigenvalue? eigh puts the largest last": [0, 0, 1],
             "a row of the eigenvectors? They are the columns": [1, 0, 0],
             "did you forget the decay that comes before a later read?": [0.8, 0.6, 0],
             "the mean of the b_t? The squares of the gains are to be large": [0.179, 0.984, 0]}
    for hint, direction in wrong.items():
        along = F.normalize(key[0, 0], dim=0).abs()
        assert not torch.allclose(along, torch.tensor(direction).float(), atol=1e-2), hint
    assert key[0, 0, 0] < 0, "of both signs the one with which the gains sum to more than 0"
    close(key[0, 0], torch.tensor([-0.6, -0.8, 0.0]), "the leading eigenvector, of length 1")


@EACH_KIND
@pytest.mark.parametrize("T", [1, 4])
def test_read_key_is_the_one_that_coming_reads_weigh_most(kind, T, monkeypatch):
    """No random unit key has larger squared gains."""
    monkeypatch.setattr(writesae, "propagate", gains_of)
    s = random_steps(kind, 0, T=T)
    key = read_key(s)
    close(key.norm(dim=-1), torch.ones(2, 3), "a key of length 1 for each head")
    others = F.normalize(torch.randn(200, 2, 3, 6, generator=rng(1)), dim=-1)
    ours, _ = gains_of(key, s)
    theirs, _ = gains_of(others, s)
    most = theirs.square().sum(-2).amax(0)
    assert (ours.square().sum(-2) >= 0.999 * most).all(), "a random key's gains are larger"
    assert (ours.sum(-2) >= -1e-4).all(), "the sign with which the gains sum to more than 0"


# ==== The assignments' tests end here. Below: all others, and what they need besides ====
import ast
import copy
import doctest
import functools
import itertools
import json
import random
import re
import shlex
import stat
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models as kinds

import run
from models import Block, ChannelMix, InputError, LanguageModel, RWKV7
from models import load, load_tokenizer, outer, recurrence_chunked, states
from writesae import LATER, Firings, Prompts, WriteSAE, ascend, cosine, log_chance, native_run
from writesae import read_edited, read_prompts, sized, untrained

HERE = Path(models.__file__).resolve().parent


def random_tokens(seed: int, B=2, T=40, vocab=61) -> torch.Tensor:
    return torch.randint(vocab, (B, T), generator=rng(seed))


SIZES = {  # of small configs in the hub's layouts
    "gdn": dict(model_type="qwen3_5_text", tie_word_embeddings=True, intermediate_size=40,
                rope_parameters=dict(rope_theta=10000.0, partial_rotary_factor=0.5),
                num_attention_heads=4, num_key_value_heads=2, head_dim=8, linear_num_key_heads=2,
                linear_num_value_heads=4, linear_key_head_dim=8, linear_value_head_dim=6),
    "mamba2": dict(num_heads=8, head_dim=8, state_size=12, n_groups=2, expand=2, chunk_size=16),
    "rwkv7": dict(hidden_size=128, head_dim=64, intermediate_size=96, norm_eps=1e-5,
                  decay_low_rank_dim=8, a_low_rank_dim=6, v_low_rank_dim=5, gate_low_rank_dim=7),
}


def tiny_config(kind: str, vocab=61, **changes) -> dict:
    """A small hub config of the architecture."""
    c = dict(vocab_size=vocab, hidden_size=32, num_hidden_layers=4, model_type=kind)
    return c | SIZES[kind] | changes


def tiny_model(kind: str, seed: int = 0) -> LanguageModel:
    """A small random model, K ≠ V (RWKV-7's class allows it, its checkpoints have K = V)."""
    torch.manual_seed(seed)
    if kind != "rwkv7":
        return shake(models.build(tiny_config(kind)), seed)
    blocks, norm, ranks = [], torch.nn.LayerNorm, dict(w=4, a=4, v=3, g=5)
    for i in range(3):
        mixer = RWKV7(32, 4, 8, 6, ranks, i == 0, 1e-4)
        blocks.append(Block(mixer, norm(32), ChannelMix(32, 48), norm(32)))
    return shake(LanguageModel("rwkv7", 61, 32, blocks, norm(32), norm(32), tied=False), seed)


# ---- 4. The recurrence: chunks, other rules, limits ----
@settings(max_examples=60)
@given(KIND, SEED, st.integers(1, 70), SIZE, SIZE, st.sampled_from([None, 1, 3, 5, 16]),
       st.sampled_from([0.0, -30.0, -100.0, -1e4, -math.inf]))
def test_chunks_give_and_learn_the_recurrence(kind, seed, T, K, V, chunk, log_decay):
    """Below e^-100 one decay per head counts as that; where a decay per channel leaves the domain
    of chunks, the loop takes over."""
    s, results = random_steps(kind, seed, T=T, K=K, V=V), []
    s.log_decay[:, seed % 4 :: 9] = log_decay
    start = torch.randn(2, 3, K, V, generator=rng(seed))
    for run in (recurrence, functools.partial(recurrence_chunked, chunk=chunk)):
        leaves = [x.clone().requires_grad_() for x in (*s, start) if x is not None]
        o, S = run(StepInputs(*leaves[:-1]), leaves[-1])
        loss = o.square().sum() + S.square().sum()
        results.append([o, S, *torch.autograd.grad(loss, leaves)])
    for a, b in zip(*results):
        close(b, a, "did you exponentiate a sum of log decays? 0 · inf is NaN in a gradient")
    close(models.read(states(s, start), s.q), results[0][0], "is each state after its write?")


def test_two_more_rules_are_columns_of_the_table():
    """S_t = (I − β k kᵀ) diag(α) S + β k vᵀ, and S_t = (I − k (b k)ᵀ) diag(α) S + k (w v)ᵀ."""
    s = random_steps("rwkv7", 3)
    k, alpha = s.erase_in, s.log_decay.exp()  # k of length 1
    b, w = torch.rand(2, 20, 3, 6, generator=rng(0)), torch.rand(2, 20, 3, 4, generator=rng(1))
    beta = b[..., :1]
    for look, out, v in ((k, beta * k, beta * s.v), (b * k, k, w * s.v)):
        after = states(s._replace(k=k, v=v, erase_in=alpha * look, erase_out=out))
        kept = alpha[:, 1:, ..., None] * after[:, :-1]
        kept = kept - outer(out[:, 1:], models.read(kept, look[:, 1:]))
        assert_close(after[:, 1:], kept + outer(k, v)[:, 1:])


def test_wrong_shapes_and_edits_are_named():
    s, zeros = random_steps("gdn", 0), torch.zeros
    steps = {
        "head axis before the time axis": s._replace(v=s.v.transpose(1, 2)),
        "last axis missing": s._replace(log_decay=s.log_decay[..., 0]),
        "both None": s._replace(erase_in=None),
        "is the text empty": s.times(0, 0),
        "must all be float32": s._replace(v=s.v.bfloat16()),
        "value first": s,  # with a wrong state
    }
    for message, wrong in steps.items():
        state = zeros(2, 3, 4, 6) if message == "value first" else None
        for repeat in (recurrence, recurrence_chunked):
            with pytest.raises(InputError, match=message):
                repeat(wrong, state)
    model, edit = tiny_model("gdn"), Edit(0, 0, 1, zeros(8), zeros(6))
    edits = {
        "full attention.*recurrent layers: 0, 1, 2": edit._replace(layer=3),
        "layer 2.*this call runs the layers in range.0, 2": edit._replace(layer=2),
        "heads 0..3": edit._replace(head=4),
        "position 5: .*range.0, 5": edit._replace(position=5),
        "key first": edit._replace(key=edit.value),
    }
    for message, wrong in edits.items():
        with pytest.raises(InputError, match=message):
            model.run(model.embed(random_tokens(0, T=5)), edits=[wrong], last=2)
    stream = model.embed(random_tokens(0, T=5))
    _, cache = model.run(stream)
    with pytest.raises(InputError, match="position 1: .*range.5, 10"):
        model.run(stream, cache, [edit])


# ---- 5. The adapters in float64 NumPy, straight from their equations ----
def numpy_reads(*s):
    """Run the definition over one text's tensors [T, H, ·]: the reads o [T, H, V]."""
    one_text = (torch.from_numpy(x)[None] for x in s)
    return numpy_recurrence(StepInputs(*one_text), None)["o"][0]


def numpy_gdn(p, h, m):
    qkv, keys = numpy_conv(h @ p["in_proj_qkv.weight"].T, p), m.key_heads * m.K
    q, k, v = np.split(qkv, [keys, 2 * keys], 1)
    q, k = (by_heads(x, m.key_heads).repeat(m.heads // m.key_heads, 1) for x in (q, k))
    q, k = (x / np.sqrt((x**2).sum(-1, keepdims=True) + 1e-6) for x in (q, k))
    beta = sigmoid(h @ p["in_proj_b.weight"].T)[:, :, None]
    step = np.logaddexp(0, h @ p["in_proj_a.weight"].T + p["dt_bias"])
    log_alpha = (-np.exp(p["A_log"]) * step)[:, :, None]
    v, erase_out = beta * by_heads(v, m.heads), np.exp(log_alpha) * beta * k
    o = numpy_reads(q / np.sqrt(m.K), k, v, log_alpha, k, erase_out)
    o = o / np.sqrt((o**2).mean(-1, keepdims=True) + 1e-6) * p["norm.weight"]
    return o.reshape(len(h), -1) * silu(h @ p["in_proj_z.weight"].T)


def numpy_mamba2(p, h, m):
    *s, skipped, z = mamba2_steps(p, h, m).values()
    y = numpy_reads(*s) + skipped
    y = by_heads(y.reshape(len(h), -1) * silu(z), m.groups)
    y = y / np.sqrt((y**2).mean(-1, keepdims=True) + 1e-5)
    return y.reshape(len(h), -1) * p["norm.weight"]


def numpy_rwkv7(p, h, m):
    past = np.concatenate([np.zeros((1, h.shape[1])), h[:-1]])
    mixed = {c: h + (past - h) * p[f"x_{c}"][0, 0] for c in "rwkvag"}

    def lora(c, f):
        middle = f(mixed[c] @ p[f"{c}_lora.0.weight"].T)
        return middle @ p[f"{c}_lora.2.weight"].T + p.get(f"{c}_lora.2.bias", 0)

    r, k, v = (by_heads(mixed[c] @ p[f"{c}_proj.weight"].T, m.heads) for c in "rkv")
    log_w = by_heads(-math.exp(-0.5) * sigmoid(lora("w", np.tanh)), m.heads)
    a = by_heads(sigmoid(lora("a", np.array)), m.heads)
    kappa = k * p["k_k"].reshape(m.heads, m.K)
    kappa = kappa / np.linalg.norm(kappa, axis=-1, keepdims=True)
    k = k * (1 + (a - 1) * p["k_a"].reshape(m.heads, m.K))
    o = numpy_reads(r, k, v, log_w, kappa, a * kappa)
    o = o - o.mean(-1, keepdims=True)
    o = o / np.sqrt((o**2).mean(-1, keepdims=True) + m.eps)
    bonus = (r * k * p["r_k"]).sum(-1, keepdims=True) * v
    y = o.reshape(len(h), -1) * p["g_norm.weight"] + p["g_norm.bias"]
    return (y + bonus.reshape(len(h), -1)) * lora("g", sigmoid)


@pytest.mark.parametrize("restated", [numpy_gdn, numpy_mamba2, numpy_rwkv7])
def test_each_adapter_is_its_equations_and_linear_in_o_at_its_scale(restated, monkeypatch):
    """output(o + d) − output(o) = W_out(gate · scale · d) (RWKV-7: d without its mean)."""
    model = tiny_model(restated.__name__.removeprefix("numpy_"))
    mixer, h = model.layers[0].mixer, torch.randn(1, 25, 32, generator=rng(5))
    s, rest, _ = mixer.inputs(h, {})
    o, _ = recurrence_chunked(s)
    ours, p = mixer.output(o, rest), {n: x.double().numpy() for n, x in mixer.named_parameters()}
    theirs = restated(p, h[0].double().numpy(), mixer) @ p["out_proj.weight"].T
    np.testing.assert_allclose(ours[0], theirs, atol=2e-4 * np.abs(theirs).max())
    gate, scale = mixer.gate_and_scale(o, rest)
    assert torch.equal(mixer.gate_and_scale(3 * o, rest)[0], gate), "the gate does not depend on o"
    d = torch.randn(o.shape, generator=rng(6))
    if restated is numpy_rwkv7:
        d = d - d.mean(-1, keepdim=True)
    monkeypatch.setattr(mixer, "gate_and_scale", lambda o, rest: (gate, scale))
    held = mixer.output(o + d, rest) - ours
    close(held, torch.einsum("bthv,dhv->btd", gate * scale * d, model.out_map(0)), "the gate?")


# ---- 6. The official implementations, live, in each of the hub's layouts ----
def assert_same_logits(folder: Path, tokens: torch.Tensor, theirs: torch.Tensor):
    assert 0.3 < theirs.std() < 10, "a bound on differences has to mean something"
    ours, _ = load(folder)(tokens)
    assert_close(ours, theirs, atol=2e-4 * max(1.0, theirs.std().item()), rtol=0)


def change_tensors(folder: Path, changes: dict):
    """Rewrite model.safetensors; a tensor that becomes None goes."""
    tensors = load_file(folder / WEIGHTS) | changes
    save_file({name: x for name, x in tensors.items() if x is not None}, folder / WEIGHTS)


def as_multimodal(folder: Path):
    """Rewrite a flat checkpoint as the hub has Qwen3.5: shards, tensors of other modules beside."""
    tensors = {"model.visual.patch.weight": torch.zeros(3), "mtp.fc.weight": torch.zeros(3)}
    for name, x in load_file(folder / WEIGHTS).items():
        tensors[name.replace("model.", "model.language_model.", 1)] = x
    (folder / WEIGHTS).unlink()
    save_file(dict([tensors.popitem()]), folder / "b.safetensors")
    save_file(tensors, folder / "a.safetensors")
    (folder / INDEX).write_text('{"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}')
    text = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(dict(model_type="qwen3_5", text_config=text)))


def as_mamba_ssm(folder: Path):
    """Rewrite transformers' Mamba-2 as its authors' package has it."""
    old, new = "backbone.embeddings.weight", "backbone.embedding.weight"
    change_tensors(folder, {new: load_file(folder / WEIGHTS)[old], old: None})
    config = dict(d_model=32, n_layer=2, vocab_size=50, tie_embeddings=False, rms_norm=True,
                  d_intermediate=0, attn_layer_idx=[], attn_cfg={},
                  ssm_cfg=dict(layer="Mamba2", ngroups=2, dt_limit=[0.05, 1.5]),
                  residual_in_fp32=True, pad_vocab_size_multiple=16)  # these change nothing
    (folder / CONFIG).write_text(json.dumps(config))


@pytest.mark.parametrize("kind, rewrite", [("gdn", as_multimodal), ("mamba2", as_mamba_ssm)])
def test_transformers_agrees_in_each_layout(tmp_path, kind, rewrite):
    """The embedded model, and a tiny one, as it is saved and in the hub's other layout."""
    import transformers

    make_checkpoint(tmp_path, kind)
    tokens = random_tokens(2, T=70)
    for folder in (HERE / "checkpoints" / kind, tmp_path):
        official = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        logits = official(tokens).logits.detach()
        assert_same_logits(folder, tokens, logits)
    rewrite(tmp_path)
    assert_same_logits(tmp_path, tokens, logits)


OFFICIAL = """embedding emb, lm_head head, embed_norm blocks.0.ln0, norm1 ln1, norm2 ln2,
g_norm ln_x, norm. ln_out., layers blocks, mixer att, mlp ffn, r_proj receptance, k_proj key,
v_proj value, out_proj output, _lora.0.weight 1, _lora.2.weight 2, _lora.2.bias 0"""


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_the_author_of_rwkv7_agrees(tmp_path):
    """The mixes of layer 0 lie as fla and rwkv7-hf open them, those of layer 1 in one tensor."""
    os.environ |= {"RWKV_V7_ON": "1", "RWKV_JIT_ON": "0"}  # read at the import
    from rwkv.model import RWKV

    make_checkpoint(tmp_path, "rwkv7")
    weights, tokens = {}, random_tokens(4, B=1)
    for name, x in load(tmp_path).state_dict().items():
        x = x.T if "_lora" in name and x.dim() == 2 else x
        for pair in OFFICIAL.split(","):
            name = name.replace(*pair.split())
        weights[name] = x.clone()
    torch.save(weights, tmp_path / "official.pth")
    official = RWKV(str(tmp_path / "official"), "cpu fp32")
    theirs, _ = official.forward(tokens[0].tolist(), None, full_output=True)
    stored = load_file(tmp_path / WEIGHTS)
    assert stored["model.layers.0.attn.x_r"].shape == (1, 1, 128)
    assert stored["model.layers.0.ffn.x_k"].shape == (128,)
    mixes = [f"model.layers.1.attn.x_{c}" for c in "rwkvag"]
    packed = torch.cat([stored[name][0] for name in mixes])  # [6, D]
    change_tensors(tmp_path, dict.fromkeys(mixes) | {"model.layers.1.attn.x_x": packed})
    assert_same_logits(tmp_path, tokens, theirs[None])


# ---- 7. The model: caches, edits ----
@given(KIND, SEED, st.lists(st.integers(1, 15), min_size=1, max_size=5))
def test_any_split_with_a_cache_gives_the_whole(kind, seed, pieces):
    """So no token sees a later one. What is passed in stays as it is; `generate` goes on."""
    model, tokens = tiny_model(kind), random_tokens(seed, T=sum(pieces))
    whole, end = model(tokens)
    cache, parts = models.Cache(tuple({} for _ in model.layers), 0), []
    for piece in tokens.split(pieces, 1):
        before = copy.deepcopy(cache.layers)
        logits, new = model(piece, cache)
        assert_close(cache.layers, before, atol=0, rtol=0)
        cache = new
        parts.append(logits)
    assert_close(torch.cat(parts, 1), whole, atol=1e-4, rtol=1e-5)
    assert_close(cache.layers, end.layers, atol=1e-4, rtol=1e-5)
    assert cache.length == end.length == tokens.shape[1]
    said, chosen_from = model.generate(whole[:, -1], end, 3)
    after, _ = model(said[1:, :2], end.rows(torch.tensor([1])))
    assert torch.equal(said, chosen_from.argmax(-1))
    assert_close(chosen_from[1:], torch.cat([whole[1:, -1:], after], 1), atol=1e-4, rtol=1e-5)


@EACH_KIND
def test_an_edited_model_is_a_model_that_wrote_something_else(kind, monkeypatch):
    """`edits` against other k and v in the layer itself, after a cache. A write replaced by itself
    changes nothing to the bit."""
    model, tokens, g = tiny_model(kind), random_tokens(8), rng(1)
    _, cache = model(tokens[:, :7])
    tokens, mixer, edits = tokens[:, 7:], model.layers[1].mixer, []
    native_inputs = mixer.inputs

    def other_inputs(h, cache):
        s, rest, new = native_inputs(h, cache)
        k, v = s.k.clone(), s.v.clone()
        for head, t in ((2, 2), (2, 5), (0, 2)):
            key, value = torch.randn(2, mixer.K, generator=g), torch.randn(mixer.V, generator=g)
            undo = Edit(1, head, t + 7, -s.k[:, t, head], s.v[:, t, head])
            edits.extend([undo, undo._replace(key=key, value=value)])
            k[:, t, head], v[:, t, head] = key, value
        return s._replace(k=k, v=v), rest, new

    with monkeypatch.context() as patch:
        patch.setattr(mixer, "inputs", other_inputs)
        expected, last = model(tokens, cache)
    edited, end = model(tokens, cache, edits)
    assert_close(edited, expected, atol=1e-4, rtol=0)
    assert_close(end.layers, last.layers, atol=1e-4, rtol=1e-5)
    itself = [edits[0], edits[0]._replace(key=-edits[0].key)]
    assert torch.equal(model(tokens, cache, itself)[0], model(tokens, cache)[0])


# ---- 8. Checkpoints: what is said is done, or refused by its name in one line ----
WEIGHTS, CONFIG, TOKENIZER = "model.safetensors", "config.json", "tokenizer.json"
INDEX, VOCABULARY = "model.safetensors.index.json", "rwkv_vocab_v20230424.txt"


HARMLESS = {  # keys of real configs that change nothing
    "gdn": dict(output_gate_type="swish", sliding_window=None, attention_dropout=0.1,
                rope_parameters=None, rope_theta=10000, partial_rotary_factor=0.5,
                rope_scaling=dict(type="default", factor=1.0, mrope_section=[1, 1, 0])),
    "mamba2": dict(norm_before_gate=True, tie_word_embeddings=True),
    "rwkv7": dict(attn=None, value_dim=[128, 128], gate_low_rank_dim=999),
}


def make_checkpoint(folder: Path, kind: str):
    """A tiny checkpoint of two layers, with a tokenizer of two words, and an older index."""
    config = tiny_config(kind, num_hidden_layers=2, full_attention_interval=2,
                         num_attention_heads=2, time_step_limit=[0.05, 1.5])
    models.save(shake(models.build(config), 5), config | HARMLESS[kind], folder)
    (folder / INDEX).write_text('{"weight_map": {"an": "../older.safetensors"}}')
    words = kinds.WordLevel({"a": 0, "b": 1}, unk_token="a")
    Tokenizer(words).save(str(folder / TOKENIZER))


def assert_refused(folder: Path, message: str):
    with pytest.raises(InputError, match=message) as error:
        load_tokenizer(load(folder))
    assert str(error.value).isprintable() and len(str(error.value)) < 400


WRONG = {  # what is refused by its name, or by that of the last key in it
    "gdn": [("hidden_act", "gelu"), ("attention_bias", True), ("sliding_window", 8),
            ("layer_types", ["linear_attention"]), ("partial_rotary_factor", 0.4),
            ("rope_scaling", {"rope_type": "yarn"}), ("rope_scaling", {"type": "linear"}),
            ("rope_scaling", {"low_freq": 1}), ("text_config", {"tie_word_embeddings": False})],
    "mamba2": [("model_type", "mamba"), ("hidden_act", "gelu"), ("hidden_size", True),
               ("num_hidden_layers", 10**9), ("n_groups", 0), ("layer_norm_epsilon", math.nan),
               ("time_step_limit", [0.5, 0.1]), ("quantization_config", {"bits": 4})],
    "mamba_ssm": [("d_intermediate", 128), ("ssm_cfg", {"layer": "Mamba1"}),
                  ("ssm_cfg", {"layer": "Mamba2", "ngroups": 2, "d_state": 24}),
                  ("ssm_cfg", {"layer": "Mamba2", "norm_before_gate": True})],
    "rwkv7": [("norm_first", False), ("attn", {"layers": [1]}), ("value_dim", [128, 256])],
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_config_that_asks_for_something_else_is_refused_by_name(tmp_path, kind):
    make_checkpoint(tmp_path, kind.replace("mamba_ssm", "mamba2"))
    if kind == "mamba_ssm":
        as_mamba_ssm(tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    for key, value in WRONG[kind]:
        (tmp_path / CONFIG).write_text(json.dumps(config | {key: value}))
        inside = list(value) if isinstance(value, dict) else []
        assert_refused(tmp_path, [key, *inside][-1])


A_LOG, CONV = "backbone.layers.1.mixer.A_log", "backbone.layers.0.mixer.conv1d.weight"
SPOILED = [  # tensor or file, its new content (None: it goes), message
    (TOKENIZER, None, "neither tokenizer.json nor rwkv_vocab"),
    (VOCABULARY, b"1 exit() 2", VOCABULARY),
    (A_LOG, torch.tensor([-math.inf] + [0.0] * 7), "A_log holds NaN or Inf"),
    ("\x1b[31mred\n\x07", torch.ones(2), r"unexpected tensor \[31mred \("),
    (A_LOG, None, "A_log is missing"),
    (CONV, torch.zeros(112, 4, 1), r"\[112, 4, 1\].*an MLX conversion"),
    (A_LOG, torch.zeros(8, dtype=torch.int8), "holds I8"),
    (WEIGHTS, b"version https://git-lfs.github.com/spec/v1", "git-LFS pointer"),
    (WEIGHTS, None, r"\w/older.safetensors: is missing"),
    (INDEX, None, "no model.safetensors, no index"),
    ("pytorch_model.bin", b"", "pytorch_model.bin is a pickle.*safetensors conversion"),
    (CONFIG, b"[1]", "no JSON object"),
]


def test_a_tensor_or_file_that_is_something_else_is_refused(tmp_path):
    """Each is read before those that are spoiled already."""
    make_checkpoint(tmp_path, "mamba2")
    for name, content, message in SPOILED:
        file = tmp_path / name
        if isinstance(content, bytes):
            file.write_bytes(content)
        elif file.exists():
            file.unlink()
        else:
            change_tensors(tmp_path, {name: content})
        assert_refused(tmp_path, message)
    os.truncate(file, 2 * 10**8)  # config.json, sparse: it takes no room
    assert_refused(tmp_path, "has 200,000,000 bytes, allowed are 100,000,000")
    file.unlink()
    file.symlink_to("/dev/null")
    assert_refused(tmp_path, "config.json: is missing, or no file")
    assert_refused("no such thing", "neither a folder nor a hub id")
    assert_refused("nobody/no-such-model" + "x" * 300, "cannot be fetched")


@EACH_KIND
def test_a_damaged_file_is_refused_in_one_line_or_does_no_harm(tmp_path, kind):
    """Cut off (no noise), or other bytes in the midst of it."""
    make_checkpoint(tmp_path, kind)
    draw = np.random.default_rng(0)
    for file in [tmp_path / name for name in (CONFIG, WEIGHTS, TOKENIZER)] * 10:
        whole, noise = file.read_bytes(), draw.bytes(draw.integers(4))
        cut = draw.integers(len(whole))
        rest = whole[cut + len(noise) :] if noise else b""
        file.write_bytes(whole[:cut] + noise + rest)
        try:
            load_tokenizer(load(tmp_path)).encode("a b")
            assert noise, "half a file was read"
        except InputError as error:
            assert str(error).isprintable() and len(str(error)) < 500
        file.write_bytes(whole)


# ---- 9. Tokenizers, and files that are written ----
def test_tokenizers_neither_cut_nor_pad_and_are_this_models(tmp_path):
    """RWKV World's takes the longest match; tokenizer.json counts, if both are there."""
    model = Namespace(folder=tmp_path, vocab=8)
    entries = ["a", "b", "ab", "é", b"\xc3", b"\xa9", " "]
    lines = [f"{i} {entry!r} {len(entry)}\n" for i, entry in enumerate(entries, 1)]
    (tmp_path / VOCABULARY).write_text("".join(lines), encoding="utf-8")
    world = load_tokenizer(model)
    assert world.encode("abba é") == [3, 2, 1, 7, 4]
    assert world.decode([3, 2, 1, 7, 5, 6]) == "abba é"
    with pytest.raises(InputError, match="no entry for the byte 99"):
        world.encode("c")
    words = Tokenizer(kinds.WordLevel({"a": 0, "b": 1, "a b": 8}, unk_token="a"))
    words.add_tokens(["b"])
    words.enable_truncation(2)
    words.enable_padding(length=9)
    words.save(str(tmp_path / TOKENIZER))
    with pytest.raises(InputError, match="ids up to 8, the embedding 8 rows"):
        load_tokenizer(model)
    model.vocab = 9
    hub = load_tokenizer(model)
    assert hub.encode("bbb") == [1, 1, 1] and hub.decode([1, 0]) == "b a"
    with pytest.raises(InputError, match="is the text Unicode"):
        hub.encode("\ud800")


@EACH_KIND
def test_what_is_saved_is_loaded_to_the_bit_and_never_half(tmp_path, kind, monkeypatch):
    config = tiny_config(kind)
    model = shake(models.build(config), 4)
    models.save(model, config, tmp_path, torch.float16)
    again = load(tmp_path, dtype=torch.float16)
    for name, p in model.named_parameters():
        assert_close(again.get_parameter(name), p.half(), atol=0, rtol=0)
    assert json.loads((tmp_path / CONFIG).read_text()) == config | {"dtype": "float16"}
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    model.embedding.weight[0, 0] = math.inf
    with pytest.raises(InputError, match="holds NaN or Inf.*not saved"):
        models.save(model, config, tmp_path)
    monkeypatch.setattr(json, "dump", None)  # fails between the weights and the config
    with pytest.raises(InputError, match="TypeError"):
        models.save(again, config, tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_files_are_whole_or_absent_and_follow_links_and_the_umask(tmp_path):
    link, target = tmp_path / "link", tmp_path / "target"
    link.symlink_to(target)
    before = os.umask(0o027)
    for content in (1, 2):  # the target is not there at first
        with models.whole_file(str(link)) as temporary:
            save_file({"a": torch.tensor(content)}, temporary)  # makes its files 0600
    os.umask(before)
    assert stat.S_IMODE(target.stat().st_mode) == 0o640
    for error, raised in ((KeyboardInterrupt, KeyboardInterrupt), (OSError, InputError)):
        with pytest.raises(raised), models.whole_file(str(link)) as temporary:
            Path(temporary).write_text("half")
            raise error
    assert link.is_symlink() and load_file(target)["a"] == 2
    assert sorted(os.listdir(tmp_path)) == ["link", "target"]


def test_a_place_that_takes_no_file_is_refused_before_the_work(tmp_path):
    """Nothing is left beside it."""
    os.mkfifo(tmp_path / "pipe")
    for name in ("", "pipe", "new/", "no/x"):
        with pytest.raises(InputError, match="give another place"):
            with models.whole_file(f"{tmp_path}/{name}"):
                pytest.fail("the work has begun")
    with pytest.raises(InputError, match="made a folder"):
        models.save(tiny_model("gdn"), {}, tmp_path / "pipe")
    models.check_writable(str(tmp_path / "new"))
    assert os.listdir(tmp_path) == ["pipe"]


# ---- 10. Dictionaries ----
def text_of(path: str) -> str:
    return (HERE / path).read_text("utf-8")


def random_writes(seed: int, N=9, K=6, V=4):
    g = rng(seed)
    return torch.randn(N, K, generator=g), torch.randn(N, V, generator=g)


def random_sae(seed: int, n=12, K=6, V=4) -> WriteSAE:
    key, value = random_writes(seed + 1000, n, K, V)
    return WriteSAE(key, value, random_metric(K, seed), random_metric(V, seed + 1))


def inner(X, Y, M_k, M_v):
    """⟨X, Y⟩ = tr(M_k X M_v Yᵀ) of matrices [..., K, V]."""
    return (M_k @ X @ M_v * Y).sum((-2, -1))


@given(SEED, SIZE, SIZE, st.sampled_from([1, 300]))
def test_encode_takes_the_largest_product_of_whole_matrices(seed, K, V, N):
    """In the metric, in which atoms have length 1; 300 writes are more than a block of 128."""
    sae = random_sae(seed, 7, K, V)
    k, v = random_writes(seed, N, K, V)
    M = sae.M_k, sae.M_v
    A = outer(sae.key, sae.value)
    assert_close(inner(A, A, *M), torch.ones(7), atol=1e-3, rtol=1e-3)
    products = inner(A[:, None], outer(k, v), *M)  # [n, N]
    best = products.amax(0)
    index, a = sae.encode(k, v)
    assert_close(products[index, torch.arange(N)], best, atol=1e-3, rtol=1e-3)
    assert_close(a, best.relu(), atol=1e-3, rtol=1e-3)
    stand_in = outer(*sae(k, v))
    assert_close(stand_in, a[:, None, None] * A[index], atol=1e-4, rtol=1e-4)


def test_a_dictionary_travels_with_its_metric_and_notes(tmp_path):
    path = str(tmp_path / "a.safetensors")
    sae = random_sae(3)
    sae.about = dict(layer=2, text="äß")
    sae.save(path)
    again = WriteSAE.load(path)
    assert again.about == sae.about
    assert_close(again.state_dict(), sae.state_dict(), atol=1e-6, rtol=1e-6)
    sae.key[1, 1] = math.nan
    with pytest.raises(InputError, match="not written"):
        sae.save(path)


def test_a_file_that_holds_no_dictionary_is_refused(tmp_path):
    path = str(tmp_path / "a.safetensors")
    key, value = random_writes(0)
    wrong = (
        ({"atoms.keys": key}, "version 2"),
        (dict(key=key), "a.safetensors"),
        (dict(key=key, value=math.nan * value), "9 of 9 writes"),
        (dict(key=key, value=value, M_k=torch.eye(4)), "metric of shape .4, 4."),
        (dict(key=key, value=value, M_v=math.inf * torch.ones(4, 4)), "must be finite"),
    )
    for tensors, message in wrong:
        save_file(tensors, path)
        with pytest.raises(InputError, match=message):
            WriteSAE.load(path)


@given(st.booleans(), st.integers(0, 10**6))
def test_a_damaged_dictionary_is_refused_or_does_no_harm(tmp_path_factory, cut, where):
    """Cut off somewhere, or with one bit flipped."""
    path = tmp_path_factory.mktemp("sae") / "a.safetensors"
    random_sae(0).save(str(path))
    whole = bytearray(path.read_bytes())
    place = where % len(whole)
    if cut:
        whole = whole[:place]
    else:
        whole[place] ^= 1 << where % 8
    path.write_bytes(whole)
    try:
        index, a = WriteSAE.load(str(path)).encode(*random_writes(0))
        assert a.isfinite().all()
    except InputError as error:
        assert "\n" not in str(error)


@pytest.mark.parametrize("kind", ["numpy", "bfloat16", "float64"])
def test_writes_of_any_precision_train_and_code(kind):
    k, v = random_writes(0, 200)
    there = k.numpy(), v.numpy()
    if kind != "numpy":
        dtype = getattr(torch, kind)
        there = k.to(dtype), v.to(dtype)
    for make in (untrained, writesae.fit):
        sae = make(*there, 8, rng(0))
        assert sae.key.dtype == (torch.float64 if kind == "float64" else torch.float32)
        _, a = sae.encode(*there)
        _, expected = sae.encode(k, v)
        assert_close(a, expected, atol=0.1, rtol=0.02)


def test_what_are_no_writes_is_refused_in_one_line():
    k, v = random_writes(0, 30)
    spoiled = v.clone()
    spoiled[7, 2] = math.inf
    wrong = {
        "floating-point": (k.long(), v),
        "a key and a value for each": (k, v[:29]),
        "k is .6., v .4.": (k[0], v[0]),
        "N > 0": (k[:0], v[:0]),
        "1 of 30 writes hold NaN or Inf, the first is ..7..": (k, spoiled),
    }
    sae = random_sae(0)
    for message, writes in wrong.items():
        for use in (sae.encode, WriteSAE):
            with pytest.raises(InputError, match=message):
                use(*writes)
        for make in (untrained, writesae.fit):
            with pytest.raises(InputError, match=message):
                make(*writes, 4, rng(0))
    with pytest.raises(InputError, match="exchanged"):
        sae.encode(v, k)
    for make in (untrained, writesae.fit):
        with pytest.raises(InputError, match="31 atoms from 30 writes"):
            make(k, v, 31, rng(0))


def test_the_untrained_null_is_made_of_different_writes():
    k, v = random_writes(1, 40)
    index, a = untrained(k, v, 40, rng(2)).encode(k, v)
    assert index.unique().numel() == 40, "drawn without replacement"
    assert_close(a, k.norm(dim=1) * v.norm(dim=1))
    assert not torch.equal(index, torch.arange(40)), "drawn in no order"


# ---- 11. The test over a text, and what near means ----
@EACH_KIND
@pytest.mark.parametrize("layer, head, batch_bytes", [(0, 1, 1), (2, 3, 10**9)])
def test_the_test_over_a_text_is_the_definition_everywhere(kind, layer, head, batch_bytes,
                                                           monkeypatch):
    """`effect` of the same edits, with nothing, one matrix or the sum of two in a write's place;
    one passage at a time or all."""
    monkeypatch.setattr(writesae, "BATCH_BYTES", batch_bytes)
    model, tokens, positions = tiny_model(kind), random_tokens(0, 3, 40), [1, 12, 29]
    text = model, layer, head, tokens, positions
    k, v = writesae.collect(model, tokens, layer, [head])
    k, v = k[:, positions], v[:, positions]  # [3, 3, 1, ·]
    key = torch.randn(3, 3, 2, k.shape[-1], generator=rng(1))
    value = torch.randn(3, 3, 2, v.shape[-1], generator=rng(2))
    itself = torch.cat([k, 0 * k], 2), torch.cat([v, v], 2)
    effects = writesae.replacement(*text, dict(itself=itself, two=(key, value)))
    assert effects["itself"].max() < 1e-8, "a write replaced by itself changes nothing"
    key_0, value_0 = key[:, :, 0], value[:, :, 0]
    single = dict(nothing=(0 * key_0, value_0), one=(key_0, value_0))
    effects |= writesae.replacement(*text, single)
    for i, t in enumerate(positions):
        edits = [Edit(layer, head, t, -k[:, i, 0], v[:, i, 0])]
        edits += [Edit(layer, head, t, key[:, i, j], value[:, i, j]) for j in (0, 1)]
        for n, name in ((1, "nothing"), (2, "one"), (3, "two")):
            expected = writesae.effect(model, tokens, t, edits[:n])
            assert_close(effects[name][:, i], expected, atol=2e-5, rtol=2e-3)


def test_a_place_or_position_that_is_none_is_refused():
    model, tokens = tiny_model("gdn"), random_tokens(0, 2, 30)
    stand_ins = {"x": (torch.ones(2, 1, 8), torch.ones(2, 1, 6))}
    wrong = ((1, 0, "one comes before"), (1, 20, "10 after the last"), (3, 9, "attention"))
    for layer, t, message in wrong:
        with pytest.raises(InputError, match=message):
            writesae.replacement(model, layer, 0, tokens, [t], stand_ins)


@EACH_KIND
def test_the_read_metric_is_the_fisher_information_of_the_next_predictions(kind):
    """Against differences of the drawn tokens' log-probability, by whole passes, in float64."""
    model, tokens = tiny_model(kind).double(), random_tokens(4, 2, 24)
    mixer, t = model.layers[1].mixer, 8
    M = writesae.read_metric(model, 1, 2, tokens, [t], rng(5), ridge=0.1)
    native = model(tokens)[0].log_softmax(-1)[:, t : t + 11]
    lots = torch.rand(2, 11, 1, generator=rng(5)).double()
    drawn = torch.searchsorted(native.exp().cumsum(-1), lots)
    G = torch.zeros(2, mixer.K, mixer.V, dtype=torch.float64)
    keys, values = torch.eye(mixer.K).double(), torch.eye(mixer.V).double()
    for c, d in itertools.product(range(mixer.K), range(mixer.V)):
        edit = Edit(1, 2, t, 1e-5 * keys[c], values[d])
        edited = model(tokens, edits=[edit])[0].log_softmax(-1)[:, t : t + 11]
        G[:, c, d] = (edited - native).gather(-1, drawn).sum((1, 2)) / 1e-5
    for ours, side in zip(M, (G @ G.mT, G.mT @ G)):
        side = side.sum(0)
        side = side / side.diagonal().mean()
        assert_close(ours.double(), side + 0.1 * torch.eye(len(side)), atol=2e-3, rtol=2e-2)


def test_a_matrix_as_near_has_the_atoms_angles_and_else_any_direction():
    """Three writes, for each 20,000 matrices; all lengths and angles as the metric has them."""
    sae = random_sae(0)
    k, v = (x[:, None].expand(-1, 20_000, -1) for x in random_writes(0, 3))
    key, value = (x[:, None].expand(-1, 20_000, -1) for x in random_writes(1, 3))
    near = writesae.as_near(k, v, key, value, sae.M_k, sae.M_v, rng(0))
    for x, atom, other, M in zip((k, v), (key, value), near, (sae.M_k, sae.M_v)):
        e = x / (x @ M * x).sum(-1, keepdim=True).sqrt()
        along = (atom @ M * e).sum(-1)
        length = (atom @ M * atom).sum(-1)  # squared
        assert_close((other @ M * e).sum(-1), along, atol=1e-3, rtol=1e-3)
        assert_close((other @ M * other).sum(-1), length, atol=1e-3, rtol=1e-3)
        across = other - along[..., None] * e
        sphere = (M.inverse() - outer(e, e)[:, 0]) / (len(M) - 1)  # mean of r rᵀ, at length 1
        spread = (length - along.square())[:, :1, None] * sphere
        assert_close(across.mT @ across / 20_000, spread, atol=0.1, rtol=0.05)


def test_figures_of_a_stand_in_by_hand():
    """Four positions in two passages: ratios 1/5, 2, 1/2 and 1/3; the sums are 7.5 and 14."""
    effect = torch.tensor([[1.0, 4], [0.5, 2]])
    nothing = torch.tensor([[5.0, 2], [1, 6]])
    match = torch.tensor([[0.71, 0.70], [0.9, -0.9]])
    f = writesae.left_figures(effect, nothing, match, torch.tensor([0, 1]), rng(0))
    assert f["won"] == 0.75 and f["covered"] == 0.5 and f["left_ci95"] is None
    assert f["left"] == pytest.approx(7.5 / 14) and f["typical"] == pytest.approx(1 / 3)


def test_figures_at_firings_by_hand():
    """Of eight positions six fire; the third atom's only one is lost."""
    atom = torch.tensor([[1.0, 9, 2, 7, 4], [3, 1, 1, 9, 2]])
    nothing = torch.tensor([[5.0, 1, 1, 6, 5], [2, 4, 3, 9.5, 1]])
    drawn = torch.tensor([[6.0, 2, 0, 9, 9], [1, 1, 1, 1, 0.5]])
    at = torch.tensor([[1, 0, 1, 1, 1], [0, 1, 0, 0, 1]]).bool()
    at_drawn = torch.tensor([[1, 0, 1, 0, 0], [1, 0, 0, 0, 0]]).bool()
    index = torch.tensor([[3, 5, 3, 5, 3], [3, 3, 5, 5, 8]])
    another = torch.tensor([[4.0, 6], [9, 9]])  # at the first and the fifth position
    effects = {"learned by reads": atom, "nothing": nothing, "random writes by reads": drawn}
    f = writesae.firing_figures(effects, at, at_drawn, index, another)
    assert f["n"] == 6 and f["win_rate"] == pytest.approx(3 / 6)
    assert f["win_rate_untrained"] == pytest.approx(2 / 3)
    assert f["per_atom_win_rate"] == pytest.approx((3 / 4 + 0 + 0) / 3)
    assert f["strict_order_rate"] == pytest.approx(1 / 3)  # 1 < 5 > 4; 4 < 5 < 6; 2 > 1
    # by the effect of nothing: 1 lost, 1 lost, 4 won, 5 won, 5 won, 6 lost
    assert f["failure_by_quartile"] == [1, 0, 0, 1]


# ---- 12. Compare: several atoms, other dictionaries ----
@given(SEED)
def test_a_pursuit_takes_what_is_largest_in_the_rest_and_refits_all(seed):
    """Against whole matrices, as vectors in which the metric is the identity; one write is zero."""
    sae = random_sae(seed, 8).double()
    k, v = (x.double() for x in random_writes(seed, 20))
    k[0] = 0
    root_k, root_v = torch.linalg.cholesky(sae.M_k), torch.linalg.cholesky(sae.M_v)
    atoms = (root_k.mT @ outer(sae.key, sae.value) @ root_v).flatten(1)  # [8, K V]
    X = (root_k.mT @ outer(k, v) @ root_v).flatten(1)[..., None]
    left, taken = X, torch.zeros(20, 0, dtype=torch.long)
    for m in range(1, 9):
        products = (atoms @ left)[..., 0].abs()
        best = products.scatter(1, taken, -1).argmax(1, keepdim=True)  # none twice
        taken = torch.cat([taken, best], 1)
        index, a = writesae.pursuit(sae, k, v, m)
        assert torch.equal(index, taken)
        chosen = atoms[taken].mT  # [20, K V, m]
        fitted = torch.linalg.lstsq(chosen, X).solution
        assert_close(a, fitted[..., 0], atol=1e-3, rtol=1e-3)
        left = X - chosen @ fitted
    again, _ = writesae.pursuit(sae, k.view(4, 5, -1), v.view(4, 5, -1), 8)
    assert torch.equal(again.view(20, 8), index)
    with pytest.raises(InputError, match="9 atoms for a write, of 8"):
        writesae.pursuit(sae, k, v, 9)


def test_a_key_is_pulled_by_what_the_other_atoms_leave():
    x, y = random_writes(0, 5)
    key, value = (side.view(5, 3, -1) for side in random_writes(1, 15))
    M_v, a = random_metric(4, 2), torch.randn(5, 3, generator=rng(3))
    got = writesae.pulled(x, y @ M_v, key, value, value @ M_v, a)
    A = a[..., None, None] * outer(key, value)  # [5, 3, K, V]
    others = A.sum(1, keepdim=True) - A
    pull = (outer(x, y)[:, None] - others) @ M_v @ value[..., None]
    assert_close(got, a[..., None] * pull[..., 0], atol=1e-3, rtol=1e-3)


def test_pursuit_finds_planted_atoms():
    """Six orthogonal ones, one of them rare; each write is one of them, of any size and sign."""
    rotation, _ = torch.linalg.qr(torch.randn(8, 8, generator=rng(3)))
    truth = WriteSAE(torch.eye(7)[:6], rotation[:6])
    which = torch.randint(5, (3000,), generator=rng(4))
    which[:40] = 5
    k, v = truth.decode(which, torch.randn(3000, generator=rng(5)))
    found = writesae.fit_pursuit(k, v, 9, 1, rng(0), steps=6, sample=2000)
    products = (truth.key @ found.key.T) * (truth.value @ found.value.T)
    assert products.abs().amax(1).min() > 0.999


def test_pursuit_learns_for_as_many_atoms_as_are_active():
    k, v = random_writes(5, 400)
    M, left = (random_metric(6, 6), random_metric(4, 7)), {}
    for m, steps in ((3, 0), (3, 1), (3, 8), (1, 8)):
        sae = writesae.fit_pursuit(k, v, 20, m, rng(7), *M, steps=steps, sample=1500)
        three = sae.decode(*writesae.pursuit(sae, k, v, 3))
        _, unexplained = writesae.nearness(three, (k[:, None], v[:, None]), *M)
        left[m, steps] = unexplained.mean()
    assert left[3, 8] < 0.75 * left[3, 0] and left[3, 1] < 0.95 * left[3, 0]
    assert left[3, 8] < 0.97 * left[1, 8]


def test_writes_in_proportion_to_norm():
    """Their norms are 1, 4 · 3 and 0, as the metric has them."""
    k = torch.tensor([[1.0, 0, 0], [0, 2, 0], [0, 0, 0]]).repeat(3000, 1)
    v = torch.tensor([[1.0, 0], [0, 3], [1, 1]]).repeat(3000, 1)
    M_k = torch.diag(torch.tensor([1.0, 4, 1]))
    x, y = writesae.by_norm(k, v, rng(0), M_k, torch.eye(2))
    first, second = x[:, 0] == 1, x[:, 1] == 2
    assert (first | second).all() and (y[second, 1] == 3).all()
    assert len(x) == 9000 and abs(second.float().mean() - 12 / 13) < 0.02


def test_two_vector_dictionaries():
    """On writes of one key they are one, of values; and an atom of either sign will do."""
    size, v = random_writes(0, 500, 1)
    k = torch.tensor([1.0, -2, 3, 0, 1, 1]) * size
    M_k, M_v = random_metric(6, 2), random_metric(4, 3)
    left = []
    for n in (1, 8):
        key, value = writesae.two_vector_saes(k, v, n, rng(3), M_k, M_v)(k, v)
        assert_close(key, k, atol=1e-2, rtol=2e-3)
        assert (value @ M_v * v).sum(1).min() >= 0
        left.append(((v - value) @ M_v * (v - value)).sum())
    whole = (v @ M_v * v).sum()
    assert left[1] < 0.4 * whole and left[1] < 0.6 * left[0]


def test_means_after_tokens_by_hand():
    """Of writes in two windows: after the same two tokens, else the same one, else all. Nobody asks
    for what comes after 8."""
    tokens, asked = torch.tensor([[5, 7, 7], [7, 5, 8]]), torch.tensor([[7, 5, 7, 7, 9, 5]])
    k = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0], [2, 0, 0], [0, 3, 0]])
    v = torch.tensor([[1.0, 0], [2, 0], [0, 1], [0, 1], [1, 1], [4, 0]])
    X, mean = outer(k, v), 0
    for order in (0, 1, 2):
        there = writesae.contexts(tokens, order).flatten()
        here = writesae.contexts(asked, order).flatten()
        mean = writesae.mean_after(k, v, there, here, mean)
    after_5 = (X[0] + X[4]) / 2
    after_7 = (X[1] + X[2] + X[3]) / 3
    wanted = torch.stack([after_7, X[4], X[1], X[2], X.mean(0), after_5])
    assert_close(mean, wanted)
    left = wanted - outer(*writesae.leading_pair(wanted))
    smaller = torch.linalg.svdvals(wanted)[:, 1:]
    assert_close(left.square().sum((1, 2)), smaller.square().sum(1))


def test_nearness_is_that_of_whole_matrices():
    k, v = random_writes(0, 5)
    key, value = (side.view(5, 3, -1) for side in random_writes(1, 15))
    write, M = (k[:, None], v[:, None]), (random_metric(6, 2), random_metric(4, 3))
    cosine, left = writesae.nearness((key, value), write, *M)
    A, X = key.mT @ value, outer(k, v)
    energy, own = inner(X, X, *M), inner(A, A, *M)
    assert_close(left, inner(X - A, X - A, *M) / energy, atol=1e-3, rtol=1e-3)
    assert_close(cosine, inner(X, A, *M) / (energy * own).sqrt(), atol=1e-4, rtol=1e-4)
    of_first, _ = writesae.nearness((key[:, :1], value[:, :1]), write)
    assert_close(writesae.cosine(key[:, 0], value[:, 0], k, v), of_first)


def test_what_learning_is_worth_by_hand():
    sizes, falling, rising = [100, 1000, 10_000], [0.8, 0.4, 0.3], [0.3, 0.4, 0.8]
    assert writesae.worth(sizes, falling, 0.325) == pytest.approx(1000 * 10**0.75)
    assert writesae.worth(sizes, rising, 0.6) == pytest.approx(1000 * 10**0.5)
    assert writesae.worth(sizes, [0.4, 0.4, 0.3], 0.4) == pytest.approx(1000)
    assert writesae.worth(sizes, falling, 0.29) is None


def test_zero_writes_leave_no_nan():
    k, v = random_writes(0, 200)
    k[::3] = 0
    learned = writesae.fit(k, v, 8, rng(0), steps=3, sample=20)
    several = writesae.fit_pursuit(k, v, 10, 3, rng(1), steps=2, sample=50)
    write = k[:, None], v[:, None]
    found = [*learned(k, v), *writesae.nearness(write, write)]
    found += several.decode(*writesae.pursuit(several, k, v, 3))
    found += writesae.two_vector_saes(k, v, 5, rng(3))(k, v)
    assert all(x.isfinite().all() for x in found)


@pytest.mark.parametrize("what, n", (("sizes", 5), ("active", 13), ("variants", 8)))
def test_compare_of_a_tiny_cell(what, n, monkeypatch):
    monkeypatch.setattr(run, "SIZES", (20, 40, 80))
    monkeypatch.setattr(run, "POSITIONS", range(10, 28, 6))
    args = Namespace(what=what, plot=None, quick=True, seed=0, atoms=24, sae=None)
    reader = Namespace(args=args, model=tiny_model("mamba2"), file=torch.arange(12),
                       tokens=random_tokens(0, 12), training_tokens=random_tokens(1, 6, 20))
    cell = run.Cell(reader, 1, 0)
    k, v = writesae.collect(cell.model, reader.training_tokens, 1, [0])
    cell.writes = k.flatten(0, 2), v.flatten(0, 2)
    cell.metric = random_metric(12, 0), torch.eye(8)
    rows, lines, _ = run.compare(cell)
    assert len(lines) == 1 + len(rows) == 1 + n
    curve = [(r["n_atoms"], r["left"]) for r in rows if not r["trained"]]
    for r in rows:
        assert r["trained"] == (r["name"] != "random writes")
        assert r["parameters"] == r["n_atoms"] * (12 + 8) and "typical" not in r
        many = writesae.worth(*zip(*curve), r["left"])
        shown = what == "sizes" and r["trained"] and many
        assert r["worth_left"] == (many / r["n_atoms"] if shown else None)
    if what == "sizes":
        assert len(run.draw_sizes([rows], ["gdn"]).axes) == 1
    if what == "active":  # more atoms explain more
        for name in ("learned", "random writes"):
            left = [r["unexplained"] for r in rows if (r["name"], r["metric"]) == (name, "reads")]
            assert left == sorted(left, reverse=True)


# ---- 13. The logit-change formula ----
def ladder_case(kind: str, size=1.0, last=False):
    """A point of a tiny model in fp64, two edits in its layer 1, three tokens of each passage."""
    model = tiny_model(kind).double()
    mixer = model.layers[1].mixer
    if last:  # nothing comes after that mixer
        model.layers, model.layers[1].mlp = model.layers[:2], None
    _, stream, cache, native = next(native_run(model, 1, random_tokens(3, B=4), [9]))
    key = torch.randn(2, 4, mixer.K, generator=rng(1)).double()
    value = size * torch.randn(2, 4, mixer.V, generator=rng(2)).double()
    if kind == "rwkv7":  # its norm takes the mean out: keep it out of the edit
        value = value - value.mean(-1, keepdim=True)
    edits = [Edit(1, 2, 9, key[0], value[0]), Edit(1, 2, 9, key[1], value[1])]
    return model, stream, cache, edits, native[:, 0].topk(3).indices


def rungs_of(*case) -> dict:
    """All rungs by name, and what was measured."""
    with torch.no_grad():
        predicted, measured = writesae.logit_ladder(*case)
        without = writesae.logit_ladder(*case, jacobians=False)
    assert_close(without, (predicted[:1], measured))
    return dict(zip(writesae.RUNGS, predicted)) | dict(measured=measured)


@EACH_KIND
def test_each_rung_is_exact_to_the_order_that_it_claims(kind):
    """Halve the edit: an exact first order's error falls to a quarter, a second's to an eighth."""
    unit = 1e-5 if kind == "gdn" else 1e-3  # its reads are small here: the head's norm soon bends
    big, small = rungs_of(*ladder_case(kind, 2 * unit)), rungs_of(*ladder_case(kind, unit))
    error = {name: (big[name] - big["measured"]).norm() for name in big}
    for name, falls in (("full Jacobian", 2), ("mean of two Jacobians", 3)):
        order = math.log2(error[name] / (small[name] - small["measured"]).norm())
        assert abs(order - falls) < 0.25, f"{name}'s error is of order {order:.2f}"
    for name in writesae.RUNGS[:5]:
        assert error[name] > 3 * error["full Jacobian"], f"{name} leaves nothing out"
    same = torch.equal(big["three factors"], big["+ erase"])
    assert same == (kind == "mamba2"), "without an erase decays are the whole transition"


@EACH_KIND
def test_after_the_last_mixer_the_direct_path_is_the_full_jacobian(kind):
    rungs = rungs_of(*ladder_case(kind, last=True))
    assert_close(rungs["direct path"], rungs["full Jacobian"])


@EACH_KIND
@pytest.mark.parametrize("rung", ["+ erase", "+ gate", "+ scales"])
def test_lower_rungs_are_the_direct_path_with_less_of_it(kind, rung, monkeypatch):
    """Norms' statistics held where they are; below "+ scales" scales 1 and no final norm."""
    case = model, stream, cache, _, _ = ladder_case(kind)
    expected, mixer, norm = rungs_of(*case)[rung], model.layers[1].mixer, model.norm
    s, rest, _ = model.layers[1].inputs(stream, cache.layers[1])
    o, _ = recurrence(s, cache.layers[1]["state"])
    gate, scale = mixer.gate_and_scale(o, rest)
    x = model.run(stream, cache, first=1)[0].x
    slope = norm(x) / x
    if kind == "rwkv7":  # LayerNorm
        slope = (norm(x) - norm.bias) / (x - x.mean(-1, keepdim=True))
    if rung != "+ scales":
        scale, slope = torch.ones_like(scale), torch.ones_like(slope)
    if rung == "+ erase":
        gate = torch.ones_like(gate)
    monkeypatch.setattr(mixer, "gate_and_scale", lambda o, rest: (gate, scale))
    monkeypatch.setattr(norm, "forward", lambda x: slope * x)
    assert_close(rungs_of(*case)["direct path"], expected)


@EACH_KIND
def test_the_ladder_over_a_text_is_measured_at_each_place(kind, monkeypatch):
    """Small, swap and delete by hand, for the last of three places; two passages run at once."""
    monkeypatch.setattr(writesae, "BATCH_BYTES", 4 * LATER * 61 * 6 * 2)
    model, tokens = tiny_model(kind).double(), random_tokens(4, B=4)
    mixer = model.layers[1].mixer
    k, key = torch.randn(2, 4, 2, mixer.K, generator=rng(5)).double()
    v, value = torch.randn(2, 4, 2, mixer.V, generator=rng(6)).double()
    where = torch.zeros(4, 2, dtype=torch.bool)
    where[0, 0] = where[2, 1] = where[3, 1] = True
    text = tokens, [7, 12], writesae.three_edits(k, v, key, value), where
    x, y = writesae.ladder_over_text(model, 1, 2, *text, ranks=(1, 4), steps=3)
    assert x.shape == (7, 3, 3, 3, 2)
    out = Edit(1, 2, 12, -k[3, 1], v[3, 1])
    put = Edit(1, 2, 12, key[3, 1], value[3, 1])
    small = put._replace(key=0.1 * put.key / put.key.norm() / put.value.norm())
    with torch.no_grad():
        native = model(tokens[3:])[0][0, 12:15]
        best = native[0].argsort(descending=True)[[0, 3]]
        for changed, edits in zip(y[:, 2], ([small], [out, put], [out])):
            edited = model(tokens[3:], edits=edits)[0][0, 12:15]
            assert_close(changed, (edited - native)[:, best])


def test_agreement_by_hand():
    """y = 1, 2, 3 predicted as 1, 4, −1: R² = 1 − 20/2, slope 6/18, two signs of three right."""
    fit = writesae.agreement(torch.tensor([1.0, 2, 3]), torch.tensor([1.0, 4, -1]))
    assert fit == pytest.approx((-9, 1 / 3, 2 / 3))


def test_random_numbers_fit_over_sizes_whatever_is_linear_in_them():
    """By hand: sizes 1, 2 moved y by 3, 4, and 1, 2 was predicted: c = (3 + 8) / 5."""
    x, y = torch.tensor([[[1.0, 0], [2, 0]]]), torch.tensor([[[3.0, 5], [4, 5]]])
    assert_close(writesae.fitted_over_sizes(x, y), torch.tensor([[[2.2, 0], [4.4, 0]]]))
    sizes = torch.tensor(writesae.SIZES)[:, None]
    f, random = torch.randn(2, 5, 1, 7, generator=rng(6))  # 5 atoms, 7 passages
    y = sizes * f + sizes**2
    by_formula = writesae.fitted_over_sizes(sizes * f, y)  # bent: no better than random
    assert_close(writesae.fitted_over_sizes(sizes * random, y), by_formula)


# ---- 14. Steering ----
def test_the_formula_is_the_slope_where_norms_do_not_scale(monkeypatch):
    """In Mamba-2's last layer; and keys are as long as native writes, the last along its query."""
    model, tokens, target = tiny_model("mamba2"), random_tokens(0, 3, T=12), torch.tensor([7, 9, 3])
    p, heads = read_prompts(model, tokens), [(3, 1), (3, 6)]
    keys, formula = writesae.keys_and_formula(model, p, target, heads)
    stream, _ = model.run(model.embed(tokens), last=3)
    s = model.step_inputs(stream, 3).times(9).heads([1, 6])
    assert_close(keys.norm(dim=-1), s.k.norm(dim=-1) * s.v.norm(dim=-1))
    assert_close(F.normalize(keys[:, 2], dim=-1), F.normalize(s.q[:, 2], dim=-1))
    model.norm = torch.nn.Identity()
    monkeypatch.setattr(model.layers[3].mixer.norm, "scale", lambda u: torch.ones_like(u[..., :1]))
    x = torch.zeros_like(formula, requires_grad=True)
    logits, _ = read_edited(model, p, p.said[:, :0], x, heads, keys)
    (slope,) = torch.autograd.grad(logits[range(3), 0, target].sum(), x)
    assert_close(formula, slope, atol=1e-4, rtol=1e-3)


@EACH_KIND
def test_every_way_of_steering_ends_as_a_full_pass_with_edits(kind, monkeypatch):
    """Ascents give fixed numbers here. Heads may be named in any order."""
    def ascend(model, p, target, like, size, *where):
        return like + 1

    ends, heads = [], [(1, 0), (1, 2), (2, 1)]
    for name, x in dict(STATE_SIZES=(2.0,), INPUT_SIZES=(2.0,), ascend=ascend).items():
        monkeypatch.setattr(writesae, name, x)
    monkeypatch.setattr(writesae, "outcome", lambda m, p, t, *end: ends.append(end) or dict(x=t))
    model, tokens, target = tiny_model(kind), random_tokens(0, 3, T=12), torch.tensor([7, 20, 33])
    writesae.steer(model, tokens, target, heads[::-1], rng(5))
    keys, formula = writesae.keys_and_formula(model, read_prompts(model, tokens), target, heads)
    noise = torch.randn(formula.shape, generator=rng(5))
    full = [model(tokens), model(torch.cat([tokens, target[:, None]], 1))]
    for values in (noise, formula, noise + 1):
        edits = [Edit(layer, head, 9 + t, keys[:, t, c], sized(values, 2)[:, t, c])
                 for t in range(3) for c, (layer, head) in enumerate(heads)]
        full.append(model(tokens, edits=edits))
    (logits, native), (_, edited) = full[0], full[4]
    alone = tuple(dict(layer) for layer in native.layers)
    for i in model.recurrent_layers:
        alone[i]["state"] = edited.layers[i]["state"]
    full.append((logits, native._replace(layers=alone)))
    stream = model.embed(tokens)
    stream.x[:, 9:] += (stream.x[:, 9:] + 1) * stream.x[:, 9:].norm(dim=-1, keepdim=True)
    stream, cache = model.run(stream)
    full.append((model.unembed(stream), cache))
    for (ours, our_end), (theirs, their_end) in zip(ends, full, strict=True):
        assert_close(ours[:, -1], theirs[:, -1], atol=1e-3, rtol=1e-3)
        assert_close(our_end.layers, their_end.layers, atol=1e-3, rtol=1e-3)


def test_the_chance_of_a_memory_and_steps_of_an_ascent_by_hand(monkeypatch):
    """A target said at once or after an unedited token; steps along (3, 4), then half of (0, 5)."""
    def read(model, p, then, x):
        assert then is p.said  # all that is needed for twelve forced and twelve decoded
        return x, None

    def chance(x, said, target):
        slopes = torch.tensor([[3.0, 4.0], [0.0, 5.0]])
        return (x * slopes[int(x.any())]).sum((1, 2))

    monkeypatch.setattr(writesae, "FORCED", (1, 2))
    monkeypatch.setattr(writesae, "DECODED", 2)
    p = torch.tensor([[0.2, 0.3, 0.5], [0.1, 0.6, 0.3], [0.5, 0.1, 0.4], [0.25, 0.25, 0.5]])
    expected = (math.log(0.1 + 0.6 * 0.5) + math.log(0.5 + 0.4 * 0.25)) / 2
    found = log_chance(p.log()[None] + 7, torch.tensor([[0, 1, 2]]), torch.tensor([0]))
    assert found.item() == pytest.approx(expected)
    monkeypatch.setattr(writesae, "read_edited", read)
    monkeypatch.setattr(writesae, "log_chance", chance)
    x = ascend(None, Prompts(*range(5)), None, torch.ones(1, 1, 2), 2.0, steps=2)
    assert_close(x, 2 * F.normalize(torch.tensor([[[0.6, 1.3]]]), dim=-1))
    x = torch.tensor([[[3.0, 4.0], [0.0, 1.0]], [[0.0, 0.0], [0.0, 0.0]]])
    assert_close(sized(x, 2.0), x * 2 / 13**0.5)  # whatever the other prompt


def test_what_appears_persists_and_costs_by_full_passes():
    """One prompt, with every token as its target, and one edit of it."""
    model, prompt, target = tiny_model("rwkv7"), random_tokens(1, 1, T=12), torch.arange(61)
    edits = [Edit(1, 2, 10, torch.ones(8), 9 * torch.arange(6.0))]
    p, (logits, cache) = read_prompts(model, prompt), model(prompt, edits=edits)
    found = writesae.outcome(model, p, target, logits, cache)
    figures = writesae.steering_figures(found, target, rng(0))

    def go_on(text, n):
        for _ in range(n):
            logits, _ = model(text, edits=edits)
            text = torch.cat([text, logits[:, -1:].argmax(-1)], 1)
        return text[:, -n:]

    assert torch.equal(target[found["appears"]], go_on(prompt, 20).unique())
    after = {n: go_on(torch.cat([prompt, p.said[:, :n]], 1), 12) for n in (1, 4, 8, 12)}
    for n, hit, r in zip(after, found["persists"].T, figures["persists"], strict=True):
        assert torch.equal(target[hit], after[n].unique()), f"{n} forced"
        assert (r["forced"], r["rate"]) == (n, pytest.approx(hit.float().mean().item()))
        assert r["ci95"][0] < r["rate"] < r["ci95"][1]
    logits, _ = model(torch.cat([prompt, p.said[:, :1], after[1]], 1))
    nats = F.cross_entropy(logits[:, 12:-1].mT, after[1])
    assert_close(found["nats"], nats[None])
    assert figures["perplexity"] == pytest.approx(nats.exp().item(), rel=1e-4)
    two = writesae.steering_figures(found | dict(nats=torch.tensor([0.0, 2.0])), target, rng(0))
    assert two["perplexity"] == pytest.approx(math.e), "of all tokens together"
    new, old = (torch.cat([x["state"].flatten() for x in c.layers]) for c in (cache, p.after))
    assert_close(found["change"], ((new - old).norm() / old.norm())[None])


def test_targets_are_of_their_rank_and_stratum():
    logits = -torch.arange(1200.0)  # token i has rank i + 1
    texts = torch.tensor([[98, 0], [99, 0], [999, 1000], [1000, 1000]])
    pairs = writesae.draw_targets(lambda text: (logits[None, None], None), texts, rng(0))
    inside, absent = (pairs[:2, pairs[2] == stratum].T.tolist() for stratum in (0, 1))
    assert inside == [[1, 99], [2, 999]] and [prompt for prompt, _ in absent] == [0, 1, 2, 3]
    assert all(99 <= target <= 999 and target not in texts[prompt] for prompt, target in absent)


# ---- 15. Atoms ----
def test_atoms_are_described_by_where_they_fire():
    """Cosine 0.8 fires; 0.6, an opposite or no write do not. Three atoms: 6, 5 and 1 times."""
    sae = WriteSAE(torch.eye(4)[:3], torch.eye(3))  # atom i is e_i e_iᵀ
    passage = torch.tensor([0, 0, 1, 1, 1, 1, 1, 1, 1, 2, 2, 2])
    position = torch.tensor([14, 20, 3, 4, 5, 6, 7, 8, 9, 2, 13, 29])
    atom = torch.tensor([1, 1, 1, 0, 0, 0, 0, 0, 1, 1, 2, 1])
    tokens, k, v = torch.arange(90).view(3, 30), torch.zeros(3, 30, 4), torch.zeros(3, 30, 3)
    tokens[passage, position] = torch.tensor([7, 5, 7, 4, 4, 4, 4, 4, 7, 7, 9, 6])
    k[passage, position] = 0.8 * torch.eye(4)[atom] + torch.tensor([0, 0, 0, 0.6])
    v[passage, position] = 5 * torch.eye(3)[atom]
    k[0, :3], v[0, :3] = torch.tensor([[0, 0.6, 0, 0.8], [0, -2, 0, 0], [0] * 4]), torch.eye(3)[1]
    at = writesae.firings(sae, k.numpy(), v.numpy())
    assert_close(at, Firings(passage, position, atom, torch.full((12,), 4.0)))
    assert writesae.population(at, tokens) == pytest.approx((11 / 12, (4 / 6 + 1) / 2))
    found = writesae.describe(sae, k, v, tokens, str, file=torch.tensor([4, 4, 6]))
    contexts = ["[2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13]⟦[7]⟧[15, 16, 17, 18, 19, 5]",
                "[60, 61]⟦[7]⟧[63, 64, 65, 66, 67, 68]"]  # the first of each file
    assert found[0] == dict(atom=1, n_firings=6, n_files=2, token="[7]", token_share=4 / 6,
                            contexts=contexts)
    with pytest.raises(InputError, match="atom 1 never fires"):
        writesae.describe(sae, 0 * k, v, tokens, str, [1])


@EACH_KIND
def test_what_atoms_promote_and_what_their_edits_do_to_a_token(kind):
    """Changes by two full passes; promoted by the gated reads where an atom alone is written."""
    model, tokens, g = tiny_model(kind, 1), random_tokens(1, B=2, T=26), rng(1)
    layer, head, mixer = 1, 1, model.layers[1].mixer
    sae = WriteSAE(torch.randn(3, mixer.K, generator=g), torch.randn(3, mixer.V, generator=g))
    at = Firings(torch.tensor([1, 0, 1, 0, 1]), torch.tensor([9, 5, 26 - LATER, 9, 1]),
                 torch.tensor([2, 0, 2, 1, 0]), torch.tensor([0.5, 1.0, 2.0, 1.5, 0.8]))
    token, (key, value) = torch.tensor([3, 60, 0, 17, 17]), sae.decode(at.atom, at.a)
    got = writesae.token_change(model, layer, head, tokens, at, token, key, value)
    stream, _ = model.run(model.embed(tokens), last=layer)
    s, rest, _ = model.layers[layer].inputs(stream, {})
    gate, total = mixer.gate_and_scale(s.v, rest)[0], torch.zeros(3, mixer.V)
    for i, (row, t) in enumerate(zip(at.passage.tolist(), at.position.tolist())):
        edit = Edit(layer, head, t, key[i], value[i])
        native, edited = (model(tokens[[row]], edits=e)[0].log_softmax(-1) for e in ([], [edit]))
        change = (edited - native)[0, t : t + LATER, token[i]].mean()
        assert_close(got[i], change, atol=1e-5, rtol=1e-3)
        alone = s._replace(k=torch.zeros_like(s.k), v=torch.zeros_like(s.v))
        alone.k[row, t, head], alone.v[row, t, head] = key[i], value[i]
        o, _ = recurrence(alone)
        total[at.atom[i]] += (gate * o)[row, t : t + LATER, head].mean(0)
    expected = (total @ model.out_map(layer)[:, head].T @ model.unembedding.T).argmax(-1)
    assert len(expected.unique()) == 3, "chosen such that the three differ"
    assert torch.equal(writesae.promoted_tokens(model, layer, head, tokens, sae, at), expected)


def atoms_run(monkeypatch):
    """28 files of two passages. Edits and the formula are stand-ins that keep what they get."""
    reader = Namespace(model=tiny_model("gdn"), tokens=random_tokens(0, 56, run.PASSAGE),
                       file=torch.arange(56) // 2 + 7, tokenizer=Namespace(decode=str),
                       args=Namespace(atoms=64, seed=0, quick=True))
    cell, calls = run.Cell(reader, 1, 0), []
    cell.writes = tuple(x.flatten(0, 1) for x in cell.tested_writes(slice(None)))
    cell.learned = untrained(*cell.writes, 64, rng(1))

    def stand_in(model, layer, head, tokens, *given):
        calls.append(given)
        if len(calls) == 1:
            return torch.arange(64) % 5  # what atoms promote
        return (len(calls) - 1) * (1 + given[0].passage.float())

    monkeypatch.setattr(writesae, "promoted_tokens", stand_in)
    monkeypatch.setattr(writesae, "token_change", stand_in)
    return cell, calls, *run.atoms(cell)


def test_atoms_are_named_in_half_of_the_files_edited_in_the_other_and_pictured(monkeypatch):
    """Taken out, or added where they do not fire; beside random matrices as large."""
    cell, calls, results, _, (_, pictures) = atoms_run(monkeypatch)
    (_, named), removed, removed_random, added, added_random = calls
    at, token, key, value = removed
    index, _ = cell.learned.encode(*cell.tested_writes(slice(None)))
    for here, half, fires in ((named, 1, True), (at, 0, True), (added[0], 0, False)):
        assert (cell.file[here.passage] % 2 == half).all()
        assert ((index[here.passage, here.position] == here.atom) == fires).all()
        assert here.position.min() >= 32 and here.position.max() <= 128 - LATER
    assert torch.equal(token, at.atom % 5)
    assert_close((-key, value), cell.learned.decode(at.atom, at.a))
    assert_close(added[2:], (-key, value))
    assert_close(added_random[2:], (-removed_random[2], removed_random[3]))
    assert_close(outer(*added_random[2:]).norm(dim=(1, 2)), outer(key, value).norm(dim=(1, 2)))
    assert F.cosine_similarity(added_random[2], key).abs().mean() < 0.6, "a random direction"
    for r in [results[0]["population"], *results]:  # of all atoms, of each
        for name, number, here in (("removed", 1, at), ("added", 3, added[0])):
            passage, ci95 = here.passage[at.atom == r.get("atom", at.atom)], r[name + "_ci95"]
            mean = 1 + passage.double().mean().item()
            assert r[name] == pytest.approx(number * mean)
            assert r[name + "_random"] == pytest.approx((number + 1) * mean)
            few = len(cell.file[passage].unique()) < 10
            assert ci95 is None if few else ci95[0] < r[name] < ci95[1]
    assert [r["promoted"] for r in results] == [str([r["atom"] % 5]) for r in results]
    many = Firings(torch.arange(100), torch.arange(100), torch.zeros(100), torch.ones(100))
    assert run.few(many, many.a > 0, [0], 3).passage.tolist() == [0, 49, 99], "spread evenly"
    before, after, write, atom, difference = pictures[0].values()
    assert F.cosine_similarity(atom.flatten(), write.flatten(), dim=0) >= writesae.COVERED
    assert_close(write - atom, difference)
    writes = outer(*cell.tested_writes(slice(None)))
    passage, t = divmod(int((writes - write).abs().amax((2, 3)).argmin()), run.PASSAGE)
    for state, n in ((before, t), (after, t + 1)):
        _, cache = cell.model(cell.tokens[passage : passage + 1, :n])
        assert_close(state, cache.layers[1]["state"][0, 0], atol=1e-4, rtol=1e-3)


# ---- 16. Text, and pretraining on it ----
def test_text_is_split_by_file_and_nothing_tested_stands_in_training_text(tmp_path):
    """Held out is a name whose hash begins with a byte below 26: 573.txt (25), not 59.txt (26)."""
    def choose(text=None, train_text=None):
        return run.choose_text(Namespace(text=text and str(text), train_text=train_text))

    for i in (*range(40), 59, 573):
        (tmp_path / f"{i}.txt").write_text(f"passage {i}")
    _, held = choose(train_text=str(tmp_path))
    assert list(held) == [f"{i}.txt" for i in (1, 18, 20, 27, 39, 573)]
    everything, tested = choose(tmp_path / "7.txt", str(tmp_path))  # nothing need be held out
    assert len(everything) == 42 and tested == {"7.txt": "passage 7"}
    for name in ("0.txt", "1.txt"):  # of one file all is for training, or all is held out
        with pytest.raises(InputError, match="of 1 files are held out .* give --text"):
            choose(train_text=str(tmp_path / name))
    training, held = choose()  # Python's
    assert choose(tmp_path / "7.txt") == (training, tested)
    tokenizer = load_tokenizer(load(HERE / "checkpoints/gdn"))
    tokens, file = run.tested_windows(tokenizer, training, held, 30, 128)
    everything, own = "\n".join(training.values()), list(held.values())
    for row, i in zip(tokens.tolist(), file.tolist()):
        passage = tokenizer.decode(row).strip("\ufffd")
        assert passage in own[i] and passage not in everything
    assert "os.py" in training and len(file.unique()) > 10
    assert run.text_hash({"a": "b", "c": "d"}) == "cf92326f85f5"  # printf 'a\0b\0c\0d' | sha256sum


def test_of_a_folder_only_text_is_read(tmp_path, monkeypatch, capsys):
    contents = {"a": b"a", "sub/b": "\ufeffγράμμα\r\n".encode(), ".git/config": b"hidden",
                "latin": b"\xe9", "binary": b"a\0b", "sparse": b""}  # b as Windows writes it
    for name, content in contents.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    for name, target in dict(c="a", loop=tmp_path, dangling="nowhere", zero="/dev/zero").items():
        (tmp_path / name).symlink_to(target)
    os.truncate(tmp_path / "sparse", 50 * 10**9)
    os.mkfifo(tmp_path / "pipe")
    texts = [("a", "a"), ("c", "a"), ("sub/b", "γράμμα\n")]
    assert list(run.read_files(str(tmp_path)).items()) == texts
    assert "6 files left out, such as" in capsys.readouterr().err
    for name in ("pipe", "dangling", "zero", "latin", "binary", "sparse", "missing"):
        with pytest.raises(InputError, match=f"{name}: .*; give UTF-8 text, 100 MB at most"):
            run.read_files(str(tmp_path / name))
    monkeypatch.setattr(run, "MOST_BYTES", 18)  # of all files together: sub/b has 17
    assert list(run.read_files(str(tmp_path))) == ["a", "c"]


def test_windows_and_copies_by_hand():
    """Training windows begin at letters 0, 6, 12, 18, 24 of a ring; tested ones are no copies."""
    def numbers(text: str) -> list[int]:
        return [int(word) for word in text.split()]

    tokenizer = models.Tokenizer(numbers, str)  # a number is a token
    tokens = run.windows(tokenizer, {"a": "1 2 3 4 5 6 7 8 9 0", "b": "1111 2222 3"}, 5, 3)
    assert tokens.tolist() == [[1, 2, 3], [4, 5, 6], [7, 8, 9], [0, 1111, 2222], [2222, 3, 1]]
    (long,) = run.windows(tokenizer, {"a": "1111 2222 3333 4444"}, 1, 3).tolist()
    assert long == [1111, 2222, 3333], "the last token is whole"
    for text in ("1 2 3 4", ""):
        with pytest.raises(InputError, match=f"has {len(numbers(text))} tokens, a window needs 5"):
            run.windows(tokenizer, {"a": text}, 3, 5)
    training = "a = 1\nb = 2\nc = 3\nOne long line of much text\n\nand one more, as [7, 8]"
    lines = set(training.splitlines())
    for passage in ("ff\na = 1\nb = 2\na = 1\nc =", "long line of much", "much text\n\nand one"):
        assert run.copied(passage, lines, training)
    for passage in ("ff\na = 1\nx = 2\nb = 2\nc =", "long lines of much", "text\n\nand two"):
        assert not run.copied(passage, lines, training)
    tested = dict(a="1 2 3 4 5 6 7 8 9 10", b="11 12 13 14 15", none="16", c="17 18 19")
    tokens, file = run.tested_windows(tokenizer, {"t": training}, tested, 3, 2)
    assert tokens.tolist() == [[1, 2], [9, 10], [17, 18]] and file.tolist() == [0, 0, 3]
    with pytest.raises(InputError, match="8 passages of 2 tokens are needed; of 8 .* 7 are no cop"):
        run.tested_windows(tokenizer, {"t": training}, tested, 8, 2)


@pytest.mark.parametrize("kind, golden", [("gdn", 3.8730), ("mamba2", 4.1229), ("rwkv7", 4.2327)])
def test_pretraining_gives_a_model_and_its_figure(tmp_path, monkeypatch, kind, golden):
    """Bits per byte by hand: nats of held-out tokens, after 16 or more, over the text's bytes."""
    monkeypatch.syspath_prepend(HERE / "checkpoints")
    import pretrain

    for knob, value in dict(CONTEXT=32, BATCH=2, HERE=str(tmp_path)).items():
        monkeypatch.setattr(pretrain, knob, value)
    (tmp_path / kind).mkdir()
    (tmp_path / kind / CONFIG).write_text(json.dumps(tiny_config(kind, vocab=300)))
    lines = [f"    y{i % 7} = f{i}(x{i}) + {i * i % 89}  # γράμμα\n" for i in range(250)]
    files = {"a": "".join(lines[:100]), "b": "".join(lines[100:200])}
    held = {"c": "".join(lines[200:225]), "d": "".join(lines[225:])}
    folder = tmp_path / "out"
    pretrain.pretrain(kind, str(folder), (files, held), tokens=256, seed=1)
    model = load(folder)
    encode = load_tokenizer(model).encode
    ids = torch.tensor([i for text in held.values() for i in [0, *encode(text)]])
    windows = ids.unfold(0, 33, 16)
    logits, _ = model(windows[:, :-1])
    nats = F.cross_entropy(logits[:, 16:].mT, windows[:, 17:]).item()
    bits = nats / math.log(2) * len(ids) / len("".join(held.values()).encode())
    how = models.read_json(str(folder / CONFIG))["pretraining"]
    assert how == dict(steps=4, tokens=256, held_out_bits_per_byte=pytest.approx(bits, abs=1e-4))
    assert bits == pytest.approx(golden, rel=2e-3)
    both = pretrain.optimisers(model.requires_grad_())
    pretrain.train_step(model, both, windows[:2], 190, 200)
    assert both[1].param_groups[0]["lr"] == pytest.approx(1.2e-2 * 10 / 180), "falls"
    with pytest.raises(InputError, match="holds a model"):
        pretrain.pretrain(kind, str(folder), (files, held), tokens=256)


# ---- 17. Assignments as folders ----
def test_every_assignment_is_emptied_and_its_tests_need_little(tmp_path):
    folder = tmp_path / "hw"
    assert run.main(["assignment", *run.ASSIGNMENTS, "--out", str(folder)]) == 0
    assert list(tmp_path.iterdir()) == [folder], "no temporary folder stays"
    names = ["README.md", "models.py", "test_assignment.py", "writesae.py"]
    assert sorted(path.name for path in folder.iterdir()) == names
    text = (folder / "test_assignment.py").read_text("utf-8")
    for word in ("tokenizers", "transformers", "import run", "test_writesae"):
        assert word not in text
    assert "\ntorch.set_num_threads(1)" in text
    for name, (function, file, _) in run.ASSIGNMENTS.items():
        assert f"def test_{name}_" in text, name
        node = ast.parse((folder / file).read_text("utf-8"))
        for part in function.split("."):
            (node,) = (x for x in node.body if getattr(x, "name", "") == part)
        assert ast.unparse(node.body[1:]) == f"raise NotImplementedError('write {name}')"
        assert len(ast.get_docstring(node)) > 60


def test_an_assignment_has_its_tests_alone_and_they_fail_until_it_is_written(tmp_path):
    """Two, of which one is written: kl_divergence."""
    assert run.main(["assignment", "encode", "kl_divergence", "--out", str(tmp_path)]) == 0
    ours = (HERE / "writesae.py").read_text("utf-8")
    assert (tmp_path / "models.py").read_text("utf-8") == (HERE / "models.py").read_text("utf-8")
    listed = (tmp_path / "README.md").read_text("utf-8")
    assert "WriteSAE.encode in writesae.py, about 15 minutes" in listed
    (tmp_path / "writesae.py").write_text(run.emptied(ours, "encode"), "utf-8")
    command = [sys.executable, "-m", "pytest", "-q", "--tb=line", "-p", "no:cacheprovider"]
    out = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True).stdout
    assert "NotImplementedError: write encode" in out, out
    assert "2 failed, 2 passed" in out and "FAILED test_assignment.py::test_kl" not in out, out


def test_an_assignment_is_made_whole_or_not_at_all(tmp_path, monkeypatch):
    written = []

    def full_disk(path, *args):
        written.append(path)
        if len(written) == 3:
            raise OSError("no space left")

    monkeypatch.setattr(Path, "write_text", full_disk)
    assert run.main(["assignment", "encode", "--out", str(tmp_path / "new")]) == 2
    assert list(tmp_path.iterdir()) == [] and len(written) == 3


# ---- 18. The commands, each with --quick, on a text that is written here ----
def made_up_files(folder: Path) -> Path:
    """Write 150 files of made-up code; about one in ten is held out, by its name."""
    words = random.Random(0)
    names = ["".join(words.choices("abcdefgilmnoprstu", k=words.randint(2, 9))) for _ in range(300)]
    for i in range(150):
        lines = []
        for _ in range(40):
            a, b, c = words.choices(names, k=3)
            forms = (f"def {a}({b}, {c}=None):", f"    {a} = {b}.{c}({words.randint(0, 99)})",
                     f"    return {a}[{b}] + {c}", f"    for {a} in {b}: {c} += 1",
                     f"# {a} {b} {c}")
            lines.append(words.choice(forms))
        folder.joinpath(f"{i}.py").write_text("\n".join(lines), "utf-8")
    return folder


@pytest.fixture(scope="session")
def text(tmp_path_factory) -> Path:
    return made_up_files(tmp_path_factory.mktemp("text"))


def names_in(x, under="") -> set[str]:
    """Name every key in a JSON value, after those that it stands under."""
    if isinstance(x, list):
        return set().union(*(names_in(y, under) for y in x))
    if not isinstance(x, dict):
        return set()
    here = {name: f"{under}.{name}" for name in x}
    return set(here.values()).union(*(names_in(x[name], path) for name, path in here.items()))


def quick(tmp_path, command: str, like: str) -> list[dict]:
    """Run a command with --quick; its JSON has the keys of the shipped results `like`."""
    out = tmp_path / "out.json"
    words = shlex.split(command)
    assert run.main([*words, "--quick", "--json", str(out)]) == 0
    assert sorted(p.name for p in tmp_path.iterdir() if p.suffix == ".part") == []
    results = json.loads(out.read_text("utf-8"))
    shipped = json.loads(text_of(f"figures/{like}.json"))
    assert names_in(results) == names_in(shipped), "the keys of the shipped results"
    return results


def flat(x) -> list[float]:
    """List all numbers in a JSON value, in order."""
    if isinstance(x, dict):
        return [y for name in x if name not in ("seconds", "sae") for y in flat(x[name])]
    if isinstance(x, list):
        return [z for y in x for z in flat(y)]
    return [x] if isinstance(x, (int, float)) else []


GOLDEN = {  # figures of quick runs, made once and looked at
    "gdn": [1.0006, 0, 0.7989, 0, 0.3045, 0.2, 0.6841, 0, 0.285, 0.25, 0.2773, 0.1],
    "mamba2": [1.0005, 0, 0.8755, 0.3, 0.2769, 0.5, 0.5196, 0.3, 0.2603, 0.5, 0.215, 0.2667],
    "rwkv7": [1.0025, 0, 0.7771, 0.3, 0.1464, 0.55, 0.6968, 0.3, 0.4254, 0.5, 0.4247, 0.3167],
    "formula": [0.0781, 0.3676, 1, 1, 0.9784, 0.9784],
    "atoms": [20, -0.0075, -0.0002, 0.0037],
}


@EACH_KIND
def test_replace_gives_the_figures_that_it_gave(tmp_path, text, kind, monkeypatch):
    """The split, the seed, the defaults and every step up to the figures are in them."""
    tried, effects = {}, run.Cell.effects

    def watched(cell, positions, stand_ins):
        tried.update(stand_ins)
        return effects(cell, positions, stand_ins)

    monkeypatch.setattr(run.Cell, "effects", watched)
    command = f"replace --model {kind} --train-text {text} --passages 4 --atoms 64 --seed 1"
    (r,) = quick(tmp_path, command, "replace")
    names = ["nothing", "random direction", "random writes", "learned", "random writes by reads",
             "learned by reads", "as near"]
    assert [row["name"] for row in r["rows"]] == names
    figures = [x for row in r["rows"][1:] for x in (row["left"], row["covered"])]
    assert figures == pytest.approx(GOLDEN[kind], abs=2e-3)
    atom = (x[:, ::4] for x in tried["learned by reads"])
    assert cosine(*tried["another"], *atom).max() < 0.999, "another atom is another one"


@pytest.mark.parametrize("command", ["formula", "atoms"])
def test_other_commands_give_the_figures_that_they_gave(tmp_path, text, command):
    more = f"--model rwkv7 --train-text {text} --passages 12 --atoms 64 --seed 1"
    plot = f"--plot {tmp_path}/r.png" if command == "atoms" else ""
    (r, *_) = quick(tmp_path, f"{command} {more} {plot}", command)
    assert not plot or (tmp_path / "r.png").read_bytes().startswith(b"\x89PNG")
    if command == "formula":
        figures = [rung["r2_small"] for rung in r["rungs"][3:]]
    else:
        figures = [r[name] for name in ("n_firings", "removed", "removed_random", "added")]
    assert figures == pytest.approx(GOLDEN[command], abs=2e-3)


def test_two_processes_and_one_give_the_same_and_dictionaries_are_kept(tmp_path, text):
    """torchrun shares cells out; --sae FOLDER keeps what is learned, and is used again."""
    options = f"--model gdn --layer all --quick --atoms 32 --train-text {text}"
    results, place = [], tmp_path / "saes"
    place.mkdir()
    for launcher in ("-m torch.distributed.run --nproc-per-node 2", ""):
        out = tmp_path / f"{len(results)}.json"
        words = [sys.executable, *launcher.split(), HERE / "run.py", "replace", *options.split()]
        words += ["--passages", "4", "--json", out, "--sae", place]
        how = dict(capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        done = subprocess.run(words, **how)
        assert done.returncode == 0, done.stderr[-2000:]
        assert done.stdout.count("\n  as near") == 3, "a row for each cell"
        results.append([r | dict(seconds=0) for r in json.loads(out.read_text())])
    assert [r["layer"] for r in results[0]] == [0, 1, 2]
    assert flat(results[0]) == pytest.approx(flat(results[1]), abs=1e-5)
    kept = sorted(place.iterdir())
    assert [f.name for f in kept] == [f"gdn-L{i}H0.safetensors" for i in range(3)]
    about = WriteSAE.load(str(kept[1])).about
    assert (about["layer"], about["head"], about["atoms"], about["quick"]) == (1, 0, 32, True)
    before = [f.stat().st_mtime_ns for f in kept]
    kept[2].unlink()
    assert run.main(["train", *options.split(), "--sae", str(place)]) == 0
    after = [f.stat().st_mtime_ns for f in kept]
    assert [i for i in range(3) if before[i] != after[i]] == [2], "goes on where it was stopped"


def test_a_dictionary_of_something_else_is_refused(tmp_path, text, capsys):
    path = tmp_path / "a.safetensors"
    command = f"train --model gdn --quick --atoms 16 --train-text {text} --sae {path}"
    assert run.main(command.split()) == 0
    assert run.main(f"{command} --seed 3".split()) == 0
    assert "seed is 0, here it is 3" in capsys.readouterr().err
    for other, message in (("--head 1", "head is 0, here it is 1"), ("--layer 2", "layer is 1"),
                           ("--model mamba2", "model is "), ("--atoms 17", "atoms is 16")):
        assert run.main(f"{command} {other}".split()) == 2
        error = capsys.readouterr().err
        assert message in error and "leave --sae out" in error, error


def test_one_cell_that_fails_is_named_and_the_others_are_kept(tmp_path, text, capsys, monkeypatch):
    def measure(cell):
        """legend"""
        if cell.head == 1:
            raise RuntimeError("CUDA out of memory")
        return [dict(x=cell.head, y=math.nan)], [f"line {cell.head}"], None

    options = run.COMMANDS["replace"].options
    monkeypatch.setitem(run.COMMANDS, "replace", run.Command(measure, options, "heading"))
    out = tmp_path / "x.json"
    command = f"replace --model gdn --head all --quick --train-text {text} --json {out}"
    assert run.main(command.split()) == 2
    said = capsys.readouterr()
    assert said.out.splitlines() == ["legend", "", "heading", "line 0", "line 2", "line 3"]
    assert said.err.count("error: gdn L1H1: CUDA out of memory") == 1
    results = json.loads(out.read_text())
    assert [r["x"] for r in results] == [0, 2, 3] and results[0]["y"] is None


def test_every_purpose_and_cell_has_draws_of_its_own():
    reader = Namespace(args=run.parse(["replace", "--seed", "5"]), tokens=None, file=None)
    reader.model = Namespace(name="m")
    numbers = set()
    for layer, head, seed, purpose in itertools.product((0, 1), (0, 1), (5, 6), "ab"):
        reader.args.seed = seed
        cell = run.Cell(reader, layer, head)
        first, again = (torch.rand(1, generator=cell.rng(purpose)).item() for _ in range(2))
        assert first == again
        numbers.add(first)
    assert len(numbers) == 16


# ---- 19. Wrong commands: one line, status 2, nothing written ----
WRONG_COMMANDS = {  # a command line -> what its one line of error says
    "replace --model gdn --layer 3": "full attention.*recurrent layers: 0, 1, 2",
    "replace --model gdn --layer first": "whole numbers",
    "replace --model gdn --head 4": "heads 0..3",
    "replace --model gdn --text SHORT": "passages of 128 tokens",
    "replace --model gdn --text FOLDER": "holds no file",
    "replace --model gdn --quick --sae SHORT": "neither a folder nor a hub id",
    "replace --model gdn --quick --sae short.safetensors": "short.safetensors",
    "replace --model gdn --quick --json no-such-folder/x.json": "no-such-folder",
    "replace --model no/such": "no/such",
    "replace --device abacus": "abacus",
    "replace --passages 0": "from 1",
    "replace --atoms 1000000000000": "whole numbers",
    "replace --atoms 999999999 --model gdn --quick --passages 3": "999999999 atoms from",
    "replace --what sizes": "unrecognized arguments: --what",
    "atoms --model gdn --quick --plot /dev/null": "/dev/null",
    "compare --what active --plot x.png": "--plot draws sizes",
    "steer --model gdn --prompt 'def f' --target 'not one token'": "one token",
    "steer --model gdn --prompt 'def f(x): return'": "--target",
    "steer --model gdn --head all": "head",
    "train --model gdn": "--sae",
    "train --model gdn --head all --sae x.safetensors": "one",
    "assignment": "allowed are one or more of recurrence",
    "assignment encode decode --out new": "assignments decode: allowed are",
    "assignment encode": "--out FOLDER",
    "assignment encode --out .": "is there already",
    "assignment encode --out nowhere/new": "cannot be made a folder",
    "dance": "invalid choice",
}


@pytest.mark.parametrize("command", WRONG_COMMANDS)
def test_a_wrong_command_ends_in_one_line(tmp_path, capsys, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "SHORT").write_text("too short")
    (tmp_path / "short.safetensors").write_text("too short")
    (tmp_path / "FOLDER").mkdir()
    assert run.main(shlex.split(command)) == 2
    errors = re.findall("^error: .*", capsys.readouterr().err, re.M)
    assert len(errors) == 1 and re.search(WRONG_COMMANDS[command], errors[0]), errors
    assert sorted(os.listdir(tmp_path)) == ["FOLDER", "SHORT", "short.safetensors"]


def test_a_reader_that_has_gone_and_a_full_disk_get_no_traceback():
    words = [sys.executable, HERE / "run.py", "assignment", "--list"]
    with open("/dev/full", "w") as full:
        for out, status, said in ((subprocess.PIPE, 1, b""), (full, 2, b"error: stdout")):
            with subprocess.Popen(words, stdout=out, stderr=subprocess.PIPE) as process:
                if out is subprocess.PIPE:
                    process.stdout.close()
                error = process.stderr.read()
            assert b"Traceback" not in error and error.startswith(said)
            assert process.returncode == status


# ---- 20. The README, and the docstrings ----
def blocks(kind: str) -> list[str]:
    """List the README's blocks: of python, or of what is printed or typed."""
    return re.findall(rf"```{kind}\n(.*?)```", text_of("README.md"), re.S)


def test_the_readmes_python_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(HERE)
    names = {}
    for block in blocks("python"):
        block = block.replace("n=40", "n=6").replace("1024", "128")  # the same, but quicker
        exec(block, names)
    printed = capsys.readouterr().out.splitlines()
    effects = [[float(x) for x in re.findall(r"nothing +([\d.]+) .* atom +([\d.]+)", line)[0]]
               for line in printed if "nothing" in line]
    assert len(effects) > 5 and sum(a < b for b, a in effects) > len(effects) / 2
    assert names["S"].shape == (1, names["tokens"].shape[1], 4, 32, 32)
    assert names["logits"].isfinite().all()


def test_the_readmes_commands_parse_and_what_it_names_exists(monkeypatch):
    monkeypatch.chdir(HERE)
    page = text_of("README.md") + text_of("figures/README.md")
    commands = re.findall(r"^(?:torchrun .*?run|python run)\.py (.*?)(?:\s+#.*)?$", page, re.M)
    commands += re.findall(r"`python run\.py ([^`]+)`", page)
    for command in {x for x in commands if "NAME" not in x and "bd2b35e" not in x}:
        monkeypatch.setattr(models, "check_writable", print)
        run.parse(shlex.split(command))
    assert len(commands) >= 10
    modules = dict(models=models, writesae=writesae, run=run)
    for module, name in re.findall(r"`(models|writesae|run)\.(\w+)", text_of("README.md")):
        assert name == "py" or hasattr(modules[module], name), f"{module}.{name}"
    for picture in re.findall(r"\]\((figures/[\w-]+\.\w+)\)", page.replace("](", "](figures/")):
        assert (HERE / picture.replace("figures/figures/", "figures/")).exists(), picture


def test_the_readme_is_short_and_its_numbers_are_measured():
    """Numbers of its prose are in figures/ or listed below; its table is what was printed."""
    page = text_of("README.md")
    assert len(page.splitlines()) <= 130 and max(map(len, page.splitlines())) <= 100
    table = next(block for block in blocks("") if "as near" in block)
    for line in table.splitlines():
        assert line in text_of("figures/replace.txt").splitlines(), line
    prose = re.sub(r"```.*?```|`[^`]*`|\(http[^)]*\)|arXiv [\d.]+", "", page, flags=re.S)
    names = r"Mamba-2|RWKV-7|Qwen3\.5|^\d\. |exercise \d|§\d|eq\. \d+"
    prose = re.sub(names, "", prose, flags=re.M)
    assert len(prose.split()) <= 1300
    numbers = re.findall(r"\d[\d,.]*\d|\d", prose)
    assert len(numbers) <= 60
    assert not [x for x in numbers if x not in {*GIVEN, *said_in_figures()}]


GIVEN = "15 20 30 2,048 0.98 4.5".split()  # minutes, atoms, the paper's R², GB


def said_in_figures() -> set[str]:
    """Write what the README says of gdn, and the range of what learning is worth, as it says it."""
    def gdn(name: str, **where) -> dict:
        rows = json.loads(text_of(f"figures/{name}.json"))
        return [r for r in rows if r["model"] == "gdn" and where.items() <= r.items()][0]

    left = {row["name"]: row["left"] for row in gdn("replace")["rows"]}
    names = "learned by reads", "as near", "random writes", "random writes by reads"
    said = {f"{left[name]:.3f}" for name in names}
    sizes = json.loads(text_of("figures/compare-sizes.json"))
    worth = [r["worth_left"] for r in sizes if r["trained"] and r["n_atoms"] == 2048]
    said |= {f"{min(worth):.1f}", f"{max(worth):.1f}"}
    said |= {f"{rung['r2_small']:.2f}" for rung in gdn("formula")["rungs"] if rung["fitted"]}
    for kind, size in (("memory", 0.5), ("residual", 2.0)):
        row = gdn("steer", kind=kind, size=size, target="absent")
        said.add(f"{100 * row['persists'][1]['rate']:.0f}")
    return said


def test_every_function_has_a_docstring_and_its_example_holds():
    for module in (models, writesae, run):
        for node in ast.walk(ast.parse(text_of(f"{module.__name__}.py"))):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.col_offset == 0:
                assert ast.get_docstring(node), node.name
        assert doctest.testmod(module).failed == 0
