"""Plots of a sweep: results/NAME.csv -> results/NAME.png, and the learning curves beside it.

    python -m tools.plots results/NAME.csv [MEASURE]       python -m tools.plots RUN_FOLDER [RUN_FOLDER ...] IMAGE.png

What this is: how the plots in results/ were made. Which STEPs: none. The number that stands for a few seeds is the
interquartile mean with a 95 % bootstrap interval (Agarwal et al., NeurIPS 2021, arXiv 2108.13264):
    IQM(x_1 .. x_n) = mean of the x that are left without the n // 4 smallest and the n // 4 largest
    interval        = 2.5 % and 97.5 % quantile of the IQM of n seeds drawn from the n with replacement, 2000 times
Three seeds leave nothing out: their IQM is the mean. One seed has no interval, and none is drawn.
Which plot: a column that varies by number (max_pairs, vlm_mistakes, ...; three values or more) becomes the
horizontal axis, what else varies becomes the lines; else (also where more than three columns vary) a setting is a dot.
Learning curves are drawn for at most eight settings. Every title names the labeler, so that no stand-in and no oracle
passes for a VLM.

Shapes: values (n,) of n seeds, or (n, T) of n seeds at T steps.  Names: iqm, interval, plot.
Needs numpy and matplotlib. Imports nothing of this project.

To use it elsewhere:
    import numpy as np
    from tools import plots
    values = np.array([0.9, 1.0, 0.8, 0.95, 0.1])  # (n,) one number a seed
    low, high = plots.interval(values)
    print(f"{plots.iqm(values):.2f} [{low:.2f}, {high:.2f}]")
    # plots.plot("results/few_questions.csv") -> the paths of the plots it drew
"""
import argparse
import csv
import json
import re
import sys
from pathlib import Path

import numpy as np

# Mid-tones that read on white and on black paper alike, in an order in which neighbours differ without colour vision.
COLOURS = ("#3b8ad0", "#dd7a2b", "#2f9e77", "#b06fc4", "#c9535b", "#a58a2a", "#4aa3ad", "#8a7f78")
MARKS, INK = "osD^vPX*", "#868b93"
NOT_SETTINGS = ("task", "method", "setting", "seed", "steps", "pairs_asked", "labels", "label_accuracy",
                "reward_accuracy", "spearman", "spearman_expert", "eval_return", "eval_success", "eval_success_any",
                "eval_success_frames", "eval_success_drawn", "success_last_third", "held", "solved_step",
                "seconds_until_solved", "seconds", "labeler", "command", "error")
MOST_LINES = 8


# ---- the numbers ----
def iqm(values, axis=0):
    """Interquartile mean over the seeds: the mean without a quarter of them at each end.  (n, ...) -> (...)"""
    values = np.sort(np.moveaxis(np.asarray(values, float), axis, 0), axis=0)
    quarter = len(values) // 4
    return values[quarter : len(values) - quarter].mean(0)


def interval(values, draws=2000, seed=0):
    """95 % bootstrap interval of the IQM over the seeds.  (n, ...) -> low (...), high (...)"""
    rows = np.random.default_rng(seed).integers(0, len(values), (draws, len(values)))
    return np.quantile(iqm(np.asarray(values)[rows], axis=1), (0.025, 0.975), axis=0)  # [rows]: (draws, n, ...)


def number(text):
    """A cell -> float, NaN where it is none."""
    try:
        return float(text)
    except (TypeError, ValueError):
        return float("nan")


def read(path):
    """The rows of a CSV file; ValueError where there is none."""
    try:
        with open(path, newline="") as file:
            return list(csv.DictReader(file))
    except OSError as error:
        raise ValueError(f"no results: {error}") from None


def groups(rows, *names):
    """{values of the names: rows}, in the order of first appearance."""
    found = {}
    for row in rows:
        found.setdefault(tuple(row[name] for name in names), []).append(row)
    return found


def axes_of(rows):
    """Which columns vary -> (those that vary by number and can be an x axis, all that vary)."""
    varied = [name for name in rows[0] if name not in NOT_SETTINGS and len({row[name] for row in rows}) > 1]
    numeric = [name for name in varied if all(np.isfinite(number(row[name])) for row in rows)
               and len({row[name] for row in rows}) > 2]
    # a column that follows another (questions a session, from questions in all) is no axis of its own
    follows = [b for i, b in enumerate(numeric) for a in numeric[:i] if follow(rows, a, b)]
    return [name for name in numeric if name not in follows], [name for name in varied if name not in follows]


def follow(rows, a, b):
    """Whether the value of a settles that of b."""
    return len({(row[a], row[b]) for row in rows}) == len({row[a] for row in rows})


def others_at_rest(rows, x, axes):
    """The rows in which every other axis has its smallest value: one change at a time."""
    for other in (name for name in axes if name != x):
        least = min(number(row[other]) for row in rows)
        if not any(number(row[other]) > least and number(row[x]) > min(number(r[x]) for r in rows) for row in rows):
            rows = [row for row in rows if number(row[other]) == least]
    return rows


def labelers(rows):
    """Who compared the images, on one line. An axis or a name has the share of wrong labels, or the judge, already."""
    known = r", wrong on purpose in \S+?%|(?<=published figures), judge [^)]*|(?<=neural judge), judge [^)]*"
    names = dict.fromkeys((row["method"], re.sub(known, "", row["labeler"])) for row in rows)
    names = [pair for pair in names if pair[1] and not pair[1].startswith("nobody")]
    return "; ".join(f"{name} ({method})" if len(names) > 1 else name for method, name in names) or "nobody"


def spread(rows):
    """What lines and bands are, and of how many seeds, for a title."""
    runs = groups(rows, "task", "method", "setting").values()
    least, most = (extreme(len({row["seed"] for row in its}) for its in runs) for extreme in (min, max))
    seeds = f"{least} to {most} seeds" if least < most else f"{most} seed{'s' * (most > 1)}"
    return f"(IQM and 95 % bootstrap interval of {seeds})"


# ---- the plots ----
def canvas(columns, rows, title, labeler):
    """A transparent figure with columns x rows panels -> (figure, axes (rows, columns))."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(max(3.4 * columns, 5.5), 2.7 * rows + 0.9), layout="constrained", facecolor="none")
    figure.suptitle(f"{title}\nlabeler: {labeler}", color=INK, fontsize=10)
    axes = figure.subplots(rows, columns, squeeze=False)
    for ax in axes.flat:
        ax.set_facecolor("none")
        ax.tick_params(colors=INK, labelsize=8)
        ax.grid(color=INK, alpha=0.25, linewidth=0.6)
        for side, spine in ax.spines.items():
            spine.set_color(INK)
            spine.set_visible(side in ("left", "bottom"))
    return figure, axes


def finish(figure, axes, path):
    """One legend below all panels, and the file -> its path."""
    named = {}
    for ax in axes.flat:
        handles, names = ax.get_legend_handles_labels()
        named.update(zip(names, handles))
    if len(named) > 1:
        figure.legend(named.values(), named.keys(), loc="outside lower center", ncols=min(4, len(named)),
                      frameon=False, labelcolor=INK, fontsize=9)
    figure.savefig(path, dpi=160, transparent=True)
    return str(path)


def line(ax, x, values, name, order):
    """One line with its interval.  x (T,); values: list of T arrays of seeds."""
    colour = COLOURS[order % len(COLOURS)]
    ax.plot(x, [iqm(each) for each in values], color=colour, label=name, linewidth=1.8,
            marker=MARKS[order % len(MARKS)], markersize=4 if len(x) < 15 else 0)
    low, high = np.transpose([interval(each) for each in values])
    ax.fill_between(x, low, high, color=colour, alpha=0.2, linewidth=0)


def draw_axis(path, rows, x, axes, varied, measure):
    """The measure against the values of x: a panel a task, a line for every combination of what else varies."""
    rows = others_at_rest(rows, x, axes)
    tasks = {task: its for task, its in groups(rows, "task").items() if len({row[x] for row in its}) > 1}  # no lone dot
    others = ["method"] + [name for name in varied if name != x and name not in ("reward", "labels")]
    others = [name for name in others if len({row[name] for row in rows}) > 1]
    figure, panels = canvas(len(tasks), 1, f"{words(measure)} by {words(x)} {spread(rows)}", labelers(rows))
    for ax, ((task,), its) in zip(panels[0], tasks.items()):
        for order, (key, cells) in enumerate(groups(its, *others).items()):
            at = {number(value): np.array([number(row[measure]) for row in seeds])
                  for (value,), seeds in groups(cells, x).items()}
            name = " ".join(words(each) if np.isnan(number(each)) else f"{words(what)} {each}"
                            for what, each in zip(others, key))
            line(ax, *zip(*sorted(at.items())), name or measure, order)
        points = sorted({number(row[x]) for row in its})  # of all lines
        if min(points) > 0 and max(points) / min(points) >= 20:
            ax.set_xscale("log")
        ax.set_xticks(points, [f"{point:g}" for point in points])
        ax.minorticks_off()
        dress(ax, task, x, measure)
    return finish(figure, panels, path)


def draw_dots(path, rows, measure):
    """The measure of each setting as a dot with its interval: a panel a task."""
    tasks, settings = groups(rows, "task"), [key[0] for key in groups(rows, "setting")]
    columns = min(4, len(tasks))
    figure, panels = canvas(columns, -(-len(tasks) // columns), f"{words(measure)} {spread(rows)}", labelers(rows))
    for ax in panels.flat[len(tasks):]:
        ax.set_visible(False)
    for ax, ((task,), its) in zip(panels.flat, tasks.items()):
        for (setting,), seeds in groups(its, "setting").items():
            values, y = np.array([number(row[measure]) for row in seeds]), -settings.index(setting)
            ax.plot(*np.array([interval(values), [y, y]]), color=COLOURS[0], linewidth=5, alpha=0.35,
                    solid_capstyle="butt")
            ax.plot(iqm(values), y, "o", color=COLOURS[0], markersize=6)
            ax.plot(values, [y] * len(values), "|", color=INK, markersize=7)  # each seed
        ax.set_yticks([-i for i in range(len(settings))], settings)
        ax.set_ylim(0.6 - len(settings), 0.4)
        dress(ax, task, measure, None)
    return finish(figure, panels, path)


def draw_curves(path, rows, labeler, measure):
    """Learning curves: the measure against environment steps, a panel a task, a line a setting."""
    tasks, settings = groups(rows, "task"), [key[0] for key in groups(rows, "setting")]
    columns = min(4, len(tasks))
    figure, panels = canvas(columns, -(-len(tasks) // columns), f"{words(measure)} while learning {spread(rows)}",
                            labeler)
    for ax in panels.flat[len(tasks):]:
        ax.set_visible(False)
    for ax, ((task,), its) in zip(panels.flat, tasks.items()):
        for (setting,), cells in groups(its, "setting").items():
            at = {number(step): np.array([number(row[measure]) for row in seeds])
                  for (step,), seeds in groups(cells, "step").items()}
            points = sorted(at)
            line(ax, points, [at[point] for point in points], setting, settings.index(setting))
        dress(ax, task, "environment steps", measure)
    return finish(figure, panels, path)


def dress(ax, title, x_name, y_name):
    """Title, axis names, and percent for what is a share."""
    ax.set_title(title, color=INK, fontsize=10, weight="bold", loc="left")
    for name, axis, limits in ((x_name, ax.xaxis, ax.set_xlim), (y_name, ax.yaxis, ax.set_ylim)):
        axis.set_label_text(words(name or ""), color=INK, fontsize=9)
        if name and ("success" in name or "accuracy" in name):
            limits(-0.04, 1.04)
        if name and any(part in name for part in ("success", "accuracy", "mistakes", "unsure")):
            axis.set_major_formatter(lambda share, _: f"{100 * share:.0f} %")


def words(name):
    """A column's name for people."""
    return {"eval_success": "success at the end", "eval_success_any": "success at any time", "eval_return": "return",
            "success_last_third": "success in the last third of the run", "max_pairs": "pairs that may be asked",
            "vlm_mistakes": "wrong labels", "vlm_unsure": "unsure answers", "judge": "simulated judge",
            "spearman": "Spearman, learned and true reward"}.get(name, name.replace("_", " "))


def plot(path, measure="eval_success"):
    """Draw a results file -> the paths of the plots. Rows with an error are left out."""
    path = Path(path)
    table = read(path)
    if not table or not {"setting", "error", measure} <= set(table[0]):
        raise ValueError(f"{path} is no table of sweep.py with a column {measure}")
    rows = [row for row in table if not row["error"] and np.isfinite(number(row[measure]))]
    if not rows:
        raise ValueError(f"{path} has no finished run with {measure}; for another column: "
                         f"python -m tools.plots {path} eval_return")
    axes, varied = axes_of(rows)
    axes = axes if len(varied) <= 3 else []  # many things, each changed once: settings beside each other
    stem = path.stem if measure == "eval_success" else f"{path.stem}_{measure}"
    names = {x: path.with_name(f"{stem}_{x}.png" if len(axes) > 1 else f"{stem}.png") for x in axes}
    drawn = [draw_axis(names[x], rows, x, axes, varied, measure) for x in axes]
    drawn = drawn or [draw_dots(path.with_name(f"{stem}.png"), rows, measure)]
    curves = path.with_name(f"{path.stem}_curves.csv")
    if measure == "eval_success" and curves.exists() and len({row["setting"] for row in rows}) <= MOST_LINES:
        drawn.append(draw_curves(curves.with_suffix(".png"), read(curves), labelers(rows), measure))
    return drawn


def draw_run(folder, path):
    """One run in a row, for a README or a slide: the pair that differs most, its answer, and how it was learned."""
    import imageio.v3 as imageio
    from matplotlib import pyplot

    folder = Path(folder)
    config = json.loads((folder / "config.json").read_text())
    pairs = [json.loads(line) for line in (folder / "labels.jsonl").read_text().splitlines()]
    pair = max((pair for pair in pairs if pair["label"] in (0, 1)), key=lambda p: abs(np.diff(p["progress"]))[0])
    said = [line for answer in pair["answers"] for line in answer.splitlines() if "not a VLM" not in line]
    episode = [row for row in read(folder / "episodes.csv") if row["kind"] == "random" and row["episode"] == "0"]
    curve = [row for row in read(folder / "metrics.csv")]
    figure, axes = pyplot.subplots(1, 3, figsize=(15, 4), width_ratios=(1.4, 1, 1), layout="constrained")
    axes[0].imshow(imageio.imread(folder / "pairs" / f"{pair['index']:06d}.png"))
    axes[0].set(xticks=[], yticks=[], title=f"\"{config['goal']}\"", xlabel="\n".join(said))
    for name, colour in (("learned_reward", COLOURS[0]), ("true_reward", COLOURS[1])):
        values = np.array([number(row[name]) for row in episode])
        axes[1].plot((values - values.min()) / max(np.ptp(values), 1e-9), color=colour, label=name.replace("_", " "))
    dress(axes[1], "along a random episode, each scaled to 0..1", "step", "reward")
    axes[1].legend(frameon=False)
    steps, returns = ([number(row[name]) for row in curve] for name in ("step", "eval_return"))
    axes[2].plot(steps, returns, color=COLOURS[0])
    dress(axes[2], f"true return; {curve[-1]['pairs_asked']} pairs asked", "environment steps", "return")
    figure.suptitle(f"{config['env']}, labels from: {config['labeler']}", color=INK)
    figure.savefig(path, dpi=80, facecolor="white")
    return str(path)


def draw_alignment(folders, path):
    """Learned reward and progress along an expert's episode, each from 0 to 1: a panel a task, a line a run.

    Runs of one method, whatever their seed, have one colour.
    """
    runs = [(json.loads((Path(folder) / "config.json").read_text()), folder) for folder in folders]
    for config, _ in runs:
        config["method"] = config["labels"] if config["labels"] == "oracle" else config["reward"]
    tasks = groups([{**config, "folder": folder} for config, folder in runs], "env")
    methods = list(dict.fromkeys(config["method"] for config, _ in runs))
    columns = min(4, len(tasks))
    figure, panels = canvas(columns, -(-len(tasks) // columns), "Reward along an episode of the expert",
                            "; ".join(dict.fromkeys(config["labeler"] for config, _ in runs)))
    for ax in panels.flat[len(tasks):]:
        ax.set_visible(False)
    for ax, ((task,), its) in zip(panels.flat, tasks.items()):
        for config in its:
            rows = [row for row in read(Path(config["folder"]) / "episodes.csv") if row["kind"] == "expert"]
            for name, column in {"true progress": "progress", f"{config['method']} reward": "learned_reward"}.items():
                values = np.array([number(row[column]) for row in rows])
                colour = INK if column == "progress" else COLOURS[methods.index(config["method"]) % len(COLOURS)]
                ax.plot((values - values.min()) / max(np.ptp(values), 1e-9), label=name, color=colour, linewidth=1.8)
        dress(ax, task, "step", None)
    return finish(figure, panels, path)


def main(arguments):
    parser = argparse.ArgumentParser(prog="python -m tools.plots", description=(__doc__ or "").partition("\n")[0],
                                     usage="%(prog)s results/NAME.csv [MEASURE] | RUN_FOLDER ... IMAGE.png")
    parser.add_argument("arguments", nargs="*", metavar="TABLE or FOLDER ...",
                        help="a table of sweep.py, and which of its columns to draw (default: eval_success); or "
                        "run folders and an image to write: one run in a row, or the reward of several along an "
                        "expert's episode")
    arguments = parser.parse_args(arguments).arguments
    if len(arguments) > 1 and all(map(Path.is_dir, map(Path, arguments[:-1]))):
        # several folders: their rewards along the expert's episode
        print(draw_run(*arguments) if len(arguments) == 2 else draw_alignment(arguments[:-1], arguments[-1]))
    elif 1 <= len(arguments) <= 2:
        print("\n".join(plot(*arguments)))
    else:
        raise ValueError("give a table of sweep.py, or run folders and the name of an image; see the top of plots.py")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ValueError, OSError) as error:
        sys.exit(f"plots.py: {error}")
