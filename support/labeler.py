"""Who answers: a VLM over HTTP, the offline stand-in, the oracle, a function of yours, or answers that were kept.

What this is: STEP 3 of train.py, all but the question itself, which is in vlm_query.py. Every answer goes into the log
of
the run (labels.jsonl) and every pair into its folder (pairs/) before anything is learned from it.
Which STEPs: 3 ask the VLM which image is closer to the goal.
Differs from the paper: an oracle and a stand-in can answer in place of a VLM; every banner says who did.
Shapes: M pairs asked, L pairs that got a label, S and P pixels.  Names: Labeler, ScoreLabeler, make_labeler.

To use it elsewhere: support/run.py shows how a labeler is made; the header of vlm_query.py shows how to ask without
one.
"""
import json
import os

import imageio
import numpy as np

import vlm_query
from support import cached_labels, judges, offline_vlm, settings, yours
from support.settings import UserError

# Counts of a batch that are added up as they are: those that vlm_query gives, and those that __call__ adds.
ADDED = ("asked", "unsure", "unreadable", "no_answer", "identical", "contradicted", "first", "second", "clear",
         "clear_right")


class Labeler:
    """labeler(images, pairs, step, rng) -> the pairs that got a label: first, second (L, S, S, 3) uint8, y (L,) 0 or 1.

    soft: y is vlm_query.p_second, from 0 to 1, in place of the label, wherever it is known.
    vlm: a vlm_query.VLM, or None: the oracle answers, from true progress.  mistakes: share of wrong answers of the
    oracle.  judge: of support/judges.py, as which the oracle errs instead, or None.
    function: yours.Judge, your own function in place of a VLM, or None.
    kept: (first, second, label) of answers that are there already; all of them are given at the first call.
    log: the LabelLog of the run, and folder: where images of pairs are written; the run hands them over when it has
    them.
    both_orders: each pair is asked both ways round, as two questions, and has a label if the answers agree.
    counts: asked, labels, unsure, unreadable, no_answer, identical, contradicted; `right` of `judged` labels by true
    progress; how many answers were "the first" and "the second"; and `clear_right` of `clear` labels, those of the half
    of a session's pairs that differ most in progress, where who reads the goal the wrong way round is soon found out.
    """

    COUNTS = ("asked", "labels", "unsure", "unreadable", "no_answer", "identical", "contradicted", "right", "judged",
              "first", "second", "clear", "clear_right")

    def __init__(self, goal, vlm=None, stages=2, workers=8, max_pairs=1000, mistakes=0.0, kept=None, server=None,
                 judge=None, soft=False, both_orders=False, function=None):
        self.goal, self.vlm, self.stages, self.workers = goal, vlm, stages, workers
        self.soft, self.both_orders = soft, both_orders
        self.max_pairs, self.mistakes, self.kept, self.server = max_pairs, mistakes, kept, server
        self.judge, self.function = judge, function
        self.counts = dict.fromkeys(self.COUNTS, 0)
        self.exhausted = False  # a limit on calls or money was reached: training goes on with the reward there is
        self.log, self.folder, self.logged = None, None, 0  # logged: lines in labels.jsonl

    def __call__(self, images, pairs, step, rng):
        """STEP 3 for M pairs (M, 2) of rows in images, an ImageBuffer.  step: for the log.  rng: for the oracle."""
        if self.kept is not None:
            self.exhausted = True
            self.counts.update(asked=len(self.kept[2]), labels=len(self.kept[2]))
            return self.kept
        if self.both_orders:  # M pairs are 2 M questions: each pair, and then the same turned round
            pairs = np.stack([pairs, pairs[:, ::-1]], 1).reshape(-1, 2)
        before, after = images.progress[pairs[:, 0]], images.progress[pairs[:, 1]]  # (M,) true progress, for the books
        true_labels = vlm_query.oracle_labels(before, after, rng)
        first, second = images.large[pairs[:, 0]], images.large[pairs[:, 1]]  # (M, P, P, 3)
        p_second = np.full(len(pairs), np.nan, np.float32)  # (M,)

        def log(record):
            pair = record.pop("pair")
            p_second[pair] = record.get("p_second", np.nan)
            turned = {"turns_round": self.start + pair - 1} if self.both_orders and pair % 2 else {}
            self.write(pair, np.hstack([first[pair], second[pair]]),
                       {"step": step, **turned, **record, "true_label": int(true_labels[pair]),
                        "progress": [float(before[pair]), float(after[pair])]})

        self.start = self.logged
        if self.function:
            labels, counts = self.function(first, second, self.goal, log)
        elif self.vlm is None:
            labels = vlm_query.oracle_labels(before, after, rng, self.mistakes)
            if self.judge:
                labels = np.array(judges.label_by_progress(self.judge, images.progress[:len(images)], before, after,
                                                           first, second), np.int8)
            for pair, label in enumerate(labels):
                log({"pair": pair, "label": int(label), "kind": "label" if label >= 0 else "unsure", "answers": []})
            counts = {"asked": len(labels), "unsure": int((labels == -1).sum())}
        else:
            labels, counts = vlm_query.label_pairs(self.vlm, first, second, self.goal, self.stages, self.workers, log)
        y = np.where(np.isnan(p_second), labels, p_second) if self.soft else labels  # (M,)
        counts.update(first=int((labels == 0).sum()), second=int((labels == 1).sum()))
        difference = np.abs(after - before)  # (M,)
        if self.both_orders:
            # What a VLM answers whatever it is shown, it answers in both orders. So a label is what both agree on.
            labels, turned = labels[::2], labels[1::2]  # (M,) each
            counts["contradicted"] = int(((labels >= 0) & (turned == labels)).sum())
            labels = np.where((labels >= 0) & (turned == 1 - labels), labels, -1)
            y, pairs, true_labels = (y[::2] + 1 - y[1::2]) / 2, pairs[::2], true_labels[::2]
            difference = difference[::2]
        judged, right = (labels >= 0) & (true_labels >= 0), labels == true_labels  # (M,) each
        clear = judged & (difference >= np.median(difference[judged])) if judged.any() else judged
        counts.update(clear=int(clear.sum()), clear_right=int((clear & right).sum()))
        self.count(counts, labels=labels >= 0, judged=judged, right=right)
        usable = labels >= 0
        return images.small[pairs[usable, 0]], images.small[pairs[usable, 1]], y[usable]

    def write(self, number, image, record):
        """Question `number` of this session: its image into pairs/, its record into labels.jsonl."""
        index = self.start + number
        imageio.imwrite(os.path.join(self.folder, f"{index:06d}.png"), image)
        self.log.append({"index": index, **record})
        self.logged += 1

    def count(self, counts, labels, judged, right):
        """counts: of vlm_query.  labels, judged, right: (M,) bool, for each question."""
        self.exhausted = counts.get("limit", 0) > 0
        for name in ADDED:
            self.counts[name] += counts.get(name, 0)
        self.counts["labels"] += int(labels.sum())
        self.counts["judged"] += int(judged.sum())
        self.counts["right"] += int(right[judged].sum())

    def room(self, pairs):
        """How many pairs may be asked about in this session, which the schedule gives so many questions: `pairs`."""
        over = self.exhausted or is_stuck(self.counts)
        questions = 0 if over else max(0, min(pairs, self.max_pairs - self.counts["asked"]))
        return questions // 2 if self.both_orders else questions

    def accuracy(self):
        return self.counts["right"] / self.counts["judged"] if self.counts["judged"] else float("nan")

    def usd(self):
        return self.vlm.usd if self.vlm else None

    def row(self):
        """What metrics.csv says about the labels so far."""
        names = {"pairs_asked": "asked", **{name: name for name in self.COUNTS[1:7]}}
        return {**{column: self.counts[name] for column, name in names.items()}, "label_accuracy": self.accuracy()}

    def state_dict(self):
        return {"counts": dict(self.counts), "exhausted": self.exhausted, "vlm": self.vlm and self.vlm.state_dict()}

    def load_state_dict(self, state):
        self.counts = {**dict.fromkeys(ADDED[5:], 0), **state["counts"]}  # an older run did not count these
        if self.vlm:
            self.vlm.load_state_dict(state["vlm"])
        # a limit may have been raised since
        self.exhausted = state["exhausted"] and not (self.vlm and self.vlm.room(self.stages))

    def close(self):
        if self.server:
            self.server.stop()


def is_stuck(counts):
    """Is the answer always the same, whatever is shown? Then no more is asked, for such answers say nothing.

    At least 60 answers, of which at most one in a hundred is another. The order of each pair is random, so whoever
    looks says "the first" about half of the time. A VLM that leans, so that nine in ten of its answers are the same,
    can still be learned from; its first 60 are all the same in two runs of a thousand.
    """
    said = counts["first"] + counts["second"]
    return said >= 60 and 100 * min(counts["first"], counts["second"]) <= said


class ScoreLabeler(Labeler):
    """VLM Score, the paper's baseline: the VLM sees one image at a time and gives it a number from 0 to 1."""

    def __call__(self, images, pairs, step, rng):
        """-> images (L, S, S, 3), None, scores (L,): of the images in the pairs, as many as there are pairs."""
        rows = np.array(list(dict.fromkeys(pairs.T.ravel().tolist()))[:len(pairs)])  # no image twice
        large, progress, self.start = images.large[rows], images.progress[rows], self.logged

        def log(record):
            number = record.pop("image")
            self.write(number, large[number], {"step": step, **record, "progress": [float(progress[number])]})

        scores, counts = vlm_query.score_images(self.vlm, large, self.goal, self.stages, self.workers, log)
        known = np.isfinite(scores)
        # right: the share of neighbours in this batch whose scores are in the true order
        order = np.diff(scores[known]) * np.diff(progress[known])  # (L - 1,), above 0: the true order
        self.count(counts, labels=known, judged=order != 0, right=order > 0)
        return images.small[rows[known]], None, scores[known]


def make_labeler(config, judge=None):
    """Whoever the settings name, ready to be asked. UserError, in one line, where that is not possible.

    judge: your function, where the settings say so (support/yours.py).

    Where nothing has to be asked (a reward that needs no VLM), the labeler has none. VLM-CaR asks its `vlm` itself.
    """
    flaws, kept, compares = settings.flaws_of(config), None, config.reward in (*settings.FROM_PAIRS, "score")
    folder, kind = settings.kept_folder(config), settings.labels_kind(config)
    if folder and compares:
        try:
            *kept, source = cached_labels.read_labels(folder, config.reward_image_size)
            settings.say(f"{len(kept[2])} labels from {source}")
        except cached_labels.CachedLabelsError as error:
            raise UserError(f"--labels {error}") from None
    vlm, server = None, None
    if kind == "vlm" and (compares or config.reward == "code"):
        vlm, server = make_vlm(config, flaws)
    make = ScoreLabeler if config.reward == "score" else Labeler
    goal = config.goal + settings.MOMENTS * (config.frames == 2)
    return make(goal, vlm, config.stages, config.workers, config.max_pairs, flaws["mistakes"], kept, server,
                settings.judge_of(config), bool(config.soft_labels), bool(config.both_orders),
                None if judge is None else yours.make_judge(judge, config))


def make_vlm(config, flaws):
    """-> the VLM, which has told black from white, and its server if it is the stand-in, which runs in this process."""
    name, url, server = settings.vlm_name(config), config.vlm_url, None
    if name == "offline":
        if config.goal not in offline_vlm.READERS:
            raise UserError(f'the offline stand-in is not a VLM and knows only these goals: '
                            f'{"; ".join(offline_vlm.READERS)}. For "{config.goal}" name a real one with --vlm')
        judge = settings.judge_of(config)
        if judge and judge.blind and not offline_vlm.READERS[config.goal].sides:
            raise UserError(f"--vlm {config.vlm[:60]}: a judge that is blind on one side needs a task that has sides, "
                            "such as CartPole")
        server = offline_vlm.OfflineVLM(**{flaw: flaws[flaw] for flaw in settings.FLAWS}, seed=config.seed, judge=judge)
        name, url = f"offline/{server.model}", server.start()
    # One cache for all runs beside each other: a question that was paid for once is never paid for again.
    cache = os.path.join(os.path.dirname(os.path.abspath(config.out)), "vlm_cache")
    vlm = vlm_query.VLM(name, url=url, cache=cache, workers=config.workers, max_calls=config.max_calls,
                        extra=json.loads(config.vlm_extra), max_usd=config.max_usd,
                        usd_per_mtok=settings.price_of(config), timeout=(10, config.timeout),
                        deadline=max(300, 2.5 * config.timeout),  # time for a second try, and a third
                        logprobs=bool(config.soft_labels))
    vlm.check_sight()
    return vlm, server
