"""Draw all tasks, and measure how fast they are and what random and expert episodes reach.

    python -m tools.draw_tasks                               contact_envs.png, a row per task
    python -m tools.draw_tasks --csv results/speed_envs.csv  the same, and how fast, as a table
    python -m tools.draw_tasks --bounds results/bounds.csv   only what episodes reach

What this is: how results/contact_envs.png, speed_envs.csv and bounds.csv were made. A task whose package is missing is
left out, with a line that says so. Which STEPs: none.
Shapes: images (size, size, 3) uint8. Names: contact_row, bounds, main.
"""
import argparse
import csv
import time

import numpy as np

from envs import TASKS, expert, make, rollout


def policies(env):
    """The two policies that are compared, {name: obs (O,) -> action}."""
    return {"random": lambda obs: env.action_space.sample(), "expert": expert(env)}


def contact_row(env):
    """(200, 800, 3) uint8: start | end of a random episode | expert halfway in progress | expert at the end."""
    info, start = env.reset(seed=0)[1], env.image(200)
    (images, _, progress, _), (random_images, *_) = (
        rollout(env, policies(env)[who], seed=0, size=200) for who in ("expert", "random"))
    # Halfway is meant in progress, not in time: an expert may hurry first and then wait at the goal. The start counts,
    # too, because an episode may have one step only (FoldCloth).
    images, progress = [start, *images], np.array([info["progress"], *progress])
    half = np.argmin(np.abs(progress - (progress[0] + progress[-1]) / 2))
    return np.concatenate([start, random_images[-1], images[half], images[-1]], axis=1)


def random_step(env):
    """One step with a random action, and the reset where an episode ends: what training pays for a step."""
    _, _, terminated, truncated, _ = env.step(env.action_space.sample())
    if terminated or truncated:
        env.reset()


def bounds(env, episodes):
    """What doing anything at random and what the expert reach -> {column: mean over episodes}.

    return: sum of the true rewards; success and progress: those of the last step. The same starts for both.
    """
    found = {"episodes": episodes}
    env.action_space.seed(0)
    for who, policy in policies(env).items():
        rows = []
        for seed in range(episodes):
            _, rewards, progress, success = rollout(env, policy, seed)  # (T,) each
            rows.append((rewards.sum(), success[-1], progress[-1]))
        found.update(zip((f"{who}_{name}" for name in ("return", "success", "progress")),
                         np.round(np.mean(rows, axis=0), 4).tolist()))
    return found


def per_second(do, *args, seconds=0.5):
    """How often do(*args) runs in a second, measured for so many seconds."""
    do(*args)  # not measured: a first image opens a renderer, and draws what stands still
    count, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        do(*args)
        count += 1
    return count / (time.perf_counter() - start)


def main():
    parser = argparse.ArgumentParser(prog="python -m tools.draw_tasks", description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="contact_envs.png", help="the image, a row per task (default: %(default)s)")
    parser.add_argument("--csv", help="write task, size, images_per_s, steps_per_s there")
    parser.add_argument("--bounds", help="write there what random and expert episodes reach, and do nothing else")
    parser.add_argument("--episodes", type=int, default=20, help="of each policy, for --bounds (default: 20)")
    args = parser.parse_args()
    if args.bounds:
        rows = [{"task": name, **bounds(make(name), args.episodes)} for name in TASKS]
        with open(args.bounds, "w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
        return
    from PIL import Image  # comes with imageio

    sheet, table = [], [("task", "size", "images_per_s", "steps_per_s")]
    for name in TASKS:
        try:
            env = make(name)
            sheet.append(contact_row(env))
        except ValueError as error:
            print(f"{name:15s} left out: {error}")
            continue
        env.reset()  # contact_row's last episode is over
        steps = per_second(random_step, env)
        rates = {size: per_second(env.image, size) for size in (84, 100, 200, 300)}
        images = "".join(f"{rate:6.0f} ({size} px)" for size, rate in rates.items())
        print(f"{name:15s}{steps:7.0f} steps/s, images/s:{images}")
        table += [(name, size, round(rate), round(steps)) for size, rate in rates.items()]
        env.close()
    Image.fromarray(np.concatenate(sheet)).save(args.out)
    print(f"{args.out}: start, end of a random episode, expert halfway, expert at the end")
    if args.csv:
        with open(args.csv, "w", newline="") as file:
            csv.writer(file).writerows(table)


if __name__ == "__main__":
    main()
