"""The tasks: what the policy acts in, what the VLM looks at, and the sentence that says the goal.

What this is: the table TASKS, one entry per task; CartPole with a continuous force, drawn by numpy alone; TaskEnv, one
interface for any Gymnasium environment, which checks all that the environment says; make(), which makes a task by its
name; rollout(), which plays one episode.
Which STEPs: 0, 1 and 7 act and look here. CartPole's equations, where ' is the change per second:

    temp = (F + m l a'^2 sin a) / M                              F force on the cart, N      a angle of the pole, rad
    a''  = (g sin a - temp cos a) / (l (4/3 - m cos^2 a / M))    x position of the cart, m   l half the pole's length, m
    x''  = temp - m l a'' cos a / M                              m mass of the pole, kg      M mass of pole and cart, kg

Differs from the paper (RL-VLM-F, arXiv 2402.03681):
  1. Episodes of Meta-World's tasks last 50 steps, and each step repeats one action for three steps of the simulator
     (theirs: 500 steps, no repeat). The scripted experts need only 14 to 18 of the 50; repeating is as in 2203.04955.
  2. The reward model sees images of 64 to 100 px, the VLM of 200 to 308 px (theirs: 200 to 360, and 200 to 720).
  3. Other simulators: the headers of the files in tasks/ say which, and what differs.

Shapes: O observation, A action numbers, T steps of an episode; images (size, size, 3) uint8.
Names: TASKS, make(name) -> TaskEnv, rollout(env, policy, seed), expert(env) -> policy; a policy is obs (O,) -> action.

To use it elsewhere:
    import envs
    env = envs.make("CartPole", seed=0)  # or make("Reacher-v5", goal="to touch the red ball")
    obs, info = env.reset(seed=0)
    obs, true_reward, terminated, truncated, info = env.step(envs.expert(env)(obs))
    image, progress = env.image(64), info["progress"]
"""
import atexit
import contextlib
import copy
import importlib
import inspect
import math
import os
import re
import sys
import weakref
from dataclasses import dataclass
from typing import Callable

import gymnasium
import numpy as np
from gymnasium.spaces import Box, Discrete


# ---- What a task is, and the table of tasks ----
@dataclass
class Task:
    """One entry of TASKS. How long a task is trained, and with how many questions: tasks/schedules.py.

    goal               the sentence l that the VLM is told; RL-VLM-F's seven tasks have the paper's words.
    make               a Gymnasium id, "module:id" where importing a module registers it; or a function -> environment.
    horizon            steps until an episode is cut off (truncated).
    vlm_image_size     side of the square image that the VLM sees, px.
    reward_image_size  side of the square image that the reward model sees, px.
    action_repeat      steps of the simulator in one of ours, all with the same action.
    """

    goal: str
    make: str | Callable
    horizon: int
    vlm_image_size: int
    reward_image_size: int
    action_repeat: int = 1


# Why two sizes: a VLM is asked about some hundreds or thousands of images, so they may be large. The reward model
# sees the image of every step, so its images are smaller. (CartPole and DrawerOpen were learned at 64 px as well as at
# 200: results/README.md, "What matters?".) In the grids both sizes are whole numbers of pixels per cell.
#
# Why repeat actions: a step of Meta-World's simulator lasts 12.5 ms and changes hardly a pixel. Two such images cannot
# be told apart, and random actions cancel out before anything moves. With action_repeat=3 one action lasts three steps
# of the simulator, and an episode of 150 such steps is 50 decisions.
ARM = dict(horizon=50, vlm_image_size=300, reward_image_size=84, action_repeat=3)  # Meta-World's robot arm
UNLOCK = "to pick up the key, open the yellow door with it, and "
EXIT = UNLOCK + "get to the green square"
TASKS = {
    # The lambda puts off the search for the class, which stands further down.
    "CartPole": Task("to balance the brown pole on the black cart to be upright", lambda: CartPole(),
                     horizon=100, vlm_image_size=200, reward_image_size=64),
    "DrawerOpen": Task("to open the drawer", "tasks.metaworld:DrawerOpen-v0", **ARM),
    "Soccer": Task("to move the soccer ball into the goal", "tasks.metaworld:Soccer-v0", **ARM),
    "SweepInto": Task("to minimize the distance between the green cube and the hole",
                      "tasks.metaworld:SweepInto-v0", **ARM),
    # Soft bodies. FoldCloth's only step is a whole pick-and-place, after which the episode terminates.
    "FoldCloth": Task("to fold the cloth diagonally from top left corner to bottom right corner",
                      "tasks.deformables:FoldCloth-v0", horizon=1, vlm_image_size=300, reward_image_size=100),
    "StraightenRope": Task("to straighten the blue rope", "tasks.deformables:StraightenRope-v0",
                           horizon=40, vlm_image_size=300, reward_image_size=100),
    "PassWater": Task("to move the container, which holds water, to be as close to the red circle as possible without "
                      "causing too many water droplets to spill",
                      "tasks.deformables:PassWater-v0", horizon=75, vlm_image_size=300, reward_image_size=100),
    # Key-and-door grids, for VLM-CaR. MiniGrid's own episodes are longer: see tasks/schedules.py.
    "DoorKey-5x5": Task(EXIT, "tasks.gridworlds:DoorKey-5x5-v0", horizon=100, vlm_image_size=300, reward_image_size=80),
    "DoorKey-6x6": Task(EXIT, "tasks.gridworlds:DoorKey-6x6-v0", horizon=100, vlm_image_size=300, reward_image_size=84),
    "DoorKey-8x8": Task(EXIT, "tasks.gridworlds:DoorKey-8x8-v0", horizon=100, vlm_image_size=304, reward_image_size=80),
    "Unlock": Task("to pick up the key and open the yellow door with it",
                   "tasks.gridworlds:Unlock-v0", horizon=100, vlm_image_size=308, reward_image_size=88),
    "UnlockPickup": Task(UNLOCK + "pick up the purple box behind it",
                         "tasks.gridworlds:UnlockPickup-v0", horizon=100, vlm_image_size=308, reward_image_size=88),
}


def entry(name):
    """The entry of a name in TASKS; for MetaWorld/door-open-v3 and its like, one without a goal; for others None."""
    return TASKS.get(name) or (Task("", f"tasks.metaworld:{name}", **ARM) if name.startswith("MetaWorld/") else None)


# ---- CartPole: physics ----
class CartPole(gymnasium.Env):
    """Keep a pole upright by pushing its cart with -10 to 10 N; action (1,) in [-1, 1].

    Observation (4,): cart position m, its speed m/s; pole angle rad (0 upright, + leans right), its speed rad/s.
    True reward, and progress: minus the angle from upright, in degrees. Success: less than 5 degrees.
    """

    GRAVITY, CART_MASS, POLE_MASS, HALF_POLE = 9.8, 1.0, 0.1, 0.5  # m/s^2, kg, kg, m
    FORCE, SECONDS = 10.0, 0.02  # N at full action; length of a step
    # The largest |state|, as in the official code. Cart and pole stop here and the episode goes on: nothing terminates.
    # An episode that ended when the pole falls would tell the policy about the goal by its length alone. And a learned
    # reward has no natural zero: where it happens to be negative everywhere, a policy that may end an episode learns to
    # end it quickly.
    LIMIT = np.array([0.8 * 2.4, np.inf, math.radians(30), np.inf])
    render_mode = "rgb_array"
    metadata = {"render_modes": ["rgb_array"], "render_fps": 50}

    def __init__(self):
        high = self.LIMIT.astype(np.float32)
        high[[0, 2]] *= 1.001  # rounded to float32, a state at the limit may lie a little beyond it
        self.observation_space = Box(-high, high, dtype=np.float32)
        self.action_space = Box(-1.0, 1.0, (1,), np.float32)
        self.state = np.zeros(4)  # (4,) float64; observations are float32 copies

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        # The pole starts nearly upright, within 0.05 rad = 2.9 degrees. What has to be learned is to hold it there.
        self.state = self.np_random.uniform(-0.05, 0.05, 4)
        return self.state.astype(np.float32), self._info()

    def step(self, action):
        """action (1,) -> obs (4,), true reward, terminated, truncated (both always False), info."""
        push = float(np.asarray(action).reshape(-1)[0])
        if not math.isfinite(push):  # trap: min and max below would make a full push of a nan
            raise ValueError(f"an action must be a number, not {push}")
        force = self.FORCE * min(max(push, -1.0), 1.0)
        # Euler's method: for the 20 ms of a step, everything changes as fast as it does at the start of the step.
        moved = self.state + self.SECONDS * self.derivative(self.state, force)
        self.state = np.clip(moved, -self.LIMIT, self.LIMIT)
        # trap: what is stopped must lose its speed too. Otherwise the speed goes on growing while the pole lies at its
        # limit, and the pole needs as long again before it turns round.
        place, speed = self.state[[0, 2]], self.state[[1, 3]]  # (2,) each: of the cart, of the pole
        outwards = (np.abs(place) >= self.LIMIT[[0, 2]]) & (place * speed > 0)
        self.state[[1, 3]] = np.where(outwards, 0.0, speed)
        info = self._info()
        return self.state.astype(np.float32), info["progress"], False, False, info

    @classmethod
    def derivative(cls, state, force):
        """state (4,), force N -> d state / dt (4,), by the header's equations.

        Gymnasium's CartPole has the same: https://coneural.org/florian/papers/05_cart_pole.pdf. The 4/3 is that of the
        inertia of a rod which turns about its end, 4/3 m l^2.
        Worked example: from upright and at rest, 10 N to the right give temp = 10 / 1.1 = 9.09. The pole falls to the
        left with a'' = -9.09 / (0.5 (4/3 - 0.1 / 1.1)) = -14.6 rad/s^2, and the cart speeds up by 9.8 m/s^2.
        """
        _, speed, angle, spin = state
        total, pole = cls.CART_MASS + cls.POLE_MASS, cls.POLE_MASS * cls.HALF_POLE
        sin, cos = math.sin(angle), math.cos(angle)
        temp = (force + pole * spin**2 * sin) / total
        spin_rate = (cls.GRAVITY * sin - cos * temp) / (cls.HALF_POLE * (4.0 / 3.0 - cls.POLE_MASS * cos**2 / total))
        return np.array([speed, temp - pole * spin_rate * cos / total, spin, spin_rate])

    def _info(self):
        # Progress is of the angle alone. A cart in the middle may be worth something too, but no image shows where the
        # cart is, so no answer about images could say so.
        degrees = abs(math.degrees(self.state[2]))
        return {"success": float(degrees < 5.0), "progress": -degrees}

    def expert_action(self, obs):
        """obs (4,) -> action (1,): push to where the pole leans and falls, and so bring the cart under it."""
        # Of position, speed, angle and speed of the angle. The two small gains let the pole lean a little towards the
        # middle, and the cart follows it there.
        gains = np.array([0.1, 0.25, 4.0, 1.0])
        return np.clip([gains @ obs], -1, 1).astype(np.float32)

    def image(self, size):
        """-> (size, size, 3) uint8. The cart is always drawn in the middle: its position is not seen."""
        return draw_pole(size, self.state[2])

    def render(self):
        return self.image(300)


# ---- CartPole: images ----
# Lengths are in sides of the image; x goes to the right from the middle, y goes up from the lower edge.
PIVOT_Y, POLE_LENGTH, POLE_HALF_WIDTH = 0.29, 0.60, 0.028
CART_LOW, CART_HIGH, CART_HALF_WIDTH = 0.16, 0.31, 0.14
BROWN, BLACK, WHITE = np.array([[150, 90, 40], [0, 0, 0], [255, 255, 255]], np.float32)


def draw_pole(size, angle):
    """angle rad -> (size, size, 3) uint8: a brown pole on a black cart, on white.

    Both are rectangles, drawn by their signed distance: how far a pixel's centre is outside of the rectangle, negative
    inside. For |x| <= w and |y| <= h it is the larger of |x| - w and |y| - h. In pixels, clip(0.5 - distance, 0, 1) is
    the share of the pixel that is covered: 1 from half a pixel inside on, 0.5 on the edge, 0 from half a pixel outside
    on. So edges are smooth, and every change of the angle changes the image. Without this, a pole drawn at 64 px would
    move in jumps of one pixel, 1.5 degrees at its tip, and which of two images is better could often not be seen.
    """
    rows = slice(0, math.ceil((1 - CART_LOW) * size) + 1)  # nothing is drawn below the cart
    pixel = (np.arange(size, dtype=np.float32) + 0.5) / size  # (size,) centres, in sides
    x, y = pixel[None, :] - 0.5, 1.0 - pixel[rows, None]  # (1, size), (rows, 1)
    # The pole's own axes: along the pole, 0 at the pivot and POLE_LENGTH at the tip; and across it.
    sin, cos = np.float32(math.sin(angle)), np.float32(math.cos(angle))
    along = x * sin + (y - PIVOT_Y) * cos  # (rows, size)
    across = np.abs(x * cos - (y - PIVOT_Y) * sin)  # (rows, size)
    # Signed distances, (rows, size): the pole's ends are at along = POLE_LENGTH and along = 0.
    outside_pole = np.maximum(across - POLE_HALF_WIDTH, np.maximum(along - POLE_LENGTH, -along))
    middle, half_height = (CART_LOW + CART_HIGH) / 2, (CART_HIGH - CART_LOW) / 2
    outside_cart = np.maximum(np.abs(x) - CART_HALF_WIDTH, np.abs(y - middle) - half_height)
    # A distance in sides, times size, is a distance in pixels -> covered shares (rows, size, 1).
    pole, cart = (np.clip(0.5 - size * d, 0, 1)[..., None] for d in (outside_pole, outside_cart))
    image = np.full((size, size, 3), 255, np.uint8)
    colours = (WHITE + pole * (BROWN - WHITE)) * (1 - cart) + BLACK * cart  # the cart is in front
    image[rows] = (colours + 0.5).astype(np.uint8)  # + 0.5: astype cuts off, this rounds
    return image


# ---- Any environment: one face for all of them ----
# No number from an environment may be larger: the learner squares it, and float32 ends at 3.4e38.
LARGEST = 1e18


class BadEnvironment(ValueError):
    """An environment gave what nobody can learn from. One line: which environment, what it gave, in which step."""


# Success says whether the goal is reached now; evaluation counts it. Progress says how near the goal is, and larger is
# nearer. RL-VLM-F learns from neither; `--reward sparse` and `--reward code` use success. Progress tells which labels
# are right, and makes them with `--labels oracle`. So it must be something that an image shows: a VLM cannot answer
# for what it does not see, and its labels would count as wrong.
#
# An episode that *terminated* has no future, so the value of its last state is the last reward alone. An episode that
# was *truncated* only met its time limit: it would have gone on, so the value of the state after it still counts. A
# time limit that is mistaken for an end teaches that whatever is reached late is worth nothing.
class TaskEnv(gymnasium.Wrapper, gymnasium.utils.RecordConstructorArgs):
    """Any environment with a goal, square images and a time limit; what the environment says is checked and copied.

    reset() -> obs, info.  step(action) -> obs, true reward, terminated, truncated, info.  image(size); render().
    obs (O,) float32; action (A,) in [-1, 1], or an int from 0 on; true reward float; terminated, truncated bool;
    info["success"] float, 0 or 1, and 0 if it is never told; info["progress"] float, the true reward if it is never
    told. Every number must be finite and within LARGEST, also a reward that nobody learns from, for evaluation sums it.
    The one exception is the progress of a start, which may be unknown (nan).
    Raises BadEnvironment otherwise, and where reset(), step() or render() are not Gymnasium's.
    """

    def __init__(self, env, goal, limit, seed, action_repeat=1, name=None):
        """limit: steps of the simulator until an episode is cut off.  seed: of the first reset.  name: for messages."""
        gymnasium.utils.RecordConstructorArgs.__init__(self, goal=goal, limit=limit, seed=seed,
                                                       action_repeat=action_repeat, name=name)
        super().__init__(env)
        self.metadata = {**env.metadata, "render_modes": ["rgb_array"]}  # whatever the environment can do besides
        self.name = name or type(self.unwrapped).__name__
        self.goal, self.limit, self.action_repeat = goal, limit, action_repeat
        self.horizon = -(-limit // action_repeat)  # limit in steps of ours, rounded up: 9 / 4 -> 3
        self.first_seed = seed
        self.simulated = self.steps = 0  # steps of the simulator in this episode; steps of ours since the start
        # Some environments never say whether the goal is reached. tells_success remembers that, so that a run reports
        # no success rather than 0 %.
        self.tells_success = self.tells_progress = self.drawn = False
        self.white = {}  # what as_image() has learned from the images so far
        # The environments of this project draw themselves at any size. Others render at one size of their own, and that
        # image is resized. trap: another member named `image` may be anything, so only image(size) is called.
        draw = getattr(self.unwrapped, "image", None)
        self.any_size = inspect.isroutine(draw) and [*inspect.signature(draw).parameters] == ["size"]
        # The networks compute in float32 and take a vector, so observations become one: (2, 3) becomes (6,).
        with np.errstate(over="ignore"):  # a float64 bound may be infinite in float32
            low, high = (bound.ravel().astype(np.float32)
                         for bound in (env.observation_space.low, env.observation_space.high))
        self.observation_space = Box(low, high, dtype=np.float32)
        self.action_space.seed(seed)
        try:  # without a seed no episode could be played again, neither by --resume nor by evaluation
            inspect.signature(self.unwrapped.reset).bind(seed=0, options=None)
        except TypeError as error:
            raise BadEnvironment(f"{self.name} has another reset() than Gymnasium's, which is "
                                 f"reset(self, *, seed=None, options=None): {error}") from None

    def reset(self, *, seed=None, options=None):
        # Only the first reset takes the seed that was given to make(). Later resets that name no seed go on with the
        # environment's own generator; with the same seed again, every episode would have the same start.
        seed, self.first_seed = (self.first_seed if seed is None else seed), None
        self.simulated = 0
        obs, info = self._parts("reset", self.env.reset(seed=seed, options=options))
        # The progress of a foreign environment is its reward, and a start has none yet: nan, which is "unknown".
        return self._observation(obs), self._complete(info, math.nan)

    def step(self, action):
        total, self.steps = 0.0, self.steps + 1
        for _ in range(self.action_repeat):
            self.simulated += 1
            # trap: an environment may clip the action that it is given in place. Without the copy, the replay buffer
            # would store something else than the policy chose, and the next repeat would act differently.
            obs, reward, terminated, truncated, info = self._parts("step", self.env.step(copy.copy(action)))
            reward = self._number("reward", reward)
            # trap: many environments return numpy's bool, which a checkpoint would refuse to read back.
            terminated = bool(self._number("terminated", terminated))
            truncated = bool(self._number("truncated", truncated)) or self.simulated >= self.limit
            total += reward
            if terminated or truncated:
                break
        # The rewards of repeated steps are summed. Progress is that of the last of them, because the image shows that
        # one. The time limit may fall on a step that ends the episode by itself: FoldCloth has only one step. Then
        # terminated wins, because there is no future to bootstrap from.
        return self._observation(obs), total, terminated, truncated and not terminated, self._complete(info, reward)

    def image(self, size=300):
        """-> (size, size, 3) uint8: all that can be seen now, a copy."""
        with opengl_errors():
            drawn = self.unwrapped.image(size) if self.any_size else self._rendered()
        try:
            image = square(as_image(drawn, self.white), size)
        except ValueError as error:
            raise self._bad(f"drew {error}") from None
        if not self.drawn:
            # trap: a renderer that outlives OpenGL prints tracebacks when Python ends. Python first calls what was
            # registered last, and OpenGL registered its own end before this.
            atexit.register(lambda me=weakref.ref(self): me() and me().close())
            self.drawn = True
        return image

    def render(self):
        return self.image(300)

    def _rendered(self):
        try:
            return self.env.render()
        except Exception as error:  # a missing package, no screen, not implemented: anything
            raise self._bad(f"cannot draw itself here: {type(error).__name__}: {error}") from error

    # -- checks: each returns the plain value, or raises BadEnvironment --
    def _bad(self, what):
        step = -(-self.simulated // self.action_repeat)
        when = f"step {step} of the episode, {self.steps} since the start" if step else "a reset"
        return BadEnvironment(one_line(f"{self.name} {what} [at {when}]"))

    def _parts(self, call, result):
        """What reset() or step() returned, if it has as many parts as Gymnasium's. Old gym's step() returned four."""
        parts = {"reset": ("observation", "info"),
                 "step": ("observation", "reward", "terminated", "truncated", "info")}[call]
        several = isinstance(result, (tuple, list))
        # trap: an observation of two numbers, alone, looks like (observation, info). So the last part is looked at.
        if several and len(result) == len(parts) and isinstance(result[-1], (dict, type(None))):
            return result
        kinds = ", ".join(type(part).__name__ for part in result[:6]) if several else ""
        raise self._bad(f"returned {type(result).__name__}({kinds}) from {call}(); Gymnasium's returns "
                        f"({', '.join(parts)}), the last of them a dict")

    def _observation(self, obs):
        """Any array of the space's shape -> (O,) float32, a copy."""
        shape = self.env.observation_space.shape
        try:
            numbers = real(obs)
        except Exception:  # whatever is no array of numbers
            raise self._bad(f"gave an observation of {type(obs).__name__}, not numbers (real ones, none of them "
                            "masked)") from None
        # Axes of length 1 do not matter: (1, 4) is as good as (4,).
        # trap: numpy would later spread a single number, stored as an observation, over the whole row.
        if numbers.squeeze().shape != tuple(n for n in shape if n != 1):
            raise self._bad(f"gave an observation of shape {numbers.shape}; its observation_space says {shape}")
        numbers = numbers.ravel()
        right = np.abs(numbers) <= LARGEST  # not so for nan
        if not right.all():
            entry = np.argmin(right)  # the first that is not
            raise self._bad(f"gave {numbers[entry]} as entry {entry} of the observation; all must be finite and within "
                            f"{LARGEST:g}")
        return numbers.astype(np.float32)

    def _number(self, what, value, or_nan=False):
        """A number, or an array of one element -> float."""
        try:
            number = real(value).item()
        except Exception:  # several numbers, a text, anything
            number = math.inf
        if not (abs(number) <= LARGEST or (or_nan and math.isnan(number))):
            raise self._bad(f"gave {value!r:.60} as {what}; it must be one real number, finite and within {LARGEST:g}")
        return number

    def _complete(self, info, reward):
        """A copy of info with "success" and "progress" in it."""
        info = info or {}
        # Gymnasium's robotics tasks say "is_success".
        success = info.get("is_success") if info.get("success") is None else info["success"]
        self.tells_success |= success is not None
        # Foreign environments rarely tell progress. The true reward of the step then stands in for it.
        # Progress only judges labels, or makes them with `--labels oracle`.
        progress = reward if info.get("progress") is None else info["progress"]
        self.tells_progress |= info.get("progress") is not None
        success = self._number("success", 0.0 if success is None else success)
        if not 0 <= success <= 1:
            raise self._bad(f"gave {success:g} as success; it must be from 0 to 1")
        progress = self._number("progress", progress, or_nan=self.simulated == 0)
        return {**info, "success": success, "progress": progress}


def make(name, seed=0, goal=None, horizon=None, action_repeat=None, kwargs=None):
    """A name in TASKS; or, together with a goal sentence, any Gymnasium id, an environment, a function that makes one;
    -> TaskEnv.

    seed: of the first reset, and of action_space.sample().  goal, horizon, action_repeat: in place of the table's.
    horizon: steps of ours in an episode.  action_repeat: steps of the simulator in one of ours, all with the same
    action; their rewards are summed.  kwargs: dict, arguments of the environment that a name stands for.
    Raises ValueError, of one line, where the name is unknown or the environment cannot be made or used.
    """
    made = name  # what is made: a name, or an environment of the caller's
    if not isinstance(name, str):
        made = name if isinstance(name, gymnasium.Env) else name()
        name = type(made.unwrapped).__name__
    elif not entry(name) and name not in gymnasium.registry and ":" not in name:
        raise ValueError(beside("hint", f"unknown environment {name}; there are {', '.join(TASKS)}, or any Gymnasium "
                                        "id with --goal", name))
    known = entry(name) if made is name else None
    # A foreign environment has no entry, so here is one; it leaves the horizon open. (Settings choose the sizes.)
    task = known or Task("", made, horizon=None, vlm_image_size=None, reward_image_size=None)
    if not (goal or task.goal):
        raise ValueError(f'{name} needs a goal for the VLM, such as --goal "to stand upright"')
    if kwargs and not isinstance(task.make, str):
        raise ValueError(f"{name} is made without arguments")
    choose_opengl(small=known is not None)
    horizon, repeat = horizon or task.horizon, action_repeat or task.action_repeat
    env = task.make() if known and callable(task.make) else _from_gymnasium(task.make, name, kwargs or {})
    # limit counts steps of the simulator, horizon counts ours. The first limit that is known holds: the caller's or the
    # table's; that of a TimeLimit which the environment brings along; the one registered for the id. An episode must
    # end some time, because query sessions and checkpoints wait for that: hence 1000. Unless the caller or the table
    # said so, it is no longer than the environment's own horizon.
    names = ("_max_episode_steps", "horizon", "max_steps")  # trap: in a foreign environment they may be anything
    own = next((env.get_wrapper_attr(each) for each in names if env.has_wrapper_attr(each)), None)
    own = own if isinstance(own, (int, np.integer)) and not isinstance(own, bool) and own > 0 else math.inf
    spec = gymnasium.registry.get(env.unwrapped.spec.id) if env.unwrapped.spec else None
    limit = horizon * repeat if horizon else min(own, spec and spec.max_episode_steps or 1000)
    if limit > own and type(env.unwrapped).__module__.startswith("tasks."):
        raise ValueError(f"{name} ends after {own} steps; a horizon of {limit} is too long")
    return TaskEnv(env, goal or task.goal, limit, seed, repeat, name)


def rollout(env, policy, seed, size=None, most=None):
    """Play one episode -> images (K, size, size, 3) uint8, true rewards (T,), progress (T,), success (T,).

    policy: obs (O,) -> action.  size: of the images, px; None: no images (None is returned).  Row t is what follows
    step t, and images[t] shows it; the start has no row.  most: keep at most so many images (an even number), which are
    those of every 2nd, 4th, 8th, ... step.
    """
    obs, _ = env.reset(seed=seed)
    images, rows, over, every = [], [], False, 1
    while not over:
        obs, reward, terminated, truncated, info = env.step(policy(obs))
        # trap: nobody knows how long the episode will be, and 100,000 images fill the memory. So whenever there are too
        # many, every second one is let go.
        if size and len(images) == most and len(rows) % every == 0:
            images, every = images[::2], 2 * every
        if size and len(rows) % every == 0:
            images.append(env.image(size))
        rows.append((reward, info["progress"], info["success"]))
        over = terminated or truncated
    return (np.stack(images) if size else None, *np.array(rows).T)


def expert(env):
    """A scripted policy that reaches the goal, obs (O,) -> action. Raises ValueError where there is none.

    The preference learner never sees it. It shows what can be reached, draws the goal image for VLM-CaR, and plays the
    episodes on which VLM-CaR's programs are verified.
    """
    act = getattr(env.unwrapped, "expert_action", None)
    if act is None:
        raise ValueError(f"no scripted expert here; there is one for {', '.join(TASKS)}, and for every environment "
                         "with a method expert_action(obs) -> action: obs (O,), action (A,) in [-1, 1] or an int")
    return act


# ---- Machinery: environments of Gymnasium, with any range of actions ----
def _from_gymnasium(made, name, kwargs):
    """A Gymnasium id, or an environment -> one that observes a Box, and acts in [-1, 1] or by an int from 0 on.

    name: what messages call the environment.  Raises ValueError where that is not possible.
    Made from an id, it has no time limit: TaskEnv cuts off. A TimeLimit of Gymnasium would come before TaskEnv and
    would stumble over what TaskEnv refuses in one line.
    """
    try:
        with opengl_errors():
            env = made if isinstance(made, gymnasium.Env) else gymnasium.make(
                made, max_episode_steps=-1, disable_env_checker=True, **{"render_mode": "rgb_array", **kwargs})
    except Exception as error:  # a constructor may raise anything
        why = (str(error).splitlines() or [""])[0]
        raise ValueError(beside("explained", f"{name} cannot be made here: {why} [{type(error).__name__}; it is made "
                                             "with render_mode=\"rgb_array\"]", name)) from error
    if hasattr(getattr(env.unwrapped, "model", None), "vis"):
        draw_fast(env.unwrapped.model)
    env = beside("adapt", env, name)
    seen, actions = (getattr(env, space, None) for space in ("observation_space", "action_space"))
    if not isinstance(seen, Box) or 0 in seen.shape:  # the policy's network takes a vector; dicts and texts are none
        raise ValueError(one_line(f"{name} observes {seen}; only Box observations, of one number or more, will do"))
    if isinstance(actions, Discrete) and actions.start == 0:  # the network has one output per action, from 0 on
        return env
    # The tanh at the end of SAC's policy gives numbers in [-1, 1], whatever the environment wants. They are stretched
    # to the range of the environment, so that range must have two different ends. One comparison asks for both, and
    # for ends within 2^53, beyond which a float does not tell two integers apart.
    floats = isinstance(actions, Box) and actions.dtype.kind == "f" and len(actions.shape) == 1 and actions.shape[0]
    low, high = (actions.low.astype(float), actions.high.astype(float)) if floats else (0, 0)  # (A,) each
    if not np.all((-2.0**53 < low) & (low < high) & (high < 2.0**53)):
        raise ValueError(one_line(f"{name} acts in {actions}; only Discrete and Box (A,) will do, and every number of "
                                  "a Box needs a least value and a larger most"))
    return gymnasium.wrappers.RescaleAction(env, *np.array([-1, 1], actions.dtype))


def beside(function, value, *args):
    """What a function of support/adapt.py makes of a value; the value itself where this file was copied out alone."""
    try:  # named by text, as the tasks are: it knows kinds of environments that no lesson of this file needs
        module = importlib.import_module("support.adapt")
    except ModuleNotFoundError:
        return value
    return getattr(module, function)(value, *args)


def real(value):
    """A number or an array of numbers -> float64. Raises for complex numbers and masked ones.

    trap: numpy would drop the imaginary part, and the mask.
    """
    if np.iscomplexobj(value) or np.ma.is_masked(value):
        raise TypeError
    return np.asarray(value, np.float64)


def one_line(text):
    """The text without its line breaks: numpy and many libraries break what they say into lines."""
    return " ".join(text.split())


# ---- Machinery: images of other environments ----
def as_image(drawn, white=None):
    """Whatever render() returned -> (height, width, 3) uint8, the same image.

    Taken are uint8; numbers from 0 to 255; floats from 0 to 1; bool; grey as (H, W) or one channel; three channels, or
    four (what is transparent lies on white), first or last; an image of Pillow; of several frames the last.
    white: {are they floats?: the number that is white, 1 or 255}, as earlier images told; this image adds to it.
    Raises ValueError, "no image, but ...", for anything else, and where it cannot be known which number is white.
    """
    white = {} if white is None else white
    if isinstance(drawn, (list, tuple)) and len(drawn) and not isinstance(drawn[-1], (list, tuple)):
        drawn = drawn[-1]  # of frames; a list of lists is one image, as numbers
    try:
        if np.ma.is_masked(drawn):  # numpy would drop the mask
            raise ValueError
        image = np.asarray(drawn.convert("RGBA") if hasattr(drawn, "getbands") else drawn)  # getbands: Pillow's
    except Exception:  # rows of different lengths, a tensor on a GPU
        image = np.array(None)
    if image.ndim == 4 and len(image):
        image = image[-1]
    if image.ndim == 2:
        image = image[..., None]
    if image.ndim == 3 and image.shape[2] not in (1, 3, 4) and image.shape[0] in (1, 3, 4):
        image = np.moveaxis(image, 0, 2)
    if image.ndim != 3 or image.shape[2] not in (1, 3, 4) or not image.size or image.dtype.kind not in "buif":
        what = f"{image.dtype} {image.shape}" if image.ndim else type(drawn).__name__
        raise ValueError(f"no image, but {what}; made with render_mode=\"rgb_array\", render() must return "
                         "(height, width, 3)")
    if image.dtype.kind == "b":
        image = image * np.uint8(255)
    floats = image.dtype.kind == "f"
    if image.dtype != np.uint8 or floats not in white:
        low, high = float(image.min()), float(image.max())
        # trap: one image alone does not always tell its scale. Of floats up to 255, a dark image may end at 1; and a
        # mask of integers 0 and 1 would be black. So the first image that is not all black decides for all.
        if floats not in white and (1.01 < high < 8 if floats else high == 1):
            raise ValueError(f"no image, but {image.dtype} numbers from {low:g} to {high:g}, which is no known scale; "
                             "white must be 255, or 1 in floats, or True")
        top = white.get(floats) or (1 if floats and high <= 1.01 else 255)
        if not (-0.01 * top <= low and high <= 1.01 * top):  # written so that nan is refused too
            needed = f"from 0 to {top}, as before" if floats in white else "from 0 to 255, or as floats from 0 to 1"
            raise ValueError(f"no image, but numbers from {low:g} to {high:g}; they must go {needed}")
        if high > 0:
            white[floats] = top
        image = np.clip(np.rint(image * (255.0 / top)), 0, 255).astype(np.uint8)
    if image.shape[2] == 4:
        opaque = image[..., 3:] / 255.0  # (height, width, 1)
        image = np.rint(image[..., :3] * opaque + 255 * (1 - opaque)).astype(np.uint8)
    return np.broadcast_to(image, (*image.shape[:2], 3))  # grey becomes three equal channels


def square(image, size):
    """(height, width, 3) uint8 -> all of it as (size, size, 3) uint8, a copy.

    An oblong image is padded on both sides, not cut: the goal may be at any edge. Each edge goes on in its own median
    colour, so that the sky stays above and no thing at the edge becomes a stripe.
    """
    if image.shape == (size, size, 3):
        return np.array(image)
    from PIL import Image  # comes with imageio; only foreign environments need it

    tall = image.shape[0] > image.shape[1]
    image = image.swapaxes(0, 1) if tall else image  # now it is at least as wide as high
    height, side = image.shape[:2]
    before = (side - height) // 2
    bands = [np.full((rows, side, 3), np.median(edge, axis=0), np.uint8)
             for edge, rows in ((image[0], before), (image[-1], side - height - before))]
    image = np.concatenate([bands[0], image, bands[1]])
    image = np.ascontiguousarray(image.swapaxes(0, 1) if tall else image)
    # Shrinking, BOX takes the mean of the pixels that fall together, so that nothing thin is lost. Enlarging, BILINEAR
    # smooths what would otherwise be blocks.
    how = Image.Resampling.BOX if side >= size else Image.Resampling.BILINEAR
    return np.asarray(Image.fromarray(image).resize((size, size), how))


# ---- Machinery: OpenGL, which draws MuJoCo's scenes ----
@contextlib.contextmanager
def opengl_errors():
    """Around code that draws: a missing OpenGL becomes one ValueError of one line, with its cure.

    A missing OpenGL shows in many ways, an AttributeError on None among them; which one depends on the library that was
    tried (EGL, OSMesa, GLFW). The name of that library in the message gives it away.
    """
    try:
        yield
    except Exception as error:
        text = f"{type(error).__name__}: {error}".splitlines()[0]
        if re.search(r"OpenGL|EGL|OSMesa|GLFW|MUJOCO_GL|GLContext|\be?gl[A-Z]", text):
            raise ValueError("images of this task need OpenGL, which is missing here: apt-get install -y libegl1 "
                             "libgl1-mesa-dri (or set MUJOCO_GL to egl, osmesa or glfw, whichever this machine has) "
                             f"[{text}]") from None
        raise  # an error of another kind keeps its traceback


def choose_opengl(small=True):
    """Draw without a display where there is none. MuJoCo, Mesa and SDL read these variables when they start.

    small: whether images are as quick to draw as those of this project's own tasks.
    What a user has set in the environment stays.
    """
    # EGL draws without a display. MuJoCo would otherwise look for a window, and fail.
    if sys.platform.startswith("linux") and not os.environ.get("DISPLAY"):
        os.environ.setdefault("MUJOCO_GL", "egl")
    # Without a GPU it is Mesa that draws, in software, on as many threads as there are cores.
    # trap: to wake these threads takes longer than to draw one of our images. 0 means: no threads.
    if small:
        os.environ.setdefault("LP_NUM_THREADS", "0")
    # trap: SDL, which draws Gymnasium's classic tasks, swallows SIGTERM: `kill` would do nothing.
    os.environ.setdefault("SDL_NO_SIGNAL_HANDLERS", "1")


def draw_fast(model):
    """Turn off what software draws slowly: multisampling, shadows, reflections. model: MuJoCo's.

    Nothing that a goal speaks of is lost, and the reward model sees an image of every step.
    """
    model.vis.quality.offsamples = model.vis.quality.shadowsize = 0
    model.mat_reflectance[:] = 0


# ---- python envs.py: CartPole at random, and by its expert ----
def demo():
    """Print what an episode of each reaches, and write the last image of both to cartpole.png."""
    import imageio.v3 as imageio

    env, last_images = make("CartPole", seed=0), []
    policies = {"random": lambda obs: env.action_space.sample(), "expert": expert(env)}
    for name, policy in policies.items():
        images, true_rewards, _, success = rollout(env, policy, seed=0, size=200)
        last_images.append(images[-1])
        print(f"{name}: true return {true_rewards.sum():.0f}, within 5 degrees on {success.sum():.0f} of "
              f"{env.horizon} steps")
    imageio.imwrite("cartpole.png", np.concatenate(last_images, axis=1))
    print("cartpole.png: the last image of each (expected: a pole that fell, a pole upright)")


if __name__ == "__main__":
    if sys.argv[1:]:
        sys.exit("envs.py takes no arguments; all tasks are drawn by python -m tools.draw_tasks")
    demo()
