r"""A run folder becomes one self-contained report.html: no script, nothing from the network.

What this is: the last page of every run, and rank_correlation(), which support/run.py needs too.
Which STEPs: none of its own. The page shows what STEPs 0 to 7 left in the run folder, above all whether the learned
reward means what it should:
    accuracy of the labels = share that agrees with true progress, by how far apart the two images of a pair are
    meaning of the reward  = learned reward beside true progress along an episode, and Spearman's rank correlation of
                             learned and true reward over fresh random episodes
The first lines name the labeler, and so does every chart, inside its image, because an image can be taken out of the
page: no stand-in and no oracle passes for a VLM.

Differs from the paper:
  1. Its figure of label accuracy has three parts: right, wrong, no preference. Ours has more, for an unsure model, an
     answer that nobody can parse and a call that failed are three different things.
  2. Reward and progress are scaled to [0, 1] over all recorded episodes, so that charts can be compared.

What is read of a run folder. A file that is missing, torn, absurd or huge costs its section, never the report:
    config.json, summary.json   one object each      metrics.csv    a row per evaluation
    labels.jsonl   a line per pair asked             episodes.csv   kind, episode, t, learned_reward, progress,
                                                                    true_reward
    pairs/000012.png, eval_before.gif, eval_after.gif     code_as_reward/   programs and their verification

Shapes: a table is {column: list of str}; a row is one object of labels.jsonl; an outcome is one of OUTCOMES.
Names: write_report, rank_correlation. Needs numpy, and Pillow for the moment at which two films differ most. Without
matplotlib, the numbers of its charts are tables.
Imports nothing of this project.

To use it elsewhere, write the files that you have in that form, and call write_report:
    from pathlib import Path
    from support.report import write_report
    Path("my_run").mkdir(exist_ok=True)
    Path("my_run/metrics.csv").write_text("step,eval_return\n0,-900\n500,-120\n1000,-35\n")
    print(write_report("my_run"))
"""
import base64
import csv
import io
import itertools
import json
import math
import os
import re
import shlex
import struct
import sys
import textwrap
import warnings
from collections import Counter
from dataclasses import dataclass
from html import escape
from pathlib import Path

import numpy as np

BLUE, GREEN, GOLD, VIOLET, MUTED = "#2467a8", "#2f8467", "#d29a1f", "#7d5ba6", "#6a6e76"
# What became of a pair that was sent: its colour, in the order of the stack and of the gallery.
OUTCOMES = {"right": BLUE, "wrong": "#c2452d", "tie": "#c9bfae", "not judged": GREEN,
            "unsure": GOLD, "unreadable": VIOLET, "no answer": "#9a9ea6"}
FILES = ("config.json", "metrics.csv", "labels.jsonl", "episodes.csv", "summary.json")
# Whoever filled the folder, the page stays one that a browser opens: bytes and lines read of a file,
# bytes and pixels a side of an image, characters of a text, rows of a table, points of a line.
MOST_BYTES, MOST_LINES, MOST_IMAGE, MOST_SIDE = 64 * 2**20, 200_000, 16 * 2**20, 8192
MOST_CHARACTERS, MOST_ROWS, MOST_POINTS = 100_000, 200, 2000
MOST_FILM = 1024  # px a side of a film whose images are compared
ROWS_FOR_A_CHART = 20  # of the table that stands in for a chart where there is no matplotlib
# The browser itself forbids scripts and requests: even an unescaped answer could do nothing.
HEAD = """<!doctype html><html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; img-src data:; style-src 'unsafe-inline'"><style>
:root { color-scheme: light dark; --ink: #22252b; --paper: #fdfcfa; --grey: #6a6e76; --line: #dcd8d0; --box: #f4f1ec }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e3e1dc; --paper: #17191d; --grey: #a3a6ad; --line: #3a3d44; --box: #22252b }
  .chart { filter: invert(.9) hue-rotate(180deg) } /* black on nothing becomes white on nothing, and blue stays blue */
}
body { margin: 0 auto; max-width: 68rem; padding: 2rem 1.2rem; color: var(--ink); background: var(--paper);
  font: 1rem/1.6 system-ui, sans-serif; overflow-wrap: break-word }
h1, h2, b { font-family: Georgia, serif } h2 { margin: 3rem 0 1rem; border-top: 1px solid var(--line) }
p { max-width: 46rem } figure { margin: 0; min-width: 0 } img { width: 100%; display: block }
.note, figcaption { color: var(--grey); font-size: .88rem; margin: .3rem 0 }
.missing, .doubt { border-left: 3px solid #d29a1f; padding-left: .8rem } .missing { color: var(--grey) }
.verdict { font-size: 1.15rem }
.grid { display: grid; gap: 1.4rem; margin: 1.2rem 0;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 26rem), 1fr)) }
.tiles { grid-template-columns: repeat(auto-fit, minmax(8.5rem, 1fr)); gap: .8rem }
.tiles b { display: block; font-size: 1.5rem } .films { grid-template-columns: 1fr 1fr }
.tiles div, .card, pre { background: var(--box); padding: .8rem 1rem; min-width: 0 }
.card { border-top: 3px solid } .said { white-space: pre-wrap; font-size: .9rem }
pre, .wide { overflow-x: auto; font-size: .85rem } table { border-collapse: collapse }
td, th { text-align: left; vertical-align: top; padding: .3rem 1.4rem .3rem 0; max-width: 40rem;
  border-bottom: 1px solid var(--line) } th { font-weight: 500; color: var(--grey) }
</style>"""


# ---- the run folder ----
@dataclass
class Run:
    """What could be read of a run folder; what is absent is an empty dict or list."""
    folder: Path
    config: dict
    summary: dict
    metrics: dict  # table
    episodes: dict  # table
    labels: list  # rows, one dict per pair asked
    labeler: str  # who compared the images, on one line
    cut: list  # names of files that are longer than what was read of them


def read_bytes(path, most=MOST_BYTES):
    """The first bytes of a file; none where there is no file that can be read."""
    try:
        if path.is_file():  # trap: a pipe or a device of that name would never end
            with open(path, "rb") as file:
                return file.read(most)
    except (OSError, ValueError):
        pass
    return b""


def read_text(path):
    """The text of a file, without the mark that some editors put first; '' where there is none."""
    return read_bytes(path).decode("utf-8-sig", "replace")


def read_json(text, kind=dict):
    """JSON text -> the object or list in it; an empty one where it is torn or something else."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return kind()
    return found if isinstance(found, kind) else kind()


def read_table(path):
    """A CSV file with a header -> {column: list of str}; {} where it has no row."""
    text = read_text(path)
    # trap: a killed run leaves half a line, and half of "-120" is a number too: no newline, no row
    try:
        lines = csv.reader(io.StringIO(text[:text.rfind("\n") + 1], newline=""))
        head, *rows = list(itertools.islice(lines, MOST_LINES)) or [[]]
    except csv.Error:  # a cell larger than any of ours
        return {}
    rows = [row for row in rows if len(row) == len(head)]
    return {name: [row[i] for row in rows] for i, name in enumerate(head)} if rows else {}


def read_run(folder):
    """Read a run folder; ValueError, one line, where there is none."""
    folder = Path(folder)
    if not any((folder / name).is_file() for name in FILES):
        raise ValueError(f"no run folder {str(folder)!r}: it has none of {', '.join(FILES)}")
    config, summary = (read_json(read_text(folder / name)) for name in (FILES[0], FILES[-1]))
    tables = (read_table(folder / f"{name}.csv") for name in ("metrics", "episodes"))
    lines = read_text(folder / "labels.jsonl").split("\n", MOST_LINES)[:MOST_LINES]
    labels = [row for row in map(read_json, lines) if row]
    cut = [name for name in FILES if (raw := read_bytes(folder / name, MOST_BYTES + 1))
           and (len(raw) > MOST_BYTES or raw.count(b"\n") > MOST_LINES)]
    labeler = " ".join(words(config.get("labeler") or "not recorded").split())
    return Run(folder, config, summary, *tables, labels, labeler, cut)


# ---- does the learned reward put states in the true order? ----
def rank_correlation(x, y):
    """Spearman's rank correlation of x (N,) and y (N,): 1 if both have the same order, -1 if the opposite one.

        rho = correlation of rank(x) and rank(y);   equal values share the mean of the ranks that they take up

    nan where one of the two never differs, holds a nan, or N < 2.  Example: (1, 2, 3), (10, 10, 30) -> 0.866.
    """
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    if x.ndim != 1 or x.shape != y.shape:
        raise ValueError(f"two lists of as many numbers are needed, not {x.shape} and {y.shape}")
    if len(x) < 2 or np.isnan([x, y]).any() or (x == x[0]).all() or (y == y[0]).all():
        return math.nan
    ranks = []
    for values in (x, y):
        _, place, count = np.unique(values, return_inverse=True, return_counts=True)
        ranks.append((np.cumsum(count) - (count - 1) / 2)[place])  # of 10, 10, 30: ranks 1.5, 1.5, 3
    return float(np.corrcoef(*ranks)[0, 1])


# ---- numbers and words ----
# What moves a terminal's cursor or turns the direction of writing, so that a text reads as another.
UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")


def words(value, depth=0):
    """Anything as text for people: floats rounded, lists and dicts joined, nothing for None."""
    if isinstance(value, (dict, list, tuple)):
        if depth > 4:  # trap: JSON may be nested deeper than Python can call itself
            return "..."
        parts = list(value.items() if isinstance(value, dict) else value)[:MOST_ROWS]
        value = "; ".join(": ".join(words(part, depth + 1) for part in pair)
                          for pair in (parts if isinstance(value, dict) else zip(parts)))
    if isinstance(value, float):
        return show(value)
    try:
        text = "" if value is None else str(value)
    except ValueError:  # an int of more digits than Python writes
        text = "a huge number"
    if len(text) > MOST_CHARACTERS:
        text = f"{text[:MOST_CHARACTERS]} ... ({len(text):,} characters)"
    text = UNSEEN.sub(lambda found: f"\\u{ord(found[0]):04x}", text.replace("\r\n", "\n"))
    # trap: JSON may hold half of a surrogate pair, which UTF-8 refuses
    return text.encode("utf-8", "replace").decode("utf-8")


def safe(value):
    """Anything as text for HTML. trap: the VLM's words, like every other string, are hostile."""
    return escape(words(value))


def number(value):
    """A finite float, or None: '' and 'nan' mean not known."""
    try:
        found = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return found if math.isfinite(found) else None


def show(value, percent=False):
    """A number to read: 12345 -> '12,345', .98765 -> '0.988', .5 in percent -> '50 %'."""
    value = number(value)
    if value is None:
        return "not known"
    if percent:
        return f"{100 * value:.3g} %"
    whole = (value == round(value) or abs(value) >= 1000) and abs(value) < 1e15
    text = f"{value:,.0f}" if whole else f"{value:.3g}"
    return text.replace("-", "\N{MINUS SIGN}")


def column(table, name):
    """(N,) float64 of a table's column, NaN where not known, as all of a missing column is."""
    rows = len(next(iter(table.values()), []))
    return np.array([number(cell) for cell in table.get(name, [None] * rows)], dtype=np.float64)


def last(table, name):
    """The last known value of a column, or None."""
    known = [cell for cell in column(table, name) if np.isfinite(cell)]
    return known[-1] if known else None


def difference(row):
    """How far apart a pair truly is: |progress of second - of first|, or None if not known."""
    progress = row.get("progress")
    known = [number(value) for value in progress] if isinstance(progress, list) else []
    # number() again: between two huge ones lies infinity
    return None if len(known) != 2 or None in known else number(abs(known[1] - known[0]))


def outcome(row):
    """What became of a pair: one of OUTCOMES; None if it was never sent."""
    kind, truth = row.get("kind"), row.get("true_label")
    if kind != "label":
        return kind if kind in ("unsure", "unreadable", "no answer") else None
    if truth not in (0, 1):  # -1: equally far from the goal, so that no label is right or wrong
        return "tie" if truth == -1 else "not judged"
    return "right" if row.get("label") == truth else "wrong"


def bin_outcomes(rows, bins=6):
    """Count outcomes by difference in true progress, in equal bins from 0 to the largest.

    rows -> edges (bins + 1,), counts {outcome: (bins,) int}; (None, {}) if nothing can be counted.
    Example: differences .1 right, .9 wrong, 1. right; bins=2 -> right (1, 1), wrong (0, 1).
    """
    known = [(difference(row), outcome(row)) for row in rows]
    known = [(apart, name) for apart, name in known if apart is not None and name is not None]
    if not known:
        return None, {}
    edges = np.linspace(0, max(apart for apart, _ in known) or 1.0, bins + 1)
    # np.histogram closes the last bin on both sides, so the largest difference is counted
    return edges, {name: np.histogram([apart for apart, its in known if its == name], edges)[0]
                   for name in OUTCOMES}


def choose_pairs(rows, n=12):
    """n instructive pairs, outcomes in turn: the hardest it got right, the plainest it did not."""
    groups = {name: [row for row in rows if outcome(row) == name] for name in OUTCOMES}
    for name, group in groups.items():
        group.sort(key=lambda row: difference(row) or 0.0, reverse=name != "right")
    picked = []
    while len(picked) < n and any(groups.values()):
        picked += [group.pop(0) for group in groups.values() if group][:n - len(picked)]
    return sorted(picked, key=lambda row: list(OUTCOMES).index(outcome(row)))


# ---- charts, or tables where there is no matplotlib ----
def matplotlib_or_none():
    """matplotlib, if it is installed: nothing else here needs it, and a run must not end for want of a drawing."""
    try:
        import matplotlib
        import matplotlib.figure  # not pyplot: no global state in a training process
    except ImportError:
        return None
    return matplotlib


def chart(run, title, draw, head, rows):
    """One chart, draw(axes) -> an SVG figure for the page; a line where it cannot be drawn.

    head: names of columns.  rows: the same numbers, lists of cells, which are a table where there is no matplotlib.
    """
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")  # of numbers too large to draw, of letters a font lacks
        return guarded(title, lambda: figure_of(run, title, draw) if matplotlib_or_none() else (
            f"<figure><b>{safe(title)}</b>{html_table(rows, head)}</figure>"))


def figure_of(run, title, draw):
    matplotlib = matplotlib_or_none()
    style = {"svg.fonttype": "none", "svg.hashsalt": title, "font.size": 9.5, "axes.grid": True,
             "text.parse_math": False,  # trap: "$" in a labeler's name is a dollar, not a formula
             "grid.color": "#dcd8d0", "axes.axisbelow": True, "axes.spines.top": False,
             "axes.spines.right": False}
    with matplotlib.rc_context(style):
        figure = matplotlib.figure.Figure(figsize=(5.2, 3.2))  # inches; small: its text must be readable on a phone
        axes = figure.add_axes((0.13, 0.29, 0.77, 0.56))  # (left, bottom, width, height)
        draw(axes)
        axes.set_title(title, loc="left", fontsize=10.5, weight="bold", pad=8)
        # Small, in a corner: the page has said it, but an image can be taken out of the page.
        figure.text(0.9, 0.99, f"labeler: {run.labeler}"[:100], ha="right", va="top", color=MUTED, fontsize=6)
        names = [name for part in figure.axes for name in part.get_legend_handles_labels()[1]]
        if names:
            figure.legend(loc="upper left", ncols=4 if max(map(len, names)) < 12 else 2,
                          bbox_to_anchor=(0.11, 0.16), frameon=False, fontsize=8.5)
        raw = io.BytesIO()
        figure.savefig(raw, format="svg", transparent=True, metadata={"Date": None})
    return embed(raw.getvalue(), "svg+xml", title, name="chart")


def thinned(known, most=MOST_POINTS):
    """(N,) bool -> the row numbers of at most so many of the known, evenly: more show no more."""
    rows = np.flatnonzero(known)
    return rows[::max(1, math.ceil(len(rows) / most))]


def few(rows):
    """Row numbers (K,) -> at most ROWS_FOR_A_CHART of them, evenly, the first and the last among them."""
    return rows[np.unique(np.linspace(0, len(rows) - 1, ROWS_FOR_A_CHART).astype(int))] if len(rows) else rows


def curves(run, title, columns, percent=False):
    """Columns of metrics.csv, {column: (colour, words)}, against steps; '' if none is known."""
    step, values = column(run.metrics, "step"), {name: column(run.metrics, name) for name in columns}
    known = {name: np.isfinite(step) & np.isfinite(values[name]) for name in columns}
    known = {name: there for name, there in known.items() if there.any()}
    if not known:
        return ""

    def draw(axes):
        for dash, (name, there) in zip(("-", "--", ":", "-."), known.items()):
            colour, label = columns[name]
            there = thinned(there)
            axes.plot(step[there], values[name][there], dash, color=colour, label=label, marker="o",
                      markersize=2)
        axes.set_xlabel("environment steps")
        axes.set_xlim(np.nanmin(step), np.nanmax(step) * 1.02 + 1)  # though a column begins late
        if percent:
            axes.set_ylim(-0.03, 1.05)
            axes.yaxis.set_major_formatter(lambda share, _: f"{100 * share:.0f} %")

    rows = few(np.flatnonzero(np.any(list(known.values()), axis=0)))
    return chart(run, title, draw, ["environment steps", *(columns[name][1] for name in known)], [
        [show(step[row]), *(show(values[name][row], percent) for name in known)] for row in rows])


def outcome_chart(run):
    """Stacked shares of the outcomes by difference in true progress, with counts; or ''."""
    edges, counts = bin_outcomes(run.labels)
    if edges is None:
        return ""
    total = sum(counts.values())  # (bins,)

    def draw(axes):
        bottom = np.zeros(len(total))
        for name, colour in OUTCOMES.items():
            share = counts[name] / np.maximum(total, 1)
            if counts[name].any():
                axes.bar(np.arange(len(total)), share, 0.92, bottom, color=colour, label=name)
            bottom += share
        for k, n in enumerate(total):
            axes.text(k, 1.02, f"{n:,}", ha="center", fontsize=8, color=MUTED)
        axes.set_xticks(np.arange(len(edges)) - 0.5, [f"{edge:.2g}" for edge in edges])
        axes.set_yticks([0, 0.5, 1], ["0", "50 %", "100 %"])
        axes.set_ylim(0, 1.1)
        axes.grid(axis="x", visible=False)
        axes.set_xlabel("difference in true progress of the two images")

    names = [name for name in OUTCOMES if counts[name].any()]
    return chart(run, "What became of the pairs (number of pairs on top)", draw, ["difference", "pairs", *names], [
        [f"{edges[k]:.2g} to {edges[k + 1]:.2g}", int(n), *(int(counts[name][k]) for name in names)]
        for k, n in enumerate(total)])


def episode_charts(run):
    """Reward and progress along one episode of each kind, and learned against true reward."""
    drawn = []
    episode, t, learned, progress, true = (column(run.episodes, name) for name in (
        "episode", "t", "learned_reward", "progress", "true_reward"))
    # object: trap: a table of fixed width has room for the longest word in every row
    kind = np.array(run.episodes.get("kind", ["?"] * len(t)), dtype=object)
    for name, title in (("random", "random actions"), ("after", "after learning"),
                        ("expert", "scripted expert")):
        its = (kind == name) & np.isfinite(learned) & np.isfinite(progress)
        if its.any():
            its = thinned(its & (episode == episode[its.argmax()]))  # the first episode of this kind

            def draw(axes, its=its):
                for values, dash, colour, label in ((learned, "-", BLUE, "learned reward"),
                                                    (progress, "--", GREEN, "true progress")):
                    low, high = np.nanmin(values), np.nanmax(values)  # of all kinds: they compare
                    axes.plot(t[its], (values[its] - low) / ((high - low) or 1), dash,
                              color=colour, label=label)
                axes.set_ylim(-0.05, 1.05)
                axes.set_xlabel("step of the episode")
            head = ["step", "learned reward", "true progress"]
            drawn.append(chart(run, f"Reward along an episode, {title}", draw, head, [
                map(show, (t[row], learned[row], progress[row])) for row in few(its)]))
    its = thinned((kind == "random") & np.isfinite(learned) & np.isfinite(true), 700)

    def scatter(axes):
        axes.plot(true[its], learned[its], "o", color=BLUE, markersize=3, alpha=0.45)
        axes.set_xlabel("true reward (the learner never sees it)")
        axes.set_ylabel("learned reward", labelpad=1)
    if len(its):
        rank = number(run.summary.get("spearman"))
        rank = "" if rank is None else f" (Spearman {show(rank)})"
        drawn.append(chart(
            run, f"Learned against true reward{rank}", scatter, ["true reward", "learned reward"], [
                map(show, (true[row], learned[row])) for row in few(its[np.argsort(true[its])])]))
    return drawn


# ---- parts of the page ----
def embed(raw, kind, alt, caption="", name="image"):
    """The bytes of an image or film as <figure>, all of it inside the page.  name: for the style sheet."""
    source = f"data:image/{kind};base64,{base64.b64encode(raw).decode()}"
    return (f'<figure><img src="{source}" alt="{safe(alt)}" class="{name}">'
            f"<figcaption>{safe(caption)}</figcaption></figure>")


def image_file(path, caption):
    """A file with an image or film as <figure>; one line where it is missing, empty, none, or huge."""
    raw = read_bytes(path, MOST_IMAGE + 1)
    if not raw:
        return missing(f"No {path.name}.")
    if raw[:8] == b"\x89PNG\r\n\x1a\n" and len(raw) >= 24:
        kind, sides = "png", struct.unpack(">II", raw[16:24])
    elif raw[:4] == b"GIF8" and len(raw) >= 10:
        kind, sides = "gif", struct.unpack("<HH", raw[6:10])
    else:  # not shown: a browser would not either, and a link may lead to any file of this machine
        return missing(f"{path.name} is no image.")
    # trap: a few kilobytes can unpack to gigabytes; the first bytes tell before
    if len(raw) > MOST_IMAGE or max(sides) > MOST_SIDE:
        return missing(f"{path.name} is too large to be shown.")
    return embed(raw, kind, path.name, caption)


def missing(what):
    return f'<p class="missing">{safe(what)}</p>'


def guarded(title, make):
    """make() -> what it returns, HTML; one line in its place where it cannot be made.

    Whatever somebody wrote into the folder, it costs the section that shows it, never the report.
    """
    try:
        return make()
    except Exception as error:  # strange content may raise anything, also deep inside matplotlib
        return missing(f"{title}: cannot be shown ({type(error).__name__}: {words(str(error))[:120]}).")


def charts(drawn, otherwise):
    """Charts side by side where the screen is wide enough; the line `otherwise` without any."""
    return f'<div class="grid">{"".join(drawn)}</div>' if any(drawn) else missing(otherwise)


def html_table(rows, head=()):
    """rows and head: sequences of anything; the table scrolls by itself on a narrow screen."""
    def line(cells, mark):
        return "<tr>" + "".join(f"<{mark}>{safe(cell)}</{mark}>" for cell in cells) + "</tr>"
    rows = list(rows)
    body = "".join(line(row, "td") for row in rows[:MOST_ROWS])
    if len(rows) > MOST_ROWS:
        body += line([f"... and {len(rows) - MOST_ROWS:,} more"], "td")
    return f'<div class="wide"><table>{line(head, "th") if head else ""}{body}</table></div>'


def verdict(run):
    """What became of it, in a few sentences: the goal, the reward, the doubts that the run itself had."""
    summary, first, words_of = run.summary, column(run.metrics, "eval_return"), []
    success, steps = now(run, "eval_success"), now(run, "step")
    if summary.get("finished") is False:
        words_of += [f"Interrupted after {show(steps)} of {show(run.config.get('total_steps'))} steps."]
    if success is not None:
        often = f"{show(success, percent=True)} of the last evaluation's episodes"
        words_of += [f"The goal is reached and held: at the end of {often}." if summary.get("held") is True else
                     f"The goal is not held: it is reached at the end of {often}."]
    elif np.isfinite(first).sum() > 1:
        first = first[np.isfinite(first)]
        words_of += ["No success is told here; the true return went from "
                     f"{show(first[0])} before learning to {show(first[-1])}."]
    right = now(run, "reward_accuracy")
    if right is not None:
        # A coin orders half of the pairs. The bounds are words, not a test.
        how = ("like a coin" if right < 0.65 else "better than a coin, but not well" if right < 0.8 else
               "fairly" if right < 0.9 else "well")
        words_of += [f"The learned reward orders {show(right, percent=True)} of the pairs of images as true progress "
                     f"does: {how}."]
    doubts = summary.get("doubts")
    doubts = [words(each) for each in doubts[:20] if isinstance(each, str)] if isinstance(doubts, list) else []
    return (f'<p class="verdict">{safe(" ".join(words_of))}</p>' if words_of else "") + "".join(
        f'<p class="doubt">{safe(each[:1].upper() + each[1:])}.</p>' for each in doubts)


def now(run, name):
    """The value of a column of metrics.csv as of the end of the run, or None: an interrupted run went on after its last
    evaluation, and its summary.json knows more.
    """
    found = number(run.summary.get({"step": "steps", "pairs_asked": "asked"}.get(name, name)))
    return last(run.metrics, name) if found is None else found


def most_different(run):
    """The image of eval_before.gif and of eval_after.gif at the moment at which they differ most, as figures; or ''."""
    films = []
    for when in ("before", "after"):
        raw = read_bytes(run.folder / f"eval_{when}.gif", MOST_IMAGE + 1)
        if raw[:4] != b"GIF8" or not 10 <= len(raw) <= MOST_IMAGE or max(struct.unpack("<HH", raw[6:10])) > MOST_FILM:
            return ""  # image_file() says why
        from PIL import Image, ImageSequence  # comes with imageio

        with Image.open(io.BytesIO(raw), formats=["GIF"]) as film:
            images = itertools.islice(ImageSequence.Iterator(film), 100)
            films.append([np.asarray(image.convert("RGB")) for image in images])
    if len({image.shape for film in films for image in film}) != 1:
        return ""
    # Films of as many images have one of the same steps; where an episode ended early, the last image stays.
    count = max(map(len, films))
    before, after = ([film[min(t, len(film) - 1)] for t in range(count)] for film in films)
    differ = [np.abs(b.astype(np.int16) - a).mean() for b, a in zip(before, after)]
    t = int(np.argmax(differ))
    if not differ[t]:
        return ""
    shown = ""
    for when, image in (("before", before[t]), ("after", after[t])):
        raw = io.BytesIO()
        Image.fromarray(image).save(raw, "PNG")
        shown += embed(raw.getvalue(), "png", f"{when} learning, image {t + 1} of {count}",
                       f"{when} learning, image {t + 1} of {count}: where the two differ most")
    return shown


def usage(run):
    """The lines that take the policy, and the learned reward, elsewhere."""
    folder = words(str(run.folder))
    lines = [f"policy, env = load_policy({folder!r})", "obs, info = env.reset(seed=0)",
             "obs, true_reward, terminated, truncated, info = env.step(policy(obs))  # and so on"]
    return (f"<pre>{safe(chr(10).join(['from support.afterwards import load_policy', '', *lines]))}</pre>"
            f"<p>A film of it: <code>{safe(shlex.join(['python', 'train.py', '--watch', folder]))}</code></p>")


def opening(run):
    """Goal, labeler, the verdict, the final numbers, the closing paragraph, and the policy before and after."""
    about = [f"{name}: {words(run.config.get(name, 'not recorded'))}"
             for name in ("env", "reward", "seed", "labeler")]
    absent = ", ".join(name for name in FILES if not os.path.exists(run.folder / name))
    ended = "" if run.summary else "This run has not ended; its last evaluation is shown. "
    evaluated = last(run.metrics, "step")
    at = "at the end" if evaluated == now(run, "step") else f"at step {show(evaluated)}"
    tiles = "".join(
        f'<div><b>{show(now(run, name), percent)}</b>'
        f'<span class="note">{title}</span></div>'
        for name, percent, title in (
            ("eval_return", False, f"true return, evaluated {at}"),
            ("eval_success", True, f"success, evaluated {at}"),
            ("label_accuracy", True, "of the labels are right"),
            ("reward_accuracy", True, "of pairs the reward orders rightly"),
            ("pairs_asked", False, "pairs asked"), ("step", False, "environment steps"))
        if now(run, name) is not None)
    no_charts = "" if matplotlib_or_none() else (
        "There are tables in place of charts. For charts: pip install matplotlib, then "
        f"python -m support.report {shlex.quote(str(run.folder))}")
    films = "".join(image_file(run.folder / f"eval_{when}.gif", f"the policy {when} learning")
                    for when in ("before", "after"))
    films += guarded("The moment at which they differ most", lambda: most_different(run))
    return (f"<h1>{safe(run.config.get('goal') or 'Goal not recorded')}</h1>"
            f'<p class="note">{safe(", ".join(about))}</p>'
            + (missing(f"{ended}Not in the run folder: {absent}.") if absent else "")
            + (missing(f"Too long to be read to its end: {', '.join(run.cut)}.") if run.cut else "")
            + (missing(no_charts) if no_charts else "")
            + verdict(run) + f'<div class="grid tiles">{tiles}</div><p>{safe(run.summary.get("text"))}</p>'
            f'<div class="grid films">{films}</div>')


def labels_section(run):
    """Accuracy of labels and reward over time, outcomes by difference, and how many of each."""
    drawn = [curves(run, "The labels, and the reward learned from them", percent=True, columns={
        "label_accuracy": (GOLD, "labels that are right"),
        "train_accuracy": (GREEN, "reward fits its labels"),
        "heldout_accuracy": (VIOLET, "reward predicts held-out labels"),
        "reward_accuracy": (BLUE, "reward orders pairs as the truth does")}), outcome_chart(run)]
    body = charts(drawn, "Neither metrics.csv nor labels.jsonl tells how right the labels are.")
    kinds = [outcome(row) or words(row.get("kind")) for row in run.labels]
    if kinds:
        found, order = Counter(kinds), list(OUTCOMES)
        names = sorted(found, key=lambda name: (order.index(name) if name in order else len(order), name))
        counts = [(name, found[name], show(found[name] / len(kinds), percent=True)) for name in names]
        body += html_table(counts, ("outcome", "pairs", "share")) + (
            '<p class="note">right, wrong, tie (two images equally far from the goal) and not '
            "judged (truth not known) became labels, the others did not: unsure, it said -1; "
            "unreadable, its answer could not be parsed; no answer, the call failed; identical "
            "and limit, never sent.</p>")
    return body


def gallery(run):
    """About a dozen pairs with the labeler's own words, folded behind the first of them; or ''."""
    def file_of(row):
        index = number(row.get("index")) or 0
        return run.folder / "pairs" / f"{int(index if 0 <= index < 1e9 else 0):06d}.png"
    sides, cards = {0: "left", 1: "right", -1: "neither", -2: "none"}, ""
    for row in choose_pairs([row for row in run.labels if os.path.exists(file_of(row))] or run.labels):
        label, truth = (sides.get(number(row.get(key)), "?") for key in ("label", "true_label"))
        label = safe(words(row["score"])) if "score" in row else label
        said = row.get("answers")
        said = "".join(
            f"<details><summary>{safe(textwrap.shorten(words(answer), 130, placeholder=' ...'))}"
            f'</summary><div class="said">{safe(answer)}</div></details>'
            for answer in (said[:10] if isinstance(said, list) else [said or "no words recorded"]))
        cost = ", ".join(f"{name} {words(row.get(name))}" for name in (
            "index", "step", "ends", "tokens_in", "tokens_out", "seconds", "cached") if words(row.get(name)))
        cards += (f'<div class="card" style="border-color: {OUTCOMES[outcome(row)]}">'
                  f"{image_file(file_of(row), '' if 'score' in row else 'first image left, second right')}"
                  f"<p><b>{outcome(row)}</b>: the answer is {label}, the truth {truth}, difference "
                  f'{show(difference(row))}</p>{said}<p class="note">{safe(cost)}</p></div>')
    return cards and (
        '<p class="note">Chosen to teach, no fair sample: the hardest pairs it got right, the '
        f'plainest ones it did not.</p><div class="grid">{cards}</div>')


def programs_section(run):
    """VLM-CaR: programs, verification, images they failed on; '' for every other run."""
    folder = run.folder / "code_as_reward"
    if not folder.is_dir():
        return ""
    checks = read_json(read_text(folder / "verification.json"), list)
    checks = [check for check in checks if isinstance(check, dict)]
    names = list(dict.fromkeys(name for check in checks for name in check))
    body = html_table([[check.get(name) for name in names] for check in checks],
                      [name.replace("_", " ") for name in names])
    for path in [*sorted(folder.glob("programs/*.py")), *sorted(folder.glob("failed/*.py"))][:50]:
        body += (f"<details><summary>{safe(path.parent.name)}: {safe(path.name)}</summary>"
                 f"<pre>{safe(read_text(path))}</pre></details>")
    failed = [image_file(path, path.stem) for path in sorted(folder.glob("failed/*.png"))[:12]]
    return f'{body}<div class="grid tiles">{"".join(failed)}</div>'


def write_report(folder):
    """Write FOLDER/report.html from whatever the run folder holds; returns its path.

    ValueError where there is no run folder, OSError where nothing can be written.
    """
    run = read_run(folder)
    config, summary = run.config, run.summary
    compares = config.get("reward", "preference") in ("preference", "preference+sparse", "score")  # was anybody asked?
    sections = {
        "How it learned": lambda: charts([
            curves(run, "Return of the evaluation episodes", {
                "eval_return": (BLUE, "true return")}),
            curves(run, "Success of the evaluation episodes", percent=True, columns={
                "eval_success": (BLUE, "at the last step"),
                "eval_success_any": (GREEN, "at any step"),
                "eval_success_frames": (VIOLET, "share of all steps"),
                "eval_success_drawn": (GOLD, "at the last step, actions drawn as in training")})],
            "metrics.csv has no evaluation: no learning curves."),
        "How right the labels are": lambda: compares and labels_section(run),
        "What the learned reward means": lambda: charts(
            episode_charts(run), "episodes.csv is missing or has no learned reward to draw."),
        "Pairs, in the labeler's own words": lambda: compares and (
            gallery(run) or missing("labels.jsonl has no pair to show.")),
        "The programs that are the reward": lambda: programs_section(run),  # '' for every other run
        "What it cost": lambda: html_table([
            (name.replace("_", " "), show(summary.get(name))) for name in (
                "seconds", "seconds_until_solved", "solved_step", "steps", "asked", "labels", "calls",
                "tokens_in", "tokens_out", "usd") if number(summary.get(name)) is not None]),
        "How to use the policy": lambda: summary and usage(run),
        "How to make it again": lambda: (
            f"<pre>{safe(config.get('command', 'no command recorded'))}</pre>"
            + html_table(config.items(), ("setting", "value")))}
    body = guarded("The opening", lambda: opening(run))
    for title, make in sections.items():
        content = guarded(title, make)
        body += f"<h2>{title}</h2>{content}" if content else ""
    title = f"{safe(config.get('env', 'run'))}, labeler: {safe(run.labeler)}"
    path, new = run.folder / "report.html", run.folder / "report.html.new"
    # trap: written anew beside it, for a link of that name would lead the page out of the folder; and
    # a kill half-way leaves no half a page
    new.unlink(missing_ok=True)
    with open(new, "x", encoding="utf-8") as file:
        file.write(f"{HEAD}<title>{title}</title></head><body>{body}</body></html>\n")
    os.replace(new, path)
    return path


if __name__ == "__main__":
    try:
        if len(sys.argv) != 2:
            raise ValueError("usage: python -m support.report RUN_FOLDER")
        print(write_report(sys.argv[1]))
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        sys.exit(2)
