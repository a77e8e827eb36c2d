"""How the three models of this folder were made, each from nothing in half an hour on two cores:

    python checkpoints/pretrain.py gdn --out FOLDER

Trains on the text that every Python installation carries (run.py's `python_text`), writes a folder
in the hub's layout, and prints bits per byte of held-out text, lower is better: xz gets 1.78. The
sizes of the model are those of the config.json beside this file.
"""

from __future__ import annotations

import argparse
import math
import os
import sys

import torch
import torch.nn as nn
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models as kinds, pre_tokenizers, trainers
from torch import Tensor

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(HERE))
import models
import run
from models import LanguageModel, require

CONTEXT = 512  # tokens of a training window
BATCH = 8  # windows a step: with Muon, many small steps are the better use of a CPU's hours
PEAK_LR = 1.2e-2  # of both optimisers, after a short warm-up; then linearly to zero


def train_tokenizer(texts, vocab: int) -> Tokenizer:
    """Train byte-level BPE of vocab entries; entry 0 separates files."""
    byte_level, tokenizer = pre_tokenizers.ByteLevel, Tokenizer(kinds.BPE())
    tokenizer.pre_tokenizer = byte_level(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    settings = dict(vocab_size=vocab, special_tokens=["<|endoftext|>"], show_progress=False)
    trainer = trainers.BpeTrainer(initial_alphabet=byte_level.alphabet(), **settings)
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def encode_files(tokenizer: Tokenizer, files: dict[str, str]) -> Tensor:
    """Encode all files one after the other, each opened by the separator: [N]."""
    encoded = [torch.tensor([0, *tokenizer.encode(text).ids]) for text in files.values()]
    return torch.cat(encoded)


@torch.no_grad()
def initialise(model: LanguageModel, rng: torch.Generator):
    """Draw weights: matrices ~ N(0, 1/width), maps back to the stream zero, gates as in papers."""
    def uniform(n: int, low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(n, generator=rng)

    def step_sizes(bias: Tensor, low: float, high: float):  # softplus(bias) = Δ, log Δ uniform
        delta = uniform(len(bias), low, high).exp()
        bias.copy_(delta + torch.log(-torch.expm1(-delta)))

    model.embedding.weight.normal_(0, 0.05, generator=rng)
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv1d):
            module.weight.normal_(0, 0.3, generator=rng)
        elif isinstance(module, nn.Linear):
            back = name.endswith(("out_proj", "o_proj", "down_proj", "mlp.value"))
            deviation = 0.0 if back else module.in_features**-0.5
            module.weight.normal_(0, deviation, generator=rng)
        if isinstance(module, (nn.Conv1d, nn.Linear)) and module.bias is not None:
            module.bias.zero_()
    for module in model.modules():
        if isinstance(module, models.GatedDeltaNet):  # decays e^{−A Δ}, A 1 to 16, Δ 0.001 to 0.1
            module.A_log.copy_(uniform(module.heads, 1, 16).log())
            step_sizes(module.dt_bias, -6.9, -2.3)
        elif isinstance(module, models.Mamba2):
            # Δ scales the write too: at the paper's 0.001 to 0.1 the skip is so much larger that a
            # short training never uses the state. So Δ 0.1 to 1, and no skip.
            module.A_log.copy_(uniform(module.heads, math.log(0.1), math.log(2)))
            step_sizes(module.dt_bias, math.log(0.1), 0)
            module.skip.zero_()
        elif isinstance(module, models.RWKV7):
            ramp, decay = torch.linspace(0, 1, module.x_r.numel()), module.w_lora[2].bias
            for c, power in zip("rwkvag", (0.2, 0.9, 0.7, 0.7, 0.9, 0.2)):
                getattr(module, f"x_{c}").copy_(1 - ramp**power)
            decay.copy_(-6 + 6.5 * torch.linspace(0, 1, decay.numel()))
        elif isinstance(module, models.ChannelMix):
            module.x_k.copy_(1 - torch.linspace(0, 1, module.x_k.numel()) ** 2)


def optimisers(model: LanguageModel) -> list[torch.optim.Optimizer]:
    """Make Muon for the matrices inside the layers, AdamW for embedding, head and small tensors."""
    matrices, others = [], []
    for name, p in model.named_parameters():
        inside = name.startswith("layers") and p.dim() == 2 and min(p.shape) >= 32
        (matrices if inside else others).append(p)
    muon = torch.optim.Muon(matrices, weight_decay=0.05, adjust_lr_fn="match_rms_adamw")
    return [muon, torch.optim.AdamW(others, weight_decay=0.0, betas=(0.9, 0.95))]


def training_batch(tokens: Tensor, seed: int, step: int) -> Tensor:
    """Take the step-th batch [BATCH, CONTEXT + 1]: each epoch cuts the text anew and shuffles."""
    per_epoch = (len(tokens) - 2 * CONTEXT) // CONTEXT // BATCH
    epoch, i = divmod(step, per_epoch)
    rng = torch.Generator().manual_seed(seed * 1000 + epoch)
    offset = torch.randint(CONTEXT, (1,), generator=rng)
    order = torch.randperm(per_epoch * BATCH, generator=rng)
    starts = offset + order[i * BATCH : (i + 1) * BATCH] * CONTEXT
    return tokens[starts[:, None] + torch.arange(CONTEXT + 1)]


@torch.inference_mode()
def bits_per_byte(model: LanguageModel, tokens: Tensor, bytes_per_token: float) -> float:
    """Measure cross-entropy in bits per byte of text (lower is better): windows of CONTEXT tokens
    that move by half a window, each token scored once, after half a window or more. tokens [N]"""
    half, nats = CONTEXT // 2, []
    starts = torch.arange(0, len(tokens) - CONTEXT - 1, half)
    for part in starts.split(16):
        x = tokens[part[:, None] + torch.arange(CONTEXT + 1)].to(model.device)
        scored = model(x[:, :-1])[0][:, half:].float().mT
        nats.append(F.cross_entropy(scored, x[:, half + 1 :], reduction="none").cpu())
    return torch.cat(nats).mean().item() / math.log(2) / bytes_per_token


def train_step(model: LanguageModel, both: list, x: Tensor, step: int, steps: int) -> float:
    """Train on tokens x [BATCH, CONTEXT + 1] with both optimisers; return nats per token."""
    with torch.autocast(x.device.type, torch.bfloat16):
        logits, _ = model(x[:, :-1])
    loss = F.cross_entropy(logits.flatten(0, 1).float(), x[:, 1:].flatten())
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimiser in both:
        for group in optimiser.param_groups:
            group["lr"] = PEAK_LR * min(1, (step + 1) / 100, (steps - step) / (0.9 * steps))
        optimiser.step()
        optimiser.zero_grad()
    return loss.item()


def pretrain(name: str, folder: str, text: tuple, tokens: int, seed=0, device="cpu") -> float:
    """Train the model `name` on text (training, held out; dicts of files) and write its folder, the
    weights last: where they are, all is. Returns held-out bits per byte. Raises InputError."""
    (training, tested), weights = text, os.path.join(folder, "model.safetensors")
    require(not os.path.lexists(weights), f"{folder} holds a model; --out names another place")
    with models.as_input_error(folder, "give another --out", "made a folder"):
        os.makedirs(folder, exist_ok=True)
    shape = models.read_json(os.path.join(HERE, name, "config.json"))
    shape = {key: x for key, x in shape.items() if key not in ("pretraining", "dtype")}
    tokenizer = train_tokenizer(training.values(), shape["vocab_size"])
    read, unseen = encode_files(tokenizer, training), encode_files(tokenizer, tested)
    size = sum(len(text.encode()) for text in tested.values()) / len(unseen)  # bytes per token
    model = models.build(shape)
    initialise(model, torch.Generator().manual_seed(seed))
    both = optimisers(model.to(device))
    steps = max(1, tokens // (CONTEXT * BATCH))
    for step in run.progress(range(steps)):
        x = training_batch(read, seed, step).to(device)
        loss = train_step(model, both, x, step, steps)
        if (step + 1) % 200 == 0:
            run.say(f"step {step + 1:,} of {steps:,}: {loss:.3f} nats a token")
    bits = bits_per_byte(model, unseen, size)
    how = dict(steps=steps, tokens=steps * CONTEXT * BATCH, held_out_bits_per_byte=round(bits, 4))
    with models.whole_file(os.path.join(folder, "tokenizer.json")) as temporary:
        tokenizer.save(temporary)
    models.save(model, shape | dict(pretraining=how), folder)
    return bits


def main():
    """Read the command line and train one model."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("name", choices=run.EMBEDDED)
    parser.add_argument("--out", required=True, metavar="FOLDER", help="where it is written")
    parser.add_argument("--tokens", type=int, default=8_192_000, help="read in training")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    device = run.pick_device(args.device)
    text = run.choose_text(argparse.Namespace(text=None, train_text=None))
    bits = pretrain(args.name, args.out, text, args.tokens, args.seed, device)
    print(f"{args.name}: held-out {bits:.3f} bits per byte, saved in {args.out}")


if __name__ == "__main__":
    try:
        main()
    except models.InputError as error:
        sys.exit(f"error: {error}")
