"""A sparse success as the reward, and the learned reward as a hint on the way: `--reward preference+sparse`.

What this is: a replay buffer that takes what r_psi says of an image for a potential Phi, and success, which the
environment tells, for the reward (Ng, Harada and Russell 1999):

    r = success + discount Phi(s') - Phi(s)
    Phi(s') = 0 after a termination, Phi(s) = 0 at the start of an episode

Summed over an episode, discounted, all potentials cancel but the last: whatever Phi says, the best policy is that of
success alone. So a VLM that is partly wrong can lead the policy astray on its way, but not about where to go; and r_psi
says nothing anew of what success has settled. VLM-PBRS (arXiv 2606.27180) does so with RL-VLM-F's reward.
Which STEPs: 5, relabel every stored transition with the new reward.
Differs from the paper: it has no such reward; the environment must tell of success.

Shapes: those of sac.py.  Names: PotentialBuffer, SuccessReward.

To use it elsewhere (beside sac.py):
    import numpy as np
    from support.shaped import PotentialBuffer
    B, image = PotentialBuffer(10, (1,), (1,), (47, 47, 3), discount=0.5), np.zeros((47, 47, 3), np.uint8)
    for step in range(3):
        B.add([step], [0.0], [step + 1], False, image + step, float(step == 2))
    B.relabel(lambda images: images.mean((1, 2, 3)))  # Phi 0, 1, 2
    print(B.reward[:3])  # 0 + 0.5 * 0 - 0,   0 + 0.5 * 1 - 0,   1 + 0.5 * 2 - 1
"""
import numpy as np

from sac import ReplayBuffer


class PotentialBuffer(ReplayBuffer):
    """A ReplayBuffer whose relabel() takes the reward function for a potential; the true reward must be success."""

    def __init__(self, *args, discount=0.99, **settings):
        super().__init__(*args, **settings)
        self.discount, self.potential = discount, np.zeros(self.capacity, np.float32)  # Phi(s') of each row

    def relabel(self, reward_fn, only_new=False, chunk=1024):
        rows = self.newest(self.unrewarded if only_new else len(self))
        count = super().relabel(reward_fn, only_new, chunk)
        self.potential[rows] = np.where(self.terminated[rows], 0, self.reward[rows])
        # Phi(s) is that of the row before, if its next state is this row's state; if not, an episode starts here.
        before = (rows - 1) % self.capacity
        follows = (self.obs[rows] == self.next_obs[before]).all(1)
        if len(rows) == self.capacity:  # after the ring has wrapped, the row before the oldest is gone
            follows[0] = False
        last = np.where(follows, self.potential[before], 0)
        self.reward[rows] = self.true_reward[rows] + self.discount * self.potential[rows] - last
        return count


class SuccessReward:
    """An environment as envs.make() gives it, with success, 0 or 1, in place of its reward."""

    def __init__(self, env):
        self.env = env

    def __getattr__(self, name):
        return getattr(self.env, name)

    def step(self, action):
        obs, _, terminated, truncated, info = self.env.step(action)
        return obs, float(info["success"]), terminated, truncated, info
