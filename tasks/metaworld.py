"""Drawer Open, Soccer, Sweep Into: RL-VLM-F's three tasks of a robot arm, seen without the arm.

What this is: Meta-World v3's simulator with a fixed start, a camera that looks at the object, and
fast images in which the robot is invisible. Importing this file registers the ids DrawerOpen-v0,
Soccer-v0 and SweepInto-v0 with Gymnasium; envs.make("DrawerOpen") does so by itself.
All 50 tasks of Meta-World are here by their own names, such as MetaWorld/door-open-v3: with
Meta-World's random starts, and the same fast images.
Which STEPs: none; every STEP acts or looks here.

Differs from the paper (RL-VLM-F, 2402.03681), in the three tasks:
  1. Meta-World v3 in place of a changed copy of v2, which does not install any more.
  2. In Soccer and SweepInto the hand starts 5 cm lower, or random actions seldom touch the object.
  3. The images have no shadows, reflections, multisampling or goal markers, and what cannot move
     is drawn only once: much faster (results/README.md has the figures).
  4. Meta-World's own expert for SweepInto fails from this start; sweep_expert stands in for it.
  5. The hand starts some millimetres from its place, elsewhere in every episode (theirs: there).
     (Episodes are shorter too, and an action is repeated: see TASKS in envs.py.)

Shapes: observation (39,) float32, action (4,) in [-1, 1], image(size) -> (size, size, 3) uint8.
  Lengths are in metres; x points to the right of the arm, y away from it, z up. info: success 0 or
  1; progress, minus the distance in metres from the object to the goal over the table.
  Needs mujoco and metaworld (pip install metaworld), and OpenGL for images.

To use it elsewhere (with envs.py beside the folder tasks/):
    import gymnasium, tasks.metaworld  # the import registers the ids
    env = gymnasium.make("DrawerOpen-v0").unwrapped
    obs, info = env.reset(seed=0)
    obs, true_reward, terminated, truncated, info = env.step(env.expert_action(obs))
    print(info["progress"], env.image(84).shape)
    env.close()  # trap: left open, it prints tracebacks when Python ends (TaskEnv closes it)
    env = gymnasium.make("MetaWorld/reach-v3", camera="corner").unwrapped
"""
# trap: this file has the name of the package that it imports. Keep it in its folder: beside your
# script, or started as `python tasks/metaworld.py`, it would be imported in place of the package.
import math
import warnings

import gymnasium
import numpy as np
from gymnasium.spaces import Box

from envs import choose_opengl, draw_fast, opengl_errors


# ---- The environment ----
CAMERA = ((0.02, 0.7, 0.1), 1.1, 145, -32)  # sees the table; where a task names no other


class MetaWorld(gymnasium.Env):
    """A Meta-World v3 task, with object and goal always at one place, as the paper has it, or anew.

    Observation (39,): hand (3), gripper opening, object (3 + quaternion 4), 7 zeros; the same 18
    one simulator step before; goal (3).
    Action (4,): move the hand by up to 1 cm along x, y, z; close (+) or open (-) the gripper.
    True reward: Meta-World's, 0 to 10. The learner never sees it.
    No episode ends by itself; the time limit is that of whoever wraps this.
    """

    render_mode = "rgb_array"
    metadata = {"render_modes": ["rgb_array"], "render_fps": 80}

    def __init__(self, name, layout=None, hand=None, camera=CAMERA, expert=None, start_steps=2,
                 colours=(), one_way=False, show_robot=None, render_mode="rgb_array"):
        """
        name     Meta-World's name of the task, such as "drawer-open-v3".
        layout   where object and goal are, m: what Meta-World calls the random vector. None: as
                 Meta-World does, it is drawn anew for every episode, and what follows is its own.
        hand     (3,) where the hand starts, m.
        camera   (look_at (3,) m, distance m, azimuth degrees, elevation degrees); or the name of
                 one of Meta-World's, such as "corner" or "topview" (four of the five are mounted
                 upside down; their images are turned).
        expert   obs (39,) -> action (4,). None: Meta-World's scripted policy for the task.
        start_steps  steps of the simulator in which the hand goes to where an episode begins: two
                 take it up to 4 mm along x, three up to 1 cm.
        colours  pairs (name of a geom, (red, green, blue) in [0, 1]) to paint.
        one_way  True where beyond the goal is as good as at it.
        show_robot  whether images show the arm. None: only where the hand itself has to get to the
                 goal (reach-v3, reach-wall-v3).
        Raises ValueError where Meta-World has no such task or camera.
        """
        choose_opengl()  # before mujoco is imported, which reads the choice once
        try:
            with opengl_errors():  # importing mujoco already looks for OpenGL
                import mujoco
            from metaworld.env_dict import ALL_V3_ENVIRONMENTS
        except ModuleNotFoundError as error:
            package = error.name.split(".")[0]
            raise ImportError(f"this task needs a package: pip install {package}") from None
        if name not in ALL_V3_ENVIRONMENTS:
            raise ValueError(f"Meta-World has no {name}; it has {', '.join(ALL_V3_ENVIRONMENTS)}")

        self.mujoco, self.one_way, self.name = mujoco, one_way, name
        self.expert_action = expert or scripted(name)
        self.start_steps, self.fixed = start_steps, layout is not None
        self.views = {}  # image size, px -> FixedView
        self.observation_space = Box(-np.inf, np.inf, (39,), np.float32)
        self.action_space = Box(-1.0, 1.0, (4,), np.float32)
        self.sim = ALL_V3_ENVIRONMENTS[name]()
        self._prepare()
        if self.fixed:
            self._settle(layout, hand)
        show = name.startswith("reach") if show_robot is None else show_robot
        self._prepare_images(camera, colours, show)

    def _prepare(self):
        """Once: let the simulator go on for ever, and tell the goal."""
        sim = self.sim
        # Meta-World draws a layout for every episode, and wants set_task() to have chosen the task.
        # "seeded": from the simulator's generator, which reset() replaces by ours.
        sim._freeze_rand_vec, sim._set_task_called, sim.seeded_rand_vec = self.fixed, True, True
        # Without this the observation has zeros in place of the goal. The goal is constant here
        # and teaches the policy nothing, but the experts read it.
        sim._partially_observable = False
        # trap: the space was cached while the goal was hidden, with bounds of 0 for the goal, and
        # Meta-World's step() clips observations to it. Deleted, it is computed again.
        del sim.sawyer_observation_space
        sim.max_path_length = math.inf  # else Meta-World refuses to go on after 500 of its steps

    def _settle(self, layout, hand):
        """Once: fix the layout, bring the hand to its start, and keep that state of the physics."""
        sim, mujoco = self.sim, self.mujoco
        sim._last_rand_vec, sim.hand_init_pos = np.array(layout, float), np.array(hand, float)
        sim.touching_object = lambda geom: False  # a slow loop whose result nobody reads here
        # This reset lets the arm travel to its start, through 500 physics steps. Our own resets
        # restore where that ended.
        sim.reset()
        # INTEGRATION is all that the next physics step depends on: positions, velocities, time,
        # controls, the mocap body that pulls the hand, and the solver's warm start. Positions and
        # velocities alone would not give the same episode to the last bit.
        self.kind = mujoco.mjtState.mjSTATE_INTEGRATION
        self.start = np.empty(mujoco.mj_stateSize(sim.model, self.kind))
        mujoco.mj_getState(sim.model, sim.data, self.start, self.kind)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        sim = self.sim
        self.mujoco.mj_resetData(sim.model, sim.data)
        if not self.fixed:
            return self._draw_layout()
        self.mujoco.mj_setState(sim.model, sim.data, self.start, self.kind)
        self.mujoco.mj_forward(sim.model, sim.data)  # recomputes what follows from the state
        # The second half of an observation is the state one simulator step before. At the start
        # nothing came before, so both halves are the same.
        sim.curr_path_length, sim._prev_obs = 0, sim._get_curr_obs_combined_no_goal()
        # From one fixed start, ten evaluation episodes would be the same episode ten times, and a
        # policy that was trained from one start often fails a centimetre beside that start. So the
        # hand first moves in a random direction. Never down: in SweepInto the fingers would touch
        # the cube.
        direction = self.np_random.uniform((-1, -1, 0), 1)  # (3,)
        for _ in range(self.start_steps):
            obs = sim.step(np.append(direction, -1))[0]  # -1: the fingers stay open
        return obs.astype(np.float32), {"success": 0.0, "progress": self._progress(obs)}

    def _draw_layout(self):
        """Meta-World's own reset, with a new layout from our generator -> obs, info."""
        sim, model = self.sim, self.sim.model
        sim._np_random = self.np_random
        obs, _ = sim.reset()
        # trap: some tasks tell only where the marker of the goal is, and MuJoCo would put it back
        # to where the model has it. A marker that hangs on a body moves with that.
        for site, place in sim._target_site_config:
            if not model.site(site).bodyid[0]:
                model.site(site).pos = place
        self.mujoco.mj_forward(model, sim.data)
        for view in self.views.values():
            view.still = None  # what stands still stands elsewhere in this episode
        info = sim.evaluate_state(obs, np.zeros(4))[1]
        return obs.astype(np.float32), self._said(obs, info)

    def step(self, action):
        """action (4,) -> obs, true reward, terminated, truncated (both always False), info."""
        obs, reward, _, _, info = self.sim.step(np.clip(np.asarray(action, np.float64), -1, 1))
        return obs.astype(np.float32), float(reward), False, False, self._said(obs, info)

    def _said(self, obs, info):
        """info of Meta-World -> ours."""
        if self.fixed:
            progress = self._progress(obs)
        elif self.name in DISTANCE:
            progress = -float(DISTANCE[self.name](self.sim, obs))
        else:
            progress = -float(info["obj_to_target"])
        return {"success": float(info["success"]), "progress": progress}

    def _progress(self, obs):
        """Minus the distance over the table from object (handle, ball, cube) to goal, m."""
        # trap: the true reward will not do as progress. It pays for the place of the hand too, but
        # the images hide the hand. Labels made from the true reward would look like noise to a
        # reward model that sees only the images.
        if self.one_way:  # a drawer that was pulled past the goal looks further open, not worse
            return -max(0.0, float(obs[5] - self.sim._target_pos[1]))
        return -math.dist(obs[4:6], self.sim._target_pos[:2])

    def _prepare_images(self, camera, colours, show_robot):
        """Once: hide the robot, throw out what makes drawing slow, aim the camera."""
        mujoco, model = self.mujoco, self.sim.model
        self.camera, self.options, self.upside_down = mujoco.MjvCamera(), mujoco.MjvOption(), False
        # A camera that hangs on the hand moves, and FixedView's must stand still.
        still = [model.camera(i).name for i in range(model.ncam) if not model.cam_bodyid[i]]
        if camera in still:
            self.camera.type = mujoco.mjtCamera.mjCAMERA_FIXED
            self.camera.fixedcamid = model.camera(camera).id
            up = self.sim.data.cam(camera).xmat.reshape(3, 3)[:, 1]  # (3,) of the image, in the world
            self.upside_down = up[2] < 0  # as Meta-World has mounted some
        else:
            try:
                self.camera.lookat[:], self.camera.distance, self.camera.azimuth, \
                    self.camera.elevation = camera
            except (TypeError, ValueError):
                raise ValueError(f"no camera {camera!r:.60}; there are {', '.join(still)}, or [[x, "
                                 "y, z], distance, azimuth, elevation]") from None
        self.options.sitegroup[:] = 0  # sites are the markers of goals and fingers
        if not self.fixed:
            # The goal is elsewhere in every episode, and often nothing but its marker shows where.
            for site in range(model.nsite):
                model.site_group[site] = 0 if "goal" in model.site(site).name else 5
            self.options.sitegroup[0] = 1
            # trap: what is half transparent mixes the two drawings of FixedView.
            for rgba in (model.geom_rgba, model.mat_rgba, model.site_rgba):
                rgba[rgba[:, 3] > 0, 3] = 1
        # The arm would cover what the question is about, and a VLM would judge the arm. A geom is
        # a piece of a body; all bodies of the robot hang on the one called "base".
        if not show_robot:
            robot = model.body_rootid == model.body("base").id  # (bodies,) bool
            model.geom_group[robot[model.geom_bodyid]] = 5  # MuJoCo does not draw groups 3 to 5
        for geom, colour in colours:
            # A material (matid) would hide the colour: -1 takes it off.
            model.geom(geom).rgba[:3], model.geom(geom).matid[:] = colour, -1
        draw_fast(model)

    def image(self, size):
        """-> (size, size, 3) uint8."""
        if size not in self.views:
            view = FixedView(self.mujoco, self.sim.model, self.camera, self.options, size)
            self.views[size] = view
        image = self.views[size].image(self.sim.data)
        return np.ascontiguousarray(image[::-1, ::-1]) if self.upside_down else image

    def render(self):
        return self.image(300)

    def close(self):
        while self.views:
            self.views.popitem()[1].close()


# ---- Fast images from a camera that stands still ----
class FixedView:
    """Images of a MuJoCo scene from one place: what cannot move is drawn once, the rest over it.

    Every pixel has a depth, the distance to what is seen in it. Where the drawing of what moves and
    the kept drawing of what stands still meet, the nearer one is seen. That is OpenGL's own rule,
    so the images are those of mujoco.Renderer, to the last bit, and come several times as fast.
    trap: not with shadows, reflections or anything transparent, which mix the two drawings; nor
    where the model itself changes.
    """

    def __init__(self, mujoco, model, camera, options, size):
        """camera, options: MjvCamera and MjvOption.  size: of the square image, px."""
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
        # OpenGL's first row is the lowest one of the image. These two are views with the rows in
        # reverse; _draw() reverses them once more, and so fills the memory in OpenGL's order.
        self.colour = np.empty((size, size, 3), np.uint8)[::-1]
        self.depth, self.still = np.empty((size, size), np.float32)[::-1], None

    def _draw(self, data, which):
        """Fill self.colour and self.depth with what stands still (STATIC) or can move (DYNAMIC)."""
        mujoco, rect = self.mujoco, self.mujoco.MjrRect(0, 0, *self.depth.shape)
        mujoco.mjv_updateScene(self.model, data, self.options, self.no_pull, self.camera,
                               getattr(mujoco.mjtCatBit, "mjCAT_" + which), self.scene)
        mujoco.mjr_render(rect, self.scene, self.context)
        mujoco.mjr_readPixels(self.colour[::-1], self.depth[::-1], rect, self.context)

    def image(self, data):
        """data: MjData -> (size, size, 3) uint8."""
        # Each size has an OpenGL context of its own, and OpenGL draws into whichever is current.
        self.opengl.make_current()
        if self.still is None:
            self._draw(data, "STATIC")
            self.still = self.colour.copy(), self.depth.copy()
        self._draw(data, "DYNAMIC")
        colour, depth = self.still
        image, nearer = colour.copy(), self.depth > depth  # (size, size, 3), (size, size) bool
        # A view as "V3" makes one item of the three bytes of a pixel: copying channel by channel
        # takes three times as long.
        np.copyto(image.view("V3"), self.colour.view("V3"), where=nearer[..., None])
        return image

    def close(self):
        self.opengl.make_current()
        self.context.free()
        self.opengl.free()


# ---- Experts ----
def scripted(name):
    """The policy that Meta-World brings for a task: obs (39,) -> action (4,)."""

    def act(obs):
        from metaworld.policies import ENV_POLICY_MAP

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it warns that it asks for more than [-1, 1]
            return np.clip(ENV_POLICY_MAP[name]().get_action(obs), -1, 1).astype(np.float32)

    return act


def sweep_expert(obs):
    """obs (39,) -> action (4,): close the fingers, go behind the cube, push it to the hole, stay.

    Meta-World's own policy pinches the cube, presses it into the table from this start, and fails.
    """
    hand, cube, goal = obs[:3], obs[4:7], obs[36:39]  # (3,) each, m
    behind = np.array([cube[0], cube[1] - 0.06, 0.115])  # m; fingers 2 cm above the table
    if hand[1] > cube[1] - 0.02:  # the hand is past the cube: go back over it, 10 cm higher
        target = behind + [0.0, -0.02, 0.1]
    elif hand[2] > 0.145 or abs(hand[0] - cube[0]) > 0.003:  # too high, or beside it: go down
        target = behind
    else:  # push, and stop 1 cm before the hole's middle: the cube slides on
        target = behind + [0.0, 0.06, 0.0] if cube[1] < goal[1] - 0.01 else hand
    # A step moves the hand by 1 cm at most, so a gain of 25 is full speed until 4 cm before it.
    return np.clip([*25 * (target - hand), 1.0], -1, 1).astype(np.float32)


# ---- Progress, where the simulator does not tell it ----
# Meta-World's info has the distance from object to goal, obj_to_target. For these it has 0, or that
# of something else. Each is (simulator, obs (39,)) -> m, at least 0.
def object_to_goal(sim, obs):
    return math.dist(obs[4:7], sim._target_pos)


DISTANCE = {
    "assembly-v3": lambda sim, obs: math.dist(sim.data.site("RoundNut").xpos, sim._target_pos),
    "box-close-v3": object_to_goal,
    "disassemble-v3": lambda sim, obs: max(0.0, sim._target_pos[2] - obs[6]),  # how far to lift it
    "door-open-v3": object_to_goal,
    "hammer-v3": lambda sim, obs: 0.09 - min(0.09, sim.data.joint("NailSlideJoint").qpos.item()),
    "lever-pull-v3": object_to_goal,
}


# ---- The tasks, registered with Gymnasium ----
TASKS = {
    "DrawerOpen": dict(
        name="drawer-open-v3",
        layout=(0.0, 0.9, 0.0),  # drawer; its goal is to stand 19 cm open
        hand=(0.0, 0.75, 0.15),
        camera=((0.0, 0.72, 0.07), 0.55, 50, -38),
        expert=scripted("drawer-open-v3"),
        start_steps=3,
        one_way=True,
    ),
    "Soccer": dict(
        name="soccer-v3",
        layout=(0.0, 0.65, 0.03, 0.0, 0.85, 0.0),  # ball, goal
        hand=(0.0, 0.56, 0.15),
        camera=((0.0, 0.75, 0.03), 0.55, 90, -45),
        expert=scripted("soccer-v3"),
    ),
    "SweepInto": dict(
        name="sweep-into-v3",
        layout=(0.0, 0.65, 0.02, 0.0, 0.84, 0.02),  # cube, hole
        hand=(0.0, 0.6, 0.15),
        camera=((0.0, 0.74, 0.05), 0.52, -90, -60),
        expert=sweep_expert,
        colours=[("objGeom", (0.1, 0.7, 0.1))],  # the goal sentence speaks of a green cube
    ),
}
for _task, _how in TASKS.items():
    if f"{_task}-v0" not in gymnasium.registry:
        gymnasium.register(f"{_task}-v0", entry_point=f"{__name__}:MetaWorld", kwargs=_how)
# All of Meta-World's, by the names it has. trap: they stand here as text, because to import
# metaworld takes two seconds, and who makes another task need not have it.
ALL = """assembly basketball bin-picking box-close button-press-topdown button-press-topdown-wall
button-press button-press-wall coffee-button coffee-pull coffee-push dial-turn disassemble door-close
door-lock door-open door-unlock hand-insert drawer-close drawer-open faucet-open faucet-close hammer
handle-press-side handle-press handle-pull-side handle-pull lever-pull pick-place-wall
pick-out-of-hole reach push-back push pick-place plate-slide plate-slide-side plate-slide-back
plate-slide-back-side peg-insert-side peg-unplug-side soccer stick-push stick-pull push-wall
reach-wall shelf-place sweep-into sweep window-open window-close""".split()
for _task in ALL:
    if f"MetaWorld/{_task}-v3" not in gymnasium.registry:
        gymnasium.register(f"MetaWorld/{_task}-v3", entry_point=f"{__name__}:MetaWorld",
                           kwargs={"name": f"{_task}-v3"})
