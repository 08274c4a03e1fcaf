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

The same run, byte for byte, after `kill -9`: all numbers are drawn from seeded generators whose
state is in the checkpoint, every episode starts from a seed of its own, and answers that were paid
for come from the cache.

Shapes: none. Names: Config, resolve, parse_args, who_labels, Run, UserError. Needs torch (for
checkpoints), vlm_query and cached_labels (for labels), all imported late: --help is instant.

To use it elsewhere:
    import run
    config = run.resolve(run.Config(env="CartPole", total_steps=1000))
    print(config.goal, config.pairs_per_session, run.command_line(config))
"""
import argparse
import csv
import dataclasses
import inspect
import json
import math
import os
import shlex
import time


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
# The least and the most that a number may be; None: no most. Every other int is 0 or more, and
# every other float above 0.
AT_LEAST_1 = (1, None)
RANGES = dict(
    dict.fromkeys((
        "total_steps", "hold", "feedback_every", "pairs_per_session", "members", "reward_batch", "reward_epochs",
        "batch_size", "updates", "hidden", "horizon", "action_repeat", "eval_every",
        "eval_episodes", "workers", "rounds", "max_pairs"), AT_LEAST_1),
    candidates=(2, None), query_size=(16, None), reward_size=(47, None), vlm_latency=(0, None),
    vlm_mistakes=(0, 1), vlm_unsure=(0, 1), discount=(0, 1), clip_alpha=(0, 1), max_usd=(0, None),
    reward_mirror=(0, 1), reward_bfloat16=(0, 1), sac_bfloat16=(0, 1), cuda_graph=(0, 1),
    seed=(0, 2**31 - 1),
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
    "workers",
)
METRICS = (
    "step", "episodes", "pairs_asked", "labels", "unsure", "unreadable", "no_answer", "identical",
    "label_accuracy", "train_accuracy", "heldout_accuracy", "reward_accuracy", "eval_return",
    "eval_success", "eval_success_any", "eval_success_frames", "eval_progress", "critic_loss",
    "q_mean", "alpha",
)


class UserError(Exception):
    """Something the user can put right; main() prints it as one line."""


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
    except ValueError as error:
        raise UserError(f"--vlm-extra {config.vlm_extra}: no JSON object ({error})") from None
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


def check_ranges(config):
    """Every number within its range, or one line: `--hold 0` would divide by zero hours later."""
    for field in dataclasses.fields(config):
        value, kind = getattr(config, field.name), str(field.type)
        if value is None or isinstance(value, str):
            continue
        above = "float" in kind and field.name not in RANGES  # a rate: any number above 0
        low, high = RANGES.get(field.name, (0, None))
        # written so that nan and infinity are refused too
        if not (value > low if above else value >= low) or not (
                value < math.inf if high is None else value <= high):
            most = "" if high is None else f", at most {high}"
            least = f"above {low}" if above else f"at least {low}"
            flag = "--" + field.name.replace("_", "-")
            raise UserError(f"{flag} {value}: it must be {least}{most}")


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
        from cached_labels import labeler_of

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

    parser = argparse.ArgumentParser(prog="train.py", description=__doc__.splitlines()[0],
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
    fixed = sorted(set(given) - {"resume"} - set(MAY_CHANGE))
    if fixed:
        raise UserError(
            f"a resumed run keeps its --{fixed[0].replace('_', '-')}; what may change is "
            + ", ".join("--" + name.replace("_", "-") for name in MAY_CHANGE))
    return resumed(given)


def resumed(given):
    """The stored settings of the run in given["resume"], with the changes a started run allows."""
    folder, stored, summary = given["resume"], {}, {"finished": False}
    try:
        with open(os.path.join(folder, "config.json")) as file:
            stored = json.load(file)
        if os.path.exists(os.path.join(folder, "summary.json")):
            with open(os.path.join(folder, "summary.json")) as file:
                summary = json.load(file)
        if not isinstance(stored, dict) or not isinstance(summary, dict) or "command" not in stored:
            raise ValueError("config.json or summary.json is none of ours")  # an audit's has no command
    except (OSError, ValueError) as error:
        raise UserError(f"--resume {folder}: no run folder of train.py ({error})") from None
    # trap: killed between the summary and the report, a run must still be able to finish
    if summary.get("finished") and os.path.exists(os.path.join(folder, "report.html")):
        raise UserError(f"the run in {folder} has finished: "
                        f"see {os.path.join(folder, 'report.html')}")
    names = {field.name for field in dataclasses.fields(Config)}
    return Config(**{**{key: value for key, value in stored.items() if key in names}, **given})


# ---- the run folder ----
class Run:
    """The run folder: what was set, measured and paid for. With resume: as of its checkpoint."""

    def __init__(self, config):
        import torch
        import vlm_query

        self.folder, self.started = config.out, time.time()
        self.state = None  # the last checkpoint
        if config.resume and os.path.exists(self.path("checkpoint", "state.pt")):
            # weights_only: tensors, numbers and strings; a foreign run folder cannot run code here
            try:
                self.state = torch.load(self.path("checkpoint", "state.pt"), weights_only=True)
            except Exception as error:  # a damaged file may raise anything
                raise UserError(f"--resume {self.folder}: its checkpoint cannot be read "
                                f"({' '.join(str(error).split())[:120]})") from None
        elif not config.resume:
            os.makedirs(self.folder)
        # trap: the first file of all: a folder without it could neither be resumed nor used again
        fields = {**dataclasses.asdict(config), "labeler": who_labels(config),
                  "command": command_line(config)}
        write_json(self.path("config.json"), {**fields, "resume": None})
        os.makedirs(self.path("pairs"), exist_ok=True)
        self.rows = self.state["rows"] if self.state else []
        self.seconds_before = self.state["seconds"] if self.state else 0.0
        self._keep("metrics.csv", 1 + len(self.rows) if self.rows else 0)
        self._keep("timing.csv", 1 + len(self.rows) if self.rows else 0)
        self.logged = self.state["logged"] if self.state else 0  # pairs in labels.jsonl
        self.labels = vlm_query.LabelLog(self.path("labels.jsonl"), keep=self.logged)

    def path(self, *names):
        return os.path.join(self.folder, *names)

    def seconds(self):
        return self.seconds_before + time.time() - self.started

    def _keep(self, name, lines):
        """Forget what was written after the checkpoint; it is about to happen again."""
        if os.path.exists(self.path(name)):
            with open(self.path(name), newline="") as file:
                kept = file.readlines()[:lines]
            # trap: emptied, and killed before it is full again, it would have lost them for good
            with open(self.path(name) + ".new", "w", newline="") as file:
                file.writelines(kept)
            os.replace(self.path(name) + ".new", self.path(name))

    def write(self, row):
        """One evaluation: a line in metrics.csv (without the clock) and one in timing.csv."""
        self.rows.append(row)
        for name, columns, values in (
                ("metrics.csv", METRICS, [row.get(key) for key in METRICS]),
                ("timing.csv", ("step", "seconds"), [row["step"], round(self.seconds(), 2)])):
            with open(self.path(name), "a", newline="") as file:
                writer = csv.writer(file)
                if len(self.rows) == 1:
                    writer.writerow(columns)
                writer.writerow([f"{v:.6g}" if isinstance(v, float) else v for v in values])

    def save(self, state):
        """All that a resumed run needs and no file has; the old checkpoint stays until then."""
        import torch

        os.makedirs(self.path("checkpoint"), exist_ok=True)
        state = {**state, "rows": self.rows, "seconds": self.seconds(), "logged": self.logged}
        torch.save(state, self.path("checkpoint", "state.pt.new"))
        # trap: under another name first, so that a kill half-way leaves the old checkpoint whole
        os.replace(self.path("checkpoint", "state.pt.new"), self.path("checkpoint", "state.pt"))


def write_json(path, content):
    with open(path + ".new", "w") as file:
        json.dump(content, file, indent=1)
    os.replace(path + ".new", path)


def command_line(config):
    """The command that makes this run again: every field that differs from its default."""
    flags = [(field.name, getattr(config, field.name)) for field in dataclasses.fields(config)
             if field.name not in ("resume", "out")
             and getattr(config, field.name) != field.default]
    return shlex.join(["python", "train.py"] + [
        part for name, value in flags for part in ("--" + name.replace("_", "-"), str(value))])


# ---- the words a run ends with ----
def status(row, labeler):
    """The numbers behind the progress bar."""
    parts = [f"return {row['eval_return']:.0f}"]
    if "eval_success" in row:
        parts += [f"success {row['eval_success']:.0%}"]
    if labeler.counts["asked"]:
        parts += [f"pairs {labeler.counts['asked']}", f"labels right {labeler.accuracy():.0%}"]
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
            text += ["The learned reward has the true order on "
                     f"{at['fit']['reward_accuracy']:.0%} of picture pairs; "
                     f"Spearman with the true reward over fresh random episodes: {spearman:.2f}."]
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
    text += [f"Report: {run.path('report.html')}"]
    return " ".join(text + (
        [] if finished else [f"- go on with: python train.py --resume {run.folder}"]))
