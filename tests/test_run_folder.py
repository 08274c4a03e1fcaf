"""The run folder: a stranger's folder does no harm, a damaged one is one line or made whole, and Ctrl-C is one line."""
import dataclasses
import json
import os
import shutil
import subprocess
import sys
import types
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import gymnasium
import pytest
import torch

from support import cached_labels
import envs
from support import given_rewards
from support import report
from support import run
from support import settings
import sac
from tools import sweep
import train

SMALL = dict(env="CartPole", horizon=30, total_steps=120, seed_steps=30, explore_steps=30, feedback_every=30,
             pairs_per_session=4, max_pairs=8, batch_size=16, hidden=16, reward_image_size=48, vlm_image_size=64, reward_epochs=1,
             eval_every=60, eval_episodes=1, image_buffer=20, ensemble_size=1, labels="oracle")


@pytest.fixture(scope="module", autouse=True)
def unreported():
    """Leaves out reports and films, to save their seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "write_report", lambda folder: Path(folder, "report.html").touch())
        patch.setattr(run.Run, "film", lambda *_: None)
        patch.setattr(run, "write_episodes", lambda *_: 0.0)
        yield


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two folders: `whole`, undisturbed, and `half`, ended at step 105 as by kill -9."""
    here = tmp_path_factory.mktemp("runs")
    train.train(settings.Config(**SMALL, out=str(here / "whole")))
    add = sac.ReplayBuffer.add

    def dying(self, *transition):
        if self.added == 105:
            raise ZeroDivisionError  # nothing expects this one
        return add(self, *transition)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sac.ReplayBuffer, "add", dying)
        with pytest.raises(ZeroDivisionError):
            train.train(settings.Config(**SMALL, out=str(here / "half")))
    return here


@pytest.fixture
def half(runs, tmp_path):
    """A copy of the half run."""
    return Path(shutil.copytree(runs / "half", tmp_path / "half"))


def changed(folder, **changes):
    """config.json, edited by hand."""
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def resume(folder, *flags, capsys=None):
    """--resume -> exit code and, given capsys, what it says in stderr, which is one line."""
    code = train.main(["--resume", str(folder), *flags])
    if capsys:
        *_, error = lines = capsys.readouterr().err.strip().splitlines()  # before it, perhaps a progress bar
        assert error.startswith("train.py: ") and not any("Traceback" in line for line in lines)
        return code, error
    return code


def state_of(folder):
    return torch.load(folder / "checkpoint" / "state.pt", weights_only=True)


# ---- a stranger's folder ----
def test_no_module_that_a_folder_names_is_imported(half, tmp_path, monkeypatch, capsys):
    """An environment "module:id" of config.json must be named again, and the message must say how."""
    (tmp_path / "payload.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\n")
    monkeypatch.syspath_prepend(tmp_path)
    changed(half, env="payload:X-v0", goal="to shine")
    code, error = resume(half, capsys=capsys)
    assert code == 2 and f"python train.py --resume {half} --env payload:X-v0" in error
    assert not (tmp_path / "ran").exists()
    assert settings.parse_args(["--resume", str(half), "--env", "payload:X-v0"]).env == "payload:X-v0"
    with pytest.raises(settings.UserError, match="keeps its --env"):
        settings.parse_args(["--resume", str(half), "--env", "CartPole"])
    changed(half, env="CartPole", reward="clip", clip_model="/some/folder", labels="vlm")
    with pytest.raises(settings.UserError, match="--clip-model /some/folder"):
        settings.parse_args(["--resume", str(half)])


def test_a_key_goes_only_where_its_user_sends_it(half, monkeypatch):
    """A host of config.json gets no key, unless it is the official one or the user names it again."""
    monkeypatch.setenv("OPENAI_API_KEY", "sk-mine")
    monkeypatch.delenv("LOCAL_API_KEY", raising=False)
    for url in ("http://127.0.0.1:1/v1", "https://api.openai.com.evil.org/v1", "http://api.openai.com/v1",
                "https://api.openai.com\\.evil.org", "https://evil.org/https://api.openai.com/"):
        changed(half, labels="vlm", vlm="openai/gpt", vlm_url=url)
        with pytest.raises(settings.UserError, match="OPENAI_API_KEY would be sent"):
            settings.parse_args(["--resume", str(half)])
        assert settings.parse_args(["--resume", str(half), "--vlm-url", url]).vlm_url == url
    changed(half, vlm_url="https://api.openai.com/v1/")
    assert settings.resumed({"resume": str(half)}).vlm == "openai/gpt"
    changed(half, vlm="local/m", vlm_url="http://127.0.0.1:1/v1")
    assert settings.resume_command(settings.resumed({"resume": str(half)}), "a b") == "python train.py --resume 'a b'"
    monkeypatch.setenv("LOCAL_API_KEY", "k")
    with pytest.raises(settings.UserError, match="LOCAL_API_KEY would be sent"):
        settings.parse_args(["--resume", str(half)])


@pytest.mark.parametrize("name", ["labels.jsonl", "metrics.csv", "config.json", "checkpoint/state.pt", "report.html",
                                  "eval_after.gif", "config.json.new", "buffer/obs.npy", ".lock"])
@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_links_are_not_written_through(half, tmp_path, capsys, name, link):
    """Whichever file of the folder is a link to one of the user's, the latter stays as it is."""
    victim, path = tmp_path / "precious", half / name
    kept = path.read_bytes() if path.exists() else b"one line without an end"
    victim.write_bytes(kept)
    path.unlink(missing_ok=True)
    link(victim, path)
    code, error = resume(half, capsys=capsys)
    assert code == 2 and victim.read_bytes() == kept and str(half) in error


def test_no_folder_of_it_is_a_link_but_the_buffer(half, tmp_path, capsys):
    """pairs/ elsewhere is refused; buffer/ may be on a larger disk, where only its own files go at the end."""
    shutil.move(half / "buffer", tmp_path / "big")
    (tmp_path / "big" / "mine.txt").write_text("not the run's")
    os.symlink(tmp_path / "big", half / "buffer")
    shutil.move(half / "pairs", tmp_path / "elsewhere")
    os.symlink(tmp_path / "elsewhere", half / "pairs")
    assert resume(half, capsys=capsys)[0] == 2
    os.remove(half / "pairs")
    os.mkfifo(half / "pairs")
    assert resume(half, capsys=capsys)[0] == 2
    os.remove(half / "pairs")
    assert resume(half, "--keep-buffer", "0") == 0
    assert os.listdir(tmp_path / "big") == ["mine.txt"] and not os.path.lexists(half / "buffer")


def test_the_buffer_of_another_run_is_not_its_own(half, runs, tmp_path, capsys):
    """A buffer/ that leads into another run folder would spoil that one."""
    shutil.copytree(half, tmp_path / "other")
    shutil.rmtree(half / "buffer")
    os.symlink(tmp_path / "other" / "buffer", half / "buffer")
    assert resume(half, capsys=capsys)[0] == 2


@pytest.mark.parametrize("changes", [
    dict(hidden="16"), dict(hidden=16.5), dict(hidden=True), dict(hidden=None) | dict(env=None), dict(seed=float("nan")),
    dict(sac_lr=float("nan")), dict(sac_lr="1e-3"), dict(env=["CartPole"]), dict(goal={"a": 1}), dict(labels="me"),
    dict(device=7), dict(vlm_extra=3), dict(goal="a\0b"), dict(total_steps=10**400), dict(discount=10**400),
    dict(workers=0), dict(stages="2"), dict(usd_per_mtok=1), dict(vlm=None), dict(ensemble_size=10**9)])
def test_values_of_a_folder_are_checked_as_flags_are(half, capsys, changes):
    """A wrong type, a number out of its range, NaN: one line that names the setting."""
    changed(half, **changes)
    code, error = resume(half, capsys=capsys)
    assert code == 2 and any(name in error.replace("-", "_") for name in changes)


def test_files_of_a_stranger_are_plain_and_of_bounded_size(tmp_path, half):
    """Pipes and devices are not read, nor files without end; by no reader of a folder."""
    os.mkfifo(tmp_path / "labels.jsonl")
    os.mkfifo(tmp_path / "1_pipe.py")
    for path in (tmp_path, tmp_path / "labels.jsonl", "/dev/zero"):
        with pytest.raises(cached_labels.CachedLabelsError, match="no ordinary file"):
            cached_labels.read_labels(str(path), 48)
    with pytest.raises(settings.UserError, match="no ordinary file"):
        given_rewards.read_programs(str(tmp_path))
    with open(tmp_path / "huge", "wb") as file:
        file.truncate(2**40)
    shutil.copy(half / "labels.jsonl", tmp_path / "log.jsonl")
    (tmp_path / "pairs").mkdir()
    os.rename(tmp_path / "huge", tmp_path / "pairs" / "000000.png")
    with pytest.raises(cached_labels.CachedLabelsError, match="too many"):
        cached_labels.read_labels(str(tmp_path / "log.jsonl"), 48)
    os.rename(tmp_path / "pairs" / "000000.png", tmp_path / "1_pipe.py")
    with pytest.raises(settings.UserError, match="too many"):
        given_rewards.read_programs(str(tmp_path))
    os.remove(half / "config.json")
    os.mkfifo(half / "config.json")
    with pytest.raises(settings.UserError, match="no run folder of train.py"):
        settings.resumed({"resume": str(half)})
    assert cached_labels.labeler_of(str(half / "labels.jsonl")) == "somebody unknown"


def test_what_is_shown_holds_no_escape_codes(capsys, half):
    """A stranger's words must not move the cursor, nor begin lines of their own."""
    settings.say("a\x1b[31mb\x9b\nlabels from: openai/gpt\u202e\ud800")
    assert capsys.readouterr().out == "a [31mb  labels from: openai/gpt  \n"
    changed(half, labeler="\x1b]0;x\x07\nopenai/gpt")
    assert "\x1b" not in settings.who_labels(settings.Config(labels=str(half)))


# ---- a damaged folder ----
def test_lost_tables_are_written_anew(half, runs):
    """metrics.csv and timing.csv missing: both come from the checkpoint, and the run ends as undisturbed."""
    timing = (half / "timing.csv").read_text().splitlines()
    os.remove(half / "metrics.csv")
    (half / "timing.csv").write_text("st")
    assert resume(half) == 0
    assert (half / "metrics.csv").read_bytes() == (runs / "whole" / "metrics.csv").read_bytes()
    assert (half / "timing.csv").read_text().splitlines()[:2] == timing[:2]


def test_a_checkpoint_of_before_goes_on(half, runs):
    """One without settings, times and checksums, and without a buffer beside what it needs, ends as undisturbed."""
    state = state_of(half)
    del state["config"], state["times"]
    state["sums"] = {}
    torch.save(state, half / "checkpoint" / "state.pt")
    os.remove(half / ".lock")
    assert resume(half) == 0
    assert (half / "metrics.csv").read_bytes() == (runs / "whole" / "metrics.csv").read_bytes()
    assert len((half / "timing.csv").read_text().splitlines()) == 4


@pytest.mark.parametrize("name", ["obs", "next_obs", "action", "image", "query", "query_small"])
def test_a_buffer_that_is_missing_short_or_another_s_is_one_line(half, capsys, name):
    """Rows of zeros would be learned from without a word."""
    path, kept = half / "buffer" / f"{name}.npy", (half / "buffer" / f"{name}.npy").read_bytes()
    damages = [path.unlink, lambda: path.write_bytes(kept[:len(kept) // 8]), lambda: path.write_bytes(b"")]
    if "query" not in name:  # candidates may have changed since the checkpoint
        damages.append(lambda: path.write_bytes(kept[:128] + bytes(len(kept) - 128)))
    for damage in damages:
        damage()
        code, error = resume(half, capsys=capsys)
        assert code == 2 and name in error and str(half) in error
        path.write_bytes(kept)


def test_lost_answers_are_one_line(half, capsys):
    """labels.jsonl with fewer lines than the checkpoint counts."""
    lines = (half / "labels.jsonl").read_bytes().splitlines(keepends=True)
    (half / "labels.jsonl").write_bytes(lines[0])
    code, error = resume(half, capsys=capsys)
    assert code == 2 and "1 of 8 answers" in error
    os.remove(half / "labels.jsonl")
    assert resume(half, capsys=capsys)[0] == 2


def test_a_damaged_checkpoint_is_one_line(half, capsys):
    """A flipped bit of a weight, half a file, an empty one, another pickle."""
    path = half / "checkpoint" / "state.pt"
    raw = bytearray(path.read_bytes())
    weight = next(iter(state_of(half)["pi"]["actor"].values())).numpy().tobytes()
    raw[raw.index(weight) + 3] ^= 0x20
    for content in (raw, raw[:len(raw) // 2], b"", b"\x80\x04N."):
        path.write_bytes(content)
        code, error = resume(half, capsys=capsys)
        assert code == 2 and "its checkpoint cannot be read" in error


@pytest.mark.parametrize("change", [
    lambda state: state["pi"].pop("slow_actor"), lambda state: state.pop("rows"), lambda state: state["pi"].pop("actor"),
    lambda state: state["at"].update(step=7), lambda state: state["labeler"]["counts"].update(asked=None),
    lambda state: state.update(rows=[{"step": "\x1b", "eval_return": "x"}]), lambda state: state.update(logged="3"),
    lambda state: state["B"].update(reward=torch.zeros(3)), lambda state: state["config"].update(seed=3),
    lambda state: state.update(r_psi={}), lambda state: state.update(at=None)])
def test_a_checkpoint_of_another_version_is_one_line(half, capsys, change):
    """Keys that are not there, other shapes, other types."""
    state = state_of(half)
    change(state)
    torch.save(state, half / "checkpoint" / "state.pt")
    assert resume(half, capsys=capsys)[0] == 2


@pytest.mark.parametrize("changes", [dict(total_steps=90), dict(hidden=8), dict(reward_image_size=64), dict(ensemble_size=2),
                                     dict(image_buffer=30), dict(vlm_image_size=48)])
@pytest.mark.parametrize("known", [True, False])
def test_settings_that_are_not_the_run_s_are_one_line(half, capsys, changes, known):
    """Sizes edited by hand, with a checkpoint that knows the settings and an older one that does not."""
    changed(half, **changes)
    if not known:
        state = state_of(half)
        del state["config"]
        torch.save(state, half / "checkpoint" / "state.pt")
    code, error = resume(half, capsys=capsys)
    assert code == 2 and (not known or f"config.json says {next(iter(changes))}" in error)


def test_one_process_at_a_time(half, capsys):
    """While a run is at work in a folder, another --resume is one line, and nothing changes; afterwards it goes on."""
    before = {path.name: path.read_bytes() for path in half.iterdir() if path.is_file()}
    with run.claim(str(half)):
        code, error = resume(half, capsys=capsys)
        assert code == 2 and "another process is at work" in error
    assert {path.name: path.read_bytes() for path in half.iterdir() if path.is_file()} == before
    run.claim(str(half)).close()


# ---- a new folder ----
def test_the_folder_is_tried_before_anything_is_paid_for(tmp_path, monkeypatch, capsys):
    """Too long a name, a file in the way, a place that takes nothing: one line, and nobody is asked."""
    monkeypatch.setattr(run, "make_labeler", lambda config: 1 / 0)
    (tmp_path / "file").touch()
    for out in (tmp_path / ("a" * 300), tmp_path / "file" / "run", tmp_path / "file", "/proc/run"):
        assert train.main(["--out", str(out)]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and "--out" in error


def test_names_of_folders(tmp_path, monkeypatch):
    """Two runs of one second get two folders, a slash in an id makes none, and a hint can be pasted."""
    monkeypatch.chdir(tmp_path)
    names = [run.make_folder("runs/x", unique=True) for _ in range(3)]
    assert names == ["runs/x", "runs/x-2", "runs/x-3"]
    with pytest.raises(settings.UserError, match="exists already"):
        run.make_folder("runs/x")
    gymnasium.register("lab/Bar-v0", entry_point=lambda render_mode: gymnasium.make(
        "Pendulum-v1", render_mode=render_mode), max_episode_steps=9)
    config = run.prepare(settings.Config(env="lab/Bar-v0", goal="up", labels="oracle"))[0]
    assert os.path.dirname(config.out) == "runs" and sorted(os.listdir("runs")) == ["x", "x-2", "x-3"]
    del gymnasium.registry["lab/Bar-v0"]
    made = run.Run(settings.Config(**SMALL, out="my first run"))
    assert made.resume_command() == "python train.py --resume 'my first run'"


def test_a_sweep_goes_on_with_a_module_of_its_own(half, monkeypatch):
    """A sweep names its environment itself: its folders are no stranger's."""
    changed(half, env="mine:X-v0", goal="to shine")
    job = dataclasses.replace(sweep.plan_grid(["env=CartPole", "seed=0"])[0], task="mine:X-v0", folder=str(half))
    assert sweep.config_of(job).env == "mine:X-v0"


# ---- numbers ----
def test_seeds_stay_within_32_bits():
    """Up to the largest --seed; small seeds keep their episodes, which the published numbers are of."""
    for seed in (0, 7, 123_456, 2**31 - 1):
        config = settings.resolve(settings.Config(seed=seed))
        asked = []
        train.new_episode(types.SimpleNamespace(reset=lambda seed: asked.append(seed) or [0]), config.seed,
                          train.Progress(episodes=5))
        seeds = [*asked, run.Run.seed(types.SimpleNamespace(config=config), run.EVAL_SEED, 3)]
        assert all(0 <= seed < 2**32 for seed in seeds)
        assert seed > 10 or seeds == [100_000 * seed + 5, 1_000_003 + 1000 * seed]


def test_huge_numbers_are_fine_or_one_line():
    """--max-pairs 1e9 needs memory for what the schedule can ask; others have a most; JSON has a depth."""
    config = settings.resolve(settings.Config(**{**SMALL, "max_pairs": 10**9}))
    assert run.most_pairs(config) == 16 and run.most_pairs(settings.resolve(settings.Config(**SMALL))) == 8
    for changes in (dict(total_steps=int(1e300)), dict(max_pairs=2**40), dict(hidden=10**6), dict(vlm_image_size=10**6)):
        with pytest.raises(settings.UserError, match="at most"):
            settings.resolve(settings.Config(**changes))
    for text in ("[" * 60_000, '{"a":' * 60_000):
        with pytest.raises(settings.UserError, match="no JSON object") as caught:
            settings.resolve(settings.Config(vlm_extra=text))
        assert len(str(caught.value)) < 300


def test_disk_for_observations_is_counted(tmp_path, monkeypatch):
    """Where an observation is a picture, two of each step are most of what is stored."""
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(2**40, 0, 4 * 2**30))
    env = envs.make("CartPole")
    config = settings.resolve(settings.Config(total_steps=50_000, out=str(tmp_path / "run")))
    run.check_disk(config, env)
    env.observation_space = gymnasium.spaces.Box(0, 1, (96 * 96 * 3,))
    with pytest.raises(settings.UserError, match="observations"):
        run.check_disk(config, env)


# ---- Ctrl-C ----
def test_ctrl_c_outside_the_loop_is_one_line(half, monkeypatch, capsys):
    """While a run is wound up, or before its first step: exit code 130 and how to go on."""
    for owner, place in ((run, "open_buffer"), (run.Run, "finish")):
        with monkeypatch.context() as patch:
            patch.setattr(owner, place, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
            code, error = resume(half, capsys=capsys)
        assert code == 130 and f"python train.py --resume {half}" in error
    assert resume(half) == 0


def test_ctrl_c_while_it_starts_and_twice_is_one_line():
    """The handlers: before there is a run, and once more after the first."""
    start = ("import os, signal; from support import interrupts; "
             "signal.signal(signal.SIGINT, interrupts.{}); interrupts.GO_ON.append('go on'); ")
    press = "os.kill(os.getpid(), signal.SIGINT)\n"
    twice = f"try:\n    {press}except KeyboardInterrupt:\n    {press}"
    for code in (start.format("at_once") + press, start.format("in_order") + "\n" + twice):
        done = subprocess.run([sys.executable, "-c", code], cwd=Path(train.__file__).parent, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (130, "\ntrain.py: interrupted [nothing is lost; go on]\n")


def test_help_without_docstrings():
    """python -OO has none."""
    done = subprocess.run([sys.executable, "-OO", "train.py", "--help"], cwd=Path(train.__file__).parent,
                          capture_output=True, text=True)
    assert done.returncode == 0 and "--env" in done.stdout and not done.stderr


# ---- what a stranger's or an old folder may hold ----
@pytest.mark.parametrize("change", [
    lambda state: next(iter(state["pi"]["actor"].values())).fill_(float("nan")), lambda state: state["at"].update(doubts=5),
    lambda state: state["at"].update(fit="x"), lambda state: state["labeler"]["counts"].update(asked="x"),
    lambda state: state["labeler"]["counts"].update(asked=-1), lambda state: state["rows"][0].update(eval_return=None),
    lambda state: state.update(logged=-1)])
def test_a_checkpoint_of_other_kinds_of_values_is_one_line(half, capsys, change):
    """Weights that are not finite (an old version let one NaN spoil them), text for a number, a number below nothing."""
    state = state_of(half)
    change(state)
    torch.save(state, half / "checkpoint" / "state.pt")
    code, error = resume(half, capsys=capsys)
    assert code == 2 and "its checkpoint does not fit" in error


def test_changed_settings_are_seen_before_anything_is_made_or_asked(half, monkeypatch, capsys):
    """Compared only after the sight check, two calls would have been paid for; a huge action repeat would hang."""
    monkeypatch.setattr(run, "make_labeler", lambda config: 1 / 0)
    monkeypatch.setattr(run, "prepare", lambda config: 1 / 0)
    for changes in (dict(labels="vlm"), dict(action_repeat=900)):
        changed(half, **changes)
        code, error = resume(half, capsys=capsys)
        assert code == 2 and "config.json says" in error


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path, monkeypatch, capsys):
    """A full disk while the folder is made."""
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run, "write_json", full)
    assert train.main(["--env", "CartPole", "--labels", "oracle", "--out", str(tmp_path / "run")]) == 2
    assert "No space left" in capsys.readouterr().err


def test_a_tilde_is_the_home_folder(monkeypatch):
    """bash expands it in `--out ~/run`, and not in `--out=~/run`."""
    monkeypatch.setenv("HOME", "/home/me")
    assert settings.parse_args(["--out=~/run"]).out == "/home/me/run"
