"""Every claim the other files make, tested: no key, no network beyond loopback, no GPU.

    python -m pytest -q test_components.py

One section per component, in the README's order. A test's name is the claim it proves. Tests that need OpenGL skip
with the line that installs it; the continuous integration installs it, so there they run.
"""
import ast
import base64
import concurrent.futures
import contextlib
import copy
import csv
import dataclasses
import email.utils
import fcntl
import gzip
import http.server
import importlib.util
import inspect
import itertools
import json
import math
import multiprocessing
import os
import pathlib
import pickle
import re
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import types
import urllib.error
import urllib.request
import warnings
import zlib
from pathlib import Path

import gymnasium
import imageio.v3 as imageio
import numpy as np
import pytest
import requests
import torch
from PIL import Image
from gymnasium.utils.env_checker import check_env
from scipy.stats import spearmanr

import audit_vlm
import bench
import cached_labels
import clip_reward
import code_as_reward
import cuda_graph
import deformables
import envs
import hack_search
import offline_vlm
import plots
import report
import reward_model
import run
import sac
import score_reward
import sweep
import train
import vlm_query
from code_as_reward import (
    CodeAsRewardError,
    Program,
    ProgramError,
    ProgramReward,
    describe_subtasks,
    extract_code,
    learn_programs,
    load_programs,
    potential,
    stages,
    verify,
)
from offline_vlm import OfflineVLM
from tasks import schedules
from tools import draw_tasks
from vlm_query import LabelLog, LimitReached, Reply, VLM, VLMError, label_pairs, parse_label

torch.set_num_threads(1)  # the networks are small: threads would only get into each other's way


# ==== sac.py ====
def box(n):
    return gymnasium.spaces.Box(-1.0, 1.0, (n,), np.float32)


def filled_buffer(capacity, adds, image_shape=None, priced=True):
    """A buffer in which row contents say when they were added: obs = reward = number of the add."""
    buffer = sac.ReplayBuffer(capacity, (1,), (1,), image_shape)
    for number in range(adds):
        image = None if image_shape is None else np.full(image_shape, number % 256, np.uint8)
        buffer.add([number], [0.0], [number + 1], False, image, float(number))
        if priced:
            buffer.price([float(number)])
    return buffer


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


class FivesEverywhere(torch.nn.Module):
    """A target critic that values everything at 5 and cannot be moved."""

    def forward(self, obs, action=None):
        return torch.full((2, len(obs)), 5.0)


@pytest.mark.parametrize("terminated, expected", [(1.0, 2.0), (0.0, 2.0 + 0.9 * 5.0)])
def test_only_termination_stops_the_bootstrap(terminated, expected):
    """The critics' target must be r when terminated, and r + discount * V' when merely cut off by a time limit."""
    agent = sac.SAC(1, box(1), hidden=(8,), lr=3e-2, discount=0.9)
    agent.log_alpha.data.fill_(-100.0)  # no entropy term
    agent._value_of = lambda critic, obs, policy, real=agent._value_of: real(
        FivesEverywhere() if critic is agent.target else critic, obs, policy)
    batch = {"obs": torch.zeros(32, 1), "action": torch.zeros(32, 1), "reward": torch.full((32,), 2.0),
             "next_obs": torch.zeros(32, 1), "terminated": torch.full((32,), terminated)}
    for _ in range(150):
        q = agent.update(batch)["q_mean"]
    assert float(q) == pytest.approx(expected, abs=0.1)


@pytest.mark.parametrize("reset", [False, True])
def test_target_follows_by_tau(reset):
    """After one update every target weight must be (1 - tau) old + tau new critic weight; those of new critics too."""
    agent = sac.SAC(2, box(1), hidden=(8,), tau=0.25)
    if reset:
        agent.reset_critic()
    before = [p.clone() for p in agent.target.parameters()]
    agent.update(filled_batch(16))
    for old, now, critic in zip(before, agent.target.parameters(), agent.critic.parameters()):
        assert torch.allclose(now, 0.75 * old + 0.25 * critic, atol=1e-6)


def filled_batch(size, seed=0):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    return {"obs": draw(size, 2), "action": draw(size, 1).tanh(), "reward": draw(size), "next_obs": draw(size, 2),
            "terminated": torch.zeros(size)}


def test_actor_step_leaves_critic_gradients_untouched():
    """The gradients left in the critics must be those of the critic loss alone."""
    agent = sac.SAC(2, box(1), hidden=(8,))
    seen = []
    step = agent.critic_optimizer.step
    agent.critic_optimizer.step = lambda: (seen.extend(p.grad.clone() for p in agent.critic.parameters()), step())
    agent.update(filled_batch(16))
    assert all(torch.equal(a, p.grad) for a, p in zip(seen, agent.critic.parameters()))
    assert all(p.requires_grad for p in agent.critic.parameters())


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


def test_unpriced_rows_are_never_sampled():
    """Rows without a reward must not be drawn; all priced ones must be; and pricing makes the rest available."""
    buffer = filled_buffer(8, 6, image_shape=(1, 1, 3))
    for number in (6, 7, 8):  # the last of these overwrites the oldest row
        buffer.add([number], [0.0], [0.0], False, np.full((1, 1, 3), number, np.uint8), 0.0)
    assert set(buffer.sample(500)["obs"][:, 0].tolist()) == {1, 2, 3, 4, 5}
    assert set(buffer.sample(500, unpriced_too=True)["obs"][:, 0].tolist()) == set(range(1, 9))
    assert buffer.relabel(lambda images: images[:, 0, 0, 0].astype(np.float32), only_new=True) == 3
    drawn = buffer.sample(500)
    assert set(drawn["obs"][:, 0].tolist()) == set(range(1, 9)) and torch.equal(drawn["reward"], drawn["obs"][:, 0])


def test_sampling_nothing_says_so():
    """A buffer without a priced row must raise, not loop or return NaN."""
    with pytest.raises(ValueError, match="nothing to sample: 2 rows stored, 2 of them without a reward"):
        filled_buffer(4, 2, priced=False).sample(1)


def test_a_mapped_buffer_outlives_its_object(tmp_path):
    """Arrays in a folder plus state_dict must give the same buffer back, drawing the same rows next."""
    first = sac.ReplayBuffer(4, (1,), (1,), (1, 1, 3), folder=tmp_path)
    for number in range(3):
        first.add([number], [0.5], [0.0], number == 2, np.full((1, 1, 3), number, np.uint8), 0.0)
    first.price([7.0, 8.0, 9.0])
    state, drawn = first.state_dict(), first.sample(10)
    second = sac.ReplayBuffer(4, (1,), (1,), (1, 1, 3), folder=tmp_path)
    second.load_state_dict(state)
    assert all(torch.equal(a, b) for a, b in zip(drawn.values(), second.sample(10).values()))
    with pytest.raises(ValueError, match="belongs to another run"):
        sac.ReplayBuffer(5, (1,), (1,), (1, 1, 3), folder=tmp_path)


@pytest.mark.skipif(not os.path.exists("/proc/self/smaps"), reason="mapped memory is read from /proc: run it on Linux")
def test_relabelling_holds_no_more_than_a_piece_of_the_pictures_in_memory(tmp_path):
    """2,000 pictures of 12 KB are 25 MB; while they are relabelled, 100 at a time, 3 MB must do."""
    buffer = sac.ReplayBuffer(2000, (1,), (1,), (64, 64, 3), str(tmp_path))
    buffer.image[:], buffer.added = 7, 2000
    held = []

    def reward_fn(images):
        held.append(sum(bench.mapped_memory(os.getpid(), str(tmp_path)).values()))
        return np.zeros(len(images), np.float32)

    buffer.relabel(reward_fn, chunk=100)
    assert len(held) == 20 and held[0] > 20e6 and max(held[1:]) < 3e6  # at first, what was just written


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


def test_a_share_of_discrete_actions_is_uniform_however_sure_the_policy_is():
    """With all probability on action 0, the other three of four must still be taken in 3.75 % of 4,000 steps."""
    agent = sac.SAC(2, gymnasium.spaces.Discrete(4), hidden=(8, 8))
    with torch.no_grad():
        agent.actor[-1].bias += torch.tensor([100.0, 0, 0, 0])
    taken = np.bincount([agent.act(np.zeros(2)) for _ in range(4000)], minlength=4) / 4000
    assert taken[1:].sum() == pytest.approx(0.75 * sac.RANDOM_SHARE, abs=0.012) and taken[1:].min() > 0
    assert {agent.act(np.zeros(2), explore=False) for _ in range(20)} == {0}


def test_reset_critic_forgets_values_and_keeps_the_actor():
    """The critics must change and agree with their targets; the actor must stay as it was."""
    agent = sac.SAC(2, box(1), hidden=(8,))
    actor, critic = agent.actor[0].weight.clone(), agent.critic.q1[0].weight.clone()
    agent.reset_critic()
    assert torch.equal(actor, agent.actor[0].weight) and not torch.equal(critic, agent.critic.q1[0].weight)
    assert all(torch.equal(a, b) for a, b in zip(agent.critic.parameters(), agent.target.parameters()))


def test_the_first_temperature_is_the_one_that_was_asked_for():
    """1 must be 1 in the first update, and a tenth where nothing is said."""
    for alpha, expected in (({"alpha": 1.0}, 1.0), ({}, 0.1)):
        assert float(sac.SAC(2, box(1), hidden=(8,), **alpha).log_alpha.detach().exp()) == pytest.approx(expected)


@pytest.mark.parametrize("space", [box(1), gymnasium.spaces.Discrete(3)])
def test_a_saved_agent_goes_on_identically(space):
    """state_dict must hold everything: two agents must act and learn alike from there on."""
    agents = [sac.SAC(2, space, hidden=(8,), seed=seed) for seed in (0, 1)]
    batch = filled_batch(16)
    if hasattr(space, "n"):
        batch["action"] = torch.arange(16) % 3
    agents[0].update(batch)
    agents[1].load_state_dict(agents[0].state_dict())
    for agent in agents:
        agent.update(batch)
    assert np.array_equal(agents[0].act([0.1, 0.2]), agents[1].act([0.1, 0.2]))
    assert torch.equal(agents[0].log_alpha, agents[1].log_alpha)


def test_wrong_action_spaces_are_refused():
    """A space that SAC cannot act in must be named in the error."""
    with pytest.raises(ValueError, match="Box or Discrete"):
        sac.SAC(2, gymnasium.spaces.MultiBinary(3))


@pytest.mark.parametrize("discrete", [False, True])
@pytest.mark.parametrize("bfloat16", [False, True])
def test_sac_learns_a_point_mass(discrete, bfloat16):
    """A point that should be moved to 0 (reward -|x|) must end nearer to it than under random actions."""
    space, rng = gymnasium.spaces.Discrete(3) if discrete else box(1), np.random.default_rng(0)
    agent = sac.SAC(1, space, hidden=(32, 32), lr=3e-3, discount=0.9, bfloat16=bfloat16)
    buffer, x = sac.ReplayBuffer(800, (1,), () if discrete else (1,)), 1.0

    def move(x, action):
        return float(np.clip(x + 0.3 * (action - 1 if discrete else action[0]), -2, 2))

    for step in range(600):
        x = rng.uniform(-2, 2) if step % 10 == 0 else x
        action = agent.act([x])
        new = move(x, action)
        buffer.add([x], action, [new], False, None, 0.0)
        buffer.price([-abs(new)])
        x = new
        if step > 100:
            agent.update(buffer.sample(64))
    ends = []
    for x in (-1.5, -0.7, 0.8, 1.6):
        for _ in range(8):
            x = move(x, agent.act([x], explore=False))
        ends.append(abs(x))
    assert np.mean(ends) < 0.25  # random actions: about 1


class FakeGraph:
    """What cuda_graph.Recorded asks of its users, on a CPU: the same shapes every time, results that get overwritten."""

    def __init__(self, function, device, generator=None):
        self.function, self.shapes, self.outputs, self.calls = function, None, None, 0

    def __call__(self, *tensors):
        shapes, new = [tensor.shape for tensor in tensors], self.function(*tensors)
        assert self.shapes in (None, shapes)
        self.shapes, self.calls = shapes, self.calls + 1
        if self.outputs is None:
            self.outputs = new
        pairs = zip(*(x.values() if isinstance(x, dict) else x for x in (self.outputs, new)))
        for old, fresh in pairs:
            old.copy_(fresh)
        return self.outputs


def test_a_recorded_update_learns_the_same_and_whatever_replaces_a_tensor_records_anew():
    """record must change no number, and no replay may go on with critics, units or moments that are gone."""
    plain, recorded = (sac.SAC(2, box(1), hidden=(32, 32), record=record) for record in (None, FakeGraph))
    other, before = sac.SAC(2, box(1), hidden=(32, 32), seed=1).state_dict(), None
    for change in (lambda agent: None, lambda agent: agent.reset_critic(),
                   lambda agent: agent.standardise(np.eye(2)), lambda agent: agent.load_state_dict(other)):
        for agent in (plain, recorded):
            change(agent)
            values = [float(agent.update(filled_batch(16, seed))["q_mean"]) for seed in range(3)]
        assert recorded._recorded is not before and recorded._recorded.calls == 3 and len(set(values)) == 3
        assert all(torch.equal(a, b) for a, b in zip(plain.critic.parameters(), recorded.critic.parameters()))
        assert float(plain.update(filled_batch(16))["q_mean"]) == float(recorded.update(filled_batch(16))["q_mean"])
        before, recorded._recorded.calls = recorded._recorded, 0


def test_a_recorded_fit_learns_the_same_also_from_a_last_batch_that_is_smaller():
    """record must change no number of a fit. A replay goes on with the tensors it knows: a fit must not replace them."""
    images, angle = reward_model.demo_pictures(60, np.random.default_rng(0))
    data = reward_model.PreferenceDataset(40, images.shape[1:])  # 35 to fit: batches of 16, 16 and 3
    data.add(images[:40], images[20:], (abs(angle[20:]) < abs(angle[:40])).astype(int))
    plain, recorded = (reward_model.RewardModel(images.shape[1:], record=record) for record in (None, FakeGraph))
    tensors = []
    for _ in range(2):
        assert plain.fit(data, epochs=2) == recorded.fit(data, epochs=2)
        assert np.array_equal(plain.predict(images), recorded.predict(images))
        moments = (x for state in recorded.optimizer.state.values() for x in state.values())
        tensors.append([x.data_ptr() for x in (*recorded.nets.parameters(), *moments)])
    assert tensors[0] == tensors[1] and {size: step.calls for size, step in recorded._recorded.items()} == {16: 8, 3: 4}
    recorded.load_state_dict(plain.state_dict())  # the optimiser has others now
    assert plain.fit(data, epochs=2) == recorded.fit(data, epochs=2)
    assert {size: step.calls for size, step in recorded._recorded.items()} == {16: 4, 3: 2}


def test_fresh_networks_are_those_of_a_new_model():
    """New weights, and an optimiser without memory: as if nothing had been fitted before."""
    images, angle = reward_model.demo_pictures(40, np.random.default_rng(0))
    data = reward_model.PreferenceDataset(20, images.shape[1:])
    data.add(images[:20], images[20:], (abs(angle[20:]) < abs(angle[:20])).astype(int))
    used, new = (reward_model.RewardModel(images.shape[1:], seed=seed) for seed in (0, 1))
    used.fit(data, epochs=2)
    used.rng.bit_generator.state = new.rng.bit_generator.state
    assert used.fit(data, epochs=2) == new.fit(data, epochs=2)
    assert np.array_equal(used.predict(images), new.predict(images))


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: run it where there is one")


@needs_gpu
@pytest.mark.parametrize("discrete", [False, True])
def test_a_replayed_update_is_the_update(discrete):
    """On a GPU, forty recorded updates must give the weights of forty plain ones, to the bit; so must going on."""
    space = gymnasium.spaces.Discrete(3) if discrete else box(2)
    agents = [sac.SAC(4, space, device="cuda", record=record) for record in (None, cuda_graph.Recorded)]
    rng, buffer = np.random.default_rng(0), sac.ReplayBuffer(500, (4,), () if discrete else (2,))
    for _ in range(500):
        buffer.add(rng.normal(size=4), rng.integers(3) if discrete else rng.uniform(-1, 1, 2), rng.normal(size=4),
                   rng.random() < 0.1, None, 0.0)
        buffer.price([rng.normal()])
    batches = [buffer.sample(64) for _ in range(40)]
    for number, batch in enumerate(batches):
        if number == 20:
            for agent in agents:
                agent.reset_critic()
                agent.standardise(buffer.obs)
            state = copy.deepcopy(agents[1].state_dict())
        results = [agent.update(batch) for agent in agents]
        assert {name: float(x) for name, x in results[0].items()} == {name: float(x) for name, x in results[1].items()}
    went_on = sac.SAC(4, space, device="cuda", seed=5, record=cuda_graph.Recorded)
    went_on.load_state_dict(state)
    for batch in batches[20:]:
        went_on.update(batch)
    for one, two, three in zip(*(agent.critic.parameters() for agent in (*agents, went_on))):
        assert torch.equal(one, two) and torch.equal(one, three)
    with pytest.raises(AssertionError):
        agents[1].update(buffer.sample(32))


@needs_gpu
@pytest.mark.parametrize("answers", [34, 200])  # one whole batch of 30, or ten of 175
def test_a_replayed_fit_is_the_fit(answers):
    """On a GPU, a recorded fit must know as much as a plain one, its last and smaller batches included; so must the next."""
    images, angle = reward_model.demo_pictures(2 * answers, np.random.default_rng(0))
    data = reward_model.PreferenceDataset(answers, images.shape[1:])
    data.add(images[:answers], images[answers:], (abs(angle[answers:]) < abs(angle[:answers])).astype(int))
    for record in (None, cuda_graph.Recorded):
        model = reward_model.RewardModel(images.shape[1:], device="cuda", record=record)
        for _ in range(2):
            assert model.fit(data, epochs=40)["train_accuracy"] > 0.95 and model.accuracy(data, held_out=False) > 0.95


@needs_gpu
def test_a_function_that_draws_noise_draws_another_one_at_every_replay():
    """Recorded: the generator goes on, inputs are copied in, and what is written in place adds up."""
    noise, weight = torch.Generator("cuda").manual_seed(0), torch.zeros(3, device="cuda")

    def step(x):
        weight.add_(x)
        return weight.sum(), torch.rand(1, device="cuda", generator=noise)

    step = cuda_graph.Recorded(step, "cuda", noise)
    sums, draws = zip(*([float(x) for x in step(torch.full((3,), float(n)))] for n in range(8)))
    assert sums == (0, 3, 9, 18, 30, 45, 63, 84) and len(set(draws)) == 8


def test_in_half_the_bits_are_neither_observations_nor_values_nor_weights():
    """In bfloat16 only what is between the first layer and the last may be rounded."""
    agent, kinds = sac.SAC(2, box(1), hidden=(32, 32), bfloat16=True), []
    for layer in agent.critic.q1:
        if isinstance(layer, torch.nn.Linear):
            layer.register_forward_hook(lambda module, x, y: kinds.append(y.dtype))
    obs = torch.linspace(-1, 1, 2000)[:, None].repeat(1, 2)
    values = agent.critic(obs, obs[:, :1])[0]
    assert kinds == [torch.float32, torch.bfloat16, torch.float32]
    assert len(values.unique()) > 2 * len(values.bfloat16().unique())
    agent.reset_critic()
    agent.update(filled_batch(16))
    assert agent.critic.q1.bfloat16 and agent.target.q2.bfloat16 and agent.actor.bfloat16
    assert {p.dtype for p in (*agent.actor.parameters(), *agent.critic.parameters())} == {torch.float32}


def test_observations_are_seen_in_units_of_their_spread():
    """After standardise(), a shifted and scaled world must be acted in and learned from as the plain one is."""
    rng, box = np.random.default_rng(0), gymnasium.spaces.Box(-1, 1, (2,))
    agents, obs = [sac.SAC(3, box, hidden=(16, 16)) for _ in range(2)], rng.normal(size=(100, 3)).astype(np.float32)
    shift, scale = np.float32([5, -3, 0]), np.float32([0.1, 20, 1])
    agents[0].standardise(obs)
    agents[1].standardise(obs * scale + shift)
    batch = {"obs": torch.from_numpy(obs), "action": torch.rand(100, 2), "reward": torch.rand(100),
             "next_obs": torch.from_numpy(obs[::-1].copy()), "terminated": torch.zeros(100)}
    moved = {**batch, **{name: batch[name] * torch.from_numpy(scale) + torch.from_numpy(shift) for name in ("obs", "next_obs")}}
    losses = [float(agent.update(part)["critic_loss"]) for agent, part in zip(agents, (batch, moved))]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert np.allclose(agents[0].act(obs[0], explore=False), agents[1].act(obs[0] * scale + shift, explore=False), atol=1e-3)
    agents[0].standardise(np.ones((9, 3)))  # what never moved must not be blown up without bound
    assert float(agents[0].spread.max()) == pytest.approx(0.01)


# ==== reward_model.py ====
def numbered_images(n, size=64):
    """(n, size, size, 3) uint8: picture i has brightness i."""
    return np.broadcast_to(np.arange(n, dtype=np.uint8)[:, None, None, None], (n, size, size, 3)).copy()


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


def test_predict_does_not_depend_on_how_images_are_batched(monkeypatch):
    """All at once, in chunks and one by one must give the same rewards."""
    images = np.random.default_rng(0).integers(0, 255, (10, 64, 64, 3), np.uint8)
    model = reward_model.RewardModel((64, 64, 3))
    one_by_one = np.concatenate([model.predict(images[i : i + 1]) for i in range(10)])
    assert model.predict(images).dtype == np.float32
    assert np.allclose(model.predict(images), one_by_one, atol=1e-5)
    at_once = model.member_rewards(images)
    monkeypatch.setattr(reward_model, "PRICED_AT_ONCE", 3 * 4 * images[0].size)  # three pictures in float32
    assert np.allclose(model.member_rewards(images), at_once, atol=1e-5)


@pytest.mark.parametrize("how", reward_model.SAMPLERS)
def test_every_image_can_be_asked_about_and_none_against_itself(how):
    """No pair (i, i); where the choice does not follow a model, every image must turn up on both sides."""
    images, rng = numbered_images(12), np.random.default_rng(0)
    model = reward_model.RewardModel((64, 64, 3))
    pairs = np.concatenate([reward_model.sample_pairs(images, 40, rng, how, model) for _ in range(20)])
    assert pairs.shape == (800, 2) and (pairs[:, 0] != pairs[:, 1]).all()
    wanted = set(range(12)) if how in ("uniform", "best", "diverse") else set()
    assert wanted <= set(pairs[:, 0]) and wanted <= set(pairs[:, 1])


class TwoMinds:
    """Two members that agree on dark pictures and contradict each other on bright ones."""

    sharpness = 1.0

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


def test_half_of_the_best_pairs_are_among_the_best():
    """Of 50 pictures the ten with the highest reward must be asked about against each other in half of the pairs, and in no more."""
    images, rng = numbered_images(50), np.random.default_rng(0)

    class BrightIsGood:
        def predict(self, images):
            return images[:, 0, 0, 0].astype(np.float32)

    pairs = reward_model.sample_pairs(images, 200, rng, "best", BrightIsGood())
    assert (pairs >= 40).all(1).mean() == pytest.approx(0.5 + 0.5 * 0.2**2, abs=0.05)
    assert (pairs < 40).any(1).sum() > 80 and (pairs[:, 0] != pairs[:, 1]).all()


def test_diverse_pairs_ask_about_rare_pictures_as_often_as_about_frequent_ones():
    """Four bright pictures among 96 nearly black ones are all there is to see: they must be in most pairs, on both sides."""
    images, rng = np.zeros((100, 64, 64, 3), np.uint8), np.random.default_rng(0)
    images[:, 0, 0] = np.arange(100)[:, None] % 3
    images[96:] = np.array([60, 120, 180, 240])[:, None, None, None]
    pairs = reward_model.sample_pairs(images, 5, rng, "diverse")
    assert (pairs >= 96).any(1).sum() >= 4 and len({*pairs[pairs >= 96]}) == 4
    many = np.concatenate([reward_model.sample_pairs(images, 5, rng, "diverse") for _ in range(20)])
    assert 0.3 < (many[:, 0] >= 96).mean() / (many >= 96).any(1).mean() < 0.7
    points = np.array([[0.0], [1], [2], [10], [11]])
    assert set(reward_model.k_centers(points, 2, rng)) in ({0, 4}, {1, 4}, {2, 4}, {3, 0}, {4, 0})


def test_equal_pictures_are_not_asked_about_while_others_exist():
    """Among nine equal pictures and one other, every pair must hold the other; equal ones come only if all are equal."""
    images, rng = numbered_images(10), np.random.default_rng(0)
    images[:9] = 0
    assert (reward_model.sample_pairs(images, 10, rng) == 9).any(1).all()
    assert reward_model.sample_pairs(images[:9], 10, rng).shape == (10, 2)


def test_too_few_images_and_unknown_samplers_are_named():
    """One picture makes no pair; a mistyped sampler must list those there are."""
    with pytest.raises(ValueError, match="two images"):
        reward_model.sample_pairs(numbered_images(1), 1, np.random.default_rng(0))
    with pytest.raises(ValueError, match="uniform, disagreement"):
        reward_model.sample_pairs(numbered_images(3), 1, np.random.default_rng(0), "finest")


def test_preference_dataset_wraps_and_holds_out_every_eighth():
    """More answers than places must overwrite the oldest; every eighth must be held out of training."""
    data = reward_model.PreferenceDataset(16, (1, 1, 3))
    images = numbered_images(40, 1)
    data.add(images[:20], images[20:], np.arange(20) % 2)
    assert len(data) == 16 and sorted(data.first[:, 0, 0, 0]) == list(range(4, 20))
    assert sorted(data.first[data.rows(held_out=True), 0, 0, 0]) == [7, 15]
    seen = [x for first, *_ in data.batches(5, np.random.default_rng(0)) for x in first[:, 0, 0, 0]]
    assert sorted(seen) == [n for n in range(4, 20) if n % 8 != 7]


def test_unsure_answers_never_become_labels():
    """-1 and -2 must be refused at the door of the data set."""
    with pytest.raises(ValueError, match="leave out what is unsure"):
        reward_model.PreferenceDataset(4, (1, 1, 3)).add(numbered_images(1, 1), numbered_images(1, 1), [-1])


@pytest.mark.parametrize("first, second, label", [
    (np.ones((2, 8, 8, 3)), np.zeros((2, 8, 8, 3), np.uint8), [0, 1]), (np.zeros((2, 8, 8, 3), np.uint8), np.zeros((1, 8, 8, 3), np.uint8), [0, 1]),
    (np.zeros((2, 8, 8, 3), np.uint8), np.zeros((2, 8, 8, 3), np.uint8), [0])])
def test_pictures_that_do_not_fit_their_answers_are_refused(first, second, label):
    """Floats would be stored as zeros, and what has no partner silently dropped: both data sets must say so."""
    data = reward_model.PreferenceDataset(4, (8, 8, 3))
    with pytest.raises(ValueError, match="pictures must be"):
        data.add(first, second, label)
    assert len(data) == 0
    with pytest.raises(ValueError, match="pictures must be"):
        score_reward.ScoreDataset(4, (8, 8, 3)).add(first if first.dtype != np.uint8 else second, None, [0.5] * 3)


def test_the_reward_model_orders_pictures_it_has_not_seen():
    """Fitted to 60 answers about a pole, it must order unseen pictures of poles; the members must differ."""
    rng = np.random.default_rng(0)
    images, angle = reward_model.demo_pictures(200, rng)
    pairs = reward_model.sample_pairs(images, 60, rng)
    data = reward_model.PreferenceDataset(60, (64, 64, 3))
    data.add(images[pairs[:, 0]], images[pairs[:, 1]], (np.abs(angle[pairs[:, 1]]) < np.abs(angle[pairs[:, 0]])).astype(int))
    model = reward_model.RewardModel((64, 64, 3), lr=5e-4)
    result = model.fit(data, epochs=25)
    unseen, angle = reward_model.demo_pictures(200, rng)
    assert spearmanr(model.predict(unseen), -np.abs(angle)).statistic > 0.6
    assert result["train_accuracy"] > 0.8 and 0 <= result["heldout_accuracy"] <= 1
    assert model.member_rewards(unseen).std(0).mean() > 0.01


def test_fit_stops_early_and_refuses_an_empty_data_set():
    """Two answers that are easily told apart must not take all epochs; no answers must be said."""
    model, data = reward_model.RewardModel((64, 64, 3)), reward_model.PreferenceDataset(4, (64, 64, 3))
    with pytest.raises(ValueError, match="no answers to fit"):
        model.fit(data, 1)
    data.add(numbered_images(2) * 0, numbered_images(2) * 0 + 250, [1, 1])
    assert model.fit(data, epochs=200)["epochs"] < 200


def test_wrong_answers_are_not_learned_by_heart():
    """With one answer in five wrong, the held-out answers must end the fit early, and the truth must come out of it."""
    rng = np.random.default_rng(1)
    images, angle = reward_model.demo_pictures(400, rng)
    pairs = reward_model.sample_pairs(images, 300, rng)
    better = np.abs(angle[pairs[:, 1]]) < np.abs(angle[pairs[:, 0]])
    data = reward_model.PreferenceDataset(300, (64, 64, 3))
    data.add(images[pairs[:, 0]], images[pairs[:, 1]], (better ^ (rng.random(300) < 0.2)).astype(int))
    models = [reward_model.RewardModel((64, 64, 3), members=1, patience=patience) for patience in (3, 0)]
    epochs = [model.fit(data, 18)["epochs"] for model in models]
    unseen, angle = reward_model.demo_pictures(300, rng)
    listened, did_not = (spearmanr(model.predict(unseen), -np.abs(angle)).statistic for model in models)
    assert epochs[0] < epochs[1] - 5 and listened > 0.75 and listened > did_not + 0.05


def test_a_fit_reports_the_epoch_whose_networks_it_keeps(monkeypatch):
    """Where the second epoch surprises the held-out answers least, its loss and accuracy must be reported, not the last's."""
    model = reward_model.RewardModel((48, 48, 3), members=1, patience=1)
    data = reward_model.PreferenceDataset(40, (48, 48, 3))
    data.add(np.zeros((40, 48, 48, 3), np.uint8), np.zeros((40, 48, 48, 3), np.uint8), [0, 1] * 20)
    epochs, surprises = iter([(0.3, 0.6), (0.2, 0.7), (0.1, 0.8), (0.05, 0.9)]), iter([2.0, 1.0, 1.5, 1.6])
    monkeypatch.setattr(model, "one_epoch", lambda data: next(epochs))
    monkeypatch.setattr(model, "surprise", lambda data: next(surprises))
    fit = model.fit(data, 9)
    assert (fit["loss"], fit["train_accuracy"], fit["epochs"]) == (0.2, 0.7, 4)


@pytest.mark.parametrize("paper", (False, True))
def test_the_paper_s_fit_is_bounded_and_goes_on_where_ours_begins_afresh(paper):
    """P of the paper's tanh rewards cannot leave [0.12, 0.88], so its loss cannot pass 0.127; ours must. Ours refits new nets."""
    model = reward_model.RewardModel((64, 64, 3), lr=1e-3, paper=paper)
    data = reward_model.PreferenceDataset(32, (64, 64, 3))
    data.add(numbered_images(32) * 0, numbered_images(32) * 0 + 250, [1] * 32)
    loss = model.fit(data, epochs=30, stop_accuracy=1)["loss"]
    assert loss > 0.126 if paper else loss < 0.05
    assert (model.mean == 0) == paper
    again = model.fit(data, epochs=1, stop_accuracy=1)["loss"]
    assert again < 0.14 if paper else again > 2 * loss


def test_a_saved_reward_model_goes_on_identically():
    """state_dict of model and data must hold everything that a further fit depends on."""
    images, angle = reward_model.demo_pictures(20, np.random.default_rng(0))
    models = [reward_model.RewardModel((64, 64, 3), seed=seed) for seed in (0, 1)]
    data = [reward_model.PreferenceDataset(10, (64, 64, 3)) for _ in models]
    data[0].add(images[:10], images[10:], (np.abs(angle[10:]) < np.abs(angle[:10])).astype(int))
    models[0].fit(data[0], epochs=1)
    data[1].load_state_dict(data[0].state_dict())
    models[1].load_state_dict(models[0].state_dict())
    assert models[0].fit(data[0], epochs=2) == models[1].fit(data[1], epochs=2)
    assert np.array_equal(models[0].predict(images), models[1].predict(images))


def test_in_half_the_bits_the_order_is_learned_too_and_rewards_keep_all_their_bits():
    """A fit in bfloat16 must order unseen pictures, and 500 pictures of a turning pole must not share a few rewards."""
    images, angle = reward_model.demo_pictures(160, np.random.default_rng(0))
    data = reward_model.PreferenceDataset(80, (64, 64, 3))
    data.add(images[:80], images[80:], (np.abs(angle[80:]) < np.abs(angle[:80])).astype(int))
    model = reward_model.RewardModel((64, 64, 3), bfloat16=True)
    kinds = []
    model.nets[0].convolutions[0].register_forward_hook(lambda module, x, y: kinds.extend([x[0].dtype, y.dtype]))
    model.member_rewards(images[:2])
    assert kinds == [torch.bfloat16] * 2  # given so already: converted once, not by each member
    model.fit(data, epochs=8)
    unseen, angle = reward_model.demo_pictures(500, np.random.default_rng(1))
    reward = model.predict(unseen)
    assert spearmanr(reward, -np.abs(angle)).statistic > 0.8
    assert reward.dtype == np.float32 and len(np.unique(reward)) > 400  # rounded to 8 bits: at most 256 in an octave


def test_rewards_are_standardised_however_early_the_fit_stopped():
    """After one epoch, when networks hardly differ yet, rewards of the fitted pictures must have deviation 1."""
    images, angle = reward_model.demo_pictures(40, np.random.default_rng(0))
    data, model = reward_model.PreferenceDataset(20, (64, 64, 3)), reward_model.RewardModel((64, 64, 3))
    data.add(images[:20], images[20:], (np.abs(angle[20:]) < np.abs(angle[:20])).astype(int))
    model.fit(data, epochs=1)
    assert model.member_rewards(images).mean(0).std() < 0.3
    reward = model.predict(images)
    assert reward.mean() == pytest.approx(0, abs=1e-3) and reward.std() == pytest.approx(1, 1e-3)


def test_a_shifted_picture_is_the_same_picture_elsewhere():
    """A dot must be found within `most` pixels of where it was, anywhere in that range, on an unchanged background."""
    images = np.full((200, 20, 20, 3), 7, np.uint8)
    images[:, 10, 10] = 200
    moved = reward_model.shifted(images, 3, np.random.default_rng(0))
    assert moved.shape == images.shape and moved.dtype == np.uint8 and (moved.sum((1, 2, 3)) == images[0].sum()).all()
    place = np.argwhere(moved[..., 0] == 200)[:, 1:] - 10  # (200, 2)
    assert place.min(0).tolist() == [-3, -3] and place.max(0).tolist() == [3, 3]
    assert reward_model.shifted(images, 0, None) is images


def test_a_mirrored_picture_has_left_and_right_exchanged():
    """About half of the pictures must be turned, none changed otherwise, and a fit must see such views only if asked."""
    images = np.arange(40 * 2 * 3 * 3, dtype=np.uint8).reshape(40, 2, 3, 3)
    seen = reward_model.mirrored(images, np.random.default_rng(0))
    turned = [np.array_equal(now, before[:, ::-1]) for now, before in zip(seen, images)]
    same = [np.array_equal(now, before) for now, before in zip(seen, images)]
    assert all(a != b for a, b in zip(turned, same)) and 10 < sum(turned) < 30
    plain, mirroring = (reward_model.RewardModel((48, 48, 3), mirror=mirror) for mirror in (False, True))
    assert plain.views(images) is images and not np.array_equal(mirroring.views(images), images)


def test_where_a_goal_has_no_left_and_right_a_picture_is_worth_what_its_mirror_image_is():
    images = np.random.default_rng(0).integers(0, 256, (5, 48, 48, 3), np.uint8)
    plain, mirroring = (reward_model.RewardModel((48, 48, 3), mirror=mirror) for mirror in (False, True))
    assert np.allclose(mirroring.predict(images), mirroring.predict(images[:, :, ::-1]), atol=1e-5)
    halves = [plain.member_rewards(view) for view in (images, images[:, :, ::-1])]
    assert not np.allclose(*halves, atol=1e-5)
    assert np.allclose(mirroring.member_rewards(images), np.mean(halves, 0), atol=1e-5)


def test_answers_about_one_place_hold_at_another_if_pictures_are_shifted():
    """Fitted on longer bars at one place, the model must order bars elsewhere; unshifted, it does so less well."""
    def bars(n, corner):
        lengths, images = rng.permutation(n) * 20 // n + 4, np.zeros((n, 64, 64, 3), np.uint8)
        for image, length, (row, column) in zip(images, lengths, corner):
            image[row : row + 4, column : column + length] = 255
        return images, lengths

    surprise = []
    for shift in (0, 8):
        rng = np.random.default_rng(0)
        images, lengths = bars(120, [(30, 20)] * 120)
        data, model = reward_model.PreferenceDataset(60, (64, 64, 3)), reward_model.RewardModel((64, 64, 3), shift=shift)
        apart = lengths[:60] != lengths[60:]
        data.add(images[:60][apart], images[60:][apart], (lengths[60:] > lengths[:60])[apart].astype(int))
        model.fit(data, epochs=20)
        images, lengths = bars(120, rng.integers((22, 12), (39, 29), (120, 2)))
        surprise.append(1 - np.corrcoef(model.predict(images), lengths)[0, 1])
    assert surprise[1] < 0.5 * surprise[0]


# ==== score_reward.py ====
def test_score_loss_is_the_squared_error_on_the_scale_of_the_reward():
    """Scores 0, 1/2, 1 must pull towards -1, 0, 1; the documented examples must hold."""
    loss = score_reward.score_loss(torch.tensor([0.0, 0.0, 1.0]), torch.tensor([0.5, 1.0, 1.0]))
    assert float(loss) == pytest.approx(1 / 3)


def test_a_model_fitted_to_scores_orders_unseen_pictures_and_goes_on_identically():
    """200 scored poles must teach the order of unseen ones; every eighth only measures; a saved state must go on alike."""
    assert score_reward.demo() > 0.9
    images, angle = reward_model.demo_pictures(24, np.random.default_rng(0))
    data = [score_reward.ScoreDataset(16, (64, 64, 3)) for _ in range(2)]
    data[0].add(images, None, 1 - np.abs(angle) / 45)
    assert len(data[0]) == 16 and set(data[0].rows(held_out=True)) == {7, 15}
    assert np.allclose(data[0].score[:8], 1 - np.abs(angle[16:]) / 45)  # the ring went round
    data[1].load_state_dict(data[0].state_dict())
    fits = [score_reward.fit(reward_model.RewardModel((64, 64, 3)), each, epochs=2) for each in data]
    assert fits[0] == fits[1] and fits[0]["epochs"] == 2
    with pytest.raises(ValueError, match=r"in \[0, 1\]"):
        data[0].add(images[:1], None, [1.5])
    with pytest.raises(ValueError, match="no scores to fit"):
        score_reward.fit(reward_model.RewardModel((64, 64, 3)), score_reward.ScoreDataset(4, (64, 64, 3)), 1)


def test_score_reward_and_the_model_it_fits_can_be_copied_out_together(tmp_path):
    """The two files alone in a folder: the header's snippet must run."""
    for name in ("score_reward", "reward_model"):
        shutil.copy(f"{name}.py", tmp_path)
    subprocess.run([sys.executable, "-c", header_snippet("score_reward")], cwd=tmp_path, check=True, timeout=100)


# ==== vlm_query.py ====
KEY = "sk-very-secret-0123456789"
BRIGHT = vlm_query.SIGHT_GOAL


def gray(*values, size=32):
    """(N, size, size, 3) uint8 pictures of one grey each."""
    return np.stack([np.full((size, size, 3), value, np.uint8) for value in values])


def grays(pairs, seed=0):
    """`pairs` pairs of grey pictures, at least 10 levels apart, and the right labels."""
    rng = np.random.default_rng(seed)
    first = rng.integers(0, 120, pairs)
    second = first + 10 + rng.integers(0, 120, pairs)
    swap = rng.random(pairs) < 0.5
    first, second = np.where(swap, second, first), np.where(swap, first, second)
    return gray(*first), gray(*second), (second > first).astype(np.int8)


def quick(url, provider="offline/m", **settings):
    """A client that waits hundredths of seconds where it would wait seconds."""
    vlm = VLM(provider, url=url, **{"timeout": (2, 0.4), "key": KEY, **settings})
    vlm.backoff = 0.01
    return vlm


def says(text, end="complete"):
    """An ask() that always gives the same answer."""
    return lambda parts: Reply(text, end, 10, 1, False)


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


# fault of the stand-in -> what one pair, whose right label is 1, must come out as
FAULT_ROWS = {**dict.fromkeys(offline_vlm.TRANSIENT, (1, "label")),
              "wrong key": "check the key", "unknown model": "check the model's name",
              "quota gone": "waiting does not help",
              "empty choices": (-2, "no answer"), "cut off": (-2, "no answer"), "refusal": (-2, "no answer"),
              "think closed": (1, "label"), "think unclosed": (-2, "no answer"), "100% sure": (1, "label"),
              "half": (-2, "unreadable"), "minus sign": (-1, "unsure")}


@pytest.mark.parametrize("provider", ["openai/m", "gemini/m", "anthropic/m"])
@pytest.mark.parametrize("fault", offline_vlm.FAULTS)
def test_each_fault_has_the_outcome_that_the_table_names(fault, provider):
    """Passing faults must cost nothing but time, hopeless ones must stop at once, odd answers are no label."""
    server = OfflineVLM(faults=fault)
    server.hang = 1.0
    with server as url:
        vlm, records = quick(url, provider, timeout=(2, 0.2)), []
        if isinstance(FAULT_ROWS[fault], str):
            with pytest.raises(VLMError, match=FAULT_ROWS[fault]):
                label_pairs(vlm.ask, gray(9), gray(200), BRIGHT, log=records.append)
            assert server.requests.total() == 1 and not records
        else:
            labels, _ = label_pairs(vlm.ask, gray(9), gray(200), BRIGHT, log=records.append)
            assert (labels[0], records[0]["kind"]) == FAULT_ROWS[fault]
            again = 1 if fault in offline_vlm.TRANSIENT else 0
            assert server.requests.total() == len(records[0]["answers"]) * (1 + again)


def test_a_thousand_pairs_at_a_fault_rate_of_a_fifth_get_the_labels_of_a_good_day():
    """Every label must equal the right one, though one try in five meets a fault."""
    first, second, right = grays(1000)
    server = OfflineVLM(faults=0.2, seed=3)
    server.drip = 0.02
    with server as url:
        vlm = quick(url, timeout=(2, 0.2))
        labels, counts = label_pairs(vlm.ask, first, second, BRIGHT, stages=1, workers=16)
    assert (labels == right).all() and counts["asked"] == 1000
    assert server.requests.total() > 1150  # the faults did happen


def test_a_server_that_stays_down_is_no_answer_and_then_the_end_but_never_unsure():
    """After its deadline a question must count as "no answer"; most of a batch so must stop the run."""
    with OfflineVLM(faults=1.0) as url:
        vlm = quick(url, deadline=0.1, timeout=(2, 0.1))
        labels, counts = label_pairs(lambda parts: vlm.ask(parts), gray(1, 1), gray(200, 210), BRIGHT)
        assert list(labels) == [-2, -2] and counts["no_answer"] == 2 and counts["unsure"] == 0
        with pytest.raises(VLMError, match="gives no answer"):
            label_pairs(vlm.ask, gray(1, 2, 3, 4, 5), gray(*range(201, 206)), BRIGHT)


def test_no_stage_is_asked_twice_when_the_other_one_fails():
    """A failing second call must be repeated alone: the first, with the pictures, was paid for."""
    sent = []

    def ask(parts):
        sent.append(len(parts))
        return Reply("notes", "complete", 0, 0, False) if len(parts) > 1 else Reply("", "refused", 0, 0, False)

    labels, counts = label_pairs(ask, gray(1), gray(200), "g")
    assert sent == [5, 1] and counts["no_answer"] == 1 and list(labels) == [-2]


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


def test_a_second_run_asks_nothing(tmp_path):
    """With the cache of the first run, every answer must be there, also for a stand-in on another port."""
    first, second, right = grays(6)
    with OfflineVLM() as url:
        before = label_pairs(quick(url, cache=tmp_path).ask, first, second, BRIGHT)[0]
    server = OfflineVLM()
    with server as url:
        vlm = quick(url, cache=tmp_path)
        labels, counts = label_pairs(vlm.ask, first, second, BRIGHT)
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


def test_failures_are_never_cached_and_torn_files_are_asked_again(tmp_path):
    """What is in the cache must be an answer, whole."""
    parts = ["The goal is " + BRIGHT, "Image 1:", gray(1)[0]]
    server = OfflineVLM(faults="503 HTML")
    with server as url:
        assert quick(url, cache=tmp_path, deadline=0).ask(parts).end.startswith("unreachable: HTTP 503")
        assert list(tmp_path.iterdir()) == []
        vlm = quick(url, cache=tmp_path)
        text = vlm.ask(parts).text
        file, = tmp_path.iterdir()
        for damage in (file.read_bytes()[:50], b"\0" * 9, b"[]"):
            file.write_bytes(damage)
            assert vlm.ask(parts)[0::4] == (text, False)
        assert vlm.ask(parts)[0::4] == (text, True)


def test_the_cache_tells_models_bodies_and_servers_apart(tmp_path):
    """Another model, extra or URL must be asked anew."""
    server = OfflineVLM()
    with server as url:
        for settings in ({"provider": "local/a"}, {"provider": "local/b"}, {"provider": "openai/a"},
                         {"provider": "local/a", "extra": {"seed": 1}}, {"provider": "local/a"},
                         {"provider": "local/a", "url": url.replace("127.0.0.1", "localhost")}):
            quick(**{"url": url, "cache": tmp_path, **settings}).ask(["The goal is " + BRIGHT])
    assert server.requests.total() == 5


def test_an_answer_is_on_disk_and_in_the_log_before_its_label_is_used(tmp_path, monkeypatch):
    """Cache file, fsync and log line must come before label_pairs returns, per pair."""
    events = []
    monkeypatch.setattr(os, "fsync", lambda number, real=os.fsync: (real(number), events.append("sync")))
    monkeypatch.setattr(os, "replace", lambda a, b, real=os.replace: (real(a, b), events.append("file")))
    log = LabelLog(tmp_path / "labels.jsonl")
    with OfflineVLM() as url:
        label_pairs(quick(url, cache=tmp_path / "c").ask, gray(1), gray(200), BRIGHT, log=lambda record: (log.append(record), events.append(1)))
    assert events == ["sync", "file", "sync", "file", "sync", 1]
    record, = LabelLog.read(tmp_path / "labels.jsonl")
    assert record["label"] == 1 and len(record["answers"]) == 2 and "Image 1:" in record["answers"][0]


def test_keys_are_in_no_file_log_message_or_traceback(tmp_path, capfd, monkeypatch):
    """The key must not leave the request's header, even where the provider quotes it."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setitem(offline_vlm.HOPELESS, "wrong key", (401, "authentication_error", f"bad key {'x' * 280}{KEY}"))
    said = []
    with OfflineVLM(key="another") as url:
        log = LabelLog(tmp_path / "labels.jsonl")
        for broken in ({}, {"key": KEY + "\n"}, {"key": KEY + "\u2713"}, {"url": "http://127.0.0.1:9/v1"},
                       {"url": f"http://u:{KEY}@h/v1"}, {"url": f"http://h/v1?key={KEY}"}):
            try:
                vlm = VLM("openai/m", **{"url": url, "cache": tmp_path, "deadline": 0, **broken})
                said.append(repr(vlm) + str(label_pairs(vlm.ask, gray(1), gray(99), BRIGHT, log=log.append)))
            except VLMError as error:
                said.append(str(error) + repr(error.__context__) + repr(error.__cause__))
    assert len(said) == 6 and "[key]" in said[0] and not any("\n" in text for text in said[1:3])
    files = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    assert files and not any(KEY.encode() in text for text in files)
    assert KEY not in "".join(said) + "".join(capfd.readouterr())


def test_a_netrc_entry_does_not_replace_the_key(tmp_path, monkeypatch):
    """requests would put a ~/.netrc login in place of our Authorization header."""
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login a password b")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    server = OfflineVLM(key=KEY)
    with server as url:
        vlm = quick(url, "openai/m")
        vlm._session.trust_env = True  # as for any host but loopback
        assert vlm.ask(["The goal is " + BRIGHT]).end == "complete"


def test_a_proxy_in_the_environment_is_not_asked_for_loopback(monkeypatch):
    """The stand-in must be reached where the network goes through a proxy."""
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    with OfflineVLM() as url:
        assert quick(url, deadline=0).ask(["The goal is " + BRIGHT]).end == "complete"


class Pieces(http.server.BaseHTTPRequestHandler):
    """Answers zipped, in chunks of ten bytes; /moved sends elsewhere."""

    protocol_version, asked = "HTTP/1.1", []

    def log_message(self, *_):
        pass

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self.asked.append(self.path)
        moved = self.path.startswith("/moved")
        self.send_response(307 if moved else 200)
        self.send_header("Location", "/v1/chat/completions")
        self.send_header("Content-Encoding", "gzip")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        answer = {"choices": [{"message": {"content": "so: " + "0" * 5000}, "finish_reason": "stop"}]}
        code = gzip.compress(json.dumps(answer).encode())
        for piece in (code[i:i + 10] for i in range(0, len(code), 10)):
            self.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece))
        self.wfile.write(b"0\r\n\r\n")


def test_an_answer_in_pieces_is_put_together_and_no_redirect_is_followed():
    """Zipped and chunked bodies must arrive whole; a redirect could hand the key to a stranger."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Pieces) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        root = f"http://127.0.0.1:{server.server_port}"
        assert len(quick(root + "/v1", deadline=0).ask(["hi"]).text) == 5004
        with pytest.raises(VLMError, match="HTTP 307.*check the URL"):
            quick(root + "/moved", deadline=0).ask(["hi"])
        server.shutdown()
    assert Pieces.asked == ["/v1/chat/completions", "/moved/chat/completions"]


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


def test_no_body_holds_a_temperature_and_extra_is_merged_in_depth():
    """Current models refuse a temperature; extra must leave its neighbours alone."""
    assert "temperature" not in inspect.getsource(vlm_query).split('"""', 2)[2]  # after the header
    _, _, body = sent_by("gemini/m", extra={"generationConfig": {"seed": 1}})
    assert body["generationConfig"] == {"seed": 1} and "contents" in body
    assert vlm_query.merged({"a": {"b": 1, "c": 2}}, {"a": {"b": 3}}) == {"a": {"b": 3, "c": 2}}


def test_the_pixels_arrive_as_they_were():
    """The picture must be sent without loss: what the server decodes equals what went in."""
    image = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    assert (offline_vlm.image(vlm_query.png_base64(image), "image/png") == image).all()


def test_retry_after_is_understood_in_every_form():
    """Seconds, floats, dates and Gemini's retryDelay must be waited, nonsense must not."""
    wish = vlm_query.wait_wished
    assert wish({"retry-after": "7"}, {}) == 7 and wish({"retry-after": "0.5"}, {}) == 0.5
    date = email.utils.formatdate(time.time() + 30, usegmt=True)
    assert 25 < wish({"retry-after": date}, {}) <= 30
    assert wish({}, {"details": [{"@type": "x"}, {"retryDelay": "34.5s"}]}) == 34.5
    for nonsense in ("soon", "", "nan", "Mon, 99 Foo"):
        assert wish({"retry-after": nonsense}, {}) is None
    for odd in ([None], ["retryDelay"], {"retryDelay": 34}):  # what gateways pass through
        assert wish({}, {"details": odd}) is None
    assert wish({}, {}) is None and wish({"retry-after": "-3"}, {}) == 0
    assert wish({"retry-after-ms": "250", "retry-after": "1"}, {}) == 0.25


def test_one_thread_told_to_wait_makes_all_wait():
    """After a 429 with a hint, no thread may send before the hinted moment; past the deadline none waits."""
    server = OfflineVLM()
    with server as url:
        vlm = quick(url)
        vlm._judge(200, {}, "{}")
        vlm._not_before = time.monotonic() + 0.3
        began = time.monotonic()
        label_pairs(vlm.ask, *grays(4)[:2], BRIGHT, workers=4)
        assert 0.3 < time.monotonic() - began < 1.5
        vlm._not_before, vlm.deadline = time.monotonic() + 3600, 60
        assert "told to wait, 0 tries; 3600 s more" in vlm.ask(["The goal is " + BRIGHT + "!"]).end


def test_a_hint_sets_the_moment_before_which_nobody_asks():
    """The shared moment must come from the hint, for each provider's way to give it."""
    for provider in ("openai/m", "gemini/m", "anthropic/m"):
        with OfflineVLM(faults="429 hint") as url:
            vlm, began = quick(url, provider), time.monotonic()
            assert vlm.ask(["The goal is " + BRIGHT]).end == "complete"
            assert 0.04 < vlm._not_before - began < 0.5


def test_a_server_that_always_says_0_seconds_meets_the_deadline():
    """A hint of 0 leaves nothing to wait for: without a look at the clock it would be asked for ever."""
    vlm = VLM("local/m", url="http://127.0.0.1:1/v1", deadline=0.2)
    vlm.backoff, tries = 0.01, []
    vlm._post = lambda body: tries.append(1) or (429, {"retry-after": "0"}, "{}")
    began = time.monotonic()
    assert "past the deadline" in vlm.ask(["hi"]).end and time.monotonic() - began < 2 and 2 < len(tries) < 1000


@pytest.mark.parametrize("status, body, match", [
    (200, "<html><title>Log in</title></html>", "web page .Log in.: check the URL"),
    (200, '{"type": "error", "error": {"type": "authentication_error", "message": "no"}}', "HTTP 401"),
    (200, '{"error": {"code": 403, "message": "no"}}', "HTTP 403"), (403, '{"message": "No key found"}', "No key found"),
    (301, "", "check the URL"), (413, '{"detail": [{"msg": "too big"}]}', "too big"),
    (400, '[{"error": {"code": 400, "message": "API key not valid"}}]', "API key not valid"),
    (404, '{"error": "model \'x\' not found"}', "model 'x' not found.*check the model's name")])
def test_what_cannot_be_cured_by_asking_again_stops_with_the_providers_words(status, body, match):
    """Five shapes of error bodies, under any status, must end in one line that names the cure."""
    with pytest.raises(VLMError, match=match) as caught:
        VLM("local/m", url="http://127.0.0.1:1/v1")._judge(status, {}, body)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("status, body", [
    (200, '{"error": {"type": "overloaded_error", "message": "busy"}}'), (200, '{"choices": [{"mess'),
    (200, ""), (200, "[" * 200_000), (200, '{"error": {"code": "\u00b2", "message": "x"}}'), (500, "Error"), (408, ""), (409, ""), (529, "{}"), (502, "<html>"),
    (429, '{"error": {"status": "RESOURCE_EXHAUSTED", "message": "check your plan and billing details"}}')])
def test_what_may_pass_is_asked_again(status, body):
    """Overload in any dress must lead to a retry, Gemini's per-minute limit with its talk of billing too."""
    why, wish = VLM("local/m", url="http://127.0.0.1:1/v1")._judge(status, {}, body)
    assert why.startswith(f"HTTP {status} ") and wish is None


def test_thinking_and_refusals_are_read_in_each_format():
    """Thought parts must be left out, their tokens counted; a refusal under HTTP 200 is no answer."""
    parts = [{"text": "hm", "thought": True}, {"text": "1"}]
    usage = {"promptTokenCount": 5, "candidatesTokenCount": 2, "thoughtsTokenCount": 40}
    answer = {"candidates": [{"content": {"parts": parts}, "finishReason": "STOP"}], "usageMetadata": usage}
    assert vlm_query.gemini_read(answer) == ("1", "complete", 5, 42)
    assert vlm_query.gemini_read({"promptFeedback": {"blockReason": "SAFETY"}})[1] == "refused"
    answer["candidates"][0] = {"finishReason": "MAX_TOKENS"}
    assert vlm_query.gemini_read(answer)[:2] == ("", "cut off")
    content = [{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "0"}]
    usage = {"input_tokens": 1, "cache_read_input_tokens": 2, "output_tokens": 3}
    answer = {"content": content, "stop_reason": "end_turn", "usage": usage}
    assert vlm_query.anthropic_read(answer) == ("0", "complete", 3, 3)
    answer = {"choices": [{"message": {"content": ""}, "finish_reason": "length"}]}
    assert vlm_query.openai_read(answer)[1] == "cut off"
    assert vlm_query.gemini_read({"candidates": [{"finishReason": "RECITATION"}]})[1] == "refused"
    assert vlm_query.anthropic_read({"content": [], "stop_reason": "max_tokens"})[1] == "cut off"
    with OfflineVLM() as url:
        vlm = quick(url)
        assert vlm._read('{"error": {"code": "content_filter"}}')[1] == "refused"
        assert vlm._judge(400, {}, '{"error": {"code": "content_filter"}}') == ("", None)


@pytest.mark.parametrize("end", ["error", "abort", "network_error"])
def test_an_end_that_is_the_servers_fault_is_not_kept(tmp_path, end):
    """OpenRouter's "error" and vLLM's "abort" must be no answer, and must be asked again the next time."""
    body = {"choices": [{"message": {"content": "0"}, "finish_reason": end}], "usage": {"prompt_tokens": 5}}
    vlm = VLM("local/m", url="http://127.0.0.1:1/v1", cache=tmp_path)
    vlm._post = lambda _: (200, {}, json.dumps(body))
    assert vlm.ask(["hi"])[1:] == ("failed", 5, 0, False)
    body["choices"][0]["finish_reason"] = "stop"
    assert vlm.ask(["hi"]) == ("0", "complete", 5, 0, False) and vlm.ask(["hi"]).cached


@pytest.mark.parametrize("said, meant", [(float("nan"), 0), ([1], 0), ("x", 0), (-3, 0), (None, 0), (7.0, 7)])
def test_odd_token_counts_lose_no_answer(said, meant):
    """What is no number of tokens must count as none, and the answer that was paid for must come through."""
    body = {"choices": [{"message": {"content": "0"}, "finish_reason": "stop"}], "usage": {"prompt_tokens": said}}
    vlm = VLM("local/m", url="http://127.0.0.1:1/v1")
    vlm._post = lambda _: (200, {}, json.dumps(body))
    assert vlm.ask(["hi"]) == ("0", "complete", meant, 0, False)


@pytest.mark.parametrize("provider, body", [
    ("local/m", {"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": 2}}),
    ("gemini/m", {"usageMetadata": {"promptTokenCount": 5, "thoughtsTokenCount": 2}}),
    ("anthropic/m", {"content": [], "usage": {"input_tokens": 5, "output_tokens": 2}})])
def test_an_empty_answer_costs_what_it_says(provider, body):
    """Tokens of an answer without choices must be in the books, or max_usd would never be met."""
    vlm = VLM(provider, url="http://127.0.0.1:1/v1", key=KEY)
    vlm._post = lambda _: (200, {}, json.dumps(body))
    assert vlm.ask(["hi"]) == ("", "empty", 5, 2, False) and vlm.tokens_in == 5


@pytest.mark.parametrize("url", ["http://localhost:abc/v1", "http://localhost:99999/v1", "http://local host/v1",
                                 "http://.foo/v1", "http://[::1/v1", "localhost:8000/v1"])
def test_a_mistyped_url_is_refused_at_once(url):
    """None of these can ever answer: no waiting, no traceback."""
    with pytest.raises(VLMError, match="needs its server's URL"):
        VLM("local/m", url=url)


def test_answers_under_way_are_kept_when_another_question_ends_the_batch(tmp_path):
    """The quota ends while seven answers are on their way: they are paid for, so all must be in the cache."""
    first, second, _ = grays(11)
    vlm, asked = VLM("local/m", url="http://127.0.0.1:1/v1", cache=tmp_path), []

    def post(body):
        asked.append(body)
        if len(asked) == 8:
            time.sleep(0.05)
            return 429, {}, '{"error": {"code": "insufficient_quota", "message": "quota"}}'
        time.sleep(0.3)
        return 200, {}, '{"choices": [{"message": {"content": "0"}, "finish_reason": "stop"}]}'

    vlm._post, vlm._turns.limit = post, 8
    with pytest.raises(VLMError, match="the quota is used up"):
        label_pairs(vlm.ask, first, second, BRIGHT, stages=1)
    assert len(asked) == 8 and len(list(tmp_path.iterdir())) == 7


def test_whatever_goes_wrong_in_a_thread_is_heard():
    """SystemExit in an ask() must end label_pairs, not hang it; and nobody can ask with no threads."""
    first, second, _ = grays(3)
    with pytest.raises(SystemExit):
        label_pairs(lambda parts: sys.exit(3), first, second, BRIGHT)
    for wrong in ({"workers": 0}, {"stages": 3}):
        with pytest.raises(ValueError, match="stages must be 1 or 2, and workers at least 1"):
            label_pairs(says("1"), first, second, BRIGHT, **wrong)
    with pytest.raises(ValueError, match=r"pictures of one size.*\(3, 40, 40, 3\)"):
        label_pairs(says("1"), first, np.zeros((3, 40, 40, 3), np.uint8), BRIGHT)
    with pytest.raises(ValueError, match="float64"):
        label_pairs(says("1"), first / 255, second / 255, BRIGHT)


def test_stand_ins_that_differ_share_no_answers(tmp_path):
    """One that errs and one that does not must not answer for each other from one cache, under whatever name."""
    first, second, right = draw_poles(1, size=64)
    for mistakes, expected in ((1.0, 1 - right), (0.0, right)):
        with OfflineVLM(mistakes=mistakes) as url:
            assert label_pairs(quick(url, "offline", cache=tmp_path).ask, first, second, POLE)[0].tolist() == expected.tolist()
    assert OfflineVLM(faults="refusal").model != OfflineVLM().model == OfflineVLM(faults=0.2).model


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


@pytest.mark.parametrize("workers", [1, 8])
def test_a_limit_cuts_at_the_same_pair_for_any_number_of_threads(workers, tmp_path):
    """Which pairs are asked must depend on their order alone; a repeated run stops at the same pair."""
    first, second, right = grays(30)
    server = OfflineVLM(latency=0.002)
    with server as url:
        for repeat in range(2):
            vlm = quick(url, cache=tmp_path, max_calls=23)
            labels, counts = label_pairs(vlm.ask, first, second, BRIGHT, workers=workers)
            assert counts["limit"] == 19 and list(labels) == [*right[:11]] + [-2] * 19
        assert server.requests.total() == 22 and vlm.calls == 22
        vlm.ask(["The goal is " + BRIGHT])
        with pytest.raises(LimitReached, match="max_calls 23"):
            vlm.ask(["The goal is " + BRIGHT])


def test_the_spend_limit_holds_in_pair_order(tmp_path):
    """With max_usd the labels must be the same on every run, and the overshoot less than a block."""
    first, second, _ = grays(40)
    ends = []
    with OfflineVLM(latency=0.002) as url:
        for repeat in range(3):
            vlm = quick(url, max_usd=0.002, usd_per_mtok=(10, 0))
            vlm.block = 4
            labels, counts = label_pairs(vlm.ask, first, second, BRIGHT, stages=1, workers=2)
            ends.append(counts["limit"])
            assert label_pairs(vlm.ask, first, second, BRIGHT)[1]["asked"] == 0
    silent = VLM("local/m", url="http://127.0.0.1:1/v1", max_usd=1.0, usd_per_mtok=(10, 0))
    silent._post = lambda body: (200, {}, '{"choices": [{"message": {"content": "0"}, "finish_reason": "stop"}]}')
    silent.cache = tmp_path
    with pytest.raises(VLMError, match="does not say how many tokens.*use max_calls"):
        silent.ask(["hi"])
    assert len(list(tmp_path.iterdir())) == 1  # it was paid for, so it is kept
    per_pair = vlm.usd / counts["asked"]
    assert ends[0] == ends[1] == ends[2] > 0 and 0.002 <= vlm.usd <= 0.002 + 4 * per_pair


def test_the_sight_check_is_asked_at_every_start(tmp_path):
    """Neither a right nor a wrong answer may come from the cache: the server may be another one, or cured, by now."""
    with OfflineVLM() as url:
        for _ in range(2):
            vlm = quick(url, cache=tmp_path)
            vlm.check_sight()
            assert (vlm.calls, vlm.cached_calls) == (2, 0) and vlm.cache == tmp_path
    assert not list(tmp_path.iterdir())


def test_totals_survive_a_checkpoint():
    """state_dict must bring back everything that limits are measured by."""
    with OfflineVLM() as url:
        vlm = quick(url, usd_per_mtok=(1, 2))
        vlm.check_sight()
        other = quick(url, usd_per_mtok=(1, 2))
        other.load_state_dict(json.loads(json.dumps(vlm.state_dict())))
    assert other.usd == vlm.usd > 0 and other.calls == 2


def test_labels_do_not_depend_on_who_answers_first():
    """Answers that arrive in reverse order must land at their own pairs."""
    def ask(parts):
        time.sleep(0.03 * (10 - parts[3].max()) / 10)
        return Reply(str(parts[3].max() % 2), "complete", 0, 0, False)

    labels, _ = label_pairs(ask, gray(*[200] * 10), gray(*range(10)), "g", stages=1, workers=10)
    assert list(labels) == [0, 1] * 5


def test_eight_workers_are_almost_eight_times_as_fast():
    """Waiting must overlap: 8 pairs of two calls at 0.1 s."""
    first, second, _ = grays(8)
    seconds = []
    with OfflineVLM(latency=0.1) as url:
        for workers in (1, 8):
            vlm = quick(url, workers=workers, timeout=(2, 5))
            vlm._turns.limit, began = workers, time.monotonic()  # as after its first dozen answers
            label_pairs(vlm.ask, first, second, BRIGHT, workers=workers)
            seconds.append(time.monotonic() - began)
    assert seconds[0] / seconds[1] > 4


def test_a_fatal_error_wakes_the_threads_that_wait():
    """When the key is refused, nobody may go on sleeping towards a retry, and nothing new may begin."""
    with OfflineVLM(faults="quota gone") as url:
        vlm, began, order = quick(url), time.monotonic(), iter(range(99))
        real = vlm._send

        def send(body, deadline, stop):  # the first question sits in a long wait, the second one fails
            if next(order):
                time.sleep(0.1)
                return real(body, deadline, stop)
            vlm._wait(time.monotonic() + 50, time.monotonic() + 60, stop, "")

        vlm._send = send
        with pytest.raises(VLMError, match="waiting does not help"):
            label_pairs(vlm.ask, *grays(12)[:2], BRIGHT, workers=2)
    assert time.monotonic() - began < 5 and next(order) <= 4


def test_waits_double_up_to_a_minute_and_differ_between_threads(monkeypatch):
    """Full jitter: random() times 1, 2, 4, ... 60 seconds; a fixed wait would send all threads at once."""
    vlm, waits = VLM("local/m", url="http://127.0.0.1:9/v1"), []
    vlm._post = lambda body: (503, {}, "")

    def wait(moment, give_up, stop, why):
        waits.append(round(moment - time.monotonic(), 1))
        if len(waits) == 10:
            raise TimeoutError("enough")

    vlm._wait = wait
    monkeypatch.setattr(vlm_query.random, "random", lambda: 0.5)
    assert vlm.ask(["hi"]).end == "unreachable: enough"
    assert waits[1:] == [0.5, 1, 2, 4, 8, 16, 30, 30, 30]


def test_ctrl_c_ends_at_once_though_threads_wait_for_answers(tmp_path):
    """Nobody must have to wait for a server that takes two minutes."""
    for name, image in zip("ab", gray(20, 220)):
        vlm_query.iio.imwrite(tmp_path / f"{name}.png", image)
    server = OfflineVLM(latency=120)
    with server as url:
        command = [sys.executable, vlm_query.__file__, tmp_path / "a.png", tmp_path / "b.png", "--goal", BRIGHT]
        # trap: what a shell starts in the background (as a CI may) has Ctrl-C switched off, and its children as well
        process = subprocess.Popen([*command, "--vlm-url", url], stderr=subprocess.PIPE, text=True,
                                   preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
        while not server.last:
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=40)[1] == "vlm_query.py: stopped\n" and process.returncode == 2


def test_a_torn_last_line_is_dropped_and_the_next_record_starts_clean(tmp_path):
    """A crash in the middle of a line must cost that line only, and keep=N must cut after N records."""
    path = tmp_path / "labels.jsonl"
    log = LabelLog(path)
    for number in range(3):
        log.append({"n": number, "text": "\ud800\u2028\n"})
    log.close()
    with open(path, "ab") as file:
        file.write(b'{"n": 3, "te')
    assert [r["n"] for r in LabelLog.read(path)] == [0, 1, 2]
    LabelLog(path).append({"n": 4})
    assert [r["n"] for r in LabelLog.read(path)] == [0, 1, 2, 4]
    LabelLog(path, keep=2).close()
    assert [r["n"] for r in LabelLog.read(path)] == [0, 1]


@pytest.mark.parametrize("bad", [b"\x00\xff\xfe garbage\n", b"[1, 2]\n", b"[" * 100_000 + b"\n"])
def test_a_log_with_garbage_is_refused_and_left_as_it_is(tmp_path, bad):
    """Binary garbage must end in one line that names its place, and must not be cut away."""
    path = tmp_path / "labels.jsonl"
    path.write_bytes(b'{"a": 1}\n' + bad)
    for use in (LabelLog.read, LabelLog):
        with pytest.raises(VLMError, match="labels.jsonl: line 2 is not a label record"):
            use(path)
    assert path.read_bytes() == b'{"a": 1}\n' + bad


def test_the_oracle_orders_by_score_and_errs_as_often_as_told():
    """Ties must be -1; error_rate must flip that share of the others."""
    rng = np.random.default_rng(0)
    assert list(vlm_query.oracle_labels([0, 2, 1], [1, 1, 1], rng)) == [1, 0, -1]
    a, b = rng.random((2, 5000))
    wrong = vlm_query.oracle_labels(a, b, rng, 0.2) != (b > a)
    assert 0.17 < wrong.mean() < 0.23


def test_scores_of_single_pictures_follow_the_goal():
    """score_images must give brighter pictures higher scores, in one call or two."""
    with OfflineVLM() as url:
        for stages in (1, 2):
            scores, counts = vlm_query.score_images(quick(url).ask, gray(0, 51, 255), BRIGHT, stages)
            assert list(scores) == [0.0, 0.2, 1.0] and counts["scored"] == 3
    scores, _ = vlm_query.score_images(says("70"), gray(1), "g")
    assert np.isnan(scores).all() and vlm_query.parse_score("so: 0.25.") == 0.25


@pytest.mark.parametrize("bad", [np.zeros((2, 8, 8, 3)), np.zeros((8, 8, 3), np.uint8), [[1]]])
def test_pictures_of_a_wrong_shape_or_type_are_refused_at_the_door(bad):
    """The message must name what is wanted."""
    with pytest.raises(ValueError, match=r"\(N, H, W, 3\) uint8"):
        label_pairs(says("1"), bad, bad, "g")


def huge_png(path, side=20_000):
    """A small file whose header says side x side."""
    def chunk(kind, data):
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    header = side.to_bytes(4, "big") * 2 + bytes([8, 2, 0, 0, 0])
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 999)))


def test_the_command_line_labels_two_files_with_the_stand_in(tmp_path, capsys):
    """It must start the stand-in beside it, print what was seen, and decide."""
    files = [str(tmp_path / name) for name in ("dark.png", "light.png")]
    for file, image in zip(files, gray(20, 220)):
        vlm_query.iio.imwrite(file, image)
    assert vlm_query.main([*files, "--goal", BRIGHT]) == 0
    out = capsys.readouterr().out
    assert "mean brightness of 220" in out and "light.png is closer" in out


@pytest.mark.parametrize("first, flags, words", [
    ("text", (), "not a picture"), ("huge", (), "exceeds limit"), ("none", (), "not a picture"),
    ("light", ("--vlm", "openai/m"), "set OPENAI_API_KEY"), ("light", ("--vlm", "x/m"), "unknown VLM"),
    ("light", (), "knows only these goals")])
def test_mistakes_on_the_command_line_end_in_one_line_and_exit_code_2(tmp_path, capsys, monkeypatch, first, flags, words):
    """A text file, a bomb, a missing file, a missing key and an unknown goal must not end in a traceback."""
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    (tmp_path / "text.png").write_text("not a picture")
    huge_png(tmp_path / "huge.png")
    for name, image in zip(("dark.png", "light.png"), gray(20, 220)):
        vlm_query.iio.imwrite(tmp_path / name, image)
    with OfflineVLM() as url:
        flags = flags or ("--vlm-url", url)
        files = [str(tmp_path / f"{name}.png") for name in (first, "dark")]
        assert vlm_query.main([*files, "--goal", "to fly", *flags]) == 2
    out, err = capsys.readouterr()
    assert out == "" and words in err and err.count("\n") == 1, err


def test_of_a_gif_the_first_picture_is_taken(tmp_path):
    """A GIF of one picture or of several is a picture, and its width counts."""
    pictures = gray(20, 220, 90)
    for many in (pictures[:1], pictures):
        vlm_query.iio.imwrite(tmp_path / "a.gif", many)
        assert np.array_equal(vlm_query.load_image(tmp_path / "a.gif"), pictures[0])
    vlm_query.iio.imwrite(tmp_path / "wide.gif", np.zeros((2, 8, 6000, 3), np.uint8))
    with pytest.raises(VLMError, match="6000 x 8 pixels is too large"):
        vlm_query.load_image(tmp_path / "wide.gif")


def test_a_stand_in_by_another_name_is_no_vlm(tmp_path):
    """One that runs already, as offline/NAME, must be named as what it is in banner and folder."""
    config = run.Config(env="CartPole", vlm="offline/x", vlm_url="http://localhost:1/v1")
    assert run.who_labels(config) == "offline stand-in (not a VLM)"
    assert "offline_stand-in" in train.prepare(config)[0].out


def test_a_small_file_that_claims_to_be_huge_is_not_unpacked(tmp_path):
    """20,000 x 20,000 pixels must be refused by the header's numbers, in no time."""
    for side, words in ((5000, "5000 x 5000 pixels is too large"), (9000, "9000 x 9000"), (20_000, "exceeds")):
        huge_png(tmp_path / "huge.png", side)
        with pytest.raises(VLMError, match=words):
            vlm_query.load_image(tmp_path / "huge.png")


# ==== envs.py ====
BUILT_IN = ["CartPole", "DrawerOpen", "Soccer", "SweepInto"]
METAWORLD = BUILT_IN[1:]


@pytest.fixture(scope="module")
def env_of():
    """name -> an environment, made once; skips with the cure where OpenGL or a package is missing."""
    made = {}

    def get(name):
        try:
            if name not in made:
                made[name] = envs.make(name)
                made[name].reset(seed=0)
                made[name].image(84)
        except (ValueError, ModuleNotFoundError) as error:
            pytest.skip(str(error))
        return made[name]

    yield get
    for env in made.values():
        env.close()


def rollout(env, seed, steps=6):
    """Observations, rewards, infos and the last picture of a few random steps: all that an episode consists of."""
    rng = np.random.default_rng(seed)
    obs, info = env.reset(seed=seed)
    seen = [obs, [info["success"], info["progress"]]]
    for _ in range(steps):
        obs, reward, _, _, info = env.step(rng.uniform(-1, 1, env.action_space.shape))
        seen += [obs, [reward, info["success"], info["progress"]]]
    return np.concatenate(seen), env.image(84)


def test_every_task_has_a_goal_a_horizon_and_picture_sizes():
    """All that the other files look up must be there, for the paper's seven tasks and any later one."""
    assert set(envs.TASKS) >= {*BUILT_IN, "FoldCloth", "StraightenRope", "PassWater"}
    for name, task in envs.TASKS.items():
        assert task.goal.startswith("to ") and task.horizon >= 1, name
        assert 64 <= task.reward_image_size <= 100 <= task.vlm_image_size <= 720, name
        assert {"total_steps", "pairs_per_session", "feedback_every", "max_pairs"} <= set(schedules.OURS[name]), name
    assert set(schedules.PAPER) < set(schedules.OURS) == set(envs.TASKS)


@pytest.mark.parametrize("name", BUILT_IN)
def test_shapes_types_and_infos_are_as_promised(env_of, name):
    """Observations must be float32 (O,), actions Box(-1, 1), pictures square uint8, and the time limit truncates."""
    env = env_of(name)
    assert (env.goal, env.horizon) == (envs.TASKS[name].goal, envs.TASKS[name].horizon)
    actions = env.action_space
    assert actions.dtype == np.float32 and np.all(actions.high == 1) and np.all(actions.low == -1)
    obs, info = env.reset(seed=1)
    for _ in range(env.horizon):
        assert obs.dtype == np.float32 and env.observation_space.contains(obs)
        assert info["success"] in (0.0, 1.0) and isinstance(info["progress"], float)
        obs, reward, terminated, truncated, info = env.step(env.action_space.sample())
        assert not terminated and isinstance(reward, float)
    assert truncated
    for size in (84, 200):
        assert env.image(size).shape == (size, size, 3) and env.image(size).dtype == np.uint8
    assert env.render().shape == (300, 300, 3)


@pytest.mark.parametrize("name", BUILT_IN)
def test_reset_with_a_seed_determines_the_episode_whatever_came_before(env_of, name):
    """A resumed run must see the very episodes of one that never stopped: numbers and pixels, also in a fresh object."""
    env = env_of(name)
    first_numbers, first_picture = rollout(env, seed=5)
    rollout(env, seed=6, steps=20)
    fresh = envs.make(name)
    for again in (env, fresh):
        numbers, picture = rollout(again, seed=5)
        assert np.array_equal(numbers, first_numbers) and np.array_equal(picture, first_picture)
    fresh.close()


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


def test_the_cartpole_picture_shows_the_angle_and_not_the_position():
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


@pytest.mark.parametrize("name", METAWORLD)
def test_metaworld_pictures_hide_the_robot(env_of, name):
    """Moving the hand while the object lies still must not change one pixel; moving the object must."""
    env = env_of(name)
    start_obs, start = env.reset(seed=0)
    before = env.image(84)
    for _ in range(8):
        obs, *_, info = env.step(np.array([0, 0, 1, 1], np.float32))  # straight up, away from everything
    assert info["progress"] == pytest.approx(start["progress"], abs=2e-3)  # it is the object's alone
    assert np.linalg.norm(obs[:3] - start_obs[:3]) > 0.04 and np.allclose(obs[4:6], start_obs[4:6], atol=2e-3)
    env.unwrapped.sim.data.qpos[9:] = env.unwrapped.start[1:][9 : env.unwrapped.sim.model.nq]  # the object, exactly
    env.unwrapped.mujoco.mj_forward(env.unwrapped.sim.model, env.unwrapped.sim.data)
    assert np.array_equal(before, env.image(84))
    env.unwrapped.sim.data.qpos[9 if name != "DrawerOpen" else -1] -= 0.05
    env.unwrapped.mujoco.mj_forward(env.unwrapped.sim.model, env.unwrapped.sim.data)
    assert (before != env.image(84)).any(axis=2).mean() > 0.005


@pytest.mark.parametrize("size", [84, 300])
@pytest.mark.parametrize("name", METAWORLD)
def test_what_stands_still_is_drawn_once_and_nobody_can_tell(env_of, name, size):
    """MuJoCo's own renderer, which draws everything every time, must give the same pictures, to the last bit."""
    env = env_of(name)
    sim, mujoco, flags = env.unwrapped.sim, env.unwrapped.mujoco, env.unwrapped.mujoco.mjtRndFlag
    obs, _ = env.reset(seed=0)
    first = env.image(size)
    renderer = mujoco.Renderer(sim.model, size, size)
    for flag in (flags.mjRND_SHADOW, flags.mjRND_REFLECTION, flags.mjRND_SKYBOX, flags.mjRND_HAZE, flags.mjRND_FOG):
        renderer.scene.flags[flag] = False
    for step in range(24):  # the object on its way, at the goal, and where chance brings it
        obs, *_ = env.step(envs.expert(env)(obs) if step < 18 else env.action_space.sample())
        renderer.update_scene(sim.data, env.unwrapped.camera, env.unwrapped.options)
        assert np.array_equal(env.image(size), renderer.render())
    assert not np.array_equal(first, env.image(size))
    renderer.close()


@pytest.mark.parametrize("name", METAWORLD)
def test_metaworld_observations_contain_the_goal(env_of, name):
    """The last three numbers must be the goal's place after a step too (Meta-World clips them to 0 by default)."""
    env = env_of(name)
    env.reset(seed=0)
    obs, *_ = env.step(np.zeros(4, np.float32))
    assert np.allclose(obs[36:39], env.unwrapped.sim._target_pos) and obs[37] > 0.5


def test_the_drawer_is_closed_at_the_start(env_of):
    """The paper's environment sometimes began with an open drawer; ours must begin 19 cm short of the goal."""
    env = env_of("DrawerOpen")
    _, info = env.reset(seed=0)
    assert info["success"] == 0 and info["progress"] == pytest.approx(-0.19, abs=0.002)


@pytest.mark.parametrize("name", BUILT_IN)
def test_experts_reach_the_goal_and_random_actions_do_not(env_of, name):
    """The expert's episode must end in success, nearer to the goal than a random one and with a larger true return."""
    env, ends = env_of(name), {}
    for who, policy in (("expert", envs.expert(env)), ("random", lambda obs: env.action_space.sample())):
        env.action_space.seed(0)
        obs, info = env.reset(seed=0)
        total = 0.0
        for _ in range(env.horizon):
            obs, reward, _, _, info = env.step(policy(obs))
            total += reward
        ends[who] = (info["success"], info["progress"], total)
    assert ends["expert"][0] == 1 and ends["random"][0] == 0
    assert ends["expert"][1] > ends["random"][1] and ends["expert"][2] > ends["random"][2]


class Odd(gymnasium.Env):
    """A foreign environment: 2-D float64 observations, an action range of its own, oblong pictures."""

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
        picture = np.zeros((40, 100, 3), np.uint8)
        picture[:, 30:70] = 200
        return picture


@pytest.fixture(scope="module", autouse=True)
def odd_id():
    gymnasium.register("Odd-v0", entry_point=Odd, max_episode_steps=9)
    yield
    del gymnasium.registry["Odd-v0"]


def test_any_gymnasium_id_gets_the_same_face():
    """Flat float32 observations, actions in [-1, 1], square pictures of all of it, reward as progress, its own limit."""
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


def test_an_environment_without_a_limit_of_its_own_gets_one(tmp_path, monkeypatch):
    """Named by its module, an id is not registered before it is made; its episodes must end all the same."""
    (tmp_path / "odd_module.py").write_text("import gymnasium\ngymnasium.register('Endless-v0', "
                                            "entry_point='gymnasium.envs.classic_control:PendulumEnv')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert envs.make("odd_module:Endless-v0", goal="g").horizon == 1000
    env = envs.make("odd_module:Endless-v0", goal="g", horizon=2)
    env.reset(seed=0)
    assert [env.step(env.action_space.sample())[3] for _ in range(2)] == [False, True] and env.horizon == 2


def test_kill_ends_a_run_that_sdl_draws():
    """SDL draws Gymnasium's classic tasks and would catch SIGTERM: kill, docker and Slurm would wait in vain."""
    code = ("import envs, os, signal\nenv = envs.make('Pendulum-v1', goal='up')\nenv.reset(seed=0)\nenv.image(50)\n"
            "os.kill(os.getpid(), signal.SIGTERM)\nprint('still here')")
    environment = {name: value for name, value in os.environ.items() if name != "SDL_NO_SIGNAL_HANDLERS"}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=100,
                            cwd=Path(__file__).parent)
    assert result.returncode == -signal.SIGTERM, result


def test_discrete_actions_that_start_elsewhere_are_counted_from_0():
    """The learner's 0 must arrive as the space's first action."""
    class Late(Odd):
        got = []

        def __init__(self, render_mode=None):
            super().__init__(render_mode)
            self.action_space = gymnasium.spaces.Discrete(3, start=1)

        def step(self, action):
            Late.got.append(action)
            return super().step(np.zeros(1, np.float32))

    gymnasium.register("Late-v0", entry_point=Late, max_episode_steps=9)
    env = envs.make("Late-v0", goal="to be late")
    env.reset(seed=0)
    for action in range(env.action_space.n):
        env.step(action)
    assert Late.got == [1, 2, 3] and env.action_space == gymnasium.spaces.Discrete(3)
    del gymnasium.registry["Late-v0"]


@pytest.mark.parametrize("name", ["CartPole", "DrawerOpen"])
def test_our_environments_keep_gymnasiums_promises(name, env_of):
    """check_env, drawing included, must find nothing in what TaskEnv wraps."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it would like observations to be bounded
        check_env(env_of(name).unwrapped, skip_close_check=True)


def test_what_ends_by_itself_in_its_last_step_is_not_cut_off():
    """FoldCloth's only step terminates; Gymnasium's time limit says truncated too, and must not be heard."""
    env = envs.make("FoldCloth")
    env.reset(seed=0)
    assert env.step(env.action_space.sample())[2:4] == (True, False)


def test_an_environment_knows_its_own_horizon():
    """Named by its id, with no horizon given, a task of ours must last as long as it says, not 1,000 steps."""
    assert envs.make("gridworlds:DoorKey-5x5-v0", goal="to go").horizon == 250


def test_what_gymnasium_cannot_make_is_one_line():
    """An id that moved elsewhere (ImportError) or needs arguments (TypeError), and no picture, must be said plainly."""
    class Fussy(gymnasium.Env):
        observation_space, action_space = gymnasium.spaces.Box(-1, 1, (1,)), gymnasium.spaces.Box(-1, 1, (1,))
        metadata = {"render_modes": ["rgb_array"]}

        def __init__(self, needed, render_mode=None):
            self.render_mode = render_mode

        def reset(self, *, seed=None, options=None):
            super().reset(seed=seed)
            return np.zeros(1, np.float32), {}

        def render(self):
            return None

    gymnasium.register("Fussy-v0", entry_point=Fussy)
    for name, why in {"Reacher-v2": "moved to", "Fussy-v0": "needed"}.items():
        with pytest.raises(ValueError, match=f"{name} cannot be made here: .*{why}"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            envs.make(name, goal="to go")
    del gymnasium.registry["Fussy-v0"]
    gymnasium.register("Fussy-v0", entry_point=lambda render_mode: Fussy(0, render_mode))
    env = envs.make("Fussy-v0", goal="to go")
    env.reset(seed=0)
    with pytest.raises(ValueError, match="Fussy-v0 drew no picture, but NoneType"):
        env.image(64)
    del gymnasium.registry["Fussy-v0"]


def test_a_push_that_is_no_number_is_refused():
    """A nan must not become the state of a whole episode."""
    env = envs.make("CartPole")
    env.reset(seed=0)
    with pytest.raises(ValueError, match="must be a number"):
        env.step(np.array([np.nan]))


def test_the_horizon_can_be_set(env_of):
    """horizon= must cut episodes off there, for tasks of the table and for foreign ones."""
    with pytest.raises(ValueError, match="DoorKey-5x5 ends after 250 steps; a horizon of 251 is too long"):
        envs.make("DoorKey-5x5", horizon=251)
    for env in (envs.make("CartPole", horizon=3), envs.make("Odd-v0", goal="to be odd", horizon=3)):
        env.reset(seed=0)
        assert [env.step(env.action_space.sample())[3] for _ in range(3)] == [False, False, True] and env.horizon == 3


def test_an_action_is_repeated_and_its_rewards_are_summed(env_of):
    """One step of ours is then several of the simulator's, up to the end of the episode and no further; horizon counts ours."""
    one, four = (envs.make("CartPole", horizon=horizon, action_repeat=repeat) for horizon, repeat in ((8, 1), (2, 4)))
    (start, _), (same, _) = one.reset(seed=0), four.reset(seed=0)
    assert np.array_equal(start, same)
    singles = [one.step(np.array([0.3]))[:4] for _ in range(8)]
    obs, reward, _, truncated, info = four.step(np.array([0.3]))
    assert np.array_equal(obs, singles[3][0]) and not truncated and four.horizon == 2
    assert reward == pytest.approx(sum(each[1] for each in singles[:4])) and info["progress"] == singles[3][1]
    assert four.step(np.array([0.3]))[3] and singles[7][3]
    with pytest.raises(ValueError, match="ends after 250 steps; a horizon of 300 is too long"):
        envs.make("DoorKey-5x5", horizon=100, action_repeat=3)
    odd = envs.make("Odd-v0", goal="to be odd", action_repeat=4)  # its episodes last nine steps
    odd.reset(seed=0)
    steps = [odd.step(np.array([1.0], np.float32)) for _ in range(3)]
    assert odd.horizon == 3 and [step[3] for step in steps] == [False, False, True]
    assert [step[1] for step in steps] == [28.0, 28.0, 7.0] and steps[0][4]["progress"] == 7.0  # 7 each


@pytest.mark.parametrize("name, goal, words", [
    ("CardPole", None, "CartPole, .*any Gymnasium id with --goal"),
    ("Odd-v0", None, "needs a goal"),
    ("no_such_module:Odd-v0", "to run", "no_such_module"),
    ("Blackjack-v1", "to win", "only Box observations"),
])
def test_what_cannot_be_made_is_refused_in_one_line(name, goal, words):
    """A user's mistake must end in a ValueError of one line that says what is possible."""
    with pytest.raises(ValueError, match=words) as error:
        envs.make(name, goal=goal)
    assert "\n" not in str(error.value)


def test_a_missing_opengl_is_one_line_with_its_cure():
    """However MuJoCo puts it, the user must read which packages to install."""
    for cause in (AttributeError("'NoneType' object has no attribute 'eglQueryString'"),
                  ImportError("Cannot initialize a EGL device display"), RuntimeError("invalid value for MUJOCO_GL")):
        with pytest.raises(ValueError, match="apt-get install -y libegl1 libgl1-mesa-dri") as error:
            with envs.opengl_errors():
                raise cause
        assert "\n" not in str(error.value)
    with pytest.raises(AttributeError):  # an error of ours keeps its traceback
        with envs.opengl_errors():
            raise AttributeError("no attribute 'qpos'")


@pytest.mark.parametrize("package", ["mujoco", "metaworld"])
def test_a_task_without_its_package_is_one_line_with_its_cure(monkeypatch, package):
    """Without Meta-World the user must read the name of the task and what to install."""
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, "metaworld.env_dict", raising=False)
    with pytest.raises(ValueError, match=f"DrawerOpen.*pip install {package}") as error:
        envs.make("DrawerOpen")
    assert "\n" not in str(error.value)


def test_the_bounds_of_a_task_are_means_over_episodes():
    """What random and expert episodes reach must be found for each, and the expert must hold the pole."""
    found = draw_tasks.bounds(envs.make("CartPole", horizon=20), episodes=2)
    assert found["episodes"] == 2 and set(found) == {"episodes"} | {
        f"{who}_{what}" for who in ("random", "expert") for what in ("return", "success", "progress")}
    assert found["expert_success"] == 1 and found["random_return"] < found["expert_return"] < 0


def test_envs_alone_plays_cartpole_at_random_and_by_its_expert(tmp_path):
    """Its demo must need no other file, and send whoever gives it the flags of draw_tasks there."""
    shutil.copy("envs.py", tmp_path)
    outcome = [subprocess.run([sys.executable, "envs.py", *flags], cwd=tmp_path, capture_output=True, text=True)
               for flags in ([], ["--csv", "x"])]
    assert outcome[0].returncode == 0 and "expert: true return -84, within 5 degrees on 100 of 100" in outcome[0].stdout
    assert imageio.imread(tmp_path / "cartpole.png").shape == (200, 400, 3)
    assert outcome[1].returncode == 1 and "python -m tools.draw_tasks" in outcome[1].stderr


def test_a_drawer_further_open_is_never_worse(env_of):
    """Pulling on after success must undo neither success nor progress: it looks further open."""
    env = env_of("DrawerOpen")
    (obs, _), act, said = env.reset(seed=0), envs.expert(env), []
    for step in range(120):
        action = act(obs) if step < 45 else np.array([0, -1, 0, 1], np.float32)
        obs, _, _, _, info = env.step(action)
        said.append((info["success"], info["progress"]))
    assert min(said[60:]) == max(said[60:]) == (1.0, 0.0)


@pytest.mark.parametrize("name, read, width, place", [  # width: of the object, cm; place: x, y, z of its middle, m
    ("Soccer", offline_vlm.read_ball, 5.2, (0.02, 0.7, 0.026)),  # on the table
    ("Soccer", offline_vlm.read_ball, 5.2, (0.02, 0.7, 0.07)),
    ("SweepInto", offline_vlm.read_cube, 4.0, (0.12, 0.7, 0.07)),  # on the table
    ("SweepInto", offline_vlm.read_cube, 4.0, (0.05, 0.7, 0.17)),
    ("SweepInto", offline_vlm.read_cube, 4.0, (0.12, 0.7, 0.12)),
])
def test_what_is_in_the_air_is_read_where_it_is(env_of, name, read, width, place):
    """Taken for one on the table, a ball 4 cm up would seem centimetres nearer to the goal, a cube 10 cm up elsewhere."""
    env = env_of(name)
    env.reset(seed=0)
    sim = env.unwrapped.sim
    state = sim.data.qpos.copy()
    state[9:12] = place
    sim.set_state(state, np.zeros_like(sim.data.qvel))
    distance = 100 * np.linalg.norm(np.array(place[:2]) - sim._target_pos[:2])  # cm
    assert read(env.image(300)) * width == pytest.approx(distance, abs=0.6)


@pytest.mark.parametrize("name", ["DoorKey-5x5", "DoorKey-6x6", "DoorKey-8x8", "Unlock", "UnlockPickup"])
def test_the_planner_solves_every_grid_and_a_box_stays_shut(env_of, name):
    """Each of five starts must end in success, key and door yellow, box purple; toggling the box must change no pixel."""
    env = env_of(name)
    for seed in range(5):
        (obs, info), grid, over = env.reset(seed=seed), env.unwrapped.inner, False
        colours = {thing.type: thing.color for thing in grid.grid.grid if thing}
        assert colours["key"] == colours["door"] == "yellow" and colours.get("box", "purple") == "purple"
        while not over:
            action, front = envs.expert(env)(obs), grid.grid.get(*grid.front_pos)
            if front is not None and front.type == "box":
                before = env.image(88)
                env.step(env.unwrapped.TOGGLE)
                assert np.array_equal(env.image(88), before)
            obs, _, terminated, truncated, info = env.step(action)
            over = terminated or truncated
        assert info["success"] == 1


def test_a_grid_state_says_which_sub_tasks_were_completed():
    """A key that was taken and put back is where it was, but paid for already: one number must tell the two states apart."""
    import gridworlds  # noqa: F401  (registers the ids)

    env = gymnasium.make("DoorKey-5x5-v0").unwrapped
    obs, info = env.reset(seed=0)
    while not info["subtasks"][0]:
        before, action = obs, env.expert_action(obs)
        obs, _, _, _, info = env.step(action)
    after, *_ = env.step(env.DROP)
    assert action == env.PICKUP and np.flatnonzero(after != before).size == 1


def test_the_way_to_the_other_room_leads_through_the_door(env_of):
    """Behind the wall next to the target must be further than in the door, for progress, the reader and the program."""
    env = env_of("DoorKey-8x8")
    env.reset(seed=0)
    first, grid, said = env.image(80), env.unwrapped, []
    grid._door().is_open, grid._door().is_locked = True, False
    grid.inner.grid.set(*grid._places()[1], None)  # the key has been taken
    source = offline_vlm.write_code(env.goal, "the red agent is on the green square", False)
    with contextlib.closing(code_as_reward.Program(source)) as program:
        for cell in ((4, 6), (4, 2), (6, 2), (6, 5)):  # behind the wall, before the door at (5, 2), past it, at the target
            grid.inner.agent_pos = cell
            said.append((grid._info()["progress"], offline_vlm.read_rooms(env.image(300)),
                         program(env.image(80)[None], first)[0]))
    assert (np.diff(said, axis=0) > 0.03).all()


# ==== deformables.py ====
SOFT_TASKS = ["FoldCloth", "StraightenRope", "PassWater"]


@pytest.fixture(scope="module")
def soft():
    """The three tasks, made once: task name -> unwrapped environment."""
    envs = {name: getattr(deformables, name)() for name in SOFT_TASKS}
    yield envs
    for env in envs.values():
        env.close()


def soft_picture(env, size):
    """A picture, or a skip that says in one line what cures it."""
    try:
        return env.image(size)
    except deformables.OpenGLMissing as error:
        pytest.skip(str(error))


def soft_play(env, seed, act):
    """-> return and last info of one episode of act(obs), which must stay stable."""
    (obs, info), total, over = env.reset(seed=seed), 0.0, False
    while not over:
        obs, reward, terminated, truncated, info = env.step(act(obs))
        total, over = total + reward, terminated or truncated
        assert np.isfinite(obs).all() and np.isfinite(reward) and not info["unstable"]
    return total, info


@pytest.mark.parametrize("name", SOFT_TASKS)
def test_soft_task_passes_gymnasiums_checker(name):
    """Each id must resolve by its module and satisfy check_env without a warning."""
    env = gymnasium.make(f"deformables:{name}-v0").unwrapped
    try:
        no_opengl = env.image(64) is None
    except deformables.OpenGLMissing:
        no_opengl = True
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*(minimum|maximum) value.*infinity.*")
        check_env(env, skip_render_check=no_opengl)
    env.close()


@pytest.mark.parametrize("name", SOFT_TASKS)
def test_soft_task_episode_depends_on_its_seed_alone(name, soft):
    """A seed must give the same episode, to the last bit, in a used and in a fresh environment."""
    def record(env):
        rng, seen = np.random.default_rng(1), [env.reset(seed=7)[0]]
        for _ in range(min(env.horizon, 6)):
            seen.append(env.step(rng.uniform(-1, 1, env.action_space.shape))[0])
        return np.array(seen)

    used, fresh = soft[name], getattr(deformables, name)()
    used.reset(seed=3)
    used.step(np.ones(used.action_space.shape))  # an episode abandoned half way
    first = record(used)
    for cache in ("states", "settled"):  # what is kept for the process must not matter either
        getattr(type(used), cache, {}).clear()
    second = record(fresh)
    np.testing.assert_array_equal(first, second)
    assert not np.array_equal(first[0], first[1])
    np.testing.assert_array_equal(soft_picture(used, 64), soft_picture(fresh, 64))
    fresh.close()


@pytest.mark.parametrize(
    "name, margin", [("FoldCloth", 0.1), ("StraightenRope", 3), ("PassWater", 200)])
def test_soft_expert_succeeds_and_beats_random_play_by_far(name, margin, soft):
    """The scripted expert must succeed, random play must be stable and worse by a wide margin."""
    env, rng = soft[name], np.random.default_rng(0)
    best, info = soft_play(env, 2, env.expert_action)
    assert info["success"] == 1
    total, _ = soft_play(env, 2, lambda obs: rng.uniform(-1, 1, env.action_space.shape))
    assert best > total + margin


@pytest.mark.parametrize("name, terminates", [("FoldCloth", True), ("StraightenRope", False)])
def test_soft_horizon_ends_the_episode_as_documented(name, terminates, soft):
    """The only step of the cloth must terminate, the 40th of the rope must truncate."""
    env = soft[name]
    env.reset(seed=0)
    ends = [env.step(np.zeros(env.action_space.shape))[2:4] for _ in range(env.horizon)]
    assert ends == [(False, False)] * (env.horizon - 1) + [(terminates, not terminates)]


def test_cloth_placed_3_mm_off_still_succeeds_but_3_cm_off_fails(soft):
    """The fold must not be chaotic: near the expert's place counts, far from it does not."""
    env = soft["FoldCloth"]
    for off, success in ((0.003, 1), (-0.003, 1), (-0.03, 0)):
        env.reset(seed=0)
        action = env.expert_action(None) + np.array([1, -1]) * off / 2**0.5 / env.REACH
        info = env.step(action)[4]
        assert info["success"] == success == int(info["performance"] > 0.9)


def test_a_rope_held_high_looks_as_long_as_one_on_the_table(soft):
    """Straight at the highest the hands go: it may look a tenth longer, no more."""
    env, seen = soft["StraightenRope"], []
    env.reset(seed=0)
    for height in (0, env.HIGH):
        env.place(env.rest + [0, 0, height])
        env.mujoco.mj_forward(env.model, env.data)
        seen.append(offline_vlm.read_rope(soft_picture(env, 300)))
    assert 70 < seen[0] < seen[1] < 1.1 * seen[0]


def test_rope_reward_and_success_follow_the_distance_of_its_ends(soft):
    """Success must begin at 0.475 m, and the reward must stop growing at 0.55 m."""
    env = soft["StraightenRope"]
    env.reset(seed=0)
    for distance, reward, success in ((0.474, 0.474, 0), (0.476, 0.476, 1), (0.6, 0.55, 1)):
        env.place(env.rest * [distance / 0.5, 1, 1])
        got, info = env.judge()
        assert got == pytest.approx(reward) and info["success"] == success


def test_rope_hands_stay_on_the_table_and_within_a_stretched_rope(soft):
    """No action may carry a hand over the table's edge or the hands more than 0.55 m apart."""
    env = soft["StraightenRope"]
    env.reset(seed=0)
    for _ in range(12):
        env.step(np.array([-1, -1, 1, 0, 1, 1, 1, 0]))
    env.step(np.zeros(8))
    hands = env.data.mocap_pos
    assert np.linalg.norm(env.particles()[[0, -1]] - hands, axis=1).max() < 0.03  # still held
    assert np.abs(hands[:, :2]).max() <= 0.325 and hands[:, 2].max() <= 0.28 + 1e-9
    assert 0.45 < np.linalg.norm(hands[0] - hands[1]) <= 0.55


def test_water_succeeds_within_36_cm_and_loses_ten_times_the_spilled_share(soft):
    """Success must begin at a reward of -0.36, and 10 of 200 drops outside must cost 0.5."""
    env = soft["PassWater"]
    env.reset(seed=0)
    water = env.particles() - [env.data.qpos[env.cup], 0, 0]
    for x, lost, reward, success in ((0.85, 0, -0.35, 1), (0.83, 0, -0.37, 0), (1.2, 10, -0.5, 0)):
        points = water + [x, 0, 0]
        points[:lost] = [-1, 0, 0.02]
        env.place(points)
        env.data.qpos[env.cup] = x
        got, info = env.judge()
        assert got == pytest.approx(reward) and info["success"] == success


def test_water_spills_in_a_dash_and_not_in_a_gentle_move(soft):
    """Full speed must cost several percent of the water, the expert's speed almost nothing."""
    env = soft["PassWater"]
    dash = soft_play(env, 0, lambda obs: np.array([float(obs[0] < 1.12)]))[1]
    gentle = soft_play(env, 0, env.expert_action)[1]
    assert dash["spilled"] > 0.05 and not dash["success"]
    assert gentle["spilled"] < 0.01 and gentle["success"]


def test_water_settles_as_a_heap_and_not_as_columns(soft):
    """The trap of the perfect grid: the settled rim must be near 0.21 m, not 0.30 m."""
    env = soft["PassWater"]
    env.reset(seed=0)
    assert 0.19 < env.size[2] < 0.25
    assert env.spilled() == 0


def test_a_goal_image_that_fails_leaves_the_episode_as_it_was(soft):
    """A size that is refused must not put the rope where the goal is."""
    env = soft["StraightenRope"]
    env.reset(seed=0)
    state = env.data.qpos.copy()
    with pytest.raises(ValueError, match="image's size"):
        env.goal_image(8)
    np.testing.assert_array_equal(env.data.qpos, state)


def test_soft_tasks_without_opengl_say_the_cure_and_nothing_else():
    """A renderer that could not be made must not add a traceback when it is thrown away."""
    done = subprocess.run([sys.executable, deformables.__file__], capture_output=True, text=True, timeout=100,
                          env={**os.environ, "MUJOCO_GL": "disabled"})
    assert done.returncode and "apt-get install" in done.stdout + done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("name", SOFT_TASKS)
def test_soft_pictures_change_with_the_state_and_leave_it_alone(name, soft):
    """A picture must show what was done, have the size asked for, and not disturb the physics."""
    env = soft[name]
    env.reset(seed=0)
    before = soft_picture(env, 96)
    assert before.shape == (96, 96, 3) and before.dtype == np.uint8
    state = env.data.qpos.copy()
    assert (env.goal_image(96) != before).any(-1).mean() > 0.005
    np.testing.assert_array_equal(env.data.qpos, state)
    np.testing.assert_array_equal(env.image(96), before)
    env.step(env.expert_action(env.observe()))
    assert (env.image(96) != before).any(-1).mean() > 0.005
    assert env.render().shape == (300, 300, 3)


def test_soft_actions_that_are_not_finite_numbers_are_refused(soft):
    """A wrong shape or a NaN must end in one clear line, not in a silent reset of the physics."""
    env = soft["StraightenRope"]
    env.reset(seed=0)
    for action in (np.zeros(3), np.full(8, np.nan)):
        with pytest.raises(ValueError, match="finite numbers"):
            env.step(action)


def test_soft_instability_is_reported_and_never_counts_as_success(soft, tmp_path, monkeypatch):
    """MuJoCo restarts in silence after a NaN: info must say unstable, and success must be 0."""
    monkeypatch.chdir(tmp_path)  # MuJoCo writes MUJOCO_LOG.TXT where it is
    env = soft["StraightenRope"]
    env.reset(seed=0)
    env.data.qvel[:] = 1e11
    info = env.step(np.zeros(8))[4]
    assert info["unstable"] and info["success"] == 0
    assert not env.reset(seed=0)[1]["unstable"]


def test_soft_tasks_step_without_opengl_and_name_the_cure():
    """Without OpenGL stepping must work, and a picture must fail with the one apt-get line."""
    code = ("import deformables, numpy\n"
            "env = deformables.StraightenRope()\n"
            "env.reset(seed=0); env.step(numpy.zeros(8)); print('stepped')\n"
            "try: env.image(64)\n"
            "except deformables.OpenGLMissing as error: print(error)\n")
    # PYOPENGL_PLATFORM=osmesa makes EGL fail while mujoco is imported, as a missing library does.
    env = {**os.environ, "MUJOCO_GL": "egl", "PYOPENGL_PLATFORM": "osmesa"}
    env["PYTHONPATH"] = os.path.dirname(os.path.abspath(deformables.__file__))
    run = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert run.stdout.split("\n")[0] == "stepped", run.stderr
    assert "apt-get install -y libegl1 libgl1-mesa-dri" in run.stdout


def test_soft_renderer_left_open_ends_quietly(soft):
    """A user who forgets close() must not get OpenGL tracebacks when Python ends."""
    soft_picture(soft["StraightenRope"], 64)
    code = "import deformables; env = deformables.StraightenRope(); env.reset(); env.image(64)"
    env = {**os.environ, "PYTHONPATH": os.path.dirname(os.path.abspath(deformables.__file__))}
    run = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert run.returncode == 0 and run.stderr == ""


def test_a_task_left_open_ends_quietly(env_of):
    """The same for Meta-World's pictures, drawn through TaskEnv."""
    env_of("DrawerOpen")
    code = "import envs; env = envs.make('DrawerOpen'); env.reset(seed=0); env.image(64)"
    env = {**os.environ, "PYTHONPATH": os.path.dirname(os.path.abspath(envs.__file__))}
    run = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert run.returncode == 0 and "Traceback" not in run.stderr, run.stderr[-2000:]


# ==== code_as_reward.py ====
DEF = "def progress(images, first_image):\n    "
ONES = "return np.ones(len(images))"
HOSTILE = {  # name: (program, kinds of verdict that are right with the allow-list, and without it)
    "fork bomb": ("import os\n" + DEF + "\n    while True: os.fork()", "rejected"),
    "endless loop": (DEF + "while True: pass", "timeout"),
    "endless loop in C": (DEF + "return sum(range(10**18))", "timeout"),
    "10 GB array": (DEF + "return np.ones(10**10)", "error"),
    "many arrays": (DEF + "kept = []\n    while True: kept.append(np.ones(10**7))", "error timeout"),
    "giant power": (DEF + "return 9 ** 9 ** 9", "timeout error died"),
    "giant constant": (DEF + "return [0] * 10**12", "error died"),
    "open a file": (DEF + "open('/tmp/code_as_reward_was_here', 'w').write('x')\n    " + ONES, "rejected"),
    "environment": ("import os\n" + DEF + "return [len(os.environ)]", "rejected"),
    "socket": ("import socket\n" + DEF + "socket.create_connection(('1.1.1.1', 53))\n    " + ONES, "rejected"),
    "subclass walk": (DEF + "return ().__class__.__base__.__subclasses__()", "rejected"),
    "globals of a function": (DEF + "return progress.__globals__", "rejected"),
    "format string": (DEF + "return '{0.__class__.__mro__}'.format(images)", "rejected"),
    "match class pattern": (DEF + "match images:\n        case object(__class__=c): return c", "rejected"),
    "getattr": (DEF + "return getattr(images, '__' + 'class__')", "rejected"),
    "eval": (DEF + "return eval('1')", "rejected"),
    "exec": (DEF + "exec('import os')\n    " + ONES, "rejected"),
    "import function": (DEF + "return __import__('os').getpid()", "rejected"),
    "numpy save": (DEF + "np.save('/tmp/code_as_reward_was_here', images)\n    " + ONES, "rejected"),
    "numpy tofile": (DEF + "images.tofile('/tmp/code_as_reward_was_here')\n    " + ONES, "rejected"),
    "numpy load pickle": (DEF + "return np.load('x', allow_pickle=True)", "rejected"),
    "numpy memmap": (DEF + "np.memmap('/tmp/code_as_reward_was_here', mode='w+', shape=9)\n    " + ONES, "rejected"),
    "numpy raw memory": (DEF + "return np.lib.stride_tricks.as_strided(images, (9**9,), (1,))", "rejected"),
    "numpy's own os": (DEF + "return np.lib._datasource.os.getpid()", "rejected"),
    "ctypes": ("import ctypes\n" + DEF + "ctypes.string_at(0)\n    " + ONES, "rejected"),
    "ctypes of an array": (DEF + "return images.ctypes.data_as(None)", "rejected"),
    "write to stdout": ("import os\n" + DEF + "os.write(1, b'x' * 99)\n    " + ONES, "rejected"),
    "print": (DEF + "print('{\"ok\": 1}' * 99)\n    return 'printed'", "error"),
    "NaN": (DEF + "return np.full(len(images), np.nan)", "output"),
    "infinity": (DEF + "return np.full(len(images), np.inf)", "output"),
    "out of range": (DEF + "return np.full(len(images), 7.0)", "output"),
    "object": (DEF + "return [progress] * len(images)", "error"),
    "nothing": (DEF + "return None", "output error"),
    "wrong shape": (DEF + "return images", "output"),
    "too few": (DEF + "return np.ones(len(images) - 1)", "output"),
    "forged object": (DEF + "return np.ndarray((1,), 'O', buffer=np.array([4096, 4096]))", "rejected"),
    "monkey-patch numpy": (DEF + "np.mean = None\n    " + ONES, "rejected"),
    "sleep": ("import time\n" + DEF + "time.sleep(99)\n    " + ONES, "rejected"),
    "deep recursion": (DEF + "return progress(images, first_image)", "error"),
    "regular expression": ("import re\n" + DEF + "re.match('(a+)+$', 'a' * 50 + 'b')\n    " + ONES, "rejected"),
    "kill the parent": ("import os\n" + DEF + "os.kill(os.getppid(), 9)\n    " + ONES, "rejected"),
    "exit": (DEF + "raise SystemExit", "rejected"),
    "class with tricks": ("class A:\n    def __del__(self): pass\n" + DEF + ONES, "rejected"),
    "decorator": (DEF + "@len\n    def f(): pass\n    " + ONES, "error"),
    "write into the images": (DEF + "images[:] = 0\n    " + ONES, "error"),
    "deep brackets": (DEF + "return " + "(" * 3000 + "1" + ")" * 3000, "error died"),
    "many minus signs": (DEF + "return " + "-" * 100000 + "1", "error died"),
    "no Python": ("I am sorry, I cannot do that.", "error"),
    "null byte": (DEF + "return '\0'", "error"),
    "another function": ("def reward(image):\n    return 1", "rejected"),
    "endless top level": ("while True: pass\n" + DEF + ONES, "timeout"),
}
BLACK = np.zeros((3, 16, 16, 3), np.uint8)


def verdict(source, seconds=0.7):
    """(kind of failure or "fine", seconds) of one program on three black pictures."""
    start = time.monotonic()
    program = Program(source, seconds=seconds)
    try:
        program(BLACK, BLACK[0])
        kind = "fine"
    except ProgramError as error:
        kind = error.kind
    program.close()
    return kind, time.monotonic() - start


def test_every_hostile_program_ends_as_a_clear_verdict_and_changes_nothing(tmp_path, monkeypatch):
    """Each of 51 attacks must end as its kind of failure in 20 s, start included, write no file, and leave us alive."""
    trace = pathlib.Path("/tmp/code_as_reward_was_here")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        found = dict(zip(HOSTILE, pool.map(verdict, [source for source, _ in HOSTILE.values()])))
    wrong = {name: found[name][0] for name, (_, right) in HOSTILE.items() if found[name][0] not in right.split()}
    assert len(HOSTILE) >= 30 and not wrong
    assert max(seconds for _, seconds in found.values()) < 20
    assert not trace.exists() and not list(tmp_path.iterdir())


def test_the_kernel_layers_hold_when_the_allow_list_is_taken_away(tmp_path, monkeypatch):
    """With the allow-list and the curated builtins cut out, the attacks on the machine must still fail."""
    text = pathlib.Path(code_as_reward.__file__).read_text()
    bare = text.replace('batch = check_source(message["source"])', "batch = True")
    bare = bare.replace('space = {"__builtins__": safe,', 'space = {"__builtins__": builtins,')
    assert bare.count("batch = True") == bare.count('"__builtins__": builtins,') == 1
    (tmp_path / "bare.py").write_text(bare)
    spec = importlib.util.spec_from_file_location("bare", tmp_path / "bare.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "bare", module)
    spec.loader.exec_module(module)
    trace = tmp_path / "was_here"
    attacks = {"file": f"open({str(trace)!r}, 'w')", "fork": "__import__('os').fork()", "kill":
               "__import__('os').kill(__import__('os').getppid(), 9)", "socket":
               "__import__('_socket').socket()", "run": "__import__('os').execv('/bin/true', ['true'])"}
    program = module.Program(DEF + ONES)
    program(BLACK, BLACK[0])
    if "system-calls" not in program.active:
        pytest.skip("no system-call filter here; cure: Linux on x86-64 or arm64 with CONFIG_SECCOMP_FILTER (in a "
                    "container that forbids it: --security-opt seccomp=unconfined)")
    for name, attack in attacks.items():
        with pytest.raises(module.ProgramError, match="PermissionError|ModuleNotFound"):
            module.Program(DEF + attack + "\n    " + ONES)(BLACK, BLACK[0])
        assert not trace.exists(), name


def test_random_play_gets_only_the_time_the_expert_needs():
    """An easy sub-task that chance completes after the expert would have must not count as a false completion."""
    late = [square(np.r_[np.full(12, 12), 24, 24])] * 10
    assert verify(lambda p, first: place(p), EXPERT, late, last=False).rates["false_rate"] == 0


def test_a_programs_process_ends_with_its_owner_and_its_folder_goes():
    """close(), and the end of the last one who holds it, must kill the process and remove its folder."""
    for end in (Program.close, lambda program: None):
        program = Program(DEF + ONES)
        program(BLACK, BLACK[0])
        pid, folder = program.process.pid, os.readlink(f"/proc/{program.process.pid}/cwd")
        end(program)
        del program
        assert not os.path.exists(folder) and not os.path.exists(f"/proc/{pid}")


def test_a_garbled_answer_is_a_verdict_and_nothing_of_it_is_unpickled():
    """An answer that is no JSON object, or longer than it may be, must end the program as died."""
    for answer, says in ((b"\x80\x04.", "died"), (b"[1]", "died"), (b"[" * 9000, "died"), (b"x" * 20_000, "died"),
                         (b"{}", "3 bytes for")):
        program, (ours, theirs) = Program(DEF + ONES), multiprocessing.Pipe()
        program(BLACK, BLACK[0])
        program.pipe = ours
        theirs.send_bytes(answer)
        theirs.send_bytes(b"123")
        with pytest.raises(ProgramError, match=says):
            program(BLACK, BLACK[0])


def test_a_program_sees_no_environment(monkeypatch):
    """No variable of ours, least of all a key, must reach the child."""
    monkeypatch.setenv("OPENAI_API_KEY", "not-a-real-key")
    program = Program(DEF + ONES)
    program(BLACK, BLACK[0])
    if os.getuid() == 0 or os.access(f"/proc/{program.process.pid}/environ", os.R_OK):
        assert b"not-a-real-key" not in pathlib.Path(f"/proc/{program.process.pid}/environ").read_bytes()
    program.close()


def test_a_program_may_use_names_that_are_not_ascii():
    """Python loads its table of characters for them, after no file opens any more; disguised builtins stay out."""
    program = Program(DEF + "größe = θ = 1.0\n    return np.full(len(images), größe * θ)")
    assert program(BLACK, BLACK[0]).tolist() == [1, 1, 1]
    program.close()
    with pytest.raises(ProgramError, match="rejected: .*eval is not available"):
        Program(DEF + "return \uff45\uff56\uff41\uff4c('1')")(BLACK, BLACK[0])  # full-width letters


@pytest.mark.parametrize("source, kind", [("import os\n" + DEF + ONES, "rejected"), (DEF + "return (", "error: SyntaxError")])
def test_a_program_that_was_refused_is_refused_again(source, kind):
    """The second call must get the first one's verdict, not an answer from a process without a program."""
    program = Program(source)
    for _ in range(2):
        with pytest.raises(ProgramError, match=kind):
            program(BLACK, BLACK[0])
    assert program.process is None


def test_pictures_of_a_wrong_kind_are_not_blamed_on_the_program():
    """A first image in float32, or one of another size, must be named as what is wrong."""
    program = Program(DEF + ONES)
    for first in (BLACK[0].astype(np.float32), np.zeros((9, 9, 3), np.uint8)):
        with pytest.raises(ValueError, match="first_image one of them"):
            program(BLACK, first)


def test_a_program_that_prints_does_not_garble_its_answer():
    """What it prints must vanish: its standard output leads nowhere."""
    program = Program(DEF + "print('x' * 100000)\n    " + ONES)
    assert program(BLACK, BLACK[0]).tolist() == [1, 1, 1]
    program.close()


def test_nothing_a_program_stores_survives_the_batch():
    """A counter in a global list must start at zero in every call, and 76 MB of each batch must be given back."""
    counting = "seen = []\nBIG = np.ones(10**7)\n" + DEF + "seen.append(1)\n    return np.full(len(images), len(seen) / 10)"
    program = Program(counting)
    assert [program(BLACK, BLACK[0])[0] for _ in range(40)] == pytest.approx([0.1] * 40)
    assert len(os.listdir(f"/proc/{program.process.pid}/task")) == 1  # BLAS has started no threads
    program.close()


def test_an_interrupted_call_leaves_no_answer_for_the_next(monkeypatch):
    """After Ctrl-C between question and answer, the next call must get its own answer."""
    program, wait = Program(DEF + "return images.mean(axis=(1, 2, 3)) / 255"), multiprocessing.connection.Connection.recv_bytes
    gray = [np.full((1, 8, 8, 3), value, np.uint8) for value in (50, 100)]
    program(gray[0], gray[0][0])
    monkeypatch.setattr(multiprocessing.connection.Connection, "recv_bytes", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        program(gray[0], gray[0][0])
    monkeypatch.setattr(multiprocessing.connection.Connection, "recv_bytes", wait)
    assert program(gray[1], gray[1][0]) == pytest.approx(100 / 255)
    program.close()


def test_programs_of_one_picture_and_of_a_batch_are_both_run():
    """The first argument's name, image or images, must decide how a program is called."""
    pictures = np.arange(4, dtype=np.uint8)[:, None, None, None] * np.full((1, 8, 8, 3), 20, np.uint8)
    each = "def progress(image, first_image):\n    return image.mean() / 255"
    batch = "def progress(images, first_image):\n    return images.mean(axis=(1, 2, 3)) / 255"
    with ProgramReward([each, batch]) as reward:
        one, other = reward.progress(pictures, pictures[0]).T
    assert np.allclose(one, other) and np.allclose(one, np.arange(4) * 20 / 255)


def test_a_batch_larger_than_a_message_comes_back_whole_and_in_order():
    """Pictures are sent in several messages; every value must come back in its place."""
    pictures = np.zeros((300, 100, 100, 3), np.uint8)
    pictures[:, 0, 0, 0] = np.arange(300) % 256
    program = Program(DEF + "return images[:, 0, 0, 0] / 255")
    assert np.allclose(program(pictures, pictures[0]) * 255, np.arange(300) % 256)
    program.close()


def test_two_thousand_pictures_a_second_go_through_a_program():
    """Pipe included, at 100 px; half of what is claimed, for a machine that does other work."""
    colour = DEF + "mask = (images[..., 0] > 150) & (images[..., 2] < 90)\n    return mask.mean(axis=(1, 2))"
    program, pictures = Program(colour), np.zeros((2000, 100, 100, 3), np.uint8)
    program(pictures[:1], pictures[0])
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        program(pictures, pictures[0])
        seconds.append(time.perf_counter() - start)
    program.close()
    assert 2000 / min(seconds) > 1000


def square(columns):
    """A white square at these columns of a black picture: (T,) -> (T, 32, 32, 3); 24 is the right edge."""
    pictures = np.zeros((len(columns), 32, 32, 3), np.uint8)
    for picture, column in zip(pictures, columns):
        picture[12:20, int(column):int(column) + 8] = 255
    return pictures


def place(pictures):
    return pictures.any(axis=(1, 3)).argmax(axis=1) / 24  # (N,) 0 at the left edge, 1 at the right


EXPERT = [square(np.minimum(24, start + 3 * np.arange(12))) for start in range(10)]
RANDOM = [square(np.clip(12 + 4 * np.sin(np.arange(12) + phase), 0, 20)) for phase in range(10)]
OTHER = [np.full((12, 32, 32, 3), 200, np.uint8)] * 5
CHECKS = {  # what is wrong with a program: (the program, the field of the report that must show it)
    "always 1": (lambda p, first: np.ones(len(p)), "false_rate"),
    "always 0": (lambda p, first: np.zeros(len(p)), "hit_rate"),
    "any change": (lambda p, first: (p != first).any(axis=(1, 2, 3)) * 1.0, "backwards"),
    "done at the start": (lambda p, first: np.maximum(place(p), 1.0 * (place(p) < 0.5)), "frozen"),
    "another scene": (lambda p, first: np.where(p.min(axis=(1, 2, 3)) > 0, 1, place(p)), "other_task"),
    "falls back": (lambda p, first: np.where(place(p) == 1, 1, 0.9 - 0.9 * place(p)), "regressions"),
}


def test_a_right_program_passes_the_verification():
    """The position of the square itself must pass every check."""
    report = verify(lambda p, first: place(p) * (p.min(axis=(1, 2, 3)) == 0), EXPERT, RANDOM, OTHER)
    assert (report.verdict, report.reasons) == ("pass", [])
    assert report.rates.pop("hit_rate") == 1 and set(report.rates.values()) == {0}


@pytest.mark.parametrize("fault", CHECKS)
def test_each_fault_of_a_program_is_found_by_its_check(fault):
    """A wrong program must fail, by the check that is there for its fault, with pictures of it."""
    program, field = CHECKS[fault]
    report = verify(program, EXPERT, RANDOM, OTHER)
    limit = {"hit_rate": 0.95, "regressions": 0.05}.get(field, 0.1)
    value = report.rates[field]
    assert report.verdict == "fail" and (value < limit if field == "hit_rate" else value > limit)
    assert report.failures and all(f["image"].shape == (32, 32, 3) for f in report.failures)


@pytest.mark.parametrize("last, frame", [(True, 11), (False, 5)])
def test_a_missed_completion_is_shown_where_it_should_have_been_seen(last, frame):
    """Of the goal the last picture must go back to the VLM, of an earlier sub-task the best one."""
    def program(p, first):
        return 0.9 * (np.arange(len(p)) == 5)
    failure = verify(program, EXPERT, RANDOM, last=last).failures[0]
    assert failure["check"] == "hit_rate" and np.array_equal(failure["image"], EXPERT[0][frame])


def test_programs_with_memory_or_an_eye_on_their_neighbours_are_not_deterministic():
    """Random values, and the position in the batch, must be found out."""
    rng = np.random.default_rng(0)
    for program in (lambda p, first: rng.uniform(size=len(p)), lambda p, first: np.linspace(0, 1, len(p))):
        assert "not deterministic" in verify(program, EXPERT, RANDOM).reasons[-1]


def test_a_failing_program_is_a_failing_report():
    """NaN in the sandbox must end as verdict fail with the reason, not as an exception."""
    report = verify(Program(DEF + "return np.full(len(images), np.nan)"), EXPERT, RANDOM)
    assert report.verdict == "fail" and "NaN" in report.reasons[0]


def test_a_goal_reached_at_the_start_is_no_negative_example():
    """Where success says that the start is the goal already, frozen must not count it; none left: an error."""
    upright = [square(np.full(12, 24))] * 5
    success = [place(e) >= 0.95 for e in EXPERT + upright]
    report = verify(lambda p, first: place(p), EXPERT + upright, RANDOM, success=success)
    assert report.verdict == "pass" and report.rates["frozen"] == 0
    with pytest.raises(CodeAsRewardError, match="start short of the goal"):
        verify(lambda p, first: place(p), upright, RANDOM, success=success[-5:])


def rooms(key, door, agent):
    """A room as MiniGrid draws it, 6 cells of 8 px: key on the floor?, door locked?, column of the agent."""
    picture = np.full((48, 48, 3), 100, np.uint8)
    picture[8:40, 8:40] = 0
    picture[8:40, 24:32] = 100
    picture[16:24, 24:32] = (114, 114, 0) if door else (0, 0, 0)
    picture[16:24, 31] = (200, 200, 0)
    picture[32:40, 32:40] = (0, 255, 0)
    if key:
        picture[26:38, 11:14] = (255, 255, 0)
    row = 34 if agent == 34 else 18
    picture[row:row + 4, agent:agent + 4] = (255, 0, 0)
    return picture


ERRAND = ([(1, 1, 18)] * 2 + [(0, 1, 10)] * 2 + [(0, 1, 18)] + [(0, 0, 18)] + [(0, 0, 26)] + [(0, 0, 34)])
KEY_GONE = """
def gone(images):
    yellow = (images[..., 0] > 200) & (images[..., 1] > 200) & (images[..., 2] < 50)
    return yellow[:, :, :22].sum(axis=(1, 2)) < 5
"""


def test_the_published_doorkey_program_is_rejected():
    """It pays half a point in every frame without a key, whatever the door does, and nothing at the goal."""
    expert = [np.stack([rooms(*state) for state in ERRAND])] * 10
    random = [np.stack([rooms(1, 1, 10 + (i + t) % 10) for t in range(8)]) for i in range(10)]
    success = [np.arange(8) == 7] * 10
    literal = Program(KEY_GONE + DEF + "return gone(images) * 0.5")
    summed = Program(KEY_GONE + DEF + "return gone(images) * 0.5 + gone(images) * 0.5")  # key, and "door"
    picked = Program(KEY_GONE + DEF + "return (gone(images) & ~gone(first_image[None])) * 1.0")
    reports = {"paid once": verify(literal, expert, random, success=success),
               "as the goal": verify(summed, expert, random, success=success),
               "as the door": verify(summed, expert, random, earlier=[picked], last=False)}
    assert [r.verdict for r in reports.values()] == ["fail"] * 3
    assert reports["paid once"].rates["hit_rate"] == 0
    assert reports["as the goal"].rates["too_soon"] == reports["as the door"].rates["too_soon"] == 1
    assert verify(picked, expert, random, last=False).verdict == "pass"  # its part about the key is right
    for program in (literal, summed, picked):
        program.close()


def test_sub_tasks_count_in_order_once_and_the_last_is_not_held():
    """(s + p_s) / K by hand: an event stays done, order is kept, the goal is paid only while it lasts."""
    progress = np.array([[0, 1, 0], [1, 0, 0], [0, 0.5, 1], [0, 1, 0], [0, 0, 1], [0, 0, 0.5]], float)
    assert stages(progress).tolist() == [0, 1, 1, 2, 2, 2]
    assert np.allclose(potential(progress), np.array([0, 1, 1.5, 2, 3, 2.5]) / 3)


def test_the_reward_is_never_positive_and_starts_afresh_with_every_episode():
    """Phi - 1 must lie in [-1, 0], and an episode must not know the one before."""
    source = DEF + "return images[:, 0, 0, 0] / 255"
    pictures = np.zeros((3, 8, 8, 3), np.uint8)
    pictures[:, 0, 0, 0] = (0, 255, 51)
    with ProgramReward([source, source]) as reward:
        first = reward.episode_rewards(pictures, pictures[0])
        again = reward.episode_rewards(pictures, pictures[0])
        assert np.allclose(first, [-1, 0, -0.4]) and np.array_equal(first, again)
        assert np.allclose(reward.predict(pictures), first)
        assert reward.episode_rewards(pictures, pictures[0], failed_end=True)[-1] == pytest.approx(-99.4)
        change = reward.episode_rewards(pictures, pictures[0], discount=0.9, differences=True)  # 0.9 Phi' - Phi
        assert np.allclose(change, [0, 0.9, 0.54 - 1])
        assert reward.predict(pictures[:0]).shape == (0,)


def test_standing_short_of_the_goal_circling_and_dawdling_earn_less_than_arriving():
    """The returns of four behaviours under Phi - 1 must rank as they should."""
    ways = {"arrive": np.r_[3:24:7, [24] * 17], "late": np.r_[[0] * 16, 3:24:7, 24],
            "stand": np.full(20, 20), "circle": np.tile([0, 20], 10)}
    with ProgramReward([DEF + "return images.any(axis=(1, 3)).argmax(axis=1) / 24"]) as reward:
        total = {name: reward.episode_rewards(square(way), square([0])[0]).sum() for name, way in ways.items()}
    assert max(total, key=total.get) == "arrive" and total["arrive"] > total["stand"] > total["circle"]


def test_frames_on_which_a_program_fails_earn_nothing():
    """One bad picture must score 0 and be counted, the others keep their value; a timeout must stop the run."""
    source = "def progress(image, first_image):\n    return 51 / int(image[0, 0, 0])"
    pictures = np.full((5, 8, 8, 3), 102, np.uint8)
    pictures[3] = 0
    with ProgramReward([source]) as reward:
        assert np.allclose(reward.predict(pictures), [-0.5, -0.5, -0.5, -1, -0.5]) and reward.failed_frames == 1
    slow = ProgramReward([Program(DEF + "while True: pass", seconds=0.3)], ["wait"])
    with pytest.raises(CodeAsRewardError, match="'wait'.*timeout"):
        slow.predict(pictures)


class Script:
    """Stands for a VLM in these tests: fixed answers in order; keeps what it was asked."""

    def __init__(self, *answers):
        self.answers, self.asked = list(answers), []

    def __call__(self, parts):
        self.asked.append(parts)
        return types.SimpleNamespace(text=self.answers.pop(0))


GOOD = "```python\nimport numpy as np\n" + DEF + "return images.any(axis=(1, 3)).argmax(axis=1) / 24\n```"
BAD = "```python\n" + DEF + "return images.max(axis=(1, 2, 3)) / 255\n```"


def test_a_wrong_program_goes_back_with_reasons_and_pictures_and_the_next_one_passes(tmp_path):
    """The repair loop must show the VLM its program, the reasons and the pictures, and keep the files."""
    ask, saved = Script("1. the square is at the right edge", BAD, GOOD), []
    reward, reports = learn_programs(ask, EXPERT[0][0], EXPERT[0][-1], "to move it", EXPERT, RANDOM,
                                     folder=tmp_path, save_picture=lambda path, image: saved.append(path))
    reward.close()
    text = " ".join(part for part in ask.asked[2] if isinstance(part, str))
    assert "images.max" in text and reports[0].reasons[0] in text
    assert len([p for p in ask.asked[2] if not isinstance(p, str)]) == 2 + len(reports[0].failures)
    rows = json.loads((tmp_path / "verification.json").read_text())
    assert [row["verdict"] for row in rows] == ["fail", "pass"] and rows[1]["round"] == 2 and saved
    with load_programs(tmp_path) as again:
        assert again.subtasks == ["the square is at the right edge"]
        assert again.predict(EXPERT[0])[-1] == 0


def test_after_the_last_round_the_run_stops_and_names_the_sub_task():
    """R wrong programs must end in an error with sub-task and reason; go_on must leave out an earlier one."""
    with pytest.raises(CodeAsRewardError, match="'at the edge'.*2 rounds.*start is called completed"):
        learn_programs(Script("1. at the edge", BAD, BAD), EXPERT[0][0], EXPERT[0][-1], "g", EXPERT, RANDOM, rounds=2)
    ask = Script("1. half way\n2. at the edge", BAD, "no idea", GOOD)
    reward, reports = learn_programs(ask, EXPERT[0][0], EXPERT[0][-1], "g", EXPERT, RANDOM, rounds=2, go_on=True)
    reward.close()
    assert reward.subtasks == ["at the edge"] and [r.verdict for r in reports] == ["fail", "fail", "pass"]


def test_programs_that_are_not_all_cannot_be_loaded(tmp_path):
    """Of an attempt that stopped at the second sub-task, the first one's program alone must not become a reward, and a
    new attempt must not keep it."""
    half = Script("1. half way\n2. at the edge", GOOD.replace("/ 24", "/ 12").replace("return ", "return np.minimum(1, ")
                  .replace("/ 12", "/ 12)"), BAD)
    task = EXPERT[0][0], EXPERT[0][-1], "g", EXPERT, [e[:1] for e in EXPERT]
    with pytest.raises(CodeAsRewardError, match="'at the edge'"):
        learn_programs(half, *task, rounds=1, folder=tmp_path)
    assert len(list(tmp_path.glob("programs/*.py"))) == 1
    for folder in (tmp_path, tmp_path / "programs"):
        with pytest.raises(CodeAsRewardError, match="are not all"):
            load_programs(folder)
    learn_programs(Script("1. at the edge", GOOD), *task, folder=tmp_path)[0].close()
    with load_programs(tmp_path) as again:
        assert again.subtasks == ["at the edge"]
    (tmp_path / "programs" / "1_x.py").write_bytes(b"# \xff")
    with pytest.raises(CodeAsRewardError, match="no UTF-8"):
        load_programs(tmp_path)


def test_verification_wants_a_success_for_every_frame():
    """Success of too few episodes, or of too few frames, must be refused: it would let a wrong program pass."""
    success = [np.zeros(len(episode), bool) for episode in EXPERT]
    for wrong in (success[:1], [*success[:-1], success[-1][1:]]):
        with pytest.raises(ValueError, match="a value per frame"):
            verify(lambda pictures, first: place(pictures), EXPERT, RANDOM, success=wrong)


def test_a_foreign_folder_of_programs_meets_the_allow_list_again(tmp_path):
    """A program that was edited into an attack must be refused before it runs."""
    (tmp_path / "1_x.py").write_text("# sub-task: x\nimport os\n" + DEF + ONES)
    with pytest.raises(CodeAsRewardError, match="import os is not allowed"):
        load_programs(tmp_path)
    with pytest.raises(CodeAsRewardError, match="no programs"):
        load_programs(tmp_path / "nowhere")


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


def test_code_as_reward_stands_alone_and_its_snippet_runs(tmp_path):
    """The file alone in an empty folder: its header's snippet must run and print four times -1."""
    text = pathlib.Path(code_as_reward.__file__).read_text()
    (tmp_path / "code_as_reward.py").write_text(text)
    snippet = text.split("To use it elsewhere:\n")[1].split("\n\n")[0].split('\n"""')[0]
    run = subprocess.run([sys.executable, "-c", textwrap.dedent(snippet).replace("\\\\n", "\\n")], cwd=tmp_path,
                         capture_output=True, text=True)
    assert run.stdout.split() == ["[-1.", "-1.", "-1.", "-1.]"], run.stderr


def test_a_program_lives_on_when_the_thread_that_started_it_has_ended():
    """The kernel kills a child with the thread that started it: that must not be the one that asked first."""
    program = Program(DEF + ONES)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        pool.submit(program, BLACK, BLACK[0]).result()
    assert program(BLACK, BLACK[0]).tolist() == [1, 1, 1]
    program.close()


def test_the_stand_in_writes_a_wrong_program_is_told_and_puts_it_right():
    """CartPole over HTTP with every first program wrong: round 1 must fail, round 2 pass, in 3 calls."""
    env, goal = envs.make("CartPole"), envs.TASKS["CartPole"].goal
    episodes = code_as_reward.collect_episodes(env, envs.expert(env), size=64, seed=train.FRESH_SEED)
    start, end = episodes["expert_episodes"][0][[0, -1]]
    server = offline_vlm.OfflineVLM(mistakes=1.0)
    with server as url:
        ask = vlm_query.VLM("offline/stand-in", url=url).ask
        reward, reports = learn_programs(ask, start, end, goal, other_episodes=OTHER[:1], **episodes)
    reward.close()
    assert [r.verdict for r in reports] == ["fail", "pass"] and sum(server.requests.values()) == 3


def test_the_stand_in_knows_the_sub_tasks_of_every_goal_it_can_read():
    """Each goal with a reader must have programs, each of them within the allow-list."""
    goals = set(offline_vlm.READERS) - {offline_vlm.SIGHT}
    assert goals <= set(offline_vlm.SUBTASKS)
    for goal in goals:
        for sentence, _ in offline_vlm.SUBTASKS[goal]:
            code_as_reward.check_source(offline_vlm.write_code(goal, sentence, wrong=False))


def test_the_search_for_hacks_keeps_the_rows_of_other_tasks(tmp_path, monkeypatch):
    """Examining one task again must leave the other's rows; an unknown task must be named."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hack_search, "examine", lambda task, **_: ([{"task": task, "frames": 1}], {"task": task, "hacks": 0}))
    hack_search.main(["DrawerOpen", "CartPole"])
    monkeypatch.setattr(hack_search, "examine", lambda task, **_: ([{"task": task, "frames": 2}], {"task": task, "hacks": 3}))
    hack_search.main(["DrawerOpen"])
    for name, rows in (("code_accuracy", ["CartPole,1", "DrawerOpen,2"]), ("reward_hacking", ["CartPole,0", "DrawerOpen,3"])):
        assert open(f"results/{name}.csv").read().split()[1:] == rows
    with open("results/reward_hacking.csv", "a") as file:
        file.write("Chess,1\n")  # of another day
    hack_search.main(["CartPole"])
    assert open("results/reward_hacking.csv").read().split()[1:] == ["CartPole,3", "DrawerOpen,3", "Chess,1"]
    with pytest.raises(SystemExit, match="no programs for Chess"):
        hack_search.main(["Chess"])


def test_a_hack_is_worth_more_than_the_expert_and_never_at_the_goal():
    """An episode that was at the goal and left it earned its reward there: it is counted apart."""
    assert [hack_search.at_goal(each) for each in ([0, 1, 1], [0, 1, 0], [0, 0, 0])] == ["end", "before", "never"]
    found = [(-1.0, "never"), (-2.0, "before"), (-3.0, "end"), (-9.0, "never"), (-9.0, "before")]
    assert hack_search.count(found, target=-5.0) == (1, 1)
    assert hack_search.count([], target=-5.0) == (0, 0)


# ==== offline_vlm.py ====
def draw_pole(degrees, size=200):
    """A brown pole on a black cart, leaning by so many degrees to the right -> (size, size, 3) uint8."""
    row, column = np.mgrid[:size, :size].astype(float)
    right, down = np.sin(np.radians(degrees)), -np.cos(np.radians(degrees))
    x, y = column - size / 2, row - 0.75 * size
    along, across = x * right + y * down, x * down - y * right
    inside = np.clip(size / 40 + 0.5 - abs(across), 0, 1)[..., None]  # soft edges, as a renderer makes them
    inside = inside * ((along > 0) & (along < 0.4 * size))[..., None]
    image = (255 + inside * (np.array([202, 152, 101]) - 255)).astype(np.uint8)
    image[int(0.75 * size):int(0.82 * size), int(0.4 * size):int(0.6 * size)] = 0
    return image


POLE = "to balance the brown pole on the black cart to be upright"
PIXEL = vlm_query.png_base64(np.zeros((1, 1, 3), np.uint8))


def draw_poles(pairs, seed=0, size=100):
    """-> first, second (M, H, W, 3), right labels (M,); the angles differ by a degree at least."""
    angles = np.random.default_rng(seed).uniform(-25, 25, (2, 2 * pairs))
    angles = angles[:, abs(abs(angles[0]) - abs(angles[1])) > 1][:, :pairs]
    first, second = (np.stack([draw_pole(angle, size) for angle in side]) for side in angles)
    return first, second, (abs(angles[1]) < abs(angles[0])).astype(np.int8)


def test_a_search_for_hacks_scores_the_programs_alone(monkeypatch):
    """A program that pays for a cloth left flat must be found out: an end short of the goal must not hide it."""
    flat = types.SimpleNamespace(episode_rewards=lambda images, first, *failed: np.zeros(len(images)) - 99 * any(failed))
    steps = iter([("obs", 0, True, False, {"success": 0.0})])
    env = types.SimpleNamespace(reset=lambda seed: ("obs", {"success": 0.0}), picture=lambda size: np.zeros((size, size, 3)),
                                step=lambda action: next(steps))
    _, _, value, when = hack_search.play(env, flat, 4, lambda obs, t: 0, seed=0)
    assert hack_search.count([(value, when)], target=-1.0) == (1, 0)


@pytest.mark.parametrize("size", [64, 100, 200, 300])
def test_the_stand_in_reads_the_poles_angle_from_pixels(size):
    """At every size it must be within a degree of the angle that was drawn."""
    for angle in (-25, -7, -1, 0, 3, 12, 28):
        assert abs(offline_vlm.read_pole(draw_pole(angle, size)) - angle) < 1


@pytest.mark.parametrize("stages", [1, 2])
def test_the_stand_in_labels_by_what_it_sees_and_says_what_it_saw(stages):
    """All labels must be right, and every answer must say that it is no VLM."""
    first, second, right = draw_poles(20)
    records = []
    with OfflineVLM() as url:
        labels, _ = label_pairs(VLM("offline", url=url).ask, first, second, POLE, stages, log=records.append)
    assert (labels == right).all()
    assert all("not a VLM" in text for record in records for text in record["answers"])
    assert all("leans" in record["answers"][0] for record in records)


def test_it_answers_minus_one_where_it_cannot_tell():
    """A difference below the margin, and a picture without a pole, must be -1."""
    blank = np.full((200, 200, 3), 255, np.uint8)
    first = np.stack([draw_pole(10), draw_pole(10), blank])
    second = np.stack([draw_pole(-10.2), draw_pole(12), draw_pole(0)])
    with OfflineVLM() as url:
        labels, counts = label_pairs(VLM("offline", url=url).ask, first, second, POLE)
    assert list(labels) == [-1, 0, -1] and counts["unsure"] == 2


def test_mistakes_and_doubts_are_as_frequent_as_told_and_depend_on_the_pair_alone():
    """The same pair must meet the same fate in any order, company and number of stages."""
    first, second, right = draw_poles(150, size=64)
    with OfflineVLM(mistakes=0.2, unsure=0.1) as url:
        ask = VLM("offline", url=url).ask
        labels, _ = label_pairs(ask, first, second, POLE)
        again, _ = label_pairs(ask, first[::-1], second[::-1], POLE, stages=1, workers=2)
    assert (labels == again[::-1]).all()
    assert 0.04 < (labels == -1).mean() < 0.18 and 0.1 < (labels == 1 - right).mean() < 0.28


def test_another_setting_has_another_name():
    """A cache of answers must never mix up an honest stand-in with a lying one."""
    assert len({OfflineVLM(mistakes=m, seed=s).model for m in (0, 0.2) for s in (0, 1)}) == 4


def test_an_unknown_goal_is_refused_with_the_goals_that_are_known():
    """The client must fail fast, with one line that names them."""
    first, second, _ = draw_poles(1)
    with OfflineVLM() as url, pytest.raises(vlm_query.VLMError, match=f"not a VLM.*{POLE}"):
        label_pairs(VLM("offline", url=url).ask, first, second, "to fly to the moon")


@pytest.mark.parametrize("path, body", [
    ("/chat/completions", b"no json"), ("/chat/completions", b'{"messages": 1}'), ("/chat/completions", b"[]"),
    ("/messages", b'{"messages": []}'), ("/chat/completions", b'{"stream": true, "messages": []}'),
    ("/models/m:generateContent", b'{"contents": [{"parts": [{"inline_data": {"data": "AA=="}}]}]}'),
    ("/chat/completions", b'{"messages": [{"content": [{"type": "image_url", "image_url": {"url": "http://x"}}]}]}')])
def test_a_bad_request_is_a_400_in_the_formats_own_shape(path, body):
    """As the real servers do, and the server must live on."""
    with OfflineVLM() as url:
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.urlopen(url + path, body)
        assert caught.value.code == 400 and json.load(caught.value)["error"]["message"]


@pytest.mark.parametrize("path, part", [
    ("/messages", {"type": "image_url", "image_url": {"url": "data:image/png;base64," + PIXEL}}),
    ("/chat/completions", {"type": "image", "source": {"media_type": "image/png", "data": PIXEL}})])
def test_an_image_in_the_other_providers_form_is_refused(path, part):
    """A client that mixes the two up must not look right against the stand-in."""
    body = {"max_tokens": 9, "messages": [{"content": [{"type": "text", "text": POLE}, part]}]}
    with OfflineVLM() as url, pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(url + path, json.dumps(body).encode())
    assert "no part of type" in json.load(caught.value)["error"]["message"]


def test_a_wrong_media_type_is_refused():
    """A PNG that calls itself JPEG is a 400, as with Anthropic."""
    data = vlm_query.png_base64(draw_pole(0))
    with pytest.raises(offline_vlm.BadQuestion, match="said to be image/jpeg but appears to be image/png"):
        offline_vlm.image(data, "image/jpeg")


def test_a_wrong_key_is_refused_in_every_format():
    """With key set, any other must be a 401, and the right one must pass."""
    for provider in ("openai/m", "gemini/m", "anthropic/m", "local/m"):
        with OfflineVLM(key="right") as url:
            VLM(provider, url=url, key="right").check_sight()
            with pytest.raises(vlm_query.VLMError, match="check the key"):
                VLM(provider, url=url, key="wrong").check_sight()


def test_both_sight_checks_speak_of_the_same_goal():
    """vlm_query.py and offline_vlm.py import nothing of each other, so a test must hold them equal."""
    assert vlm_query.SIGHT_GOAL == offline_vlm.SIGHT


def test_the_stand_in_keeps_nobody_waiting_for_the_network():
    """Its connections must send small bodies at once, and its queue must hold a burst of workers."""
    assert offline_vlm.Handler.disable_nagle_algorithm and offline_vlm.Server.request_queue_size >= 100


def test_a_stand_in_that_stops_is_gone_for_open_connections_too_and_can_start_again():
    """An outage that is played with stop() must be one, and must not take the latency away for ever."""
    server, body = OfflineVLM(latency=0.2), {"messages": [{"content": offline_vlm.SIGHT}]}
    for _ in range(2):
        with server as url, requests.Session() as session:
            began = time.monotonic()
            assert session.post(url + "/chat/completions", json=body).ok and time.monotonic() - began >= 0.2
            server.stop()
            with pytest.raises(requests.ConnectionError):
                session.post(url + "/chat/completions", json=body)


@pytest.mark.parametrize("goal", ["to open the drawer and put the green ball into it", "to open the drawers"])
def test_a_goal_that_only_begins_like_a_known_one_is_unknown(goal):
    """The stand-in must say that it does not know it, not answer another question."""
    with OfflineVLM() as url, pytest.raises(VLMError, match="knows only these goals"):
        label_pairs(quick(url).ask, gray(1), gray(200), goal)


def test_an_unknown_fault_is_named():
    """A typo must not become a server without faults."""
    with pytest.raises(ValueError, match="no fault '430'"):
        OfflineVLM(faults="430")


@pytest.mark.parametrize("wrong", [{"mistakes": 20}, {"unsure": -0.1}, {"faults": float("nan")}, {"latency": -1},
                                   {"latency": float("nan")}])
def test_a_setting_of_the_stand_in_out_of_range_is_named(wrong):
    """20 for 20 % must not become a server that is always wrong."""
    with pytest.raises(ValueError, match=next(iter(wrong))):
        OfflineVLM(**wrong)


def test_the_stand_in_knows_the_goal_of_every_built_in_task():
    """Every goal of envs.py must be one of the readers', word for word."""
    assert {task.goal for task in envs.TASKS.values()} <= set(offline_vlm.READERS)


@pytest.mark.parametrize("goal", offline_vlm.READERS)
def test_each_reader_stands_alone_and_its_words_say_what_it_read(goal):
    """Its source must run with numpy only, blank pictures must not break it, and the sentence must be readable."""
    reader, alone = offline_vlm.READERS[goal], {"np": np}
    exec(inspect.getsource(reader.read), alone)
    for image in (np.zeros((64, 64, 3), np.uint8), np.full((64, 64, 3), 255, np.uint8), draw_pole(20)):
        assert np.array_equal(alone[reader.read.__name__](image), reader.read(image), equal_nan=True)
    words = f"Image 1: {reader.says.format(value=-2.5)}. Image 2: {reader.says.format(value=7)}."
    assert abs(offline_vlm.find_value(reader, words, 1) + 2.5) < 0.6 and offline_vlm.find_value(reader, words, 2) == 7


def test_the_stand_in_serves_from_the_command_line_and_says_what_it_is():
    """The first line must name it and its URL; a bad flag or a taken port must be one line and exit code 2."""
    command = [sys.executable, offline_vlm.__file__, "--faults", "429 hint", "--port"]
    # trap: what a shell starts in the background ignores SIGINT, and so do its children: hence preexec_fn
    with subprocess.Popen([*command, "0"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                          preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)) as process:
        line = process.stdout.readline()
        url = line.split()[-1]
        VLM("offline", url=url).check_sight()
        taken = subprocess.run([*command, url.split(":")[2].split("/")[0]], capture_output=True, text=True, timeout=20)
        process.send_signal(signal.SIGINT)
        try:
            said = process.communicate(timeout=20)[1]
        finally:
            process.kill()
        assert process.returncode == 0 and said == ""  # Ctrl-C is how it ends: no traceback
    wrong = subprocess.run([*command, "0", "--faults", "430"], capture_output=True, text=True, timeout=20)
    assert "not a VLM" in line and "no fault '430'" in wrong.stderr
    for done in (taken, wrong):
        assert done.returncode == 2 and "Traceback" not in done.stderr


# ==== report.py ====
HOSTILE_TEXT = "<script>alert(1)</script><img src=x onerror=alert(2)> \ud800 $\\frac{"


def drawn(page):
    """The charts of a page: (title and labeler as the page names them, SVG text) of each."""
    found = re.findall(r'<img src="data:image/svg\+xml;base64,([^"]*)" alt="([^"]*)"', page)
    return [(alt, base64.b64decode(data).decode()) for data, alt in found]


def write_rows(path, head, rows):
    with open(path, "w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([head.split(","), *rows])


def make_run(folder, labeler="offline stand-in (not a VLM)", pairs=40, size=32, said="It leans."):
    """A synthetic run folder with every file that train.py writes."""
    rng, folder = np.random.default_rng(0), Path(folder)
    (folder / "pairs").mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({
        "env": "CartPole", "goal": "keep the pole upright", "reward": "preference", "seed": 0,
        "labeler": labeler, "command": "python train.py --env CartPole", "total_steps": 4000}))
    write_rows(folder / "metrics.csv", "step,pairs_asked,labels,eval_return,eval_success,"
               "eval_success_any,eval_success_frames,label_accuracy,train_accuracy,"
               "heldout_accuracy,reward_accuracy", [
                   [n, min(n // 40, 60), min(n // 50, 48), -2500 * 2.0 ** (-n / 500) - 50,
                    min(1, n / 2000), min(1, n / 1500), min(1, n / 2500),
                    *([0.8, 0.97, 0.75, 1 - 0.3 * 2.0 ** (-n / 500)] if n else [""] * 4)]
                   for n in range(0, 4001, 250)])
    write_rows(folder / "timing.csv", "step,seconds", [[0, 1.5], [4000, 41.0]])
    write_rows(folder / "episodes.csv", "kind,episode,t,learned_reward,progress,true_reward", [
        [kind, episode, t, np.tanh(1 - slope * t / 40) + 0.05 * rng.normal(), *[-slope * t] * 2]
        for kind, slope in (("after", 0.1), ("expert", 0.2), ("random", 1.5))
        for episode in range(2) for t in range(60)])
    with open(folder / "labels.jsonl", "w") as file:
        for k in range(pairs):
            progress = rng.uniform(-90, 0, 2)
            kind = "label" if k % 5 else ("unsure", "unreadable", "no answer")[k % 3]
            truth = int(progress[1] > progress[0])
            answer = truth if rng.random() < 0.8 else 1 - truth
            label = {"label": answer, "unsure": -1}.get(kind, -2)
            file.write(json.dumps({
                "index": k, "step": 500, "label": label, "kind": kind, "true_label": truth,
                "progress": list(progress), "answers": [said * (1 + 30 * (k % 2)), str(label)],
                "ends": ["complete", "complete"], "tokens_in": 900, "tokens_out": 40,
                "cached": False, "seconds": 0.4}) + "\n")
            sides = np.full((2, size, size, 3), 235, np.uint8)
            for side, value in zip(sides, progress):  # a line that leans by -value degrees
                up = np.arange(size * 3 // 4)
                across = size // 2 + up * np.sin(np.radians(value)) * 0.6
                side[size - 1 - up, across.astype(int)] = 40
            imageio.imwrite(folder / f"pairs/{k:06d}.png", np.concatenate(sides, axis=1))
    for name in ("before", "after"):
        film = rng.integers(0, 255, (6, size, size, 3), dtype=np.uint8)
        imageio.imwrite(folder / f"eval_{name}.gif", film, duration=50, loop=0)
    (folder / "summary.json").write_text(json.dumps({
        "text": "It keeps it upright.", "spearman": 0.97, "seconds": 42.0, "tokens_in": 54000}))
    return folder


@pytest.fixture(scope="module")
def full_report(tmp_path_factory):
    """(folder, page) of a complete run, reported once."""
    folder = make_run(tmp_path_factory.mktemp("report") / "run", said="It leans. " + HOSTILE_TEXT)
    return folder, report.write_report(folder).read_text(encoding="utf-8")


def test_report_is_one_file_that_loads_nothing(full_report):
    """Every picture must be inside the page, and nothing may point outside it."""
    page = full_report[1]
    sources = re.findall(r"<img[^>]* src=\"([^\"]*)", page)
    assert len(sources) == 22 and len(drawn(page)) == 8
    assert all(re.match(r"data:image/(png|gif|svg\+xml);base64,", s) for s in sources)
    assert "http:" not in page and "https:" not in page and "@import" not in page
    policy, = re.findall(r'Content-Security-Policy"\s+content="([^"]*)', page)
    assert policy.startswith("default-src 'none'") and "script-src" not in policy
    assert len(page) < 5_000_000 and 'class="missing"' not in page


def test_the_charts_of_a_report_draw_the_files_of_the_run(full_report, monkeypatch):
    """Every line, bar and dot must stand where metrics.csv, labels.jsonl and episodes.csv say."""
    from matplotlib.figure import Figure

    def keep(run, title, draw):
        kept[title] = Figure().add_axes((0, 0, 1, 1))
        draw(kept[title])
        return ""

    kept, its = {}, report.read_run(full_report[0])
    monkeypatch.setattr(report, "chart", keep)
    report.curves(its, "curves", {"eval_return": ("k", "return"), "label_accuracy": ("r", "labels")})
    report.outcome_chart(its)
    report.episode_charts(its)
    metrics = {name: report.column(its.metrics, name) for name in ("step", "eval_return", "label_accuracy")}
    for drawn_line, name, skip in zip(kept["curves"].lines, ("eval_return", "label_accuracy"), (0, 1)):
        assert np.array_equal(drawn_line.get_xdata(), metrics["step"][skip:])  # no label before the first step
        assert np.array_equal(drawn_line.get_ydata(), metrics[name][skip:])
    bars, = (axes for title, axes in kept.items() if title.startswith("What became"))
    names = [bar.get_label() for bar in bars.containers]
    heights = np.array([[patch.get_height() for patch in bar] for bar in bars.containers])  # (outcomes, bins)
    asked = np.array([int(text.get_text()) for text in bars.texts])
    assert np.allclose(heights.sum(0), 1) and asked.sum() == len(its.labels) == 40
    for name, share in zip(names, heights):
        assert round((share * asked).sum()) == sum(report.outcome(row) == name for row in its.labels) > 0
    table = {name: report.column(its.episodes, name) for name in ("learned_reward", "progress", "true_reward")}
    kind, episode = np.array(its.episodes["kind"]), report.column(its.episodes, "episode")
    for title, name in (("scripted expert", "expert"), ("random actions", "random"), ("after learning", "after")):
        for drawn_line, column in zip(kept[f"Reward along an episode, {title}"].lines, ("learned_reward", "progress")):
            values = table[column]
            expected = (values[(kind == name) & (episode == 0)] - values.min()) / np.ptp(values)
            assert np.allclose(drawn_line.get_ydata(), expected) and drawn_line.get_xdata().tolist() == list(range(60))
    dots, = (axes.lines[0] for title, axes in kept.items() if title.startswith("Learned against true"))
    assert np.array_equal(dots.get_xdata(), table["true_reward"][kind == "random"])
    assert np.array_equal(dots.get_ydata(), table["learned_reward"][kind == "random"])


def test_a_table_that_cannot_be_read_costs_its_section_not_the_report(tmp_path):
    """A cell larger than Python's csv takes must count as no table."""
    (tmp_path / "a.csv").write_text("x\n" + "9" * 200_000 + "\n")
    assert report.read_table(tmp_path / "a.csv") == {}


def test_report_escapes_what_the_vlm_said(full_report):
    """Hostile answers must be shown as text, in full, and never become markup."""
    page = full_report[1]
    assert "<script" not in page and "<img src=x" not in page
    said = "It leans. &lt;script&gt;alert(1)&lt;/script&gt;&lt;img src=x onerror=alert(2)&gt; ?"
    assert f'<div class="said">{said}' in page


def test_report_names_the_labeler_at_every_heading_and_chart(full_report):
    """No stand-in may pass for a VLM: its name must stand at each heading and chart."""
    page = full_report[1]
    name = "labeler: offline stand-in (not a VLM)"
    assert page.count("<h2>") == page.count(f"<small>{name}</small></h2>") == 6
    assert all(alt.endswith(name) and name in svg for alt, svg in drawn(page))


@pytest.mark.parametrize("kinds", [("random", "after"), ("random", "after", "expert")])
def test_report_draws_a_random_episode_beside_the_trained_one(tmp_path, kinds):
    """One episode of each kind that was recorded, in this order."""
    write_rows(tmp_path / "episodes.csv", "kind,episode,t,learned_reward,progress,true_reward", [
        [kind, number, t, t / 10, -t, -t] for number, kind in enumerate(kinds) for t in range(10)])
    page = report.write_report(tmp_path).read_text(encoding="utf-8")
    words = {"random": "random actions", "after": "after learning", "expert": "scripted expert"}
    shown = [words[kind] for kind in kinds]
    titles = [alt.split(";")[0].split(", ")[1] for alt, _ in drawn(page) if "along" in alt]
    assert titles == shown


def test_report_bins_outcomes_by_difference_in_progress():
    """Each pair that was sent must be counted once, by its difference, the largest too."""
    def pair(kind, label, truth, first, second):
        return {"kind": kind, "label": label, "true_label": truth, "progress": [first, second]}
    edges, counts = report.bin_outcomes([
        pair("label", 1, 1, 0, 0.1), pair("label", 0, 1, -0.9, 0), pair("label", 0, 0, 1, 0),
        pair("label", 1, -1, 0.3, 0.3), pair("unsure", -1, 1, 0, 0.8),
        pair("unreadable", -2, 1, 0, 0.2), pair("no answer", -2, 0, 0.6, 0),
        pair("identical", -2, -1, 0, 0), pair("limit", -2, 0, 1, 0),
        {"kind": "label", "label": 1, "true_label": None, "progress": None}], bins=2)
    assert edges.tolist() == [0, 0.5, 1]
    assert {name: n.tolist() for name, n in counts.items() if n.any()} == {
        "right": [1, 1], "wrong": [0, 1], "tie": [1, 0], "unsure": [0, 1], "unreadable": [1, 0],
        "no answer": [0, 1]}
    assert report.bin_outcomes([]) == (None, {})


def test_report_gallery_shows_every_outcome(tmp_path):
    """Pairs must be picked from each outcome in turn, the plainest mistake among them."""
    rows = report.read_run(make_run(tmp_path / "run", pairs=90, size=8)).labels
    chosen = report.choose_pairs(rows, 12)
    assert len({row["index"] for row in chosen}) == 12
    assert [report.outcome(row) for row in chosen] == [
        *["right"] * 3, *["wrong"] * 3, *["unsure"] * 2, *["unreadable"] * 2, *["no answer"] * 2]
    wrong = [row for row in rows if report.outcome(row) == "wrong"]
    assert max(wrong, key=report.difference) in chosen


def test_report_survives_missing_files(tmp_path):
    """With nothing but a config the report must still be written and say what is missing."""
    config = {"goal": HOSTILE_TEXT, "labeler": HOSTILE_TEXT, "seed": 0}
    (tmp_path / "config.json").write_text(json.dumps(config))
    page = report.write_report(tmp_path).read_text(encoding="utf-8")
    assert "This run has not ended" in page and "no learning curves" in page and "seed: 0" in page
    assert "<script" not in page and page.count('class="missing"') >= 6


def test_report_drops_torn_last_lines(tmp_path):
    """Half a line, as a killed run leaves it, must be left out, for half a number is a number."""
    (tmp_path / "metrics.csv").write_text("step,eval_return\r\n0,-900\r\n500,-120\r\n1000,-3")
    (tmp_path / "labels.jsonl").write_text('{"kind": "unsure", "label": -1}\n[1]\n{"kind": "la')
    (tmp_path / "config.json").write_text('{"goal": "keep')
    (tmp_path / "eval_after.gif").write_bytes(b"")
    run = report.read_run(tmp_path)
    assert run.metrics == {"step": ["0", "500"], "eval_return": ["-900", "-120"]}
    assert run.labels == [{"kind": "unsure", "label": -1}]
    page = report.write_report(tmp_path).read_text(encoding="utf-8")
    assert "<b>\N{MINUS SIGN}120</b>" in page and "No eval_after.gif." in page
    assert "Goal not recorded" in page and "labeler: not recorded" in page


def test_report_draws_a_labeler_with_dollars_and_markup(tmp_path):
    """A VLM's name is hostile too: in a chart it must be text, neither a formula nor markup."""
    (tmp_path / "config.json").write_text(json.dumps({"labeler": "local/$x$<script>"}))
    (tmp_path / "metrics.csv").write_text("step,eval_return\n0,-900\n500,-120\n")
    page = report.write_report(tmp_path).read_text(encoding="utf-8")
    assert all(">labeler: local/$x$&lt;script&gt;</text>" in svg for _, svg in drawn(page))
    assert drawn(page) and "<script" not in page


def test_report_shows_programs_with_their_verification_as_text(tmp_path):
    """A VLM-CaR run must show programs, reasons and failing pictures, and no word of it as markup."""
    folder = tmp_path / "code_as_reward"
    for name in ("programs", "failed"):
        (folder / name).mkdir(parents=True)
    (tmp_path / "config.json").write_text('{"reward": "code"}')
    hostile = "<script>alert(1)</script><img src=x onerror=alert(2)>"
    for name in ("programs/1_reach", "failed/1_reach_round1"):
        (folder / f"{name}.py").write_text(f"# sub-task: {hostile}\nreturn 1 < 2\n")
    (folder / "verification.json").write_text(json.dumps([
        {"subtask": hostile, "hit_rate": 0.95, "reasons": ["fires <early>", f"error: {hostile}"]}]))
    imageio.imwrite(folder / "failed" / "1_reach_0.png", np.zeros((8, 8, 3), np.uint8))
    page = report.write_report(tmp_path).read_text(encoding="utf-8")
    assert page.count("return 1 &lt; 2") == 2 and "<th>hit rate</th>" in page
    assert "<td>0.95</td>" in page and "fires &lt;early&gt;; error: " in page
    assert "<script" not in page and "<img src=x" not in page and page.count("&lt;script&gt;") == 4
    assert page.count("data:image/png") == 1 and "labels are" not in page


@pytest.mark.parametrize("folder", ["nowhere", "empty"])
def test_report_of_no_run_folder_is_one_clear_line(tmp_path, folder):
    """A wrong folder must end with one line and exit code 2, and nothing may be written."""
    (tmp_path / "empty").mkdir()
    command = [sys.executable, report.__file__, str(tmp_path / folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1
    assert "run folder" in done.stderr and not list(tmp_path.rglob("report.html"))


# ==== cached_labels.py and audit_vlm.py ====
def cached_file(path, labels=(0, 1, -1, 1), protocol=5, half=12):
    """A file as the official repository writes it: the left half of picture i has brightness i, the right 100 + i."""
    left = np.arange(len(labels), dtype=np.uint8)[:, None, None, None] * np.ones((1, half, half, 3), np.uint8)
    column, rest = np.array(labels, np.int64).reshape(-1, 1), np.zeros((len(labels), 1, 5))
    parts = [np.concatenate([left, left + 100], axis=2), 1 - column, column, rest, rest, rest[:, 0], rest[:, 0]]
    path.write_bytes(pickle.dumps(parts, protocol))
    return path


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_official_cached_labels_are_read_and_unsure_ones_dropped(tmp_path, protocol):
    """The VLM's labels (not those by reward) must come with left half first, right half second, in order of files."""
    cached_file(tmp_path / "2024-01-02.pkl", (1,), protocol)
    cached_file(tmp_path / "2024-01-01.pkl", (0, 1, -1, 1), protocol)
    first, second, label, source = cached_labels.read_labels(str(tmp_path))
    assert label.tolist() == [0, 1, 1, 1] and "official" in source
    assert first[:, 0, 0, 0].tolist() == [0, 1, 3, 0] and second[:, 0, 0, 0].tolist() == [100, 101, 103, 100]
    assert first.shape == second.shape == (4, 12, 12, 3) and first.dtype == np.uint8


def test_pickles_of_numpy_1_and_2_and_of_any_memory_order_are_read(tmp_path):
    """numpy's modules were renamed in version 2; arrays may lie column by column: both must give the same pictures."""
    path = cached_file(tmp_path / "a.pkl", protocol=3)
    new, old = path.read_bytes(), path.read_bytes().replace(b"numpy._core", b"numpy.core")
    parts = pickle.loads(new)
    fortran = pickle.dumps([np.asfortranarray(parts[0]), None, parts[2].astype(">i4")], 5)
    for content in (old, fortran):
        path.write_bytes(new)
        expected = cached_labels.read_labels(str(path))
        path.write_bytes(content)
        assert all(np.array_equal(a, b) for a, b in zip(expected[:3], cached_labels.read_labels(str(path))[:3]))


class Attack:
    def __reduce__(self):
        return os.system, ("echo owned > owned.txt",)


HOSTILE_FILES = {
    "a key that takes for ever to hash": lambda good: b"\x80\x02})" + b"2\x86" * 60 + b"Ns.",
    "a type that takes for ever to print": lambda good: b"\x80\x02cnumpy\ndtype\n)" + b"2\x86" * 60 + b"\x85R.",
    "other defaults for a function": lambda good: b"\x80\x02cnumpy._core.numeric\n_frombuffer\n"
                                                  b"N}X\x0c\x00\x00\x00__defaults__(K\x01ts\x86b.",
    "runs a command": lambda good: pickle.dumps([Attack()] * 7),
    "names a numpy function": lambda good: b"cnumpy\nload\n(S'x'\ntR.",
    "holds objects": lambda good: pickle.dumps([np.array([Attack()], dtype=object)] * 7),
    "truncated": lambda good: good[: len(good) // 2],
    "empty": lambda good: b"",
    "garbage": lambda good: b"\x93\xff\x00garbage" * 100,
    "forged length": lambda good: b"\x80\x05\x96" + (2**40).to_bytes(8, "little") + b"x.",
    "forged slot": lambda good: b"\x80\x02Nr\xff\xff\xff\x7f.",
    "too few parts": lambda good: pickle.dumps([1, 2]),
    "float pictures": lambda good: pickle.dumps([np.zeros((2, 4, 8, 3)), 0, np.zeros((2, 1), int)]),
    "too few labels": lambda good: pickle.dumps([np.zeros((2, 4, 8, 3), np.uint8), 0, np.zeros((1, 1), int)]),
}


@pytest.mark.parametrize("kind", HOSTILE_FILES)
def test_hostile_pickles_end_in_one_clear_line(tmp_path, monkeypatch, kind):
    """A pickle that would run os.system, a broken or a forged one must be refused by name, and nothing be run."""
    monkeypatch.chdir(tmp_path)
    path = cached_file(tmp_path / "labels.pkl")
    path.write_bytes(HOSTILE_FILES[kind](path.read_bytes()))
    with pytest.raises(cached_labels.CachedLabelsError) as error:
        cached_labels.read_labels(str(path))
    assert "labels.pkl" in str(error.value) and "\n" not in str(error.value)
    reason = {"runs a command": "system, and only arrays are allowed", "forged slot": "it counts 2147483647 objects"}
    assert reason.get(kind, "") in str(error.value)
    assert not (tmp_path / "owned.txt").exists()


def small_log(folder, records, size=(10, 20)):
    """A run folder's labels.jsonl; picture i has brightness i on the left half, 100 + i on the right."""
    (folder / "pairs").mkdir(exist_ok=True)
    for record in records:
        image = np.full((*size, 3), record["index"], np.uint8)
        image[:, size[1] // 2 :] += 100
        imageio.imwrite(folder / "pairs" / f"{record['index']:06d}.png", image)
    (folder / "labels.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (folder / "config.json").write_text(json.dumps({"labeler": "offline stand-in (not a VLM)"}))
    return folder / "labels.jsonl"


def test_labels_of_a_run_are_read_with_their_pictures_and_their_labeler(tmp_path):
    """Labels 0 and 1 must come with the halves of their own picture; a torn last line is dropped; who said so stays."""
    records = [{"index": i, "label": label} for i, label in ((3, 1), (0, 0), (1, -1), (2, -2))]
    log = small_log(tmp_path, records)
    with open(log, "a") as file:
        file.write('{"index": 4, "la')
    for path in (log, tmp_path):
        first, second, label, source = cached_labels.read_labels(str(path))
        assert label.tolist() == [1, 0] and first[:, 0, 0, 0].tolist() == [3, 0]
        assert second[:, 0, 0, 0].tolist() == [103, 100] and first.shape == (2, 10, 10, 3)
        assert "offline stand-in (not a VLM)" in source
    assert cached_labels.read_labels(str(log), size=5)[1].shape == (2, 5, 5, 3)


@pytest.mark.parametrize("line", [b"\x00\xff\xfe\x80", b"[1, 2]", b'{"index": "../../etc/passwd", "label": 1}',
                                  b'{"index": -1, "label": 1}', b'{"index": true, "label": 1}', b"[" * 100_000])
def test_a_label_log_with_garbage_ends_in_one_clear_line(tmp_path, line):
    """Whatever is no record of a label must be refused with the number of its line."""
    log = small_log(tmp_path, [{"index": 0, "label": 1}])
    log.write_bytes(log.read_bytes() + line + b"\n")
    with pytest.raises(cached_labels.CachedLabelsError, match="line 2 is not a label record"):
        cached_labels.read_labels(str(log))


def test_an_enormous_picture_is_refused_before_it_is_unpacked(tmp_path, monkeypatch):
    """20,000 x 20,000 pixels must be refused from the header alone, and a picture that is none in one line."""
    log = small_log(tmp_path, [{"index": 0, "label": 1}])
    picture = tmp_path / "pairs" / "000000.png"
    good = picture.read_bytes()
    monkeypatch.setattr(cached_labels.iio, "imread", lambda *_, **__: pytest.fail("it was unpacked"))
    picture.write_bytes(good[:16] + struct.pack(">II", 20_000, 20_000) + good[24:])
    with pytest.raises(cached_labels.CachedLabelsError, match="20000 x 20000 pixels is too large"):
        cached_labels.read_labels(str(log))
    monkeypatch.undo()
    for content in (good[:40], b"", b"no picture", b"\x89PNG\r\n\x1a\n" + bytes(30)):
        picture.write_bytes(content)
        with pytest.raises(cached_labels.CachedLabelsError, match="000000.png"):
            cached_labels.read_labels(str(log))


def test_resized_pictures_keep_their_means():
    """Every new pixel must be the mean of those it covers: a black and white check becomes grey."""
    check = (np.indices((8, 8)).sum(0) % 2 * 255).astype(np.uint8)[None, ..., None].repeat(3, -1)
    assert cached_labels.resize(check, 8) is check
    assert np.abs(cached_labels.resize(check, 4).astype(int) - 127.5).max() < 1


def test_cached_labels_on_the_command_line(tmp_path, monkeypatch, capsys):
    """The demo must say how many labels of which kind, by whom, and draw them; a user's mistake is one line and a 2."""
    monkeypatch.chdir(tmp_path)
    small_log(tmp_path, [{"index": i, "label": i % 2} for i in range(5)])
    assert cached_labels.main(["."]) == 0
    said = capsys.readouterr().out
    assert "5 labels by offline stand-in (not a VLM)" in said and "3 prefer the first" in said
    assert imageio.imread("contact_labels.png").shape[2] == 3
    for wrong in (["nowhere"], [".", "--out", "no/such.png"], [".", "--out", "x.foo"]):
        assert cached_labels.main(wrong) == 2 and capsys.readouterr().err.count("\n") == 1
    with pytest.raises(SystemExit):
        cached_labels.main([".", "--size", "0"])
    assert "--size 0: it must be at least 1" in capsys.readouterr().err


@pytest.fixture(scope="module")
def small_audit(tmp_path_factory):
    """A whole audit of the stand-in on CartPole, small: 20 pairs, four questions each."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(audit_vlm, "PER_KIND", 15)
        out = str(tmp_path_factory.mktemp("runs") / "an_audit")
        config = run.Config(env="CartPole", horizon=30, out=out, usd_per_mtok="1,2")
        return Path(out), audit_vlm.audit(config, pairs=20)


def test_an_audit_that_exists_is_neither_written_over_nor_trained_in(small_audit):
    """Its answers were paid for: no command, nor one that a message names, may empty its labels.jsonl."""
    folder, _ = small_audit
    answers = (folder / "labels.jsonl").read_bytes()
    with pytest.raises(run.UserError, match="choose another --out") as caught:
        audit_vlm.audit(run.Config(env="CartPole", out=str(folder)))
    assert "--resume" not in str(caught.value)
    with pytest.raises(run.UserError, match="no run folder of train.py"):
        run.parse_args(["--resume", str(folder)])
    assert (folder / "labels.jsonl").read_bytes() == answers


def test_an_audit_needs_no_disk_for_a_run_and_no_price_for_what_was_not_asked(tmp_path, monkeypatch):
    """A long schedule changes only the projected cost, and where a limit left nothing to ask, nan is no cost."""
    monkeypatch.setattr(audit_vlm, "PER_KIND", 5)
    config = run.Config(env="CartPole", horizon=30, out=str(tmp_path / "it"), total_steps=10**12, max_calls=6, workers=1,
                        usd_per_mtok="1,2")
    text = audit_vlm.audit(config, pairs=1)["text"]
    assert "cost: nothing was asked" in text and "nan" not in text


def test_an_audit_asks_each_pair_in_both_orders_and_both_ways(small_audit):
    """20 pairs must give 80 records, the stand-in's being right, and every bin of differences as many of them."""
    folder, result = small_audit
    records = vlm_query.LabelLog.read(folder / "labels.jsonl")
    assert len(records) == 80 and len({(r["pair"], r["order"], r["stages"]) for r in records}) == 80
    by_order = {order: {r["pair"]: r["true_label"] for r in records if r["order"] == order} for order in (0, 1)}
    assert all(by_order[0][pair] + by_order[1][pair] == 1 for pair in range(20))
    bins = [row for row in result["rows"] if (row["low"], row["high"]) in set(zip(audit_vlm.BINS, audit_vlm.BINS[1:]))]
    assert [row["questions"] for row in bins] == [8] * 10
    clear = audit_vlm.of(result["rows"], 2, audit_vlm.CLEAR)
    assert clear["accuracy"] > 0.95 and clear["consistent"] == 1 and clear["first_share"] == 0.5
    assert all(row["usd"] == pytest.approx((row["tokens_in"] + 2 * row["tokens_out"]) / 1e6) for row in bins)


def test_every_output_of_an_audit_names_the_labeler(small_audit):
    """Nothing that an audit leaves behind may let the stand-in pass for a VLM."""
    folder, result = small_audit
    for name in ("audit.txt", "audit.csv", "config.json"):
        assert "offline stand-in (not a VLM)" in (folder / name).read_text()
    assert "offline stand-in (not a VLM), two stages: " + result["verdict"] in result["text"]
    assert imageio.imread(folder / "audit.png").shape[0] > 300


def test_labels_of_an_audit_can_be_trained_on(small_audit):
    """cached_labels.py must read an audit's labels.jsonl and pictures, and the labels must fit the pictures."""
    folder, result = small_audit
    first, second, label, source = cached_labels.read_labels(str(folder))
    labels = sum(audit_vlm.of(result["rows"], stages, 0.0)[name] for stages in (1, 2) for name in ("right", "wrong"))
    assert len(label) == labels and "not a VLM" in source
    upright = [abs(offline_vlm.read_pole(image)) for image in np.concatenate([first, second])]
    better = np.array(upright[len(first):]) < np.array(upright[: len(first)])
    assert (better == label).mean() > 0.95


def test_pairs_are_spread_over_all_differences_and_never_look_alike():
    """Every bin must give the same number of pairs while it has some; equal progress and equal looks are left out."""
    progress = np.random.default_rng(0).uniform(0, 1, 60)
    images = (200 * progress).astype(np.uint8)[:, None, None, None] * np.ones((1, 8, 8, 3), np.uint8)
    pairs, gap = audit_vlm.draw_pairs(images, progress, 50, np.random.default_rng(1))
    again, _ = audit_vlm.draw_pairs(images, progress, 50, np.random.default_rng(1))
    assert np.array_equal(pairs, again)  # so that a second audit finds its answers in the cache
    assert np.histogram(gap, audit_vlm.BINS)[0].tolist() == [10] * 5
    assert len(set(map(frozenset, pairs))) == 50 and 10 < (pairs[:, 0] < pairs[:, 1]).sum() < 40
    assert not any(vlm_query.looks_identical(images[a], images[b]) for a, b in pairs)
    few, _ = audit_vlm.draw_pairs(images[:3], np.array([0.0, 0.0, 1.0]), 50, np.random.default_rng(1))
    assert len(few) == 2
    with pytest.raises(run.UserError, match="nothing to compare"):
        audit_vlm.draw_pairs(images, np.ones(60), 50, np.random.default_rng(1))


def audit_records(answer, pairs=40, difference=0.5):
    """Records of a VLM whose answer is a function of (pair, order, true label): a label, -1, or a kind of failure."""
    records = []
    for pair, order in ((pair, order) for pair in range(pairs) for order in (0, 1)):
        true_label = (pair + order) % 2
        said = answer(pair, order, true_label)
        kind = said if isinstance(said, str) else "label" if said >= 0 else "unsure"
        records += [{"pair": pair, "order": order, "stages": stages, "true_label": true_label, "kind": kind,
                     "label": said if kind == "label" else -1, "difference": difference, "tokens_in": 300,
                     "tokens_out": 40, "cached": order == 0, "seconds": 2.0 * order} for stages in (1, 2)]
    return records


VLMS = {
    "good enough": lambda pair, order, true: true,
    "good enough: 90 %": lambda pair, order, true: 1 - true if pair % 10 == 0 else true,
    "not good enough": lambda pair, order, true: 1 - true,
    "not good enough: 50 %": lambda pair, order, true: 0,  # always picks the first picture
    "undecided, ask more --pairs": lambda pair, order, true: 1 - true if pair % 4 == 0 else true,
    "not good enough: 100 %": lambda pair, order, true: true if pair < 15 else "unreadable",
    "undecided: no question": lambda pair, order, true: "limit",
}


@pytest.mark.parametrize("begins", VLMS)
def test_the_verdict_follows_its_rule(begins):
    """P(right) above or below 3/4, the interval around it, and half of the questions labelled: nothing else decides."""
    rows = audit_vlm.summaries(audit_records(VLMS[begins]), None)
    assert all(audit_vlm.verdict(rows, stages).startswith(begins) for stages in (1, 2))
    unclear = audit_vlm.summaries(audit_records(VLMS[begins], difference=0.07), None)
    assert audit_vlm.verdict(unclear, 2).startswith("undecided: no question")


def test_a_habit_of_picking_the_first_picture_is_seen():
    """Who always picks the first must have first_share 1 and consistent 0; who is always wrong must be consistent."""
    first, wrong = (audit_vlm.summary([r for r in audit_records(VLMS[name]) if r["stages"] == 2])
                    for name in ("not good enough: 50 %", "not good enough"))
    assert (first["first_share"], first["consistent"], first["accuracy"]) == (1, 0, 0.5)
    assert (wrong["first_share"], wrong["consistent"], wrong["accuracy"]) == (0.5, 1, 0)


def test_time_and_price_of_a_run_are_projected_from_its_schedule():
    """Seconds must come from answers not in the cache; a run asks as its schedule says, up to max_pairs."""
    row = audit_vlm.summary(audit_records(VLMS["good enough"]), price=(1.0, 10.0))
    assert row["seconds"] == 2.0 and row["usd"] == pytest.approx(700e-6)
    config = run.resolve(run.Config(env="CartPole", total_steps=2000, explore_steps=400, feedback_every=400,
                                    pairs_per_session=10, max_pairs=45, workers=5))
    text = "\n".join(audit_vlm.cost_lines(row, 2, config))
    assert "45 pairs, 90 calls, 15,300 tokens" in text and f"a run: ${45 * 700e-6:.2f}" in text
    assert f"{45 * 2.0 / 5 / 3600:.2f} h" in text
    assert "50 pairs" in audit_vlm.cost_lines(row, 2, dataclasses.replace(config, max_pairs=100))[0]


def test_wilson_interval_has_the_textbook_values():
    """8 of 10: 49 to 94 %; no draws: nothing is known."""
    assert np.round(audit_vlm.wilson(0.8, 10), 2).tolist() == [0.49, 0.94]
    assert audit_vlm.wilson(float("nan"), 0) == (0.0, 1.0) and audit_vlm.wilson(1.0, 10)[1] == pytest.approx(1)


@pytest.mark.parametrize("reply, stops", [(("maybe", "complete"), False), (("", "unreachable: HTTP 503"), True)])
def test_unreadable_answers_are_a_finding_and_an_outage_is_not(reply, stops):
    """A VLM that babbles must be audited to the end; where there is no answer at all the audit must stop."""
    vlm = types.SimpleNamespace(ask=lambda parts: vlm_query.Reply(*reply, 9, 1, False))
    images, kept = np.stack([np.full((8, 8, 3), level, np.uint8) for level in (0, 60, 120, 180, 240)]), []
    config = run.Config(goal="g", workers=2)
    with pytest.raises(vlm_query.VLMError) if stops else contextlib.nullcontext():
        audit_vlm.ask_batch(vlm, images[:4], images[1:], config, 1, kept.append)
    assert {record["kind"] for record in kept} == {"no answer" if stops else "unreadable"} and len(kept) == 4


def test_an_outage_is_one_though_a_limit_came_first():
    """Three of four answers missing must stop the audit, however many pairs were left unasked."""
    vlm, tries = vlm_query.VLM("local/m", url="http://127.0.0.1:1/v1", max_calls=2), []

    def send(*_):
        tries.append(1)
        if len(tries) % 4:
            raise TimeoutError("HTTP 503")
        return '{"choices": [{"message": {"content": "0"}, "finish_reason": "stop"}]}'

    vlm._send = send
    images = np.stack([np.full((8, 8, 3), 20 * level, np.uint8) for level in range(13)])
    kept, config = [], run.Config(goal="g", workers=1)
    vlm.room = lambda stages: 4 if not tries else 0
    with pytest.raises(vlm_query.VLMError, match="3 of 4 questions"):
        audit_vlm.ask_batch(vlm, images[:12], images[1:], config, 1, kept.append)
    assert [record["kind"] for record in kept].count("limit") == 8


def test_half_trained_pictures_can_come_from_a_run(tmp_path):
    """--policy must use the stored network, refuse a run of another task, and refuse what is no run."""
    env = envs.make("CartPole")
    agent = sac.SAC(4, env.action_space, (8, 8), seed=3)
    (tmp_path / "checkpoint").mkdir()
    torch.save({"agent": agent.state_dict()}, tmp_path / "checkpoint" / "state.pt")
    (tmp_path / "config.json").write_text(json.dumps({"env": "CartPole", "hidden": 8, "device": "cpu"}))
    config = run.Config(env="CartPole", seed=1)
    learned = audit_vlm.policies(config, env, str(tmp_path), np.random.default_rng(0))["half-trained"](0)
    obs = env.reset(seed=0)[0]
    assert np.allclose(learned(obs, explore=False), agent.act(obs, explore=False))
    for folder, other in ((tmp_path, "DrawerOpen"), (tmp_path / "nowhere", "CartPole")):
        with pytest.raises(run.UserError, match="--policy .*no run of train.py that can be used"):
            audit_vlm.trained_policy(str(folder), dataclasses.replace(config, env=other), env)


@pytest.mark.parametrize("flags, says", [
    (["--pears", "3"], "--pairs"), (["--pairs", "0"], "at least one pair"), (["--pairs", "x"], "invalid int"),
    (["--labels", "oracle"], "asks a VLM"), (["--labels-from", "x"], "asks a VLM"),
    (["--env", "Nowhere"], "unknown environment Nowhere"),
    (["--vlm", "local/x"], "URL"), (["--policy", "nowhere"], "no run of train.py"),
    (["--max-usd", "1"], "--usd-per-mtok"), (["--out", "."], "exists already"),
])
def test_mistakes_on_the_audit_command_line_end_in_one_line(tmp_path, monkeypatch, capsys, flags, says):
    """Exit code 2, one line that says what to do, and no folder left behind."""
    monkeypatch.chdir(tmp_path)
    assert audit_vlm.main(flags) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert says in said[-1] and said[-1].startswith("audit_vlm.py: ")
    assert not list(tmp_path.glob("runs/audit*"))


# ==== sweep.py and plots.py ====
STUB = '''
import csv, dataclasses, json, os, time
import run
def train(config):
    if config.seed == 7:
        raise ValueError("seven does not\\nlearn")
    if config.seed == 8:
        os._exit(9)
    os.makedirs(config.out, exist_ok=True)
    if config.seed == 9:
        open(config.out + "/pid", "w").write(str(os.getpid()))
        time.sleep(60)
    json.dump({**dataclasses.asdict(run.resolve(config)), "resume": None, "members": 3, "command": "python train.py",
               "labeler": "offline stand-in (not a VLM)"},
              open(config.out + "/config.json", "w"))
    with open(config.out + "/metrics.csv", "w") as file:
        file.write("step,pairs_asked,reward_accuracy,eval_return,eval_success\\n0,0,,-9,0\\n100,5,0.75,-1,0.5\\n")
    print("trained", config.seed, "resumed" if config.resume else "afresh")
    with open(config.out + "/episodes.csv", "w") as file:
        file.write("kind,t,learned_reward,progress\\nrandom,0,9,0\\n" + "".join(
            f"expert,{t},{'0123'[t]},{'0213'[t]}\\n" for t in range(4)))
    json.dump({"finished": config.max_pairs != 13 or bool(config.resume), "steps": 100, "asked": 5, "labels": 4,
               "label_accuracy": float("nan"), "eval_success": 0.5, "labeler": "offline stand-in (not a VLM)"},
              open(config.out + "/summary.json", "w"))
'''


@pytest.fixture
def stub_train(tmp_path, monkeypatch):
    """A train.py that takes no time, for this process and those it starts, in a folder of its own; no Ray."""
    (tmp_path / "stub").mkdir()
    (tmp_path / "stub" / "train.py").write_text(STUB)
    monkeypatch.syspath_prepend(str(tmp_path / "stub"))
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delitem(sys.modules, "train", raising=False)
    monkeypatch.setenv("TQDM_MININTERVAL", "1")
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def here(stub_train, monkeypatch):
    """The same with every run in this very process."""
    monkeypatch.setattr(sweep, "start", lambda jobs, parallel, address: ((j, *sweep.run_one(j)) for j in jobs))


def result(name="mine"):
    return sweep.read_csv(f"results/{name}.csv")


def test_every_run_of_every_sweep_is_one_that_train_accepts():
    """The table must name settings that exist, with values that exist, and no run twice."""
    for name in sweep.SWEEPS:
        jobs = sweep.plan(name)
        assert len({sweep.slug(job) for job in jobs}) == len(jobs) == len({job.key() for job in jobs})
        for job in jobs:
            run.resolve(run.Config(env=job.task, seed=job.seed, **job.overrides))


def test_a_sweep_does_one_seed_of_everything_first():
    """Stopped half-way it must be a smaller study: all of seed 0, then all of seed 1; 5 seeds, 3 for Meta-World."""
    jobs = sweep.plan("tasks")
    assert [job.seed for job in jobs] == sorted(job.seed for job in jobs)
    seeds = {task: {job.seed for job in jobs if job.task == task} for task in sweep.SEVEN}
    assert len(seeds["CartPole"]) == 5 and len(seeds["Soccer"]) == 3
    assert {job.seed for job in sweep.plan("tasks", seeds=4) if job.task == "Soccer"} == {0, 1, 2, 3}
    kept = sweep.only(jobs, ["CartPole", "oracle"])
    assert {(job.task, job.setting) for job in kept} == {("CartPole", "oracle")} and len(kept) == 5


def test_a_grid_from_the_command_line_has_the_types_of_config():
    """`max_pairs=1e1,20 seed=0,1` must become numbers; an unknown field must be refused with the list of fields."""
    jobs = sweep.plan_grid(["env=CartPole", "max_pairs=1e1,20", "seed=0,1"])
    assert [(job.seed, job.overrides) for job in jobs] == [(s, {"max_pairs": n}) for s in (0, 1) for n in (10, 20)]
    with pytest.raises(run.UserError, match="--max-pairs"):
        sweep.plan_grid(["no_such_field=1"])
    assert sweep.main(["--grid", "seed=0,1"]) == 2  # no --name: it must not mix with what is there


def test_a_run_that_fails_is_a_row_and_ends_no_sweep(stub_train):
    """An exception and a dead process must each become a row with its reason; the runs beside them must be whole."""
    jobs = sweep.plan_grid(["env=CartPole", "seed=7,8,0"])
    assert sweep.sweep(jobs, "mine", parallel=3) == 2
    rows = {row["seed"]: row for row in result()}
    assert rows["7"]["error"] == "ValueError: seven does not learn" and rows["7"]["eval_success"] == ""
    assert "process died" in rows["8"]["error"]
    assert (rows["0"]["error"], rows["0"]["eval_success"], rows["0"]["reward_accuracy"]) == ("", "0.5", "0.75")
    assert rows["0"]["label_accuracy"] == "" and rows["0"]["pairs_asked"] == "5" and rows["0"]["method"] == "preference"
    assert [row["step"] for row in result("mine_curves")] == ["0", "100"]
    assert "trained 0 afresh" in open("runs/sweeps/mine/CartPole-default-seed0/train.log").read()


def test_finished_runs_are_skipped_and_half_done_ones_resumed(here):
    """The second call must train only what has no result, from where it was; a third call nothing at all."""
    jobs = sweep.plan_grid(["env=CartPole", "max_pairs=10,13", "seed=0"])  # the stub leaves 13 half-done at first
    log = "runs/sweeps/mine/CartPole-max_pairs={}-seed0/train.log"
    assert sweep.sweep(jobs, "mine") == 1 and {row["error"] for row in result()} == {"", "interrupted"}
    before = open(log.format(10)).read()
    assert sweep.sweep(jobs, "mine") == 0 and {row["error"] for row in result()} == {""}
    assert open(log.format(10)).read() == before and "resumed" in open(log.format(13)).read()
    times = os.path.getmtime(log.format(13))
    assert sweep.sweep(jobs, "mine") == 0 and os.path.getmtime(log.format(13)) == times
    os.makedirs("killed")  # before it had written its settings
    assert sweep.settings(dataclasses.replace(jobs[0], folder="killed")).resume == "killed"


def test_rows_of_earlier_calls_stay_and_a_changed_table_is_noticed(here, monkeypatch):
    """A part of a sweep must add to the CSV; a folder with other settings under the same name must be refused."""
    sweep.sweep(sweep.plan_grid(["env=CartPole", "seed=0"]), "mine")
    sweep.sweep(sweep.plan_grid(["env=Soccer", "members=3", "seed=0"]), "mine")
    assert [(row["task"], row["members"]) for row in result()] == [("Soccer", "3"), ("CartPole", "")]
    changed = [dataclasses.replace(job, overrides={"max_pairs": 99})
               for job in sweep.plan_grid(["env=CartPole", "seed=0"])]
    with pytest.raises(ValueError, match="max_pairs=100, not 99.*another --name"):
        sweep.sweep(changed, "mine")
    monkeypatch.setitem(schedules.OURS["CartPole"], "total_steps", 777)  # the task's own preset has changed
    with pytest.raises(ValueError, match="total_steps=2000, not 777.*another --name"):
        sweep.sweep(sweep.plan_grid(["env=CartPole", "seed=0"]), "mine")


def test_a_run_that_fails_here_does_not_replace_one_that_was_measured(here):
    """On a machine where nothing runs, the committed rows and curves must stay as they are."""
    sweep.sweep(sweep.plan_grid(["env=CartPole", "seed=0"]), "mine")
    before = result(), result("mine_curves")
    monkey = sweep.Table("results/mine.csv")
    monkey.add(sweep.plan_grid(["env=CartPole", "seed=0"])[0], "ModuleNotFoundError")
    monkey.write()
    assert (result(), result("mine_curves")) == before


def test_a_table_is_written_by_one_sweep_at_a_time(here):
    """While another process holds the table, a write must wait: both read, change and write the same file."""
    os.makedirs("results")
    with open("results/mine.csv.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        writer = threading.Thread(target=sweep.Table("results/mine.csv").write)
        writer.start()
        writer.join(0.3)
        assert writer.is_alive() and not os.path.exists("results/mine.csv")
    writer.join(5)
    assert os.path.exists("results/mine.csv")


def test_what_a_finished_run_sends_home_replaces_what_an_interrupted_one_sent(stub_train, monkeypatch):
    """Where there is no common disk, the first attempt's numbers must not stand for the second's."""
    jobs, attempts = sweep.plan_grid(["env=CartPole", "seed=0"]), []

    def far_away(jobs, parallel, address):
        attempts.append(1)
        finished, summary = len(attempts) == 2, {"steps": 100 * len(attempts), "asked": 5}
        files = {"config.json": dataclasses.asdict(run.resolve(run.Config())) | {"command": "python train.py"},
                 "summary.json": summary | {"finished": finished, "eval_success": 1.0}}
        files = {name: json.dumps(content).encode() for name, content in files.items()}
        yield jobs[0], "" if finished else "interrupted", {**files, "metrics.csv": b"step,reward_accuracy\n0,1\n"}

    monkeypatch.setattr(sweep, "start", far_away)
    assert sweep.sweep(jobs, "mine") == 1 and sweep.sweep(jobs, "mine") == 0
    assert [(row["steps"], row["error"]) for row in result()] == [("200", "")]


def test_settings_that_all_runs_share_are_taken_whole():
    """--set is one value, commas and all; --grid splits; dashes do as well; env and seed have flags of their own."""
    assert sweep.parse_fields(["usd-per-mtok=1,2"], split=False) == {"usd_per_mtok": ["1,2"]}
    assert sweep.parse_fields(["sac-lr=1e-3,2e-3"]) == {"sac_lr": [1e-3, 2e-3]}
    assert sweep.main(["tasks", "--set", "seed=3", "--name", "x"]) == 2
    assert sweep.main(["--grid", "env=CartPole", "--seeds", "5", "--name", "x"]) == 2


def test_a_setting_that_is_a_measure_too_has_one_column(here):
    """`labels` is a setting (oracle) and a measure (how many): the table must not have it twice."""
    sweep.sweep(sweep.plan_grid(["env=CartPole", "labels=vlm,oracle"]), "mine")
    header = open("results/mine.csv").readline().strip().split(",")
    assert header.count("labels") == 1 and len(set(header)) == len(header)


def test_a_killed_sweep_leaves_no_run_behind(stub_train):
    """When the sweep is killed, its runs must end too: its successor would write beside them."""
    command = "import sweep\nif __name__ == '__main__':\n    sweep.sweep(sweep.plan_grid(['seed=9']), 'mine')"
    open("go.py", "w").write(command)
    paths = os.pathsep.join([os.path.abspath("stub"), os.path.dirname(sweep.__file__)])
    parent = subprocess.Popen([sys.executable, "go.py"], env={**os.environ, "PYTHONPATH": paths},
                              stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    pid_file = "runs/sweeps/mine/CartPole-default-seed9/pid"
    assert wait_until(lambda: os.path.exists(pid_file) and open(pid_file).read(), 30)
    parent.kill()
    parent.wait()
    assert wait_until(lambda: not alive(int(open(pid_file).read())), 10)


def wait_until(true, seconds):
    end = time.time() + seconds
    while not true() and time.time() < end:
        time.sleep(0.05)
    return true()


def alive(pid):
    """Whether a process runs; one that only waits for its parent to notice does not."""
    try:
        return open(f"/proc/{pid}/stat").read().split()[2] != "Z"
    except FileNotFoundError:
        return False


def test_the_same_sweep_runs_on_ray(stub_train, monkeypatch, tmp_path):
    """With Ray the rows must be those of the processes."""
    monkeypatch.delitem(sys.modules, "ray")
    pytest.importorskip("ray", reason="pip install -r requirements-sweep.txt")
    monkeypatch.setattr(sweep, "HERE", tmp_path / "stub")  # Ray puts HERE first, and the stub must come before train.py
    monkeypatch.setenv("PYTHONPATH", os.path.dirname(sweep.__file__), prepend=os.pathsep)
    assert sweep.sweep(sweep.plan_grid(["env=CartPole", "seed=7,8,0"]), "mine") == 2
    assert [(row["seed"], bool(row["error"])) for row in result()] == [("7", True), ("8", True), ("0", False)]


def test_two_sweeps_never_work_on_one_run(here):
    """A run that another process holds must be left to it: not trained, and no row of it lost."""
    job, = sweep.plan_grid(["env=CartPole", "seed=0"])
    assert sweep.sweep([job], "mine") == 0
    folder = pathlib.Path("runs/sweeps/mine").resolve() / sweep.slug(job)
    with open(f"{folder}.log", "a") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        error, files = sweep.run_one(dataclasses.replace(job, folder=str(folder)))
    assert error == "another sweep is at work on this run" and not files
    assert (folder / "train.log").read_text().count("trained") == 1
    with pytest.raises(ValueError, match="--seeds 0: it must be at least 1"):
        sweep.plan("tasks", 0)


def test_what_is_drawn_is_what_was_measured(here, monkeypatch):
    """Lines and dots must stand at the IQM, bands at the interval; every title names measure, seeds and labeler."""
    drawn, measured = {}, iter((0.2, 0.4, 0.9, 0.1, 0.6, 0.8))
    monkeypatch.setattr(plots, "finish", lambda figure, axes, path: drawn.update({pathlib.Path(path).name: (figure, axes)}) or str(path))
    sweep.sweep(sweep.plan_grid(["env=CartPole", "max_pairs=10,20", "sampler=uniform,best,entropy", "seed=0,1"]), "dots")
    sweep.sweep(sweep.plan_grid(["env=CartPole", "max_pairs=10,20,40", "seed=0,1"]), "lines")
    for name in ("dots", "lines"):
        rows = result(name)
        for row in rows if name == "lines" else ():
            row["eval_success"] = str(next(measured))
        with open(f"results/{name}.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
        plots.plot(f"results/{name}.csv")
    rows = result("lines")
    figure, axes = drawn["lines.png"]
    at = {pairs: [float(row["eval_success"]) for row in rows if row["max_pairs"] == pairs] for pairs in ("10", "20", "40")}
    line, = axes[0, 0].lines
    assert line.get_xdata().tolist() == [10, 20, 40] and np.allclose(line.get_ydata(), [np.mean(v) for v in at.values()])
    band = axes[0, 0].collections[0].get_paths()[0].vertices
    assert {round(y, 3) for x, y in band if x == 10} == {round(v, 3) for v in at["10"]}
    for figure, axes in drawn.values():
        title = figure.get_suptitle()
        assert "offline stand-in (not a VLM)" in title and "of 2 seeds" in title and "success at the end" in title
    curve = drawn["lines_curves.png"][1][0, 0].lines[0]
    assert curve.get_xdata().tolist() == [0, 100] and curve.get_ydata().tolist() == [0, 0.5]
    folder = next(pathlib.Path("runs/sweeps/lines").glob("*seed0"))
    plots.draw_alignment([str(folder)], "a.png")
    aligned = {line.get_label(): line.get_ydata().tolist() for line in drawn["a.png"][1][0, 0].lines}
    assert aligned == {"true progress": [0, 2 / 3, 1 / 3, 1], "preference reward": [0, 1 / 3, 2 / 3, 1]}
    assert "offline stand-in (not a VLM)" in drawn["a.png"][0].get_suptitle()
    plots.draw_dots("x.png", [{**row, "setting": row["max_pairs"]} for row in rows], "eval_success")
    dots = {tick.get_text(): line.get_xdata()[0] for tick, line in zip(
        drawn["x.png"][1][0, 0].get_yticklabels(), [each for each in drawn["x.png"][1][0, 0].lines if each.get_marker() == "o"])}
    assert dots == pytest.approx({pairs: np.mean(v) for pairs, v in at.items()})


def test_the_interquartile_mean_and_its_interval_are_right():
    """Of 5 seeds the lowest and the highest must go, of 3 none; the interval must hold the mean and shrink with n."""
    assert plots.iqm([0, 1, 2, 3, 100]) == 2 and plots.iqm([0, 1, 5]) == 2
    assert np.allclose(plots.iqm(np.array([[0, 0], [1, 5], [2, 7], [9, 6]])), [1.5, 5.5])
    values = np.random.default_rng(0).normal(size=200)
    few, many = plots.interval(values[:5]), plots.interval(values)
    assert few[0] < plots.iqm(values[:5]) < few[1] and many[1] - many[0] < few[1] - few[0]
    assert np.allclose(plots.interval([0.5, 0.5, 0.5]), 0.5)
    # the normal approximation of a 25 % trimmed mean: standard error 1.09 / sqrt(n), two of them to each side
    assert 0.8 < (many[1] - many[0]) / (2 * 1.96 * 1.09 / 200**0.5) < 1.2


def test_a_results_file_becomes_pictures_that_name_the_labeler(here):
    """A number that varies must become the axis, and questions a session, which follow it, none; titles name who spoke."""
    jobs = [dataclasses.replace(job, overrides={**job.overrides, "pairs_per_session": job.overrides["max_pairs"] // 2},
                                varied=("max_pairs", "pairs_per_session"))
            for job in sweep.plan_grid(["env=CartPole", "max_pairs=10,20,200", "seed=0,1"])]
    sweep.sweep(jobs, "mine")
    assert plots.axes_of(result()) == (["max_pairs"], ["max_pairs"])
    assert plots.labelers(result()) == "offline stand-in (not a VLM)"
    drawn = plots.plot("results/mine.csv")
    assert drawn == ["results/mine.png", "results/mine_curves.png"]
    pixels = np.asarray(Image.open(drawn[0]))
    assert pixels[0, 0, 3] == 0 and (pixels[..., 3] > 0).mean() > 0.01  # transparent paper, and something on it
    # 1 - 6 (0 + 1 + 1 + 0) / (4 * 15), of the expert's rows alone
    assert {row["spearman_expert"] for row in result()} == {"0.8"}
    folders = [str(path) for path in pathlib.Path("runs/sweeps/mine").iterdir()]
    assert Image.open(plots.draw_alignment(folders[:2], "both.png")).size[0] > 500
    with pytest.raises(ValueError, match="no table of sweep.py with a column sucess"):
        plots.plot("results/mine.csv", "sucess")
    with pytest.raises(ValueError, match="give a table"):
        plots.main([])
    wrong = [{"method": m, "labeler": f"{m} (not a VLM, wrong on purpose in {n}%)"} for m in "ab" for n in (10, 20)]
    assert plots.labelers(wrong) == "a (not a VLM) (a); b (not a VLM) (b)"


# ==== clip_reward.py ====
def unit_vectors(*shape):
    return torch.nn.functional.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(0)), dim=-1)


def test_goal_baseline_regularisation_without_alpha_is_the_clip_score():
    """With alpha = 0 VLM-RM's reward must equal the cosine; with x = g it must be 1 for every alpha."""
    x, (goal, baseline) = unit_vectors(6, 8), unit_vectors(2, 8)
    plain = clip_reward.goal_baseline_reward(x, goal, baseline, 0.0)
    assert torch.allclose(plain, clip_reward.cosine_reward(x, goal), atol=1e-6)
    for alpha in (0.0, 0.3, 1.0):
        assert torch.allclose(clip_reward.goal_baseline_reward(goal[None], goal, baseline, alpha), torch.ones(1))


def test_goal_baseline_regularisation_is_the_paper_s_projection_matrix():
    """The reward must be 1 - |P(x - g)|^2 / 2 with P = alpha u u^T + (1 - alpha) I, written out as matrices."""
    x, (goal, baseline) = unit_vectors(6, 8), unit_vectors(2, 8)
    line = (goal - baseline)[:, None]
    matrix = 0.7 * line @ line.T / (line.T @ line) + 0.3 * torch.eye(8)
    expected = 1 - ((x - goal) @ matrix).square().sum(1) / 2
    assert torch.allclose(clip_reward.goal_baseline_reward(x, goal, baseline, 0.7), expected, atol=1e-6)


def test_with_alpha_one_only_the_way_from_baseline_to_goal_counts():
    """What is at a right angle to the line must change nothing; half-way along it the loss is a quarter of the whole."""
    goal, baseline, aside = torch.eye(3)[0], -torch.eye(3)[0], torch.eye(3)[1]
    x = torch.stack([baseline, torch.zeros(3), torch.zeros(3) + 5 * aside, goal])
    reward = clip_reward.goal_baseline_reward(x, goal, baseline, 1.0)
    assert reward.tolist() == [-1.0, 0.5, 0.5, 1.0]


def test_clip_pictures_are_prepared_as_pillow_would_without_torchvision():
    """Resize, centre crop and normalisation must agree with PIL's bicubic to two grey levels, wide or tall."""
    y, x = np.mgrid[0:90, 0:150]
    image = np.stack([x % 256, y % 256, 255 * ((x // 15 + y // 15) % 2)], -1).astype(np.uint8)  # (90, 150, 3), edges
    for picture in (image, np.ascontiguousarray(image.transpose(1, 0, 2))):
        scaled = Image.fromarray(picture).resize([64 * side // 90 for side in picture.shape[1::-1]], Image.BICUBIC)
        left, top = (scaled.width - 64) // 2, (scaled.height - 64) // 2
        expected = np.asarray(scaled.crop((left, top, left + 64, top + 64))) / 255.0
        ours = clip_reward.preprocess(picture[None], 64)[0].permute(1, 2, 0).numpy()
        assert np.abs(ours * clip_reward.STD + clip_reward.MEAN - expected).max() < 2.5 / 255


def test_clip_without_transformers_or_model_says_the_cure_in_one_line(monkeypatch, tmp_path):
    """A missing package and a missing model must each be one line that says what to do."""
    with pytest.raises(ValueError, match="baseline_text"):
        clip_reward.ClipReward("the pole is upright", alpha=0.5)
    if importlib.util.find_spec("transformers"):
        with pytest.raises(clip_reward.ClipError, match="a folder with its config.json") as error:
            clip_reward.ClipReward("the pole is upright", model=str(tmp_path / "nothing"))
        assert "\n" not in str(error.value)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(clip_reward.ClipError, match="pip install transformers"):
        clip_reward.ClipReward("the pole is upright")


# ==== bench.py ====
def test_a_rate_and_a_time_are_compared_in_opposite_directions():
    """Twice as many per second and half as many seconds must both be a ratio of 2, and be judged by it."""
    rate = bench.Row("rate", "steps/s", [20.0, 40.0], [10.0, 20.0], ">= 1.5")
    clock = bench.Row("time", "s", [1.0, 2.0], [2.0, 4.0], ">= 2.5")
    alone = bench.Row("alone", "s", [40.0, 20.0, 30.0], target="<= 30")
    assert rate.ratios() == [2.0, 2.0] == clock.ratios()
    assert [row.verdict() for row in (rate, clock, alone)] == ["met", "missed", "met"]


def test_both_sides_are_run_in_turn_and_go_first_in_turn():
    """A machine that slows down while it is measured must not favour either side."""
    calls = []
    row = bench.compare("q", "a/s", lambda: calls.append("ours") or 2.0, lambda: calls.append("theirs") or 1.0, 3)
    assert calls == ["ours", "theirs", "theirs", "ours", "ours", "theirs"]
    assert row.cells()[:8] == ["q", "2", "1", "a/s", "2", "2", "2", 3]


def test_the_textbook_way_computes_and_learns_the_same():
    """What ours is compared with must do the same work: equal rewards from equal weights, and a fit that learns."""
    images = np.random.default_rng(0).integers(0, 255, (40, 47, 47, 3), np.uint8)
    images[:20] //= 4  # dark ones; brighter is better
    ours, textbook = reward_model.RewardModel((47, 47, 3)), bench.Textbook(47, "cpu")
    for net, other in zip(textbook.nets, ours.nets):
        net.load_state_dict(other.state_dict())
    first, second = bench.channels_first(images[:20]), bench.channels_first(images[20:])
    before = textbook.predict(second) - textbook.predict(first)
    assert np.allclose(before, ours.predict(images[20:]) - ours.predict(images[:20]), atol=1e-5)
    textbook.fit(first, second, np.ones(20, np.int64), epochs=2)
    assert ours.batch == textbook.batch == bench.OUR_BATCH
    assert (textbook.predict(second) - textbook.predict(first)).mean() > before.mean() + 0.01


def test_measured_rows_replace_their_own_question_only(tmp_path):
    """Measuring one section again must leave the other sections' lines of the CSV as they are."""
    old = [bench.Row("a", "s", [1.0]), bench.Row("b", "s", [2.0])]
    bench.write(tmp_path / "bench.csv", old)
    bench.write(tmp_path / "bench.csv", [bench.Row("b", "s", [3.0])])
    lines = (tmp_path / "bench.csv").read_text().splitlines()
    assert [line.split(",")[:2] for line in lines] == [["question", "ours"], ["a", "1"], ["b", "3"]]


def test_opengl_is_chosen_before_any_section_imports_mujoco(monkeypatch, capsys):
    """A section without pictures imports mujoco first; on a machine without a display that one must find EGL asked for."""
    seen = []
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(os, "environ", {name: value for name, value in os.environ.items()
                                        if name not in ("MUJOCO_GL", "DISPLAY")})
    monkeypatch.setitem(bench.SECTIONS, "start", lambda size, device: seen.append(os.environ.get("MUJOCO_GL")) or [])
    assert bench.main(["--quick", "--only", "start"]) == [] and seen == ["egl"]


# ==== train.py and run.py ====
TINY = dict(env="CartPole", total_steps=300, seed_steps=100, explore_steps=100, feedback_every=100, pairs_per_session=6,
            max_pairs=12, batch_size=16, hidden=16, reward_epochs=2, eval_every=100, eval_episodes=1, candidates=50)


def tiny(tmp_path, name="run", **changes):
    return run.Config(**{**TINY, "out": str(tmp_path / name), **changes})


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
    assert files <= set(os.listdir(tmp_path / "run")) and "buffer" not in os.listdir(tmp_path / "run")
    logged = [json.loads(line) for line in open(tmp_path / "run" / "labels.jsonl")]
    assert all(record["answers"] for record in logged if record["kind"] == "label")
    assert len(os.listdir(tmp_path / "run" / "pairs")) >= len(logged)


@pytest.fixture
def unreported(monkeypatch):
    """Leaves out the report and its pictures, which the test above has seen, to save their seconds."""
    monkeypatch.setattr(report, "write_report", lambda folder: Path(folder, "report.html").touch())
    monkeypatch.setattr(train, "write_gif", lambda *_: None)
    monkeypatch.setattr(train, "write_episodes", lambda *_: 0.0)


@pytest.mark.parametrize("half", [0, 1])
def test_half_the_bits_are_for_the_network_that_was_named(tmp_path, monkeypatch, unreported, half):
    """--sac-bfloat16 must reach SAC and --reward-bfloat16 the reward model, each alone."""
    made = {}
    for kind in (sac.SAC, reward_model.RewardModel):
        monkeypatch.setattr(kind, "__init__", lambda self, *given, real=kind.__init__, name=kind.__name__, **named: (
            made.setdefault(name, named["bfloat16"]), real(self, *given, **named))[1])
    train.train(tiny(tmp_path, total_steps=100, sac_bfloat16=half, reward_bfloat16=1 - half))
    assert made == {"SAC": bool(half), "RewardModel": not half}


@pytest.mark.usefixtures("unreported")
def test_the_same_seed_gives_the_same_bytes(tmp_path):
    """Two runs with one seed must write identical metrics.csv; another seed must not."""
    for name, seed, steps in (("a", 1, 300), ("b", 1, 300), ("c", 2, 100)):
        train.train(tiny(tmp_path, name, labels="oracle", seed=seed, total_steps=steps))
    a, b, c = ((tmp_path / name / "metrics.csv").read_bytes() for name in "abc")
    assert a == b and a.splitlines()[1] != c.splitlines()[1]


@pytest.mark.usefixtures("unreported")
@pytest.mark.parametrize("crash_at", [120, 260])
def test_a_resumed_run_ends_as_if_never_interrupted(tmp_path, monkeypatch, crash_at):
    """Killed in the middle of an episode and resumed, the run must write the same metrics.csv, byte for byte."""
    keep_best = int(crash_at == 260)
    train.train(tiny(tmp_path, "whole", keep_best=keep_best))
    add, count = sac.ReplayBuffer.add, []

    def dying(self, *transition):
        count.append(1)
        if len(count) == crash_at:
            raise MemoryError  # nothing in train.py expects this one: it ends the run like kill -9
        return add(self, *transition)

    monkeypatch.setattr(sac.ReplayBuffer, "add", dying)
    with pytest.raises(MemoryError):
        train.train(tiny(tmp_path, "killed", keep_best=keep_best))
    monkeypatch.setattr(sac.ReplayBuffer, "add", add)
    train.train(run.parse_args(["--resume", str(tmp_path / "killed")]))
    whole, killed = (tmp_path / name for name in ("whole", "killed"))
    assert whole.joinpath("metrics.csv").read_bytes() == killed.joinpath("metrics.csv").read_bytes()
    labels = [[json.loads(line) for line in open(folder / "labels.jsonl")] for folder in (whole, killed)]
    labels = [sorted((record["index"], record["label"]) for record in records) for records in labels]
    assert labels[0] == labels[1] and len(labels[0]) >= 12  # in the order of arrival, which depends on threads


def test_an_interrupted_run_says_how_to_go_on(tmp_path, monkeypatch, capsys):
    """Ctrl-C must end with the closing paragraph and the command that resumes."""
    act, count = sac.SAC.act, []

    def interrupting(self, obs, explore=True):
        count.append(1)
        if len(count) == 250:
            raise KeyboardInterrupt
        return act(self, obs, explore)

    monkeypatch.setattr(sac.SAC, "act", interrupting)
    train.train(tiny(tmp_path, labels="oracle"))
    said = capsys.readouterr().out
    assert "interrupted after" in said and f"--resume {tmp_path / 'run'}" in said
    assert os.path.exists(tmp_path / "run" / "report.html") and os.path.exists(tmp_path / "run" / "buffer")


@pytest.mark.usefixtures("unreported")
def test_nothing_is_said_of_success_where_an_environment_does_not_tell(tmp_path, capsys):
    """Pendulum gives a return and no success: not 0 %, but nothing, in the table, the bar and the closing words."""
    rows = train.train(tiny(tmp_path, env="Pendulum-v1", goal="up", reward="true", horizon=20, total_steps=120))
    assert math.isfinite(rows[-1]["eval_return"]) and not any("success" in name for row in rows for name in row)
    assert "success" not in "".join(capsys.readouterr())
    assert json.load(open(tmp_path / "run" / "summary.json"))["success_last_third"] is None


@pytest.mark.usefixtures("unreported")
@pytest.mark.parametrize("reward", ["true", "sparse"])
def test_baselines_ask_nobody(tmp_path, reward):
    """With the true or the sparse reward no pair may be asked, and the prices must be that reward."""
    rows = train.train(tiny(tmp_path, reward=reward))
    assert rows[-1]["pairs_asked"] == 0 and not os.listdir(tmp_path / "run" / "pairs")
    state = torch.load(tmp_path / "run" / "checkpoint" / "state.pt", weights_only=True)
    prices = state["buffer"]["reward"]
    assert torch.equal(prices, state["buffer"]["true_reward"]) == (reward == "true")
    assert reward == "true" or set(prices.tolist()) <= {0.0, 1.0}


@pytest.mark.usefixtures("unreported")
@pytest.mark.parametrize("reward", ["true", "sparse"])
def test_a_reward_that_looks_at_no_pictures_learns_the_same_without_them(tmp_path, monkeypatch, reward):
    """No picture may be stored, and with pictures all the same the numbers must be the same, resets included."""
    add, seen = sac.ReplayBuffer.add, []
    monkeypatch.setattr(sac.ReplayBuffer, "add", lambda self, *row: seen.append(row[4]) or add(self, *row))
    train.train(tiny(tmp_path, "blind", reward=reward))
    assert seen == [None] * 300
    monkeypatch.setattr(train, "looks_at_pictures", lambda config: True)
    train.train(tiny(tmp_path, "sees", reward=reward))
    assert seen[-1].shape == (64, 64, 3)
    blind, sees = (tmp_path / name / "metrics.csv" for name in ("blind", "sees"))
    assert blind.read_text() == sees.read_text()


def test_disk_is_not_asked_for_where_no_picture_is_stored(tmp_path, monkeypatch):
    """A full disk must stop a run that stores pictures before it starts, and no run with the true reward."""
    monkeypatch.setattr(shutil, "disk_usage", lambda _: types.SimpleNamespace(free=20_000))  # observations and actions
    train.check_disk(run.resolve(tiny(tmp_path, reward="true")), envs.make("CartPole"))
    with pytest.raises(run.UserError, match="of disk"):
        train.train(tiny(tmp_path, reward="score"))


def test_the_labeler_is_named_everywhere(tmp_path, capsys):
    """Banner, config, report and summary must all say that the oracle, not a VLM, spoke."""
    train.train(tiny(tmp_path, labels="oracle", vlm_mistakes=0.3))
    said = capsys.readouterr().out
    texts = [said] + [(tmp_path / "run" / name).read_text() for name in ("config.json", "summary.json", "report.html")]
    assert all("oracle" in text and "not a VLM" in text and "30%" in text for text in texts)


@pytest.mark.usefixtures("unreported")
def test_wrong_labels_show_in_the_label_accuracy(tmp_path):
    """A labeler that is wrong in every answer must be reported as 0 % right."""
    rows = train.train(tiny(tmp_path, labels="oracle", vlm_mistakes=1.0))
    assert rows[-1]["label_accuracy"] == 0.0


@pytest.mark.usefixtures("unreported")
def test_a_limit_ends_the_questions_and_not_the_training(tmp_path):
    """With --max-calls used up in the first session the run must still train to its end."""
    rows = train.train(tiny(tmp_path, max_calls=6))
    assert rows[-1]["step"] == 300 and rows[-1]["pairs_asked"] <= 3 and rows[-1]["labels"] >= 0


def test_the_reservoir_keeps_every_picture_equally_likely(tmp_path):
    """Of 40 pictures offered to 10 places, early and late ones must be kept about equally often."""
    kept = np.zeros(40)
    for seed in range(200):
        pool, rng = train.Candidates(10, 4, 4, None), np.random.default_rng(seed)
        for number in np.repeat(np.arange(40), 1 + np.arange(40) % 3):  # some pictures come three times, and count once
            picture = np.full((4, 4, 3), number, np.uint8)
            pool.offer(picture, picture, number, rng)
        assert len({*pool.progress}) == 10
        kept[pool.progress.astype(int)] += 1
    assert kept[:20].sum() == pytest.approx(1000, rel=0.1) and kept.min() > 25


def test_scores_of_single_pictures_train_too(tmp_path):
    """--reward score must log a score a picture, fit to them, say how right their order was, and resume to the same rows."""
    rows = train.train(tiny(tmp_path, reward="score"))
    log = LabelLog.read(tmp_path / "run" / "labels.jsonl")
    assert {record["kind"] for record in log} == {"label"} and all(0 <= record["score"] <= 1 for record in log)
    assert rows[-1]["labels"] == len(log) == 12 and rows[-1]["label_accuracy"] > 0.9 and 0 < rows[-1]["loss"] < 4
    assert math.isfinite(rows[-1]["reward_accuracy"]) and "to 12 pictures" in (tmp_path / "run" / "summary.json").read_text()


def test_clip_prices_episodes_without_being_asked(tmp_path, monkeypatch):
    """--reward clip must hand its settings to ClipReward, price every row with it, and ask nobody."""
    given = []

    class Stub:
        def __init__(self, *settings):
            given.append(settings)

        def predict(self, images):
            return images.mean((1, 2, 3)).astype(np.float32)

    monkeypatch.setattr(clip_reward, "ClipReward", Stub)
    rows = train.train(tiny(tmp_path, reward="clip", clip_goal="the pole is upright", clip_baseline="a pole", clip_alpha=0.5))
    assert given == [("the pole is upright", "a pole", 0.5, clip_reward.MODEL, "cpu")] and rows[-1]["pairs_asked"] == 0
    with open(tmp_path / "run" / "episodes.csv") as file:
        assert all(100 < float(row["learned_reward"]) < 255 for row in csv.DictReader(file))


def test_a_raised_limit_lets_the_questions_go_on(tmp_path):
    """A run that had reached --max-calls must ask again when it is resumed with more, and with as many must not."""
    for more, asks in ((6, False), (60, True)):
        labeler = train.Labeler(run.resolve(tiny(tmp_path, max_calls=more)))
        try:
            labeler.load_state_dict({"counts": labeler.counts, "exhausted": True,
                                     "vlm": {**labeler.vlm.state_dict(), "calls": 6}})
            assert labeler.may_ask() == asks
        finally:
            labeler.close()


@pytest.mark.usefixtures("unreported")
def test_a_resumed_run_may_ask_for_less_than_it_has(tmp_path, monkeypatch):
    """--max-pairs below the number of labels there are must keep these, and ask no more."""
    add, count = sac.ReplayBuffer.add, []
    monkeypatch.setattr(sac.ReplayBuffer, "add", lambda *a: count.append(1) or (add(*a) if len(count) < 260 else 1 / 0))
    with pytest.raises(ZeroDivisionError):
        train.train(tiny(tmp_path, labels="oracle", max_pairs=30))
    monkeypatch.setattr(sac.ReplayBuffer, "add", add)
    kept = run.resumed({"resume": str(tmp_path / "run"), "max_pairs": 2})
    assert train.train(kept)[-1]["pairs_asked"] >= 6


@pytest.mark.parametrize("changes, says", [
    ({"device": "cuda"}, "torch finds no such GPU"), ({"device": "gpu"}, "there are auto, cpu, cuda"),
    ({"cuda_graph": 1}, "--cuda-graph 1 needs a GPU"), ({"cuda_graph": 1, "device": "auto"}, "needs a GPU"),
    ({"reward": "true", "labels": "oracle"}, "--reward true compares no pictures"),
    ({"reward": "score", "vlm_mistakes": 0.2}, "shows only one"),
    ({"programs": "."}, "--programs is for --reward code, not for preference"),
    ({"labels": "oracle", "vlm_unsure": 0.2}, "--vlm-unsure is a flaw of the offline stand-in"),
    ({"vlm": "local/m", "vlm_mistakes": 0.2}, "--vlm-mistakes is a flaw of the offline stand-in"),
    ({"vlm_url": "http://localhost:1/v1"}, "--vlm offline starts a stand-in of its own"),
    ({"reward": "clip", "clip_alpha": 0.5}, "--clip-alpha needs --clip-baseline"),
    ({"env": "Pendulum-v1", "goal": "up", "reward": "code"}, "no scripted expert"),
    ({"horizon": 9, "goal": "without OpenGL"}, "apt-get"), ({"horizon": 9, "goal": "on a full disk"}, "0.0 are free")])
def test_what_cannot_work_here_is_said_before_anything_is_made(tmp_path, monkeypatch, changes, says):
    """A missing GPU, expert, OpenGL or disk must end in one line and leave no run folder."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    if "OpenGL" in changes.get("goal", ""):
        monkeypatch.setattr(envs, "draw_pole", lambda *_: (_ for _ in ()).throw(RuntimeError("EGL is not there")))
    if "disk" in changes.get("goal", ""):
        monkeypatch.setattr(shutil, "disk_usage", lambda _: types.SimpleNamespace(free=1000))
    with pytest.raises(run.UserError, match=says):
        train.train(tiny(tmp_path, **changes))
    assert not os.listdir(tmp_path)


def test_candidates_need_disk_too(tmp_path, monkeypatch):
    """Room for the steps' pictures alone is too little; with both pictures of every candidate it is enough."""
    config = run.resolve(tiny(tmp_path))
    steps = config.total_steps * (3 * config.reward_size**2 + 4 * (4 + 4 + 2))
    pairs = config.max_pairs * 2 * config.query_size**2  # of the PNGs a third of what they unpack to
    candidates = 3 * config.candidates * (config.reward_size**2 + config.query_size**2)
    free, env = types.SimpleNamespace(free=steps + candidates + pairs), envs.make("CartPole")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: free)
    train.check_disk(config, env)
    free.free -= 1
    with pytest.raises(run.UserError, match="50 candidates need"):
        train.check_disk(config, env)


@pytest.mark.usefixtures("unreported")
def test_a_run_goes_on_though_an_environment_speaks_numpy(tmp_path, monkeypatch):
    """np.bool_ for `terminated` at a step that is evaluated must not make a checkpoint that cannot be read."""
    class Numpy(Odd):
        def step(self, action):
            return (*super().step(action)[:2], np.bool_(True), np.bool_(False), {})

    gymnasium.register("Numpy-v0", entry_point=Numpy, max_episode_steps=9)
    changes = dict(env="Numpy-v0", goal="to be odd", reward="true", total_steps=40, seed_steps=10, eval_every=5)
    rows = train.train(tiny(tmp_path, **changes))
    kept = torch.load(tmp_path / "run" / "checkpoint" / "state.pt", weights_only=True)["rows"]
    assert [row["step"] for row in kept] == [row["step"] for row in rows][:len(kept)] != []
    del gymnasium.registry["Numpy-v0"]


def test_scores_are_asked_of_different_pictures(tmp_path, monkeypatch):
    """--reward score must not pay twice for one picture within a session."""
    asked = []
    monkeypatch.setattr(train.Labeler, "score", lambda self, run, pool, rows, step: asked.append(rows))
    labeler = train.Labeler(run.resolve(tiny(tmp_path, reward="score")))
    try:
        labeler(None, None, np.array([[3, 1], [3, 2], [3, 1], [4, 3]]), 0, None)
    finally:
        labeler.close()
    assert asked[0].tolist() == [3, 4, 1, 2]


def test_a_film_has_at_most_a_hundred_pictures(tmp_path, monkeypatch):
    """An episode of 150 steps must be thinned to every second picture, not cut."""
    import imageio as films

    shown = []
    monkeypatch.setattr(films, "mimsave", lambda path, images, **_: shown.append(len(images)))
    config = run.resolve(tiny(tmp_path, horizon=150, query_size=48))
    env = envs.make("CartPole", horizon=150)
    train.write_gif("film.gif", env, lambda obs: env.action_space.sample(), config)
    assert shown == [75]


@pytest.mark.usefixtures("unreported")
def test_an_answer_that_did_not_come_is_no_program(tmp_path, monkeypatch):
    """A refusal in C1 must be named as what it is, stop the stand-in's server, and leave a run that can go on."""
    closed, close = [], train.Labeler.close
    monkeypatch.setattr(train.Labeler, "close", lambda self: closed.append(self) or close(self))
    with monkeypatch.context() as refusing:
        refusing.setattr(vlm_query.VLM, "ask", lambda *_: vlm_query.Reply("", "refused", 0, 0, False))
        with pytest.raises(run.UserError, match="wrote no program: refused.*--resume"):
            train.train(tiny(tmp_path, reward="code"))
    assert len(closed) == 1
    assert train.train(run.parse_args(["--resume", str(tmp_path / "run")]))[-1]["step"] == TINY["total_steps"]


@pytest.mark.usefixtures("unreported")
def test_kept_answers_train_without_asking(tmp_path):
    """--labels-from a finished run's labels.jsonl must fit the same number of labels and ask nobody."""
    before = train.train(tiny(tmp_path, "asked"))
    after = train.train(tiny(tmp_path, "kept", labels_from=str(tmp_path / "asked" / "labels.jsonl")))
    assert after[-1]["labels"] == before[-1]["labels"] > 0 and not os.listdir(tmp_path / "kept" / "pairs")
    assert math.isfinite(after[-1]["reward_accuracy"])
    config = run.resolve(run.Config(labels_from=str(tmp_path / "asked")))
    assert "offline stand-in (not a VLM)" in run.who_labels(config) and "-kept-" in train.prepare(config)[0].out


@pytest.mark.usefixtures("unreported")
def test_kept_answers_all_fit_where_a_run_goes_on(tmp_path, monkeypatch):
    """More kept answers than --max-pairs, in a run interrupted before its first session: none may be lost."""
    train.train(tiny(tmp_path, "asked"))
    changes = dict(labels_from=str(tmp_path / "asked" / "labels.jsonl"), max_pairs=2, explore_steps=200)
    train.train(tiny(tmp_path, "whole", **changes))

    add = sac.ReplayBuffer.add

    def interrupted(self, *transition):
        if self.added == 150:
            raise KeyboardInterrupt
        add(self, *transition)

    with monkeypatch.context() as stopping:
        stopping.setattr(sac.ReplayBuffer, "add", interrupted)
        train.train(tiny(tmp_path, "part", **changes))
    train.train(run.parse_args(["--resume", str(tmp_path / "part")]))
    whole, part = ((tmp_path / name / "metrics.csv").read_text() for name in ("whole", "part"))
    assert whole == part and len(whole.splitlines()) == 5


@pytest.mark.parametrize("arguments, said", [
    (["--labels-from", "nowhere"], "--labels-from nowhere"),
    (["--env", "Cartpole"], "there are CartPole"),
    (["--env", "Pendulum-v1"], "needs a goal"),
    (["--reward", "score", "--labels", "oracle"], "compares no pictures"),
    (["--vlm", "openai/x"], "OPENAI_API_KEY"),
    (["--env", "Pendulum-v1", "--goal", "to swing up"], "knows only these goals"),
    (["--reward", "nothing"], "preference"),
    (["--labels", "me"], "oracle"),
    (["--stepz", "3"], "there are --env"),
    (["--seed", "one"], "--seed"),
    (["--schedule", "paper", "--env", "Pendulum-v1", "--goal", "x"], "the paper has no task"),
    (["--schedule", "paper", "--env", "Unlock"], "the paper has no task"),
    (["--out", "."], "exists already"),
    (["--resume", "nowhere"], "no run folder"),
    (["--vlm-extra", "{"], "--vlm-extra"),
    (["--max-usd", "3"], "usd"),
    (["--usd-per-mtok", "cheap"], "IN,OUT"), (["--max-usd", "1", "--usd-per-mtok=-1,-1"], "IN,OUT"),
    (["--max-usd", "1", "--usd-per-mtok", "nan,1"], "IN,OUT"), (["--usd-per-mtok", "1,inf"], "IN,OUT"),
    (["--seed", "99999999999999999999"], "--seed"),
    (["--reward", "code", "--programs", "nowhere"], "nowhere"),
])
def test_bad_input_gets_one_line_and_leaves_nothing(tmp_path, monkeypatch, capsys, arguments, said):
    """Each mistake of the user must end with exit code 2 and one clear line, before anything is made."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    assert train.main(arguments) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1 and "Traceback" not in error
    assert [name for name in os.listdir(tmp_path) if name != "runs"] == [] and not list(tmp_path.glob("runs/*seed*"))


@pytest.mark.parametrize("name", list(schedules.PAPER))
def test_the_paper_s_schedule_takes_nothing_from_ours(name):
    """Whatever a task's own schedule sets, the paper's must set too, or a departure would slip into it."""
    assert set(schedules.OURS[name]) <= set(schedules.PAPER[name])
    config = run.resolve(run.Config(env=name, schedule="paper"))
    assert (config.hold, config.discount, config.reward_shift, config.reward_mirror) == (1, 0.99, 0, 0)
    assert config.reward_batch == 64


class Brightness:
    """A reward for the tests: sign times the mean of a picture."""

    sign = 1

    def predict(self, images):
        return self.sign * images.mean((1, 2, 3))


@pytest.mark.parametrize("reward, sign, kept", [("preference", 1, 2), ("preference", -1, 0), ("true", 1, 1), ("sparse", 1, 0)])
def test_the_kept_policy_is_the_best_by_the_reward_that_is_learned_from(monkeypatch, reward, sign, kept):
    """Policies 0, 1, 2 with trials of brightness 3, 5, 9, true rewards 1, 8, 4 and success in the first alone: each
    reward has its own best, whatever the other rewards say."""
    config = run.resolve(run.Config(reward=reward, keep_best=1))
    bright, true, success, price = (3, 5, 9), (1.0, 8.0, 4.0), (1.0, 0.0, 0.0), Brightness()
    agents = [sac.SAC(3, gymnasium.spaces.Box(-1, 1, (1,)), hidden=(4, 4), seed=seed) for seed in range(3)]

    def trial(self, agent, env, seed):
        number = agents.index(agent)
        return (np.full((2, 4, 4, 3), bright[number], np.uint8), np.full(2, true[number]),
                np.full(2, success[number]), np.zeros((4, 4, 3), np.uint8), False)

    monkeypatch.setattr(train.KeptPolicy, "trial", trial)
    price.sign, best = sign, train.KeptPolicy(agents[0], config)
    for agent in agents:
        best.offer(agent, None, price, priced=True)
    assert torch.equal(best.agent.actor[0].weight, agents[kept].actor[0].weight)
    before = best.agent.actor[0].weight.clone()
    for agent in agents:
        agent.actor[0].weight.data.zero_()  # learning goes on; what is kept must not follow
    assert torch.equal(best.agent.actor[0].weight, before)


def test_the_kept_policy_is_priced_again_by_a_new_reward(monkeypatch):
    """The trial of the kept policy is bright; when dark becomes better, a darker newcomer must take its place. Before
    there is any reward the newest is kept; with keep_best=0 it is the agent itself."""
    agents = [sac.SAC(3, gymnasium.spaces.Box(-1, 1, (1,)), hidden=(4, 4), seed=seed) for seed in range(3)]
    monkeypatch.setattr(train.KeptPolicy, "trial", lambda self, agent, env, seed: (
        np.full((2, 4, 4, 3), (9, 5, 3)[agents.index(agent)], np.uint8), *[np.zeros(2)] * 3, False))
    price, best = Brightness(), train.KeptPolicy(agents[0], run.resolve(run.Config(keep_best=1)))

    def kept():
        return [torch.equal(best.agent.actor[0].weight, agent.actor[0].weight) for agent in agents].index(True)

    best.offer(agents[2], None, None, priced=False)
    assert kept() == 2
    best.offer(agents[0], None, price, priced=True)
    best.offer(agents[1], None, price, priced=True)
    assert kept() == 0
    price.sign = -1
    best.offer(agents[1], None, price, priced=True)
    assert kept() == 1
    newest = train.KeptPolicy(agents[0], run.resolve(run.Config()))
    newest.offer(agents[1], None, price, priced=True)
    assert newest.agent is agents[0]


@pytest.mark.parametrize("space, different", [(gymnasium.spaces.Discrete(5), 5), (gymnasium.spaces.Box(-1, 1, (2,)), 1)])
def test_a_discrete_policy_is_evaluated_as_the_stochastic_one_it_is(space, different):
    """Fresh networks hold all actions about equally good: of 100 evaluations all are drawn; a Box gives one and the same."""
    act = train.learned_policy(sac.SAC(3, space, hidden=(8, 8)))
    assert len({str(act(np.zeros(3))) for _ in range(100)}) == different


@pytest.mark.usefixtures("unreported")
def test_the_last_third_is_the_evaluations_of_the_last_third_of_the_steps(tmp_path, monkeypatch):
    """Of evaluations at 0, 50, ..., 300 steps, those at 250 and 300; the one before learning is none of them."""
    shares = iter((0.9, 0.1, 0.2, 0.3, 0.4, 0.5, 0.7))
    monkeypatch.setattr(train, "evaluate", lambda *_: {
        "eval_return": 0.0, "eval_success": next(shares), "eval_success_frames": 0.0, "eval_progress": 0.0})
    train.train(tiny(tmp_path, reward="true", eval_every=50))
    assert json.load(open(tmp_path / "run" / "summary.json"))["success_last_third"] == pytest.approx(0.6)


@pytest.mark.usefixtures("unreported")
def test_a_damaged_run_folder_is_one_line(tmp_path, monkeypatch):
    """Whatever is wrong with config, summary or checkpoint, --resume must say so, in one line."""
    monkeypatch.setattr(train, "finish", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train.train(tiny(tmp_path, reward="true"))
    folder = tmp_path / "run"
    (folder / "checkpoint" / "state.pt").write_bytes(b"no checkpoint")
    with pytest.raises(run.UserError, match="its checkpoint cannot be read"):
        train.train(run.resumed({"resume": str(folder)}))
    (folder / "summary.json").write_text("{}")
    assert run.resumed({"resume": str(folder)}).reward == "true"  # no word of an end: it goes on
    (folder / "config.json").write_text("[]")
    with pytest.raises(run.UserError, match="no run folder of train.py"):
        run.resumed({"resume": str(folder)})


def test_the_command_that_a_run_writes_down_makes_it_again():
    """config.json's command, given to the shell, must be the same settings; only `out` is another's."""
    config = run.Config(env="DrawerOpen", seed=3, labels="oracle", vlm_mistakes=0.2, goal='to "open" it', max_pairs=7, out="x")
    words = shlex.split(run.command_line(config))
    assert words[:2] == ["python", "train.py"]
    assert run.parse_args(words[2:]) == dataclasses.replace(config, out=None)


def test_rows_after_the_checkpoint_are_written_once(tmp_path, monkeypatch):
    """A kill after an evaluation and before the next checkpoint must not leave its row twice in metrics.csv."""
    train.train(tiny(tmp_path, "whole", reward="true"))
    monkeypatch.setattr(train, "finish", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train.train(tiny(tmp_path, "cut", reward="true"))
    monkeypatch.undo()
    for name, line in (("metrics.csv", "999,9\n"), ("timing.csv", "999,9\n")):
        with open(tmp_path / "cut" / name, "a") as file:
            file.write(line)
    train.train(run.resumed({"resume": str(tmp_path / "cut")}))
    whole, cut = ((tmp_path / name / "metrics.csv").read_text() for name in ("whole", "cut"))
    assert cut == whole and "999" not in (tmp_path / "cut" / "timing.csv").read_text()


@pytest.mark.usefixtures("unreported")
@pytest.mark.parametrize("field, value, says", [
    ("hold", 0, "--hold 0: it must be at least 1"), ("reward_shift", -1, "--reward-shift -1: it must be at least 0"),
    ("discount", 1.5, "--discount 1.5: it must be at least 0, at most 1"), ("discount", float("nan"), "--discount nan"),
    ("sac_lr", 0.0, "--sac-lr 0.0: it must be above 0"), ("reward_lr", float("inf"), "--reward-lr inf"), ("reward_size", 20, "--reward-size 20: it must be at least 47")])
def test_a_number_out_of_its_range_is_refused_before_anything_is_made(field, value, says):
    """One line with the flag, the value and what is possible; every value of every task's own entry must be in range."""
    with pytest.raises(run.UserError, match=re.escape(says)):
        run.resolve(run.Config(**{field: value}))
    for task in envs.TASKS:
        run.resolve(run.Config(env=task, device="cpu"))


def test_random_actions_are_held_as_long_as_asked(tmp_path, monkeypatch):
    """With --hold 40, an episode of 100 random steps must draw three actions."""
    drawn, draw = [], train.random_action
    monkeypatch.setattr(train, "random_action", lambda space, rng: drawn.append(1) or draw(space, rng))
    monkeypatch.setattr(train, "write_episodes", lambda *parts: math.nan)  # draws some more
    train.train(tiny(tmp_path, reward="true", hold=40, seed_steps=200, explore_steps=200))
    assert len(drawn) == 6


@pytest.mark.usefixtures("unreported")
@pytest.mark.parametrize("name, standardised, explore", [("CartPole", 1, 150), ("CartPole", 1, 50), ("DoorKey-5x5", 0, 150)])
def test_critics_forget_novelty_and_only_unbounded_states_are_standardised(tmp_path, monkeypatch, name, standardised, explore):
    """With a ready reward too, critics must start afresh when STEP 0 ends; a one-hot state must stay as it is."""
    calls = []
    for method in ("reset_critic", "standardise"):
        old = getattr(sac.SAC, method)
        monkeypatch.setattr(sac.SAC, method, lambda self, *a, old=old, method=method: calls.append(method) or old(self, *a))
    train.train(tiny(tmp_path, env=name, reward="sparse", horizon=50, explore_steps=explore, total_steps=200))
    assert calls == ["reset_critic", *["standardise"] * standardised, "reset_critic"]  # the first: a new agent


def test_programs_of_an_attempt_that_was_cut_short_are_not_kept(tmp_path, monkeypatch):
    """A resumed run that asks again must find none of the programs of before, or they would join the reward."""
    old = tmp_path / "code_as_reward" / "programs" / "1_old.py"
    old.parent.mkdir(parents=True)
    old.touch()
    monkeypatch.setattr(code_as_reward, "describe_subtasks", lambda *a: 1 / 0)
    monkeypatch.setattr(code_as_reward, "collect_episodes", lambda *a, **k: dict.fromkeys(
        ("expert_episodes", "random_episodes", "success")))
    config = run.resolve(tiny(tmp_path, reward="code", horizon=5))
    with pytest.raises(ZeroDivisionError):
        train.learn_programs(config, types.SimpleNamespace(path=lambda *names: str(tmp_path.joinpath(*names))),
                             envs.make("CartPole", horizon=5), None)
    assert not old.exists()


@pytest.mark.usefixtures("unreported")
def test_a_ready_reward_waits_for_the_first_episode_to_end(tmp_path):
    """No row has a reward before that: the run must go on exploring, not fail."""
    rows = train.train(tiny(tmp_path, reward="true", seed_steps=10, explore_steps=10))
    assert rows[-1]["step"] == 300


@pytest.mark.usefixtures("unreported")
def test_a_finished_run_is_not_resumed(tmp_path):
    """--resume of a finished run must say so instead of training on."""
    train.train(tiny(tmp_path, reward="true"))
    with pytest.raises(run.UserError, match="has finished"):
        run.parse_args(["--resume", str(tmp_path / "run")])


def test_every_config_field_is_read_and_explained():
    """Each tunable must have a comment (its --help text), a flag, and a place in the code that reads it."""
    code = "".join(Path(name).read_text() for name in ("train.py", "run.py"))
    for field in dataclasses.fields(run.Config):
        assert len(run.field_help()[field.name]) > 10, field.name
        assert re.search(rf"config\.{field.name}\b", code), f"nothing reads Config.{field.name}"


@pytest.mark.parametrize("changes, device", [
    ({}, "cpu"), ({"cuda_graph": 1}, "cuda"), ({"reward": "clip", "goal": "up"}, "cuda"), ({"device": "cuda"}, "cuda"),
    ({"device": "cpu", "reward": "clip", "goal": "up"}, "cpu")])
def test_auto_takes_a_gpu_only_where_it_gains(monkeypatch, changes, device):
    """With a GPU: small kernels that are launched one by one are faster on the CPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert run.resolve(run.Config(**changes)).device == device


def test_numbers_on_the_command_line_may_be_written_as_floats():
    """--total-steps 4e3 must mean 4000, and given flags must override the task's entry."""
    config = run.resolve(run.parse_args(["--total-steps", "4e3", "--sac-lr", "1"]))
    assert config.total_steps == 4000 and config.sac_lr == 1.0 and config.hidden == schedules.OURS["CartPole"]["hidden"]


# ==== the repository ====
def test_the_readme_knows_how_long_the_files_are():
    """Each number of lines in its table must be within ten of the file's."""
    table = re.findall(r"\| `(\w+\.py)` \| (\d+) \|", Path("README.md").read_text())
    lines = {name: len(Path(name).read_text().splitlines()) for name, _ in table}
    assert len(table) == 11 and {name: n for name, n in table if abs(int(n) - lines[name]) > 10} == {}


COMPONENTS = ("sac", "reward_model", "vlm_query", "envs", "deformables", "gridworlds", "code_as_reward", "offline_vlm",
              "report", "cached_labels", "clip_reward")
STEPS = ("explore without any reward", "act, and store the transition with the image seen after it",
         "pick pairs of images", "ask the VLM which image is closer to the goal",
         "fit the reward model to the answers", "relabel every stored transition with the new reward",
         "improve the policy with SAC on the learned reward",
         "evaluate with the true reward, which the learner never sees")
STEP_FILES = ("sac", "sac", "reward_model", "vlm_query", "reward_model", "sac", "sac", "train")


def imported(path):
    """Names of all modules a file imports, anywhere in it."""
    nodes = list(ast.walk(ast.parse(Path(path).read_text())))
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)]
    return {name.split(".")[0] for name in names}


@pytest.mark.parametrize("name", COMPONENTS)
def test_no_component_imports_another(name):
    """A component must stand alone: the others reach it as arrays and callables only."""
    assert not imported(f"{name}.py") & ({*COMPONENTS, "train", "run"} - {name})


@pytest.mark.parametrize("number", range(8))
def test_step_titles_are_the_same_everywhere(number):
    """Each STEP's banner must stand, word for word, in train.py, in its component and in the README."""
    banner = f"# ---- STEP {number}: {STEPS[number]} ----"
    assert banner in Path("train.py").read_text() and banner in Path(f"{STEP_FILES[number]}.py").read_text()
    assert f"| {number} | {STEPS[number]} |" in Path("README.md").read_text()


def test_the_steps_stand_in_order_in_the_loop():
    """A reader of train() must meet STEP 0 to STEP 7 in that order."""
    found = re.findall(r"# ---- STEP (\d):", inspect.getsource(train.train))
    assert found == list("01234567")


def header_snippet(name):
    """The indented Python block under "To use it elsewhere" in a file's docstring."""
    docstring = ast.get_docstring(ast.parse(Path(f"{name}.py").read_text()))
    after = docstring.split("To use it elsewhere", 1)[1].split("\n", 1)[1]
    lines = itertools.takewhile(lambda line: line.startswith("    ") or not line, after.splitlines())
    return "\n".join(line[4:] for line in lines)


@pytest.mark.parametrize("name", COMPONENTS)
def test_a_component_can_be_copied_out_alone(tmp_path, name):
    """Alone in an empty folder, a component must import and its header's snippet must run."""
    shutil.copy(f"{name}.py", tmp_path)
    result = subprocess.run([sys.executable, "-c", header_snippet(name)], cwd=tmp_path, capture_output=True, text=True,
                            timeout=100)
    assert result.returncode == 0, result.stderr[-2000:]


@pytest.mark.parametrize("name", sorted(path.stem for path in Path(__file__).parent.glob("*.py")))
def test_house_rules(name):
    """No bare except, debugger or leftover; no line over 120 characters; a header of at most 30 lines."""
    text = Path(f"{name}.py").read_text()
    tree = ast.parse(text)
    assert not any(isinstance(node, ast.ExceptHandler) and node.type is None for node in ast.walk(tree))
    assert not re.search(r"set_" + r"trace|breakpoint\(\)|\bTO" + r"DO\b|\bFIX" + r"ME\b", text)
    assert name == "test_components" or max(map(len, text.splitlines())) <= 120
    assert name == "test_components" or 3 <= len(ast.get_docstring(tree).splitlines()) <= 30


def table(path, first_column):
    """The rows of the Markdown table whose header begins with first_column -> list of lists of cells."""
    lines = iter(Path(path).read_text().splitlines())
    assert any(line.startswith(f"| {first_column} |") for line in lines), first_column
    next(lines)  # |---|
    return [[cell.strip("* ") for cell in line.strip("| ").split(" | ")]
            for line in itertools.takewhile(lambda line: line.startswith("|"), lines)]


def measured(name):
    """{(task, method, setting): rows of results/NAME.csv, a seed each}"""
    rows = {}
    for row in sorted(sweep.read_csv(f"results/{name}.csv"), key=lambda row: int(row["seed"])):
        assert not row["error"]
        rows.setdefault((row["task"], row["method"], row["setting"]), []).append(row)
    return rows


def column(rows, name):
    return [round(float(row[name]), 2) for row in rows]


METHODS = {"stand-in": "preference", "oracle": "oracle", "(true reward)": "true", "(sparse reward)": "sparse",
           "score, stand-in": "score"}


def test_the_evidence_has_the_numbers_of_its_csv():
    """Each seed's success in the tables of results/README.md must be that of tasks.csv, few_questions.csv and weak_vlm.csv."""
    rows, seen = measured("tasks"), set()
    for task, labels, seeds, steps, pairs, _, end, third, *_ in table("results/README.md", "task | labels"):
        of = rows[task, METHODS[labels], METHODS[labels]]
        seen.add((task, METHODS[labels], METHODS[labels]))
        assert (int(seeds), steps) == (len(of), f"{int(of[0]['steps']):,}"), (task, labels)
        assert [float(x) for x in end.split(", ")] == column(of, "eval_success"), (task, labels)
        assert [float(x) for x in third.split(", ")] == column(of, "success_last_third"), (task, labels)
    assert seen == {key for key in rows if key[0] != "CartPole"}  # which has a table of its own
    rows = measured("few_questions")
    for pairs, *cells in table("results/README.md", "DrawerOpen (8,000 steps), pairs"):
        for (sampler, name), cell in zip(itertools.product(("uniform", "diverse"), ("eval_success", "success_last_third")),
                                         cells, strict=True):
            of = rows["DrawerOpen", "preference", f"{sampler} {pairs.replace(',', '')}"]
            assert [float(x) for x in cell.split(", ")] == column(of, name), (pairs, sampler, name)
    rows = measured("weak_vlm")
    for flaw, field, default, first in (("wrong", "vlm_mistakes", " patience=3", []), ("unsure", "vlm_unsure", "", ["labels"])):
        for share, *cells in table("results/README.md", f"{flaw} answers"):
            settings = [f"{field}={int(share[:-2]) / 100}{patience}" for patience in (default, " patience=0")]
            for (task, setting), cell in zip(itertools.product(("CartPole", "DrawerOpen"), settings), cells, strict=True):
                names = [*first, "eval_success", "spearman" if task == "CartPole" else "success_last_third"]
                for name, numbers in zip(names, cell.split("; "), strict=True):
                    of = column(rows[task, "preference", setting], name)
                    assert [float(x) for x in numbers.split(", ")] == of, (task, setting, name)


def test_the_readme_has_the_means_of_the_csv():
    """Its table of seven tasks must be the mean over the seeds of tasks.csv."""
    rows = measured("tasks")
    for task, seeds, steps, pairs, *cells in table("README.md", "task | seeds"):
        for method, cell in zip(METHODS.values(), cells, strict=True):
            of = rows[task, method, method]
            means = [sum(float(row[name]) for row in of) / len(of) for name in ("eval_success", "success_last_third")]
            assert np.allclose([float(x) for x in cell.split(" / ")], means, atol=0.00501), (task, method)
            assert (int(seeds), steps) == (len(of), f"{int(of[0]['steps']):,}"), (task, method)
        assert pairs.split()[0] == f"{int(rows[task, 'preference', 'preference'][0]['pairs_asked']):,}", task


def test_readme_python_blocks_run(tmp_path):
    """Every block marked python in the README must run as it stands, beside the repository's files."""
    blocks = re.findall(r"```python\n(.*?)```", Path("README.md").read_text(), re.S)
    assert blocks
    for block in blocks:
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
        result = subprocess.run([sys.executable, "-c", block], cwd=tmp_path, capture_output=True, text=True, timeout=150,
                                env=environment)
        assert result.returncode == 0, result.stderr[-2000:]
