import os
import sys

import gymnasium
import numpy as np

CURE = "pictures need OpenGL, which is missing here: apt-get install -y libegl1 libgl1-mesa-dri"


class OpenGLMissing(RuntimeError):
    """Raised by picture() and render() alone: the physics never needs OpenGL."""


def load_mujoco():
    """Import mujoco, with off-screen pictures where possible and without pictures where not."""
    if sys.platform.startswith("linux") and not os.environ.get("DISPLAY"):
        os.environ.setdefault("MUJOCO_GL", "egl")  # read once, while mujoco is imported
    try:
        import mujoco
    except (ImportError, AttributeError, OSError):
        # trap: with MUJOCO_GL=egl but no EGL library or driver, `import mujoco` itself fails.
        if os.environ.get("MUJOCO_GL") == "disabled":
            raise
        os.environ["MUJOCO_GL"] = "disabled"
        import mujoco
    return mujoco


# ---- MJCF, written by Python ----
def point_masses(points, radius, mass, damping, geom):
    """points (N, 3) -> MJCF of N bodies p0, p1, ...: a sphere on three slide joints (no rotation)."""
    axes = ("1 0 0", "0 1 0", "0 0 1")
    joints = "".join(f'<joint type="slide" axis="{a}" damping="{damping}"/>' for a in axes)
    radius = np.broadcast_to(radius, len(points))
    return "".join(
        f'<body name="p{i}" pos="{x} {y} {z}">{joints}'
        f'<geom class="particle" size="{r:.6f}" mass="{mass}" {geom}/></body>'
        for i, ((x, y, z), r) in enumerate(zip(points, radius))
    )


def springs(name, pairs, n, stiffness=0.0, damping=0.0, look='group="5"', radius=0.001):
    """pairs: (K, 2) particle numbers -> a 1-D flex: K springs, or K rods if named in <equality>."""
    bodies = " ".join(f"p{i}" for i in range(n))
    element = " ".join(str(i) for i in np.ravel(pairs))
    # trap: contype 0 and conaffinity 0 crash MuJoCo 3.3.0's compiler; 8 and 0 touch nothing either.
    return (
        f'<flex name="{name}" dim="1" body="{bodies}" element="{element}" radius="{radius}" {look}>'
        f'<contact contype="8" conaffinity="0" selfcollide="none" internal="false"/>'
        f'<edge stiffness="{stiffness}" damping="{damping}"/></flex>'
    )


SCENE = """<mujoco model="{name}">
  <compiler angle="radian"/>
  <size memory="64M"/>
  <option {option}/>
  <default><default class="particle"><geom type="sphere" contype="2" conaffinity="3"/></default></default>
  <visual>
    <quality offsamples="0"/><headlight ambient=".45 .45 .45" diffuse=".35 .35 .35" specular="0 0 0"/>
    <map znear=".01"/>
  </visual>
  <worldbody>
    <light directional="true" pos="0 0 3" dir="-.3 .3 -1" diffuse=".45 .45 .45" specular="0 0 0" castshadow="false"/>
    <camera name="view" fovy="45" {camera}/>
    <geom name="floor" type="plane" size="5 5 1" rgba="{floor}" {floor_contact}/>
    {world}
  </worldbody>
  {rest}
</mujoco>"""


class SoftBodyEnv(gymnasium.Env):
    metadata = {"render_modes": ["rgb_array"], "render_fps": 15}
    goal = ""
    horizon = 1
    horizon_terminates = False
    gripped = ()

    def __init__(self, action_size, obs_size, render_mode="rgb_array"):
        self.mujoco = load_mujoco()
        self.render_mode = render_mode
        self.action_space = gymnasium.spaces.Box(-1, 1, (action_size,), np.float32)
        self.observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (obs_size,), np.float32)
        self.model = self.mujoco.MjModel.from_xml_string(self.mjcf())
        self.data = self.mujoco.MjData(self.model)
        self.renderers = {}  # size in pixels -> Renderer

    # -- what a task defines --
    def mjcf(self):
        raise NotImplementedError

    # -- Gymnasium --
    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.mujoco.mj_resetData(self.model, self.data)
        self.steps = 0
        self.begin()
        self.mujoco.mj_forward(self.model, self.data)
        return self.observe(), self.judge()[1]

    def step(self, action):
        action = np.asarray(action, dtype=np.float64)
        if action.shape != self.action_space.shape or not np.isfinite(action).all():
            raise ValueError(f"action must be {self.action_space.shape} finite numbers, got {action}")
        self.move(np.clip(action, -1, 1))
        self.steps += 1
        reward, info = self.judge()
        over = self.steps >= self.horizon
        return (self.observe(), reward, over and self.horizon_terminates,
                over and not self.horizon_terminates, info)

    def judge(self):
        reward, success, progress, extra = self.score()
        unstable = any(w.number for w in self.data.warning)
        return float(reward), {"success": int(success and not unstable),
                               "progress": float(progress), "unstable": bool(unstable), **extra}

    def particles(self):
        n = len(self.rest)
        return self.rest + self.data.qpos[: 3 * n].reshape(n, 3)

    def place(self, points):
        n = len(self.rest)
        self.data.qpos[: 3 * n] = (points - self.rest).ravel()

    def substeps(self, n):
        self.mujoco.mj_step(self.model, self.data, nstep=n)

    def grip(self, hand, particle, at):
        self.model.eq_data[hand, :6] = 0
        self.model.eq_obj2id[hand] = self.model.body(f"p{particle}").id
        self.data.mocap_pos[hand] = at
        self.data.eq_active[hand] = 1

    # -- pictures --
    def picture(self, size):
        if size not in self.renderers:
            self.renderers[size] = self.make_renderer(size)
        renderer = self.renderers[size]
        self.mujoco.mj_kinematics(self.model, self.data)
        self.mujoco.mj_flex(self.model, self.data)
        renderer.update_scene(self.data, camera="view", scene_option=self.look)
        return self.paint(renderer.render())

    def paint(self, image):
        return image

    def make_renderer(self, size):
        mujoco = self.mujoco
        self.model.vis.global_.offwidth = self.model.vis.global_.offheight = size
        renderer = mujoco.Renderer(self.model, size, size)
        for flag in ("SHADOW", "REFLECTION", "SKYBOX", "HAZE", "FOG"):
            renderer.scene.flags[getattr(mujoco.mjtRndFlag, f"mjRND_{flag}")] = False
        self.look = mujoco.MjvOption()
        self.look.flexgroup[5] = self.look.geomgroup[5] = 0
        self.look.flags[mujoco.mjtVisFlag.mjVIS_FLEXVERT] = False
        return renderer

    def render(self):
        return self.picture(300)

    def close(self):
        for r in self.renderers.values():
            r.close()
        self.renderers = {}


class FoldCloth(SoftBodyEnv):
    goal = "to fold the cloth diagonally from top left corner to bottom right corner"
    horizon = 1
    horizon_terminates = True
    N, SIDE = 16, 0.244
    REACH = 0.15
    goal_points = None
    SPACING = SIDE / (N - 1)
    RADIUS = 0.4 * SPACING

    def __init__(self, render_mode="rgb_array"):
        line = (np.arange(self.N) - (self.N - 1) / 2) * self.SPACING
        x, y = np.meshgrid(line, -line)
        self.rest = np.stack([x.ravel(), y.ravel(), np.full(x.size, self.RADIUS)], axis=1)
        super().__init__(2, 36 * 3 + 3, render_mode)
        keys = np.arange(0, self.N, 3)
        self.keys = (keys[:, None] * self.N + keys).ravel()
        if FoldCloth.goal_points is None:
            self.reset()
            self.pick_and_place(self.expert_action(None) * self.REACH)
            FoldCloth.goal_points = self.particles()

    def mjcf(self):
        n, number = self.N, np.arange(self.N**2).reshape(self.N, self.N)
        pairs = lambda a, b: np.stack([a.ravel(), b.ravel()], axis=1)
        links = np.concatenate([pairs(number[:, 1:], number[:, :-1]), pairs(number[1:], number[:-1])])
        shear = np.concatenate([pairs(number[1:, 1:], number[:-1, :-1]), pairs(number[1:, :-1], number[:-1, 1:])])
        bend = np.concatenate([pairs(number[:, 2:], number[:, :-2]), pairs(number[2:], number[:-2])])
        a, b, c, d = (q.ravel() for q in (number[:-1, :-1], number[:-1, 1:], number[1:, :-1], number[1:, 1:]))
        up = np.concatenate([np.stack([a, c, b], 1), np.stack([b, c, d], 1)])
        skins = self.skin("front", up, ".85 .12 .12 1") + self.skin("back", up[:, ::-1], ".98 .83 .1 1")
        count = n * n
        return SCENE.format(
            name="cloth", option='timestep=".005" solver="CG" iterations="20" impratio="5"',
            camera='pos="0 0 .42"', floor=".72 .74 .76 1", floor_contact='condim="3" friction="1"',
            world='<body name="hand0" mocap="true" pos="{} {} {}"/>'.format(*self.rest[0])
            + point_masses(self.rest, self.RADIUS, 0.1 / count, 6e-3, 'condim="3" friction="1" group="5"'),
            rest="<deformable>" + springs("links", links, count) + springs("shear", shear, count, 5)
            + springs("bend", bend, count, 0.75) + skins + "</deformable>"
            '<equality><connect name="grip" body1="hand0" body2="p0" anchor="0 0 0"/>'
            '<flex flex="links" solref=".01 1"/></equality>',
        )

    def skin(self, name, faces, rgba):
        vertex = " ".join(f"{v:.6f}" for v in self.rest.ravel())
        face = " ".join(str(i) for i in faces.ravel())
        bones = "".join(
            f'<bone body="p{i}" bindpos="{x} {y} {z}" bindquat="1 0 0 0" vertid="{i}" vertweight="1"/>'
            for i, (x, y, z) in enumerate(self.rest))
        return f'<skin name="{name}" rgba="{rgba}" inflate=".0015" vertex="{vertex}" face="{face}">{bones}</skin>'

    def begin(self):
        self.grip(0, 0, self.rest[0])

    def move(self, action):
        self.pick_and_place(action * self.REACH)

    def pick_and_place(self, xy):
        hand = self.data.mocap_pos[0]
        def go(delta, step):
            k = max(1, int(np.ceil(np.linalg.norm(delta) / step)))
            for _ in range(k):
                hand[:] += delta / k
                self.substeps(2)
        go(np.array([0, 0, .06]), .006)
        go(np.array([xy[0] - hand[0], xy[1] - hand[1], 0]), .005)
        go(np.array([0, 0, 3 * self.RADIUS - hand[2]]), .006)
        self.data.eq_active[0] = 0
        self.substeps(100)

    def observe(self):
        return np.concatenate([self.particles()[self.keys].ravel(), self.data.mocap_pos[0]]).astype(np.float32)

    def score(self):
        if self.goal_points is None:
            return 0, 0, 0, {}
        d = np.linalg.norm(self.particles() - self.goal_points, axis=1).mean()
        d0 = np.linalg.norm(self.rest - self.goal_points, axis=1).mean()
        performance = (d0 - d) / d0
        return -10 * d, performance > 0.9, -d, {"performance": float(performance)}

    def expert_action(self, obs):
        return np.array([1, -1], dtype=np.float32) * np.float32(self.SIDE / 2 / self.REACH)


class StraightenRope(SoftBodyEnv):
    goal = "to straighten the blue rope"
    horizon = 40
    N, LENGTH, STATES = 41, 0.5, 300
    states = {}

    def __init__(self, render_mode="rgb_array"):
        self.rest = np.zeros((self.N, 3))
        self.rest[:, 0] = np.linspace(-self.LENGTH / 2, self.LENGTH / 2, self.N)
        self.rest[:, 2] = 0.008
        super().__init__(8, 10 * 3 + 2 * 3, render_mode)
        self.keys = np.linspace(0, self.N - 1, 10).round().astype(int)

    def mjcf(self):
        n = self.N
        skip = lambda k: np.stack([np.arange(n - k), np.arange(k, n)], axis=1)
        exclude = "".join(f'<exclude body1="p{a}" body2="p{b}"/>' for k in (1, 2) for a, b in skip(k))
        blue = 'rgba=".1 .25 .9 1"'
        world = "".join(f'<body name="hand{h}" mocap="true"/>' for h in (0, 1))
        bodies = point_masses(self.rest, 0.008, 0.5 / n, 1e-3, 'friction=".8" group="5"')
        bodies = bodies.replace("</body>", f'<geom type="sphere" size=".011" contype="0" conaffinity="0" mass="0" {blue}/></body>')
        return SCENE.format(
            name="rope", option='timestep=".0025" solver="CG" iterations="40" integrator="implicitfast"',
            camera='pos="0 0 .85"', floor=".8 .8 .78 1", floor_contact='friction=".8"', world=world + bodies,
            rest="<deformable>" + springs("links", skip(1), n, look=blue, radius=0.011)
            + springs("bend2", skip(2), n, 60, 0.1) + springs("bend4", skip(4), n, 30) + "</deformable>"
            f"<contact>{exclude}</contact><equality>"
            '<connect name="grip0" body1="hand0" body2="p0" anchor="0 0 0"/>'
            f'<connect name="grip1" body1="hand1" body2="p{n - 1}" anchor="0 0 0"/>'
            '<flex flex="links" solref=".005 1" solimp=".99 .99 .001"/></equality>',
        )

    def begin(self):
        number = int(self.np_random.integers(self.STATES))
        if number not in self.states:
            self.states[number] = self.crumple(np.random.default_rng(number))
        self.mujoco.mj_resetData(self.model, self.data)
        points = self.states[number]
        self.place(points)
        for hand, p in enumerate((0, self.N - 1)):
            self.grip(hand, p, points[p])

    def crumple(self, rng):
        self.data.eq_active[:2] = 0
        for _ in range(4):
            p = int(rng.integers(self.N))
            self.grip(0, p, self.particles()[p])
            angle, dist = rng.uniform(0, 2 * np.pi), rng.uniform(.1, .3)
            step = np.array([np.cos(angle) * dist, np.sin(angle) * dist, rng.uniform(.03, .1)]) / 40
            for _ in range(40):
                self.data.mocap_pos[0] += step
                self.substeps(4)
            self.data.eq_active[0] = 0
            self.substeps(100)
        points = self.particles()
        points[:, :2] -= points[:, :2].mean(0)
        return points

    def move(self, action):
        shift = 0.01 * action.reshape(2, 4)[:, :3]
        for _ in range(6):
            hands = self.data.mocap_pos
            new = hands + shift
            new[:, 2] = new[:, 2].clip(.02, .28)
            inside = np.abs(new[:, :2]).max() <= .325
            if inside and np.linalg.norm(new[0] - new[1]) <= .55:
                hands[:] = new
            self.substeps(4)

    def observe(self):
        return np.concatenate([self.particles()[self.keys].ravel(), self.data.mocap_pos.ravel()]).astype(np.float32)

    def score(self):
        p = self.particles()
        d = np.linalg.norm(p[0] - p[-1])
        return min(d, .55), d >= .475, min(d, .55), {}

    def expert_action(self, obs):
        h = obs[30:].reshape(2, 3).astype(np.float64)
        along = h[1] - h[0]; along[2] = 0
        L = np.linalg.norm(along)
        u = along / L if L > 0.02 else np.array([1., 0, 0])
        target = np.stack([-u, u]) * .25
        target[:, 2] = .02
        a = np.zeros((2, 4))
        a[:, :3] = np.clip((target - h) / .06, -1, 1)
        return a.ravel().astype(np.float32)


class PassWater(SoftBodyEnv):
    goal = ("to move the container, which holds water, to be as close to the red circle as possible "
            "without causing too many water droplets to spill")
    horizon = 75
    DROPS, RADIUS, WALL, TALL, FREEBOARD = 200, 0.0173, 0.045, 0.7, 0.01
    TARGET, LOW, HIGH, STEP = 1.2, -0.25, 1.4, 0.011
    WIDTHS = (0.2025, 0.21, 0.2175)
    settled = {}

    def __init__(self, render_mode="rgb_array"):
        layer = (np.arange(5) - 2) * 0.039
        x, y, z = np.meshgrid(layer, layer, 0.07 + 0.04 * np.arange(self.DROPS // 25), indexing="ij")
        self.rest = np.stack([x, y, z], axis=-1).reshape(-1, 3)
        super().__init__(1, 7, render_mode)
        self.cup = 3 * self.DROPS  # its place in qpos and qvel: a slide joint along x
        self.walls = [self.model.geom(f"wall{i}").id for i in range(5)]

    def mjcf(self):
        radius = self.RADIUS * np.random.default_rng(0).uniform(0.9, 1.1, self.DROPS)
        wall = 'mass="1000" priority="1" solref=".02 1" condim="1" rgba=".55 .6 .65 .35"'
        boxes = "".join(f'<geom name="wall{i}" type="box" size=".2 .2 {self.TALL}" pos="{i / 9} 0 .1" {wall}/>' for i in range(5))
        drop = f'condim="1" solref="-300 -4" solimp=".95 .95 .001" rgba=".15 .4 .95 1"'
        return SCENE.format(
            name="water", option='timestep=".01" gravity="0 0 -4" solver="CG" iterations="15"',
            camera='pos=".53 -1 2" xyaxes="1 0 0 0 .8660254 .5"', floor=".86 .86 .84 1", floor_contact='condim="3" friction=".8"',
            world=point_masses(self.rest, radius, 0.01, 0, drop)
            + f'<body name="cup"><joint name="cup" type="slide" axis="1 0 0"/><inertial pos="0 0 0" mass="5000" diaginertia="1 1 1"/>{boxes}</body>', rest="")

    def shape_cup(self, w, l, height):
        t = self.WALL / 2
        box = [((0, 0, t), (w / 2 + 2 * t, l / 2 + 2 * t, t)),
               ((-w / 2 - t, 0, height / 2), (t, l / 2 + 2 * t, height / 2)),
               ((w / 2 + t, 0, height / 2), (t, l / 2 + 2 * t, height / 2)),
               ((0, -l / 2 - t, height / 2), (w / 2, t, height / 2)),
               ((0, l / 2 + t, height / 2), (w / 2, t, height / 2))]
        for geom, (pos, size) in zip(self.walls, box):
            self.model.geom_pos[geom], self.model.geom_size[geom] = pos, size

    def begin(self):
        shape = tuple(int(i) for i in self.np_random.integers(3, size=2))
        w, l = (self.WIDTHS[i] for i in shape)
        if shape not in self.settled:
            self.shape_cup(w, l, self.TALL)
            for _ in range(500):
                self.slide(0)
            points = self.particles()
            self.settled[shape] = points, points[:, 2].max() + self.RADIUS + self.FREEBOARD
            self.mujoco.mj_resetData(self.model, self.data)
        points, height = self.settled[shape]
        self.size = w, l, height
        self.shape_cup(*self.size)
        self.place(points)

    def slide(self, dx):
        """One physics step with the cup driven by dx metres."""
        d, dt = self.data, self.model.opt.timestep
        x = d.qpos[self.cup]
        new = min(max(x + dx, self.LOW), self.HIGH)
        d.qvel[self.cup] = (new - x) / dt
        self.substeps(1)
        d.qpos[self.cup], d.qvel[self.cup] = new, 0

    def move(self, action):
        for _ in range(8):
            self.slide(float(action[0]) * self.STEP)

    def inside(self):
        w, l, h = self.size
        p = self.particles() - [self.data.qpos[self.cup], 0, 0]
        return (np.abs(p[:, 0]) < w / 2) & (np.abs(p[:, 1]) < l / 2) & (p[:, 2] < h + self.RADIUS)

    def observe(self):
        n = self.inside().mean()
        w, l, h = self.size
        return np.array([self.data.qpos[self.cup], w, l, h, self.particles()[:, 2].max(), n, 1 - n], dtype=np.float32)

    def score(self):
        spilled = 1 - self.inside().mean()
        reward = -abs(self.TARGET - self.data.qpos[self.cup]) - 10 * spilled
        return reward, reward > -0.36, reward, {"spilled": spilled}

    def paint(self, image):
        size = len(image)
        v, u = np.mgrid[:size, :size] + 0.5
        image[(u - 632 / 720 * size) ** 2 + (v - 394 / 720 * size) ** 2 < (20 / 720 * size) ** 2] = (230, 20, 20)
        return image

    def expert_action(self, obs):
        x = float(obs[0])
        left = self.TARGET - x
        speed = min(np.sqrt(2 * 0.8 * (max(x, 0) + 0.01)), np.sqrt(2 * 0.8 * max(left, 0)), left / 0.08, 1.0)
        return np.array([np.clip(speed / 1.1, -1, 1)], dtype=np.float32)


for _name in (FoldCloth, StraightenRope, PassWater):
    _id = f"{_name.__name__}-v0"
    if _id not in gymnasium.registry:
        gymnasium.register(_id, entry_point=f"{__name__}:{_name.__name__}")
