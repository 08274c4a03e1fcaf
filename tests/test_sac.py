"""sac.py: what the lesson leaves out. Memory-mapped buffers, the temperature, spaces that are refused."""
import os

import gymnasium
import numpy as np
import pytest
import torch

from tools import bench
import sac
from test_components import box, filled_batch


def test_a_mapped_buffer_outlives_its_object(tmp_path):
    """Arrays in a folder plus state_dict must give the same buffer back, drawing the same rows next."""
    first = sac.ReplayBuffer(4, (1,), (1,), (1, 1, 3), folder=tmp_path)
    for number in range(3):
        first.add([number], [0.5], [0.0], number == 2, np.full((1, 1, 3), number, np.uint8), 0.0)
    first.set_rewards([7.0, 8.0, 9.0])
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


def test_an_end_counts_as_if_its_image_stayed():
    """relabel() must multiply the reward of a step that ended an episode, of no other step, and set_rewards() of none."""
    buffer = sac.ReplayBuffer(4, (1,), (1,), (1, 1, 3), end_counts=1 / (1 - 0.9))
    for number, over in enumerate((False, True, False)):
        buffer.add([0.0], [0.0], [0.0], over, np.full((1, 1, 3), number - 1, np.int8).astype(np.uint8), 0.0)
    buffer.relabel(lambda images: images[:, 0, 0, 0].astype(np.int8) - 1.0)  # -2, -1, 0
    np.testing.assert_allclose(buffer.reward[:3], [-2, sum(-0.9**n for n in range(1000)), 0], rtol=1e-6)
    buffer.add([0.0], [0.0], [0.0], True, np.zeros((1, 1, 3), np.uint8), 0.0)
    buffer.set_rewards([-1.0])
    assert buffer.reward[3] == -1


def test_a_smaller_learning_rate_makes_smaller_steps():
    """Adam's first step is the learning rate itself, so a share of a tenth must move each weight a tenth as far."""
    moved = []
    for share in (1.0, 0.1):
        agent = sac.SAC(2, box(1), hidden=(16, 16), lr=1e-3)
        before = [weight.detach().clone() for weight in agent.critic.parameters()]
        agent.set_learning_rate(share)
        agent.update(filled_batch(64))
        moved.append(max(float((new.detach() - old).abs().max()) for new, old in zip(agent.critic.parameters(), before)))
    assert moved[0] == pytest.approx(1e-3, rel=0.01) and moved[1] == pytest.approx(1e-4, rel=0.01)
