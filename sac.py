"""Soft Actor-Critic and the replay buffer whose rewards can be written again.

What this is: SAC (arXiv 1801.01290, 1812.05905; discrete actions: 1910.07207) on states, and a
ring of transitions with the picture seen after each, so that a better reward can be put on all.
Which STEPs: 0 explore without any reward, 1 act and store, 5 relabel, 6 improve the policy:
    target   y = r + discount * (1 - terminated) * (min_i Q'_i(s', a') - alpha * log pi(a'|s'))
    critics  minimise (Q_i(s, a) - y)^2          a as stored, a' ~ pi(s')
    actor    minimises alpha * log pi(a|s) - min_i Q_i(s, a)          a ~ pi(s)
    alpha    grows while the policy's entropy is below its target, and shrinks while it is above

Differs from the paper (RL-VLM-F, 2402.03681):
  1. New rows have no reward (NaN), and only STEP 0 samples them, until their episode is priced.
  2. relabel() covers every stored row, also after the ring wrapped; theirs then misses most.
  3. Novelty is measured against at most 1,024 random stored states, for speed.
  4. Targets follow at every update (theirs: every second), alpha at the critics' rate, and there
     are two hidden layers (theirs: three for Meta-World, rope and water): simpler.
  5. Unbounded observations are seen in units of their spread over the first steps (standardise).
Shapes: O observation, A action numbers, B batch, N stored rows, H and W pixels. Only numpy, torch.
  ReplayBuffer.add/relabel/price/sample, novelty_bonus, SAC.act/update/reset_critic.
To use it elsewhere:
    import gymnasium, sac
    env = gymnasium.make("Pendulum-v1")
    agent, buffer = sac.SAC(3, env.action_space), sac.ReplayBuffer(1000, (3,), (1,))
    obs, _ = env.reset(seed=0)
    for _ in range(200):  # one episode
        last, action = obs, agent.act(obs)  # (1,) in [-1, 1]: Pendulum's torque is twice that
        obs, reward, terminated, truncated, _ = env.step(2 * action)
        buffer.add(last, action, obs, terminated, None, reward)
        buffer.price([reward])
        agent.update(buffer.sample(64))
"""
import copy
import mmap
import os
import zlib

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

LOG_STD_MIN, LOG_STD_MAX = -5.0, 2.0  # of the Gaussian before tanh; the paper's range
RANDOM_SHARE = 0.05  # of discrete actions is uniform, whatever the policy says
LOG_2 = float(np.log(2.0))


class StoredArrayError(ValueError):
    """A file of stored_array() that is there and cannot be used, in one line."""


def stored_array(folder, name, shape, dtype):
    """Zeros of that shape: in memory or, given a folder, in a memory-mapped file there.

    The file outlives the process, and one that exists already is opened as it is: a resumed run
    finds what the interrupted one stored. StoredArrayError where it is something else.
    """
    if folder is None:
        return np.zeros(shape, dtype)
    path = os.path.join(folder, name + ".npy")
    if not os.path.exists(path):
        os.makedirs(folder, exist_ok=True)
        return np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)
    try:
        # trap: opened for writing, a file that was cut short is made whole again, with zeros
        array = np.lib.format.open_memmap(path, mode="r")
    except (ValueError, OSError) as error:
        raise StoredArrayError(f"{path} is cut short or damaged ({error})") from None
    if array.shape != shape or array.dtype != dtype:
        raise StoredArrayError(f"{path} holds {array.dtype} {array.shape}, not {shape}: "
                               "it belongs to another run")
    return np.lib.format.open_memmap(path, mode="r+")


# ---- STEP 1: act, and store the transition with the image seen after it ----
class ReplayBuffer:
    """A ring of transitions. reward is NaN until a row is priced; unpriced rows are the newest.

    obs, next_obs (N, O) float32; action (N, A) float32 or (N,) int64; terminated (N,) bool;
    reward, true_reward (N,) float32; image (N, H, W, 3) uint8, the picture *after* the action
    (or absent, when image_shape is None).
    folder: the arrays are memory-mapped files there: they need no memory of their own, and outlive
    the process.
    """

    IN_CHECKPOINT = ("terminated", "reward", "true_reward")

    def __init__(self, capacity, obs_shape, action_shape, image_shape=None, folder=None, seed=0):
        self.capacity = int(capacity)
        self.rng = np.random.default_rng(seed)
        self.added = 0  # rows ever added; row number `added % capacity` is written next
        self.unpriced = 0  # how many of the newest rows have no reward yet

        def array(name, shape, dtype):
            return stored_array(folder, name, (self.capacity, *shape), dtype)

        self.obs, self.next_obs = (array("obs", obs_shape, np.float32),
                                   array("next_obs", obs_shape, np.float32))
        self.action = array("action", action_shape, np.float32 if len(action_shape) else np.int64)
        self.image = None if image_shape is None else array("image", image_shape, np.uint8)
        # These are small, and rewards change after they were written: they live in memory and
        # travel in checkpoints.
        self.terminated = np.zeros(self.capacity, bool)
        self.reward = np.full(self.capacity, np.nan, np.float32)
        self.true_reward = np.full(self.capacity, np.nan, np.float32)

    def __len__(self):
        return min(self.added, self.capacity)

    def add(self, obs, action, next_obs, terminated, image, true_reward):
        """Store one transition, copied. true_reward is for `--reward true`; unread here.

        Raises ValueError, and counts no row, where a number is not finite in float32: a single nan
        would make every weight of the networks nan, for good.
        """
        row = self.added % self.capacity
        for name, value in (("obs", obs), ("action", action), ("next_obs", next_obs),
                            ("true_reward", true_reward)):
            place = getattr(self, name)
            # trap: without reshape, numpy would spread one number over a whole row
            place[row] = np.reshape(value, place.shape[1:])
            finite = np.isfinite(place[row])
            if not finite.all():
                entry = np.argmin(finite)  # the first that is not
                raise ValueError(f"transition {self.added}: entry {entry} of {name} is "
                                 f"{np.ravel(value)[entry]}; all must be finite in float32")
        # trap: a time limit is not a termination. Only `terminated` stops the bootstrap; a
        # truncated episode goes on.
        self.terminated[row] = terminated
        self.reward[row] = np.nan
        if self.image is not None:
            assert image.dtype == np.uint8 and image.shape == self.image.shape[1:], (
                image.dtype, image.shape)
            self.image[row] = image
        self.added += 1
        self.unpriced = min(self.unpriced + 1, self.capacity)

    def newest(self, count):
        """Row numbers of the newest `count` rows, oldest first, also across the ring's seam."""
        return np.arange(self.added - count, self.added) % self.capacity  # (count,)

    def price(self, rewards):
        """Give the unpriced rows their rewards, oldest first: (K,) for K unpriced rows."""
        rewards = np.asarray(rewards, np.float32)
        assert rewards.shape == (self.unpriced,) and np.isfinite(rewards).all(), (
            rewards.shape, self.unpriced)
        self.reward[self.newest(self.unpriced)] = rewards
        self.unpriced = 0

    # ---- STEP 5: relabel every stored transition with the new reward ----
    def relabel(self, reward_fn, only_new=False, chunk=1024):
        """Price stored rows with reward_fn: (N, H, W, 3) uint8 -> (N,) float32. Returns how many.

        only_new: just the rows that have no reward yet (an episode has ended); otherwise all.
        """
        rows = self.newest(self.unpriced if only_new else len(self))
        # trap: after the ring wrapped, the rows are not [0 : cursor]; walk len(self) rows from the
        # oldest, wherever the cursor is.
        for start in range(0, len(rows), chunk):
            part = rows[start : start + chunk]
            self.reward[part] = reward_fn(self.image[part])  # (chunk, H, W, 3) -> (chunk,)
            if isinstance(self.image, np.memmap):
                # trap: pages of a mapped file that were read stay in memory as ours, all of them
                # by the end; they are on disk
                self.image._mmap.madvise(mmap.MADV_DONTNEED)
        assert np.isfinite(self.reward[rows]).all(), (
            "the reward function returned a number that is not finite")
        self.unpriced = 0
        return len(rows)

    def sample(self, batch, unpriced_too=False):
        """Draw rows with replacement -> dict of tensors: obs, next_obs (B, O), action (B, A),
        reward, terminated (B,).

        unpriced_too: STEP 0 explores before any reward exists, and sets batch["reward"] itself.
        """
        choices = len(self) - (0 if unpriced_too else self.unpriced)
        if choices <= 0:
            raise ValueError(f"nothing to sample: {len(self)} rows stored, "
                             f"{self.unpriced} of them without a reward")
        age = self.rng.integers(0, choices, batch)  # 0 = the oldest row; the unpriced are youngest
        rows = (self.added - len(self) + age) % self.capacity  # (B,)
        return {
            "obs": torch.from_numpy(self.obs[rows]),  # (B, O) float32
            "action": torch.from_numpy(self.action[rows]),  # (B, A) float32, or (B,) int64
            "reward": torch.from_numpy(self.reward[rows]),  # (B,) float32
            "next_obs": torch.from_numpy(self.next_obs[rows]),  # (B, O) float32
            # (B,) 0 or 1
            "terminated": torch.from_numpy(self.terminated[rows].astype(np.float32)),
        }

    ON_DISK = ("obs", "next_obs", "action", "image")
    summed = 0, {}  # rows of which sums() has the checksums, and these

    def sums(self):
        """CRCs of the memory-mapped arrays: every row is read once, for rows are only added.

        {} once the ring has wrapped, where that is no longer so.
        """
        start, sums = self.summed
        arrays = {name: getattr(self, name) for name in self.ON_DISK}
        arrays = {name: array for name, array in arrays.items() if isinstance(array, np.memmap)}
        if self.added > self.capacity:
            return {}
        for name, array in arrays.items():
            crc = sums.get(name, 0)
            for row in range(start, self.added, 1024):
                crc = zlib.crc32(array[row:min(row + 1024, self.added)].tobytes(), crc)
            sums = {**sums, name: crc}
            array._mmap.madvise(mmap.MADV_DONTNEED)  # see relabel()
        self.summed = self.added, sums
        return sums

    def state_dict(self):
        """What changes after it was written; the memory-mapped arrays are on disk already, and are
        told apart from others by their checksums.
        """
        n = len(self)
        for name in self.ON_DISK:
            if isinstance(getattr(self, name), np.memmap):
                getattr(self, name).flush()  # of use after a power failure, as the checkpoint is
        return {"added": self.added, "unpriced": self.unpriced, "sums": self.sums(),
                "rng": self.rng.bit_generator.state,
                **{name: torch.from_numpy(getattr(self, name)[:n].copy())
                   for name in self.IN_CHECKPOINT}}

    def load_state_dict(self, state):
        """Back to the moment of state_dict(); needs the same folder and a ring not yet wrapped."""
        self.added, self.unpriced = state["added"], state["unpriced"]
        self.rng.bit_generator.state = state["rng"]
        for name in self.IN_CHECKPOINT:
            getattr(self, name)[: len(self)] = state[name].numpy()
        self.summed = 0, {}
        sums = state.get("sums", {})  # older checkpoints have none
        for name, crc in self.sums().items() if sums else ():
            if crc != sums[name]:
                raise ValueError(f"{name}.npy is not the one that was stored with it")


# ---- STEP 0: explore without any reward ----
def novelty_bonus(obs, all_obs, k=5):
    """How far each state is from the states already stored: a reward for going to new places.

        bonus(s) = || s - (k-th nearest stored state) ||

    This is a particle estimate of state entropy (PEBBLE, 2106.05091).
    obs: (B, O), all_obs: (N, O) -> (B,). A stored state counts as its own nearest neighbour.
    Example: obs 0, stored states 1, 2, 5 and k=2 -> 2.
    """
    distance = torch.cdist(obs, all_obs)  # (B, N)
    return distance.topk(min(k, all_obs.shape[0]), dim=-1, largest=False).values[:, -1]  # (B,)


def novelty_batch(buffer, batch, against=1024):
    """What update() needs in STEP 0: a batch whose reward is the novelty of next_obs, mean 1."""
    drawn = buffer.sample(batch, unpriced_too=True)
    # trap: drawn with replacement, the nearest few of a small buffer would be copies of one state
    rows = buffer.rng.choice(len(buffer), min(len(buffer), against), replace=False)
    stored = torch.from_numpy(buffer.next_obs[rows])  # (N, O)
    # trap: states have units (metres, radians); without this the largest number alone would say
    # what is novel
    # trap: the deviation of a single state is 0 / 0
    scale = stored.std(0, correction=min(1, len(stored) - 1)).clamp(min=1e-3)  # (O,)
    bonus = novelty_bonus(drawn["next_obs"] / scale, stored / scale)  # (B,)
    return {**drawn, "reward": bonus / bonus.mean().clamp(min=1e-6)}


# ---- STEP 6: improve the policy with SAC on the learned reward ----
def tanh_gaussian(mean, log_std, noise):
    """Squash a Gaussian draw into [-1, 1] and return its log-density.

        u = mean + std * noise,   a = tanh(u),   log pi(a) = sum over A of  log N(u) - log(1 - a^2)

    mean, log_std, noise: (B, A) -> action (B, A), log_prob (B,).
    """
    u = mean + log_std.exp() * noise
    log_normal = -0.5 * noise.pow(2) - log_std - 0.5 * float(np.log(2 * np.pi))
    # trap: log(1 - tanh(u)^2) is -inf in float32 from |u| = 9 on; this is the same number, and
    # stays finite.
    log_slope = 2 * (LOG_2 - u - F.softplus(-2 * u))
    return torch.tanh(u), (log_normal - log_slope).sum(-1)


class MLP(nn.Sequential):
    """Linear layers with ReLU between them: sizes (in, hidden..., out); (B, in) -> (B, out).

    bfloat16: all layers but the first and the last in half the bits; the weights keep all theirs.
    """

    def __init__(self, sizes, bfloat16=False):
        # in place: a Linear layer's gradient does not need what it gave out
        layers = [part for a, b in zip(sizes[:-1], sizes[1:])
                  for part in (nn.Linear(a, b), nn.ReLU(inplace=True))]
        super().__init__(*layers[:-1])
        self.bfloat16 = bfloat16

    def forward(self, x):
        if not self.bfloat16:
            return super().forward(x)
        # trap: with eight significant bits, a pendulum 3 degrees from upright has the cosine of one
        # that is upright, and a value of 100 moves in steps of a half
        first, *hidden, last = self
        x = first(x)
        with torch.autocast(x.device.type, torch.bfloat16):
            for layer in hidden:
                x = layer(x)
        return last(x.float())


class TwinCritic(nn.Module):
    """Two independent Q-networks. Box: Q(s, a) -> (2, B). Discrete: every Q -> (2, B, actions)."""

    def __init__(self, obs_dim, action_dim, actions, hidden, bfloat16):
        super().__init__()
        sizes = (obs_dim + action_dim, *hidden, actions or 1)
        self.q1, self.q2 = MLP(sizes, bfloat16), MLP(sizes, bfloat16)

    def forward(self, obs, action=None):
        x = obs if action is None else torch.cat([obs, action], dim=-1)
        q = torch.stack([self.q1(x), self.q2(x)])
        return q if action is None else q.squeeze(-1)


class SAC:
    """Soft Actor-Critic for a Box (actions in [-1, 1]; scale them outside) or a Discrete space.

    act(obs (O,)) -> (A,) float32 in [-1, 1], or int.
    update(batch) -> dict of 0-d tensors (no .item(): nothing waits).
    alpha: the first temperature; 0.1 is for rewards of about one a step, as a fit gives them.
    bfloat16: see MLP: faster with AVX512-BF16 or AMX and wide layers; slower without.
    record: cuda_graph.Recorded, for a GPU: one launch an update. Batches are then of one size, and
    an update overwrites what the last one returned.
    """

    def __init__(self, obs_dim, action_space, hidden=(256, 256), lr=3e-4, discount=0.99, tau=0.005,
                 device="cpu", seed=0, alpha=0.1, bfloat16=False, record=None):
        self.discrete = hasattr(action_space, "n")
        # by name: this file does not need gymnasium
        if type(action_space).__name__ not in ("Box", "Discrete"):
            raise ValueError(f"SAC needs a Box or Discrete action space, not {action_space}")
        self.actions = int(action_space.n) if self.discrete else 0
        self.action_dim = 0 if self.discrete else int(np.prod(action_space.shape))
        self.discount, self.tau, self.lr, self.device = discount, tau, lr, torch.device(device)
        self.record = record
        self.rng = torch.Generator(device=self.device).manual_seed(seed)
        self.sizes = (obs_dim, self.action_dim, self.actions, tuple(hidden), bfloat16)
        self.center = torch.zeros(obs_dim, device=self.device)
        self.spread = torch.ones(obs_dim, device=self.device)
        # layers draw their first weights from torch's global generator
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            outputs = self.actions or 2 * self.action_dim
            self.actor = MLP((obs_dim, *hidden, outputs), bfloat16).to(self.device)
        self.reset_critic()
        self.log_alpha = torch.full(
            (), float(np.log(alpha)), device=self.device, requires_grad=True)
        # Continuous: -1 nat per action number (1812.05905; uniform on [-1, 1] has +0.69).
        # Discrete: a fifth of the most there can be, log(actions). If entropy paid much, an agent
        # would rather wander on than end the episode at the goal.
        self.target_entropy = (
            0.2 * float(np.log(self.actions)) if self.discrete else -float(self.action_dim))
        # one optimiser for both: no weight is in the other's loss
        self.actor_optimizer = self._adam([*self.actor.parameters(), self.log_alpha])

    def _adam(self, parameters):
        # fused: one pass over memory for all weights; capturable: by a CUDA graph
        return torch.optim.Adam(parameters, lr=self.lr, fused=True,
                                capturable=self.device.type == "cuda")

    def _record_anew(self):
        # trap: a replay works on the tensors it was recorded with. Whatever replaces one, instead
        # of writing to it, must call this: critics, units, an optimiser that was loaded
        self._recorded = self.record and self.record(self._step, self.device, self.rng)

    def reset_critic(self):
        """Forget the values, keep the actor: after STEP 0 the critics' targets were novelty."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(
                int(torch.randint(2**31, (1,), generator=self.rng, device=self.device)))
            self.critic = TwinCritic(*self.sizes).to(self.device)
        self.target = copy.deepcopy(self.critic).requires_grad_(False)
        self.target_weights = list(self.target.parameters())
        self.critic_optimizer = self._adam(self.critic.parameters())
        self._record_anew()

    def standardise(self, obs, floor=0.01):
        """From now on the networks see observations as (o - mean) / deviation over obs (N, O).

        In metres, a cube that was pushed is a change in the second decimal.
        floor: the least deviation; what never moved yet is not blown up without bound when it does.
        """
        obs = torch.as_tensor(np.asarray(obs, np.float32), device=self.device)
        self.center, self.spread = obs.mean(0), obs.std(0).clamp(min=floor)
        self._record_anew()

    def _gaussian(self, obs):
        """The Gaussian before tanh, and a draw of unit noise: mean, log_std, noise (B, A)."""
        mean, log_std = self.actor(obs).chunk(2, dim=-1)
        # tanh, not clamp: outside its bounds a clamped log_std has no gradient, so no way back
        log_std = LOG_STD_MIN + 0.5 * (LOG_STD_MAX - LOG_STD_MIN) * (torch.tanh(log_std) + 1)
        return mean, log_std, torch.randn(mean.shape, generator=self.rng, device=self.device)

    def _policy(self, obs):
        """Box -> action drawn (B, A), log_prob (B,). Discrete -> probabilities and logs (B, n)."""
        if not self.discrete:
            return tanh_gaussian(*self._gaussian(obs))
        log_probs = F.log_softmax(self.actor(obs), dim=-1)
        return log_probs.exp(), log_probs

    @torch.no_grad()
    def act(self, obs, explore=True):
        """obs (O,) -> the action to take: sampled, or the policy's best guess if not explore."""
        obs = torch.as_tensor(np.asarray(obs, np.float32), device=self.device)
        obs = (obs - self.center) / self.spread
        if not self.discrete:
            if not explore:
                return torch.tanh(self.actor(obs)[: self.action_dim]).cpu().numpy()
            mean, log_std, noise = self._gaussian(obs)  # its density is not needed
            return torch.tanh(mean + log_std.exp() * noise).cpu().numpy()
        logits = self.actor(obs)
        if explore:
            # The target is an average over states: in one of them the policy can be sure too early.
            chances = (1 - RANDOM_SHARE) * F.softmax(logits, dim=-1) + RANDOM_SHARE / self.actions
            return int(torch.multinomial(chances, 1, generator=self.rng))
        return int(logits.argmax())

    def _soft_value(self, q, policy):
        """Expected min Q minus alpha times log-probability; the policy's entropy: (B,), (B,)."""
        action_or_probs, log_probs = policy
        if self.discrete:  # an exact expectation: every action's value is at hand
            q = q.amin(0)  # (B, n)
            entropy = -(action_or_probs * log_probs).sum(-1)
            return (action_or_probs * q).sum(-1) + self.log_alpha.exp().detach() * entropy, entropy
        return q.amin(0) - self.log_alpha.exp().detach() * log_probs, -log_probs

    def _value_of(self, critic, obs, policy):
        return self._soft_value(critic(obs) if self.discrete else critic(obs, policy[0]), policy)

    def update(self, batch):
        """One gradient step for critics, actor and temperature, from a batch of sample()."""
        reward, terminated = batch["reward"], batch["terminated"]
        assert reward.ndim == 1 and terminated.shape == reward.shape, (
            reward.shape, terminated.shape)
        step = self._recorded or self._step
        return step(batch["obs"], batch["action"], reward, batch["next_obs"], terminated)

    def _step(self, *tensors):
        obs, action, reward, next_obs, terminated = (x.to(self.device) for x in tensors)
        obs, next_obs = (obs - self.center) / self.spread, (next_obs - self.center) / self.spread
        # The critics learn what the reward and the target's own next value say.
        with torch.no_grad():
            next_value, _ = self._value_of(self.target, next_obs, self._policy(next_obs))  # (B,)
            target = reward + self.discount * (1 - terminated) * next_value  # (B,)
        if self.discrete:  # q: (2, B), the values of the actions taken
            q = self.critic(obs).gather(-1, action.expand(2, -1).unsqueeze(-1)).squeeze(-1)
        else:
            q = self.critic(obs, action)  # (2, B)
        critic_loss = F.mse_loss(q, target.expand_as(q)) * 2  # both critics, each its own mean
        self.critic_optimizer.zero_grad(set_to_none=True)
        critic_loss.backward()
        self.critic_optimizer.step()

        # The actor climbs the critics; the temperature holds the policy's entropy near its target.
        value, entropy = self._value_of(self.critic, obs, self._policy(obs))
        actor_loss, entropy = -value.mean(), entropy.detach().mean()
        alpha_loss = self.log_alpha * (entropy - self.target_entropy)
        self.actor_optimizer.zero_grad(set_to_none=True)
        # trap: without inputs, the critics would collect gradients too, at a cost.
        (actor_loss + alpha_loss).backward(inputs=self.actor_optimizer.param_groups[0]["params"])
        self.actor_optimizer.step()

        with torch.no_grad():  # Polyak: target <- (1 - tau) target + tau critic, in one call
            critic_weights = self.critic_optimizer.param_groups[0]["params"]
            torch._foreach_lerp_(self.target_weights, critic_weights, self.tau)
        return {"critic_loss": critic_loss.detach(), "actor_loss": actor_loss.detach(),
                "q_mean": q.detach().mean(), "alpha": self.log_alpha.detach().exp(),
                "entropy": entropy}

    def _parts(self):
        return {"actor": self.actor, "critic": self.critic, "target": self.target,
                "actor_optimizer": self.actor_optimizer, "critic_optimizer": self.critic_optimizer}

    def state_dict(self):
        return {**{name: part.state_dict() for name, part in self._parts().items()},
                "log_alpha": self.log_alpha.detach().clone(), "rng": self.rng.get_state(),
                "center": self.center, "spread": self.spread}

    def load_state_dict(self, state):
        # trap: an optimiser takes over the step counter it is given: without the copy, two agents
        # would share it
        state = copy.deepcopy(state)
        for name, part in self._parts().items():
            part.load_state_dict(state[name])
        self.log_alpha.data.copy_(state["log_alpha"])
        self.rng.set_state(state["rng"])
        self.center, self.spread = state["center"], state["spread"]
        self._record_anew()


def demo(steps=6000):
    """Learn Pendulum-v1 from its own reward: about -1,200 for a random policy, -150 at best."""
    import gymnasium
    from tqdm import tqdm

    torch.set_num_threads(1)  # layers this small gain little from a second thread
    env = gymnasium.wrappers.RescaleAction(gymnasium.make("Pendulum-v1"), -1.0, 1.0)
    agent = SAC(3, env.action_space, lr=1e-3)
    buffer = ReplayBuffer(steps, (3,), (1,))
    env.action_space.seed(0)
    obs, returns, total = env.reset(seed=0)[0], [], 0.0
    bar = tqdm(range(steps), unit="step")
    for step in bar:
        action = env.action_space.sample() if step < 500 else agent.act(obs)
        next_obs, reward, terminated, truncated, _ = env.step(action)
        buffer.add(obs, action, next_obs, terminated, None, reward)
        buffer.price([reward])
        obs, total = next_obs, total + reward
        if step >= 500:
            agent.update(buffer.sample(256))
        if truncated:
            returns.append(total)
            obs, total = env.reset()[0], 0.0
            bar.set_postfix_str(f"return {returns[-1]:.0f}")
    for episode, value in enumerate(returns, 1):
        print(f"episode {episode:3d}  return {value:8.1f}  "
              f"{'#' * int(40 * max(0, 1 + value / 1600))}")
    final = float(np.mean(returns[-5:]))
    print(f"mean return of the last 5 episodes: {final:.0f} (expected: above -200)")
    return final


if __name__ == "__main__":
    demo()
