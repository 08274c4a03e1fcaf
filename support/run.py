"""The settings of a run, its command line, and the folder it leaves behind.

What this is: everything around the algorithm in train.py that is not the algorithm. One dataclass,
Config, holds every tunable; its comments are the --help text. One class, Run, owns the run folder.
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

Shapes: none. Names: Config, resolve, parse_args, who_labels, Run, UserError. Needs torch (for
checkpoints), vlm_query and cached_labels (for labels), all imported late: --help is instant.

To use it elsewhere:
    from support import run
    config = run.resolve(run.Config(env="CartPole", total_steps=1000))
    print(config.goal, config.pairs_per_session, run.command_line(config))
"""
import argparse
import contextlib
import csv
import dataclasses
import inspect
import json
import math
import os
import shlex
import signal
import stat
import sys
import time
import unicodedata
import zipfile

try:
    import fcntl
except ImportError:  # Windows: there, nothing keeps two processes apart
    fcntl = None

import numpy as np


# ---- every tunable, once ----
@dataclasses.dataclass
class Config:
    """A field's comment is its --help text; None means: the task's own (tasks/schedules.py)."""

    # The task and the method
    env: str = "CartPole"  # a built-in task or any Gymnasium id (then with --goal)
    goal: str | None = None  # what to achieve, in words
    reward: str = "preference"  # preference (RL-VLM-F), code (VLM-CaR); or a baseline
    labels: str = "vlm"  # who compares the pictures: vlm, or oracle (true progress, to compare)
    seed: int = 0  # the one seed of everything
    schedule: str = "ours"  # the task's schedule and fits: ours, or paper
    # The VLM
    vlm: str = "offline"  # offline (a stand-in, no VLM), or openai|gemini|anthropic|local/MODEL
    labels_from: str | None = None  # labels.jsonl, or folder of official labels; nobody is asked
    vlm_url: str | None = None  # where local/MODEL answers, such as http://localhost:11434/v1
    vlm_extra: str = "{}"  # JSON merged into every request, such as {"reasoning_effort": "low"}
    vlm_mistakes: float = 0.0  # share of wrong answers of the stand-in, or of the oracle
    vlm_unsure: float = 0.0  # share of unsure answers of the stand-in
    vlm_latency: float = 0.0  # seconds the stand-in takes for an answer
    stages: int = 2  # 2: describe, then decide (the paper's); 1: both in one call
    programs: str | None = None  # for --reward code: folder of verified programs; nobody is asked
    clip_goal: str | None = None  # for --reward clip: the goal as a state: "the pole is upright"
    clip_baseline: str | None = None  # and the same scene with nothing achieved: "a pole"
    clip_alpha: float = 0.0  # and how much of what is beside the line between them is left out
    clip_model: str = "openai/clip-vit-base-patch32"  # on the Hugging Face hub, or a folder
    potential: str = "level"  # for --reward code: Phi - 1 (level), or its difference over a step
    unverified: str = "stop"  # if no program passes for a sub-task (but the last): stop, or skip it
    rounds: int = 3  # for --reward code: how many programs the VLM may write for a sub-task
    workers: int = 8  # questions asked at the same time
    timeout: float = 120.0  # seconds an answer may take; best twice what it does, or few are asked side by side
    max_calls: int | None = None  # stop asking after so many answered calls, cached ones included
    max_usd: float | None = None  # the same in dollars, cached ones included; needs --usd-per-mtok
    usd_per_mtok: str | None = None  # price of a million tokens, IN,OUT
    # The schedule
    total_steps: int | None = None  # environment steps in all
    seed_steps: int | None = None  # environment steps with random actions, at the start
    hold: int | None = None  # steps for which one random action is repeated
    explore_steps: int | None = None  # steps before the first question (random, then novelty)
    feedback_every: int | None = None  # environment steps between two sessions of questions
    pairs_per_session: int | None = None  # pairs asked in one session
    max_pairs: int | None = None  # pairs asked in all
    sampler: str | None = None  # pairs asked: uniform (paper's), or one more of reward_model.py
    candidates: int = 1000  # pictures kept to ask about
    without: str = "nothing"  # leave one part out: novelty, relabelling or critic-reset
    # The reward model
    members: int = 3  # networks in the ensemble
    reward_lr: float | None = None  # learning rate of the reward model
    patience: int = 3  # passes a fit goes on without gain on held-out answers; 0: no limit
    reward_batch: int | None = None  # answers in one step of a fit: 16, in the official code 64
    reward_epochs: int | None = None  # passes over all answers in one session, at most
    query_size: int | None = None  # pixels of the picture the VLM sees
    reward_size: int | None = None  # pixels of the picture the reward model sees
    reward_shift: int | None = None  # pixels by which a fit moves it at random, at most
    reward_bfloat16: int = 0  # 1: its convolutions in half the bits; faster with AVX512-BF16 or AMX
    reward_mirror: int | None = None  # 1: a fit mirrors half of them (a goal without left and right)
    # SAC
    sac_lr: float | None = None  # learning rate of actor, critics and temperature
    batch_size: int | None = None  # transitions in one update
    updates: int | None = None  # updates after each environment step
    hidden: int | None = None  # width of the two hidden layers
    sac_bfloat16: int = 0  # 1: the second in half the bits; faster with AVX512-BF16 or AMX
    discount: float | None = None  # what a reward one step later is worth
    device: str = "auto"  # cpu, cuda, or auto: cuda where there is one, for --cuda-graph 1 and --reward clip
    cuda_graph: int = 0  # 1, for a GPU: an update of SAC, a step of a fit to answers is recorded once, then replayed
    # Watching
    horizon: int | None = None  # steps in an episode
    action_repeat: int | None = None  # the simulator's steps in one of ours, with the same action
    eval_every: int | None = None  # environment steps between evaluations
    eval_episodes: int | None = None  # episodes in one evaluation
    keep_best: int | None = None  # episodes on which the best policy so far is chosen; 0: the newest
    out: str | None = None  # the run folder to make (default: runs/...)
    resume: str | None = None  # go on with the run in this folder


CHOICES = {
    "reward": ("preference", "code", "score", "clip", "true", "sparse"),
    "labels": ("vlm", "oracle"),
    "schedule": ("ours", "paper"),
    "sampler": ("uniform", "disagreement", "entropy", "best", "diverse"),
    "unverified": ("stop", "skip"),
    "potential": ("level", "difference"),
    "stages": (1, 2),
    "without": ("nothing", "novelty", "relabelling", "critic-reset"),
    "device": ("auto", "cpu", "cuda"),
}
# The least and the most that a number may be; None: MOST, or for a float whatever is finite. Every
# other int is 0 or more, and every other float above 0.
AT_LEAST_1 = (1, None)
MOST = 2**31 - 1
RANGES = dict(
    dict.fromkeys((
        "total_steps", "hold", "feedback_every", "pairs_per_session", "members", "reward_batch", "reward_epochs",
        "batch_size", "updates", "hidden", "horizon", "action_repeat", "eval_every",
        "eval_episodes", "rounds", "max_pairs"), AT_LEAST_1),
    workers=(1, 256), timeout=(1, 86_400),
    # the mosts: beyond them memory, or a year, would run out without a word
    total_steps=(1, 10**8), pairs_per_session=(1, 10**5), members=(1, 1000), hidden=(1, 8192),
    batch_size=(1, 10**6), reward_shift=(0, 1000),
    candidates=(2, None), query_size=(16, 4096), reward_size=(47, 4096), vlm_latency=(0, 3600),
    vlm_mistakes=(0, 1), vlm_unsure=(0, 1), discount=(0, 1), clip_alpha=(0, 1), max_usd=(0, None),
    reward_mirror=(0, 1), reward_bfloat16=(0, 1), sac_bfloat16=(0, 1), cuda_graph=(0, 1),
    seed=(0, MOST),
)
# What a task that is not built in starts from; tasks/schedules.py overrides it for those that are.
DEFAULTS = dict(
    total_steps=50_000, seed_steps=1000, hold=1, explore_steps=4000, feedback_every=2000,
    pairs_per_session=40, max_pairs=1000, sampler="uniform", reward_lr=3e-4, reward_batch=16, reward_epochs=50,
    query_size=300, reward_size=84, reward_shift=4, reward_mirror=0, sac_lr=3e-4, batch_size=256,
    updates=1, hidden=256, discount=0.99, action_repeat=1, eval_every=5000, eval_episodes=10,
    keep_best=0,
)
MAY_CHANGE = (  # on resume
    "max_pairs", "max_calls", "max_usd", "usd_per_mtok", "vlm_url", "vlm_extra", "vlm_latency",
    "workers", "timeout",
)
MAY_MOVE = ("out", "resume", "device", "programs", "labels_from")  # the files may lie elsewhere now
NAMED_AGAIN = ("env", "vlm_url", "clip_model")  # on resume, where to_name_again() wants it
METRICS = (
    "step", "episodes", "pairs_asked", "labels", "unsure", "unreadable", "no_answer", "identical",
    "label_accuracy", "train_accuracy", "heldout_accuracy", "reward_accuracy", "eval_return",
    "eval_success", "eval_success_any", "eval_success_frames", "eval_progress", "critic_loss",
    "q_mean", "alpha",
)
TIMING = ("step", "seconds")


class UserError(Exception):
    """Something the user can put right; main() prints it as one line."""


# ---- what is shown to the user ----
def say(*lines, file=None):
    """Print lines, each on one line of the terminal: the one door for text that is not our own."""
    # trap: a stranger's words may hold escape codes, which move the cursor, or text that runs
    # from right to left; and a terminal may not know their letters
    encoding = getattr(file or sys.stdout, "encoding", None) or "utf-8"
    for line in lines:
        text = "".join(" " if unicodedata.category(c)[0] == "C" else c for c in str(line))
        print(text.encode(encoding, "replace").decode(encoding), file=file, flush=True)


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


# ---- the settings ----
NAMES = {"vlm_image_size": "query_size", "reward_image_size": "reward_size",  # schedules' -> Config's
         "random_shift": "reward_shift", "random_flip": "reward_mirror"}


def schedule(env, whose):
    """What "ours" or "paper" sets for a task, in Config's names; {} where there is nothing."""
    from tasks import schedules

    fields = {"ours": schedules.OURS, "paper": schedules.PAPER}[whose].get(env, {})
    return {NAMES.get(name, name): value for name, value in fields.items()}


def resolve(config):
    """Fill every None from the task's entry; check what can be checked before anything is made."""
    import envs

    check_types(config)
    for name, allowed in CHOICES.items():
        if getattr(config, name) not in (*allowed, None):  # None: the task's own, below
            raise UserError(f"--{name} {getattr(config, name)}: "
                            f"there are {', '.join(map(str, allowed))}")
    price_of(config)
    if config.reward != "preference" and (config.labels != "vlm" or config.labels_from):
        raise UserError(f"--reward {config.reward} compares no pictures: leave out --labels and "
                        "--labels-from")
    if config.reward == "score" and config.vlm_mistakes:
        raise UserError("--vlm-mistakes exchanges two pictures, and --reward score shows only one")
    if config.programs and config.reward != "code":
        raise UserError(f"--programs is for --reward code, not for {config.reward}")
    flaws = [f"--{name.replace('_', '-')}" for name in ("vlm_mistakes", "vlm_unsure", "vlm_latency")
             if getattr(config, name) and (name, config.labels) != ("vlm_mistakes", "oracle")]
    if flaws and (config.vlm != "offline" or config.labels == "oracle"):
        raise UserError(f"{flaws[0]} is a flaw of the offline stand-in, which is not asked here")
    if config.vlm == "offline" and config.vlm_url:
        raise UserError("--vlm offline starts a stand-in of its own; for one that runs already: "
                        "--vlm offline/NAME --vlm-url URL")
    if config.reward == "clip" and config.clip_alpha and not config.clip_baseline:
        raise UserError("--clip-alpha needs --clip-baseline, a sentence for nothing achieved")
    try:
        if not isinstance(json.loads(config.vlm_extra), dict):
            raise ValueError("not an object in braces")
        json.dumps(json.loads(config.vlm_extra))  # trap: it may be nested too deep to be sent
    except (ValueError, RecursionError) as error:
        raise UserError(f"--vlm-extra {config.vlm_extra[:80]}: no JSON object ({error})") from None
    task = envs.TASKS.get(config.env)
    if config.schedule == "paper" and not schedule(config.env, "paper"):
        raise UserError(f"--schedule paper: the paper has no task {config.env}")
    preset = dict(DEFAULTS)
    if task is not None:
        preset.update(goal=task.goal, horizon=task.horizon, action_repeat=task.action_repeat,
                      query_size=task.vlm_image_size, reward_size=task.reward_image_size)
        preset.update(schedule(config.env, "ours"))
        preset.update(schedule(config.env, "paper") if config.schedule == "paper" else {})
    open_fields = {name: value for name, value in preset.items() if getattr(config, name) is None}
    config = dataclasses.replace(config, **open_fields)
    check_ranges(config)
    return dataclasses.replace(config, device=choose_device(config))


def choose_device(config):
    """cpu or cuda. auto takes a GPU only where it gains: launched one by one, kernels this small are slower on it."""
    gains, device = config.cuda_graph or config.reward == "clip", "cpu"
    if config.device == "cuda" or (config.device == "auto" and gains):
        import torch

        device = "cuda" if torch.cuda.is_available() else "cpu"
    if config.device == "cuda" and device == "cpu":
        raise UserError("--device cuda: torch finds no such GPU here; there are cpu, auto")
    if config.cuda_graph and device == "cpu":
        raise UserError("--cuda-graph 1 needs a GPU, and --device cuda or auto")
    return device


def check_types(config):
    """Every setting of its kind, or one line: config.json may be edited, or a stranger's."""
    kinds = {"int": "a whole number", "float": "a number", "str": "text"}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        whole = type(value) is int and isinstance(0.0, field.type)  # 1, where 1.0 is meant
        right = isinstance(value, field.type) and type(value) is not bool or whole
        if not right or (isinstance(value, str) and "\0" in value):
            kind = getattr(field.type, "__name__", str(field.type)).split(" ")[0]
            raise UserError(f"--{field.name.replace('_', '-')} {str(value)[:60]!r}: it must be "
                            f"{kinds[kind]}")


def check_ranges(config):
    """Every number within its range, or one line: `--hold 0` would divide by zero hours later."""
    for field in dataclasses.fields(config):
        value, kind = getattr(config, field.name), str(field.type)
        if value is None or isinstance(value, str):
            continue
        above = "float" in kind and field.name not in RANGES  # a rate: any number above 0
        low, high = RANGES.get(field.name, (0, None))
        if high is None and "int" in kind:
            high = MOST
        # written so that nan and infinity are refused too
        if not (value > low if above else value >= low) or not (
                value <= (sys.float_info.max if high is None else high)):
            most = "" if high is None else f", at most {high}"
            least = f"above {low}" if above else f"at least {low}"
            flag = "--" + field.name.replace("_", "-")
            raise UserError(f"{flag} {str(value)[:60]}: it must be {least}{most}")


def price_of(config):
    """--usd-per-mtok IN,OUT -> (in, out) dollars, or None."""
    if config.usd_per_mtok is None:
        if config.max_usd is not None:
            raise UserError("--max-usd needs the price of a million tokens: --usd-per-mtok IN,OUT")
        return None
    try:
        tokens_in, tokens_out = map(float, config.usd_per_mtok.split(","))
        if not (0 <= tokens_in < math.inf and 0 <= tokens_out < math.inf):
            raise ValueError  # a price below nothing would never meet --max-usd
    except ValueError:
        raise UserError(f"--usd-per-mtok {config.usd_per_mtok}: write two prices, IN,OUT, "
                        "such as 0.10,0.50") from None
    return tokens_in, tokens_out


def who_labels(config):
    """Who judges, for every banner, table and plot: nothing here may pass for a VLM but a VLM."""
    if config.reward in ("true", "sparse"):
        return f"nobody ({config.reward} reward)"
    if config.reward == "clip":
        return f"CLIP ({config.clip_model}), which is asked nothing"
    if config.programs:
        return f"nobody (programs from {config.programs})"
    if config.labels_from:
        from support.cached_labels import labeler_of

        kept = config.labels_from
        log = os.path.join(kept, "labels.jsonl") if os.path.isdir(kept) else kept
        # a stand-in stays a stand-in, whoever reads its answers
        return f"answers of {labeler_of(log)}, read from {kept}"
    mistakes = f", wrong on purpose in {config.vlm_mistakes:.0%}" if config.vlm_mistakes else ""
    if config.labels == "oracle" and config.reward == "preference":
        return f"oracle (labels from true progress, not a VLM{mistakes})"
    stand_in = config.vlm.startswith("offline")  # offline/NAME: one that runs already
    return f"offline stand-in (not a VLM{mistakes})" if stand_in else config.vlm


# ---- the command line ----
def field_help():
    """{field: its trailing comment}: each tunable is explained where it stands, once."""
    lines = inspect.getsource(Config).splitlines()
    return {line.split(":")[0].strip(): line.split("  # ", 1)[1]
            for line in lines if ":" in line and "  # " in line}


def whole_number(text):
    """4e3 -> 4000; argparse turns the ValueError into its one line."""
    if not float(text).is_integer():
        raise ValueError(text)
    return int(float(text))


def parse_args(arguments):
    """The shell's flags -> Config. One flag for every field; numbers may be written 4e3."""

    def fail(message):
        flags = ", ".join(
            "--" + field.name.replace("_", "-") for field in dataclasses.fields(Config))
        raise UserError(f"{message}; there are {flags}" if "unrecognized" in message else message)

    title = (__doc__ or "").partition("\n")[0]  # python -OO has no docstrings
    parser = argparse.ArgumentParser(prog="train.py", description=title,
                                     allow_abbrev=False, argument_default=argparse.SUPPRESS)
    parser.error = fail
    explained = field_help()
    types = {"int": whole_number, "float": float, "str": str}
    for field in dataclasses.fields(Config):
        kind = str(getattr(field.type, "__name__", field.type)).split(" ")[0]
        default = "the task's" if field.default is None else field.default
        parser.add_argument(
            "--" + field.name.replace("_", "-"), type=types[kind], choices=CHOICES.get(field.name),
            help=f"{explained[field.name]} (default: {default})".replace("%", "%%"))
    given = vars(parser.parse_args(arguments))
    if "resume" not in given:
        return Config(**given)
    return resumed(given)


def read_json(path):
    """A run folder's JSON file -> dict. ValueError where it is something else, or no plain file."""
    from support.cached_labels import read_plain

    try:
        found = json.loads(read_plain(path, most=2**24))
    except RecursionError:
        found = None
    if not isinstance(found, dict):
        raise ValueError(f"{os.path.basename(path)} is none of ours")
    return found


def resumed(given):
    """The stored settings of the run in given["resume"], with the changes a started run allows."""
    folder, summary = given["resume"], {"finished": False}
    try:
        stored = read_json(os.path.join(folder, "config.json"))
        if os.path.exists(os.path.join(folder, "summary.json")):
            summary = read_json(os.path.join(folder, "summary.json"))
        if "command" not in stored:
            raise ValueError("config.json is none of ours")  # an audit's has no command
    except (OSError, ValueError) as error:
        raise UserError(f"--resume {folder}: no run folder of train.py ({error})") from None
    # trap: killed between the summary and the report, a run must still be able to finish
    if summary.get("finished") and os.path.exists(os.path.join(folder, "report.html")):
        raise UserError(f"the run in {folder} has finished: "
                        f"see {os.path.join(folder, 'report.html')}")
    names = {field.name for field in dataclasses.fields(Config)}
    stored = {key: value for key, value in stored.items() if key in names}
    same = {"resume", *(name for name in NAMED_AGAIN if given.get(name) == stored.get(name))}
    fixed = sorted(set(given) - same - set(MAY_CHANGE))
    if fixed:
        raise UserError(
            f"a resumed run keeps its --{fixed[0].replace('_', '-')}; what may change is "
            + ", ".join("--" + name.replace("_", "-") for name in MAY_CHANGE))
    config = Config(**{**stored, **given})
    try:
        check_types(config)
    except UserError as error:
        raise UserError(f"config.json in {folder}: {error}") from None
    for name, why in to_name_again(config).items():
        if name not in given:
            raise UserError(f"--resume {folder}: {why}; if you trust it: "
                            f"{resume_command(config, folder)}")
    return config


def to_name_again(config):
    """{field: why}: what the user must name again beside --resume, since a folder that came from
    a stranger could do harm with it.
    """
    from vlm_query import PROVIDERS

    found = {}
    if ":" in config.env:
        # trap: what lies beside train.py can be imported, runs/ and all that is in it too
        found["env"] = f"its environment {config.env} is a module, which would be run"
    wire = PROVIDERS.get(config.vlm.partition("/")[0])
    official = wire and wire.url and "/".join(wire.url.split("/")[:3]) + "/"  # scheme://host/
    if (config.vlm_url and wire and os.environ.get(wire.variable)
            and not (official and f"{config.vlm_url}/".startswith(official))):
        found["vlm_url"] = f"your {wire.variable} would be sent to {config.vlm_url}"
    if config.reward == "clip" and config.clip_model != Config.clip_model:
        found["clip_model"] = f"the model {config.clip_model} would be loaded"
    return found


def resume_command(config, folder):
    """The command that goes on with the run, ready to be pasted into a shell."""
    again = [word for name in to_name_again(config)
             for word in ("--" + name.replace("_", "-"), getattr(config, name))]
    return shlex.join(["python", "train.py", "--resume", folder, *again])


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


def command_line(config):
    """The command that makes this run again: every field that differs from its default."""
    flags = [(field.name, getattr(config, field.name)) for field in dataclasses.fields(config)
             if field.name not in ("resume", "out")
             and getattr(config, field.name) != field.default]
    return shlex.join(["python", "train.py"] + [
        part for name, value in flags for part in ("--" + name.replace("_", "-"), str(value))])


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
