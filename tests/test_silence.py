"""Nothing is learned in silence, films keep what they show, and the report survives whatever is in a run folder."""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import json
import re
import struct
import types

import gymnasium
import numpy as np
import pytest

import envs
from support import report
import reward_model
from support import run
from support import settings
import sac
from support import baselines, given_rewards
from support.labeler import Labeler
import train
import vlm_query

SMALL = (48, 48, 3)


# ---- doubts: what teaches nothing, from the books of a run ----
def books(pictures=None, labels=(), scores=None, rewards=None, terminated=False, step=1000, episodes=9, programs=None,
          counts=None, exhausted=False, explores=False, kept=None, order=None, **changes):
    """What doubts() looks at, as of a run of 1,000 steps that is healthy but for what is named."""
    config = settings.Config(**{**dict(reward="preference", total_steps=1000, seed_steps=100, explore_steps=100, horizon=50,
                                       eval_every=100), **changes})
    if kept:
        config.labels = kept
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 255, (30, *SMALL), np.uint8) if pictures is None else pictures
    pool = reward_model.ImageBuffer(50, 48, 48)
    pool.offered, pool.small[:len(pictures)] = len(pictures), pictures
    data = reward_model.PreferenceDataset(100, SMALL)
    if scores is not None:
        data = baselines.ScoreDataset(100, SMALL)
        data.add(np.zeros((len(scores), *SMALL), np.uint8), None, np.array(scores))
    elif len(labels):
        zeros = np.zeros((len(labels), *SMALL), np.uint8)
        data.add(zeros, zeros, np.array(labels))
    buffer = sac.ReplayBuffer(1000, (2,), (1,), SMALL if programs else None)
    buffer.added = step
    rewards = rng.normal(size=step) if rewards is None else np.asarray(rewards, np.float32)
    buffer.reward[:len(rewards)], buffer.terminated[:step] = rewards, terminated
    books = dict.fromkeys(Labeler.COUNTS, 0)
    books.update({**dict.fromkeys(("asked", "labels", "judged", "right"), len(data)), **(counts or {})})
    labeler, compares = types.SimpleNamespace(counts=books, exhausted=exhausted), config.reward in ("preference", "score")
    labeler.accuracy = lambda: Labeler.accuracy(labeler)
    at = train.Progress(step=step, episodes=episodes, explored=not explores)
    at.fit = {} if order is None else {"reward_accuracy": order}
    return config, at, labeler, pool if compares else None, buffer, data if compares else None, programs


def causes(**case):
    config, at, labeler, pool, buffer, data, programs = books(**case)
    return set(run.doubts(config, at, labeler, pool, buffer, data, programs, at.episodes))


BLACK, FAIR = np.zeros((1, *SMALL), np.uint8), [0, 1] * 20


class Says:
    """Programs that say `what` of every picture, or its brightness."""

    def __init__(self, what=None):
        self.what, self.failed_frames = what, 3

    def progress(self, images, first_image):
        self.failed_frames += 1
        return np.full((len(images), 1), self.what) if self.what is not None else images.mean((1, 2, 3))[:, None]


@pytest.mark.parametrize("case, cause", [
    (dict(explore_steps=1000, step=1, rewards=()), "late"), (dict(seed_steps=5000, step=1, rewards=()), "late"),
    (dict(reward="true", explore_steps=1000, step=1, rewards=()), "late"),
    (dict(horizon=2000, episodes=0, step=500, rewards=()), "endless"),
    (dict(horizon=2000, episodes=0, step=1000, rewards=(), reward="true", explores=True), "endless"),
    (dict(pictures=BLACK, step=200, rewards=()), "images"), (dict(pictures=BLACK[:0], rewards=()), "images"),
    (dict(pictures=np.random.default_rng(0).integers(100, 107, (40, *SMALL), np.uint8)), "images"),  # nothing but noise
    (dict(exhausted=True, rewards=(), step=300, counts={"asked": 7, "unsure": 7}), "limit"),
    (dict(exhausted=True, rewards=(), step=300), "limit"),
    (dict(rewards=(), step=300, counts={"asked": 40, "unsure": 40}), "answers"),
    (dict(rewards=(), step=300, counts={"asked": 40, "no_answer": 20, "unreadable": 20}), "answers"),
    (dict(labels=[1] * 40), "same"), (dict(labels=[0] * 40), "same"), (dict(labels=[0] * 39 + [1]), "same"),
    (dict(labels=[1] * 25, kept="x", counts={"judged": 0}, exhausted=True), "same"),
    (dict(rewards=(), step=300, counts={"asked": 40, "labels": 0, "second": 80}), "stuck"),  # two orders, never agreed
    (dict(labels=[0] * 60, counts={"first": 60}), "stuck"), (dict(labels=[0] * 59, counts={"first": 59}), "same"),
    (dict(labels=FAIR, counts={"clear": 20, "clear_right": 5}), "way round"),
    (dict(labels=FAIR, counts={"clear": 100, "clear_right": 39}), "way round"),
    (dict(scores=[0.5] * 25, reward="score"), "same"),
    (dict(labels=FAIR, counts={"judged": 0}), "judged"),
    (dict(labels=FAIR, rewards=np.full(300, 0.7), step=300), "reward"),  # learned: as soon as it is fitted
    (dict(reward="sparse", rewards=np.zeros(500), step=500), "reward"),
    (dict(reward="sparse", rewards=np.zeros(500), step=500, terminated=True), "reward"),
    (dict(reward="true", rewards=np.full(500, -1.0), step=500), "reward"),
    (dict(reward="clip", rewards=np.full(500, 0.25), step=500, terminated=True), "reward"),
    (dict(reward="code", rewards=np.full(500, -1.0), step=500, programs=Says(0.0)), "reward"),
    (dict(reward="code", rewards=[-0.5, 0.5] * 250, step=500, programs=Says(0.5)), "reward"),  # success adds 1
    (dict(explores=True, rewards=()), "nothing"), (dict(explores=True, rewards=(), counts={"asked": 9}), "nothing"),
    (dict(explores=True, labels=[1] * 40), "nothing"),
    (dict(labels=FAIR, counts={"labels": 200}, order=0.64), "order"), (dict(labels=FAIR, counts={"labels": 640}, order=0.47), "order"),
])
def test_what_teaches_nothing_is_doubted(case, cause):
    """Each cause must be seen in the books of the run, and at once where it cannot be mended by waiting."""
    assert cause in causes(**case)


@pytest.mark.parametrize("case", [
    dict(labels=FAIR), dict(labels=[1] * 12), dict(labels=[1] * 19), dict(labels=[0, 1, 1, 1] * 10),
    dict(labels=FAIR, counts={"clear": 20, "clear_right": 6}), dict(labels=FAIR[:18], counts={"clear": 9}),
    dict(labels=FAIR, counts={"first": 12, "second": 88}),  # it leans, and can be learned from
    dict(counts={"asked": 12, "unsure": 12}, step=300), dict(labels=FAIR, counts={"asked": 400, "unsure": 360}),
    dict(labels=FAIR, kept="x", counts={"judged": 0}, exhausted=True),
    dict(labels=FAIR, exhausted=True), dict(pictures=BLACK, step=50), dict(pictures=BLACK, step=99),
    dict(pictures=np.repeat(BLACK, 30, 0) + 20 * (np.arange(30, dtype=np.uint8) == 29)[:, None, None, None], labels=FAIR),
    dict(horizon=2000, episodes=0, step=400, rewards=()), dict(horizon=50, episodes=0, step=40, rewards=()),
    dict(reward="sparse", rewards=np.zeros(400), step=400), dict(reward="sparse", rewards=[0] * 499 + [1], step=500),
    dict(reward="true", rewards=np.ones(600), step=600, terminated=True),  # CartPole-v1: to live longer is worth more
    dict(reward="code", rewards=[-1, 0] * 250, step=500, programs=Says()), dict(reward="clip"), dict(reward="true"),
    dict(labels=FAIR, counts={"labels": 199}, order=0.5), dict(labels=FAIR, counts={"labels": 640}, order=0.65),
    dict(labels=FAIR, counts={"labels": 640}, order=np.nan), dict(labels=FAIR, counts={"labels": 640}),
    dict(explores=True, step=900, rewards=()), dict(scores=[0, 1] * 10, reward="score"), dict(scores=[0.5] * 12, reward="score"),
])
def test_chance_and_a_slow_beginning_are_not_doubted(case):
    """A wrong alarm is as bad as none."""
    case = dict(case)
    if case.get("reward") == "code":  # two different pictures, of which the programs say different things
        config, at, labeler, pool, buffer, data, programs = books(**case)
        buffer.image[1] = 200
        assert run.doubts(config, at, labeler, pool, buffer, data, programs, 9) == {} and programs.failed_frames == 3
    else:
        assert causes(**case) == set()


@pytest.mark.parametrize("changes, told, has, has_not", [
    ({}, True, ["46%", "84 px"], ["info["]),
    ({}, False, ['give info["progress"]', "--frames 2"], ["of the answers are right"]),
    (dict(frames=2, progress="sum"), False, ["too small"], ["--frames 2", "info["]),
    (dict(counts={"labels": 300, "judged": 300, "right": 180}), True, ["only 60% of the answers are right"], []),
])
def test_a_reward_like_a_coin_names_what_can_cause_it(changes, told, has, has_not):
    """Only causes that can still be: not two moments to who has them, nor progress to an environment that tells it."""
    case = dict(labels=FAIR, counts={"labels": 300, "judged": 300, "right": 290}, order=0.46, reward_image_size=84)
    config, at, labeler, pool, buffer, data, _ = books(**{**case, **changes})
    env = types.SimpleNamespace(tells_progress=told)
    sentence = run.doubts(config, at, labeler, pool, buffer, data, None, 9, env)["order"]
    assert all(each in sentence for each in has) and not any(each in sentence for each in has_not)


def test_a_doubt_is_printed_once_though_its_numbers_change(capsys):
    """Looked at after every session and evaluation, a cause must be said the first time alone, also where it went away."""
    config, at, labeler, pool, buffer, data, _ = books(labels=[1] * 30, step=300, total_steps=1000)
    this = types.SimpleNamespace(config=config, at=at, labeler=labeler, parts={"I": pool, "B": buffer, "D": data}, watched=0,
                                 learning_since=None, env=None)
    for asked in (30, 40, 50):
        labeler.counts["asked"] = asked
        run.Run.warn(this, False)
    assert set(at.doubts) == {"same"} and capsys.readouterr().err.count("warning: the same answer 30 times of 30") == 1
    data.label[:30:2] = 0
    run.Run.warn(this, False)
    assert at.doubts == {"same": ""}
    data.label[:30] = 1
    at.step, at.sessions = 301, 1  # no evaluation, but a query session
    run.Run.warn(this, False)
    assert at.doubts["same"] and "warning" not in capsys.readouterr().err
    at.step, at.doubts = 302, {}  # neither of the two
    run.Run.warn(this, False)
    assert at.doubts == {}


class Scene(gymnasium.Env):
    """A bar that moves with the action; `draws` says what of it is seen."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 30}
    observation_space = gymnasium.spaces.Box(-10, 10, (2,), np.float32)
    action_space = gymnasium.spaces.Box(-1, 1, (1,), np.float32)

    def __init__(self, render_mode=None, draws="bar"):
        self.render_mode, self.draws = render_mode, draws

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.x, self.t = self.np_random.uniform(-1, 1), 0
        return np.array([self.x, 0], np.float32), {}

    def step(self, action):
        self.x, self.t = self.x + 0.1 * float(action[0]), self.t + 1
        return np.array([self.x, 0], np.float32), -abs(self.x), False, False, {}

    def render(self):
        Scene.drawn = getattr(Scene, "drawn", 0) + 1
        image = np.zeros((64, 64, 3), np.uint8)
        if self.draws == "bar":
            image[:, int(np.clip(32 + 10 * self.x, 2, 60)):][:, :4] = 255
        image[0, :2, 0] = self.t % 256, self.t // 256  # so that no two look the same to a computer
        return image * (self.draws != "black")


for look in ("bar", "black"):
    gymnasium.register(f"Silent{look}-v0", entry_point=Scene, kwargs={"draws": look})

TINY = dict(goal="x", labels="oracle", total_steps=80, seed_steps=20, explore_steps=20, feedback_every=40, horizon=20,
            pairs_per_session=20, max_pairs=20, batch_size=16, hidden=16, reward_epochs=1, eval_every=40, ensemble_size=1,
            eval_episodes=1, image_buffer=60, reward_image_size=48, vlm_image_size=48, updates=1)


@pytest.mark.parametrize("changes, says", [
    (dict(env="Silentblack-v0"), "all images look the same"),
    (dict(env="Silentbar-v0", explore_steps=300), "none is left to learn"),
    (dict(env="Silentbar-v0", horizon=1000), "no episode has ended"),
    (dict(env="Silentbar-v0", labels="oracle:mistakes=0.1"), None),
    (dict(env="Silentbar-v0", reward="sparse", labels="vlm"), "no success was seen"),
])
def test_a_run_says_it_once_and_in_its_closing_words(tmp_path, monkeypatch, capsys, changes, says):
    """On the terminal a warning when it shows, one sentence at the end, the same rows and exit code as ever."""
    monkeypatch.setattr(report, "write_report", lambda folder: Path(folder, "report.html").touch())
    monkeypatch.setattr(run.Run, "film", lambda *_: None)
    monkeypatch.setattr(run, "write_episodes", lambda *_: float("nan"))
    rows = train.train(settings.Config(**{**TINY, **changes, "out": str(tmp_path / "run")}))
    said = capsys.readouterr()
    closing = json.loads((tmp_path / "run" / "summary.json").read_text())["text"]
    assert rows[-1]["step"] == 80 and closing in said.out
    warned = [line for line in re.split("[\r\n]", said.err) if line.startswith("warning: ")]
    if says is None:
        assert warned == [] and "Warning" not in closing and "random episodes: unknown" in closing and "nan%" not in closing
    else:
        assert len(warned) == 1 and says in warned[0] and closing.count("Warning: ") == 1 and says in closing


@pytest.mark.parametrize("answers, asked, says", [
    ("1", 60, "no more is asked, because the answer has always been the same"), ("1", 60, "the same answer 20 times of 20"),
    ("wrong", 100, "right way round? Of the clearer half of the pairs, 0 of 10 labels agree"),
])
def test_a_vlm_that_does_not_look_is_named_at_the_first_session_and_asked_no_more(tmp_path, monkeypatch, capsys, answers,
                                                                                 asked, says):
    """Five sessions of 20: who always says the same is asked in three; who reads the goal backwards is named at once."""
    monkeypatch.setattr(report, "write_report", lambda folder: Path(folder, "report.html").touch())
    monkeypatch.setattr(run.Run, "film", lambda *_: None)
    monkeypatch.setattr(run, "write_episodes", lambda *_: float("nan"))

    def labels(before, after, rng, error_rate=0.0, true=vlm_query.oracle_labels):
        right = true(before, after, rng)
        if not error_rate:  # what the books compare with
            return right
        return np.ones_like(right) if answers == "1" else np.where(right >= 0, 1 - right, right)

    monkeypatch.setattr(vlm_query, "oracle_labels", labels)
    changes = dict(labels="oracle:mistakes=0.5", feedback_every=20, total_steps=140, max_pairs=100, out=str(tmp_path / "run"))
    train.train(settings.Config(env="Silentbar-v0", **{**TINY, **changes}))
    summary, err = json.loads((tmp_path / "run" / "summary.json").read_text()), capsys.readouterr().err
    assert summary["asked"] == asked and f"warning: {says}" in err
    assert says.split(", 0")[0].split(" 20")[0] in summary["text"]


PLAN = dict(env="x", goal="x", horizon=500, total_steps=50_000, explore_steps=4000, feedback_every=1700, pairs_per_session=40,
            max_pairs=1000, vlm="openai/x")


@pytest.mark.parametrize("changes, says", [
    ({}, "500 steps an episode: first questions at step 4,000, 1,000 pairs in 25 sessions, 2,000 calls"),
    ({"stages": 1}, "1,000 pairs in 25 sessions, 1,000 calls"), ({"explore_steps": 4001}, "first questions at step 4,500"),
    ({"both_orders": 1}, "500 pairs, each in both orders, in 25 sessions, 2,000 calls"),
    ({"labels": "oracle"}, "1,000 pairs in 25 sessions"), ({"reward": "score"}, "1,000 images in 25 sessions, 2,000 calls"),
    ({"max_calls": 300}, "2,000 calls, of which at most 300 are made (--max-calls)"),
    ({"usd_per_mtok": "1,4"}, "2,000 calls, about $1.60 at these prices, if a question takes 1,000 tokens in and 150 out"),
    ({"usd_per_mtok": "1,4", "max_usd": 1.0}, "150 out; it stops at $1 (--max-usd)"),
    ({"horizon": 20_000}, "first questions at step 20,000, 80 pairs in 2 sessions"),
    ({"labels": "."}, None), ({"reward": "true"}, None), ({"explore_steps": 60_000}, None),
])
def test_before_the_first_question_a_line_says_what_will_be_asked(changes, says):
    """Steps, pairs, sessions, calls; dollars only at known prices; nothing where nobody will be asked."""
    config = settings.Config(**{**PLAN, **changes})
    said = run.forecast(config)
    assert said == [] if says is None else len(said) == 1 and says in said[0]
    assert says is None or ("$" in said[0]) == ("usd_per_mtok" in changes) and ("calls" in said[0]) == ("labels" not in changes)


@pytest.mark.parametrize("seconds, says", [(50, "at this speed the run takes 15 minutes more"), (1, "")])
def test_before_the_first_question_a_line_says_how_long_it_will_take(capsys, monkeypatch, seconds, says):
    """From the speed of the steps that learn, of which there were 99; nothing where that is less than a minute."""
    monkeypatch.setattr(run.time, "time", lambda: now)
    config, at, labeler, pool, buffer, data, _ = books(total_steps=2000, explore_steps=200, eval_every=10_000, rewards=())
    this = types.SimpleNamespace(config=config, at=at, labeler=labeler, parts={}, watched=0, learning_since=None, env=None)
    for at.step, now in ((99, 0), (100, 1000), (101, 1001), (199, 1000 + seconds), (200, 2000)):
        run.Run.warn(this, False)
        err = capsys.readouterr().err
        assert says in err if at.step == 199 and says else "minutes" not in err


def test_the_bar_says_nothing_of_what_nobody_knows():
    """Where no label can be judged, there is no "labels right nan%"."""
    labeler = books(labels=FAIR, counts={"judged": 0})[2]
    labeler.usd = lambda: None
    assert run.status({"eval_return": 1.0}, labeler) == "return 1, pairs 40"


# ---- memory ----
def a_run(folder, env):
    """As much of a Run as write_episodes() reads."""
    config = types.SimpleNamespace(reward_image_size=48, seed=0)
    return types.SimpleNamespace(eval_env=env, config=config, path=folder.joinpath, seed=lambda kind, number: number)


@pytest.mark.parametrize("steps", [1, 50, 100, 101, 200, 201, 3000])
def test_a_film_holds_at_most_a_hundred_pictures_and_draws_few_more(steps, monkeypatch):
    """Of an episode of any length, spread over all of it; up to 200 steps exactly the pictures of ever."""
    env = envs.make("Silentbar-v0", goal="x", horizon=steps)
    env.reset(seed=0)
    drawn = 0

    def image(size):
        nonlocal drawn
        drawn += 1
        return np.full((2, 2, 3), env.unwrapped.t % 251, np.uint8)

    monkeypatch.setattr(env, "image", image)
    images, reward, progress, success = envs.rollout(env, lambda obs: np.zeros(1, np.float32), 0, 2, run.IN_A_FILM)
    every = run.apart(len(images), steps)
    assert len(reward) == len(progress) == len(success) == steps and 50 <= len(images) + 50 * (steps < 100) <= 150
    assert len(images) <= 100 and drawn <= 100 + 50 * 5
    assert images[:, 0, 0, 0].tolist() == [(t + 1) % 251 for t in range(steps)][::every]
    if steps <= 200:
        assert every == -(-steps // 100)


def test_which_pictures_were_kept_is_known_from_their_number():
    """For every length of an episode, apart() must find the stride that rollout() ended with."""
    for most in (100, 1000):
        for steps in [*range(1, 5000), 99_999, 100_000, 10_000_000]:
            every = 1
            while -(-steps // every) > most:
                every *= 2
            assert run.apart(-(-steps // every), steps) == every


def test_evaluation_draws_no_image():
    """An evaluation needs none; drawing may take longer than everything else in it."""
    env = envs.make("Silentbar-v0", goal="x", horizon=300)
    agent = sac.SAC(2, env.action_space, (4, 4))
    before = getattr(Scene, "drawn", 0)
    train.evaluate(agent, env, 1, 0)
    assert getattr(Scene, "drawn", 0) == before


def test_of_long_episodes_some_images_are_kept_and_each_row_names_its_step(tmp_path, monkeypatch):
    """300 steps: 100 images at most; in episodes.csv each row names its own step."""
    reward = given_rewards.LearnedReward(lambda images: images[:, 0, 0, 0].astype(float))  # the step that the corner tells

    monkeypatch.setattr(run, "IN_AN_EPISODE", 100)
    env = envs.make("Silentbar-v0", goal="x", horizon=300)
    env.image = lambda size: np.full((size, size, 3), env.unwrapped.t // 2, np.uint8)
    agent = sac.SAC(2, env.action_space, (4, 4))
    run.write_episodes(a_run(tmp_path, env), agent.best_action, reward, random_episodes=1)
    rows = report.read_table(tmp_path / "episodes.csv")
    assert rows["t"][:3] == ["0", "4", "8"] and rows["t"][74] == "296" and len(rows["t"]) == 150
    assert [float(x) for x in rows["learned_reward"][:75]] == [(t + 1) // 2 for t in range(0, 300, 4)]


def test_a_reward_that_never_differs_has_no_rank_correlation(tmp_path, recwarn):
    """nan, without scipy's warning on the terminal; also where there was but one picture."""
    env = envs.make("Silentblack-v0", goal="x", horizon=5)
    reward = given_rewards.LearnedReward(lambda images: np.zeros(len(images), np.float32))
    spearman = run.write_episodes(a_run(tmp_path, env), lambda obs: np.zeros(1, np.float32), reward)
    assert np.isnan(spearman) and not len(recwarn)


# ---- the report ----
def page_of(folder):
    text = report.write_report(folder).read_text(encoding="utf-8")
    assert text.endswith("</body></html>\n") and "<script" not in text and "onerror=" not in text.replace("&lt;img", "<!--")
    assert not report.UNSEEN.search(text)
    return text


PNG = struct.pack(">8sIIII", b"\x89PNG\r\n\x1a\n", 13, 0x49484452, 60_000, 60_000)
ROW = '{"kind": "label", "index": %s, "label": 1, "true_label": 0, "progress": %s, "answers": ["a"]}\n'
EVIL = "\x1b]0;owned\x07\x1b[2J<script>alert(1)</script>\u202e\ud800\x00"
HOSTILE = {
    "huge returns": {"metrics.csv": "step,eval_return\n0,1e308\n1,-1e308\n2,1.7e308\n"},
    "huge steps": {"metrics.csv": "step,eval_return,eval_success\n1e308,1,1e300\n-1e308,2,-1e308\n"},
    "nan and inf": {"metrics.csv": "step,eval_return\nnan,inf\ninf,nan\n-inf,-inf\n,\n", "summary.json": '{"spearman": NaN}'},
    "episodes": {"episodes.csv": "kind,episode,t,learned_reward,progress,true_reward\n" + "".join(
        f"{kind},{e},{t},{value},-1e308,1e308\n" for kind in ("random", "after", "expert") for e in ("nan", "0")
        for t, value in enumerate(("1e308", "-1.7e308", "nan", "5e-324")))},
    "no columns": {"metrics.csv": "a\n1\n", "episodes.csv": "\n\n\n", "labels.jsonl": "\n{}\n[]\n1\nnull\n"},
    "same columns": {"metrics.csv": "step,step,eval_return\n1,2,3\n"},
    "empty": dict.fromkeys(report.FILES, ""),
    "torn": {"config.json": '{"env": "x", ', "metrics.csv": "step,eval_re", "labels.jsonl": '{"kind": "la', "summary.json": "["},
    "not UTF-8": {name: b"\xff\xfe\x00step,\xe9\n1,\x80\n" for name in report.FILES},
    "a mark first": {"config.json": b'\xef\xbb\xbf{"env": "Marked"}'},
    "types": {"config.json": '{"env": {"a": [1]}, "goal": 3, "reward": ["x"], "labeler": {"b": null}, "command": [1, [2]]}',
              "summary.json": '{"text": {"x": [null]}, "seconds": "long", "calls": [1], "usd": {}, "spearman": "0"}',
              "labels.jsonl": '{"kind": ["label"], "progress": "x", "label": {}, "true_label": [], "answers": {"a": 1}}\n'
                              '{"kind": "label", "progress": [null, {}], "true_label": "1", "answers": 7, "score": []}\n'
                              '{"kind": {}, "index": {}, "answers": [[["a"]], null, 3.5]}\n'},
    "absurd pairs": {"labels.jsonl": "".join(ROW % pair for pair in (
        ("1e300", "[1e308, -1e308]"), ("-5", "[0, 5e-324]"), ('"../../x"', "[1, 2]"), ("1e9", "[NaN, 1]"), ("NaN", "[1, 1e308]")))},
    "nested": {"config.json": '{"env": ' + "[" * 900 + "]" * 900 + "}", "summary.json": '{"text": ' + '{"a":' * 90_000,
               "labels.jsonl": ROW % (1, "[" * 500 + "]" * 500)},
    "long numbers": {"config.json": '{"seed": ' + "9" * 4200 + "}", "labels.jsonl": '{"index": ' + "9" * 5000 + "}\n"},
    "escape codes": {"config.json": json.dumps({name: EVIL for name in ("env", "goal", "labeler", "command", EVIL)}),
                     "metrics.csv": f"step,eval_return,{EVIL[:-2]}\n1,2,3\n".encode("utf-8", "replace"),
                     "summary.json": json.dumps({"text": EVIL}), "code_as_reward/programs/1_a.py": EVIL[:-2],
                     "code_as_reward/verification.json": json.dumps([{EVIL: EVIL}, 3, {"x": [EVIL]}]),
                     "labels.jsonl": json.dumps({"kind": "unsure", "answers": [EVIL], "ends": EVIL, "index": 1}) + "\n"},
    "many kinds": {"labels.jsonl": "".join(f'{{"kind": "k{n}"}}\n' for n in range(20_000))},
    "wide words": {"episodes.csv": "kind,episode,t,learned_reward,progress,true_reward\n" + "x" * 100_000 + ",0,0,1,1,1\n"
                   + "random,0,0,1,1,1\n" * 50_000},
    "no pictures": {"eval_before.gif": b"GIF89a", "eval_after.gif": "<html>", "pairs/000001.png": PNG, "pairs/000002.png": "root:x:0:0",
                    "labels.jsonl": ROW % (1, "[0, 1]") + ROW % (2, "[0, 1]") + ROW % (3, "[0, 1]"),
                    "code_as_reward/failed/1_a.png": b"\x89PNG", "code_as_reward/programs/1_a.py/x": ""},
}


@pytest.mark.parametrize("name", HOSTILE)
def test_no_run_folder_is_too_absurd_for_a_report(tmp_path, name):
    """Whatever stands in the files, each costs its section at most, and nothing of it is markup or a terminal's code."""
    (tmp_path / "config.json").write_text("{}")
    for path, content in HOSTILE[name].items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
    page = page_of(tmp_path)
    assert "How to make it again" in page and len(page) < 3_000_000
    if name == "a mark first":
        assert "env: Marked" in page
    if name == "no pictures":
        assert "000002.png is no image" in page and "000001.png is too large" in page and "data:image/png" not in page
        assert "root:x" not in page


def test_a_log_of_any_size_is_read_in_part_and_the_page_says_so(tmp_path, monkeypatch):
    """Beyond so many bytes or lines nothing is read, of tables too; a text that is too long is cut."""
    monkeypatch.setattr(report, "MOST_LINES", 100)
    (tmp_path / "labels.jsonl").write_text((ROW % (1, "[0, 1]")) * 300)
    (tmp_path / "metrics.csv").write_text("step,eval_return\n" + "1,2\n" * 300)
    (tmp_path / "config.json").write_text(json.dumps({"goal": "g" * 300_000}))
    its = report.read_run(tmp_path)
    assert len(its.labels) == 100 and len(its.metrics["step"]) == 99 and its.cut == ["metrics.csv", "labels.jsonl"]
    assert "Too long to be read to its end: metrics.csv, labels.jsonl" in page_of(tmp_path)
    with open(tmp_path / "labels.jsonl", "wb") as file:
        file.truncate(10**12)  # of nothing: a sparse file
    assert report.read_bytes(tmp_path / "labels.jsonl", 1000) == bytes(1000)
    assert len((tmp_path / "report.html").read_text()) < 1_000_000


def test_a_section_that_fails_costs_itself_alone(tmp_path, monkeypatch):
    """Even an error that nobody foresaw leaves the other sections as they are."""
    monkeypatch.setattr(report, "labels_section", lambda run: 1 / 0)
    (tmp_path / "metrics.csv").write_text("step,eval_return\n0,-900\n500,-120\n")
    page = page_of(tmp_path)
    assert "How right the labels are: cannot be shown (ZeroDivisionError" in page and "svg+xml" in page


def test_a_long_line_is_drawn_with_points_enough(tmp_path):
    """A hundred thousand evaluations make a line of at most 2,000 points, from the first on."""
    assert report.thinned(np.ones(100_000, bool)).tolist() == list(range(0, 100_000, 50))
    assert report.thinned(np.array([False, True, True])).tolist() == [1, 2]


def test_a_report_is_written_into_its_own_folder_only(tmp_path, capsys):
    """A link in a stranger's folder must not lead the page over another file of the user."""
    mine, folder = tmp_path / "mine.txt", tmp_path / "run"
    mine.write_text("dear diary")
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    for name in ("report.html", "report.html.new"):
        (folder / name).symlink_to(mine)
    report.write_report(folder)
    assert mine.read_text() == "dear diary" and not (folder / "report.html").is_symlink()
