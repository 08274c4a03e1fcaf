r"""An environment of your own: copy this file, and change it.

    python train.py --env tasks.example:Dot-v0 --goal "the white dot is in the green ring" \
        --labels oracle --total-steps 12000 --set random_flip=1

What this is: what train.py asks of an environment, twice. Dot is one from scratch. EmptyGrid
takes one that is there, MiniGrid's, and adds what labels can be judged by. Only `render()` has to
be there: an image, from which a VLM can tell how far the goal is. The rest is optional:
info["success"] (or "is_success") is counted, and info["progress"], any number that grows towards
the goal, says how many labels are right, and is what `--labels oracle` takes them from. Neither
is ever shown to the policy, to the reward model or to the VLM.
Which STEPs: none.

Shapes: observation (4,) float32, action (2,) in [-1, 1], image (100, 100, 3) uint8.
Ids: Dot-v0, EmptyGrid-v0, registered when this is imported. Needs numpy and gymnasium; EmptyGrid
also minigrid.

To use it elsewhere:
    import gymnasium
    env = gymnasium.make("tasks.example:Dot-v0", render_mode="rgb_array")
    obs, info = env.reset(seed=0)
    print(obs, info["progress"], env.render().shape)
"""
import gymnasium
import numpy as np
from gymnasium.spaces import Box

SPEED, NEAR = 0.1, 0.1  # the longest way in a step, and how near counts; the square has side 2


class Dot(gymnasium.Env):
    """A dot in the square [-1, 1] x [-1, 1], and a ring to which it should go. Both start anywhere.

    Observation: the place of the dot, and the way from it to the ring, each (x, y).
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}
    observation_space = Box(-2.0, 2.0, (4,), np.float32)
    action_space = Box(-1.0, 1.0, (2,), np.float32)

    def __init__(self, render_mode=None):
        self.render_mode = render_mode

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.dot, self.ring = self.np_random.uniform(-0.9, 0.9, (2, 2))
        return self.observe(), self.info()

    def step(self, action):
        self.dot = np.clip(self.dot + SPEED * np.asarray(action), -1, 1)
        return self.observe(), -self.distance(), False, False, self.info()

    def distance(self):
        return float(np.linalg.norm(self.dot - self.ring))

    def observe(self):
        return np.concatenate([self.dot, self.ring - self.dot]).astype(np.float32)

    def info(self):
        return {"success": self.distance() < NEAR, "progress": -self.distance()}

    def render(self):
        """A white dot and a green ring on black: (100, 100, 3) uint8."""
        image = np.zeros((100, 100, 3), np.uint8)
        y, x = np.mgrid[1:-1:100j, -1:1:100j]  # rows go down, y goes up
        from_ring = np.hypot(x - self.ring[0], y - self.ring[1])
        image[(from_ring < 0.2) & (from_ring > 0.13)] = (0, 200, 0)
        image[np.hypot(x - self.dot[0], y - self.dot[1]) < 0.1] = 255
        return image


class EmptyGrid(gymnasium.Wrapper):
    """MiniGrid's empty room, whose own reward is 0 until the goal: no images can be judged by it.

    Observation: column, row and direction of the agent, one-hot: (6 + 6 + 4,). MiniGrid's own, what
    the agent has before it, is the same in many places.
    """

    observation_space = Box(0.0, 1.0, (16,), np.float32)

    def __init__(self, render_mode=None):
        import minigrid  # noqa: F401  (registers its ids)

        super().__init__(gymnasium.make("MiniGrid-Empty-8x8-v0", render_mode=render_mode))

    def reset(self, **options):
        _, info = self.env.reset(**options)
        return self.observe(), info | self.told()

    def step(self, action):
        _, reward, terminated, truncated, info = self.env.step(action)
        return self.observe(), reward, terminated, truncated, info | self.told()

    def observe(self):
        (column, row), direction = self.unwrapped.agent_pos, self.unwrapped.agent_dir
        # the walls are at 0 and 7
        places = np.eye(6)[column - 1], np.eye(6)[row - 1], np.eye(4)[direction]
        return np.concatenate(places).astype(np.float32)

    def told(self):
        """info: the agent has to get to the corner that is farthest from where it starts."""
        left = 12 - sum(self.unwrapped.agent_pos)  # squares, without turns
        return {"success": bool(left == 0), "progress": -float(left)}


gymnasium.register("Dot-v0", entry_point=Dot, max_episode_steps=50)
gymnasium.register("EmptyGrid-v0", entry_point=EmptyGrid, max_episode_steps=50)
