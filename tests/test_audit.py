"""audit_vlm.py: the questions, the verdict, the costs."""
import contextlib
import csv
import dataclasses
import json
import types
from pathlib import Path

import imageio.v3 as imageio
import numpy as np
import pytest
import torch

from tools import audit_vlm
from support import cached_labels, judges
import envs
from support import offline_vlm
from support import settings
import sac
import vlm_query


@pytest.fixture(scope="module")
def small_audit(tmp_path_factory):
    """A whole audit of the stand-in on CartPole, small: 20 pairs, four questions each."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(audit_vlm, "PER_KIND", 15)
        out = str(tmp_path_factory.mktemp("runs") / "an_audit")
        config = settings.Config(env="CartPole", horizon=30, out=out, usd_per_mtok="1,2")
        return Path(out), audit_vlm.audit(config, pairs=20)


def test_an_audit_that_exists_is_neither_written_over_nor_trained_in(small_audit):
    """Its answers were paid for: no command, nor one that a message names, may empty its labels.jsonl."""
    folder, _ = small_audit
    answers = (folder / "labels.jsonl").read_bytes()
    with pytest.raises(settings.UserError, match="choose another --out") as caught:
        audit_vlm.audit(settings.Config(env="CartPole", out=str(folder)))
    assert "--resume" not in str(caught.value)
    with pytest.raises(settings.UserError, match="no run folder of train.py"):
        settings.parse_args(["--resume", str(folder)])
    assert (folder / "labels.jsonl").read_bytes() == answers


def test_an_audit_needs_no_disk_for_a_run_and_no_price_for_what_was_not_asked(tmp_path, monkeypatch):
    """A long schedule changes only the projected cost, and where a limit left nothing to ask, nan is no cost."""
    monkeypatch.setattr(audit_vlm, "PER_KIND", 5)
    config = settings.Config(env="CartPole", horizon=30, out=str(tmp_path / "it"), total_steps=10**8, max_calls=6, workers=1,
                        usd_per_mtok="1,2")
    text = audit_vlm.audit(config, pairs=1)["text"]
    assert "cost: nothing was asked" in text and "nan" not in text


def test_an_audit_asks_each_pair_in_both_orders_and_both_ways(small_audit):
    """20 pairs must give 80 records, the stand-in's being right, and every bin of differences as many of them."""
    folder, result = small_audit
    records = vlm_query.LabelLog.read(folder / "labels.jsonl")
    assert len(records) == 80 and len({(r["pair"], r["order"], r["stages"]) for r in records}) == 80
    by_order = {order: {r["pair"]: r["true_label"] for r in records if r["order"] == order} for order in (0, 1)}
    assert all(by_order[0][pair] + by_order[1][pair] == 1 for pair in range(20))
    bins = [row for row in result["rows"] if (row["low"], row["high"]) in set(zip(audit_vlm.BINS, audit_vlm.BINS[1:]))]
    assert [row["questions"] for row in bins] == [8] * 10
    clear = audit_vlm.of(result["rows"], 2, audit_vlm.CLEAR)
    assert clear["accuracy"] > 0.95 and clear["consistent"] == 1 and clear["first_share"] == 0.5
    assert all(row["usd"] == pytest.approx((row["tokens_in"] + 2 * row["tokens_out"]) / 1e6) for row in bins)


def test_every_output_of_an_audit_names_the_labeler(small_audit):
    """Nothing that an audit leaves behind may let the stand-in pass for a VLM."""
    folder, result = small_audit
    for name in ("audit.txt", "audit.csv", "config.json"):
        assert "offline stand-in (not a VLM)" in (folder / name).read_text()
    assert "offline stand-in (not a VLM), two stages: " + result["verdict"] in result["text"]
    assert imageio.imread(folder / "audit.png").shape[0] > 300


def test_labels_of_an_audit_can_be_trained_on(small_audit):
    """cached_labels.py must read an audit's labels.jsonl and pictures, and the labels must fit the pictures."""
    folder, result = small_audit
    first, second, label, source = cached_labels.read_labels(str(folder))
    labels = sum(audit_vlm.of(result["rows"], stages, 0.0)[name] for stages in (1, 2) for name in ("right", "wrong"))
    assert len(label) == labels and "not a VLM" in source
    upright = [abs(offline_vlm.read_pole(image)) for image in np.concatenate([first, second])]
    better = np.array(upright[len(first):]) < np.array(upright[: len(first)])
    assert (better == label).mean() > 0.95


def test_pairs_are_spread_over_all_differences_and_never_look_alike():
    """Every bin must give the same number of pairs while it has some; equal progress and equal looks are left out."""
    progress = np.random.default_rng(0).uniform(0, 1, 60)
    images = (200 * progress).astype(np.uint8)[:, None, None, None] * np.ones((1, 8, 8, 3), np.uint8)
    pairs, gap = audit_vlm.draw_pairs(images, progress, 50, np.random.default_rng(1))
    again, _ = audit_vlm.draw_pairs(images, progress, 50, np.random.default_rng(1))
    assert np.array_equal(pairs, again)  # so that a second audit finds its answers in the cache
    assert np.histogram(gap, audit_vlm.BINS)[0].tolist() == [10] * 5
    near = (progress[pairs] > progress.max() - audit_vlm.NEAR * np.ptp(progress)).all(axis=1)
    assert 5 * 3 - 3 <= near.sum() <= 5 * 3 + 3  # every other one in the three bins that have such pairs
    assert len(set(map(frozenset, pairs))) == 50 and 10 < (pairs[:, 0] < pairs[:, 1]).sum() < 40
    assert not any(vlm_query.looks_identical(images[a], images[b]) for a, b in pairs)
    few, _ = audit_vlm.draw_pairs(images[:3], np.array([0.0, 0.0, 1.0]), 50, np.random.default_rng(1))
    assert len(few) == 2
    with pytest.raises(settings.UserError, match="nothing to compare"):
        audit_vlm.draw_pairs(images, np.ones(60), 50, np.random.default_rng(1))


def audit_records(answer, pairs=40, difference=0.5):
    """Records of a VLM whose answer is a function of (pair, order, true label): a label, -1, or a kind of failure."""
    records = []
    for pair, order in ((pair, order) for pair in range(pairs) for order in (0, 1)):
        true_label = (pair + order) % 2
        said = answer(pair, order, true_label)
        kind = said if isinstance(said, str) else "label" if said >= 0 else "unsure"
        records += [{"pair": pair, "order": order, "stages": stages, "true_label": true_label, "kind": kind,
                     "label": said if kind == "label" else -1 if kind == "unsure" else -2, "difference": difference,
                     "progress": [0.0, difference] if true_label else [difference, 0.0], "tokens_in": 300,
                     "tokens_out": 40, "cached": order == 0, "seconds": 2.0 * order} for stages in (1, 2)]
    return records


VLMS = {
    "good enough": lambda pair, order, true: true,
    "good enough: 90 %": lambda pair, order, true: 1 - true if pair % 10 == 0 else true,
    "not good enough": lambda pair, order, true: 1 - true,
    "not good enough: 50 % right": lambda pair, order, true: 0,  # always picks the first picture
    "undecided, ask more --pairs": lambda pair, order, true: 1 - true if pair % 4 == 0 else true,
    "not good enough: 100 %": lambda pair, order, true: true if pair < 15 else "unreadable",
    "undecided: no question": lambda pair, order, true: "limit",
}


def judged(found):
    return audit_vlm.verdict(found, audit_vlm.faults(found))


@pytest.mark.parametrize("begins", VLMS)
def test_the_verdict_follows_its_rule(begins):
    """P(right) above or below 3/4, the interval around it, and half of the questions labelled: nothing else decides."""
    rows = audit_vlm.summaries(audit_records(VLMS[begins]), None, scale=(0, 1))
    assert all(judged(audit_vlm.of(rows, stages, 0.0)).startswith(begins) for stages in (1, 2))
    unclear = audit_vlm.summaries(audit_records(VLMS[begins], difference=0.07), None, scale=(0, 1))
    assert judged(audit_vlm.of(unclear, 2, 0.0)).startswith("undecided: no question")


def test_a_habit_of_picking_the_first_picture_is_seen():
    """Who always picks the first must have first_share 1 and consistent 0; who is always wrong must be consistent."""
    first, wrong = (audit_vlm.summary([r for r in audit_records(VLMS[name]) if r["stages"] == 2])
                    for name in ("not good enough: 50 % right", "not good enough"))
    assert (first["first_share"], first["consistent"], first["accuracy"]) == (1, 0, 0.5)
    assert (wrong["first_share"], wrong["consistent"], wrong["accuracy"]) == (0.5, 1, 0)


# ---- how a judge leans ----
def some_pairs(count):
    """progress (count, 2) and side (count, 2) of pairs that are spread as the audit's are."""
    rng = np.random.default_rng(0)
    angle = np.concatenate([rng.normal(0, 4, 60), rng.uniform(-30, 30, 60)]).clip(-30, 30)
    images = rng.integers(0, 255, (120, 4, 4, 3), np.uint8)
    pairs, _ = audit_vlm.draw_pairs(images, -abs(angle), count, rng)
    return -abs(angle)[pairs], np.sign(angle)[pairs]


def ask_judge(progress, side, seed, slope, lean, doubt=0.0, spread=0.6, jitter=0.8, blur=0.0, blind=0):
    """The answers of score = slope D + lean + noise in both orders.  spread: noise that turns round with the pair."""
    rng, labels = np.random.default_rng(seed), []
    away = np.maximum(np.where(side == blind, 0, -progress / 30), blur)  # blind: that side looks as if at the goal
    own = spread * rng.normal(size=len(progress))
    for sign in (1, -1):
        score = sign * (slope * (away[:, 0] - away[:, 1]) + own) + lean + jitter * rng.normal(size=len(progress))
        labels.append(np.where(abs(score) < doubt, -1, (score > 0).astype(int)))
    return labels


def measured(pairs=200, seed=0, **judge):
    progress, side = some_pairs(pairs)
    label, swapped = ask_judge(progress, side, seed, **judge)
    return audit_vlm.measure(*progress.T, label, swapped, *side.T, scale=(-30, 0))


JUDGES = {  # published models, as support/judges.py has them; two kinds that no lean describes; and a good one
    "good": (dict(slope=8, lean=0.2, doubt=0.3), set()),
    "good, all its noise in each answer": (dict(slope=8, lean=0.2, spread=0, jitter=1), set()),
    "leans-second": (dict(slope=3, lean=1.1), {"leans"}),
    "leans-first": (dict(slope=4.5, lean=-0.9), {"leans"}),
    "weak": (dict(slope=1.3, lean=1.3), {"leans"}),
    "weak, to the first": (dict(slope=1.3, lean=-1.3), {"leans"}),
    "stuck": (dict(slope=1.3, lean=4), {"does not look"}),
    "stuck, on the first": (dict(slope=0, lean=-4), {"does not look"}),
    "inverted": (dict(slope=-2.7, lean=0.4), {"wrong way round"}),
    "a little inverted": (dict(slope=-1.3, lean=-0.4), {"wrong way round"}),
    "sampled": (dict(slope=1.3, lean=0, spread=0, jitter=1), {"not steady"}),
    "blurry": (dict(slope=25, lean=1.9, blur=0.18), {"leans", "blurry near the goal"}),
    "blurry, no lean": (dict(slope=8, lean=0, blur=0.18), {"blurry near the goal"}),
    "blind": (dict(slope=8, lean=0.2, blind=1), {"blind on one side"}),
}


@pytest.mark.parametrize("name", JUDGES)
def test_the_fault_of_a_judge_is_named_and_a_good_one_has_none(name):
    """Of ten simulated audits at least nine must name each fault, and of a good judge at least nine no fault."""
    judge, faults = JUDGES[name]
    named = [set(audit_vlm.faults(measured(seed=seed, **judge))) for seed in range(10)]
    assert sum(faults <= found if faults else not found for found in named) >= 9, named
    if faults & {"leans", "does not look", "wrong way round"} and not judge.get("blur"):
        assert sum(found == faults for found in named) >= 8, named


@pytest.mark.parametrize("name", [name for name in JUDGES if name.split(",")[0] in (
    "good", "leans-second", "leans-first", "weak", "inverted", "a little inverted")])
def test_lean_and_d_prime_of_a_judge_are_recovered(name):
    """From 200 pairs: the mean of twenty audits within .05 and .1, and single ones nearly always within .2."""
    judge, (progress, _) = JUDGES[name][0], some_pairs(200)
    true = audit_vlm.fitted_d_prime(abs(progress[:, 1] - progress[:, 0]) / 30, judge["slope"], judge["lean"],
                                    judge.get("doubt", 0))
    found = [measured(seed=seed, **judge) for seed in range(20)]
    lean = np.array([one["lean"] for one in found]) - judge["lean"]
    fitted, counted = (np.array([one[column] for one in found]) - true for column in ("d_prime_fitted", "d_prime"))
    assert abs(lean.mean()) < 0.05 and (abs(lean) < 0.2).sum() >= 18
    assert abs(fitted.mean()) < 0.1 and (abs(fitted) < 0.2).sum() >= 17
    assert abs(counted.mean()) < 0.15 and fitted.std() < counted.std()
    assert all(abs(one["bias_free"] - audit_vlm.NORMAL.cdf(one["d_prime"] / 2)) < 1e-9 for one in found)


PRESET = {"good": set(), "weak": {"leans"}, "leans-second": {"leans"}, "leans-first": {"leans"}, "stuck": {"does not look"},
          "inverted": {"wrong way round"}, "blurry": {"leans", "blurry near the goal"}, "one-sided": {"blind on one side"}}


@pytest.mark.parametrize("name", PRESET)
def test_the_judges_of_the_stand_in_are_found_out(name):
    """The presets of support/judges.py: what the audit names is what each of them was made for, and its lean within .2."""
    progress, side = some_pairs(200)
    judge, labels = judges.make({"judge": name}, goal="g"), []
    for order in (slice(None), slice(None, None, -1)):
        labels.append(np.array([judge.label(-moved[order] / 30, tuple(map(str, moved[order])), tuple(
            "left" if where < 0 else "right" for where in its[order])) for moved, its in zip(progress, side)]))
    found = audit_vlm.measure(*progress.T, *labels, *side.T, scale=(-30, 0))
    faults = set(audit_vlm.faults(found))
    assert PRESET[name] <= faults and (faults == PRESET[name] or name in ("blurry", "one-sided"))
    lean = judge.lean / np.hypot(judge.spread, judge.jitter)
    if name == "stuck":  # one answer in all of 400: the lean is so large that no number of answers tells how large
        assert found["lean"] < -2
    elif name != "blurry":  # whose small differences do not follow the model that is fitted
        assert abs(found["lean"] - lean) < 0.2
    if name not in ("blurry", "one-sided"):
        gap = abs(progress[:, 1] - progress[:, 0]) / 30
        true = audit_vlm.fitted_d_prime(gap, judge.slope, judge.lean, judge.doubt)
        assert abs(found["d_prime_fitted"] - true) < 0.2


def test_measures_by_hand():
    """Two pairs, (.1, .5) and (.9, .2): "second" each time but once; the first pair is judged the same both times."""
    found = audit_vlm.measure([0.1, 0.9], [0.5, 0.2], label=[1, 1], label_when_swapped=[0, 1], scale=(0, 1))
    assert (found["right_second"], found["right_first"], found["says_second"]) == (1, 0.5, 0.75)
    assert (found["consistent"], found["agree_right"], found["clear_right"], found["labelled"]) == (0.5, 1, 0.75, 1)
    assert np.isnan(found["near_right"]) and found["near_z"] == found["side_z"] == found["cross_z"] == 0
    unsure = audit_vlm.measure([0.9, 0.1], [0.85, 0.99], label=[-1, 1], label_when_swapped=[-2, 0], scale=(0, 1))
    assert unsure["labelled"] == 1 and unsure["consistent"] == 1 and unsure["right_second"] == 1


def test_the_worked_examples_of_the_measures():
    """d' of a published cell, a lean from a share, a comparison of twice ten pairs, and no division by zero."""
    assert audit_vlm.d_prime(48, 50, 36, 50) == pytest.approx(1.08, abs=0.01)
    slope, lean, doubt, _ = audit_vlm.fit_lean(np.zeros(100), [1] * 84 + [0] * 16)
    assert lean == pytest.approx(0.99, abs=0.01) and slope == pytest.approx(0, abs=0.01) and doubt == 0
    ten, gap = np.repeat([True, False], 10), np.full(20, 0.15)
    found = audit_vlm.compare(np.array([1, 0] * 5 + [1] * 10, float), ten, ~ten, gap)
    assert found == pytest.approx((0.5, 1, -0.5, -2.58), abs=0.01)
    assert audit_vlm.compare(np.ones(20), ten, ~ten, gap)[3] == 0
    assert audit_vlm.compare(np.ones(20), ten, np.zeros(20, bool), gap)[3] == 0
    side, number = audit_vlm.sides(np.array([[5, -2.0], [5, -1], [5, 1], [5, 2]]), np.array([-2.0, -1, -1, -2]))
    assert side.tolist() == [-1, -1, 1, 1] and number == 1
    assert audit_vlm.sides(np.array([[-2.0], [-1], [1], [2]]), np.array([1.0, 2, 3, 4])) == (None, None)


NEURAL = {("left", 1): {"blind on one side"}, ("left", 2): {"blind on one side"},
          ("left-350", 1): {"not steady", "blurry near the goal"}, ("left-350", 2): {"blind on one side"},
          ("weak-310", 1): {"leans"}, ("weak-310", 2): {"leans", "blurry near the goal"}}


@pytest.mark.parametrize("name, stages", NEURAL)
def test_the_faults_of_tiny_neural_judges_are_named(name, stages):
    """Real answers: left and left-350 never saw the pole lean right; weak-310 was trained for a short time only."""
    with open(Path(__file__).parents[1] / "results" / "neural_judges.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if (row["judge"], row["stages"]) == (name, str(stages))]
    first, second, label, swapped = (np.array([float(row[column]) for row in rows]) for column in (
        "degrees_first", "degrees_second", "label", "label_when_swapped"))
    found = audit_vlm.measure(-abs(first), -abs(second), label, swapped, np.sign(first), np.sign(second), (-30, 0))
    assert len(rows) == 500 and NEURAL[name, stages] <= set(audit_vlm.faults(found))
    assert not judged(found).startswith("good enough")


def test_time_and_price_of_a_run_are_projected_from_its_schedule():
    """Seconds must come from answers not in the cache; a run asks as its schedule says, up to max_pairs."""
    row = audit_vlm.summary(audit_records(VLMS["good enough"]), price=(1.0, 10.0))
    assert row["seconds"] == 2.0 and row["usd"] == pytest.approx(700e-6)
    config = settings.resolve(settings.Config(env="CartPole", total_steps=2000, explore_steps=400, feedback_every=400,
                                    pairs_per_session=10, max_pairs=45, workers=5))
    text = "\n".join(audit_vlm.cost_lines(row, 2, config))
    assert "45 pairs, 90 calls, 15,300 tokens" in text and f"a run: ${45 * 700e-6:.2f}" in text
    assert f"{45 * 2.0 / 5 / 3600:.2f} h" in text
    assert "50 pairs" in audit_vlm.cost_lines(row, 2, dataclasses.replace(config, max_pairs=100))[0]


def test_wilson_interval_has_the_textbook_values():
    """8 of 10: 49 to 94 %; no draws: nothing is known."""
    assert np.round(audit_vlm.wilson(0.8, 10), 2).tolist() == [0.49, 0.94]
    assert audit_vlm.wilson(float("nan"), 0) == (0.0, 1.0) and audit_vlm.wilson(1.0, 10)[1] == pytest.approx(1)


@pytest.mark.parametrize("reply, stops", [(("maybe", "complete"), False), (("", "unreachable: HTTP 503"), True)])
def test_unreadable_answers_are_a_finding_and_an_outage_is_not(reply, stops):
    """A VLM that babbles must be audited to the end; where there is no answer at all the audit must stop."""
    vlm = types.SimpleNamespace(ask=lambda parts: vlm_query.Reply(*reply, 9, 1, False))
    images, kept = np.stack([np.full((8, 8, 3), level, np.uint8) for level in (0, 60, 120, 180, 240)]), []
    config = settings.Config(goal="g", workers=2)
    with pytest.raises(vlm_query.VLMError) if stops else contextlib.nullcontext():
        audit_vlm.ask_batch(vlm, images[:4], images[1:], config, 1, kept.append)
    assert {record["kind"] for record in kept} == {"no answer" if stops else "unreadable"} and len(kept) == 4


def test_an_outage_is_one_though_a_limit_came_first():
    """Three of four answers missing must stop the audit, however many pairs were left unasked."""
    vlm, tries = vlm_query.VLM("local/m", url="http://127.0.0.1:1/v1", max_calls=2), []

    def send(*_):
        tries.append(1)
        if len(tries) % 4:
            raise TimeoutError("HTTP 503")
        return '{"choices": [{"message": {"content": "0"}, "finish_reason": "stop"}]}'

    vlm._send = send
    images = np.stack([np.full((8, 8, 3), 20 * level, np.uint8) for level in range(13)])
    kept, config = [], settings.Config(goal="g", workers=1)
    vlm.room = lambda stages: 4 if not tries else 0
    with pytest.raises(vlm_query.VLMError, match="3 of 4 questions"):
        audit_vlm.ask_batch(vlm, images[:12], images[1:], config, 1, kept.append)
    assert [record["kind"] for record in kept].count("limit") == 8


def test_half_trained_pictures_can_come_from_a_run(tmp_path):
    """--policy must use the stored network, refuse a run of another task, and refuse what is no run."""
    env = envs.make("CartPole")
    agent = sac.SAC(4, env.action_space, (8, 8), seed=3)
    (tmp_path / "checkpoint").mkdir()
    torch.save({"pi": agent.state_dict()}, tmp_path / "checkpoint" / "state.pt")
    (tmp_path / "config.json").write_text(json.dumps({"env": "CartPole", "hidden": 8, "device": "cpu"}))
    config = settings.Config(env="CartPole", seed=1)
    learned = audit_vlm.policies(config, env, str(tmp_path), np.random.default_rng(0))["half-trained"](0)
    obs = env.reset(seed=0)[0]
    assert np.allclose(learned(obs, explore=False), agent.act(obs, explore=False))
    for folder, other in ((tmp_path, "DrawerOpen"), (tmp_path / "nowhere", "CartPole")):
        with pytest.raises(settings.UserError, match="--policy .*no run of train.py that can be used"):
            audit_vlm.trained_policy(str(folder), dataclasses.replace(config, env=other), env)


@pytest.mark.parametrize("flags, says", [
    (["--pears", "3"], "--pairs"), (["--pairs", "0"], "at least one pair"), (["--pairs", "x"], "invalid int"),
    (["--labels", "oracle"], "asks a VLM"), (["--labels-from", "x"], "asks a VLM"),
    (["--env", "Nowhere"], "unknown environment Nowhere"),
    (["--vlm", "local/x"], "URL"), (["--policy", "nowhere"], "no run of train.py"),
    (["--max-usd", "1"], "--usd-per-mtok"), (["--out", "."], "exists already"),
])
def test_mistakes_on_the_audit_command_line_end_in_one_line(tmp_path, monkeypatch, capsys, flags, says):
    """Exit code 2, one line that says what to do, and no folder left behind."""
    monkeypatch.chdir(tmp_path)
    assert audit_vlm.main(flags) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert says in said[-1] and said[-1].startswith("audit_vlm.py: ")
    assert not list(tmp_path.glob("runs/audit*"))


def test_only_a_vlm_that_is_paid_for_has_a_price():
    """The price of a million tokens is asked for where there is one, not of a server of one's own."""
    row = audit_vlm.summary(audit_records(VLMS["good enough"]))
    for vlm, says in (("openai/m", "unknown: give --usd-per-mtok"), ("local/m", "none"), ("offline:mistakes=0.1", "none")):
        config = settings.resolve(settings.Config(env="CartPole"))
        assert f"price of a pair: {says}" in audit_vlm.cost_lines(row, 2, dataclasses.replace(config, vlm=vlm))[-1]
