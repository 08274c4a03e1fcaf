"""Soft Actor-Critic (SAC), and a replay buffer whose rewards can be written again.

What this is: SAC on state vectors (Haarnoja et al., arXiv 1801.01290 and 1812.05905; for discrete actions
Christodoulou, 1910.07207), and a ring of transitions that keeps the image seen after each action, so that every new
reward model can give all of them a new reward.
Which STEPs: 0 explore without any reward, 1 act and store, 5 relabel, 6 improve the policy. SAC's three losses:

    target   y = r + discount * (1 - terminated) * (min_i Q'_i(s', a') - alpha * log pi(a'|s'))        a' ~ pi(s')
    critics  minimise (Q_i(s, a) - y)^2 for i = 1, 2                                                   a as stored
    actor    minimises alpha * log pi(a|s) - min_i Q_i(s, a)                                           a ~ pi(s)
    alpha    grows while the entropy of pi is below its target, and shrinks while it is above

train.py takes an update step whose derivatives are written out, for speed (support/fast.py); after a change in this
file, it takes this file.

Differs from the paper (RL-VLM-F, arXiv 2402.03681):
  1. A new row has no reward (NaN). Only STEP 0 samples it, until its episode is over and it has been rewarded.
  2. relabel() covers every stored row, also after the ring has wrapped; the official code then misses many of them.
     (train.py gives the ring as many rows as the run has steps, so there it never wraps.)
  3. Novelty is measured against at most 1,024 random stored states: faster.
  4. The target networks follow at every update (theirs: at every second), alpha learns as fast as the critics, and the
     networks have two hidden layers (theirs: three for Meta-World, rope and water): simpler.
  5. Unbounded observations are normalised, (obs - mean) / std over the first steps (normalise_observations).

Shapes: O observation, A action, B batch, N stored rows, H and W pixels. Needs numpy and torch only.
Names: ReplayBuffer (add, set_rewards, relabel, sample), novelty_bonus, novelty_batch, SAC (act, update, reset_critic).

To use it elsewhere:
    import gymnasium, sac
    env = gymnasium.make("Pendulum-v1")
    agent, buffer = sac.SAC(3, env.action_space), sac.ReplayBuffer(1000, (3,), (1,))
    obs, _ = env.reset(seed=0)
    for _ in range(200):  # one episode
        last, action = obs, agent.act(obs)  # (1,) in [-1, 1]: Pendulum's torque is twice that
        obs, reward, terminated, truncated, _ = env.step(2 * action)
        buffer.add(last, action, obs, terminated, None, reward)
        buffer.set_rewards([reward])
        agent.update(buffer.sample(64))
"""
import copy
import mmap
import os

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

LOG_STD_MIN, LOG_STD_MAX = -5.0, 2.0  # range of log(std) of the Gaussian before tanh, as in the official code
RANDOM_SHARE = 0.05  # a discrete action is uniformly random with this probability, whatever the policy says
LOG_2 = float(np.log(2.0))


# ---- STEP 1: act, and store the transition with the image seen after it ----
class ReplayBuffer:
    """B, a ring of transitions. A row's reward is NaN until it is set; the rows without a reward are the newest.

    obs, next_obs (N, O) float32; action (N, A) float32, or (N,) int64 for discrete actions; terminated (N,) bool;
    reward, true_reward (N,) float32; image (N, H, W, 3) uint8, seen *after* the action (None without image_shape).
    folder: where the large arrays are kept, as memory-mapped files. They then need no memory of their own and outlive
    the process, so that a run can be resumed.
    end_counts: how many times relabel() counts the reward of a step with which its episode terminated.
    """

    IN_CHECKPOINT = ("terminated", "reward", "true_reward")  # the small arrays, which change after they were written

    def __init__(self, capacity, obs_shape, action_shape, image_shape=None, folder=None, seed=0, end_counts=1.0):
        self.capacity, self.end_counts = int(capacity), float(end_counts)
        self.rng = np.random.default_rng(seed)
        self.added = 0  # rows ever added; the next one is written to row `added % capacity`
        self.unrewarded = 0  # how many of the newest rows have no reward yet

        def array(name, shape, dtype):
            return stored_array(folder, name, (self.capacity, *shape), dtype)

        self.obs, self.next_obs = array("obs", obs_shape, np.float32), array("next_obs", obs_shape, np.float32)
        self.action = array("action", action_shape, np.float32 if len(action_shape) else np.int64)
        self.image = None if image_shape is None else array("image", image_shape, np.uint8)
        self.terminated = np.zeros(self.capacity, bool)
        self.reward = np.full(self.capacity, np.nan, np.float32)
        self.true_reward = np.full(self.capacity, np.nan, np.float32)

    def __len__(self):
        return min(self.added, self.capacity)

    def add(self, obs, action, next_obs, terminated, image, true_reward):
        """Store one transition: obs, next_obs (O,), action (A,) or int, image (H, W, 3) uint8 or None.

        true_reward is the environment's own. It is kept for `--reward true`; RL-VLM-F never reads it.
        Raises ValueError, and counts no row, where a number is not finite in float32: a single NaN would make every
        weight of the networks NaN, for good.
        """
        row = self.added % self.capacity
        for name, value in (("obs", obs), ("action", action), ("next_obs", next_obs), ("true_reward", true_reward)):
            array = getattr(self, name)
            # trap: without reshape, numpy would spread one number over a whole row
            array[row] = np.reshape(value, array.shape[1:])
            finite = np.isfinite(array[row])
            if not finite.all():
                entry = np.argmin(finite)  # the first entry that is not finite
                raise ValueError(f"transition {self.added}: entry {entry} of {name} is {np.ravel(value)[entry]}; "
                                 "all must be finite in float32")
        # trap: a time limit is no termination. After a termination there is no next state, so its value is 0; after a
        # time limit the world goes on, and the target keeps the value of the next state.
        self.terminated[row] = terminated
        self.reward[row] = np.nan  # not known yet
        if self.image is not None:
            if image.dtype != np.uint8 or image.shape != self.image.shape[1:]:
                raise ValueError(f"an image must be {self.image.shape[1:]} uint8, not {image.shape} {image.dtype}")
            self.image[row] = image
        self.added += 1
        self.unrewarded = min(self.unrewarded + 1, self.capacity)

    def newest(self, count):
        """Row numbers of the newest `count` rows, oldest first, also across the seam of the ring: (count,)."""
        return np.arange(self.added - count, self.added) % self.capacity

    def set_rewards(self, rewards):
        """Give the K rows without a reward their rewards (K,), oldest first.

        This is for rewards that are known for whole episodes (VLM-CaR's programs); RL-VLM-F calls relabel().
        """
        rewards = np.asarray(rewards, np.float32)
        if rewards.shape != (self.unrewarded,) or not np.isfinite(rewards).all():
            raise ValueError(f"{self.unrewarded} rows wait for a finite reward each, not {rewards.shape}: {rewards}")
        self.reward[self.newest(self.unrewarded)] = rewards
        self.unrewarded = 0

    # ---- STEP 5: relabel every stored transition with the new reward ----
    def relabel(self, reward_fn, only_new=False, chunk=1024):
        """Set the reward of stored rows to reward_fn(image): (N, H, W, 3) uint8 -> (N,) float32. Returns how many rows.

        only_new: just the rows that have no reward yet, because their episode has only now ended; otherwise all rows.
        SAC may learn from old transitions, because its targets do not depend on the policy that made them. But it
        must not learn from old rewards: an early reward model is wrong, and its mistakes would stay in the buffer.
        """
        rows = self.newest(self.unrewarded if only_new else len(self))
        # trap: after the ring has wrapped, the stored rows are not [0 : cursor]. So walk over all, oldest first.
        for start in range(0, len(rows), chunk):
            part = rows[start : start + chunk]
            reward = reward_fn(self.image[part])  # (chunk, H, W, 3) -> (chunk,)
            self.reward[part] = np.where(self.terminated[part], self.end_counts * reward, reward)
            if isinstance(self.image, np.memmap):
                # trap: every page that was read from a mapped file counts as our memory, in the end the whole buffer.
                # The pages are on disk already, so the system may forget them.
                self.image._mmap.madvise(mmap.MADV_DONTNEED)
        if not np.isfinite(self.reward[rows]).all():
            raise ValueError("the reward function returned a number that is not finite")
        self.unrewarded = 0
        return len(rows)

    def sample(self, batch, unrewarded_too=False):
        """Draw rows with replacement -> dict of tensors: obs, next_obs (B, O), action (B, A), reward, terminated (B,).

        unrewarded_too: STEP 0 explores before there is any reward, and writes its own into the batch.
        """
        choices = len(self) - (0 if unrewarded_too else self.unrewarded)
        if choices <= 0:
            raise ValueError(f"nothing to sample: {len(self)} rows stored, {self.unrewarded} of them without a reward")
        age = self.rng.integers(0, choices, batch)  # 0 is the oldest row; the rows without a reward are the youngest
        rows = (self.added - len(self) + age) % self.capacity  # (B,)
        return {
            "obs": torch.from_numpy(self.obs[rows]),  # (B, O) float32
            "action": torch.from_numpy(self.action[rows]),  # (B, A) float32, or (B,) int64
            "reward": torch.from_numpy(self.reward[rows]),  # (B,) float32
            "next_obs": torch.from_numpy(self.next_obs[rows]),  # (B, O) float32
            "terminated": torch.from_numpy(self.terminated[rows].astype(np.float32)),  # (B,) 0 or 1
        }

    def state_dict(self):
        """What changes after it was written; the memory-mapped arrays are on disk already."""
        n = len(self)
        return {"added": self.added, "unrewarded": self.unrewarded, "rng": self.rng.bit_generator.state,
                **{name: torch.from_numpy(getattr(self, name)[:n].copy()) for name in self.IN_CHECKPOINT}}

    def load_state_dict(self, state):
        """Back to the moment of state_dict(); needs the same folder, and a ring that had not wrapped."""
        self.added, self.unrewarded = state["added"], state["unrewarded"]
        self.rng.bit_generator.state = state["rng"]
        for name in self.IN_CHECKPOINT:
            getattr(self, name)[: len(self)] = state[name].numpy()


def stored_array(folder, name, shape, dtype):
    """Zeros of that shape: in memory or, given a folder, in a memory-mapped file there.

    A file that exists already is opened as it is: a resumed run finds what the interrupted one stored.
    Raises StoredArrayError where the file is something else.
    """
    if folder is None:
        return np.zeros(shape, dtype)
    path = os.path.join(folder, name + ".npy")
    if not os.path.exists(path):
        os.makedirs(folder, exist_ok=True)
        return np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)
    try:
        # trap: opened for writing, a file that was cut short would be made whole again, with zeros
        array = np.lib.format.open_memmap(path, mode="r")
    except (ValueError, OSError) as error:
        raise StoredArrayError(f"{path} is cut short or damaged ({error})") from None
    if array.shape != shape or array.dtype != dtype:
        raise StoredArrayError(f"{path} holds {array.dtype} {array.shape}, not {shape}: it belongs to another run")
    return np.lib.format.open_memmap(path, mode="r+")


class StoredArrayError(ValueError):
    """A file of stored_array() is there and cannot be used; the message is one line."""


# ---- STEP 0: explore without any reward ----
def novelty_bonus(obs, all_obs, k=5):
    """How far each state is from the states already stored: a reward for going to new places.

        bonus(s) = || s - (k-th nearest stored state) ||

    Why a distance is an entropy: where the k nearest of N states lie within a distance d, the density of states is
    about k / (N * volume(d)), so -log(density) grows with log d. Its mean over the states is the entropy of what was
    visited (a k-nearest-neighbour particle estimate), and a policy that seeks far neighbours raises it (PEBBLE, arXiv
    2106.05091). Like PEBBLE and the official code, we take the distance itself and not its logarithm, and k = 5: the
    nearest one alone would make a state look familiar as soon as it has been visited once.
    obs: (B, O), all_obs: (N, O) -> (B,). A stored state counts as its own nearest neighbour.
    Example: obs 0, stored states 1, 2, 5 and k = 2 -> 2.
    """
    distance = torch.cdist(obs, all_obs)  # (B, N)
    return distance.topk(min(k, all_obs.shape[0]), dim=-1, largest=False).values[:, -1]  # (B,)


def novelty_batch(buffer, batch, against=1024):
    """What SAC.update() needs in STEP 0: a batch whose reward is the novelty of next_obs, scaled to mean 1."""
    drawn = buffer.sample(batch, unrewarded_too=True)
    # trap: drawn with replacement, the nearest few states of a small buffer would be copies of one state
    rows = buffer.rng.choice(len(buffer), min(len(buffer), against), replace=False)
    stored = torch.from_numpy(buffer.next_obs[rows])  # (N, O)
    # trap: states have units (metres, radians). Without this division the largest number alone would say what is novel.
    # trap: the standard deviation of a single state, with the correction N - 1, is 0 / 0
    scale = stored.std(0, correction=min(1, len(stored) - 1)).clamp(min=1e-3)  # (O,)
    bonus = novelty_bonus(drawn["next_obs"] / scale, stored / scale)  # (B,)
    return {**drawn, "reward": bonus / bonus.mean().clamp(min=1e-6)}


# ---- STEP 6: improve the policy with SAC on the learned reward ----
def tanh_gaussian(mean, log_std, noise):
    """Squash a draw from a Gaussian into [-1, 1], and return its log-density.

        u = mean + std * noise,   a = tanh(u),   log pi(a) = sum over A of  log N(u; mean, std) - log(1 - a^2)

    Where the last term comes from: a density that goes through a function is divided by the slope of the function,
    pi(a) = N(u) / |da/du|, and the slope of tanh is da/du = 1 - tanh(u)^2 = 1 - a^2.
    mean, log_std, noise: (B, A) -> action (B, A), log_prob (B,).
    Example: mean 0, log_std 0, noise 0 -> action 0, log_prob log(1 / sqrt(2 pi)) = -0.919 for each action number.
    """
    u = mean + log_std.exp() * noise
    log_normal = -0.5 * noise.pow(2) - log_std - 0.5 * float(np.log(2 * np.pi))
    # trap: log(1 - tanh(u)^2) is -inf in float32 from |u| = 9 on. This is the same number, and stays finite:
    # 1 - tanh(u)^2 = 4 / (e^u + e^-u)^2, and softplus(-2u) = log(1 + e^-2u).
    log_slope = 2 * (LOG_2 - u - F.softplus(-2 * u))
    return torch.tanh(u), (log_normal - log_slope).sum(-1)


class MLP(nn.Sequential):
    """Linear layers with ReLU between them: sizes (in, hidden..., out); (B, in) -> (B, out).

    layer_norm: what a hidden layer gives, (B, width), is first brought to mean 0 and deviation 1 over the width.
    """

    def __init__(self, sizes, layer_norm=False):
        layers = []
        for a, b in zip(sizes[:-1], sizes[1:]):
            norm = [nn.LayerNorm(b, elementwise_affine=False)] if layer_norm else []
            # ReLU may overwrite its input: no backward pass of the layer before it uses that layer's own output.
            layers += [nn.Linear(a, b), *norm, nn.ReLU(inplace=True)]
        super().__init__(*layers[: -1 - layer_norm])  # neither of the two after the last layer


class TwinCritic(nn.Module):
    """Two independent Q-networks. Box: Q(s, a) -> (2, B). Discrete: the value of every action -> (2, B, actions).

    Two, because a maximum over one noisy estimate is too high on average; SAC uses the smaller of both.
    layer_norm: a Q-network with it cannot grow without bound where there are no data, so errors there are not passed
    on from target to target (arXiv 2302.02948). It helped in SweepInto, and not in DrawerOpen (tasks/schedules.py).
    """

    def __init__(self, obs_dim, action_dim, actions, hidden, network=MLP, layer_norm=False):
        super().__init__()
        sizes = (obs_dim + action_dim, *hidden, actions or 1)
        self.q1, self.q2 = network(sizes, layer_norm), network(sizes, layer_norm)

    def forward(self, obs, action=None):
        x = obs if action is None else torch.cat([obs, action], dim=-1)
        q = torch.stack([self.q1(x), self.q2(x)])
        return q if action is None else q.squeeze(-1)


class SAC:
    """Soft Actor-Critic for a Box space (actions in [-1, 1]; scale them outside) or a Discrete one.

    act(obs (O,)) -> (A,) float32 in [-1, 1], or int.
    update(batch) -> dict of 0-d tensors (not floats: reading a float would make a GPU wait).
    slow: share of the newest actor in the slow one after an update, which is the mean of about the last 1 / slow.
    alpha: the first entropy temperature. 0.1 suits rewards of standard deviation 1, as RewardModel.predict() gives.
    layer_norm: of the critics.
    Raises ValueError for any other action space.
    """

    network = MLP  # a subclass may use another one

    def __init__(self, obs_dim, action_space, hidden=(256, 256), lr=3e-4, discount=0.99, tau=0.005, device="cpu",
                 seed=0, alpha=0.1, slow=0.002, layer_norm=False):
        self.discrete = hasattr(action_space, "n")
        if type(action_space).__name__ not in ("Box", "Discrete"):  # by name: this file does not need gymnasium
            raise ValueError(f"SAC needs a Box or Discrete action space, not {action_space}")
        self.actions = int(action_space.n) if self.discrete else 0
        self.action_dim = 0 if self.discrete else int(np.prod(action_space.shape))
        self.discount, self.tau, self.slow, self.lr, self.device = discount, tau, slow, lr, torch.device(device)
        self.rng = torch.Generator(device=self.device).manual_seed(seed)
        self.sizes, self.layer_norm = (obs_dim, self.action_dim, self.actions, tuple(hidden)), layer_norm
        self.obs_mean = torch.zeros(obs_dim, device=self.device)
        self.obs_std = torch.ones(obs_dim, device=self.device)
        # Layers draw their first weights from torch's global generator; fork_rng leaves it as it was.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            outputs = self.actions or 2 * self.action_dim  # a logit per action; or mean and log_std per action number
            self.actor = self.network((obs_dim, *hidden, outputs)).to(self.device)
        self.slow_actor = copy.deepcopy(self.actor).requires_grad_(False)
        self.reset_critic()
        self.log_alpha = torch.full((), float(np.log(alpha)), device=self.device, requires_grad=True)
        # Box: -1 nat per action number (1812.05905); the uniform distribution on [-1, 1] has +0.69.
        # Discrete: a fifth of the most there can be, log(actions). If entropy paid much more than that, an agent would
        # rather wander on than end the episode at the goal.
        self.target_entropy = 0.2 * float(np.log(self.actions)) if self.discrete else -float(self.action_dim)
        # One optimiser for actor and temperature: neither has a weight in the loss of the other.
        self.actor_optimizer = self._adam([*self.actor.parameters(), self.log_alpha])

    def _adam(self, parameters):
        return torch.optim.Adam(parameters, lr=self.lr, fused=True)  # fused: one pass over memory for all weights

    def set_learning_rate(self, share):
        """From now on actor, critics and temperature learn with `share` of the learning rate lr."""
        for optimizer in (self.actor_optimizer, self.critic_optimizer):
            optimizer.param_groups[0]["lr"] = share * self.lr

    def reset_critic(self):
        """Forget the values, keep the actor. train.py calls it once, after the first fit.

        The paper's box does not have this; the official code does it, like PEBBLE. In STEP 0 the critics' targets were
        novelty (if there was a novelty phase at all: some tasks go from random actions straight to the first fit), and
        values of novelty say nothing about the goal. The actor stays, because it has learned to move about. Later fits
        change the reward too, but one reward is closer to the next than novelty is, so the critics are kept then.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(torch.randint(2**31, (1,), generator=self.rng, device=self.device)))
            self.critic = TwinCritic(*self.sizes, self.network, self.layer_norm).to(self.device)
        self.target = copy.deepcopy(self.critic).requires_grad_(False)
        self.critic_optimizer = self._adam(self.critic.parameters())

    def normalise_observations(self, obs, floor=0.01):
        """From now on the networks see (observation - mean) / std, both over obs (N, O).

        Positions are in metres, so pushing a cube changes them by about 0.01. A network hardly notices that; dividing
        by the standard deviation makes it visible.
        floor: the least std. What has not moved yet must not be blown up without bound when it does.
        """
        obs = torch.as_tensor(np.asarray(obs, np.float32), device=self.device)
        self.obs_mean, self.obs_std = obs.mean(0), obs.std(0).clamp(min=floor)

    def _gaussian(self, output):
        """What an actor gives -> the Gaussian before tanh, and a draw of unit noise: mean, log_std, noise (B, A)."""
        mean, log_std = output.chunk(2, dim=-1)
        # tanh and not clamp: outside its bounds a clamped log_std has no gradient, so it would never come back.
        log_std = LOG_STD_MIN + 0.5 * (LOG_STD_MAX - LOG_STD_MIN) * (torch.tanh(log_std) + 1)
        return mean, log_std, torch.randn(mean.shape, generator=self.rng, device=self.device)

    def _policy(self, obs):
        """Box -> a drawn action (B, A) and its log_prob (B,). Discrete -> probabilities and their logs, (B, n) each."""
        if not self.discrete:
            return tanh_gaussian(*self._gaussian(self.actor(obs)))
        log_probs = F.log_softmax(self.actor(obs), dim=-1)
        return log_probs.exp(), log_probs

    @torch.no_grad()
    def act(self, obs, explore=True, actor=None):
        """obs (O,) -> the action to take, (A,) in [-1, 1] or int: drawn from the policy, or its best guess.

        actor: the network whose policy it is; the newest one, if none is given.
        """
        obs = torch.as_tensor(np.asarray(obs, np.float32), device=self.device)
        output = (actor or self.actor)((obs - self.obs_mean) / self.obs_std)  # logits, or means and log_stds
        if not self.discrete:
            if not explore:
                return torch.tanh(output[: self.action_dim]).cpu().numpy()
            mean, log_std, noise = self._gaussian(output)
            return torch.tanh(mean + log_std.exp() * noise).cpu().numpy()
        if explore:
            # The entropy target holds on average over states. In one of them the policy can be certain too early, and
            # would never try another action there. So every action keeps a small probability.
            chances = (1 - RANDOM_SHARE) * F.softmax(output, dim=-1) + RANDOM_SHARE / self.actions
            return int(torch.multinomial(chances, 1, generator=self.rng))
        return int(output.argmax())

    def best_action(self, obs):
        """The action for evaluation: the best guess of the slow actor; where actions are Discrete, one that it draws.

        The slow actor is a moving average of the actor's weights, over about the last 1 / slow updates. Each update
        moves the actor by what one batch and an imperfect critic say, so the newest actor may miss a handle that the
        one before it took. Their mean keeps what they have in common (Polyak and Juditsky 1992; arXiv 1803.05407).
        Greedy discrete policies can loop (left, right, left, ...) in states where two actions are almost equally
        likely. So we sample during evaluation too.
        """
        return self.act(obs, explore=self.discrete, actor=self.slow_actor)

    def _value(self, critic, obs, policy):
        """V(s) = E[min_i Q_i(s, a) - alpha * log pi(a|s)], a ~ pi(s) -> V (B,), entropy of the policy (B,)."""
        action_or_probs, log_probs = policy
        alpha = self.log_alpha.exp().detach()
        if self.discrete:  # every action's value is at hand, so the expectation is exact
            q = critic(obs).amin(0)  # (B, n)
            entropy = -(action_or_probs * log_probs).sum(-1)
            return (action_or_probs * q).sum(-1) + alpha * entropy, entropy
        # Box: one draw stands for the expectation
        return critic(obs, action_or_probs).amin(0) - alpha * log_probs, -log_probs

    def update(self, batch):
        """One gradient step for critics, actor and temperature, from a batch of ReplayBuffer.sample().

        -> critic_loss, actor_loss, q_mean, alpha, entropy: 0-d tensors.
        """
        reward, terminated = batch["reward"], batch["terminated"]
        # trap: (B, 1) minus (B,) would silently become (B, B)
        if reward.ndim != 1 or terminated.shape != reward.shape:
            raise ValueError(f"reward, terminated must be (B,), not {tuple(reward.shape)}, {tuple(terminated.shape)}")
        return self._step(batch["obs"], batch["action"], reward, batch["next_obs"], terminated)

    def _step(self, *tensors):
        obs, action, reward, next_obs, terminated = (x.to(self.device) for x in tensors)
        obs, next_obs = (obs - self.obs_mean) / self.obs_std, (next_obs - self.obs_mean) / self.obs_std

        # Critics: y = r + discount * (1 - terminated) * V'(s'), where V' uses the slowly moving target networks.
        with torch.no_grad():
            next_value, _ = self._value(self.target, next_obs, self._policy(next_obs))  # (B,)
            y = reward + self.discount * (1 - terminated) * next_value  # (B,)
        if self.discrete:  # q: (2, B), the values of the actions taken
            q = self.critic(obs).gather(-1, action.expand(2, -1).unsqueeze(-1)).squeeze(-1)
        else:
            q = self.critic(obs, action)  # (2, B)
        critic_loss = F.mse_loss(q, y.expand_as(q)) * 2  # both critics, each its own mean
        self.critic_optimizer.zero_grad(set_to_none=True)
        critic_loss.backward()
        self.critic_optimizer.step()

        # Actor: climb V(s). Its gradient goes through the drawn action into the critics, which stay as they are.
        value, entropy = self._value(self.critic, obs, self._policy(obs))
        actor_loss, entropy = -value.mean(), entropy.detach().mean()
        # Temperature: the gradient of this loss is (entropy - target). Entropy below its target makes it negative, a
        # descent step then raises log alpha, and certainty costs more.
        alpha_loss = self.log_alpha * (entropy - self.target_entropy)
        self.actor_optimizer.zero_grad(set_to_none=True)
        # trap: without `inputs` the critics would collect gradients too, at a cost
        (actor_loss + alpha_loss).backward(inputs=self.actor_optimizer.param_groups[0]["params"])
        self.actor_optimizer.step()

        # Targets follow slowly (Polyak): target <- (1 - tau) * target + tau * critic, for all weights in one call. So
        # does the slow actor, which is the one that is evaluated; nothing here learns from it.
        with torch.no_grad():
            torch._foreach_lerp_(list(self.target.parameters()), list(self.critic.parameters()), self.tau)
            torch._foreach_lerp_(list(self.slow_actor.parameters()), list(self.actor.parameters()), self.slow)
        return {"critic_loss": critic_loss.detach(), "actor_loss": actor_loss.detach(), "q_mean": q.detach().mean(),
                "alpha": self.log_alpha.detach().exp(), "entropy": entropy}

    def _parts(self):
        return {"actor": self.actor, "slow_actor": self.slow_actor, "critic": self.critic, "target": self.target,
                "actor_optimizer": self.actor_optimizer, "critic_optimizer": self.critic_optimizer}

    def state_dict(self):
        return {**{name: part.state_dict() for name, part in self._parts().items()},
                "log_alpha": self.log_alpha.detach().clone(), "rng": self.rng.get_state(),
                "obs_mean": self.obs_mean, "obs_std": self.obs_std}

    def load_state_dict(self, state):
        # trap: an optimiser takes over the step counter it is given: without the copy, two agents would share it
        state = copy.deepcopy(state)
        for name, part in self._parts().items():
            part.load_state_dict(state[name])
        self.log_alpha.data.copy_(state["log_alpha"])
        self.rng.set_state(state["rng"])
        self.obs_mean, self.obs_std = state["obs_mean"], state["obs_std"]


# ---- demo: python sac.py ----
def demo(steps=6000):
    """Learn Pendulum-v1 from its own reward: about -1,200 for a random policy, -150 at best. -> the final return"""
    import gymnasium
    from tqdm import tqdm

    torch.set_num_threads(1)  # layers this small gain little from a second thread
    env = gymnasium.wrappers.RescaleAction(gymnasium.make("Pendulum-v1"), -1.0, 1.0)
    agent, buffer = SAC(3, env.action_space, lr=1e-3), ReplayBuffer(steps, (3,), (1,))
    env.action_space.seed(0)
    obs, returns, total = env.reset(seed=0)[0], [], 0.0
    bar = tqdm(range(steps), unit="step")
    for step in bar:
        action = env.action_space.sample() if step < 500 else agent.act(obs)
        next_obs, reward, terminated, truncated, _ = env.step(action)
        buffer.add(obs, action, next_obs, terminated, None, reward)
        buffer.set_rewards([reward])
        obs, total = next_obs, total + reward
        if step >= 500:
            agent.update(buffer.sample(256))
        if truncated:
            returns.append(total)
            obs, total = env.reset()[0], 0.0
            bar.set_postfix_str(f"return {returns[-1]:.0f}")
    for episode, value in enumerate(returns, 1):
        print(f"episode {episode:3d}  return {value:8.1f}  {'#' * int(40 * max(0, 1 + value / 1600))}")
    final = float(np.mean(returns[-5:]))
    print(f"mean return of the last 5 episodes: {final:.0f} (expected: above -200)")
    return final


if __name__ == "__main__":
    demo()
