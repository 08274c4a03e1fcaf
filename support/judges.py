"""A small model of how a real VLM errs, so that the offline stand-in and the oracle can err like one.

What this is: published tests of VLMs on RL-VLM-F's own question say that most errors are not the toss of a coin. A
model leans to one side ("the second", whatever the images are), is confused by particular pairs, and is the less
reliable the less two images differ. Which STEPs: 3, in place of a VLM. It is no VLM: who_labels() in settings.py says
in every banner that the errors are simulated, and from what. With D in [-1, 1] the merit of the second image less that
of the first, over the task's range (so D > 0: the second is closer to the goal):

    score = slope D + lean + spread z(pair) + jitter z(first, second)                                         (1)
    label = -1 (unsure) if |score| < doubt, else 1 if score > 0, else 0

  slope   how well it sees; below 0 it reads the goal the wrong way round
  lean    the side that it prefers, whatever it is shown: above 0 the second image
  spread  confusion by a pair. z(pair) changes its sign when the pair is turned round, so the same image is preferred in
          both orders: asking both orders does not help against it
  jitter  confusion by an order of a pair. z(first, second) has nothing to do with z(second, first)
  blur    share of the range: nearer to the goal than this, all images look alike to it
  blind   left or right: how far something leans to this side it does not see, and guesses, once for each image: upright
          for three of four, fallen for the others (for tasks whose images have sides)

z are standard normal numbers, drawn from hashes of the seed, the goal and the images: the same pair in the same order
always gets the same answer, in one stage or in two. Of pairs that differ by |D|, signal detection measures
    d' = z(share "second" where it is) - z(share "second" where it is not) = 2 slope |D| / sqrt(spread^2 + jitter^2)
    lean = half the sum of the two                                         (over that same root)                (2)

Assumptions, which no source settles: noise has variance 1, spread^2 + jitter^2 = .36 + .64 (how much of it belongs to
the pair differs from judge to judge: in fits to three tiny neural ones from less than nothing to .6); the pairs of the
published tests differ by a median |D| of .2; noise does not depend on |D|.

Shapes: none, plain numbers.  Names: Judge, make, read, announce, from_rates, label_by_progress; PRESETS, PUBLISHED.

To use it elsewhere:
    from support import judges
    judge = judges.make({"judge": "gemini-2.0-flash"}, goal="to open the drawer")
    print(judge, judge.label((0.9, 0.7), ("an image", "another")))  # the second is nearer to the goal
"""
import dataclasses
import hashlib
import math
import re
from statistics import NormalDist

# ---- what is published ----
# VLM-AR3L (github.com/1224K/VLM-AR3L at cba2220, VLM/result/*/accuracy.txt): 50 pairs of either label for each task,
# one call, two answers, no "unsure". Shares of right answers where the second image is better, and where it is not.
# Of MiniCPM's two runs this is the second one. Some pairs of "it is not" are ties, so true slopes are a little steeper.
DRAWER = "to open the drawer"
SOCCER = "to move the soccer ball into the goal"
SWEEP = "to minimize the distance between the green cube and the hole"
PUBLISHED = {
    model: dict(zip((DRAWER, SOCCER, SWEEP), rates)) for model, rates in {
        "gemini-1.5-flash": ((.54, .96), (.36, 1.00), (.60, .92)),
        "gemini-2.0-flash": ((.96, .28), (1.00, .00), (1.00, .72)),
        "qwen2.5-vl-7b": ((.98, .22), (.70, .24), (.78, .76)),
        "qwen2.5-vl-3b": ((.22, 1.00), (.00, 1.00), (.00, 1.00)),
        "minicpm-v-2.6": ((.72, .76), (.54, .26), (.88, .84)),
        "internvl2-8b": ((.00, 1.00), (.00, 1.00), (.00, 1.00)),
        "internvl2.5-8b": ((.30, .98), (.02, .94), (.04, 1.00)),
        "internvl2.5-8b-mpo": ((.76, .48), (.20, .80), (.12, .96)),
        "deepseek-vl2-tiny": ((.16, .96), (1.00, .00), (1.00, .00)),
        "phi-3.5-vision": ((.92, .16), (.10, .94), (.66, .72)),
        "phi-4-multimodal": ((1.00, .00), (.10, .34), (1.00, .38)),
    }.items()
}
PAIRS, MEDIAN = 50, 0.2  # pairs of either label behind a rate; the |D| that they are taken to have

# Kinds of judges. `slope` and `lean` are round numbers for what is found among the 33 cells of PUBLISHED, but for the
# last two: these are fitted to tiny neural judges that were trained on images of CartPole and then asked 500 pairs in
# both orders, in two stages. blurry has its shares of right answers within .04 everywhere; one-sided within .16.
PRESETS = {
    "good": {"slope": 8.0, "lean": 0.2, "doubt": 0.3},  # Gemini 2.0 Flash on sweep-into, without its lean: a guess
    "weak": {"slope": 1.3, "lean": 1.3},  # the median cell
    "leans-second": {"slope": 3.0, "lean": 1.1},  # Gemini 2.0 Flash and Qwen2.5-VL-7B on drawer-open
    "leans-first": {"slope": 4.5, "lean": -0.9},  # Gemini 1.5 Flash, the mean of its tasks
    "stuck": {"slope": 0.0, "lean": -5.0},  # always "the first", as InternVL2-8B
    "inverted": {"slope": -2.7, "lean": 0.4},  # Phi-4 (-4.1) and MiniCPM (-1.3) on soccer
    "blurry": {"slope": 25.0, "lean": 1.9, "blur": 0.18},  # within 5 degrees of 30 it says "the second"
    "one-sided": {"slope": 9.0, "spread": 0.0, "jitter": 1.0, "blind": "right"},  # had never seen a pole lean right
}
NEURAL = ("blurry", "one-sided")
RANGES = {"slope": (-100, 100), "lean": (-100, 100), "spread": (0, 100), "jitter": (0, 100), "doubt": (0, 100),
          "blur": (0, 1)}
UPRIGHT, FALLEN = 0.75, 0.7  # on its blind side: the share guessed to be upright, and how far away the others are put
WORDS = ("judge", *RANGES, "blind")  # what may be written after offline: and oracle:


def from_rates(second, first, pairs=PAIRS, difference=MEDIAN):
    """Shares of right answers where the second image is better, and where it is not -> slope, lean, by (2).

    With (k + .5) / (n + 1) for a share k / n, so that 0 and 1 stay finite; and with noise of variance 1.
    Example: from_rates(.96, .28) -> 2.71, 1.11: of pairs with |D| = .2 it calls 95 % right, and 28 %.
    """
    z = [NormalDist().inv_cdf((round(share * pairs) + 0.5) / (pairs + 1)) for share in (second, 1 - first)]
    return (z[0] - z[1]) / (2 * difference), (z[0] + z[1]) / 2


# ---- the judge ----
def chance(*what):
    """A number in (0, 1) that depends on nothing but its arguments."""
    digest = hashlib.sha256("\0".join(map(str, what)).encode()).digest()
    return (int.from_bytes(digest[:6], "big") + 0.5) / 2**48


def normal(*what):
    """The same, standard normal."""
    return NormalDist().inv_cdf(chance(*what))


@dataclasses.dataclass(frozen=True)
class Judge:
    """Equation (1). Its fields are explained in the header; draw: what its noise is drawn from, with the images."""

    slope: float = 8.0
    lean: float = 0.0
    spread: float = 0.6
    jitter: float = 0.8
    doubt: float = 0.0
    blur: float = 0.0
    blind: str = ""
    name: str = ""
    draw: tuple = ()

    def difference(self, away, images, sides=("", "")):
        """D as the judge sees it, in [-1, 1]; 0 where it sees nothing in an image.

        away: how far each image is from the goal, as a share of the range: 0 at the goal, nan if nothing is seen.
        images: two texts that stand for them, such as hashes of their bytes.  sides: "left", "right" or "", to which
        they lean.  blur and blind change what is seen, x = away:
            x := 0, or FALLEN, where the side is `blind`;    then x := max(x, blur);    D = x(first) - x(second)
        Example: with blur .2, away (.1, .15) -> 0 and (.3, .1) -> .1.
        """
        seen = [self.guess(image) if side and side == self.blind else x for x, image, side in zip(away, images, sides)]
        if self.blur:  # trap: without the if, what is beyond the goal (a drawer pulled past its stop) would change too
            seen = [max(x, self.blur) for x in seen]
        difference = seen[0] - seen[1]
        return min(1.0, max(-1.0, difference)) if math.isfinite(difference) else 0.0

    def guess(self, image):
        """How far from the goal it takes an image to be that leans to its blind side."""
        return 0.0 if chance("blind", *self.draw, image) < UPRIGHT else FALLEN

    def score(self, difference, images):
        """Equation (1).  images: the two texts, in their order."""
        first, second = images
        turned = (first < second) - (first > second)  # 1, or -1 for the same pair turned round; 0 for one image twice
        return (self.slope * difference + self.lean
                + self.spread * turned * normal("pair", *self.draw, *sorted(images))
                + self.jitter * normal("order", *self.draw, first, second))

    def label(self, away, images, sides=("", "")):
        """-> 1: the second is closer to the goal, 0: the first, -1: unsure.  For the arguments see above."""
        score = self.score(self.difference(away, images, sides), images)
        return -1 if abs(score) < self.doubt else int(score > 0)


def key(image):
    """(H, W, 3) uint8 -> the text that stands for it where noise is drawn."""
    return hashlib.sha256(image.tobytes()).hexdigest()


def label_by_progress(judge, seen, before, after, first, second):
    """Labels of an oracle that errs like the judge -> list of M in {0, 1, -1}.

    before, after (M,): true progress of the images first, second (M, H, W, 3).  seen (N,): true progress of all images
    that may be asked about. An oracle does not know which progress is the goal, so what counts as the range is what the
    run has seen so far, and as the goal the best of it: early in a run a small step looks large, as it does to a VLM
    that is shown nothing else. Progress has no sides. Ties are answered too, as VLMs do; unknown progress is unsure.
    """
    known = [float(progress) for progress in seen if math.isfinite(progress)]
    best, width = max(known, default=0.0), max(known, default=0.0) - min(known, default=0.0) or 1.0
    return [judge.label([(best - float(progress)) / width for progress in pair], [key(image) for image in images])
            if all(map(math.isfinite, pair)) else -1 for *pair, images in zip(before, after, zip(first, second))]


# ---- a judge in words: offline:judge=weak, oracle:slope=3,lean=1.1 ----
def read(word, text):
    """The value after `word=` -> text or float. ValueError, in one line, if there is no such value."""
    if word == "judge":
        if text not in (*PRESETS, *PUBLISHED):
            raise ValueError(f"there is no judge {text[:40]!r}; there are {', '.join((*PRESETS, *PUBLISHED))}")
        return text
    if word == "blind":
        if text not in ("left", "right"):
            raise ValueError("blind= is left or right")
        return text
    low, high = RANGES[word]
    if not re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?", text, re.IGNORECASE) or not low <= float(text) <= high:
        raise ValueError(f"{word}= is a number from {low} to {high}")
    return float(text)


def make(words, goal="", seed=0):
    """{"judge": name, "slope": number, ...} -> Judge, or None if no word is there. Numbers go before the preset's.

    A published model has the slope and lean of the task with this goal. Of any other task nothing is published: there
    it has the means of its three.
    """
    words = {word: value for word, value in words.items() if word in WORDS}
    if not words:
        return None
    name = words.pop("judge", "")
    if name in PUBLISHED:
        cells = {task: from_rates(*rates) for task, rates in PUBLISHED[name].items()}
        mean = [sum(numbers) / len(cells) for numbers in zip(*cells.values())]
        words = {**dict(zip(("slope", "lean"), cells.get(goal, mean))), **words}
    return Judge(**{**PRESETS.get(name, {}), **words}, name=name, draw=(seed, goal))


def announce(words):
    """What every banner says of a judge: {"judge": "weak"} -> "errors simulated from published figures, judge weak"."""
    name = words.get("judge", "")
    source = f" from {'a tiny neural judge' if name in NEURAL else 'published figures'}" if name else ""
    parts = ([f"judge {name}"] if name else []) + [f"{word}={words[word]:.12g}" if word in RANGES else
                                                   f"{word}={words[word]}" for word in WORDS[1:] if word in words]
    return f"errors simulated{source}, {', '.join(parts)}"
