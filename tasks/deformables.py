"""Fold Cloth, Straighten Rope, Pass Water: RL-VLM-F's three soft tasks on plain MuJoCo.

No STEP is done here: STEP 1 acts in these worlds, STEP 7 reads their true reward:
  FoldCloth       one pick-and-place; reward = -10 * mean distance of the points to the goal
  StraightenRope  40 steps of two hands; reward = min(distance of the ends, 1.1 * rope length)
  PassWater       75 steps of a cup on a line; reward = -|x - 1.2| - 10 * share of drops outside

Differs from the original (SoftGym on PyFlex, which needs CUDA and a compiler):
1. MuJoCo: pip installs it, a CPU runs it. Geometry, action scale, observation, reward, horizon,
   success rule are kept, cameras too but the rope's, which looks from afar; stiffness, friction,
   damping are ours, not compared with PyFlex.
2. Particles 256, 41, 200, not 1600, 41, 4000; crumpled ropes 300, not 1000: speed. Water is soft
   spheres in gravity 4: hard ones in 9.81 lose their energy, a dash spills nothing: no task.
3. The cloth is let go at the end (the original holds on), so the image shows a finished fold.
4. A rope move is dropped if a *hand* would leave the table (there: any particle, which deadlocks),
   or if the hands would be over 1.1 rope lengths apart (there the rope stretches at will).
5. Axes are MuJoCo's, z up. The cloth's one step *terminates*: its value is its reward. Rope and
   water are *truncated* at .horizon. The environments do so themselves: no TimeLimit is needed.

Shapes: N particles (N, 3) metres. Actions Box(-1, 1): cloth (2,) place; rope (8,) = 2 hands x
(x, y, z, ignored grip flag); water (1,). Observations float32 (111,), (36,), (7,). info: success
(0 or 1), progress (larger is closer, visible), unstable; cloth: performance; water: spilled.
Unwrapped: .goal, .horizon, image(size), goal_image(size), expert_action(obs), close().
To use it elsewhere (stepping needs no OpenGL, images do):
    import gymnasium
    from tasks import deformables
    env = gymnasium.make("StraightenRope-v0")
    obs, info = env.reset(seed=0)
    obs, reward, terminated, truncated, info = env.step(env.unwrapped.expert_action(obs))
    print(reward, info["success"], info["progress"])
"""
import atexit
import os
import sys
import time
import weakref

import gymnasium
import numpy as np

CURE = "images need OpenGL, missing here; cure: apt-get install -y libegl1 libgl1-mesa-dri"

OPEN_RENDERERS = weakref.WeakSet()


class OpenGLMissing(RuntimeError):
    """There is no OpenGL, and an image was asked for. Stepping never raises this."""


def close_open_renderers():
    """Called when Python ends: open_renderer() says why."""
    for renderer in list(OPEN_RENDERERS):
        renderer.close()


def load_mujoco():
    """-> the module mujoco, which can draw without a screen.

    It is imported when a task is made, so that importing this file stays quick.
    """
    if sys.platform.startswith("linux") and not os.environ.get("DISPLAY"):
        os.environ.setdefault("MUJOCO_GL", "egl")  # mujoco reads it once, while it is imported
    try:
        import mujoco
    except (ImportError, AttributeError, OSError):
        # trap: MUJOCO_GL=egl without an EGL library or driver makes `import mujoco` itself fail.
        os.environ["MUJOCO_GL"] = "disabled"
        import mujoco
    return mujoco


# ---- The model: MJCF (MuJoCo's XML), written by Python ----
SCENE = """<mujoco model="{name}">
  <option solver="CG" {option}/>
  <size memory="64M"/>
  <default><default class="particle"><geom contype="2" conaffinity="3"/></default></default>
  <visual><quality offsamples="0" numslices="12" numstacks="8"/><map znear=".01"/>
    <headlight ambient=".4 .4 .4" diffuse=".3 .3 .3" specular="0 0 0"/></visual>
  <worldbody>
    <light directional="true" pos="0 0 3" dir="-.3 .3 -1" diffuse=".35 .35 .35" specular="0 0 0"/>
    <camera name="view" {camera}/>
    <geom type="plane" size="5 5 1" rgba=".86 .86 .84 1" {floor}/>
    {bodies}
  </worldbody>
  {more}
</mujoco>"""


def point_masses(points, radius, mass, damping, look):
    """points (N, 3), radius () or (N,) -> MJCF of N spheres p0, p1, ... that slide and never turn.

    look: more attributes of a sphere. qpos[3i : 3i + 3] is its displacement from points[i].
    """
    slides = "".join(f'<joint type="slide" axis="{a}" damping="{damping}"/>'
                     for a in ("1 0 0", "0 1 0", "0 0 1"))
    return "".join(
        f'<body name="p{i}" pos="{x} {y} {z}">{slides}'
        f'<geom class="particle" size="{r}" mass="{mass}" {look}/></body>'
        for i, ((x, y, z), r) in enumerate(zip(points, np.broadcast_to(radius, len(points)))))


def edges(name, pairs, stiffness=0, damping=0, look='group="5"'):
    """pairs (K, 2) of particle numbers -> 1-D flex: K springs, or rods if an <equality> names it.

    MuJoCo computes the force of a spring at the start of a timestep and holds it. So stiff springs
    explode: sqrt(8 * stiffness / mass) * timestep must stay well under 2.
    """
    n = pairs.max() + 1
    # Edges must touch nothing; the spheres do. trap: contype and conaffinity both 0 would say so,
    # but crash MuJoCo 3.3.0's compiler. With 8 and 0 nothing touches either.
    return (f'<flex name="{name}" dim="1" body="{" ".join(f"p{i}" for i in range(n))}" {look} '
            f'element="{" ".join(map(str, pairs.ravel()))}"><contact contype="8" conaffinity="0"/>'
            f'<edge stiffness="{stiffness}" damping="{damping}"/></flex>')


# A hand is a body without mass or shape that goes where it is put. A grip ties a hand to one
# particle; it does nothing until SoftBodyEnv.grip() says to which.
HAND = '<body name="hand{0}" mocap="true"/>'
GRIP = '<connect active="false" body1="hand{0}" body2="p0" anchor="0 0 0"/>'


# ---- What the three tasks share ----
class SoftBodyEnv(gymnasium.Env):
    """What the three tasks have in common. Each task adds:

    rest         (N, 3) where the particles are in the model, metres; the state is a displacement.
    mjcf()       -> the model, in MuJoCo's XML.
    begin()      bring the state to the start of an episode; only self.np_random may be random.
    move(action) one step of ours, which is many steps of the physics.
    observe()    -> the observation, (O,) float32.
    score()      -> true reward, success, progress, {more for info}.
    show_goal()  bring the state to the goal, for goal_image().
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 15}
    goal, horizon, horizon_terminates = "", 1, False

    def __init__(self, action_size, obs_size, render_mode="rgb_array"):
        self.mujoco, self.render_mode = load_mujoco(), render_mode
        self.action_space = gymnasium.spaces.Box(-1, 1, (action_size,), np.float32)
        self.observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (obs_size,), np.float32)
        self.model = self.mujoco.MjModel.from_xml_string(self.mjcf())
        self.data = self.mujoco.MjData(self.model)
        self.renderers = {}  # image size -> mujoco.Renderer

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.restart()
        return self.observe(), self.judge()[1]

    def restart(self):
        """Nothing of earlier episodes survives: only self.np_random decides how one begins."""
        self.steps = 0
        self.mujoco.mj_resetData(self.model, self.data)
        self.begin()
        self.mujoco.mj_forward(self.model, self.data)

    def step(self, action):
        action = np.asarray(action, dtype=np.float64)  # (A,)
        if action.shape != self.action_space.shape or not np.isfinite(action).all():
            raise ValueError(f"action: {self.action_space.shape} finite numbers, got {action}")
        self.move(action.clip(-1, 1))
        self.steps += 1
        reward, info = self.judge()
        over, final = self.steps >= self.horizon, self.horizon_terminates
        return self.observe(), reward, over and final, over and not final, info

    def judge(self):
        """-> the true reward of the state, and info."""
        reward, success, progress, more = self.score()
        # trap: MuJoCo answers a NaN by starting over in silence, and returns still look plausible.
        warned = any(warning.number for warning in self.data.warning)
        unstable = bool(warned or np.abs(self.particles()).max() > 10)  # metres
        return float(reward), {"success": int(success and not unstable), "unstable": unstable,
                               "progress": float(progress), **more}

    # -- the state --
    def particles(self):
        """-> (N, 3) positions, in metres."""
        return self.rest + self.data.qpos[: self.rest.size].reshape(-1, 3)

    def place(self, points):
        """Put the particles at points (N, 3), metres."""
        self.data.qpos[: self.rest.size] = (points - self.rest).ravel()

    def grip(self, hand, particle):
        """Take particle number `particle` in hand number `hand`, where it is."""
        self.data.mocap_pos[hand] = self.particles()[particle]
        self.model.eq_obj2id[hand] = self.model.body(f"p{particle}").id
        # trap: a connect keeps the distance its bodies had in the XML, unless that is set to zero.
        self.model.eq_data[hand, :6] = 0
        self.data.eq_active[hand] = 1

    def simulate(self, steps=1):
        self.mujoco.mj_step(self.model, self.data, nstep=steps)

    # -- images --
    def image(self, size):
        """-> (size, size, 3) uint8, drawn at that size: no shadows, no multisampling, no hands."""
        if not 16 <= size <= 2048:
            raise ValueError(f"an image's size is 16 to 2048 pixels, got {size}")
        if size not in self.renderers:
            self.renderers[size] = self.open_renderer(size)
        # After mj_step, what is drawn is one step of the physics behind qpos. These two functions
        # bring it up to date; a whole mj_forward would do more than is needed.
        self.mujoco.mj_kinematics(self.model, self.data)
        self.mujoco.mj_flex(self.model, self.data)
        self.renderers[size].update_scene(self.data, camera="view", scene_option=self.look)
        return self.paint(self.renderers[size].render())

    def open_renderer(self, size):
        mujoco, view = self.mujoco, self.model.vis.global_
        view.offwidth = view.offheight = size
        # trap: Python closes a renderer even if its making failed, and close() reads these two.
        mujoco.Renderer._gl_context = mujoco.Renderer._mjr_context = None
        try:
            renderer = mujoco.Renderer(self.model, size, size)
        except Exception as error:  # every OpenGL back end has exceptions of its own
            raise OpenGLMissing(CURE) from error
        # trap: a renderer still open when Python ends makes EGL print tracebacks. Exit runs
        # functions last in, first out: after mujoco's own, this one still finds OpenGL at work.
        atexit.unregister(close_open_renderers)
        atexit.register(close_open_renderers)
        OPEN_RENDERERS.add(renderer)
        for flag in ("SHADOW", "REFLECTION", "SKYBOX", "HAZE", "FOG"):
            renderer.scene.flags[getattr(mujoco.mjtRndFlag, f"mjRND_{flag}")] = 0
        self.look = mujoco.MjvOption()
        self.look.flexgroup[5] = self.look.geomgroup[5] = 0  # group 5: what only the physics needs
        self.look.flags[mujoco.mjtVisFlag.mjVIS_FLEXVERT] = False
        return renderer

    def goal_image(self, size):
        """-> the image of the reached goal; the episode goes on as if nothing had happened."""
        before = self.data.qpos.copy()
        try:
            self.show_goal()
            return self.image(size)
        finally:
            self.data.qpos[:] = before

    def paint(self, image):
        """What a task draws over the image; nothing, here."""
        return image

    def render(self):
        return self.image(300)

    def close(self):
        while self.renderers:
            self.renderers.popitem()[1].close()


# ---- Fold Cloth ----
class FoldCloth(SoftBodyEnv):
    """A hand holds the top left corner; the action says where to put it, in units of 15 cm.

    The goal is where the expert's own action leads, as in the original, so the expert's distance
    of 0.00 proves nothing. What shows that the task can be learned is that a place a few
    millimetres off succeeds too (tests/test_deformables.py).
    """

    goal = "to fold the cloth diagonally from top left corner to bottom right corner"
    horizon, horizon_terminates = 1, True
    SIDE, GRID, REACH = 0.244, 16, 0.15  # metres, particles along a side, metres
    RADIUS = 0.4 * SIDE / (GRID - 1)  # under half the spacing: neighbours do not touch
    goal_points = None  # (256, 3), computed once a process

    def __init__(self, render_mode="rgb_array"):
        line = np.linspace(-self.SIDE / 2, self.SIDE / 2, self.GRID)
        x, y = np.meshgrid(line, line[::-1])  # particle 0 is the top left corner, seen from above
        self.rest = np.stack([x, y, np.full_like(x, self.RADIUS)], axis=-1).reshape(-1, 3)
        number = np.arange(self.GRID**2).reshape(self.GRID, self.GRID)
        self.keys = number[::3, ::3].ravel()  # (36,) the 6 x 6 key points that are observed
        super().__init__(2, 36 * 3 + 3, render_mode)
        if FoldCloth.goal_points is None:
            self.restart()
            self.move(self.expert_action(None).astype(np.float64))
            FoldCloth.goal_points = self.particles()

    def mjcf(self):
        n = self.GRID
        at = np.arange(n * n).reshape(n, n)

        def join(*sides):  # pairs of equal-shaped blocks of particle numbers -> (K, 2)
            return np.concatenate([np.stack([a.ravel(), b.ravel()], axis=1) for a, b in sides])

        links = join((at[:, 1:], at[:, :-1]), (at[1:], at[:-1]))
        shear = join((at[1:, 1:], at[:-1, :-1]), (at[1:, :-1], at[:-1, 1:]))
        bend = join((at[:, 2:], at[:, :-2]), (at[2:], at[:-2]))
        a, b, c, d = (q.ravel() for q in (at[:-1, :-1], at[:-1, 1:], at[1:, :-1], at[1:, 1:]))
        faces = np.concatenate([np.stack([a, c, b], axis=1), np.stack([b, c, d], axis=1)])
        # Layers touch through their spheres: a 2-D flex that meets itself is 4 times slower.
        cloth = point_masses(self.rest, self.RADIUS, 0.1 / n**2, 6e-3, 'friction="1" group="5"')
        return SCENE.format(
            # trap: with 8 solver iterations the cloth explodes now and then, with 10 its corners
            # fly; 15 do, 25 leave a margin.
            name="cloth", option='timestep=".005" iterations="25" impratio="5"',
            camera='pos="0 0 .42" fovy="45"', floor='friction="1"', bodies=HAND.format(0) + cloth,
            more="<deformable>" + edges("links", links) + edges("shear", shear, 5)
            + edges("bend", bend, 0.75) + self.skin("front", faces, ".85 .12 .12 1")
            + self.skin("back", faces[:, ::-1], ".98 .83 .1 1") + "</deformable><equality>"
            + GRIP.format(0) + '<flex flex="links" solref=".01 1"/></equality>')

    def skin(self, name, faces, rgba):
        """One side of the cloth as seen: faces (K, 3); a face is drawn from its front alone."""
        bones = "".join(f'<bone body="p{i}" bindpos="{x} {y} {z}" bindquat="1 0 0 0" vertid="{i}" '
                        f'vertweight="1"/>' for i, (x, y, z) in enumerate(self.rest))
        return (f'<skin name="{name}" rgba="{rgba}" inflate=".0015" '
                f'vertex="{" ".join(map(str, self.rest.ravel()))}" '
                f'face="{" ".join(map(str, faces.ravel()))}">{bones}</skin>')

    def begin(self):
        self.grip(0, 0)

    def move(self, action):
        """action (2,): a whole pick-and-place. Lift 6 cm, carry, lower, let go, wait .5 s."""
        x, y, z = self.data.mocap_pos[0]
        goal_x, goal_y = action * self.REACH
        self.carry((0, 0, 0.06), speed=0.6)
        self.carry((goal_x - x, goal_y - y, 0), speed=0.5)
        self.carry((0, 0, 3 * self.RADIUS - z - 0.06), speed=0.6)
        self.data.eq_active[0] = 0
        self.simulate(100)

    def carry(self, way, speed):
        """Move the hand by `way` (3,) metres at `speed` metres per second."""
        steps = int(np.ceil(np.linalg.norm(way) / speed / self.model.opt.timestep))
        for _ in range(steps):
            self.data.mocap_pos[0] += np.divide(way, steps)
            self.simulate()

    def observe(self):
        return np.append(self.particles()[self.keys], self.data.mocap_pos[0]).astype(np.float32)

    def score(self):
        start = np.linalg.norm(self.rest - self.goal_points, axis=1).mean()
        distance = np.linalg.norm(self.particles() - self.goal_points, axis=1).mean()
        performance = float((start - distance) / start)  # 0 = untouched, 1 = the goal
        return -10 * distance, performance > 0.9, -distance, {"performance": performance}

    def show_goal(self):
        self.place(self.goal_points)

    def expert_action(self, obs):
        """The held corner onto the opposite one."""
        return np.array([1, -1], dtype=np.float32) * (self.SIDE / 2 / self.REACH)


# ---- Straighten Rope ----
class StraightenRope(SoftBodyEnv):
    """Two hands hold the ends of a crumpled rope; an action moves each by up to 6 cm an axis."""

    goal = "to straighten the blue rope"
    horizon = 40
    LENGTH, LINKS, RADIUS, STATES = 0.5, 40, 0.008, 300  # metres, rods, metres, crumpled starts
    LOW, HIGH, EDGE, REACH = 0.02, 0.28, 0.325, 0.01  # a hand's height, table edge, move per 10 ms
    states = {}  # number of a start -> (41, 3); made when first drawn, kept for the process

    def __init__(self, render_mode="rgb_array"):
        n = self.LINKS + 1
        self.rest = np.full((n, 3), [0, 0, self.RADIUS])
        self.rest[:, 0] = np.linspace(-self.LENGTH / 2, self.LENGTH / 2, n)
        self.keys = np.linspace(0, n - 1, 10).round().astype(int)  # (10,) observed particles
        super().__init__(8, 10 * 3 + 2 * 3, render_mode)

    def mjcf(self):
        n, blue = len(self.rest), 'rgba=".1 .25 .9 1"'

        def apart(k):  # -> (n - k, 2) particles k apart
            return np.stack([np.arange(n - k), np.arange(k, n)], axis=1)

        ball = f'<geom size=".011" contype="0" conaffinity="0" mass="0" {blue}/></body>'
        rope = point_masses(self.rest, self.RADIUS, 0.5 / n, 1e-3, 'friction=".8" group="5"')
        overlap = "".join(f'<exclude body1="p{a}" body2="p{b}"/>'
                          for k in (1, 2) for a, b in apart(k))
        return SCENE.format(
            # 5 ms is twice as fast, but then the ends lag 2 cm behind and the rope stretches.
            name="rope", option='timestep=".0025" iterations="40" integrator="implicitfast"',
            # trap: from nearby, hands held high are closer to the camera and look farther apart: a
            # crumpled rope would look as long as a straight one. So the camera is far away.
            camera='pos="0 0 3.4" fovy="11.8"', floor='friction=".8"',
            # Seen: the flex, a ball at each joint. Hidden: the smaller spheres of the physics.
            bodies=HAND.format(0) + HAND.format(1) + rope.replace("</body>", ball),
            more="<deformable>" + edges("links", apart(1), look=f'radius=".011" {blue}')
            # With weaker springs against bending, the rope folds into a zigzag.
            + edges("bend2", apart(2), 60, 0.1) + edges("bend4", apart(4), 30) + "</deformable>"
            f"<contact>{overlap}</contact><equality>" + GRIP.format(0) + GRIP.format(1) +
            '<flex flex="links" solref=".005 1" solimp=".99 .99 .001"/></equality>')

    def begin(self):
        number = int(self.np_random.integers(self.STATES))
        if number not in self.states:
            # Each start has a generator of its own: start 7 is the same rope whichever starts were
            # drawn before.
            self.states[number] = self.crumple(np.random.default_rng(number))
            self.mujoco.mj_resetData(self.model, self.data)
        self.place(self.states[number])
        self.grip(0, 0)
        self.grip(1, self.LINKS)

    def crumple(self, rng):
        """-> (41, 3): the straight rope after four random pick-and-drops, centred."""
        for _ in range(4):
            self.grip(0, int(rng.integers(len(self.rest))))
            turn, far, lift = rng.uniform([0, 0.1, 0.03], [2 * np.pi, 0.3, 0.1])
            for _ in range(40):
                way = np.array([far * np.cos(turn), far * np.sin(turn), lift])
                self.data.mocap_pos[0] += way / 40
                self.simulate(4)
            self.data.eq_active[0] = 0
            self.simulate(100)
        points = self.particles()
        return points - [*points[:, :2].mean(axis=0), 0]

    def move(self, action):
        """action (8,): 2 hands x (x, y, z, grip flag); the flag is ignored, as in the original."""
        shift = self.REACH * action.reshape(2, 4)[:, :3]
        hands = self.data.mocap_pos  # (2, 3), a view: writing moves the hands
        for _ in range(6):
            new = hands + shift
            new[:, 2] = new[:, 2].clip(self.LOW, self.HIGH)
            on_table = np.abs(new[:, :2]).max() <= self.EDGE
            if on_table and np.linalg.norm(new[0] - new[1]) <= 1.1 * self.LENGTH:
                hands[:] = new
            self.simulate(4)

    def observe(self):
        return np.append(self.particles()[self.keys], self.data.mocap_pos).astype(np.float32)

    def score(self):
        points = self.particles()
        distance = np.linalg.norm(points[0] - points[-1])
        reward = min(distance, 1.1 * self.LENGTH)
        return reward, distance >= 0.95 * self.LENGTH, reward, {}

    def show_goal(self):
        self.place(self.rest)

    def expert_action(self, obs):
        """Pull the hands apart along their line, to a rope's length about the table's centre."""
        hands = np.asarray(obs, dtype=np.float64)[-6:].reshape(2, 3)
        line = (hands[1] - hands[0]) * [1, 1, 0]
        length = np.linalg.norm(line)
        line = line / length if length > 0.02 else np.array([1.0, 0, 0])
        target = np.stack([-line, line]) * self.LENGTH / 2 + [0, 0, self.LOW]
        action = np.zeros((2, 4), dtype=np.float32)
        action[:, :3] = ((target - hands) / (6 * self.REACH)).clip(-1, 1)
        return action.ravel()


# ---- Pass Water ----
class PassWater(SoftBodyEnv):
    """A cup full of water slides along x; each action moves it by at most 8.8 cm, at 1.1 m/s.

    What is spilled counts in progress wherever it lies: drops that fell far from the target are
    beyond the image's edge, and there only the cup, less full, tells of them.
    """

    goal = ("to move the container, which holds water, to be as close to the red circle as "
            "possible without causing too many water droplets to spill")
    horizon = 75
    DROPS, RADIUS, WALL, TALL = 200, 0.0173, 0.045, 0.7  # metres; TALL: while the water settles
    WIDTHS, FREEBOARD = (0.2025, 0.21, 0.2175), 0.02  # inside; rim above the highest drop
    TARGET, LOW, HIGH, REACH = 1.2, -0.25, 1.4, 0.011  # along x; metres per 10 ms
    settled = {}  # (width, depth) -> water at rest (200, 3), rim height

    def __init__(self, render_mode="rgb_array"):
        rng = np.random.default_rng(0)
        layer, heights = 0.039 * (np.arange(5) - 2), 0.07 + 0.04 * np.arange(self.DROPS // 25)
        grid = np.stack(np.meshgrid(layer, layer, heights, indexing="ij"), axis=-1).reshape(-1, 3)
        # trap: a perfect grid of drops stays in columns, 9 cm too high; a few mm of disorder help.
        self.rest = grid + rng.uniform(-0.004, 0.004, grid.shape)
        self.radii = self.RADIUS * rng.uniform(0.9, 1.1, self.DROPS)  # equal drops would crystallise
        self.cup = self.rest.size  # where the cup's x is in qpos and qvel
        super().__init__(1, 7, render_mode)
        self.walls = [self.model.geom(f"wall{i}").id for i in range(5)]
        # trap: a geom compiled at its body's origin ignores geom_pos, which shape_cup() sets.
        self.model.geom_sameframe[self.walls] = 0

    def mjcf(self):
        # The walls are heavy, and first in priority, which means that their contact parameters hold
        # and not the water's: the cup pushes the water, but the water never moves the cup.
        wall = 'mass="1000" condim="1" priority="1" solref=".02 1" rgba=".55 .6 .65 .35"'
        # The walls are compiled larger than those of any cup, because MuJoCo looks for contacts
        # only within the bounds that a geom had when it was compiled.
        walls = "".join(f'<geom name="wall{i}" type="box" size=".2 .2 {self.TALL}" {wall}/>'
                        for i in range(5))
        # Soft and without friction (stiffness 300, damping 4): the nearest spheres come to liquid.
        soft = 'condim="1" solref="-300 -4" solimp=".95 .95 .001" rgba=".15 .4 .95 1"'
        return SCENE.format(
            name="water", option='timestep=".01" iterations="15" gravity="0 0 -4"',
            camera='pos=".53 -1 2" xyaxes="1 0 0 0 .8660254 .5" fovy="45"',
            # A spilled drop stays where it falls.
            floor='condim="3" friction=".8" priority="1" solref=".02 1"',
            bodies=point_masses(self.rest, self.radii, 0.01, 0, soft)
            + f'<body><joint type="slide" axis="1 0 0"/>{walls}</body>', more="")

    def shape_cup(self, width, depth, height):
        """Make the five boxes (floor, left, right, front, back) a cup of these inner sizes."""
        t, w, d, h = self.WALL / 2, width / 2, depth / 2, height / 2
        boxes = [((0, 0, t), (w + 2 * t, d + 2 * t, t)),
                 ((-w - t, 0, h), (t, d + 2 * t, h)), ((w + t, 0, h), (t, d + 2 * t, h)),
                 ((0, -d - t, h), (w, t, h)), ((0, d + t, h), (w, t, h))]
        for wall, (centre, half_size) in zip(self.walls, boxes):
            self.model.geom_pos[wall], self.model.geom_size[wall] = centre, half_size

    def begin(self):
        width, depth = self.np_random.choice(self.WIDTHS, size=2)
        if (width, depth) not in self.settled:
            self.shape_cup(width, depth, self.TALL)
            for _ in range(500):
                self.slide(0)
            points = self.particles()
            self.settled[width, depth] = points, points[:, 2].max() + self.FREEBOARD
            self.mujoco.mj_resetData(self.model, self.data)
        points, height = self.settled[width, depth]
        self.size = width, depth, height
        self.shape_cup(*self.size)
        self.place(points)

    def slide(self, way):
        """10 ms, during which the cup goes `way` metres, whatever the water does."""
        qpos, qvel = self.data.qpos, self.data.qvel
        x = float(np.clip(qpos[self.cup] + way, self.LOW, self.HIGH))
        # The cup is a joint that we drive: it has a velocity, which the water feels. A mocap body,
        # as the hands are, has none.
        qvel[self.cup] = (x - qpos[self.cup]) / self.model.opt.timestep
        self.simulate()
        qpos[self.cup], qvel[self.cup] = x, 0

    def move(self, action):
        for _ in range(8):
            self.slide(self.REACH * action[0])

    def spilled(self):
        """-> share of the drops outside the cup."""
        width, depth, height = self.size
        x, y, z = (self.particles() - [self.data.qpos[self.cup], 0, 0]).T  # each (200,)
        inside = (np.abs(x) < width / 2) & (np.abs(y) < depth / 2) & (z < height + self.RADIUS)
        return float(1 - inside.mean())

    def observe(self):
        """-> (7,): the cup's x, width, depth, height; the highest drop, m; shares inside, outside."""
        out = self.spilled()
        top = self.particles()[:, 2].max()
        return np.array([self.data.qpos[self.cup], *self.size, top, 1 - out, out], np.float32)

    def score(self):
        out = self.spilled()
        reward = -abs(self.TARGET - self.data.qpos[self.cup]) - 10 * out
        return reward, reward > -0.36, reward, {"spilled": out}

    def show_goal(self):
        self.place(self.settled[self.size[:2]][0] + [self.TARGET, 0, 0])
        self.data.qpos[self.cup] = self.TARGET

    def paint(self, image):
        """The red circle, over everything, at the original's pixels: that is where x = 1.2 is."""
        row, column = (np.mgrid[: len(image), : len(image)] + 0.5) * 720 / len(image)
        image[(column - 632) ** 2 + (row - 394) ** 2 < 20**2] = (230, 20, 20)
        return image

    def expert_action(self, obs):
        """Speed up and slow down at 0.8 m/s^2: v = sqrt(2 * a * way gone), then way left."""
        x = max(float(obs[0]), 0)
        left = max(self.TARGET - x, 0)
        speed = min(np.sqrt(2 * 0.8 * (x + 0.01)), np.sqrt(2 * 0.8 * left), left / 0.08)
        return np.array([speed / 1.1], dtype=np.float32).clip(-1, 1)


for _task in (FoldCloth, StraightenRope, PassWater):
    if f"{_task.__name__}-v0" not in gymnasium.registry:
        gymnasium.register(f"{_task.__name__}-v0", entry_point=f"{__name__}:{_task.__name__}")


# ---- Demo: a contact sheet and the figures ----
def play(env, act, seed):
    """One episode of act(obs) -> action. -> its return, and whether it ended in success."""
    obs, total, over = env.reset(seed=seed)[0], 0.0, False
    while not over:
        obs, reward, terminated, truncated, info = env.step(act(obs))
        total, over = total + reward, terminated or truncated
    return total, info["success"]


def main(file="contact_deformables.png", episodes=10):
    import imageio.v3 as imageio

    rows = []
    for env in (FoldCloth(), StraightenRope(), PassWater()):
        print(f"{type(env).__name__}: {env.goal}")
        env.action_space.seed(0)
        env.reset(seed=0)
        row = [env.image(300)]
        for name, act in (("random", lambda obs: env.action_space.sample()),
                          ("expert", env.expert_action)):
            begin = time.perf_counter()
            returns, success = zip(*(play(env, act, seed) for seed in range(episodes)))
            rate = episodes * env.horizon / (time.perf_counter() - begin)
            print(f"  {name} return {np.mean(returns):8.2f} +- {np.std(returns):.2f}, "
                  f"success {np.mean(success):.1f}, {rate:.0f} steps/s")
            row.append(env.image(300))
        row.append(env.goal_image(300))
        for size in (84, 300):
            begin = time.perf_counter()
            images = [env.image(size) for _ in range(50)]
            print(f"  {len(images) / (time.perf_counter() - begin):.0f} images/s, {size} px")
        frame = ((3, 3), (3, 3), (0, 0))  # white, between the images
        rows.append(np.concatenate([np.pad(p, frame, constant_values=255) for p in row], axis=1))
        env.close()
    imageio.imwrite(file, np.concatenate(rows))
    print(f"wrote {file}: start, random's end, expert's end, goal")


if __name__ == "__main__":
    try:
        main()
    except OpenGLMissing as error:
        sys.exit(str(error))
