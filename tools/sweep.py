"""Many runs, one table: tasks x settings x seeds as train(config) calls, on this machine or on a Ray cluster.

    python -m tools.sweep                                              what sweeps there are
    python -m tools.sweep few_questions --seeds 5 --only CartPole      one of them, or a part of it
    python -m tools.sweep --grid env=CartPole max_pairs=10,20,50 seed=0,1,2 --name my_sweep
    python -m tools.sweep tasks --address auto                         the same on a cluster, a run for each of its CPUs
    python -m tools.sweep tasks --set vlm=openai/MODEL --name tasks_openai        the same with a real VLM
    python -m tools.sweep --plot results/few_questions.csv             its plots, beside it

What this is: how every table of results/README.md was made. Which STEPs: all, through train.py. Two runs at a time,
on Ray if it is installed (pip install -r tools/requirements-sweep.txt), else as processes; each run in a fresh process
of its own, so that none can take another down. Stop it whenever you like: the same command goes on, skipping finished
runs and resuming half-done ones from their checkpoints. A run that fails is a row with an `error`, and is tried again
next time.

It leaves: results/NAME.csv, a row per finished run, and results/NAME_curves.csv, a row per evaluation of each of them;
rows of earlier calls stay, unless a newer run of the same task, method, setting and seed takes their place.
runs/sweeps/NAME/TASK-SETTING-seedN/ is the run folder; train.log in it (beside it while it runs) is what it printed.

Shapes: none.  Names: a setting is {field of Config, or one of PSEUDO: value}; a Job is a setting of a task with a seed.
SWEEPS, plan, sweep, run_one.

To use it elsewhere:
    from tools import sweep
    jobs = [job for job in sweep.plan("what_matters", seeds=2) if job.task == "CartPole"]
    print(len(jobs), "runs, for example", jobs[0].setting, jobs[-1].setting, jobs[-1].overrides)
    # sweep.sweep(jobs, "what_matters", parallel=2) runs them; the rows: results/what_matters.csv
"""
import argparse
import contextlib
import csv
import dataclasses
import fcntl
import itertools
import json
import multiprocessing
import os
import re
import sys
import threading
import traceback
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

HERE = Path(__file__).resolve().parents[1]


# ---- what there is to be learned: every sweep, once ----
def grid(**fields):
    """Every combination of the values: grid(a=(1, 2), b=(3,)) -> {"a=1 b=3": {...}, "a=2 b=3": {...}}."""
    combinations = (dict(zip(fields, values)) for values in itertools.product(*fields.values()))
    return {" ".join(f"{name}={value}" for name, value in each.items()): each for each in combinations}


def asking(sampler, n):
    """n questions spread over six sessions (fewer, for few), whatever the task's own schedule is."""
    return {"max_pairs": n, "sampler": sampler, "pairs_per_session": max(5, -(-n // 6))}


@dataclasses.dataclass
class Sweep:
    """question: what it answers.  tasks: names.  settings: {its name in the CSV: {field of Config: value}}.

    seeds: how many; by default SEEDS says it for each task.  of_task: {task: {field: value}}, which all its runs share.
    """

    question: str
    tasks: tuple
    settings: dict
    seeds: int | None = None
    of_task: dict = dataclasses.field(default_factory=dict)


SEVEN = ("CartPole", "FoldCloth", "StraightenRope", "PassWater", "DrawerOpen", "Soccer", "SweepInto")
TWO = ("CartPole", "DrawerOpen")
# Judges of support/judges.py: models whose errors are published, and kinds of errors.
JUDGES = ("gemini-1.5-flash", "gemini-2.0-flash", "qwen2.5-vl-7b", "qwen2.5-vl-3b", "minicpm-v-2.6", "internvl2-8b",
          "good", "weak", "stuck", "inverted", "blurry", "one-sided")
# Environments that are not built in, or only by their name: the words of a sweep, and what its runs have in common.
NOT_BUILT_IN = {
    "Dot": {"env": "tasks.example:Dot-v0", "goal": "the white dot is in the green ring", "total_steps": 12_000,
            "random_flip": 1},  # left and right are alike
    "EmptyGrid": {"env": "tasks.example:EmptyGrid-v0", "goal": "the red triangle is on the green square",
                  "total_steps": 15_000},
    "FetchReach": {"env": "gymnasium_robotics:FetchReachDense-v4", "goal": "the gripper is at the red dot",
                   "total_steps": 15_000, "reward_image_size": 100, "env_kwargs": json.dumps({
                       "width": 300, "height": 300, "default_camera_config": {  # nearer than its own
                           "distance": 1.1, "azimuth": 132, "elevation": -14, "lookat": [1.34, 0.75, 0.55]}})},
    "reach-v3": {"env": "MetaWorld/reach-v3", "goal": "the gripper is at the red dot"},
    "door-open-v3": {"env": "MetaWorld/door-open-v3", "goal": "to open the door"},
    "InvertedDoublePendulum": {"env": "InvertedDoublePendulum-v5", "goal": "both poles stand upright",
                               "total_steps": 15_000},
    "LunarLander": {"env": "LunarLander-v3", "goal": "the lander stands on the ground between the two flags",
                    "total_steps": 40_000},
    "Swimmer": {"env": "Swimmer-v5", "goal": "to swim to the right as fast as possible", "frames": 2,
                "total_steps": 40_000},
}
PLAIN, BOTH = {"intercept": 0}, {"both_orders": 1}  # without any remedy; with the one that is not the default
SEEDS = {"DrawerOpen": 3, "Soccer": 3, "SweepInto": 3}  # five for every other task
SWEEPS = {
    "cartpole": Sweep("Does the README's first command work, and with one answer in five wrong?", ("CartPole",), {
        "default": {},
        "one answer in five wrong": {"vlm_mistakes": 0.2, "max_pairs": 300, "pairs_per_session": 100},
    }),
    "tasks": Sweep("What does each method reach on the paper's seven tasks?", SEVEN, {
        "preference": {},
        "oracle": {"labels": "oracle"},
        "true": {"reward": "true"},
        "sparse": {"reward": "sparse"},
        "score": {"reward": "score"},
    }),
    "held": Sweep("Is success kept once it is reached, on every seed?", SEVEN, {"default": {}}, seeds=10),
    "code_as_reward": Sweep("Does a reward that a VLM wrote as programs, once, teach the task?",
                            ("CartPole", "DrawerOpen", "SweepInto", "StraightenRope", "DoorKey-6x6"), {
        reward: {"reward": reward} for reward in ("code", "sparse", "true", "preference")}),
    "code_or_sparse": Sweep("Does it beat the sparse reward where that is rare?", ("DoorKey-8x8",), {
        "code": {"reward": "code", "total_steps": 40_000}, "sparse": {"reward": "sparse", "total_steps": 40_000}}),
    "few_questions": Sweep("How few questions suffice?", TWO, {
        f"{sampler} {n}": asking(sampler, n)
        for sampler in ("uniform", "diverse") for n in (10, 20, 50, 100, 200, 500, 1000)
    }),
    "weak_vlm": Sweep("How good must the VLM be?", TWO, {
        **grid(vlm_mistakes=(0.0, 0.1, 0.2, 0.3, 0.4), patience=(3, 0)),
        **grid(vlm_unsure=(0.2, 0.4, 0.6, 0.8)),
        **grid(vlm_unsure=(0.2, 0.4, 0.6, 0.8), patience=(0,)),
    }),
    # At equal calls: with both orders, a pair counts twice.
    "judges": Sweep("How good must the VLM be, if it errs as VLMs do?", ("CartPole",), {
        f"{judge}, {remedy}": {"judge": judge, "max_pairs": 300, "pairs_per_session": 100, **fields}
        for judge in JUDGES for remedy, fields in {"plain": PLAIN, "default": {}, "both orders": BOTH}.items()}),
    "judges_drawer": Sweep("The same on DrawerOpen, with models whose errors there are published.", ("DrawerOpen",), {
        f"{judge}, {remedy}": {"judge": judge, **fields}
        for judge in ("gemini-1.5-flash", "gemini-2.0-flash", "qwen2.5-vl-7b", "qwen2.5-vl-3b")
        for remedy, fields in {"plain": PLAIN, "default": {}, "both orders": BOTH}.items()}),
    "hint": Sweep("Success as the reward and what was learned as its potential, or either alone?",
                  ("DrawerOpen", "DoorKey-6x6"), {
        "sparse": {"reward": "sparse"}, "preference": {"judge": "weak"},
        "preference+sparse": {"judge": "weak", "reward": "preference+sparse"}}, seeds=3),
    "not_built_in": Sweep("Is a task learned that is not built in, with right labels?", tuple(NOT_BUILT_IN), {
        "oracle": {"labels": "oracle"}}, seeds=3, of_task=NOT_BUILT_IN),
    "what_matters": Sweep("What does each part contribute? One change at a time.", TWO, {
        "default": {},
        "no relabelling": {"ablation": "relabelling"},
        "no novelty exploration": {"seed_steps": "explore_steps"},
        "no critic reset": {"ablation": "critic-reset"},
        "one member": {"ensemble_size": 1},
        "one stage": {"stages": 1},
        "64 px": {"reward_image_size": 64},
        "100 px": {"reward_image_size": 100},
        "200 px": {"reward_image_size": 200},
        "64 answers a step": {"reward_batch": 64},
        "one epoch a session": {"reward_epochs": 1},
        "fit to convergence": {"reward_epochs": 200},
        "bfloat16": {"fast": 2},  # on a processor that has it
    }),
    "steady": Sweep("What keeps success, once it is reached? One change at a time.", ("DrawerOpen",), {
        "default": {},
        "newest policy": {"average_over": 0.0},
        "one update a step": {"updates": 1},
        "discount .99": {"discount": 0.99},
        "smaller steps": {"sac_lr": 5e-4},
        "uniform pairs": {"sampler": "uniform"},
        "before": {"average_over": 0.0, "updates": 1, "discount": 0.99, "sac_lr": 5e-4, "sampler": "uniform",
                   "hidden": 256, "batch_size": 256},
        "before, averaged": {"updates": 1, "discount": 0.99, "sac_lr": 5e-4, "sampler": "uniform",
                             "hidden": 256, "batch_size": 256},
    }),
}
# Settings of a sweep that Config has no field for: wrong and unsure answers, and the judge as which it errs (a name, or
# numbers: "slope=3,lean=1.1"; see support/judges.py), are part of the stand-in's name, and to leave a part out is what
# tools/ablations.py does. Each is a column of the table, with this value where a setting says
# nothing.
PSEUDO = {"vlm_mistakes": 0.0, "vlm_unsure": 0.0, "judge": "none", "ablation": "nothing"}
SMALL = ("config.json", "summary.json", "metrics.csv", "timing.csv", "labels.jsonl", "episodes.csv", "report.html",
         "train.log")  # what comes back from another machine; images and checkpoints stay there
KEY = ("task", "method", "setting", "seed")  # what makes two rows the same run
MEASURES = ("steps", "pairs_asked", "labels", "label_accuracy", "reward_accuracy", "spearman", "spearman_expert",
            "eval_return", "eval_success", "eval_success_any", "eval_success_frames", "eval_success_drawn",
            "success_last_third", "held",
            "solved_step", "seconds_until_solved", "seconds", "labeler", "command", "error")
CURVES = (*KEY, "step", "eval_return", "eval_success", "pairs_asked")


# ---- from a sweep to its runs ----
@dataclasses.dataclass(frozen=True)
class Job:
    """One run. overrides: what differs from the task's own settings.  varied: fields that get a column."""

    task: str
    setting: str
    seed: int
    overrides: dict
    varied: tuple
    folder: str = ""

    def method(self):
        """preference (RL-VLM-F), oracle (the same with true labels), or the reward that takes its place."""
        reward = self.overrides.get("reward", "preference")
        return "oracle" if reward == "preference" and self.overrides.get("labels") == "oracle" else reward

    def fields(self):
        """The overrides as fields of Config."""
        fields = {name: value for name, value in self.overrides.items() if name not in PSEUDO}
        flaws = {name: self.overrides.get(f"vlm_{name}") for name in ("mistakes", "unsure")}
        flaws = ",".join(f"{name}={share:g}" for name, share in flaws.items() if share)
        judge = self.overrides.get("judge", "none")
        if judge != "none":
            flaws = ",".join(filter(None, (judge if "=" in judge else f"judge={judge}", flaws)))
        if flaws:
            if fields.get("vlm", "offline") != "offline":
                raise ValueError(f"{flaws} is a flaw of the offline stand-in, and --set says vlm={fields['vlm']}")
            fields["labels" if fields.get("labels") == "oracle" else "vlm"] = (
                "oracle:" if fields.get("labels") == "oracle" else "offline:") + flaws
        if fields.get("seed_steps") == "explore_steps":  # all exploration is at random, and none is left for novelty
            from support import settings

            rest = {name: value for name, value in fields.items() if name != "seed_steps"}
            fields["seed_steps"] = settings.resolve(settings.Config(env=self.task, **rest)).explore_steps
        return fields

    def key(self):
        """What is equal for two rows of the same run: KEY, as it is in the CSV."""
        return self.task, self.method(), self.setting, str(self.seed)


def plan(name, seeds=None, extra=None):
    """The runs of a sweep in the table; seeds: how many (default: SEEDS); extra: settings that all runs share.

    Seed 0 of everything comes first: a sweep that is stopped half-way is a smaller study, not half a study.
    """
    if name not in SWEEPS:
        raise ValueError(f"no sweep {name!r}; there are {', '.join(SWEEPS)}; or make one: --grid field=value,value")
    if seeds is not None and seeds < 1:
        raise ValueError(f"--seeds {seeds}: it must be at least 1")
    tasks, settings, of_task = SWEEPS[name].tasks, SWEEPS[name].settings, SWEEPS[name].of_task
    varied = tuple(dict.fromkeys(field for each in settings.values() for field in each))
    seeds = seeds or SWEEPS[name].seeds
    cells = itertools.product(range(seeds or 5), tasks, settings.items())
    return [Job(task, setting, seed, {**of_task.get(task, {}), **(extra or {}), **fields}, varied)
            for seed, task, (setting, fields) in cells if seed < (seeds or SEEDS.get(task, 5))]


def parse_fields(words, split=True):
    """["max_pairs=10,20"] -> {"max_pairs": [10, 20]}, with the types and checks of train.py's own flags.

    split=False: each is one value, commas and all.
    """
    from support import settings

    def value_of(name, text):
        if name == "judge" and text != "none":
            settings.read_flaws("vlm", f"offline:{text if '=' in text else f'judge={text}'}")
        if name in PSEUDO:
            return type(PSEUDO[name])(text)
        found = settings.parse_args([f"--{name.replace('_', '-')}={text}"])
        if not hasattr(found, name):
            raise ValueError(f"{name} is an old spelling: see python train.py --help-all")
        return getattr(found, name)

    fields = {}
    for word in words:
        name, equals, values = word.partition("=")
        if not equals:
            raise ValueError(f"{word}: write field=value or field=value,value")
        name = name.replace("-", "_")
        fields[name] = [value_of(name, value) for value in (values.split(",") if split else [values])]
    return fields


def plan_grid(words):
    """The runs of --grid: every combination of the values."""
    fields = parse_fields(words)
    tasks, seeds = fields.pop("env", ["CartPole"]), fields.pop("seed", [0])
    return [Job(task, setting or "default", seed, chosen, tuple(fields))
            for seed, task, (setting, chosen) in itertools.product(seeds, tasks, grid(**fields).items())]


def only(jobs, words):
    """Keep the jobs whose task and setting are among the words; words that name no task leave all tasks in."""
    tasks, settings = {job.task for job in jobs}, {job.setting for job in jobs}
    unknown = [word for word in words if word not in tasks | settings]
    if unknown:
        raise ValueError(f"--only {unknown[0]}: there are {', '.join(sorted(tasks))}, and the settings "
                         + ", ".join(f'"{setting}"' for setting in sorted(settings)))
    tasks, settings = tasks & set(words) or tasks, settings & set(words) or settings
    return [job for job in jobs if job.task in tasks and job.setting in settings]


# ---- one run ----
def stored(job):
    """(config, summary) of the job's folder, {} where there is none; ValueError if another run is in it."""
    import envs
    from support import settings

    config, summary = {}, {}
    with contextlib.suppress(FileNotFoundError):
        config = json.loads(Path(job.folder, "config.json").read_text())
        summary = json.loads(Path(job.folder, "summary.json").read_text())
    # trap: without this, a sweep whose table has changed, or a task whose presets have, would show the runs of the old
    # one under the new names
    ours = job.task in envs.TASKS and job.overrides.get("schedule") != "paper"
    preset = settings.schedule(job.task, "ours") if ours else {}
    for field, value in {**preset, **job.fields()}.items() if config else ():
        if config.get(field) != value:
            raise ValueError(f"{job.folder} holds a run with {field}={config.get(field)}, not {value}: remove it, or "
                             "choose another --name")
    return config, summary


def config_of(job):
    """The Config that starts the job, or goes on with it where it was begun."""
    from support import settings

    fields = {"env": job.task, "keep_buffer": 0.0, **job.fields()}  # so many runs need the disk for those to come
    if stored(job)[0]:  # these must be named again where a run may be a stranger's; a sweep's runs are its own
        again = {name: fields[name] for name in settings.NAMED_AGAIN if name in fields}
        return settings.resumed({"resume": job.folder, **again})
    # trap: a run killed before it wrote its settings has left a folder that a fresh run would refuse
    resume = job.folder if os.path.exists(job.folder) else None
    return settings.Config(seed=job.seed, out=job.folder, resume=resume, **fields)


def train_job(job):
    """Train it, all of the algorithm or without the part that its setting leaves out."""
    import train
    from tools import ablations

    left_out = job.overrides.get("ablation", "nothing")
    train.train(config_of(job)) if left_out == "nothing" else ablations.train_without(left_out, config_of(job))


def run_one(job):
    """Train, with everything printed going to a log -> (error, "" if there was none; {name: bytes} of small files)."""
    parent = multiprocessing.parent_process()
    if parent:  # trap: a killed sweep must not leave a run at work behind, or its successor would write beside it
        threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
    os.environ["TQDM_MININTERVAL"] = "30"  # seconds between two lines of a progress bar that nobody watches
    os.makedirs(os.path.dirname(job.folder), exist_ok=True)
    error, log_path = "", job.folder + ".log"  # beside the folder, which train() wants to make itself
    with open(log_path, "a") as log:
        try:  # trap: two sweeps of one name would both go on with the same run, and mix their rows
            fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return "another sweep is at work on this run", {}
        with contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
            try:
                train_job(job)
                error = "" if stored(job)[1].get("finished") else "interrupted"
            except Exception as problem:  # whatever it is, the other runs go on; the log has the traceback
                traceback.print_exc()
                error = " ".join(f"{type(problem).__name__}: {problem}".split())
    if os.path.isdir(job.folder):
        os.replace(log_path, os.path.join(job.folder, "train.log"))
    paths = [path for path in (Path(job.folder, name) for name in SMALL) if path.is_file()]
    return error, {path.name: path.read_bytes() for path in paths}


# ---- many runs ----
def on_processes(jobs, parallel):
    """Yield (job, error, files) as runs end: a thread waits for each, with a fresh process that only it depends on."""

    def apart(job):
        try:
            with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
                return process.submit(run_one, job).result()
        except BrokenProcessPool:
            return f"the process died (out of memory?); see {job.folder}.log", {}

    pool = ThreadPoolExecutor(parallel)
    waiting = {pool.submit(apart, job): job for job in jobs}
    try:
        for future in as_completed(waiting):
            yield (waiting[future], *future.result())
    finally:
        pool.shutdown(wait=True, cancel_futures=True)  # after Ctrl-C, runs at work save what they have first


def on_ray(ray, jobs, parallel, address):
    """The same on Ray: embedded in this process, or on the cluster at an address, which gets these files first."""
    if address:
        ray.init(address=address, log_to_driver=False, runtime_env={
            "working_dir": str(HERE), "excludes": [".git", ".venv", "runs", "results", "__pycache__"]})
    else:
        paths = os.pathsep.join(filter(None, (str(HERE), os.environ.get("PYTHONPATH"))))
        ray.init(num_cpus=parallel, include_dashboard=False, log_to_driver=False,
                 runtime_env={"env_vars": {"PYTHONPATH": paths}})
    # max_calls: a fresh process for each run.  max_retries: a run that died is a row with an error, not tried at once
    remote = ray.remote(num_cpus=1, max_calls=1, max_retries=0)(run_one)
    waiting = {remote.remote(job): job for job in jobs}
    try:
        while waiting:
            [reference], _ = ray.wait(list(waiting))
            job = waiting.pop(reference)
            try:
                yield (job, *ray.get(reference))
            except ray.exceptions.RayError as problem:
                yield job, " ".join(str(problem).split())[:300], {}
    finally:
        ray.shutdown()


def start(jobs, parallel, address):
    """The runs, on Ray if it is there: yields (job, error, files)."""
    if not jobs:
        return iter(())
    try:
        import ray
    except ImportError:
        if address:
            raise ValueError("--address needs Ray: pip install -r tools/requirements-sweep.txt") from None
        print(f"Ray is not installed (tools/requirements-sweep.txt): {parallel} processes at a time", flush=True)
        return on_processes(jobs, parallel)
    return on_ray(ray, jobs, parallel, address)


def sweep(jobs, name, parallel=2, address=None, runs="runs/sweeps", results="results"):
    """Run what is not finished, keep results/NAME.csv up to date -> number of runs that have no result."""
    from tqdm import tqdm

    folder = Path(runs).resolve() / name
    jobs = [dataclasses.replace(job, folder=str(folder / slug(job))) for job in jobs]
    table, failed, todo = Table(Path(results) / f"{name}.csv", jobs), 0, []
    for job in jobs:
        table.add(job) if stored(job)[1].get("finished") else todo.append(job)
    table.write()
    with tqdm(total=len(jobs), initial=len(jobs) - len(todo), unit="run", desc=name) as bar:
        for job, error, files in start(todo, parallel, address):
            os.makedirs(job.folder if files else folder, exist_ok=True)
            for file, content in files.items():  # on a cluster without a common disk, this is how results come home
                # trap: what an earlier, interrupted attempt sent home would stand for the finished run
                Path(job.folder, file).write_bytes(content)
            row = table.add(job, error)
            table.write()
            failed += bool(error)
            bar.set_postfix_str(f"{job.task} {job.setting}: {error or 'success ' + row['eval_success']}"[:70])
            bar.update()
    return failed


def slug(job):
    """The name of its run folder."""
    return re.sub(r"[^\w.=-]+", "_", f"{job.task}-{job.setting}-seed{job.seed}")


# ---- the tables ----
def read_csv(path):
    """Rows of a CSV file as dicts of strings; [] where there is no file."""
    if not Path(path).exists():
        return []
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def cell(value):
    """A value as text: short floats, nothing for what is not known."""
    if value is None or value != value:  # NaN, and only NaN, differs from itself
        return ""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def aligned(path):
    """episodes.csv of a run -> rank correlation of learned reward and progress along the expert's episode, or NaN."""
    from support.report import rank_correlation

    rows = [(float(row["learned_reward"]), float(row["progress"])) for row in read_csv(path) if row["kind"] == "expert"]
    return rank_correlation(*zip(*rows)) if len(rows) > 2 else float("nan")


class Table:
    """results/NAME.csv and NAME_curves.csv: what is in them, changed by the rows of this call."""

    def __init__(self, path, jobs=()):
        self.path, self.rows, self.curves, self.varied = Path(path), {}, {}, {}
        self.rank = {key: rank for rank, key in enumerate(map(Job.key, jobs))}  # the order of the rows

    def add(self, job, error=""):
        """The row of one run, from the files of its folder, or with its error -> the row."""
        row = {"task": job.task, "method": job.method(), "setting": job.setting, "seed": job.seed, "error": error}
        row.update((field, job.overrides.get(field)) for field in job.varied)
        key = job.key()
        self.varied.update(dict.fromkeys(job.varied))
        metrics = [] if error else read_csv(Path(job.folder, "metrics.csv"))
        if not error:
            config, summary = stored(job)
            # a field that this run did not change has the task's own value in config.json
            row.update((field, job.overrides.get(field, PSEUDO.get(field)) if field in PSEUDO else config.get(field))
                       for field in job.varied)
            row.update(summary, pairs_asked=summary["asked"], reward_accuracy=metrics[-1]["reward_accuracy"],
                       spearman_expert=aligned(Path(job.folder, "episodes.csv")), command=config["command"])
        self.rows[key] = {name: cell(row.get(name)) for name in (*KEY, *job.varied, *MEASURES)}
        self.curves[key] = [{**each, **dict(zip(KEY, key))} for each in metrics]
        return self.rows[key]

    def write(self):
        """Merge with what is on disk: other tasks, seeds or calls may have written there."""
        os.makedirs(self.path.parent, exist_ok=True)
        with open(f"{self.path}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # trap: two sweeps of one name would lose each other's rows
            self._merge()

    def _merge(self):
        curves_path = self.path.with_name(self.path.stem + "_curves.csv")
        # trap: a call with --only must not lose the rows of the calls before it
        rows = {tuple(row[name] for name in KEY): row for row in read_csv(self.path)}
        middle = [name for row in rows.values() for name in row if name not in KEY + MEASURES]
        curves = {}
        for row in read_csv(curves_path):
            curves.setdefault(tuple(row[name] for name in KEY), []).append(row)
        for key, row in self.rows.items():
            # trap: a run that fails here must not take the place of one that was measured
            if not row["error"] or rows.get(key, row)["error"]:
                rows[key], curves[key] = row, self.curves[key]
        # trap: `labels` is a setting and a measure; it may stand in the table but once
        columns = tuple(dict.fromkeys([*KEY, *self.varied, *middle, *MEASURES]))
        keys = sorted(rows, key=lambda key: self.rank.get(key, len(self.rank)))  # stable: others stay as they were
        for path, names, lines in ((self.path, columns, [rows[key] for key in keys]),
                                   (curves_path, CURVES, [row for key in keys for row in curves.get(key, ())])):
            with open(f"{path}.new", "w", newline="") as file:
                writer = csv.DictWriter(file, names, restval="", extrasaction="ignore")
                writer.writeheader()
                writer.writerows(lines)
            os.replace(f"{path}.new", path)


# ---- the command line ----
def parse(arguments):
    """The shell's words -> argparse's namespace."""
    parser = argparse.ArgumentParser(prog="python -m tools.sweep", description=__doc__.splitlines()[0])
    parser.add_argument("sweep", nargs="?", help=f"one of {', '.join(SWEEPS)}")
    parser.add_argument("--grid", nargs="+", metavar="FIELD=V,V", help="every combination of these values instead")
    parser.add_argument("--name", help="of the results; a --grid or --set needs one of its own")
    parser.add_argument("--seeds", type=int, help="how many (default: 5, and 3 for Meta-World)")
    parser.add_argument("--only", nargs="+", metavar="WORD", help="only these tasks or settings")
    parser.add_argument("--set", nargs="+", metavar="FIELD=V", help="settings that all runs share")
    parser.add_argument("--parallel", type=int, default=2, help="runs at a time on this machine (default: 2)")
    parser.add_argument("--address", help="of a Ray cluster, such as auto or ray://HOST:10001")
    parser.add_argument("--plot", metavar="CSV", help="draw the plots of a results file, and run nothing")
    return parser.parse_args(arguments)


def overview():
    """What sweeps there are, and how many runs each is."""
    return "\n".join(f"{name:14} {len(plan(name)):4} runs  {each.question} ({', '.join(each.tasks)})"
                     for name, each in SWEEPS.items())


def main(arguments=None):
    from support import settings

    args = parse(arguments)
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # as many runs as cores, not as many threads as cores in every run
    try:
        if args.plot:
            from tools import plots

            print("\n".join(plots.plot(args.plot)))
            return 0
        if bool(args.sweep) == bool(args.grid):
            print(overview())
            return 0 if not args.sweep else 2
        if (args.grid or args.set) and args.name in (None, *SWEEPS):
            raise ValueError("--grid and --set need a --name of their own, so that results do not mix")
        if args.grid and args.seeds:
            raise ValueError("--grid takes its seeds as a field of its own: seed=0,1,2")
        extra = {field: values[0] for field, values in parse_fields(args.set or (), split=False).items()}
        if {"env", "seed"} & set(extra):
            raise ValueError("--set cannot change env or seed: use --only and --seeds, or --grid")
        jobs = [dataclasses.replace(job, overrides={**extra, **job.overrides}) for job in plan_grid(args.grid)] \
            if args.grid else plan(args.sweep, args.seeds, extra)
        name = args.name or args.sweep
        failed = sweep(only(jobs, args.only or ()), name, args.parallel, args.address)
    except (ValueError, ConnectionError, settings.UserError) as error:
        print(f"sweep.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from here")
        return 130
    print(f"results/{name}.csv" + (f"; {failed} runs failed: see its column error" if failed else ""))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
