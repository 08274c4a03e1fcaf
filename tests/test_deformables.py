"""Cloth, rope and water: physics, images, success, OpenGL."""
import os
import subprocess
import sys
import warnings

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from tasks import deformables
import envs
from support import offline_vlm


def test_what_ends_by_itself_in_its_last_step_is_not_cut_off():
    """FoldCloth's only step terminates; Gymnasium's time limit says truncated too, and must not be heard."""
    env = envs.make("FoldCloth")
    env.reset(seed=0)
    assert env.step(env.action_space.sample())[2:4] == (True, False)


SOFT_TASKS = ["FoldCloth", "StraightenRope", "PassWater"]


@pytest.fixture(scope="module")
def soft():
    """The three tasks, made once: task name -> unwrapped environment."""
    envs = {name: getattr(deformables, name)() for name in SOFT_TASKS}
    yield envs
    for env in envs.values():
        env.close()


def soft_image(env, size):
    """An image, or a skip that says in one line what cures it."""
    try:
        return env.image(size)
    except deformables.OpenGLMissing as error:
        pytest.skip(str(error))


def soft_play(env, seed, act):
    """-> return and last info of one episode of act(obs), which must stay stable."""
    (obs, info), total, over = env.reset(seed=seed), 0.0, False
    while not over:
        obs, reward, terminated, truncated, info = env.step(act(obs))
        total, over = total + reward, terminated or truncated
        assert np.isfinite(obs).all() and np.isfinite(reward) and not info["unstable"]
    return total, info


@pytest.mark.parametrize("name", SOFT_TASKS)
def test_soft_task_passes_gymnasiums_checker(name):
    """Each id must resolve by its module and satisfy check_env without a warning."""
    env = gymnasium.make(f"tasks.deformables:{name}-v0").unwrapped
    try:
        no_opengl = env.image(64) is None
    except deformables.OpenGLMissing:
        no_opengl = True
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*(minimum|maximum) value.*infinity.*")
        check_env(env, skip_render_check=no_opengl)
    env.close()


@pytest.mark.parametrize("name", SOFT_TASKS)
def test_soft_task_episode_depends_on_its_seed_alone(name, soft):
    """A seed must give the same episode, to the last bit, in a used and in a fresh environment."""
    def record(env):
        rng, seen = np.random.default_rng(1), [env.reset(seed=7)[0]]
        for _ in range(min(env.horizon, 6)):
            seen.append(env.step(rng.uniform(-1, 1, env.action_space.shape))[0])
        return np.array(seen)

    used, fresh = soft[name], getattr(deformables, name)()
    used.reset(seed=3)
    used.step(np.ones(used.action_space.shape))  # an episode abandoned half way
    first = record(used)
    for cache in ("states", "settled"):  # what is kept for the process must not matter either
        getattr(type(used), cache, {}).clear()
    second = record(fresh)
    np.testing.assert_array_equal(first, second)
    assert not np.array_equal(first[0], first[1])
    np.testing.assert_array_equal(soft_image(used, 64), soft_image(fresh, 64))
    fresh.close()


@pytest.mark.parametrize(
    "name, margin", [("FoldCloth", 0.1), ("StraightenRope", 3), ("PassWater", 200)])
def test_soft_expert_succeeds_and_beats_random_play_by_far(name, margin, soft):
    """The scripted expert must succeed, random play must be stable and worse by a wide margin."""
    env, rng = soft[name], np.random.default_rng(0)
    best, info = soft_play(env, 2, env.expert_action)
    assert info["success"] == 1
    total, _ = soft_play(env, 2, lambda obs: rng.uniform(-1, 1, env.action_space.shape))
    assert best > total + margin


@pytest.mark.parametrize("name, terminates", [("FoldCloth", True), ("StraightenRope", False)])
def test_soft_horizon_ends_the_episode_as_documented(name, terminates, soft):
    """The only step of the cloth must terminate, the 40th of the rope must truncate."""
    env = soft[name]
    env.reset(seed=0)
    ends = [env.step(np.zeros(env.action_space.shape))[2:4] for _ in range(env.horizon)]
    assert ends == [(False, False)] * (env.horizon - 1) + [(terminates, not terminates)]


def test_cloth_placed_3_mm_off_still_succeeds_but_3_cm_off_fails(soft):
    """The fold must not be chaotic: near the expert's place counts, far from it does not."""
    env = soft["FoldCloth"]
    for off, success in ((0.003, 1), (-0.003, 1), (-0.03, 0)):
        env.reset(seed=0)
        action = env.expert_action(None) + np.array([1, -1]) * off / 2**0.5 / env.REACH
        info = env.step(action)[4]
        assert info["success"] == success == int(info["performance"] > 0.9)


def test_a_rope_held_high_looks_as_long_as_one_on_the_table(soft):
    """Straight at the highest the hands go: it may look a tenth longer, no more."""
    env, seen = soft["StraightenRope"], []
    env.reset(seed=0)
    for height in (0, env.HIGH):
        env.place(env.rest + [0, 0, height])
        env.mujoco.mj_forward(env.model, env.data)
        seen.append(offline_vlm.read_rope(soft_image(env, 300)))
    assert 70 < seen[0] < seen[1] < 1.1 * seen[0]


def test_rope_reward_and_success_follow_the_distance_of_its_ends(soft):
    """Success must begin at 0.475 m, and the reward must stop growing at 0.55 m."""
    env = soft["StraightenRope"]
    env.reset(seed=0)
    for distance, reward, success in ((0.474, 0.474, 0), (0.476, 0.476, 1), (0.6, 0.55, 1)):
        env.place(env.rest * [distance / 0.5, 1, 1])
        got, info = env.judge()
        assert got == pytest.approx(reward) and info["success"] == success


def test_rope_hands_stay_on_the_table_and_within_a_stretched_rope(soft):
    """No action may carry a hand over the table's edge or the hands more than 0.55 m apart."""
    env = soft["StraightenRope"]
    env.reset(seed=0)
    for _ in range(12):
        env.step(np.array([-1, -1, 1, 0, 1, 1, 1, 0]))
    env.step(np.zeros(8))
    hands = env.data.mocap_pos
    assert np.linalg.norm(env.particles()[[0, -1]] - hands, axis=1).max() < 0.03  # still held
    assert np.abs(hands[:, :2]).max() <= 0.325 and hands[:, 2].max() <= 0.28 + 1e-9
    assert 0.45 < np.linalg.norm(hands[0] - hands[1]) <= 0.55


def test_water_succeeds_within_36_cm_and_loses_ten_times_the_spilled_share(soft):
    """Success must begin at a reward of -0.36, and 10 of 200 drops outside must cost 0.5."""
    env = soft["PassWater"]
    env.reset(seed=0)
    water = env.particles() - [env.data.qpos[env.cup], 0, 0]
    for x, lost, reward, success in ((0.85, 0, -0.35, 1), (0.83, 0, -0.37, 0), (1.2, 10, -0.5, 0)):
        points = water + [x, 0, 0]
        points[:lost] = [-1, 0, 0.02]
        env.place(points)
        env.data.qpos[env.cup] = x
        got, info = env.judge()
        assert got == pytest.approx(reward) and info["success"] == success


def test_water_spills_in_a_dash_and_not_in_a_gentle_move(soft):
    """Full speed must cost several percent of the water, the expert's speed almost nothing."""
    env = soft["PassWater"]
    dash = soft_play(env, 0, lambda obs: np.array([float(obs[0] < 1.12)]))[1]
    gentle = soft_play(env, 0, env.expert_action)[1]
    assert dash["spilled"] > 0.05 and not dash["success"]
    assert gentle["spilled"] < 0.01 and gentle["success"]


def test_water_settles_as_a_heap_and_not_as_columns(soft):
    """The trap of the perfect grid: the settled rim must be near 0.21 m, not 0.30 m."""
    env = soft["PassWater"]
    env.reset(seed=0)
    assert 0.19 < env.size[2] < 0.25
    assert env.spilled() == 0


def test_a_goal_image_that_fails_leaves_the_episode_as_it_was(soft):
    """A size that is refused must not put the rope where the goal is."""
    env = soft["StraightenRope"]
    env.reset(seed=0)
    state = env.data.qpos.copy()
    with pytest.raises(ValueError, match="image's size"):
        env.goal_image(8)
    np.testing.assert_array_equal(env.data.qpos, state)


def test_soft_tasks_without_opengl_say_the_cure_and_nothing_else():
    """A renderer that could not be made must not add a traceback when it is thrown away."""
    done = subprocess.run([sys.executable, deformables.__file__], capture_output=True, text=True, timeout=600,
                          env={**os.environ, "MUJOCO_GL": "disabled"})
    assert done.returncode and "apt-get install" in done.stdout + done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("name", SOFT_TASKS)
def test_soft_images_change_with_the_state_and_leave_it_alone(name, soft):
    """An image must show what was done, have the size asked for, and not disturb the physics."""
    env = soft[name]
    env.reset(seed=0)
    before = soft_image(env, 96)
    assert before.shape == (96, 96, 3) and before.dtype == np.uint8
    state = env.data.qpos.copy()
    assert (env.goal_image(96) != before).any(-1).mean() > 0.005
    np.testing.assert_array_equal(env.data.qpos, state)
    np.testing.assert_array_equal(env.image(96), before)
    env.step(env.expert_action(env.observe()))
    assert (env.image(96) != before).any(-1).mean() > 0.005
    assert env.render().shape == (300, 300, 3)


def test_soft_actions_that_are_not_finite_numbers_are_refused(soft):
    """A wrong shape or a NaN must end in one clear line, not in a silent reset of the physics."""
    env = soft["StraightenRope"]
    env.reset(seed=0)
    for action in (np.zeros(3), np.full(8, np.nan)):
        with pytest.raises(ValueError, match="finite numbers"):
            env.step(action)


def test_soft_instability_is_reported_and_never_counts_as_success(soft, tmp_path, monkeypatch):
    """MuJoCo restarts in silence after a NaN: info must say unstable, and success must be 0."""
    monkeypatch.chdir(tmp_path)  # MuJoCo writes MUJOCO_LOG.TXT where it is
    env = soft["StraightenRope"]
    env.reset(seed=0)
    env.data.qvel[:] = 1e11
    info = env.step(np.zeros(8))[4]
    assert info["unstable"] and info["success"] == 0
    assert not env.reset(seed=0)[1]["unstable"]


def test_soft_tasks_step_without_opengl_and_name_the_cure():
    """Without OpenGL stepping must work, and an image must fail with the one apt-get line."""
    code = ("import deformables, numpy\n"
            "env = deformables.StraightenRope()\n"
            "env.reset(seed=0); env.step(numpy.zeros(8)); print('stepped')\n"
            "try: env.image(64)\n"
            "except deformables.OpenGLMissing as error: print(error)\n")
    # PYOPENGL_PLATFORM=osmesa makes EGL fail while mujoco is imported, as a missing library does.
    env = {**os.environ, "MUJOCO_GL": "egl", "PYOPENGL_PLATFORM": "osmesa"}
    env["PYTHONPATH"] = os.path.dirname(os.path.abspath(deformables.__file__))
    run = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert run.stdout.split("\n")[0] == "stepped", run.stderr
    assert "apt-get install -y libegl1 libgl1-mesa-dri" in run.stdout


def test_soft_renderer_left_open_ends_quietly(soft):
    """A user who forgets close() must not get OpenGL tracebacks when Python ends."""
    soft_image(soft["StraightenRope"], 64)
    code = "import deformables; env = deformables.StraightenRope(); env.reset(); env.image(64)"
    env = {**os.environ, "PYTHONPATH": os.path.dirname(os.path.abspath(deformables.__file__))}
    run = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert run.returncode == 0 and run.stderr == ""
