"""RL-VLM-F and VLM-CaR: a goal in words and pictures of the task go in, a trained policy comes out.

    python train.py --env CartPole                                       no key, no network, about a minute
    python train.py --env DrawerOpen --vlm openai/MODEL                  a real VLM judges the pictures
    python train.py --env Reacher-v5 --goal "..." --vlm local/MODEL --vlm-url http://localhost:11434/v1

What this is: the algorithm, STEP by STEP (RL-VLM-F, arXiv 2402.03681); the only file that wires the others together.

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

Differs from the paper:
  1. Sessions of questions, checkpoints and pricing happen where an episode ends: nothing half-done to save.
  2. Fewer steps and pairs, from tasks/schedules.py (`--schedule paper` has the paper's own).
  3. Only some pictures (at least one in ten) become candidates for a question, each but once, in a reservoir over the
     whole run, not the last 100 episodes; the reward network sees a smaller picture than the VLM.
  4. In Soccer and SweepInto the best policy so far by the learned reward is kept: see KeptPolicy. The episodes in which
     a policy is tried, one at each evaluation, are not counted as steps.

Every run leaves a folder: config.json, metrics.csv, labels.jsonl, pairs/, checkpoint/, eval_*.gif, report.html.
"""
import contextlib
import copy
import csv
import dataclasses
import json
import os
import shutil
import signal
import sys
import time
import zlib
from pathlib import Path

from support import run as run_folder

from support import settings
from support.run import (Run, UserError, closing_text, parse_args, price_of, resolve, say, status, warn, who_labels,
                 write_json)

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, run_folder.at_once)  # now: the imports from here on take a while
import numpy as np

# No training episode has these seeds (--seed below 10).
EVAL_SEED, FRESH_SEED, TRIAL_SEED = 1_000_000, 2_000_000, 3_000_000
SOLVED = 0.99  # share of evaluation steps with success at which the run's clock of "seconds until solved" stops
RESET_UPDATES = 100  # updates of the fresh critics at once, as in the paper
# Pictures that are kept of one episode, evenly spaced: in a film, and where an episode is priced.
IN_A_FILM, IN_AN_EPISODE = 100, 1000


# ---- the algorithm ----
def train(config):
    """Run the whole algorithm -> the rows of metrics.csv. What it leaves in the run folder: see the header."""
    unique = not config.out  # a folder that we name may get a number, too
    with contextlib.ExitStack() as at_the_end:
        if config.resume:
            at_the_end.enter_context(run_folder.claim(config.resume))  # first of all, and before a question is paid for
        config, env, eval_env = prepare(config)
        check_disk(config, env)
        import sac

        clip = clip_price(config)  # it and the labeler before the run folder: no CLIP here, a wrong key or an unknown
        labeler = Labeler(config)  # goal should leave nothing behind
        at_the_end.callback(labeler.close)
        run = Run(config, unique)
        if not config.resume:
            at_the_end.enter_context(run_folder.claim(run.folder))
        say(f"{config.env}: {config.goal}", f"labels from: {who_labels(config)}", f"run folder: {run.folder}")
        try:
            run_folder.GO_ON.append(f"go on with: {settings.resume_command()}")
            if signal.getsignal(signal.SIGINT) is run_folder.at_once:
                signal.signal(signal.SIGINT, run_folder.in_order)
            return learn(config, run, env, eval_env, clip, labeler)
        except KeyboardInterrupt:  # before its first step, or while it was wound up
            raise KeyboardInterrupt(str(resumable("interrupted", run))) from None
        except (sac.StoredArrayError, OSError) as error:  # OSError: the disk is full, or was taken away
            raise resumable(error, run) from None


def learn(config, run, env, eval_env, clip, labeler):
    """The algorithm itself, in a run folder that is ours alone -> the rows of metrics.csv."""
    import torch
    from tqdm import tqdm

    import code_as_reward
    from support import cuda_graph
    import envs
    import reward_model
    import sac
    from support import score_reward
    import vlm_query

    torch.set_num_threads(1)  # layers this small gain little from a second thread: two runs at a time gain more
    rng, space = np.random.default_rng(config.seed), env.action_space
    small = (config.reward_image_size, config.reward_image_size, 3)
    looks = looks_at_pictures(config)
    record = cuda_graph.Recorded if config.cuda_graph else None
    agent = sac.SAC(env.observation_space.shape[0], space, (config.hidden,) * 2, config.sac_lr, config.discount,
                    device=config.device, seed=config.seed, bfloat16=bool(config.sac_bfloat16), record=record)
    open_buffer(config, run)
    buffer = sac.ReplayBuffer(config.total_steps, env.observation_space.shape, space.shape, small if looks else None,
                              run.path("buffer"), config.seed)
    pool = Candidates(config.image_buffer, config.vlm_image_size, config.reward_image_size, run.path("buffer"))
    model = reward_model.RewardModel(small, config.ensemble_size, config.reward_lr, config.device, config.seed,
                                     batch=config.reward_batch, patience=config.patience, random_shift=config.random_shift,
                                     random_flip=bool(config.random_flip), paper=config.schedule == "paper",
                                     bfloat16=bool(config.reward_bfloat16), record=record)
    dataset, fit = reward_model.PreferenceDataset, reward_model.RewardModel.fit
    if config.reward == "score":
        dataset, fit = score_reward.ScoreDataset, score_reward.fit
    stored = run.state["data"]["added"] if run.state else 0
    # kept: the answers of --labels-from
    data = dataset(max(most_pairs(config), stored, len(labeler.kept[2])), small)
    kept = KeptPolicy(agent, config)
    parts = {"agent": agent, "buffer": buffer, "pool": pool, "model": model, "data": data, "labeler": labeler,
             "kept": kept}
    candidate_share = max(0.1, config.image_buffer / config.total_steps)  # as many as there is room for, or one in ten
    learned = labeler.compares  # otherwise an episode is priced as it ends, and no pictures are compared
    price = model if learned else clip or programs_price(config, run, eval_env, labeler)
    # priced: some rows have rewards.  explores: the critics still know nothing but novelty.
    at = {"step": 0, "episode": 0, "sessions": 0, "priced": False, "explores": True, "fit": {}, "solved": None}
    if run.state:
        load_all(run, parts, at, rng)
    else:
        write_gif(run.path("eval_before.gif"), eval_env, learned_policy(agent), config)
        run.write({"step": 0, "episodes": 0, **evaluate(agent, eval_env, config)})

    obs, _ = env.reset(seed=train_seed(config, at))
    start_image, successes, losses = env.image(config.reward_image_size), [], {}
    bar = tqdm(range(at["step"], config.total_steps), initial=at["step"], total=config.total_steps, unit="step")
    if labeler.vlm:
        labeler.vlm.waits = lambda waiting: bar.set_postfix_str(
            "waiting for the server" if waiting else status(run.rows[-1], labeler))
    try:
        for step in bar:
            # ---- STEP 0: explore without any reward ----
            if step == config.seed_steps > 1 and config.schedule != "paper" and not env.observation_space.is_bounded():
                agent.normalise_observations(buffer.obs[:step])  # bounded ones (one-hot states, unit boxes) stay
            # first random actions, then SAC on the novelty of states, for as long as no row has a reward
            exploring = step < max(config.seed_steps, config.explore_steps) or not at["priced"]
            blind = step < config.seed_steps or (exploring and config.without == "novelty")
            if not blind:
                action = agent.act(obs)
            elif len(successes) % config.hold == 0:
                action = random_action(space, rng)

            # ---- STEP 1: act, and store the transition with the image seen after it ----
            next_obs, true_reward, terminated, truncated, info = env.step(action)
            image = env.image(config.reward_image_size) if looks else None
            buffer.add(obs, action, next_obs, terminated, image, true_reward)
            successes.append(info["success"])
            if learned and rng.random() < candidate_share:  # drawn a second time, large
                pool.offer(env.image(config.vlm_image_size), image, info["progress"], rng)
            obs, done = next_obs, terminated or truncated

            due = step + 1 >= config.explore_steps + at["sessions"] * config.feedback_every
            session = done and due and labeler.may_ask() and len(pool) > 1
            if session:
                # ---- STEP 2: pick pairs of images ----
                count = min(config.pairs_per_session, config.max_pairs - labeler.counts["asked"])
                pairs = reward_model.sample_pairs(pool.small[: len(pool)], count, rng, config.sampler,
                                                  model if at["priced"] else None)  # (M, 2)

                # ---- STEP 3: ask the VLM which image is closer to the goal ----
                first, second, labels = labeler(run, pool, pairs, step + 1, rng)  # (L, S, S, 3) twice, (L,) 0 or 1
                data.add(first, second, labels)
                at["sessions"] += 1

                if len(labels):
                    # ---- STEP 4: fit the reward model to the answers ----
                    at["fit"] = fit(model, data, config.reward_epochs)
                    at["fit"]["reward_accuracy"] = order_accuracy(model, pool, rng)

                    # ---- STEP 5: relabel every stored transition with the new reward ----
                    buffer.relabel(model.predict, only_new=config.without == "relabelling")
                    at["priced"] = True
            elif done and learned:
                if at["priced"]:
                    buffer.relabel(model.predict, only_new=True)
            elif done:
                rows = buffer.newest(buffer.unrewarded)
                images = buffer.image[rows] if looks else None
                buffer.set_rewards(episode_rewards(config, price, images, buffer.true_reward[rows], np.array(successes),
                                             start_image, terminated))
                at["priced"] = True

            # ---- STEP 6: improve the policy with SAC on the learned reward ----
            if at["explores"] and not exploring:
                at["explores"] = False
                if config.without != "critic-reset":
                    forget_novelty(agent, buffer, config.batch_size)
            for _ in range(0 if blind else config.updates):
                draw = sac.novelty_batch if exploring else sac.ReplayBuffer.sample
                losses = agent.update(draw(buffer, config.batch_size))

            # ---- STEP 7: evaluate with the true reward, which the learner never sees ----
            at["step"] = step + 1
            if at["step"] % config.eval_every == 0 or at["step"] == config.total_steps:
                kept.offer(agent, eval_env, price, at["priced"])
                row = {"step": at["step"], "episodes": at["episode"] + done, **labeler.row(), **at["fit"],
                       **evaluate(kept.agent, eval_env, config), **{name: float(x) for name, x in losses.items()}}
                run.write(row)
                if at["solved"] is None and row.get("eval_success_frames", 0) >= SOLVED:
                    at["solved"] = [at["step"], run.seconds()]
            at["doubts"] = warn(config, at, labeler, pool, buffer, data, session, done)
            if done:
                at["episode"] += 1
                # trap: right after a session, for later steps overwrite candidates: a run that goes on from before it
                # could not ask about the same pictures again
                if session or at["step"] % config.eval_every < len(successes):
                    run.save(save_all(parts, at, rng))
                obs, _ = env.reset(seed=train_seed(config, at))
                start_image, successes = env.image(config.reward_image_size), []
                bar.set_postfix_str(status(run.rows[-1], labeler))
        finished = True
    except KeyboardInterrupt:
        finished = False
    except (vlm_query.VLMError, code_as_reward.CodeAsRewardError, envs.BadEnvironment) as error:
        raise resumable(error, run) from None
    finally:
        bar.close()
    say("", finish(config, run, finished, at, labeler, kept.agent, price, eval_env))
    return run.rows


def resumable(error, run):
    """What stopped the run, and how it goes on."""
    return UserError(f"{error} [nothing is lost; go on with: {settings.resume_command()}]")


def forget_novelty(agent, buffer, batch_size):
    """Fresh critics: so far they have learned what is novel, not what is wanted."""
    agent.reset_critic()
    for _ in range(RESET_UPDATES):
        agent.update(buffer.sample(batch_size))


# ---- STEPs 1 and 2: the pictures that may be asked about ----
class Candidates:
    """Pictures that may be asked about: a reservoir in which every picture offered so far is equally likely to be.

    A picture that was offered before is not offered again: a pole that lies still would soon be half of all pairs.
    large (C, P, P, 3) what the VLM will see; small (C, S, S, 3) what the reward model sees; progress (C,).
    """

    def __init__(self, capacity, vlm_image_size, reward_image_size, folder):
        import sac

        self.capacity, self.offered = capacity, 0
        self.seen = set()  # fingerprints of all pictures ever offered
        self.progress = np.zeros(capacity, np.float32)
        self.large = sac.stored_array(folder, "query", (capacity, vlm_image_size, vlm_image_size, 3), np.uint8)
        self.small = sac.stored_array(folder, "query_small", (capacity, reward_image_size, reward_image_size, 3), np.uint8)

    def __len__(self):
        return min(self.offered, self.capacity)

    def offer(self, large, small, progress, rng):
        """Algorithm R (Vitter 1985): the n-th picture replaces a random one with probability capacity / n."""
        fingerprint = zlib.crc32(small)
        if fingerprint in self.seen:
            return
        self.seen.add(fingerprint)
        slot = self.offered if self.offered < self.capacity else int(rng.integers(0, self.offered + 1))
        self.offered += 1
        if slot < self.capacity:
            self.large[slot], self.small[slot], self.progress[slot] = large, small, progress

    def state_dict(self):
        for pictures in (self.large, self.small):
            if isinstance(pictures, np.memmap):
                pictures.flush()  # a checkpoint is of use after a power failure only with what it counts on
        return {"offered": self.offered, "progress": self.progress.tolist(), "seen": list(self.seen)}

    def load_state_dict(self, state):
        self.offered, self.progress[:], self.seen = state["offered"], state["progress"], set(state["seen"])


# ---- STEP 3: ask the VLM which image is closer to the goal ----
class Labeler:
    """Whoever compares the pictures: a VLM over HTTP, the stand-in likewise, or the oracle. Keeps the books of it.

    counts: asked, labels, unsure, unreadable, no_answer, identical, and `right` of `judged` labels by true progress.
    """

    COUNTS = ("asked", "labels", "unsure", "unreadable", "no_answer", "identical", "right", "judged")

    def __init__(self, config):
        import vlm_query

        self.config, self.server, self.vlm = config, None, None
        self.counts = dict.fromkeys(self.COUNTS, 0)
        self.exhausted = False  # a limit on calls or money was reached: go on with the reward there is
        self.programs = None  # VLM-CaR's ProgramReward, once there is one
        self.kept = [], [], []  # first, second, label of --labels-from
        if config.labels_from:
            from support import cached_labels

            try:
                *self.kept, source = cached_labels.read_labels(config.labels_from, config.reward_image_size)
                print(f"{len(self.kept[2])} labels from {source}")
            except cached_labels.CachedLabelsError as error:
                raise UserError(f"--labels-from {error}") from None
        self.compares = config.reward in ("preference", "score")  # or, for score: judges one by one
        compares_by_vlm = self.compares and config.labels == "vlm" and not config.labels_from
        if not compares_by_vlm and not (config.reward == "code" and not config.programs):
            return
        name, url = config.vlm, config.vlm_url
        if name == "offline":
            from support import offline_vlm

            if config.goal not in offline_vlm.READERS:
                raise UserError(f'the offline stand-in is not a VLM and knows only these goals: '
                                f'{"; ".join(offline_vlm.READERS)}. For "{config.goal}" name a real one with --vlm')
            self.server = offline_vlm.OfflineVLM(mistakes=config.vlm_mistakes, unsure=config.vlm_unsure,
                                                 latency=config.vlm_latency, seed=config.seed)
            name, url = f"offline/{self.server.model}", self.server.start()
        # One cache for all runs beside each other: a question that was paid for once is never paid for again.
        cache = os.path.join(os.path.dirname(os.path.abspath(config.out)), "vlm_cache")
        self.vlm = vlm_query.VLM(name, url=url, cache=cache, workers=config.workers, max_calls=config.max_calls,
                                 extra=json.loads(config.vlm_extra), max_usd=config.max_usd,
                                 usd_per_mtok=price_of(config), timeout=(10, config.timeout),
                                 deadline=max(300, 2.5 * config.timeout))  # time for a second try, and a third
        self.vlm.check_sight()

    def __call__(self, run, pool, pairs, step, rng):
        """STEP 3 for M pairs (M, 2) of candidates -> first, second (L, S, S, 3), label (L,): those that got a label.

        Every pair, labelled or not, is in the run's log. With --labels-from, the kept answers all come at once.
        """
        import imageio
        import vlm_query

        if self.config.reward == "score":
            rows = list(dict.fromkeys(pairs.T.ravel().tolist()))[:len(pairs)]  # no picture twice
            return self.score(run, pool, np.array(rows), step)
        if self.config.labels_from:
            self.exhausted = True
            self.counts.update(asked=len(self.kept[2]), labels=len(self.kept[2]))
            return self.kept
        before, after = pool.progress[pairs[:, 0]], pool.progress[pairs[:, 1]]  # (M,) true progress, for the books
        true_labels = vlm_query.oracle_labels(before, after, rng)
        first, second = pool.large[pairs[:, 0]], pool.large[pairs[:, 1]]  # (M, P, P, 3)
        start = run.logged

        def log(record):
            pair = record.pop("pair")
            index = start + pair
            imageio.imwrite(run.path("pairs", f"{index:06d}.png"), np.hstack([first[pair], second[pair]]))
            run.labels.append({"index": index, "step": step, **record, "true_label": int(true_labels[pair]),
                               "progress": [float(before[pair]), float(after[pair])]})
            run.logged += 1

        if self.vlm is None:
            labels = vlm_query.oracle_labels(before, after, rng, self.config.vlm_mistakes)
            for pair, label in enumerate(labels):
                log({"pair": pair, "label": int(label), "kind": "label" if label >= 0 else "unsure", "answers": []})
            counts = {"asked": len(labels), "unsure": int((labels == -1).sum())}
        else:
            labels, counts = vlm_query.label_pairs(self.vlm.ask, first, second, self.config.goal, self.config.stages,
                                                   self.config.workers, log)
            self.exhausted = counts.get("limit", 0) > 0
        for name in ("asked", "unsure", "unreadable", "no_answer", "identical"):
            self.counts[name] += counts.get(name, 0)
        judged = (labels >= 0) & (true_labels >= 0)
        self.counts["labels"] += int((labels >= 0).sum())
        self.counts["judged"] += int(judged.sum())
        self.counts["right"] += int((labels == true_labels)[judged].sum())
        usable = labels >= 0
        return pool.small[pairs[usable, 0]], pool.small[pairs[usable, 1]], labels[usable]

    def score(self, run, pool, rows, step):
        """The VLM Score baseline: M candidates, one by one -> images (L, S, S, 3), None, scores (L,) in [0, 1]."""
        import imageio
        import vlm_query

        images, progress, start = pool.large[rows], pool.progress[rows], run.logged

        def log(record):
            number = record.pop("image")
            imageio.imwrite(run.path("pairs", f"{start + number:06d}.png"), images[number])
            run.labels.append({"index": start + number, "step": step, **record, "progress": [float(progress[number])]})
            run.logged += 1

        scores, counts = vlm_query.score_images(self.vlm.ask, images, self.config.goal, self.config.stages,
                                                self.config.workers, log)
        self.exhausted = counts.get("limit", 0) > 0
        for name in ("asked", "unreadable", "no_answer"):
            self.counts[name] += counts[name]
        known = np.isfinite(scores)
        self.counts["labels"] += int(known.sum())
        # right: the share of neighbours in this batch whose scores are in the true order
        apart, truth = np.diff(scores[known]), np.diff(progress[known])  # (L - 1,) each
        self.counts["judged"] += int((apart * truth != 0).sum())
        self.counts["right"] += int((apart * truth > 0).sum())
        return pool.small[rows[known]], None, scores[known]

    def accuracy(self):
        return self.counts["right"] / self.counts["judged"] if self.counts["judged"] else float("nan")

    def usd(self):
        return self.vlm.usd if self.vlm else None

    def may_ask(self):
        return self.compares and not self.exhausted and self.counts["asked"] < self.config.max_pairs

    def row(self):
        """What metrics.csv says about the labels so far."""
        names = {"pairs_asked": "asked", **{name: name for name in self.COUNTS[1:6]}}
        return {**{column: self.counts[name] for column, name in names.items()}, "label_accuracy": self.accuracy()}

    def state_dict(self):
        return {"counts": dict(self.counts), "exhausted": self.exhausted, "vlm": self.vlm and self.vlm.state_dict()}

    def load_state_dict(self, state):
        self.counts = state["counts"]
        if self.vlm:
            self.vlm.load_state_dict(state["vlm"])
        # a limit may have been raised since
        self.exhausted = state["exhausted"] and not (self.vlm and self.vlm.room(self.config.stages))

    def close(self):
        if self.server:
            self.server.stop()


# ---- STEP 7: evaluate with the true reward, which the learner never sees ----
def evaluate(agent, env, config):
    """Run the learned policy -> dict of means over episodes that are the same at every evaluation.

    An environment that never says whether it succeeded gets no successes, in place of zeros.
    """
    act, rows = learned_policy(agent), []
    for episode in range(config.eval_episodes):
        _, reward, progress, success = run_episode(env, act, other_seed(EVAL_SEED, config, episode))
        rows.append((reward.sum(), success[-1], success.max(), success.mean(), progress[-1]))
    names = ("eval_return", "eval_success", "eval_success_any", "eval_success_frames", "eval_progress")
    return {name: float(value) for name, value in zip(names, np.mean(rows, axis=0))
            if env.tells_success or "success" not in name}


class KeptPolicy:
    """Whom STEP 7 evaluates: the newest policy or, with keep_best, the best so far by the reward that is learned from.

    SAC finds a good policy and loses it again. Each is tried on keep_best episodes, and the kept one's pictures are
    priced again by every new reward (checkpoints of TD7, 2306.02451). The environment's own words count only as far as
    they are what is learned from: with --reward true, sparse and, beside the programs, code.
    """

    def __init__(self, agent, config):
        self.agent, self.config = agent, config
        self.trials = []  # of the kept policy: the arguments of episode_rewards(), for each episode

    def offer(self, agent, env, price, priced):
        """Try the agent's policy; keep a copy if it is worth no less than the kept one, or nothing is priced yet."""
        if not self.config.keep_best:
            return
        trials = [self.trial(agent, env, other_seed(TRIAL_SEED, self.config, n))
                  for n in range(self.config.keep_best)]
        if not (priced and self.trials) or self.worth(trials, price) >= self.worth(self.trials, price):
            self.trials = trials
            self.keep(agent)

    def keep(self, agent):
        # a shallow copy will do: acting needs the actor, copied here, and center and spread, which are never written to
        self.agent = copy.copy(agent)
        self.agent.actor = copy.deepcopy(agent.actor)

    def trial(self, agent, env, seed):
        """One episode of the policy, as episode_rewards() wants it: images (T, S, S, 3) and the rest. Of a long one
        only some of the pictures, (K, S, S, 3); of a reward that looks at none, none."""
        size = self.config.reward_image_size
        start_image = start_picture(env, seed, size)
        looks = size if looks_at_pictures(self.config) else None
        images, true_rewards, _, successes = run_episode(env, learned_policy(agent), seed, looks, IN_AN_EPISODE)
        images = np.zeros((len(true_rewards), 0), np.uint8) if images is None else images
        return images, true_rewards, successes, start_image, len(true_rewards) < env.horizon

    def worth(self, trials, price):
        """Mean return of the trials, by the reward as it is now."""
        returns = []
        for images, true_rewards, successes, *rest in trials:
            every = apart(len(images), len(true_rewards))  # 1, but in long episodes
            successes = np.append(successes[::every][:-1], successes[-1])  # how it ended is what counts
            rewards = episode_rewards(self.config, price, images, true_rewards[::every], successes, *rest)
            # each picture stands for all steps up to the next one
            returns.append(np.append(np.repeat(rewards[:-1], every), rewards[-1]).sum())
        return np.mean(returns)

    def state_dict(self):
        import torch

        # trap: the agent may since have changed its unit of observations
        return {"actor": self.agent.actor.state_dict(), "center": self.agent.center, "spread": self.agent.spread,
                "trials": [[torch.as_tensor(part) for part in trial] for trial in self.trials]}

    def load_state_dict(self, state):
        if state["trials"]:
            self.trials = [[part.numpy() for part in trial] for trial in state["trials"]]
            self.keep(self.agent)
            self.agent.actor.load_state_dict(state["actor"])
            self.agent.center, self.agent.spread = state["center"], state["spread"]


def learned_policy(agent):
    """obs -> the action that the policy holds best; where actions are Discrete, one drawn from it."""
    # trap: the likeliest of discrete actions, each time, turns left and right for ever where two are nearly equal.
    # (So they are drawn as in training, sac.RANDOM_SHARE of them uniformly, and from the same generator.)
    return lambda obs: agent.act(obs, explore=agent.discrete)


def start_picture(env, seed, size):
    """What an episode with this seed starts from: (size, size, 3) uint8."""
    env.reset(seed=seed)
    return env.image(size)


def run_episode(env, act, seed, size=None, most=None):
    """One episode -> images (K, size, size, 3) if a size is given, true reward (T,), progress (T,), success (T,).

    K is T or, with most (an even number), as few as every 2nd, 4th, 8th ... picture, so that there are no more of them.
    """
    obs, _ = env.reset(seed=seed)
    images, rows, done, every = [], [], False, 1
    while not done:
        obs, reward, terminated, truncated, info = env.step(act(obs))
        # trap: nobody knows how long the episode will be, and 100,000 pictures fill the memory: whenever there are too
        # many, every second one is let go
        if size and len(images) == most and len(rows) % every == 0:
            images, every = images[::2], 2 * every
        if size and len(rows) % every == 0:
            images.append(env.image(size))
        rows.append((reward, info["progress"], info["success"]))
        done = terminated or truncated
    return (np.stack(images) if size else None, *np.array(rows).T)


def apart(kept, steps):
    """Which of run_episode()'s pictures were kept of an episode of so many steps: every 1st, 2nd, 4th, 8th ..."""
    return 1 << (-(-steps // kept) - 1).bit_length()


def write_gif(path, env, act, config):
    """The first evaluation episode, as the VLM would see it, in at most 100 pictures and about four seconds."""
    import imageio

    images = run_episode(env, act, other_seed(EVAL_SEED, config), config.vlm_image_size, IN_A_FILM)[0]
    imageio.mimsave(path, list(images), duration=4000 / max(len(images), 4), loop=0)


def random_action(space, rng):
    """Uniform over a Box -> (A,) float32 in [-1, 1], or over a Discrete space -> int."""
    return int(rng.integers(space.n)) if hasattr(space, "n") else rng.uniform(-1, 1, space.shape).astype(np.float32)


# ---- rewards that need no answers ----
def clip_price(config):
    """With --reward clip: the ClipReward that prices every picture. Otherwise None."""
    if config.reward != "clip":
        return None
    from support import clip_reward

    try:
        return clip_reward.ClipReward(config.clip_goal or config.goal, config.clip_baseline, config.clip_alpha,
                                      config.clip_model, config.device)
    except (clip_reward.ClipError, ValueError) as error:
        raise UserError(f"--reward clip: {error}") from None


# ---- STEPs C1 to C4 (VLM-CaR, in place of STEPs 2 to 5) ----
def programs_price(config, run, env, labeler):
    """With --reward code: the verified programs. Otherwise None, and the environment's own reward is paid."""
    if config.reward != "code":
        return None
    import code_as_reward
    import vlm_query

    try:
        return learn_programs(config, run, env, labeler)  # STEPs C1 to C3
    except (UserError, vlm_query.VLMError, code_as_reward.CodeAsRewardError) as error:
        raise resumable(error, run) from None


def read_programs(folder):
    """code_as_reward.load_programs(), of files that are ordinary and small: the folder may be a stranger's."""
    from support import cached_labels
    import code_as_reward

    paths = [*Path(folder).glob("programs/[1-9]_*.py"), *Path(folder).glob("[1-9]_*.py")]
    if len(paths) > 100:
        raise UserError(f"{folder}: {len(paths)} programs are too many (at most 100)")
    try:
        for path in paths:
            cached_labels.read_plain(path, 10**6)
    except (OSError, cached_labels.CachedLabelsError) as error:
        raise UserError(f"a program cannot be read: {error}") from None
    return code_as_reward.load_programs(folder)


def learn_programs(config, run, env, labeler):
    """Ask the VLM for sub-tasks and programs and verify them -> ProgramReward. With --programs, nobody is asked."""
    import code_as_reward
    import envs
    import imageio

    folder = run.path("code_as_reward")
    if config.programs or os.path.exists(os.path.join(folder, "programs", "complete")):  # the latter: a resumed run
        programs = read_programs(config.programs or folder)
    else:
        expert = envs.expert(env)
        start_image = start_picture(env, other_seed(EVAL_SEED, config), config.vlm_image_size)
        goal_image = run_episode(env, expert, other_seed(EVAL_SEED, config), config.vlm_image_size)[0][-1]
        episodes = code_as_reward.collect_episodes(env, expert, config.reward_image_size, seed=FRESH_SEED)
        other = envs.make("CartPole" if config.env != "CartPole" else "DoorKey-5x5")
        others = [run_episode(other, envs.expert(other), seed, config.reward_image_size)[0] for seed in range(3)]

        def ask(parts):
            reply = labeler.vlm.ask(parts)
            if reply.end != "complete":
                labeler.vlm.forget(parts)
                raise UserError(f"{labeler.vlm.name} wrote no program: {reply.end}")
            return reply

        try:
            programs, reports = code_as_reward.learn_programs(
                ask, start_image, goal_image, config.goal, episodes["expert_episodes"],
                episodes["random_episodes"], others, episodes["success"], config.rounds,
                go_on=config.unverified == "skip", folder=folder, save_picture=imageio.imwrite)
        except code_as_reward.CodeAsRewardError as error:
            # trap: a run that goes on would read the same answers from the cache, and fail as before; what passed stays
            for parts in error.questions:
                labeler.vlm.forget(parts)
            raise
        say(*code_as_reward.verification_table(reports).split("\n"))
    labeler.programs = programs
    return programs


def looks_at_pictures(config):
    """Does the reward come from pictures? Otherwise none are drawn while training."""
    return config.reward not in ("true", "sparse")


def episode_rewards(config, price, images, true_rewards, successes, start_image, terminated):
    """Rewards of an episode that has ended, from its images (T, S, S, 3) or what the environment said (T,) -> (T,)."""
    if config.reward == "true":
        return true_rewards
    if config.reward == "sparse":
        return successes
    rewards = seen_rewards(config, price, images, start_image, terminated and not successes[-1])
    return rewards + successes if config.reward == "code" else rewards


def seen_rewards(config, price, images, start_image, failed=False):
    """What the pictures of one episode, (T, S, S, 3), are worth -> (T,); nan for the environment's own rewards."""
    if price is None:
        return np.full(len(images), np.nan)
    if config.reward == "code":  # STEP C4: Phi - 1 of every picture, counted from the first
        return price.episode_rewards(images, start_image, failed, config.discount,
                                     config.potential == "difference", config.horizon)
    return price.predict(images)


def order_accuracy(model, pool, rng, pairs=500):
    """Share of random candidate pairs, of different true progress, that the reward model puts in the true order."""
    import reward_model

    drawn = reward_model.sample_pairs(pool.small[: len(pool)], pairs, rng)  # (P, 2)
    reward, progress = model.predict(pool.small[: len(pool)])[drawn], pool.progress[drawn]  # (P, 2) each
    differ = progress[:, 0] != progress[:, 1]
    agree = (reward[:, 1] > reward[:, 0]) == (progress[:, 1] > progress[:, 0])
    return float(agree[differ].mean()) if differ.any() else float("nan")


def save_all(parts, at, rng):
    return {**{name: part.state_dict() for name, part in parts.items()}, "at": dict(at),
            "rng": rng.bit_generator.state}


def load_all(run, parts, at, rng):
    """Everything as it was at the checkpoint; UserError where the checkpoint is not of this version and this run."""
    try:
        for name, part in parts.items():
            part.load_state_dict(run.state[name])
        at.update(run.state["at"])
        rng.bit_generator.state = run.state["rng"]
        parts["labeler"].row()
        counts = [at["step"], at["episode"], at["sessions"], len(parts["pool"])]
        if min(counts) < 0 or any(type(count) is not int for count in counts) or at["step"] != parts["buffer"].added:
            raise ValueError(f"it is at step {at['step']} with {parts['buffer'].added} rows stored")
    except Exception as error:  # a file from elsewhere may raise anything
        raise UserError(run_folder.unusable(run.folder, error)) from None


# trap: some environments hand their seed to numpy's older generators, which take 32 bits
def train_seed(config, at):
    """Every episode is reset with a seed of its own: where a run resumes, nothing before that matters."""
    return (config.seed * 100_000 + at["episode"]) % 2**32


def other_seed(first, config, number=0):
    """The seed of an episode that is not trained on: first is EVAL_SEED, FRESH_SEED or TRIAL_SEED."""
    return (first + 1000 * config.seed + number) % 2**32


# ---- the part of the run folder that only a resumed run needs ----
def buffer_files(config):
    """The files in buffer/ that this run has: names without .npy."""
    return ["obs", "next_obs", "action", "query", "query_small"] + ["image"] * looks_at_pictures(config)


def open_buffer(config, run):
    """Before arrays are mapped into buffer/: with a checkpoint all must be there, without one none is of use."""
    folder = run.path("buffer")
    if run.state:
        for name in buffer_files(config):
            if not os.path.exists(os.path.join(folder, name + ".npy")):
                raise UserError(f"--resume {run.folder}: {name}.npy is missing in its buffer/; put it back, or begin "
                                "anew: answers that were paid for are in the vlm_cache beside the run")
    elif not os.path.islink(folder):
        shutil.rmtree(folder, ignore_errors=True)  # a kill may have left half a file


def remove_buffer(config, run):
    """Gigabytes that only an unfinished run needs. Behind a link, only what is surely ours goes."""
    folder = run.path("buffer")
    if not os.path.islink(folder):
        return shutil.rmtree(folder)
    for name in buffer_files(config):
        os.remove(os.path.join(folder, name + ".npy"))
    os.remove(folder)


def most_pairs(config):
    """So many pairs the schedule can ask at most: with --max-pairs 1e9, memory is not needed for a billion."""
    sessions = max(0, config.total_steps - config.explore_steps) // config.feedback_every + 1
    return min(config.max_pairs, sessions * config.pairs_per_session)


# ---- before and after ----
def prepare(config):
    """Settle every setting before anything is made -> (config, training environment, evaluation environment)."""
    import envs

    config = resolve(config)
    try:
        env, eval_env = (envs.make(config.env, config.seed, config.goal, config.horizon, config.action_repeat)
                         for _ in range(2))
        eval_env.reset(seed=config.seed)
        eval_env.image(config.reward_image_size)  # now, not later, if there is no OpenGL
        # and a step: nothing is left behind by an environment that cannot be used. (The action is drawn from a
        # generator of its own, and every episode is reset with its seed: the run does not notice.)
        eval_env.step(random_action(eval_env.action_space, np.random.default_rng(config.seed)))
        eval_env.image(config.vlm_image_size)
        if config.reward == "code" and not config.programs:
            envs.expert(env)  # programs are verified on its episodes
    except ValueError as error:
        raise UserError(str(error)) from None
    if config.programs:
        import code_as_reward

        read_programs(config.programs).close()  # a wrong folder should leave nothing behind
    who = "offline_stand-in" if config.vlm.startswith("offline") else config.vlm.replace("/", "_")
    who = "kept" if config.labels_from or config.programs else "oracle" if config.labels == "oracle" else who
    kind = f"{config.reward}-{who}" if config.reward in ("preference", "score", "code") else config.reward
    name = f"{config.env}-{kind}-seed{config.seed}-{time.strftime('%Y%m%d-%H%M%S')}"
    out = config.resume or config.out or os.path.join("runs", name.replace(":", "_").replace("/", "_"))
    if not config.resume:  # tried before anything is paid for, and made for good when there is something to put in
        out = run_folder.make_folder(out, unique=not config.out)
        os.rmdir(out)
    return dataclasses.replace(config, goal=env.goal, horizon=env.horizon, out=out), env, eval_env


def check_disk(config, env):
    """Room for every step, candidate and pair?  UserError if not."""
    place = os.path.abspath(os.path.join(config.out, "buffer"))
    # a resumed run has some of it already
    there = sum(path.stat().st_blocks * 512 for path in Path(place).glob("*.npy")) if config.resume else 0
    while not os.path.exists(place):
        place = os.path.dirname(place)
    # of every step two observations and an action, each number of four bytes (of a Discrete action eight)
    numbers = 2 * env.observation_space.shape[0] + max(2, *env.action_space.shape, 0)
    needed = 4 * numbers * config.total_steps
    if looks_at_pictures(config):
        # of every step the small picture; of every candidate for a question both
        pixels = (config.total_steps + config.image_buffer) * config.reward_image_size**2
        needed += 3 * (pixels + config.image_buffer * config.vlm_image_size**2)
    if config.reward in ("preference", "score") and not config.labels_from:
        needed += most_pairs(config) * 2 * config.vlm_image_size**2  # of every pair a PNG, about a third of its six bytes
    free = shutil.disk_usage(place).free + there
    if needed > free:  # trap: the file is sparse at first; a disk that fills up later kills the run without a word
        raise UserError(f"the {config.total_steps:,} steps and {config.image_buffer:,} candidates need "
                        f"{needed / 2**30:,.1f} GiB of disk for observations and pictures, and {free / 2**30:,.1f} are "
                        "free: fewer --total-steps or --image-buffer, or a smaller --reward-image-size")


def finish(config, run, finished, at, labeler, agent, price, env):
    """Watch the policy once more, write summary.json and the report -> the closing paragraph."""
    from support import report

    write_gif(run.path("eval_after.gif"), env, learned_policy(agent), config)
    spearman = write_episodes(run.path("episodes.csv"), env, learned_policy(agent), price, config)
    text = closing_text(config, run, finished, at, labeler, spearman)
    third = [row["eval_success"] for row in run.rows if "eval_success" in row and 3 * row["step"] > 2 * at["step"]]
    solved = at["solved"] or [None, None]
    vlm = {key: labeler.vlm and getattr(labeler.vlm, key) for key in ("calls", "tokens_in", "tokens_out", "usd")}
    write_json(run.path("summary.json"), {
        "text": text, "finished": finished, "labeler": who_labels(config), "steps": at["step"],
        "seconds": run.seconds(), "solved_step": solved[0], "seconds_until_solved": solved[1], "spearman": spearman,
        "label_accuracy": labeler.accuracy(), **labeler.counts, **vlm,
        "success_last_third": sum(third) / len(third) if third else None,
        **{key: value for key, value in run.rows[-1].items() if key.startswith("eval_")}})
    report.write_report(run.folder)
    if finished:
        remove_buffer(config, run)
    return text


def write_episodes(path, env, policy, price, config, random_episodes=5):
    """Learned reward, true progress, true reward at each step -> episodes.csv; the rank correlation of learned and true
    reward on random episodes. (Of --reward code: the programs' part, without what success adds.)

    For the correlation each different picture counts once: half of CartPole's random steps lie still at the clamp.
    It is nan where one of the two never differs. Of more than IN_AN_EPISODE steps, as many are written, evenly spaced.
    """
    from scipy.stats import spearmanr

    import envs

    rng, seen = np.random.default_rng(FRESH_SEED + config.seed), {}  # seen: picture -> (learned, true reward)
    episodes = [("random", lambda obs: random_action(env.action_space, rng))] * random_episodes
    episodes += [("after", policy)]
    try:
        episodes += [("expert", envs.expert(env))]
    except ValueError:
        pass  # a foreign environment has no scripted expert
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("kind", "episode", "t", "learned_reward", "progress", "true_reward"))
        for number, (kind, act) in enumerate(episodes):
            seed = other_seed(FRESH_SEED, config, number)
            start_image = start_picture(env, seed, config.reward_image_size)
            images, rewards, progress, _ = run_episode(env, act, seed, config.reward_image_size, IN_AN_EPISODE)
            learned = seen_rewards(config, price, images, start_image)
            every = apart(len(images), len(rewards))
            rewards, progress = rewards[::every], progress[::every]
            for t, values in enumerate(zip(learned, progress, rewards)):
                writer.writerow((kind, number, every * t, *(f"{value:.6g}" for value in values)))
            if kind == "random":
                seen.update({hash(image.tobytes()): pair for image, pair in zip(images, zip(learned, rewards))})
    differ = price and all(len(set(values)) > 1 for values in zip(*seen.values()))
    return float(spearmanr(*zip(*seen.values())).statistic) if differ else float("nan")


def main(arguments=None):
    try:
        config = parse_args(sys.argv[1:] if arguments is None else arguments)
        import code_as_reward  # after --help has been answered: these take a while
        import envs
        import vlm_query
    except UserError as error:
        say(f"train.py: {error}", file=sys.stderr)
        return 2
    try:
        train(config)
    except (UserError, vlm_query.VLMError, code_as_reward.CodeAsRewardError, envs.BadEnvironment) as error:
        say(f"train.py: {error}", file=sys.stderr)
        return 2
    except MemoryError as error:
        say(f"train.py: there is too little memory for these settings ({error})", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stopped:
        say(f"train.py: {stopped or 'interrupted'}", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    code = main()
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # all is said and written: Ctrl-C from here on is an end, no error
    sys.exit(code)
