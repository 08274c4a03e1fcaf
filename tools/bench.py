"""How fast is it: against the usual way, against the machine, and as the work grows?

    python -m tools.bench                   all but the learning curves; half an hour
    python -m tools.bench --quick           the same with little of each, within 3 minutes; writes no CSV
    python -m tools.bench --device cuda     on a GPU, also with recorded CUDA graphs
    PYTHONPATH=peers python -m tools.bench  after pip install --target peers --no-deps \
                                      -r tools/requirements-bench.txt: with Stable-Baselines3 and SBX
                                      with --only peers: SAC against both, per second of one core
                                      with --only learning: what all have learned; hours, but what
                                      is done is kept; --pieces HalfCheetah-v5/SBX: only those

What this is: one section per question, a printed table, results/bench.csv. Machines differ, and
one machine from minute to minute; so every figure is a ratio of two neighbours in time: ours,
theirs, theirs, ours, ..., and the table has the median, smallest and largest of these ratios.
Which STEPs: 1, 3 to 6 and C4 are measured, and the whole:
    ratio = ours / theirs as rates (per second), theirs / ours as times: above 1, ours is faster.
"The textbook way" of the reward model: channels-first float32, member by member, an optimiser
each, two forward passes for a pair, at 200 px; the same networks and batch size, 16 or the official
code's 64. Ours in bfloat16 (not the default), where this processor is faster in it: the name of
the row says so. On a GPU, what a recording gains; results/bench_cuda.csv.

Differs from the paper: it reports no speeds.
Shapes: images (N, size, size, 3) uint8.  Names: compare, Row, SECTIONS, Textbook, write.

To use it elsewhere:
    from tools import bench
    one = lambda: bench.per_second(lambda: sum(range(20_000)), 1, seconds=0.02)
    other = lambda: bench.per_second(lambda: sum(list(range(20_000))), 1, seconds=0.02)
    row = bench.compare("sum without a list", "sums/s", one, other, runs=5, target=">= 1")
    print(row.ratio(), row.verdict())
"""
import argparse
import csv
import functools
import importlib
import json
import multiprocessing
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parents[1]
COLUMNS = ("question", "ours", "theirs", "unit", "ratio_median", "ratio_min", "ratio_max", "runs",
           "target", "note")
TEXTBOOK_SIZE = 200  # px, what the paper's reward networks see in CartPole
BFLOAT16 = ", bfloat16"  # in the name of a row: support/fast.py, --fast 2, which is not the default
GRAPH = ", CUDA graph"  # likewise, on a GPU
WORTH_WHILE = 1.2  # times as fast in matrix products: then bfloat16 is measured too
BY_HAND = ", by hand"  # likewise, gradients by hand in float32
BATCH = 256  # transitions in one update of both SACs
OUR_BATCH = 16  # answers in one step of a fit: what reward_model.py takes


class LeftOut(Exception):
    """A question that cannot be asked here: one line why."""


@dataclass
class Row:
    """One line of the table. With theirs, the target is for the ratio, else for ours."""

    question: str
    unit: str
    ours: list  # one figure a run
    theirs: list = field(default_factory=list)
    target: str = ""  # ">= 1.5" or "<= 30"; "" where there is none
    note: str = ""
    why: object = None  # callable that prints where the time goes; called if the target is missed

    def ratios(self):
        """Above 1 means ours is better: rates are divided one way, times and bytes the other."""
        pairs = zip(self.ours, self.theirs)
        return [o / t if "/s" in self.unit else t / o for o, t in pairs]

    def ratio(self):
        return statistics.median(self.ratios()) if self.theirs else statistics.median(self.ours)

    def verdict(self):
        sign, _, limit = self.target.partition(" ")
        if not limit:
            return ""
        met = self.ratio() >= float(limit) if sign == ">=" else self.ratio() <= float(limit)
        return "met" if met else "missed"

    def cells(self):
        """The ten columns of the CSV."""
        ratios = self.ratios()
        spread = [statistics.median(ratios), min(ratios), max(ratios)] if ratios else [None] * 3
        note = self.note
        if not ratios and len(self.ours) > 1:
            note = f"{min(self.ours):.4g} to {max(self.ours):.4g}. {note}"
        figures = [statistics.median(part) if part else None for part in (self.ours, self.theirs)]
        ours, theirs, *spread = ["" if x is None else f"{x:.4g}" for x in figures + spread]
        return [self.question, ours, theirs, self.unit, *spread, len(self.ours), self.target,
                note.strip()]


# ---- how to measure ----
def per_second(do, amount, seconds=0.0):
    """do() handles `amount` of something; how much of it in a second? At least `seconds` long."""
    start, count = time.perf_counter(), 0
    while count == 0 or time.perf_counter() - start < seconds:
        do()
        count += 1
    return count * amount / (time.perf_counter() - start)


def cpu_and_wall(do):
    """Seconds of processor time, all threads together, that do() takes; and those on the clock.

    Where others use the machine too, the clock counts them in; processor time hardly does.
    """
    cpu, wall = time.process_time(), time.perf_counter()
    do()
    return time.process_time() - cpu, time.perf_counter() - wall


def seconds_of(do):
    start = time.perf_counter()
    do()
    return time.perf_counter() - start


def compare(question, unit, ours, theirs, runs, target="", note="", why=None):
    """ours() and theirs() each return one figure; called in turn, so that both see one machine."""
    figures = {ours: [], theirs: []}
    for run in range(runs):
        # trap: a machine that grows slower would always favour whoever goes first
        for side in (ours, theirs) if run % 2 == 0 else (theirs, ours):
            figures[side].append(side())
    return Row(question, unit, figures[ours], figures[theirs], target, note, why)


def best_threads(rate):
    """rate() -> figure per second. The same, with as many threads as are best for it."""
    import torch

    def run_with(threads):
        torch.set_num_threads(threads)
        return rate()

    choices = sorted({1, os.cpu_count() or 1})
    run_with(choices[0])  # warm
    best = max(choices, key=run_with)
    return (lambda: run_with(best)), best


def python_spots(do, times=50):
    """Prints which functions the time of do() goes to."""
    import cProfile
    import pstats

    with cProfile.Profile() as profile:
        for _ in range(times):
            do()
    pstats.Stats(profile).sort_stats("tottime").print_stats(5)


def hot_spots(do, times=10):
    """Prints which operations of torch the time of do() goes to."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU]) as run:
        for _ in range(times):
            do()
    rows = sorted(run.key_averages(), key=lambda row: -row.self_cpu_time_total)
    total = sum(row.self_cpu_time_total for row in rows)
    for row in rows[:8]:
        share, each = row.self_cpu_time_total / total, row.count / times
        print(f"    {share:6.1%}  {row.key[:50]:50s} {each:7.0f} calls each time")


def gigaflops(device, dtype=None, size=None):
    """What this machine does in matrix products, GFLOP/s: the ceiling of all networks here."""
    import torch

    size = size or (1024 if device == "cpu" else 8192)  # a GPU is not busy with small ones
    a = torch.randn(size, size, device=device, dtype=dtype)

    def products():
        for _ in range(3):
            b = a @ a
        return float(b[0, 0])  # waits for a GPU

    products()
    return per_second(products, 3 * 2 * size**3 / 1e9, seconds=0.2)


def operations(do):
    """Floating-point operations of the matrix products and convolutions in do()."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        do()
    return counter.get_total_flops()


def against_the_machine(question, do, size, device, amount, unit):
    """The three figures, with all cores: operations, ceiling measured beside it, achieved."""
    import torch

    torch.set_num_threads(os.cpu_count() or 1)  # a section before this one may have left another
    flop = operations(do)
    do()
    row = compare(question, "GFLOP/s", lambda: per_second(do, flop / 1e9, seconds=0.3),
                  lambda: gigaflops(device), size["runs"])
    each, top = flop / amount, statistics.median(row.theirs) * 1e9
    row.note = (f"{each / 1e6:.0f} MFLOP; ceiling {top / 1e9:.0f} GFLOP/s = {top / each:.0f} "
                f"{unit}/s; achieved {statistics.median(row.ours) * 1e9 / each:.0f} {unit}/s")
    return row


def sections_rows(names, size, device):
    """The rows of the named sections, one by one; a section that cannot run says so."""
    for name in names:
        start = time.perf_counter()
        try:
            yield from SECTIONS[name](size, device)
        except (LeftOut, ValueError) as error:
            if isinstance(error, ValueError) and "OpenGL" not in str(error):
                raise  # ours
            print(f"{name}: left out: {error}")
        print(f"  [{name}: {time.perf_counter() - start:.0f} s]", flush=True)


# ---- machine: what is it? ----
def machine(size, device):
    import torch

    model = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
        model = names[0] if names else model
    if device == "cuda":
        model = torch.cuda.get_device_name()
    row = half_bits(size, device)
    hardware = "is" if row.ratio() > WORTH_WHILE else "is not"
    row.note = (f"{model}, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}, "
                f"torch {torch.__version__}, Python {platform.python_version()}; one thread; "
                f"bfloat16 {hardware} worth while here")
    yield row


def half_bits(size, device):
    """Is bfloat16 faster? Measured, not read from a list of flags."""
    import torch

    torch.set_num_threads(1)
    side = 512 if device == "cpu" else None
    return compare("bfloat16 against float32, products", "GFLOP/s",
                   lambda: gigaflops(device, torch.bfloat16, side),
                   lambda: gigaflops(device, torch.float32, side), size["runs"])


def variants_here(size, device):
    """{end of a row's name: what ours is given}: the default first, then what should be faster."""
    if device == "cuda":
        from support import fast

        return {"": {}, GRAPH: {"record": fast.Recorded}}
    worth_while = half_bits(size, device).ratio() > WORTH_WHILE
    return {"": {}, BFLOAT16: {"bfloat16": True}} if worth_while else {"": {}}


def sac_variants(size, device):
    """variants_here(), and on a CPU also gradients by hand with all the bits."""
    return variants_here(size, device) | ({BY_HAND: {"bfloat16": False}} if device == "cpu" else {})


def our_sac(*args, **settings):
    """sac.SAC or, where something is asked of it that only support/fast.py knows, FastSAC."""
    import sac
    from support import fast

    return (fast.FastSAC if {"bfloat16", "record"} & set(settings) else sac.SAC)(*args, **settings)


def our_reward_model(*args, **settings):
    """The same for RewardModel."""
    import reward_model
    from support import fast

    fits = {"bfloat16", "record"} & set(settings)
    return (fast.FastRewardModel if fits else reward_model.RewardModel)(*args, **settings)


# ---- sac: training steps per second (STEPs 1 and 6) ----
class OurLoop:
    """act, step, store, sample, update: the plain loop around sac.py."""

    def __init__(self, env_id, device, seed=0, first_random=1000, capacity=60_000, width=256,
                 batch=BATCH, **flags):
        import gymnasium

        import sac

        env = gymnasium.make(env_id)
        bounds = np.array([-1, 1], env.action_space.dtype)  # a Python float makes gymnasium warn
        self.env = gymnasium.wrappers.RescaleAction(env, *bounds)
        shape, space = self.env.observation_space.shape, self.env.action_space
        space.seed(seed)
        self.agent = our_sac(shape[0], space, hidden=(width, width), device=device, seed=seed,
                             alpha=1.0, **flags)  # alpha as theirs
        self.buffer = sac.ReplayBuffer(capacity, shape, space.shape, seed=seed)
        self.first_random, self.batch = first_random, batch
        self.obs = self.env.reset(seed=seed)[0]

    def learn(self, steps):
        for _ in range(steps):
            warm = self.buffer.added >= self.first_random
            action = self.agent.act(self.obs) if warm else self.env.action_space.sample()
            next_obs, reward, terminated, truncated, _ = self.env.step(action)
            self.buffer.add(self.obs, action, next_obs, terminated, None, reward)
            self.buffer.set_rewards([reward])
            if warm:
                self.agent.update(self.buffer.sample(self.batch))
            self.obs = self.env.reset()[0] if terminated or truncated else next_obs

    def act(self, obs):
        return self.agent.act(obs, explore=False)


PEERS = {"Stable-Baselines3": "stable_baselines3", "SBX": "sbx"}  # the module of each


class TheirLoop:
    """The same with a peer: networks, batch, learning rate, an update a step and the first temperature alike.

    The rest is its own. SBX is Stable-Baselines3 in JAX, whose updates are compiled. What both do otherwise than we:
    log_std is cut off (at -20 and 2), not squashed, and learning steps are logged.
    """

    def __init__(self, env_id, device, seed=0, first_random=1000, capacity=60_000, width=256,
                 batch=BATCH, peer="Stable-Baselines3"):
        if peer == "SBX":  # trap: read when jax starts
            os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false "
                                  "intra_op_parallelism_threads=1")
        try:
            SAC = importlib.import_module(PEERS[peer]).SAC
        except ImportError:
            raise LeftOut(f"no {peer} here: see tools/requirements-bench.txt") from None
        self.model = SAC("MlpPolicy", env_id, batch_size=batch, buffer_size=capacity, seed=seed,
                         learning_starts=first_random, device=device, train_freq=1, gradient_steps=1,
                         learning_rate=3e-4, policy_kwargs={"net_arch": [width, width]})
        self.env = self.model.env.envs[0]

    def learn(self, steps):
        self.model.learn(steps, reset_num_timesteps=False)

    def act(self, obs):
        return self.model.predict(obs, deterministic=True)[0]


def sac_speed(size, device):
    steps, loop = size["sac_steps"], OurLoop("HalfCheetah-v5", device, first_random=BATCH)
    loop.learn(BATCH)
    agent, batch = loop.agent, loop.buffer.sample(BATCH)
    yield against_the_machine("SAC update, against the machine", lambda: float(
        agent.update(batch)["q_mean"]), size, device, 1, "updates")
    variants = variants_here(size, device)
    for env_id in ("Pendulum-v1", "HalfCheetah-v5"):
        theirs, their_threads = sac_rate(TheirLoop(env_id, device, first_random=300), steps)
        for name, flags in variants.items():
            loop = OurLoop(env_id, device, first_random=300, **flags)
            ours, threads = sac_rate(loop, steps)
            yield compare(f"SAC training steps, {env_id}{name}", "steps/s", ours, theirs,
                          size["runs"], ">= 1.5", "against Stable-Baselines3; threads "
                          f"{threads} and {their_threads}",
                          lambda loop=loop: hot_spots(lambda: loop.learn(1), 50))
    if device == "cuda":
        yield from who_sets_the_pace(variants, size, device)


def who_sets_the_pace(variants, size, device):
    """Updates per second from Python, against the GPU alone: it replays one recorded update."""
    import torch

    loops = {name: OurLoop("HalfCheetah-v5", device, first_random=BATCH, **flags)
             for name, flags in variants.items()}
    for loop in loops.values():
        loop.learn(BATCH + 10)

    def updates(loop):
        for _ in range(size["sac_steps"]):
            loop.agent.update(loop.buffer.sample(BATCH))
        torch.cuda.synchronize()

    def replays():
        for _ in range(size["sac_steps"]):
            loops[GRAPH].agent._recorded.graph.replay()
        torch.cuda.synchronize()

    for name, loop in loops.items():
        yield compare(f"SAC updates from Python{name}", "updates/s",
                      lambda loop=loop: per_second(lambda: updates(loop), size["sac_steps"]),
                      lambda: per_second(replays, size["sac_steps"]), size["runs"], ">= 0.9",
                      "drawn from the buffer, moved to the GPU; against the GPU alone, which "
                      "replays one update: at 1, the GPU sets the pace",
                      lambda loop=loop: python_spots(lambda: updates(loop), 1))


def sac_rate(loop, steps):
    """() -> steps per second, on the number of threads that is best for it; that number."""
    loop.learn(310)
    return best_threads(lambda: per_second(lambda: loop.learn(steps), steps))


# ---- peers: steps for a second of one core ----
PEER_TARGETS = {("SBX", 256): ">= 1", ("Stable-Baselines3", 256): ">= 1.6", ("SBX", 128): ">= 1.1"}


def peers(size, device):
    """Environment, acting, storing and one update a step: all of ours and all of theirs in turn, on one core."""
    if device != "cpu":
        raise LeftOut("it is a question of the processor")
    import torch

    variants, threads = sac_variants(size, device), torch.get_num_threads()
    torch.set_num_threads(1)
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
    if allowed:  # jax makes as many threads as it sees cores
        os.sched_setaffinity(0, {min(allowed)})
    try:
        for env_id in ("Pendulum-v1", "HalfCheetah-v5"):
            for width in (256, 128):
                yield from against_peers(env_id, width, variants, size)
    finally:
        torch.set_num_threads(threads)
        if allowed:
            os.sched_setaffinity(0, allowed)


def against_peers(env_id, width, variants, size):
    settings = dict(first_random=300, width=width, batch=width)
    loops = {name: OurLoop(env_id, "cpu", **settings, **flags) for name, flags in variants.items()}
    for peer in PEERS:
        try:
            loops[peer] = TheirLoop(env_id, "cpu", **settings, peer=peer)
        except LeftOut as error:
            print(f"peers: left out: {error}")
    seconds = {name: [] for name in loops}
    for loop in loops.values():
        loop.learn(310)  # jax compiles its update at the first one
    for run in range(size["runs"]):
        for name in list(loops)[:: 1 if run % 2 == 0 else -1]:
            seconds[name].append(cpu_and_wall(lambda: loops[name].learn(size["peer_steps"])))
    cpu, wall = ({name: [size["peer_steps"] / pair[clock] for pair in pairs]
                  for name, pairs in seconds.items()} for clock in (0, 1))
    for peer in PEERS:
        for name in variants if peer in loops else ():
            note = " and ".join(f"{statistics.median(wall[side]):.0f}" for side in (name, peer))
            yield Row(f"SAC against {peer}, {env_id}, 2 x {width}{name}", "steps/s CPU", cpu[name],
                      cpu[peer], PEER_TARGETS.get((peer, width), "") if name else "",
                      f"batch {width}, one core; by the clock {note} steps/s",
                      lambda loop=loops[name]: hot_spots(lambda: loop.learn(1), 50))


# ---- learning: is it the same SAC? ----
LEARNING = {"Pendulum-v1": 10_000, "HalfCheetah-v5": 50_000, "Hopper-v5": 50_000,
            "Walker2d-v5": 50_000}  # steps
LEARNED = ("task", "steps", "learner", "seed", "return")  # columns of the file of pieces


def learning(size, device):
    """Returns after the same number of steps: evaluation episodes with the same seeds for all.

    A piece is a task, a learner and a seed. What is done is kept in a file, one line each, and not done again; so it
    can be run in pieces. A row appears once all seeds of its learner are there.
    """
    loops = {"ours" + name: functools.partial(OurLoop, **flags)
             for name, flags in sac_variants(size, device).items()}
    for peer in PEERS:
        try:
            TheirLoop("Pendulum-v1", device, peer=peer)
            loops[peer] = functools.partial(TheirLoop, peer=peer)
        except LeftOut as error:
            print(f"learning: left out: {error}")
    path = size.get("learned")
    done = read_learned(path)
    pieces = [(env_id, size["learn_steps"] or steps, name, seed)
              for env_id, steps in LEARNING.items() for name in loops for seed in range(3)]
    # one thread each; as many at once as there are cores, or one on a GPU
    workers = os.cpu_count() if device == "cpu" else 1
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        waiting = {pool.submit(learned, loops[name], device, env_id, seed, steps): piece
                   for piece in pieces for env_id, steps, name, seed in [piece]
                   if piece not in done and size.get("pieces", "") in f"{env_id}/{name}/{seed}"}
        for one in as_completed(waiting):
            piece = waiting[one]
            done[piece] = one.result()
            env_id, _, name, seed = piece
            print(f"  {env_id} {name} seed {seed}: {done[piece]:.0f}", flush=True)
            if path:
                keep_learned(path, piece, done[piece])
    yield from learning_rows(done, {env_id: size["learn_steps"] or steps
                                    for env_id, steps in LEARNING.items()})


def read_learned(path):
    """{(task, steps, learner, seed): return} of a file that keep_learned() has written, if there is one."""
    if not path or not Path(path).exists():
        return {}
    with open(path, newline="") as file:
        return {(row["task"], int(row["steps"]), row["learner"], int(row["seed"])): float(row["return"])
                for row in csv.DictReader(file)}


def keep_learned(path, piece, value):
    new = not Path(path).exists()
    with open(path, "a", newline="") as file:
        csv.writer(file).writerows([LEARNED] * new + [(*piece, f"{value:.2f}")])


def learning_rows(done, task_steps):
    """A row for each task and learner of ours, as far as all seeds are there; the peers' are in its note."""
    for env_id, steps in task_steps.items():
        by_learner = {}
        for (task, its_steps, name, seed), value in sorted(done.items()):
            if (task, its_steps) == (env_id, steps):
                by_learner.setdefault(name, []).append(value)
        by_learner = {name: values for name, values in by_learner.items() if len(values) == 3}
        rounded = {name: [round(x) for x in values] for name, values in by_learner.items()}
        for name in by_learner:
            if name in PEERS:
                continue
            ours, notes = by_learner[name], [f"3 seeds: {rounded[name]}"]
            for peer in PEERS:
                if peer in by_learner:
                    below = "within or above" if np.mean(ours) >= min(by_learner[peer]) else "below"
                    notes.append(f"{peer}'s {rounded[peer]}: ours is {below} theirs")
            # No ratio: returns below zero have none.
            yield Row(f"return after {steps:,} steps, {env_id}{name.removeprefix('ours')}", "return", ours,
                      note="; ".join(notes))


def learned(loop, device, env_id, seed, steps):
    """The mean return after so many steps; loop: one of the two above."""
    import torch

    torch.set_num_threads(1)
    loop = loop(env_id, device, seed, min(1000, steps // 10), steps)
    loop.learn(steps)
    return mean_return(loop)


def mean_return(loop, episodes=10):
    total = 0.0
    for episode in range(episodes):
        obs, done = loop.env.reset(seed=1_000_000 + episode)[0], False
        while not done:
            obs, reward, terminated, truncated, _ = loop.env.step(loop.act(obs))
            total, done = total + float(reward), terminated or truncated
    return total / episodes


# ---- fit and predict: the reward model (STEPs 4 and 5) ----
class Textbook:
    """The reward model as one writes it first. Images (N, 3, size, size) uint8."""

    def __init__(self, size, device, batch=OUR_BATCH, ensemble_size=3, seed=0):
        import torch

        import reward_model

        torch.manual_seed(seed)
        self.nets = [reward_model.RewardNet(size, size).to(device) for _ in range(ensemble_size)]
        self.optimizers = [torch.optim.Adam(net.parameters(), lr=3e-4) for net in self.nets]
        self.device, self.rng, self.batch = device, np.random.default_rng(seed), batch

    def float32(self, images):
        import torch

        return torch.from_numpy(images).to(self.device).float() / 255

    def fit(self, first, second, label, epochs):
        import torch

        import reward_model

        for _ in range(epochs):
            for net, optimizer in zip(self.nets, self.optimizers):
                rows = self.rng.permutation(len(label))
                for part in np.split(rows, range(self.batch, len(rows), self.batch)):
                    rewards = [reward_model.BETA * net(self.float32(images[part]))
                               for images in (first, second)]
                    answer = torch.from_numpy(label[part]).to(self.device)
                    loss = torch.nn.functional.cross_entropy(torch.stack(rewards, -1), answer)
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                    loss.item()

    def predict(self, images, batch=32):
        import torch

        parts = []
        with torch.no_grad():
            for start in range(0, len(images), batch):
                x = images[start : start + batch]
                parts.append(np.mean([net(self.float32(x)).cpu().numpy() for net in self.nets], 0))
        return np.concatenate(parts)


def task_images(name, sizes, count, seed=0):
    """{size: (count, size, size, 3) uint8} and progress (count,), clumsy to expert."""
    import envs

    env, rng = envs.make(name, seed), np.random.default_rng(seed)
    drawn, progress, done, expert = {s: [] for s in sizes}, [], True, envs.expert(env)
    while len(progress) < count:
        if done:
            obs, clumsy = env.reset(seed=len(progress))[0], rng.random()
        action = env.action_space.sample() if rng.random() < clumsy else expert(obs)
        obs, _, terminated, truncated, info = env.step(action)
        done = terminated or truncated
        progress.append(info["progress"])
        for s in sizes:
            drawn[s].append(env.image(s))
    env.close()
    return {s: np.stack(images) for s, images in drawn.items()}, np.array(progress)


def answered_pairs(progress, count, rng):
    """Pairs of different progress and which image is better -> (M, 2), (M,) int64."""
    pairs = rng.integers(0, len(progress), (10 * count, 2))
    pairs = pairs[progress[pairs[:, 0]] != progress[pairs[:, 1]]][:count]
    return pairs, (progress[pairs[:, 1]] > progress[pairs[:, 0]]).astype(np.int64)


def preference_data(images, pairs, label):
    import reward_model

    data = reward_model.PreferenceDataset(len(label), images.shape[1:])
    data.add(images[pairs[:, 0]], images[pairs[:, 1]], label)
    return data


def channels_first(images):
    return np.ascontiguousarray(images.transpose(0, 3, 1, 2))


def reward_fit(size, device):
    import reward_model

    variants = variants_here(size, device)
    for name, small in (("CartPole", 64), ("DrawerOpen", 84)):
        task = task_images(name, (small, TEXTBOOK_SIZE), size["images"])
        for batch in size["fit_batches"]:
            for side, variant, flags, target in sides((small,), variants):
                if side == TEXTBOOK_SIZE and (name, batch) != ("CartPole", OUR_BATCH):
                    continue  # the pixels do not matter to the time
                yield fit_row(name, side, variant, target, task, size,
                              {"device": device, "batch": batch, **flags})
    model = reward_model.RewardModel((64, 64, 3), device=device)
    net = model.nets[0]
    x = reward_model.as_input(task_images("CartPole", (64,), 32)[0][64], model.device)

    def forward_and_back():
        net(x).sum().backward()
        return float(next(net.parameters()).grad.sum())  # waits for the GPU, if it is one

    yield against_the_machine("reward network forward and back, against the machine",
                              forward_and_back, size, device, len(x), "images")


def fit_row(name, side, variant, target, task, size, flags):
    """Ours on images of that side against the textbook way, on the same answers."""
    by_size, progress = task
    pairs, label = answered_pairs(progress, size["pairs"], np.random.default_rng(0))
    large = channels_first(by_size[TEXTBOOK_SIZE])
    first, second = large[pairs[:, 0]], large[pairs[:, 1]]
    textbook = Textbook(TEXTBOOK_SIZE, flags["device"], flags["batch"])
    theirs, their_threads = best_threads(lambda: per_second(
        lambda: textbook.fit(first, second, label, 1), len(label)))
    data = preference_data(by_size[side], pairs, label)
    model = our_reward_model((side, side, 3), patience=0, **flags)
    epochs = size["fit_epochs"]  # after the last of them, fit() measures itself once
    once = lambda: model.fit(data, epochs, stop_accuracy=2.0)  # noqa: E731
    ours, threads = best_threads(lambda: per_second(once, epochs * len(data.rows())))
    what = name if flags["batch"] == OUR_BATCH else f"{name}, batches of {flags['batch']}"
    row = compare(f"reward fit, ours at {side} px{variant} ({what})", "pairs/s", ours, theirs,
                  size["runs"], target, "against the textbook way at 200 px; threads "
                  f"{threads} and {their_threads}", lambda: hot_spots(once, 2))
    if side != TEXTBOOK_SIZE and size["accuracy_epochs"]:
        row.note += "; " + equal_accuracy(by_size, progress, side, size, flags)
    return row


def sides(small, variants):
    """What the reward network is timed at: (image size, end of the row's name, flags, target)."""
    yield TEXTBOOK_SIZE, *list(variants.items())[-1], ">= 1.5"
    for side in small:
        for variant, flags in variants.items():
            yield side, variant, flags, ">= 10"


def equal_accuracy(by_size, progress, small, size, flags):
    """Both ways fitted to the same answers; then pairs of images never seen.

    As many epochs at most: ours stops when it knows the answers, and fits seven eighths of them.
    """
    half, rng = len(progress) // 2, np.random.default_rng(1)
    pairs, label = answered_pairs(progress[:half], size["pairs"], rng)
    unseen, better = answered_pairs(progress[half:], 500, rng)
    ours = our_reward_model((small, small, 3), **flags)
    ours.fit(preference_data(by_size[small], pairs, label), size["accuracy_epochs"])
    theirs = Textbook(TEXTBOOK_SIZE, flags["device"], flags["batch"])
    large = channels_first(by_size[TEXTBOOK_SIZE])
    theirs.fit(large[pairs[:, 0]], large[pairs[:, 1]], label, size["accuracy_epochs"])
    both = [model.predict(images[half:])[unseen] for model, images in
            ((ours, by_size[small]), (theirs, large))]  # (P, 2) each
    right = [float(((r[:, 1] > r[:, 0]) == (better == 1)).mean()) for r in both]
    return f"unseen pairs in order: ours {right[0]:.1%}, theirs {right[1]:.1%}"


def predicting(size, device):
    by_size, _ = task_images("CartPole", (64, 84, TEXTBOOK_SIZE), size["predicted"])
    large = channels_first(by_size[TEXTBOOK_SIZE])
    textbook = Textbook(TEXTBOOK_SIZE, device)
    theirs, their_threads = best_threads(
        lambda: per_second(lambda: textbook.predict(large), len(large), 0.3))
    variants = variants_here(size, device)
    variants.pop(GRAPH, None)  # only fits are recorded
    for side, variant, flags, target in sides((84, 64), variants):
        images = by_size[side]
        model = our_reward_model((side, side, 3), device=device, **flags)
        once = lambda: model.predict(images)  # noqa: E731
        ours, threads = best_threads(lambda: per_second(once, len(images), 0.3))
        yield compare(f"reward prediction and relabelling, ours at {side} px{variant}", "images/s",
                      ours, theirs, size["runs"], target, "against the textbook way, 32 at a time, "
                      f"at 200 px; threads {threads} and {their_threads}",
                      lambda once=once: hot_spots(once, 2))


# ---- images: Meta-World, drawn our way and as shipped ----
@functools.cache
def shipped():
    """Meta-World's own drawer, drawn by Meta-World, on as many threads as Mesa likes."""
    import envs

    os.environ.pop("LP_NUM_THREADS", None)
    envs.choose_opengl(small=False)
    from metaworld.env_dict import ALL_V3_ENVIRONMENTS

    env = ALL_V3_ENVIRONMENTS["drawer-open-v3"](
        render_mode="rgb_array", camera_name="corner2", width=300, height=300)
    env._freeze_rand_vec, env._set_task_called = True, True
    env._last_rand_vec = np.array([0.0, 0.9, 0.0])
    env.reset()
    assert env.render().shape == (300, 300, 3)
    return env


def shipped_images_per_second(seconds):
    return per_second(shipped().render, 1, seconds)


def drawing(size, device):
    import envs

    ours, seconds = envs.make("DrawerOpen"), size["seconds"]
    ours.reset(seed=0)
    ours.image(84), ours.image(300)
    # trap: ours are drawn on one thread (choose_opengl), and a process has one setting for all it
    # draws. Theirs are faster on two: they get a process of their own.
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as apart:
        apart.submit(shipped_images_per_second, 0.0).result()  # the first one is slow
        for side, target in ((300, ">= 20"), (84, ">= 60")):
            yield compare(
                f"Meta-World images, {side} px", "images/s",
                lambda side=side: per_second(lambda: ours.image(side), 1, seconds),
                lambda: apart.submit(shipped_images_per_second, seconds).result(),
                size["runs"], target, "against env.render() as shipped at 300 px, which draws "
                "shadows, reflections and the robot, multisampled",
                lambda side=side: python_spots(lambda: ours.image(side)))
    ours.close()


# ---- labels: questions side by side (STEP 3) ----
def labelling(size, device):
    import envs
    from support import offline_vlm
    import vlm_query

    goal, rounds = envs.TASKS["CartPole"].goal, size["label_rounds"]
    by_size, _ = task_images("CartPole", (TEXTBOOK_SIZE,), 200)
    images, rng = by_size[TEXTBOOK_SIZE], np.random.default_rng(0)
    with offline_vlm.OfflineVLM(latency=0.5) as url:
        vlm = vlm_query.VLM("offline", url=url, workers=8)

        def labels_per_second(pairs, workers):
            rows = rng.permutation(len(images))[: 2 * pairs]
            start = time.perf_counter()
            labels, _ = vlm_query.label_pairs(vlm, images[rows[:pairs]], images[rows[pairs:]],
                                              goal, workers=workers)
            return sum(labels >= -1) / (time.perf_counter() - start)

        yield compare("labels, 0.5 s latency, 8 workers", "labels/s",
                      lambda: labels_per_second(8 * rounds, 8),
                      lambda: labels_per_second(rounds, 1), size["runs"], ">= 7.2",
                      "against one worker; two calls a label, 200 px")


# ---- programs: VLM-CaR's reward (STEP C4), through the sandbox and its pipe ----
def programs(size, device):
    import code_as_reward
    import envs
    from support import offline_vlm

    for name in ("CartPole", "StraightenRope", "DoorKey-6x6"):
        side, goal = 100, envs.TASKS[name].goal
        sentence = offline_vlm.SUBTASKS[goal][-1][0]
        program = code_as_reward.Program(offline_vlm.write_code(goal, sentence, wrong=False))
        images = task_images(name, (side,), size["predicted"])[0][side]
        program(images, images[0])  # starts its process
        rates = [per_second(lambda: program(images, images[0]), len(images), size["seconds"])
                 for _ in range(size["runs"])]
        program.close()
        yield Row(f"program of {name}, {side} px", "images/s", rates, target=">= 2000",
                  note=f"the stand-in's, for '{sentence}', {len(images)} images a batch")


# ---- run: how long until CartPole is solved? ----
def whole_run(size, device):
    variants = {"": ("--device", "cpu")}
    if device == "cuda":  # a processor may be the better choice
        variants = {" on its processor": ("--device", "cpu"), "": ("--device", "cuda"),
                    GRAPH: ("--device", "cuda", "--fast", 2)}
    for variant, flags in variants.items():
        solved, total = whole_runs(size, *flags)
        yield Row("CartPole: until solved" + variant, "s", solved, target="<= 30",
                  note="of an evaluation's steps, 99 % upright; the clock starts with the run "
                       "folder, a second or two after the command")
        yield Row("CartPole: until the report is written" + variant, "s", total, target="<= 60",
                  note=f"whole command, --env CartPole, seeds 0 to {size['whole_runs'] - 1}")


def whole_runs(size, *flags):
    """Seconds until solved, and until the report is written: a list each."""
    solved, total = [], []
    for seed in range(size["whole_runs"]):
        with tempfile.TemporaryDirectory() as folder:
            out = os.path.join(folder, "run")
            total.append(seconds_of(lambda: train_py(
                "--env", "CartPole", "--seed", seed, "--out", out, *flags)))
            with open(os.path.join(out, "summary.json")) as file:
                solved.append(json.load(file)["seconds_until_solved"] or float("inf"))
    return solved, total


def train_py(*flags):
    """python train.py FLAGS, quietly."""
    done = subprocess.run([sys.executable, str(HERE / "train.py"), *map(str, flags)], cwd=HERE,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise LeftOut(f"train.py {flags[0]} {flags[1]} ended with: {done.stdout.strip()[-200:]}")


# ---- memory: a long run with images ----
def memory(size, device):
    """A short run of DrawerOpen, and what 100,000 steps come to."""
    if not os.path.exists("/proc/self/status"):
        raise LeftOut("resident memory is read from /proc, which only Linux has")
    steps, long = size["memory_steps"], 100_000
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        flags = dict(env="DrawerOpen", labels="oracle", total_steps=steps, seed_steps=200,
                     explore_steps=400, feedback_every=300, max_pairs=80, reward_epochs=3,
                     eval_every=steps, eval_episodes=1, device=device, out=out)
        words = [w for name, v in flags.items() for w in ("--" + name.replace("_", "-"), str(v))]
        run = subprocess.Popen([sys.executable, str(HERE / "train.py"), *words], cwd=HERE,
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        own, most, stored = 0, {}, {}
        while run.poll() is None:
            own = max(own, own_memory(run.pid))
            for name, nbytes in mapped_memory(run.pid, "/buffer/").items():
                most[name] = max(most.get(name, 0), nbytes)
            for path in out.glob("buffer/*.npy"):
                try:
                    stored[path.name] = path.stat().st_size
                except FileNotFoundError:  # the run has ended, and tidied up
                    pass
            time.sleep(0.2)
        if run.returncode:
            raise LeftOut("train.py --env DrawerOpen failed here: is there OpenGL?")
    rows = [name for name in stored if not name.startswith("query")]  # the others do not grow
    row_bytes = sum(stored[name] for name in rows) / steps
    share = sum(most.get(name, 0) for name in rows) / (row_bytes * steps)
    fixed = sum(most.get(name, 0) for name in stored if name not in rows)
    whole = own + fixed + share * row_bytes * long
    yield Row("memory of DrawerOpen, 100,000 steps", "GB", [whole / 1e9], target="<= 2", note=(
        f"measured after {steps:,} steps: {own / 1e9:.2f} its own, {fixed / 1e9:.2f} candidates, "
        f"{share:.0%} of the stored rows' files. 100,000 rows x {row_bytes:,.0f} bytes = "
        f"{row_bytes * long / 1e9:.2f} GB of files, which leave memory when others need it. "
        "Official code: about 70 GB"))


def own_memory(pid):
    """Bytes that are in no file."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:  # the process has just ended
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def mapped_memory(pid, folder):
    """{file name: bytes of it in the process's memory} of the mapped files in such a folder."""
    found, name = {}, None
    try:
        lines = Path(f"/proc/{pid}/smaps").read_text().splitlines()
    except OSError:
        return {}
    for line in lines:
        first = line.split(maxsplit=1)[0]
        if not first.endswith(":"):  # the head of a mapping, with its path
            name = os.path.basename(line) if folder in line else None
        elif name and first == "Rss:":
            found[name] = found.get(name, 0) + int(line.split()[1]) * 1024
    return found


# ---- start: how long until something happens? ----
def starting(size, device):
    def python(*words):
        return lambda: seconds_of(lambda: subprocess.run(
            [sys.executable, *words], cwd=HERE, check=True, stdout=subprocess.DEVNULL))

    helps = [python("train.py", "--help")() for _ in range(size["runs"])]
    yield Row("start of python train.py --help", "s", helps, target="<= 0.5")
    yield compare("import sac", "s", python("-c", "import sac"), python("-c", "import torch"),
                  size["runs"], ">= 0.95", "against import torch alone, a new process each")


# ---- growth: does it stay as fast? ----
def growth(size, device):
    """theirs is our own figure at the smallest size; a ratio of 1 is no growth at all."""
    import torch

    import reward_model
    import sac

    torch.set_num_threads(1)
    shape, rng = (84, 84, 3), np.random.default_rng(0)
    env_steps, image = size["growth_steps"], np.zeros(shape, np.uint8)
    loop = OurLoop("HalfCheetah-v5", device)
    with tempfile.TemporaryDirectory() as folder:
        buffers = {}
        for rows in (10_000, 50_000, 200_000):
            # Files with holes: rows whose images nobody wrote need no disk.
            buffer = sac.ReplayBuffer(rows, (17,), (6,), shape, os.path.join(folder, str(rows)))
            buffer.obs[:], buffer.next_obs[:] = rng.normal(size=(2, rows, 17))
            buffer.reward[:], buffer.added = 0.0, rows
            buffers[rows] = buffer

        def seconds_per_thousand(rows):
            def steps():
                for _ in range(env_steps):
                    action = loop.agent.act(loop.obs)
                    next_obs, reward, _, _, _ = loop.env.step(action)
                    buffers[rows].add(loop.obs, action, next_obs, False, image, reward)
                    buffers[rows].set_rewards([reward])
                    loop.agent.update(buffers[rows].sample(BATCH))
            loop.obs = loop.env.reset(seed=0)[0]
            return seconds_of(steps) * 1000 / env_steps

        seconds_per_thousand(10_000)
        for rows in (50_000, 200_000):
            yield compare(f"1,000 steps with {rows:,} stored", "s",
                          lambda rows=rows: seconds_per_thousand(rows),
                          lambda: seconds_per_thousand(10_000), size["runs"], ">= 0.9",
                          "against 10,000 stored; 84 px images, on disk")
        model = reward_model.RewardModel(shape, device=device)
        few, many = size["relabel_rows"]
        buffers = {rows: sac.ReplayBuffer(rows, (1,), (1,), shape) for rows in (few, many)}
        for rows, buffer in buffers.items():
            buffer.image[:], buffer.added = rng.integers(0, 255, shape, np.uint8), rows
        yield compare(f"relabelling {many:,} rows", "rows/s",
                      lambda: per_second(lambda: buffers[many].relabel(model.predict), many),
                      lambda: per_second(lambda: buffers[few].relabel(model.predict), few),
                      size["runs"], ">= 0.9", f"against {few:,} rows; as every stored row is "
                      "relabelled, a session's share of this grows with what is stored")
    yield from label_growth(size, device)


def label_growth(size, device):
    import reward_model

    by_size, progress = task_images("CartPole", (64,), 500)
    rng = np.random.default_rng(0)

    def fit_seconds(count):
        pairs, label = answered_pairs(progress, count, rng)
        data = preference_data(by_size[64], pairs, label)
        model = reward_model.RewardModel((64, 64, 3), device=device, patience=0)
        return lambda: 1000 * seconds_of(lambda: model.fit(data, 1, stop_accuracy=2.0)) / count

    few = fit_seconds(100)
    few()
    for count in size["label_counts"]:
        yield compare(f"an epoch of the label fit, {count:,} labels", "ms per label",
                      fit_seconds(count), few, size["runs"], ">= 0.9",
                      "against 100 labels: a ratio of 1 grows just as fast as the labels")


SECTIONS = {"machine": machine, "sac": sac_speed, "peers": peers, "learning": learning, "fit": reward_fit,
            "predict": predicting, "images": drawing, "labels": labelling,
            "programs": programs, "run": whole_run,
            "memory": memory, "start": starting, "growth": growth}
LONG = ("learning",)  # only when named
FULL = dict(runs=7, sac_steps=500, peer_steps=250, learn_steps=0, images=600, pairs=128, fit_epochs=10,
            fit_batches=(OUR_BATCH, 64),  # 64: the official code's
            accuracy_epochs=20, predicted=512, seconds=0.5, label_rounds=4, whole_runs=5,
            memory_steps=4000,
            growth_steps=500, relabel_rows=(2_000, 20_000), label_counts=(500, 2000))
QUICK = dict(runs=3, sac_steps=40, peer_steps=40, learn_steps=600, images=64, pairs=32, fit_epochs=5,
             fit_batches=(OUR_BATCH,),
             accuracy_epochs=0, predicted=64, seconds=0.2, label_rounds=1, whole_runs=1,
             memory_steps=500,
             growth_steps=40, relabel_rows=(200, 1_000), label_counts=(500,))
# with --device cuda, instead of those of FULL
GPU = dict(runs=5, sac_steps=150, whole_runs=1, fit_batches=(OUR_BATCH,))


# ---- the table ----
def show(row):
    ours, theirs, unit, *spread = row.cells()[1:8]
    ratio = "{} ({} to {})".format(*spread[:3]) if row.theirs else ""
    print(f"{row.question:50s}{ours:>9s} {theirs:>8s} {unit:12s}{ratio:26s}{row.target:8s}"
          f"{row.verdict()}")
    if row.note:
        print(f"    {row.note}")
    if row.verdict() == "missed" and row.why:
        print("    missed; where the time goes:")
        row.why()


def write(path, rows):
    """Rows measured now replace those of the same question; the others stay."""
    old = {"pictures": "images", "pricing and": "reward prediction and"}  # words of older rows
    kept, path = {}, Path(path)
    if path.exists():
        with open(path, newline="") as file:
            for line in list(csv.reader(file))[1:]:
                kept[re.sub("|".join(old), lambda found: old[found[0]], line[0])] = line
    kept.update({row.question: row.cells() for row in rows})
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([COLUMNS, *kept.values()])


def main(arguments=None):
    usual = [name for name in SECTIONS if name not in LONG]
    parser = argparse.ArgumentParser(prog="python -m tools.bench", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="little of each; writes no CSV")
    parser.add_argument("--only", default=",".join(usual), metavar="NAME,NAME",
                        help=f"which of {', '.join(SECTIONS)} (default: all but learning)")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--csv", help="where to (default: results/bench.csv or, with "
                        "--device cuda, results/bench_cuda.csv; --quick: nowhere)")
    parser.add_argument("--pieces", default="", metavar="TASK/LEARNER/SEED",
                        help="of learning: only those whose name contains this, say Hopper-v5/SBX")
    args = parser.parse_args(arguments)
    names = args.only.split(",")
    unknown = [name for name in names if name not in SECTIONS]
    if unknown:
        parser.error(f"no section {unknown[0]}; there are {', '.join(SECTIONS)}")
    import envs

    envs.choose_opengl()  # trap: the first import of mujoco, here that of HalfCheetah, settles it
    if args.device == "cuda":
        import torch

        if not torch.cuda.is_available():
            parser.error("--device cuda: torch sees no CUDA device here")
    print(f"{'question':50s}{'ours':>9s} {'theirs':>8s} {'unit':12s}{'ratio (min to max)':26s}"
          "target  verdict")
    usual_path = HERE / "results" / ("bench.csv" if args.device == "cpu" else "bench_cuda.csv")
    rows, path = [], args.csv or (None if args.quick else usual_path)
    size = QUICK if args.quick else {**FULL, **(GPU if args.device == "cuda" else {})}
    if path:
        size = {**size, "learned": Path(path).with_name(Path(path).stem + "_learned.csv")}
    size = {**size, "pieces": args.pieces}
    for row in sections_rows(names, size, args.device):
        show(row)
        rows.append(row)
        if path:  # at once: a killed run keeps what it has measured
            write(path, rows)
    return rows


if __name__ == "__main__":
    main()
