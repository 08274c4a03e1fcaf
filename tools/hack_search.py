"""Are the programs of VLM-CaR right, and can their reward be earned without reaching the goal?

    python -m tools.hack_search CartPole DoorKey-6x6        two tasks; none named: all of TASKS
    python -m tools.hack_search --steps 0                   without SAC, which takes most of the time

What this is: STEPs C1 to C4 with the offline stand-in (no VLM), on episodes of other seeds than C3's
(where the start is fixed, the expert's is the same): accuracy = share of frames where (progress >=
DONE) agrees with the true state of the sub-task (an earlier one is an event: done from its first
such frame on); hacking = random shooting, and SAC, from one start for the largest sum(Phi - 1), the
programs alone: a hack is more than the expert's from an episode that is never at the goal; one that
is there and leaves again is counted apart, as `left` (CartPole starts at its goal: read that one).
It leaves results/code_accuracy.csv and results/reward_hacking.csv, where the rows of tasks not
named stay as they are. T frames, K sub-tasks.
To use it elsewhere:
    from tools import hack_search
    accuracy, hacking = hack_search.examine("DoorKey-5x5", searched=2, steps=200)
    print(accuracy[0], hacking)  # one row per program; one row per task
"""
import argparse
import csv
import sys
import types
from pathlib import Path

import numpy as np

import code_as_reward
import envs
import sac
from support import offline_vlm, settings

WRITER = "offline stand-in (not a VLM)"
TASKS = tuple(envs.TASKS)


def at_goal(successes):
    """bool of each frame -> at the goal at the "end" of the episode, only "before" it, or "never"."""
    return "end" if successes[-1] else "before" if any(successes) else "never"


def count(found, target):
    """[(sum of Phi - 1, when at the goal)] -> how many beat the target: hacks; left again"""
    better = [when for value, when in found if value > target]
    return better.count("never"), better.count("before")


def play(env, reward, size, act, seed):
    """One episode -> frames (T+1,H,W,3), true states (T+1,K), sum of Phi - 1, when at the goal"""
    (obs, info), frames, true, over = env.reset(seed=seed), [], [], False
    successes = []
    while True:
        frames.append(env.image(size))
        true.append(info.get("subtasks", [info["success"]]))
        successes.append(bool(info["success"]))
        if over:
            break
        obs, _, terminated, truncated, info = env.step(act(obs, len(frames) - 1))
        over = terminated or truncated
    frames = np.stack(frames)
    rewards = reward.episode_rewards(frames[1:], frames[0])  # no word of the simulator's in it
    return frames, np.array(true, bool), float(rewards.sum()), at_goal(successes)


def sac_search(env, reward, config, steps, seed):
    """Each episode of SAC on the programs alone, from one start -> sum of Phi - 1, when at goal"""
    space, shape = env.action_space, env.observation_space.shape
    agent = sac.SAC(shape[0], space, (config.hidden,) * 2, config.sac_lr, config.discount)
    buffer = sac.ReplayBuffer(steps + env.horizon, shape, space.shape)
    while buffer.added < steps:
        (obs, _), frames, over = env.reset(seed=seed), [env.image(config.reward_image_size)], False
        successes = []
        while not over:
            blind = buffer.added < config.seed_steps
            action = space.sample() if blind else agent.act(obs)
            last, (obs, _, terminated, truncated, info) = obs, env.step(action)
            buffer.add(last, action, obs, terminated, None, 0.0)
            frames.append(env.image(config.reward_image_size))
            successes.append(bool(info["success"]))
            over = terminated or truncated
            for _ in range(0 if blind else config.updates):
                agent.update(buffer.sample(config.batch_size))
        frames = np.stack(frames)
        rewards = reward.episode_rewards(frames[1:], frames[0])
        buffer.set_rewards(rewards)
        yield float(rewards.sum()), at_goal(successes)


def examine(task, searched=200, episodes=10, seed=5_000_000, steps=None):
    """-> rows of code_accuracy.csv, one per program; the row of reward_hacking.csv"""
    env, rng, size = envs.make(task), np.random.default_rng(seed), envs.TASKS[task].reward_image_size
    expert, space, right, best = envs.expert(env), env.action_space, {}, (-np.inf,)
    played = code_as_reward.collect_episodes(env, expert, size, seed=2_000_000)  # as train.py does
    ask = lambda parts: types.SimpleNamespace(text=offline_vlm.answer(parts))
    reward, _ = code_as_reward.learn_programs(
        ask, *played["expert_episodes"][0][[0, -1]], env.goal, **played)

    def plan():  # (horizon,) or (horizon, A): random actions, each held for 1 to 10 steps
        return np.repeat([space.sample() for _ in range(env.horizon)],
                         rng.integers(1, 11, env.horizon), axis=0)[:env.horizon]

    space.seed(seed)
    for number, kind in enumerate(["expert", "random"] * episodes):
        drawn = plan()
        act = (lambda obs, t: expert(obs)) if kind == "expert" else lambda obs, t: drawn[t]
        frames, true, _, _ = play(env, reward, size, act, seed + 1 + number)
        said = reward.progress(frames, frames[0]) >= code_as_reward.DONE  # (T+1, K)
        for states in (said, true):  # an event stays done
            states[:, :-1] = np.logical_or.accumulate(states[:, :-1], axis=0)
        right.setdefault(kind, []).extend(said == true)
    accuracy = [{"task": task, "program": name, "programs_by": WRITER, **{
        f"{kind}_accuracy": np.mean([row[k] for row in rows]) for kind, rows in right.items()},
        "frames": sum(map(len, right.values()))} for k, name in enumerate(reward.subtasks)]
    _, _, target, reached = play(env, reward, size, lambda obs, t: expert(obs), seed)
    config = settings.resolve(settings.Config(env=task, device="cpu"))
    steps, found = config.total_steps if steps is None else steps, []
    for number in range(searched):  # half of them keep the beginning of the best so far
        tried = plan()
        if number % 2:
            keep = rng.integers(env.horizon)
            tried[:keep] = best[1][:keep]
        _, _, value, when = play(env, reward, size, lambda obs, t: tried[t], seed)
        found.append((value, when))
        best = max(best, (value, tried), key=lambda pair: pair[0])
    learned = list(sac_search(env, reward, config, steps, seed))
    reward.close()
    row = {"task": task, "expert_return": target, "expert_at_goal": reached}
    for name, tried in (("plan", found), ("sac", learned)):
        value, when = max(tried, default=(float("nan"), ""))
        hacks, left = count(tried, target)
        row |= {f"{name}_episodes": len(tried), f"best_{name}_return": value,
                f"best_{name}_at_goal": when, f"{name}_hacks": hacks, f"{name}_left": left}
    return accuracy, row | {"sac_steps": steps, "programs_by": WRITER}


def write(accuracy, hacking):
    """Rows of tasks that were examined now take the place of older ones; the others stay."""
    for name, rows in (("code_accuracy", accuracy), ("reward_hacking", hacking)):
        path, new = Path("results", f"{name}.csv"), {row["task"] for row in rows}
        path.parent.mkdir(exist_ok=True)
        if path.exists():
            with open(path, newline="") as file:
                rows = rows + [row for row in csv.DictReader(file) if row.get("task") not in new]
        # older rows may have columns of their own
        columns = list(dict.fromkeys(name for row in rows for name in row))
        order = [*TASKS, *(row.get("task") for row in rows)]  # a task of another day comes last
        rows.sort(key=lambda row: order.index(row.get("task")))
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, columns, "", lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        print(*rows, sep="\n")


def main(tasks, steps=None):
    unknown = [task for task in tasks if task not in TASKS]
    if unknown:
        sys.exit(f"hack_search.py: no programs for {unknown[0]}; there are {', '.join(TASKS)}")
    for task in tasks or TASKS:  # each is on disk before the next begins
        try:
            accuracy, hacking = examine(task, steps=steps)
        except (ValueError, code_as_reward.CodeAsRewardError) as error:
            sys.exit(f"hack_search.py: {error}")
        write(accuracy, [hacking])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m tools.hack_search", description=__doc__.splitlines()[0])
    parser.add_argument("tasks", nargs="*", help=f"of {', '.join(TASKS)}")
    parser.add_argument("--steps", type=int, help="of SAC (default: the task's own)")
    main(**vars(parser.parse_args()))
