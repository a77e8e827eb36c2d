"""The command line: python run.py COMMAND (--help says which, README.md says why).

    replace   the replacement test on the three embedded models, or on any model: can an SAE's atom stand for
              a real write?
    formula   the logit-change formula, as a ladder from the paper's three factors to exact first and second order
    steer     edit the cache so that a token appears: the ladder of edits, the least edit (--smallest), or one shown
              (--prompt TEXT --target TOKEN)
    erase     take one atom's writes out, at its own firings and elsewhere: does the token that it promotes fall?
    train     train an SAE on the writes of one head and save it beside its model
    pretrain  train an embedded model from nothing

Results go to stdout, decisions and progress to stderr. A wrong input ends in one line on stderr and exit status 2.
"""
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
import writesae
from models import InputError, LanguageModel
from writesae import CONDITIONS, HORIZONS, Records, WriteSAE

HERE = os.path.dirname(os.path.abspath(__file__))
EMBEDDED = ("gdn", "mamba2", "rwkv7")


def say(line: str):
    """One line about what was decided or how far long work is, on stderr, past a progress bar."""
    tqdm.write(line, file=sys.stderr)


def progress(what: str):
    """A progress bar on stderr for any iterable; nothing where stderr is no terminal."""
    return lambda items: tqdm(items, desc=what, file=sys.stderr, leave=False, disable=None)


def save_then_rename(write, path: str):
    """Call write(temporary path), then rename: a file is there whole or not at all."""
    write(path + ".part")
    os.replace(path + ".part", path)


def pick_device(name: str) -> torch.device:
    """"auto": a GPU where there is one."""
    try:
        return torch.empty(
            0, device=("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name).device
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"device {name!r} cannot be used here ({str(error).splitlines()[0][:80]}); "
                         "take auto or cpu") from None


# ---------------------------------------------------------------------------------------------------------------------
# Text: what every Python installation carries
# ---------------------------------------------------------------------------------------------------------------------
SKIPPED = {"test", "tests", "site-packages", "dist-packages", "encodings", "idlelib", "lib2to3",
           "turtledemo", "pydoc_data"}


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
# Few heads of 32 x 32, so that one write matters; 0.9 to 1.4 million parameters, so that two CPU cores can train them.
SHAPES = {
    "gdn": dict(model_type="qwen3_5_text", architectures=["Qwen3_5ForCausalLM"], num_hidden_layers=4,
                intermediate_size=384, linear_num_key_heads=4, linear_num_value_heads=4,
                linear_key_head_dim=32, linear_value_head_dim=32, num_attention_heads=4, num_key_value_heads=2,
                head_dim=32, full_attention_interval=4, tie_word_embeddings=True,
                rope_parameters=dict(rope_type="default", rope_theta=10000.0, partial_rotary_factor=0.5),
                max_position_embeddings=4096, **COMMON),
    "mamba2": dict(model_type="mamba2", architectures=["Mamba2ForCausalLM"], num_hidden_layers=6,
                   num_heads=8, head_dim=32,
                   n_groups=1, state_size=32, expand=2, conv_kernel=4, chunk_size=64, tie_word_embeddings=True,
                   time_step_limit=[0.0, {"__float__": "Infinity"}], **COMMON),
    "rwkv7": dict(model_type="rwkv7", architectures=["RWKV7ForCausalLM"], num_hidden_layers=4, head_dim=32,
                  intermediate_size=512, decay_low_rank_dim=16, a_low_rank_dim=16, v_low_rank_dim=16,
                  gate_low_rank_dim=32, norm_eps=1e-5, **COMMON),
}
CONTEXT = 512     # tokens per training window
BATCH = 8         # windows per step: with Muon, small steps and many of them are the better use of a CPU's hours
# for both optimisers (Muon's update is scaled to AdamW's size), after a short warm-up, then linearly to zero
PEAK_LR = 1.2e-2


def train_tokenizer(texts: list[str], vocab: int):
    """Byte-level BPE with vocab entries; entry 0 separates files."""
    from tokenizers import Tokenizer, decoders, models as kinds, pre_tokenizers, trainers
    tokenizer = Tokenizer(kinds.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=["<|endoftext|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False))
    return tokenizer


def encode_files(tokenizer, texts: list[str]) -> Tensor:
    """All files one after the other, each opened by the separator. [N]"""
    return torch.tensor([i for text in texts for i in [0] + tokenizer.encode(text).ids])


def initialise(model: LanguageModel, generator: torch.Generator):
    """Draw starting weights, in place: matrices ~ N(0, 1/width), maps back to the stream zero,
    gates as in the papers."""
    normal = lambda p, std: p.copy_(torch.randn(p.shape, generator=generator) * std)
    uniform = lambda n, low, high: low + (high - low) * torch.rand(n, generator=generator)
    inverse_softplus = lambda y: y + torch.log(-torch.expm1(-y))
    with torch.no_grad():
        normal(model.embedding.weight, 0.05)
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear):
                zero = name.endswith(("out_proj", "o_proj", "down_proj", "mlp.value"))
                normal(module.weight, 0.0 if zero else module.in_features ** -0.5)
            if isinstance(module, models.ConvWeights):
                normal(module.weight, 0.3)
            if isinstance(module, models.GatedDeltaNet):          # decays e^{−A Δ}: A from 1 to 16, Δ from 0.001 to 0.1
                module.A_log.copy_(uniform(module.heads, 1, 16).log())
                module.dt_bias.copy_(inverse_softplus(uniform(module.heads, math.log(1e-3), math.log(0.1)).exp()))
            # Here Δ scales the write too. The paper's 0.001 to 0.1 leaves it so small beside the skip D x that a short
            # training never uses the state: so start with Δ from 0.1 to 1 and no skip.
            if isinstance(module, models.Mamba2):
                module.A_log.copy_(uniform(module.heads, math.log(0.1), math.log(2)))
                module.dt_bias.copy_(inverse_softplus(uniform(module.heads, math.log(0.1), 0).exp()))
                module.D.zero_()
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


def optimisers(model: LanguageModel) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers, AdamW for embedding, head and all small tensors."""
    matrix = lambda n, p: n.startswith("layers") and p.dim() == 2 and min(p.shape) >= 32
    return [torch.optim.Muon([p for n, p in model.named_parameters() if matrix(n, p)], weight_decay=0.05,
                             adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW([p for n, p in model.named_parameters() if not matrix(n, p)], weight_decay=0.0,
                              betas=(0.9, 0.95))]


def training_batch(tokens: Tensor, seed: int, step: int) -> Tensor:
    """The step-th batch [BATCH, CONTEXT + 1]: every epoch cuts the text at new places and shuffles the pieces."""
    per_epoch = (len(tokens) - 2 * CONTEXT) // CONTEXT // BATCH
    epoch, i = divmod(step, per_epoch)
    generator = torch.Generator().manual_seed(seed * 1000 + epoch)
    offset = torch.randint(CONTEXT, (1,), generator=generator)
    order = torch.randperm(per_epoch * BATCH, generator=generator)[i * BATCH:(i + 1) * BATCH]
    return tokens[offset + order[:, None] * CONTEXT + torch.arange(CONTEXT + 1)]


def bits_per_byte(model: LanguageModel, tokens: Tensor, bytes_per_token: float, limit: int | None = None) -> float:
    """Held-out cross-entropy in bits per byte of text (lower is better): windows of CONTEXT tokens that move by half a
    window, each token scored once, with at least half a window before it. limit: only so many windows, spread
    evenly."""
    half = CONTEXT // 2
    starts = torch.arange(0, len(tokens) - CONTEXT - 1, half)
    starts = starts[:: max(1, len(starts) // limit)] if limit else starts
    nats = []
    with torch.inference_mode():
        for chunk in starts.split(16):
            x = tokens[chunk[:, None] + torch.arange(CONTEXT + 1)].to(model.device)
            logits = model(x[:, :-1])[0][:, half:]
            nats.append(F.cross_entropy(logits.flatten(0, 1).float(), x[:, half + 1:].flatten(),
                                        reduction="none").cpu())
    return torch.cat(nats).mean().item() / math.log(2) / bytes_per_token


def pretrain(args) -> int:
    """Train the embedded models from nothing. Interrupted, it goes on from its last save (every 200 steps)."""
    for name in args.models:
        pretrain_one(name, args)
    return 0


def pretrain_one(name: str, args):
    """Train one and write it to args.out/name in the hub's layout: config.json, model.safetensors, tokenizer.json."""
    device, folder = pick_device(args.device), os.path.join(args.out, name)
    resume = os.path.join(folder, "resume.pt")
    os.makedirs(folder, exist_ok=True)
    training, held_out = split(python_text())
    tokenizer = train_tokenizer(training, COMMON["vocab_size"])
    train_tokens, test_tokens = encode_files(tokenizer, training), encode_files(tokenizer, held_out)
    bytes_per_token = sum(len(t.encode()) for t in held_out) / len(test_tokens)
    model = models.build(SHAPES[name]).to(device)
    initialise(model, torch.Generator().manual_seed(args.seed))
    opts = optimisers(model)
    step, steps = 0, max(1, (50_000 if args.quick else args.tokens) // (CONTEXT * BATCH))
    say(f"pretrain {name}: {sum(p.numel() for p in model.parameters()):,} parameters, {len(train_tokens):,} "
        f"training tokens, {len(test_tokens):,} held out ({bytes_per_token:.2f} bytes each), {steps:,} steps of "
        f"{BATCH} x {CONTEXT} tokens, {device}, bf16 products (fp32 weights and recurrence), seed {args.seed}")
    if os.path.exists(resume):
        saved = torch.load(resume, weights_only=True, map_location=device)
        if saved["steps"] == steps:
            step = saved["step"]
            model.load_state_dict(saved["model"])
            for opt, state in zip(opts, saved["opts"]):
                opt.load_state_dict(state)
            say(f"going on from step {step}")
    began, bpb = time.time(), math.nan
    for step in tqdm(range(step, steps), initial=step, total=steps, file=sys.stderr, disable=None):
        lr = PEAK_LR * min(1, (step + 1) / 100, (steps - step) / (0.9 * steps))
        x = training_batch(train_tokens, args.seed, step).to(device)
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
        done = step + 1
        if done % 200 == 0 or done == steps:
            bpb = bits_per_byte(model, test_tokens, bytes_per_token, limit=64 if args.quick or done < steps else None)
            say(f"step {done:5d}  train {loss.item():.3f} nats/token  held-out {bpb:.3f} bits/byte  "
                f"{time.time() - began:.0f} s")
            saved = {"step": done, "steps": steps, "model": model.state_dict(),
                     "opts": [opt.state_dict() for opt in opts]}
            save_then_rename(lambda path: torch.save(saved, path), resume)
    how = dict(steps=steps, tokens=steps * CONTEXT * BATCH, held_out_bits_per_byte=round(bpb, 4))
    models.save(model, SHAPES[name] | dict(pretraining=how), folder)
    tokenizer.save(os.path.join(folder, "tokenizer.json"))
    os.remove(resume)
    print(f"{name}: held-out {bpb:.3f} bits per byte, saved in {folder}")


# ---------------------------------------------------------------------------------------------------------------------
# A model, its text, its SAE
# ---------------------------------------------------------------------------------------------------------------------
PASSAGE = 128                                # tokens per tested passage
POSITIONS = range(32, PASSAGE - HORIZONS + 1, 3)     # tested in each: some text before, ten tokens after
COSINE_MIN = 0.71                            # a firing explains half of the write's energy; stored with each SAE


def open_model(name: str, device: str) -> LanguageModel:
    """An embedded model by its short name, or any folder or hub id."""
    path = os.path.join(HERE, "checkpoints", name) if name in EMBEDDED else name
    model = models.load(path, pick_device(device))
    model.name = name
    return model


def windows(model: LanguageModel, texts: list[str], n: int, T: int) -> Tensor:
    """n windows [n, T] of tokens, evenly spread over the texts, each inside one text.
    Raises InputError if there are fewer."""
    tokenizer = models.load_tokenizer(model)
    pieces = [torch.tensor(tokenizer.encode(text), dtype=torch.long) for text in texts]
    every = torch.cat([p[:len(p) // T * T].view(-1, T) for p in pieces])
    if len(every) < n:
        raise InputError(f"the text gives {len(every)} passages of {T} tokens, {n} are needed: take a longer --text "
                         "or a smaller --passages")
    return every[torch.linspace(0, len(every) - 1, n).long()].to(model.device)


def cells(model: LanguageModel, layer: str | None, head: str) -> list[tuple[int, int]]:
    """The (layer, head) pairs that --layer and --head name: by default the second recurrent layer, head 0."""
    number = lambda text, what: int(text) if text.isdigit() else fail(f"{what} {text!r}: allowed are a number or all")
    recurrent = model.recurrent_layers
    layers = ([recurrent[min(1, len(recurrent) - 1)]] if layer is None else
              recurrent if layer == "all" else [number(layer, "layer")])
    pairs = []
    for i in layers:
        model.check_cell(i, 0)
        pairs += [(i, h) for h in (range(model.layers[i].mixer.heads) if head == "all" else [number(head, "head")])]
    for pair in pairs:
        model.check_cell(*pair)
    return pairs


def fail(message: str):
    """Raise InputError, inside an expression."""
    raise InputError(message)


def sae_file(model: LanguageModel, layer: int, head: int, args) -> str:
    """Where a cell's SAE lives: beside its model, named by the cell and by what is not the default."""
    variant = "".join(f"-{x}" for x in (args.source, args.write) if x not in ("write", "value"))
    return os.path.join(model.folder, f"sae{variant}-L{layer}H{head}.safetensors")


def train_sae(model: LanguageModel, layer: int, head: int, args) -> WriteSAE:
    """An SAE for one cell, from the training text alone: on writes by alternating updates, otherwise by gradients."""
    began = time.time()
    training, held_out = split(python_text())
    collect = lambda texts, n: writesae.collect(model, windows(model, texts, n, CONTEXT), layer, head,
                                                args.write, args.source, progress("writes"))
    X = collect(training, 60 if args.quick else 1500 if args.source == "write" else 800)
    Y = collect(held_out, 20 if args.quick else 60)
    generator = torch.Generator().manual_seed(args.seed)
    atoms = args.atoms or (512 if args.quick else 16384 if args.source == "write" else 2048)
    k = args.k or (1 if args.source == "write" else 32)
    encoder = args.encoder or ("tied" if k == 1 else "bilinear")
    metric = args.metric or ("read" if args.source == "write" else "frobenius")
    sae = WriteSAE(atoms, X.keys.shape[-1], X.values.shape[-1], k, encoder, architecture=model.architecture,
                   model=model.name, layer=layer, head=head, source=args.source, write=args.write, metric=metric,
                   layout="key first", seed=args.seed, cosine_min=COSINE_MIN).to(model.device)
    if metric == "read":
        sample = windows(model, training, 8 if args.quick else 128, PASSAGE)
        sae.set_metric(*writesae.read_metric(model, sample, layer, head, POSITIONS[::4], generator,
                                             progress=progress("metric")))
    if args.source == "write" and k == 1 and encoder == "tied":
        method = "alternating updates"
        writesae.fit_alternating(sae, X.keys[:, 0], X.values[:, 0], generator, args.steps or (8 if args.quick else 24),
                                 20_000 if args.quick else 150_000, progress=progress("atoms"))
    else:
        method = "Adam"
        writesae.fit_gradient(sae, X, generator, args.steps or (50 if args.quick else 2000),
                              256 if args.source == "state" else 1024, progress=progress("atoms"))
    with torch.no_grad():
        left = torch.cat([sae.energy(sae(Y.rows(slice(i, i + 256)))[0]) for i in range(0, len(Y.keys), 256)])
        energy = sae.energy(Y)
    fvu, cosines = (left.sum() / energy.sum()).item(), (1 - left / energy).clamp_min(0).sqrt()
    sae.cfg |= dict(method=method, n_train=len(X.keys), seconds=round(time.time() - began, 1), fvu=round(fvu, 4),
                    median_cosine=round(cosines.median().item(), 4))
    say(f"SAE {model.name} L{layer}H{head}: {atoms:,} atoms, k={k}, {encoder}, source {args.source}, {metric} metric, "
        f"{method} on {len(X.keys):,} samples; held out, in that metric: unexplained energy {fvu:.3f}, median cosine "
        f"{sae.cfg['median_cosine']:.3f}; {sae.cfg['seconds']} s")
    return sae.requires_grad_(False)


def find_sae(model: LanguageModel, layer: int, head: int, args) -> WriteSAE:
    """The cell's SAE from its file (or --sae), else a new one, trained now and said so."""
    path = args.sae or sae_file(model, layer, head, args)
    if args.sae or os.path.exists(path):
        sae = WriteSAE.load(path).to(model.device)
        mixer = model.layers[layer].mixer
        if sae.key_dir.shape[1] != mixer.K or sae.value_dir.shape[1] != mixer.V:
            raise InputError(f"{path}: atoms are {sae.key_dir.shape[1]} x {sae.value_dir.shape[1]}, the head's writes "
                             f"{mixer.K} x {mixer.V}; give an SAE of this cell")
        return sae
    say(f"no SAE yet for {model.name} L{layer}H{head} ({path}): training one first" +
        " (--quick: small, not kept)" * args.quick)
    sae = train_sae(model, layer, head, args)
    if not args.quick:
        sae.save(path)
    return sae


# ---------------------------------------------------------------------------------------------------------------------
# Commands
# ---------------------------------------------------------------------------------------------------------------------
def train(args) -> int:
    """Train the SAEs of the chosen cells and save each beside its model."""
    for name in args.models:
        model = open_model(name, args.device)
        for layer, head in cells(model, args.layer, args.head):
            path = args.sae or sae_file(model, layer, head, args)
            train_sae(model, layer, head, args).save(path)
            print(path)
    return 0


def percent(x: float) -> str:
    """A rate as a percentage, one decimal."""
    return f"{100 * x:.1f}"


def interval(low_high: tuple[float, float]) -> str:
    """An interval of a rate, in percent."""
    return "[" + ", ".join(map(percent, low_high)) + "]"


def print_rows(*widths: int):
    """A function that prints its arguments in columns of these widths, negative ones aligned left."""
    return lambda *cells: print("".join(f"{cell:<{-w}}" if w < 0 else f"{cell:>{w}}" for cell, w in zip(cells, widths)))


#: The paper's figures for the table: win rate at firings, and recovered fraction from its medians
#: (1 − 0.40/1.09 and so on).
PAPER = {"gdn": dict(win_rate=0.924, per_atom_win_rate=0.898, strict_order_rate=0.895, recovered=0.63,
                     n="4,851"),                                         # Qwen3.5-0.8B
         "mamba2": dict(win_rate=0.881, recovered=0.40, n="2,500"),      # Mamba-2-370M
         "rwkv7": dict(win_rate=0.453, n="6,591")}                       # RWKV-7-1.5B


def replace(args) -> int:
    """The replacement test, one row of the table per cell."""
    texts = [read_text(args.text)] if args.text else split(python_text())[1]
    n = args.passages or (12 if args.quick else 176)
    positions = POSITIONS[::4] if args.quick else POSITIONS
    results, all_records = [], []
    for name in args.models:
        model = open_model(name, args.device)
        pairs = cells(model, args.layer, args.head)
        tokens = windows(model, texts, n, PASSAGE)
        for layer, head in pairs:
            sae = find_sae(model, layer, head, args)
            began, generator = time.time(), torch.Generator().manual_seed(args.seed)
            source, write = sae.cfg["source"], sae.cfg["write"]             # the test codes what the SAE was trained on
            chosen = "as asked" if args.layer else "default: second recurrent layer, head 0"
            say(f"replace {name} L{layer}H{head} ({chosen}), {n} passages x {len(positions)} positions of "
                f"{'--text' if args.text else 'held-out text'}, {sae.n_atoms:,} atoms, "
                f"source {source}, write {write}, scale {args.scale}, {model.device}, fp32, seed {args.seed}")
            # passages at once: some 24 MB of logits
            batch = max(1, 6_000_000 // (len(CONDITIONS) * HORIZONS * model.vocab))
            parts = []
            for i, part in enumerate(tokens.split(batch)):
                one = writesae.replacement(model, sae, part, layer, head, positions, generator, write,
                                           source, args.scale, progress(f"replace {name}"))
                parts.append(one._replace(passage=one.passage + i * batch))
            records = Records(*map(torch.cat, zip(*parts)))
            cosine_min = args.cosine_min if args.cosine_min is not None else sae.cfg["cosine_min"]
            results.append(dict(model=name, layer=layer, head=head, source=source, scale=args.scale,
                                write=write, sae=sae.cfg,
                                cosine_min=cosine_min, **writesae.summary(records, cosine_min, generator),
                                seconds=round(time.time() - began, 1)))
            all_records.append((name, layer, head, records))
    print_replace(results)
    if args.json:
        write_text(args.json, json.dumps(no_nan(results), indent=1))
    if args.plot:
        plot_replace(results, args.plot)
    if args.records:
        write_text(args.records, "".join(record_lines(*entry) for entry in all_records))
    return 0


def print_replace(results: list[dict]):
    """The table: ours at firings and over all positions, the paper's row beside it; then intervals and medians."""
    row = print_rows(-12, 6, 8, 20, 10, 11, 12, 8, 11, 11, 8)
    print("Replacement: one atom in a write's place against nothing there. KL to the unmodified model, summed over the "
          "write's step")
    print(f"and the ten after it. A firing: the dominant atom explains {percent(results[0]['cosine_min'] ** 2)} % of "
          "the write's energy or more.\n")
    row("", "n", "cover%", "win% [95 % CI]", "per atom", "recovered", "projected%", "order%", "all: win%",
        "recovered", "noise")
    for r in results:
        row(f"{r['model']} L{r['layer']}H{r['head']}"[-12:], r["n_firings"], percent(r["coverage"]),
            f"{percent(r['win_rate'])} {interval(r['win_ci95'])}", percent(r["per_atom_win_rate"]),
            f"{r['recovered_pooled']:.2f}",
            percent(r["projected_win_rate"]), percent(r["strict_order_rate"]), percent(r["win_rate_all"]),
            f"{r['recovered_pooled_all']:.2f}", f"{r['median_kl']['native']:.0e}")
        paper = PAPER.get(r["model"], {})
        rate = lambda key: percent(paper[key]) if key in paper else "-"
        if paper:
            row("  the paper", paper["n"], "-", rate("win_rate"), rate("per_atom_win_rate"),
                paper.get("recovered", "-"), "-", rate("strict_order_rate"), "-", "-", "-")
    print()
    for r in results:
        medians = "  ".join(f"{name} {value:.1e}" for name, value in r["median_kl"].items())
        print(f"{r['model']} L{r['layer']}H{r['head']}: {r['n_firings']} firings of {r['n_atoms']} atoms in "
              f"{r['n_passages']} passages; 95 % CI by atom {interval(r['win_ci95_by_atom'])}, "
              f"by passage {interval(r['win_ci95_by_passage'])}\n"
              f"  median KL (nats): {medians}\n"
              f"  failures by quartile of effect {' / '.join(map(percent, r['failure_by_quartile']))} %;  "
              f"{r['seconds']} s")
    print("""
n: firings. cover: their share of all tested positions. win: KL(atom) < KL(delete). recovered: 1 −
ΣKL(atom)/ΣKL(delete) (the paper's: from its medians). projected: the win rate of a random rank-1 direction
at its own best coefficient (50 = it means nothing). order: atom < delete < random atom. all: every tested
position. noise: median KL with the write put back.""")


def pyplot():
    """matplotlib's pyplot, drawing to files."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    return plt


def plot_replace(results: list[dict], path: str):
    """Three panels, a line per cell: win rate and recovered fraction by horizon, and win rate against coverage."""
    plt = pyplot()
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.6), constrained_layout=True)
    for r in results:
        label, horizons = f"{r['model']} L{r['layer']}H{r['head']}", [h["horizon"] for h in r["by_horizon"]]
        line, = axes[0].plot(horizons, [h["win_rate"] for h in r["by_horizon"]], marker="o", label=label)
        axes[0].axhline(r["win_rate"], color=line.get_color(), linestyle=":")
        axes[1].plot(horizons, [h["recovered_pooled"] for h in r["by_horizon"]], marker="o", label=label)
        axes[1].axhline(r["recovered_pooled"], color=line.get_color(), linestyle=":")
        axes[2].plot([c["coverage"] for c in r["by_coverage"]], [c["win_rate"] for c in r["by_coverage"]],
                     marker="o", label=label)
        axes[2].axhline(r["projected_win_rate"], color=line.get_color(), linestyle="--", linewidth=1)
    axes[0].set(ylim=(0.45, 1.01), xlabel="tokens after the write", ylabel="win rate over deletion",
                title="at firings (dotted: kl@0..10)")
    axes[1].set(xlabel="tokens after the write", ylabel="recovered fraction", title="at firings (dotted: kl@0..10)",
                ylim=(0, 1.02))
    axes[2].set(xlabel="coverage: share of positions kept", ylabel="win rate, kl@0..10",
                title="best matches first (dashed: projected)")
    axes[1].legend()
    save_then_rename(lambda temporary: figure.savefig(temporary, dpi=110, format="png"), path)


def formula(args) -> int:
    """The logit-change ladder, one table per model."""
    training, held_out = split(python_text())
    texts = [read_text(args.text)] if args.text else held_out
    n = args.passages or (8 if args.quick else 100)
    positions = POSITIONS[1::8] if args.quick else POSITIONS[::4]
    results, drawn = [], []
    for name in args.models:
        model = open_model(name, args.device)
        for layer, head in cells(model, args.layer, args.head):
            sae, began = find_sae(model.float(), layer, head, args).double(), time.time()
            model.double()                                     # what a small edit moves is to stand clear of rounding
            say(f"formula {name} L{layer}H{head}: the write deleted, swapped for its atom, or an atom of norm ε added, "
                f"at firings in {n} passages x {len(positions)} positions of "
                f"{'--text' if args.text else 'held-out text'}; tokens of rank {', '.join(map(str, writesae.RANKS))}; "
                f"{model.device}, fp64")

            def climb(texts: list[str], n: int, change: str | float) -> writesae.Ladder:
                parts, tokens = [], windows(model, texts, n, PASSAGE)
                for i, part in enumerate(tokens.split(50)):
                    one = writesae.ladder(model, sae, part, layer, head, positions, change, COSINE_MIN,
                                          progress(f"{name} {change}"))
                    parts.append(one._replace(passage=one.passage + 50 * i))
                return writesae.Ladder(*map(torch.cat, zip(*parts)))

            swap, delete, fewer = climb(texts, n, "swap"), climb(texts, n, "delete"), max(4, n // 3)
            sizes = {size: climb(texts, fewer, size) for size in (0.1, 0.3, 1.0, 3.0)}
            rungs = writesae.ladder_summary(swap, delete, sizes, climb(training, fewer, "swap"))
            results.append(dict(model=name, layer=layer, head=head, n=len(swap.atom) * len(writesae.RANKS),
                                n_firings=len(swap.atom), n_passages=len(swap.passage.unique()), rungs=rungs,
                                state_difference=swap.state_difference.mean(0).tolist(),
                                output_cosine=swap.output_cosine.mean(0).tolist(),
                                seconds=round(time.time() - began, 1)))
            drawn.append((f"{name} L{layer}H{head}", swap))
    print_formula(results)
    if args.json:
        write_text(args.json, json.dumps(no_nan(results), indent=1))
    if args.plot:
        plot_formula(results, drawn, args.plot)
    return 0


#: What the paper reports for its three-factor formula.
PAPER_FORMULA = {"gdn": "median R² 0.98 per atom (IQR 0.977-0.990), with a scalar fitted per passage, atom and token",
                 "mamba2": "R² -0.07", "rwkv7": "not reported"}


def print_formula(results: list[dict]):
    """A table per cell: a row per rung, R² about y = ŷ for the two natural edits and for small ones."""
    short = lambda x: f"{x:.3f}" if not x < -9.995 else f"{x:.0e}"
    row = print_rows(-28, 9, 9, 7, 7, 24, 9, 9, 8, 8, 8)
    for r in results:
        print(f"{r['model']} L{r['layer']}H{r['head']}: change of a logit over the write's step and the ten after it, "
              f"{r['n_firings']} firings x {len(writesae.RANKS)} tokens from {r['n_passages']} passages. "
              "R² about y = ŷ:")
        row("  rung", "exact to", "swap", "slope", "sign%", "per atom [IQR]", "delete", "ε=0.1", "ε=1", "ε=3", "train.")
        for i, rung in enumerate(r["rungs"]):
            atom, by_size = rung["r2_per_atom"], rung["r2_by_size"]
            row(f"  {i + 1} {rung['name']}", f"order {rung['order']}" if rung["order"] else "-", short(rung["r2"]),
                f"{rung['slope']:.2f}", f"{100 * rung['sign_agreement']:.1f}",
                f"{short(atom['median'])} [{short(atom['low'])}, {short(atom['high'])}]", short(rung["r2_delete"]),
                f"{rung['r2_small']:.4f}" if rung["r2_small"] > -10 else short(rung["r2_small"]),
                short(by_size["1.0"]), short(by_size["3.0"]), short(rung["r2_training_text"]))
        first, *_, last = later = r["state_difference"][1:]
        print(f"  the paper, three factors: {PAPER_FORMULA.get(r['model'], 'this model was not tested')}\n"
              f"  after the swap the state differs by {100 * sum(later) / len(later):.1f} % of its norm over the next "
              f"ten tokens (first {100 * first:.1f} %, tenth {100 * last:.1f} %; the authors' reply: below 5 %);\n"
              f"  the layer's output has a cosine of {min(r['output_cosine']):.4f} or more with the native one at "
              f"every step;\n  per atom: over the {r['rungs'][0]['r2_per_atom']['n_atoms']} atoms that fire, each over "
              "its firings, tokens and steps;  "
              f"{r['seconds']} s\n")
    print("""swap: the atom in the write's place. delete: the write taken out. ε: an atom of that norm added. train.:
swap on training text. Nothing is fitted but rung 2. What each step up is worth: 1 to 3 the erase term; 3
to 4 the head's norm and gate and the final norm; 4 to 5 the later layers; 5 to 6 second order; 6 to 7 the
head's norm, far from linear where a write is most of its input; 7 to 8 what is beyond second order in the
layers above.""")


def plot_formula(results: list[dict], drawn: list, path: str):
    """A row per cell: predicted against measured for rungs 1, 2, 5 and 7 of the swap, and R² by horizon."""
    plt, shown = pyplot(), (0, 1, 4, 6)
    figure, axes = plt.subplots(len(drawn), 5, figsize=(15, 3.1 * len(drawn)), constrained_layout=True, squeeze=False)
    for row, (label, swap), r in zip(axes, drawn, results):
        y = swap.measured.flatten()
        limit = y.abs().sort().values[int(0.995 * len(y))].item()
        for ax, i in zip(row, shown):
            ax.scatter(swap.predicted[:, i].flatten(), y, s=2, alpha=0.3, linewidths=0)
            ax.plot([-limit, limit], [-limit, limit], color="black", linewidth=0.7)
            ax.set(xlim=(-limit, limit), ylim=(-limit, limit), xlabel="predicted (nats)", ylabel="measured (nats)")
            ax.set_title(f"{label}: {writesae.RUNGS[i][0]}", fontsize=9)
            row[4].plot(range(HORIZONS), [max(x, -1) for x in r["rungs"][i]["by_horizon"]], marker="o",
                        label=writesae.RUNGS[i][0])
        row[4].set(xlabel="tokens after the write", ylabel="R² about y = ŷ (cut at −1)", ylim=(-1.05, 1.05))
    axes[0, 4].legend(fontsize=7, loc="center left", bbox_to_anchor=(0, 0.35), framealpha=0.5)
    save_then_rename(lambda temporary: figure.savefig(temporary, dpi=90, format="png"), path)


# ---------------------------------------------------------------------------------------------------------------------
# steer and erase: edits of the cache
# ---------------------------------------------------------------------------------------------------------------------
PROMPT, UNRELATED = 96, 32                   # tokens of a prompt, and of the other text that shows what an edit costs
MAGNITUDES = (1.5, 3.0, 6.0)                 # of each edit, times the native write beside it (Frobenius)
BUDGET = 2.0                                 # of all edits together, in such writes
REACHES = ("head", "layer", "all")


def reach_cells(model: LanguageModel, layer: int, head: int, reach: str) -> list[tuple[int, int]]:
    """The cells that are edited: one head, its layer, or all recurrent layers."""
    return [(i, h) for i in model.recurrent_layers for h in range(model.layers[i].mixer.heads)
            if reach == "all" or i == layer and (reach == "layer" or h == head)]


def steer(args) -> int:
    """Steering: the ladder of edits; with --smallest the search for the least one; with --prompt one edit, shown."""
    if args.prompt is not None or args.target is not None:
        return steer_one(args)
    texts = [read_text(args.text)] if args.text else split(python_text())[1]
    n = args.passages or (8 if args.quick else 120 if args.smallest else 35)
    each = 1 if args.quick or args.smallest else 3                    # targets per prompt and stratum
    results = []
    for name in args.models:
        model, began = open_model(name, args.device), time.time()
        (layer, head), *more = cells(model, args.layer, args.head)
        if more:
            raise InputError("steer takes one cell; --reach layer and --reach all edit more than one")
        tokens = windows(model, texts, n, PASSAGE)
        task = Task(model, tokens[:, :PROMPT], tokens.roll(n // 2, 0)[:, :UNRELATED], each, args.seed,
                    ("100-1000", "absent") if args.smallest else tuple(writesae.STRATA))
        say(f"steer {name}: {len(task.pairs.target)} pairs of a prompt and a target, {n} prompts of {PROMPT} tokens of "
            f"{'--text' if args.text else 'held-out text'}; edits at each prompt's last {writesae.EDITED} positions, "
            f"then {writesae.NEW} tokens decoded greedily; head = L{layer}H{head}; {model.device}, fp32, "
            f"seed {args.seed}")
        edits = smallest_edits(task, args) if args.smallest else edit_ladder(task, layer, head, args)
        results.append(dict(model=name, layer=layer, head=head, edits=edits, seconds=round(time.time() - began, 1)))
    (print_smallest if args.smallest else print_ladder)(results)
    if args.json:
        flat = [dict(model=r["model"], layer=r["layer"], head=r["head"], **edit)
                for r in results for edit in r["edits"]]
        write_text(args.json, json.dumps(no_nan(flat), indent=1))
    if args.plot:
        plot_steer(results, args.plot)
    return 0


class Task:
    """The prompts, targets and unrelated texts on which every kind of edit of one model is tried."""

    def __init__(self, model: LanguageModel, prompts: Tensor, unrelated: Tensor, each: int, seed: int,
                 strata: tuple[str, ...]):
        self.model, self.tokens, self.unrelated, self.seed, self.strata = model, prompts, unrelated, seed, strata
        self.ready = {}
        pairs = writesae.draw_targets(self.prompts(writesae.EDITED).logits, prompts, each, self.generator())
        chosen = torch.tensor([name in strata for name in writesae.STRATA], device=prompts.device)[pairs.stratum]
        self.pairs = writesae.Pairs(*(x[chosen] for x in pairs))
        for name in strata:
            halves = self.pairs.prompt[self.pairs.stratum == list(writesae.STRATA).index(name)] % 2
            if len(halves.unique()) < 2:
                raise InputError(f"no target of the stratum {name!r} on the even or on the odd ones of {len(prompts)} "
                                 f"prompts (the vocabulary has {model.vocab} tokens): take more --passages")
        self.native = self.steer()

    def generator(self) -> torch.Generator:
        """The same draws for every edit."""
        return torch.Generator().manual_seed(self.seed)

    def prompts(self, positions: int) -> writesae.Prompts:
        """The prompts, ready for edits of their last positions; read once."""
        if positions not in self.ready:
            self.ready[positions] = writesae.read_prompts(self.model, self.tokens, positions)
        return self.ready[positions]

    def steer(self, positions: int = writesae.EDITED, **how) -> writesae.Continuation:
        """One kind of edit (`writesae.steer`) on all pairs."""
        return writesae.steer(self.model, self.prompts(positions), self.pairs, self.unrelated,
                              generator=self.generator(), **how)

    def summary(self, edited: writesae.Continuation, random: writesae.Continuation, rows: Tensor) -> dict:
        """`steering_summary` of the pairs where rows [N] is true."""
        part = [writesae.Continuation(*(x[rows] for x in c)) for c in (edited, self.native, random)]
        return writesae.steering_summary(*part, self.pairs.prompt.cpu()[rows], self.generator())

    def by_stratum(self, edited: writesae.Continuation, random: writesae.Continuation, rows: Tensor | bool = True):
        """`summary` of each stratum, of the pairs where rows is true."""
        stratum = self.pairs.stratum.cpu()
        return [dict(name=name, **self.summary(edited, random, rows & (stratum == j)))
                for j, name in enumerate(writesae.STRATA) if name in self.strata]


def edit_ladder(task: Task, layer: int, head: int, args) -> list[dict]:
    """Every value side, key side, reach and magnitude (or those asked for): figures by stratum, and the sign test of
    one head's edit at the prompt's last position."""
    chosen = lambda asked, every: every if asked is None else [asked]
    magnitudes = chosen(args.magnitude, [3.0] if args.quick else MAGNITUDES)
    keys, values = chosen(args.key, writesae.KEY_SIDES), chosen(args.value, writesae.VALUE_SIDES)
    grid = [(reach, key, m) for reach in chosen(args.reach, REACHES) for key in keys for m in magnitudes]
    edits, signs = [], {}
    last = task.prompts(1)
    for key, value in ((key, value) for key in keys for value in values if value != "ascent"):
        rows = task.pairs.prompt
        sites = [site.rows(rows) for site in writesae.edit_sites(task.model, last, [(layer, head)], key)]
        predicted, measured = writesae.sign_test(task.model, last.rows(rows), sites, task.pairs.target, value)
        right = (predicted.sign() == measured.sign()).cpu()
        signs[key, value] = dict(n=len(right), **writesae.agreement(measured, predicted),
                                 sign_ci95=writesae.rate_ci95(right, rows.cpu().repeat(2), task.generator()))
    for reach, key, magnitude in progress(f"steer {task.model.name}")(grid):
        how = dict(cells=reach_cells(task.model, layer, head, reach), key=key, magnitude=magnitude)
        random = task.steer(value="random", **how)
        for value in values:
            edited = task.steer(value=value, **how)
            edits.append(dict(value=value, key=key, reach=reach, magnitude=magnitude, size=edited.size.mean().item(),
                              strata=task.by_stratum(edited, random)))
            if reach == "head" and (key, value) in signs:
                edits[-1]["sign_test"] = signs[key, value]
    return edits


def least(candidates: list, passes):
    """The first of increasing candidates that passes, by bisection (as if all after it passed too); None if none."""
    low, high = 0, len(candidates)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if passes(candidates[middle]) else (middle + 1, high)
    return candidates[low] if low < len(candidates) else None


def smallest_edits(task: Task, args) -> list[dict]:
    """The least edit, by ascent, after which targets of rank 100-1000 appear, in the prompt or not.

    Two searches: the least budget shared by all edits of some layers and positions, and the fewest writes at a given
    magnitude. It is the least after which every target on the even prompts appears; the figures are from the odd ones,
    which had no say. (Asking for 99 % on the even ones gave less than that on the odd.)
    """
    even = task.pairs.prompt.cpu() % 2 == 0
    model, layers = task.model, task.model.recurrent_layers
    everywhere = reach_cells(model, 0, 0, "all")
    budgets = [round(0.25 * 2 ** (i / 4), 2) for i in range(25)]                        # 0.25 to 16
    counts = [n for n in (1, 2, 3, 4, 5, 6, 8, 10, 12, 14, 16, 20, 24, 28, 32, 40, 48, 64, 80, 96, 112, 128)
              if n < writesae.EDITED * len(everywhere)] + [writesae.EDITED * len(everywhere)]
    searches = [("all layers", everywhere, n, None) for n in ((3,) if args.quick else (1, 3, 6))]
    if not args.quick:
        searches += [(f"layer {i}", [cell for cell in everywhere if cell[0] == i], 3, None) for i in layers]
    searches += [("best writes", everywhere, 3, m) for m in ((3.0,) if args.quick else MAGNITUDES)]
    found = []
    keys = [args.key] if args.key else writesae.KEY_SIDES
    for (where, chosen, positions, each), key in progress(f"smallest {model.name}")(
            [(search, key) for search in searches for key in keys]):
        size = lambda x: (dict(magnitude=x, shared=True) if each is None else dict(magnitude=each, writes=x))
        tried = {}

        def passes(x) -> bool:
            tried[x] = task.steer(positions, cells=chosen, key=key, value="ascent", **size(x))
            return bool((tried[x].count[even] > 0).all())

        x = least(budgets if each is None else counts, passes)
        entry = dict(where=where, positions=positions, key=key, value="ascent", n_edits=positions * len(chosen),
                     n_tried=len(tried), found=x is not None,
                     **dict(magnitude=each, shared=each is None, writes=None) | size(x or max(tried)))
        edited = tried[x or max(tried)]
        random = task.steer(positions, cells=chosen, key=key, value="random", **size(x or max(tried)))
        found.append(entry | dict(
            size=edited.size.mean().item(), chosen_on=int(even.sum()),
            chosen_rate=(edited.count[even] > 0).double().mean().item(),
            **task.summary(edited, random, ~even), strata=task.by_stratum(edited, random, ~even)))
    return found


#: The paper's one setting that it reports: formula, one head, 3x (Qwen3.5-0.8B; 1.5x 66.7 %; Mamba-2: no effect).
PAPER_STEER = {"gdn": "66.7 at 1.5x, 100 at 3x and 6x, unedited 33.3, lift 1.27 nats; absent tokens 0",
               "mamba2": "no effect", "rwkv7": "not reported"}


def print_ladder(results: list[dict]):
    """A table per model: a row per reach, key side and value side, and the random direction."""
    for r in results:
        edits, magnitudes = r["edits"], sorted({e["magnitude"] for e in r["edits"]})
        middle = magnitudes[len(magnitudes) // 2]
        row = print_rows(-6, -6, -9, 19, *[6] * (len(magnitudes) - 1), 7, 9, 7, 7, 7, 7, 6, 7, 8, 7)
        columns = [middle] + [m for m in magnitudes if m != middle]
        native = {s["name"]: s for s in edits[0]["strata"]}
        pairs = ", ".join(f"{s['n_pairs']} {s['name']} ({s['n_prompts']} prompts)" for s in native.values())
        print(f"{r['model']}, head = L{r['layer']}H{r['head']}: share of continuations that hold the target, in %. "
              f"Pairs: {pairs}.")
        row("", "", "", *(f"{m:g}x" + " [95 % CI]" * (m == middle) for m in columns),
            *list(writesae.STRATA)[1:], "lift", "rank+%", "shift", "times", "KL", "ppl", "cache%")
        first = native["100-1000"]
        row("unedited", "", "", f"{percent(first['native_rate'])} {interval(first['native_ci95'])}",
            *[percent(first["native_rate"])] * (len(columns) - 1),
            *(percent(native[s]["native_rate"]) for s in list(writesae.STRATA)[1:]), "", "", "", "", "",
            f"{first['native_perplexity']:.2f}", "")
        for reach, key in dict.fromkeys((e["reach"], e["key"]) for e in edits):
            at = {(e["value"], e["magnitude"]): e for e in edits if (e["reach"], e["key"]) == (reach, key)}
            for value in ["random", *dict.fromkeys(value for value, _ in at)]:
                kind = "random" if value == "random" else "edited"
                get = lambda m: at[next(iter(at))[0] if value == "random" else value, m]
                s = {x["name"]: x for x in get(middle)["strata"]}
                main, edited = s["100-1000"], value != "random"
                row(reach, key, value, f"{percent(main[f'{kind}_rate'])} {interval(main[f'{kind}_ci95'])}",
                    *(percent(get(m)["strata"][0][f"{kind}_rate"]) for m in columns[1:]),
                    *(percent(s[name][f"{kind}_rate"]) for name in list(s)[1:]),
                    f"{main['first_step_lift_nats' if edited else 'random_lift_nats']:+.2f}",
                    *((percent(main["rank_improved"]), f"{main['median_rank_shift']:.0f}", f"{main['occurrences']:.1f}")
                      if edited else ("", "", "")),
                    f"{main[f'{kind}_kl_unrelated']:.3f}", f"{main[f'{kind}_perplexity']:.2f}",
                    percent(get(middle)["size"]) if edited else "")
        print(f"  the paper (formula, one head): {PAPER_STEER.get(r['model'], 'this model was not tested')}")
        for e in edits:
            if "sign_test" in e and e["magnitude"] == middle:
                t = e["sign_test"]
                print(f"  sign test, one head, last position, 1x, {e['key']} key, {e['value']}: right in "
                      f"{percent(t['sign_agreement'])} % {interval(t['sign_ci95'])} of {t['n']}, Pearson "
                      f"{t['pearson']:.3f}, R² {t['r2']:.3f}")
        print(f"  {r['seconds']} s\n")
    print("""The paper's sign test: right in 84.6 % of 2,000, Pearson 0.162, R² -0.06.
Nx: each edit is N times as large as the write beside it (Frobenius). Columns Nx: targets of rank 100-1000
that stand in the prompt. All the others are at the first column's N. rarer: rank above 1000, frequent:
rank 2-99, both in the prompt; absent: rank 100-1000, not in the prompt. From "lift" on: the targets of the
first column. lift: mean rise of log p(target) for the first new token, nats. rank+: share of ranks
improved, shift: median rank before minus after. times: mean count of the target in 20 tokens. KL: per
token of unrelated later text. ppl: perplexity of the continuation under the unedited model. cache: all
edits against all states (Frobenius).""")


def print_smallest(results: list[dict]):
    """A table per model: for each place and key side the least edit that passed, and its price."""
    row = print_rows(-26, -7, 16, 8, 22, 9, 10, 8, 8, 8, 8, 8)
    for r in results:
        one = r["edits"][0]
        print(f"{r['model']}: the least edit (ascent) after which all {one['chosen_on']} targets of rank 100-1000 on "
              f"the even prompts appear; figures from {one['n_pairs']} pairs on the {one['n_prompts']} odd prompts.")
        row("where", "key", "least", "cache%", "appear% [95 % CI]", "absent%", "unedited%", "random%", "lift", "times",
            "KL", "ppl")
        for e in r["edits"]:
            least = (f"budget {e['magnitude']:g}" if e["shared"] else f"{e['writes']} at {e['magnitude']:g}x")
            row(f"{e['where']}, {e['positions']} position{'s' * (e['positions'] > 1)}", e["key"],
                least if e["found"] else f"none to {e['magnitude'] if e['shared'] else e['writes']:g}",
                percent(e["size"]), f"{percent(e['edited_rate'])} {interval(e['edited_ci95'])}",
                percent(e["strata"][1]["edited_rate"]), percent(e["native_rate"]), percent(e["random_rate"]),
                f"{e['first_step_lift_nats']:+.1f}", f"{e['occurrences']:.1f}", f"{e['edited_kl_unrelated']:.3f}",
                f"{e['edited_perplexity']:.2f}")
        print(f"  unedited: perplexity {one['native_perplexity']:.2f};  {r['seconds']} s\n")
    print("""budget: the size of all edits together in native writes, √Σ(magnitude²), divided among heads and positions
by the ascent.
N at Mx: only the N writes of each prompt whose edits lift most to first order, each at M times the write
beside it.
cache: all edits against all states (Frobenius). times: mean count of the target in 20 tokens. KL: per
token of unrelated later text. ppl: perplexity of the continuation under the unedited model. random: the
same keys and sizes, random values.""")


def steer_one(args) -> int:
    """Show one edit: the continuation before and after, and the target's rank and probability step by step."""
    if not args.prompt or not args.target:
        raise InputError("an empty prompt or target: give both --prompt TEXT and --target TOKEN")
    shown = []
    for name in args.models:
        model = open_model(name, args.device)
        (layer, head), *_ = cells(model, args.layer, args.head)
        tokenizer = models.load_tokenizer(model)
        target = tokenizer.encode(args.target)
        if len(target) != 1:
            pieces = ", ".join(repr(tokenizer.decode([i])) for i in target)
            raise InputError(f"--target {args.target!r} is {len(target)} tokens for {name}: {pieces}; give one of them")
        tokens = torch.tensor([tokenizer.encode(args.prompt)], device=model.device)
        prompts = writesae.read_prompts(model, tokens)
        pairs = writesae.Pairs(*torch.tensor([[0], target, [0]], device=model.device))
        how = dict(cells=reach_cells(model, layer, head, args.reach or "all"), key=args.key or "read",
                   value=args.value or "ascent", generator=torch.Generator().manual_seed(args.seed),
                   magnitude=BUDGET if args.magnitude is None else args.magnitude, shared=args.magnitude is None)
        unrelated = tokens[:, :1]                                                   # any: the price is not shown
        before = writesae.steer(model, prompts, pairs, unrelated)
        after = writesae.steer(model, prompts, pairs, unrelated, **how)
        last = ", ".join(repr(tokenizer.decode([i])) for i in prompts.last[0].tolist())
        text = [args.prompt + tokenizer.decode(c.tokens[0].tolist()) for c in (before, after)]
        size = (f"together as large as {how['magnitude']:g} native writes" if how["shared"] else
                f"each {how['magnitude']:g} times as large as the write beside it")
        first = tokens.shape[1] - writesae.EDITED
        print(f"{name}: {len(how['cells']) * writesae.EDITED} edits ({how['value']}, {how['key']} key, reach "
              f"{args.reach or 'all'}), {size}, at positions {first}-{first + writesae.EDITED - 1} of "
              f"{tokens.shape[1]} tokens: {last}\n"
              f"  target {args.target!r}; all edits are {100 * after.size.item():.1f} % of the cache (Frobenius)\n"
              f"  before: {text[0]!r}\n  after:  {text[1]!r}")
        row = print_rows(6, 14, 12, 16, 14, 12, 16)
        row("step", "token before", "rank", "p(target)", "token after", "rank", "p(target)")
        for i in range(writesae.NEW):
            side = lambda c: (repr(tokenizer.decode([c.tokens[0, i].item()])), c.rank[0, i].item(),
                              f"{c.log_p[0, i].exp().item():.2e}")
            row(i + 1, *side(before), *side(after))
        print()
        shown.append(dict(
            model=name, prompt=[tokenizer.decode([i]) for i in tokens[0].tolist()], target=args.target,
            positions=list(range(first, first + writesae.EDITED)), value=how["value"], key=how["key"],
            reach=args.reach or "all", magnitude=how["magnitude"], shared=how["shared"], size=after.size.item(),
            before=text[0], after=text[1], rank_before=before.rank[0].tolist(), rank_after=after.rank[0].tolist(),
            log_p_before=before.log_p[0].tolist(), log_p_after=after.log_p[0].tolist()))
    if args.json:
        write_text(args.json, json.dumps(no_nan(shown), indent=1))
    return 0


def plot_steer(results: list[dict], path: str):
    """A panel per model: what an edit gives, the share of targets that appear, against what it costs; a line per kind
    of edit, along its magnitudes."""
    plt = pyplot()
    figure, axes = plt.subplots(1, len(results), figsize=(4.2 * len(results) + 1.6, 3.8), constrained_layout=True,
                                squeeze=False)
    marks = dict(formula="s", gradient="o", ascent="^")
    colours = dict(head="tab:grey", layer="tab:orange", all="tab:blue")
    for ax, r in zip(axes[0], results):
        for kind in dict.fromkeys((e["reach"], e["key"], e["value"]) for e in r["edits"]):
            reach, key, value = kind
            main = [e["strata"][0] for e in r["edits"] if (e["reach"], e["key"], e["value"]) == kind]
            ax.plot([s["edited_kl_unrelated"] for s in main], [100 * s["edited_rate"] for s in main], linewidth=0.8,
                    marker=marks[value], color=colours[reach], fillstyle="full" if key == "read" else "none",
                    markersize=5)
        ax.axhline(100 * r["edits"][0]["strata"][0]["native_rate"], color="black", linestyle=":", linewidth=1)
        ax.set(xscale="log", xlabel="cost: KL per token of unrelated later text (nats)", title=r["model"],
               ylabel="targets of rank 100-1000 that appear, %", ylim=(-3, 103))
    labels = [(marks[value], "black", value) for value in marks] + [("_", colours[reach], reach) for reach in colours]
    for mark, colour, label in labels:
        axes[0, -1].plot([], [], marker=mark, color=colour, linestyle="none", label=label)
    figure.legend(loc="outside right center", fontsize=8, title="filled: read key\nempty: write key\ndotted: unedited",
                  title_fontsize=8)
    save_then_rename(lambda temporary: figure.savefig(temporary, dpi=100, format="png"), path)


def erase(args) -> int:
    """Erasing: an atom's write taken out at its own firings, and at as many other positions."""
    texts = [read_text(args.text)] if args.text else split(python_text())[1]
    n = args.passages or (80 if args.quick else 1600)
    results = []
    for name in args.models:
        model = open_model(name, args.device)
        tokens = windows(model, texts, n, PASSAGE)
        tokenizer = models.load_tokenizer(model)
        for layer, head in cells(model, args.layer, args.head):
            sae, began = find_sae(model, layer, head, args), time.time()
            generator = torch.Generator().manual_seed(args.seed)
            if sae.cfg["source"] != "write":
                raise InputError("erase takes an SAE on writes, this one codes states; leave --source out")
            cosine_min = args.cosine_min if args.cosine_min is not None else sae.cfg["cosine_min"]
            atoms, promoted, erased = writesae.erasure(
                model, sae, tokens, layer, head, range(POSITIONS.start, PASSAGE - HORIZONS + 1), generator, cosine_min,
                n_atoms=5 if args.quick else 20, progress=progress(f"erase {name}"))
            say(f"erase {name} L{layer}H{head}: the {len(atoms)} atoms that fire most in {n} passages of "
                f"{'--text' if args.text else 'held-out text'}; tokens chosen on the even ones, tested on the odd; "
                f"{model.device}, fp32, seed {args.seed}")
            part = lambda rows: writesae.erasure_summary(writesae.Erased(*(x[rows] for x in erased)), generator)
            results.append(dict(
                model=name, layer=layer, head=head, all=part(slice(None)),
                atoms=[dict(atom=atom.item(), token=token.item(), text=tokenizer.decode([token.item()]),
                            **part(erased.atom == j)) for j, (atom, token) in enumerate(zip(atoms, promoted))],
                seconds=round(time.time() - began, 1)))
    print_erase(results)
    if args.json:
        write_text(args.json, json.dumps(no_nan(results), indent=1))
    return 0


def print_erase(results: list[dict]):
    """A table per cell: all firings together, then the atoms."""
    row = print_rows(-8, -18, 9, 13, 11, 9, 12, 12, 11, 11)
    shown = lambda text: repr(text) if len(repr(text)) <= 16 else repr(text)[:14] + "…'"
    for r in results:
        print(f"{r['model']} L{r['layer']}H{r['head']}: change of the promoted token's log-probability when the atom's "
              "write is taken out, nats, median of firings")
        row("atom", "token", "firings", "at firings", "mean", "falls%", "elsewhere", "own share", "p paired", "p alone")
        for e in [dict(r["all"], atom="all", text=""), *r["atoms"]]:
            row(e["atom"], shown(e["text"]) if e["text"] else "", e["n_firings"], f"{e['firing_median']:+.5f}",
                f"{e['firing_mean']:+.5f}", percent(e["firing_falls"]), f"{e['elsewhere_median']:+.5f}",
                f"{e['own_share_median']:+.5f}", f"{e['p_paired']:.1e}", f"{e['p_firing']:.1e}")
        low, high = r["all"]["mean_ci95"]
        fall = [a for a in r["atoms"] if a["p_firing"] < 0.05 and a["firing_mean"] < 0]
        print(f"  mean over all firings {r['all']['firing_mean']:+.5f} [{low:+.5f}, {high:+.5f}] by passage; "
              f"{len(fall)} of {len(r['atoms'])} atoms: token falls with p < 0.05;  {r['seconds']} s\n")
    print("""The paper: one atom, 150 firings, median -0.116 nats, p 1e-6, no effect elsewhere.
The token was chosen on the even passages (the one that loses most on the mean), all figures are from the
odd ones. Changes are means over the write's step and the ten after it. elsewhere: the same matrix taken
out where the atom does not fire; own share: there, only as much of it as the atom's coefficient says. p:
signs of whole passages flipped, two-sided, 10,000 draws; paired: firings against elsewhere; alone: firings
against zero.""")


def record_lines(name: str, layer: int, head: int, records: Records) -> str:
    """One JSON line per tested position, firing or not."""
    lines = []
    for i in range(len(records.atom)):
        row = dict(model=name, layer=layer, head=head)
        row |= {key: getattr(records, key)[i].item() for key in (
            "passage", "position", "atom", "coefficient", "cosine", "cosine_read")}
        row["kl"] = {c: records.kl[i, j].tolist() for j, c in enumerate(CONDITIONS)}
        row["kl_reverse"] = {c: records.kl_reverse[i, j].tolist() for j, c in enumerate(CONDITIONS[:2])}
        lines.append(json.dumps(row) + "\n")
    return "".join(lines)


def read_text(path: str) -> str:
    """A text file's content. Raises InputError if there is none."""
    try:
        with open(path, encoding="utf-8", errors="replace") as f:
            return f.read()
    except OSError as error:
        raise InputError(f"--text {path}: cannot be read ({error.strerror}); give a text file") from None


def no_nan(x):
    """The same results with None for NaN (a rate of no firings), which JSON has no word for."""
    if isinstance(x, dict):
        return {key: no_nan(value) for key, value in x.items()}
    if isinstance(x, (list, tuple)):
        return [no_nan(value) for value in x]
    return None if isinstance(x, float) and not math.isfinite(x) else x


def write_text(path: str, text: str):
    """Write a file whole or not at all. Raises InputError where that is impossible."""
    def write(temporary):
        with open(temporary, "w", encoding="utf-8") as f:
            f.write(text)
    try:
        save_then_rename(write, path)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror}); give a place that can") from None


class Parser(argparse.ArgumentParser):
    """argparse, with errors as one line."""

    def error(self, message: str):
        """Raise InputError where argparse would print its usage and exit."""
        raise InputError(f"{message}; see python run.py --help")


COMMANDS = dict(replace=replace, formula=formula, steer=steer, erase=erase, train=train, pretrain=pretrain)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line. Raises InputError for a wrong one."""
    p = Parser(prog="run.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("command", choices=list(COMMANDS))
    p.add_argument("--model",
                   help="gdn, mamba2, rwkv7 (default: all three), a folder, or a hub id such as Qwen/Qwen3.5-0.8B")
    p.add_argument("--layer", help="a recurrent layer, from 0, or all (default: the second recurrent one)")
    p.add_argument("--head", default="0", help="a head, from 0, or all (default 0)")
    p.add_argument("--text", help="test on this text file instead of the held-out Python text")
    p.add_argument("--passages", type=int, help="number of test passages or prompts (default: replace 176, formula "
                   "100, steer 35, steer --smallest 120, erase 1600)")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, ...")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--quick", action="store_true", help="the same code on a small sample, in seconds")
    p.add_argument("--json", help="write the results there (replace, formula, steer, erase)")
    p.add_argument("--plot", help="draw the figures into this PNG (replace, formula, steer)")
    p.add_argument("--records", help="replace: write one JSON line per tested position there")
    p.add_argument("--sae", help="this SAE file instead of the one beside the model")
    p.add_argument("--source", default="write", choices=["write", "state"],
                   help="what the SAE codes (state: the paper's recipe)")
    p.add_argument("--write", default="value", choices=["value", "delta"],
                   help="the native write: k vᵀ, or all that a token adds")
    p.add_argument("--prompt", help="steer: show one edit of this text's cache, with --target")
    p.add_argument("--target", help="steer: the token that is to appear after --prompt")
    p.add_argument("--key", choices=writesae.KEY_SIDES, help="steer: only this key side (shown: read)")
    p.add_argument("--value", choices=writesae.VALUE_SIDES, help="steer: only this value side (shown: ascent)")
    p.add_argument("--reach", choices=REACHES, help="steer: edit one head, its layer, or all (shown: all)")
    p.add_argument("--magnitude", type=float, help="steer: only this size of each edit, times the write beside it "
                   f"(shown: {BUDGET:g} of such writes in all)")
    p.add_argument("--smallest", action="store_true", help="steer: search the least edit that makes targets appear")
    p.add_argument("--scale", default="activation", choices=["activation", "norm", "least-squares"],
                   help="size of the atom put in")
    p.add_argument("--cosine-min", type=float, help="least cosine of a firing (default: as stored in the SAE)")
    p.add_argument("--atoms", type=int, help="train: number of atoms")
    p.add_argument("--k", type=int, help="train: active atoms per input")
    p.add_argument("--metric", choices=["read", "frobenius"],
                   help="train: what near means (read for writes, frobenius for states)")
    p.add_argument("--encoder", choices=["tied", "bilinear"], help="train: default tied for k = 1, else bilinear")
    p.add_argument("--steps", type=int, help="train: steps")
    p.add_argument("--tokens", type=int, default=8_192_000, help="pretrain: training tokens in all")
    p.add_argument("--out", default=os.path.join(HERE, "checkpoints"), help="pretrain: where the model's folder goes")
    args = p.parse_args(argv)
    args.models = [args.model] if args.model else list(EMBEDDED)
    if args.passages is not None and args.passages < 1:
        raise InputError(f"--passages {args.passages}: at least 1")
    if args.magnitude is not None and not 0 <= args.magnitude < math.inf:
        raise InputError(f"--magnitude {args.magnitude}: allowed are finite numbers from 0")
    if args.smallest and args.plot:
        raise InputError("--plot draws the ladder of edits, leave --smallest out")
    if args.smallest and not (args.value is args.reach is args.magnitude is None):
        raise InputError("--smallest searches reach and magnitude itself, by ascent; "
                         "leave --value, --reach and --magnitude out")
    for path in filter(None, (args.json, args.records, args.plot)):
        if not os.path.isdir(os.path.dirname(os.path.abspath(path))):
            raise InputError(f"{path}: cannot be written, its folder does not exist; make it first")
    if args.command == "pretrain" and not set(args.models) <= set(EMBEDDED):
        raise InputError(f"pretrain --model {args.model}: allowed are {', '.join(EMBEDDED)}")
    return args


def main(argv: list[str] | None = None) -> int:
    """Run a command; 0, or 2 after one line on stderr."""
    try:
        args = parse(argv)
        return COMMANDS[args.command](args)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
