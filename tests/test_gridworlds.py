"""The key-and-door grids: planner, sub-tasks, distances."""
import contextlib

import gymnasium
import numpy as np
import pytest

import code_as_reward
import envs
from support import offline_vlm


def test_an_environment_knows_its_own_horizon():
    """Named by its id, with no horizon given, a task of ours must last as long as it says, not 1,000 steps."""
    assert envs.make("tasks.gridworlds:DoorKey-5x5-v0", goal="to go").horizon == 250


@pytest.mark.parametrize("name", ["DoorKey-5x5", "DoorKey-6x6", "DoorKey-8x8", "Unlock", "UnlockPickup"])
def test_the_planner_solves_every_grid_and_a_box_stays_shut(env_of, name):
    """Each of five starts must end in success, key and door yellow, box purple; toggling the box must change no pixel."""
    env = env_of(name)
    for seed in range(5):
        (obs, info), grid, over = env.reset(seed=seed), env.unwrapped.inner, False
        colours = {thing.type: thing.color for thing in grid.grid.grid if thing}
        assert colours["key"] == colours["door"] == "yellow" and colours.get("box", "purple") == "purple"
        while not over:
            action, front = envs.expert(env)(obs), grid.grid.get(*grid.front_pos)
            if front is not None and front.type == "box":
                before = env.image(88)
                env.step(env.unwrapped.TOGGLE)
                assert np.array_equal(env.image(88), before)
            obs, _, terminated, truncated, info = env.step(action)
            over = terminated or truncated
        assert info["success"] == 1


def test_a_grid_state_says_which_sub_tasks_were_completed():
    """A key that was taken and put back is where it was, but paid for already: one number must tell the two states apart."""
    from tasks import gridworlds  # noqa: F401  (registers the ids)

    env = gymnasium.make("DoorKey-5x5-v0").unwrapped
    obs, info = env.reset(seed=0)
    while not info["subtasks"][0]:
        before, action = obs, env.expert_action(obs)
        obs, _, _, _, info = env.step(action)
    after, *_ = env.step(env.DROP)
    assert action == env.PICKUP and np.flatnonzero(after != before).size == 1


def test_the_way_to_the_other_room_leads_through_the_door(env_of):
    """Behind the wall next to the target must be further than in the door, for progress, the reader and the program."""
    env = env_of("DoorKey-8x8")
    env.reset(seed=0)
    first, grid, said = env.image(80), env.unwrapped, []
    grid._door().is_open, grid._door().is_locked = True, False
    grid.inner.grid.set(*grid._places()[1], None)  # the key has been taken
    source = offline_vlm.write_code(env.goal, "the red agent is on the green square", False)
    with contextlib.closing(code_as_reward.Program(source)) as program:
        for cell in ((4, 6), (4, 2), (6, 2), (6, 5)):  # behind the wall, before the door at (5, 2), past it, at the target
            grid.inner.agent_pos = cell
            said.append((grid._info()["progress"], offline_vlm.read_rooms(env.image(300)),
                         program(env.image(80)[None], first)[0]))
    assert (np.diff(said, axis=0) > 0.03).all()
