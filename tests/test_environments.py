"""What comes in from an environment: copied, checked and drawn whole, or refused in one line."""
import dataclasses
import importlib.metadata
import json
import re
import sys
import types
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Dict, Discrete, Graph, MultiBinary, MultiDiscrete, Sequence, Text, Tuple, flatten
from gymnasium.utils.env_checker import check_env
from PIL import Image

import envs
import sac
import train
import vlm_query
from support import adapt, settings
from support.labeler import make_labeler
from support.run import prepare


class Bar(gymnasium.Env):
    """A red bar on white that is pushed to the left and to the right."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 30}
    observation_space = Box(-10, 10, (2,), np.float32)

    def __init__(self, render_mode=None):
        self.action_space = Box(-1, 1, (1,), np.float32)
        self.render_mode, self.x, self.t, self.got = render_mode, np.zeros(2, np.float32), 0, []

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t, self.x[:] = 0, 0.5
        return self.seen(), {}

    def step(self, action):
        self.t += 1
        self.got.append(np.array(action))
        self.x += 0.125
        return self.seen(), self.reward(), False, False, self.info()

    def seen(self):
        return self.x.copy()

    def reward(self):
        return -1.0

    def info(self):
        return {}

    def render(self):
        image = np.full((64, 64, 3), 255, np.uint8)
        image[20:44, 30:35] = (200, 0, 0)
        return image


@pytest.fixture
def made():
    """changes of Bar -> a TaskEnv around it; what was registered for that is forgotten afterwards."""
    names = []

    def make(base=Bar, repeat=None, horizon=9, **changes):
        names.append(f"Bar{len(names)}-v0")
        entry = type("Made", (base,), {name: staticmethod(value) if isinstance(value, type) else value
                                       for name, value in changes.items()})
        gymnasium.register(names[-1], entry_point=entry)
        return envs.make(names[-1], goal="to go", horizon=horizon, action_repeat=repeat)

    yield make
    for name in names:
        del gymnasium.registry[name]


def refused(words, do, *args, **kwargs):
    """do() must raise BadEnvironment with one line that holds these words."""
    with pytest.raises(envs.BadEnvironment, match=words) as error:
        do(*args, **kwargs)
    assert "\n" not in str(error.value)


# ---- observations ----
def test_an_observation_that_is_changed_in_place_is_a_copy(made):
    """What a step returned must stay as it was when the environment moves on."""
    env = made(seen=lambda self: self.x)
    first, _ = env.reset(seed=0)
    second = env.step(np.zeros(1, np.float32))[0]
    assert first.tolist() == [0.5, 0.5] and second.tolist() == [0.625, 0.625]


@pytest.mark.parametrize("value, says", [(np.nan, "nan"), (np.inf, "inf"), (-np.inf, "-inf"), (1e300, "1e.300"),
                                         (2**70, "1.18.*e.21")])
def test_a_number_that_nothing_can_be_learned_from_names_its_step_and_its_entry(made, value, says):
    """Also one beyond float32, which would become infinite there, and a large integer."""
    env = made(seen=lambda self: [0.5, value if self.t == 3 else 0.5])
    for seed in range(2):  # the second episode ends like the first
        env.reset(seed=seed)
        env.step(np.zeros(1, np.float32))
        env.step(np.zeros(1, np.float32))
        refused(f"gave {says} as entry 1 of the observation.*step 3 of the episode, {3 * seed + 3} since", env.step,
                np.zeros(1, np.float32))


def test_the_first_observation_is_checked_too(made):
    """A reset has no step; it must be named as what it is."""
    refused("gave nan as entry 0 .*at a reset", made(seen=lambda self: np.array([np.nan, 0])).reset, seed=0)


def test_with_repeated_actions_the_step_is_one_of_ours(made):
    """The seventh of the simulator's is the third of those that repeat three."""
    env = made(repeat=3, seen=lambda self: self.x * (np.nan if self.t == 9 else 1))
    env.reset(seed=0)
    env.step(np.zeros(1, np.float32))
    env.step(np.zeros(1, np.float32))
    refused("step 3 of the episode, 3 since", env.step, np.zeros(1, np.float32))


@pytest.mark.parametrize("value", [np.array([1, 2]), np.array([1, 2], object), [1, 2], (1.0, np.array(2)), np.array([[1], [2]]),
                                   torch.tensor([1, 2])])
def test_any_array_of_the_right_shape_is_an_observation(made, value):
    """Integers, objects, lists, tensors; axes of length one do not matter."""
    obs, _ = made(seen=lambda self: value).reset(seed=0)
    assert obs.tolist() == [1, 2] and obs.dtype == np.float32


@pytest.mark.parametrize("value, says", [(0.5, r"shape \(\)"), (np.zeros(3), r"shape \(3,\)"), ({"x": 1}, "of dict"), (None, "shape"),
                                         (np.array(["a", "b"]), "not numbers"), (np.array([1, 2j]), "not numbers .real"),
                                         (np.ma.array([1.0, 2.0], mask=[False, True]), "of MaskedArray, .*masked"), ([1, [2, 3]], "of list")])
def test_an_observation_of_another_shape_is_refused(made, value, says):
    """A single number would otherwise fill a whole row of the buffer."""
    refused(says, made(seen=lambda self: value).reset, seed=0)


@pytest.mark.parametrize("space", [Box(-1, 1, (0,)), Box(-1, 1, (2, 0)), None])
def test_other_observations_are_refused_in_one_line(made, space):
    """The policy's network needs a vector with something in it."""
    with pytest.raises(ValueError, match="observes .*only Box observations, of one number or more") as error:
        made(observation_space=space)
    assert "\n" not in str(error.value)


def test_a_table_on_its_side_is_not_the_table(made):
    """(3, 2) holds as many numbers as (2, 3), in another order."""
    env = made(observation_space=Box(-9, 9, (2, 3), np.float64), seen=lambda self: np.zeros((3, 2)))
    refused(r"shape \(3, 2\); its observation_space says \(2, 3\)", env.reset, seed=0)


# ---- observations of other kinds ----
EYE = Box(0, 255, (64, 64, 3), np.uint8)


def test_a_nested_observation_becomes_one_vector_and_what_is_left_out_is_named(made):
    """Numbers in the order of the space, at any depth; a text, an image and a graph are not seen, and that is said."""
    space = Dict({"arm": Dict({"angle": Box(-1, 1, (2, 2)), "open": Discrete(2)}), "eye": EYE, "task": Text(9),
                  "two": Tuple([MultiBinary(2), Graph(Box(-1, 1, (1,)), None)])})
    value = {"arm": {"angle": [[1, 2], [3, 4]], "open": 1}, "eye": EYE.sample(), "task": "go", "two": ([1, 0], None)}
    env = made(observation_space=space, seen=lambda self: value)
    obs, _ = env.reset(seed=0)
    assert obs.tolist() == [1, 2, 3, 4, 0, 1, 1, 0] and env.observation_space.shape == (8,) and obs.dtype == np.float32
    assert adapt.notes(env) == ["the policy sees 8 numbers, of arm/angle, arm/open, two/0; it does not see "
                                "eye (an image, 64 x 64 x 3), task (a text), two/1 (a Graph)"]
    assert adapt.notes(made()) == []


@pytest.mark.parametrize("space", [Discrete(5), Discrete(5, start=-2), MultiBinary((2, 3)), MultiDiscrete([2, 3]),
                                   Tuple([Discrete(3), Discrete(2), Box(-1, 1, (2,), np.float64)])])
def test_what_is_counted_is_seen_as_gymnasium_flattens_it(made, space):
    """One-hot, in an observation space that has it."""
    space.seed(0)
    value = space.sample()
    env = made(observation_space=space, seen=lambda self: value)
    obs, _ = env.reset(seed=0)
    assert obs.tolist() == pytest.approx(flatten(space, value).tolist()) and obs in env.observation_space


@pytest.mark.parametrize("space, says", [
    (EYE, "observes an image, 64 x 64 x 3, nothing else, .*what render.* draws.*--env-kwargs.*mypkg.envs:My-v0"),
    (Box(0, 255, (84, 84), np.uint8), "an image, 84 x 84, "), (Dict({"eye": EYE, "say": Text(3)}), "eye .an image.*, say .a text.,"),
    (Text(3), "observes a text, nothing else, and the policy needs numbers: give"), (Sequence(Discrete(2)), "a Sequence"),
    (Discrete(10**6), "observes 1,000,000 numbers; the policy can take 100,000")])
def test_an_observation_without_numbers_for_the_policy_is_one_line_with_what_to_do(made, space, says):
    """An image is for the VLM; flattened, it would teach the policy nothing, in silence."""
    with pytest.raises(ValueError, match=says) as error:
        made(observation_space=space)
    assert "\n" not in str(error.value)


def test_a_small_table_is_no_image(made):
    """MiniGrid's codes of 7 x 7 cells are all that its policies see."""
    env = made(observation_space=Dict({"cells": Box(0, 255, (7, 7, 3), np.uint8)}), seen=lambda self: {"cells": np.full((7, 7, 3), 9)})
    assert env.reset(seed=0)[0].tolist() == [9] * 147


@pytest.mark.parametrize("value, says", [
    ({"a": [0.0, 0.0]}, "b: 'b' .KeyError"), ({"a": [0.0], "b": 1}, r"a: its shape is \(1,\), not \(2,\)"), (None, "a: .*TypeError"),
    ({"a": [1j, 0], "b": 1}, "a: "), ({"a": [0.0, 0.0], "b": -1}, r"b: -1 is not in Discrete\(3\)"), ({"a": ["x", "y"], "b": 1}, "a: ")])
def test_a_part_that_its_space_does_not_have_is_named(made, value, says):
    """Of -1, one-hot would make the last of all."""
    env = made(observation_space=Dict({"a": Box(-1, 1, (2,)), "b": Discrete(3)}), seen=lambda self: value)
    refused(f"observation_space does not have: {says}", env.reset, seed=0)


# ---- reward, success, progress, the ends of an episode ----
def test_arrays_of_one_element_are_numbers(made):
    """Reward, success, progress, terminated, truncated: numpy 2.4 makes a float of none of them."""
    env = made(step=lambda self, action: (self.seen(), np.array([2.5], np.float32), np.array([False]), np.array(True),
                                          {"success": np.array([[True]]), "progress": np.array([7])}))
    env.reset(seed=0)
    _, reward, terminated, truncated, info = env.step(np.zeros(1, np.float32))
    assert (reward, terminated, truncated, info["success"], info["progress"]) == (2.5, False, True, 1.0, 7.0)
    assert (type(reward), type(terminated), type(truncated)) == (float, bool, bool)


@pytest.mark.parametrize("what, changes", [
    ("reward", dict(reward=lambda self: np.nan)), ("reward", dict(reward=lambda self: np.array([-np.inf]))),
    ("reward", dict(reward=lambda self: None)), ("reward", dict(reward=lambda self: np.zeros(2))),
    ("reward", dict(reward=lambda self: np.nan, info=lambda self: {"progress": 0.0})),
    ("progress", dict(info=lambda self: {"progress": np.nan})), ("progress", dict(info=lambda self: {"progress": "far"})),
    ("success", dict(info=lambda self: {"success": np.inf})), ("success", dict(info=lambda self: {"is_success": np.nan})),
    ("reward", dict(reward=lambda self: 1 + 2j)), ("reward", dict(reward=lambda self: np.ma.masked)),
    ("success", dict(info=lambda self: {"success": 1.5})), ("success", dict(info=lambda self: {"is_success": -1})),
    ("progress", dict(info=lambda self: {"progress": np.complex64(1)})),
    ("terminated", dict(step=lambda self, action: (self.seen(), 0.0, None, False, {})))])
def test_a_reward_or_progress_that_is_no_number_is_refused(made, what, changes):
    """One line that names what and when."""
    env = made(**changes)
    env.reset(seed=0)
    refused(f"as {what}; .*step 1 of the episode", env.step, np.zeros(1, np.float32))


def test_progress_is_unknown_at_the_start_and_the_reward_where_it_is_not_told(made):
    """The start has no reward yet; info may be None, or one dict that is used again and again."""
    env = made(info=lambda self: None)
    assert np.isnan(env.reset(seed=0)[1]["progress"])
    assert env.step(np.zeros(1, np.float32))[4] == {"success": 0.0, "progress": -1.0} and not env.tells_success
    same = {"success": None, "is_success": np.bool_(True), "progress": None}
    env = made(info=lambda self: same)
    env.reset(seed=0)
    infos = [env.step(np.zeros(1, np.float32))[4] for _ in range(2)]
    assert infos[0] == {"success": 1.0, "is_success": True, "progress": -1.0} and infos[0] is not infos[1] is not same


def test_the_time_limit_is_kept_also_of_an_environment_that_brings_its_own(made):
    """An entry point that returns a limited environment ends when that does; the horizon must say so."""
    gymnasium.register("Brings-v0", entry_point=lambda render_mode: gymnasium.wrappers.TimeLimit(Bar(render_mode), 4))
    env = envs.make("Brings-v0", goal="to go")
    del gymnasium.registry["Brings-v0"]
    env.reset(seed=0)
    assert env.horizon == 4 and [env.step(np.zeros(1, np.float32))[3] for _ in range(4)] == [False] * 3 + [True]


# ---- the interface ----
@pytest.mark.parametrize("words, changes", [
    (r"tuple\(ndarray, float, bool, dict\) from step\(\).*terminated, truncated", dict(step=lambda self, a: (self.seen(), 0.0, False, {}))),
    (r"tuple\(ndarray, float, bool, bool, bool\) from step", dict(step=lambda self, a: (self.seen(), 0.0, False, False, True))),
    (r"NoneType\(\) from step", dict(step=lambda self, a: None)),
    (r"ndarray\(\) from reset\(\).*\(observation, info\)", dict(reset=lambda self, *, seed=None, options=None: self.seen())),
    (r"list\(float, float\) from reset", dict(reset=lambda self, *, seed=None, options=None: [0.0, 0.0]))])
def test_the_interface_of_old_gym_is_one_line(made, words, changes):
    """Four values from step(), only the observation from reset(): what came, and what is wanted."""
    env = made(**changes)

    def start():
        env.reset(seed=0)
        env.step(np.zeros(1, np.float32))

    refused(words, start)


@pytest.mark.parametrize("reset", [lambda self: None, lambda self, seed=None: None, lambda self, options=None: None])
def test_a_reset_without_seed_or_options_is_one_line(made, reset):
    """An episode could not be seen again; it must be said when the environment is made."""
    refused(r"another reset\(\) than Gymnasium's, which is reset\(self, \*, seed=None, options=None\)", made, reset=reset)


def no_rgb(self, render_mode=None):
    assert render_mode != "rgb_array"


@pytest.mark.parametrize("words, init", [("AssertionError.*rgb_array", no_rgb), ("render_mode", lambda self: None),
                                         ("KeyError.*rgb_array", lambda self, render_mode: {}[render_mode])])
def test_an_environment_that_cannot_be_made_to_draw_is_one_line(made, words, init):
    """Whatever its constructor raises, with or without words of its own."""
    with pytest.raises(ValueError, match=f"cannot be made here: .*{words}") as error:
        made(__init__=init)
    assert "\n" not in str(error.value)


TINY = ["--goal", "to go", "--total-steps", "60", "--seed-steps", "10", "--explore-steps", "20", "--eval-every", "30", "--eval-episodes",
        "1", "--batch-size", "8", "--hidden", "8", "--reward-image-size", "47", "--vlm-image-size", "47", "--horizon", "10"]


@pytest.mark.parametrize("changes", [
    dict(step=lambda self, a: (self.seen(), 0.0, False, {})), dict(reset=lambda self, *, seed=None, options=None: self.seen()),
    dict(reset=lambda self: None), dict(__init__=no_rgb), dict(render=lambda self: None), dict(render=lambda self: 1 / 0),
    dict(render=lambda self: Bar.render(self) * (np.nan if self.t else 1.0)), dict(seen=lambda self: self.x * (np.nan if self.t else 1)),
    dict(reward=lambda self: np.nan), dict(info=lambda self: {"progress": np.inf})])
def test_what_cannot_be_used_leaves_no_run_folder_behind(made, tmp_path, capsys, changes):
    """Reset, image and one step are tried before anything is made: exit 2 and one line."""
    Tried = type("Tried", (Bar,), changes)
    gymnasium.register("Tried-v0", entry_point=Tried)
    try:
        code = train.main(["--env", "Tried-v0", "--reward", "true", "--out", str(tmp_path / "run"), *TINY])
    finally:
        del gymnasium.registry["Tried-v0"]
    said = capsys.readouterr().err.strip().splitlines()
    assert code == 2 and said[-1].startswith("train.py: Tried-v0 ") and "Traceback" not in "".join(said)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("reward", ["true", "sparse"])
def test_a_fault_in_the_middle_of_a_run_stops_it_in_one_line(tmp_path, capsys, reward):
    """Before anything is learned from it; and the line says how to go on once the environment is mended."""
    class Late(Bar):
        ever = 0

        def step(self, action):
            self.ever += 1
            obs, *rest = super().step(action)
            return obs * (np.nan if self.ever == 55 else 1), *rest

    gymnasium.register("Late-v0", entry_point=Late)
    try:
        code = train.main(["--env", "Late-v0", "--reward", reward, "--out", str(tmp_path / "run"), *TINY])
    finally:
        del gymnasium.registry["Late-v0"]
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert code == 2 and "Late-v0 gave nan as entry 0 of the observation" in said
    assert "step 5 of the episode, 55 since the start" in said and "--resume" in said


def test_the_trial_before_a_run_changes_no_random_number(monkeypatch):
    """The generators of both environments must be where they are without it."""
    made, make = [], envs.make
    monkeypatch.setattr(envs, "make", lambda *args: made.append(make(*args)) or made[-1])
    prepare(settings.parse_args(["--env", "CartPole", "--seed", "5", "--out", "nowhere"]))
    for env in made:
        fresh = make("CartPole", 5)
        assert env.action_space.sample() == fresh.action_space.sample()
        assert env.reset(seed=8)[0].tolist() == fresh.reset(seed=8)[0].tolist()


# ---- actions ----
@pytest.mark.parametrize("space, arrives", [
    (Box(-5, 5, (1,), np.int32), [-5, 0, 5]), (Box(0, 255, (1,), np.uint8), [0, 128, 255]), (Box(0, 1, (1,), np.int8), [0, 1, 1]),
    (Box(-2.0, 6.0, (1,), np.float64), [-2, 2, 6])])
def test_actions_reach_the_whole_range(made, space, arrives):
    """-1, 0, 1 are the least, the middle, the most; of integers, each is as likely as any other."""
    env = made(action_space=property(lambda self: space, lambda self, value: None))
    env.reset(seed=0)
    for action in (-1, 0, 1):
        env.step(np.array([action], np.float32))
    got = env.unwrapped.got
    assert [float(action[0]) for action in got] == arrives and {action.dtype for action in got} == {space.dtype}
    if space.dtype.kind != "f":
        env = made(action_space=property(lambda self: space, lambda self, value: None), horizon=9999)
        env.reset(seed=0)
        size = int(space.high[0]) - int(space.low[0]) + 1
        for action in np.linspace(-1, 1, 10 * size + 1):
            env.step(np.array([action], np.float32))
        counts = np.unique(env.unwrapped.got, return_counts=True)[1]
        assert len(counts) == size and counts.min() >= 9 and counts.max() <= 12


@pytest.mark.parametrize("space", [
    Box(-np.inf, 1, (1,), np.int32), Box(np.array([0, -1.0]), np.array([0, 1.0])), Box(0, 2**63 - 1, (1,), np.int64),
    Box(-1, 1, (0,)), Box(3, 3, (2, 2)), Dict({"a": Discrete(2)}), Text(3), None])
def test_other_actions_are_refused_in_one_line(made, space):
    """With both ends the same, [-1, 1] cannot be stretched to the range: nan would arrive."""
    with pytest.raises(ValueError, match="acts in .*only Discrete and Box") as error:
        made(action_space=property(lambda self: space, lambda self, value: None))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("space, arrives, says", [
    (Box(-2.0, 6.0, (2, 2), np.float64), [-2, 2, 6], None), (Box(0, 4, (2, 1), np.int32), [0, 2, 4], None),
    (Box(-np.inf, np.inf, (2,), np.float32), [-1, 0, 1], "2 of 2 action numbers have no bounds: they go from -1 to 1"),
    (Box(-3e38, 3e38, (1,), np.float32), [-1, 0, 1], "1 of 1"), (Box(0, np.inf, (1,), np.float32), [0, 0.5, 1], "from 0 to 1 here"),
    (Box(5, np.inf, (1,), np.float32), [5, 5.5, 6], "from 5 to 6"), (Box(-np.inf, -5, (1,), np.float32), [-6, -5.5, -5], "from -6 to -5")])
def test_actions_of_any_shape_and_without_ends_arrive_in_their_space(made, space, arrives, says):
    """As a vector from -1 to 1; a range that has no end is said to have one."""
    env = made(action_space=property(lambda self: space, lambda self, value: None))
    env.reset(seed=0)
    for action in (-1, 0, 1):
        env.step(np.full(env.action_space.shape, action, np.float32))
    got = env.unwrapped.got
    assert [action.ravel().tolist() for action in got] == [[number] * space.low.size for number in arrives]
    assert all(action in space for action in got)
    assert says in adapt.notes(env)[0] if says else adapt.notes(env) == []


@pytest.mark.parametrize("space, count", [(MultiBinary(3), 8), (MultiBinary((2, 2)), 16), (MultiDiscrete([2, 3], start=[0, -1]), 6),
                                          (MultiDiscrete([[2], [4]]), 8)])
def test_several_choices_are_one_choice_among_all_combinations(made, space, count):
    """Each must arrive once, in its space."""
    env = made(action_space=property(lambda self: space, lambda self, value: None), horizon=99)
    env.reset(seed=0)
    assert env.action_space == Discrete(count) and f"the {count} combinations of" in adapt.notes(env)[0]
    for action in range(count):
        env.step(action)
    got = env.unwrapped.got
    assert all(action in space for action in got) and len({action.tobytes() for action in got}) == count


@pytest.mark.parametrize("space", [MultiBinary(9), MultiDiscrete([9] * 40)])
def test_too_many_combinations_are_one_line(made, space):
    """A network with an output for each of 9^40 cannot be."""
    with pytest.raises(ValueError, match=r"which has [\d,]+ combinations; up to 256") as error:
        made(action_space=property(lambda self: space, lambda self, value: None))
    assert "\n" not in str(error.value)


def test_an_action_that_is_clipped_in_place_is_a_copy():
    """The buffer must store what was chosen; and a repeated action must arrive the same each time."""
    class Greedy(envs.CartPole):
        got = []

        def step(self, action):
            self.got.append(float(action[0]))
            action *= 0
            return super().step(action)

    env = envs.TaskEnv(Greedy(), "to go", 8, 0, action_repeat=2)
    env.reset(seed=0)
    action = np.array([0.5], np.float32)
    env.step(action)
    assert action[0] == 0.5 and Greedy.got == [0.5, 0.5]


# ---- what others expect of an environment ----
@pytest.mark.parametrize("name", [*envs.TASKS, "MetaWorld/reach-v3", "Reacher-v5", "FrozenLake-v1"])
def test_gymnasium_finds_nothing_in_a_task_as_it_is_handed_out(env_of, name):
    """check_env, with all that is wrapped around: it is made again from its spec, drawn, and closed."""
    try:
        env = envs.make(name, goal="to go")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it would like bounds, and no wrapper
            check_env(env)
    except ValueError as error:  # without OpenGL or a package
        pytest.skip(str(error))


def test_gymnasium_finds_nothing_in_what_is_adapted(made):
    """Also where observations and actions were changed by wrappers."""
    space = Dict({"a": Box(-10, 10, (2,), np.float32), "b": Text(5)})
    env = made(observation_space=space, seen=lambda self: {"a": self.x.copy(), "b": "x"},
               action_space=property(lambda self: MultiBinary(2), lambda self, value: None))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        check_env(env)
    assert env.spec.make().reset(seed=0)[0].tolist() == [0.5, 0.5] and env.metadata["render_modes"] == ["rgb_array"]


# ---- finding an environment ----
@pytest.mark.parametrize("name, says", [
    ("CardPole", "there are CartPole, .*, or any Gymnasium id with --goal; the closest are CartPole, CartPole-v1"),
    ("pendulum-v1", "the closest are Pendulum-v1"), ("Meta-World/door-open-v3", "the closest are MetaWorld/door-open-v3"),
    ("qqqqq", "named first: panda_gym:PandaReach-v3 .*mypkg.envs:My-v0"), ("__main__.Mine", "has to be handed in again, train.config, env=")])
def test_an_unknown_name_is_one_line_with_the_closest(monkeypatch, name, says):
    """And with how to name what a package brings."""
    monkeypatch.setattr(adapt, "packages", lambda: [])
    with pytest.raises(ValueError, match=says) as error:
        envs.make(name, goal="to go")
    assert "\n" not in str(error.value)


MODULE = """import gymnasium
class {0}(gymnasium.Env):
    metadata = {{"render_modes": ["rgb_array"]}}
    observation_space, action_space = gymnasium.spaces.Box(-9, 9, (1,)), gymnasium.spaces.Discrete(2)
    def __init__(self, size=1, render_mode=None):
        self.size, self.render_mode = size, render_mode
    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return [self.size], {{}}
    def step(self, action):
        return [action], 1.0 * action, False, False, {{}}
    def render(self):
        import numpy
        return numpy.full((50, 50, 3), 9, numpy.uint8)
gymnasium.register("{0}-v0", entry_point={0}, max_episode_steps=5)
print("noise")
"""


def test_the_id_of_an_installed_package_is_found_with_its_name(tmp_path, monkeypatch, capsys):
    """PandaReach-v3 alone is unknown; panda_gym:PandaReach-v3 is what has to be typed, and nothing else is printed."""
    (tmp_path / "brings_it.py").write_text(MODULE.format("Brought"))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(adapt, "packages", lambda: ["no_such_package", "brings_it"])
    with pytest.raises(ValueError, match="Brought-v0 comes with brings_it, .*: --env brings_it:Brought-v0$"):
        envs.make("Brought-v0", goal="to go")
    del sys.modules["brings_it"], gymnasium.registry["Brought-v0"]
    with pytest.raises(ValueError, match="the closest are brings_it:Brought-v0"):
        envs.make("Brougth-v0", goal="to go")
    assert capsys.readouterr().out == ""
    assert envs.make("brings_it:Brought-v0", goal="to go").horizon == 5


def test_packages_that_may_bring_environments_are_those_that_need_gymnasium():
    """This one's own are two of them; gymnasium itself needs no name in front."""
    assert {"metaworld", "gymnasium", "numpy"} & set(adapt.packages()) == {"metaworld"}


def test_a_module_in_the_current_folder_is_found_and_takes_its_arguments(tmp_path, monkeypatch, unreported):
    """train.py lies elsewhere; --env-kwargs reach the constructor."""
    (tmp_path / "mypkg_here").mkdir()
    (tmp_path / "mypkg_here" / "envs.py").write_text(MODULE.format("Mine"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])  # as where train.py is started by its path
    flags = ["--env", "mypkg_here.envs:Mine-v0", "--env-kwargs", '{"size": 3}', "--reward", "true", "--out", "run", *TINY]
    assert train.main(flags) == 0
    stored = json.loads((tmp_path / "run" / "config.json").read_text())
    assert stored["env_kwargs"] == '{"size": 3}' and "--env-kwargs" in stored["command"]


@pytest.mark.parametrize("wrong, says", [('{"size": 3', "--env-kwargs .*: no JSON object"), ("[1]", "--env-kwargs .1.: no JSON object"),
                                         ('{"colour": 3}', "Pendulum-v1 cannot be made here: .*colour")])
def test_arguments_that_cannot_be_used_are_one_line(capsys, wrong, says):
    """No JSON, no object, or not the environment's."""
    assert train.main(["--env", "Pendulum-v1", "--goal", "up", "--reward", "true", "--env-kwargs", wrong]) == 2
    assert re.search(says, capsys.readouterr().err.strip().splitlines()[-1])


def test_a_module_with_the_name_of_one_of_ours_is_one_line(tmp_path, monkeypatch):
    """envs.py is what many call theirs, and what this project calls its own."""
    (tmp_path / "envs.py").write_text(MODULE.format("Ours"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="this project has a module envs of its own.*mypkg.envs:My-v0") as error:
        envs.make("envs:Ours-v0", goal="to go")
    assert "\n" not in str(error.value)


def test_arguments_from_a_stranger_s_folder_are_named_again(tmp_path):
    """Some of Gymnasium's ids import the module that an argument names."""
    kwargs = '{"env_id": "theirs:X-v0"}'
    (tmp_path / "config.json").write_text(json.dumps(dict(env="GymV26Environment-v0", goal="up", env_kwargs=kwargs, command="x")))
    with pytest.raises(settings.UserError, match="would be made with .*theirs:X-v0.*--env-kwargs"):
        settings.parse_args(["--resume", str(tmp_path)])
    config = settings.parse_args(["--resume", str(tmp_path), "--env-kwargs", kwargs])
    assert config.env_kwargs == kwargs
    with pytest.raises(settings.UserError, match="keeps its --env-kwargs"):
        settings.parse_args(["--resume", str(tmp_path), "--env-kwargs", "{}"])


def test_tasks_that_take_no_arguments_say_so():
    """CartPole is made by a function."""
    with pytest.raises(ValueError, match="CartPole is made without arguments"):
        envs.make("CartPole", kwargs={"size": 3})
    with pytest.raises(ValueError, match="Bar is made without arguments"):
        envs.make(Bar("rgb_array"), goal="to go", kwargs={"size": 3})


def test_another_mujoco_is_one_line_with_the_command_that_brings_ours_back(monkeypatch):
    """dm-control moves it, and Meta-World then fails with shapes that do not fit."""
    installed = {"mujoco": "4.0.0", "mujoco-core": "4.0.0"}

    def version(name):
        if name not in installed:
            raise importlib.metadata.PackageNotFoundError(name)
        return installed[name]

    monkeypatch.setattr(importlib.metadata, "version", version)
    said = adapt.moved("DrawerOpen cannot be made here: mujoco")
    assert said.startswith("DrawerOpen cannot be made here: mujoco; installed is mujoco 4.0.0 mujoco-core 4.0.0, and what works is 3.")
    assert re.search(r"pip uninstall -y mujoco mujoco-core && pip install mujoco==3[.\d]+$", said) and "\n" not in said
    installed.clear()
    assert adapt.moved("mujoco") == "mujoco"
    installed["mujoco"] = re.search(r"^mujoco==(\S+)", Path(envs.__file__).with_name("requirements.txt").read_text(), re.M)[1]
    assert adapt.moved("mujoco") == "mujoco"


# ---- an environment that is handed in from Python ----
def test_an_environment_or_a_function_is_a_task_with_a_goal():
    """Its time limit is known; without a goal, one line."""
    for given in (Bar("rgb_array"), lambda: Bar("rgb_array"), gymnasium.wrappers.TimeLimit(Bar("rgb_array"), 7)):
        env = envs.make(given, goal="to go")
        assert env.goal == "to go" and env.name == "Bar" and env.horizon == (7 if isinstance(given, gymnasium.Wrapper) else 1000)
        env.reset(seed=0)
        assert env.image(64).shape == (64, 64, 3)
    with pytest.raises(ValueError, match="Bar needs a goal"):
        envs.make(Bar("rgb_array"))


class Shared(Bar):
    """Copies of it move one and the same place, as copies of a simulator's handle do."""

    place = np.zeros(1)

    def step(self, action):
        Shared.place += 1
        return self.x + np.float32(Shared.place), 0.0, False, False, {}


class Uncopied(Bar):
    def __deepcopy__(self, memo):
        raise TypeError("cannot pickle\na window")


def test_training_and_evaluation_get_an_environment_each():
    """A copy, one from the spec, or two of a function; what is no second one is one line that says what to hand in."""
    env = Bar("rgb_array")
    first, other = adapt.pair(env)
    assert first is env and type(other) is Bar and other is not env and other.x is not env.x
    made = gymnasium.make("Pendulum-v1", g=5.0, render_mode="rgb_array")
    assert adapt.pair(made)[1].unwrapped.g == 5.0 and adapt.pair(made)[1].unwrapped is not made.unwrapped
    assert [type(each) for each in adapt.pair(Bar)] == [Bar, Bar]
    for wrong, says in ((Uncopied(), "Uncopied cannot be copied .cannot pickle a window., and .*env=lambda"), (lambda: env, "same environment twice.*env=lambda"),
                        (Shared(), "happens in a copy of .*Shared happens in"), ("Bar", "neither an environment"), (lambda: 5, "no environment of Gymnasium")):
        with pytest.raises(ValueError, match=says) as error:
            adapt.pair(wrong)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("reward", ["preference", "true"])
def test_train_takes_an_environment_and_goes_on_with_it(tmp_path, unreported, reward):
    """By either loop. The run is called after the class; on resume it has to be handed in again."""
    flags = ["--reward", reward, "--labels", "oracle", *TINY] if reward == "preference" else ["--reward", reward, *TINY]
    config = settings.parse_args([*flags, "--out", str(tmp_path / "run")])
    moving = type("Moving", (Bar,), {"render": lambda self: np.roll(Bar.render(self), self.t, 1), "reward": lambda self: self.t})
    rows = train.train(config, env=lambda: moving("rgb_array"))
    assert rows[-1]["step"] == 60
    stored = json.loads((tmp_path / "run" / "config.json").read_text())
    assert stored["env"] == f"{__name__}.Moving"
    again = dataclasses.replace(config, out=None, env=stored["env"])
    with pytest.raises(settings.UserError, match="has to be handed in again"):
        train.train(again)
    with pytest.raises(settings.UserError, match="env=5 is neither"):
        train.train(config, env=5)


# ---- images ----
RED = Bar.render(None)
ON_BLACK = np.dstack([RED, np.full((64, 64), 255, np.uint8)])
ON_BLACK[RED.min(-1) == 255] = 0  # black, and fully transparent: white is seen
KINDS = {
    "uint8": RED, "float": RED / 255, "float16": (RED / 255).astype(np.float16), "255": RED.astype(np.float32), "int64": RED.astype(np.int64),
    "above 1": np.where(RED == 255, 1.0000005, RED / 255), "first": RED.transpose(2, 0, 1), "list": [RED * 0, RED], "tuple": (RED,),
    "frames": np.stack([RED * 0, RED]), "nested": RED.tolist(), "opaque": np.dstack([RED, np.full((64, 64), 255, np.uint8)]),
    "transparent": ON_BLACK, "transparent float": ON_BLACK / 255, "Pillow": Image.fromarray(RED), "palette": Image.fromarray(RED).quantize(),
    "upside down": RED[::-1], "tensor": torch.tensor(RED)}
GREY = RED[..., 1]
GREYS = {"grey": GREY, "channel": GREY[..., None], "first": GREY[None], "bool": GREY > 0, "bool channel": (GREY > 0)[..., None],
         "float": GREY / 255.0, "list": [GREY * 0, GREY], "Pillow": Image.fromarray(GREY), "black or white": Image.fromarray(GREY > 0)}


@pytest.mark.parametrize("size", [64, 32, 90])
@pytest.mark.parametrize("kind", [*KINDS, *(f"grey {kind}" for kind in GREYS)])
def test_whatever_render_gives_is_the_same_image(made, kind, size):
    """Every kind must look like the plain one, at every size, and lie in memory as the buffer wants it."""
    drawn = GREYS[kind[5:]] if kind.startswith("grey ") else KINDS[kind]
    plain = np.repeat(GREY[..., None], 3, 2) if kind.startswith("grey ") else RED
    env, expected = made(render=lambda self: drawn), made(render=lambda self: plain)
    env.reset(seed=0), expected.reset(seed=0)
    image = env.image(size)
    assert image.dtype == np.uint8 and image.shape == (size, size, 3) and image.flags.c_contiguous
    assert np.abs(image.astype(int) - expected.image(size)).max() <= (1 if "16" in kind else 0)


@pytest.mark.parametrize("frames, seen", [
    ([RED / 255, RED / 255 * 1.3], "from 0 to 1, as before"), ([RED / 255, RED * 1.0], "from 0 to 1, as before"),
    ([RED * 1.0, RED / 255], [RED, np.rint(RED / 255)]), ([RED * 0.0, RED / 255, RED * 0.0], [RED * 0, RED, RED * 0]),
    ([RED * 0.0, RED * 1.0, RED / 255], [RED * 0, RED, np.rint(RED / 255)]), ([RED, RED // 255], [RED, RED // 255]),
    ([RED, RED / 255, RED > 0], [RED, RED, (RED > 0) * 255]), ([RED / 255 * 1.3], "0 to 1.3, which is no known scale"),
    ([RED / 255 * 7.9], "no known scale"), ([RED * 1.0, RED / 255 * 1.3], [RED, np.rint(RED / 255 * 1.3)]),
    ([RED // 255], "uint8 numbers from 0 to 1, which is no known scale"), ([(RED // 255).astype(int)], "no known scale"),
    ([RED * 0, RED // 255], "no known scale")])
def test_the_first_image_that_tells_it_decides_which_number_is_white(made, frames, seen):
    """A bright pixel or a dark frame would otherwise turn one image black or white; a change is one line."""
    left = list(frames)
    env = made(render=lambda self: left.pop(0))
    env.reset(seed=0)
    if isinstance(seen, str):
        for _ in frames[1:]:
            env.image(64)
        refused(f"drew no image, but .*{seen}", env.image, 64)
    else:
        assert [np.array_equal(env.image(64), image) for image in seen] == [True] * len(frames)


@pytest.mark.parametrize("member", [lambda self: 1 / 0, lambda self, index: 1 / 0, RED, "red.png", lambda self, size, way: 1 / 0, int])
def test_a_member_that_only_has_the_name_image_is_not_called(made, member):
    """Only image(size) draws; with any other, render() does."""
    env = made(image=member)
    env.reset(seed=0)
    assert np.array_equal(env.image(64), RED)


@pytest.mark.parametrize("member, limit", [(lambda self: 5, 1000), (5, 5), (np.int64(5), 5), (0, 1000), ("5", 1000), (None, 1000), (5.0, 1000),
                                           (True, 1000), (-5, 1000)])
def test_a_member_that_only_has_the_name_horizon_is_no_limit(made, member, limit):
    """A whole number is one, but what the user asks for comes first."""
    gymnasium.register("Named-v0", entry_point=type("Named", (Bar,), {"horizon": member}))
    try:
        assert envs.make("Named-v0", goal="to go").horizon == limit
        assert envs.make("Named-v0", goal="to go", horizon=9).horizon == 9
    finally:
        del gymnasium.registry["Named-v0"]


def test_half_transparent_is_half_white():
    """Red at half its strength over white is (255, 128, 128)."""
    drawn = np.full((4, 4, 4), (255, 0, 0, 128), np.uint8)
    assert envs.as_image(drawn)[0, 0].tolist() == [255, 127, 127]


@pytest.mark.parametrize("drawn, says", [
    (None, "NoneType"), ("a text", "str"), ([], r"float64 \(0,\)"), ({}, "dict"), (3.5, "float"), (np.zeros(5), r"\(5,\)"),
    (np.zeros((9, 9, 2)), r"\(9, 9, 2\)"), (np.zeros((0, 4, 3)), r"\(0, 4, 3\)"), (np.zeros((4, 4, 3), object), "object"),
    (np.full((4, 4, 3), 1j), "complex128"), (np.ma.masked_less(RED, 9), "MaskedArray"),
    (np.full((4, 4, 3), np.nan), "nan"), (np.full((4, 4, 3), np.inf), "inf"), (np.full((4, 4, 3), -0.5), "-0.5"),
    (np.full((4, 4, 3), 65535, np.uint16), "65535"), (np.full((4, 4, 3), -9), "-9"), ([[1, 2], [3]], "list")])
def test_what_is_no_image_is_one_line(made, drawn, says):
    """What was drawn, and what is possible."""
    env = made(render=lambda self: drawn)
    env.reset(seed=0)
    refused(f"drew no image, but .*{says}.*at a reset", env.image, 64)


@pytest.mark.parametrize("error", [NotImplementedError(), RuntimeError("no\ndisplay"), TypeError("needs mode")])
def test_a_render_that_fails_is_one_line(made, error):
    """A missing screen raises whatever the library likes."""
    def render(self):
        raise error

    env = made(render=render)
    env.reset(seed=0)
    refused(f"cannot draw itself here: {type(error).__name__}", env.image, 64)


@pytest.mark.parametrize("shape", [(20, 60), (60, 20), (31, 64), (200, 31)])
def test_the_whole_of_an_oblong_image_is_seen(shape):
    """Red in the first corner, blue in the last: both must be there, in proportion, on a plain ground."""
    image = np.full((*shape, 3), 255, np.uint8)
    image[:5, :5], image[-5:, -5:] = (255, 0, 0), (0, 0, 255)
    side = max(shape)
    seen = envs.square(image, side)
    red, blue = (np.argwhere((seen == colour).all(-1)) for colour in ([255, 0, 0], [0, 0, 255]))
    assert seen.shape == (side, side, 3) and len(red) == len(blue) == 25  # no stripes of them either
    assert (blue.max(0) - red.min(0) + 1).tolist() == list(shape)
    assert (red.min(0) - [(side - n) // 2 for n in shape]).tolist() == [0, 0]
    assert ((seen == 255).all(-1)).sum() == side**2 - 50
    assert envs.square(image, 16).shape == (16, 16, 3) and envs.square(image, 300).flags.c_contiguous


def test_each_edge_goes_on_in_its_own_colour():
    """A blue sky stays above, and brown ground below; left and right where an image is tall."""
    image = np.full((10, 30, 3), (0, 0, 255), np.uint8)
    image[5:] = (90, 60, 0)
    for turned in (image, image.swapaxes(0, 1)):
        seen = envs.square(turned, 30)
        seen = seen if turned is image else seen.swapaxes(0, 1)
        assert (seen[:15] == [0, 0, 255]).all() and (seen[15:] == [90, 60, 0]).all()


def test_an_image_that_is_drawn_into_one_array_is_a_copy(made):
    """Also where it has the right size already, and from an environment with an image(size) of its own."""
    class Own(Bar):
        canvas = np.zeros((64, 64, 3), np.uint8)

        def image(self, size):
            self.canvas += 9
            return self.canvas

        def render(self):
            return self.image(64)

    for env in (made(base=Own), made(base=Own, image=None, render=lambda self: Own.image(self, 64))):
        env.reset(seed=0)
        first = env.image(64)
        before = first[0, 0, 0]
        env.image(64)
        assert first[0, 0, 0] == before


# ---- what learns ----
def test_the_buffer_takes_no_number_that_is_not_finite():
    """Used alone, it must refuse in one line too, and must not count the row."""
    good = dict(obs=[1.0, 2.0], action=[0.5], next_obs=[3.0, 4.0], terminated=False, image=None, true_reward=np.array([1.0]))
    buffer = sac.ReplayBuffer(4, (2,), (1,))
    buffer.add(**good)
    assert buffer.true_reward[0] == 1
    with np.errstate(all="ignore"):
        for name, value, says in (("obs", [0.0, np.nan], "entry 1 of obs is nan"), ("next_obs", [np.inf, 0.0], "entry 0 of next_obs is inf"),
                                  ("action", [np.nan], "entry 0 of action"), ("true_reward", np.nan, "true_reward is nan"),
                                  ("next_obs", np.array([0.0, 1e300]), "entry 1 of next_obs is 1e.300"), ("obs", 1.0, "reshape")):
            with pytest.raises(ValueError, match=says):
                buffer.add(**{**good, name: value})
    assert len(buffer) == 1


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_novelty_of_a_few_states_is_finite(rows):
    """One stored state has no deviation, and two alike no distance: 0 / 0 both."""
    buffer = sac.ReplayBuffer(8, (2,), (1,))
    for _ in range(rows):
        buffer.add([1.0, 2.0], [0.0], [1.0, 2.0], False, None, 0.0)
    assert torch.isfinite(sac.novelty_batch(buffer, 4)["reward"]).all()


def test_the_largest_number_that_is_let_in_makes_no_network_nan():
    """LARGEST is as large as what is squared in float32 may be."""
    rng = np.random.default_rng(0)
    buffer = sac.ReplayBuffer(64, (2,), (1,))
    for _ in range(64):
        buffer.add(rng.choice([-1, 1], 2) * envs.LARGEST, rng.uniform(-1, 1, 1), rng.choice([-1, 1], 2) * envs.LARGEST, False, None, 0.0)
    agent = sac.SAC(2, Box(-1, 1, (1,), np.float32), hidden=(8, 8))
    for _ in range(20):
        losses = agent.update(sac.novelty_batch(buffer, 16))
    assert np.isfinite(agent.act(buffer.obs[0])).all() and torch.isfinite(losses["alpha"])


@pytest.mark.parametrize("unknown", [np.nan, np.inf, -np.inf])
def test_a_score_that_is_not_finite_gets_no_label(unknown):
    """It is neither closer nor farther than any other; the labels beside it stay."""
    labels = vlm_query.oracle_labels([unknown, 0.2, 0.2, unknown, 0.9], [0.5, unknown, 0.7, unknown, 0.1], np.random.default_rng(0))
    assert labels.tolist() == [-1, -1, 1, -1, 0] and labels.dtype == np.int8


# ---- progress, where none is told; two moments in one image; a schedule ----
class Walker(Bar):
    """A point that is pushed to and fro; by `pays`, the reward is where it is, or by how much it has come nearer to 0."""

    observation_space, pays = Box(-99, 99, (2,), np.float32), "difference"

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.x[:] = self.np_random.uniform(-3, 3), 0
        return self.seen(), {}

    def step(self, action):
        before, self.t = abs(self.x[0]), self.t + 1
        self.x[0] += float(action[0])
        rewards = {"difference": before - abs(self.x[0]), "place": -abs(self.x[0]), "clock": -1 + 0.1 * action[0],
                   "same": 1.0, "noise": self.np_random.normal()}
        if self.pays == "clock":
            self.x[1] = self.t  # the state tells the time, which any sum of like rewards follows
        return self.seen(), float(rewards[self.pays]), False, False, self.info()

    def render(self):
        image = np.zeros((64, 64, 3), np.uint8)
        image[:, min(self.t, 63)] = 255  # a line that moves by a pixel in each step
        return image


@pytest.mark.parametrize("pays, adds", [("place", False), ("clock", False), ("same", False), ("noise", False)])
def test_rewards_that_are_no_differences_are_not_added_up(made, pays, adds):
    """A reward that the state shows, one that is a clock, one that never differs, one of chance alone."""
    assert adapt.adds_up(made(Walker, horizon=40, pays=pays)) is adds


def test_rewards_that_are_differences_add_up_to_progress(made):
    """From a start that is always the same, their sum is how near it is, which a state shows and a reward does not."""
    env = made(Walker, horizon=40, reset=lambda self, *, seed=None, options=None: (Bar.reset(self, seed=seed), (
        self.x.fill(2), self.seen(), {})[1:])[1])
    assert adapt.adds_up(env) is True
    summed = adapt.RewardSum(env)
    for seed in range(2):  # it begins anew with each episode
        summed.reset(seed=seed)
        rewards, progress = zip(*((reward, info["progress"]) for _, reward, _, _, info in (
            summed.step(np.full(1, 0.25, np.float32)) for _ in range(5))))
        assert np.allclose(progress, np.cumsum(rewards)) and progress[-1] != rewards[-1]
    assert "sum of the rewards" in adapt.notes(summed)[0] and summed.horizon == 40 and summed.goal == "to go"


@pytest.mark.parametrize("known, progress", [({}, "sum"), ({"progress": "reward"}, "reward"), ({"resume": "."}, None)])
def test_a_run_adds_up_rewards_where_that_is_safe_and_a_resumed_one_as_before(monkeypatch, tmp_path, known, progress):
    """Where info tells no progress; what the settings say holds, and a run keeps the progress that it began with."""
    monkeypatch.setattr(adapt, "adds_up", lambda env: True)
    config = settings.Config(env="Pendulum-v1", goal="x", labels="oracle", out=str(tmp_path / "run"), **known)
    settled, env, other = prepare(config)
    assert settled.progress == progress and isinstance(env, adapt.RewardSum) == isinstance(other, adapt.RewardSum)
    assert isinstance(env, adapt.RewardSum) == (progress == "sum") and env.horizon == settled.horizon == 200
    told = settings.Config(env="CartPole", labels="oracle", out=str(tmp_path / "run"))
    assert prepare(told)[0].progress is None  # it tells progress


def test_an_image_of_two_moments_shows_the_earlier_one_above(made):
    """Two steps apart in short episodes; the same whoever asks for which size; square, with nothing lost."""
    env = adapt.TwoMoments(made(Walker, horizon=40), 64)
    for episode in range(2):  # a reset forgets what was seen
        env.reset(seed=0)
        for t in range(1, 9):
            env.step(np.zeros(1, np.float32))
            image, again = env.image(128), env.image(128)
            small = env.image(48)
            assert image.shape == (128, 128, 3) and small.shape == (48, 48, 3) and (image == again).all()
            above, below = image[20, :, 0].argmax(), image[100, :, 0].argmax()  # where the line is
            assert below - above == min(t - 1, 2), t
        assert image[20].max() == image[100].max() == 255


def test_two_moments_are_drawn_only_where_images_are_asked_for(made):
    """An evaluation draws none; a film has those that training has."""
    drawn = []
    env = adapt.TwoMoments(made(Walker, horizon=30, render=lambda self: drawn.append(0) or Walker.render(self)), 64)
    envs.rollout(env, lambda obs: np.zeros(1, np.float32), 0)
    assert not drawn
    images = envs.rollout(env, lambda obs: np.zeros(1, np.float32), 0, 48)[0]
    assert len(drawn) == 30 and len(images) == 30 and adapt.notes(env) == ["an image shows two moments: above, that of 2 steps ago"]


def test_with_two_frames_images_are_larger_and_the_vlm_is_told(tmp_path):
    """In a run: the wrapper, sizes by half as much again unless they are given, and words beside the goal."""
    config = settings.parse_args(["--env", "Pendulum-v1", "--goal", "to stand", "--labels", "oracle", "--frames", "2",
                                  "--out", str(tmp_path / "run"), "--set", "progress=reward", "--set", "vlm_image_size=400"])
    settled, env, _ = prepare(config)
    assert (settled.vlm_image_size, settled.reward_image_size, settled.goal) == (400, 126, "to stand")
    env.reset(seed=0)
    assert env.image(126).shape == (126, 126, 3) and env.moments.maxlen == 3
    labeler = make_labeler(settled)
    assert labeler.goal.startswith("to stand (each image shows two moments") and "above the earlier" in labeler.goal
    assert make_labeler(dataclasses.replace(settled, frames=1)).goal == "to stand"
    assert "--set frames=2" in settings.command_line(settled, env)


def test_a_reward_of_two_moments_sees_two_in_another_project_too(made):
    """RewardFromImages must not look through the wrapper for an image of one moment."""
    from support.afterwards import RewardFromImages

    seen = []
    reward = lambda images: seen.append(images[0]) or np.zeros(1)
    reward.size = 96
    env = RewardFromImages(adapt.TwoMoments(made(Walker, horizon=40), 64), reward)
    env.reset(seed=0)
    for _ in range(4):
        env.step(np.zeros(1, np.float32))
    assert seen[-1].shape == (96, 96, 3) and seen[-1][15].argmax() < seen[-1][75].argmax()


@pytest.mark.parametrize("changes, says", [
    ({"frames": 2}, "--frames 2: the offline stand-in reads images of one moment"),
    ({"frames": 2, "reward": "clip"}, "--frames 2 is for rewards that are learned from answers"),
    ({"frames": 3}, "--set frames=3: there are 1, 2"), ({"progress": "best"}, "--set progress=best: there are reward, sum")])
def test_two_frames_where_they_cannot_be_are_refused(changes, says):
    """One line, before anything is made."""
    with pytest.raises(settings.UserError, match=says):
        settings.resolve(settings.Config(**changes))


def budget(horizon, space=Box(-1, 1, (2,)), numbers=4):
    return adapt.budget(types.SimpleNamespace(horizon=horizon, action_space=space, observation_space=Box(-1, 1, (numbers,))))


@pytest.mark.parametrize("horizon", [1, 7, 50, 100, 200, 500, 1000, 5000, 27_000])
def test_a_budget_fits_together_for_episodes_of_any_length(horizon):
    """Random steps, then novelty, then questions, all of which can be asked before the last tenth; every value in range."""
    its = budget(horizon)
    assert its["seed_steps"] < its["explore_steps"] <= its["total_steps"] // 10
    last = its["explore_steps"] + 9 * its["feedback_every"]
    assert 0.85 * its["total_steps"] < last <= 0.9 * its["total_steps"] and 10 * its["pairs_per_session"] == its["max_pairs"]
    assert its["seed_steps"] >= 3 * horizon or horizon > 1000
    settings.check_values(settings.Config(env="x", **its))


def test_a_budget_follows_from_horizon_and_spaces():
    """Long episodes get more steps, a longer view, and random actions that are held, if they are pushes."""
    short, long = budget(50), budget(1000)
    assert (short["total_steps"], short["seed_steps"], short["explore_steps"]) == (50_000, 1_000, 4_000)
    assert (long["total_steps"], long["seed_steps"], long["explore_steps"]) == (100_000, 3_000, 6_000)
    assert (short["hold"], long["hold"], budget(1000, Discrete(3))["hold"]) == (1, 7, 1)
    assert (short["discount"], long["discount"], budget(1)["discount"]) == (0.96, 0.99, 0.9)
    assert (short["hidden"], budget(50, numbers=348)["hidden"]) == (128, 256)


def test_a_budget_keeps_its_shares_of_a_run_whose_steps_are_given():
    """Ten sessions in a shorter run too, with the exploration before them and a tenth of the steps after them."""
    env = types.SimpleNamespace(horizon=50, action_space=Box(-1, 1, (2,)), observation_space=Box(-1, 1, (4,)))
    its = adapt.budget(env, 12_000)
    assert (its["total_steps"], its["explore_steps"], its["eval_every"]) == (12_000, 1_200, 1_200)
    assert its["explore_steps"] + 9 * its["feedback_every"] <= 10_800 < its["explore_steps"] + 10 * its["feedback_every"]


@pytest.mark.parametrize("name", ["Dot", "EmptyGrid"])
def test_the_example_to_copy_is_an_environment(name):
    """Gymnasium's check must pass; the best way must end in success, and progress must grow on it."""
    env = gymnasium.make(f"tasks.example:{name}-v0", render_mode="rgb_array")
    check_env(env.unwrapped if name == "Dot" else env, skip_render_check=True)
    obs, info = env.reset(seed=0)
    told = [info["progress"]]
    ahead = [2] * 5 + [1] + [2] * 5  # of MiniGrid: ahead, a turn to the right, ahead
    for step in range(40):
        obs, _, terminated, _, info = env.step(
            np.clip(obs[2:] / 0.1, -1, 1).astype(np.float32) if name == "Dot" else ahead[step])
        told.append(info["progress"])
        if info["success"]:
            break
    assert info["success"] and (np.diff(told) >= 0).all() and terminated == (name == "EmptyGrid")


def test_a_run_in_a_foreign_environment_has_its_budget_and_a_short_command(tmp_path):
    """What was given holds, a built-in task and Meta-World's keep their schedules, and the command names no rule's value."""
    config = settings.Config(env="Pendulum-v1", goal="up", labels="oracle", total_steps=900, out=str(tmp_path / "run"))
    settled, env, _ = prepare(config)
    its = adapt.budget(env)
    assert settled.total_steps == 900 and settled.hold == its["hold"] == 2 and settled.updates == 2
    assert settings.command_line(settled, env) == (
        "python train.py --env Pendulum-v1 --goal up --labels oracle --total-steps 900 --set horizon=200")
    assert settings.resolve(settings.Config(), env) == settings.resolve(settings.Config())
    door = settings.resolve(settings.Config(env="MetaWorld/door-open-v3", goal="to open the door"))
    assert (door.total_steps, door.discount, door.layer_norm, door.sampler) == (15_000, 0.95, 1, "best")
