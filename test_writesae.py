"""What models.py, writesae.py and run.py promise, as tests. CPU only, no network; every shape has
K ≠ V, because square heads hide transposed ones."""

import ast
import doctest
import functools
import inspect
import json
import math
import os
import random
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

# before imports
os.environ |= {"RWKV_V7_ON": "1", "RWKV_JIT_ON": "0"}
os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings, strategies as st
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

import models
import run
import writesae
from models import Block, ChannelMix, Edit, InputError, LanguageModel, RWKV7, StepInputs, load
from models import load_tokenizer, propagate, recurrence, recurrence_chunked, states
from writesae import Cell, Factored, Steering, WriteSAE, fit_alternating, fit_gradient, inner
from writesae import matrix_of, replacement, write_of

how = dict(derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
settings.register_profile("here", max_examples=25, **how)
settings.load_profile("here")
torch.set_num_threads(1)  # everything here is tiny: a second thread only waits
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # of rwkv
ARCHITECTURES = ("gdn", "mamba2", "rwkv7")
EACH_KIND = pytest.mark.parametrize("kind", ARCHITECTURES)
KIND = st.sampled_from(ARCHITECTURES)
SEED = st.integers(0, 99)
SIZE = st.integers(1, 9)
HERE = Path(__file__).resolve().parent


def rng(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def text_of(path: str) -> str:
    return (HERE / path).read_text("utf-8")


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


def tiny_config(kind: str, vocab=61, **changes) -> dict:
    """A small hub config of the architecture."""
    c = dict(vocab_size=vocab, hidden_size=32, num_hidden_layers=4, model_type=kind)
    if kind == "gdn":
        rope = dict(rope_type="default", rope_theta=10000.0, partial_rotary_factor=0.5)
        c |= dict(model_type="qwen3_5_text", rope_parameters=rope, tie_word_embeddings=True)
        c |= dict(
            intermediate_size=40,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            linear_num_key_heads=2,
            linear_num_value_heads=4,
            linear_key_head_dim=8,
            linear_value_head_dim=6,
        )
    elif kind == "mamba2":
        c |= dict(num_heads=8, head_dim=8, state_size=12, n_groups=2, expand=2, chunk_size=16)
    else:
        c |= dict(
            hidden_size=128,
            head_dim=64,
            intermediate_size=96,
            norm_eps=1e-5,
            decay_low_rank_dim=8,
            a_low_rank_dim=6,
            v_low_rank_dim=5,
            gate_low_rank_dim=7,
        )
    return c | changes


def shake(model: torch.nn.Module, seed: int):
    """Random weights that leave no part of the model idle."""
    g = rng(seed)
    for p in model.requires_grad_(False).parameters():
        size = 0.3 if p.dim() == 1 else 0.6 * p.shape[-1] ** -0.5
        p += size * torch.randn(p.shape, generator=g)
    return model


def tiny_model(kind: str, seed: int = 0) -> LanguageModel:
    """A small random model, K ≠ V (RWKV-7's class allows it, its checkpoints have K = V)."""
    torch.manual_seed(seed)
    if kind != "rwkv7":
        return shake(models.build(tiny_config(kind)), seed)
    blocks = []
    norm = torch.nn.LayerNorm
    ranks = dict(w=4, a=4, v=3, g=5)
    for i in range(3):
        mixer = RWKV7(32, 4, 8, 6, ranks, i == 0, 1e-4)
        blocks.append(Block(mixer, norm(32), ChannelMix(32, 48), norm(32)))
    model = LanguageModel("rwkv7", 61, 32, blocks, norm(32), norm(32), tied=False)
    return shake(model, seed)


def written(result, returns: str):
    """A function's result; if its body was emptied, what it should return."""
    assert result is not None, f"not written yet? It returns {returns}"
    return result


def sides(X: Factored):
    """The keys [N, K] and values [N, V] of writes."""
    return X.keys[:, 0], X.values[:, 0]


def rows_of(table: dict) -> list[tuple]:
    return list(zip(*(x.tolist() for x in table.values())))


def assert_figures(figures: dict, **expected):
    for name, x in expected.items():
        assert figures[name] == pytest.approx(x), name


def assert_columns(table: dict, expected: dict, **tolerance):
    for name, x in expected.items():
        assert_close(table[name], x, msg=name, **tolerance)


def random_tokens(seed: int, B=2, T=40, vocab=61) -> torch.Tensor:
    return torch.randint(vocab, (B, T), generator=rng(seed))


# --------------------------------------------------------------------------------------------------
# The recurrence
# --------------------------------------------------------------------------------------------------
def test_recurrence_of_two_tokens_by_hand():
    """S_1 = k_1 v_1ᵀ; S_2 halves it, takes out what lies along k_1, and writes k_2 v_2ᵀ."""

    def one(*rows):  # [T, ·] -> [1, T, 1, ·]
        return torch.tensor(rows, dtype=torch.float32)[None, :, None]

    writes = dict(k=one([1, 0], [0, 1]), v=one([2, 4, 6], [1, 0, 1]))
    erases = dict(erase_in=one([0, 0], [1, 0]), erase_out=one([0, 0], [0.25, 0]))
    decay = one([0], [math.log(0.5)])
    s = StepInputs(q=one([1, 0], [1, 1]), log_decay=decay, **writes, **erases)
    o, S = written(recurrence(s), "the reads o [B, T, H, V] and the last state [B, H, K, V]")
    assert o[0, 0, 0].tolist() == [2, 4, 6], "the first token reads what it has just written"
    # 0.5 S − (0.25, 0)ᵀ (2, 4, 6) = [[0.5, 1, 1.5], [0, 0, 0]], plus [[0, 0, 0], [1, 0, 1]]
    expected = torch.tensor([[0.5, 1, 1.5], [1, 0, 1]])
    assert_close(S[0, 0], expected, msg="did you forget to decay before you write?")
    read = torch.tensor([1.5, 1, 2.5])
    assert_close(o[0, 1, 0], read, msg="reads come after the write: o = Sᵀq")


def close(a: torch.Tensor, b: torch.Tensor, hint: str, atol=1e-4):
    """Equal up to rounding; if not, PyTorch's message and a guess at the mistake."""

    def explain(message: str) -> str:
        return f"{message}\n{hint}"

    assert_close(a, b, atol=atol * max(1.0, b.abs().max().item()), rtol=1e-4, msg=explain)


@given(KIND, SEED, st.integers(1, 70), SIZE, SIZE, st.integers(0, 20), st.booleans())
def test_chunks_and_splits_give_the_recurrence(kind, seed, T, K, V, chunk, with_state):
    s = random_steps(kind, seed, T=T, K=K, V=V)
    start = torch.randn(2, 3, K, V, generator=rng(seed)) if with_state else None
    o, S = recurrence(s, start)
    chunked = recurrence_chunked(s, start, chunk=min(chunk, 16) or None)
    close(chunked[0], o, "did you exponentiate a sum of log decays, not a difference?")
    close(chunked[1], S, "did you decay each write to the chunk's end, not from its start?")
    close(states(s, start)[:, -1], S, "is the state handed from token to token?")
    cut = seed % T  # in two parts, the state handed over
    if cut:
        a, middle = recurrence_chunked(s.times(0, cut), start)
        b, end = recurrence_chunked(s.times(cut, T), middle)
        hint = "did you start the second part from the first one's state?"
        close(torch.cat([a, b], 1), o, hint)
        close(end, S, "did padding after the last chunk change the state?")


@EACH_KIND
def test_chunks_learn_what_the_recurrence_learns(kind):
    """The gradients of both, for every tensor, also where a decay is as good as 0."""
    s = random_steps(kind, 1, T=40)
    grads = []
    for repeat in (recurrence, recurrence_chunked):
        leaves = [x.clone().requires_grad_() for x in s if x is not None]
        o, S = repeat(StepInputs(*leaves))
        grads.append(torch.autograd.grad(o.square().sum() + S.square().sum(), leaves))
    for a, b in zip(*grads):
        close(b, a, "did you mask before exp only? 0 · inf is NaN in the gradient")


def test_propagate_by_hand():
    """Under (1, 1): read whole; then halved, less ¼ of what lay along (1, 0); then halved."""
    q = torch.tensor([[1.0, 2], [1, 2], [1, 2]])[None, :, None]
    erase = torch.tensor([[0.0, 0], [1, 0], [0, 0]])[None, :, None]
    decay = torch.full((1, 3, 1, 1), math.log(0.5))
    s = StepInputs(q, 9 * q, 9 * q, decay, erase, erase / 4)
    result = propagate(torch.tensor([[[1.0, 1]]]), s)
    gain, key = written(result, "the gain of each read [B, T, H] and the last key [B, H, K]")
    gains = torch.tensor([3, 1.25, 0.625])
    last = torch.tensor([0.125, 0.25])
    assert_close(gain[0, :, 0], gains, msg="u_t = A_t u_{t-1}, from u = key")
    assert_close(key[0, 0], last, msg="decay and erase move u; k, v do not")


@given(KIND, SEED, st.integers(1, 30), SIZE, SIZE)
def test_an_edit_stays_rank_one_and_propagate_follows_it(kind, seed, T, K, V):
    """u yᵀ, added to each head's state after the first token, moves every later read by
    (u_s · q_s) y and the last state by u_T yᵀ."""
    s = random_steps(kind, seed, T=T, K=K, V=V)
    g = rng(seed)
    u = torch.randn(2, 3, K, generator=g)
    y = torch.randn(2, 3, V, generator=g)
    gain, last = propagate(u, s)
    o, S = recurrence(s)
    _, edited = recurrence(s.times(0, 1))
    edited = edited + u[..., None] * y[..., None, :]
    o_edited = torch.einsum("bhkv,bhk->bhv", edited, s.q[:, 0])[:, None]
    if T > 1:
        later, edited = recurrence(s.times(1, T), edited)
        o_edited = torch.cat([o_edited, later], 1)
    hint = "does u go through A_s, decay and erase, before q_s reads it?"
    close(o_edited - o, gain[..., None] * y[:, None], hint, atol=2e-5)
    hint = "did you forget to erase from u, or start it one token late?"
    close(edited - S, last[..., None] * y[..., None, :], hint, atol=2e-5)


def test_wrong_shapes_are_named():
    s = random_steps("gdn", 0)
    heads_first = s._replace(v=s.v.transpose(1, 2))
    flat = s._replace(log_decay=s.log_decay[..., 0])
    half = s._replace(erase_in=None)
    one_head = s._replace(erase_out=s.erase_out[:, :, :1])
    for repeat in (recurrence, recurrence_chunked):
        for steps, state, message in (
            (s, torch.zeros(2, 3, 4, 6), "value first"),
            (heads_first, None, "head axis before the time axis"),
            (flat, None, "last axis missing"),
            (half, None, "both None"),
            (one_head, None, "erase_in, erase_out are"),
        ):
            with pytest.raises(InputError, match=message):
                repeat(steps, state)


# --------------------------------------------------------------------------------------------------
# The three architectures in float64 NumPy, straight from their equations, token by token
# --------------------------------------------------------------------------------------------------
def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def silu(x):
    return x * sigmoid(x)


def softplus(x):
    return np.log1p(np.exp(x))


def numpy_gdn(p, h, m):
    S = np.zeros((m.heads, m.K, m.V))
    past = [np.zeros(len(p["conv1d.weight"]))] * 3
    out = []
    for x in h:
        past.append(p["in_proj_qkv.weight"] @ x)
        c = silu(sum(p["conv1d.weight"][:, 0, i] * past[-4 + i] for i in range(4)))
        q, k, v = np.split(c, [m.key_heads * m.K, 2 * m.key_heads * m.K])
        z = p["in_proj_z.weight"] @ x
        beta = sigmoid(p["in_proj_b.weight"] @ x)
        delta = softplus(p["in_proj_a.weight"] @ x + p["dt_bias"])
        y = []
        alpha = np.exp(-np.exp(p["A_log"]) * delta)
        for j in range(m.heads):
            g = j // (m.heads // m.key_heads)
            keys = slice(g * m.K, (g + 1) * m.K)
            values = slice(j * m.V, (j + 1) * m.V)
            q_j = q[keys] / np.sqrt((q[keys] ** 2).sum() + 1e-6) / np.sqrt(m.K)
            k_j = k[keys] / np.sqrt((k[keys] ** 2).sum() + 1e-6)
            S[j] = alpha[j] * (np.eye(m.K) - beta[j] * np.outer(k_j, k_j)) @ S[j]
            S[j] += beta[j] * np.outer(k_j, v[values])
            o = S[j].T @ q_j
            y.append(o / np.sqrt((o**2).mean() + 1e-6) * p["norm.weight"] * silu(z[values]))
        out.append(p["out_proj.weight"] @ np.concatenate(y))
    return np.stack(out)


def numpy_mamba2(p, h, m):
    inner = m.heads * m.V
    channels = len(p["conv1d.weight"])
    S = np.zeros((m.heads, m.K, m.V))
    past = [np.zeros(channels)] * 3
    out = []
    for x in h:
        z, xBC, dt = np.split(p["in_proj.weight"] @ x, [inner, inner + channels])
        past.append(xBC)
        taps = p["conv1d.weight"][:, 0]
        c = silu(sum(taps[:, i] * past[-4 + i] for i in range(4)) + p["conv1d.bias"])
        X, B, C = np.split(c, [inner, inner + m.groups * m.K])
        delta = softplus(dt + p["dt_bias"])
        y = []
        for j in range(m.heads):
            g = j // (m.heads // m.groups)
            keys = slice(g * m.K, (g + 1) * m.K)
            x_j = X[j * m.V : (j + 1) * m.V]
            S[j] = np.exp(-np.exp(p["A_log"][j]) * delta[j]) * S[j]
            S[j] += np.outer(B[keys], delta[j] * x_j)
            y.append(S[j].T @ C[keys] + p["D"][j] * x_j)
        y = (np.concatenate(y) * silu(z)).reshape(m.groups, -1)
        y = y / np.sqrt((y**2).mean(1, keepdims=True) + 1e-5)
        out.append(p["out_proj.weight"] @ (y.reshape(-1) * p["norm.weight"]))
    return np.stack(out)


def numpy_rwkv7(p, h, m):
    def lora(c, f, x):
        middle = f(p[f"{c}_lora.0.weight"] @ (x + (past - x) * p[f"x_{c}"]))
        return p[f"{c}_lora.2.weight"] @ middle + p.get(f"{c}_lora.2.bias", 0)

    def project(c, x):
        return (p[f"{c}_proj.weight"] @ (x + (past - x) * p[f"x_{c}"])).reshape(m.heads, -1)

    S = np.zeros((m.heads, m.K, m.V))
    past = np.zeros(h.shape[1])
    out = []
    for x in h:
        r = project("r", x)
        k = project("k", x)
        v = project("v", x)
        w = np.exp(-math.exp(-0.5) * sigmoid(lora("w", np.tanh, x))).reshape(k.shape)
        a = sigmoid(lora("a", np.array, x)).reshape(k.shape)
        gate = lora("g", sigmoid, x)
        kappa = k * p["k_k"].reshape(k.shape)
        kappa = kappa / np.linalg.norm(kappa, axis=1, keepdims=True)
        k = k * (1 + (a - 1) * p["k_a"].reshape(k.shape))
        past = x
        y = []
        for j in range(m.heads):
            S[j] = (np.diag(w[j]) - np.outer(a[j] * kappa[j], kappa[j])) @ S[j]
            S[j] += np.outer(k[j], v[j])
            o = S[j].T @ r[j]
            o = (o - o.mean()) / np.sqrt(o.var() + m.eps)
            part = slice(j * m.V, (j + 1) * m.V)
            bonus = (r[j] * k[j] * p["r_k"][j]).sum() * v[j]
            y.append(o * p["g_norm.weight"][part] + p["g_norm.bias"][part] + bonus)
        out.append(p["out_proj.weight"] @ (np.concatenate(y) * gate))
    return np.stack(out)


@EACH_KIND
def test_each_adapter_is_its_equations(kind):
    mixer = tiny_model(kind).layers[0].mixer
    h = torch.randn(1, 25, 32, generator=rng(5))
    s, rest, _ = mixer.inputs(h, {})
    ours = mixer.output(recurrence_chunked(s)[0], rest)[0].numpy()
    weights = {name: p.double().numpy() for name, p in mixer.named_parameters()}
    restated = dict(gdn=numpy_gdn, mamba2=numpy_mamba2, rwkv7=numpy_rwkv7)[kind]
    theirs = restated(weights, h[0].double().numpy(), mixer)
    np.testing.assert_allclose(ours, theirs, atol=2e-4 * np.abs(theirs).max())


@EACH_KIND
def test_with_its_scale_held_fixed_the_output_is_linear_in_o_through_the_gate(kind, monkeypatch):
    """output(o + d) − output(o) = W_out(gate · scale · d) (RWKV-7: d without its mean)."""
    mixer = tiny_model(kind).layers[0].mixer
    g = rng(5)
    s, rest, _ = mixer.inputs(torch.randn(1, 7, 32, generator=g), {})
    o = 100 * recurrence(s)[0]
    d = 9 * torch.randn(1, 7, mixer.heads, mixer.V, generator=g)
    gate, scale = mixer.gate_and_scale(o, rest)
    assert gate.shape == o.shape
    assert scale.shape == (*o.shape[:3], 1)
    moved = gate * scale * (d - d.mean(-1, keepdim=True) if kind == "rwkv7" else d)
    free = mixer.output(o + d, rest) - mixer.output(o, rest)
    monkeypatch.setattr(mixer, "gate_and_scale", lambda o, rest: (gate, scale))
    held = mixer.output(o + d, rest) - mixer.output(o, rest)
    assert_close(held, mixer.out_proj(moved.flatten(-2)), atol=1e-4, rtol=1e-4)
    assert (free - held).abs().max() > 0.1, "the scale depends on o"
    monkeypatch.undo()
    louder = mixer.gate_and_scale(3 * o, rest)
    assert torch.equal(louder[0], gate), "the gate does not depend on o"
    if kind != "mamba2":  # whose norm also sees D x
        assert_close(louder[1], scale / 3, atol=1e-2, rtol=1e-2)  # eps aside


# --------------------------------------------------------------------------------------------------
# The official implementations, live: logits in one pass, and prefill then continue
# --------------------------------------------------------------------------------------------------
def assert_same_logits(ours: LanguageModel, tokens: torch.Tensor, theirs: torch.Tensor):
    assert 0.3 < theirs.std() < 10, "a bound on differences has to mean something"
    assert_close(ours(tokens)[0], theirs, atol=2e-4, rtol=0)
    cache, parts = None, []
    for piece in tokens.split([13, 1, tokens.shape[1] - 14], 1):
        logits, cache = ours(piece, cache)
        parts.append(logits)
    assert_close(torch.cat(parts, 1), theirs, atol=2e-4, rtol=0)


def hf_model(config: dict, seed: int):
    """A random model of the transformers library."""
    import transformers

    torch.manual_seed(seed)
    config = transformers.AutoConfig.for_model(**config)
    return shake(transformers.AutoModelForCausalLM.from_config(config), seed)


def as_multimodal_shards(folder):
    """Rewrite a flat checkpoint as the hub has Qwen3.5: two shards, an index, nested names and
    config, tensors of other modules beside."""
    tensors = load_file(folder / "model.safetensors")
    os.remove(folder / "model.safetensors")
    tensors = {n.replace("model.", "model.language_model.", 1): x for n, x in tensors.items()}
    tensors |= {"model.visual.patch.weight": torch.zeros(3), "mtp.fc.weight": torch.zeros(3)}
    names = sorted(tensors)
    weight_map = {}
    for i in range(2):
        file = f"model.safetensors-0000{i + 1}-of-00002.safetensors"
        save_file({n: tensors[n] for n in names[i::2]}, folder / file)
        weight_map |= {n: file for n in names[i::2]}
    index = json.dumps(dict(weight_map=weight_map))
    (folder / "model.safetensors.index.json").write_text(index)
    text = json.loads((folder / "config.json").read_text())
    outer = dict(model_type="qwen3_5", text_config=text)
    outer |= dict(tie_word_embeddings=text["tie_word_embeddings"])
    (folder / "config.json").write_text(json.dumps(outer))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("layout", ["one file", "sharded, multimodal names"])
def test_qwen35_against_transformers(tmp_path, layout, tied):
    """With attention in layer 3, and two value heads per key head."""
    model = hf_model(tiny_config("gdn", tie_word_embeddings=tied), 1)
    model.save_pretrained(tmp_path)
    if layout != "one file":
        as_multimodal_shards(tmp_path)
    tokens = random_tokens(2, T=70)
    assert_same_logits(load(tmp_path), tokens, model(tokens).logits)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("layout", ["transformers", "mamba_ssm"])
def test_mamba2_against_transformers(tmp_path, groups, layout):
    model = hf_model(tiny_config("mamba2", n_groups=groups), 2)
    model.save_pretrained(tmp_path)
    if layout == "mamba_ssm":
        tensors = load_file(tmp_path / "model.safetensors")
        tensors["backbone.embedding.weight"] = tensors.pop("backbone.embeddings.weight")
        save_file(tensors, tmp_path / "model.safetensors")
        config = dict(d_model=32, n_layer=4, vocab_size=61, tie_embeddings=False)
        config |= dict(ssm_cfg=dict(layer="Mamba2", ngroups=groups))
        (tmp_path / "config.json").write_text(json.dumps(config))
    tokens = random_tokens(3, T=50)
    assert_same_logits(load(tmp_path), tokens, model(tokens).logits)


@pytest.mark.parametrize("layout", ["x_r ... x_g apart", "packed as x_x"])
def test_rwkv7_against_its_authors_package(tmp_path, layout):
    config = tiny_config("rwkv7", num_hidden_layers=3)
    model = shake(models.build(config), 3)
    models.save(model, config, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    for name in [n for n in tensors if re.search(r"attn\.x_r$", n)]:
        mixes = {c: tensors.pop(name[:-1] + c) for c in "rwkvag"}
        if layout == "packed as x_x":
            tensors[name[:-1] + "x"] = torch.stack(list(mixes.values()))
        else:  # fla's shape
            tensors |= {name[:-1] + c: x.view(1, 1, -1) for c, x in mixes.items()}
    save_file(tensors, tmp_path / "model.safetensors")
    tokens = random_tokens(4, B=1, T=40)
    official = run.Peer(model).model  # our weights under its authors' names
    theirs, _ = official.forward(tokens[0].tolist(), None, full_output=True)
    assert_same_logits(load(tmp_path), tokens, theirs[None])


@pytest.mark.parametrize("name", ["gdn", "mamba2"])
def test_transformers_opens_the_embedded_models(name):
    from transformers import AutoModelForCausalLM

    folder = HERE / "checkpoints" / name
    model = load(folder)
    tokens = random_tokens(5, T=60, vocab=model.vocab)
    official = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    theirs = official(tokens).logits.detach()  # std: 4
    assert_close(model(tokens)[0], theirs, atol=1e-3, rtol=0)


# --------------------------------------------------------------------------------------------------
# The model: caches, causality, edits
# --------------------------------------------------------------------------------------------------
@given(KIND, SEED, st.lists(st.integers(1, 15), min_size=1, max_size=5))
def test_any_split_with_a_cache_gives_the_whole(kind, seed, pieces):
    model = tiny_model(kind)
    tokens = random_tokens(seed, T=sum(pieces))
    whole, end = model(tokens)
    cache = model.empty_cache()
    parts = []
    for piece in tokens.split(pieces, 1):
        before = [{n: x.clone() for n, x in layer.items()} for layer in cache.layers]
        logits, new = model(piece, cache)
        for layer, old in zip(cache.layers, before):  # nothing passed in is changed
            assert layer.keys() == old.keys()
            assert all(torch.equal(layer[n], x) for n, x in old.items())
        cache = new
        parts.append(logits)
    assert_close(torch.cat(parts, 1), whole, atol=1e-4, rtol=1e-5)
    assert cache.length == end.length == tokens.shape[1]
    for a, b in zip(cache.layers, end.layers):
        assert all(torch.allclose(a[n], b[n], atol=1e-4) for n in b)
    half = model(tokens[1:, :1], model(tokens)[1].rows(torch.tensor([1])))[0]
    assert_close(half, model(tokens[:, :1], end)[0][1:], atol=1e-4, rtol=0)


@EACH_KIND
def test_generate_takes_the_most_probable_token_each_time(kind):
    model = tiny_model(kind)
    tokens = random_tokens(3, T=9)
    logits, cache = model(tokens)
    new, chosen_from = model.generate(logits[:, -1], cache, 4)
    for i in range(4):
        expected = model(tokens)[0][:, -1]
        assert_close(chosen_from[:, i], expected, atol=1e-4, rtol=0)
        tokens = torch.cat([tokens, expected.argmax(-1, keepdim=True)], 1)
    assert torch.equal(new, tokens[:, 9:])


@EACH_KIND
def test_the_past_does_not_see_the_future(kind):
    model = tiny_model(kind)
    tokens = random_tokens(6)
    other = tokens.clone()
    other[:, 20:] = (other[:, 20:] + 1) % 61
    mixer = model.layers[1].mixer
    g = rng(1)
    key, value = (torch.randn(n, generator=g) for n in (mixer.K, mixer.V))
    edit = Edit(1, 2, 20, key, value)
    native = model(tokens)[0]
    for changed, least in ((model(other)[0], 0.1), (model(tokens, edits=[edit])[0], 1e-3)):
        assert_close(native[:, :20], changed[:, :20], atol=1e-5, rtol=0)
        assert (native[:, 20:] - changed[:, 20:]).abs().max() > least


@EACH_KIND
def test_a_write_replaced_by_itself_changes_nothing_to_the_bit(kind):
    model = tiny_model(kind)
    tokens = random_tokens(7)
    s = model.step_inputs(model.run(model.embed(tokens), last=1)[0], 1)
    k = s.k[:, 9, 2]
    v = s.v[:, 9, 2]
    edits = [Edit(1, 2, 9, -k, v), Edit(1, 2, 9, k, v)]
    assert torch.equal(model(tokens)[0], model(tokens, edits=edits)[0])


@EACH_KIND
def test_an_edited_model_is_a_model_that_wrote_something_else(kind):
    """`edits` (which propagates) against the token loop with another write in the layer itself."""
    model = tiny_model(kind)
    tokens = random_tokens(8)
    g = rng(1)
    layer = 1
    head = 2
    t = 9
    stream, _ = model.run(model.embed(tokens), last=layer)
    block = model.layers[layer]
    s, rest, _ = block.mixer.inputs(block.norm1(stream.x), {}, stream.v_first)
    key, value = (torch.randn(x.shape[-1], generator=g) for x in (s.k, s.v))
    o, S = [], None
    for i in range(tokens.shape[1]):
        _, S = recurrence(s.times(i, i + 1), S)
        if i == t:
            S = S.clone()
            S[:, head] += key[:, None] * value
        o.append(torch.einsum("bhkv,bhk->bhv", S, s.q[:, i]))
    mixed = stream._replace(x=stream.x + block.mixer.output(torch.stack(o, 1), rest))
    after, _ = model.run(block.feed(mixed, {})[0], first=layer + 1)
    edited = model(tokens, edits=[Edit(layer, head, t, key, value)])[0]
    assert_close(edited, model.unembed(after), atol=1e-4, rtol=0)


def test_an_edit_of_what_is_not_there_is_refused():
    model = tiny_model("gdn")
    tokens = random_tokens(0, T=5)
    k = torch.zeros(8)
    v = torch.zeros(6)
    for edit, message in (
        (Edit(3, 0, 1, k, v), "full attention"),
        (Edit(9, 0, 1, k, v), "layer 9.*not one of 0"),
        (Edit(0, 4, 1, k, v), "heads 0..3"),
        (Edit(0, 0, 5, k, v), "positions 0..4"),
        (Edit(0, 0, 1, v, k), "key first"),
    ):
        with pytest.raises(InputError, match=message):
            model(tokens, edits=[edit])


# --------------------------------------------------------------------------------------------------
# Checkpoints that are not what they should be: one line, no traceback
# --------------------------------------------------------------------------------------------------
def make_checkpoint(folder, kind: str):
    """A tiny checkpoint with a tokenizer of two words."""
    from tokenizers import Tokenizer, models as kinds

    config = tiny_config(kind, num_hidden_layers=2)
    models.save(shake(models.build(config), 5), config, folder)
    words = kinds.WordLevel({"a": 0, "b": 1}, unk_token="a")
    Tokenizer(words).save(str(folder / "tokenizer.json"))


NAME = "backbone.layers.1.mixer.A_log"
ONE_NAN = torch.zeros(8)
ONE_INF = torch.ones(61, 32)
ONE_NAN[3], ONE_INF[5, 7] = math.nan, -math.inf
SPOILED = [  # message, tensor, its new value (None: it goes)
    ("is missing", NAME, None),
    ("mixer.extra", "mixer.extra", torch.ones(2)),
    (r"A_log is \[3\]", NAME, torch.zeros(3)),
    ("holds I8", NAME, torch.zeros(8, dtype=torch.int8)),
    ("A_log holds NaN", NAME, ONE_NAN),
    ("embeddings.weight holds NaN or Inf", "backbone.embeddings.weight", ONE_INF),
]
CONFIGS = [  # changes of the config, message
    (dict(model_type="llama"), "llama is not supported.*supported: qwen3_5"),
    (dict(model_type="mamba"), "Mamba-1"),
    (dict(model_type="rwkv6"), "RWKV-6"),
    (dict(model_type="qwen3_next"), "Qwen3-Next"),
    (dict(model_type=[1]), "not supported"),
    (dict(ssm_cfg={}), "Mamba-1"),
    (dict(num_heads="eight"), "num_heads is 'eight'"),
    (dict(n_groups=0), "n_groups is 0"),
    (dict(n_groups=3), "must divide"),
    (dict(num_hidden_layers=10**9), "num_hidden_layers is 1000000000"),
    (dict(head_dim=400_000, state_size=400_000), "config.json asks for"),
    (dict(num_hidden_layers=True), "num_hidden_layers is True"),
    (dict(text_config=3), "cannot be read"),
]
INDEX = "model.safetensors.index.json"
FILES = [  # file, its new content, message
    ("model.safetensors", b"", "cannot be read"),
    ("model.safetensors", b"<!DOCTYPE>", "web page"),
    ("model.safetensors", b"version https://git-lfs.github.com/spec/v1", "git-LFS pointer"),
    ("model.safetensors", b"\x80\x04\x95" + bytes(range(99)), "is a pickle"),
    ("model.safetensors", b"PK\x03\x04" + bytes(range(99)), "is a pickle"),
    ("config.json", b"{", "cannot be read"),
    ("config.json", b"[" * 99999, "cannot be read"),
    ("config.json", b"[1]", "no JSON object"),
    (INDEX, b'{"weight_map": {"a": "../b.safetensors"}}', "outside the"),
    (INDEX, b'{"weight_map": {"a": "b.safetensors"}}', "is missing"),
    (INDEX, b'{"weight_map": [1]}', "cannot be read"),
    ("tokenizer.json", b"{}", "cannot be read"),
    ("tokenizer.json", b"[1]", "no JSON object"),
]


def assert_refused(folder, message: str):
    with pytest.raises(InputError, match=message) as error:
        load_tokenizer(load(folder))
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 400


@pytest.mark.parametrize("message, name, value", SPOILED)
def test_spoiled_tensors_are_refused_by_name(tmp_path, message, name, value):
    make_checkpoint(tmp_path, "mamba2")
    tensors = load_file(tmp_path / "model.safetensors") | {name: value}
    save_file({n: x for n, x in tensors.items() if x is not None}, tmp_path / "model.safetensors")
    assert_refused(tmp_path, message)


@pytest.mark.parametrize("changes, message", CONFIGS)
def test_a_config_that_cannot_be_is_refused_by_name(tmp_path, changes, message):
    make_checkpoint(tmp_path, "mamba2")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | changes))
    assert_refused(tmp_path, message)


@pytest.mark.parametrize("file, content, message", FILES)
def test_a_file_that_is_something_else_is_refused(tmp_path, file, content, message):
    make_checkpoint(tmp_path, "mamba2")
    (tmp_path / file).write_bytes(content)
    assert_refused(tmp_path, message)


def test_pickles_fifos_and_unknown_names_are_refused(tmp_path):
    make_checkpoint(tmp_path, "mamba2")
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    assert_refused(tmp_path, "pytorch_model.bin is a pickle.*safetensors conversion")
    os.mkfifo(tmp_path / "model.safetensors")
    assert_refused(tmp_path, "no file")
    assert_refused("no such thing", "neither a folder nor a hub id")
    with pytest.raises(InputError, match="could not be fetched") as error:
        load("nobody/no-such-model" + "x" * 300)
    assert len(str(error.value)) <= 200


def test_a_tokenizer_of_another_model_is_refused(tmp_path):
    from tokenizers import Tokenizer, models as kinds

    make_checkpoint(tmp_path, "mamba2")
    words = {f"w{i}": i for i in range(62)}
    Tokenizer(kinds.WordLevel(words, unk_token="w0")).save(str(tmp_path / "tokenizer.json"))
    assert_refused(tmp_path, "ids up to 61, the embedding 61 rows")
    Tokenizer(kinds.BPE()).save(str(tmp_path / "tokenizer.json"))
    assert_refused(tmp_path, "tokenizer.json")


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """Whole tiny checkpoints of the three models, and their logits."""
    made = {}
    for kind in ARCHITECTURES:
        folder = tmp_path_factory.mktemp(kind)
        make_checkpoint(folder, kind)
        model = load(folder)
        assert load_tokenizer(model).encode("a") == [0]
        made[kind] = folder, model(random_tokens(0, T=5))[0]
    return made


REAL = {"norm_eps", "rope_parameters", "tie_word_embeddings"}  # other values may be right, too
VALUES = [None, "x", [], {}, -1, 0, 1.5, 1e308, True, 10**30, [1, 2], {"a": 1}]


DAMAGES = "cut, extended, empty, noise, a flipped bit, a key away, a wrong value".split(", ")


def damaged(whole: bytes, damage: str, where: int, value=None) -> bytes:
    """The file's bytes, after the damage."""
    at = where % len(whole)
    noise = random.Random(where).randbytes(100)
    if damage == "a flipped bit":
        return whole[:at] + bytes([whole[at] ^ 1 << where % 8]) + whole[at + 1 :]
    if damage in ("a key away", "a wrong value") and whole.startswith(b"{"):
        content = json.loads(whole)
        keys = sorted(content.keys() - REAL)
        key = keys[where % len(keys)]
        content[key] = value
        if damage == "a key away":
            del content[key]
        return json.dumps(content).encode()
    contents = {"cut": whole[:at], "extended": whole + noise, "empty": b"", "noise": noise}
    return contents.get(damage, whole)


@settings(max_examples=int(os.environ.get("DAMAGED", 150)))
@given(
    KIND,
    st.sampled_from(["config.json", "model.safetensors", "tokenizer.json"]),
    st.sampled_from(DAMAGES),
    st.integers(0, 10**6),
    st.sampled_from(VALUES),
)
def test_a_damaged_file_is_refused_in_one_line_or_does_no_harm(
    sound, kind, file, damage, where, value
):
    folder, logits = sound[kind]
    whole = (folder / file).read_bytes()
    (folder / file).write_bytes(damaged(whole, damage, where, value))
    try:
        model = load(folder)
        load_tokenizer(model).encode("a b")
        ours = model(random_tokens(0, T=5))[0]
        assert ours.shape == logits.shape
        if damage != "a flipped bit":  # which may make another sound number of one
            assert_close(ours, logits)
    except InputError as error:
        assert "\n" not in str(error)
        assert len(str(error)) < 500
    finally:
        (folder / file).write_bytes(whole)


# --------------------------------------------------------------------------------------------------
# Tokenizers
# --------------------------------------------------------------------------------------------------
def test_world_tokenizer_takes_the_longest_match(tmp_path):
    make_checkpoint(tmp_path, "mamba2")
    os.remove(tmp_path / "tokenizer.json")
    entries = ["a", "b", "ab", "é", b"\xc3", b"\xa9", " "]
    lines = [f"{i} {entry!r} {len(entry)}\n" for i, entry in enumerate(entries, 1)]
    (tmp_path / "rwkv_vocab_v1.txt").write_text("".join(lines), encoding="utf-8")
    tokenizer = load_tokenizer(load(tmp_path))
    assert tokenizer.encode("abba é") == [3, 2, 1, 7, 4]
    assert tokenizer.decode([3, 2, 1, 7, 4]) == "abba é"
    with pytest.raises(InputError, match="no entry for the byte 99"):
        tokenizer.encode("c")
    for line in ("99 'x' 1", "1", "x 'a' 1", "1 exit() 2", "1 10**9 3", "1 99999 4"):
        (tmp_path / "rwkv_vocab_v1.txt").write_text(line + "\n")
        assert_refused(tmp_path, "rwkv_vocab_v1.txt")


# --------------------------------------------------------------------------------------------------
# The SAE
# --------------------------------------------------------------------------------------------------
def random_sae(seed: int, n=40, K=6, V=4, active=3, encoder="bilinear", **settings) -> WriteSAE:
    g = rng(seed)
    sae = WriteSAE(n, K, V, active, encoder, **settings)
    with torch.no_grad():
        for p in sae.parameters():
            p.copy_(torch.randn(p.shape, generator=g) if p.requires_grad else p)
    sae.atoms.normalise()
    return sae.requires_grad_(False)


def random_writes(seed: int, n=9, K=6, V=4) -> Factored:
    g = rng(seed)
    return write_of(torch.randn(n, K, generator=g), torch.randn(n, V, generator=g))


def random_metric(sae: WriteSAE, seed: int):
    """Give the SAE a random metric; returns M_k, M_v."""
    g = rng(seed)
    metric = []
    for n in (sae.cfg["K"], sae.cfg["V"]):
        R = torch.randn(n, n, generator=g) / n**0.5
        metric.append(R @ R.T + 0.1 * torch.eye(n))
    writesae.set_metric(sae, *metric)
    return metric


def test_encode_by_hand():
    """Atoms e_0 e_0ᵀ, e_1 e_0ᵀ, −e_1 e_0ᵀ, and the write (3, 4)ᵀ (1, 0): coefficients 3, 4, 0."""
    sae = WriteSAE(3, 2, 2, active=3)
    eye = torch.eye(2)
    keys = torch.stack([eye[0], eye[1], -eye[1]])
    sae.start(torch.arange(3), write_of(keys, eye[[0, 0, 0]]))
    result = sae.encode(write_of(torch.tensor([[3.0, 4.0]]), eye[:1]))
    index, a = written(result, "the active atoms and their coefficients, [N, active] each")
    assert index[0, :2].tolist() == [1, 0], "the largest coefficient comes first"
    assert a[0, 2] == 0, "a is relu ⟨E_i, X⟩: did you forget the relu?"
    hint = "coded at unit norm: times ‖X‖ in the end?"
    assert_close(a[0, :2], torch.tensor([4.0, 3]), msg=hint)


ANY_SAE = st.sampled_from(list(writesae.ENCODERS)), st.sampled_from(list(writesae.DECODERS))


@given(SEED, st.integers(1, 5), *ANY_SAE, st.integers(2, 7), st.integers(2, 7))
def test_encode_and_decode_of_factors_give_what_matrices_give(seed, active, encoder, decoder, K, V):
    """A write, as its factors and as a matrix, against plain matrices; under any metric."""
    sae = random_sae(seed, K=K, V=V, active=active, encoder=encoder, decoder=decoder)
    L_k, L_v = map(torch.linalg.cholesky, random_metric(sae, seed))
    X = random_writes(seed + 1, K=K, V=V)
    E, A = (bank.at(torch.arange(40)).matrix() for bank in (sae.readers, sae.atoms))
    A = torch.linalg.inv(L_k).T @ A @ torch.linalg.inv(L_v)
    scores = torch.einsum("nkv,akv->na", L_k.T @ X.matrix() @ L_v, E)
    best = scores.relu().topk(active).values
    for form in (X, matrix_of(X.matrix())):
        assert_close(sae.readers.products(sae.see(form)), scores, atol=1e-3, rtol=1e-3)
        index, a = sae.encode(form)
        hint = "the `active` largest relu ⟨E_i, X⟩, seen?"
        assert_close(a, best, atol=1e-3, rtol=1e-3, msg=hint)
        expected = torch.einsum("nm,nmkv->nkv", a, A[index])
        assert_close(sae.decode(index, a).matrix(), expected, atol=1e-2, rtol=1e-3)
        twice, _ = sae.encode(form.times(torch.full((9,), 2.0)))
        assert torch.equal(twice, index), "twice the input, twice the coefficients: a bias?"


def test_a_dense_encoder_on_outer_products_is_the_bilinear_one():
    bilinear = random_sae(0)
    dense = random_sae(0, encoder="dense")
    dense.readers.values.copy_(bilinear.readers.at(torch.arange(40)).matrix())
    dense.atoms.load_state_dict(bilinear.atoms.state_dict())
    for x, y in zip(dense.encode(random_writes(1)), bilinear.encode(random_writes(1))):
        assert_close(x, y)


def test_cosines_of_tiny_and_of_large_writes():
    for size in (1e-12, 1e-6, 1e9):
        X = write_of(size * torch.ones(1, 4), torch.ones(1, 4))
        assert writesae.cosine(X, X).item() == pytest.approx(1)


def test_what_cannot_be_trained_that_way_is_refused():
    X = random_writes(0, n=50)
    for kind in (dict(encoder="dense"), dict(decoder="flat"), dict(active=2)):
        with pytest.raises(InputError, match="fit_alternating"):
            fit_alternating(WriteSAE(9, 6, 4, **kind), *sides(X), rng(0))
    with pytest.raises(InputError, match="tied"):
        WriteSAE(9, 6, 4, encoder="dense", sparsity="pursuit")


@pytest.mark.parametrize("decoder", writesae.DECODERS)
def test_what_stands_in_for_a_write_is_the_same_matrix_everywhere(decoder):
    """Of flat atoms the leading pair, in coding, in erasing, and as another atom."""
    cell = tiny_cell("gdn", decoder=decoder)
    p = next(writesae.points(cell))
    index, a, A = cell.sae.dominant(p.write())
    at = dict(index=index, a=a)
    assert torch.equal(writesae.atoms_at(cell, at).matrix(), A.matrix())
    assert A.keys.shape[1] == 1
    other = writesae.controls(cell, p, ("x", cell.sae), dict(index_x=index, a_x=a))["random"]
    assert other.keys.shape == A.keys.shape


@given(SEED)
def test_tied_coefficient_is_the_least_squares_one(seed):
    """‖X − aA‖² = ‖X‖² − a²: the SAE's error at one active atom, in its own coordinates."""
    sae = random_sae(seed, encoder="tied", active=1)
    X = random_writes(seed + 1)
    random_metric(sae, seed)
    _, a, A = sae.dominant(X)
    left = sae.see(X.minus(A))
    whole = sae.see(X)
    assert_close(inner(left, left), inner(whole, whole) - a**2, atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize("decoder", writesae.DECODERS)
@pytest.mark.parametrize("encoder", writesae.ENCODERS)
def test_every_setting_trains_travels_and_codes_one_as_many(tmp_path, encoder, decoder):
    sae = WriteSAE(24, 6, 4, 3, encoder, decoder, centred=encoder == "dense")
    random_metric(sae, 0)
    X = random_writes(0, n=600)
    before = {name: p.clone() for name, p in sae.named_parameters() if p.requires_grad}
    history = fit_gradient(sae, X, rng(0), steps=40, batch=64, lr=0.01)
    assert sum(history[-5:]) < sum(history[:5])
    assert all(x >= 0 for x in history)
    for name, x in before.items():
        assert not torch.equal(sae.get_parameter(name), x), f"{name} did not learn"
    index, a = sae.encode(X)
    _, alone = sae.encode(X.rows(slice(7, 8)))
    assert_close(alone, a[7:8], atol=1e-5, rtol=1e-4)
    assert (a >= 0).all()
    assert (a[:, :-1] >= a[:, 1:]).all()
    assert a.shape == (600, 3)
    sae.save(tmp_path / "a.safetensors")
    again = WriteSAE.load(tmp_path / "a.safetensors")
    assert again.cfg == sae.cfg
    ours, theirs = (x.decode(index, a).matrix() for x in (again, sae))
    assert_close(ours, theirs, atol=2e-2, rtol=1e-2)


@pytest.mark.parametrize("how", ["alternating", *writesae.DECODERS])
@pytest.mark.parametrize("what", ["constant", "zero", "heads of size 1", "three"])
def test_writes_with_nothing_to_learn_from_leave_no_nan(how, what):
    n, K, V = {"three": (3, 6, 4), "heads of size 1": (200, 1, 1)}.get(what, (200, 6, 4))
    X = random_writes(0, n, K, V)
    if what in ("constant", "zero"):
        X = Factored(*(torch.full_like(x, what == "constant") for x in X))
    if how == "alternating":
        sae = WriteSAE(20, K, V)
        fit_alternating(sae, *sides(X), rng(0), steps=3, sample=100)
    else:
        sae = WriteSAE(20, K, V, active=2, decoder=how)
        fit_gradient(sae, X, rng(0), steps=5, batch=32, dead_after=50, resample_every=2)
    null = writesae.untrained(sae, *sides(X), rng(0))
    for codes in (sae, null):
        assert all(x.isfinite().all() for x in codes.state_dict().values())
        assert all(x.isfinite().all() for x in codes.encode(X))


def test_a_centred_sae_codes_what_differs_from_the_mean_of_its_inputs():
    sae = WriteSAE(8, 6, 4, centred=True)
    X = matrix_of(random_writes(0, n=50).matrix() + 3)
    random_metric(sae, 1)
    fit_gradient(sae, X, rng(0), steps=1, batch=8)
    mean = sae.mean.abs().max()
    left = sae.see(X).matrix().mean(0).abs().max()
    assert mean > 1 and left < 1e-3 * mean


def test_pursuit_takes_what_is_left_and_one_step_of_it_is_the_dominant_atom():
    sae = random_sae(0, encoder="tied", active=1)
    X = random_writes(1)
    left = []
    best, _, A = sae.dominant(X)
    for active in (1, 2, 4, 8):
        several = WriteSAE(**sae.cfg | dict(active=active, sparsity="pursuit"))
        several.load_state_dict(sae.state_dict())
        index, a = several.encode(X)
        coded = several.decode(index, a)
        left.append(inner(X.minus(coded), X.minus(coded)))
        assert torch.equal(index[:, 0], best)
        if active == 1:
            assert_close(coded.matrix(), A.matrix())
    assert all((after <= before + 1e-5).all() for before, after in zip(left, left[1:]))


def planted(seed: int, n=24, N=6000, K=12, V=9):
    """Writes that are noisy copies of n rank-1 atoms."""
    g = rng(seed)
    keys, values = (F.normalize(torch.randn(n, d, generator=g), dim=-1) for d in (K, V))
    which = torch.randint(n, (N,), generator=g)
    size = 0.5 + torch.rand(N, 1, generator=g)

    def noisy(x):
        return F.normalize(x + 0.03 * torch.randn(x.shape, generator=g), dim=-1)

    return keys, values, size * noisy(keys[which]), noisy(values[which])


def test_two_alternating_steps_by_hand():
    """Assign, sum with the right weights, normalise, restart: against plain loops over writes."""
    X = random_writes(0, n=50)
    sae = WriteSAE(7, 6, 4)
    history = fit_alternating(sae, *sides(X), rng(3), steps=2, sample=12)
    written(history, "the share of energy explained at every step, a list")
    g, (x, y) = rng(3), (F.normalize(side, dim=-1) for side in sides(X))
    first = torch.randint(50, (7,), generator=g)
    restarted = 0
    keys = list(x[first])
    values = list(y[first])
    key_sum = [0.0] * 7
    value_sum = [0.0] * 7
    count = [0.0] * 7
    for step in range(2):
        drawn = torch.randint(50, (12,), generator=g).tolist()
        scores = [[float((k @ x[n]) * (v @ y[n])) for k, v in zip(keys, values)] for n in drawn]
        a = [max(row) for row in scores]
        worst = sorted(range(12), key=a.__getitem__)
        for i in range(7):
            mine = [(a[j], x[n], y[n]) for j, n in enumerate(drawn) if scores[j].index(a[j]) == i]
            count[i] = 0.75 * count[i] + len(mine)
            new = sum(a * (values[i] @ y) * x for a, x, y in mine)
            key_sum[i] = 0.75 * key_sum[i] + new
            key = F.normalize(key_sum[i], dim=0) if count[i] > 0.5 else keys[i]
            new = sum(a * (key @ x) * y for a, x, y in mine)
            value_sum[i] = 0.75 * value_sum[i] + new
            if count[i] > 0.5:
                keys[i], values[i] = key, F.normalize(value_sum[i], dim=0)
            else:
                n = drawn[worst.pop(0)]
                restarted = restarted + 1
                keys[i], values[i] = x[n], y[n]
                key_sum[i] = value_sum[i] = count[i] = 0.0
        assert history[step] == pytest.approx(np.mean(np.square(a)), rel=1e-4), "mean a² explained"
    hint = "keys: Σ a (value · y) x, old values, 0.75 of the older sum kept, unit norm?"
    assert_close(sae.atoms.keys[:, 0], torch.stack(keys), msg=hint)
    hint = "values: Σ a (key · x) y, with the new keys, 0.75 of the older sum kept, unit norm?"
    assert_close(sae.atoms.values[:, 0], torch.stack(values), msg=hint)
    assert restarted > 0, "the draw was chosen such that atoms restart"


@pytest.mark.parametrize("method", ["alternating", "gradient"])
def test_a_planted_dictionary_is_found(method):
    keys, values, k, v = planted(0)
    sae = WriteSAE(72, 12, 9, 1)  # three times as many as were planted
    if method == "alternating":
        history = fit_alternating(sae, k, v, rng(0), steps=30, sample=3000)
        assert history[-1] > history[0], "the share of energy explained must rise"
    else:
        how = dict(steps=400, batch=256, lr=0.03, dead_after=2000, resample_every=80)
        history = fit_gradient(sae, write_of(k, v), rng(0), **how)
        assert history[-1] < history[0]
    overlap = sae.atoms.products(write_of(keys, values))  # ⟨planted atom, learned atom⟩
    assert (overlap.max(1).values > 0.98).float().mean() >= 0.95, "did dead atoms restart?"


def test_only_active_atoms_end_their_silence_and_dead_ones_count_a_32nd(monkeypatch):
    """Two orthogonal writes; an atom at the other one is in the top k with a = 0: still silent."""
    seen = []
    auxiliary = torch.zeros((), requires_grad=True)

    def auxiliary_loss(sae, R, dead, k_aux):
        seen.append(dead.tolist())
        return auxiliary

    monkeypatch.setattr(writesae, "auxiliary_loss", auxiliary_loss)
    k = torch.eye(4)[[0, 1]].repeat(20, 1)
    sae = WriteSAE(6, 4, 4, active=6)
    fit_gradient(sae, write_of(k, k), rng(0), steps=6, batch=1, lr=0.0, dead_after=0)
    sides = [{int(sae.atoms.keys[i, 0].argmax()) for i in dead} for dead in seen]
    assert len(seen) == 6
    assert all(len(side) == 1 for side in sides)
    assert auxiliary.grad == 6 / 32, "six steps, each with the auxiliary loss at weight 1/32"


def test_dead_atoms_explain_the_residual_and_restart_without_memory():
    """The auxiliary loss of a residual R by one dead atom A with ⟨A, R⟩ = a: (‖R‖² − a²) / ‖R‖²."""
    sae = WriteSAE(3, 2, 2)
    eye = torch.eye(2)
    sae.start(torch.arange(3), write_of(eye[[0, 1, 0]], eye[[0, 1, 1]]))
    R = write_of(torch.tensor([[3.0, 4.0]], requires_grad=True), torch.tensor([[1.0, 0.0]]))
    loss = writesae.auxiliary_loss(sae, R, torch.tensor([0, 1]), 5)
    assert loss.item() == pytest.approx((25 - 9) / 25)
    grads = torch.autograd.grad(loss, [sae.atoms.keys, R.keys], allow_unused=True)
    assert grads[0][0].any() and not grads[0][2].any(), "the dead learn, and no other"
    assert grads[1] is None, "the residual is detached: those that left it do not learn from it"
    optimiser = torch.optim.Adam(sae.atoms.parameters(), 0.1)
    sum(p.sum() for p in sae.atoms.parameters()).backward()
    optimiser.step()
    which = writesae.restart(sae, optimiser, torch.tensor([1]), R, inner(R, R))
    assert which.tolist() == [1]
    assert_close(sae.atoms.at(which).matrix(), R.matrix().detach() / 5, msg="of unit norm")
    for memory in optimiser.state.values():
        assert (memory["exp_avg"][1] == 0).all()
        assert (memory["exp_avg"][0] != 0).all()


def test_the_untrained_null_is_made_of_training_writes():
    sae = random_sae(0, n=20, active=1)
    X = random_writes(2, n=100)
    random_metric(sae, 1)
    null = writesae.untrained(sae, *sides(X), rng(0))
    assert null.cfg["encoder"] == "tied"
    assert torch.allclose(null.to_k, sae.to_k, atol=1e-5)
    drawn = torch.randint(100, (20,), generator=rng(0))
    atoms = null.decode(torch.arange(20)[:, None], torch.ones(20, 1))
    assert_close(writesae.cosine(atoms, X.rows(drawn)), torch.ones(20))


# --------------------------------------------------------------------------------------------------
# The engine and the replacement test
# --------------------------------------------------------------------------------------------------
def tiny_cell(kind, seed=0, B=3, T=34, positions=(9,), layer=1, head=0, **settings) -> Cell:
    """A head of a tiny model, passages, and a random SAE (its settings: those of random_sae)."""
    model = tiny_model(kind, seed)
    mixer = model.layers[layer].mixer
    settings = dict(n=50, active=1, encoder="tied", K=mixer.K, V=mixer.V) | settings
    tokens = random_tokens(seed, B, T)
    sae = random_sae(seed, **settings)
    return Cell(model, layer, head, tokens, positions, rng(seed), sae, torch.arange(B) // 2)


def native_inputs(cell: Cell) -> StepInputs:
    """The six tensors of the cell's head, over all its text."""
    stream, _ = cell.model.run(cell.model.embed(cell.tokens), last=cell.layer)
    return cell.model.step_inputs(stream, cell.layer).heads([cell.head])


def edits_of(cell: Cell, t: int, change: Factored) -> list[Edit]:
    """The edits that add `change` to the head's state after t, one for each of its factors."""
    pairs = zip(change.keys.unbind(1), change.values.unbind(1))
    return [Edit(cell.layer, cell.head, t, key, value) for key, value in pairs]


def whole_pass(cell: Cell, t: int, change: Factored | None = None, rows=slice(None)):
    """The judge of the fast engine: log-probabilities at t..t+10, the model run from token one."""
    edits = edits_of(cell, t, change) if change else ()
    return cell.model(cell.tokens[rows], edits=edits)[0][:, t : t + 11].log_softmax(-1)


@settings(max_examples=12)
@given(KIND, SEED, st.integers(0, 2), st.integers(0, 3), st.sampled_from(["write", "state"]))
def test_branches_are_full_forward_passes_with_edits(kind, seed, layer, head, source):
    """Every condition and horizon."""
    positions = [1 + seed % 7, 9 + seed % 14]
    cell = tiny_cell(kind, seed, 3, 34, positions, layer, head)
    null, (K, V) = cell.sae, (cell.sae.cfg[name] for name in "KV")
    sae = random_sae(seed + 1, K=K, V=V, source=source)
    fast = replacement(cell, dict(atom=sae, untrained=null), whole=True)
    s = native_inputs(cell)
    for p in writesae.points(cell):
        t = p.t
        X = write_of(s.k[:, p.t, 0], s.v[:, p.t, 0])
        coded = X if source == "write" else matrix_of(states(s)[:, t, 0])
        index, a, A = sae.dominant(coded)
        put_in = dict(atom=A, untrained=null.dominant(X)[2], delete=X.times(0 * a))
        put_in["atom_whole"] = sae.decode(*sae.encode(coded))
        if t == positions[0]:
            part = dict(index_atom=index, a_atom=a)
            put_in |= writesae.controls(cell, p, ("atom", sae), part)
        here = fast["position"] == t
        base = whole_pass(cell, t)
        for name, Y in put_in.items():
            kl = (base.exp() * (base - whole_pass(cell, t, Y.minus(X)))).sum(-1)
            assert_close(fast["kl_" + name][here], kl, atol=2e-5, rtol=2e-3, msg=f"{name} at {t}")
        assert torch.equal(fast["index_atom"][here], index)
        assert here.sum() == 3
        assert_close(fast["cosine_atom"][here], writesae.cosine(A, X))
    assert fast["kl_native"][:3].abs().max() < 1e-5
    assert fast["kl_random"][3:].isnan().all()
    assert torch.equal(fast["file"], cell.file[fast["passage"]])


def test_batches_and_neighbours_do_not_matter(monkeypatch):
    """One passage alone or among others, one position alone or after others: the same effect."""
    cell = tiny_cell("gdn", 9, B=4, T=40, positions=[5, 12, 20])

    def measured(**changes):
        return replacement(cell._replace(rng=rng(0), **changes), dict(atom=cell.sae))

    together = measured()
    again = measured()
    alone = measured(tokens=cell.tokens[2:3], file=cell.file[2:3], positions=[20])
    assert_close(alone["kl_atom"][0], together["kl_atom"][2 * 4 + 2], atol=1e-5, rtol=1e-3)
    for name, x in together.items():
        assert torch.equal(again[name].nan_to_num(), x.nan_to_num())
    monkeypatch.setattr(writesae, "BATCH_BYTES", 1)  # one passage at a time
    one_by_one = measured()
    order = (one_by_one["position"] * 10 + one_by_one["passage"]).argsort()
    for name in ("kl_atom", "kl_delete", "index_atom", "kl_random", "kl_projected"):
        ours = one_by_one[name][order]
        theirs = together[name]
        assert_close(ours, theirs, atol=1e-5, rtol=1e-3, equal_nan=True)


def test_kl_divergence_by_hand_and_of_tiny_effects():
    """Of (½, ½) from (¼, ¾): ½ log 2 + ½ log ⅔. Then in fp32, against float64: an effect of 1e-9
    nats still has two digits. Never negative."""
    p, q = (torch.tensor([x, 1 - x]).log() for x in (0.5, 0.25))
    by_hand = pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3))
    kl = written(writesae.kl_divergence(p, q), "a KL in nats for each distribution, [...]")
    assert kl.item() == by_hand, "Σ p (log p − log q): p and q swapped?"
    p = torch.randn(1000, generator=rng(0)).double().log_softmax(-1)
    q = (p + 1e-4 * torch.randn(1000, generator=rng(1))).log_softmax(-1)
    exact = (p.exp() * (p - q)).sum()
    assert 1e-9 < exact < 1e-8
    ours = writesae.kl_divergence(p.float(), q.float()).double()
    assert_close(ours, exact, rtol=0.02, atol=0, msg="lost in rounding: sum terms of second order")
    wide = torch.tensor([[60000.0, -60000, 0, 1], [0, 0, 0, 60000]]).log_softmax(-1)
    kl = writesae.kl_divergence(wide, wide.flip(0))
    sound = (kl >= 0).all() and kl.isfinite().all()
    assert sound, "e^d overflows where p is nothing beside q"
    assert writesae.kl_divergence(wide, wide).tolist() == [0, 0]
    far = torch.tensor([[0.0, -100], [0, 0]]).log_softmax(-1)  # d > 60: the term is q − p (1 + d)
    assert writesae.kl_divergence(far[0], far[1]).item() == pytest.approx(math.log(2))
    p, q = torch.randn(2, 3, 100, 7, generator=rng(2)).log_softmax(-1)  # more rows than a block
    assert_close(writesae.kl_divergence(p, q), (p.exp() * (p - q)).sum(-1))


@EACH_KIND
def test_the_read_metric_is_the_fisher_information_of_the_next_predictions(kind):
    """Against finite differences of the drawn tokens' log-probability, whole passes, in float64."""
    cell = tiny_cell(kind, B=2, T=24, positions=[8])
    cell.model.double()
    metric = writesae.read_metric(cell._replace(rng=rng(5)), ridge=0.1)
    mixer = cell.model.layers[1].mixer
    base = whole_pass(cell, 8)
    drawn = torch.multinomial(base.exp().flatten(0, 1), 1, generator=rng(5)).view(2, 11, 1)
    G = torch.zeros(2, mixer.K, mixer.V, dtype=torch.float64)
    for c in range(mixer.K):
        for d in range(mixer.V):
            unit = torch.eye(mixer.K)[None, c].double(), torch.eye(mixer.V)[None, d].double()
            edited = whole_pass(cell, 8, write_of(1e-5 * unit[0], unit[1]))
            G[:, c, d] = (edited - base).gather(-1, drawn).sum((1, 2)) / 1e-5
    for M, side in zip(metric, (G @ G.mT, G.mT @ G)):
        side = side.sum(0) / side.sum(0).diagonal().mean()
        assert (side - side.diag().diag()).abs().max() > 0.1, "a case with something to see"
        assert_close(M.double(), side + 0.1 * torch.eye(len(side)), atol=2e-3, rtol=2e-2)


def made_up_table(**columns) -> dict:
    """A table as `replacement` gives it, two passages a file; effects are all at horizon 3."""
    table = {name: torch.tensor(x) for name, x in columns.items()}
    for name, x in table.items():
        if name.startswith("kl_"):
            table[name] = F.pad(x[:, None].float(), (3, 7))
    n = len(table["kl_atom"])
    return table | dict(passage=torch.arange(n), file=torch.arange(n) // 2)


def test_figures_by_hand():
    """Six of eight rows are firings. By the effect of nothing, 1 to 6: won, won, lost, won, won,
    lost. The controls were not measured in the first row."""
    nan, names = math.nan, ("atom", "delete", "random", "projected")
    rows = [  # effect of: the atom, nothing, a random atom, projected; cosine, a, the atom
        (1.0, 5.0, nan, nan, 0.80, 1.0, 3),
        (9.0, 1.0, 9.0, 9.0, 0.70, 1.0, 5),  # its cosine is too low
        (0.5, 1.0, 2.0, 0.0, 0.90, 1.0, 3),
        (7.0, 6.0, 9.0, 0.0, 0.90, 1.0, 5),
        (4.0, 3.0, 9.0, 9.0, 0.72, 1.0, 3),
        (0.0, 1.0, 9.0, 9.0, 0.90, 0.0, 5),  # not active
        (1.0, 2.0, 1.0, 9.0, 0.90, 1.0, 3),
        (1.0, 4.0, 9.0, 9.0, 0.75, 1.0, 3),
    ]
    *effects, cosine, a, index = zip(*rows)
    kl = {"kl_" + name: x for name, x in zip(names, effects)} | dict(kl_native=[0.0] * 8)
    f = made_up_table(**kl, cosine_atom=cosine, a_atom=a, index_atom=index)
    f = writesae.replacement_figures(f, 0.71, rng(0))
    assert_figures(
        f,
        n_positions=8,
        n_firings=6,
        n_atoms=2,
        n_passages=6,
        coverage=6 / 8,
        win_rate=4 / 6,
        win_rate_all=5 / 8,
        recovered_pooled=1 - 14.5 / 21,
        recovered_pooled_all=1 - 23.5 / 23,
        recovered_median=0.5,  # of −1/3, −1/6, 0.5, 0.5, 0.75, 0.8
        n_atoms_often=1,
        n_firings_often=5,
        per_atom_win_rate=4 / 5,
        strict_order_rate=2 / 5,  # atom < nothing < random: rows 2 and 7
        projected_win_rate=2 / 5,  # rows 2 and 3
        failure_by_quartile=[0, 0.5, 0, 1],  # 2, 2, 1, 1 firings
        win_ci95=writesae.wilson(4, 6),
        win_ci95_by_atom=(0.8, 0.8),  # one is drawn
    )
    wins = torch.tensor([1, 1, 0, 0, 1, 1])
    file = torch.tensor([0, 1, 1, 2, 3, 3])
    assert f["win_ci95_by_file"] == writesae.cluster_bootstrap(wins, file, rng(0))
    assert f["median_kl"]["delete"] == 3
    assert_figures(f["by_horizon"][3], win_rate=4 / 6)
    strict = {row["cosine_min"]: row for row in f["by_coverage"]}[0.8]
    assert strict["coverage"] == 4 / 8
    assert strict["win_rate"] == 3 / 4


def test_what_learning_adds_by_hand():
    """The null wins at the first and the last of four positions, and fires at the first alone."""
    effects = dict(kl_atom=[1, 1, 1, 5], kl_delete=[2, 2, 2, 2], kl_untrained=[1, 3, 3, 1])
    match = dict(a_atom=[1.0] * 4, cosine_atom=[0.8] * 4)
    match |= dict(a_untrained=[1.0] * 4, cosine_untrained=[0.9, 0.1, 0.1, 0.1])
    f = writesae.untrained_figures(made_up_table(**effects, **match), 0.71, rng(0))
    assert (f["coverage"], f["win_rate"], f["win_rate_all"]) == (0.25, 1, 0.5)
    assert (f["win_gain_all"], f["kl_left_all"]) == (pytest.approx(3 / 4 - 2 / 4), 8 / 8)
    assert f["win_gain_all_ci95"] == (0, 0.5)  # two files, with gains 0.5 and 0


def test_intervals_by_hand():
    textbook = pytest.approx((0.8256, 0.9448), abs=1e-3)
    assert writesae.wilson(90, 100) == textbook
    assert all(math.isnan(x) for x in writesae.wilson(0, 0))
    two = torch.tensor([1.0, 1, 0, 0]), torch.tensor([0, 0, 1, 1])
    assert writesae.cluster_bootstrap(*two, rng(0)) == (0, 1)  # the mean can be either
    values = torch.arange(60).float()
    pick = torch.randint(60, (1000, 60), generator=rng(1))
    expected = np.percentile(values[pick].mean(1).numpy(), [2.5, 97.5])
    ours = writesae.cluster_bootstrap(values, torch.arange(60), rng(1))
    assert ours == pytest.approx(expected, rel=1e-4)


@given(SEED)
def test_a_random_direction_at_its_own_coefficient_is_nearer_than_nothing(seed):
    """‖X − aA‖² = ‖X‖² − a² for any unit A: why a rate needs the projected control beside it."""
    cell = tiny_cell("mamba2", B=30, T=24)._replace(rng=rng(seed))
    p = next(writesae.points(cell))
    part = dict(index_atom=torch.zeros(30, dtype=torch.long), a_atom=torch.ones(30))
    put_in = writesae.controls(cell, p, ("atom", cell.sae), part)
    X = p.write()
    left = X.minus(put_in["projected"])
    assert (inner(left, left) <= inner(X, X) * (1 + 1e-5)).all()
    index, a, _ = cell.sae.dominant(put_in["random"])
    assert (index != 0).all(), "the random atom is another one"
    assert_close(a, torch.ones(30), msg="... with the same coefficient")


# --------------------------------------------------------------------------------------------------
# The logit-change formula
# --------------------------------------------------------------------------------------------------
@given(KIND, SEED, SIZE, SIZE, st.floats(1e-3, 1e3), st.integers(1, 3))
def test_the_recurrence_is_linear_so_the_formulas_state_part_is_exact(kind, seed, K, V, size, rank):
    """At any size of the edit no order is lost there: to 1e-5 of the largest."""
    s = random_steps(kind, seed, T=11, H=1, K=K, V=V)
    s = StepInputs(*(None if x is None else x.double() for x in s))
    keys, values = (torch.randn(2, rank, n, generator=rng(seed)).double() for n in (K, V))
    change = Factored(keys, size * values)
    edited, _ = recurrence(s.times(1), states(s)[:, 0] + change.matrix()[:, None])
    exact = edited[:, :, 0] - recurrence(s)[0][:, 1:, 0]
    predicted = writesae.moved_reads(change, s)[:, 1:]
    assert (exact - predicted).abs().max() <= 1e-5 * exact.abs().max()


def ladder_case(kind: str, size: float = 1.0):
    """A point of a tiny model in float64, a rank-1 change of a head's state there, three tokens."""
    cell = tiny_cell(kind, B=4, head=2)
    cell.model.double()
    p = next(writesae.points(cell))
    mixer = cell.model.layers[1].mixer
    value = torch.randn(4, 1, mixer.V, generator=rng(1)).double()
    if kind == "rwkv7":  # its norm takes the mean out: keep it out of the edit
        value = value - value.mean(-1, keepdim=True)
    change = Factored(torch.randn(4, 1, mixer.K, generator=rng(0)).double(), size * value)
    return p, change, p.logp[:, 0].topk(3).indices


def rungs_of(p, change, targets) -> dict:
    predicted, measured = writesae.logit_ladder(p, change, targets)
    return dict(zip(writesae.RUNGS, predicted.unbind(1))) | dict(measured=measured)


@EACH_KIND
def test_the_ladder_is_exact_to_the_order_it_claims(kind):
    """Errors of an exact first order fall with the square of the edit's size, of a second order
    with the cube: halve the edit, and compare."""
    big, small = (rungs_of(*ladder_case(kind, size)) for size in (2e-3, 1e-3))
    assert big["measured"].norm() > 1e-5

    def errors(name):
        return [(r[name] - r["measured"]).norm().item() for r in (big, small)]

    for name, order in writesae.RUNGS.items():
        error, half = errors(name)
        if order:
            falls = math.log2(error / half)
            assert abs(falls - order - 1) < 0.25, f"{name} is of order {falls - 1:.2f}"
        else:
            assert error > 3 * errors("full Jacobian")[0], f"{name} leaves nothing out"
    same = torch.equal(big["three factors"], big["exact transition"])
    assert same == (kind == "mamba2"), "without an erase the gates are the transition"


class Fixed(torch.nn.Module):
    """A norm whose statistics stay what they are at x: its value there plus weight/std · δx."""

    def __init__(self, norm, x):
        super().__init__()
        centre = x.mean(-1, keepdim=True) if isinstance(norm, torch.nn.LayerNorm) else 0
        weight = norm.weight + getattr(norm, "offset", 0)
        variance = (x - centre).square().mean(-1, keepdim=True)
        self.x, self.at_x, self.slope = x, norm(x), weight / (variance + norm.eps).sqrt()

    def forward(self, x):
        return self.at_x + self.slope * (x - self.x)


@EACH_KIND
@pytest.mark.parametrize("rung", ["gated", "gated and scaled"])
def test_gated_rungs_are_the_direct_path_with_the_norms_scale_held_fixed(kind, rung, monkeypatch):
    """Held at what it is natively, or for "gated" at one and with no final norm."""
    p, change, targets = ladder_case(kind)
    expected = rungs_of(p, change, targets)[rung]
    model = p.cell.model
    block = model.layers[1]
    scaled = rung == "gated and scaled"
    last, _ = model.run(p.stream, p.cache, first=1)
    gate, scale = block.mixer.gate_and_scale(p.o, p.rest)
    held = gate, scale if scaled else torch.ones_like(scale)
    norm = Fixed(model.norm, last.x) if scaled else torch.nn.Identity()
    monkeypatch.setattr(block.mixer, "gate_and_scale", lambda o, rest: held)
    monkeypatch.setattr(model, "norm", norm)
    monkeypatch.setattr(writesae, "norm_slope", lambda norm, x: x)  # not what is looked at now
    assert_close(rungs_of(p, change, targets)["direct path"], expected)


def test_agreement_by_hand():
    """y = 1, 2, 3 predicted as 1, 2, 5: R² = 1 − 4/2 = −1, slope 20/30, all signs right."""
    fit = writesae.agreement(torch.tensor([1.0, 2, 3]), torch.tensor([1.0, 2, 5]))
    assert fit == dict(r2=pytest.approx(-1), slope=pytest.approx(20 / 30), sign_agreement=1)


# --------------------------------------------------------------------------------------------------
# Steering
# --------------------------------------------------------------------------------------------------
HEADS = [(1, 0), (1, 2), (2, 1)]


def steering_case(kind: str):
    """A tiny model, two prompts, three pairs of a prompt and a target."""
    columns = torch.tensor([[0, 1, 1], [7, 20, 33], [0, 0, 1]])
    pairs = dict(zip(("prompt", "target", "stratum"), columns))
    return tiny_model(kind), random_tokens(0, T=12), pairs


def decode(model, tokens, edits=(), first=None):
    """20 tokens by whole passes from the first one, and the log-probabilities of each step."""
    log_p = []
    for i in range(writesae.NEW):
        log_p.append(model(tokens, edits=edits)[0][:, -1].log_softmax(-1))
        new = first if i == 0 and first is not None else log_p[-1].argmax(-1)
        tokens = torch.cat([tokens, new[:, None]], 1)
    return tokens[:, -writesae.NEW :], torch.stack(log_p, 1)


def of_tokens(log_p, tokens):
    """Of log-probabilities [N, n, vocab] the tokens' [N, n]."""
    return log_p.gather(-1, tokens[..., None])[..., 0]


@EACH_KIND
@pytest.mark.parametrize("key, value", [("write", "formula"), ("read", "gated")])
def test_steering_is_a_full_forward_pass_with_edits(kind, key, value):
    """Every column of `steer`, and the score of a memory, against passes from the first token."""
    model, tokens, pairs = steering_case(kind)
    table = writesae.steer(model, tokens, pairs, Steering(HEADS, key, value, 3.0))
    tokens = tokens[pairs["prompt"]]
    target = pairs["target"]
    prompts = writesae.read_prompts(model, tokens, HEADS)
    keys = writesae.edit_keys(prompts.s, key)
    values = writesae.steering_values(prompts, keys, target, value, 3.0, False, None)
    edits = []
    for c, (layer, head) in enumerate(HEADS):
        edits += [Edit(layer, head, 9 + t, keys[:, t, c], values[:, t, c]) for t in range(3)]
    unedited, _ = decode(model, tokens)
    said, _ = decode(model, tokens, edits)
    kept, log_p = decode(model, tokens, edits, unedited[:, 0])
    without, judge = decode(model, tokens, first=target)
    differ = (said != without).any() and ((said != kept).any() or kind == "gdn")
    assert differ, "a case where what is said, kept and forced is not the same"
    states = []
    for some in ((), edits):
        _, cache = model(tokens, edits=some)
        all_states = [cache.layers[i]["state"].flatten(1) for i in model.recurrent_layers]
        states.append(torch.cat(all_states, 1))
    judge_said = model(torch.cat([tokens, said], 1))[0][:, 11:-1].log_softmax(-1)
    log_p = of_tokens(log_p, target[:, None].expand(-1, 20))
    expected = dict(said=said, kept=kept, log_p=log_p)
    expected["size"] = (states[1] - states[0]).norm(dim=1) / states[0].norm(dim=1)
    expected["nll"] = -of_tokens(judge_said, said).mean(1)
    expected["nll_forced"] = -of_tokens(judge, without).mean(1)
    assert_columns(table, expected, atol=2e-4, rtol=1e-3)
    log_p = model(torch.cat([tokens, unedited], 1), edits=edits)[0][:, 11:-1].log_softmax(-1)
    chance = 0  # of leaving the unedited tokens for the target, at step 2, 3, ..., 20
    for n in range(1, writesae.NEW):
        way = of_tokens(log_p[:, 1:n], unedited[:, 1:n]).sum(1)
        chance = chance + (way + of_tokens(log_p[:, n], target)).exp()
    score = writesae.score(prompts, keys, values, target, "memory")
    assert_close(score.exp(), chance, atol=1e-5, rtol=1e-3)


@EACH_KIND
def test_an_edit_of_zero_size_changes_nothing_and_none_leaks(kind, monkeypatch):
    """So its `persists` is the unedited rate; and a later run does not know of an earlier edit."""
    monkeypatch.setattr(writesae, "NEW", 8)
    case = steering_case(kind)
    native = writesae.steer(*case, Steering(HEADS))
    for value in ("random", *writesae.VALUE_SIDES):
        nothing = writesae.steer(*case, Steering(HEADS, value=value, size=0.0))
        assert all(torch.equal(x, native[name]) for name, x in nothing.items()), value
    assert torch.equal(writesae.persists(nothing), writesae.persists(native))
    edited = writesae.steer(*case, Steering(HEADS, value="gated", size=5.0))
    assert (edited["size"] > 0).all()
    again = writesae.steer(*case, Steering(HEADS))
    assert all(torch.equal(x, again[name]) for name, x in native.items())


def test_what_appears_and_what_persists_by_hand():
    """Said at once and never again; said at step 3 though the first token is forced; not at all."""
    said, kept = torch.zeros(2, 3, writesae.NEW, dtype=torch.long)
    said[0, 0], kept[0, 0], said[1, 4], kept[1, 2] = 7, 7, 7, 7
    table = dict(target=torch.full((3,), 7), said=said, kept=kept)
    assert writesae.appears(table).tolist() == [True, True, False]
    assert writesae.persists(table).tolist() == [False, True, False]
    tables = []
    for perplexity, log_p in ((2.0, 1.0), (3.0, 0.0), (5.0, 0.5)):  # edited, native, random
        nll = torch.full((3,), math.log(perplexity))
        own = dict(nll=nll, nll_forced=nll + math.log(10), log_p=torch.full((3, 20), log_p))
        tables.append(table | own)
    figures = writesae.steering_figures(*tables)
    assert figures["said_at"] == [0, 0, 1] + 17 * [0]
    assert figures["n_pairs"] == 3
    assert_figures(
        figures,
        persists_rate=1 / 3,
        edited_rate=2 / 3,
        first_step_lift_nats=1,
        edited_perplexity=2,
        native_perplexity=3,
        random_perplexity=5,
        forced_perplexity=20,
        persists_ci95=writesae.wilson(1, 3),
    )


@EACH_KIND
@pytest.mark.parametrize("what", ["logit", "log_p", "memory"])
def test_gradients_are_what_finite_differences_say(kind, what):
    """Along a random change of all values, from zero and from elsewhere: to 1e-6, in float64."""
    model, tokens, pairs = steering_case(kind)
    prompts = writesae.read_prompts(model.double(), tokens[pairs["prompt"]], HEADS)
    keys = writesae.edit_keys(prompts.s, "write")
    target = pairs["target"]

    how = prompts, keys, target, "random", 1.0, False
    step, elsewhere = (writesae.steering_values(*how, rng(seed)) for seed in (0, 1))
    for at in (0 * step, elsewhere):
        ends = [at + 1e-4 * step, at - 1e-4 * step]
        up, down = (writesae.score(prompts, keys, values, target, what) for values in ends)
        rise = writesae.gradient(prompts, keys, at, target, what) * step
        assert_close(rise.sum((1, 2, 3)), (up - down) / 2e-4, atol=1e-7, rtol=1e-6)


class HandMade(torch.nn.Module):
    """One head of 2 x 1: always writes under the key (1, 0), forgets half at each step, reads with
    q, and hands gate · o to an output map (1, −1)."""

    heads = 1
    K = 2
    V = 1

    def __init__(self, q: float, gate: float):
        super().__init__()
        self.q, self.gate, self.out_proj = [q, 0.0], gate, torch.nn.Linear(1, 2, bias=False)
        self.out_proj.weight.data = torch.tensor([[1.0], [-1.0]])

    def inputs(self, h, cache, v_first=None):
        rows = map(torch.tensor, (self.q, [1.0, 0.0], [2.0], [math.log(0.5)]))
        return StepInputs(*(x.expand(*h.shape[:2], 1, -1) for x in rows)), None, {}

    def gate_and_scale(self, o, rest):
        return torch.full_like(o, self.gate), torch.ones_like(o)

    def output(self, o, rest):
        return self.out_proj(self.gate * o[:, :, 0])


@pytest.mark.parametrize("query", [1.0, -1.0])
@pytest.mark.parametrize("gate", [1.0, -3.0])
@pytest.mark.parametrize("target, sign", [(0, 1.0), (1, -1.0)])
def test_the_formulas_directions_by_hand(query, gate, target, sign):
    """Two tokens, logits (x_0, x_1), and the head writes gate · (o, −o) into x.

    An edit of value y at the last of two positions is read once, with gain 2 · query (the key is as
    long as the write, 2), at the one before it with half of that. So the target's logit rises by
    sign · gate · gain with y. "gated" says so; the three factors leave out the gate, and so point
    the wrong way where it is negative.
    """
    nothing = torch.nn.Identity()
    layers = [Block(HandMade(query, gate), nothing)]
    model = LanguageModel("hand", 2, 2, layers, nothing, tied=False).requires_grad_(False)
    model.lm_head.weight.copy_(torch.eye(2))
    prompts = writesae.read_prompts(model, torch.tensor([[0, 1, 0]]), [(0, 0)], 2)
    keys = writesae.edit_keys(prompts.s, "write")
    target = torch.tensor([target])
    three = sign * torch.tensor([query, 2 * query])
    for gated, expected in ((False, three), (True, gate * three)):
        rise = writesae.formula_slopes(prompts, keys, target, gated).flatten()
        assert torch.equal(rise, expected), "does the gate belong into this one?"
    measured = writesae.gradient(prompts, keys, torch.zeros(1, 2, 1, 1), target, "logit")
    assert_close(measured.flatten(), gate * three)


def test_read_key_by_hand():
    """Reads (−1, 0) at once and (0, 1) after a decay of ½: (−1, 0) is heard with gain 1, then 0."""
    q = torch.tensor([[-1.0, 0], [0, 1]])[None, :, None]
    s = StepInputs(q, q, q, torch.full((1, 2, 1, 1), math.log(0.5)))
    key = written(writesae.read_key(s), "a unit key for each head, [N, C, K]")[0, 0].tolist()
    along = [abs(x) for x in key]
    assert along == pytest.approx([1, 0], abs=1e-6), "the decay before each read?"
    assert key[0] < 0, "of the two signs the one with which the gains sum to more than 0"


@EACH_KIND
def test_read_key_is_the_one_that_coming_reads_weigh_most(kind):
    """No random key of its length has larger squared gains; at the last position: the query."""
    model, tokens, _ = steering_case(kind)
    s = writesae.read_prompts(model, tokens, HEADS).s
    keys = writesae.edit_keys(s, "read")
    norm = s.k.norm(dim=-1) * s.v.norm(dim=-1)
    hint = "a unit key, times ‖k‖‖v‖ of the write beside it"
    assert_close(keys.norm(dim=-1), norm, msg=hint)
    along = F.cosine_similarity(keys[:, -1], s.q[:, -1], dim=-1)
    hint = "one read is left: along its query, sign included"
    assert_close(along, torch.ones(2, 3), msg=hint)
    for t in range(3):
        others = F.normalize(torch.randn(50, *keys[:, t].shape, generator=rng(t)), dim=-1)
        each = (keys[:, t], *(norm[:, t, :, None] * others))
        heard = torch.stack([propagate(key, s.times(t))[0].square().sum(1) for key in each])
        louder = "a random key is heard better: the largest eigenvector of Σ b bᵀ?"
        assert (heard[0] >= heard.amax(0) * (1 - 1e-4)).all(), louder


def test_heads_can_be_named_in_any_order():
    model, tokens, pairs = steering_case("gdn")
    names = Steering(HEADS, value="gradient"), Steering(HEADS[::-1], value="gradient")
    one, other = (writesae.steer(model, tokens, pairs, edit) for edit in names)
    assert all(torch.equal(one[name], other[name]) for name in one)


@given(SEED, st.floats(0.1, 9))
def test_sizes_are_what_they_say(seed, size):
    """Each edit's length is the size; as a budget, squares of a prompt's lengths sum to size²."""
    values = torch.randn(2, 3, 4, 5, generator=rng(seed))
    each, shared = (writesae.sized(values, size, budget) for budget in (False, True))
    assert_close(each.norm(dim=-1), torch.full((2, 3, 4), size))
    assert_close(shared.flatten(1).norm(dim=1), torch.full((2,), size))
    assert_close(F.normalize(shared.flatten(1)), F.normalize(values.flatten(1)))


def test_ascents_climb_what_they_are_told_to_climb():
    model, tokens, pairs = steering_case("gdn")
    prompts = writesae.read_prompts(model, tokens[pairs["prompt"]], HEADS)
    keys = writesae.edit_keys(prompts.s, "write")
    target = pairs["target"]
    reached = {}
    for kind in ("gradient", "ascent", "memory"):
        values = writesae.steering_values(prompts, keys, target, kind, 2.0, False, None)
        for what in ("log_p", "memory"):
            reached[kind, what] = writesae.score(prompts, keys, values, target, what)
    assert (reached["ascent", "log_p"] > reached["gradient", "log_p"]).all()
    assert (reached["memory", "memory"] > reached["ascent", "memory"]).all()


def test_targets_are_unique_and_of_their_stratum():
    logits = torch.randn(6, 3000, generator=rng(0))
    tokens = random_tokens(0, B=6, T=400, vocab=3000)
    pairs = writesae.draw_targets(lambda _: (logits[:, None], None), tokens, 3, rng(0))
    rows = rows_of(pairs)
    assert len(set(rows)) == len(rows) == 36
    for prompt, target, stratum in rows:
        rank = 1 + int((logits[prompt] > logits[prompt, target]).sum())
        assert 100 <= rank <= 1000
        assert (target in tokens[prompt].tolist()) == (stratum == 0)


@pytest.mark.parametrize("first", [0, 7, 24, 25])
def test_the_least_budget_is_found_on_search_prompts_and_told_of_the_others(first):
    """Made-up edits persist from one budget on: on all search prompts, half of the unseen ones."""

    def edit(pairs, value, key, size, budget):
        works = value == "memory" and budget and size >= (run.BUDGETS + [math.inf])[first]
        kept = torch.zeros(4, writesae.NEW, dtype=torch.long)
        zeros = torch.zeros(4)
        kept[: 4 if pairs["side"] == "search" else 2, 5] = 7 if works else 0
        table = dict(target=torch.full((4,), 7), stratum=torch.tensor([0, 1, 0, 1]))
        table |= dict(kept=kept, said=kept, log_p=torch.zeros(4, 20))
        return table | dict(nll=zeros, nll_forced=zeros, size=zeros)

    search = dict(side="search", target=range(4))
    unseen = dict(side="unseen")
    found = run.least_budget(edit, search, unseen, "read")
    assert found["found"] == (first < 25)
    assert found["magnitude"] == run.BUDGETS[min(first, 24)]
    assert [s["persists_rate"] for s in found["strata"]] == [0.5 * (first < 25)] * 2
    assert len(found["search_rates"]) <= 5


# --------------------------------------------------------------------------------------------------
# Firings, erasing, a population of atoms
# --------------------------------------------------------------------------------------------------
def test_codes_say_of_every_write_what_encode_says_and_firings_are_those_near_enough():
    cell = tiny_cell("rwkv7", B=10, T=15, positions=[3, 7, 8], head=2, cosine_min=0.2)
    random_metric(cell.sae, 0)
    table = writesae.codes(cell)
    s = native_inputs(cell)
    X = write_of(s.k[:, :, 0].flatten(0, 1), s.v[:, :, 0].flatten(0, 1))
    index, a, A = cell.sae.dominant(X)
    cosine = F.cosine_similarity(A.matrix().flatten(1), X.matrix().flatten(1))
    i = torch.arange(150)
    expected = dict(passage=i // 15, position=i % 15, token=cell.tokens.flatten())
    expected |= dict(index=index, a=a, cosine=cosine)
    assert_columns(table, expected, atol=1e-5, rtol=1e-4)
    rows = rows_of(table)
    where = [i for i in range(150) if i % 15 in (3, 7, 8) and cosine[i] >= 0.2 and a[i] > 0]
    assert 0 < len(where) < 30, "a case where some fire and some do not"
    assert rows_of(writesae.firings(cell, table)) == [rows[i] for i in where]


@EACH_KIND
def test_what_is_collected_are_the_writes_and_every_sixteenth_state(kind):
    cell = tiny_cell(kind, B=3, T=34, head=2)
    s = native_inputs(cell)
    (writes,) = writesae.collect(cell.model, cell.tokens, 1, [2], skip=4)
    expected = write_of(s.k[:, 4:, 0].flatten(0, 1), s.v[:, 4:, 0].flatten(0, 1))
    assert_close(writes.matrix(), expected.matrix())
    (found,) = writesae.collect(cell.model, cell.tokens, 1, [2], "state")
    expected = states(s)[:, [15, 31], 0].flatten(0, 1)
    assert_close(found.matrix(), expected, atol=1e-4, rtol=1e-4)


def test_an_atom_described_by_hand():
    """Three firings at tokens 5, 5 and 8 of two files; token 9 loses 3 nats, by chance one 1."""
    tokens = torch.tensor([[1, 5, 1, 5, 2, 3], [2, 8, 4, 4, 4, 4]])
    cell = tiny_cell("gdn", B=2)._replace(tokens=tokens, file=torch.tensor([0, 1]))
    decode = models.Tokenizer(None, lambda ids: " ".join(map(str, ids)))
    passage = torch.tensor([0, 0, 1])
    position = torch.tensor([1, 3, 1])
    at = dict(passage=passage, position=position, token=tokens[passage, position])
    at |= dict(index=torch.tensor([7] * 3), cosine=torch.tensor([0.8, 0.8, 0.5]))
    lost, control = torch.zeros(2, 3, 20)
    lost[:, 9], control[:, 4] = -3, torch.tensor([-2.0, -1, 0])
    corpus = run.Corpus(decode, {}, torch.device("cpu"))
    d = run.describe(cell, corpus, at, lost, control)
    assert (d["atom"], d["n_firings"], d["n_files"]) == (7, 3, 2)
    assert (d["token"], d["after"], d["promoted"][0]) == ("5", "1", "9")
    shares = d["token_purity"], d["after_share"], d["cosine"]
    assert shares == pytest.approx((2 / 3, 2 / 3, 0.7))
    assert (d["promoted_nats"][0], d["random_nats"]) == (-3, -1)
    assert d["contexts"] == ["1⟦5⟧1 5 2 3", "2⟦8⟧4 4 4 4"]


@EACH_KIND
@pytest.mark.parametrize("batch_bytes", [1, writesae.BATCH_BYTES])
def test_taking_an_atom_out_is_a_full_forward_pass_with_the_edit(kind, batch_bytes, monkeypatch):
    monkeypatch.setattr(writesae, "BATCH_BYTES", batch_bytes)
    cell = tiny_cell(kind, B=4, T=30, head=2)
    at = writesae.some_rows(writesae.codes(cell), torch.tensor([2 * 30 + 9, 5, 3 * 30 + 9]))
    A = cell.sae.decode(at["index"][:, None], at["a"][:, None])
    change = writesae.taken_out(cell, at, A)
    for i, (passage, t) in enumerate([(2, 9), (0, 5), (3, 9)]):
        minus_A = A.rows(slice(i, i + 1)).times(-torch.ones(1))
        row = [passage]
        expected = whole_pass(cell, t, minus_A, row) - whole_pass(cell, t, rows=row)
        assert_close(change[i], expected[0].mean(0), atol=2e-5, rtol=1e-3)


def test_what_is_chosen_and_what_is_tested_share_no_file():
    side = writesae.every_second(torch.tensor([4, 4, 9, 9, 9, 11]))
    assert side.tolist() == [True, True, False, False, False, True]
    with pytest.raises(InputError, match="folder"):
        writesae.every_second(torch.tensor([3, 3]))


def erasing_case(kind: str, seed: int, B: int) -> Cell:
    """Three atoms that fire wherever they are dominant."""
    return tiny_cell(kind, seed, B, 24, [9, 12], n=3, cosine_min=0.0)


@EACH_KIND
def test_erasing_takes_what_it_says_out_where_it_says(kind, monkeypatch):
    """Every second file chooses atoms and tokens, the others are tested; of equal norm all four."""
    cell = erasing_case(kind, 0, B=16)
    real = writesae.taken_out
    taken = []

    def taken_out(cell, at, X):
        taken.append((at, X))
        return real(cell, at, X)

    monkeypatch.setattr(writesae, "taken_out", taken_out)
    table = writesae.erasure(cell, 2)
    dominant = writesae.codes(cell)["index"].view(16, 24)
    passage, position, index = (table[name] for name in ("passage", "position", "index"))
    assert len(index) > 5
    assert set(table["file"].tolist()) <= {1, 3, 5, 7}
    assert torch.equal(table["file"], cell.file[passage])
    assert torch.equal(dominant[passage, position], index)
    A = cell.sae.decode(index[:, None], table["a"][:, None])
    norm = table["a"]
    ((at, X),) = taken  # all four at once
    quarters = torch.arange(4 * len(index)).chunk(4)
    taken = [(writesae.some_rows(at, i), X.rows(i)) for i in quarters]
    for at, X in taken:
        assert torch.equal(at["position"], position)
        assert_close(inner(X, X).sqrt(), inner(A, A).sqrt(), msg="all are as large as a A")
    for (at, X), name in zip(taken, ("atom", "random", "other", "elsewhere")):
        there = table[name].isfinite()  # an atom may fire in every passage
        assert torch.equal(at["passage"], passage) or name == "elsewhere"
        change = of_tokens(real(cell, at, X), table["promoted"])
        assert_close(table[name][there], change[there], atol=1e-6, rtol=1e-4)
        overlap = inner(X, A) / norm**2
        assert (overlap > 0.999).all() == (name in ("atom", "elsewhere"))
    assert there.any()
    assert (dominant[at["passage"], position] != index)[there].all()
    assert (at["passage"][there] // 2 % 2 == 1).all(), "elsewhere is in the tested files too"


@EACH_KIND
def test_the_promoted_token_is_the_formulas_in_the_choosing_files(kind):
    """By the rung "gated" of every firing there, one by one; the atoms fire in most files."""
    cell = erasing_case(kind, 0, B=16)
    vocab = torch.arange(61)[None]
    at = writesae.firings(cell, writesae.codes(cell))
    table = writesae.erasure(cell, 2)
    rise = torch.zeros(3, 61)
    files = {i: set() for i in range(3)}
    for passage, t, index in rows_of({x: at[x] for x in ("passage", "position", "index")}):
        if passage // 2 % 2 == 0:
            one = cell._replace(tokens=cell.tokens[passage, None], positions=[t])
            p = next(writesae.points(one))
            rise[index] += rungs_of(p, p.stand_in(cell.sae)[2], vocab)["gated"].mean(1)[0]
            files[index].add(passage // 2)
    promoted = dict(zip(table["index"].tolist(), table["promoted"].tolist()))
    assert promoted
    assert all(rise[i].argmax() == token for i, token in promoted.items())
    often = sorted(map(len, files.values()))[1]
    assert all(len(files[i]) >= often for i in promoted), "two of three: those in most files"


@settings(max_examples=6)
@given(KIND, SEED)
def test_a_random_direction_under_the_erasing_protocol_is_centred_on_zero(kind, seed):
    """No edit had a say in the token: half of the changes are falls."""
    cell = erasing_case(kind, seed, B=30)
    cell = cell._replace(positions=range(4, 12), file=torch.arange(30) // 10)
    x = writesae.erasure(cell)["random"]
    low, high = writesae.wilson(int((x < 0).sum()), len(x), z=4)
    assert len(x) > 30 and low < 0.5 < high, f"{(x < 0).float().mean():.3f} of {len(x)} fall"
    assert x.median().abs() < 0.25 * x.abs().mean()


def test_erasing_figures_by_hand():
    """Two files; elsewhere is not known once."""
    columns = dict(atom=[-3.0, -1, 1], random=[0.0, 0, 1], other=[1.0, 2, 3])
    columns |= dict(elsewhere=[-5.0, math.nan, 5], file=[0, 1, 1])
    table = {name: torch.tensor(x) for name, x in columns.items()}
    f = writesae.erasure_figures(table, rng(0))
    assert_figures(
        f,
        n_firings=3,
        n_files=2,
        firing_median=-1,
        firing_mean=-1,
        firing_falls=2 / 3,
        random_median=0,
        random_falls=0,
        other_atom_median=2,
        elsewhere_falls=0.5,
        effect=-4 / 3,
        effect_ci95=(-3, -0.5),  # by file −3 and −1/2
    )


def test_population_by_hand():
    """Atom 0 fires six times, four of them on token 9; atom 1 once; a weak match is no firing."""
    table = dict(index=[0] * 6 + [1, 1], token=[9, 9, 9, 9, 2, 3, 7, 7])
    table |= dict(a=[1.0] * 8, cosine=[0.9] * 7 + [0.2])
    table = {name: torch.tensor(x) for name, x in table.items()}
    f = writesae.population_figures(table, 0.71)
    assert_figures(f, n_firings=7, n_atoms=2, n_atoms_often=1, often_share=6 / 7)
    assert_figures(f, token_purity=4 / 6)


@given(st.integers(0, 30))
def test_a_planted_mixture_is_recovered_and_one_gaussian_is_not_split(seed):
    x = 0.05 * torch.randn(400, generator=rng(seed))
    near = 0.8 + x[:300]
    far = 0.3 + x[300:]
    both = writesae.two_gaussians(torch.cat([near, far]))
    assert both["mean"] == pytest.approx([0.8, 0.3], abs=0.02)
    assert both["deviation"] == pytest.approx([0.05, 0.05], abs=0.02)
    assert abs(both["n"][0] - 300) < 10
    assert both["delta_bic"] < -100
    assert writesae.two_gaussians(near)["delta_bic"] > -15
    np_rng = np.random.default_rng(seed)
    one_peak = torch.tensor(np_rng.beta(5, 2, 4000))
    assert writesae.two_gaussians(one_peak)["delta_bic"] < 0, "skew alone is no second group"


def test_a_passage_with_its_atoms_in_place_is_a_full_forward_pass_with_edits():
    """Bits per token with all firings' writes deleted, or replaced by their atoms: plain edits."""
    cell = tiny_cell("gdn", 5, T=30, positions=range(4, 29), head=2, cosine_min=0.25)
    table = writesae.passage_test(cell)
    s = native_inputs(cell)
    n_firings = 0
    edits = dict(native=[], delete=[], atom=[])
    for t in cell.positions:
        X = write_of(s.k[:, t, 0], s.v[:, t, 0])
        _, a, A = cell.sae.dominant(X)
        fires = ((a > 0) & (writesae.cosine(A, X) >= 0.25)).float()
        edits["delete"] += edits_of(cell, t, X.times(-fires))
        edits["atom"] += edits_of(cell, t, A.minus(X).times(fires))
        n_firings = n_firings + fires
    assert table["firings"].tolist() == n_firings.tolist()
    assert 0 < n_firings.sum() < 3 * 25
    for name, some in edits.items():
        logp = cell.model(cell.tokens, edits=some)[0][:, 4:-1].log_softmax(-1)
        bits = -of_tokens(logp, cell.tokens[:, 5:]).mean(1) / math.log(2)
        assert_close(table["bits_" + name], bits, atol=1e-4, rtol=1e-4, msg=name)
    assert (table["bits_atom"] != table["bits_random"]).all()


# --------------------------------------------------------------------------------------------------
# Wrong inputs: one line, status 2, nothing written
# --------------------------------------------------------------------------------------------------
@given(
    st.sampled_from(["cut", "a flipped bit", "another cfg"]),
    st.integers(0, 10**6),
    st.sampled_from(["n_atoms", "K", "active", "encoder", "decoder", "sparsity"]),
    st.sampled_from([None, "x", [], -1, 0, 1.5, 10**12, 7, {"a": 1}]),
)
def test_a_damaged_sae_is_refused_or_does_no_harm(tmp_path_factory, damage, where, key, value):
    path = tmp_path_factory.mktemp("sae") / "a.safetensors"
    sae = random_sae(0)
    if damage == "another cfg":
        sae.cfg[key] = value
    sae.save(path)
    path.write_bytes(damaged(path.read_bytes(), damage, where))
    try:
        again = WriteSAE.load(path)
        assert again.encode(random_writes(0))[1].shape[0] == 9
    except InputError as error:
        assert "\n" not in str(error)


WRONG = {  # a command line (GDN: --model gdn) -> what its one line of error says
    "replace GDN --layer 3": "full attention.*recurrent layers: 0, 1, 2",
    "replace GDN --layer first": "a number or all",
    "replace GDN --head 4": "heads 0..3",
    "replace GDN --text no-such-file": "cannot be read",
    "replace GDN --text SHORT": "passages of 128 tokens",
    "replace GDN --text BYTES": "not UTF-8",
    "replace GDN --text FOLDER": "holds no UTF-8 text file",
    "replace GDN --sae SHORT": "is it a WriteSAE.s file",
    "replace GDN --sae HERE/checkpoints/rwkv7/sae-L1H0.safetensors": "architecture rwkv7",
    "replace GDN --head 1 --sae HERE/checkpoints/gdn/sae-L1H0.safetensors": "head 0, here it is 1",
    "erase GDN --sae HERE/checkpoints/gdn/sae-state-L1H0.safetensors": "source state, here it is",
    "atoms GDN --quick --atom -1": "allowed are 0 to 16383",
    "replace GDN --quick --json no-such-folder/x.json": "cannot be written",
    "replace --device abacus": "abacus",
    "replace --passages 0": "at least 1",
    "replace --magnitude 3": "unrecognized arguments: --magnitude",
    "formula GDN --cosine-min 1.1 --quick": "no atom fires",
    "steer GDN --prompt 'def f' --target 'not one token'": "3 tokens.*'not', ' one'",
    "steer GDN --prompt '' --target x": "give a --prompt and one token",
    "steer GDN --prompt x --target x": "1 tokens; its last 3 are edited",
    "steer GDN --prompt 'def f(x): return'": "give a --prompt and one token",
    "steer --magnitude nan": "finite",
    "steer --magnitude -1": "finite numbers from 0",
    "steer GDN --head all": "one cell",
    "erase GDN --cosine-min 2 --quick --passages 8": "no atom fires",
    "erase GDN --quick --plot x.png": "draws no picture",
    "atoms GDN --quick --atom 99999": "allowed are 0 to 16383",
    "train GDN": "exists; --force writes over it",
    "train GDN --head all --sae x.safetensors": "is one file, for one SAE",
    "train GDN --active 9 --atoms 4 --quick": "9 active atoms of 4",
    "replace --results SHORT": "cannot be read.*--json of this command",
    "replace --results no-such-file": "cannot be read.*--json of this command",
    "formula --results HERE/figures/replace.json": "cannot be read.*--json of this command",
    "replace --results HERE/figures/replace.json --plot x.png": "hold no point per firing",
    "pretrain --model gpt": "allowed are gdn",
    "pretrain GDN": "holds a model; --force",
    "pretrain GDN --out SHORT": "no folder can be made there",
    "picture": "--plot",
    "dance": "invalid choice",
}


@pytest.mark.parametrize("command", WRONG)
def test_a_wrong_command_ends_in_one_line(tmp_path, capsys, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "SHORT").write_text("too short")
    (tmp_path / "BYTES").write_bytes(b"\xff\xfe\x00abc")
    (tmp_path / "FOLDER").mkdir()
    (tmp_path / "HERE").symlink_to(HERE)
    assert run.main(shlex.split(command.replace("GDN", "--model gdn"))) == 2
    errors = re.findall("^error: .*", capsys.readouterr().err, re.M)
    assert len(errors) == 1 and re.search(WRONG[command], errors[0]), errors
    assert len(os.listdir(tmp_path)) == 4, "nothing is written"


def test_a_file_is_there_whole_or_not_at_all(tmp_path):
    path = tmp_path / "x.json"
    full = RuntimeError("No space left on device")
    path.write_text("old")
    for error, raised in ((KeyboardInterrupt(), KeyboardInterrupt), (full, InputError)):

        def fail(temporary):
            open(temporary, "w").write("half")
            raise error

        with pytest.raises(raised, match="No space left" if error is full else None):
            models.save_then_rename(fail, path)
        assert path.read_text() == "old"
        assert os.listdir(tmp_path) == ["x.json"]
    with pytest.raises(InputError, match="cannot be written"):
        models.write_text(tmp_path / "none/x.json", "new")


# --------------------------------------------------------------------------------------------------
# The commands, each with --quick
# --------------------------------------------------------------------------------------------------
def names_in(x, under="") -> set[str]:
    """Every name in a JSON value, after those that it stands under."""
    if isinstance(x, list):
        return set().union(*(names_in(y, under) for y in x))
    if not isinstance(x, dict):
        return set()
    here = {name: f"{under}.{name}" for name in x}
    return set(here.values()).union(*(names_in(x[name], path) for name, path in here.items()))


def quick(tmp_path, command: str, like: str = "") -> list[dict]:
    """What a command with --quick writes as JSON (OUT in it is the folder): all that stands in the
    shipped results `like`, too."""
    out = tmp_path / "out.json"
    words = shlex.split(command.replace("OUT", str(tmp_path)))
    assert run.main([*words, "--quick", "--json", str(out)]) == 0
    assert not list(tmp_path.glob("*.part"))
    results = json.loads(out.read_text())
    assert not like or names_in(json.loads(text_of(f"figures/{like}.json"))) <= names_in(results)
    return results


def is_png(path) -> bool:
    return path.read_bytes().startswith(b"\x89PNG")


def test_replace_end_to_end(tmp_path, capsys):
    files = "--records OUT/r.jsonl --plot OUT/r.png --markdown OUT/r.md"
    results = quick(tmp_path, f"replace --passages 4 {files}", "replace")
    assert [r["model"] for r in results] == list(ARCHITECTURES)
    for r in results:
        assert len(r["by_horizon"]) == 11
        assert r["win_rate_all"] > 0.7
        assert r["recovered_pooled_all"] > 0.3
        assert r["median_kl"]["native"] < 1e-4
        assert r["untrained"]["coverage"] < r["coverage"]
        assert r["by_coverage"][0]["coverage"] == 1
    lines = [json.loads(line) for line in (tmp_path / "r.jsonl").read_text().splitlines()]
    assert len(lines) == sum(r["n_positions"] for r in results)
    assert len(lines[0]["kl_atom"]) == 11
    assert is_png(tmp_path / "r.png")
    printed = capsys.readouterr().out
    table = (tmp_path / "r.md").read_text()
    assert "untrained writes" in printed and "the paper" in printed
    assert "## `python run.py replace --passages 4 --quick`" in table and "gdn L1H0" in table


def test_formula_end_to_end(tmp_path):
    (r,) = quick(tmp_path, "formula --model gdn --passages 4 --plot OUT/f.png", "formula")
    rungs = {rung["name"]: rung for rung in r["rungs"]}
    assert list(rungs) == list(writesae.RUNGS)
    assert is_png(tmp_path / "f.png")
    full = rungs["full Jacobian"]
    exact = rungs["exact head, mean of two"]
    assert full["r2_small"] > 0.99
    assert full["sign_agreement"] > 0.9
    assert exact["r2"] > 0.99
    assert exact["r2_delete"] > 0.9
    assert rungs["three factors"]["r2"] < 0.5
    fitted = [name for name, rung in rungs.items() if rung["fitted"]]
    assert fitted == ["three factors, fitted"]


def test_steer_end_to_end(tmp_path, monkeypatch):
    monkeypatch.setattr(writesae, "NEW", 8)
    steer = "steer --model gdn --passages 2"
    edits = {e["value"]: e for e in quick(tmp_path, f"{steer} --plot OUT/s.png", "steer")}
    assert list(edits) == list(writesae.VALUE_SIDES)
    assert is_png(tmp_path / "s.png")
    for s in edits["memory"]["strata"]:
        assert s["persists_rate"] == 1
        assert s["random_persists_rate"] <= s["native_persists_rate"] + 0.5
    assert edits["gradient"]["sign_rate"] > 0.7
    assert edits["memory"]["size"] > 0.5
    assert edits["ascent"]["strata"][0]["first_step_lift_nats"] > 2
    monkeypatch.setattr(run, "BUDGETS", [1.0, 8.0, 16.0])
    (least,) = quick(tmp_path, f"{steer} --smallest --key read")
    assert least["found"] and least["budget"]
    assert least["search_rates"][str(least["magnitude"])] == 1
    (shown,) = quick(tmp_path, f"{steer} --prompt 'def read(self, size):' --target ' not'")
    assert " not" in shown["texts"]["kept"]
    assert len(shown["p_target"]) == writesae.NEW


def test_erase_end_to_end(tmp_path):
    (r,) = quick(tmp_path, "erase --model rwkv7 --passages 24 --atoms 128 --saes OUT", "erase")
    assert r["n_firings"] == sum(a["n_firings"] for a in r["atoms"]) > 5
    assert r["effect"] < 0


def test_atoms_end_to_end(tmp_path, capsys):
    described = quick(tmp_path, "atoms --model gdn --passages 12 --plot OUT/a.png", "atoms")
    first = described[0]
    printed = capsys.readouterr().out
    assert all(len(d["contexts"]) <= 5 and "⟦" in d["contexts"][0] for d in described)
    bits = first["passage_test"]
    assert bits["bits_native"] < bits["bits_delete"] and f"{first['n_firings']}" in printed
    (one,) = quick(tmp_path, f"atoms --model gdn --passages 12 --atom {first['atom']}")
    assert one["atom"] == first["atom"]
    assert one["n_firings"] == first["n_firings"]
    assert is_png(tmp_path / "a.png")


@pytest.mark.parametrize("what", ["sizes", "active", "seeds"])
def test_compare_end_to_end(tmp_path, what, monkeypatch):
    monkeypatch.setattr(run, "COMPARED", dict(sizes=(64, 256), active=(1, 4), seeds=(0, 1)))
    monkeypatch.setattr(run, "CONTEXT", 128)
    small = f"compare --model mamba2 --passages 4 --what {what} --plot OUT/c.png"
    by_name = {row["name"]: row for row in quick(tmp_path, small, f"compare-{what}")}
    assert {row["trained"] for row in by_name.values()} == {True, False}
    if what == "sizes":
        assert by_name["256"]["fvu"] < by_name["64"]["fvu"] < by_name["64 untrained"]["fvu"]
    elif what == "active":
        one = by_name["1"]
        four = by_name["4"]
        assert one["whole_recovered_all"] == pytest.approx(one["recovered_pooled_all"])
        assert four["fvu"] < one["fvu"]
    else:
        assert by_name["seed 0"]["found_again"] > by_name["untrained 1"]["found_again"]


def test_cells_shared_out_by_torchrun_give_the_same_results(tmp_path):
    whose = dict(architecture="gdn", model="gdn", layer=1, seed=0, metric="read")
    for head in range(4):
        sae = WriteSAE(64, 32, 32, head=head, **whose)
        sae.start(torch.arange(64), random_writes(head, n=64, K=32, V=32))
        sae.save(tmp_path / f"sae-L1H{head}.safetensors")
    options = f"--model gdn --head all --layer 1 --quick --passages 4 --saes {tmp_path}"
    results = []
    for launcher in ("", "-m torch.distributed.run --nproc-per-node 2"):
        out = tmp_path / f"{len(results)}.json"
        words = [sys.executable, *launcher.split(), HERE / "run.py", "replace", *options.split()]
        how = dict(capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        done = subprocess.run([*words, "--json", out], **how)
        assert done.returncode == 0, done.stderr[-2000:]
        assert "4 cells: mean" in done.stdout
        results.append([r | dict(seconds=0) for r in json.loads(out.read_text())])
    assert [r["head"] for r in results[0]] == list(range(4))
    assert results[0] == results[1]


def test_training_writes_a_file_of_its_own_and_none_over(tmp_path):
    train = f"train --model gdn --head all --quick --atoms 32 --saes {tmp_path}".split()
    assert run.main(train) == 0
    files = sorted(tmp_path.iterdir())
    assert [f.name for f in files] == [f"sae-atoms-32-L1H{h}.safetensors" for h in range(4)]
    before = [f.stat().st_mtime_ns for f in files]
    files[3].unlink()
    assert run.main(train) == 0  # goes on where it was stopped
    after = [f.stat().st_mtime_ns for f in files]
    assert [i for i in range(4) if before[i] != after[i]] == [3]
    cfg = WriteSAE.load(files[2]).cfg
    assert (cfg["n_atoms"], cfg["head"]) == (32, 2)
    assert cfg["method"] == "alternating updates"


def test_training_comes_first_where_there_is_no_sae(tmp_path, capsys):
    model = shutil.copytree(HERE / "checkpoints/rwkv7", tmp_path / "m")
    for file in model.glob("sae*"):
        file.unlink()
    quick(tmp_path, "replace --model OUT/m --source state --passages 4")
    assert "training one first" in capsys.readouterr().err
    assert not list(model.glob("sae*"))  # --quick keeps nothing


def test_copies_of_training_text_are_left_out():
    lines = {"a = 1", "b = 2", "c = 3"}
    assert run.copied("ut off\na = 1\nb = 2\nc =", lines)
    assert not run.copied("a = 1\nx = 2\nc = 3", lines)
    assert not run.copied("one line", lines)
    tokenizer = models.Tokenizer(lambda text: list(text.encode()), lambda ids: bytes(ids).decode())
    files = {"own": "x = 1\ny = 2\n" * 50, "copy": "a = 1\nb = 2\n" * 50}
    corpus = run.Corpus(tokenizer, {"t": "a = 1\nb = 2"}, torch.device("cpu"))
    tokens, file = run.tested_windows(corpus, files, 9, 60)
    assert tokens.shape == (9, 60)
    assert (file == 0).all()
    with pytest.raises(InputError, match="10 passages of 60 tokens that are no copies"):
        run.tested_windows(corpus, files, 11, 60)


def test_what_is_tested_is_in_no_training_text_and_the_null_is_drawn_from_it(monkeypatch):
    """Python's own text: files apart, no tested passage in training text, the null's all are."""
    args = run.parse(shlex.split("replace --model gdn"))
    collect = writesae.collect
    read = []
    training, tested = run.choose_text(args)
    assert training
    assert tested
    assert not set(training) & set(tested)
    ((cell, corpus),) = run.open_cells(args, 20)
    corpus = corpus._replace(device=corpus.device)
    everything = "\n".join(training.values())
    cell = cell._replace(sae=WriteSAE(960, 32, 32))

    def recorded(model, tokens, *how, **more):
        read.append(tokens)
        return collect(model, tokens, *how, **more)

    monkeypatch.setattr(writesae, "collect", recorded)
    assert run.null_dictionary(cell, corpus).n_atoms == 960
    texts, passages = (
        [corpus.tokenizer.decode(ids).strip("\ufffd") for ids in tokens.tolist()]
        for tokens in (torch.cat(read), cell.tokens)
    )
    assert len(texts) >= 60
    assert all(text in everything for text in texts)
    assert len(passages) == 20
    assert not any(passage in everything for passage in passages)
    own = list(tested.values())
    assert all(passage in own[file] for passage, file in zip(passages, cell.file.tolist()))


def test_own_text_trains_and_is_held_out(tmp_path):
    for i in range(30):
        (tmp_path / f"{i}.txt").write_text(f"passage {i} " * 400)
    args = run.parse(["replace", "--train-text", str(tmp_path)])
    training, tested = run.choose_text(args)
    assert training
    assert tested
    assert len(training) + len(tested) == 30
    assert not set(training) & set(tested)
    assert "text-" in run.sae_file(load(HERE / "checkpoints/gdn"), 1, 0, args)


def test_saes_are_found_in_a_folder_or_under_a_hub_id(tmp_path, monkeypatch):
    import huggingface_hub

    asked = []

    def download(name, allow_patterns):
        asked.append((name, allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    model = load(HERE / "checkpoints/gdn")
    for saes in ("someone/saes", str(tmp_path)):
        path = run.sae_file(model, 1, 0, run.parse(["replace", "--saes", saes]))
        assert path == str(tmp_path / "sae-L1H0.safetensors")
    ((name, patterns),) = asked
    assert name == "someone/saes" and "sae*.safetensors" in patterns


def section(text: str, title: str) -> str:
    """Of a page of results the section under a command."""
    parts = text.split("\n## ")
    (found,) = [part for part in parts if part.startswith(f"`python run.py {title}`")]
    return found.strip()


ALL_CELLS = "--layer all --head all --atoms 1024 --passages 60"
COMPARED = [f"compare-{what}" for what in ("sizes", "active", "variants", "seeds")]
RESULTS = {  # the shipped JSON -> the command that wrote it
    **{name: name for name in ("replace", "atoms", "formula", "steer", "erase")},
    **{f"cells-{kind}": f"replace --model {kind} {ALL_CELLS}" for kind in ARCHITECTURES},
    **{name: name.replace("-", " --what ") for name in COMPARED},
    "steer-head": "steer --reach head --value formula --key write",
    "steer-smallest": "steer --smallest",
}


@pytest.mark.parametrize("name", RESULTS)
def test_the_pages_of_results_are_what_their_json_prints(name, capsys, tmp_path):
    path, page = HERE / f"figures/{name}.json", tmp_path / "t.md"
    command = f"{RESULTS[name]} --results {path} --markdown {page}"
    assert run.main(command.split()) == 0
    printed = capsys.readouterr().out.strip()
    ours = page.read_text()
    theirs = text_of("figures/README.md")
    assert section(ours, RESULTS[name]) == section(theirs, RESULTS[name])
    assert name != "replace" or printed in text_of("README.md"), "README's first table"


SAID = {  # figures of README.md: a JSON, which of its rows -> what of each, one for each model
    "replace": """{coverage:.0%} | {untrained[coverage]:.0%} | {untrained[kl_left_all]:.2f} |
        {untrained[win_gain_all]:+.1%} [{untrained[win_gain_all_ci95][0]:.1%},
        {untrained[win_gain_all_ci95][1]:.1%}] | {win_rate:.1%} | {untrained[win_rate]:.1%} |
        {projected_win_rate:.0%} | {per_atom_win_rate:.0%} | {n_atoms_often} |
        {strict_order_rate:.0%}""",
    "compare-sizes, name=2048": "{coverage:.0%}",
    "compare-sizes, name=2048 untrained": "{coverage:.0%}",
    "compare-sizes, name=16384": "{coverage:.0%}",
    "compare-sizes, name=16384 untrained": "{coverage:.0%}",
    "compare-variants, name=BilinearSAE": "{win_rate_all:.1%}",
    "compare-variants, name=FlatSAE": "{win_rate_all:.1%}",
    "compare-variants, name=untrained": "{win_rate_all:.1%}",
    "compare-active, name=32": "{whole_recovered_all:.3f}",
    "compare-active, name=32 untrained": "{whole_recovered_all:.3f}",
    "atoms, n_passages=400": """{population[often_share]:.0%} | {population[token_purity]:.0%} |
        {population[groups][delta_bic]:+.0f} | {untrained[often_share]:.0%} |
        {untrained[token_purity]:.0%} | {untrained[groups][delta_bic]:+.0f}""",
    "formula": """{rungs[1][r2]:.2f} | {rungs[6][r2]:.3f} | {rungs[0][sign_agreement]:.0%} |
        {rungs[3][sign_agreement]:.0%} | {rungs[6][r2_delete]:.2f}""",
    "steer-smallest, key=read": """{magnitude:g} | {strata[0][persists_rate]:.0%} |
        {strata[1][persists_rate]:.0%} | {strata[0][random_persists_rate]:.0%} |
        {strata[0][edited_perplexity]:.0f} | {strata[0][edited_rate]:.0%} |
        {strata[1][edited_rate]:.0%} | {size:.0%}""",
    "steer-head": "{strata[0][edited_rate]:.0%} | {strata[0][native_rate]:.0%}",
    "steer, value=ascent": """{strata[0][edited_rate]:.0%} | {strata[0][persists_rate]:.0%} |
        {strata[1][persists_rate]:.0%} | {size:.0%} | {strata[0][edited_perplexity]:.0f}""",
    "steer, value=formula": "{sign_rate:.0%}",
    "steer, value=gated": "{sign_rate:.0%}",
    "erase": """{firing_median:.3f} | {random_median:.4f} | {elsewhere_median:.3f} |
        {effect:.3f} [{effect_ci95[0]:.3f}, {effect_ci95[1]:.3f}]""",
}


@pytest.mark.parametrize("which", SAID)
def test_what_the_readme_says_is_in_the_results(which):
    name, *where = which.split(", ")
    rows = json.loads(text_of(f"figures/{name}.json"))
    for key, x in (pair.split("=") for pair in where):
        rows = [r for r in rows if str(r.get(key)) == x]
    assert len(rows) == 3
    for form in SAID[which].split("|"):
        said = " / ".join(" ".join(form.split()).format(**r).replace("%", "") for r in rows)
        assert said in text_of("README.md"), said


def test_a_reader_that_has_gone_gets_no_traceback():
    words = [sys.executable, HERE / "run.py", "replace", "--results", HERE / "figures/replace.json"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert b"Traceback" not in process.stderr.read()
    assert process.returncode == 1


def test_a_table_aligns_and_shows_what_is_missing(capsys):
    columns = {"name ": "{name}", "rate": "{rate:.1%}", "deep": "{x[0][y]}"}
    printer = run.TablePrinter(run.Experiment(None, columns, list, ""))
    printer.row(dict(name="a", rate=0.123, x=[dict(y=3)]))
    printer.row(dict(name="long", rate=math.nan))
    lines = capsys.readouterr().out.splitlines()
    assert lines == ["name    rate  deep", "a      12.3%     3", "long       -     -"]


# --------------------------------------------------------------------------------------------------
# The README, the docstrings, and each definition pasted alone
# --------------------------------------------------------------------------------------------------
def test_the_readmes_examples_run(tmp_path, monkeypatch):
    """Both Python blocks of "Your own tensors, your own model", as they stand there."""
    _, text = text_of("README.md").split("## Your own tensors")
    blocks = re.findall(r"```python\n(.*?)```", text, re.S)
    names = {}
    monkeypatch.chdir(tmp_path)
    (tmp_path / "checkpoints").symlink_to(HERE / "checkpoints")
    for block in blocks:
        exec(block, names)
    assert len(blocks) == 2
    assert names["a"].shape == (10_000,)
    assert names["logits"].shape == (1, 4, 2048)
    (native, _), edited = names["model"](names["tokens"]), names["logits"]
    assert [torch.equal(native[:, t], edited[:, t]) for t in (0, 1)] == [True, False]


def test_the_readmes_commands_parse_and_what_they_name_exists(monkeypatch):
    monkeypatch.chdir(HERE)
    commands = [f"{name} {example}" for name, (_, _, example) in run.COMMANDS.items()]
    text = text_of("README.md") + text_of("figures/README.md")
    commands += re.findall(r"^(?:\$ )?python run\.py (.*?)(?:\s+#.*)?$", text, re.M)
    commands += re.findall(r"`python run\.py ([^`]+)`", text)  # in a line, and section titles
    for command in commands:
        run.parse(shlex.split(command))
    assert len(commands) > 20
    modules = dict(models=models, writesae=writesae, run=run)
    for module, name in re.findall(r"`(models|writesae|run)\.(\w+)", text):
        assert name == "py" or hasattr(modules[module], name), f"{module}.{name}"
    for file, lines in re.findall(r"^\| `(\w+\.py)` \| ([\d,]+) \|", text, re.M):
        assert int(lines.replace(",", "")) == len(text_of(file).splitlines()), f"lines of {file}"
    (assignments,) = re.findall(r"`python -m pytest -k (\w+)` \(or ([^)]*)\)", text)
    own = text_of("test_writesae.py")
    for word in [assignments[0], *re.findall(r"\w+(?=`)", assignments[1])]:
        assert re.search(rf"^def test_\w*{word}", own, re.M), f"no test for -k {word}"


@functools.lru_cache
def top_level(module) -> tuple[list, dict, dict]:
    """A module's imports, its functions and classes, and its values: name -> syntax tree."""
    imports = []
    made = {}
    values = {}
    for node in ast.parse(inspect.getsource(module)).body:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            imports.append(node)
        for target in getattr(node, "targets", [getattr(node, "target", node)]):
            name = getattr(target, "name", getattr(target, "id", None))
            kind = values if isinstance(target, ast.Name) else made
            assert name not in made | values, f"{name} is made twice in {module.__name__}"
            if name is not None:
                kind[name] = node
    return imports, made, values


EACH_MODULE = pytest.mark.parametrize("module", [models, writesae, run])


@EACH_MODULE
def test_every_function_has_a_docstring_and_its_example_holds(module):
    _, made, _ = top_level(module)
    assert not [name for name, node in made.items() if not ast.get_docstring(node)]
    assert doctest.testmod(module) == (0, 12 if module is models else 0)


def pasted(module, *names: str) -> dict:
    """A fresh namespace with the module's own imports, these definitions, and what they use."""
    imports, made, values = top_level(module)
    known = made | values
    needed = {}
    todo = list(names)
    while todo:
        name = todo.pop()
        if name in known and name not in needed:
            needed[name] = known[name]
            todo += {n.id for n in ast.walk(known[name]) if isinstance(n, ast.Name)}
    parts = sorted(needed.values(), key=lambda node: node.lineno)
    namespace = {"__name__": "pasted"}
    exec(compile(ast.Module(imports + parts, []), "pasted", "exec"), namespace)
    return namespace


@EACH_MODULE
def test_each_definition_can_be_pasted_alone(module):
    """With the file's imports and what it names, and with no state of the module that changes."""
    changing = "append add update setdefault pop extend insert clear".split()
    _, made, values = top_level(module)
    for name, node in made.items():
        if module is not run:
            assert callable(pasted(module, name)[name])
        for n in ast.walk(node):
            assert not isinstance(n, ast.Global), f"{name} changes a global"
            held = getattr(getattr(n, "value", None), "id", None) in values
            stored = isinstance(getattr(n, "ctx", None), (ast.Store, ast.Del))
            changed = stored or getattr(n, "attr", None) in changing
            assert not (held and changed), f"{name} changes {ast.unparse(n)}"


def test_pasted_definitions_do_what_the_modules_do():
    s = random_steps("gdn", 0)
    X = random_writes(0, n=60)
    k = X.keys[:, 0]
    v = X.values[:, 0]
    S = torch.randn(2, 3, 6, 4, generator=rng(1))

    def results(take):
        """take(module, names) -> what they stand for"""
        norm, repeat = take(models, "RMSNorm recurrence")
        chunked, follow = take(models, "recurrence_chunked propagate")
        yield norm(6, 1e-6)(k)
        yield from (*repeat(s, S), *chunked(s, S), *follow(s.q[:, 0], s))
        SAE, write, fit, kl = take(writesae, "WriteSAE write_of fit_alternating kl_divergence")
        sae = SAE(12, 6, 4)
        yield torch.tensor(fit(sae, k, v, rng(0), steps=3, sample=40))
        yield from sae.encode(write(k, v))
        yield kl(k.log_softmax(-1), k.flip(0).log_softmax(-1))
        interval, key = take(writesae, "wilson read_key")
        yield from (torch.tensor(interval(3, 7)), key(s))

    def in_the_module(module, names):
        return [getattr(module, name) for name in names.split()]

    def in_the_open(module, names):
        namespace = pasted(module, *names.split())
        return [namespace[name] for name in names.split()]

    both = list(results(in_the_open)), list(results(in_the_module))
    assert len(both[0]) == 13
    assert all(torch.equal(a, b) for a, b in zip(*both))


def test_pretrain_goes_on_as_if_it_had_never_stopped(tmp_path, monkeypatch, capsys):
    """Ten steps on this project's own text: whole, and stopped after five; the weights are the same
    to the bit, and the folder is in the hub's layout."""
    sources = [text_of(name)[:8_000] for name in ("models.py", "run.py")]
    texts = {f"{i}.py": text for i, text in enumerate(sources * 8)}
    monkeypatch.setattr(run, "python_text", lambda: texts)
    for knob, value in dict(CONTEXT=32, BATCH=2, SAVE_EVERY=5).items():
        monkeypatch.setattr(run, knob, value)
    arguments = ["pretrain", "--model", "mamba2", "--tokens", "640", "--out"]
    assert run.main(arguments + [str(tmp_path / "whole")]) == 0
    real = run.train_step
    steps = []

    def stop_at_seven(parts, x, step, n):
        steps.append(step)
        if len(steps) == 8:
            raise KeyboardInterrupt
        return real(parts, x, step, n)

    monkeypatch.setattr(run, "train_step", stop_at_seven)
    assert run.main(arguments + [str(tmp_path / "halved")]) == 130
    assert run.main(arguments + [str(tmp_path / "halved")]) == 0
    assert "going on from step 5" in capsys.readouterr().err
    assert steps[8:] == [5, 6, 7, 8, 9]
    folders = [tmp_path / name / "mamba2" for name in ("whole", "halved")]
    for folder in folders:
        files = sorted(os.listdir(folder))
        assert files == ["config.json", "model.safetensors", "tokenizer.json"]
    whole, halved = ((folder / "model.safetensors").read_bytes() for folder in folders)
    assert whole == halved
    tokenizer = models.load_tokenizer(load(folders[0]))
    assert tokenizer.decode(tokenizer.encode("def f(x): return x")) == "def f(x): return x"


def test_bits_per_byte_by_hand():
    """A model that gives every token the same chance: log2(vocab) bits a token, over the bytes."""
    model = tiny_model("mamba2")
    model.norm.weight.zero_()
    bits = run.bits_per_byte(model, random_tokens(0, B=1, T=1100)[0], 2.5)
    assert bits == pytest.approx(math.log2(61) / 2.5, rel=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_bench_compares_with_a_peer_doing_the_same(name):
    """`measured` itself asserts that the KLs of both are equal, here to 1e-3 of the largest."""
    args = run.parse(["bench", "--quick", "--model", name])
    model = run.open_model(name, args)
    if name == "rwkv7":
        model = run.heads_of_64(model)
        model.name = name
    peer = run.Peer(model)
    tokens = random_tokens(0, B=2, T=20)
    for at_once in (1,) if name == "rwkv7" else (1, 2):
        row = run.measured(args, *run.branches(model, peer, tokens, at_once))
        assert row["ours"] > 0
        assert row["of_floor"] > 0
        assert row["ratio"] == row["ours"] / row["peer"]
        assert row["peer_name"] == ("rwkv" if name == "rwkv7" else "transformers")


@torch.no_grad()
def test_bench_trains_the_same_sae_on_factors_and_on_matrices():
    args = run.parse(["bench", "--quick"])
    names = "name ours peer peer_name unit ratio of_floor"
    for what in run.training(16, 8):
        assert set(run.measured(args, *what)) == set(names.split())
