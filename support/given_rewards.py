"""Rewards that ask nobody while the policy learns: VLM-CaR's programs, CLIP, the true reward, the sparse one.

What this is: what train_on_given_reward() of train.py pays, in one form: a reward says what each step of an episode
that has ended is worth. LearnedReward puts r_psi into the same form, for those who judge whole episodes
(support/run.py). Which STEPs: C1 to C3 are called here (code_as_reward.py does them), C4 is ProgramsReward.
Differs from the paper: see code_as_reward.py and support/baselines.py.
Shapes: T steps of an episode, images (T, S, S, 3) uint8 seen after each action, rewards (T,).
Names: Reward, LearnedReward, TrueReward, SparseReward, ProgramsReward, known_reward, programs_reward, described.
"""
import json
import os
from pathlib import Path

import imageio
import numpy as np

import code_as_reward
import envs
import vlm_query
from support import baselines, cached_labels, settings
from support.settings import UserError


class Reward:
    """What the steps of an episode are worth. looks: whether that is read off images."""

    looks = True

    def of_images(self, images, start_image, failed=False):
        """Images (T, S, S, 3), the first image of the episode (S, S, 3), whether it ended short of the goal -> (T,)."""
        raise NotImplementedError

    def of_episode(self, images, true_rewards, successes, start_image, terminated):
        """Rewards (T,), of what was seen or of what the environment said: true_rewards, successes (T,)."""
        return self.of_images(images, start_image, terminated and not successes[-1])


class LearnedReward(Reward):
    """predict: (N, S, S, 3) uint8 -> (N,): r_psi's, or CLIP's."""

    def __init__(self, predict):
        self.predict = predict

    def of_images(self, images, start_image, failed=False):
        return self.predict(images)


class TrueReward(Reward):
    """The environment's own reward, with which the learned one is compared."""

    looks = False

    def of_images(self, images, start_image, failed=False):
        return np.full(len(images), np.nan)  # images say nothing of it

    def of_episode(self, images, true_rewards, successes, start_image, terminated):
        return true_rewards


class SparseReward(TrueReward):
    """Success, 0 or 1."""

    def of_episode(self, images, true_rewards, successes, start_image, terminated):
        return successes


class ProgramsReward(Reward):
    """C4: Phi - 1 of every image, counted from the first; as in the paper, success (0 or 1) is added."""

    def __init__(self, programs, discount, difference, horizon):
        self.programs, self.discount, self.difference, self.horizon = programs, discount, difference, horizon

    def of_images(self, images, start_image, failed=False):
        return self.programs.episode_rewards(images, start_image, failed, self.discount, self.difference, self.horizon)

    def of_episode(self, images, true_rewards, successes, start_image, terminated):
        return super().of_episode(images, true_rewards, successes, start_image, terminated) + successes


def known_reward(config):
    """The reward that needs no VLM to be made, or None. UserError where there is no CLIP here."""
    if config.reward == "clip":
        try:
            return LearnedReward(baselines.ClipReward(config.clip_goal or config.goal, config.clip_baseline,
                                                      config.clip_alpha, config.clip_model, config.device).predict)
        except (baselines.ClipError, ValueError) as error:
            raise UserError(f"--reward clip: {error}") from None
    return {"true": TrueReward(), "sparse": SparseReward()}.get(config.reward)


def programs_reward(config, folder, env, vlm, seed):
    """C1 to C3: ask the VLM for sub-tasks and programs, verify them -> ProgramsReward.

    With `--labels FOLDER` nobody is asked. folder: where programs are kept; a resumed run finds them there.
    env: for the episodes on which programs are verified.  seed: of the episode that the VLM is shown.
    """
    own = folder if os.path.exists(os.path.join(folder, "programs", "complete")) else None
    kept = settings.kept_folder(config) or own
    programs = read_programs(kept) if kept else learn_programs(config, folder, env, vlm, seed)
    return ProgramsReward(programs, config.discount, config.potential == "difference", config.horizon)


def learn_programs(config, folder, env, vlm, seed):
    expert, size = envs.expert(env), config.vlm_image_size
    env.reset(seed=seed)
    start_image, goal_image = env.image(size), envs.rollout(env, expert, seed, size)[0][-1]  # (P, P, 3) each
    episodes = code_as_reward.collect_episodes(env, expert, config.reward_image_size, seed=2_000_000)
    other = envs.make("CartPole" if config.env != "CartPole" else "DoorKey-5x5")
    others = [envs.rollout(other, envs.expert(other), number, config.reward_image_size)[0] for number in range(3)]

    def ask(parts):
        reply = vlm.ask(parts)
        if reply.end != "complete":
            vlm.forget(parts)
            raise vlm_query.VLMError(f"{vlm.name} wrote no program: {reply.end}")
        return reply

    try:
        programs, reports = code_as_reward.learn_programs(
            ask, start_image, goal_image, config.goal, episodes["expert_episodes"], episodes["random_episodes"], others,
            episodes["success"], config.rounds, go_on=config.unverified == "skip", folder=folder,
            save_image=imageio.imwrite)
    except code_as_reward.CodeAsRewardError as error:
        # trap: a run that goes on would read the same answers from the cache, and fail as before; what passed stays
        for parts in error.questions:
            vlm.forget(parts)
        raise
    settings.say(*code_as_reward.verification_table(reports).split("\n"))
    return programs


def described(config, subtasks):
    """The programs in a sentence, which says who wrote them, and whether anybody verified them."""
    kept = settings.kept_folder(config)
    what = f"{len(subtasks)}{' verified' * (not kept)} program{'s' * (len(subtasks) > 1)} ({'; '.join(subtasks)})"
    if not kept:
        return f"{what}, written by {settings.who_labels(config)}"
    # load_programs() takes a folder that holds programs/, and programs/ itself
    for place in (kept, os.path.join(kept, os.pardir)):
        path = os.path.join(place, "verification.json")
        try:
            passed = {row["subtask"] for row in json.loads(cached_labels.read_plain(path, 2**24))
                      if row["verdict"] == "pass"}
        except (OSError, ValueError, TypeError, KeyError, RecursionError, cached_labels.CachedLabelsError):
            continue
        if passed >= {*subtasks}:
            return f"{what} from {kept}, not verified in this run; its verification.json says that they were before"
    return f"{what} from {kept}, which nobody has verified"


def read_programs(folder):
    """code_as_reward.load_programs(), of files that are ordinary and small: the folder may be a stranger's."""
    paths = [*Path(folder).glob("programs/[1-9]_*.py"), *Path(folder).glob("[1-9]_*.py")]
    if len(paths) > 100:
        raise UserError(f"{folder}: {len(paths)} programs are too many (at most 100)")
    try:
        for path in paths:
            cached_labels.read_plain(path, 10**6)
    except (OSError, cached_labels.CachedLabelsError) as error:
        raise UserError(f"a program cannot be read: {error}") from None
    return code_as_reward.load_programs(folder)
