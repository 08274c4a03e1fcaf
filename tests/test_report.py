"""report.py: one page that loads nothing, says what the files say, and escapes what a VLM said."""
import base64
import csv
import json
import re
import subprocess
import sys
from pathlib import Path

import imageio.v3 as imageio
import numpy as np
import pytest

from support import report

HOSTILE_TEXT = "<script>alert(1)</script><img src=x onerror=alert(2)> \ud800 $\\frac{"


def drawn(page):
    """The charts of a page: (title as the page names it, SVG text) of each."""
    found = re.findall(r'<img src="data:image/svg\+xml;base64,([^"]*)" alt="([^"]*)"', page)
    return [(alt, base64.b64decode(data).decode()) for data, alt in found]


def write_rows(path, head, rows):
    with open(path, "w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([head.split(","), *rows])


def make_run(folder, labeler="offline stand-in (not a VLM)", pairs=40, size=32, said="It leans."):
    """A synthetic run folder with every file that train.py writes."""
    rng, folder = np.random.default_rng(0), Path(folder)
    (folder / "pairs").mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({
        "env": "CartPole", "goal": "keep the pole upright", "reward": "preference", "seed": 0,
        "labeler": labeler, "command": "python train.py --env CartPole", "total_steps": 4000}))
    write_rows(folder / "metrics.csv", "step,pairs_asked,labels,eval_return,eval_success,"
               "eval_success_any,eval_success_frames,label_accuracy,train_accuracy,"
               "heldout_accuracy,reward_accuracy", [
                   [n, min(n // 40, 60), min(n // 50, 48), -2500 * 2.0 ** (-n / 500) - 50,
                    min(1, n / 2000), min(1, n / 1500), min(1, n / 2500),
                    *([0.8, 0.97, 0.75, 1 - 0.3 * 2.0 ** (-n / 500)] if n else [""] * 4)]
                   for n in range(0, 4001, 250)])
    write_rows(folder / "timing.csv", "step,seconds", [[0, 1.5], [4000, 41.0]])
    write_rows(folder / "episodes.csv", "kind,episode,t,learned_reward,progress,true_reward", [
        [kind, episode, t, np.tanh(1 - slope * t / 40) + 0.05 * rng.normal(), *[-slope * t] * 2]
        for kind, slope in (("after", 0.1), ("expert", 0.2), ("random", 1.5))
        for episode in range(2) for t in range(60)])
    with open(folder / "labels.jsonl", "w") as file:
        for k in range(pairs):
            progress = rng.uniform(-90, 0, 2)
            kind = "label" if k % 5 else ("unsure", "unreadable", "no answer")[k % 3]
            truth = int(progress[1] > progress[0])
            answer = truth if rng.random() < 0.8 else 1 - truth
            label = {"label": answer, "unsure": -1}.get(kind, -2)
            file.write(json.dumps({
                "index": k, "step": 500, "label": label, "kind": kind, "true_label": truth,
                "progress": list(progress), "answers": [said * (1 + 30 * (k % 2)), str(label)],
                "ends": ["complete", "complete"], "tokens_in": 900, "tokens_out": 40,
                "cached": False, "seconds": 0.4}) + "\n")
            sides = np.full((2, size, size, 3), 235, np.uint8)
            for side, value in zip(sides, progress):  # a line that leans by -value degrees
                up = np.arange(size * 3 // 4)
                across = size // 2 + up * np.sin(np.radians(value)) * 0.6
                side[size - 1 - up, across.astype(int)] = 40
            imageio.imwrite(folder / f"pairs/{k:06d}.png", np.concatenate(sides, axis=1))
    for name in ("before", "after"):
        film = rng.integers(0, 255, (6, size, size, 3), dtype=np.uint8)
        imageio.imwrite(folder / f"eval_{name}.gif", film, duration=50, loop=0)
    (folder / "summary.json").write_text(json.dumps({
        "text": "It keeps it upright.", "spearman": 0.97, "seconds": 42.0, "tokens_in": 54000}))
    return folder


@pytest.fixture(scope="module")
def full_report(tmp_path_factory):
    """(folder, page) of a complete run, reported once."""
    folder = make_run(tmp_path_factory.mktemp("report") / "run", said="It leans. " + HOSTILE_TEXT)
    return folder, report.write_report(folder).read_text(encoding="utf-8")


def test_report_is_one_file_that_loads_nothing(full_report):
    """Every image must be inside the page, and nothing may point outside it."""
    page = full_report[1]
    sources = re.findall(r"<img[^>]* src=\"([^\"]*)", page)
    assert len(sources) == 24 and len(drawn(page)) == 8
    assert all(re.match(r"data:image/(png|gif|svg\+xml);base64,", s) for s in sources)
    assert "http:" not in page and "https:" not in page and "@import" not in page
    policy, = re.findall(r'Content-Security-Policy"\s+content="([^"]*)', page)
    assert policy.startswith("default-src 'none'") and "script-src" not in policy
    assert len(page) < 5_000_000 and 'class="missing"' not in page


def test_the_charts_of_a_report_draw_the_files_of_the_run(full_report, monkeypatch):
    """Every line, bar and dot must stand where metrics.csv, labels.jsonl and episodes.csv say."""
    from matplotlib.figure import Figure

    def keep(run, title, draw, *table):
        kept[title] = Figure().add_axes((0, 0, 1, 1))
        draw(kept[title])
        return ""

    kept, its = {}, report.read_run(full_report[0])
    monkeypatch.setattr(report, "chart", keep)
    report.curves(its, "curves", {"eval_return": ("k", "return"), "label_accuracy": ("r", "labels")})
    report.outcome_chart(its)
    report.episode_charts(its)
    metrics = {name: report.column(its.metrics, name) for name in ("step", "eval_return", "label_accuracy")}
    for drawn_line, name, skip in zip(kept["curves"].lines, ("eval_return", "label_accuracy"), (0, 1)):
        assert np.array_equal(drawn_line.get_xdata(), metrics["step"][skip:])  # no label before the first step
        assert np.array_equal(drawn_line.get_ydata(), metrics[name][skip:])
    bars, = (axes for title, axes in kept.items() if title.startswith("What became"))
    names = [bar.get_label() for bar in bars.containers]
    heights = np.array([[patch.get_height() for patch in bar] for bar in bars.containers])  # (outcomes, bins)
    asked = np.array([int(text.get_text()) for text in bars.texts])
    assert np.allclose(heights.sum(0), 1) and asked.sum() == len(its.labels) == 40
    for name, share in zip(names, heights):
        assert round((share * asked).sum()) == sum(report.outcome(row) == name for row in its.labels) > 0
    table = {name: report.column(its.episodes, name) for name in ("learned_reward", "progress", "true_reward")}
    kind, episode = np.array(its.episodes["kind"]), report.column(its.episodes, "episode")
    for title, name in (("scripted expert", "expert"), ("random actions", "random"), ("after learning", "after")):
        for drawn_line, column in zip(kept[f"Reward along an episode, {title}"].lines, ("learned_reward", "progress")):
            values = table[column]
            expected = (values[(kind == name) & (episode == 0)] - values.min()) / np.ptp(values)
            assert np.allclose(drawn_line.get_ydata(), expected) and drawn_line.get_xdata().tolist() == list(range(60))
    dots, = (axes.lines[0] for title, axes in kept.items() if title.startswith("Learned against true"))
    assert np.array_equal(dots.get_xdata(), table["true_reward"][kind == "random"])
    assert np.array_equal(dots.get_ydata(), table["learned_reward"][kind == "random"])


def test_without_matplotlib_every_chart_is_a_table_of_the_same_numbers(full_report, monkeypatch, tmp_path):
    """No chart may be lost without a word: its numbers as a table, and how to get charts."""
    folder, page = full_report
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert report.matplotlib_or_none() is None
    run = report.read_run(folder)
    bare = report.write_report(make_run(tmp_path / "run")).read_text(encoding="utf-8")
    assert bare.count("pip install matplotlib, then python -m support.report") == 1
    assert drawn(bare) == [] and bare.count('class="missing"') == 1 and "data:image/png" in bare and "data:image/gif" in bare
    assert len(drawn(page)) == 8 and all(f"<figure><b>{title}</b>" in bare for title, _ in drawn(page))
    table = bare.split("<b>Return of the evaluation episodes</b>")[1].split("</table>")[0]
    rows = [re.findall("<t[hd]>(.*?)</t[hd]>", row) for row in re.findall("<tr>(.*?)</tr>", table)]
    assert rows[0] == ["environment steps", "true return"] and len(rows) == 18
    assert rows[-1] == [report.show(run.metrics[name][-1]) for name in ("step", "eval_return")]
    table = bare.split("<b>What became of the pairs")[1].split("</table>")[0]
    assert sum(int(row.split("<td>")[2].split("<")[0]) for row in table.split("<tr>")[2:]) == 40  # every pair once


def test_rank_correlation_is_that_of_scipy():
    """With and without ties, in any order and unit; nan where there is no order at all."""
    stats, rng = pytest.importorskip("scipy.stats"), np.random.default_rng(0)
    for n in (2, 3, 10, 300):
        for values in (rng.normal(size=(2, n)), rng.integers(0, 4, (2, n)), rng.integers(0, 2, (2, n)) * 1e-9 - 5):
            expected = stats.spearmanr(*values).statistic if (values != values[:, :1]).any(1).all() else np.nan
            assert report.rank_correlation(*values) == pytest.approx(expected, abs=1e-12, nan_ok=True)
    assert report.rank_correlation([1, 2, 3], [10, 10, 30]) == pytest.approx(0.8660254)
    assert all(np.isnan(report.rank_correlation(*each)) for each in (
        ([], []), ([1], [1]), ([1, 1], [1, 2]), ([1, np.nan, 3], [1, 2, 3])))
    with pytest.raises(ValueError, match="as many numbers"):
        report.rank_correlation([1, 2], [1, 2, 3])


def test_a_table_that_cannot_be_read_costs_its_section_not_the_report(tmp_path):
    """A cell larger than Python's csv takes must count as no table."""
    (tmp_path / "a.csv").write_text("x\n" + "9" * 200_000 + "\n")
    assert report.read_table(tmp_path / "a.csv") == {}


def test_report_escapes_what_the_vlm_said(full_report):
    """Hostile answers must be shown as text, in full, and never become markup."""
    page = full_report[1]
    assert "<script" not in page and "<img src=x" not in page
    said = "It leans. &lt;script&gt;alert(1)&lt;/script&gt;&lt;img src=x onerror=alert(2)&gt; ?"
    assert f'<div class="said">{said}' in page


def test_report_names_the_labeler_once_and_in_every_chart_that_can_be_taken_out(full_report):
    """No stand-in may pass for a VLM: its name is in the first lines of the page, and inside the image of each chart."""
    page, name = full_report[1], "labeler: offline stand-in (not a VLM)"
    body = page.split("<body>")[1]
    assert body.count(name) == 1 and body.index(name) < body.index("<h2>") and f"{name}</title>" in page
    assert len(drawn(page)) == 8 and all(name in svg for _, svg in drawn(page))


@pytest.mark.parametrize("summary, says, says_not", [
    ({"finished": True, "held": True, "eval_success": 0.98, "reward_accuracy": 0.95},
     ["reached and held: at the end of 98 %", "orders 95 % of the pairs of images as true progress does: well"], ["Interrupted"]),
    ({"finished": True, "held": False, "eval_success": 0.4, "reward_accuracy": 0.47, "doubts": ["it <b>cannot</b> be seen"]},
     ["not held: it is reached at the end of 40 %", "orders 47 %", "like a coin", 'doubt">It &lt;b&gt;cannot&lt;/b&gt; be seen.'], []),
    ({"finished": False, "steps": 4321, "asked": 75, "eval_success": 1, "label_accuracy": 0.6},
     ["Interrupted after 4,321 of 9,000 steps", "<b>4,321</b>", "<b>75</b>", "<b>60 %</b>", "success, evaluated at step 4,000"],
     ["<b>4,000</b>", "<b>60</b>", "evaluated at the end"]),
    ({}, ["This run has not ended"], ["Interrupted", "load_policy"]),
    ({"doubts": {"a": 1}, "held": "no", "eval_success": "x", "finished": "maybe"}, ["not held"], ["class=\"doubt\""]),
])
def test_the_verdict_comes_first_and_tiles_agree_with_it(tmp_path, summary, says, says_not):
    """In words, from summary.json, also where the run went on after its last evaluation."""
    make_run(tmp_path / "run", pairs=5)
    (tmp_path / "run" / "config.json").write_text('{"total_steps": 9000}')
    (tmp_path / "run" / "summary.json").write_text(json.dumps(summary))
    if not summary:
        (tmp_path / "run" / "summary.json").unlink()
    page = report.write_report(tmp_path / "run").read_text(encoding="utf-8")
    assert all(text in page for text in says) and not any(text in page for text in says_not)
    assert page.index('class="verdict"') < page.index('class="grid tiles"')


def test_without_success_the_verdict_is_of_the_return(tmp_path):
    """Of an environment that tells no success, the first and the last return."""
    (tmp_path / "metrics.csv").write_text("step,eval_return\n0,-900\n500,-120\n")
    minus = "\N{MINUS SIGN}"
    assert f"went from {minus}900 before learning to {minus}120." in report.write_report(tmp_path).read_text(encoding="utf-8")


def test_the_films_are_compared_where_they_differ_most(tmp_path):
    """Also of films that are not as long as each other; nothing where they are the same, or of other sizes."""
    (tmp_path / "config.json").write_text("{}")
    films = {"before": np.zeros((9, 16, 16, 3), np.uint8), "after": np.zeros((5, 16, 16, 3), np.uint8)}
    films["before"][[2, 6], :8], films["after"][2, :8] = 255, 255
    films["before"][:, 0, :9], films["after"][:, 0, :5] = np.arange(9)[:, None, None], np.arange(5)[:, None, None]
    for name, film in films.items():
        imageio.imwrite(tmp_path / f"eval_{name}.gif", film, duration=50, loop=0)
    run = report.read_run(tmp_path)
    shown = report.most_different(run)
    assert shown.count("image 7 of 9: where the two differ most") == 2 and shown.count("data:image/png") == 2
    imageio.imwrite(tmp_path / "eval_after.gif", films["before"], duration=50, loop=0)
    assert report.most_different(run) == ""
    imageio.imwrite(tmp_path / "eval_after.gif", films["after"][:, :8], duration=50, loop=0)
    assert report.most_different(run) == ""


def test_the_page_says_how_to_use_the_policy_and_leaves_out_what_is_not_known(full_report):
    """Three lines with the run's own folder; of what it cost only what somebody counted; colours for the dark."""
    folder, page = full_report
    assert f"policy, env = load_policy({str(folder)!r})".replace("'", "&#x27;") in page
    assert f"python train.py --watch {folder}" in page
    cost = page.split("<h2>What it cost</h2>")[1].split("</table>")[0]
    assert "<td>54,000</td>" in cost and "usd" not in cost and "not known" not in cost
    assert "@media (prefers-color-scheme: dark)" in page and page.count('class="chart"') == 8


@pytest.mark.parametrize("kinds", [("random", "after"), ("random", "after", "expert")])
def test_report_draws_a_random_episode_beside_the_trained_one(tmp_path, kinds):
    """One episode of each kind that was recorded, in this order."""
    write_rows(tmp_path / "episodes.csv", "kind,episode,t,learned_reward,progress,true_reward", [
        [kind, number, t, t / 10, -t, -t] for number, kind in enumerate(kinds) for t in range(10)])
    page = report.write_report(tmp_path).read_text(encoding="utf-8")
    words = {"random": "random actions", "after": "after learning", "expert": "scripted expert"}
    shown = [words[kind] for kind in kinds]
    titles = [alt.split(";")[0].split(", ")[1] for alt, _ in drawn(page) if "along" in alt]
    assert titles == shown


def test_report_bins_outcomes_by_difference_in_progress():
    """Each pair that was sent must be counted once, by its difference, the largest too."""
    def pair(kind, label, truth, first, second):
        return {"kind": kind, "label": label, "true_label": truth, "progress": [first, second]}
    edges, counts = report.bin_outcomes([
        pair("label", 1, 1, 0, 0.1), pair("label", 0, 1, -0.9, 0), pair("label", 0, 0, 1, 0),
        pair("label", 1, -1, 0.3, 0.3), pair("unsure", -1, 1, 0, 0.8),
        pair("unreadable", -2, 1, 0, 0.2), pair("no answer", -2, 0, 0.6, 0),
        pair("identical", -2, -1, 0, 0), pair("limit", -2, 0, 1, 0),
        {"kind": "label", "label": 1, "true_label": None, "progress": None}], bins=2)
    assert edges.tolist() == [0, 0.5, 1]
    assert {name: n.tolist() for name, n in counts.items() if n.any()} == {
        "right": [1, 1], "wrong": [0, 1], "tie": [1, 0], "unsure": [0, 1], "unreadable": [1, 0],
        "no answer": [0, 1]}
    assert report.bin_outcomes([]) == (None, {})


def test_report_gallery_shows_every_outcome(tmp_path):
    """Pairs must be picked from each outcome in turn, the plainest mistake among them."""
    rows = report.read_run(make_run(tmp_path / "run", pairs=90, size=8)).labels
    chosen = report.choose_pairs(rows, 12)
    assert len({row["index"] for row in chosen}) == 12
    assert [report.outcome(row) for row in chosen] == [
        *["right"] * 3, *["wrong"] * 3, *["unsure"] * 2, *["unreadable"] * 2, *["no answer"] * 2]
    wrong = [row for row in rows if report.outcome(row) == "wrong"]
    assert max(wrong, key=report.difference) in chosen


def test_report_survives_missing_files(tmp_path):
    """With nothing but a config the report must still be written and say what is missing."""
    config = {"goal": HOSTILE_TEXT, "labeler": HOSTILE_TEXT, "seed": 0}
    (tmp_path / "config.json").write_text(json.dumps(config))
    page = report.write_report(tmp_path).read_text(encoding="utf-8")
    assert "This run has not ended" in page and "no learning curves" in page and "seed: 0" in page
    assert "<script" not in page and page.count('class="missing"') >= 6


def test_report_drops_torn_last_lines(tmp_path):
    """Half a line, as a killed run leaves it, must be left out, for half a number is a number."""
    (tmp_path / "metrics.csv").write_text("step,eval_return\r\n0,-900\r\n500,-120\r\n1000,-3")
    (tmp_path / "labels.jsonl").write_text('{"kind": "unsure", "label": -1}\n[1]\n{"kind": "la')
    (tmp_path / "config.json").write_text('{"goal": "keep')
    (tmp_path / "eval_after.gif").write_bytes(b"")
    run = report.read_run(tmp_path)
    assert run.metrics == {"step": ["0", "500"], "eval_return": ["-900", "-120"]}
    assert run.labels == [{"kind": "unsure", "label": -1}]
    page = report.write_report(tmp_path).read_text(encoding="utf-8")
    assert "<b>\N{MINUS SIGN}120</b>" in page and "No eval_after.gif." in page
    assert "Goal not recorded" in page and "labeler: not recorded" in page


def test_report_draws_a_labeler_with_dollars_and_markup(tmp_path):
    """A VLM's name is hostile too: in a chart it must be text, neither a formula nor markup."""
    (tmp_path / "config.json").write_text(json.dumps({"labeler": "local/$x$<script>"}))
    (tmp_path / "metrics.csv").write_text("step,eval_return\n0,-900\n500,-120\n")
    page = report.write_report(tmp_path).read_text(encoding="utf-8")
    assert all(">labeler: local/$x$&lt;script&gt;</text>" in svg for _, svg in drawn(page))
    assert drawn(page) and "<script" not in page


def test_report_shows_programs_with_their_verification_as_text(tmp_path):
    """A VLM-CaR run must show programs, reasons and failing images, and no word of it as markup."""
    folder = tmp_path / "code_as_reward"
    for name in ("programs", "failed"):
        (folder / name).mkdir(parents=True)
    (tmp_path / "config.json").write_text('{"reward": "code"}')
    hostile = "<script>alert(1)</script><img src=x onerror=alert(2)>"
    for name in ("programs/1_reach", "failed/1_reach_round1"):
        (folder / f"{name}.py").write_text(f"# sub-task: {hostile}\nreturn 1 < 2\n")
    (folder / "verification.json").write_text(json.dumps([
        {"subtask": hostile, "hit_rate": 0.95, "reasons": ["fires <early>", f"error: {hostile}"]}]))
    imageio.imwrite(folder / "failed" / "1_reach_0.png", np.zeros((8, 8, 3), np.uint8))
    page = report.write_report(tmp_path).read_text(encoding="utf-8")
    assert page.count("return 1 &lt; 2") == 2 and "<th>hit rate</th>" in page
    assert "<td>0.95</td>" in page and "fires &lt;early&gt;; error: " in page
    assert "<script" not in page and "<img src=x" not in page and page.count("&lt;script&gt;") == 4
    assert page.count("data:image/png") == 1 and "labels are" not in page


@pytest.mark.parametrize("folder", ["nowhere", "empty"])
def test_report_of_no_run_folder_is_one_clear_line(tmp_path, folder):
    """A wrong folder must end with one line and exit code 2, and nothing may be written."""
    (tmp_path / "empty").mkdir()
    command = [sys.executable, report.__file__, str(tmp_path / folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1
    assert "run folder" in done.stderr and not list(tmp_path.rglob("report.html"))
