"""The settings of a run: every tunable once, the command line, and what a run folder's config.json may say.

What this is: one dataclass, Config, holds every tunable; its comments are the --help text. Each field has one default, here
or in the schedule of its task (tasks/schedules.py); a flag comes after both.
Which STEPs: none.
Names: Config, resolve, parse_args, who_labels, UserError, say. Imports nothing large, so that --help is instant.

To use it elsewhere:
    from support import settings
    config = settings.resolve(settings.Config(env="CartPole", total_steps=1000))
    print(config.goal, config.pairs_per_session, settings.command_line(config))
"""
import argparse
import dataclasses
import inspect
import json
import math
import os
import shlex
import sys
import unicodedata


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
    image_buffer: int = 1000  # pictures kept to ask about
    without: str = "nothing"  # leave one part out: novelty, relabelling or critic-reset
    # The reward model
    ensemble_size: int = 3  # networks in the ensemble
    reward_lr: float | None = None  # learning rate of the reward model
    patience: int = 3  # passes a fit goes on without gain on held-out answers; 0: no limit
    reward_batch: int | None = None  # answers in one step of a fit: 16, in the official code 64
    reward_epochs: int | None = None  # passes over all answers in one session, at most
    vlm_image_size: int | None = None  # pixels of the picture the VLM sees
    reward_image_size: int | None = None  # pixels of the picture the reward model sees
    random_shift: int | None = None  # pixels by which a fit moves it at random, at most
    reward_bfloat16: int = 0  # 1: its convolutions in half the bits; faster with AVX512-BF16 or AMX
    random_flip: int | None = None  # 1: a fit mirrors half of them (a goal without left and right)
    # SAC
    sac_lr: float | None = None  # learning rate of actor, critics and temperature
    batch_size: int | None = None  # transitions in one update
    updates: int | None = None  # updates after each environment step
    hidden: int | None = None  # width of the two hidden layers
    sac_bfloat16: int = 0  # 1: the second in half the bits; faster with AVX512-BF16 or AMX
    discount: float | None = None  # what a reward one step later is worth
    device: str = "auto"  # cpu, cuda, or auto: cuda where there is one, for --cuda-graph 1 and --reward clip
    cuda_graph: int = 0  # 1, for a GPU: an update of SAC, a step of a fit to answers is recorded once, then replayed
    fast: int = 0  # stopgap
    # Watching
    horizon: int | None = None  # steps in an episode
    action_repeat: int | None = None  # the simulator's steps in one of ours, with the same action
    eval_every: int | None = None  # environment steps between evaluations
    eval_episodes: int | None = None  # episodes in one evaluation
    best_policy: int | None = None  # episodes on which the best policy so far is chosen; 0: the newest
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
        "total_steps", "hold", "feedback_every", "pairs_per_session", "ensemble_size", "reward_batch", "reward_epochs",
        "batch_size", "updates", "hidden", "horizon", "action_repeat", "eval_every",
        "eval_episodes", "rounds", "max_pairs"), AT_LEAST_1),
    workers=(1, 256), timeout=(1, 86_400),
    # the mosts: beyond them memory, or a year, would run out without a word
    total_steps=(1, 10**8), pairs_per_session=(1, 10**5), ensemble_size=(1, 1000), hidden=(1, 8192),
    batch_size=(1, 10**6), random_shift=(0, 1000),
    image_buffer=(2, None), vlm_image_size=(16, 4096), reward_image_size=(47, 4096), vlm_latency=(0, 3600),
    vlm_mistakes=(0, 1), vlm_unsure=(0, 1), discount=(0, 1), clip_alpha=(0, 1), max_usd=(0, None),
    random_flip=(0, 1), reward_bfloat16=(0, 1), sac_bfloat16=(0, 1), cuda_graph=(0, 1),
    seed=(0, MOST),
)
# What a task that is not built in starts from; tasks/schedules.py overrides it for those that are.
DEFAULTS = dict(
    total_steps=50_000, seed_steps=1000, hold=1, explore_steps=4000, feedback_every=2000,
    pairs_per_session=40, max_pairs=1000, sampler="uniform", reward_lr=3e-4, reward_batch=16, reward_epochs=50,
    vlm_image_size=300, reward_image_size=84, random_shift=4, random_flip=0, sac_lr=3e-4, batch_size=256,
    updates=1, hidden=256, discount=0.99, action_repeat=1, eval_every=5000, eval_episodes=10,
    best_policy=0,
)
MAY_CHANGE = (  # on resume
    "max_pairs", "max_calls", "max_usd", "usd_per_mtok", "vlm_url", "vlm_extra", "vlm_latency",
    "workers", "timeout",
)
MAY_MOVE = ("out", "resume", "device", "programs", "labels_from")  # the files may lie elsewhere now
NAMED_AGAIN = ("env", "vlm_url", "clip_model")  # on resume, where to_name_again() wants it


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


# ---- the settings ----
def schedule(env, whose):
    """What "ours" or "paper" sets for a task; {} where there is nothing."""
    from tasks import schedules

    return {"ours": schedules.OURS, "paper": schedules.PAPER}[whose].get(env, {})


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
                      vlm_image_size=task.vlm_image_size, reward_image_size=task.reward_image_size)
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


def command_line(config):
    """The command that makes this run again: every field that differs from its default."""
    flags = [(field.name, getattr(config, field.name)) for field in dataclasses.fields(config)
             if field.name not in ("resume", "out")
             and getattr(config, field.name) != field.default]
    return shlex.join(["python", "train.py"] + [
        part for name, value in flags for part in ("--" + name.replace("_", "-"), str(value))])


# stopgap until settings are rebuilt
def flaws_of(config):
    return {"mistakes": config.vlm_mistakes, "unsure": config.vlm_unsure, "latency": config.vlm_latency}


def vlm_name(config):
    return config.vlm


def kept_folder(config):
    return config.labels_from or config.programs


def labels_kind(config):
    return "kept" if kept_folder(config) else config.labels
