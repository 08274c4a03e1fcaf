"""run.py: the run folder, and going on with a run."""
import json
import os
import shutil
import types

import gymnasium
import numpy as np
import pytest
import torch

import envs
from support import run, settings
from support.labeler import make_labeler
import sac
import train
from test_components import Odd, tiny


def test_a_stand_in_by_another_name_is_no_vlm(tmp_path):
    """One that runs already, as offline/NAME, must be named as what it is in banner and folder."""
    config = settings.Config(env="CartPole", vlm="offline/x", vlm_url="http://localhost:1/v1")
    assert settings.who_labels(config) == "offline stand-in (not a VLM)"
    assert "offline_stand-in" in run.prepare(config)[0].out


@pytest.mark.usefixtures("unreported")
@pytest.mark.parametrize("crash_at", [120, 260])
def test_a_resumed_run_ends_as_if_never_interrupted(tmp_path, monkeypatch, crash_at):
    """Killed in the middle of an episode and resumed, the run must write the same metrics.csv, byte for byte."""
    train.train(tiny(tmp_path, "whole"))
    add, count = sac.ReplayBuffer.add, []

    def dying(self, *transition):
        count.append(1)
        if len(count) == crash_at:
            raise MemoryError  # nothing in train.py expects this one: it ends the run like kill -9
        return add(self, *transition)

    monkeypatch.setattr(sac.ReplayBuffer, "add", dying)
    with pytest.raises(MemoryError):
        train.train(tiny(tmp_path, "killed"))
    monkeypatch.setattr(sac.ReplayBuffer, "add", add)
    train.train(settings.parse_args(["--resume", str(tmp_path / "killed")]))
    whole, killed = (tmp_path / name for name in ("whole", "killed"))
    assert whole.joinpath("metrics.csv").read_bytes() == killed.joinpath("metrics.csv").read_bytes()
    labels = [[json.loads(line) for line in open(folder / "labels.jsonl")] for folder in (whole, killed)]
    labels = [sorted((record["index"], record["label"]) for record in records) for records in labels]
    assert labels[0] == labels[1] and len(labels[0]) >= 12  # in the order of arrival, which depends on threads


def test_an_interrupted_run_says_how_to_go_on(tmp_path, monkeypatch, capsys):
    """Ctrl-C must end with the closing paragraph and the command that resumes."""
    update, count = sac.SAC.update, []

    def interrupting(self, batch):
        count.append(1)
        if len(count) == 50:
            raise KeyboardInterrupt
        return update(self, batch)

    monkeypatch.setattr(sac.SAC, "update", interrupting)
    train.train(tiny(tmp_path, labels="oracle"))
    said = capsys.readouterr().out
    assert "interrupted after" in said and f"--resume {tmp_path / 'run'}" in said
    assert os.path.exists(tmp_path / "run" / "report.html") and os.path.exists(tmp_path / "run" / "buffer")


def test_disk_is_not_asked_for_where_no_picture_is_stored(tmp_path, monkeypatch):
    """A full disk must stop a run that stores pictures before it starts, and no run with the true reward."""
    monkeypatch.setattr(shutil, "disk_usage", lambda _: types.SimpleNamespace(free=20_000))  # observations and actions
    run.check_disk(settings.resolve(tiny(tmp_path, reward="true")), envs.make("CartPole"))
    with pytest.raises(settings.UserError, match="of disk"):
        train.train(tiny(tmp_path, reward="score"))


def test_a_raised_limit_lets_the_questions_go_on(tmp_path):
    """A run that had reached --max-calls must ask again when it is resumed with more, and with as many must not."""
    for more, asks in ((6, False), (60, True)):
        labeler = make_labeler(settings.resolve(tiny(tmp_path, max_calls=more)))
        try:
            labeler.load_state_dict({"counts": labeler.counts, "exhausted": True,
                                     "vlm": {**labeler.vlm.state_dict(), "calls": 6}})
            assert bool(labeler.room(6)) == asks
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
    ({"env": "Pendulum-v1", "goal": "up", "reward": "code"}, "no scripted expert"),
    ({"horizon": 9, "goal": "without OpenGL"}, "apt-get"), ({"horizon": 9, "goal": "on a full disk"}, "0.0 are free")])
def test_what_cannot_work_here_is_said_before_anything_is_made(tmp_path, monkeypatch, changes, says):
    """A missing expert, OpenGL or disk must end in one line and leave no run folder."""
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
    run.check_disk(config, env)
    free.free -= 1
    with pytest.raises(settings.UserError, match="50 images to ask about need"):
        run.check_disk(config, env)


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
    changes = dict(labels=str(tmp_path / "asked" / "labels.jsonl"), max_pairs=2, explore_steps=200)
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


@pytest.mark.usefixtures("unreported")
def test_a_damaged_run_folder_is_one_line(tmp_path, monkeypatch):
    """Whatever is wrong with config, summary or checkpoint, --resume must say so, in one line."""
    monkeypatch.setattr(run.Run, "finish", lambda *_: 1 / 0)
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


def test_rows_after_the_checkpoint_are_written_once(tmp_path, monkeypatch):
    """A kill after an evaluation and before the next checkpoint must not leave its row twice in metrics.csv."""
    train.train(tiny(tmp_path, "whole", reward="true"))
    monkeypatch.setattr(run.Run, "finish", lambda *_: 1 / 0)
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
def test_a_finished_run_is_not_resumed(tmp_path):
    """--resume of a finished run must say so instead of training on."""
    train.train(tiny(tmp_path, reward="true"))
    with pytest.raises(settings.UserError, match="has finished"):
        settings.parse_args(["--resume", str(tmp_path / "run")])
