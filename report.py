r"""report.py: a run folder becomes one self-contained report.html (no script, no network).

STEPs: none of its own. It shows what STEPs 0 to 7 left in the run folder, above all whether the
learned reward means what it should:
    accuracy of the labels = share that agrees with true progress, by how far apart a pair is
    meaning of the reward  = learned reward against true progress along an episode; Spearman's rank
                             correlation of learned and true reward over fresh random episodes
Every heading and chart names the labeler, so that no stand-in and no oracle passes for a VLM.

Differs from the paper: 1. its figure of label accuracy has three parts (right, wrong, no
preference), ours more: an unsure model, an answer nobody can parse and a failed call are three
different things. 2. reward and progress are both scaled to [0, 1] over all recorded episodes
together, so that before and after compare.

A run folder; a file that is missing or torn costs its section, never the report:
    config.json, summary.json   objects             metrics.csv, timing.csv   a row per evaluation
    labels.jsonl   a line per pair asked            episodes.csv   kind, episode, t, learned_reward
    pairs/000012.png, eval_before.gif, eval_after.gif   code_as_reward/ (programs, verification)
Names: a table is {column: list of str}; a row is one object of labels.jsonl; an outcome is one of
OUTCOMES. Needs numpy, matplotlib, imageio. Imports nothing from this repository.

To use it elsewhere: write the files you have, in that form, and call write_report:
    from pathlib import Path
    from report import write_report
    Path("my_run").mkdir(exist_ok=True)
    Path("my_run/metrics.csv").write_text("step,eval_return\n0,-900\n500,-120\n1000,-35\n")
    print(write_report("my_run"))
"""
import base64
import csv
import io
import json
import math
import re
import sys
import textwrap
from dataclasses import dataclass
from html import escape
from pathlib import Path

import numpy as np

# name: (on light paper, on dark paper). Charts are drawn in the first, then refer to the name.
# trap: no two colours may be equal, for a chart's colour is found again by its code.
PALETTE = {"paper": ("#fdfcfa", "#16181c"), "card": ("#f4f1ec", "#1f2228"),
           "ink": ("#22252b", "#e6e3dc"), "muted": ("#6a6e76", "#9da2ab"),
           "line": ("#dcd8d0", "#363a42"), "blue": ("#2467a8", "#74b1ee"),
           "red": ("#c2452d", "#f08a72"), "gold": ("#d29a1f", "#e9c163"),
           "violet": ("#7d5ba6", "#b99be0"), "grey": ("#9a9ea6", "#7b808a"),
           "sand": ("#c9bfae", "#5e584e"), "green": ("#2f8467", "#6cc7a6")}
INK = {name: light for name, (light, _) in PALETTE.items()}
# What became of a pair that was sent: its colour, in the order of the stack and of the gallery.
OUTCOMES = {"right": "blue", "wrong": "red", "tie": "sand", "not judged": "green",
            "unsure": "gold", "unreadable": "violet", "no answer": "grey"}
FILES = ("config.json", "metrics.csv", "labels.jsonl", "episodes.csv", "summary.json")
PICTURE_LIMIT, FILM_LIMIT = 100_000, 1_000_000  # bytes embedded as they are; larger ones shrink

STYLE = """
:root { color-scheme: light dark; LIGHT } @media (prefers-color-scheme: dark) { :root { DARK } }
:root { --serif: Georgia, "Liberation Serif", serif;
  --sans: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif }
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 68rem; padding: 2.5rem 1.25rem 5rem; color: var(--ink);
  background: var(--paper); font: 1rem/1.6 var(--sans); overflow-wrap: break-word }
h1 { font: 600 clamp(1.6rem, 4.5vw, 2.4rem)/1.25 var(--serif); margin: .2rem 0 .9rem }
h2 { font: 600 1.35rem/1.3 var(--serif); margin: 3.2rem 0 1rem; padding-top: 1rem;
  border-top: 1px solid var(--line) }
h2 small { display: block; font: .85rem/1.5 var(--sans); color: var(--muted) }
p { max-width: 46rem } figure { margin: 0 } svg, img { width: 100%; height: auto; display: block }
figure, .tiles div, .card { min-width: 0 } img { border-radius: .4rem }
svg text { font-family: var(--sans) !important }
.note, figcaption { color: var(--muted); font-size: .88rem; margin: .3rem 0 }
.badge { padding: .15rem .75rem; border-radius: 1rem; border: 1px solid var(--gold) }
.missing { border-left: 3px solid var(--gold); padding-left: .8rem; color: var(--muted) }
.grid { display: grid; gap: 1.4rem; margin: 1.2rem 0;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 26rem), 1fr)) }
.tiles { grid-template-columns: repeat(auto-fit, minmax(8.5rem, 1fr)); gap: .8rem }
.films { grid-template-columns: 1fr 1fr; max-width: 40rem }
.tiles div, .card { background: var(--card); border-radius: .6rem; padding: .8rem 1rem }
.tiles b { display: block; font: 600 1.5rem/1.3 var(--serif) }
.tiles span { color: var(--muted); font-size: .82rem; line-height: 1.3; display: block }
.card { border-top: 3px solid var(--line) } .card p { margin: .5rem 0 }
.said { white-space: pre-wrap; font-size: .9rem; margin: .2rem 0 .6rem; padding-left: .8rem;
  border-left: 2px solid var(--line) }
summary { cursor: pointer; margin: .3rem 0 } .start { font-size: .9rem }
details[open] .start { display: none } pre, .wide { overflow-x: auto }
pre { background: var(--card); padding: .8rem 1rem; border-radius: .4rem; font-size: .85rem }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums }
td, th { text-align: left; vertical-align: top; padding: .3rem 1.4rem .3rem 0; max-width: 40rem;
  border-bottom: 1px solid var(--line) } th { font-weight: 500; color: var(--muted) }
"""


# ---- the run folder ----
@dataclass
class Run:
    """What could be read of a run folder; what is absent is an empty dict or list."""
    folder: Path
    config: dict
    summary: dict
    metrics: dict  # table
    timing: dict  # table
    episodes: dict  # table
    labels: list  # rows, one dict per pair asked
    labeler: str  # who compared the pictures, on one line


def read_text(path):
    """The text of a file; '' where there is none."""
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


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
    head, *rows = list(csv.reader(text[:text.rfind("\n") + 1].splitlines())) or [[]]
    rows = [row for row in rows if len(row) == len(head)]
    return {name: [row[i] for row in rows] for i, name in enumerate(head)} if rows else {}


def read_run(folder):
    """Read a run folder; ValueError, one line, where there is none."""
    folder = Path(folder)
    if not any((folder / name).is_file() for name in FILES):
        raise ValueError(f"no run folder {str(folder)!r}: it has none of {', '.join(FILES)}")
    config, summary = (read_json(read_text(folder / name)) for name in (FILES[0], FILES[-1]))
    tables = (read_table(folder / f"{name}.csv") for name in ("metrics", "timing", "episodes"))
    labels = [read_json(line) for line in read_text(folder / "labels.jsonl").split("\n")]
    labeler = " ".join(words(config.get("labeler") or "not recorded").split())
    return Run(folder, config, summary, *tables, [row for row in labels if row], labeler)


# ---- numbers and words ----
def words(value):
    """Anything as text for people: floats rounded, lists and dicts joined, nothing for None."""
    if isinstance(value, dict):
        value = [f"{words(name)}: {words(part)}" for name, part in value.items()]
    if isinstance(value, (list, tuple)):
        return "; ".join(map(words, value))
    if isinstance(value, float):
        return show(value)
    if not isinstance(value, str):
        value = "" if value is None else str(value)
    # trap: JSON may hold half of a surrogate pair, which UTF-8 refuses
    return value.encode("utf-8", "replace").decode("utf-8")


def safe(value):
    """Anything as text for HTML. trap: the VLM's words, like every other string, are hostile."""
    return escape(words(value))


def number(value):
    """A finite float, or None: '' and 'nan' mean not known."""
    try:
        found = float(value)
    except (TypeError, ValueError):
        return None
    return found if math.isfinite(found) else None


def show(value, percent=False):
    """A number to read: 12345 -> '12,345', .98765 -> '0.988', .5 in percent -> '50 %'."""
    value = number(value)
    if value is None:
        return "not known"
    if percent:
        return f"{100 * value:.3g} %"
    text = f"{value:,.0f}" if value == round(value) or abs(value) >= 1000 else f"{value:.3g}"
    return text.replace("-", "\N{MINUS SIGN}")


def column(table, name):
    """(N,) float64 of a table's column, NaN where not known; (0,) if there is no such column."""
    return np.array([number(cell) for cell in table.get(name, [])], dtype=np.float64)


def last(table, name):
    """The last known value of a column, or None."""
    known = [cell for cell in column(table, name) if np.isfinite(cell)]
    return known[-1] if known else None


def difference(row):
    """How far apart a pair truly is: |progress of second - of first|, or None if not known."""
    progress = row.get("progress")
    known = [number(value) for value in progress] if isinstance(progress, list) else []
    return None if len(known) != 2 or None in known else abs(known[1] - known[0])


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


# ---- charts ----
def chart(title, labeler, draw):
    """Draw one chart, draw(axes), and return it as <svg> in the page's colours, light or dark."""
    import matplotlib
    from matplotlib.figure import Figure  # not pyplot: no global state in a training process
    style = {"svg.fonttype": "none", "svg.hashsalt": title, "font.size": 9.5,
             "text.parse_math": False,  # trap: "$" in a labeler's name is a dollar, not a formula
             "text.color": INK["ink"], "axes.edgecolor": INK["line"], "grid.color": INK["line"],
             "axes.labelcolor": INK["muted"], "xtick.color": INK["muted"], "axes.grid": True,
             "ytick.color": INK["muted"], "axes.axisbelow": True, "grid.linewidth": 0.6,
             "axes.spines.top": False, "axes.spines.right": False}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(5.2, 3.2))  # inches; small: its text must be readable on a phone
        axes = figure.add_axes((0.13, 0.29, 0.77, 0.56))  # (left, bottom, width, height)
        draw(axes)
        axes.set_title(title, loc="left", fontsize=10.5, weight="bold", pad=19)
        axes.annotate(f"labeler: {labeler}"[:80], (0, 1), (0, 6), "axes fraction",
                      textcoords="offset points", color=INK["muted"], fontsize=8.5)
        names = [name for part in figure.axes for name in part.get_legend_handles_labels()[1]]
        if names:
            figure.legend(loc="upper left", ncols=4 if max(map(len, names)) < 12 else 2,
                          bbox_to_anchor=(0.11, 0.16), frameon=False, fontsize=8.5)
        text = io.StringIO()
        figure.savefig(text, format="svg", transparent=True)
    svg = text.getvalue()
    svg = svg[svg.index("<svg"):]
    svg = re.sub(r'<metadata>.*?</metadata>| xmlns(:\w+)?="[^"]*"', "", svg, flags=re.DOTALL)
    # trap: all charts share one page, and with it one name space of ids
    mark = re.sub(r"\W", "", title)
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{mark}-", svg)
    for name, light in INK.items():
        svg = svg.replace(light, f"var(--{name})")
    return svg.replace("<svg", f'<svg role="img" aria-label="{safe(title)}"', 1)


def curves(title, run, columns, percent=False, pairs=False):
    """Columns of metrics.csv, {column: (colour, words)}, against steps; None if none is known."""
    step, asked = column(run.metrics, "step"), column(run.metrics, "pairs_asked")
    known = {name: column(run.metrics, name) for name in columns}
    known = {name: values for name, values in known.items() if np.isfinite(values).any()}
    if not known or not np.isfinite(step).any():
        return None

    def draw(axes):
        for dash, (name, values) in zip(("-", "--", ":", "-."), known.items()):
            there = np.isfinite(values) & np.isfinite(step)
            axes.plot(step[there], values[there], dash, color=INK[columns[name][0]],
                      label=columns[name][1], marker="o", markersize=3 if len(step) < 40 else 0)
        axes.set_xlabel("environment steps")
        if np.nanmax(step) > np.nanmin(step):  # the same axis for a column that begins late
            axes.set_xlim(np.nanmin(step), np.nanmax(step) * 1.02)
        if percent:
            axes.set_ylim(-0.03, 1.05)
            axes.yaxis.set_major_formatter(lambda share, _: f"{100 * share:.0f} %")
        if pairs and np.isfinite(asked).any():
            right = axes.twinx()
            right.fill_between(step, np.nan_to_num(asked), step="post", color=INK["gold"],
                               alpha=0.22, linewidth=0, label="pairs asked (right axis)")
            right.set_ylim(bottom=0)
            right.grid(False)
            axes.set_zorder(right.get_zorder() + 1)  # the curves in front of the area
            axes.patch.set_visible(False)
    return chart(title, run.labeler, draw)


def outcome_chart(run):
    """Stacked shares of the outcomes by difference in true progress, with counts; or None."""
    edges, counts = bin_outcomes(run.labels)
    if edges is None:
        return None
    total = sum(counts.values())  # (bins,)

    def draw(axes):
        bottom = np.zeros(len(total))
        for name, colour in OUTCOMES.items():
            share = counts[name] / np.maximum(total, 1)
            if counts[name].any():
                axes.bar(np.arange(len(total)), share, 0.92, bottom, color=INK[colour], label=name)
            bottom += share
        for k, n in enumerate(total):
            axes.text(k, 1.02, f"{n:,}", ha="center", fontsize=8, color=INK["muted"])
        axes.set_xticks(np.arange(len(edges)) - 0.5, [f"{edge:.2g}" for edge in edges])
        axes.set_yticks([0, 0.5, 1], ["0", "50 %", "100 %"])
        axes.set_ylim(0, 1.1)
        axes.grid(axis="x", visible=False)
        axes.set_xlabel("difference in true progress of the two pictures")
    return chart("What became of the pairs (number of pairs on top)", run.labeler, draw)


def episode_charts(run):
    """One chart per kind of episode: learned reward and true progress, both scaled to [0, 1]."""
    kind, episode = np.array(run.episodes.get("kind", [])), column(run.episodes, "episode")
    step, scaled, drawn = column(run.episodes, "t"), {}, []
    for name in ("learned_reward", "progress"):
        values = column(run.episodes, name)
        if np.isfinite(values).any():
            low, high = np.nanmin(values), np.nanmax(values)  # over all kinds: charts compare
            scaled[name] = (values - low) / ((high - low) or 1.0)
    for name, title in (("before", "before learning"), ("after", "after learning"),
                        ("expert", "scripted expert")):
        its = np.flatnonzero(kind == name)
        if len(its) and len(scaled) == 2 and len(step) == len(episode) == len(kind):
            its = its[episode[its] == episode[its[0]]]  # the first episode of this kind

            def draw(axes, its=its):
                axes.plot(step[its], scaled["learned_reward"][its], color=INK["blue"],
                          label="learned reward")
                axes.plot(step[its], scaled["progress"][its], "--", color=INK["green"],
                          label="true progress")
                axes.set_ylim(-0.05, 1.05)
                axes.set_xlabel("step of the episode")
            drawn.append(chart(f"Reward along an episode, {title}", run.labeler, draw))
    return drawn


def reward_scatter(run, most=700):
    """Learned against true reward over the fresh random episodes, evenly thinned to `most`."""
    kind = np.array(run.episodes.get("kind", []))
    learned, true = column(run.episodes, "learned_reward"), column(run.episodes, "true_reward")
    if not len(kind) == len(learned) == len(true):
        return None
    its = np.flatnonzero((kind == "random") & np.isfinite(learned) & np.isfinite(true))
    its = its[::max(1, math.ceil(len(its) / most))]
    if not len(its):
        return None

    def draw(axes):
        axes.plot(true[its], learned[its], "o", color=INK["blue"], markersize=3, alpha=0.45,
                  markeredgewidth=0)
        axes.set_xlabel("true reward (the learner never sees it)")
        axes.set_ylabel("learned reward", labelpad=1)
    rank = show(run.summary.get("spearman"))
    return chart(f"Learned against true reward (Spearman {rank})", run.labeler, draw)


# ---- parts of the page ----
def embed(path):
    """A picture or film as a data: address, shrunk if large; None if missing or unreadable."""
    import imageio.v3 as imageio
    try:
        raw, kind = path.read_bytes(), path.suffix[1:]
        if kind == "gif" and len(raw) > FILM_LIMIT:
            halve = 2 if len(raw) > 4 * FILM_LIMIT else 1
            thin = math.ceil(len(raw) / FILM_LIMIT / halve ** 2)  # each thin-th frame stays
            pause = imageio.immeta(path).get("duration", 50) * thin  # milliseconds a frame
            frames = imageio.imread(path, index=None)[::thin, ::halve, ::halve]  # (T, H, W, 3)
            raw = imageio.imwrite("<bytes>", frames, extension=".gif", duration=pause, loop=0)
        elif kind != "gif" and len(raw) > PICTURE_LIMIT:
            picture = imageio.imread(path)[..., :3]  # JPEG knows no transparency
            raw, kind = imageio.imwrite("<bytes>", picture, extension=".jpg", quality=85), "jpeg"
    except (OSError, ValueError, SyntaxError):  # the last is what a torn PNG raises
        return None
    return f"data:image/{kind};base64,{base64.b64encode(raw).decode()}" if raw else None


def heading(title, run):
    return f"<h2>{title}<small>labeler: {safe(run.labeler)}</small></h2>"


def missing(what):
    return f'<p class="missing">{safe(what)}</p>'


def picture(path, caption):
    """A figure, or the line that says which file is missing."""
    data = embed(path)
    shown = f'<img src="{data}" alt="{safe(caption)}">' if data else missing(f"No {path.name}.")
    return f"<figure>{shown}<figcaption>{safe(caption)}</figcaption></figure>"


def charts(drawn, otherwise):
    """Charts side by side where the screen is wide enough; the line `otherwise` without any."""
    there = "".join(f"<figure>{svg}</figure>" for svg in drawn if svg)
    return f'<div class="grid">{there}</div>' if there else missing(otherwise)


def html_table(rows, head=()):
    """rows and head: sequences of anything; the table scrolls by itself on a narrow screen."""
    def line(cells, mark):
        return "<tr>" + "".join(f"<{mark}>{safe(cell)}</{mark}>" for cell in cells) + "</tr>"
    body = "".join(line(row, "td") for row in rows)
    return f'<div class="wide"><table>{line(head, "th") if head else ""}{body}</table></div>'


def opening(run):
    """Goal, labeler, the final numbers, the closing paragraph, and the policy before and after."""
    config, metrics = run.config, run.metrics
    about = [safe(config.get(name, "not recorded")) for name in ("env", "reward", "seed")]
    parts = ['<p class="note">{}, reward: {}, seed {}</p>'.format(*about),
             f"<h1>{safe(config.get('goal') or 'Goal not recorded')}</h1>",
             f'<p class="note"><span class="badge">labeler: {safe(run.labeler)}</span></p>']
    absent = [name for name in FILES if not (run.folder / name).exists()]
    if absent:
        ended = "" if run.summary else "This run has not ended; its last evaluation is shown. "
        parts.append(missing(f"{ended}Not in the run folder: {', '.join(absent)}."))
    tiles = [(show(last(metrics, name), percent), title) for name, title, percent in (
        ("eval_return", "final return (true reward)", False),
        ("eval_success", "final success", True),
        ("label_accuracy", "of the labels are right", True),
        ("reward_accuracy", "of pairs the reward orders rightly", True),
        ("pairs_asked", "pairs asked", False),
        ("step", "environment steps", False)) if last(metrics, name) is not None]
    if number(run.summary.get("spearman")) is not None:
        tiles.append((show(run.summary["spearman"]), "rank correlation with the true reward"))
    tiles = "".join(f"<div><b>{value}</b><span>{title}</span></div>" for value, title in tiles)
    films = [picture(run.folder / f"eval_{when}.gif", f"the policy {when} learning")
             for when in ("before", "after")]
    parts += [f'<div class="grid tiles">{tiles}</div><p>{safe(run.summary.get("text"))}</p>',
              f'<div class="grid films">{"".join(films)}</div>']
    return "".join(parts)


def learning(run):
    return heading("How it learned", run) + charts([
        curves("Return of the evaluation episodes", run, {"eval_return": ("blue", "true return")},
               pairs=True),
        curves("Success of the evaluation episodes", run, percent=True, pairs=True, columns={
            "eval_success": ("blue", "at the last step"),
            "eval_success_any": ("green", "at any step"),
            "eval_success_frames": ("violet", "share of all steps")})],
        "metrics.csv has no evaluation: no learning curves.")


def labels_section(run):
    """Accuracy of labels and reward over time, outcomes by difference, and how many of each."""
    title = "The labels, and the reward learned from them"
    drawn = [curves(title, run, percent=True, columns={
        "label_accuracy": ("gold", "labels that are right"),
        "train_accuracy": ("green", "reward fits its labels"),
        "heldout_accuracy": ("violet", "reward predicts held-out labels"),
        "reward_accuracy": ("blue", "reward orders pairs as the truth does")}), outcome_chart(run)]
    text = charts(drawn, "Neither metrics.csv nor labels.jsonl tells how right the labels are.")
    kinds = [outcome(row) or words(row.get("kind")) for row in run.labels]
    if kinds:
        names = sorted(set(kinds), key=[*OUTCOMES, *sorted(set(kinds))].index)
        counts = [(name, kinds.count(name), show(kinds.count(name) / len(kinds), percent=True))
                  for name in names]
        text += html_table(counts, ("outcome", "pairs", "share")) + (
            '<p class="note">right, wrong, tie (two pictures equally far from the goal) and not '
            "judged (truth not known) became labels, the others did not: unsure, it said -1; "
            "unreadable, its answer could not be parsed; no answer, the call failed; identical "
            "and limit, never sent.</p>")
    return heading("How right the labels are", run) + text


def reward_section(run):
    return heading("What the learned reward means", run) + charts(
        [*episode_charts(run), reward_scatter(run)],
        "episodes.csv is missing or empty: no reward to draw.")


def answers_of(row):
    """What was said about one pair, in full; a long answer folded behind its first words."""
    said, ends = (value if isinstance(value, list) else [] if value is None else [value]
                  for value in (row.get("answers"), row.get("ends")))
    stages = ("describes", "decides") if len(said) == 2 else ["answers"] * len(said)
    text = ""
    for stage, answer, end in zip(stages, map(words, said), [*ends, *[None] * len(said)]):
        end = f" (ended: {words(end)})" if end and end != "complete" else ""
        stage = f'<span class="note">it {stage}{safe(end)}</span>'
        full = f'<div class="said">{safe(answer) or "(empty)"}</div>'
        if len(answer) > 240:
            start = safe(textwrap.shorten(answer, 130, placeholder=" ..."))
            text += (f'<details><summary>{stage} <span class="start">{start}</span></summary>'
                     f"{full}</details>")
        else:
            text += stage + full
    return text or '<p class="note">no words recorded</p>'


def gallery(run):
    """About a dozen pairs with the labeler's own words."""
    def file_of(row):
        return run.folder / "pairs" / f"{int(number(row.get('index')) or 0):06d}.png"
    title = heading("Pairs, in the labeler's own words", run)
    chosen = choose_pairs([row for row in run.labels if file_of(row).exists()] or run.labels)
    if not chosen:
        return title + missing("labels.jsonl has no pair to show.")
    sides, cards = {0: "left", 1: "right", -1: "neither", -2: "none"}, []
    for row in chosen:
        label, truth = (sides.get(number(row.get(key)), "?") for key in ("label", "true_label"))
        cost = [f"pair {words(row.get('index'))}, step {words(row.get('step'))}"]
        cost += [f"{show(row[key])} {unit}" for key, unit in (
            ("tokens_in", "tokens in"), ("tokens_out", "tokens out"), ("seconds", "s"))
            if number(row.get(key)) is not None]
        cost += ["from the cache"] if row.get("cached") else []
        cards.append(
            f'<div class="card" style="border-color: var(--{OUTCOMES[outcome(row)]})">'
            f"{picture(file_of(row), 'first picture left, second right')}"
            f"<p><b>{outcome(row)}</b>: the answer is {label}, the truth {truth}, difference "
            f"{show(difference(row))}</p>{answers_of(row)}"
            f'<p class="note">{safe(", ".join(cost))}</p></div>')
    return (f'{title}<p class="note">Chosen to teach, no fair sample: the hardest pairs it got '
            f'right, the plainest ones it did not.</p><div class="grid">{"".join(cards)}</div>')


def programs_section(run):
    """VLM-CaR: programs, verification, pictures they failed on; '' for every other run."""
    folder = run.folder / "code_as_reward"
    if not folder.is_dir():
        return ""
    checks = read_json(read_text(folder / "verification.json"), list)
    checks = [check for check in checks if isinstance(check, dict)]
    names = list(dict.fromkeys(name for check in checks for name in check))
    text = html_table([[check.get(name) for name in names] for check in checks],
                      [name.replace("_", " ") for name in names])
    for path in [*sorted(folder.glob("programs/*.py")), *sorted(folder.glob("failed/*.py"))]:
        text += (f"<details><summary>{safe(path.parent.name)}: {safe(path.name)}</summary>"
                 f"<pre>{safe(read_text(path))}</pre></details>")
    failed = [picture(path, path.stem) for path in sorted(folder.glob("failed/*.png"))[:12]]
    return (heading("The programs that are the reward", run)
            + (text or missing("code_as_reward/ has no program yet."))
            + f'<div class="grid">{"".join(failed)}</div>')


def cost_section(run):
    """Time, tokens and money; what the summary lacks comes from the other files."""
    def known(key):
        return [value for row in run.labels if (value := number(row.get(key))) is not None]
    summary, steps = run.summary, last(run.timing, "step")
    seconds = number(summary.get("seconds", last(run.timing, "seconds")))
    rows = {"seconds, whole run": seconds,
            "seconds until solved": summary.get("seconds_until_solved"),
            "solved at step": summary.get("solved_step"),
            "environment steps a second": steps / seconds if steps and seconds else None,
            "pairs asked": last(run.metrics, "pairs_asked"),
            "labels": last(run.metrics, "labels"),
            "tokens in": summary.get("tokens_in", sum(known("tokens_in"))),
            "tokens out": summary.get("tokens_out", sum(known("tokens_out"))),
            "seconds a pair, median": np.median(known("seconds")) if known("seconds") else None,
            "pairs from the cache": sum(bool(row.get("cached")) for row in run.labels),
            "US dollars": summary.get("usd")}
    return heading("What it cost", run) + html_table([(name, show(rows[name])) for name in rows])


def settings(run):
    """The command, and every setting it resolved to."""
    command = run.config.get("command")
    text = f"<pre>{safe(command)}</pre>" if command else missing("config.json has no command.")
    rows = [(name, value) for name, value in run.config.items() if name != "command"]
    return heading("How to make it again", run) + text + html_table(rows, ("setting", "value"))


def write_report(folder):
    """Write FOLDER/report.html from whatever the run folder holds; returns its path."""
    run = read_run(folder)
    light, dark = ("; ".join(f"--{name}: {PALETTE[name][k]}" for name in PALETTE) for k in (0, 1))
    sections = (opening, learning, labels_section, reward_section, gallery, programs_section,
                cost_section, settings)
    # this policy forbids scripts and requests: even an unescaped answer could do nothing
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    page = ('<!doctype html><html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
            f"<title>{safe(run.config.get('env', 'run'))}, labeler: {safe(run.labeler)}</title>"
            f"<style>{STYLE.replace('LIGHT', light).replace('DARK', dark)}</style></head><body>"
            + "".join(section(run) for section in sections) + "</body></html>\n")
    path = run.folder / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


if __name__ == "__main__":
    try:
        if len(sys.argv) != 2:
            raise ValueError("usage: python report.py RUN_FOLDER")
        print(write_report(sys.argv[1]))
    except ValueError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
