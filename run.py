"""The command line: python run.py COMMAND. See README.md, or python run.py --help."""
from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import sys
import sysconfig
import time

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import models

HERE = os.path.dirname(os.path.abspath(__file__))


# ---------------------------------------------------------------------------------------------------------------------
# Text: what every Python installation carries
# ---------------------------------------------------------------------------------------------------------------------
SKIPPED = {"test", "tests", "site-packages", "dist-packages", "encodings", "idlelib", "lib2to3", "turtledemo", "pydoc_data"}


def python_text() -> dict[str, str]:
    """The standard library's sources (without its tests, code tables and bundled programs) and the language reference.

    Returns file name -> text, sorted by name; the reference's topics are named "topics/NAME".
    """
    root, files = sysconfig.get_paths()["stdlib"], {}
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(f for f in folders if f not in SKIPPED and not f.startswith(("__pycache__", "config-")))
        for name in sorted(names):
            if name.endswith(".py") and not name.startswith("_sysconfigdata"):
                path = os.path.join(folder, name)
                with open(path, encoding="utf-8", errors="replace") as f:
                    files[os.path.relpath(path, root).replace(os.sep, "/")] = f.read()
    from pydoc_data.topics import topics
    files.update({f"topics/{name}": text for name, text in sorted(topics.items())})
    return files


def split(files: dict[str, str]) -> tuple[list[str], list[str]]:
    """Training texts and held-out texts: a file is held out if the hash of its name says so (one in ten)."""
    held_out = lambda name: hashlib.sha256(name.encode()).digest()[0] < 26
    return [t for n, t in files.items() if not held_out(n)], [t for n, t in files.items() if held_out(n)]


# ---------------------------------------------------------------------------------------------------------------------
# pretrain: the three embedded models
# ---------------------------------------------------------------------------------------------------------------------
COMMON = dict(vocab_size=2048, hidden_size=128, bos_token_id=0, eos_token_id=0)
SHAPES = {   # Few heads of 32 x 32, so that one write matters; 0.9 to 1.4 million parameters, so that two CPU cores can train them.
    "gdn": dict(model_type="qwen3_5_text", architectures=["Qwen3_5ForCausalLM"], num_hidden_layers=4, intermediate_size=384,
                linear_num_key_heads=4, linear_num_value_heads=4, linear_key_head_dim=32, linear_value_head_dim=32,
                num_attention_heads=4, num_key_value_heads=2, head_dim=32, full_attention_interval=4, tie_word_embeddings=True,
                rope_parameters=dict(rope_type="default", rope_theta=10000.0, partial_rotary_factor=0.5),
                max_position_embeddings=4096, **COMMON),
    "mamba2": dict(model_type="mamba2", architectures=["Mamba2ForCausalLM"], num_hidden_layers=6, num_heads=8, head_dim=32,
                   n_groups=1, state_size=32, expand=2, conv_kernel=4, chunk_size=64, tie_word_embeddings=True,
                   time_step_limit=[0.0, {"__float__": "Infinity"}], **COMMON),
    "rwkv7": dict(model_type="rwkv7", architectures=["RWKV7ForCausalLM"], num_hidden_layers=4, head_dim=32, intermediate_size=512,
                  decay_low_rank_dim=16, a_low_rank_dim=16, v_low_rank_dim=16, gate_low_rank_dim=32, norm_eps=1e-5, **COMMON),
}
CONTEXT = 512     # tokens per training window
BATCH = 8         # windows per step: with Muon, small steps and many of them are the better use of a CPU's hours
PEAK_LR = 4e-3    # for both optimisers (Muon's update is scaled to AdamW's size), after a short warm-up, then linearly to zero


def train_tokenizer(texts: list[str], vocab: int):
    """Byte-level BPE with vocab entries; entry 0 separates files."""
    from tokenizers import Tokenizer, decoders, models as kinds, pre_tokenizers, trainers
    tokenizer = Tokenizer(kinds.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=["<|endoftext|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    return tokenizer


def encode_files(tokenizer, texts: list[str]) -> Tensor:
    """All files one after the other, each opened by the separator. [N]"""
    return torch.tensor([i for text in texts for i in [0] + tokenizer.encode(text).ids])


def initialise(model: models.LanguageModel, generator: torch.Generator):
    """Draw starting weights, in place: matrices ~ N(0, 1/width), maps back to the stream zero, gates as in the papers."""
    normal = lambda p, std: p.copy_(torch.randn(p.shape, generator=generator) * std)
    uniform = lambda n, low, high: low + (high - low) * torch.rand(n, generator=generator)
    with torch.no_grad():
        normal(model.embedding.weight, 0.05)
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear):
                zero = name.endswith(("out_proj", "o_proj", "down_proj", "mlp.value"))
                normal(module.weight, 0.0 if zero else module.in_features ** -0.5)
            if isinstance(module, models.ConvWeights):
                normal(module.weight, 0.3)
            if isinstance(module, (models.GatedDeltaNet, models.Mamba2)):    # decays e^{−A Δ}: A from 1 to 16, Δ from 0.001 to 0.1
                module.A_log.copy_(uniform(module.heads, 1, 16).log())
                step = uniform(module.heads, math.log(1e-3), math.log(0.1)).exp()
                module.dt_bias.copy_(step + torch.log(-torch.expm1(-step)))  # softplus(dt_bias) = Δ
            if isinstance(module, models.RWKV7):
                ramp = torch.linspace(0, 1, module.x_r.numel())
                for c, power in zip("rwkvag", (0.2, 0.9, 0.7, 0.7, 0.9, 0.2)):
                    getattr(module, f"x_{c}").copy_(1 - ramp ** power)
                module.w_lora.lora[2].bias.copy_(-6 + 6.5 * torch.linspace(0, 1, module.heads * module.K))
                for lora in (module.a_lora, module.v_lora):
                    if lora is not None:
                        lora.lora[2].bias.zero_()
            if isinstance(module, models.ChannelMix):
                module.x_k.copy_(1 - torch.linspace(0, 1, module.x_k.numel()) ** 2)


def optimisers(model: models.LanguageModel) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers, AdamW for embedding, head and all small tensors."""
    matrix = lambda n, p: n.startswith("layers") and p.dim() == 2 and min(p.shape) >= 32
    return [torch.optim.Muon([p for n, p in model.named_parameters() if matrix(n, p)], weight_decay=0.05,
                             adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW([p for n, p in model.named_parameters() if not matrix(n, p)], weight_decay=0.0, betas=(0.9, 0.95))]


def windows(tokens: Tensor, seed: int, step: int) -> Tensor:
    """The step-th batch [BATCH, CONTEXT + 1]: every epoch cuts the text at new places and shuffles the pieces."""
    per_epoch = (len(tokens) - 2 * CONTEXT) // CONTEXT // BATCH
    epoch, i = divmod(step, per_epoch)
    generator = torch.Generator().manual_seed(seed * 1000 + epoch)
    offset = torch.randint(CONTEXT, (1,), generator=generator)
    order = torch.randperm(per_epoch * BATCH, generator=generator)[i * BATCH:(i + 1) * BATCH]
    return tokens[offset + order[:, None] * CONTEXT + torch.arange(CONTEXT + 1)]


def bits_per_byte(model: models.LanguageModel, tokens: Tensor, bytes_per_token: float, limit: int | None = None) -> float:
    """Held-out cross-entropy in bits per byte of text (lower is better): windows of CONTEXT tokens that move by half a window,
    each token scored once, with at least half a window before it. limit: only so many windows, spread evenly."""
    half = CONTEXT // 2
    starts = torch.arange(0, len(tokens) - CONTEXT - 1, half)
    starts = starts[:: max(1, len(starts) // limit)] if limit else starts
    nats = []
    with torch.inference_mode():
        for chunk in starts.split(16):
            x = tokens[chunk[:, None] + torch.arange(CONTEXT + 1)].to(model.device)
            logits = model(x[:, :-1])[0][:, half:]
            nats.append(F.cross_entropy(logits.flatten(0, 1).float(), x[:, half + 1:].flatten(), reduction="none").cpu())
    return torch.cat(nats).mean().item() / math.log(2) / bytes_per_token


def pretrain(args) -> int:
    """Train an embedded model from nothing; interrupted, it goes on from its last save."""
    name, device = args.model, pick_device(args.device)
    folder = os.path.join(args.out, name)
    os.makedirs(folder, exist_ok=True)
    training, held_out = split(python_text())
    tokenizer = train_tokenizer(training, COMMON["vocab_size"])
    train_tokens, test_tokens = encode_files(tokenizer, training), encode_files(tokenizer, held_out)
    bytes_per_token = sum(len(t.encode()) for t in held_out) / len(test_tokens)
    model = models.build(SHAPES[name]).to(device)
    initialise(model, torch.Generator().manual_seed(args.seed))
    model.tokenizer = tokenizer
    opts = optimisers(model)
    steps = args.tokens // (CONTEXT * BATCH)
    say(f"pretrain {name}: {sum(p.numel() for p in model.parameters()):,} parameters, {len(train_tokens):,} training tokens, "
        f"{len(test_tokens):,} held out ({bytes_per_token:.2f} bytes each), {steps:,} steps of {BATCH} x {CONTEXT} tokens on {device}")

    resume, step = os.path.join(folder, "resume.pt"), 0
    if os.path.exists(resume):
        saved = torch.load(resume, weights_only=True)
        if saved["steps"] == steps:
            step = saved["step"]
            model.load_state_dict(saved["model"])
            for opt, state in zip(opts, saved["opts"]):
                opt.load_state_dict(state)
            say(f"going on from step {step}")
    began = time.time()
    bar = tqdm(total=steps, initial=step, file=sys.stderr, disable=None)
    while step < steps:
        lr = PEAK_LR * min(1, (step + 1) / 100, (steps - step) / (0.9 * steps))
        x = windows(train_tokens, args.seed, step).to(device)
        with torch.autocast(device.type, torch.bfloat16):
            logits, _ = model(x[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1).float(), x[:, 1:].flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for opt in opts:
            for group in opt.param_groups:
                group["lr"] = lr
            opt.step()
            opt.zero_grad()
        step += 1
        bar.update()
        if step % 200 == 0 or step == steps:
            bpb = bits_per_byte(model, test_tokens, bytes_per_token, limit=None if step == steps else 64)
            say(f"step {step:5d}  train {loss.item():.3f} nats/token  held-out {bpb:.3f} bits/byte  {time.time() - began:.0f} s")
            save_then_rename(lambda path: torch.save({"step": step, "steps": steps, "model": model.state_dict(),
                                                      "opts": [o.state_dict() for o in opts]}, path), resume)
    return 0


def save_then_rename(write, path: str):
    """Call write(temporary path), then rename: a file is there whole or not at all."""
    write(path + ".part")
    os.replace(path + ".part", path)


def pick_device(name: str) -> torch.device:
    """"auto" takes a GPU where there is one."""
    return torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)


def say(line: str):
    """Progress and decisions of long work, on stderr, past the progress bar."""
    tqdm.write(line, file=sys.stderr)


def main(argv=None) -> int:
    p = argparse.ArgumentParser(prog="run.py")
    p.add_argument("command")
    p.add_argument("--model")
    p.add_argument("--out", default="checkpoints")
    p.add_argument("--tokens", type=int, default=10_000_000)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--device", default="auto")
    p.add_argument("--lr", type=float)
    p.add_argument("--stop", type=int)
    args = p.parse_args(argv)
    global PEAK_LR
    if args.lr: PEAK_LR = args.lr
    return pretrain(args)


if __name__ == "__main__":
    sys.exit(main())
