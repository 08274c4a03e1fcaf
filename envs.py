"""The tasks: what the policy acts in, what the VLM looks at, and the sentence that says the goal.

What this is: CartPole with a continuous force, drawn with numpy alone; DrawerOpen, Soccer and
SweepInto of Meta-World, with pictures made for a VLM; and any Gymnasium id, given a goal.

Which STEPs: none; every STEP acts or looks here. CartPole's physics (a angle, F force, M mass):
    temp = (F + m l a'^2 sin a) / M       a'' = (g sin a - temp cos a) / (l (4/3 - m cos^2 a / M))

Differs from the paper (RL-VLM-F, 2402.03681):
  1. Meta-World v3 in place of a changed v2, whose copy does not install any more.
  2. Its episodes last 50 steps, each three of Meta-World's with one action (theirs: 500, of one;
     action repeat as in 2203.04955): the experts are done after 14 to 18. In Soccer and SweepInto
     the hand starts 5 cm lower, or random actions seldom touch the object.
  3. Its pictures have no shadows, reflections, multisampling, goal markers, and what cannot move
     is drawn once: much faster.
  4. The reward model sees 64 to 100 px, the VLM 200 to 308 px (theirs: the VLM sees 200 to 720).

Shapes: O observation, A action numbers; pictures (size, size, 3) uint8.
  make(name) -> env with .goal, .horizon, .picture(size), .render() = picture(300); obs (O,)
  float32, action (A,) in [-1, 1], or an int; info["success"] 0 or 1; info["progress"]: larger is
  closer to the goal, and visible in pictures. expert(env)(obs) -> action. TASKS: one entry a task.

To use it elsewhere:
    import envs
    env = envs.make("CartPole", seed=0)  # or make("Reacher-v5", goal="to touch the red ball")
    obs, info = env.reset(seed=0)
    obs, true_reward, terminated, truncated, info = env.step(envs.expert(env)(obs))
    image, progress = env.picture(64), info["progress"]
"""
import argparse
import atexit
import contextlib
import csv
import math
import os
import re
import sys
import time
import warnings
import weakref
from dataclasses import dataclass, field

import gymnasium
import numpy as np
from gymnasium.spaces import Box, Discrete

OPENGL_CURE = (
    "pictures of this task need OpenGL, which is missing here: apt-get install -y libegl1 "
    "libgl1-mesa-dri (or set MUJOCO_GL to egl, osmesa or glfw, whichever this machine has)"
)


@dataclass
class Task:
    """All that the other files need to know about a task."""

    goal: str  # what the VLM is told; RL-VLM-F's seven word for word
    make: object  # a Gymnasium id, "module:id", or a callable that returns an environment
    horizon: int  # steps until an episode is cut off (truncated)
    query_size: int  # side of the square picture the VLM sees, px
    reward_size: int  # side of the one the reward network sees, px
    action_repeat: int = 1  # steps of the simulator in one of ours
    train: dict = field(default_factory=dict)  # what train.py's Config takes for this task
    paper: dict = field(default_factory=dict)  # the same fields as the paper had them


# ---- CartPole: physics and pictures in numpy ----
class CartPole(gymnasium.Env):
    """Keep a pole upright with -10 to 10 N on the cart. The state is clamped: nothing terminates.

    Observation (4,): cart position m, its speed; pole angle rad (0 up, + leans right), its speed.
    """

    GRAVITY, CART_MASS, POLE_MASS, HALF_POLE, FORCE, SECONDS = 9.8, 1.0, 0.1, 0.5, 10.0, 0.02
    LIMIT = np.array([0.8 * 2.4, np.inf, math.radians(30), np.inf])  # of |state|
    render_mode = "rgb_array"
    metadata = {"render_modes": ["rgb_array"], "render_fps": 50}

    def __init__(self):
        high = self.LIMIT.astype(np.float32)
        high[[0, 2]] *= 1.001  # float32 rounds the clamped state either way
        self.observation_space = Box(-high, high, dtype=np.float32)
        self.action_space = Box(-1.0, 1.0, (1,), np.float32)
        self.state = np.zeros(4)  # float64; observations are float32 copies

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.state = self.np_random.uniform(-0.05, 0.05, 4)
        return self.state.astype(np.float32), self._info()

    def step(self, action):
        push = float(np.asarray(action).reshape(-1)[0])
        if not math.isfinite(push):
            raise ValueError(f"an action must be a number, not {push}")
        force = self.FORCE * min(max(push, -1.0), 1.0)
        moved = self.state + self.SECONDS * self.derivative(self.state, force)  # Euler
        self.state = np.clip(moved, -self.LIMIT, self.LIMIT)
        # trap: without this the pole "falls on" at the clamp, and needs as long to turn round.
        place, speed = self.state[[0, 2]], self.state[[1, 3]]
        outwards = (np.abs(place) >= self.LIMIT[[0, 2]]) & (place * speed > 0)
        self.state[[1, 3]] = np.where(outwards, 0.0, speed)
        info = self._info()
        return self.state.astype(np.float32), info["progress"], False, False, info

    @classmethod
    def derivative(cls, state, force):
        """d state / dt, (4,), Gymnasium's: https://coneural.org/florian/papers/05_cart_pole.pdf"""
        _, speed, angle, spin = state
        total, pole = cls.CART_MASS + cls.POLE_MASS, cls.POLE_MASS * cls.HALF_POLE
        sin, cos = math.sin(angle), math.cos(angle)
        temp = (force + pole * spin**2 * sin) / total
        inertia = cls.HALF_POLE * (4.0 / 3.0 - cls.POLE_MASS * cos**2 / total)
        spin_rate = (cls.GRAVITY * sin - cos * temp) / inertia
        return np.array([speed, temp - pole * spin_rate * cos / total, spin, spin_rate])

    def _info(self):
        degrees = abs(math.degrees(self.state[2]))
        return {"success": float(degrees < 5.0), "progress": -degrees}

    def expert_action(self, obs):
        """Push where the pole leans and is going; a little more brings the cart to the middle."""
        gains = np.array([0.1, 0.25, 4.0, 1.0])
        return np.clip([gains @ obs], -1, 1).astype(np.float32)

    def picture(self, size):
        """The cart is always drawn in the middle: its position cannot be seen."""
        return draw_pole(size, self.state[2])

    def render(self):
        return self.image(300)


# Lengths in sides of the picture. x to the right from the middle, y up from the lower edge.
PIVOT_Y, POLE_LENGTH, POLE_HALF_WIDTH = 0.29, 0.60, 0.028
CART_LOW, CART_HIGH, CART_HALF_WIDTH = 0.16, 0.31, 0.14
BROWN, BLACK, WHITE = np.array([[150, 90, 40], [0, 0, 0], [255, 255, 255]], np.float32)


def draw_pole(size, angle):
    """angle rad -> (size, size, 3) uint8: a brown pole on a black cart, on white.

    Edges are smooth: a pixel is as brown as the share of it that the pole covers.
    """
    rows = slice(0, math.ceil((1 - CART_LOW) * size) + 1)  # nothing below the cart
    pixel = (np.arange(size, dtype=np.float32) + 0.5) / size  # centres
    x, y = pixel[None, :] - 0.5, 1.0 - pixel[rows, None]  # (1, size), (rows, 1)
    sin, cos = np.float32(math.sin(angle)), np.float32(math.cos(angle))
    along = x * sin + (y - PIVOT_Y) * cos  # (rows, size), 0 at the pivot, POLE_LENGTH at the tip
    across = np.abs(x * cos - (y - PIVOT_Y) * sin)
    outside_pole = np.maximum(across - POLE_HALF_WIDTH, np.maximum(along - POLE_LENGTH, -along))
    middle, half_height = (CART_LOW + CART_HIGH) / 2, (CART_HIGH - CART_LOW) / 2
    outside_cart = np.maximum(np.abs(x) - CART_HALF_WIDTH, np.abs(y - middle) - half_height)
    pole, cart = (np.clip(0.5 - size * d, 0, 1)[..., None] for d in (outside_pole, outside_cart))
    image = np.full((size, size, 3), 255, np.uint8)
    colours = (WHITE + pole * (BROWN - WHITE)) * (1 - cart) + BLACK * cart
    image[rows] = (colours + 0.5).astype(np.uint8)
    return image


# ---- Meta-World: three tasks of a robot arm, and pictures without the arm ----
class MetaWorld(gymnasium.Env):
    """A Meta-World v3 task with object, goal and hand always at one start, as the paper has it.

    Observation (39,): hand (3), gripper opening, object (3 + quaternion 4), 7 zeros; the same 18
    one step before; goal (3). Action (4,): hand by up to 1 cm along x, y, z; gripper. layout:
    where object and goal are, Meta-World's random vector. True reward: Meta-World's, 0 to 10 in
    each of its steps.
    """

    render_mode = "rgb_array"
    metadata = {"render_modes": ["rgb_array"], "render_fps": 80}

    def __init__(self, name, layout, hand, camera, expert, colours=(), one_way=False):
        """hand: (3,) m.  camera: look_at (3,) m, distance m, azimuth, elevation degrees.
        expert: obs -> action.  colours: pairs of geom name and (red, green, blue) in [0, 1].
        one_way: beyond the goal is as good as at it."""
        with opengl_errors():  # importing mujoco already looks for OpenGL
            import mujoco
        from metaworld.env_dict import ALL_V3_ENVIRONMENTS

        self.mujoco, self.expert_action, self.views = mujoco, expert, {}  # size -> FixedView
        self.one_way = one_way
        sim = self.sim = ALL_V3_ENVIRONMENTS[name]()
        sim._freeze_rand_vec, sim._set_task_called = True, True
        sim._last_rand_vec, sim.hand_init_pos = np.array(layout, float), np.array(hand, float)
        sim._partially_observable = False  # shows the goal: constant, but the experts want it
        del sim.sawyer_observation_space  # trap: cached with bounds 0 for the goal; step() clips
        sim.max_path_length = math.inf  # the time limit is ours
        sim.touching_object = lambda geom: False  # a slow loop over contacts, read by nobody here
        sim.reset()  # 250 physics steps to bring the hand there: once, later resets restore this
        self.kind = mujoco.mjtState.mjSTATE_INTEGRATION
        self.start = np.empty(mujoco.mj_stateSize(sim.model, self.kind))
        mujoco.mj_getState(sim.model, sim.data, self.start, self.kind)
        self.observation_space = Box(-np.inf, np.inf, (39,), np.float32)
        self.action_space = Box(-1.0, 1.0, (4,), np.float32)
        self._prepare_pictures(camera, colours)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        sim = self.sim
        # Meta-World's own reset lets the arm travel there through 500 physics steps, every time.
        self.mujoco.mj_resetData(sim.model, sim.data)
        self.mujoco.mj_setState(sim.model, sim.data, self.start, self.kind)
        self.mujoco.mj_forward(sim.model, sim.data)
        sim.curr_path_length, sim._prev_obs = 0, sim._get_curr_obs_combined_no_goal()
        obs = sim._get_obs()
        return obs.astype(np.float32), {"success": 0.0, "progress": self._progress(obs)}

    def step(self, action):
        obs, reward, _, _, info = self.sim.step(np.clip(np.asarray(action, np.float64), -1, 1))
        info = {"success": float(info["success"]), "progress": self._progress(obs)}
        return obs.astype(np.float32), float(reward), False, False, info

    def _progress(self, obs):
        """Minus the distance over the table from object (handle, ball, cube) to goal, m."""
        # trap: the true reward also pays for the hand, which the picture hides: as a label, noise.
        if self.one_way:  # the arm pulls a drawer past the goal, where it looks further open still
            return -max(0.0, float(obs[5] - self.sim._target_pos[1]))
        return -math.dist(obs[4:6], self.sim._target_pos[:2])

    def _prepare_pictures(self, camera, colours):
        """Once: hide the robot, throw out what makes drawing slow, aim the camera."""
        mujoco, model = self.mujoco, self.sim.model
        self.camera, self.options = mujoco.MjvCamera(), mujoco.MjvOption()
        self.camera.lookat[:], self.camera.distance = camera[:2]
        self.camera.azimuth, self.camera.elevation = camera[2:]
        self.options.sitegroup[:] = 0  # markers of goals and fingers
        robot = model.body_rootid == model.body("base").id  # (bodies,)
        model.geom_group[robot[model.geom_bodyid]] = 5  # groups 3 to 5 are not drawn
        for geom, colour in colours:
            model.geom(geom).rgba[:3], model.geom(geom).matid[:] = colour, -1
        draw_fast(model)

    def picture(self, size):
        if size not in self.views:
            view = FixedView(self.mujoco, self.sim.model, self.camera, self.options, size)
            self.views[size] = view
        return self.views[size].picture(self.sim.data)

    def render(self):
        return self.image(300)

    def close(self):
        while self.views:
            self.views.popitem()[1].close()


class FixedView:
    """Pictures of a MuJoCo scene from one place: what cannot move is drawn once, the rest over it.

    Of the two, the nearer one is seen: OpenGL's own rule, so pictures are those of mujoco.Renderer,
    to the last bit, and come several times as fast.
    trap: not with shadows, reflections or anything transparent, nor where the model itself changes.
    """

    def __init__(self, mujoco, model, camera, options, size):
        """camera, options: MjvCamera and MjvOption.  size: of the square picture, px."""
        self.mujoco, self.model, self.camera, self.options = mujoco, model, camera, options
        model.vis.global_.offwidth = model.vis.global_.offheight = size
        self.opengl = mujoco.GLContext(size, size)
        self.opengl.make_current()
        self.context = mujoco.MjrContext(model, mujoco.mjtFontScale.mjFONTSCALE_150)
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN, self.context)
        self.context.readDepthMap = mujoco.mjtDepthMap.mjDEPTH_ZEROFAR  # nearer is larger
        self.scene, self.no_pull = mujoco.MjvScene(model, maxgeom=1000), mujoco.MjvPerturb()
        for name in ("SHADOW", "REFLECTION", "SKYBOX", "HAZE", "FOG"):
            self.scene.flags[getattr(mujoco.mjtRndFlag, "mjRND_" + name)] = False
        self.colour = np.empty((size, size, 3), np.uint8)[::-1]  # OpenGL's first row is the lowest
        self.depth, self.still = np.empty((size, size), np.float32)[::-1], None

    def _draw(self, data, which):
        """Fill self.colour and self.depth with the things that stand still, or that can move."""
        mujoco, rect = self.mujoco, self.mujoco.MjrRect(0, 0, *self.depth.shape)
        mujoco.mjv_updateScene(self.model, data, self.options, self.no_pull, self.camera,
                               getattr(mujoco.mjtCatBit, "mjCAT_" + which), self.scene)
        mujoco.mjr_render(rect, self.scene, self.context)
        mujoco.mjr_readPixels(self.colour[::-1], self.depth[::-1], rect, self.context)

    def picture(self, data):
        """data: MjData -> (size, size, 3) uint8."""
        self.opengl.make_current()  # there is one a size
        if self.still is None:
            self._draw(data, "STATIC")
            self.still = self.colour.copy(), self.depth.copy()
        self._draw(data, "DYNAMIC")
        colour, depth = self.still
        image, nearer = colour.copy(), self.depth > depth  # (size, size, 3), (size, size)
        # as pixels, three bytes each: by channels it takes three times as long
        np.copyto(image.view("V3"), self.colour.view("V3"), where=nearer[..., None])
        return image

    def close(self):
        self.opengl.make_current()
        self.context.free()
        self.opengl.free()


def draw_fast(model):
    """No multisampling, shadows and reflections: software draws them slowly. model: MuJoCo's."""
    model.vis.quality.offsamples = model.vis.quality.shadowsize = 0
    model.mat_reflectance[:] = 0


def scripted(name):
    """One of the policies that Meta-World brings: obs (39,) -> action (4,)."""

    def act(obs):
        from metaworld import policies

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it warns that it asks for more than [-1, 1]
            return np.clip(getattr(policies, name)().get_action(obs), -1, 1).astype(np.float32)

    return act


def sweep_expert(obs):
    """Go behind the cube with closed fingers, go down, push it to the hole, stay.

    Meta-World's own policy pinches the cube, presses it into the table from this start, and fails.
    """
    hand, cube, goal = obs[:3], obs[4:7], obs[36:39]
    behind = np.array([cube[0], cube[1] - 0.06, 0.115])  # m; fingers 2 cm above the table
    if hand[1] > cube[1] - 0.02:  # in front of it: go back, above it
        target = behind + [0.0, -0.02, 0.1]
    elif hand[2] > 0.145 or abs(hand[0] - cube[0]) > 0.02:
        target = behind
    else:  # push, and stop 1 cm before the hole's middle: the cube slides on
        target = behind + [0.0, 0.06, 0.0] if cube[1] < goal[1] - 0.01 else hand
    return np.clip([*25 * (target - hand), 1.0], -1, 1).astype(np.float32)


# ---- Any environment: one face for all of them ----
class TaskEnv(gymnasium.Wrapper):
    """Adds the goal, square pictures of any size, and "success" and "progress" in every info."""

    def __init__(self, env, goal, horizon, seed, action_repeat=1):
        super().__init__(env)
        self.goal, self.horizon, self.action_repeat = goal, horizon, action_repeat
        self.first_seed = seed  # of the first reset that names none
        self.drawn = self.tells_success = False  # tells_success: whether it ever said
        self.action_space.seed(seed)

    def reset(self, *, seed=None, options=None):
        seed, self.first_seed = (self.first_seed if seed is None else seed), None
        obs, info = self.env.reset(seed=seed, options=options)
        return obs, self._complete(info, math.nan)  # a foreign one has no reward, no progress, yet

    def step(self, action):
        total = 0.0
        for _ in range(self.action_repeat):
            obs, reward, terminated, truncated, info = self.env.step(action)
            total += float(reward)
            if terminated or truncated:
                break
        # trap: many environments return numpy's bool, which a checkpoint would refuse to read back
        info = self._complete(info, reward)  # progress belongs to the picture, the last one
        # what ends by itself in its last step is over (FoldCloth's one step)
        return obs, total, bool(terminated), bool(truncated and not terminated), info

    def _complete(self, info, reward):
        success = info.get("success", info.get("is_success"))
        self.tells_success |= success is not None
        progress = info.get("progress", reward)
        return {**info, "success": float(success or 0.0), "progress": float(progress)}

    def image(self, size=300):
        """(size, size, 3) uint8: what can be seen now."""
        with opengl_errors():
            ours = getattr(self.unwrapped, "image", None)
            image = ours(size) if ours else square(self._foreign_picture(), size)
        if not self.drawn:
            # trap: a renderer that outlives OpenGL prints tracebacks when Python ends. (Whoever
            # registers last is called first; OpenGL registered its own end before this.)
            atexit.register(lambda me=weakref.ref(self): me() and me().close())
            self.drawn = True
        return image

    def render(self):
        return self.image(300)

    def _foreign_picture(self):
        """What an environment that is not of this project draws, (height, width, 3) uint8."""
        try:
            image = self.env.render()
        except gymnasium.error.DependencyNotInstalled as error:
            raise ValueError(f"{self.spec.id} cannot draw itself here: {error}") from None
        if not isinstance(image, np.ndarray):
            raise ValueError(f"{self.spec.id} drew no picture, but {type(image).__name__}")
        return image


def square(image, size):
    """(height, width, 3) uint8 -> its middle square as (size, size, 3) uint8."""
    from PIL import Image  # comes with imageio; only foreign environments need it

    side = min(image.shape[:2])
    top, left = (image.shape[0] - side) // 2, (image.shape[1] - side) // 2
    middle = np.ascontiguousarray(image[top : top + side, left : left + side, :3])
    how = Image.Resampling.BOX if side >= size else Image.Resampling.BILINEAR
    return np.asarray(Image.fromarray(middle).resize((size, size), how))


@contextlib.contextmanager
def opengl_errors():
    """A missing OpenGL has many faces, AttributeErrors on None among them: one line, one cure."""
    try:
        yield
    except Exception as error:
        text = f"{type(error).__name__}: {error}".splitlines()[0]
        if re.search(r"OpenGL|EGL|OSMesa|GLFW|MUJOCO_GL|GLContext|\be?gl[A-Z]", text):
            raise ValueError(f"{OPENGL_CURE} [{text}]") from None
        raise


def choose_opengl(small=True):
    """Draw without a display where there is none. MuJoCo, Mesa and SDL read these when they start.

    small: whether pictures are as quick to draw as those of this project's own tasks.
    """
    if sys.platform.startswith("linux") and not os.environ.get("DISPLAY"):
        os.environ.setdefault("MUJOCO_GL", "egl")
    if small:  # trap: to wake a thread of Mesa's for every core takes longer than such a picture
        os.environ.setdefault("LP_NUM_THREADS", "0")
    # trap: SDL, which draws Gymnasium's classic tasks, swallows SIGTERM: `kill` would do nothing
    os.environ.setdefault("SDL_NO_SIGNAL_HANDLERS", "1")


# ---- The table of tasks ----
PAPER_SAC = dict(
    seed_steps=1_000, hold=1, explore_steps=10_000, sampler="uniform", reward_shift=0,
    reward_mirror=0, reward_batch=64, sac_lr=3e-4, batch_size=512, hidden=256, updates=1,
    discount=0.99, eval_every=10_000, eval_episodes=1, keep_best=0,
)
PAPER_METAWORLD = dict(
    PAPER_SAC, total_steps=1_000_000, feedback_every=4_000, pairs_per_session=40, max_pairs=20_000,
    reward_lr=3e-4, reward_epochs=10, query_size=300, reward_size=300, horizon=500,
    action_repeat=1,
)
PAPER_ROPE_WATER = dict(
    PAPER_SAC, total_steps=600_000, feedback_every=5_000, pairs_per_session=100,
    max_pairs=12_000, reward_lr=1e-4, reward_epochs=30, query_size=720,
)

TRAIN_METAWORLD = dict(
    seed_steps=1_000, explore_steps=3_000, feedback_every=1_000, pairs_per_session=60,
    sac_lr=5e-4, batch_size=256, reward_epochs=20, reward_shift=0, eval_every=1_000,
    eval_episodes=1,
)
TRAIN_ROPE_WATER = dict(
    total_steps=15_000, seed_steps=1_000, explore_steps=2_000, feedback_every=1_000,
    pairs_per_session=40, max_pairs=500, sac_lr=1e-3, batch_size=128, hidden=128, updates=2,
    reward_epochs=20, reward_shift=0, eval_every=1_000, eval_episodes=10,
)
TRAIN_GRID = dict(  # episodes last 100 steps (MiniGrid's own: 250 to 640): more different starts
    total_steps=16_000, seed_steps=1_000, explore_steps=1_000, feedback_every=2_000,
    pairs_per_session=50, max_pairs=1_000, sac_lr=1e-3, batch_size=128, hidden=128,
    discount=0.95, eval_every=2_000,  # an errand takes 5 to 25 steps
)
ERRAND = "to pick up the key, open the yellow door with it"
TASKS = {
    "CartPole": Task(
        goal="to balance the brown pole on the black cart to be upright",
        make=CartPole,
        horizon=100, query_size=200, reward_size=64,
        # Questions early, while the pole still falls: later all pictures are near the goal, and
        # nothing tells the order of those far from it.
        train=dict(
            total_steps=2_000, seed_steps=300, explore_steps=300, feedback_every=300,
            pairs_per_session=34, max_pairs=100, sac_lr=1e-3, batch_size=128, hidden=128, updates=2,
            reward_lr=5e-5, reward_epochs=60, reward_shift=0, reward_mirror=1, eval_every=500,
        ),
        paper=dict(
            PAPER_SAC, total_steps=500_000, feedback_every=5_000, pairs_per_session=50,
            max_pairs=10_000, explore_steps=2_000, sac_lr=5e-4, batch_size=1024, hidden=1024,
            reward_lr=3e-4, reward_epochs=50, query_size=200, reward_size=200, eval_episodes=10,
        ),
    ),
    "DrawerOpen": Task(
        goal="to open the drawer",
        make=lambda: MetaWorld(
            "drawer-open-v3",
            layout=(0.0, 0.9, 0.0),  # drawer
            hand=(0.0, 0.75, 0.15),
            camera=((0.0, 0.72, 0.07), 0.55, 50, -38),
            expert=scripted("SawyerDrawerOpenV3Policy"),
            one_way=True,
        ),
        horizon=50, action_repeat=3, query_size=300, reward_size=84,
        train=dict(TRAIN_METAWORLD, total_steps=8_000, explore_steps=2_000, feedback_every=500,
                   pairs_per_session=13, max_pairs=100),
        paper=PAPER_METAWORLD,
    ),
    "Soccer": Task(
        goal="to move the soccer ball into the goal",
        make=lambda: MetaWorld(
            "soccer-v3",
            layout=(0.0, 0.65, 0.03, 0.0, 0.85, 0.0),  # ball, goal
            hand=(0.0, 0.56, 0.15),
            camera=((0.0, 0.75, 0.03), 0.55, 90, -45),
            expert=scripted("SawyerSoccerV3Policy"),
        ),
        horizon=50, action_repeat=3, query_size=300, reward_size=84,
        # Random actions that change at every step cancel out, and the arm trembles where it starts;
        # held for 7 they carry it about. Novelty goes on from the places where it has been.
        # Discount: see StraightenRope; a shot takes about 15 steps.
        train=dict(TRAIN_METAWORLD, total_steps=12_000, seed_steps=2_000, hold=7,
                   explore_steps=4_000, pairs_per_session=100, max_pairs=500, discount=0.95,
                   eval_every=500, keep_best=1),
        paper=dict(PAPER_METAWORLD, reward_lr=1e-4, reward_epochs=5),
    ),
    "SweepInto": Task(
        goal="to minimize the distance between the green cube and the hole",
        make=lambda: MetaWorld(
            "sweep-into-v3",
            layout=(0.0, 0.65, 0.02, 0.0, 0.84, 0.02),  # cube, hole
            hand=(0.0, 0.6, 0.15),
            camera=((0.0, 0.74, 0.05), 0.52, -90, -60),
            expert=sweep_expert,
            colours=[("objGeom", (0.1, 0.7, 0.1))],
        ),
        horizon=50, action_repeat=3, query_size=300, reward_size=84,
        # The hole is a pit wider than the 5 cm that count: only a reward that is right near the
        # goal tells a cube at its edge from one in its middle. Discount: see StraightenRope.
        # Left and right are alike here: see reward_model.mirrored.
        # SAC's policies come and go: here and in Soccer the best is kept (train.KeptPolicy).
        train=dict(TRAIN_METAWORLD, total_steps=15_000, pairs_per_session=120, max_pairs=1_200,
                   sampler="best", reward_mirror=1, discount=0.95, eval_every=500, keep_best=1),
        paper=PAPER_METAWORLD,
    ),
    "FoldCloth": Task(
        goal="to fold the cloth diagonally from top left corner to bottom right corner",
        make="deformables:FoldCloth-v0",
        horizon=1, query_size=300, reward_size=100,
        train=dict(
            total_steps=1_500, seed_steps=150, explore_steps=150, feedback_every=150,
            pairs_per_session=30, max_pairs=300, sac_lr=1e-3, batch_size=128, hidden=128,
            updates=4, reward_epochs=20, reward_shift=0, eval_every=150, eval_episodes=1,
        ),
        paper=dict(
            PAPER_SAC, total_steps=15_000, feedback_every=1_000, pairs_per_session=50,
            max_pairs=500, seed_steps=250, explore_steps=500, sac_lr=5e-4, batch_size=1024,
            hidden=1024, reward_lr=3e-4, reward_epochs=25, query_size=360, reward_size=360,
            eval_every=250,
        ),
    ),
    "StraightenRope": Task(
        goal="to straighten the blue rope",
        make="deformables:StraightenRope-v0",
        horizon=40, query_size=300, reward_size=100,
        # A reward that is fitted anew moves every value by its own change / (1 - discount), a
        # hundredfold at 0.99; straightening takes a few steps, so 0.9 sees far enough. And no
        # crumpled rope looks like another: more answers, and more views of each picture.
        train=dict(TRAIN_ROPE_WATER, total_steps=10_000, pairs_per_session=100, max_pairs=800,
                   discount=0.9, reward_epochs=40, reward_shift=10),
        paper=dict(PAPER_ROPE_WATER, reward_size=240),
    ),
    "PassWater": Task(
        goal="to move the container, which holds water, to be as close to the red circle as "
        "possible without causing too many water droplets to spill",
        make="deformables:PassWater-v0",
        horizon=75, query_size=300, reward_size=100,
        # Water once spilled stays spilled: where the random actions change at every step, all that
        # is ever seen is wet ground. Held for an episode, most of them spill little.
        train=dict(TRAIN_ROPE_WATER, total_steps=10_000, seed_steps=2_000, hold=75),
        paper=dict(PAPER_ROPE_WATER, reward_size=360),
    ),
    **{
        name: Task(
            goal=goal,
            make=f"gridworlds:{name}-v0",
            horizon=100, query_size=query_size, reward_size=reward_size,
            train=TRAIN_GRID,
        )
        for name, goal, query_size, reward_size in (
            ("DoorKey-5x5", ERRAND + ", and get to the green square", 300, 80),
            ("DoorKey-6x6", ERRAND + ", and get to the green square", 300, 84),
            ("DoorKey-8x8", ERRAND + ", and get to the green square", 304, 80),
            ("Unlock", "to pick up the key and open the yellow door with it", 308, 88),
            ("UnlockPickup", ERRAND + ", and pick up the purple box behind it", 308, 88),
        )
    },
}


def make(name, seed=0, goal=None, horizon=None, action_repeat=None):
    """A name in TASKS, or any Gymnasium id together with a goal sentence -> TaskEnv.

    action_repeat: steps of the simulator in one of ours, all with the same action; their rewards
    are summed.  horizon: steps of ours in an episode.
    """
    task = TASKS.get(name)
    if task is None and name not in gymnasium.registry and ":" not in name:
        known = ", ".join(TASKS)
        or_any = "or any Gymnasium id with --goal"
        raise ValueError(f"unknown environment {name}; there are {known}, {or_any}")
    if not (goal or task):
        raise ValueError(f'{name} needs a goal for the VLM, such as --goal "to stand upright"')
    choose_opengl(small=task is not None)
    source, horizon = (task.make if task else name), horizon or (task.horizon if task else None)
    repeat = action_repeat or (task.action_repeat if task else 1)
    limit = horizon and horizon * repeat  # of the simulator
    if isinstance(source, str):
        env = _from_gymnasium(source, limit)
    else:
        try:
            env = gymnasium.wrappers.TimeLimit(source(), limit)
        except ModuleNotFoundError as error:
            raise ValueError(f"{name} needs a package: pip install {error.name}") from None
    limit, own = limit or env.spec.max_episode_steps, getattr(env.unwrapped, "horizon", None)
    if own and limit > own:
        raise ValueError(f"{name} ends after {own} steps; a horizon of {limit} is too long")
    return TaskEnv(env, goal or task.goal, -(-limit // repeat), seed, repeat)


def _from_gymnasium(name, horizon):
    """Any registered environment, with observations (O,) float32 and actions in [-1, 1] or int."""
    try:
        with opengl_errors():
            env = gymnasium.make(
                name, render_mode="rgb_array", max_episode_steps=horizon, disable_env_checker=True
            )
    except (gymnasium.error.Error, ImportError, TypeError) as error:  # TypeError: needs arguments
        raise ValueError(f"{name} cannot be made here: {str(error).splitlines()[0]}") from None
    if not env.spec.max_episode_steps:  # an episode has to end some time
        own = getattr(env.unwrapped, "horizon", None)
        env = gymnasium.wrappers.TimeLimit(env, horizon or own or 1000)
    if hasattr(getattr(env.unwrapped, "model", None), "vis"):
        draw_fast(env.unwrapped.model)
    if not isinstance(env.observation_space, Box):
        raise ValueError(f"{name} observes {env.observation_space}; only Box observations will do")
    if len(env.observation_space.shape) != 1:
        env = gymnasium.wrappers.FlattenObservation(env)
    bounds = (env.observation_space.low, env.observation_space.high)
    space = Box(*(bound.astype(np.float32) for bound in bounds), dtype=np.float32)
    env = gymnasium.wrappers.TransformObservation(env, np.float32, space)
    actions = env.action_space
    if isinstance(actions, Discrete):  # the learner counts from 0
        return env if actions.start == 0 else gymnasium.wrappers.TransformAction(
            env, lambda action: action + actions.start, Discrete(actions.n))
    if not isinstance(actions, Box) or len(actions.shape) != 1 or not actions.is_bounded():
        raise ValueError(f"{name} acts in {actions}; only bounded Box (A,) and Discrete will do")
    return gymnasium.wrappers.RescaleAction(env, *np.array([-1, 1], actions.dtype))


def expert(env):
    """A scripted policy that reaches the goal, obs -> action. The learner never sees it."""
    act = getattr(env.unwrapped, "expert_action", None)
    if act is None:
        raise ValueError(f"no scripted expert here; there is one for {', '.join(TASKS)}")
    return act


# ---- python envs.py: a contact sheet of all tasks, and how fast they are ----
def episode(env, policy):
    """One episode's pictures [(200, 200, 3), ...] and progress [float, ...], start included."""
    obs, info = env.reset(seed=0)
    images, progress, over = [env.picture(200)], [info["progress"]], False
    while not over:
        obs, _, terminated, truncated, info = env.step(policy(obs))
        images.append(env.picture(200))
        progress.append(info["progress"])
        over = terminated or truncated
    return images, progress


def contact_row(env):
    """(200, 800, 3) uint8: start | random episode's end | expert halfway in progress | its end."""
    images, progress = episode(env, expert(env))
    half = np.argmin(np.abs(np.array(progress) - (progress[0] + progress[-1]) / 2))
    random_end = episode(env, lambda obs: env.action_space.sample())[0][-1]
    return np.concatenate([images[0], random_end, images[half], images[-1]], axis=1)


def random_step(env):
    """A step with a random action, and the reset where an episode ends: the cost training sees."""
    _, _, terminated, truncated, _ = env.step(env.action_space.sample())
    if terminated or truncated:
        env.reset()


def bounds(env, episodes):
    """What doing anything at random and what the expert reach -> {column: mean over episodes}."""
    found, policies = {"episodes": episodes}, {
        "random": lambda obs: env.action_space.sample(), "expert": expert(env)}
    env.action_space.seed(0)
    for who, policy in policies.items():
        rows = []
        for seed in range(episodes):
            obs, over, total = env.reset(seed=seed)[0], False, 0.0
            while not over:
                obs, reward, terminated, truncated, info = env.step(policy(obs))
                assert np.isfinite(obs).all() and np.isfinite([reward, info["progress"]]).all()
                total, over = total + reward, terminated or truncated
            rows.append((total, info["success"], info["progress"]))
        found.update(zip((f"{who}_{name}" for name in ("return", "success", "progress")),
                         np.round(np.mean(rows, axis=0), 4).tolist()))
    return found


def per_second(do, *args, seconds=0.5):
    """How often do(*args) runs in a second."""
    do(*args)
    count, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        do(*args)
        count += 1
    return count / (time.perf_counter() - start)


def main():
    parser = argparse.ArgumentParser(description="Draw all tasks and measure how fast they are.")
    parser.add_argument("--out", default="contact_envs.png", help="the picture, a row a task")
    parser.add_argument("--csv", help="write task, size, pictures_per_s, steps_per_s there")
    parser.add_argument("--bounds", help="only: write what random and expert episodes reach there")
    parser.add_argument("--episodes", type=int, default=20, help="of each (default: 20)")
    args = parser.parse_args()
    if args.bounds:
        rows = [{"task": name, **bounds(make(name), args.episodes)} for name in TASKS]
        with open(args.bounds, "w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
        return
    from PIL import Image

    sheet, table = [], [("task", "size", "pictures_per_s", "steps_per_s")]
    for name in TASKS:
        try:
            env = make(name)
            sheet.append(contact_row(env))
        except ValueError as error:
            print(f"{name:15s} left out: {error}")
            continue
        env.reset()
        steps = per_second(random_step, env)
        rates = {size: per_second(env.picture, size) for size in (84, 100, 200, 300)}
        pictures = "".join(f"{rate:6.0f} ({size} px)" for size, rate in rates.items())
        print(f"{name:15s}{steps:7.0f} steps/s, pictures/s:{pictures}")
        table += [(name, size, round(rate), round(steps)) for size, rate in rates.items()]
        env.close()
    Image.fromarray(np.concatenate(sheet)).save(args.out)
    print(f"{args.out}: start, end of a random episode, expert halfway, expert at the end")
    if args.csv:
        with open(args.csv, "w", newline="") as file:
            csv.writer(file).writerows(table)


if __name__ == "__main__":
    main()
