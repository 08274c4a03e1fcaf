"""Draw all tasks, and measure how fast they are and what random and expert episodes reach.

    python -m tools.draw_tasks                               contact_envs.png, a row a task
    python -m tools.draw_tasks --csv results/speed_envs.csv          and how fast, as a table
    python -m tools.draw_tasks --bounds results/bounds.csv           only: what episodes reach

What this is: how results/contact_envs.png, speed_envs.csv and bounds.csv were made. A task whose
package is missing is left out, with a line that says so. Which STEPs: none.
Shapes: images (size, size, 3) uint8. Names: contact_row, bounds, main.
"""
import argparse
import csv
import time

import numpy as np

from envs import TASKS, expert, make


def episode(env, policy):
    """One episode's images [(200, 200, 3), ...] and progress [float, ...], start included."""
    obs, info = env.reset(seed=0)
    images, progress, over = [env.image(200)], [info["progress"]], False
    while not over:
        obs, _, terminated, truncated, info = env.step(policy(obs))
        images.append(env.image(200))
        progress.append(info["progress"])
        over = terminated or truncated
    return images, progress


def contact_row(env):
    """(200, 800, 3) uint8: start | random episode's end | expert halfway in progress | its end."""
    images, progress = episode(env, expert(env))
    half = np.argmin(np.abs(np.array(progress) - (progress[0] + progress[-1]) / 2))
    random_end = episode(env, lambda obs: env.action_space.sample())[0][-1]
    return np.concatenate([images[0], random_end, images[half], images[-1]], axis=1)


def random_step(env):
    """A step with a random action, and the reset where an episode ends: the cost training sees."""
    _, _, terminated, truncated, _ = env.step(env.action_space.sample())
    if terminated or truncated:
        env.reset()


def bounds(env, episodes):
    """What doing anything at random and what the expert reach -> {column: mean over episodes}."""
    found, policies = {"episodes": episodes}, {
        "random": lambda obs: env.action_space.sample(), "expert": expert(env)}
    env.action_space.seed(0)
    for who, policy in policies.items():
        rows = []
        for seed in range(episodes):
            obs, over, total = env.reset(seed=seed)[0], False, 0.0
            while not over:
                obs, reward, terminated, truncated, info = env.step(policy(obs))
                assert np.isfinite(obs).all() and np.isfinite([reward, info["progress"]]).all()
                total, over = total + reward, terminated or truncated
            rows.append((total, info["success"], info["progress"]))
        found.update(zip((f"{who}_{name}" for name in ("return", "success", "progress")),
                         np.round(np.mean(rows, axis=0), 4).tolist()))
    return found


def per_second(do, *args, seconds=0.5):
    """How often do(*args) runs in a second."""
    do(*args)
    count, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        do(*args)
        count += 1
    return count / (time.perf_counter() - start)


def main():
    parser = argparse.ArgumentParser(prog="python -m tools.draw_tasks", description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="contact_envs.png", help="the image, a row a task")
    parser.add_argument("--csv", help="write task, size, images_per_s, steps_per_s there")
    parser.add_argument("--bounds", help="only: write what random and expert episodes reach there")
    parser.add_argument("--episodes", type=int, default=20, help="of each (default: 20)")
    args = parser.parse_args()
    if args.bounds:
        rows = [{"task": name, **bounds(make(name), args.episodes)} for name in TASKS]
        with open(args.bounds, "w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
        return
    from PIL import Image

    sheet, table = [], [("task", "size", "images_per_s", "steps_per_s")]
    for name in TASKS:
        try:
            env = make(name)
            sheet.append(contact_row(env))
        except ValueError as error:
            print(f"{name:15s} left out: {error}")
            continue
        env.reset()
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
