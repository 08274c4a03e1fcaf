"""What you hand in from Python: your environment, your judge, your reward, your function for each row of metrics.csv.

What this is: train(config, env=..., judge=..., reward=..., on_row=...) of train.py; any of them may be left out.

  env      an environment of Gymnasium, or better a function that makes one (support/adapt.py)
  judge    says which of two images is closer to the goal, in place of a VLM. One of:
             judge(first, second, goal) -> 0 (the first is), 1 (the second is) or -1 (unsure)     first (H, W, 3) uint8
             judge(first, second, goal) -> list of M such labels, with judge.batch = True      first (M, H, W, 3) uint8
             judge(parts) -> text, a VLM in your process: parts are texts and images, as VLM.ask() in vlm_query.py takes
                             them; it gets the prompts of vlm_query.py, in --stages, and its text is read as a VLM's
           A function of one argument, or an object with such a function as `ask`, is the third kind.
           Images have vlm_image_size pixels each way. Two that look the same are not shown. A judge is called by one
           thread at a time; its answers are on disk before the next call, and an interrupted run does not ask again.
  reward   reward(images (N, S, S, 3) uint8) -> N finite numbers, which the policy learns from in place of r_psi; S is
           reward_image_size. It is called once per episode, with the image after each step.
  on_row   on_row(row): called with each row of metrics.csv, {column: number}, when it is written

Which STEPs: 3, ask which image is closer to the goal.
Names: Judge, FunctionReward, BadAnswer.

To use it elsewhere (with train.py):
    from train import Config, train
    def darker(first, second, goal):
        return int(second.mean() < first.mean())
    config = Config(total_steps=100, seed_steps=40, explore_steps=40, feedback_every=40, pairs_per_session=6,
                    horizon=20, eval_every=50, eval_episodes=1, image_buffer=20, reward_epochs=1, out="runs/darker")
    train(config, judge=darker, on_row=lambda row: print(row["step"], row["eval_return"]))

TensorBoard, or Weights & Biases, in three lines (pip install tensorboard, or wandb):
    from torch.utils.tensorboard import SummaryWriter
    board = SummaryWriter("runs/board")
    train(config, on_row=lambda row: [board.add_scalar(name, row[name], row["step"]) for name in row])

    import wandb
    wandb.init(project="rl-vlm-f")
    train(config, on_row=lambda row: wandb.log(row, step=row["step"]))
"""
import inspect
import os

import numpy as np

import vlm_query
from support.given_rewards import Reward
from support.settings import UserError, function_name


class BadAnswer(UserError):
    """Your function returned what cannot be used; the message is one line."""


class Judge:
    """judge(first, second, goal, log) -> labels (M,) int8, counts: as vlm_query.label_pairs(), by your function.

    function: see the header.  name: for messages.  stages: calls for a pair, where the function reads prompts.
    kept: records of labels.jsonl; what is in them is not asked again.
    """

    def __init__(self, function, name, stages=2, kept=()):
        self.function, self.name, self.stages = function, f"your function {name}", stages
        takes = 1 if hasattr(function, "ask") else arguments(function)
        if takes not in (1, 3):
            raise UserError(f"{self.name} must take (first, second, goal), or (parts); see support/yours.py")
        self.reads_prompts, self.batch = takes == 1, getattr(function, "batch", False)
        self.kept = {(str(record.get("first")), str(record.get("second"))): record["label"] for record in kept
                     if record.get("kind") in ("label", "unsure") and record.get("label") in (0, 1, -1)}

    def __call__(self, first, second, goal, log):
        if self.reads_prompts:  # one thread: a model in this process need not stand more
            return vlm_query.label_pairs(self.ask, first, second, goal, self.stages, 1, log)
        records = [None] * len(first)

        def keep(pair, label=None):
            """label: 0, 1, -1; or None, for two images that look the same."""
            kind = "identical" if label is None else "unsure" if label == -1 else "label"
            replies = () if label is None else [vlm_query.Reply(str(label), "complete", 0, 0, False)]
            record = vlm_query.record_of(vlm_query.PAIR, kind, label, replies)
            records[pair] = {"pair": pair, **dict(zip(("first", "second"), names[pair])), "goal": goal, **record}
            log(records[pair])

        names = [(vlm_query.short_hash(one), vlm_query.short_hash(two)) for one, two in zip(first, second)]
        asked = []
        for pair, (one, two) in enumerate(zip(first, second)):
            if vlm_query.looks_identical(one, two):
                keep(pair)
            elif names[pair] in self.kept:
                keep(pair, self.kept[names[pair]])
            elif self.batch:
                asked.append(pair)
            else:
                keep(pair, self.label(self.function(one, two, goal), "for a pair"))
        if asked:
            labels = self.function(first[asked], second[asked], goal)
            if not hasattr(labels, "__len__") or len(labels) != len(asked):
                raise BadAnswer(f"{self.name} returned {shown(labels)} for {len(asked)} pairs; with batch = True it "
                                "must return a label for each")
            for pair, label in zip(asked, [self.label(each, f"among {len(asked)} labels") for each in labels]):
                keep(pair, label)
        return np.array([record["label"] for record in records], np.int8), vlm_query.count(records)

    def label(self, answer, where):
        """What the function returned -> 0, 1 or -1."""
        try:
            number = float(answer)  # also of True, of numpy's and of torch's numbers
        except (TypeError, ValueError):
            number = None
        if number not in (0, 1, -1):
            raise BadAnswer(f"{self.name} returned {shown(answer)} {where}; it must return 0 (the first image is "
                            "closer to the goal), 1 (the second one is) or -1 (unsure)")
        return int(number)

    def ask(self, parts):
        text = getattr(self.function, "ask", self.function)(parts)
        if isinstance(text, vlm_query.Reply):
            return text
        if not isinstance(text, str):
            raise BadAnswer(f"{self.name} returned {shown(text)}; a function of (parts) must return a text, or a Reply "
                            "of vlm_query.py. (One that judges two images takes (first, second, goal).)")
        return vlm_query.Reply(text, "complete", 0, 0, False)


def arguments(function):
    """Does a function take three arguments, or one?  -> 3, 1, or 0 for neither."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # of some functions in C nothing is known
        return 3
    for count in (3, 1):
        try:
            signature.bind(*range(count))
            return count
        except TypeError:
            pass
    return 0


def make_judge(function, config):
    """A Judge of train(config, judge=function). Where a run goes on, it knows what was answered before."""
    path = os.path.join(config.resume or "", "labels.jsonl")
    kept = vlm_query.LabelLog.read(path) if config.resume and os.path.exists(path) else ()
    return Judge(function, function_name(config), config.stages, kept)


class FunctionReward(Reward):
    """function: images (T, S, S, 3) uint8 -> (T,) numbers.  name: for messages."""

    def __init__(self, function, name):
        self.function, self.name = function, name

    def of_images(self, images, start_image, failed=False):
        rewards = self.function(images)
        try:
            plain = rewards.detach().cpu() if hasattr(rewards, "detach") else rewards  # a tensor of torch
            numbers = np.asarray(plain, np.float32)
        except (TypeError, ValueError):
            numbers = np.zeros(())
        if numbers.shape != (len(images),):
            raise BadAnswer(f"your function {self.name} returned {shown(rewards)} for {len(images)} images; it must "
                            "return a number for each, of shape (N,)")
        if not np.isfinite(numbers).all():
            raise BadAnswer(f"your function {self.name} returned {numbers[~np.isfinite(numbers)][0]} for image "
                            f"{np.argmin(np.isfinite(numbers))} of {len(images)}; all must be finite in float32")
        return numbers


def shown(value):
    """What a function returned, in a few words: "an array of shape (5, 1)", or the value itself."""
    shape = getattr(value, "shape", None)
    if shape is not None and len(shape):
        return f"an array of shape {tuple(shape)}"
    if isinstance(value, (list, tuple)):
        return f"a {type(value).__name__} of {len(value)}"
    return " ".join(f"{value!r:.60}".split())
