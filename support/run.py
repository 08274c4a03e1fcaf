"""The folder that a run leaves behind: what was set, measured and paid for, and how a run goes on.

What this is: everything around the loops of train.py that is neither the algorithm nor a setting. One class, Run, owns the
run folder.
Which STEPs: none.

The run folder:
  config.json    every setting, the labeler's name, and the command that makes the run again
  metrics.csv    a row per evaluation; no clock in it, so the same seed gives the same bytes
  timing.csv     the clock
  labels.jsonl   a line per pair asked, on disk before it is used: answers in full, label, true
                 label, tokens, seconds
  pairs/*.png    what was asked, first image left, second right
  checkpoint/    state.pt: everything that `--resume` needs and that is in no other file
  buffer/        the pictures
  episodes.csv   learned reward beside true progress, step by step, at the end
  eval_*.gif, summary.json, report.html; code_as_reward/: the programs of --reward code
  .lock          held by the process that is at work here

A run folder given to --resume may be a stranger's: claim(), read_json() and to_name_again() see to
it that it runs no code, gets no key and leads no write astray; its settings are checked as flags.

The same run, byte for byte, after `kill -9`: all numbers are drawn from seeded generators whose
state is in the checkpoint, every episode starts from a seed of its own, and answers that were paid
for come from the cache.

Shapes: none. Names: Run, claim, make_folder. Needs torch (for checkpoints) and vlm_query (for labels.jsonl).
"""
import contextlib
import csv
import dataclasses
import json
import math
import os
import shlex
import signal
import stat
import sys
import time
import zipfile

try:
    import fcntl
except ImportError:  # Windows: there, nothing keeps two processes apart
    fcntl = None

import numpy as np

from support.settings import (MAY_CHANGE, MAY_MOVE, UserError, command_line, resume_command, say, who_labels)

METRICS = (
    "step", "episodes", "pairs_asked", "labels", "unsure", "unreadable", "no_answer", "identical",
    "label_accuracy", "train_accuracy", "heldout_accuracy", "reward_accuracy", "eval_return",
    "eval_success", "eval_success_any", "eval_success_frames", "eval_progress", "critic_loss",
    "q_mean", "alpha",
)
TIMING = ("step", "seconds")


# ---- Ctrl-C, where train.py is a program of its own ----
GO_ON = [f"go on with: {shlex.join(['python', 'train.py', *sys.argv[1:]])}"]  # what at_once() says


def at_once(*_):
    """Ctrl-C before there is a run, or while one is being wound up: one line, and the end.

    Not an exception: one in the middle of an import may come out of it as another.
    """
    # trap: not print(), in the middle of which the signal may have come
    os.write(2, f"\ntrain.py: interrupted [nothing is lost; {GO_ON[-1]}]\n".encode(errors="replace"))
    os._exit(130)  # as shells call a program that Ctrl-C ended


def in_order(*_):
    """Ctrl-C while a run learns: it is wound up, unless a second one comes."""
    signal.signal(signal.SIGINT, at_once)
    raise KeyboardInterrupt


# ---- the run folder ----
def make_folder(path, unique=False):
    """Make a run folder -> its name. unique: where it exists, with a number behind the name."""
    name = path
    try:
        os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
        for number in range(2, 1000):
            try:
                os.mkdir(name)
                return name
            except FileExistsError:
                if not unique:
                    break
                name = f"{path}-{number}"
    except (OSError, ValueError) as error:
        raise UserError(f"{path[:100]}: this run folder cannot be made ({error}); choose another "
                        "--out") from None
    raise UserError(f"{name} exists already; choose another --out, or go on with it: "
                    f"--resume {shlex.quote(name)}")


def claim(folder):
    """Make sure of a run folder before anything in it is changed -> its lock, a file to be closed.

    The kernel lets go of the lock when the process dies. UserError where another process holds it,
    or where what we write would end up elsewhere.
    """
    flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    try:
        lock = open(os.path.join(folder, ".lock"), "rb",
                    opener=lambda path, _: os.open(path, flags, 0o666))
    except OSError as error:
        raise UserError(f"{folder}: no run folder that can be written to "
                        f"({error.strerror})") from None
    try:
        if fcntl:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"{folder}: another process is at work on this run; wait for its end, or "
                        "stop it first") from None
    except OSError:
        pass  # a disk that knows no locks
    # trap: who sends a run folder could lead our writing to any file of the user, by either kind of
    # link. Only the buffer may be elsewhere, on a larger disk; but not in another run.
    buffer = os.path.join(folder, "buffer")
    beside = os.path.dirname(os.path.realpath(buffer))
    linked = os.path.islink(buffer) and os.path.isdir(buffer) and not os.path.exists(
        os.path.join(beside, "config.json"))
    for place, folders, files in (*os.walk(folder), *os.walk(buffer)):
        for path in (os.path.join(place, name) for name in folders + files):
            about = os.lstat(path)
            plain = stat.S_ISREG(about.st_mode) and about.st_nlink == 1
            if not plain and not stat.S_ISDIR(about.st_mode) and not (linked and path == buffer):
                raise UserError(f"--resume {folder}: {path} is a link or no plain file; put a copy "
                                "in its place")
    return lock


@contextlib.contextmanager
def replacing(path, mode="w"):
    """A file to write to, which takes the name once it is whole and on the disk, or never."""
    # trap: under another name first, so that a kill half-way leaves the old one whole; and without
    # fsync the name may be on the disk before the bytes are, when the power fails
    with open(path + ".new", mode, newline=None if "b" in mode else "") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    os.replace(path + ".new", path)


class Run:
    """The run folder: what was set, measured and paid for. With resume: as of its checkpoint.

    unique: a new one gets a number behind its name where that exists.
    """

    def __init__(self, config, unique=False):
        import vlm_query

        self.folder, self.started = config.resume or make_folder(config.out, unique), time.time()
        self.config = dataclasses.replace(config, out=self.folder, resume=None)
        self.state = self._load() if config.resume else None  # the last checkpoint
        # trap: the first file of all: a folder without it could neither be resumed nor used again
        fields = {**dataclasses.asdict(self.config), "labeler": who_labels(config),
                  "command": command_line(config)}
        write_json(self.path("config.json"), fields)
        os.makedirs(self.path("pairs"), exist_ok=True)
        state = self.state or {"rows": [], "times": [], "seconds": 0.0, "logged": 0}
        self.rows, self.seconds_before = state["rows"], state["seconds"]
        self.logged = state["logged"]  # pairs in labels.jsonl
        if self.logged:
            self._count_labels(vlm_query.LabelLog)
        # what was written after the checkpoint is about to happen again
        self.times = state.get("times") or self._old_times()  # of the rows, in seconds
        self._write("metrics.csv", METRICS, map(metrics_of, self.rows))
        self._write("timing.csv", TIMING, self.times)
        self.labels = vlm_query.LabelLog(self.path("labels.jsonl"), keep=self.logged)

    def _load(self):
        """The checkpoint, or None where there is none yet. UserError where it cannot be used."""
        import torch

        path = self.path("checkpoint", "state.pt")
        if not os.path.exists(path):
            return None
        try:
            with zipfile.ZipFile(path) as parts:
                # trap: torch reads a flipped bit without a word; and it packs nothing, a bomb does
                if any(part.compress_type for part in parts.infolist()) or parts.testzip():
                    raise ValueError("it is damaged")
            # weights_only: tensors, numbers and strings; a foreign run folder cannot run code here
            state = torch.load(path, weights_only=True)
        except Exception as error:  # a damaged file may raise anything
            raise UserError(f"--resume {self.folder}: its checkpoint cannot be read "
                            f"({' '.join(str(error).split())[:120]})") from None
        try:
            state["seconds"], kept = float(state["seconds"]), state.get("config") or {}
            right = type(state["logged"]) is type(state["data"]["added"]) is int and all(
                isinstance(value, (int, float, type(None)))
                for row in state["rows"] for value in row.values())
            times = [[float(value) for value in pair] for pair in state.get("times", ())]
            if not (right and all("step" in row and "eval_return" in row for row in state["rows"])
                    and state["rows"] and len(times) in (0, len(state["rows"]))):
                raise ValueError("its rows")
            now = dataclasses.asdict(self.config)
            changed = [name for name in now if name in kept and name not in MAY_CHANGE + MAY_MOVE
                       and now[name] != kept[name]]
        except Exception as error:  # an older version's, or changed by hand
            raise UserError(unusable(self.folder, error)) from None
        if changed:
            name = changed[0]
            raise UserError(f"--resume {self.folder}: config.json says {name} {now[name]!r}, and the "
                            f"run began with {kept[name]!r}: put that back")
        return state

    def _count_labels(self, log):
        """UserError where lines of labels.jsonl are lost that the checkpoint counts."""
        path = self.path("labels.jsonl")
        count = len(log.read(path)) if os.path.exists(path) else 0
        if count < self.logged:
            raise UserError(f"--resume {self.folder}: {count} of {self.logged} answers are left in "
                            "labels.jsonl; put a copy of it back, or begin anew: what was paid for "
                            "is in the vlm_cache beside the run")

    def _old_times(self):
        """Checkpoints once had no times: those of timing.csv, as far as it goes."""
        times = []
        if self.rows and os.path.exists(self.path("timing.csv")):
            with open(self.path("timing.csv"), newline="", errors="replace") as file:
                times = [row for row in csv.reader(file) if len(row) == 2][1:len(self.rows) + 1]
        return times + [[row["step"], ""] for row in self.rows[len(times):]]

    def path(self, *names):
        return os.path.join(self.folder, *names)

    def seconds(self):
        return self.seconds_before + time.time() - self.started

    def _write(self, name, columns, rows):
        """A table anew; without rows, an empty file."""
        # trap: emptied, and killed before it is full again, it would have lost them for good
        with replacing(self.path(name)) as file:
            csv.writer(file).writerows([columns, *rows] if self.rows else [])

    def write(self, row):
        """One evaluation: a line in metrics.csv (without the clock) and one in timing.csv."""
        self.rows.append(row)
        self.times.append([row["step"], round(self.seconds(), 2)])
        for name, columns, values in (("metrics.csv", METRICS, metrics_of(row)),
                                      ("timing.csv", TIMING, self.times[-1])):
            with open(self.path(name), "a", newline="") as file:
                csv.writer(file).writerows([columns, values] if len(self.rows) == 1 else [values])

    def save(self, state):
        """All that a resumed run needs and no file has; the old checkpoint stays until then."""
        import torch

        os.makedirs(self.path("checkpoint"), exist_ok=True)
        state = {**state, "rows": self.rows, "times": self.times, "seconds": self.seconds(),
                 "logged": self.logged, "config": dataclasses.asdict(self.config)}
        with replacing(self.path("checkpoint", "state.pt"), "wb") as file:
            torch.save(state, file)

    def resume_command(self):
        return resume_command(self.config, self.folder)


def unusable(folder, error):
    """Why a checkpoint that can be read cannot be gone on from, in one line."""
    reason = " ".join(f"{type(error).__name__}: {error}".split())[:120]
    return (f"--resume {folder}: its checkpoint does not fit; it is of another version of train.py, "
            f"or it or config.json was changed ({reason})")


def metrics_of(row):
    """A row's cells in metrics.csv."""
    return [f"{v:.6g}" if isinstance(v, float) else v for v in map(row.get, METRICS)]


def write_json(path, content):
    with replacing(path) as file:
        json.dump(content, file, indent=1)


# ---- a run that cannot learn says so ----
ENOUGH = 20  # of answers or pictures that are all alike, fewer of them say nothing
FAINT = 8  # of 255; pictures whose channels differ by less look the same (vlm_query.looks_identical)


def warn(config, at, labeler, pool, buffer, data, session, ended):
    """After a session of questions or an evaluation, print each doubt when it first shows.

    -> {cause: sentence}, for the closing words and the next call; "" for a doubt that has gone.
    """
    before = at.get("doubts", {})
    if not session and at["step"] % config.eval_every and at["step"] not in (1, config.total_steps):
        return before
    from tqdm import tqdm

    found = doubts(config, at, labeler, pool, buffer, data, at["episode"] + ended)
    for cause in found:
        if cause not in before:
            tqdm.write(f"warning: {found[cause]}", file=sys.stderr)  # print() would tear the progress bar
    return {**dict.fromkeys(before, ""), **found}


def doubts(config, at, labeler, pool, buffer, data, episodes):
    """Why this run learns nothing, or nothing of its goal, as far as it shows by now -> {cause: sentence}.

    episodes: that have ended.  Only what chance or a slow beginning cannot explain: a wrong alarm teaches users to
    read past the right one.
    """
    step, steps, counts, found = at["step"], config.total_steps, labeler.counts, {}
    over, explore = step == steps, max(config.seed_steps, config.explore_steps)
    if explore >= steps:
        found["late"] = (f"of {steps:,} steps (--total-steps) the first {explore:,} explore without a reward "
                         "(--explore-steps, --seed-steps): none is left to learn from one")
    if not episodes and config.horizon > steps <= 2 * step:
        found["endless"] = (f"no episode has ended in {step:,} steps, and questions and rewards come where one ends: "
                            "give a shorter --horizon or more --total-steps")
    if labeler.compares:
        # from 200 steps, one in ten at least, come some ENOUGH pictures
        if step >= config.explore_steps and (step >= 10 * ENOUGH or over) and alike(pool.small[:len(pool)]):
            found["pictures"] = ("all pictures look the same, so that nothing can be learned from comparing them: look "
                                 "at what the environment draws (eval_before.gif in the run folder)")
        elif labeler.exhausted and not counts["labels"]:
            found["limit"] = "a limit (--max-calls, --max-usd) was reached before there was any label"
        elif counts["asked"] >= ENOUGH and 20 * counts["labels"] <= counts["asked"]:
            found["answers"] = (f"of {counts['asked']} questions only {counts['labels']} got a label "
                                f"({counts['unsure']} unsure, {counts['unreadable']} unreadable, "
                                f"{counts['no_answer']} unanswered)")
        else:
            found.update(same_answers(config, counts, data))
    rewards = buffer.reward[np.isfinite(buffer.reward)]  # of all steps that have one
    # Of the environment's own rewards, and of programs, the first that differs may come late. One that is always the
    # same can be learned from all the same where it is not 0 and an episode can end early.
    late = labeler.compares or 2 * step >= steps
    lives = config.reward == "true" and rewards.any() and buffer.terminated.any()
    if len(rewards) >= ENOUGH and late and not lives:
        if np.ptp(rewards) <= 1e-6 * np.abs(rewards).max():
            found["reward"] = (f"the reward is {rewards[0]:.3g} in every one of {len(rewards):,} steps so far"
                               + ": no success was seen" * (config.reward == "sparse" and not rewards.any()))
        elif labeler.programs and say_nothing(labeler.programs, buffer, rewards):
            found["reward"] = "the programs say the same of every picture: only success itself is rewarded"
    if over and at["explores"] and not found.keys() & {"late", "endless", "pictures", "limit", "answers"}:
        found["nothing"] = ("there was no reward in time for the policy to learn from"
                            + f" ({counts['labels']} labels of {counts['asked']} questions)" * labeler.compares)
    return found


def alike(pictures):
    """Do all of (N, S, S, 3) uint8 look like the first?  Of fewer than two, yes."""
    first = pictures[0].astype(np.int16) if len(pictures) else None
    return all(np.abs(first - other).max() < FAINT for other in pictures[1:])  # stops at the first that differs


def say_nothing(programs, buffer, rewards):
    """Is all that differs in the rewards (N,) the 1 that success adds to what the programs say?"""
    values, rows = np.unique(rewards, return_index=True)
    if len(values) != 2 or not math.isclose(values[1] - values[0], 1, abs_tol=1e-6):
        return False
    failed, pictures = programs.failed_frames, buffer.image[rows]  # (2, S, S, 3), the first of either value
    said = programs.progress(pictures, pictures[0])  # (2, programs)
    programs.failed_frames = failed  # these two were counted when they were priced
    return bool((said[0] == said[1]).all())


def same_answers(config, counts, data):
    """What ENOUGH answers have in common that they should not -> {cause: sentence}."""
    if len(data) < ENOUGH:
        return {}
    if config.reward == "score":
        if np.ptp(data.score[:len(data)]) == 0:
            return {"same": f"all {len(data)} scores are {data.score[0]:.3g}, whatever the picture"}
    else:
        second = int(data.label[:len(data)].sum())
        often, which = max((second, "second"), (len(data) - second, "first"))
        if 20 * often >= 19 * len(data):  # the order of a pair is random: by chance in one run of ten thousand
            return {"same": f"{often} of {len(data)} labels prefer the {which} picture, whatever the two show"}
    if not counts["judged"] and not config.labels_from:
        return {"judged": "nobody knows how right the labels are: true progress (info['progress'], or the reward) is "
                          "the same in both pictures of every pair"}
    return {}


# ---- the words a run ends with ----
def status(row, labeler):
    """The numbers behind the progress bar."""
    parts = [f"return {row['eval_return']:.0f}"]
    if "eval_success" in row:
        parts += [f"success {row['eval_success']:.0%}"]
    if labeler.counts["asked"]:
        parts += [f"pairs {labeler.counts['asked']}"]
    if labeler.counts["judged"]:
        parts += [f"labels right {labeler.accuracy():.0%}"]
    if row.get("reward_accuracy", math.nan) == row.get("reward_accuracy"):  # known, and not nan
        parts += [f"reward right {row['reward_accuracy']:.0%}"]
    if labeler.usd():
        parts += [f"${labeler.usd():.2f}"]
    return ", ".join(parts)


def closing_text(config, run, finished, at, labeler, spearman):
    """What was learned, from how many pairs, by which labeler, how right; and where to read on."""
    first, last, counts = run.rows[0], run.rows[-1], labeler.counts
    text = [f"{config.env}, {'finished' if finished else 'interrupted'} after "
            f"{at['step']:,} steps and {run.seconds():.0f} s: "
            f"return {last['eval_return']:.1f} (before: {first['eval_return']:.1f})"]
    if "eval_success" in last:
        text[0] += (f"; success at the end of {last['eval_success']:.0%} of {config.eval_episodes} "
                    f"evaluation episodes, and on {last['eval_success_frames']:.0%} of their steps")
    text[0] += "."
    if labeler.compares:
        things = "pictures" if config.reward == "score" else "pairs of pictures"
        text += [f"Learned from {counts['labels']} answers to {counts['asked']} {things} "
                 f"({counts['unsure']} unsure, {counts['unreadable']} unreadable, "
                 f"{counts['no_answer']} unanswered) by {who_labels(config)}."]
        if counts["judged"]:
            text += [f"{labeler.accuracy():.0%} of them were right."]
        if "reward_accuracy" in at["fit"]:
            right = at["fit"]["reward_accuracy"]
            text += ["The learned reward has the true order on "
                     f"{'an unknown share' if math.isnan(right) else format(right, '.0%')} of picture pairs; Spearman "
                     "with the true reward over fresh random episodes: "
                     f"{'unknown' if math.isnan(spearman) else format(spearman, '.2f')}."]
    elif config.reward == "code":
        programs = labeler.programs
        text += [f"The reward is {len(programs.subtasks)} verified programs "
                 f"({'; '.join(programs.subtasks)}), written by {who_labels(config)}."]
        if programs.failed_frames:
            text += [f"They failed on {programs.failed_frames} pictures, which earned nothing."]
    else:
        text += [f"Learned from the {config.reward} reward; labels: {who_labels(config)}."]
    if labeler.vlm:
        cost = "" if labeler.vlm.usd is None else f", ${labeler.vlm.usd:.2f}"
        text += [f"{labeler.vlm.calls} calls ({labeler.vlm.cached_calls} from the cache), "
                 f"{labeler.vlm.tokens_in + labeler.vlm.tokens_out:,} tokens{cost}."]
    doubts = [sentence for sentence in at.get("doubts", {}).values() if sentence]
    if doubts:
        text += [f"Warning: {'; '.join(doubts)}."]
    text += [f"Report: {run.path('report.html')}"]
    return " ".join(text + (
        [] if finished else [f"- go on with: {run.resume_command()}"]))
