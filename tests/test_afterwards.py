"""Your judge, your reward, your function for each row; and your policy and reward once the run is over."""
import csv
import json
import os
import shutil
import sys
import textwrap
from pathlib import Path

import gymnasium
import imageio
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Discrete, MultiDiscrete

import envs
import sac
import train
import vlm_query
from support import afterwards, given_rewards, report, run, settings, yours
from test_run_folder import SMALL, changed
from train import Config

OWN = {name: value for name, value in SMALL.items() if name != "labels"}


@pytest.fixture(scope="module", autouse=True)
def unreported():
    """Leaves out reports and films, to save their seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "write_report", lambda folder: Path(folder, "report.html").touch())
        patch.setattr(run.Run, "film", lambda *_: None)
        patch.setattr(run, "write_episodes", lambda *_: 0.0)
        yield


def darker(first, second, goal):
    return int(second.mean() < first.mean())


def records(folder):
    return [json.loads(line) for line in open(Path(folder, "labels.jsonl"))]


def cells(folder):
    with open(Path(folder, "metrics.csv")) as file:
        return list(csv.DictReader(file))


def in_order(pairs):
    """(M, 2) grey values -> first, second (M, 48, 48, 3)."""
    return [np.full((len(pairs), 48, 48, 3), np.array(side)[:, None, None, None], np.uint8) for side in zip(*pairs)]


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A run of 130 steps by a judge of ours, whose last checkpoint is of step 120 -> its folder; and r_psi, pi as they ended."""
    folder, ended = tmp_path_factory.mktemp("done") / "run", {}
    with pytest.MonkeyPatch.context() as patch:
        finish = run.Run.finish
        patch.setattr(run.Run, "finish", lambda self, *args: ended.update(self.parts) or finish(self, *args))
        ended["rows"] = []
        train.train(Config(**{**OWN, "total_steps": 130}, out=str(folder)), judge=darker, on_row=ended["rows"].append)
    return folder, ended


@pytest.fixture
def copy(done, tmp_path):
    return Path(shutil.copytree(done[0], tmp_path / "run"))


# ---- your judge ----
def test_your_judge_is_asked_logged_and_named(done, capsys):
    """Its answers are the labels of the log, and of D; wherever somebody is named, it is."""
    folder, ended = done
    asked = [record for record in records(folder) if record["kind"] == "label"]
    assert len(asked) == ended["D"].added == OWN["max_pairs"] == ended["labeler"].counts["asked"]
    image = lambda index: imageio.v2.imread(folder / "pairs" / f"{index:06d}.png")
    for record in asked:
        first, second = np.split(image(record["index"]), 2, axis=1)
        assert record["label"] == darker(first, second, "") and record["answers"] == [str(record["label"])]
    config = json.loads((folder / "config.json").read_text())
    assert config["labeler"] == "your function darker" == json.loads((folder / "summary.json").read_text())["labeler"]
    assert config["command"].startswith("train(Config(") and config["command"].endswith("judge=darker)")
    again = eval(config["command"].replace("train(", "dict(config=", 1), {"Config": Config, "darker": darker})
    assert again["judge"] is darker and settings.settled(**again) == settings.settled(
        Config(**{**OWN, "total_steps": 130}), judge=darker)


PAIRS = [(9, 90), (90, 9), (50, 50), (7, 200)]


@pytest.mark.parametrize("kind, calls", [("pair", 3), ("batch", 1), ("text", 3), ("object", 3)])
def test_a_judge_may_take_a_pair_a_batch_or_the_prompts(kind, calls):
    """All four say the same of four pairs, of which one looks the same and is not shown."""
    seen, log = [], []

    def pair(first, second, goal):
        seen.append(first.shape)
        return np.bool_(first.mean() > second.mean())

    def batch(first, second, goal):
        seen.append(first.shape)
        return torch.from_numpy(first.mean((1, 2, 3)) > second.mean((1, 2, 3)))

    def text(parts):
        first, second = [part for part in parts if isinstance(part, np.ndarray)]
        seen.append(first.shape)
        assert any("to go dark" in part for part in parts if isinstance(part, str))
        return f"{int(first.mean() > second.mean())}"

    batch.batch = True
    function = {"pair": pair, "batch": batch, "text": text, "object": type("Model", (), {"ask": staticmethod(text)})()}[kind]
    labels, counts = yours.Judge(function, kind, stages=1)(*in_order(PAIRS), "to go dark", log.append)
    assert labels.tolist() == [0, 1, -2, 0] and counts["asked"] == 3 and counts["identical"] == 1
    assert seen == [(3, 48, 48, 3) if kind == "batch" else (48, 48, 3)] * calls
    assert {record["pair"]: record["label"] for record in log} == dict(enumerate(labels)) and len(log) == 4


@pytest.mark.parametrize("answer, says", [
    ("left", "returned 'left' for a pair; it must return 0"), (None, "returned None"), (2, "returned 2"), (0.5, "returned 0.5"),
    (float("nan"), "returned nan"), ([0, 1], "returned a list of 2"), (np.zeros((3, 3)), r"returned an array of shape \(3, 3\)")])
def test_an_answer_that_is_no_label_is_one_line(answer, says):
    """It says who returned what, and what is possible; for a batch, and for texts, too."""
    batch = lambda *_: [0, answer]
    batch.batch = True
    for function, line in ((lambda *_: answer, says), (batch, r"(returned .* among 2 labels)")):
        with pytest.raises(yours.BadAnswer, match=f"your function f {line}") as error:
            yours.Judge(function, "f")(*in_order(PAIRS[:2]), "g", lambda _: None)
        assert "\n" not in str(error.value)
    batch = lambda *_: answer if not isinstance(answer, list) else [0]
    batch.batch = True
    with pytest.raises(yours.BadAnswer, match="for 2 pairs; with batch = True it must return a label for each"
                       if not isinstance(answer, np.ndarray) else "for 2 pairs"):
        yours.Judge(batch, "f")(*in_order(PAIRS[:2]), "g", lambda _: None)
    if not isinstance(answer, str):
        with pytest.raises(yours.BadAnswer, match=r"a function of \(parts\) must return a text"):
            yours.Judge(lambda parts: answer, "f")(*in_order(PAIRS[:2]), "g", lambda _: None)


@pytest.mark.parametrize("changes, handed, says", [
    ({}, dict(judge=5), "judge=5 is no function"), ({}, dict(judge=lambda a, b: 0), r"must take \(first, second, goal\), or"),
    (dict(reward="true"), dict(judge=darker), "--reward true compares no images"),
    (dict(labels="oracle"), dict(judge=darker), "takes the place of --labels and --reward"),
    ({}, dict(judge=darker, reward=len), "judge and reward: your function"), (dict(reward="sparse"), dict(reward=len), "place of"),
    (dict(labels="function:f"), {}, r"its judge is a function of yours.*judge=f\)"), (dict(labels="function"), {}, r"judge=\.\.\.\)"),
    (dict(reward="function"), {}, r"its reward is a function .*reward=\.\.\.\)"), (dict(max_calls=3), dict(judge=darker), "--max-pairs"),
    (dict(vlm="offline:mistakes=0.1"), dict(judge=darker), "which is not asked here")])
def test_what_does_not_go_together_is_one_line_and_leaves_nothing(tmp_path, changes, handed, says):
    """Before anything is made."""
    with pytest.raises(settings.UserError, match=says) as error:
        train.train(Config(**{**OWN, **changes}, out=str(tmp_path / "run")), **handed)
    assert "\n" not in str(error.value) and not os.listdir(tmp_path)


@pytest.mark.parametrize("both_orders", [0, 1])
def test_an_interrupted_judge_goes_on_without_being_asked_twice(tmp_path, both_orders):
    """Ended in the middle of a session: the same rows as an undisturbed run, and no pair is shown twice."""
    shown = []

    def judge(first, second, goal):
        shown.append((first.tobytes(), second.tobytes()))
        if len(shown) == stop:
            raise KeyboardInterrupt
        return darker(first, second, goal)

    config = dict(OWN, both_orders=both_orders, pairs_per_session=4, max_pairs=8)
    stop = 0
    train.train(Config(**config, out=str(tmp_path / "whole")), judge=judge)
    whole, shown, stop = shown, [], 7
    assert len(whole) == 8 and (not both_orders or whole[1] == whole[0][::-1])
    train.train(Config(**config, out=str(tmp_path / "part")), judge=judge)
    with pytest.raises(settings.UserError, match=r"its judge is a function .*train\(Config\(resume=.*part'\), judge=judge\)"):
        train.train(Config(resume=str(tmp_path / "part")))
    shown.pop()  # the one at which it was interrupted
    stop = 0
    train.train(Config(resume=str(tmp_path / "part")), judge=judge)
    assert shown == whole
    assert (tmp_path / "part" / "metrics.csv").read_bytes() == (tmp_path / "whole" / "metrics.csv").read_bytes()
    assert [record["label"] for record in records(tmp_path / "part")] == [record["label"] for record in records(tmp_path / "whole")]


def test_a_bad_answer_in_a_run_says_how_it_goes_on(tmp_path):
    """The run ends in that line; with a better function it goes on."""
    with pytest.raises(settings.UserError, match=r"returned 'left'.*go on with: train\(Config\(resume=.*judge=\.\.\.\)"):
        train.train(Config(**OWN, out=str(tmp_path / "run")), judge=lambda first, second, goal: "left")
    assert train.train(Config(resume=str(tmp_path / "run")), judge=darker)[-1]["labels"] == OWN["max_pairs"]


# ---- your reward ----
def brightness(images):
    return images.mean((1, 2, 3)) / 255


def test_your_reward_is_what_the_policy_learns_from(tmp_path, monkeypatch):
    """Each rewarded row of B has the number that the function gives its image; and nobody is said to have judged."""
    kept = {}
    finish = run.Run.finish
    monkeypatch.setattr(run.Run, "finish", lambda self, *args: kept.update(self.parts) or finish(self, *args))
    train.train(Config(**OWN, out=str(tmp_path / "run")), reward=brightness)
    B = kept["B"]
    rewarded = len(B) - B.unrewarded
    assert rewarded == OWN["total_steps"] and np.ptp(B.reward[:rewarded]) > 0
    assert np.allclose(B.reward[:rewarded], brightness(B.image[:rewarded]))
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["labeler"] == "nobody (the reward is your function brightness)"
    with pytest.raises(settings.UserError, match=r"reward=brightness\)"):
        train.train(Config(resume=str(tmp_path / "run"), total_steps=150))
    with pytest.raises(settings.UserError, match="is not learned"):
        afterwards.load_reward(tmp_path / "run")


@pytest.mark.parametrize("returned, says", [
    (lambda images: 1.0, "returned 1.0 for 5 images; it must return a number for each"), (lambda images: None, "returned None"),
    (lambda images: np.zeros((len(images), 1)), r"returned an array of shape \(5, 1\)"), (lambda images: ["a"] * 5, "returned a list of 5"),
    (lambda images: [0, 1, 2, np.nan, 4], "returned nan for image 3 of 5"), (lambda images: [1e300] * 5, "returned inf for image 0")])
def test_a_reward_that_cannot_be_used_is_one_line(returned, says):
    with np.errstate(over="ignore"), pytest.raises(yours.BadAnswer, match=f"your function g {says}") as error:
        yours.FunctionReward(returned, "g").of_images(np.zeros((5, 8, 8, 3), np.uint8), None)
    assert "\n" not in str(error.value)


def test_a_tensor_with_a_gradient_is_a_reward_too():
    weight = torch.ones(3, requires_grad=True)
    reward = yours.FunctionReward(lambda images: torch.from_numpy(images).float().mean((1, 2)) @ weight, "g")
    assert reward.of_images(np.ones((2, 8, 8, 3), np.uint8), None).tolist() == [3, 3]


# ---- your function for each row ----
def test_on_row_gets_what_metrics_csv_gets(done):
    """When it is written, with the same names and numbers; nothing where a cell is empty."""
    folder, ended = done
    table = cells(folder)
    assert len(table) == len(ended["rows"]) == 4
    for row, line in zip(ended["rows"], table):
        assert {name: f"{value:.6g}" if isinstance(value, float) else str(value) for name, value in row.items()} == {
            name: cell for name, cell in line.items() if cell}


# ---- your policy afterwards ----
def test_a_finished_run_keeps_its_last_policy_and_reward(done):
    """Not those of its last checkpoint, which is ten updates older."""
    folder, ended = done
    assert torch.load(folder / "checkpoint" / "state.pt", weights_only=True)["at"]["step"] == 120
    policy, env = afterwards.load_policy(folder)
    reward = afterwards.load_reward(folder)
    obs, _ = env.reset(seed=5)
    moved = np.abs(ended["pi"].slow_actor[0].weight.numpy() - torch.load(folder / "checkpoint" / "state.pt", weights_only=True)[
        "pi"]["slow_actor"]["0.weight"].numpy()).max()
    assert moved > 0
    over, total = False, 0.0
    while not over:
        action = policy(obs)
        assert np.allclose(action, sac.SAC.act(ended["pi"], obs, explore=False, actor=ended["pi"].slow_actor), atol=1e-6)
        obs, true_reward, terminated, truncated, info = env.step(action)
        over, total = terminated or truncated, total + true_reward
    with open(folder / "summary.json") as file:
        assert env.horizon == OWN["horizon"] and json.load(file)["steps"] == 130
    images = ended["I"].small[:9]
    assert np.array_equal(reward(images), ended["r_psi"].predict(images)) and np.ptp(reward(images)) > 0
    assert reward.size == 48 and reward(env.image(200)[None]).shape == (1,)
    with pytest.raises(settings.UserError, match=r"takes images \(N, H, W, 3\) uint8, not \(48, 48, 3\)"):
        reward(images[0])


def test_before_its_end_a_run_has_the_policy_of_its_checkpoint(copy):
    os.remove(copy / "policy.pt")
    state = torch.load(copy / "checkpoint" / "state.pt", weights_only=True)["pi"]["slow_actor"]
    policy, env = afterwards.load_policy(copy)
    pi = sac.SAC(4, env.action_space, (OWN["hidden"],) * 2)
    pi.slow_actor.load_state_dict(state)
    obs = np.array([0.1, 0.2, 0.3, 0.4])
    assert env.observation_space.shape != (4,) or policy(obs).shape == (1,)
    os.remove(copy / "checkpoint" / "state.pt")
    with pytest.raises(settings.UserError, match="reached no checkpoint yet"):
        afterwards.load_policy(copy)


class Told(gymnasium.Env):
    """Observes the last two actions that it was told, in numbers; draws nothing but black."""

    metadata = {"render_modes": ["rgb_array"]}
    observation_space = Box(-10, 10, (1,), np.float32)
    render_mode = "rgb_array"

    def __init__(self, space):
        self.action_space, self.told = space, []

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.zeros(1, np.float32), {}

    def step(self, action):
        assert action in self.action_space, (action, self.action_space)
        self.told.append(np.array(action))
        return np.zeros(1, np.float32), 0.0, False, False, {}

    def render(self):
        return np.zeros((64, 64, 3), np.uint8)


@pytest.mark.parametrize("space", [
    Box(-2, 3, (1,), np.float32), Box(0, 1, (2, 2), np.float32), Box(-np.inf, np.inf, (1,), np.float32), Box(0, 9, (2,), np.int64),
    Discrete(3, start=5), Discrete(3), MultiDiscrete([2, 3]), Box(-1, 1, (1,), np.float32)])
def test_actions_of_a_loaded_policy_are_the_environment_s_own(space):
    """What the policy says, changed, and given to the environment inside, is what arrived there in training."""
    through, own = (envs.make(Told(space), goal="g") for _ in range(2))
    acts = through.action_space
    changes = afterwards.own_actions(own)
    assert own.action_space == space or not space.is_bounded()
    rng = np.random.default_rng(0)
    for _ in range(20):
        action = int(rng.integers(acts.n)) if hasattr(acts, "n") else rng.uniform(-1, 1, acts.shape).astype(np.float32)
        through.reset()
        through.step(action)
        for change in changes:
            action = change(action)
        own.reset()
        own.step(np.clip(action, space.low, space.high).astype(space.dtype) if isinstance(space, Box) else action)
        assert np.allclose(through.unwrapped.told[-1], own.unwrapped.told[-1]) and own.unwrapped.told[-1].shape == np.shape(
            space.sample())


def test_a_policy_of_your_own_environment_needs_it_again(tmp_path):
    """And acts in its range; also where the actions are Discrete."""
    for space, name in ((Box(-2, 3, (1,), np.float32), "box"), (Discrete(3, start=5), "discrete")):
        make = lambda: Told(space)
        train.train(Config(**{**SMALL, "reward": "true", "labels": "vlm", "env": "CartPole", "goal": "to hear"},
                           out=str(tmp_path / name)), env=make)
        with pytest.raises(settings.UserError, match=r"handed in from Python; hand it in again: load_policy\(.*env=\.\.\.\)"):
            afterwards.load_policy(tmp_path / name)
        policy, env = afterwards.load_policy(tmp_path / name, env=make)
        obs, _ = env.reset(seed=0)
        actions = [policy(obs) for _ in range(30)]
        assert all(action in space for action in actions) and env.step(actions[0])[0].shape == (1,)
        with pytest.raises(settings.UserError, match="--reward true is not learned"):
            afterwards.load_reward(tmp_path / name)


def test_a_stranger_s_folder_does_no_harm(copy, tmp_path, monkeypatch):
    """No module is imported that was not named again, no pickle is run, and damage is one line."""
    (tmp_path / "payload.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\n")
    monkeypatch.syspath_prepend(tmp_path)
    before = (copy / "config.json").read_text()
    for changes, again in ((dict(env="payload:X-v0", goal="g"), "env='payload:X-v0'"),
                           (dict(env="Pendulum-v1", goal="g", env_kwargs='{"g": 1}'), "env_kwargs=")):
        changed(copy, **changes)
        with pytest.raises(settings.UserError, match=rf"if you trust it: load_policy\(.*{again}"):
            afterwards.load_policy(copy)
    with pytest.raises(settings.UserError, match="the run has env='Pendulum-v1', not 'CartPole'"):
        afterwards.load_policy(copy, env="CartPole", env_kwargs='{"g": 1}')
    with pytest.raises(settings.UserError, match="it cannot be used.*another version, or was changed"):
        afterwards.load_policy(copy, env_kwargs='{"g": 1}')  # Pendulum observes other numbers
    assert not (tmp_path / "ran").exists()
    (copy / "config.json").write_text(before)
    state = torch.load(copy / "policy.pt", weights_only=True)
    state["pi"]["obs_mean"][0] = float("nan")
    torch.save(state, copy / "policy.pt")
    for damage in (lambda: None, lambda: torch.save({"at": {"step": 999}}, copy / "policy.pt"),
                   lambda: torch.save({"pi": Path("x")}, copy / "policy.pt"), lambda: (copy / "policy.pt").write_bytes(b"PK")):
        damage()
        for load in (afterwards.load_policy, afterwards.load_reward):
            if load is afterwards.load_reward and damage.__code__.co_names == ():
                continue  # nan is only in the policy
            with pytest.raises(settings.UserError, match="policy.pt: it cannot be used") as error:
                load(copy)
            assert "\n" not in str(error.value)
    with pytest.raises(settings.UserError, match="no run folder of train.py"):
        afterwards.load_policy(tmp_path)


# ---- the reward in other projects ----
def snippets(module):
    """The indented blocks of a header, each with the line that stands above it."""
    found, title = {}, ""
    for block in module.__doc__.split("\n\n"):
        lines = block.strip("\n").split("\n")
        code = [line for line in lines if line.startswith("    ")]
        if code and not lines[0].startswith(" "):
            found[lines[0]] = textwrap.dedent("\n".join(code))
    return found


def test_any_environment_can_be_learned_with_a_learned_reward(copy):
    """The reward is that of the image after the step; the environment's own is kept beside it."""
    reward = afterwards.load_reward(copy)
    policy, env = afterwards.load_policy(copy)
    other = gymnasium.wrappers.TimeLimit(afterwards.RewardFromImages(gymnasium.wrappers.OrderEnforcing(env), reward), 9)
    other.reset(seed=0)
    _, learned, _, _, info = other.step(np.array([0.5], np.float32))
    assert learned == reward(env.image(48)[None])[0] and info["true_reward"] != learned
    foreign = afterwards.RewardFromImages(Told(Discrete(2)), reward)
    foreign.reset(seed=0)
    assert foreign.step(0)[1] == reward(np.zeros((1, 64, 64, 3), np.uint8))[0]
    foreign.env.render = lambda: None
    with pytest.raises(settings.UserError, match="render_mode="):
        foreign.step(0)


def test_the_examples_of_the_header_run(copy, tmp_path, monkeypatch, capsys):
    """To act with a policy; and the reward with no more of this project than reward_model.py."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    shutil.copytree(copy, tmp_path / "runs" / "mine")
    shutil.copy(copy / "policy.pt", tmp_path)
    act, foreign, alone = list(snippets(afterwards).values())
    exec(act, {})
    there = {}
    exec(alone.replace("64", "48"), there)
    images = np.random.default_rng(0).integers(0, 256, (5, 48, 48, 3), dtype=np.uint8)
    there["model"].random_flip = bool(OWN.get("random_flip", 1))
    assert np.allclose(there["model"].predict(images), afterwards.load_reward(copy)(images), atol=1e-5)
    assert "stable_baselines3" in foreign


def test_stable_baselines3_learns_from_the_reward(copy, tmp_path, monkeypatch):
    pytest.importorskip("stable_baselines3", reason="pip install stable-baselines3")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    shutil.copytree(copy, tmp_path / "runs" / "mine")
    exec(list(snippets(afterwards).values())[1], {})


def test_the_examples_of_yours_run(tmp_path, monkeypatch, capsys):
    """A judge in five lines; and its rows on a board, which a stand-in plays here."""
    monkeypatch.chdir(tmp_path)
    found = snippets(yours)
    there = {}
    exec(found["To use it elsewhere (with train.py):"], there)
    assert (tmp_path / "runs" / "darker" / "policy.pt").exists()
    lines = capsys.readouterr().out
    assert "labels from: your function darker" in lines and "\n0 " in lines and "\n100 " in lines
    board = []
    fake = type("Writer", (), {"__init__": lambda self, folder: None, "add_scalar": lambda self, *args: board.append(args)})
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", type("module", (), {"SummaryWriter": fake}))
    monkeypatch.setitem(there, "train", lambda config, on_row: on_row({"step": 3, "eval_return": 1.5}))
    exec(next(code for title, code in found.items() if title.startswith("TensorBoard")), there)
    assert board == [("step", 3, 3), ("eval_return", 1.5, 3)]


# ---- --watch ----
def test_watch_makes_a_film_and_trains_nothing(copy, capsys):
    before = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}
    assert train.main(["--watch", str(copy)]) == 0
    said = capsys.readouterr().out
    assert said.count("steps, return") == afterwards.EPISODES and f"film: {copy / 'watch.gif'}" in said
    after = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}
    assert len(after.pop(copy / "watch.gif")) > 1000 and after == before


def test_watch_says_in_one_line_what_is_wrong(copy, tmp_path, capsys):
    (tmp_path / "elsewhere").write_text("mine")
    os.symlink(tmp_path / "elsewhere", copy / "watch.gif")
    for words, says in ((["--watch", str(copy)], "is a link or no plain file"), (["--watch"], "expected one argument"),
                        (["--watch", str(tmp_path)], "no run folder"), (["--watch", "x", "--hidden", "3"], "there may be --env")):
        assert train.main(words) == 2
        line = capsys.readouterr().err.strip()
        assert says in line and "\n" not in line
    assert (tmp_path / "elsewhere").read_text() == "mine"


# ---- going on after the end ----
@pytest.mark.parametrize("killed", [False, True])
def test_a_finished_run_is_trained_on(copy, killed, monkeypatch):
    """From its last checkpoint to as many steps as were asked for, with everything that it had; also after a kill."""
    before = cells(copy)
    if killed:
        add = sac.ReplayBuffer.add
        with monkeypatch.context() as patch:
            patch.setattr(sac.ReplayBuffer, "add", lambda self, *args: add(self, *args) if self.added < 200 else 1 / 0)
            with pytest.raises(ZeroDivisionError):
                train.train(Config(resume=str(copy), total_steps=250), judge=darker)
        assert afterwards.opened(copy, "pi")[0].total_steps == 250
    rows = train.train(Config(resume=str(copy), **{} if killed else dict(total_steps=250)), judge=darker)
    table = cells(copy)
    assert [int(row["step"]) for row in table] == [0, 60, 120, 180, 240, 250] and table[:3] == before[:3]
    assert rows[-1]["labels"] == OWN["max_pairs"]  # the limit holds
    for name in ("obs", "next_obs", "action", "image"):
        assert np.load(copy / "buffer" / f"{name}.npy", mmap_mode="r").shape[0] == 250
    images = np.load(copy / "buffer" / "image.npy", mmap_mode="r")
    assert images[119].any() and images[249].any()
    for steps, says in ((250, "has finished.*--total-steps MORE"), (90, "may only have more")):
        with pytest.raises(settings.UserError, match=says):
            settings.parse_args(["--resume", str(copy), "--total-steps", str(steps)])


def test_more_steps_are_no_change_of_the_steps_before(tmp_path):
    """An unfinished run may get more, too: what it had done stays."""
    given = dict(OWN, labels="oracle", average_over=0.0)
    train.train(Config(**given, out=str(tmp_path / "run")))
    train.train(settings.parse_args(["--resume", str(tmp_path / "run"), "--total-steps", "180"]))
    table = cells(tmp_path / "run")
    assert [int(row["step"]) for row in table] == [0, 60, 120, 180]


def test_without_its_buffer_a_finished_run_is_one_line(tmp_path):
    """--keep-buffer 0 leaves none, and one that is larger than that goes, too."""
    for gib, kept in ((0, False), (1e-9, False), (2, True)):
        folder = tmp_path / f"run{gib}"
        train.train(Config(**SMALL, keep_buffer=gib, out=str(folder)))
        assert (folder / "buffer").exists() == kept
    with pytest.raises(settings.UserError, match=r"kept no buffer/.*--keep-buffer GIB.*--labels FOLDER") as error:
        train.train(Config(resume=str(tmp_path / "run0"), total_steps=500))
    assert "\n" not in str(error.value)


# ---- programs of your own ----
PROGRAM = "# sub-task: {}\ndef progress(images, first_image):\n    return images.mean(axis=(1, 2, 3)) / 255\n"


def test_nobody_is_said_to_have_verified_programs_of_yours(tmp_path, capsys):
    """--programs FOLDER takes them; the closing words say what is known of them."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "1_bright.py").write_text(PROGRAM.format("it is bright"))
    flags = [word for name, value in OWN.items() for word in settings.words(name, value)]
    assert train.main([*flags, "--reward", "code", "--programs", str(tmp_path / "mine"), "--out", str(tmp_path / "run")]) == 0
    said = capsys.readouterr().out
    assert f"The reward is 1 program (it is bright) from {tmp_path / 'mine'}, which nobody has verified." in said
    reward = afterwards.load_reward(tmp_path / "run")
    assert np.allclose(reward(np.full((2, 48, 48, 3), 51, np.uint8)), 0.2 - 1)
    config = settings.settled(Config(reward="code", labels=str(tmp_path / "mine")))
    (tmp_path / "mine" / "verification.json").write_text(json.dumps([{"subtask": "it is bright", "verdict": "fail"}]))
    assert "nobody has verified" in given_rewards.described(config, ["it is bright"])
    (tmp_path / "mine" / "verification.json").write_text(json.dumps([{"subtask": "it is bright", "verdict": "pass"}]))
    assert "not verified in this run; its verification.json says" in given_rewards.described(config, ["it is bright"])
    assert given_rewards.described(Config(reward="code"), ["a", "b"]).startswith("2 verified programs (a; b), written by offline")


class Lit(Told):
    """Its image is as bright as it is far; success is to be lit."""

    observation_space = Box(0, 1, (1,), np.float32)

    def __init__(self):
        super().__init__(Box(-1, 1, (1,), np.float32))
        self.light = 0.0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.light = 0.0
        return np.array([self.light], np.float32), {}

    def step(self, action):
        self.light = float(np.clip(self.light + 0.1 * action[0], 0, 1))
        return np.array([self.light], np.float32), self.light, False, False, {"success": self.light > 0.97}

    def render(self):
        return np.full((48, 48, 3), 255 * self.light, np.uint8)


def test_expert_action_is_all_that_programs_need(tmp_path, monkeypatch):
    """Without it, the error says so; with it, a VLM's program is verified on its episodes, and rewards."""
    config = Config(**{**OWN, "goal": "to shine", "reward": "code", "vlm": "local/x", "vlm_url": "http://localhost:1/v1"},
                    out=str(tmp_path / "run"))
    with pytest.raises(settings.UserError, match=r"a method expert_action\(obs\) -> action"):
        train.train(config, env=Lit)
    monkeypatch.setattr(Lit, "expert_action", lambda self, obs: np.array([1.0]), raising=False)
    monkeypatch.setattr(vlm_query.VLM, "check_sight", lambda self: None)
    answers = ["1. The image is white.", f"```python\n{PROGRAM.format('x')}```"]
    monkeypatch.setattr(vlm_query.VLM, "ask", lambda self, parts: vlm_query.Reply(
        answers.pop(0), "complete", 9, 9, False))
    rows = train.train(config, env=Lit)
    assert not answers and rows[-1]["step"] == OWN["total_steps"]
    assert (tmp_path / "run" / "code_as_reward" / "programs" / "complete").exists()
