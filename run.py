"""The command line: python run.py COMMAND [options]; python run.py COMMAND --help.

    replace     put a learned atom where a real write was, beside everything that it has to beat
    compare     dictionaries side by side: sizes, several atoms a write, other kinds
    atoms       what single atoms stand for: their tokens, their contexts, what they promote
    formula     predict how an edit moves the logits, from three factors to the exact second order
    steer       edit the memory so that a token is said later on, beside an edit of the input
    train       learn dictionaries and keep them: --head all --sae FOLDER
    assignment  make a folder of exercises: functions emptied, with the tests that grade them

Results go to stdout, decisions and progress to stderr. A wrong input ends in one line on stderr and
exit status 2. Order of this file: knobs - text - cells - the driver of all experiments - the
experiments - train, assignment - the command line.
"""

from __future__ import annotations

import argparse
import ast
import datetime
import functools
import hashlib
import inspect
import json
import math
import os
import sys
import sysconfig
import tempfile
import time
from pathlib import Path
from typing import Callable, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import models
import writesae
from models import InputError, LanguageModel, at_least_fp32, require, whole_file
from writesae import LATER, WriteSAE, bootstrap

HERE = os.path.dirname(os.path.abspath(__file__))
EMBEDDED = ("gdn", "mamba2", "rwkv7")

# ---- 1. Knobs ----
PASSAGE = 128  # tokens of a tested passage
EVERYWHERE = range(32, PASSAGE - LATER + 1)  # some text before, ten tokens after
POSITIONS = EVERYWHERE[::6]  # tested in each passage: 15
CONTEXT = 512  # tokens of a training window
WINDOWS = 200  # of them, whose writes dictionaries are learned from; of a large model 50
METRIC_PASSAGES = 64  # for the read metric, at EVERYWHERE[::12]; of a large model 8
ATOMS = 2048  # the paper's number
LARGE = 100_000_000  # parameters from which a model is large


def say(line: str):
    """Print one line about what was decided or how far long work is, on stderr."""
    tqdm.write(line, file=sys.stderr)


def progress(items):
    """Put a progress bar around an iterable, on stderr; none where stderr is no terminal."""
    return tqdm(items, file=sys.stderr, leave=False, disable=None)


writesae.progress = progress


# ---- 2. Text ----
# New here: what every Python installation carries, or the user's own; split by file; as tokens.
NOT_READ = "test tests site-packages dist-packages encodings idlelib lib2to3 turtledemo pydoc_data"
MOST_BYTES = 10**8  # of text in a file or a folder


def python_text() -> dict[str, str]:
    """Read the standard library's sources (without its tests, code tables, bundled programs) and
    the language reference: file name -> text; the reference's topics are named "topics/NAME"."""
    from pydoc_data.topics import topics

    root, files = sysconfig.get_paths()["stdlib"], {}
    for folder, folders, names in os.walk(root):
        kept = set(folders) - set(NOT_READ.split())
        folders[:] = sorted(f for f in kept if not f.startswith("config-"))
        for name in sorted(names):
            path = Path(folder, name)
            if name.endswith(".py") and path.is_file() and not name.startswith("_sysconfigdata"):
                files[path.relative_to(root).as_posix()] = path.read_text("utf-8", "replace")
    return files | {f"topics/{name}": text for name, text in sorted(topics.items())}


def read_files(path: str) -> dict[str, str]:
    """Read a text file, or a folder's but for hidden ones (.git): name -> text, by name. What is no
    text or too much is left out, and one line says so. Raises InputError if nothing is left."""
    paths = {os.path.basename(path): path}
    if os.path.isdir(path):
        walked = [os.path.join(folder, x) for folder, _, names in os.walk(path) for x in names]
        paths = {os.path.relpath(file, path): file for file in sorted(walked)}
        paths = {name: file for name, file in paths.items() if "/." not in f"/{name}"}
    advice = f"give UTF-8 text, {MOST_BYTES // 10**6} MB at most, as a file or a folder"
    files, total, left_out = {}, 0, []
    for name, file in paths.items():
        try:
            require(os.path.isfile(file), f"{file}: is missing, or no regular file; {advice}")
            with models.as_input_error(file, advice):
                size = os.path.getsize(file)
                require(total + size <= MOST_BYTES, f"{file}: makes the text too large; {advice}")
                text = Path(file).read_text("utf-8-sig")  # some editors begin a file with a mark
            require("\0" not in text, f"{file}: is binary; {advice}")
            files[name], total = text, total + size
        except InputError as error:
            left_out.append(str(error))
    require(files, left_out[0] if left_out else f"{path}: holds no file; {advice}")
    if left_out:
        say(f"{len(left_out)} files left out, such as {left_out[0]}")
    return files


def text_hash(files: dict[str, str]) -> str:
    """Give 12 digits that stand for names and contents: a hash of them."""
    whole = "\0".join(f"{name}\0{text}" for name, text in files.items())
    return hashlib.sha256(whole.encode("utf-8", "surrogateescape")).hexdigest()[:12]


def held_out(name: str) -> bool:
    """Say whether a file is kept from all training: by the hash of its name, one in ten is."""
    return hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()[0] < 26


def choose_text(args) -> tuple[dict[str, str], dict[str, str]]:
    """Choose training files and tested files by --train-text and --text; where they are silent,
    Python's own, and of one text for both what is held out. Raises InputError if one is empty."""
    files = python_text() if args.train_text is None else read_files(args.train_text)
    training = {name: text for name, text in files.items() if not held_out(name)}
    tested = {name: text for name, text in files.items() if held_out(name)}
    if args.text is not None:
        return training if args.train_text is None else files, read_files(args.text)
    require(training and tested, f"{args.train_text or 'Python'}: {len(tested)} of {len(files)} "
            "files are held out (one in ten is, by its name's hash); give --text for the test")
    return training, tested


def windows(tokenizer, files: dict[str, str], n: int, T: int, device="cpu") -> Tensor:
    """Take n windows [n, T] that begin evenly spread over the text, without encoding all of it. The
    text is taken as a ring, so that none is left out for beginning near the end."""
    text = "\n".join(files.values())
    ring, rows = f"{text}\n{text}", []
    for i in range(n):
        start, size = i * len(text) // n, min(4 * T, len(text))
        ids = tokenizer.encode(ring[start : start + size])
        while len(ids) <= T and size < len(text):  # one more, since the last may have been cut
            size = min(2 * size, len(text))
            ids = tokenizer.encode(ring[start : start + size])
        require(len(ids) >= T, f"the training text has {len(ids)} tokens, a window needs {T}: give "
                "a longer --train-text")
        rows.append(ids[:T])
    return torch.tensor(rows, device=device)


def spread(n: int, most: int) -> Tensor:
    """Take at most so many of the numbers 0..n−1, evenly spread."""
    return torch.linspace(0, n - 1, min(most, n)).long()


def copied(passage: str, lines: set[str], everything: str) -> bool:
    """Say whether a passage stands in training text: each of its whole lines does, in any order, or
    where those are less than half of it, the passage as it is."""
    whole = passage.splitlines()[1:-1]
    if 2 * len("".join(whole)) >= len(passage):
        return all(line in lines for line in whole)
    return passage.strip("\ufffd") in everything


def tested_windows(tokenizer, training, tested, n: int, T: int, device="cpu"):
    """Take n windows of T tokens, evenly spread over the tested files, each inside one file and no
    copy of training text: tokens [n, T], the file of each [n]. Raises InputError if too few."""
    everything = "\n".join(training.values())
    lines, tokens, file = set(everything.splitlines()), [], []
    for i, text in enumerate(tested.values()):
        ids = torch.tensor(tokenizer.encode(text), dtype=torch.long)
        tokens.append(ids[: len(ids) // T * T].view(-1, T))
        file += [i] * len(tokens[-1])
    tokens, file = torch.cat(tokens), torch.tensor(file)
    tried, decode = spread(len(tokens), 10 * n).tolist(), tokenizer.decode
    own = [i for i in progress(tried) if not copied(decode(tokens[i].tolist()), lines, everything)]
    require(len(own) >= n, f"{n} passages of {T} tokens are needed; of {len(tried)} in the files "
            f"{len(own)} are no copies of training text: if --text is that text, give --train-text "
            "alone; else a longer text, or fewer --passages")
    chosen = torch.tensor(own)[spread(len(own), n)]
    return tokens[chosen].to(device), file[chosen]


# ---- 3. Cells: one head of one layer, the text it is tested on, and what is learned for it ----
def pick_device(name: str) -> torch.device:
    """Return a device; "auto" is a GPU where there is one. Raises InputError."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    with models.as_input_error(f"device {name!r}", "take auto or cpu", "used here"):
        return torch.empty(0, device=name).device


def open_model(name: str, args) -> LanguageModel:
    """Open an embedded model by its short name, or any folder or hub id."""
    path = os.path.join(HERE, "checkpoints", name) if name in EMBEDDED else name
    dtype = dict(fp32=torch.float32, bf16=torch.bfloat16)[args.dtype]
    model = models.load(path, pick_device(args.device), dtype)
    model.name = name
    return model


def chosen_cells(name: str, args) -> list[tuple[str, int, int]]:
    """List the cells that --layer and --head name in a model: (model, layer, head)."""
    model, cells = open_model(name, args), []
    layers = [model.recurrent_layers[:2][-1]]  # the second, fixed before anything was measured
    if args.layer is not None:
        layers = model.recurrent_layers if args.layer == "all" else [args.layer]
    for layer in layers:
        models.check_cell(model, layer, 0 if args.head == "all" else args.head)
        every = range(model.layers[layer].mixer.heads)
        cells += [(name, layer, h) for h in (every if args.head == "all" else [args.head])]
    return cells


class Reader:
    """A model, and the text that it reads."""
    def __init__(self, name: str, args, passages: int):
        self.args, self.model = args, open_model(name, args)
        self.large = sum(p.numel() for p in self.model.parameters()) > LARGE
        self.tokenizer = models.load_tokenizer(self.model)
        self.training, tested = choose_text(args)
        if self.large and args.quick and args.passages is None:
            passages = max(2, passages // 4)
        texts = self.training, tested, passages, PASSAGE
        self.tokens, self.file = tested_windows(self.tokenizer, *texts, self.model.device)
        files = len(self.file.unique())
        few = ", too few for intervals" if files < 10 else ""
        say(f"{args.command} {name}: {len(self.tokens)} passages of {PASSAGE} tokens, from {files} "
            f"files{few}, {self.model.device}, seed {args.seed}")

    def windows(self, n: int, T: int) -> Tensor:
        """Take about n windows [n, T] of training text."""
        return windows(self.tokenizer, self.training, n, T, self.model.device)

    @functools.cached_property
    def training_tokens(self) -> Tensor:
        """Take the windows [n, CONTEXT] from whose writes dictionaries are learned."""
        n = (WINDOWS // 4 if self.large else WINDOWS) // (5 if self.args.quick else 1)
        return self.windows(n, CONTEXT)

    @functools.lru_cache(maxsize=1)  # one layer's cells come one after the other
    def writes(self, layer: int) -> tuple[Tensor, Tensor]:
        """Collect what a layer's heads write over training text: k [N, H, K], v [N, H, V]."""
        tokens, heads = self.training_tokens, list(range(self.model.layers[layer].mixer.heads))
        say(f"{self.model.name}: reading {tokens.numel():,} tokens of training text up to layer "
            f"{layer}, to learn from what is written there")
        k, v = writesae.collect(self.model, tokens, layer, heads)
        return k.flatten(0, 1), v.flatten(0, 1)



class Cell:
    """One head of one layer: what is tested, and what is learned for it when it is asked for.

    Each purpose has a random generator of its own (`rng`), so that neither the size of a batch, nor
    the other cells, nor the number of processes changes a result.
    """
    def __init__(self, reader: Reader, layer: int, head: int):
        self.reader, self.args, self.model = reader, reader.args, reader.model
        self.layer, self.head = layer, head
        self.place = self.model, layer, head  # as functions of writesae.py take them
        self.tokens, self.file = reader.tokens, reader.file  # [n, PASSAGE], [n]
        self.name = f"{self.model.name} L{layer}H{head}"
        self.positions = POSITIONS[:: 3 if self.args.quick else 1]  # tested in each passage
        self.atoms = self.args.atoms or (ATOMS // 4 if self.args.quick else ATOMS)

    def rng(self, purpose: str) -> torch.Generator:
        """Make the generator of one purpose."""
        word = f"{self.args.seed} {self.layer} {self.head} {purpose}"
        seed = int.from_bytes(hashlib.sha256(word.encode()).digest()[:7], "big")
        return torch.Generator().manual_seed(seed)

    @functools.cached_property
    def writes(self) -> tuple[Tensor, Tensor]:
        """The head's writes over training text: k [N, K], v [N, V]."""
        k, v = self.reader.writes(self.layer)
        return k[:, self.head].contiguous(), v[:, self.head].contiguous()

    @functools.cached_property
    def metric(self) -> tuple[Tensor, Tensor]:
        """The read metric M_k, M_v, from training text."""
        part = (8 if self.reader.large else 1) * (4 if self.args.quick else 1)
        tokens = self.reader.windows(METRIC_PASSAGES // part, PASSAGE)
        how, dtype = (tokens, EVERYWHERE[::12], self.rng("metric")), self.model.unembedding.dtype
        self.model.to(at_least_fp32(self.model.unembedding[:1]).dtype)  # bf16 is slow backwards
        M_k, M_v = writesae.read_metric(*self.place, *how)
        self.model.to(dtype)
        return M_k.cpu(), M_v.cpu()

    @functools.cached_property
    def learned(self) -> WriteSAE:
        """The dictionary learned by reads: from --sae if it is there, else learned now."""
        path = sae_path(self)
        if path and os.path.exists(path):
            sae = WriteSAE.load(path)
            check_about(self, sae, path)
            return sae
        (k, v), M, began = self.writes, self.metric, time.time()
        sae = writesae.fit(k, v, self.atoms, self.rng("learned by reads"), *M)
        say(f"{self.name}: {self.atoms:,} atoms learned by reads, in {time.time() - began:.0f} s")
        sae.about = about(self)
        if path:
            sae.save(path)
            say(f"kept in {path}")
        return sae

    def tested_writes(self, positions) -> tuple[Tensor, Tensor]:
        """Collect the head's writes at positions of the tested text: k [n, P, K], v [n, P, V]."""
        k, v = writesae.collect(self.model, self.tokens, self.layer, [self.head])
        return k[:, positions, 0], v[:, positions, 0]

    def effects(self, positions, stand_ins: dict) -> dict[str, Tensor]:
        """Run `writesae.replacement` here: name -> effect [n, P]."""
        return writesae.replacement(*self.place, self.tokens, positions, stand_ins)


def sae_path(cell: Cell) -> str | None:
    """Say where --sae keeps a cell's dictionary: a file, or one in a folder or under a hub id."""
    place = cell.args.sae
    if place is None or place.endswith(".safetensors"):
        return place
    name = f"{os.path.basename(cell.model.name)}-L{cell.layer}H{cell.head}.safetensors"
    path = os.path.join(models.find_folder(place), name)
    require(os.path.isdir(place) or os.path.exists(path), f"{place}: this hub id has no {name}")
    return path


def about(cell: Cell) -> dict:
    """Note what a cell's dictionary is learned for, and from what."""
    digest = hashlib.sha256()
    for file in ["config.json", *models.find_files(cell.model.folder)]:
        with open(os.path.join(cell.model.folder, file), "rb") as f:
            for block in iter(functools.partial(f.read, 1 << 24), b""):
                digest.update(block)
    notes = dict(model=digest.hexdigest()[:16], layer=cell.layer, head=cell.head, atoms=cell.atoms)
    text = text_hash(cell.reader.training)
    return notes | dict(seed=cell.args.seed, text=text, quick=cell.args.quick)


def check_about(cell: Cell, sae: WriteSAE, path: str):
    """Hold a dictionary's notes against the cell: another model, layer, head or number of atoms is
    refused; another text, seed or size of training is said."""
    if cell.args.atoms is None:
        cell.atoms = len(sae.key)
    say(f"{cell.name}: {len(sae.key):,} atoms from {path}")
    for name, here in about(cell).items():
        there = len(sae.key) if name == "atoms" else sae.about.get(name)
        differs = f"{path}: {name} is {there!r:.40}, here it is {here}"
        if name in ("model", "layer", "head", "atoms"):
            require(there == here, f"{differs}; give this cell's own file, or leave --sae out")
        elif there != here:
            say(f"{differs}; going on with it")


# ---- 4. The driver of all experiments ----
class Command(NamedTuple):
    """What a command does. An experiment measures one cell; others do all their work themselves.
    The function's docstring is its --help, and is printed above an experiment's table."""
    function: Callable  # cell -> results (dicts), lines to print, table for `draw`; args -> status
    options: str
    heading: str = ""  # of an experiment's table
    passages: tuple[int, int] = (176, 12)  # how many are tested, and with --quick
    draw: Callable | None = None  # all cells' results and tables, two lists -> a figure


def measured(measure: Callable, job: tuple, reader: Reader):
    """Measure one cell: its results, lines, table; or None, the reason, None."""
    name, layer, head = job
    began, place = time.time(), dict(model=name, layer=layer, head=head)
    try:
        results, lines, table = measure(Cell(reader, layer, head))
    except (InputError, RuntimeError) as error:  # such as a GPU that is too small
        return None, f"error: {name} L{layer}H{head}: {error!s:.500}", None
    results[0].setdefault("seconds", round(time.time() - began, 1))
    text = json.dumps([place | r for r in results])
    return json.loads(text, parse_constant=lambda nan: None), lines, table  # JSON has no NaN


def gathered(found, rank: int, processes: int) -> list:
    """Bring what every process found to the first; the others get nothing."""
    if processes == 1:
        return [found]
    everything = [None] * processes if rank == 0 else None
    torch.distributed.gather_object(found, everything)
    return everything or []


def run_experiment(experiment: Command, args) -> int:
    """Measure all cells, in rounds of one cell a process; print and write each as it is there."""
    shown, failed = [], 0
    rank, processes = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if processes > 1:  # under torchrun: all join now, and may wait long for one another
        long = datetime.timedelta(days=30)
        torch.distributed.init_process_group("gloo", timeout=long)
    jobs = [job for name in args.models for job in chosen_cells(name, args)]
    mine, reader = jobs[rank::processes], None
    n = args.passages or experiment.passages[args.quick]
    for i in range(math.ceil(len(jobs) / processes)):
        found = None
        if i < len(mine):
            name = mine[i][0]
            if reader is None or reader.model.name != name:
                reader = Reader(name, args, n)
            found = measured(experiment.function, mine[i], reader)
        for results, lines, table in filter(None, gathered(found, rank, processes)):
            if results is None:
                say(lines)
                failed += 1
                continue
            if not shown and not args.prompt:
                legend = inspect.getdoc(experiment.function) or ""  # python -OO leaves none
                print(f"{legend}\n\n{experiment.heading}")
            print("\n".join(lines), flush=True)
            shown.append((results, table))
            if args.json:
                everything = [r for results, _ in shown for r in results]
                with whole_file(args.json) as temporary:
                    Path(temporary).write_text(json.dumps(everything, indent=1), "utf-8")
    if args.plot and shown:
        figure = experiment.draw(*zip(*shown))
        with whole_file(args.plot) as temporary:
            figure.savefig(temporary, dpi=110, format="png")
    return 2 if failed else 0


COLOURS = ("#0072B2", "#D55E00")  # that the colour-blind can tell apart


def panels(rows: int, columns: int, width: float = 4.2, height: float = 3.6):
    """Make a figure and its panels, by rows."""
    from matplotlib.figure import Figure

    figure = Figure((width * columns, height * rows), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


# ---- 5. replace: the ladder of stand-ins ----
NEAR_DRAWS = ("as near 1", "as near 2", "as near 3")


def ladder(cell: Cell, k: Tensor, v: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Make the stand-ins of writes k [n, P, K], v [n, P, V]: name -> key, value."""
    sae, M, writes = cell.learned, cell.metric, cell.writes
    drawn = writesae.untrained(*writes, cell.atoms, cell.rng("random writes"))
    seen = WriteSAE(drawn.key, drawn.value, *M)  # the same writes, near as later reads see it
    learned = writesae.fit(*writes, cell.atoms, cell.rng("learned"))
    stand_ins = {
        "nothing": (0 * k, v),
        "random direction": writesae.random_direction(k, v, cell.rng("random direction")),
        "random writes": drawn(k, v),
        "learned": learned(k, v),
        "random writes by reads": seen(k, v),
        "learned by reads": sae(k, v),
    }
    for name in NEAR_DRAWS:
        atom = stand_ins["learned by reads"]
        stand_ins[name] = writesae.as_near(k, v, *atom, *M, cell.rng(name))
    return stand_ins


def replace(cell: Cell):
    """Take one write of one head out of the state and put a stand-in there: how far do the model's
    next eleven predictions move (KL in nats)? Half a minute a model.

    left: that effect, summed over positions, as a share of the effect of putting nothing there
    [95 %, redrawing whole files].  typical: the median of that ratio by position.  won: how often
    the stand-in's effect is the smaller one.  covered: how often the cosine of stand-in and write
    is 0.71 or more.

    random direction: a random rank-1 matrix at its best size.  random writes: the nearest of as
    many writes, drawn from training text, as there are atoms.  learned: the nearest atom.  by
    reads: near as later reads see it; the others: near as numbers.  as near: a random matrix
    exactly as near as the atom learned by reads (mean effect of three).
    """
    positions = cell.positions
    k, v = cell.tested_writes(positions)
    stand_ins = ladder(cell, k, v)
    effects = cell.effects(positions, stand_ins)
    match = {name: writesae.cosine(*x, k, v) for name, x in stand_ins.items()}
    for table in (effects, match):
        table["as near"] = torch.stack([table.pop(name) for name in NEAR_DRAWS])  # [3, n, P]
    effects["as near"], rows = effects["as near"].mean(0), []
    for name, x in effects.items():
        figures = x, effects["nothing"], match[name], cell.file, cell.rng("bootstrap")
        rows.append(dict(name=name) | writesae.left_figures(*figures))
    rows[0] |= dict(left_ci95=None)  # nothing, against itself
    index, a = cell.learned.encode(k, v)
    shift = torch.randint(1, cell.atoms, index[:, ::4].shape, generator=cell.rng("another atom"))
    other = cell.learned.decode((index[:, ::4] + shift) % cell.atoms, a[:, ::4])
    another = cell.effects(positions[::4], {"another": other})["another"]
    fires = match["learned by reads"] >= writesae.COVERED
    null_fires = match["random writes by reads"] >= writesae.COVERED
    firings = writesae.firing_figures(effects, fires, null_fires, index, another)
    result = dict(n_atoms=cell.atoms, n_positions=k[..., 0].numel(), n_passages=len(k),
                  n_files=len(cell.file.unique()), rows=rows, firings=firings,
                  sae=cell.learned.about)
    lines = [f"{cell.name}: {result['n_positions']:,} positions, {cell.atoms:,} atoms"]
    for r in rows:
        lines.append(f"  {r['name']:22}{r['left']:7.3f} {ends(r['left_ci95']):14}"
                     f"{r['typical']:9.3f}{r['won']:8.1%}{r['covered']:9.1%}")
    return [result], lines, None


def ends(interval: list[float] | None, form: str = ".3f") -> str:
    """Write an interval as [low, high], or nothing where there is none."""
    return "" if interval is None else f"[{interval[0]:{form}}, {interval[1]:{form}}]"


# ---- 6. compare: dictionaries side by side ----
# New here: what --what can name, each a generator of (name, metric, number of atoms, how many are
# active, stand-ins of the tested writes x, y), and what learning is worth.
SIZES = 256, 1024, 2048, 4096, 16_384
BEYOND = 32_768, 65_536  # of random writes only: the curve that learned ones are held against


def sizes(cell: Cell, x, y):
    """Compare several sizes, none larger than the training text has writes."""
    (k, v), M, quick = cell.writes, cell.metric, cell.args.quick
    for n in SIZES if quick else SIZES + BEYOND:
        if n <= len(k):
            drawn = writesae.untrained(k, v, n, cell.rng("random writes"), *M)
            yield "random writes", "reads", n, 1, drawn(x, y)
    for n in SIZES[:2] if quick else SIZES:
        if n <= len(k):
            learned = writesae.fit(k, v, n, cell.rng("learned by reads"), *M)
            yield "learned", "reads", n, 1, learned(x, y)


def active(cell: Cell, x, y):
    """Compare 1, 2, 4 and 8 atoms a write, drawn, or learned for that many."""
    (k, v), M, n = cell.writes, cell.metric, cell.atoms // 2
    drawn = writesae.untrained(k, v, n, cell.rng("random writes"))
    seen = WriteSAE(drawn.key, drawn.value, *M)  # the same writes, near as later reads see it
    fit = functools.partial(writesae.fit_pursuit, sample=3000 if cell.args.quick else 15_000)
    for m in (1, 2, 4, 8):
        yield "random writes", "numbers", n, m, drawn.decode(*writesae.pursuit(drawn, x, y, m))
        yield "random writes", "reads", n, m, seen.decode(*writesae.pursuit(seen, x, y, m))
        learned = fit(k, v, n, m, cell.rng("learned by reads"), *M)
        yield "learned", "reads", n, m, learned.decode(*writesae.pursuit(learned, x, y, m))
    k, v = writesae.by_norm(k, v, cell.rng("by norm"), *M)
    learned = fit(k, v, n, 4, cell.rng("learned by norm"), *M)
    yield "learned by norm", "reads", n, 4, learned.decode(*writesae.pursuit(learned, x, y, 4))


def variants(cell: Cell, x, y):
    """Compare dictionaries of other kinds, and tables of mean writes."""
    (k, v), M, n = cell.writes, cell.metric, cell.atoms
    drawn = writesae.untrained(k, v, n, cell.rng("random writes"))
    yield "random writes", "numbers", n, 1, drawn(x, y)
    yield "random writes", "reads", n, 1, WriteSAE(drawn.key, drawn.value, *M)(x, y)
    yield "learned", "numbers", n, 1, writesae.fit(k, v, n, cell.rng("learned"))(x, y)
    learned = writesae.fit(k, v, n, cell.rng("learned by reads"), *M)
    yield "learned", "reads", n, 1, learned(x, y)
    by_norm = writesae.by_norm(k, v, cell.rng("by norm"), *M)
    learned = writesae.fit(*by_norm, n, cell.rng("learned by norm"), *M)
    yield "learned by norm", "reads", n, 1, learned(x, y)
    two = writesae.two_vector_saes(k, v, n, cell.rng("two vector dictionaries"), *M)
    yield "two vector dictionaries", "reads", n, 1, two(x, y)
    mean, lines = 0, 0  # of all writes; of those after one token; of those after two
    for order, name in enumerate(("", "mean after one token", "mean after two tokens")):
        texts = cell.reader.training_tokens.cpu(), cell.tokens.cpu()
        there, here = (writesae.contexts(tokens, order) for tokens in texts)
        here = here[:, cell.positions]
        mean = writesae.mean_after(k, v, there.flatten(), here.flatten(), mean)
        lines += len(there[there >= 0].unique())
        if name:
            pair = writesae.leading_pair(mean.unflatten(0, here.shape))
            yield name, "numbers", lines, 1, pair


def compare(cell: Cell):
    """Compare dictionaries at the same positions: sizes, several atoms a write (active), other
    kinds (variants). Half a minute to two minutes a model.

    left, won, covered: as `replace` has them.  near: in numbers, or as later reads see it.  of: how
    many of the atoms are active; all are signed and refitted in --what active.  unexplained: share
    of a write's energy that is left, in that metric, on average.  worth: how many times as many
    random writes leave as little, and cover as much.
    """
    what, positions = cell.args.what, cell.positions
    k, v = cell.tested_writes(positions)
    write, metric = (k[..., None, :], v[..., None, :]), dict(numbers=(), reads=cell.metric)
    every = dict(sizes=sizes, active=active, variants=variants)[what](cell, k, v)
    (K, V), rows, match = (k.shape[-1], v.shape[-1]), [], []
    groups = {1: {"nothing": (0 * write[0], write[1])}}  # by active atoms: each runs in one batch
    say(f"{cell.name}: {len(cell.writes[0]):,} writes to learn from")  # before the clock starts
    began = time.time()
    for name, near, n, m, (key, value) in every:
        stand_in = key.view(*k.shape[:2], m, K), value.view(*k.shape[:2], m, V)
        groups.setdefault(m, {})[len(rows)] = stand_in
        match.append(writesae.nearness(stand_in, write)[0])
        _, left = writesae.nearness(stand_in, write, *metric[near])
        rows.append(dict(what=what, name=name, n_atoms=n, active=m, metric=near,
                         trained=name != "random writes", parameters=n * (K + V),
                         n_positions=match[0].numel(),
                         unexplained=None if "after" in name else writesae.mean(left),
                         worth_covered=None, worth_left=None,
                         seconds=round(time.time() - began, 1)))
        began = time.time()
    effects = {}
    for stand_ins in groups.values():
        effects |= cell.effects(positions, stand_ins)
    for i, r in enumerate(rows):
        figures = effects[i], effects["nothing"], match[i], cell.file, cell.rng("bootstrap")
        r |= writesae.left_figures(*figures)
        del r["typical"]
    add_worth(rows)
    lines = [f"{cell.name}: {match[0].numel():,} positions"]
    for r in rows:
        unexplained = "" if r["unexplained"] is None else f"{r['unexplained']:.3f}"
        worth = [f"{r[x]:.1f}" if r[x] else "" for x in ("worth_left", "worth_covered")]
        lines.append(f"  {r['name']:25}{r['metric']:8}{r['n_atoms']:6,}{r['active']:3}"
                     f"{r['left']:7.3f} {ends(r['left_ci95']):15}{r['won']:6.1%}{r['covered']:9.1%}"
                     f"{unexplained:>8}{worth[0]:>7}{worth[1]:>9}".rstrip())
    return rows, lines, cell.name


def add_worth(rows: list[dict]):
    """Say of each learned size how many times as many random writes do as well."""
    curve = [r for r in rows if r["what"] == "sizes" and not r["trained"]]
    for figure in ("covered", "left"):
        points = [r["n_atoms"] for r in curve], [r[figure] for r in curve]
        for r in rows:
            many = writesae.worth(*points, r[figure])
            if r["trained"] and many:
                r["worth_" + figure] = many / r["n_atoms"]


def draw_sizes(shown: tuple, names: tuple):
    """Draw the effect that is left against the number of atoms, and what learning is worth."""
    figure, axes = panels(1, len(shown), 3.3, 3.4)
    for ax, rows, name in zip(axes[0], shown, names):
        for kind, line, colour in zip(("random writes", "learned"), ("o--", "s-"), COLOURS):
            of_kind = [r for r in rows if r["name"] == kind]
            points = [r["n_atoms"] for r in of_kind], [r["left"] for r in of_kind]
            ax.loglog(*points, line, color=colour, label=kind)
        for r in rows:
            if r["worth_left"]:
                start, end = (r["n_atoms"], r["left"]), (r["n_atoms"] * r["worth_left"], r["left"])
                ax.annotate("", end, start, arrowprops=dict(arrowstyle="->", color="0.3"))
                ax.annotate(f"{r['worth_left']:.1f} x", start, (7, 3), textcoords="offset points")
        ax.set(title=name, xlabel="atoms in the dictionary")
        ax.yaxis.set_major_formatter("{x:g}")
        ax.yaxis.set_minor_formatter("{x:.2g}")
        ax.legend()
    axes[0, 0].set_ylabel("effect left, as a share of\nnothing in the write's place")
    return figure


# ---- 7. atoms: what single atoms stand for ----
def few(at: writesae.Firings, which: Tensor, atoms: list[int], most=40) -> writesae.Firings:
    """Take up to so many firings of each atom out of `which` [E], evenly spread over the text."""
    each = [(which & (at.atom == atom)).nonzero()[:, 0] for atom in atoms]
    return at.rows(torch.cat([rows[spread(len(rows), most)] for rows in each]))


def edits_of_atoms(cell: Cell, at: writesae.Firings, away: writesae.Firings, token: Tensor) -> dict:
    """Take a A out where it fires, add it where it does not, and do both with random matrices of
    its size: name -> file [E], how log p(token) changes [E], how by the random matrix [E]."""
    key, value = cell.learned.decode(at.atom, at.a)
    rng, size = cell.rng("random matrices"), key.norm(dim=-1) * value.norm(dim=-1)
    random_key = size[:, None] * F.normalize(torch.randn(key.shape, generator=rng), dim=-1)
    random_value = F.normalize(torch.randn(value.shape, generator=rng), dim=-1)
    changes = {}
    for name, places, sign in (("removed", at, -1), ("added", away, 1)):
        where = *cell.place, cell.tokens, places, token
        own = writesae.token_change(*where, sign * key, value)
        random = writesae.token_change(*where, sign * random_key, random_value)
        changes[name] = cell.file[places.passage], own, random
    return changes


def mean_changes(cell: Cell, changes: dict, here: Tensor) -> tuple[dict, str]:
    """Give the mean changes of the edits `here` [E], with intervals: figures, and columns."""
    figures, columns = {}, ""
    for name, found in changes.items():
        file, own, random = (x[here] for x in found)
        interval = bootstrap(own, torch.ones_like(own), file, cell.rng("bootstrap"))
        mean, null = writesae.mean(own), writesae.mean(random)
        figures |= {name: mean, name + "_random": null, name + "_ci95": interval}
        columns += f" {mean:+.3f} {ends(interval, '+.3f'):16} {null:+.3f}"
    return figures, columns


def atoms(cell: Cell):
    """Show what the most used atoms stand for: their tokens, their contexts, and what their edits
    do to the token that they promote. Half a minute a model.

    In the order of their use in every second file.  n, files: how often the atom covers a write
    (cosine 0.71 or more), in how many files.  on: the token where it does so most, with its share.
    promotes: the token it raises most, by the gated formula, in every second file.  removed, added:
    how log p of that token changes in the other files (nats, mean over eleven steps) when a A is
    taken out, or added where it does not fire [95 % by file].
    """
    sae, (k, v) = cell.learned, cell.tested_writes(slice(None))
    inside = torch.isin(torch.arange(PASSAGE), torch.tensor(EVERYWHERE))
    k = k * inside[:, None]  # so that no atom fires outside
    at, (index, _) = writesae.firings(sae, k, v), sae.encode(k, v)
    naming = torch.isin(cell.file, cell.file.unique()[::2])  # [n] passages of every second file
    named = naming[at.passage]  # [E]
    require(bool(named.any()) and not named.all(), "atoms are named in some files and tested in "
            "others, but fire in one half alone; give more files or --passages")
    uses = at.atom[named].bincount()
    most = uses.topk(min(4 if cell.args.quick else 12, int((uses > 0).sum()))).indices.tolist()
    chosen, tested = few(at, named, most), few(at, ~named, most)
    promoted = writesae.promoted_tokens(*cell.place, cell.tokens, sae, chosen)
    silent = ~naming[:, None] & (index[:, tested.position] != tested.atom)  # [n, E]
    require(bool(silent.any(0).all()), "an atom fires in every passage; take more --passages")
    passage = torch.multinomial(silent.T.float(), 1, generator=cell.rng("elsewhere"))[:, 0]
    away = tested._replace(passage=passage)
    changes = edits_of_atoms(cell, tested, away, promoted[tested.atom])
    figures, columns = mean_changes(cell, changes, tested.atom >= 0)
    lines, decode = [f"{cell.name + ': all of these':39}{columns}"], cell.reader.tokenizer.decode
    results = writesae.describe(sae, k, v, cell.tokens, decode, most, cell.file)
    for r in results:
        own, columns = mean_changes(cell, changes, tested.atom == r["atom"])
        r |= dict(promoted=decode([int(promoted[r["atom"]])])) | own
        lines.append(f"{r['atom']:5}{r['n_firings']:5}{r['n_files']:6} {r['token']!r:9.9}"
                     f"{r['token_share']:4.0%} {r['promoted']!r:8.8}{columns}")
        lines += [f"      {context!r}" for context in r["contexts"]]
    M, rng = (sae.M_k, sae.M_v), cell.rng("random writes")
    null = writesae.firings(writesae.untrained(*cell.writes, cell.atoms, rng, *M), k, v)
    often, share = writesae.population(at, cell.tokens)
    null_often, null_share = writesae.population(null, cell.tokens)
    shares = dict(often_share=often, token_share=share, untrained_often_share=null_often)
    results[0]["population"] = shares | dict(untrained_token_share=null_share) | figures
    lines.append(f"  {len(at.a):,} firings in {len(k)} passages, {often:.0%} (untrained atoms: "
                 f"{null_often:.0%}) of atoms that fire five times or more;\n  {share:.0%} "
                 f"({null_share:.0%}) of such an atom's are on its most frequent token")
    pictures = [pictured(cell, k, v, *firing) for firing in zip(*few(at, at.a > 0, most[:3], 1))]
    return results, lines, ([r["contexts"][0] for r in results[:3]], pictures)


def pictured(cell: Cell, k: Tensor, v: Tensor, passage: Tensor, t: Tensor, atom: Tensor, a: Tensor):
    """Form the five matrices [K, V] that are drawn for one firing, by their titles."""
    model, layer, head = cell.place
    stream, _ = model.run(model.embed(cell.tokens[passage][None]), last=layer)
    states = models.states(model.step_inputs(stream, layer).heads([head]))[0, :, 0].cpu()
    write = models.outer(k[passage, t], v[passage, t])
    stand_in = models.outer(*cell.learned.decode(atom, a))
    return {"memory before": states[t - 1], "memory after": states[t], "what was written": write,
            "the atom in its place": stand_in, "difference": write - stand_in}


def draw_atoms(results: list, tables: list):
    """Draw three firings of the first cell, a row each on one scale: key down, value across."""
    contexts, pictures = tables[0]
    figure, axes = panels(len(pictures), 5, 2.1, 2.4)
    for axis, title in zip(axes[0], pictures[0]):
        axis.set_title(title)
    for row, context, matrices in zip(axes, contexts, pictures):
        largest = max(x.abs().max() for x in matrices.values())
        for axis, x in zip(row, matrices.values()):
            axis.imshow(x.numpy(), cmap="RdBu_r", vmin=-largest, vmax=largest)
            axis.set(xticks=[], yticks=[])
        row[2].set_xlabel(" ".join(context.split()), parse_math=False)
    return figure


# ---- 8. formula: what each factor of the logit-change formula is worth ----
def predict_and_measure(cell: Cell):
    """Run the ladder for three edits at firings: predicted, measured. Add the 20 most used atoms at
    four sizes: measured [20, 4, n], predicted by three factors, and drawn at random."""
    k, v = cell.tested_writes(EVERYWHERE)
    index, a = cell.learned.encode(k, v)
    key, value = (x.to(k) for x in cell.learned.decode(index, a))  # [n, P, K], [n, P, V]
    fires = writesae.cosine(key, value, k, v) >= writesae.COVERED
    where = fires[:, ::24]
    require(bool(where.any()), "no atom covers a write here: take more --passages")
    edits = writesae.three_edits(*(x[:, ::24] for x in (k, v, key, value)))
    ladder = writesae.ladder_over_text(*cell.place, cell.tokens, EVERYWHERE[::24], edits, where)
    used = index[fires].bincount().argsort(descending=True, stable=True)[:20]
    key = F.normalize(cell.learned.key[used].to(k), dim=-1)
    value = F.normalize(cell.learned.value[used].to(k), dim=-1)
    sizes = torch.tensor(writesae.SIZES).to(k)[:, None]
    typical = (k.norm(dim=-1) * v.norm(dim=-1)).median()
    key = (typical * sizes * key[:, None]).flatten(0, 1)  # [20 · 4, K]
    tokens = cell.tokens[::2]
    sides = key[:, None, None], value.repeat_interleave(4, 0)[:, None, None]
    sides = [x.expand(-1, len(tokens), 1, -1) for x in sides]
    text = tokens, [64], [sides], where.new_ones(len(tokens), 1)
    pair = writesae.ladder_over_text(*cell.place, *text, [1], steps=1, jacobians=False)
    x, y = (z.view(len(used), 4, -1) for z in pair)
    random = torch.randn(y[:, :1].shape, generator=cell.rng("random numbers"))
    return *ladder, y, (x, sizes * random)


def formula(cell: Cell):
    """Predict how edits of one head's state move the logits of seven tokens, over eleven steps.
    Half a minute a model.

    small: an atom, of norm 0.1, is added; swap: it is put in the write's place; delete: the write
    is taken out.  R²: of predicted = measured, unfitted.  slope: 1 if sizes are right.  sign: share
    of right signs.  Each rung has one factor more; the Jacobian is exact to first order, the mean
    of two to second.  fitted over sizes: by one scalar for each passage, atom and token (the
    paper's R², median of 20 atoms).
    """
    dtype, atoms = cell.model.unembedding.dtype, len(cell.learned.key)  # learned in that dtype
    if not cell.reader.large:
        cell.model.double()  # so that what a small edit moves stands clear of rounding
    try:
        predicted, measured, added, guesses = predict_and_measure(cell)
    finally:
        cell.model.to(dtype)
    rungs, n = [], measured.shape[1]
    lines = [f"{cell.name}: {n:,} firings, {atoms:,} atoms"]
    for name, y in zip(writesae.RUNGS, predicted):
        (r2, slope, sign), (swap, *_), (delete, *_) = map(writesae.agreement, measured, y)
        rungs.append(dict(name=name, fitted=False, r2_small=r2, r2_swap=swap, r2_delete=delete,
                          slope=slope, sign=sign))
        lines.append(f"  {name:34}{r2:11.4g}{slope:10.2g}{sign:9.1%}{swap:11.3g}{delete:11.3g}")
    for name, guess in zip(writesae.FITTED, guesses):
        y = writesae.fitted_over_sizes(guess, added)
        r2 = torch.tensor([r2 for r2, *_ in map(writesae.agreement, added, y)]).median().item()
        rungs.append(dict(name=name, fitted=True, r2_small=r2, r2_swap=None, r2_delete=None,
                          slope=None, sign=None))
        lines.append(f"  {name:34}{r2:11.4g}")
    return [dict(n=n, rungs=rungs)], lines, None


# ---- 9. steer: edits of the memory after which a token is said ----
@torch.no_grad()
def show_text(cell: Cell, heads: list, size: float = 0.5):
    """Show how one text goes on: unedited, edited, edited with its first new token forced."""
    model, tokenizer, word = cell.model, cell.reader.tokenizer, cell.args.target
    target = torch.tensor(tokenizer.encode(word), device=model.device)
    require(len(target) == 1, f"--target {word!r:.60} is {len(target)} tokens: give one token")
    prompt = torch.tensor([tokenizer.encode(cell.args.prompt)], device=model.device)
    p = writesae.read_prompts(model, prompt)
    keys, formula = writesae.keys_and_formula(model, p, target, heads)
    values = writesae.ascend(model, p, target, formula, size, heads, keys)
    logits, cache = writesae.read_edited(model, p, p.said[:, :0], values, heads, keys)
    edited, _ = model.generate(logits[:, -1], cache, 20)
    logits, cache = model(p.said[:, :1], cache)
    later, _ = model.generate(logits[:, -1], cache, 19)
    said = {"no edit": p.said[:, :20], "edited": edited,
            "first token forced": torch.cat([p.said[:, :1], later], 1)}
    texts = {name: tokenizer.decode(x[0].tolist()) for name, x in said.items()}
    lines = [f"{cell.name}, reach {cell.args.reach}, edits of {size} native writes for {word!r}:"]
    lines += [f"  {name:20}{text!r}" for name, text in texts.items()]
    return [dict(kind="memory", reach=cell.args.reach, size=size, texts=texts)], lines, None


def steer(cell: Cell):
    """Edit the memory at a prompt's last three tokens, so that a target of rank 100 to 1000 is said
    later on; beside it edits of the input. Two minutes a model; a few seconds with --prompt.

    persists: among 12 tokens said after 1, 4, 8 or 12 unedited ones were forced, in % [95 %].
    appears: among 20 said freely.  states: how far they move, of their norm.  ppl: of the 12 after
    one, unedited model.  read again: the target is read once more.  Edits of states, `size` native
    writes: random, formula, memory (by ascent; states alone: all else unedited).  residual: of the
    input, by ascent, in norms of it.
    """
    model, reach, heads = cell.model, cell.args.reach, [(cell.layer, cell.head)]
    if reach == "all":
        heads = [(i, j) for i in model.recurrent_layers for j in range(model.layers[i].mixer.heads)]
    if cell.args.prompt is not None:
        return show_text(cell, heads)
    tokens = cell.tokens[:, :96]
    prompt, target, stratum = writesae.draw_targets(model, tokens, cell.rng("targets"))
    require(len(stratum.unique()) == 2, "all targets stand in prompts, or none: more --passages")
    found = writesae.steer(model, tokens[prompt], target, heads, cell.rng("random"))
    passing = {kind: size for (kind, size), outcome in reversed(found.items())  # sizes fall
               if writesae.mean(outcome["persists"][:, 0]) >= 0.9}
    file, stratum = cell.file[prompt.cpu()], stratum.cpu()
    rows, lines = [], [f"{cell.name}, reach {reach}: {len(target)} pairs of a prompt and a target"]
    for (kind, size), outcome in found.items():
        for i, name in enumerate(("in prompt", "absent")):
            part = {column: x[stratum == i] for column, x in outcome.items()}
            row = dict(kind=kind, reach=reach, target=name, size=size)
            row |= writesae.steering_figures(part, file[stratum == i], cell.rng("bootstrap"))
            if kind in ("memory", "residual"):
                row["size_for_90"] = passing.get(kind)
            rows.append(row)
            line = f"{'' if i else kind:20}{'' if i else size or '':<6}{name:9}"
            for x in row["persists"]:
                interval = "-".join(f"{100 * end:.0f}" for end in x["ci95"] or [])
                line += f"{100 * x['rate']:4.0f} {interval:7}"
            line += f"{row['appears_rate']:5.0%}{row['states_change']:6.0%}"
            lines.append(f"{line}{row['perplexity']:6.1f}")
    return rows, lines, None


# ---- 10. train: learn dictionaries and keep them ----
def train(cell: Cell):
    """Learn dictionaries by reads (near as later reads see it) and keep each in --sae as soon as it
    is there; those that are there are left as they are. Ten seconds a cell.

    covered: how often, on tested text, the cosine of a write and its atom is 0.71 or more.
    """
    sae = cell.learned
    k, v = cell.tested_writes(POSITIONS)
    covered = writesae.mean(writesae.cosine(*sae(k, v), k, v) >= writesae.COVERED)
    line = f"{cell.name:24}{len(sae.key):8,}{covered:9.1%}  {sae_path(cell)}"
    return [dict(n_atoms=len(sae.key), covered=covered)], [line], None


# ---- 11. assignment: functions emptied, with the tests that grade them ----
ASSIGNMENTS = {  # name: function, file, minutes
    "recurrence": ("recurrence", "models.py", 20),
    "propagate": ("propagate", "models.py", 30),
    "mamba2_inputs": ("Mamba2.inputs", "models.py", 30),
    "encode": ("WriteSAE.encode", "writesae.py", 15),
    "kl_divergence": ("kl_divergence", "writesae.py", 20),
    "effect": ("effect", "writesae.py", 15),
    "bootstrap": ("bootstrap", "writesae.py", 20),
    "fit": ("fit", "writesae.py", 60),
    "read_key": ("read_key", "writesae.py", 45),
}


def emptied(text: str, name: str) -> str:
    """Empty a function in the text of its file: its head and its docstring stay."""
    node, lines = ast.parse(text), text.split("\n")
    for part in ASSIGNMENTS[name][0].split("."):
        (node,) = [x for x in node.body if getattr(x, "name", "") == part]
    docstring = node.body[0]
    not_written = " " * docstring.col_offset + f'raise NotImplementedError("write {name}")'
    lines[docstring.end_lineno : node.end_lineno] = [not_written]
    return "\n".join(lines)


def tests_of(text: str, names: list[str]) -> str:
    """Keep of the test file what stands above its ruler, but for the tests of other assignments."""
    parts = text.split("\n# ====")[0].rstrip("\n").split("\n\n\n")
    others = [f"def test_{name}_" for name in ASSIGNMENTS if name not in names]
    kept = [part for part in parts if not any(other in part for other in others)]
    return "\n\n\n".join(kept) + "\n"


def assignment(args) -> int:
    """Make a folder of exercises in --out: copies of the code with the named functions emptied, and
    the tests that grade them. A second; the folder is made whole or not at all."""
    names = [name for name in ASSIGNMENTS if args.list or name in args.names]
    line = "- {:13} {} in {}, about {} minutes"
    listed = "\n".join(line.format(name, *ASSIGNMENTS[name]) for name in names)
    if args.list:
        print(listed)
        return 0
    unknown = [name for name in args.names if name not in ASSIGNMENTS]
    require(names and not unknown, f"assignments {' '.join(unknown) or '(none)'}: allowed are one "
            f"or more of {' '.join(ASSIGNMENTS)}")
    require(args.out, "where to? Give --out FOLDER, a new one")
    files = ("models.py", "writesae.py", "test_writesae.py")
    code = {file: Path(HERE, file).read_text("utf-8") for file in files}
    for name in names:
        file = ASSIGNMENTS[name][1]
        code[file] = emptied(code[file], name)
    code["test_assignment.py"] = tests_of(code.pop("test_writesae.py"), names)
    code["README.md"] = ASSIGNMENT_README.format(listed)
    with models.as_input_error(args.out, "give another --out", "made a folder"):
        out = os.path.realpath(args.out)
        new = not os.path.lexists(out) or os.path.isdir(out) and not os.listdir(out)
        require(new, f"{args.out}: is there already; give a new --out")
        with tempfile.TemporaryDirectory(dir=os.path.dirname(out), prefix=".part") as temporary:
            made = Path(temporary, "made")
            made.mkdir()
            for name, text in code.items():
                Path(made, name).write_text(text, "utf-8")
            os.replace(made, out)
    print(f"{args.out}: write the bodies of {', '.join(names)}; README.md there says how")
    return 0


ASSIGNMENT_README = """\
# Assignment
Write the bodies of these functions, in this order; the docstrings say what each does.

{}

To install: `pip install torch numpy safetensors pytest hypothesis` (PyTorch's CPU build will do).
To check: `python -m pytest -q --tb=line`, here. A test that fails names the mistake where it knows
it. Right when all tests pass.
"""


# ---- 12. The command line ----
class Parser(argparse.ArgumentParser):
    """argparse, with errors as one line."""
    def error(self, message: str):
        """Raise InputError where argparse would print its usage and exit."""
        raise InputError(f"{message}; see python {self.prog} --help")


def whole(text: str, least: int = 0) -> int:
    """Read a whole number, at most nine digits."""
    if not (text.isascii() and text.isdecimal() and len(text) < 10 and int(text) >= least):
        raise argparse.ArgumentTypeError(f"{text!r:.40}: allowed are whole numbers from {least}")
    return int(text)


def whole_or_all(text: str) -> int | str:
    """Read a whole number, or the word all."""
    return text if text == "all" else whole(text)


positive = functools.partial(whole, least=1)

OPTIONS = {  # each option once; the commands below name those that they take
    "model": dict(metavar="MODEL", help="gdn, mamba2, rwkv7, a folder, or a hub id (default: all "
                  "three embedded ones)"),
    "layer": dict(type=whole_or_all, help="a recurrent layer, counted from 0, or all (default: the "
                  "second recurrent one)"),
    "head": dict(type=whole_or_all, default=0, help="a head, counted from 0, or all (default 0)"),
    "atoms": dict(type=positive, help=f"atoms of the dictionary (default {ATOMS:,})"),
    "sae": dict(metavar="FILE|FOLDER|HUB_ID", help="use the dictionary kept there; if there is "
                "none, learn it and keep it there"),
    "seed": dict(type=whole, default=0, help="of all random draws (default 0)"),
    "quick": dict(action="store_true", help="the same code on a small sample"),
    "device": dict(default="auto", help="auto, cpu, cuda, ... (default: a GPU if there is one)"),
    "dtype": dict(default="fp32", choices=["fp32", "bf16"], help="of the weights; the recurrence "
                  "is fp32 always (default fp32)"),
    "text": dict(metavar="FILE|FOLDER", help="test on this text, not on Python's held-out files"),
    "train-text": dict(metavar="FILE|FOLDER", help="learn from this text, not from Python's own; "
                       "of a folder one file in ten is held out to test on"),
    "passages": dict(type=positive, help="how many passages or prompts are tested"),
    "json": dict(metavar="FILE.json", help="write the results there"),
    "plot": dict(metavar="FILE.png", help="draw the picture there"),
    "what": dict(default="sizes", choices=["sizes", "active", "variants"],
                 help="which dictionaries (default sizes)"),
    "prompt": dict(metavar="TEXT", help="edit while this text is read, and print what is said "
                   "then; with --target"),
    "target": dict(metavar="TOKEN", help="the one token that is to be said after --prompt"),
    "reach": dict(default="all", choices=["all", "head"], help="which heads are edited: all of all "
                  "layers, or as in the paper one (default all)"),
    "out": dict(metavar="FOLDER", help="where the folder is made"),
    "list": dict(action="store_true", help="print what can be assigned"),
}
REPLACE = f"{'':24}{'left':>7} {'[95 %]':14}{'typical':>9}{'won':>8}{'covered':>9}"
COMPARE = (f"  {'':25}{'near':8}{'atoms':>6}{'of':>3}{'left':>7} {'[95 %]':15}{'won':>6}"
           f"{'covered':>9}{'unexpl.':>8}{'worth: left, covered':>21}")
ATOMS_TABLE = (" atom    n files on            promotes removed [95 %]           random  added "
               "[95 %]           random")
FORMULA = f"{'':36}  small: R²     slope     sign   swap: R² delete: R²"
STEER = f"{'':35}persists: 1 {'4':12}{'8':12}{'12':7}appears states ppl"
TRAIN = f"{'cell':24}{'atoms':>8}{'covered':>9}  kept in"
CELL = "model layer head seed quick device dtype train-text "
TEST = CELL + "text passages json "
COMMANDS = {
    "replace": Command(replace, TEST + "atoms sae", REPLACE),
    "compare": Command(compare, TEST + "what plot", COMPARE, draw=draw_sizes),
    "atoms": Command(atoms, TEST + "atoms sae plot", ATOMS_TABLE, (400, 60), draw_atoms),
    "formula": Command(formula, TEST + "atoms sae", FORMULA, (100, 8)),
    "steer": Command(steer, TEST + "prompt target reach", STEER, (40, 8)),
    "train": Command(train, CELL + "atoms sae", TRAIN),
    "assignment": Command(assignment, "out list"),
}


def make_parser() -> Parser:
    """Make a subparser for each command, with only its own options; others have their defaults."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = Parser(prog="run.py", description=__doc__, formatter_class=raw, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        text = inspect.getdoc(command.function)
        p = commands.add_parser(name, description=text, formatter_class=raw, allow_abbrev=False)
        if name == "assignment":
            p.add_argument("names", nargs="*", metavar="NAME", help="a function; see --list")
        for option, how in OPTIONS.items():
            if option in command.options.split():
                p.add_argument("--" + option, **how)
            else:
                p.set_defaults(**{option.replace("-", "_"): how.get("default")})
    return parser


def parse(argv: list[str]) -> argparse.Namespace:
    """Read the command line. Raises InputError for a wrong one, before any work starts."""
    args = make_parser().parse_args(argv)
    args.models = [args.model] if args.model else list(EMBEDDED)
    one_file = args.sae is not None and args.sae.endswith(".safetensors")
    one_cell = args.model is not None and "all" not in (args.layer, args.head)
    require(one_cell or not one_file, f"--sae {args.sae} is one file, for one cell: name one "
            "--model, --layer and --head, or give a folder")
    require(args.sae or args.command != "train", "train: give --sae, where to keep what is learned")
    require(args.command != "compare" or args.what == "sizes" or not args.plot,
            "--plot draws sizes: leave it out, or give --what sizes")
    require(args.command != "steer" or "all" not in (args.layer, args.head), "steer: --layer and "
            "--head take one number each; --reach all is what edits every head")
    require((args.prompt is None) == (args.target is None), "give --prompt with --target")
    for path in filter(None, [args.json, args.plot, args.sae if one_file else None]):
        models.check_writable(path)
    return args


def main(argv: list[str]) -> int:
    """Run a command: 0; 2 after a line on stderr; 130 after Ctrl-C; 1 if stdout is closed."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # a terminal that knows no Greek
    try:
        args = parse(argv)
        command = COMMANDS[args.command]
        status = run_experiment(command, args) if command.heading else command.function(args)
        sys.stdout.flush()
        return status
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    except OSError as error:  # stdout: its reader has gone (as after `| head`), or it is full
        sys.stdout = open(os.devnull, "w")  # so that no more is written there at the exit
        if isinstance(error, BrokenPipeError):
            return 1
        print(f"error: stdout cannot be written ({error.strerror})", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
