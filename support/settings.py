"""The settings of a run: every tunable once, the command line, and what a run folder's config.json may say.

What this is: one dataclass, Config, holds every tunable; a field's comment is its text in --help. A value comes from
the first of these that has one: the flag (or --set), the task's schedule (tasks/schedules.py), the default in Config.
Flags and config.json of earlier versions are understood too (modern).
Which STEPs: none.
Names: Config, parse_args, resolve, resumed, settled, command_line; labels_kind, kept_folder, vlm_name, flaws_of,
judge_of, who_labels; UserError, say. Imports nothing large, so that --help is instant.

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
import typing
import unicodedata

from support import judges


# ---- every tunable, once ----
def by_task(default):
    """A field that the task may set: None until resolve(). `default` is for tasks that say nothing about it."""
    return dataclasses.field(default=None, metadata={"default": default})


@dataclasses.dataclass
class Config:
    """A field's comment is its text in --help; the comment above some fields is their title there."""

    # The task
    env: str = "CartPole"  # a built-in task (envs.py), or any Gymnasium id with --goal
    goal: str | None = None  # the goal in words, for the VLM; built-in tasks have one
    reward: str = "preference"  # preference, preference+sparse, code, score, clip, true, sparse
    labels: str = "vlm"  # who compares images: vlm, oracle (true progress), FOLDER of kept answers
    # The VLM (to make one err: --vlm offline:judge=weak or offline:mistakes=0.2; --labels oracle:judge=weak)
    vlm: str = "offline"  # openai|gemini|anthropic|local/MODEL, or offline, which is no VLM
    vlm_url: str | None = None  # address of the server of local/MODEL: http://localhost:11434/v1
    vlm_extra: str = "{}"  # JSON added to each request, null drops a field: {"temperature": null}
    stages: int = 2  # 2: the VLM describes, then decides, as in the paper; 1: in one call
    both_orders: int = 0  # 1: ask each pair both ways round, and keep what agrees
    timeout: float = 120.0  # seconds to wait for an answer; best twice what one takes
    max_calls: int | None = None  # stop asking after this many answers, cached ones included
    max_usd: float | None = None  # stop asking after this many dollars, cached answers included
    usd_per_mtok: str | None = None  # price of a million tokens in dollars, IN,OUT; for --max-usd
    # The schedule (what is not given is the task's own: tasks/schedules.py)
    schedule: str = "ours"  # which schedule of the task to start from: ours, or paper
    total_steps: int | None = by_task(50_000)  # environment steps of the whole run
    explore_steps: int | None = by_task(4000)  # environment steps before the first query session
    feedback_every: int | None = by_task(2000)  # environment steps between two query sessions
    pairs_per_session: int | None = by_task(40)  # pairs of images asked about in one query session
    max_pairs: int | None = by_task(1000)  # pairs of images asked about in the whole run
    sampler: str | None = by_task("uniform")  # how to pick pairs: uniform, disagreement, entropy, best, diverse
    # The run
    seed: int = 0  # seed of all random numbers of the run
    device: str = "auto"  # cpu, cuda, or auto: a GPU only for --fast 2 and --reward clip
    fast: int = 1  # 0: sac.py itself; 1: its gradients by hand; 2: also bfloat16, CUDA graphs
    out: str | None = None  # the run folder to make; otherwise one in runs/, named after the run
    resume: str | None = None  # go on with the run in this folder; with more --total-steps, a finished one too

    # More about the task, the run, exploring and asking
    env_kwargs: str = "{}"  # JSON, arguments of the environment: {"show_robot": true}
    keep_buffer: float = 2.0  # GiB that buffer/ of a finished run may keep, for --resume and more steps
    seed_steps: int | None = by_task(1000)  # environment steps with random actions, at the start
    image_buffer: int = 1000  # images kept to pick pairs from
    workers: int = 8  # questions that are asked at the same time
    soft_labels: int = 0  # 1: a label is P[second is closer], where the server tells token probabilities
    # Rewards without preferences (--reward code, --reward clip)
    potential: str = "level"  # for code: Phi - 1 (level), or the difference of Phi over a step
    unverified: str = "stop"  # for code: stop, or skip a sub-task that no program passes for
    rounds: int = 3  # for code: programs that the VLM may write for one sub-task
    clip_goal: str | None = None  # for clip: the goal as a state: "the pole is upright"
    clip_baseline: str | None = None  # for clip: the scene with nothing achieved: "a pole"
    clip_alpha: float = 0.0  # for clip: 0 to 1, how much of what is neither baseline nor goal to ignore
    clip_model: str = "openai/clip-vit-base-patch32"  # for clip: a model of huggingface.co, or a folder
    # The reward model
    ensemble_size: int = 3  # networks in the ensemble
    reward_lr: float | None = by_task(3e-4)  # learning rate of the reward model
    reward_epochs: int | None = by_task(50)  # most passes over all answers in one fit
    reward_batch: int | None = by_task(16)  # answers in one gradient step of a fit; 64 in the official code
    intercept: int | None = by_task(1)  # 1: a fit finds out how far the VLM leans to the second image
    patience: int = 10  # passes that a fit goes on without gain on held-out answers; 0: no limit
    # SAC
    sac_lr: float | None = by_task(3e-4)  # learning rate of actor, critics and temperature
    lr_at_end: float | None = by_task(0.1)  # share of sac_lr that is left at the end of the run
    batch_size: int | None = by_task(256)  # transitions in one update
    updates: int | None = by_task(1)  # updates after each environment step
    hidden: int | None = by_task(256)  # width of the two hidden layers
    layer_norm: int | None = by_task(0)  # 1: normalise the hidden layers of the critics
    discount: float | None = by_task(0.99)  # what a reward counts one step later, 0 to 1
    # Evaluation
    eval_every: int | None = by_task(5000)  # environment steps between two evaluations
    eval_episodes: int | None = by_task(10)  # episodes in one evaluation
    average_over: float | None = by_task(0.05)  # share of all steps over which a policy is averaged for evaluation
    # Facts of the task, which are no flags
    horizon: int | None = None  # environment steps in an episode
    action_repeat: int | None = by_task(1)  # steps of the simulator in one environment step, with the same action
    hold: int | None = by_task(1)  # environment steps for which one random action is repeated
    vlm_image_size: int | None = by_task(300)  # width and height in pixels of the images the VLM sees
    reward_image_size: int | None = by_task(84)  # width and height in pixels of the images the reward model sees
    random_shift: int | None = by_task(4)  # random shifts of the image in a fit by up to this many pixels
    random_flip: int | None = by_task(0)  # 1: mirror half of the images in a fit (goals without left and right)
    frames: int | None = by_task(1)  # 2: each image shows two moments, so that a speed can be seen
    progress: str | None = None  # what judges labels where info["progress"] does not: reward, or sum of rewards


FIELDS = {field.name: field for field in dataclasses.fields(Config)}
FACTS = ("horizon", "action_repeat", "hold", "vlm_image_size", "reward_image_size", "random_shift", "random_flip",
         "frames", "progress")
FROM_PAIRS = ("preference", "preference+sparse")  # rewards that come from comparing images
GROUPS_IN_HELP = 4  # --help shows the first groups of Config, --help-all has every field
CHOICES = {
    "reward": (*FROM_PAIRS, "code", "score", "clip", "true", "sparse", "function"),
    "schedule": ("ours", "paper"),
    "sampler": ("uniform", "disagreement", "entropy", "best", "diverse"),
    "unverified": ("stop", "skip"),
    "potential": ("level", "difference"),
    "stages": (1, 2),
    "frames": (1, 2),
    "progress": ("reward", "sum"),
    "device": ("auto", "cpu", "cuda"),
}
# The least and the most that a number may be. Every other int is 0 to MOST, and every other float is above 0.
MOST = 2**31 - 1
RANGES = {
    **dict.fromkeys(("hold", "feedback_every", "reward_batch", "reward_epochs", "updates", "horizon",
                     "eval_every", "eval_episodes", "rounds", "max_pairs"), (1, MOST)),
    # Beyond these, memory would run out, or a year pass, without a word.
    "action_repeat": (1, 1000), "total_steps": (1, 10**8), "pairs_per_session": (1, 10**5),
    "ensemble_size": (1, 1000), "hidden": (1, 8192), "batch_size": (1, 10**6), "random_shift": (0, 1000),
    "workers": (1, 256), "timeout": (1, 86_400), "image_buffer": (2, MOST),
    "vlm_image_size": (16, 4096), "reward_image_size": (47, 4096), "discount": (0, 1), "clip_alpha": (0, 1),
    "max_usd": (0, sys.float_info.max), "keep_buffer": (0, sys.float_info.max), "average_over": (0, 1),
    "lr_at_end": (0, 1),
    "random_flip": (0, 1), "fast": (0, 2),
    "intercept": (0, 1), "layer_norm": (0, 1), "soft_labels": (0, 1), "both_orders": (0, 1),
}
KINDS = {int: "a whole number", float: "a number", str: "text"}
# What the stand-in can be told to do wrong: share of wrong and of unsure answers, seconds that an answer takes.
FLAWS = {"mistakes": (0, 1), "unsure": (0, 1), "latency": (0, 3600)}
# What the VLM is told beside the goal with --frames 2.
MOMENTS = " (each image shows two moments of an episode: above the earlier one, below the later one)"
PROGRAM = ("python", "train.py")  # what a user types; tools/ablations.py has a name of its own


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


def words(name, value):
    """One setting as words for the shell: ["--seed", "3"], or ["--set", "hold=7"] for a fact of the task."""
    if name in FACTS:
        return ["--set", f"{name}={value}"]
    flag = "--" + name.replace("_", "-")
    # trap: "--goal -x" would be read as two flags
    return [f"{flag}={value}"] if str(value).startswith("-") else [flag, str(value)]


# ---- who judges: what --labels and --vlm say ----
def labels_kind(config):
    """Who compares the images: "vlm"; "oracle"; "function", handed in from Python; or "kept", the answers (or programs)
    that a file or folder keeps.
    """
    who = config.labels.partition(":")[0]
    return "vlm" if config.labels == "vlm" else who if who in ("oracle", "function") else "kept"


def kept_folder(config):
    """The file or folder of kept answers (with --reward code: the folder of programs), or None."""
    return config.labels if labels_kind(config) == "kept" else None


def function_name(config):
    """What your function is called, which judges or is the reward, or None."""
    return config.labels.partition(":")[2] if labels_kind(config) == "function" else None


def vlm_name(config):
    """The VLM without its flaws: "openai/MODEL", or "offline"."""
    return "offline" if config.vlm.startswith("offline:") else config.vlm  # trap: local/MODEL:7b has a colon too


def flaws_of(config):
    """What whoever labels does wrong on purpose -> {"mistakes": share, "unsure": share, "latency": seconds}.

    Where a judge is named, its words are there as well: {"judge": "weak", "slope": 2.0}.

    Example: --vlm offline:mistakes=0.2,latency=1 gives 0.2, 0.0 and 1.0. A real VLM is told to do nothing wrong.
    """
    asked = "labels" if labels_kind(config) == "oracle" else "vlm"
    return {**dict.fromkeys(FLAWS, 0.0), **read_flaws(asked, getattr(config, asked))}


def judge_of(config):
    """The judge of support/judges.py whose errors the stand-in or the oracle makes -> Judge, or None.

    Example: --vlm offline:judge=weak,latency=1, with the goal and the seed of the run, which its errors depend on.
    """
    return judges.make(flaws_of(config), config.goal, config.seed)


def read_flaws(name, text):
    """The flaws in a value of --vlm or --labels: "offline:mistakes=0.2" -> {"mistakes": 0.2}. UserError if misspelt."""
    who, colon, parts = text.partition(":")
    possible = {("vlm", "offline"): tuple(FLAWS), ("labels", "oracle"): ("mistakes",)}.get((name, who), ())
    found = {}
    for part in parts.split(",") if colon and possible else ():
        flaw, _, number = part.partition("=")
        if flaw in judges.WORDS:
            try:
                found[flaw] = judges.read(flaw, number)
            except ValueError as error:
                raise UserError(f"--{name} {text[:60]}: {error}") from None
            continue
        try:
            low, high = FLAWS[flaw] if flaw in possible else (1, 0)
            found[flaw] = float(number)
            if not low <= found[flaw] <= high:  # true of nan as well
                raise ValueError
        except ValueError:
            ranges = ", ".join(f"{each}= {FLAWS[each][0]} to {FLAWS[each][1]}" for each in possible)
            raise UserError(f"--{name} {text[:60]}: after {who}: there are {ranges}, with commas between; or a judge's "
                            f"{', '.join(f'{word}=' for word in judges.WORDS)}") from None
    if judges.make(found) and (found.get("mistakes") or found.get("unsure")):
        raise UserError(f"--{name} {text[:60]}: a judge has errors of its own: leave out mistakes= and unsure=")
    return dict(sorted(found.items()))


def with_flaws(who, flaws):
    """The way back: "offline", {"mistakes": 0.2} -> "offline:mistakes=0.2"; without flaws only "offline"."""
    # trap: jitter=0 says something, mistakes=0 does not
    parts = [f"{flaw}={value if isinstance(value, str) else f'{value:.12g}'}" for flaw, value in flaws.items()
             if value or flaw not in FLAWS]
    return f"{who}:{','.join(parts)}" if parts else who


def who_labels(config):
    """Who judges, for every banner, table and plot: nothing here may pass for a VLM but a VLM."""
    kept, function = kept_folder(config), function_name(config)
    if function is not None:
        yours = f"your function {function}"
        return f"nobody (the reward is {yours})" if config.reward == "function" else yours
    if config.reward in ("true", "sparse"):
        return f"nobody ({config.reward} reward)"
    if config.reward == "clip":
        return f"CLIP ({config.clip_model}), which is asked nothing"
    if kept and config.reward == "code":
        return f"nobody (programs from {kept})"
    if kept:
        from support.cached_labels import labeler_of

        log = os.path.join(kept, "labels.jsonl") if os.path.isdir(kept) else kept
        # a stand-in stays a stand-in, whoever reads its answers
        return f"answers of {labeler_of(log)}, read from {kept}"
    flaws = flaws_of(config)
    mistakes = f", wrong on purpose in {flaws['mistakes']:.0%}" if flaws["mistakes"] else ""
    if judges.make(flaws):
        mistakes = f", {judges.announce(flaws)}"
    if labels_kind(config) == "oracle" and config.reward in FROM_PAIRS:
        return f"oracle (labels from true progress, not a VLM{mistakes})"
    stand_in = config.vlm.startswith("offline")  # offline/NAME: one that runs already
    return f"offline stand-in (not a VLM{mistakes})" if stand_in else config.vlm


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


# ---- from what was given to the settings of a run ----
def resolve(config, env=None):
    """Check what can be checked before anything is made, and fill every None -> Config. UserError, in one line.

    env: TaskEnv, once it is made: what a schedule would say of one without a schedule depends on it.
    """
    check_values(config)
    check_together(config)
    config = fill(config, env)
    check_values(config)  # a schedule's numbers as well
    return dataclasses.replace(config, device=choose_device(config))


def schedule(env, whose):
    """What "ours" or "paper" sets for a task; {} where there is nothing."""
    from tasks import schedules

    table = {"ours": schedules.OURS, "paper": schedules.PAPER}[whose]
    return table.get(env) or table.get(env.partition("/")[0], {})  # MetaWorld/door-open-v3 is one of "MetaWorld"


def fill(config, env=None):
    """Each None gets the value of the task's schedule, of its entry in envs.py, or the default: the first there is.

    Where there is no schedule, that is adapt.budget(env), if env is given.
    """
    import envs

    values = {name: field.metadata["default"] for name, field in FIELDS.items() if "default" in field.metadata}
    task = envs.entry(config.env)
    if task is not None:
        values.update(goal=task.goal or None, horizon=task.horizon, action_repeat=task.action_repeat,
                      vlm_image_size=task.vlm_image_size, reward_image_size=task.reward_image_size)
        values.update(schedule(config.env, "ours"))
        values.update(schedule(config.env, "paper") if config.schedule == "paper" else {})
    elif env is not None:
        from support import adapt

        values.update(adapt.budget(env, config.total_steps))
    if (config.frames or values["frames"]) == 2:  # two moments share an image, so it is larger
        values.update({name: 3 * values[name] // 2 for name in ("vlm_image_size", "reward_image_size")})
    missing = {name: value for name, value in values.items() if getattr(config, name) is None}
    return dataclasses.replace(config, **missing)


def choose_device(config):
    """cpu or cuda. auto takes a GPU only where it gains: launched one by one, kernels this small are slower on it."""
    if config.device == "cpu" or config.device == "auto" and config.fast < 2 and config.reward != "clip":
        return "cpu"
    import torch

    if config.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch finds no such GPU here; there are cpu, auto")
    return "cuda" if torch.cuda.is_available() else "cpu"


def kind_of(name):
    """The type of a field's value where it has one: int, float or str."""
    kind = FIELDS[name].type
    return (typing.get_args(kind) or (kind,))[0]


def check_values(config):
    """Every value of its kind, among its choices and in its range, or one line. An episode of 0 steps would end in an
    error hours later; and config.json may have been edited, or be a stranger's.
    """
    for name, field in FIELDS.items():
        value, kind = getattr(config, name), kind_of(name)
        if value is None and field.default is None:
            continue
        said = " ".join(words(name, str(value)[:60]))
        right = isinstance(value, kind) or kind is float and isinstance(value, int)  # 1, where 1.0 is meant
        if not right or isinstance(value, bool) or kind is str and "\0" in value:
            raise UserError(f"{said}: it must be {KINDS[kind]}")
        if name in CHOICES and value not in CHOICES[name]:
            raise UserError(f"{said}: there are {', '.join(map(str, CHOICES[name]))}")
        if kind is str:
            continue
        rate = kind is float and name not in RANGES  # a learning rate: any number above 0
        low, high = RANGES.get(name, (0, sys.float_info.max if rate else MOST))
        # written so that nan and infinity are refused as well
        if not ((value > low if rate else value >= low) and value <= high):
            least, most = "above" if rate else "at least", f", at most {high}" * (high < sys.float_info.max)
            raise UserError(f"{said}: it must be {least} {low}{most}")
    read_flaws("vlm", config.vlm)
    read_flaws("labels", config.labels)


def check_together(config):
    """What settings ask of each other, and of the texts that they hold: one line where something does not fit."""
    price_of(config)
    kind, flaws = labels_kind(config), read_flaws("vlm", config.vlm)
    if config.reward not in FROM_PAIRS and kind != "vlm" and (config.reward, kind) not in (
            ("code", "kept"), ("function", "function")):
        raise UserError(f"--reward {config.reward} compares no images: leave out --labels")
    if kind == "kept" and not os.path.exists(config.labels):
        raise UserError(f"--labels {config.labels[:100]}: there are vlm, oracle, oracle:mistakes=0.2, or a folder or "
                        "file of kept answers (with --reward code: of programs), and none has this name")
    if config.reward in ("score", "code") and judges.make(flaws):
        raise UserError(f"--vlm {config.vlm[:60]}: a judge compares two images, and --reward {config.reward} does not")
    if config.frames == 2 and config.reward not in (*FROM_PAIRS, "score"):
        raise UserError(f"--frames 2 is for rewards that are learned from answers about images, not --reward "
                        f"{config.reward}")
    if config.frames == 2 and kind == "vlm" and vlm_name(config).startswith("offline"):
        raise UserError("--frames 2: the offline stand-in reads images of one moment; name a real VLM with --vlm, or "
                        "--labels oracle")
    if config.both_orders and config.reward not in FROM_PAIRS:
        raise UserError(f"--both-orders 1: --reward {config.reward} asks about no pairs")
    if config.soft_labels and (kind != "vlm" or config.reward not in FROM_PAIRS):
        raise UserError("--soft-labels 1: only a VLM that compares images tells how sure it is: leave out "
                        + ("--labels" if config.reward in FROM_PAIRS else "--reward"))
    if config.reward == "score" and flaws.get("mistakes"):
        raise UserError(f"--vlm {config.vlm}: a mistake exchanges two images, and --reward score shows only one")
    if kind == "oracle" and any(flaws.values()):
        raise UserError(f"--vlm {config.vlm}: that is a flaw of the offline stand-in, which is not asked here; for the "
                        "oracle's own: --labels oracle:mistakes=0.2")
    if kind == "function" and (any(flaws.values()) or config.max_calls is not None or config.max_usd is not None):
        raise UserError("--vlm offline:..., --max-calls and --max-usd are for a VLM over HTTP, which is not asked "
                        "here: limit your function by --max-pairs")
    if kind == "oracle" and judge_of(config) and judge_of(config).blind:
        raise UserError(f"--labels {config.labels[:60]}: an oracle knows progress, which has no sides; a judge that is "
                        "blind on one is --vlm offline:judge=one-sided")
    if vlm_name(config) == "offline" and config.vlm_url:
        raise UserError("--vlm offline starts a stand-in of its own; for one that runs already: "
                        "--vlm offline/NAME --vlm-url URL")
    if config.reward == "clip" and config.clip_alpha and not config.clip_baseline:
        raise UserError("--clip-alpha needs --clip-baseline, a sentence for nothing achieved")
    if config.schedule == "paper" and not schedule(config.env, "paper"):
        raise UserError(f"--schedule paper: the paper has no task {config.env}")
    for name in ("vlm_extra", "env_kwargs"):
        text = getattr(config, name)
        try:
            if not isinstance(json.loads(text), dict):
                raise ValueError("not an object in braces")
            json.dumps(json.loads(text))  # trap: it may be nested too deep to be sent
        except (ValueError, RecursionError) as error:
            raise UserError(f"{words(name, '')[0]} {text[:80]}: no JSON object ({error})") from None


# ---- the command line ----
def explained():
    """{title of a group: {field: its help text}}, from the comments of Config: each setting is explained once."""
    groups = {}
    for line in inspect.getsource(Config).splitlines():
        code, _, comment = line.partition("# ")
        if comment and not code.strip():
            fields = groups[comment] = {}
        elif comment:
            fields[code.partition(":")[0].strip()] = comment
    return groups


def help_text(every=False):
    """The lines of --help, or of --help-all with every=True."""
    wide = 24 if every else 19  # the longest flag
    lines = ["usage: python train.py [--flag value ...]",
             "A goal in words and images of a task go in, a trained policy comes out (RL-VLM-F and VLM-CaR)."]
    for title, fields in list(explained().items())[:None if every else GROUPS_IN_HELP]:
        lines += ["", f"{title}:"]
        for name, text in fields.items():
            flag, default = " ".join(words(name, "")).strip(), FIELDS[name].default
            lines += [f"  {flag:<{wide}}  {text}" + ("" if default is None else f" (default: {default})")]
    return lines + ["", f"  {'--set name=value':<{wide}}  any field of Config (settings.py), such as horizon=100",
                    f"  {'--watch FOLDER':<{wide}}  no training: a film of the policy in this run folder",
                    f"  {'--help-all':<{wide}}  all settings"]


def answer_help(arguments):
    """Where --help or --help-all is among the arguments: print it, and end the program."""
    if {"-h", "--help", "--help-all"} & set(arguments):
        say(*help_text(every="--help-all" in arguments))
        raise SystemExit(0)


def parse_args(arguments):
    """The shell's words -> Config, with None where nothing was given; UserError, in one line.

    Old spellings are taken as well: those in OLD, and --horizon and so on for the FACTS of a task.
    """
    answer_help(arguments)

    def fail(message):
        possible = ", ".join(" ".join(words(name, "")).strip() for name in FIELDS)
        raise UserError(f"{message}; there are {possible}" if "unrecognized" in message else message)

    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    parser.error = fail
    for name in [*FIELDS, *OLD]:
        parser.add_argument("--" + name.replace("_", "-"))
    parser.add_argument("--set", action="append", default=[])
    given = vars(parser.parse_args(arguments))
    for word in given.pop("set"):
        name, equals, text = word.partition("=")
        if not equals or name not in (*FIELDS, *OLD):
            raise UserError(f"--set {word[:60]}: write name=value; the names are {', '.join(FIELDS)}")
        given[name] = text
    given = {name: from_text(name, value) for name, value in modern(given).items()}
    for name in {"out", "resume", "labels"} & set(given):
        given[name] = os.path.expanduser(given[name])  # trap: in --out=~/run the shell leaves the ~ as it is
    check_values(Config(**given))
    return resumed(given) if "resume" in given else Config(**given)


def from_text(name, text):
    """A value as the shell has it -> as Config has it: "4e3" is the whole number 4000."""
    kind = kind_of(name)
    if kind is str:
        return text
    try:
        number = float(text)
        if kind is int and not number.is_integer():  # nor is infinity, nor nan
            raise ValueError
    except ValueError:
        raise UserError(f"{' '.join(words(name, text[:60]))}: it must be {KINDS[kind]}") from None
    return kind(number)


def command_line(config, env=None):
    """The shortest command that makes this run again: only what resolve() would not fill in by itself.

    env: TaskEnv of this run, where it is known.
    """
    device = choose_device(dataclasses.replace(config, device="auto"))
    alike = Config(env=config.env, schedule=config.schedule, frames=config.frames)
    # trap: where env is none of ours, the schedule follows from total_steps, which must be named all the same
    plain = dataclasses.replace(fill(dataclasses.replace(alike, total_steps=config.total_steps), env),
                                total_steps=fill(alike, env).total_steps, env=Config.env, schedule=Config.schedule,
                                frames=FIELDS["frames"].metadata["default"], device=device)
    differ = {name: value for name, value in dataclasses.asdict(config).items() if name not in ("out", "resume")
              and value not in (FIELDS[name].default, getattr(plain, name))}
    if from_python(config):
        return in_python(config, differ)
    return shlex.join([*PROGRAM, *[word for item in differ.items() for word in words(*item)]])


# ---- what is handed in from Python ----
def from_python(config):
    """What no command line can say -> {argument of train(): a name for it}, of env, judge and reward."""
    found = {"env": config.env.rpartition(".")[2]} if "." in config.env and ":" not in config.env else {}
    if config.reward == "function" or labels_kind(config) == "function":
        found["reward" if config.reward == "function" else "judge"] = function_name(config) or ""
    return {argument: name if name.isidentifier() else "..." for argument, name in found.items()}


def in_python(config, given):
    """The call that makes a run which no command line can make: "train(Config(env='CartPole'), judge=my_judge)"."""
    handed = from_python(config)
    named = {*handed, *(("labels",) if handed.keys() & {"judge", "reward"} else ())}  # what a function says by itself
    told = ", ".join(f"{name}={value!r}" for name, value in given.items() if name not in named)
    return f"train({', '.join([f'Config({told})', *(f'{name}={value}' for name, value in handed.items())])})"


def settled(config, judge=None, reward=None, **others):
    """The settings of train(), with what was handed in from Python -> Config.  UserError, in one line.

    judge, reward: functions, see support/yours.py. Their names become part of the settings, for no banner and no run
    folder may pass over who judged. Config(resume=FOLDER) becomes the settings that are stored there.
    """
    if config.resume and os.path.exists(os.path.join(config.resume, "config.json")):
        config = resumed({name: value for name, value in dataclasses.asdict(config).items()
                          if name not in ("out", "device") and value != FIELDS[name].default})
    handed = {name: given for name, given in (("judge", judge), ("reward", reward)) if given is not None}
    stored = {*from_python(config)} - {"env"}
    if stored - {*handed}:
        folder = config.resume or "FOLDER"
        raise UserError(f"{'--resume ' * bool(config.resume)}{folder}: its {stored.pop()} is a function of yours, "
                        f"which only Python can hand in: {resume_command(config, folder)}")
    for name, function in handed.items():
        if not callable(function) and not hasattr(function, "ask"):
            raise UserError(f"{name}={function!r:.60} is no function")
        if name == "judge" and config.reward not in FROM_PAIRS:
            raise UserError(f"judge=: --reward {config.reward} compares no images, so there is nothing to judge")
        if len(handed) > 1 or not stored and (config.labels != "vlm" or (name, config.reward) not in (
                *(("judge", kind) for kind in FROM_PAIRS), ("reward", "preference"))):
            raise UserError(f"{' and '.join(handed)}: your function takes the place of --labels and --reward: give one "
                            f"of judge=, reward=, --labels {config.labels[:60]}, --reward {config.reward}")
        called = str(getattr(function, "__name__", type(function).__name__))[:60]
        config = dataclasses.replace(config, labels=f"function:{called}",
                                     reward="function" if name == "reward" else config.reward)
    return config


# ---- the spellings of earlier versions ----
RENAMED = {
    "members": "ensemble_size", "candidates": "image_buffer", "query_size": "vlm_image_size",
    "reward_size": "reward_image_size", "reward_shift": "random_shift", "reward_mirror": "random_flip",
    "labels_from": "labels", "programs": "labels",
}
FASTER = ("reward_bfloat16", "sac_bfloat16", "cuda_graph")
OLD = (*RENAMED, *FASTER, "vlm_mistakes", "vlm_unsure", "vlm_latency", "without", "keep_best", "best_policy")


def modern(values):
    """Settings of any version, {name: value} from the shell or a config.json -> the same by today's names.

    Example: {"members": 5, "labels": "oracle", "vlm_mistakes": 0.2}
          -> {"ensemble_size": 5, "labels": "oracle:mistakes=0.2"}
    """
    given = {name: value for name, value in values.items() if name not in OLD}
    old = {name: value for name, value in values.items() if name in OLD and value not in (None, "")}
    given.update({RENAMED[name]: value for name, value in old.items() if name in RENAMED})
    if given.get("labels") in ("vlm", "oracle") and {"labels_from", "programs"} & set(old):
        given["labels"] = os.path.join(".", given["labels"])  # a folder of this name
    on = {name: value for name, value in old.items() if name not in RENAMED and value not in (0, "0", "0.0", "nothing")}
    if "without" in on:
        part = str(on["without"])[:60]
        raise UserError(f"--without {part} is written in another way now: " + (
            "give as many --seed-steps as --explore-steps" if part == "novelty" else
            f"python -m tools.ablations {part} ..."))
    if {"keep_best", "best_policy"} & set(on):
        raise UserError("the best policy so far is not kept any more: what is evaluated is an average of the last ones "
                        "(--average-over SHARE)")
    if any(name in on for name in FASTER):
        given["fast"] = 2
    flaws = {flaw: on[f"vlm_{flaw}"] for flaw in FLAWS if f"vlm_{flaw}" in on}
    if "mistakes" in flaws and given.get("labels") == "oracle":
        given["labels"] = f"oracle:mistakes={flaws.pop('mistakes')}"
    if flaws and given.get("vlm", "offline") != "offline":
        raise UserError(f"--vlm-{next(iter(flaws))} is a flaw of the offline stand-in, which is not asked here")
    if flaws:
        given["vlm"] = "offline:" + ",".join(f"{flaw}={number}" for flaw, number in flaws.items())
    return given


# ---- going on with a run ----
MAY_CHANGE = ("max_pairs", "max_calls", "max_usd", "usd_per_mtok", "vlm_url", "vlm_extra", "workers", "timeout",
              "total_steps", "keep_buffer")  # total_steps only upwards
MAY_MOVE = ("out", "resume", "device")  # the folder may lie elsewhere now, or on another machine
NAMED_AGAIN = ("env", "env_kwargs", "vlm_url", "clip_model")  # what to_name_again() may ask for


def must_stay(values):
    """What of its settings a resumed run has to keep: {name: value}, of any version -> {name: value}, to be compared.

    Kept answers may lie elsewhere now, and the stand-in may take longer: neither changes a number.
    """
    values = {name: value for name, value in modern(values).items() if name in FIELDS}
    config = Config(**values)
    kind, flaws = labels_kind(config), {**flaws_of(config), "latency": 0.0}
    told = {"labels": with_flaws("oracle", flaws) if kind == "oracle" else kind,
            "vlm": vlm_name(config) if kind == "oracle" else with_flaws(vlm_name(config), flaws)}
    return {name: told.get(name, value) for name, value in values.items() if name not in MAY_CHANGE + MAY_MOVE}


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


def read_run(folder, flag):
    """What a run folder says of its run -> its settings {name: value}, checked as flags are, and summary.json, or {}.

    flag: for messages, such as --resume.  UserError, in one line, where the folder is no run of ours.
    """
    summary = {}
    try:
        stored = read_json(os.path.join(folder, "config.json"))
        if os.path.exists(os.path.join(folder, "summary.json")):
            summary = read_json(os.path.join(folder, "summary.json"))
        if "command" not in stored:
            raise ValueError("config.json is none of ours")  # an audit's has no command
    except (OSError, ValueError) as error:
        raise UserError(f"{flag} {folder}: no run folder of train.py ({error})") from None
    try:
        stored = {name: value for name, value in modern(stored).items() if name in FIELDS}
        check_values(Config(**stored))
    except UserError as error:
        raise UserError(f"config.json in {folder}: {error}") from None
    return stored, summary


def resumed(given):
    """The stored settings of the run in given["resume"], with the changes that a started run allows -> Config."""
    folder = given["resume"]
    stored, summary = read_run(folder, "--resume")
    had, taken = stored.get("total_steps") or 0, summary.get("steps")
    steps = given.get("total_steps") or had
    if steps < had:
        raise UserError(f"--total-steps {steps}: the run in {folder} has {had:,}, and a resumed one may only have more")
    # trap: killed between the summary and the report, a run must still be able to finish
    finished = summary.get("finished") and os.path.exists(os.path.join(folder, "report.html"))
    if finished and not (isinstance(taken, int) and taken < steps):
        raise UserError(f"the run in {folder} has finished: see {os.path.join(folder, 'report.html')}; to train it on: "
                        "--total-steps MORE")
    if finished and not os.path.exists(os.path.join(folder, "buffer")):
        raise UserError(f"the run in {folder} has finished and kept no buffer/, without which it cannot be trained on "
                        "(--keep-buffer GIB, when it is begun); a new run may learn from its answers: --labels FOLDER")
    if given.get("vlm", "").startswith("offline:"):  # flaws that are not named stay
        flaws = {**read_flaws("vlm", stored.get("vlm", "")), **read_flaws("vlm", given["vlm"])}
        given = {**given, "vlm": with_flaws("offline", flaws)}
    config = Config(**{**stored, **given})
    before, now = must_stay(stored), must_stay(dataclasses.asdict(config))
    fixed = [name for name in sorted(given) if name not in (*MAY_CHANGE, "resume")
             and (name not in before or before[name] != now.get(name))]
    if fixed:
        raise UserError(f"a resumed run keeps its {words(fixed[0], '')[0]}; what may change is "
                        + ", ".join(words(name, "")[0] for name in MAY_CHANGE))
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
    if config.env_kwargs != Config.env_kwargs:
        # trap: some of Gymnasium's own ids import a module that their arguments name
        found["env_kwargs"] = f"its environment would be made with {config.env_kwargs}"
    wire = PROVIDERS.get(vlm_name(config).partition("/")[0])
    official = wire and wire.url and "/".join(wire.url.split("/")[:3]) + "/"  # scheme://host/
    if (config.vlm_url and wire and os.environ.get(wire.variable)
            and not (official and f"{config.vlm_url}/".startswith(official))):
        found["vlm_url"] = f"your {wire.variable} would be sent to {config.vlm_url}"
    if config.reward == "clip" and config.clip_model != Config.clip_model:
        found["clip_model"] = f"the model {config.clip_model} would be loaded"
    return found


def resume_command(config, folder):
    """The command that goes on with the run, ready to be pasted into a shell; or into Python, where it must be."""
    if from_python(config):
        return in_python(config, {"resume": folder, **{name: getattr(config, name) for name in to_name_again(config)}})
    again = [word for name in to_name_again(config) for word in words(name, getattr(config, name))]
    return shlex.join([*PROGRAM, "--resume", folder, *again])
