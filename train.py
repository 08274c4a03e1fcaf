"""RL-VLM-F: from a goal in words, and from images of a task, to a trained policy.

    python train.py --env CartPole                                       no key, no network, a quarter of a minute
    python train.py --env DrawerOpen --vlm openai/MODEL                  a real VLM compares the images
    python train.py --env Reacher-v5 --goal "..." --vlm local/MODEL --vlm-url http://localhost:11434/v1
    python train.py --help                                               the settings

What this is: the algorithm of RL-VLM-F (Wang et al., arXiv 2402.03681), STEP by STEP, in the paper's letters:

    l          the goal, one sentence
    pi_theta   the policy: SAC's actor, with its critics               pi      sac.py
    B          the replay buffer: transitions with their images        B       sac.py
    I          images that the VLM may be asked about                  I       reward_model.py
    D          preferences: pairs of images, each with its label       D       reward_model.py
    y          a label: 0, the first image is closer to l; 1, the second one is
    r_psi      the reward model, an ensemble of small CNNs             r_psi   reward_model.py

| STEP | what | where |
|---|---|---|
| 0 | explore without any reward | sac.py: novelty_bonus |
| 1 | act, and store the transition with the image seen after it | sac.py: ReplayBuffer.add |
| 2 | pick pairs of images | reward_model.py: sample_pairs |
| 3 | ask the VLM which image is closer to the goal | vlm_query.py: label_pairs |
| 4 | fit the reward model to the answers | reward_model.py: RewardModel.fit |
| 5 | relabel every stored transition with the new reward | sac.py: ReplayBuffer.relabel |
| 6 | improve the policy with SAC on the learned reward | sac.py: SAC.update |
| 7 | evaluate with the true reward, which the learner never sees | train.py: evaluate |

Two loops stand side by side. train() is RL-VLM-F. train_on_given_reward() is the same without STEPs 2 to 5, for a
reward that asks nobody while the policy learns: VLM-CaR's programs (code_as_reward.py), CLIP, the true reward, the
sparse one. What stands around the loops is in support/: settings, the run folder, who answers.

Differs from the paper:
  1. A query session, new rewards and a checkpoint come where an episode ends: nothing half done has to be saved.
  2. There are fewer steps and pairs, and in some tasks more updates per step (tasks/schedules.py); `--schedule paper`
     has the paper's own numbers.
  3. I is a random sample of the images of the whole run, each different image once; the official code draws from the
     last 100 episodes.
  4. What is evaluated is an average of the actor over the last twentieth of the steps (sac.py: SAC.best_action), and
     SAC's learning rates fall to a tenth over a run.
  5. An image that ended its episode early is always offered to I, and its reward counts as if the image stayed
     (make_learner). No episode of the seven tasks ends early.

From Python:
    from train import Config, train
    rows = train(Config(env="CartPole", total_steps=2000))  # the rows of metrics.csv
"""
import dataclasses
import functools
import sys

from support import interrupts, settings
from support.settings import Config, UserError  # noqa: F401  (Config is for those who import train)

if __name__ == "__main__":
    interrupts.handle()
    settings.answer_help(sys.argv[1:])  # and ends, before the imports below, which take seconds

import numpy as np
import torch

from code_as_reward import CodeAsRewardError
from envs import BadEnvironment, rollout
from reward_model import ImageBuffer, sample_pairs
from sac import novelty_batch, stored_array
from support.afterwards import watch
from support.given_rewards import LearnedReward, programs_reward
from support.run import EVAL_SEED, choose_parts, looks_at_images, most_pairs, random_action, started
from vlm_query import VLMError

RESET_UPDATES = 100  # updates of the fresh critics at once, as in the official code


@dataclasses.dataclass
class Progress:
    """How far a run has come; it is saved in checkpoints."""

    step: int = 0  # environment steps taken
    episodes: int = 0  # training episodes completed
    sessions: int = 0  # query sessions held
    has_reward: bool = False  # whether any row of B has a reward yet
    explored: bool = False  # whether STEP 0 is over, and the critics have been reset
    fit: dict = dataclasses.field(default_factory=dict)  # loss and accuracies of the last fit
    solved: list | None = None  # step and seconds at which evaluation first succeeded throughout
    doubts: dict = dataclasses.field(default_factory=dict)  # warnings given so far: why the run may learn nothing


# ---- RL-VLM-F ----
def train(config, parts=None, **yours):
    """Run RL-VLM-F (or, with --reward score, VLM Score) -> the rows of metrics.csv. Raises UserError, in one line.

    config: Config; the schedule fills in what is None.  parts: other classes (support/run.py: choose_parts).
    yours, all of them optional (support/yours.py): env, an environment or a function that makes one, in place of the
    one that config names; judge(first, second, goal) -> 0, 1 or -1, in place of the VLM; reward(images (N, S, S, 3)
    uint8) -> (N,), in place of r_psi; on_row(row), which is called with each row of metrics.csv.
    """
    config = settings.settled(config, **yours)
    if config.reward not in (*settings.FROM_PAIRS, "score"):
        return train_on_given_reward(config, parts, **yours)
    with started(config, **yours) as run:
        config, env, labeler, rng = run.config, run.env, run.labeler, np.random.default_rng(run.config.seed)
        parts, at = parts or choose_parts(config), Progress()
        pi, B = make_learner(run, parts)
        I, r_psi, D = make_reward_model(run, parts)
        begin(run, at, rng, pi=pi, B=B, I=I, r_psi=r_psi, D=D, labeler=labeler)
        share = max(0.1, config.image_buffer / config.total_steps)  # of the images that are offered to I
        obs, t, losses = new_episode(env, config.seed, at), 0, {}  # t: steps taken in this episode

        with run.steps() as steps:
            for step in steps:
                # ---- STEP 0: explore without any reward ----
                # Random actions first, then SAC on the novelty of states: good questions need images of many kinds.
                # (Not in the paper's box; its code does it, as PEBBLE did.) It ends when r_psi has been fitted once.
                at_random = step < config.seed_steps
                exploring = at_random or step < config.explore_steps or not at.has_reward
                if step == config.seed_steps:
                    normalise_observations(pi, B, env, config)
                if not at_random:
                    action = pi.act(obs)  # (A,) in [-1, 1], or an int where actions are Discrete
                elif t % config.hold == 0:  # held for `hold` steps, or small random moves would cancel out
                    action = random_action(env.action_space, rng)

                # ---- STEP 1: act, and store the transition with the image seen after it ----
                next_obs, true_reward, terminated, truncated, info = env.step(action)
                image = env.image(config.reward_image_size)  # (S, S, 3) uint8: what r_psi will see
                # trap: the reward belongs to the image *after* the action. It is set when the episode ends, in one
                # batch; until then SAC does not sample this row.
                B.add(obs, action, next_obs, terminated, image, true_reward)  # true_reward: only for --reward true
                # Only a share is offered: each image is drawn again, large, and neighbours in time look alike. An image
                # that ended its episode early is always offered: it shows the goal, or what must not happen.
                if terminated and t + 1 < config.horizon or rng.random() < share:
                    I.offer(env.image(config.vlm_image_size), image, info["progress"], rng)
                obs, t, episode_over = next_obs, t + 1, terminated or truncated

                # A query session waits for the end of an episode: then nothing is half done in B, or in a checkpoint.
                due = step + 1 >= config.explore_steps + at.sessions * config.feedback_every
                n_pairs = labeler.room(config.pairs_per_session)  # 0 where a limit is reached
                if episode_over and due and n_pairs and len(I) > 1:
                    # ---- STEP 2: pick pairs of images ----
                    model = r_psi if at.has_reward else None
                    pairs = sample_pairs(I.small[: len(I)], n_pairs, rng, config.sampler, model)  # (M, 2)

                    # ---- STEP 3: ask the VLM which image is closer to the goal ----
                    # labeler calls label_pairs (or is the oracle). L of the M pairs got a label; "unsure" is none.
                    first, second, y = labeler(I, pairs, step + 1, rng)  # (L, S, S, 3) twice, (L,) 0 or 1
                    D.add(first, second, y)
                    at.sessions += 1

                    if len(y):
                        # ---- STEP 4: fit the reward model to the answers ----
                        # -log P[y], with P[1] = sigmoid(beta (r1 - r0) + b). An eighth of D says when to stop.
                        at.fit = r_psi.fit(D, config.reward_epochs)
                        at.fit["reward_accuracy"] = order_accuracy(r_psi, I, rng)

                        # ---- STEP 5: relabel every stored transition with the new reward ----
                        # All of B, also what older reward models have rewarded: their mistakes must not stay.
                        B.relabel(r_psi.predict)
                        at.has_reward = True
                elif episode_over and at.has_reward:
                    # Between two sessions only the episode that has just ended needs rewards.
                    B.relabel(r_psi.predict, only_new=True)

                # ---- STEP 6: improve the policy with SAC on the learned reward ----
                if not exploring and not at.explored:  # once, after the first fit; see forget_novelty
                    forget_novelty(pi, B, config.batch_size)
                    at.explored = True
                # Smaller and smaller steps: what works is changed less and less.
                pi.set_learning_rate(1 - (1 - config.lr_at_end) * step / config.total_steps)
                for _ in range(0 if at_random else config.updates):
                    batch = novelty_batch(B, config.batch_size) if exploring else B.sample(config.batch_size)
                    losses = pi.update(batch)

                # ---- STEP 7: evaluate with the true reward, which the learner never sees ----
                at.step = step + 1
                if at.step % config.eval_every == 0 or at.step == config.total_steps:
                    run.log(evaluate(pi, run.eval_env, config.eval_episodes, run.seed(EVAL_SEED)), losses,
                            at.episodes + episode_over)
                run.warn(episode_over)  # a run that cannot learn says so
                if episode_over:
                    at.episodes += 1
                    run.checkpoint()  # if there was a query session or an evaluation since the last one
                    obs, t = new_episode(env, config.seed, at), 0
        return run.finish(pi.best_action, LearnedReward(r_psi.predict))


# ---- VLM-CaR, and every other reward that asks nobody while the policy learns ----
def train_on_given_reward(config, parts=None, **yours):
    """The same loop for a reward that is there already, without STEPs 2 to 5 -> the rows of metrics.csv.

    --reward code: VLM-CaR's programs; clip: CLIP; true, sparse: the environment's own.  parts, yours: see train().
    """
    with started(config, **yours) as run:
        config, env, rng = run.config, run.env, np.random.default_rng(run.config.seed)
        parts, at = parts or choose_parts(config), Progress()
        pi, B = make_learner(run, parts)
        # STEPs C1 to C3: the VLM writes a program for each sub-task, once. The other rewards need nobody.
        reward = run.reward or programs_reward(config, run.path("code_as_reward"), run.eval_env, run.labeler.vlm,
                                               run.seed(EVAL_SEED))
        programs = getattr(reward, "programs", None)
        begin(run, at, rng, pi=pi, B=B, labeler=run.labeler)
        obs, losses = new_episode(env, config.seed, at), {}
        start_image, successes = env.image(config.reward_image_size), []

        with run.steps() as steps:
            for step in steps:
                # ---- STEP 0: explore without any reward ----
                at_random = step < config.seed_steps
                exploring = at_random or step < config.explore_steps or not at.has_reward
                if step == config.seed_steps:
                    normalise_observations(pi, B, env, config)
                if not at_random:
                    action = pi.act(obs)
                elif len(successes) % config.hold == 0:
                    action = random_action(env.action_space, rng)

                # ---- STEP 1: act, and store the transition with the image seen after it ----
                next_obs, true_reward, terminated, truncated, info = env.step(action)
                image = env.image(config.reward_image_size) if reward.looks else None
                B.add(obs, action, next_obs, terminated, image, true_reward)
                successes.append(info["success"])
                obs, episode_over = next_obs, terminated or truncated

                if episode_over:  # STEP C4, in place of STEPs 2 to 5: what the episode is worth, step by step
                    rows = B.newest(B.unrewarded)
                    images = B.image[rows] if reward.looks else None  # (T, S, S, 3)
                    B.set_rewards(reward.of_episode(images, B.true_reward[rows], np.array(successes), start_image,
                                                    terminated))
                    at.has_reward = True

                # ---- STEP 6: improve the policy with SAC on the given reward ----
                if not exploring and not at.explored:
                    forget_novelty(pi, B, config.batch_size)
                    at.explored = True
                pi.set_learning_rate(1 - (1 - config.lr_at_end) * step / config.total_steps)
                for _ in range(0 if at_random else config.updates):
                    batch = novelty_batch(B, config.batch_size) if exploring else B.sample(config.batch_size)
                    losses = pi.update(batch)

                # ---- STEP 7: evaluate with the true reward ----
                at.step = step + 1
                if at.step % config.eval_every == 0 or at.step == config.total_steps:
                    run.log(evaluate(pi, run.eval_env, config.eval_episodes, run.seed(EVAL_SEED)), losses,
                            at.episodes + episode_over)
                run.warn(episode_over, programs)
                if episode_over:
                    at.episodes += 1
                    run.checkpoint()
                    obs = new_episode(env, config.seed, at)
                    start_image, successes = env.image(config.reward_image_size), []
        return run.finish(pi.best_action, reward, programs)


# ---- what both loops use ----
def new_episode(env, seed, at):
    """Begin a training episode -> obs (O,). Each has its own seed, so a resumed run need not know the one before."""
    # trap: some environments hand their seed to numpy's older generators, which take 32 bits
    return env.reset(seed=(seed * 100_000 + at.episodes) % 2**32)[0]


def normalise_observations(pi, B, env, config):
    """Let the networks see (observation - mean) / std, both over the random steps.

    Not where every entry of an observation is bounded (one-hot states, unit boxes), and not in the paper's schedule.
    """
    if config.seed_steps > 1 and config.schedule != "paper" and not env.observation_space.is_bounded():
        pi.normalise_observations(B.obs[: config.seed_steps])


def forget_novelty(pi, B, batch_size):
    """Fresh critics: what they have learned so far, if anything, is what is novel. Then let them catch up.

    The paper's box does not have this; its code does, with the same number of updates. See SAC.reset_critic for why the
    actor is kept, and why it is done only once.
    """
    pi.reset_critic()
    for _ in range(RESET_UPDATES):
        pi.update(B.sample(batch_size))


def order_accuracy(r_psi, I, rng, pairs=500):
    """Share of random pairs from I, of different true progress, that r_psi puts in the true order; only for the log."""
    drawn = sample_pairs(I.small[: len(I)], pairs, rng)  # (pairs, 2)
    reward, progress = r_psi.predict(I.small[: len(I)])[drawn], I.progress[drawn]  # (pairs, 2) each
    differ = progress[:, 0] != progress[:, 1]
    agree = (reward[:, 1] > reward[:, 0]) == (progress[:, 1] > progress[:, 0])
    return float(agree[differ].mean()) if differ.any() else float("nan")


# ---- STEP 7: evaluate with the true reward, which the learner never sees ----
def evaluate(pi, env, episodes, seed):
    """Play episodes with the policy -> dict of means over them.

    pi: has best_action(obs), its best guess; act(obs), drawn as in training; and rng, the torch.Generator of its draws.
    seed: of the first episode; the same seeds at every evaluation, and none of training.
    eval_return: sum of true rewards.  eval_success: success at the last step; eval_success_any: at any step
    (Meta-World's own convention); eval_success_frames: share of steps with success.  eval_progress: at the last step.
    All are those of the best actions. eval_success_drawn: the same starts again, with drawn actions, success at the
    last step. A large gap between the two says that the policy depends on precise actions.
    An environment that never says whether it succeeded gets no successes, in place of zeros.
    """
    rows, before = [], pi.rng.get_state()
    for episode in range(episodes):
        start = (seed + episode) % 2**32
        _, reward, progress, success = rollout(env, pi.best_action, start)  # (T,) each
        drawn = rollout(env, pi.act, start)[3]
        rows.append((reward.sum(), success[-1], success.max(), success.mean(), drawn[-1], progress[-1]))
    pi.rng.set_state(before)  # training goes on with the draws that it would have made: to look changes nothing
    names = ("eval_return", "eval_success", "eval_success_any", "eval_success_frames", "eval_success_drawn",
             "eval_progress")
    return {name: float(value) for name, value in zip(names, np.mean(rows, axis=0))
            if env.tells_success or "success" not in name}


# ---- wiring ----
def make_learner(run, parts):
    """-> pi and B, as the settings say."""
    torch.set_num_threads(1)  # layers this small gain little from a second thread: two runs at a time gain more
    config, space, obs_shape = run.config, run.env.action_space, run.env.observation_space.shape
    # The newest actor's share in the slow one, in an update: with 1 / n, that is the mean of about the last n of them.
    slow = 1 / max(1, config.average_over * config.total_steps * config.updates)
    pi = parts.SAC(obs_shape[0], space, (config.hidden,) * 2, config.sac_lr, config.discount, device=config.device,
                   seed=config.seed, slow=slow, layer_norm=bool(config.layer_norm))
    image_shape = (config.reward_image_size, config.reward_image_size, 3) if looks_at_images(config) else None
    # trap: a reward from preferences has no zero. If nothing came after an end, an end would be good where rewards are
    # negative, and bad where they are positive. So an end is worth what its image would be worth if it stayed for good:
    # r + discount r + ... = r / (1 - discount), as in arXiv 1809.02925.
    end_counts = 1 / max(1 - config.discount, 1e-3)
    B = parts.ReplayBuffer(config.total_steps, obs_shape, space.shape, image_shape, run.path("buffer"), config.seed,
                           end_counts=end_counts)
    return pi, B


def make_reward_model(run, parts):
    """-> I, r_psi and D, as the settings say."""
    config = run.config
    I = ImageBuffer(config.image_buffer, config.vlm_image_size, config.reward_image_size,
                    functools.partial(stored_array, run.path("buffer")))
    image_shape = (config.reward_image_size, config.reward_image_size, 3)
    r_psi = parts.RewardModel(image_shape, config.ensemble_size, config.reward_lr, config.device, config.seed,
                              batch=config.reward_batch, patience=config.patience, random_shift=config.random_shift,
                              random_flip=bool(config.random_flip), intercept=bool(config.intercept))
    stored = run.state["D"]["added"] if run.state else 0
    kept = len(run.labeler.kept[2]) if run.labeler.kept is not None else 0  # answers of --labels FOLDER
    return I, r_psi, parts.PreferenceDataset(max(most_pairs(config), stored, kept), image_shape)


def begin(run, at, rng, pi, **parts):
    """With --resume, everything as it was at the checkpoint; otherwise, a film and an evaluation before training."""
    if not run.begin(at, rng, pi=pi, **parts):
        run.film("eval_before.gif", pi.best_action)
        run.log(evaluate(pi, run.eval_env, run.config.eval_episodes, run.seed(EVAL_SEED)), {}, 0)


def main(arguments=None):
    """The command line -> exit code: 0, or 2 after a line for the user, or 130 after Ctrl-C."""
    try:
        arguments = sys.argv[1:] if arguments is None else arguments
        watch(arguments) or train(settings.parse_args(arguments))  # --watch FOLDER: no training
        return 0
    except (UserError, VLMError, CodeAsRewardError, BadEnvironment) as error:
        settings.say(f"train.py: {error}", file=sys.stderr)
        return 2
    except MemoryError as error:
        settings.say(f"train.py: there is too little memory for these settings ({error})", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stopped:
        settings.say(f"train.py: {stopped or 'interrupted'}", file=sys.stderr)
        return 130


if __name__ == "__main__":
    code = main()
    interrupts.hand_back()  # all is said and written: Ctrl-C from here on is an end, no error
    sys.exit(code)
