"""What the six core files claim, each claim a test: no key, no network beyond loopback, no GPU, under a minute.

    python -m pytest -q test_components.py

Read it beside the files, one section per file. The name of a test is the claim, its docstring says how it is shown.
Helpers stand before the first test that uses them. All else that is tested (what servers do wrong, kills and resume,
other tasks, reports, command lines) is in tests/.
"""
import concurrent.futures
import inspect
import json
import math
import os
import pathlib
import re
import time
import types
from pathlib import Path

import gymnasium
import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

import envs
from support import offline_vlm
from support import report
import reward_model
from support import run
from support import settings
import sac
import train
import vlm_query
from code_as_reward import (
    CodeAsRewardError, Program, ProgramError, ProgramReward, describe_subtasks, extract_code, learn_programs,
    load_programs, potential, stages, verify
)
from support.offline_vlm import OfflineVLM
from vlm_query import LabelLog, LimitReached, Reply, VLM, VLMError, label_pairs, parse_label

torch.set_num_threads(1)  # the networks are small: threads would only get into each other's way
ROOT = Path(__file__).resolve().parent


# ---- sac.py: a buffer whose rewards can be written again, novelty, SAC (STEPs 0, 1, 5 and 6) ----
def filled_buffer(capacity, adds, image_shape=None, rewarded=True):
    """A buffer in which row contents say when they were added: obs = reward = number of the add."""
    buffer = sac.ReplayBuffer(capacity, (1,), (1,), image_shape)
    for number in range(adds):
        image = None if image_shape is None else np.full(image_shape, number % 256, np.uint8)
        buffer.add([number], [0.0], [number + 1], False, image, float(number))
        if rewarded:
            buffer.set_rewards([float(number)])
    return buffer


def test_ring_wraps():
    """After 7 adds to 5 rows, the rows must hold the newest five, and `newest` must walk across the seam."""
    buffer = filled_buffer(5, 7)
    assert sorted(buffer.obs[:, 0]) == [2, 3, 4, 5, 6]
    assert list(buffer.obs[buffer.newest(3), 0]) == [4, 5, 6]


@pytest.mark.parametrize("adds", [3, 5, 8, 10, 13])
def test_relabel_covers_every_row_also_after_the_wrap(adds):
    """Every stored row must get the new reward, wherever the cursor of the ring stands."""
    buffer = filled_buffer(5, adds, image_shape=(2, 2, 3))
    rows = buffer.relabel(lambda images: 1000 + images[:, 0, 0, 0].astype(np.float32), chunk=2)
    assert rows == len(buffer) == min(adds, 5)
    assert sorted(buffer.reward[:rows]) == [1000 + n for n in range(adds)][-5:]


def test_unrewarded_rows_are_never_sampled():
    """Rows without a reward must not be drawn; all others must be; and set_rewards makes the rest available."""
    buffer = filled_buffer(8, 6, image_shape=(1, 1, 3))
    for number in (6, 7, 8):  # the last of these overwrites the oldest row
        buffer.add([number], [0.0], [0.0], False, np.full((1, 1, 3), number, np.uint8), 0.0)
    assert set(buffer.sample(500)["obs"][:, 0].tolist()) == {1, 2, 3, 4, 5}
    assert set(buffer.sample(500, unrewarded_too=True)["obs"][:, 0].tolist()) == set(range(1, 9))
    assert buffer.relabel(lambda images: images[:, 0, 0, 0].astype(np.float32), only_new=True) == 3
    drawn = buffer.sample(500)
    assert set(drawn["obs"][:, 0].tolist()) == set(range(1, 9)) and torch.equal(drawn["reward"], drawn["obs"][:, 0])


def test_sampling_nothing_says_so():
    """A buffer without a rewarded row must raise, not loop or return NaN."""
    with pytest.raises(ValueError, match="nothing to sample: 2 rows stored, 2 of them without a reward"):
        filled_buffer(4, 2, rewarded=False).sample(1)


def test_novelty_is_the_distance_to_the_kth_nearest():
    """Obs 0 against 1, 2, 5 must give 1, 2, 5 for k = 1, 2, 3; and a far state more than a near one."""
    stored = torch.tensor([[1.0], [2.0], [5.0]])
    assert [float(sac.novelty_bonus(torch.zeros(1, 1), stored, k)) for k in (1, 2, 3)] == [1, 2, 5]
    assert [float(sac.novelty_bonus(torch.zeros(1, 1), stored, 9))] == [5]


def test_novelty_does_not_depend_on_units():
    """Metres or millimetres in one dimension of the state must give the same bonus."""
    bonus = []
    for unit in (1.0, 1000.0):
        buffer, rng = sac.ReplayBuffer(50, (2,), (1,), seed=3), np.random.default_rng(0)
        for x in rng.normal(size=(50, 2)):
            buffer.add(x, [0.0], x * [unit, 1.0], False, None, 0.0)
        bonus.append(sac.novelty_batch(buffer, 20)["reward"])
    assert torch.allclose(*bonus, rtol=1e-3) and float(bonus[0].mean()) == pytest.approx(1.0, rel=1e-3)
    # each stored state counts once: drawn twice, a state would be its own second to fifth neighbour too
    assert float(bonus[0].min()) > 0


def test_tanh_gaussian_log_prob_equals_torch_distributions():
    """The log-density of the squashed Gaussian must be the one torch.distributions computes."""
    torch.manual_seed(0)
    mean, log_std, noise = torch.randn(64, 3), torch.randn(64, 3) * 0.3, torch.randn(64, 3)
    action, log_prob = sac.tanh_gaussian(mean, log_std, noise)
    normal = torch.distributions.Normal(mean.double(), log_std.double().exp())
    squashed = torch.distributions.TransformedDistribution(normal, torch.distributions.TanhTransform())
    u = mean.double() + log_std.double().exp() * noise.double()
    expected = (normal.log_prob(u) - torch.distributions.TanhTransform().log_abs_det_jacobian(u, torch.tanh(u))).sum(-1)
    assert torch.allclose(log_prob.double(), expected, atol=1e-4)
    inside = action.double().abs().max(-1).values < 0.999  # the inverse of tanh loses its digits beyond
    assert torch.allclose(squashed.log_prob(action.double()).sum(-1)[inside], expected[inside], atol=1e-2)


def test_log_prob_stays_finite_far_out():
    """At |u| = 30, where 1 - tanh^2 is 0 in float32, the log-density must still be finite."""
    _, log_prob = sac.tanh_gaussian(torch.full((1, 1), 30.0), torch.zeros(1, 1), torch.zeros(1, 1))
    assert torch.isfinite(log_prob).all()


def box(n):
    return gymnasium.spaces.Box(-1.0, 1.0, (n,), np.float32)


class FivesEverywhere(torch.nn.Module):
    """A target critic that values everything at 5 and cannot be moved."""

    def forward(self, obs, action=None):
        return torch.full((2, len(obs)), 5.0)


@pytest.mark.parametrize("terminated, expected", [(1.0, 2.0), (0.0, 2.0 + 0.9 * 5.0)])
def test_only_termination_stops_the_bootstrap(terminated, expected):
    """The critics' target must be r when terminated, and r + discount * V' when merely cut off by a time limit."""
    agent = sac.SAC(1, box(1), hidden=(8,), lr=3e-2, discount=0.9)
    agent.log_alpha.data.fill_(-100.0)  # no entropy term
    agent._value = lambda critic, obs, policy, real=agent._value: real(
        FivesEverywhere() if critic is agent.target else critic, obs, policy)
    batch = {"obs": torch.zeros(32, 1), "action": torch.zeros(32, 1), "reward": torch.full((32,), 2.0),
             "next_obs": torch.zeros(32, 1), "terminated": torch.full((32,), terminated)}
    for _ in range(150):
        q = agent.update(batch)["q_mean"]
    assert float(q) == pytest.approx(expected, abs=0.1)


def filled_batch(size, seed=0):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    return {"obs": draw(size, 2), "action": draw(size, 1).tanh(), "reward": draw(size), "next_obs": draw(size, 2),
            "terminated": torch.zeros(size)}


@pytest.mark.parametrize("reset", [False, True])
def test_target_follows_by_tau(reset):
    """After one update a target's weight must be (1 - tau) old + tau new, also of new critics; the slow actor's by slow."""
    agent = sac.SAC(2, box(1), hidden=(8,), tau=0.25, slow=0.125)
    if reset:
        agent.reset_critic()
    follow = [(agent.target, agent.critic, 0.25), (agent.slow_actor, agent.actor, 0.125)]
    before = [[p.clone() for p in slow.parameters()] for slow, _, _ in follow]
    agent.update(filled_batch(16))
    for (slow, fast, share), was in zip(follow, before):
        for old, now, new in zip(was, slow.parameters(), fast.parameters()):
            assert torch.allclose(now, (1 - share) * old + share * new, atol=1e-6)


def test_the_slow_actor_is_evaluated_and_the_newest_one_explores():
    """best_action() must be that of the average, whatever the newest actor says; act() that of the newest."""
    agent = sac.SAC(2, box(1), hidden=(8,))
    with torch.no_grad():
        agent.actor[-1].bias += torch.tensor([9.0, -99.0])  # far to the right, and sure of it
        agent.slow_actor[-1].bias -= torch.tensor([9.0, 0.0])
    assert agent.best_action(np.zeros(2)) < -0.99 and agent.act(np.zeros(2)) > 0.99


def test_actor_step_leaves_critic_gradients_untouched():
    """The gradients left in the critics must be those of the critic loss alone."""
    agent = sac.SAC(2, box(1), hidden=(8,))
    seen = []
    step = agent.critic_optimizer.step
    agent.critic_optimizer.step = lambda: (seen.extend(p.grad.clone() for p in agent.critic.parameters()), step())
    agent.update(filled_batch(16))
    assert all(torch.equal(a, p.grad) for a, p in zip(seen, agent.critic.parameters()))
    assert all(p.requires_grad for p in agent.critic.parameters())


def test_a_share_of_discrete_actions_is_uniform_however_sure_the_policy_is():
    """With all probability on action 0, the other three of four must still be taken in 3.75 % of 4,000 steps."""
    agent = sac.SAC(2, gymnasium.spaces.Discrete(4), hidden=(8, 8))
    with torch.no_grad():
        agent.actor[-1].bias += torch.tensor([100.0, 0, 0, 0])
    taken = np.bincount([agent.act(np.zeros(2)) for _ in range(4000)], minlength=4) / 4000
    assert taken[1:].sum() == pytest.approx(0.75 * sac.RANDOM_SHARE, abs=0.012) and taken[1:].min() > 0
    assert {agent.act(np.zeros(2), explore=False) for _ in range(20)} == {0}


def test_observations_are_seen_in_units_of_their_spread():
    """After standardise(), a shifted and scaled world must be acted in and learned from as the plain one is."""
    rng, box = np.random.default_rng(0), gymnasium.spaces.Box(-1, 1, (2,))
    agents, obs = [sac.SAC(3, box, hidden=(16, 16)) for _ in range(2)], rng.normal(size=(100, 3)).astype(np.float32)
    shift, scale = np.float32([5, -3, 0]), np.float32([0.1, 20, 1])
    agents[0].normalise_observations(obs)
    agents[1].normalise_observations(obs * scale + shift)
    batch = {"obs": torch.from_numpy(obs), "action": torch.rand(100, 2), "reward": torch.rand(100),
             "next_obs": torch.from_numpy(obs[::-1].copy()), "terminated": torch.zeros(100)}
    moved = {**batch, **{name: batch[name] * torch.from_numpy(scale) + torch.from_numpy(shift) for name in ("obs", "next_obs")}}
    losses = [float(agent.update(part)["critic_loss"]) for agent, part in zip(agents, (batch, moved))]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert np.allclose(agents[0].act(obs[0], explore=False), agents[1].act(obs[0] * scale + shift, explore=False), atol=1e-3)
    agents[0].normalise_observations(np.ones((9, 3)))  # what never moved must not be blown up without bound
    assert float(agents[0].obs_std.max()) == pytest.approx(0.01)


def test_reset_critic_forgets_values_and_keeps_the_actor():
    """The critics must change and agree with their targets; the actor must stay as it was."""
    agent = sac.SAC(2, box(1), hidden=(8,))
    actor, critic = agent.actor[0].weight.clone(), agent.critic.q1[0].weight.clone()
    agent.reset_critic()
    assert torch.equal(actor, agent.actor[0].weight) and not torch.equal(critic, agent.critic.q1[0].weight)
    assert all(torch.equal(a, b) for a, b in zip(agent.critic.parameters(), agent.target.parameters()))


def distance_after_learning(discrete, **settings):
    """SAC learns to move a point to 0 (reward -|x|) -> how far from 0 it still is after eight steps, on average."""
    space, rng = gymnasium.spaces.Discrete(3) if discrete else box(1), np.random.default_rng(0)
    agent = sac.SAC(1, space, hidden=(32, 32), lr=3e-3, discount=0.9, **settings)
    buffer, x = sac.ReplayBuffer(800, (1,), () if discrete else (1,)), 1.0

    def move(x, action):
        return float(np.clip(x + 0.3 * (action - 1 if discrete else action[0]), -2, 2))

    for step in range(400):
        x = rng.uniform(-2, 2) if step % 10 == 0 else x
        action = agent.act([x])
        new = move(x, action)
        buffer.add([x], action, [new], False, None, 0.0)
        buffer.set_rewards([-abs(new)])
        x = new
        if step > 100:
            agent.update(buffer.sample(64))
    ends = []
    for x in (-1.5, -0.7, 0.8, 1.6):
        for _ in range(8):
            x = move(x, agent.act([x], explore=False))
        ends.append(abs(x))
    return np.mean(ends)


@pytest.mark.parametrize("discrete", [False, True])
def test_sac_learns_a_point_mass(discrete):
    """A point that should be moved to 0 (reward -|x|) must end nearer to it than under random actions (about 1)."""
    assert distance_after_learning(discrete) < 0.25


# ---- reward_model.py: which pairs to ask, Bradley-Terry, an ensemble of small CNNs (STEPs 2 and 4) ----
def numbered_images(n, size=64):
    """(n, size, size, 3) uint8: picture i has brightness i."""
    return np.broadcast_to(np.arange(n, dtype=np.uint8)[:, None, None, None], (n, size, size, 3)).copy()


@pytest.mark.parametrize("how", reward_model.SAMPLERS)
def test_every_image_can_be_asked_about_and_none_against_itself(how):
    """No pair (i, i); where the choice does not follow a model, every image must turn up on both sides."""
    images, rng = numbered_images(12), np.random.default_rng(0)
    model = reward_model.RewardModel((64, 64, 3))
    pairs = np.concatenate([reward_model.sample_pairs(images, 40, rng, how, model) for _ in range(20)])
    assert pairs.shape == (800, 2) and (pairs[:, 0] != pairs[:, 1]).all()
    wanted = set(range(12)) if how in ("uniform", "best", "diverse") else set()
    assert wanted <= set(pairs[:, 0]) and wanted <= set(pairs[:, 1])


def test_equal_pictures_are_not_asked_about_while_others_exist():
    """Among nine equal pictures and one other, every pair must hold the other; equal ones come only if all are equal."""
    images, rng = numbered_images(10), np.random.default_rng(0)
    images[:9] = 0
    assert (reward_model.sample_pairs(images, 10, rng) == 9).any(1).all()
    assert reward_model.sample_pairs(images[:9], 10, rng).shape == (10, 2)


class TwoMinds:
    """Two members that agree on dark pictures and contradict each other on bright ones."""

    beta = 1.0

    def member_rewards(self, images):
        brightness = images[:, 0, 0, 0].astype(np.float32)
        disputed = (brightness > 5) * 0.1 * (brightness - 8.5)
        return np.stack([brightness * (brightness <= 5) * 9 + disputed, brightness * (brightness <= 5) * 9 - disputed])

    def predict(self, images):
        return self.member_rewards(images).mean(0)


def test_disagreement_and_entropy_prefer_what_the_members_dispute():
    """Pairs of disputed (bright) pictures must be chosen far more often than their share of all pairs, 23 %."""
    images, rng = numbered_images(12), np.random.default_rng(0)
    for how in ("disagreement", "entropy"):
        pairs = reward_model.sample_pairs(images, 30, rng, how, TwoMinds())
        assert (pairs > 5).all(1).mean() > 0.6


def test_unsure_answers_never_become_labels():
    """-1 and -2 must be refused at the door of the data set."""
    with pytest.raises(ValueError, match="leave out what is unsure"):
        reward_model.PreferenceDataset(4, (1, 1, 3)).add(numbered_images(1, 1), numbered_images(1, 1), [-1])


def test_preference_dataset_wraps_and_holds_out_every_eighth():
    """More answers than places must overwrite the oldest; every eighth must be held out of training."""
    data = reward_model.PreferenceDataset(16, (1, 1, 3))
    images = numbered_images(40, 1)
    data.add(images[:20], images[20:], np.arange(20) % 2)
    assert len(data) == 16 and sorted(data.first[:, 0, 0, 0]) == list(range(4, 20))
    assert sorted(data.first[data.rows(held_out=True), 0, 0, 0]) == [7, 15]
    seen = [x for first, *_ in data.batches(5, np.random.default_rng(0)) for x in first[:, 0, 0, 0]]
    assert sorted(seen) == [n for n in range(4, 20) if n % 8 != 7]


def test_preference_loss_equals_the_formula():
    """The loss must be -log of the Bradley-Terry probability of the image that was picked; log 2 for equal rewards."""
    r0, r1, label = torch.tensor([0.3, -0.2]), torch.tensor([0.1, 0.9]), torch.tensor([0, 1])
    p = [np.exp(0.3) / (np.exp(0.3) + np.exp(0.1)), np.exp(0.9) / (np.exp(-0.2) + np.exp(0.9))]
    assert float(reward_model.preference_loss(r0, r1, label)) == pytest.approx(-np.log(p).mean(), rel=1e-5)
    assert float(reward_model.preference_loss(r0, r0, label)) == pytest.approx(np.log(2), rel=1e-5)


def test_swapping_the_images_flips_the_label():
    """Exchanging first and second must cost what the opposite label cost."""
    r0, r1, label = torch.randn(9), torch.randn(9), torch.arange(9) % 2
    loss = reward_model.preference_loss
    assert torch.allclose(loss(r0, r1, label), loss(r1, r0, 1 - label))


def test_a_perfect_fit_of_tanh_rewards_still_costs():
    """Rewards of -1 and 1, ordered right, must cost log(1 + e^-2) = 0.127: the floor of this loss."""
    loss = reward_model.preference_loss(torch.tensor([-1.0]), torch.tensor([1.0]), torch.tensor([1]))
    assert float(loss) == pytest.approx(0.1269, abs=1e-4)


def test_reward_net_gives_one_bounded_number_per_image():
    """(B, 3, H, W) must become (B,) in (-1, 1), for every size a task uses; too small a picture is refused."""
    for size in (64, 84, 100, 200):
        reward = reward_model.RewardNet(size, size)(torch.rand(2, 3, size, size))
        assert reward.shape == (2,) and float(reward.detach().abs().max()) < 1
    with pytest.raises(ValueError, match="at least 47 x 47"):
        reward_model.RewardNet(46, 46)


def test_a_shifted_picture_is_the_same_picture_elsewhere():
    """A dot must be found within `most` pixels of where it was, anywhere in that range, on an unchanged background."""
    images = np.full((200, 20, 20, 3), 7, np.uint8)
    images[:, 10, 10] = 200
    moved = reward_model.random_shift(images, 3, np.random.default_rng(0))
    assert moved.shape == images.shape and moved.dtype == np.uint8 and (moved.sum((1, 2, 3)) == images[0].sum()).all()
    place = np.argwhere(moved[..., 0] == 200)[:, 1:] - 10  # (200, 2)
    assert place.min(0).tolist() == [-3, -3] and place.max(0).tolist() == [3, 3]
    assert reward_model.random_shift(images, 0, None) is images


def test_a_mirrored_picture_has_left_and_right_exchanged():
    """About half of the pictures must be turned, none changed otherwise, and a fit must see such views only if asked."""
    images = np.arange(40 * 2 * 3 * 3, dtype=np.uint8).reshape(40, 2, 3, 3)
    seen = reward_model.random_flip(images, np.random.default_rng(0))
    turned = [np.array_equal(now, before[:, ::-1]) for now, before in zip(seen, images)]
    same = [np.array_equal(now, before) for now, before in zip(seen, images)]
    assert all(a != b for a, b in zip(turned, same)) and 10 < sum(turned) < 30
    plain, mirroring = (reward_model.RewardModel((48, 48, 3), random_flip=mirror) for mirror in (False, True))
    assert plain.augment(images) is images and not np.array_equal(mirroring.augment(images), images)


def test_the_reward_model_orders_pictures_it_has_not_seen():
    """Fitted to 60 answers about a pole, it must order unseen pictures of poles; the members must differ."""
    rng = np.random.default_rng(0)
    images, angle = reward_model.demo_images(200, rng)
    pairs = reward_model.sample_pairs(images, 60, rng)
    data = reward_model.PreferenceDataset(60, (64, 64, 3))
    data.add(images[pairs[:, 0]], images[pairs[:, 1]], (np.abs(angle[pairs[:, 1]]) < np.abs(angle[pairs[:, 0]])).astype(int))
    model = reward_model.RewardModel((64, 64, 3), lr=5e-4)
    result = model.fit(data, epochs=25)
    unseen, angle = reward_model.demo_images(200, rng)
    assert spearmanr(model.predict(unseen), -np.abs(angle)).statistic > 0.6
    assert result["train_accuracy"] > 0.8 and 0 <= result["heldout_accuracy"] <= 1
    assert model.member_rewards(unseen).std(0).mean() > 0.01


def test_rewards_are_standardised_however_early_the_fit_stopped():
    """After one epoch, when networks hardly differ yet, rewards of the fitted pictures must have deviation 1."""
    images, angle = reward_model.demo_images(40, np.random.default_rng(0))
    data, model = reward_model.PreferenceDataset(20, (64, 64, 3)), reward_model.RewardModel((64, 64, 3))
    data.add(images[:20], images[20:], (np.abs(angle[20:]) < np.abs(angle[:20])).astype(int))
    model.fit(data, epochs=1)
    assert model.member_rewards(images).mean(0).std() < 0.3
    reward = model.predict(images)
    assert reward.mean() == pytest.approx(0, abs=1e-3) and reward.std() == pytest.approx(1, 1e-3)


def test_fit_stops_early_and_refuses_an_empty_data_set():
    """Two answers that are easily told apart must not take all epochs; no answers must be said."""
    model, data = reward_model.RewardModel((64, 64, 3)), reward_model.PreferenceDataset(4, (64, 64, 3))
    with pytest.raises(ValueError, match="no answers to fit"):
        model.fit(data, 1)
    data.add(numbered_images(2) * 0, numbered_images(2) * 0 + 250, [1, 1])
    assert model.fit(data, epochs=200)["epochs"] < 200


# ---- vlm_query.py, part 1: the question (STEP 3) ----
def gray(*values, size=32):
    """(N, size, size, 3) uint8 pictures of one grey each."""
    return np.stack([np.full((size, size, 3), value, np.uint8) for value in values])


def test_the_first_question_shows_both_pictures_and_the_second_only_what_was_said():
    """Two stages: call 1 holds goal and pictures and asks for no label; call 2 holds the notes, and no picture."""
    asked = []

    def ask(parts):
        asked.append(parts)
        return Reply("The second is lighter." if len(asked) == 1 else "1", "complete", 0, 0, False)

    first, second = gray(9), gray(200)
    labels, counts = label_pairs(ask, first, second, "to switch on the light")
    assert labels.tolist() == [1] and counts["label1"] == 1
    (one, dark, two, light, analyse), (notes,) = asked
    assert (one, two) == ("Image 1:", "Image 2:") and (dark == first[0]).all() and (light == second[0]).all()
    assert "to switch on the light" in analyse and "-1" not in analyse
    assert "The second is lighter." in notes and "to switch on the light" in notes and "-1 if it cannot be told" in notes


@pytest.mark.parametrize("text, label", [
    ("0", 0), ("1", 1), ("-1", -1), ("\u22121", -1), ("\u20131", -1), ("**1**", 1), ("1.", 1), ("(0)", 0),
    ("Answer: -1.", -1), ("100% sure: 1", 1), ("Image 1 wins: 0", 0), ("1\n0", None), ("0\n\n```", 0),
    ("Images 1 and 2 look alike: -1", -1), ("<think>1</think>0", 0), ("\\boxed{1}", 1), ("1 1", 1),
    ("", None), ("0.5", None), ("0 or 1", None), ("0, 1", None), ("1/10", None), ("Image 1.", None),
    ("- 1", None), ("10", None), ("1%", None), ("-0", None), ("1st", None), ("<think>1", None),
    ("<think>a</think>b<think>1", None), ("I cannot tell.", None), ("1\nI hope this helps", None),
    ("0-1", None), ("1.0", None), ("2", None), ("Image #2 and Image #1: 1", None),
    ("Image **1** is closer", None), ("The closer image is Image **1**.", None), ("Image no. 1", None),
    ("Closer image: 1", None), ("Image **1** is closer to the goal: 0", 0), ("**Image 2** is closer: **1**", 1)])
def test_a_label_is_read_from_the_last_line_or_not_at_all(text, label):
    """parse_label must find one of 0, 1, -1 in the last line, said nowhere else otherwise, and must never guess."""
    assert parse_label(text) == label


def says(text, end="complete"):
    """An ask() that always gives the same answer."""
    return lambda parts: Reply(text, end, 10, 1, False)


@pytest.mark.parametrize("ask, kind", [(says("0.5"), "unreadable"), (says("0", "cut off"), "no_answer"),
                                       (says("-1"), "unsure"), (says("", "refused"), "no_answer")])
def test_unsure_unreadable_and_no_answer_are_counted_apart(ask, kind):
    """No failure may become a -1, and no -1 a failure."""
    labels, counts = label_pairs(ask, gray(1), gray(200), "g")
    kinds = {name: counts[name] for name in ("unsure", "unreadable", "no_answer", "label0", "label1")}
    assert kinds == {**dict.fromkeys(kinds, 0), kind: 1} and labels[0] == (-1 if kind == "unsure" else -2)


def test_identical_pictures_are_never_sent():
    """Neither equal bytes nor rendering noise may cost a call; a shift of a tenth of a pixel must be asked."""
    first, second = gray(100, 100, 0), gray(100, 102, 0)
    second[2, 5, 5] = 10  # 0 - 10 would wrap round in uint8
    asked = []
    label_pairs(lambda parts: asked.append(parts) or Reply("1", "complete", 0, 0, False), first, second, "g", 1)
    assert len(asked) == 1 and asked[0][3].max() == 10


def test_no_stage_is_asked_twice_when_the_other_one_fails():
    """A failing second call must be repeated alone: the first, with the pictures, was paid for."""
    sent = []

    def ask(parts):
        sent.append(len(parts))
        return Reply("notes", "complete", 0, 0, False) if len(parts) > 1 else Reply("", "refused", 0, 0, False)

    labels, counts = label_pairs(ask, gray(1), gray(200), "g")
    assert sent == [5, 1] and counts["no_answer"] == 1 and list(labels) == [-2]


def test_labels_do_not_depend_on_who_answers_first():
    """Answers that arrive in reverse order must land at their own pairs."""
    def ask(parts):
        time.sleep(0.03 * (10 - parts[3].max()) / 10)
        return Reply(str(parts[3].max() % 2), "complete", 0, 0, False)

    labels, _ = label_pairs(ask, gray(*[200] * 10), gray(*range(10)), "g", stages=1, workers=10)
    assert list(labels) == [0, 1] * 5


@pytest.mark.parametrize("bad", [np.zeros((2, 8, 8, 3)), np.zeros((8, 8, 3), np.uint8), [[1]]])
def test_pictures_of_a_wrong_shape_or_type_are_refused_at_the_door(bad):
    """The message must name what is wanted."""
    with pytest.raises(ValueError, match=r"\(N, H, W, 3\) uint8"):
        label_pairs(says("1"), bad, bad, "g")


def test_the_oracle_orders_by_score_and_errs_as_often_as_told():
    """Ties must be -1; error_rate must flip that share of the others."""
    rng = np.random.default_rng(0)
    assert list(vlm_query.oracle_labels([0, 2, 1], [1, 1, 1], rng)) == [1, 0, -1]
    a, b = rng.random((2, 5000))
    wrong = vlm_query.oracle_labels(a, b, rng, 0.2) != (b > a)
    assert 0.17 < wrong.mean() < 0.23


# ---- vlm_query.py, part 2: the wire ----
KEY = "sk-very-secret-0123456789"
BRIGHT = vlm_query.SIGHT_GOAL


def quick(url, provider="offline/m", **settings):
    """A client that waits hundredths of seconds where it would wait seconds."""
    vlm = VLM(provider, url=url, **{"timeout": (10, 60), "key": KEY, **settings})
    vlm.backoff = 0.01
    return vlm


def sent_by(provider, **settings):
    """(path, headers, body) of one question with a picture."""
    server = OfflineVLM()
    with server as url:
        quick(url, provider, **settings).ask(["Image 1:", gray(7)[0], "The goal is " + BRIGHT])
    path, headers, raw = server.last
    return path, headers, json.loads(raw)


def test_each_provider_gets_the_body_that_its_documentation_asks_for():
    """Path, key header, order of the parts and the picture's media type must be the provider's."""
    url = "data:image/png;base64," + vlm_query.png_base64(gray(7)[0])
    goal = "The goal is " + BRIGHT
    path, headers, body = sent_by("openai/m")
    assert path == "/v1/chat/completions" and headers["Authorization"] == f"Bearer {KEY}"
    content = [{"type": "text", "text": "Image 1:"}, {"type": "image_url", "image_url": {"url": url}},
               {"type": "text", "text": goal}]
    assert body == {"model": "m", "messages": [{"role": "user", "content": content}]}
    path, headers, body = sent_by("gemini/m")
    assert path == "/v1/models/m:generateContent" and headers["x-goog-api-key"] == KEY
    blob = {"inline_data": {"mime_type": "image/png", "data": url.split(",")[1]}}
    assert body == {"contents": [{"role": "user", "parts": [{"text": "Image 1:"}, blob, {"text": goal}]}]}
    path, headers, body = sent_by("anthropic/m")
    assert path == "/v1/messages" and headers["x-api-key"] == KEY and headers["anthropic-version"]
    source = {"type": "base64", "media_type": "image/png", "data": url.split(",")[1]}
    content[1] = {"type": "image", "source": source}
    assert body == {"model": "m", "max_tokens": 8192, "messages": [{"role": "user", "content": content}]}


def test_only_local_servers_are_told_a_temperature_and_extra_is_merged_in_depth():
    """They sample unless told not to; current hosted models refuse it. Extra must leave its neighbours alone."""
    told = {provider: sent_by(provider)[2].get("temperature") for provider in ("local/m", "openai/m", "anthropic/m", "offline/m")}
    assert told == {"local/m": 0, "openai/m": None, "anthropic/m": None, "offline/m": None}
    assert sent_by("local/m", extra={"temperature": 0.5})[2]["temperature"] == 0.5
    assert sent_by("local/m", extra={"temperature": None})[2] == sent_by("offline/m")[2]
    _, _, body = sent_by("gemini/m", extra={"generationConfig": {"seed": 1}})
    assert body["generationConfig"] == {"seed": 1} and "contents" in body
    assert vlm_query.merged({"a": {"b": 1, "c": 2}}, {"a": {"b": 3}}) == {"a": {"b": 3, "c": 2}}


def test_the_pixels_arrive_as_they_were():
    """The picture must be sent without loss: what the server decodes equals what went in."""
    image = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    assert (offline_vlm.decode(vlm_query.png_base64(image), "image/png") == image).all()


def grays(pairs, seed=0):
    """`pairs` pairs of grey pictures, at least 10 levels apart, and the right labels."""
    rng = np.random.default_rng(seed)
    first = rng.integers(0, 120, pairs)
    second = first + 10 + rng.integers(0, 120, pairs)
    swap = rng.random(pairs) < 0.5
    first, second = np.where(swap, second, first), np.where(swap, first, second)
    return gray(*first), gray(*second), (second > first).astype(np.int8)


def test_a_second_run_asks_nothing(tmp_path):
    """With the cache of the first run, every answer must be there, also for a stand-in on another port."""
    first, second, right = grays(6)
    with OfflineVLM() as url:
        before = label_pairs(quick(url, cache=tmp_path), first, second, BRIGHT)[0]
    server = OfflineVLM()
    with server as url:
        vlm = quick(url, cache=tmp_path)
        labels, counts = label_pairs(vlm, first, second, BRIGHT)
    assert server.requests.total() == 0 and counts["cached"] == 6 and vlm.cached_calls == vlm.calls == 12
    assert (labels == right).all() and (labels == before).all()


def test_the_same_question_asked_twice_at_the_same_moment_is_paid_for_once(tmp_path):
    """Eight threads with one question must make one request; the others must wait for its answer and read it."""
    server = OfflineVLM(latency=0.2)
    with server as url:
        vlm = quick(url, cache=tmp_path, timeout=(2, 5))
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            replies = list(pool.map(vlm.ask, [["The goal is " + BRIGHT, "Image 1:", gray(1)[0]]] * 8))
    assert server.requests.total() == 1 and len({reply.text for reply in replies}) == 1
    assert sum(reply.cached for reply in replies) == vlm.cached_calls == 7 and vlm.calls == 8


def test_an_answer_is_on_disk_and_in_the_log_before_its_label_is_used(tmp_path, monkeypatch):
    """Cache file, fsync and log line must come before label_pairs returns, per pair."""
    events = []
    monkeypatch.setattr(os, "fsync", lambda number, real=os.fsync: (real(number), events.append("sync")))
    monkeypatch.setattr(os, "replace", lambda a, b, real=os.replace: (real(a, b), events.append("file")))
    log = LabelLog(tmp_path / "labels.jsonl")
    with OfflineVLM() as url:
        label_pairs(quick(url, cache=tmp_path / "c"), gray(1), gray(200), BRIGHT, log=lambda record: (log.append(record), events.append(1)))
    assert events == ["sync", "file", "sync", "file", "sync", 1]
    record, = LabelLog.read(tmp_path / "labels.jsonl")
    assert record["label"] == 1 and len(record["answers"]) == 2 and "Image 1:" in record["answers"][0]


@pytest.mark.parametrize("workers", [1, 8])
def test_a_limit_cuts_at_the_same_pair_for_any_number_of_threads(workers, tmp_path):
    """Which pairs are asked must depend on their order alone; a repeated run stops at the same pair."""
    first, second, right = grays(30)
    server = OfflineVLM(latency=0.002)
    with server as url:
        for repeat in range(2):
            vlm = quick(url, cache=tmp_path, max_calls=23)
            labels, counts = label_pairs(vlm, first, second, BRIGHT, workers=workers)
            assert counts["limit"] == 19 and list(labels) == [*right[:11]] + [-2] * 19
        assert server.requests.total() == 22 and vlm.calls == 22
        vlm.ask(["The goal is " + BRIGHT])
        with pytest.raises(LimitReached, match="max_calls 23"):
            vlm.ask(["The goal is " + BRIGHT])


@pytest.mark.parametrize("wrong", ["swapped", "blind", "text only"])
def test_the_sight_check_catches_a_server_that_loses_or_swaps_pictures(wrong):
    """Black against white in both orders must expose each of them, and must let a good server pass."""
    with OfflineVLM() as url:
        vlm = quick(url)
        vlm.check_sight()
        whole = vlm.answer
        change = {"swapped": lambda p: [p[0], p[3], p[2], p[1], p[4]], "blind": lambda p: [p[0], p[1], p[2], p[1], p[4]],
                  "text only": lambda p: [p[0], p[2], p[4], "Image 1: 0"]}[wrong]
        vlm.answer = lambda parts, deadline: whole(change(parts), deadline)
        with pytest.raises(VLMError, match="did not tell black from white"):
            vlm.check_sight()


# ---- envs.py: CartPole, and one face for any environment ----
def test_one_cartpole_step_is_one_euler_step_of_the_equations():
    """The step must equal the equations worked by hand: upright, at rest, full force to the right."""
    pole = envs.CartPole()
    pole.reset(seed=0)
    pole.state = np.zeros(4)
    for _ in range(2):  # the first step changes speeds only, the second shows them in the places
        obs = pole.step(np.array([1.0]))[0]
        if pole.state[0] == 0:
            # temp = 10 / 1.1; angle'' = -temp / (0.5 (4/3 - 0.1 / 1.1)); x'' = temp - 0.05 angle'' / 1.1
            assert np.allclose(obs, [0, 0.02 * 9.756098, 0, 0.02 * -14.634146], atol=1e-6)
    assert np.allclose(obs[[0, 2]], [0.02 * 0.19512195, 0.02 * -0.29268293], atol=1e-6)


def test_cartpole_agrees_with_gymnasiums_while_the_pole_is_up():
    """At full force left or right the two must move alike."""
    ours, theirs = envs.CartPole(), gymnasium.make("CartPole-v1").unwrapped
    ours.reset(seed=3)
    theirs.reset(seed=3)
    theirs.state = ours.state.copy()
    for right in (1, 0, 0, 1, 1, 0, 1, 0):
        ours.step(np.array([2.0 * right - 1.0]))
        theirs.step(right)
        assert np.allclose(ours.state, theirs.state)


def test_cartpole_is_clamped_and_a_clamped_pole_is_at_rest():
    """Angle and place must stop at 30 degrees and 1.92 m without speed, so that the way back starts at once."""
    pole = envs.CartPole()
    pole.reset(seed=0)
    for _ in range(200):
        _, reward, terminated, _, info = pole.step(np.array([1.0]))
        assert not terminated and np.all(np.abs(pole.state) <= pole.LIMIT)
    assert np.allclose(pole.state, [1.92, 0, -np.radians(30), 0])
    assert reward == info["progress"] == pytest.approx(-30) and info["success"] == 0


def test_cartpole_success_begins_below_five_degrees():
    """4.9 degrees must count as success and 5.1 must not, on either side."""
    pole = envs.CartPole()
    for degrees, success in ((4.9, 1), (-4.9, 1), (5.1, 0), (-5.1, 0)):
        pole.state = np.array([0, 0, np.radians(degrees), 0])
        assert pole._info()["success"] == success and pole._info()["progress"] == pytest.approx(-abs(degrees))


def test_the_cartpole_image_shows_the_angle_and_not_the_position():
    """The cart must stay in the middle; the tip must be where the angle says, at every size."""
    pole = envs.CartPole()
    pole.reset(seed=0)
    for size in (64, 200):
        pole.state = np.array([-1.5, 0, np.radians(20), 0])
        left = pole.image(size)
        pole.state[0] = 1.5
        assert np.array_equal(left, pole.image(size))
        brown = left[..., 0].astype(int) - left[..., 2] > 55
        rows, columns = np.nonzero(brown)
        tip = columns[rows == rows.min()].mean() / size - 0.5
        assert tip == pytest.approx(envs.POLE_LENGTH * np.sin(np.radians(20)), abs=0.04)
        assert not np.array_equal(left, envs.draw_pole(size, np.radians(21)))


def rollout(env, seed, steps=6):
    """Observations, rewards, infos and the last image of a few random steps: all that an episode consists of."""
    rng = np.random.default_rng(seed)
    obs, info = env.reset(seed=seed)
    seen = [obs, [info["success"], info["progress"]]]
    for _ in range(steps):
        obs, reward, _, _, info = env.step(rng.uniform(-1, 1, env.action_space.shape))
        seen += [obs, [reward, info["success"], info["progress"]]]
    return np.concatenate(seen), env.image(84)


def test_a_seed_determines_cartpoles_episode_whatever_came_before():
    """A resumed run must see the very episodes of one that never stopped: numbers and pixels, also in a fresh object."""
    env = envs.make("CartPole")
    first_numbers, first_image = rollout(env, seed=5)
    rollout(env, seed=6, steps=20)
    for again in (env, envs.make("CartPole")):
        numbers, image = rollout(again, seed=5)
        assert np.array_equal(numbers, first_numbers) and np.array_equal(image, first_image)


def test_cartpoles_expert_reaches_the_goal_and_random_actions_do_not():
    """The expert's episode must end in success, with more progress than a random one and with a larger true return."""
    env, ends = envs.make("CartPole"), {}
    for who, policy in (("expert", envs.expert(env)), ("random", lambda obs: env.action_space.sample())):
        env.action_space.seed(0)
        (obs, info), total = env.reset(seed=0), 0.0
        for _ in range(env.horizon):
            obs, reward, terminated, truncated, info = env.step(policy(obs))
            total += reward
        assert truncated and not terminated  # the time limit cut it off; nothing ended
        ends[who] = (info["success"], info["progress"], total)
    assert ends["expert"][0] == 1 and ends["random"][0] == 0
    assert ends["expert"][1] > ends["random"][1] and ends["expert"][2] > ends["random"][2]


class Odd(gymnasium.Env):
    """A foreign environment: 2-D float64 observations, an action range of its own, oblong images."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 30}

    def __init__(self, render_mode=None):
        self.render_mode = render_mode
        self.observation_space = gymnasium.spaces.Box(-9.0, 9.0, (2, 3), np.float64)
        self.action_space = gymnasium.spaces.Box(np.array([0.0]), np.array([4.0]), dtype=np.float64)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.zeros((2, 3)), {}

    def step(self, action):
        self.got = action
        return np.zeros((2, 3)), 7.0, False, False, {"is_success": True}

    def render(self):
        image = np.zeros((40, 100, 3), np.uint8)
        image[:, 30:70] = 200
        return image


@pytest.fixture(scope="module", autouse=True)
def odd_id():
    gymnasium.register("Odd-v0", entry_point=Odd, max_episode_steps=9)
    yield
    del gymnasium.registry["Odd-v0"]


def test_any_gymnasium_id_gets_the_same_face():
    """Flat float32 observations, actions in [-1, 1], square images of all of it, reward as progress, its own limit."""
    env = envs.make("Odd-v0", goal="to be odd")
    obs, _ = env.reset(seed=0)
    assert obs.shape == (6,) and obs.dtype == np.float32 and env.goal == "to be odd" and env.horizon == 9
    assert env.action_space == gymnasium.spaces.Box(-1.0, 1.0, (1,), env.action_space.dtype)
    *_, info = env.step(np.array([1.0], np.float32))
    assert env.unwrapped.got == 4.0 and info["progress"] == 7.0 and info["success"] == 1.0
    for size in (16, 40, 90):
        image = env.image(size)  # 40 x 100 px: a light middle, padded above and below in the edges' colour
        assert image.shape == (size, size, 3) and image.dtype == np.uint8 and image[size // 2, size // 2, 0] == 200
        assert not image[0].any() and not image[-1].any() and not image[:, 0].any() and not image[:, -1].any()


@pytest.mark.parametrize("name, goal, words", [
    ("CardPole", None, "CartPole, .*any Gymnasium id with --goal"),
    ("Odd-v0", None, "needs a goal"),
    ("no_such_module:Odd-v0", "to run", "no_such_module"),
])
def test_what_cannot_be_made_is_refused_in_one_line(name, goal, words):
    """A user's mistake must end in a ValueError of one line that says what is possible."""
    with pytest.raises(ValueError, match=words) as error:
        envs.make(name, goal=goal)
    assert "\n" not in str(error.value)


def test_a_push_that_is_no_number_is_refused():
    """A nan must not become the state of a whole episode."""
    env = envs.make("CartPole")
    env.reset(seed=0)
    with pytest.raises(ValueError, match="must be a number"):
        env.step(np.array([np.nan]))


# ---- train.py: the loop ----
STEPS = ("explore without any reward", "act, and store the transition with the image seen after it",
         "pick pairs of images", "ask the VLM which image is closer to the goal",
         "fit the reward model to the answers", "relabel every stored transition with the new reward",
         "improve the policy with SAC on the learned reward",
         "evaluate with the true reward, which the learner never sees")
STEP_FILES = ("sac", "sac", "reward_model", "vlm_query", "reward_model", "sac", "sac", "train")


@pytest.mark.parametrize("number", range(8))
def test_step_titles_are_the_same_everywhere(number):
    """Each STEP's banner must stand, word for word, in train.py, in its component and in the README."""
    banner = f"# ---- STEP {number}: {STEPS[number]} ----"
    assert banner in (ROOT / "train.py").read_text() and banner in (ROOT / f"{STEP_FILES[number]}.py").read_text()
    assert f"| {number} | {STEPS[number]} |" in (ROOT / "README.md").read_text()


def test_the_steps_stand_in_order_in_the_loop():
    """A reader of train() must meet STEP 0 to STEP 7 in that order."""
    found = re.findall(r"# ---- STEP (\d):", inspect.getsource(train.train))
    assert found == list("01234567")


TINY = dict(env="CartPole", total_steps=300, seed_steps=100, explore_steps=100, feedback_every=100, pairs_per_session=6,
            max_pairs=12, batch_size=16, hidden=16, reward_epochs=2, eval_every=100, eval_episodes=1, image_buffer=50,
            ensemble_size=1, updates=1, reward_image_size=48, vlm_image_size=100)


def tiny(tmp_path, name="run", **changes):
    return settings.Config(**{**TINY, "out": str(tmp_path / name), **changes})


def test_the_whole_algorithm_runs_every_step(tmp_path, monkeypatch):
    """A small run on the stand-in must ask, fit, update, and relabel every stored row; all files must be there."""
    updates, relabelled = [], []
    update, relabel = sac.SAC.update, sac.ReplayBuffer.relabel
    monkeypatch.setattr(sac.SAC, "update", lambda self, batch: updates.append(1) or update(self, batch))

    def counting(self, reward_fn, only_new=False, chunk=1024):
        rows = relabel(self, reward_fn, only_new, chunk)
        relabelled.append((rows, len(self), only_new))
        return rows

    monkeypatch.setattr(sac.ReplayBuffer, "relabel", counting)
    rows = train.train(tiny(tmp_path))
    assert [row["step"] for row in rows] == [0, 100, 200, 300]
    assert rows[-1]["labels"] > 0 and 8 <= rows[-1]["pairs_asked"] <= 12 and len(updates) > 200
    assert [(rows, stored) for rows, stored, new in relabelled if not new] == [(100, 100), (200, 200)]
    assert all(math.isfinite(rows[-1][name]) for name in ("critic_loss", "q_mean", "alpha"))
    files = {"config.json", "metrics.csv", "timing.csv", "labels.jsonl", "pairs", "checkpoint", "episodes.csv",
             "eval_before.gif", "eval_after.gif", "summary.json", "report.html"}
    assert {*files, "policy.pt", "buffer"} <= set(os.listdir(tmp_path / "run"))
    logged = [json.loads(line) for line in open(tmp_path / "run" / "labels.jsonl")]
    assert all(record["answers"] for record in logged if record["kind"] == "label")
    assert len(os.listdir(tmp_path / "run" / "pairs")) >= len(logged)


@pytest.fixture
def unreported(monkeypatch):
    """Leaves out report and pictures, which test_the_whole_algorithm_runs_every_step has, to save their seconds."""
    monkeypatch.setattr(report, "write_report", lambda folder: Path(folder, "report.html").touch())
    monkeypatch.setattr(run.Run, "film", lambda *_: None)
    monkeypatch.setattr(run, "write_episodes", lambda *_: 0.0)


@pytest.mark.usefixtures("unreported")
def test_the_same_seed_gives_the_same_bytes(tmp_path):
    """Two runs with one seed must write identical metrics.csv; another seed must not."""
    for name, seed, steps in (("a", 1, 300), ("b", 1, 300), ("c", 2, 100)):
        train.train(tiny(tmp_path, name, labels="oracle", seed=seed, total_steps=steps))
    a, b, c = ((tmp_path / name / "metrics.csv").read_bytes() for name in "abc")
    assert a == b and a.splitlines()[1] != c.splitlines()[1]


def test_the_reservoir_keeps_every_picture_equally_likely(tmp_path):
    """Of 40 pictures offered to 10 places, early and late ones must be kept about equally often."""
    kept = np.zeros(40)
    for seed in range(200):
        pool, rng = reward_model.ImageBuffer(10, 4, 4), np.random.default_rng(seed)
        for number in np.repeat(np.arange(40), 1 + np.arange(40) % 3):  # some pictures come three times, and count once
            picture = np.full((4, 4, 3), number, np.uint8)
            pool.offer(picture, picture, number, rng)
        assert len({*pool.progress}) == 10
        kept[pool.progress.astype(int)] += 1
    assert kept[:20].sum() == pytest.approx(1000, rel=0.1) and kept.min() > 25


@pytest.mark.usefixtures("unreported")
def test_critics_start_afresh_once_there_is_a_reward_and_only_then(tmp_path, monkeypatch):
    """Fresh critics for the new agent, and once more after the first relabelling of all: what came before is novelty."""
    events = []
    monkeypatch.setattr(sac.SAC, "reset_critic", lambda self, real=sac.SAC.reset_critic: (
        events.append("fresh critics"), real(self))[1])
    monkeypatch.setattr(sac.ReplayBuffer, "relabel", lambda self, reward_fn, only_new=False, real=sac.ReplayBuffer.relabel: (
        only_new or events.append("relabel all"), real(self, reward_fn, only_new))[1])
    train.train(tiny(tmp_path, labels="oracle", total_steps=200))
    assert events == ["fresh critics", "relabel all", "fresh critics", "relabel all"]


# ---- code_as_reward.py, part 1: sub-tasks, a program for each, verification, the reward (STEPs C1 to C4) ----
DEF = "def progress(images, first_image):\n    "
BLACK = np.zeros((3, 16, 16, 3), np.uint8)


class Script:
    """Stands for a VLM in these tests: fixed answers in order; keeps what it was asked."""

    def __init__(self, *answers):
        self.answers, self.asked = list(answers), []

    def __call__(self, parts):
        self.asked.append(parts)
        return types.SimpleNamespace(text=self.answers.pop(0))


CAR_STEPS = ("describe the sub-tasks", "write one program per sub-task", "verify each program, and send failures back",
             "the share of sub-tasks done, minus one, is the reward")


def test_the_steps_of_vlm_car_have_one_title_each_and_stand_in_the_papers_order():
    """Header and banners of code_as_reward.py must name C1 to C4 alike and in order; learn_programs shows C1 to C3."""
    text = (ROOT / "code_as_reward.py").read_text()
    header, body = text.split('"""', 2)[1:]
    for number, title in enumerate(CAR_STEPS, start=1):
        assert f"  C{number}  {title}" in header and f"# ---- STEP C{number}: {title} ----" in body
    assert re.findall(r"# ---- STEP (C\d):", body) == ["C1", "C2", "C3", "C4"]
    assert re.findall(r"# STEP (C\d):", inspect.getsource(learn_programs)) == ["C1", "C2", "C3"]
    assert body.index("# ==== Part 1: VLM-CaR ====") < body.index("STEP C1") < body.index("# ==== Part 2: the sandbox ====")


def test_answers_are_read_for_sub_tasks_and_code():
    """Numbered and bulleted lists, fenced and bare code must be read; anything else must be said to be wrong."""
    black = BLACK[0]
    lists = {"1. one\n2) **two**": ["one", "two"], "Sure!\n- one": ["one"],
             "<think>\n1. no\n2. nor this\n</think>\n1. one": ["one"], "1. one\rtwo\r\n": ["one two"],
             "\n" * 50_000 + "1." + " " * 50_000 + "one": ["one"]}  # in a blink: no step back over all of it
    for answer, expected in lists.items():
        assert describe_subtasks(Script(answer), black, black, "g") == expected
    for answer in ("I cannot", None, "\n".join(f"{i}. x" for i in range(9))):
        with pytest.raises(CodeAsRewardError, match="1 to 5 sub-tasks"):
            describe_subtasks(Script(answer), black, black, "g")
    code = DEF + "return 1"
    assert extract_code(f"```\nx = 1\n```\n```python\n{code}\n```\nDone.") == extract_code(code) == code + "\n"
    for answer in ("no", "```python\nx = 1\n```", None):
        with pytest.raises(ProgramError, match="no code"):
            extract_code(answer)


def square(columns):
    """A white square at these columns of a black image: (T,) -> (T, 32, 32, 3); 24 is the right edge."""
    images = np.zeros((len(columns), 32, 32, 3), np.uint8)
    for image, column in zip(images, columns):
        image[12:20, int(column):int(column) + 8] = 255
    return images


def place(images):
    return images.any(axis=(1, 3)).argmax(axis=1) / 24  # (N,) 0 at the left edge, 1 at the right


EXPERT = [square(np.minimum(24, start + 3 * np.arange(12))) for start in range(10)]
RANDOM = [square(np.clip(12 + 4 * np.sin(np.arange(12) + phase), 0, 20)) for phase in range(10)]
OTHER = [np.full((12, 32, 32, 3), 200, np.uint8)] * 5


def test_a_right_program_passes_the_verification():
    """The position of the square itself must pass every check."""
    report = verify(lambda p, first: place(p) * (p.min(axis=(1, 2, 3)) == 0), EXPERT, RANDOM, OTHER)
    assert (report.verdict, report.reasons) == ("pass", [])
    assert report.rates.pop("hit_rate") == 1 and set(report.rates.values()) == {0}


CHECKS = {  # what is wrong with a program: (the program, the field of the report that must show it)
    "always 1": (lambda p, first: np.ones(len(p)), "false_rate"),
    "always 0": (lambda p, first: np.zeros(len(p)), "hit_rate"),
    "any change": (lambda p, first: (p != first).any(axis=(1, 2, 3)) * 1.0, "backwards"),
    "done at the start": (lambda p, first: np.maximum(place(p), 1.0 * (place(p) < 0.5)), "frozen"),
    "another scene": (lambda p, first: np.where(p.min(axis=(1, 2, 3)) > 0, 1, place(p)), "other_task"),
    "falls back": (lambda p, first: np.where(place(p) == 1, 1, 0.9 - 0.9 * place(p)), "regressions"),
}


@pytest.mark.parametrize("fault", CHECKS)
def test_each_fault_of_a_program_is_found_by_its_check(fault):
    """A wrong program must fail, by the check that is there for its fault, with images of it."""
    program, field = CHECKS[fault]
    report = verify(program, EXPERT, RANDOM, OTHER)
    limit = {"hit_rate": 0.95, "regressions": 0.05}.get(field, 0.1)
    value = report.rates[field]
    assert report.verdict == "fail" and (value < limit if field == "hit_rate" else value > limit)
    assert report.failures and all(f["image"].shape == (32, 32, 3) for f in report.failures)


def test_programs_with_memory_or_an_eye_on_their_neighbours_are_not_deterministic():
    """Random values, and the position in the batch, must be found out."""
    rng = np.random.default_rng(0)
    for program in (lambda p, first: rng.uniform(size=len(p)), lambda p, first: np.linspace(0, 1, len(p))):
        assert "not deterministic" in verify(program, EXPERT, RANDOM).reasons[-1]


GOOD = "```python\nimport numpy as np\n" + DEF + "return images.any(axis=(1, 3)).argmax(axis=1) / 24\n```"
BAD = "```python\n" + DEF + "return images.max(axis=(1, 2, 3)) / 255\n```"


def test_a_wrong_program_goes_back_with_reasons_and_images_and_the_next_one_passes(tmp_path):
    """The repair loop must show the VLM its program, the reasons and the images, and keep the files."""
    ask, saved = Script("1. the square is at the right edge", BAD, GOOD), []
    reward, reports = learn_programs(ask, EXPERT[0][0], EXPERT[0][-1], "to move it", EXPERT, RANDOM,
                                     folder=tmp_path, save_image=lambda path, image: saved.append(path))
    reward.close()
    text = " ".join(part for part in ask.asked[2] if isinstance(part, str))
    assert "images.max" in text and reports[0].reasons[0] in text
    assert len([p for p in ask.asked[2] if not isinstance(p, str)]) == 2 + len(reports[0].failures)
    rows = json.loads((tmp_path / "verification.json").read_text())
    assert [row["verdict"] for row in rows] == ["fail", "pass"] and rows[1]["round"] == 2 and saved
    with load_programs(tmp_path) as again:
        assert again.subtasks == ["the square is at the right edge"]
        assert again.predict(EXPERT[0])[-1] == 0


def test_sub_tasks_count_in_order_once_and_the_last_is_not_held():
    """(s + p_s) / K by hand: an event stays done, order is kept, the goal counts only while it lasts."""
    progress = np.array([[0, 1, 0], [1, 0, 0], [0, 0.5, 1], [0, 1, 0], [0, 0, 1], [0, 0, 0.5]], float)
    assert stages(progress).tolist() == [0, 1, 1, 2, 2, 2]
    assert np.allclose(potential(progress), np.array([0, 1, 1.5, 2, 3, 2.5]) / 3)


def test_the_reward_is_never_positive_and_starts_afresh_with_every_episode():
    """Phi - 1 must lie in [-1, 0], and an episode must not know the one before."""
    source = DEF + "return images[:, 0, 0, 0] / 255"
    images = np.zeros((3, 8, 8, 3), np.uint8)
    images[:, 0, 0, 0] = (0, 255, 51)
    with ProgramReward([source, source]) as reward:
        first = reward.episode_rewards(images, images[0])
        again = reward.episode_rewards(images, images[0])
        assert np.allclose(first, [-1, 0, -0.4]) and np.array_equal(first, again)
        assert np.allclose(reward.predict(images), first)
        assert reward.episode_rewards(images, images[0], failed_end=True)[-1] == pytest.approx(-99.4)
        change = reward.episode_rewards(images, images[0], discount=0.9, differences=True)  # 0.9 Phi' - Phi
        assert np.allclose(change, [0, 0.9, 0.54 - 1])
        assert reward.predict(images[:0]).shape == (0,)


def test_standing_short_of_the_goal_circling_and_dawdling_earn_less_than_arriving():
    """The returns of four behaviours under Phi - 1 must rank as they should."""
    ways = {"arrive": np.r_[3:24:7, [24] * 17], "late": np.r_[[0] * 16, 3:24:7, 24],
            "stand": np.full(20, 20), "circle": np.tile([0, 20], 10)}
    with ProgramReward([DEF + "return images.any(axis=(1, 3)).argmax(axis=1) / 24"]) as reward:
        total = {name: reward.episode_rewards(square(way), square([0])[0]).sum() for name, way in ways.items()}
    assert max(total, key=total.get) == "arrive" and total["arrive"] > total["stand"] > total["circle"]


# ---- code_as_reward.py, part 2: the sandbox ----
ONES = "return np.ones(len(images))"


@pytest.mark.parametrize("source, kind", [
    ("import os\n" + DEF + ONES, "rejected"),
    (DEF + "open('/tmp/x', 'w')\n    " + ONES, "rejected"),
    (DEF + "return ().__class__.__base__.__subclasses__()", "rejected"),
    (DEF + "while True: pass", "timeout"),
    (DEF + "return np.ones(10**10)", "error"),  # 80 GB
    (DEF + "return np.full(len(images), np.nan)", "output"),
    (DEF + "return np.ones(len(images) - 1)", "output"),
    ("I am sorry, I cannot do that.", "error"),
])
def test_what_a_program_must_not_do_ends_as_a_verdict(source, kind):
    """Imports, files and the way to Python's inside are refused unread; time, memory and a wrong output are noticed."""
    program = Program(source, seconds=0.7 if kind == "timeout" else 60)
    with pytest.raises(ProgramError) as error:
        program(BLACK, BLACK[0])
    program.close()
    assert error.value.kind == kind


def test_a_program_sees_no_environment(monkeypatch):
    """No variable of ours, least of all a key, must reach the child."""
    monkeypatch.setenv("OPENAI_API_KEY", "not-a-real-key")
    program = Program(DEF + ONES)
    program(BLACK, BLACK[0])
    if os.getuid() == 0 or os.access(f"/proc/{program.process.pid}/environ", os.R_OK):
        assert b"not-a-real-key" not in pathlib.Path(f"/proc/{program.process.pid}/environ").read_bytes()
    program.close()


def test_nothing_a_program_stores_survives_the_batch():
    """A counter in a global list must start at zero in every call, and 76 MB of each batch must be given back."""
    counting = "seen = []\nBIG = np.ones(10**7)\n" + DEF + "seen.append(1)\n    return np.full(len(images), len(seen) / 10)"
    program = Program(counting)
    assert [program(BLACK, BLACK[0])[0] for _ in range(40)] == pytest.approx([0.1] * 40)
    assert len(os.listdir(f"/proc/{program.process.pid}/task")) == 1  # BLAS has started no threads
    program.close()


def test_programs_of_one_image_and_of_a_batch_are_both_run():
    """The first argument's name, image or images, must decide how a program is called."""
    images = np.arange(4, dtype=np.uint8)[:, None, None, None] * np.full((1, 8, 8, 3), 20, np.uint8)
    each = "def progress(image, first_image):\n    return image.mean() / 255"
    batch = "def progress(images, first_image):\n    return images.mean(axis=(1, 2, 3)) / 255"
    with ProgramReward([each, batch]) as reward:
        one, other = reward.progress(images, images[0]).T
    assert np.allclose(one, other) and np.allclose(one, np.arange(4) * 20 / 255)
