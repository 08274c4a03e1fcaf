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
