"""VLM-CaR, Code as Reward (arXiv 2402.04764): a VLM writes, once, programs that read images; they are the reward.

The method: four steps, which replace STEPs 2 to 5 of RL-VLM-F.
  C1  describe the sub-tasks                       the VLM sees an image of the start and one of the goal
  C2  write one program per sub-task               a program looks at an image and says how far the sub-task is done
  C3  verify each program, and send failures back  on episodes of an expert and of a random policy; up to `rounds` times
  C4  the share of sub-tasks done, minus one, is the reward    from here on nobody asks the VLM any more

The equations, for K sub-tasks and the frames t = 0, 1, ... of one episode:
  p_k(t)                         progress in sub-task k = 0..K-1, in [0, 1], as its program reads it off the image;
                                 the sub-task counts as completed where p_k(t) >= 0.95
  s(t)                           how many of the first K-1 sub-tasks were completed, in order, by frame t: 0..K-1
  Phi(t) = (s(t) + p_s(t)) / K   the potential, in [0, 1]: sub-tasks completed, plus progress in the current one
  r(t)   = Phi(t) - 1            the reward of the image seen after an action, in [-1, 0]. As in the paper, the
                                 environment's sparse success, 0 or 1, is added (support/given_rewards.py).

Differs from the paper (its published code cannot run):
  1. A program sees a batch of images and the first image of the episode, and it cannot keep variables between two
     calls. The published programs keep a state that nothing resets, so one episode leaks into the next.
  2. C3 counts distinct sub-tasks, in order. The published check counts frames with a reward, so a program that
     gives the same half point twice passes as two sub-tasks.
  3. C3 has more negative examples: episodes played backwards, frozen episodes, another task, completed too soon.
  4. A program that fails goes back to the VLM with the reasons in words and with the images on which it failed.
  5. The reward is Phi - 1. The published programs give a bonus in every frame, which a policy can collect by standing
     still.
  6. An episode that the environment ends short of the goal costs discount / (1 - discount) more: see C4.

Shapes: T frames of an episode (an image each, the start first), N images of a batch, K sub-tasks. An image is
(H, W, 3) uint8 RGB. `ask` is any callable that takes a list of str and images and returns an object with .text.

Part 1 is the method. Part 2 is the sandbox in which the programs run: its threat model, allow-list and processes.

To use it elsewhere:
    import numpy as np
    from code_as_reward import ProgramReward
    source = "def progress(images, first_image):\\n    return images.mean(axis=(1, 2, 3)) / 255"
    with ProgramReward([source]) as reward:
        print(reward.predict(np.zeros((4, 64, 64, 3), np.uint8)))  # four black images: -1 each
"""
import ast
import builtins
import ctypes
import dataclasses
import gc
import itertools
import json
import math
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import traceback
import types
import unicodedata
import warnings
import weakref
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection, Pipe
from pathlib import Path

import numpy as np

# ==== Part 1: VLM-CaR ====
DONE = 0.95  # progress at which a sub-task counts as completed; asking for 1 would punish rounding errors
# C3 plays 20 episodes of most kinds, so 0.95 lets one expert episode fail and 0.10 lets two negative ones pass. The
# published check has the same 0.10, but asks for all expert episodes: there, one episode with a hidden object rejects
# a correct program.
HIT_RATE = 0.95  # C3: share of expert episodes in which a program must see its sub-task completed
FALSE_RATE = 0.10  # C3: share of the negative episodes of a kind that it may wrongly call completed
FALL_BACK = 0.20  # C3: how far progress may fall below its best so far while the expert works on the sub-task


class CodeAsRewardError(Exception):
    """No reward can be made: the message names the sub-task and says what failed.

    questions: a list of `parts`, the questions whose answers led to the error. A caller that keeps answers in a
    cache has to forget these, otherwise the next attempt reads the same answers and fails in the same way.
    """

    def __init__(self, message, questions=()):
        super().__init__(message)
        self.questions = list(questions)


class ProgramError(Exception):
    """A program failed. kind says how:

    "rejected" by the allow-list, "error": it raised an exception, "output": it gave no N numbers in [0, 1],
    "timeout": no answer in time, "died": its process ended, or its answer could not be read.
    """

    def __init__(self, kind, message):
        super().__init__(f"{kind}: {one_line(message)}")
        self.kind = kind


# ---- C1 to C3 on a page ----
def learn_programs(ask, start_image, goal_image, goal, expert_episodes, random_episodes, other_episodes=None,
                   success=None, rounds=3, go_on=False, folder=None, save_image=None):
    """Sub-tasks, then up to `rounds` programs for each until one passes -> (ProgramReward, list of every Report)

    start_image, goal_image: (H,W,3). goal: "to open the drawer". Episodes and success: see verify().
    go_on: leave out an earlier sub-task for which no program passes, instead of stopping. The last sub-task is the
    goal and cannot be left out.
    folder: gets programs/*.py, verification.json, and failed/ with each failed program and, through
    save_image(path, image), the images on which it failed.
    Raises CodeAsRewardError where no list of sub-tasks can be read, or no program for one of them passes.
    """
    kept, programs, reports = [], [], []  # sub-tasks with a verified program; those programs; every Report
    if folder:
        _remove_older(folder)
    # STEP C1: describe the sub-tasks
    subtasks = describe_subtasks(ask, start_image, goal_image, goal)
    for k, subtask in enumerate(subtasks):
        last, feedback, questions = k == len(subtasks) - 1, None, []

        def ask_and_note(parts):
            questions.append(parts)
            return ask(parts)

        for number in range(1, rounds + 1):
            source = ""
            try:
                # STEP C2: write one program per sub-task. From round 2 on, the VLM sees what was wrong before.
                source = write_program(ask_and_note, subtask, start_image, goal_image, goal, kept, feedback)
                # STEP C3: verify each program ...
                program = Program(source)
                report = verify(program, expert_episodes, random_episodes, other_episodes, success, programs, last)
            except ProgramError as error:  # the answer holds no program
                report = Report(reasons=[str(error)])
            report.subtask, report.round = subtask, number
            reports.append(report)
            if folder:
                _write_round(Path(folder), k, source, reports, save_image)
            if report.verdict == "pass":
                kept.append(subtask)
                programs.append(program)
                break
            feedback = (source, report)  # ... and send failures back
        else:  # no round ended in a pass
            if last or not go_on:
                raise CodeAsRewardError(f"no program for the sub-task {subtask!r} passed in {rounds} rounds: "
                                        f"{'; '.join(report.reasons)}", questions)
    if folder:
        Path(folder, "programs", "complete").touch()
    return ProgramReward(programs, kept), reports


# ---- STEP C1: describe the sub-tasks ----
def describe_subtasks(ask, start_image, goal_image, goal):
    """Ask for the ordered sub-tasks that an image can show -> list of 1 to 5 sentences, the goal itself last.

    Raises CodeAsRewardError where the answer holds no such list. Nothing is guessed.
    Example, DoorKey: ["the key is no longer on the floor", "the yellow door is open", "the red agent is on the ..."]
    """
    # A program will see only an image and the first image of its episode, so the VLM must name nothing else.
    question = [
        f"The goal is {goal}.\nThis image shows the start:", start_image,
        "This image shows the goal reached:", goal_image,
        "List the sub-tasks on the way from the start to the goal, in the order in which they must be done. Name only"
        " sub-tasks whose completion can be seen in a single image of this kind, held against the first image of the"
        " episode. Use as few as possible and five at most; one is enough where no stage lies in between. The last is"
        " the goal itself.\nAnswer with a numbered list, one short sentence per line, and nothing else."]
    text = ask(question).text
    found = read_list(answer_in(text))
    if not 1 <= len(found) <= 5:
        raise CodeAsRewardError(f"the VLM was asked for a list of 1 to 5 sub-tasks and gave "
                                f"{len(found) or 'none that can be read'}: {str(text)[:200]!r}", [question])
    # Of two sentences that are alike the later one stays, because the last sub-task has to be the goal.
    return list(dict.fromkeys(found[::-1]))[::-1]


# ---- STEP C2: write one program per sub-task ----
# Each rule prevents a fault that C3 would find, or that would stop the program in another scene or image size.
RULES = """Write one Python function that measures from the pixels how far this sub-task is done:

    def progress(images, first_image):

images: uint8 array (N, H, W, 3), N images in RGB. first_image: uint8 array (H, W, 3), the first image of the same
episode. Return a float array (N,): 0 where nothing is done, 1 where the sub-task is done, in between where an image
shows how far it has come. 0.95 or more means: completed. Rules:
- Judge each image alone and against first_image; nothing remembered, nothing from neighbours.
- H and W vary: measure in shares of the height and width, never in pixels.
- Images in which the things cannot be found (another scene) score 0: no NaN, no exception.
- The start must not score as completed. If a thing has to vanish, check that first_image shows it.
- Import only numpy (as np) and math. No classes, no files; do not write into the arrays.
- Work on the whole batch at once; where that is hard, define progress(image, first_image) instead.
Answer with one Python code block and nothing else."""


def write_program(ask, subtask, start_image, goal_image, goal, earlier=None, feedback=None):
    """Ask for the program of a sub-task -> its source (str), which defines `progress`; nothing has checked it yet.

    earlier: the sub-tasks before this one. feedback: (source, Report) of the program that failed in the last round.
    Raises ProgramError("rejected") where the answer holds no program.
    """
    parts = [f"The goal is {goal}.\nThis image shows the start:", start_image,
             "This image shows the goal reached:", goal_image]
    if earlier:
        parts.append("Done before this sub-task: " + "; ".join(earlier) + ".")
    parts.append(f"The sub-task: {subtask}\n\n{RULES}")
    if feedback:
        source, report = feedback
        parts.append(f"Your program so far:\n```python\n{source}```\nIt was tested and failed:\n- "
                     + "\n- ".join(report.reasons))
        for failure in report.failures[:6]:
            # Programs read images of 64 to 100 pixels. A VLM sees more when each pixel is enlarged to a block.
            zoom = max(1, 256 // len(failure["image"]))
            parts += [failure["caption"], failure["image"].repeat(zoom, 0).repeat(zoom, 1)]
        parts.append("Find the mistake, and answer with the whole corrected program.")
    return extract_code(ask(parts).text)


# ---- STEP C3: verify each program, and send failures back ----
# What each check catches:
#   hit_rate     A program that is blind: the expert has done the sub-task, and the program does not see it.
#   false_rate   A program that is too generous: it calls completed what a random policy does.
#   backwards    A program that notices any change: an expert episode played backwards ends with the sub-task undone.
#   frozen       A program that calls the start completed, before anything was done.
#   other_task   A program that does not look for its objects: it calls images of another task completed.
#   too_soon     A program that counts an earlier success twice (it is completed in the very frame that completes the
#                sub-task before it), or calls the goal reached where the environment's success says that it is not.
#   regressions  A program whose progress points the wrong way: it falls while the expert works on the sub-task.
CHECKS = {  # name: (largest share of its episodes that may fail it, what the VLM is told then)
    "hit_rate": (1 - HIT_RATE, "an expert does it and it is not called completed"),
    "false_rate": (FALSE_RATE, "random behaviour is called completed"),
    "backwards": (FALSE_RATE, "undone again (an expert backwards) it is called completed"),
    "frozen": (FALSE_RATE, "the start is called completed"),
    "other_task": (FALSE_RATE, "an image of another task is called completed"),
    "too_soon": (FALSE_RATE, "it is called completed before it can be"),
    "regressions": (1 - HIT_RATE, f"progress falls back by more than {FALL_BACK}")}


@dataclasses.dataclass
class Report:
    """What C3 found out about one program."""

    subtask: str = ""
    round: int = 1
    verdict: str = "fail"  # or "pass"
    reasons: list = dataclasses.field(default_factory=list)  # sentences for the VLM
    rates: dict = dataclasses.field(default_factory=dict)  # check: share of its episodes that fail it (hit_rate: pass)
    failures: list = dataclasses.field(default_factory=list)  # dicts: check, caption (str), image (H,W,3)

    def judge(self, check, episodes, curves, frames):
        """Fill in the rate of a check and, where it is too high, the reason and two images.

        Per episode: curves (T,), the progress that the program read; frames: an index at which it is wrong, or None.
        """
        limit, reason = CHECKS[check]
        wrong = [(i, t) for i, t in enumerate(frames) if t is not None]
        if not episodes:
            return
        rate = len(wrong) / len(episodes)
        self.rates[check] = 1 - rate if check == "hit_rate" else rate
        if rate > limit:
            self.reasons.append(f"{reason}, in {rate:.0%} of these episodes ({limit:.0%} may)")
            self.failures += [{"check": check, "image": episodes[i][t],
                               "caption": f"{reason}; in this image it says {curves[i][t]:.2f}:"} for i, t in wrong[:2]]


def verify(program, expert_episodes, random_episodes, other_episodes=None, success=None, earlier=(), last=True):
    """Does the program call the sub-task completed where it is completed, and nowhere else? -> Report

    program: callable(images (N,H,W,3), first_image (H,W,3)) -> (N,) in [0,1], such as a Program.
    Episodes: lists of (T,H,W,3) uint8, the start first. other_episodes: episodes of another task.
    success: per expert episode (T,) bool, the environment's sparse success, if it has one.
    earlier: the programs of the sub-tasks before this one. last: is this sub-task the goal?
      An earlier sub-task is an event (the key is picked up): it is completed when any frame reaches DONE, and the
      frames after that one do not matter. The goal is a state to stay in: completed if the last frame is at DONE.
    A program that fails is a Report with verdict "fail" and no exception. Raises ValueError where success does not fit
    the episodes, CodeAsRewardError where there is nothing to verify on.
    Example: verify(Program(source), experts, randoms).rates -> {"hit_rate": 1.0, "false_rate": 0.05, "backwards": ...}
    """
    report, expert = Report(), expert_episodes
    if success is not None and [len(s) for s in success] != [len(e) for e in expert]:
        raise ValueError("success must have an array for each expert episode, a value per frame")
    success = [None] * len(expert) if success is None else [np.asarray(s, bool) for s in success]
    try:
        curves = [program(e, e[0]) for e in expert]  # per episode (T,)
        done = [_completed(curve, last) for curve in curves]
        # A miss is shown to the VLM at the frame that should have counted: the goal's last one, an event's best one.
        missed = [(len(curve) - 1 if last else int(curve.argmax())) if t is None else None
                  for curve, t in zip(curves, done)]
        report.judge("hit_rate", expert, curves, missed)
        for check, episodes, at_end in _negatives(expert, done, random_episodes, other_episodes, success, last):
            said = [program(e, e[0]) for e in episodes]
            report.judge(check, episodes, said, [_completed(curve, at_end) for curve in said])
        before = [[p(e, e[0]) for p in earlier] for e in expert]
        faults = [_faults(np.stack([*b, curve], axis=1), last, s) for b, curve, s in zip(before, curves, success)]
        report.judge("too_soon", expert, curves, [soon for soon, _ in faults])
        report.judge("regressions", expert, curves, [fall for _, fall in faults])
        # The same images one by one and as a batch: a program that draws random numbers, remembers, or looks at the
        # neighbours in the batch gives other values.
        some, first = expert[0][::max(1, len(curves[0]) // 16)], expert[0][0]
        alone = np.concatenate([program(some[i:i + 1], first) for i in range(len(some))])
        if not np.allclose(program(some, first), alone, atol=1e-6):
            report.reasons.append("not deterministic: an image's value changes when asked again")
    except ProgramError as error:
        report.reasons.append(f"the program fails: {error}")
    report.verdict = "fail" if report.reasons else "pass"
    return report


def _completed(curve, at_end):
    """(T,) progress -> the frame that completes the sub-task, or None. at_end: only the last frame counts.

    Example: [0, 1, 0.5] is completed by frame 1, but not at its end; [0, 1, 1] is, by frame 2.
    """
    reached = np.flatnonzero(curve >= DONE)
    if not len(reached) or at_end and reached[-1] < len(curve) - 1:
        return None
    return int(reached[-1] if at_end else reached[0])


def _negatives(expert_episodes, done, random_episodes, other_episodes, success, last):
    """What must not complete the sub-task -> list of (check, episodes, does only their last frame count?)

    done: per expert episode the frame that completes the sub-task, or None.
    """
    # A start that is at the goal already (a balanced pole) is no negative example: "completed" is right there.
    away = [e for e, s in zip(expert_episodes, success) if not last or s is None or not s[0]]
    if not away or not random_episodes:
        raise CodeAsRewardError("C3 needs random episodes, and expert ones that start short of the goal")
    # trap: a random policy does any easy sub-task if it has enough time. It gets the time that the expert needs.
    needed = int(np.median([1 + t for t in done if t is not None] or [len(away[0])]))
    return [("false_rate", [e[:needed] for e in random_episodes], last),
            ("backwards", [e[::-1] for e in away], True),
            ("frozen", [e[:1] for e in away], True),
            ("other_task", other_episodes or [], last)]


def _faults(progress, last, success):
    """One expert episode -> (frame that is completed too soon or None, frame at which progress fell or None)

    progress: (T, j+1), read by the j earlier programs and by this one. success: (T,) bool or None.
    """
    curve, earlier, soon = progress[:, -1], progress.shape[1] - 1, None
    ready = np.flatnonzero(stages(progress) == earlier)  # the frames in which all earlier sub-tasks are completed
    if not len(ready):
        return None, None
    begin, end = int(ready[0]), len(curve)
    if earlier and curve[begin] >= DONE:  # completed in the very frame that completes the sub-task before it
        soon = begin
    if last and success is not None:
        # A few frames may be early: the program's 0.95 and the environment's own limit need not be the same.
        wrong = (curve >= DONE) & ~success
        soon = int(wrong.argmax()) if wrong.sum() > FALSE_RATE * np.sum(~success) else soon
    if not last and (curve[begin:] >= DONE).any():  # the frames after an event do not matter
        end = begin + int((curve[begin:] >= DONE).argmax()) + 1
    drop = np.maximum.accumulate(curve[begin:end]) - curve[begin:end]  # how far below its best so far
    return soon, begin + int(drop.argmax()) if drop.max() > FALL_BACK else None


def collect_episodes(env, expert, size, count=20, seed=0):
    """Play what verify() needs -> dict(expert_episodes, random_episodes, success), up to `count` episodes of each.

    env: Gymnasium's reset and step, image(size) -> (size,size,3) uint8, info["success"]. expert: obs -> action.
    Kept are expert episodes that end in success and random ones that do not; 3 * count of each are tried at most.
    Raises CodeAsRewardError where the expert never succeeds.
    """
    # trap: a pole that never leans verifies nothing. Where most episodes start at the goal, the expert takes over
    # after up to 20 random actions.
    at_goal = np.mean([env.reset(seed=seed + i)[1].get("success", 0) for i in range(count)])
    warm_up = 20 if at_goal > 0.5 else 0
    experts = (_rollout(env, expert, size, seed, i, warm_up) for i in range(3 * count))
    randoms = (_rollout(env, None, size, seed, i) for i in range(3 * count))
    # islice stops playing as soon as there are `count` of them
    kept = list(itertools.islice((played for played in experts if played[1][-1]), count))
    if not kept:
        raise CodeAsRewardError("the expert never succeeds: nothing to verify programs on")
    failed = itertools.islice((images for images, success in randoms if not success[-1]), count)
    return {"expert_episodes": [images for images, _ in kept], "success": [success for _, success in kept],
            "random_episodes": list(failed)}


def _rollout(env, policy, size, seed, number, warm_up=0):
    """Play one episode of `policy`, or, for None, of random actions -> images (T,size,size,3), success (T,) bool

    warm_up: up to so many random actions come first; the images begin after them.
    """
    # One generator per episode, so that an episode does not depend on how long the episodes before it were.
    space, rng = env.action_space, np.random.default_rng([seed, number])

    def random_policy(obs):
        if hasattr(space, "n"):  # discrete actions 0..n-1
            return int(rng.integers(space.n))
        return rng.uniform(space.low, space.high).astype(np.float32)

    policy = policy or random_policy
    obs, info = env.reset(seed=seed + number)
    for _ in range(rng.integers(warm_up + 1)):
        obs, _, _, _, info = env.step(random_policy(obs))
    images, success, over = [env.image(size)], [info.get("success", 0)], False
    while not over:
        obs, _, terminated, truncated, info = env.step(policy(obs))
        images.append(env.image(size))
        success.append(info["success"])
        over = terminated or truncated
    return np.stack(images), np.array(success, bool)


# ---- STEP C4: the share of sub-tasks done, minus one, is the reward ----
# Phi over one episode of three sub-tasks, here DoorKey's: take the key, open the door, stand on the goal (K = 3).
#
#   Phi                                             the agent steps off the goal, and back
#     1 |                                          .----.    .-----   on the goal the reward is 0
#       |                                     .---'      '--'
#   2/3 |                           .--------'
#       |                     .----'                                  the reward, Phi - 1, is the distance to the top
#   1/3 |          .---------'
#       |    .----'
#     0 |---'
#       +---------------------------------------------------------- t
#        s = 0            | s = 1            | s = 2
#        p_0: to the key  | p_1: to the door | p_2: to the goal
#
# The earlier sub-tasks are events: once completed, they stay completed until the episode ends, also when the key is
# used up or the door falls shut. The last one is a state to stay in: stepping off the goal lowers Phi at once.
#
# Why Phi - 1, and not the potential difference Phi(t+1) - Phi(t)? The differences of an episode add up to
# Phi(end) - Phi(start), whatever happens in between: a pole that falls and stands up again in the last step would earn
# as much as a pole that stands all the time. Under Phi - 1 every step short of the goal costs something, so the best
# that can be done is to arrive soon and to stay. Where reaching the goal ends the episode, as in DoorKey, nothing has
# to be held, and there the difference learned faster (results/README.md); `differences=True` computes it.


def stages(progress):
    """s(t): how many of the first K-1 sub-tasks were completed, in order, by frame t: (T,K) -> (T,) int in 0..K-1

    Example, K = 3: [[0, 1, 0], [1, 0, 0], [0, 1, 0]] -> [0, 1, 2]. In frame 0 sub-task 1 does not count yet.
    """
    done, out = 0, np.zeros(len(progress), int)
    for t, row in enumerate(progress):
        while done < len(row) - 1 and row[done] >= DONE:  # one frame may complete several
            done += 1
        out[t] = done
    return out


def potential(progress):
    """Phi(t) = (s(t) + p_s(t)) / K: (T,K) in [0,1] -> (T,) float32 in [0,1]

    Example, K = 2: the first sub-task is completed, the second is halfway: (1 + 0.5) / 2 = 0.75.
    """
    s = stages(progress)
    return ((s + progress[np.arange(len(s)), s]) / progress.shape[1]).astype(np.float32)


class ProgramReward:
    """The verified programs, in the order of their sub-tasks, as a reward: with ProgramReward(sources) as reward: ...

    sources: list of program texts or Programs. subtasks: their sentences, for messages.
    failed_frames counts the frames on which a program failed after all; its progress is 0 there.
    Each program is a process of its own, which close() or the end of this object ends.
    """

    def __init__(self, sources, subtasks=None):
        if not sources:
            raise CodeAsRewardError("no programs, no reward")
        self.programs = [s if isinstance(s, Program) else Program(s) for s in sources]
        subtasks = subtasks or [f"sub-task {k + 1}" for k in range(len(sources))]
        self.subtasks = [one_line(text) for text in subtasks]
        self.failed_frames = 0

    def predict(self, images):
        """(N,H,W,3) uint8 -> (N,) float32 in [-1,0]: the batch as one episode, which begins with its first image."""
        return self.episode_rewards(images, images[0]) if len(images) else np.zeros(0, np.float32)

    def episode_rewards(self, images, first_image, failed_end=False, discount=0.99, differences=False, horizon=1000):
        """Phi - 1 for each step of an episode: images (T,H,W,3) seen *after* each action, first_image (H,W,3) -> (T,)

        failed_end: the environment ended the episode short of the goal (terminated, without success).
        differences: discount * Phi(after) - Phi(before) instead, potential-based shaping (Ng et al. 1999).
        Example, K = 1 and progress 0, 1, 0.2: -1, 0, -0.8; with failed_end and discount 0.99 the last is -0.8 - 99.
        """
        # The first image is frame 0, so that what is done at the start counts as done.
        frames = np.concatenate([first_image[None], images])  # (T+1,H,W,3)
        phi = potential(self.progress(frames, first_image))  # (T+1,); s starts at 0 in every episode
        if differences:
            return discount * phi[1:] - phi[:-1]
        rewards = phi[1:] - 1
        if failed_end:
            # Where all rewards are negative, an early end is a relief, and the policy would learn to fall over. So a
            # failed end costs what staying at Phi = 0 for ever would cost, r = -1 in each step after it:
            #   discount + discount^2 + ... = discount / (1 - discount), 99 for 0.99.
            # With discount 1 this sum has no limit, and the steps that were left until the horizon are counted.
            rewards[-1] -= max(0, horizon - len(images)) if discount == 1 else discount / (1 - discount)
        return rewards

    def progress(self, images, first_image):
        """(N,H,W,3), (H,W,3) -> (N,K): what each program says of each image."""
        columns = [self._run(k, images, first_image) for k in range(len(self.programs))]
        return np.stack(columns, axis=1)

    def _run(self, k, images, first_image, end=None):
        """Program k on a batch -> (N,). Images on which it fails score 0; CodeAsRewardError if it was killed.

        A failed batch is halved, and each half is tried again, until the images to blame are alone: the others keep
        their value. end: the time at which this search is given up.
        """
        program = self.programs[k]
        try:
            if end is None:
                program(images[:0], first_image)  # starts its process, which must not count as the program's time
                # trap: halving may take 2 N calls; with a slow program it would go on for hours
                end = time.monotonic() + program.seconds * (1 + images.nbytes / BATCH_BYTES)
            return program(images, first_image)
        except ProgramError as error:
            late = end and time.monotonic() > end
            if late or error.kind not in ("error", "output") or not len(images):  # killed, or refused
                raise CodeAsRewardError(f"the program of {self.subtasks[k]!r}: {error}" + " - and it is too slow to try"
                                        " which images are to blame" * bool(late)) from error
        if len(images) == 1:
            self.failed_frames += 1
            return np.zeros(1, np.float32)
        return np.concatenate([self._run(k, half, first_image, end) for half in np.array_split(images, 2)])

    def close(self, *unused):
        """End the processes of all programs. (unused: what `with` hands over at its end.)"""
        for program in self.programs:
            program.close()

    def __enter__(self):
        return self

    __exit__ = close


# ---- programs in a folder, and the table of their verification ----
def _remove_older(folder):
    # trap: programs of an earlier attempt that was cut short would be loaded together with those of this one
    for name in ("programs", "failed"):
        shutil.rmtree(Path(folder, name), ignore_errors=True)


def _write_round(folder, k, source, reports, save_image):
    """Write the program of the last Report, all reports so far, and the images on which the program failed.

    Files: programs/2_the_door_is_open.py, or failed/2_the_door_is_open_round1.py with ..._round1_0.png, _1.png, ...
    """
    report = reports[-1]
    name = f"{k + 1}_" + re.sub(r"[^a-z0-9]+", "_", report.subtask.lower()).strip("_")[:40]
    path = folder / "programs" / f"{name}.py"
    if report.verdict == "fail":
        path = folder / "failed" / f"{name}_round{report.round}.py"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"# sub-task: {report.subtask}\n{source}", encoding="utf-8", errors="replace")
    for i, failure in enumerate(report.failures if save_image else []):
        save_image(path.with_name(f"{path.stem}_{i}.png"), failure["image"])
    names = ("subtask", "round", "verdict", "reasons")
    rows = [{**{name: getattr(r, name) for name in names}, **r.rates} for r in reports]
    (folder / "verification.json").write_text(json.dumps(rows, indent=1), encoding="utf-8")


def load_programs(folder):
    """The verified programs of a run folder, or of its folder `programs` -> ProgramReward.

    Each program meets the allow-list again: a folder from elsewhere is as hostile as an answer of the VLM.
    Raises CodeAsRewardError where there are none, some are missing, or one of them is refused.
    """
    paths = sorted([*Path(folder).glob("programs/[1-9]_*.py"), *Path(folder).glob("[1-9]_*.py")])
    if not paths:
        raise CodeAsRewardError(f"no programs (1_*.py, 2_*.py, ...) in {folder}")
    home = paths[0].parent
    if (home.parent / "verification.json").exists() and not (home / "complete").exists():
        raise CodeAsRewardError(f"the programs in {home} are not all: no program for some sub-task passed, or the "
                                "attempt was cut short")
    try:
        sources = [path.read_text(encoding="utf-8-sig") for path in paths]  # -sig: some editors write a BOM first
    except UnicodeDecodeError as error:
        raise CodeAsRewardError(f"a program in {home} is no UTF-8 text: {error}") from None
    first_lines = [source.partition("\n")[0] for source in sources]
    reward = ProgramReward(sources, [line.removeprefix("# sub-task: ") for line in first_lines])
    reward.progress(np.zeros((0, 8, 8, 3), np.uint8), np.zeros((8, 8, 3), np.uint8))  # starts and checks each program
    return reward


def verification_table(reports):
    """The reports as text, one line per round: share of episodes that pass (hit_rate) or fail (all other checks)."""
    lines = ["  ".join(["round", "verdict", *CHECKS, "sub-task"])]
    for r in reports:
        cells = [f"{r.rates[name]:.0%}" if name in r.rates else "-" for name in CHECKS]
        cells = [cell.rjust(len(name)) for cell, name in zip(cells, CHECKS)]
        lines.append("  ".join([f"{r.round:5}", f"{r.verdict:7}", *cells, r.subtask]))
    return "\n".join(lines)


# ---- reading what the VLM wrote: its list of sub-tasks (C1) and its program (C2) ----
# VLMs write lists and fences in very many ways. An answer costs money, so no list that can be read is thrown away, and
# what cannot be read is an error and never a guess.
def cleaned(text):
    """str or None -> str without control characters, except line breaks and tabs.

    trap: escape codes command the terminal on which they are printed, Python refuses a NUL in source, and half of a
    surrogate pair cannot be written to a file.
    """
    escapes = r"(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]|\x1b\][^\x07\x1b\n]*"  # colours and cursor; titles of windows
    text = re.sub(escapes, "", "\n".join((text or "").splitlines()))
    # \u200c and \u200d are invisible, but join or separate letters (in Persian, for example).
    return "".join(c if c.isprintable() or c in "\n\t\u200c\u200d" else " " * c.isspace() for c in text)


def one_line(text):
    """Any text, or None -> one line of it, for a message or a table: "a\n  b" -> "a b"."""
    return " ".join(cleaned(text).split())


def answer_in(text):
    """The answer, cleaned. trap: a model that thinks first writes lists and code into its thoughts, too."""
    return cleaned(text).rpartition("</think>")[2]


def extract_code(text):
    """The last fenced block that defines `progress`, or the bare text if that does; ProgramError if none does.

    The last one, because a VLM that repairs a program may quote the old one first.
    Example: "Here it is:\n```python\ndef progress(...): ...\n```\nDone." -> "def progress(...): ...\n"
    """
    text = answer_in(text)
    # A fence is ``` or ~~~, three or more, at the beginning of a line; the closing one may be missing.
    fenced = r"^[ \t]*(```+|~~~+)[^\n`]*\n(.*?)(?:^[ \t]*\1|\Z)"
    blocks = [code for _, code in re.findall(fenced, text, re.DOTALL | re.MULTILINE)] or [text]
    blocks = [block for block in blocks if "def progress" in block]
    if not blocks:
        raise ProgramError("rejected", f"no code with def progress: {text[:100]!r}")
    return textwrap.dedent(blocks[-1]).strip() + "\n"


# How an entry of a list begins, in the order of the pattern:
#   indent and quotes  "  ", "> ", "## "
#   bullet             "- ", "* [ ] ", "•", "🔑 "
#   label              "1. ", "(2) ", "a) ", "iv. ", "5 The"; with a word: "Step 3: ", "Sub-task 4 (goal) - ", "第一步："
#   text               the rest of the line
# Example: "  - Step 2 (goal): the door is open" has indent "  ", bullet "- ", label "Step 2 (goal):" with word "Step "
# and number "2", and the text "the door is open".
ITEM = re.compile(r"""(?P<indent>\s*) (?:[>\#]+\s+)*
    (?P<bullet>[^\w\s"'(\[{<|][\ufe0f\u200d\U0001f000-\U0001faff]*\s+|[•●▪◦‣·])? (?:\[[ xX]?\]\s+)?
    (?P<label>[(\[（]? (?P<word>(?:[^\W\d_]+[-\s]){0,3}) [\#№]?
        (?:[^\W\d_]{0,8}?(?P<number>\d{1,2}|[一二三四五])[^\W\d_]{0,2}
           | (?i:[ivx]+|[a-e])(?=[).:\]]+(?:\s|$)))
        (?:\s?\([^()]*\))?
        (?:\s?[).:\]）．：、]+-?(?!\d) | \s[-–—]\s | (?<=\d)\s+(?=[A-Z]) | $))?
    \s*(?P<text>.*)""", re.VERBOSE)

# The goal, where it stands after the list and not in it: "Goal: the door is open", "Final sub-task: ...", "## Goal".
GOAL = re.compile(r"(?i)(?:the )?(?:goal|finally|(?:final|last|end|overall|ultimate)(?: goal)?)"
                  r"(?: (?:sub-?)?(?:goal|task|step|state|reached|itself))? ?[:：]\s*(?P<text>.*)")


@dataclasses.dataclass(eq=False)
class _List:
    """A list in an answer, which may hold several: sub-tasks, notes, what is nested in an entry."""

    kind: tuple  # indentation, bullet, has it labels, words in them, no numbers: what is alike belongs together
    intro: str  # the line before it, such as "Sub-tasks:"
    numbers: list = dataclasses.field(default_factory=list)  # of its entries; None: without a number
    texts: list = dataclasses.field(default_factory=list)
    open: bool = True  # False once a line such as "Notes:" came after it
    goals: list = dataclasses.field(default_factory=list)  # of each "Goal:" after it: entries until then, a _List


def read_list(text):
    """A list in nearly any notation -> its entries in order; [] where some are missing.

    What is nested in an entry or explains it is left out, and so are other lists, such as notes.
    Example: "Sure!\\n1. the key is gone\\n   - not on the floor\\n2. **done**" -> ["the key is gone", "done"]
    """
    lists, current, intro = [], None, ""
    after_blank, ended = True, False  # ended: the sentence of the current entry is over
    for line in _lines(text):
        if not line.strip():
            after_blank = True
            continue
        line, heading = _undecorated(line)
        item = ITEM.fullmatch(line)
        if item["bullet"] or item["label"]:
            current = _list_of(item, lists, intro)
            intro, ended = "", heading and item["text"]
        elif lists and line[:1] != " " and (goal := GOAL.fullmatch(item["text"] + ":" * bool(heading))):
            current, ended = _List((), "", texts=[goal["text"].rstrip(":")]), False
            for one in lists:
                one.goals.append((len(one.texts), current))
        else:
            said = current.texts[-1][-999:] if current else "."
            ended = ended or len(said) == 999 or re.search(r"[.!?;。]\W{0,9}$", said)
            if current and not (said and (ended or heading or after_blank) or re.match(r"\w+ ?:", line)):
                current.texts[-1] = f"{said} {line.strip()}"  # the sentence goes on in this line
            elif heading or line[:1] != " " and line[-1:] in (":", "："):  # "Notes:"
                intro, current = line, None
                for one in lists:
                    one.open = False
        after_blank = False
    return _entries(lists)


def _lines(text):
    """An answer -> its lines, with single spaces; what is JSON, or stands in one line, is taken apart first."""
    text = re.sub(r"(?<=\S) +", " ", _from_json(text).expandtabs(4))
    text = re.sub(r"(?im)(^ *\|.*)|<br ?/?>", lambda found: found[1] or "\n", text)  # the row of a table stays a line
    text = re.sub(r"(?<=[.;,!?]) (?=\(?[2-5][.):] )", "\n", text)  # "1. one 2. two": a whole list in one line
    return [line[:1000] for line in text.split("\n")]  # trap: patterns take for ever over a line without end


def _from_json(text):
    """["one", {"id": 2, "task": "two"}], in a dict or a fence too -> "- one\\n- two". Any other text stays."""
    try:
        data = json.loads(re.sub("^json|`", "", text.strip(" \n`")))
        if isinstance(data, dict):  # the first list in it, or else its values
            data = next((v for v in data.values() if isinstance(v, list)), list(data.values()))
        texts = [[v for v in (e.values() if isinstance(e, dict) else [e]) if isinstance(v, str)][0] for e in data]
        return "\n".join("- " + one_line(text) for text in texts)
    except (ValueError, RecursionError, IndexError, TypeError):
        return text


def _undecorated(line):
    """A line -> (the line without Markdown and tags, is it a heading?)"""
    line = re.sub(r"^ *\|[^\w|]*([^|]*?\d+)[^\w|]*\|([^|]*).*", r"\1: \2", line)  # the row of a table: "| 1 | one |"
    heading = line.startswith("#") or line.lstrip()[:2] == line.rstrip()[-2:] in ("**", "__")
    line = re.sub(r"\*\*|__|`|\*(?=\S)|(?<=\S)\*|<[^<>]{1,20}>", "", line).rstrip()  # bold, italic, code, tags
    line = re.sub(r"[①-⑨⑴-⑼⒈-⒐❶-❾]|\d\ufe0f?\u20e3",  # a number that is drawn as one sign
                  lambda sign: f"{unicodedata.digit(sign[0][0])}. ", line, count=1)
    return line, heading


def _list_of(item, lists, intro):
    """Add an entry to the list that it continues, or to a new one, which joins `lists` -> that list."""
    number = item["number"] and int(unicodedata.numeric(item["number"][-1]))
    bullet = (item["bullet"] or "").strip()
    if bullet >= "\u2600":  # small drawings such as emoji: each entry may have one of its own
        bullet = "\u2600"
    kind = (len(item["indent"]) // 2, bullet, bool(item["label"]), bool(item["word"]), number is None)
    # trap: a list that was indented as a whole has lost the indentation of its first line where the answer was
    # stripped. So the number that comes next continues a list whatever the indentation.
    next_one = [one for one in lists if number and one.kind[1:] == kind[1:] and one.numbers[-1] == number - 1]
    same = [one for one in lists if one.kind == kind and (one.open or one in next_one)] or next_one
    if not same:
        same = [_List(kind, intro)]
        lists += same
    found = same[-1]
    found.kind = min(found.kind, kind)
    found.open = True
    found.numbers.append(number)
    found.texts.append(item["text"])
    return found


def _rank(intro):
    """What the line before a list says of it: 2 the answer, 1 sub-tasks, 0 nothing, -1 something else."""
    if re.search(r"(?i)(answer|list|version)( is)?\W*$|\bfinal\b.*task|\brevis", intro):
        return 2
    if re.match(r"(?i)\W*(note|observ|expla|reason|ratio|just|why|evid|detail|comment|remark)", intro):
        return -1
    return int("task" in intro.lower())


def _entries(lists):
    """The entries of the list of sub-tasks; [] where there is none or its numbers have gaps."""
    if not lists:
        return []
    # In this order: it is introduced as the answer or as tasks, is not nested, has labels; of equal ones the first.
    best = max(lists, key=lambda one: (_rank(one.intro), -one.kind[0], one.kind[2]))
    # Nothing is guessed: neither between two lists of one kind, a draft and a better one perhaps, nor whether bullets
    # under a single bullet explain it or go on.
    for one in lists:
        alike = one is not best and one.kind[1:] == best.kind[1:]
        if alike and (one.kind == best.kind and _rank(one.intro) == _rank(best.intro)
                      or len(best.texts) == 1 and not best.kind[2] and one.kind > best.kind):
            return []
    count = len(best.numbers)
    if best.numbers not in ([None] * count, [1] * count, [*range(count)], [*range(1, 1 + count)]):
        return []
    texts = best.texts
    if best.goals and best.goals[0][0] == count:  # not where each entry has a line "Goal:" of its own
        texts = texts + best.goals[0][1].texts
        if len(best.goals) > 1 or not texts[-1]:
            return []
    found = [one_line(text).strip("\"'“” ") for text in texts]
    return [text for text in found if re.search(r"\w", text)]


# ==== Part 2: the sandbox ====
# Threat model. The text of a program comes from a VLM, or from a folder that somebody sent, and it is taken for
# hostile. It may want to read keys, to write files, to use the network, to start processes, to fill the memory, to
# run for ever, or to take over this process through its answer.
#
# What is covered, and by which layer:
#   1. An allow-list over the syntax tree. Only plain functions, arithmetic, numpy and math are left; what is not on the
#      list is refused before it runs. So there is no open(), no import os, no name that begins with an underscore.
#   2. A process of its own. It has no environment variables of ours (no keys), an empty folder that is removed as soon
#      as the process is in it, no input and no output but one pipe, and it ends with its owner.
#   3. Limits of that process: memory, processor time, no byte written to a file, 8 open files, no new processes
#      (macOS refuses to set some of them). The owner kills it when an answer takes too long.
#   4. On Linux (x86-64, arm64) a filter over system calls: the kernel refuses every call but 18, so there is no way
#      to open a file or a socket, or to signal another process, even for code that gets past the allow-list.
#   5. What comes back is JSON and raw numbers of limited size. Nothing is unpickled, and text is cleaned.
#
# What is NOT covered:
#   - Bugs of the kernel, of Python or of numpy.
#   - Numbers that are left in uninitialised memory of the program's own process: it can read them (where=, padding
#     "empty").
#   - A processor core that is busy until the time limit.
#   - Network and system calls on macOS, which has no layer 4 here. Windows: the sandbox refuses to start.
#   - Programs that are wrong and that C3 lets pass: the sandbox protects the machine, not the reward.
MEMORY = 2 << 30  # bytes of address space of one program
BATCH_BYTES = 1 << 20  # pixels in one message; float64 copies of them (8 bytes each) are far below MEMORY
BATCH_SECONDS, START_SECONDS = 5.0, 60.0  # wall clock: for one message; for numpy to load when the process starts
CPU_SECONDS = 600  # processor time of one process; a fresh process takes over well before

# ---- the allow-list: what a program may say ----
# Kinds of syntax. Left out are classes (a __del__ would run at a time of its own), match (its patterns read attributes
# by name), del, global, yield, and all that is async.
NODES = tuple(getattr(ast, name) for name in """Module FunctionDef arguments arg Return Assign AugAssign AnnAssign For
    While If Expr Pass Break Continue BoolOp BinOp UnaryOp Lambda IfExp Dict Set ListComp SetComp DictComp GeneratorExp
    comprehension Compare Call keyword JoinedStr FormattedValue Constant Attribute Subscript Starred Name List Tuple
    Slice Import alias Try ExceptHandler Raise Assert With withitem NamedExpr operator unaryop boolop cmpop
    expr_context""".split())
# Builtin functions. Left out is what reaches a name through a string (getattr, eval, exec), what leads from an object
# to its class (type, object, super), what reads input or files, and the exceptions that would end the process.
BUILTINS = """abs all any bool dict divmod enumerate filter float frozenset int isinstance len list map max min pow
    print range reversed round set slice sorted str sum tuple zip Exception ArithmeticError IndexError KeyError
    RuntimeError TypeError ValueError ZeroDivisionError""".split()
# Attributes of any object: functions of math, numpy and numpy.linalg, methods of arrays and lists.
# trap: numpy itself opens files (load, tofile, memmap), unpickles, and reaches raw memory (ctypeslib, and
# ndarray(buffer=)). A list of what is forbidden would miss the next such function, so this is a list of what is
# allowed. `format` is not on it: "{0.__class__}".format(x) hides a name in a string.
ATTRIBUTES = {name for name in dir(math) if name[0] != "_"} | set("""
    abs add all allclose any append arange arctan arctan2 argmax argmin argsort argwhere array array_equal asarray
    astype average bincount ceil clip column_stack concatenate convolve copy cos count count_nonzero cumprod cumsum
    diag diagonal diff digitize dot dtype einsum errstate exp expand_dims extend eye fill flatnonzero flatten flip
    fliplr flipud float32 float64 floor full full_like get gradient histogram hstack hypot index inf int16 int32 int64
    interp isclose isfinite isin isinf isnan item items keys linalg linspace log log10 log1p log2 logical_and
    logical_not logical_or logical_xor matmul max maximum mean median meshgrid min minimum nan nan_to_num nanmax
    nanmean nanmedian nanmin nansum ndim newaxis nonzero norm ones ones_like outer pad percentile pi polyfit pop power
    prod quantile ravel repeat reshape roll rot90 round searchsorted shape sign sin size sort split sqrt square squeeze
    stack std sum swapaxes T take take_along_axis tan tanh tile tolist transpose uint16 uint32 uint8 unique
    unravel_index values var vstack where zeros zeros_like""".split())


def check_source(source):
    """Raise ProgramError("rejected") unless all of the source is on the allow-list -> does it take whole batches?

    True for progress(images, first_image), False for progress(image, first_image).
    Runs in the child process only: even to parse a hostile text is a risk (deep nesting can crash Python).
    """
    tree = ast.parse(source)
    for node in ast.walk(tree):
        kind, why = type(node).__name__, None
        # Every field in which a node may hold a name: a variable, an attribute, an argument, an import and its alias.
        names = [getattr(node, field, None) for field in ("id", "attr", "arg", "name", "asname")]
        hidden = [n for n in names if isinstance(n, str) and n[0] == "_" and n != "_"]  # __class__ leads everywhere
        if not isinstance(node, NODES):
            why = f"{kind} is not allowed, only plain functions"
        elif hidden:
            why = f"the name {hidden[0]} begins with an underscore"
        elif kind == "Name" and hasattr(builtins, node.id) and node.id not in BUILTINS:
            why = f"{node.id} is not available"
        elif kind == "Attribute" and node.attr not in ATTRIBUTES:
            why = f".{node.attr} is not available"
        elif kind == "Attribute" and not isinstance(node.ctx, ast.Load):  # np.mean = None
            why = f"assigning to .{node.attr} is not allowed"
        elif kind == "alias" and node.name not in ("numpy", "math"):
            why = f"import {node.name} is not allowed, only numpy and math"
        if why:
            raise ProgramError("rejected", f"line {getattr(node, 'lineno', 1)}: {why}")
    tops = [f for f in tree.body if isinstance(f, ast.FunctionDef) and f.name == "progress"]
    arguments = [a.arg for a in tops[-1].args.args] if tops else []
    if arguments not in (["images", "first_image"], ["image", "first_image"]):
        raise ProgramError("rejected", "it must define progress(images, first_image) or progress(image, first_image)")
    return arguments[0] == "images"


# ---- the inside: what runs in the child process ----
# The 18 system calls that are left, with their numbers on each machine:
#   what is open already   read write
#   memory                 mmap mprotect munmap brk mremap madvise
#   signals, threads       rt_sigaction rt_sigprocmask rt_sigreturn sigaltstack futex sched_yield
#   clock, chance, the end clock_gettime getrandom exit exit_group
# The first number of an entry is the machine's own (AUDIT_ARCH_...). trap: without comparing it, a program could call
# by the numbers of another architecture, which the same kernel also takes.
SYSTEM_CALLS = {
    "x86_64": (0xC000003E, (0, 1, *range(9, 16), 24, 25, 28, 60, 131, 202, 228, 231, 318)),
    "aarch64": (0xC00000B7, (63, 64, 93, 94, 98, 113, 124, 132, 134, 135, 139, 214, 215, 216, 222, 226, 233, 278))}


def _filter_system_calls(libc):
    """Install a seccomp filter: the kernel refuses every other call with EPERM -> does it hold?

    The filter is a little program in the kernel's own instructions (BPF), which runs at each system call:
        load the machine's number;  if it is not ours: refuse;  load the number of the call
        if it is the first of the list: go to allow;  if it is the second: go to allow;  ...
        refuse;  allow
    """
    audit, calls = SYSTEM_CALLS[os.uname().machine]
    load, jump_if_equal, back, refuse, allow = 0x20, 0x15, 0x06, 0x00050001, 0x7FFF0000  # linux/bpf_common.h, seccomp.h
    # each step: (instruction, steps to skip if equal, steps to skip if not, operand)
    steps = [(load, 0, 0, 4), (jump_if_equal, 1, 0, audit), (back, 0, 0, refuse), (load, 0, 0, 0)]
    steps += [(jump_if_equal, len(calls) - i, 0, number) for i, number in enumerate(calls)]
    steps += [(back, 0, 0, refuse), (back, 0, 0, allow)]
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in steps))
    program = ctypes.create_string_buffer(struct.pack("@HP", len(steps), ctypes.addressof(code)))  # struct sock_fprog
    return libc.prctl(22, 2, program, 0, 0) == 0  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER


def _lock_down():
    """Give up all that reading images does not need -> names of the layers that hold. There is no way back."""
    import resource  # Linux and macOS only
    active, libc = [], ctypes.CDLL(None)
    # CPU: seconds. AS: bytes of address space. FSIZE: bytes of a file that it writes. NOFILE: files open at once (the
    # pipe is one). NPROC: processes and threads that it starts.
    for name, limit in dict(CPU=CPU_SECONDS, AS=MEMORY, FSIZE=0, NOFILE=8, NPROC=0).items():
        try:
            resource.setrlimit(getattr(resource, "RLIMIT_" + name), (limit, limit))
            active.append("limit-" + name.lower())
        except (ValueError, OSError):  # macOS refuses some
            pass
    if sys.platform == "linux":
        if libc.prctl(1, int(signal.SIGKILL), 0, 0, 0) == 0:  # PR_SET_PDEATHSIG
            active.append("dies-with-parent")
        libc.prctl(38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS; the kernel takes a filter only after it
        if os.uname().machine in SYSTEM_CALLS and _filter_system_calls(libc):
            active.append("system-calls")
    return active


def _serve(pipe):
    """The child's main loop. A message is a JSON object and then raw bytes, in both directions.

    First message: {"source": text} -> {"active": layers}. All others: {"shape": (1+N,H,W,3)} and pixels -> {} and N
    float64. Where something fails: {"error": "kind: text"}.
    """
    # trap: Python (for a name like größe: unicodedata) and numpy (for median: ma) load parts of themselves when they
    # first need them. After _lock_down() no file can be opened, so these are loaded now.
    import unicodedata  # noqa: F401

    import numpy.ma  # noqa: F401
    np.seterr(all="ignore")
    active = _lock_down()
    gc.freeze()  # what exists by now stays, and need not be searched for garbage after each batch
    while True:
        message, pixels, answer, raw = json.loads(pipe.recv_bytes()), pipe.recv_bytes(), {}, b""
        try:
            if "source" in message:
                batch = check_source(message["source"])
                code = compile(message["source"], "<program>", "exec")
                answer = {"active": active}
            else:  # frombuffer makes read-only arrays: the first image, then the others
                images = np.frombuffer(pixels, np.uint8).reshape(message["shape"])
                raw = _run_program(code, batch, images[1:], images[0]).tobytes()
        except Exception as error:  # whatever goes wrong in a program is its verdict
            lines = [line for frame, line in traceback.walk_tb(error.__traceback__)
                     if frame.f_code.co_filename == "<program>"]
            text = f"error: {type(error).__name__}: {error} (line {lines[-1] if lines else '?'})"
            answer["error"] = str(error if isinstance(error, ProgramError) else text)[:800]
        pipe.send_bytes(json.dumps(answer).encode())
        pipe.send_bytes(raw)
        gc.collect()  # trap: functions and arrays of a batch refer to each other and would pile up to the memory limit


def _run_program(code, batch, images, first_image):
    """Run the program afresh, so that no name it bound in the last batch survives -> (N,) float64"""
    # trap: numpy's C code, too, imports its parts through the builtins of its caller, hence __import__. A program
    # cannot say that name: it begins with an underscore.
    safe = {name: getattr(builtins, name) for name in [*BUILTINS, "__import__"]}
    space = {"__builtins__": safe, "np": np, "math": math}
    exec(code, space)
    if batch:
        out = space["progress"](images, first_image)
    else:
        out = [float(space["progress"](image, first_image)) for image in images]
    out = np.array(out, dtype=np.float64)
    if out.shape != (len(images),):
        raise ProgramError("output", f"{len(images)} images gave a result of shape {out.shape}")
    return out


# ---- the outside: one long-lived process per program ----
# The child runs this very file, found by its path, under the name "sandbox" (see the last lines). argv: this file,
# the folder in which numpy lies, the number of the pipe.
BOOT = "import sys, runpy; sys.path.append(sys.argv[2]); runpy.run_path(sys.argv[1], run_name='sandbox')"


def _end(process, pipe, keeper):
    """Kill the process, and let go of the thread that started it."""
    process.kill()
    process.wait()
    pipe.close()
    keeper.shutdown(wait=False)


class Program:
    """program(images (N,H,W,3) uint8, first_image (H,W,3) uint8) -> (N,) float32 in [0,1]

    The process starts at the first call and stays until close() or the end of this object. It is killed when a message
    (a megabyte of images) takes more than `seconds`; the next call starts a fresh one.
    Raises ProgramError where the program fails, ValueError where the images are no images.
    """

    def __init__(self, source, seconds=BATCH_SECONDS):
        if os.name != "posix":
            raise CodeAsRewardError("the sandbox needs Linux or macOS (on Windows: WSL)")
        self.source, self.seconds = source, seconds
        self.process = None
        self.active = []  # names of the layers that hold
        self.busy = 0.0  # seconds for which this process has worked
        self._turn = threading.Lock()  # trap: two threads at once would get each other's answers

    def __call__(self, images, first_image):
        images, first_image = np.asarray(images), np.asarray(first_image)
        if (images.ndim != 4 or images.shape[1:] != first_image.shape
                or not images.dtype == first_image.dtype == np.uint8):
            raise ValueError(f"images must be (N,H,W,3) uint8 and first_image one of them, not {images.shape} "
                             f"{images.dtype} and {first_image.shape} {first_image.dtype}")
        step = max(1, BATCH_BYTES // first_image.nbytes)  # images in one message
        with self._turn:
            if self.process is None or self.process.poll() is not None or self.busy > CPU_SECONDS / 2:
                self._start()
            parts = [self._batch(images[i:i + step], first_image) for i in range(0, len(images), step)]
        return np.concatenate([np.zeros(0, np.float32), *parts])

    def _start(self):
        """Start the process and give it the source; ProgramError if that is refused."""
        self.close()
        self.pipe, theirs = Pipe()
        # -s: no packages of the user; -S: no site hooks; -B: no .pyc files. So numpy's folder has to be handed over.
        command = [sys.executable, "-s", "-S", "-B", "-c", BOOT, os.path.abspath(__file__),
                   os.path.dirname(os.path.dirname(np.__file__)), str(theirs.fileno())]
        # This is all of its environment. trap: BLAS would start threads, and they count as processes.
        env = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        # trap: a set of words has another order in each process unless the hash seed is fixed. (With -I Python would
        # not read these variables. PYTHONSAFEPATH: the current folder is no place to import from.)
        env |= {"PYTHONHASHSEED": "0", "PYTHONSAFEPATH": "1"}
        # trap: "dies with its parent" means the *thread* that started it. So a thread of our own, which lives on,
        # starts it, and not the caller's.
        keeper = ThreadPoolExecutor(1)
        # The folder is removed when the child is in it: it leaves nothing behind even after kill -9, and nothing can
        # be put there.
        with tempfile.TemporaryDirectory(prefix="program-") as folder:
            self.process = keeper.submit(
                subprocess.Popen, command, env=env, cwd=folder, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                start_new_session=True).result()  # a new session, so that Ctrl-C reaches only us
        theirs.close()
        self._finalizer = weakref.finalize(self, _end, self.process, self.pipe, keeper)
        self.busy = 0.0
        message = {"source": self.source}
        try:
            self.active = self._exchange(message, b"", START_SECONDS)[0]["active"]
        except ProgramError:
            self.close()  # trap: a process without a program would answer the next call
            raise
        if sys.platform == "linux" and "system-calls" not in self.active:
            warnings.warn("the sandbox has no system-call filter on this machine")

    def _batch(self, images, first_image):
        """One message: images (N,H,W,3), first_image -> (N,) float32, which are checked: the child is not trusted."""
        pixels = first_image.tobytes() + images.tobytes()
        message = {"shape": (1 + len(images), *first_image.shape)}
        raw = self._exchange(message, pixels, self.seconds)[1]
        if len(raw) != 8 * len(images):
            raise ProgramError("output", f"{len(raw)} bytes for {len(images)} images")
        out = np.frombuffer(raw, np.float64)  # (N,)
        bad = int((~np.isfinite(out)).sum())
        if bad:
            raise ProgramError("output", f"NaN or infinity on {bad} of {len(images)} images")
        if out.min() < -1e-6 or out.max() > 1 + 1e-6:
            raise ProgramError("output", f"not in [0, 1]: {out.min():.3g} to {out.max():.3g}")
        return np.clip(out, 0, 1).astype(np.float32)

    def _exchange(self, message, pixels, seconds):
        """Send a message and wait for the answer -> (dict, bytes). ProgramError if it fails or takes too long."""
        killer, start = threading.Timer(seconds, self.process.kill), time.monotonic()
        killer.start()  # it ends whatever we may wait for below
        try:
            self.pipe.send_bytes(json.dumps(message).encode())
            self.pipe.send_bytes(pixels)
            # trap: only JSON and raw numbers of limited size come back. To unpickle an answer would be to run its code.
            answer = dict(json.loads(self.pipe.recv_bytes(10_000)))
            raw = self.pipe.recv_bytes(BATCH_BYTES)
        except (OSError, EOFError, ValueError, TypeError, RecursionError):
            late = time.monotonic() - start > 0.99 * seconds
            self.close()
            if late:
                raise ProgramError("timeout", f"no answer within {seconds:g} s") from None
            raise ProgramError("died", "it ended (a limit, or a crash) or garbled") from None
        except BaseException:  # Ctrl-C
            # trap: the answer that is under way would be taken for the answer to the next call
            self.close()
            raise
        finally:
            killer.cancel()
        self.busy += time.monotonic() - start
        if "error" in answer:
            kind, _, text = str(answer["error"]).partition(": ")
            raise ProgramError(kind if kind in ("rejected", "output") else "error", text)
        return answer, raw

    def close(self):
        """End the process, if there is one. The next call starts a fresh one."""
        if self.process is not None:
            self._finalizer()
            self.process = None


# ---- demo: a white bar has to be moved to the right edge of the image ----
def _demo():
    """C1 to C4 without a VLM and without an environment, in a few seconds: python code_as_reward.py"""
    code = "```python\ndef progress(images, first_image):\n    return {}\n```"
    answers = iter(["1. The white bar is at the right edge.",
                    code.format("images.max(axis=(1, 2, 3)) / 255"),  # wrong on purpose: it is white anywhere
                    code.format("np.clip(images.any(axis=(1, 3)).argmax(axis=1) / 52, 0, 1)")])
    ask, rng = lambda parts: types.SimpleNamespace(text=next(answers)), np.random.default_rng(0)

    def episode(columns):  # (T,) left edge of the bar -> (T,64,64,3) uint8
        inside = (np.arange(64) - columns.astype(int)[:, None]) // 8 == 0  # (T, 64)
        return np.uint8(255) * inside[:, None, :, None].repeat(64, 1).repeat(3, 3)

    expert = [episode(np.minimum(52, i + 4 * np.arange(20))) for i in range(10)]
    random = [episode(np.clip(rng.normal(0, 3, 20).cumsum(), 0, 52)) for _ in range(10)]
    reward, reports = learn_programs(ask, *expert[0][[0, -1]], "to move it right", expert, random)
    print("No VLM here, but three fixed answers; expect a program that fails and one that passes.")
    print(verification_table(reports), "Sent back:", *reports[0].reasons, sep="\n")
    print("Reward along an expert episode, expect -0.9 rising to 0:",
          reward.episode_rewards(expert[0][1:], expert[0][0]).round(1)[::2])
    print("Sandbox:", ", ".join(reward.programs[0].active))


if __name__ == "sandbox":
    _serve(Connection(int(sys.argv[3])))
elif __name__ == "__main__":
    _demo()
