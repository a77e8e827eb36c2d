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
import functools
import hashlib
import json
import math
import os
import sys
import sysconfig
import tempfile
import time
from operator import itemgetter
from pathlib import Path
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
COSINE_MIN = 0.71  # a firing could explain half of the write's energy
CONTEXT = 512  # tokens of a training window
TRAINING_WINDOWS = dict(write=1500, state=800)  # of CONTEXT tokens
METRIC_PASSAGES = 128  # for the read metric, POSITIONS[::4] of each
NULL_PASSAGES = 600  # whose writes the untrained atoms are drawn from
SAE_DEFAULTS = {  # by source: the write-aligned SAE, and one on states as the paper's
    "write": dict(atoms=16384, active=1, encoder="tied", decoder="rank1", metric="read"),
    "state": dict(atoms=2048, active=32, encoder="bilinear", decoder="rank1", metric="frobenius"),
}


def say(line: str):
    """One line about what was decided or how far long work is, on stderr, past a progress bar."""
    tqdm.write(line, file=sys.stderr)


def progress(items):
    """A progress bar on stderr around any iterable; nothing where stderr is no terminal."""
    return tqdm(items, file=sys.stderr, leave=False, disable=None)


# ---- Text: what every Python installation carries, or the user's own -----------------------------
NOT_READ = """test tests site-packages dist-packages encodings idlelib lib2to3 turtledemo pydoc_data
__pycache__"""


def python_text() -> dict[str, str]:
    """The standard library's sources (without its tests, code tables and bundled programs) and the
    language reference: file name -> text; the reference's topics are named "topics/NAME"."""
    from pydoc_data.topics import topics

    root, files = sysconfig.get_paths()["stdlib"], {}
    for folder, folders, names in os.walk(root):
        kept = set(folders) - set(NOT_READ.split())
        folders[:] = sorted(f for f in kept if not f.startswith("config-"))
        for name in sorted(names):
            if name.endswith(".py") and not name.startswith("_sysconfigdata"):
                path = Path(folder, name)
                files[path.relative_to(root).as_posix()] = path.read_text("utf-8", "replace")
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
            name = os.path.basename(path) if file == path else os.path.relpath(file, path)
            files[name] = Path(file).read_text("utf-8")
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


def spread(n: int, most: int) -> Tensor:
    """At most so many of the numbers 0..n−1, evenly spread."""
    return torch.linspace(0, n - 1, min(most, n)).long()


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
        return torch.tensor(pieces, device=self.device)[spread(len(pieces), n)]


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
    tried, decode = spread(len(tokens), 10 * n).tolist(), corpus.tokenizer.decode
    own = [i for i in tried if not copied(decode(tokens[i].tolist()), lines)]
    few = f"the text gives {len(own)} passages of {T} tokens that are no copies of training text"
    require(len(own) >= n, f"{few}, {n} are needed: take a longer text or a smaller --passages")
    chosen = torch.tensor(own)[spread(len(own), n)]
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
    """More than 100 million parameters: then a quarter of the metric's sample, and of what --quick
    tests, and no fp64 for the formula."""
    return sum(p.numel() for p in model.parameters()) > 100_000_000


def cell_name(cell) -> str:
    """Such as "gdn L1H0"."""
    return f"{cell.model.name} L{cell.layer}H{cell.head}"


def default_layer(model: LanguageModel) -> int:
    """The second recurrent layer (or the only one), fixed before anything was measured."""
    return model.recurrent_layers[:2][-1]


def number(text: str, what: str) -> int:
    """A layer or head as a number. Raises InputError."""
    require(text.isdecimal(), f"{what} {text!r}: allowed are a number or all")
    return int(text)


def chosen_heads(model: LanguageModel, args) -> dict[int, list[int]]:
    """The heads that --layer and --head name, by layer."""
    layers, chosen = [default_layer(model)], {}
    if args.layer == "all":
        layers = model.recurrent_layers
    elif args.layer is not None:
        layers = [number(args.layer, "layer")]
    for layer in layers:
        heads = [0] if args.head == "all" else [number(args.head, "head")]
        model.check_cell(layer, heads[0])
        every = range(model.layers[layer].mixer.heads)
        chosen[layer] = list(every) if args.head == "all" else heads
    return chosen


def sae_settings(args) -> dict:
    """The defaults of the SAE's source, and what the command line says."""
    settings = dict(source=args.source) | SAE_DEFAULTS[args.source] | dict(seed=args.seed)
    for key in settings:
        if getattr(args, key) is not None:
            settings[key] = getattr(args, key)
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


def new_sae(cell: Cell, settings: dict) -> WriteSAE:
    """An SAE of these settings for one cell, before training."""
    model, mixer = cell.model, cell.model.layers[cell.layer].mixer
    cfg = settings | dict(architecture=model.architecture, model=os.path.basename(model.name))
    cfg |= dict(layer=cell.layer, head=cell.head, layout="key first", cosine_min=COSINE_MIN)
    return WriteSAE(cfg.pop("atoms"), mixer.K, mixer.V, **cfg).to(model.device)


def cell_metric(cell: Cell, corpus: Corpus, quick: bool) -> tuple[Tensor, Tensor]:
    """The read metric of a cell, from training text."""
    n = 8 if quick else METRIC_PASSAGES
    sample = corpus.windows(n // 4 if is_large(cell.model) else n, PASSAGE)
    return writesae.read_metric(cell._replace(tokens=sample, positions=POSITIONS[::4]))


def fit(sae: WriteSAE, X: Factored, rng, quick: bool, steps: int | None, sample: int = 150_000):
    """Train an SAE by the method that fits its settings; says which in its cfg."""
    settings = tuple(sae.cfg[key] for key in ("encoder", "decoder", "active", "source"))
    if settings == ("tied", "rank1", 1, "write"):
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
    """SAEs for several heads of the cell's layer, from one pass over training text."""
    began, settings, saes = time.time(), sae_settings(args), []
    if args.quick and args.atoms is None:
        settings["atoms"] = 512
    n = 60 if args.quick else min(TRAINING_WINDOWS[args.source], max(300, settings["atoms"] // 4))
    tokens = corpus.windows(n, CONTEXT)
    how = dict(source=args.source, progress=progress)
    written = writesae.collect(cell.model, tokens, cell.layer, heads, **how)
    for head, X in zip(heads, written):
        cell = cell._replace(head=head, rng=torch.Generator().manual_seed(settings["seed"]))
        sae = new_sae(cell, settings)
        if settings["metric"] == "read":
            writesae.set_metric(sae, *cell_metric(cell, corpus, args.quick))
        fit(sae, X, cell.rng, args.quick, args.steps)
        sample = writesae.draw(X, 2000, cell.rng)
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
    expected = dict(architecture=model.architecture, layer=cell.layer, head=cell.head)
    expected |= dict(K=mixer.K, V=mixer.V)
    if os.path.dirname(os.path.abspath(path)) != os.path.abspath(model.folder):
        expected["model"] = os.path.basename(model.name)
    if args.atoms is not None:
        expected["n_atoms"] = args.atoms
    if args.command != "replace":  # the one experiment that knows what to do with states
        expected["source"] = "write"
    for key, value in expected.items():
        differs = f"{path}: this SAE has {key} {sae.cfg.get(key)}, here it is {value}"
        advice = f"give an SAE of {cell_name(cell)}, or leave --sae out"
        require(sae.cfg.get(key) == value, f"{differs}; {advice}")


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
    above: Callable | None = None  # figures of a cell -> lines above its rows
    all_cells: Callable | None = None  # results of many cells -> lines about them together


class TablePrinter:
    """Rows under their legend and headings, printed as soon as they are there; columns are as wide
    as the first need."""

    def __init__(self, experiment: Experiment):
        self.experiment, self.columns, self.widths = experiment, experiment.columns, None

    def fields(self, row: dict) -> list[str]:
        """The texts of one row; "-" (or its own "missing") where it lacks what a format string
        names, or it is NaN."""
        texts, missing = [], row.get("missing", "-")
        for form in self.columns.values():
            try:
                text = form.format(**row)
            except (KeyError, TypeError, IndexError):
                text = missing
            texts.append(missing if "nan" in text else text)
        return texts

    def cell(self, results: list[dict]):
        """What there is to say of one cell."""
        rows = self.experiment.rows(results)
        if rows and self.widths is None:
            print(self.experiment.legend + "\n")
        above = self.experiment.above and self.experiment.above(results)
        if above:
            print(above)
        for row in rows:
            self.row(row)

    def row(self, row: dict):
        """One row, under the headings if it is the first; a column whose heading ends in a space
        is aligned left."""
        lines = [self.fields(row)]
        if self.widths is None:
            lines.insert(0, self.columns)
            self.widths = [max(map(len, column)) for column in zip(*lines)]
        for line in lines:
            aligned = []
            for text, width, heading in zip(line, self.widths, self.columns):
                aligned.append(text.ljust(width) if heading.endswith(" ") else text.rjust(width))
            print("  ".join(aligned).rstrip(), flush=True)

    def markdown(self, rows: list[dict]) -> str:
        """The whole table in Markdown."""
        lines = [self.columns, ["---"] * len(self.columns), *map(self.fields, rows)]
        safe = [[text.replace("|", "\\|") for text in line] for line in lines]
        return "".join("| " + " | ".join(line) + " |\n" for line in safe)


def about_cells(experiment: Experiment, cells: list[list[dict]]) -> str:
    """Lines about many cells together, where there are many."""
    many = experiment.all_cells is not None and len(cells) > len(EMBEDDED)
    return experiment.all_cells([r for results in cells for r in results]) if many else ""


def write_section(args, experiment: Experiment, cells: list[list[dict]]):
    """Write a table at the end of the file of --markdown, under the command, in place of its
    earlier section. Of many cells only the first row each stands there, and the lines about all."""
    page = Path(args.markdown)
    first, *sections = (page.read_text("utf-8") if page.exists() else "").split("\n## ")
    together = about_cells(experiment, cells)
    rows = [experiment.rows(results)[: 1 if together else None] for results in cells]
    above = [experiment.above(results) for results in cells if experiment.above]
    said = "\n\n".join(t.strip() for t in [experiment.legend, together, *above] if t)
    table = TablePrinter(experiment).markdown(sum(rows, []))
    section = f"{args.title}\n\n```\n{said}\n```\n\n{table}"
    titles = [text.splitlines()[0] for text in sections]
    if args.title in titles:
        sections[titles.index(args.title)] = section
    else:
        sections.append(section)
    write_text(args.markdown, "\n## ".join([first, *sections]))


def no_nan(x):
    """The same results with None for NaN (a rate of no firings), which JSON has no word for."""
    if isinstance(x, dict):
        return {key: no_nan(value) for key, value in x.items()}
    if isinstance(x, (list, tuple)):
        return [no_nan(value) for value in x]
    return None if isinstance(x, float) and not math.isfinite(x) else x


def json_lines(result: dict, table: Table) -> str:
    """One JSON line per row of a table, the cell's name in each."""
    cell = {key: result[key] for key in ("model", "layer", "head")}
    rows = zip(*[x.tolist() for x in table.values()])
    return "".join(json.dumps(no_nan(cell | dict(zip(table, row)))) + "\n" for row in rows)


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
        for layer, heads in chosen_heads(open_model(name, args), args).items():
            jobs += [(name, layer, head) for head in heads]
    for name, layer, head in shared_out(jobs):
        if opened != name:
            model, opened = open_model(name, args), name
            corpus = Corpus(models.load_tokenizer(model), training, model.device)
            few = args.quick and args.passages is None and is_large(model)
            tokens, file = tested_windows(corpus, tested, max(2, n // 4) if few else n, PASSAGE)
        rng = torch.Generator().manual_seed(args.seed)
        cell = Cell(model, layer, head, tokens, POSITIONS, rng, file=file, progress=progress)
        yield cell, corpus


def measure_cells(experiment: Experiment, args):
    """Yield for each cell its figures and its table."""
    for cell, corpus in open_cells(args, args.passages or experiment.passages[args.quick]):
        if experiment.needs_sae:
            cell = cell._replace(sae=find_sae(cell, corpus, args))
        text = f"{len(cell.tokens)} passages of {args.text or 'held-out text'}"
        text = text if args.prompt is None else "one prompt"
        say(f"{args.command} {cell_name(cell)}: {text}, {cell.tokens.device}, seed {args.seed}")
        began, name = time.time(), dict(model=cell.model.name, layer=cell.layer, head=cell.head)
        figures, table = experiment.measure(cell, corpus, args)
        results = [name | f for f in (figures if isinstance(figures, list) else [figures])]
        results[0].setdefault("seconds", round(time.time() - began, 1))
        yield results, table


def saved_cells(args):
    """Yield the same of what --json wrote earlier, without the tables. Raises InputError."""
    cells = {}
    with models.reading(args.results, "give a file that --json of this command wrote"):
        for r in json.loads(Path(args.results).read_text("utf-8")):
            cells.setdefault((r["model"], r["layer"], r["head"]), []).append(r)
        for results in cells.values():
            EXPERIMENTS[args.command].rows(results)  # raises here if they are another command's
            yield results, {}


def run_experiment(args) -> int:
    """Measure each cell, or read its results again, print it, then `finish`."""
    experiment = EXPERIMENTS[args.command]
    printer, shares = TablePrinter(experiment), []
    for share in saved_cells(args) if args.results else measure_cells(experiment, args):
        shares.append(share)
        if world() == 1:
            printer.cell(share[0])
    shares = gathered(shares)
    if shares:
        finish(experiment, printer, shares, args)
    return 0


def finish(experiment: Experiment, printer: TablePrinter, shares: list, args):
    """What comes after the last cell: lines over all of them, JSON, records, the picture."""
    cells, tables = zip(*shares)
    for results in cells if world() > 1 else []:
        printer.cell(results)
    print(about_cells(experiment, cells), end="")
    everything = [r for results in cells for r in results]
    if args.json:
        write_text(args.json, json.dumps(no_nan(everything), indent=1))
    if args.markdown:
        write_section(args, experiment, cells)
    if args.records:
        lines = [json_lines(results[0], table) for results, table in shares]
        write_text(args.records, "".join(lines))
    if args.plot:
        save_figure(experiment.draw(everything, tables), args.plot)


COLOURS = ("#0072B2", "#D55E00", "#009E73")  # safe for the colour-blind
DOTS = dict(s=3, alpha=0.35, linewidths=0)  # of a cloud of points


def panels(rows: int, columns: int, width: float = 4.2, height: float = 3.6):
    """A figure and its panels, by rows."""
    from matplotlib.figure import Figure

    figure = Figure((width * columns, height * rows), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def save_figure(figure, path: str, dpi: int = 110):
    """Write a figure as a PNG file, whole or not at all."""
    save_then_rename(functools.partial(figure.savefig, dpi=dpi, format="png"), path)


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
    table, cfg = writesae.replacement(cell, dictionaries), cell.sae.cfg
    figures = dict(source=cfg["source"], scale="activation", cosine_min=cfg["cosine_min"], sae=cfg)
    return figures | writesae.replacement_figures(table, cfg["cosine_min"], cell.rng), table


#: The paper's rows: Qwen3.5-0.8B layers 1, 9, 17 pooled; Mamba-2-370M L24; RWKV-7-1.5B L12.
PAPER_REPLACE = {
    "gdn": dict(n_firings=4851, win_rate=0.924),
    "mamba2": dict(n_firings=2500, win_rate=0.881),
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
    return "\n".join(lines) + "\n"


REPLACE_LEGEND = """\
Replacement: one write of one head is taken out of the state and something else put in its place.
effect: KL(unmodified ‖ edited) of the next-token distribution, summed over the write's step and the
ten after it.  firing: the dominant atom, at its best size, explains half of the write's energy
(squared norm) or more.  n: firings.  cover: their share of all positions.  win: share of firings
where the effect is smaller than with nothing in the write's place [95 % interval, redrawing whole
files].  all: over every position, firing or not.  recovered: 1 − Σ effect / Σ effect of nothing.
untrained writes: as many random training writes as atoms: what is won without learning.  random
direction: a random rank-1 matrix, at the size that brings it nearest to the write (every fourth
position): what is won by chance.  the paper: its own definitions and larger models, whose effects
are hundreds of times as large (RWKV-7 there with the atom brought to the write's norm)."""
REPLACE_COLUMNS = {
    "cell               ": "{name:19}",
    "     n": "{n_firings:,}",
    "cover": "{coverage:.1%}",
    "win [95 %]        ": "{win_rate:.1%}{interval}",
    "all: win": "{win_rate_all:.1%}",
    "all: recovered": "{recovered_pooled_all:.3f}",
}


def draw_replace(results: list[dict], tables: list[Table]):
    """A panel per cell: the effect with the atom against the effect with nothing, a point per
    firing (below the line: a win), of the trained and the untrained dictionary."""
    figure, (axes,) = panels(1, len(results))
    kinds = ("untrained", "untrained writes", COLOURS[1]), ("atom", "trained atoms", COLOURS[0])
    for axis, r, table in zip(axes, results, tables):
        delete = writesae.effect(table, "delete")
        for name, kind, colour in kinds:
            here = writesae.fires(table["a_" + name], table["cosine_" + name], r["cosine_min"])
            x, y = delete[here], writesae.effect(table, name)[here]
            label = f"{kind}: {mean(y < x):.1%} of {len(x):,} below the line"
            axis.scatter(x, y, color=colour, label=label, **DOTS)
        low, high = 1e-7, delete.max().item()
        axis.plot([low, high], [low, high], color="black", linewidth=0.8)
        axis.set(xscale="log", yscale="log", xlim=(low, high), ylim=(low / 100, high))
        axis.set_xlabel("effect with nothing in the write's place (nats)")
        axis.set_title(cell_title(r))
        axis.legend(markerscale=4, fontsize=7, loc="upper left")
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
slope: 1 if sizes are right.  sign: share of right signs.  order: to which the rung is exact.
the paper: median per atom, one scalar fitted per passage, atom and token (gdn), none (mamba2)."""
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
    """A column per cell, a row per rung: what it predicts of the swap against what is measured."""
    names = ("three factors, fitted", "direct path", "full Jacobian")
    figure, axes = panels(len(names), len(results), height=2.6)
    for row, name in zip(axes, names):
        row[0].set_ylabel(f"{name}\nmeasured (nats)")
        i = list(writesae.RUNGS).index(name)
        for axis, r, table in zip(row, results, tables):
            measured = table["measured_swap"].flatten()
            axis.scatter(table["predicted_swap"][:, i], measured, color=COLOURS[0], **DOTS)
            limit = measured.abs().quantile(0.995).item()
            axis.axline((0, 0), slope=1, color="black", linewidth=0.7)
            axis.set(xlim=(-limit, limit), ylim=(-limit, limit))
            axis.set_title(f"{cell_title(r)}: R² {r['rungs'][i]['r2']:.2f}", fontsize=10)
    for axis, r in zip(axes[-1], results):
        axis.set_xlabel(f"predicted (nats), {r['n_firings']} firings")
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


def steer_shown(results: list[dict]) -> str:
    """What `show` found, in lines."""
    r = results[0]
    if "texts" not in r:
        return ""
    lines = [SHOWN.format(**r)] + [f"  {name:8} {text!r}" for name, text in r["texts"].items()]
    chances = " ".join(f"{p:.2f}" for p in r["p_target"])
    return "\n".join([*lines, f"  p(target) at each step of kept: {chances}"])


def steer_rows(results: list[dict]) -> list[dict]:
    """No edit, a random one, then a row per edit; of `show` none."""
    first = results[0]
    if "texts" in first:
        return []

    def control(r: dict, kind: str) -> dict:
        strata = []
        for s in r["strata"]:
            rates = dict(persists_rate=s[kind + "_persists_rate"], edited_rate=s[kind + "_rate"])
            strata.append(rates | dict(edited_perplexity=s[kind + "_perplexity"]))
        return dict(what=f"{r['model']}, {r['strata'][0]['n_pairs']} pairs: {kind}", strata=strata)

    rows = [control(first, "native")]
    for r in results:
        if r["budget"] or r is first:
            rows.append(control(r, "random"))
        size = "budget {magnitude:g}" if r["budget"] else "{magnitude:g}x"
        size += "" if r.get("found", True) else " (not all)"
        rows.append(r | dict(what=("  {value}, {key} key, " + size).format(**r)))
    return rows


SHOWN = """\
{model}: {value}, {key} key, reach {reach}, {magnitude:g}x; all states change by {size:.0%} of their
norm; target {target!r}"""
STEER_LEGEND = """\
Steering: key valueᵀ is added to the states at a prompt's last three positions, then 20 tokens
are decoded. Targets: rank 100-1000 for the first new token; in the prompt, or absent from it.
Nx: each edit is N times as large as the write beside it.  budget: of all a prompt's edits
together, in such writes; the least after which all targets on the search prompts persist (not
all: the largest tried), its row is from the unseen prompts.  persists: the target is among
tokens 2 to 20 if the first is forced back to the unedited one: a memory.  appears: it is among
the 20 (the paper's measure).  lift: of log p(target) for the first new token, nats.  states:
norm of the change of all states at the prompt's end, over theirs.  ppl: perplexity of what is
said under the unedited model; forced: of saying the token at once, without an edit.  sign:
share of targets whose first logit rises by one head's edit, 1x, at the last position."""
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
    """A panel per model, persistence against size: of each value side, by how much all states move;
    of --smallest the share of search targets that persist, against the budget."""
    names = dict.fromkeys(r["model"] for r in results)
    figure, (axes,) = panels(1, len(names))
    for axis, model in zip(axes, names):
        for r in [r for r in results if r["model"] == model]:
            if r["budget"]:
                rates = {float(budget): rate for budget, rate in r["search_rates"].items()}
                axis.plot(rates.keys(), rates.values(), "o-", label=f"{r['key']} key")
                size, n = "budget of all edits, in native writes", r["n_search"]
            else:
                first = r["strata"][0]
                axis.plot(r["size"], first["persists_rate"], "o", label=r["value"])
                size, n = "change of all states, over their norm", first["n_pairs"]
        axis.set(xlabel=size, title=f"{model}, {n} pairs", ylim=(0, 1.05))
        axis.legend(fontsize=8, loc="lower right")
    axes[0].set_ylabel("targets that persist")
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
    atoms.sort(key=itemgetter("n_firings"), reverse=True)
    return figures | dict(atoms=atoms), table


def erase_rows(results: list[dict]) -> list[dict]:
    """A row for all firings, then one per atom, with an interval from ten files on."""
    (r,) = results
    rows = [r | dict(what=cell_title(r))]
    for a in r["atoms"]:
        interval = a["effect_ci95"] if a["n_files"] >= 10 else None
        rows.append(a | dict(what=f"  {a['atom']:5} {a['text'][:14]!r}", effect_ci95=interval))
    return rows


ERASE_LEGEND = """\
Erasing: a A is taken out of the state where the atom fires. Change of log p of the token that
it promotes, mean over the write's step and the ten after it, in nats, median of firings. Atoms
and tokens were chosen in other files: those that fire in most, tokens by the formula ("gated")
alone. random, other: a random direction, another atom, of the same norm taken out there.
elsewhere: the atom, where it does not fire.  effect: mean of atom minus random, paired [95 %,
redrawing whole files, ten or more]. The paper: one atom, 150 firings, median -0.116 nats."""
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
    """The most used atoms of a cell, each `describe`d, and the population's figures."""
    cell, n = cell._replace(positions=EVERYWHERE), cell.sae.n_atoms
    there = args.atom is None or 0 <= args.atom < n
    require(there, f"--atom {args.atom}: allowed are 0 to {n - 1}")
    table = writesae.codes(cell)
    at = writesae.firings(cell, table)
    uses = torch.bincount(at["index"], minlength=n)
    most = uses.topk(min(int((uses > 0).sum()), 4 if args.quick else 12)).indices.tolist()
    chosen = most if args.atom is None else [args.atom]
    require(uses[chosen[0]] > 0, f"atom {args.atom} never fires in this text: more --passages?")
    parts = [some_rows(at, at["index"] == atom) for atom in chosen]
    samples = [some_rows(part, spread(len(part["index"]), 40)) for part in parts]
    some = writesae.stack(samples)  # one pass over the text for all atoms
    A, sizes = writesae.atoms_at(cell, some), [len(sample["index"]) for sample in samples]
    R = writesae.random_direction(A, cell.rng)
    lost = writesae.taken_out(cell, some, A).split(sizes)
    control = writesae.taken_out(cell, some, writesae.as_large_as(A, R)).split(sizes)
    described = [describe(cell, corpus, *three) for three in zip(parts, lost, control)]
    population = writesae.population_figures(table, cell.sae.cfg["cosine_min"])
    quarter = cell.tokens[: len(cell.tokens) // 4 + 1]
    positions = range(EVERYWHERE.start, PASSAGE - 1)
    bits = writesae.passage_test(cell._replace(tokens=quarter, positions=positions))
    null = writesae.codes(cell._replace(sae=null_dictionary(cell, corpus)))
    untrained = writesae.population_figures(null, cell.sae.cfg["cosine_min"])
    described[0] |= dict(population=population, n_passages=len(cell.tokens), untrained=untrained)
    described[0]["passage_test"] = {key: mean(x) for key, x in bits.items()}
    return described, table


def describe(cell: Cell, corpus: Corpus, at: Table, lost: Tensor, control: Tensor) -> dict:
    """One atom, by its firings and what tokens lose if it, or a random direction, is taken out at
    some of them [n, vocab]: its figures, the tokens that lose most, and five contexts from
    different files."""
    promoted = lost.mean(0).topk(5, largest=False)
    decode, contexts = corpus.tokenizer.decode, {}
    for passage, t in zip(at["passage"].tolist(), at["position"].tolist()):
        ids = cell.tokens[passage].tolist()
        start, firing, end = ids[max(0, t - 12) : t], ids[t : t + 1], ids[t + 1 : t + 7]
        marked = f"{decode(start)}⟦{decode(firing)}⟧{decode(end)}"
        contexts.setdefault(int(cell.file[passage]), marked)  # the first of each file
    counts = at["token"].bincount()
    before = cell.tokens[at["passage"], at["position"] - 1].bincount()
    return dict(
        atom=int(at["index"][0]),
        n_firings=len(at["index"]),
        n_files=len(contexts),
        cosine=mean(at["cosine"]),
        token=decode([counts.argmax().item()]),
        token_purity=(counts.max() / counts.sum()).item(),
        after=decode([before.argmax().item()]),
        after_share=(before.max() / before.sum()).item(),
        promoted=[decode([token]) for token in promoted.indices.tolist()],
        promoted_nats=promoted.values.tolist(),
        random_nats=control.mean(0).min().item(),
        contexts=list(contexts.values())[:5],
    )


def atoms_population(results: list[dict]) -> str:
    """The lines about all atoms of a cell."""
    r = results[0]
    return POPULATION.format(**r | r["population"] | r["passage_test"])


def atoms_rows(results: list[dict]) -> list[dict]:
    """A row per atom, then its contexts."""
    rows = []
    for r in results:
        pairs = zip(r["promoted"], r["promoted_nats"])
        promotes = "  ".join(f"{token!r} {nats:+.3f}" for token, nats in pairs)
        rows.append(r | dict(promotes=promotes, on=repr(r["token"]), after=repr(r["after"])))
        rows += [dict(promotes="    " + repr(c), missing="") for c in r["contexts"]]
    return rows


POPULATION = """\
{model} L{layer}H{head}: {n_firings:,} firings of {n_atoms:,} atoms in {n_passages} passages
  (in brackets the same of untrained atoms: how writes recur, not what was learned)
  atoms with five firings or more: {often_share:.0%} ({untrained[often_share]:.0%}) of all firings;
  of such an atom's firings {token_purity:.0%} ({untrained[token_purity]:.0%}) are on its most \
frequent token, on average
  mean cosines with the writes they dominate (atoms with five or more), as two Gaussians:
  {groups[n][0]} atoms at {groups[mean][0]:.2f} ± {groups[deviation][0]:.2f}, {groups[n][1]} at \
{groups[mean][1]:.2f} ± {groups[deviation][1]:.2f};
  ΔBIC {groups[delta_bic]:+.0f} ({untrained[groups][delta_bic]:+.0f}; below 0: they fit better \
than one, as they do any skewed distribution)
  bits per token with all firings of a passage ({firings:.0f}) as they are {bits_native:.3f}, \
replaced by
  their atoms {bits_atom:.3f}, deleted {bits_delete:.3f}, replaced by random writes \
{bits_random:.3f}
"""
ATOMS_LEGEND = """\
Atoms: what they stand for, most used first (with --quick the order is chance). n: firings, files:
in how many files.  cosine: of the atom with the writes it stands for.  on: the token at which it
fires most, after: the one before it most often, and their shares of the firings.  Then the five
tokens of the whole vocabulary whose log-probability falls most if the atom is taken out of the
state (nats, mean over the write's step and the ten after it); random: how much the first of such a
list falls if a random direction of the same norm is taken out there. And up to five contexts from
different files, the firing token in ⟦ ⟧."""
ATOMS_COLUMNS = {
    "atom": "{atom}",
    "n": "{n_firings}",
    "files": "{n_files}",
    "cosine": "{cosine:.2f}",
    "on          ": "{on}",
    "share": "{token_purity:.0%}",
    "after       ": "{after}",
    "share ": "{after_share:.0%}",
    "random": "{random_nats:.3f}",
    "falls most if taken out, by nats ": "{promotes}",
}


def draw_atoms(results: list[dict], tables: list[Table]):
    """Of the atoms with five firings or more the share with at least x of their firings on one
    token (token lookups), a line per model."""
    figure, ((axis,),) = panels(1, 1, 6.5)
    for model, table, colour in zip(dict.fromkeys(r["model"] for r in results), tables, COLOURS):
        here = writesae.fires(table["a"], table["cosine"], COSINE_MIN)
        _, uses, share = writesae.token_shares(some_rows(table, here))
        share = share[uses >= 5].sort().values
        at_least = torch.arange(len(share), 0, -1) / len(share)
        label = f"{model}: {len(share):,} atoms, {mean(share == 1):.0%} on one token alone"
        axis.plot(share, at_least, color=colour, label=label)
    axis.set(xlim=(0, 1.01), ylim=(0, 1.02), ylabel="share of atoms with at least that")
    axis.set_xlabel("share of an atom's firings on its most frequent token")
    axis.legend(loc="lower left")
    return figure


# ---- compare: dictionaries side by side, in the same branches ------------------------------------
COMPARED_SAMPLE = 50_000  # writes a step of the alternating updates: a third of `train`'s
COMPARED = dict(sizes=(256, 1024, 2048, 4096, 16384), active=(1, 2, 4, 8, 32), seeds=(0, 1, 2))
VARIANTS = {  # the paper's five
    "FlatSAE": dict(encoder="dense", decoder="flat"),
    "MatrixSAE": dict(encoder="dense", decoder="rank1"),
    "BilinearSAE": dict(encoder="bilinear", decoder="rank1"),
    "BilinearSAE, tied": dict(encoder="tied", decoder="rank1"),
    "BilinearSAE, flat": dict(encoder="bilinear", decoder="flat"),
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
    sae = new_sae(cell, settings)
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
    budget = dict(steps=30, batch=128) if args.quick else dict(steps=400, batch=512)
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
    base = new_sae(cell, sae_settings(args) | dict(atoms=1))
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
    """Recovered share of all effects, and coverage, against the number of (active) atoms."""
    figure, (axes,) = panels(1, 2, 5)
    key, value, number = "n_atoms", "recovered_pooled_all", "atoms"
    if results[0]["what"] == "active":
        key, value, number = "active", "whole_recovered_all", "active atoms"
    for colour, model in zip(COLOURS, dict.fromkeys(r["model"] for r in results)):
        for trained, line in ((True, "o-"), (False, "o:")):
            rows = [r for r in results if r["model"] == model and r["trained"] == trained]
            for axis, what in zip(axes, (value, "coverage")):
                x, y = [r[key] for r in rows], [r[what] for r in rows]
                label = model if trained else model + ", untrained"
                axis.plot(x, y, line, color=colour, markersize=4, label=label)
    for axis, title in zip(axes, ("share of all effects recovered", "coverage")):
        axis.set(xscale="log", xlabel=number, ylabel=title)
    figure.legend(*axes[0].get_legend_handles_labels(), fontsize=8, loc="outside right upper")
    return figure


EXPERIMENTS = {
    "replace": Experiment(
        replace, REPLACE_COLUMNS, replace_rows, REPLACE_LEGEND, draw=draw_replace,
        all_cells=replace_cells,
    ),
    "formula": Experiment(
        formula, FORMULA_COLUMNS, formula_rows, FORMULA_LEGEND, (100, 8), draw=draw_formula
    ),
    "steer": Experiment(
        steer, STEER_COLUMNS, steer_rows, STEER_LEGEND, (40, 8), needs_sae=False, draw=draw_steer,
        above=steer_shown,
    ),
    "erase": Experiment(erase, ERASE_COLUMNS, erase_rows, ERASE_LEGEND, (1600, 240)),
    "atoms": Experiment(
        atoms, ATOMS_COLUMNS, atoms_rows, ATOMS_LEGEND, (400, 60), draw=draw_atoms,
        above=atoms_population,
    ),
    "compare": Experiment(
        compare, COMPARE_COLUMNS, list, COMPARE_LEGEND, (60, 12), needs_sae=False, draw=draw_compare
    ),
}


# ---- bench: ratios against other implementations, run for real in the same process ---------------
#: Parts of names, ours and theirs, replaced in this order.
RWKV_NAMES = """embedding emb, lm_head head, embed_norm blocks.0.ln0, norm1 ln1, norm2 ln2,
g_norm ln_x, norm. ln_out., layers blocks, mixer att, mlp ffn, r_proj receptance, k_proj key,
v_proj value, out_proj output, _lora.0.weight 1, _lora.2.weight 2, _lora.2.bias 0"""


class Peer:
    """The same model by transformers, RWKV-7 by its authors' package (one text at a time). Both
    change a cache in place. Raises ModuleNotFoundError."""

    def __init__(self, model: LanguageModel):
        self.kind, self.name = model.architecture, "transformers"
        if self.kind == "rwkv7":
            self.name, self.model = "rwkv", self.rwkv(model)
        else:
            import transformers

            transformers.logging.set_verbosity_error()
            auto, dtype = transformers.AutoModelForCausalLM, model.unembedding.dtype
            self.model = auto.from_pretrained(model.folder, dtype=dtype).to(model.device)

    def rwkv(self, model: LanguageModel):
        """RWKV-7 from our weights, as its authors' package names and lays them out."""
        os.environ.update(RWKV_V7_ON="1", RWKV_JIT_ON="0")  # read at the import
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
            from rwkv.model import RWKV

            weights, path = {}, os.path.join(folder, "weights")
            for name, x in model.state_dict().items():
                x = x.T if "_lora" in name and x.dim() == 2 else x
                for pair in RWKV_NAMES.split(","):
                    name = name.replace(*pair.split())
                weights[name] = x.clone()
            torch.save(weights, path + ".pth")
            return RWKV(path, f"{model.device.type} fp32")

    def read(self, tokens: Tensor, cache=None) -> tuple:
        """tokens [B, T] -> logits of the last one or, after a cache, of all; and the cache."""
        more, logits = cache is not None, []
        if self.kind == "rwkv7":
            logits, cache = self.model.forward(tokens[0].tolist(), cache, full_output=more)
            return logits.view(1, -1, logits.shape[-1]), cache
        mamba = self.kind == "mamba2"  # after a cache it takes single tokens only
        key = "cache_params" if mamba else "past_key_values"
        for piece in tokens.split(1 if mamba and more else tokens.shape[1], 1):
            out = self.model(piece, use_cache=True, logits_to_keep=int(not more), **{key: cache})
            cache = out[key]
            logits.append(out.logits)
        return torch.cat(logits, 1), cache

    def branch(self, layer: int, cache, change: Tensor, tokens: Tensor) -> Tensor:
        """Log-probabilities after tokens, read from a copy of the cache with change [B, K, V] added
        to the state of head 0. [B, T, vocab]"""
        cache = copy.deepcopy(cache)
        if self.kind == "rwkv7":
            cache[3 * layer + 1][0] += change[0].mT
        else:
            state = cache.layers[layer].recurrent_states[0]
            state[:, 0] += change.mT if self.kind == "mamba2" else change
        logits, _ = self.read(tokens, cache)
        return logits.log_softmax(-1)


def measured(args, name: str, unit: str, ours, theirs, done: tuple, peer: str, flops=0) -> dict:
    """A row: two functions with the same result (asserted), called in turn, medians; `done`: what a
    call of each gets done. unit MiB: peaks of memory, not times. of_floor: the time of `flops` at
    the rate of a matrix product in the same turn, as a share of our time."""
    result, expected = ours()[: done[1]], theirs()  # also warms up
    tolerance = 1e-3 if expected.dtype == torch.float32 else 0.2  # of the largest; bf16 rounds
    assert (result - expected).abs().max() <= tolerance * expected.abs().max(), name
    row = dict(name=name, unit=unit, peer_name=peer, of_floor=None)
    if unit == "MiB":
        mine, other = peak_memory(ours), peak_memory(theirs)
        return row | dict(ours=mine, peer=other, ratio=other / mine)
    A, times = torch.randn(1024, 1024).to(expected), []  # on its device, in its dtype
    for _ in range(3 if args.quick else 8):
        for function in (ours, theirs, functools.partial(torch.mm, A, A)):
            began = time.perf_counter()
            function()
            if A.is_cuda:
                torch.cuda.synchronize()
            times.append(time.perf_counter() - began)
    mine, other, product = torch.tensor(times[3:]).view(-1, 3).median(0).values.tolist()
    if flops:
        row["of_floor"] = flops / (2 * 1024**3) * product / mine
    mine, other = done[0] / mine, done[1] / other
    return row | dict(ours=mine, peer=other, ratio=mine / other)


def peak_memory(function: Callable) -> float:
    """The peak of one call beyond what was there before it, in MiB, on the CPU."""
    from torch.distributed._tools.mem_tracker import MemTracker

    with MemTracker() as tracker:
        function()
    return tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"] / 2**20


def weight_flops(model: LanguageModel, tokens: int, logits: int, first: int = 0) -> int:
    """Of the products with the weights alone: the layers from `first` on, and the output map."""
    matrices = [p.numel() for p in model.layers[first:].parameters() if p.dim() == 2]
    return 2 * tokens * sum(matrices) + 2 * logits * model.unembedding.numel()


def branches(model: LanguageModel, peer: Peer, tokens: Tensor, at_once: int) -> tuple:
    """P branches in a batch, the peer `at_once`: the last write of a cached prefix is deleted, then
    eleven tokens read. The peer's state is changed before token t, ours after it, where A_t has
    moved the write of t-1 (`propagate`). tokens [P, T]"""
    t, layer = tokens.shape[1] - HORIZONS, default_layer(model)
    points = writesae.points(Cell(model, layer, 0, tokens, [t - 1, t]))
    before, point = next(points), next(points)
    _, key = models.propagate(before.s.k[:, 0], before.s.times(0, 2))
    change, deleted = Factored(key, -before.s.v[:, 0]), -before.write().matrix()
    P = len(point.passage)  # fewer where the vocabulary is large
    n, prepared = min(P, max(at_once, 4)), []
    for rows in torch.arange(n).split(at_once):
        _, cache = peer.read(tokens[rows, :t])
        native = peer.branch(layer, cache, 0 * deleted[rows], tokens[rows, t:])
        prepared.append(((cache, deleted[rows], tokens[rows, t:]), native))

    def ours() -> Tensor:
        return writesae.kl_divergence(point.logp, point.branch(change))

    def theirs() -> Tensor:
        kls = []
        for prefix, native in prepared:
            edited = peer.branch(layer, *prefix)
            kls.append(writesae.kl_divergence(native, edited))
        return torch.cat(kls)

    name = f"{model.name}: {P} branches in a batch; the peer {at_once}"
    flops = weight_flops(model, P * HORIZONS, P * HORIZONS, layer)
    return name, "branches/s", ours, theirs, (P, n), peer.name, flops


def reading(model: LanguageModel, peer: Peer, pieces: list[Tensor], name: str) -> tuple:
    """A text read piece by piece, for the last logits. pieces [1, ·]"""

    def our_read(tokens: Tensor, cache):
        stream, cache = model.run(model.embed(tokens), cache)
        return model.unembed(stream.times(-1)), cache

    def read_all(read: Callable) -> Tensor:
        cache = None
        for tokens in pieces:
            logits, cache = read(tokens, cache)
        return logits

    ours, theirs = functools.partial(read_all, our_read), functools.partial(read_all, peer.read)
    T = sum(tokens.shape[1] for tokens in pieces)
    flops = weight_flops(model, T, 1) if len(pieces) == 1 else 0  # else bound by memory
    return f"{model.name}: {name}", "tokens/s", ours, theirs, (T, T), peer.name, flops


def own_rows(model: LanguageModel, tokens: Tensor):
    """Yield rows against ourselves. A text against its first eighth, per token (1: a token's cost
    does not grow; attention's does), in the layers below the first attention and in all. What all
    heads of a layer write, collected in one pass, against a pass per head. tokens [n, T]"""
    T, layer = tokens.shape[1], default_layer(model)
    H, n = model.layers[layer].mixer.heads, len(model.layers)

    def start(length: int, layers: int) -> Tensor:
        stream, _ = model.run(model.embed(tokens[:1, :length]), last=layers)
        return stream.x[:, : T // 8]

    def values(heads_of_passes: Tensor) -> Tensor:
        collected = []
        for heads in heads_of_passes.tolist():
            collected += writesae.collect(model, tokens[:4, :128], layer, heads)
        return torch.stack([X.values for X in collected])

    attention = [i for i in range(n) if not model.layers[i].recurrent]
    for layers in (*attention[:1], n):
        long, short = [functools.partial(start, length, layers) for length in (T, T // 8)]
        name = f"{model.name}: {T:,} tokens, {layers} layers"
        yield name, "tokens/s", long, short, (T, T // 8), f"itself at {T // 8:,}"
    heads = torch.arange(H)
    one, many = functools.partial(values, heads[None]), functools.partial(values, heads[:, None])
    yield f"{model.name}: writes of {H} heads", "heads/s", one, many, (H, H), "a pass per head"


def training(size: int, n_atoms: int):
    """Yield two rows: steps of an SAE on writes as factors, against the same steps on K x V
    matrices, in time and in the peak of memory."""
    k, v = torch.randn(2, n_atoms, size, generator=torch.Generator().manual_seed(0))
    X, sae = writesae.write_of(k, v), WriteSAE(n_atoms, size, size)

    @torch.enable_grad()
    def losses(inputs: Factored) -> Tensor:
        rng = torch.Generator().manual_seed(0)
        return torch.tensor(writesae.fit_gradient(sae, inputs, rng, steps=2, batch=1024))

    matrices = writesae.matrix_of(X.matrix())
    both = functools.partial(losses, X), functools.partial(losses, matrices)
    name = f"SAE step, {n_atoms:,} atoms of {size} x {size}"
    yield name, "steps/s", *both, (2, 2), "on matrices"
    yield name + ", memory", "MiB", *both, (2, 2), "on matrices"


def full_size(folder: str, device: torch.device) -> LanguageModel:
    """A random checkpoint of Qwen3.5-0.8B's shape, 752 million weights in bf16, in that folder."""
    shape = shape_of("gdn") | dict(hidden_size=1024, num_hidden_layers=24, intermediate_size=3584)
    shape |= dict(linear_num_key_heads=16, linear_num_value_heads=16, num_attention_heads=8)
    shape |= dict(linear_key_head_dim=128, linear_value_head_dim=128, head_dim=256)
    shape["rope_parameters"] |= dict(rope_theta=1e7, partial_rotary_factor=0.25)
    shape["vocab_size"] = 248_320
    model, rng = models.build(shape).requires_grad_(False), torch.Generator().manual_seed(0)
    initialise(model, rng)
    for p in model.parameters():
        if not p.any():  # as before training, so that states would have no effect
            p.copy_(0.02 * torch.randn(p.shape, generator=rng))
    models.save(model, shape, folder, torch.bfloat16)
    return models.load(folder, device, torch.bfloat16)


def heads_of_64(model: LanguageModel) -> LanguageModel:
    """RWKV-7's weights read as heads of 64, all that its authors' package takes: the same work."""
    config = models.read_json(os.path.join(model.folder, "config.json"))
    wide = models.build(config | dict(head_dim=64)).requires_grad_(False).to(model.device)
    for old, new in zip(model.parameters(), wide.parameters()):
        new.copy_(old.view(new.shape))
    return wide


def model_rows(model: LanguageModel, quick: bool):
    """Yield what `measured` takes for a model's rows; of a large model those of reading only."""
    name, large = os.path.basename(model.name), model.vocab > 100_000
    if model.architecture == "rwkv7":
        model = heads_of_64(model)
    model.name = name
    try:
        peer = Peer(model)
    except ModuleNotFoundError as error:
        say(f"{name}: no rows, since the package {error.name} is not installed")
        return
    P, lengths, longest = (32, (128, 512), 1024) if quick else (256, (512, 4096), 8192)
    rng = torch.Generator().manual_seed(0)
    tokens = torch.randint(model.vocab, (P, longest), generator=rng).to(model.device)
    for T in lengths[:1] if large else lengths:
        yield reading(model, peer, [tokens[:1, :T]], f"read {T:,} tokens")
    singles = tokens[:1, : 8 if large else 32].split(1, 1)
    yield reading(model, peer, singles, "token by token")
    if large:
        return
    for at_once in (1,) if peer.name == "rwkv" else (1, P):
        yield branches(model, peer, tokens[:, : 64 + HORIZONS], at_once)
    yield from own_rows(model, tokens)


def bench_rows(args):
    """Yield what `measured` takes for every row."""
    for name in args.models:
        yield from model_rows(open_model(name, args), args.quick)
    for size in (64,) if args.quick else (64, 128):
        yield from training(size, 256 if args.quick else 2048)
    if args.full_size:
        with tempfile.TemporaryDirectory() as folder:
            model = full_size(os.path.join(folder, "752M"), pick_device(args.device))
            yield from model_rows(model, args.quick)


BENCH_LEGEND = """\
Each row against a peer run for real in the same process, calls in turn, medians. ratio > 1: ours
is better. of floor: the time of the products with the weights alone, at the rate of a matrix
product measured in turn, as a share of our time."""
BENCH_COLUMNS = {
    "what                                        ": "{name}",
    "     ours": "{ours:,.1f}",
    "     peer": "{peer:,.1f}",
    "unit      ": "{unit}",
    "ratio": "{ratio:.2f}",
    "of floor": "{of_floor:.0%}",
    "peer is       ": "{peer_name}",
}
BENCH = Experiment(bench_rows, BENCH_COLUMNS, list, BENCH_LEGEND)


@torch.no_grad()
def bench(args) -> int:
    """Print every row as soon as it is measured."""
    say(f"bench: {torch.get_num_threads()} threads, {pick_device(args.device)}, seed 0")
    rows, printer = [], TablePrinter(BENCH)
    for what in bench_rows(args):
        rows.append(measured(args, *what))
        printer.cell(rows[-1:])
    if args.json:
        write_text(args.json, json.dumps(rows, indent=1))
    if args.markdown:
        write_section(args, BENCH, [rows])
    return 0


# ---- picture: the method in one drawing ----------------------------------------------------------
def picture(args) -> int:
    """Draw the method: a write, an atom, the swap, the reads, KL."""
    figure, ((axis,),) = panels(1, 1, 9, 3.1)
    axis.set(xlim=(0, 16), ylim=(0, 5.2))
    axis.axis("off")
    blue, orange, _ = COLOURS
    boxes = [
        (1.5, 4.1, "write\n$k\\,v^\\top$", orange),
        (6.1, 4.1, "state\n$S$", orange),
        (10.6, 4.1, "this and ten\nmore reads", orange),
        (1.5, 1.4, "atom\n$a\\,A_i$", blue),
        (6.1, 1.4, "edited state\n$S - k v^\\top + a\\,A_i$", blue),
        (10.6, 1.4, "the same\nreads", blue),
        (14.4, 2.75, "KL(native\n‖ edited)", "black"),
    ]
    patches = []
    for x, y, text, colour in boxes:
        style = dict(boxstyle="round,pad=0.5", facecolor="white", edgecolor=colour, linewidth=2)
        box = axis.text(x, y, text, ha="center", va="center", fontsize=13, bbox=style)
        patches.append(box.get_bbox_patch())
    for i, j in ((0, 1), (1, 2), (2, 6), (3, 4), (4, 5), (5, 6), (0, 3), (1, 4)):
        style = dict(arrowstyle="-|>", color="dimgrey", patchA=patches[i], patchB=patches[j])
        axis.annotate("", boxes[j][:2], boxes[i][:2], arrowprops=style)
    axis.text(1.7, 2.75, "coded by the\nSAE's best atom", fontsize=11, va="center")
    axis.text(6.3, 2.75, "one swapped\nfor the other", fontsize=11, va="center")
    controls = "controls instead of the atom: nothing, an untrained atom, a random direction"
    axis.text(0.3, 0.1, controls, fontsize=11, color=blue)
    save_figure(figure, args.plot, 130)
    return 0


# ---- train: SAEs of cells ------------------------------------------------------------------------
def train(args) -> int:
    """Train the SAEs of the chosen cells and save each; those that are there are left, so that a
    stopped run goes on where it was."""
    training, _ = choose_text(args)
    jobs = []
    for name in args.models:
        jobs += [(name, *chosen) for chosen in chosen_heads(open_model(name, args), args).items()]
    one = len(jobs) == 1 and len(jobs[0][2]) == 1
    advice = "name a --model, a --layer and a --head, or a folder for all by --saes"
    require(one or not args.sae, f"--sae {args.sae} is one file, for one SAE: {advice}")
    for name, layer, heads in shared_out(jobs):
        model = open_model(name, args)
        paths = {head: args.sae or sae_file(model, layer, head, args) for head in heads}
        missing = [head for head in heads if args.force or not os.path.exists(paths[head])]
        for head in sorted(set(heads) - set(missing)):
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


# ---- pretrain: the three embedded models ---------------------------------------------------------
BATCH = 8  # windows a step: with Muon, many small steps are the better use of a CPU's hours
SAVE_EVERY = 200  # steps: what a run that is stopped goes on from
PEAK_LR = 1.2e-2  # of both optimisers, after a short warm-up; then linearly to zero


def shape_of(name: str) -> dict:
    """An embedded model's config.json, less what its training added. Few heads of 32 x 32 and 0.9
    to 1.4 million parameters: two CPU cores can train it."""
    config = models.read_json(os.path.join(HERE, "checkpoints", name, "config.json"))
    return {key: x for key, x in config.items() if key not in ("pretraining", "dtype")}


def train_tokenizer(texts, vocab: int):
    """Byte-level BPE with vocab entries; entry 0 separates files."""
    from tokenizers import Tokenizer, decoders, models as kinds, pre_tokenizers, trainers

    tokenizer = Tokenizer(kinds.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    first = ["<|endoftext|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=first, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
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

    def step_sizes(bias: Tensor, low: float, high: float):  # softplus(bias) = Δ, log Δ uniform
        delta = uniform(len(bias), low, high).exp()
        bias.copy_(delta + torch.log(-torch.expm1(-delta)))

    normal(model.embedding.weight, 0.05)
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv1d):
            normal(module.weight, 0.3)
        elif isinstance(module, nn.Linear):
            back = name.endswith(("out_proj", "o_proj", "down_proj", "mlp.value"))
            normal(module.weight, 0.0 if back else module.in_features**-0.5)
        if isinstance(module, (nn.Conv1d, nn.Linear)) and module.bias is not None:
            module.bias.zero_()
    for module in model.modules():
        if isinstance(module, models.GatedDeltaNet):  # decays e^{−A Δ}, A 1 to 16, Δ 0.001 to 0.1
            module.A_log.copy_(uniform(module.heads, 1, 16).log())
            step_sizes(module.dt_bias, -6.9, -2.3)
        elif isinstance(module, models.Mamba2):
            # Δ scales the write too: at the paper's 0.001 to 0.1 the skip D x is so much larger
            # that a short training never uses the state. So Δ 0.1 to 1, and no skip.
            module.A_log.copy_(uniform(module.heads, math.log(0.1), math.log(2)))
            step_sizes(module.dt_bias, math.log(0.1), 0)
            module.D.zero_()
        elif isinstance(module, models.RWKV7):
            ramp, decay = torch.linspace(0, 1, module.x_r.numel()), module.w_lora[2].bias
            for c, power in zip("rwkvag", (0.2, 0.9, 0.7, 0.7, 0.9, 0.2)):
                getattr(module, f"x_{c}").copy_(1 - ramp**power)
            decay.copy_(-6 + 6.5 * torch.linspace(0, 1, decay.numel()))
        elif isinstance(module, models.ChannelMix):
            module.x_k.copy_(1 - torch.linspace(0, 1, module.x_k.numel()) ** 2)


def optimisers(model: LanguageModel) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers, AdamW for embedding, head and all small tensors."""
    matrices, others = [], []
    for name, p in model.named_parameters():
        inside = name.startswith("layers") and p.dim() == 2 and min(p.shape) >= 32
        (matrices if inside else others).append(p)
    muon = torch.optim.Muon(matrices, weight_decay=0.05, adjust_lr_fn="match_rms_adamw")
    return [muon, torch.optim.AdamW(others, weight_decay=0.0, betas=(0.9, 0.95))]


def training_batch(tokens: Tensor, seed: int, step: int) -> Tensor:
    """The step-th batch [BATCH, CONTEXT + 1]: each epoch cuts the text anew and shuffles."""
    per_epoch = (len(tokens) - 2 * CONTEXT) // CONTEXT // BATCH
    epoch, i = divmod(step, per_epoch)
    generator = torch.Generator().manual_seed(seed * 1000 + epoch)
    offset = torch.randint(CONTEXT, (1,), generator=generator)
    order = torch.randperm(per_epoch * BATCH, generator=generator)
    starts = offset + order[i * BATCH : (i + 1) * BATCH] * CONTEXT
    return tokens[starts[:, None] + torch.arange(CONTEXT + 1)]


@torch.inference_mode()
def bits_per_byte(model: LanguageModel, tokens: Tensor, bytes_per_token: float) -> float:
    """Held-out cross-entropy in bits per byte of text (lower is better): windows of CONTEXT tokens
    that move by half a window, each token scored once, with half a window or more before it.
    tokens [N]"""
    half, nats = CONTEXT // 2, []
    starts = torch.arange(0, len(tokens) - CONTEXT - 1, half)
    for part in starts.split(16):
        x = tokens[part[:, None] + torch.arange(CONTEXT + 1)].to(model.device)
        logits, _ = model(x[:, :-1])
        scored = logits[:, half:].float().mT
        nats.append(F.cross_entropy(scored, x[:, half + 1 :], reduction="none").cpu())
    return torch.cat(nats).mean().item() / math.log(2) / bytes_per_token


def train_step(parts: list, x: Tensor, step: int, steps: int) -> float:
    """One of `steps` steps of parts (the model and its optimisers) on tokens x [BATCH, CONTEXT +
    1]; the loss in nats per token."""
    model, *both = parts
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


def pretrain_one(name: str, folder: str, args):
    """One model. Interrupted, it goes on from its last save as if it had never stopped."""
    (training, tested), shape = choose_text(args), shape_of(name)
    tokenizer = train_tokenizer(training.values(), shape["vocab_size"])
    tokens, unseen = encode_files(tokenizer, training), encode_files(tokenizer, tested)
    size = sum(len(text.encode()) for text in tested.values()) / len(unseen)  # bytes per token
    model = models.build(shape).to(pick_device(args.device))
    initialise(model, torch.Generator().manual_seed(args.seed))
    parts, few = [model, *optimisers(model)], unseen[:20_000]
    steps, done = max(1, (50_000 if args.quick else args.tokens) // (CONTEXT * BATCH)), 0
    say(f"pretrain {name}: {steps:,} steps of {BATCH} x {CONTEXT} of {len(tokens):,} tokens,")
    say(f"{len(unseen):,} held out ({size:.2f} bytes each), {model.device}, seed {args.seed}")
    path = os.path.join(folder, f"resume-{steps}-{args.seed}.pt")
    if os.path.exists(path):
        done, saved = torch.load(path, weights_only=True, map_location=model.device)
        for part, state in zip(parts, saved):
            part.load_state_dict(state)
        say(f"going on from step {done}")
    for step in progress(range(done, steps)):
        x = training_batch(tokens, args.seed, step).to(model.device)
        loss, done = train_step(parts, x, step, steps), step + 1
        if done % SAVE_EVERY == 0 or done == steps:
            bits = bits_per_byte(model, few, size)
            say(f"step {done:5d}  train {loss:.3f} nats/token  held-out {bits:.3f} bits/byte")
            states = [part.state_dict() for part in parts]
            save_then_rename(functools.partial(torch.save, (done, states)), path)
    bits = bits_per_byte(model, few if args.quick else unseen, size)
    how = dict(steps=steps, tokens=steps * CONTEXT * BATCH, held_out_bits_per_byte=round(bits, 4))
    models.save(model, shape | dict(pretraining=how), folder)
    save_then_rename(tokenizer.save, os.path.join(folder, "tokenizer.json"))
    os.remove(path)
    print(f"{name}: held-out {bits:.3f} bits per byte, saved in {folder}")


def pretrain(args) -> int:
    """Train the embedded models from nothing, each into args.out/NAME in the hub's layout. Raises
    InputError where a model is already, unless --force."""
    for name in args.models:
        folder = os.path.join(args.out, name)
        if os.path.exists(os.path.join(folder, "model.safetensors")) and not args.force:
            advice = "--force writes over it, --out FOLDER names another place"
            raise InputError(f"{folder} holds a model; {advice}")
        models.make_folder(folder)
        pretrain_one(name, folder, args)
    return 0


# ---- The command line ----------------------------------------------------------------------------
class Parser(argparse.ArgumentParser):
    """argparse, with errors as one line."""

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
    "passages": dict(type=positive, help="how many test passages or prompts"),
    "json": dict(metavar="FILE", help="write the results there"),
    "records": dict(metavar="FILE", help="write one JSON line per tested thing there"),
    "plot": dict(metavar="FILE.png", help="draw the picture there"),
    "results": dict(metavar="FILE.json", help="print these results of --json, measure nothing"),
    "markdown": dict(metavar="FILE.md", help="write the table there, in its own section"),
    "sae": dict(metavar="FILE", help="this SAE instead of the one beside the model"),
    "saes": dict(
        metavar="FOLDER|HUB_ID", help="look for SAEs, and keep new ones, there, not by the model"
    ),
    "atoms": dict(type=positive, help="an SAE of this many atoms (default 16384; of states 2048)"),
    "source": dict(
        default="write", choices=list(SAE_DEFAULTS), help="what is coded (state: as in the paper)"
    ),
    "cosine-min": dict(
        type=finite, help=f"least cosine of a firing (default {COSINE_MIN}: half the energy)"
    ),
    "active": dict(type=positive, help="active atoms per input"),
    "encoder": dict(choices=list(writesae.ENCODERS)),
    "decoder": dict(choices=list(writesae.DECODERS)),
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
TEST = CELL + " text passages json records plot markdown results"
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
    "atoms": (run_experiment, TEST + SAE + " atom", "--model gdn --atom 11282"),
    "compare": (run_experiment, TEST + " what", "--what sizes --plot sizes.png"),
    "bench": (bench, COMMON + " dtype json markdown full-size", "--quick"),
    "picture": (picture, "plot", "--plot figures/method.png"),
    "train": (
        train,
        CELL + SAE + " source active encoder decoder metric steps force",
        "--model rwkv7 --layer 2 --head all",
    ),
    "pretrain": (pretrain, COMMON + " tokens out force", "--model mamba2 --out models"),
}


def make_parser() -> Parser:
    """A subparser per command, each with only its own options; the others have their defaults."""
    raw, whole = argparse.RawDescriptionHelpFormatter, dict(allow_abbrev=False)
    parser = Parser(prog="run.py", description=__doc__, formatter_class=raw, **whole)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (_, options, example) in COMMANDS.items():
        p = commands.add_parser(name, epilog=f"example: python run.py {name} {example}", **whole)
        for option, settings in OPTIONS.items():
            if option == "passages" and name in EXPERIMENTS:
                many, few = EXPERIMENTS[name].passages
                said = f"{settings['help']} (default {many}; with --quick {few})"
                settings = settings | dict(help=said)
            if option in options.split():
                p.add_argument("--" + option, **settings)
            else:
                p.set_defaults(**{option.replace("-", "_"): settings.get("default")})
    return parser


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line. Raises InputError for a wrong one."""
    args = make_parser().parse_args(argv)
    args.models = [args.model] if args.model else list(EMBEDDED)
    outputs = ("--json", "--plot", "--records", "--markdown", "--results")
    kept = []
    for before, word in zip(["", *argv], argv):
        if before not in outputs and word.split("=")[0] not in outputs:
            kept.append(word)
    args.title = f"`python run.py {' '.join(kept)}`"  # of its section in a Markdown file
    written = [args.json, args.records, args.plot, args.markdown]
    for path in filter(None, [*written, args.sae if args.command == "train" else None]):
        there = os.access(os.path.dirname(os.path.abspath(path)), os.W_OK)
        advice = "its folder does not exist, or not for you; make it first"
        require(there, f"{path}: cannot be written, {advice}")
    if args.command == "pretrain":
        known = set(args.models) <= set(EMBEDDED)
        require(known, f"pretrain --model {args.model}: allowed are {', '.join(EMBEDDED)}")
    if args.command == "steer":
        one = "all" not in (args.layer, args.head)
        require(one, "steer takes one cell; --reach layer and --reach all edit more than one")
        if args.smallest and args.passages is None:
            args.passages = 24 if args.quick else 120
    needs = args.records or (args.plot and args.command not in ("compare", "steer"))
    again = "these results hold no point per firing: measure again for --records or this --plot"
    require(not (args.results and needs), again)
    drawn = args.command not in EXPERIMENTS or EXPERIMENTS[args.command].draw
    require(drawn or not args.plot, f"{args.command} draws no picture; leave --plot out")
    require(args.plot or args.command != "picture", "picture: give --plot FILE.png")
    return args


def main(argv: list[str]) -> int:
    """Run a command; 0, or 2 after one line on stderr, or 130 after Ctrl-C, or 1 where whatever
    reads our stdout has gone (as after `| head`)."""
    try:
        args = parse(argv)
        return COMMANDS[args.command][0](args)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:
        sys.stdout = open(os.devnull, "w")  # so that no more is written there at the exit
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
