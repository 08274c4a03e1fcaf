"""What helps against a judge that leans, is weak, blurry or one-sided? Reward models fitted to its answers, no policy.

    python -m tools.remedies                                  all of it -> results/remedies.csv (an hour on one core)
    python -m tools.remedies --judges weak good --calls 300   a part of it; rows that are there already are kept

What this is: the question of the goal "the pole is upright", asked about images of CartPole of which only the angle
differs. Who answers is a judge of support/judges.py, or a neural one: tiny VLMs that were trained on such images, whose
answers to 500 pairs, in both orders, are in results/neural_judges.csv. A reward model is fitted to the answers, with
CartPole's own settings, and then it orders pairs that nobody was asked about. At equal calls: an answer to an order of
a pair is one call, so the remedies that ask both orders ask about half as many pairs.
Which STEPs: 3 ask the VLM which image is closer to the goal, and 4 fit the reward model to the answers.

REMEDIES, each with what the paper does not have:
  plain            nothing
  intercept        b in the Bradley-Terry loss (reward_model.py)
  agree            both orders are asked, and answers that contradict each other are dropped;  agree b: with intercept
  mean             both orders are asked, and the mean of both answers is the label: 0, 1/2 or 1
  both b           both orders are asked, and each answer is a row of D, with intercept
  MAE              |P - y| in place of -log P: a wrong answer costs 1 at most (arXiv 1712.09482), with intercept
  no mirror        intercept, but half of the images are not flipped left to right (CartPole's fits do that)
Columns: right, share of the answers that are right; kept, answers that were fitted; order, share of PAIRS unseen pairs
that the reward puts in order; best, the angle in degrees that it likes best; lean, the b that was found.

To use it elsewhere:
    from tools import remedies
    print(remedies.fit_one("weak", "intercept", calls=60, seed=0))
"""
import argparse
import csv
import itertools
import math
import os
import unittest.mock
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import envs
import reward_model
from reward_model import PreferenceDataset, RewardModel, uniform_pairs
from support import judges
from tasks.schedules import OURS

HERE = Path(__file__).resolve().parents[1]
NEURAL = HERE / "results" / "neural_judges.csv"
MOST = 30.0  # degrees: where CartPole's pole stops
PAIRS = 4000  # unseen pairs
COLUMNS = ("judge", "remedy", "calls", "seed", "right", "kept", "order", "best", "lean", "epochs")


def bounded_loss(r0, r1, label, lean=0.0):
    """The mean of |P - y|, in place of reward_model.preference_loss()."""
    return (torch.sigmoid(r1 - r0 + lean) - label).abs().mean()


REMEDIES = {
    "plain": {"intercept": False},
    "intercept": {},
    "agree": {"orders": "agree", "intercept": False},
    "agree b": {"orders": "agree"},
    "mean": {"orders": "mean", "intercept": False},
    "both b": {"orders": "each"},
    "MAE": {"loss": bounded_loss},
    "no mirror": {"random_flip": False},
}


# ---- images, judges and their answers ----
def draw(degrees, size):
    """(N,) degrees -> (N, size, size, 3) uint8, CartPole's own drawing of a pole that leans by so much."""
    env = envs.make("CartPole")
    images = []
    for angle in degrees:
        env.unwrapped.state = np.array([0.0, 0.0, math.radians(angle), 0.0])
        images.append(env.image(size))
    env.close()
    return np.stack(images)


def neural_judges():
    """-> {"name, 2 stages": (degrees (M, 2), answers (M, 2): to the pair, and to the pair turned round)}"""
    found = {}
    with open(NEURAL, newline="") as file:
        for row in csv.DictReader(file):
            degrees, answers = found.setdefault(f"{row['judge']}, {row['stages']} stage{'s' * (row['stages'] == '2')}",
                                                ([], []))
            degrees.append((float(row["degrees_first"]), float(row["degrees_second"])))
            answers.append((int(row["label"]), int(row["label_when_swapped"])))
    return {name: (np.array(degrees), np.array(answers)) for name, (degrees, answers) in found.items()}


def simulated_answers(name, degrees, seed):
    """degrees (M, 2) -> (M, 2) answers of a judge of support/judges.py, in both orders.

    name: of a preset or a published model, and numbers that take the place of its own: "weak,spread=0,jitter=1".
    """
    name, *more = name.split(",")  # "weak,spread=0,jitter=1"
    words = {word: judges.read(word, value) for word, _, value in (each.partition("=") for each in more)}
    judge = judges.make({"judge": name, **words}, seed=seed)

    def label(first, second):
        side = lambda angle: "left" if angle < 0 else "right"
        return judge.label((abs(first) / MOST, abs(second) / MOST), (f"{first:.6f}", f"{second:.6f}"),
                           (side(first), side(second)))

    return np.array([(label(first, second), label(second, first)) for first, second in degrees])


def rows_of(degrees, answers, orders):
    """What is fitted -> degrees (L, 2), label (L,) from 0 to 1.  orders: None, "agree", "mean" or "each"."""
    label, turned = answers.T.astype(float)
    turned = np.where(turned >= 0, 1 - turned, turned)  # "the second" of the pair turned round is the first
    sure = label >= 0
    if orders == "agree":
        sure &= label == turned
    elif orders == "mean":
        sure &= turned >= 0
        label = (label + turned) / 2
    elif orders == "each":
        degrees = np.concatenate([degrees, degrees[:, ::-1]])
        label = np.concatenate([label, answers[:, 1]])
        sure = label >= 0
    return degrees[sure], label[sure]


# ---- one fit ----
def fit_one(judge, remedy, calls, seed):
    """-> {column: value}"""
    settings = {"orders": None, "intercept": True, "random_flip": True, "loss": reward_model.preference_loss,
                **REMEDIES[remedy]}
    rng, task = np.random.default_rng(1000 * seed + 7), OURS["CartPole"]
    size = envs.TASKS["CartPole"].reward_image_size
    pairs = calls // 2 if settings["orders"] else calls
    known = neural_judges()
    if judge in known:
        degrees, answers = known[judge]
        chosen = rng.permutation(len(degrees))[:pairs]
        degrees, answers = degrees[chosen], answers[chosen]
        turn = rng.random(len(degrees)) < 0.5  # which order is the first one
        degrees = np.where(turn[:, None], degrees[:, ::-1], degrees)
        answers = np.where(turn[:, None], answers[:, ::-1], answers)
    else:
        degrees = rng.uniform(-MOST, MOST, (pairs, 2))
        answers = simulated_answers(judge, degrees, seed)
    asked = answers if settings["orders"] else answers[:, :1]
    truth = abs(degrees[:, 1]) < abs(degrees[:, 0])
    truth = np.stack([truth, ~truth], 1)[:, :asked.shape[1]]
    degrees, label = rows_of(degrees, answers, settings["orders"])

    data = PreferenceDataset(len(label) + 1, (size, size, 3))
    data.add(draw(degrees[:, 0], size), draw(degrees[:, 1], size), label)
    model = RewardModel((size, size, 3), lr=task["reward_lr"], seed=seed, random_flip=settings["random_flip"],
                        intercept=settings["intercept"])
    with unittest.mock.patch.object(reward_model, "preference_loss", settings["loss"]):
        fit = model.fit(data, task["reward_epochs"])

    every = np.linspace(-MOST, MOST, 1201)
    reward = model.predict(draw(every, size))
    one, two = uniform_pairs(len(every), PAIRS, rng).T
    differ = abs(every[one]) != abs(every[two])
    order = (reward[one] > reward[two]) == (abs(every[one]) < abs(every[two]))
    return {"judge": judge, "remedy": remedy, "calls": asked.size, "seed": seed,
            "right": f"{(asked == truth)[asked >= 0].mean():.3f}", "kept": len(label),
            "order": f"{order[differ].mean():.4f}", "best": f"{every[reward.argmax()]:.2f}",
            "lean": f"{fit['lean']:.2f}", "epochs": fit["epochs"]}


def main():
    parser = argparse.ArgumentParser(prog="python -m tools.remedies", description=__doc__.splitlines()[0])
    everyone = [*judges.PRESETS, *neural_judges()]
    parser.add_argument("--judges", nargs="+", default=everyone, help=f"of {', '.join((*everyone, *judges.PUBLISHED))}")
    parser.add_argument("--remedies", nargs="+", default=list(REMEDIES), choices=REMEDIES)
    parser.add_argument("--calls", nargs="+", type=int, default=[100, 300, 1000])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", default=str(HERE / "results" / "remedies.csv"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    done = []
    if os.path.exists(options.out):
        with open(options.out, newline="") as file:
            done = list(csv.DictReader(file))
    have = {(row["judge"], row["remedy"], row["asked_for"], row["seed"]) for row in done}
    jobs = [job for job in itertools.product(options.judges, options.remedies, options.calls, range(options.seeds))
            if tuple(map(str, job)) not in have]
    new = not done
    with open(options.out, "a", newline="") as file:
        writer = csv.DictWriter(file, ("asked_for", *COLUMNS))
        if new:
            writer.writeheader()
        for judge, remedy, calls, seed in (bar := tqdm(jobs, unit="fit")):
            row = fit_one(judge, remedy, calls, seed)
            writer.writerow({"asked_for": calls, **row})
            file.flush()
            bar.set_postfix_str(f"{judge}, {remedy}, {calls}: {row['order']} in order")


if __name__ == "__main__":
    main()
