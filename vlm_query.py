"""Ask a vision-language model (VLM) which of two images is closer to a goal, over plain HTTP.

What this is: STEP 3 of RL-VLM-F (arXiv 2402.03681). M pairs of images and a goal in words go in, M labels y come out:
    y = 0    the first image is closer to the goal
    y = 1    the second image is closer
    y = -1   the VLM says that it cannot tell ("unsure")
    y = -2   there is no label. The counts say why: "unreadable", "no answer", "identical" or "limit"

The idea of two stages: call 1 shows both images and asks for a comparison in words. Call 2 shows only these words and
asks for the label.

Part 1, the question: prompts, parsing, a batch of pairs. It needs nothing but a function `ask`. Beside the paper, this
part is all that you need to read.
Part 2, the wire: class VLM, one client for OpenAI's format (and all who copy it: Ollama, vLLM, llama.cpp, LM Studio,
SGLang), Gemini and Anthropic. It begins with a table of what can go wrong, and what the client does then.

Differs from the paper:
  1. The prompts are worded anew, because the official code has no licence. Each call asks for the same
     things as in the paper.
  2. Temperature 0 is sent to `local/` alone: such servers sample unless told not to, while some current hosted models
     refuse it. {"temperature": null} in `extra` leaves it out. A run is repeatable by the answers kept on disk.
  3. A failed call is no "-1". It is made again, and in the end counted as "no answer". If more than half of a batch
     comes to nothing, or the server is silent for a whole deadline, the run stops. The official client turns every
     failure into "-1", so it trains on after its key has expired.
  4. Pairs whose images look the same are not sent. The official client pays for their answers and drops them.
  5. The pairs of a batch are asked side by side, in threads. No label depends on which answer arrives first.
  6. On request (VLM(..., logprobs=True)) the log also has p_second, how likely the VLM found it that the second image
     is closer. It can stand for y in the loss: a soft label.

Shapes: M pairs, N images, H and W pixels. Images are (M, H, W, 3) uint8 RGB, labels (M,) int8, scores (N,) float64.
`ask` is a function that takes a list of str and (H, W, 3) images, and returns a Reply; or an object such as VLM, which
has that function as `.ask`, and `.room` to say how much may still be asked.

To use it elsewhere (with a real VLM, the third line is: ask = VLM("gemini/MODEL", cache="answers")):
    import numpy as np
    from vlm_query import VLM, Reply, label_pairs
    ask = lambda parts: Reply("1", "complete", tokens_in=9, tokens_out=1, cached=False)
    dark, light = np.zeros((4, 200, 200, 3), np.uint8), np.full((4, 200, 200, 3), 255, np.uint8)
    print(label_pairs(ask, dark, light, goal="to switch on the light"))
"""
import argparse
import base64
import contextlib
import email.utils
import fcntl
import hashlib
import http.client
import http.cookiejar
import ipaddress
import itertools
import json
import math
import os
import queue
import random
import re
import socket
import subprocess
import sys
import tempfile
import threading
import time
import unicodedata
import warnings
from collections import namedtuple
from pathlib import Path
from urllib.parse import quote, urlsplit

import imageio.v3 as iio
import numpy as np
import requests
import urllib3
from PIL import Image, ImageOps

# ==== Part 1: the question ====

# ---- STEP 3: ask the VLM which image is closer to the goal ----
# Call 1 is the two images and ANALYSE. Call 2 is NOTES, which quotes the answer to call 1, and ANSWER.
# With stages=1 there is one call: the two images, ANALYSE and ANSWER.
ANALYSE = """Both images show the same scene at two different moments. The goal is {goal}.
1. Describe what matters for this goal in Image 1.
2. Describe what matters for this goal in Image 2.
3. How do the two images differ with respect to the goal, and which of them is nearer to it?
"""
ANSWER = """Finish with one last line that holds a single number and nothing else:
0 if Image 1 is closer to the goal, 1 if Image 2 is closer to the goal,
-1 if it cannot be told or makes no difference."""
NOTES = """Someone looked at a scene with a goal in mind. The goal was {goal}. The notes:
<notes>
{notes}
</notes>
Judge from these notes alone.
"""
# The paper's baseline "VLM Score" shows one image and asks for a number, in two stages as well.
SCORE_ANALYSE = """The goal is {goal}. Describe what matters for this goal in the image, and how
far the goal has been reached.
"""
SCORE_ANSWER = """Finish with one last line that holds a single number and nothing else: a decimal
number from 0 (as far from the goal as can be) to 1 (the goal is fully reached)."""

# What `ask` returns. `text` is the answer. `end` says how it ended: "complete"; "cut off" (the output limit was met, or
# the model was still thinking); "refused" (by the model or by a filter); "empty" (there are no words in it); "failed"
# (the server's fault); or "unreachable: WHY" (there is no answer at all). `cached`: it was on disk and cost nothing.
# `p_second`: see p_second(); None where nobody knows it.
Reply = namedtuple("Reply", "text end tokens_in tokens_out cached p_second", defaults=[None])


class VLMError(Exception):
    """There is no point in asking on. One line: what happened, in the provider's words, and what to do about it."""

    def __init__(self, said):
        super().__init__(" ".join(printable(said).splitlines()))


class LimitReached(VLMError):
    """max_calls or max_usd is used up."""


def ask_one(ask, question, shown, goal, stages):
    """Ask about one pair, or one image -> its record for the log, and the parts of the last call.

    question: PAIR or SCORE.  shown: list of str and images, such as ["Image 1:", first, "Image 2:", second].

    Why two stages: a model that must name a number at once has had no chance to compare. In call 1 it looks, and writes
    freely. Call 2 holds no image, so it is cheap, and its answer is one short line that can be parsed. Two stages
    cost twice the calls. Some models gain from them and some do not: try both on pairs whose labels you know (the audit
    does).

    Example: call 1 shows both images and ANALYSE        -> "In Image 1 the drawer is shut. In Image 2 it is open."
             call 2 quotes that in NOTES and adds ANSWER -> "1"
    """
    began, value, kind = time.monotonic(), None, "no answer"
    if stages == 1:
        last = [*shown, (question.analyse + question.answer).format(goal=goal)]
        replies = [ask(last)]
    else:
        last = [*shown, question.analyse.format(goal=goal)]
        replies = [ask(last)]
        if replies[0].end == "complete":  # an analysis that was cut off is not sent to call 2
            notes = after_thinking(replies[0].text).strip()
            last = [NOTES.format(goal=goal, notes=notes) + question.answer]
            replies.append(ask(last))
    if replies[-1].end == "complete":
        value = question.parse(replies[-1].text)
        kind = "unreadable" if value is None else "unsure" if value == -1 else "label"
    return record_of(question, kind, value, replies, round(time.monotonic() - began, 3)), last


def record_of(question, kind, value=None, replies=(), seconds=0.0):
    """What the log keeps of one pair or image. kind: "label" (a score too), or one of KINDS.

    Example, of a pair in two stages: {"answers": ["In Image 1 the drawer ...", "1"], "ends": ["complete", "complete"],
    "label": 1, "kind": "label", "tokens_in": 1830, "tokens_out": 122, "cached": False, "seconds": 3.214}
    A label whose p_second() is known has that too: "p_second": 0.93.
    """
    soft = {"p_second": replies[-1].p_second} if kind == "label" and replies[-1].p_second is not None else {}
    return {"answers": [r.text for r in replies], "ends": [r.end for r in replies],
            question.value: question.none if value is None else value, "kind": kind, **soft,
            "tokens_in": sum(r.tokens_in for r in replies), "tokens_out": sum(r.tokens_out for r in replies),
            "cached": bool(replies) and all(r.cached for r in replies), "seconds": seconds}


# ---- reading a label: only from text that has one possible meaning ----
# trap: "Bild 1", "Option 1" and "Closer: 1" name the first image, but the label 1 is the second image. A list of such
# names is never complete. So LINE describes the lines that are understood, and all others are unreadable: that costs
# one question, while a label read wrong teaches the opposite in silence.
# One rule more: the last verdict in words about an image, anywhere in the answer, must agree with the number.
def parse_label(text):
    """The text of an answer -> 0, 1, -1, or None where it could mean anything else.

    "**0**" -> 0    "100% sure: 1" -> 1    "Image 1 wins: 0" -> 0    "<think>1</think>0" -> 0
    "0.5" -> None   "0 or 1" -> None       "Image 1." -> None        "Image 1 is closer to an open drawer.", "1" -> None
    """
    number, verdict = number_and_verdict(text, "label")
    label = {"0": 0, "1": 1, "-1": -1}.get(number)
    return label if label == -1 or verdict in (None, label) else None


def parse_score(text):
    """The text of an answer -> its number in [0, 1], or None: "Score: 0.7" -> 0.7, "70" and "7/10" -> None."""
    number, verdict = number_and_verdict(text, "score|rating")  # a verdict on two images belongs to another question
    return float(number) if number and verdict is None and "-" not in number and float(number) <= 1 else None


# Marks around what a model thinks.
THINK = r"""(?x) <(?:seed:)?(?:think|thinking|thought|reasoning)> | <\|begin_of_thought\|> | ◁think▷ | \[THINK\]
    | <\|START_THINKING\|> | <\|thinking\|> | (?:<\|channel>|<unused94>)thought"""
THOUGHT = r"""(?x) </(?:seed:)?(?:think|thinking|thought|reasoning)> | <\|end_of_thought\|> | ◁/think▷ | \[/THINK\]
    | <\|END_THINKING\|> | <\|/thinking\|> | <channel\|> | <unused95>"""
# Patterns of what drops out of an answer. ITEM: the number before an item of a list ("2. Bright.").
ITEM = r"(?m)^[ \t*]*\d+[.)][ \t*]+(?=[^\W\d])"
# TOKEN: </answer>, </s>, <|im_end|>, <end_of_turn>, <eos>, [/INST], ``` and their likes.
TOKEN = r"</\w+>|<[|｜](?!image)[^<>\n]*[|｜]>|<(?i:end_of_\w+|eo[st]|pad)>|\[/INST\]|```(?:[a-z]\w*)?"
# FRAME: Markdown, quotes, brackets and LaTeX around a number.
# trap: "[ ] 1" is a box that is not ticked, and "~~1~~" is crossed out. Both stay, so the line is not understood.
FRAME = r"""\\(?:boxed|text(?:bf)?|mathbf)|[*`$'"“”‘’«»\\]|[(\[{（【「『](?!\s*[\])}])|[)\]}）】」』]"""
# RULE: a whole line of it says nothing, such as "}", "---", or "### Human:" (whose turn it is next).
# trap: "-" may be the minus sign of a number in the next line, so it stays.
RULE = r"[\s{}().,=#>]*|\s*-{3,}\s*|(?i:[\s#]*(?:assistant|human|user):?\s*)"
# What stands for a minus sign: dashes of all kinds, and two words. "—1", "－1" and "minus 1" are all -1.
MINUS = r"[\u2010-\u2015\u2212\u207b\u2796\ufe63\uff0d]|\b(?i:minus|negative)\s+(?=1\b)"
# "Image 2 is closer to the goal than Image 1": the only thing said about images that a line with a number may hold.
CLOSER = r"""(?xi) \b(?:(?:since|because)[ ])? (?:image|picture)[ #]*([12])[ ]
    (?:(?:is|looks|seems|appears|clearly|much|slightly|far|a[ ]bit)[ ])* (?:closer|nearer|better|wins)\b
    (?:[ ]to[ ]the[ ]goal)? (?:[ ]than[ ](?:image|picture)[ #]*[12]\b)? [:,.]?[ ]?"""
# VERDICT finds more of them, in any sentence: "Image 1 is clearly the closer one", "The winner is Image 1". These can
# only forbid a number, so there is no harm in a long list.
VERDICT = r"""(?xi) (?:
      (?:image|picture)[ #]*([12]) (?:[ ](?:is|was|looks|seems|appears|gets|comes|would|to|be|the|one|that|much|far|a
      |bit|little|more|overall|\w+ly))*[ :,]* \b(?:closer|closest|nearer|nearest|better|best|wins|winner)\b
    | \b(?:closer|closest|nearer|nearest|better|best|winner|winning)\b (?:(?!score)[^.:=\n]){0,60}? (?:\bis|[:=])
      (?:[ :]|the|clearly|image|picture|number|\#)* \b([12])\b )"""
# WORSE: "Image 2 is worse" speaks for the other image, and "Neither is closer" for none.
WORSE = r"""(?xi) (?:image|picture)[ #]*([12]) (?:[ ](?:is|was|looks|seems|appears|the|much|far|\w+ly))*[ ]
      (?:worse|worst|farther|farthest|further|furthest|less)\b
    | \bneither\b [^.\n]{0,30} \b(?:closer|nearer|better)\b"""
# A whole line that says a number and nothing about an image. OWN is the word for this kind of number, such as "label".
LINE = r"""(?xi) (?:\#+[ ])? (?:
      (?:so|thus|therefore|hence)[,:]?[ ] | here(?:[ ]is|s)[ ]
    | (?:overall|finally|in[ ]conclusion|based[ ]on[ ]th(?:e|ese)[ ]notes(?:[ ]alone)?),[ ]
    | (?:i[ ]?a?m[ ])? (?:5[1-9]|[6-9]\d|100)%[ ](?:sure|certain|confident)[,:]?[ ]
    | (?:(?:the|my|final|last|correct|single|die|la)[ ])* (?:answer|number|result|output|response|final|OWN|line
      |conclusion|decision|verdict|antwort|réponse|respuesta|risposta|resposta|ответ|(?:最终)?答案|回答|答え|정답)
      (?:[ ](?:is|ist|es|est):?[ ]|是?[ ]?[:=：][ ]?|是) )*
    (?: (-?\d+(?:\.\d+)?) (?:[ ]\1)* )? [ .,;!。]*"""
# A line that is complete: a sentence, what one image shows ("Image 1: dark"), or a measure ("Certainty: 0.9"). Verdicts
# are complete too, and so are the numbers that LINE knows. All others may be headings.
# trap: a heading speaks of the number in the next line: "Closer image" and then "1" name the first image.
COMPLETE = r"""(?xi) (?!\#) (?: .*[^.…][.。][,;]? | (?:[-•+][ ])?image[ ][12]:[ ].*[^:：?？=,] | .*[:=][ ]-?\d[\d.]+%? )"""
# A line with -1 whose other words say that the images cannot be told apart: "They look alike: -1", "-1 (the same)".
UNSURE = r"""(?xi) (?!.*\bif\b) (?=.*\b(?:cannot|cant|neither|same|alike|identical|equally|unclear|impossible|none
    |no[ ](?:\w+[ ])?difference)\b) \D*-1\b\D*"""


def after_thinking(text):
    """What stands after the last </think> or its like; "" if the thinking never ended."""
    text = re.split(THOUGHT, text)[-1]
    return "" if re.search(THINK, text) else text


def with_headings(lines, number_line):
    """Each line comes after its headings: ["They differ.", "# Label:", "---", "1"] -> ["They differ.", "# Label: 1"]"""
    groups, heading = [], False
    for line in (" ".join(line.split()) for line in lines if not re.fullmatch(RULE, line)):
        if not heading:
            groups.append([])
        groups[-1].append(line)
        heading = not (re.fullmatch(COMPLETE, line) or re.search(VERDICT, line)
                       or (re.search(r"\d", line) and re.fullmatch(number_line, line)))
    return [": ".join([*(line.rstrip(" :：?？=") for line in group[:-1]), group[-1]]) for group in groups]


def number_and_verdict(text, own):
    """The number in the last line that holds any word, as it is written, or None; the last verdict, 0, 1 or None.

    own: for OWN in LINE.

    Worked example: "<think>1?</think>The second image is better, so the answer is: `1`.</s>"
      after_thinking()            -> "The second image is better, so the answer is: `1`.</s>"
      TOKEN takes </s> away       -> "The second image is better, so the answer is: `1`."
      FRAME takes ` away          -> "The second image is better, so the answer is: 1."
      images get their numbers    -> "Image 2 is better, so the answer is: 1."
      CLOSER matches "Image 2 is better, ", which says the label 1; the rest is "so the answer is: 1."
      LINE matches all of the rest: "so ", "the answer is: ", the number 1, and the full stop. It says 1 as well -> "1"
      VERDICT matches "Image 2 is better" -> 1
    "Image 1 is better: 1" says both 0 and 1 -> None. "Bild 1": LINE knows no "Bild", so nothing is said -> None.
    "Closer image" and in the next line "1" is read as "Closer image: 1" -> None.
    "Image 2 is worse." and in the next line "1": the number is "1", the verdict is 0, so parse_label() reads nothing.
    "Neither is closer." is the verdict -1, which agrees with no number but -1.
    """
    # Digits of all scripts become ours ("１", "١"); characters without a width (Unicode's category Cf, U+FE0F) go.
    # trap: an answer may have megabytes, so only its end is read.
    text = "".join(str(unicodedata.decimal(c, c)) for c in after_thinking(text)[-20_000:]
                   if unicodedata.category(c) != "Cf" and c != "\ufe0f")
    for pattern, replacement in (
            (MINUS, "-"), (ITEM, ""), (TOKEN, ""),
            (r"(?i)(?<=\d)[*`]* \(image ([12])\)", r" Image \1 is closer"),  # "1 (Image 2)"
            (FRAME, ""), (r"<(\w+)>", r"\1: "),  # "<answer>1" becomes "answer: 1"
            (r"(?i)\b(?:the )?first (?:image|picture|one)\b", "Image 1"),
            (r"(?i)\b(?:the )?second (?:image|picture|one)\b", "Image 2")):
        text = re.sub(pattern, replacement, text)
    number_line = LINE.replace("OWN", own)
    lines = with_headings(text.replace("_", " ").splitlines(), number_line)
    said_of = "\n".join(lines)
    # Where each verdict stands, and which label it says. The last one counts: models weigh both images, then decide.
    # -1 stands for "neither", and forbids 0 and 1 alike.
    found = [(match.start(), int(match[1] or match[2]) - 1) for match in re.finditer(VERDICT, said_of)]
    found += [(match.start(), 2 - int(match[1]) if match[1] else -1) for match in re.finditer(WORSE, said_of)]
    verdicts = [verdict for _, verdict in sorted(found)]
    if lines and re.fullmatch(UNSURE, re.sub(r"(?i)\b(images?|and|n?or) [12]\b", r"\1", lines[-1])):
        lines[-1] = "-1"
    number, said = None, set()  # said: every number that a line of the answer stands for
    for line in lines:
        shape = re.fullmatch(number_line, re.sub(CLOSER, "", line))
        number = shape and shape[1]
        if shape:
            said.update(float(image) - 1 for image in re.findall(CLOSER, line))
            said.update([float(number)] if number else [])
    # trap: after a line "0", a lone "1" is its confidence, a footnote, or a change of mind.
    return number if len(said) == 1 else None, verdicts[-1] if verdicts else None


# ---- soft labels: how sure was the VLM of its label? ----
# A number by itself. Group 1 says that it names an image: "Image 1". Not "10", "0.5", "h1".
OWN_NUMBER = r"(?i)((?:image|picture)[^a-z\d\n]*)?(?<![a-z\d.])(\d)(?![a-z\d]|\.\d)"
# A token that holds one digit and no other word: "1", " 1", "\n1", "1.". Not "-1", which is "unsure".
# trap: some servers write tokens as they stand in the vocabulary, where U+0120, a letter, is a space.
DIGIT_TOKEN = r"(?:[^\w-]|\u0120)*(\d)[^\w-]*"


def p_second(text, tokens):
    """P[the second image is closer] = P("1") / (P("0") + P("1")), read at the token that holds the label, or None.

    text: an answer.  tokens: for each of its tokens (the token, {each token that may have stood there: its natural
    log-probability}). They may hold more than the text: thoughts before it, a mark of its end after it.
    None where the text has no label 0 or 1, where its token is not found, or where nothing else may have stood there.

    Worked example: "Image 1 is shut.\\n1" ends with the tokens " shut", ".\\n", "1". parse_label() reads 1. The last 1
    that names no image is the last token. There may have stood {"1": log .6, " 1": log .1, "0": log .2, "-": log .1}:
        P("1") = .6 + .1, P("0") = .2  ->  .7 / .9 = .7778; "-" would have begun "-1", which speaks for neither image.

    Where the server samples, the label is one draw, and may be the less likely one: label 1 with p_second .3. Both are
    kept as they are; for a soft label p_second counts. With two stages it is the doubt of call 2 alone, so mostly near
    0 or 1: what call 1 was unsure of stands in the notes, if anywhere.
    """
    label = parse_label(text)
    # The label's place: the last such number by itself. Then which token has the same place, counted in characters.
    places = [m.start(2) for m in re.finditer(OWN_NUMBER, text) if not m[1] and int(m[2]) == label]
    token_of = [others for token, others in tokens for _ in token]  # (characters,)
    place = "".join(token for token, _ in tokens).rfind(text[places[-1]:].rstrip()) if places else -1
    if place < 0:
        return None
    p = [0.0, 0.0]  # of "0", of "1", each summed over "1", " 1" and so on
    for token, logprob in token_of[place].items():
        digit = re.fullmatch(DIGIT_TOKEN, token)
        if digit and digit[1] in "01" and logprob < 0.01:  # 0 is the most, but for rounding; nan is refused too
            p[int(digit[1])] += math.exp(logprob)
    return round(p[1] / sum(p), 4) if p[label] and len(token_of[place]) > 1 else None


# ---- a batch of questions, side by side ----
# An answer takes seconds, and nearly all of that is waiting. So the pairs of a query session are asked in threads,
# eight at a time by default. The order in which answers arrive changes no label, no record and no limit.

# A kind of question: its prompts, how to read the answer, how the log calls the value, what stands there for no value.
Question = namedtuple("Question", "analyse answer parse value none")
PAIR = Question(ANALYSE, ANSWER, parse_label, "label", -2)
SCORE = Question(SCORE_ANALYSE, SCORE_ANSWER, parse_score, "score", None)

# What may become of a question besides "label" (or a score). These are different things, so they are counted apart:
#   unsure      the VLM said -1, which is an honest answer
#   unreadable  the VLM answered, and we could not read a label in it
#   no answer   an outage, a refusal, an answer that is cut off or empty
#   identical   the two images look the same, so they were never sent
#   limit       calls or money were used up before this pair's turn
KINDS = ("unsure", "unreadable", "no answer", "identical", "limit")
USELESS = ("unreadable", "no answer")  # of these, too many mean that something is broken
MOST_WORKERS = 256


def label_pairs(ask, first, second, goal, stages=2, workers=8, log=None):
    """Labels for M pairs -> labels (M,) int8 in {0, 1, -1 unsure, -2 no label}, dict of counts.

    ask: a function parts -> Reply, or an object with `.ask` (the same function) and `.room(calls_each)`, the number of
    questions of so many calls each that may be asked before a limit is met. A VLM is such an object. Then the limit
    cuts the batch at the same pair on every run. If there is `.forget(parts)` too, it is called with the last call of
    each useless question before VLMError is raised, so that a run that goes on asks these again.
    first, second: (M, H, W, 3) uint8.  goal: completes "The goal is ...", such as "to open the drawer".
    stages: 2 calls a pair, or 1.  workers: threads, 1 to 256.
    log: called with one dict per pair as soon as its answer is known, one at a time (LabelLog.append is one).

    Raises ValueError for images of another shape or type; VLMError when more than half of at least 4 pairs asked got
    no usable answer, when the server answers nobody for as long as its deadline, and when asking on is hopeless.

    Example: three pairs, the two images of the last are equal, and ask always says "1" -> labels [1, 1, -2] and counts
    {"asked": 2, "identical": 1, "label1": 2, ...}.
    """
    check_images(first=first, second=second)
    if first.shape != second.shape:
        raise ValueError(f"images of one size, please, not {first.shape} and {second.shape}")
    items = [({"pair": i, "first": short_hash(one), "second": short_hash(two)},
              [] if looks_identical(one, two) else ["Image 1:", one, "Image 2:", two])
             for i, (one, two) in enumerate(zip(first, second))]
    records, counts = ask_batch(ask, PAIR, items, goal, stages, workers, log)
    labels = np.array([record["label"] for record in records], dtype=np.int8)  # (M,)
    return labels, {**counts, "label0": int((labels == 0).sum()), "label1": int((labels == 1).sum())}


def score_images(ask, images, goal, stages=2, workers=8, log=None):
    """The paper's VLM Score baseline: images (N, H, W, 3) uint8 -> (N,) float64 in [0, 1] or nan, dict of counts.

    The arguments and errors are those of label_pairs().
    """
    check_images(images=images)
    items = [({"image": i, "first": short_hash(image)}, ["Image:", image]) for i, image in enumerate(images)]
    records, counts = ask_batch(ask, SCORE, items, goal, stages, workers, log)
    scores = np.array([record["score"] for record in records], dtype=np.float64)  # (N,); None becomes nan
    return scores, {**counts, "scored": int(np.isfinite(scores).sum())}


def oracle_labels(score0, score1, rng, error_rate=0.0):
    """The paper's "GT Preference": (M,) true scores of both images -> (M,) int8: 1 where score1 > score0, else 0.

    error_rate: share of the labels that are turned round, in [0, 1].  rng: numpy Generator.
    -1 where the scores are equal, or one is not finite: nan is neither more nor less than any other number.
    Example: oracle_labels([0, 2, 1], [1, 1, 1], rng) -> [1, 0, -1]
    """
    score0, score1 = np.asarray(score0, float), np.asarray(score1, float)
    labels = (score1 > score0).astype(np.int8)  # (M,)
    flip = rng.random(len(labels)) < error_rate  # drawn for ties too, so that rng moves on by M in any case
    known = np.isfinite(score0) & np.isfinite(score1) & (score0 != score1)
    return np.where(known, labels ^ flip, -1).astype(np.int8)


def ask_batch(ask, question, items, goal, stages, workers, log):
    """Ask about all items, several at a time -> records in the order of the items, and their count().

    items: list of (dict that the record begins with, list of str and images to show). An empty list is never sent.
    """
    if stages not in (1, 2) or not 1 <= workers <= MOST_WORKERS:
        raise ValueError(f"stages must be 1 or 2, and workers at least 1 and at most {MOST_WORKERS}, "
                         f"not {stages}, {workers}")
    stop = threading.Event()  # once it is set, nothing new begins
    call, room = getattr(ask, "ask", ask), getattr(ask, "room", lambda calls_each: len(items))
    if hasattr(ask, "answer"):  # VLM.answer() is ask() without a look at the limits, and obeys `stop` while it waits
        call = lambda parts: ask.answer(parts, stop=stop)
    records, useless = [None] * len(items), []

    def keep(i, record):
        records[i] = {**items[i][0], "goal": goal, "stages": stages, **record}
        if log:
            log(records[i])

    for i, (_, shown) in enumerate(items):
        if not shown:
            keep(i, record_of(question, "identical"))
    todo = [i for i, (_, shown) in enumerate(items) if shown]
    # trap: with threads, "stop when the money is gone" depends on which thread is first. So the limits are looked at
    # between blocks of questions and never within a block. Which pairs are asked is then the same on every run.
    try:
        while todo and (block := todo[:room(stages)]):
            work = lambda i: ask_one(call, question, items[i][1], goal, stages)
            for i, (record, last_call) in in_threads(work, block, workers, stop):
                keep(i, record)
                if record["kind"] in USELESS:
                    useless.append(last_call)
            todo = todo[len(block):]
    finally:
        stop.set()  # after an error or Ctrl-C the threads begin nothing new
    for i in todo:
        keep(i, record_of(question, "limit"))
    try:
        return records, count(records)
    except VLMError:
        # trap: useless answers that are kept on disk would end every run that goes on from here in the same way.
        for parts in useless if hasattr(ask, "forget") else ():
            ask.forget(parts)
        raise


def in_threads(function, items, workers, stop):
    """function(item) for each item, in threads -> yields (item, result) as results come, in any order.

    An exception in a thread is raised here, after the other threads have finished what they were at. Only the caller's
    thread sees results, so records and log need no lock.
    """
    todo, done = iter(items), queue.SimpleQueue()

    def work():
        for item in todo:  # all threads draw from this one iterator, so each item goes to one thread
            if stop.is_set():
                return
            try:
                done.put((item, function(item), None))
            except BaseException as error:  # whatever it is, the caller must hear of it
                done.put((item, None, error))  # before `stop`, so that this error arrives before those that it causes
                stop.set()

    # concurrent.futures will not do: at Ctrl-C its threads hold up the exit, for a server that may take two minutes.
    threads = [threading.Thread(target=work, daemon=True) for _ in items[:workers]]
    for thread in threads:
        thread.start()
    for _ in items:
        item, result, error = done.get()
        if error:
            for thread in threads:  # trap: the answers under way are paid for, and not yet on disk
                thread.join()
            raise error
        yield item, result


def count(records):
    """Records -> dict of counts. VLMError if more than half of at least four questions came to nothing."""
    kinds = [record["kind"] for record in records]
    asked = [record for record in records if record["kind"] not in ("identical", "limit")]
    lost = [record for record in asked if record["kind"] in USELESS]
    if len(asked) >= 4 and 2 * len(lost) > len(asked):
        ends = [record["ends"][-1] if record["kind"] == "no answer" else
                f"unreadable, such as {' '.join(record['answers'][-1].split())[-80:]!r}" for record in lost]
        raise VLMError(f"{len(lost)} of {len(asked)} questions got no usable answer (mostly: "
                       f"{max(ends, key=ends.count)}); usable answers are kept: go on when the server answers again, "
                       "or with another --vlm-extra")
    return {"asked": len(asked), **{kind.replace(" ", "_"): kinds.count(kind) for kind in KINDS},
            **{name: sum(record[name] for record in records) for name in ("cached", "tokens_in", "tokens_out")}}


def looks_identical(first, second):
    """(H, W, 3) uint8 twice -> bool: no channel of any pixel differs by 8 of 255 or more.

    Rendering noise is 1 or 2. An edge of contrast 100 that moved by a tenth of a pixel gives 10.
    """
    # trap: uint8 differences wrap round: 0 - 1 = 255.
    return bool(np.abs(first.astype(np.int16) - second).max() < 8)


def short_hash(image):
    """A name for an image in the log: 16 hexadecimal digits, the same for the same pixels."""
    return hashlib.sha256(np.ascontiguousarray(image).tobytes()).hexdigest()[:16]


def check_images(**arrays):
    """Each array by its name. ValueError unless all are (N, H, W, 3) uint8."""
    for name, images in arrays.items():
        if getattr(images, "ndim", 0) != 4 or images.shape[-1] != 3 or images.dtype != np.uint8:
            raise ValueError(f"{name} must be (N, H, W, 3) uint8, not {np.shape(images)} "
                             f"{getattr(images, 'dtype', type(images).__name__)}")


# ==== Part 2: the wire ====
#
# What happens, and what this client does about it. Each line has a test for each wire format (tests/test_vlm_query.py,
# tests/test_wire.py, tests/test_answers.py), against the faults of the offline stand-in or of a server made for it.
#
# It passes, so the client asks again:
#   HTTP 408, 409, 425, 429 and all 5xx but 501, also with an HTML page as the body; an error object under HTTP 200.
#     It waits as long as the server says (Retry-After in seconds, fractions, milliseconds or a date; Gemini's
#     retryDelay). If the server says nothing, it waits a random part of 1, 2, 4, ... 60 seconds (full jitter). After a
#     429, or when the server named a time, all threads wait together.
#   A connection dropped before or inside the body, a hang, a body that drips, an answer of more than 4 MiB (packed or
#   unpacked), invalid JSON.
#     The same, until `deadline` (300 s). Then the pair has no answer.
#   Nobody is there: the connection is refused, the name is unknown, or what answers is no VLM.
#     The same, but for 15 s only if this server has never answered. Once it has, a restart has until the deadline.
#   The server is slow, or answers one request at a time.
#     The number of requests in flight adapts: it begins with 1, grows with quick answers, and halves after a timeout.
#     Time spent in the queue does not count against a question's deadline.
#   Silence: nobody in a batch had an answer from the moment when a question was asked until its deadline.
#     VLMError for the whole batch after this one deadline, not after one deadline per question.
#
# It does not pass, so the client stops at once:
#   Wrong key, no permission, bad request, unknown model, quota or money gone, a redirect, a web page for an answer.
#     VLMError with the provider's own words and what to do. --resume goes on from there.
#
# The server refuses temperature 0, or to tell the probabilities of tokens, and names it in its error:
#     It is said once, and asked without. So it is with probabilities that do not come: labels are then 0 or 1.
#
# It is an answer, and no label. These three are counted apart, and none of them becomes a label:
#   "no answer"   refused, filtered, cut off, empty, no choices, <think> that never ends, all of the text in
#                 reasoning_content; an end that is the server's fault ("error", "abort"). What is empty or the server's
#                 fault is not kept on disk, so it is asked again the next time.
#   "unsure"      "-1", also with another minus sign (U+2212).
#   "unreadable"  "0.5", "0 or 1", "Image 1", "0" and in the next line "Confidence: 1", "Image 1 is closer." and in the
#                 next line "1". A label is read only where it cannot be the opposite.
#
# It is a label: "<think>...</think> 1", "100% sure: 1" and "Image 2 is better: **1**" are all 1. The finish reason may
# be "stop", "eos", null or left out, because those who copy OpenAI's format have many words for a whole answer.
# The status may be 201, the statuses 102 and 103 may come before it, and the body may begin with U+FEFF.
#
# More than half of the pairs of a batch (of four or more) are "unreadable" or "no answer":
#     VLMError. --resume goes on, and asks these again. So nobody learns from noise unnoticed.
#
# 1,000 pairs with a fault in every fifth try get exactly the labels of a run without faults. Others witness that both
# sides speak the protocols: the SDKs `openai`, `anthropic` and `google-genai`, and `transformers serve` with a tiny
# vision-language model (tests/test_witness.py).

SIGHT_GOAL = "to make the picture as bright as possible"  # what check_sight() asks about
HTTP_ERRORS = (requests.RequestException, urllib3.exceptions.HTTPError)
TOO_LATE = (requests.ReadTimeout, urllib3.exceptions.ReadTimeoutError)


class Refused(VLMError):
    """An error of the server's that does not pass, in its own words."""


class Silence(TimeoutError):
    """Nobody had an answer since the question was asked: the fault is the server's, not the question's."""


class VLM:
    """One model behind one URL. Safe to call from several threads.

    name: "openai/MODEL", "gemini/MODEL", "anthropic/MODEL", "local/MODEL" (OpenAI's format, at `url`) or "offline".
    url: base of the server, where it is not the official one.  key: by default from the environment.
    cache: folder in which all answers are kept, so that none is paid for twice.  extra: merged into every body; where
    it says None, that field is left out.  logprobs: ask how likely the other label was, for Reply.p_second.
    workers: requests at the same time, at most.  timeout: seconds (to connect, for the whole answer).
    deadline: seconds after which a question is not tried again.
    max_calls, max_usd: limits; usd_per_mtok: dollars per million tokens (in, out), for usd and max_usd.
    Set `vlm.waits` to a function to hear when the server begins to fail us (True) and when it answers again (False).

    The totals count every answer that was used, also those from the cache, so that a repeated or resumed run meets its
    limits at the same pair. cached_calls of them were free.

    Raises VLMError for a name, URL, key, limit or folder that cannot work.
    Example: VLM("local/qwen2.5vl", url="http://localhost:11434/v1", cache="answers").ask(["Image 1:", image, "Dark?"])
    """

    soon = 15  # seconds for a server that is not there, or is no VLM's, and has never answered
    backoff = 1.0  # seconds; a wait is random() * min(60, 2**try) * backoff
    block = 16  # with max_usd, so many questions are asked before the money is counted again
    TOTALS = ("calls", "cached_calls", "tokens_in", "tokens_out")
    WITHOUT = {"temperature": "temperature 0: it is left out, and the same question may get another answer",
               "logprobs": "the probabilities of tokens (logprobs): labels without them are 0 or 1"}

    def __init__(self, name, url=None, key=None, cache=None, workers=8, max_calls=None, timeout=(10, 120), extra=None,
                 max_usd=None, usd_per_mtok=None, deadline=300, logprobs=False):
        provider, _, model = name.partition("/")
        if provider not in PROVIDERS:
            raise VLMError(f"unknown VLM {name!r}: use one of {', '.join(PROVIDERS)}, then /MODEL")
        self.wire, self.name = PROVIDERS[provider], name
        self.model = model or ("stand-in" if provider == "offline" else "")
        base = (url or self.wire.url or "").rstrip("/")
        if not is_base_url(base):
            raise VLMError(f"{name} needs its server's URL, such as http://localhost:11434/v1")
        if not self.model:
            raise VLMError(f"name the model too: {name}/MODEL")
        if not 1 <= workers <= MOST_WORKERS:
            raise VLMError(f"workers must be 1 to {MOST_WORKERS}, not {workers}")
        if max_usd is not None and usd_per_mtok is None:
            raise VLMError("max_usd needs usd_per_mtok: dollars per million tokens (in, out)")
        self._key = (key or os.environ.get(self.wire.variable) or "").strip()
        # trap: requests quotes a header that it cannot send, key included, in its own error message.
        if not re.fullmatch("[!-~]*", self._key) or (self.wire.url and not self._key):
            raise VLMError(f"{name} needs a key, without spaces: set {self.wire.variable}")
        self.url = base + self.wire.path.format(model=self.model)
        # A short key is a dummy, such as "none", and may be a word of any answer.
        self._secret = spellings(self._key) if len(self._key) >= 8 else None
        self.extra, self.timeout, self.deadline = extra or {}, timeout, deadline
        # What a body asks for beside the question, until the server refuses it. trap: threads read it, so it is never
        # changed, but replaced as a whole.
        self._wants = {"temperature": {} if "temperature" in self.extra else self.wire.greedy,
                       "logprobs": self.wire.logprobs if logprobs else {}}
        self.max_calls, self.max_usd, self.usd_per_mtok = max_calls, max_usd, usd_per_mtok
        self.cache = Path(cache) if cache else None
        if cache:
            try_folder(self.cache)
        self.load_state_dict(dict.fromkeys(self.TOTALS, 0))
        headers = self.wire.headers.items() if self._key else ()
        self._session = open_session(base, {header: value.format(key=self._key) for header, value in headers}, workers)
        self.waits = lambda waiting: None
        self._turns, self._lock = Turns(workers), threading.Lock()  # the lock is for the totals and for what follows
        self._not_before = 0.0  # no thread asks before this moment of time.monotonic()
        self._heard = self._warned = self._waiting = False  # ever an answer; ever a failed try; the last try failed
        self._silent_since = math.inf  # when the first try began that came after the last answer
        self._batch = None  # the `stop` of the batch that this clock is for
        self._missed = set()  # which of WITHOUT has been said
        if logprobs and not self.wire.logprobs:
            self._go_without("logprobs", "does not tell")

    def ask(self, parts):
        """parts: list of str | (H, W, 3) uint8, shown in that order -> Reply. Raises LimitReached, VLMError."""
        if not self.room():
            raise LimitReached(f"max_calls {self.max_calls} or max_usd {self.max_usd} is used up")
        return self.answer(parts)

    def check_sight(self):
        """Black against white, in both orders: did both images arrive, in that order? VLMError if not.

        A server that drops images, a model for text alone, a context cut short: all of these answer something.
        It makes two calls at each start, never from the cache: the server may be another one by now, or cured.
        On resume, call it before load_state_dict(): the totals loaded include it.
        """
        black, white = np.zeros((200, 200, 3), np.uint8), np.full((200, 200, 3), 255, np.uint8)
        cache, self.cache = self.cache, None
        try:
            for first, second, right in ((black, white, 1), (white, black, 0)):
                parts = ["Image 1:", first, "Image 2:", second, (ANALYSE + ANSWER).format(goal=SIGHT_GOAL)]
                reply = self.answer(parts, deadline=min(120, self.deadline))
                if reply.end != "complete":
                    raise VLMError(f"{self.name} gave no answer to the sight check: {reply.end}")
                if parse_label(reply.text) != right:
                    wrote = " ".join(reply.text.split())[-80:]
                    raise VLMError(f"{self.name} did not tell black from white (wanted {right}, it wrote {wrote!r}): "
                                   "does it see images, two, in order?")
        finally:
            self.cache = cache

    def room(self, calls_each=1):
        """How many questions, of so many calls each, may be asked before the limits are to be looked at again."""
        calls = sys.maxsize if self.max_calls is None else max(0, self.max_calls - self.calls)
        if self.max_usd is None:
            return calls // calls_each
        return min(calls // calls_each, self.block) if self.usd < self.max_usd else 0

    def forget(self, parts):
        """Remove the kept answer of this question, so that the next ask() asks anew."""
        file = self._question(parts)[1]
        if file:
            file.unlink(missing_ok=True)

    @property
    def usd(self):
        """What the answers used so far cost in dollars, or None without a price."""
        price = self.usd_per_mtok
        return (self.tokens_in * price[0] + self.tokens_out * price[1]) / 1e6 if price else None

    def state_dict(self):
        """The totals, for a checkpoint."""
        return {name: getattr(self, name) for name in self.TOTALS}

    def load_state_dict(self, totals):
        """totals: what state_dict() returned."""
        vars(self).update(totals)

    def answer(self, parts, deadline=None, stop=None):
        """ask() without its limits.

        stop: a threading.Event that the questions of a batch share. Once it is set, no try begins. With it, a server
        that is silent is a VLMError; without it, the Reply is "unreachable".

        The way of a question: _question() makes the body and names the file. If the file holds an answer, _read()
        reads it and nothing is sent. Otherwise alone() locks the question, and _send() asks: it waits (_wait), takes
        its turn (_turns), sends one request (_post), has the answer judged (_judge), and begins again if the fault may
        pass. _read() takes the words out of the JSON, and write_answer() puts the JSON on disk. Where the server
        refuses something that we ask for beside the question, all of this begins again without it.
        """
        body, file, wants = self._question(parts)
        shared, cached = stop or threading.Event(), self._kept(file)
        try:
            with alone(file, shared) if file and not cached else contextlib.nullcontext():
                read = cached = cached or self._kept(file)  # whoever held the lock before us may have got the answer
                if not cached:
                    raw = self._send(body, deadline or self.deadline, shared)
                    read = self._read(raw)
                    if file and keepable(read):
                        write_answer(file, raw)
        except TimeoutError as error:
            if stop and isinstance(error, Silence):
                raise VLMError(f"{self.name} gives no answer: {error}") from None
            return Reply("", f"unreachable: {error}", 0, 0, False)
        except Refused as error:
            refused = [name for name in wants if name in str(error).lower()]
            if not refused:
                raise
            self._go_without(refused[0], "refuses")
            return self.answer(parts, deadline, stop)
        text, end, *tokens, p = read
        if "logprobs" in wants and p is None and end == "complete" and parse_label(text) in (0, 1):
            self._go_without("logprobs", "gave an answer without")
        if self.max_usd is not None and end == "complete" and not any(tokens):
            raise VLMError(f"{self.name} does not say how many tokens it used, so max_usd cannot be kept: "
                           "use max_calls")
        with self._lock:
            for name, more in zip(self.TOTALS, (1, bool(cached), *tokens)):
                setattr(self, name, getattr(self, name) + more)
        return Reply(text, end, *tokens, bool(cached), p)

    def _go_without(self, name, why):
        """Say once what is missing, of WITHOUT. What the server refuses is not sent any more.

        trap: one answer without probabilities is no reason to stop asking for them, or other labels of the batch would
        depend on which answer arrives first.
        """
        with self._lock:
            first = name not in self._missed
            self._missed.add(name)
            if why == "refuses":
                self._wants = {**self._wants, name: {}}
        if first:
            warn(f"{self.name} {why} {self.WITHOUT[name]}")

    def _question(self, parts):
        """Parts -> the body to send (bytes), the file that its answer is kept in (None without a cache), and which of
        _wants the body asks for.

        Probabilities are asked for only where a label is: so call 1 of two is the same with them and without, and an
        answer to it that is on disk serves both.
        """
        text, image = self.wire.text, self.wire.image
        content = [text(part) if isinstance(part, str) else image(png_base64(part)) for part in parts]
        label = isinstance(parts[-1], str) and parts[-1].endswith(ANSWER)
        wants = {name: field for name, field in self._wants.items() if field and (label or name != "logprobs")}
        body = self.wire.body(self.model, content)
        for field in (*wants.values(), self.extra):
            body = merged(body, field)
        body = json.dumps(body).encode()
        # trap: the stand-in gets another port at each start, so its URL must not count. Its model's name says all that
        # matters (but plain "offline" names no model).
        where = "offline" if self.name.startswith("offline/") else f"{self.name}\n{self.url}"
        key = hashlib.sha256(where.encode() + b"\n" + body).hexdigest()
        return body, self.cache and self.cache / f"{key}.json", wants

    def _kept(self, file):
        """What _read() makes of the kept answer; None if there is none, or one that we would not have kept."""
        raw = read_answer(file)
        error = error_in(raw) if raw else {}
        if raw and (not error or filtered(error)):
            read = self._read(self._redacted(raw))  # it may come from an older version, or from elsewhere
            return read if keepable(read) else None

    def _read(self, raw):
        """Body of an answer -> (text, end, tokens in, tokens out, p_second). Whatever it holds, nothing is raised."""
        odd = (KeyError, IndexError, TypeError, AttributeError)
        try:
            data = json.loads(raw)
            if data.get("error"):
                return "(filtered)", "refused", 0, 0, None  # _judge() lets no other error through
            text, end, tokens_in, tokens_out = self.wire.read(data)
        except odd:
            return "", "empty", 0, 0, None  # such as "choices": "none"
        # trap: half an emoji ("\ud83d") is legal JSON, but can be neither printed nor written.
        text = text.encode(errors="replace").decode() if isinstance(text, str) else ""
        if end in ("complete", "failed") and not after_thinking(text).strip():
            end = "cut off" if text.strip() else "empty"  # cut off: all of it was thinking
        p = None
        if self._wants["logprobs"]:
            with contextlib.suppress(*odd):  # such as "logprobs": null
                p = p_second(text, self.wire.tokens(data))
        return text, end, counted(tokens_in), counted(tokens_out), p

    def _send(self, body, deadline, stop):
        """POST until there is an answer -> its body. TimeoutError when it is given up; VLMError when that is hopeless.

        Moments of time.monotonic(): `asked`, when the first try began; `moment`, before which the next try does not
        begin; `give_up`, after which no try begins.
        """
        asked = time.monotonic()
        give_up, moment, why = asked + deadline, 0.0, "told to wait"
        with self._lock:
            if stop is not self._batch:  # trap: between two batches nobody asks, and that is no silence of the server
                self._batch, self._silent_since = stop, math.inf
        for tries in itertools.count():
            # Wait until the next try may begin. Both clocks, this question's and that of all threads, are looked at.
            try:
                # trap: a server that always says "0 seconds" leaves nothing to wait for, and no end.
                if tries and time.monotonic() > give_up:
                    raise TimeoutError(f"{why}, {tries} tries; past the deadline")
                self._wait(moment, give_up, stop, f"{why}, {tries} tries")
                queued = time.monotonic()
                turn = self._turns.take(stop)
            except TimeoutError as error:
                silent = tries and not stop.is_set() and self._silent_since <= asked
                raise (Silence if silent else TimeoutError)(str(error)) from None
            # One try. status stays None when no answer came at all.
            began, status, wish, quick, late = time.monotonic(), None, None, False, False
            give_up += began - queued  # the queue does not count
            asked = asked if tries else began
            with self._lock:
                self._silent_since = min(self._silent_since, began)
            try:
                status, headers, raw = self._post(body)
                why, wish = self._judge(status, headers, raw)
                if not why:
                    quick = time.monotonic() - began < self.timeout[1] / 2
                    self._mark("")
                    return raw
            except HTTP_ERRORS as error:  # trap: while the body is read, errors of urllib3 come, not those of requests
                late = isinstance(error, TOO_LATE)
                why = self._reason(error, late)
            finally:
                self._turns.give_back(turn, quick, late)
            # The try failed. How long do we go on, and when is the next one?
            self._mark(why)
            now = time.monotonic()
            if self._silent_since <= now - deadline:
                give_up = 0.0  # other questions have waited for a whole deadline already: for this one it is over too
            elif not self._heard and not late and status in (None, 200):
                give_up = min(give_up, asked + self.soon)  # refused, or no VLM: it will hardly become one
            # Full jitter spreads the threads in time. After a fixed wait all of them would ask at once again.
            wait = random.random() * min(60, 2 ** min(tries, 6)) * self.backoff
            moment = now + (wish or wait)  # a wish for 0 seconds is none
            if status == 429 or wish is not None:  # one thread was told to slow down: all slow down
                with self._lock:
                    self._not_before = max(self._not_before, moment)

    def _mark(self, why):
        """Note a failed try (why it failed) or an answer (""). The first failure is shown; waits() hears of changes."""
        with self._lock:
            changed, first = self._waiting != bool(why), why and not self._warned
            self._waiting, self._warned = bool(why), self._warned or bool(why)
            if not why:
                self._heard, self._silent_since = True, math.inf
        if first:
            warn(f"waiting for the server: {why}")
        if changed:
            self.waits(bool(why))

    def _wait(self, moment, give_up, stop, why):
        """Sleep until the moment, or until the one before which no thread may ask, if that is later."""
        while not stop.is_set() and (left := max(moment, self._not_before) - time.monotonic()) > 0:
            if time.monotonic() + left > give_up:
                raise TimeoutError(f"{why}; {left:.0f} s more is past the deadline")
            stop.wait(left)
        if stop.is_set():
            raise TimeoutError("stopped")

    def _post(self, body):
        """One request -> (status, headers, text of the body, without the key). Raises HTTP_ERRORS."""
        pieces, room = [], LARGEST
        with self._session.post(self.url, body, stream=True, timeout=self.timeout, allow_redirects=False) as response:
            # trap: a few kilobytes can unpack to gigabytes. So the body is read piece by piece.
            while piece := response.raw.read1(65536, decode_content=True):
                pieces.append(piece)
                room -= len(piece)
                if room < 0:
                    raise requests.RequestException(f"an answer of more than {LARGEST:,} bytes")
            raw = b"".join(pieces).decode("utf-8-sig", "replace")  # trap: some servers begin with U+FEFF
            status = 200 if response.status_code == 201 else response.status_code  # 201: "created", some gateways say
            return status, response.headers, self._redacted(raw)

    def _reason(self, error, late):
        """What an exception means, in one line. requests hides the cause in the innermost of a chain."""
        if late:
            return f"no answer from {self.url} within {self.timeout[1]:g} s (--timeout)"
        while isinstance(error, HTTP_ERRORS) and (inner := error.__cause__ or error.__context__):
            error = inner
        said = " ".join(self._redacted(str(error)).split())[:300]
        return f"no answer from {self.url} ({said})"

    def _redacted(self, raw):
        """A body without the key, because some servers quote what they were sent. All that comes in passes here."""
        if not self._secret:
            return raw
        if re.search(r"\\u00[2-7]|\\/", raw):  # JSON can write any letter of a key as a number
            with contextlib.suppress(ValueError, RecursionError):
                raw = json.dumps(json.loads(raw))
        return self._secret.sub("[key]", raw)

    def _judge(self, status, headers, raw):
        """-> ("", None): it is an answer; (why, seconds wished or None): ask again. VLMError: it does not pass."""
        error = error_in(raw)
        code, kind = str(error.get("code", "")), str(error.get("type", ""))
        if (status == 400 and filtered(error)) or (status == 200 and not error):
            return "", None
        said = " ".join(str(error.get("message") or raw)[:3000].split())[:300]
        if status == 200 and raw.lstrip().startswith("<"):
            raise VLMError(f"{self.url} answered with a web page ({said}): check the URL")
        if status == 200:  # an error dressed as a success; one that does not name itself is treated like a 500
            status = int(code) if re.fullmatch("[45][0-9]{2}", code) else ERROR_STATUS.get(kind, 200)
        why = f"HTTP {status} from {self.url}: {said}"
        status = 500 if status == 200 else status
        gone = status == 429 and re.search(QUOTA_GONE, json.dumps(error))
        if not gone and (status in (408, 409, 425, 429) or status >= 500) and status != 501:
            return why, wait_wished(headers, error)
        raise Refused(f"{why} - {CURE.get(status, 'check the URL' if status < 400 else 'change what it refuses')}")


# ---- waiting for a turn ----
class Turns:
    """How many requests may be in flight at once: 1 at first, at most `most`.

    A server that answers one at a time lets the others wait. Behind seven others a request would time out, again and
    again, and its answer be computed in vain. So this adapts as TCP does: half as many after a request that timed out,
    and one more after an answer that took less than half of its time (one more in the queue would then have been
    answered too). A request that began under an earlier limit changes nothing.
    """

    def __init__(self, most):
        self.most, self.limit, self.taken, self.free = most, 1, 0, threading.Condition()

    def take(self, stop):
        """Wait for a turn -> the limit under which it was given. TimeoutError once `stop` is set."""
        with self.free:
            while self.taken >= self.limit and not stop.is_set():
                self.free.wait(0.2)  # not for ever, because nobody tells us when `stop` is set
            if stop.is_set():
                raise TimeoutError("stopped")
            self.taken += 1
            return self.limit

    def give_back(self, limit, quick, late):
        """limit: what take() returned.  quick: the answer took less than half of its time.  late: it timed out."""
        with self.free:
            self.taken -= 1
            if limit == self.limit:
                self.limit = max(1, limit // 2) if late else min(self.most, limit + quick)
            self.free.notify_all()


# ---- what each provider wants to read, and what it writes ----
def png_base64(image):
    """(H, W, 3) uint8 -> base64 of a PNG: without loss, and the same bytes for the same image."""
    return base64.b64encode(iio.imwrite("<bytes>", image, extension=".png", compress_level=1)).decode()


def counted(tokens):
    """What a server says of its tokens -> int; 0 for what is no number."""
    return int(tokens) if isinstance(tokens, (int, float)) and 0 <= tokens < 1e12 else 0


def ends(complete, cut_off, refused=""):
    """Three lists of words -> dict from a provider's finish reason to our word for it."""
    return {word: end for end, words in (("complete", complete), ("cut off", cut_off), ("refused", refused))
            for word in words.split()}


# A reason that is not listed is the server's fault ("failed"), such as OpenRouter's "error" and vLLM's "abort". Only
# Gemini has so many reasons for a refusal that all the others count as one.
OPENAI_ENDS = ends("stop eos eos_token stop_sequence end_turn complete completed done end finished "
                   "finish_reason_stop <|im_end|>",
                   "length max_tokens max_new_tokens model_length tool_calls function_call", "content_filter")
GEMINI_ENDS = ends("STOP", "MAX_TOKENS MALFORMED_RESPONSE CONTINUATION LANGUAGE")
ANTHROPIC_ENDS = ends("end_turn", "max_tokens model_context_window_exceeded stop_sequence tool_use pause_turn",
                      "refusal")


# What the three look like, with all that is read of them:
#   OpenAI     {"choices": [{"message": {"content": "1"}, "finish_reason": "stop"}],
#               "usage": {"prompt_tokens": 900, "completion_tokens": 2}}
#   Gemini     {"candidates": [{"content": {"parts": [{"text": "1"}]}, "finishReason": "STOP"}],
#               "usageMetadata": {"promptTokenCount": 900, "candidatesTokenCount": 2}}
#   Anthropic  {"content": [{"type": "text", "text": "1"}], "stop_reason": "end_turn",
#               "usage": {"input_tokens": 900, "output_tokens": 2}}
def openai_read(data):
    """The answer's JSON -> (text, end, tokens in, tokens out). The next two functions do the same.

    trap: "choices": [] and its likes cost tokens too, so what is missing may not stop the reading.
    The text of a model that thinks may be a list of parts, or stand in another place altogether; then `end` says where.
    """
    choice, usage = (data.get("choices") or [{}])[0], data.get("usage") or {}
    message, reason = choice.get("message") or {}, str(choice.get("finish_reason") or "stop").lower()
    text, refusal = message.get("content"), message.get("refusal")
    places = [key for key in ("reasoning_content", "reasoning", "thinking") if message.get(key)]
    if isinstance(text, list):  # of parts, some of them thoughts
        kinds = [part.get("type", "text") for part in text]
        places += [kind for kind in kinds if kind in ("thinking", "reasoning")]
        text = "".join(part.get("text") or "" for part, kind in zip(text, kinds) if kind in ("text", "output_text"))
    end = "refused" if refusal else OPENAI_ENDS.get(reason, "failed")
    if places and end in ("complete", "cut off") and not (text or "").strip():
        end = (f"{'empty' if end == 'complete' else end} (all of the text is in {places[0]}: turn thinking off, allow "
               "more tokens, or mend the server's reasoning parser)")
    return text or refusal, end, usage.get("prompt_tokens"), usage.get("completion_tokens")


def gemini_read(data):
    """See openai_read(). The question itself may be blocked, and parts may be missing when the answer is cut off."""
    blocked = (data.get("promptFeedback") or {}).get("blockReason")  # then there are no candidates
    answer = {"finishReason": blocked} if blocked else (data.get("candidates") or [{}])[0]
    parts, reason = (answer.get("content") or {}).get("parts") or [], answer.get("finishReason")
    text = "".join(part.get("text", "") for part in parts if not part.get("thought"))
    usage = data.get("usageMetadata") or {}
    # trap: thinking is billed as output, but counted apart.
    out = sum(counted(usage.get(kind)) for kind in ("candidatesTokenCount", "thoughtsTokenCount"))
    return text, "failed" if reason is None else GEMINI_ENDS.get(reason, "refused"), usage.get("promptTokenCount"), out


def anthropic_read(data):
    """See openai_read(). Thoughts are blocks of another type. Tokens that come from its prompt cache count as well."""
    text = "".join(block["text"] for block in data.get("content") or [] if block["type"] == "text")
    usage = data.get("usage") or {}
    kinds = ("input_tokens", "cache_read_input_tokens", "cache_creation_input_tokens")
    tokens_in = sum(counted(usage.get(kind)) for kind in kinds)
    return text, ANTHROPIC_ENDS.get(data.get("stop_reason"), "failed"), tokens_in, usage.get("output_tokens")


# And where the probabilities of tokens are, of an answer "1":
#   OpenAI     {"choices": [{"logprobs": {"content": [
#                  {"token": "1", "logprob": -0.36, "top_logprobs": [{"token": "1", "logprob": -0.36}, ...]}]}}]}
#   Gemini     {"candidates": [{"logprobsResult": {"chosenCandidates": [{"token": "1", "logProbability": -0.36}],
#                  "topCandidates": [{"candidates": [{"token": "1", "logProbability": -0.36}, ...]}]}}]}
#   Anthropic  has none
def openai_tokens(data):
    """The answer's JSON -> for each token (the token, {each that may have stood there: log-probability})."""
    return [(token["token"], {each["token"]: each["logprob"] for each in [*token["top_logprobs"], token]})
            for token in data["choices"][0]["logprobs"]["content"]]


def gemini_tokens(data):
    """See openai_tokens(). A log-probability of 0 may be left out, as any 0 in Google's JSON."""
    found = data["candidates"][0]["logprobsResult"]
    return [(token["token"], {each["token"]: each.get("logProbability", 0.0) for each in [*top["candidates"], token]})
            for token, top in zip(found["chosenCandidates"], found["topCandidates"])]


# All three formats are one POST of JSON. They differ in:
#   url, path      the official address; `local` has none, so the user names it. VLM fills in {model}.
#   variable       of the environment, holds the key. Whoever has an official address needs one.
#   headers        carry the key. VLM fills in {key}.
#   text, image    str -> one part of a question, as the provider writes it. An image is base64 of a PNG.
#   body           (model, list of parts) -> the whole question
#   read           the answer's JSON -> (text, end, tokens in, tokens out)
#   logprobs       what asks for the probabilities of tokens, {} where there are none; tokens reads them. Five for each
#                  token, because some servers allow no more.
#   greedy         what asks for the likeliest answer in place of a random one; {} where some models refuse that
Provider = namedtuple("Provider", "url path variable headers text image body read logprobs tokens greedy")
PROVIDERS = {
    "openai": Provider(
        "https://api.openai.com/v1", "/chat/completions", "OPENAI_API_KEY", {"Authorization": "Bearer {key}"},
        lambda text: {"type": "text", "text": text},
        lambda data: {"type": "image_url", "image_url": {"url": "data:image/png;base64," + data}},
        # There is no output limit: left out, it is the model's own, and thinking counts against it.
        lambda model, content: {"model": model, "messages": [{"role": "user", "content": content}]}, openai_read,
        {"logprobs": True, "top_logprobs": 5}, openai_tokens, {}),
    "gemini": Provider(
        # trap: Gemini also takes ?key=..., which ends up in logs and error messages.
        "https://generativelanguage.googleapis.com/v1beta", "/models/{model}:generateContent", "GEMINI_API_KEY",
        {"x-goog-api-key": "{key}"}, lambda text: {"text": text},
        # trap: some gateways drop camelCase "inlineData" silently and answer from the text alone.
        lambda data: {"inline_data": {"mime_type": "image/png", "data": data}},
        lambda model, content: {"contents": [{"role": "user", "parts": content}]}, gemini_read,
        {"generationConfig": {"responseLogprobs": True, "logprobs": 5}}, gemini_tokens, {}),
    "anthropic": Provider(
        "https://api.anthropic.com/v1", "/messages", "ANTHROPIC_API_KEY",
        {"x-api-key": "{key}", "anthropic-version": "2023-06-01"}, lambda text: {"type": "text", "text": text},
        # trap: the declared type is compared with the bytes; a PNG called image/jpeg is a 400.
        lambda data: {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": data}},
        # trap: max_tokens must be given, and thinking counts against it: do not be thrifty.
        lambda model, content: {"model": model, "max_tokens": 8192, "messages": [{"role": "user", "content": content}]},
        anthropic_read, {}, None, {})}
PROVIDERS["offline"] = PROVIDERS["openai"]._replace(url=None, variable="LOCAL_API_KEY")
# vLLM, llama.cpp and Ollama tell the probabilities before the temperature is applied: 0 does not make them 0 and 1.
PROVIDERS["local"] = PROVIDERS["offline"]._replace(greedy={"temperature": 0})


def merged(body, extra):
    """extra laid over body, dict by dict, so that a setting leaves its neighbours alone. None leaves a field out."""
    both = {key: merged(body[key], value) if isinstance(value, dict) and isinstance(body.get(key), dict) else value
            for key, value in extra.items()}
    return {key: value for key, value in {**body, **both}.items() if value is not None}


# ---- errors: which of them pass, how long to wait, what to tell the user ----
# "Too many requests" and "the money is gone" are both HTTP 429. The first passes and the second does not, so the words
# must tell. Gemini talks of billing in either case, but names the quota of a day in the second.
QUOTA_GONE = r'insufficient_quota|billing_hard_limit|enforced_spend_limit|"quotaId": "\w*PerDay'
# What an error body under HTTP 200 would have said as a status.
ERROR_STATUS = {"authentication_error": 401, "permission_error": 403, "not_found_error": 404,
                "invalid_request_error": 400, "billing_error": 402, "rate_limit_error": 429}
CURE = {401: "check the key", 403: "check the key and what it may use", 402: "check the plan and the spend limit",
        404: "check the model's name and the URL", 405: "check the URL", 407: "check the proxy", 501: "check the URL",
        429: "the quota is used up, waiting does not help: check the plan, then go on"}


def error_in(raw):
    """Body -> the error that it holds as a dict {message, code, ...}; {} if it holds none."""
    try:
        data = json.loads(raw)
        data = data[0] if isinstance(data, list) else data  # Gemini: sometimes in a list
        error = data.get("error") or data.get("detail") or data.get("type") == "error"
        return error if isinstance(error, dict) else {"message": str(error)} if error else {}
    except (ValueError, IndexError, AttributeError, RecursionError):  # no JSON, or none that a provider sends
        # trap: on a long page of <title> without an end the search would take hours.
        page = re.search(r"(?is)<title>(.*?)</title>", raw[:10_000])
        return {"message": page.group(1) if page else raw or "(nothing)"}


def filtered(error):
    """Is this error a refusal by a filter? Then it is an answer."""
    return str(error.get("code", "")).startswith(("content_filter", "content_policy"))


def wait_wished(headers, error):
    """Seconds that the server asked us to wait, or None. From a header, or Gemini's retryDelay: "34s"."""
    details = error.get("details") if isinstance(error.get("details"), list) else []
    delays = [str(d["retryDelay"]).rstrip("s") for d in details if isinstance(d, dict) and "retryDelay" in d]
    wish = headers.get("retry-after", delays[0] if delays else "")
    finer = headers.get("retry-after-ms", "")  # the same wish to the millisecond, from OpenAI
    try:
        if re.fullmatch(r"\d+(\.\d+)?", finer):
            return float(finer) / 1000
        # trap: floats and dates are in use, and urllib3's own Retry raises on them.
        if re.fullmatch(r"-?\d+(\.\d+)?", wish):
            return max(0.0, float(wish))
        return max(0.0, email.utils.parsedate_to_datetime(wish).timestamp() - time.time())
    except Exception:  # what a stranger calls a date may raise anything
        return None


def printable(text):
    """What a terminal may be shown of a stranger's text: "?" for what would steer or reorder it.

    Of the control and format characters these are kept: line feed, tab, and the two that join letters and emoji.
    """
    keep, steer = "\n\t\u200c\u200d", ("Cc", "Cf", "Cs")  # Cs: half of a pair, cannot be encoded
    return "".join("?" if unicodedata.category(c) in steer and c not in keep else c
                   for c in str(text).replace("\r\n", "\n"))


def warn(text):
    """A line on stderr; where there is a progress bar, above it."""
    bar = sys.modules.get("tqdm")
    (bar.tqdm.write if bar else print)(printable(text), file=sys.stderr)


# ---- answers on disk ----
# One file a question, named by the SHA-256 of model, URL and body; in it is the body of the answer, as it came. So a
# run that was stopped, or is started again with the same seed, asks for no answer twice. A question that differs in
# one pixel, one word or one setting is another question.
def keepable(read):
    """Refused and cut-off answers were paid for, so they are kept too; a failure of the server is not."""
    return not read[1].startswith(("empty", "failed"))


def write_answer(file, raw):
    """Keep the body of an answer, so that nobody pays for it again. VLMError if that cannot be."""
    new = file.with_suffix(f".{os.getpid()}.{threading.get_ident()}.tmp")
    try:
        with open(new, "wb") as stream:
            stream.write(raw.encode())
            stream.flush()
            os.fsync(stream.fileno())  # on disk before anything is learned from it
        os.replace(new, file)  # trap: a kill while writing must leave no half answer
    except OSError as error:
        new.unlink(missing_ok=True)
        raise VLMError(f"an answer cannot be kept: {error}") from None


def read_answer(file):
    """The body that was kept, or None. A torn file counts as none, so the question is asked again."""
    try:
        raw = file.read_bytes().decode() if file and file.stat().st_size <= LARGEST else ""
        return raw if isinstance(json.loads(raw), dict) else None
    except (OSError, ValueError, RecursionError):
        return None


def try_folder(folder):
    """Can answers be kept there? VLMError if not, before one is paid for. Leaves nothing behind."""
    place = folder.absolute()
    while not os.path.lexists(place):  # the folder itself is made with the first answer
        place = place.parent
    try:
        with tempfile.NamedTemporaryFile(dir=place) as file:
            file.write(b"0" * 4096)
            file.flush()
    except OSError as error:
        raise VLMError(f"answers cannot be kept in {folder} ({error.strerror})") from None


@contextlib.contextmanager
def alone(file, stop):
    """Hold the right to ask the question that `file` will answer. Others wait for it, also other processes.

    Two pairs may lead to the same second call at the same moment, and two runs beside each other ask much the same:
    each question is paid for once. The lock is the operating system's, on FILE.lock, so a process that dies lets go.
    """
    path, held = file.with_suffix(".lock"), False
    while not held:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            lock = open(path, "ab")
        except OSError as error:
            raise VLMError(f"answers cannot be kept: {error}") from None
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # trap: whoever held it before has removed the file, and a lock on a removed file keeps nobody out.
                held = os.path.samestat(os.fstat(lock.fileno()), os.stat(path))
            except (BlockingIOError, FileNotFoundError):
                pass
            except OSError:
                held = True  # a file system that knows no locks
            if held:
                try:
                    yield
                finally:
                    path.unlink(missing_ok=True)
            elif stop.wait(0.05):
                raise TimeoutError("stopped")


# ---- the connection: one clock, one size, no surprises ----
# requests does a lot unasked: it reads ~/.netrc and proxies, keeps cookies, follows redirects, waits for each byte
# anew. With a key in the header and a server that may be anybody's, each of these is a fault.
LARGEST = 4 << 20  # bytes of an answer, packed or unpacked; a long answer has a hundredth of that


class ClockedResponse(http.client.HTTPResponse):
    """An answer with one clock and one limit for all of it.

    trap: the timeout of requests is for one read of the socket. A server that drips a byte a second, of its header, of
    the size of a chunk, of "100 Continue" for ever, never meets it. So each read gets only the time that is left.
    """

    def __init__(self, sock, *args, **kwargs):
        super().__init__(sock, *args, **kwargs)
        read, room, end = self.fp.raw.readinto, LARGEST, time.monotonic() + sock.gettimeout()

        def readinto(buffer):
            nonlocal room
            if (left := end - time.monotonic()) <= 0:
                raise TimeoutError("the answer drips")
            sock.settimeout(left)
            room -= (size := read(buffer))
            if room < 0:
                raise OSError(f"an answer of more than {LARGEST:,} bytes")
            return size

        self.fp.raw.readinto = readinto  # self.fp buffers what it reads from self.fp.raw, which is the socket

    def _read_status(self):
        """The first line of an answer: http.client skips 100 itself, and this skips 102 and 103 with their headers."""
        while (line := super()._read_status())[1] in (102, 103):
            http.client.parse_headers(self.fp)
        return line


class Adapter(requests.adapters.HTTPAdapter):
    """Connections, direct or through a proxy, whose answers are ClockedResponse.

    requests asks this method for a pool of connections before each request. urllib3 names the class of an answer in the
    class of the connection, so each pool gets a subclass of its own connection class.
    """

    def get_connection_with_tls_context(self, *args, **kwargs):
        pool = super().get_connection_with_tls_context(*args, **kwargs)
        if pool.ConnectionCls.response_class is not ClockedResponse:
            pool.ConnectionCls = type("Clocked", (pool.ConnectionCls,), {"response_class": ClockedResponse})
        return pool


def open_session(base, headers, workers):
    """A session of requests that does what we say and nothing more. base: URL.  headers: the key, if there is one."""
    session = requests.Session()
    session.headers.update({"Content-Type": "application/json", **headers})
    # trap: a ~/.netrc entry for the host would replace our Authorization header.
    session.auth = lambda request: request
    # trap: a proxy named in the environment would be asked for this machine as well.
    session.trust_env = not is_loopback(urlsplit(base).hostname)
    # trap: with a cookie more in each answer, all of them sent with each question, a server soon refuses.
    session.cookies.set_policy(http.cookiejar.DefaultCookiePolicy(allowed_domains=[]))
    # trap: following a redirect would turn the POST into a GET and hand the key to a stranger; and requests reads the
    # body of a redirect that it does not follow, whatever its size.
    session.get_redirect_target = lambda response: None
    for scheme in ("http://", "https://"):  # the default pool keeps 10 connections
        session.mount(scheme, Adapter(pool_maxsize=workers))
    return session


def is_base_url(base):
    """Can questions be sent there? No user and no query, as these hold secrets; no fragment, which is never sent."""
    try:
        return bool(re.fullmatch(r"https?://[^/@?#\s]+(/[^@?#\s]*)?", base)
                    and (urlsplit(base).port, requests.Request("POST", base).prepare()))
    except ValueError:  # a port that is none, half an IPv6 address
        return False


def is_loopback(host):
    """Is it this machine, by any of its names: localhost, 127.0.0.1, 127.1, ::1, 0.0.0.0, ::, ...?"""
    names = r"(.*\.)?localhost(\.localdomain)?\.?|localhost[46](\.localdomain[46])?|ip6-l(ocalhost|oopback)"
    if re.fullmatch(names, host):
        return True
    try:  # "127.1" and "0" are addresses too; AI_NUMERICHOST: no name is looked up
        host = re.sub(r"%.*|\.$", "", host)  # "::1%lo" names the network card, "127.0.0.1." the root of all names
        numeric = socket.getaddrinfo(host, None, flags=socket.AI_NUMERICHOST)[0][4][0]
        address = ipaddress.ip_address(numeric)
    except (OSError, ValueError):
        return False
    address = getattr(address, "ipv4_mapped", None) or address
    return address.is_loopback or address.is_unspecified


def spellings(key):
    """A pattern for a key however it is quoted: as it is, in a URL, in JSON, anywhere in base64.

    In base64 three bytes make four characters of six bits. So the same key looks different after 0, 1 or 2 bytes of
    other text (modulo three), and its first and last character may depend on the neighbours: these are left out.
    """
    forms = {key, quote(key, safe=""), json.dumps(key)[1:-1]}
    for before in range(3):  # bytes before the key, of three that make four characters
        code = base64.b64encode(bytes(before) + key.encode()).decode()
        code = code[-(-8 * before // 6):8 * (before + len(key)) // 6]  # the characters that depend on the key alone
        forms |= {code, code.replace("+", "-").replace("/", "_")}
    return re.compile("|".join(map(re.escape, sorted(forms, key=len, reverse=True))), re.I)


# ---- images from files ----
# The VLM must see what a person sees who opens the file, or labels of photos would follow how the camera was held.
# trap: Pillow knows more formats, and hands some of them to other programs.
FORMATS = ("PNG", "JPEG", "GIF", "TIFF", "BMP", "WEBP", "PPM")


def load_image(path, most=4096):
    """File -> (H, W, 3) uint8, as a viewer shows it: upright, and what is transparent on white.

    Of several images or pages, the first. 16 bits are scaled from 0..65535, floats from 0..1.
    VLMError if it is no image, has more than `most` pixels a side, or holds numbers without a known scale.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # such as those about odd EXIF data
            # trap: a few kilobytes of PNG can unpack to gigabytes; open() reads only the header.
            with Image.open(path, formats=FORMATS) as image:
                width, height = image.size
                if max(height, width) <= most:
                    return np.array(as_seen(image))
    except Exception as error:  # a decoder fed with arbitrary bytes may raise anything
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        raise VLMError(f"{path}: not an image that can be used ({reason}); it may be {', '.join(FORMATS)}") from None
    raise VLMError(f"{path}: {width} x {height} pixels is too large (at most {most} a side)")


def as_seen(image):
    """PIL image of any mode -> RGB, turned upright, on white."""
    tag, clear = getattr(image, "tag_v2", {}).get, image.info.get("transparency")  # tag: of a TIFF
    if tag(339) == (2,) and tag(258) == (16,):  # SampleFormat and BitsPerSample: nobody can tell which number is white
        raise ValueError("16 bits with a sign")
    # trap: Pillow makes 8 bits of the pixels of RGB with 16 bits, but not of its transparent colour.
    if isinstance(clear, tuple) and max(clear) > 255:
        image.info["transparency"] = tuple(value >> 8 for value in clear)
    white_is_zero = tag(262) == 0  # PhotometricInterpretation
    image = ImageOps.exif_transpose(image)  # trap: a phone stores its photos lying on their side
    if image.mode[0] in "IF":  # trap: convert() would clip these at 255
        values, white = np.asarray(image, np.float64), 1.0 if image.mode == "F" else 65535.0
        low, high = values.min(), values.max()  # nan, if any value is
        # A scale of its own for each image would make two images incomparable; and 32 bits that hold a byte ("I") are
        # as likely a black image as a bright one.
        if not (low >= 0 and high <= white) or (image.mode == "I" and high < 256):
            raise ValueError(f"numbers from {low:g} to {high:g}, and not 0 to {white:g}")
        # trap: Pillow turns white-is-zero round for 8 bits, but not for 16; and convert() forgets the clear grey of 16.
        values = np.where(values == clear, white, white - values if white_is_zero else values)
        image = Image.fromarray(np.rint(values * (255 / white)).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


# ---- the log, and the command line ----
class LabelLog:
    """labels.jsonl: one record a line, on disk when append() returns. A record: see record_of().

    keep: on resume, how many records to keep. What came after the checkpoint is asked again, and answered from the
    cache. A last line torn by a crash is cut off, so the next record starts on its own line.
    """

    def __init__(self, path, keep=None):
        lines = []
        if os.path.exists(path):
            self.read(path)  # refuses what is not a label log before anything is cut
            lines = Path(path).read_bytes().split(b"\n")[:-1][:keep]
        self._file = open(path, "ab")
        self._file.truncate(sum(len(line) + 1 for line in lines))

    def append(self, record):
        """record: dict that JSON can write."""
        self._file.write(json.dumps(record).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self):
        self._file.close()

    @staticmethod
    def read(path):
        """-> list of dicts, without a torn last line. VLMError for a line that is no record."""
        records = []
        for number, line in enumerate(Path(path).read_bytes().split(b"\n")[:-1], start=1):
            try:
                records.append(json.loads(line))
            except (ValueError, RecursionError):
                records.append(None)
            if not isinstance(records[-1], dict):
                raise VLMError(f"{path}: line {number} is not a label record")
        return records


def main(arguments=None):
    """Label two files. Returns the exit code: 0, or 2 after one line on stderr."""
    parser = argparse.ArgumentParser(description="Which of two images is closer to a goal?")
    parser.add_argument("images", nargs=2, metavar="image")
    parser.add_argument("--goal", required=True, help='such as "to open the drawer"')
    parser.add_argument("--vlm", default="offline", help=f"{', '.join(PROVIDERS)}, then /MODEL")
    parser.add_argument("--vlm-url", help="its base URL, such as http://localhost:11434/v1")
    parser.add_argument("--stages", type=int, choices=(1, 2), default=2)
    options, server, records = parser.parse_args(arguments), None, []
    try:
        images = [load_image(path)[None] for path in options.images]  # (1, H, W, 3) each
        if options.vlm == "offline" and not options.vlm_url:  # start the stand-in beside this file
            script = Path(__file__).with_name("support") / "offline_vlm.py"
            server = subprocess.Popen([sys.executable, script, "--port", "0"], text=True, stdout=subprocess.PIPE)
            options.vlm_url = server.stdout.readline().rpartition(" ")[2].strip()
        vlm = VLM(options.vlm, url=options.vlm_url)
        label_pairs(vlm, *images, options.goal, options.stages, log=records.append)
    except (VLMError, ValueError, KeyboardInterrupt) as error:
        print("vlm_query.py:", printable(error) or "stopped", file=sys.stderr)
        return 2
    finally:
        if server:
            server.terminate()
    record, = records
    for end, answer in zip(record["ends"], record["answers"]):
        print(printable(f"--- {options.vlm} ({end}) ---\n{answer}\n"))
    meaning = {0: f"{options.images[0]} is closer", 1: f"{options.images[1]} is closer", -1: "it cannot tell",
               -2: f"no label: {record['kind']}"}[record["label"]]
    print(printable(f"label {record['label']}: {meaning}; tokens: {vlm.tokens_in} in, {vlm.tokens_out} out"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
