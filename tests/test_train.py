"""train.py: what the lesson leaves out. Other rewards, films, evaluation."""
import csv
import json
import math
import os
import types

import gymnasium
import numpy as np
import pytest
import torch

from support import baselines
import code_as_reward
import envs
from support import given_rewards
from support import labeler
from support import run
from support import settings
import sac
import train
import vlm_query
from test_components import TINY, tiny
from vlm_query import LabelLog


@pytest.mark.usefixtures("unreported")
def test_nothing_is_said_of_success_where_an_environment_does_not_tell(tmp_path, capsys):
    """Pendulum gives a return and no success: not 0 %, but nothing, in the table, the bar and the closing words."""
    rows = train.train(tiny(tmp_path, env="Pendulum-v1", goal="up", reward="true", horizon=20, total_steps=120))
    assert math.isfinite(rows[-1]["eval_return"]) and not any("success" in name for row in rows for name in row)
    assert "success" not in "".join(capsys.readouterr())
    assert json.load(open(tmp_path / "run" / "summary.json"))["success_last_third"] is None


@pytest.mark.usefixtures("unreported")
@pytest.mark.parametrize("reward", ["true", "sparse"])
def test_baselines_ask_nobody(tmp_path, reward):
    """With the true or the sparse reward no pair may be asked, and the prices must be that reward."""
    rows = train.train(tiny(tmp_path, reward=reward))
    assert rows[-1]["pairs_asked"] == 0 and not os.listdir(tmp_path / "run" / "pairs")
    state = torch.load(tmp_path / "run" / "checkpoint" / "state.pt", weights_only=True)
    prices = state["B"]["reward"]
    assert torch.equal(prices, state["B"]["true_reward"]) == (reward == "true")
    assert reward == "true" or set(prices.tolist()) <= {0.0, 1.0}


@pytest.mark.usefixtures("unreported")
@pytest.mark.parametrize("reward", ["true", "sparse"])
def test_a_reward_that_looks_at_no_pictures_learns_the_same_without_them(tmp_path, monkeypatch, reward):
    """No picture may be stored, and with pictures all the same the numbers must be the same, resets included."""
    add, seen = sac.ReplayBuffer.add, []
    monkeypatch.setattr(sac.ReplayBuffer, "add", lambda self, *row: seen.append(row[4]) or add(self, *row))
    train.train(tiny(tmp_path, "blind", reward=reward))
    assert seen == [None] * 300
    monkeypatch.setattr(given_rewards.TrueReward, "looks", True)
    monkeypatch.setattr(train, "looks_at_images", lambda config: True)
    train.train(tiny(tmp_path, "sees", reward=reward))
    assert seen[-1].shape == (48, 48, 3)
    blind, sees = (tmp_path / name / "metrics.csv" for name in ("blind", "sees"))
    assert blind.read_text() == sees.read_text()


def test_the_labeler_is_named_everywhere(tmp_path, capsys):
    """Banner, config, report and summary must all say that the oracle, not a VLM, spoke."""
    train.train(tiny(tmp_path, labels="oracle:mistakes=0.3"))
    said = capsys.readouterr().out
    texts = [said] + [(tmp_path / "run" / name).read_text() for name in ("config.json", "summary.json", "report.html")]
    assert all("oracle" in text and "not a VLM" in text and "30%" in text for text in texts)


@pytest.mark.usefixtures("unreported")
def test_wrong_labels_show_in_the_label_accuracy(tmp_path):
    """A labeler that is wrong in every answer must be reported as 0 % right."""
    rows = train.train(tiny(tmp_path, labels="oracle:mistakes=1"))
    assert rows[-1]["label_accuracy"] == 0.0


@pytest.mark.usefixtures("unreported")
def test_a_limit_ends_the_questions_and_not_the_training(tmp_path):
    """With --max-calls used up in the first session the run must still train to its end."""
    rows = train.train(tiny(tmp_path, max_calls=6))
    assert rows[-1]["step"] == 300 and rows[-1]["pairs_asked"] <= 3 and rows[-1]["labels"] >= 0


def test_scores_of_single_pictures_train_too(tmp_path):
    """--reward score must log a score a picture, fit to them, say how right their order was, and resume to the same rows."""
    rows = train.train(tiny(tmp_path, reward="score"))
    log = LabelLog.read(tmp_path / "run" / "labels.jsonl")
    assert {record["kind"] for record in log} == {"label"} and all(0 <= record["score"] <= 1 for record in log)
    assert rows[-1]["labels"] == len(log) == 12 and rows[-1]["label_accuracy"] > 0.9 and 0 < rows[-1]["loss"] < 4
    assert math.isfinite(rows[-1]["reward_accuracy"]) and "to 12 images" in (tmp_path / "run" / "summary.json").read_text()


def test_clip_prices_episodes_without_being_asked(tmp_path, monkeypatch):
    """--reward clip must hand its settings to ClipReward, price every row with it, and ask nobody."""
    given = []

    class Stub:
        def __init__(self, *settings):
            given.append(settings)

        def predict(self, images):
            return images.mean((1, 2, 3)).astype(np.float32)

    monkeypatch.setattr(baselines, "ClipReward", Stub)
    rows = train.train(tiny(tmp_path, reward="clip", clip_goal="the pole is upright", clip_baseline="a pole", clip_alpha=0.5))
    assert given == [("the pole is upright", "a pole", 0.5, baselines.MODEL, "cpu")] and rows[-1]["pairs_asked"] == 0
    with open(tmp_path / "run" / "episodes.csv") as file:
        assert all(100 < float(row["learned_reward"]) < 255 for row in csv.DictReader(file))


def test_scores_are_asked_of_different_pictures(tmp_path, monkeypatch):
    """--reward score must not pay twice for one picture within a session."""
    asked = []
    monkeypatch.setattr(vlm_query, "score_images", lambda ask, images, *_: (
        asked.extend(images[:, 0, 0, 0]), (np.full(len(images), 0.5), {}))[1])
    images = types.SimpleNamespace(large=np.arange(6, dtype=np.uint8)[:, None, None, None], progress=np.arange(6.0),
                                   small=np.zeros((6, 4, 4, 3), np.uint8))
    ask = labeler.ScoreLabeler("up", vlm=types.SimpleNamespace(ask=None))
    small, nothing, scores = ask(images, np.array([[3, 1], [3, 2], [3, 1], [4, 3]]), 0, None)
    assert asked == [3, 4, 1, 2] and len(small) == len(scores) == 4 and nothing is None


def test_a_film_has_at_most_a_hundred_pictures(tmp_path, monkeypatch):
    """An episode of 150 steps must be thinned to every second picture, not cut."""
    import imageio as films

    shown = []
    monkeypatch.setattr(films, "mimsave", lambda path, images, **_: shown.append(len(images)))
    config = settings.resolve(tiny(tmp_path, horizon=150, vlm_image_size=48))
    env = envs.make("CartPole", horizon=150)
    this = types.SimpleNamespace(eval_env=env, config=config, seed=lambda kind: 0, path=str)
    run.Run.film(this, "film.gif", lambda obs: env.action_space.sample())
    assert shown == [75]


@pytest.mark.usefixtures("unreported")
def test_an_answer_that_did_not_come_is_no_program(tmp_path, monkeypatch):
    """A refusal in C1 must be named as what it is, stop the stand-in's server, and leave a run that can go on."""
    closed, close = [], labeler.Labeler.close
    monkeypatch.setattr(labeler.Labeler, "close", lambda self: closed.append(self) or close(self))
    with monkeypatch.context() as refusing:
        refusing.setattr(vlm_query.VLM, "ask", lambda *_: vlm_query.Reply("", "refused", 0, 0, False))
        with pytest.raises(settings.UserError, match="wrote no program: refused.*--resume"):
            train.train(tiny(tmp_path, reward="code"))
    assert len(closed) == 1
    assert train.train(settings.parse_args(["--resume", str(tmp_path / "run")]))[-1]["step"] == TINY["total_steps"]


@pytest.mark.usefixtures("unreported")
def test_kept_answers_train_without_asking(tmp_path):
    """--labels-from a finished run's labels.jsonl must fit the same number of labels and ask nobody."""
    before = train.train(tiny(tmp_path, "asked"))
    after = train.train(tiny(tmp_path, "kept", labels=str(tmp_path / "asked" / "labels.jsonl")))
    assert after[-1]["labels"] == before[-1]["labels"] > 0 and not os.listdir(tmp_path / "kept" / "pairs")
    assert math.isfinite(after[-1]["reward_accuracy"])
    config = settings.resolve(settings.Config(labels=str(tmp_path / "asked")))
    assert "offline stand-in (not a VLM)" in settings.who_labels(config) and "-kept-" in run.prepare(config)[0].out


class Brightness:
    """A reward for the tests: sign times the mean of a picture."""

    sign = 1

    def predict(self, images):
        return self.sign * images.mean((1, 2, 3))


@pytest.mark.parametrize("space, different", [(gymnasium.spaces.Discrete(5), 5), (gymnasium.spaces.Box(-1, 1, (2,)), 1)])
def test_a_discrete_policy_is_evaluated_as_the_stochastic_one_it_is(space, different):
    """Fresh networks hold all actions about equally good: of 100 evaluations all are drawn; a Box gives one and the same."""
    act = sac.SAC(3, space, hidden=(8, 8)).best_action
    assert len({str(act(np.zeros(3))) for _ in range(100)}) == different


def test_an_evaluation_plays_each_start_twice_and_tells_the_two_apart():
    """Best actions stand still, which succeeds in CartPole's first steps; drawn actions push, and the pole falls."""
    env = envs.make("CartPole", horizon=30)
    push = types.SimpleNamespace(best_action=envs.expert(env), act=lambda obs: np.ones(1, np.float32),
                                 rng=torch.Generator())
    said = train.evaluate(push, env, 3, seed=5)
    assert (said["eval_success"], said["eval_success_any"], said["eval_success_drawn"]) == (1, 1, 0)
    push.best_action, push.act = push.act, push.best_action
    turned = train.evaluate(push, env, 3, seed=5)
    assert (turned["eval_success"], turned["eval_success_drawn"]) == (0, 1)
    assert said["eval_return"] > -100 > turned["eval_return"]  # that of the best actions
    starts = {tuple(env.reset(seed=5 + episode)[0]) for episode in range(3)}
    assert len(starts) == 3


@pytest.mark.parametrize("shares, kept", [
    ([0.8, 1.0, 0.9], True), ([1.0, 1.0, 0.8], False), ([0.7, 1.0, 0.9], False), ([0.9], True), ([], None)])
def test_success_is_held_if_it_is_there_over_the_last_third_and_at_the_end(shares, kept):
    """At least nine episodes of ten on average, and at the last evaluation; one that comes and goes is not held."""
    assert run.held(shares) is kept


@pytest.mark.usefixtures("unreported")
def test_the_last_third_is_the_evaluations_of_the_last_third_of_the_steps(tmp_path, monkeypatch):
    """Of evaluations at 0, 50, ..., 300 steps, those at 250 and 300; the one before learning is none of them."""
    shares = iter((0.9, 0.1, 0.2, 0.3, 0.4, 0.5, 0.7))
    monkeypatch.setattr(train, "evaluate", lambda *_: {
        "eval_return": 0.0, "eval_success": next(shares), "eval_success_frames": 0.0, "eval_progress": 0.0})
    train.train(tiny(tmp_path, reward="true", eval_every=50))
    summary = json.load(open(tmp_path / "run" / "summary.json"))
    assert summary["success_last_third"] == pytest.approx(0.6) and summary["held"] is False


def test_random_actions_are_held_as_long_as_asked(tmp_path, monkeypatch):
    """With --hold 40, an episode of 100 random steps must draw three actions."""
    drawn, draw = [], train.random_action
    monkeypatch.setattr(train, "random_action", lambda space, rng: drawn.append(1) or draw(space, rng))
    monkeypatch.setattr(run, "write_episodes", lambda *parts: math.nan)  # draws some more
    train.train(tiny(tmp_path, reward="true", hold=40, seed_steps=200, explore_steps=200))
    assert len(drawn) == 6


@pytest.mark.usefixtures("unreported")
@pytest.mark.parametrize("name, standardised, explore", [("CartPole", 1, 150), ("CartPole", 1, 50), ("DoorKey-5x5", 0, 150)])
def test_critics_forget_novelty_and_only_unbounded_states_are_standardised(tmp_path, monkeypatch, name, standardised, explore):
    """With a ready reward too, critics must start afresh when STEP 0 ends; a one-hot state must stay as it is."""
    calls = []
    for method in ("reset_critic", "normalise_observations"):
        old = getattr(sac.SAC, method)
        monkeypatch.setattr(sac.SAC, method, lambda self, *a, old=old, method=method: calls.append(method) or old(self, *a))
    train.train(tiny(tmp_path, env=name, reward="sparse", horizon=50, explore_steps=explore, total_steps=200))
    assert calls == ["reset_critic", *["normalise_observations"] * standardised, "reset_critic"]  # the first: a new agent


def test_programs_of_an_attempt_that_was_cut_short_are_not_kept(tmp_path, monkeypatch):
    """A resumed run that asks again must find none of the programs of before, or they would join the reward."""
    old = tmp_path / "code_as_reward" / "programs" / "1_old.py"
    old.parent.mkdir(parents=True)
    old.touch()
    monkeypatch.setattr(code_as_reward, "describe_subtasks", lambda *a: 1 / 0)
    monkeypatch.setattr(code_as_reward, "collect_episodes", lambda *a, **k: dict.fromkeys(
        ("expert_episodes", "random_episodes", "success")))
    config = settings.resolve(tiny(tmp_path, reward="code", horizon=5))
    with pytest.raises(ZeroDivisionError):
        given_rewards.learn_programs(config, str(tmp_path / "code_as_reward"), envs.make("CartPole", horizon=5), None, 0)
    assert not old.exists()


@pytest.mark.usefixtures("unreported")
def test_a_ready_reward_waits_for_the_first_episode_to_end(tmp_path):
    """No row has a reward before that: the run must go on exploring, not fail."""
    rows = train.train(tiny(tmp_path, reward="true", seed_steps=10, explore_steps=10))
    assert rows[-1]["step"] == 300


@pytest.mark.usefixtures("unreported")
def test_both_loops_learn_the_same_from_the_same_reward(tmp_path, monkeypatch):
    """Brightness as a "fitted" reward model in train(), and as a given reward in the other loop: the same rows of SAC."""
    class Bright:
        def __init__(self, *_, **__):
            pass

        def fit(self, *_):
            return {}

        def predict(self, images):
            return images.mean((1, 2, 3)).astype(np.float32) / 255

        def state_dict(self):
            return {}

    # One random action alone, for in train() the same generator also draws which images are offered to I.
    same = dict(seed_steps=1, explore_steps=100, total_steps=260)
    config = settings.resolve(tiny(tmp_path, "asked", labels="oracle", **same))
    parts = run.choose_parts(config)
    parts.RewardModel = Bright
    asked = train.train(tiny(tmp_path, "asked", labels="oracle", **same), parts)
    monkeypatch.setattr(given_rewards, "known_reward", lambda config: given_rewards.LearnedReward(Bright().predict))
    given = train.train(tiny(tmp_path, "given", reward="clip", **same))
    names = ("step", "eval_return", "eval_progress", "critic_loss", "q_mean", "alpha")
    assert [[row.get(name) for name in names] for row in asked] == [[row.get(name) for name in names] for row in given]
    assert given[-1]["critic_loss"] > 0 and asked[-1]["labels"] > 0


@pytest.mark.usefixtures("unreported")
def test_an_image_that_ended_its_episode_early_is_offered_and_counts_as_if_it_stayed(tmp_path, monkeypatch):
    """A pole that falls ends the episode: its image must always be offered, and its reward be that of many steps."""
    events, buffers = [], []

    class Buffer(sac.ReplayBuffer):
        def __init__(self, *args, **settings):
            super().__init__(*args, **settings)
            buffers.append(self)

        def add(self, obs, action, next_obs, terminated, *rest):
            super().add(obs, action, next_obs, terminated, *rest)
            events.append("end" if terminated else "step")

    offer = train.ImageBuffer.offer
    monkeypatch.setattr(train.ImageBuffer, "offer", lambda *args: (events.append("offered"), offer(*args))[1])
    config = tiny(tmp_path, env="InvertedPendulum-v5", goal="up", labels="oracle", image_buffer=2, total_steps=200)
    parts = run.choose_parts(config)
    parts.ReplayBuffer = Buffer
    train.train(config, parts)
    after = [events[i + 1 : i + 2] for i, event in enumerate(events) if event == "end"]
    assert len(after) >= 3 and all(each == ["offered"] for each in after)
    assert events.count("offered") < events.count("step") / 2
    ends, rewards = buffers[0].terminated[:200], np.abs(buffers[0].reward[:200])
    assert buffers[0].end_counts > 5 and np.nanmedian(rewards[ends]) > 3 * np.nanmedian(rewards[~ends])
