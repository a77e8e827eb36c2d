"""The command line: python run.py COMMAND [options], python run.py COMMAND --help.

    replace    can an atom stand for a real write? On the three embedded models, or on any model
    formula    the logit-change formula, from the paper's three factors to the exact second order
    steer      edit the cache so that a token appears, at once or as a memory
    erase      take an atom out where it fires: does the token that it promotes fall?
    atoms      what atoms stand for: their tokens, their contexts
    compare    dictionaries side by side: sizes, active atoms, variants, seeds
    bench      time and memory against other implementations
    picture    draw the method
    train      train the SAE of a cell and save it beside its model
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
from models import InputError, LanguageModel, save_then_rename, write_text
from writesae import HORIZONS, Factored, Table, WriteSAE

HERE = os.path.dirname(os.path.abspath(__file__))
EMBEDDED = ("gdn", "mamba2", "rwkv7")

# --------------------------------------------------------------------------------------------------
# Knobs
# --------------------------------------------------------------------------------------------------
PASSAGE = 128  # tokens of a tested passage
POSITIONS = range(
    32, PASSAGE - HORIZONS + 1, 3
)  # tested in each: some text before, ten tokens after
COSINE_MIN = 0.71  # a firing explains half of the write's energy
CONTEXT = 512  # tokens of a training window

# SAE settings by source: the write-aligned SAE, and one on states as the paper's
SAE_DEFAULTS = {
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
TRAINING_WINDOWS = dict(write=1500, state=800)  # of CONTEXT tokens
METRIC_PASSAGES = 128  # for the read metric, POSITIONS[::4] of each
NULL_PASSAGES = 600  # whose writes the untrained atoms are drawn from


def say(line: str):
    """One line about what was decided or how far long work is, on stderr, past a progress bar."""
    tqdm.write(line, file=sys.stderr)


def progress(what: str):
    """A progress bar on stderr for any iterable; nothing where stderr is no terminal."""

    def bar(items):
        return tqdm(items, desc=what, file=sys.stderr, leave=False, disable=None)

    return bar


# --------------------------------------------------------------------------------------------------
# Text: what every Python installation carries, or the user's own
# --------------------------------------------------------------------------------------------------
NOT_READ = {
    "test",
    "tests",
    "site-packages",
    "dist-packages",
    "encodings",
    "idlelib",
    "lib2to3",
    "turtledemo",
    "pydoc_data",
}


def python_text() -> dict[str, str]:
    """The standard library's sources (without its tests, code tables and bundled programs) and the
    language reference. Returns file name -> text; the reference's topics are named "topics/NAME".
    """
    root, files = sysconfig.get_paths()["stdlib"], {}
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(
            f for f in folders if f not in NOT_READ and not f.startswith(("__pycache__", "config-"))
        )
        for name in sorted(names):
            if name.endswith(".py") and not name.startswith("_sysconfigdata"):
                path = os.path.join(folder, name)
                with open(path, encoding="utf-8", errors="replace") as f:
                    files[os.path.relpath(path, root).replace(os.sep, "/")] = f.read()
    from pydoc_data.topics import topics

    files.update({f"topics/{name}": text for name, text in sorted(topics.items())})
    return files


def held_out(name: str) -> bool:
    """Whether a file is kept from all training: so says the hash of its name, for one in ten."""
    return hashlib.sha256(name.encode()).digest()[0] < 26


def read_files(path: str) -> dict[str, str]:
    """The text files of a folder (those that are UTF-8), or the one file. Raises InputError."""
    paths = [path]
    if os.path.isdir(path):
        paths = sorted(
            os.path.join(folder, name) for folder, _, names in os.walk(path) for name in names
        )
    files = {}
    for name in paths:
        try:
            with open(name, encoding="utf-8") as f:
                files[os.path.relpath(name, path) if name != path else os.path.basename(path)] = (
                    f.read()
                )
        except UnicodeDecodeError as error:
            if name == path:
                raise InputError(
                    f"{path} is not UTF-8 text ({error.reason}); give a text file"
                ) from None
        except OSError as error:
            raise InputError(
                f"{name}: cannot be read ({error.strerror}); give a text file or a folder "
                "of them"
            ) from None
    if not files:
        raise InputError(f"{path} holds no UTF-8 text file; give a text file or a folder of them")
    return files


def choose_text(args) -> tuple[dict[str, str], dict[str, str]]:
    """Training files and tested files, by --train-text and --text; Python's own where they are
    silent."""
    files = read_files(args.train_text) if args.train_text else python_text()
    training = {name: text for name, text in files.items() if not held_out(name)}
    tested = {name: text for name, text in files.items() if held_out(name)}
    if args.text:
        training, tested = training if not args.train_text else files, read_files(args.text)
    elif args.train_text and not tested:
        raise InputError(
            f"--train-text {args.train_text}: none of its {len(files)} files is held out "
            "(one in ten is, by the hash of its name); give --text for the test"
        )
    return training, tested


class Passages(NamedTuple):
    """Pieces of text as tokens."""

    tokens: Tensor  # [n, T]
    file: Tensor  # [n] which file each comes from: intervals draw whole files


def copied(passage: str, lines: set[str]) -> bool:
    """Whether every line of a passage, but those cut at its ends, is a line of the training
    text."""
    inside = passage.splitlines()[1:-1]
    return bool(inside) and all(line in lines for line in inside)


def windows(tokenizer, files: dict[str, str], n: int, T: int, training: dict[str, str]) -> Passages:
    """n windows of T tokens, evenly spread over the files, each inside one file and none a copy of
    training text. Raises InputError if there are fewer."""
    lines = {line for text in training.values() for line in text.splitlines()}
    tokens, file = [], []
    for i, text in enumerate(files.values()):
        ids = torch.tensor(tokenizer.encode(text), dtype=torch.long)
        tokens.append(ids[: len(ids) // T * T].view(-1, T))
        file.append(torch.full((len(tokens[-1]),), i))
    tokens, file = torch.cat(tokens), torch.cat(file)
    candidates = (
        torch.linspace(0, max(0, len(tokens) - 1), min(len(tokens), 10 * n)).long().tolist()
    )
    own = [i for i in candidates if not copied(tokenizer.decode(tokens[i].tolist()), lines)]
    if len(own) < n:
        raise InputError(
            f"the text gives {len(own)} passages of {T} tokens that are no copies of training "
            f"text, {n} are needed: take a longer text or a smaller --passages"
        )
    chosen = torch.tensor(own)[torch.linspace(0, len(own) - 1, n).long()]
    return Passages(tokens[chosen], file[chosen])


def training_windows(tokenizer, files: dict[str, str], n: int, T: int, device) -> Tensor:
    """About n windows [n, T] of training text, without encoding all of it: 2 n evenly spread pieces
    of 4 T characters are, and as many windows as they give are taken, up to n."""
    text = "\n".join(files.values())
    starts = torch.linspace(0, max(0, len(text) - 4 * T), 2 * n).long().tolist()
    pieces = [torch.tensor(tokenizer.encode(text[start : start + 4 * T])[:T]) for start in starts]
    pieces = [piece for piece in pieces if len(piece) == T]
    if not pieces:
        raise InputError(
            f"the training text has {len(text)} characters, too few for one window of {T} "
            "tokens: give a longer --train-text"
        )
    keep = torch.linspace(0, len(pieces) - 1, min(n, len(pieces))).long().tolist()
    return torch.stack([pieces[i] for i in keep]).to(device)


# --------------------------------------------------------------------------------------------------
# Cells and their SAEs
# --------------------------------------------------------------------------------------------------
class Cell(NamedTuple):
    """What one experiment works on: one head of one layer of a model, its SAE, and text."""

    model: LanguageModel
    layer: int
    head: int
    tokenizer: models.Tokenizer
    passages: Passages  # tested
    training: dict[str, str]  # file name -> text
    rng: torch.Generator
    sae: WriteSAE | None = None

    def name(self) -> str:
        """Such as "gdn L1H0"."""
        return f"{self.model.name} L{self.layer}H{self.head}"


def pick_device(name: str) -> torch.device:
    """ "auto": a GPU where there is one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0][:80]
        raise InputError(
            f"device {name!r} cannot be used here ({reason}); take auto or cpu"
        ) from None


def open_model(name: str, args) -> LanguageModel:
    """An embedded model by its short name, or any folder or hub id."""
    path = os.path.join(HERE, "checkpoints", name) if name in EMBEDDED else name
    model = models.load(
        path, pick_device(args.device), dict(fp32=torch.float32, bf16=torch.bfloat16)[args.dtype]
    )
    model.name = name
    return model


def is_large(model: LanguageModel) -> bool:
    """More than 100 million parameters: --quick then takes a quarter of its sample, formula no
    fp64."""
    return sum(p.numel() for p in model.parameters()) > 100_000_000


def number(text: str, what: str) -> int:
    """A layer or head as a number. Raises InputError."""
    if not text.isdecimal():
        raise InputError(f"{what} {text!r}: allowed are a number or all")
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
        heads = [number(args.head, "head")] if args.head != "all" else []
        model.check_cell(layer, heads[0] if heads else 0)
        cells += [(layer, head) for head in heads or range(model.layers[layer].mixer.heads)]
    return cells


def sae_settings(args) -> dict:
    """The SAE's settings: the defaults of its source, and what the command line says."""
    settings = dict(source=args.source) | SAE_DEFAULTS[args.source] | dict(seed=args.seed)
    asked = {key: getattr(args, key, None) for key in settings}
    settings |= {key: value for key, value in asked.items() if value is not None}
    if args.train_text:
        settings["text"] = os.path.basename(os.path.normpath(args.train_text))
    return settings


def sae_file(model: LanguageModel, layer: int, head: int, args) -> str:
    """Where a cell's SAE lives: beside its model (or in --saes FOLDER), named by the cell and by
    every setting that is not the default."""
    settings, defaults = sae_settings(args), SAE_DEFAULTS[args.source] | dict(
        seed=0, source="write"
    )
    other = [
        f"{value}-" if key == "source" else f"{key}-{value}-"
        for key, value in settings.items()
        if value != defaults.get(key)
    ]
    return os.path.join(
        args.saes or model.folder, f"sae-{''.join(other)}L{layer}H{head}.safetensors"
    )


def new_sae(model: LanguageModel, layer: int, head: int, settings: dict) -> WriteSAE:
    """An SAE of these settings for one cell, before training."""
    mixer, settings = model.layers[layer].mixer, dict(settings)
    return WriteSAE(
        settings.pop("atoms"),
        mixer.K,
        mixer.V,
        **settings,
        architecture=model.architecture,
        model=os.path.basename(model.name),
        layer=layer,
        head=head,
        layout="key first",
        cosine_min=COSINE_MIN,
    ).to(model.device)


def cell_metric(cell: Cell, quick: bool) -> tuple[Tensor, Tensor]:
    """The read metric of a cell, from training text."""
    n = METRIC_PASSAGES if not quick else 2 if is_large(cell.model) else 8
    sample = training_windows(cell.tokenizer, cell.training, n, PASSAGE, cell.model.device)
    return writesae.read_metric(
        cell.model,
        sample,
        cell.layer,
        cell.head,
        POSITIONS[::4],
        cell.rng,
        progress=progress("metric"),
    )


def fit(
    sae: WriteSAE,
    X: Factored,
    generator: torch.Generator,
    quick: bool,
    steps: int | None = None,
    sample: int = 150_000,
):
    """Train an SAE by the method that fits its settings; says which in its cfg."""
    one_write = (sae.cfg["encoder"], sae.cfg["decoder"], sae.sparsity) == ("tied", "rank1", "topk")
    if one_write and sae.active == 1 and sae.cfg["source"] == "write":
        sae.cfg["method"] = "alternating updates"
        writesae.fit_alternating(
            sae,
            X.keys[:, 0],
            X.values[:, 0],
            generator,
            steps or (8 if quick else 24),
            20_000 if quick else sample,
            progress=progress("atoms"),
        )
    else:
        sae.cfg["method"] = "Adam"
        writesae.fit_gradient(
            sae,
            X,
            generator,
            steps or (50 if quick else 2000),
            256 if sae.cfg["source"] == "state" else 1024,
            progress=progress("atoms"),
        )
    sae.requires_grad_(False)


def train_saes(cell: Cell, heads: list[int], args) -> list[WriteSAE]:
    """SAEs for several heads of the cell's layer, from the training text alone: one pass over it
    collects what all of them write."""
    began, settings, saes = time.time(), sae_settings(args), []
    n = 60 if args.quick else min(TRAINING_WINDOWS[args.source], max(300, settings["atoms"] // 4))
    tokens = training_windows(cell.tokenizer, cell.training, n, CONTEXT, cell.model.device)
    all_X = writesae.collect(
        cell.model, tokens, cell.layer, heads, args.source, progress=progress("writes")
    )
    for head, X in zip(heads, all_X):
        cell = cell._replace(head=head, rng=torch.Generator().manual_seed(settings["seed"]))
        if args.quick and args.atoms is None:
            settings["atoms"] = 512
        sae = new_sae(cell.model, cell.layer, head, settings)
        if settings["metric"] == "read":
            writesae.set_metric(sae, *cell_metric(cell, args.quick))
        fit(sae, X, cell.rng, args.quick, args.steps)
        sample = X.rows(torch.randint(len(X.keys), (2000,), generator=cell.rng).to(X.keys.device))
        cosines = writesae.cosine(sae.dominant(sample)[2], sample)
        sae.cfg |= dict(
            n_train=len(X.keys),
            seconds=round(time.time() - began, 1),
            median_cosine=round(cosines.median().item(), 4),
        )
        say(
            f"SAE {cell.name()}: {sae.n_atoms:,} atoms, {sae.active} active, source {args.source}, "
            f"{settings['metric']} metric, {sae.cfg['method']} on {len(X.keys):,} samples; median "
            f"cosine with them {sae.cfg['median_cosine']:.3f}; {sae.cfg['seconds']} s"
        )
        saes.append(sae)
    return saes


def check_sae(sae: WriteSAE, cell: Cell, path: str, args):
    """Raise InputError unless the SAE was made for this cell, and by the settings that were asked
    for."""
    mixer = cell.model.layers[cell.layer].mixer
    expected = dict(
        architecture=cell.model.architecture, K=mixer.K, V=mixer.V, layer=cell.layer, head=cell.head
    )
    if os.path.dirname(os.path.abspath(path)) != os.path.abspath(cell.model.folder):
        expected["model"] = os.path.basename(cell.model.name)
    names = dict(atoms="n_atoms")
    for key in SAE_DEFAULTS["write"]:
        if getattr(args, key, None) is not None:
            expected[names.get(key, key)] = getattr(args, key)
    for key, value in expected.items():
        if sae.cfg.get(key) != value:
            raise InputError(
                f"{path}: this SAE has {key} {sae.cfg.get(key)}, here it is {value}; give "
                f"an SAE of {cell.name()}, or leave --sae out"
            )


def find_sae(cell: Cell, args) -> WriteSAE:
    """The cell's SAE from its file (or --sae), else a new one, trained now and said so."""
    path = args.sae or sae_file(cell.model, cell.layer, cell.head, args)
    if args.sae or os.path.exists(path):
        sae = WriteSAE.load(path).to(cell.model.device)
        check_sae(sae, cell, path, args)
        return sae
    kept = "small, not kept" if args.quick else "kept there"
    say(f"no SAE yet for {cell.name()} ({path}): training one first, {kept}")
    (sae,) = train_saes(cell, [cell.head], args)
    if not args.quick:
        sae.save(path)
    return sae


# --------------------------------------------------------------------------------------------------
# One driver for all experiments
# --------------------------------------------------------------------------------------------------
class Experiment(NamedTuple):
    """An experiment is measure(cell, args) -> (figures, table); the driver does all the rest."""

    measure: Callable  # figures: a dict, for JSON; table: a row per tested thing
    columns: dict[str, str]  # heading -> format string over a row, "-" where it lacks it
    rows: Callable  # figures -> the printed rows, a list of dicts
    legend: str  # printed above the table
    passages: tuple[int, int] = (176, 12)  # how many are tested, and with --quick
    needs_sae: bool = True
    draw: Callable | None = None  # (results, tables, path): the picture of --plot
    all_cells: Callable | None = None  # results -> lines about many cells


class TablePrinter:
    """Prints rows under headings, each as soon as it is there; columns are as wide as the first
    need."""

    def __init__(self, columns: dict[str, str]):
        self.columns, self.widths = columns, None

    def text(self, form: str, row: dict) -> str:
        """One field; "-" where the row lacks what the format string names, or it is NaN."""
        try:
            text = form.format(**row)
        except (KeyError, TypeError, IndexError):
            return "-"
        return "-" if "nan" in text else text

    def fields(self, row: dict) -> list[str]:
        """The texts of one row."""
        return [self.text(form, row) for form in self.columns.values()]

    def print(self, row: dict):
        """One row, under the headings if it is the first."""
        fields = self.fields(row)
        if self.widths is None:
            self.widths = [max(len(h), len(f)) for h, f in zip(self.columns, fields)]
            self.line(list(self.columns))
        self.line(fields)

    def line(self, fields: list[str]):
        """One line; a column whose heading ends in a space is aligned left."""
        aligned = [
            f.ljust(width) if heading.endswith(" ") else f.rjust(width)
            for f, width, heading in zip(fields, self.widths, self.columns)
        ]
        print("  ".join(aligned).rstrip(), flush=True)


def no_nan(x):
    """The same results with None for NaN (a rate of no firings), which JSON has no word for."""
    if isinstance(x, dict):
        return {key: no_nan(value) for key, value in x.items()}
    if isinstance(x, (list, tuple)):
        return [no_nan(value) for value in x]
    return None if isinstance(x, float) and not math.isfinite(x) else x


def json_lines(name: dict, table: Table) -> str:
    """One JSON line per row of a table, the cell's name in each."""
    columns = {key: x.tolist() for key, x in table.items()}
    n = len(next(iter(columns.values()), []))
    return "".join(
        json.dumps(no_nan(name | {key: x[i] for key, x in columns.items()})) + "\n"
        for i in range(n)
    )


def write_section(path: str, title: str, legend: str, printer: TablePrinter, rows: list[dict]):
    """Write a table into a Markdown file: its section is replaced if there is one of this title,
    else added at the end. The rest of the file stays."""
    lines = [
        f"## {title}",
        "",
        "```",
        legend,
        "```",
        "",
        "| " + " | ".join(printer.columns) + " |",
        "|" + "---|" * len(printer.columns),
    ]
    lines += ["| " + " | ".join(printer.fields(row)) + " |" for row in rows]
    text = ""
    if os.path.exists(path):
        with open(path, encoding="utf-8") as f:
            text = f.read()
    sections = text.split("\n## ")
    kept = [section for section in sections[1:] if section.splitlines()[0] != title]
    kept.append("\n".join(lines)[3:] + "\n")
    write_text(path, "\n## ".join([sections[0], *kept]))


def shared_out(jobs: list) -> list:
    """This process's share of the jobs: all of them, or under torchrun every world-th."""
    return jobs[int(os.environ.get("RANK", 0)) :: int(os.environ.get("WORLD_SIZE", 1))]


def gathered(shares: list) -> list:
    """What all processes measured, in the order of the jobs, on rank 0 (empty on the others)."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    if world == 1:
        return shares
    import torch.distributed as dist

    dist.init_process_group("gloo")
    everything = [None] * world if dist.get_rank() == 0 else None
    dist.gather_object(shares, everything)
    dist.destroy_process_group()
    if everything is None:
        return []
    return [everything[i % world][i // world] for i in range(sum(map(len, everything)))]


def open_cells(args, n: int, jobs: list | None = None):
    """Yield the cells that the arguments name, one after the other (this process's share of
    them)."""
    training, tested = choose_text(args)
    jobs = [
        (name, cell) for name in args.models for cell in chosen_cells(open_model(name, args), args)
    ]
    opened = None
    for name, (layer, head) in shared_out(jobs):
        if opened != name:
            model, opened = open_model(name, args), name
            tokenizer = models.load_tokenizer(model)
            few = args.quick and args.passages is None and is_large(model)
            passages = windows(tokenizer, tested, max(2, n // 4) if few else n, PASSAGE, training)
            passages = passages._replace(tokens=passages.tokens.to(model.device))
        yield Cell(
            model,
            layer,
            head,
            tokenizer,
            passages,
            training,
            torch.Generator().manual_seed(args.seed),
        )


def run_experiment(args) -> int:
    """Any experiment: for each cell its figures; then the table, JSON, records, a picture."""
    experiment = EXPERIMENTS[args.command]
    n = args.passages or experiment.passages[args.quick]
    print(experiment.legend + "\n")
    printer, shares = TablePrinter(experiment.columns), []
    alone = int(os.environ.get("WORLD_SIZE", 1)) == 1
    for cell in open_cells(args, n):
        if experiment.needs_sae:
            cell = cell._replace(sae=find_sae(cell, args))
        say(
            f"{args.command} {cell.name()}: {len(cell.passages.tokens)} passages of "
            f"{args.text or 'held-out text'}, {cell.model.device}, seed {args.seed}"
        )
        began, name = time.time(), dict(model=cell.model.name, layer=cell.layer, head=cell.head)
        figures, table = experiment.measure(cell, args)
        results = [name | f for f in (figures if isinstance(figures, list) else [figures])]
        results[0]["seconds"] = round(time.time() - began, 1)
        shares.append((name, results, table))
        if alone:
            for row in experiment.rows(results):
                printer.print(row)
    shares = gathered(shares)
    for _, results, _ in shares if not alone else []:
        for row in experiment.rows(results):
            printer.print(row)
    finish(experiment, shares, args)
    return 0


def finish(experiment: Experiment, shares: list, args):
    """What comes after the last row: lines over all cells, JSON, records, the picture."""
    if not shares:
        return
    everything = [figures for _, results, _ in shares for figures in results]
    if experiment.all_cells and "all" in (args.layer, args.head):
        print(experiment.all_cells(everything))
    if args.json:
        write_text(args.json, json.dumps(no_nan(everything), indent=1))
    if args.markdown:
        rows = [row for _, results, _ in shares for row in experiment.rows(results)]
        write_section(
            args.markdown, args.title, experiment.legend, TablePrinter(experiment.columns), rows
        )
    if args.records:
        write_text(args.records, "".join(json_lines(name, table) for name, _, table in shares))
    if args.plot:
        tables = [table for _, _, table in shares]
        figure = experiment.draw(everything, tables)
        save_then_rename(lambda path: figure.savefig(path, dpi=110, format="png"), args.plot)


COLOURS = ("tab:blue", "tab:orange", "tab:green")


def panels(n: int, width: float = 4.2, height: float = 3.6):
    """A figure with n panels side by side, drawn to a file."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        1, n, figsize=(width * n, height), constrained_layout=True, squeeze=False
    )
    return figure, axes[0]


# --------------------------------------------------------------------------------------------------
# replace
# --------------------------------------------------------------------------------------------------
def null_dictionary(cell: Cell, sae: WriteSAE) -> WriteSAE:
    """As many writes of the training text as sae has atoms, drawn at random: no training."""
    n = max(60, min(NULL_PASSAGES, sae.n_atoms // 16))
    tokens = training_windows(cell.tokenizer, cell.training, n, PASSAGE, cell.model.device)
    (X,) = writesae.collect(
        cell.model, tokens, cell.layer, [cell.head], skip=POSITIONS[0], progress=progress("null")
    )
    return writesae.untrained(sae, X.keys[:, 0], X.values[:, 0], cell.rng)


def replace(cell: Cell, args):
    """The replacement test of one cell: its figures, and a row per tested position."""
    dictionaries = {"atom": cell.sae, "untrained": null_dictionary(cell, cell.sae)}
    positions = POSITIONS[::4] if args.quick else POSITIONS
    table = writesae.replacement(
        cell.model,
        dictionaries,
        cell.passages.tokens,
        cell.layer,
        cell.head,
        positions,
        cell.rng,
        progress=progress("replace"),
    )
    table["file"] = cell.passages.file[table["passage"]]
    cosine_min = cell.sae.cfg["cosine_min"] if args.cosine_min is None else args.cosine_min
    figures = dict(
        source=cell.sae.cfg["source"], scale="activation", cosine_min=cosine_min, sae=cell.sae.cfg
    )
    return figures | writesae.replacement_figures(table, cosine_min, cell.rng), table


#: The paper's rows (Qwen3.5-0.8B layers 1, 9, 17 pooled; Mamba-2-370M L24; RWKV-7-1.5B L12, there
# at : matched norm). Its "recovered" follows from its median KLs of each layer: 0.27 / 0.63 / 0.29;
# 0.40.
PAPER_REPLACE = {
    "gdn": dict(n_firings=4851, win_rate=0.924),
    "mamba2": dict(n_firings=2500, win_rate=0.881, recovered_pooled=0.40),
    "rwkv7": dict(n_firings=6591, win_rate=0.453),
}


def replace_rows(results: list[dict]) -> list[dict]:
    """Four rows for a cell: trained, the two nulls, the paper's."""
    (r,) = results
    null = r["untrained"]
    low, high = r["win_ci95_by_file"]
    interval = f" [{100 * low:.1f}, {100 * high:.1f}]"
    rows = [
        r | dict(name="{model} L{layer}H{head}".format(**r), interval=interval),
        null | dict(name="  untrained writes"),
        dict(name="  random direction", win_rate=r["projected_win_rate"]),
    ]
    if r["model"] in PAPER_REPLACE and (r["layer"], r["head"]) == (1, 0):
        rows.append(dict(name="  the paper") | PAPER_REPLACE[r["model"]])
    return [dict(interval="") | row for row in rows]


def replace_cells(results: list[dict]) -> str:
    """Mean ± deviation and range over cells."""
    lines = []
    for key in ("coverage", "win_rate", "recovered_pooled", "win_rate_all", "recovered_pooled_all"):
        ours = torch.tensor([r[key] for r in results], dtype=torch.float64)
        null = torch.tensor([r["untrained"][key] for r in results], dtype=torch.float64)
        lines.append(
            f"{key:20}  {ours.mean():.3f} ± {ours.std():.3f} [{ours.min():.3f}, {ours.max():.3f}]"
            f"   untrained {null.mean():.3f} ± {null.std():.3f}"
        )
    return f"\n{len(results)} cells: mean ± standard deviation [range]\n" + "\n".join(lines)


REPLACE_LEGEND = f"""\
Replacement: one write of one head is taken out of the state and something else put in its
place. effect: KL(unmodified ‖ edited) of the next-token distribution, summed over the write's
step and the ten after it. firing: the dominant atom explains {100 * COSINE_MIN ** 2:.0f} % of
the write's energy or more. n: firings.  cover: their share of all positions.  win: share of
firings where the effect is smaller than with nothing in the write's place [95 %].  recovered: 1
− Σ effect / Σ effect of nothing. all: the same over all positions.  untrained writes: as many
random training writes as atoms. random direction: at its own best coefficient; wins half the
time, so a win alone means little."""
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
    for axis, r, table in zip(axes, results, tables):
        delete = writesae.effect(table, "delete")
        for name, colour, label in (
            ("untrained", "tab:orange", "untrained writes"),
            ("atom", "tab:blue", "trained atoms"),
        ):
            here = writesae.fires(table, name, r["cosine_min"])
            axis.scatter(
                delete[here],
                writesae.effect(table, name)[here],
                s=3,
                alpha=0.35,
                linewidths=0,
                color=colour,
                label=f"{label}: {int(here.sum()):,}",
            )
        low, high = 1e-7, delete.max().item()
        axis.plot([low, high], [low, high], color="black", linewidth=0.8)
        axis.set(
            xscale="log",
            yscale="log",
            xlim=(low, high),
            ylim=(low / 100, high),
            xlabel="effect with nothing in the write's place (nats)",
            title="{model} L{layer}H{head}: {win_rate:.1%} below the line".format(**r),
        )
        axis.legend(markerscale=4, fontsize=8, loc="upper left")
    axes[0].set_ylabel("effect with the atom there (nats)")
    return figure


# --------------------------------------------------------------------------------------------------
# formula: what each factor of the logit-change formula is worth
# --------------------------------------------------------------------------------------------------
def formula(cell: Cell, args):
    """The ladder of one cell, in fp64 (but for a large model), so that what a small edit moves
    stands clear of rounding."""
    dtype = cell.model.unembedding.dtype
    if not is_large(cell.model):
        cell.model.double()
        cell.sae.double()
    cosine_min = cell.sae.cfg["cosine_min"] if args.cosine_min is None else args.cosine_min
    positions = POSITIONS[1::8] if args.quick else POSITIONS[::4]
    table = writesae.ladder(
        cell.model,
        cell.sae,
        cell.passages.tokens,
        cell.layer,
        cell.head,
        positions,
        cosine_min,
        progress=progress("formula"),
    )
    cell.model.to(dtype)
    cell.sae.float()
    n = len(table["index"])
    return dict(n=n * len(writesae.RANKS), n_firings=n, rungs=writesae.ladder_figures(table)), table


#: the paper's R²: median per atom, a scalar fitted per passage, atom and token; Mamba-2: unfitted
PAPER_FORMULA = {"gdn": 0.98, "mamba2": -0.07}


def formula_rows(results: list[dict]) -> list[dict]:
    """A row for the cell, one per rung, one for the paper."""
    (r,) = results
    rows = [dict(name="{model} L{layer}H{head}, {n_firings} firings".format(**r)), *r["rungs"]]
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
        y = table["measured_swap"].flatten()
        limit = y.abs().quantile(0.995).item()
        for name in ("three factors, fitted", "direct path", "full Jacobian"):
            i = names.index(name)
            axis.scatter(
                table["predicted_swap"][:, i].flatten(),
                y,
                s=2,
                alpha=0.3,
                linewidths=0,
                label=f"{name}: R² {r['rungs'][i]['r2']:.2f}",
            )
        axis.axline((0, 0), slope=1, color="black", linewidth=0.7)
        axis.set(
            xlim=(-limit, limit),
            ylim=(-limit, limit),
            xlabel="predicted (nats)",
            title="{model} L{layer}H{head}, {n_firings} firings".format(**r),
        )
        axis.legend(fontsize=7, markerscale=4)
    axes[0].set_ylabel("measured change of the logit (nats)")
    return figure


# --------------------------------------------------------------------------------------------------
# steer: edits of the memory after which a token appears
# --------------------------------------------------------------------------------------------------
PROMPT = 96  # tokens of a prompt
BUDGETS = [round(0.25 * 2 ** (i / 4), 2) for i in range(25)]  # 0.25 to 16 native writes
SIGN_TESTED = ("formula", "gated", "gradient")


def reach_cells(cell: Cell, reach: str) -> list[tuple[int, int]]:
    """The cells that are edited: one head, all heads of its layer, or all heads of all layers."""
    everywhere = [
        (layer, head)
        for layer in cell.model.recurrent_layers
        for head in range(cell.model.layers[layer].mixer.heads)
    ]
    if reach == "head":
        return [(cell.layer, cell.head)]
    return [c for c in everywhere if reach == "all" or c[0] == cell.layer]


def some_rows(table: Table, rows: Tensor) -> Table:
    """The rows of a table where `rows` is true."""
    return {name: x[rows.to(x.device)] for name, x in table.items()}


def by_stratum(edited: Table, native: Table, random: Table) -> list[dict]:
    """`steering_figures` of each stratum."""
    figures = []
    for j, name in enumerate(writesae.STRATA):
        tables = [some_rows(table, table["stratum"] == j) for table in (edited, native, random)]
        if len(tables[0]["target"]):
            figures.append(dict(name=name) | writesae.steering_figures(*tables))
    return figures


def steer(cell: Cell, args):
    """Edits of one size by each value side; with --smallest the least budget of memory by each key
    side; with --prompt one edit, shown."""
    if args.prompt is not None or args.target is not None:
        return show(cell, args)
    tokens, key = cell.passages.tokens[:, :PROMPT], args.key or "read"
    each = 1 if args.quick or args.smallest else 3  # targets per prompt and stratum
    pairs = writesae.draw_targets(cell.model, tokens, each, cell.rng)
    if len(pairs["stratum"].unique()) < len(writesae.STRATA):
        raise InputError(
            "no token of rank 100 to 1000 in and out of these prompts (the vocabulary "
            f"has {cell.model.vocab} tokens): take more --passages"
        )

    def edit(
        pairs: Table,
        value: str | None,
        key: str = key,
        size: float = args.magnitude,
        budget: bool = False,
        reach: str = args.reach,
        n: int = writesae.EDITED,
    ) -> Table:
        rng = torch.Generator().manual_seed(args.seed)  # the same draws for every edit
        return writesae.steer(
            cell.model, tokens, pairs, reach_cells(cell, reach), key, value, size, budget, rng, n
        )

    if args.smallest:
        seen = writesae.every_second(cell.passages.file).to(tokens.device)[pairs["prompt"]]
        search, unseen = some_rows(pairs, seen), some_rows(pairs, ~seen)
        keys = [args.key] if args.key else writesae.KEY_SIDES
        found = [least_budget(edit, search, unseen, key) for key in keys]
        return [r | dict(reach=args.reach) for r in found], pairs
    native, random, results = edit(pairs, None), edit(pairs, "random"), []
    for value in progress("steer")([args.value] if args.value else writesae.VALUE_SIDES):
        edited = edit(pairs, value)
        r = dict(
            value=value,
            key=key,
            reach=args.reach,
            magnitude=args.magnitude,
            budget=False,
            size=edited["size"].mean().item(),
            strata=by_stratum(edited, native, random),
        )
        if value in SIGN_TESTED:  # one head, the last position, the natural size
            one = edit(pairs, value, size=1.0, reach="head", n=1)
            r["sign_rate"] = (one["logit"] > native["logit"]).double().mean().item()
        results.append(r)
    return results, edited


def least_budget(edit: Callable, search: Table, unseen: Table, key: str) -> dict:
    """The least budget of all edits together, in native writes, after which every target on the
    search prompts persists, by bisection (as if every larger one passed too). Its figures are from
    the unseen prompts."""
    tried = {}

    def passes(budget: float) -> bool:
        edited = edit(search, "memory", key=key, size=budget, budget=True)
        tried[budget] = writesae.persists(edited).double().mean().item()
        return tried[budget] == 1

    i = bisect.bisect_left(BUDGETS, True, key=passes)
    budget = BUDGETS[min(i, len(BUDGETS) - 1)]
    edited, native, random = (
        edit(unseen, value, key=key, size=budget, budget=True)
        for value in ("memory", None, "random")
    )
    return dict(
        value="memory",
        key=key,
        magnitude=budget,
        budget=True,
        found=i < len(BUDGETS),
        size=edited["size"].mean().item(),
        n_search=len(search["target"]),
        search_rates={str(b): rate for b, rate in sorted(tried.items())},
        strata=by_stratum(edited, native, random),
    )


def show(cell: Cell, args):
    """One edit: what is said without it, with it, and with it and the first token forced back."""
    encode, decode = cell.tokenizer.encode, cell.tokenizer.decode
    target = encode(args.target or "")
    if not args.prompt or len(target) != 1:
        raise InputError(
            f"--target {args.target!r} is {len(target)} tokens for this model "
            f"({[decode([i]) for i in target]}): give a --prompt and one token"
        )
    tokens = torch.tensor([encode(args.prompt)], device=cell.model.device)
    pair = {
        name: torch.tensor([x], device=tokens.device)
        for name, x in dict(prompt=0, target=target[0], stratum=0).items()
    }
    key, value = args.key or "read", args.value or "memory"
    before, after = (
        writesae.steer(
            cell.model,
            tokens,
            pair,
            reach_cells(cell, args.reach),
            key,
            v,
            args.magnitude,
            generator=cell.rng,
        )
        for v in (None, value)
    )
    texts = {"no edit": before["said"], "edited": after["said"], "kept": after["kept"]}
    return (
        dict(
            prompt=args.prompt,
            target=args.target,
            value=value,
            key=key,
            reach=args.reach,
            magnitude=args.magnitude,
            size=after["size"].item(),
            texts={name: decode(ids[0].tolist()) for name, ids in texts.items()},
            p_target=after["log_p"][0].exp().tolist(),
        ),
        after,
    )


def steer_rows(results: list[dict]) -> list[dict]:
    """No edit, a random one, then a row per edit; of `show` a few lines instead."""
    first = results[0]
    if "texts" in first:
        print(
            "{model}: {value}, {key} key, reach {reach}, {magnitude:g}x; all states change by "
            "{size:.0%} of their norm; target {target!r}".format(**first)
        )
        for name, text in first["texts"].items():
            print(f"  {name:8} {text!r}")
        chances = " ".join(f"{p:.2f}" for p in first["p_target"])
        print(f"  p(target) at each step of kept: {chances}")
        return []

    def control(r: dict, kind: str) -> dict:
        strata = [
            dict(
                persists_rate=s[kind + "_persists_rate"],
                edited_rate=s[kind + "_rate"],
                edited_perplexity=s[kind + "_perplexity"],
            )
            for s in r["strata"]
        ]
        return dict(what=f"{r['model']}, {r['strata'][0]['n_pairs']} pairs: {kind}", strata=strata)

    rows = [control(first, "native")]
    for r in results:
        if r["budget"] or r is first:
            rows.append(control(r, "random"))
        size = "budget {magnitude:g}" if r["budget"] else "{magnitude:g}x"
        rows.append(r | dict(what=("  {value}, {key} key, " + size).format(**r)))
    return rows


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


def add_steering(p: Parser):
    """What `steer` alone takes."""
    p.add_argument("--key", choices=writesae.KEY_SIDES, help="key side (default read)")
    p.add_argument("--value", choices=writesae.VALUE_SIDES, help="only this value side")
    p.add_argument("--reach", default="all", choices=["head", "layer", "all"], help="edited heads")
    p.add_argument("--magnitude", type=finite, default=3.0, help="each edit, in native writes")
    p.add_argument(
        "--smallest",
        action="store_true",
        help="search the least budget after which targets persist (--passages 120)",
    )
    p.add_argument("--prompt", metavar="TEXT", help="show one edit of this text, with --target")
    p.add_argument("--target", metavar="TOKEN", help="the token that is to appear after --prompt")


# --------------------------------------------------------------------------------------------------
# erase: an atom taken out where it fires
# --------------------------------------------------------------------------------------------------
def erase(cell: Cell, args):
    """Erasing on one cell: figures of all firings and of each atom, and a row per firing."""
    if cell.sae.cfg["source"] != "write":
        raise InputError("erase takes an SAE on writes, this one codes states; leave --source out")
    cosine_min = cell.sae.cfg["cosine_min"] if args.cosine_min is None else args.cosine_min
    positions = range(POSITIONS.start, POSITIONS.stop, 4 if args.quick else 1)
    table = writesae.erasure(
        cell.model,
        cell.sae,
        cell.passages.tokens,
        cell.layer,
        cell.head,
        positions,
        cell.passages.file,
        cell.rng,
        cosine_min,
        5 if args.quick else 20,
        progress("erase"),
    )
    figures, atoms = writesae.erasure_figures(table, cell.rng), []
    for atom in table["index"].unique().tolist():
        part = some_rows(table, table["index"] == atom)
        token = part["promoted"][0].item()
        atoms.append(
            dict(atom=atom, token=token, text=cell.tokenizer.decode([token]))
            | writesae.erasure_figures(part, cell.rng)
        )
    return figures | dict(atoms=sorted(atoms, key=lambda a: -a["n_firings"])), table


def erase_rows(results: list[dict]) -> list[dict]:
    """A row for all firings, then one per atom."""
    (r,) = results
    rows = [r | dict(what="{model} L{layer}H{head}".format(**r))]
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


# --------------------------------------------------------------------------------------------------
# atoms: what they stand for
# --------------------------------------------------------------------------------------------------
def atoms(cell: Cell, args):
    """The most used atoms of a cell, each with its tokens and contexts, and the population's
    figures."""
    sae, tokens, passages = cell.sae, cell.passages.tokens, cell.passages
    table = writesae.codes(cell.model, sae, tokens, cell.layer, cell.head, progress("codes"))
    cosine_min = sae.cfg["cosine_min"]
    population = writesae.population_figures(table, cosine_min)
    usable = (table["position"] >= POSITIONS[0]) & (table["position"] <= POSITIONS[-1])
    fires = (table["a"] > 0) & (table["cosine"] >= cosine_min) & usable
    uses = torch.bincount(table["index"][fires], minlength=sae.n_atoms)
    chosen = (
        [args.atom]
        if args.atom is not None
        else uses.topk(4 if args.quick else 12).indices.tolist()
    )
    if args.atom is not None and not 0 <= args.atom < sae.n_atoms:
        raise InputError(f"--atom {args.atom}: this SAE has atoms 0 to {sae.n_atoms - 1}")
    described = []
    for atom in chosen:
        rows = (fires & (table["index"] == atom)).nonzero()[:, 0]
        if len(rows):
            described.append(describe(cell, table, rows) | dict(atom=atom))
    if not described:
        raise InputError("no atom fires in this text: take more --passages, or another --atom")
    bits = writesae.passage_test(
        cell.model,
        sae,
        tokens[: len(tokens) // 4 + 1],
        cell.layer,
        cell.head,
        range(POSITIONS[0], PASSAGE - 1),
        cosine_min,
        cell.rng,
        progress("passages"),
    )
    bits = {key: x.double().mean().item() for key, x in bits.items()}
    described[0] |= dict(population=population, passage_test=bits, n_passages=len(passages.tokens))
    return described, table


def describe(cell: Cell, table: Table, rows: Tensor) -> dict:
    """One atom, by the rows of `codes` where it fires: its figures, the tokens that lose most if it
    is taken out, and five contexts from different files."""
    spread = torch.linspace(0, len(rows) - 1, min(40, len(rows))).long()
    at = {name: x[rows[spread]] for name, x in table.items()}
    change = writesae.taken_out(
        cell.model, cell.sae, cell.passages.tokens, cell.layer, cell.head, at
    )
    promoted = change.mean(0).topk(5, largest=False)
    decode = cell.tokenizer.decode
    contexts, seen = [], set()
    for passage, position in zip(table["passage"][rows].tolist(), table["position"][rows].tolist()):
        file = int(cell.passages.file[passage])
        if file not in seen and len(contexts) < 5:
            seen.add(file)
            ids = cell.passages.tokens[passage].tolist()
            contexts.append(
                decode(ids[max(0, position - 12) : position])
                + "⟦"
                + decode([ids[position]])
                + "⟧"
                + decode(ids[position + 1 : position + 7])
            )
    counts = table["token"][rows].bincount()
    return dict(
        n_firings=len(rows),
        cosine=table["cosine"][rows].mean().item(),
        token=decode([counts.argmax().item()]),
        token_purity=(counts.max() / len(rows)).item(),
        promoted=[decode([token]) for token in promoted.indices.tolist()],
        promoted_nats=promoted.values.tolist(),
        contexts=contexts,
    )


def atoms_rows(results: list[dict]) -> list[dict]:
    """A row per atom, then its contexts; the population before them."""
    head = results[0]
    population, bits = head["population"], head["passage_test"]
    groups = population["groups"]
    print("""
{model} L{layer}H{head}: {n_firings:,} firings of {n_atoms:,} atoms in {n_passages} passages. Atoms
with five firings or more hold {often_share:.0%} of them; {token_purity:.0%} of an atom's are on
one token.
""".format(**head | population).strip())
    print(
        "cosine with the writes, two Gaussians: {0[0]} atoms at {1[0]:.2f} ± {2[0]:.2f}, "
        "{0[1]} at {1[1]:.2f} ± "
        "{2[1]:.2f}; ΔBIC {3:+.0f}".format(
            groups["n"], groups["mean"], groups["deviation"], groups["delta_bic"]
        )
    )
    print(
        "all firings of a passage at once ({firings:.0f} of them), bits per token: unmodified "
        "{bits_native:.3f}, their atoms {bits_atom:.3f}, deleted {bits_delete:.3f}, random writes "
        "{bits_random:.3f}".format(**bits)
    )
    rows = []
    for r in results:
        promoted = "  ".join(map(repr, r["promoted"]))
        rows.append(r | dict(promotes=promoted, on=repr(r["token"])))
        rows += [dict(promotes="    " + repr(context)) for context in r["contexts"]]
    return rows


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
        atom, token = table["index"][fires], table["token"][fires]
        pairs, n = torch.stack([atom, token]).unique(dim=1, return_counts=True)
        uses = torch.bincount(atom)
        most = torch.zeros(len(uses)).scatter_reduce_(0, pairs[0], n.float(), "amax")
        often = uses >= 5
        share = (most[often] / uses[often]).sort().values
        below = torch.arange(1, len(share) + 1) / len(share)
        axis.plot(share, below, color=colour, label=f"{model}: {len(share):,} atoms")
    axis.set(
        xlim=(0, 1.01),
        ylim=(0, 1.01),
        xlabel="share of an atom's firings on its most frequent token",
        ylabel="share of atoms below",
    )
    axis.legend()
    return figure


# --------------------------------------------------------------------------------------------------
# compare: dictionaries side by side, in the same branches
# --------------------------------------------------------------------------------------------------
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
    trained: bool
    seconds: float = 0.0


def compared_sae(cell: Cell, settings: dict, X: Factored, args, **how) -> Entry:
    """A dictionary of these settings, trained on X (gradients if `how` has them), with the time
    taken."""
    began, rng = time.time(), torch.Generator().manual_seed(settings["seed"])
    sae = new_sae(cell.model, cell.layer, cell.head, settings)
    if settings["metric"] == "read":
        sae.to_k.copy_(cell.sae.to_k)
        sae.to_v.copy_(cell.sae.to_v)
    if how:
        writesae.fit_gradient(sae, X, rng, progress=progress("train"), **how)
        sae.requires_grad_(False)
    else:
        fit(sae, X, rng, args.quick, sample=COMPARED_SAMPLE)
    return Entry(sae, True, time.time() - began)


def compare_entries(cell: Cell, X: Factored, args) -> dict[str, Entry]:
    """The dictionaries of one comparison, by name."""
    settings = dict(source="write") | SAE_DEFAULTS["write"] | dict(atoms=2048, seed=args.seed)
    k, v, entries = X.keys[:, 0], X.values[:, 0], {}

    def null(sae: WriteSAE, seed: int = 100) -> Entry:
        return Entry(writesae.untrained(sae, k, v, torch.Generator().manual_seed(seed)), False)

    if args.what == "sizes":
        for n in COMPARED["sizes"][:3] if args.quick else COMPARED["sizes"]:
            entries[f"{n}"] = compared_sae(cell, settings | dict(atoms=n), X, args)
            entries[f"{n} untrained"] = null(entries[f"{n}"].sae)
    elif args.what == "active":
        one = compared_sae(cell, settings, X, args)
        for active in COMPARED["active"]:
            several = as_pursuit(one.sae, active)
            entries[f"{active}"] = one._replace(sae=several)
            entries[f"{active} untrained"] = Entry(as_pursuit(null(one.sae).sae, active), False)
    elif args.what == "seeds":
        for seed in COMPARED["seeds"]:
            entries[f"seed {seed}"] = compared_sae(cell, settings | dict(seed=seed), X, args)
        for seed in (100, 101):
            entries[f"untrained {seed - 99}"] = null(entries["seed 0"].sae, seed)
    else:
        entries = variants(cell, settings, X, args)
        entries["untrained"] = null(entries["alternating"].sae)
    return entries


def as_pursuit(sae: WriteSAE, active: int) -> WriteSAE:
    """The same atoms, `active` of them chosen one after the other (matching pursuit)."""
    several = WriteSAE(**sae.cfg | dict(active=active, sparsity="pursuit")).to(sae.to_k.device)
    several.load_state_dict(sae.state_dict())
    return several.requires_grad_(False)


def variants(cell: Cell, settings: dict, X: Factored, args) -> dict[str, Entry]:
    """The paper's variants on writes (one active) and on states (32), one training budget for all:
    the same number of steps of the same batch. Then the paper's own recipe, on states."""
    budget = dict(steps=30, batch=128) if args.quick else dict(steps=800, batch=512)
    entries = {"alternating": compared_sae(cell, settings, X, args)}
    tokens = training_windows(
        cell.tokenizer, cell.training, 10 if args.quick else 300, CONTEXT, cell.model.device
    )
    (states,) = writesae.collect(cell.model, tokens, cell.layer, [cell.head], "state")
    on_states = settings | dict(source="state", metric="frobenius", active=32)
    for name, change in VARIANTS.items():
        entries[name] = compared_sae(cell, settings | change, X, args, **budget)
        entries[name + ", states"] = compared_sae(cell, on_states | change, states, args, **budget)
    recipe = on_states | dict(encoder="bilinear", centred=True)
    steps = 30 if args.quick else min(2000, 20 * len(states.keys) // 256)
    entry = compared_sae(
        cell,
        recipe,
        states,
        args,
        steps=steps,
        batch=256,
        lr=3e-4,
        k_aux=256,
        dead_after=100 * 256,
        resample_every=250,
    )
    entries["the paper's recipe"] = entry
    for name in ("the paper's recipe", "BilinearSAE, states"):
        sized = WriteSAE(**entries[name].sae.cfg | dict(scale="least-squares"))
        sized.load_state_dict(entries[name].sae.state_dict())
        entries[name + ", own size"] = entries[name]._replace(sae=sized.requires_grad_(False))
    return entries


def compare(cell: Cell, args):
    """Rows of one comparison, all from the same branches of the same positions."""
    n = 60 if args.quick else 600
    tokens = training_windows(cell.tokenizer, cell.training, n, CONTEXT, cell.model.device)
    (X,) = writesae.collect(
        cell.model, tokens, cell.layer, [cell.head], progress=progress("writes")
    )
    base = new_sae(cell.model, cell.layer, cell.head, sae_settings(args) | dict(atoms=1))
    writesae.set_metric(base, *cell_metric(cell, args.quick))
    cell = cell._replace(sae=base)
    entries = compare_entries(cell, X, args)
    whole = args.what == "active"
    table = writesae.replacement(
        cell.model,
        {name: entry.sae for name, entry in entries.items()},
        cell.passages.tokens,
        cell.layer,
        cell.head,
        POSITIONS[:: 8 if args.quick else 2],
        cell.rng,
        whole,
        progress("compare"),
    )
    table["file"] = cell.passages.file[table["passage"]]
    rows = [compared_row(args.what, name, entry, table, X) for name, entry in entries.items()]
    if args.what == "seeds":
        found_again(rows, [entry.sae for entry in entries.values()])
    return rows, table


def compared_row(what: str, name: str, entry: Entry, table: Table, X: Factored) -> dict:
    """One dictionary's figures, with the contract's keys."""
    sae, figures = entry.sae, writesae.dictionary_figures(table, name, COSINE_MIN)
    null, delete = writesae.effect(table, "projected"), writesae.effect(table, "delete")
    control = null.isfinite()
    sample = X.rows(slice(None, None, max(1, len(X.keys) // 4000)))
    fvu = math.nan
    if sae.cfg["source"] == "write":
        left = sample.minus(sae.decode(*sae.encode(sample)))
        left, whole = sae.see(left), sae.see(sample)
        fvu = (writesae.inner(left, left) / writesae.inner(whole, whole)).mean().item()
    used = len(table["index_" + name][table["a_" + name] > 0].unique())
    return dict(
        what=what,
        name=name,
        encoder=sae.cfg["encoder"],
        decoder=sae.cfg["decoder"],
        sparsity=sae.sparsity,
        source=sae.cfg["source"],
        n_atoms=sae.n_atoms,
        active=sae.active,
        trained=entry.trained,
        parameters=sum(p.numel() for p in sae.parameters()),
        fvu=fvu,
        dead=1 - used / min(sae.n_atoms, len(table["passage"])),
        **figures,
        projected_win_rate=(null < delete)[control].double().mean().item(),
        kl_all=writesae.effect(table, name).mean().item(),
        seconds=round(entry.seconds, 1),
    )


def found_again(rows: list[dict], saes: list[WriteSAE]):
    """Add to each row the share of its atoms that the next dictionary of its kind has too (cosine
    at least 0.9 in the SAE's coordinates)."""
    groups = [[i for i, row in enumerate(rows) if row["trained"] == kind] for kind in (True, False)]
    for group in groups:
        for i, j in zip(group, group[1:] + group[:1]):
            A = saes[i].atoms.at(torch.arange(saes[i].n_atoms))
            nearest = torch.cat(
                [
                    saes[j].atoms.products(A.rows(part)).amax(1)
                    for part in torch.arange(saes[i].n_atoms).split(512)
                ]
            )
            rows[i]["found_again"] = (nearest >= 0.9).double().mean().item()


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
    key = "active" if results[0]["what"] == "active" else "n_atoms"
    value = "whole_recovered_all" if key == "active" else "recovered_pooled_all"
    for colour, model in zip(COLOURS, dict.fromkeys(r["model"] for r in results)):
        for trained, line in ((True, "-"), (False, ":")):
            rows = [r for r in results if r["model"] == model and r["trained"] == trained]
            label = model if trained else model + ", untrained"
            for axis, what in zip(axes, (value, "coverage")):
                axis.plot(
                    [r[key] for r in rows],
                    [r[what] for r in rows],
                    line,
                    marker="o",
                    color=colour,
                    markersize=4,
                    label=label,
                )
    for axis, title in zip(axes, ("recovered, all positions", "coverage")):
        axis.set(xscale="log", xlabel="active atoms" if key == "active" else "atoms", title=title)
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


# --------------------------------------------------------------------------------------------------
# train: SAEs of cells
# --------------------------------------------------------------------------------------------------
def train(args) -> int:
    """Train the SAEs of the chosen cells and save each; those that are there already are left, so
    that a run that was stopped goes on where it was."""
    training, _ = choose_text(args)
    jobs = []
    for name in args.models:
        model = open_model(name, args)
        cells = chosen_cells(model, args)
        jobs += [
            (name, layer, [head for i, head in cells if i == layer])
            for layer in sorted({layer for layer, _ in cells})
        ]
    for name, layer, heads in shared_out(jobs):
        model = open_model(name, args)
        cell = Cell(model, layer, heads[0], models.load_tokenizer(model), None, training, None)
        paths = {head: args.sae or sae_file(model, layer, head, args) for head in heads}
        there = [head for head in heads if os.path.exists(paths[head]) and not args.force]
        for head in there:
            say(f"{paths[head]} exists and is left as it is; --force trains it again")
        if there and len(heads) == 1:
            raise InputError(
                f"{paths[heads[0]]} exists; --force writes over it, --sae FILE names another"
            )
        missing = [head for head in heads if head not in there]
        for head, sae in zip(missing, train_saes(cell, missing, args) if missing else []):
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


# --------------------------------------------------------------------------------------------------
# The command line
# --------------------------------------------------------------------------------------------------
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


def add_common(p: Parser):
    """What every command takes."""
    p.add_argument(
        "--model",
        help="gdn, mamba2, rwkv7 (default: all three), a folder, or a hub id such as "
        "Qwen/Qwen3.5-0.8B",
    )
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, ...")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument(
        "--quick", action="store_true", help="the same code on a small sample, in seconds"
    )
    p.add_argument(
        "--train-text",
        metavar="FILE|FOLDER",
        help="train on this text, not Python's own; of a "
        "folder one file in ten is held out for the test",
    )
    p.set_defaults(
        text=None,
        source="write",
        sae=None,
        saes=None,
        layer=None,
        head="0",
        dtype="fp32",
        steps=None,
        atoms=None,
        cosine_min=None,
        passages=None,
        json=None,
        records=None,
        plot=None,
        markdown=None,
    )


def add_cell(p: Parser, all_of_them: bool = True):
    """Which cell of the model."""
    also = ", or all" if all_of_them else ""
    p.add_argument(
        "--layer", help=f"a recurrent layer, from 0{also} (default: the second recurrent one)"
    )
    p.add_argument("--head", default="0", help=f"a head, from 0{also} (default 0)")
    p.add_argument(
        "--dtype",
        default="fp32",
        choices=["fp32", "bf16"],
        help="of the weights; recurrence and KL are fp32 always",
    )


def add_test(p: Parser):
    """What is tested, and where results go."""
    p.add_argument("--text", metavar="FILE|FOLDER", help="test on this text, not the held-out one")
    p.add_argument("--passages", type=positive, help="number of test passages or prompts")
    p.add_argument("--json", metavar="FILE", help="write the results there")
    p.add_argument("--records", metavar="FILE", help="write one JSON line per tested thing there")
    p.add_argument("--plot", metavar="FILE.png", help="draw the picture there")
    p.add_argument(
        "--markdown", metavar="FILE.md", help="write the table there, in its own section"
    )


def add_sae(p: Parser):
    """Which SAE."""
    p.add_argument("--sae", metavar="FILE", help="this SAE instead of the one beside the model")
    p.add_argument(
        "--saes", metavar="FOLDER", help="look for SAEs, and keep new ones, in this folder"
    )
    p.add_argument("--atoms", type=positive, help="an SAE of this many atoms")
    p.add_argument(
        "--source",
        default="write",
        choices=list(SAE_DEFAULTS),
        help="what the SAE codes (state: as in the paper)",
    )
    p.add_argument(
        "--cosine-min", type=finite, help=f"least cosine of a firing (default {COSINE_MIN})"
    )


def add_settings(p: Parser):
    """How an SAE is made; what is not said is the default of its source (SAE_DEFAULTS)."""
    p.add_argument("--active", type=positive, help="active atoms per input")
    p.add_argument("--encoder", choices=list(writesae.ENCODERS))
    p.add_argument("--decoder", choices=list(writesae.DECODERS))
    p.add_argument("--sparsity", choices=[s for s in writesae.SPARSITIES if s != "pursuit"])
    p.add_argument("--metric", choices=["read", "frobenius"], help="what near means")
    p.add_argument("--steps", type=positive, help="training steps")
    p.add_argument("--force", action="store_true", help="write over an SAE that is there")


def make_parser() -> Parser:
    """A subparser per command, each with only its own options."""
    parser = Parser(
        prog="run.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(
        dest="command", required=True, metavar="COMMAND", parser_class=Parser
    )

    def command(name: str, *groups, example: str = "") -> Parser:
        p = commands.add_parser(name, epilog=f"example: python run.py {name} {example}")
        for group in (add_common, *groups):
            group(p)
        return p

    command("replace", add_cell, add_test, add_sae, example="--model gdn --layer all --head all")
    command("formula", add_cell, add_test, add_sae, example="--model rwkv7 --quick")
    p = command(
        "steer", add_cell, add_test, example="--model gdn --prompt 'def f(x):' --target ' yield'"
    )
    add_steering(p)
    command("erase", add_cell, add_test, add_sae, example="--model mamba2")
    p = command("atoms", add_cell, add_test, add_sae, example="--model gdn --atom 656")
    p.add_argument("--atom", type=int, help="only this atom")
    p = command("compare", add_cell, add_test, example="--what sizes --plot sizes.png")
    p.add_argument("--what", choices=[*COMPARED, "variants"], default="sizes")
    p = command("bench", add_cell, example="--quick")
    p.add_argument("--json", metavar="FILE", help="write the results there")
    p.add_argument("--markdown", metavar="FILE.md", help="write the table there")
    p.add_argument("--full-size", action="store_true", help="also a random 752 M checkpoint")
    p = command("picture", example="--plot figures/method.png")
    p.add_argument(
        "--plot", metavar="FILE.png", default=os.path.join(HERE, "figures", "method.png")
    )
    command("train", add_cell, add_sae, add_settings, example="--model rwkv7 --layer 2 --head all")
    p = command("pretrain", example="--model mamba2 --out /tmp/models")
    p.add_argument("--tokens", type=positive, default=8_192_000, help="training tokens in all")
    p.add_argument(
        "--out", default=os.path.join(HERE, "checkpoints"), help="where the model's folder goes"
    )
    p.add_argument("--force", action="store_true", help="write over a model that is there")
    return parser


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line. Raises InputError for a wrong one."""
    args = make_parser().parse_args(argv)
    args.models = [args.model] if args.model else list(EMBEDDED)
    words = list(sys.argv[1:] if argv is None else argv)
    outputs = ("--json", "--plot", "--records", "--markdown")
    kept = [
        word
        for before, word in zip(["", *words], words)
        if word not in outputs and before not in outputs
    ]
    args.title = f"`python run.py {' '.join(kept)}`"  # of its section in a Markdown file
    for path in filter(None, (args.json, args.records, args.plot, args.markdown)):
        if not os.path.isdir(os.path.dirname(os.path.abspath(path))):
            raise InputError(f"{path}: cannot be written, its folder does not exist; make it first")
    if args.command == "pretrain" and not set(args.models) <= set(EMBEDDED):
        raise InputError(f"pretrain --model {args.model}: allowed are {', '.join(EMBEDDED)}")
    if args.command == "steer" and "all" in (args.layer, args.head):
        raise InputError("steer takes one cell; --reach layer and --reach all edit more than one")
    if args.command == "steer" and args.smallest and args.passages is None:
        args.passages = 24 if args.quick else 120
    experiment = EXPERIMENTS.get(args.command)
    if args.plot and experiment and experiment.draw is None:
        raise InputError(f"{args.command} draws no picture; leave --plot out")
    return args


COMMANDS = dict(bench=bench, picture=picture, train=train, pretrain=pretrain)


def main(argv: list[str] | None = None) -> int:
    """Run a command; 0, or 2 after one line on stderr, or 130 after Ctrl-C."""
    try:
        args = parse(argv)
        return COMMANDS.get(args.command, run_experiment)(args)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
