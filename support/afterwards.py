"""What a run has learned, to be used: its policy, its reward, and a film of both on any day after.

What this is: load_policy() and load_reward() read the run folder of a run that has finished, or of one that is under
way (then as of its last checkpoint). `python train.py --watch FOLDER` plays the policy and writes a film.
Which STEPs: none.
Names: load_policy, load_reward, RewardFromImages, watch.

A run folder may be a stranger's. Weights are read as tensors alone, settings are checked as flags are, and what would
run code (an environment in a module) has to be named again: load_policy(FOLDER, env="mypkg.envs:My-v0"). So has one
that was handed in from Python: load_policy(FOLDER, env=make_my_env).

Shapes: obs as the environment gives it; actions in the environment's own range; images (N, H, W, 3) uint8.

To act with a policy:
    from support.afterwards import load_policy
    policy, env = load_policy("runs/mine")
    obs, info = env.reset(seed=0)
    obs, true_reward, terminated, truncated, info = env.step(policy(obs))

To learn from its reward elsewhere, here with Stable-Baselines3 (pip install stable-baselines3):
    from stable_baselines3 import SAC
    from support.afterwards import RewardFromImages, load_policy, load_reward
    reward = load_reward("runs/mine")  # reward((N, H, W, 3) uint8) -> (N,)
    _, env = load_policy("runs/mine")  # or any environment of Gymnasium that draws the same scene
    SAC("MlpPolicy", RewardFromImages(env, reward), learning_starts=20).learn(40)

To use the reward without this project, copy reward_model.py and FOLDER/policy.pt. Images must have the size that
config.json calls reward_image_size, 64 for instance; random_flip is there, too:
    import numpy as np, torch
    from reward_model import RewardModel
    state = torch.load("policy.pt", weights_only=True)["r_psi"]
    members = len({name.partition(".")[0] for name in state["nets"]})
    model = RewardModel((64, 64, 3), members)
    model.nets.load_state_dict(state["nets"])
    model.mean, model.deviation = state["mean"], state["deviation"]
    print(model.predict(np.zeros((5, 64, 64, 3), np.uint8)))  # (5,)
"""
import argparse
import dataclasses
import json
import os

import gymnasium
import imageio
import numpy as np

import envs
import sac
from support import adapt, given_rewards, settings
from support.run import FRESH_SEED, IN_A_FILM, WEIGHTS, choose_parts, claim, read_state, tensors_of
from support.settings import Config, UserError

EPISODES = 3  # in the film of --watch


# ---- the policy ----
def load_policy(folder, env=None, env_kwargs=None, seed=0):
    """-> policy, a function obs (O,) -> action; and the environment of the run, whose actions it takes.

    An action is in the environment's own range: Pendulum's torque from -2 to 2. So the policy also acts in an
    environment of the same kind that you make yourself, if its observation is a Box.
    It is the policy that was evaluated, SAC.best_action(): the mean of the last actors, without noise; where actions
    are Discrete, one is drawn, by a generator with this seed.
    env, env_kwargs: as given to train(), or as text on the command line; needed where the run folder may not decide.
    Raises UserError, in one line.
    """
    config, _, state = opened(folder, "pi")
    env = make_env(config, folder, env, env_kwargs)
    try:
        pi = sac.SAC(env.observation_space.shape[0], env.action_space, (config.hidden,) * 2, seed=seed)
        pi.slow_actor.load_state_dict(state["slow_actor"])
        for name in ("obs_mean", "obs_std"):
            getattr(pi, name).copy_(state[name])
    except Exception as error:  # a file from elsewhere may raise anything
        raise UserError(misfit(folder, error)) from None
    changes = own_actions(env)
    if config.frames == 2:  # its images are those that r_psi has learned from
        env = adapt.TwoMoments(env, config.vlm_image_size)

    def policy(obs):
        action = pi.best_action(np.ravel(obs))
        for change in changes:
            action = change(action)
        space = env.action_space
        # stretched in float32, an action may be past the end by the last digit
        return action if hasattr(space, "n") else np.clip(action, space.low, space.high).astype(space.dtype)

    return policy, env


def make_env(config, folder, env, env_kwargs):
    """The environment of a run -> TaskEnv.  env, env_kwargs: see load_policy()."""
    again = {name: why for name, why in settings.to_name_again(config).items() if name in ("env", "env_kwargs")}
    given = {name: value for name, value in (("env", env), ("env_kwargs", env_kwargs)) if value is not None}
    if "env" in settings.from_python(config) and (env is None or isinstance(env, str)):
        raise UserError(f"{folder}: its environment {config.env} was handed in from Python; hand it in again: "
                        f"load_policy({folder!r}, env=...)")
    for name, why in again.items():
        if name not in given:
            told = ", ".join(f"{each}={getattr(config, each)!r}" for each in again)
            raise UserError(f"{folder}: {why}; if you trust it: load_policy({folder!r}, {told})")
    for name, value in given.items():
        if isinstance(value, str) and value != getattr(config, name):
            raise UserError(f"{folder}: the run has {name}={getattr(config, name)!r}, not {value!r}")
    adapt.find_here()
    try:
        return envs.make(config.env if env is None else env, config.seed, config.goal, config.horizon,
                         config.action_repeat, json.loads(config.env_kwargs) if env is None or env_kwargs else None)
    except ValueError as error:
        raise UserError(str(error)) from None


def own_actions(env):
    """Take out of a TaskEnv what envs.py and adapt.py put in to change actions -> the functions that do that, in order.

    From then on, env.step() takes actions in the range, and of the kind, of the environment inside.
    """
    changes = []
    if isinstance(env.env, gymnasium.wrappers.RescaleAction):
        changes.append(env.env.action)
        env.env = env.env.env
    while type(env.env) is gymnasium.wrappers.TransformAction and env.env.func.__module__ == adapt.__name__:
        changes.append(env.env.action)
        env.env = env.env.env
    return changes


# ---- the reward ----
def load_reward(folder):
    """-> reward, an ImageReward: reward(images (N, H, W, 3) uint8) -> (N,) float32, what the policy learned from.

    For --reward preference, preference+sparse (the potential), score, and code (the programs, which take a batch as one
    episode that begins with its first image). Raises UserError, in one line, for a run with another reward.
    """
    config, has_reward, state = opened(folder, "r_psi")
    if config.reward == "code":
        kept = settings.kept_folder(config)
        return ImageReward(given_rewards.read_programs(kept or os.path.join(folder, "code_as_reward")).predict,
                           config.reward_image_size)
    if state is None or not has_reward:
        raise UserError(f"{folder}: " + ("nothing was learned from answers yet" if state else
                                         f"--reward {config.reward} is not learned, so there is nothing to load"))
    size = config.reward_image_size
    try:
        r_psi = choose_parts(dataclasses.replace(config, device="cpu", fast=0)).RewardModel(
            (size, size, 3), config.ensemble_size, random_flip=bool(config.random_flip))
        r_psi.nets.load_state_dict(state["nets"])
        r_psi.mean, r_psi.deviation = float(state["mean"]), float(state["deviation"])
    except Exception as error:  # a file from elsewhere may raise anything
        raise UserError(misfit(folder, error)) from None
    return ImageReward(r_psi.predict, size)


class ImageReward:
    """reward(images (N, H, W, 3) uint8) -> (N,) float32.

    size: width and height of the images that it knows. Others are resized, which costs accuracy: better draw them so.
    """

    def __init__(self, predict, size):
        self.predict, self.size = predict, size

    def __call__(self, images):
        images = np.array(images)  # a copy: torch warns of arrays that cannot be written to, such as a rendered image
        if images.ndim != 4 or images.shape[3] != 3 or images.dtype != np.uint8:
            raise UserError(f"a reward takes images (N, H, W, 3) uint8, not {images.shape} {images.dtype}")
        if len(images) and images.shape[1:3] != (self.size, self.size):
            images = np.stack([envs.square(image, self.size) for image in images])
        return self.predict(images)


class RewardFromImages(gymnasium.Wrapper):
    """An environment whose reward is what a function says of the image after each step.

    reward: of load_reward().  info["true_reward"] is the environment's own.
    """

    def __init__(self, env, reward):
        super().__init__(env)
        self.reward = reward

    def step(self, action):
        obs, true_reward, terminated, truncated, info = self.env.step(action)
        task = self.env
        ours = (envs.TaskEnv, adapt.TwoMoments)
        while not isinstance(task, ours) and isinstance(task, gymnasium.Wrapper):
            task = task.env
        # Ours draw the size that is asked for; any other environment the one it has.
        image = task.image(self.reward.size) if isinstance(task, ours) else self.env.render()
        if image is None:
            raise UserError("the environment draws nothing: make it with render_mode=\"rgb_array\"")
        return obs, float(self.reward(np.asarray(image)[None])[0]), terminated, truncated, {
            **info, "true_reward": true_reward}


# ---- what a run folder has ----
def opened(folder, part):
    """Read a run folder -> Config, whether r_psi was ever fitted, and the weights of part "pi" or "r_psi", or None.

    They are those of the end of the run, or of its last checkpoint, whichever has more steps.
    """
    stored, _ = settings.read_run(folder, "run folder")
    found = []
    for path in (os.path.join(folder, "policy.pt"), os.path.join(folder, "checkpoint", "state.pt")):
        if not os.path.isfile(path):
            continue
        try:
            state = read_state(path, "cpu")
            weights = {key: state[part][key] for key in WEIGHTS[part]} if part in state else None
            if not all(tensor.isfinite().all() for tensor in tensors_of(weights)):
                raise ValueError("weights that are not finite")
            found.append((int(state["at"]["step"]), bool(state["at"]["has_reward"]), weights))
        except Exception as error:  # a file from elsewhere may raise anything
            raise UserError(misfit(path, error)) from None
    if not found:
        raise UserError(f"{folder}: the run has reached no checkpoint yet, so there is nothing to load")
    return settings.fill(Config(**stored)), *max(found, key=lambda each: each[0])[1:]


def misfit(path, error):
    reason = " ".join(f"{type(error).__name__}: {error}".split())[:120]
    return f"{path}: it cannot be used: it is of another version, or was changed ({reason})"


# ---- python train.py --watch FOLDER ----
def watch(arguments):
    """If --watch FOLDER is among the words of the command line, play its policy -> whether it is.

    EPISODES episodes from starts that no training had; FOLDER/watch.gif is the film.  UserError, in one line.
    """
    if not any(word.partition("=")[0] == "--watch" for word in arguments):
        return False
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)

    def fail(message):
        raise UserError(f"--watch FOLDER: {message}; beside it there may be --env, --env-kwargs, --seed")

    parser.error = fail
    for flag in ("--watch", "--env", "--env-kwargs"):
        parser.add_argument(flag)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args(arguments)
    folder = os.path.expanduser(asked.watch)
    policy, env = load_policy(folder, asked.env, asked.env_kwargs, asked.seed)
    size = settings.fill(Config(**settings.read_run(folder, "--watch")[0])).vlm_image_size
    with claim(folder):  # a stranger's folder may lead a film astray
        film = []
        for episode in range(EPISODES):
            start = (FRESH_SEED + 1000 * asked.seed + episode) % 2**32
            images, rewards, progress, success = envs.rollout(env, policy, start, size, IN_A_FILM)
            film += list(images)
            told = f", success {success[-1]:.0f}" * env.tells_success
            settings.say(f"episode {episode + 1}: {len(rewards)} steps, return {rewards.sum():.1f}{told}")
        path = os.path.join(folder, "watch.gif")
        imageio.mimsave(path, film, duration=4000 * EPISODES / max(len(film), 4), loop=0)
    settings.say(f"film: {path}")
    return True
