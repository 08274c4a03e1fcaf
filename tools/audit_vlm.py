"""Is this VLM good enough for this task? Ask it a hundred pairs whose true order is known, before spending on RL.

    python -m tools.audit_vlm --env DrawerOpen --vlm openai/MODEL --usd-per-mtok 0.10,0.50

What this is: a script that wires the components as train.py does. Which STEPs: 2, pick pairs of images, and 3, ask the
VLM which image is closer to the goal, by the same code and with the same images as in training.

Images come in equal parts from three kinds of episodes: random actions; half-trained; the task's scripted expert.
Half-trained means: the expert, acting at random in 30, 50 or 70 % of the steps (it finds its way late and not always),
or, with `--policy RUN_FOLDER`, the newest policy of a run of train.py. Pairs are spread evenly over BINS of their
difference in true progress, as a share of the range of all images. Each is asked in both orders, and in both ways:
describe, then decide (two calls, the paper's), and all in one call.

The verdict is about the pairs whose difference is above a tenth of the range, and the way that `--stages` names:
    not good enough  if fewer than half of the questions got a label, or P(right) < 3/4
    good enough      if P(right) > 3/4;      undecided if the 95 % interval of P(right) has 3/4 in it
where P(right) is the share of labels that are right, its interval Wilson's, with one draw per pair (the two orders of a
pair are no two draws). 3/4 because a reward learned from fewer right answers needs several times as many of them.

Then come the faults that are sure, each with advice: faults(). The judge is thought of as in signal detection,

    score = slope D + lean + noise;    the answer is "second" where score > 0    (noise: standard normal)

with D the second image's progress less the first's, as a share of the range. Clear pairs: as above. Rules:
    does not look           95 % of all labels, or more, are one and the same answer, "first" or "second"
    wrong way round         P(right) < 1/2, with 1/2 above its interval
    leans                   |lean| > 1/4, and 1/4 fits the answers too badly (twice the log likelihood: worse by 4)
    not steady              no lean, but of clear pairs fewer than 4 in 5 get the same judgement when turned round
    blurry near the goal    of pairs that differ by a twentieth or more, both images in the best fifth of the range,
                            P(right) < 3/4, with 3/4 above its interval; if it leans: fewer are right than elsewhere
    blind on one side       fewer are right on one side of the goal, or where the better image is there: sides()
"Fewer" compares pairs of equal differences: by a tenth or more, and by 2.8 standard errors, see compare(). A judge that
does not look, or reads the goal the wrong way round, has no other fault that matters: that one alone is named.

The folder (`--out`, default runs/audit-...): audit.txt (all that is printed), audit.csv, audit.png, labels.jsonl with
every answer, pairs/*.png, config.json. Answers are kept in vlm_cache beside it, where train.py looks for them too.

To use it elsewhere:
    from tools import audit_vlm
    from support.settings import Config
    result = audit_vlm.audit(Config(env="CartPole", vlm="offline", out="an_audit"), pairs=20)
    print(result["verdict"])
    print(result["rows"][0])
    # or the measures alone, of any judge's answers to pairs of known progress, each asked in both orders:
    print(audit_vlm.measure([0.1, 0.9], [0.5, 0.2], label=[1, 1], label_when_swapped=[0, 1])["consistent"])  # 0.5
"""
import argparse
import csv
import dataclasses
import json
import os
import sys
import time
import types
from statistics import NormalDist

import numpy as np

import envs
from support import report, settings
from support.labeler import make_labeler
from support.run import prepare, random_action, write_json

BINS = (0.0, 0.05, 0.1, 0.2, 0.4, 1.0)  # edges; differences in progress as a share of the range
CLEAR, ENOUGH_RIGHT, ENOUGH_LABELS = 0.1, 0.75, 0.5  # the rule of the verdict, see above
NEAR = 0.2  # an image is near the goal if its progress is in the best fifth of the range
STUCK, LEAN, STEADY = 0.95, 0.25, 0.8  # the rules of the faults, see above
WORSE, CHANCE = 0.1, 2.8  # there: how much worse, and in how many standard errors
PER_KIND, PER_EPISODE = 40, 10  # images of each kind of episode, and of one episode, evenly spaced in it
NOISE = (0.3, 0.5, 0.7)  # share of random actions in "half-trained" episodes
AUDIT_SEED = 3_000_000  # of the first episode; no image that train.py learns from has it (--seed below 10)
KINDS = ("right", "wrong", "unsure", "unreadable", "no answer", "limit")  # what can come of a question
NORMAL = NormalDist()  # cdf is Phi, inv_cdf is z
WAYS = {2: "two stages", 1: "one call"}


# ---- the images ----
def policies(config, env, folder, rng):
    """{kind: function of the episode's number -> (obs -> action)} of those kinds that this task has."""
    def at_random(obs):
        return random_action(env.action_space, rng)

    kinds = {"random": lambda episode: at_random}
    try:
        expert = envs.expert(env)
        kinds["expert"] = lambda episode: expert
        kinds["half-trained"] = lambda episode: lambda obs: (
            at_random(obs) if rng.random() < NOISE[episode % len(NOISE)] else expert(obs))
    except ValueError:
        pass  # a foreign environment has no scripted expert
    if folder:
        learned = trained_policy(folder, config, env)
        kinds["half-trained"] = lambda episode: learned
    return kinds


def trained_policy(folder, config, env):
    """The newest policy of a run folder of train.py, exploring as it did in training -> obs -> action."""
    import torch

    import sac

    try:
        with open(os.path.join(folder, "config.json")) as file:
            stored = json.load(file)
        state = torch.load(os.path.join(folder, "checkpoint", "state.pt"), weights_only=True)
        if stored["env"] != config.env:
            raise ValueError(f"it was trained on {stored['env']}")
        agent = sac.SAC(env.observation_space.shape[0], env.action_space, (stored["hidden"],) * 2,
                        device=stored["device"], seed=config.seed)  # where its random numbers can go on
        agent.load_state_dict(state["pi"])
    except Exception as error:  # unpickling a foreign file may raise anything
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        raise settings.UserError(f"--policy {folder}: no run of train.py that can be used here ({reason})") from None
    return agent.act


def collect(config, env, folder, rng):
    """PER_KIND images of each kind of episode -> images (N, P, P, 3) uint8, true progress (N,), observations (N, O) as
    of the images, kind (N,) str."""
    from tqdm import tqdm

    images, progress, observed, kind_of, seed = [], [], [], [], AUDIT_SEED + 1000 * config.seed
    kinds = policies(config, env, folder, rng)
    with tqdm(total=PER_KIND * len(kinds), desc="images", unit="image") as bar:
        for kind, policy in kinds.items():
            kept = 0
            for episode in range(PER_KIND):
                after = []  # the observation after each step, which the policy sees in the next one

                def step(action):
                    result = env.step(action)
                    after.append(np.ravel(result[0]))
                    return result

                watched = types.SimpleNamespace(reset=env.reset, step=step, image=env.image)
                seen, _, values, _ = envs.rollout(watched, policy(episode), seed % 2**32, config.vlm_image_size)
                seed += 1
                count = min(PER_EPISODE, PER_KIND - kept, len(seen))
                chosen = np.linspace(0, len(seen) - 1, count).round().astype(int)
                images += list(seen[chosen])  # copies: the rest of the episode is let go
                progress += list(values[chosen])
                observed += [after[t] for t in chosen]
                kept += count
                bar.update(count)
                if kept == PER_KIND:
                    break
            kind_of += [kind] * kept
    return np.stack(images), np.array(progress), np.array(observed), np.array(kind_of)


def sides(observations, progress):
    """On which side of the goal is each image? -> side (N,) in {-1, 0, 1}, and an observation's number, or None, None.

    A goal has two sides if progress falls with the *size* of something that has a sign, such as the angle of a pole:
    of observations (N, O), the one whose size has the strongest rank correlation with progress (N,), if that is below
    -0.9 and at least a fifth of the images have either sign. Most tasks have none.
    Example: observations [[-2], [-1], [1], [2]] and progress [-2, -1, -1, -2] -> [-1, -1, 1, 1], 0
    """
    signs = np.sign(observations)  # (N, O)
    two_sided = np.minimum((signs > 0).mean(axis=0), (signs < 0).mean(axis=0)) >= 0.2  # (O,)
    falls = {k: report.rank_correlation(np.abs(observations[:, k]), progress) for k in np.flatnonzero(two_sided)}
    best = min(falls, key=falls.get, default=None)
    return (None, None) if best is None or falls[best] > -0.9 else (signs[:, best].astype(int), int(best))


# ---- STEP 2: pick pairs of images ----
def draw_pairs(images, progress, count, rng):
    """Pairs evenly spread over BINS -> pairs (M, 2), difference in progress as a share of the range (M,).

    In each bin, pairs of two images near the goal take turns with the others. A bin that runs out of pairs leaves its
    share to the others. Equal progress and equal looks are left out: the first has no right answer, the second is never
    sent.
    """
    from vlm_query import looks_identical

    span = np.ptp(progress)
    if not span > 0:
        raise settings.UserError(f"all {len(images)} images have the same progress: there is nothing to compare")
    pairs = np.stack(np.triu_indices(len(images), 1), axis=1)  # (N (N - 1) / 2, 2)
    pairs = rng.permuted(rng.permutation(pairs), axis=1)  # in random order, and each turned round or not
    gap = np.abs(progress[pairs[:, 1]] - progress[pairs[:, 0]]) / span
    near = (progress[pairs] > progress.max() - NEAR * span).all(axis=1)
    left = [[list(np.flatnonzero((gap > low) & (gap <= high) & kind)) for kind in (near, ~near)]
            for low, high in zip(BINS, BINS[1:])]
    chosen = []
    while len(chosen) < count and any(map(any, left)):
        for both in left:
            both.reverse()  # the two kinds take turns
            rows = both[0] or both[1]
            while rows and looks_identical(*images[pairs[rows[-1]]]):
                rows.pop()
            if rows and len(chosen) < count:
                chosen.append(rows.pop())
    return pairs[chosen], gap[chosen]


# ---- STEP 3: ask the VLM which image is closer to the goal ----
def ask_all(config, labeler, images, progress, side, pairs, gap):
    """Every pair in both orders and both ways -> records as in labels.jsonl; on disk as soon as they are known."""
    import imageio
    import vlm_query
    from tqdm import tqdm

    log, records = vlm_query.LabelLog(os.path.join(config.out, "labels.jsonl")), []
    os.makedirs(os.path.join(config.out, "pairs"))
    for index, (pair, turned) in enumerate((pair, turned) for pair in pairs for turned in (0, 1)):
        both = images[pair[::-1] if turned else pair]  # (2, P, P, 3)
        imageio.imwrite(os.path.join(config.out, "pairs", f"{index:06d}.png"), np.hstack(both))
    with tqdm(total=4 * len(pairs), desc="questions", unit="question") as bar:
        for stages in WAYS:
            for turned in (0, 1):
                shown = pairs[:, ::-1] if turned else pairs  # (M, 2)
                true_label = (progress[shown[:, 1]] > progress[shown[:, 0]]).astype(int)  # (M,)

                def keep(record):
                    i = record["pair"]
                    record = {"index": 2 * i + turned, "order": turned, **record, "true_label": int(true_label[i]),
                              "progress": progress[shown[i]].tolist(), "difference": float(gap[i])}
                    if side is not None:
                        record["side"] = side[shown[i]].tolist()
                    log.append(record)
                    records.append(record)
                    bar.update()

                ask_batch(labeler.vlm, images[shown[:, 0]], images[shown[:, 1]], config, stages, keep)
    log.close()
    return records


def ask_batch(vlm, first, second, config, stages, keep):
    """label_pairs, but a VLM whose answers cannot be read is a finding here and no reason to stop."""
    import vlm_query

    kinds = []
    try:
        vlm_query.label_pairs(vlm, first, second, config.goal, stages, config.workers,
                              lambda record: (kinds.append(record["kind"]), keep(record)))
    except vlm_query.VLMError:
        asked = len(kinds) - kinds.count("limit") - kinds.count("identical")
        if len(kinds) < len(first) or 2 * kinds.count("no answer") > asked:
            raise  # a wrong key, an outage: that says nothing about the VLM


# ---- what the answers say ----
def outcome(record):
    """One of KINDS."""
    if record["kind"] != "label":
        return record["kind"]
    return "right" if record["label"] == record["true_label"] else "wrong"


def share(part, whole):
    return part / whole if whole else float("nan")


def wilson(right, draws, z=1.96):
    """95 % interval of a share (Wilson 1927): (p + z^2/2n -+ z sqrt(p (1 - p)/n + z^2/4n^2)) / (1 + z^2/n)."""
    if not draws:
        return 0.0, 1.0
    centre, width = right + z**2 / (2 * draws), z * np.sqrt(right * (1 - right) / draws + (z / (2 * draws)) ** 2)
    return float((centre - width) / (1 + z**2 / draws)), float((centre + width) / (1 + z**2 / draws))


def d_prime(hits, seconds, false_alarms, firsts):
    """How well two kinds of pairs are told apart, whatever the lean, in standard deviations of the noise.

        d' = z(H) - z(F),    H = (hits + 1/2) / (seconds + 1),    F = (false_alarms + 1/2) / (firsts + 1)

    hits: answers "second" to the `seconds` pairs whose second image is better; false_alarms: those to the `firsts`
    other pairs. Equal-variance signal detection; the halves keep it finite (Hautus 1995). Phi(d'/2) is the share of
    right answers that the same judge would give without its lean.
    Example: 48 of 50, and 36 of 50 (Gemini 2.0 Flash on drawer-open, as published) -> 1.08, and Phi(.54) = .71
    """
    return NORMAL.inv_cdf((hits + 0.5) / (seconds + 1)) - NORMAL.inv_cdf((false_alarms + 0.5) / (firsts + 1))


def fit_lean(difference, label, lean=None):
    """The judge's slope, lean and doubt of the header, from pairs that differ by more and by less -> those, and a loss.

        P["second"] = Phi(slope D + lean - doubt),    P["first"] = Phi(-slope D - lean - doubt),    else "unsure"

    difference: D (K,).  label: (K,) of 1, 0, and -1, unsure.  lean: hold it there.  The most likely values (an ordered
    probit), with a faint prior, which keeps them finite where all answers are right, or are one and the same: slope
    within 20, lean within 3, log(doubt) = -1 within 2. Where nobody was unsure, the doubt is 0. loss: -log likelihood.
    Example: D = 0 100 times, and 84 answers are "second" -> lean .99, for Phi(.99) = .84
    """
    from scipy.optimize import minimize
    from scipy.special import log_ndtr, ndtr

    difference, label = np.asarray(difference, float), np.asarray(label)
    unsure = (label == -1).any()

    def unlikely(values):
        slope, log_doubt, its_lean = (*values, lean)[:3] if lean is not None else values
        score, doubt = slope * difference + its_lean, np.exp(log_doubt) if unsure else 0.0
        middle = np.log(np.maximum(ndtr(score + doubt) - ndtr(score - doubt), 1e-12))
        log_p = np.where(label == 1, log_ndtr(score - doubt), np.where(label == 0, log_ndtr(-score - doubt), middle))
        return -log_p.sum() + (slope / 20) ** 2 / 2 + (its_lean / 3) ** 2 / 2 + ((log_doubt + 1) / 2) ** 2 / 2

    best = minimize(unlikely, [1.0, -1.0, 0.0][: 3 if lean is None else 2])
    slope, log_doubt, its_lean = (*best.x, lean)[:3]
    return float(slope), float(its_lean), float(np.exp(log_doubt)) if unsure else 0.0, float(best.fun)


def fitted_d_prime(gap, slope, lean, doubt):
    """d' of a judge with these numbers on pairs that differ by gap (M,): z(H) - z(F) of the shares that it would have.

    About 2 slope mean(gap) where that is small. With 200 pairs it strays half as far as the counted d_prime().
    """
    from scipy.special import ndtr

    def says_second(score):  # the share among its labels, over all pairs
        second, first = ndtr(score - doubt).mean(), ndtr(-score - doubt).mean()
        return np.clip(second / (second + first), 1e-9, 1 - 1e-9)  # z is infinite at 0 and 1

    gap = np.asarray(gap, float)
    return NORMAL.inv_cdf(says_second(lean + slope * gap)) - NORMAL.inv_cdf(says_second(lean - slope * gap))


def compare(credit, here, there, gap):
    """Is `here` judged worse than `there`, among pairs of equal differences? -> means in both, difference, z.

    credit: (M,) 0 to 1 for each pair.  here, there: (M,) bool.  gap: (M,) difference in progress.  The means are plain;
    difference and z (in standard errors) are Cochran's and Mantel-Haenszel's: in each bin of differences, with n1 pairs
    here and n2 there, means m1 and m2, and the variance v of both together, w = n1 n2 / (n1 + n2) and

        difference = sum w (m1 - m2) / sum w,    z = sum w (m1 - m2) / sqrt(sum w v)

    The first bin is left out: who can tell such pairs apart? nan and 0 where there is nothing to compare.
    Example: ten pairs each, in one bin, half right here and all there: .5, 1, -.5, -2.5 / sqrt(5 * .1875) = -2.58
    """
    up, weights, noise = 0.0, 0.0, 0.0
    for low, high in zip(BINS[1:], BINS[2:]):
        one, two = (credit[(gap > low) & (gap <= high) & part] for part in (here, there))
        if len(one) and len(two):
            weight = len(one) * len(two) / (len(one) + len(two))
            up, weights = up + weight * (one.mean() - two.mean()), weights + weight
            noise += weight * np.concatenate([one, two]).var()
    means = share(credit[here].sum(), here.sum()), share(credit[there].sum(), there.sum())
    return *map(float, means), float(share(up, weights)), float(up / np.sqrt(noise)) if noise else 0.0


def measure(progress_first, progress_second, label, label_when_swapped, side_first=None, side_second=None, scale=None):
    """How a judge leans, errs and wavers, from pairs that were asked in both orders -> {name of a column: number}.

    progress_first, progress_second: (M,) true progress.  label: (M,) 0, 1, -1 unsure, -2 none, as label_pairs() gives
    it; label_when_swapped: the same with the second image shown first.  side_first, side_second: (M,) -1 or 1, see
    sides(), if known.  scale: least and greatest progress of all images, if not of these.  nan: there is no such pair.

    right_second, right_first   share of right labels where the second image is better, and where the first is
    says_second                 share of the labels that say "second"; half of all pairs are such
    d_prime, bias_free          d_prime() as counted, and Phi(d'/2): the share that would be right without the lean
    slope, lean, doubt, d_prime_fitted     the judge of the header: fit_lean(), fitted_d_prime()
    lean_sure                   twice the log likelihood that a lean of 1/4 loses; 0 where the lean is smaller
    clear_right, _low, _high    share of right labels above a tenth of the range, and its 95 % interval
    labelled                    share of the questions above a tenth that got a label
    consistent, clear_consistent, agree_right   of pairs with two labels: judged the same when turned round; of those
                                above a tenth; and the share of right ones where both agree, which `both orders` keeps
    near_right                  share of right labels where both images are near the goal (and differ by a twentieth)
    near_high, near_same        its upper limit (95 %); share of these pairs judged the same when turned round
    near_credit, other_credit, near_worse, near_z   compare() of the pairs near the goal with all others; the credit of
                                a pair is 1 for each right answer, 1/2 for each "unsure", and the mean of its two
    left_credit, right_credit, side_worse, side_z   the same of pairs whose images are both on side -1, and both on 1
    left_better, right_better, cross_worse, cross_z   the same of pairs with an image on either side, whose better image
                                is on side -1, and on 1
    """
    first, second = np.asarray(progress_first, float), np.asarray(progress_second, float)
    labels = np.stack([label, label_when_swapped]).astype(int)  # (2, M)
    low, high = scale or (min(first.min(), second.min()), max(first.max(), second.max()))
    difference = (second - first) / (high - low) * np.array([[1], [-1]])  # (2, M) of the images as they are shown
    gap, better = np.abs(difference[0]), difference > 0
    known, right = labels >= 0, labels == better
    both = known.all(axis=0)  # (M,)
    same = labels[0] != labels[1]
    clear = gap > CLEAR
    hits, alarms = (labels[known & kind] == 1 for kind in (better, ~better))

    def of_labels(rows):  # the share of right ones
        return share(right[known & rows].sum(), (known & rows).sum())

    answered = labels >= -1
    slope, lean, doubt, loss = fit_lean(difference[answered], labels[answered])
    held = fit_lean(difference[answered], labels[answered], np.copysign(LEAN, lean))[-1] if abs(lean) > LEAN else loss
    d = d_prime(hits.sum(), len(hits), alarms.sum(), len(alarms))
    clear_right, drawn = of_labels(clear), (known.any(axis=0) & clear).sum()
    near = (np.minimum(first, second) > high - NEAR * (high - low)) & (gap > BINS[1])
    near_right, near_drawn = of_labels(near), (known.any(axis=0) & near).sum()
    # A question without an answer says nothing about the images; "unsure" says as much about them as a toss of a coin.
    asked, credit = answered.all(axis=0), (right + (labels == -1) / 2).mean(axis=0)
    one, two = (np.zeros(len(first)) if side is None else np.asarray(side) for side in (side_first, side_second))
    better_side = np.where(better[0], two, one) * (one * two < 0)  # 0 where both are on one side
    compared = {}
    for names, here, there in (
            (("near_credit", "other_credit", "near_worse", "near_z"), near, ~near),
            (("left_credit", "right_credit", "side_worse", "side_z"), (one < 0) & (two < 0), (one > 0) & (two > 0)),
            (("left_better", "right_better", "cross_worse", "cross_z"), better_side < 0, better_side > 0)):
        compared.update(zip(names, compare(credit, here & asked, there & asked, gap)))
    return {
        "right_second": share(hits.sum(), len(hits)), "right_first": share((~alarms).sum(), len(alarms)),
        "says_second": share((labels[known] == 1).sum(), known.sum()), "d_prime": d, "bias_free": NORMAL.cdf(d / 2),
        "slope": slope, "lean": lean, "doubt": doubt, "d_prime_fitted": fitted_d_prime(gap, slope, lean, doubt),
        "lean_sure": 2 * (held - loss), "clear_right": clear_right, "clear_low": wilson(clear_right, drawn)[0],
        "clear_high": wilson(clear_right, drawn)[1], "labelled": share((known & clear).sum(), 2 * clear.sum()),
        "consistent": share((same & both).sum(), both.sum()),
        "clear_consistent": share((same & both & clear).sum(), (both & clear).sum()),
        "agree_right": share((right.all(axis=0) & both).sum(), (same & both).sum()), "near_right": near_right,
        "near_high": wilson(near_right, near_drawn)[1],
        "near_same": share((same & both & near).sum(), (both & near).sum()),
        **compared,
    }


def summary(records, price=None):
    """Some of the records -> one row of audit.csv: how many came to what, how right, how even, at what cost each.

    first_share: of the labels, how many pick the first image; one half, as every pair is asked in both orders.
    consistent: of the pairs with a label in both orders, how many pick the same image twice.
    """
    came = [outcome(record) for record in records]
    asked = [record for record in records if record["kind"] != "limit"]
    labels = [record for record in records if record["kind"] == "label"]
    picked = {}
    for record in labels:  # "" -> {pair: [0 or 1 for the pair's own first or second image, once an order]}
        picked.setdefault(record["pair"], []).append(record["label"] ^ record["order"])
    twice = [picks for picks in picked.values() if len(picks) == 2]
    fresh = [record["seconds"] for record in asked if not record["cached"]]
    tokens = [sum(record[name] for record in asked) for name in ("tokens_in", "tokens_out")]
    right = share(came.count("right"), len(labels))
    return {
        "questions": len(asked), **{kind.replace(" ", "_"): came.count(kind) for kind in KINDS},
        "accuracy": right, "accuracy_low": wilson(right, len(picked))[0],
        "accuracy_high": wilson(right, len(picked))[1], "labelled": share(len(labels), len(asked)),
        "first_share": share(sum(record["label"] == 0 for record in labels), len(labels)),
        "consistent": share(sum(a == b for a, b in twice), len(twice)),
        "tokens_in": share(tokens[0], len(asked)), "tokens_out": share(tokens[1], len(asked)),
        "seconds": share(sum(fresh), len(fresh)),  # those from the cache took none
        "usd": share(tokens[0] * price[0] + tokens[1] * price[1], 1e6 * len(asked)) if price else None,
    }


def summaries(records, price, scale=None):
    """The rows of audit.csv: for each way, each bin, then the pairs the verdict is about, then all, with measure()."""
    parts, rows = [*zip(BINS, BINS[1:]), (CLEAR, 1.0), (0.0, 1.0)], []
    for stages in WAYS:
        its = [record for record in records if record["stages"] == stages]
        rows += [{"stages": stages, "low": low, "high": high,
                  **summary([record for record in its if low < record["difference"] <= high], price)}
                 for low, high in parts]
        its = arrays(its)
        if len(its["label"]):
            rows[-1].update(measure(**its, scale=scale))
    return rows


def arrays(records):
    """Records of one way of asking -> the arguments of measure(), a row for each pair that was asked in both orders."""
    records = {(record["pair"], record["order"]): record for record in records if record["kind"] != "limit"}
    pairs = [(one, records[pair, 1]) for (pair, order), one in records.items() if order == 0 and (pair, 1) in records]
    read = {"progress_first": lambda one, two: one["progress"][0],
            "progress_second": lambda one, two: one["progress"][1],
            "label": lambda one, two: one["label"], "label_when_swapped": lambda one, two: two["label"]}
    if pairs and "side" in pairs[0][0]:
        read.update(side_first=lambda one, two: one["side"][0], side_second=lambda one, two: one["side"][1])
    return {name: np.array([value(*pair) for pair in pairs]) for name, value in read.items()}


def of(rows, stages, low):
    """The row of that way about all differences above `low`."""
    return next(row for row in rows if (row["stages"], row["low"], row["high"]) == (stages, low, 1.0))


def faults(found, number=None):
    """The rules of the header on what measure() found -> {fault: advice}.

    number: of the observation that tells the sides of the goal, see sides().
    """
    if "lean" not in found:
        return {}  # nothing was asked in both orders
    said = {name: percent(value) for name, value in found.items() if value is not None}
    often, which = max((found["says_second"], "second"), (1 - found["says_second"], "first"))
    if often >= STUCK:
        return {"does not look": f'it does not look at the images: {percent(often)} of its answers are "the {which}". '
                                 "Does the server show it both images? Otherwise name another VLM"}
    if found["clear_high"] < 0.5:
        return {"wrong way round": f"it reads the goal the wrong way round: only {said['clear_right']} of the clear "
                                   "pairs are right. Say the goal in other words, or name another VLM"}
    advice = {}
    both_orders = (f"ask both orders (--both-orders 1): of the {said['consistent']} of all pairs where both answers "
                   f"agree, {said['agree_right']} are right")
    if found["lean_sure"] > 4:
        which = "second" if found["lean"] > 0 else "first"
        advice["leans"] = (f"it leans to the {which} image, by {abs(found['lean']):.1f}. A fit finds that and leaves "
                           f"it out of the reward; against its other errors, {both_orders}")
    elif found["clear_consistent"] < STEADY:
        advice["not steady"] = (
            f"turned round, only {said['clear_consistent']} of the clear pairs get the same judgement, and no constant "
            f"lean explains it: set temperature 0 (--vlm-extra '{{\"temperature\": 0}}'), and if that is not it, "
            + both_orders)
    blurry = "leans" not in advice and found["near_high"] < ENOUGH_RIGHT
    if blurry or (found["near_worse"] < -WORSE and found["near_z"] < -CHANCE):
        advice["blurry near the goal"] = (
            f"it is blurry near the goal: {said['near_right']} right there, and {said['near_same']} of these pairs get "
            "the same judgement when turned round. Expect a policy that stops short, and ask both orders "
            "(--both-orders 1), which drops most of what it only guesses there")
    if any(abs(found[f"{kind}_worse"]) > WORSE and abs(found[f"{kind}_z"]) > CHANCE for kind in ("side", "cross")):
        its = "" if number is None else f" (observation {number} below 0, above 0)"
        advice["blind on one side"] = (
            f"it is blind on one side of the goal{its}: {said['left_credit']} and {said['right_credit']} right with "
            f"both images there; of pairs across, {said['left_better']} and {said['right_better']} where the better "
            "image is there. If left and right are alike in this task: --set random_flip=1")
    return advice


def verdict(found, advice):
    """The rule of the header, on what measure() found and faults() said -> one line; the advice follows it."""
    if np.isnan(found.get("labelled", np.nan)):
        return "undecided: no question about a clear difference was asked in both orders"
    words = (f"{percent(found['clear_right'])} right ({percent(found['clear_low'])} to {percent(found['clear_high'])}) "
             f"where the difference is above a tenth of the range, {percent(found['labelled'])} of these questions got "
             "a label")
    if (found["labelled"] < ENOUGH_LABELS or found["clear_high"] < ENOUGH_RIGHT
            or advice.keys() & {"does not look", "wrong way round"}):
        judgement = "not good enough" + ", as it is asked" * bool(advice.keys() & {"leans", "not steady"})
    elif found["clear_low"] > ENOUGH_RIGHT:
        judgement = "often right, but not to be trusted yet" if advice else "good enough"
    else:
        judgement = "undecided" if advice else "undecided, ask more --pairs"
    return "; ".join([f"{judgement}: {words}", *advice])


# ---- in words and images ----
def percent(value):
    return "-" if np.isnan(value) else f"{100 * value:.0f} %"


def described(found, number):
    """What measure() and faults() found, in lines."""
    if "lean" not in found:
        return []
    said = {name: percent(value) for name, value in found.items() if value is not None}
    lines = [
        f"right where the second image is better: {said['right_second']}, where the first is: {said['right_first']}; "
        f"says \"second\": {said['says_second']}",
        f"lean {found['lean']:+.2f} (above 0: to the second), slope {found['slope']:.1f}; d' {found['d_prime']:.2f} "
        f"(fitted {found['d_prime_fitted']:.2f}); right without its lean: {said['bias_free']}",
        f"turned round, the same judgement: {said['consistent']} of the pairs with two labels, "
        f"{said['clear_consistent']} above a tenth; where both agree, {said['agree_right']} right",
        f"near the goal: {said['near_right']} right; turned round, the same: {said['near_same']}"]
    if number is not None:
        lines += [f"the two sides of the goal, observation {number} below 0 and above 0: {said['left_credit']} and "
                  f"{said['right_credit']} right with both images there; of pairs across, {said['left_better']} and "
                  f"{said['right_better']} where the better image is there"]
    return lines + ["faults: " + ("; ".join(faults(found)) or "none")]


def describe(rows, config, kinds, number=None):
    """The whole text of audit.txt."""
    who = settings.who_labels(config)
    text = [f"{config.env}: {config.goal}", f"labels from: {who}",
            "images: " + ", ".join(f"{(kinds == kind).sum()} {kind}" for kind in dict.fromkeys(kinds))]
    for stages, way in WAYS.items():
        text += ["", f"{way}, by {who}",
                 "difference    questions  right  wrong  unsure  unreadable  no answer  accuracy  picks first"]
        for row in (row for row in rows if row["stages"] == stages and (row["low"], row["high"]) != (CLEAR, 1.0)):
            text += [f"{100 * row['low']:3.0f} to {100 * row['high']:3.0f} %{row['questions']:11d}{row['right']:7d}"
                     f"{row['wrong']:7d}{row['unsure']:8d}{row['unreadable']:12d}{row['no_answer']:11d}"
                     f"{percent(row['accuracy']):>10}{percent(row['first_share']):>13}"]
        everything = of(rows, stages, 0.0)
        text += [*described(everything, number), *cost_lines(everything, stages, config)]
        if everything["limit"]:
            text += [f"{everything['limit']} questions were not asked: a limit was reached"]
    two, one = of(rows, 2, CLEAR), of(rows, 1, CLEAR)
    as_good = one["accuracy"] >= two["accuracy"] and one["labelled"] >= two["labelled"]
    text += ["", f"two stages against one call, above a tenth of the range: {percent(two['accuracy'])} against "
             f"{percent(one['accuracy'])} right, {percent(two['labelled'])} against {percent(one['labelled'])} labelled"
             + ("; one call is as good here, for half the calls: --stages 1" if as_good else "")]
    found = of(rows, config.stages, 0.0)
    advice = faults(found, number)
    judgement = verdict(found, advice)
    text += [f"{who}, {WAYS[config.stages]}: {judgement}", *(f"- {line}" for line in advice.values())]
    if not advice and judgement.startswith("not"):
        text += ["- no single fault is sure: name another VLM, or say the goal in other words"]
    return "\n".join(text)


def cost_lines(row, stages, config):
    """What a question costs, and all questions of a run on the task's schedule."""
    if not row["questions"]:
        return ["cost: nothing was asked"]
    sessions = 1 + max(0, config.total_steps - config.explore_steps) // config.feedback_every
    pairs = min(config.max_pairs, sessions * config.pairs_per_session)
    hours = "all of it from the cache" if np.isnan(row["seconds"]) else (
        f"{row['seconds']:.2f} s; a run: {row['seconds'] * pairs / config.workers / 3600:.2f} h of waiting for answers")
    money = f"${row['usd']:.5f}; a run: ${row['usd'] * pairs:.2f}" if row["usd"] is not None else (
        "none, it is a server of your own" if config.vlm.split(":")[0].split("/")[0] in ("local", "offline") else
        "unknown: give --usd-per-mtok IN,OUT")
    return [f"a pair: {row['tokens_in']:.0f} tokens in, {row['tokens_out']:.0f} out; a run of {config.total_steps:,} "
            f"steps: {pairs:,} pairs, {stages * pairs:,} calls, {pairs * (row['tokens_in'] + row['tokens_out']):,.0f} "
            "tokens", f"time for a pair: {hours}", f"price of a pair: {money}"]


def draw(path, rows, config):
    """audit.png: what came of the questions in each bin, a panel for each way -> its path, or a line why not."""
    try:
        import matplotlib
    except ImportError:  # the answers are paid for: the tables must not end for want of a drawing
        return "no audit.png, for it needs matplotlib: pip install matplotlib"
    matplotlib.use("Agg")
    from matplotlib import pyplot

    colours = ("#2a9d4e", "#c0392b", "#b0b0b0", "#e09030", "#303030")
    figure, panels = pyplot.subplots(1, 2, figsize=(11, 4.5), sharey=True, layout="constrained")  # inches
    for panel, (stages, way) in zip(panels, WAYS.items()):
        bins = [row for row in rows if row["stages"] == stages][: len(BINS) - 1]
        names = [f"{100 * row['low']:.0f} to {100 * row['high']:.0f} %" for row in bins]
        base = np.zeros(len(bins))
        for kind, colour in zip(KINDS, colours):  # the last kind, "limit", was not asked
            part = np.array([share(row[kind.replace(" ", "_")], row["questions"]) for row in bins])
            panel.bar(names, part, bottom=base, color=colour, label=kind)
            base += np.nan_to_num(part)
        row = of(rows, stages, 0.0)
        lean, d, near = (row.get(name, np.nan) for name in ("lean", "d_prime", "near_right"))
        panel.set_title(f"{way}: says \"second\" {percent(1 - row['first_share'])}, lean {lean:+.1f}, d' {d:.1f},\nthe "
                        f"same when turned round {percent(row['consistent'])}, right near the goal {percent(near)}",
                        fontsize=10)
        panel.set_xlabel("difference in true progress, share of its range")
    panels[0].set_ylabel("share of the questions")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right center", fontsize=8)
    who, found = settings.who_labels(config), of(rows, config.stages, 0.0)
    figure.suptitle(f"{config.env}, labels from: {who}\n{verdict(found, faults(found))}", fontsize=10, wrap=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path


# ---- the script ----
def audit(config, pairs=100, policy=None):
    """Draw, ask, sum up, write the folder -> a dict.

    verdict: one line.  faults: {name: advice}.  rows: of audit.csv.  text: of audit.txt.  folder, image: paths.
    """
    if pairs < 1:
        raise settings.UserError(f"--pairs {pairs}: at least one pair")
    if config.resume or config.labels != "vlm" or config.reward not in settings.FROM_PAIRS:
        raise settings.UserError("an audit asks a VLM to compare images: leave out --resume, --labels and --reward")
    if config.out is None:
        name = f"audit-{config.env}-{config.vlm}-seed{config.seed}-{time.strftime('%Y%m%d-%H%M%S')}"
        config = dataclasses.replace(config, out=os.path.join("runs", name.replace("/", "_").replace(":", "_")))
    if os.path.exists(config.out):
        raise settings.UserError(f"{config.out} exists already; choose another --out, and what was answered before is "
                                 "found in the vlm_cache beside it")
    config, env, _ = prepare(config)
    rng = np.random.default_rng(config.seed)
    labeler = make_labeler(config)  # before the folder is made: a wrong key or an unknown goal leaves nothing behind
    try:
        images, progress, observed, kinds = collect(config, env, policy, rng)
        side, number = sides(observed, progress)
        chosen, gap = draw_pairs(images, progress, pairs, rng)
        os.makedirs(config.out)
        write_json(os.path.join(config.out, "config.json"), {
            **dataclasses.asdict(config), "labeler": settings.who_labels(config), "pairs": len(chosen),
            "policy": policy})
        records = ask_all(config, labeler, images, progress, side, chosen, gap)
    finally:
        labeler.close()
    rows = summaries(records, settings.price_of(config), (progress.min(), progress.max()))
    text, found = describe(rows, config, kinds, number), of(rows, config.stages, 0.0)
    advice = faults(found, number)
    with open(os.path.join(config.out, "audit.txt"), "w") as file:
        file.write(text + "\n")
    with open(os.path.join(config.out, "audit.csv"), "w", newline="") as file:
        writer = csv.DictWriter(file, ["labeler", "env", *max(rows, key=len)], restval="", lineterminator="\n")
        writer.writeheader()
        for row in rows:
            numbers = {name: f"{value:.6g}" if isinstance(value, float) else value for name, value in row.items()}
            writer.writerow({"labeler": settings.who_labels(config), "env": config.env, **numbers})
    image = draw(os.path.join(config.out, "audit.png"), rows, config)
    return {"verdict": verdict(found, advice), "faults": advice, "rows": rows, "text": text, "folder": config.out,
            "image": image}


def parse_args(arguments):
    """The shell's flags -> (Config, pairs, policy). Every flag of train.py means here what it means there."""

    def fail(message):
        raise settings.UserError(message)

    parser = argparse.ArgumentParser(prog="python -m tools.audit_vlm", allow_abbrev=False,
                                     description=(__doc__ or "").partition("\n")[0],
                                     epilog="Also every flag of train.py: see python train.py --help. Those of the "
                                            "schedule change nothing but the projected cost of a run.")
    parser.error = fail
    parser.add_argument("--pairs", type=int, default=100, help="pairs to ask, each four times (default: 100)")
    parser.add_argument("--policy", help="a run folder of train.py, whose policy is the half-trained one")
    own, others = parser.parse_known_args(arguments)
    try:
        return settings.parse_args(others), own.pairs, own.policy
    except settings.UserError as error:
        more = ", --pairs, --policy" if "unrecognized" in str(error) else ""
        raise settings.UserError(f"{error}{more}") from None


def main(arguments=None):
    import vlm_query

    try:
        result = audit(*parse_args(sys.argv[1:] if arguments is None else arguments))
    except (settings.UserError, vlm_query.VLMError) as error:
        print(f"audit_vlm.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("audit_vlm.py: interrupted; all answers so far are kept: the same command with another --out goes on",
              file=sys.stderr)
        return 2
    print(f"{result['text']}\n{result['image']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
