"""The command line: python run.py COMMAND [options], python run.py COMMAND --help.

    replace    can an atom stand for a real write? On the three embedded models, or on any model
    formula    the logit-change formula, from the paper's three factors to the exact second order
    steer      edit the cache so that a token appears, at once or as a memory
    erase      take an atom out where it fires: does the token that it promotes fall?
    atoms      what atoms stand for: their tokens, their contexts
    compare    dictionaries side by side: sizes, active atoms, variants, seeds
    bench      time and memory against other implementations
    picture    draw the method
    train      train the SAEs of cells and save them beside their model
    pretrain   train an embedded model from nothing

Results go to stdout, decisions and progress to stderr. A wrong input ends in one line on stderr and
exit status 2. Order of this file: knobs - text - cells and their SAEs - one driver for all
experiments - the experiments - bench - train and pretrain - the parser.
"""

from __future__ import annotations

import argparse
import bisect
import contextlib
import copy
import hashlib
import json
import math
import os
import shutil
import sys
import sysconfig
import tempfile
import time
from typing import Callable, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import models
import writesae
from models import InputError, LanguageModel, require, save_then_rename, write_text
from writesae import HORIZONS, Cell, Factored, Steering, Table, WriteSAE, mean, some_rows

HERE = os.path.dirname(os.path.abspath(__file__))
EMBEDDED = ("gdn", "mamba2", "rwkv7")

# ---- Knobs ---------------------------------------------------------------------------------------
PASSAGE = 128  # tokens of a tested passage
EVERYWHERE = range(32, PASSAGE - HORIZONS + 1)  # some text before, ten tokens after
POSITIONS = EVERYWHERE[::3]  # tested in each passage
COSINE_MIN = 0.71  # a firing explains half of the write's energy
CONTEXT = 512  # tokens of a training window
TRAINING_WINDOWS = dict(write=1500, state=800)  # of CONTEXT tokens
METRIC_PASSAGES = 128  # for the read metric, POSITIONS[::4] of each
NULL_PASSAGES = 600  # whose writes the untrained atoms are drawn from
SAE_DEFAULTS = {  # by source: the write-aligned SAE, and one on states as the paper's
    "write": dict(
        atoms=16384, active=1, encoder="tied", decoder="rank1", sparsity="topk", metric="read"
    ),
    "state": dict(
        atoms=2048,
        active=32,
        encoder="bilinear",
        decoder="rank1",
        sparsity="topk",
        metric="frobenius",
    ),
}


def say(line: str):
    """One line about what was decided or how far long work is, on stderr, past a progress bar."""
    tqdm.write(line, file=sys.stderr)


def progress(items):
    """A progress bar on stderr around any iterable; nothing where stderr is no terminal."""
    return tqdm(items, file=sys.stderr, leave=False, disable=None)


# ---- Text: what every Python installation carries, or the user's own -----------------------------
NOT_READ = "test tests site-packages dist-packages encodings idlelib lib2to3 turtledemo pydoc_data"


def python_text() -> dict[str, str]:
    """The standard library's sources (without its tests, code tables and bundled programs) and the
    language reference: file name -> text; the reference's topics are named "topics/NAME"."""
    from pydoc_data.topics import topics

    root, files = sysconfig.get_paths()["stdlib"], {}
    for folder, folders, names in os.walk(root):
        left_out = [f for f in folders if f.startswith(("__pycache__", "config-"))]
        folders[:] = sorted(set(folders) - set(left_out) - set(NOT_READ.split()))
        for name in sorted(names):
            if name.endswith(".py") and not name.startswith("_sysconfigdata"):
                path = os.path.join(folder, name)
                with open(path, encoding="utf-8", errors="replace") as f:
                    files[os.path.relpath(path, root).replace(os.sep, "/")] = f.read()
    return files | {f"topics/{name}": text for name, text in sorted(topics.items())}


def held_out(name: str) -> bool:
    """Whether a file is kept from all training: so says the hash of its name, for one in ten."""
    return hashlib.sha256(name.encode()).digest()[0] < 26


def read_files(path: str) -> dict[str, str]:
    """The text files of a folder (those that are UTF-8), or the one file. Raises InputError."""
    paths = [path]
    if os.path.isdir(path):
        found = [os.path.join(folder, name) for folder, _, names in os.walk(path) for name in names]
        paths = sorted(found)
    files = {}
    for file in paths:
        try:
            with open(file, encoding="utf-8") as f:
                name = os.path.basename(path) if file == path else os.path.relpath(file, path)
                files[name] = f.read()
        except UnicodeDecodeError as error:
            require(file != path, f"{path} is not UTF-8 text ({error.reason}); give a text file")
        except OSError as error:
            advice = "give a text file or a folder of them"
            raise InputError(f"{file}: cannot be read ({error.strerror}); {advice}") from None
    require(files, f"{path} holds no UTF-8 text file; give a text file or a folder of them")
    return files


def choose_text(args) -> tuple[dict[str, str], dict[str, str]]:
    """Training files and tested files, by --train-text and --text; Python's own where they are
    silent. Raises InputError if nothing is held out."""
    files = read_files(args.train_text) if args.train_text else python_text()
    training = {name: text for name, text in files.items() if not held_out(name)}
    tested = {name: text for name, text in files.items() if held_out(name)}
    if args.text:
        return files if args.train_text else training, read_files(args.text)
    none = f"--train-text {args.train_text}: none of its {len(files)} files is held out"
    require(tested, f"{none} (one in ten is, by the hash of its name); give --text for the test")
    return training, tested


class Corpus(NamedTuple):
    """Text as a model reads it."""

    tokenizer: models.Tokenizer
    training: dict[str, str]  # file name -> text
    device: torch.device

    def windows(self, n: int, T: int) -> Tensor:
        """About n windows [n, T] of training text, without encoding all of it: 2 n evenly spread
        pieces of 4 T characters are, and as many windows as they give are taken, up to n."""
        text = "\n".join(self.training.values())
        starts = torch.linspace(0, max(0, len(text) - 4 * T), 2 * n).long().tolist()
        encoded = [self.tokenizer.encode(text[start : start + 4 * T])[:T] for start in starts]
        pieces = [ids for ids in encoded if len(ids) == T]
        few = f"the training text has {len(text)} characters, too few for one window of {T} tokens"
        require(pieces, f"{few}: give a longer --train-text")
        keep = torch.linspace(0, len(pieces) - 1, min(n, len(pieces))).long().tolist()
        return torch.tensor([pieces[i] for i in keep], device=self.device)


def copied(passage: str, lines: set[str]) -> bool:
    """Whether every line of a passage, but those cut at its ends, is a line of training text."""
    inside = passage.splitlines()[1:-1]
    return bool(inside) and all(line in lines for line in inside)


def tested_windows(corpus: Corpus, files: dict[str, str], n: int, T: int) -> tuple[Tensor, Tensor]:
    """n windows of T tokens, evenly spread over the files, each inside one file and none a copy of
    training text: tokens [n, T] and the file of each [n]. Raises InputError if there are fewer."""
    lines = {line for text in corpus.training.values() for line in text.splitlines()}
    tokens, file = [], []
    for i, text in enumerate(files.values()):
        ids = torch.tensor(corpus.tokenizer.encode(text), dtype=torch.long)
        tokens.append(ids[: len(ids) // T * T].view(-1, T))
        file.append(torch.full((len(tokens[-1]),), i))
    tokens, file = torch.cat(tokens), torch.cat(file)
    spread = torch.linspace(0, max(0, len(tokens) - 1), min(len(tokens), 10 * n)).long().tolist()
    decode = corpus.tokenizer.decode
    own = [i for i in spread if not copied(decode(tokens[i].tolist()), lines)]
    few = f"the text gives {len(own)} passages of {T} tokens that are no copies of training text"
    require(len(own) >= n, f"{few}, {n} are needed: take a longer text or a smaller --passages")
    chosen = torch.tensor(own)[torch.linspace(0, len(own) - 1, n).long()]
    return tokens[chosen].to(corpus.device), file[chosen]


# ---- Cells and their SAEs ------------------------------------------------------------------------
def pick_device(name: str) -> torch.device:
    """ "auto": a GPU where there is one. Raises InputError."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        why = str(error).splitlines()[0][:80]
        raise InputError(f"device {name!r} cannot be used here ({why}); take auto or cpu") from None


def open_model(name: str, args) -> LanguageModel:
    """An embedded model by its short name, or any folder or hub id."""
    path = os.path.join(HERE, "checkpoints", name) if name in EMBEDDED else name
    dtype = dict(fp32=torch.float32, bf16=torch.bfloat16)[args.dtype]
    model = models.load(path, pick_device(args.device), dtype)
    model.name = name
    return model


def is_large(model: LanguageModel) -> bool:
    """More than 100 million parameters: --quick then takes a quarter of its sample, formula no
    fp64."""
    return sum(p.numel() for p in model.parameters()) > 100_000_000


def cell_name(cell) -> str:
    """Such as "gdn L1H0"."""
    return f"{cell.model.name} L{cell.layer}H{cell.head}"


def number(text: str, what: str) -> int:
    """A layer or head as a number. Raises InputError."""
    require(text.isdecimal(), f"{what} {text!r}: allowed are a number or all")
    return int(text)


def chosen_cells(model: LanguageModel, args) -> list[tuple[int, int]]:
    """The (layer, head) pairs that --layer and --head name: by default the second recurrent layer,
    head 0, fixed before anything was measured."""
    layers = [model.recurrent_layers[:2][-1]]
    if args.layer == "all":
        layers = model.recurrent_layers
    elif args.layer is not None:
        layers = [number(args.layer, "layer")]
    cells = []
    for layer in layers:
        heads = [] if args.head == "all" else [number(args.head, "head")]
        model.check_cell(layer, heads[0] if heads else 0)
        cells += [(layer, head) for head in heads or range(model.layers[layer].mixer.heads)]
    return cells


def sae_settings(args) -> dict:
    """The SAE's settings: the defaults of its source, and what the command line says."""
    settings = dict(source=args.source) | SAE_DEFAULTS[args.source] | dict(seed=args.seed)
    asked = {key: getattr(args, key) for key in settings if key in args}
    settings |= {key: value for key, value in asked.items() if value is not None}
    if args.train_text:
        settings["text"] = os.path.basename(os.path.normpath(args.train_text))
    return settings


def sae_file(model: LanguageModel, layer: int, head: int, args) -> str:
    """Where a cell's SAE lives: beside its model (or in --saes, a folder or hub id), named by the
    cell and by every setting that is not the default."""
    defaults = SAE_DEFAULTS[args.source] | dict(seed=0, source="write")
    other = ""
    for key, value in sae_settings(args).items():
        if value != defaults.get(key):
            other += f"{value}-" if key == "source" else f"{key}-{value}-"
    folder = models.find_folder(args.saes) if args.saes else model.folder
    return os.path.join(folder, f"sae-{other}L{layer}H{head}.safetensors")


def new_sae(model: LanguageModel, layer: int, head: int, settings: dict) -> WriteSAE:
    """An SAE of these settings for one cell, before training."""
    mixer, settings = model.layers[layer].mixer, dict(settings)
    whose = dict(architecture=model.architecture, model=os.path.basename(model.name))
    settings |= whose | dict(layer=layer, head=head, layout="key first", cosine_min=COSINE_MIN)
    return WriteSAE(settings.pop("atoms"), mixer.K, mixer.V, **settings).to(model.device)


def cell_metric(cell: Cell, corpus: Corpus, quick: bool) -> tuple[Tensor, Tensor]:
    """The read metric of a cell, from training text."""
    n = METRIC_PASSAGES if not quick else 2 if is_large(cell.model) else 8
    sample = corpus.windows(n, PASSAGE)
    return writesae.read_metric(cell._replace(tokens=sample, positions=POSITIONS[::4]))


def fit(sae: WriteSAE, X: Factored, rng, quick: bool, steps: int | None, sample: int = 150_000):
    """Train an SAE by the method that fits its settings; says which in its cfg."""
    settings = tuple(sae.cfg[key] for key in ("encoder", "decoder", "sparsity", "active", "source"))
    if settings == ("tied", "rank1", "topk", 1, "write"):
        sae.cfg["method"] = "alternating updates"
        steps, sample = steps or (8 if quick else 24), 20_000 if quick else sample
        k, v = X.keys[:, 0], X.values[:, 0]
        writesae.fit_alternating(sae, k, v, rng, steps, sample, progress=progress)
    else:
        sae.cfg["method"] = "Adam"
        steps, batch = steps or (50 if quick else 2000), 1024 if settings[-1] == "write" else 256
        writesae.fit_gradient(sae, X, rng, steps, batch, progress=progress)
    sae.requires_grad_(False)


def train_saes(cell: Cell, corpus: Corpus, heads: list[int], args) -> list[WriteSAE]:
    """SAEs for several heads of the cell's layer, from the training text alone: one pass over it
    collects what all of them write."""
    began, settings, saes = time.time(), sae_settings(args), []
    if args.quick and args.atoms is None:
        settings["atoms"] = 512
    n = 60 if args.quick else min(TRAINING_WINDOWS[args.source], max(300, settings["atoms"] // 4))
    tokens = corpus.windows(n, CONTEXT)
    written = writesae.collect(
        cell.model, tokens, cell.layer, heads, args.source, progress=progress
    )
    for head, X in zip(heads, written):
        cell = cell._replace(head=head, rng=torch.Generator().manual_seed(settings["seed"]))
        sae = new_sae(cell.model, cell.layer, head, settings)
        if settings["metric"] == "read":
            writesae.set_metric(sae, *cell_metric(cell, corpus, args.quick))
        fit(sae, X, cell.rng, args.quick, args.steps)
        sample = X.rows(torch.randint(len(X.keys), (2000,), generator=cell.rng).to(X.keys.device))
        match = writesae.cosine(sae.dominant(sample)[2], sample).median().item()
        sae.cfg |= dict(n_train=len(X.keys), seconds=round(time.time() - began, 1))
        sae.cfg["median_cosine"] = round(match, 4)
        say(
            f"SAE {cell_name(cell)}: {sae.n_atoms:,} atoms, {sae.active} active, source "
            f"{args.source}, {settings['metric']} metric, {sae.cfg['method']} on "
            f"{len(X.keys):,} samples; median cosine with them {match:.3f}; {sae.cfg['seconds']} s"
        )
        saes.append(sae)
    return saes


def check_sae(sae: WriteSAE, cell: Cell, path: str, args):
    """Raise InputError unless the SAE is of this cell, and of the settings that were asked for."""
    mixer, model = cell.model.layers[cell.layer].mixer, cell.model
    expected = dict(architecture=model.architecture, K=mixer.K, V=mixer.V)
    expected |= dict(layer=cell.layer, head=cell.head)
    if os.path.dirname(os.path.abspath(path)) != os.path.abspath(model.folder):
        expected["model"] = os.path.basename(model.name)
    if args.atoms is not None:
        expected["n_atoms"] = args.atoms
    for key, value in expected.items():
        theirs, advice = sae.cfg.get(key), f"give an SAE of {cell_name(cell)}, or leave --sae out"
        require(
            theirs == value, f"{path}: this SAE has {key} {theirs}, here it is {value}; {advice}"
        )


def find_sae(cell: Cell, corpus: Corpus, args) -> WriteSAE:
    """The cell's SAE from its file (or --sae), else a new one, trained now and said so."""
    path = args.sae or sae_file(cell.model, cell.layer, cell.head, args)
    if args.sae or os.path.exists(path):
        sae = WriteSAE.load(path).to(cell.model.device)
        check_sae(sae, cell, path, args)
    else:
        kept = "small, not kept" if args.quick else "kept there"
        say(f"no SAE yet for {cell_name(cell)} ({path}): training one first, {kept}")
        (sae,) = train_saes(cell, corpus, [cell.head], args)
        if not args.quick:
            sae.save(path)
    if args.cosine_min is not None:
        sae.cfg["cosine_min"] = args.cosine_min
    return sae


# ---- One driver for all experiments --------------------------------------------------------------
class Experiment(NamedTuple):
    """What a command measures on a cell, and how it is shown; the driver does the rest."""

    measure: Callable  # (cell, corpus, args) -> figures, a dict or a list of them, and a table
    columns: dict[str, str]  # heading -> format string over a row, "-" where it lacks it
    rows: Callable  # figures of a cell, a list -> the printed rows, a list of dicts
    legend: str  # printed above the table
    passages: tuple[int, int] = (176, 12)  # how many are tested, and with --quick
    needs_sae: bool = True
    draw: Callable | None = None  # (results, tables): the picture of --plot
    all_cells: Callable | None = None  # results -> lines about many cells


class TablePrinter:
    """Rows under headings, printed as soon as they are there; columns are as wide as the first
    need."""

    def __init__(self, columns: dict[str, str]):
        self.columns, self.widths = columns, None

    def fields(self, row: dict) -> list[str]:
        """The texts of one row; "-" where it lacks what a format string names, or it is NaN."""
        texts = []
        for form in self.columns.values():
            try:
                text = form.format(**row)
            except (KeyError, TypeError, IndexError):
                text = "-"
            texts.append("-" if "nan" in text else text)
        return texts

    def print(self, row: dict):
        """One row, under the headings if it is the first."""
        fields = self.fields(row)
        if self.widths is None:
            self.widths = [max(len(h), len(f)) for h, f in zip(self.columns, fields)]
            self.line(list(self.columns))
        self.line(fields)

    def line(self, fields: list[str]):
        """One line; a column whose heading ends in a space is aligned left."""
        aligned = []
        for text, width, heading in zip(fields, self.widths, self.columns):
            aligned.append(text.ljust(width) if heading.endswith(" ") else text.rjust(width))
        print("  ".join(aligned).rstrip(), flush=True)

    def markdown(self, rows: list[dict]) -> str:
        """The whole table in Markdown."""
        lines = [list(self.columns), ["---"] * len(self.columns), *map(self.fields, rows)]
        return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def write_section(args, legend: str, columns: dict[str, str], rows: list[dict]):
    """Write a table into the file of --markdown, under the command: its section is replaced if
    there is one of this title, else added at the end. The rest of the file stays."""
    text = ""
    if os.path.exists(args.markdown):
        with open(args.markdown, encoding="utf-8") as f:
            text = f.read()
    first, *sections = text.split("\n## ")
    kept = [section for section in sections if section.splitlines()[0] != args.title]
    table = TablePrinter(columns).markdown(rows)
    kept.append(f"{args.title}\n\n```\n{legend}\n```\n\n{table}")
    write_text(args.markdown, "\n## ".join([first, *kept]))


def no_nan(x):
    """The same results with None for NaN (a rate of no firings), which JSON has no word for."""
    if isinstance(x, dict):
        return {key: no_nan(value) for key, value in x.items()}
    if isinstance(x, (list, tuple)):
        return [no_nan(value) for value in x]
    return None if isinstance(x, float) and not math.isfinite(x) else x


def json_lines(name: dict, table: Table) -> str:
    """One JSON line per row of a table, the cell's name in each."""
    columns = [x.tolist() for x in table.values()]
    rows = [name | dict(zip(table, values)) for values in zip(*columns)]
    return "".join(json.dumps(no_nan(row)) + "\n" for row in rows)


def world() -> int:
    """The number of processes that torchrun started, 1 without it."""
    return int(os.environ.get("WORLD_SIZE", 1))


def shared_out(jobs: list) -> list:
    """This process's share of the jobs: all of them, or under torchrun every world-th."""
    return jobs[int(os.environ.get("RANK", 0)) :: world()]


def gathered(shares: list) -> list:
    """What all processes measured, in the order of the jobs, on rank 0 (empty on the others)."""
    if world() == 1:
        return shares
    import torch.distributed as dist

    dist.init_process_group("gloo")
    everything = [None] * world() if dist.get_rank() == 0 else None
    dist.gather_object(shares, everything)
    dist.destroy_process_group()
    if everything is None:
        return []
    return [everything[i % world()][i // world()] for i in range(sum(map(len, everything)))]


def open_cells(args, n: int):
    """Yield the cells that the arguments name (this process's share of them) and their corpus."""
    training, tested = choose_text(args)
    jobs, opened = [], None
    for name in args.models:
        jobs += [(name, *cell) for cell in chosen_cells(open_model(name, args), args)]
    for name, layer, head in shared_out(jobs):
        if opened != name:
            model, opened = open_model(name, args), name
            corpus = Corpus(models.load_tokenizer(model), training, model.device)
            if args.quick and args.passages is None and is_large(model):
                n = max(2, n // 4)
            tokens, file = tested_windows(corpus, tested, n, PASSAGE)
        rng = torch.Generator().manual_seed(args.seed)
        cell = Cell(model, layer, head, tokens, POSITIONS, rng, file=file, progress=progress)
        yield cell, corpus


def run_experiment(args) -> int:
    """Any experiment: for each cell its figures; then the table, JSON, records, a picture."""
    experiment = EXPERIMENTS[args.command]
    print(experiment.legend + "\n")
    printer, shares = TablePrinter(experiment.columns), []
    for cell, corpus in open_cells(args, args.passages or experiment.passages[args.quick]):
        if experiment.needs_sae:
            cell = cell._replace(sae=find_sae(cell, corpus, args))
        what, text = f"{args.command} {cell_name(cell)}", args.text or "held-out text"
        say(
            f"{what}: {len(cell.tokens)} passages of {text}, {cell.tokens.device}, seed {args.seed}"
        )
        began, name = time.time(), dict(model=cell.model.name, layer=cell.layer, head=cell.head)
        figures, table = experiment.measure(cell, corpus, args)
        results = [name | f for f in (figures if isinstance(figures, list) else [figures])]
        results[0]["seconds"] = round(time.time() - began, 1)
        shares.append((name, results, table))
        for row in experiment.rows(results) if world() == 1 else []:
            printer.print(row)
    shares = gathered(shares)
    if shares:
        finish(experiment, printer, shares, args)
    return 0


def finish(experiment: Experiment, printer: TablePrinter, shares: list, args):
    """What comes after the last cell: lines over all of them, JSON, records, the picture."""
    everything = [figures for _, results, _ in shares for figures in results]
    for _, results, _ in shares if world() > 1 else []:
        for row in experiment.rows(results):
            printer.print(row)
    if experiment.all_cells and "all" in (args.layer, args.head):
        print(experiment.all_cells(everything))
    if args.json:
        write_text(args.json, json.dumps(no_nan(everything), indent=1))
    if args.markdown:
        rows = [row for _, results, _ in shares for row in experiment.rows(results)]
        write_section(args, experiment.legend, experiment.columns, rows)
    if args.records:
        write_text(args.records, "".join(json_lines(name, table) for name, _, table in shares))
    if args.plot:
        save_figure(experiment.draw(everything, [table for _, _, table in shares]), args.plot)


COLOURS = ("tab:blue", "tab:orange", "tab:green")


def panels(n: int, width: float = 4.2, height: float = 3.6):
    """A figure with n panels side by side, drawn to a file."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    size = (width * n, height)
    figure, axes = plt.subplots(1, n, figsize=size, constrained_layout=True, squeeze=False)
    return figure, axes[0]


def save_figure(figure, path: str, dpi: int = 110):
    """Write a figure as a PNG file, whole or not at all."""

    def write(file: str):
        figure.savefig(file, dpi=dpi, format="png")

    save_then_rename(write, path)


def dots(axis, x: Tensor, y: Tensor, label: str, colour: str | None = None):
    """A cloud of points in a panel."""
    axis.scatter(x, y, s=3, alpha=0.35, linewidths=0, color=colour, label=label)


# ---- replace -------------------------------------------------------------------------------------
def null_dictionary(cell: Cell, corpus: Corpus) -> WriteSAE:
    """As many writes of the training text as the cell's SAE has atoms, drawn at random."""
    n = max(60, min(NULL_PASSAGES, cell.sae.n_atoms // 16))
    tokens, skip = corpus.windows(n, PASSAGE), POSITIONS[0]
    (X,) = writesae.collect(cell.model, tokens, cell.layer, [cell.head], skip=skip)
    return writesae.untrained(cell.sae, X.keys[:, 0], X.values[:, 0], cell.rng)


def replace(cell: Cell, corpus: Corpus, args):
    """The replacement test of one cell: its figures, and a row per tested position."""
    if args.quick:
        cell = cell._replace(positions=POSITIONS[::4])
    dictionaries = {"atom": cell.sae, "untrained": null_dictionary(cell, corpus)}
    table, cosine_min = writesae.replacement(cell, dictionaries), cell.sae.cfg["cosine_min"]
    figures = dict(source=cell.sae.cfg["source"], scale="activation", cosine_min=cosine_min)
    figures["sae"] = cell.sae.cfg
    return figures | writesae.replacement_figures(table, cosine_min, cell.rng), table


#: The paper's rows (Qwen3.5-0.8B layers 1, 9, 17 pooled; Mamba-2-370M L24; RWKV-7-1.5B L12, there
#: at matched norm). Its "recovered" is from its median KLs, of GDN per layer 0.27 / 0.63 / 0.29.
PAPER_REPLACE = {
    "gdn": dict(n_firings=4851, win_rate=0.924),
    "mamba2": dict(n_firings=2500, win_rate=0.881, recovered_pooled=0.40),
    "rwkv7": dict(n_firings=6591, win_rate=0.453),
}


def replace_rows(results: list[dict]) -> list[dict]:
    """Rows for a cell: trained, the two nulls, and for a default cell the paper's."""
    (r,) = results
    low, high = r["win_ci95_by_file"]
    rows = [
        r | dict(name=cell_title(r), interval=f" [{100 * low:.1f}, {100 * high:.1f}]"),
        r["untrained"] | dict(name="  untrained writes"),
        dict(name="  random direction", win_rate=r["projected_win_rate"]),
    ]
    if r["model"] in PAPER_REPLACE and (r["layer"], r["head"]) == (1, 0):
        rows.append(dict(name="  the paper") | PAPER_REPLACE[r["model"]])
    return [dict(interval="") | row for row in rows]


def cell_title(r: dict) -> str:
    """ "gdn L1H0" from a result."""
    return "{model} L{layer}H{head}".format(**r)


def replace_cells(results: list[dict]) -> str:
    """Mean ± deviation and range over cells."""
    lines = [f"\n{len(results)} cells: mean ± standard deviation [range]"]
    for key in ("coverage", "win_rate", "recovered_pooled", "win_rate_all", "recovered_pooled_all"):
        ours = torch.tensor([r[key] for r in results], dtype=torch.float64)
        null = torch.tensor([r["untrained"][key] for r in results], dtype=torch.float64)
        spread = f"{ours.mean():.3f} ± {ours.std():.3f} [{ours.min():.3f}, {ours.max():.3f}]"
        lines.append(f"{key:20}  {spread}   untrained {null.mean():.3f} ± {null.std():.3f}")
    return "\n".join(lines)


REPLACE_LEGEND = """\
Replacement: one write of one head is taken out of the state and something else put in its place.
effect: KL(unmodified ‖ edited) of the next-token distribution, summed over the write's step and the
ten after it.  firing: the dominant atom explains half of the write's energy or more.  n: firings.
cover: their share of all positions.  win: share of firings where the effect is smaller than with
nothing in the write's place [95 %, by whole files].  recovered: 1 − Σ effect / Σ effect of nothing.
all: the same over all positions.  untrained writes: as many random training writes as atoms.
random direction: at its own best coefficient; wins half the time, so a win alone means little."""
REPLACE_COLUMNS = {
    "cell               ": "{name:19}",
    "     n": "{n_firings:,}",
    "cover": "{coverage:.1%}",
    "win [95 %]        ": "{win_rate:.1%}{interval}",
    "recovered": "{recovered_pooled:.2f}",
    "all: win": "{win_rate_all:.1%}",
    "all: recovered": "{recovered_pooled_all:.3f}",
}


def draw_replace(results: list[dict], tables: list[Table]):
    """A panel per cell: the effect with the atom against the effect with nothing, a point per
    firing; the untrained dictionary's firings beside them."""
    figure, axes = panels(len(results))
    labels = dict(untrained="untrained writes", atom="trained atoms")
    for axis, r, table in zip(axes, results, tables):
        delete = writesae.effect(table, "delete")
        for name, colour in dict(untrained="tab:orange", atom="tab:blue").items():
            here = writesae.fires(table, name, r["cosine_min"])
            label = f"{labels[name]}: {int(here.sum()):,}"
            dots(axis, delete[here], writesae.effect(table, name)[here], label, colour)
        low, high = 1e-7, delete.max().item()
        axis.plot([low, high], [low, high], color="black", linewidth=0.8)
        axis.set(xscale="log", yscale="log", xlim=(low, high), ylim=(low / 100, high))
        axis.set_xlabel("effect with nothing in the write's place (nats)")
        axis.set_title("{}: {win_rate:.1%} below the line".format(cell_title(r), **r))
        axis.legend(markerscale=4, fontsize=8, loc="upper left")
    axes[0].set_ylabel("effect with the atom there (nats)")
    return figure


# ---- formula: what each factor of the logit-change formula is worth ------------------------------
def formula(cell: Cell, corpus: Corpus, args):
    """The ladder of one cell, in fp64 (but for a large model), so that what a small edit moves
    stands clear of rounding."""
    dtype = cell.model.unembedding.dtype
    if not is_large(cell.model):
        cell.model.double()
        cell.sae.double()
    positions = POSITIONS[1::8] if args.quick else POSITIONS[::4]
    table = writesae.ladder(cell._replace(positions=positions))
    cell.model.to(dtype)
    cell.sae.float()
    n = len(table["index"])
    rungs = writesae.ladder_figures(table)
    return dict(n=n * len(writesae.RANKS), n_firings=n, rungs=rungs), table


#: the paper's R²: median per atom, a scalar fitted per passage, atom and token; Mamba-2: unfitted
PAPER_FORMULA = {"gdn": 0.98, "mamba2": -0.07}


def formula_rows(results: list[dict]) -> list[dict]:
    """A row for the cell, one per rung, one for the paper."""
    (r,) = results
    rows = [dict(name=f"{cell_title(r)}, {r['n_firings']} firings"), *r["rungs"]]
    if r["model"] in PAPER_FORMULA:
        rows.append(dict(name="  the paper", r2=PAPER_FORMULA[r["model"]]))
    return rows


FORMULA_LEGEND = """\
Logit-change formula: what predicts how an edit of one head's state moves the logits of seven
tokens, at the write's step and the ten after it. Each rung adds one factor to the one above.
swap: the atom in the write's place.  delete: the write taken out.  small: the atom added, norm
0.1. R²: about the line y = ŷ, nothing fitted but in "fitted" (0: no better than the mean).
slope: 1 if sizes are right.  sign: share of right signs.  order: to which the rung is exact."""
FORMULA_COLUMNS = {
    "rung                            ": "{name}",
    "order": "{order}",
    "swap: R²": "{r2:.3g}",
    "slope": "{slope:.2g}",
    "sign": "{sign_agreement:.1%}",
    "delete: R²": "{r2_delete:.3g}",
    "small: R²": "{r2_small:.4g}",
    "slope, small": "{slope_small:.2g}",
    "sign, small": "{sign_agreement_small:.1%}",
}


def draw_formula(results: list[dict], tables: list[Table]):
    """A panel per cell: predicted against measured for three rungs of the swap."""
    figure, axes = panels(len(results))
    names = list(writesae.RUNGS)
    for axis, r, table in zip(axes, results, tables):
        measured = table["measured_swap"].flatten()
        limit = measured.abs().quantile(0.995).item()
        for name in ("three factors, fitted", "direct path", "full Jacobian"):
            i = names.index(name)
            predicted, label = (
                table["predicted_swap"][:, i],
                f"{name}: R² {r['rungs'][i]['r2']:.2f}",
            )
            dots(axis, predicted.flatten(), measured, label)
        axis.axline((0, 0), slope=1, color="black", linewidth=0.7)
        axis.set(xlim=(-limit, limit), ylim=(-limit, limit), xlabel="predicted (nats)")
        axis.set_title(f"{cell_title(r)}, {r['n_firings']} firings")
        axis.legend(fontsize=7, markerscale=4)
    axes[0].set_ylabel("measured change of the logit (nats)")
    return figure


# ---- steer: edits of the memory after which a token appears --------------------------------------
PROMPT = 96  # tokens of a prompt
BUDGETS = [round(0.25 * 2 ** (i / 4), 2) for i in range(25)]  # 0.25 to 16 native writes
SIGN_TESTED = ("formula", "gated", "gradient")


def edited_heads(cell: Cell, reach: str) -> list[tuple[int, int]]:
    """One head, all heads of its layer, or all heads of all layers, as (layer, head)."""
    if reach == "head":
        return [(cell.layer, cell.head)]
    layers = cell.model.recurrent_layers if reach == "all" else [cell.layer]
    return [
        (layer, head) for layer in layers for head in range(cell.model.layers[layer].mixer.heads)
    ]


def by_stratum(edited: Table, native: Table, random: Table) -> list[dict]:
    """`steering_figures` of each stratum."""
    figures = []
    for j, name in enumerate(writesae.STRATA):
        tables = [some_rows(table, table["stratum"] == j) for table in (edited, native, random)]
        if len(tables[0]["target"]):
            figures.append(dict(name=name) | writesae.steering_figures(*tables))
    return figures


def steer(cell: Cell, corpus: Corpus, args):
    """Edits of one size by each value side; with --smallest the least budget of memory by each key
    side; with --prompt one edit, shown."""
    if args.prompt is not None or args.target is not None:
        return show(cell, corpus, args)
    tokens, key = cell.tokens[:, :PROMPT], args.key or "read"
    each = 1 if args.quick or args.smallest else 3  # targets per prompt and stratum
    pairs = writesae.draw_targets(cell.model, tokens, each, cell.rng)
    none = "no token of rank 100 to 1000 in and out of these prompts (the vocabulary has"
    both = len(pairs["stratum"].unique()) == len(writesae.STRATA)
    require(both, f"{none} {cell.model.vocab} tokens): take more --passages")

    def edit(pairs: Table, value: str | None, reach: str = args.reach, **how) -> Table:
        how = dict(key=key, size=args.magnitude) | how
        how = Steering(edited_heads(cell, reach), value=value, **how)
        return writesae.steer(cell.model, tokens, pairs, how, args.seed)

    if args.smallest:
        seen = writesae.every_second(cell.file).to(tokens.device)[pairs["prompt"]]
        search, unseen = some_rows(pairs, seen), some_rows(pairs, ~seen)
        keys = [args.key] if args.key else writesae.KEY_SIDES
        found = [least_budget(edit, search, unseen, key) for key in keys]
        return [r | dict(reach=args.reach) for r in found], pairs
    native, random, results = edit(pairs, None), edit(pairs, "random"), []
    for value in progress([args.value] if args.value else writesae.VALUE_SIDES):
        edited = edit(pairs, value)
        r = dict(value=value, key=key, reach=args.reach, magnitude=args.magnitude, budget=False)
        r |= dict(size=mean(edited["size"]), strata=by_stratum(edited, native, random))
        if value in SIGN_TESTED:  # one head, the last position, the natural size
            one = edit(pairs, value, reach="head", size=1.0, n=1)
            r["sign_rate"] = mean(one["logit"] > native["logit"])
        results.append(r)
    return results, edited


def least_budget(edit: Callable, search: Table, unseen: Table, key: str) -> dict:
    """The least budget of all edits together, in native writes, after which every target on the
    search prompts persists, by bisection (as if every larger one passed too). Its figures are from
    the unseen prompts."""
    tried = {}

    def passes(budget: float) -> bool:
        edited = edit(search, "memory", key=key, size=budget, budget=True)
        tried[budget] = mean(writesae.persists(edited))
        return tried[budget] == 1

    i = bisect.bisect_left(BUDGETS, True, key=passes)
    budget = BUDGETS[min(i, len(BUDGETS) - 1)]
    how = dict(key=key, size=budget, budget=True)
    edited, native, random = (edit(unseen, value, **how) for value in ("memory", None, "random"))
    rates = {str(b): rate for b, rate in sorted(tried.items())}
    figures = dict(value="memory", key=key, magnitude=budget, budget=True, found=i < len(BUDGETS))
    figures |= dict(size=mean(edited["size"]), n_search=len(search["target"]), search_rates=rates)
    return figures | dict(strata=by_stratum(edited, native, random))


def show(cell: Cell, corpus: Corpus, args):
    """One edit: what is said without it, with it, and with it and the first token forced back."""
    encode, decode = corpus.tokenizer.encode, corpus.tokenizer.decode
    target = encode(args.target or "")
    pieces = [decode([i]) for i in target]
    got = f"--target {args.target!r} is {len(target)} tokens for this model ({pieces})"
    require(args.prompt and len(target) == 1, f"{got}: give a --prompt and one token")
    tokens = torch.tensor([encode(args.prompt)], device=cell.model.device)
    pair = dict(prompt=0, target=target[0], stratum=0)
    pair = {name: torch.tensor([x], device=tokens.device) for name, x in pair.items()}
    edit = Steering(edited_heads(cell, args.reach), args.key or "read", size=args.magnitude)
    value = args.value or "memory"
    before = writesae.steer(cell.model, tokens, pair, edit)
    after = writesae.steer(cell.model, tokens, pair, edit._replace(value=value))
    texts = {"no edit": before["said"], "edited": after["said"], "kept": after["kept"]}
    figures = dict(prompt=args.prompt, target=args.target, value=value, key=edit.key)
    figures |= dict(reach=args.reach, magnitude=args.magnitude, size=mean(after["size"]))
    figures["texts"] = {name: decode(ids[0].tolist()) for name, ids in texts.items()}
    return figures | dict(p_target=after["log_p"][0].exp().tolist()), after


def steer_rows(results: list[dict]) -> list[dict]:
    """No edit, a random one, then a row per edit; of `show` a few lines instead."""
    first = results[0]
    if "texts" in first:
        print(SHOWN.format(**first))
        for name, text in first["texts"].items():
            print(f"  {name:8} {text!r}")
        print("  p(target) at each step of kept:", *(f"{p:.2f}" for p in first["p_target"]))
        return []

    def control(r: dict, kind: str) -> dict:
        strata = []
        for s in r["strata"]:
            names = dict(persists_rate="_persists_rate", edited_rate="_rate")
            names["edited_perplexity"] = "_perplexity"
            strata.append({name: s[kind + theirs] for name, theirs in names.items()})
        return dict(what=f"{r['model']}, {r['strata'][0]['n_pairs']} pairs: {kind}", strata=strata)

    rows = [control(first, "native")]
    for r in results:
        if r["budget"] or r is first:
            rows.append(control(r, "random"))
        size = "budget {magnitude:g}" if r["budget"] else "{magnitude:g}x"
        rows.append(r | dict(what=("  {value}, {key} key, " + size).format(**r)))
    return rows


SHOWN = """\
{model}: {value}, {key} key, reach {reach}, {magnitude:g}x; all states change by {size:.0%} of their
norm; target {target!r}"""
STEER_LEGEND = """\
Steering: key valueᵀ is added to the states at a prompt's last three positions, then 20 tokens
are decoded. Targets: rank 100-1000 for the first new token; in the prompt, or absent from it.
Nx: each edit is N times as large as the write beside it.  budget: of all a prompt's edits
together, in such writes; the least after which all targets on the search prompts persist, its
row is from the unseen prompts.  persists: the target is among tokens 2 to 20 if the first is
forced back to the unedited one: a memory.  appears: it is among the 20 (the paper's measure).
lift: of log p(target) for the first new token, nats.  states: norm of the change of all states
at the prompt's end, over theirs.  ppl: perplexity of what is said under the unedited model;
forced: of saying the token at once, without an edit.  sign: share of targets whose first logit
rises by one head's edit, 1x, at the last position."""
STEER_COLUMNS = {
    "edit                               ": "{what}",
    "persists": "{strata[0][persists_rate]:.1%}",
    "absent": "{strata[1][persists_rate]:.1%}",
    "appears": "{strata[0][edited_rate]:.1%}",
    "absent, appears": "{strata[1][edited_rate]:.1%}",
    "lift": "{strata[0][first_step_lift_nats]:+.1f}",
    "states": "{size:.0%}",
    "ppl": "{strata[0][edited_perplexity]:.1f}",
    "forced": "{strata[0][forced_perplexity]:.1f}",
    "sign": "{sign_rate:.1%}",
}


def draw_steer(results: list[dict], tables: list[Table]):
    """A panel per model: the step at which a memory first says its word."""
    memories = {r["model"]: r for r in results if r.get("value") == "memory" and "strata" in r}
    figure, axes = panels(max(1, len(memories)))
    for axis, r in zip(axes, memories.values()):
        for shift, s in zip((-0.2, 0.2), r["strata"]):
            steps = [i + 1 + shift for i in range(writesae.NEW)]
            label = f"{s['name']}: {sum(s['said_at'])} of {s['n_pairs']}"
            axis.bar(steps, s["said_at"], 0.4, label=label)
        axis.set(xlabel="new token at which the target is first said", title=r["model"])
        axis.legend(fontsize=8)
    axes[0].set_ylabel("continuations")
    return figure


# ---- erase: an atom taken out where it fires -----------------------------------------------------
def erase(cell: Cell, corpus: Corpus, args):
    """Erasing on one cell: figures of all firings and of each atom, and a row per firing."""
    cell = cell._replace(positions=EVERYWHERE[:: 4 if args.quick else 1])
    table = writesae.erasure(cell, 5 if args.quick else 20)
    figures, atoms = writesae.erasure_figures(table, cell.rng), []
    for atom in table["index"].unique().tolist():
        part = some_rows(table, table["index"] == atom)
        token = part["promoted"][0].item()
        name = dict(atom=atom, token=token, text=corpus.tokenizer.decode([token]))
        atoms.append(name | writesae.erasure_figures(part, cell.rng))
    return figures | dict(atoms=sorted(atoms, key=most_used)), table


def most_used(figures: dict) -> int:
    """Sorts by the number of firings, the largest first."""
    return -figures["n_firings"]


def erase_rows(results: list[dict]) -> list[dict]:
    """A row for all firings, then one per atom."""
    (r,) = results
    rows = [r | dict(what=cell_title(r))]
    return rows + [a | dict(what=f"  {a['atom']:5} {a['text'][:14]!r}") for a in r["atoms"]]


ERASE_LEGEND = """\
Erasing: a A is taken out of the state where the atom fires. Change of log p of the token that
it promotes, mean over the write's step and the ten after it, in nats, median of firings. Atoms
and tokens were chosen in other files: those that fire in most, tokens by the formula ("gated")
alone. random, other: a random direction, another atom, of the same norm taken out there.
elsewhere: the atom, where it does not fire.  effect: mean of atom minus random, paired [95 %,
by whole files]. The paper: one atom, 150 firings, median -0.116 nats."""
ERASE_COLUMNS = {
    "atom, token              ": "{what}",
    "n": "{n_firings}",
    "files": "{n_files}",
    "atom": "{firing_median:+.4f}",
    "falls": "{firing_falls:.0%}",
    "random": "{random_median:+.4f}",
    "falls, random": "{random_falls:.0%}",
    "other": "{other_atom_median:+.4f}",
    "elsewhere": "{elsewhere_median:+.4f}",
    "effect": "{effect:+.4f}",
    "[95 %]": "[{effect_ci95[0]:+.4f}, {effect_ci95[1]:+.4f}]",
}


# ---- atoms: what they stand for ------------------------------------------------------------------
def atoms(cell: Cell, corpus: Corpus, args):
    """The most used atoms of a cell, each with its tokens and contexts, and the population's
    figures."""
    cell, n = cell._replace(positions=EVERYWHERE), cell.sae.n_atoms
    require(args.atom is None or args.atom < n, f"--atom {args.atom}: allowed are 0 to {n - 1}")
    table = writesae.codes(cell)
    at, described = writesae.firings(cell, table), []
    uses = torch.bincount(at["index"], minlength=n)
    chosen = uses.topk(min(n, 4 if args.quick else 12)).indices.tolist()
    for atom in chosen if args.atom is None else [args.atom]:
        here = some_rows(at, at["index"] == atom)
        require(len(here["index"]) > 0, f"atom {atom} never fires in this text: more --passages?")
        described.append(dict(atom=atom) | describe(cell, corpus, here))
    population = writesae.population_figures(table, cell.sae.cfg["cosine_min"])
    quarter = cell.tokens[: len(cell.tokens) // 4 + 1]
    positions = range(EVERYWHERE.start, PASSAGE - 1)
    bits = writesae.passage_test(cell._replace(tokens=quarter, positions=positions))
    described[0] |= dict(population=population, n_passages=len(cell.tokens))
    described[0]["passage_test"] = {key: mean(x) for key, x in bits.items()}
    return described, table


def describe(cell: Cell, corpus: Corpus, at: Table) -> dict:
    """One atom, by its firings: its figures, the tokens that lose most if it is taken out, and five
    contexts from different files."""
    spread = torch.linspace(0, len(at["index"]) - 1, min(40, len(at["index"]))).long()
    some = some_rows(at, spread)
    lost = writesae.taken_out(cell, some, writesae.atoms_at(cell, some)).mean(0)
    promoted = lost.topk(5, largest=False)
    decode, contexts = corpus.tokenizer.decode, {}
    for passage, t in zip(at["passage"].tolist(), at["position"].tolist()):
        ids = cell.tokens[passage].tolist()
        marked = (
            f"{decode(ids[max(0, t - 12) : t])}⟦{decode([ids[t]])}⟧{decode(ids[t + 1 : t + 7])}"
        )
        contexts.setdefault(int(cell.file[passage]), marked)  # the first of each file
    counts = at["token"].bincount()
    return dict(
        n_firings=len(at["index"]),
        cosine=mean(at["cosine"]),
        token=decode([counts.argmax().item()]),
        token_purity=(counts.max() / counts.sum()).item(),
        promoted=[decode([token]) for token in promoted.indices.tolist()],
        promoted_nats=promoted.values.tolist(),
        contexts=list(contexts.values())[:5],
    )


def atoms_rows(results: list[dict]) -> list[dict]:
    """A row per atom, then its contexts; the population before them."""
    head = results[0]
    print(POPULATION.format(**head | head["population"] | head["passage_test"]))
    rows = []
    for r in results:
        promotes = "  ".join(map(repr, r["promoted"]))
        rows.append(r | dict(promotes=promotes, on=repr(r["token"])))
        rows += [dict(promotes="    " + repr(context)) for context in r["contexts"]]
    return rows


POPULATION = """\
{model} L{layer}H{head}: {n_firings:,} firings of {n_atoms:,} atoms in {n_passages} passages. Atoms
with five firings or more hold {often_share:.0%} of them; {token_purity:.0%} of an atom's are on one
token.
cosine with the writes, two Gaussians: {groups[n][0]} atoms at {groups[mean][0]:.2f} ±
{groups[deviation][0]:.2f}, {groups[n][1]} at {groups[mean][1]:.2f} ± {groups[deviation][1]:.2f};
ΔBIC {groups[delta_bic]:+.0f} (negative: two are better than one)
all firings of a passage at once ({firings:.0f} of them), bits per token: unmodified
{bits_native:.3f}, their atoms {bits_atom:.3f}, deleted {bits_delete:.3f}, random writes
{bits_random:.3f}
"""
ATOMS_LEGEND = """\
Atoms: what they stand for, most used first. n: firings.  cosine: of the atom with the writes it
stands for.  on: the token at which it fires most, and its share.  Then the tokens whose
log-probability falls most if the atom is taken out of the state (mean over the write's step and
the ten after it), and five contexts from different files, the firing token in ⟦ ⟧."""
ATOMS_COLUMNS = {
    "atom": "{atom}",
    "n": "{n_firings}",
    "cosine": "{cosine:.2f}",
    "on          ": "{on}",
    "share": "{token_purity:.0%}",
    " ": "{promotes}",
}


def draw_atoms(results: list[dict], tables: list[Table]):
    """How many atoms are token lookups: of the atoms with five firings or more, the share of their
    firings on their most frequent token, a line per model."""
    figure, (axis,) = panels(1, 6.5)
    for model, table, colour in zip(dict.fromkeys(r["model"] for r in results), tables, COLOURS):
        fires = (table["a"] > 0) & (table["cosine"] >= COSINE_MIN)
        _, uses, share = writesae.token_shares(some_rows(table, fires))
        share = share[uses >= 5].sort().values
        below = torch.arange(1, len(share) + 1) / len(share)
        axis.plot(share, below, color=colour, label=f"{model}: {len(share):,} atoms")
    axis.set(xlim=(0, 1.01), ylim=(0, 1.01), ylabel="share of atoms below")
    axis.set_xlabel("share of an atom's firings on its most frequent token")
    axis.legend()
    return figure


# ---- compare: dictionaries side by side, in the same branches ------------------------------------
COMPARED_SAMPLE = 50_000  # writes a step of the alternating updates: a third of `train`'s
COMPARED = dict(sizes=(256, 1024, 2048, 4096, 16384), active=(1, 2, 4, 8, 32), seeds=(0, 1, 2))
VARIANTS = {  # the paper's five, and rank 2; then sparsity rules
    "FlatSAE": dict(encoder="dense", decoder="flat"),
    "MatrixSAE": dict(encoder="dense", decoder="rank1"),
    "BilinearSAE": dict(encoder="bilinear", decoder="rank1"),
    "BilinearSAE, tied": dict(encoder="tied", decoder="rank1"),
    "BilinearSAE, flat": dict(encoder="bilinear", decoder="flat"),
    "rank 2": dict(encoder="bilinear", decoder="rank2"),
    "tied, BatchTopK": dict(sparsity="batchtopk"),
    "tied, JumpReLU": dict(sparsity="jumprelu"),
}


class Entry(NamedTuple):
    """One dictionary of a comparison."""

    sae: WriteSAE
    trained: bool = False
    seconds: float = 0.0

    def again(self, **changes) -> Entry:
        """The same weights under another cfg."""
        sae = WriteSAE(**self.sae.cfg | changes).to(self.sae.to_k.device)
        sae.load_state_dict(self.sae.state_dict())
        return self._replace(sae=sae.requires_grad_(False))


def compared_sae(cell: Cell, settings: dict, X: Factored, args, **how) -> Entry:
    """A dictionary of these settings, trained on X (by gradients if `how` is given), in the cell's
    metric if the settings ask for it, with the time taken."""
    began, rng = time.time(), torch.Generator().manual_seed(settings["seed"])
    sae = new_sae(cell.model, cell.layer, cell.head, settings)
    if settings["metric"] == "read":
        sae.to_k.copy_(cell.sae.to_k)
        sae.to_v.copy_(cell.sae.to_v)
    if how:
        writesae.fit_gradient(sae, X, rng, progress=progress, **how)
        sae.requires_grad_(False)
    else:
        fit(sae, X, rng, args.quick, None, COMPARED_SAMPLE)
    return Entry(sae, True, time.time() - began)


def compare_entries(cell: Cell, corpus: Corpus, X: Factored, args) -> dict[str, Entry]:
    """The dictionaries of one comparison, by name."""
    settings = dict(source="write") | SAE_DEFAULTS["write"] | dict(atoms=2048, seed=args.seed)
    k, v, entries = X.keys[:, 0], X.values[:, 0], {}

    def null(entry: Entry, seed: int = 100) -> Entry:
        return Entry(writesae.untrained(entry.sae, k, v, torch.Generator().manual_seed(seed)))

    if args.what == "sizes":
        for n in COMPARED["sizes"][:3] if args.quick else COMPARED["sizes"]:
            entries[f"{n}"] = compared_sae(cell, settings | dict(atoms=n), X, args)
            entries[f"{n} untrained"] = null(entries[f"{n}"])
    elif args.what == "active":
        one = compared_sae(cell, settings, X, args)
        for n in COMPARED["active"]:
            entries[f"{n}"] = one.again(active=n, sparsity="pursuit")
            entries[f"{n} untrained"] = null(one).again(active=n, sparsity="pursuit")
    elif args.what == "seeds":
        for seed in COMPARED["seeds"]:
            entries[f"seed {seed}"] = compared_sae(cell, settings | dict(seed=seed), X, args)
        for seed in (100, 101):
            entries[f"untrained {seed - 99}"] = null(entries["seed 0"], seed)
    else:
        entries["alternating"] = compared_sae(cell, settings, X, args)
        entries |= variants(cell, corpus, settings, X, args)
        entries["untrained"] = null(entries["alternating"])
    return entries


def variants(cell: Cell, corpus: Corpus, settings: dict, X: Factored, args) -> dict[str, Entry]:
    """The paper's variants on writes (one active) and on states (32), one training budget for all:
    the same number of steps of the same batch. Then the paper's own recipe, on states, and the two
    bilinear ones with their atoms at least-squares size."""
    budget = dict(steps=30, batch=128) if args.quick else dict(steps=800, batch=512)
    tokens = corpus.windows(10 if args.quick else 300, CONTEXT)
    (states,) = writesae.collect(cell.model, tokens, cell.layer, [cell.head], "state")
    on_states = settings | dict(source="state", metric="frobenius", active=32)
    entries = {}
    for name, change in VARIANTS.items():
        entries[name] = compared_sae(cell, settings | change, X, args, **budget)
        entries[name + ", states"] = compared_sae(cell, on_states | change, states, args, **budget)
    recipe = on_states | dict(encoder="bilinear", centred=True)
    steps = 30 if args.quick else min(2000, 20 * len(states.keys) // 256)  # 20 epochs
    how = dict(steps=steps, batch=256, lr=3e-4, k_aux=256, dead_after=100 * 256)
    entry = compared_sae(cell, recipe, states, args, resample_every=250, **how)
    entries["the paper's recipe"] = entry
    for name in ("the paper's recipe", "BilinearSAE, states"):
        entries[name + ", own size"] = entries[name].again(scale="least-squares")
    return entries


def compare(cell: Cell, corpus: Corpus, args):
    """Rows of one comparison, all from the same branches of the same positions."""
    tokens = corpus.windows(60 if args.quick else 600, CONTEXT)
    (X,) = writesae.collect(cell.model, tokens, cell.layer, [cell.head], progress=progress)
    base = new_sae(cell.model, cell.layer, cell.head, sae_settings(args) | dict(atoms=1))
    writesae.set_metric(base, *cell_metric(cell, corpus, args.quick))
    cell = cell._replace(sae=base, positions=POSITIONS[:: 8 if args.quick else 2])
    entries = compare_entries(cell, corpus, X, args)
    dictionaries = {name: entry.sae for name, entry in entries.items()}
    table = writesae.replacement(cell, dictionaries, whole=args.what == "active")
    rows = [compared_row(args.what, name, entry, table, X) for name, entry in entries.items()]
    if args.what == "seeds":
        for trained in (True, False):
            found_again([row for row in rows if row["trained"] == trained], dictionaries)
    return rows, table


def compared_row(what: str, name: str, entry: Entry, table: Table, X: Factored) -> dict:
    """One dictionary's figures, with the contract's keys."""
    sae, figures = entry.sae, writesae.dictionary_figures(table, name, COSINE_MIN)
    null, delete = writesae.effect(table, "projected"), writesae.effect(table, "delete")
    sample, fvu = X.rows(slice(None, None, max(1, len(X.keys) // 4000))), math.nan
    if sae.cfg["source"] == "write":
        left, whole = sae.see(sample.minus(sae.decode(*sae.encode(sample)))), sae.see(sample)
        fvu = mean(writesae.inner(left, left) / writesae.inner(whole, whole))
    used = len(table["index_" + name][table["a_" + name] > 0].unique())
    row = dict(what=what, name=name, trained=entry.trained)
    row |= {key: sae.cfg[key] for key in ("encoder", "decoder", "sparsity", "source", "n_atoms")}
    row |= dict(active=sae.active, parameters=sum(p.numel() for p in sae.parameters()), fvu=fvu)
    row |= dict(dead=1 - used / min(sae.n_atoms, len(delete))) | figures
    row["projected_win_rate"] = mean((null < delete)[null.isfinite()])
    row["kl_all"] = mean(writesae.effect(table, name))
    return row | dict(seconds=round(entry.seconds, 1))


def found_again(rows: list[dict], dictionaries: dict[str, WriteSAE]):
    """Add to each row the share of its atoms that the next row's dictionary has too (cosine at
    least 0.9 in the SAE's coordinates)."""
    for row, other in zip(rows, rows[1:] + rows[:1]):
        ours, theirs = (dictionaries[r["name"]].atoms for r in (row, other))
        parts = torch.arange(len(ours.values)).split(512)
        nearest = torch.cat([theirs.products(ours.at(part)).amax(1) for part in parts])
        row["found_again"] = mean(nearest >= 0.9)


COMPARE_LEGEND = """\
Dictionaries side by side, each position of each passage given to all of them. atoms, active:
their number, and how many code one input.  unexplained: share of energy left on training writes
(read metric). dead: share of atoms that no tested position used, of those that could be. cover,
win, recovered: as in replace, at firings; all: over every position; whole: all active atoms put
in, over every position."""
COMPARE_COLUMNS = {
    "                            ": "{model} {name:>20}",
    "atoms": "{n_atoms}",
    "active": "{active}",
    "parameters": "{parameters:,}",
    "unexplained": "{fvu:.3f}",
    "dead": "{dead:.0%}",
    "cover": "{coverage:.1%}",
    "win": "{win_rate:.1%}",
    "recovered": "{recovered_pooled:.2f}",
    "all: win": "{win_rate_all:.1%}",
    "recovered ": "{recovered_pooled_all:.3f}",
    "whole: win": "{whole_win_rate_all:.1%}",
    "recovered  ": "{whole_recovered_all:.3f}",
    "found again": "{found_again:.1%}",
    "s": "{seconds:.0f}",
}


def draw_compare(results: list[dict], tables: list[Table]):
    """Recovered share of all effects, and coverage, against the number of atoms (or of active
    ones)."""
    figure, axes = panels(2)
    key, value = "n_atoms", "recovered_pooled_all"
    if results[0]["what"] == "active":
        key, value = "active", "whole_recovered_all"
    for colour, model in zip(COLOURS, dict.fromkeys(r["model"] for r in results)):
        for trained, line in ((True, "o-"), (False, "o:")):
            rows = [r for r in results if r["model"] == model and r["trained"] == trained]
            for axis, what in zip(axes, (value, "coverage")):
                x, y = [r[key] for r in rows], [r[what] for r in rows]
                label = model if trained else model + ", untrained"
                axis.plot(x, y, line, color=colour, markersize=4, label=label)
    for axis, title in zip(axes, ("recovered, all positions", "coverage")):
        axis.set(xscale="log", xlabel=key.replace("n_", "").replace("ve", "ve atoms"), title=title)
    axes[0].legend(fontsize=8)
    return figure


EXPERIMENTS = {
    "replace": Experiment(
        replace,
        REPLACE_COLUMNS,
        replace_rows,
        REPLACE_LEGEND,
        draw=draw_replace,
        all_cells=replace_cells,
    ),
    "formula": Experiment(
        formula, FORMULA_COLUMNS, formula_rows, FORMULA_LEGEND, (100, 8), draw=draw_formula
    ),
    "steer": Experiment(
        steer, STEER_COLUMNS, steer_rows, STEER_LEGEND, (40, 8), needs_sae=False, draw=draw_steer
    ),
    "erase": Experiment(erase, ERASE_COLUMNS, erase_rows, ERASE_LEGEND, (1600, 80)),
    "atoms": Experiment(atoms, ATOMS_COLUMNS, atoms_rows, ATOMS_LEGEND, (400, 60), draw=draw_atoms),
    "compare": Experiment(
        compare, COMPARE_COLUMNS, list, COMPARE_LEGEND, (60, 12), needs_sae=False, draw=draw_compare
    ),
}


# --------------------------------------------------------------------------------------------------
# bench: ratios against other implementations, run for real in the same process
# --------------------------------------------------------------------------------------------------
RWKV_NAMES = {  # our names -> those of RWKV-7's authors, replaced in this order
    "embedding": "emb",
    "embed_norm": "blocks.0.ln0",
    "norm1": "ln1",
    "norm2": "ln2",
    "g_norm": "ln_x",
    "norm.": "ln_out.",
    "layers": "blocks",
    "mixer": "att",
    "mlp": "ffn",
    "r_proj": "receptance",
    "k_proj": "key",
    "v_proj": "value",
    "out_proj": "output",
    "_lora.0.weight": "1",
    "_lora.2.weight": "2",
    "_lora.2.bias": "0",
}


def save_for_rwkv(model: LanguageModel, path: str):
    """Our RWKV-7's weights as its authors' package names and lays them out."""
    weights = {}
    for name, x in model.state_dict().items():
        if "_lora" in name and x.dim() == 2:
            x = x.T
        for ours, theirs in RWKV_NAMES.items():
            name = name.replace(ours, theirs)
        weights[name] = x.clone()
    torch.save(weights, path)


class Peer:
    """The same model by transformers, RWKV-7 by its authors' package (one text at a time, heads of
    64 only). Both change a cache in place: copy it before use."""

    def __init__(self, model: LanguageModel):
        self.kind, device = model.architecture, model.device
        if self.kind == "rwkv7":
            os.environ.update(RWKV_V7_ON="1", RWKV_JIT_ON="0")  # it reads them when imported
            quiet = contextlib.redirect_stdout(sys.stderr)
            with tempfile.TemporaryDirectory() as folder, quiet:
                from rwkv.model import RWKV

                path = os.path.join(folder, "weights")
                save_for_rwkv(model, path + ".pth")
                self.model = RWKV(path, f"{device.type} fp32")
            self.name = "rwkv"
        else:
            import transformers

            transformers.logging.set_verbosity_error()
            dtype = model.unembedding.dtype
            peer = transformers.AutoModelForCausalLM.from_pretrained(model.folder, dtype=dtype)
            self.model, self.name = peer.to(device), "transformers"

    def read(self, tokens: Tensor, cache=None, keep: int = 1):
        """tokens [B, T] after those in the cache -> logits of the last one or (keep 0) of all, and
        the cache."""
        if self.kind == "rwkv7":
            logits, cache = self.model.forward(tokens[0].tolist(), cache, full_output=keep == 0)
            return logits.view(1, -1, logits.shape[-1]), cache
        key = "cache_params" if self.kind == "mamba2" else "past_key_values"
        one_by_one = self.kind == "mamba2" and cache is not None  # it cannot go on otherwise
        logits = []
        for piece in tokens.split(1 if one_by_one else tokens.shape[1], 1):
            out = self.model(piece, use_cache=True, logits_to_keep=keep, **{key: cache})
            cache = out[key]
            logits.append(out.logits)
        return torch.cat(logits, 1), cache

    def state(self, cache, layer: int) -> Tensor:
        """A layer's state in a cache, key first [B, H, K, V], to be changed in place."""
        if self.kind == "rwkv7":
            return cache[3 * layer + 1][None].mT
        state = cache.layers[layer].recurrent_states[0]
        return state.mT if self.kind == "mamba2" else state


def bench_row(name: str, unit: str, functions: tuple, done: tuple, peer_name: str, args, flops=0):
    """A row: things a second of ours and of the peer, `done` in one call of each; medians of calls
    in turn. of_floor: the time that `flops` take at the rate of a matrix product measured in turn
    with them, as a share of our time."""
    A = torch.randn(1024, 1024, device=pick_device(args.device))

    def product():
        torch.mm(A, A)

    times = []
    for _ in range(3 if args.quick else 8):  # the first warms up
        turn = []
        for function in (*functions, product):
            began = time.perf_counter()
            function()
            if A.is_cuda:
                torch.cuda.synchronize()
            turn.append(time.perf_counter() - began)
        times.append(turn)
    our_time, peer_time, mm_time = torch.tensor(times[1:]).median(0).values.tolist()
    ours, peer = done[0] / our_time, done[1] / peer_time
    row = dict(name=name, ours=ours, peer=peer, peer_name=peer_name, unit=unit, ratio=ours / peer)
    return row | dict(of_floor=flops / (2 * 1024**3) * mm_time / our_time if flops else None)


def weight_flops(model: LanguageModel, tokens: int, logits: int, first: int = 0) -> int:
    """Of the products with the weights alone: the layers from `first` on, and the output map."""
    matrices = [p for p in model.layers[first:].parameters() if p.dim() == 2]
    return 2 * tokens * sum(p.numel() for p in matrices) + 2 * logits * model.unembedding.numel()


def random_tokens(model: LanguageModel, B: int, T: int) -> Tensor:
    """[B, T]"""
    rng = torch.Generator().manual_seed(0)
    return torch.randint(model.vocab, (B, T), generator=rng).to(model.device)


def bench_branches(name: str, model: LanguageModel, peer: Peer, P: int, at_once: int, args) -> dict:
    """P branches in a batch: a write deleted, KL of eleven predictions. The peer has the prefixes
    cached; for every `at_once` branches the cache is copied, one head's state changed, eleven
    tokens read. It can change the state only before token t: by A_t⁻¹ X, which A_t makes X. The KLs
    are asserted equal."""
    t, layer, head = 64, model.recurrent_layers[1], 0
    tokens = random_tokens(model, P, t + HORIZONS)
    p = next(writesae.points(model, tokens, layer, head, [t]))
    P = len(p.passage)  # fewer where the vocabulary is large
    change = p.write().times(-torch.ones(P, device=model.device))
    s = p.s.times(0, 1)
    unit = torch.eye(s.k.shape[-1], device=model.device).expand(P, 1, -1, -1)
    _, A = models.recurrence(s._replace(v=torch.zeros_like(s.k)), unit)  # [P, 1, K, K]
    before = torch.linalg.solve(A[:, 0].double(), change.matrix().double()).float()  # [P, K, V]
    rows = torch.arange(min(P, max(at_once, 4))).split(at_once)
    caches = [peer.read(tokens[row, :t])[1] for row in rows]

    def ours() -> Tensor:
        return writesae.kl_divergence(p.logp, p.branch(change))

    def branch(row: Tensor, cache, change: Tensor) -> Tensor:
        cache = copy.deepcopy(cache)
        peer.state(cache, layer)[:, head] += change
        logits, _ = peer.read(tokens[row, t:], cache, keep=0)
        return logits.log_softmax(-1)

    native = [branch(row, cache, 0 * before[row]) for row, cache in zip(rows, caches)]

    def theirs() -> Tensor:
        kls = []
        for row, cache, logp in zip(rows, caches, native):
            kls.append(writesae.kl_divergence(logp, branch(row, cache, before[row])))
        return torch.cat(kls)

    n = sum(map(len, rows))
    torch.testing.assert_close(ours()[:n], theirs(), rtol=1e-2, atol=1e-6)
    what = f"{name}: {P} branches in a batch; the peer {at_once}"
    flops = weight_flops(model, P * HORIZONS, P * HORIZONS, layer)
    return bench_row(what, "branches/s", (ours, theirs), (P, n), peer.name, args, flops)


def bench_reading(name: str, model: LanguageModel, peer: Peer, T: int, piece: int, args) -> dict:
    """Reading T tokens, `piece` at a time, for the last one's logits; asserted equal in fp32."""
    pieces = random_tokens(model, 1, T).split(piece, 1)

    def ours() -> Tensor:
        cache = None
        for tokens in pieces:
            stream, cache = model.run(model.embed(tokens), cache)
            logits = model.unembed(stream.times(-1))
        return logits

    def theirs() -> Tensor:
        cache = None
        for tokens in pieces:
            logits, cache = peer.read(tokens, cache)
        return logits

    if model.unembedding.dtype == torch.float32:
        torch.testing.assert_close(ours(), theirs(), rtol=0, atol=2e-3)
    what, flops = f"{name}: read {T:,} tokens", weight_flops(model, T, 1)
    if piece == 1:
        what, flops = f"{name}: token by token", 0  # bound by memory, not by arithmetic
    return bench_row(what, "tokens/s", (ours, theirs), (T, T), peer.name, args, flops)


def bench_length(name: str, model: LanguageModel, layers: int, args) -> dict:
    """Tokens a second of a long text in the first `layers` layers, against a short text (1: a
    token's cost does not grow; attention's does)."""
    short, long = (256, 1024) if args.quick else (1024, 8192)
    stream = model.embed(random_tokens(model, 1, long))

    def read_long():
        model.run(stream, last=layers)

    def read_short():
        model.run(stream.times(0, short), last=layers)

    what, both = f"{name}: {long:,} tokens, {layers} layers", (read_long, read_short)
    return bench_row(what, "tokens/s", both, (long, short), f"itself at {short:,}", args)


def bench_cells(name: str, model: LanguageModel, args) -> dict:
    """What all heads of a layer write, collected in one pass, against a pass per head."""
    tokens, layer = random_tokens(model, 4, 128), model.recurrent_layers[1]
    H = model.layers[layer].mixer.heads

    def together():
        writesae.collect(model, tokens, layer, list(range(H)))

    def one_by_one():
        for head in range(H):
            writesae.collect(model, tokens, layer, [head])

    what, both = f"{name}: writes of {H} heads", (together, one_by_one)
    return bench_row(what, "heads/s", both, (H, H), "a pass per head", args)


@torch.enable_grad()
def bench_training(size: int, n_atoms: int, args) -> list[dict]:
    """Steps of an SAE on writes as factors, against the same steps on K x V matrices, losses
    asserted equal; and the peak memory of a step, beyond what was there before it."""
    from torch.distributed._tools.mem_tracker import MemTracker

    rng = torch.Generator().manual_seed(0)
    k, v = (torch.randn(n_atoms, size, generator=rng) for _ in range(2))
    X = writesae.write_of(k, v)
    matrices, sae = writesae.matrix_of(X.matrix()), WriteSAE(n_atoms, size, size)

    def two_steps(inputs: Factored) -> list[float]:
        return writesae.fit_gradient(sae, inputs, rng.manual_seed(0), steps=2, batch=1024)

    def ours() -> list[float]:
        return two_steps(X)

    def theirs() -> list[float]:
        return two_steps(matrices)

    torch.testing.assert_close(ours(), theirs(), rtol=1e-3, atol=1e-6)
    peaks = []
    for function in (ours, theirs):
        with MemTracker() as tracker:
            function()
        peak = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]
        peaks.append(peak / 2**20)
    what = f"SAE step, {n_atoms:,} atoms of {size} x {size}"
    row = bench_row(what, "steps/s", (ours, theirs), (2, 2), "on matrices", args)
    memory = dict(ours=peaks[0], peer=peaks[1], unit="MiB", ratio=peaks[1] / peaks[0])
    return [row, row | memory | dict(name=what + ", memory")]


def full_size(folder: str) -> str:
    """A random checkpoint of Qwen3.5-0.8B's shape, 752 million weights in bf16, with the tokenizer
    of checkpoints/gdn. Returns its folder."""
    shape = SHAPES["gdn"] | dict(
        num_hidden_layers=24,
        hidden_size=1024,
        intermediate_size=3584,
        vocab_size=248_320,
        linear_num_key_heads=16,
        linear_num_value_heads=16,
        linear_key_head_dim=128,
        linear_value_head_dim=128,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=256,
        rope_parameters=dict(rope_type="default", rope_theta=1e7, partial_rotary_factor=0.25),
    )
    model = models.build(shape)
    initialise(model, torch.Generator().manual_seed(0))
    models.save(model, shape, folder, torch.bfloat16)
    shutil.copy(os.path.join(HERE, "checkpoints", "gdn", "tokenizer.json"), folder)
    return folder


def bench_model(name: str, args):
    """Yield a model's rows. RWKV-7's own weights are read as heads of 64, not 32, which is all that
    its authors' package takes: another model, the same work."""
    model = open_model(name, args)
    if model.architecture == "rwkv7":
        own, model = model, models.build(SHAPES["rwkv7"] | dict(head_dim=64))
        for old, new in zip(own.parameters(), model.requires_grad_(False).parameters()):
            new.copy_(old.view(new.shape))
    try:
        peer = Peer(model)
    except ModuleNotFoundError as error:
        say(f"{name}: no rows, since the package {error.name} is not installed")
        return
    name, big = os.path.basename(name), model.vocab > 100_000
    if not big:
        P = 32 if args.quick else 256
        for at_once in (1,) if peer.name == "rwkv" else (1, P):
            yield bench_branches(name, model, peer, P, at_once, args)
    for T in (128, 512) if args.quick else (512,) if big else (512, 4096):
        yield bench_reading(name, model, peer, T, T, args)
    yield bench_reading(name, model, peer, 8 if big else 32, 1, args)
    if not big:
        n = len(model.layers)
        attention = [i for i in range(n) if not model.layers[i].recurrent]
        for layers in sorted({n, *attention[:1]}):
            yield bench_length(name, model, layers, args)
        yield bench_cells(name, model, args)


def bench_rows(args):
    """Yield every row."""
    for name in args.models:
        yield from bench_model(name, args)
    for size in (64,) if args.quick else (64, 128):
        yield from bench_training(size, 256 if args.quick else 2048, args)
    if args.full_size:
        with tempfile.TemporaryDirectory() as folder:
            args.dtype = "bf16"
            yield from bench_model(full_size(os.path.join(folder, "752M")), args)


BENCH_LEGEND = """\
Each row against a peer run for real in the same process, calls in turn, medians. ratio > 1: ours
is better. of floor: the time of the products with the weights alone, at the rate of a matrix
product measured in turn, as a share of our time."""
BENCH_COLUMNS = {
    "what                                        ": "{name}",
    "ours": "{ours:,.1f}",
    "peer": "{peer:,.1f}",
    "unit      ": "{unit}",
    "ratio": "{ratio:.2f}",
    "of floor": "{of_floor:.0%}",
    "peer is       ": "{peer_name}",
}


@torch.no_grad()
def bench(args) -> int:
    """Print every row as soon as it is measured."""
    print(BENCH_LEGEND)
    say(f"bench: {torch.get_num_threads()} threads, {pick_device(args.device)}, seed 0")
    rows, printer = [], TablePrinter(BENCH_COLUMNS)
    for row in bench_rows(args):
        rows.append(row)
        printer.print(row)
    if args.json:
        write_text(args.json, json.dumps(rows, indent=1))
    if args.markdown:
        write_section(args.markdown, args.title, BENCH_LEGEND, printer, rows)
    return 0


# --------------------------------------------------------------------------------------------------
# picture: the method in one drawing
# --------------------------------------------------------------------------------------------------
def picture(args) -> int:
    """Draw the method: a write, an atom, the swap, the reads, KL."""
    figure, (axis,) = panels(1, 9.6, 3.1)
    axis.set(xlim=(0, 16), ylim=(0, 5))
    axis.axis("off")
    boxes = [
        (1.6, 3.6, "write\n$k\\,v^\\top$", "tab:orange"),
        (1.6, 1.2, "atom\n$a\\,A_i$", "tab:blue"),
        (6.2, 3.6, "state $S_t$", "tab:orange"),
        (6.2, 1.2, "state $S_t - k v^\\top + a A_i$", "tab:blue"),
        (10.6, 3.6, "ten more reads", "tab:orange"),
        (10.6, 1.2, "the same reads", "tab:blue"),
        (14.4, 2.4, "KL\nnative ‖ edited", "black"),
    ]
    for x, y, text, colour in boxes:
        axis.text(
            x,
            y,
            text,
            ha="center",
            va="center",
            fontsize=12,
            bbox=dict(boxstyle="round,pad=0.5", facecolor="white", edgecolor=colour, linewidth=2),
        )
    arrows = [
        ((2.5, 3.6), (5.3, 3.6)),
        ((2.5, 1.2), (4.0, 1.2)),
        ((7.2, 3.6), (9.0, 3.6)),
        ((8.4, 1.2), (9.1, 1.2)),
        ((12.2, 3.6), (13.4, 2.9)),
        ((12.2, 1.2), (13.4, 1.9)),
    ]
    for start, end in arrows:
        axis.annotate(
            "", end, start, arrowprops=dict(arrowstyle="-|>", linewidth=1.5, color="grey")
        )
    axis.annotate(
        "", (1.6, 1.9), (1.6, 2.9), arrowprops=dict(arrowstyle="-|>", linewidth=1.5, color="grey")
    )
    axis.text(1.8, 2.4, "coded by its\ndominant atom", fontsize=9, va="center")
    axis.text(0.2, 4.7, "the unmodified model", fontsize=10, color="tab:orange")
    axis.text(
        0.2,
        0.2,
        "one write exchanged for its atom; for nothing, an untrained atom, a random direction",
        fontsize=10,
        color="tab:blue",
    )
    save_then_rename(lambda path: figure.savefig(path, dpi=130, format="png"), args.plot)
    return 0


# ---- train: SAEs of cells ------------------------------------------------------------------------
def train(args) -> int:
    """Train the SAEs of the chosen cells and save each; those that are there already are left, so
    that a run that was stopped goes on where it was."""
    training, _ = choose_text(args)
    jobs = []
    for name in args.models:
        cells = chosen_cells(open_model(name, args), args)
        for layer in sorted({layer for layer, _ in cells}):
            jobs.append((name, layer, [head for i, head in cells if i == layer]))
    for name, layer, heads in shared_out(jobs):
        model = open_model(name, args)
        paths = {head: args.sae or sae_file(model, layer, head, args) for head in heads}
        missing = [head for head in heads if args.force or not os.path.exists(paths[head])]
        for head in set(heads) - set(missing):
            way_out = "--force writes over it, --sae FILE names another"
            require(len(heads) > 1, f"{paths[head]} exists; {way_out}")
            say(f"{paths[head]} exists and is left as it is; --force trains it again")
        if missing:
            corpus = Corpus(models.load_tokenizer(model), training, model.device)
            cell = Cell(model, layer, heads[0], torch.empty(0), [], progress=progress)
            for head, sae in zip(missing, train_saes(cell, corpus, missing, args)):
                sae.save(paths[head])
                print(paths[head])
    return 0


# --------------------------------------------------------------------------------------------------
# pretrain: the three embedded models
# --------------------------------------------------------------------------------------------------
COMMON = dict(vocab_size=2048, hidden_size=128, bos_token_id=0, eos_token_id=0)
# Few heads of 32 x 32 and 0.9 to 1.4 million parameters, so that two CPU cores can train them.
SHAPES = {
    "gdn": dict(
        model_type="qwen3_5_text",
        architectures=["Qwen3_5ForCausalLM"],
        num_hidden_layers=4,
        intermediate_size=384,
        linear_num_key_heads=4,
        linear_num_value_heads=4,
        linear_key_head_dim=32,
        linear_value_head_dim=32,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        full_attention_interval=4,
        tie_word_embeddings=True,
        rope_parameters=dict(rope_type="default", rope_theta=10000.0, partial_rotary_factor=0.5),
        max_position_embeddings=4096,
        **COMMON,
    ),
    "mamba2": dict(
        model_type="mamba2",
        architectures=["Mamba2ForCausalLM"],
        num_hidden_layers=6,
        num_heads=8,
        head_dim=32,
        n_groups=1,
        state_size=32,
        expand=2,
        conv_kernel=4,
        chunk_size=64,
        tie_word_embeddings=True,
        time_step_limit=[0.0, {"__float__": "Infinity"}],
        **COMMON,
    ),
    "rwkv7": dict(
        model_type="rwkv7",
        architectures=["RWKV7ForCausalLM"],
        num_hidden_layers=4,
        head_dim=32,
        intermediate_size=512,
        decay_low_rank_dim=16,
        a_low_rank_dim=16,
        v_low_rank_dim=16,
        gate_low_rank_dim=32,
        norm_eps=1e-5,
        **COMMON,
    ),
}
BATCH = 8  # windows a step: with Muon, many small steps are the better use of a CPU's hours
SAVE_EVERY = 200  # steps: what a run that is stopped goes on from
PEAK_LR = 1.2e-2  # of both optimisers, after a short warm-up; then linearly to zero


def train_tokenizer(texts, vocab: int):
    """Byte-level BPE with vocab entries; entry 0 separates files."""
    from tokenizers import Tokenizer, decoders, models as kinds, pre_tokenizers, trainers

    tokenizer = Tokenizer(kinds.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab,
            special_tokens=["<|endoftext|>"],
            show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    return tokenizer


def encode_files(tokenizer, files: dict[str, str]) -> Tensor:
    """All files one after the other, each opened by the separator. [N]"""
    ids = []
    for text in files.values():
        ids += [0] + tokenizer.encode(text).ids
    return torch.tensor(ids)


@torch.no_grad()
def initialise(model: LanguageModel, generator: torch.Generator):
    """Draw starting weights, in place: matrices ~ N(0, 1/width), maps back to the stream zero,
    gates as in the papers."""

    def uniform(n: int, low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(n, generator=generator)

    def normal(p: Tensor, deviation: float):
        p.copy_(torch.randn(p.shape, generator=generator) * deviation)

    normal(model.embedding.weight, 0.05)
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, nn.Conv1d)):
            back = name.endswith(("out_proj", "o_proj", "down_proj", "mlp.value"))
            linear = 0.0 if back else module.weight.shape[1] ** -0.5
            normal(module.weight, 0.3 if isinstance(module, nn.Conv1d) else linear)
            if module.bias is not None:
                module.bias.zero_()
    for module in model.modules():
        if isinstance(module, models.GatedDeltaNet):  # decays e^{−A Δ}, A 1 to 16, Δ 0.001 to 0.1
            module.A_log.copy_(uniform(module.heads, 1, 16).log())
            module.dt_bias.copy_(inverse_softplus(uniform(module.heads, -6.9, -2.3).exp()))
        elif isinstance(module, models.Mamba2):
            # Here Δ scales the write too. The paper's 0.001 to 0.1 leaves it so small beside the
            # skip D x that a short training never uses the state: start with Δ 0.1 to 1 and no
            # skip.
            module.A_log.copy_(uniform(module.heads, math.log(0.1), math.log(2)))
            module.dt_bias.copy_(inverse_softplus(uniform(module.heads, math.log(0.1), 0).exp()))
            module.D.zero_()
        elif isinstance(module, models.RWKV7):
            ramp = torch.linspace(0, 1, module.x_r.numel())
            for c, power in zip("rwkvag", (0.2, 0.9, 0.7, 0.7, 0.9, 0.2)):
                getattr(module, f"x_{c}").copy_(1 - ramp**power)
            module.w_lora[2].bias.copy_(-6 + 6.5 * torch.linspace(0, 1, module.heads * module.K))
        elif isinstance(module, models.ChannelMix):
            module.x_k.copy_(1 - torch.linspace(0, 1, module.x_k.numel()) ** 2)


def inverse_softplus(y: Tensor) -> Tensor:
    """x with softplus(x) = y."""
    return y + torch.log(-torch.expm1(-y))


def optimisers(model: LanguageModel) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers, AdamW for embedding, head and all small tensors."""
    matrices, others = [], []
    for name, p in model.named_parameters():
        inside = name.startswith("layers") and p.dim() == 2 and min(p.shape) >= 32
        (matrices if inside else others).append(p)
    return [
        torch.optim.Muon(matrices, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, weight_decay=0.0, betas=(0.9, 0.95)),
    ]


def training_batch(tokens: Tensor, seed: int, step: int) -> Tensor:
    """The step-th batch [BATCH, CONTEXT + 1]: every epoch cuts the text at new places and
    shuffles."""
    per_epoch = (len(tokens) - 2 * CONTEXT) // CONTEXT // BATCH
    epoch, i = divmod(step, per_epoch)
    generator = torch.Generator().manual_seed(seed * 1000 + epoch)
    offset = torch.randint(CONTEXT, (1,), generator=generator)
    order = torch.randperm(per_epoch * BATCH, generator=generator)[i * BATCH : (i + 1) * BATCH]
    return tokens[offset + order[:, None] * CONTEXT + torch.arange(CONTEXT + 1)]


@torch.inference_mode()
def bits_per_byte(
    model: LanguageModel, tokens: Tensor, bytes_per_token: float, limit: int | None = None
) -> float:
    """Held-out cross-entropy in bits per byte of text (lower is better): windows of CONTEXT tokens
    that move by half a window, each token scored once, with half a window or more before it.
    limit: only so many windows, spread evenly."""
    half, nats = CONTEXT // 2, []
    starts = torch.arange(0, len(tokens) - CONTEXT - 1, half)
    if limit:
        starts = starts[:: max(1, len(starts) // limit)]
    for part in starts.split(16):
        x = tokens[part[:, None] + torch.arange(CONTEXT + 1)].to(model.device)
        logits = model(x[:, :-1])[0][:, half:]
        nats.append(F.cross_entropy(logits.float().mT, x[:, half + 1 :], reduction="none").cpu())
    return torch.cat(nats).mean().item() / math.log(2) / bytes_per_token


def pretrain(args) -> int:
    """Train the embedded models from nothing, each into args.out/NAME in the hub's layout."""
    for name in args.models:
        folder = os.path.join(args.out, name)
        if os.path.exists(os.path.join(folder, "model.safetensors")) and not args.force:
            raise InputError(
                f"{folder} holds a model; --force writes over it, --out FOLDER names another "
                "place"
            )
        os.makedirs(folder, exist_ok=True)
        pretrain_one(name, folder, args)
    return 0


def pretrain_one(name: str, folder: str, args):
    """One of them. Interrupted, it goes on from its last save as if it had never stopped."""
    training, tested = choose_text(args)
    tokenizer = train_tokenizer(training.values(), COMMON["vocab_size"])
    train_tokens, test_tokens = encode_files(tokenizer, training), encode_files(tokenizer, tested)
    bytes_per_token = sum(len(text.encode()) for text in tested.values()) / len(test_tokens)
    model = models.build(SHAPES[name]).to(pick_device(args.device))
    initialise(model, torch.Generator().manual_seed(args.seed))
    steps = max(1, (50_000 if args.quick else args.tokens) // (CONTEXT * BATCH))
    say(
        f"pretrain {name}: {sum(p.numel() for p in model.parameters()):,} parameters, "
        f"{len(train_tokens):,} training tokens, {len(test_tokens):,} held out "
        f"({bytes_per_token:.2f} bytes each), {steps:,} steps of {BATCH} x {CONTEXT} tokens, "
        f"{model.device}, bf16 products "
        f"(fp32 weights and recurrence), seed {args.seed}"
    )
    run = TrainingRun(model, optimisers(model), steps, os.path.join(folder, "resume.pt"))
    bpb = math.nan
    for step in tqdm(range(run.resume(), steps), total=steps, file=sys.stderr, disable=None):
        loss = run.step(step, training_batch(train_tokens, args.seed, step).to(model.device))
        done = step + 1
        if done % SAVE_EVERY == 0 or done == steps:
            limit = 64 if args.quick or done < steps else None
            bpb = bits_per_byte(model, test_tokens, bytes_per_token, limit)
            say(f"step {done:5d}  train {loss:.3f} nats/token  held-out {bpb:.3f} bits/byte")
            run.save(done)
    if math.isnan(bpb):  # it had stopped after its last step
        bpb = bits_per_byte(model, test_tokens, bytes_per_token, 64 if args.quick else None)
    how = dict(steps=steps, tokens=steps * CONTEXT * BATCH, held_out_bits_per_byte=round(bpb, 4))
    models.save(model, SHAPES[name] | dict(pretraining=how), folder)
    save_then_rename(tokenizer.save, os.path.join(folder, "tokenizer.json"))
    os.remove(run.path)
    print(f"{name}: held-out {bpb:.3f} bits per byte, saved in {folder}")


class TrainingRun(NamedTuple):
    """A model in training, its optimisers, and the file that it can go on from."""

    model: LanguageModel
    optimisers: list[torch.optim.Optimizer]
    steps: int
    path: str

    def step(self, step: int, x: Tensor) -> float:
        """One step on tokens x [BATCH, CONTEXT + 1]; the loss in nats per token."""
        with torch.autocast(x.device.type, torch.bfloat16):
            logits, _ = self.model(x[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1).float(), x[:, 1:].flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimiser in self.optimisers:
            for group in optimiser.param_groups:
                group["lr"] = PEAK_LR * min(
                    1, (step + 1) / 100, (self.steps - step) / (0.9 * self.steps)
                )
            optimiser.step()
            optimiser.zero_grad()
        return loss.item()

    def save(self, done: int):
        """Everything that the next step depends on."""
        saved = dict(
            step=done,
            steps=self.steps,
            model=self.model.state_dict(),
            optimisers=[optimiser.state_dict() for optimiser in self.optimisers],
        )
        save_then_rename(lambda path: torch.save(saved, path), self.path)

    def resume(self) -> int:
        """The number of steps that are done: 0, or what a run of the same length has saved."""
        if not os.path.exists(self.path):
            return 0
        saved = torch.load(self.path, weights_only=True, map_location=self.model.device)
        if saved["steps"] != self.steps:
            return 0
        self.model.load_state_dict(saved["model"])
        for optimiser, state in zip(self.optimisers, saved["optimisers"]):
            optimiser.load_state_dict(state)
        say(f"going on from step {saved['step']}")
        return saved["step"]


# ---- The command line ----------------------------------------------------------------------------
class Parser(argparse.ArgumentParser):
    """argparse, with errors as one line and no abbreviations."""

    def __init__(self, **settings):
        super().__init__(allow_abbrev=False, **settings)

    def error(self, message: str):
        """Raise InputError where argparse would print its usage and exit."""
        raise InputError(f"{message}; see python {self.prog} --help")


def positive(text: str) -> int:
    """A whole number from 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: allowed are whole numbers, at least 1")
    return int(text)


def finite(text: str) -> float:
    """A finite number from 0."""
    try:
        x = float(text)
    except ValueError:
        x = math.nan
    if not 0 <= x < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r}: allowed are finite numbers from 0")
    return x


OPTIONS = {  # each option once; the commands below name those that they take
    "model": dict(help="gdn, mamba2, rwkv7 (default: all three), a folder, or a hub id"),
    "device": dict(default="auto", help="auto, cpu, cuda, ..."),
    "seed": dict(type=int, default=0),
    "quick": dict(action="store_true", help="the same code on a small sample, in seconds"),
    "train-text": dict(
        metavar="FILE|FOLDER",
        help="train on this text, not Python's own; of a folder one file in ten is held out",
    ),
    "layer": dict(help="a recurrent layer, from 0, or all (default: the second recurrent one)"),
    "head": dict(default="0", help="a head, from 0, or all (default 0)"),
    "dtype": dict(
        default="fp32", choices=["fp32", "bf16"], help="of the weights; recurrence and KL are fp32"
    ),
    "text": dict(metavar="FILE|FOLDER", help="test on this text, not the held-out one"),
    "passages": dict(type=positive, help="number of test passages or prompts"),
    "json": dict(metavar="FILE", help="write the results there"),
    "records": dict(metavar="FILE", help="write one JSON line per tested thing there"),
    "plot": dict(metavar="FILE.png", help="draw the picture there"),
    "markdown": dict(metavar="FILE.md", help="write the table there, in its own section"),
    "sae": dict(metavar="FILE", help="this SAE instead of the one beside the model"),
    "saes": dict(
        metavar="FOLDER|HUB_ID", help="look for SAEs, and keep new ones, there, not by the model"
    ),
    "atoms": dict(type=positive, help="an SAE of this many atoms"),
    "source": dict(
        default="write", choices=list(SAE_DEFAULTS), help="what is coded (state: as in the paper)"
    ),
    "cosine-min": dict(type=finite, help=f"least cosine of a firing (default {COSINE_MIN})"),
    "active": dict(type=positive, help="active atoms per input"),
    "encoder": dict(choices=list(writesae.ENCODERS)),
    "decoder": dict(choices=list(writesae.DECODERS)),
    "sparsity": dict(choices=list(writesae.SPARSITIES[:3])),
    "metric": dict(choices=["read", "frobenius"], help="what near means"),
    "steps": dict(type=positive, help="training steps"),
    "force": dict(action="store_true", help="write over a file that is there"),
    "key": dict(choices=writesae.KEY_SIDES, help="key side (default read)"),
    "value": dict(choices=writesae.VALUE_SIDES, help="only this value side"),
    "reach": dict(default="all", choices=["head", "layer", "all"], help="edited heads"),
    "magnitude": dict(type=finite, default=3.0, help="each edit, in native writes"),
    "smallest": dict(
        action="store_true",
        help="search the least budget after which targets persist (--passages 120)",
    ),
    "prompt": dict(metavar="TEXT", help="show one edit of this text, with --target"),
    "target": dict(metavar="TOKEN", help="the token that is to appear after --prompt"),
    "atom": dict(type=int, help="only this atom"),
    "what": dict(default="sizes", choices=[*COMPARED, "variants"]),
    "full-size": dict(action="store_true", help="also a random 752 M checkpoint"),
    "tokens": dict(type=positive, default=8_192_000, help="training tokens in all"),
    "out": dict(default=os.path.join(HERE, "checkpoints"), help="where the model's folder goes"),
}
COMMON = "model device seed quick train-text"
CELL = COMMON + " layer head dtype"
TEST = CELL + " text passages json records plot markdown"
SAE = " sae saes atoms cosine-min"
COMMANDS = {  # command -> its function, its options, an example
    "replace": (run_experiment, TEST + SAE + " source", "--model gdn --layer all --head all"),
    "formula": (run_experiment, TEST + SAE, "--model rwkv7 --quick"),
    "steer": (
        run_experiment,
        TEST + " key value reach magnitude smallest prompt target",
        "--model gdn --prompt 'def f(x):' --target ' yield'",
    ),
    "erase": (run_experiment, TEST + SAE, "--model mamba2"),
    "atoms": (run_experiment, TEST + SAE + " atom", "--model gdn --atom 656"),
    "compare": (run_experiment, TEST + " what", "--what sizes --plot sizes.png"),
    "bench": (bench, COMMON + " dtype json markdown full-size", "--quick"),
    "picture": (picture, "plot", "--plot figures/method.png"),
    "train": (
        train,
        CELL + SAE + " source active encoder decoder sparsity metric steps force",
        "--model rwkv7 --layer 2 --head all",
    ),
    "pretrain": (pretrain, COMMON + " tokens out force", "--model mamba2 --out /tmp/models"),
}


def make_parser() -> Parser:
    """A subparser per command, each with only its own options; the others have their defaults."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = Parser(prog="run.py", description=__doc__, formatter_class=raw)
    commands = parser.add_subparsers(
        dest="command", required=True, metavar="COMMAND", parser_class=Parser
    )
    for name, (_, options, example) in COMMANDS.items():
        p = commands.add_parser(name, epilog=f"example: python run.py {name} {example}")
        for option, settings in OPTIONS.items():
            if option in options.split():
                p.add_argument("--" + option, **settings)
            else:
                p.set_defaults(**{option.replace("-", "_"): settings.get("default")})
    return parser


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line. Raises InputError for a wrong one."""
    words = list(sys.argv[1:] if argv is None else argv)
    args = make_parser().parse_args(words)
    args.models = [args.model] if args.model else list(EMBEDDED)
    outputs = ("--json", "--plot", "--records", "--markdown")
    kept = [w for i, w in enumerate(words) if not {w, words[i - 1]} & set(outputs)]
    args.title = f"`python run.py {' '.join(kept)}`"  # of its section in a Markdown file
    for path in filter(None, (args.json, args.records, args.plot, args.markdown)):
        there = os.path.isdir(os.path.dirname(os.path.abspath(path)))
        require(there, f"{path}: cannot be written, its folder does not exist; make it first")
    if args.command == "pretrain":
        known = set(args.models) <= set(EMBEDDED)
        require(known, f"pretrain --model {args.model}: allowed are {', '.join(EMBEDDED)}")
    if args.command == "steer":
        one = "all" not in (args.layer, args.head)
        require(one, "steer takes one cell; --reach layer and --reach all edit more than one")
        if args.smallest and args.passages is None:
            args.passages = 24 if args.quick else 120
    drawn = args.command not in EXPERIMENTS or EXPERIMENTS[args.command].draw
    require(drawn or not args.plot, f"{args.command} draws no picture; leave --plot out")
    return args


def main(argv: list[str] | None = None) -> int:
    """Run a command; 0, or 2 after one line on stderr, or 130 after Ctrl-C."""
    try:
        args = parse(argv)
        return COMMANDS[args.command][0](args)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
