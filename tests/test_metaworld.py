"""The Meta-World tasks: images without a robot, what is drawn once, goals and drawers."""
import os
import subprocess
import sys

import numpy as np
import pytest

import envs
from helpers import BUILT_IN

METAWORLD = BUILT_IN[1:]


@pytest.mark.parametrize("name", METAWORLD)
def test_metaworld_images_hide_the_robot(env_of, name):
    """Moving the hand while the object lies still must not change one pixel; moving the object must."""
    env = env_of(name)
    start_obs, start = env.reset(seed=0)
    before, object_at = env.image(84), env.unwrapped.sim.data.qpos[9:].copy()
    for _ in range(8):
        obs, *_, info = env.step(np.array([0, 0, 1, 1], np.float32))  # straight up, away from everything
    assert info["progress"] == pytest.approx(start["progress"], abs=2e-3)  # it is the object's alone
    assert np.linalg.norm(obs[:3] - start_obs[:3]) > 0.04 and np.allclose(obs[4:6], start_obs[4:6], atol=2e-3)
    env.unwrapped.sim.data.qpos[9:] = object_at  # exactly
    env.unwrapped.mujoco.mj_forward(env.unwrapped.sim.model, env.unwrapped.sim.data)
    assert np.array_equal(before, env.image(84))
    env.unwrapped.sim.data.qpos[9 if name != "DrawerOpen" else -1] -= 0.05
    env.unwrapped.mujoco.mj_forward(env.unwrapped.sim.model, env.unwrapped.sim.data)
    assert (before != env.image(84)).any(axis=2).mean() > 0.005


@pytest.mark.parametrize("name", METAWORLD)
def test_no_two_episodes_start_alike_but_those_of_one_seed(env_of, name):
    """The hand must start in another place each time, within 1 cm, and leave the object where it is."""
    env = env_of(name)
    starts = np.array([env.reset(seed=seed)[0] for seed in range(12)])  # (12, 39)
    apart = np.linalg.norm(starts[:, None, :3] - starts[None, :, :3], axis=-1)[np.triu_indices(12, 1)]
    assert apart.min() > 1e-4 and np.abs(starts[:, :3] - starts[:, :3].mean(0)).max() < 0.011
    assert np.ptp(starts[:, 4:7], axis=0).max() < 2e-3
    assert np.array_equal(env.reset(seed=3)[0], starts[3])


@pytest.mark.parametrize("name", METAWORLD)
def test_the_expert_succeeds_from_nearly_every_start(env_of, name):
    """Ten starts: what a policy is asked to reach must be within reach from each. (sweep_expert misses 1 of 30.)"""
    env = env_of(name)
    assert sum(envs.rollout(env, envs.expert(env), seed)[3][-1] for seed in range(10)) >= 9


@pytest.mark.parametrize("size", [84, 300])
@pytest.mark.parametrize("name", METAWORLD)
def test_what_stands_still_is_drawn_once_and_nobody_can_tell(env_of, name, size):
    """MuJoCo's own renderer, which draws everything every time, must give the same images, to the last bit."""
    env = env_of(name)
    sim, mujoco, flags = env.unwrapped.sim, env.unwrapped.mujoco, env.unwrapped.mujoco.mjtRndFlag
    obs, _ = env.reset(seed=0)
    first = env.image(size)
    renderer = mujoco.Renderer(sim.model, size, size)
    for flag in (flags.mjRND_SHADOW, flags.mjRND_REFLECTION, flags.mjRND_SKYBOX, flags.mjRND_HAZE, flags.mjRND_FOG):
        renderer.scene.flags[flag] = False
    for step in range(24):  # the object on its way, at the goal, and where chance brings it
        obs, *_ = env.step(envs.expert(env)(obs) if step < 18 else env.action_space.sample())
        renderer.update_scene(sim.data, env.unwrapped.camera, env.unwrapped.options)
        assert np.array_equal(env.image(size), renderer.render())
    assert not np.array_equal(first, env.image(size))
    renderer.close()


@pytest.mark.parametrize("name", METAWORLD)
def test_metaworld_observations_contain_the_goal(env_of, name):
    """The last three numbers must be the goal's place after a step too (Meta-World clips them to 0 by default)."""
    env = env_of(name)
    env.reset(seed=0)
    obs, *_ = env.step(np.zeros(4, np.float32))
    assert np.allclose(obs[36:39], env.unwrapped.sim._target_pos) and obs[37] > 0.5


def test_the_drawer_is_closed_at_the_start(env_of):
    """The paper's environment sometimes began with an open drawer; ours must begin 19 cm short of the goal."""
    env = env_of("DrawerOpen")
    _, info = env.reset(seed=0)
    assert info["success"] == 0 and info["progress"] == pytest.approx(-0.19, abs=0.002)


def test_a_drawer_further_open_is_never_worse(env_of):
    """Pulling on after success must undo neither success nor progress: it looks further open."""
    env = env_of("DrawerOpen")
    (obs, _), act, said = env.reset(seed=0), envs.expert(env), []
    for step in range(120):
        action = act(obs) if step < 45 else np.array([0, -1, 0, 1], np.float32)
        obs, _, _, _, info = env.step(action)
        said.append((info["success"], info["progress"]))
    assert min(said[60:]) == max(said[60:]) == (1.0, 0.0)


def test_a_task_left_open_ends_quietly(env_of):
    """The same for Meta-World's images, drawn through TaskEnv."""
    env_of("DrawerOpen")
    code = "import envs; env = envs.make('DrawerOpen'); env.reset(seed=0); env.image(64)"
    env = {**os.environ, "PYTHONPATH": os.path.dirname(os.path.abspath(envs.__file__))}
    run = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert run.returncode == 0 and "Traceback" not in run.stderr, run.stderr[-2000:]


# ---- all tasks of Meta-World by their own names ----
def made(task, **kwargs):
    """MetaWorld/TASK as --env makes it; skips with the cure where OpenGL or a package is missing."""
    try:
        env = envs.make(f"MetaWorld/{task}-v3", goal="to reach the goal", kwargs=kwargs)
        env.reset(seed=0)
        env.image(84)
    except ValueError as error:
        pytest.skip(str(error))
    return env


def test_every_task_of_metaworld_has_a_name_here():
    """They stand as text in tasks/metaworld.py, which is imported without Meta-World; all fifty must be there."""
    names = pytest.importorskip("metaworld.env_dict").ALL_V3_ENVIRONMENTS
    from tasks import metaworld

    assert sorted(f"{task}-v3" for task in metaworld.ALL) == sorted(names) and len(names) == 50
    assert set(metaworld.DISTANCE) < set(names)
    assert all(f"MetaWorld/{name}" in metaworld.gymnasium.registry for name in names)


@pytest.mark.parametrize("task", ["door-open", "reach"])
def test_every_episode_has_a_layout_of_its_own_and_the_seed_decides_it(task):
    """Meta-World's random starts: the same for the same seed, whatever came before, in numbers and pixels."""
    env, fresh = made(task), made(task)
    starts = np.array([env.reset(seed=seed)[0] for seed in range(6)])  # (6, 39)
    places = np.concatenate([starts[:, 4:7], starts[:, 36:39]], axis=1)  # of object and goal
    assert len({tuple(np.round(place, 4)) for place in places}) == 6
    for seed in (3, 5):
        assert np.array_equal(env.reset(seed=seed)[0], fresh.reset(seed=seed)[0])
        for _ in range(5):
            action = env.action_space.sample()
            seen, same = env.step(action), fresh.step(action)
            assert np.array_equal(seen[0], same[0]) and seen[1:4] == same[1:4] and seen[4] == same[4]
        assert np.array_equal(env.image(84), fresh.image(84))
    env.close(), fresh.close()


@pytest.mark.parametrize("task", ["door-open", "basketball", "coffee-push"])
def test_what_stands_still_is_drawn_anew_when_it_stands_elsewhere(task):
    """MuJoCo's own renderer must give the same images in every episode: a layout changes the model."""
    env = made(task, show_robot=True)
    sim, mujoco, flags = env.unwrapped.sim, env.unwrapped.mujoco, env.unwrapped.mujoco.mjtRndFlag
    renderer = mujoco.Renderer(sim.model, 84, 84)
    for flag in (flags.mjRND_SHADOW, flags.mjRND_REFLECTION, flags.mjRND_SKYBOX, flags.mjRND_HAZE, flags.mjRND_FOG):
        renderer.scene.flags[flag] = False
    starts = []
    for seed in range(3):
        obs, _ = env.reset(seed=seed)
        starts.append(env.image(84))
        for _ in range(4):
            renderer.update_scene(sim.data, env.unwrapped.camera, env.unwrapped.options)
            assert np.array_equal(env.image(84), renderer.render())
            for _ in range(4):
                obs, *_ = env.step(envs.expert(env)(obs))
    assert not np.array_equal(starts[0], starts[1])
    renderer.close(), env.close()


def test_robot_and_camera_are_settable():
    """The arm is in the image only where it is what has to get to the goal, or where it is asked for."""
    images = {key: made(task, **kwargs).image(84) for key, (task, kwargs) in {
        "hidden": ("door-open", {}), "shown": ("door-open", {"show_robot": True}), "reach": ("reach", {}),
        "reach, hidden": ("reach", {"show_robot": False}), "named": ("door-open", {"camera": "corner"}),
        "aimed": ("door-open", {"camera": [[0, 0.8, 0.2], 0.8, 90, -20]})}.items()}
    share = {(a, b): (images[a] != images[b]).any(-1).mean() for a in images for b in images}
    assert share["hidden", "shown"] > 0.02 and share["reach", "reach, hidden"] > 0.02
    corner = images["named"].astype(int)  # mounted upside down; once turned, the dark wall is above, the table below
    assert corner[:20].mean() < corner[-20:].mean()
    assert min(share["hidden", "named"], share["hidden", "aimed"], share["named", "aimed"]) > 0.2
    for wrong, says in (({"camera": "nose"}, "no camera 'nose'; there are .*corner"), ({"camera": "gripperPOV"}, "no camera 'gripperPOV'"),
                        ({"colour": 1}, "unexpected keyword argument 'colour'"), ({"camera": [1, 2]}, "no camera .1, 2.; .*distance")):
        with pytest.raises(ValueError, match=f"MetaWorld/door-open-v3 cannot be made here: .*{says}") as error:
            envs.make("MetaWorld/door-open-v3", goal="to open", kwargs=wrong)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("task", ["reach", "door-open", "assembly", "hammer", "lever-pull", "box-close", "disassemble"])
def test_progress_is_largest_where_the_goal_is_reached(task):
    """Six of them have no distance in Meta-World's info; where the expert first succeeds, the goal must be nearest."""
    env = made(task)
    start = env.reset(seed=0)[1]["progress"]
    _, _, progress, success = envs.rollout(env, envs.expert(env), seed=0)
    first = int(np.argmax(success))
    assert success.any() and progress[first] > 0.7 * start and progress[first] > start + 0.05  # 0 is the goal itself
    assert progress[first] >= max(progress[:first], default=start) - 0.01
    env.close()


def test_a_goal_has_to_be_given_and_a_task_that_is_not_there_is_one_line():
    """The table of tasks has no words for all fifty."""
    for name, goal, says in (("MetaWorld/reach-v3", None, "needs a goal"), ("MetaWorld/reech-v3", "to", "reech")):
        with pytest.raises(ValueError, match=says) as error:
            envs.make(name, goal=goal)
        assert "\n" not in str(error.value)
