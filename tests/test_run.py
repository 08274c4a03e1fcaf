"""run.py: settings, the command line, the run folder, and going on with a run."""
import dataclasses
import json
import os
import re
import shlex
import shutil
import types
from pathlib import Path

import gymnasium
import numpy as np
import pytest
import torch

import envs
from support import run
from support import settings
import sac
import train
from tasks import schedules
from test_components import Odd, tiny

ROOT = Path(__file__).resolve().parents[1]


def test_a_stand_in_by_another_name_is_no_vlm(tmp_path):
    """One that runs already, as offline/NAME, must be named as what it is in banner and folder."""
    config = settings.Config(env="CartPole", vlm="offline/x", vlm_url="http://localhost:1/v1")
    assert settings.who_labels(config) == "offline stand-in (not a VLM)"
    assert "offline_stand-in" in train.prepare(config)[0].out


@pytest.mark.usefixtures("unreported")
@pytest.mark.parametrize("crash_at", [120, 260])
def test_a_resumed_run_ends_as_if_never_interrupted(tmp_path, monkeypatch, crash_at):
    """Killed in the middle of an episode and resumed, the run must write the same metrics.csv, byte for byte."""
    best_policy = int(crash_at == 260)
    train.train(tiny(tmp_path, "whole", best_policy=best_policy))
    add, count = sac.ReplayBuffer.add, []

    def dying(self, *transition):
        count.append(1)
        if len(count) == crash_at:
            raise MemoryError  # nothing in train.py expects this one: it ends the run like kill -9
        return add(self, *transition)

    monkeypatch.setattr(sac.ReplayBuffer, "add", dying)
    with pytest.raises(MemoryError):
        train.train(tiny(tmp_path, "killed", best_policy=best_policy))
    monkeypatch.setattr(sac.ReplayBuffer, "add", add)
    train.train(settings.parse_args(["--resume", str(tmp_path / "killed")]))
    whole, killed = (tmp_path / name for name in ("whole", "killed"))
    assert whole.joinpath("metrics.csv").read_bytes() == killed.joinpath("metrics.csv").read_bytes()
    labels = [[json.loads(line) for line in open(folder / "labels.jsonl")] for folder in (whole, killed)]
    labels = [sorted((record["index"], record["label"]) for record in records) for records in labels]
    assert labels[0] == labels[1] and len(labels[0]) >= 12  # in the order of arrival, which depends on threads


def test_an_interrupted_run_says_how_to_go_on(tmp_path, monkeypatch, capsys):
    """Ctrl-C must end with the closing paragraph and the command that resumes."""
    act, count = sac.SAC.act, []

    def interrupting(self, obs, explore=True):
        count.append(1)
        if len(count) == 250:
            raise KeyboardInterrupt
        return act(self, obs, explore)

    monkeypatch.setattr(sac.SAC, "act", interrupting)
    train.train(tiny(tmp_path, labels="oracle"))
    said = capsys.readouterr().out
    assert "interrupted after" in said and f"--resume {tmp_path / 'run'}" in said
    assert os.path.exists(tmp_path / "run" / "report.html") and os.path.exists(tmp_path / "run" / "buffer")


def test_disk_is_not_asked_for_where_no_picture_is_stored(tmp_path, monkeypatch):
    """A full disk must stop a run that stores pictures before it starts, and no run with the true reward."""
    monkeypatch.setattr(shutil, "disk_usage", lambda _: types.SimpleNamespace(free=20_000))  # observations and actions
    train.check_disk(settings.resolve(tiny(tmp_path, reward="true")), envs.make("CartPole"))
    with pytest.raises(settings.UserError, match="of disk"):
        train.train(tiny(tmp_path, reward="score"))


def test_a_raised_limit_lets_the_questions_go_on(tmp_path):
    """A run that had reached --max-calls must ask again when it is resumed with more, and with as many must not."""
    for more, asks in ((6, False), (60, True)):
        labeler = train.Labeler(settings.resolve(tiny(tmp_path, max_calls=more)))
        try:
            labeler.load_state_dict({"counts": labeler.counts, "exhausted": True,
                                     "vlm": {**labeler.vlm.state_dict(), "calls": 6}})
            assert labeler.may_ask() == asks
        finally:
            labeler.close()


@pytest.mark.usefixtures("unreported")
def test_a_resumed_run_may_ask_for_less_than_it_has(tmp_path, monkeypatch):
    """--max-pairs below the number of labels there are must keep these, and ask no more."""
    add, count = sac.ReplayBuffer.add, []
    monkeypatch.setattr(sac.ReplayBuffer, "add", lambda *a: count.append(1) or (add(*a) if len(count) < 260 else 1 / 0))
    with pytest.raises(ZeroDivisionError):
        train.train(tiny(tmp_path, labels="oracle", max_pairs=30))
    monkeypatch.setattr(sac.ReplayBuffer, "add", add)
    kept = settings.resumed({"resume": str(tmp_path / "run"), "max_pairs": 2})
    assert train.train(kept)[-1]["pairs_asked"] >= 6


@pytest.mark.parametrize("changes, says", [
    ({"device": "cuda"}, "torch finds no such GPU"), ({"device": "gpu"}, "there are auto, cpu, cuda"),
    ({"cuda_graph": 1}, "--cuda-graph 1 needs a GPU"), ({"cuda_graph": 1, "device": "auto"}, "needs a GPU"),
    ({"reward": "true", "labels": "oracle"}, "--reward true compares no pictures"),
    ({"reward": "score", "vlm_mistakes": 0.2}, "shows only one"),
    ({"programs": "."}, "--programs is for --reward code, not for preference"),
    ({"labels": "oracle", "vlm_unsure": 0.2}, "--vlm-unsure is a flaw of the offline stand-in"),
    ({"vlm": "local/m", "vlm_mistakes": 0.2}, "--vlm-mistakes is a flaw of the offline stand-in"),
    ({"vlm_url": "http://localhost:1/v1"}, "--vlm offline starts a stand-in of its own"),
    ({"reward": "clip", "clip_alpha": 0.5}, "--clip-alpha needs --clip-baseline"),
    ({"env": "Pendulum-v1", "goal": "up", "reward": "code"}, "no scripted expert"),
    ({"horizon": 9, "goal": "without OpenGL"}, "apt-get"), ({"horizon": 9, "goal": "on a full disk"}, "0.0 are free")])
def test_what_cannot_work_here_is_said_before_anything_is_made(tmp_path, monkeypatch, changes, says):
    """A missing GPU, expert, OpenGL or disk must end in one line and leave no run folder."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    if "OpenGL" in changes.get("goal", ""):
        monkeypatch.setattr(envs, "draw_pole", lambda *_: (_ for _ in ()).throw(RuntimeError("EGL is not there")))
    if "disk" in changes.get("goal", ""):
        monkeypatch.setattr(shutil, "disk_usage", lambda _: types.SimpleNamespace(free=1000))
    with pytest.raises(settings.UserError, match=says):
        train.train(tiny(tmp_path, **changes))
    assert not os.listdir(tmp_path)


def test_candidates_need_disk_too(tmp_path, monkeypatch):
    """Room for the steps' pictures alone is too little; with both pictures of every candidate it is enough."""
    config = settings.resolve(tiny(tmp_path))
    steps = config.total_steps * (3 * config.reward_image_size**2 + 4 * (4 + 4 + 2))
    pairs = config.max_pairs * 2 * config.vlm_image_size**2  # of the PNGs a third of what they unpack to
    candidates = 3 * config.image_buffer * (config.reward_image_size**2 + config.vlm_image_size**2)
    free, env = types.SimpleNamespace(free=steps + candidates + pairs), envs.make("CartPole")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: free)
    train.check_disk(config, env)
    free.free -= 1
    with pytest.raises(settings.UserError, match="50 candidates need"):
        train.check_disk(config, env)


@pytest.mark.usefixtures("unreported")
def test_a_run_goes_on_though_an_environment_speaks_numpy(tmp_path, monkeypatch):
    """np.bool_ for `terminated` at a step that is evaluated must not make a checkpoint that cannot be read."""
    class Numpy(Odd):
        def step(self, action):
            return (*super().step(action)[:2], np.bool_(True), np.bool_(False), {})

    gymnasium.register("Numpy-v0", entry_point=Numpy, max_episode_steps=9)
    changes = dict(env="Numpy-v0", goal="to be odd", reward="true", total_steps=40, seed_steps=10, eval_every=5)
    rows = train.train(tiny(tmp_path, **changes))
    kept = torch.load(tmp_path / "run" / "checkpoint" / "state.pt", weights_only=True)["rows"]
    assert [row["step"] for row in kept] == [row["step"] for row in rows][:len(kept)] != []
    del gymnasium.registry["Numpy-v0"]


@pytest.mark.usefixtures("unreported")
def test_kept_answers_all_fit_where_a_run_goes_on(tmp_path, monkeypatch):
    """More kept answers than --max-pairs, in a run interrupted before its first session: none may be lost."""
    train.train(tiny(tmp_path, "asked"))
    changes = dict(labels_from=str(tmp_path / "asked" / "labels.jsonl"), max_pairs=2, explore_steps=200)
    train.train(tiny(tmp_path, "whole", **changes))

    add = sac.ReplayBuffer.add

    def interrupted(self, *transition):
        if self.added == 150:
            raise KeyboardInterrupt
        add(self, *transition)

    with monkeypatch.context() as stopping:
        stopping.setattr(sac.ReplayBuffer, "add", interrupted)
        train.train(tiny(tmp_path, "part", **changes))
    train.train(settings.parse_args(["--resume", str(tmp_path / "part")]))
    whole, part = ((tmp_path / name / "metrics.csv").read_text() for name in ("whole", "part"))
    assert whole == part and len(whole.splitlines()) == 5


@pytest.mark.parametrize("arguments, said", [
    (["--labels-from", "nowhere"], "--labels-from nowhere"),
    (["--env", "Cartpole"], "there are CartPole"),
    (["--env", "Pendulum-v1"], "needs a goal"),
    (["--reward", "score", "--labels", "oracle"], "compares no pictures"),
    (["--vlm", "openai/x"], "OPENAI_API_KEY"),
    (["--env", "Pendulum-v1", "--goal", "to swing up"], "knows only these goals"),
    (["--reward", "nothing"], "preference"),
    (["--labels", "me"], "oracle"),
    (["--stepz", "3"], "there are --env"),
    (["--seed", "one"], "--seed"),
    (["--schedule", "paper", "--env", "Pendulum-v1", "--goal", "x"], "the paper has no task"),
    (["--schedule", "paper", "--env", "Unlock"], "the paper has no task"),
    (["--out", "."], "exists already"),
    (["--resume", "nowhere"], "no run folder"),
    (["--vlm-extra", "{"], "--vlm-extra"),
    (["--max-usd", "3"], "usd"),
    (["--usd-per-mtok", "cheap"], "IN,OUT"), (["--max-usd", "1", "--usd-per-mtok=-1,-1"], "IN,OUT"),
    (["--max-usd", "1", "--usd-per-mtok", "nan,1"], "IN,OUT"), (["--usd-per-mtok", "1,inf"], "IN,OUT"),
    (["--seed", "99999999999999999999"], "--seed"),
    (["--reward", "code", "--programs", "nowhere"], "nowhere"),
])
def test_bad_input_gets_one_line_and_leaves_nothing(tmp_path, monkeypatch, capsys, arguments, said):
    """Each mistake of the user must end with exit code 2 and one clear line, before anything is made."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    assert train.main(arguments) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1 and "Traceback" not in error
    assert [name for name in os.listdir(tmp_path) if name != "runs"] == [] and not list(tmp_path.glob("runs/*seed*"))


@pytest.mark.parametrize("name", list(schedules.PAPER))
def test_the_paper_s_schedule_takes_nothing_from_ours(name):
    """Whatever a task's own schedule sets, the paper's must set too, or a departure would slip into it."""
    assert set(schedules.OURS[name]) <= set(schedules.PAPER[name])
    config = settings.resolve(settings.Config(env=name, schedule="paper"))
    assert (config.hold, config.discount, config.random_shift, config.random_flip) == (1, 0.99, 0, 0)
    assert config.reward_batch == 64


@pytest.mark.usefixtures("unreported")
def test_a_damaged_run_folder_is_one_line(tmp_path, monkeypatch):
    """Whatever is wrong with config, summary or checkpoint, --resume must say so, in one line."""
    monkeypatch.setattr(train, "finish", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train.train(tiny(tmp_path, reward="true"))
    folder = tmp_path / "run"
    (folder / "checkpoint" / "state.pt").write_bytes(b"no checkpoint")
    with pytest.raises(settings.UserError, match="its checkpoint cannot be read"):
        train.train(settings.resumed({"resume": str(folder)}))
    (folder / "summary.json").write_text("{}")
    assert settings.resumed({"resume": str(folder)}).reward == "true"  # no word of an end: it goes on
    (folder / "config.json").write_text("[]")
    with pytest.raises(settings.UserError, match="no run folder of train.py"):
        settings.resumed({"resume": str(folder)})


def test_the_command_that_a_run_writes_down_makes_it_again():
    """config.json's command, given to the shell, must be the same settings; only `out` is another's."""
    config = settings.Config(env="DrawerOpen", seed=3, labels="oracle", vlm_mistakes=0.2, goal='to "open" it', max_pairs=7, out="x")
    words = shlex.split(settings.command_line(config))
    assert words[:2] == ["python", "train.py"]
    assert settings.parse_args(words[2:]) == dataclasses.replace(config, out=None)


def test_rows_after_the_checkpoint_are_written_once(tmp_path, monkeypatch):
    """A kill after an evaluation and before the next checkpoint must not leave its row twice in metrics.csv."""
    train.train(tiny(tmp_path, "whole", reward="true"))
    monkeypatch.setattr(train, "finish", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train.train(tiny(tmp_path, "cut", reward="true"))
    monkeypatch.undo()
    for name, line in (("metrics.csv", "999,9\n"), ("timing.csv", "999,9\n")):
        with open(tmp_path / "cut" / name, "a") as file:
            file.write(line)
    train.train(settings.resumed({"resume": str(tmp_path / "cut")}))
    whole, cut = ((tmp_path / name / "metrics.csv").read_text() for name in ("whole", "cut"))
    assert cut == whole and "999" not in (tmp_path / "cut" / "timing.csv").read_text()


@pytest.mark.usefixtures("unreported")
@pytest.mark.parametrize("field, value, says", [
    ("hold", 0, "--hold 0: it must be at least 1"), ("random_shift", -1, "--random-shift -1: it must be at least 0"),
    ("discount", 1.5, "--discount 1.5: it must be at least 0, at most 1"), ("discount", float("nan"), "--discount nan"),
    ("sac_lr", 0.0, "--sac-lr 0.0: it must be above 0"), ("reward_lr", float("inf"), "--reward-lr inf"), ("reward_image_size", 20, "--reward-image-size 20: it must be at least 47")])
def test_a_number_out_of_its_range_is_refused_before_anything_is_made(field, value, says):
    """One line with the flag, the value and what is possible; every value of every task's own entry must be in range."""
    with pytest.raises(settings.UserError, match=re.escape(says)):
        settings.resolve(settings.Config(**{field: value}))
    for task in envs.TASKS:
        settings.resolve(settings.Config(env=task, device="cpu"))


@pytest.mark.usefixtures("unreported")
def test_a_finished_run_is_not_resumed(tmp_path):
    """--resume of a finished run must say so instead of training on."""
    train.train(tiny(tmp_path, reward="true"))
    with pytest.raises(settings.UserError, match="has finished"):
        settings.parse_args(["--resume", str(tmp_path / "run")])


def test_every_config_field_is_read_and_explained():
    """Each tunable must have a comment (its --help text), a flag, and a place in the code that reads it."""
    code = "".join((ROOT / name).read_text() for name in ("train.py", "run.py"))
    for field in dataclasses.fields(settings.Config):
        assert len(settings.field_help()[field.name]) > 10, field.name
        assert re.search(rf"config\.{field.name}\b", code), f"nothing reads Config.{field.name}"


def test_numbers_on_the_command_line_may_be_written_as_floats():
    """--total-steps 4e3 must mean 4000, and given flags must override the task's entry."""
    config = settings.resolve(settings.parse_args(["--total-steps", "4e3", "--sac-lr", "1"]))
    assert config.total_steps == 4000 and config.sac_lr == 1.0 and config.hidden == schedules.OURS["CartPole"]["hidden"]
