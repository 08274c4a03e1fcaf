"""Which environments of other libraries work here? Try them all, each in a process of its own, and write a table.

    python -m tools.environments                        results/environments.csv: a row for each environment
    python -m tools.environments --only Fetch,Panda     print those whose library or id has one of these words
    python -m tools.environments --only bench --add     add rows to the table that is there, of another installation

What this is: how results/environments.csv was made. An environment is made as `--env` makes it, reset, moved by ten
random steps and drawn; then Gymnasium's check_env looks at it, and that of Stable-Baselines3 where it is installed.
"bare too" says that what they find is found without this project as well, in what gymnasium.make() alone makes.
A library that is not installed is left out, with a word. The result is one of three: it works; one clear line says why
not; or a traceback, which is a mistake of ours. Install the libraries in a virtual environment of their own:

    pip install -r requirements.txt "gymnasium[classic-control,box2d,toy-text,mujoco]" gymnasium-robotics panda-gym \\
        ale-py highway-env pybullet_envs_gymnasium "shimmy[dm-control]" robosuite "mujoco==3.3.0"

Which STEPs: none. Names: LIBRARIES, attempt, Robosuite.
"""
import argparse
import csv
import importlib.metadata
import json
import multiprocessing
import os
import time
import warnings
from pathlib import Path

import gymnasium
import numpy as np
from gymnasium.utils.env_checker import check_env

import envs
from support import adapt

COLUMNS = ("library", "version", "mujoco", "env", "env_kwargs", "result", "says", "observation", "actions", "horizon",
           "image_moves", "check_env", "sb3_check_env", "seconds")
KEY = COLUMNS[:5]  # what tells two rows apart
RAM = {"obs_type": "ram"}
# {library, as pip calls it: {what --env says: arguments}}; a text is several of them without arguments.
LIBRARIES = {
    "gymnasium": """CartPole-v1 MountainCar-v0 MountainCarContinuous-v0 Pendulum-v1 Acrobot-v1 LunarLander-v3
        BipedalWalker-v3 CarRacing-v3 Ant-v5 HalfCheetah-v5 Hopper-v5 Humanoid-v5 HumanoidStandup-v5 InvertedPendulum-v5
        InvertedDoublePendulum-v5 Pusher-v5 Reacher-v5 Swimmer-v5 Walker2d-v5 Blackjack-v1 CliffWalking-v1 FrozenLake-v1
        FrozenLake8x8-v1 Taxi-v4""",
    "gymnasium-robotics": "gymnasium_robotics:" + """FetchReach-v4 FetchPush-v4 FetchSlide-v4 FetchPickAndPlace-v4
        FetchReachDense-v4 PointMaze_UMaze-v3 PointMaze_LargeDense-v3 AntMaze_UMaze-v5 AdroitHandDoor-v1
        AdroitHandHammer-v1 AdroitHandPen-v1 AdroitHandRelocate-v1 FrankaKitchen-v1 HandReach-v3
        HandManipulateBlock-v1""",
    "panda-gym": "panda_gym:" + """PandaReach-v3 PandaPush-v3 PandaSlide-v3 PandaPickAndPlace-v3 PandaStack-v3
        PandaFlip-v3 PandaReachJoints-v3""",
    "minigrid": "minigrid:" + """MiniGrid-Empty-8x8-v0 MiniGrid-FourRooms-v0 MiniGrid-DoorKey-6x6-v0
        MiniGrid-LavaCrossingS9N1-v0 BabyAI-GoToRedBall-v0""",
    "ale-py": {"ale_py:ALE/Pong-v5": RAM, "ale_py:ALE/Breakout-v5": RAM, "ale_py:ALE/Freeway-v5": {},
               "ale_py:ALE/Boxing-v5": {"obs_type": "grayscale"}},
    "highway-env": "highway_env:" + """highway-v0 parking-v0 merge-v0 roundabout-v0 intersection-v0 racetrack-v0 exit-v0
        lane-keeping-v0""",
    "shimmy": "shimmy:" + """dm_control/cartpole-swingup-v0 dm_control/acrobot-swingup-v0
        dm_control/ball_in_cup-catch-v0 dm_control/cheetah-run-v0 dm_control/dog-run-v0 dm_control/finger-spin-v0
        dm_control/fish-swim-v0
        dm_control/humanoid-walk-v0 dm_control/manipulator-bring_ball-v0 dm_control/pendulum-swingup-v0
        dm_control/point_mass-easy-v0 dm_control/quadruped-walk-v0 dm_control/reacher-easy-v0 dm_control/walker-walk-v0
        dm_control/lift_brick_features-v0 dm_control/lift_brick_vision-v0 dm_control/RodentEscapeBowl-v0""",
    "robosuite": {"tools.environments:robosuite/Lift-v0": {}, "tools.environments:robosuite/Door-v0": {"task": "Door"}},
    "pybullet_envs_gymnasium": "pybullet_envs_gymnasium:" + """AntBulletEnv-v0 HalfCheetahBulletEnv-v0
        HopperBulletEnv-v0 HumanoidBulletEnv-v0 InvertedPendulumBulletEnv-v0 InvertedDoublePendulumBulletEnv-v0
        ReacherBulletEnv-v0
        Walker2DBulletEnv-v0""",
    "metaworld": {},  # all 50, and one that needs an argument; see entries()
}
MINUTES = 10  # for one environment


class Robosuite(gymnasium.Env):
    """robosuite brings no ids, and its own Gymnasium wrapper neither draws nor keeps to a seed. So this is what a user
    writes: 30 lines, registered below, for `--env tools.environments:robosuite/Lift-v0`.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 20}
    SEEN = ("robot0_proprio-state", "object-state")

    def __init__(self, task="Lift", robots="Panda", camera="frontview", render_mode="rgb_array"):
        import robosuite

        self.render_mode, self.camera = render_mode, camera
        self.inner = robosuite.make(task, robots=robots, has_renderer=False, has_offscreen_renderer=True,
                                    use_camera_obs=False, reward_shaping=True, ignore_done=True)
        low, high = self.inner.action_spec
        self.action_space = gymnasium.spaces.Box(low.astype(np.float32), high.astype(np.float32))
        shape = self._vector(self.inner.reset()).shape
        self.observation_space = gymnasium.spaces.Box(-np.inf, np.inf, shape, np.float32)

    def _vector(self, seen):
        return np.concatenate([seen[key] for key in self.SEEN]).astype(np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        if seed is not None:  # robosuite draws places from numpy's global generator
            np.random.seed(seed % 2**32)
        return self._vector(self.inner.reset()), {}

    def step(self, action):
        seen, reward, _, _ = self.inner.step(action)
        return self._vector(seen), float(reward), False, False, {"success": float(self.inner._check_success())}

    def image(self, size):
        """-> (size, size, 3) uint8. OpenGL's first row is the lowest one."""
        return self.inner.sim.render(width=size, height=size, camera_name=self.camera)[::-1]

    def render(self):
        return self.image(300)


for _id in ("robosuite/Lift-v0", "robosuite/Door-v0"):
    if _id not in gymnasium.registry:
        gymnasium.register(_id, entry_point=Robosuite, max_episode_steps=200)


try:  # here, so that the processes need not import it again
    from stable_baselines3.common.env_checker import check_env as sb3_check_env
except ImportError:
    sb3_check_env = None


def entries():
    """LIBRARIES as rows -> (library, env, kwargs)."""
    for library, listed in LIBRARIES.items():
        if isinstance(listed, str):
            module, colon, ids = listed.rpartition(":")
            listed = dict.fromkeys((module + colon + each for each in ids.split()), {})
        if library == "metaworld":
            from tasks.metaworld import ALL

            listed = {**dict.fromkeys((f"MetaWorld/{each}-v3" for each in ALL), {}),
                      "metaworld:Meta-World/MT1": {"env_name": "reach-v3"}}
        for env, kwargs in listed.items():
            yield library, env, kwargs


# ---- in a process of its own ----
def attempt(name, kwargs):
    """Make, reset, ten steps, images, checks -> the cells of a row that are known then."""
    adapt.find_here()
    try:
        env = envs.make(name, seed=0, goal="to reach the goal", kwargs=kwargs)
        obs, _ = env.reset(seed=0)
        images = [env.image(84)]
        for _ in range(10):
            obs, _, terminated, truncated, _ = env.step(env.action_space.sample())
            images.append(env.image(84))
            if terminated or truncated:
                env.reset()
    except ValueError as error:  # BadEnvironment is one too
        assert "\n" not in str(error)
        return {"result": "one line", "says": str(error)}
    actions = env.action_space
    row = {"result": "works", "says": "; ".join(adapt.notes(env)), "observation": obs.size,
           "actions": f"Discrete({actions.n})" if hasattr(actions, "n") else f"Box({actions.shape[0]})",
           "horizon": env.horizon, "image_moves": int(any((image != images[0]).any() for image in images))}
    return {**row, **checks(lambda: envs.make(name, seed=0, goal="to reach the goal", kwargs=kwargs),
                            lambda: gymnasium.make(name, render_mode="rgb_array", **kwargs))}


def checks(make, make_bare):
    """What Gymnasium's and Stable-Baselines3's check_env say -> {column: "passes", or the first line}.

    make_bare: without what this project puts around an environment.
    """
    found = {"check_env": check_env, **({"sb3_check_env": sb3_check_env} if sb3_check_env else {})}

    def said(check, make, **options):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                check(make(), **options)
            return "passes"
        except Exception as error:
            return f"{type(error).__name__}: {error}".splitlines()[0][:200]

    row = {column: said(check, make) for column, check in found.items()}
    for column, check in found.items():
        # trap: the bare environment would be drawn in a window too, and without a display that ends the process
        bare = "passes" if row[column] == "passes" else said(check, make_bare, skip_render_check=True)
        row[column] = row[column] if bare == "passes" else f"bare too: {bare}"
    return row


# ---- the table ----
def child(to, name, kwargs):
    """attempt(), whose cells are sent to the parent. What the library prints is not shown."""
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1), os.dup2(nowhere.fileno(), 2)
    try:
        to.send(attempt(name, kwargs))
    except BaseException as error:  # what must not happen
        to.send({"result": "traceback", "says": f"{type(error).__name__}: {error}".splitlines()[0]})
    os._exit(0)  # some libraries print tracebacks, or hang, when Python ends


def tried(library, name, kwargs):
    """attempt() in a process of its own -> a whole row."""
    started, fork = time.time(), multiprocessing.get_context("fork")  # forked: what is imported here is imported there
    receive, send = fork.Pipe(duplex=False)
    process = fork.Process(target=child, args=(send, name, kwargs))
    process.start()
    send.close()
    try:
        row = receive.recv() if receive.poll(60 * MINUTES) else {
            "result": "traceback", "says": f"no answer in {MINUTES} minutes"}
    except EOFError:
        process.join()
        row = {"result": "traceback", "says": f"the process ended with code {process.exitcode}"}
    process.kill()
    return {"library": library, "version": importlib.metadata.version(library),
            "mujoco": importlib.metadata.version("mujoco"), "env": name,
            "env_kwargs": json.dumps(kwargs) if kwargs else "", **row, "seconds": round(time.time() - started, 1)}


def write(path, rows):
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)


def main():
    parser = argparse.ArgumentParser(prog="python -m tools.environments", description=__doc__.splitlines()[0])
    parser.add_argument("--csv", default="results/environments.csv", help="the table (default: %(default)s)")
    parser.add_argument("--only", help="words, with commas between: try what has one in its library's name or id, and "
                                       "only print it, unless --add")
    parser.add_argument("--add", action="store_true", help="put what was tried into the table that is there")
    args = parser.parse_args()
    path, rows, missing = Path(args.csv), [], set()
    if args.add and path.exists():
        with open(path, newline="") as file:
            rows = list(csv.DictReader(file))
    for library, name, kwargs in entries():
        if args.only and not any(word in f"{library} {name}" for word in args.only.split(",")):
            continue
        try:
            importlib.metadata.version(library)
        except importlib.metadata.PackageNotFoundError:
            missing.add(library)
            continue
        row = tried(library, name, kwargs)
        rows = [other for other in rows if any(other[each] != row[each] for each in KEY)] + [row]
        if args.add or not args.only:
            write(path, rows)  # after each: it takes long
        print(f"{name} {row['env_kwargs']}: {row['result']}; {row['says'][:300]}"
              + f" [check_env: {row.get('check_env')}; SB3: {row.get('sb3_check_env')}]" * (row["result"] == "works"),
              flush=True)
    for library in sorted(missing):
        print(f"{library} is not installed, and was left out")
    counts = {result: sum(row["result"] == result for row in rows) for result in ("works", "one line", "traceback")}
    print(f"{len(rows)} environments: " + ", ".join(f"{count} {what}" for what, count in counts.items()))


if __name__ == "__main__":
    main()
