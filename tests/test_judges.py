"""Judges that err as VLMs do: the formulas, what is published, one story in both stages, the command line."""
import dataclasses
import hashlib
import json
from statistics import NormalDist

import numpy as np
import pytest

import vlm_query
from reward_model import ImageBuffer
from support import judges, labeler, offline_vlm, settings
from support.offline_vlm import READERS, OfflineVLM
from test_offline_vlm import POLE, draw_pole
from tools import plots, sweep

NAMES = (*judges.PRESETS, *judges.PUBLISHED)


def parsed(line):
    return settings.parse_args(line.split())


def rates(judge, pairs=800, difference=judges.MEDIAN):
    """Shares that say "second" where it is better and where it is not, of pairs with this |D|; each image is new."""
    away = 0.5 - difference / 2, 0.5 + difference / 2
    return [np.mean([judge.label(two, (f"{two}{i}", f"{two}other{i}")) == 1 for i in range(pairs)])
            for two in (away[::-1], away)]


def signal(second, not_second, pairs=800):
    """-> d', lean: the other way of computing them, from shares."""
    z = [NormalDist().inv_cdf((share * pairs + 0.5) / (pairs + 1)) for share in (second, not_second)]
    return z[0] - z[1], (z[0] + z[1]) / 2


# ---- the formulas ----
def test_sensitivity_is_twice_the_slope_times_the_difference_over_the_noise():
    """d' = 2 slope |D| / sqrt(spread^2 + jitter^2), and the lean over that root."""
    for slope, lean, spread, jitter in ((3, 0.5, 0.6, 0.8), (8, -0.4, 1.5, 2.0), (-2, 0.3, 0, 1)):
        noise = np.hypot(spread, jitter)
        found = signal(*rates(judges.Judge(slope, lean, spread, jitter), pairs=3000), pairs=3000)
        assert found == pytest.approx((2 * slope * 0.2 / noise, lean / noise), abs=0.12)


def test_confusion_by_a_pair_survives_turning_it_round_and_confusion_by_an_order_does_not():
    """With spread alone the two orders must agree about the image, with jitter alone they must know nothing of each other."""
    def orders(**noise):
        judge = judges.Judge(slope=0, **noise)
        return np.array([[judge.score(0, two) for two in ((f"a{i}", f"b{i}"), (f"b{i}", f"a{i}"))] for i in range(2000)])

    spread, jitter, both = orders(spread=2, jitter=0), orders(spread=0, jitter=2), orders()
    assert np.allclose(spread[:, 0], -spread[:, 1]) and spread.std() == pytest.approx(2, abs=0.1)
    assert abs(np.corrcoef(jitter.T)[0, 1]) < 0.06 and jitter.std() == pytest.approx(2, abs=0.1)
    assert np.corrcoef(both.T)[0, 1] == pytest.approx(-0.36, abs=0.06) and both.std() == pytest.approx(1, abs=0.05)
    for scores in (spread, jitter, both):
        assert abs(scores[:, 0].mean()) < 0.15
    assert judges.Judge(0, spread=9, jitter=0).score(0, ("a", "a")) == 0  # one image twice is no pair


def test_noise_depends_on_seed_goal_and_images_and_on_nothing_else():
    """Asked again, a judge must say the same; another seed or goal is another judge."""
    answers = {(seed, goal): [judges.make({"slope": 0.0}, goal, seed).label((0, 0), (f"a{i}", f"b{i}")) for i in range(99)]
               for seed in (0, 1) for goal in ("x", "y") for _ in range(2)}
    assert len({tuple(each) for each in answers.values()}) == 4


def test_doubt_is_unsure_and_what_is_not_seen_is_no_difference():
    """|score| < doubt must be -1; with nothing seen in an image only lean and noise are left."""
    still = judges.Judge(slope=2, lean=0.5, spread=0, jitter=0, doubt=1)
    assert [still.label((away, 0.5), ("a", "b")) for away in (1.0, 0.9, 0.7, 0.2, -0.3)] == [1, 1, -1, -1, 0]
    assert still.difference((float("nan"), 0.2), ("a", "b")) == 0 and still.difference((5, 0), ("a", "b")) == 1


def test_a_blurry_judge_tells_nothing_apart_near_the_goal_and_everything_elsewhere():
    judge = judges.Judge(blur=0.2)
    assert [judge.difference(away, ("a", "b")) for away in ((0.1, 0.2), (0, 0.15), (0.5, 0.25))] == [0, 0, 0.25]
    assert judge.difference((0.3, 0.1), ("a", "b")) == pytest.approx(0.1)


def test_a_judge_that_is_blind_on_one_side_knows_nothing_of_the_angle_there():
    """On that side an image is upright or fallen to it, by the image and not by its angle; on the other it sees."""
    judge = judges.Judge(blind="right")
    sides, images = ("right", "right"), [(f"a{i}", f"b{i}") for i in range(400)]
    assert all(judge.difference((0.9, 0.1), two, sides) == judge.difference((0.1, 0.9), two, sides) for two in images)
    assert judge.difference((0.9, 0.1), ("a", "b"), ("left", "left")) == 0.8
    assert np.mean([judge.guess(image) == 0 for image, _ in images]) == pytest.approx(0.75, abs=0.07)


# ---- what is published ----
@pytest.mark.parametrize("goal", [judges.DRAWER, judges.SOCCER, judges.SWEEP])
@pytest.mark.parametrize("model", judges.PUBLISHED)
def test_a_published_judge_answers_as_often_right_as_is_published(model, goal):
    """Of 800 pairs of either label with |D| = .2, within three standard errors of the published 50 and of ours."""
    assert goal in READERS
    judge = judges.make({"judge": model}, goal)
    second, first = judges.PUBLISHED[model][goal]
    # (k + .5) / (n + 1) keeps a share of 0 or 1 off the edge, by .01 at most
    assert rates(judge) == pytest.approx([second, 1 - first], abs=0.01 + 3 * np.sqrt(0.25 / 800))


@pytest.mark.parametrize("name", ["good", "weak", "leans-second", "leans-first", "inverted"])
def test_the_lean_and_sensitivity_of_a_preset_can_be_measured(name):
    """d' and lean of 1,600 answers, within .2; without the doubt of good, since unsure is neither answer."""
    judge = dataclasses.replace(judges.make({"judge": name}), doubt=0.0)
    second, wrongly = rates(judge)
    assert signal(second, wrongly) == pytest.approx((0.4 * judge.slope, judge.lean), abs=0.2)
    slope, lean = judges.from_rates(second, 1 - wrongly, pairs=800)
    assert (0.4 * slope, lean) == pytest.approx((0.4 * judge.slope, judge.lean), abs=0.2)


def test_what_facts_say_of_single_cells_comes_out_of_the_rates():
    """Two cells computed by hand, and a task without a cell: the means of the three."""
    assert judges.from_rates(0.96, 0.28) == pytest.approx((2.71, 1.11), abs=0.01)
    assert judges.from_rates(0.0, 1.0) == pytest.approx((0, -2.33), abs=0.01)
    cells = [judges.make({"judge": "gemini-2.0-flash"}, goal) for goal in judges.PUBLISHED["gemini-2.0-flash"]]
    elsewhere = judges.make({"judge": "gemini-2.0-flash"}, POLE)
    assert elsewhere.slope == pytest.approx(np.mean([cell.slope for cell in cells]))
    assert elsewhere.lean == pytest.approx(np.mean([cell.lean for cell in cells])) and cells[0] != cells[1]


def test_stuck_gives_one_answer_and_inverted_is_wrong_more_often_than_right():
    assert rates(judges.make({"judge": "stuck"})) == [0, 0]
    second, wrongly = rates(judges.make({"judge": "inverted"}))
    assert (second + 1 - wrongly) / 2 < 0.4


def test_the_simulated_blur_is_where_the_neural_judge_had_it():
    """Within 5 degrees of upright half the answers right, "the second" in both orders; beyond 15 nearly all right."""
    rng, judge = np.random.default_rng(0), judges.make({"judge": "blurry"})
    near, far = ([(judge.label((a, b), (f"{a}", f"{b}")), judge.label((b, a), (f"{b}", f"{a}")), a > b)
                  for a, b in rng.uniform(low, high, (400, 2)) / 30] for low, high in ((0, 5), (15, 30)))
    assert np.mean([label == right for label, _, right in near]) == pytest.approx(0.5, abs=0.08)
    assert np.mean([label == right for label, _, right in far]) > 0.85
    assert np.mean([label == other for label, other, _ in near]) > 0.85


# ---- the stand-in ----
def ask(server, first, second, goal, stages=2):
    records = [None] * len(first)
    with server as url:
        vlm = vlm_query.VLM("offline", url=url)
        labels, _ = vlm_query.label_pairs(vlm, first, second, goal, stages,
                                          log=lambda record: records.__setitem__(record["pair"], record))
    return labels.tolist(), records


@pytest.mark.parametrize("words", [{"judge": "weak"}, {"judge": "blurry"}, {"judge": "one-sided"}, {"judge": "good"},
                                   {"slope": 1.0, "doubt": 0.7}])
def test_both_stages_tell_the_same_story_and_give_the_judge_s_label(words):
    """The label of two stages, of one, and of the judge itself, by the angles that were drawn, must be the same."""
    angles = np.random.default_rng(1).uniform(-25, 25, (2, 60))
    first, second = (np.stack([draw_pole(angle, 64) for angle in side]) for side in angles)
    first[0] = 255  # nothing to be seen
    judge = judges.make(words, POLE, seed=4)
    labels, records = ask(OfflineVLM(judge=judge), first, second, POLE)
    assert labels == ask(OfflineVLM(judge=judge), first, second, POLE, stages=1)[0]
    seen = [[offline_vlm.read_pole(image) for image in pair] for pair in zip(first, second)]
    assert labels == [judge.label([abs(value) / 30 for value in pair], [judges.key(image) for image in images],
                                  ["left" if value < 0 else "right" for value in pair])
                      for pair, images in zip(seen, zip(first, second))]
    assert (-1 in labels) == bool(judge.doubt) and {0, 1} <= set(labels)
    assert all("not a VLM" in text for record in records for text in record["answers"])


@pytest.mark.parametrize("goal", [goal for goal in READERS if goal != offline_vlm.SIGHT])
def test_any_label_can_be_told_in_words_whatever_was_read(goal, monkeypatch):
    """Also of near-ties, equal readings, and images in which nothing is seen; and those that fit are told as read."""
    reader, rng = READERS[goal], np.random.default_rng(0)
    low, high = sorted((abs(reader.worst), reader.best))  # merits below 0 are of distances, from 0 on
    values = rng.uniform(low, high, (150, 2)) * (rng.choice([-1, 1], (150, 2)) if reader.sides else 1)
    values[:60, 1] = values[:60, 0] + rng.normal(0, 1, 60) * reader.margin
    values[60] = values[60, 0], values[60, 0]
    values[61:64] = [[np.nan, high], [low, np.nan], [np.nan, np.nan]]
    for label in (0, 1):
        judge = judges.Judge(slope=0, lean=9 * (2 * label - 1))
        for pair in values:
            monkeypatch.setitem(READERS, goal, reader._replace(read=lambda image: pair[image]))
            words = offline_vlm.describe_as(judge, READERS[goal], (0, 1), ("a", "b"))
            assert offline_vlm.decide(reader, words) == str(label)
            if offline_vlm.decide(reader, offline_vlm.tell(reader, pair)) == str(label):
                assert words == offline_vlm.tell(reader, pair)


def test_without_a_judge_the_stand_in_says_what_it_always_said():
    """Coin flips and honest answers as they were before there were judges: a checksum of 64 answers of each."""
    images = [draw_pole(angle, 48) for angle in np.linspace(-25, 25, 16)]
    texts = [offline_vlm.answer([f"The goal is {POLE}. -1", *two], mistakes=mistakes, unsure=unsure, seed=3)
             for mistakes, unsure in ((0, 0), (0.3, 0), (0.2, 0.4), (0, 0.5)) for two in zip(images, images[5:] + images)]
    assert hashlib.sha256("\n".join(texts).encode()).hexdigest()[:16] == "07583b7931c737fe"


def test_judges_share_no_answers_and_their_name_says_what_they_are():
    """Two judges, or one judge on two goals, must differ in the name under which answers are cached."""
    made = [judges.make(words, goal) for words in ({"judge": "weak"}, {"judge": "good"}, {"slope": 3.0},
                                                   {"judge": "phi-3.5-vision"}) for goal in (POLE, judges.DRAWER)]
    models = [OfflineVLM(judge=judge).model for judge in made] + [OfflineVLM().model]
    assert len(set(models)) == 9 and all("not-a-VLM" in model for model in models)
    assert "-simulates-phi-3.5-vision-" in models[6]
    with pytest.raises(ValueError, match="a judge has errors of its own"):
        OfflineVLM(mistakes=0.1, judge=made[0])


def test_a_blind_side_needs_a_task_with_sides():
    """Before anything is asked, and from a stand-in that is asked all the same."""
    config = dataclasses.replace(parsed("--env DrawerOpen --vlm offline:judge=one-sided"), goal=judges.DRAWER)
    with pytest.raises(settings.UserError, match="one-sided: a judge that is blind on one side needs a task that has sides"):
        labeler.make_labeler(config)
    image = np.full((1, 64, 64, 3), 200, np.uint8)
    with pytest.raises(vlm_query.VLMError, match="needs a task with sides"):
        ask(OfflineVLM(judge=judges.make({"judge": "one-sided"})), image, image // 2, judges.DRAWER)


# ---- the oracle ----
def buffer_of(progress):
    """An ImageBuffer whose images are numbered, with this progress."""
    images, rng = ImageBuffer(len(progress), 8, 8), np.random.default_rng(0)
    for number, each in enumerate(progress):
        image = np.random.default_rng(number).integers(0, 255, (8, 8, 3), np.uint8)
        images.offer(image, image, each, rng)
    return images


def test_the_oracle_errs_like_the_judge(tmp_path):
    """D must be true progress over the range of I; ties are answered, unknown progress is unsure; books stay true."""
    progress = np.random.default_rng(2).uniform(-7, -3, 300)
    progress[:2], progress[2], progress[3] = -5, np.nan, -3.0
    images = buffer_of(progress)
    pairs = np.random.default_rng(3).permutation(300)[:280].reshape(-1, 2)
    pairs = np.vstack([[0, 1], [2, 3], pairs[(pairs > 3).all(axis=1)]])
    lines = []
    judge = judges.make({"slope": 3.0, "lean": 0.5}, "up", seed=5)
    made = labeler.Labeler("up", judge=judge)
    made.log, made.folder = lines, str(tmp_path)
    made(images, pairs, 0, np.random.default_rng(0))
    labels = [line["label"] for line in lines]
    known = progress[np.isfinite(progress)].astype(np.float32)
    away = (known.max() - images.progress) / (known.max() - known.min())
    assert labels[0] in (0, 1) and labels[1] == -1 and lines[0]["true_label"] == -1
    assert labels[2:] == [judge.label(away[pair], [judges.key(images.large[i]) for i in pair]) for pair in pairs[2:]]
    right = np.mean([line["label"] == line["true_label"] for line in lines[2:]])
    assert 0.6 < right < 0.95 and made.accuracy() == pytest.approx(right)


# ---- the command line ----
@pytest.mark.parametrize("line, says", [
    ("--vlm offline:judge=gpt", "no judge 'gpt'; there are good, weak, .*gemini-2.0-flash, .*phi-4-multimodal"),
    ("--labels oracle:judge=", "no judge ''; there are good"), ("--vlm offline:judge", "no judge ''; there are good"),
    ("--vlm offline:slope=much", "slope= is a number from -100 to 100"), ("--vlm offline:slope=nan", "slope= is a number"),
    ("--vlm offline:blur=2", "blur= is a number from 0 to 1"), ("--labels oracle:jitter=-1", "jitter= is a number from 0"),
    ("--vlm offline:blind=up", "blind= is left or right"),
    ("--vlm offline:judge=weak,mistakes=0.1", "a judge has errors of its own: leave out mistakes= and unsure="),
    ("--labels oracle:judge=weak,latency=1", "after oracle: there are mistakes= 0 to 1, .*a judge's judge=, slope="),
    ("--vlm offline:judg=weak", "after offline: there are mistakes= 0 to 1, .*a judge's judge=, slope=, .*blind="),
])
def test_a_wrong_judge_ends_in_one_line_that_says_what_is_possible(line, says):
    with pytest.raises(settings.UserError, match=says) as error:
        parsed(line)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("line, says", [
    ("--reward score --vlm offline:judge=weak", "a judge compares two images, and --reward score does not"),
    ("--reward code --vlm offline:slope=2", "a judge compares two images, and --reward code does not"),
    ("--labels oracle --vlm offline:judge=weak", "a flaw of the offline stand-in, which is not asked here"),
    ("--labels oracle:judge=one-sided", "progress, which has no sides"),
])
def test_a_judge_that_would_not_be_asked_is_refused(line, says):
    with pytest.raises(settings.UserError, match=says):
        settings.resolve(parsed(line))


@pytest.mark.parametrize("line, banner", [
    ("--vlm offline:judge=weak",
     "offline stand-in (not a VLM, errors simulated from published figures, judge weak)"),
    ("--vlm offline:judge=gemini-2.0-flash,doubt=0.3,latency=1",
     "offline stand-in (not a VLM, errors simulated from published figures, judge gemini-2.0-flash, doubt=0.3)"),
    ("--vlm offline:judge=blurry", "offline stand-in (not a VLM, errors simulated from a tiny neural judge, judge blurry)"),
    ("--vlm offline:lean=1.1,slope=3,jitter=1,spread=0",
     "offline stand-in (not a VLM, errors simulated, slope=3, lean=1.1, spread=0, jitter=1)"),
    ("--labels oracle:judge=stuck",
     "oracle (labels from true progress, not a VLM, errors simulated from published figures, judge stuck)"),
])
def test_the_banner_says_that_errors_are_simulated_and_from_what(line, banner):
    """It is the one text that run folder, report, tables and plots take; a plot leaves out the name, not the words."""
    assert settings.who_labels(parsed(line)) == banner
    row = {"method": "preference", "labeler": banner}
    assert "errors simulated" in plots.labelers([row]) and "not a VLM" in plots.labelers([row])


def test_plots_of_many_judges_name_the_labeler_once():
    rows = [{"method": "preference", "labeler": settings.who_labels(parsed(f"--vlm offline:judge={name}"))}
            for name in ("weak", "gemini-2.0-flash", "stuck")]
    assert plots.labelers(rows) == "offline stand-in (not a VLM, errors simulated from published figures)"


@pytest.mark.parametrize("name", NAMES)
def test_every_judge_reaches_the_labeler_by_name(name):
    """From the command line to the object that answers, with the goal and the seed of the run."""
    config = dataclasses.replace(parsed(f"--vlm offline:judge={name} --seed 3"), goal=POLE, out="runs/x")
    assert settings.judge_of(config) == judges.make({"judge": name}, POLE, 3) and settings.judge_of(config).name == name
    assert settings.flaws_of(config)["judge"] == name and settings.vlm_name(config) == "offline"


def test_a_resumed_run_keeps_its_judge_and_may_change_its_latency(tmp_path):
    """The order of the words does not matter, their values do; a zero is a value."""
    config = settings.resolve(parsed("--vlm offline:slope=3,jitter=0,judge=weak"))
    (tmp_path / "config.json").write_text(json.dumps(
        {**dataclasses.asdict(dataclasses.replace(config, goal="up")), "command": settings.command_line(config)}))
    words = settings.flaws_of(parsed(f"--resume {tmp_path} --vlm offline:judge=weak,jitter=0,slope=3,latency=2"))
    assert (words["judge"], words["slope"], words["jitter"], words["latency"]) == ("weak", 3, 0, 2)
    for vlm in ("offline:slope=2", "offline:judge=good"):
        with pytest.raises(settings.UserError, match="a resumed run keeps its --vlm"):
            parsed(f"--resume {tmp_path} --vlm {vlm}")


def test_a_sweep_may_have_a_column_of_judges():
    """By name or in numbers, for the stand-in and for the oracle; an unknown one is refused before anything runs."""
    def fields(**overrides):
        return sweep.Job("CartPole", "x", 0, overrides, ()).fields()

    assert fields(judge="none") == {} and fields(judge="weak") == {"vlm": "offline:judge=weak"}
    assert fields(judge="slope=3,lean=1.1", labels="oracle") == {"labels": "oracle:slope=3,lean=1.1"}
    assert sweep.parse_fields(["judge=none,weak"]) == {"judge": ["none", "weak"]}
    assert [job.setting for job in sweep.plan_grid(["judge=weak,stuck"])] == ["judge=weak", "judge=stuck"]
    with pytest.raises(ValueError, match="judge=weak is a flaw of the offline stand-in"):
        fields(judge="weak", vlm="openai/MODEL")
    with pytest.raises(settings.UserError, match="there is no judge 'x'"):
        sweep.parse_fields(["judge=x"])
