"""Speed that must change nothing: gradients by hand, bfloat16 and CUDA graphs."""
import copy
import dataclasses
import functools
import inspect
import io
import zlib

import gymnasium
import numpy as np
import pytest
import torch
import reward_model
import sac
import train
from support import fast, run, settings
from support.fast import FastRewardModel, FastSAC
from support.report import rank_correlation
from test_components import box, distance_after_learning, filled_batch, tiny


def a_batch(space, seed, size=64):
    """A batch of transitions with 5 observed numbers, of which some terminate."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    discrete = hasattr(space, "n")
    action = torch.randint(space.n, (size,), generator=generator) if discrete else draw(size, *space.shape).tanh()
    return {"obs": 3 * draw(size, 5) + 1, "action": action, "reward": draw(size), "next_obs": 3 * draw(size, 5) + 1,
            "terminated": (torch.rand(size, generator=generator) < 0.1).float()}


def numbers(agent):
    """All that an agent has learned, as one vector: weights, targets, temperature, the averages of its optimisers."""
    weights = [*agent.actor.parameters(), *agent.slow_actor.parameters(), *agent.critic.parameters(),
               *agent.target.parameters(), agent.log_alpha]
    averages = [adam.state[weight][name] for adam in (agent.actor_optimizer, agent.critic_optimizer)
                for weight in adam.param_groups[0]["params"] for name in ("step", "exp_avg", "exp_avg_sq")]
    return torch.cat([x.detach().flatten() for x in (*weights, *averages)])


def assert_same_agent(one, two, tolerance=1e-5):
    torch.testing.assert_close(numbers(one), numbers(two), rtol=0, atol=tolerance)
    before = one.rng.get_state()
    assert torch.equal(before, two.rng.get_state())
    for obs in torch.eye(5):
        for explore in (True, False):
            assert np.allclose(one.act(obs, explore), two.act(obs, explore), rtol=0, atol=tolerance)
        assert np.allclose(one.best_action(obs), two.best_action(obs), rtol=0, atol=tolerance)
    one.rng.set_state(before), two.rng.set_state(before)


SPACES = {"1 number": box(1), "3 numbers": box(3), "discrete": gymnasium.spaces.Discrete(4)}
every_space = pytest.mark.parametrize("space", SPACES.values(), ids=SPACES)


@pytest.mark.parametrize("size, layer_norm", [(32, False), (32, True), (256, False)])
@every_space
def test_a_hundred_updates_by_hand_are_a_hundred_updates_of_sac(space, size, layer_norm):
    """By hand SAC's own weights, averages, draws and results, also with fresh critics and units, at a rate that falls."""
    plain, fast_one = (kind(5, space, hidden=(size, size), layer_norm=layer_norm) for kind in (sac.SAC, FastSAC))
    for number in range(100):
        for agent in (plain, fast_one):
            agent.set_learning_rate(1 - number / 110)
        if number == 30:
            plain.reset_critic(), fast_one.reset_critic()
        if number == 60:
            observed = a_batch(space, 1000)["obs"]
            plain.normalise_observations(observed), fast_one.normalise_observations(observed)
        batch = a_batch(space, number, 64 if number < 90 else 16)
        (name, expected), (same, got) = (zip(*agent.update(batch).items()) for agent in (plain, fast_one))
        assert name == same
        torch.testing.assert_close(torch.stack(got), torch.stack(expected), rtol=0, atol=1e-5)
    assert_same_agent(plain, fast_one)
    assert all(p.grad is None for p in (*fast_one.actor.parameters(), *fast_one.critic.parameters()))  # no autograd
    assert plain.actor[0].weight.grad is not None


@pytest.mark.parametrize("updates", [0, 7])
@every_space
def test_checkpoints_of_sac_and_of_updates_by_hand_are_the_same(space, updates):
    """What either saves, either must load, and go on as if nothing had been; by hand from by hand to the bit."""
    for first in (sac.SAC, FastSAC):
        agent = first(5, space, hidden=(32, 32))
        for number in range(updates):
            agent.update(a_batch(space, number))
        file = io.BytesIO()
        torch.save(agent.state_dict(), file)
        others = [kind(5, space, hidden=(32, 32), seed=9) for kind in (sac.SAC, FastSAC)]
        for other in others:
            other.update(a_batch(space, 99))
            file.seek(0)
            other.load_state_dict(torch.load(file, weights_only=True))
        for number in range(updates, updates + 20):
            for each in (agent, *others):
                each.update(a_batch(space, number))
        for other in others:
            assert_same_agent(agent, other, 0 if type(other) is first else 1e-5)


def test_weights_by_hand_are_those_that_act_and_a_copy_learns_alone():
    """The actor that acts must be the one that was updated, and a copy of an agent must have weights of its own."""
    agent, obs = FastSAC(5, box(3), hidden=(32, 32)), np.ones(5, np.float32)
    agent.update(a_batch(box(3), 0))
    flat, before = agent._by_hand.actor_adam.weights, agent.act(obs, explore=False)
    assert agent.actor[0].weight.data_ptr() == flat.data_ptr() and agent.log_alpha.data_ptr() == flat[-1:].data_ptr()
    other, old = copy.deepcopy(agent), numbers(agent)
    other.update(a_batch(box(3), 1))
    assert torch.equal(numbers(agent), old) and not torch.equal(numbers(other), old)
    agent.update(a_batch(box(3), 1))
    assert torch.equal(numbers(agent), numbers(other)) and not np.array_equal(agent.act(obs, explore=False), before)


def test_each_derivative_by_hand_is_that_of_autograd():
    """The formulas of fast.py, one by one, against autograd; and their examples."""
    generator = torch.Generator().manual_seed(0)
    mean, raw, noise, weight = torch.randn(4, 6, 3, generator=generator).double()
    mean.requires_grad_(), raw.requires_grad_()
    log_std = sac.LOG_STD_MIN + 0.5 * (sac.LOG_STD_MAX - sac.LOG_STD_MIN) * (torch.tanh(raw) + 1)
    action, log_prob = sac.tanh_gaussian(mean, log_std, noise)
    (0.3 * log_prob - (weight * action).sum(-1)).mean().backward()  # Q = weight * action
    with torch.no_grad():
        got = fast.gaussian_gradient(-weight / 6, action, log_std, torch.tanh(raw), noise, 0.3)
    torch.testing.assert_close(got, torch.cat([mean.grad, raw.grad], -1))
    ones = torch.ones(1, 1)
    got = fast.gaussian_gradient(ones, 0 * ones, 0 * ones, 0 * ones, 2 * ones, 0.1)
    assert got.flatten().tolist() == pytest.approx([1, 6.65])

    logits, q = torch.randn(2, 6, 3, generator=generator).double()
    log_probs = torch.log_softmax(logits.requires_grad_(), -1)
    (log_probs.exp() * (0.3 * log_probs - q)).sum(-1).mean().backward()
    torch.testing.assert_close(fast.categorical_gradient(log_probs.exp(), log_probs, q, 0.3).detach(), logits.grad)
    half = torch.full((1, 2), 0.5)
    assert fast.categorical_gradient(half, half.log(), torch.tensor([[1.0, 0.0]]), 0.0).tolist() == [[-0.25, 0.25]]

    assert fast.min_gradient(torch.tensor([[1.0, 5], [2, 3]])).tolist() == [[-0.5, 0], [0, -0.5]]


@pytest.mark.parametrize("layer_norm", [False, True])
@pytest.mark.parametrize("hidden", [(8,), (8, 7, 6)])
def test_the_chain_rule_by_hand_is_that_of_autograd(hidden, layer_norm):
    """Networks: the output of both, and the derivatives by all weights and by the input."""
    pair = [sac.MLP((4, *hidden, 2), layer_norm).double() for _ in range(2)]
    x, d_output = torch.randn(2, 5, 4).double().requires_grad_(), torch.randn(2, 5, 2).double()
    weights = fast.interleaved(pair)
    expected = torch.stack([net(one) for net, one in zip(pair, x)])
    *grads, d_x = torch.autograd.grad(expected, [*weights, x], d_output)
    vector = fast.flatten(weights)
    gradient = torch.full_like(vector, np.nan)
    both = fast.Networks(vector, 2, (4, *hidden, 2), gradient, layer_norm=layer_norm)
    with torch.no_grad():
        output = both.forward(x)
        torch.testing.assert_close(output, expected)
        both.backward(d_output)
        torch.testing.assert_close(gradient, torch.cat([g.flatten() for g in grads]))
        both.forward(x)
        torch.testing.assert_close(both.backward(d_output, to_weights=False), d_x)


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("m, k, n", [(128, 128, 128), (256, 23, 256), (256, 256, 12), (64, 1, 8), (256, 256, 1), (3, 5, 2)])
def test_a_product_is_the_product_by_whichever_library(monkeypatch, exact, m, k, n):
    """Large, with few columns, of one column and one row, with strides: always a b, with all the bits of float32."""
    monkeypatch.setattr(fast, "onednn_is_exact", lambda real=fast.onednn_is_exact(): real and exact)
    setting, generator = torch.backends.mkldnn.matmul.fp32_precision, torch.Generator().manual_seed(0)
    a, b, bias = (torch.randn(2, *shape, generator=generator) for shape in ((m, k), (k, n + 1), (1, n)))
    out, b = torch.empty(2, m, n), b[..., 1:]
    for added, expected in ((None, a.double() @ b.double()), (bias, bias + a.double() @ b.double())):
        fast.Product(out, a, b, added)()
        torch.testing.assert_close(out.double(), expected, rtol=0, atol=1e-4)
    assert torch.backends.mkldnn.matmul.fp32_precision == setting  # for whatever else the process multiplies


def test_in_half_the_bits_by_hand_is_nearer_to_autograd_in_half_the_bits_than_to_all_the_bits():
    """bfloat16 by hand must round where HalfMLP rounds."""
    half = type("Half", (sac.SAC,), {"network": fast.HalfMLP})
    kinds = (half, functools.partial(FastSAC, bfloat16=True), sac.SAC)
    agents = [kind(5, box(3), hidden=(64, 64, 64)) for kind in kinds]
    for number in range(50):
        for agent in agents:
            agent.update(a_batch(box(3), number))
    autograd, by_hand, exact = (numbers(agent) for agent in agents)
    assert (by_hand - autograd).abs().mean() < 0.7 * (by_hand - exact).abs().mean() < 1e-3


class FakeGraph:
    """What fast.Recorded asks of its users, on a CPU: the same shapes every time, results that get overwritten."""

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
    plain, recorded = (sac.SAC(2, box(1), hidden=(32, 32)), FastSAC(2, box(1), hidden=(32, 32), record=FakeGraph))
    other, before = sac.SAC(2, box(1), hidden=(32, 32), seed=1).state_dict(), None
    for change in (lambda agent: None, lambda agent: agent.reset_critic(),
                   lambda agent: agent.normalise_observations(np.eye(2)), lambda agent: agent.load_state_dict(other)):
        for agent in (plain, recorded):
            change(agent)
            values = [float(agent.update(filled_batch(16, seed))["q_mean"]) for seed in range(3)]
        assert recorded._recorded is not before and recorded._recorded.calls == 3 and len(set(values)) == 3
        assert all(torch.equal(a, b) for a, b in zip(plain.critic.parameters(), recorded.critic.parameters()))
        assert float(plain.update(filled_batch(16))["q_mean"]) == float(recorded.update(filled_batch(16))["q_mean"])
        before, recorded._recorded.calls = recorded._recorded, 0


def test_a_recorded_fit_learns_the_same_also_from_a_last_batch_that_is_smaller():
    """record must change no number of a fit. A replay goes on with the tensors it knows: a fit must not replace them."""
    images, angle = reward_model.demo_images(60, np.random.default_rng(0))
    data = reward_model.PreferenceDataset(40, images.shape[1:])  # 35 to fit: batches of 16, 16 and 3
    data.add(images[:40], images[20:], (abs(angle[20:]) < abs(angle[:40])).astype(int))
    plain, recorded = (reward_model.RewardModel(images.shape[1:]), FastRewardModel(images.shape[1:], record=FakeGraph))
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


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: run it where there is one")


@needs_gpu
@pytest.mark.parametrize("discrete", [False, True])
def test_a_replayed_update_is_the_update(discrete):
    """On a GPU, forty recorded updates must give the weights of forty plain ones, to the bit; so must going on."""
    space = gymnasium.spaces.Discrete(3) if discrete else box(2)
    agents = [FastSAC(4, space, device="cuda", record=record) for record in (None, fast.Recorded)]
    rng, buffer = np.random.default_rng(0), sac.ReplayBuffer(500, (4,), () if discrete else (2,))
    for _ in range(500):
        buffer.add(rng.normal(size=4), rng.integers(3) if discrete else rng.uniform(-1, 1, 2), rng.normal(size=4),
                   rng.random() < 0.1, None, 0.0)
        buffer.set_rewards([rng.normal()])
    batches = [buffer.sample(64) for _ in range(40)]
    for number, batch in enumerate(batches):
        if number == 20:
            for agent in agents:
                agent.reset_critic()
                agent.normalise_observations(buffer.obs)
            state = copy.deepcopy(agents[1].state_dict())
        results = [agent.update(batch) for agent in agents]
        assert {name: float(x) for name, x in results[0].items()} == {name: float(x) for name, x in results[1].items()}
    went_on = FastSAC(4, space, device="cuda", seed=5, record=fast.Recorded)
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
    images, angle = reward_model.demo_images(2 * answers, np.random.default_rng(0))
    data = reward_model.PreferenceDataset(answers, images.shape[1:])
    data.add(images[:answers], images[answers:], (abs(angle[answers:]) < abs(angle[:answers])).astype(int))
    for record in (None, fast.Recorded):
        model = FastRewardModel(images.shape[1:], device="cuda", record=record)
        for _ in range(2):
            assert model.fit(data, epochs=40)["train_accuracy"] > 0.95 and model.accuracy(data, held_out=False) > 0.95


@needs_gpu
def test_a_function_that_draws_noise_draws_another_one_at_every_replay():
    """Recorded: the generator goes on, inputs are copied in, and what is written in place adds up."""
    noise, weight = torch.Generator("cuda").manual_seed(0), torch.zeros(3, device="cuda")

    def step(x):
        weight.add_(x)
        return weight.sum(), torch.rand(1, device="cuda", generator=noise)

    step = fast.Recorded(step, "cuda", noise)
    sums, draws = zip(*([float(x) for x in step(torch.full((3,), float(n)))] for n in range(8)))
    assert sums == (0, 3, 9, 18, 30, 45, 63, 84) and len(set(draws)) == 8


def test_in_half_the_bits_are_neither_observations_nor_values_nor_weights():
    """In bfloat16 only what is between the first layer and the last may be rounded."""
    agent, kinds = FastSAC(2, box(1), hidden=(32, 32), bfloat16=True), []
    for layer in agent.critic.q1:
        if isinstance(layer, torch.nn.Linear):
            layer.register_forward_hook(lambda module, x, y: kinds.append(y.dtype))
    obs = torch.linspace(-1, 1, 2000)[:, None].repeat(1, 2)
    values = agent.critic(obs, obs[:, :1])[0]
    assert kinds == [torch.float32, torch.bfloat16, torch.float32]
    assert len(values.unique()) > 2 * len(values.bfloat16().unique())
    agent.reset_critic()
    agent.update(filled_batch(16))
    assert {type(net) for net in (agent.critic.q1, agent.target.q2, agent.actor)} == {fast.HalfMLP}
    assert {p.dtype for p in (*agent.actor.parameters(), *agent.critic.parameters())} == {torch.float32}


def test_in_half_the_bits_the_order_is_learned_too_and_rewards_keep_all_their_bits():
    """A fit in bfloat16 must order unseen images, and 500 images of a turning pole must not share a few rewards."""
    images, angle = reward_model.demo_images(160, np.random.default_rng(0))
    data = reward_model.PreferenceDataset(80, (64, 64, 3))
    data.add(images[:80], images[80:], (np.abs(angle[80:]) < np.abs(angle[:80])).astype(int))
    model = FastRewardModel((64, 64, 3), bfloat16=True)
    kinds = []
    model.nets[0].convolutions[0].register_forward_hook(lambda module, x, y: kinds.extend([x[0].dtype, y.dtype]))
    model.member_rewards(images[:2])
    assert kinds == [torch.bfloat16] * 2  # given so already: converted once, not by each member
    model.fit(data, epochs=8)
    unseen, angle = reward_model.demo_images(500, np.random.default_rng(1))
    reward = model.predict(unseen)
    assert rank_correlation(reward, -np.abs(angle)) > 0.8
    assert reward.dtype == np.float32 and len(np.unique(reward)) > 400  # rounded to 8 bits: at most 256 in an octave


@pytest.mark.parametrize("asked, expected", [
    (0, []), (1, [("FastSAC", False, None)]), (2, [("FastRewardModel", True, None), ("FastSAC", True, None)])])
def test_fast_reaches_the_networks_that_it_should(tmp_path, monkeypatch, unreported, asked, expected):
    """--fast 1, the default: SAC by hand; 2: bfloat16 too, in both, on a processor that has it; 0: nothing of it."""
    made = []
    monkeypatch.setattr(fast, "has_bfloat16", lambda: True)
    for kind in (FastSAC, FastRewardModel):
        monkeypatch.setattr(kind, "__init__", lambda self, *given, real=kind.__init__, name=kind.__name__, **named: (
            made.append((name, named.get("bfloat16", False), named.get("record"))), real(self, *given, **named))[1])
    train.train(tiny(tmp_path, total_steps=100, fast=asked))
    assert sorted(made) == expected


def test_the_derivatives_are_of_sac_as_it_is(monkeypatch, capsys):
    """After a change in sac.py: check the derivatives in fast.py, then put the number that is said here in WRITTEN_FOR.

    A run must take a changed sac.py as it is, and say so.
    """
    text = "".join(inspect.getsource(part) for part in (sac.MLP, sac.TwinCritic, sac.tanh_gaussian, sac.SAC))
    assert fast.follows_sac(), f"WRITTEN_FOR = {zlib.crc32(text.encode())}"
    config = settings.resolve(settings.Config())
    assert run.choose_parts(config).SAC.func is FastSAC and not capsys.readouterr().out
    monkeypatch.setattr(fast, "WRITTEN_FOR", 1)
    assert run.choose_parts(config).SAC is sac.SAC and "sac.py was changed" in capsys.readouterr().out
    assert run.choose_parts(dataclasses.replace(config, fast=0)).SAC is sac.SAC and not capsys.readouterr().out


@pytest.mark.parametrize("changes, device", [
    ({}, "cpu"), ({"fast": 2}, "cuda"), ({"reward": "clip", "goal": "up"}, "cuda"), ({"device": "cuda"}, "cuda"),
    ({"device": "cpu", "reward": "clip", "goal": "up"}, "cpu")])
def test_auto_takes_a_gpu_only_where_it_gains(monkeypatch, changes, device):
    """With a GPU: small kernels that are launched one by one are faster on the CPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert settings.resolve(settings.Config(**changes)).device == device


@pytest.mark.parametrize("discrete", [False, True])
def test_in_half_the_bits_sac_learns_a_point_mass_too(monkeypatch, discrete):
    """The lesson's point mass, in bfloat16."""
    monkeypatch.setattr(sac, "SAC", functools.partial(FastSAC, bfloat16=True))
    assert distance_after_learning(discrete) < 0.25
