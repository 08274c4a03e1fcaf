"""support/settings.py: the settings, the command line, --help, old spellings, and the command that makes a run again."""
import dataclasses
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import envs
from support import settings
from tasks import schedules

ROOT = Path(__file__).resolve().parents[1]
FIRST_CLASS = (
    "env goal reward labels vlm vlm_url vlm_extra stages both_orders max_calls max_usd usd_per_mtok timeout seed schedule total_steps "
    "explore_steps feedback_every pairs_per_session max_pairs sampler device fast out resume").split()


def parsed(line):
    """The shell's line -> Config."""
    return settings.parse_args(shlex.split(line))


# ---- --help ----
def test_help_fits_on_one_screen_and_names_what_a_user_needs():
    """At most 40 lines of 110 characters; each first-class flag and the way to everything else has a line."""
    lines = settings.help_text()
    shown = [line.split()[0][2:].replace("-", "_") for line in lines if line.startswith("  --")]
    assert len(lines) <= 40 and max(map(len, lines)) <= 110
    assert sorted(shown) == sorted([*FIRST_CLASS, "set", "watch", "help_all"])


def test_help_all_shows_every_field():
    """Each field must be there once: a flag, or for the facts of a task the way to set it."""
    lines = [line for line in settings.help_text(every=True) if line.startswith("  --")]
    assert len(lines) == len(dataclasses.fields(settings.Config)) + 3 and max(map(len, lines)) <= 120
    for name in settings.FIELDS:
        assert sum(line[2:].startswith((f"--{name.replace('_', '-')} ", f"--set {name}= ")) for line in lines) == 1, name


@pytest.mark.parametrize("flag", ["--help", "--help-all", "-h"])
@pytest.mark.parametrize("python", [["-OO"], []])
def test_help_is_instant(python, flag):
    """It must be answered before anything large is imported; python -OO has no docstrings."""
    code = ("import sys, atexit\nfrom support import settings\n"
            "atexit.register(lambda: print({'torch', 'requests', 'numpy', 'gymnasium'} & set(sys.modules)))\n"
            f"settings.parse_args(['--env', 'CartPole', '{flag}'])")
    done = subprocess.run([sys.executable, *python, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr
    assert "--max-pairs" in done.stdout and done.stdout.endswith("set()\n")


def test_every_field_is_explained_and_read():
    """Each tunable must have a comment (its --help text) of its own, and a place in the code that reads it."""
    code = "".join(path.read_text() for path in [ROOT / "train.py", *ROOT.glob("support/*.py")]
                   if path.name != "settings.py")
    texts = {name: text for fields in settings.explained().values() for name, text in fields.items()}
    assert list(texts) == list(settings.FIELDS) and len(set(texts.values())) == len(texts)
    asked_of_settings = {"labels": "labels_kind", "vlm": "vlm_name", "usd_per_mtok": "price_of"}
    for name, text in texts.items():
        assert len(text) > 10, name
        read = asked_of_settings.get(name, rf"config\.{name}\b")
        assert re.search(read, code) or name == "schedule", f"nothing reads Config.{name}"


# ---- flags, --set, checks ----
def test_numbers_on_the_command_line_may_be_written_as_floats():
    """--total-steps 4e3 must mean 4000, and given flags must override the task's entry."""
    config = settings.resolve(settings.parse_args(["--total-steps", "4e3", "--sac-lr", "1"]))
    assert config.total_steps == 4000 and config.sac_lr == 1.0 and config.hidden == schedules.OURS["CartPole"]["hidden"]


def test_set_gives_any_field_a_value():
    """A fact of the task, a number of the schedule, a text with an equals sign: with the field's own type."""
    config = parsed("--set horizon=1e2 --set random_flip=0 --set sac_lr=1 --set goal=a=b --set max_pairs=7")
    assert (config.horizon, config.random_flip, config.sac_lr, config.goal, config.max_pairs) == (100, 0, 1.0, "a=b", 7)
    assert isinstance(config.sac_lr, float) and config.hold is None and settings.resolve(config).horizon == 100


@pytest.mark.parametrize("line, says", [
    ("--set horizn=5", "the names are env, goal, .*horizon"), ("--set horizon", "write name=value"),
    ("--set horizon=x", "--set horizon=x: it must be a whole number"),
    ("--set horizon=2.5", "--set horizon=2.5: it must be a whole number"),
    ("--set reward_image_size=20", "--set reward_image_size=20: it must be at least 47, at most 4096"),
    ("--set sampler=worst", "--sampler worst: there are uniform, disagreement"), ("--reward nothing", "there are preference"),
    ("--sac-lr much", "--sac-lr much: it must be a number"), ("--seed inf", "--seed inf: it must be a whole number"),
    ("--fast 3", "--fast 3: it must be at least 0, at most 2"), ("--goal", "--goal: expected one argument"),
    ("--stepz 3", "there are --env, .*--set horizon="),
    ("--vlm offline:mistake=0.1", "there are mistakes= 0 to 1, unsure= 0 to 1, latency= 0 to 3600"),
    ("--vlm offline:mistakes=2", "--vlm offline:mistakes=2: after offline: there are mistakes= 0 to 1"),
    ("--vlm offline:", "after offline: there are"), ("--vlm offline:unsure=nan", "unsure= 0 to 1"),
    ("--labels oracle:unsure=0.1", "after oracle: there are mistakes= 0 to 1, with"),
])
def test_a_wrong_name_or_value_gets_one_line_that_says_what_is_possible(line, says):
    """Before anything is made, whether by flag or by --set."""
    with pytest.raises(settings.UserError, match=says) as caught:
        parsed(line)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("field, value, says", [
    ("hold", 0, "--set hold=0: it must be at least 1"),
    ("random_shift", -1, "--set random_shift=-1: it must be at least 0"),
    ("discount", 1.5, "--discount 1.5: it must be at least 0, at most 1"), ("discount", float("nan"), "--discount nan"),
    ("sac_lr", 0.0, "--sac-lr 0.0: it must be above 0"), ("reward_lr", float("inf"), "--reward-lr inf"),
    ("reward_image_size", 20, "--set reward_image_size=20: it must be at least 47")])
def test_a_number_out_of_its_range_is_refused_before_anything_is_made(field, value, says):
    """One line with the flag, the value and what is possible; every value of every task's own entry must be in range."""
    with pytest.raises(settings.UserError, match=re.escape(says)):
        settings.resolve(settings.Config(**{field: value}))
    for task in envs.TASKS:
        settings.resolve(settings.Config(env=task, device="cpu"))


@pytest.mark.parametrize("changes, says", [
    ({"device": "cuda"}, "torch finds no such GPU"), ({"device": "cuda", "fast": 2}, "torch finds no such GPU"),
    ({"device": "gpu"}, "there are auto, cpu, cuda"),
    ({"reward": "true", "labels": "oracle"}, "--reward true compares no images"),
    ({"reward": "code", "labels": "oracle"}, "--reward code compares no images"),
    ({"reward": "score", "labels": "."}, "--reward score compares no images"),
    ({"reward": "score", "vlm": "offline:mistakes=0.2"}, "shows only one"),
    ({"labels": "oracle", "vlm": "offline:unsure=0.2"}, "offline:unsure=0.2: that is a flaw of the offline stand-in"),
    ({"labels": "me"}, "--labels me: there are vlm, oracle, oracle:mistakes=0.2, or a folder"),
    ({"vlm_url": "http://localhost:1/v1"}, "--vlm offline starts a stand-in of its own"),
    ({"vlm": "offline:latency=1", "vlm_url": "http://localhost:1/v1"}, "--vlm offline starts a stand-in of its own"),
    ({"reward": "clip", "clip_alpha": 0.5}, "--clip-alpha needs --clip-baseline")])
def test_what_does_not_go_together_is_said_before_anything_is_made(monkeypatch, changes, says):
    """One line that names the settings."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(settings.UserError, match=says):
        settings.resolve(settings.Config(**changes))


def test_fast_takes_what_the_machine_has(monkeypatch):
    """--fast 2 must not fail without a GPU; with one, auto must take it, and without the flag leave it alone."""
    for there, device in ((False, "cpu"), (True, "cuda")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
        assert settings.resolve(settings.Config(fast=2)).device == device
        assert settings.resolve(settings.Config(fast=2, device="cpu")).device == "cpu"
        assert settings.resolve(settings.Config()).device == "cpu"


@pytest.mark.parametrize("arguments, said", [
    (["--labels-from", "nowhere"], "--labels nowhere"),
    (["--env", "Cartpole"], "there are CartPole"),
    (["--env", "Pendulum-v1"], "needs a goal"),
    (["--reward", "score", "--labels", "oracle"], "compares no images"),
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
    (["--without", "relabelling"], "python -m tools.ablations relabelling"),
    (["--set", "horizn=3"], "the names are"),
])
def test_bad_input_gets_one_line_and_leaves_nothing(tmp_path, monkeypatch, capsys, arguments, said):
    """Each mistake of the user must end with exit code 2 and one clear line, before anything is made."""
    import train

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
    assert (config.hold, config.random_shift, config.random_flip, config.reward_batch) == (1, 0, 0, 64)
    assert config.discount == (0 if name == "FoldCloth" else 0.99)  # an episode of one step has no discount


# ---- who judges ----
@pytest.mark.parametrize("line, kind, vlm, flaws, banner", [
    ("", "vlm", "offline", (0, 0, 0), "offline stand-in (not a VLM)"),
    ("--vlm offline:mistakes=.2,unsure=0.1,latency=1", "vlm", "offline", (0.2, 0.1, 1.0),
     "offline stand-in (not a VLM, wrong on purpose in 20%)"),
    ("--vlm local/qwen:7b", "vlm", "local/qwen:7b", (0, 0, 0), "local/qwen:7b"),
    ("--vlm offline/x --vlm-url http://localhost:1/v1", "vlm", "offline/x", (0, 0, 0), "offline stand-in (not a VLM)"),
    ("--labels oracle", "oracle", "offline", (0, 0, 0), "oracle (labels from true progress, not a VLM)"),
    ("--labels oracle:mistakes=0.2", "oracle", "offline", (0.2, 0, 0),
     "oracle (labels from true progress, not a VLM, wrong on purpose in 20%)"),
    ("--reward code --vlm openai/m", "vlm", "openai/m", (0, 0, 0), "openai/m"),
    ("--reward true", "vlm", "offline", (0, 0, 0), "nobody (true reward)"),
    ("--reward code --labels .", "kept", "offline", (0, 0, 0), "nobody (programs from .)"),
    ("--labels some/folder", "kept", "offline", (0, 0, 0), "answers of somebody unknown, read from some/folder"),
])
def test_who_judges_is_read_from_labels_and_vlm(line, kind, vlm, flaws, banner):
    """Kind of labels, name of the VLM, flaws as floats, and the words of the banner."""
    config = parsed(line)
    assert settings.labels_kind(config) == kind and settings.vlm_name(config) == vlm
    assert settings.kept_folder(config) == (config.labels if kind == "kept" else None)
    found = settings.flaws_of(config)
    assert found == dict(zip(("mistakes", "unsure", "latency"), flaws)) and {type(n) for n in found.values()} == {float}
    assert settings.who_labels(config) == banner


# ---- the command that makes a run again ----
@pytest.mark.parametrize("changes", [
    {}, {"schedule": "paper"}, {"seed": 3, "labels": "oracle:mistakes=0.2", "max_pairs": 7, "out": "x"},
    {"goal": '--to "open" it\'s', "vlm": "offline:mistakes=0.1,latency=0.5"},
    {"horizon": 30, "hold": 2, "random_shift": 0, "vlm_image_size": 64, "sac_lr": 1e-05, "sampler": "best"},
    {"reward": "code", "labels": ".", "potential": "difference", "unverified": "skip"}, {"fast": 2, "average_over": 0.0},
    {"vlm": "openai/m", "max_usd": 2.5, "usd_per_mtok": "0.1,0.5", "vlm_extra": '{"a": "b c"}', "timeout": 60.0},
])
@pytest.mark.parametrize("task", list(envs.TASKS))
def test_the_command_that_a_run_writes_down_makes_it_again(task, changes):
    """config.json's command, given to the shell, must be the same settings; only `out` is another's."""
    if changes.get("schedule") == "paper" and task not in schedules.PAPER:
        pytest.skip("the paper has no such task")
    given = settings.Config(env=task, **changes)
    config = settings.resolve(given)
    for each in (given, config):  # as given, and with all that the schedule fills in
        command = settings.command_line(each)
        words = shlex.split(command)
        assert words[:2] == ["python", "train.py"]
        again = settings.resolve(settings.parse_args(words[2:]))
        assert again == dataclasses.replace(config, out=None)
        assert len(words) <= 2 + 2 * (len(changes) + 1), f"not the shortest: {command}"


def test_the_command_names_only_what_differs():
    """What the task's schedule or the default has anyway must not be named; facts of a task must come with --set."""
    config = settings.resolve(settings.Config())
    assert settings.command_line(config) == "python train.py"
    own = settings.resolve(settings.Config(env="DrawerOpen", max_pairs=200, horizon=50, hidden=64, hold=3))
    assert settings.command_line(own) == "python train.py --env DrawerOpen --hidden 64 --set hold=3"
    foreign = settings.Config(env="Pendulum-v1", goal="-up", total_steps=50_000)
    assert settings.command_line(settings.resolve(foreign)) == "python train.py --env Pendulum-v1 --goal=-up"


# ---- the spellings of earlier versions ----
SPELLINGS = [
    ("--members 5", "--ensemble-size 5"), ("--candidates 50", "--image-buffer 50"),
    ("--query-size 200", "--set vlm_image_size=200"), ("--reward-size 64", "--set reward_image_size=64"),
    ("--reward-shift 0", "--set random_shift=0"), ("--reward-mirror 1", "--set random_flip=1"),
    ("--horizon 50", "--set horizon=50"), ("--action-repeat 3", "--set action_repeat=3"), ("--hold 7", "--set hold=7"),
    ("--keep-best 0 --best-policy 0", ""), ("--labels-from runs/x/labels.jsonl", "--labels runs/x/labels.jsonl"),
    ("--labels oracle --labels-from x", "--labels x"), ("--labels-from oracle", "--labels ./oracle"),
    ("--reward code --programs x", "--reward code --labels x"),
    ("--vlm-mistakes 0.2", "--vlm offline:mistakes=0.2"), ("--vlm-mistakes 0 --vlm openai/x", "--vlm openai/x"),
    ("--vlm-latency 1 --vlm-unsure 0.1", "--vlm offline:unsure=0.1,latency=1"),
    ("--labels oracle --vlm-mistakes 0.2", "--labels oracle:mistakes=0.2"),
    ("--cuda-graph 1", "--fast 2"), ("--reward-bfloat16 1", "--fast 2"), ("--sac-bfloat16 1", "--fast 2"),
    ("--cuda-graph 0 --sac-bfloat16 0", ""), ("--without nothing", ""),
    ("--set members=5 --set keep_best=0", "--ensemble-size 5"),
]


@pytest.mark.parametrize("old, new", SPELLINGS)
def test_an_old_spelling_means_the_same_as_the_new_one(old, new):
    """Silently: commands in old run folders, papers and shell histories go on working."""
    assert parsed(old) == parsed(new)


def test_every_flag_of_the_first_version_is_known():
    """None may have been forgotten: those that have gone have a new spelling, the others are flags as before."""
    gone = set(settings.OLD) | {"horizon", "action_repeat", "hold"}
    assert gone == {flag[2:].replace("-", "_") for old, _ in SPELLINGS for flag in old.split() if flag.startswith("--")} - {
        "set", "labels", "vlm", "reward"}
    for name in """env goal reward labels seed schedule vlm vlm_url vlm_extra stages clip_goal clip_baseline clip_alpha
                   clip_model potential unverified rounds workers max_calls max_usd usd_per_mtok total_steps seed_steps
                   explore_steps feedback_every pairs_per_session max_pairs sampler reward_lr patience reward_batch
                   reward_epochs sac_lr batch_size updates hidden discount device eval_every eval_episodes out
                   resume""".split():
        assert name in settings.FIELDS and name not in gone | set(settings.FACTS)


@pytest.mark.parametrize("line, says", [
    ("--without relabelling", "--without relabelling .*: python -m tools.ablations relabelling"),
    ("--without novelty", "as many --seed-steps as --explore-steps"),
    ("--vlm local/m --vlm-mistakes 0.2", "--vlm-mistakes is a flaw of the offline stand-in"),
    ("--vlm-mistakes lots", "mistakes= 0 to 1"), ("--members 0", "--ensemble-size 0: it must be at least 1"),
    ("--reward score --vlm-mistakes 0.2", "shows only one"),
    ("--labels oracle --vlm-unsure 0.2", "that is a flaw of the offline stand-in")])
def test_an_old_spelling_that_cannot_be_has_one_line_too(line, says):
    """What has gone names its new form; what was wrong before is wrong now."""
    with pytest.raises(settings.UserError, match=says):
        settings.resolve(parsed(line))


# ---- config.json ----
OLD_CONFIG = dict(  # what the first version wrote, in part
    env="CartPole", goal="up", labels="vlm", seed=2, vlm="offline", labels_from=None, vlm_mistakes=0.2, vlm_unsure=0.0,
    vlm_latency=1.0, programs=None, candidates=50, without="nothing", members=5, query_size=200, reward_size=64,
    reward_shift=0, reward_bfloat16=0, reward_mirror=1, sac_bfloat16=0, cuda_graph=0, keep_best=0, horizon=40, hold=2,
    device="cpu", labeler="offline stand-in (not a VLM, wrong on purpose in 20%)", command="python train.py")


def folder_with(tmp_path, **changes):
    (tmp_path / "config.json").write_text(json.dumps({**OLD_CONFIG, **changes}))
    return str(tmp_path)


def test_the_settings_of_an_old_run_folder_are_read_by_their_new_names(tmp_path):
    """--resume must go on with the same numbers."""
    config = settings.resumed({"resume": folder_with(tmp_path)})
    assert config == settings.Config(
        goal="up", seed=2, vlm="offline:mistakes=0.2,latency=1.0", image_buffer=50, ensemble_size=5, vlm_image_size=200,
        reward_image_size=64, random_shift=0, random_flip=1, horizon=40, hold=2, device="cpu",
        resume=str(tmp_path))
    kept = settings.resumed({"resume": folder_with(tmp_path, labels_from="x", vlm_mistakes=0.0, vlm_latency=0.0)})
    assert (kept.labels, kept.vlm) == ("x", "offline")
    with pytest.raises(settings.UserError, match="config.json in .*: --without relabelling .*tools.ablations"):
        settings.resumed({"resume": folder_with(tmp_path, without="relabelling")})


@pytest.mark.parametrize("changes, says", [
    ({"members": "5"}, "--ensemble-size 5: it must be a whole number"), ({"hold": 0}, "--set hold=0"),
    ({"vlm_mistakes": [1]}, "mistakes= 0 to 1"), ({"vlm_mistakes": 7}, "mistakes= 0 to 1"), ({"labels_from": 5}, "--labels 5"),
    ({"labels": {"a": 1}}, "--labels"), ({"vlm": None}, "--vlm"), ({"sampler": "worst"}, "--sampler worst: there are"),
    ({"keep_best": 1}, "the best policy so far is not kept any more")])
def test_a_stranger_s_settings_are_checked_as_flags_are(tmp_path, changes, says):
    """Whatever type a value of config.json has, by an old name or by a new one: one line."""
    with pytest.raises(settings.UserError, match=rf"config.json in .*: .*{re.escape(says)}"):
        settings.resumed({"resume": folder_with(tmp_path, **changes)})


def test_on_resume_the_latency_may_change_and_no_other_flaw(tmp_path):
    """The stand-in may take longer; how often it is wrong is part of the run, by an old or a new spelling."""
    folder = folder_with(tmp_path)
    for flags in (["--vlm", "offline:latency=3"], ["--vlm-latency", "3"], ["--vlm", "offline:mistakes=0.20,latency=3"]):
        config = settings.parse_args(["--resume", folder, *flags])
        assert settings.flaws_of(config) == {"mistakes": 0.2, "unsure": 0.0, "latency": 3.0}
    for flags in (["--vlm", "offline:mistakes=0.3"], ["--vlm", "offline"], ["--vlm", "local/m"], ["--vlm-unsure", "0.1"]):
        with pytest.raises(settings.UserError, match="a resumed run keeps its --vlm; what may change is --max-pairs"):
            settings.parse_args(["--resume", folder, *flags])
    with pytest.raises(settings.UserError, match="keeps its --seed"):
        settings.parse_args(["--resume", folder, "--seed", "3"])
    assert settings.parse_args(["--resume", folder, "--max-pairs", "60"]).max_pairs == 60


def test_what_a_run_has_to_keep_is_compared_by_today_s_names():
    """A checkpoint of an earlier version must agree with its config.json as it is read today."""
    now = settings.Config(goal="up", seed=2, vlm="offline:mistakes=0.2,latency=9", image_buffer=50, ensemble_size=5,
                          vlm_image_size=200, reward_image_size=64, random_shift=0, random_flip=1, horizon=40, hold=2, device="cuda", out="elsewhere", workers=3)
    before, after = settings.must_stay(OLD_CONFIG), settings.must_stay(dataclasses.asdict(now))
    assert {name: after[name] for name in before} == before and len(before) >= 12
    assert not {"device", "out", "resume", "workers", "max_pairs"} & set(after)
    other = settings.must_stay(dataclasses.asdict(dataclasses.replace(now, vlm="offline:mistakes=0.3")))
    assert other["vlm"] == "offline:mistakes=0.3" != after["vlm"]
    kept = [settings.must_stay({"labels": labels})["labels"] for labels in ("a", "b/labels.jsonl", "oracle", "vlm")]
    assert kept == ["kept", "kept", "oracle", "vlm"] and settings.must_stay({}) == {}
