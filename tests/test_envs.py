"""envs.py: what the lesson leaves out. Every task's promises, foreign environments, what cannot be made."""
import os
import shutil
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import gymnasium
import imageio.v3 as imageio
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

import envs
from helpers import BUILT_IN
from tasks import schedules
from test_components import Odd, rollout
from tools import draw_tasks

ROOT = Path(__file__).resolve().parents[1]


def test_every_task_has_a_goal_a_horizon_and_image_sizes():
    """All that the other files look up must be there, for the paper's seven tasks and any later one."""
    assert set(envs.TASKS) >= {*BUILT_IN, "FoldCloth", "StraightenRope", "PassWater"}
    for name, task in envs.TASKS.items():
        assert task.goal.startswith("to ") and task.horizon >= 1, name
        assert 64 <= task.reward_image_size <= 100 <= task.vlm_image_size <= 720, name
        assert {"total_steps", "pairs_per_session", "feedback_every", "max_pairs"} <= set(schedules.OURS[name]), name
    assert set(schedules.PAPER) < set(schedules.OURS) == {*envs.TASKS, "MetaWorld"}  # which is for all of its 50 tasks


@pytest.mark.parametrize("name", BUILT_IN)
def test_shapes_types_and_infos_are_as_promised(env_of, name):
    """Observations must be float32 (O,), actions Box(-1, 1), images square uint8, and the time limit truncates."""
    env = env_of(name)
    assert (env.goal, env.horizon) == (envs.TASKS[name].goal, envs.TASKS[name].horizon)
    actions = env.action_space
    assert actions.dtype == np.float32 and np.all(actions.high == 1) and np.all(actions.low == -1)
    obs, info = env.reset(seed=1)
    for _ in range(env.horizon):
        assert obs.dtype == np.float32 and env.observation_space.contains(obs)
        assert info["success"] in (0.0, 1.0) and isinstance(info["progress"], float)
        obs, reward, terminated, truncated, info = env.step(env.action_space.sample())
        assert not terminated and isinstance(reward, float)
    assert truncated
    for size in (84, 200):
        assert env.image(size).shape == (size, size, 3) and env.image(size).dtype == np.uint8
    assert env.render().shape == (300, 300, 3)


@pytest.mark.parametrize("name", BUILT_IN)
def test_reset_with_a_seed_determines_the_episode_whatever_came_before(env_of, name):
    """A resumed run must see the very episodes of one that never stopped: numbers and pixels, also in a fresh object."""
    env = env_of(name)
    first_numbers, first_image = rollout(env, seed=5)
    rollout(env, seed=6, steps=20)
    fresh = envs.make(name)
    for again in (env, fresh):
        numbers, image = rollout(again, seed=5)
        assert np.array_equal(numbers, first_numbers) and np.array_equal(image, first_image)
    fresh.close()


@pytest.mark.parametrize("name", BUILT_IN)
def test_experts_reach_the_goal_and_random_actions_do_not(env_of, name):
    """The expert's episode must end in success, nearer to the goal than a random one and with a larger true return."""
    env, ends = env_of(name), {}
    for who, policy in (("expert", envs.expert(env)), ("random", lambda obs: env.action_space.sample())):
        env.action_space.seed(0)
        obs, info = env.reset(seed=0)
        total = 0.0
        for _ in range(env.horizon):
            obs, reward, _, _, info = env.step(policy(obs))
            total += reward
        ends[who] = (info["success"], info["progress"], total)
    assert ends["expert"][0] == 1 and ends["random"][0] == 0
    assert ends["expert"][1] > ends["random"][1] and ends["expert"][2] > ends["random"][2]


@pytest.fixture(scope="module", autouse=True)
def odd_id():
    gymnasium.register("Odd-v0", entry_point=Odd, max_episode_steps=9)
    yield
    del gymnasium.registry["Odd-v0"]


def test_an_environment_without_a_limit_of_its_own_gets_one(tmp_path, monkeypatch):
    """Named by its module, an id is not registered before it is made; its episodes must end all the same."""
    (tmp_path / "odd_module.py").write_text("import gymnasium\ngymnasium.register('Endless-v0', "
                                            "entry_point='gymnasium.envs.classic_control:PendulumEnv')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert envs.make("odd_module:Endless-v0", goal="g").horizon == 1000
    env = envs.make("odd_module:Endless-v0", goal="g", horizon=2)
    env.reset(seed=0)
    assert [env.step(env.action_space.sample())[3] for _ in range(2)] == [False, True] and env.horizon == 2


def test_kill_ends_a_run_that_sdl_draws():
    """SDL draws Gymnasium's classic tasks and would catch SIGTERM: kill, docker and Slurm would wait in vain."""
    code = ("import envs, os, signal\nenv = envs.make('Pendulum-v1', goal='up')\nenv.reset(seed=0)\nenv.image(50)\n"
            "os.kill(os.getpid(), signal.SIGTERM)\nprint('still here')")
    environment = {name: value for name, value in os.environ.items() if name != "SDL_NO_SIGNAL_HANDLERS"}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=600,
                            cwd=ROOT)
    assert result.returncode == -signal.SIGTERM, result


def test_discrete_actions_that_start_elsewhere_are_counted_from_0():
    """The learner's 0 must arrive as the space's first action."""
    class Late(Odd):
        got = []

        def __init__(self, render_mode=None):
            super().__init__(render_mode)
            self.action_space = gymnasium.spaces.Discrete(3, start=1)

        def step(self, action):
            Late.got.append(action)
            return super().step(np.zeros(1, np.float32))

    gymnasium.register("Late-v0", entry_point=Late, max_episode_steps=9)
    env = envs.make("Late-v0", goal="to be late")
    env.reset(seed=0)
    for action in range(env.action_space.n):
        env.step(action)
    assert Late.got == [1, 2, 3] and env.action_space == gymnasium.spaces.Discrete(3)
    del gymnasium.registry["Late-v0"]


@pytest.mark.parametrize("name", ["CartPole", "DrawerOpen"])
def test_our_environments_keep_gymnasiums_promises(name, env_of):
    """check_env, drawing included, must find nothing in what TaskEnv wraps."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it would like observations to be bounded
        check_env(env_of(name).unwrapped, skip_close_check=True)


def test_what_gymnasium_cannot_make_is_one_line():
    """An id that moved elsewhere (ImportError) or needs arguments (TypeError), and no image, must be said plainly."""
    class Fussy(gymnasium.Env):
        observation_space, action_space = gymnasium.spaces.Box(-1, 1, (1,)), gymnasium.spaces.Box(-1, 1, (1,))
        metadata = {"render_modes": ["rgb_array"]}

        def __init__(self, needed, render_mode=None):
            self.render_mode = render_mode

        def reset(self, *, seed=None, options=None):
            super().reset(seed=seed)
            return np.zeros(1, np.float32), {}

        def render(self):
            return None

    gymnasium.register("Fussy-v0", entry_point=Fussy)
    for name, why in {"Reacher-v2": "moved to", "Fussy-v0": "needed"}.items():
        with pytest.raises(ValueError, match=f"{name} cannot be made here: .*{why}"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            envs.make(name, goal="to go")
    del gymnasium.registry["Fussy-v0"]
    gymnasium.register("Fussy-v0", entry_point=lambda render_mode: Fussy(0, render_mode))
    env = envs.make("Fussy-v0", goal="to go")
    env.reset(seed=0)
    with pytest.raises(ValueError, match="Fussy-v0 drew no image, but NoneType"):
        env.image(64)
    del gymnasium.registry["Fussy-v0"]


def test_the_horizon_can_be_set(env_of):
    """horizon= must cut episodes off there, for tasks of the table and for foreign ones."""
    with pytest.raises(ValueError, match="DoorKey-5x5 ends after 250 steps; a horizon of 251 is too long"):
        envs.make("DoorKey-5x5", horizon=251)
    for env in (envs.make("CartPole", horizon=3), envs.make("Odd-v0", goal="to be odd", horizon=3)):
        env.reset(seed=0)
        assert [env.step(env.action_space.sample())[3] for _ in range(3)] == [False, False, True] and env.horizon == 3


def test_an_action_is_repeated_and_its_rewards_are_summed(env_of):
    """One step of ours is then several of the simulator's, up to the end of the episode and no further; horizon counts ours."""
    one, four = (envs.make("CartPole", horizon=horizon, action_repeat=repeat) for horizon, repeat in ((8, 1), (2, 4)))
    (start, _), (same, _) = one.reset(seed=0), four.reset(seed=0)
    assert np.array_equal(start, same)
    singles = [one.step(np.array([0.3]))[:4] for _ in range(8)]
    obs, reward, _, truncated, info = four.step(np.array([0.3]))
    assert np.array_equal(obs, singles[3][0]) and not truncated and four.horizon == 2
    assert reward == pytest.approx(sum(each[1] for each in singles[:4])) and info["progress"] == singles[3][1]
    assert four.step(np.array([0.3]))[3] and singles[7][3]
    with pytest.raises(ValueError, match="ends after 250 steps; a horizon of 300 is too long"):
        envs.make("DoorKey-5x5", horizon=100, action_repeat=3)
    odd = envs.make("Odd-v0", goal="to be odd", action_repeat=4)  # its episodes last nine steps
    odd.reset(seed=0)
    steps = [odd.step(np.array([1.0], np.float32)) for _ in range(3)]
    assert odd.horizon == 3 and [step[3] for step in steps] == [False, False, True]
    assert [step[1] for step in steps] == [28.0, 28.0, 7.0] and steps[0][4]["progress"] == 7.0  # 7 each


def test_a_missing_opengl_is_one_line_with_its_cure():
    """However MuJoCo puts it, the user must read which packages to install."""
    for cause in (AttributeError("'NoneType' object has no attribute 'eglQueryString'"),
                  ImportError("Cannot initialize a EGL device display"), RuntimeError("invalid value for MUJOCO_GL")):
        with pytest.raises(ValueError, match="apt-get install -y libegl1 libgl1-mesa-dri") as error:
            with envs.opengl_errors():
                raise cause
        assert "\n" not in str(error.value)
    with pytest.raises(AttributeError):  # an error of ours keeps its traceback
        with envs.opengl_errors():
            raise AttributeError("no attribute 'qpos'")


@pytest.mark.parametrize("package", ["mujoco", "metaworld"])
def test_a_task_without_its_package_is_one_line_with_its_cure(monkeypatch, package):
    """Without Meta-World the user must read the name of the task and what to install."""
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, "metaworld.env_dict", raising=False)
    with pytest.raises(ValueError, match=f"^DrawerOpen cannot be made here: .*pip install {package}") as error:
        envs.make("DrawerOpen")
    assert "\n" not in str(error.value)


def test_the_bounds_of_a_task_are_means_over_episodes():
    """What random and expert episodes reach must be found for each, and the expert must hold the pole."""
    found = draw_tasks.bounds(envs.make("CartPole", horizon=20), episodes=2)
    assert found["episodes"] == 2 and set(found) == {"episodes"} | {
        f"{who}_{what}" for who in ("random", "expert") for what in ("return", "success", "progress")}
    assert found["expert_success"] == 1 and found["random_return"] < found["expert_return"] < 0


def test_envs_alone_plays_cartpole_at_random_and_by_its_expert(tmp_path):
    """Its demo must need no other file, and send whoever gives it the flags of draw_tasks there."""
    shutil.copy("envs.py", tmp_path)
    outcome = [subprocess.run([sys.executable, "envs.py", *flags], cwd=tmp_path, capture_output=True, text=True)
               for flags in ([], ["--csv", "x"])]
    assert outcome[0].returncode == 0 and "expert: true return -84, within 5 degrees on 100 of 100" in outcome[0].stdout
    assert imageio.imread(tmp_path / "cartpole.png").shape == (200, 400, 3)
    assert outcome[1].returncode == 1 and "python -m tools.draw_tasks" in outcome[1].stderr
