"""The folder that a run leaves behind: what was set, measured and paid for, and how a run goes on.

What this is: everything around the loops of train.py that is neither the algorithm nor a setting. One class, Run, owns
the run folder.
Which STEPs: none.

The run folder:
  config.json    every setting, the labeler's name, and the command that makes the run again
  metrics.csv    a row per evaluation; no clock in it, so the same seed gives the same bytes
  timing.csv     the clock
  labels.jsonl   a line per pair asked, on disk before it is used: answers in full, label, true
                 label, tokens, seconds
  pairs/*.png    what was asked, first image left, second right
  checkpoint/    state.pt: everything that `--resume` needs and that is in no other file
  buffer/        the images
  policy.pt      the policy and r_psi as they were at the end (support/afterwards.py)
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
import fcntl
import functools
import io
import json
import math
import mmap
import os
import shlex
import shutil
import stat
import sys
import time
import types
import zipfile
import zlib
from pathlib import Path

import imageio
import numpy as np
import torch
from tqdm import tqdm

import code_as_reward
import envs
import vlm_query
from reward_model import PreferenceDataset, RewardModel
from sac import SAC, ReplayBuffer, StoredArrayError
from support import adapt, baselines, fast, given_rewards, interrupts, report, shaped, yours
from support.labeler import is_stuck, make_labeler
from support.settings import (FROM_PAIRS, UserError, command_line, function_name, kept_folder, labels_kind, must_stay,
                              price_of, resolve, resume_command, say, vlm_name, who_labels)

# No training episode has these seeds (--seed below 10).
EVAL_SEED, FRESH_SEED = 1_000_000, 2_000_000
SOLVED = 0.99  # share of evaluation steps with success at which the run's clock of "seconds until solved" stops
# Images that are kept of one episode, evenly spaced: in a film, and in episodes.csv.
IN_A_FILM, IN_AN_EPISODE = 100, 1000
METRICS = (
    "step", "episodes", "pairs_asked", "labels", "unsure", "unreadable", "no_answer", "identical",
    "contradicted", "label_accuracy", "lean", "train_accuracy", "heldout_accuracy", "reward_accuracy", "eval_return",
    "eval_success", "eval_success_any", "eval_success_frames", "eval_success_drawn",
    "eval_progress", "critic_loss", "q_mean", "alpha",
)
TIMING = ("step", "seconds")
# What acts and what rewards, of the state_dict() of SAC and of RewardModel; the rest is for learning.
WEIGHTS = {"pi": ("slow_actor", "obs_mean", "obs_std"), "r_psi": ("nets", "mean", "deviation")}


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


def read_state(path, device=None):
    """What torch.save() wrote, from a file that may be a stranger's; device: where its tensors go.  ValueError."""
    try:
        with zipfile.ZipFile(path) as parts:
            # trap: torch reads a flipped bit without a word; and it packs nothing, a bomb does
            if any(part.compress_type for part in parts.infolist()) or parts.testzip():
                raise ValueError("it is damaged")
        # weights_only: tensors, numbers and strings; a foreign run folder cannot run code here
        return torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # a damaged file may raise anything
        raise ValueError(" ".join(str(error).split())[:120]) from None


def load_checkpoint(config):
    """The checkpoint in config.resume, or None where there is none yet. UserError where it cannot be used.

    It is read before anything is made, asked or paid for, so that a folder that was changed costs nothing.
    """
    folder = config.resume
    path = os.path.join(folder, "checkpoint", "state.pt")
    if not os.path.exists(path):
        return None
    try:
        state = read_state(path)
    except ValueError as error:
        raise UserError(f"--resume {folder}: its checkpoint cannot be read ({error})") from None
    try:
        state["seconds"], kept = float(state["seconds"]), state.get("config") or {}
        right = type(state["logged"]) is type(state["B"]["added"]) is int and state["logged"] >= 0 and all(
            isinstance(value, (int, float, type(None))) and (name != "eval_return" or value is not None)
            for row in state["rows"] for name, value in row.items())
        for name in {"pi", "r_psi"} & set(state):
            if not all(tensor.isfinite().all() for tensor in tensors_of(state[name])):
                raise ValueError("weights that are not finite")
        times = [[float(value) for value in pair] for pair in state.get("times", ())]
        if not (right and all("step" in row and "eval_return" in row for row in state["rows"])
                and state["rows"] and len(times) in (0, len(state["rows"]))):
            raise ValueError("its rows")
        steps, now, kept = kept.get("total_steps") or 0, must_stay(dataclasses.asdict(config)), must_stay(kept)
        if config.total_steps < steps:  # more may be asked for, not less
            now["total_steps"], kept["total_steps"] = config.total_steps, steps
        changed = [name for name in now if name in kept and now[name] != kept[name]]
    except Exception as error:  # an older version's, or changed by hand
        raise UserError(unusable(folder, error)) from None
    if changed:
        name = changed[0]
        raise UserError(f"--resume {folder}: config.json says {name} {now[name]!r}, and the "
                        f"run began with {kept[name]!r}: put that back")
    return state


def tensors_of(state):
    """All tensors in a state_dict, however deep."""
    if isinstance(state, torch.Tensor):
        return [state]
    inner = state.values() if isinstance(state, dict) else state if isinstance(state, (list, tuple)) else ()
    return [tensor for part in inner for tensor in tensors_of(part)]


class Run:
    """The run folder: what was set, measured and paid for. With resume: as of its checkpoint.

    unique: a new one gets a number behind its name where that exists.
    env, eval_env, labeler, reward: what started() made for this run.  on_row: a function of yours, or None.
    """

    env = eval_env = labeler = reward = on_row = None
    finished = False  # whether every step was taken

    def __init__(self, config, unique=False, state=None, env=None):
        self.folder, self.started = config.resume or make_folder(config.out, unique), time.time()
        self.config = dataclasses.replace(config, out=self.folder, resume=None)
        self.state = state  # the last checkpoint: load_checkpoint()
        # trap: the first file of all: a folder without it could neither be resumed nor used again
        fields = {**dataclasses.asdict(self.config), "labeler": who_labels(config),
                  "command": command_line(config, env)}
        write_json(self.path("config.json"), fields)
        os.makedirs(self.path("pairs"), exist_ok=True)
        state = self.state or {"rows": [], "times": [], "seconds": 0.0, "logged": 0}
        self.rows, self.seconds_before = state["rows"], state["seconds"]
        self.logged = state["logged"]  # lines in labels.jsonl, as of the checkpoint
        if self.logged:
            self._count_labels(vlm_query.LabelLog)
        # what was written after the checkpoint is about to happen again
        self.times = state.get("times") or self._old_times()  # of the rows, in seconds
        self._write("metrics.csv", METRICS, map(metrics_of, self.rows))
        self._write("timing.csv", TIMING, self.times)
        self.labels = vlm_query.LabelLog(self.path("labels.jsonl"), keep=self.logged)

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

    def seed(self, kind, number=0):
        """The seed of an episode that is not trained on: kind EVAL_SEED or FRESH_SEED -> 0 to 2**32 - 1."""
        return (kind + 1000 * self.config.seed + number) % 2**32

    # ---- what the loops of train.py call ----
    def begin(self, at, rng, **parts):
        """Register what travels in checkpoints -> whether the run goes on from one; everything is then as it was.

        at: Progress.  rng: the loop's generator.  parts: objects with state_dict() and load_state_dict().
        """
        self.parts, self.at, self.rng = parts, at, rng
        self.sums, self.saved = Checksums(parts["B"]), None
        if not self.state:
            return False
        try:
            for name, part in parts.items():
                part.load_state_dict(self.state[name])
            for field, value in self.state["at"].items():
                setattr(at, field, value)
            rng.bit_generator.state = self.state["rng"]
            self.labeler.row()
            counts = [at.step, at.episodes, at.sessions, *self.labeler.counts.values()]
            for field in dataclasses.fields(at):
                default, value = getattr(type(at)(), field.name), getattr(at, field.name)
                if default is not None and type(value) is not type(default):
                    raise ValueError(f"{field.name} is {type(value).__name__}")
            if min(counts) < 0 or any(type(count) is not int for count in counts) or at.step != parts["B"].added:
                raise ValueError(f"it is at step {at.step} with {parts['B'].added} rows stored")
            self.sums.compare(self.state["sums"])
        except Exception as error:  # a file from elsewhere may raise anything
            raise UserError(unusable(self.folder, error)) from None
        return True

    @contextlib.contextmanager
    def steps(self):
        """The steps that are left, under a progress bar. Ctrl-C ends them early; the run can then be resumed."""
        at, total = self.at, self.config.total_steps
        with tqdm(range(at.step, total), initial=at.step, total=total, unit="step") as self.bar:
            if self.labeler.vlm:
                self.labeler.vlm.waits = lambda waiting: self.bar.set_postfix_str(
                    "waiting for the server" if waiting else status(self.rows[-1], self.labeler))
            try:
                yield self.bar
                self.finished = True
            except KeyboardInterrupt:
                self.finished = False

    def log(self, evaluation, losses, episodes):
        """One evaluation: a line in metrics.csv (without the clock) and one in timing.csv.

        evaluation: of train.evaluate().  losses: of SAC.update().  episodes: training episodes that have ended.
        """
        step = self.at.step
        labels = self.labeler.row() if step else {}  # nothing has been asked before the first step
        row = {"step": step, "episodes": episodes, **labels, **self.at.fit, **evaluation,
               **{name: float(value) for name, value in losses.items()}}
        self.rows.append(row)
        self.times.append([step, round(self.seconds(), 2)])
        if self.at.solved is None and row.get("eval_success_frames", 0) >= SOLVED:
            self.at.solved = [step, self.seconds()]
        for name, columns, values in (("metrics.csv", METRICS, metrics_of(row)),
                                      ("timing.csv", TIMING, self.times[-1])):
            with open(self.path(name), "a", newline="") as file:
                csv.writer(file).writerows([columns, values] if len(self.rows) == 1 else [values])
        if self.on_row:
            self.on_row({name: row[name] for name in METRICS if name in row})

    def warn(self, episode_over, programs=None):
        """Print each doubt about the run when it first shows: after a query session, an evaluation, at step 1."""
        at, before = self.at, self.at.doubts
        if at.step == self.config.seed_steps:
            self.learning_since = time.time()
        elif self.learning_since and at.step == self.config.explore_steps - 1:  # before the first question
            each = (time.time() - self.learning_since) / (at.step - self.config.seed_steps)
            left = each * (self.config.total_steps - at.step) / 60
            if left >= 1:
                tqdm.write(f"at this speed the run takes {left:.0f} minutes more, without the time for answers",
                           file=sys.stderr)
        nothing_new = at.sessions == self.watched and at.step % self.config.eval_every
        if nothing_new and at.step not in (1, self.config.total_steps):
            return
        self.watched = at.sessions
        I, B, D = map(self.parts.get, "IBD")
        found = doubts(self.config, at, self.labeler, I, B, D, programs, at.episodes + episode_over, self.env)
        for cause in found:
            if cause not in before:
                tqdm.write(f"warning: {found[cause]}", file=sys.stderr)  # print() would tear the progress bar
        at.doubts = {**dict.fromkeys(before, ""), **found}  # "" for a doubt that has gone

    watched = 0  # query sessions that warn() has seen
    learning_since = None  # the clock at the end of the random steps

    def checkpoint(self):
        """At the end of an episode: keep all that a resumed run needs and no file has, if there is anything new.

        trap: right after a query session, because later steps overwrite images in I: a run that goes on from before the
        session could not ask about the same images again.
        """
        self.bar.set_postfix_str(status(self.rows[-1], self.labeler))
        news = len(self.rows), self.at.sessions
        if news == self.saved:
            return
        self.saved = news
        for part in (self.parts["B"], self.parts.get("I")):
            for array in vars(part).values() if part else ():
                if isinstance(array, np.memmap):
                    array.flush()  # of use after a power failure, as the checkpoint is
        os.makedirs(self.path("checkpoint"), exist_ok=True)
        state = {**{name: part.state_dict() for name, part in self.parts.items()}, "at": dataclasses.asdict(self.at),
                 "rng": self.rng.bit_generator.state, "sums": self.sums.now(), "rows": self.rows, "times": self.times,
                 "seconds": self.seconds(), "logged": self.labeler.logged, "config": dataclasses.asdict(self.config)}
        # the old checkpoint stays until the new one is whole
        with replacing(self.path("checkpoint", "state.pt"), "wb") as file:
            torch.save(state, file)

    def film(self, name, policy):
        """The first evaluation episode, as the VLM would see it, in at most 100 images and about four seconds."""
        images = envs.rollout(self.eval_env, policy, self.seed(EVAL_SEED), self.config.vlm_image_size, IN_A_FILM)[0]
        imageio.mimsave(self.path(name), list(images), duration=4000 / max(len(images), 4), loop=0)

    def finish(self, policy, reward, programs=None):
        """Watch the policy once more, write summary.json and the report, print the closing words -> rows of
        metrics.csv.

        policy: obs -> action.  reward: given_rewards.Reward.
        """
        at, labeler = self.at, self.labeler
        self.keep_weights()
        self.film("eval_after.gif", policy)
        spearman = write_episodes(self, policy, reward)
        text = closing_text(self.config, self, at, labeler, programs, spearman)
        third = [row["eval_success"] for row in self.rows if "eval_success" in row and 3 * row["step"] > 2 * at.step]
        solved = at.solved or [None, None]
        vlm = {key: labeler.vlm and getattr(labeler.vlm, key) for key in ("calls", "tokens_in", "tokens_out", "usd")}
        write_json(self.path("summary.json"), {
            "text": text, "doubts": [sentence for sentence in at.doubts.values() if sentence],
            "reward_accuracy": at.fit.get("reward_accuracy"), "finished": self.finished,
            "labeler": who_labels(self.config), "steps": at.step,
            "seconds": self.seconds(), "solved_step": solved[0], "seconds_until_solved": solved[1],
            "spearman": spearman, "label_accuracy": labeler.accuracy(), **labeler.counts, **vlm,
            "success_last_third": sum(third) / len(third) if third else None, "held": held(third),
            **{key: value for key, value in self.rows[-1].items() if key.startswith("eval_")}})
        report.write_report(self.folder)
        if self.finished and size_of(self.path("buffer")) > self.config.keep_buffer * 2**30:
            remove_buffer(self)
        say("", text)
        return self.rows

    def keep_weights(self):
        """What the policy and r_psi know now -> policy.pt. The last checkpoint is older: of an episode's end."""
        with replacing(self.path("policy.pt"), "wb") as file:
            torch.save({"at": {"step": self.at.step, "has_reward": self.at.has_reward}, **{
                name: {key: value for key, value in self.parts[name].state_dict().items() if key in keys}
                for name, keys in WEIGHTS.items() if name in self.parts}}, file)

    def resumable(self, error):
        """What stopped the run, and how it goes on."""
        return UserError(f"{error} [nothing is lost; go on with: {self.resume_command()}]")

    def resume_command(self):
        return resume_command(self.config, self.folder)


def unusable(folder, error):
    """Why a checkpoint that can be read cannot be gone on from, in one line."""
    reason = " ".join(f"{type(error).__name__}: {error}".split())[:120]
    return (f"--resume {folder}: its checkpoint does not fit; it is of another version of train.py, "
            f"or it or config.json was changed ({reason})")


def held(shares):
    """Is success kept, once it is reached? Shares of evaluation episodes, over the last third of a run -> bool, or None
    where the environment tells no success: at least .9 on average, and at the last evaluation.
    """
    return min(sum(shares) / len(shares), shares[-1]) >= 0.9 - 1e-9 if shares else None


def metrics_of(row):
    """A row's cells in metrics.csv."""
    return [f"{v:.6g}" if isinstance(v, float) else v for v in map(row.get, METRICS)]


def write_json(path, content):
    with replacing(path) as file:
        json.dump(content, file, indent=1)


# ---- before the first step ----
@contextlib.contextmanager
def started(config, env=None, judge=None, reward=None, on_row=None):
    """All that a loop of train.py needs around it -> Run, whose folder is ours alone until the loop has ended.

    env, judge, reward, on_row: what was handed in from Python (support/yours.py).
    What goes wrong from then on is one line that ends with the command by which the run goes on.
    """
    two = None
    if env is not None:
        try:
            two = adapt.pair(env)
        except ValueError as error:
            raise UserError(str(error)) from None
        config = dataclasses.replace(config, env=adapt.called(two[0]))
    unique = not config.out  # a folder that we name may get a number, too
    with contextlib.ExitStack() as at_the_end:
        state = None
        if config.resume:
            at_the_end.enter_context(claim(config.resume))  # first of all, and before a question is paid for
            state = load_checkpoint(config)
        config, env, eval_env = prepare(config, two)
        check_disk(config, env)
        # Make the CLIP model and the labeler before the run folder, so that a missing model, a wrong key or an unknown
        # goal fails without leaving an empty folder.
        reward = yours.FunctionReward(reward, function_name(config)) if reward else given_rewards.known_reward(config)
        labeler = make_labeler(config, judge)
        at_the_end.callback(labeler.close)
        try:
            run = Run(config, unique, state, eval_env)
        except OSError as error:  # no room, or a folder where a file should be
            raise UserError(f"the run folder {config.out} cannot be written: {error}") from None
        run.env, run.eval_env, run.labeler, run.reward, run.on_row = env, eval_env, labeler, reward, on_row
        labeler.log, labeler.folder, labeler.logged = run.labels, run.path("pairs"), run.logged
        if not config.resume:
            at_the_end.enter_context(claim(run.folder))
        judged = [] if eval_env.tells_progress or config.progress == "sum" or config.reward not in FROM_PAIRS else [
            'labels are judged by the reward of a step, because the environment tells no info["progress"]']
        say(f"{config.env}: {config.goal}", *adapt.notes(eval_env), *judged, f"labels from: {who_labels(config)}",
            *forecast(config), f"run folder: {run.folder}")
        try:
            interrupts.wind_up(f"go on with: {run.resume_command()}")
            open_buffer(run)
            yield run
        except KeyboardInterrupt:  # before the first step, or while the run was wound up
            raise KeyboardInterrupt(str(run.resumable("interrupted"))) from None
        except (vlm_query.VLMError, code_as_reward.CodeAsRewardError, envs.BadEnvironment, StoredArrayError,
                yours.BadAnswer, OSError) as error:  # OSError: the disk is full, or was taken away
            raise run.resumable(error) from None


def prepare(config, two=None):
    """Settle every setting before anything is made -> (config, training environment, evaluation environment).

    two: environments that were handed in from Python; None: the settings name one.
    """
    given, config = config, resolve(config)
    programs = config.reward == "code" and kept_folder(config)
    try:
        if ":" in config.env:
            adapt.find_here()
        env, eval_env = (envs.make(made, config.seed, config.goal, config.horizon, config.action_repeat,
                                   json.loads(config.env_kwargs)) for made in two or (config.env, config.env))
        config = resolve(given, env)  # now that the environment is known
        if config.frames == 2:
            env, eval_env = (adapt.TwoMoments(each, config.vlm_image_size) for each in (env, eval_env))
        eval_env.reset(seed=config.seed)
        eval_env.image(config.reward_image_size)  # now, not later, if there is no OpenGL
        # Take a step, too, so that an environment that cannot be used leaves nothing behind. The action is drawn from a
        # generator of its own, and every episode is reset with its seed: the run does not notice.
        eval_env.step(random_action(eval_env.action_space, np.random.default_rng(config.seed)))
        eval_env.image(config.vlm_image_size)
        known = config.progress or config.resume or eval_env.tells_progress
        if not known and config.reward in (*FROM_PAIRS, "score"):
            with contextlib.suppress(Exception):  # one that fails fails in training too, which says in which step
                config = dataclasses.replace(config, progress="sum" if adapt.adds_up(eval_env) else None)
        if config.progress == "sum":
            env, eval_env = adapt.RewardSum(env), adapt.RewardSum(eval_env)
        if config.reward == "code" and not programs:
            envs.expert(env)  # programs are verified on its episodes
    except ValueError as error:
        raise UserError(str(error)) from None
    except (AttributeError, TypeError) as error:  # a library's, where another MuJoCo is installed; otherwise ours
        line = f"{config.env} cannot be used here: {envs.one_line(str(error))}"
        if adapt.moved(line) == line:
            raise
        raise UserError(adapt.moved(line)) from error
    if programs:
        given_rewards.read_programs(programs).close()  # a wrong folder should leave nothing behind
    kind, vlm = labels_kind(config), vlm_name(config)
    who = "offline_stand-in" if vlm.startswith("offline") else vlm.replace("/", "_")
    who = who if kind == "vlm" else kind
    name = f"{config.reward}-{who}" if config.reward in (*FROM_PAIRS, "score", "code") else config.reward
    name = f"{config.env}-{name}-seed{config.seed}-{time.strftime('%Y%m%d-%H%M%S')}"
    out = config.resume or config.out or os.path.join("runs", name.replace(":", "_").replace("/", "_"))
    if not config.resume:  # tried before anything is paid for, and made for good when there is something to put in
        out = make_folder(out, unique=not config.out)
        os.rmdir(out)
    if config.reward == "preference+sparse":
        env = shaped.SuccessReward(env)
    return dataclasses.replace(config, goal=env.goal, horizon=env.horizon, out=out), env, eval_env


def random_action(space, rng):
    """Uniform over a Box -> (A,) float32 in [-1, 1], or over a Discrete space -> int."""
    return int(rng.integers(space.n)) if hasattr(space, "n") else rng.uniform(-1, 1, space.shape).astype(np.float32)


def looks_at_images(config):
    """Does the reward come from images? Otherwise none are drawn while training."""
    return config.reward not in ("true", "sparse")


def most_pairs(config):
    """So many pairs the schedule can ask at most: with --max-pairs 1e9, memory is not needed for a billion."""
    sessions = max(0, config.total_steps - config.explore_steps) // config.feedback_every + 1
    return min(config.max_pairs, sessions * config.pairs_per_session)


# Tokens in and out that a question takes, by stages: two images of 300 px, of some 260 tokens each, the prompts, and a
# description of some 150 tokens. An estimate: providers count images in other ways, and a model that thinks before it
# answers writes ten times as much.
TOKENS = {1: (700, 100), 2: (1_000, 150)}


def forecast(config):
    """What will be asked, when, and about what it costs -> [sentence]; [] where nobody is asked while it learns."""
    if config.reward not in (*FROM_PAIRS, "score") or kept_folder(config) or config.explore_steps >= config.total_steps:
        return []
    first = -(-config.explore_steps // config.horizon) * config.horizon  # a session waits for the end of an episode
    # No two sessions are at the end of the same episode. (An episode that terminates is over earlier.)
    room = 1 + max(0, config.total_steps - first) // max(config.feedback_every, config.horizon)
    sessions = min(-(-most_pairs(config) // config.pairs_per_session), room)
    questions = min(most_pairs(config), sessions * config.pairs_per_session)
    things = "images" if config.reward == "score" else "pairs"
    text = (f"{config.horizon:,} steps an episode: first questions at step {first:,}, "
            f"{questions // 2 if config.both_orders else questions:,} {things}"
            + ", each in both orders," * config.both_orders + f" in {sessions:,} session" + "s" * (sessions != 1))
    if labels_kind(config) == "vlm":
        calls, price = questions * config.stages, price_of(config)
        text += f", {calls:,} calls" + (f", of which at most {config.max_calls:,} are made (--max-calls)"
                                        if config.max_calls is not None and config.max_calls < calls else "")
        if price:
            tokens = TOKENS[config.stages]
            usd = questions * (tokens[0] * price[0] + tokens[1] * price[1]) / 1e6
            text += (f", about ${usd:.2f} at these prices, if a question takes {tokens[0]:,} tokens in and {tokens[1]} "
                     "out" + ("" if config.max_usd is None else f"; it stops at ${config.max_usd:g} (--max-usd)"))
    return [text]


def check_disk(config, env):
    """Room for every step, image and pair?  UserError if not."""
    place = os.path.abspath(os.path.join(config.out, "buffer"))
    # a resumed run has some of it already
    there = sum(path.stat().st_blocks * 512 for path in Path(place).glob("*.npy")) if config.resume else 0
    while not os.path.exists(place):
        place = os.path.dirname(place)
    # of every step two observations and an action, each number of four bytes (of a Discrete action eight)
    numbers = 2 * env.observation_space.shape[0] + max(2, *env.action_space.shape, 0)
    needed = 4 * numbers * config.total_steps
    if looks_at_images(config):
        # of every step the small image; of every image that may be asked about both
        pixels = (config.total_steps + config.image_buffer) * config.reward_image_size**2
        needed += 3 * (pixels + config.image_buffer * config.vlm_image_size**2)
    if config.reward in (*FROM_PAIRS, "score") and not kept_folder(config):
        needed += most_pairs(config) * 2 * config.vlm_image_size**2  # of every pair a PNG, a third of its six bytes
    free = shutil.disk_usage(place).free + there
    if needed > free:  # trap: the file is sparse at first; a disk that fills up later kills the run without a word
        raise UserError(f"the {config.total_steps:,} steps and {config.image_buffer:,} images to ask about need "
                        f"{needed / 2**30:,.1f} GiB of disk for observations and images, and {free / 2**30:,.1f} are "
                        "free: fewer --total-steps or --image-buffer, or --set reward_image_size=SMALLER")


# ---- what a run is made of ----
def choose_parts(config):
    """The classes a run is made of: SAC, ReplayBuffer, RewardModel, PreferenceDataset, or variants that settings ask
    for.

    -> a namespace with these names. Who wants other classes (tools/ablations.py) hands train() one of these, changed.
    """
    sac, bases, dataset = SAC, [RewardModel], PreferenceDataset
    options = {}
    if config.fast == 2:
        gpu = config.device == "cuda"
        options = {"bfloat16": not gpu and fast.has_bfloat16(), "record": fast.Recorded if gpu else None}
        bases = [fast.FastRewardModel]
    if config.fast and (config.device == "cuda" or fast.follows_sac()):
        sac = functools.partial(fast.FastSAC, **options)
    elif config.fast:
        say("sac.py was changed, so the gradients by hand of support/fast.py are not its gradients any more: this run "
            "takes sac.py as it is, which is slower (--fast 0 says so without this line)")
    if config.schedule == "paper":
        bases.insert(0, baselines.PaperFit)
    if config.reward == "score":
        bases.insert(0, baselines.ScoreFit)
        dataset = baselines.ScoreDataset
    buffer = ReplayBuffer
    if config.reward == "preference+sparse":
        buffer = functools.partial(shaped.PotentialBuffer, discount=config.discount)
    model = type("RewardModel", tuple(bases), {}) if len(bases) > 1 else bases[0]
    return types.SimpleNamespace(SAC=sac, ReplayBuffer=buffer, RewardModel=functools.partial(model, **options),
                                 PreferenceDataset=dataset)


def apart(kept, steps):
    """Which of rollout()'s images were kept of an episode of so many steps: every 1st, 2nd, 4th, 8th ..."""
    return 1 << (-(-steps // kept) - 1).bit_length()


# ---- the part of the run folder that only a resumed run needs ----
def buffer_files(config):
    """The files in buffer/ that this run has: names without .npy."""
    asked = ["query", "query_small"] * (config.reward in (*FROM_PAIRS, "score"))
    return ["obs", "next_obs", "action", *asked] + ["image"] * looks_at_images(config)


def open_buffer(run):
    """Before arrays are mapped into buffer/: with a checkpoint all must be there, without one none is of use."""
    folder = run.path("buffer")
    if run.state:
        for name in buffer_files(run.config):
            if not os.path.exists(os.path.join(folder, name + ".npy")):
                raise UserError(f"--resume {run.folder}: {name}.npy is missing in its buffer/; put it back, or begin "
                                "anew: answers that were paid for are in the vlm_cache beside the run")
        for name in {"obs", "next_obs", "action", "image"} & {*buffer_files(run.config)}:
            lengthen(os.path.join(folder, name + ".npy"), run.config.total_steps)
    elif not os.path.islink(folder):
        shutil.rmtree(folder, ignore_errors=True)  # a kill may have left half a file


def lengthen(path, rows):
    """Give an array's file more rows, of zeros, where it has fewer: a run with more --total-steps needs them."""
    try:
        array = np.lib.format.open_memmap(path, mode="r")
    except (ValueError, OSError):
        return  # stored_array() says what is wrong with it
    if array.ndim and array.shape[0] < rows:
        shape, start = (rows, *array.shape[1:]), array.offset
        about = {"descr": np.lib.format.dtype_to_descr(array.dtype), "fortran_order": False, "shape": shape}
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(header, about)  # numpy leaves room in it for a longer first number
        if header.tell() != start:
            raise StoredArrayError(f"{path} was written by another numpy and cannot be made longer")
        with open(path, "r+b") as file:
            # trap: the space first. Killed in between, the file is longer than it says, and it is made longer again.
            file.truncate(start + math.prod(shape) * array.itemsize)
            file.write(header.getvalue())


def size_of(folder):
    """Bytes on the disk of a folder's files."""
    return sum(path.stat().st_blocks * 512 for path in Path(folder).glob("*"))


def remove_buffer(run):
    """Gigabytes that a finished run need not keep. Behind a link, only what is surely ours goes."""
    folder = run.path("buffer")
    if not os.path.islink(folder):
        return shutil.rmtree(folder)
    for name in buffer_files(run.config):
        os.remove(os.path.join(folder, name + ".npy"))
    os.remove(folder)


class Checksums:
    """CRCs of the replay buffer's memory-mapped arrays: a resumed run must find what was stored, and not other bytes.

    Every row is read once, for rows are only added; once the ring has wrapped that is no longer so, and there are none.
    """

    def __init__(self, B):
        self.B, self.rows, self.sums = B, 0, {}  # rows of which sums has the checksums

    def now(self):
        if self.B.added > self.B.capacity:
            return {}
        for name in ("obs", "next_obs", "action", "image"):
            array = getattr(self.B, name)
            if isinstance(array, np.memmap):
                for row in range(self.rows, self.B.added, 1024):
                    part = array[row : min(row + 1024, self.B.added)].tobytes()
                    self.sums[name] = zlib.crc32(part, self.sums.get(name, 0))
                array._mmap.madvise(mmap.MADV_DONTNEED)  # see ReplayBuffer.relabel
        self.rows = self.B.added
        return dict(self.sums)

    def compare(self, stored):
        """ValueError where a file is not the one that was stored."""
        for name, crc in self.now().items() if stored else ():
            if crc != stored[name]:
                raise ValueError(f"{name}.npy is not the one that was stored with it")


# ---- a run that cannot learn says so ----
ENOUGH = 20  # of answers or images that are all alike, fewer of them say nothing
COIN = 0.65  # share of pairs in the true order, below which a reward is hardly better than a coin
SOME = 200  # answers from which on a reward should be better than that
FAINT = 8  # of 255; images whose channels differ by less look the same (vlm_query.looks_identical)


def doubts(config, at, labeler, pool, buffer, data, programs, episodes, env=None):
    """Why this run learns nothing, or nothing of its goal, as far as it shows by now -> {cause: sentence}.

    pool: I.  data: D (both None where no images are compared).  programs: VLM-CaR's, or None.  episodes: that have
    ended.  env: knows whether progress is told. Only what chance or a slow beginning cannot explain: a wrong alarm
    teaches users to read past the right one.
    """
    step, steps, counts, found = at.step, config.total_steps, labeler.counts, {}
    over, explore = step == steps, max(config.seed_steps, config.explore_steps)
    if explore >= steps:
        found["late"] = (f"of {steps:,} steps (--total-steps) the first {explore:,} explore without a reward "
                         "(--explore-steps, --seed-steps): none is left to learn from one")
    if not episodes and config.horizon > steps <= 2 * step:
        found["endless"] = (f"no episode has ended in {step:,} steps, and questions and rewards come where one ends: "
                            "give a shorter --horizon or more --total-steps")
    if pool is not None:
        # from 200 steps, one in ten at least, come some ENOUGH images
        if step >= config.explore_steps and (step >= 10 * ENOUGH or over) and alike(pool.small[:len(pool)]):
            found["images"] = ("all images look the same, so that nothing can be learned from comparing them: look "
                                 "at what the environment draws (eval_before.gif in the run folder)")
        elif labeler.exhausted and not counts["labels"]:
            found["limit"] = "a limit (--max-calls, --max-usd) was reached before there was any label"
        elif counts["asked"] >= ENOUGH and 20 * counts["labels"] <= counts["asked"] and not is_stuck(counts):
            found["answers"] = (f"of {counts['asked']} questions only {counts['labels']} got a label "
                                f"({counts['unsure']} unsure, {counts['unreadable']} unreadable, "
                                f"{counts['no_answer']} unanswered)")
        else:
            found.update(same_answers(config, counts, data))
        found.update(wrong_order(config, at, labeler, env) if not found else {})
    rewards = buffer.reward[np.isfinite(buffer.reward)]  # of all steps that have one
    # Of the environment's own rewards, and of programs, the first that differs may come late. One that is always the
    # same can be learned from all the same where it is not 0 and an episode can end early.
    late = pool is not None or 2 * step >= steps
    lives = config.reward == "true" and rewards.any() and buffer.terminated.any()
    if len(rewards) >= ENOUGH and late and not lives:
        if np.ptp(rewards) <= 1e-6 * np.abs(rewards).max():
            found["reward"] = (f"the reward is {rewards[0]:.3g} in every one of {len(rewards):,} steps so far"
                               + ": no success was seen" * (config.reward == "sparse" and not rewards.any()))
        elif programs and say_nothing(programs, buffer, rewards):
            found["reward"] = "the programs say the same of every image: only success itself is rewarded"
    if over and not at.explored and not found.keys() & {"late", "endless", "images", "limit", "answers"}:
        found["nothing"] = ("there was no reward in time for the policy to learn from"
                            + f" ({counts['labels']} labels of {counts['asked']} questions)" * (pool is not None))
    return found


def alike(images):
    """Do all of (N, S, S, 3) uint8 look like the first?  Of fewer than two, yes."""
    first = images[0].astype(np.int16) if len(images) else None
    return all(np.abs(first - other).max() < FAINT for other in images[1:])  # stops at the first that differs


def say_nothing(programs, buffer, rewards):
    """Is all that differs in the rewards (N,) the 1 that success adds to what the programs say?"""
    values, rows = np.unique(rewards, return_index=True)
    if len(values) != 2 or not math.isclose(values[1] - values[0], 1, abs_tol=1e-6):
        return False
    failed, images = programs.failed_frames, buffer.image[rows]  # (2, S, S, 3), the first of either value
    said = programs.progress(images, images[0])  # (2, programs)
    programs.failed_frames = failed  # these two were counted when their rewards were set
    return bool((said[0] == said[1]).all())


def same_answers(config, counts, data):
    """What ENOUGH answers have in common that they should not -> {cause: sentence}."""
    if config.reward == "score":
        if len(data) >= ENOUGH and np.ptp(data.score[:len(data)]) == 0:
            return {"same": f"all {len(data)} scores are {data.score[0]:.3g}, whatever the image"}
    else:
        first, second = counts["first"], counts["second"]
        if not first + second:  # kept answers, which nobody counted
            second = int((data.label[:len(data)] > 0.5).sum())
            first = len(data) - second
        said, (often, which) = first + second, max((second, "second"), (first, "first"))
        if said >= ENOUGH and 20 * often >= 19 * said:  # a pair's order is random: by chance once in ten thousand runs
            found = {"same": f'the same answer {often} times of {said}, "the {which}": does it look at the images?'}
            if is_stuck(counts):
                found["stuck"] = "no more is asked, because the answer has always been the same"
            return found
    if len(data) < ENOUGH:
        return {}
    right, clear = counts["clear_right"], counts["clear"]
    # Two standard deviations below the half: of labels that are 60 % right, by chance in three runs of a thousand.
    if 2 * clear >= ENOUGH and right < clear / 2 - math.sqrt(clear):
        return {"way round": f"right way round? Of the clearer half of the pairs, {right} of {clear} labels agree with "
                             "the environment's own progress"}
    if not counts["judged"] and not kept_folder(config):
        return {"judged": "nobody knows how right the labels are: true progress (info['progress'], or the reward) is "
                          "the same in both images of every pair"}
    return {}


def wrong_order(config, at, labeler, env):
    """Does the reward, after many answers, order images of the run as a coin would? -> {"order": sentence} or {}.

    Of 500 pairs that a reward orders .70 right, it orders .65 by chance in one fit of a hundred.
    """
    right = at.fit.get("reward_accuracy", math.nan)  # of 500 pairs of I, by true progress
    if not right < COIN or labeler.counts["labels"] < SOME:  # not so for nan, either
        return {}
    told = env is None or env.tells_progress
    causes = []
    if labeler.counts["judged"] and labeler.accuracy() < 0.75:
        causes += [f"only {labeler.accuracy():.0%} of the answers are right, by the same measure"]
    causes += [f"what counts is too small in an image of {config.reward_image_size} px (raise it by --set "
               "reward_image_size=, or move the camera)"]
    if config.frames != 2:
        causes += ["the goal is a speed, which no single image shows (--frames 2 shows two moments in each)"]
    if not told and config.progress != "sum":
        causes += ["true progress is unknown: what stands in for it, the environment's own reward, may be no judge of "
                   'an image (give info["progress"])']
    return {"order": f"after {labeler.counts['labels']} answers the learned reward orders {right:.0%} of pairs of "
                     "images as true progress does, where a coin has 50%; it can be that "
                     + "; or that ".join(causes)}


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


def closing_text(config, run, at, labeler, programs, spearman):
    """What was learned, from how many pairs, by which labeler, how right; and where to read on."""
    first, last, counts = run.rows[0], run.rows[-1], labeler.counts
    text = [f"{config.env}, {'finished' if run.finished else 'interrupted'} after "
            f"{at.step:,} steps and {run.seconds():.0f} s: "
            f"return {last['eval_return']:.1f} (before: {first['eval_return']:.1f}"
            + (")" if last["step"] == at.step else f"; evaluated last at step {last['step']:,})")]
    if "eval_success" in last:
        text[0] += (f"; success at the end of {last['eval_success']:.0%} of {config.eval_episodes} "
                    f"evaluation episodes, and on {last['eval_success_frames']:.0%} of their steps")
    text[0] += "."
    if config.reward in (*FROM_PAIRS, "score"):
        things = "images" if config.reward == "score" else "pairs of images"
        text += [f"Learned from {counts['labels']} answers to {counts['asked']} {things} "
                 f"({counts['unsure']} unsure, {counts['unreadable']} unreadable, "
                 f"{counts['no_answer']} unanswered) by {who_labels(config)}."]
        if counts["judged"]:
            text += [f"{labeler.accuracy():.0%} of them were right."]
        if "reward_accuracy" in at.fit:
            right = at.fit["reward_accuracy"]
            text += ["The learned reward has the true order on "
                     f"{'an unknown share' if math.isnan(right) else format(right, '.0%')} of image pairs; Spearman "
                     "with the true reward over fresh random episodes: "
                     f"{'unknown' if math.isnan(spearman) else format(spearman, '.2f')}."]
    elif config.reward == "code":
        text += [f"The reward is {given_rewards.described(config, programs.subtasks)}."]
        if programs.failed_frames:
            text += [f"They failed on {programs.failed_frames} images, which earned nothing."]
    else:
        text += [f"Learned from the {config.reward} reward; labels: {who_labels(config)}."]
    if labeler.vlm:
        cost = "" if labeler.vlm.usd is None else f", ${labeler.vlm.usd:.2f}"
        text += [f"{labeler.vlm.calls} calls ({labeler.vlm.cached_calls} from the cache), "
                 f"{labeler.vlm.tokens_in + labeler.vlm.tokens_out:,} tokens{cost}."]
    doubts = [sentence for sentence in at.doubts.values() if sentence]
    if doubts:
        text += [f"Warning: {'; '.join(doubts)}."]
    text += [f"Report: {run.path('report.html')}"]
    return " ".join(text + (
        [] if run.finished else [f"- go on with: {run.resume_command()}"]))


def write_episodes(run, policy, reward, random_episodes=5):
    """Learned reward, true progress, true reward at each step -> episodes.csv; the rank correlation of learned and true
    reward on random episodes. (Of --reward code: the programs' part, without what success adds.)

    For the correlation each different image counts once: half of CartPole's random steps lie still at the clamp.
    It is nan where one of the two never differs. Of more than IN_AN_EPISODE steps, as many are written, evenly spaced.
    """
    env, size = run.eval_env, run.config.reward_image_size
    rng, seen = np.random.default_rng(FRESH_SEED + run.config.seed), {}  # seen: image -> (learned, true reward)
    episodes = [("random", lambda obs: random_action(env.action_space, rng))] * random_episodes
    episodes += [("after", policy)]
    try:
        episodes += [("expert", envs.expert(env))]
    except ValueError:
        pass  # a foreign environment has no scripted expert
    with open(run.path("episodes.csv"), "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("kind", "episode", "t", "learned_reward", "progress", "true_reward"))
        for number, (kind, act) in enumerate(episodes):
            seed = run.seed(FRESH_SEED, number)
            env.reset(seed=seed)
            start_image = env.image(size)
            images, rewards, progress, _ = envs.rollout(env, act, seed, size, IN_AN_EPISODE)
            learned = reward.of_images(images, start_image)
            every = apart(len(images), len(rewards))
            rewards, progress = rewards[::every], progress[::every]
            for t, values in enumerate(zip(learned, progress, rewards)):
                writer.writerow((kind, number, every * t, *(f"{value:.6g}" for value in values)))
            if kind == "random":
                seen.update({hash(image.tobytes()): pair for image, pair in zip(images, zip(learned, rewards))})
    differ = reward.looks and all(len(set(values)) > 1 for values in zip(*seen.values()))
    return report.rank_correlation(*zip(*seen.values())) if differ else float("nan")
