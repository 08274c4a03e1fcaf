"""sweep.py, plots.py and bench.py: many runs, their tables and plots, and speed."""
import csv
import dataclasses
import fcntl
import functools
import json
import os
import pathlib
import subprocess
import sys
import threading
import time

import gymnasium
import numpy as np
import pytest
from PIL import Image

import reward_model
from support import settings
from tasks import schedules
from tools import ablations, bench, plots, sweep

STUB = '''
import csv, dataclasses, json, os, time
from support import settings
RESET_UPDATES = 100
def train(config, parts=None):
    if config.seed == 7:
        raise ValueError("seven does not\\nlearn")
    if config.seed == 8:
        os._exit(9)
    os.makedirs(config.out, exist_ok=True)
    if config.seed == 9:
        open(config.out + "/pid", "w").write(str(os.getpid()))
        time.sleep(60)
    json.dump({**dataclasses.asdict(settings.resolve(config)), "resume": None, "ensemble_size": 3, "command": "python train.py",
               "labeler": "offline stand-in (not a VLM)"},
              open(config.out + "/config.json", "w"))
    with open(config.out + "/metrics.csv", "w") as file:
        file.write("step,pairs_asked,reward_accuracy,eval_return,eval_success\\n0,0,,-9,0\\n100,5,0.75,-1,0.5\\n")
    print("trained", config.seed, "resumed" if config.resume else "afresh")
    with open(config.out + "/episodes.csv", "w") as file:
        file.write("kind,t,learned_reward,progress\\nrandom,0,9,0\\n" + "".join(
            f"expert,{t},{'0123'[t]},{'0213'[t]}\\n" for t in range(4)))
    json.dump({"finished": config.max_pairs != 13 or bool(config.resume), "steps": 100, "asked": 5, "labels": 4,
               "label_accuracy": float("nan"), "eval_success": 0.5, "labeler": "offline stand-in (not a VLM)"},
              open(config.out + "/summary.json", "w"))
'''


@pytest.fixture
def stub_train(tmp_path, monkeypatch):
    """A train.py that takes no time, for this process and those it starts, in a folder of its own; no Ray."""
    (tmp_path / "stub").mkdir()
    (tmp_path / "stub" / "train.py").write_text(STUB)
    monkeypatch.syspath_prepend(str(tmp_path / "stub"))
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delitem(sys.modules, "train", raising=False)
    monkeypatch.setenv("TQDM_MININTERVAL", "1")
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def here(stub_train, monkeypatch):
    """The same with every run in this very process."""
    monkeypatch.setattr(sweep, "start", lambda jobs, parallel, address: ((j, *sweep.run_one(j)) for j in jobs))


def result(name="mine"):
    return sweep.read_csv(f"results/{name}.csv")


def test_every_run_of_every_sweep_is_one_that_train_accepts():
    """The table must name settings that exist, with values that exist, and no run twice."""
    for name in sweep.SWEEPS:
        jobs = sweep.plan(name)
        assert len({sweep.slug(job) for job in jobs}) == len(jobs) == len({job.key() for job in jobs})
        for job in jobs:
            assert job.overrides.get("ablation", "nothing") in ("nothing", *ablations.ABLATIONS)
            settings.resolve(settings.Config(**{"env": job.task, "seed": job.seed, **job.fields()}))


def test_what_config_has_no_field_for_reaches_the_run_all_the_same():
    """Wrong and unsure answers must go into the stand-in's name, no novelty must be as many random steps as exploration."""
    def fields(**overrides):
        return sweep.Job("DrawerOpen", "x", 0, overrides, ()).fields()

    assert fields(vlm_mistakes=0.0, max_pairs=9) == {"max_pairs": 9}
    assert fields(vlm_mistakes=0.2, vlm_unsure=0.4) == {"vlm": "offline:mistakes=0.2,unsure=0.4"}
    assert fields(vlm_mistakes=0.2, labels="oracle") == {"labels": "oracle:mistakes=0.2"}
    assert fields(seed_steps="explore_steps") == {"seed_steps": 2000}
    assert fields(ablation="relabelling") == {}
    with pytest.raises(ValueError, match="mistakes=0.2 is a flaw of the offline stand-in"):
        fields(vlm_mistakes=0.2, vlm="openai/MODEL")  # weak_vlm --set vlm=openai/MODEL
    assert sweep.parse_fields(["vlm_mistakes=0,0.5"]) == {"vlm_mistakes": [0.0, 0.5]}


def test_a_run_without_one_part_goes_through_the_ablations(here, monkeypatch):
    """Its row must say what was left out, and that of a whole run "nothing"."""
    left_out = []
    monkeypatch.setattr(ablations, "train_without", lambda name, config: left_out.append(name) or __import__("train").train(config))
    sweep.sweep(sweep.plan_grid(["ablation=nothing,relabelling"]), "mine")
    assert [row["ablation"] for row in result()] == ["nothing", "relabelling"] and left_out == ["relabelling"]


def test_an_ablation_leaves_out_one_part_and_names_its_own_command(monkeypatch):
    """Old rows must keep their reward, critics must stay; afterwards all must be as it was."""
    import sac
    import train
    from support import fast, run

    seen = []

    def look(config, parts):
        agent, buffer = parts.SAC(2, gymnasium.spaces.Box(-1, 1, (1,))), parts.ReplayBuffer(9, (2,), (1,), (8, 8, 3))
        for step in range(3):
            buffer.add(np.zeros(2), np.zeros(1), np.zeros(2), False, np.zeros((8, 8, 3), np.uint8), 0.0)
            buffer.relabel(lambda images: np.full(len(images), step))
        critic = agent.critic
        agent.reset_critic()
        seen.append((buffer.reward[:3].tolist(), agent.critic is critic, train.RESET_UPDATES, settings.PROGRAM[-1], type(agent)))

    monkeypatch.setattr(train, "train", look)
    before = getattr(settings, "PROGRAM", None), train.RESET_UPDATES
    config = settings.Config()
    ablations.train_without("relabelling", config)
    ablations.train_without("critic-reset", config)
    assert seen[0][:4] == ([0, 1, 2], False, 100, "relabelling")
    assert seen[1][:4] == ([2, 2, 2], True, 0, "critic-reset")
    assert (settings.PROGRAM, train.RESET_UPDATES) == before
    parts = run.choose_parts(settings.resolve(config))
    parts.SAC = functools.partial(fast.FastSAC, bfloat16=True)
    monkeypatch.setattr(run, "choose_parts", lambda config: parts)
    ablations.train_without("critic-reset", config)
    assert seen[2][1] and issubclass(seen[2][-1], fast.FastSAC) and issubclass(seen[1][-1], sac.SAC)
    with pytest.raises(ValueError, match="there are relabelling, critic-reset"):
        ablations.train_without("novelty", config)


def test_a_sweep_does_one_seed_of_everything_first():
    """Stopped half-way it must be a smaller study: all of seed 0, then all of seed 1; 5 seeds, 3 for Meta-World."""
    jobs = sweep.plan("tasks")
    assert [job.seed for job in jobs] == sorted(job.seed for job in jobs)
    seeds = {task: {job.seed for job in jobs if job.task == task} for task in sweep.SEVEN}
    assert len(seeds["CartPole"]) == 5 and len(seeds["Soccer"]) == 3
    assert {job.seed for job in sweep.plan("tasks", seeds=4) if job.task == "Soccer"} == {0, 1, 2, 3}
    kept = sweep.only(jobs, ["CartPole", "oracle"])
    assert {(job.task, job.setting) for job in kept} == {("CartPole", "oracle")} and len(kept) == 5


def test_a_grid_from_the_command_line_has_the_types_of_config():
    """`max_pairs=1e1,20 seed=0,1` must become numbers; an unknown field must be refused with the list of fields."""
    jobs = sweep.plan_grid(["env=CartPole", "max_pairs=1e1,20", "seed=0,1"])
    assert [(job.seed, job.overrides) for job in jobs] == [(s, {"max_pairs": n}) for s in (0, 1) for n in (10, 20)]
    with pytest.raises(settings.UserError, match="--max-pairs"):
        sweep.plan_grid(["no_such_field=1"])
    assert sweep.main(["--grid", "seed=0,1"]) == 2  # no --name: it must not mix with what is there


def test_a_run_that_fails_is_a_row_and_ends_no_sweep(stub_train):
    """An exception and a dead process must each become a row with its reason; the runs beside them must be whole."""
    jobs = sweep.plan_grid(["env=CartPole", "seed=7,8,0"])
    assert sweep.sweep(jobs, "mine", parallel=3) == 2
    rows = {row["seed"]: row for row in result()}
    assert rows["7"]["error"] == "ValueError: seven does not learn" and rows["7"]["eval_success"] == ""
    assert "process died" in rows["8"]["error"]
    assert (rows["0"]["error"], rows["0"]["eval_success"], rows["0"]["reward_accuracy"]) == ("", "0.5", "0.75")
    assert rows["0"]["label_accuracy"] == "" and rows["0"]["pairs_asked"] == "5" and rows["0"]["method"] == "preference"
    assert [row["step"] for row in result("mine_curves")] == ["0", "100"]
    assert "trained 0 afresh" in open("runs/sweeps/mine/CartPole-default-seed0/train.log").read()


def test_finished_runs_are_skipped_and_half_done_ones_resumed(here):
    """The second call must train only what has no result, from where it was; a third call nothing at all."""
    jobs = sweep.plan_grid(["env=CartPole", "max_pairs=10,13", "seed=0"])  # the stub leaves 13 half-done at first
    log = "runs/sweeps/mine/CartPole-max_pairs={}-seed0/train.log"
    assert sweep.sweep(jobs, "mine") == 1 and {row["error"] for row in result()} == {"", "interrupted"}
    before = open(log.format(10)).read()
    assert sweep.sweep(jobs, "mine") == 0 and {row["error"] for row in result()} == {""}
    assert open(log.format(10)).read() == before and "resumed" in open(log.format(13)).read()
    times = os.path.getmtime(log.format(13))
    assert sweep.sweep(jobs, "mine") == 0 and os.path.getmtime(log.format(13)) == times
    os.makedirs("killed")  # before it had written its settings
    assert sweep.config_of(dataclasses.replace(jobs[0], folder="killed")).resume == "killed"


def test_rows_of_earlier_calls_stay_and_a_changed_table_is_noticed(here, monkeypatch):
    """A part of a sweep must add to the CSV; a folder with other settings under the same name must be refused."""
    sweep.sweep(sweep.plan_grid(["env=CartPole", "seed=0"]), "mine")
    sweep.sweep(sweep.plan_grid(["env=Soccer", "ensemble_size=3", "seed=0"]), "mine")
    assert [(row["task"], row["ensemble_size"]) for row in result()] == [("Soccer", "3"), ("CartPole", "")]
    changed = [dataclasses.replace(job, overrides={"max_pairs": 99})
               for job in sweep.plan_grid(["env=CartPole", "seed=0"])]
    with pytest.raises(ValueError, match="max_pairs=100, not 99.*another --name"):
        sweep.sweep(changed, "mine")
    monkeypatch.setitem(schedules.OURS["CartPole"], "total_steps", 777)  # the task's own preset has changed
    with pytest.raises(ValueError, match="total_steps=2000, not 777.*another --name"):
        sweep.sweep(sweep.plan_grid(["env=CartPole", "seed=0"]), "mine")


def test_a_run_that_fails_here_does_not_replace_one_that_was_measured(here):
    """On a machine where nothing runs, the committed rows and curves must stay as they are."""
    sweep.sweep(sweep.plan_grid(["env=CartPole", "seed=0"]), "mine")
    before = result(), result("mine_curves")
    monkey = sweep.Table("results/mine.csv")
    monkey.add(sweep.plan_grid(["env=CartPole", "seed=0"])[0], "ModuleNotFoundError")
    monkey.write()
    assert (result(), result("mine_curves")) == before


def test_a_table_is_written_by_one_sweep_at_a_time(here):
    """While another process holds the table, a write must wait: both read, change and write the same file."""
    os.makedirs("results")
    with open("results/mine.csv.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        writer = threading.Thread(target=sweep.Table("results/mine.csv").write)
        writer.start()
        writer.join(0.3)
        assert writer.is_alive() and not os.path.exists("results/mine.csv")
    writer.join(60)
    assert os.path.exists("results/mine.csv")


def test_what_a_finished_run_sends_home_replaces_what_an_interrupted_one_sent(stub_train, monkeypatch):
    """Where there is no common disk, the first attempt's numbers must not stand for the second's."""
    jobs, attempts = sweep.plan_grid(["env=CartPole", "seed=0"]), []

    def far_away(jobs, parallel, address):
        attempts.append(1)
        finished, summary = len(attempts) == 2, {"steps": 100 * len(attempts), "asked": 5}
        files = {"config.json": dataclasses.asdict(settings.resolve(settings.Config())) | {"command": "python train.py"},
                 "summary.json": summary | {"finished": finished, "eval_success": 1.0}}
        files = {name: json.dumps(content).encode() for name, content in files.items()}
        yield jobs[0], "" if finished else "interrupted", {**files, "metrics.csv": b"step,reward_accuracy\n0,1\n"}

    monkeypatch.setattr(sweep, "start", far_away)
    assert sweep.sweep(jobs, "mine") == 1 and sweep.sweep(jobs, "mine") == 0
    assert [(row["steps"], row["error"]) for row in result()] == [("200", "")]


def test_settings_that_all_runs_share_are_taken_whole():
    """--set is one value, commas and all; --grid splits; dashes do as well; env and seed have flags of their own."""
    assert sweep.parse_fields(["usd-per-mtok=1,2"], split=False) == {"usd_per_mtok": ["1,2"]}
    assert sweep.parse_fields(["sac-lr=1e-3,2e-3"]) == {"sac_lr": [1e-3, 2e-3]}
    assert sweep.main(["tasks", "--set", "seed=3", "--name", "x"]) == 2
    assert sweep.main(["--grid", "env=CartPole", "--seeds", "5", "--name", "x"]) == 2


def test_a_setting_that_is_a_measure_too_has_one_column(here):
    """`labels` is a setting (oracle) and a measure (how many): the table must not have it twice."""
    sweep.sweep(sweep.plan_grid(["env=CartPole", "labels=vlm,oracle"]), "mine")
    header = open("results/mine.csv").readline().strip().split(",")
    assert header.count("labels") == 1 and len(set(header)) == len(header)


def test_a_killed_sweep_leaves_no_run_behind(stub_train):
    """When the sweep is killed, its runs must end too: its successor would write beside them."""
    command = "from tools import sweep\nif __name__ == '__main__':\n    sweep.sweep(sweep.plan_grid(['seed=9']), 'mine')"
    open("go.py", "w").write(command)
    paths = os.pathsep.join([os.path.abspath("stub"), str(sweep.HERE)])
    parent = subprocess.Popen([sys.executable, "go.py"], env={**os.environ, "PYTHONPATH": paths},
                              stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    pid_file = "runs/sweeps/mine/CartPole-default-seed9/pid"
    assert wait_until(lambda: os.path.exists(pid_file) and open(pid_file).read(), 300)
    parent.kill()
    parent.wait()
    assert wait_until(lambda: not alive(int(open(pid_file).read())), 50)


def wait_until(true, seconds):
    end = time.time() + seconds
    while not true() and time.time() < end:
        time.sleep(0.05)
    return true()


def alive(pid):
    """Whether a process runs; one that only waits for its parent to notice does not."""
    try:
        return open(f"/proc/{pid}/stat").read().split()[2] != "Z"
    except FileNotFoundError:
        return False


def test_the_same_sweep_runs_on_ray(stub_train, monkeypatch, tmp_path):
    """With Ray the rows must be those of the processes."""
    monkeypatch.delitem(sys.modules, "ray")
    pytest.importorskip("ray", reason="pip install -r tools/requirements-sweep.txt")
    monkeypatch.setattr(sweep, "HERE", tmp_path / "stub")  # Ray puts HERE first, and the stub must come before train.py
    monkeypatch.setenv("PYTHONPATH", str(pathlib.Path(sweep.__file__).parents[1]), prepend=os.pathsep)
    assert sweep.sweep(sweep.plan_grid(["env=CartPole", "seed=7,8,0"]), "mine") == 2
    assert [(row["seed"], bool(row["error"])) for row in result()] == [("7", True), ("8", True), ("0", False)]


def test_two_sweeps_never_work_on_one_run(here):
    """A run that another process holds must be left to it: not trained, and no row of it lost."""
    job, = sweep.plan_grid(["env=CartPole", "seed=0"])
    assert sweep.sweep([job], "mine") == 0
    folder = pathlib.Path("runs/sweeps/mine").resolve() / sweep.slug(job)
    with open(f"{folder}.log", "a") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        error, files = sweep.run_one(dataclasses.replace(job, folder=str(folder)))
    assert error == "another sweep is at work on this run" and not files
    assert (folder / "train.log").read_text().count("trained") == 1
    with pytest.raises(ValueError, match="--seeds 0: it must be at least 1"):
        sweep.plan("tasks", 0)


def test_what_is_drawn_is_what_was_measured(here, monkeypatch):
    """Lines and dots must stand at the IQM, bands at the interval; every title names measure, seeds and labeler."""
    drawn, measured = {}, iter((0.2, 0.4, 0.9, 0.1, 0.6, 0.8))
    monkeypatch.setattr(plots, "finish", lambda figure, axes, path: drawn.update({pathlib.Path(path).name: (figure, axes)}) or str(path))
    sweep.sweep(sweep.plan_grid(["env=CartPole", "max_pairs=10,20", "sampler=uniform,best,entropy", "seed=0,1"]), "dots")
    sweep.sweep(sweep.plan_grid(["env=CartPole", "max_pairs=10,20,40", "seed=0,1"]), "lines")
    for name in ("dots", "lines"):
        rows = result(name)
        for row in rows if name == "lines" else ():
            row["eval_success"] = str(next(measured))
        with open(f"results/{name}.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
        plots.plot(f"results/{name}.csv")
    rows = result("lines")
    figure, axes = drawn["lines.png"]
    at = {pairs: [float(row["eval_success"]) for row in rows if row["max_pairs"] == pairs] for pairs in ("10", "20", "40")}
    line, = axes[0, 0].lines
    assert line.get_xdata().tolist() == [10, 20, 40] and np.allclose(line.get_ydata(), [np.mean(v) for v in at.values()])
    band = axes[0, 0].collections[0].get_paths()[0].vertices
    assert {round(y, 3) for x, y in band if x == 10} == {round(v, 3) for v in at["10"]}
    for figure, axes in drawn.values():
        title = figure.get_suptitle()
        assert "offline stand-in (not a VLM)" in title and "of 2 seeds" in title and "success at the end" in title
    curve = drawn["lines_curves.png"][1][0, 0].lines[0]
    assert curve.get_xdata().tolist() == [0, 100] and curve.get_ydata().tolist() == [0, 0.5]
    folder = next(pathlib.Path("runs/sweeps/lines").glob("*seed0"))
    plots.draw_alignment([str(folder)], "a.png")
    aligned = {line.get_label(): line.get_ydata().tolist() for line in drawn["a.png"][1][0, 0].lines}
    assert aligned == {"true progress": [0, 2 / 3, 1 / 3, 1], "preference reward": [0, 1 / 3, 2 / 3, 1]}
    assert "offline stand-in (not a VLM)" in drawn["a.png"][0].get_suptitle()
    plots.draw_dots("x.png", [{**row, "setting": row["max_pairs"]} for row in rows], "eval_success")
    dots = {tick.get_text(): line.get_xdata()[0] for tick, line in zip(
        drawn["x.png"][1][0, 0].get_yticklabels(), [each for each in drawn["x.png"][1][0, 0].lines if each.get_marker() == "o"])}
    assert dots == pytest.approx({pairs: np.mean(v) for pairs, v in at.items()})


def test_the_interquartile_mean_and_its_interval_are_right():
    """Of 5 seeds the lowest and the highest must go, of 3 none; the interval must hold the mean and shrink with n."""
    assert plots.iqm([0, 1, 2, 3, 100]) == 2 and plots.iqm([0, 1, 5]) == 2
    assert np.allclose(plots.iqm(np.array([[0, 0], [1, 5], [2, 7], [9, 6]])), [1.5, 5.5])
    values = np.random.default_rng(0).normal(size=200)
    few, many = plots.interval(values[:5]), plots.interval(values)
    assert few[0] < plots.iqm(values[:5]) < few[1] and many[1] - many[0] < few[1] - few[0]
    assert np.allclose(plots.interval([0.5, 0.5, 0.5]), 0.5)
    # the normal approximation of a 25 % trimmed mean: standard error 1.09 / sqrt(n), two of them to each side
    assert 0.8 < (many[1] - many[0]) / (2 * 1.96 * 1.09 / 200**0.5) < 1.2


def test_a_results_file_becomes_plots_that_name_the_labeler(here):
    """A number that varies must become the axis, and questions a session, which follow it, none; titles name who spoke."""
    jobs = [dataclasses.replace(job, overrides={**job.overrides, "pairs_per_session": job.overrides["max_pairs"] // 2},
                                varied=("max_pairs", "pairs_per_session"))
            for job in sweep.plan_grid(["env=CartPole", "max_pairs=10,20,200", "seed=0,1"])]
    sweep.sweep(jobs, "mine")
    assert plots.axes_of(result()) == (["max_pairs"], ["max_pairs"])
    assert plots.labelers(result()) == "offline stand-in (not a VLM)"
    drawn = plots.plot("results/mine.csv")
    assert drawn == ["results/mine.png", "results/mine_curves.png"]
    pixels = np.asarray(Image.open(drawn[0]))
    assert pixels[0, 0, 3] == 0 and (pixels[..., 3] > 0).mean() > 0.01  # transparent paper, and something on it
    # 1 - 6 (0 + 1 + 1 + 0) / (4 * 15), of the expert's rows alone
    assert {row["spearman_expert"] for row in result()} == {"0.8"}
    folders = [str(path) for path in pathlib.Path("runs/sweeps/mine").iterdir()]
    assert Image.open(plots.draw_alignment(folders[:2], "both.png")).size[0] > 500
    with pytest.raises(ValueError, match="no table of sweep.py with a column sucess"):
        plots.plot("results/mine.csv", "sucess")
    with pytest.raises(ValueError, match="give a table"):
        plots.main([])
    wrong = [{"method": m, "labeler": f"{m} (not a VLM, wrong on purpose in {n}%)"} for m in "ab" for n in (10, 20)]
    assert plots.labelers(wrong) == "a (not a VLM) (a); b (not a VLM) (b)"


def test_a_rate_and_a_time_are_compared_in_opposite_directions():
    """Twice as many per second and half as many seconds must both be a ratio of 2, and be judged by it."""
    rate = bench.Row("rate", "steps/s", [20.0, 40.0], [10.0, 20.0], ">= 1.5")
    clock = bench.Row("time", "s", [1.0, 2.0], [2.0, 4.0], ">= 2.5")
    alone = bench.Row("alone", "s", [40.0, 20.0, 30.0], target="<= 30")
    assert rate.ratios() == [2.0, 2.0] == clock.ratios()
    assert [row.verdict() for row in (rate, clock, alone)] == ["met", "missed", "met"]


def test_both_sides_are_run_in_turn_and_go_first_in_turn():
    """A machine that slows down while it is measured must not favour either side."""
    calls = []
    row = bench.compare("q", "a/s", lambda: calls.append("ours") or 2.0, lambda: calls.append("theirs") or 1.0, 3)
    assert calls == ["ours", "theirs", "theirs", "ours", "ours", "theirs"]
    assert row.cells()[:8] == ["q", "2", "1", "a/s", "2", "2", "2", 3]


def test_the_textbook_way_computes_and_learns_the_same():
    """What ours is compared with must do the same work: equal rewards from equal weights, and a fit that learns."""
    images = np.random.default_rng(0).integers(0, 255, (40, 47, 47, 3), np.uint8)
    images[:20] //= 4  # dark ones; brighter is better
    ours, textbook = reward_model.RewardModel((47, 47, 3)), bench.Textbook(47, "cpu")
    for net, other in zip(textbook.nets, ours.nets):
        net.load_state_dict(other.state_dict())
    first, second = bench.channels_first(images[:20]), bench.channels_first(images[20:])
    before = textbook.predict(second) - textbook.predict(first)
    assert np.allclose(before, ours.predict(images[20:]) - ours.predict(images[:20]), atol=1e-5)
    textbook.fit(first, second, np.ones(20, np.int64), epochs=2)
    assert ours.batch == textbook.batch == bench.OUR_BATCH
    assert (textbook.predict(second) - textbook.predict(first)).mean() > before.mean() + 0.01


def test_measured_rows_replace_their_own_question_only(tmp_path):
    """Measuring one section again must leave the other sections' lines of the CSV as they are; older words are known."""
    old = [bench.Row("a", "s", [1.0]), bench.Row("b", "s", [2.0])]
    bench.write(tmp_path / "bench.csv", old)
    bench.write(tmp_path / "bench.csv", [bench.Row("b", "s", [3.0])])
    lines = (tmp_path / "bench.csv").read_text().splitlines()
    assert [line.split(",")[:2] for line in lines] == [["question", "ours"], ["a", "1"], ["b", "3"]]
    bench.write(tmp_path / "bench.csv", [bench.Row("pricing and relabelling, Meta-World pictures", "s", [2.0])])
    bench.write(tmp_path / "bench.csv", [bench.Row("reward prediction and relabelling, Meta-World images", "s", [4.0])])
    assert [row["ours"] for row in sweep.read_csv(tmp_path / "bench.csv")] == ["1", "3", "4"]


def test_a_peer_that_is_not_here_is_one_line(monkeypatch, capsys):
    """Without the peers the bench must go on, and say what it leaves out."""
    monkeypatch.setattr(bench, "PEERS", {"Nobody's SAC": "no_such_module"})
    assert list(bench.against_peers("Pendulum-v1", 8, {"": {}}, dict(runs=1, peer_steps=1))) == []
    assert capsys.readouterr().out == "peers: left out: no Nobody's SAC here: see tools/requirements-bench.txt\n"


def test_a_row_of_the_peers_is_in_processor_seconds_and_names_the_peer(monkeypatch):
    """Ours against itself in the place of a peer: the ratio must be about 1, and the target that of the peer."""
    monkeypatch.setattr(bench, "TheirLoop", lambda *args, peer, **settings: bench.OurLoop(*args, **settings))
    rows = list(bench.against_peers("Pendulum-v1", 128, {"": {}, bench.BY_HAND: {"bfloat16": False}},
                                    dict(runs=2, peer_steps=3)))
    assert [row.question for row in rows] == [
        f"SAC against {peer}, Pendulum-v1, 2 x 128{name}" for peer in bench.PEERS for name in ("", ", by hand")]
    assert [row.target for row in rows] == ["", "", "", ">= 1.1"] and all(len(row.ratios()) == 2 for row in rows)
    cpu, wall = bench.cpu_and_wall(lambda: time.sleep(0.2))
    assert cpu < 0.1 < wall


def test_what_was_learned_is_kept_in_pieces_and_not_learned_again(tmp_path, monkeypatch, capsys):
    """A second run must train only what is missing, and a row must wait for all three seeds."""
    monkeypatch.setattr(bench, "PEERS", {"Nobody's SAC": "no_such_module"})
    monkeypatch.setattr(bench, "LEARNING", {"Pendulum-v1": 10_000})
    monkeypatch.setattr(bench, "sac_variants", lambda *_: {"": {}})
    path = tmp_path / "learned.csv"
    for seed in (0, 2):
        bench.keep_learned(path, ("Pendulum-v1", 20, "ours", seed), -100.0 * seed)
    size = dict(learn_steps=20, learned=path, pieces="ours/0")
    assert list(bench.learning(size, "cpu")) == [] and len(path.read_text().splitlines()) == 3
    row, = bench.learning({**size, "pieces": "Pendulum"}, "cpu")
    assert row.question == "return after 20 steps, Pendulum-v1" and len(row.ours) == 3 and row.ours[2] == -200
    assert "ours seed 1:" in capsys.readouterr().out and len(bench.read_learned(path)) == 3


@pytest.mark.parametrize("flags, plain", [({}, True), ({"bfloat16": True}, False), ({"bfloat16": False}, False)])
def test_ours_is_the_fast_variant_only_where_a_row_says_so(flags, plain):
    """The plain row must be measured with sac.py and reward_model.py as they are copied out."""
    from support import fast

    agent = bench.our_sac(2, gymnasium.spaces.Box(-1, 1, (1,)), hidden=(8, 8), **flags)
    model = bench.our_reward_model((47, 47, 3), ensemble_size=1, **flags)
    assert isinstance(agent, fast.FastSAC) is isinstance(model, fast.FastRewardModel) is not plain


@pytest.mark.parametrize("name", sorted(path.stem for path in (sweep.HERE / "tools").glob("[a-z]*.py")))
def test_every_tool_answers_help_in_the_form_that_its_header_names(name):
    """python -m tools.NAME --help must work, say how the tool is called, and agree with the header."""
    done = subprocess.run([sys.executable, "-m", f"tools.{name}", "--help"], cwd=sweep.HERE, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"python -m tools.{name}" in done.stdout
    assert f"    python -m tools.{name}" in (sweep.HERE / f"tools/{name}.py").read_text().split('"""')[1]


def test_opengl_is_chosen_before_any_section_imports_mujoco(monkeypatch, capsys):
    """A section without images imports mujoco first; on a machine without a display that one must find EGL asked for."""
    seen = []
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(os, "environ", {name: value for name, value in os.environ.items()
                                        if name not in ("MUJOCO_GL", "DISPLAY")})
    monkeypatch.setitem(bench.SECTIONS, "start", lambda size, device: seen.append(os.environ.get("MUJOCO_GL")) or [])
    assert bench.main(["--quick", "--only", "start"]) == [] and seen == ["egl"]
